"""Export a captioner to ONNX: graphs, tokenizer and settings in a folder, which runtime/ captions with, without torch.

    python export.py --checkpoint coco_train/coco_prefix_latest.pt --out exported/ --dtype int8
    python export.py --checkpoint coco_train/coco_prefix_latest.pt --format torch --push ORG/NAME --license mit

The folder is checked: its captions of the --check pictures are compared with those of predict.py. Needs the extra
`export`. The second command puts the captioner itself on the Hugging Face Hub, where --checkpoint ORG/NAME finds it:
safetensors, json, tokenizer, and a model card; with --format onnx --push uploads the export.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from exporting.card import ONNX, TORCH, read_scores
from exporting.share import describe_shared, without_folders, write_card, write_shared
from models.captioner import Captioner, captioner_files
from models.decoding import BEAM, NO_RERANK, DecodingConfig
from models.language import context_length
from models.pretrained import SHARED_CONFIG, SHARED_WEIGHTS, checkpoint_file
from models.stopping import begin_tokens, end_tokens
from predict import add_decoding_flags, decoding_config
from utils.cli import VERSION, Parser, note, run
from utils.files import read_json, sha256, write_json
from utils.hub import check_push, parse_repository, push
from utils.outputs import lock, same_file
from utils.precision import unpack

FORMAT = 2  # of captioner.json
ROOT = Path(__file__).resolve().parent
STEPS = ("Resize", "CenterCrop", "ToTensor", "Normalize")  # of preprocessing, in this order


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="as of predict.py")
    parser.add_argument("--out", metavar="DIR", help="folder to write; an earlier export is replaced")
    parser.add_argument(
        "--format", choices=(ONNX, TORCH), default=ONNX,
        help="graphs for runtime/; or what --checkpoint takes, as safetensors, json and tokenizer (default: onnx)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("fp32", "int8", "int4"), default="fp32",
        help="of weights; int4 keeps the encoder and the table of words in 8 bits (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--check", nargs="+", metavar="IMAGE", help="pictures to compare captions of")
    parser.add_argument("--clip_model_type", help="encoder, where the checkpoint does not say or it has moved")
    parser.add_argument("--language_model", help="its folder or name, where the checkpoint does not say")
    parser.add_argument("--normalize_prefix", action="store_true", default=None, help="for a bare checkpoint")
    hub = parser.add_argument_group("sharing")
    hub.add_argument(
        "--push", metavar="ORG/NAME", help="upload to this repository of the Hugging Face Hub, with a model card"
    )
    hub.add_argument("--private", action="store_true", help="a new repository is private")
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
        raise ValueError(f"{flag} is for --format onnx; of --format torch the weights stay as they are")
    if args.out:
        check_folder(args)
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
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or is_export(out))):
        raise ValueError(f"--out {out} is there already and is no exported captioner; name another folder")
    files = captioner_files(args.checkpoint, args.clip_model_type, args.language_model)
    for file in map(Path, files):
        if out.exists() and (same_file(file, out) or any(same_file(parent, out) for parent in file.parents)):
            raise ValueError(f"--out {out} would overwrite the captioner, {file}; name another folder")


def is_export(folder):
    """Tell whether a folder is an earlier export, and nothing else."""
    described = read_json(folder / SHARED_CONFIG) if (folder / SHARED_CONFIG).is_file() else {}
    return "graphs" in described or (folder / SHARED_WEIGHTS).is_file()


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
    file = checkpoint_file(args.checkpoint)
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
        "made_of": without_folders({
            "checkpoint": file.name, "sha256": sha256(file) if file.is_file() else None, "encoder": encoder.describe(),
            "model": captioner.model.config.to_dict(), "language_model_config": gpt.config.to_dict(),
            "versions": {"clipcap": VERSION, "torch": torch.__version__},
        }),
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


@contextlib.contextmanager
def new_folder(out):
    """Yield an empty folder that takes the place of the folder `out` when the body is done."""
    with lock(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(Path(temporary) / "old")
        folder.rename(out)


def export_onnx(args, decoding, folder):
    """Write a captioner's graphs into a folder and check them; returns (what its card says of it, its base model)."""
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
    write_export(captioner, describe(captioner, args, decoding), folder)
    same = len(paths) - compare(folder, expected, paths)
    note(f"{same} of {len(paths)} captions are as predict.py's")
    described, _, base_model = describe_shared(args, decoding, captioner.model.config, captioner.model.gpt.config)
    encoder = {"clip_model_type": without_folders(captioner.encoder.name), "clip_sha256": captioner.encoder.sha256}
    described["model"] |= encoder  # which is a graph and not a file of its name
    return described | {"dtype": args.dtype}, base_model


def main(argv=None):
    """Export what the command line names, and upload it if asked to."""
    args = get_parser().parse_args(argv)
    decoding = decoding_config(args)
    check_arguments(args, decoding)
    write = write_shared if args.format == TORCH else export_onnx
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(os.path.abspath(args.out or Path(temporary) / "captioner"))
        with new_folder(out) as folder:
            described, base_model = write(args, decoding, folder)
            if args.push:
                write_card(args, described, base_model, folder)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
        note(f"{args.out or args.push}: {size:,.0f} MB")
        if args.push:  # a folder is kept if this fails
            address, commit = push(out, args.push, f"Captioner, by ClipCap {VERSION}", args.private)
            print(f"{address} commit {commit}")


if __name__ == "__main__":
    run(main)
