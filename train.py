"""Train a captioner: feature store -> checkpoint.

    python train.py --data data/coco/oscar_split_ViT-B_32_train.pkl --out_dir coco_train

writes into coco_train/: coco_prefix-000.pt, coco_prefix-001.pt, ... and coco_prefix_latest.pt, coco_prefix.json (what
predict.py needs to know), coco_prefix-log.jsonl (a line per step) and coco_prefix-loss.png. Stopped by Ctrl-C, SIGTERM
or a crash, the same command with --resume goes on to the same weights. With --val_data every epoch is scored, and
coco_prefix_best.pt holds the weights of the highest CIDEr.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import contextlib
import os
from dataclasses import fields

import torch

from features.dataset import CaptionDataset
from features.store import check_captions, info_path, read_store
from features.text_only import AngleNoise
from models.checkpoint import check_tied, load_weights, read_config, with_output
from models.clip_caption import CaptionConfig, build_captioner
from models.language import (
    check_tokenizer,
    context_length,
    load_language_config,
    load_language_model,
    load_tokenizer,
)
from models.lora import add_lora
from models.mapping import MAPPING_NETWORKS
from models.placement import place
from models.pretrained import checkpoint_file
from training.large_models import add_scale_flags, pick_placement
from training.log import TrainingLog
from training.loop import fit
from training.objectives import CrossEntropy
from training.optimizers import WEIGHT_DECAY
from training.run_files import RunFiles
from training.text_only import add_text_flags, prepare_texts, read_match
from training.trainer import DTYPES, Trainer, TrainingConfig
from training.validation import Validation
from utils.cli import (
    Parser,
    non_negative_float,
    non_negative_int,
    note,
    positive_float,
    positive_int,
    run,
)  # fmt: skip
from utils.distributed import barrier, connected, is_main, world_size
from utils.outputs import lock

NORM_TOLERANCE = 0.01  # of float16 rows that were divided by their norm
RN_DIMS = (640, 768, 1024)  # widths of CLIP's ResNets: RN50x4; RN50x16; RN50 and RN50x64


def get_parser(length=10):
    """Return the command line's parser.

    Args:
        length: of the prefix, and tokens made of the CLIP embedding, where nothing else decides.
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
    model.add_argument("--only_prefix", action="store_true", help="train the mapping network only")
    model.add_argument("--mapping_type", choices=MAPPING_NETWORKS, default="mlp", help="mapping network")
    model.add_argument(
        "--prefix_length", type=positive_int,
        help=f"prefix positions (default: {length}; of the mlp on tokens, one for each token)",
    )  # fmt: skip
    model.add_argument(
        "--prefix_length_clip", type=positive_int,
        help=f"tokens the transformer makes of a CLIP embedding (default: {length}; of tokens, as many as there are)",
    )  # fmt: skip
    model.add_argument(
        "--num_layers", "--num_layres", type=positive_int,
        help=f"layers of the mapping network (default: {_defaults_of('num_layers')})",
    )  # fmt: skip
    model.add_argument(
        "--num_heads", type=positive_int, help=f"attention heads in it (default: {_defaults_of('num_heads')})"
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
        "bias correction); adamw_torch: torch's, as its train_OPT.py (eps 1e-8, after it)",
    )  # fmt: skip
    optimiser.add_argument("--lr", type=positive_float, default=defaults.lr, help="peak learning rate")
    optimiser.add_argument(
        "--weight_decay", type=non_negative_float, metavar="X",
        help="share of a weight, times the learning rate, that a step takes off (default: 0 for adamw_hf, 0.01 for "
        "adamw_torch)",
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
        "--mixed_precision", choices=DTYPES, default=defaults.mixed_precision, help="autocast to this type"
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
    has = {name: network.options[option] for name, network in MAPPING_NETWORKS.items() if option in network.options}
    return ", ".join(f"{value} of the {name}" for name, value in has.items())


def check_store(store, is_rn, normalize_prefix):
    """Refuse a store that --is_rn contradicts; warn where captioning would not normalise what is normalised here.

    Raises: ValueError.
    """
    norms = torch.as_tensor(store.clip_embedding[list(range(min(100, len(store.clip_embedding))))]).float().norm(dim=-1)
    if not normalize_prefix and ((norms - 1).abs() < NORM_TOLERANCE).all():
        note(
            f"warning: the embeddings of {store.path} are normalised, as clip-retrieval's are, and what predict.py "
            f"makes is not; pass --normalize_prefix"
        )
    encoder = str(store.info.get("clip_model_type", ""))
    resnet = encoder.startswith("RN") or (store.prefix_dim in RN_DIMS and not encoder.startswith("ViT"))
    if is_rn and not resnet:
        raise ValueError(
            f"--is_rn was given, but {store.path} holds embeddings of {encoder or 'an encoder'}, "
            f"{store.prefix_dim} wide; RN50x4's are 640: extract with --clip_model_type RN50x4, or leave out --is_rn"
        )


def caption_config(args, store):
    """Return the CaptionConfig that the command line and the store ask for.

    Raises: ValueError where they do not fit each other.
    """
    network = MAPPING_NETWORKS[args.mapping_type]
    options = {name: getattr(args, name) for name in ("prefix_length_clip", "num_layers", "num_heads")}
    for name, value in options.items():
        if value is not None and name not in (*network.options, *network.ignored):
            raise ValueError(f"--{name} {value}: --mapping_type {args.mapping_type} has no such option; leave it out")
    lengths = {"prefix_length": args.prefix_length} | options
    for name in ("prefix_length", "prefix_length_clip"):
        if lengths[name] is None and not (store.num_tokens and name == network.length_of_tokens):
            lengths[name] = args.usual_length
    return CaptionConfig(
        prefix_dim=store.prefix_dim,
        num_tokens=store.num_tokens,
        mapping_type=args.mapping_type,
        **lengths,
        only_prefix=args.only_prefix,
        normalize_prefix=args.normalize_prefix,
        language_model=args.language_model,
        clip_model_type=store.info.get("clip_model_type"),
        clip_sha256=store.info.get("clip_sha256"),
        lora_rank=args.lora_rank,
        load_in=args.load_in,
    )


def training_config(args, kind=TrainingConfig):
    """Return the TrainingConfig that the command line asks for; `kind` is that of a variant of this command."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def build_model(config, init_from=None, device="cpu"):
    """Return a captioner with a new mapping network, or with all weights of a checkpoint.

    Args:
        device: where a language model of 8 or 4 bits goes, which cannot move later.
    Raises: ValueError where the checkpoint does not fit.
    """
    model = build_captioner(config, load_language_model(config.language_model, config.load_in, device))
    if init_from:
        file = checkpoint_file(init_from, "--init_from")
        weights, own = with_output(model, load_weights(file)), model.state_dict()
        before, _, described = read_config(file, weights)
        if described and before.normalize_prefix and not config.normalize_prefix:
            raise ValueError(f"--init_from {init_from} was trained on normalised embeddings; pass --normalize_prefix")
        wrong = [k for k in own if k not in weights or weights[k].shape != own[k].shape] + [
            k for k in weights if k not in own
        ]
        if wrong:
            raise ValueError(
                f"--init_from {init_from} does not fit the captioner asked for: {wrong[0]} differs "
                f"({len(wrong)} in all); check --mapping_type, --prefix_length, --num_layers and --language_model"
            )
        check_tied(model, weights, init_from)
        model.load_state_dict(weights)
    if config.lora_rank:
        add_lora(model.gpt, config.lora_rank)
    return model


def prepare(config, training, store, placement):
    """Return (Trainer, tokenizer) of a run that has not begun; arguments as those of `train`.

    Raises: ValueError where model, tokenizer, checkpoint and data do not fit each other.
    """
    torch.manual_seed(training.seed)
    language_config = load_language_config(config.language_model)
    room = context_length(language_config)
    if room and config.prefix_length >= room:  # before a mapping network is built, which grows with its square
        what = f"--prefix_length {config.prefix_length}"
        raise ValueError(
            f"{what} leaves no room in the context of {room}; lower it"
            if config.prefix_length != config.num_tokens
            else f"{what}, one for each token, leaves no room in the context of {room}; use --mapping_type resampler"
        )
    tokenizer = load_tokenizer(config.language_model)
    check_tokenizer(tokenizer, language_config, config.language_model)
    model = build_model(config, training.init_from, placement.devices[0])
    noise = None
    if training.noise_angle:
        noise = AngleNoise(training.noise_angle, training.seed, store.clip_embedding.directions)
    dataset = CaptionDataset(store, tokenizer, room and room - config.prefix_length, noise)
    place(model, placement)
    return Trainer(model, CrossEntropy(dataset), training, placement.devices[0]), tokenizer


def train(config, training, store, files, placement, resuming=False, save_every=1, save_steps=10_000,
          validation=None, contents=None, prepare=prepare):  # fmt: skip
    """Train a captioner, or go on with a run.

    Args:
        config: CaptionConfig. training: TrainingConfig. store: FeatureStore. files: RunFiles.
        placement: Placement of the captioner.
        resuming: go on with the run in `files`, where there is one.
        save_every, save_steps, validation: see `fit`.
        contents: {"data", "val_data", "match": the stores' fingerprints}, which a continuation is compared with.
        prepare: function of config, training, store and placement to (Trainer, tokenizer).
    Returns: the captioner.
    """
    contents = contents or {}
    resuming = resuming and files.config.is_file()
    if resuming:
        files.check_resume(config, training, contents)
    trainer, tokenizer = prepare(config, training, store, placement)
    model = trainer.model
    begun = resuming and files.resume(trainer)
    barrier()  # all have read what process 0 may move aside
    if not begun and is_main():
        files.move_aside()
        files.write_config(config, training, model.gpt.config, tokenizer, store, contents)
    if trainer.epoch >= training.epochs:
        note(f"{files.latest} has all {training.epochs} epochs; nothing to do")
        return model
    learning = sum(p.numel() for p in trainer.trained.values()) / 1e6
    total = sum(p.numel() for p in model.parameters()) / 1e6
    note(
        f"{len(trainer.dataset):,} {trainer.dataset.unit} of {len(store.clip_embedding):,} rows; "
        f"{learning:.1f} M of {total:.1f} M parameters learn, on {', '.join(map(str, placement.devices))}"
        f"{f' in each of {world_size()} processes' * (world_size() > 1)}"
    )
    steps = training.epochs * trainer.steps_per_epoch
    if training.warmup_steps >= steps:
        note(
            f"warning: --warmup_steps {training.warmup_steps} is not shorter than the training of {steps} steps: "
            f"--lr is never reached; lower it, to a tenth of the steps or so"
        )
    with TrainingLog(files.log if is_main() else os.devnull, trainer.step, trainer.epoch) as log:
        fit(trainer, files, log, tokenizer, save_every, save_steps, validation)
    return model


def main(argv=None, parser=None, decoding=None):
    """Train as the command line says; `parser` and `decoding` are those of a variant of this command."""
    run_training((parser or get_parser()).parse_args(argv), decoding)


def configure(args, store, val_store):
    """Check and prepare what the command line asks for.

    Args:
        store: FeatureStore of --data. val_store: of --val_data, or None.
    Returns: CaptionConfig, TrainingConfig, the store as it is trained on, {flag: further FeatureStore}.
    Raises: ValueError where flags and stores do not fit each other.
    """
    check_captions("--data", store)
    match = read_match(args.match, args.noise_angle, store, val_store)
    if args.noise_angle is not None:
        store, args.noise_angle = prepare_texts(store, args.noise_angle, match)
        args.normalize_prefix = True  # as the texts are; predict.py reads it in the json and does so to images
    return caption_config(args, store), training_config(args), store, {"match": match}


def run_training(args, decoding=None, configure=configure, prepare=prepare):
    """Train as a command line says.

    Args:
        args: of `get_parser`, or of a variant's parser.
        decoding: DecodingConfig that the captioner is meant for; None: the defaults.
        configure: see the function of this name. prepare: see `train`.
    """
    placement, files = pick_placement(args), RunFiles(args.out_dir, args.prefix, decoding)
    stores = {"--data": args.data, "--val_data": args.val_data, "--match": args.match}
    stores = {flag: path for flag, path in stores.items() if path}
    begun_from = {"--init_from": args.init_from} if args.init_from else {}
    files.check(stores | {f"the json of {flag}'s store": info_path(path) for flag, path in stores.items()} | begun_from)
    with (
        connected(placement.devices[0]),
        lock(files.config, "--prefix or --out_dir") if is_main() else contextlib.nullcontext(),
    ):
        data, val_store = read_store(args.data), read_store(args.val_data) if args.val_data else None
        if val_store:
            check_captions("--val_data", val_store)
        config, training, store, further = configure(args, data, val_store)
        check_store(store, args.is_rn, config.normalize_prefix)
        contents = {"data": data, "val_data": val_store} | further
        contents = {name: one.fingerprint() for name, one in contents.items() if one}
        train(
            config,
            training,
            store,
            files,
            placement,
            args.resume,
            args.save_every,
            args.save_steps,
            Validation(val_store, store) if val_store else None,
            contents,
            prepare,
        )


if __name__ == "__main__":
    run(main)
