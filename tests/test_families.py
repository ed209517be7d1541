"""Every family of language models is trained, resumed, and captioned by every search in every number type."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import read_log
from test_large_models import resume_exactly
from test_OPT import FAMILIES, small
from test_scripts import predict

from models.checkpoint import load_captioner
from models.decoding import generate_captions
from models.language import load_tokenizer
from models.settings import BEAM, SAMPLE, DecodingConfig
from models.steps import UncachedStep
from utils.precision import prepare_for_inference

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
GREEDY = DecodingConfig(entry_length=8)
SEARCHES = {
    "greedy": GREEDY,
    "beam": replace(GREEDY, method=BEAM, beam_size=3, num_captions=3),
    "sampling": replace(GREEDY, method=SAMPLE, num_captions=2),
    "library": replace(GREEDY, decoder="transformers"),
    "library, beam": replace(GREEDY, method=BEAM, beam_size=3, decoder="transformers"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, store, language_model, tmp_path_factory):
    """The folder of a run of train.py on a small model of the family, which was stopped and resumed exactly."""
    folder = tmp_path_factory.mktemp("family")
    tokenizer = load_tokenizer(str(language_model))
    small(request.param, vocab_size=len(tokenizer)).save_pretrained(folder / "gpt")
    tokenizer.save_pretrained(folder / "gpt")
    with pytest.MonkeyPatch.context() as patch:
        return resume_exactly(store, folder / "gpt", folder, patch)


def test_training_learns(run):
    losses = [entry["loss"] for entry in read_log(run)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
def test_captions_of_every_search(run, dtype):
    plain, tokenizer, _ = load_captioner(run / "run_latest.pt")
    torch.manual_seed(0)
    embeddings, tokens = 10 * torch.randn(4, plain.config.prefix_dim), torch.randint(3, 200, (4, 9))
    model = prepare_for_inference(copy.deepcopy(plain), dtype, CPU)
    expected, logits = plain(tokens, embeddings), model(tokens, embeddings).float()
    assert logits.isfinite().all()
    tolerance = {"fp32": 1e-4, "bf16": 0.05 * expected.std(), "int8": 0.2 * expected.std()}[dtype]
    assert (logits - expected).square().mean().sqrt() < tolerance

    def caption(model, decoding, images=embeddings, **options):
        groups = generate_captions(model, tokenizer, images, decoding, **options)
        assert all(math.isfinite(caption.logprob) for group in groups for caption in group)
        return [[caption.tokens for caption in group] for group in groups]

    said = {name: caption(model, decoding) for name, decoding in SEARCHES.items()}
    assert len({tuple(tokens) for group in said["sampling"] for tokens in group}) > 4
    if dtype != "fp32":
        return  # rounding decides between tokens that are nearly alike
    for name, decoding in SEARCHES.items():
        assert said[name] == caption(plain, decoding), name
        assert said[name] == [caption(model, decoding, row[None])[0] for row in embeddings], name
    for name in ("greedy", "beam", "sampling"):
        assert said[name] == caption(model, SEARCHES[name], step_type=UncachedStep), name
    assert said["greedy"] == said["library"] == caption(model, replace(SEARCHES["beam"], beam_size=1, num_captions=1))


@pytest.mark.parametrize(
    "dtype, search",
    (
        ("fp32", ("--top_p", 0.9, "--num_captions", 2)),
        ("bf16", ("--use_beam_search",)),
        ("int8", ("--use_beam_search", "--decoder", "transformers")),
    ),
)
def test_command_captions(run, photos, dtype, search):
    flags = ("--checkpoint", run / "run_latest.pt", "--device", "cpu", "--dtype", dtype, "--entry_length", 8)
    assert predict(photos, *flags, *search).stdout.count("\t") == (24 if dtype == "fp32" else 12)
