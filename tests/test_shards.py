"""The store as a folder of shards: written in pieces, resumed, read like clip-retrieval's, its damages named."""

import json
import re
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
from PIL import Image

import features.shards
from features import extraction, sources, store_files
from features.dataset import CaptionDataset
from features.shards import MappedEmbeddings, write_shard
from features.store import read_store
from features.store_files import shard_rows
from models.language import load_tokenizer
from tests.conftest import EMBED_DIM, ROOT, read_log, run_script, train
from tests.test_scripts import one_line_error


def extract(clip_file, photos, out, *more, check=0):
    return run_script(
        "parse_coco.py", "--clip_model_type", clip_file, "--annotations", photos / "captions.csv",
        "--images", photos, "--out", f"{out}/", "--num_workers", 0, "--batch_size", 3, *more, check=check,
    )  # fmt: skip


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of four images."""
    monkeypatch.setattr(store_files, "MIN_ROWS", 4)
    monkeypatch.setattr(store_files, "SHARDS", 3)


@pytest.fixture
def folder(small_shards, clip_file, photos, tmp_path):
    """Twelve images in three shards."""
    extract(clip_file, photos, tmp_path / "shards")
    return tmp_path / "shards"


def write_foreign(folder, counts, captions=True):
    """Write a folder as clip-retrieval does: numbers of another width, no image_id, one caption a row."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for part, count in enumerate(counts):
        rows = torch.randn(count, 8, generator=torch.Generator().manual_seed(part))
        rows = torch.nn.functional.normalize(rows).half().numpy()
        np.save(folder / f"img_emb/img_emb_{part}.npy", rows)
        table = {
            "image_path": [f"{part}/{i}.jpg" for i in range(count)],
            "caption": [f"a red star {i}" for i in range(count)],
        }
        if not captions:
            del table["caption"]
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{part}.parquet")


def test_same_as_the_pickle(folder, store):
    pickled, mapped = read_store(store), read_store(folder)
    assert isinstance(mapped.clip_embedding, MappedEmbeddings) and mapped.prefix_dim == EMBED_DIM
    assert [path.name for path in sorted((folder / "img_emb").iterdir())] == [f"img_emb_000{i}.npy" for i in range(3)]
    assert torch.allclose(mapped.clip_embedding[range(12)].float(), pickled.clip_embedding, atol=2e-3)
    assert [mapped.captions[i] for i in range(24)] == [
        {key: record[key] for key in ("image_id", "caption", "clip_embedding")} for record in pickled.captions
    ]
    beside = json.loads((folder.parent / "shards.json").read_text())
    assert (beside["shards"], beside["images"], beside["captions"], beside["embed_dim"]) == (3, 12, 24, EMBED_DIM)


def test_embedding_reader_reads_ours(folder):
    from embedding_reader import EmbeddingReader

    reader = EmbeddingReader(
        embeddings_folder=str(folder / "img_emb"), metadata_folder=str(folder / "metadata"), file_format="parquet_npy",
        meta_columns=["image_path", "caption", "image_id"],
    )  # fmt: skip
    rows, meta = next(reader(batch_size=12))
    mapped = read_store(folder)
    assert np.allclose(rows, mapped.clip_embedding[range(12)])
    assert meta["image_id"].tolist() == list(range(1, 13))
    assert meta["caption"].tolist() == [mapped.captions[2 * i]["caption"] for i in range(12)]


def test_clip_retrievals_folder_is_read(tmp_path, language_model):
    write_foreign(tmp_path / "laion", [5, 7])
    store = read_store(tmp_path / "laion")
    assert len(store.captions) == len(store.clip_embedding) == 12
    assert store.captions[6] == {"image_id": "1/1.jpg", "caption": "a red star 1", "clip_embedding": 6}
    tokens, embeddings, _ = CaptionDataset(store, load_tokenizer(str(language_model))).batch([11, 0])
    assert np.array_equal(embeddings[0], np.load(tmp_path / "laion/img_emb/img_emb_1.npy")[6].astype(np.float32))
    told = train(tmp_path / "laion", language_model, tmp_path / "run", "--epochs", 1)
    assert len(read_log(tmp_path / "run")) == 3 and "laion are normalised" in told.stderr
    told = train(tmp_path / "laion", language_model, tmp_path / "run", "--epochs", 1, "--normalize_prefix")
    assert "normalised" not in told.stderr


def test_finished_shards_stay(folder, clip_file, photos):
    files = sorted(folder.rglob("*.*"))
    before = {path: path.stat().st_mtime_ns for path in files}
    (folder / "metadata/metadata_0001.parquet").unlink()
    extract(clip_file, photos, folder)
    after = {path: path.stat().st_mtime_ns for path in files}
    assert [path.name for path in files if before[path] != after[path]] == ["img_emb_0001.npy", "metadata_0001.parquet"]


def test_changed_images_and_captions_are_extracted_again(folder, clip_file, photos, tmp_path):
    moved = tmp_path / "photos"
    shutil.copytree(photos, moved)
    extract(clip_file, moved, folder)
    lines = (moved / "captions.csv").read_text().splitlines()
    (moved / "captions.csv").write_text("\n".join([lines[0], "COCO_val2014_000000000001.jpg,a new one", *lines[3:15]]))
    Image.new("RGB", (40, 40), "red").save(moved / "COCO_val2014_000000000006.jpg")
    extract(clip_file, moved, folder)
    store = read_store(folder)
    assert len(store.clip_embedding) == 7 and store.captions[0]["caption"] == "a new one"
    assert len(list((folder / "img_emb").iterdir())) == 2  # what a larger run left is gone


def test_unreadable_images_have_no_row(small_shards, clip_file, photos, tmp_path):
    moved = tmp_path / "photos"
    shutil.copytree(photos, moved)
    for number in (5, 6, 7, 8):  # the whole second shard
        (moved / f"COCO_val2014_{number:012d}.jpg").write_bytes(b"no image")
    for _ in range(2):  # once made, once found
        done = extract(clip_file, moved, tmp_path / "shards")
        assert "8 images, 16 captions, 4 images skipped" in done.stderr
    store = read_store(tmp_path / "shards")
    assert [store.captions[i]["image_id"] for i in range(0, 16, 2)] == [1, 2, 3, 4, 9, 10, 11, 12]
    assert len(json.loads((tmp_path / "shards.json").read_text())["skipped"]) == 4


DAMAGES = {
    "missing": (lambda f: (f / "img_emb/img_emb_0001.npy").unlink(), "img_emb_0001.npy is missing"),
    "last missing": (
        lambda f: [p.unlink() for p in f.rglob("*_0002.*")], "img_emb_0002.npy is missing"),
    "truncated": (
        lambda f: (f / "img_emb/img_emb_0001.npy").write_bytes((f / "img_emb/img_emb_0001.npy").read_bytes()[:-10]),
        "img_emb_0001.npy is damaged .384 bytes expected, 374 found"),
    "mismatched": (
        lambda f: shutil.copy(f / "img_emb/img_emb_0000.npy", f / "img_emb/img_emb_0001.npy")
        and np.save(f / "img_emb/img_emb_0001.npy", np.zeros((3, EMBED_DIM), np.float16)),
        "metadata_0001.parquet has 4 rows and the npy of its number 3"),
    "another width": (
        lambda f: np.save(f / "img_emb/img_emb_0001.npy", np.zeros((4, 16), np.float16)), "16 wide, .* two encoders"),
    "metadata": (
        lambda f: (f / "metadata/metadata_0001.parquet").write_bytes(b"PAR1"), "metadata_0001.parquet is damaged"),
    "empty": (lambda f: [p.unlink() for p in f.rglob("*.*")], "holds no shards"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_are_named(folder, language_model, name):
    damage, message = DAMAGES[name]
    damage(folder)
    done = train(folder, language_model, folder.parent / "run", check=2)

    assert re.search(message, done.stderr) and done.stderr.count("\n") == 1


@pytest.fixture
def large(tmp_path):
    """9,000 rows in two shards, one caption each but for the first, and how to change one."""
    embeddings = torch.randn(9000, 4, generator=torch.Generator().manual_seed(0))

    def write(row=0, caption=None, number=None):
        changed = embeddings.clone()
        changed[row] += number or 0
        texts = dict.fromkeys(range(9000), "a red star") | ({row: caption} if caption else {})
        for shard, (start, end) in enumerate(((0, 5000), (5000, 9000))):
            images = {
                f"{i}.jpg": [{"image_id": i, "caption": texts[i]}] * (2 if i == 0 else 1) for i in range(start, end)
            }
            write_shard(tmp_path / "large", shard, "", changed[start:end], images, {})
        (tmp_path / "large.json").write_text('{"shards": 2}')
        return read_store(tmp_path / "large").fingerprint()

    return write


def test_fingerprint_notices_one_row(large, tmp_path, monkeypatch):
    """Of whatever is in the folder, wherever it lies; only of very large ones are parts passed over."""
    prints = [large()]
    for row in (0, 3333, 4999, 5000, 7777, 8999):
        prints += [large(row, caption="a red star."), large(row, number=0.01)]
    prints.append(large(3333, caption="a red sta"))
    assert len(set(prints)) == len(prints) and large() == prints[0]
    shutil.move(tmp_path / "large", tmp_path / "moved")
    shutil.move(tmp_path / "large.json", tmp_path / "moved.json")
    assert read_store(tmp_path / "moved").fingerprint() == prints[0]
    monkeypatch.setattr(features.shards, "PIECE", 80)  # ten rows
    monkeypatch.setattr(features.shards, "FINGERPRINTED", 8000)
    whole = large()
    changes = [large(row, number=0.01) != whole for row in range(4000, 4090, 10)]
    assert set(changes) == {True, False} and large(4444, caption="a blue star") != whole


def test_fingerprint_of_clip_retrievals_folder(tmp_path):
    write_foreign(tmp_path / "foreign", (5, 3))
    assert len(read_store(tmp_path / "foreign").fingerprint()) == 64


def test_nan_names_its_row(folder):
    rows = np.load(folder / "img_emb/img_emb_0002.npy")
    rows[1, 3] = np.nan
    np.save(folder / "img_emb/img_emb_0002.npy", rows)
    store = read_store(folder)
    store.clip_embedding[[8]]
    with pytest.raises(ValueError, match="img_emb_0002.npy, row 1 holds NaN"):
        store.clip_embedding[[8, 9]]


def test_folder_without_captions(tmp_path, language_model):
    write_foreign(tmp_path / "laion", [5], captions=False)
    assert len(read_store(tmp_path / "laion").captions) == 0
    one_line_error(train(tmp_path / "laion", language_model, tmp_path / "run", check=2), "pictures without captions")
    write_foreign(tmp_path / "mixed", [5, 5])
    shutil.copy(tmp_path / "laion/metadata/metadata_0.parquet", tmp_path / "mixed/metadata/metadata_1.parquet")
    with pytest.raises(ValueError, match="metadata_1.parquet has no column caption, and .*metadata_0.parquet has"):
        read_store(tmp_path / "mixed")


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(clip_file, photos, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    source = sorted(photos.glob("*.jpg"))
    for number in range(300):
        shutil.copy(source[number % 12], many / f"{number}.jpg")
    (many / "captions.csv").write_text("image,caption\n" + "".join(f"{n}.jpg,a star {n}\n" for n in range(300)))
    words = [
        sys.executable, "parse_coco.py", "--clip_model_type", clip_file, "--annotations", many / "captions.csv",
        "--images", many, "--out", f"{tmp_path / 'out'}/", "--num_workers", "0", "--batch_size", "2",
    ]  # fmt: skip
    partial = tmp_path / "out/img_emb/img_emb_0000.npy.partial/journal.jsonl"
    process = subprocess.Popen([*map(str, words)], cwd=ROOT, stderr=subprocess.PIPE)
    while not (partial.is_file() and partial.read_bytes().count(b"\n") > 20) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out.json").exists()
    done = subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True)
    going_on = int(done.stderr.split("going on: ")[1].split()[0])
    assert done.returncode == 0 and 40 <= going_on < 300
    assert len(read_store(tmp_path / "out").captions) == 300 and not partial.exists()


def test_shards_are_powers_of_two():
    assert [shard_rows(n) for n in (1, 65_536, 65_537, 113_287, 10**8)] == [1024, 1024, 2048, 2048, 1 << 17]


def test_a_store_that_is_not_finished_is_none(photos, clip_file, tmp_path, monkeypatch):
    """Stopped between two shards, the first time or over an older whole store: half of it is no data to train on."""
    import parse_coco

    out = tmp_path / "x"
    words = ["--clip_model_type", str(clip_file), "--images", str(photos), "--num_workers", "0", "--out", f"{out}/"]
    annotations = tmp_path / "captions.csv"
    annotations.write_text((photos / "captions.csv").read_text())
    monkeypatch.setattr(sources, "shard_rows", lambda images: 4)
    written = []

    def stopping(*arguments):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(write_shard(*arguments))

    for earlier in (False, True):
        if earlier:
            parse_coco.main([*words, "--annotations", str(annotations)])
            assert len(read_store(out).captions) == 24
            annotations.write_text(annotations.read_text().replace("a ", "the "))
        written.clear()
        with monkeypatch.context() as patch:
            patch.setattr(extraction, "write_shard", stopping)
            with pytest.raises(KeyboardInterrupt):
                parse_coco.main([*words, "--annotations", str(annotations)])
        with pytest.raises(ValueError, match="is not finished"):
            read_store(out)
