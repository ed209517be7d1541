"""Flags that several commands share, and their values."""

from dataclasses import dataclass

from utils.cli import positive_int

DTYPES = ("auto", "fp32", "bf16", "int8")  # of --dtype
MAX_PIXELS = 178_956_970  # of an image; Pillow itself refuses more


def add_dtype_flag(parser):
    """Add --dtype."""
    parser.add_argument(
        "--dtype", choices=DTYPES,
        help="dtype to compute in: auto is bf16 where the device has it, int8 is for CPUs and rounds over the "
        "batch, so that an image's result depends a little on what shares its batch (default: fp32, but CLIP's own "
        "fp16 on a GPU)",
    )  # fmt: skip


def add_max_pixels_flag(parser):
    """Add the flag --max_pixels."""
    parser.add_argument(
        "--max_pixels", type=positive_int, default=MAX_PIXELS, help="pixels of an image; larger ones are skipped"
    )


def add_device_flags(parser):
    """Add --device and --pn to a command's parser."""
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--device", nargs="?", help="torch device, or GPU numbers: 12 is GPUs 1 and 2 (default: a GPU if there is one)"
    )
    group.add_argument(
        "--pn", metavar="CUTS",
        help="decoder layers after which the next GPU begins: 6 for two GPUs, 411 (4 and 11) or 1122 for three "
        "(default: evenly); auto: fill the GPUs, then main memory, then --offload_dir",
    )  # fmt: skip
    group.add_argument("--offload_dir", metavar="DIR", help="with --pn auto: keep here what does not fit in memory")
    group.add_argument(
        "--max_memory", metavar="SIZE",
        help="with --pn auto: what weights may take of each device, such as 14GB (default: nearly all that is free)",
    )  # fmt: skip


@dataclass
class Placement:
    """Where a captioner's weights lie, and what is kept for the backward pass.

    Args:
        devices: as `pick_devices` returns them.
        pn: the flag; None: decoder layers are split evenly over the devices.
        offload_dir, max_memory: the flags, for `pn` auto.
        fsdp: shard the weights over the processes.
        gradient_checkpointing: keep only the decoder layers' inputs for the backward pass.
    """

    devices: list
    pn: str | None = None
    offload_dir: str | None = None
    max_memory: str | None = None
    fsdp: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self):
        check_offloading(self)


def check_offloading(flags):
    """Refuse --offload_dir and --max_memory without --pn auto.

    Args:
        flags: the command line, or a Placement.
    Raises: ValueError.
    """
    for flag in ("offload_dir", "max_memory"):
        if getattr(flags, flag) and flags.pn != "auto":
            raise ValueError(f"--{flag} goes with --pn auto; add it, or leave --{flag} out")
