"""Repacked layers compute what the layers they replace do; --dtype reaches every model."""

import contextlib
import copy
import json
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from encoders import load_encoder
from features.store import read_store
from models.clip_caption import build_captioner
from models.settings import CaptionConfig
from tests.conftest import run_script
from tests.test_OPT import FAMILIES, small
from utils import precision
from utils.logits import refine_output
from utils.precision import PackedLinear, PlainLinear, QuantizedLinear, pick_dtype, prepare_for_inference

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_packed_language_models_are_equal(family):
    gpt = small(family)
    embeddings = torch.randn(3, 5, gpt.get_input_embeddings().embedding_dim)
    expected = gpt(inputs_embeds=embeddings).logits
    packed = prepare_for_inference(copy.deepcopy(gpt), "fp32", CPU)
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    left = [name for name, module in packed.named_modules() if isinstance(module, torch.nn.Linear)]
    assert all(name.endswith(("mixer.dt_proj", "mixer.out_proj")) for name in left)  # Mamba reads their weights itself
    assert torch.allclose(packed(inputs_embeds=embeddings).logits, expected, atol=1e-5)
    for dtype, tolerance in (("bf16", 0.05), ("int8", 0.1)):
        changed = prepare_for_inference(copy.deepcopy(gpt), dtype, CPU)
        inputs = embeddings.to(changed.get_input_embeddings().weight.dtype)
        difference = changed(inputs_embeds=inputs).logits.float() - expected
        assert 0 < difference.abs().max() < tolerance * expected.abs().max()
        assert changed.config.dtype == gpt.config.dtype
        assert {b.dtype for name, b in changed.named_buffers() if name.endswith("inv_freq")} <= {torch.float32}


class Reads(torch.nn.Module):
    """Reads its layer's weight itself, as GPT-2's lies: [in, out]."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x @ self.layer.weight + self.layer.bias


class Scaled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


class Particular(Reads):
    def forward(self, x):
        if self.layer.nf != self.layer.weight.shape[1]:  # GPT-2's layers alone have it
            raise ValueError
        return self.layer(x)


def scaled(layer):
    layer.__class__ = Scaled
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda _, inputs, out: 2 * out)
    return layer


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


class Dense(torch.nn.Module):
    """Stands for PackedLinear in number types that this processor may not repack."""

    def __init__(self, weight, bias):
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.weight, self.bias = weight.detach().clone(), bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def repacked(model):
    return sum(isinstance(module, PackedLinear | QuantizedLinear | Dense) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("change", (Reads, scaled, Particular, hooked, patched))
@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
def test_layers_that_are_more_than_linear(change, dtype, monkeypatch, capsys):
    """A language model that computes otherwise by repacked layers keeps its own; the mapping network's are repacked."""
    if dtype == "bf16":
        monkeypatch.setattr(precision, "PackedLinear", Dense)
        monkeypatch.setattr(precision, "_packs", lambda _: True)
    gpt, same = small("gpt2"), small("gpt2")  # no copy, whose patched layer would be the first's
    for block, other in zip(gpt.transformer.h, same.transformer.h, strict=True):
        torch.nn.init.normal_(block.attn.c_proj.weight)
        other.load_state_dict(block.state_dict())
        block.attn.c_proj, other.attn.c_proj = change(block.attn.c_proj), change(other.attn.c_proj)
    embeddings = torch.randn(3, 5, 16)
    expected = gpt(inputs_embeds=embeddings).logits
    model = build_captioner(CaptionConfig(12, prefix_length=3), same)
    changed = prepare_for_inference(model, dtype, CPU)
    found = changed.gpt(inputs_embeds=embeddings.to(changed.gpt.lm_head.weight.dtype)).logits.float()
    assert (found - expected).abs().max() < (0.05 if dtype == "bf16" else 1e-5) * expected.abs().max()
    assert capsys.readouterr().err.count("needs its own layers") == 1
    if dtype != "fp32":
        refine_output(gpt)
    assert [type(m) for m in changed.gpt.modules()] == [type(m) for m in gpt.modules()]
    assert repacked(changed) == repacked(changed.clip_project) == 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", ("fp32", "int8"))
@pytest.mark.parametrize("fault", ("differs", "raises"))
def test_layers_that_repacking_changes(dtype, fault, monkeypatch, capsys):
    """They alone stay."""
    kind = PackedLinear if dtype == "fp32" else QuantizedLinear
    plain = kind.forward

    def forward(layer, x):
        if layer.out_features != 64:  # the width of the inner layer
            return plain(layer, x)
        if fault == "raises":
            raise RuntimeError("from the library")
        return -plain(layer, x)

    monkeypatch.setattr(kind, "forward", forward)
    gpt = small("gpt2", vocab_size=60)
    embeddings = torch.randn(3, 5, 16)
    expected = gpt(inputs_embeds=embeddings).logits
    changed = prepare_for_inference(gpt, dtype, CPU)
    found = changed(inputs_embeds=embeddings).logits
    assert (found - expected).abs().max() < (1e-5 if dtype == "fp32" else 0.1) * expected.abs().max()
    assert "2 of the language model's 9 layers stay as they are" in capsys.readouterr().err
    assert repacked(changed) == 7


def test_bf16_that_a_model_cannot_compute_in(monkeypatch):
    """As a buffer of float32 that is added to what a norm is given."""
    gpt = small("gpt2")
    gpt.transformer.ln_f.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    with pytest.raises(ValueError, match="--dtype bf16 does not suit this language model .*; use fp32"):
        prepare_for_inference(gpt, "bf16", CPU)


@torch.no_grad()
def test_layers_that_are_not_called_stay():
    """Mamba reads the weights of some of its layers itself: no second copy of them is made."""
    packed = prepare_for_inference(small("mamba"), "int8", CPU)
    mixer = packed.backbone.layers[0].mixer
    assert type(mixer.dt_proj) is torch.nn.Linear and isinstance(mixer.in_proj, QuantizedLinear)


@torch.no_grad()
def test_weights_are_let_go_one_by_one(monkeypatch):
    """The old ones of a layer are gone before the next layer is repacked."""
    gpt, old, left = small("gpt2"), weakref.WeakSet(), []
    for block in gpt.transformer.h:
        old |= {block.mlp.c_fc, block.mlp.c_proj, block.attn.c_attn, block.attn.c_proj}
    for kind, act in ((PlainLinear, old.add), (PackedLinear, lambda _: left.append(len(old)))):

        def init(layer, *arguments, act=act, plain=kind.__init__):
            plain(layer, *arguments)
            act(layer)

        monkeypatch.setattr(kind, "__init__", init)
    prepare_for_inference(gpt, "fp32", CPU)
    assert left == list(range(9, 0, -1))


def test_packed_clip_is_equal(clip_file):
    import clip

    plain, _ = clip.load(str(clip_file), device="cpu")
    pixels, texts = torch.randn(3, 3, 32, 32), ["a red star", "two small green circles on the sand"]
    with torch.inference_mode():
        images, captions = plain.encode_image(pixels), plain.encode_text(clip.tokenize(texts))
    ours = load_encoder(clip_file)
    assert torch.allclose(ours.encode_images(pixels), images, atol=1e-5)
    assert torch.allclose(ours.encode_texts(texts), captions, atol=1e-5)
    for dtype in ("bf16", "int8"):
        found = load_encoder(clip_file, dtype=dtype).encode_images(pixels)
        assert found.dtype == torch.float32
        assert 0 < (found - images).norm() < 0.05 * images.norm()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_quick_gelu_of_every_library(dtype):
    """It is ours, equal to the last bit; what only has its name stays."""
    import clip.model
    import open_clip.transformer
    import timm.layers
    from transformers.activations import QuickGELUActivation

    same = clip.model.QuickGELU, open_clip.transformer.QuickGELU, timm.layers.QuickGELU, QuickGELUActivation
    other = type("QuickGELU", (nn.Module,), {"forward": lambda _, x: x * torch.sigmoid(1.7 * x)})
    x = 5 * torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    for kind in (*same, other):
        model = nn.Sequential(nn.Flatten(0), kind())
        expected, given = model(x), x.clone()
        prepare_for_inference(model, None, CPU)
        assert (type(model[1]) is precision.QuickGELU) == (kind is not other)
        assert model(x).equal(expected) and x.equal(given)


def test_attention_maps_each_of_its_inputs_once(monkeypatch):
    """One product where a sequence attends to itself, three where its inputs differ; and one of the result."""
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    packed = precision.PackedAttention(attention, PackedLinear)
    calls, forward = [], PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda layer, x: calls.append(x) or forward(layer, x))
    with torch.inference_mode():
        for inputs, products in (([torch.randn(1, 3, 8)] * 3, 1), ([torch.randn(1, 3, 8) for _ in range(3)], 3)):
            calls.clear()
            assert torch.allclose(packed(*inputs)[0], attention(*inputs, need_weights=False)[0], atol=1e-6)
            assert len(calls) == products + 1


def test_clip_of_a_resnet_runs(tmp_path):
    """Its attention pooling reads the weights of its linear layers itself."""
    import clip

    torch.manual_seed(0)
    model = clip.model.CLIP(
        embed_dim=32, image_resolution=64, vision_layers=(1, 1, 1, 1), vision_width=16, vision_patch_size=None,
        context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=1,
    )  # fmt: skip
    torch.save(model.eval().half().state_dict(), tmp_path / "resnet.pt")
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = clip.load(str(tmp_path / "resnet.pt"), device="cpu")[0].encode_image(pixels)
    for dtype, tolerance in ((None, 1e-5), ("bf16", 0.05), ("int8", 0.05)):
        found = load_encoder(tmp_path / "resnet.pt", dtype=dtype).encode_images(pixels)
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", ("auto", "bf16", "int8"))
def test_dtype_of_the_commands(dtype, trained, photos, clip_file, tmp_path):
    run_script(
        "parse_coco.py", "--clip_model_type", clip_file, "--annotations", photos / "captions.csv",
        "--images", photos, "--out", tmp_path / "x.pkl", "--num_workers", 0, "--dtype", dtype,
    )  # fmt: skip
    beside = json.loads((tmp_path / "x.json").read_text())
    assert beside["dtype"] == pick_dtype(dtype, CPU)
    assert read_store(tmp_path / "x.pkl").clip_embedding.dtype == torch.float32
    done = run_script("predict.py", photos, "--checkpoint", trained / "run_latest.pt", "--dtype", dtype)
    assert len(done.stdout.splitlines()) == 12


def test_int8_elsewhere_is_refused():
    with pytest.raises(ValueError, match="--dtype int8 runs on the CPU only"):
        pick_dtype("int8", torch.device("cuda"))


def test_int8_without_arithmetic_is_refused(monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none"])
    with pytest.raises(ValueError, match="--dtype int8: .* use fp32"):
        pick_dtype("int8", CPU)


@torch.inference_mode()
def test_repacked_weights_can_be_read():
    weight = torch.randn(24, 16)
    packed, quantized = PackedLinear(weight, None), QuantizedLinear(weight, None)
    assert torch.equal(packed.weight, weight)
    assert torch.allclose(quantized.weight, weight, atol=0.03)
    for layer in (packed, quantized):
        assert layer.weight is layer.weight, "laid out again at every step, it costs more than the step"


def test_auto_wants_a_gpu_s_own_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    for native in (False, True):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, own=native: including_emulation or own
        )
        assert pick_dtype("auto", torch.device("cuda")) == ("bf16" if native else "fp32")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("activation", (nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.SiLU()))
def test_activations_in_the_product(activation, dtype):
    """By the layer's kernel where it has one; of any layer the same as one after the other."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 product for this processor")
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 16, dtype=dtype), torch.randn(24, dtype=dtype), torch.randn(3, 16, dtype=dtype)
    exact = activation(F.linear(x.double(), weight.double(), bias.double()))
    for layer in (PackedLinear(weight, bias), PlainLinear(weight, bias)):
        found = precision.activated(layer, activation, x)
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max() < precision.TOLERANCE[dtype] * exact.abs().max()
    calls = []
    layer = PackedLinear(weight, bias)
    layer.register_forward_hook(lambda module, given, out: calls.append(given))
    precision.activated(layer, activation, x)
    assert len(calls[0]) == (1 if isinstance(activation, nn.SiLU) else 2)


def test_experiment_runs(tmp_path, monkeypatch, capsys):
    """demo/precision.py, on few scenes."""
    from demo import precision as experiment
    from demo import rerank

    for module, name, value in ((rerank, "TEST", 3), (rerank, "TUNE", 1), (experiment, "TEST", 3)):
        monkeypatch.setattr(module, name, value)
    experiment.main(["--out", str(tmp_path)])
    results = json.loads((tmp_path / "precision.json").read_text())
    assert list(results) == ["fp32", "bf16", "int8"] and results["fp32"]["same"] == 100
    assert results["fp32"]["right"] > 50 and "all right" in capsys.readouterr().out
