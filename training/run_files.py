"""The files of a training run, and how it is asked to stop."""

import os
import shutil
import signal
from pathlib import Path

from models.checkpoint import save_weights, tokenizer_folder
from utils.cli import note
from utils.files import atomic_path, save_torch


class RunFiles:
    """The files of a run: `<out_dir>/<prefix>...`."""

    def __init__(self, out_dir, prefix):
        self.out_dir, self.prefix = Path(out_dir), prefix
        self.config = self.out_dir / f"{prefix}.json"
        self.latest = self.out_dir / f"{prefix}_latest.pt"
        self.best = self.out_dir / f"{prefix}_best.pt"
        self.state = self.out_dir / f"{prefix}_state.pt"
        self.log = self.out_dir / f"{prefix}-log.jsonl"
        self.plot = self.out_dir / f"{prefix}-loss.png"

    def epoch(self, epoch):
        """Return the checkpoint of an epoch, counted from 0."""
        return self.out_dir / f"{self.prefix}-{epoch:03d}.pt"

    def move_aside(self):
        """Move an earlier run of the same name into `<prefix>-previous/`, in place of the one moved there before."""
        files = [self.config, self.latest, self.best, self.state, self.log, self.plot, tokenizer_folder(self.config)]
        files = [f for f in (*files, *self.out_dir.glob(f"{self.prefix}-[0-9][0-9][0-9].pt")) if f.exists()]
        if not self.config.exists():
            return
        previous = self.out_dir / f"{self.prefix}-previous"
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for file in files:
            os.replace(file, previous / file.name)
        note(f"an earlier run {self.prefix} was there; it is now in {previous} (--resume goes on with a run)")

    def save_weights(self, model, epoch=None):
        """Write the latest weights, and the same as the epoch's checkpoint, where it is one."""
        if epoch is None:
            save_weights(self.latest, model.state_dict())
            return
        save_weights(self.epoch(epoch), model.state_dict())
        with atomic_path(self.latest) as temporary:
            temporary.unlink()
            try:
                os.link(self.epoch(epoch), temporary)
            except OSError:  # a file system without links
                shutil.copyfile(self.epoch(epoch), temporary)

    def save_best(self, model):
        """Write the weights with the highest validation CIDEr so far."""
        save_weights(self.best, model.state_dict())

    def save_state(self, trainer):
        """Write what --resume needs."""
        save_torch(self.state, trainer.state())

    def last_checkpoint(self):
        """Return the newest checkpoint, or None."""
        return self.latest if self.latest.exists() else None


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a request to stop after the step under way; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, _frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        note("stopping after this step; once more to stop at once")
