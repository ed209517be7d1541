"""Image files -> batches of preprocessed pixels, read by worker processes while the encoder runs.

Axes: B batch, R input resolution.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver, resource_tracker

import torch
from torch.utils.data import DataLoader, Dataset

from features.images import ImageError, max_pixels, read_image, set_max_pixels
from features.tars import TarMember

FEW = 128  # images for which workers that are not forked take longer to start (seconds) than they save
NEEDED = ["features.loader", "torchvision.transforms"]  # what workers need, imported once for all of them
KILLED = (
    "a process that reads images was killed, most likely for want of memory (or of /dev/shm); pass a smaller "
    "--num_workers, 0 for none, or a smaller --batch_size"
)


def slices(number, size):
    """Return `number` indices in batches of `size`."""
    return [range(number)[start : start + size] for start in range(0, number, size)]


def image_loader(paths, preprocess, batches, num_workers, pin_memory=False, collate=None):
    """Read batches of `ImageFiles`.

    Args:
        paths, preprocess: see `ImageFiles`.
        batches: lists of indices into `paths`, or of pictures where `paths` is None; consumed as they are read.
        num_workers: processes that read; with up to FEW images, and where a fork is not safe, this process reads.
        pin_memory: as torch's DataLoader.
        collate: joins a batch, `collate_images` unless given.
    Yields: what `collate` returns, batch by batch.
    Raises: ChildProcessError where a reading process has been killed.
    """
    method = start_method()
    first, batches = [], iter(batches)
    while num_workers and (len(first) < num_workers or sum(map(len, first)) <= FEW):
        batch = next(batches, None)
        if batch is None:
            break
        first.append(batch)
    workers = min(num_workers, len(first)) if method == "fork" or sum(map(len, first)) > FEW else 0
    loader = DataLoader(
        ImageFiles(paths, preprocess),
        batch_sampler=itertools.chain(first, batches),
        num_workers=workers,
        collate_fn=collate or collate_images,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(_prepare_reader, max_pixels()),
        multiprocessing_context=method if workers else None,
    )
    with _starting() if workers else contextlib.nullcontext():
        iterator = iter(loader)
    try:
        for batch in iterator:
            yield batch
            if workers and _helper_was_killed():
                raise ChildProcessError(KILLED)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(KILLED) from None


def encode_files(encoder, paths, batches=64, num_workers=0):
    """Embed image files, in order.

    Args:
        encoder: ImageEncoder.
        paths: image files; None where `batches` hold the pictures themselves.
        batches: lists of indices into `paths`, or of pictures, one per call of the encoder, consumed as they are read;
            or the batch size.
        num_workers: processes that read and preprocess images.
    Yields: per batch (its indices or pictures, [B, *shape] float32 embeddings, {index or picture: why it could not be
        read}).
    """
    if isinstance(batches, int):
        batches = slices(len(paths), batches)
    pin_memory = encoder.device.type == "cuda"
    for indices, pixels, errors in image_loader(paths, encoder.preprocess, batches, num_workers, pin_memory):
        yield indices, encoder.encode_images(pixels), errors


def start_method():
    """Return how processes are started: "fork" where this one runs no other thread, for it is the quickest.

    A forked child inherits locks that other threads hold, and nobody releases them. With other threads, workers are
    therefore forked from a server without threads or, on systems whose libraries do not survive a fork, spawned.
    """
    tasks = "/proc/self/task"
    if os.path.isdir(tasks) and len(os.listdir(tasks)) == 1:
        return "fork"
    return "forkserver" if sys.platform == "linux" else "spawn"


def prepare_readers(images, num_workers):
    """Start the server that workers are forked from, where one will be needed.

    It imports what they need, which takes seconds, while the command loads its models.

    Args:
        images: how many will be read, or None.
        num_workers: processes that will read them.
    """
    threads = torch.get_num_threads() > 1 or start_method() != "fork"  # torch starts its own at the first large op
    if num_workers and (images is None or images > FEW) and threads and sys.platform == "linux":
        with _starting():
            forkserver.ensure_running()


@contextlib.contextmanager
def _starting():
    """Let the body start processes that Ctrl-C does not reach, and that import no more than they need.

    multiprocessing would import the command's script, hence every library it uses, in each of them; numpy's BLAS would
    start threads in the server that they are forked from.
    """
    main, threads = sys.modules["__main__"], "OPENBLAS_NUM_THREADS"
    hidden = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    given = os.environ.get(threads)
    handled = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGCHLD") if handled and hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    if handled:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, so that it holds while they import
    multiprocessing.set_forkserver_preload(NEEDED)
    os.environ[threads] = "1"
    main.__spec__ = None
    vars(main).pop("__file__", None)
    try:
        yield
    finally:
        vars(main).update(hidden)
        os.environ.pop(threads) if given is None else os.environ.update({threads: given})
        for number, handler in before.items():
            # torch's own handler of SIGCHLD would raise wherever the command happens to be
            signal.signal(number, handler)


def _prepare_reader(limit, _worker):
    """Set up a worker: Ctrl-C is left to the parent, SIGTERM ends it, its pixel limit is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    set_max_pixels(limit)


def _helper_was_killed():
    """Tell whether a child process has been killed: multiprocessing's own helpers too, which torch does not watch."""
    if not hasattr(os, "waitid"):
        return False
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there is none
        return False
    if ended is None or ended.si_code != os.CLD_KILLED or ended.si_status != signal.SIGKILL:
        return False
    if ended.si_pid == getattr(resource_tracker._resource_tracker, "_pid", None):
        # else a new tracker would be started, and complain about resources that it never registered
        resource_tracker.unregister = lambda name, kind: None
    return True


class ImageFiles(Dataset):
    """Image files, preprocessed for the encoder."""

    def __init__(self, paths, preprocess):
        self.paths, self.preprocess = paths and [_small(path) for path in paths], preprocess

    def __getitem__(self, index):
        """Return (index, [3, R, R] pixels, None), or (index, None, why the file could not be read).

        Where there are no `paths`, `index` is the picture itself.
        """
        picture = index if self.paths is None else self.paths[index]
        try:
            return index, self.preprocess(read_image(picture)), None
        except ImageError as error:
            return index, None, str(error)


def _small(path):
    """Return a path as text, which is quicker to send to processes that read; a TarMember as it is."""
    return path if isinstance(path, TarMember) else str(path)


def collate_images(samples):
    """Stack the readable samples: (indices, [B, 3, R, R], {index: reason} of the others)."""
    good = [(index, pixels) for index, pixels, _ in samples if pixels is not None]
    errors = {index: reason for index, _, reason in samples if reason is not None}
    indices = [index for index, _ in good]
    return indices, torch.stack([pixels for _, pixels in good]) if good else torch.empty(0), errors
