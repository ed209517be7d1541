"""Annotation files as text, and the formats of one record a line: CSV, TSV, Flickr8k's and Flickr30k's, JSON lines.

Formats are told apart by content; a bad line becomes a ValueError in its place, and the others are read.
"""

import csv
import gzip
import json
import re
import zlib
from pathlib import Path

MAGIC = {
    b"PAR1": "Parquet: write its image and caption columns to a CSV",
    b"PK\x03\x04": "a zip file, as Excel's workbooks are: save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save it as CSV UTF-8",
    b"\x89HDF": "HDF5: write its captions to a CSV",
    b"ARROW1": "Arrow: write its image and caption columns to a CSV",
    b"SQLite": "an SQLite database: write its captions to a CSV",
    b"version https://git-lfs": "a Git LFS pointer: run git lfs pull",
    b"\x1f\x8b": "compressed by gzip, twice: unpack it",
    b"BZh": "compressed by bzip2: unpack it, or compress it by gzip",
    b"\xfd7zXZ\0": "compressed by xz: unpack it, or compress it by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it, or compress it by gzip",
    b"\x93NUMPY": "a numpy array: write its captions to a CSV",
    b"\x80": "a pickle: write its captions to a CSV or JSON file",
}
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
UNDECODED = re.compile("[\udc80-\udcff]")  # how Python's surrogateescape keeps a byte that is not UTF-8
DELIMITERS = {",": "a comma", "\t": "a tab", "|": "|"}
FLICKR = re.compile(r"([^\t]+)#[0-9]+\t(.*)")  # Flickr8k.token.txt: name.jpg#0<TAB>caption
QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')  # a field that a CSV writer has quoted for the quotes in it
TRIED = 10  # first lines that show what a file without header is


class NoHeaderError(ValueError):
    """A text file whose first line names no columns of images and captions."""


def read_text(path):
    """Read a text file, .gz too: UTF-8, or what its byte order mark says.

    Returns: text; a byte that is not UTF-8 stays in it as a surrogate, which `undecoded` names.
    Raises: FileNotFoundError; ValueError where it is a folder, empty, binary, or a damaged .gz file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; name one file in it. Captions in a text file beside each picture are not read: "
            "gather them in a CSV with the columns image,caption"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b") or path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no complete gzip file ({error}); fetch it again") from None
    for magic, what in MAGIC.items():
        if data.startswith(magic):
            raise ValueError(f"{path} is no text, but {what}")
    if data[257:262] == b"ustar":
        raise ValueError(f"{path} is no text, but a tar archive: unpack it")
    if re.match(rb"\s*<(!doctype html|html|head)", data, re.IGNORECASE):
        raise ValueError(f"{path} is no annotations, but an HTML page: downloaded without a session?")
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged {encoding.upper()} (byte {error.start}): save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path} is binary, or UTF-16 without its mark: save it as UTF-8 text")
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def undecoded(text):
    """Return what is wrong with a text that holds bytes which are not UTF-8, or half a character; else None."""
    if text.isascii():
        return None
    byte = UNDECODED.search(text)
    if byte:
        return f"has the byte 0x{ord(byte[0]) - 0xDC00:02x}, which is not UTF-8: save the file as UTF-8"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a character, \\u{ord(text[error.start]):04x}: save the file as UTF-8"
    return None


def read_json_lines(text):
    """Yield ("line 4", what it holds) of every line that is not blank; "\\n" alone ends a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = ValueError(undecoded(line) or f"is not valid JSON: {getattr(error, 'msg', error)}")
            yield f"line {number}", row


def read_table(text, suffix, is_header, starts_row):
    """Read a table, or Flickr8k's lines.

    Args:
        text: of the file.
        suffix: of its name; `.tsv` and `.csv` say which delimiter to try first.
        is_header: function of a list of column names: whether an image and a caption are among them.
        starts_row: function of ({column: value}): whether a line with these values is likely a row, not a caption's
            second line.
    Yields: ("line 4", {column: value} or ValueError).
    Raises: ValueError where no header is found.
    """
    # an old Mac's lines end in \r alone
    lines = (text if "\n" in text else text.replace("\r", "\n")).split("\n")
    # Excel's first line may say `sep=,`
    top = next(n for n, line in enumerate(lines) if line.strip() and not re.fullmatch(r"sep=.\r?", line))
    delimiters = sorted([*DELIMITERS, ";"], key=lambda d: d != ("\t" if suffix == ".tsv" else ","))
    headers = {delimiter: _cells(lines[top], delimiter) for delimiter in delimiters}
    delimiter = next((d for d in delimiters if is_header([name.strip() for name in headers[d]])), None)
    if delimiter == ";":
        raise ValueError(f'has the delimiter ";" in line {top + 1}: save the table with commas, or with tabs as .tsv')
    if delimiter is None and is_header([name.strip(' "') for name in headers["\t"]]):
        raise ValueError("is quoted as in CSV, and tab-separated text has no quoting: save the table as CSV")
    if delimiter is None:
        tried = [line for line in lines[top:] if line.strip()][:TRIED]
        if any(FLICKR.match(line) for line in tried):
            yield from _read_flickr(lines)
            return
        names = max(headers.values(), key=len)
        shown = ", ".join(" ".join(name.split()) for name in names)[:120]
        raise NoHeaderError(f"has columns {shown}; it needs image and caption")
    columns = [name.strip() for name in headers[delimiter]]
    cells = lines[top].rstrip("\r").split(delimiter)
    blanks = delimiter == "|" or any(cell != cell.strip() for cell in cells)  # "image, caption": rows have them too
    read = _csv_rows(lines, top + 1, columns, blanks, starts_row) if delimiter == "," else (
        (number, line.rstrip("\r").split(delimiter)) for number, line in enumerate(lines[top + 1 :], top + 2)
    )  # fmt: skip
    for number, cells in read:
        if cells and cells != [""]:
            yield f"line {number}", _row(cells, columns, delimiter, blanks)


def _cells(line, delimiter):
    """Split a header; with tabs or |, quotes are plain characters."""
    if delimiter not in ",;":
        return line.rstrip("\r").split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []


def _row(cells, columns, delimiter, blanks):
    """Return {column: value} of a line's cells, or a ValueError that says what is wrong with them."""
    if isinstance(cells, ValueError):
        return cells
    wrong = undecoded("".join(cells))
    if wrong:
        return ValueError(wrong)
    if len(cells) != len(columns):
        remedy = "quote the caption" if delimiter == "," else f"the delimiter is {DELIMITERS[delimiter]}"
        return ValueError(f"has not {len(columns)} fields like the header: {remedy}")
    if delimiter == "\t" and any(QUOTED.fullmatch(cell) for cell in cells):
        return ValueError("is quoted as in CSV, and tab-separated text has no quoting: save the table as CSV")
    return dict(zip(columns, map(str.strip, cells) if blanks else cells, strict=True))


def _csv_rows(lines, at, columns, blanks, starts_row):
    """Yield (number of its first line, its cells or a ValueError) of every row; after a bad line the next one is tried.

    A quote that is not closed would turn the rows that follow into its caption, so a quoted caption whose further lines
    look like rows is bad.
    """
    while at < len(lines):
        reader = csv.reader(
            (f"{lines[number]}\n" for number in range(at, len(lines))), strict=True, skipinitialspace=blanks
        )
        begin, error = at, None
        try:
            for cells in reader:
                end = begin + reader.line_num
                rows = (dict(zip(columns, line.split(","), strict=False)) for line in lines[at + 1 : end])
                if any(len(row) == len(columns) and starts_row(row) for row in rows):
                    error = "has a quote that is not closed, so that the next lines are one caption with it"
                    break
                yield at + 1, cells
                at = end
        except csv.Error as raised:
            error = f"has a stray quote or line break ({raised})"
            if "unexpected end" in str(raised):
                error = "has a quote that is not closed"
        if error:
            wrong = undecoded(lines[at])
            yield at + 1, ValueError(wrong or f'{error}: quote the whole caption, and write " in it twice')
            at += 1


def _read_flickr(lines):
    """Read Flickr8k.token.txt and Flickr30k's file of the same kind."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            match = FLICKR.match(line.rstrip("\r"))
            wrong = undecoded(line) or "is not name.jpg#0, a tab and the caption"
            row = {"image": match[1], "caption": match[2]} if match and not undecoded(line) else ValueError(wrong)
            yield f"line {number}", row
