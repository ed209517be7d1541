"""What a feature store is made of: images with their captions, pictures alone, or captions alone."""

from pathlib import Path

from features.annotations import read_places
from features.finder import ImageFinder, match_images
from features.listing import find_images as find_pictures
from features.results import name_pictures
from features.sources import FoundPictures, KeyedCaptions, Tars
from features.tars import expand_tars, names_tars
from features.texts import find_sentences
from utils.files import sha256

ANNOTATIONS = "data/coco/annotations/train_caption.json"
IMAGES = ["data/coco/train2014", "data/coco/val2014"]


def fill_inputs(args):
    """Set the defaults of --annotations and --images; None for what the command does not read.

    Raises: ValueError for a flag that the command would not read; FileNotFoundError where no annotations are named and
        COCO's default file does not exist.
    """
    for alone, unread in (("no_captions", "annotations"), ("text_only", "images")):
        if getattr(args, alone):
            other = f"--{unread}" if getattr(args, unread) else "--check, which looks for images,"
            if getattr(args, unread) or args.check:
                raise ValueError(f"--{alone} and {other} contradict each other; leave out one")
    args.images = None if args.text_only else args.images or IMAGES
    in_tars = bool(args.images) and any(map(names_tars, args.images))  # then the tars' own captions are the default
    args.annotations = None if args.no_captions else args.annotations or (None if in_tars else ANNOTATIONS)
    if args.annotations == ANNOTATIONS and not Path(ANNOTATIONS).exists():
        raise FileNotFoundError(
            f"{ANNOTATIONS} does not exist: data/README.md says where COCO's files go; for captions of your own pass "
            f"--annotations FILE{'' if args.text_only else ' and --images FOLDER'}"
        )


def gather(args):
    """Return the Source that the command line names."""
    tars = tar_source(args)
    if tars:
        return tars
    if args.no_captions:
        return FoundPictures(name_pictures(find_pictures(args.images)), {})
    if args.text_only:
        return FoundPictures(*find_sentences(args.annotations, args.split, args.strict))
    places = read_places(args.annotations, args.split)
    return FoundPictures(*find_images(places, ImageFinder(args.images, args.annotations), args.strict))


def tar_source(args):
    """Return the Source of --images' tars, or None where it names none."""
    if not args.images or not any(map(names_tars, args.images)):
        return None
    paths = expand_tars(args.images)
    if args.no_captions:
        return Tars(paths, False)
    if not args.annotations:
        return Tars(paths)
    places = read_places(args.annotations, args.split)
    bad = {place: error for place, _, error in places if error}
    if bad and args.strict:
        place, error = next(iter(bad.items()))
        raise ValueError(f"{args.annotations}, {place} {error}; mend it, or leave out --strict")
    records = [record for _, record, error in places if not error]
    source = Tars(paths, KeyedCaptions(records, [sha256(args.annotations), args.split]))
    source.skipped = bad
    return source


def find_images(places, finder, strict):
    """Locate the image of every record that `--check` finds no fault in.

    Args:
        places: as `read_places` returns them.
    Returns: ({image file: its records}, {image file, id or place: why it is skipped}).
    Raises: ValueError where one is skipped and `strict` is set, all are skipped, or all captions are empty.
    """
    found, skipped = {}, {place: error for place, _, error in places if error}
    records = [record for _, record, error in places if not error]
    for record, (path, reason) in zip(records, match_images(records, finder), strict=True):
        if reason:
            skipped[str(record.get("file_name") or path or record["image_id"])] = reason
        else:
            found.setdefault(path, []).append(record)
    if found and not any(record["caption"].strip() for same in found.values() for record in same):
        raise ValueError(f"all {sum(map(len, found.values())):,} captions are empty; see --check")
    if skipped and (strict or not found):
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{len(skipped)} of {len(skipped) + len(found)} images cannot be used, {name} the first ({reason}), in "
            f"{', '.join(map(str, finder.folders))}; see --check, pass the right --images"
            f"{', or leave out --strict' * bool(found)}"
        )
    return found, skipped
