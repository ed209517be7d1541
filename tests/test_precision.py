"""Repacked layers compute what the layers they replace do; --dtype reaches every model."""

import contextlib
import copy
import json

import pytest
import torch

from features.clip_encoder import ClipEncoder
from features.store import read_store
from tests.conftest import run_script
from tests.test_OPT import FAMILIES, small
from utils.precision import PackedLinear, pick_dtype, prepare_for_inference

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_packed_language_models_are_equal(family):
    gpt = small(family)
    embeddings = torch.randn(3, 5, gpt.get_input_embeddings().embedding_dim)
    expected = gpt(inputs_embeds=embeddings).logits
    packed = prepare_for_inference(copy.deepcopy(gpt), "fp32", CPU)
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    assert torch.allclose(packed(inputs_embeds=embeddings).logits, expected, atol=1e-5)
    for dtype, tolerance in (("bf16", 0.05), ("int8", 0.1)):
        changed = prepare_for_inference(copy.deepcopy(gpt), dtype, CPU)
        inputs = embeddings.to(changed.get_input_embeddings().weight.dtype)
        difference = changed(inputs_embeds=inputs).logits.float() - expected
        assert 0 < difference.abs().max() < tolerance * expected.abs().max()
        assert changed.config.dtype == gpt.config.dtype
        assert {b.dtype for name, b in changed.named_buffers() if name.endswith("inv_freq")} <= {torch.float32}


def test_packed_clip_is_equal(clip_file):
    import clip

    plain, _ = clip.load(str(clip_file), device="cpu")
    pixels, texts = torch.randn(3, 3, 32, 32), ["a red star", "two small green circles on the sand"]
    with torch.inference_mode():
        images, captions = plain.encode_image(pixels), plain.encode_text(clip.tokenize(texts))
    ours = ClipEncoder(clip_file)
    assert torch.allclose(ours.encode_images(pixels), images, atol=1e-5)
    assert torch.allclose(ours.encode_texts(texts), captions, atol=1e-5)
    for dtype in ("bf16", "int8"):
        found = ClipEncoder(clip_file, dtype=dtype).encode_images(pixels)
        assert found.dtype == torch.float32
        assert 0 < (found - images).norm() < 0.05 * images.norm()


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
        found = ClipEncoder(tmp_path / "resnet.pt", dtype=dtype).encode_images(pixels)
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
    from utils.precision import QuantizedLinear

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
