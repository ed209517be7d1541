"""Rewards of sampled captions: CIDEr-D against an image's references, CLIPScore against the image itself.

A reward is called with texts, their images' indices in an ImageDataset, and the images' embeddings.

Axes: H captions, N images, D CLIP width.
"""

import hashlib
import json

import torch

from metrics.cider_d import CiderD
from metrics.clipscore import text_scores
from metrics.ptb import tokenize
from models.pretrained import cache_folder
from training.settings import CIDER, CLIP
from utils.cli import VERSION, note
from utils.files import reason


class CiderReward:
    """CIDEr-D with document frequencies of the training images; a caption's end counts as a word.

    Source: Rennie et al., Self-critical Sequence Training (arXiv 1612.00563); ruotianluo/cider for the end.
    """

    name = CIDER

    def __init__(self, references):
        """Count the references' n-grams, or read the cached counts of the same references.

        Args:
            references: per image a list of captions.
        """
        digest = hashlib.sha256(json.dumps([VERSION, references]).encode())  # another version may tokenize differently
        path = cache_folder() / f"cider-{digest.hexdigest()[:24]}.npz"
        self.scorer = CiderD.read(path)
        if self.scorer is None:
            note(f"counting the n-grams of {sum(map(len, references)):,} references")
            tokens = iter(tokenize([text for texts in references for text in texts]))
            self.scorer = CiderD([[next(tokens) for _ in texts] for texts in references], end_word=True)
            try:
                self.scorer.write(path)
            except OSError as error:  # they are counted again next time
                note(f"warning: the counts were not kept in {path} ({reason(error)})")

    def __call__(self, texts, images, clip_embedding, ended):
        """Score captions.

        Args:
            texts: H captions.
            images: [H] indices of their images.
            clip_embedding: [H, D], unused.
            ended: H bools, whether each caption ended by itself.
        Returns: [H] float64, 0 to 10.
        """
        return self.scorer.scores(tokenize(texts), images, ended)


class ClipReward:
    """CLIPScore: how near a caption is to its image, without references (Hessel et al., arXiv 2104.08718)."""

    name = CLIP

    def __init__(self, encoder):
        """Use the text tower of the encoder that the images were embedded with."""
        self.encoder = encoder

    def __call__(self, texts, images, clip_embedding, ended):
        """Score captions; arguments as in CiderReward, returns [H] float64, 0 to 2.5."""
        # without --mixed_precision's autocast: an image's captions differ little in score
        with torch.autocast(self.encoder.device.type, enabled=False):
            return text_scores(clip_embedding.cpu(), texts, self.encoder.encode_texts)
