"""What is scored: captions and references from files of every format, .gz too."""

import collections
import contextlib
import gzip
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from features.annotations import image_id_of, normal_id, read_annotations

# Images of dataset_coco.json; train includes restval.
KARPATHY_COCO = {"train": 113287, "val": 5000, "test": 5000}
NAMED = 5  # examples in an error


@dataclass
class References:
    """References of images.

    Args:
        captions: {image id: [caption, ...]}.
        names: {image id: file name}, where the file tells it.
        domains: {image id: "in-domain", "near-domain" or "out-domain"} of nocaps, else {}.
    """

    captions: dict
    names: dict
    domains: dict

    def find_image(self, finder, image_id):
        """Return an image's file by an ImageFinder, or None."""
        return finder.find({"image_id": image_id, "file_name": self.names.get(image_id)})


@contextlib.contextmanager
def unzipped(path):
    """Yield the path of a plain file: `path`, or what the .gz file `path` holds.

    Raises: FileNotFoundError; ValueError for a damaged .gz file; other ValueErrors name the .gz file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix.lower() != ".gz":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, path.stem)
        try:
            with gzip.open(path) as source, open(plain, "wb") as target:
                shutil.copyfileobj(source, target)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no complete gzip file ({error}); fetch it again") from None
        try:
            yield plain
        except ValueError as error:
            raise ValueError(str(error).replace(str(plain), str(path))) from None


def read_records(path, split):
    """Read records with a normal `image_id` from a file of any format that `read_annotations` knows.

    Args:
        path: file, .gz too.
        split: of a Karpathy file.
    Raises: FileNotFoundError; ValueError naming file and record, or a split of dataset_coco.json that is not whole.
    """
    with unzipped(path) as plain:
        records = [{**record, "image_id": normal_id(record["image_id"])} for record in read_annotations(plain, split)]
    if plain.name == "dataset_coco.json" and split in KARPATHY_COCO:
        images = len({record["image_id"] for record in records})
        if images != KARPATHY_COCO[split]:
            raise ValueError(
                f"{path} has {images:,} images in split {split}, not {KARPATHY_COCO[split]:,}: it is not Karpathy's "
                "whole file; fetch it again, or give a part of it another name"
            )
    return records


def read_captions(path, references, split):
    """Read one caption per image as {image id: caption}.

    Args:
        references: References; an id that is not theirs but the name of one of their images becomes that image's.
    Raises: ValueError naming images with two captions.
    """
    ids = {image_id_of(name): image_id for image_id, name in references.names.items()}
    pairs = [(record["image_id"], record["caption"]) for record in read_records(path, split)]
    pairs = [(i if i in references.captions else ids.get(i, i), caption) for i, caption in pairs]
    twice = [image_id for image_id, count in collections.Counter(i for i, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(
            f"{path} has several captions for {len(twice):,} images ({named(twice)}); keep one caption per image"
        )
    return dict(pairs)


def read_references(path, split):
    """Read References.

    Raises: ValueError naming images with an empty reference.
    """
    references = References(collections.defaultdict(list), {}, {})
    for record in read_records(path, split):
        image_id = record["image_id"]
        references.captions[image_id].append(record["caption"])
        if record.get("file_name"):
            references.names[image_id] = record["file_name"]
        if record.get("domain"):
            references.domains[image_id] = record["domain"]
    empty = [image_id for image_id, texts in references.captions.items() if not all(text.strip() for text in texts)]
    if empty:
        raise ValueError(f"{path} has empty references for {len(empty):,} images ({named(empty)}); remove them")
    return references


def named(image_ids):
    """Name some images: "image_id 1, 2, 3, ..."."""
    return f"image_id {', '.join(str(i) for i in image_ids[:NAMED])}{', ...' if len(image_ids) > NAMED else ''}"
