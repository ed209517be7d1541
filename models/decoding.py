"""Decoding: a captioner's prefix, a cached step and a search, put together.

Axes: B images, P positions of prefix and prompt, E width.
"""

import sys
from dataclasses import dataclass, fields, replace

import torch

from models.language import context_length
from models.library_search import library_search
from models.searches import BEAM, CLIP, GREEDY, MBR, NO_RERANK, SAMPLE, decode, image_keys, make_search
from models.searches import Caption as Caption  # whoever decodes finds it here
from models.steps import step_for
from models.stopping import Stop, end_tokens, opening_tokens

DECODERS = ("clipcap", "transformers")
RERANKS = (NO_RERANK, CLIP, MBR)


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
        num_captions: captions per image; at most `beam_size` of beam search, `num_candidates` of reranking.
        seed: of sampling.
        prompt: text that the caption goes on from; not part of the caption.
        rerank: `none`, or how the best of many candidates are chosen: `clip` or `mbr`, see models.rerank. The captioner
            with its encoder does it; `generate_captions` alone does not.
        num_candidates: candidates per image: beams of beam search, else samples.
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
    rerank: str = NO_RERANK
    num_candidates: int = 16

    def __post_init__(self):
        if self.method not in (GREEDY, BEAM, SAMPLE):
            raise ValueError(f"decoding method {self.method!r} is not one of {GREEDY}, {BEAM}, {SAMPLE}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} is not above 0 and at most 1")
        if not self.temperature > 0:  # nor is NaN
            raise ValueError(f"--temperature {self.temperature} is not above 0; leave --top_p out for greedy decoding")
        if self.rerank not in RERANKS:
            raise ValueError(f"--rerank {self.rerank!r} is not one of {', '.join(RERANKS)}")
        if self.decoder not in DECODERS:
            raise ValueError(f"--decoder {self.decoder!r} is not one of {', '.join(DECODERS)}")
        if self.rerank != NO_RERANK:
            if self.num_captions > self.num_candidates:
                raise ValueError(
                    f"--num_captions {self.num_captions} is more than --num_candidates {self.num_candidates} to choose "
                    "from; raise --num_candidates"
                )
            return
        if self.method == BEAM and self.num_captions > self.beam_size:
            raise ValueError(
                f"--num_captions {self.num_captions} is more than --beam_size {self.beam_size}; raise --beam_size"
            )
        if self.method == GREEDY and self.num_captions > 1:
            raise ValueError(
                "--num_captions above 1 needs --use_beam_search, --top_p or --rerank: greedy decoding gives one"
            )

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
            if name in ("beam_size", "entry_length", "num_captions", "num_candidates") and value < 1:
                raise ValueError(f"{path}: decoding has {name} {value}, which is not at least 1")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: decoding: {error}") from None


def context_room(config, positions):
    """Return how many tokens a language model can still make after `positions`; the last need not be read again.

    Raises: ValueError where there is none.
    """
    limit = context_length(config)
    room = limit + 1 - positions if limit else sys.maxsize
    if room < 1:
        raise ValueError(f"the prefix and prompt take {positions} positions and the language model has only {limit}")
    return room


def prompted_prefix(model, tokenizer, clip_embedding, prompts):
    """Return what the language model reads before captions.

    Args:
        prompts: per image a text; or one for all.
    Returns: [B, P, E], and the lengths [B] of its rows, which are padded on the right; None where all are full.
    """
    embed = model.gpt.get_input_embeddings()
    embeddings = model.prefix(clip_embedding).to(embed.weight.dtype)
    if isinstance(prompts, str):
        prompts = [prompts] * len(embeddings)
    before = [opening_tokens(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, before), default=0)
    if longest:
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in before], device=embeddings.device)
        embeddings = torch.cat((embeddings, embed(padded)), dim=1)
    if all(len(ids) == longest for ids in before):
        return embeddings, None
    return embeddings, torch.tensor([embeddings.shape[1] - longest + len(ids) for ids in before])


@torch.inference_mode()
def generate_captions(model, tokenizer, clip_embedding, config, step_type=step_for, keys=None, prompts=None):
    """Caption a batch of images.

    Args:
        model: ClipCaptionModel, in evaluation mode.
        tokenizer: of its language model.
        clip_embedding: [B, D].
        config: DecodingConfig.
        step_type: step_for, or UncachedStep to check it.
        keys: per image, what its random numbers come from; None: see `image_keys`.
        prompts: per image, the text its captions go on from; None: `config.prompt` for all.
    Returns: per image, a list of Captions, best (or first drawn) first. Their tokens hold the one that ended them.
    Raises: ValueError where prefix and prompt leave no room in the language model's context; where they leave less
        than `entry_length`, captions end there.
    """
    gpt = model.gpt
    prompts = config.prompt if prompts is None else prompts
    embeddings, lengths = prompted_prefix(model, tokenizer, clip_embedding, prompts)
    positions = [embeddings.shape[1]] if lengths is None else lengths.tolist()
    limits = [min(config.entry_length, context_room(gpt.config, number)) for number in positions]
    config = replace(config, entry_length=max(limits))
    vocabulary = len(gpt.get_input_embeddings().weight)
    stop = Stop(tokenizer, config.stop_token, vocabulary, end_tokens(tokenizer, gpt), embeddings.device)
    if config.decoder == "transformers" and config.method != SAMPLE:
        if lengths is not None:
            raise ValueError("--decoder transformers takes one prompt for all images")
        captions = library_search(gpt, embeddings, tokenizer, config, stop)
    else:
        limits = None if lengths is None else torch.tensor(limits)
        keys = keys or (image_keys(clip_embedding) if config.method == SAMPLE else None)
        captions = decode(step_type(gpt, embeddings, lengths), make_search(config, stop, keys, limits))
    for caption in (caption for group in captions for caption in group):
        caption.text = stop.text_until(caption.tokens)
    return captions
