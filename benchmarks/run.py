"""Measure ours beside the plain method and beside what users would run instead, on this machine.

    python benchmarks/run.py

writes benchmarks/results.md, a picture beside it, and the same figures as results.json and results.csv, which say how
long each section took. --only measures some sections again and keeps the others. Systems run in turn and medians are
given; look at ratios, for absolute figures are this machine's.
"""

import argparse
import csv
import datetime
import io
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, as a script

import matplotlib.figure
import torch
import transformers

from benchmarks import (
    aims,
    bulk,
    captioning,
    extraction,
    measure,
    runtime,
    serving,
    startup,
    storing,
    tokens,
    towers,
    training,
    workload,
)
from utils.files import atomic_path, read_json, write_json, write_text

HERE = Path(__file__).resolve().parent
SECTIONS = {
    "captioning": captioning, "extraction": extraction, "towers": towers, "training": training, "storing": storing,
    "tokens": tokens, "bulk": bulk, "serving": serving, "startup": startup, "runtime": runtime,
}  # fmt: skip
TITLES = {
    "captioning": "Captioning: GPT-2 124M, prefix 10",
    "extraction": "Extraction: ViT-B/32, JPEG files of 640 x 480",
    "towers": "Other encoders: pixels of their own resolution, random weights",
    "training": "Training: batch 40, captions as long as COCO's",
    "storing": "Folders of shards: embeddings of 512, the demo's small captioner, batch 40",
    "tokens": "Stores of tokens: read and trained on",
    "bulk": "At scale: tars of JPEG files of 640 x 480, ViT-B/32; stored embeddings, GPT-2 124M",
    "runtime": "Without torch: GPT-2 124M, prefix 10, ViT-B/32, int8",
    "serving": "Serving: app.py with the demo's captioner, batches of 16",
    "startup": "Starting: each a process of its own",
}
NOTES = {
    "captioning": "`plain` runs the whole sequence again for every token, one image at a time; `generate` is "
    "transformers' with `inputs_embeds`. Weights are random, no stop token is set, so every caption has all its "
    "tokens. `x plain` and `x generate` are ratios of time per caption, the latter at the same precision. GFLOP/s "
    "counts 2 per parameter and position of prefix and caption; GB/s counts every weight once per token. `equal to "
    "fp32` is the share of captions that are ours in fp32, token by token; random weights put many tokens close "
    "together, so it is a lower bound.",
    "extraction": "`plain` encodes one image per caption, one at a time. `largest difference` is that of any element "
    "to the plain embedding, divided by the largest element.",
    "towers": "`open_clip` and `timm` are the library's own call in fp32. `largest difference` is that of any element "
    "to the library's embedding, divided by the largest element.",
    "training": "`plain` pads to the predecessor's length, computes logits everywhere, and gradients of the frozen "
    "language model too. All rows of a table ran in turn, in one process, in which `plain` keeps freed memory as ours "
    "does.",
    "bulk": "`encode_images` is given pixels that lie ready. From tars, other processes decode; they take as long to "
    "start for any number of tars. Memory is that of one process which goes through tars of two small pictures each.",
    "runtime": "The exported captioner in an environment of its own, one image at a time, as many threads as torch; "
    "`torch int8` is predict.py's own way with --dtype int8, in turn with it. Weights are random, no stop token is "
    "set, pictures are JPEG files of 640 x 480. Aimed at: at most 0.75 x torch from embeddings, 300 ms from pictures.",
    "serving": "Clients, in another process on the same processor, each ask for the next of 128 pictures as soon as "
    "they have an answer; `offline` captions the same files in batches, in turn. `share`: of its rate. The plain "
    "endpoint is one request; gradio's is three: an upload, a question, a wait for its turn.",
    "startup": "`import` is of torch and transformers, which captioning needs and can hardly undercut; `one picture` "
    "is captioned by the demo's captioner, in the last table by one of full size with random weights, 20 tokens. "
    "MiB: resident at most.",
    "storing": "Resident memory includes Python, torch, the models and all that is mapped at that moment.",
    "tokens": "Random batches of 40 are gathered by one thread while training, which is a resampler and a frozen GPT-2 "
    "124M, in bf16 where the processor has it, computes. `from the disk`: none of the rows held in memory by the "
    "system before. `x`: rows read, the slower way, over those trained on.",
}


def get_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    parser.add_argument("--repeats", type=int, default=3, help="rounds whose median is given")
    parser.add_argument("--quick", action="store_true", help="small models and few cells, to see that everything runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write")
    return parser


def describe_machine(device):
    """Return one line on what is measured here."""
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (names or [platform.processor()])[0]
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def _cpu_lines():
    """Return the lines of Linux' list of processors, none elsewhere."""
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def table(rows):
    """Return rows of one kind as a markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell(row[column]) for column in columns) + " |")
    return "\n".join(lines)


def cell(value):
    """Return a table cell: three significant digits."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_results(results, out):
    """Write results.md and its picture from the stored results."""
    parts = [
        "# What it costs, measured",
        "Made by `python benchmarks/run.py`, medians of systems that ran in turn. "
        "`spread` is (slowest - fastest) / median of a system's rounds; `product beside` is the rate of a float32 "
        "product of side 1024 in the same rounds, GFLOP/s: far below its section's limit, the machine had other work.",
    ]
    for name, section in results.items():
        found = ", ".join(f"{key} {cell(value)}" for key, value in section["limits"].items())
        date = f", {section['date']}" if "date" in section else ""  # older results lack it
        took = f" Took {section['took'] / 60:.0f} min." if "took" in section else ""  # likewise
        parts += [f"## {TITLES[name]}", f"{section['machine']}{date}.{took} Limits measured in the same run: {found} "
                  "(GFLOP/s of products, GB/s of copying and reading).", NOTES[name]]  # fmt: skip
        for title, rows in section["tables"].items():
            parts += [f"### {title[0].upper() + title[1:]}", table(rows)]
    aimed = aims.rows(results)
    if aimed:
        parts += ["## Aims", "Set before measuring, beside what the sections above reached; of several cells, the "
                  "worst. On a GPU nothing was measured.", table(aimed)]  # fmt: skip
    if "captioning" in results:
        draw(results["captioning"]["tables"]["batch"], out / "results.png")
        parts.insert(2, "![Milliseconds per caption](results.png)")
    write_text(out / "results.md", "\n\n".join(parts) + "\n")
    write_csv(results, out / "results.csv")


def write_csv(results, path):
    """Write every number of the tables as a line of its own, with what it was measured on."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["section", "table", "row", "column", "value", "date", "machine"])
    for name, section in results.items():
        for title, rows in section["tables"].items():
            for number, row in enumerate(rows):
                for column, value in row.items():
                    place = [name, title, number, column, value]
                    writer.writerow([*place, section.get("date", ""), section["machine"]])
    write_text(path, lines.getvalue())


def draw(rows, path):
    """Draw the time per caption over the batch, for greedy and beam search."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    for axes, beams, title in zip(figure.subplots(1, 2), (1, 5), ("greedy", "beam 5"), strict=True):
        for system in dict.fromkeys(row["system"] for row in rows):
            own = [row for row in rows if row["system"] == system and row["beams"] == beams]
            own = own[:1] if system == "plain" else own  # it takes one image whatever the batch
            style = "k*" if system == "plain" else "o--" if system.startswith("generate") else "o-"
            axes.plot([row["batch"] for row in own], [row["ms/caption"] for row in own], style, label=system)
        axes.set(xscale="log", yscale="log", xlabel="images at a time", ylabel="ms per caption", title=title)
        axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main(argv=None):
    """Measure what the command line asks for."""
    args = get_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        workload.shrink()
    device, stored = torch.device(args.device), args.out / "results.json"
    args.out.mkdir(parents=True, exist_ok=True)
    side = 256 if args.quick else 2048 if device.type == "cpu" else 8192
    results = read_json(stored) if stored.is_file() else {}
    for name in args.only:
        print(f"{name} ...", flush=True)
        section, began = SECTIONS[name], time.monotonic()
        tables = section.run(device, args.repeats, args.quick)
        if hasattr(section, "memory") and device.type == "cpu" and not args.quick:
            tables["peak memory"] = section.memory()
        results[name] = {
            "machine": describe_machine(device), "date": datetime.date.today().isoformat(),
            "took": time.monotonic() - began, "limits": measure.limits(device, side), "tables": tables,
        }  # fmt: skip
        results = {name: results[name] for name in SECTIONS if name in results}
        write_json(stored, results)
        write_results(results, args.out)
    print(args.out / "results.md")


if __name__ == "__main__":
    main()
