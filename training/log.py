"""The log of a training run: a json line per optimiser step and per validation, and the picture of both."""

import json
from pathlib import Path

import matplotlib
import numpy as np

from utils.files import atomic_path

SMOOTHING = 100  # steps of the running mean in the picture
PLOTTED = ("CIDEr", "ROUGE_L", "Bleu_4", "share_of_distinct_captions")


class TrainingLog:
    """Appends lines; a resumed run first drops the lines written after its last save.

    A step's line is `{step, epoch, loss, lr, examples_per_s}` plus the objective's metrics, a validation's `{step,
    epoch, validation: {metric: value}}`.
    """

    def __init__(self, path, step=0, epoch=0):
        """Open the log after `step` steps, in `epoch`.

        Args:
            path: `.jsonl` file; os.devnull for a process that does not write.
            step: last step to keep; later steps will be taken again.
            epoch: first epoch whose validation is still to come.
        """
        self.path, self.entries, self.scores = Path(path), [], []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        good_bytes = 0
        with open(self.path, "ab+") as file:
            file.seek(0)
            for line in file:
                entry = json.loads(line) if line.endswith(b"\n") else None
                if not entry or entry["step"] > step or ("validation" in entry and entry["epoch"] >= epoch):
                    break
                (self.scores if "validation" in entry else self.entries).append(entry)
                good_bytes += len(line)
            if file.seek(0, 2) > good_bytes:  # never for os.devnull
                file.truncate(good_bytes)
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    @property
    def last_loss(self):
        """Loss of the newest step."""
        return self.entries[-1]["loss"]

    def add(self, step, epoch, loss, lr, examples_per_s, metrics=None):
        """Write one step's line; `metrics` are the objective's own."""
        entry = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "examples_per_s": round(examples_per_s, 1)}
        entry |= metrics or {}
        self.entries.append(entry)
        self.file.write(json.dumps(entry) + "\n")

    def add_scores(self, step, epoch, scores):
        """Write one validation's line; `scores` maps metrics to values."""
        self.scores.append({"step": step, "epoch": epoch, "validation": scores})
        self.file.write(json.dumps(self.scores[-1]) + "\n")

    def flush(self):
        """Hand all lines to the disk."""
        self.file.flush()

    def mean_loss(self, epoch):
        """Return the mean loss over an epoch's steps."""
        return float(np.mean([entry["loss"] for entry in self.entries if entry["epoch"] == epoch]))

    def plot(self, path):
        """Draw the loss over steps, raw and smoothed, with epochs marked, and the validation scores below."""
        matplotlib.use("Agg")
        from matplotlib import pyplot

        rewards = [name for name in self.entries[-1] if name.startswith("reward_")]
        rows = 1 + len(rewards) + bool(self.scores)
        figure, axes = pyplot.subplots(
            rows, sharex=True, squeeze=False, figsize=(8, 1.5 + 3 * rows), layout="constrained"
        )
        self._plot_steps(
            axes[0, 0], "loss", "loss per caption token" if rewards else "cross-entropy per caption token (nats)"
        )
        for axis, name in zip(axes[1:, 0], rewards, strict=False):
            self._plot_steps(axis, name, name.replace("_", ": ") + ", mean of the samples")
        axes[0, 0].set_title(self.path.name.removesuffix("-log.jsonl"))
        if self.scores:
            self._plot_scores(axes[-1, 0])
        axes[-1, 0].set_xlabel("optimiser step")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        pyplot.close(figure)

    def _plot_steps(self, axes, name, label):
        """Draw one logged number per step and its running mean."""
        steps = np.array([entry["step"] for entry in self.entries])
        values = np.array([entry[name] for entry in self.entries])
        axes.plot(steps, values, color="0.8", linewidth=0.8, label="each step")
        width = min(SMOOTHING, max(1, len(values) // 10))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        middles = np.convolve(steps, np.ones(width) / width, mode="valid")  # centre of each window
        axes.plot(middles, smooth, color="tab:blue", label=f"mean of {width} steps")
        label_of_epochs = "an epoch begins"
        for previous, entry in zip(self.entries, self.entries[1:], strict=False):
            if entry["epoch"] != previous["epoch"]:
                axes.axvline(entry["step"], color="0.5", linewidth=0.8, linestyle=":", zorder=0, label=label_of_epochs)
                label_of_epochs = None  # the legend says it once
        axes.set(ylabel=label)
        axes.legend(frameon=False)

    def _plot_scores(self, axes):
        """Draw the validation scores, one point per epoch, the best epoch marked."""
        steps = [entry["step"] for entry in self.scores]
        defined = [name for name in PLOTTED if self.scores[0]["validation"][name] is not None]
        for name in defined:
            axes.plot(steps, [entry["validation"][name] for entry in self.scores], "o-", markersize=3, label=name)
        if "CIDEr" in defined:  # undefined on one image
            best = max(self.scores, key=lambda entry: entry["validation"]["CIDEr"])
            axes.axvline(best["step"], color="0.5", linestyle=":", label=f"best CIDEr, epoch {best['epoch']}")
        axes.set(ylabel="validation score", ylim=(0, None))
        axes.legend(frameon=False)
