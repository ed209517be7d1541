"""Tars -> captions on a Spark cluster: predict.py's words, and how many captioners there are.

    python docs/examples/spark_captions.py 8 "cc12m/{00000..00999}.tar" --out captions/ --checkpoint checkpoint.pt

Each of Spark's tasks loads a captioner and takes its share of the tars; finished ones stay. Tars, --out and this
repository are where all machines see them.
"""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, ROOT)

from pyspark.sql import SparkSession  # noqa: E402


def caption_tars(words, root, numbers):
    """Caption some of the tars in one of Spark's processes.

    Args:
        words: of predict.py.
        root: of this repository.
        numbers: which tars.
    Yields: the exit status that predict.py would have had, for each.
    """
    sys.path.insert(0, root)
    import predict
    from features.extraction import Reading
    from features.sources import Tars
    from features.tars import expand_tars
    from models.bulk import CaptionFolder, caption_parts
    from models.captioner import captioner_of
    from models.made_by import made_by

    args = predict.get_parser().parse_args(words)
    decoding, parts = predict.decoding_config(args), Tars(expand_tars(args.images), False).parts()
    captioner = captioner_of(args)
    for number in numbers:
        folder = CaptionFolder(args.out, made_by(args, decoding))
        reading = Reading(args.batch_size or predict.BATCH, 0)
        yield caption_parts(captioner, [parts[number]], folder, decoding, reading)


def main(captioners, *words):
    """Share the tars out; returns the exit status."""
    import predict
    from features.tars import expand_tars

    tars = expand_tars(predict.get_parser().parse_args(words).images)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.appName("captions").getOrCreate()
    numbers, words, root = spark.sparkContext.parallelize(range(len(tars)), int(captioners)), list(words), ROOT
    statuses = numbers.mapPartitions(lambda own: caption_tars(words, root, own)).collect()
    spark.stop()
    print(f"{len(statuses):,} tars, {sum(map(bool, statuses)):,} of them with errors")
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
