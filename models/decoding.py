"""Decoding: a captioner's prefix, a cached step and a search, put together.

Axes: B images, P positions of prefix and prompt, E width.
"""

import sys
from dataclasses import replace

import torch

from models.language import context_length
from models.library_search import library_search
from models.searches import Caption as Caption  # re-exported for callers that decode
from models.searches import decode, image_keys, make_search
from models.settings import SAMPLE
from models.settings import DecodingConfig as DecodingConfig
from models.slots import step_for
from models.stopping import Stop, end_tokens, opening_tokens


def context_room(config, positions):
    """Return how many tokens a language model can still make after `positions`; the last one is not fed back.

    Raises: ValueError where there is none.
    """
    limit = context_length(config)
    room = limit + 1 - positions if limit else sys.maxsize
    if room < 1:
        raise ValueError(f"the prefix and prompt take {positions} positions and the language model has only {limit}")
    return room


def prompted_prefix(model, tokenizer, clip_embedding, prompts):
    """Return what the language model reads before each caption.

    Args:
        prompts: a text per image, or one for all.
    Returns: [B, P, E], its rows padded on the right, and their lengths [B]; None where no row is padded.
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
        keys: per image, what seeds its random numbers; None: see `image_keys`.
        prompts: per image, the text that its captions continue; None: `config.prompt` for all.
    Returns: per image, a list of Captions, best (or first drawn) first. Their tokens include the one that ended them.
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
