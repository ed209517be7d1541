"""Caption the images of the NICE challenge: a folder -> output_caption/clipcap.json and .csv.

    python predict_nice.py --images data/nice/images --checkpoint checkpoints/coco_prefix_latest.pt --ofile clipcap

The json is {public_id: caption}, the csv has the columns public_id,caption that the challenge takes. Stopped and run
again, it goes on; an image that cannot be read is listed, gets a row with an empty caption, and is tried again.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import csv
import io
from pathlib import Path

import predict
import predict_OPT
from features.annotations import image_id_of, list_images
from utils.cli import Parser, note, progress_bar, run
from utils.files import read_json, write_json, write_text

FOLDER = Path("output_caption")


def get_parser():
    """Return the command line's parser: predict_OPT.py's, with a folder and names of the challenge's kind."""
    parser = Parser(__doc__)
    parser.add_argument("--images", default="data/nice/images", metavar="DIR", help="folder of images")
    parser.add_argument("--ofile", default="clipcap", help="name of the files in output_caption/")
    parser.add_argument("--prefix_length", type=int, help="as the predecessor's; checked against the checkpoint")
    predict.add_captioner_flags(parser, predict_OPT.DECODING)
    predict_OPT.set_defaults(parser)
    return parser


def read_done(path):
    """Return the captions that an earlier run has made, {public_id: caption}.

    Raises: ValueError where the file is something else.
    """
    if not path.is_file():
        return {}
    done = read_json(path)
    if not isinstance(done, dict) or not all(isinstance(caption, str) for caption in done.values()):
        raise ValueError(f"{path} is not {{public_id: caption}}; move it away or pass another --ofile")
    return {image_id_of(key): caption for key, caption in done.items()}


def write_results(path, captions):
    """Write both files, in the order of the ids."""
    rows = sorted(captions.items(), key=lambda item: (isinstance(item[0], str), item[0]))
    write_json(path, {str(public_id): caption for public_id, caption in rows})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("public_id", "caption"))
    writer.writerows(rows)
    write_text(path.with_suffix(".csv"), table.getvalue())


def caption_folder(captioner, paths, decoding, batch_size, num_workers, out, captions):
    """Caption files, saving after every batch.

    Args:
        captions: {public_id: caption} of what is done; added to.
    Returns: how many images could not be read.
    """
    unreadable = 0
    with progress_bar(len(paths), "images", "img") as bar:
        for done, errors in captioner.caption_files(paths, decoding, batch_size, num_workers):
            captions |= {image_id_of(path): group[0].text.strip() for path, group in done.items()}
            captions |= {image_id_of(path): "" for path in errors}
            for path, reason in errors.items():
                note(f"unreadable {path}: {reason}")
            unreadable += len(errors)
            write_results(out, captions)
            bar.update(len(done) + len(errors))
    return unreadable


def main(argv=None):
    """Caption the challenge's folder; returns 2 where an image could not be read."""
    args = get_parser().parse_args(argv)
    out = FOLDER / f"{args.ofile}.json"
    decoding, paths, captions = predict.decoding_config(args), list_images(args.images), read_done(out)
    if not paths:
        raise ValueError(f"--images {args.images} holds no images")
    todo = [path for path in paths if not captions.get(image_id_of(path))]
    if len(todo) < len(paths):
        note(f"going on: {len(paths) - len(todo):,} of {len(paths):,} images are captioned")
    if not todo:
        return 0
    captioner = predict.captioner_of(args)
    if args.prefix_length not in (None, captioner.model.config.prefix_length):
        own = captioner.model.config.prefix_length
        raise ValueError(
            f"--prefix_length {args.prefix_length} contradicts {args.checkpoint}, whose prefix is {own} long"
        )
    workers = 0 if len(todo) <= args.batch_size else args.num_workers
    unreadable = caption_folder(captioner, todo, decoding, args.batch_size, workers, out, captions)
    note(f"{out} and {out.with_suffix('.csv').name}: {len(captions):,} captions")
    if unreadable:
        note(f"error: {unreadable} of {len(paths)} images could not be read; their captions are empty")
        return 2
    return 0


if __name__ == "__main__":
    run(main)
