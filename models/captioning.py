"""What predict.py does once its command line is right: captions of pictures to the terminal, and to a file."""

import contextlib
import sys

from features.listing import as_line
from features.loader import prepare_readers
from features.results import name_shared, record, shared_ids, write_part, write_results
from models.captioner import captioner_of
from utils.cli import note, progress_bar
from utils.outputs import lock


def caption_pictures(args, decoding, paths, unreadable, batch_size):
    """Caption pictures, print each caption as soon as it is made, and write all to --out.

    Args:
        args: the command line of predict.py.
        decoding: DecodingConfig.
        paths: the pictures.
        unreadable: {name: why it is left out} of pictures that will not be captioned.
        batch_size: pictures at a time.
    Returns: the exit status: 2 where one could not be read.
    """
    results, total = {}, len(paths) + len(unreadable)
    for name, reason in unreadable.items():
        note(f"skipped {as_line(name)}: {reason}")
    with results_kept(args, paths, results):
        workers = 0 if len(paths) <= batch_size else args.num_workers
        prepare_readers(len(paths), workers)
        captioner = captioner_of(args, repack=len(paths) * decoding.rows > 1)
        unreadable = unreadable | caption_all(captioner, paths, decoding, batch_size, workers, results)
    if unreadable:
        others = "; the others are captioned" if results else ""
        note(f"error: {len(unreadable)} of {total} images could not be read{others}")
        return 2
    return 0


def caption_all(captioner, paths, decoding, batch_size, num_workers, results):
    """Caption files, printing each as it is done.

    Args:
        results: {path: result in COCO's format} that each image is added to.
    Returns: {path: why it could not be read}.
    """
    unreadable = {}
    with progress_bar(len(paths), "images", "img") as bar:
        for captions, errors in captioner.caption_files(paths, decoding, batch_size, num_workers):
            results |= {path: record(path, group) for path, group in captions.items()}  # kept if printing fails
            for path, group in captions.items():
                for caption in group:
                    bar.write(f"{as_line(path)}\t{' '.join(caption.text.split())}")
            sys.stdout.flush()  # a pipe's reader waits for whole batches only
            for path, reason in errors.items():
                note(f"skipped {as_line(path)}: {reason}")
            unreadable |= errors
            bar.update(len(captions) + len(errors))
    return unreadable


@contextlib.contextmanager
def results_kept(args, paths, results):
    """Lock --out while the body runs, then write the results; if the run is stopped, those so far.

    Raises: what the body raises; KeyboardInterrupt says how many images are captioned.
    """
    shared = shared_ids(paths) if args.out else {}
    if shared:
        number = sum(map(len, shared.values()))
        note(
            f"warning: {number:,} images share an image_id with another ({name_shared(shared)}), and evaluate.py "
            "takes one caption per id; rename the files"
        )
    with lock(args.out) if args.out else contextlib.nullcontext():
        try:
            yield
            if results and args.out:
                write_results(args.out, results, shared)
        except (KeyboardInterrupt, Exception) as stop:
            said = f"{len(results)} of {len(paths)} images are captioned"
            if results and args.out:
                said += f", in {write_part(args.out, results, shared)}"
            if isinstance(stop, KeyboardInterrupt):
                raise KeyboardInterrupt(said) from None
            if results:
                note(f"warning: {said}")
            raise
