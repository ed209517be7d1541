"""Score captions: captions + references -> COCO's metrics.

    python evaluate.py captions.json data/coco/annotations/captions_val2014.json --subset --out scores.json
    python evaluate.py captions.json dataset_coco.json --compare other.json --html page.html --images data/coco/val2014

BLEU-1 to -4, METEOR, ROUGE-L, CIDEr and SPICE are pycocoevalcap's, with its values. METEOR needs Java, SPICE needs
Stanford CoreNLP besides; without them the others are computed on the same tokens, and what is left out is named. With
--images and --clip_model_type CLIPScore and RefCLIPScore are added. References that tell nocaps' domains are scored by
domain too.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import os

import numpy as np

from encoders import load_encoder, split_path
from features.annotations import FORMATS
from features.finder import ImageFinder
from features.images import add_max_pixels_flag, set_max_pixels
from features.loader import encode_files
from features.references import named, read_captions, read_records, read_references
from metrics import ptb
from metrics.bootstrap import compare, intervals
from metrics.clipscore import add_clip_scores
from metrics.coco import METRICS, caption_statistics, coco_scores, too_few_distinct
from metrics.report import image_uri, ranking_metric, render, text_tables
from metrics.scripts import uncut_warning
from utils.cli import Parser, non_negative_int, note, positive_int, progress_bar, run
from utils.devices import pick_device
from utils.files import write_json, write_text
from utils.outputs import check_output

INTERVALS = "bootstrap over images, percentiles, {samples} samples, seed {seed}"
COMPARISON = "interval: paired bootstrap; p: two-sided paired randomisation test; {samples} samples each, seed {seed}"
BATCH = 64  # images per call of the encoder


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    parser.add_argument("captions", metavar="CAPTIONS", help="one caption per image; formats as of REFERENCES")
    parser.add_argument("references", metavar="REFERENCES", help=f"{FORMATS}; .gz too")
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
    clip = parser.add_argument_group("CLIPScore and the page's pictures")
    clip.add_argument("--images", nargs="+", metavar="DIR", help="folders of the images, searched in this order")
    clip.add_argument(
        "--clip_model_type", metavar="P",
        help="add CLIPScore and RefCLIPScore by this encoder; published ones are of ViT-B/32",
    )  # fmt: skip
    clip.add_argument(
        "--num_workers", type=non_negative_int, default=min(4, os.cpu_count() or 1), help="processes that read images"
    )
    add_max_pixels_flag(clip)
    clip.add_argument("--device", help="torch device of the encoder (default: a GPU if there is one)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="write the scores, those of every image too, as JSON")
    output.add_argument("--html", metavar="FILE", help="write a page with the best and the worst images")
    output.add_argument("--examples", type=positive_int, default=12, help="best and worst images in the page")
    return parser


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
            examples = "; ".join(f"{file}: {named(list(values))}" for file, values in files)
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
                    f"({named(lacking)}); pass files of the same images, or --subset to score only the common ones"
                )
    left_out = len(references[1]) - len(captions[1])
    if left_out:
        note(f"warning: {left_out:,} of {len(references[1]):,} images of {references[0]} have no caption; left out")
    return list(captions[1])


def score_files(args, finder):
    """Read the files and score the systems.

    Args:
        finder: ImageFinder, or None without --images.
    Returns: result as `--out` writes it, less the images; [Scores, one per system]; [{image id: caption}, likewise];
        References.
    Raises: FileNotFoundError, ValueError.
    """
    references = read_references(args.references, args.split)
    files = [args.captions, *([args.compare] if args.compare else [])]
    systems = [read_captions(file, references, args.split) for file in files]
    files = list(zip(files, systems, strict=True))
    ids = select(files[0], (args.references, references.captions), files[1:], args.subset)
    systems = [{i: system[i] for i in ids} for system in systems]
    training = None
    if args.train_captions:
        training = set(ptb.tokenize([record["caption"] for record in read_records(args.train_captions, "train")]))
    if args.clip_model_type:  # first, for an image may be missing
        encoder = load_encoder(args.clip_model_type, pick_device(args.device))
        encoder.check_texts("CLIPScore")
        embeddings = embed_images(encoder, {i: references.find_image(finder, i) for i in ids}, args.num_workers)
    scores = [coco_scores(system, references.captions, args.metrics, args.tokenizer) for system in systems]
    if args.clip_model_type:
        for system, captions in zip(scores, systems, strict=True):
            add_clip_scores(system, captions, references.captions, embeddings, encoder.encode_texts)
    result = describe(args, scores, training)
    result["warnings"] = warnings_of(scores, systems, {i: references.captions[i] for i in ids})
    domains = score_domains(systems[0], references, args)
    if domains:
        result["domains"] = domains
    return result, scores, systems, references


def warnings_of(scores, systems, references):
    """Return what the reader of the scores must know, as lines; see `score_files`."""
    empty = [image_id for system in systems for image_id, caption in system.items() if not caption.strip()]
    warnings = [
        *scores[0].warnings,
        empty and f"{len(empty):,} of {sum(map(len, systems)):,} captions are empty ({named(empty)})",
        too_few_distinct(caption_statistics(scores[0].tokens), len(scores[0].ids)),
        uncut_warning({
            "captions": [caption for system in systems for caption in system.values()],
            "references": [text for texts in references.values() for text in texts],
        }),
    ]  # fmt: skip
    return [warning for warning in warnings if warning]


def embed_images(encoder, images, num_workers):
    """Return the CLIP embeddings, [N, D], of {image id: file or None}, read by `num_workers` processes.

    Raises: ValueError where an image is missing or unreadable.
    """
    missing = [image_id for image_id, path in images.items() if path is None]
    if missing:
        raise ValueError(
            f"--images lacks {len(missing):,} of {len(images):,} images ({named(missing)}); add their folder"
        )
    parts, paths = [], list(images.values())
    with progress_bar(len(paths), "images", "img") as bar:
        for _, embeddings, errors in encode_files(encoder, paths, BATCH, num_workers):
            if errors:
                index, reason = next(iter(errors.items()))
                raise ValueError(f"{paths[index]}: {reason}; CLIPScore needs every image")
            parts.append(embeddings.numpy())
            bar.update(len(embeddings))
    return np.concatenate(parts)


def describe(args, scores, training):
    """Return scores, intervals and comparison as `--out` writes them; `training`: set of captions, or None."""
    result = {
        "metrics": scores[0].metrics,
        "unavailable": scores[0].unavailable,
        "captions": args.captions,
        "references": args.references,
        "images": len(scores[0].ids),
        "tokenizer": scores[0].tokenizer,
        "statistics": caption_statistics(scores[0].tokens, training),
    }
    if args.clip_model_type:
        result["clip_model_type"] = args.clip_model_type
    settings = {"samples": args.bootstrap, "seed": args.seed}
    if args.bootstrap and len(scores[0].ids) > 1:
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
    return result


def score_domains(captions, references, args):
    """Score nocaps' domains, each as a set of its own: {domain: {"images", "metrics"}}; {} for other references."""
    parts = {}
    for image_id in captions:
        if image_id in references.domains:
            parts.setdefault(references.domains[image_id], {})[image_id] = captions[image_id]
    return {
        domain: {
            "images": len(part),
            "metrics": coco_scores(part, references.captions, args.metrics, args.tokenizer).metrics,
        }
        for domain, part in sorted(parts.items())
    }


def pick_examples(scores, systems, references, number, finder=None):
    """Return the best and the worst images by `ranking_metric` as two lists of examples for the page."""
    values = scores.per_image.get(ranking_metric(scores.metrics), np.zeros(0))
    order = np.argsort(-values, kind="stable")
    number = min(number, (len(order) + 1) // 2)

    def example(row):
        image_id = scores.ids[row]
        path = references.find_image(finder, image_id) if finder else None
        return {
            "image_id": image_id,
            "score": float(values[row]),
            "captions": [system[image_id] for system in systems],
            "references": references.captions[image_id],
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
    inputs = {
        "the captions": args.captions, "the references": args.references, "the captions of --compare": args.compare,
        "the training captions": args.train_captions, "the encoder": split_path(args.clip_model_type or "")[1],
    }  # fmt: skip
    for flag, path, endings in (("--out", args.out, (".json",)), ("--html", args.html, (".html", ".htm"))):
        if path:
            check_output(flag, path, inputs, endings)
    if args.images and not (args.html or args.clip_model_type):
        raise ValueError("--images is for the page and for CLIPScore; pass --html FILE or --clip_model_type P too")
    if args.clip_model_type and not args.images:
        raise ValueError("--clip_model_type is for CLIPScore, which looks at the images; pass --images DIR too")
    if args.compare and not args.bootstrap:
        raise ValueError("--compare tests by resampling; pass --bootstrap N of at least 1")


def main(argv=None):
    """Run the command."""
    args = get_parser().parse_args(argv)
    check_flags(args)
    set_max_pixels(args.max_pixels)
    finder = ImageFinder(args.images) if args.images else None
    result, scores, systems, references = score_files(args, finder)
    if args.html:
        best, worst = pick_examples(scores[0], systems, references, args.examples, finder)
        write_text(args.html, render(result, best, worst))
    if args.out:
        write_json(args.out, {**result, "per_image": per_image(scores[0], systems[0])})
    print(text_tables(result))  # last: a reader that closes the pipe early ends the program
    for warning in result["warnings"]:
        note(f"warning: {warning}")


if __name__ == "__main__":
    run(main)
