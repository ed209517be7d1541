"""Timing side by side, memory in a process of its own, and the machine's limits."""

import functools
import gc
import multiprocessing
import statistics
import time
import typing
from pathlib import Path

import torch

from utils.precision import pick_dtype

LONG = 15  # seconds of a round: where they are longer, the later ones are left out


def synchronize(device):
    """Wait for a GPU's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timed(typing.NamedTuple):
    """What `interleave` found: medians in seconds, last results, (slowest - fastest) / median, a product's GFLOP/s."""

    seconds: dict
    results: dict
    spread: dict
    product: float

    def quality(self, name):
        """Return columns that tell a quiet machine from a loaded one: a system's spread, and the product beside it."""
        return {"spread": self.spread[name], "product beside": self.product}


def interleave(systems, repeats, device):
    """Time systems and a fixed matrix product in turn, so that other load on the machine hits all of them.

    Args:
        systems: {name: function without arguments}.
        repeats: rounds after one to warm up; where rounds are long, fewer, but at least two.
    Returns: Timed; its `product` is the median rate of a float32 product, measured once a round.
    """
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    seconds, results, products = {name: [] for name in systems}, {}, []
    began = time.perf_counter()
    for number in range(repeats + 1):
        if number > 2 and time.perf_counter() - began > LONG * repeats:
            break
        took, _ = _timed(lambda: a @ b, device)
        if number:
            products.append(2 * side**3 / took / 1e9)
        for name, work in systems.items():
            took, results[name] = _timed(work, device)
            if number:
                seconds[name].append(took)
    gc.collect()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    spread = {name: (max(values) - min(values)) / medians[name] for name, values in seconds.items()}
    return Timed(medians, results, spread, statistics.median(products))


def _timed(work, device):
    """Return (seconds, result) of a function."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - began, result


def best_of(work, repeats, device):
    """Return the shortest time of a function, in seconds: for limits, where noise only adds."""
    return min(_timed(work, device)[0] for _ in range(repeats + 1))  # the first warms up


def precisions(device):
    """Return the precisions to measure: `fp32`, and `bf16` where it is not emulated, which takes a hundred times."""
    return ["fp32", "bf16"] if pick_dtype("auto", device) == "bf16" else ["fp32"]


@functools.cache
def limits(device, side):
    """Return what the machine can do: {`fp32 product`: GFLOP/s, `copy`: GB/s read and written, ...}.

    Args:
        side: of the square matrices that are multiplied.
    """
    found = {}
    for name in precisions(device):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[f"{name} product"] = 2 * side**3 / best_of(lambda a=a, b=b: a @ b, 8, device) / 1e9
    source = torch.randn(1 << 26, device=device)  # 256 MiB, beyond every cache
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / best_of(lambda: target.copy_(source), 8, device) / 1e9
    found["read"] = source.nbytes / best_of(source.sum, 8, device) / 1e9
    return found


def _resident(field):
    """Return a figure of this process' memory in MiB: `VmRSS`, now, or `VmHWM`, the most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def _report_peak(queue, prepare, arguments):
    work = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, began = _resident("VmRSS"), time.perf_counter()
    work()
    seconds, peak = time.perf_counter() - began, _resident("VmHWM")
    queue.put((peak, peak - before, seconds))


def peak_memory(prepare, *arguments):
    """Return the most memory that a function needs, measured in a fresh process; on Linux only.

    Args:
        prepare: top-level function that returns the function to measure, given `arguments`.
    Returns: (MiB with all that was prepared, MiB of the function alone, seconds it took).
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_report_peak, args=(queue, prepare, arguments))
    process.start()
    found = queue.get()
    process.join()
    return found
