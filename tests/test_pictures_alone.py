"""Stores of pictures without captions."""

import json
import pickle
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_script, train
from PIL import Image
from test_scripts import one_line_error

from encoders.base import ImageEncoder
from features import store_files
from features.store import read_store

OUTPUTS = pytest.mark.parametrize("name", ("x.pkl", "x/"))


@pytest.fixture
def parse(clip_file, monkeypatch):
    """A function that makes such a store, in shards of four pictures."""
    monkeypatch.setattr(store_files, "MIN_ROWS", 4)
    monkeypatch.setattr(store_files, "SHARDS", 3)

    def run(out, *images, more=(), check=0):
        return run_script(
            "parse_coco.py", "--clip_model_type", clip_file, "--no_captions", "--images", *images, "--out", out,
            "--num_workers", 0, "--batch_size", 2, *more, check=check,
        )  # fmt: skip

    return run


def rows_of(out):
    store = read_store(str(out))
    assert len(store.captions) == 0
    return store.clip_embedding[range(len(store.clip_embedding))].float()


def names_of(out):
    """Return what a store says of each row, (image_id, file)."""
    if str(out).endswith("/"):
        tables = [pq.read_table(file).to_pylist() for file in sorted((out / "metadata").glob("*.parquet"))]
        return [(row["image_id"], row["image_path"]) for table in tables for row in table]
    with open(out, "rb") as file:
        return [(row["image_id"], row["file_name"]) for row in pickle.load(file)["images"]]


def test_pickle_and_shards(parse, photos, store, tmp_path):
    done = parse(tmp_path / "x.pkl", photos)
    assert "12 images, 0 captions" in done.stderr
    with open(tmp_path / "x.pkl", "rb") as file:
        value = pickle.load(file)
    assert value["captions"] == [] and value["clip_embedding"].shape == (12, 32)
    assert torch.allclose(rows_of(tmp_path / "x.pkl"), read_store(store).clip_embedding, atol=1e-5)
    assert names_of(tmp_path / "x.pkl")[0] == (1, str(photos / "COCO_val2014_000000000001.jpg"))
    info = json.loads((tmp_path / "x.json").read_text())
    assert (info["images"], info["captions"], info["modality"], info["annotations"]) == (12, 0, "image", None)
    assert "nothing to do" in parse(tmp_path / "x.pkl", photos).stderr

    parse(f"{tmp_path}/y/", f"{photos}/*.jpg")
    assert torch.allclose(rows_of(f"{tmp_path}/y/"), rows_of(tmp_path / "x.pkl"), atol=2e-3)
    tables = [pq.read_table(file) for file in sorted((tmp_path / "y/metadata").glob("*.parquet"))]
    assert [table.column_names for table in tables] == [["image_path", "image_id"]] * 3
    assert tables[2]["image_id"].to_pylist() == [9, 10, 11, 12]
    assert read_store(f"{tmp_path}/y/").fingerprint() != read_store(tmp_path / "x.pkl").fingerprint()


@OUTPUTS
def test_unreadable_ones_are_listed(parse, photos, tmp_path, name):
    folder = tmp_path / "p"
    shutil.copytree(photos, folder)
    (folder / "COCO_val2014_000000000003.jpg").write_bytes(b"no image")
    out = f"{tmp_path}/{name}"
    assert "1 images skipped" in parse(out, folder).stderr
    skipped = json.loads((tmp_path / "x.json").read_text())["skipped"]
    assert list(skipped) == [str(folder / "COCO_val2014_000000000003.jpg")] and len(rows_of(out)) == 11
    one_line_error(parse(f"{tmp_path}/z.pkl", folder, more=["--strict"], check=2), "000003.jpg", "leave out --strict")
    bad = folder / "COCO_val2014_000000000003.jpg"
    one_line_error(parse(f"{tmp_path}/z{name[1:]}", bad, check=2), "no images left")


@OUTPUTS
def test_it_goes_on_after_a_stop(parse, photos, tmp_path, monkeypatch, name):
    calls, encode = [], ImageEncoder.encode_images

    def counting(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 4:
            raise OSError("stopped")
        return encode(self, pixels)

    monkeypatch.setattr(ImageEncoder, "encode_images", counting)
    out = f"{tmp_path}/{name}"
    parse(out, photos, check=2)
    parse(out, photos)
    assert sum(calls) == 12 + calls[3]
    monkeypatch.undo()
    parse(f"{tmp_path}/whole.pkl", photos)
    assert torch.allclose(rows_of(out), rows_of(f"{tmp_path}/whole.pkl"), atol=2e-3)


def test_same_names_in_two_folders(parse, tmp_path):
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        for name in ("7.jpg", f"{folder}.jpg"):
            Image.new("RGB", (40, 40), (80 * number, 9, 9)).save(tmp_path / folder / name)
    parse(tmp_path / "x.pkl", tmp_path / "a", tmp_path / "b")
    assert [i for i, _ in names_of(tmp_path / "x.pkl")] == [
        str(tmp_path / "a/7.jpg"), "a", str(tmp_path / "b/7.jpg"), "b",
    ]  # fmt: skip


@OUTPUTS
def test_it_trains_nothing_here(parse, photos, store, language_model, tmp_path, name):
    out = f"{tmp_path}/{name}"
    parse(out, photos)
    refused = train(out, language_model, tmp_path / "run", check=2)
    one_line_error(refused, "--data", "without captions", "train_scst.py --reward clip")
    refused = train(store, language_model, tmp_path / "run", "--val_data", out, check=2)
    one_line_error(refused, "--val_data", "without captions")
    assert not (tmp_path / "run").exists()


def test_contradictions(parse, photos, tmp_path):
    for flags in (["--annotations", photos / "captions.csv"], ["--check"]):
        one_line_error(parse(tmp_path / "x.pkl", photos, more=flags, check=2), "--no_captions", flags[0])
    one_line_error(parse(tmp_path / "x.pkl", tmp_path / "none", check=2), "none is no image file, folder or glob")
    (tmp_path / "empty").mkdir()
    one_line_error(parse(tmp_path / "x.pkl", tmp_path / "empty", check=2), "holds no images")


def test_a_pickle_without_captions_must_name_its_pictures(tmp_path):
    for images in ({}, {"images": []}):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"clip_embedding": torch.ones(2, 8), "captions": []} | images))
        with pytest.raises(ValueError, match="no captions"):
            read_store(tmp_path / "x.pkl")
