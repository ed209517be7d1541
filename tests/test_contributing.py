"""The recipes of CONTRIBUTING.md work as they stand."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import run_script, train
from torch import nn
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

import encoders
from encoders import load_encoder
from encoders.base import ImageEncoder
from models import mapping
from models.checkpoint import load_captioner
from models.settings import MappingOptions
from training.objectives import CrossEntropy, Example

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def recipe(title, names):
    """Run the code under a title of the page; returns what it defines, beside `names`."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.S)
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_an_encoder(monkeypatch):
    monkeypatch.setattr(encoders, "FAMILIES", dict(encoders.FAMILIES))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 6))
    preprocessing = Compose([Resize((32, 32)), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])
    module = types.ModuleType("encoders.mine")
    module.__dict__.update(
        ImageEncoder=ImageEncoder, load_my_model=lambda name: (model, None), my_preprocessing=preprocessing,
        FAMILIES=encoders.FAMILIES,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "encoders.mine", module)
    recipe("An encoder", module.__dict__)
    encoder, pixels = load_encoder("mine:small"), torch.randn(3, 3, 32, 32)
    assert encoder.shape == (6,) and encoder.identity()["name"] == "mine:small"
    assert torch.allclose(encoder.encode_images(pixels), model(pixels), atol=1e-5)
    with pytest.raises(ValueError, match="no text tower"):
        encoder.check_texts("--rerank clip")


def test_a_mapping_network(monkeypatch, store, language_model, photos, tmp_path):
    """It is trained and captions, by the commands."""
    networks = mapping.MAPPING_NETWORKS
    monkeypatch.setitem(networks, "linear", None)  # and out again when the test is over
    monkeypatch.setitem(mapping.MAPPING_OPTIONS, "linear", None)
    recipe("A mapping network", vars(mapping) | {"MappingOptions": MappingOptions})
    train(store, language_model, tmp_path, "--mapping_type", "linear", "--prefix_length", 4)
    model, _, _ = load_captioner(tmp_path / "run_latest.pt")
    assert isinstance(model.clip_project, networks["linear"])
    lines = run_script("predict.py", photos, "--checkpoint", tmp_path / "run_latest.pt").stdout.splitlines()
    assert len(lines) == len(list(photos.glob("*.jpg")))


def test_an_objective():
    made = recipe("An objective", {"CrossEntropy": CrossEntropy})
    logprobs = torch.tensor([-0.1, -2.0], requires_grad=True)
    example = Example(torch.zeros(1, 2), torch.zeros(1, 6), torch.tensor([2]), 2)
    loss = made["Confident"](dataset=None).loss(logprobs, example)
    loss.backward()
    assert loss > 0 and logprobs.grad.isfinite().all()
