"""Train a captioner on a reward: self-critical sequence training, from a checkpoint that train.py wrote.

    python train_scst.py --init_from coco_train/coco_prefix_best.pt --data data/coco/oscar_split_ViT-B_32_train.pkl
    python train_scst.py --init_from my.pt --data my_photos.pkl --reward clip --kl 0.05

samples several captions per image, scores them, and makes those better than the image's others likelier.
--reward cider compares them with the image's references, clip with the image itself, so that photos without captions
(parse_coco.py --no_captions) can be learned from. Files, --resume and --val_data are train.py's; an epoch is a pass
over the images.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import train
from train_OPT import DECODING as OPT_DECODING
from training.settings import CIDER, OF_THE_CHECKPOINT, REWARDS, RewardConfig
from utils.cli import late_imports, non_negative_float, positive_int, run


def get_parser():
    """Return train.py's parser with the reward's flags, and no defaults for what the checkpoint decides."""
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
        help="cider: CIDEr-D against the image's references; clip: CLIPScore, which needs none; or both, each divided "
        "by its deviation",
    )  # fmt: skip
    group.add_argument("--samples", type=positive_int, default=RewardConfig.samples, help="captions sampled per image")
    group.add_argument(
        "--kl", type=non_negative_float, metavar="X", default=RewardConfig.kl,
        help="keep the captioner near its start: weight of the divergence per token, beside advantages of deviation 1; "
        "0.05 for the reward clip, which does not ask for sentences",
    )  # fmt: skip
    group.add_argument("--clip_model_type", help="encoder, where the checkpoint does not say or it has moved")
    return parser


def check_flags(args):
    """Refuse flags that do not apply here; raises ValueError."""
    for wrong, message in (
        (not args.init_from, "--init_from FILE is needed: a reward can only teach a captioner that captions already"),
        (args.samples < 2, f"--samples {args.samples}: a caption is compared with the image's others; pass 2 or more"),
        (args.group_by_length, "--group_by_length groups captions of the data, and here they are drawn; leave it out"),
        (args.noise_angle or args.match, "--noise_angle and --match are of train.py, for texts; leave them out"),
        (args.load_in, "--load_in: the checkpoint's language model stays as it is; leave it out"),
    ):
        if wrong:
            raise ValueError(message)


def main(argv=None):
    """Train as the command line says."""
    args = get_parser().parse_args(argv)
    check_flags(args)
    train.check_arguments(args)
    with late_imports():
        from training.reward_run import run_on_reward
    run_on_reward(args, OPT_DECODING)


if __name__ == "__main__":
    run(main)
