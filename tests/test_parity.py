"""Equal to the predecessor, on small weights and the results that its own code computed from them."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

import train as train_script
from encoders import load_encoder
from features.dataset import CaptionDataset
from features.loader import encode_files
from features.store import read_store
from models import clip_caption
from models.checkpoint import load_captioner, load_weights
from models.decoding import generate_captions
from models.language import load_tokenizer
from models.settings import BEAM, DecodingConfig
from models.steps import CachedStep, UncachedStep
from training.objectives import CrossEntropy
from training.run import build_model, caption_config, training_config
from training.trainer import Trainer

VARIANTS = ("mlp", "transformer")
STORE = "data/coco/oscar_split_ViT-B_32_train.pkl"


@pytest.fixture(scope="module")
def expected(parity):
    """{"mlp" or "transformer": settings and results}."""
    variants = json.loads((parity / "expected.json").read_text())["variants"]
    return {name.split("_")[0]: variant for name, variant in variants.items()}


def embeddings_by_image(parity):
    """Return {image id: [D] embedding}, from the predecessor's pickle."""
    store = read_store(parity / STORE)
    return {int(record["image_id"]): store.clip_embedding[record["clip_embedding"]] for record in store.captions}


def test_features(parity):
    reference = embeddings_by_image(parity)
    images = sorted((parity / "data/coco/val2014").glob("*.jpg")) or [
        path for path in sorted((ROOT / "demo" / "images").iterdir()) if int(path.stem) in reference
    ]
    _, embeddings, errors = next(encode_files(load_encoder(parity / "clip-tiny.pt"), images))
    assert not errors and {int(path.stem[-12:]) for path in images} == reference.keys()
    for path, embedding in zip(images, embeddings, strict=True):
        assert torch.allclose(embedding, reference[int(path.stem[-12:])], atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(parity, expected, variant):
    model, _, _ = load_captioner(parity / expected[variant]["final"], parity / "gpt2-tiny")
    results = np.load(parity / expected[variant]["init"].replace("-init.pt", "-forward.npz"))
    stored = {name: torch.from_numpy(value) for name, value in results.items()}
    with torch.no_grad():
        prefix = model.prefix(stored["clip_embedding"])
        logits = model(stored["tokens"], stored["clip_embedding"], stored["mask"])
    assert torch.allclose(prefix.flatten(), stored["prefix_embeds"].flatten(), atol=1e-4)
    assert torch.allclose(logits[:, -8:, :256], stored["logits_last8"], atol=1e-4)


def make_trainer(parity, expected, variant, full_batch=False):
    """Return a Trainer set up as the reference run was."""
    settings = expected[variant] | (expected[variant]["full_batch"] if full_batch else {})
    flags = ("mapping_type", "prefix_length", "prefix_length_clip", "num_layers", "lr", "warmup_steps", "epochs", "bs")
    argv = [part for flag in flags for part in (f"--{flag}", str(settings[flag]))]
    argv += ["--only_prefix"] * settings["only_prefix"] + ["--data", str(parity / STORE)]
    argv += ["--language_model", str(parity / "gpt2-tiny")]
    argv += ["--init_from", str(parity / settings["init"])]
    args = train_script.get_parser().parse_args(argv)
    store = read_store(args.data)
    model = build_model(caption_config(args, store), args.init_from)
    dataset = CaptionDataset(store, load_tokenizer(args.language_model))
    return Trainer(model, CrossEntropy(dataset), training_config(args), torch.device("cpu")), settings


class LogSumExpOf16Lanes(torch.autograd.Function):
    """The logarithm of summed exponentials of [N, V], summed one after another in 16 float32 lanes.

    torch does so in `log_softmax` on processors with AVX-512, such as the reference's. With 50,257 terms that is off by
    up to 4e-6, which 400 steps make larger; other processors have 8 lanes, and are off in another way.
    """

    @staticmethod
    def forward(ctx, logits):
        """Return [N]."""
        top = logits.amax(1, keepdim=True)
        terms = torch.nn.functional.pad((logits - top).exp(), (0, -logits.shape[1] % 16)).view(len(logits), -1, 16)
        lanes = torch.zeros(len(logits), 16)
        for part in terms.transpose(0, 1).contiguous():
            lanes += part
        result = lanes.sum(1).log() + top[:, 0]
        ctx.save_for_backward(logits, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        """Return [N, V]: the softmax, by the same sum."""
        logits, result = ctx.saved_tensors
        return (logits - result[:, None]).exp() * gradient[:, None]


def cross_entropy(logits, tokens, reduction):
    """Return the cross-entropy of each row of [N, V] logits, as the reference's processor rounds it."""
    assert reduction == "none"
    return LogSumExpOf16Lanes.apply(logits) - logits.gather(1, tokens[:, None])[:, 0]


def losses_of(trainer, batches):
    return [trainer.train_step([trainer.dataset.batch(rows)])[0] for rows in batches]


@pytest.mark.slow
def test_training_losses(parity, expected):
    trainer, settings = make_trainer(parity, expected, "mlp")
    np.testing.assert_allclose(losses_of(trainer, settings["batches"]), settings["losses"], rtol=1e-4)
    final = load_weights(parity / settings["final"])
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(value, final[name], atol=1e-4), name


@pytest.mark.slow
def test_training_losses_of_a_frozen_language_model(parity, expected, monkeypatch):
    monkeypatch.setattr(clip_caption.F, "cross_entropy", cross_entropy)
    trainer, settings = make_trainer(parity, expected, "transformer")
    np.testing.assert_allclose(losses_of(trainer, settings["batches"]), settings["losses"], rtol=1e-4)
    final = load_weights(parity / settings["final"])
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(value, final[name], atol=5e-3), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_batch_losses(parity, expected, variant):
    trainer, settings = make_trainer(parity, expected, variant, full_batch=True)
    losses = []
    for epoch in range(settings["epochs"]):
        trainer.epoch, trainer.batch = epoch, 0
        losses += [trainer.train_step(group)[0] for group in trainer.epoch_batches()]
    np.testing.assert_allclose(losses, settings["losses"], rtol=1e-4)


@pytest.mark.parametrize("step_type", (CachedStep, UncachedStep))
@pytest.mark.parametrize("variant", VARIANTS)
def test_captions(parity, expected, variant, step_type):
    model, tokenizer, _ = load_captioner(parity / expected[variant]["final"], parity / "gpt2-tiny")
    wanted = expected[variant]["captions"]
    by_image = embeddings_by_image(parity)
    embeddings = torch.stack([by_image[int(name[-16:-4])] for name in wanted])
    greedy = generate_captions(model, tokenizer, embeddings, DecodingConfig(), step_type)
    beams = generate_captions(model, tokenizer, embeddings, DecodingConfig(method=BEAM, num_captions=5), step_type)
    assert [group[0].text for group in greedy] == [captions["greedy"] for captions in wanted.values()]
    assert [[c.text for c in group] for group in beams] == [captions["beam"] for captions in wanted.values()]
