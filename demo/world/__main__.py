"""Draw the synthetic world's splits.

    python -m demo.world --out demo/out/world --train 9000 --val 400 --test 1000

Input: nothing. Output: what demo/world/splits.py writes.
"""

import argparse

from demo.world.splits import FIRST_ID, write_split


def get_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Draw the synthetic world's splits.")
    parser.add_argument("--out", default="demo/out/world", help="folder to write")
    parser.add_argument("--train", type=int, default=9000, help="train images")
    parser.add_argument("--val", type=int, default=400, help="validation images")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--adapt", type=int, default=0, help="images to adapt to")
    parser.add_argument("--processes", type=int, default=2, help="processes that draw")
    return parser


def main(argv=None):
    """Draw what the command line asks for."""
    args = get_parser().parse_args(argv)
    for split in (split for split in FIRST_ID if getattr(args, split)):
        paths = write_split(split, getattr(args, split), args.out, args.processes)
        print(f"{split}: {getattr(args, split)} images in {paths['images']}")


if __name__ == "__main__":
    main()
