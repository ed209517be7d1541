"""Captions and references for scoring, from files of every format, .gz too."""

import collections
from dataclasses import dataclass, field
from pathlib import Path

from features.annotations import distinct_ids, id_of_name, image_id_of, normal_id, read_annotations

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
        images: {image id: image file or None}, a cache of `find_image`.
    """

    captions: dict
    names: dict
    domains: dict
    images: dict = field(default_factory=dict)

    def find_image(self, finder, image_id):
        """Return an image's file, or None where not exactly one matches; `finder` is the same ImageFinder each time."""
        if not self.images:
            records = [{"image_id": i, "file_name": self.names.get(i)} for i in self.captions]
            self.images.update(zip(self.captions, (path for path, _ in finder.find_all(records)), strict=True))
        return self.images.get(image_id)


def read_records(path, split):
    """Read records from a file of any format that `read_annotations` knows, each `image_id` as `distinct_ids` gives it.

    Args:
        path: file, .gz too.
        split: of a Karpathy file.
    Raises: FileNotFoundError; ValueError naming file and record, or an incomplete split of dataset_coco.json.
    """
    records = read_annotations(path, split)
    ids = distinct_ids(record["image_id"] for record in records)
    records = [{**record, "image_id": ids[str(record["image_id"]).strip()]} for record in records]
    if Path(path).name.removesuffix(".gz") == "dataset_coco.json" and split in KARPATHY_COCO:
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
        references: References; an id that they lack but that names one of their images becomes that image's id.
    Raises: ValueError naming images with two captions.
    """
    named_so = collections.defaultdict(list)
    for image_id, name in references.names.items():
        named_so[id_of_name(name)].append(image_id)
    ids = {image_id: same[0] for image_id, same in named_so.items() if len(same) == 1}
    pairs = []
    for record in read_annotations(path, split):
        text, image_id = str(record["image_id"]).strip(), normal_id(record["image_id"])
        # "007" is 7, unless the references have both; a path as id, where images share a name, also matches by name
        own = (text, image_id, *([image_id_of(text)] if text == record.get("file_name") else []))
        known = next((i for i in own if i in references.captions), ids.get(image_id, image_id))
        pairs.append((known, record["caption"]))
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
