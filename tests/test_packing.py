"""Captions behind one another: the same scores and gradients as padded ones, and no layer that computes padding."""

import functools

import pytest
import torch
from test_OPT import small

from models import clip_caption, packing
from models.clip_caption import build_captioner
from models.language import checkpoint_layers, decoder_layers
from models.lora import add_lora
from models.packing import Packing, takes_packed
from models.settings import CaptionConfig

LENGTHS = [9, 2, 0, 1, 4]
TOKENS = torch.randint(5, 60, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))


def captioner(family, prefix_length=3, frozen=False, **options):
    torch.manual_seed(0)
    config = CaptionConfig(prefix_dim=8, prefix_length=prefix_length, mapping_type="mlp", only_prefix=frozen)
    return build_captioner(config, small(family, **options))


def scores(model, lengths=LENGTHS):
    """Return (log-probabilities, {name: gradient}) of TOKENS."""
    model.zero_grad()
    embeddings = torch.randn(len(lengths), 8, generator=torch.Generator().manual_seed(1))
    logprobs = model.token_logprobs(TOKENS, embeddings, torch.tensor(lengths))
    (logprobs * torch.arange(1, len(logprobs) + 1)).sum().backward()
    return logprobs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def padded_scores(model, monkeypatch):
    """The same of the padded batch."""
    with monkeypatch.context() as patch:
        patch.setattr(clip_caption, "PACKING_PAYS", 0)
        return scores(model)


def rows_seen(model):
    """Return the list that every call of the last decoder layer's norms adds its number of rows to."""
    seen = []
    layer = decoder_layers(model.gpt)[1][-1]
    norms = [module for module in layer.modules() if isinstance(module, torch.nn.LayerNorm)]
    norms[0].register_forward_hook(lambda _module, given, _out: seen.append(given[0].shape[:-1].numel()))
    return seen


def assert_equal(found, expected):
    assert found[1].keys() == expected[1].keys()
    pairs = [(found[0], expected[0]), *((found[1][name], expected[1][name]) for name in expected[1])]
    for ours, theirs in pairs:
        assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max().clamp_min(1).item())


@pytest.mark.parametrize("change", [None, "frozen", "checkpointed", "lora", "one position before"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_padding_is_left_out(family, change, monkeypatch):
    prefix_length = 1 if change == "one position before" else 3
    model = captioner(family, prefix_length, frozen=change == "frozen").eval()
    if change == "checkpointed":
        checkpoint_layers(model.gpt)
    if change == "lora":
        add_lora(model.gpt, 2)
    seen = rows_seen(model)
    packed = scores(model)
    assert seen[0] == sum(LENGTHS) + len(LENGTHS) * (prefix_length - 1)
    padded = padded_scores(model, monkeypatch)
    assert seen[-1] == len(LENGTHS) * (max(LENGTHS) + prefix_length - 1)
    assert_equal(packed, padded)


def test_without_padding_nothing_is_copied():
    model = captioner("gpt2")
    seen = rows_seen(model)
    scores(model, [9, 9, 9, 8, 9])
    assert seen == [5 * 11]


def test_dropout_is_of_training_alone(monkeypatch):
    model = captioner("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    torch.manual_seed(0)
    first, again = scores(model), scores(model)
    torch.manual_seed(0)
    assert not torch.allclose(first[0], again[0]) and torch.equal(first[0], scores(model)[0])
    assert all(gradient.isfinite().all() for gradient in first[1].values())
    model.eval()
    assert_equal(scores(model), padded_scores(model, monkeypatch))


@pytest.mark.parametrize("layer", [0, 1])
def test_an_attention_that_does_not_know_of_it(layer, monkeypatch):
    """Its captions would see each other."""
    model = captioner("gpt2").eval()
    attention = decoder_layers(model.gpt)[1][layer].attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *given, packing=None, **options: forward(*given, **options))
    with pytest.raises(RuntimeError, match="captions have seen each other"):
        scores(model)


def test_a_layer_that_takes_a_mask_for_all_there_is_to_hide(monkeypatch):
    """As GPT-2's of transformers 4.56: with a mask it asks for no causal attention."""
    model = captioner("gpt2").eval()
    for layer in decoder_layers(model.gpt)[1]:
        monkeypatch.setattr(layer.attn, "forward", functools.partial(layer.attn.forward, is_causal=False))
    packed = scores(model)
    monkeypatch.undo()
    assert_equal(packed, padded_scores(model, monkeypatch))


@pytest.mark.parametrize("change", ["attention", "layerdrop", "version"])
def test_what_cannot_be_packed(change, monkeypatch):
    model = captioner("opt" if change == "layerdrop" else "gpt2").eval()
    expected = scores(model)
    assert takes_packed(model.gpt)
    if change == "attention":
        model.gpt.set_attn_implementation("sdpa")
    elif change == "layerdrop":
        model.gpt.config.layerdrop = 0.5
    else:  # whose GPT-2 keeps what it does not know from its attention
        monkeypatch.setattr(packing, "TRANSFORMERS", packing.Version("5.2.0"))
    assert not takes_packed(model.gpt)
    assert_equal(scores(model), expected)


def test_lengths_beyond_the_batch():
    """They count as far as there are tokens."""
    model = captioner("gpt2").eval()
    assert_equal(scores(model, [4, 12, 0, 1, 4]), scores(model, [4, 9, 0, 1, 4]))


def test_nothing_to_compute():
    """Only the captions' last positions predict, and with one prefix vector an empty caption has none."""
    assert len(scores(captioner("gpt2", prefix_length=1), [0] * len(LENGTHS))[0]) == 0


@pytest.mark.parametrize("family", ["gpt_neo", "llama", "bloom", "mamba"])
def test_others_are_padded(family):
    model = captioner(family)
    assert not takes_packed(model.gpt)
    assert len(scores(model)[0]) == sum(LENGTHS)


def test_copies_and_their_gradients():
    laid = Packing(torch.tensor([2, 0, 3]), 4, "cpu")
    assert laid.positions.tolist() == [[0, 1, 0, 1, 2]]
    padded = torch.randn(3, 4, 2, 2, dtype=torch.double, requires_grad=True)
    row = laid.take(padded)
    assert torch.equal(row[0], torch.cat((padded[0, :2], padded[2, :3])))
    assert laid.put(row)[1].eq(0).all() and torch.equal(laid.take(laid.put(row)), row)
    assert torch.autograd.gradcheck(laid.take, padded)
    assert torch.autograd.gradcheck(laid.put, row.detach().requires_grad_())
