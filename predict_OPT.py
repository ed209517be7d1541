"""Caption images with a captioner on OPT: predict.py with other defaults.

    python predict_OPT.py photos/ --checkpoint checkpoints/coco_prefix_latest.pt

As in the predecessor: the prompt "a photo of", transformers' beam search with 5 beams, at most 30 new tokens, ending at
a line break. --beam_size 1 is greedy, --top_p samples.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import predict
from train_OPT import DECODING, LANGUAGE_MODELS
from utils.cli import run


def get_parser():
    """Return predict.py's parser with OPT's defaults."""
    parser = predict.get_parser(DECODING)
    parser.description = __doc__.strip()
    set_defaults(parser)
    return parser


def set_defaults(parser):
    """Give a captioning command the predecessor's names for OPT."""
    parser.set_defaults(checkpoint="./checkpoints/coco_prefix_latest.pt")
    parser.aliases["language_model"] = LANGUAGE_MODELS


def main(argv=None):
    """Caption what the command line names; returns 2 where an image could not be read."""
    return predict.main(argv, get_parser())


if __name__ == "__main__":
    run(main)
