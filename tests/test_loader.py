"""The processes that read images: how they start, how they end, and what they are told."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
import torch
from PIL import Image

from features import images, loader
from features.loader import ImageFiles, image_loader, slices, start_method


def load(paths, size=2, workers=2):
    """Return the batches of an image loader, as lists of (index, pixels, error)."""
    return list(image_loader(paths, _size, slices(len(paths), size), workers, collate=list))


def _size(image):
    return image.size


@pytest.fixture
def paths(tmp_path):
    """Eight small images of different widths."""
    for number in range(8):
        Image.new("RGB", (4 + number, 5)).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(8)]


def test_no_fork_beside_other_threads(monkeypatch):
    """Each thread counts, one of Python's or of a library's."""
    seen, wait = [], threading.Event()
    thread = threading.Thread(target=wait.wait)
    thread.start()
    seen.append(start_method())
    wait.set()
    thread.join()
    assert seen == ["forkserver"]
    monkeypatch.setattr(os, "listdir", lambda folder: ["1"])
    assert start_method() == "fork"


@pytest.mark.parametrize("method", ("fork", pytest.param("forkserver", marks=pytest.mark.slow)))
def test_every_start_method_reads_the_same(paths, monkeypatch, method):
    """The limit of pixels goes with them, Ctrl-C and the environment stay as they were."""
    monkeypatch.setattr(loader, "start_method", lambda: method)
    monkeypatch.setattr(loader, "FEW", 0)
    monkeypatch.setattr(images, "_max_pixels", images.max_pixels())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    images.set_max_pixels(50)  # 10 x 5
    environment, handlers = dict(os.environ), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGCHLD)]
    found = [sample for batch in load(paths) for sample in batch]
    assert [size for _, size, _ in found[:7]] == [(4 + number, 5) for number in range(7)]
    assert "more than 50 pixels" in found[7][2]
    assert found == [sample for batch in load(paths, workers=0) for sample in batch]
    assert dict(os.environ) == environment
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGCHLD)] == handlers


def test_a_few_images_are_not_worth_a_server(paths, monkeypatch):
    monkeypatch.setattr(loader, "start_method", lambda: "forkserver")
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", lambda names: pytest.fail("one was started"))
    assert len(load(paths)) == 4


def _slowly(image):
    time.sleep(0.05)
    return torch.zeros(3, *image.size)


@pytest.mark.parametrize("method", ("fork", pytest.param("forkserver", marks=pytest.mark.slow)))
def test_a_killed_reading_process_is_one_error(paths, monkeypatch, method):
    monkeypatch.setattr(loader, "start_method", lambda: method)
    monkeypatch.setattr(loader, "FEW", 0)
    monkeypatch.setattr(resource_tracker, "unregister", resource_tracker.unregister)
    batches = image_loader(paths * 20, _slowly, slices(160, 2), 2, collate=list)
    next(batches)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)  # a reader, or one of multiprocessing's helpers
    with pytest.raises(ChildProcessError, match="a process that reads images was killed.*--num_workers, 0 for none"):
        list(batches)


def test_an_unreadable_image_is_a_sample(tmp_path):
    assert ImageFiles([tmp_path / "none.jpg"], _size)[0] == (0, None, "no such file")
