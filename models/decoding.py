"""Decoding: greedy, beam search and nucleus sampling on one cached step.

The decoders see a `step` only, never a model: `step(tokens)` appends one token to every row and returns the next
logits, `step.select(rows)` keeps, drops, repeats or reorders rows. Finished captions leave the batch.

Axes: B images, R rows at work, W beams, V vocabulary, T tokens so far.
"""

import hashlib
import sys
from dataclasses import dataclass, field, fields, replace

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from models.language import context_length
from models.steps import cache_argument, step_for
from models.stopping import Stop, end_tokens, opening_tokens

GREEDY, BEAM, SAMPLE = "greedy", "beam", "sample"
DECODERS = ("clipcap", "transformers")
SCORED_TOGETHER = 8  # captions of the library's search: their logits take T x V numbers each


@dataclass
class DecodingConfig:
    """How captions are made.

    Args:
        method: `greedy`, `beam` or `sample`.
        decoder: `clipcap`, the searches below, or `transformers`, the library's `generate`, as the OPT predecessor;
            they sample alike.
        beam_size: W.
        entry_length: new tokens at most, within the language model's context.
        stop_token: text that ends a caption, whatever tokens make it; it is kept in the text.
        top_p: probability mass that sampling draws from, in (0, 1].
        temperature: divides the logits.
        length_penalty: exponent of the length that a beam's log-probability is divided by; 1 is the mean.
        num_captions: captions per image; at most `beam_size` of beam search.
        seed: of sampling.
        prompt: text that the caption goes on from; not part of the caption.
    """

    method: str = GREEDY
    decoder: str = "clipcap"
    beam_size: int = 5
    entry_length: int = 67
    stop_token: str = "."
    top_p: float = 0.8
    temperature: float = 1.0
    length_penalty: float = 1.0
    num_captions: int = 1
    seed: int = 0
    prompt: str = ""

    def __post_init__(self):
        if self.method not in (GREEDY, BEAM, SAMPLE):
            raise ValueError(f"decoding method {self.method!r} is not one of {GREEDY}, {BEAM}, {SAMPLE}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} is not above 0 and at most 1")
        if not self.temperature > 0:  # nor is NaN
            raise ValueError(f"--temperature {self.temperature} is not above 0; leave --top_p out for greedy decoding")
        if self.method == BEAM and self.num_captions > self.beam_size:
            raise ValueError(
                f"--num_captions {self.num_captions} is more than --beam_size {self.beam_size}; raise --beam_size"
            )
        if self.method == GREEDY and self.num_captions > 1:
            raise ValueError("--num_captions above 1 needs --use_beam_search or --top_p: greedy decoding gives one")
        if self.decoder not in DECODERS:
            raise ValueError(f"--decoder {self.decoder!r} is not one of {', '.join(DECODERS)}")

    @classmethod
    def from_dict(cls, values, path):
        """Build from what a run's json says; what it does not say has its default.

        Args:
            path: the json, named in errors.
        Raises: ValueError naming a key that is unknown or whose value is no setting.
        """
        types = {f.name: (int, float) if f.type is float else f.type for f in fields(cls)}
        if not isinstance(values, dict):
            raise ValueError(f"{path}: decoding is not a list of settings")
        for name, value in values.items():
            if name not in types:
                raise ValueError(
                    f"{path}: decoding has the unknown key {name!r}; this version knows {', '.join(types)}"
                )
            if isinstance(value, bool) or not isinstance(value, types[name]):
                raise ValueError(f"{path}: decoding has {name} {value!r}, which is no such setting")
            if name in ("beam_size", "entry_length", "num_captions") and value < 1:
                raise ValueError(f"{path}: decoding has {name} {value}, which is not at least 1")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: decoding: {error}") from None


@dataclass
class Caption:
    """One decoded caption.

    Args:
        tokens: its token ids, up to the one that ended it.
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


def decode_rows(step, choose, config, stop):
    """Extend every row by one chosen token at a time, until it ends or has `entry_length` tokens.

    Args:
        step: CachedStep of R rows.
        choose: function of logits [R', V] and row numbers [R'] to token ids [R'].
        stop: Stop, or another function of the newest tokens [R'] and a row's tokens to which rows have ended, [R'].
    Returns: R Captions without text.
    """
    captions = [Caption() for _ in range(len(step.first))]
    rows = torch.arange(len(captions), device=step.first.device)  # rows still at work
    logits = step.first / config.temperature
    for length in range(1, config.entry_length + 1):
        tokens = choose(logits, rows)  # [R']
        logprobs = (logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
        working = [captions[row] for row in rows.tolist()]
        for caption, token, logprob in zip(working, tokens.tolist(), logprobs, strict=True):
            caption.tokens.append(token)
            caption.logprob += logprob
        going = ~stop(tokens, lambda row: working[row].tokens)  # noqa: B023  called at once
        if length == config.entry_length or not going.any():
            break
        if not going.all():
            kept = going.nonzero()[:, 0]
            rows, tokens = rows[kept], tokens[kept]
            step.select(kept)
        logits = step(tokens) / config.temperature
    return captions


def greedy_search(step, config, stop):
    """Take the likeliest token every time.

    Args: see `decode_rows`.
    Returns: per image, a list of one Caption.
    Source: rmokady predict.py `generate2`, which filters by top_p and then takes the argmax all the same.
    """
    return [[caption] for caption in decode_rows(step, lambda logits, rows: logits.argmax(-1), config, stop)]


def image_keys(clip_embedding):
    """Return a key per image for the random numbers of sampling: its embedding's bytes, whatever shares its batch."""
    return [row.cpu().numpy().tobytes() for row in clip_embedding.detach().half()]


def _draws(keys, config):
    """Return uniform random numbers [B, N, T], each row's from seed, image and candidate alone."""
    generator, rows = torch.Generator(), []
    for key in keys:
        for candidate in range(config.num_captions):
            digest = hashlib.sha256(f"{config.seed} {candidate} ".encode() + key).digest()
            generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            rows.append(torch.rand(config.entry_length, generator=generator))
    return torch.stack(rows).view(len(keys), config.num_captions, -1)


def nucleus_sampling(step, config, stop, keys):
    """Draw each token from the likeliest ones that hold `top_p` of the probability.

    Random numbers come from seed, image and candidate: no image shares another's, and no batch changes them.

    Args: see `decode_rows`.
        keys: bytes that tell each image.
    Returns: per image, `num_captions` Captions as drawn.
    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv 1904.09751).
    """
    images, count = len(step.first), config.num_captions
    draws = _draws(keys, config).flatten(0, 1).to(step.first.device)  # [B·N, T]
    repeated = torch.arange(images, device=step.first.device).repeat_interleave(count)
    step.select(repeated)
    step.first = step.first[repeated]
    position = iter(range(config.entry_length))

    def choose(logits, rows):
        probabilities, ids = logits.softmax(-1).sort(descending=True)  # [R', V]
        mass = probabilities.cumsum(-1)
        # a token is in while the mass before it is below top_p, so the likeliest always is
        nucleus = probabilities.masked_fill(mass - probabilities >= config.top_p, 0)
        drawn = draws[rows, next(position)].to(logits) * nucleus.sum(-1)  # [R']
        index = (nucleus.cumsum(-1) <= drawn[:, None]).sum(-1)
        last = (nucleus > 0).sum(-1) - 1  # rounding must not step past the nucleus
        return ids.gather(-1, index.minimum(last)[:, None])[:, 0]

    captions = decode_rows(step, choose, config, stop)
    return [captions[image * count : (image + 1) * count] for image in range(images)]


def beam_search(step, config, stop):
    """Keep the W hypotheses with the highest mean log-probability at every step.

    A hypothesis that has ended stays as it is and goes on competing.

    Args: see `decode_rows`.
    Returns: per image, `num_captions` Captions, best first.
    Source: rmokady predict.py `generate_beam`, here for many images at once and on a cache.
    """
    width, device = min(config.beam_size, step.first.shape[-1]), step.first.device
    images = torch.arange(len(step.first), device=device)  # images still at work
    results = [None] * len(images)
    logprobs = (step.first / config.temperature).log_softmax(-1)  # [B, V]
    scores, last = logprobs.topk(width)  # [B, W] sums of log-probabilities, newest tokens
    tokens = last[..., None]  # [B, W, T]
    lengths = torch.ones_like(scores)
    stopped = _ended(stop, tokens)  # [B, W]
    source = torch.arange(len(images), device=device)[:, None].expand(-1, width)  # cache rows
    while True:
        done = stopped.all(-1) | (tokens.shape[-1] == config.entry_length)  # [B]
        for row in done.nonzero()[:, 0].tolist():
            results[images[row]] = _ranked(tokens[row], scores[row], lengths[row], config)
        going = (~done).nonzero()[:, 0]
        if not len(going):
            return results
        images, scores, tokens, lengths, stopped, source = (
            state[going] for state in (images, scores, tokens, lengths, stopped, source)
        )
        step.select(source.flatten())
        logits = step(tokens[..., -1].flatten()) / config.temperature  # [B·W, V]
        scores, beams, last, lengths = _extend(logits.unflatten(0, (-1, width)), scores, lengths, stopped, config)
        tokens = torch.cat((tokens.gather(1, beams[..., None].expand_as(tokens)), last[..., None]), dim=-1)
        stopped = stopped.gather(1, beams) | _ended(stop, tokens)
        source = torch.arange(len(images), device=device)[:, None] * width + beams


def _ended(stop, tokens):
    """Return which hypotheses [B, W] their newest token ends; tokens: [B, W, T]."""
    rows = tokens.flatten(0, 1)
    return stop(rows[:, -1], lambda row: rows[row].tolist()).view(tokens.shape[:2])


def _extend(logits, scores, lengths, stopped, config):
    """Choose the W best continuations of each image's W hypotheses.

    Args:
        logits: [B, W, V]. scores, lengths, stopped: [B, W] of the hypotheses so far.
    Returns: scores [B, W], the hypothesis each came from [B, W], its new token [B, W], lengths [B, W].
    """
    width = scores.shape[1]
    # the W best tokens of a hypothesis are all that can be among the W best of the image
    best, ids = logits.topk(width)  # [B, W, W]
    best = best - logits.logsumexp(-1, keepdim=True)
    # a stopped hypothesis goes on in one way only: unchanged, with a token that is never read
    unchanged = torch.full_like(best, -torch.inf)
    unchanged[..., 0] = 0
    best = torch.where(stopped[..., None], unchanged, best)
    sums = scores[..., None] + best
    lengths = lengths + ~stopped
    means = sums / lengths[..., None] ** config.length_penalty
    _, chosen = means.flatten(1).topk(width)  # [B, W] of W·W
    beams = chosen // width
    return sums.flatten(1).gather(1, chosen), beams, ids.flatten(1).gather(1, chosen), lengths.gather(1, beams)


def _ranked(tokens, scores, lengths, config):
    """Return one image's Captions, best first. tokens: [W, T]; scores, lengths: [W]."""
    order = (scores / lengths**config.length_penalty).argsort(descending=True)[: config.num_captions]
    return [Caption(tokens[i, : int(lengths[i])].tolist(), scores[i].item()) for i in order.tolist()]


SEARCHES = {GREEDY: greedy_search, BEAM: beam_search}


class _StopCriterion(StoppingCriteria):
    """Stop, as transformers' `generate` asks for it."""

    def __init__(self, stop):
        self.stop = stop

    def __call__(self, input_ids, scores, **kwargs):
        return self.stop(input_ids[:, -1], lambda row: input_ids[row].tolist())


def library_search(gpt, embeddings, tokenizer, config, stop):
    """Decode with transformers' `generate`, whose beam search is another one than ClipCap's.

    Args:
        embeddings: [B, P, E] prefix and prompt.
    Returns: per image, `num_captions` Captions, best first.
    Raises: ValueError where the language model takes no cache, without which `generate` forgets the prefix.
    Source: Jhryu30/cvpr2023_challenge_clipcap predict.py `generate`.
    """
    if not cache_argument(gpt):
        raise ValueError(f"--decoder transformers needs a cache, which {type(gpt).__name__} has not; use clipcap")
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
    """Return the id that fills up finished captions."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def context_room(config, positions):
    """Return how many tokens a language model can still make after `positions`; the last need not be read again.

    Raises: ValueError where there is none.
    """
    limit = context_length(config)
    room = limit + 1 - positions if limit else sys.maxsize
    if room < 1:
        raise ValueError(f"the prefix and prompt take {positions} positions and the language model has only {limit}")
    return room


@torch.inference_mode()
def generate_captions(model, tokenizer, clip_embedding, config, step_type=step_for, keys=None):
    """Caption a batch of images.

    Args:
        model: ClipCaptionModel, in evaluation mode.
        tokenizer: of its language model.
        clip_embedding: [B, D].
        config: DecodingConfig.
        step_type: step_for, or UncachedStep to check it.
        keys: per image, what its random numbers come from; None: see `image_keys`.
    Returns: per image, a list of Captions, best (or first drawn) first.
    Raises: ValueError where prefix and prompt leave no room in the language model's context; where they leave less
        than `entry_length`, captions end there.
    """
    gpt = model.gpt
    embed = gpt.get_input_embeddings()
    embeddings = model.prefix(clip_embedding).to(embed.weight.dtype)  # [B, P, E]
    before = opening_tokens(tokenizer, config.prompt)
    if before:
        tokens = torch.tensor(before, device=embeddings.device).expand(len(embeddings), -1)
        embeddings = torch.cat((embeddings, embed(tokens)), dim=1)
    room = context_room(gpt.config, embeddings.shape[1])
    config = replace(config, entry_length=min(config.entry_length, room))
    stop = Stop(tokenizer, config.stop_token, len(embed.weight), end_tokens(tokenizer, gpt), embeddings.device)
    if config.decoder == "transformers" and config.method != SAMPLE:
        captions = library_search(gpt, embeddings, tokenizer, config, stop)
    elif config.method == SAMPLE:
        captions = nucleus_sampling(step_type(gpt, embeddings), config, stop, keys or image_keys(clip_embedding))
    else:
        captions = SEARCHES[config.method](step_type(gpt, embeddings), config, stop)
    for caption in (caption for group in captions for caption in group):
        caption.text = stop.text_until(caption.tokens)
    return captions
