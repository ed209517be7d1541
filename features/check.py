"""Looking over annotations and their images before anything is encoded."""

from features.annotations import ImageFinder, normal_id, read_places
from features.loader import image_loader, slices
from utils.cli import progress_bar

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
    finder = ImageFinder(folders, annotations)
    faults, places, captions, ids, number = [], {}, {}, {}, 0
    for number, (place, record, error) in enumerate(read_places(annotations, split), 1):
        if error:
            faults.append((number, place, "-", error))
            continue
        path = finder.find(record)
        name = str(path or record.get("file_name") or record["image_id"])
        key = (name, record["caption"].strip())
        image_id = normal_id(record["image_id"])
        if path is None:
            faults.append((number, place, name, "no such image"))
        else:
            places.setdefault(path, []).append((number, place))
            if ids.setdefault(image_id, path) != path:
                faults.append((number, place, name, f"image_id {image_id} is that of {ids[image_id]} too"))
        if not key[1]:
            faults.append((number, place, name, "the caption is empty"))
        elif captions.setdefault(key, place) != place:
            faults.append((number, place, name, f"the same caption as {captions[key]}"))
    for path, error in _unreadable(list(places), num_workers):
        faults += [(*where, str(path), error) for where in places[path]]
    return [fault[1:] for fault in sorted(faults, key=lambda fault: fault[0])], number, len(places)


def _unreadable(paths, num_workers):
    """Yield (path, why it cannot be read) of those image files that cannot."""
    with progress_bar(len(paths), "images", "img") as bar:
        for batch in image_loader(paths, _nothing, slices(len(paths), BATCH), num_workers, collate=list):
            yield from ((paths[index], error) for index, _, error in batch if error)
            bar.update(len(batch))


def _nothing(_image):
    """Preprocess an image that need only be readable."""
