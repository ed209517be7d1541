"""What a visitor of the page is told when something fails: one line without this machine's paths or a library's words.

The server's log gets the whole of it.
"""

import traceback

import torch

from features.images import ImageError

OUT_OF_MEMORY = "the server is out of memory: ask for fewer captions, or try again later"
MALFORMED = "the request is malformed; the page's API says what it takes"
FAILED = "the server could not do this; its log says why"
ALLOCATION = ("out of memory", "can't allocate memory", "alloc_cpu")  # what torch's RuntimeErrors say


class Refused(ValueError):
    """What a visitor asks for cannot be done; the message is written for visitors."""


def told(error):
    """Return the line that a visitor is told of an error; all that is not meant for visitors goes to the log."""
    if isinstance(error, Refused | ImageError):
        return " ".join(str(error).split())
    traceback.print_exception(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION):
        return OUT_OF_MEMORY
    return FAILED
