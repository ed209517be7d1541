"""What a visitor of the page is told when something fails: one line without this machine's paths or a library's words.

The server's log gets the whole of it.
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
    """The captioner says nothing of why it says what it says."""


def message_of(error):
    """Return the line that a visitor is told of an error; all that is not meant for visitors goes to the log."""
    if isinstance(error, Refused | ImageError):
        return " ".join(str(error).split())
    traceback.print_exception(error)
    return OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
