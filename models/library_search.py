"""Decoding by transformers' `generate`, whose beam search differs from ClipCap's.

Axes: B images, P positions of prefix and prompt, R captions scored together, T tokens, V vocabulary, E width.
"""

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from models.searches import Caption
from models.settings import BEAM
from models.steps import cache_argument

SCORED_TOGETHER = 8  # captions: their logits take T x V numbers each


class _StopCriterion(StoppingCriteria):
    """A Stop in the form that transformers' `generate` takes."""

    def __init__(self, stop):
        self.stop = stop

    def __call__(self, input_ids, scores, **kwargs):
        return self.stop(input_ids[:, -1], lambda row: input_ids[row].tolist())


def library_search(gpt, embeddings, tokenizer, config, stop):
    """Decode with transformers' `generate`, whose beam search differs from ClipCap's.

    Args:
        embeddings: [B, P, E] prefix and prompt.
    Returns: per image, `num_captions` Captions, best first.
    Raises: ValueError where the language model takes no cache, without which `generate` forgets the prefix.
    Source: Jhryu30/cvpr2023_challenge_clipcap predict.py `generate`.
    """
    if not cache_argument(gpt):
        raise ValueError(f"--decoder transformers needs a cache, which {type(gpt).__name__} does not have; use clipcap")
    count = config.num_captions
    options = {"length_penalty": config.length_penalty} if config.method == BEAM else {}
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    sequences = gpt.generate(
        inputs_embeds=embeddings, attention_mask=mask, do_sample=False,
        num_beams=config.beam_size if config.method == BEAM else 1, num_return_sequences=count,
        max_new_tokens=config.entry_length, min_length=1, eos_token_id=None, pad_token_id=_pad_id(tokenizer),
        stopping_criteria=StoppingCriteriaList([_StopCriterion(stop)]), **options,
    )  # fmt: skip
    captions = [Caption(stop.cut(tokens)) for tokens in sequences.tolist()]
    _score(gpt, embeddings.repeat_interleave(count, 0), captions)
    return [captions[start : start + count] for start in range(0, len(captions), count)]


def _score(gpt, embeddings, captions):
    """Set the captions' log-probabilities, a few at a time; `generate` would keep [V] scores of every step.

    Args:
        embeddings: [B, P, E] before each caption.
    """
    for start in range(0, len(captions), SCORED_TOGETHER):
        group = captions[start : start + SCORED_TOGETHER]
        tokens = [torch.tensor(caption.tokens, device=embeddings.device) for caption in group]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)  # [R, T]
        inputs = torch.cat((embeddings[start : start + len(group)], gpt.get_input_embeddings()(padded[:, :-1])), dim=1)
        logits = gpt(inputs_embeds=inputs, use_cache=False, logits_to_keep=padded.shape[1]).logits.float()
        logprobs = logits.gather(-1, padded[..., None])[..., 0] - logits.logsumexp(-1)  # [R, T]
        for caption, row in zip(group, logprobs, strict=True):
            caption.logprob = row[: len(caption.tokens)].sum().item()


def _pad_id(tokenizer):
    """Return the id that pads finished captions."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
