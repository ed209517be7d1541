"""How sure a score is: bootstrap intervals over images, and a paired comparison of two systems.

A sample draws N images with replacement; each metric is computed anew from sums of per-image statistics. For CIDEr,
document frequencies are always counted on the whole set, as for published scores of single images.
"""

import numpy as np

from metrics.coco import from_sums

TAILS = (2.5, 97.5)  # percentiles of a 95 % interval
CHUNK = 100  # samples at a time: bounds memory at CHUNK x images


def intervals(scores, samples=1000, seed=0):
    """Return {metric: (low, high)}, percentile intervals of 95 %.

    Args:
        scores: metrics.coco.Scores of N images.
        samples: bootstrap samples.
        seed: of the draw.
    """
    rng, images = np.random.default_rng(seed), len(scores.ids)
    return _percentiles(_sampled(samples, lambda rows: _metrics([(scores, _draw(rng, rows, images))])))


def compare(first, second, samples=1000, seed=0):
    """Compare two systems on the same images.

    Args:
        first, second: metrics.coco.Scores with equal ids in equal order.
        samples: number of samples for each of the two procedures.
        seed: for both.
    Returns: {metric: {"difference": first - second, "interval": (low, high) by paired bootstrap, None for one image,
        "p_value": of a two-sided paired randomisation test that swaps the systems' captions image by image}}.
    Raises: ValueError where the images differ.
    """
    if first.ids != second.ids:
        raise ValueError("the two systems must have captions of the same images in the same order")
    rng, images = np.random.default_rng(seed), len(first.ids)

    def difference(own, other):
        """Metrics' differences if each side takes its own captions `own` [B, N] times, the other's `other` times."""
        left = _metrics([(first, own), (second, other)])
        right = _metrics([(second, own), (first, other)])
        return {name: left[name] - right[name] for name in left if name in right}

    def swapped(rows):
        keep = rng.integers(2, size=(rows, images)).astype(float)
        return difference(keep, 1 - keep)

    none = np.zeros((1, images))
    observed = difference(none + 1, none)
    bounds = _percentiles(_sampled(samples, lambda rows: difference(_draw(rng, rows, images), none)))
    random = _sampled(samples, swapped)
    return {
        name: {
            "difference": float(value[0]),
            "interval": bounds[name] if images > 1 else None,  # one image cannot vary
            # the observed assignment is one of the possible ones, hence + 1; the tolerance absorbs rounding
            "p_value": float((1 + np.sum(np.abs(random[name]) >= abs(value[0]) - 1e-12)) / (samples + 1)),
        }
        for name, value in observed.items()
    }


def _draw(rng, rows, images):
    """Return how often each image is in each sample, [rows, N]."""
    drawn = rng.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(float)


def _metrics(parts):
    """Return {metric: [B]} of samples mixed from systems; parts: (Scores, how often each image is taken [B, N])."""
    values, names = {}, [name for name in parts[0][0].statistics if all(name in s.statistics for s, _ in parts)]
    for name in names:
        sums = sum(counts @ scores.statistics[name] for scores, counts in parts)
        values |= from_sums(name, sums, len(parts[0][0].ids))
    return values


def _sampled(samples, values):
    """Join what `values(rows)` gives for chunks of samples: {metric: [samples]}."""
    parts = [values(min(CHUNK, samples - start)) for start in range(0, samples, CHUNK)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _percentiles(values):
    return {name: tuple(float(v) for v in np.percentile(value, TAILS)) for name, value in values.items()}
