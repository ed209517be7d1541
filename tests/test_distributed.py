"""Several processes of one command: data parallel, sharded, stopped and resumed; extraction shared out."""

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import traceback

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, captions_of, checked, forked, read_log, run_script, slow_but, train, train_command
from test_readme import twelve_layers, workplace  # noqa: F401, fixtures
from test_scripts import equal, one_line_error, parse, weights
from torch.distributed import TCPStore
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.workload import write_tar
from features import store_files
from features.partial import PartialStore
from features.store import read_store, write_store
from models import language
from training import loop
from training.trainer import Trainer

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="session")
def still(language_model, tmp_path_factory):
    """The small language model without dropout, so that processes have nothing to draw differently."""
    folder = tmp_path_factory.mktemp("still") / "gpt2-still"
    config = AutoConfig.from_pretrained(language_model, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    AutoModelForCausalLM.from_pretrained(language_model, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(language_model).save_pretrained(folder)
    return folder


def work(environment, words, folder, before):
    """Run a command as one of several processes; its two streams go to files."""
    os.environ.update(environment)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(os.open(folder / f"{number}-{environment['RANK']}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    try:
        if before:
            before(int(environment["RANK"]))
        done = run_script(*words, check=None)
    except BaseException:
        os.write(2, traceback.format_exc().encode())  # sys.stderr is pytest's here
        os._exit(1)
    os.write(1, done.stdout.encode())
    os.write(2, done.stderr.encode())
    os._exit(done.returncode)


def launch(number, folder, words, check=0, before=None):
    """Run a command in forked processes, connected as torchrun's are, which is quicker.

    Args:
        check: the exit status that all must have, or a list of them.
        before: called with its number in each process first.
    Returns: what each wrote to standard error.
    """
    folder.mkdir(exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    processes = [
        forked(work, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, words, folder, before)
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    errors = [(folder / f"2-{rank}").read_text() for rank in range(number)]
    statuses = check if isinstance(check, list) else [check] * number
    assert [process.exitcode for process in processes] == statuses, errors
    return errors


def stop_after(step):
    """Return what makes one process, the last, ask for a stop after some steps."""

    def before(_rank):
        take_step = Trainer.train_step

        def train_step(trainer, group):
            if trainer.step == step - 1 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return take_step(trainer, group)

        Trainer.train_step = train_step

    return before


def losses(folder):
    return [entry["loss"] for entry in read_log(folder) if "loss" in entry]


def scores(folder):
    return [entry["validation"] for entry in read_log(folder) if "validation" in entry]


def close(a, b):
    """The bias of attention keys has no gradient but rounding, which AdamW makes large: hence 1e-4."""
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)


def test_two_processes_train_as_one_does(store, still, tmp_path):
    """Same losses, same weights, with unequal captions in the two halves of a batch; process 0 alone speaks."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--gradient_accumulation_steps", "2", "--val_data", store]
    train(store, still, one, *flags)
    errors = launch(2, two, train_command(store, still, two, *flags))
    assert "in each of 2 processes" in errors[0] and not errors[1]
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert scores(two) == [pytest.approx(score) for score in scores(one)] and len(scores(one)) == 2
    assert close(weights(two), weights(one))
    assert set(os.listdir(two)) - {"1-0", "1-1", "2-0", "2-1"} == set(os.listdir(one))


def test_sharded_is_one_process(store, still, tmp_path):
    """Half the weights in each of two, stopped, resumed by one: the losses and the checkpoint of one all the way."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--gradient_checkpointing", "--lora_rank", "2", "--val_data", store]
    train(store, still, one, *flags)

    def before(rank):
        stop_after(3)(rank)
        take_step = Trainer.train_step

        def train_step(trainer, group):
            here, all_ = (sum(count(p) for p in trainer.model.parameters())
                          for count in (lambda p: p.to_local().numel(), torch.Tensor.numel))  # fmt: skip
            assert here < 0.6 * all_
            return take_step(trainer, group)

        Trainer.train_step = train_step

    launch(2, two, train_command(store, still, two, *flags, "--fsdp"), 143, before)
    train(store, still, two, *flags, "--resume")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert close(weights(two), weights(one))


@pytest.mark.parametrize("flags", slow_but(([], ["--fsdp", "--only_prefix"]), []), ids=("data parallel", "sharded"))
def test_two_processes_resume_exactly(store, language_model, tmp_path, flags):
    """With dropout, stopped in the middle of an epoch: the weights of a run that was never stopped, bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(2, whole, train_command(store, language_model, whole, *flags))
    errors = launch(2, parts, train_command(store, language_model, parts, *flags), 143, stop_after(4))
    assert "step 4 is saved" in errors[0]
    launch(2, parts, train_command(store, language_model, parts, *flags, "--resume"))
    assert equal(weights(parts), weights(whole)) and losses(parts) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ([], ["--only_prefix"]), ids=("all", "only_prefix"))
def test_sharded_with_validation_and_resume_at_an_epochs_end(store, still, tmp_path, flags):
    """Scored after every epoch; stopped there and resumed by two, sharded, and by one: the run of one process."""
    flags = [*flags, "--val_data", store]
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    train(store, still, one, *flags)
    words = train_command(store, still, two, *flags, "--fsdp")
    launch(2, two, words)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert scores(two) == [pytest.approx(score) for score in scores(one)] and len(scores(one)) == 2
    assert close(weights(two), weights(one))

    def before(_rank):
        finish = loop.finish_epoch

        def finish_and_die(trainer, *rest):
            finish(trainer, *rest)
            os._exit(9)

        loop.finish_epoch = finish_and_die

    words = train_command(store, still, three, *flags, "--fsdp")
    launch(2, three, words, 9, before)
    shutil.copytree(three, tmp_path / "four")
    launch(2, three, [*words, "--resume"])
    train(store, still, tmp_path / "four", *flags, "--resume")
    for folder in (three, tmp_path / "four"):
        assert losses(folder) == pytest.approx(losses(one), rel=1e-5)
        assert close(weights(folder), weights(one))


@pytest.mark.parametrize("step", slow_but((3, 6), 3), ids=("middle", "end"))
def test_one_process_state_goes_on_sharded(store, still, tmp_path, step, monkeypatch):
    """Begun on one device, stopped in the middle of an epoch or after its last step."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(store, still, one)
    with monkeypatch.context() as patch:
        take_step = Trainer.train_step

        def train_step(trainer, group):
            if trainer.step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return take_step(trainer, group)

        patch.setattr(Trainer, "train_step", train_step)
        train(store, still, two, check=143)
    launch(2, two, train_command(store, still, two, "--fsdp", "--resume"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert close(weights(two), weights(one))


def test_errors_are_told_once(store, still, tmp_path):
    def fails(number, *more):
        errors = launch(number, tmp_path, train_command(store, still, tmp_path / "out", *more), 2)
        done = subprocess.CompletedProcess("", 2, "", "".join(errors))
        assert done.stderr.count("error") == 1
        return done

    one_line_error(fails(2, "--bs", 5), "--bs 5", "2 processes", "4 or 6")
    one_line_error(fails(2, "--pn", "1"), "--pn 1", "--fsdp")
    one_line_error(fails(2, "--bss", 5), "--bss", "mean --bs?")
    one = tmp_path / "one.pkl"
    write_store(one, torch.ones(1, 32), [{"image_id": 1, "caption": "a dog", "clip_embedding": 0}], {})
    one_line_error(fails(2, "--data", one), "2 processes", "at most 1")
    assert not (tmp_path / "out").exists()


def test_a_lost_process_is_told(store, still, tmp_path):
    """The others end too, in one line."""

    def before(rank):
        if rank == 1:
            Trainer.train_step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    errors = launch(2, tmp_path, train_command(store, still, tmp_path / "out"), [2, -9], before)
    one_line_error(subprocess.CompletedProcess("", 2, "", errors[0]), "another process")


def parse_words(photos, clip_file, out):
    """Return the words of parse_coco.py, a batch per image."""
    return [str(word) for word in (
        "parse_coco.py", "--clip_model_type", clip_file, "--annotations", photos / "captions.csv", "--images", photos,
        "--out", out, "--num_workers", 0, "--batch_size", 1,
    )]  # fmt: skip


@pytest.mark.parametrize("processes", (1, 2))
def test_extraction_goes_on_after_a_kill(photos, clip_file, store, tmp_path, processes):
    """Shared out over two processes, one killed after three images; then one or two go on without those encoded."""
    out = tmp_path / "x.pkl"

    def before(rank):
        append = PartialStore.append

        def append_and_die(partial, keys, embeddings):
            append(partial, keys, embeddings)
            if rank == 1 and len(partial.rows) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        PartialStore.append = append_and_die

    launch(2, tmp_path, parse_words(photos, clip_file, out), [2, -9], before)
    assert not out.exists()
    errors = launch(processes, tmp_path, parse_words(photos, clip_file, out))
    assert "going on: 9 of 12 images" in errors[0]
    assert torch.allclose(read_store(out).clip_embedding, read_store(store).clip_embedding, atol=1e-5)
    assert read_store(out).captions == read_store(store).captions
    assert not list(tmp_path.glob("*.partial"))


def test_extraction_into_shards(photos, clip_file, store, tmp_path, monkeypatch):
    """Each process writes its own shards; together they are those of one process."""
    monkeypatch.setattr(store_files, "MIN_ROWS", 4)
    parse(photos, clip_file, f"{tmp_path}/one/")
    launch(2, tmp_path, parse_words(photos, clip_file, f"{tmp_path}/two/"))
    one, two = (read_store(tmp_path / name) for name in ("one", "two"))
    assert len(two.clip_embedding.files) == 3 and list(one.captions) == list(two.captions)
    rows = torch.arange(12)
    assert torch.allclose(one.clip_embedding[rows], two.clip_embedding[rows], atol=1e-3)
    assert one.info == two.info


@pytest.mark.slow
def test_torchrun(store, still, photos, clip_file, tmp_path):
    """The real launcher."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def torchrun(words, check):
        done = subprocess.run([*TORCHRUN, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        return checked(done, check)

    train(store, still, tmp_path / "one")
    done = torchrun(train_command(store, still, tmp_path / "two"), 0)
    assert "in each of 2 processes" in done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    done = torchrun(train_command(store, still, tmp_path / "two", "--bs", 5), 1)
    assert done.stderr.count("--bs 5 captions cannot") == 1 and "exitcode  : 2" in done.stderr
    torchrun(parse_words(photos, clip_file, tmp_path / "x.pkl"), 0)
    assert torch.allclose(read_store(tmp_path / "x.pkl").clip_embedding, read_store(store).clip_embedding, atol=1e-5)


def page_commands(page):
    """Return a page's torchrun and python commands: (how many processes, or 0; the words from the script's name on)."""
    text = (ROOT / page).read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    found = (re.fullmatch(r"(torchrun|python)(.*? )(\w+\.py .*)", line) for line in lines)
    return [
        (
            (m[1] == "torchrun") * math.prod(map(int, re.findall(r"--(?:nnodes|nproc_per_node) (\d+)", m[2]))),
            shlex.split(m[3], comments=True),
        )
        for m in found
        if m
    ]


def clip_retrieval_folder(folder):
    """Write what clip-retrieval leaves: normalised embeddings and their metadata."""
    embeddings = torch.nn.functional.normalize(torch.randn(24, 32), dim=1).half().numpy()
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_0000.npy", embeddings)
    table = pa.table({"image_path": [f"{i:09d}" for i in range(24)], "caption": captions_of(24)})
    pq.write_table(table, folder / "metadata" / "metadata_0000.parquet")


@pytest.mark.slow
def test_commands_of_the_page(workplace, photos, language_model, monkeypatch):  # noqa: F811
    """docs/scale.md and the README's torchrun: extraction, training, captioning; torchrun's in two processes."""
    load = language._from_pretrained
    monkeypatch.setattr(language, "_from_pretrained", lambda kind, source, **options: load(
        kind, language_model if source in ("facebook/opt-1.3b", "facebook/opt-2.7b") else source, **options
    ))  # fmt: skip
    clip_retrieval_folder(workplace / "embeddings")
    (workplace / "cc12m").mkdir()
    for number in range(4):
        members = [(f"{number:05d}{i:04d}.{kind}", data) for i, path in enumerate(sorted(photos.glob("*.jpg"))[:3])
                   for kind, data in (("jpg", path.read_bytes()), ("txt", b"a red star."))]  # fmt: skip
        write_tar(workplace / "cc12m" / f"{number:05d}.tar", members)
    commands = page_commands("docs/scale.md") + [found for found in page_commands("README.md") if found[0]]
    assert len(commands) >= 11 and sum(several > 1 for several, _ in commands) >= 5
    ranks = [("parse", "train", "predict").index(re.match("parse|train|predict", words[0])[0]) for _, words in commands]
    for _, (several, words) in sorted(zip(ranks, commands, strict=True), key=lambda pair: pair[0]):
        if several:
            batch = int(words[words.index("--bs") + 1]) if "--bs" in words else 40
            assert batch % several == 0 or "train" not in words[0], words
            launch(2, workplace / "streams", words)
        else:
            run_script(*words)
