"""export.py and runtime/: what the runtime shares with the main code is the same, picture by picture, word for word."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from test_scripts import one_line_error
from tokenizers import Tokenizer
from torchvision import transforms

sys.path.append(str(ROOT / "runtime"))
onnxruntime = pytest.importorskip("onnxruntime")

import clipcap_runtime  # noqa: E402
from clipcap_runtime import command, images, searches  # noqa: E402

from encoders import load_encoder  # noqa: E402
from exporting.pictures import preprocessing  # noqa: E402
from features import images as ours  # noqa: E402
from features.arrays import from_array  # noqa: E402
from models.captioner import Captioner  # noqa: E402
from models.language import load_tokenizer  # noqa: E402
from models.searches import Beam, Greedy, Nucleus, _draws, decode  # noqa: E402
from models.settings import BEAM, SAMPLE, DecodingConfig  # noqa: E402
from models.stopping import Stop  # noqa: E402

SCENES = sorted((ROOT / "demo" / "images").glob("*.jpg"))


# ---- pictures


def write_pictures(folder):
    """Write one picture of every mode and orientation; returns their paths."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (37, 51, 3), dtype=np.uint8))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        colour.convert(mode).save(folder / f"{mode}.png")
    for mode in ("L", "RGB", "RGBA", "CMYK"):
        colour.convert(mode).save(folder / f"{mode}.tif")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 2**16, (40, 30), dtype=np.uint16)).save(folder / "16.png")
    Image.fromarray(rng.integers(0, 2**16, (40, 30), dtype=np.uint16)).save(folder / "16.tif")
    Image.fromarray(rng.random((40, 30), dtype=np.float32)).save(folder / "f.tif")
    colour.convert("P").save(folder / "t.png", transparency=3)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        colour.save(folder / f"turned{orientation}.jpg", exif=exif)
    return sorted(folder.iterdir())


def preprocess_of(encoder):
    return images.Preprocess(**preprocessing(encoder))


def test_pixels_are_equal(tmp_path, clip_file):
    encoder = load_encoder(str(clip_file))
    preprocess = preprocess_of(encoder)
    for path in write_pictures(tmp_path):
        expected, found = ours.read_image(path), images.read_image(path)
        assert expected.tobytes() == found.tobytes() and expected.size == found.size, path
        assert np.array_equal(encoder.preprocess(expected).numpy(), preprocess(found)), path
    for array in (np.eye(9), np.eye(9, dtype=bool), np.arange(48, dtype=np.uint16).reshape(4, 4, 3)):
        assert from_array(array).tobytes() == images.from_array(array).tobytes()


@pytest.mark.parametrize("crop", ([20, 20], [61, 50], [40, 75], [90, 33]))
def test_middles_are_torchvisions(crop):
    """Smaller than the picture, larger, or either; each odd pixel where torchvision has it."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (47, 70, 3), dtype=np.uint8))
    expected = transforms.ToTensor()(transforms.CenterCrop(crop)(picture)).numpy()
    assert np.array_equal(images.Preprocess(None, None, crop, [0] * 3, [1] * 3)(picture), expected)


def test_what_pillow_reads_wrong_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for number, photometric in enumerate(("miniswhite", "rgb")):
        shape = (20, 20, 3) if photometric == "rgb" else (20, 20)
        tifffile.imwrite(tmp_path / f"{number}.tif", np.zeros(shape, np.uint16), photometric=photometric)
        with pytest.raises(images.ImageError, match="rare kind"):
            images.read_image(tmp_path / f"{number}.tif")


# ---- searches


class Table:
    """A language model whose next logits hang on a row's tokens alone, for either kind of search."""

    def __init__(self, images, vocabulary):
        self.vocabulary, self.rows = vocabulary, [(image,) for image in range(images)]
        self.first = torch.from_numpy(self.logits())

    def logits(self):
        rows = [np.random.default_rng([1, *row]).standard_normal(self.vocabulary) * 3 for row in self.rows]
        return np.array(rows, np.float32)

    def select(self, sources):
        self.rows = [self.rows[source] for source in sources]

    def __call__(self, tokens, sources=None):
        if sources is not None:
            self.select(sources)
        self.rows = [(*row, int(token)) for row, token in zip(self.rows, tokens, strict=True)]
        return torch.from_numpy(self.logits()) if sources is None else self.logits()


@pytest.mark.parametrize("length", (1, 12))
def test_searches_are_equal(length):
    config = DecodingConfig(entry_length=length, beam_size=4, num_captions=3, method=SAMPLE, top_p=0.8, seed=5)
    keys, ends = [b"a", b"b", b"c"], {0, 3}
    ended = lambda tokens: tokens[-1] in ends  # noqa: E731
    stop = lambda tokens, _: torch.isin(tokens, torch.tensor(sorted(ends)))  # noqa: E731
    for search, found in (
        (Greedy(config, stop), lambda step: searches.greedy(step, step.first.numpy(), ended, length)),
        (Nucleus(config, stop, keys), lambda s: searches.sample(s, s.first.numpy(), ended, length, keys, 3, 0.8, 5)),
        (Beam(config, stop), lambda s: searches.beam(s, s.first.numpy(), ended, length, 4, 1.0, 3)),
    ):
        expected, groups = decode(Table(3, 30), search), found(Table(3, 30))
        assert [[c.tokens for c in group] for group in groups] == [[c.tokens for c in group] for group in expected]
        for group, others in zip(groups, expected, strict=True):
            assert [c.logprob for c in group] == pytest.approx([c.logprob for c in others], rel=1e-4)


def test_random_numbers_are_torchs():
    config = DecodingConfig(method=SAMPLE, num_captions=2, seed=7, entry_length=40)
    found = [searches._draws(f"7 {candidate} ".encode() + b"key", 40) for candidate in range(2)]
    assert np.array_equal(_draws([b"key"], config).numpy(), np.stack(found))


def test_stop_is_equal(language_model):
    tokenizer = load_tokenizer(str(language_model))
    own = Tokenizer.from_file(str(language_model / "tokenizer.json"))
    for text in (".", "on the", "<|endoftext|>", ""):
        expected, stop = Stop(tokenizer, text, len(tokenizer), [0]), searches.Stop(own, text, [0])
        for said in ("a small red star on the grass. a", "a small"):
            tokens = tokenizer.encode(said)
            for end in range(1, len(tokens) + 1):
                newest = torch.tensor(tokens[end - 1 : end])
                assert bool(expected(newest, lambda _, end=end, ids=tokens: ids[:end])[0]) == stop(tokens[:end])
            assert expected.text_until(tokens) == stop.text_until(tokens)
    with pytest.raises(ValueError, match="no token"):
        searches.Stop(Tokenizer.from_str(own.to_str().replace('"normalizer":null', '"normalizer":{"type":"Strip","strip_left":true,"strip_right":true}')), " ", [0])  # noqa: E501  # fmt: skip


# ---- the whole way


@pytest.fixture(scope="module", params=("fp32", "int8", "int4"))
def exported(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / request.param
    done = run_script("export.py", "--checkpoint", "demo", "--out", out, "--dtype", request.param)
    assert f"of {len(SCENES)} captions" in done.stderr
    return out


@pytest.mark.slow
def test_captions_are_predicts(exported, capsys):
    for flags in ((), ("--use_beam_search",), ("--top_p", "0.9", "--num_captions", "3", "--seed", "4")):
        expected = run_script("predict.py", *SCENES, "--checkpoint", "demo", *flags, "--device", "cpu").stdout
        command.main([str(exported), *map(str, SCENES), *flags, "--batch_size", "3"])
        said = capsys.readouterr().out
        assert said.count("\t") == expected.count("\t")
        if exported.name == "fp32":
            assert said == expected
        else:
            assert sum(a == b for a, b in zip(said.split("\n"), expected.split("\n"), strict=True)) > 3


@pytest.mark.slow
def test_inputs_of_every_kind(exported):
    captioner, path = clipcap_runtime.Captioner(exported, threads=1), SCENES[0]
    text = captioner.caption(path)
    image = Image.open(path)
    assert captioner.caption([str(path), image, np.asarray(image)]) == [text] * 3
    embeddings = Captioner("demo", device="cpu").encoder.encode_images(
        torch.from_numpy(captioner.preprocess(images.read_image(path)))[None]
    )
    assert captioner.caption_embeddings(embeddings.numpy())[0][0].text == text
    prompted = captioner.captions([path], prompt="There is", method="beam", num_captions=2)[0]
    assert len(prompted) == 2 and prompted[0].text != text
    for given, said in (({"beams": 3}, "no setting"), ({"top_p": 2}, "at most 1"), ({"num_captions": 2}, "more than")):
        with pytest.raises(ValueError, match=said):
            captioner.caption(path, **given)
    with pytest.raises(ValueError, match="embeddings are"):
        captioner.caption_embeddings(np.zeros((1, 7)))


@pytest.mark.slow
def test_bad_input_is_one_line(exported, tmp_path, capsys):
    def fails(folder, *paths):
        with pytest.raises(SystemExit) as end:
            command.main([str(folder), *map(str, paths)])
        out, err = capsys.readouterr()
        assert end.value.code == 2 and "Traceback" not in err
        return out, err

    copy = shutil.copytree(exported, tmp_path / "copy")
    described = json.loads((copy / "captioner.json").read_text())
    (tmp_path / "none.jpg").write_text("a text")
    out, err = fails(exported, tmp_path / "none.jpg", SCENES[0])
    assert out.count("\t") == 1 and "skipped" in err and "1 of 2 images could not be read; the others" in err
    assert "no image file" in fails(exported, tmp_path / "nothing.jpg")[1]
    assert "no captioner.json" in fails(tmp_path, SCENES[0])[1]
    (copy / "captioner.json").write_text(json.dumps(described | {"format": 1}))
    assert "format 1" in fails(copy, SCENES[0])[1]
    without = {name: value for name, value in described.items() if name != "graphs"}
    for damaged in (described | {"shape": None}, described | {"decoding": {"method": "none"}}, without, [1]):
        (copy / "captioner.json").write_text(json.dumps(damaged))
        assert "captioner.json is damaged" in fails(copy, SCENES[0])[1]
    (copy / "captioner.json").write_text(json.dumps(described)[:200])
    assert "captioner.json is damaged" in fails(copy, SCENES[0])[1]
    (copy / "captioner.json").write_text(json.dumps(described))
    for name, size in (("tokenizer.json", 500), ("step.onnx", 4000), ("weights.bin", 1000)):
        os.truncate(copy / name, size)
        err = fails(copy, SCENES[0])[1]
        assert name in err and "is damaged (" in err and err.count("\n") == 1 and "export the captioner again" in err
        with pytest.raises(ValueError, match="is damaged"):
            clipcap_runtime.Captioner(copy)
        shutil.copy(exported / name, copy / name)
    (tmp_path / "folder.jpg").mkdir()
    assert "not a file" in fails(exported, tmp_path / "*.jpg")[1]
    (copy / "step.onnx").unlink()
    assert "lacks step.onnx" in fails(copy, SCENES[0])[1]


@pytest.mark.slow
def test_what_cannot_be_exported(exported, tmp_path):
    words = ("export.py", "--checkpoint", "demo", "--out")
    one_line_error(run_script(*words, tmp_path, "--rerank", "mbr", check=2), "does not rerank")
    (tmp_path / "mine").write_text("kept")
    one_line_error(run_script(*words, tmp_path, check=2), "is no exported captioner")
    assert (tmp_path / "mine").read_text() == "kept"


@pytest.mark.slow
def test_runs_without_torch(exported, tmp_path):
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    source = shutil.copytree(ROOT / "runtime", tmp_path / "runtime")
    subprocess.run([python, "-m", "pip", "install", "--quiet", source], check=True)
    said = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in said.stderr
    done = subprocess.run([Path(python).parent / "clipcap", exported, SCENES[0]], capture_output=True, text=True)
    text = clipcap_runtime.Captioner(exported).caption(SCENES[0])
    assert done.stdout == f"{SCENES[0]}\t{text}\n", done.stderr


@pytest.mark.slow
def test_an_operator_without_onnx_is_named(tmp_path):
    from exporting.graphs import _export

    class Bad(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    whole = torch.nn.Sequential(torch.nn.Linear(3, 3), Bad())
    with pytest.raises(ValueError, match="linalg_eig") as error:
        _export("step", tmp_path / "x.onnx", whole, (torch.eye(3),), ({},), ["x"], ["y"])
    assert "\n" not in str(error.value)


def test_settings_are_known():
    assert set(replace(DecodingConfig(), method=BEAM).__dict__) >= set(clipcap_runtime.captioner.SETTINGS)


def test_runtime_stays_small():
    files = (ROOT / "runtime" / "clipcap_runtime").glob("*.py")
    assert sum(len(file.read_text().splitlines()) for file in files) <= 600
