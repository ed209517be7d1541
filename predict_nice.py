"""Caption the images of the NICE challenge: a folder -> output_caption/clipcap.json and .csv.

    python predict_nice.py --images data/nice/images --checkpoint checkpoints/coco_prefix_latest.pt --ofile clipcap

The json is {public_id: caption}, the csv has the columns public_id,caption that the challenge takes. A rerun goes on
where it was stopped; an image that cannot be read is listed, gets a row with an empty caption, and is tried again. The
captioner and its decoding are recorded in .clipcap.made_by.json, so that no file mixes two captioners or decodings.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import os
from pathlib import Path

import predict
import predict_OPT
from features.annotations import normal_id
from features.images import set_max_pixels
from features.listing import as_line, images_in, list_folder
from features.results import name_shared, result_id, shared_ids
from models.captioner_files import captioner_files, check_captioner
from models.made_by import difference, made_by
from utils.cli import Parser, late_imports, note, progress_bar, run
from utils.files import read_json, write_json, write_table
from utils.flags import check_offloading
from utils.outputs import check_output, lock

FOLDER = Path("output_caption")
COLUMNS = ("public_id", "caption")


def get_parser():
    """Return the command line's parser: predict_OPT.py's, with a folder and names of the challenge's kind."""
    parser = Parser(__doc__)
    parser.add_argument("--images", default="data/nice/images", metavar="DIR", help="folder of images")
    parser.add_argument("--ofile", default="clipcap", help="name of the files in output_caption/, without ending")
    parser.add_argument("--prefix_length", type=int, help="as the predecessor's; checked against the checkpoint")
    predict.add_captioner_flags(parser, predict_OPT.DECODING)
    predict_OPT.set_defaults(parser)
    return parser


def output_file(args):
    """Return the json to write, after checking it and the csv beside it.

    Raises: ValueError where they cannot be written, or are the captioner's.
    """
    if Path(args.ofile).name != args.ofile or args.ofile in ("", ".."):
        raise ValueError(f"--ofile {args.ofile!r} is no plain name; the files go into {FOLDER}/, pass a name alone")
    name = Path(args.ofile)
    out = FOLDER / f"{name.stem if name.suffix.lower() in ('.json', '.csv') else name}.json"
    files = captioner_files(args.checkpoint, args.clip_model_type, args.language_model)
    for file in (out, out.with_suffix(".csv")):
        check_output("--ofile", file, {"the captioner": files})
    return out


def read_done(path):
    """Return the captions that an earlier run has made, {public_id: caption}.

    Raises: ValueError where one of the files is something else.
    """
    table, remedy = path.with_suffix(".csv"), "move it away or pass another --ofile"
    if table.is_file():
        with open(table, encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()
        if not path.is_file() or first != ",".join(COLUMNS):
            raise ValueError(f"{table} is not of an earlier run and would be overwritten; {remedy}")
    if not path.is_file():
        return {}
    done = read_json(path)
    if not isinstance(done, dict) or not all(isinstance(caption, str) for caption in done.values()):
        raise ValueError(f"{path} is not {{public_id: caption}}; {remedy}")
    # keys are ids, not file names: "v1.3" has no ending to cut
    numbers = {key: normal_id(key) for key in done}
    return {number if isinstance(number, int) else key: done[key] for key, number in numbers.items()}


def check_made_by(out, made, done):
    """Refuse to go on with the captions of another captioner or decoding.

    Args:
        out: the json of captions.
        made: what `made_by` returns.
        done: captions that are there.
    Raises: ValueError saying what differs.
    """
    path = made_by_path(out)
    earlier = read_json(path) if done and path.is_file() else None
    if done and earlier is None:
        note(f"warning: {out} does not say which captioner made its {len(done):,} captions; they are kept as they are")
    what = difference(earlier, made)
    if earlier is None or what is None:
        return
    raise ValueError(
        f"{out} holds captions of another {what}: give the same flags to go on, or another --ofile, or move it away"
    )


def made_by_path(out):
    """Return the file beside a json of captions that says what made them."""
    return out.with_name(f".{out.stem}.made_by.json")


def write_results(path, captions):
    """Write both files, in the order of the ids."""
    rows = sorted(captions.items(), key=lambda item: (isinstance(item[0], str), item[0]))
    write_json(path, {str(public_id): caption for public_id, caption in rows})
    write_table(path.with_suffix(".csv"), COLUMNS, rows)


def caption_folder(captioner, paths, decoding, batch_size, num_workers, out, captions):
    """Caption files, saving after every batch.

    Args:
        captions: {public_id: caption} made so far; added to.
    Returns: how many images could not be read.
    """
    unreadable = 0
    with progress_bar(len(paths), "images", "img") as bar:
        for done, errors in captioner.caption_files(paths, decoding, batch_size, num_workers):
            captions |= {result_id(path): group[0].text.strip() for path, group in done.items()}
            captions |= {result_id(path): "" for path in errors}
            write_results(out, captions)
            for path, reason in errors.items():
                note(f"unreadable {as_line(path)}: {reason}")
            unreadable += len(errors)
            bar.update(len(done) + len(errors))
    return unreadable


def find_images(folder):
    """Return the images of the challenge's folder.

    Raises: FileNotFoundError; ValueError where there are none, or where some share an id.
    """
    paths = images_in(list_folder(folder), f"--images {folder}", os.path.join(folder, "**", "*.jpg"))
    shared = shared_ids(paths)
    if shared:
        raise ValueError(
            f"--images {folder} has images that share a public_id ({name_shared(shared)}), of which each gets "
            "one caption; rename or move them"
        )
    return paths


def main(argv=None):
    """Caption the challenge's folder; returns 2 where an image could not be read."""
    args = get_parser().parse_args(argv)
    set_max_pixels(args.max_pixels)
    check_offloading(args)
    out = output_file(args)
    decoding, paths = predict.decoding_config(args), find_images(args.images)
    with lock(out, "--ofile"):
        done = read_done(out)
        made = made_by(args, decoding)
        check_made_by(out, made, done)
        return caption_rest(args, decoding, paths, out, done, made)


def caption_rest(args, decoding, paths, out, captions, made):
    """Caption the images that have no caption yet.

    Args:
        made: what `made_by` returns; the others as in `caption_folder`.
    Returns: as `main`.
    """
    todo = [path for path in paths if not captions.get(result_id(path))]
    if len(todo) < len(paths):
        note(f"going on: {len(paths) - len(todo):,} of {len(paths):,} images are captioned")
    if not todo:
        write_results(out, captions)  # the csv may be older, after a kill
        return 0
    check_captioner(args.checkpoint, args.clip_model_type)
    with late_imports():
        from features.loader import prepare_readers
        from models.captioner import captioner_of
    workers = 0 if len(todo) <= args.batch_size else args.num_workers
    prepare_readers(len(todo), workers)
    captioner = captioner_of(args)
    if args.prefix_length not in (None, captioner.model.config.prefix_length):
        own = captioner.model.config.prefix_length
        raise ValueError(
            f"--prefix_length {args.prefix_length} contradicts {args.checkpoint}, whose prefix is {own} long"
        )
    write_json(made_by_path(out), made)
    try:
        unreadable = caption_folder(captioner, todo, decoding, args.batch_size, workers, out, captions)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    note(f"{out} and {out.with_suffix('.csv').name}: {len(captions):,} captions")
    if unreadable:
        note(f"error: {unreadable} of {len(paths)} images could not be read; their captions are empty")
        return 2
    return 0


if __name__ == "__main__":
    run(main)
