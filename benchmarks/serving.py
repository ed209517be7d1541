"""Many clients of app.py at once, beside the same captioner's offline batches."""

import http.client
import importlib.util
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from models.captioner import Captioner
from models.exported import ExportedCaptioner
from models.pretrained import DEMO_CHECKPOINT
from models.settings import CLIP, DecodingConfig

ROOT = Path(__file__).resolve().parent.parent
CLIENTS, BATCH = 64, 16  # BATCH: images at a time, of the server and offline
# as pages/service.py decodes
WAYS = {
    "greedy": DecodingConfig(),
    "best of 16": DecodingConfig(rerank=CLIP, num_candidates=16, num_captions=3),
    "beam": DecodingConfig(method="beam", num_captions=3),
}
METHODS = {"greedy": "greedy", "best of 16": "clip", "beam": "beam"}  # as the endpoints call them


@contextmanager
def serving(checkpoint, device):
    """Run app.py in a process of its own; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port), "--checkpoint", str(checkpoint)]
    command += ["--device", str(device), "--batch_size", str(BATCH)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stderr.readline()
        if not line.startswith("serving"):
            raise RuntimeError(f"app.py does not start: {line}{process.stderr.read()}")
        yield port
    finally:
        process.terminate()  # Ctrl-C would be ignored where the shell has put this in the background
        process.communicate(timeout=60)


def request(port, method, path, body=None, kind="application/json"):
    """Return the answer to a request; raises RuntimeError where it is not 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(method, path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status} {text}")
    return text


def ask_plainly(port, picture, method):
    """Caption a picture by the plain endpoint; returns the best caption."""
    answer = request(port, "POST", f"/caption?method={method}", picture.read_bytes(), "image/jpeg")
    return json.loads(answer)[0]["caption"]


def ask_gradio(port, picture, method):
    """Caption a picture as gradio's clients do: upload, ask, wait; returns the best caption."""
    head = '--b\r\nContent-Disposition: form-data; name="files"; filename="image"\r\nContent-Type: image/jpeg\r\n\r\n'
    form = head.encode() + picture.read_bytes() + b"\r\n--b--\r\n"
    [path] = json.loads(request(port, "POST", "/gradio_api/upload", form, "multipart/form-data; boundary=b"))
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [image, None, method, 3, 0.8, 1, 0]})
    event = json.loads(request(port, "POST", "/gradio_api/call/caption", body))["event_id"]
    answer = request(port, "GET", f"/gradio_api/call/caption/{event}")
    return json.loads(re.search(r"event: complete\ndata: (.*)", answer)[1])[0][0]["caption"]


ENDPOINTS = {"plain": ask_plainly, "gradio's": ask_gradio}


def ask_all(ask, port, pictures, method, clients):
    """Let clients ask for the captions of pictures, each for the next one; returns (captions, seconds of each)."""

    def timed(picture):
        began = time.perf_counter()
        return ask(port, picture, method), time.perf_counter() - began

    with ThreadPoolExecutor(clients) as threads:
        return zip(*threads.map(timed, pictures), strict=True)


def measure_engine(engine, captioner, checkpoint, ways, pictures, repeats, clients):
    """Return a row per way and endpoint: the server beside offline batches, in turn."""
    rows = []
    with serving(checkpoint, captioner.encoder.device) as port:
        for way in ways:
            rates, waits, offline = defaultdict(list), defaultdict(list), []
            for number in range(repeats + 1):
                began = time.perf_counter()
                groups = [group for group, _ in captioner.caption_files(pictures, WAYS[way], BATCH)]
                expected = [captions[path][0].text.strip() for captions in groups for path in captions]
                offline += [len(pictures) / (time.perf_counter() - began)] if number else []
                for name, ask in ENDPOINTS.items():
                    began = time.perf_counter()
                    said, seconds = ask_all(ask, port, pictures, METHODS[way], clients)
                    if number:  # the first round warms up
                        rates[name].append(len(pictures) / (time.perf_counter() - began))
                        waits[name] += seconds
                    if way == "greedy" and list(said) != expected:
                        raise RuntimeError(f"{name} endpoint: other captions than offline")
            for name in ENDPOINTS:
                rate, alone, wait = statistics.median(rates[name]), statistics.median(offline), sorted(waits[name])
                half, most = wait[len(wait) // 2], wait[int(0.99 * len(wait))]
                rows.append({
                    "engine": engine, "decoding": way, "endpoint": name, "captions/s": rate,
                    "offline, captions/s": alone, "share": rate / alone, "p50, ms": 1000 * half,
                    "p99, ms": 1000 * most, "p99 / p50": most / half,
                })  # fmt: skip
    return rows


def run(device, repeats, quick):
    """Measure CLIENTS clients of the demo's captioner, in torch and exported; returns {title: rows}."""
    count, clients = (16, 4) if quick else (128, CLIENTS)
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder), count)
        captioner = Captioner("demo", device=str(device))
        given = pictures, repeats, clients
        rows = measure_engine("torch", captioner, DEMO_CHECKPOINT, ("greedy", "best of 16"), *given)
        if importlib.util.find_spec("onnxscript") and not quick:
            out = Path(folder) / "exported"
            command = [sys.executable, "export.py", "--checkpoint", "demo", "--out", str(out), "--quiet"]
            subprocess.run(command, cwd=ROOT, check=True)
            rows += measure_engine("exported", ExportedCaptioner(out), out, ("greedy", "beam"), *given)
    return {f"{CLIENTS} clients at once": rows}


def write_pictures(folder, count):
    """Link the demo's scenes as `count` files; returns their paths."""
    scenes = sorted((ROOT / "demo" / "images").glob("*.jpg"))
    paths = [folder / f"{number:04d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.symlink_to(scenes[number % len(scenes)])
    return paths
