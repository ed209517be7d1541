"""The commands, as a user runs them: the whole way, bad input, Ctrl-C, kill and resume."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, read_log, run_process, run_script, train, train_command
from PIL import Image

from features.store import read_store
from predict import Predictor


def one_line_error(done, *words):
    """The last line of standard error says it, and there is no traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "error" in last and all(word in last for word in words), last


def weights(folder, name="run_latest.pt"):
    return torch.load(folder / name, weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- parse_coco.py


def parse(photos, clip_file, out, *more, check=0):
    return run_script(
        "parse_coco.py", "--clip_model_type", clip_file, "--annotations", photos / "captions.csv", "--images", photos,
        "--out", out, "--num_workers", 0, *more, check=check,
    )  # fmt: skip


def test_one_row_per_image(store, photos):
    loaded = read_store(store)
    assert loaded.clip_embedding.shape == (12, 32) and len(loaded.captions) == 24
    assert {r["image_id"]: r["clip_embedding"] for r in loaded.captions} == {i + 1: i for i in range(12)}
    info = json.loads(store.with_suffix(".json").read_text())
    assert (info["images"], info["captions"], info["embed_dim"], info["normalized"]) == (12, 24, 32, False)
    assert not list(store.parent.glob("*.partial"))


def test_workers_and_batches_change_nothing(store, photos, clip_file, tmp_path):
    parse(photos, clip_file, tmp_path / "x.pkl", "--num_workers", 2, "--batch_size", 5)
    a, b = read_store(store), read_store(tmp_path / "x.pkl")
    assert a.captions == b.captions and torch.allclose(a.clip_embedding, b.clip_embedding, atol=1e-5)


def test_bad_images_are_listed_and_left_out(photos, clip_file, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    names = sorted(path.name for path in folder.glob("*.jpg"))
    (folder / names[0]).write_bytes((folder / names[0]).read_bytes()[:300])
    (folder / names[1]).unlink()
    done = parse(folder, clip_file, tmp_path / "x.pkl")
    assert f"{names[0]}: not a readable image" in done.stderr and f"{names[1]}: no such image" in done.stderr
    store = read_store(tmp_path / "x.pkl")
    assert store.clip_embedding.shape[0] == 10 and {r["image_id"] for r in store.captions} == set(range(3, 13))
    assert len(store.info["skipped"]) == 2
    one_line_error(parse(folder, clip_file, tmp_path / "y.pkl", "--strict", check=2), names[1], "--strict")
    assert not (tmp_path / "y.pkl").exists()


def test_parse_goes_on_after_kill(photos, clip_file, tmp_path, store):
    """Killed at any moment it goes on, and the store is the same as without."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "parse_coco.py", "--clip_model_type", clip_file, "--annotations", photos / "captions.csv",
        "--images", photos, "--out", tmp_path / "x.pkl", "--num_workers", "0", "--batch_size", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    journal = tmp_path / "x.pkl.partial" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if journal.exists():  # else it was done before the kill came
        assert not (tmp_path / "x.pkl").exists()
        assert "going on" in parse(photos, clip_file, tmp_path / "x.pkl").stderr
    assert torch.allclose(read_store(tmp_path / "x.pkl").clip_embedding, read_store(store).clip_embedding, atol=1e-5)
    assert "nothing to do" in parse(photos, clip_file, tmp_path / "x.pkl").stderr


def test_parse_bad_input(photos, clip_file, tmp_path):
    out = tmp_path / "x.pkl"
    one_line_error(run_script("parse_coco.py", "--clip_model_type", "ViT-B/23", "--annotations",
                              photos / "captions.csv", "--images", photos, check=2), "mean ViT-B/32?")  # fmt: skip
    one_line_error(parse(photos, clip_file, out, "--annotations", "none.json", check=2), "none.json")
    one_line_error(parse(photos, clip_file, out, "--images", tmp_path / "none", check=2), "--images")
    one_line_error(parse(photos, clip_file, out, "--batch_size", 0, check=2), "--batch_size")
    one_line_error(parse(photos, photos / "captions.csv", out, check=2), "captions.csv is no CLIP")
    one_line_error(parse(photos, clip_file, out, "--device", "cuda:7", check=2), "--device cuda:7")
    one_line_error(parse(photos, clip_file, out, "--imges", check=2), "--images")
    assert not out.exists()


@pytest.mark.parametrize("limit", (0, 1000, 20_000, 60_000))
def test_full_disk(language_model, store, tmp_path, limit):
    """No file can grow beyond `limit` bytes: one line that says so, and no half-written checkpoint."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        done = train(store, language_model, tmp_path, check=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one_line_error(done, "no space left")
    for checkpoint in tmp_path.glob("*.pt"):
        torch.load(checkpoint, weights_only=True)


# ---- train.py


def test_training_writes_what_it_says(trained, store):
    names = {path.name for path in trained.iterdir()}
    assert {"run-000.pt", "run-001.pt", "run_latest.pt", "run.json", "run-log.jsonl", "run-loss.png"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    log = read_log(trained)
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert set(log[0]) == {"step", "epoch", "loss", "lr", "examples_per_s"} and log[0]["lr"] == 0
    assert log[-1]["loss"] < log[0]["loss"]
    assert Image.open(trained / "run-loss.png").size[0] > 400
    assert equal(weights(trained, "run-001.pt"), weights(trained))
    assert json.loads((trained / "run.json").read_text())["model"]["prefix_dim"] == 32


def test_old_spelling_and_frozen_language_model(store, language_model, tmp_path):
    train(
        store, language_model, tmp_path, "--only_prefix", "--mapping_type", "transformer", "--num_layres", 2,
        "--prefix_length", 6, "--prefix_length_clip", 5, "--normalize_prefix",
    )  # fmt: skip
    after = weights(tmp_path)
    from models.language import load_language_model

    for name, value in load_language_model(str(language_model)).state_dict().items():
        assert torch.equal(after[f"gpt.{name}"], value), name
    assert after["clip_project.prefix_const"].shape == (6, 16)
    assert "clip_project.transformer.layers.1.mlp.fc2.weight" in after


@pytest.mark.slow  # in a process of its own; the quick ones stop inside this one
def test_resume_is_exact(store, language_model, trained, tmp_path):
    """Stopped by a signal in the middle of an epoch and resumed: the same weights and log, bit for bit."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *train_command(store, language_model, tmp_path, "--save_steps", 1)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "run_state.pt").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode in (0, 130) and "Traceback" not in stderr, stderr
    if process.returncode == 130:
        assert "--resume" in stderr.strip().splitlines()[-1]
        torch.load(tmp_path / "run_latest.pt", weights_only=True)
    train(store, language_model, tmp_path, "--resume")
    assert equal(weights(tmp_path), weights(trained))
    losses = [[entry[key] for key in ("step", "epoch", "loss", "lr")] for entry in read_log(tmp_path)]
    assert losses == [[entry[key] for key in ("step", "epoch", "loss", "lr")] for entry in read_log(trained)]


def test_gradient_accumulation_is_one_large_batch(store, language_model, tmp_path):
    """Two batches of 4 weigh every caption token like one batch of 8."""
    import train as script
    from features.dataset import CaptionDataset
    from models.language import load_tokenizer
    from training.objectives import CrossEntropy
    from training.run import build_model, caption_config, training_config
    from training.trainer import Trainer

    args = script.get_parser().parse_args(["--data", str(store), "--language_model", str(language_model)])
    loaded = read_store(store)
    losses, results = [], []
    for split in ([range(8)], [range(4), range(4, 8)]):
        torch.manual_seed(0)
        model = build_model(caption_config(args, loaded)).eval()
        dataset = CaptionDataset(loaded, load_tokenizer(str(language_model)))
        trainer = Trainer(model, CrossEntropy(dataset), training_config(args), torch.device("cpu"))
        model.train = lambda mode=True, model=model: model  # no dropout: the two draw it differently
        losses.append(trainer.train_step([dataset.batch(list(rows)) for rows in split])[0])
        trainer.train_step([dataset.batch(list(rows)) for rows in split])
        results.append(model.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-5) for name in results[0])


@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_mixed_precision(store, language_model, tmp_path, precision):
    train(store, language_model, tmp_path, "--mixed_precision", precision)
    log = read_log(tmp_path)
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(value.dtype == torch.float32 for value in weights(tmp_path).values() if value.is_floating_point())


def test_an_earlier_run_is_moved_aside(store, language_model, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    done = train(store, language_model, tmp_path / "run", "--seed", 1)
    assert "run-previous" in done.stderr
    assert equal(weights(tmp_path / "run" / "run-previous"), weights(trained))
    assert not equal(weights(tmp_path / "run"), weights(trained))


def test_train_bad_input(store, language_model, trained, tmp_path):
    def fails(*more):
        return train(store, language_model, tmp_path / "out", *more, check=2)

    one_line_error(fails("--data", tmp_path / "none.pkl"), "none.pkl", "--data")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(print))
    one_line_error(fails("--data", tmp_path / "evil.pkl"), "could run code")
    one_line_error(fails("--is_rn"), "--is_rn")
    one_line_error(fails("--mapping_type", "mpl"), "mlp")
    one_line_error(fails("--bs", 0), "--bs")
    one_line_error(fails("--language_model", "gpt3"), "gpt3", "--language_model FOLDER")
    one_line_error(fails("--prefix_length", 64), "--prefix_length 64")
    one_line_error(fails("--init_from", trained / "run_latest.pt", "--prefix_length", 5), "--init_from")
    assert not (tmp_path / "out").exists()
    shutil.copytree(trained, tmp_path / "run")
    one_line_error(train(store, language_model, tmp_path / "run", "--resume", "--seed", 5, check=2), "--seed")
    assert equal(weights(tmp_path / "run"), weights(trained))


def test_diverging_loss_stops_with_the_last_checkpoint(store, language_model, tmp_path):
    done = train(store, language_model, tmp_path, "--lr", 1e30, "--warmup_steps", 0, check=2)
    one_line_error(done, "step", "--lr")


# ---- predict.py


def predict(*arguments, check=0):
    return run_script("predict.py", *arguments, check=check)


def test_predict_needs_the_checkpoint_only(trained, photos, tmp_path):
    """Also with the whole run moved elsewhere; records are COCO's; batches change nothing."""
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    out = tmp_path / "captions.json"
    done = predict(photos, "--checkpoint", moved / "run-001.pt", "--out", out, "--batch_size", 5)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [path for path, _ in lines] == [str(path) for path in sorted(photos.glob("*.jpg"))]
    records = json.loads(out.read_text())
    assert [record["image_id"] for record in records] == list(range(1, 13))
    assert [record["caption"] for record in records] == [caption.strip() for _, caption in lines]
    single = predict(photos / "COCO_val2014_000000000004.jpg", "--checkpoint", moved / "run-001.pt")
    assert single.stdout.splitlines() == [done.stdout.splitlines()[3]]


def test_predict_methods(trained, photos, tmp_path):
    image, checkpoint = photos / "COCO_val2014_000000000001.jpg", trained / "run_latest.pt"
    beams = predict(
        image, "--checkpoint", checkpoint, "--use_beam_search", "--num_captions", 3, "--out", tmp_path / "x"
    )
    assert len(beams.stdout.splitlines()) == 3
    assert len(json.loads((tmp_path / "x").read_text())[0]["captions"]) == 3
    sample = [predict(image, "--checkpoint", checkpoint, "--top_p", 0.9, "--temperature", 2, "--seed", 4).stdout
              for _ in range(2)]  # fmt: skip
    assert sample[0] == sample[1]


def test_predict_skips_unreadable_images(trained, photos, tmp_path):
    shutil.copy(photos / "COCO_val2014_000000000001.jpg", tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_text("no image")
    done = predict(tmp_path, "--checkpoint", trained / "run_latest.pt", "--out", tmp_path / "x.json", check=2)
    one_line_error(done, "1 of 2 images")
    assert "bad.jpg" in done.stderr
    assert [record["image_id"] for record in json.loads((tmp_path / "x.json").read_text())] == ["good"]


def test_predict_bad_input(trained, photos, clip_file, tmp_path):
    image, checkpoint = photos / "COCO_val2014_000000000001.jpg", trained / "run_latest.pt"
    one_line_error(predict("none.jpg", "--checkpoint", checkpoint, check=2), "none.jpg")
    one_line_error(predict(image, "--checkpoint", "cocoo", check=2), "did you mean coco?")
    one_line_error(predict(image, "--checkpoint", tmp_path / "none.pt", check=2), "none.pt")
    one_line_error(predict(image, "--checkpoint", checkpoint, "--use_beam_search", "--top_p", 0.9, check=2), "--top_p")
    one_line_error(predict(image, "--checkpoint", checkpoint, "--num_captions", 2, check=2), "--num_captions")
    one_line_error(predict(image, "--checkpoint", checkpoint, "--normalize_prefix", check=2), "--normalize_prefix")
    other = tmp_path / "other.pt"
    state = torch.load(clip_file, weights_only=True)
    torch.save(state | {"visual.proj": state["visual.proj"] * 2}, other)
    one_line_error(predict(image, "--checkpoint", checkpoint, "--clip_model_type", other, check=2), "contradicts")
    (tmp_path / "empty").mkdir()
    one_line_error(predict(tmp_path / "empty", "--checkpoint", checkpoint, check=2), "holds no images")


def test_named_weights_without_a_network(photos, tmp_path, monkeypatch):
    """The error says which file to put where."""
    monkeypatch.setenv("CLIPCAP_CACHE", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    done = run_script("predict.py", photos / "COCO_val2014_000000000001.jpg", check=2)
    one_line_error(done, "coco_weights.pt", "1IdaBtMSvtyzF0ByVaBHtvM0JYSXRExRX")
    assert not list(tmp_path.iterdir())


def test_predictor_class(trained, photos):
    predictor = Predictor()
    predictor.setup({"mine": str(trained / "run_latest.pt")}, device="cpu")
    image = str(photos / "COCO_val2014_000000000001.jpg")
    line = predict(image, "--checkpoint", trained / "run_latest.pt").stdout
    assert " ".join(predictor.predict(image).split()) == line.rstrip("\n").split("\t")[1].strip()
    assert isinstance(predictor.predict(image, "mine", use_beam_search=True), str)
    with pytest.raises(ValueError, match="mine"):
        predictor.predict(image, "other")


@pytest.mark.parametrize("script", ("parse_coco.py", "train.py", "predict.py"))
def test_help(script):
    assert run_process(script, "--help").stdout.startswith(f"usage: {script}")
    assert run_script(script, "--version").stdout.startswith(script)
