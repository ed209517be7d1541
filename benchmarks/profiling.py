"""Where the time of each cell goes: products, attention, norms and activations, copies, the output, Python.

    python benchmarks/profiling.py --name "what this version is"

writes benchmarks/profile.md, and profile.json, which keeps the tables of other names. torch's profiler takes time of
its own at every operation, so that many small ones and Python look larger than they are.
"""

import argparse
import datetime
import functools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, as a script

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import captioning, run, training, workload
from benchmarks.measure import precisions
from encoders import load_encoder
from models.settings import BEAM, GREEDY, DecodingConfig
from utils.files import read_json, write_json, write_text
from utils.precision import prepare_for_inference

HERE = Path(__file__).resolve().parent
CELLS = ((1, GREEDY), (8, GREEDY), (64, GREEDY), (1, BEAM), (16, BEAM))  # of captioning: images at a time, search
IMAGES = 64  # of extraction
# kind -> starts of its operations' names, after `aten::` and the like; the first kind that fits counts
KINDS = {
    "products": ("mm", "addmm", "_linear_pointwise", "linear_dynamic", "linear", "mkldnn_linear", "mkldnn_convolution"),
    "attention": ("bmm", "baddbmm", "_scaled_dot_product", "_softmax", "softmax"),
    "norms, activations, sums": (
        "native_layer_norm", "gelu", "tanh", "relu", "sigmoid", "clamp_min", "threshold", "bernoulli", "native_dropout",
        "add", "mul", "div", "sum",
    ),
    "copies": ("copy_", "cat", "index", "fill_", "zero_", "empty", "clone", "embedding", "gather"),
    "output": ("_log_softmax", "topk", "sort", "argmax", "max", "logsumexp", "nll_loss", "sub"),
    "optimiser": ("_fused_adamw", "_foreach"),
}  # fmt: skip


def captioning_cells(dtypes, quick):
    """Yield (what is measured, function) of greedy and beam search by GPT-2 124M."""
    cpu = torch.device("cpu")
    for dtype in dtypes:
        gpt = prepare_for_inference(workload.language_model().to(cpu), dtype, cpu)
        for batch, method in CELLS[: 1 if quick else None]:
            config = DecodingConfig(method=method, entry_length=captioning.NEW_TOKENS)
            search = f"beam {config.beam_size}" if method == BEAM else "greedy"
            call = functools.partial(captioning.ours, gpt, captioning.prefixes(gpt, batch, cpu), config)
            yield f"captioning, {search}, {batch} at a time, {dtype}", call


def extraction_cells(dtypes):
    """Yield the same for ViT-B/32 embedding ready pixels."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.pt"
        workload.write_clip(file)
        for dtype in dtypes:
            encoder = load_encoder(file, "cpu", dtype)
            pixels = torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            yield f"extraction, ViT-B/32, {dtype}", functools.partial(encoder.encode_images, pixels)


def training_cells(dtypes, quick):
    """Yield the same for training steps of both variants."""
    for variant in list(training.VARIANTS)[: 1 if quick else None]:
        for dtype in dtypes:
            yield f"training, {variant}, {dtype}", training.make_ours(variant, dtype, torch.device("cpu"))


def measured(quick):
    """Return a row per cell."""
    dtypes = precisions(torch.device("cpu"))
    rows = []
    for cells in (
        captioning_cells([*dtypes, "int8"], quick), extraction_cells(dtypes), training_cells(dtypes, quick)
    ):  # fmt: skip
        for name, work in cells:
            rows.append({"cell": name} | shares(work))
            print(rows[-1], flush=True)
    return rows


def shares(work):
    """Return a row's figures: milliseconds of a call, and the percentage of them that each kind took."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as found, torch.profiler.record_function("all of it"):
        work()
    totals, whole = dict.fromkeys(KINDS, 0.0), 0.0
    for event in found.key_averages():
        kind = next((k for k, names in KINDS.items() if event.key.split("::")[-1].startswith(names)), None)
        if event.key == "all of it":
            whole = event.cpu_time_total
        elif kind and "::" in event.key and not event.key.startswith("autograd"):
            totals[kind] += event.self_cpu_time_total
    row = {"ms": whole / 1e3} | {kind: 100 * total / whole for kind, total in totals.items()}
    return row | {"Python and others": 100 * (1 - sum(totals.values()) / whole)}


def main(argv=None):
    """Measure, and write the tables of all names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="now", help="the heading of what is measured")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="small models and few cells, to see that everything runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        workload.shrink()
    args.out.mkdir(parents=True, exist_ok=True)
    stored = args.out / "profile.json"
    tables = read_json(stored) if stored.is_file() else {}
    machine = f"{run.describe_machine(torch.device('cpu'))}, {datetime.date.today().isoformat()}"
    tables[args.name] = {"machine": machine, "rows": measured(args.quick)}
    write_json(stored, tables)
    parts = ["# Where the time goes", "Made by `python benchmarks/profiling.py`: milliseconds of a call, and what of "
             "them went where, in per cent. The profiler takes time of its own at every operation."]  # fmt: skip
    for name, table in tables.items():
        parts += [f"## {name[0].upper() + name[1:]}", table["machine"] + ".", run.table(table["rows"])]
    write_text(args.out / "profile.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
