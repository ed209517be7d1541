"""What only a GPU shows; these tests were written without one."""

import copy

import pytest
import torch

import train
from encoders import load_encoder
from features.dataset import CaptionDataset
from features.store import read_store
from models.language import load_tokenizer
from training.objectives import CrossEntropy
from training.run import build_model, caption_config, training_config
from training.trainer import Trainer
from utils.devices import pick_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


def make_trainer(store, language_model):
    """Return a Trainer on the GPU, with GPT-2's dropout."""
    argv = ["--data", str(store), "--language_model", str(language_model), "--bs", "4", "--warmup_steps", "2"]
    args, loaded = train.get_parser().parse_args(argv), read_store(store)
    torch.manual_seed(args.seed)
    model = build_model(caption_config(args, loaded), None).to("cuda")
    dataset = CaptionDataset(loaded, load_tokenizer(str(language_model)))
    return Trainer(model, CrossEntropy(dataset), training_config(args), torch.device("cuda"))


def test_resume_is_exact(store, language_model):
    """The GPU's random numbers, of which dropout is made, go on too."""
    whole, resumed = (make_trainer(store, language_model) for _ in range(2))
    batches = list(whole.epoch_batches())
    for batch in batches[:2]:
        whole.train_step(batch)
    state = copy.deepcopy(whole.state())
    assert len(state["random"][0][1]) == torch.cuda.device_count()
    expected = [whole.train_step(batch) for batch in batches[2:]]
    resumed.load_state(state)
    assert [resumed.train_step(batch) for batch in batches[2:]] == expected
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_batches_are_pinned(store, language_model):
    dataset = CaptionDataset(read_store(store), load_tokenizer(str(language_model)))
    assert all(values.is_pinned() for batch in dataset.batches([range(4)], pin_memory=True) for values in batch)


def test_one_precision_for_all_commands():
    pick_device("cuda")
    assert torch.get_float32_matmul_precision() == "high"


def test_encoder_equals_that_of_the_cpu(clip_file):
    pixels = torch.randn(5, 3, 32, 32)
    on_cpu, on_gpu = (load_encoder(clip_file, device, "fp32").encode_images(pixels) for device in ("cpu", "cuda"))
    assert torch.allclose(on_cpu, on_gpu, atol=2e-3)
