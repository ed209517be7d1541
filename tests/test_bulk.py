"""Captions at scale: parquet files per tar, shard or chunk, whole or not there, gone on with, never mixed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, run_script
from test_distributed import launch
from test_scripts import one_line_error
from test_tars import faulty, folder, sample, samples, words, write_tar  # noqa: F401, fixtures

from features import store_files
from models import bulk


@pytest.fixture
def predict(trained):
    """A function that runs predict.py with the small captioner, batches of two."""

    def run(*arguments, check=0):
        flags = ("--checkpoint", trained / "run_latest.pt", "--num_workers", 0, "--batch_size", 2)
        return run_script("predict.py", *flags, *arguments, check=check)

    return run


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.parquet"))}


def rows(out):
    """Return [{key, caption, logprob, error}] of all files."""
    return [row for path in sorted(out.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def captions_of_folder(predict, photos):  # noqa: F811
    return [line.split("\t")[1] for line in predict(photos).stdout.splitlines()]


# ---- tars


def test_a_file_per_tar(predict, folder, photos, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    done = predict(f"{folder}/{{00000..00001}}.tar", "--out", f"{out}/")
    assert not done.stdout and f"{out}/: 2 files, 8 captions" in done.stderr
    predict(folder, "--out", out)
    assert sorted(contents(out)) == ["00000.parquet", "00001.parquet", "00002.parquet"]
    found = rows(out)
    assert [row["key"] for row in found] == [f"{n // 4:05d}{n % 4:04d}" for n in range(12)]
    assert [" ".join(row["caption"].split()) for row in found] == captions_of_folder(predict, photos)
    assert all(row["error"] is None and row["logprob"] < 0 for row in found)
    made = json.loads((out / "_made_by.json").read_text())["made_by"]
    assert set(made) == {"files", "names", "settings", "decoding"}
    assert pq.read_table(out).num_rows == 12  # readers of folders pass over the json


def test_without_a_folder_tars_are_pictures_like_others(predict, folder, photos, tmp_path):  # noqa: F811
    done = predict(folder, "--out", tmp_path / "c.json")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [caption for _, caption in lines] == captions_of_folder(predict, photos)
    assert lines[0][0] == f"{folder}/00000.tar/000000000.jpg"
    assert [row["image_id"] for row in json.loads((tmp_path / "c.json").read_text())][:5] == [0, 1, 2, 3, 10000]


def test_finished_files_stay(predict, folder, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    predict(folder, "--out", f"{out}/")
    whole, times = contents(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    (out / "00001.parquet").unlink()
    assert "going on: 2 of 3 files are there" in predict(folder, "--out", out).stderr
    changed = [path.name for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == ["00001.parquet"] and contents(out) == whole


def test_a_tar_that_has_changed_is_captioned_again(predict, folder, samples, tmp_path):  # noqa: F811
    tars, out = tmp_path / "t", tmp_path / "out"
    shutil.copytree(folder, tars)
    predict(tars, "--out", f"{out}/")
    write_tar(tars / "00001.tar", [m for n in (7, 6) for m in sample(n, *samples[n])])
    predict(tars, "--out", f"{out}/")
    assert [row["key"] for row in rows(out)][4:6] == ["000010003", "000010002"] and len(rows(out)) == 10


def test_errors_have_rows_and_are_told_again(predict, samples, tmp_path):  # noqa: F811
    (tmp_path / "t").mkdir()
    expected, out = faulty(tmp_path / "t", samples), tmp_path / "out"
    captions = ("000000010.jpg", "000000023.jpg", "000000024.jpg")  # which captioning needs none of
    for _ in range(2):
        done = predict(tmp_path / "t", "--out", f"{out}/", check=2)
        one_line_error(done, f"{len(expected) - 3} of {18 + len(expected) - 3} images could not be read; the others")
    errors = {row["key"]: row["error"] for row in rows(out) if row["error"]}
    assert len(errors) == len(expected) - 3 and not any(row["caption"] for row in rows(out) if row["error"])
    for name in ("000000020", "000000021", "000000022"):
        assert expected[f"{name}.jpg"] in errors[name]
    assert sum(row["error"] is None for row in rows(out)) == 15 + len(captions)
    done = predict(tmp_path / "t", "--out", f"{out}/", "--max_pixels", 1000, check=2)
    assert rows(out)[0]["caption"]  # what could be read once is not lost to another limit


def test_captioners_are_never_mixed(predict, folder, trained, samples, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    predict(folder, "--out", f"{out}/")
    before = contents(out)
    one_line_error(predict(folder, "--out", out, "--use_beam_search", check=2), "another way of decoding (method)")
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    state = torch.load(other / "run_latest.pt")
    torch.save({key: value * 1.01 for key, value in state.items()}, other / "run_latest.pt")
    done = run_script("predict.py", folder, "--out", out, "--checkpoint", other / "run_latest.pt", check=2)
    one_line_error(done, "captions of another captioner")
    write_tar(tmp_path / "00000.tar", sample(0, *samples[0]))
    one_line_error(predict(tmp_path / "00000.tar", "--out", out, check=2), "holds captions of", "00000.tar")
    assert contents(out) == before
    (out / "00000.parquet").write_bytes(b"PAR1")
    one_line_error(predict(folder, "--out", out, check=2), "00000.parquet is damaged or not of predict.py")
    (tmp_path / "foreign").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign" / "a.parquet")
    one_line_error(predict(folder, "--out", tmp_path / "foreign", check=2), "not of predict.py")


def test_contradictions(predict, folder, photos, store, tmp_path):  # noqa: F811
    one_line_error(predict("--out", f"{tmp_path}/o/", check=2), "name images, or a store")
    one_line_error(predict(photos, "--data", store, "--out", f"{tmp_path}/o/", check=2), "not both")
    one_line_error(predict("--data", store, "--out", tmp_path / "o.json", check=2), "--data needs --out DIR/")
    one_line_error(predict(folder, photos, "--out", f"{tmp_path}/o/", check=2), "names no tar, as the other inputs do")
    assert not (tmp_path / "o").exists()


# ---- folders and stores


def test_folders_in_chunks(predict, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(store_files, "MIN_ROWS", 4)
    monkeypatch.setattr(store_files, "SHARDS", 3)
    out = tmp_path / "out"
    predict(photos, "--out", f"{out}/")
    assert sorted(contents(out)) == [f"captions_{n:04d}.parquet" for n in range(3)]
    assert [" ".join(row["caption"].split()) for row in rows(out)] == captions_of_folder(predict, photos)
    assert rows(out)[0]["key"] == str(photos / "COCO_val2014_000000000001.jpg")
    other = shutil.copytree(photos, tmp_path / "other")
    one_line_error(predict(other, "--out", out, check=2), "holds captions of")


@pytest.mark.parametrize("name", ("s.pkl", "s/", "alone.pkl"))
def test_stored_embeddings(predict, folder, photos, clip_file, tmp_path, monkeypatch, name):  # noqa: F811
    """The same captions as of the pictures, an id for a key, and the encoder is not loaded."""
    store, out = f"{tmp_path}/{name}", tmp_path / "out"
    run_script(*words(clip_file, folder, store), *["--no_captions"] * name.startswith("alone"))
    with monkeypatch.context() as patch:
        patch.setattr("models.captioner.load_encoder", lambda *_: pytest.fail("the encoder was loaded"))
        predict("--data", store, "--out", f"{out}/")
    assert len(contents(out)) == (3 if name == "s/" else 1)
    assert [" ".join(row["caption"].split()) for row in rows(out)] == captions_of_folder(predict, photos)
    assert [row["key"] for row in rows(out)] == [str(10000 * (n // 4) + n % 4) for n in range(12)]


def test_rows_of_one_image_all_have_captions(predict, store, tmp_path):
    """A predecessor's store has a row per caption."""
    from features.store import read_store, write_store

    old = read_store(store)
    rows_of = torch.tensor([record["clip_embedding"] for record in old.captions])
    captions = [record | {"clip_embedding": row} for row, record in enumerate(old.captions)]
    write_store(tmp_path / "old.pkl", old.clip_embedding[rows_of], captions, old.info)
    predict("--data", tmp_path / "old.pkl", "--out", f"{tmp_path}/out/")
    found = rows(tmp_path / "out")
    assert len(found) == 24 and [row["key"] for row in found[:4]] == ["1", "1", "2", "2"]


def test_stores_of_another_encoder(predict, tmp_path):
    from features.store import write_store

    captions = [{"image_id": 1, "caption": "a star", "clip_embedding": 0}]
    write_store(tmp_path / "s.pkl", torch.randn(1, 16), captions, {})
    one_line_error(predict("--data", tmp_path / "s.pkl", "--out", f"{tmp_path}/out/", check=2), "16 wide", "32 wide")
    write_store(tmp_path / "s.pkl", torch.randn(1, 32), captions, {"clip_sha256": "f" * 64})
    one_line_error(predict("--data", tmp_path / "s.pkl", "--out", f"{tmp_path}/out/", check=2), "different encoders")
    write_store(tmp_path / "s.pkl", torch.randn(1, 32), captions, {"modality": "text"})
    one_line_error(predict("--data", tmp_path / "s.pkl", "--out", f"{tmp_path}/out/", check=2), "embeddings of texts")


def test_batches_are_halved(predict, store, tmp_path, monkeypatch):
    """Where memory runs out, and the captions are the same."""
    from models.captioner import Captioner

    predict("--data", store, "--out", f"{tmp_path}/one/")
    plain, sizes = Captioner.caption_embeddings, []

    def limited(self, embeddings, *more):
        sizes.append(len(embeddings))
        if len(embeddings) > 3:
            raise torch.OutOfMemoryError
        return plain(self, embeddings, *more)

    monkeypatch.setattr(Captioner, "caption_embeddings", limited)
    done = predict("--data", store, "--out", f"{tmp_path}/two/", "--batch_size", 12)
    assert sizes == [12, 6, 3, 3, 3, 3]
    assert [row["caption"] for row in rows(tmp_path / "two")] == [row["caption"] for row in rows(tmp_path / "one")]
    assert "12 captions do not fit in memory; going on with 6 at a time" in done.stderr


# ---- several processes, kills


def predict_words(trained, *arguments):
    return [str(word) for word in (
        "predict.py", *arguments, "--checkpoint", trained / "run_latest.pt", "--num_workers", 0, "--batch_size", 2,
    )]  # fmt: skip


def test_processes_share_the_tars_out(predict, trained, folder, tmp_path):  # noqa: F811
    predict(folder, "--out", f"{tmp_path}/one/")
    errors = launch(2, tmp_path / "streams", predict_words(trained, folder, "--out", f"{tmp_path}/two/"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert "3 files, 12 captions" in errors[0] and not errors[1]
    errors = launch(2, tmp_path / "streams", predict_words(trained, folder), check=2)
    assert "start one, or name a folder" in errors[0] and not errors[1]


def test_a_second_run_is_refused(predict, folder, tmp_path):  # noqa: F811
    from utils.outputs import lock

    with lock(tmp_path / "out"):
        one_line_error(predict(folder, "--out", f"{tmp_path}/out/", check=2), "another run is writing")


def test_ctrl_c(predict, folder, tmp_path, monkeypatch):  # noqa: F811
    plain, written = bulk.CaptionFolder.write, []

    def stopping(self, *arguments):
        if written:
            os.kill(os.getpid(), signal.SIGINT)
        written.append(plain(self, *arguments))
        return written[-1]

    with monkeypatch.context() as patch:
        patch.setattr(bulk.CaptionFolder, "write", stopping)
        done = predict(folder, "--out", f"{tmp_path}/out/", check=130)
    assert done.stderr.splitlines()[-1].endswith("the same command goes on from here")
    assert len(contents(tmp_path / "out")) == 1
    predict(folder, "--out", f"{tmp_path}/out/")
    predict(folder, "--out", f"{tmp_path}/whole/")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def many(samples, tmp_path_factory):  # noqa: F811
    """Twelve tars of forty pictures, a few of them bad."""
    tars = tmp_path_factory.mktemp("many")
    for tar in range(12):
        members = []
        for number in range(40):
            key, (picture, captions) = f"{tar:05d}{number:04d}", samples[(7 * tar + number) % 12]
            picture = picture[:700] if number == 17 else picture
            members += [(f"{key}.jpg", picture), (f"{key}.txt", captions[0].encode())]
        write_tar(tars / f"{tar:05d}.tar", members)
    return tars


def kill_until_done(command, kills, longest):
    """Run a command, killing it at random moments, until it ends by itself; returns how often it was killed."""
    rng, killed = np.random.default_rng(0), 0
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            wait = 2 + rng.uniform(0, longest) if killed < kills else 300
            error = process.communicate(timeout=wait)[1]
            if killed >= kills:
                return process.returncode, error.decode()
            return killed, error.decode()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("x.pkl", "x/", "captions"))
def test_twenty_kills_leave_what_an_unbroken_run_makes(clip_file, trained, many, tmp_path, kind):
    """The same bytes: of shards and captions as they are, of a pickle its rows and records."""
    from features.store import read_store

    def command(place):
        if kind == "captions":
            return [sys.executable, *predict_words(trained, many, "--out", f"{tmp_path}/{place}/")]
        return [sys.executable, *words(clip_file, many, f"{tmp_path}/{place}/{kind}")]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    whole = subprocess.run(command("whole"), cwd=ROOT, capture_output=True, env=environment)
    seconds = time.monotonic() - began
    assert whole.returncode == (2 if kind == "captions" else 0), whole.stderr
    kill_until_done(command("broken"), 20, seconds * 0.8)
    last = subprocess.run(command("broken"), cwd=ROOT, capture_output=True, env=environment)
    assert last.returncode == whole.returncode, last.stderr
    if kind == "x.pkl":
        one, two = (read_store(tmp_path / place / kind) for place in ("whole", "broken"))
        assert torch.allclose(one.clip_embedding, two.clip_embedding, atol=1e-6) and one.captions == two.captions
        return
    one, two = (
        {path.relative_to(tmp_path / place): path.read_bytes() for path in (tmp_path / place).rglob("*.*")
         if path.suffix in (".npy", ".parquet")}
        for place in ("whole", "broken")
    )  # fmt: skip
    assert one == two and len(one) == (12 if kind == "captions" else 24)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ("ray", "pyspark"))
def test_examples_of_clusters(predict, trained, folder, tmp_path, engine):  # noqa: F811
    """The same captions by Ray Data and by Spark, and a second run finds them."""
    pytest.importorskip(engine)
    if engine == "pyspark" and not shutil.which("java"):
        pytest.skip("Spark needs Java")
    predict(folder, "--out", f"{tmp_path}/one/")
    script = {"ray": "docs/examples/ray_captions.py", "pyspark": "docs/examples/spark_captions.py"}[engine]
    command = [sys.executable, script, "2", *predict_words(trained, folder, "--out", f"{tmp_path}/two/")[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SPARK_LOCAL_IP": "127.0.0.1", "RAY_DISABLE_METRICS": "1"}
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "3 tars, 0 of them with errors" in done.stdout, done.stderr[-3000:]
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
