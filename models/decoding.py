"""Decoding: greedy, beam search and nucleus sampling on one cached step.

The decoders see a `step` only, never a model: `step(tokens)` appends one token to every row and returns the next
logits, `step.select(rows)` keeps, drops, repeats or reorders rows. Finished captions leave the batch.

Axes: B images, R rows at work, W beams, V vocabulary, T tokens so far.
"""

import inspect
import sys
from dataclasses import dataclass, field, replace

import torch
from transformers import DynamicCache

from models.language import context_length

GREEDY, BEAM, SAMPLE = "greedy", "beam", "sample"


@dataclass
class DecodingConfig:
    """How captions are made.

    Args:
        method: `greedy`, `beam` or `sample`.
        decoder: `clipcap`, the searches below, or `transformers`, the library's `generate`, as the OPT predecessor.
        beam_size: W.
        entry_length: new tokens at most, within the language model's context.
        stop_token: text whose first token ends a caption; it is kept in the text.
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


@dataclass
class Caption:
    """One decoded caption.

    Args:
        tokens: its token ids, the stop token included.
        logprob: sum of the tokens' log-probabilities under the language model (at the decoding temperature).
        text: the tokens decoded.
    """

    tokens: list = field(default_factory=list)
    logprob: float = 0.0
    text: str = ""


class CachedStep:
    """The language model as a function from one token per row to the next logits, with a key-value cache."""

    def __init__(self, gpt, embeddings):
        """Run the prefix.

        Args:
            gpt: causal language model.
            embeddings: [B, P, E], the same length for every row, so that nothing is padded.
        """
        self.gpt, self.cache = gpt, DynamicCache(config=gpt.config)
        # transformers 5 renamed the argument
        self.argument = "cache" if "cache" in inspect.signature(gpt.forward).parameters else "past_key_values"
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
    """The same by running the whole sequence again for every token: the reference for the cached step."""

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


def decode_rows(step, choose, config, stop_tokens):
    """Extend every row by one chosen token at a time, until its stop token or `entry_length` tokens.

    Args:
        step: CachedStep of R rows.
        choose: function of logits [R', V] and row numbers [R'] to token ids [R'].
    Returns: R Captions without text.
    """
    captions = [Caption() for _ in range(len(step.first))]
    rows = torch.arange(len(captions), device=step.first.device)  # rows still at work
    logits = step.first / config.temperature
    for length in range(1, config.entry_length + 1):
        tokens = choose(logits, rows)  # [R']
        logprobs = (logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
        for row, token, logprob in zip(rows.tolist(), tokens.tolist(), logprobs, strict=True):
            captions[row].tokens.append(token)
            captions[row].logprob += logprob
        going = ~torch.isin(tokens, stop_tokens)
        if length == config.entry_length or not going.any():
            break
        if not going.all():
            kept = going.nonzero()[:, 0]
            rows, tokens = rows[kept], tokens[kept]
            step.select(kept)
        logits = step(tokens) / config.temperature
    return captions


def greedy_search(step, config, stop_tokens):
    """Take the likeliest token every time.

    Args: see `decode_rows`.
    Returns: per image, a list of one Caption.
    Source: rmokady predict.py `generate2`, which filters by top_p and then takes the argmax all the same.
    """
    return [[caption] for caption in decode_rows(step, lambda logits, rows: logits.argmax(-1), config, stop_tokens)]


def nucleus_sampling(step, config, stop_tokens):
    """Draw each token from the likeliest ones that hold `top_p` of the probability.

    Every image and every candidate draws the same way whatever shares its batch: candidate j of any image reads its
    random numbers from a generator seeded with `seed + j`.

    Args: see `decode_rows`.
    Returns: per image, `num_captions` Captions as drawn.
    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv 1904.09751).
    """
    images, count = len(step.first), config.num_captions
    generators = [torch.Generator().manual_seed(config.seed + j) for j in range(count)]
    draws = torch.stack([torch.rand(config.entry_length, generator=g) for g in generators])  # [N, T]
    repeated = torch.arange(images, device=step.first.device).repeat_interleave(count)
    step.select(repeated)
    step.first = step.first[repeated]
    position = iter(range(config.entry_length))

    def choose(logits, rows):
        probabilities, ids = logits.softmax(-1).sort(descending=True)  # [R', V]
        mass = probabilities.cumsum(-1)
        # a token is in while the mass before it is below top_p, so the likeliest always is
        nucleus = probabilities.masked_fill(mass - probabilities >= config.top_p, 0)
        drawn = draws[:, next(position)].to(logits)[rows % count] * nucleus.sum(-1)  # [R']
        index = (nucleus.cumsum(-1) <= drawn[:, None]).sum(-1)
        last = (nucleus > 0).sum(-1) - 1  # rounding must not step past the nucleus
        return ids.gather(-1, index.minimum(last)[:, None])[:, 0]

    captions = decode_rows(step, choose, config, stop_tokens)
    return [captions[image * count : (image + 1) * count] for image in range(images)]


def beam_search(step, config, stop_tokens):
    """Keep the W hypotheses with the highest mean log-probability at every step.

    A hypothesis that has met the stop token stays as it is and goes on competing.

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
    stopped = torch.isin(last, stop_tokens)  # [B, W]
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
        stopped = stopped.gather(1, beams) | torch.isin(last, stop_tokens)
        source = torch.arange(len(images), device=device)[:, None] * width + beams


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


DECODERS = {GREEDY: greedy_search, BEAM: beam_search, SAMPLE: nucleus_sampling}


def library_search(gpt, embeddings, tokenizer, config, stop_tokens):
    """Decode with transformers' `generate`, whose beam search is another one than ClipCap's.

    Args:
        embeddings: [B, P, E] prefix and prompt.
    Returns: per image, `num_captions` Captions, best first, without the stop token.
    Source: Jhryu30/cvpr2023_challenge_clipcap predict.py `generate`.
    """
    count = config.num_captions
    options = {"num_beams": config.beam_size if config.method == BEAM else 1, "do_sample": config.method == SAMPLE}
    if config.method == SAMPLE:
        torch.manual_seed(config.seed)
        options |= {"top_p": config.top_p, "top_k": 0, "temperature": config.temperature}
    if config.method == BEAM:
        options |= {"length_penalty": config.length_penalty}
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    out = gpt.generate(
        inputs_embeds=embeddings, attention_mask=mask,
        max_new_tokens=config.entry_length, min_length=1, num_return_sequences=count,
        eos_token_id=stop_tokens.tolist() or None, pad_token_id=_pad_id(tokenizer), return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip
    scores = gpt.compute_transition_scores(out.sequences, out.scores, getattr(out, "beam_indices", None), True)
    logprobs = scores.masked_fill(~scores.isfinite(), 0).sum(-1).tolist()
    captions = [
        Caption(tokens, logprob, tokenizer.decode(tokens, skip_special_tokens=True).strip())
        for tokens, logprob in zip(out.sequences.tolist(), logprobs, strict=True)
    ]
    return [captions[start : start + count] for start in range(0, len(captions), count)]


def _pad_id(tokenizer):
    """Return the id that fills up finished captions."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def stop_ids(tokenizer, stop_token, device=None):
    """Return the ids, [S], that end a caption.

    Raises: ValueError where the tokenizer has nothing for `stop_token`.
    """
    ids = tokenizer.encode(stop_token, add_special_tokens=False) if stop_token else []
    if stop_token and not ids:
        raise ValueError(f"--stop_token {stop_token!r} is no token of this language model")
    return torch.tensor(ids[:1], dtype=torch.long, device=device)


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
def generate_captions(model, tokenizer, clip_embedding, config, step_type=CachedStep):
    """Caption a batch of images.

    Args:
        model: ClipCaptionModel, in evaluation mode.
        tokenizer: of its language model.
        clip_embedding: [B, D].
        config: DecodingConfig.
        step_type: CachedStep, or UncachedStep to check it.
    Returns: per image, a list of Captions, best (or first drawn) first.
    Raises: ValueError where prefix and prompt leave no room in the language model's context; where they leave less
        than `entry_length`, captions end there.
    """
    embeddings = model.prefix(clip_embedding).to(model.gpt.get_input_embeddings().weight.dtype)  # [B, P, E]
    prompt = tokenizer.encode(config.prompt) if config.prompt else []
    if prompt:
        tokens = torch.tensor(prompt, device=embeddings.device).expand(len(embeddings), -1)
        embeddings = torch.cat((embeddings, model.gpt.get_input_embeddings()(tokens)), dim=1)
    room = context_room(model.gpt.config, embeddings.shape[1])
    config = replace(config, entry_length=min(config.entry_length, room))
    stop_tokens = stop_ids(tokenizer, config.stop_token, embeddings.device)
    if config.decoder == "transformers":
        return library_search(model.gpt, embeddings, tokenizer, config, stop_tokens)
    step = step_type(model.gpt, embeddings)
    captions = DECODERS[config.method](step, config, stop_tokens)
    for caption in (caption for group in captions for caption in group):
        caption.text = tokenizer.decode(caption.tokens)
    return captions
