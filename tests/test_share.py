"""Captioners of the hub, by a stand-in of it: loaded by name, pinned, from the cache; what goes wrong, in one line."""

import json
import shutil

import pytest
import torch
from conftest import run_script, train
from hub import TOKEN, Hub, Repository
from test_scripts import one_line_error

from models.checkpoint import load_weights, save_weights
from models.predictor import Predictor
from models.pretrained import _of_the_hub, checkpoint_file


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
    folder = tmp_path / "shared"
    shutil.copytree(trained / "run_tokenizer", folder / "captioner_tokenizer")
    save_weights(folder / "captioner.safetensors", load_weights(trained / "run_latest.pt"))
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
    }  # fmt: skip
    for repository in ("me/small", "me/gated", "me/private"):
        hub.repositories[repository].commit(shared)
    hub.repositories["me/exported"].commit({"captioner.json": b'{"graphs": []}'})
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
