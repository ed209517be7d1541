"""Files that are written atomically, and whose faults are reported in one clear line when they are read."""

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success it takes the name `path`, else it is removed.

    Args:
        path: the file to write; its folder is made when missing.
    Raises: whatever the body raises, after removing the temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    try:
        yield Path(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it what a plain open() would have given
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_text(path, text):
    """Write `text` to `path` atomically, as UTF-8; a file name's bytes that are not UTF-8 are escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path, value):
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_table(path, columns, rows):
    """Write rows below the names of their columns to `path`, as CSV, atomically."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, table.getvalue())


@contextlib.contextmanager
def disk_errors(folder):
    """Turn a library's vague error into the system's own, where the disk of `folder` is full.

    torch and tokenizers report a full disk as RuntimeError or Exception.
    Raises: OSError where nothing can be written to `folder`; else whatever the body raises.
    """
    try:
        yield
    except OSError:
        raise
    except Exception:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
            probe.flush()
        raise


def read_json(path):
    """Parse a JSON file.

    Raises: FileNotFoundError where it is missing; ValueError naming file, line and column where it is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} is not valid JSON: {error.msg} at {place}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def reason(error):
    """Return the first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def sha256(path):
    """Return the hexadecimal SHA-256 of a file; a file that has not changed is read once."""
    status = os.stat(path)
    return _sha256(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=16)
def _sha256(path, *_):
    """The same, remembered for a file as it is now."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file):
    """SHA-256 by pieces, for Python 3.10, which has no `hashlib.file_digest`."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
