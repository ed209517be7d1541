"""The largest logits: found faster, and in fewer bits those of float32."""

import copy

import pytest
import torch

from models.slots import step_for
from tests.test_OPT import small
from utils.logits import BLOCK, REFINED, SHORT, RefinedOutput, largest
from utils.precision import prepare_for_inference

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", (30, SHORT, SHORT + 1, SHORT + BLOCK - 1, 50257))
@pytest.mark.parametrize("number", (1, 2, REFINED))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_largest(length, number, dtype):
    """Those of torch.topk, at both ends of a row too; the rows stay as they are."""
    rows = torch.randn(5, length, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[0, 0], rows[1, -1], rows[2, length // 2], rows[3, -3:] = 9, 9, 9, 9
    rows[4, number:] = -torch.inf
    before = rows.clone()
    found, places = largest(rows, number)
    assert rows.equal(before) and found.dtype == dtype and found.shape == places.shape == (5, number)
    assert found.equal(rows.topk(number).values) and found.equal(rows.gather(1, places))
    assert all(len(set(row)) == number for row in places.tolist())


@pytest.mark.parametrize("length", (30, SHORT + 1, 50257))
def test_the_first_of_equals(length):
    rows = torch.zeros(3, length)
    rows[1, [7, 20, length - 1]] = 1
    rows[2, length - 2 :] = 1
    for part in (rows, rows[2:]):
        assert largest(part, 1)[1][:, 0].equal(torch.tensor([0, 7, length - 2])[-len(part) :])


@pytest.mark.parametrize("family", ("gpt2", "opt", "opt projected", "gemma3_text"))
@pytest.mark.parametrize("dtype", ("bf16", "int8"))
@torch.inference_mode()
def test_the_largest_logits_of_fewer_bits(family, dtype, monkeypatch):
    """They are float32 products of the hidden state with the embedding, at the prefix and at later tokens."""
    gpt = prepare_for_inference(small(family, vocab_size=300, tie_word_embeddings=True), dtype, CPU)
    assert isinstance(gpt.get_output_embeddings(), RefinedOutput)
    forward, hidden = RefinedOutput.forward, []
    monkeypatch.setattr(RefinedOutput, "forward", lambda output, x: hidden.append(x) or forward(output, x))
    embedding = gpt.get_input_embeddings().weight
    step = step_for(gpt, torch.randn(3, 5, embedding.shape[1]).to(embedding.dtype))
    for x, logits in zip(hidden, (step.first, step(torch.tensor([1, 2, 3]))), strict=True):
        exact = x.reshape(3, -1).double() @ embedding.double().T
        best = exact.topk(3)
        assert logits.dtype == torch.float32
        assert torch.allclose(logits.gather(1, best.indices).double(), best.values, rtol=1e-5)
        assert logits.argmax(1).equal(best.indices[:, 0])


@torch.inference_mode()
def test_an_output_layer_of_its_own_stays():
    """It is no second copy of a matrix that need not be kept."""
    for gpt, dtype in ((small("llama", tie_word_embeddings=False), "int8"), (small("gpt2"), "fp32")):
        changed = prepare_for_inference(gpt, dtype, CPU)
        assert not any(isinstance(module, RefinedOutput) for module in changed.modules())


@torch.inference_mode()
def test_a_copy_is_a_model_of_its_own():
    gpt = prepare_for_inference(small("gpt2"), "int8", CPU)
    other = copy.deepcopy(gpt)
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    assert len(list(other.parameters())) == len(list(gpt.parameters()))
