"""Annotations: every common format of image-caption pairs, read into one list of records.

A record is a dict with `image_id`, `caption`, and `file_name` where the format gives one; other keys of a
predecessor's or COCO annotation are kept.
"""

import collections
import functools
import json
import os
import re
import unicodedata
from pathlib import Path

from features.listing import IMAGE_SUFFIXES
from features.tables import NoHeaderError, read_json_lines, read_table, read_text, undecoded

# COCO_val2014_000000060623.jpg, 000000060623.jpg (COCO 2017), 215268662.jpg (NICE)
NUMBERED = re.compile(r"(?:COCO_[A-Za-z]+[0-9]{4}_)?([0-9]+)")
LARGEST_ID = 2**63 - 1  # largest that an int64 column holds; a larger id stays text
# 1.0 or 1.23457E+11 in a table: a whole number that pandas or a spreadsheet has turned into a decimal one
DECIMAL = re.compile(r"[0-9]+\.0+|[0-9](?:\.[0-9]+)?[eE]\+[0-9]+")
WRITTEN_LIST = re.compile(r"""\[(["']).*\1\]""", re.DOTALL)  # how pandas puts a list into a table
FORMATS = (
    "[{image_id or image, caption or [captions]}], {image_id: caption or [captions]}, COCO captions_*.json, Karpathy "
    "dataset_*.json, CSV, TSV or JSONL with image,caption, the NICE challenge's public_id,caption_gt or an image "
    "folder's file_name,text, Flickr8k's and Flickr30k's text files; .gz too"
)
# names of each field, of which the first present counts; `text` and `comment` only beside a file name
FILE_FIELDS = ("image", "file_name", "filename", "filepath", "image_path", "image_name")
ID_FIELDS = ("image_id", "public_id")
CAPTION_FIELDS = ("caption", "caption_gt", "text", "comment")


def image_id_of(path):
    """Return the number that ends a COCO- or NICE-style file name, else the name without extension.

    For file names only: ids may contain a full stop, and go through `normal_id`.
    """
    stem = Path(path).stem
    number = NUMBERED.fullmatch(stem)
    return normal_id(number[1] if number and isinstance(normal_id(number[1]), int) else stem)


def id_of_name(name):
    """Return the `image_id_of` a file name in annotations, which may be separated by backslashes."""
    return image_id_of(name.replace("\\", "/"))


def normal_id(image_id):
    """Return an image id as a number where it is one, so that "60623", "000000060623" and 60623 are equal."""
    if type(image_id) is int and 0 <= image_id <= LARGEST_ID:
        return image_id
    text = unicodedata.normalize("NFC", str(image_id).strip())
    digits = text.lstrip("0") or "0"
    if not (text.isascii() and text.isdigit()) or len(digits) > len(str(LARGEST_ID)) or int(digits) > LARGEST_ID:
        return text
    return int(digits)


def distinct_ids(image_ids):
    """Return {text of an id: the id}: its `normal_id`, or the text unchanged where "7" and "007" both occur."""
    groups = collections.defaultdict(set)
    for text in {str(image_id).strip() for image_id in image_ids}:
        groups[normal_id(text)].add(text)
    return {text: same if len(texts) == 1 else text for same, texts in groups.items() for text in texts}


def read_annotations(path, split="train"):
    """Read image-caption pairs.

    Args:
        path: file of one of the formats above, told apart by content.
        split: of a Karpathy file; `train` includes `restval`, as in the field. Other formats have no splits.
    Returns: list of records.
    Raises: FileNotFoundError; ValueError naming the malformed record or the missing split.
    """
    records = []
    for place, record, error in read_places(path, split):
        if error:
            raise ValueError(f"{path}, {place} {error}")
        records.append(record)
    return records


def read_places(path, split="train"):
    """Read image-caption pairs, bad ones too; arguments as those of `read_annotations`.

    Returns: list of (where it is, "record 3" or "line 4"; the record; None or what is wrong with it).
    Raises: FileNotFoundError; ValueError where the file as a whole cannot be read, or holds no captions.
    """
    text, suffix = read_text(path), Path(str(path).removesuffix(".gz")).suffix.lower()
    try:
        rows = ((place, record) for place, row in _rows(text, suffix, split) for record in _split(row))
        places = [(place, record, _error(record)) for place, record in rows]
    except ValueError as error:
        kind = NoHeaderError if isinstance(error, NoHeaderError) else ValueError
        raise kind(f"{path} {error}") from None
    if not places:
        raise ValueError(f"{path} holds no captions")
    _tell_apart([record for _, record, error in places if not error])
    return places


def _rows(text, suffix, split):
    """Yield (where it is, record as `_from_row` returns it) from a file's text; raises ValueError for a bad file."""
    if text.lstrip()[0] not in "{[" and suffix not in (".json", ".jsonl", ".ndjson"):
        for place, row in read_table(text, suffix, _is_header, _starts_row):
            yield place, _from_row(row, table=True)
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if suffix == ".json" and not _has_json_lines(text):
            place = f" at line {error.lineno}, column {error.colno}" if hasattr(error, "lineno") else ""
            raise ValueError(f"is not valid JSON: {getattr(error, 'msg', error)}{place}") from None
        for place, row in read_json_lines(text):
            yield place, _from_row(row)
        return
    if isinstance(value, dict) and "annotations" not in value and "images" in value:
        yield from _read_karpathy(value, split)
        return
    for number, record in enumerate(_read_value(value, text), 1):
        yield f"record {number}", record


def _has_json_lines(text):
    """Tell whether a file that is no JSON as a whole has an object in one of its first two lines."""
    lines = [line.strip() for line in text.lstrip().split("\n", 2)[:2]]
    return text.lstrip()[0] == "{" and any(line[:1] == "{" and line[-1:] == "}" for line in lines)


def _read_value(value, text):
    """Return the records of a JSON value; `text` is what it was parsed from."""
    if isinstance(value, list):
        return map(_from_row, value)
    if isinstance(value, dict) and "annotations" in value:
        return _read_coco(value)
    if isinstance(value, dict) and any(_fields(tuple(value))[:2]):
        return [_from_row(value)]  # JSON lines, with one line
    pairs = isinstance(value, dict) and not {"caption", "text"} & value.keys()
    if pairs and any(isinstance(captions, str | list) for captions in value.values()):
        # parsed again as pairs, for an id given twice must not be lost
        pairs = json.loads(text, object_pairs_hook=list)
        return ({"image_id": image_id, "caption": captions} for image_id, captions in pairs)
    raise ValueError(f"is none of the formats that are read: {FORMATS}")


@functools.lru_cache(maxsize=64)
def _fields(names):
    """Return which of a row's fields are (file name, image id, caption), each None where there is none.

    Raises: ValueError where a field is there twice.
    """
    known = {}
    for name in names:
        plain = name.strip().casefold()
        if plain in (*FILE_FIELDS, *ID_FIELDS, *CAPTION_FIELDS) and known.setdefault(plain, name) != name:
            raise ValueError(f"has two fields {plain!r}: rename one")
    file_name = next((known[name] for name in FILE_FIELDS if name in known), None)
    captions = CAPTION_FIELDS if file_name else CAPTION_FIELDS[:2]
    return (
        file_name,
        next((known[name] for name in ID_FIELDS if name in known), None),
        next((known[name] for name in captions if name in known), None),
    )


def _is_header(names):
    """Tell whether column names include an image and a caption."""
    file_name, image_id, caption = _fields(tuple(names))
    return bool((file_name or image_id) and caption)


def _starts_row(row):
    """Tell whether a line's values name an image, as a row's do."""
    file_name, image_id, _ = _fields(tuple(row))
    value = row[file_name or image_id].strip()
    return value.isdigit() or bool(file_name) and Path(value).suffix.lower() in IMAGE_SUFFIXES


def _from_row(row, table=False):
    """Return a row as a record with our field names, or a ValueError for a bad one; what is no dict stays unchanged.

    Args:
        row: anything.
        table: whether the row is a table's, whose values are all text.
    """
    if not isinstance(row, dict):
        return row
    try:
        file_field, id_field, caption_field = _fields(tuple(row))
    except ValueError as error:
        return error
    name = row[file_field] if file_field else None
    own = {file_field, id_field, caption_field} - {None}
    record = {} if not id_field else {"image_id": row[id_field]}
    for field in filter(None, (id_field, file_field)) if table else ():
        if DECIMAL.fullmatch(row[field].strip()):
            return ValueError(f"has {field} {row[field]}, a decimal number: save whole numbers, or that column as text")
    if isinstance(name, int) and not isinstance(name, bool):
        record = {"image_id": name} | record
    elif file_field and not isinstance(name or "", str):
        return ValueError(f"has {file_field} {str(name)[:60]!r}, which is no file name")
    elif file_field:
        name = _join(row, file_field, name or "")
        record = {"image_id": id_of_name(name) if name else "", "file_name": name} | record
    if caption_field:
        record["caption"] = row[caption_field]
    return record | {field: value for field, value in row.items() if field not in own and field not in record}


def _join(row, field, name):
    """Return a file name with its folder, where Karpathy's `filepath` beside `filename` gives it."""
    folder = row.get("filepath")
    if field != "filename" or not isinstance(folder, str):
        return name
    return folder if re.split(r"[/\\]", folder)[-1] == name else os.path.join(folder, name)


def _split(record):
    """Return one record per caption: several where the record has a list, as LAVIS and pycocoevalcap write them."""
    captions = record.get("caption") if isinstance(record, dict) else None
    if not isinstance(captions, list):
        return [record]
    if not captions:
        return [ValueError("has an empty list of captions")]
    # where the file was parsed as pairs, an object is a list of pairs
    records = [dict(c) if isinstance(c, list) and all(isinstance(p, tuple) for p in c) else c for c in captions]
    image_id = record.get("image_id")
    if any(isinstance(c, dict) and _is_of_another(c, image_id) for c in records):
        return [ValueError(f"has records of other images under {str(image_id)[:60]!r}: write their list alone")]
    return [{**record, "caption": c["caption"] if isinstance(c, dict) and "caption" in c else c} for c in records]


def _is_of_another(caption, image_id):
    """Tell whether an object in an image's list of captions belongs to another image."""
    file_field, id_field, _ = _fields(tuple(caption))
    name = caption[file_field] if file_field else image_id
    return name != image_id or id_field is not None and normal_id(caption[id_field]) != normal_id(image_id)


def _error(record):
    """Return what is wrong with a record, or None; a record that could not be read is a ValueError that says so."""
    if isinstance(record, ValueError):
        return str(record)
    if not isinstance(record, dict):
        return f"is no object with image_id and caption: {str(record)[:60]!r}"
    for key in ("image_id", "caption"):
        if key not in record:
            return f"has no {key!r}: {json.dumps(record)[:120]}"
    image_id = record["image_id"]
    if isinstance(image_id, bool) or not isinstance(image_id, str | int) or not str(image_id).strip():
        return f"has image_id {image_id!r}, which is neither a number nor a name"
    if not isinstance(record["caption"], str):
        return f"has the caption {record['caption']!r}, which is not text"
    if WRITTEN_LIST.fullmatch(record["caption"].strip()):
        return f"has a list of captions written as text, {record['caption'][:60]}: give each one row"
    if not isinstance(record.get("file_name") or "", str):
        return f"has file_name {str(record['file_name'])[:60]}, which is no name"
    for value in record.values():
        if isinstance(value, str) and not value.isascii() and undecoded(value):
            return undecoded(value)
    return None


def _tell_apart(records):
    """Give images of the same name in different folders their path as id, where the id came from the name."""
    first, shared = {}, set()
    for record in records:
        if isinstance(record["image_id"], int) and abs(record["image_id"]) > LARGEST_ID:
            record["image_id"] = str(record["image_id"])
        name = record.get("file_name")
        if name and first.setdefault(record["image_id"], name) != name:
            shared.add(record["image_id"])
    for record in records:
        name = record.get("file_name")
        if name and record["image_id"] in shared and record["image_id"] == id_of_name(name):
            record["image_id"] = name


def _read_coco(value):
    """Read COCO's own format; an image's file name and nocaps' domain are added to its captions."""
    images, annotations = value.get("images") or [], value["annotations"]
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ValueError("is not COCO's: 'images' and 'annotations' must be lists")
    if not annotations:
        raise ValueError("has images but no captions: 'annotations' is empty")
    if isinstance(annotations[0], dict) and "bbox" in annotations[0] and "caption" not in annotations[0]:
        raise ValueError("holds boxes, not captions: take COCO's captions_*.json")
    images = [image for image in images if isinstance(image, dict) and "id" in image]
    ids, image_records, twice = distinct_ids(image["id"] for image in images), {}, set()
    for image in images:
        image_id = ids[str(image["id"]).strip()]
        own = {key: image[key] for key in ("file_name", "domain") if image.get(key)}
        if image_records.setdefault(image_id, own) != own:
            twice.add(image_id)
    for annotation in annotations:
        if not isinstance(annotation, dict) or "image_id" not in annotation:
            yield annotation
            continue
        text = str(annotation["image_id"]).strip()
        image_id = ids[text] if text in ids else normal_id(text)
        if image_id in twice:
            yield ValueError(f"has image_id {text}, which 'images' has twice, with different files")
        elif image_records and image_id not in image_records:
            yield ValueError(f"has image_id {text}, which is not among 'images'")
        else:
            yield {**annotation, **image_records.get(image_id, {})}


def _read_karpathy(value, split):
    """Read one split of Karpathy's format."""
    wanted, found = {"train", "restval"} if split == "train" else {split}, set()
    images = value["images"] if isinstance(value["images"], list) else []
    if not any(isinstance(image, dict) and {"split", "sentences"} & image.keys() for image in images):
        raise ValueError("has images but no captions: take COCO's captions_*.json or Karpathy's dataset_*.json")
    for number, image in enumerate(images, 1):
        try:
            found.add(image["split"])
            if image["split"] not in wanted:
                continue
            name = os.path.join(image.get("filepath", ""), image["filename"])
            image_id = image["cocoid"] if "cocoid" in image else image_id_of(name)
            captions = [sentence["raw"] for sentence in image["sentences"]]
        except (KeyError, TypeError) as error:
            wrong = f"lacks {error}" if isinstance(error, KeyError) else "is not as Karpathy's"
            yield f"image {number}", ValueError(f"{wrong}: {json.dumps(image)[:120]}")
            continue
        for caption in captions:
            yield f"image {number}", {"image_id": image_id, "caption": caption, "file_name": name}
    if not wanted & found:
        names = ", ".join(sorted(map(str, found)))
        raise ValueError(f"has no split {split!r}; it has {names}: pass one as --split")
