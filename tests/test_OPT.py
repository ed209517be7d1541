"""OPT and other causal language models: training, checkpoints, decoding, the OPT and NICE commands."""

import csv
import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from conftest import captions_of, mean_loss, read_log, run_script
from test_scripts import one_line_error
from tokenizers import processors
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import predict
import predict_nice
import predict_OPT
import train_OPT
from demo.world.train_gpt2 import train_bpe
from encoders import load_encoder
from features.loader import encode_files
from models.checkpoint import load_captioner
from models.clip_caption import build_captioner
from models.decoding import generate_captions
from models.language import build_language_model, load_language_model, load_tokenizer, split_layers
from models.settings import BEAM, SAMPLE, CaptionConfig, DecodingConfig
from models.slots import step_for
from models.steps import UncachedStep
from utils.devices import layer_cuts, pick_devices, split_devices

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SMALL, "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64, "head_dim": 8}
SLIDING = {**LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 8}
FAMILIES = {
    "gpt2": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {**SMALL, "ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
    "opt projected": {**SMALL, "ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 8},
    "llama": LLAMA,
    "mistral": SLIDING,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": SLIDING,
    "gemma3_text": {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**LLAMA, "pad_token_id": 0},
    "gpt_neo": {
        "vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
    },
    "gptj": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4},
    "gpt_neox": {**SMALL, "intermediate_size": 32, "max_position_embeddings": 64},
    "bloom": {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "falcon": {**SMALL, "ffn_hidden_size": 32},
    "falcon alibi": {**SMALL, "ffn_hidden_size": 32, "alibi": True, "multi_query": False},
    "mamba": {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "xglm": {
        "vocab_size": 64, "d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32,
        "max_position_embeddings": 64,
    },
}  # fmt: skip


def small(family, **changes):
    """Return a random language model of a family, or skip where the installed transformers has none."""
    name = family.split()[0]
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    torch.manual_seed(0)
    return build_language_model(AutoConfig.for_model(name, **{**FAMILIES.get(family, {}), **changes}))


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_own_lengths(family):
    """Padded rows give the logits they have alone, from the prefix on and after some have left."""
    gpt = small(family)
    lengths = torch.tensor([3, 7, 5, 7])
    embeddings = torch.randn(4, 7, gpt.get_input_embeddings().embedding_dim)
    step = step_for(gpt, embeddings, lengths)
    alone = [step_for(gpt, row[None, :length]) for row, length in zip(embeddings, lengths, strict=True)]
    assert torch.allclose(step.first, torch.cat([one.first for one in alone]), atol=1e-5)
    rows = [0, 1, 2, 3]
    for column in range(4):
        if column == 2:
            step.select(torch.tensor([2, 0]))
            rows = [2, 0]
        tokens = torch.tensor([3 + row + column for row in rows])
        wanted = [alone[row](token[None]) for row, token in zip(rows, tokens, strict=True)]
        assert torch.allclose(step(tokens), torch.cat(wanted), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_language_model(family, language_model):
    """Loss against plain logits; the cached search equals the one that runs everything again."""
    model = build_captioner(CaptionConfig(prefix_dim=12, prefix_length=3), small(family)).eval()
    with torch.no_grad():  # far from uniform, so that ties decide nothing
        model.gpt.get_input_embeddings().weight.mul_(20)
    embedding, tokens = torch.randn(4, 12), torch.randint(3, 60, (4, 5))
    loss = mean_loss(model, tokens, embedding, torch.tensor([5, 5, 5, 5]))
    logits = model(tokens, embedding)[:, 2:-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert torch.allclose(loss, wanted, atol=1e-5)
    tokenizer = load_tokenizer(str(language_model))
    for config in (DecodingConfig(entry_length=8), DecodingConfig(method=BEAM, entry_length=8, num_captions=5)):
        cached = generate_captions(model, tokenizer, embedding, config)
        plain = generate_captions(model, tokenizer, embedding, config, UncachedStep)
        assert [[c.tokens for c in group] for group in cached] == [[c.tokens for c in group] for group in plain]


@pytest.mark.parametrize(
    "family, options",
    (
        ("openai-gpt", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
        ("rwkv", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}),
    ),
)
def test_models_that_take_no_cache(family, options, language_model):
    """They are run again for every token, for they pass over a cache in silence; the library's search is refused."""
    model = build_captioner(CaptionConfig(prefix_dim=12, prefix_length=3), small(family, **options)).eval()
    with torch.no_grad():
        model.gpt.get_input_embeddings().weight.mul_(20)
    tokenizer, embedding = load_tokenizer(str(language_model)), 5 * torch.randn(4, 12)
    config = DecodingConfig(method=BEAM, entry_length=8, num_captions=5)
    found = generate_captions(model, tokenizer, embedding, config)
    assert found == generate_captions(model, tokenizer, embedding, config, UncachedStep)
    with pytest.raises(ValueError, match="--decoder transformers needs a cache.*use clipcap"):
        generate_captions(model, tokenizer, embedding, replace(config, decoder="transformers"))


@pytest.fixture(scope="module")
def opt_folder(tmp_path_factory):
    """A small OPT with a tokenizer that begins with </s>, as OPT's does."""
    folder = tmp_path_factory.mktemp("opt") / "opt-small"
    tokenizer = train_bpe(captions_of(300), 330, ["<s>", "<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt", **{**FAMILIES["opt"], "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 128}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opt_run(store, opt_folder, tmp_path_factory):
    """A captioner trained by train_OPT.py."""
    out = tmp_path_factory.mktemp("opt_run")
    run_script(
        "train_OPT.py", "--data", store, "--language_model", opt_folder, "--out_dir", out, "--epochs", 2, "--bs", 4,
        "--num_layers", 2, "--lr", 1e-2, "--warmup_steps", 2, "--only_prefix", "--device",
    )  # fmt: skip
    return out


def test_train_OPT(opt_run, opt_folder):
    config = json.loads((opt_run / "coco_prefix.json").read_text())
    assert config["model"]["mapping_type"] == "transformer" and config["model"]["prefix_length"] == 32
    log = read_log(opt_run, "coco_prefix")
    assert log[-1]["loss"] < log[0]["loss"]
    weights = torch.load(opt_run / "coco_prefix_latest.pt", weights_only=True)
    assert "gpt.model.decoder.layers.1.fc2.weight" in weights and "clip_project.prefix_const" in weights
    frozen = load_language_model(str(opt_folder)).state_dict()
    assert all(torch.equal(weights[f"gpt.{name}"], value) for name, value in frozen.items())


def test_captions_begin_with_the_begin_token(store, opt_folder):
    from features.dataset import CaptionDataset
    from features.store import read_store

    tokens, _, _ = CaptionDataset(read_store(store), load_tokenizer(str(opt_folder))).batch([0])
    assert tokens[0, 0] == 2


def test_predict_OPT_is_transformers_generate(opt_run, photos, tmp_path):
    out = tmp_path / "captions.json"
    checkpoint = opt_run / "coco_prefix_latest.pt"
    run_script("predict_OPT.py", photos, "--checkpoint", checkpoint, "--out", out, "--batch_size", 5)
    model, tokenizer, _ = load_captioner(checkpoint)
    encoder = load_encoder(model.config.clip_model_type)
    images = sorted(photos.glob("*.jpg"))
    _, embeddings, _ = next(encode_files(encoder, images))
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    for embedding, record in zip(embeddings, json.loads(out.read_text()), strict=True):
        prompt = model.gpt.get_input_embeddings()(tokenizer(["a photo of"], return_tensors="pt").input_ids)
        with torch.no_grad():
            inputs = torch.cat((model.prefix(embedding[None]), prompt), 1)
            tokens = model.gpt.generate(
                inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long), num_beams=5,
                max_new_tokens=30, min_length=1, eos_token_id=newline, do_sample=False,
            )  # fmt: skip
        assert record["caption"] == tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()


def test_bare_checkpoint_of_opt(opt_run, opt_folder, tmp_path):
    shutil.copy(opt_run / "coco_prefix_latest.pt", tmp_path / "model_coco_prefix.pt")
    model, _, described = load_captioner(tmp_path / "model_coco_prefix.pt", str(opt_folder))
    assert not described and (model.config.prefix_length, model.config.prefix_length_clip) == (32, 32)


def nice(folder, run, *more, check=0):
    return run_script("predict_nice.py", "--images", folder, "--checkpoint", run, *more, check=check)


def test_predict_nice(opt_run, photos, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.glob("*.jpg"))[:4]):
        shutil.copy(path, folder / f"{215268660 + number}.jpg")
    (folder / "215268700.jpg").write_text("no image")
    monkeypatch.setattr(predict_nice, "FOLDER", tmp_path / "output_caption")
    checkpoint = opt_run / "coco_prefix_latest.pt"
    done = nice(folder, checkpoint, check=2)
    one_line_error(done, "1 of 5 images")
    captions = json.loads((tmp_path / "output_caption" / "clipcap.json").read_text())
    assert list(captions) == ["215268660", "215268661", "215268662", "215268663", "215268700"]
    rows = list(csv.DictReader((tmp_path / "output_caption" / "clipcap.csv").read_text().splitlines()))
    assert [row["public_id"] for row in rows] == list(captions) and rows[0]["caption"] == captions["215268660"]
    shutil.copy(sorted(photos.glob("*.jpg"))[5], folder / "215268700.jpg")
    assert "4 of 5 images are captioned" in nice(folder, checkpoint).stderr
    again = json.loads((tmp_path / "output_caption" / "clipcap.json").read_text())
    assert {k: v for k, v in again.items() if k != "215268700"} == {k: v for k, v in captions.items() if v}
    one_line_error(nice(folder, checkpoint, "--ofile", "x", "--prefix_length", 10, check=2), "--prefix_length 10")


def test_layer_cuts():
    assert layer_cuts("411", 3, 12) == [4, 11]
    assert layer_cuts("1122", 3, 32) == [11, 22]
    assert layer_cuts("6", 2, 12) == [6]
    assert layer_cuts(None, 3, 12) == [4, 8]
    for pn, devices in (("411", 2), ("48", 1), ("84", 3), ("x", 3), ("415", 3), ("12345", 3)):
        with pytest.raises(ValueError, match=f"--pn {pn}.*would"):
            layer_cuts(pn, devices, 12)
    with pytest.raises(ValueError, match="2 layers cannot be split over 3"):
        layer_cuts("411", 3, 2)
    first, second = torch.device("meta", 0), torch.device("meta", 1)
    assert split_devices([first, second], "3", 4) == [first] * 3 + [second]


def test_gpu_numbers_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert pick_devices("12") == [torch.device("cpu")]
    assert "there is none here" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_split_layers_change_nothing(family):
    """With the hooks that move activations between devices, here all the CPU, loss and gradients are the same."""
    results = []
    for split in (False, True):
        torch.manual_seed(3)
        model = build_captioner(CaptionConfig(prefix_dim=12, prefix_length=3), small(family)).eval()
        if split:
            split_layers(model.gpt, ["cpu", "cpu"])
            assert model.gpt.hf_device_map
        torch.manual_seed(4)
        loss = mean_loss(model, torch.randint(3, 60, (2, 5)), torch.randn(2, 12), torch.tensor([5, 3]))
        loss.backward()
        results.append((loss.item(), model.clip_project.model[0].weight.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_opt_model_is_a_name_at_the_top():
    assert train_OPT.OPT_MODEL.startswith("facebook/opt-")
    parser = train_OPT.get_parser()
    assert parser.parse_args([]).language_model == train_OPT.OPT_MODEL
    assert parser.parse_args(["--language_model", "opt"]).language_model == train_OPT.OPT_MODEL


def test_decoding_travels_with_the_checkpoint(opt_run, photos, tmp_path):
    """A captioner of train_OPT.py is captioned by every command as by predict_OPT.py; flags go before its json."""
    checkpoint, path = opt_run / "coco_prefix_latest.pt", sorted(photos.glob("*.jpg"))[0]
    stored = json.loads((opt_run / "coco_prefix.json").read_text())["decoding"]
    assert stored == asdict(train_OPT.DECODING)
    theirs = run_script("predict_OPT.py", photos, "--checkpoint", checkpoint).stdout
    assert run_script("predict.py", photos, "--checkpoint", checkpoint).stdout == theirs
    predictor = predict.Predictor()
    predictor.setup([str(checkpoint)])
    assert predictor.predict(str(path)).strip() == theirs.splitlines()[0].split("\t")[1]

    def asked_for(*flags):
        args = predict.get_parser().parse_args(["x.jpg", "--checkpoint", str(checkpoint), *flags])
        return predict.decoding_config(args)

    assert asked_for("--prompt", "", "--beam_size", "2") == replace(train_OPT.DECODING, prompt="", beam_size=2)
    assert asked_for("--top_p", "0.5") == replace(train_OPT.DECODING, method=SAMPLE, top_p=0.5)
    bare = shutil.copy(checkpoint, tmp_path / "bare.pt")
    of_the_command = predict_OPT.get_parser().parse_args(["x.jpg", "--checkpoint", str(bare)])
    assert predict.decoding_config(of_the_command) == train_OPT.DECODING
    plain = predict.get_parser().parse_args(["x.jpg", "--checkpoint", str(bare), "--temperature", "2"])
    assert predict.decoding_config(plain) == DecodingConfig(method=SAMPLE, top_p=1.0, temperature=2)


@pytest.mark.parametrize(
    "decoding, named",
    (
        ({"nucleus": 3}, "'nucleus'"),
        ({"beam_size": "5"}, "beam_size '5'"),
        ({"entry_length": 0}, "entry_length 0"),
        ({"method": "best"}, "'best'"),
        ({"decoder": "hf"}, "'hf'"),
        ([], "decoding"),
    ),
)
def test_decoding_of_a_json_is_checked(opt_run, photos, tmp_path, decoding, named):
    config = json.loads((opt_run / "coco_prefix.json").read_text()) | {"decoding": decoding}
    shutil.copy(opt_run / "coco_prefix_latest.pt", tmp_path / "run_latest.pt")
    (tmp_path / "run.json").write_text(json.dumps(config))
    done = run_script("predict.py", photos, "--checkpoint", tmp_path / "run_latest.pt", check=2)
    one_line_error(done, "run.json")
    assert named in done.stderr
