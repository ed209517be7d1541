"""What a visitor of the page sees when something fails: one line without this machine's paths or a library's message.

The server's log gets the whole error.
"""

import traceback

from features.images import ImageError
from utils.devices import is_out_of_memory

OUT_OF_MEMORY = "the server is out of memory: ask for fewer captions, or try again later"
MALFORMED = "the request is malformed; the page's API says what it takes"
FAILED = "the server could not do this; its log says why"


class Refused(ValueError):
    """What a visitor asks for cannot be done; the message is written for visitors."""


class Unexplained(Refused):
    """The captioner cannot explain its captions."""


def message_of(error):
    """Return the line that a visitor sees of an error; errors not written for visitors go to the log."""
    if isinstance(error, Refused | ImageError):
        return " ".join(str(error).split())
    traceback.print_exception(error)
    return OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
