"""Export a captioner to ONNX: graphs, tokenizer and settings in a folder, which runtime/ captions with, without torch.

    python export.py --checkpoint coco_train/coco_prefix_latest.pt --out exported/ --dtype int8

The folder is checked: its captions of the --check pictures are compared with those of predict.py. Needs the extra
`export`.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import importlib.util
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from models.captioner import Captioner, captioner_files
from models.decoding import BEAM, NO_RERANK, DecodingConfig
from models.language import context_length
from models.pretrained import ALIASES, DEMO, DEMO_CHECKPOINT
from models.stopping import begin_tokens, end_tokens
from predict import add_decoding_flags, decoding_config
from utils.cli import VERSION, Parser, note, run
from utils.files import read_json, sha256, write_json
from utils.outputs import lock, same_file
from utils.precision import unpack

FORMAT = 2  # of captioner.json
ROOT = Path(__file__).resolve().parent
STEPS = ("Resize", "CenterCrop", "ToTensor", "Normalize")  # of preprocessing, in this order


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
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or is_export(out))):
        raise ValueError(f"--out {out} is there already and is no exported captioner; name another folder")
    files = captioner_files(args.checkpoint, args.clip_model_type, args.language_model)
    for file in map(Path, files):
        if out.exists() and (same_file(file, out) or any(same_file(parent, out) for parent in file.parents)):
            raise ValueError(f"--out {out} would overwrite the captioner, {file}; name another folder")


def is_export(folder):
    """Tell whether a folder is an earlier export, and nothing else."""
    return (folder / "captioner.json").is_file() and "graphs" in read_json(folder / "captioner.json")


def preprocessing(encoder):
    """Return what turns an RGB picture into the encoder's pixels; raises ValueError where that is unknown."""
    steps = getattr(encoder.preprocess, "transforms", ())
    kinds = [type(step).__name__ for step in steps]
    if [kind for kind in STEPS if kind in kinds] != kinds or not {"ToTensor", "Normalize"} <= set(kinds):
        raise ValueError(f"the preprocessing of {encoder.name} cannot be exported: {' '.join(str(steps).split())}")
    told = {"size": None, "interpolation": None, "crop": None}
    for kind, step in zip(kinds, steps, strict=True):
        if kind == "Resize":
            size = step.size if isinstance(step.size, int) else list(step.size)
            told |= {"size": size[0] if isinstance(size, list) and len(size) == 1 else size,
                     "interpolation": step.interpolation.value}  # fmt: skip
        elif kind == "CenterCrop":
            told["crop"] = list(step.size)
        elif kind == "Normalize":
            told |= {name: torch.as_tensor(getattr(step, name)).tolist() for name in ("mean", "std")}
    return told


def describe(captioner, args, decoding):
    """Return what captioner.json says."""
    gpt, tokenizer, encoder = captioner.model.gpt, captioner.tokenizer, captioner.encoder
    name = ALIASES.get(args.checkpoint, args.checkpoint)
    file = DEMO_CHECKPOINT if name == DEMO else Path(name)
    return {
        "format": FORMAT,
        "graphs": ["encoder.onnx", "prefill.onnx", "step.onnx"],
        "dtype": args.dtype,
        "preprocessing": preprocessing(encoder),
        "shape": list(captioner.model.config.shape),
        "prefix_length": captioner.model.config.prefix_length,
        "context": context_length(gpt.config),
        "begin_tokens": begin_tokens(tokenizer),
        "end_tokens": end_tokens(tokenizer, gpt),
        "decoding": asdict(decoding),
        "made_of": {
            "checkpoint": file.name, "sha256": sha256(file) if file.is_file() else None, "encoder": encoder.describe(),
            "model": captioner.model.config.to_dict(), "language_model_config": gpt.config.to_dict(),
            "versions": {"clipcap": VERSION, "torch": torch.__version__},
        },
    }  # fmt: skip


def write_export(captioner, described, folder):
    """Write an exported captioner's files."""
    from exporting.graphs import check_rounding, make_graphs
    from exporting.weights import Store

    if not hasattr(captioner.tokenizer, "backend_tokenizer"):
        raise ValueError(f"{type(captioner.tokenizer).__name__} cannot be exported: it has no tokenizer.json")
    captioner.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    store = Store(folder / "weights.bin")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for name, model in make_graphs(captioner, Path(temporary), described["dtype"]):
            store.save(model, folder / f"{name}.onnx")
    check_rounding(captioner, folder)
    write_json(folder / "captioner.json", described)


def compare(folder, expected, paths):
    """Say which pictures the exported captioner captions otherwise; returns how many."""
    sys.path.append(str(ROOT / "runtime"))
    import clipcap_runtime

    exported, differing = clipcap_runtime.Captioner(folder), 0
    for path in paths:
        said = [
            " | ".join(caption.text for caption in group) for group in (expected[path], exported.captions([path])[0])
        ]
        if said[0] != said[1]:
            differing += 1
            note(f"warning: {path}: {said[0]!r} by predict.py, {said[1]!r} exported")
    return differing


def main(argv=None):
    """Export what the command line names."""
    args = get_parser().parse_args(argv)
    decoding = decoding_config(args)
    check_arguments(args, decoding)
    paths = [Path(path) for path in args.check or sorted((ROOT / "demo" / "images").glob("*.jpg"))]
    captioner = Captioner(args.checkpoint, args.clip_model_type, args.language_model, args.normalize_prefix, "cpu")
    if captioner.model.config.load_in in ("8bit", "4bit"):
        raise ValueError(f"a language model of --load_in {captioner.model.config.load_in} cannot be exported")
    captioner.model.float()
    expected = {}
    for captions, errors in captioner.caption_files(paths, decoding):
        if errors:
            raise ValueError("--check: " + "; ".join(f"{path}: {reason}" for path, reason in errors.items()))
        expected |= captions
    for module in (captioner.model, captioner.encoder.model):
        unpack(module)
    out = Path(os.path.abspath(args.out))
    with lock(out):
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            folder = Path(temporary) / "new"
            folder.mkdir()
            write_export(captioner, describe(captioner, args, decoding), folder)
            differing = compare(folder, expected, paths)
            if out.exists():
                out.rename(Path(temporary) / "old")
            folder.rename(out)
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    note(f"{out}: {size:,.0f} MB; {len(paths) - differing} of {len(paths)} captions are as predict.py's")


if __name__ == "__main__":
    run(main)
