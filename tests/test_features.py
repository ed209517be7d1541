"""Annotations, images of any mode, the store, batches."""

import json
import os
import pickle

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from features import images
from features.annotations import image_id_of, read_annotations
from features.dataset import CaptionDataset, batches_per_epoch, epoch_batches
from features.finder import ImageFinder
from features.images import ImageError, read_image
from features.partial import PartialStore
from features.store import read_store, write_store
from models.language import load_tokenizer

COCO = {"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": [{"image_id": 7, "id": 1, "caption": "a star"}]}
KARPATHY = {
    "images": [
        {"cocoid": 7, "filename": "a.jpg", "filepath": "val2014", "split": split, "sentences": [{"raw": split}]}
        for split in ("train", "restval", "test")
    ]
}
FORMATS = {
    "list.json": json.dumps([{"image_id": "7", "caption": "a star", "extra": 1}]),
    "coco.json": json.dumps(COCO),
    "table.csv": 'image,caption,source\n7.jpg,"a star, red",mine\n',
    "table.tsv": "image\tcaption\n7.jpg\ta star\n",
    "lines.jsonl": '{"image": "7.jpg", "caption": "a star"}\n\n{"image_id": 8, "caption": "b"}\n',
}


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", FORMATS)
def test_annotation_formats(tmp_path, name):
    record = read_annotations(write(tmp_path, name, FORMATS[name]))[0]
    assert int(record["image_id"]) == 7 and record["caption"].startswith("a star")
    if name == "list.json":
        assert record["extra"] == 1
    if name == "table.csv":
        assert record["source"] == "mine" and record["file_name"] == "7.jpg"
    if name == "coco.json":
        assert record["file_name"] == "a.jpg"


def test_karpathy_splits(tmp_path):
    path = write(tmp_path, "dataset_coco.json", json.dumps(KARPATHY))
    assert [r["caption"] for r in read_annotations(path, "train")] == ["train", "restval"]
    assert [r["caption"] for r in read_annotations(path, "test")] == ["test"]
    with pytest.raises(ValueError, match="no split 'val'; it has restval, test, train"):
        read_annotations(path, "val")


BAD = {
    "cut.json": ('[{"image_id": 1, "caption": "a"},', "line 1"),
    "number.json": ("3", "none of the formats"),
    "nocaption.json": ('[{"image_id": 1, "caption": "a"}, {"image_id": 2}]', "record 2 has no 'caption'"),
    "nocaption_coco.json": ('{"annotations": [{"image_id": 2}]}', "record 1 has no 'caption'"),
    "noid.json": ('[{"caption": "a"}]', "record 1 has no 'image_id'"),
    "caption.json": ('[{"image_id": 1, "caption": null}]', "record 1 has the caption None"),
    "string.json": ('["a"]', "record 1"),
    "empty.json": ("[]", "no captions"),
    "void.json": ("", "is empty"),
    "columns.csv": ("file,text\n1.jpg,a\n", "columns file, text; it needs image and caption"),
    "fields.csv": ("image,caption\n1.jpg,a,b\n", "line 2 has not 2 fields"),
    "noimage.csv": ("image,caption\n,a\n", "line 2 has image_id"),
    "lines.jsonl": ('{"image": "1.jpg", "caption": "a"}\n{"image"\n', "line 2"),
    "sentence.json": ('{"images": [{"split": "train", "filename": "a.jpg"}]}', "image 1 lacks 'sentences'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations_are_named(tmp_path, name):
    text, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        read_annotations(write(tmp_path, name, text))
    assert name in str(error.value)


def test_image_ids():
    names = {"COCO_val2014_000000060623.jpg": 60623, "000000000139.jpg": 139, "215268662.jpg": 215268662,
             "holiday_2019.jpg": "holiday_2019", "dog.png": "dog"}  # fmt: skip
    assert {name: image_id_of(f"folder/{name}") for name in names} == names


def test_finder(photos, tmp_path):
    finder = ImageFinder([tmp_path / "none", photos])
    wanted = photos / "COCO_val2014_000000000003.jpg"
    assert finder.find({"image_id": "3"}) == wanted == finder.find({"image_id": 3})
    assert finder.find({"image_id": "x", "file_name": f"val2014/{wanted.name}"}) == wanted
    assert finder.find({"image_id": 99}) is None
    with pytest.raises(FileNotFoundError, match="--images"):
        ImageFinder([tmp_path / "none"])


# ---- images


def gradient():
    """[H, W] of 0..255 with every value."""
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_plain_rgb_is_untouched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), pixels)


def save_modes(folder):
    """Write the grey gradient in many modes; returns the names."""
    grey = gradient()
    rgb = Image.fromarray(np.stack([grey] * 3, -1))
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "grey16.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "grey16.tif")
    Image.fromarray(grey.astype(np.int32) * 257).save(folder / "grey32.tif")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "float.tif")
    rgb.quantize(256).save(folder / "palette.png")
    rgb.save(folder / "frames.gif", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")])
    rgb.convert("CMYK").save(folder / "cmyk.tif")
    rgb.convert("RGBA").save(folder / "opaque.png")
    rgb.convert("LA").save(folder / "la.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    rgb.rotate(90, expand=True).save(folder / "rotated.png", exif=exif)
    rgb.save(folder / "x.webp", lossless=True)
    names = "grey.png grey16.png grey16.tif grey32.tif float.tif palette.png frames.gif cmyk.tif opaque.png la.png"
    return [*names.split(), "rotated.png", "x.webp"]


def test_images_of_any_mode(tmp_path):
    for name in save_modes(tmp_path):
        image = read_image(tmp_path / name)
        assert image.mode == "RGB", name
        difference = np.abs(np.asarray(image).astype(int) - gradient()[..., None])
        assert difference.max() <= 1, (name, difference.max())


def test_one_bit_and_alpha(tmp_path):
    Image.fromarray(gradient() > 127).save(tmp_path / "bits.png")
    assert set(np.unique(np.asarray(read_image(tmp_path / "bits.png")))) == {0, 255}
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255
    Image.new("RGBA", (4, 4), (0, 0, 0, 127)).save(tmp_path / "half.png")
    assert 126 <= np.asarray(read_image(tmp_path / "half.png")).mean() <= 129


def test_sixteen_bit_rgb_tiff(tmp_path):
    """Pillow drops eight of its bits; tifffile keeps them."""
    pixels = np.stack([gradient().astype(np.uint16) * 257] * 3, -1)
    tifffile.imwrite(tmp_path / "deep.tif", pixels)
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.tif"))[..., 0], gradient())


def test_unreadable_images(tmp_path, photos):
    whole = sorted(photos.glob("*.jpg"))[0].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.jpg", "empty.jpg", "text.jpg", "missing.jpg"):
        with pytest.raises(ImageError):
            read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["plain.png", "float64.tif"])
def test_images_that_would_fill_the_memory(tmp_path, monkeypatch, name):
    """Refused by their header: by Pillow's limit, by the same where only tifffile reads them, by their ratio."""
    monkeypatch.setattr(images, "_max_pixels", 300)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda page: pytest.fail("it was unpacked"))
    Image.new("L", (16, 20)).save(tmp_path / "plain.png")
    tifffile.imwrite(tmp_path / "float64.tif", np.zeros((16, 20)), compression="zlib")
    with pytest.raises(ImageError, match="more than 300 pixels, the limit that --max_pixels sets"):
        read_image(tmp_path / name)
    Image.new("L", (1, 101)).save(tmp_path / "line.png")
    with pytest.raises(ImageError, match="more than 100 times as long"):
        read_image(tmp_path / "line.png")


# ---- the store


def make_store(path, rows=4, width=8):
    embedding = torch.randn(rows, width)
    captions = [{"image_id": i // 2, "caption": f"a star {i}", "clip_embedding": i // 2} for i in range(rows * 2)]
    write_store(path, embedding, captions, {"clip_model_type": "ViT-B/32"})
    return embedding, captions


def test_store_round_trip(tmp_path):
    embedding, captions = make_store(tmp_path / "x.pkl")
    store = read_store(tmp_path / "x.pkl")
    assert torch.equal(store.clip_embedding, embedding) and store.captions == captions
    assert store.info == {"clip_model_type": "ViT-B/32"}
    with open(tmp_path / "x.pkl", "rb") as file:  # as the predecessors' train.py reads it
        plain = pickle.load(file)
    assert torch.equal(plain["clip_embedding"], embedding) and plain["captions"] == captions


def test_numpy_embeddings_are_read(tmp_path):
    embedding = np.random.default_rng(0).random((2, 8), dtype=np.float32)
    value = {"clip_embedding": embedding, "captions": [{"image_id": 1, "caption": "a", "clip_embedding": 1}]}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    assert np.array_equal(read_store(tmp_path / "x.pkl").clip_embedding.numpy(), embedding)


class Hostile:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    (
        (os.system, ("echo reached > reached.txt",)),
        (eval, ("open('reached.txt', 'w')",)),
        (torch.load, ("x",)),
        (getattr, ("x", "upper")),
    ),
)
def test_store_with_code_is_refused(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    value = {"clip_embedding": torch.ones(1, 8), "captions": [Hostile(call)]}
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match="evil.pkl asks for .*could run code"):
        read_store(tmp_path / "evil.pkl")
    assert not (tmp_path / "reached.txt").exists()


def test_code_inside_a_tensors_bytes_is_refused(tmp_path, monkeypatch):
    """torch's own rebuild function loads the storage with the unrestricted unpickler; ours does not."""
    monkeypatch.chdir(tmp_path)
    inner = pickle.dumps(Hostile((os.system, ("echo reached > reached.txt",))))
    value = {"clip_embedding": Hostile((torch.storage._load_from_bytes, (inner,))), "captions": []}
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match="evil.pkl"):
        read_store(tmp_path / "evil.pkl")
    assert not (tmp_path / "reached.txt").exists()


BROKEN = {
    "no caption": ({"captions": []}, "no captions"),
    "a row too far": ({"captions": [{"caption": "a", "clip_embedding": 4}]}, "caption 1 points at embedding 4"),
    "no text": ({"captions": [{"caption": None, "clip_embedding": 0}]}, "caption 1 has no text"),
    "nan": ({"clip_embedding": torch.full((4, 8), torch.nan)}, "row 0 holds NaN"),
    "shape": ({"clip_embedding": torch.ones(4)}, "not \\[N, D\\]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_stores_are_named(tmp_path, name):
    change, message = BROKEN[name]
    good = {"clip_embedding": torch.ones(4, 8), "captions": [{"image_id": 1, "caption": "a", "clip_embedding": 0}]}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(good | change))
    with pytest.raises(ValueError, match=message):
        read_store(tmp_path / "x.pkl")


def test_partial_store_survives_a_cut(tmp_path):
    encoder = {"name": "x", "sha256": None, "embed_dim": 4}
    partial = PartialStore(tmp_path / "x.pkl", encoder)
    first, second = torch.randn(2, 4), torch.randn(3, 4)
    partial.append([("a", 1), ("b", 1)], first)
    partial.append([("c", 1), ("d", 1), ("e", 1)], second)
    partial.close()
    journal, data = partial.folder / "journal.jsonl", partial.folder / "embeddings.f32"
    journal.write_bytes(journal.read_bytes()[:-5])  # killed while the second line was written
    data.write_bytes(data.read_bytes() + b"xyz")
    again = PartialStore(tmp_path / "x.pkl", encoder)
    assert set(again.rows) == {("a", 1), ("b", 1)}
    again.append([("c", 1)], second[:1])
    assert torch.equal(again.embeddings([("c", 1), ("a", 1)])[:], torch.stack([second[0], first[0]]))
    again.close()
    other = PartialStore(tmp_path / "x.pkl", encoder | {"name": "y"})
    assert not other.rows
    other.remove()
    assert not other.folder.exists()


# ---- batches


def test_batches(language_model, tmp_path):
    tokenizer = load_tokenizer(str(language_model))
    make_store(tmp_path / "x.pkl")
    store = read_store(tmp_path / "x.pkl")
    store.captions[2]["caption"] = "a large red star on the snow!"
    store.captions[3]["caption"] = ""
    dataset = CaptionDataset(store, tokenizer)
    assert len(dataset) == 7
    tokens, embeddings, lengths = dataset.batch([2, 0])
    assert tokens.shape == (2, lengths.max()) and tokenizer.decode(tokens[0]) == "a large red star on the snow!"
    assert tokenizer.decode(tokens[1, : lengths[1]]) == "a star 0"
    assert torch.equal(embeddings, store.clip_embedding[[1, 0]])
    assert CaptionDataset(store, tokenizer, max_tokens=2).batch([0])[0].shape == (1, 2)


def test_every_caption_once_per_epoch():
    first = epoch_batches(103, 10, seed=1, epoch=0)
    assert len(first) == batches_per_epoch(103, 10) == 10
    assert len(set(np.concatenate(first))) == 100
    assert np.array_equal(np.concatenate(first), np.concatenate(epoch_batches(103, 10, 1, 0)))
    assert not np.array_equal(np.concatenate(first), np.concatenate(epoch_batches(103, 10, 1, 1)))
    assert [len(batch) for batch in epoch_batches(3, 10, 0, 0)] == [3]


def test_group_by_length_keeps_every_caption():
    lengths = np.random.default_rng(0).integers(5, 50, 1003)
    batches = epoch_batches(1003, 10, 1, 0, lengths)
    assert len(set(np.concatenate(batches))) == 1000
    padding = [sum(lengths[batch].max() - lengths[batch]) for batch in batches]
    plain = [sum(lengths[batch].max() - lengths[batch]) for batch in epoch_batches(1003, 10, 1, 0)]
    assert sum(padding) < sum(plain) / 5
    assert np.corrcoef(range(100), [lengths[batch].max() for batch in batches])[0, 1] < 0.5  # not shortest first


def test_captions_are_tokenised_once(language_model, tmp_path):
    tokenizer = load_tokenizer(str(language_model))
    make_store(tmp_path / "x.pkl")
    seen = []

    def counting(texts, **options):
        seen.extend(texts)
        return tokenizer(texts, **options)

    dataset = CaptionDataset(read_store(tmp_path / "x.pkl"), counting)
    order = [np.array([2, 0]), np.array([1, 3]), np.array([0, 3])]
    passes = [[tokens.tolist() for tokens, _, _ in dataset.batches(order)] for _ in range(2)]
    assert sorted(seen) == sorted(dataset.store.captions[i]["caption"] for i in range(4))
    assert passes[0] == passes[1] == [dataset.batch(indices)[0].tolist() for indices in order]


def test_encoder_takes_what_a_cache_holds(clip_file, monkeypatch):
    """On a CPU, batches are split evenly by the largest output of an image's layers; rows stay in order."""
    from encoders import base, load_encoder

    pixels, sizes = torch.randn(7, 3, 32, 32), []
    whole = load_encoder(clip_file)
    expected = whole.encode_images(pixels)
    assert whole.most > 7
    monkeypatch.setattr(base, "CACHED", 3 * base.CACHED // whole.most)
    encoder = load_encoder(clip_file)
    encode = encoder.model.encode_image
    monkeypatch.setattr(encoder.model, "encode_image", lambda batch: sizes.append(len(batch)) or encode(batch))
    assert torch.allclose(encoder.encode_images(pixels[:1]), expected[:1], atol=1e-5) and sizes == [1]
    assert torch.allclose(encoder.encode_images(pixels), expected, atol=1e-5)
    assert torch.allclose(encoder.encode_images(pixels[:4]), expected[:4], atol=1e-5)
    assert sizes == [1, 1, 3, 2, 2, 2, 2]  # one to see how large the outputs are, then seven, then four


def test_encoder_remembers_what_fits_the_memory(clip_file, monkeypatch, capsys):
    """A device that takes three images: four are halved once, and what follows comes in twos."""
    from encoders import load_encoder

    encoder, sizes = load_encoder(clip_file), []
    pixels, encode = torch.randn(5, 3, 32, 32), encoder.model.encode_image
    expected = encoder.encode_images(pixels)

    def small_device(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        return encode(batch)

    monkeypatch.setattr(encoder.model, "encode_image", small_device)
    parts = torch.cat([encoder.encode_images(pixels[:4]), encoder.encode_images(pixels[4:])])
    assert torch.allclose(parts, expected, atol=1e-5)
    assert torch.allclose(encoder.encode_images(pixels), expected, atol=1e-5) and sizes == [4, 2, 2, 1, 2, 2, 1]
    assert capsys.readouterr().err.count("do not fit") == 1
