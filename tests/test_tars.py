"""Tars of img2dataset's kind as input: what is in them, what is wrong with them, and going on exactly."""

import gzip
import io
import json
import os
import signal
import tarfile

import pytest
import torch
from conftest import run_script
from test_distributed import launch
from test_scripts import one_line_error

from benchmarks.workload import write_tar
from features import tars
from features.images import read_image
from features.partial import PartialStore
from features.sources import Tars
from features.store import read_store
from features.tars import TarMember, expand_tars, read_tar

HTML = b"<!DOCTYPE html><html><body>404</body></html>"


@pytest.fixture(scope="session")
def samples(photos):
    """{picture's bytes: its two captions} of the twelve photos."""
    captions = [line.split(",", 1)[1] for line in (photos / "captions.csv").read_text().splitlines()[1:]]
    return [
        (path.read_bytes(), captions[2 * number : 2 * number + 2])
        for number, path in enumerate(sorted(photos.glob("*.jpg")))
    ]


def sample(number, picture, captions, ending=".jpg"):
    """Return the members of one key, as img2dataset names them for tars of four."""
    key = f"{number // 4:05d}{number % 4:04d}"
    text = json.dumps({"caption": captions[0], "captions": captions, "key": key, "status": "success"})
    return [(f"{key}{ending}", picture), (f"{key}.txt", captions[0].encode()), (f"{key}.json", text.encode())]


@pytest.fixture(scope="session")
def folder(samples, tmp_path_factory):
    """Three tars of four pictures."""
    folder = tmp_path_factory.mktemp("tars")
    for tar in range(3):
        members = [m for n in range(4 * tar, 4 * tar + 4) for m in sample(n, *samples[n])]
        write_tar(folder / f"{tar:05d}.tar", members)
    return folder


@pytest.fixture
def parse(clip_file):
    """A function that runs parse_coco.py on tars."""

    def run(images, out, *more, check=0):
        return run_script(*words(clip_file, images, out), *more, check=check)

    return run


def words(clip_file, images, out):
    """Return the words of parse_coco.py, batches of two."""
    return [str(word) for word in (
        "parse_coco.py", "--clip_model_type", clip_file, "--images", images, "--out", out, "--num_workers", 0,
        "--batch_size", 2,
    )]  # fmt: skip


def rows(out):
    store = read_store(str(out))
    captions = [store.captions[i] for i in range(len(store.captions))]
    return store.clip_embedding[torch.arange(len(store.clip_embedding))].float(), captions, store.info


# ---- which tars


def test_names(tmp_path):
    for number in (7, 8, 9, 10, 11):
        write_tar(tmp_path / f"{number:05d}.tar", [])
    write_tar(tmp_path / "x{a.tar", [])
    names = lambda *arguments: [os.path.basename(path) for path in expand_tars(arguments)]  # noqa: E731
    assert names(f"{tmp_path}/{{00007..00010}}.tar") == ["00007.tar", "00008.tar", "00009.tar", "00010.tar"]
    assert names(f"{tmp_path}/0000{{7,9}}.tar::{tmp_path}/00011.tar") == ["00007.tar", "00009.tar", "00011.tar"]
    assert names(f"{tmp_path}/000{{0,1}}{{0..1}}.tar"[:-4] + "*.tar") == ["00010.tar", "00011.tar"]
    assert names(f"{tmp_path}/000*.tar", f"{tmp_path}/00007.tar") == [f"{n:05d}.tar" for n in (7, 8, 9, 10, 11)]
    assert names(str(tmp_path)) == ["00007.tar", "00008.tar", "00009.tar", "00010.tar", "00011.tar", "x{a.tar"]
    assert names(f"{tmp_path}/x{{a.tar") == ["x{a.tar"]  # a file of that very name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{00000..00001}.tar::{00005..00009}.tar", "5 of 7 tars do not exist"),
        ("{00001..00000}.tar", "write it upwards"),
        ("{00000..99999999}.tar", "names 100,000,000 tars"),
        ("{0..999}{0..999}{0..999}.tar", "more than 1,000,000"),
        ("{00000}.tar", "neither a range"),
        ("{00000..00001.tar", "a brace without its other one"),
        ("00000.tar.gz", "is compressed"),
        ("00000.tgz", "is compressed"),
        ("00000.tar::photo.jpg", "photo.jpg names no tar"),
        ("none*.tar", "names no tar"),
    ],
)
def test_names_that_are_refused(parse, folder, tmp_path, name, said):
    (folder / "00000.tar.gz").write_bytes(gzip.compress((folder / "00000.tar").read_bytes()))
    (folder / "00000.tgz").write_bytes(b"")
    (folder / "photo.jpg").write_bytes(b"")
    try:
        done = parse("::".join(f"{folder}/{part}" for part in name.split("::")), tmp_path / "x.pkl", check=2)
    finally:
        for extra in ("00000.tar.gz", "00000.tgz", "photo.jpg"):
            (folder / extra).unlink()
    one_line_error(done, said)
    assert not (tmp_path / "x.pkl").exists()


# ---- what is in them


@pytest.mark.parametrize("name", ("x.pkl", "x/"))
def test_same_as_the_folder(parse, folder, store, tmp_path, name):
    """Pictures, captions and their order; one shard per tar."""
    parse(folder, f"{tmp_path}/{name}")
    embeddings, captions, info = rows(f"{tmp_path}/{name}")
    expected, texts, _ = rows(store)
    assert torch.allclose(embeddings, expected, atol=2e-3 if name == "x/" else 1e-5)
    assert [c["caption"] for c in captions] == [c["caption"] for c in texts]
    assert [c["clip_embedding"] for c in captions] == [c["clip_embedding"] for c in texts]
    assert [c["image_id"] for c in captions[::2]] == [10000 * (n // 4) + n % 4 for n in range(12)]
    assert (info["images_found"], info["images"], info["captions"], info["skipped"]) == (12, 12, 24, {})
    assert info.get("shards") == (3 if name == "x/" else None) and info["annotations"] is None


def test_tiff_heads_and_other_kinds_are_read_from_memory(samples, tmp_path):
    from PIL import Image

    for ending in ("png", "webp", "tiff", "jpeg"):
        data = io.BytesIO()
        Image.open(io.BytesIO(samples[0][0])).save(data, ending)
        (tmp_path / f"a.{ending}").write_bytes(data.getvalue())
        path = write_tar(tmp_path / "a.tar", [("a.txt", b"x"), (f"a.{ending}", data.getvalue())])
        entries, faults = read_tar(str(path))
        [member] = entries["a"].pictures
        assert not faults and read_image(member).tobytes() == read_image(tmp_path / f"a.{ending}").tobytes()


def test_captions_by_key(parse, folder, store, photos, tmp_path):
    """Of annotations, by file name or id; those in the tars do not count, nor pictures that are not named."""
    records = [{"image_id": n, "file_name": f"some/where/{n:09d}.jpg", "caption": f"star {n}"} for n in (0, 10001)]
    (tmp_path / "c.json").write_text(json.dumps([*records, {"image_id": 20003, "caption": "ring"}]))
    for name in ("w.pkl", "x/"):
        done = parse(folder, f"{tmp_path}/{name}", "--annotations", tmp_path / "c.json")
        embeddings, captions, _ = rows(f"{tmp_path}/{name}")
        assert [(c["image_id"], c["caption"]) for c in captions] == [
            (0, "star 0"), (10001, "star 10001"), (20003, "ring"),
        ]  # fmt: skip
        assert torch.allclose(embeddings, rows(store)[0][[0, 5, 11]], atol=2e-3) and "warning" not in done.stderr
    (tmp_path / "c.json").write_text(json.dumps([*records, {"image_id": 5, "caption": "ring"}]))
    done = parse(folder, f"{tmp_path}/x/", "--annotations", tmp_path / "c.json")
    assert "warning: 1 of 3 records have no picture in the tars" in done.stderr
    assert read_store(tmp_path / "x").info["records_without_image"] == 1
    done = parse(folder, tmp_path / "y.pkl", "--annotations", tmp_path / "c.json", "--strict", check=2)
    one_line_error(done, "1 of 3 records have no picture")


def test_pictures_alone(parse, folder, tmp_path):
    parse(f"{folder}/{{00000..00001}}.tar", f"{tmp_path}/x/", "--no_captions")
    embeddings, captions, info = rows(tmp_path / "x")
    assert (len(embeddings), captions, info["images"]) == (8, [], 8)


def test_keys_that_are_the_same_in_every_tar(parse, samples, tmp_path):
    """Pictures of two tars are never taken for one, though both are number 1."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for tar in ("x", "yy"):
            write_tar(tmp_path / name / f"{tar}.tar", [("1.jpg", samples[0][0]), ("1.txt", f"{name} {tar}".encode())])
    out = tmp_path / "s.pkl"
    parse(f"{tmp_path}/{{a,b}}/x.tar::{tmp_path}/a/yy.tar", out)
    assert [c["image_id"] for c in rows(out)[1]] == ["a/x/1", "b/x/1", "a/yy/1"]
    parse(f"{tmp_path}/a/{{x,yy}}.tar", out)
    assert [c["image_id"] for c in rows(out)[1]] == ["x/1", "yy/1"]
    parse(tmp_path / "a" / "x.tar", out)
    assert [c["image_id"] for c in rows(out)[1]] == [1]


# ---- what is wrong with them


def faulty(folder, samples):
    """Write tars with every fault; returns {part of the name that is listed: part of the reason}."""
    good = [m for n in range(4) for m in sample(n, *samples[n])]
    picture, captions = samples[4]
    write_tar(folder / "00000.tar", [
        *good, ("000000010.jpg", picture), ("000000011.txt", b"alone"),
        *sample(6, picture, captions), ("000010002.png", picture),
        ("000000020.jpg", HTML), ("000000020.txt", b"a page"), ("000000021.jpg", b""), ("000000021.txt", b"nothing"),
        ("000000022.jpg", picture[:900]), ("000000022.txt", b"half"), ("000000023.jpg", picture),
        ("000000023.txt", b"caf\xe9"), ("000000024.jpg", picture), ("000000024.json", b'{"caption": 3}'),
        ("../up.jpg", picture), ("/abs.jpg", picture), ("n" * 2000 + ".jpg", picture), ("a\nb\x1b.jpg", picture),
        ("._hidden.jpg", b"x"), ("notes.cls", b"7"),
    ])  # fmt: skip
    whole = write_tar(folder / "00001.tar", [m for n in range(4, 8) for m in sample(n, *samples[n])])
    cut = whole.read_bytes()
    whole.write_bytes(cut[: cut.rindex(b"000010003.jpg") + 512 + 100])
    write_tar(folder / "00002.tar", [m for n in range(8, 12) for m in sample(n, *samples[n])])
    (folder / "00003.tar").write_bytes(HTML * 100)
    (folder / "00004.tar").write_bytes(b"")
    (folder / "00005.tar").write_bytes(gzip.compress(cut))
    write_tar(folder / "00006.tar", [("readme.md", b"x")])
    (folder / "00007.tar").write_bytes((folder / "00002.tar").read_bytes() * 2)
    return {
        "000000010.jpg": "no caption", "000000011.txt": "no picture", "000010002": "2 pictures of one key",
        "000000020.jpg": "an HTML page", "000000021.jpg": "an empty file", "000000022.jpg": "truncated",
        "000000023.jpg": "not UTF-8", "000000024.jpg": "cannot be read", "../up.jpg": "leads out",
        "/abs.jpg": "leads out", "nnn...": "1,000 characters", "a\nb": "control characters",
        "000010003.jpg": "truncated: the tar ends within it", "00001.tar": "truncated", "00003.tar": "no tar",
        "00004.tar": "an empty file", "00005.tar": "no tar", "00006.tar": "without pictures",
        "00007.tar": "goes on behind its end mark",
    }  # fmt: skip


@pytest.mark.parametrize("name", ("x.pkl", "x/"))
def test_faults_are_listed_and_survived(parse, samples, store, tmp_path, name):
    (tmp_path / "t").mkdir()
    expected, out = faulty(tmp_path / "t", samples), f"{tmp_path}/{name}"
    done = parse(tmp_path / "t", out)
    embeddings, captions, info = rows(out)
    listed = dict(info["skipped"])
    for part, reason in expected.items():
        [found] = [key for key in listed if (key.endswith(part) if part.endswith(".tar") else part in key)]
        assert reason in listed.pop(found), (part, reason)
    assert not listed and info["images_skipped"] == len(expected) == sum(info["skipped_by_reason"].values())
    assert "skipped" in done.stderr and "and 9 more" in done.stderr
    kept = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 8, 9, 10, 11]
    assert torch.allclose(embeddings, rows(store)[0][kept], atol=2e-3) and len(captions) == 30
    # a second run goes on with what stands, faults included
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    parse(tmp_path / "t", out)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert rows(out)[2]["skipped"] == info["skipped"]
    one_line_error(parse(tmp_path / "t", tmp_path / "y.pkl", "--strict", check=2), "leave out --strict")


def test_check_names_the_same(samples, tmp_path):
    expected = faulty(tmp_path, samples)
    done = run_script("parse_coco.py", "--check", "--images", tmp_path, "--num_workers", 0, check=2)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == len(expected) and all(len(line) == 3 for line in lines)
    for part, reason in expected.items():
        assert any(part.replace("\n", "\\n") in name and reason in said for _, name, said in lines), part
    assert f"8 tars: 33 records of 18 images; {len(expected)} faults" in done.stderr


def test_larger_pictures_are_read_by_a_later_run(parse, folder, tmp_path):
    parse(folder, f"{tmp_path}/x/", "--max_pixels", 1900, check=2)
    parse(folder, f"{tmp_path}/x/")
    assert len(read_store(tmp_path / "x").clip_embedding) == 12


def test_damaged_in_the_middle(samples, tmp_path):
    """tarfile takes a header that it cannot read for the end of the tar."""
    path = write_tar(tmp_path / "a.tar", [m for n in range(4) for m in sample(n, *samples[n])])
    data = bytearray(path.read_bytes())
    start = data.rindex(b"000000002.jpg")
    data[start : start + 300] = b"\xff" * 300
    path.write_bytes(data)
    entries, faults = read_tar(str(path))
    assert len(entries) == 2 and "damaged" in faults[str(path)]
    path.write_bytes(data[:start])
    entries, faults = read_tar(str(path))
    assert len(entries) == 2 and "no end mark" in faults[str(path)]


def test_links_and_hostile_texts(tmp_path, samples):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    write_tar(tmp_path / "b.tar", [("a.jpg", samples[0][0]), ("a.json", b"[" * 100_000), ("a.txt", b"x" * (2 << 20))])
    assert "a link" in str(read_tar(str(tmp_path / "a.tar"))[1])
    _, faults = Tars([str(tmp_path / "b.tar")]).read()
    assert len(faults) == 2 and "too many for a caption" in str(faults) and ".json cannot be read" in str(faults)


# ---- going on


@pytest.mark.parametrize("name", ("x.pkl", "x/"))
@pytest.mark.parametrize("processes", (1, 2))
def test_goes_on_after_a_kill(clip_file, folder, store, tmp_path, name, processes):
    """Shared out tar by tar, killed after two batches each, then gone on with in one process or two."""
    out = f"{tmp_path}/{name}"

    def before(_rank):
        append = PartialStore.append

        def append_and_die(partial, keys, embeddings):
            append(partial, keys, embeddings)
            if len(partial.rows) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        PartialStore.append = append_and_die

    launch(processes, tmp_path, words(clip_file, folder, out), [-9] * processes, before)
    errors = launch(processes, tmp_path, words(clip_file, folder, out))
    assert "going on: " in errors[0]
    embeddings, captions, _ = rows(out)
    assert torch.allclose(embeddings, rows(store)[0], atol=2e-3)
    assert [c["caption"] for c in captions] == [c["caption"] for c in rows(store)[1]]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_tar_that_has_changed_is_read_again(parse, folder, samples, tmp_path):
    for path in folder.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    parse(tmp_path, f"{tmp_path}/out/x/")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*.npy"))}
    members = [m for n in (7, 6, 5, 4) for m in sample(n, *samples[n])]
    write_tar(tmp_path / "00001.tar", members)
    parse(tmp_path, f"{tmp_path}/out/x/")
    changed = [path.name for path, data in before.items() if path.read_bytes() != data]
    assert changed == ["img_emb_0001.npy"]


def test_the_index_keeps_no_pictures(folder, monkeypatch):
    """A tar is read when it is its turn, and its pictures when they are theirs."""
    monkeypatch.setattr(tars.TarMember, "read_bytes", lambda self: pytest.fail("a picture was read"))
    parts = Tars(expand_tars([str(folder)])).parts()
    pictures, skipped = parts[2].read()
    assert [type(picture) for picture in pictures] == [TarMember] * 4 and not skipped
