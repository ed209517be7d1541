"""Small models and data, made once per test session: everything runs on the CPU without a network."""

import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from demo.world.train_gpt2 import train_bpe
from training.log import TrainingLog
from utils.cli import run

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# the ten pictures that the page offers; 200002 is there for those whose commands name it
SAMPLES = sorted(path for path in (ROOT / "demo" / "images").iterdir() if path.name != "200002.jpg")
EMBED_DIM = 32
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the models are too small for more
# A first backward pass starts a thread for each kind of device that is known, and a forked process cannot train where
# there is one. Exports make up a GPU (torch's FakeTensorMode), so the first backward pass is now, before them.
torch.ones(1, requires_grad=True).sum().backward()


def slow_but(values, *quick):
    """Return a test's parameters, all but the `quick` ones among the slow tests: they prove the same of other parts."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(autouse=True)
def small_plots():
    """A pixel where a small training would draw its loss, which takes a third of its time; session fixtures draw it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLog, "plot", lambda _log, path: Image.new("L", (1, 1)).save(path))
        yield


def mean_loss(model, tokens, clip_embedding, lengths):
    """Return the paper's loss: the mean cross-entropy over all caption tokens."""
    return -model.token_logprobs(tokens, clip_embedding, lengths).mean()


@pytest.fixture(scope="session", params=["small", pytest.param("large", marks=pytest.mark.slow)])
def parity(request):
    """The folder of reference results: the repository's own; and larger ones, or a skip where they are not."""
    folder = {"small": ROOT / "tests" / "parity", "large": SHARED / "parity"}[request.param]
    if not folder.is_dir():
        pytest.skip(f"the reference results are not at {folder}")
    return folder


def captions_of(number, seed=0):
    """Return `number` different little captions."""
    rng = np.random.default_rng(seed)
    pick = lambda words: words[rng.integers(len(words))]  # noqa: E731
    return [
        f"a {pick(['small', 'large'])} {pick(['red', 'green', 'blue'])} {pick(['circle', 'square', 'star'])} "
        f"on the {pick(['grass', 'sand', 'snow'])}."
        for _ in range(number)
    ]


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """A GPT-2 of 2 layers, 16 wide, with its own byte-level tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "gpt2-small"
    tokenizer = train_bpe(captions_of(300), 330, ["<|endoftext|>"])
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=64, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, or a skip."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no Chromium to look at the page with")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """A CLIP of OpenAI's architecture, 32 px and 32 wide, as a state dict."""
    from clip.model import CLIP

    torch.manual_seed(0)
    model = CLIP(
        embed_dim=EMBED_DIM, image_resolution=32, vision_layers=1, vision_width=64, vision_patch_size=16,
        context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(model.half().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of twelve images with COCO's names and a csv of two captions for each."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    captions = captions_of(24)
    lines = ["image,caption"]
    for number in range(12):
        name = f"COCO_val2014_{number + 1:012d}.jpg"
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / name)
        lines += [f"{name},{caption}" for caption in captions[2 * number : 2 * number + 2]]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def run_script(script, *arguments, check=0):
    """Run a command of the repository inside this process, as its guard does, which is quick.

    Returns: what `subprocess.run` would have returned; the exit status must be `check`.
    """
    out, err = io.StringIO(), io.StringIO()
    before, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(importlib.import_module(Path(script).stem).main)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
        for number, handler in handlers.items():  # `run` has its own
            signal.signal(number, handler)
    done = subprocess.CompletedProcess(script, code, out.getvalue(), err.getvalue())
    return checked(done, check)


def forked(work, *arguments):
    """Return a process, to be started, that goes on from here as a copy and calls `work`.

    It never collects what is garbage here: ONNX Runtime's sessions wait for their threads, which are not in the copy.
    """

    def begin():
        gc.freeze()
        work(*arguments)

    return multiprocessing.get_context("fork").Process(target=begin)


def run_process(script, *arguments, check=0, env=None, **options):
    """Run a command of the repository in a process of its own; the exit status must be `check`."""
    command = [sys.executable, script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return checked(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **options), check)


def checked(done, status):
    """Return a finished process after checking its exit status; None: any."""
    assert status in (None, done.returncode), f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def store(photos, clip_file, tmp_path_factory):
    """The feature store of the twelve images, made by the script."""
    out = tmp_path_factory.mktemp("store") / "photos.pkl"
    run_script(
        "parse_coco.py", "--clip_model_type", clip_file, "--annotations", photos / "captions.csv",
        "--images", photos, "--out", out, "--num_workers", 0,
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def trained(store, language_model, tmp_path_factory):
    """A trained captioner's folder, made by the script: two epochs with the default mapping network."""
    out = tmp_path_factory.mktemp("run")
    train(store, language_model, out)
    return out


def train_command(store, language_model, out, *more):
    """Return the words of train.py with small settings."""
    return [str(word) for word in (
        "train.py", "--data", store, "--language_model", language_model, "--out_dir", out, "--prefix", "run",
        "--epochs", 2, "--bs", 4, "--lr", 1e-2, "--warmup_steps", 2, "--device", "cpu", *more,
    )]  # fmt: skip


def train(store, language_model, out, *more, check=0, runner=run_script, **options):
    """Run train.py with small settings."""
    return runner(*train_command(store, language_model, out, *more), check=check, **options)


def read_log(folder, prefix="run"):
    """Return the lines of a training log."""
    return [json.loads(line) for line in (folder / f"{prefix}-log.jsonl").read_text().splitlines()]
