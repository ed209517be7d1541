"""Texts' embeddings in the place of images': moved to where images lie, and turned by noise.

CLIP's two towers put a text and its image into different regions, some way apart. A captioner that is trained on texts
meets images later, so their mean and deviation per dimension become those of a few images (as TOMCap matches them),
and each draw is turned into a random direction by an angle (as CapDec adds noise of a given size; an angle does not
depend on the width). Axes: N texts, B batch, D CLIP width.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

SAMPLED = 10_000  # rows at most that mean, deviation and angle are taken of
FEWEST = 32  # images that mean and deviation can be taken of


class MatchedTexts:
    """Text embeddings, normalised, with the mean and deviation per dimension of images: a store's `clip_embedding`."""

    def __init__(self, texts, images=None):
        """Measure both.

        Args:
            texts: [N, D] tensor or MappedEmbeddings.
            images: the same of the images whose distribution is taken on; None: the texts are normalised alone.
        """
        self.texts, self.shape = texts, texts.shape
        self.scale, self.shift = torch.ones(self.shape[1]), torch.zeros(self.shape[1])
        if images is not None:
            (mean, deviation), (wanted, spread) = _moments(texts), _moments(images)
            self.scale = spread / deviation.clamp_min(1e-6)  # a dimension in which all texts agree stays so
            self.shift = wanted - mean * self.scale

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, rows):
        """Return [B, D] float32 rows of length 1."""
        texts = F.normalize(torch.as_tensor(self.texts[rows]).float(), dim=-1)
        return F.normalize(texts * self.scale + self.shift, dim=-1)


class AngleNoise:
    """Turns embeddings by an angle, into directions that seed, epoch and caption number alone decide."""

    def __init__(self, angle, seed):
        """Set the noise.

        Args:
            angle: in degrees, between 0 and 90.
        """
        self.angle, self.seed = math.radians(angle), seed

    def __call__(self, embeddings, numbers, epoch):
        """Turn embeddings.

        Args:
            embeddings: [B, D] of length 1.
            numbers: [B] caption numbers.
        Returns: [B, D] of length 1, each at the angle from its own.
        """
        width = embeddings.shape[1]
        drawn = [
            np.random.default_rng((self.seed, epoch, number)).standard_normal(width, np.float32)
            for number in numbers.tolist()
        ]
        noise = torch.from_numpy(np.stack(drawn))
        across = noise - (noise * embeddings).sum(1, keepdim=True) * embeddings
        return embeddings * math.cos(self.angle) + F.normalize(across, dim=-1) * math.sin(self.angle)


def nearest_angle(texts, images):
    """Return the median angle, in degrees, between an image and the nearest of the texts.

    Where texts are many, the nearest one says about what a caption of the image would say, so that this is about the
    angle between an image and its caption, without knowing which is whose.

    Args:
        texts: MatchedTexts.
        images: [N, D] tensor or MappedEmbeddings.
    """
    texts, images = _sample(texts), F.normalize(_sample(images), dim=-1)
    nearest = torch.cat([(part @ texts.T).max(1).values for part in images.split(500)])
    return math.degrees(math.acos(nearest.median().clamp(-1, 1)))


def _sample(embeddings):
    """Return at most SAMPLED rows, spread evenly, as float32."""
    rows = np.unique(np.linspace(0, len(embeddings) - 1, SAMPLED).astype(int))
    return torch.as_tensor(embeddings[torch.from_numpy(rows)]).float()


def _moments(embeddings):
    """Return ([D] mean, [D] deviation) of normalised rows."""
    rows = F.normalize(_sample(embeddings), dim=-1)
    return rows.mean(0), rows.std(0, correction=0)
