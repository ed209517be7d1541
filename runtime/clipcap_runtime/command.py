"""Caption images with an exported captioner: `clipcap DIR IMAGE...` prints `path<TAB>caption`, as predict.py does."""

import argparse
import glob
import os
import sys

from clipcap_runtime.captioner import SETTINGS, Captioner
from clipcap_runtime.images import ImageError, read_image

SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .avif".split()
ESCAPED = {ord(letter): repr(letter)[1:-1] for letter in "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}


def get_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser("clipcap", description=__doc__)
    parser.add_argument("captioner", metavar="DIR", help="folder that export.py wrote")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file, folder, or quoted glob")
    parser.add_argument("--use_beam_search", dest="method", action="store_const", const="beam", help="beam search")
    for name, (kind, what, _) in SETTINGS.items():
        if name != "method":
            kind = float if kind == (int, float) else kind
            parser.add_argument(f"--{name}", type=kind, help=f"{what} (default: as captioner.json says)")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
    return parser


def find_images(arguments):
    """Return the files that paths, folders and globs name, each once; raises ValueError for one that names none."""
    paths = []
    for argument in arguments:
        if os.path.isdir(argument):
            names = sorted(name for name in os.listdir(argument) if not name.startswith("."))
            found = [os.path.join(argument, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
        else:
            found = [argument] if os.path.lexists(argument) else sorted(glob.glob(argument, recursive=True))
        if not found:
            raise ValueError(f"{argument or repr(argument)} is no image file, nor a folder or glob with images")
        paths += map(os.path.normpath, found)
    return list(dict.fromkeys(paths))


def as_line(path):
    """Return a file's name as one line: line breaks, tabs and bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace").translate(ESCAPED)


def caption_all(args):
    """Caption what the command line names; raises ValueError, for unreadable pictures only at the end."""
    if args.batch_size < 1 or (args.threads or 1) < 1:
        raise ValueError("--batch_size and --threads are at least 1")
    paths = find_images(args.images)
    captioner, unreadable = Captioner(args.captioner, args.threads), 0
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    if "top_p" in given or (given.get("temperature", 1) != 1 and captioner.settings({})["method"] == "greedy"):
        if "method" in given:
            raise ValueError("--use_beam_search and --top_p contradict each other: beam search does not sample")
        given = {"method": "sample", "top_p": 1.0} | given
    captioner.settings(given)
    for start in range(0, len(paths), args.batch_size):
        read = {}
        for path in paths[start : start + args.batch_size]:
            try:
                read[path] = captioner.preprocess(read_image(path))
            except ImageError as error:
                print(f"skipped {as_line(path)}: {error}", file=sys.stderr)
                unreadable += 1
        for path, group in zip(read, captioner.caption_pixels(list(read.values()), list(read), **given), strict=True):
            for caption in group:
                print(f"{as_line(path)}\t{' '.join(caption.text.split())}", flush=True)
    if unreadable:
        others = "; the others are captioned" if unreadable < len(paths) else ""
        raise ValueError(f"{unreadable} of {len(paths)} images could not be read{others}")


def main(argv=None):
    """Run the command; exits with 2, after one line, for bad input or where a picture could not be read."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        caption_all(get_parser().parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
