"""Caption images with what ClipCap's export.py writes, without torch."""

from clipcap_runtime.captioner import Captioner as Captioner
from clipcap_runtime.images import ImageError as ImageError
