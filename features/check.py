"""Checks of annotations and their images before anything is encoded."""

from features.annotations import image_id_of, read_places
from features.finder import ImageFinder, match_images
from utils.cli import late_imports, note, progress_bar

BATCH = 64  # images handed to a process at once


def find_faults(annotations, split, folders, num_workers=0):
    """Name every record that training would leave out or should not see.

    Args:
        annotations, split: see `read_annotations`.
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


def find_tar_faults(source, num_workers=0):
    """Name everything in tars that training would leave out.

    Args:
        source: Tars.
        num_workers: processes that read images.
    Returns: as `find_faults`; the place is the tar.
    Raises: FileNotFoundError.
    """
    faults, records, images = [("-", name, reason) for name, reason in source.skipped.items()], 0, 0
    for part in source.parts():
        pictures, skipped = part.read()
        records, images = records + sum(map(len, pictures.values())), images + len(pictures)
        faults += [(part.path, name, reason) for name, reason in skipped.items()]
        faults += [(part.path, str(picture), reason) for picture, reason in _unreadable(list(pictures), num_workers)]
        for picture, own in pictures.items():
            empty = sum(not record.get("caption", "-").strip() for record in own)
            faults += [(part.path, str(picture), "the caption is empty")] * empty
    if (source.records or 0) > records:
        faults.append(("-", "-", f"{source.records - records:,} records have no picture in the tars"))
    return [tuple(map(_in_one_line, fault)) for fault in faults], records, images


def _in_one_line(text):
    """Return a text with line breaks, tabs and unprintable characters escaped as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _unreadable(paths, num_workers):
    """Yield (path, why it cannot be read) for every unreadable image file."""
    with late_imports():
        from features.loader import image_loader
    with progress_bar(len(paths), "images", "img") as bar:
        batches = (paths[start : start + BATCH] for start in range(0, len(paths), BATCH))
        for batch in image_loader(None, _nothing, batches, num_workers, collate=list):
            yield from ((path, error) for path, _, error in batch if error)
            bar.update(len(batch))


def _nothing(_image):
    """Preprocess nothing: the image need only be readable."""
