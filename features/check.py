"""Looking over annotations and their images before anything is encoded."""

from features.annotations import image_id_of, read_places
from features.finder import ImageFinder, match_images
from features.loader import image_loader, slices
from utils.cli import note, progress_bar

BATCH = 64  # images handed to a process at once


def find_faults(annotations, split, folders, num_workers=0):
    """Name every record that training would leave out or should not see.

    Args:
        annotations, split: as of `read_annotations`.
        folders: of the images, searched in this order.
        num_workers: processes that read images.
    Returns: (list of (place, image file or id, what is wrong), in the file's order; number of records; of images).
    Raises: FileNotFoundError; ValueError where the annotations as a whole cannot be read.
    """
    finder, read = ImageFinder(folders, annotations), read_places(annotations, split)
    faults = [(number, place, "-", error) for number, (place, _, error) in enumerate(read) if error]
    rows = [(number, place, record) for number, (place, record, error) in enumerate(read) if not error]
    places, captions = {}, {}
    for (number, place, record), (path, reason) in zip(rows, match_images([r for *_, r in rows], finder), strict=True):
        name = str(path or record.get("file_name") or record["image_id"])
        key = (name, record["caption"].strip())
        if path:
            places.setdefault(path, []).append((number, place))
        if reason:
            faults.append((number, place, name, reason))
        if not key[1]:
            faults.append((number, place, name, "the caption is empty"))
        elif captions.setdefault(key, place) != place:
            faults.append((number, place, name, f"the same caption as {captions[key]}"))
    shared = [r["image_id"] for *_, r in rows if r["image_id"] == r.get("file_name") != image_id_of(r["file_name"])]
    if shared:
        note(
            f"warning: {len(set(shared)):,} images share their name with another, such as {shared[0]}; results tell "
            "them by the name alone: better rename them"
        )
    for path, error in _unreadable(list(places), num_workers):
        faults += [(*where, str(path), error) for where in places[path]]
    faults.sort(key=lambda fault: fault[0])
    return [tuple(map(_in_one_line, fault[1:])) for fault in faults], len(read), len(places)


def _in_one_line(text):
    """Return a text in which line breaks, tabs and what cannot be printed are written as Python does."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _unreadable(paths, num_workers):
    """Yield (path, why it cannot be read) of those image files that cannot."""
    with progress_bar(len(paths), "images", "img") as bar:
        for batch in image_loader(paths, _nothing, slices(len(paths), BATCH), num_workers, collate=list):
            yield from ((paths[index], error) for index, _, error in batch if error)
            bar.update(len(batch))


def _nothing(_image):
    """Preprocess an image that need only be readable."""
