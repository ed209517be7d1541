"""Annotations: every common format of image-caption pairs, read into one list of records; and where images lie.

A record is a dict with `image_id`, `caption`, and `file_name` where the format gives one; other keys of a
predecessor's or COCO annotation are kept.
"""

import csv
import json
import os
import re
from pathlib import Path

from features.listing import list_images
from utils.files import read_json

# COCO_val2014_000000060623.jpg, 000000060623.jpg (COCO 2017), 215268662.jpg (NICE)
NUMBERED = re.compile(r"(?:COCO_[A-Za-z]+\d{4}_)?0*(\d+)")
FORMATS = (
    "[{image_id, caption}], {image_id: caption}, COCO captions_*.json, Karpathy dataset_*.json, or CSV, TSV, JSONL "
    "with image,caption or the NICE challenge's public_id,caption_gt"
)
NICE = {"public_id": "image_id", "caption_gt": "caption"}  # its names -> ours


def image_id_of(path):
    """Return the number that ends a COCO- or NICE-style file name, else the name without extension."""
    stem = Path(path).stem
    number = NUMBERED.fullmatch(stem)
    return int(number[1]) if number else stem


def normal_id(image_id):
    """Return an image id as a number where it is one, so that "60623", "000000060623" and 60623 are equal."""
    text = str(image_id).strip()
    return int(text) if text.isascii() and text.isdigit() else text


def read_annotations(path, split="train"):
    """Read image-caption pairs.

    Args:
        path: file of one of the formats above, told apart by content, or by extension for CSV, TSV and JSONL.
        split: of a Karpathy file; `train` includes `restval`, as in the field. Other formats have no splits.
    Returns: list of records.
    Raises: FileNotFoundError; ValueError naming the malformed record or the missing split.
    """
    records = []
    for place, record, error in read_places(path, split):
        if error:
            raise ValueError(f"{path}, {place} {error}")
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no captions")
    return records


def read_places(path, split="train"):
    """Read image-caption pairs, bad ones too; arguments as those of `read_annotations`.

    Yields: (where it is, "record 3" or "line 4"; the record; None or what is wrong with it).
    Raises: FileNotFoundError; ValueError where the file as a whole cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"annotations {path} do not exist; pass --annotations FILE")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        places = _read_table(path, "\t" if suffix == ".tsv" else ",")
    elif suffix in (".jsonl", ".ndjson"):
        places = _read_lines(path)
    else:
        places = _read_json(path, split)
    for place, record in places:
        yield place, record, _error(record)


def _error(record):
    """Return what is wrong with a record, or None; a record that could not be read is a ValueError that says so."""
    if isinstance(record, ValueError):
        return str(record)
    if not isinstance(record, dict):
        return f"is no object with image_id and caption: {str(record)[:60]!r}"
    for key in ("image_id", "caption"):
        if key not in record:
            return f"has no {key!r}: {json.dumps(record)[:120]}"
    if not isinstance(record["image_id"], str | int) or not str(record["image_id"]).strip():
        return f"has image_id {record['image_id']!r}, which is neither a number nor a name"
    if not isinstance(record["caption"], str):
        return f"has the caption {record['caption']!r}, which is not text"
    return None


def _read_table(path, delimiter):
    """Read a table with columns `image` or `image_id`, and `caption`; others are kept."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            columns = reader.fieldnames or []
            known = {NICE.get(name, name) for name in columns}
            if "caption" not in known or not {"image", "image_id"} & known:
                raise ValueError(f"{path} has columns {', '.join(columns) or 'none'}; it needs image and caption")
            for row in reader:
                if None in row or None in row.values():
                    row = ValueError(f"has not {len(columns)} fields like the header: quote the caption")
                yield f"line {reader.line_num}", _from_row(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {reader.line_num + 1}: {error}") from None


def _read_lines(path):
    """Read one JSON object a line, with `image` and `caption`."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = ValueError(f"is not valid JSON: {error.msg}")
        yield f"line {number}", _from_row(row)


def _from_row(row):
    """Return a record for a row that names its image's file or is of the NICE challenge; others stay as they are."""
    if not isinstance(row, dict) or not {"image", "public_id"} & row.keys():
        return row
    row = {NICE.get(name, name): value for name, value in row.items()}
    if "image" not in row:
        return row
    file_name = str(row.pop("image") or "")
    return {"image_id": image_id_of(file_name) if file_name else "", "file_name": file_name, **row}


def _read_json(path, split):
    """Read a JSON file of any format above."""
    value = read_json(path)
    if isinstance(value, list):
        records = map(_from_row, value)
    elif isinstance(value, dict) and "annotations" in value:
        records = _read_coco(value, path)
    elif isinstance(value, dict) and "images" in value:
        yield from _read_karpathy(value, path, split)
        return
    elif isinstance(value, dict) and isinstance(next(iter(value.values()), None), str):
        # parsed again as pairs, for an id given twice must not be lost
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
        records = ({"image_id": image_id, "caption": caption} for image_id, caption in pairs)
    else:
        raise ValueError(f"{path} is none of the formats that are read: {FORMATS}")
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


def _read_coco(value, path):
    """Read COCO's own format; an image's file name and nocaps' domain are added to its captions."""
    images = value.get("images", [])
    if not isinstance(images, list) or not isinstance(value["annotations"], list):
        raise ValueError(f"{path}: 'images' and 'annotations' must be lists")
    told = {
        normal_id(image.get("id", "")): {key: image[key] for key in ("file_name", "domain") if image.get(key)}
        for image in images
        if isinstance(image, dict)
    }
    for annotation in value["annotations"]:
        known = isinstance(annotation, dict) and told.get(normal_id(annotation.get("image_id", "")))
        yield {**annotation, **known} if known else annotation


def _read_karpathy(value, path, split):
    """Read one split of Karpathy's format."""
    wanted, found = {"train", "restval"} if split == "train" else {split}, set()
    for number, image in enumerate(value["images"], 1):
        try:
            found.add(image["split"])
            if image["split"] not in wanted:
                continue
            image_id = image["cocoid"] if "cocoid" in image else image_id_of(image["filename"])
            name = os.path.join(image.get("filepath", ""), image["filename"])
            captions = [sentence["raw"] for sentence in image["sentences"]]
        except (KeyError, TypeError) as error:
            yield f"image {number}", ValueError(f"lacks {error}: {json.dumps(image)[:120]}")
            continue
        for caption in captions:
            yield f"image {number}", {"image_id": image_id, "caption": caption, "file_name": name}
    if not wanted & found:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(sorted(found))}: pass one as --split")


class ImageFinder:
    """Finds a record's image file by its name, or by its id, in several folders."""

    def __init__(self, folders, annotations=None):
        """List the folders once.

        Args:
            folders: searched in this order.
            annotations: file beside which relative names are searched too.
        Raises: FileNotFoundError where none of the folders exists.
        """
        self.folders = [Path(folder) for folder in folders if Path(folder).is_dir()]
        if not self.folders:
            raise FileNotFoundError(
                f"no image folder: {', '.join(map(str, folders))} do not exist; pass --images FOLDER"
            )
        self.beside = [Path(annotations).parent] if annotations else []
        self.by_id = {}
        for folder in self.folders:
            for path in list_images(folder):
                self.by_id.setdefault(image_id_of(path), path)

    def find(self, record):
        """Return the record's image file, or None where there is none."""
        name = record.get("file_name")
        if name:
            for folder in (*self.folders, *self.beside):
                for candidate in (folder / name, folder / Path(name).name):
                    if candidate.is_file():
                        return candidate
        return self.by_id.get(normal_id(record["image_id"]))
