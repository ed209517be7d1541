"""Caption images with a captioner on OPT: predict.py with other defaults.

    python predict_OPT.py photos/ --checkpoint checkpoints/coco_prefix_latest.pt

As the predecessor: the prompt "a photo of", transformers' beam search with 5 beams, at most 30 new tokens, ending with
the line. --beam_size 1 is greedy, --top_p samples.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import predict
from train_OPT import LANGUAGE_MODELS
from utils.cli import run

PROMPT = "a photo of"
MAX_NEW_TOKENS = 30


def get_parser():
    """Return predict.py's parser with OPT's defaults."""
    parser = predict.get_parser()
    parser.description = __doc__.strip()
    set_defaults(parser)
    return parser


def set_defaults(parser):
    """Give a captioning command the predecessor's settings for OPT."""
    parser.set_defaults(
        checkpoint="./checkpoints/coco_prefix_latest.pt",
        decoder="transformers",
        use_beam_search=None,  # unless --top_p is given
        prompt=PROMPT,
        entry_length=MAX_NEW_TOKENS,
        stop_token="\n",
    )
    parser.aliases["language_model"] = LANGUAGE_MODELS


def main(argv=None):
    """Caption what the command line names; returns 2 where an image could not be read."""
    return predict.main(argv, get_parser())


if __name__ == "__main__":
    run(main)
