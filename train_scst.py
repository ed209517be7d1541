"""Train a captioner on a reward: self-critical sequence training, from a checkpoint that train.py wrote.

    python train_scst.py --init_from coco_train/coco_prefix_best.pt --data data/coco/oscar_split_ViT-B_32_train.pkl
    python train_scst.py --init_from my.pt --data my_photos.pkl --reward clip --kl 0.05

draws several captions of every image, scores them, and makes those likelier that are better than the image's others.
--reward cider compares them with the image's references, clip with the image itself, so that photos without captions
(parse_coco.py --no_captions) can be learned from. Files, --resume and --val_data are train.py's; an epoch is a pass
over the images.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import copy
import functools
from dataclasses import dataclass

import torch

import train
from features.image_dataset import ImageDataset
from models.bare import OPT_EMBEDDINGS, guess_normalization
from models.captioner import encoder_of, stored_decoding
from models.checkpoint import beside, load_captioner, load_weights, read_config
from models.clip_caption import build_captioner
from models.decoding import DecodingConfig
from models.lora import add_lora
from models.placement import place
from models.pretrained import checkpoint_file
from train_OPT import DECODING as OPT_DECODING
from training.rewards import CIDER, CLIP, REWARDS, CiderReward, ClipReward
from training.self_critical import SelfCritical
from training.trainer import Trainer, TrainingConfig
from training.validation import check_encoders
from utils.cli import non_negative_float, positive_int, run

# flags of train.py that the checkpoint answers: CaptionConfig's of the same names
OF_THE_CHECKPOINT = (
    "mapping_type", "prefix_length", "prefix_length_clip", "num_layers", "num_heads", "normalize_prefix",
)  # fmt: skip


@dataclass
class RewardConfig(TrainingConfig):
    """How a captioner is trained on a reward.

    Args:
        reward: one of REWARDS.
        samples: captions drawn of an image.
        kl: weight of the divergence from the captioner at the start.
    """

    reward: str = CIDER
    samples: int = 5
    kl: float = 0.0


def get_parser():
    """Return train.py's parser, with the reward's flags and what the checkpoint answers left open."""
    parser = train.get_parser()
    parser.description = __doc__.strip()
    parser.set_defaults(
        prefix="scst_prefix", lr=5e-6, warmup_steps=0, language_model=None, **dict.fromkeys(OF_THE_CHECKPOINT)
    )
    for action in parser._actions:
        if action.dest in OF_THE_CHECKPOINT:
            action.help = "as the checkpoint has it"
    group = parser.add_argument_group("reward")
    group.add_argument(
        "--reward", choices=REWARDS, default=CIDER,
        help="cider: CIDEr-D against the image's references; clip: CLIPScore, which needs none; or both, each by its "
        "deviation",
    )  # fmt: skip
    group.add_argument("--samples", type=positive_int, default=RewardConfig.samples, help="captions drawn of an image")
    group.add_argument(
        "--kl", type=non_negative_float, metavar="X", default=RewardConfig.kl,
        help="hold the captioner near the one it was: weight of the divergence per token, beside advantages of "
        "deviation 1; 0.05 for the reward clip, which sentences need not please",
    )  # fmt: skip
    group.add_argument("--clip_model_type", help="encoder, where the checkpoint does not say or it has moved")
    return parser


def check_flags(args):
    """Refuse flags that say nothing here; raises ValueError."""
    for wrong, message in (
        (not args.init_from, "--init_from FILE is needed: a reward can only teach a captioner that captions already"),
        (args.samples < 2, f"--samples {args.samples}: a caption is compared with the image's others; pass 2 or more"),
        (args.group_by_length, "--group_by_length groups captions of the data, and here they are drawn; leave it out"),
        (args.noise_angle or args.match, "--noise_angle and --match are of train.py, for texts; leave them out"),
        (args.load_in, "--load_in: the checkpoint's language model stays as it is; leave it out"),
    ):
        if wrong:
            raise ValueError(message)


def captioner_config(args, weights):
    """Return (CaptionConfig, json or None) of the checkpoint to start from, as this run's.

    Args:
        weights: its state dict.
    Raises: ValueError where a flag contradicts it.
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
    if not config.load_in:  # else it holds the LoRA that goes on learning; elsewhere one was added into the weights
        config.lora_rank = args.lora_rank
        config.only_prefix = not args.lora_rank and (config.only_prefix or bool(args.only_prefix))
    config.language_model = args.language_model or beside(config.language_model, described)
    config.clip_model_type = beside(config.clip_model_type, described)
    return config, described


def check_data(store, config, described, checkpoint):
    """Refuse a store of texts, or of another encoder than the captioner's; raises ValueError."""
    if store.is_of_texts:
        raise ValueError(f"--data {store.path} holds texts, and captions are drawn of images; pass a store of those")
    known = config.to_dict() if described else {}  # of a bare checkpoint, the encoder is a guess by its width
    check_encoders(f"--data {store.path}", store, f"--init_from {checkpoint}", config.shape, known)


def starting_captioner(args, config, device):
    """Return (captioner of --init_from as `config` has it, its tokenizer)."""
    model, tokenizer, _ = load_captioner(args.checkpoint, args.language_model, config.normalize_prefix, device)
    mapping = model.clip_project
    model = build_captioner(config, model.gpt)  # which may be frozen here and was not there
    model.clip_project = mapping
    if config.lora_rank and not config.load_in:
        add_lora(model.gpt, config.lora_rank)
    return model, tokenizer


def frozen_copy(model, placement):
    """Return the captioner as it is now, which learns nothing; a frozen language model is shared."""
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
        config, training, store, placement: as of `train.prepare`.
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
    trainer = Trainer(model, objective, training, device)  # before captioning, which leaves sharded weights whole
    objective.check_trained()
    return trainer, tokenizer


def main(argv=None):
    """Train as the command line says."""
    args = get_parser().parse_args(argv)
    check_flags(args)
    args.checkpoint = checkpoint_file(args.init_from, "--init_from")
    weights = load_weights(args.checkpoint)
    config, described = captioner_config(args, weights)
    args.only_prefix = config.only_prefix
    decoding = stored_decoding(args.checkpoint) or (OPT_DECODING if OPT_EMBEDDINGS in weights else DecodingConfig())

    def configure(args, store, val_store):
        check_data(store, config, described, args.init_from)
        if store.num_tokens and CLIP in args.reward.split("+"):
            raise ValueError(
                f"--reward {args.reward} compares captions with one vector of their image, and --data {store.path} "
                f"holds tokens: pass --reward {CIDER}"
            )
        return config, train.training_config(args, RewardConfig), store, {}

    train.run_training(args, decoding, configure, functools.partial(prepare, args, decoding, described))


if __name__ == "__main__":
    run(main)
