"""Mapping networks on tokens: what each computes, its size, its flags, its checkpoints."""

import copy
import json

import pytest
import torch
from conftest import mean_loss
from torch.nn import functional as F

from models.checkpoint import load_captioner, save_weights
from models.clip_caption import build_captioner
from models.language import load_language_model
from models.lora import add_lora
from models.mapping import MAPPING_NETWORKS, MLP, Resampler, TransformerMapper
from models.settings import MAPPING_OPTIONS, CaptionConfig
from utils.precision import prepare_for_inference

CPU = torch.device("cpu")
NETWORKS = pytest.mark.parametrize("mapping_type", MAPPING_NETWORKS)
K, D = 6, 32


def config_of(mapping_type, **options):
    return CaptionConfig(D, mapping_type=mapping_type, **({"num_tokens": K, "num_layers": 2} | options))


def build(language_model, mapping_type, **options):
    """Return a small captioner on tokens, with random weights."""
    torch.manual_seed(1)
    return build_captioner(config_of(mapping_type, **options), load_language_model(language_model)).eval()


def tokens_of(images):
    return torch.randn(images, K, D, generator=torch.Generator().manual_seed(0))


def attend(attention, x, read, heads):
    """Attention, head by head."""
    queries = (x @ attention.to_queries.weight.T).chunk(heads, -1)
    keys, values = (read @ attention.to_keys_values.weight.T).chunk(2, -1)
    mixed = [
        ((q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        for q, k, v in zip(queries, keys.chunk(heads, -1), values.chunk(heads, -1), strict=True)
    ]
    return attention.project(torch.cat(mixed, -1))


def feed_forward(layer, x):
    return layer.mlp.fc2(F.relu(layer.mlp.fc1(layer.norm2(x))))


@NETWORKS
def test_tokens_become_a_prefix(language_model, mapping_type):
    model = build(language_model, mapping_type)
    prefix = model.prefix(tokens_of(3))
    assert prefix.shape == (3, K if mapping_type == "mlp" else 10, 16)
    assert torch.allclose(model.prefix(tokens_of(3)[1:2]), prefix[1:2], atol=1e-6)
    loss = mean_loss(model, torch.ones(3, 4, dtype=torch.long), tokens_of(3), torch.tensor([4, 2, 3]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.clip_project.parameters())


def test_mlp_maps_each_token_by_itself(language_model):
    model, tokens = build(language_model, "mlp"), tokens_of(2)
    first, _, second = model.clip_project.per_token
    assert first.weight.shape == second.weight.shape[:1] + (D,) and model.config.prefix_length == K
    assert torch.allclose(model.prefix(tokens)[:, 4], second(torch.tanh(first(tokens[:, 4]))), atol=1e-6)


def test_transformer_puts_tokens_where_its_projections_are(language_model):
    model, tokens = build(language_model, "transformer", prefix_length=4), tokens_of(2)
    mapper = model.clip_project
    assert model.config.prefix_length_clip == K and mapper.positions.shape == (K, 16)
    x = torch.cat((mapper.linear(tokens) + mapper.positions, mapper.prefix_const.expand(2, -1, -1)), 1)
    for layer in mapper.transformer.layers:
        normed = layer.norm1(x)
        x = x + attend(layer.attn, normed, normed, 8)
        x = x + feed_forward(layer, x)
    assert torch.allclose(model.prefix(tokens), x[:, K:], atol=1e-5)


def test_resampler_reads_tokens(language_model):
    model, tokens = build(language_model, "resampler", prefix_length=3, num_heads=4), tokens_of(2)
    mapper = model.clip_project
    x, read = mapper.queries.expand(2, -1, -1), mapper.linear(tokens) + mapper.positions
    assert x.shape == (2, 3, 16) and len(mapper.layers) == 2
    for layer in mapper.layers:
        normed = layer.norm1(x)
        x = x + attend(layer.attn, normed, torch.cat((layer.norm_tokens(read), normed), 1), 4)
        x = x + feed_forward(layer, x)
    assert torch.allclose(model.prefix(tokens), x, atol=1e-5)


@pytest.mark.parametrize("mapping_type", ("transformer", "resampler"))
def test_places_of_tokens_count(language_model, mapping_type):
    model, tokens = build(language_model, mapping_type), tokens_of(1)
    assert not torch.allclose(model.prefix(tokens), model.prefix(tokens.flip(1)), atol=1e-5)


@pytest.mark.parametrize(("num_tokens", "prefix_dim"), ((49, 768), (256, 1024), (576, 1408)))
@pytest.mark.parametrize("embedding_dim", (768, 1280, 2048))
def test_resampler_is_no_larger_than_the_papers_transformer(num_tokens, prefix_dim, embedding_dim):
    with torch.device("meta"):
        resampler = Resampler(
            prefix_dim, embedding_dim, 10, num_tokens=num_tokens, **MAPPING_OPTIONS["resampler"].options
        )
        transformer = TransformerMapper(640, embedding_dim, 10, **MAPPING_OPTIONS["transformer"].options)
    counts = [sum(p.numel() for p in network.parameters()) for network in (resampler, transformer)]
    assert counts[0] <= counts[1]


@NETWORKS
def test_normalised_tokens(language_model, mapping_type):
    plain, normalised = (build(language_model, mapping_type, normalize_prefix=n) for n in (False, True))
    tokens = tokens_of(2) * 7
    unit = tokens / tokens.norm(2, -1, keepdim=True)
    assert torch.allclose(normalised.prefix(tokens), plain.prefix(unit), atol=1e-5)


@NETWORKS
@pytest.mark.parametrize("ending", (".pt", ".safetensors"))
def test_round_trip(language_model, tmp_path, mapping_type, ending):
    model = build(language_model, mapping_type)
    save_weights(tmp_path / f"run_latest{ending}", model.state_dict())
    described = {"model": model.config.to_dict() | {"language_model": str(language_model)}}
    assert described["model"]["tokens"] == "patches" and described["model"]["num_tokens"] == K
    described["language_model_config"] = model.gpt.config.to_dict()
    (tmp_path / "run.json").write_text(json.dumps(described))
    loaded, _, known = load_captioner(tmp_path / f"run_latest{ending}")
    assert known and loaded.config.shape == (K, D) and loaded.config.tokens == "patches"
    assert torch.equal(loaded.prefix(tokens_of(2)), model.prefix(tokens_of(2)))
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="put its json beside it"):
        load_captioner(tmp_path / f"run_latest{ending}", language_model)


@NETWORKS
@pytest.mark.parametrize(("dtype", "tolerance"), (("fp32", 1e-5), ("bf16", 0.05), ("int8", 0.1)))
def test_number_types(language_model, mapping_type, dtype, tolerance):
    model = build(language_model, mapping_type)
    expected = model.prefix(tokens_of(3))
    changed = prepare_for_inference(copy.deepcopy(model), dtype, CPU)
    found = changed.prefix(tokens_of(3)).float()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_lora_and_a_frozen_language_model(language_model):
    for only_prefix, rank in ((True, 0), (False, 2)):
        model = build(language_model, "resampler", only_prefix=only_prefix, lora_rank=rank)
        if rank:
            add_lora(model.gpt, rank)
        mean_loss(model, torch.ones(2, 3, dtype=torch.long), tokens_of(2), torch.tensor([3, 3])).backward()
        learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert all(name.startswith("clip_project.") or ".lora_" in name for name in learning)
        assert any(".lora_" in name for name in learning) == bool(rank) and "clip_project.queries" in learning


def test_json_of_one_vector_is_as_before():
    """Versions of before tokens read it: they refuse keys they do not know."""
    for mapping_type in ("mlp", "transformer"):
        told = CaptionConfig(D, mapping_type=mapping_type).to_dict()
        assert not {"tokens", "num_tokens", "num_heads"} & told.keys()
        assert (told["prefix_length"], told["prefix_length_clip"], told["num_layers"]) == (10, 10, 8)
        assert CaptionConfig.from_dict(told).shape == (D,)
    assert MLP(D, 16, 4).state_dict().keys() == {f"model.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}


@pytest.mark.parametrize(
    ("options", "said"),
    (
        ({"mapping_type": "resampler", "num_tokens": None}, "resampler reads tokens.*--tokens patches"),
        ({"mapping_type": "mlp", "prefix_length": 10}, "--prefix_length 10.*each of the 6 tokens.*leave it out"),
        ({"mapping_type": "transformer", "prefix_length_clip": 10}, "--prefix_length_clip 10.*leave it out"),
        ({"mapping_type": "resample"}, "mlp or transformer or resampler"),
    ),
)
def test_sizes_that_contradict_the_tokens(options, said):
    with pytest.raises(ValueError, match=said):
        config_of(**options)


@pytest.mark.parametrize("told", ({"num_tokens": 4}, {"tokens": "patches"}, {"num_tokens": 4, "tokens": "pooled"}))
def test_json_that_contradicts_itself(told):
    with pytest.raises(ValueError, match="contradict each other"):
        CaptionConfig.from_dict({"prefix_dim": D, **told})


def test_heads_must_share_the_width(language_model):
    with pytest.raises(ValueError, match="divisible by 3.*pass another --num_heads"):
        build(language_model, "resampler", num_heads=3)


def test_other_embeddings_are_refused(language_model):
    on_tokens, on_vectors = build(language_model, "resampler"), build(language_model, "mlp", num_tokens=None)
    for model, embedding, said in (
        (on_tokens, torch.randn(2, D), "one vector, 32 wide.*made for 6 tokens, 32 wide each"),
        (on_tokens, torch.randn(2, K + 1, D), "7 tokens, 32 wide each.*made for 6 tokens"),
        (on_tokens, torch.randn(2, K, 48), "48 wide each.*made for 6 tokens, 32 wide"),
        (on_vectors, torch.randn(2, K, D), "6 tokens, 32 wide each.*made for one vector, 32 wide"),
    ):
        with pytest.raises(ValueError, match=said):
            model.prefix(embedding)
