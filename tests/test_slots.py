"""Decoding in preallocated slots equals transformers' own forward pass."""

import copy
import weakref

import pytest
import torch
from transformers import GPT2Config, OPTConfig

from models import cuda_graphs
from models.attention import FEW_ROWS
from models.language import build_language_model
from models.slots import SLOTS, SlotStep, has_slots, step_for
from models.steps import CachedStep, UncachedStep
from utils.precision import prepare_for_inference

GPT2 = {"vocab_size": 60, "n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4}
OPT = {
    "vocab_size": 60, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 96, "pad_token_id": 1,
}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2, scaled by layer": GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, n_inner=40),
    "gpt2, not scaled": GPT2Config(**GPT2, scale_attn_weights=False, activation_function="relu"),
    "opt": OPTConfig(**OPT),
    "opt, norms after": OPTConfig(**OPT | {"word_embed_proj_dim": 16}, do_layer_norm_before=False, enable_bias=False),
    "opt, no last norm": OPTConfig(**OPT, _remove_final_layer_norm=True),
}
ROWS, PREFIX, MANY = 3, 5, 12  # MANY rows are attended to in another way than a few


def build(name):
    """Return a random language model whose attention is not the same for all tokens."""
    torch.manual_seed(0)
    gpt = build_language_model(copy.deepcopy(CONFIGS[name]))
    for parameter in gpt.parameters():
        parameter.data.normal_(0, 0.3)
    return gpt.eval()


@pytest.fixture
def fixed(monkeypatch):
    """Let steps of up to nine rows have fixed shapes, as on a GPU."""
    monkeypatch.setattr(cuda_graphs, "suits", lambda slots, _: len(slots[0][0]) <= 9)
    monkeypatch.setattr(cuda_graphs, "ROOM", 4)
    monkeypatch.setattr(cuda_graphs, "_free", weakref.WeakKeyDictionary())


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_library(name, padded):
    equals_the_library(name, padded)


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("name", ("gpt2", "opt"))
def test_fixed_shapes_equal_the_library(name, padded, fixed):
    """Also where rows become more than there is room for, where they become few again, and in more slots."""
    equals_the_library(name, padded)


@torch.inference_mode()
def equals_the_library(name, padded):
    """Through a beam's first growth, moves within and between images, rows that leave, and more slots."""
    assert ROWS <= FEW_ROWS < MANY
    gpt = build(name)
    embeddings = torch.randn(ROWS, PREFIX, gpt.get_input_embeddings().embedding_dim)
    lengths = torch.tensor([5, 2, 4]) if padded else None
    steps = [kind(gpt, embeddings, lengths) for kind in (SlotStep, CachedStep, UncachedStep)]
    assert type(step_for(gpt, embeddings, lengths)) is SlotStep

    def together(found, *expected):
        assert all(torch.allclose(found, other, atol=2e-4, rtol=1e-4) for other in expected)

    together(*(step.first for step in steps))
    rows, moves = ROWS, {
        2: torch.arange(ROWS).repeat_interleave(4), 5: torch.tensor([1, 1, 0, 2, 4, 7, 7, 5, 8, 11, 10, 8]),
        7: torch.tensor([4, 5, 6, 7, 8, 9, 10, 11]), 9: torch.tensor([6, 0]), SLOTS + 2: torch.tensor([1]),
    }  # fmt: skip
    for number in range(SLOTS + 6):
        if number in moves:
            for step in steps:
                step.select(moves[number])
            rows = len(moves[number])
        tokens = torch.randint(2, 60, (rows,))
        together(*(step(tokens) for step in steps))


@torch.inference_mode()
@pytest.mark.parametrize("name", ("gpt2", "gpt2, not scaled", "opt"))
def test_bf16_and_packed(name):
    """Packed layers compute GELU and ReLU in the kernel of the product before."""
    gpt = prepare_for_inference(build(name), "fp32", torch.device("cpu"))
    half = build(name).bfloat16()
    for model, tolerance in ((gpt, 2e-4), (half, 0.1)):
        embeddings = torch.randn(MANY, PREFIX, 32).to(model.lm_head.weight.dtype)
        slots, cached = SlotStep(model, embeddings), CachedStep(model, embeddings)
        tokens = torch.randint(0, 60, (MANY,))
        found, expected = slots(tokens), cached(tokens)
        assert found.dtype == expected.dtype and slots.slots[0][0].dtype == embeddings.dtype
        assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_others_are_left_to_the_library():
    """Models that something watches, that learn, or that compute otherwise."""
    gpt = build("gpt2")
    assert has_slots(gpt)
    with torch.autocast("cpu", torch.bfloat16):
        assert not has_slots(gpt)
    assert not has_slots(gpt.train())
    handle = gpt.eval().transformer.h[1].register_forward_hook(lambda *_: None)
    assert not has_slots(gpt)
    handle.remove()
    gpt.transformer.ln_f.forward = gpt.transformer.ln_f.forward
    assert not has_slots(gpt)
    del gpt.transformer.ln_f.forward
    assert has_slots(gpt)
    gpt.set_attn_implementation("eager")
    assert not has_slots(gpt)
    assert type(step_for(gpt, torch.zeros(1, 2, 32))) is CachedStep

    class Own(type(build("gpt2"))):
        pass

    assert not has_slots(Own(CONFIGS["gpt2"]).eval())


@torch.inference_mode()
def test_fixed_steps_are_used_again(fixed, monkeypatch):
    """By one decoding at a time, for the same weights, without a trace of the batch before."""
    gpt, made, init = build("gpt2"), [], cuda_graphs.FixedStep.__init__
    monkeypatch.setattr(cuda_graphs.FixedStep, "__init__", lambda self, *args: made.append(args) or init(self, *args))
    prefixes, tokens = torch.randn(3, 2, PREFIX, 32), torch.randint(0, 60, (4, 2))

    def decode(step, number):
        return torch.stack([step(row).clone() for row in tokens[:number]])

    expected = [decode(CachedStep(gpt, prefix), 4) for prefix in prefixes]
    for _ in range(2):  # two decodings that take turns
        steps = [SlotStep(gpt, prefix) for prefix in prefixes[:2]]
        begun = [decode(step, 2) for step in steps]
        for step, start, own in zip(steps, begun, expected, strict=False):
            found = torch.cat((start, torch.stack([step(row).clone() for row in tokens[2:]])))
            assert torch.allclose(found, own, atol=1e-4)
        assert len(made) == 2
        steps[0].fixed.slots.fill_(torch.nan)
        del steps, step
    assert torch.allclose(decode(SlotStep(gpt, prefixes[0]), 4), expected[0], atol=1e-4) and len(made) == 2
    gpt.lm_head.weight = torch.nn.Parameter(gpt.lm_head.weight * 2)
    assert torch.allclose(decode(SlotStep(gpt, prefixes[0]), 4), decode(CachedStep(gpt, prefixes[0]), 4), atol=1e-3)
    assert len(made) == 3
    for rows in (1, 2, 4, 8):
        step = SlotStep(gpt, torch.randn(rows, PREFIX, 32))
        step(torch.zeros(rows, dtype=torch.long))
    kept, size = cuda_graphs._free[gpt], step.fixed.slots.nbytes
    monkeypatch.setattr(cuda_graphs, "MOST", size * 2)
    del step
    assert sum(one.slots.nbytes for one in kept) <= size * 2 and kept[-1].slots.nbytes == size
