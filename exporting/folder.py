"""The folder of an exported captioner: written, compared with predict.py's captions, and uploaded."""

import contextlib
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from exporting.card import TORCH
from exporting.pictures import preprocessing
from exporting.share import describe_shared, without_folders, write_card, write_shared
from models.captioner import Captioner
from models.exported import runtime
from models.language import context_length
from models.pretrained import checkpoint_file
from models.stopping import begin_tokens, end_tokens
from utils.cli import VERSION, note
from utils.files import sha256, write_json
from utils.hub import push
from utils.outputs import lock
from utils.precision import unpack

FORMAT = 2  # of captioner.json
ROOT = Path(__file__).resolve().parent.parent


def describe(captioner, args, decoding):
    """Return the contents of captioner.json."""
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
    from exporting.graphs import check_rounding, make_graphs  # need onnx, which --format torch does not
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
    """Warn of pictures that the exported captioner captions differently; returns how many."""
    exported, differing = runtime().Captioner(folder), 0
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
    """Write a captioner's graphs into a folder and check them; returns (what its card describes, its base model)."""
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
    described["model"] |= encoder  # by its name here: the export has it as a graph, not as a file
    return described | {"dtype": args.dtype}, base_model


def export(args, decoding):
    """Export what the command line of export.py names, and upload it if asked to; `decoding`: DecodingConfig."""
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
