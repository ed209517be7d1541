"""The flags of training on texts instead of images."""

import argparse

AUTO = "auto"


def add_text_flags(parser):
    """Add the flags to train.py's parser."""
    group = parser.add_argument_group("text-only training", "on a store of parse_coco.py --text_only")
    group.add_argument(
        "--noise_angle", type=noise_angle, metavar="DEGREES|auto",
        help="turn each text embedding by this angle, in a direction drawn anew every epoch; auto: the median angle "
        "between the images of --match and their nearest texts, once matched",
    )  # fmt: skip
    group.add_argument(
        "--match", metavar="STORE",
        help="store of a few images, captioned or not: where text embeddings are moved, and in which directions turned",
    )  # fmt: skip


def noise_angle(text):
    """Argparse type: an angle between 0 and 90 degrees, or `auto`."""
    if text == AUTO:
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 90:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor an angle between 0 and 90 degrees")
    return value


def check_text_flags(args):
    """Refuse --match and --noise_angle where one needs the other; raises ValueError."""
    if args.match and args.noise_angle is None:
        raise ValueError("--match is for text-only training: pass --noise_angle auto too, or leave it out")
    if args.noise_angle == AUTO and not args.match:
        raise ValueError("--noise_angle auto measures the images of --match: pass a store of a few, or an angle")
