"""Build the page that captions in the browser, and serve it.

    python docs/browser/serve.py

exports the demo's captioner to docs/browser/captioner/, unless one is there, fetches onnxruntime-web by npm into
docs/browser/vendor/, and serves http://127.0.0.1:8000. After that docs/browser/ is a folder of plain files, for any
static server. Another captioner: `python export.py --checkpoint FILE --dtype int8 --out docs/browser/captioner`.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # run from anywhere, as a script

from utils.cli import Parser, note, positive_int, run
from utils.files import write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGE = "onnxruntime-web@1.30.0"
VENDORED = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # the processor's half of it, on one thread
CAPTIONER, VENDOR = HERE / "captioner", HERE / "vendor"


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 serves the whole network")
    parser.add_argument("--port", type=positive_int, default=8000, help="port")
    return parser


def fetch_runtime():
    """Bring onnxruntime-web's two files to vendor/; raises ValueError where npm is missing or cannot."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"npm, which comes with Node.js, is needed once, to fetch {PACKAGE}: install it")
    note(f"fetching {PACKAGE}")
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".vendor.") as temporary:
        command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", temporary]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
            raise ValueError(f"npm cannot fetch {PACKAGE}: {reason}; is there a network?")
        [tarball] = Path(temporary).glob("*.tgz")
        new = Path(temporary) / "vendor"
        new.mkdir()
        with tarfile.open(tarball) as files:
            for name in VENDORED:
                (new / name).write_bytes(files.extractfile(f"package/dist/{name}").read())
        shutil.rmtree(VENDOR, ignore_errors=True)
        new.rename(VENDOR)


def export_demo():
    """Export the demo's captioner, with pictures to try it on; raises ValueError where that fails."""
    note("exporting the demo's captioner, which takes half a minute")
    command = [sys.executable, ROOT / "export.py", "--checkpoint", "demo", "--out", CAPTIONER]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError("export.py could not export the demo's captioner; it says why above")
    samples = sorted((ROOT / "demo" / "images").glob("*.jpg"))
    (CAPTIONER / "samples").mkdir()
    for sample in samples:
        shutil.copy(sample, CAPTIONER / "samples")
    write_json(CAPTIONER / "samples.json", [sample.name for sample in samples])


class Handler(SimpleHTTPRequestHandler):
    """Serves the folder's files; a browser asks whether one is new before it takes its own copy."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".svg": "image/svg+xml",
        ".json": "application/json", ".onnx": "application/octet-stream", ".bin": "application/octet-stream",
    }  # fmt: skip

    def end_headers(self):
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_):
        """Say nothing of single requests."""


def main(argv=None):
    """Build what is missing and serve until Ctrl-C."""
    args = get_parser().parse_args(argv)
    if not all((VENDOR / name).is_file() for name in VENDORED):
        fetch_runtime()
    if not (CAPTIONER / "captioner.json").is_file():
        export_demo()
    try:
        server = ThreadingHTTPServer((args.host, args.port), partial(Handler, directory=HERE))
    except (OSError, OverflowError):
        raise OSError(f"cannot serve on {args.host}, port {args.port}: it is taken or not this machine's") from None
    note(f"serving http://{args.host}:{args.port}/; Ctrl-C ends it")
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    run(main)
