"""Text embeddings in place of image embeddings: mapped to where images lie, and rotated by noise.

CLIP's two towers put a text and its image into different regions (the modality gap), and an image holds more than its
caption says. A captioner that is trained on texts is given images later. So texts are mapped to where a few images lie,
and each draw is rotated by an angle (CapDec adds noise of a given size; an angle does not depend on the width) in a
direction in which images differ from their captions. That needs no image-caption pairs: CLIP itself finds the text that
is nearest to an image. Axes: N texts, M images, B batch, D CLIP width.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

SAMPLED = 50_000  # texts, at most, that images are compared with; spread evenly
FEWEST, MOST = 32, 2000  # images: fewest that the map can be fitted to, most that are used
PENALTIES = 10.0 ** torch.arange(-3, 6)  # ridge penalties to try, in units of a text's mean square
CHUNK = 500  # images compared at a time


class MatchedTexts:
    """Normalised text embeddings, mapped to where images lie; used as a store's `clip_embedding`."""

    def __init__(self, texts, images=None):
        """Fit the map.

        Args:
            texts: [N, D] tensor or MappedEmbeddings.
            images: [M, D], the same; None: the texts are only normalised.
        """
        self.texts, self.shape = texts, texts.shape
        self.mean, self.wanted, self.map = torch.zeros(self.shape[1]), torch.zeros(self.shape[1]), None
        self.angle = self.directions = None
        if images is not None:
            self._match(_sample(texts, SAMPLED), _sample(images, MOST))

    def _match(self, texts, images):
        """Fit the map from texts to images: it gives texts the images' mean and maps deviations from the mean.

        Each image is paired with its nearest text, means subtracted from both. The residuals of the leave-one-out fit
        give `directions` [at most D, D], whose random sums are spread as the residuals are, and `angle`, the median
        angle in degrees between an image and its mapped text.
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
    """Rotates embeddings by an angle, in directions that seed, epoch and caption number alone decide."""

    def __init__(self, angle, seed, directions=None):
        """Set the noise.

        Args:
            angle: in degrees, between 0 and 90.
            directions: [K, D], whose random sums are the noise; None: isotropic noise.
        """
        self.angle, self.seed, self.directions = math.radians(angle), seed, directions

    def __call__(self, embeddings, numbers, epoch):
        """Rotate embeddings.

        Args:
            embeddings: [B, D] of length 1.
            numbers: [B] caption numbers.
        Returns: [B, D] of length 1, each rotated by the angle.
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
    """Fit a linear map by ridge regression towards a scalar factor; leave-one-out errors choose the penalty.

    Args:
        texts, images: [M, D] each, of mean 0.
    Returns: ([D, D] map, [M, D] texts, each mapped by a fit to all others).
    """
    factor = (texts * images).sum() / (texts * texts).sum().clamp_min(1e-12)
    rest = images - factor * texts
    left, sizes, axes = torch.linalg.svd(texts, full_matrices=False)
    weight = sizes.square().sum() / len(texts)
    best, error = None, math.inf
    for penalty in PENALTIES * weight:
        kept = sizes.square() / (sizes.square() + penalty.clamp_min(1e-12))
        own = (left.square() * kept).sum(1, keepdim=True)  # leverage: the share of each pair in its own fit
        fitted = (left * kept) @ (left.T @ rest)
        alone = (fitted - own * rest) / (1 - own).clamp_min(1e-3)
        now = (rest - alone).square().sum().item()
        if now < error:
            error, best = now, (factor * torch.eye(texts.shape[1]), kept / sizes.clamp_min(1e-12), alone)
    start, scale, alone = best
    return start + axes.T * scale @ (left.T @ rest), factor * texts + alone


def _sample(embeddings, most):
    """Return at most `most` rows, spread evenly, as float32 of length 1."""
    rows = np.unique(np.linspace(0, len(embeddings) - 1, most).astype(int))
    return F.normalize(torch.as_tensor(embeddings[torch.from_numpy(rows)]).float(), dim=-1)
