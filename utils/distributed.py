"""Communication between the processes of one command; with one process none of it does anything."""

import contextlib
import functools
import operator
import os
import re
from datetime import timedelta

import torch
from torch import distributed

from utils.files import reason
from utils.processes import is_main, rank, world_size

# one may wait for another that saves or extracts; a process that dies is noticed at once
TIMEOUT = timedelta(days=1)
LOST = re.compile("gloo|NCCL", re.IGNORECASE)  # the libraries whose RuntimeErrors report a lost process


@contextlib.contextmanager
def connected(device):
    """Connect the processes while the body runs: collectives by gloo on the CPU, by NCCL on GPUs.

    Args:
        device: torch device of this process.
    Raises: ConnectionError where another process is gone.
    """
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise ConnectionError(
            f"another process of this command has ended; its own message says why (here: {reason(error)})"
        ) from None
    distributed.destroy_process_group()


def own_device(devices):
    """Return the device of this process.

    Args:
        devices: as `pick_devices` returns them: one for each process of this machine, or the CPU for all.
    Raises: ValueError where there are too few.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if devices == [torch.device("cuda")]:
        devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if devices[0].type == "cpu":
        return devices[0]
    if len(devices) < processes:
        raise ValueError(
            f"{processes} processes and {len(devices)} devices ({', '.join(map(str, devices))}): pass "
            f"--nproc_per_node {len(devices)} to torchrun, or --device cpu"
        )
    return devices[int(os.environ.get("LOCAL_RANK", rank()))]


def all_sum(value):
    """Return the sum of a number over all processes."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(total)
    return total.item()


def barrier():
    """Wait for all processes."""
    all_sum(0)


@contextlib.contextmanager
def main_first():
    """Run the body in process 0 before the others, so that they find on disk what it fetched."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def all_gather(value):
    """Return the list of every process' value: tensors and plain data."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def all_union(items):
    """Return the union of the processes' sets or dictionaries."""
    return functools.reduce(operator.or_, all_gather(items))
