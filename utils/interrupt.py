"""Imported first by every script: Ctrl-C while it imports ends it quietly, until `utils.cli.run` takes over."""

import os
import signal


def leave(_number, _frame):
    """Exit as after any Ctrl-C; nothing has begun that would need cleaning up."""
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has told it to be ignored
    signal.signal(signal.SIGINT, leave)
