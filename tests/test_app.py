"""The page in a headless browser, and its endpoint under a hundred requests, bad ones and too large ones."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SAMPLES, run_script
from PIL import Image

from predict import Predictor

gradio = pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[app]"')
gradio_client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page, served by the command with small limits; yields (address, process)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("gradio")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "app.py", "--port", str(port), "--device", "cpu", "--max_upload_mb", "1"]
    command += ["--max_pixels", "2000000", "--queue_size", "128", "--checkpoint", "demo/weights/demo_latest.pt"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert re.fullmatch(f"serving http://127.0.0.1:{port}/; Ctrl-C ends it\n", process.stderr.readline())
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=90)
        assert process.returncode == 0  # Ctrl-C is how it ends


@pytest.fixture(scope="module")
def client(server):
    return gradio_client.Client(server[0], verbose=False, max_workers=100, httpx_kwargs={"timeout": 120})


def caption(client, image, *options):
    """Call the endpoint."""
    return client.predict(gradio_client.handle_file(str(image)), *options, api_name="/caption")


def highest_memory(process):
    """Return the most memory, in MB, that a process has held so far."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        pytest.skip("the system does not tell a process's memory")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024


def test_page(server, browser):
    """Upload, caption, picture; choose a word; a caption of one's own; no request goes elsewhere."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    hosts, troubles = set(), []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url[:8] else None)
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.goto(server[0])
    page.set_input_files("#cc-image input[type=file]", SAMPLES[0])
    page.wait_for_selector("#cc-image img")
    page.get_by_role("button", name="Caption", exact=True).click()
    page.wait_for_selector(".cc-words label")
    assert page.locator(".cc-captions li").count() == 3
    assert re.search(r"[sS]and.*\s*score \d\.\d\d", page.locator(".cc-captions li").first.inner_text())
    last = page.locator(".cc-captions li").last.inner_text()
    assert re.search(r"log-probability per token −\d+\.\d{3}\s*CLIP score \d\.\d\d", last)
    for word in ("purple", "white"):
        page.locator(".cc-words label", has_text=word).click()
        assert page.locator(".cc-words input:checked + label").inner_text() == word
        number = page.locator(".cc-words input:checked").get_attribute("id")
        page.wait_for_function(f"getComputedStyle(document.querySelector('img.{number}')).opacity == 1")
        assert page.locator(f"span.{number}").inner_text().startswith("With the brightest region hidden")
    assert page.locator(".cc-prefix li").count() == 10
    own = page.get_by_label("or a caption of your own")
    own.fill("A <b>${1 + 1}</b> star.")
    own.press("Enter")
    page.wait_for_selector(".cc-words label:text-is('star')")
    assert page.locator(".cc-words label").all_inner_texts() == [
        "A",
        "<",
        "b",
        ">${",
        "1",
        "+",
        "1",
        "}</",
        "b",
        ">",
        "star",
        ".",
    ]
    assert hosts == {server[0].split("/")[2]} and not troubles


def test_page_on_a_narrow_window(server, browser):
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto(server[0])
    page.locator("#cc-samples button").nth(1).click()
    page.wait_for_selector("#cc-image img")
    page.get_by_text("greedy", exact=True).click()
    page.get_by_role("button", name="Caption", exact=True).click()
    page.wait_for_selector(".cc-words label")
    predictor = Predictor()
    predictor.setup(["demo"], device="cpu")
    assert page.locator(".cc-captions b").all_inner_texts() == [predictor.predict(str(SAMPLES[1]))]
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_page_shows_errors_in_a_line(server, browser, tmp_path):
    page = browser.new_page()
    page.goto(server[0])
    page.get_by_role("button", name="Caption", exact=True).click()
    page.wait_for_selector("text=there is no image yet")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)).save(tmp_path / "large.bmp")
    page.set_input_files("#cc-image input[type=file]", tmp_path / "large.bmp")
    page.wait_for_selector("text=exceed the maximum")


@pytest.mark.slow
def test_hundred_requests_at_once(server, client, tmp_path):
    """All are answered, each with its own image's caption, while memory stays where a few have brought it."""
    predictor = Predictor()
    predictor.setup(["demo"], device="cpu")
    expected = [predictor.predict(str(path)) for path in SAMPLES]
    for path in SAMPLES:  # fifty of them take 290 MB when they are unpacked at the same time
        Image.open(path).resize((1600, 1200)).save(tmp_path / path.name)
    caption(client, tmp_path / SAMPLES[0].name)
    before = highest_memory(server[1])
    small = [(path, "demo", "greedy") for path in SAMPLES * 5]
    large = [(tmp_path / path.name,) for path in SAMPLES * 5]
    with ThreadPoolExecutor(100) as threads:
        answers = list(threads.map(lambda request: caption(client, *request), [*small, *large]))
    assert [answer[0]["caption"] for answer in answers[:50]] == expected * 5
    assert all(len(answer) == 3 and answer[0]["clip_score"] > 0 for answer in answers[50:])
    assert highest_memory(server[1]) - before < 250


def test_endpoint_refuses_bad_requests(client, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("1", (2000, 1001)).save(tmp_path / "bomb.png")
    for name, message in (("text.jpg", "not a readable image"), ("bomb.png", "more than 2,000,000 pixels")):
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            caption(client, tmp_path / name)
    for options, message in ((("no-such",), "not in the list"), (("demo", "sample", 3, 7.0), "7.0")):
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            caption(client, SAMPLES[0], *options)
    address = {"path": "https://example.org/photo.jpg", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(gradio_client.exceptions.AppError, match="not fetched from addresses"):
        client.predict(address, api_name="/caption")
    assert caption(client, SAMPLES[0], "demo_latest", "sample", 4)[3]["caption"]


def test_the_best_of_candidates_come_first(client):
    """It is the default; the score that orders them is shown; other ways have none."""
    answer = caption(client, SAMPLES[0])
    scores = [found["score"] for found in answer]
    assert len({found["caption"] for found in answer}) == 3 and scores == sorted(scores, reverse=True)
    assert answer == caption(client, SAMPLES[0], "demo_latest", "clip")
    beams = caption(client, SAMPLES[0], "demo_latest", "beam")
    means = [found["logprob"] for found in beams]
    assert means == sorted(means, reverse=True) and "score" not in beams[0]


def test_the_sample_of_the_api_page_runs(server):
    """As printed, in the repository's folder."""
    endpoint = json.loads(fetch(f"{server[0]}/gradio_api/info")[1])["named_endpoints"]["/caption"]
    sample = endpoint["code_snippets"]["python"]
    done = subprocess.run([sys.executable, "-c", sample], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "'caption': 'On the sand there are two small purple rings" in done.stdout, (
        done.stderr
    )
    told = json.dumps([endpoint["code_snippets"], endpoint["parameters"][0]["python_type"], endpoint["description"]])
    assert "https" not in told and "URL" not in told and told.count("not fetched") == 2


def test_files_of_the_server_are_not_read(server):
    """A request may name what was uploaded, not any path."""
    image = {"path": str(SAMPLES[0]), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [image, "demo", "beam", 3, 0.8, 1, 0]}).encode()
    address = f"{server[0]}/gradio_api/call/caption"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    event = json.loads(urllib.request.urlopen(request, timeout=20).read())["event_id"]
    assert urllib.request.urlopen(f"{address}/{event}", timeout=20).read().startswith(b"event: error")


def fetch(address, body=None, kind="application/json"):
    """Return (status, text) of a request; a body is sent as JSON unless it is bytes."""
    body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def upload(address, content, name="a.jpg"):
    """Upload a file as the page does; returns the path that is told."""
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/jpeg\r\n\r\n'
    body = head.encode() + content + b"\r\n--b--\r\n"
    return json.loads(fetch(f"{address}/gradio_api/upload", body, "multipart/form-data; boundary=b")[1])[0]


def test_paths_of_this_machine_stay_here(server, tmp_path_factory):
    """Uploads have another name outside, under which they are found."""
    address, _ = server
    private = str(tmp_path_factory.getbasetemp())
    path = upload(address, SAMPLES[0].read_bytes())
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answers = [fetch(f"{address}/{page}")[1] for page in ("", "config", "gradio_api/info", "openapi.json")]
    body = {"data": [image, "demo", "greedy", 1, 0.8, 1, 0]}
    status, captions = fetch(f"{address}/gradio_api/run/caption", body)
    assert status == 200 and "On the sand" in captions
    body = {"data": ["demo", {**image, "x": 1}], "fn_index": 1}
    answers += [path, captions, fetch(f"{address}/gradio_api/run/predict", body)[1]]
    assert not any(private in answer or str(ROOT) in answer for answer in answers)
    with urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=20) as file:
        assert file.read() == SAMPLES[0].read_bytes()
    assert fetch(f"{address}/gradio_api/file={ROOT}/app.py") == (403, '{"detail":"Forbidden"}')


def test_every_error_is_one_line_for_visitors(server):
    address, _ = server
    image = {"path": upload(address, SAMPLES[0].read_bytes()), "meta": {"_type": "gradio.FileData"}}
    rest = ["beam", 3, 0.8, 1, 0]
    elsewhere = {**image, "path": "/etc/hostname"}
    for data, told in (
        ([None, "demo", *rest], "there is no image yet"),
        (["x", "demo", *rest], "the request is malformed"),
        ([elsewhere, "demo", *rest], "the request is malformed"),
        ([image], "the request is malformed"),
        ([image, ["demo"], *rest], "Value: ['demo'] is not in the list of choices: ['demo_latest', 'demo', 'coco'"),
        ([image, "coco", *rest], "the model coco cannot be loaded on this server: choose another"),
        ([image, "demo", "no", *rest[1:]], "Value: 'no' is not in the list of choices"),
        ([image, "demo", "sample", 3, 0.8, 1, None], "captions, top_p, temperature and seed are numbers"),
    ):
        status, answer = fetch(f"{address}/gradio_api/run/caption", {"data": data})
        line = json.loads(answer)["error"]
        assert status == 500 and line.startswith(told) and not re.search(r"/|\n|class|Error|https?:", line)
    for body in (b"no json", b"{}", b"[]"):
        status, answer = fetch(f"{address}/gradio_api/call/caption", body)
        assert status == 422 and json.loads(answer)["detail"].startswith("the request is malformed: body")
    assert fetch(f"{address}/gradio_api/call/no-such", {"data": []})[1] == (
        '{"detail":"the server could not do this; its log says why"}'
    )


def test_memory_that_runs_out_is_told(capfd):
    from pages.errors import OUT_OF_MEMORY, message_of

    for error in (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: no memory")):
        assert message_of(error) == OUT_OF_MEMORY
    assert "alloc_cpu.cpp" in capfd.readouterr().err


@pytest.mark.parametrize("length_told", [True, False])
def test_long_bodies_are_refused(server, length_told):
    """The limit is on what comes, not on what is announced; the server may hang up before all is sent."""
    body = b"x" * 2**21 if length_told else (b"x" * 2**16 for _ in range(32))
    request = urllib.request.Request(f"{server[0]}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.URLError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert getattr(refused.value, "code", 413) == 413
    assert urllib.request.urlopen(f"{server[0]}/config", timeout=20).status == 200


class SlowService:
    """Answers when it is let."""

    models, methods, at_once = ["demo"], {"greedy": "greedy", "sampling": "sample"}, 1

    def __init__(self):
        self.gate = threading.Event()

    def decoding(self, *values):
        return values

    def caption(self, image, model, decoding):
        self.gate.wait(30)
        return []


def test_queue_has_a_limit():
    from pages.page import build_page

    service = SlowService()
    page = build_page(service, queue_size=3)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_port=None, ssr_mode=False)
    try:
        client = gradio_client.Client(address, verbose=False)
        jobs = []
        for _ in range(6):
            jobs.append(client.submit(gradio_client.handle_file(str(SAMPLES[0])), api_name="/caption"))
            time.sleep(0.3)
        deadline = time.monotonic() + 20
        while len(refused := [job for job in jobs if job.done()]) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(refused) == 2  # one at work, three wait
        assert all("Queue is full" in str(job.exception()) for job in refused)
        service.gate.set()
        assert [job.result(timeout=20) for job in jobs if job not in refused] == [[]] * 4
    finally:
        service.gate.set()
        page.close()


def test_port_that_is_taken(server):
    done = run_script("app.py", "--port", server[0].split(":")[-1], "--device", "cpu", check=2)
    assert re.fullmatch(r"error: cannot serve on 127\.0\.0\.1, port \d+: it is taken .*\n", done.stderr)


def test_wrong_checkpoint():
    done = run_script("app.py", "--checkpoint", "no-such", check=2)
    assert (
        done.stderr.startswith("error: --checkpoint no-such is neither a file, nor one of")
        and done.stderr.count("\n") == 1
    )


def test_plain_endpoint(server, client):
    """A picture's bytes get what gradio's client gets; what is wrong is told in a line."""

    def ask(query, body=None):
        body = SAMPLES[0].read_bytes() if body is None else body
        return fetch(f"{server[0]}/caption?{query}", body, "image/jpeg")

    assert json.loads(ask("method=greedy")[1]) == caption(client, SAMPLES[0], "demo_latest", "greedy")
    assert json.loads(ask("model=demo&method=beam&num_captions=4")[1]) == caption(client, SAMPLES[0], "demo", "beam", 4)
    status, best = ask("")
    assert status == 200 and [found["score"] for found in json.loads(best)] and ask("")[1] == best
    for query, told in (
        ("model=no", "the model is one of demo_latest, demo, coco"), ("method=no", "the method is one of clip, beam"),
        ("model=coco", "the model coco cannot be loaded on this server: choose another"), ("beams=3", "beams is no"),
        ("num_captions=11", "num_captions is a whole number from 1 to 10"), ("top_p=nan", "top_p is a number from"),
        ("seed=x", "seed is a whole number from 0 to"),
    ):  # fmt: skip
        found, answer = ask(query)
        line = json.loads(answer)["error"]
        assert found == 400 and line.startswith(told) and not re.search(r"/|\n|class|Error|https?:", line), query
    assert ask("", b"text") == (400, '{"error":"not a readable image (a text)"}')
    assert ask("", b"")[0] == 400 and ask("", b"x" * 2**21)[0] == 413
    assert fetch(f"{server[0]}/caption")[0] == 405
