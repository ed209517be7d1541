"""A training run from a command line: stores -> captioner, tokenizer and data put together -> checkpoints.

train.py and its variants come here once their arguments are right.
"""

import contextlib
import os
from dataclasses import fields

import torch

from features.dataset import CaptionDataset
from features.store import check_captions, read_store
from features.text_only import AngleNoise
from models.checkpoint import check_tied, load_weights, read_config, with_output
from models.clip_caption import build_captioner
from models.language import (
    check_tokenizer,
    context_length,
    load_language_config,
    load_language_model,
    load_tokenizer,
)
from models.lora import add_lora
from models.placement import place
from models.pretrained import checkpoint_file
from models.settings import MAPPING_OPTIONS, CaptionConfig
from training.log import TrainingLog
from training.loop import fit
from training.objectives import CrossEntropy
from training.run_files import RunFiles
from training.settings import TrainingConfig
from training.text_only import prepare_texts, read_match
from training.trainer import Trainer
from training.validation import Validation
from utils.cli import note
from utils.devices import pick_devices
from utils.distributed import barrier, connected, own_device
from utils.flags import Placement
from utils.outputs import lock
from utils.processes import is_main, world_size

NORM_TOLERANCE = 0.01  # of a normalised float16 row's norm, from 1
RN_DIMS = (640, 768, 1024)  # widths of CLIP's ResNets: RN50x4; RN50x16; RN50 and RN50x64


def check_store(store, is_rn, normalize_prefix):
    """Refuse a store that --is_rn contradicts; warn of a normalised store where captioning would not normalise.

    Raises: ValueError.
    """
    norms = torch.as_tensor(store.clip_embedding[list(range(min(100, len(store.clip_embedding))))]).float().norm(dim=-1)
    if not normalize_prefix and ((norms - 1).abs() < NORM_TOLERANCE).all():
        note(
            f"warning: the embeddings of {store.path} are normalised, as clip-retrieval's are, and what predict.py "
            f"computes is not; pass --normalize_prefix"
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
    network = MAPPING_OPTIONS[args.mapping_type]
    options = ("prefix_length", "prefix_length_clip", "num_layers", "num_heads")
    lengths = {name: getattr(args, name) for name in options}
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
        device: of a language model in 8 or 4 bits, which cannot be moved later.
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
    """Return (Trainer, tokenizer) of a run that has not begun; arguments as in `train`.

    Raises: ValueError where model, tokenizer, checkpoint and data do not fit each other.
    """
    torch.manual_seed(training.seed)
    language_config = load_language_config(config.language_model)
    room = context_length(language_config)
    if room and config.prefix_length >= room:  # checked first: a mapping network grows with its square
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
        contents: {"data", "val_data", "match": the store's fingerprint}, compared when a run is resumed.
        prepare: function from (config, training, store, placement) to (Trainer, tokenizer).
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


def pick_placement(args):
    """Return where the captioner goes in this process.

    Raises: ValueError for devices that do not exist.
    """
    devices = pick_devices(args.device)
    if world_size() > 1:
        devices = [own_device(devices)]
    return Placement(devices, args.pn, args.offload_dir, args.max_memory, args.fsdp, args.gradient_checkpointing)


def configure(args, store, val_store):
    """Check and prepare what the command line asks for.

    Args:
        store: FeatureStore of --data. val_store: of --val_data, or None.
    Returns: CaptionConfig, TrainingConfig, the store to train on, {flag: further FeatureStore}.
    Raises: ValueError where flags and stores do not fit each other.
    """
    check_captions("--data", store)
    match = read_match(args.match, args.noise_angle, store, val_store)
    if args.noise_angle is not None:
        store, args.noise_angle = prepare_texts(store, args.noise_angle, match)
        args.normalize_prefix = True  # texts are normalised; predict.py reads this from the json for images
    return caption_config(args, store), training_config(args), store, {"match": match}


def run_training(args, decoding=None, configure=configure, prepare=prepare):
    """Train as a command line says.

    Args:
        args: of train.py's parser, or of a variant's, checked by `check_arguments`.
        decoding: DecodingConfig to record for the captioner; None: the defaults.
        configure: see the function of this name. prepare: see `train`.
    """
    placement, files = pick_placement(args), RunFiles(args.out_dir, args.prefix, decoding)
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
