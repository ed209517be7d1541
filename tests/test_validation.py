"""train.py --val_data: evaluate.py's scores every epoch, the best weights kept, exact under --resume."""

import json

import pytest
import torch
from conftest import read_log, run_script, train
from PIL import Image
from test_scripts import equal, one_line_error, weights

from features.store import read_store, write_store
from training.validation import Validation

EPOCHS = 4


@pytest.fixture(scope="module")
def run(store, language_model, tmp_path_factory):
    """A captioner's folder, trained and scored on the same twelve images."""
    out = tmp_path_factory.mktemp("validated")
    train(store, language_model, out, "--val_data", store, "--epochs", EPOCHS)
    return out


def scores_of(folder):
    return [line for line in read_log(folder) if "validation" in line]


def without_rate(folder):
    return [{key: value for key, value in line.items() if key != "examples_per_s"} for line in read_log(folder)]


def test_best_is_the_epoch_of_the_highest_cider(run):
    scores = scores_of(run)
    assert [(line["step"], line["epoch"]) for line in scores] == [(6 * i, i - 1) for i in range(1, EPOCHS + 1)]
    cider = [line["validation"]["CIDEr"] for line in scores]
    best = cider.index(max(cider))
    assert equal(weights(run, "run_best.pt"), weights(run, f"run-{best:03d}.pt"))
    assert torch.load(run / "run_state.pt", weights_only=True)["best"] == max(cider) > 0
    assert Image.open(run / "run-loss.png").size[1] > 800  # a second panel


def test_scores_are_those_of_evaluate(run, photos, tmp_path):
    """predict.py on the images with the best weights, then evaluate.py."""
    captions, out = tmp_path / "captions.json", tmp_path / "scores.json"
    run_script("predict.py", photos, "--checkpoint", run / "run_best.pt", "--dtype", "fp32", "--out", captions)
    run_script(
        "evaluate.py", captions, photos / "captions.csv", "--tokenizer", "python", "--out", out,
        "--metrics", "Bleu", "ROUGE_L", "CIDEr",
    )  # fmt: skip
    expected = json.loads(out.read_text())
    best = max((line["validation"] for line in scores_of(run)), key=lambda scores: scores["CIDEr"])
    assert best == pytest.approx(expected["metrics"] | expected["statistics"])


def test_validation_changes_no_weight(store, language_model, run, tmp_path):
    train(store, language_model, tmp_path, "--epochs", EPOCHS)
    assert equal(weights(tmp_path), weights(run)) and not (tmp_path / "run_best.pt").exists()


@pytest.mark.parametrize("moment", ("before", "after"))
def test_stopped_while_validating(store, language_model, run, tmp_path, monkeypatch, moment):
    """Resumed, it ends with the same weights, log and best weights; the epoch is not trained again."""
    validate = Validation.run

    def stop_in_the_third_epoch(self, trainer, *arguments):
        if moment == "after" or trainer.epoch != 2:
            validate(self, trainer, *arguments)
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Validation, "run", stop_in_the_third_epoch)
    train(store, language_model, tmp_path, "--val_data", store, "--epochs", EPOCHS, check=130)
    monkeypatch.undo()
    done = train(store, language_model, tmp_path, "--val_data", store, "--epochs", EPOCHS, "--resume")
    assert "after step 18, epoch 2, batch 6" in done.stderr
    assert equal(weights(tmp_path), weights(run)) and equal(
        weights(tmp_path, "run_best.pt"), weights(run, "run_best.pt")
    )
    assert without_rate(tmp_path) == without_rate(run)


def test_a_finished_epoch_is_not_scored_again(store, language_model, run, tmp_path, monkeypatch):
    """Stopped after an epoch was saved: its line stays, and its CIDEr still counts."""
    monkeypatch.setattr(
        "training.loop.note", lambda line: (_ for _ in ()).throw(KeyboardInterrupt) if "done" in line else None
    )
    for _ in range(EPOCHS):
        train(store, language_model, tmp_path, "--val_data", store, "--epochs", EPOCHS, "--resume", check=130)
    assert without_rate(tmp_path) == without_rate(run)
    assert equal(weights(tmp_path, "run_best.pt"), weights(run, "run_best.pt"))


def test_other_validation_data_is_refused(store, language_model, run, tmp_path):
    loaded = read_store(store)
    one_line_error(train(store, language_model, run, "--resume", "--epochs", EPOCHS, check=2), "--val_data")
    for name, embedding, info in (
        ("wide.pkl", torch.zeros(12, 40), {}),
        ("other.pkl", loaded.clip_embedding, {"clip_sha256": "0" * 64}),
    ):
        write_store(tmp_path / name, embedding, loaded.captions, info)
        done = train(store, language_model, tmp_path / "out", "--val_data", tmp_path / name, check=2)
        one_line_error(done, name, "different encoders")
    one_line_error(train(store, language_model, tmp_path / "out", "--val_data", "none.pkl", check=2), "none.pkl")
    assert not (tmp_path / "out").exists()


def test_one_row_per_caption_and_collapse(store, language_model, tmp_path):
    """A predecessor's store counts an image once; captions that are all alike are warned of."""
    captions = [{"image_id": i // 2, "caption": f"a dog {i}", "clip_embedding": i} for i in range(60)]
    write_store(tmp_path / "old.pkl", torch.full((60, 32), 0.1), captions, {})
    assert len(Validation(read_store(tmp_path / "old.pkl"), read_store(store)).rows) == 30
    done = train(store, language_model, tmp_path, "--val_data", tmp_path / "old.pkl", "--epochs", 1)
    assert "only 3.3% of the captions are distinct" in done.stderr


def test_one_image_has_no_cider(store, language_model, tmp_path):
    """Training goes on to its end, and says that no weights can be called the best; captions without blanks too."""
    captions = [{"image_id": 1, "caption": "一只狗在沙滩上跑", "clip_embedding": 0}]
    write_store(tmp_path / "one.pkl", torch.full((1, 32), 0.1), captions, {})
    done = train(store, language_model, tmp_path / "out", "--val_data", tmp_path / "one.pkl", "--epochs", 2)
    assert "one.pkl has one image, on which CIDEr is not defined; no best weights are chosen" in done.stderr
    assert "1 of 1 references hold no blanks between words (Chinese?)" in done.stderr
    assert [line["validation"]["CIDEr"] for line in scores_of(tmp_path / "out")] == [None, None]
    assert not (tmp_path / "out" / "run_best.pt").exists() and (tmp_path / "out" / "run-loss.png").exists()
    train(store, language_model, tmp_path / "out", "--val_data", tmp_path / "one.pkl", "--epochs", 2, "--resume")


def test_validation_data_of_shards(store, photos, clip_file, language_model, run, tmp_path):
    """A folder of shards, whose rows are float16, is scored like the pickle."""
    run_script(
        "parse_coco.py", "--clip_model_type", clip_file, "--annotations", photos / "captions.csv", "--images", photos,
        "--out", f"{tmp_path}/val/", "--num_workers", 0,
    )  # fmt: skip
    train(store, language_model, tmp_path / "run", "--val_data", tmp_path / "val", "--epochs", 1)
    scores = scores_of(tmp_path / "run")[0]["validation"]
    assert scores.keys() == scores_of(run)[0]["validation"].keys() and scores["Bleu_1"] > 0
    assert len(Validation(read_store(tmp_path / "val"), read_store(store)).rows) == 12
