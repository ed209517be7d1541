"""Feature store -> training batches.

Axes: N captions, B batch, D CLIP width, T caption tokens.
"""

import hashlib
import json

import numpy as np
import torch

from utils.cli import note
from utils.files import atomic_path

TOKENIZER_BATCH = 10_000  # captions handed to the tokenizer at once
CACHE_FROM = 50_000  # captions from which tokenising takes long enough for a cache


class CaptionDataset:
    """All captions of a store as token ids, flat in memory, with the row of each one's image."""

    def __init__(self, store, tokenizer, max_tokens=None):
        """Tokenise the store's captions.

        Args:
            store: FeatureStore.
            tokenizer: of the language model; it adds its own begin token where it has one, as OPT's does.
            max_tokens: longer captions are cut to this many tokens, with a warning.
        Raises: ValueError where no caption has a token.
        """
        self.store, self.clip_embedding = store, store.clip_embedding
        tokens, lengths = _tokenize([record["caption"] for record in store.captions], tokenizer, store.path)
        starts = np.cumsum(lengths) - lengths
        kept = np.flatnonzero(lengths > 0)
        if not len(kept):
            raise ValueError(f"{store.path}: no captions left, all are empty")
        if len(kept) < len(lengths):
            note(f"warning: {len(lengths) - len(kept):,} empty captions are left out")
        self.records = kept  # caption number -> record number
        self.tokens, self.starts = tokens, starts[kept]
        self.lengths = lengths[kept]
        if max_tokens and (self.lengths > max_tokens).any():
            note(f"warning: {(self.lengths > max_tokens).sum():,} captions are cut to {max_tokens} tokens, the context")
            self.lengths = np.minimum(self.lengths, max_tokens)
        rows = np.fromiter((record["clip_embedding"] for record in store.captions), np.int64, len(store.captions))
        self.embedding_index = rows[kept]

    def __len__(self):
        return len(self.lengths)

    def batch(self, indices):
        """Gather captions and pad them to the longest of them.

        Args:
            indices: [B] caption numbers.
        Returns: tokens [B, T] padded on the right with 0, clip_embedding [B, D] float32, lengths [B].
        """
        indices = np.asarray(indices)
        lengths = self.lengths[indices]
        tokens = torch.zeros(len(indices), int(lengths.max()), dtype=torch.long)
        for row, (start, length) in enumerate(zip(self.starts[indices], lengths, strict=True)):
            tokens[row, :length] = torch.from_numpy(self.tokens[start : start + length].astype(np.int64))
        embeddings = self.clip_embedding[torch.from_numpy(self.embedding_index[indices])].float()
        return tokens, embeddings, torch.from_numpy(lengths)


def epoch_batches(length, batch_size, seed, epoch):
    """Return an epoch's batches, in an order that seed and epoch alone decide, so that a resumed run repeats it.

    Args:
        length: captions.
        batch_size: captions per batch; a last smaller one is dropped, unless it is the only one.
    Returns: list of [B] arrays of caption numbers.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(length, generator=generator).numpy()
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(batches_per_epoch(length, batch_size))]


def batches_per_epoch(length, batch_size):
    """Return how many batches an epoch has."""
    return max(1, length // batch_size)


def _tokenize(captions, tokenizer, path):
    """Return all captions' token ids, [sum of lengths] int32, and the lengths, [N] int64; from a cache if it fits.

    The cache's name holds a hash of every caption and of the tokenizer, so that it cannot be stale.
    """
    if len(captions) < CACHE_FROM:
        return _tokenize_now(captions, tokenizer)
    cache = path.with_name(f"{path.stem}_tokens-{_fingerprint(captions, tokenizer)}.npz")
    if cache.is_file():
        with np.load(cache) as stored:
            return stored["tokens"], stored["lengths"]
    tokens, lengths = _tokenize_now(captions, tokenizer)
    try:
        with atomic_path(cache) as temporary, open(temporary, "wb") as file:
            np.savez(file, tokens=tokens, lengths=lengths)
    except OSError as error:
        note(f"the token cache {cache} was not written ({error.strerror}); the next start tokenises again")
    return tokens, lengths


def _tokenize_now(captions, tokenizer):
    ids = []
    for start in range(0, len(captions), TOKENIZER_BATCH):
        ids.extend(tokenizer(captions[start : start + TOKENIZER_BATCH], verbose=False)["input_ids"])
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter((token for caption in ids for token in caption), np.int32, int(lengths.sum()))
    return tokens, lengths


def _fingerprint(captions, tokenizer):
    """Hash captions and tokenizer: its vocabulary, its rules where it tells them, and what it makes of a probe."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(backend.to_str().encode() if backend else json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(json.dumps(tokenizer("A probe, 1!")["input_ids"]).encode())
    for caption in captions:
        digest.update(caption.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]
