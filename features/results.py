"""Results of captioning: their image ids, and the files they are written to."""

from pathlib import Path

from features.annotations import image_id_of
from features.listing import as_line, as_text
from utils.files import write_json, write_table


def record(path, captions):
    """Return the result of one image in COCO's result format; several captions are kept beside the best."""
    result = {"image_id": result_id(path), "caption": captions[0].text.strip()}
    if len(captions) > 1:
        result["captions"] = [caption.text.strip() for caption in captions]
    return result


def result_id(path):
    """Return the id of an image's result: a number, or text that can be written."""
    image_id = image_id_of(path)
    return as_text(image_id) if isinstance(image_id, str) else image_id


def shared_ids(paths):
    """Return {image id: image files} for ids that several images share."""
    groups = {}
    for path in paths:
        groups.setdefault(result_id(path), []).append(path)
    return {image_id: group for image_id, group in groups.items() if len(group) > 1}


def name_pictures(paths):
    """Return {image file: [its record, without a caption]}; images that would share an id get their path as id."""
    shared = {path for same in shared_ids(paths).values() for path in same}
    ids = {path: as_text(path) if path in shared else result_id(path) for path in paths}
    return {path: [{"image_id": ids[path], "file_name": as_text(path)}] for path in paths}


def name_shared(groups):
    """Say in a few words which images share an id; argument as `shared_ids` returns it."""
    shown = [f"{image_id}: {', '.join(map(as_line, group[:4]))}" for image_id, group in list(groups.items())[:3]]
    return "; ".join(shown) + "; ..." * (len(groups) > 3)


def write_results(out, results, shared):
    """Write results in the format of the file's ending; where images share an id, results also name the file.

    Args:
        results: {path: result in COCO's format}.
        shared: as `shared_ids` returns it.
    """
    named = ((path, result, result["image_id"] in shared) for path, result in results.items())
    rows = [result | ({"file_name": as_text(path)} if also else {}) for path, result, also in named]
    if is_table(out):
        columns = ("image_id", "caption", "file_name")[: 3 if shared else 2]
        write_table(out, columns, [[row.get(column, "") for column in columns] for row in rows])
    else:
        write_json(out, rows)


def write_part(out, results, shared):
    """Write the results of a stopped run; an existing file, which may be complete, is not overwritten.

    Args:
        out, results, shared: see `write_results`.
    Returns: where they were written.
    """
    part, number = Path(out), 1
    while part.exists():
        part = Path(out).with_suffix(f".partial{number if number > 1 else ''}{Path(out).suffix}")
        number += 1
    write_results(str(part), results, shared)
    return part if number == 1 else f"{part}; {out} stays as it was"


def is_table(out):
    """Tell whether results are written as CSV, one caption per image."""
    return out.lower().endswith(".csv")
