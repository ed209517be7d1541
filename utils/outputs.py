"""What a command is about to write: checked before any work, and locked by one run at a time."""

import contextlib
import os
import socket
from pathlib import Path

from utils.cli import note
from utils.files import read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUN, STORE = "a training run", "a feature store"
KEYS = {RUN: {"model", "training"}, STORE: {"clip_model_type", "embed_dim"}}  # of the json files that belong to one
_held = set()  # lock files of this process, which its own record locks do not keep out


def check_output(flag, path, inputs=None, endings=()):
    """Refuse an output file that cannot be written, or that would overwrite what the command reads.

    Args:
        flag: the option that names it, for the error.
        path: file that will be written.
        inputs: {what it is, such as "the annotations": file, or list of files}; None among them are passed over.
        endings: file name endings that the command can write; () are all.
    Raises: ValueError naming flag, file and remedy.
    """
    given, path = path, Path(path)
    if path.is_dir() or str(given).endswith(os.sep):
        raise ValueError(f"{flag} {path} is a folder; name a file in it")
    if path.exists() and not path.is_file():  # a device or a pipe, which a file would replace
        raise ValueError(f"{flag} {path} is no file that can be replaced; name another")
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{flag} {path} must end in {' or '.join(endings)}, which says what is written")
    check_folder(flag, path.parent)
    taken = overwritten([path], inputs or {})
    if taken:
        raise ValueError(f"{flag} {path} would overwrite {taken}; name another file")
    owner = belongs_to(path)
    if owner:
        raise ValueError(f"{flag} {path} would overwrite the json of {owner}; name another file")


def overwritten(outputs, inputs):
    """Return the first input that an output would overwrite, as "what it is, file", or None.

    Args:
        outputs: files or folders that will be written.
        inputs: see `check_output`.
    """
    for what, files in inputs.items():
        for file in files if isinstance(files, list | tuple | set) else [files]:
            if file is not None and any(same_file(file, output) for output in outputs):
                return f"{what}, {file}"
    return None


def belongs_to(path):
    """Return whose json a file is, RUN or STORE, or None."""
    if Path(path).suffix.lower() != ".json":
        return None
    try:
        value = read_json(path)
    except (ValueError, OSError):
        return None
    return next((owner for owner, keys in KEYS.items() if isinstance(value, dict) and keys <= value.keys()), None)


def check_folder(flag, folder):
    """Refuse a folder in which nothing can be written; it need not exist yet.

    Raises: ValueError naming flag, folder and reason.
    """
    there = Path(folder).absolute()
    while not there.exists() and not there.is_symlink():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{flag}: {there} is no folder, so that nothing can be written below it; name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: nothing can be written in {there}, by its permissions; name another place")


def same_file(first, second):
    """Tell whether two names are of the same file, or would be: links, `..` and letter case resolved."""
    with contextlib.suppress(OSError):
        return os.path.samefile(first, second)  # both exist
    return os.path.realpath(first) == os.path.realpath(second)


@contextlib.contextmanager
def lock(path, flag="--out", shown=None):
    """Lock an output while the body runs, so that no second run writes it.

    The system releases the lock when the process ends, however it ends; a file `.<name>.lock` that a kill leaves beside
    the output locks nothing. A folder made for the lock is removed again if nothing was written into it.

    Args:
        path: file or folder that is written; it need not exist.
        flag: the option that names it.
        shown: what the error says is being written, where `path` is only a part of it.
    Raises: ValueError where another run holds it.
    """
    path = Path(os.path.realpath(path))
    name = path.with_name(f".{path.name}.lock")
    busy = f"another run is writing {shown or path}%s; wait for it, or name another {flag}"
    if name in _held:
        raise ValueError(busy % "")
    made = [folder for folder in name.parents if not folder.exists()]
    name.parent.mkdir(parents=True, exist_ok=True)
    _held.add(name)
    try:
        with _locked(name, busy):
            yield
    finally:
        _held.discard(name)
        with contextlib.suppress(OSError):  # what has been written into stays
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _locked(name, busy):
    """Lock the file `name`; `busy` is the error where it is locked, with a %s for its holder."""
    if fcntl is None:
        note(f"warning: this system has no file locks; make sure that no other run writes {name.parent}")
        yield
        return
    while True:
        file = open(name, "a+")  # noqa: SIM115  closed below, which releases the lock
        try:
            # a record lock: unlike flock's it is not inherited by processes that read images and may outlive a kill
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise ValueError(busy % (f" ({holder})" if holder else "")) from None
        except OSError as error:  # a file system without locks
            note(f"warning: {name.parent} cannot lock files ({error.strerror}); make sure that no other run writes it")
        if name.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
            break
        file.close()  # its holder has removed it since we opened it
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        name.unlink(missing_ok=True)  # while it is still ours
        file.close()
