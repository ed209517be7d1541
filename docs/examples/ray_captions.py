"""Tars -> captions on a Ray cluster: predict.py's words, and how many captioners there are.

    python docs/examples/ray_captions.py 8 "cc12m/{00000..00999}.tar" --out captions/ --checkpoint checkpoint.pt

Each captioner loads once and takes tars as they come; finished ones stay. Tars, --out and this repository are where all
machines see them. With GPUs each captioner has one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ray  # noqa: E402

import predict  # noqa: E402
from features.extraction import Reading  # noqa: E402
from features.sources import Tars  # noqa: E402
from features.tars import expand_tars  # noqa: E402
from models.bulk import CaptionFolder, caption_parts  # noqa: E402
from models.captioner import captioner_of  # noqa: E402
from models.made_by import made_by  # noqa: E402


class CaptionTar:
    """A captioner in a process of its own."""

    def __init__(self, words):
        """Load it; `words` are those of predict.py."""
        self.args = predict.get_parser().parse_args(words)
        self.decoding = predict.decoding_config(self.args)
        self.parts = Tars(expand_tars(self.args.images), False).parts()
        self.captioner = captioner_of(self.args)

    def __call__(self, row):
        """Caption one tar; returns its row with the exit status that predict.py would have had."""
        folder = CaptionFolder(self.args.out, made_by(self.args, self.decoding))
        reading = Reading(self.args.batch_size or predict.BATCH, 0)
        status = caption_parts(self.captioner, [self.parts[row["id"]]], folder, self.decoding, reading)
        return {"tar": self.parts[row["id"]].path, "status": status}


def main(captioners, *words):
    """Share the tars out; returns the exit status."""
    tars = expand_tars(predict.get_parser().parse_args(words).images)
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    rows = ray.data.range(len(tars), override_num_blocks=len(tars)).map(
        CaptionTar, fn_constructor_args=[list(words)], concurrency=int(captioners), num_gpus=gpus
    )
    statuses = [row["status"] for row in rows.take_all()]
    print(f"{len(statuses):,} tars, {sum(map(bool, statuses)):,} of them with errors")
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
