"""What fits large language models into small devices: LoRA, fewer bits, offload, gradient checkpointing."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import forked, mean_loss, read_log, run_script, slow_but, train, train_command
from test_OPT import FAMILIES, small
from test_scripts import equal, one_line_error, predict, weights

from models.captioner import Captioner
from models.checkpoint import load_captioner
from models.clip_caption import build_captioner
from models.lora import add_lora, merge_lora
from models.placement import place
from models.settings import CaptionConfig
from training.trainer import Trainer
from utils.flags import Placement
from utils.logits import RefinedOutput


def captioner(family, only_prefix=False):
    return build_captioner(CaptionConfig(12, prefix_length=3, only_prefix=only_prefix), small(family)).eval()


BATCH = (torch.randint(3, 60, (2, 5)), torch.randn(2, 12), torch.tensor([5, 3]))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_merges(family):
    """Only LoRA and mapping network learn; added into the plain model they score captions as before."""
    model, plain = captioner(family), captioner(family)
    add_lora(model.gpt, 2)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.startswith("clip_project.") or ".lora_" in name for name in trained)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.1)
    merged = merge_lora(model, model.state_dict())
    assert merged.keys() == plain.state_dict().keys() and not equal(merged, plain.state_dict())
    plain.load_state_dict(merged)
    loss = mean_loss(model, *BATCH)
    assert torch.allclose(loss, mean_loss(plain, *BATCH), atol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lora_whole_way(store, language_model, trained, photos, tmp_path):
    """The checkpoint is an ordinary one: no flag, no peft to caption with it."""
    train(store, language_model, tmp_path, "--lora_rank", 4)
    log = read_log(tmp_path)
    assert log[-1]["loss"] < log[0]["loss"]
    assert weights(tmp_path).keys() == weights(trained).keys()
    assert predict(photos, "--checkpoint", tmp_path / "run_latest.pt").stdout.count("\t") == 12
    # and training goes on from it, in whichever way
    train(store, language_model, tmp_path / "more", "--init_from", tmp_path / "run_latest.pt", "--lora_rank", 2)
    assert read_log(tmp_path / "more")[0]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("flag", ("--only_prefix", "--lora_rank=2"))
def test_load_in_16bit(store, language_model, photos, tmp_path, flag):
    """The language model stays as it is and out of the checkpoint; the caption command finds it again."""
    train(store, language_model, tmp_path, "--load_in", "16bit", flag)
    log = read_log(tmp_path)
    assert log[-1]["loss"] < log[0]["loss"]
    kept = weights(tmp_path)
    assert all(name.startswith("clip_project.") or ".lora_" in name for name in kept)
    assert all(value.dtype == torch.float32 for value in kept.values())
    assert predict(photos, "--checkpoint", tmp_path / "run_latest.pt").stdout.count("\t") == 12
    model, _, _ = load_captioner(tmp_path / "run_latest.pt")
    assert model.gpt.get_input_embeddings().weight.dtype == torch.bfloat16
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())
    loaded = Captioner(tmp_path / "run_latest.pt", with_encoder=False)
    assert isinstance(loaded.model.gpt.get_output_embeddings(), RefinedOutput)


def test_bad_flags(store, language_model, tmp_path):
    def fails(*more):
        return train(store, language_model, tmp_path / "out", *more, check=2)

    one_line_error(fails("--load_in", "8bit", "--only_prefix"), "pip install bitsandbytes")
    one_line_error(fails("--load_in", "4bit"), "--only_prefix or --lora_rank")
    one_line_error(fails("--only_prefix", "--lora_rank", 4), "--lora_rank")
    one_line_error(fails("--fsdp"), "torchrun --nproc_per_node N")
    one_line_error(fails("--pn", "auto"), "--only_prefix")
    one_line_error(fails("--offload_dir", tmp_path), "--pn auto")
    one_line_error(fails("--pn", "auto", "--only_prefix", "--max_memory", "45KB"), "--offload_dir DIR")
    one_line_error(fails("--pn", "auto", "--only_prefix", "--max_memory", "1KB"), "raise --max_memory")
    one_line_error(fails("--pn", "auto", "--only_prefix", "--max_memory", "much"), "--max_memory much")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", slow_but(([], ["--gradient_checkpointing"]), []), ids=("plain", "checkpointing"))
def test_offload_changes_nothing(store, language_model, photos, tmp_path, more):
    """Half of the language model lies on the disk: the same losses, checkpoint and captions."""
    offload = ["--pn", "auto", "--max_memory", "45KB", "--offload_dir", tmp_path / "disk", "--device", "cpu"]
    flags = ["--only_prefix", "--mapping_type", "transformer", "--num_layers", 2]
    train(store, language_model, tmp_path / "plain", *flags)
    done = train(store, language_model, tmp_path / "offloaded", *flags, *offload, *more)
    assert "parts on disk" in done.stderr
    assert equal(weights(tmp_path / "offloaded"), weights(tmp_path / "plain"))
    captions = [predict(photos, "--checkpoint", tmp_path / "plain" / "run_latest.pt", *flags).stdout
                for flags in ([], offload)]  # fmt: skip
    assert captions[0] == captions[1] and captions[0].count("\t") == 12


@pytest.mark.parametrize("family", ("gpt2", "opt", "llama"))
@pytest.mark.parametrize("only_prefix", (False, True))
def test_gradient_checkpointing(family, only_prefix):
    """The same loss and gradients, dropout too, with less held for the backward pass."""
    results, held = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = captioner(family, only_prefix).train()
        place(model, Placement([torch.device("cpu")], gradient_checkpointing=checkpointing))
        torch.manual_seed(1)
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=tensors: kept.append(t.numel()) or t, lambda t: t):
            loss = mean_loss(model, *BATCH)
        held.append(sum(tensors))
        loss.backward()
        results.append((loss, model.clip_project.model[0].weight.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert held[1] < held[0]


KILLS = 20
MODES = {
    "mlp": [],
    "transformer": ["--mapping_type", "transformer", "--num_layers", 2, "--only_prefix"],
    "accumulation": ["--gradient_accumulation_steps", 2, "--group_by_length"],
    "lora": ["--lora_rank", 2, "--gradient_checkpointing"],
    "16 bit": ["--lora_rank", 2, "--load_in", "16bit", "--mixed_precision", "bf16"],
    "fp16": ["--mixed_precision", "fp16"],
}


@pytest.mark.parametrize("mode", slow_but(MODES, "mlp", "lora", "fp16"))
def test_resume_is_exact_in_every_mode(store, language_model, tmp_path, monkeypatch, mode):
    resume_exactly(store, language_model, tmp_path, monkeypatch, *MODES[mode])


def resume_exactly(store, language_model, folder, monkeypatch, *flags):
    """Stopped in the middle of an epoch and resumed: the weights and log of a run that never was, bit for bit.

    Returns: the run's folder.
    """
    whole, parts = folder / "whole", folder / "parts"
    train(store, language_model, whole, *flags)
    take_step = Trainer.train_step

    def step_and_stop(trainer, group):
        os.kill(os.getpid(), signal.SIGTERM)
        return take_step(trainer, group)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_stop)
        for resume in ([], ["--resume"]):
            train(store, language_model, parts, *flags, *resume, check=143)
    assert [entry["step"] for entry in read_log(parts)] == [1, 2]
    train(store, language_model, parts, *flags, "--resume")
    assert equal(weights(parts), weights(whole))
    assert [entry["loss"] for entry in read_log(parts)] == [entry["loss"] for entry in read_log(whole)]
    return parts


@pytest.mark.slow
def test_killed_at_twenty_random_moments(store, language_model, tmp_path):
    """SIGKILL at random moments: every restart works, no checkpoint is ever unreadable, the end is the same."""
    flags = ["--epochs", 6, "--save_steps", 1, "--lora_rank", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(store, language_model, whole, *flags)
    rng, kills, steps, state = np.random.default_rng(0), 0, set(), parts / "run_state.pt"

    def work():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os._exit(run_script(*train_command(store, language_model, parts, *flags, "--resume"), check=None).returncode)

    while kills < KILLS:
        process = forked(work)
        process.start()
        before = state.stat().st_mtime_ns if state.exists() else 0
        while kills % 2 and process.is_alive() and not (state.exists() and state.stat().st_mtime_ns > before):
            process.join(0.001)  # every other time, until it has saved something
        process.join(rng.uniform(0, 0.1) if kills % 2 else rng.uniform(0, 0.5))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        for file in parts.glob("*.pt"):
            torch.load(file, weights_only=True)
        if (parts / "run.json").exists():
            json.loads((parts / "run.json").read_text())
        if state.exists():
            steps.add(torch.load(state, weights_only=True)["step"])
        if process.exitcode == 0:
            assert equal(weights(parts), weights(whole))
            shutil.rmtree(parts)
    train(store, language_model, parts, *flags, "--resume")
    assert equal(weights(parts), weights(whole)) and len(read_log(parts)) == 36
    assert len(steps) >= KILLS // 2  # the kills were spread over the run
