"""A language model as a function from one token per row to the next logits, with a cache and without.

Rows may differ in length: each has positions of its own and sees none of the padding.

Axes: B images, P positions of prefix and prompt, R rows at work, V vocabulary, T positions so far, E width.
"""

import inspect

import torch
from transformers import DynamicCache


def cache_argument(gpt):
    """Return the name under which a language model takes transformers' cache, or None where it takes none.

    Such models, as GPT-1 and RWKV, pass over a cache in silence and would see the newest token only.
    """
    parameters = inspect.signature(gpt.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)  # transformers 5 renamed


class CachedStep:
    """The language model as a function from one token per row to the next logits, with a key-value cache."""

    def __init__(self, gpt, embeddings, lengths=None):
        """Run the prefix.

        Args:
            gpt: causal language model.
            embeddings: [B, P, E], shorter rows padded on the right.
            lengths: [B] of each row without padding; None: nothing is padded.
        """
        self.gpt, self.cache = gpt, DynamicCache(config=gpt.config)
        self.argument = cache_argument(gpt)
        self.mask = None  # [R, T], 1 where a row has something
        if lengths is not None:
            # in the cache, padding stands on the left: all rows' newest tokens share a column
            places = torch.arange(embeddings.shape[1]) - (embeddings.shape[1] - lengths[:, None])  # [B, P]
            self.mask = (places >= 0).long().to(embeddings.device)
            places = places.clamp(0).to(embeddings.device)
            embeddings = embeddings.gather(1, places[..., None].expand_as(embeddings))
        self.first = self._run(inputs_embeds=embeddings)  # [B, V]

    def __call__(self, tokens):
        """Append `tokens` [R]; return the logits of the next, [R, V]."""
        if self.mask is not None:
            self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), dim=1)
        return self._run(input_ids=tokens[:, None])

    def _run(self, **inputs):
        if self.mask is not None:
            inputs["attention_mask"] = self.mask
            if "position_ids" in inspect.signature(self.gpt.forward).parameters:  # others count in the mask
                new = next(iter(inputs.values())).shape[1]
                inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(0)[:, -new:]
        out = self.gpt(**inputs, **{self.argument: self.cache}, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def select(self, rows):
        """Let row i become what row `rows[i]` was; `rows` is [R'] of indices."""
        self.cache.reorder_cache(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]


class UncachedStep:
    """The same by running the whole sequence again for every token: what a cached step is checked against."""

    def __init__(self, gpt, embeddings, lengths=None):
        self.gpt, self.embeddings = gpt, embeddings  # [R, T, E], padded on the right, where no token sees it
        self.lengths = None if lengths is None else lengths.to(embeddings.device)  # [R]
        self.first = self._run()

    def __call__(self, tokens):
        """Append `tokens` [R]; return the logits of the next, [R, V]."""
        embedded = self.gpt.get_input_embeddings()(tokens)[:, None].to(self.embeddings)  # [R, 1, E]
        self.embeddings = torch.cat((self.embeddings, embedded), dim=1)
        if self.lengths is not None:
            self.embeddings[torch.arange(len(tokens)), self.lengths] = embedded[:, 0]
            self.lengths = self.lengths + 1
            self.embeddings = self.embeddings[:, : self.lengths.max()]
        return self._run()

    def _run(self):
        logits = self.gpt(inputs_embeds=self.embeddings, use_cache=False).logits  # [R, T, V]
        if self.lengths is None:
            return logits[:, -1]
        return logits[torch.arange(len(logits)), self.lengths - 1]

    def select(self, rows):
        """Let row i become what row `rows[i]` was; `rows` is [R'] of indices."""
        self.embeddings = self.embeddings[rows]
        if self.lengths is not None:
            self.lengths = self.lengths[rows]
