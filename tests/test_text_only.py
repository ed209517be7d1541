"""Text-only training: texts where images lie, noise by angle, what is refused."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import captions_of, run_process, run_script, train
from test_scripts import equal, one_line_error, weights
from torch.nn import functional as F

import training.text_only
from features.store import write_store
from features.text_only import AngleNoise, MatchedTexts

WIDTH = 32


def angles(a, b):
    return torch.rad2deg(torch.acos((a * b).sum(1).clamp(-1, 1)))


@pytest.fixture(scope="module")
def texts(clip_file, tmp_path_factory):
    """A store of 24 captions."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("\n".join(captions_of(24)))
    run_script(
        "parse_coco.py", "--clip_model_type", clip_file, "--text_only", "--annotations", folder / "a.txt",
        "--out", folder / "texts.pkl", "--device", "cpu",
    )  # fmt: skip
    return folder / "texts.pkl"


@pytest.fixture
def images(store, tmp_path):
    """A store of 40 pictures of the same encoder, made of noise."""
    info = json.loads(store.with_suffix(".json").read_text())
    rows = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1)) + 2
    write_store(tmp_path / "images.pkl", rows, [], info, [{"image_id": n} for n in range(40)])
    return tmp_path / "images.pkl"


def pairs(number=400, signal=12, width=WIDTH, angle=25.0):
    """Return texts that differ in a few directions, and images that are these, moved, scaled and turned."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    texts = F.normalize(draw(number, signal) @ draw(signal, width) * 0.3 + draw(width), dim=1)
    there = (texts - texts.mean(0)) @ (torch.eye(width) + 0.1 * draw(width, width)) * 0.7 + F.normalize(
        draw(width), dim=0
    )
    return texts, AngleNoise(angle, 9)(F.normalize(there, dim=1), torch.arange(number).numpy(), 0)


def test_texts_are_moved_to_their_images():
    texts, images = pairs()
    moved = MatchedTexts(texts, images[:200])
    rows = moved[range(400)]
    assert torch.allclose(rows.norm(dim=1), torch.ones(400), atol=1e-5)
    assert torch.allclose(moved[[3, 4]], rows[3:5], atol=1e-6) and len(moved) == 400 and moved.shape == (400, WIDTH)
    apart = angles(rows, images)[200:].median()  # whose images it has not seen
    assert apart < 32 < angles(texts, images)[200:].median() and abs(moved.angle - apart) < 4
    drawn = AngleNoise(moved.angle, 0, moved.directions)(rows, torch.arange(400).numpy(), 0)
    assert torch.allclose(drawn.mean(0), images.mean(0), atol=0.1)
    assert torch.allclose(drawn.std(0), images.std(0), atol=0.06)


def test_texts_that_cannot_be_moved_stay_numbers():
    images = torch.randn(40, WIDTH)
    assert torch.allclose(MatchedTexts(images)[range(40)], F.normalize(images, dim=1))
    for texts in (torch.ones(3, WIDTH), torch.ones(1, WIDTH), images[:2]):
        moved = MatchedTexts(texts, images)
        assert torch.isfinite(moved[list(range(len(texts)))]).all() and torch.isfinite(moved.directions).all()


def test_each_draw_is_turned_by_the_angle():
    rows = F.normalize(torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    numbers, noise = torch.arange(6).numpy(), AngleNoise(40, seed=3)
    turned = noise(rows, numbers, epoch=1)
    assert torch.allclose(angles(rows, turned), torch.full((6,), 40.0), atol=0.01)
    assert torch.allclose(turned.norm(dim=1), torch.ones(6), atol=1e-5)
    # by seed, epoch and number alone, whatever else is in the batch
    assert torch.equal(noise(rows[[4, 2]], numbers[[4, 2]], epoch=1), turned[[4, 2]])
    for other in (AngleNoise(40, 4)(rows, numbers, 1), noise(rows, numbers, 2), noise(rows, numbers[::-1].copy(), 1)):
        assert (angles(other, turned) > 5).any()


def test_it_trains_and_captions_images(texts, images, photos, language_model, clip_file, tmp_path):
    flags = ("--noise_angle", "auto", "--match", images)
    done = train(texts, language_model, tmp_path / "run", *flags)
    said = json.loads((tmp_path / "run/run.json").read_text())
    assert said["model"]["normalize_prefix"] and said["training"]["match"] == str(images)
    assert f"--noise_angle auto: {said['training']['noise_angle']} degrees, from 40 images" in done.stderr
    assert said["contents"].keys() == {"data", "match"} and said["data"]["modality"] == "text"
    told = run_script("predict.py", photos, "--checkpoint", tmp_path / "run/run_latest.pt", "--device", "cpu")
    assert told.stdout.count("\t") == 12

    degrees = str(said["training"]["noise_angle"])
    train(texts, language_model, tmp_path / "same", "--noise_angle", degrees, "--match", images)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "same"))
    train(texts, language_model, tmp_path / "other", "--noise_angle", "10", "--match", images)
    assert not equal(weights(tmp_path / "run"), weights(tmp_path / "other"))


def test_validation_is_of_images(texts, images, store, language_model, tmp_path):
    flags = ("--noise_angle", "30", "--match", images)
    done = train(texts, language_model, tmp_path / "run", *flags, "--val_data", store)
    assert "epoch 1 validation: CIDEr" in done.stderr and (tmp_path / "run/run_best.pt").is_file()
    refused = train(texts, language_model, tmp_path / "no", *flags, "--val_data", texts, check=2)
    one_line_error(refused, "--val_data", "holds texts")


def test_resumed_it_draws_the_same_noise(texts, images, language_model, tmp_path, monkeypatch):
    flags = ("--noise_angle", "auto", "--match", images, "--save_steps", 4)
    train(texts, language_model, tmp_path / "whole", *flags)
    step = training.trainer.Trainer.train_step

    def failing(self, batches):
        if self.step == 9:
            raise OSError("stopped")
        return step(self, batches)

    monkeypatch.setattr(training.trainer.Trainer, "train_step", failing)
    train(texts, language_model, tmp_path / "run", *flags, check=2)
    monkeypatch.undo()
    train(texts, language_model, tmp_path / "run", *flags, "--resume")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    other = ("--noise_angle", "20", "--match", images, "--resume")
    one_line_error(train(texts, language_model, tmp_path / "run", *other, check=2), "--noise_angle", "not 20.0")
    value = pickle.loads(images.read_bytes())
    images.write_bytes(pickle.dumps(value | {"clip_embedding": value["clip_embedding"].flip(1)}))
    again = ("--noise_angle", str(json.loads((tmp_path / "run/run.json").read_text())["training"]["noise_angle"]))
    one_line_error(
        train(texts, language_model, tmp_path / "run", *again, "--match", images, "--resume", check=2),
        "--match", "does not hold what the run was begun with",
    )  # fmt: skip


def test_pairs_after_texts(texts, images, store, language_model, tmp_path):
    train(texts, language_model, tmp_path / "run", "--noise_angle", "30", "--match", images)
    flags = ("--init_from", tmp_path / "run/run_latest.pt")
    refused = train(store, language_model, tmp_path / "pairs", *flags, check=2)
    one_line_error(refused, "--init_from", "--normalize_prefix")
    train(store, language_model, tmp_path / "pairs", *flags, "--normalize_prefix")


@pytest.mark.slow
def test_two_processes_draw_the_same_noise(texts, images, language_model, tmp_path):
    flags = ("--noise_angle", "40", "--match", images, "--only_prefix")
    train(texts, language_model, tmp_path / "one", *flags)
    words = [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", "--data", texts,
        "--language_model", language_model, "--out_dir", tmp_path / "two", "--prefix", "run", "--epochs", 2, "--bs", 4,
        "--lr", 1e-2, "--warmup_steps", 2, "--device", "cpu", *flags,
    ]  # fmt: skip
    run_process(*words)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[key].float(), two[key].float(), atol=1e-4) for key in one)


def test_what_does_not_fit_is_refused(texts, images, store, language_model, tmp_path):
    def refused(data, *flags, said):
        one_line_error(train(data, language_model, tmp_path / "run", *flags, check=2), *said)

    rows, info = torch.randn(40, WIDTH), json.loads(store.with_suffix(".json").read_text())
    write_store(tmp_path / "other.pkl", rows, [], info | {"clip_sha256": "0" * 64}, [{}] * 40)
    write_store(tmp_path / "few.pkl", rows[:10], [], info, [{}] * 10)
    refused(texts, said=("holds texts", "--noise_angle auto --match"))
    refused(store, "--noise_angle", "30", said=("--noise_angle is for texts", "--data"))
    refused(texts, "--noise_angle", "auto", said=("--noise_angle auto", "--match"))
    refused(texts, "--match", images, said=("--match", "--noise_angle auto"))
    refused(texts, "--noise_angle", "auto", "--match", texts, said=("--match", "holds texts"))
    refused(texts, "--noise_angle", "auto", "--match", tmp_path / "few.pkl", said=("--match", "10 images"))
    refused(texts, "--noise_angle", "auto", "--match", tmp_path / "other.pkl", said=("--match", "different encoders"))
    refused(texts, "--noise_angle", "auto", "--match", tmp_path / "none.pkl", said=("none.pkl does not exist",))
    for angle in ("0", "90", "-5", "nan", "Auto"):
        refused(texts, f"--noise_angle={angle}", said=("--noise_angle", "between 0 and 90"))
    assert not (tmp_path / "run").exists()


def test_a_store_that_does_not_say_is_taken_for_texts_with_a_word(texts, language_model, tmp_path):
    bare = tmp_path / "bare.pkl"
    shutil.copy(texts, bare)
    done = train(bare, language_model, tmp_path / "run", "--noise_angle", 30, "--epochs", 1)
    assert f"no json beside --data {bare} says what its rows are" in done.stderr
