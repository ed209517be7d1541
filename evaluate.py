"""Score captions: captions + references -> COCO's metrics.

    python evaluate.py captions.json data/coco/annotations/captions_val2014.json --subset --out scores.json
    python evaluate.py captions.json dataset_coco.json --compare other.json --html page.html --images data/coco/val2014

BLEU-1 to -4, METEOR, ROUGE-L, CIDEr and SPICE are pycocoevalcap's, with its values. METEOR needs Java, SPICE needs
Stanford CoreNLP besides; without them the others are computed on the same tokens, and what is left out is named.
"""

import collections
import contextlib
import csv
import gzip
import json
import re
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np

from features.annotations import ImageFinder, normal_id, read_annotations
from metrics import ptb
from metrics.bootstrap import compare, intervals
from metrics.coco import METRICS, caption_statistics, coco_scores, too_few_distinct
from metrics.report import image_uri, render, text_table
from utils.cli import Parser, non_negative_int, note, positive_int, run
from utils.files import read_json, write_json, write_text

# Images of dataset_coco.json; train includes restval.
KARPATHY_COCO = {"train": 113287, "val": 5000, "test": 5000}
INTERVALS = "bootstrap over images, percentiles, {samples} samples, seed {seed}"
COMPARISON = "interval: paired bootstrap; p: two-sided paired randomisation test; {samples} samples each, seed {seed}"
# How a NICE json starts, {public_id: caption} or a list of objects: saves parsing large files of other formats twice.
NICE_JSON = re.compile(r'\s*(?:\{\s*"[^"]*"\s*:\s*"|\[\s*\{[^{}]*"public_id"\s*:)')
NAMED = 5  # examples in an error


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    parser.add_argument(
        "captions", metavar="CAPTIONS", help="[{image_id, caption}] or {image_id: caption}, json or csv"
    )
    parser.add_argument(
        "references", metavar="REFERENCES",
        help="COCO captions_*.json, Karpathy dataset_*.json, NICE csv, or [{image_id, caption}]; .gz too",
    )  # fmt: skip
    data = parser.add_argument_group("what is compared")
    data.add_argument("--split", default="test", help="of a Karpathy file; train includes restval (default: test)")
    data.add_argument("--subset", action="store_true", help="score the images that all files have, not all images")
    data.add_argument("--compare", metavar="B", help="captions of another system for the same images")
    data.add_argument("--train_captions", metavar="F", help="training captions, to count those repeated word for word")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=METRICS,
        metavar="NAME",
        help=f"some of {', '.join(METRICS)} (default: all)",
    )
    how.add_argument(
        "--tokenizer", choices=("auto", "java", "python"), default="auto",
        help="Stanford's program, our own with the same tokens, or the first where there is Java (default: auto)",
    )  # fmt: skip
    how.add_argument("--bootstrap", type=non_negative_int, default=1000, metavar="N", help="samples; 0: no intervals")
    how.add_argument("--seed", type=non_negative_int, default=0, help="of the bootstrap")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="write the scores, those of every image too, as JSON")
    output.add_argument("--html", metavar="FILE", help="write a page with the best and the worst images")
    output.add_argument("--images", metavar="DIR", help="folder of the images, to put them into the page")
    output.add_argument("--examples", type=positive_int, default=12, help="best and worst images in the page")
    return parser


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


def read_pairs(path, split):
    """Read (image id, caption) pairs from a file of any format that `--help` names.

    Args:
        path: file, .gz too.
        split: of a Karpathy file.
    Raises: FileNotFoundError; ValueError naming file and record, or a split of dataset_coco.json that is not whole.
    """
    with unzipped(path) as plain:
        pairs = _read_nice(plain)
        if pairs is None:
            pairs = [(record["image_id"], record["caption"]) for record in read_annotations(plain, split)]
    pairs = [(normal_id(image_id), caption) for image_id, caption in pairs]
    if plain.name == "dataset_coco.json" and split in KARPATHY_COCO:
        images = len({image_id for image_id, _ in pairs})
        if images != KARPATHY_COCO[split]:
            raise ValueError(
                f"{path} has {images:,} images in split {split}, not {KARPATHY_COCO[split]:,}: it is not Karpathy's "
                "whole file; fetch it again, or give a part of it another name"
            )
    return pairs


def _read_nice(path):
    """Read the NICE challenge's csv or json; None where the file is something else."""
    if path.suffix.lower() == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            try:
                if "public_id" not in (reader.fieldnames or []):
                    return None
                rows = list(reader)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path}, line {reader.line_num + 1}: {error}") from None
    elif path.suffix.lower() == ".json":
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            start = NICE_JSON.match(file.read(4096))
        rows = read_json(path) if start else None
        if rows is None or "annotations" in rows or "images" in rows:
            return None
        if isinstance(rows, dict):
            # parsed again as pairs, for a key given twice is an error that a dict would hide
            pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
            rows = [{"public_id": key, "caption": value} for key, value in pairs]
    else:
        return None
    for number, row in enumerate(rows, 1):
        caption = row.get("caption_gt", row.get("caption")) if isinstance(row, dict) else None
        if not isinstance(caption, str) or not str(row.get("public_id") or "").strip():
            raise ValueError(f"{path}, record {number}: needs public_id, and caption or caption_gt: {str(row)[:120]}")
    return [(row["public_id"], row.get("caption_gt", row.get("caption"))) for row in rows]


def read_captions(path, split):
    """Read one caption per image as {image id: caption}.

    Raises: ValueError naming images with two captions.
    """
    pairs = read_pairs(path, split)
    counts = collections.Counter(image_id for image_id, _ in pairs)
    twice = [image_id for image_id, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"{path} has several captions for {len(twice):,} images ({_named(twice)}); keep one caption per image"
        )
    return dict(pairs)


def read_references(path, split):
    """Read references as {image id: [caption, ...]}.

    Raises: ValueError naming images with an empty reference.
    """
    references = collections.defaultdict(list)
    for image_id, caption in read_pairs(path, split):
        references[image_id].append(caption)
    empty = [image_id for image_id, texts in references.items() if not all(text.strip() for text in texts)]
    if empty:
        raise ValueError(f"{path} has empty references for {len(empty):,} images ({_named(empty)}); remove them")
    return dict(references)


def _named(image_ids):
    """Name some images: "image_id 1, 2, 3, ..."."""
    return f"image_id {', '.join(str(i) for i in image_ids[:NAMED])}{', ...' if len(image_ids) > NAMED else ''}"


def select(captions, references, others, subset):
    """Return the image ids to score, in the captions' order.

    Args:
        captions, references: (file, {image id: ...}).
        others: list of further (file, {image id: caption}).
        subset: take the images that all files have.
    Raises: ValueError naming the images without a reference or without the other system's caption, or where no image
        is in all files.
    """
    files = [references, captions, *others]
    if subset:
        ids = [image_id for image_id in captions[1] if all(image_id in values for _, values in files)]
        if not ids:
            examples = "; ".join(f"{file}: {_named(list(values))}" for file, values in files)
            raise ValueError(f"no image is in all files ({examples})")
        return ids
    for file, values in files:
        # images without a caption are left out, as COCO's own evaluation does; two systems must have the same ones
        for other, theirs in files[1:]:
            lacking = [image_id for image_id in theirs if image_id not in values]
            if lacking:
                what = "reference" if file == references[0] else "caption"
                raise ValueError(
                    f"{file} has no {what} for {len(lacking):,} of {len(theirs):,} images of {other} "
                    f"({_named(lacking)}); pass files of the same images, or --subset to score only the common ones"
                )
    left_out = len(references[1]) - len(captions[1])
    if left_out:
        note(f"warning: {left_out:,} of {len(references[1]):,} images of {references[0]} have no caption; left out")
    return list(captions[1])


def score_files(args):
    """Read the files and score the systems.

    Returns: result as `--out` writes it, less the images; [Scores, one per system]; [{image id: caption}, likewise];
        {image id: references}.
    Raises: FileNotFoundError, ValueError.
    """
    references = read_references(args.references, args.split)
    files = [args.captions, *([args.compare] if args.compare else [])]
    systems = [read_captions(file, args.split) for file in files]
    named = list(zip(files, systems, strict=True))
    ids = select(named[0], (args.references, references), named[1:], args.subset)
    training = None
    if args.train_captions:
        training = set(ptb.tokenize([caption for _, caption in read_pairs(args.train_captions, "train")]))
    scores = [coco_scores({i: s[i] for i in ids}, references, args.metrics, args.tokenizer) for s in systems]
    result = {
        "metrics": scores[0].metrics,
        "unavailable": scores[0].unavailable,
        "captions": args.captions,
        "references": args.references,
        "images": len(ids),
        "tokenizer": scores[0].tokenizer,
        "statistics": caption_statistics(scores[0].tokens, training),
    }
    settings = {"samples": args.bootstrap, "seed": args.seed}
    if args.bootstrap:
        result["bootstrap"] = {**settings, "method": INTERVALS.format(**settings)}
        result["intervals"] = intervals(scores[0], **settings)
    if args.compare:
        result["comparison"] = {
            "captions": args.compare,
            "metrics": scores[1].metrics,
            "statistics": caption_statistics(scores[1].tokens, training),
            "differences": compare(*scores, **settings),
            "method": COMPARISON.format(**settings),
        }
    return result, scores, systems, references


def pick_examples(scores, systems, references, number, finder=None):
    """Return the best and the worst images by CIDEr as two lists of examples for the page."""
    values = scores.per_image.get("CIDEr", next(iter(scores.per_image.values()), np.zeros(0)))
    order = np.argsort(-values, kind="stable")
    number = min(number, (len(order) + 1) // 2)

    def example(row):
        image_id = scores.ids[row]
        path = finder.find({"image_id": image_id}) if finder else None
        return {
            "image_id": image_id,
            "score": float(values[row]),
            "captions": [system[image_id] for system in systems],
            "references": references[image_id],
            "image": image_uri(path) if path else None,
        }

    return [example(row) for row in order[:number]], [example(row) for row in order[number:][::-1][:number]]


def per_image(scores, captions):
    """Return a list with caption and scores of every image; a score that is not a number becomes None."""
    return [
        {"image_id": image_id, "caption": captions[image_id]}
        | {name: float(values[row]) if np.isfinite(values[row]) else None for name, values in scores.per_image.items()}
        for row, image_id in enumerate(scores.ids)
    ]


def check_flags(args):
    """Refuse flags that cannot work, before any scoring; Raises: ValueError."""
    for flag, path in (("--out", args.out), ("--html", args.html)):
        if path and Path(path).is_dir():
            raise ValueError(f"{flag} {path} is a folder; name a file in it")
    if args.images and not args.html:
        raise ValueError("--images puts images into the page; pass --html FILE too")
    if args.compare and not args.bootstrap:
        raise ValueError("--compare tests by resampling; pass --bootstrap N of at least 1")


def main(argv=None):
    """Run the command."""
    args = get_parser().parse_args(argv)
    check_flags(args)
    finder = ImageFinder([args.images]) if args.images else None
    result, scores, systems, references = score_files(args)
    if args.html:
        best, worst = pick_examples(scores[0], systems, references, args.examples, finder)
        write_text(args.html, render(result, best, worst))
    if args.out:
        write_json(args.out, {**result, "per_image": per_image(scores[0], systems[0])})
    print(text_table(result))  # last: a reader that closes the pipe early ends the program
    warning = too_few_distinct(result["statistics"], result["images"])
    if warning:
        note(warning)


if __name__ == "__main__":
    run(main)
