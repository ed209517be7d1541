"""Mapping networks, captioner and checkpoints."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
import zipfile

import pytest
import torch
from conftest import mean_loss, run_script, train
from test_scripts import one_line_error
from transformers import AutoConfig

from encoders.names import OPENAI_NAMES
from features.store import read_store
from models import checkpoint
from models.bare import infer_config
from models.captioner import Captioner, encoder_source
from models.captioner_files import config_path
from models.checkpoint import load_captioner, load_weights, save_weights
from models.clip_caption import build_captioner
from models.foreign import ENCODER, LANGUAGE_MODEL, STATE, STORE
from models.language import build_language_model, load_language_model, load_tokenizer
from models.settings import CaptionConfig
from utils import precision


def build(language_model, **options):
    """Return a small captioner with random weights."""
    torch.manual_seed(1)
    config = CaptionConfig(
        **{"prefix_dim": 32, "prefix_length": 4, "prefix_length_clip": 3, "num_layers": 2, **options}
    )
    return build_captioner(config, load_language_model(language_model)).eval()


@pytest.mark.parametrize("mapping_type", ("mlp", "transformer"))
def test_prefix_shape(language_model, mapping_type):
    model = build(language_model, mapping_type=mapping_type)
    assert model.prefix(torch.randn(5, 32)).shape == (5, 4, 16)


def test_transformer_mapper_matches_plain_attention(language_model):
    """The predecessor's attention, written out, gives the same."""
    mapper = build(language_model, mapping_type="transformer").clip_project
    layer = mapper.transformer.layers[0].attn
    x = torch.randn(2, 7, 16)
    queries = layer.to_queries(x).reshape(2, 7, 8, 2)
    keys, values = layer.to_keys_values(x).reshape(2, 7, 2, 8, 2).unbind(2)
    weights = (torch.einsum("bnhd,bmhd->bnmh", queries, keys) * 2**-0.5).softmax(dim=2)
    mixed = torch.einsum("bnmh,bmhd->bnhd", weights, values).reshape(2, 7, 16)
    assert torch.allclose(layer(x, x), layer.project(mixed), atol=1e-6)


def test_loading_draws_no_random_weights(language_model, tmp_path):
    """Weights are made empty and filled, in float32 whatever the file's type; the output layer stays tied."""
    model = build(language_model)
    torch.save({name: value.half() for name, value in model.state_dict().items()}, tmp_path / "bare.pt")
    before = torch.get_rng_state()
    loaded, _, _ = load_captioner(tmp_path / "bare.pt", str(language_model))
    assert torch.equal(torch.get_rng_state(), before)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert loaded.gpt.lm_head.weight is loaded.gpt.transformer.wte.weight
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name


@pytest.mark.parametrize("name", ("bare.pt", "bare.safetensors"))
def test_a_loaded_captioner_keeps_its_weights(language_model, tmp_path, name):
    """Its memory is its own: a checkpoint that is copied over while a server runs changes nothing."""
    model, path = build(language_model), tmp_path / name
    save_weights(path, model.state_dict())
    loaded, _, _ = load_captioner(path, str(language_model))
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("name", ("run.pt", "run.safetensors"))
@pytest.mark.parametrize("dtype", ("fp32", "int8"))
@pytest.mark.parametrize("plain", (False, True))
def test_a_captioner_keeps_its_weights(language_model, tmp_path, name, dtype, plain, monkeypatch):
    """The same of one that is laid out for the processor; `plain`: of layers that the processor has no layout for."""
    model, path = build(language_model), tmp_path / name
    save_weights(path, model.state_dict())
    if plain:
        monkeypatch.setattr(precision, "_packed", lambda layer, _kind: layer)
    captioner = Captioner(path, language_model=str(language_model), device="cpu", dtype=dtype, with_encoder=False)
    embeddings = torch.randn(2, model.config.prefix_dim, generator=torch.Generator().manual_seed(0))
    compute = lambda: captioner.model(torch.tensor([[5, 6], [7, 8]]), embeddings)  # noqa: E731
    with torch.inference_mode():
        before = compute()
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
        assert torch.equal(compute(), before) and before.abs().max() > 0


def test_loss_counts_every_token_and_no_padding(language_model):
    """Token id 0 is learnt like any other; what stands in the padding changes nothing."""
    model = build(language_model)
    embedding = torch.randn(2, 32)
    tokens = torch.tensor([[0, 5, 0, 7], [8, 9, 0, 0]])
    lengths = torch.tensor([4, 2])
    loss = mean_loss(model, tokens, embedding, lengths)
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    logprobs = model(tokens, embedding, mask)[:, 3:-1].log_softmax(-1)
    picked = logprobs.gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(loss, -(picked[0].sum() + picked[1, :2].sum()) / 6, atol=1e-6)
    changed = tokens.clone()
    changed[1, 2:] = 11
    assert torch.allclose(loss, mean_loss(model, changed, embedding, lengths), atol=1e-6)


def test_only_prefix_gives_the_language_model_no_gradients(language_model):
    model = build(language_model, only_prefix=True).train()
    assert not model.gpt.training and model.clip_project.training
    mean_loss(model, torch.ones(2, 3, dtype=torch.long), torch.randn(2, 32), torch.tensor([3, 3])).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.gpt.parameters())
    assert all(p.grad is not None for p in model.clip_project.parameters())


def test_normalize_prefix(language_model):
    plain, normalised = build(language_model), build(language_model, normalize_prefix=True)
    embedding = torch.randn(3, 32) * 7
    unit = embedding / embedding.norm(2, -1, keepdim=True)
    assert torch.allclose(normalised.prefix(embedding), plain.prefix(unit), atol=1e-6)


def test_wrong_width_is_refused(language_model):
    with pytest.raises(ValueError, match="48 wide.*made for one vector, 32 wide"):
        build(language_model).prefix(torch.randn(1, 48))


def write_bare(path, model, old_buffers=False, tied=True):
    """Write a checkpoint as the predecessors do: weights only."""
    weights = model.state_dict()
    if old_buffers:
        for layer in range(2):
            weights[f"gpt.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
            weights[f"gpt.transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if not tied:
        del weights["gpt.lm_head.weight"]
    torch.save(weights, path)


@pytest.mark.parametrize("old_buffers", (False, True))
@pytest.mark.parametrize("mapping_type", ("mlp", "transformer"))
def test_bare_checkpoints_are_recognised(language_model, tmp_path, mapping_type, old_buffers):
    model = build(language_model, mapping_type=mapping_type)
    write_bare(tmp_path / "bare.pt", model, old_buffers)
    loaded, _, described = load_captioner(tmp_path / "bare.pt", str(language_model))
    assert not described and loaded.config.mapping_type == mapping_type
    assert (loaded.config.prefix_dim, loaded.config.prefix_length) == (32, 4)
    if mapping_type == "transformer":
        assert (loaded.config.prefix_length_clip, loaded.config.num_layers) == (3, 2)
    embedding = torch.randn(2, 32)
    assert torch.equal(loaded.prefix(embedding), model.prefix(embedding))


def test_other_unknown_keys_are_refused(language_model, tmp_path):
    weights = build(language_model).state_dict() | {"gpt.transformer.h.0.attn.extra": torch.ones(1)}
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="attn.extra"):
        load_captioner(tmp_path / "x.pt", str(language_model))


def test_untied_output_layer_may_be_absent(language_model, tmp_path):
    model = build(language_model)
    write_bare(tmp_path / "bare.pt", model, tied=False)
    loaded, _, _ = load_captioner(tmp_path / "bare.pt", str(language_model))
    tokens, embedding = torch.ones(1, 3, dtype=torch.long), torch.randn(1, 32)
    assert torch.equal(loaded(tokens, embedding), model(tokens, embedding))


@pytest.mark.parametrize("ending", (".pt", ".safetensors"))
def test_tied_weights_that_differ_are_refused(trained, store, language_model, tmp_path, ending):
    """The model has room for one of them; as an untied one it has room for both."""
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / f"run_latest{ending}"
    weights = load_weights(trained / "run_latest.pt")
    weights["gpt.lm_head.weight"] = weights["gpt.lm_head.weight"] + 0.1
    save_weights(path, weights)
    with pytest.raises(ValueError, match="that differ.*tie_word_embeddings false.*json"):
        load_captioner(path)
    one_line_error(
        train(store, language_model, tmp_path / "out", "--init_from", path, check=2), str(path), "that differ"
    )
    stored = json.loads((trained / "run.json").read_text())
    stored["language_model_config"]["tie_word_embeddings"] = False
    (tmp_path / "run" / "run.json").write_text(json.dumps(stored))
    model, _, _ = load_captioner(path)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    del weights["gpt.lm_head.weight"]
    save_weights(path, weights)
    with pytest.raises(ValueError, match="lacks gpt.lm_head.weight"):
        load_captioner(path)


def test_safetensors_round_trip(language_model, tmp_path):
    model = build(language_model)
    save_weights(tmp_path / "x.safetensors", model.state_dict())
    loaded, _, _ = load_captioner(tmp_path / "x.safetensors", str(language_model))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_published_sizes_need_no_flags():
    """The shapes of the published GPT-2 checkpoints tell encoder, language model and its configuration."""
    with torch.device("meta"):
        gpt = build_language_model(AutoConfig.for_model("gpt2"))
        weights = build_captioner(CaptionConfig(640, 40, 40, "transformer", 8), gpt).state_dict()
    config = infer_config(weights)
    assert (config.language_model, config.clip_model_type) == ("gpt2", "RN50x4")
    assert (config.prefix_length, config.prefix_length_clip, config.num_layers) == (40, 40, 8)


class Hostile:
    def __reduce__(self):
        return os.system, ("echo reached > reached.txt",)


def test_checkpoint_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"gpt.x": Hostile()}, "evil.pt")
    with pytest.raises(ValueError, match="could run code"):
        load_weights("evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="plain.pt"):
        load_weights("plain.pt")
    assert not (tmp_path / "reached.txt").exists()


NOT_CHECKPOINTS = (
    b"", b"not a checkpoint", b"PK\x03\x04broken", b"hello world\n", b"a", b"\x80", b"<html></html>", b'{"a": 1}',
    b"\x89PNG\r\n", b"version https://git-lfs.github.com/spec/v1\n", pickle.dumps({1: 2}, protocol=4),
)  # fmt: skip


@pytest.mark.parametrize("content", NOT_CHECKPOINTS)
def test_damaged_checkpoint_is_named(tmp_path, content):
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(ValueError, match="broken.pt"):
        load_weights(tmp_path / "broken.pt")


@pytest.mark.parametrize("content", ({}, {1: torch.ones(1)}, [torch.ones(1)], {"a": 1}))
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(tmp_path / "x.pt")


def test_no_checkpoint_is_one_line_in_every_command(store, language_model, photos, tmp_path):
    """Text, a zip of something else, a folder."""
    (tmp_path / "text.pt").write_text("hello world")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("a.txt", "x")
    (tmp_path / "folder.pt").mkdir()
    for name in ("text.pt", "zip.pt", "folder.pt"):
        done = run_script("predict.py", photos, "--checkpoint", tmp_path / name, "--device", "cpu", check=2)
        one_line_error(done, name)
        done = train(store, language_model, tmp_path / "out", "--init_from", tmp_path / name, check=2)
        one_line_error(done, name)
    assert not (tmp_path / "out").exists()


def scripted(path):
    with warnings.catch_warnings():  # torch announces that it will go
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


@pytest.fixture
def foreign_files(trained, clip_file, language_model, store, photos, tmp_path):
    """{what is given for a captioner's weights: words of what is said of it}."""
    folder = tmp_path / "foreign"
    shutil.copytree(trained, folder)
    scripted(folder / "script.pt")
    clip_weights = torch.load(clip_file)
    torch.save(clip_weights, folder / "old_clip.pt", _use_new_zipfile_serialization=False)
    save_weights(folder / "clip.safetensors", clip_weights)
    model = build(language_model)
    torch.save(model.gpt.state_dict(), folder / "gpt.pt")
    torch.save(model.gpt.transformer.state_dict(), folder / "pytorch_model.bin")
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, folder / "ddp.pt")
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "lightning.ckpt")
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), folder / "optimizer.pt")
    torch.save(read_store(store).__dict__ | {"path": 0}, folder / "store.pt")
    whole = (folder / "run_latest.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").touch()
    (tmp_path / "shards" / "img_emb").mkdir(parents=True)
    return {
        clip_file: ENCODER, folder / "old_clip.pt": ENCODER, folder / "clip.safetensors": ENCODER,
        folder / "script.pt": "a TorchScript program, as those of OpenAI's CLIP",
        folder / "run_state.pt": STATE, folder / "optimizer.pt": STATE, folder / "run.json": "the json of a training",
        store: STORE, folder / "store.pt": STORE, tmp_path / "shards": STORE, store.with_suffix(".json"): "the json of",
        folder: "a folder; pass a file in it, such as", language_model: "a language model's folder",
        language_model / "model.safetensors": LANGUAGE_MODEL, folder / "gpt.pt": LANGUAGE_MODEL,
        folder / "pytorch_model.bin": LANGUAGE_MODEL, folder / "ddp.pt": "without 'module.'",
        folder / "lightning.ckpt": "under 'state_dict'", folder / "cut.pt": "cut short", folder / "empty.pt": "empty",
        next(photos.glob("*.jpg")): "a picture",
    }  # fmt: skip


def test_other_files_are_told_for_what_they_are(foreign_files, store, photos, language_model, tmp_path):
    for path, said in foreign_files.items():
        done = run_script("predict.py", photos, "--checkpoint", path, "--device", "cpu", check=2)
        one_line_error(done, f"{path} is no captioner's weights but ", said)
    for path in list(foreign_files)[:5]:
        done = train(store, language_model, tmp_path / "out", "--init_from", path, check=2)
        one_line_error(done, "is no captioner's weights but ", foreign_files[path])


def test_a_folder_in_this_place_is_told(photos, trained, monkeypatch):
    """Its bare name is no captioner's name."""
    monkeypatch.chdir(trained.parent)
    done = run_script("predict.py", photos, "--checkpoint", trained.name, "--device", "cpu", check=2)
    one_line_error(
        done, f"{trained.name} is no captioner's weights but a folder; pass a file in it, such as run_latest.pt"
    )


def test_long_prefix_is_refused_before_anything_is_built(store, language_model, tmp_path, monkeypatch):
    monkeypatch.setattr("training.run.build_model", lambda *_: pytest.fail("built"))
    done = train(store, language_model, tmp_path / "out", "--prefix_length", 5000, check=2)
    one_line_error(done, "--prefix_length 5000", "64")


def test_missing_checkpoint_lists_what_is_there(tmp_path):
    (tmp_path / "run-000.pt").touch()
    with pytest.raises(FileNotFoundError, match="run-000.pt"):
        load_weights(tmp_path / "run-001.pt")


def test_config_path():
    for name in ("run-000.pt", "run_latest.pt", "run_best.pt", "run.pt", "run-1234.safetensors"):
        assert str(config_path(f"folder/{name}")) == os.path.join("folder", "run.json")


def test_own_checkpoint_contradictions(trained, language_model, tmp_path):
    with pytest.raises(ValueError, match="--normalize_prefix contradicts"):
        load_captioner(trained / "run_latest.pt", normalize_prefix=True)
    config = json.loads((language_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(ValueError, match="contradicts.*'gpt2', 3, 16"):
        load_captioner(trained / "run_latest.pt", str(tmp_path))


def test_empty_tokenizer_is_refused(language_model, tmp_path):
    """transformers makes an empty tokenizer of a folder that has only a config, without a word."""
    (tmp_path / "config.json").write_text((language_model / "config.json").read_text())
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("change, words", (
    ({"format": 2}, ("format 2", "update")), ({"format": "x"}, ("format x",)), ({"extra": 1}, ("'extra'", "newer")),
    ({"model": {"mapping_depth": 3}}, ("'mapping_depth'", "newer")), ({"model": None}, ("does not describe",)),
))  # fmt: skip
def test_json_of_a_newer_version_is_refused(trained, tmp_path, change, words):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    stored = json.loads((trained / "run.json").read_text())
    assert stored["format"] == 1
    for key, value in change.items():
        stored[key] = stored[key] | value if isinstance(value, dict) else value
    (tmp_path / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError) as error:
        load_captioner(tmp_path / "run_latest.pt")
    assert all(word in str(error.value) for word in (*words, "run.json"))


def test_json_without_a_number_is_read(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    stored = json.loads((trained / "run.json").read_text())
    del stored["format"]
    (tmp_path / "run.json").write_text(json.dumps(stored))
    assert load_captioner(tmp_path / "run_latest.pt")[2]


def test_long_warmup_is_said(store, language_model, tmp_path):
    done = train(store, language_model, tmp_path, "--warmup_steps", 12, "--quiet")
    assert done.stderr.count("warning: --warmup_steps 12") == 1 and "12 steps" in done.stderr
    assert "--warmup_steps" not in train(store, language_model, tmp_path / "short", "--warmup_steps", 11).stderr


def test_published_transformer_by_path(tmp_path):
    """Its shapes are enough: normalised, RN50x4; other bare files are warned of."""
    for layers, normalized in ((8, True), (7, False)):
        with torch.device("meta"):
            gpt = build_language_model(AutoConfig.for_model("gpt2"))
            weights = build_captioner(CaptionConfig(640, 40, 40, "transformer", layers), gpt).state_dict()
        config, said = infer_config(weights), io.StringIO()
        with contextlib.redirect_stderr(said):
            checkpoint.guess_normalization("x.pt", config, weights)
        assert config.normalize_prefix == normalized and config.clip_model_type == "RN50x4"
        assert said.getvalue().count("\n") == 1
        assert ("normalised" if normalized else "warning: x.pt") in said.getvalue()


def test_a_named_encoder_is_its_file(tmp_path, monkeypatch):
    """The path of a name's file is accepted for the name, and the name for the path; another file is not."""
    file, other = tmp_path / "ViT-B-32.pt", tmp_path / "other.pt"
    file.write_bytes(b"weights")
    other.write_bytes(b"others")
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(OPENAI_NAMES, "ViT-B/32", digest)
    path = tmp_path / "run.pt"
    for own, stored in (("ViT-B/32", None), ("ViT-B/32", digest), (str(file), digest)):
        config = CaptionConfig(512, clip_model_type=own, clip_sha256=stored)
        for given in ("ViT-B/32", str(file)):
            assert encoder_source(config, path, given, True) == given
        assert encoder_source(config, path, None, True) == own
        for given in ("RN50", str(other)):
            with pytest.raises(ValueError, match="contradicts"):
                encoder_source(config, path, given, True)
