"""A run's state: the same whatever placed the weights, and whichever version wrote it."""

import os
import shutil
import signal

import pytest
import torch
from conftest import train, train_command
from test_distributed import close, launch, losses, still, stop_after  # noqa: F401, a fixture
from test_large_models import resume_exactly
from test_run_files import at_step
from test_scripts import equal, one_line_error, weights

import train as train_script
from features.dataset import CaptionDataset
from features.store import read_store
from models.language import load_tokenizer
from training.objectives import CrossEntropy
from training.run import build_model, caption_config, training_config
from training.trainer import Trainer


def read_state(folder):
    return torch.load(folder / "run_state.pt", weights_only=True)


def make_trainer(store, language_model, *flags):
    """Return a Trainer and the batches of its first step."""
    words = train_command(store, language_model, "unused", *flags)[1:]
    args, loaded = train_script.get_parser().parse_args(words), read_store(store)
    model = build_model(caption_config(args, loaded))
    dataset = CaptionDataset(loaded, load_tokenizer(str(language_model)))
    trainer = Trainer(model, CrossEntropy(dataset), training_config(args), torch.device("cpu"))
    return trainer, next(trainer.epoch_batches())


@pytest.fixture(scope="module")
def stopped(store, still, tmp_path_factory):  # noqa: F811
    """Folders: a run of one process, and two that were stopped after step 4, one of one process and one sharded."""
    folder = tmp_path_factory.mktemp("stopped")
    train(store, still, folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(store, still, folder / "one", check=143)
    launch(2, folder / "sharded", train_command(store, still, folder / "sharded", "--fsdp"), 143, stop_after(4))
    return folder


def test_state_does_not_depend_on_processes(stopped):
    one, sharded = (read_state(stopped / name) for name in ("one", "sharded"))
    assert one["trained"].keys() == sharded["trained"].keys() == one["optimizer"]["state"].keys()
    assert close(one["trained"], sharded["trained"])
    for name, values in one["optimizer"]["state"].items():
        assert close(values, sharded["optimizer"]["state"][name])
    groups = [state["optimizer"]["param_groups"][0] | {"fused": None} for state in (one, sharded)]
    assert groups[0] == groups[1]


def test_tied_weights_are_stored_once(stopped):
    for name in ("one", "sharded"):
        stored = weights(stopped / name)
        embeddings = (
            stored[f"gpt.{layer}.weight"].untyped_storage().data_ptr() for layer in ("lm_head", "transformer.wte")
        )
        assert len(set(embeddings)) == 1


@pytest.mark.parametrize("begun", ("one", "sharded"))
@pytest.mark.parametrize("resumed", ("one", "sharded"))
def test_state_of_an_earlier_version(store, still, stopped, tmp_path, begun, resumed):  # noqa: F811
    """Its optimiser's state is numbered in the order of the weights, as torch's own is."""
    run = shutil.copytree(stopped / begun, tmp_path / "run")
    state = read_state(run)
    numbers = {name: number for number, name in enumerate(state["trained"])}
    assert len(numbers) > 20
    before = state["optimizer"]
    state["optimizer"] = {
        "state": {numbers[name]: values for name, values in before["state"].items()},
        "param_groups": [before["param_groups"][0] | {"params": list(range(len(numbers)))}],
    }
    torch.save(state, run / "run_state.pt")
    if resumed == "sharded":
        launch(2, run, train_command(store, still, run, "--fsdp", "--resume"))
    else:
        train(store, still, run, "--resume")
    if begun == resumed == "one":
        assert equal(weights(run), weights(stopped / "whole")) and losses(run) == losses(stopped / "whole")
    assert losses(run) == pytest.approx(losses(stopped / "whole"), rel=1e-5)
    assert close(weights(run), weights(stopped / "whole"))


@pytest.mark.parametrize("change", ("lacks one", "has one more", "shape"))
def test_state_of_other_weights_is_refused(store, still, stopped, tmp_path, change):  # noqa: F811
    run = shutil.copytree(stopped / "one", tmp_path / "run")
    state = read_state(run)
    bias = state["trained"].pop("clip_project.model.0.bias")
    if change != "lacks one":
        state["trained"]["clip_project.model.0.bias"] = bias if change == "has one more" else bias[:1]
        state["trained"] |= {"gpt.more.weight": bias} if change == "has one more" else {}
    torch.save(state, run / "run_state.pt")
    one_line_error(train(store, still, run, "--resume", check=2), "trained other weights", "--resume")


def test_saving_takes_no_step(store, language_model):
    """Where the loss scaler has skipped the first steps, the optimiser has no state, and none is made by saving it."""
    trainers = [make_trainer(store, language_model)[0] for _ in range(2)]
    batches = make_trainer(store, language_model)[1]
    state = trainers[0].state()
    assert not trainers[0].optimizer.state
    trainers[1].load_state(state)
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.train_step(batches)
    assert equal(*(dict(trainer.model.state_dict()) for trainer in trainers))
    assert all(values["step"] == 1 for trainer in trainers for values in trainer.optimizer.state.values())


def test_weights_without_a_gradient_have_no_state(store, still, stopped, tmp_path):  # noqa: F811
    """As experts that no token has met: in a sharded run too they begin at their own first step."""
    run = shutil.copytree(stopped / "one", tmp_path / "run")
    state = read_state(run)
    del state["optimizer"]["state"]["clip_project.model.0.bias"]
    torch.save(state, run / "run_state.pt")

    def before(_rank):
        load = Trainer.load_state

        def load_and_check(trainer, state):
            load(trainer, state)
            assert trainer.trained["clip_project.model.0.bias"] not in trainer.optimizer.state
            assert len(trainer.optimizer.state) == len(trainer.trained) - 1

        Trainer.load_state = load_and_check

    launch(2, run, train_command(store, still, run, "--fsdp", "--resume"), before=before)


def test_resume_is_exact_when_offloaded(store, language_model, tmp_path, monkeypatch):
    offload = ("--pn", "auto", "--max_memory", "45KB", "--offload_dir", tmp_path / "disk")
    resume_exactly(store, language_model, tmp_path, monkeypatch, "--only_prefix", *offload)
