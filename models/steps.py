"""A language model as a function from one token per row to the next logits, with a cache and without.

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


def step_for(gpt, embeddings):
    """Return a CachedStep, or an UncachedStep where the language model takes no cache; arguments as of CachedStep."""
    return (CachedStep if cache_argument(gpt) else UncachedStep)(gpt, embeddings)


class CachedStep:
    """The language model as a function from one token per row to the next logits, with a key-value cache."""

    def __init__(self, gpt, embeddings):
        """Run the prefix.

        Args:
            gpt: causal language model.
            embeddings: [B, P, E], the same length for every row, so that nothing is padded.
        """
        self.gpt, self.cache = gpt, DynamicCache(config=gpt.config)
        self.argument = cache_argument(gpt)
        self.first = self._run(inputs_embeds=embeddings)  # [B, V]

    def __call__(self, tokens):
        """Append `tokens` [R]; return the logits of the next, [R, V] float32."""
        return self._run(input_ids=tokens[:, None])

    def _run(self, **inputs):
        out = self.gpt(**inputs, **{self.argument: self.cache}, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float()

    def select(self, rows):
        """Let row i become what row `rows[i]` was; `rows` is [R'] of indices."""
        self.cache.reorder_cache(rows)


class UncachedStep:
    """The same by running the whole sequence again for every token: what a cached step is checked against."""

    def __init__(self, gpt, embeddings):
        self.gpt, self.embeddings = gpt, embeddings  # [R, T, E]
        self.first = gpt(inputs_embeds=embeddings, use_cache=False).logits[:, -1].float()

    def __call__(self, tokens):
        """Append `tokens` [R]; return the logits of the next, [R, V] float32."""
        embedded = self.gpt.get_input_embeddings()(tokens)[:, None].to(self.embeddings)  # [R, 1, E]
        self.embeddings = torch.cat((self.embeddings, embedded), dim=1)
        return self.gpt(inputs_embeds=self.embeddings, use_cache=False).logits[:, -1].float()

    def select(self, rows):
        """Let row i become what row `rows[i]` was; `rows` is [R'] of indices."""
        self.embeddings = self.embeddings[rows]
