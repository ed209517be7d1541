"""Decoding's own attention is transformers' `sdpa`, and is taken where it is the faster one only."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models import attention
from models.attention import FEW_ROWS, NAME, attend
from models.language import build_language_model
from models.steps import CachedStep

MANY = FEW_ROWS + 3
SMALL_LLAMA = LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SMALL_GPT2 = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)


class Layer(torch.nn.Module):
    """What an attention layer tells about itself."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


@pytest.fixture
def library(monkeypatch):
    """Count the calls of transformers' attention by the queries of each."""
    called = []

    def counted(module, query, *args, **kwargs):
        called.append(tuple(query.shape[i] for i in (0, 2)))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    return called


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("groups", (1, 2, 4))
@pytest.mark.parametrize("scaling", (None, 0.3))
def test_equals_the_library(dtype, groups, scaling, library):
    torch.manual_seed(0)
    query, key, value = (torch.randn(MANY, heads, n, 16) for heads, n in ((4, 1), (4 // groups, 9), (4 // groups, 9)))
    query, key, value = (x.to(dtype) for x in (query, key, value))
    own, weights = attend(Layer(groups), query, key, value, None, scaling=scaling)
    assert not library and weights is None
    theirs, _ = sdpa_attention_forward(Layer(groups), query, key, value, None, scaling=scaling)
    assert own.shape == theirs.shape == (MANY, 1, 4, 16) and own.dtype == dtype
    assert torch.allclose(own, theirs, atol=1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize(
    "rows, queries, options",
    (
        (FEW_ROWS, 1, {}),
        (MANY, 2, {}),
        (MANY, 1, {"attention_mask": torch.ones(MANY, 1, 1, 9, dtype=torch.bool)}),
        (MANY, 1, {"position_bias": torch.randn(1, 4, 1, 9)}),
        (MANY, 1, {"dropout": 0.5}),
    ),
)
def test_all_else_is_the_library_s(rows, queries, options, library):
    if "position_bias" in options and "position_bias" not in sdpa_attention_forward.__code__.co_varnames:
        pytest.skip("this version of transformers has no position bias")
    query, key = torch.randn(rows, 4, queries, 16), torch.randn(rows, 4, 9, 16)
    options = {"attention_mask": None} | options
    assert attend(Layer(1), query, key, key, **options)[0].shape == (rows, queries, 4, 16)
    assert library == [(rows, queries)]


@pytest.mark.parametrize("config", (SMALL_GPT2, SMALL_LLAMA), ids=("gpt2", "llama"))
@torch.inference_mode()
def test_language_models_take_it(config, library):
    torch.manual_seed(0)
    gpt = build_language_model(config)
    assert gpt.config._attn_implementation == NAME and NAME not in gpt.config.to_json_string()
    tokens = torch.randint(3, 60, (MANY, 6))
    expected = gpt(input_ids=tokens).logits[:, -1]
    step = CachedStep(gpt, gpt.get_input_embeddings()(tokens[:, :-1]))
    library.clear()
    assert torch.allclose(step(tokens[:, -1]), expected, atol=1e-5) and not library
