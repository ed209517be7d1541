"""A training run on a reward: the captioner of a checkpoint, its data and the objective put together."""

import copy
import functools

import torch

from features.image_dataset import ImageDataset
from features.store import check_encoders
from models.bare import OPT_EMBEDDINGS, guess_normalization
from models.captioner import encoder_of
from models.captioner_files import beside, stored_decoding
from models.checkpoint import load_captioner, load_weights, read_config
from models.clip_caption import build_captioner
from models.lora import add_lora
from models.placement import place
from models.pretrained import checkpoint_file
from models.settings import DecodingConfig
from training.rewards import CiderReward, ClipReward
from training.run import run_training, training_config
from training.self_critical import SelfCritical
from training.settings import CIDER, CLIP, OF_THE_CHECKPOINT, RewardConfig
from training.trainer import Trainer


def captioner_config(args, weights):
    """Return (this run's CaptionConfig, json or None), from the checkpoint that it starts from.

    Args:
        weights: the checkpoint's state dict.
    Raises: ValueError where a flag contradicts the checkpoint.
    """
    config, _, described = read_config(args.checkpoint, weights)
    if not described and args.normalize_prefix is None:
        guess_normalization(args.checkpoint, config, weights)
    elif not described:
        config.normalize_prefix = args.normalize_prefix
    for name in OF_THE_CHECKPOINT:
        given, own = getattr(args, name), getattr(config, name)
        if given not in (None, own):
            raise ValueError(f"--{name} {given} contradicts {args.init_from}, which has {own}; leave the flag out")
    if not config.load_in:  # else its own LoRA goes on learning; without load_in, any LoRA was merged into the weights
        config.lora_rank = args.lora_rank
        config.only_prefix = not args.lora_rank and (config.only_prefix or bool(args.only_prefix))
    config.language_model = args.language_model or beside(config.language_model, described)
    config.clip_model_type = beside(config.clip_model_type, described)
    return config, described


def check_data(store, config, described, checkpoint):
    """Refuse a store of texts, or one whose encoder is not the captioner's; raises ValueError."""
    if store.is_of_texts:
        raise ValueError(f"--data {store.path} holds texts, and captions are drawn for images; pass a store of images")
    known = config.to_dict() if described else {}  # a bare checkpoint's encoder is only guessed, by width
    check_encoders(f"--data {store.path}", store, f"--init_from {checkpoint}", config.shape, known)


def starting_captioner(args, config, device):
    """Return (captioner of --init_from, set up as `config` says; its tokenizer)."""
    model, tokenizer, _ = load_captioner(args.checkpoint, args.language_model, config.normalize_prefix, device)
    mapping = model.clip_project
    model = build_captioner(config, model.gpt)  # the language model may be frozen in this run only
    model.clip_project = mapping
    if config.lora_rank and not config.load_in:
        add_lora(model.gpt, config.lora_rank)
    return model, tokenizer


def frozen_copy(model, placement):
    """Return a frozen copy of the captioner; a language model that is frozen already is shared."""
    if model.config.only_prefix and not placement.fsdp:
        copied = build_captioner(model.config, model.gpt)
        copied.clip_project = copy.deepcopy(model.clip_project)
    else:
        copied = copy.deepcopy(model)
    copied.clip_project.requires_grad_(False)
    return copied if copied.gpt is model.gpt else copied.requires_grad_(False)


def prepare(args, decoding, described, config, training, store, placement):
    """Return (Trainer, tokenizer) of a run that has not begun.

    Args:
        args, decoding, described: the command line, the DecodingConfig and the json of --init_from.
        config, training, store, placement: as in `training.run.prepare`.
    Raises: ValueError where checkpoint, data and reward do not fit each other.
    """
    torch.manual_seed(training.seed)
    rewards = training.reward.split("+")
    dataset, device = ImageDataset(store, with_references=CIDER in rewards), placement.devices[0]
    model, tokenizer = starting_captioner(args, config, device)
    reference = frozen_copy(model, placement) if training.kl else None
    for captioner in filter(None, (model, reference)):
        place(captioner, placement)
    made = []
    if CIDER in rewards:
        made.append(CiderReward(dataset.references))
    if CLIP in rewards:
        encoder = encoder_of(config, args.checkpoint, args.clip_model_type, described is not None, device)
        encoder.check_texts(f"--reward {training.reward}")
        made.append(ClipReward(encoder))
    objective = SelfCritical(
        model, tokenizer, dataset, made, training.samples, decoding, training.seed, training.kl, reference
    )
    trainer = Trainer(model, objective, training, device)  # before captioning, which leaves sharded weights gathered
    objective.check_trained()
    return trainer, tokenizer


def run_on_reward(args, opt_decoding):
    """Train on a reward as train_scst.py's flags say; `opt_decoding`: DecodingConfig of bare OPT checkpoints."""
    args.checkpoint = checkpoint_file(args.init_from, "--init_from")
    weights = load_weights(args.checkpoint)
    config, described = captioner_config(args, weights)
    args.only_prefix = config.only_prefix
    decoding = stored_decoding(args.checkpoint) or (opt_decoding if OPT_EMBEDDINGS in weights else DecodingConfig())

    def configure(args, store, val_store):
        check_data(store, config, described, args.init_from)
        if store.num_tokens and CLIP in args.reward.split("+"):
            raise ValueError(
                f"--reward {args.reward} compares captions with one vector of their image, and --data {store.path} "
                f"holds tokens: pass --reward {CIDER}"
            )
        return config, training_config(args, RewardConfig), store, {}

    run_training(args, decoding, configure, functools.partial(prepare, args, decoding, described))
