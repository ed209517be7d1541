"""Files of the model hub: from the local cache where they are, without minutes of retries elsewhere."""

import contextlib
import os
import urllib.request

CONNECT_TIMEOUT = 10  # seconds; the hub's own library retries for minutes


def cached_first(fetch):
    """Call a function that fetches files: first with the hub cut off, then, if the hub answers, with it.

    Args:
        fetch: function without arguments that uses the hub's library.
    Returns: what it returns.
    Raises: what it raises where the files are not in the cache and the hub does not answer or does not have them.
    """
    try:
        with _cut_off():
            return fetch()
    except (OSError, ValueError, RuntimeError):
        if not hub_answers():
            raise
    return fetch()


@contextlib.contextmanager
def _cut_off():
    """Let the hub's library use its cache only."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answers():
    """Tell whether the model hub may and can be reached, through the user's proxy settings."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    try:
        with urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=CONNECT_TIMEOUT):
            return True
    except OSError:
        return False
