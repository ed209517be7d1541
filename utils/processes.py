"""Which of the command's processes this is, where torchrun or `accelerate launch` started several; else there is one.

Every process runs the same command. Process 0 speaks and writes; errors are reported once.
"""

import os
import sys


def world_size():
    """Return how many processes the command runs in."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank():
    """Return this process' number, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main():
    """Tell whether this is the process that speaks and writes."""
    return rank() == 0


def first_to_fail():
    """Tell whether no other process has reported an error yet."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return is_main()  # what fails before the processes are connected fails in all of them
    try:
        return distributed.distributed_c10d._get_default_store().add("failed", 1) == 1
    except distributed.DistError:  # the process that keeps count has ended, and reported its error first
        return False


def share(items):
    """Return this process' share of a sequence; shares are as equal as possible."""
    return items[rank() :: world_size()]


def check_shares(bs, records):
    """Refuse a batch that cannot be shared out evenly, and more processes than records.

    Raises: ValueError naming numbers that would do.
    """
    processes = world_size()
    if bs % processes:
        fitting = [n * processes for n in (bs // processes, bs // processes + 1) if n]
        raise ValueError(
            f"--bs {bs} captions cannot be shared out evenly over {processes} processes; "
            f"{' or '.join(map(str, fitting))} can"
        )
    if records < processes:
        raise ValueError(f"{processes} processes and only {records} captions; start at most {records}")
