"""export.py: captioners of every kind, with random weights, caption as predict.py does, or are refused in one line."""

import sys

import pytest
import timm
import torch
from conftest import ROOT, run_script, train
from PIL import Image
from test_encoders import hf_folder, open_clip_folder, randomize  # noqa: F401
from test_OPT import opt_folder, small  # noqa: F401

sys.path.append(str(ROOT / "runtime"))
pytest.importorskip("onnxscript")

from clipcap_runtime import command  # noqa: E402

from encoders import load_encoder  # noqa: E402
from models.checkpoint import save_torch  # noqa: E402
from models.clip_caption import build_captioner  # noqa: E402
from models.language import load_language_model, load_tokenizer  # noqa: E402
from models.settings import CaptionConfig  # noqa: E402
from utils.files import write_json  # noqa: E402

TRANSFORMER = {"mapping_type": "transformer", "num_layers": 1, "prefix_length": 4, "prefix_length_clip": 3}
RESAMPLER = {"mapping_type": "resampler", "num_layers": 1, "num_heads": 2, "prefix_length": 3}
# encoder, what it gives of an image, language model, options of the mapping network
CASES = {
    "transformer": ("openai", "pooled", "gpt2", TRANSFORMER),
    "opt": ("openai", "pooled", "opt", {}),
    "llama": ("openai", "pooled", "llama", {"normalize_prefix": True}),
    "each token": ("openai", "patches", "gpt2", {}),
    "transformer, tokens": ("openai", "patches", "opt", {"mapping_type": "transformer", "num_layers": 1}),
    "resampler": ("openai", "patches", "gpt2", RESAMPLER),
    "open_clip": ("open_clip", "pooled", "gpt2", {}),
    "open_clip, tokens": ("open_clip", "patches", "gpt2", RESAMPLER),
    "timm": ("timm", "pooled", "gpt2", {}),
    "timm, tokens": ("timm", "patches", "gpt2", RESAMPLER),
    "siglip": ("siglip", "pooled", "gpt2", {}),
    "siglip, tokens": ("siglip", "patches", "gpt2", RESAMPLER),
    "dinov2": ("dinov2", "pooled", "gpt2", {}),
    "dinov2, tokens": ("dinov2", "patches", "gpt2", RESAMPLER),
    "blip-2": ("blip-2", "patches", "opt", RESAMPLER),
}
# pictures that transformers' processors do not resize: they round one in 150 pixels to the level beside Pillow's
SIDES = {"siglip": 32, "dinov2": 40, "blip-2": 32}


@pytest.fixture(scope="module")
def parts(clip_file, open_clip_folder, hf_folder, opt_folder, language_model, tmp_path_factory):  # noqa: F811
    """A function of a part's name to the encoder's name, or the language model's folder; each is made once."""
    made = {"openai": str(clip_file), "opt": opt_folder, "gpt2": language_model}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("parts")
            if name == "open_clip":
                made[name] = f"local-dir:{open_clip_folder('plain')}"
            elif name == "timm":
                torch.save(randomize(timm.create_model("test_vit")).state_dict(), folder / "vit.pt")
                made[name] = f"timm:test_vit/{folder / 'vit.pt'}"
            elif name == "llama":
                tokenizer = load_tokenizer(str(language_model))
                small(name, vocab_size=len(tokenizer)).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                made[name] = folder
            else:
                made[name] = f"hf:{hf_folder(name)}"
        return made[name]

    return make


def write_captioner(folder, encoder_name, tokens, language_model, options):  # noqa: F811
    """Write a checkpoint of random weights, large enough that captions differ; returns its file."""
    encoder = load_encoder(encoder_name, "cpu", tokens=tokens)
    torch.manual_seed(3)
    model = build_captioner(
        CaptionConfig(
            prefix_dim=encoder.shape[-1], num_tokens=encoder.shape[0] if tokens == "patches" else None,
            language_model=str(language_model), clip_model_type=encoder_name, clip_sha256=encoder.sha256, **options,
        ), load_language_model(str(language_model))
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    save_torch(folder / "run_latest.pt", model.state_dict())
    write_json(folder / "run.json", {
        "format": 1, "model": model.config.to_dict(), "language_model_config": model.gpt.config.to_dict(),
    })  # fmt: skip
    return folder / "run_latest.pt"


def check_captions(checkpoint, photos, out, capsys, *flags):
    """Export a captioner and compare its captions with predict.py's; returns predict.py's."""
    run_script("export.py", "--checkpoint", checkpoint, "--out", out, "--check", *photos.glob("*.*g"), *flags)
    for search in ((), ("--use_beam_search",)):
        expected = run_script("predict.py", photos, "--checkpoint", checkpoint, "--device", "cpu", *search).stdout
        command.main([str(out), str(photos), *search])
        assert capsys.readouterr().out == expected
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_captions_are_predicts(case, parts, photos, tmp_path, capsys):
    encoder, tokens, language, options = CASES[case]
    checkpoint = write_captioner(tmp_path, parts(encoder), tokens, parts(language), options)
    if encoder in SIDES:
        (tmp_path / "photos").mkdir()
        for file in photos.glob("*.jpg"):
            Image.open(file).resize((SIDES[encoder],) * 2).save(tmp_path / "photos" / f"{file.stem}.png")
        photos = tmp_path / "photos"
    captions = check_captions(checkpoint, photos, tmp_path / "out", capsys).splitlines()
    assert len({line.split("\t")[1] for line in captions}) > 1


@pytest.mark.slow
def test_lora(store, language_model, photos, tmp_path, capsys):
    train(store, language_model, tmp_path / "run", "--lora_rank", 4)
    check_captions(tmp_path / "run" / "run_latest.pt", photos, tmp_path / "out", capsys)
    # what was kept in 16 bits is exported, and compared, in 32
    train(store, language_model, tmp_path / "run16", "--lora_rank", 4, "--load_in", "16bit")
    words = ("--checkpoint", tmp_path / "run16" / "run_latest.pt", "--out", tmp_path / "out16", "--check")
    done = run_script("export.py", *words, *photos.glob("*.jpg"))
    assert "12 of 12 captions" in done.stderr
