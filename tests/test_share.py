"""Captioners of the hub, by a stand-in of it: loaded by name, pinned, from the cache; what goes wrong, in one line."""

import contextlib
import io
import json
import re
import shutil

import pytest
import torch
from conftest import run_process, run_script, train
from hub import TOKEN, Hub, Repository
from test_scripts import one_line_error
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from encoders import encoder_sha256, names
from models.captioner_files import is_export
from models.checkpoint import load_weights, save_weights
from models.predictor import Predictor
from models.pretrained import _of_the_hub, checkpoint_file
from utils.files import read_json, sha256, write_json


def hub_is(monkeypatch, address, cache, offline=False):
    """Let huggingface_hub, which reads its environment once, know a hub and a cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    _of_the_hub.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of small captioners, with an empty cache."""
    with Hub() as server:
        hub_is(monkeypatch, server.address, tmp_path / "cache")
        yield server
    _of_the_hub.cache_clear()


@pytest.fixture
def shared(trained, tmp_path):
    """The files of a small captioner as it is shared: {path: bytes}."""
    folder, weights = tmp_path / "shared", load_weights(trained / "run_latest.pt")
    shutil.copytree(trained / "run_tokenizer", folder / "captioner_tokenizer")
    del weights["gpt.lm_head.weight"]  # which is the input embeddings
    save_weights(folder / "captioner.safetensors", weights)
    shutil.copy(trained / "run.json", folder / "captioner.json")
    return contents(folder)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def other_weights(files):
    """Return the same files with other weights."""
    from safetensors.torch import load, save

    weights = {name: tensor + 1.0 for name, tensor in load(files["captioner.safetensors"]).items()}
    return {"captioner.safetensors": save(weights)}


def captions(photos, checkpoint, runner=run_script, **options):
    return runner("predict.py", photos, "--checkpoint", checkpoint, **options).stdout.splitlines()


def test_load_by_name(hub, shared, photos, trained, monkeypatch, tmp_path):
    """The same captions as from the file; the newest unless pinned; from the cache without a hub."""
    hub.repositories["me/small"] = repository = Repository()
    first = repository.commit(shared)
    expected = captions(photos, trained / "run_latest.pt")
    assert captions(photos, "me/small") == captions(photos, "hf-hub:me/small") == expected
    asked = [path for method, path in hub.asked if method == "GET"]
    assert sum("safetensors" in path for path in asked) == 1
    second = repository.commit(other_weights(shared))
    _of_the_hub.cache_clear()
    assert captions(photos, "me/small") != expected
    assert captions(photos, f"me/small@{first}") == expected
    checkpoint_file("me/small", with_weights=False)
    repository.commit(shared)
    assert second in str(checkpoint_file("me/small"))  # what was asked first is what is loaded
    hub.asked.clear()
    _of_the_hub.cache_clear()
    assert first in str(checkpoint_file(f"me/small@{first}")) and not hub.asked  # what is here is not asked for
    hub_is(monkeypatch, hub.address, tmp_path / "cache", offline=True)
    assert captions(photos, f"me/small@{first}") == expected != captions(photos, "me/small")
    assert second in str(checkpoint_file("me/small")) and not hub.asked
    done = run_script("predict.py", photos, "--checkpoint", "me/other", check=2)
    one_line_error(done, "HF_HUB_OFFLINE is set", "me/other is not whole in the cache", "hf download me/other")


def test_folder_of_that_name_wins(hub, shared, photos, tmp_path, monkeypatch):
    hub.repositories["me/small"] = Repository()
    for name, content in shared.items():
        path = tmp_path / "me" / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert len(captions(photos, "me/small")) == 12 and not hub.asked
    one_line_error(
        run_script("predict.py", photos, "--checkpoint", "hf-hub:me/small", check=2), "holds no captioner", "me/small"
    )


def test_training_starts_from_the_hub(hub, shared, trained, store, language_model, tmp_path):
    hub.repositories["me/small"] = Repository()
    hub.repositories["me/small"].commit(shared)
    weights = []
    for source in ("me/small", trained / "run_latest.pt"):
        train(store, language_model, tmp_path / "out", "--init_from", source, "--epochs", 1)
        weights.append(torch.load(tmp_path / "out/run_latest.pt", weights_only=True))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    reward = ("--data", store, "--out_dir", tmp_path / "scst", "--epochs", 1, "--bs", 4, "--device", "cpu")
    done = run_script("train_scst.py", "--init_from", "me/none", *reward, check=2)
    one_line_error(done, "--init_from", "me/none is no file here", "the hub shows no me/none")


def encoder_elsewhere(files):
    """Return the files with an encoder that nobody has."""
    described = json.loads(files["captioner.json"])
    described["model"] |= {"clip_model_type": "gone.pt", "clip_sha256": "0" * 64}
    return {**files, "captioner.json": json.dumps(described).encode()}


@pytest.mark.parametrize(
    ("name", "words"),
    (
        ("me/none", ("me/none is no file here", "the hub shows no me/none", "hf auth login")),
        ("hf-hub:me/gated", ("me/gated is gated", "accept its terms at http")),
        ("me/private", ("401", "me/private", "hf auth login")),
        ("me/small@v9", ("me/small has no revision v9", "/commits/main")),
        ("me/empty", ("me/empty holds no captioner", "captioner.json")),
        ("me/exported", ("me/exported holds an exported captioner", "clipcap DIR")),
        ("me/moved", ("gone.pt", "--clip_model_type FILE")),
        ("me/program", ("me/program has a TorchScript program as its encoder", "state_dict()")),
        ("me/no-weights", ("me/no-weights holds no captioner", "captioner.safetensors")),
        ("hf-hub:small", ("hf-hub:small names no repository", "hf-hub:ORG/NAME[@REVISION]")),
        ("me/small.pt", ("checkpoint me/small.pt does not exist",)),
        ("hf-hub:me/a..b", ("me/a..b",)),
    ),
)
def test_what_cannot_be_loaded(hub, shared, photos, monkeypatch, name, words):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    hub.repositories |= {
        "me/small": Repository(), "me/gated": Repository(gated=True), "me/private": Repository(private=True),
        "me/empty": Repository(), "me/exported": Repository(), "me/moved": Repository(), "me/no-weights": Repository(),
        "me/program": Repository(),
    }  # fmt: skip
    for repository in ("me/small", "me/gated", "me/private"):
        hub.repositories[repository].commit(shared)
    hub.repositories["me/exported"].commit({"captioner.json": b'{"graphs": []}'})
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), photos.parent / "program.pt")
    hub.repositories["me/program"].commit({**shared, "encoder.pt": (photos.parent / "program.pt").read_bytes()})
    hub.repositories["me/moved"].commit(encoder_elsewhere(shared))
    hub.repositories["me/no-weights"].commit({"captioner.json": shared["captioner.json"]})
    done = run_script("predict.py", photos, "--checkpoint", name, check=2)
    one_line_error(done, *words)
    assert len(done.stderr.strip().splitlines()) <= 3 and "hf_wrong" not in done.stderr


def test_broken_download(hub, shared, photos, monkeypatch):
    """A file that breaks off is an error, however often it is tried, and the next run fetches it anew."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.repositories["me/small"] = Repository()
    hub.repositories["me/small"].commit(shared)
    hub.cut = "captioner.safetensors"
    one_line_error(run_script("predict.py", photos, "--checkpoint", "me/small", check=2), "me/small", "run the same")
    hub.cut = None
    assert len(captions(photos, "me/small")) == 12


def test_hub_that_is_down(hub, shared, photos, monkeypatch, tmp_path):
    """What is in the cache is taken, with a word; what is not, is an error at once."""
    hub.repositories["me/small"] = Repository()
    hub.repositories["me/small"].commit(shared)
    expected = captions(photos, "me/small")
    hub_is(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    done = run_script("predict.py", photos, "--checkpoint", "me/small")
    assert done.stdout.splitlines() == expected and "the hub does not answer: me/small is taken as" in done.stderr
    done = run_script("predict.py", photos, "--checkpoint", "me/other", check=2)
    one_line_error(done, "http://127.0.0.1:9 does not answer", "me/other", "hf download")


def test_servers_take_repositories(hub, shared, photos, tmp_path):
    """The page's and cog's captioners are Predictor's; what names no repository is refused before they start."""
    cog_predict = pytest.importorskip("cog_predict")
    hub.repositories["me/small"] = Repository()
    hub.repositories["me/small"].commit(shared)
    predictor = Predictor()
    predictor.setup({"own": "me/small"})
    picture = sorted(photos.glob("*.jpg"))[0]
    assert predictor.predict(str(picture)) == captions(photos, "me/small")[0].split("\t")[1]
    cog_predict.check_own("me/small", None)
    for name in ("me/small.pt", "small"):
        with pytest.raises(FileNotFoundError, match="nor ORG/NAME"):
            cog_predict.check_own(name, None)


# ---- pushing


@pytest.fixture(scope="session")
def scores_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    spans = {"Bleu_4": [0.3, 0.4], "CIDEr": None}
    write_json(path, {
        "metrics": {"Bleu_4": 0.35, "CIDEr": None}, "intervals": spans, "captions": "/home/me/captions.json",
        "references": "/home/me/captions_val2014.json", "images": 5000, "tokenizer": "java",
        "bootstrap": {"method": "1,000 samples"},
    })  # fmt: skip
    return path


def pushed(checkpoint, repository, *flags, **options):
    return run_script("export.py", "--checkpoint", checkpoint, "--push", repository, *flags, **options)


def test_push_and_load(hub, trained, photos, scores_file, tmp_path, monkeypatch):
    """The same captions, pushed on too; the card's own commands; no folder of this machine in what is uploaded."""
    done = pushed(
        trained / "run_latest.pt", "me/small", "--format", "torch", "--license", "mit", "--scores", scores_file
    )
    (first, files) = hub.repositories["me/small"].commits[-1]
    assert done.stdout == f"{hub.address}/me/small commit {first}\n"
    assert set(files) >= {"captioner.safetensors", "captioner.json", "encoder.pt", "README.md"}
    expected = captions(photos, trained / "run_latest.pt")
    monkeypatch.chdir(photos)
    assert captions(photos, "me/small") == expected
    said = files["README.md"].decode()
    assert said.startswith("---\nlicense: mit\nlibrary_name: clipcap\npipeline_tag: image-to-text\ntags:\n")
    for word in (
        "| Bleu_4 | 0.350 | 0.300 to 0.400 |",
        "5,000 images",
        "`--bs` | 4 |",
        "`--seed` | 0 |",
        "captions_val2014.json",
    ):
        assert word in said
    assert read_json(trained / "run.json")["model"]["clip_sha256"] in said
    for name in ("README.md", "captioner.json"):
        assert not re.search(rb"/(tmp|home|work)\b", files[name]), name
    shutil.copy(sorted(photos.glob("*.jpg"))[0], tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    [bash, python] = re.findall(r"```(?:bash|python)\n(.*?)```", said, re.DOTALL)
    assert run_script(*bash.split()[1:]).stdout.split("\t")[1] == expected[0].split("\t")[1] + "\n"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(python, "card", "exec"), {})
    assert printed.getvalue().strip() == expected[0].split("\t")[1]
    pushed(f"me/small@{first}", "me/small", "--format", "torch", "--use_beam_search")
    assert len(hub.repositories["me/small"].commits) == 3
    _of_the_hub.cache_clear()
    assert (
        captions(photos, "me/small")
        == run_script(
            "predict.py", photos, "--checkpoint", f"me/small@{first}", "--use_beam_search"
        ).stdout.splitlines()
    )
    assert "None were given." in hub.repositories["me/small"].commits[-1][1]["README.md"].decode()


@pytest.mark.slow
def test_push_of_an_export(hub, trained, photos, tmp_path):
    """The folder is uploaded as it lies there, and captions after a download of it."""
    pytest.importorskip("onnxruntime")
    from huggingface_hub import snapshot_download

    picture, out = sorted(photos.glob("*.jpg"))[0], tmp_path / "out"
    pushed(trained / "run_latest.pt", "me/graphs", "--out", out, "--check", picture, "--private")
    assert hub.repositories["me/graphs"].private
    files = hub.repositories["me/graphs"].commits[-1][1]
    assert files == contents(out) and b"clipcap graphs photo.jpg" in files["README.md"]
    assert is_export(snapshot_download("me/graphs"))
    done = pushed(trained / "run_latest.pt", "me/graphs", "--format", "torch", check=2)
    one_line_error(done, "me/graphs holds a captioner of --format onnx", "another repository")


@pytest.mark.parametrize(
    ("repository", "flags", "words"),
    (
        ("small", (), ("--push small is not ORG/NAME",)),
        ("me/small@v1", (), ("is not ORG/NAME",)),
        ("others/small", (), ("others/small", "403", "hf auth login")),
        ("me/public", ("--private",), ("--private: me/public is there and public",)),
        ("me/small", ("--license", "MIT licence"), ("--license", "such as mit")),
        ("me/small", ("--dtype", "int8"), ("--dtype int8 is for --format onnx",)),
        ("me/small", ("--scores", "run.json"), ("--scores run.json", "evaluate.py")),
        ("me/a..b", (), ("me/a..b",)),
    ),
)
def test_what_cannot_be_pushed(hub, trained, monkeypatch, repository, flags, words):
    monkeypatch.chdir(trained)
    hub.repositories["me/public"] = Repository()
    done = pushed("run_latest.pt", repository, "--format", "torch", *flags, check=2)
    one_line_error(done, *words)
    assert TOKEN not in done.stdout + done.stderr and set(hub.repositories) == {"me/public"}
    assert len(hub.repositories["me/public"].commits) == 1


def test_push_needs_a_token(hub, trained, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for token, said in (("hf_expired", "401"), ("", "no token")):
        monkeypatch.setenv("HF_TOKEN", token)
        done = pushed(trained / "run_latest.pt", "me/small", "--format", "torch", check=2)
        one_line_error(done, "me/small", said, "hf auth login")
        assert "hf_expired" not in done.stderr and not hub.repositories
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for address, offline, said in ((hub.address, True, "HF_HUB_OFFLINE"), ("http://127.0.0.1:9", False, "me/small")):
        hub_is(monkeypatch, address, tmp_path, offline)
        one_line_error(pushed(trained / "run_latest.pt", "me/small", "--format", "torch", check=2), said)
    for flags, word in ((("--license", "mit", "--out", "x"), "--push"), ((), "--out DIR")):
        one_line_error(run_script("export.py", "--checkpoint", "demo", *flags, check=2), word)


@pytest.mark.slow
def test_in_processes(shared, photos, trained, tmp_path):
    """As the environment says it: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE."""
    variables = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with Hub() as hub:
        hub.repositories["me/small"] = Repository()
        hub.repositories["me/small"].commit(shared)
        variables["HF_ENDPOINT"] = hub.address
        found = captions(photos, "me/small", run_process, env=variables)
    assert found == captions(photos, trained / "run_latest.pt")
    variables["HF_HUB_OFFLINE"] = "1"
    assert found == captions(photos, "me/small", run_process, env=variables)


def test_encoder_folders_travel(hub, trained, tmp_path, monkeypatch, photos):
    """An encoder that is a folder is uploaded as one and found beside the json."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=32,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "tower")
    CLIPImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "tower")
    shutil.copytree(trained, tmp_path / "run")
    described = read_json(tmp_path / "run/run.json")
    name = f"hf:{tmp_path / 'tower'}"
    described["model"] |= {"clip_model_type": name, "clip_sha256": encoder_sha256(name)}
    write_json(tmp_path / "run/run.json", described)
    expected = captions(photos, tmp_path / "run/run_latest.pt")
    pushed(tmp_path / "run/run_latest.pt", "me/tower", "--format", "torch")
    shutil.rmtree(tmp_path / "tower")
    assert captions(photos, "me/tower") == expected


def test_copies_of_published_encoders_stay_where_they_are(hub, trained, clip_file, monkeypatch):
    monkeypatch.setitem(names.OPENAI_NAMES, "ViT-B/32", sha256(clip_file))
    pushed(trained / "run_latest.pt", "me/small", "--format", "torch")
    _, files = hub.repositories["me/small"].commits[-1]
    assert json.loads(files["captioner.json"])["model"]["clip_model_type"] == "ViT-B/32" and "encoder.pt" not in files
