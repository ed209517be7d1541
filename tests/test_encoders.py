"""Every family of encoders gives what its own library gives, on random weights."""

import json

import clip
import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from transformers import AutoImageProcessor

from encoders import load_encoder
from utils.files import sha256

CLOSE = {"rtol": 0, "atol": 1e-5}
VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
OPEN_CLIP = {  # architectures by what is special about them
    "plain": {"vision_cfg": VISION},
    "quickgelu": {"vision_cfg": VISION, "quick_gelu": True},
    "resnet": {"vision_cfg": VISION | {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}},
    "mean": {"vision_cfg": VISION | {"pool_type": "avg", "final_ln_after_pool": True}},
    "timm": {"vision_cfg": {"timm_model_name": "test_vit3", "timm_pool": "", "timm_proj": "", "image_size": 160}},
    "coca": {
        "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        "custom_text": True,
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    },
}
TIMM = ("test_vit", "test_vit3", "test_vit4", "test_resnet", "test_convnext", "test_efficientnet")


@pytest.fixture(scope="module")
def picture():
    """A picture that is not square."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """A function of a name of OPEN_CLIP to a folder as open_clip writes it."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        config = {"embed_dim": 96 if name == "timm" else 32, "text_cfg": TEXT} | OPEN_CLIP[name]
        normal = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": normal}))
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}")
        torch.save(randomize(model).state_dict(), folder / "open_clip_pytorch_model.bin")
        return folder

    return make


def randomize(model):
    """Give every weight a random part: what begins as zero would hide an error."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def pixels_of(encoder):
    torch.manual_seed(2)
    return torch.randn(3, 3, encoder.input_resolution, encoder.input_resolution)


def output_of(module, call):
    """Return what a module gave while something was called."""
    seen = []
    handle = module.register_forward_hook(lambda _module, _given, out: seen.append(out))
    call()
    handle.remove()
    return seen[-1]


@torch.inference_mode()
def test_patches_of_openai_clip(clip_file, tmp_path):
    plain, _ = clip.load(str(clip_file), device="cpu")
    encoder = load_encoder(clip_file, tokens="patches")
    pixels = pixels_of(encoder)
    given = output_of(plain.visual.transformer, lambda: plain.encode_image(pixels)).permute(1, 0, 2)
    assert encoder.shape == (4, 64) and encoder.grid == (2, 2) and encoder.embed_dim == 64
    tokens = encoder.encode_images(pixels)
    assert torch.allclose(tokens, plain.visual.ln_post(given)[:, 1:], **CLOSE)
    assert encoder.identity()["tokens"] == "patches" and "tokens" not in load_encoder(clip_file).identity()
    with pytest.raises(ValueError, match="--reward clip compares one vector an image"):
        encoder.check_texts("--reward clip")
    torch.manual_seed(0)
    model = clip.model.CLIP(32, 64, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1).eval()
    torch.save(randomize(model).state_dict(), tmp_path / "resnet.pt")
    encoder, model = load_encoder(tmp_path / "resnet.pt", tokens="patches"), clip.load(str(tmp_path / "resnet.pt"))[0]
    pixels = pixels_of(encoder)
    given = output_of(model.visual.layer4, lambda: model.encode_image(pixels))
    assert encoder.shape == (4, 512) and torch.allclose(encoder.encode_images(pixels)[:, 1], given[:, :, 0, 1], **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(name, open_clip_folder, picture):
    folder = open_clip_folder(name)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    encoder = load_encoder(f"local-dir:{folder}")
    pixels, texts = pixels_of(encoder), ["a red star", "two small green circles on the sand"]
    assert torch.equal(encoder.preprocess(picture), preprocess(picture))
    expected = model.eval().encode_image(pixels, normalize=False)
    assert encoder.shape == expected.shape[1:] and encoder.sha256 == sha256(folder / "open_clip_pytorch_model.bin")
    assert torch.allclose(encoder.encode_images(pixels), expected, **CLOSE)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert torch.allclose(encoder.encode_texts(texts), model.encode_text(tokenizer(texts), normalize=False), **CLOSE)
    assert encoder.count_cut(["star " * 14, "star " * 15]) == 1
    encoder = load_encoder(f"local-dir:{folder}", tokens="patches")
    visual = model.visual
    if name == "resnet":
        expected = output_of(visual.layer4, lambda: visual(pixels)).flatten(2).transpose(1, 2)
    elif name == "timm":  # attention pooling reads all tokens
        expected = visual.trunk.norm(output_of(visual.trunk.blocks, lambda: visual(pixels)))[:, 1:]
    else:
        expected = output_of(visual.transformer, lambda: visual(pixels))
        expected = (expected if name in ("mean", "coca") else visual.ln_post(expected))[:, 1:]
    assert encoder.shape == expected.shape[1:] and np.prod(encoder.grid) == encoder.shape[0]
    assert torch.allclose(encoder.encode_images(pixels), expected, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, picture, tmp_path):
    torch.manual_seed(0)
    model = randomize(timm.create_model(name))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    model.reset_classifier(0)
    encoder = load_encoder(f"timm:{name}/{tmp_path}/x.pt")
    pixels = pixels_of(encoder)
    preprocess = create_transform(**resolve_model_data_config(model), is_training=False)
    assert torch.equal(encoder.preprocess(picture), preprocess(picture))
    assert torch.allclose(encoder.encode_images(pixels), model(pixels), **CLOSE)
    with pytest.raises(ValueError, match="--text_only: .* has no text tower"):
        encoder.check_texts("--text_only")
    encoder = load_encoder(f"timm:{name}/{tmp_path}/x.pt", tokens="patches")
    [grid] = model.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)
    expected = model.forward_features(pixels)
    if expected.ndim == 3:
        expected = grid
    assert encoder.grid == expected.shape[2:] and encoder.shape == (np.prod(expected.shape[2:]), expected.shape[1])
    assert torch.allclose(encoder.encode_images(pixels), expected.flatten(2).transpose(1, 2), **CLOSE)


def hf_config(kind):
    """Return the configuration of a small model of transformers."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 8}
    text = small | {"vocab_size": 400, "max_position_embeddings": 16}
    if kind == "clip":
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        return transformers.CLIPConfig(text_config=text | ids, vision_config=vision, projection_dim=24)
    if kind == "siglip":
        return transformers.SiglipConfig(text_config=text, vision_config=vision)
    if kind == "dinov2":
        return transformers.Dinov2Config(**vision)
    if kind == "dinov2_with_registers":
        return transformers.Dinov2WithRegistersConfig(**vision, num_register_tokens=3)
    if kind == "dinov3_vit":
        return transformers.DINOv3ViTConfig(**vision, num_register_tokens=3)
    qformer = small | {"encoder_hidden_size": 32, "vocab_size": 400, "cross_attention_frequency": 1}
    language = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    language |= {"vocab_size": 400, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
    return transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=language, num_query_tokens=5
    )


PROCESSORS = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "blip-2": "BlipImageProcessor"}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory, language_model):
    """A function of a model_type to a folder as transformers writes it."""

    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        config = hf_config(kind)
        model_class = transformers.Blip2ForConditionalGeneration if kind == "blip-2" else transformers.AutoModel
        model = model_class._from_config(config) if kind == "blip-2" else model_class.from_config(config)
        randomize(model).save_pretrained(folder)
        processor = getattr(transformers, PROCESSORS.get(kind, "BitImageProcessor"))
        size = {"height": 32, "width": 32}
        cropped = {} if kind in ("siglip", "blip-2") else {"crop_size": size, "do_center_crop": True}
        processor(size=size if not cropped else {"shortest_edge": 40}, **cropped).save_pretrained(folder)
        if kind in ("clip", "siglip"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(language_model)
            tokenizer.pad_token = tokenizer.eos_token
            tokenizer.save_pretrained(folder)
        return folder

    return make


@torch.inference_mode()
@pytest.mark.parametrize("kind", ("clip", "siglip", "dinov2", "dinov2_with_registers", "dinov3_vit"))
def test_transformers(kind, hf_folder, picture):
    folder = hf_folder(kind)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    encoder = load_encoder(f"hf:{folder}")
    pixels = pixels_of(encoder)
    seen = AutoImageProcessor.from_pretrained(folder)(images=picture, return_tensors="pt").pixel_values[0]
    assert torch.equal(encoder.preprocess(picture), seen) and seen.shape == pixels.shape[1:]
    if kind in ("clip", "siglip"):
        expected = model.get_image_features(pixel_values=pixels).pooler_output
        texts = ["a red star on the sand.", "a"]
        padding = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
        told = transformers.AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", **padding)
        masks = {"attention_mask": told.attention_mask} if kind == "clip" else {}
        told = model.get_text_features(input_ids=told.input_ids, **masks).pooler_output
        assert torch.allclose(encoder.encode_texts(texts), told, **CLOSE)
    else:
        expected = model(pixel_values=pixels).pooler_output
        assert not encoder.has_texts
    assert encoder.shape == expected.shape[1:] and encoder.sha256 == sha256(folder / "model.safetensors")
    assert torch.allclose(encoder.encode_images(pixels), expected, **CLOSE)
    encoder = load_encoder(f"hf:{folder}", tokens="patches")
    tower = getattr(model, "vision_model", model)
    expected = tower(pixel_values=pixels).last_hidden_state
    expected = tower.post_layernorm(expected) if kind == "clip" else expected
    assert torch.allclose(encoder.encode_images(pixels), expected[:, -16:], **CLOSE)
    assert expected.shape[1] - 16 == {"siglip": 0, "clip": 1, "dinov2": 1}.get(kind, 4)
    assert encoder.shape == (16, 32) and encoder.grid == (4, 4)


@torch.inference_mode()
def test_blip2(hf_folder, picture):
    """Its encoder is as deep as its Q-Former, whose outputs are what the language model is given."""
    folder = hf_folder("blip-2")
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    encoder = load_encoder(f"hf:{folder}")
    pixels = pixels_of(encoder)
    expected = output_of(model.qformer, lambda: model.get_image_features(pixel_values=pixels)).last_hidden_state
    assert encoder.tokens == "patches" and encoder.shape == (5, 32) and encoder.grid is None
    assert torch.allclose(encoder.encode_images(pixels), expected, **CLOSE)
    with pytest.raises(ValueError, match="--tokens pooled: .* is a BLIP-2"):
        load_encoder(f"hf:{folder}", tokens="pooled")
