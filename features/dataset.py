"""Feature store -> training batches.

Axes: N captions, B batch, D CLIP width, T caption tokens.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from utils.cli import note

POOL_BATCHES = 50  # batches whose captions are sorted by length together, with group_by_length


class CaptionDataset:
    """The captions of a store as token ids, each with the row of its image.

    A caption is tokenised when it is first drawn and kept as ids, flat in memory: so the first step waits for one
    batch only, whatever N is, and no cache on disk can be stale.
    """

    unit = "captions"

    def __init__(self, store, tokenizer, max_tokens=None, noise=None):
        """Index the store's captions.

        Args:
            store: FeatureStore.
            tokenizer: of the language model; it adds its own begin token where it has one, as OPT's does.
            max_tokens: longer captions are cut to this many tokens, with a warning.
            noise: AngleNoise that is applied to the embeddings, or None.
        Raises: ValueError where no caption holds text.
        """
        self.store, self.clip_embedding, self.noise = store, store.clip_embedding, noise
        self.tokenizer, self.max_tokens, self.cut = tokenizer, max_tokens, False
        rows, text_lengths = store.index()
        self.records = np.flatnonzero(text_lengths)  # caption number -> record number
        if not len(self.records):
            raise ValueError(f"{store.path}: no captions left, all are empty")
        if len(self.records) < len(rows):
            note(f"warning: {len(rows) - len(self.records):,} empty captions are left out")
        self.embedding_index, self.text_lengths = rows[self.records], text_lengths[self.records]
        self.tokens, self.used = np.empty(1 << 16, np.int32), 0  # ids of all captions drawn so far, one after another
        self.starts = np.full(len(self.records), -1)  # -1: not drawn yet
        self.lengths = np.zeros(len(self.records), np.int32)

    def __len__(self):
        return len(self.records)

    def batch(self, indices, epoch=0):
        """Gather captions, padded to the longest.

        Args:
            indices: [B] caption numbers.
            epoch: which the noise depends on, where there is noise.
        Returns: tokens [B, T] padded on the right with 0, clip_embedding [B, D], or [B, K, D], lengths [B].
        """
        indices = np.asarray(indices)
        self._tokenize(indices[self.starts[indices] < 0])
        lengths = self.lengths[indices]
        tokens = torch.zeros(len(indices), int(lengths.max()), dtype=torch.long)
        for row, (start, length) in enumerate(zip(self.starts[indices], lengths, strict=True)):
            tokens[row, :length] = torch.from_numpy(self.tokens[start : start + length].astype(np.int64))
        embeddings = self.clip_embedding[torch.from_numpy(self.embedding_index[indices])]
        if self.noise:
            embeddings = self.noise(embeddings.float(), indices, epoch)
        return tokens, embeddings, torch.from_numpy(lengths.astype(np.int64))

    def _tokenize(self, indices):
        """Tokenise the captions with these numbers and keep their ids."""
        if not len(indices):
            return
        texts = [self.store.captions[record]["caption"] for record in self.records[indices].tolist()]
        for index, ids in zip(indices.tolist(), self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            if not ids:
                text = self.store.captions[int(self.records[index])]["caption"]
                raise ValueError(f"caption {text!r} has no token in this language model; remove it from the data")
            if self.max_tokens and len(ids) > self.max_tokens:
                if not self.cut:
                    note(f"warning: captions of more than {self.max_tokens} tokens are cut to that, the context's room")
                self.cut, ids = True, ids[: self.max_tokens]
            if self.used + len(ids) > len(self.tokens):
                self.tokens = np.concatenate((self.tokens, np.empty_like(self.tokens)))
            self.tokens[self.used : self.used + len(ids)] = ids
            self.starts[index], self.lengths[index] = self.used, len(ids)
            self.used += len(ids)

    def batches(self, order, pin_memory=False, epoch=0):
        """Yield the batches of `order`; see `gathered_ahead`, and `batch` for `epoch`."""
        return gathered_ahead(functools.partial(self.batch, epoch=epoch), order, pin_memory)

    def first_reference(self):
        """Return the first caption's text."""
        return self.store.captions[int(self.records[0])]["caption"]


def gathered_ahead(batch, order, pin_memory=False):
    """Yield batches, each gathered while the previous one is in use.

    Args:
        batch: function of [B] numbers to tensors.
        order: list of [B] arrays of numbers.
        pin_memory: put batches into pinned memory, from which a GPU copies without waiting.
    """

    def gather(indices):
        gathered = batch(indices)
        return tuple(values.pin_memory() for values in gathered) if pin_memory else gathered

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for indices in order:
            following = pool.submit(gather, indices)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()


def epoch_batches(length, batch_size, seed, epoch, text_lengths=None):
    """Return an epoch's batches, in an order that seed and epoch alone decide, so that a resumed run repeats it.

    Args:
        length: number of captions.
        batch_size: captions per batch; a last smaller one is dropped, unless it is the only one.
        text_lengths: [length]; where given, batches hold captions of similar length: POOL_BATCHES batches are drawn,
            sorted, and cut up, and the batches are shuffled.
    Returns: list of [B] arrays of caption numbers.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(length, generator=generator).numpy()
    count = batches_per_epoch(length, batch_size)
    if text_lengths is not None:
        pool = POOL_BATCHES * batch_size
        order = order[: count * batch_size]
        parts = (order[start : start + pool] for start in range(0, len(order), pool))
        order = np.concatenate([part[np.argsort(text_lengths[part], kind="stable")] for part in parts])
    batches = [order[i * batch_size : (i + 1) * batch_size] for i in range(count)]
    if text_lengths is not None:
        batches = [batches[i] for i in torch.randperm(count, generator=generator).tolist()]
    return batches


def batches_per_epoch(length, batch_size):
    """Return how many batches an epoch has."""
    return max(1, length // batch_size)
