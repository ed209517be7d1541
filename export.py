"""Export a captioner to ONNX: graphs, tokenizer and settings in a folder, which runtime/ captions with, without torch.

    python export.py --checkpoint coco_train/coco_prefix_latest.pt --out exported/ --dtype int8
    python export.py --checkpoint coco_train/coco_prefix_latest.pt --format torch --push ORG/NAME --license mit

The folder is checked: its captions of the --check pictures are compared with those of predict.py. Needs the extra
`export`. The second command puts the captioner itself on the Hugging Face Hub, where --checkpoint ORG/NAME finds it:
safetensors, json, tokenizer, and a model card; with --format onnx, --push uploads the export.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import importlib.util
import os
import re
from pathlib import Path

from exporting.card import ONNX, TORCH, read_scores
from models.captioner_files import captioner_files, check_captioner, is_export
from models.pretrained import SHARED_CONFIG, SHARED_WEIGHTS
from models.settings import BEAM, NO_RERANK, DecodingConfig
from predict import add_decoding_flags, add_parts_flags, decoding_config
from utils.cli import Parser, late_imports, run
from utils.hub import check_push, parse_repository
from utils.outputs import same_file


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="as for predict.py")
    parser.add_argument("--out", metavar="DIR", help="folder to write; an earlier export is replaced")
    parser.add_argument(
        "--format", choices=(ONNX, TORCH), default=ONNX,
        help="onnx: graphs for runtime/; torch: what --checkpoint takes: safetensors, json, tokenizer (default: onnx)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("fp32", "int8", "int4"), default="fp32",
        help="of weights; int4 keeps the encoder and the token embeddings in 8 bits (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--check", nargs="+", metavar="IMAGE", help="pictures to compare captions of")
    add_parts_flags(parser)
    hub = parser.add_argument_group("sharing")
    hub.add_argument(
        "--push", metavar="ORG/NAME", help="upload to this repository of the Hugging Face Hub, with a model card"
    )
    hub.add_argument("--private", action="store_true", help="make a new repository private")
    hub.add_argument("--license", metavar="ID", help="licence of the captioner, such as mit, for the card")
    hub.add_argument("--scores", metavar="FILE", help="what evaluate.py --out wrote, for the card")
    add_decoding_flags(parser, DecodingConfig())
    return parser


def check_sharing(args):
    """Refuse flags of sharing that do not go together, or a repository that takes no push; raises ValueError."""
    if not args.push:
        given = next((name for name in ("private", "license", "scores") if getattr(args, name)), None)
        if given or not args.out:
            raise ValueError(f"--{given} is for --push ORG/NAME" if given else "name --out DIR, or --push ORG/NAME")
        return
    named = parse_repository(args.push)
    if not named or named[1]:
        raise ValueError(f"--push {args.push} is not ORG/NAME")
    if args.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise ValueError(f"--license {args.license!r} is no identifier of the hub, such as mit or cc-by-4.0")
    if args.scores:
        read_scores(args.scores)
    there = check_push(args.push, args.private)
    if SHARED_CONFIG in there and (SHARED_WEIGHTS in there) != (args.format == TORCH):
        other = TORCH if args.format == ONNX else ONNX
        raise ValueError(f"--push {args.push} holds a captioner of --format {other}; name another repository")


def check_arguments(args, decoding):
    """Refuse what cannot be exported before anything is loaded; raises ValueError."""
    if args.format == ONNX:
        check_onnx(decoding)
    elif args.dtype != "fp32" or args.check:
        flag = "--check" if args.check else f"--dtype {args.dtype}"
        raise ValueError(f"{flag} is for --format onnx; --format torch keeps the weights as they are")
    missing = [path for path in args.check or () if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"--check: {missing[0]} is no file")
    if args.out:
        check_folder(args)
    check_captioner(args.checkpoint, args.clip_model_type)
    check_sharing(args)


def check_onnx(decoding):
    """Refuse what --format onnx lacks a package for, or cannot do; raises ValueError."""
    for package in ("onnx", "onnxscript", "onnxruntime", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'export.py needs the package {package}: pip install -e ".[export]"')
    if decoding.rerank != NO_RERANK:
        raise ValueError("an exported captioner does not rerank, and this one is meant to: pass --rerank none")
    if decoding.decoder == "transformers" and decoding.method == BEAM:
        raise ValueError("an exported captioner has our beam search only: pass --decoder clipcap")


def check_folder(args):
    """Refuse an --out that holds something else, or the captioner; raises ValueError."""
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and (is_earlier(out) or not any(out.iterdir()))):
        raise ValueError(f"--out {out} is there already and is no exported captioner; name another folder")
    files = captioner_files(args.checkpoint, args.clip_model_type, args.language_model)
    for file in map(Path, files):
        if out.exists() and (same_file(file, out) or any(same_file(parent, out) for parent in file.parents)):
            raise ValueError(f"--out {out} would overwrite the captioner, {file}; name another folder")


def is_earlier(folder):
    """Tell whether a folder is an earlier export of either format."""
    return is_export(folder) or (folder / SHARED_WEIGHTS).is_file()


def main(argv=None):
    """Export what the command line names, and upload it if asked to."""
    args = get_parser().parse_args(argv)
    decoding = decoding_config(args)
    check_arguments(args, decoding)
    with late_imports():
        from exporting.folder import export
    export(args, decoding)


if __name__ == "__main__":
    run(main)
