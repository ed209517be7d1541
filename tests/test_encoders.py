"""Every family of encoders gives what its own library gives, on random weights."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import clip
import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from conftest import run_script, slow_but, train
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from test_OPT import opt_folder  # noqa: F401
from test_scripts import one_line_error
from timm.data import create_transform, resolve_model_data_config
from transformers import AutoImageProcessor

from encoders import load_encoder, openai_clip, split_path
from encoders import open_clip as encoders_open_clip
from encoders import timm as encoders_timm
from encoders import transformers as encoders_transformers
from encoders.names import OPENAI_NAMES
from features.listing import as_line
from features.loader import encode_files
from features.store import read_store
from models.captioner import Captioner, encoder_of
from models.settings import CaptionConfig
from pages.service import Service
from utils.files import sha256
from utils.precision import PackedLinear

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


@pytest.mark.parametrize("stored", ("half", "float", "mixed"))
def test_weights_of_openai_clip(clip_file, tmp_path, stored):
    """They are those that OpenAI's package gives a file's model, to the last bit."""
    weights = torch.load(clip_file)
    for name, value in weights.items():
        if stored == "float" or (stored == "mixed" and "ln_" in name):  # mixed: as OpenAI's own
            weights[name] = value.float() + 1e-5
    torch.save(weights, tmp_path / "clip.pt")
    expected = clip.model.build_model(dict(weights)).float().state_dict()
    build_model = clip.clip.build_model
    found = openai_clip._load(clip, str(tmp_path / "clip.pt"), torch.device("cpu"))[0].state_dict()
    assert clip.clip.build_model is build_model  # others load by the package too, on other devices
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == found[name].dtype and value.equal(found[name]), name


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


# ---- names


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Two small architectures in open_clip's registry: `small`, `small-quickgelu`; returns {name: file of weights}."""
    folder, files = tmp_path_factory.mktemp("configs"), {}
    for name, special in (("small", {}), ("small-quickgelu", {"quick_gelu": True})):
        config = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT} | special
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    for name in ("small", "small-quickgelu"):
        torch.manual_seed(0)
        files[name] = folder / f"{name}.pt"
        torch.save(randomize(open_clip.create_model(name)).state_dict(), files[name])
    return files


@torch.inference_mode()
def test_quickgelu_follows_the_weights(registered, monkeypatch, capsys):
    """A tag's own activation is taken; where the architecture computes another that cannot be, it is refused."""
    file = registered["small"]
    tags = {"old": {"file": str(file), "quick_gelu": True}, "new": {"file": str(file)}}
    pretrained = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(pretrained, "small", tags)
    monkeypatch.setitem(pretrained, "small-quickgelu", tags)
    found = {tag: load_encoder(f"open_clip:small/{tag}") for tag in tags}
    pixels = pixels_of(found["old"])
    for tag, quick in (("old", True), ("new", False)):
        plain = open_clip.create_model("small", pretrained=str(file), force_quick_gelu=quick).eval()
        assert torch.allclose(found[tag].encode_images(pixels), plain.encode_image(pixels), **CLOSE)
        assert found[tag].describe()["clip_tag"] == tag
    assert not torch.allclose(found["old"].encode_images(pixels), found["new"].encode_images(pixels), **CLOSE)
    with pytest.raises(ValueError, match="small-quickgelu computes QuickGELU, new was trained with GELU"):
        load_encoder("open_clip:small-quickgelu/new")
    capsys.readouterr()
    load_encoder(f"open_clip:small/{file}")
    assert "does not say whether it was trained with QuickGELU" in capsys.readouterr().err
    digest = sha256(file)
    tags["old"]["url"] = f"https://host/vit-quickgelu-{digest[:8]}.pt"
    found["file"] = load_encoder(f"open_clip:small/{file}")
    assert torch.equal(found["file"].encode_images(pixels), found["old"].encode_images(pixels))
    tags["new"]["url"] = tags["old"].pop("url")
    with pytest.raises(
        ValueError, match="trained with GELU, small-quickgelu computes QuickGELU: take open_clip:small/"
    ):
        load_encoder(f"open_clip:small-quickgelu/{file}")
    assert not capsys.readouterr().err


def test_bad_names(registered, hf_folder, clip_file, tmp_path, monkeypatch):
    """Each is one line that names the value and the remedy, and exits with 2."""
    other = tmp_path / "other.pt"
    torch.save(timm.create_model("test_resnet").state_dict(), other)
    (tmp_path / "x.txt").write_text("a dog")
    (tmp_path / "empty").mkdir()
    siglip2 = tmp_path / "naflex"
    transformers.Siglip2Config().save_pretrained(siglip2)
    gpt2 = tmp_path / "gpt2"
    transformers.GPT2Config().save_pretrained(gpt2)
    lacking = hf_folder("dinov2")
    kept = {key: value for key, value in load_file(lacking / "model.safetensors").items() if "layer.1" not in key}
    save_file(kept, lacking / "model.safetensors", {"format": "pt"})
    for name, *said in (
        ("open_clip:VIT-B-32/openai", "open_clip knows no such architecture", "did you mean ViT-B-32"),
        ("open_clip:ViT-B-32/laion2b_s32b_b82k", "is neither a file nor a tag of ViT-B-32", "ViT-L-14"),
        ("open_clip:ViT-B-32", "is neither a file nor a tag"),
        ("open_clip:ViT-B-32/openai", "not in the cache and cannot be fetched", "pass open_clip:ViT-B-32/FILE"),
        (f"open_clip:small/{other}", "holds no weights of small"),
        (f"open_clip:small/{tmp_path}/x.txt", "holds no weights of small"),
        (f"open_clip:small/{tmp_path}/no.pt", "is neither a file nor a tag"),
        (f"local-dir:{tmp_path}/empty", "holds no open_clip_config.json"),
        ("hf-hub:laion/no-such-model", "cannot be fetched", "local-dir:FOLDER"),
        ("timm:vit_smal_patch14_dinov2", "is unknown; did you mean vit_small_patch14_dinov2"),
        ("timm:vit_small_patch14_dinov2.lvd", "there is no such tag", "lvd142m"),
        ("timm:vit_small_patch14_dinov2.lvd142m", "cannot be fetched", "timm:vit_small_patch14_dinov2.lvd142m/FILE"),
        (f"timm:test_vit/{other}", "timm:test_vit"),
        (f"timm:test_vit/{tmp_path}/no.pt", "does not exist"),
        ("timm:naflexvit_base_patch16_siglip.v2_webli", "inputs of variable size (NaFlex)"),
        (f"hf:{siglip2}", "inputs of variable size (NaFlex)"),
        (f"hf:{gpt2}", "is a gpt2, none of clip, siglip"),
        (f"hf:{lacking}", "its weights are another model's, they lack encoder.layer.1."),
        (f"hf:{tmp_path}/empty", "holds no config.json"),
        ("hf:google/no-such-model", "neither a folder nor in the local cache"),
        (str(other), "is no CLIP in OpenAI's format"),
        ("ViT-B/23", "did you mean ViT-B/32", "open_clip:ARCH/TAG"),
        ("openclip:ViT-B-32/openai", "is neither a file nor one of", "open_clip:ARCH/TAG"),
    ):
        flags = ("--text_only", "--annotations", tmp_path / "x.txt", "--out", tmp_path / "x.pkl")
        one_line_error(run_script("parse_coco.py", "--clip_model_type", name, *flags, check=2), *said)
    for library, module in (("timm", "timm"), ("open_clip", "open_clip")):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, f"encoders.{module}", raising=False)
            patch.setitem(sys.modules, library, None)
            names = {"timm": "timm:test_vit", "open_clip": f"local-dir:{tmp_path}"}
            command = ("parse_coco.py", "--clip_model_type", names[module], *flags)
            one_line_error(run_script(*command, check=2), f"needs {library}", "pip install")


# ---- from images to captions


@pytest.fixture(scope="module")
def named(open_clip_folder, hf_folder, tmp_path_factory):
    """Names of small encoders, by family."""
    folder = tmp_path_factory.mktemp("towers")
    torch.save(randomize(timm.create_model("test_vit")).state_dict(), folder / "vit.pt")
    return {
        "open_clip": f"local-dir:{open_clip_folder('plain')}",
        "timm": f"timm:test_vit/{folder / 'vit.pt'}",
        "hf": f"hf:{hf_folder('siglip')}",
        "vision": f"hf:{hf_folder('dinov2')}",
    }


@pytest.mark.parametrize("family", slow_but(("open_clip", "timm", "hf", "vision"), "open_clip", "vision"))
def test_from_images_to_captions(family, named, photos, language_model, clip_file, tmp_path):
    """The captioner's json leads to its encoder; another one, or one whose weights have changed, is refused."""
    name, store = named[family], tmp_path / "s.pkl"
    images = ("--annotations", photos / "captions.csv", "--images", photos, "--num_workers", 0)
    run_script("parse_coco.py", "--clip_model_type", name, *images, "--out", store)
    info, encoder = json.loads((tmp_path / "s.json").read_text()), load_encoder(name)
    assert info["clip_model_type"] == name and info["clip_sha256"] == encoder.sha256
    assert info["preprocessing"].keys() >= {"size", "interpolation", "mean", "std"}
    [(_, embeddings, _)] = encode_files(encoder, sorted(photos.glob("*.jpg")), 12)
    assert torch.allclose(read_store(store).clip_embedding, embeddings, **CLOSE)
    again = run_script("parse_coco.py", "--clip_model_type", name, *images, "--out", store)
    assert "nothing to do" in again.stderr
    train(store, language_model, tmp_path / "run")
    flags = (photos, "--checkpoint", tmp_path / "run" / "run_latest.pt", "--num_workers", 0)
    assert len(run_script("predict.py", *flags).stdout.splitlines()) == 12
    assert len(run_script("predict.py", *flags, "--clip_model_type", name).stdout.splitlines()) == 12
    one_line_error(run_script("predict.py", *flags, "--clip_model_type", clip_file, check=2), "contradicts")
    reranked = run_script("predict.py", *flags, "--rerank", "clip", check=0 if encoder.has_texts else 2)
    if not encoder.has_texts:
        one_line_error(reranked, "--rerank clip needs an encoder with a text tower")
        texts = ("--text_only", "--annotations", photos / "captions.csv", "--out", tmp_path / "t.pkl")
        one_line_error(run_script("parse_coco.py", "--clip_model_type", name, *texts, check=2), "--text_only")
        reward = ("--init_from", flags[2], "--data", store, "--reward", "clip", "--out_dir", tmp_path / "scst")
        one_line_error(run_script("train_scst.py", *reward, check=2), "--reward clip", "has no text tower")
        captions, references = tmp_path / "c.json", photos / "captions.csv"
        run_script("predict.py", *flags, "--out", captions)
        score = (captions, references, "--images", photos, "--clip_model_type", name, "--metrics", "CIDEr")
        one_line_error(run_script("evaluate.py", *score, check=2), "CLIPScore", "has no text tower")


@pytest.mark.parametrize("family", ("open_clip", "vision"))
def test_the_page_takes_it(family, named, photos, language_model, tmp_path):
    """The page captions, offers to choose where the encoder reads texts, and explains; the data is checked first."""
    name, store = named[family], tmp_path / "s.pkl"
    images = ("--annotations", photos / "captions.csv", "--images", photos, "--num_workers", 0)
    checked = run_script("parse_coco.py", "--check", *images[:4])
    assert "12" in checked.stdout + checked.stderr
    run_script("parse_coco.py", "--clip_model_type", name, *images, "--out", store)
    train(store, language_model, tmp_path / "run")
    checkpoint, image = str(tmp_path / "run" / "run_latest.pt"), str(sorted(photos.glob("*.jpg"))[0])
    service = Service({"run": checkpoint}, device="cpu")
    assert ("best of 16" in service.methods) == (family == "open_clip")
    [said] = service.caption(image, "run", service.decoding("greedy", 1, 1, 1, 0))
    told = service.explain(image, "run", said["caption"] or "a star")
    assert len(told.words) == len(told.heat) > 0 and np.isfinite(told.heat).all()
    lines = run_script("predict.py", image, "--checkpoint", checkpoint).stdout.splitlines()
    assert [line.split("\t")[1] for line in lines] == [" ".join(said["caption"].split())]


def test_encoder_that_moved_or_changed(named, photos, language_model, tmp_path):
    """A file beside the checkpoint is found by its hash; other weights of the same name are refused."""
    before, path = split_path(named["timm"])
    shutil.copy(path, tmp_path / "vit.pt")
    images = ("--annotations", photos / "captions.csv", "--images", photos, "--num_workers", 0)
    run_script(
        "parse_coco.py", "--clip_model_type", f"{before}{tmp_path / 'vit.pt'}", *images, "--out", tmp_path / "s.pkl"
    )
    train(tmp_path / "s.pkl", language_model, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "run.json").read_text())
    config["model"]["clip_model_type"] = f"{before}vit.pt"
    (tmp_path / "run" / "run.json").write_text(json.dumps(config))
    (tmp_path / "vit.pt").rename(tmp_path / "run" / "vit.pt")
    flags = (photos, "--checkpoint", tmp_path / "run" / "run_latest.pt", "--num_workers", 0)
    assert len(run_script("predict.py", *flags).stdout.splitlines()) == 12
    torch.save(randomize(timm.create_model("test_vit")).state_dict(), tmp_path / "run" / "vit.pt")
    one_line_error(run_script("predict.py", *flags, check=2), "is another file by now")
    folder = shutil.copytree(named["open_clip"].partition(":")[2], tmp_path / "tower")
    run_script("parse_coco.py", "--clip_model_type", f"local-dir:{folder}", *images, "--out", tmp_path / "o.pkl")
    train(tmp_path / "o.pkl", language_model, tmp_path / "other")
    weights = folder / "open_clip_pytorch_model.bin"
    torch.save({key: value * 1.01 for key, value in torch.load(weights).items()}, weights)
    flags = (photos, "--checkpoint", tmp_path / "other" / "run_latest.pt", "--num_workers", 0)
    one_line_error(run_script("predict.py", *flags, check=2), "is another file by now")
    one_line_error(run_script("predict.py", *flags, "--clip_model_type", f"local-dir:{folder}", check=2), "contradicts")


def put_into_cache(cache, repo, folder):
    """Lay a folder's files out as the hub's library keeps those of a repository."""
    kept = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, kept / "snapshots" / "0")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0")


@torch.inference_mode()
def test_names_of_the_hub(named, tmp_path, monkeypatch):
    """What is in the hub's cache is read without asking the hub, and is the same as from a folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    vit = tmp_path / "vit"
    vit.mkdir()
    shutil.copy(split_path(named["timm"])[1], vit / "pytorch_model.bin")
    put_into_cache(tmp_path, "timm/test_vit.r160_in1k", vit)
    put_into_cache(tmp_path, "some/clip", named["open_clip"].partition(":")[2])
    put_into_cache(tmp_path, "some/siglip", named["hf"].partition(":")[2])
    for name, family in (("timm:test_vit", "timm"), ("hf-hub:some/clip", "open_clip"), ("hf:some/siglip", "hf")):
        encoder, same = load_encoder(name), load_encoder(named[family])
        pixels = pixels_of(encoder)
        assert torch.equal(encoder.encode_images(pixels), same.encode_images(pixels)) and encoder.sha256 == same.sha256
        assert encoder.has_texts == same.has_texts
        if encoder.has_texts:
            assert torch.equal(encoder.encode_texts(["a star"]), same.encode_texts(["a star"]))
        config = CaptionConfig(encoder.embed_dim, clip_model_type=name, clip_sha256=encoder.sha256)
        assert encoder_of(config, tmp_path / "run.pt", None, True, "cpu").name == name
        config.clip_sha256 = "0" * 64  # the hub has other weights by now
        with pytest.raises(ValueError, match=f"the weights of {name} are others than .* pass its own"):
            encoder_of(config, tmp_path / "run.pt", None, True, "cpu")


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ("bf16", "int8"))
@pytest.mark.parametrize("family", ("open_clip", "timm", "hf", "vision"))
def test_dtypes(family, dtype, named):
    exact, rounded = load_encoder(named[family]), load_encoder(named[family], dtype=dtype)
    pixels = pixels_of(exact)
    expected, found = exact.encode_images(pixels), rounded.encode_images(pixels)
    assert found.dtype == torch.float32 and 0 < (found - expected).norm() < 0.1 * expected.norm()
    if exact.has_texts:
        expected, found = (
            exact.encode_texts(["a star", "two red rings"]),
            rounded.encode_texts(["a star", "two red rings"]),
        )
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_layers_are_packed(named):
    """All of a tower's layers but those that read their weights themselves."""
    for name in named.values():
        modules = list(load_encoder(name).model.modules())
        assert sum(isinstance(module, PackedLinear) for module in modules) >= 8
        assert not any(type(m) is torch.nn.Linear for b in modules if "Block" in type(b).__name__ for m in b.children())


@torch.inference_mode()
def test_blip2_from_images_to_captions(hf_folder, photos, opt_folder, tmp_path):  # noqa: F811
    """Its queries' outputs, as the library computes them, are stored and lead to the same captions as the images."""
    folder = hf_folder("blip-2")
    images = ("--annotations", photos / "captions.csv", "--images", photos, "--num_workers", 0)
    run_script("parse_coco.py", "--clip_model_type", f"hf:{folder}", *images, "--out", tmp_path / "s.pkl")
    store = read_store(tmp_path / "s.pkl")
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    process = AutoImageProcessor.from_pretrained(folder)
    pictures = [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.jpg"))]
    pixels = process(images=pictures, return_tensors="pt").pixel_values
    expected = output_of(model.qformer, lambda: model.get_image_features(pixel_values=pixels)).last_hidden_state
    assert store.info["tokens"] == "patches" and store.info["shape"] == [5, 32]
    assert torch.allclose(store.clip_embedding[range(12)], expected, **CLOSE)
    with torch.inference_mode(False):
        run_script(
            "train_OPT.py", "--data", tmp_path / "s.pkl", "--language_model", opt_folder, "--out_dir", tmp_path / "run",
            "--epochs", 1, "--bs", 4, "--num_layers", 2, "--prefix_length", 6, "--lr", 1e-2, "--warmup_steps", 2,
            "--only_prefix", "--device",
        )  # fmt: skip
    checkpoint = tmp_path / "run" / "coco_prefix_latest.pt"
    done = run_script("predict.py", photos, "--checkpoint", checkpoint, "--num_workers", 0)
    captioner = Captioner(checkpoint, device="cpu")
    groups = captioner.caption_embeddings(expected, captioner.decoding)
    said = [line.split("\t")[1] for line in done.stdout.splitlines()]
    assert said == [as_line(group[0].text.strip()) for group in groups]


@pytest.mark.parametrize("family", slow_but(("open_clip", "timm", "hf"), "open_clip"))
def test_patches_from_images_to_captions(family, named, photos, language_model, tmp_path):
    """The captioner loads its encoder for tokens, whatever the encoder."""
    images = ("--annotations", photos / "captions.csv", "--images", photos, "--num_workers", 0)
    flags = ("--clip_model_type", named[family], "--tokens", "patches")
    run_script("parse_coco.py", *flags, *images, "--out", tmp_path / "s.pkl")
    train(tmp_path / "s.pkl", language_model, tmp_path / "run", "--mapping_type", "resampler", "--num_layers", 1)
    flags = (photos, "--checkpoint", tmp_path / "run" / "run_latest.pt", "--num_workers", 0)
    assert len(run_script("predict.py", *flags).stdout.splitlines()) == 12


# ---- what there is


def test_list_of_encoders():
    def listed(*word):
        lines = run_script("parse_coco.py", "--list_encoders", *word).stdout.splitlines()
        return {name: rest for name, *rest in map(str.split, lines[1:])}

    assert listed("ViT-B-32-256") == {"open_clip:ViT-B-32-256/datacomp_s34b_b86k": "512 64 x 768 256 yes".split()}
    assert listed("small_patch14_dinov2")["timm:vit_small_patch14_dinov2.lvd142m"] == "384 1369 x 384 518 no".split()
    assert listed("blip2-opt")["hf:Salesforce/blip2-opt-2.7b"] == "- 32 x 768 224 no".split()
    assert listed("ViT-B/32")["ViT-B/32"] == "512 49 x 768 224 yes".split()
    for script in ("parse_coco.py", "parse_conceptual.py"):
        assert "ViT-B/32 " in run_script(script, "--list_encoders", "ViT-B/32").stdout
        one_line_error(run_script(script, "--list_encoders", "no-such", check=2), "--list_encoders no-such")


def test_tables_of_names():
    """OpenAI's agree with open_clip's own configurations; transformers' with what their names say."""
    for one in openai_clip.published(""):
        arch = one.name.replace("/", "-").replace("@336px", "-336")
        assert one[1:5] == encoders_open_clip.shape_of(arch), one
    widths = {"small": 384, "base": 768, "large": 1024, "so400m": 1152, "giant": 1536}
    for one in encoders_transformers.published(""):
        words = re.split("[-/]", one.name)
        patch = [int(word[5:]) for word in words if word.startswith("patch")]
        side = int(words[-1]) if words[-1].isdigit() else 224
        assert one.resolution == side and one.has_texts == ("clip" in one.name or "siglip" in one.name)
        if "Salesforce" not in one.name:
            assert one.token_width == next(widths[word] for word in words if word in widths), one
            assert one.tokens == (side // (patch[0] if patch else 14)) ** 2, one
            assert one.width == (
                one.token_width if "openai" not in one.name else {768: 512, 1024: 768}[one.token_width]
            )


@pytest.mark.slow
@torch.inference_mode()
def test_every_listed_name_has_the_shape_it_says():
    """Built without weights; of a transformer, one layer."""
    archs = {one.name.partition(":")[2].partition(".")[0]: one for one in encoders_timm.published("")}
    assert len(archs) > 150
    for arch, (_, width, patches, *_) in archs.items():
        model = encoders_timm.outline(arch).eval()
        size = resolve_model_data_config(model)["input_size"]
        features = model.forward_features(torch.empty(1, *size, device="meta"))
        assert encoders_timm.patch_tokens(model, features, arch).shape == (1, patches, width), arch
        assert model.forward_head(features, pre_logits=True).shape == (1, width), arch
    for arch in {one.name.partition(":")[2].partition("/")[0] for one in encoders_open_clip.published("")}:
        width, patches, token_width, resolution = encoders_open_clip.shape_of(arch)
        config = open_clip.get_model_config(arch)
        if "timm_model_name" in config["vision_cfg"]:
            trunk = encoders_timm.outline(config["vision_cfg"]["timm_model_name"]).eval()
            features = trunk.forward_features(torch.empty(1, 3, resolution, resolution, device="meta"))
            assert encoders_timm.patch_tokens(trunk, features, arch).shape == (1, patches, token_width), arch
            continue
        few = 1 if isinstance(config["vision_cfg"]["layers"], int) else config["vision_cfg"]["layers"]
        vision = config["vision_cfg"] | {"layers": few}
        with torch.device("meta"):
            tower = open_clip.model._build_vision_tower(config["embed_dim"], vision)
        encoder = SimpleNamespace(tokens="patches", model=SimpleNamespace(visual=tower.eval()), name=arch)
        pixels = torch.empty(1, 3, resolution, resolution, device="meta")
        found = encoders_open_clip.OpenClip._embed(encoder, pixels)
        assert found.shape == (1, patches, token_width), arch
        pooled = tower(pixels)
        assert (pooled[0] if isinstance(pooled, tuple) else pooled).shape == (1, width), arch


def test_openai_names_are_those_of_the_clip_package():
    import clip

    assert {name: url.split("/")[-2] for name, url in clip.clip._MODELS.items()} == OPENAI_NAMES
