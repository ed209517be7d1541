"""Searches: objects that are given logits and say which tokens to append, to which rows, and which images are done.

A search knows no model: whatever runs the language model asks it to `advance`, see `decode`. Per-row state is kept in
rows' own terms (their lengths, their random numbers), so that no row depends on what shares its batch.

Axes: B images, R rows at work, N candidates of an image, W beams, V vocabulary, T tokens so far.
"""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from models.settings import BEAM, GREEDY, SAMPLE
from utils.logits import largest

LOOK_EVERY = {"cuda": 8}  # tokens: how often a search waits for the device to see what has ended; elsewhere at each
ROWS_AT_ONCE = 4  # whose logits a processor's cache holds: several passes over these cost little more than one


@dataclass
class Caption:
    """One decoded caption.

    Args:
        tokens: its token ids, up to and with the one that ended it: the end token, the stop text's last token, or the
            last that there was room for.
        logprob: sum of the tokens' log-probabilities under the language model (at the decoding temperature).
        text: the tokens decoded, without special ones and what follows the stop text.
    """

    tokens: list = field(default_factory=list)
    logprob: float = 0.0
    text: str = ""

    @property
    def mean_logprob(self):
        """The log-probability per token, by which captions of any length and method compare."""
        return self.logprob / len(self.tokens)


class Move(NamedTuple):
    """What a search answers to logits.

    Args:
        tokens: [R'] the next token of each row that goes on; none when all images are done.
        sources: [R'] the row of the logits that each goes on from, so that rows are kept, dropped, repeated or
            reordered; None: all as they are.
        finished: {image: its Captions} of the images that are done now.
    """

    tokens: torch.Tensor
    sources: torch.Tensor | None
    finished: dict


def decode(step, search):
    """Let a step and a search drive each other until every image has its captions.

    Args:
        step: has `first`, logits [B, V]; `select(sources)`; and, called with tokens [R], returns logits [R, V]; see
            models.steps.
        search: Greedy, Nucleus or Beam.
    Returns: per image, its list of Captions.
    """
    captions, logits = {}, step.first
    while True:
        move = search.advance(logits)
        captions |= move.finished
        if not len(move.tokens):
            return [captions[image] for image in range(len(captions))]
        if move.sources is not None:
            step.select(move.sources)
        logits = step(move.tokens)


class Search:
    """What all searches are made with."""

    def __init__(self, config, stop, limits=None):
        """Prepare for images that are not known yet.

        Args:
            config: DecodingConfig.
            stop: models.stopping.Stop, or another function of the newest tokens [R'] and a row's tokens to which rows
                have ended, [R'].
            limits: [B] tokens at most of each image's captions; None: `entry_length` of all.
        """
        self.config, self.stop, self.limits = config, stop, limits
        self.images = None  # [R] or [B] image of each row, or of each group of beams, at work
        self.length = 0  # tokens that every row at work has so far

    def advance(self, logits):
        """Choose from the logits of all rows at work, [R, V] of any type; the first time those of the images, [B, V].

        Returns: Move.
        """
        self.length += 1
        if self.images is not None:
            return self._go_on(logits)
        if self.limits is None:
            self.limits = torch.full((len(logits),), self.config.entry_length)
        self.least = int(self.limits.min())
        self.limits = self.limits.to(logits.device)
        return self._begin(logits)

    def _looks(self):
        """Tell whether it is time to see what has ended; what has, is carried on until then and cut off."""
        every = LOOK_EVERY.get(self.limits.device.type, 1)
        return self.length % every == 0 or self.length >= self.least


class Greedy(Search):
    """Take the likeliest token every time.

    Source: rmokady predict.py `generate2`, which filters by top_p and then takes the argmax all the same.
    """

    count = 1  # N

    def _begin(self, logits):
        """Let every image have its candidates, which share the step's row of it until they differ."""
        self.images = torch.arange(len(logits), device=logits.device).repeat_interleave(self.count)
        self.nodes = self.images  # the step's row of each candidate
        self.rows = torch.arange(len(self.images), device=logits.device)  # candidates as numbered at the beginning
        self.chosen = []  # tokens and their log-probabilities, [R] each, that captions do not have yet
        self.captions = [Caption() for _ in self.rows]
        self.open = [self.count] * len(logits)  # captions that each image waits for
        return self._go_on(logits)

    def _go_on(self, logits):
        """Extend every candidate by one token."""
        number, vocabulary = logits.shape
        tokens, logprobs = self._choose(logits)  # [R] each
        self.chosen.append((tokens, logprobs))
        if self.count == 1 and not self._looks():  # several candidates are compared at every token anyway
            return Move(tokens, None, {})
        going = ~self._write_down() & (self.length < self.limits[self.images])
        finished = {}
        if not going.all():
            finished = self._finish(self.images[~going].tolist())
            kept = going.nonzero()[:, 0]
            tokens, self.nodes, self.images, self.rows = (
                state[kept] for state in (tokens, self.nodes, self.images, self.rows)
            )
        sources = self.nodes
        if self.count > 1:  # those that have said the same so far go on as one
            alike, self.nodes = (self.nodes * vocabulary + tokens).unique(return_inverse=True)
            sources, tokens = alike // vocabulary, alike % vocabulary
        else:
            self.nodes = torch.arange(len(tokens), device=tokens.device)
        moved = len(sources) != number or (self.count > 1 and not sources.equal(torch.arange(number).to(sources)))
        return Move(tokens, sources if moved else None, finished)

    def _write_down(self):
        """Append what was chosen to the captions that have not ended; return which have now, [R] of bool."""
        working = [self.captions[row] for row in self.rows.tolist()]
        ended = torch.zeros_like(self.rows, dtype=torch.bool)
        for tokens, logprobs in self.chosen:
            over = ended.tolist()
            for caption, token, logprob, done in zip(working, tokens.tolist(), logprobs.tolist(), over, strict=True):
                if not done:
                    caption.tokens.append(token)
                    caption.logprob += logprob
            ended = ended | self.stop(tokens, lambda row: working[row].tokens)
        self.chosen = []
        return ended

    def _choose(self, logits):
        """Return the next token of each row at work and its log-probability, [R] each, from the step's logits."""
        tokens, logprobs = best_tokens(logits, 1, self.config.temperature)
        return tokens[:, 0], logprobs[:, 0]

    def _finish(self, images):
        """Return {image: Captions} of the images whose last caption has ended; `images`: of the rows that end."""
        finished = {}
        for image in images:
            self.open[image] -= 1
            if not self.open[image]:
                finished[image] = self.captions[image * self.count : (image + 1) * self.count]
        return finished


def image_keys(clip_embedding):
    """Return a key per image for the random numbers of sampling: its embedding's bytes, whatever shares its batch."""
    return [row.cpu().numpy().tobytes() for row in clip_embedding.detach().half()]


def _draws(keys, config):
    """Return uniform random numbers [B·N, T], each row's from seed, image and candidate alone."""
    generator, rows = torch.Generator(), []
    for key in keys:
        for candidate in range(config.num_captions):
            digest = hashlib.sha256(f"{config.seed} {candidate} ".encode() + key).digest()
            generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            rows.append(torch.rand(config.entry_length, generator=generator))
    return torch.stack(rows)


class Nucleus(Greedy):
    """Draw each token from the likeliest ones that hold `top_p` of the probability; captions come as drawn.

    Random numbers come from seed, image and candidate: no image shares another's, and no batch changes them.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv 1904.09751).
    """

    def __init__(self, config, stop, keys, limits=None):
        """See Search; `keys`: bytes that tell each image."""
        super().__init__(config, stop, limits)
        self.count, self.draws = config.num_captions, _draws(keys, config)

    def _choose(self, logits):
        self.draws = self.draws.to(logits.device)
        draws = self.draws[self.rows, self.length - 1]  # [R]
        parts = [
            self._draw(logits[nodes].float() / self.config.temperature, drawn)
            for nodes, drawn in zip(*(_parts(state) for state in (self.nodes, draws)), strict=True)
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _draw(self, logits, drawn):
        """Return what `_choose` does for some of the rows, whose logits these are."""
        probabilities = logits.softmax(-1)  # [R, V]
        if self.config.top_p < 1:
            falling, ids = probabilities.sort(descending=True)
            # a token is in while the mass before it is below top_p, so the likeliest always is
            falling = falling.masked_fill(falling.cumsum(-1) - falling >= self.config.top_p, 0)
            probabilities = torch.zeros_like(falling).scatter(-1, ids, falling)
        # by number, not by rank: two tokens as likely as each other would change places with the last digit
        mass = probabilities.cumsum(-1)
        index = (mass <= (drawn.to(logits) * mass[:, -1])[:, None]).sum(-1)
        last = (mass < mass[:, -1:]).sum(-1)  # rounding must not step past the nucleus
        tokens = index.minimum(last)
        return tokens, logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


class Beam(Search):
    """Keep the W hypotheses with the highest mean log-probability at every step; an image's captions come best first.

    A hypothesis that has ended stays as it is and goes on competing.

    Source: rmokady predict.py `generate_beam`, here for many images at once and on a cache.
    """

    def _begin(self, logits):
        width = min(self.config.beam_size, logits.shape[-1])
        self.images = torch.arange(len(logits), device=logits.device)
        last, self.scores = best_tokens(logits, width, self.config.temperature)  # [B, W], sums of log-probabilities
        self.tokens = last[..., None]  # [B, W, T]
        self.lengths = torch.ones_like(self.scores)
        self.stopped = _ended(self.stop, self.tokens)  # [B, W]
        return self._move(self.images[:, None].expand(-1, width))

    def _go_on(self, logits):
        width = self.scores.shape[1]
        # the W best tokens of a hypothesis are all that can be among the W best of the image
        ids, best = best_tokens(logits, width, self.config.temperature)  # [B·W, W]
        ids, best = (part.unflatten(0, (-1, width)) for part in (ids, best))
        self.scores, beams, last, self.lengths = _extend(
            ids, best, self.scores, self.lengths, self.stopped, self.config.length_penalty
        )
        tokens = self.tokens.gather(1, beams[..., None].expand_as(self.tokens))
        self.tokens = torch.cat((tokens, last[..., None]), dim=-1)
        self.stopped = self.stopped.gather(1, beams) | _ended(self.stop, self.tokens)
        return self._move(torch.arange(len(beams), device=beams.device)[:, None] * width + beams)

    def _move(self, sources):
        """Let go of the images that are done; `sources`: [B, W] the row each hypothesis goes on from."""
        if not self._looks():  # hypotheses of an image that is done do not change
            return Move(self.tokens[..., -1].flatten(), sources.flatten(), {})
        done = self.stopped.all(-1) | (self.length >= self.limits[self.images])  # [B]
        finished = {int(self.images[row]): self._ranked(row) for row in done.nonzero()[:, 0].tolist()}
        if finished:
            going = (~done).nonzero()[:, 0]
            for name in ("images", "scores", "tokens", "lengths", "stopped"):
                setattr(self, name, getattr(self, name)[going])
            sources = sources[going]
        return Move(self.tokens[..., -1].flatten(), sources.flatten(), finished)

    def _ranked(self, row):
        """Return the Captions of the image in a row of the state, best first."""
        scores, lengths = self.scores[row], self.lengths[row]
        order = (scores / lengths**self.config.length_penalty).argsort(descending=True)[: self.config.num_captions]
        return [Caption(self.tokens[row, i, : int(lengths[i])].tolist(), scores[i].item()) for i in order.tolist()]


def _ended(stop, tokens):
    """Return which hypotheses [B, W] their newest token ends; tokens: [B, W, T]."""
    rows = tokens.flatten(0, 1)
    return stop(rows[:, -1], lambda row: rows[row].tolist()).view(tokens.shape[:2])


def _extend(ids, best, scores, lengths, stopped, length_penalty):
    """Choose the W best continuations of each image's W hypotheses.

    Args:
        ids, best: [B, W, W] the likeliest tokens after each hypothesis, and their log-probabilities, best first.
        scores, lengths, stopped: [B, W] of the hypotheses so far.
    Returns: scores [B, W], the hypothesis each came from [B, W], its new token [B, W], lengths [B, W].
    """
    width = scores.shape[1]
    # a stopped hypothesis goes on in one way only: unchanged, with a token that is never read
    unchanged = torch.full_like(best, -torch.inf)
    unchanged[..., 0] = 0
    best = torch.where(stopped[..., None], unchanged, best)
    sums = scores[..., None] + best
    lengths = lengths + ~stopped
    means = sums / lengths[..., None] ** length_penalty
    _, chosen = means.flatten(1).topk(width)  # [B, W] of W·W
    beams = chosen // width
    return sums.flatten(1).gather(1, chosen), beams, ids.flatten(1).gather(1, chosen), lengths.gather(1, beams)


def best_tokens(logits, number, temperature):
    """Return the likeliest tokens of each row, [R, N], and their log-probabilities, best first.

    Args:
        logits: [R, V] of any type; computed with in float32.
        number: N.
        temperature: divides the logits.
    """
    best, ids = largest(logits, number)
    best = best.float().div_(temperature)
    top = best[:, :1]
    sums = [
        part.to(torch.float32, copy=True).div_(temperature).sub_(highest).exp_().sum(-1, keepdim=True)
        for part, highest in zip(_parts(logits), _parts(top), strict=True)
    ]
    return ids, best - top - torch.cat(sums).log_()


def _parts(rows):
    """Split a tensor's rows into what is worked on at once: on a CPU what its cache holds, elsewhere all."""
    return rows.split(ROWS_AT_ONCE if rows.device.type == "cpu" else max(1, len(rows)))


def make_search(config, stop, keys=None, limits=None):
    """Return the search that a DecodingConfig asks for; see Search, and Nucleus for `keys`."""
    if config.method == SAMPLE:
        return Nucleus(config, stop, keys, limits)
    return {GREEDY: Greedy, BEAM: Beam}[config.method](config, stop, limits)
