"""Train a captioner on OPT: train.py with other defaults.

    python train_OPT.py --data data/coco/oscar_split_ViT-B_32_train.pkl --only_prefix --device 123 --pn 411

The language model is OPT_MODEL below, or --language_model NAME; its layers are split over the GPUs of --device.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import train
from models.settings import BEAM, DecodingConfig
from utils.cli import run

OPT_MODEL = "facebook/opt-125m"
# the predecessor's words for --language_model
LANGUAGE_MODELS = {"opt": OPT_MODEL}
# how predict_OPT.py captions
DECODING = DecodingConfig(BEAM, "transformers", beam_size=5, entry_length=30, stop_token="\n", prompt="a photo of")


def get_parser():
    """Return train.py's parser with OPT's defaults."""
    parser = train.get_parser(length=32)
    parser.description = __doc__.strip()
    parser.set_defaults(
        data="./data/coco/oscar_split_ViT-B_32_train.pkl",
        language_model=OPT_MODEL,
        mapping_type="transformer",
        optimizer="adamw_torch",
    )
    parser.aliases["language_model"] = LANGUAGE_MODELS
    return parser


def main(argv=None):
    """Train as the command line says."""
    train.main(argv, get_parser(), DECODING)


if __name__ == "__main__":
    run(main)
