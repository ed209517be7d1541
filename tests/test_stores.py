"""parse_coco.py's output: whose it is, what is kept when it stops, and when it is complete."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from test_outputs import alias
from test_scripts import one_line_error

from features import extraction, store_files
from features.partial import PartialStore
from features.store import read_store
from utils.outputs import lock

OUTPUTS = pytest.mark.parametrize("name", ("x.pkl", "x/"))


@pytest.fixture
def pictures(photos, tmp_path):
    """A copy of the twelve images, and of their captions as my.json."""
    folder = tmp_path / "p"
    shutil.copytree(photos, folder)
    lines = (photos / "captions.csv").read_text().splitlines()[1:]
    records = [{"file_name": name, "image_id": name, "caption": text} for name, text in (x.split(",") for x in lines)]
    (folder / "my.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def parse(pictures, clip_file, monkeypatch):
    """A function that runs parse_coco.py on them, in shards of four images."""
    monkeypatch.setattr(store_files, "MIN_ROWS", 4)
    monkeypatch.setattr(store_files, "SHARDS", 3)

    def run(out, *more, check=0, runner=run_script):
        return runner(
            "parse_coco.py", "--clip_model_type", clip_file, "--annotations", pictures / "my.json", "--images",
            pictures, "--out", out, "--num_workers", 0, "--batch_size", 2, *more, check=check,
        )  # fmt: skip

    return run


def contents(out):
    """Return [12, D] rows and the captions of a store."""
    store = read_store(str(out))
    return store.clip_embedding[range(len(store.clip_embedding))].float(), [
        store.captions[i] for i in range(len(store.captions))
    ]


def same(a, b):
    """Rows of batches of other sizes may differ in their last bit."""
    return torch.allclose(a[0], b[0], atol=1e-6) and a[1] == b[1]


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- whose it is


@OUTPUTS
@pytest.mark.parametrize("how", ("plain", "relative", "link"))
def test_second_run_on_one_store(parse, tmp_path, monkeypatch, name, how):
    out = tmp_path / "new" / "stores" / name
    out.parent.mkdir(parents=True)
    other = str(alias(out, how, monkeypatch)) + "/" * name.endswith("/")
    with lock(out):
        one_line_error(parse(other, check=2), "another run is writing", str(out), "another --out")
    assert os.listdir(out.parent) == []


def test_two_stores_with_one_json(parse, tmp_path):
    """x.pkl and x/ would share x.json, of which only one can be told."""
    with lock(tmp_path / "x.json"):
        for name in ("x.pkl", "x/"):
            one_line_error(parse(f"{tmp_path}/{name}", check=2), "another run is writing", "another --out")
    parse(tmp_path / "x.pkl")
    before = files_in(tmp_path)
    one_line_error(parse(f"{tmp_path}/x/", check=2), "x.json, which tells of a pickle")
    assert before == files_in(tmp_path)
    parse(f"{tmp_path}/y/")
    one_line_error(parse(tmp_path / "y.pkl", check=2), "y.json, which tells of a folder of shards")


def test_outputs_that_would_overwrite_something(parse, pictures, tmp_path, monkeypatch, clip_file):
    monkeypatch.setattr(extraction, "load_encoder", lambda *_: pytest.fail("the encoder was loaded"))
    (tmp_path / "link").symlink_to(pictures)
    run = {"model": {}, "training": {}}
    for name, text in (("run.json", json.dumps(run)), ("other.json", "[]"), ("notes.txt", "mine")):
        (pictures / name).write_text(text)
    (pictures / "dir.json").mkdir()
    shutil.copy(clip_file, pictures / "clip.pkl")
    write_foreign(pictures / "laion")
    before = files_in(pictures)
    monkeypatch.chdir(pictures)
    for out, said in (
        (pictures / "my.pkl", "would overwrite the annotations, "),
        (pictures / "my.pickle", "by its json; name another"),
        (f"{pictures}/my/", "would overwrite the annotations, "),
        (tmp_path / "link" / "my.pkl", "would overwrite the annotations, "),
        ("my.pkl", "would overwrite the annotations, "),
        ("../p/my/", "would overwrite the annotations, "),
        (pictures / "run.pkl", "run.json, which tells of no store"),
        (f"{pictures}/other/", "other.json, which tells of no store"),
        (pictures / "dir.pkl", "dir.json, which tells of no store"),
        (pictures / "my.json", "must end in .pkl or .pickle"),
        (pictures / "x.txt", "must end in .pkl or .pickle"),
        (pictures / "notes.txt" / "x.pkl", "is no folder"),
        (f"{pictures}/notes.txt/", "is no folder"),
        (f"{pictures}/laion/", "holds shards that are not of parse_coco.py"),
        (f"{pictures}/", "would overwrite the images, "),
        (tmp_path / "link", "would overwrite the images, "),
    ):
        one_line_error(parse(out, check=2), "--out", said)
    words = ("--clip_model_type", pictures / "clip.pkl")
    one_line_error(parse(pictures / "clip.pkl", *words, check=2), "would overwrite the encoder")
    assert before == files_in(pictures)


def write_foreign(folder):
    """Write a shard as clip-retrieval does, under the name that ours would have."""
    for part in ("img_emb", "metadata"):
        (folder / part).mkdir(parents=True)
    np.save(folder / "img_emb/img_emb_0000.npy", np.zeros((1, 8), np.float16))
    pq.write_table(pa.table({"caption": ["a"]}), folder / "metadata/metadata_0000.parquet")


def test_folders_are_made(parse, tmp_path):
    parse(tmp_path / "new" / "er" / "x.pkl")
    assert sorted(os.listdir(tmp_path / "new" / "er")) == ["x.json", "x.pkl"]


# ---- what is kept


def stop_after(monkeypatch, images, act):
    """Call `act` when so many images are encoded."""
    plain, done = PartialStore.append, []

    def append(self, keys, embeddings):
        plain(self, keys, embeddings)
        done.extend(keys)
        if len(done) == images:
            act()

    monkeypatch.setattr(PartialStore, "append", append)


def fail():
    raise RuntimeError("from the driver")


def stop(parse, out, monkeypatch, act=lambda: os.kill(os.getpid(), signal.SIGTERM), status=143):
    """Stop an extraction after six images."""
    with monkeypatch.context() as patch:
        stop_after(patch, 6, act)
        return parse(out, check=status)


@OUTPUTS
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, None))
def test_what_is_encoded_is_kept(parse, tmp_path, monkeypatch, name, number):
    parse(f"{tmp_path}/whole/{name}")
    out = f"{tmp_path}/{name}"
    if number is None:
        with pytest.raises(RuntimeError, match="from the driver"):
            stop(parse, out, monkeypatch, fail)
    else:
        done = stop(parse, out, monkeypatch, lambda: os.kill(os.getpid(), number), 128 + number)
        word = "terminated" if number == signal.SIGTERM else "interrupted"
        assert done.stderr.splitlines()[-1] == f"{word}: the same command goes on from here"
    assert not (tmp_path / "x.json").exists() and not list(tmp_path.glob(".*.lock"))
    expected = {"x.pkl": 6, "x/": 2}[name]  # of a shard that is not whole; the other is
    assert f"going on: {expected} of " in parse(out).stderr
    assert same(contents(out), contents(f"{tmp_path}/whole/{name}")) and not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
@OUTPUTS
def test_signals_to_the_process(parse, tmp_path, name):
    """And a kill, after which no lock is left."""
    out = f"{tmp_path}/{name}"
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        stopping = (
            "import os; from features.partial import PartialStore as P; from utils.cli import run; import parse_coco\n"
            f"plain = P.append; P.append = lambda *a: (plain(*a), os.kill(os.getpid(), {int(number)}))\n"
            "run(parse_coco.main)"
        )

        def runner(_script, *words, check, stopping=stopping):
            done = subprocess.run([sys.executable, "-c", stopping, *map(str, words)], cwd=ROOT)
            assert done.returncode == check

        parse(out, check=-9 if number == signal.SIGKILL else 128 + number, runner=runner)
    assert "going on: " in parse(out).stderr


DAMAGES = {
    "a row's bit": lambda journal, data: flip(data, 3 * 32 * 4 + 1),
    "rows cut off": lambda journal, data: data.write_bytes(data.read_bytes()[:-300]),
    "rows gone": lambda journal, data: data.unlink(),
    "rows of another run": lambda journal, data: data.write_bytes(data.read_bytes()[::-1]),
    "a batch's rows gone": lambda journal, data: data.write_bytes(data.read_bytes()[2 * 32 * 4 :]),
    "a batch's rows twice": lambda journal, data: data.write_bytes(data.read_bytes()[: 2 * 32 * 4] + data.read_bytes()),
    "line gone": lambda journal, data: edit(journal, lambda lines: [*lines[:1], *lines[2:]]),
    "line twice": lambda journal, data: edit(journal, lambda lines: [*lines[:2], *lines[1:]]),
    "lines swapped": lambda journal, data: edit(journal, lambda lines: [lines[0], lines[2], lines[1], lines[3]]),
    "names swapped": lambda journal, data: edit(journal, lambda lines: [lines[0], swapped(lines[1]), *lines[2:]]),
    "not a list": lambda journal, data: edit(journal, lambda lines: [lines[0], b'{"images": 5, "crc32": 0}\n']),
    "no json": lambda journal, data: edit(journal, lambda lines: [*lines[:2], b"\0\xff\n", lines[3]]),
    "line cut off": lambda journal, data: journal.write_bytes(journal.read_bytes()[:-9]),
    "journal empty": lambda journal, data: journal.write_bytes(b""),
    "journal gone": lambda journal, data: journal.unlink(),
}  # fmt: skip


def flip(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 64
    path.write_bytes(data)


def edit(journal, change):
    journal.write_bytes(b"".join(change(journal.read_bytes().splitlines(keepends=True))))


def swapped(line):
    """Exchange the two images of a batch."""
    entry = json.loads(line)
    return json.dumps({**entry, "images": entry["images"][::-1]}).encode() + b"\n"


@pytest.fixture(scope="module")
def whole(photos, clip_file, tmp_path_factory):
    return {}


@pytest.mark.parametrize("name", DAMAGES)
def test_journal_and_rows_agree_or_are_made_again(parse, whole, tmp_path, monkeypatch, name):
    out = tmp_path / "x.pkl"
    if not whole:
        parse(tmp_path / "whole.pkl")
        whole["store"] = contents(tmp_path / "whole.pkl")
    stop(parse, out, monkeypatch)
    partial = tmp_path / "x.pkl.partial"
    DAMAGES[name](partial / "journal.jsonl", partial / "embeddings.f32")
    parse(out)
    assert same(contents(out), whole["store"]) and not partial.exists()


@OUTPUTS
def test_image_that_changes_while_it_is_read(parse, pictures, tmp_path, monkeypatch, name):
    """What was read is not taken for what is there now."""
    path, plain = pictures / "COCO_val2014_000000000002.jpg", extraction.encode_files

    def changing(*words):
        for number, batch in enumerate(plain(*words)):
            if number == 0:
                Image.new("RGB", (40, 40), "red").save(path)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "encode_files", changing)
        parse(f"{tmp_path}/{name}", check=None)
    parse(f"{tmp_path}/{name}")
    parse(f"{tmp_path}/whole/{name}")
    assert same(contents(f"{tmp_path}/{name}"), contents(f"{tmp_path}/whole/{name}"))


# ---- when it is complete


def touch(path):
    os.utime(path, ns=(1, 1))


def replace(path):
    """Other bytes, as many, at the same time."""
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data + b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def remove(path):
    path.unlink()


@OUTPUTS
@pytest.mark.parametrize("change", (replace, touch, remove))
def test_complete_with_the_same_files_only(parse, pictures, tmp_path, name, change):
    out, encoded = f"{tmp_path}/{name}", []
    parse(out)
    plain = PartialStore.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialStore, "append", lambda self, keys, rows: (encoded.extend(keys), plain(self, keys, rows)))
        parse(out)
        assert not encoded
        change(pictures / "COCO_val2014_000000000006.jpg")
        done = parse(out)
    left = 12 - (change is remove)
    assert len(read_store(out).clip_embedding) == left and f"{left} images" in done.stderr
    assert encoded and (change is remove or any("0006.jpg" in key[0] for key in encoded))


def test_a_pickle_without_its_json_is_not_complete(parse, pictures, tmp_path, monkeypatch):
    """Killed between the two, the older json does not stand for the new pickle."""
    out = tmp_path / "x.pkl"
    parse(out)
    before, backup = contents(out), (pictures / "my.json").read_text()
    (pictures / "my.json").write_text(json.dumps(json.loads(backup)[:8]))
    with monkeypatch.context() as patch:
        patch.setattr("features.store.write_json", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        parse(out, check=143)
    (pictures / "my.json").write_text(backup)
    parse(out)
    assert same(contents(out), before)


@OUTPUTS
def test_skipped_images_that_can_be_read_by_now(parse, pictures, tmp_path, name):
    out = f"{tmp_path}/{name}"
    Image.new("RGB", (80, 80), "red").save(pictures / "COCO_val2014_000000000006.jpg")
    assert "11 images" in parse(out, "--max_pixels", 3000).stderr
    assert "11 images" in parse(out, "--max_pixels", 4000).stderr
    assert "12 images" in parse(out).stderr and len(read_store(out).clip_embedding) == 12


@pytest.mark.parametrize("damaged", ("img_emb/img_emb_0001.npy", "metadata/metadata_0001.parquet"))
@pytest.mark.parametrize("size", (0, 100, -10))
def test_damaged_shards_are_made_again(parse, tmp_path, damaged, size):
    out = tmp_path / "x"
    parse(f"{out}/")
    before = contents(out)
    (out / damaged).write_bytes((out / damaged).read_bytes()[:size])
    parse(f"{out}/")
    assert same(contents(out), before)
