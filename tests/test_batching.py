"""Concurrent calls share batches; an error reaches the one who caused it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from utils.batching import Batcher


def test_calls_share_batches_and_get_their_own_answers():
    sizes, gate = [], threading.Event()

    def work(requests):
        gate.wait(10)  # so that all others wait while the first is at work
        sizes.append(len(requests))
        return [ValueError(f"no {n}") if n % 10 == 3 else n * n for n in requests]

    batcher = Batcher(work, size=8)
    with ThreadPoolExecutor(30) as threads:
        futures = [threads.submit(batcher, n) for n in range(30)]
        while len(batcher.waiting) < 22:
            threading.Event().wait(0.001)
        gate.set()
    for n, future in enumerate(futures):
        if n % 10 == 3:
            assert str(future.exception()) == f"no {n}"
        else:
            assert future.result() == n * n
    assert sum(sizes) == 30 and max(sizes) == 8 and len(sizes) <= 6


def test_an_error_of_the_whole_batch_is_raised_and_the_next_one_works():
    def work(requests):
        if "bad" in requests:
            raise RuntimeError("broken")
        return requests

    batcher = Batcher(work, size=4)
    with pytest.raises(RuntimeError, match="broken"):
        batcher("bad")
    assert batcher("good") == "good"


def test_one_thread_does_all_the_work():
    """Whoever asks: what is kept per thread is kept once, and nothing is computed beside a batch."""
    batcher = Batcher(lambda requests: [threading.get_ident()] * len(requests), size=2)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(batcher, n) for n in range(20)]
        asked += [threads.submit(batcher.alone, threading.get_ident) for _ in range(5)]
        assert len({future.result() for future in asked}) == 1
    with pytest.raises(ZeroDivisionError):
        batcher.alone(lambda: 1 / 0)
    assert batcher(1) == batcher.alone(threading.get_ident)


def test_answers_that_are_too_few_reach_those_who_asked():
    """The thread that all wait for lives on."""
    batcher = Batcher(lambda requests: requests if requests == ["good"] else [], size=1)
    with pytest.raises(ValueError, match="zip"):
        ThreadPoolExecutor(1).submit(batcher, "bad").result(timeout=20)
    assert batcher("good") == "good"
