"""Captions per second: ours beside the plain method and transformers' generate, at equal settings and tokens."""

import copy
import functools
from dataclasses import replace

import torch

from benchmarks.measure import interleave, peak_memory, precisions
from benchmarks.plain import beam_caption, greedy_caption
from benchmarks.workload import PREFIX, language_model
from models.searches import decode, make_search
from models.settings import BEAM, GREEDY, DecodingConfig
from models.slots import step_for
from utils.precision import prepare_for_inference

NEW_TOKENS = 20
# parameters of GPT-2: each is read once per step, and multiplied and added once per position; the output's only where
# a token is chosen
PARAMETERS, OUTPUT = 124e6, 39e6


def stop_never(tokens, caption):
    """End no caption: every one then has the same length in all systems."""
    return torch.zeros_like(tokens, dtype=torch.bool)


def prefixes(gpt, batch, device):
    """Return [B, P, E] random prefixes."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(batch, PREFIX, gpt.config.hidden_size, generator=generator) * 0.02
    return rows.to(gpt.get_input_embeddings().weight.dtype).to(device)


@torch.inference_mode()
def ours(gpt, embeddings, config):
    """Return the token ids of each image's best caption."""
    groups = decode(step_for(gpt, embeddings), make_search(config, stop_never))
    return [group[0].tokens for group in groups]


@torch.inference_mode()
def library(gpt, embeddings, config):
    """The same by transformers' generate."""
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    return gpt.generate(
        inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=config.entry_length, do_sample=False,
        min_new_tokens=config.entry_length, num_beams=config.rows, pad_token_id=0,
    ).tolist()  # fmt: skip


def plain(gpt, embeddings, config):
    """The plain method for one image."""
    if config.method == BEAM:
        return [beam_caption(gpt, embeddings[:1], config, stop_never)]
    return [greedy_caption(gpt, embeddings[:1], config.entry_length)]


def prepare_systems(device, dtypes):
    """Return {name: (function, model, dtype)} of all systems, `plain` first."""
    systems = {"plain": (plain, language_model(ours=False).to(device), "fp32")}
    reference = systems["plain"][1]
    for dtype in dtypes:
        if dtype != "int8":
            gpt = copy.deepcopy(reference).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
            systems[f"generate {dtype}"] = (library, gpt, dtype)
        gpt = prepare_for_inference(language_model().to(device), dtype, device)
        systems[f"ours {dtype}"] = (ours, gpt, dtype)
    return systems


def measure_cell(systems, batch, config, repeats, device):
    """Time all systems on one batch.

    Returns: rows {system, method, batch, beams, tokens, ms per caption, captions per s, x plain, x generate, equal}.
    """
    work = {
        name: functools.partial(call, gpt, prefixes(gpt, batch, device), config)
        for name, (call, gpt, _) in systems.items()
    }
    timed = interleave(work, repeats, device)
    seconds, tokens = timed.seconds, timed.results
    reference = tokens["ours fp32"]
    rows = []
    for name, (_, _, dtype) in systems.items():
        captions = 1 if name == "plain" else batch
        each = seconds[name] / captions
        same = sum(a == b for a, b in zip(tokens[name], reference, strict=False)) / captions
        generate = seconds.get(f"generate {dtype}") if name.startswith("ours") else None
        rows.append({
            "system": name, "batch": captions, "beams": config.rows,
            "tokens": config.entry_length, "ms/caption": each * 1e3, "captions/s": 1 / each,
            "x plain": seconds["plain"] / each, "x generate": generate and generate / seconds[name],
            "GFLOP/s": operations(config) / each / 1e9, "GB/s": weights_read(dtype, config, seconds[name], name),
            "equal to fp32": same,
        } | timed.quality(name))  # fmt: skip
    return rows


def operations(config):
    """Return how many multiplications and additions a caption cannot do without: the first token is the prefix'."""
    return 2 * ((PARAMETERS - OUTPUT) * PREFIX + OUTPUT + PARAMETERS * config.rows * (config.entry_length - 1))


def weights_read(dtype, config, seconds, name):
    """Return GB of weights that are read per second: once per token, whatever the batch."""
    size = {"fp32": 4, "bf16": 2, "int8": 1}[dtype]
    return PARAMETERS * size * config.entry_length / seconds / 1e9 if name != "plain" else None


def run(device, repeats, quick):
    """Measure all cells.

    Returns: {title: rows}.
    """
    dtypes = precisions(device)
    systems = prepare_systems(device, dtypes + (["int8"] if device.type == "cpu" else []))
    greedy = DecodingConfig(method=GREEDY, entry_length=NEW_TOKENS)
    beam = DecodingConfig(method=BEAM, entry_length=NEW_TOKENS)
    cells = {
        "batch": [(1, greedy), (8, greedy), (32, greedy), (64, greedy), (1, beam), (4, beam), (16, beam)],
        "beams": [(1, replace(beam, beam_size=width)) for width in (2, 10)],
        "length": [(8, replace(greedy, entry_length=40))],
    }
    if quick:
        cells = {"batch": [(1, replace(greedy, entry_length=4)), (2, replace(beam, entry_length=4))]}
    return {
        title: [row for batch, config in cell for row in measure_cell(systems, batch, config, repeats, device)]
        for title, cell in cells.items()
    }


def memory():
    """Return rows of the peak memory of captioning 32 images, greedily."""
    rows = []
    for name in ("plain", "generate fp32", "ours fp32"):
        whole, alone, _ = peak_memory(_prepare_memory, name)
        rows.append({"system": name, "MiB with the model": whole, "MiB of captioning": alone})
    return rows


def _prepare_memory(name):
    """Return the function whose memory is measured."""
    device, config = torch.device("cpu"), DecodingConfig(method=GREEDY, entry_length=NEW_TOKENS)
    gpt = language_model(ours=name.startswith("ours"))
    if name.startswith("ours"):
        gpt = prepare_for_inference(gpt, "fp32", device)
    call = {"plain": plain, "generate fp32": library, "ours fp32": ours}[name]
    return lambda: call(gpt, prefixes(gpt, 32, device), config)
