"""Texts' embeddings in the place of images': moved to where images lie, and turned by noise.

CLIP's two towers put a text and its image into different regions, some way apart, and an image tells more than its
caption. A captioner that is trained on texts meets images later. So texts are mapped to where a few images lie, and
each draw is turned by an angle (as CapDec adds noise of a given size; an angle does not depend on the width) into a
direction in which images differ from what is said of them. That needs no pairs: CLIP itself finds the text that is
nearest to an image. Axes: N texts, M images, B batch, D CLIP width.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

SAMPLED = 50_000  # texts at most, spread evenly, that images are compared with
FEWEST, MOST = 32, 2000  # images that the map can be found of, and that are looked at
PENALTIES = 10.0 ** torch.arange(-3, 6)  # of the map, in units of what one text weighs; the best one is found
CHUNK = 500  # images compared at a time


class MatchedTexts:
    """Text embeddings, normalised, where images lie: a store's `clip_embedding`."""

    def __init__(self, texts, images=None):
        """Find the map.

        Args:
            texts: [N, D] tensor or MappedEmbeddings.
            images: [M, D], the same; None: the texts are normalised alone.
        """
        self.texts, self.shape = texts, texts.shape
        self.mean, self.wanted, self.map = torch.zeros(self.shape[1]), torch.zeros(self.shape[1]), None
        self.angle = self.directions = None
        if images is not None:
            self._match(_sample(texts, SAMPLED), _sample(images, MOST))

    def _match(self, texts, images):
        """Give the texts the images' mean, and map what they differ in to what images then differ in.

        An image is taken for the image of the text that is nearest, both seen from their means. What the map leaves of
        it, when it is left out of those that the map is fitted to, are `directions` [at most D, D], whose random sums
        are spread as it is; `angle` in degrees is how far it turns an image, by the median.
        """
        self.mean, self.wanted = texts.mean(0), images.mean(0)
        texts, apart = texts - self.mean, images - self.wanted
        unit = F.normalize(texts, dim=-1).T
        nearest = torch.cat([(F.normalize(part, dim=-1) @ unit).argmax(1) for part in apart.split(CHUNK)])
        self.map, mapped = _fit(texts[nearest], apart)
        cosines = F.cosine_similarity(mapped + self.wanted, images, dim=-1)
        self.angle = math.degrees(math.acos(cosines.median().clamp(-1, 1)))
        _, sizes, axes = torch.linalg.svd(apart - mapped, full_matrices=False)
        self.directions = sizes[:, None] * axes

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, rows):
        """Return [B, D] float32 rows of length 1."""
        texts = F.normalize(torch.as_tensor(self.texts[rows]).float(), dim=-1)
        if self.map is None:
            return texts
        return F.normalize((texts - self.mean) @ self.map + self.wanted, dim=-1)


class AngleNoise:
    """Turns embeddings by an angle, into directions that seed, epoch and caption number alone decide."""

    def __init__(self, angle, seed, directions=None):
        """Set the noise.

        Args:
            angle: in degrees, between 0 and 90.
            directions: [K, D], of whose random sums the noise is; None: all directions are alike.
        """
        self.angle, self.seed, self.directions = math.radians(angle), seed, directions

    def __call__(self, embeddings, numbers, epoch):
        """Turn embeddings.

        Args:
            embeddings: [B, D] of length 1.
            numbers: [B] caption numbers.
        Returns: [B, D] of length 1, each at the angle from its own.
        """
        width = embeddings.shape[1] if self.directions is None else len(self.directions)
        drawn = [
            np.random.default_rng((self.seed, epoch, number)).standard_normal(width, np.float32)
            for number in numbers.tolist()
        ]
        noise = torch.from_numpy(np.stack(drawn))
        if self.directions is not None:
            noise = noise @ self.directions
        across = noise - (noise * embeddings).sum(1, keepdim=True) * embeddings
        return embeddings * math.cos(self.angle) + F.normalize(across, dim=-1) * math.sin(self.angle)


def _fit(texts, images):
    """Fit a linear map by ridge regression, towards one factor for all directions; left out, each judges the others.

    Args:
        texts, images: [M, D] each, of mean 0.
    Returns: ([D, D] map, [M, D] what texts are mapped to by the map of all others).
    """
    factor = (texts * images).sum() / (texts * texts).sum().clamp_min(1e-12)
    rest = images - factor * texts
    left, sizes, axes = torch.linalg.svd(texts, full_matrices=False)
    weight = sizes.square().sum() / len(texts)
    best, error = None, math.inf
    for penalty in PENALTIES * weight:
        kept = sizes.square() / (sizes.square() + penalty.clamp_min(1e-12))
        own = (left.square() * kept).sum(1, keepdim=True)  # how much an image tells of itself
        fitted = (left * kept) @ (left.T @ rest)
        alone = (fitted - own * rest) / (1 - own).clamp_min(1e-3)
        now = (rest - alone).square().sum().item()
        if now < error:
            error, best = now, (factor * torch.eye(texts.shape[1]), kept / sizes.clamp_min(1e-12), alone)
    start, scale, alone = best
    return start + axes.T * scale @ (left.T @ rest), factor * texts + alone


def _sample(embeddings, most):
    """Return at most so many rows, spread evenly, as float32 of length 1."""
    rows = np.unique(np.linspace(0, len(embeddings) - 1, most).astype(int))
    return F.normalize(torch.as_tensor(embeddings[torch.from_numpy(rows)]).float(), dim=-1)
