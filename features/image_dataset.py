"""Feature store -> batches of images, for objectives that learn per image, not per caption.

Axes: N images, B batch, D CLIP width.
"""

import numpy as np
import torch

from features.dataset import gathered_ahead
from utils.cli import note


def images_of(store):
    """Return {image id: (its row, [its captions])} of a FeatureStore; empty captions are left out.

    Predecessors' stores have a row per caption: an image's first row is taken.
    """
    images = {}
    for record in store.captions:
        if record["caption"].strip():
            images.setdefault(_id(record), (record["clip_embedding"], []))[1].append(record["caption"])
    return images


def _id(record):
    """Return what identifies a caption's image: its id, or its row where it has no id."""
    image_id = record.get("image_id")
    return ("row", record["clip_embedding"]) if image_id is None else image_id


class ImageDataset:
    """The images of a store, each with its references, where it has any."""

    unit = "images"
    text_lengths = None  # images have none

    def __init__(self, store, with_references):
        """Index the store's images.

        Args:
            store: FeatureStore.
            with_references: leave out images without a caption.
        Raises: ValueError where no image is left.
        """
        self.store, self.clip_embedding = store, store.clip_embedding
        images = images_of(store)
        rows = [row for row, _ in images.values()]
        self.references = [texts for _, texts in images.values()]  # [N] lists of captions
        named = {record["clip_embedding"] for record in store.captions if _id(record) in images}
        lacking = [row for row in range(len(store.clip_embedding)) if row not in named]
        if not with_references:
            rows += lacking
            self.references += [[] for _ in lacking]
        elif lacking:
            note(f"warning: {len(lacking):,} images without captions are left out")
        if not rows:
            raise ValueError(
                f"--data {store.path} holds no captions to compare with: pass --reward clip, which needs none"
            )
        self.embedding_index = np.asarray(rows)

    def __len__(self):
        return len(self.embedding_index)

    def batch(self, indices):
        """Return (numbers of the images [B], clip_embedding [B, D] float32)."""
        indices = np.asarray(indices)
        rows = torch.from_numpy(self.embedding_index[indices])
        return torch.from_numpy(indices), self.clip_embedding[rows].float()

    def batches(self, order, pin_memory=False, epoch=0):
        """Yield the batches of `order`, the same in every epoch; see `gathered_ahead`."""
        return gathered_ahead(self.batch, order, pin_memory)

    def first_reference(self):
        """Return the first image's first caption, or None where it has none."""
        return next(iter(self.references[0]), None)
