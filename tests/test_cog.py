"""Serving through cog's own HTTP server: its schema, right captions, and bad inputs refused with 422."""

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
from conftest import ROOT, run_script

from models.captioner import Captioner
from models.pretrained import DEMO_CHECKPOINT
from predict import Predictor

for module in ("cog", "coglet"):  # the second, cog's server, is a binary that not every platform has
    pytest.importorskip(module, reason='serving needs cog: pip install -e ".[serve]"')
SAMPLE = ROOT / "demo" / "images" / "200001.jpg"


def data_uri(content, kind="image/jpeg"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


IMAGE = data_uri(SAMPLE.read_bytes())


@contextlib.contextmanager
def serving(*flags):
    """The command's server; gives its port once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "cog_predict.py", "--port", str(port), *map(str, flags)], cwd=ROOT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):
            assert process.poll() is None, "cog's server has ended"
            try:
                if request(port, "GET", "/health-check")[1]["status"] == "READY":
                    break
            except ConnectionError:
                pass
            time.sleep(0.1)
        yield port
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


@pytest.fixture(scope="module")
def port():
    with serving() as port:
        yield port


def request(port, method, path, body=None):
    """Return (status, answer) of a request; one that meets a busy server is sent again."""
    for _ in range(100):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        if response.status != 409:
            break
        time.sleep(0.05)
    return response.status, answer


def test_captions(port):
    predictor = Predictor()
    predictor.setup(["demo"], device="cpu")
    for beam in (False, True):
        inputs = {"image": IMAGE, "model": "demo", "use_beam_search": beam}
        status, answer = request(port, "POST", "/predictions", {"input": inputs})
        assert (status, answer["status"]) == (200, "succeeded")
        assert answer["output"] == predictor.predict(str(SAMPLE), use_beam_search=beam)


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"model": "demo"}, "image"),
        ({"image": 5, "model": "demo"}, "image"),
        ({"image": IMAGE, "model": "no-such"}, "model"),
        ({"image": IMAGE, "model": "demo", "use_beam_search": "maybe"}, "use_beam_search"),
    ],
)
def test_bad_inputs_are_refused(port, inputs, field):
    status, answer = request(port, "POST", "/predictions", {"input": inputs})
    assert status == 422 and answer["detail"][0]["loc"] == ["body", "input", field]


def test_an_unreadable_image_is_a_failed_prediction(port):
    inputs = {"image": data_uri(b"no image", "text/plain"), "model": "demo"}
    answer = request(port, "POST", "/predictions", {"input": inputs})[1]
    assert answer["status"] == "failed" and answer["error"].endswith("ValueError: not a readable image (a text)")
    assert request(port, "POST", "/predictions", {"input": {"image": IMAGE, "model": "demo"}})[1]["output"]


@pytest.mark.parametrize("path", (str(SAMPLE), "demo/images/200001.jpg", SAMPLE.as_uri(), "/etc/passwd", "/none", ""))
def test_files_of_the_server_are_not_read(port, path):
    """Nor is it told whether they are there."""
    answer = request(port, "POST", "/predictions", {"input": {"image": path, "model": "demo"}})[1]
    assert answer["status"] == "failed" and "output" not in answer
    assert answer["error"].endswith("image must be an address (https://...) or the data of an image (data:...)")


def test_a_model_that_cannot_be_loaded_is_told_without_paths(monkeypatch):
    import cog_predict

    predictor = cog_predict.Predictor()
    predictor.setup()
    error = FileNotFoundError("download https://example.org/w and put it here as /home/me/w.pt")
    monkeypatch.setattr(predictor.predictor, "captioner", Mock(side_effect=error))
    with pytest.raises(ValueError, match="^the model coco cannot be loaded on this server: choose another$"):
        predictor.run(cog_predict.Path(SAMPLE), "coco", False)


def test_schema_has_the_predecessors_inputs(port):
    status, schema = request(port, "GET", "/openapi.json")
    fields = schema["components"]["schemas"]["Input"]["properties"]
    assert status == 200 and list(fields) == sorted(["image", "model", "use_beam_search"])
    assert fields["model"]["default"] == "coco" and fields["use_beam_search"]["default"] is False
    assert {"coco", "conceptual-captions"} <= set(schema["components"]["schemas"]["model"]["enum"])


@pytest.mark.slow
def test_own_captioner_and_number_type():
    """What the flags name is what captions."""
    expected = Captioner("demo", device="cpu", dtype="bf16")
    with serving("--checkpoint", DEMO_CHECKPOINT, "--dtype", "bf16") as port:
        for beam in (False, True):
            decoding = replace(expected.decoding, method="beam" if beam else "greedy")
            caption = next(expected.caption_files([SAMPLE], decoding))[0][SAMPLE][0].text
            inputs = {"image": IMAGE, "model": "own", "use_beam_search": beam}
            assert request(port, "POST", "/predictions", {"input": inputs})[1]["output"] == caption


@pytest.mark.slow
def test_exported_captioner(tmp_path):
    pytest.importorskip("onnxruntime")
    run_script("export.py", "--checkpoint", "demo", "--out", tmp_path / "exported")
    predictor = Predictor()
    predictor.setup(["demo"], device="cpu")
    with serving("--checkpoint", tmp_path / "exported") as port:
        answer = request(port, "POST", "/predictions", {"input": {"image": IMAGE, "model": "own"}})[1]
    assert answer["output"] == predictor.predict(str(SAMPLE))
    done = run_script("cog_predict.py", "--checkpoint", tmp_path / "exported", "--dtype", "int8", check=2)
    assert done.stderr.startswith("error: --dtype int8: ") and done.stderr.count("\n") == 1


def test_variables_of_a_container(monkeypatch):
    import cog_predict

    monkeypatch.setenv("CLIPCAP_CHECKPOINT", str(DEMO_CHECKPOINT))
    monkeypatch.setenv("CLIPCAP_DTYPE", "int8")
    runner = cog_predict.Predictor()
    runner.setup()
    assert runner.predictor.is_loaded("own") and not runner.predictor.is_loaded("demo")
    assert [runner.predictor.captioner(name).encoder.dtype for name in ("own", "demo")] == ["int8"] * 2


def test_wrong_settings(monkeypatch):
    done = run_script("cog_predict.py", "--checkpoint", "no-such.pt", check=2)
    assert done.stderr == "error: --checkpoint no-such.pt is neither a file nor a folder, nor ORG/NAME of the hub\n"
    import cog_predict

    monkeypatch.setenv("CLIPCAP_DTYPE", "fp8")
    with pytest.raises(ValueError, match="^--dtype fp8 is not one of auto, fp32, bf16, int8$"):
        cog_predict.Predictor().setup()


def test_cog_yaml_names_what_is_there():
    """The class, and the packages that the project itself asks for."""
    text = (ROOT / "cog.yaml").read_text()
    file, name = re.search(r'^run: "(.+):(.+)"$', text, re.MULTILINE).groups()
    assert f"class {name}(" in (ROOT / file).read_text()
    requirements = (ROOT / re.search(r"python_requirements: (.+)", text)[1]).read_text().splitlines()[1:]
    dependencies = re.search(
        r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    assert requirements == re.findall(r'^ *"(.+?)"', dependencies[1], re.MULTILINE)
