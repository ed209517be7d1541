"""Train a captioner: feature store -> checkpoint.

    python train.py --data data/coco/oscar_split_ViT-B_32_train.pkl --out_dir coco_train

writes into coco_train/: coco_prefix-000.pt, coco_prefix-001.pt, ... and coco_prefix_latest.pt, coco_prefix.json (what
predict.py needs to know), coco_prefix-log.jsonl (a line per step) and coco_prefix-loss.png. After Ctrl-C, SIGTERM or a
crash, the same command with --resume goes on to the same weights. With --val_data every epoch is scored, and
coco_prefix_best.pt holds the weights of the highest CIDEr.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

from features.store_files import check_there, info_path
from models.captioner_files import check_captioner
from models.settings import MAPPING_OPTIONS
from training.large_models import add_scale_flags, check_scale_flags
from training.run_names import RunNames
from training.settings import MIXED_PRECISION, WEIGHT_DECAY, TrainingConfig
from training.text_flags import add_text_flags, check_text_flags
from utils.cli import Parser, late_imports, non_negative_float, non_negative_int, positive_float, positive_int, run


def get_parser(length=10):
    """Return the command line's parser.

    Args:
        length: default of --prefix_length and --prefix_length_clip.
    """
    parser = Parser(__doc__)
    parser.set_defaults(usual_length=length)
    files = parser.add_argument_group("files")
    files.add_argument("--data", default="./data/coco/oscar_split_train.pkl", help="feature store of parse_coco.py")
    files.add_argument(
        "--val_data", metavar="F", help="feature store to score after every epoch, by BLEU, ROUGE-L, CIDEr"
    )
    files.add_argument("--out_dir", default="./checkpoints", help="folder to write")
    files.add_argument("--prefix", default="coco_prefix", help="name that the written files begin with")
    files.add_argument("--init_from", metavar="FILE", help="checkpoint, or ORG/NAME of the hub, to start from")
    files.add_argument("--resume", action="store_true", help="go on with the run of the same --out_dir and --prefix")
    files.add_argument("--save_every", type=positive_int, default=1, help="epochs between checkpoints")
    files.add_argument("--save_steps", type=positive_int, default=10_000, help="steps between saves to resume from")
    model = parser.add_argument_group("model")
    model.add_argument("--language_model", default="gpt2", help="name on the hub, or folder")
    model.add_argument(
        "--only_prefix", action="store_true", help="train the mapping network only; the language model stays as it is"
    )
    model.add_argument("--mapping_type", choices=MAPPING_OPTIONS, default="mlp", help="network between CLIP and prefix")
    model.add_argument(
        "--prefix_length", type=positive_int,
        help=f"prefix positions (default: {length}; for the mlp on tokens, one per token)",
    )  # fmt: skip
    model.add_argument(
        "--prefix_length_clip", type=positive_int,
        help=f"tokens the transformer makes of a CLIP embedding (default: {length}; for tokens, as many as there are)",
    )  # fmt: skip
    model.add_argument(
        "--num_layers", "--num_layres", type=positive_int,
        help=f"layers of the mapping network (default: {_defaults_of('num_layers')})",
    )  # fmt: skip
    model.add_argument(
        "--num_heads", type=positive_int, help=f"attention heads of the network (default: {_defaults_of('num_heads')})"
    )
    model.add_argument("--is_rn", action="store_true", help="the encoder is a ResNet; the width is read from the data")
    model.add_argument("--normalize_prefix", action="store_true", help="divide CLIP embeddings by their L2 norm")
    defaults = TrainingConfig(data="")
    optimiser = parser.add_argument_group("optimisation")
    optimiser.add_argument("--epochs", type=positive_int, default=defaults.epochs, help="passes over the captions")
    optimiser.add_argument(
        "--bs", type=positive_int, default=defaults.bs, help="captions per batch, of all processes together"
    )
    optimiser.add_argument(
        "--optimizer", choices=WEIGHT_DECAY, default=defaults.optimizer,
        help="adamw_hf: transformers' AdamW up to 4.46, which the predecessor's train.py imports (eps 1e-6, before the "
        "bias correction); adamw_torch: torch's, as in its train_OPT.py (eps 1e-8, after it)",
    )  # fmt: skip
    optimiser.add_argument("--lr", type=positive_float, default=defaults.lr, help="peak learning rate")
    optimiser.add_argument(
        "--weight_decay", type=non_negative_float, metavar="X",
        help="decoupled weight decay (default: 0 for adamw_hf, 0.01 for adamw_torch)",
    )  # fmt: skip
    optimiser.add_argument(
        "--warmup_steps", type=non_negative_int, default=defaults.warmup_steps, help="steps of linear warm-up"
    )
    optimiser.add_argument(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=defaults.gradient_accumulation_steps,
        help="batches per optimiser step",
    )
    optimiser.add_argument(
        "--mixed_precision", choices=MIXED_PRECISION, default=defaults.mixed_precision, help="autocast to this dtype"
    )
    optimiser.add_argument(
        "--group_by_length", action="store_true", help="batches of captions of similar length: less padding"
    )
    optimiser.add_argument(
        "--seed", type=non_negative_int, default=defaults.seed, help="of initial weights, shuffling, dropout"
    )
    add_text_flags(parser)
    add_scale_flags(parser)
    return parser


def _defaults_of(option):
    """Say the defaults of an option of mapping networks."""
    has = {name: network.options[option] for name, network in MAPPING_OPTIONS.items() if option in network.options}
    return ", ".join(f"{value} of the {name}" for name, value in has.items())


def check_arguments(args):
    """Refuse what cannot be trained, as far as can be told without reading a store or a model.

    Raises: ValueError for flags that contradict each other, or a run that would overwrite other files;
        FileNotFoundError for a file that is not there.
    """
    check_scale_flags(args)
    check_text_flags(args)
    network = MAPPING_OPTIONS.get(args.mapping_type)
    for name in ("prefix_length_clip", "num_layers", "num_heads") if network else ():
        value = getattr(args, name)
        if value is not None and name not in (*network.options, *network.ignored):
            raise ValueError(f"--{name} {value}: --mapping_type {args.mapping_type} has no such option; leave it out")
    stores = {"--data": args.data, "--val_data": args.val_data, "--match": args.match}
    stores = {flag: path for flag, path in stores.items() if path}
    inputs = stores | {f"the json of {flag}'s store": info_path(path) for flag, path in stores.items()}
    if args.init_from:
        inputs["--init_from"] = args.init_from
    RunNames(args.out_dir, args.prefix).check(inputs)
    for path in stores.values():
        check_there(path)
    if args.init_from:
        check_captioner(args.init_from, flag="--init_from")


def main(argv=None, parser=None, decoding=None):
    """Train as the command line says; `parser` and `decoding` are those of a variant of this command."""
    args = (parser or get_parser()).parse_args(argv)
    check_arguments(args)
    with late_imports():
        from training.run import run_training
    run_training(args, decoding)


if __name__ == "__main__":
    run(main)
