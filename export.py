"""Export a captioner to ONNX: graphs, tokenizer and settings in a folder, which runtime/ captions with, without torch.

    python export.py --checkpoint coco_train/coco_prefix_latest.pt --out exported/ --dtype int8

The folder is checked: its captions of the --check pictures are compared with those of predict.py. Needs the extra
`export`.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import importlib.util
import os
from pathlib import Path

from models.captioner_files import captioner_files, check_captioner, is_export
from models.settings import BEAM, NO_RERANK, DecodingConfig
from predict import add_decoding_flags, decoding_config
from utils.cli import Parser, late_imports, run
from utils.outputs import same_file


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="as of predict.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; an earlier export is replaced")
    parser.add_argument(
        "--dtype", choices=("fp32", "int8", "int4"), default="fp32",
        help="of weights; int4 keeps the encoder and the table of words in 8 bits (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--check", nargs="+", metavar="IMAGE", help="pictures to compare captions of")
    parser.add_argument("--clip_model_type", help="encoder, where the checkpoint does not say or it has moved")
    parser.add_argument("--language_model", help="its folder or name, where the checkpoint does not say")
    parser.add_argument("--normalize_prefix", action="store_true", default=None, help="for a bare checkpoint")
    add_decoding_flags(parser, DecodingConfig())
    return parser


def check_arguments(args, decoding):
    """Refuse what cannot be exported before anything is loaded; raises ValueError."""
    for package in ("onnx", "onnxscript", "onnxruntime", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'export.py needs the package {package}: pip install -e ".[export]"')
    if decoding.rerank != NO_RERANK:
        raise ValueError("an exported captioner does not rerank, and this one is meant to: pass --rerank none")
    if decoding.decoder == "transformers" and decoding.method == BEAM:
        raise ValueError("an exported captioner has our beam search only: pass --decoder clipcap")
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and (is_export(out) or not any(out.iterdir()))):
        raise ValueError(f"--out {out} is there already and is no exported captioner; name another folder")
    files = captioner_files(args.checkpoint, args.clip_model_type, args.language_model)
    for file in map(Path, files):
        if out.exists() and (same_file(file, out) or any(same_file(parent, out) for parent in file.parents)):
            raise ValueError(f"--out {out} would overwrite the captioner, {file}; name another folder")
    check_captioner(args.checkpoint, args.clip_model_type)
    missing = [path for path in args.check or () if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"--check: {missing[0]} is no file")


def main(argv=None):
    """Export what the command line names."""
    args = get_parser().parse_args(argv)
    decoding = decoding_config(args)
    check_arguments(args, decoding)
    with late_imports():
        from exporting.folder import export
    export(args, decoding)


if __name__ == "__main__":
    run(main)
