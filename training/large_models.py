"""The flags for language models that are large for the available devices."""

from models.settings import LOAD_IN
from utils.cli import non_negative_int
from utils.flags import add_device_flags, check_offloading
from utils.processes import world_size


def add_scale_flags(parser):
    """Add the flags to train.py's parser."""
    add_device_flags(parser)
    group = parser.add_argument_group("large models")
    group.add_argument(
        "--lora_rank", type=non_negative_int, default=0, metavar="N",
        help="train a LoRA of this rank on the language model in place of its weights (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--load_in", choices=LOAD_IN,
        help="number type of the language model's untrained weights (8bit, 4bit: bitsandbytes); checkpoints omit them",
    )  # fmt: skip
    group.add_argument("--fsdp", action="store_true", help="shard the model over torchrun's processes (FSDP2)")
    group.add_argument(
        "--gradient_checkpointing", action="store_true",
        help="recompute activations in the backward pass to save memory: the same loss, about a third slower",
    )  # fmt: skip


def check_scale_flags(args):
    """Refuse flags that do not go together; raises ValueError."""
    check_offloading(args)
    processes, load_in = world_size(), f"--load_in {args.load_in}"
    for wrong, message in (
        (args.only_prefix and args.lora_rank, "--only_prefix freezes what --lora_rank trains; leave one of them out"),
        (args.load_in and not (args.only_prefix or args.lora_rank),
         f"{load_in} holds weights that cannot be trained; add --only_prefix or --lora_rank"),
        (args.load_in and args.init_from,
         f"{load_in} takes its weights from --language_model, not from --init_from; leave one of them out"),
        (args.fsdp and processes == 1,
         "--fsdp shards the model over processes and there is one; start it by torchrun --nproc_per_node N"),
        (args.fsdp and args.load_in, f"--fsdp does not shard the weights of {load_in}; leave one of them out"),
        (args.fsdp and args.mixed_precision == "fp16", "--fsdp needs --mixed_precision bf16 or no"),
        (args.pn and processes > 1, f"--pn {args.pn} splits one process' model over devices, and each of "
         f"{processes} processes has one; leave --pn out, or use --fsdp"),
        (args.pn == "auto" and not args.only_prefix,
         "--pn auto may hold weights where they cannot be trained; add --only_prefix"),
        (args.pn and args.load_in in LOAD_IN[1:], f"{load_in} takes one device; leave --pn out"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
