"""Score captions: captions + references -> COCO's metrics.

    python evaluate.py captions.json data/coco/annotations/captions_val2014.json --subset --out scores.json
    python evaluate.py captions.json dataset_coco.json --compare other.json --html page.html --images data/coco/val2014

BLEU-1 to -4, METEOR, ROUGE-L, CIDEr and SPICE are pycocoevalcap's, with its values. METEOR needs Java, SPICE
Stanford CoreNLP too; without them the others are computed on the same tokens, and the missing ones are named. With
--images and --clip_model_type CLIPScore and RefCLIPScore are added. References with nocaps' domains are scored by
domain too.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import os
from dataclasses import dataclass

from encoders import check_encoder, split_path
from features.annotations import FORMATS
from features.finder import ImageFinder
from features.images import set_max_pixels
from features.references import References, named, read_captions, read_records, read_references
from metrics.names import METRICS
from utils.cli import Parser, late_imports, non_negative_int, note, positive_int, run
from utils.flags import add_max_pixels_flag
from utils.outputs import check_output


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    parser.add_argument("captions", metavar="CAPTIONS", help="one caption per image; formats as of REFERENCES")
    parser.add_argument("references", metavar="REFERENCES", help=FORMATS)
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
        help="java: Stanford's program; python: our own, with the same tokens; auto: java if there is one (default)",
    )  # fmt: skip
    how.add_argument("--bootstrap", type=non_negative_int, default=1000, metavar="N", help="samples; 0: no intervals")
    how.add_argument("--seed", type=non_negative_int, default=0, help="of the bootstrap")
    clip = parser.add_argument_group("CLIPScore and the page's pictures")
    clip.add_argument("--images", nargs="+", metavar="DIR", help="folders of the images, searched in this order")
    clip.add_argument(
        "--clip_model_type", metavar="P",
        help="add CLIPScore and RefCLIPScore by this encoder; published scores use ViT-B/32",
    )  # fmt: skip
    clip.add_argument(
        "--num_workers", type=non_negative_int, default=min(4, os.cpu_count() or 1), help="processes that read images"
    )
    add_max_pixels_flag(clip)
    clip.add_argument("--device", help="torch device of the encoder (default: a GPU if there is one)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="write the scores, per image too, as JSON")
    output.add_argument("--html", metavar="FILE", help="write a page with the best and the worst images")
    output.add_argument("--examples", type=positive_int, default=12, help="best and worst images in the page")
    return parser


@dataclass
class Inputs:
    """What is compared.

    Args:
        references: References.
        systems: one or two {image id: caption}, of the images to score.
        training: captions that were trained on, or None.
        finder: ImageFinder, or None without --images.
        images: {image id: file} to embed, or None without --clip_model_type.
    """

    references: References
    systems: list
    training: list | None
    finder: ImageFinder | None
    images: dict | None


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


def read_inputs(args):
    """Read the files and find the images.

    Returns: Inputs.
    Raises: FileNotFoundError; ValueError where files are malformed, do not fit each other, or an image is missing.
    """
    finder = ImageFinder(args.images) if args.images else None
    references = read_references(args.references, args.split)
    files = [args.captions, *([args.compare] if args.compare else [])]
    systems = [read_captions(file, references, args.split) for file in files]
    files = list(zip(files, systems, strict=True))
    ids = select(files[0], (args.references, references.captions), files[1:], args.subset)
    systems = [{i: system[i] for i in ids} for system in systems]
    training, images = None, None
    if args.train_captions:
        training = [record["caption"] for record in read_records(args.train_captions, "train")]
    if args.clip_model_type:
        images = {i: references.find_image(finder, i) for i in ids}
        missing = [image_id for image_id, path in images.items() if path is None]
        if missing:
            raise ValueError(
                f"--images lacks {len(missing):,} of {len(images):,} images ({named(missing)}); add their folder"
            )
    return Inputs(references, systems, training, finder, images)


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
    if args.clip_model_type:
        check_encoder(args.clip_model_type)


def main(argv=None):
    """Run the command."""
    args = get_parser().parse_args(argv)
    check_flags(args)
    set_max_pixels(args.max_pixels)
    inputs = read_inputs(args)
    with late_imports():
        from metrics.evaluation import evaluate
    result, tables = evaluate(args, inputs)
    print(tables)  # last: a reader that closes the pipe early ends the program
    for warning in result["warnings"]:
        note(f"warning: {warning}")


if __name__ == "__main__":
    run(main)
