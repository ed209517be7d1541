"""Stores of captions alone, embedded by the text tower."""

import gzip
import json
import pickle

import pyarrow.parquet as pq
import pytest
import torch
from conftest import EMBED_DIM, captions_of, run_script
from test_scripts import one_line_error

from encoders import load_encoder
from encoders.openai_clip import OpenAIClip
from features import store_files
from features.store import read_store

OUTPUTS = pytest.mark.parametrize("name", ("x.pkl", "x/"))


@pytest.fixture
def parse(clip_file, monkeypatch):
    """A function that makes such a store, in shards of four captions."""
    monkeypatch.setattr(store_files, "MIN_ROWS", 4)
    monkeypatch.setattr(store_files, "SHARDS", 3)

    def run(out, annotations, *more, check=0):
        return run_script(
            "parse_coco.py", "--clip_model_type", clip_file, "--text_only", "--annotations", annotations, "--out", out,
            "--batch_size", 4, "--device", "cpu", *more, check=check,
        )  # fmt: skip

    return run


def contents(out):
    """Return (rows, captions) of a store."""
    store = read_store(str(out))
    assert store.is_of_texts
    return store.clip_embedding[range(len(store.clip_embedding))].float(), [
        store.captions[i] for i in range(len(store.captions))
    ]


def write_texts(path, number=10):
    texts = captions_of(number)
    path.write_text("\n".join(texts) + "\n\n")
    return texts


@OUTPUTS
def test_rows_are_those_of_the_text_tower(parse, photos, clip_file, tmp_path, name):
    done = parse(f"{tmp_path}/{name}", photos / "captions.csv")
    assert "24 captions, 0 records skipped" in done.stderr
    rows, captions = contents(f"{tmp_path}/{name}")
    expected = load_encoder(clip_file).encode_texts([record["caption"] for record in captions])
    assert torch.allclose(rows, expected, atol=2e-3)
    assert [record["clip_embedding"] for record in captions] == list(range(24))
    assert [record["image_id"] for record in captions[:4]] == [1, 1, 2, 2]
    info = json.loads((tmp_path / "x.json").read_text())
    assert (info["modality"], info["images"], info["captions"], info["normalized"]) == ("text", 0, 24, False)


@OUTPUTS
def test_a_text_file_of_sentences(parse, tmp_path, name):
    texts = write_texts(tmp_path / "a.txt")
    parse(f"{tmp_path}/{name}", tmp_path / "a.txt")
    _, captions = contents(f"{tmp_path}/{name}")
    assert [record["caption"] for record in captions] == texts
    if name.endswith("/"):
        files = sorted((tmp_path / "x/metadata").glob("*.parquet"))
        assert [pq.read_table(f).column_names for f in files] == [["caption", "captions"]] * 3
        assert [record["image_id"] for record in captions] == list(range(10))
    else:
        assert "image_id" not in captions[0]
        with open(tmp_path / name, "rb") as file:
            assert pickle.load(file).keys() == {"clip_embedding", "captions"}  # as the predecessors' train.py reads it


def test_text_files_of_other_kinds(parse, tmp_path):
    texts = captions_of(3)
    (tmp_path / "flickr.txt").write_text("".join(f"{n}.jpg#0\t{text}\n" for n, text in enumerate(texts)))
    (tmp_path / "table.txt").write_text("image,caption\n" + "".join(f"{n}.jpg,{t}\n" for n, t in enumerate(texts)))
    (tmp_path / "lines.txt").write_text("".join(json.dumps({"image_id": 1, "caption": t}) + "\n" for t in texts))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\r\n".join(texts).encode("utf-16")))
    for name in ("flickr.txt", "table.txt", "lines.txt", "a.txt.gz"):
        parse(tmp_path / "x.pkl", tmp_path / name)
        assert [record["caption"] for record in contents(tmp_path / "x.pkl")[1]] == texts
    for name, text in (
        ("tabs.txt", "1.jpg\ta star\n"), ("names.txt", "1.jpg a star\n"), ("numbers.txt", "7,a star\n8,a ring\n"),
        ("list.csv", "a star\na ring\n"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        one_line_error(parse(tmp_path / "y.pkl", tmp_path / name, check=2), name, "it needs image and caption")
    (tmp_path / "latin.txt").write_bytes("a star\na caf\u00e9\n".encode("latin-1"))
    parse(tmp_path / "x.pkl", tmp_path / "latin.txt")
    assert "line 2" in json.loads((tmp_path / "x.json").read_text())["skipped"]
    one_line_error(parse(tmp_path / "y.pkl", tmp_path / "latin.txt", "--strict", check=2), "line 2", "0xe9")


@OUTPUTS
def test_it_goes_on_after_a_stop(parse, tmp_path, monkeypatch, name):
    write_texts(tmp_path / "a.txt")
    calls, encode = [], OpenAIClip.encode_texts

    def counting(self, texts):
        calls.append(len(texts))
        if len(calls) == 2:
            raise OSError("stopped")
        return encode(self, texts)

    monkeypatch.setattr(OpenAIClip, "encode_texts", counting)
    out = f"{tmp_path}/{name}"
    parse(out, tmp_path / "a.txt", check=2)
    parse(out, tmp_path / "a.txt")
    assert sum(calls) == 10 + calls[1]
    before = len(calls)
    done = parse(out, tmp_path / "a.txt")
    assert len(calls) == before and ("nothing to do" in done.stderr or name == "x/")


def test_long_captions_are_cut_and_counted(parse, tmp_path):
    words = "star " * 75
    (tmp_path / "a.txt").write_text(f"a ring\n{words}\nred {words}\n{words} of the night\n")
    assert "warning: 2 of 4 captions are longer" in parse(tmp_path / "x.pkl", tmp_path / "a.txt").stderr
    assert json.loads((tmp_path / "x.json").read_text())["texts_cut"] == 2


def test_contradictions(parse, photos, tmp_path, monkeypatch):
    write_texts(tmp_path / "a.txt")
    for flags in (["--images", photos], ["--check"]):
        one_line_error(parse(tmp_path / "x.pkl", tmp_path / "a.txt", *flags, check=2), "--text_only", flags[0])
    one_line_error(parse(tmp_path / "x.pkl", tmp_path / "a.txt", "--no_captions", check=2), "--no_captions")
    with monkeypatch.context() as patch:
        patch.setattr(OpenAIClip, "has_texts", False)
        one_line_error(parse(tmp_path / "x.pkl", tmp_path / "a.txt", check=2), "has no text tower")
    (tmp_path / "empty.json").write_text('[{"image_id": 1, "caption": " "}]')
    one_line_error(parse(tmp_path / "x.pkl", tmp_path / "empty.json", check=2), "all are empty")
    assert not (tmp_path / "x.pkl").exists()


def test_no_texts_have_no_embeddings(clip_file):
    assert load_encoder(clip_file).encode_texts([]).shape == (0, EMBED_DIM)
