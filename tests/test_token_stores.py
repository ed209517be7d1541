"""Tokens in the place of one vector an image, from the pictures to their captions: stores, training, captioning."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import forked, run_script, slow_but, train, train_command
from test_distributed import launch, losses
from test_distributed import still as still
from test_large_models import resume_exactly
from test_OPT import opt_folder as opt_folder
from test_scripts import one_line_error, weights
from test_stores import OUTPUTS, contents, same, stop

import features.shards
from encoders import load_encoder
from features import store_files
from features.dataset import CaptionDataset
from features.images import read_image
from features.store import read_store, write_store
from models.captioner import Captioner
from models.language import load_tokenizer

K, D = 4, 64  # of the small CLIP


@pytest.fixture
def parse(photos, clip_file, monkeypatch):
    """A function that runs parse_coco.py --tokens patches on the twelve images, in shards of four."""
    monkeypatch.setattr(store_files, "MIN_ROWS", 4)
    monkeypatch.setattr(store_files, "SHARDS", 3)

    def run(out, *more, check=0):
        return run_script(
            "parse_coco.py", "--clip_model_type", clip_file, "--annotations", photos / "captions.csv", "--images",
            photos, "--out", out, "--num_workers", 0, "--batch_size", 2, "--tokens", "patches", *more, check=check,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def patches(photos, clip_file, tmp_path_factory):
    """The store of the twelve images' tokens, a pickle."""
    out = tmp_path_factory.mktemp("patches") / "x.pkl"
    run_script(
        "parse_coco.py", "--clip_model_type", clip_file, "--annotations", photos / "captions.csv", "--images", photos,
        "--out", out, "--num_workers", 0, "--tokens", "patches",
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def trained(patches, language_model, tmp_path_factory):
    """A captioner trained on them, a resampler and a frozen language model."""
    out = tmp_path_factory.mktemp("run")
    train(patches, language_model, out, *RESAMPLER)
    return out


RESAMPLER = ["--mapping_type", "resampler", "--num_layers", 2, "--num_heads", 2, "--only_prefix"]
NETWORKS = {
    "mlp": [],
    "transformer": ["--mapping_type", "transformer", "--num_layers", 2, "--only_prefix"],
    "resampler": RESAMPLER,
    "resampler, lora": [*RESAMPLER[:-1], "--lora_rank", 2, "--prefix_length", 3],
}


def predict(photos, *flags, check=0):
    return run_script("predict.py", photos, "--num_workers", 0, "--device", "cpu", *flags, check=check)


# ---- stores


@OUTPUTS
def test_a_store_holds_what_the_encoder_gives(parse, photos, clip_file, tmp_path, name):
    parse(f"{tmp_path}/{name}")
    store, encoder = read_store(f"{tmp_path}/{name}"), load_encoder(clip_file, tokens="patches")
    assert (store.shape, store.num_tokens, store.prefix_dim) == ((K, D), K, D) and encoder.shape == (K, D)
    pixels = torch.stack([encoder.preprocess(read_image(path)) for path in sorted(photos.glob("*.jpg"))])
    rows = store.clip_embedding[torch.arange(12)].float()
    assert torch.allclose(rows, encoder.encode_images(pixels), atol=2e-3 if name == "x/" else 1e-5)
    told = json.loads((tmp_path / "x.json").read_text())
    assert (told["tokens"], told["shape"], told["embed_dim"], told["grid"]) == ("patches", [K, D], D, [2, 2])
    assert "nothing to do" in parse(tmp_path / "x.pkl").stderr if name == "x.pkl" else told["shards"] == 3
    if name == "x/":
        part = np.load(tmp_path / "x/img_emb/img_emb_0001.npy")
        assert part.shape == (4, K, D) and part.dtype == np.float16


@OUTPUTS
def test_another_tokens_is_another_store(parse, tmp_path, name):
    """Neither rows of an extraction under way nor finished shards are taken for the other kind."""
    out = f"{tmp_path}/{name}"
    with pytest.MonkeyPatch.context() as patch:
        stop(lambda *words, **more: parse(*words, "--tokens", "pooled", **more), out, patch)
    assert "going on" not in parse(out).stderr and read_store(out).shape == (K, D)
    assert "nothing to do" not in parse(out, "--tokens", "pooled").stderr and read_store(out).shape == (32,)


@OUTPUTS
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_what_is_encoded_is_kept(parse, tmp_path, monkeypatch, name, number):
    parse(f"{tmp_path}/whole/{name}")
    out = f"{tmp_path}/{name}"
    stop(parse, out, monkeypatch, lambda: os.kill(os.getpid(), number), 128 + number)
    assert f"going on: {({'x.pkl': 6, 'x/': 2})[name]} of " in parse(out).stderr
    assert same(contents(out), contents(f"{tmp_path}/whole/{name}")) and not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
@OUTPUTS
def test_killed_at_random_moments(parse, tmp_path, name):
    """SIGKILL: what is whole stays whole, the next run goes on, and the end is as if nothing had happened."""
    started = time.monotonic()
    parse(f"{tmp_path}/whole/{name}")
    seconds = time.monotonic() - started
    out, rng, kills, found = tmp_path / name, np.random.default_rng(0), 0, 0

    def begun():
        return (tmp_path / "x.pkl.partial").exists() or len(list(tmp_path.glob("x/img_emb/*.npy"))) in (1, 2)

    while kills < 20:
        process = forked(lambda: os._exit(parse(f"{tmp_path}/{name}", check=None).returncode))
        process.start()
        while kills % 2 and process.is_alive() and not begun():
            process.join(0.001)  # every other time, until it has saved something
        process.join(rng.uniform(0, seconds / 2 if kills % 2 else seconds))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        found += begun()
        if process.exitcode == 0:
            assert same(contents(out), contents(tmp_path / "whole" / name))
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert found  # some kills came in the middle
    parse(f"{tmp_path}/{name}")
    assert same(contents(out), contents(tmp_path / "whole" / name)) and not list(tmp_path.rglob("*.partial"))


def test_processes_share_it_out(patches, photos, clip_file, tmp_path):
    words = [
        "parse_coco.py", "--clip_model_type", clip_file, "--annotations", photos / "captions.csv", "--images", photos,
        "--num_workers", 0, "--batch_size", 1, "--tokens", "patches", "--out",
    ]  # fmt: skip
    for out in (f"{tmp_path}/x.pkl", f"{tmp_path}/y/"):
        launch(2, tmp_path, [str(word) for word in (*words, out)])
        found, expected = (read_store(path).clip_embedding[torch.arange(12)].float() for path in (out, patches))
        assert torch.allclose(found, expected, atol=2e-3)


def test_memory_stays_the_same(tmp_path, language_model):
    """Rows of a megabyte each, drawn at random: what is mapped is given back."""
    folder, rows = tmp_path / "x", 512
    for part in ("img_emb", "metadata"):
        (folder / part).mkdir(parents=True)
    images = {f"{i}.jpg": [{"image_id": i, "caption": "a star"}] for i in range(rows)}
    features.shards.write_shard(folder, 0, "", torch.rand(rows, 512, 512), images, {})
    (tmp_path / "x.json").write_text('{"tokens": "patches", "shards": 1}')
    dataset = CaptionDataset(read_store(folder), load_tokenizer(str(language_model)))

    def resident():
        return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssFile")) / 1024

    before, most = resident(), 0
    for batch in np.random.default_rng(0).permutation(rows).reshape(-1, 8):
        assert dataset.batch(batch)[1].shape == (8, 512, 512)
        most = max(most, resident())
    assert most - before < 200  # MB, of 256 in all


def test_nan_names_its_row(parse, tmp_path):
    parse(f"{tmp_path}/x/")
    file = tmp_path / "x/img_emb/img_emb_0002.npy"
    rows = np.load(file)
    rows[1, 3, 5] = np.inf
    np.save(file, rows)
    with pytest.raises(ValueError, match="img_emb_0002.npy, row 1 holds NaN"):
        read_store(tmp_path / "x").clip_embedding[[8, 9]]


def test_damaged_stores(patches, language_model, parse, tmp_path):
    loaded = read_store(patches)
    bad = tmp_path / "bad.pkl"

    def fails(embeddings, info, *said):
        write_store(bad, embeddings, loaded.captions, info)
        one_line_error(train(bad, language_model, tmp_path / "run", check=2), *said)

    told = loaded.info
    fails(loaded.clip_embedding[:, 0], told, "one vector, 64 wide", "tells of tokens: patches")
    fails(loaded.clip_embedding, told | {"tokens": "pooled"}, "4 tokens, 64 wide each", "tells of tokens: pooled")
    fails(loaded.clip_embedding[:, None], {}, "[12, 1, 4, 64]", "not [N, D] or [N, K, D]")
    fails(loaded.clip_embedding[:, :0], {}, "[12, 0, 64]")
    nan = loaded.clip_embedding.clone()
    nan[7, 2, 1] = torch.nan
    fails(nan, told, "row 7 holds NaN")
    parse(f"{tmp_path}/x/")
    np.save(tmp_path / "x/img_emb/img_emb_0001.npy", np.zeros((4, K + 1, D), np.float16))
    one_line_error(train(tmp_path / "x", language_model, tmp_path / "run", check=2), "5 tokens", "two encoders")


# ---- training and captioning


@pytest.mark.parametrize("network", slow_but(NETWORKS, "mlp", "resampler"))
def test_from_tokens_to_captions(patches, photos, language_model, tmp_path, network):
    """Trained, stopped, resumed exactly; captions alike by image and in batches."""
    with pytest.MonkeyPatch.context() as patch:
        folder = resume_exactly(patches, language_model, tmp_path, patch, *NETWORKS[network])
    told = json.loads((folder / "run.json").read_text())
    assert told["model"]["tokens"] == "patches" and told["model"]["num_tokens"] == K
    assert told["data"]["tokens"] == "patches" and told["data"]["shape"] == [K, D]
    done = predict(photos, "--checkpoint", folder / "run_latest.pt", "--use_beam_search")
    assert done.stdout.count("\t") == 12
    again = predict(photos, "--checkpoint", folder / "run_latest.pt", "--use_beam_search", "--batch_size", 1)
    assert again.stdout == done.stdout


def test_shards_train_as_the_pickle_does(parse, patches, language_model, trained, tmp_path):
    parse(f"{tmp_path}/x/")
    train(tmp_path / "x", language_model, tmp_path / "run", *RESAMPLER)
    one, two = (weights(folder) for folder in (trained, tmp_path / "run"))
    assert all(torch.allclose(one[name], two[name], atol=2e-2) for name in one)


@pytest.mark.parametrize(
    "flags", ([], pytest.param(["--fsdp"], marks=pytest.mark.slow)), ids=("data parallel", "sharded")
)
def test_two_processes_train_as_one_does(patches, still, tmp_path, flags):
    flags = [*RESAMPLER, *flags]
    one, two = tmp_path / "one", tmp_path / "two"
    train(patches, still, one, *RESAMPLER, "--val_data", patches)
    launch(2, two, train_command(patches, still, two, *flags, "--val_data", patches))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert all(torch.allclose(weights(two)[name], weights(one)[name], atol=1e-4) for name in weights(one))


def test_opt_takes_tokens(patches, photos, opt_folder, tmp_path):
    for number, network in enumerate(("transformer", "resampler", "mlp")):
        out = tmp_path / str(number)
        run_script(
            "train_OPT.py", "--data", patches, "--language_model", opt_folder, "--out_dir", out, "--epochs", 1, "--bs",
            4, "--num_layers", 2, "--only_prefix", "--device", "cpu", "--mapping_type", network,
        )  # fmt: skip
        model = json.loads((out / "coco_prefix.json").read_text())["model"]
        assert model["prefix_length"] == (K if network == "mlp" else 32)
        done = run_script("predict_OPT.py", photos, "--checkpoint", out / "coco_prefix_latest.pt", "--device", "cpu")
        assert done.stdout.count("\t") == 12


@pytest.mark.parametrize("dtype", ("bf16", "int8"))
def test_number_types(trained, photos, dtype):
    assert predict(photos, "--checkpoint", trained / "run_latest.pt", "--dtype", dtype).stdout.count("\t") == 12


def test_normalize_prefix(patches, language_model, photos, tmp_path):
    train(patches, language_model, tmp_path / "run", *RESAMPLER, "--normalize_prefix")
    assert predict(photos, "--checkpoint", tmp_path / "run" / "run_latest.pt").stdout.count("\t") == 12


def test_init_from(patches, language_model, trained, tmp_path):
    begun = ["--init_from", trained / "run_latest.pt"]
    train(patches, language_model, tmp_path / "run", *RESAMPLER, *begun, "--lr", 1e-9)
    assert torch.allclose(weights(tmp_path / "run")["clip_project.queries"], weights(trained)["clip_project.queries"])
    for flags in ([], RESAMPLER[:2], [*RESAMPLER, "--prefix_length", 3]):
        done = train(patches, language_model, tmp_path / "other", *flags, *begun, check=2)
        one_line_error(done, "does not fit the captioner asked for")


def test_safetensors(trained, photos, tmp_path):
    import safetensors.torch

    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run/run_latest.pt"
    values = {name: value.clone() for name, value in weights(tmp_path / "run").items()}
    safetensors.torch.save_file(values, file.with_suffix(".safetensors"))
    flags = ("--use_beam_search", "--checkpoint")
    assert predict(photos, *flags, file.with_suffix(".safetensors")).stdout == predict(photos, *flags, file).stdout


# ---- what does not fit


def test_networks_that_do_not_fit_the_store(patches, store, language_model, tmp_path):
    def fails(data, flags, *said):
        done = train(data, language_model, tmp_path / "run", *flags, check=2)
        one_line_error(done, *said)
        assert not (tmp_path / "run").exists()

    fails(store, RESAMPLER, "--mapping_type resampler reads tokens", "--tokens patches")
    fails(patches, ["--prefix_length", 10], "--prefix_length 10", "each of the 4 tokens", "leave it out")
    fails(patches, ["--mapping_type", "transformer", "--prefix_length_clip", 3], "--prefix_length_clip 3", "4 tokens")
    fails(patches, ["--num_heads", 2], "--num_heads 2", "mlp has no such option")
    fails(patches, [*RESAMPLER, "--prefix_length_clip", 2], "--prefix_length_clip 2", "resampler has no such option")
    fails(patches, [*RESAMPLER, "--num_heads", 3], "divisible by 3", "--num_heads")
    fails(patches, [*RESAMPLER, "--val_data", store], "do not both hold tokens", "one vector, 32 wide")
    fails(store, ["--val_data", patches], "do not both hold tokens", "4 tokens, 64 wide each")
    fails(patches, ["--noise_angle", 10], "--noise_angle is for texts", "holds images")
    loaded = read_store(patches)
    many = tmp_path / "many.pkl"
    write_store(many, torch.ones(12, 70, D), loaded.captions, loaded.info)
    fails(many, [], "one for each token", "context of 64", "--mapping_type resampler")
    write_store(many, torch.ones(12, 70, D), loaded.captions, {})
    fails(many, ["--noise_angle", 10], "--noise_angle is for texts", "tokens of images")


def test_texts_have_no_tokens(patches, photos, clip_file, language_model, tmp_path):
    words = ("--clip_model_type", clip_file, "--annotations", photos / "captions.csv", "--text_only")
    done = run_script("parse_coco.py", *words, "--out", tmp_path / "x.pkl", "--tokens", "patches", check=2)
    one_line_error(done, "--text_only", "one vector", "--tokens pooled")
    run_script("parse_coco.py", *words, "--out", tmp_path / "texts.pkl")
    done = train(
        tmp_path / "texts.pkl", language_model, tmp_path / "run", "--noise_angle", "auto", "--match", patches, check=2
    )
    one_line_error(done, f"--match {patches} holds tokens", "--tokens pooled")


def test_rewards(patches, store, trained, language_model, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPCAP_CACHE", str(tmp_path))
    loaded, apart = read_store(patches), tmp_path / "apart.pkl"
    tokens = torch.randn(12, K, D, generator=torch.Generator().manual_seed(0))
    write_store(apart, tokens, loaded.captions * 40, loaded.info)
    train(apart, language_model, tmp_path / "taught", *RESAMPLER[:-1], "--epochs", 1)

    def scst(data, *more, check=0):
        return run_script(
            "train_scst.py", "--init_from", tmp_path / "taught/run_latest.pt", "--data", data, "--out_dir",
            tmp_path / "scst", "--bs", 4, "--epochs", 1, "--device", "cpu", *more, check=check,
        )  # fmt: skip

    for reward in ("clip", "cider+clip"):
        one_line_error(scst(apart, "--reward", reward, check=2), f"--reward {reward}", "holds tokens", "--reward cider")
    one_line_error(scst(store, check=2), "do not both hold tokens")
    one_line_error(scst(apart, "--num_heads", 4, check=2), "--num_heads 4 contradicts", "which has 2")
    write_store(apart, tokens, loaded.captions, loaded.info)
    scst(apart, "--kl", 0.1)
    told = json.loads((tmp_path / "scst/scst_prefix.json").read_text())["model"]
    assert (told["tokens"], told["num_tokens"], told["num_heads"]) == ("patches", K, 2)


def test_captioner_and_encoder(trained, photos, tmp_path):
    """The encoder gives tokens; it does not compare them with texts, which mbr does not need."""
    captioner = Captioner(str(trained / "run_latest.pt"), device="cpu")
    assert captioner.encoder.shape == (K, D) == captioner.model.config.shape
    done = predict(photos, "--checkpoint", trained / "run_latest.pt", "--rerank", "clip", check=2)
    one_line_error(done, "--rerank clip", "one vector an image", "--rerank mbr")
    done = predict(photos, "--checkpoint", trained / "run_latest.pt", "--rerank", "mbr", "--num_candidates", 3)
    assert done.stdout.count("\t") == 12
    shutil.copytree(trained, tmp_path / "run")
    told = json.loads((tmp_path / "run/run.json").read_text())
    for key, value in (("num_tokens", 9), ("prefix_dim", 48)):
        changed = told | {"model": told["model"] | {key: value}}
        (tmp_path / "run/run.json").write_text(json.dumps(changed))
        done = predict(photos, "--checkpoint", tmp_path / "run/run_latest.pt", check=2)
        one_line_error(done, "does not fit")
    (tmp_path / "run/run.json").write_text(json.dumps(told))
    rows = {name: value for name, value in weights(tmp_path / "run").items() if name != "clip_project.positions"}
    torch.save(rows | {"clip_project.positions": torch.zeros(9, 16)}, tmp_path / "run/run_latest.pt")
    changed = told | {"model": told["model"] | {"num_tokens": 9}}
    (tmp_path / "run/run.json").write_text(json.dumps(changed))
    done = predict(photos, "--checkpoint", tmp_path / "run/run_latest.pt", check=2)
    one_line_error(done, "gives of an image 4 tokens, 64 wide each", "trained on 9 tokens, 64 wide each")


def test_the_page_explains(trained, photos):
    from pages.service import Service

    service = Service({"run": str(trained / "run_latest.pt")}, device="cpu")
    assert "best of 16" not in service.methods
    image = str(sorted(photos.glob("*.jpg"))[0])
    [said] = service.caption(image, "run", service.decoding("greedy", 1, 1, 1, 0))
    assert said["clip_score"] is None
    told = service.explain(image, "run", said["caption"] or "a star")
    assert len(told.words) == len(told.heat) and len(told.prefix) == 10


def test_stored_tokens_are_captioned(trained, patches, store, photos, tmp_path):
    import pyarrow.parquet as pq

    def bulk(data, out, check=0):
        words = ("--data", data, "--out", f"{out}/", "--checkpoint", trained / "run_latest.pt", "--device", "cpu")
        return run_script("predict.py", *words, check=check)

    bulk(patches, tmp_path / "out")
    [file] = (tmp_path / "out").glob("*.parquet")
    said = [
        line.split("\t")[1] for line in predict(photos, "--checkpoint", trained / "run_latest.pt").stdout.splitlines()
    ]
    assert [" ".join(text.split()) for text in pq.read_table(file)["caption"].to_pylist()] == said
    one_line_error(bulk(store, tmp_path / "other", check=2), "one vector, 32 wide", "4 tokens, 64 wide each")
