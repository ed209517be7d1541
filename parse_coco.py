"""Extract CLIP features: images + annotations -> feature store.

    python parse_coco.py --clip_model_type ViT-B/32

reads data/coco/annotations/train_caption.json and the images of data/coco/train2014 and val2014, and writes
data/coco/oscar_split_ViT-B_32_train.pkl. Each image is encoded once, however many captions it has. Killed and run
again, it goes on where it was; images that are missing or cannot be read are listed and left out.
"""

import os
from pathlib import Path

import torch
import transformers

from features.annotations import FORMATS, ImageFinder, read_annotations
from features.clip_encoder import ClipEncoder
from features.store import PartialStore, info_path, write_store
from utils.cli import VERSION, Parser, non_negative_int, note, positive_int, progress_bar, run
from utils.devices import pick_device
from utils.files import read_json, sha256

SHOWN = 10  # skipped images that are listed on the terminal; the json beside the store lists all


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--annotations", default="data/coco/annotations/train_caption.json", help=FORMATS)
    data.add_argument(
        "--images", nargs="+", default=["data/coco/train2014", "data/coco/val2014"], metavar="DIR",
        help="folders of images, searched in this order (default: %(default)s)",
    )  # fmt: skip
    data.add_argument("--split", default="train", help="split of a Karpathy file; train includes restval")
    data.add_argument("--out", help="feature store to write (default: data/coco/oscar_split_{model}_{split}.pkl)")
    data.add_argument("--strict", action="store_true", help="stop at the first missing or unreadable image")
    encoder = parser.add_argument_group("encoder")
    encoder.add_argument(
        "--clip_model_type", default="ViT-B/32", help="a name of OpenAI's clip, or the path of a CLIP .pt"
    )
    encoder.add_argument("--batch_size", type=positive_int, default=64, help="images per call of the encoder")
    encoder.add_argument(
        "--num_workers", type=non_negative_int, default=min(8, os.cpu_count() or 1),
        help="processes that decode images (default: %(default)s)",
    )  # fmt: skip
    encoder.add_argument("--device", help="torch device (default: a GPU if there is one)")
    return parser


def default_out(clip_model_type, split):
    """Return the predecessors' name of the store of a model and split."""
    model = Path(clip_model_type).stem if Path(clip_model_type).is_file() else clip_model_type.replace("/", "_")
    return f"data/coco/oscar_split_{model}_{split}.pkl"


def find_images(records, finder, strict):
    """Locate every record's image.

    Returns: ({image file: its records}, {image file or id: why it is skipped}).
    Raises: ValueError where `strict` and one is missing, or where all are.
    """
    found, skipped = {}, {}
    for record in records:
        path = finder.find(record)
        if path is None:
            skipped[str(record.get("file_name") or record["image_id"])] = "no such image"
        else:
            found.setdefault(path, []).append(record)
    if skipped and (strict or not found):
        name = next(iter(skipped))
        raise ValueError(
            f"{len(skipped)} of {len(skipped) + len(found)} images are missing, {name} the first, in "
            f"{', '.join(map(str, finder.folders))}; pass the right --images{', or leave out --strict' * bool(found)}"
        )
    return found, skipped


def file_key(path):
    """Return what tells whether an image file is still the one that was encoded: name, bytes, time in ns."""
    status = os.stat(path)
    return str(path), status.st_size, status.st_mtime_ns


def encode_missing(encoder, paths, partial, batch_size, num_workers, strict):
    """Encode the images that `partial` does not hold yet.

    Returns: {image file: why it could not be read}.
    Raises: ValueError at the first unreadable one where `strict`.
    """
    todo = [path for path in paths if file_key(path) not in partial.rows]
    if len(todo) < len(paths):
        note(f"going on: {len(paths) - len(todo):,} of {len(paths):,} images are already encoded")
    skipped = {}
    with progress_bar(len(paths), "images", "img", initial=len(paths) - len(todo)) as bar:
        for indices, embeddings, errors in encoder.encode_files(todo, batch_size, num_workers):
            if errors and strict:
                index, reason = next(iter(errors.items()))
                raise ValueError(f"{todo[index]}: {reason}; mend or remove it, or leave out --strict")
            bad = ~torch.isfinite(embeddings).all(1)
            if bad.any():
                raise ValueError(f"{encoder.name} gives NaN for {todo[indices[int(bad.nonzero()[0])]]}: check its file")
            if indices:
                partial.append([file_key(todo[i]) for i in indices], embeddings)
            skipped.update({str(todo[i]): reason for i, reason in errors.items()})
            bar.update(len(indices) + len(errors))
    return skipped


def build_captions(found):
    """Give every caption the row of its image.

    Args:
        found: {readable image file: its records}, in row order.
    Returns: (captions, how many were empty and left out).
    """
    captions, empty = [], 0
    for row, records in enumerate(found.values()):
        for record in records:
            if record["caption"].strip():
                captions.append({**record, "clip_embedding": row})
            else:
                empty += 1
    return captions, empty


def is_done(out, info):
    """Tell whether the store exists and was made of the same things, with nothing skipped."""
    if not (Path(out).is_file() and info_path(out).is_file()):
        return False
    stored = read_json(info_path(out))
    same = all(
        stored.get(key) == info[key] for key in ("clip_model_type", "clip_sha256", "annotations_sha256", "split")
    )
    return same and not stored.get("skipped") and stored.get("images_found") == info["images_found"]


def report_skipped(skipped):
    """List the first skipped images."""
    for name, reason in list(skipped.items())[:SHOWN]:
        note(f"skipped {name}: {reason}")
    if len(skipped) > SHOWN:
        note(f"... and {len(skipped) - SHOWN:,} more; the json beside the store lists them all")


def main(argv=None):
    """Extract the features of one split."""
    args = get_parser().parse_args(argv)
    out = args.out or default_out(args.clip_model_type, args.split)
    if out.endswith("/") or Path(out).is_dir():
        raise ValueError(f"--out {out} is a folder; give the name of a file, such as {Path(out) / 'train.pkl'}")
    records = read_annotations(args.annotations, args.split)
    found, skipped = find_images(records, ImageFinder(args.images, args.annotations), args.strict)
    encoder = ClipEncoder(args.clip_model_type, pick_device(args.device))
    info = {
        "clip_model_type": args.clip_model_type, "clip_sha256": encoder.sha256, "embed_dim": encoder.embed_dim,
        "normalized": False, "annotations": args.annotations, "annotations_sha256": sha256(args.annotations),
        "split": args.split, "images_found": len(found),
        "versions": {"clipcap": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    if not skipped and is_done(out, info):
        note(f"{out} is complete: {len(found):,} images of {args.annotations}; nothing to do")
        return
    partial = PartialStore(out, {"name": encoder.name, "sha256": encoder.sha256, "embed_dim": encoder.embed_dim})
    try:
        skipped |= encode_missing(encoder, list(found), partial, args.batch_size, args.num_workers, args.strict)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    found = {path: records for path, records in found.items() if str(path) not in skipped}
    captions, empty = build_captions(found)
    report_skipped(skipped)
    if not captions:
        raise ValueError(
            f"no captions left: {len(skipped):,} images could not be read and {empty:,} captions are empty"
        )
    counts = {"images": len(found), "captions": len(captions), "empty_captions": empty, "images_skipped": len(skipped)}
    embeddings = partial.embeddings([file_key(path) for path in found])
    write_store(out, embeddings, captions, info | counts | {"skipped": skipped})
    partial.remove()
    note(f"{out}: {len(found):,} images, {len(captions):,} captions, {len(skipped):,} images skipped")


if __name__ == "__main__":
    run(main)
