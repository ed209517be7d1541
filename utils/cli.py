"""What every command shares: its parser, its errors, its progress bar."""

import argparse
import difflib
import errno
import os
import signal
import sys

import torch
from tqdm import tqdm

from utils.distributed import first_to_fail, is_main

VERSION = "0.1.0"
LOUD = ("error", "interrupted", "skipped", "unreadable", "warning")  # notes that begin so are printed under --quiet too
METAVARS = {"positive_int": "N", "non_negative_int": "N", "positive_float": "X", "float": "X"}
DISK_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, names values shortly, adds each flag's default where it has one worth reading."""

    def _get_default_metavar_for_optional(self, action):
        return METAVARS.get(getattr(action.type, "__name__", ""), action.dest.rsplit("_", 1)[-1].upper())

    def _get_help_string(self, action):
        plain = action.default in (None, "", argparse.SUPPRESS) or isinstance(action.default, bool | list | tuple)
        text = action.help or ""
        return text if plain or "default" in text or not action.option_strings else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest valid spelling."""

    def __init__(self, description, **options):
        super().__init__(description=description.strip(), formatter_class=HelpFormatter, **options)
        self.aliases = {}  # argument -> {a predecessor's word: its value}
        self.add_argument("--quiet", action="store_true", help="print results, warnings and errors only; no progress")
        self.add_argument("--version", action="version", version=f"%(prog)s {VERSION}, torch {torch.__version__}")

    def parse_args(self, args=None, namespace=None):
        global _quiet
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            valid = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], valid)}")
        for name, words in self.aliases.items():
            value = getattr(parsed, name)
            setattr(parsed, name, words.get(value, value))
        _quiet = parsed.quiet
        return parsed

    def _print_message(self, message, file=None):
        if is_main():  # every process of the command would say the same
            super()._print_message(message, file)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def nearest(word, valid):
    """Return '; did you mean X?' for the valid spelling nearest to `word`, or ''."""
    close = difflib.get_close_matches(str(word), [str(v) for v in valid], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def positive_int(text):
    """Argparse type: an integer of at least 1."""
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def non_negative_int(text):
    """Argparse type: an integer of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive_float(text):
    """Argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def non_negative_float(text):
    """Argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


_quiet = False  # whether the command line said --quiet


def shows_progress():
    """Tell whether progress is to be shown: on a terminal, unless --quiet, by process 0."""
    return is_main() and not _quiet and sys.stderr.isatty()


def progress_bar(total, description, unit, initial=0):
    """Return a progress bar with rate and time left on a terminal, silent elsewhere and under --quiet."""
    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, disable=not shows_progress(), dynamic_ncols=True
    )


def note(message):
    """Print one line for the user to standard error, so that standard output stays data; process 0 alone does.

    --quiet keeps LOUD ones.
    """
    if is_main() and (not _quiet or message.startswith(LOUD)):
        tqdm.write(message, file=sys.stderr)


def run(main):
    """Call a command's `main` and exit: 2 with one line for bad input, 130 after Ctrl-C.

    Set CLIPCAP_DEBUG=1 to see the whole traceback.
    """
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `predict.py ... | head` ends quietly
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.SIG_DFL):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see utils/interrupt.py
    try:
        sys.exit(main())
    except KeyboardInterrupt as stop:
        note(f"interrupted{': ' + str(stop) if str(stop) else ''}")
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("CLIPCAP_DEBUG"):
            raise
        if first_to_fail():
            tqdm.write(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2)


def describe(error):
    """Say in one line what went wrong and what helps."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of device memory; use a smaller --bs or --batch_size, or --mixed_precision bf16"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        place = f" while writing {error.filename}" if error.filename else ""
        return f"no space left on the disk{place}; free some and run the same command again, finished work is kept"
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{error.filename}: {os.strerror(error.errno).lower()}"
    return " ".join(str(error).split())
