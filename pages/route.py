"""An endpoint for programs without gradio's client: the bytes of a picture in, its captions out.

    curl --data-binary @photo.jpg "http://127.0.0.1:7860/caption?method=greedy"

It computes what gradio's endpoint does, at a fraction of its cost: see benchmarks/results.md.
"""

import tempfile
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from starlette.responses import JSONResponse
from starlette.routing import Route

from features.images import ImageError
from pages.errors import Refused, message_of
from pages.service import RANGES

BUSY = "the server is busy: try again later"


def caption_route(service, queue_size):
    """Return the route.

    Args:
        service: see service.py: `models`, `methods`, `at_once`, `decoding`, `caption`.
        queue_size: requests that wait; others are refused.
    """
    entered, limiter = 0, None

    async def caption(request):
        nonlocal entered, limiter
        if entered >= service.at_once + queue_size:
            return JSONResponse({"error": BUSY}, 503, {"Retry-After": "10"})
        entered += 1
        try:
            limiter = limiter or CapacityLimiter(service.at_once)  # created here: it belongs to the server's event loop
            asked = read_options(request.query_params, service)
            picture = await request.body()
            return JSONResponse(await to_thread.run_sync(caption_bytes, service, picture, asked, limiter=limiter))
        except Exception as error:
            status = 400 if isinstance(error, Refused | ImageError) else 500
            if hasattr(error, "status_code"):  # too long a body
                raise
            return JSONResponse({"error": message_of(error)}, status)
        finally:
            entered -= 1

    return Route("/caption", caption, methods=["POST"])


def caption_bytes(service, picture, asked):
    """Caption a picture's bytes; see `Service.caption`. `asked`: as `read_options` returns it."""
    model, *decoding = asked
    decoding = service.decoding(*decoding)
    if not picture:
        raise Refused("there is no image: send its bytes as the body")
    with tempfile.TemporaryDirectory(prefix="clipcap-") as folder:
        path = Path(folder) / "image"  # one name for all: random numbers come from a file's name and bytes
        path.write_bytes(picture)
        return service.caption(str(path), model, decoding)


def read_options(given, service):
    """Return (model, method, num_captions, top_p, temperature, seed) of a request's query; raises Refused."""
    unknown = [name for name in given if name not in ("model", "method", *RANGES)]
    if unknown:
        raise Refused(f"{unknown[0]} is no option; there are model, method, {', '.join(RANGES)}")
    methods = list(service.methods.values())
    method = given.get("method", methods[0])
    if method not in methods:
        raise Refused(f"the method is one of {', '.join(methods)}")
    numbers = []
    for name, (low, high, default) in RANGES.items():
        kind = float if isinstance(low, float) else int
        try:
            value = kind(given.get(name, default))
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise Refused(f"{name} is a {'number' if kind is float else 'whole number'} from {low} to {high}")
        numbers.append(value)
    return given.get("model", service.models[0]), method, *numbers
