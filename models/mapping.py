"""Mapping networks: CLIP embedding -> prefix of language-model embeddings.

An image's embedding is one vector [D], or K tokens [K, D]. A network is built for one of the two, and its weights do
not fit the other.

Axes: B batch, D CLIP width, K CLIP tokens, P prefix, E language-model width, S = K + P, H heads.
Source: ClipCap (arXiv 2111.09734), section 3; rmokady/CLIP_prefix_caption train.py. Parameter names and
shapes for one vector are theirs, so that weights can be exchanged.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.settings import MAPPING_OPTIONS

NUM_HEADS = 8  # of the transformer mapping network, fixed by the published weights
MLP_RATIO = 2
POSITION_DEVIATION = 0.02  # of tokens' position embeddings at initialisation, as in GPT-2


class MappingNetwork(nn.Module):
    """Base of the mapping networks; models.settings says which options each takes."""

    @staticmethod
    def recognise(weights, embedding_dim):
        """Return the CaptionConfig fields that weights of this network for one vector tell; None: they are not its own.

        Args:
            weights: name -> tensor.
            embedding_dim: E.
        """


class MLP(MappingNetwork):
    """One hidden layer with tanh: D -> E·P/2 -> E·P; on tokens, each by itself: D -> E -> E, so that P is K."""

    def __init__(self, prefix_dim, embedding_dim, prefix_length, num_tokens=None):
        super().__init__()
        self.output_shape = (prefix_length, embedding_dim)
        if num_tokens:  # another name, so that without its json it is not taken for a network on one vector
            self.per_token = _two_layers(prefix_dim, embedding_dim, embedding_dim)
        else:
            width = prefix_length * embedding_dim
            self.model = _two_layers(prefix_dim, width // 2, width)

    def forward(self, clip_embedding):
        """Map [B, D], or [B, K, D], to a prefix [B, P, E]."""
        if clip_embedding.ndim == 3:
            return self.per_token(clip_embedding)
        return self.model(clip_embedding).unflatten(-1, self.output_shape)

    @staticmethod
    def recognise(weights, embedding_dim):
        """See MappingNetwork."""
        if not {"model.0.weight", "model.2.weight"} <= weights.keys():
            return None
        return {
            "prefix_dim": weights["model.0.weight"].shape[1],
            "prefix_length": weights["model.2.weight"].shape[0] // embedding_dim,
        }


def _two_layers(before, hidden, after):
    """Return two linear layers with tanh between."""
    return nn.Sequential(nn.Linear(before, hidden), nn.Tanh(), nn.Linear(hidden, after))


class Attention(nn.Module):
    """Multi-head attention without bias on queries, keys and values."""

    def __init__(self, dim, num_heads=NUM_HEADS):
        super().__init__()
        self.num_heads = num_heads
        self.to_queries = nn.Linear(dim, dim, bias=False)
        self.to_keys_values = nn.Linear(dim, dim * 2, bias=False)
        self.project = nn.Linear(dim, dim)

    def forward(self, x, read):
        """Let `x` [B, S, E] attend to `read` [B, R, E]; returns [B, S, E]."""
        queries = self.to_queries(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, S, E/H]
        keys_values = self.to_keys_values(read).unflatten(-1, (2, self.num_heads, -1))  # [B, R, 2, H, E/H]
        keys, values = keys_values.permute(2, 0, 3, 1, 4)  # [B, H, R, E/H] each
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.project(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with relu between."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * MLP_RATIO)
        self.fc2 = nn.Linear(dim * MLP_RATIO, dim)

    def forward(self, x):
        """Map [B, S, E] to [B, S, E]."""
        return self.fc2(F.relu(self.fc1(x)))


class TransformerLayer(nn.Module):
    """A pre-norm encoder layer."""

    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim)

    def forward(self, x):
        """Map [B, S, E] to [B, S, E]."""
        normed = self.norm1(x)
        x = x + self.attn(normed, normed)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, dim, num_layers):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(dim) for _ in range(num_layers))

    def forward(self, x):
        """Map [B, S, E] to [B, S, E]."""
        for layer in self.layers:
            x = layer(x)
        return x


class TransformerMapper(MappingNetwork):
    """K projections of the CLIP embedding and P learned constants attend to each other; the last P come out.

    Given tokens, it projects each with the same layer and adds a learned position.
    """

    def __init__(self, prefix_dim, embedding_dim, prefix_length, prefix_length_clip, num_layers, num_tokens=None):
        super().__init__()
        check_heads("transformer", embedding_dim, NUM_HEADS, "use --mapping_type mlp")
        self.prefix_length_clip = prefix_length_clip
        self.transformer = Transformer(embedding_dim, num_layers)
        self.linear = nn.Linear(prefix_dim, embedding_dim if num_tokens else prefix_length_clip * embedding_dim)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, embedding_dim))
        if num_tokens:
            self.positions = nn.Parameter(torch.randn(num_tokens, embedding_dim) * POSITION_DEVIATION)

    def forward(self, clip_embedding):
        """Map [B, D], or [B, K, D], to a prefix [B, P, E]."""
        clip_tokens = self.linear(clip_embedding)
        if clip_embedding.ndim == 3:
            clip_tokens = clip_tokens + self.positions
        else:
            clip_tokens = clip_tokens.unflatten(-1, (self.prefix_length_clip, -1))  # [B, K, E]
        constants = self.prefix_const.expand(len(clip_tokens), -1, -1)  # [B, P, E]
        mixed = self.transformer(torch.cat((clip_tokens, constants), dim=1))  # [B, K + P, E]
        return mixed[:, self.prefix_length_clip :]

    @staticmethod
    def recognise(weights, embedding_dim):
        """See MappingNetwork; the predecessors trained this one with the language model frozen."""
        if not {"linear.weight", "prefix_const"} <= weights.keys() or "positions" in weights:
            return None
        projected, prefix_dim = weights["linear.weight"].shape
        return {
            "prefix_dim": prefix_dim,
            "prefix_length": len(weights["prefix_const"]),
            "prefix_length_clip": projected // embedding_dim,
            "num_layers": len({name.split(".")[2] for name in weights if name.startswith("transformer.layers.")}),
            "only_prefix": True,
        }


class ResamplerLayer(nn.Module):
    """A pre-norm layer in which queries read tokens and each other."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm_tokens = nn.LayerNorm(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim)

    def forward(self, queries, tokens):
        """Map queries [B, P, E], given tokens [B, K, E], to [B, P, E]."""
        normed = self.norm1(queries)
        queries = queries + self.attn(normed, torch.cat((self.norm_tokens(tokens), normed), dim=1))
        return queries + self.mlp(self.norm2(queries))


class Resampler(MappingNetwork):
    """P learned queries read K tokens by cross-attention.

    Source: the Perceiver resampler of Flamingo (arXiv 2204.14198), section 2.1 and appendix A.1.1; here
    positions are learned and the feed-forward layer is that of the transformer above; as there, the output is not
    normalised.
    """

    def __init__(self, prefix_dim, embedding_dim, prefix_length, num_layers, num_heads, num_tokens):
        super().__init__()
        check_heads("resampler", embedding_dim, num_heads, "pass another --num_heads")
        self.linear = nn.Linear(prefix_dim, embedding_dim)
        self.positions = nn.Parameter(torch.randn(num_tokens, embedding_dim) * POSITION_DEVIATION)
        self.queries = nn.Parameter(torch.randn(prefix_length, embedding_dim))
        self.layers = nn.ModuleList(ResamplerLayer(embedding_dim, num_heads) for _ in range(num_layers))

    def forward(self, clip_embedding):
        """Map [B, K, D] to a prefix [B, P, E]."""
        tokens = self.linear(clip_embedding) + self.positions  # [B, K, E]
        queries = self.queries.expand(len(tokens), -1, -1)  # [B, P, E]
        for layer in self.layers:
            queries = layer(queries, tokens)
        return queries


def check_heads(name, embedding_dim, num_heads, remedy):
    """Refuse a width that the attention heads do not divide; raises ValueError."""
    if embedding_dim % num_heads:
        raise ValueError(
            f"--mapping_type {name} needs a language model whose embedding width is divisible by {num_heads}; this "
            f"one's is {embedding_dim}: {remedy}"
        )


# --mapping_type, as in MAPPING_OPTIONS -> its class
MAPPING_NETWORKS = {"mlp": MLP, "transformer": TransformerMapper, "resampler": Resampler}


def build_mapping_network(config, embedding_dim):
    """Return a new mapping network.

    Args:
        config: CaptionConfig.
        embedding_dim: E.
    Raises: ValueError where the network does not fit this width.
    """
    network, options = MAPPING_NETWORKS[config.mapping_type], MAPPING_OPTIONS[config.mapping_type].options
    own = {name: getattr(config, name) for name in options}
    return network(config.prefix_dim, embedding_dim, config.prefix_length, num_tokens=config.num_tokens, **own)


def recognise_mapping_network(weights, embedding_dim):
    """Return the CaptionConfig fields that a mapping network's weights tell; None: they fit no network on one vector.

    Args:
        weights: name -> tensor, of the network alone.
        embedding_dim: E.
    """
    for name, network in MAPPING_NETWORKS.items():
        found = network.recognise(weights, embedding_dim)
        if found:
            return {"mapping_type": name} | found
    return None
