"""The names of a training run's files, and the checks on them."""

import os
from pathlib import Path

from utils.outputs import RUN, belongs_to, check_folder, overwritten


class RunNames:
    """The files of a run: `<out_dir>/<prefix>...`."""

    def __init__(self, out_dir, prefix):
        """Name the files."""
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

    def epochs(self):
        """Return the epochs' checkpoints that exist."""
        return sorted(self.out_dir.glob(f"{self.prefix}-[0-9][0-9][0-9].pt"))

    def check(self, inputs):
        """Refuse names that cannot be written, or that would overwrite the run's inputs or other files.

        Args:
            inputs: {what it is, such as "the data": file that the run reads}.
        Raises: ValueError naming the flag.
        """
        if not self.prefix or os.sep in self.prefix:
            raise ValueError(f"--prefix {self.prefix!r} is no name for files; --out_dir names their folder")
        check_folder("--out_dir", self.out_dir)
        own = (self.config, self.latest, self.best, self.state, self.log, self.plot, *self.epochs())
        taken = overwritten(own, inputs)
        if taken:
            raise ValueError(f"--prefix {self.prefix} would overwrite {taken}; pass another")
        if self.config.exists() and belongs_to(self.config) != RUN:
            raise ValueError(
                f"--prefix {self.prefix} would overwrite {self.config}, which is not the json of a run; pass another"
            )
