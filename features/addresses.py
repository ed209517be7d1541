"""A table of captions and addresses (URLs), a pair per line, as in Conceptual Captions; read in blocks of lines."""

import os

from utils.cli import VERSION
from utils.files import sha256

USER_AGENT = f"clipcap/{VERSION} (downloads pictures for image captioning; parse_conceptual.py)"
TABLES = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
BLOCK = 1024  # lines that are read, and downloaded, together
SAMPLE = 200  # lines that tell which column holds the addresses
LONGEST_LINE = 1 << 16  # bytes


def add_period(caption):
    """Return a caption with a full stop at its end, as the predecessor does; an empty one stays empty.

    Source: rmokady parse_conceptual.py `add_period`, which fails on empty captions and on a lone full stop.
    """
    caption = caption.strip()
    if caption in ("", "."):
        return ""
    if not caption.endswith("."):
        return caption + "."
    return caption[:-2] + "." if caption[-2] == " " else caption


class Table:
    """A file of `caption<TAB>address` or `address<TAB>caption` lines, without a header; read block by block.

    Args:
        path: of the file.
    Raises: FileNotFoundError; ValueError where neither column holds addresses.
    """

    def __init__(self, path):
        self.path, self.starts, self.lines = str(path), [], 0
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} does not exist; put it there, or pass --data_root")
        votes, sampled = [0, 0], 0
        with open(path, "rb") as file:
            while True:
                place, line = file.tell(), _read_line(file)
                if line is None:
                    break
                if self.lines % BLOCK == 0:
                    self.starts.append(place)
                self.lines += 1
                if sampled < SAMPLE and line.strip():
                    sampled += 1
                    fields = line.decode("utf-8", "replace").split("\t")[:2]
                    for column, field in enumerate(fields if len(fields) == 2 else ()):
                        votes[column] += field.strip().startswith(("http://", "https://"))
        self.column = votes.index(max(votes))  # the addresses'
        if 2 * votes[self.column] <= sampled:
            raise ValueError(f"{path} holds neither caption<TAB>address nor address<TAB>caption lines")
        self.sha256 = sha256(path)

    def lines_in(self, block):
        """Return the numbers of a block's lines."""
        return range(block * BLOCK, min((block + 1) * BLOCK, self.lines))

    def rows(self, block):
        """Yield (line number from 0, caption, address) of a block's lines; caption is None for an unusable line."""
        with open(self.path, "rb") as file:
            file.seek(self.starts[block])
            for number in self.lines_in(block):
                try:
                    fields = _read_line(file).decode().rstrip("\r\n").split("\t")
                except UnicodeDecodeError:
                    fields = []
                if len(fields) < 2 or not fields[self.column].strip():
                    yield number, None, ""
                    continue
                yield number, _unquoted(fields[1 - self.column]), fields[self.column].strip()


def _read_line(file):
    """Read a line; b"" in place of one longer than LONGEST_LINE, None at the end."""
    line = file.readline(LONGEST_LINE)
    if not line:
        return None
    if line.endswith(b"\n") or len(line) < LONGEST_LINE:
        return line
    while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
        pass
    return b""


def _unquoted(field):
    """Return a field without the quotes that a CSV writer put around it."""
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")
    return field[1:-1].replace('""', '"') if is_quoted else field
