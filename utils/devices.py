"""Which devices a command runs on, and how a language model's layers are split over several."""

import ctypes
import os
import sys

import torch

from utils.cli import note
from utils.files import reason

ALLOCATION = ("out of memory", "can't allocate memory", "alloc_cpu")  # what torch's RuntimeErrors say
TUNED = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # how users set glibc's allocator
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of its malloc.h
KERNELS_KEPT = 64  # oneDNN kernels, each for one number of rows; by default two caches keep 1,024


def is_out_of_memory(error):
    """Tell whether an error says that memory ran out, a device's or this machine's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION)


def keep_few_kernels():
    """Bound the kernels that a long-running process caches for each number of rows it meets: else hundreds of MB.

    Has an effect only before the first computation, and where the user has not set the variables.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # the second is torch's own
        os.environ.setdefault(name, str(KERNELS_KEPT))


def keep_freed_memory():
    """Let glibc keep what large tensors are freed of for the next ones, where the user has not set its allocator.

    It gives every tensor above 32 MiB back to the system, which fills its pages with zeros when the next asks for them.
    Measured in training GPT-2 124M: a step of 280,000 page faults has 60,000, and takes 3 to 20 % less; up to 12 % more
    memory is held.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and not any(name in os.environ for name in TUNED):  # musl has none
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)  # the most it takes


def pick_device(name=None):
    """Return the torch device called `name`, or the best one there is.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, `mps`, ...; None picks CUDA, then MPS, then the CPU.
    Raises: ValueError where the device does not exist here.
    """
    if name is None:
        mps = getattr(torch.backends, "mps", None)
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":  # by count: a tensor would make each of torchrun's processes open a context on GPU 0
            if (device.index or 0) >= torch.cuda.device_count():
                raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs")
            torch.set_float32_matmul_precision("high")  # TF32, for every command: matmuls times faster
        else:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} is not here ({reason(error)}); leave the flag out or use cpu") from None
    return device


def pick_devices(text=None):
    """Return the torch devices that --device names.

    Args:
        text: a torch device, or GPU numbers written together as the predecessors do (`12`: GPUs 1 and 2); None: the
            best one there is. Where there is no GPU at all, GPU numbers fall back to the CPU, with a warning.
    Raises: ValueError where a device does not exist here or is named twice.
    """
    if not text or not text.isdigit():
        return [pick_device(text or None)]
    if not torch.cuda.is_available():
        note(f"warning: --device {text} names GPUs and there is none here; going on with the CPU")
        return [torch.device("cpu")]
    there = torch.cuda.device_count()
    missing = [number for number in text if int(number) >= there]
    if missing or len(set(text)) < len(text):
        raise ValueError(
            f"--device {text}: {f'GPU {missing[0]} does not exist' if missing else 'a GPU is named twice'}; "
            f"there are GPUs 0 to {there - 1}"
        )
    return [torch.device("cuda", int(number)) for number in text]


def layer_cuts(pn, num_devices, num_layers):
    """Return the layers at which the next device begins.

    Args:
        pn: the flag: `6` for two devices, `411` (4 and 11) or `1122` (11 and 22) for three; None: evenly.
        num_devices: devices to split over.
        num_layers: decoder layers of the language model.
    Returns: num_devices - 1 numbers.
    Raises: ValueError where the flag does not fit, with one that would.
    Source: Jhryu30/cvpr2023_challenge_clipcap train_OPT.py `make_device_pn`.
    """
    if num_devices > num_layers:
        raise ValueError(f"{num_layers} layers cannot be split over {num_devices} devices; name at most {num_layers}")
    even = [num_layers * i // num_devices for i in range(1, num_devices)]
    if pn is None:
        return even
    fitting = "".join(map(str, even)) if num_devices in (2, 3) else "no --pn"
    if not pn.isdigit() or num_devices not in (2, 3) or (num_devices == 3 and len(pn) not in (2, 3, 4)):
        raise ValueError(f"--pn {pn} does not split {num_layers} layers over {num_devices} devices; {fitting} would")
    cuts = [int(pn)] if num_devices == 2 else [int(pn[: len(pn) // 2]), int(pn[len(pn) // 2 :])]
    if not all(low < high for low, high in zip([0, *cuts], [*cuts, num_layers], strict=True)):
        raise ValueError(
            f"--pn {pn} cuts at {' and '.join(map(str, cuts))}, which does not split {num_layers} layers over "
            f"{num_devices} devices; {fitting} would"
        )
    return cuts


def split_devices(devices, pn, num_layers):
    """Return the device of every decoder layer.

    Args:
        devices: as `pick_devices` returns them.
        pn: the flag, checked also where everything is on one CPU.
        num_layers: decoder layers.
    Raises: ValueError where --pn does not fit.
    """
    if len(devices) == 1 and pn is not None:
        layer_cuts(pn, 3 if len(pn) > 2 else 2, num_layers)
        note(f"--pn {pn}: there is one device, {devices[0]}; all layers are on it")
        return devices * num_layers
    cuts = [0, *layer_cuts(pn, len(devices), num_layers), num_layers]
    return [device for device, low, high in zip(devices, cuts, cuts[1:], strict=False) for _ in range(low, high)]
