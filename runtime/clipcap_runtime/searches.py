"""The searches of ClipCap's models/searches.py and the stop of its models/stopping.py, in numpy.

Axes: B images, R rows at work, W beams, V vocabulary. `step(tokens, sources)` appends a token to each row of `sources`.
"""

import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Caption:
    """Token ids up to and including the one that ended the caption, their summed log-probability, and their text."""

    tokens: list = field(default_factory=list)
    logprob: float = 0.0
    text: str = ""


def _logsumexp(logits):
    top = logits.max(-1, keepdims=True)
    return top + np.log(np.exp(logits - top).sum(-1, keepdims=True))


def greedy(step, logits, ended, length, count=1, choose=None):
    """Take the likeliest token, or the one `choose(logits, rows, number of tokens)` picks, for `count` captions.

    Returns: per image, its list of Captions.
    """
    sources = np.repeat(np.arange(len(logits)), count)
    captions, rows, logits = [Caption() for _ in sources], np.arange(len(sources)), logits[sources]
    for number in range(length):
        tokens = logits.argmax(-1) if choose is None else choose(logits, rows, number)
        logprobs = np.take_along_axis(logits, tokens[:, None], 1) - _logsumexp(logits)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs[:, 0].tolist(), strict=True):
            captions[row].tokens.append(token)
            captions[row].logprob += logprob
        going = np.array([not ended(captions[row].tokens) for row in rows])
        rows, sources = rows[going], sources[going]
        if not len(rows) or number == length - 1:
            break
        logits = step(tokens[going], sources)
        sources = np.arange(len(rows))
    return [captions[start : start + count] for start in range(0, len(captions), count)]


def sample(step, logits, ended, length, keys, count, top_p, seed):
    """Draw tokens from the likeliest that hold `top_p` of the probability; numbers as torch's generator gives them."""
    # [B * count, T]
    draws = np.stack([_draws(f"{seed} {number} ".encode() + key, length) for key in keys for number in range(count)])

    def choose(logits, rows, number):
        probabilities = np.exp(logits - _logsumexp(logits))
        if top_p < 1:
            order = np.argsort(-probabilities, axis=-1, kind="stable")
            falling = np.take_along_axis(probabilities, order, -1)
            before = np.cumsum(falling, -1, dtype=np.float64).astype(np.float32) - falling
            falling[before >= top_p] = 0
            np.put_along_axis(probabilities, order, falling, -1)
        mass = np.cumsum(probabilities, -1, dtype=np.float64).astype(np.float32)
        index = (mass <= (draws[rows, number] * mass[:, -1])[:, None]).sum(-1)
        return np.minimum(index, (mass < mass[:, -1:]).sum(-1))

    return greedy(step, logits, ended, length, count, choose)


def _draws(key, length):
    """Return [length] numbers in [0, 1), as torch.rand does: 24 of each 32 bits of the Mersenne Twister."""
    seed = (int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1) & 0xFFFFFFFF
    raw = np.random.RandomState(seed).randint(0, 2**32, length, dtype=np.uint32)
    return (raw & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def beam(step, logits, ended, length, width, penalty, count):
    """Keep the W hypotheses with the highest mean log-probability at every step; best first."""
    width = min(width, logits.shape[-1])
    images, finished = np.arange(len(logits)), {}
    last = _top(logits, width)
    scores = np.take_along_axis(logits - _logsumexp(logits), last, -1)  # [B, W]
    tokens = [[[int(token)] for token in row] for row in last]
    lengths = np.ones(last.shape, int)
    stopped = np.array([[ended(one) for one in row] for row in tokens])
    sources = np.repeat(images[:, None], width, 1)
    while True:
        done = stopped.all(-1) | (len(tokens[0][0]) >= length)
        for row in done.nonzero()[0]:
            order = np.argsort(-(scores[row] / lengths[row] ** penalty), kind="stable")[:count]
            finished[images[row]] = [Caption(tokens[row][i][: lengths[row, i]], float(scores[row, i])) for i in order]
        keep = (~done).nonzero()[0]
        if not len(keep):
            return [finished[image] for image in sorted(finished)]
        images, scores, lengths, stopped = images[keep], scores[keep], lengths[keep], stopped[keep]
        tokens, sources = [tokens[row] for row in keep], sources[keep]
        newest = np.array([[one[-1] for one in row] for row in tokens])
        logits = step(newest.reshape(-1), sources.reshape(-1)).reshape(len(keep), width, -1)
        ids = _top(logits, width)  # [B, W, W]
        best = np.take_along_axis(logits, ids, -1) - _logsumexp(logits)
        unchanged = np.full_like(best, -np.inf)
        unchanged[..., 0] = 0
        sums = scores[..., None] + np.where(stopped[..., None], unchanged, best)
        lengths = lengths + ~stopped
        means = sums / lengths[..., None].astype(np.float32) ** np.float32(penalty)
        chosen = _top(means.reshape(len(keep), -1), width)  # [B, W] of W * W
        beams = chosen // width
        scores = np.take_along_axis(sums.reshape(len(keep), -1), chosen, 1)
        last = np.take_along_axis(ids.reshape(len(keep), -1), chosen, 1)
        lengths, stopped = np.take_along_axis(lengths, beams, 1), np.take_along_axis(stopped, beams, 1)
        tokens = [
            [row[b] + [int(token)] for b, token in zip(bs, new, strict=True)]
            for row, bs, new in zip(tokens, beams, last, strict=True)
        ]
        stopped |= np.array([[ended(one) for one in row] for row in tokens])
        sources = np.arange(len(keep))[:, None] * width + beams


def _top(values, number):
    """Return the indices of the `number` largest along the last axis, largest first."""
    found = np.argpartition(-values, number - 1, axis=-1)[..., :number]
    order = np.argsort(-np.take_along_axis(values, found, -1), axis=-1, kind="stable")
    return np.take_along_axis(found, order, -1)


class Stop:
    """Tells whether a caption has ended: by an end token, or by the stop text anywhere in the decoded text."""

    def __init__(self, tokenizer, text, ends):
        """Find what ends a caption; raises ValueError where the tokenizer has no token for `text`."""
        ids = tokenizer.encode(text, add_special_tokens=False).ids if text else []
        self.decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
        self.ends = {*ends}
        if len(ids) == 1 and not self.decode(ids):
            text, self.ends = "", {*ends, *ids}
        if text and not ids:
            raise ValueError(f"stop_token {text!r} is no token of this language model")
        self.text, self.tokens = text, set()
        if text:  # tokens whose text holds the stop text's last character, or part of a character
            anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
            before, last = self.decode(anchor), text[-1]
            rows = [[*anchor, token] for token in range(tokenizer.get_vocab_size())]
            for token, piece in enumerate(tokenizer.decode_batch(rows, skip_special_tokens=True)):
                piece = piece.removeprefix(before)
                if last in piece or ("\N{REPLACEMENT CHARACTER}" in piece and last > "\x7f"):
                    self.tokens.add(token)

    def __call__(self, tokens):
        return tokens[-1] in self.ends or (tokens[-1] in self.tokens and self.text in self.decode(tokens))

    def text_until(self, tokens):
        """Return the text of a caption up to and including the stop text."""
        text = self.decode(tokens)
        return text[: text.index(self.text) + len(self.text)] if self.text and self.text in text else text
