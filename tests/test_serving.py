"""Many visitors of the page at once: nobody waits for others' downloads or files; exported folders are served too."""

import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script

from features.images import read_image
from models import predictor as predictor_module
from models.captioner import Captioner
from models.predictor import Predictor
from pages import service as service_module
from pages.errors import Refused, Unexplained
from pages.service import LOADING, Service

SAMPLES = sorted((ROOT / "demo" / "images").iterdir())


def wait_until(happened):
    """Wait for something that other threads do, half a minute at most."""
    deadline = time.monotonic() + 30
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


class SlowLoad:
    """A stand-in of models.predictor.Captioner: captioners named slow come when they are let."""

    def __init__(self, monkeypatch, demo):
        self.gate, self.begun = threading.Event(), []

        def load(checkpoint, **options):
            if checkpoint == "slow":
                self.begun.append(threading.current_thread().name)
                assert self.gate.wait(60)
            if checkpoint == "broken":
                raise OSError("no such file")
            return demo

        monkeypatch.setattr(predictor_module, "Captioner", load)


@pytest.fixture
def slow_load(monkeypatch, demo_captioner):
    loading = SlowLoad(monkeypatch, demo_captioner)
    yield loading
    loading.gate.set()


@pytest.fixture(scope="module")
def demo_captioner():
    return Captioner("demo", device="cpu")


def test_loading_a_captioner_stalls_nobody_else(slow_load):
    """However many wait for it, once and loaded once; those that there is no room for are told so."""
    service = Service({name: name for name in ("demo", "slow", "broken")}, "cpu", batch_size=2)
    decoding = service.decoding("greedy", 1, 1.0, 1.0, 0)
    ask = lambda model: service.caption(str(SAMPLES[0]), model, decoding)  # noqa: E731
    expected = ask("demo")
    with ThreadPoolExecutor(LOADING + 8) as threads:
        waiting = [threads.submit(ask, "slow") for _ in range(LOADING)]
        wait_until(lambda: not service.loading._value)
        assert [ask("demo") for _ in range(3)] == [expected] * 3
        with pytest.raises(Refused, match="^the model slow is being loaded for others: try again in a minute$"):
            ask("slow")
        assert not any(answer.done() for answer in waiting)
        slow_load.gate.set()
        assert [answer.result(60) for answer in waiting] == [expected] * LOADING
    assert len(slow_load.begun) == 1 and ask("slow") == expected
    for _ in range(2):  # the failure is not kept
        with pytest.raises(Refused, match="^the model broken cannot be loaded on this server: choose another$"):
            ask("broken")


def test_pictures_are_read_before_their_batch(slow_load, monkeypatch):
    """While a batch is at work, the pictures of the next one are read, by few threads."""
    service = Service({"demo": "demo"}, "cpu", batch_size=4)
    decoding = service.decoding("greedy", 1, 1.0, 1.0, 0)
    read, gate, sizes = [], threading.Event(), []

    def reading(image):
        read.append(threading.current_thread().name)
        return read_image(image)

    caption_alike = service._caption_alike
    service.batches.work = lambda questions: (gate.wait(30), sizes.append(len(questions)), caption_alike(questions))[2]
    monkeypatch.setattr(service_module, "read_image", reading)
    with ThreadPoolExecutor(12) as threads:
        answers = [threads.submit(service.caption, str(SAMPLES[0]), "demo", decoding) for _ in range(12)]
        wait_until(lambda: len(read) == 12 and len(service.batches.waiting) >= 8)
        assert {name.split("_")[0] for name in read} == {"readers"} and not sizes
        gate.set()
        assert len({answer.result(30)[0]["caption"] for answer in answers}) == 1
    assert max(sizes) == 4 and len(sizes) <= 5  # what waits together is captioned together


def test_plain_endpoint_has_a_limit():
    """What is more than can be at work and wait is refused at once."""
    pytest.importorskip("starlette", reason='the endpoint needs starlette: pip install -e ".[app]"')
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from pages.route import caption_route

    gate = threading.Event()
    service = SimpleNamespace(
        models=["demo"], methods={"greedy": "greedy"}, at_once=1, decoding=lambda *values: values,
        caption=lambda *_: gate.wait(30) and [],
    )  # fmt: skip
    with TestClient(Starlette(routes=[caption_route(service, 2)])) as app, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(app.post, "/caption", content=b"x") for _ in range(6)]
        wait_until(lambda: sum(answer.done() for answer in asked) >= 3)
        gate.set()
        statuses = sorted(answer.result(30).status_code for answer in asked)
    assert statuses == [200] * 3 + [503] * 3  # one at work, two wait


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The demo's captioner as export.py writes it."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path_factory.mktemp("export") / "small"
    run_script("export.py", "--checkpoint", "demo", "--out", out)
    return out


@pytest.mark.slow
def test_exported_captioner_is_served(exported, demo_captioner):
    """By the same service and class, with the same captions; what needs torch's weights is refused in a line."""
    service = Service({"small": str(exported), "demo": "demo"}, "cpu")
    assert list(service.methods.values()) == ["beam", "greedy", "sample"]
    predictor = Predictor()
    predictor.setup([str(exported), "demo"], device="cpu")
    for path in map(str, SAMPLES):
        for method in ("beam", "greedy", "sample"):
            decoding = service.decoding(method, 3, 0.8, 1.0, 0)
            found, expected = (service.caption(path, model, decoding) for model in ("small", "demo"))
            assert [one["caption"] for one in found] == [one["caption"] for one in expected]
            assert [one["logprob"] for one in found] == pytest.approx([one["logprob"] for one in expected], abs=2e-4)
            assert found[0]["clip_score"] is None
        for beam in (False, True):
            assert predictor.predict(path, str(exported), beam) == predictor.predict(path, "demo", beam)
    with pytest.raises(Unexplained, match="^an exported captioner cannot explain its words: serve the checkpoint"):
        service.explain(str(SAMPLES[0]), "small", "A star.")
    with pytest.raises(Refused, match="no text tower"):
        service.caption(str(SAMPLES[0]), "small", service.decoding("clip", 3, 1.0, 1.0, 0))
    done = run_script("app.py", "--checkpoint", exported, "--dtype", "int8", check=2)
    assert re.fullmatch(
        r"error: --dtype int8: .*small has the numbers that export.py gave it; leave it out\n", done.stderr
    )


@pytest.mark.slow
def test_damaged_export_is_told_in_a_line(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "cut")
    (folder / "step.onnx").unlink()
    done = run_script("app.py", "--checkpoint", folder, check=2)
    assert done.stderr.endswith("lacks step.onnx; export the captioner again\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("dtype", ("bf16", "int8"))
def test_number_types_are_served(dtype):
    service = Service({"demo": "demo"}, "cpu", dtype=dtype)
    assert service.predictor.captioner().encoder.dtype == dtype
    decoding = service.decoding("greedy", 1, 1.0, 1.0, 0)
    assert service.caption(str(SAMPLES[0]), "demo", decoding)[0]["caption"].endswith(".")
