"""The optimisers of the two predecessors."""

import json

import pytest
import torch
from conftest import train
from test_scripts import equal, one_line_error, weights

import train_OPT
from training.optimizers import make_optimizer


def transformers_step(p, grad, state, lr, decay):
    """AdamW of transformers 4.46, written out."""
    state["t"] += 1
    state["m"] = 0.9 * state["m"] + 0.1 * grad
    state["v"] = 0.999 * state["v"] + 0.001 * grad**2
    rate = lr * (1 - 0.999 ** state["t"]) ** 0.5 / (1 - 0.9 ** state["t"])
    p = p - rate * state["m"] / (state["v"].sqrt() + 1e-6)
    return p - lr * decay * p


@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("decay", (0.0, 0.1))
def test_adamw_hf_is_the_predecessors(fused, decay):
    """Gradients as small as eps show where it is added; a reload between steps changes nothing."""
    parameter, lr = torch.nn.Parameter(torch.ones(50)), 1e-3
    optimizer = make_optimizer("adamw_hf", [parameter], lr, decay, fused)
    plain, state = torch.ones(50, dtype=torch.float64), {"t": 0, "m": 0, "v": 0}
    torch.manual_seed(0)
    for step in range(30):
        grad = torch.randn(50) * 1e-6
        parameter.grad = grad
        optimizer.step()
        plain = transformers_step(plain, grad.double(), state, lr, decay)
        if step == 10:
            before = optimizer.state_dict()
            optimizer = make_optimizer("adamw_hf", [parameter], lr, decay, fused)
            optimizer.load_state_dict(before)
    assert torch.allclose(parameter.double(), plain, atol=3 * lr**2 * max(decay, 1e-3) * 30)
    assert not torch.allclose(plain, torch.ones(50, dtype=torch.float64), atol=1e-4)


def test_defaults_and_resume(store, language_model, tmp_path):
    """train.py's is transformers', train_OPT.py's torch's; both are stored, and --resume holds to them."""
    assert train_OPT.get_parser().parse_args([]).optimizer == "adamw_torch"
    runs = {}
    for name, flags in (("default", []), ("torch", ["--optimizer", "adamw_torch"])):
        train(store, language_model, tmp_path / name, *flags)
        runs[name] = json.loads((tmp_path / name / "run.json").read_text())["training"]
    assert (runs["default"]["optimizer"], runs["default"]["weight_decay"]) == ("adamw_hf", 0.0)
    assert (runs["torch"]["optimizer"], runs["torch"]["weight_decay"]) == ("adamw_torch", 0.01)
    assert not equal(weights(tmp_path / "default"), weights(tmp_path / "torch"))
    done = train(store, language_model, tmp_path / "torch", "--resume", check=2)
    one_line_error(done, "--optimizer adamw_torch", "adamw_hf")


def test_a_run_from_before_the_option_is_torchs(store, language_model, tmp_path):
    train(store, language_model, tmp_path, "--optimizer", "adamw_torch")
    path = tmp_path / "run.json"
    stored = json.loads(path.read_text())
    del stored["training"]["optimizer"], stored["training"]["weight_decay"]
    path.write_text(json.dumps(stored))
    one_line_error(train(store, language_model, tmp_path, "--resume", check=2), "--optimizer adamw_torch")
    train(store, language_model, tmp_path, "--resume", "--optimizer", "adamw_torch")
