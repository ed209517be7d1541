"""The page in gradio: what it shows, what it asks the service, and how much it lets in."""

import re
import traceback
from http import HTTPStatus
from pathlib import Path

import gradio as gr
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from pages.errors import FAILED, MALFORMED, Refused, Unexplained, message_of
from pages.fragments import EMPTY, HEAD, STYLE, captions_html, note_html, prefix_html, words_html
from pages.look import theme
from pages.paths import PathsHidden
from pages.service import RANGES
from pages.steps import ASK_WHY, FORGET, LOOK, SHOW_CAPTIONS, SHOW_WHY, WHY_FAILED, name_things
from utils.cli import note

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = {  # picture: its description for screen readers
    "demo/images/200001.jpg": "Two purple rings and a white ring on sand",
    "demo/images/200003.jpg": "A red star and a silver star on snow",
    "demo/images/200005.jpg": "A green square and two yellow rings on a brick wall",
    "demo/images/200006.jpg": "An orange circle and a purple heart on snow",
    "demo/images/200011.jpg": "Two purple circles and a yellow ring on a brick wall",
    "demo/images/200015.jpg": "A red square and an orange circle on a brick wall",
    "demo/images/200021.jpg": "A yellow square and a white heart on grass",
    "demo/images/200023.jpg": "A purple square and two green hearts on sand",
    "demo/images/200036.jpg": "A white square and two red triangles at night",
    "demo/images/200041.jpg": "Three green circles at night",
}
API = """Captions of a picture, best first, with their scores. Give your own picture's path in the place of
demo/images/…, which lies in the repository; in JavaScript give its bytes, a Blob. Pictures are not fetched from
addresses. Without a client: curl --data-binary @photo.jpg SERVER/caption"""
PRIVATE = {"api_visibility": "private"}
OWN = 8  # threads of the page itself
KEPT_SECONDS = 3600  # uploads are deleted after that long
TYPE = re.compile(r" \(type: <class '\w+'>\)")  # gradio's addition to the error about a value that is not offered


class Page(gr.Blocks):
    """A page whose every error reaches visitors as one line."""

    async def preprocess_data(self, *args, **kwargs):
        """Return a request's values as gradio parses them; values that gradio rejects are the visitor's mistake."""
        try:
            return await super().preprocess_data(*args, **kwargs)
        except gr.Error as error:
            raise Refused(TYPE.sub("", error.message)) from error
        except Exception as error:
            traceback.print_exception(error)
            raise Refused(MALFORMED) from error

    async def process_api(self, *args, **kwargs):
        """Answer a request; see gradio."""
        try:
            return await super().process_api(*args, **kwargs)
        except Exception as error:
            raise gr.Error(message_of(error), print_exception=False) from None


def build_page(service, queue_size):
    """Return the page.

    Args:
        service: see service.py: `models`, `methods`, `at_once`, `decoding`, `caption`, `explain`.
        queue_size: requests that wait; others are refused.
    """
    with Page(title="ClipCap", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.HTML(HEAD)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                image, options, button = _inputs(service)
            with gr.Column(scale=7, min_width=300):
                captions = gr.HTML(EMPTY, elem_id="cc-captions")
                with gr.Column(visible=False) as why:
                    chosen = gr.Radio([], label="Caption to explain", elem_id="cc-chosen")
                    own = gr.Textbox(
                        label="or a caption of your own", placeholder="Write one", submit_btn="Explain",
                        elem_id="cc-own",
                    )  # fmt: skip
                    chosen.preprocess = own.preprocess  # any text: only the browser knows the choices
                    words, prefix = gr.HTML(), gr.HTML()
        _endpoint(service, image, options)
        _events(service, image, options, button, (captions, why, chosen, own, words, prefix))
        page.load(None, js=name_things(list(SAMPLES.values())), **PRIVATE)
    return page.queue(max_size=queue_size)


def _endpoint(service, image, options):
    """Offer /caption to programs."""
    # `at_once` requests are captioned at a time; the others wait in gradio's queue
    gr.Button(visible=False).click(
        _captioning(service), [image, *options], gr.JSON(visible=False, label="captions"), api_name="caption",
        api_description=API, concurrency_limit=service.at_once, concurrency_id="caption",
    )  # fmt: skip


def _events(service, image, options, button, shown):
    """Connect the page's events; see steps.py for the browser's part.

    Args:
        shown: components: captions, panel of explanations, caption to explain, the visitor's own caption, words,
            prefix.
    """
    captions, _, chosen, own, words, prefix = shown
    ticket, why_ticket = gr.Textbox(visible=False), gr.Textbox(visible=False)
    answer, reason = gr.JSON(visible=False), gr.JSON(visible=False)

    def browser(event, js, inputs, outputs):
        return event(None, inputs, outputs, js=js, trigger_mode="multiple", **PRIVATE)

    def explain(event, text):
        asked = event(
            _explaining(service), [image, options[0], text, why_ticket], reason, concurrency_id="why",
            trigger_mode="multiple", show_progress_on=words, **PRIVATE,
        )  # fmt: skip
        browser(asked.success, SHOW_WHY, [reason, why_ticket], [words, prefix])
        browser(asked.failure, WHY_FAILED, [words], [words])

    for change in (image.change, options[0].change):
        browser(change, FORGET, [], [ticket, why_ticket, *shown])
    asking = browser(button.click, FORGET, [], [ticket, why_ticket, *shown])
    asked = asking.success(
        _showing(service), [image, *options, ticket], answer, concurrency_limit=service.at_once,
        concurrency_id="caption", trigger_mode="multiple", show_progress_on=captions, **PRIVATE,
    )  # fmt: skip
    browser(asking.success, LOOK, [], [])
    arrived = browser(asked.success, SHOW_CAPTIONS, [answer, ticket], [why_ticket, *shown])
    browser(arrived.success, LOOK, [], [])
    explain(arrived.success, chosen)
    explain(browser(chosen.input, ASK_WHY, [], [why_ticket, words, prefix, own]).success, chosen)
    explain(browser(own.submit, ASK_WHY, [], [why_ticket, words, prefix, chosen]).success, own)


def _inputs(service):
    """Lay out what a visitor chooses; returns the image, the options as `Service` takes them, the button."""
    image = gr.Image(
        label="Image", type="filepath", sources=["upload", "clipboard"], height=300, buttons=[], elem_id="cc-image"
    )
    image.preprocess = lambda payload: payload and payload.path  # read_image knows more modes than gradio
    to_cache = image.async_move_resource_to_block_cache

    async def uploads_only(path):
        if str(path).startswith(("http:", "https:")):
            raise gr.Error("images are not fetched from addresses: upload the file", print_exception=False)
        return await to_cache(path)

    image.async_move_resource_to_block_cache = uploads_only
    sample = next(iter(SAMPLES))
    image.example_payload = lambda: {"path": sample, "url": sample, "meta": {"_type": "gradio.FileData"}}
    image.api_info()["additional_description"] = "A file; addresses are not fetched."
    samples = [str(ROOT / path) for path in SAMPLES]
    gr.Examples(samples, image, label="or pick one", elem_id="cc-samples", api_visibility="private")
    button = gr.Button("Caption", variant="primary")
    model = gr.Radio(
        service.models, value=service.models[0], label="Model",
        info="demo knows only synthetic scenes like the ones above; coco, conceptual and coco-transformer know photos "
        "and are fetched once",
    )  # fmt: skip
    methods = list(service.methods.items())
    method = gr.Radio(methods, value=methods[0][1], label="Decoding")
    count = gr.Slider(*RANGES["num_captions"], step=1, label="Captions", info="greedy decoding gives one")
    with gr.Group(visible=False) as sampling:
        top_p = gr.Slider(*RANGES["top_p"], step=0.05, label="top_p", info="probability to sample from")
        temperature = gr.Slider(*RANGES["temperature"], step=0.1, label="Temperature")
        low, high, first = RANGES["seed"]
        seed = gr.Number(first, label="Seed", precision=0, minimum=low, maximum=high)
    method.change(
        lambda value: gr.update(visible=value == service.methods["sampling"]), method, sampling, queue=False, **PRIVATE
    )
    return image, [model, method, count, top_p, temperature, seed], button


def _captioning(service):
    """Return the endpoint: a function from image and options to captions with their scores."""

    def caption(image, model, method, num_captions, top_p, temperature, seed):
        if not image:
            raise Refused("there is no image yet: upload, paste or pick one")
        return service.caption(image, model, service.decoding(method, num_captions, top_p, temperature, seed))

    return caption


def _showing(service):
    """Return the function from image, options and ticket to the captions as the page shows them."""
    caption = _captioning(service)

    def show(*asked):
        *asked, ticket = asked
        found = caption(*asked)
        texts = list(dict.fromkeys(caption["caption"] for caption in found))  # samples may be equal
        return {"ticket": ticket, "captions": captions_html(found), "texts": texts}

    return show


def _explaining(service):
    """Return the function from image, model, caption and ticket to the two explanations."""

    def explain(image, model, text, ticket):
        if not ticket:  # the captions to explain are gone by now
            return None
        if not image:
            raise Refused("the image is gone: upload, paste or pick one")
        try:
            why = service.explain(image, model, text)
        except Unexplained as reason:
            return {"ticket": ticket, "words": note_html(str(reason)), "prefix": ""}
        words = words_html(why.picture, why.words, why.heat, why.unseen)
        return {"ticket": ticket, "words": words, "prefix": prefix_html(why.prefix)}

    return explain


class BodyLimit:
    """Refuses requests whose body is longer than `limit` bytes, whatever Content-Length they declare."""

    def __init__(self, app, limit):
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send):
        read = 0

        async def counted():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                raise HTTPException(413, "the upload is too large")
            return message

        await self.app(scope, counted, send)


def _refusal(request, error):
    """Answer a refused request with the server's own message, unless it names a file."""
    words = str(error.detail)
    words = words if "/" not in words else HTTPStatus(error.status_code).phrase
    return JSONResponse({"detail": words}, error.status_code, error.headers)


def _malformed(request, error):
    """Answer a request that lacks what it must have."""
    faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    return JSONResponse({"detail": f"the request is malformed: {'; '.join(faults)}"}, 422)


def _failure(request, error):
    """Answer a request that failed; the server logs why."""
    return JSONResponse({"detail": FAILED}, 500)


HANDLERS = {HTTPException: _refusal, RequestValidationError: _malformed, Exception: _failure}


def launch(page, route, host, port, max_upload_mb, at_once):
    """Serve a page until Ctrl-C.

    Args:
        route: a further one, besides gradio's.
        host, port: where.
        max_upload_mb: largest upload.
        at_once: most requests at work at a time.
    Raises: OSError where the port is taken.
    """
    size = max_upload_mb * 2**20
    limit = Middleware(BodyLimit, limit=size + 2**16)  # the form around the file
    hidden = Middleware(PathsHidden, folder=page.GRADIO_CACHE)
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, max_file_size=size, max_threads=at_once + OWN, share=False,
            ssr_mode=False, prevent_thread_lock=True, quiet=True, theme=theme(), css=STYLE, footer_links=["api"],
            app_kwargs={"middleware": [limit, hidden], "routes": [route], "exception_handlers": HANDLERS},
        )  # fmt: skip
    except OSError:
        raise OSError(f"cannot serve on {host}, port {port}: it is taken or not this machine's; pass another") from None
    note(f"serving {address}; Ctrl-C ends it")
    page.block_thread()
