"""Caption images: files, folders or globs -> captions.

    python predict.py photo.jpg
    python predict.py photos/ --checkpoint coco_train/coco_prefix_latest.pt --use_beam_search --out captions.json

prints `path<TAB>caption` per image. A checkpoint that train.py wrote needs no other flag; a predecessor's bare .pt is
recognised from its keys and shapes. `class Predictor` is the same for other code.
"""

if __name__ == "__main__":
    import utils.interrupt  # noqa: F401  Ctrl-C during the imports below

import contextlib
import os
from pathlib import Path

import torch

from features.images import add_max_pixels_flag, set_max_pixels
from features.listing import as_line, find_images
from features.loader import prepare_readers
from features.results import name_shared, record, shared_ids, write_results
from models.captioner import Captioner, captioner_files
from models.decoding import BEAM, GREEDY, SAMPLE, DecodingConfig
from models.pretrained import ALIASES, NAMES
from utils.cli import (
    Parser,
    non_negative_int,
    note,
    positive_float,
    positive_int,
    progress_bar,
    run,
)  # fmt: skip
from utils.devices import add_device_flags
from utils.outputs import check_output, lock
from utils.precision import add_dtype_flag


def get_parser():
    """Return the command line's parser."""
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file, folder, or quoted glob")
    parser.add_argument(
        "--out", metavar="FILE", help="also write [{image_id, caption}], COCO's result format, or the same as .csv"
    )
    add_captioner_flags(parser)
    return parser


def add_captioner_flags(parser):
    """Add what every captioning command takes: captioner, decoding, batches, devices."""
    model = parser.add_argument_group("captioner")
    model.add_argument("--checkpoint", default="coco", help=f"{', '.join(NAMES)}, or a file (default: coco)")
    model.add_argument("--clip_model_type", help="encoder, where the checkpoint does not say or it has moved")
    model.add_argument("--language_model", help="its folder or name, where the checkpoint does not say or it has moved")
    model.add_argument(
        "--normalize_prefix", action="store_true", default=None, help="for a bare checkpoint trained with it"
    )
    defaults = DecodingConfig()
    decoding = parser.add_argument_group("decoding (greedy unless told otherwise)")
    decoding.add_argument("--use_beam_search", action="store_true", help="beam search")
    decoding.add_argument("--beam_size", type=positive_int, default=defaults.beam_size, help="beams")
    decoding.add_argument(
        "--length_penalty", type=float, default=defaults.length_penalty,
        help="exponent of the length in a beam's mean log-probability; above 1 favours long captions",
    )  # fmt: skip
    decoding.add_argument("--top_p", type=positive_float, help="sample from this much of the probability")
    decoding.add_argument("--temperature", type=positive_float, default=defaults.temperature, help="of sampling")
    decoding.add_argument("--num_captions", type=positive_int, default=1, help="captions per image")
    decoding.add_argument("--seed", type=non_negative_int, default=defaults.seed, help="of sampling")
    decoding.add_argument("--entry_length", type=positive_int, default=defaults.entry_length, help="tokens at most")
    decoding.add_argument("--prompt", default=defaults.prompt, help="text that captions go on from")
    decoding.add_argument(
        "--decoder", choices=("clipcap", "transformers"), default="clipcap", help="whose search: ours or the library's"
    )
    decoding.add_argument(
        "--stop_token", default=defaults.stop_token, help="text that ends a caption (default: %(default)r)"
    )
    batches = parser.add_argument_group("batches")
    batches.add_argument("--batch_size", type=positive_int, default=32, help="images at a time")
    batches.add_argument(
        "--num_workers", type=non_negative_int, default=min(4, os.cpu_count() or 1), help="processes that read images"
    )
    add_max_pixels_flag(batches)
    add_device_flags(parser)
    add_dtype_flag(batches)


def decoding_config(args):
    """Return the DecodingConfig that the command line asks for.

    Raises: ValueError for flags that contradict each other.
    """
    if args.use_beam_search is None:  # a variant's default
        args.use_beam_search = args.top_p is None
    if args.use_beam_search and args.top_p is not None:
        raise ValueError("--use_beam_search and --top_p contradict each other: beam search does not sample")
    sampling = args.top_p is not None or (args.temperature != 1 and not args.use_beam_search)
    return DecodingConfig(
        method=BEAM if args.use_beam_search else SAMPLE if sampling else GREEDY,
        decoder=args.decoder,
        prompt=args.prompt,
        beam_size=args.beam_size,
        entry_length=args.entry_length,
        stop_token=args.stop_token,
        top_p=args.top_p if args.top_p is not None else 1.0,
        temperature=args.temperature,
        length_penalty=args.length_penalty,
        num_captions=args.num_captions,
        seed=args.seed,
    )


def check_out(args, paths):
    """Refuse an --out that cannot be written or is one of the inputs; raises ValueError."""
    captioner = captioner_files(args.checkpoint, args.clip_model_type, args.language_model)
    inputs = {"one of the images": paths if os.path.exists(args.out) else (), "the captioner": captioner}
    check_output("--out", args.out, inputs, (".json", ".csv") if Path(args.out).suffix else ())


def captioner_of(args):
    """Return the Captioner that the command line asks for."""
    return Captioner(
        args.checkpoint, args.clip_model_type, args.language_model, args.normalize_prefix, args.device, args.pn,
        args.dtype, args.offload_dir, args.max_memory,
    )  # fmt: skip


class Predictor:
    """Captions one image at a time, as the predecessor's class of this name does."""

    def setup(self, models=("coco", "conceptual"), device=None):
        """Say which captioners there are; each is loaded when it is first asked for.

        Args:
            models: names or files, the first being the default; or {name: file}.
            device: torch device; None takes a GPU if there is one.
        """
        self.checkpoints = dict(models) if isinstance(models, dict) else {name: name for name in models}
        self.device, self.captioners = device, {}

    def captioner(self, model=None):
        """Return the captioner of one of the names given to `setup`; None is the first.

        Raises: ValueError where there is no such model.
        """
        model = ALIASES.get(model, model) if model else next(iter(self.checkpoints))
        if model not in self.checkpoints:
            raise ValueError(f"model {model!r} is not one of {', '.join(self.checkpoints)}")
        if model not in self.captioners:
            self.captioners[model] = Captioner(self.checkpoints[model], device=self.device)
        return self.captioners[model]

    def predict(self, image, model=None, use_beam_search=False):
        """Caption one image.

        Args:
            image: path of an image file.
            model: one of the names given to `setup`; None is the first.
            use_beam_search: beam search instead of greedy decoding.
        Returns: the caption.
        Raises: ValueError where there is no such model or the image cannot be read.
        """
        decoding = DecodingConfig(method=BEAM if use_beam_search else GREEDY)
        captions, errors = next(self.captioner(model).caption_files([image], decoding))
        if errors:
            raise ValueError(f"{image}: {errors[image]}")
        return captions[image][0].text


def caption_all(captioner, paths, decoding, batch_size, num_workers, results):
    """Caption files, printing each as it is done.

    Args:
        results: {path: result in COCO's format} that each image is added to.
    Returns: {path: why it could not be read}.
    """
    unreadable = {}
    with progress_bar(len(paths), "images", "img") as bar:
        for captions, errors in captioner.caption_files(paths, decoding, batch_size, num_workers):
            results |= {path: record(path, group) for path, group in captions.items()}  # kept if printing fails
            for path, group in captions.items():
                for caption in group:
                    bar.write(f"{as_line(path)}\t{' '.join(caption.text.split())}")
            for path, reason in errors.items():
                note(f"skipped {as_line(path)}: {reason}")
            unreadable |= errors
            bar.update(len(captions) + len(errors))
    return unreadable


@contextlib.contextmanager
def results_kept(args, paths, results):
    """Hold --out for the time of the body, and write what results there are then, however it ends."""
    if not args.out:
        yield
        return
    shared = shared_ids(paths)
    if shared:
        number = sum(map(len, shared.values()))
        note(
            f"warning: {number:,} images share an image_id with another ({name_shared(shared)}), of which evaluate.py "
            "takes one caption each; rename the files"
        )
    with lock(args.out):
        try:
            yield
        finally:
            if results:
                write_results(args.out, results, shared)


def main(argv=None, parser=None):
    """Caption what the command line names; returns 2 where an image could not be read.

    `parser` is that of a variant of this command.
    """
    args = (parser or get_parser()).parse_args(argv)
    set_max_pixels(args.max_pixels)
    decoding, paths = decoding_config(args), find_images(args.images)
    if args.out:
        check_out(args, paths)
    results = {}
    try:
        with results_kept(args, paths, results):
            workers = 0 if len(paths) <= args.batch_size else args.num_workers
            prepare_readers(len(paths), workers)
            captioner = captioner_of(args)
            unreadable = caption_all(captioner, paths, decoding, args.batch_size, workers, results)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(results)} of {len(paths)} images are captioned") from None
    except Exception:
        if results:
            note(f"warning: {len(results)} of {len(paths)} images are captioned{f', in {args.out}' * bool(args.out)}")
        raise
    if unreadable:
        others = "; the others are captioned" if results else ""
        note(f"error: {len(unreadable)} of {len(paths)} images could not be read{others}")
        return 2
    return 0


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    run(main)
