"""The products of training: those of torch, with their gradients; what is no float32 goes to torch."""

import copy
import functools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from models.clip_caption import build_captioner
from models.language import load_language_model
from models.lora import add_lora
from models.products import Product, multiply_by_onednn
from models.settings import CaptionConfig

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def captioner(language_model, **options):
    torch.manual_seed(0)
    config = CaptionConfig(
        8, mapping_type="transformer", prefix_length=3, prefix_length_clip=2, num_layers=1, **options
    )
    return build_captioner(config, load_language_model(language_model)).eval()


def gradients(model):
    """Return the loss of two captions and the gradients of what learns, by name."""
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    embeddings = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    loss = -model.token_logprobs(tokens, embeddings, torch.tensor([4, 2])).mean()
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ("frozen", "tuned", "LoRA"))
def test_losses_and_gradients_are_those_of_torch(language_model, kind, monkeypatch):
    model = captioner(language_model, only_prefix=kind == "frozen")
    if kind == "LoRA":
        add_lora(model.gpt, 2)
    names, (loss, expected) = list(model.state_dict()), gradients(model)
    multiply_by_onednn(model)
    calls, forward = [], Product.forward
    monkeypatch.setattr(Product, "forward", lambda *x: calls.append(x) or forward(*x))
    found = gradients(model)
    layers = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    assert len(calls) == len(layers) - 1  # all but the output
    assert found[0] == pytest.approx(loss, rel=1e-6) and found[1].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[1][name], value, rtol=1e-4, atol=1e-6), name
    assert list(model.state_dict()) == names


def test_what_is_not_float32_goes_to_torch(language_model, monkeypatch):
    model = captioner(language_model)
    plain = copy.deepcopy(model)
    multiply_by_onednn(model)
    monkeypatch.setattr(Product, "apply", None)
    for enabled, each in ((True, torch.float32), (False, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert gradients(model.to(each))[0] == gradients(plain.to(each))[0]
    layer = nn.Linear(3, 2)
    model.gpt.lonely = layer
    multiply_by_onednn(model)
    assert layer(torch.ones(0, 3)).shape == (0, 2)


def test_a_copy_reads_its_own_weights(language_model):
    """And layers on which others have put a `forward`, which may fetch the weights, keep it."""
    model = captioner(language_model)
    multiply_by_onednn(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.clip_project.parameters():
            parameter.zero_()
    assert copied.prefix(torch.ones(1, 8)).abs().max() == 0 < model.prefix(torch.ones(1, 8)).abs().max()
    fetching = functools.partial(nn.Linear.forward, model.clip_project.linear)
    model.clip_project.linear.forward = fetching
    multiply_by_onednn(model)
    assert model.clip_project.linear.forward is fetching


def test_gradients_of_gradients_are_refused():
    """They would lack the products' own part."""
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    [slope] = torch.autograd.grad(Product.apply(x, weight, None).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
