"""How sure a score is: bootstrap intervals over images, and a paired comparison of two systems.

A sample draws N images with replacement; each metric is computed anew from sums of per-image statistics. For CIDEr the
document frequencies stay those of the whole set, as they do for a published score of one image.
"""

import numpy as np

from metrics.coco import from_sums

LEVEL = 0.95
CHUNK = 100  # samples at a time: bounds memory at CHUNK x images


def intervals(scores, samples=1000, seed=0):
    """Return {metric: (low, high)}, percentile intervals of 95 %.

    Args:
        scores: metrics.coco.Scores of N images.
        samples: bootstrap samples.
        seed: of the draw.
    """
    return _percentiles(_values(scores, _draws(len(scores.ids), samples, seed)))


def compare(first, second, samples=1000, seed=0):
    """Compare two systems on the same images.

    Args:
        first, second: metrics.coco.Scores with equal ids in equal order.
        samples: samples of each of the two procedures.
        seed: of both.
    Returns: {metric: {"difference": first - second, "interval": (low, high) by paired bootstrap,
        "p_value": of a two-sided paired randomisation test that swaps the systems' captions image by image}}.
    Raises: ValueError where the images differ.
    """
    if first.ids != second.ids:
        raise ValueError("the two systems must have captions of the same images in the same order")
    images, common = len(first.ids), [name for name in first.statistics if name in second.statistics]
    ones = np.ones((1, images))
    observed = _difference(_values(first, [ones], common), _values(second, [ones], common))
    drawn = [_values(system, _draws(images, samples, seed), common) for system in (first, second)]
    swapped = _difference(*_swap(first, second, common, samples, seed))
    bounds = _percentiles(_difference(*drawn))
    return {
        name: {
            "difference": float(value[0]),
            "interval": bounds[name],
            # the observed assignment is one of the possible ones, hence + 1; the tolerance absorbs rounding
            "p_value": float((1 + np.sum(np.abs(swapped[name]) >= abs(value[0]) - 1e-12)) / (samples + 1)),
        }
        for name, value in observed.items()
    }


def _draws(images, samples, seed):
    """Yield [<= CHUNK, N] how often each image is in each sample."""
    rng = np.random.default_rng(seed)
    for start in range(0, samples, CHUNK):
        rows = min(CHUNK, samples - start)
        drawn = rng.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(float)


def _values(scores, draws, names=None):
    """Return {metric: [samples]} over drawn images."""
    names = list(scores.statistics) if names is None else names
    parts = [[from_sums(n, counts @ scores.statistics[n], len(scores.ids)) for n in names] for counts in draws]
    return _joined(parts)


def _swap(first, second, names, samples, seed):
    """Return {metric: [samples]} of two systems after swapping them on a random half of the images."""
    rng = np.random.default_rng(seed)
    images, sides = len(first.ids), ([], [])
    for start in range(0, samples, CHUNK):
        keep = rng.integers(2, size=(min(CHUNK, samples - start), images)).astype(float)
        for side, mask in zip(sides, (keep, 1 - keep), strict=True):
            sums = {n: mask @ first.statistics[n] + (1 - mask) @ second.statistics[n] for n in names}
            side.append([from_sums(n, total, images) for n, total in sums.items()])
    return [_joined(side) for side in sides]


def _joined(parts):
    """Concatenate chunks of lists of {metric: [rows]} into one {metric: [samples]}."""
    merged = [{name: values for part in chunk for name, values in part.items()} for chunk in parts]
    return {name: np.concatenate([chunk[name] for chunk in merged]) for name in merged[0]}


def _difference(first, second):
    return {name: first[name] - second[name] for name in first}


def _percentiles(values):
    tail = 50 * (1 - LEVEL)
    return {name: tuple(float(v) for v in np.percentile(value, (tail, 100 - tail))) for name, value in values.items()}
