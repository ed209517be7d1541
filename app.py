"""A page that captions images and shows why, and an endpoint for other programs.

    python app.py
    python app.py --checkpoint coco_train/coco_prefix_latest.pt --port 8000

serves http://127.0.0.1:7860: upload, paste or pick an image, and see the best captions of several candidates, with the
score that chose them, log-probability per token and CLIP score; the image regions that each word rests on; the prefix
read back as words. Programs call the endpoint /caption, with gradio's client or without, and simultaneous requests are
captioned in batches. Only this machine is served unless --host says otherwise.
"""

import importlib.util
from pathlib import Path

from features.images import set_max_pixels
from models.captioner_files import check_captioner, check_export_dtype, is_export
from models.pretrained import DEMO, NAMES
from utils.cli import Parser, late_imports, note, positive_int, run
from utils.flags import add_dtype_flag


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--checkpoint", metavar="FILE",
        help=f"a captioner of yours, besides {', '.join(NAMES)}: a file, a folder that export.py wrote, or ORG/NAME of "
        "the Hugging Face Hub",
    )  # fmt: skip
    parser.add_argument("--device", help="torch device (default: a GPU if there is one)")
    add_dtype_flag(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 serves the whole network")
    server.add_argument("--port", type=positive_int, default=7860, help="port")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--batch_size", type=positive_int, default=16, help="images at a time")
    limits.add_argument("--queue_size", type=positive_int, default=256, help="requests that wait; others are refused")
    limits.add_argument("--max_upload_mb", type=positive_int, default=20, help="largest upload, MB")
    limits.add_argument("--max_pixels", type=positive_int, default=50_000_000, help="most pixels of an image")
    return parser


def check_arguments(args):
    """Refuse what cannot be served; raises ValueError, FileNotFoundError."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('the page needs gradio; run: pip install -e ".[app]"')
    if args.checkpoint and is_export(args.checkpoint):
        check_export_dtype(args.checkpoint, args.dtype)
    elif args.checkpoint:
        check_captioner(args.checkpoint)


def main(argv=None):
    """Serve the page until Ctrl-C."""
    args = get_parser().parse_args(argv)
    check_arguments(args)
    set_max_pixels(args.max_pixels)
    with late_imports():
        from pages.page import build_page, launch
        from pages.route import caption_route
        from pages.service import Service
        from utils.devices import keep_few_kernels
    keep_few_kernels()
    models = {Path(args.checkpoint).stem: args.checkpoint} if args.checkpoint else {}  # visitors see no folders
    models |= {name: name for name in (DEMO, *NAMES) if name not in models}
    service = Service(models, args.device, args.batch_size, args.dtype)
    page = build_page(service, args.queue_size)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        note(f"warning: everyone who reaches {args.host} can use this page; it has no password")
    launch(page, caption_route(service, args.queue_size), args.host, args.port, args.max_upload_mb, service.at_once)


if __name__ == "__main__":
    run(main)
