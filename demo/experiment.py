"""What the experiments beyond the demo share: their flags, and their tables over several seeds."""

import argparse
import statistics
from pathlib import Path


def get_parser(description, out):
    """Return a parser with the flags of an experiment; `out`: name of its folder in demo/out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("demo/out") / out, help="folder to write")
    parser.add_argument("--scenes", type=int, default=9000, help="training scenes")
    parser.add_argument("--test", type=int, default=1000, help="test scenes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each method per seed")
    return parser


def mean_and_spread(values, digits=1):
    """Return "mean ± deviation" of one value per seed; the mean alone of a single one."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(columns, rows):
    """Return the lines of a table.

    Args:
        columns: their titles.
        rows: {title: texts of its cells}.
    """
    first, width = max(map(len, rows)) + 1, max(20, *map(len, columns)) + 2
    heads = [f"{'':{first}}" + "".join(f"{column:>{width}}" for column in columns)]
    return heads + [f"{title:{first}}" + "".join(f"{cell:>{width}}" for cell in cells) for title, cells in rows.items()]
