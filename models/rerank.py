"""Choosing among candidates: an image's captions are drawn many times from one prefix, and the best is picked.

`clip` picks by the cosine between image and text embedding, and the candidates' log-probability; `mbr` picks what the
others agree with most: the expected CIDEr-D against them (minimum Bayes risk), which needs no text tower.

Axes: B images, N candidates of an image, D CLIP width.
"""

import sys
from dataclasses import replace

import numpy as np
import torch

from metrics.cider_d import CiderD
from metrics.clipscore import text_scores
from metrics.ptb import tokenize
from models.decoding import generate_captions
from models.settings import BEAM, CLIP, MBR, NO_RERANK, SAMPLE
from utils.cli import note
from utils.devices import is_out_of_memory

LOGPROB_WEIGHT = 0.1  # of the mean log-probability per token beside CLIPScore; from `python -m demo.rerank --tune`


def candidates_config(decoding):
    """Return the DecodingConfig that makes the candidates: beams where beam search is asked for, samples otherwise."""
    count = decoding.num_candidates
    if decoding.method == BEAM:
        widened = {"beam_size": max(count, decoding.beam_size)}
    else:
        widened = {} if decoding.method == SAMPLE else {"method": SAMPLE, "top_p": 1.0}
    return replace(decoding, rerank=NO_RERANK, num_captions=count, **widened)


def draws_samples(decoding):
    """Tell whether captions depend on random numbers."""
    return decoding.method == SAMPLE or (decoding.rerank != NO_RERANK and decoding.method != BEAM)


class Reranker:
    """Makes candidates and ranks them; serves predict.py and the page."""

    def __init__(self, model, tokenizer, encode_texts=None):
        """Take over a captioner's parts.

        Args:
            model: ClipCaptionModel, in evaluation mode.
            tokenizer: of its language model.
            encode_texts: function of a list of texts to [number, D]; None: the encoder has no text tower, or
                gives an image's tokens, which cannot be compared with texts.
        """
        self.model, self.tokenizer, self.encode_texts = model, tokenizer, encode_texts
        self.most = sys.maxsize  # candidates at a time, as far as is known

    def caption(self, clip_embedding, decoding, keys=None):
        """Caption a batch of images.

        Args:
            clip_embedding: [B, D].
            decoding: DecodingConfig with `rerank`.
            keys: as of `generate_captions`.
        Returns: per image, at most `num_captions` Captions of different texts, best first.
        Raises: ValueError where `clip` is asked for and there is no `encode_texts`.
        """
        if decoding.rerank == CLIP and self.encode_texts is None:
            raise ValueError(
                f"--rerank {CLIP} needs an encoder with a text tower, and one vector an image to compare with texts; "
                f"use --rerank {MBR}"
            )
        groups = self._candidates(clip_embedding, candidates_config(decoding), keys)
        if decoding.rerank == MBR:
            ranked = rank_by_consensus(groups, weighted=decoding.method == BEAM)
        else:
            ranked = rank_by_clip(clip_embedding, groups, self.encode_texts)
        return [group[: decoding.num_captions] for group in ranked]

    def _candidates(self, clip_embedding, config, keys):
        """Return the candidates of every image, fewer at a time once they do not fit in memory.

        First fewer images, which changes no caption; for a single image, fewer candidates.
        """
        images, rows = len(clip_embedding), len(clip_embedding) * config.num_captions
        if rows <= self.most:
            try:
                return generate_captions(self.model, self.tokenizer, clip_embedding, config, keys=keys)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or rows == 1:
                    raise
            # not in the handler: until that ends, the error keeps the tensors that filled the memory alive
            self.most = rows // 2
            lost = "" if images > 1 else ", so that an image has fewer"
            note(f"warning: {rows} candidates do not fit in memory; going on with {self.most} at a time{lost}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if images == 1:
            width = self.most if config.method == BEAM else config.beam_size
            return self._candidates(clip_embedding, replace(config, num_captions=self.most, beam_size=width), keys)
        parts = slice(images // 2), slice(images // 2, None)
        halves = [self._candidates(clip_embedding[part], config, keys and keys[part]) for part in parts]
        return halves[0] + halves[1]


def distinct(captions):
    """Return captions of different texts, the likeliest of each, in order of a text's first occurrence."""
    best = {}
    for caption in captions:
        text = caption.text.strip()
        if text not in best or caption.logprob > best[text].logprob:
            best[text] = caption
    return list(best.values())


def scores_by_clip(clip_embedding, groups, encode_texts):
    """Return per image the CLIPScores [N] of its captions; every text is embedded once, in one call.

    Args:
        clip_embedding: [B, D].
        groups: per image a list of Captions.
        encode_texts: as of Reranker.
    """
    texts, counts = [caption.text.strip() for group in groups for caption in group], [len(group) for group in groups]
    images = np.repeat(np.asarray(clip_embedding.float().cpu()), counts, 0)
    return np.split(text_scores(images, texts, encode_texts), np.cumsum(counts)[:-1])


def rank_by_clip(clip_embedding, groups, encode_texts):
    """Sort captions by `clip_value`, duplicates dropped; arguments as of `scores_by_clip`."""
    groups = [distinct(group) for group in groups]
    scores = scores_by_clip(clip_embedding, groups, encode_texts)
    return [_sorted(group, clip_value(group, own)) for group, own in zip(groups, scores, strict=True)]


def clip_value(captions, scores):
    """Return what captions are ranked by, [N]: CLIPScore plus a weighted mean log-probability per token."""
    return scores + LOGPROB_WEIGHT * np.array([caption.mean_logprob for caption in captions])


def rank_by_consensus(groups, weighted):
    """Sort captions by their expected CIDEr-D against the image's others, duplicates dropped.

    All n-grams weigh the same, so that no image's choice depends on what shares its batch.

    Args:
        groups: per image a list of Captions.
        weighted: weight the others by their probability, as beams need; samples already occur as often as is probable.
    """
    kept = [distinct(group) for group in groups]
    texts = tokenize([caption.text.strip() for group in kept for caption in group])
    first = np.cumsum([0, *map(len, kept)])
    # every pair of an image's different captions
    pairs = [(a, b) for i, group in enumerate(kept) for a in range(len(group)) for b in range(len(group))]
    owner = np.repeat(first[:-1], [len(group) ** 2 for group in kept])
    ours, theirs = (np.array(pairs).T + owner) if pairs else (np.zeros(0, int),) * 2
    scorer = CiderD([[text] for text in texts] if len(texts) > 1 else [texts, texts], weigh=False)
    agreement = scorer.scores([texts[i] for i in ours], theirs)
    ranked, place = [], 0
    for group, all_of_it in zip(kept, groups, strict=True):
        size = len(group)
        table = agreement[place : place + size**2].reshape(size, size)
        place += size**2
        ranked.append(_sorted(group, _expected(table, group, all_of_it, weighted)))
    return ranked


def _expected(table, kept, group, weighted):
    """Return the mean agreement [N] of each kept caption with the others; table: [N, N]."""
    if weighted:
        logprobs = np.array([caption.logprob for caption in kept])
        return (table * np.exp(logprobs - logprobs.max())).sum(1) - table.diagonal() * np.exp(logprobs - logprobs.max())
    times = np.array([sum(c.text.strip() == caption.text.strip() for c in group) for caption in kept])
    return table @ times - table.diagonal()  # not with itself, but with others that say the same


def _sorted(captions, values):
    """Return captions by descending value; equal ones keep their order."""
    return [captions[i] for i in np.argsort(-values, kind="stable")]
