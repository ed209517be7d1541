"""What every command shares: its parser, its errors, its progress bar; and how it starts without delay.

At its top, a script imports only what parsing and checking need: the standard library, and our own modules that import
no more than that (flags, settings, file names). torch, transformers, numpy and the like take seconds to import, and
wait until the arguments are right: `main` parses, refuses all that can be refused without a model, and then imports the
module that does the work, which imports at its own top whatever it needs:

    def main(argv=None):
        args = get_parser().parse_args(argv)
        check_arguments(args)
        with late_imports():
            from training.run import run_training
        return run_training(args)

A script's `__getattr__` finds names that others import from it but that are defined in such a module.
tests/test_startup.py holds every command to it; benchmarks/startup.py measures it.
"""

import argparse
import contextlib
import difflib
import errno
import gc
import os
import select
import signal
import sys

from utils.processes import first_to_fail, is_main

VERSION = "1.0.0"
# notes that begin with these are printed under --quiet too
LOUD = ("error", "interrupted", "skipped", "terminated", "unreadable", "warning")
METAVARS = {"positive_int": "N", "non_negative_int": "N", "positive_float": "X", "float": "X"}
DISK_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks, shortens metavars and adds each default that is worth reading."""

    def _get_default_metavar_for_optional(self, action):
        return METAVARS.get(getattr(action.type, "__name__", ""), action.dest.rsplit("_", 1)[-1].upper())

    def _get_help_string(self, action):
        plain = action.default in (None, "", argparse.SUPPRESS) or isinstance(action.default, bool | list | tuple)
        text = action.help or ""
        return text if plain or "default" in text or not action.option_strings else f"{text} (default: %(default)s)"


class ShowVersion(argparse.Action):
    """The flag --version."""

    def __call__(self, parser, *_):
        from importlib.metadata import version  # importing torch to ask it takes seconds

        parser._print_message(f"{parser.prog} {VERSION}, torch {version('torch')}\n", sys.stdout)
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest valid spelling."""

    def __init__(self, description, **options):
        super().__init__(description=description.strip(), formatter_class=HelpFormatter, **options)
        self.aliases = {}  # argument -> {a predecessor's value: ours}
        self.add_argument("--quiet", action="store_true", help="print results, warnings and errors only; no progress")
        self.add_argument("--version", action=ShowVersion, nargs=0, help="show program's version number and exit")

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


def in_words(shape):
    """Say what shape an image's embedding has: (D,), or (K, D) of tokens."""
    return f"{shape[0]} tokens, {shape[1]} wide each" if len(shape) == 2 else f"one vector, {shape[0]} wide"


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
_stopped_by = []  # signals that have asked the command to stop
_importing = False  # whether late_imports are under way


@contextlib.contextmanager
def late_imports():
    """Let the body import what does the command's work; see above.

    Meanwhile Ctrl-C ends the process quietly: Python would print a traceback from inside some package, and packages
    that catch every error would carry on. And no garbage is looked for among what is imported, then or later, which
    takes a seventh of the time: it stays until the end.
    """
    global _importing
    _importing, collects = True, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        _importing = False
        gc.freeze()
        if collects:
            gc.enable()


def shows_progress():
    """Tell whether progress is to be shown: on a terminal, unless --quiet, by process 0."""
    return is_main() and not _quiet and sys.stderr.isatty()


def progress_bar(total, description, unit, initial=0):
    """Return a progress bar with rate and time left on a terminal, silent elsewhere and under --quiet."""
    from tqdm import tqdm

    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, disable=not shows_progress(), dynamic_ncols=True
    )


def note(message):
    """Print one line for the user to standard error, so that standard output stays data.

    Only process 0 prints; under --quiet, only LOUD notes.
    """
    if is_main() and (not _quiet or message.startswith(LOUD)):
        _write(message)


def _write(message):
    """Write a line to standard error, above the progress bar where there is one."""
    bars = sys.modules.get("tqdm")
    bars.tqdm.write(message, file=sys.stderr) if bars else print(message, file=sys.stderr)


def run(main):
    """Call a command's `main` and exit: 2 with one line for bad input, 130 after Ctrl-C, 143 after SIGTERM.

    141, without a message, where nobody reads the output any more, as after `predict.py ... | head`. Set
    CLIPCAP_DEBUG=1 to see the whole traceback.
    """
    _prepare_streams()
    _catch_signals()
    try:
        status = _outcome(main)
    except BrokenPipeError:
        status = 141
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # handled already; Python would complain again when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    gc.freeze()  # Python would look through all objects for garbage, which takes a second where torch is imported
    sys.exit(status)


def _prepare_streams():
    """Make sure that there are output streams, and that they take any text: what they cannot show is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`; opened at once, so that no other file gets its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _catch_signals():
    """Make SIGTERM raise KeyboardInterrupt as Ctrl-C does, so that finished work is kept after either.

    A second signal is passed over, for finished work is being written then, and torchrun sends one after the terminal
    has; a third interrupts that too. A signal that the shell ignores, as under `nohup` or `&`, stays ignored.
    """
    _stopped_by.clear()

    def stop(number, _frame):
        if _importing:
            os._exit(128 + number)  # nothing has begun that would need cleaning up
        told_to_stop(number)
        if len(_stopped_by) != 2:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, stop)  # see utils/interrupt.py


def told_to_stop(number):
    """Remember a signal that asks the command to stop: the first one decides the exit status."""
    _stopped_by.append(number)


def agree_on_stop(number):
    """Let this process end with the exit status of a signal that asked any process of the command to stop."""
    _stopped_by[:1] = [number]


def _outcome(main):
    """Call `main`; returns the exit status, after the one line that says what was wrong.

    Raises: BrokenPipeError where nobody reads the output any more.
    """
    try:
        try:
            status = main()
        except SystemExit as end:  # --help, or a wrong flag
            status = end.code
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:
        number = _stopped_by[0] if _stopped_by else signal.SIGINT
        word = "terminated" if number == signal.SIGTERM else "interrupted"
        note(f"{word}{': ' + str(stop) if str(stop) else ''}")
        return 128 + number
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_device_memory(error):
            raise
        if isinstance(error, BrokenPipeError) and any(map(_is_abandoned, (1, 2))):
            raise
        if os.environ.get("CLIPCAP_DEBUG"):
            raise
        if first_to_fail():
            _write(f"error: {describe(error)}")
        return 2


def _is_abandoned(number):
    """Tell whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _is_device_memory(error):
    """Tell whether an error is torch's, of a device whose memory is full."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def describe(error):
    """Say in one line what went wrong and what helps."""
    if _is_device_memory(error):
        return "out of device memory; use a smaller --bs or --batch_size, or --mixed_precision bf16"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        place = f" while writing {error.filename}" if error.filename else ""
        return f"no space left on the disk{place}; free some and run the same command again, finished work is kept"
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{error.filename}: {os.strerror(error.errno).lower()}"
    return " ".join(str(error).split())
