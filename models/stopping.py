"""Where a caption begins and ends, found from what a tokenizer does, not from its class.

Axes: R active rows, V vocabulary.
"""

import functools

import torch


def begin_tokens(tokenizer):
    """Return the ids that the tokenizer puts before every text, as OPT's and Llama's do; [] for GPT-2."""
    plain = tokenizer.encode("a photo", add_special_tokens=False)
    tokens = tokenizer.encode("a photo")
    starts = range(len(tokens) - len(plain) + 1)
    return tokens[: next((start for start in starts if tokens[start : start + len(plain)] == plain), 0)]


def opening_tokens(tokenizer, prompt):
    """Return the ids that a language model reads between prefix and caption: the begin tokens and the prompt."""
    return begin_tokens(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False)


def continuing_tokens(tokenizer, prompt, text):
    """Return the ids of a text that continues the prompt, beginning with the space between the two."""
    start = tokenizer.encode(prompt, add_special_tokens=False)
    together = tokenizer.encode(f"{prompt} {text}", add_special_tokens=False) if prompt else []
    if start and len(together) > len(start) and together[: len(start)] == start:
        return together[len(start) :]
    return tokenizer.encode(text, add_special_tokens=False)


def end_tokens(tokenizer, gpt):
    """Return the ids by which the tokenizer or the language model ends a text."""
    ids = {tokenizer.eos_token_id}
    for config in (gpt.config, getattr(gpt, "generation_config", None)):
        own = getattr(config, "eos_token_id", None)
        ids |= set(own) if isinstance(own, list | tuple) else {own}
    return sorted(ids & _special_ids(tokenizer))  # the model's ids may belong to another tokenizer


def _special_ids(tokenizer):
    """Return the ids that decoding skips as special tokens."""
    added = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return added | set(tokenizer.all_special_ids)


def text_of(tokenizer, tokens):
    """Return the text of token ids, without special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True)


def spoken(tokenizer, tokens):
    """Return token ids without the special tokens at their end."""
    special = _special_ids(tokenizer)
    return tokens[: next((end for end in range(len(tokens), 0, -1) if tokens[end - 1] not in special), 0)]


class Stop:
    """Tells which captions have ended: by an end token, or by the stop text anywhere in the decoded text.

    Only rows whose newest token could complete the stop text are decoded, so that the others stay on the device; where
    the stop text is an ASCII character that a tokenizer has in whole tokens only, as GPT-2's, none is.
    """

    def __init__(self, tokenizer, text, vocabulary, ends=(), device=None):
        """Find the tokens that could complete the stop text.

        Args:
            text: the stop text, or "" for none; a special token works as an end token and is not shown.
            vocabulary: V.
            ends: ids of end tokens.
        Raises: ValueError where the tokenizer has no token for `text`.
        """
        ids = tokenizer.encode(text, add_special_tokens=False) if text else []
        if len(ids) == 1 and not text_of(tokenizer, ids):
            text, ends = "", {*ends, *ids}
        if text and not ids:
            raise ValueError(f"--stop_token {text!r} is no token of this language model")
        self.tokenizer, self.text, self.ends = tokenizer, text, set(ends)
        self.decodes = _depends_on_others(tokenizer, text)
        flags = torch.zeros(vocabulary, dtype=torch.bool)
        flags[[token for token in (*self.ends, *_completing(tokenizer, text)) if token < vocabulary]] = True
        self.flags = flags.to(device)  # [V]

    def __call__(self, tokens, caption):
        """Return which rows have ended, [R] of bool.

        Args:
            tokens: [R] newest token of each row.
            caption: function of a row's number to all its token ids, the newest included.
        """
        ended = self.flags[tokens]
        rows = ended.nonzero()[:, 0].tolist() if self.decodes else []
        over = [row for row in rows if not self._is_over(caption(row))]
        if over:
            ended[over] = False
        return ended

    def _is_over(self, tokens):
        return tokens[-1] in self.ends or (bool(self.text) and self.text in text_of(self.tokenizer, tokens))

    def cut(self, tokens):
        """Return the tokens up to the one that ends the caption; all where none does."""
        flags = self.flags[torch.tensor(tokens, device=self.flags.device)].tolist()
        ends = (end for end, flag in enumerate(flags, 1) if flag and self._is_over(tokens[:end]))
        return tokens[: next(ends, len(tokens))]

    def text_until(self, tokens):
        """Return the text of a caption up to the stop text, which is kept."""
        text = text_of(self.tokenizer, tokens)
        return text[: text.index(self.text) + len(self.text)] if self.text and self.text in text else text


@functools.lru_cache(maxsize=8)
def _depends_on_others(tokenizer, text):
    """Tell whether a token of `_completing` ends a text or not depending on the tokens before it.

    An ASCII character is shown whatever precedes its token, but for a byte's own token, which belongs to a broken
    character where one precedes it.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(_completing(tokenizer, text)))
    return len(text) > 1 or text > "\x7f" or any(str(token).startswith("<0x") for token in tokens)


@functools.lru_cache(maxsize=8)
def _completing(tokenizer, text):
    """Return the ids whose text holds the stop text's last character, or a part of it where it has several bytes."""
    if not text:
        return ()
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # decoding may drop the space before the first word
    before = text_of(tokenizer, anchor)
    decoded = tokenizer.batch_decode([[*anchor, token] for token in range(len(tokenizer))], skip_special_tokens=True)
    pieces = (string.removeprefix(before) for string in decoded)
    last, broken = text[-1], "\N{REPLACEMENT CHARACTER}"
    return tuple(token for token, piece in enumerate(pieces) if last in piece or (broken in piece and last > "\x7f"))
