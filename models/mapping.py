"""Mapping networks: CLIP embedding -> prefix of language-model embeddings.

Axes: B batch, D CLIP width, K CLIP tokens, P prefix, E language-model width, S = K + P, H heads.
Source: ClipCap (arXiv 2111.09734), section 3; rmokady/CLIP_prefix_caption train.py. Parameter names and
shapes are theirs, so that weights pass both ways.
"""

import torch
from torch import nn
from torch.nn import functional as F

NUM_HEADS = 8  # of the transformer mapping network, fixed by the published weights
MLP_RATIO = 2


class MLP(nn.Module):
    """One hidden layer with tanh: D -> E·P/2 -> E·P."""

    options = {}

    def __init__(self, prefix_dim, embedding_dim, prefix_length):
        super().__init__()
        self.output_shape = (prefix_length, embedding_dim)
        width = prefix_length * embedding_dim
        self.model = nn.Sequential(nn.Linear(prefix_dim, width // 2), nn.Tanh(), nn.Linear(width // 2, width))

    def forward(self, clip_embedding):
        """Map [B, D] to a prefix [B, P, E]."""
        return self.model(clip_embedding).unflatten(-1, self.output_shape)

    @staticmethod
    def recognise(weights, embedding_dim):
        """Return what the weights of one tell of its configuration; None: they are of another network."""
        if not {"model.0.weight", "model.2.weight"} <= weights.keys():
            return None
        return {
            "prefix_dim": weights["model.0.weight"].shape[1],
            "prefix_length": weights["model.2.weight"].shape[0] // embedding_dim,
        }


class Attention(nn.Module):
    """Multi-head self-attention without bias on queries, keys and values."""

    def __init__(self, dim):
        super().__init__()
        self.to_queries = nn.Linear(dim, dim, bias=False)
        self.to_keys_values = nn.Linear(dim, dim * 2, bias=False)
        self.project = nn.Linear(dim, dim)

    def forward(self, x):
        """Map [B, S, E] to [B, S, E]."""
        queries = self.to_queries(x).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)  # [B, H, S, E/H]
        keys_values = self.to_keys_values(x).unflatten(-1, (2, NUM_HEADS, -1))  # [B, S, 2, H, E/H]
        keys, values = keys_values.permute(2, 0, 3, 1, 4)  # [B, H, S, E/H] each
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
        x = x + self.attn(self.norm1(x))
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


class TransformerMapper(nn.Module):
    """K projections of the CLIP embedding and P learned constants attend to each other; the last P come out."""

    options = {"prefix_length_clip": 10, "num_layers": 8}

    def __init__(self, prefix_dim, embedding_dim, prefix_length, prefix_length_clip, num_layers):
        super().__init__()
        if embedding_dim % NUM_HEADS:
            raise ValueError(
                f"--mapping_type transformer needs a language model whose embedding width is divisible by "
                f"{NUM_HEADS}; this one's is {embedding_dim}: use --mapping_type mlp"
            )
        self.prefix_length_clip = prefix_length_clip
        self.transformer = Transformer(embedding_dim, num_layers)
        self.linear = nn.Linear(prefix_dim, prefix_length_clip * embedding_dim)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, embedding_dim))

    def forward(self, clip_embedding):
        """Map [B, D] to a prefix [B, P, E]."""
        clip_tokens = self.linear(clip_embedding).unflatten(-1, (self.prefix_length_clip, -1))  # [B, K, E]
        constants = self.prefix_const.expand(len(clip_tokens), -1, -1)  # [B, P, E]
        mixed = self.transformer(torch.cat((clip_tokens, constants), dim=1))  # [B, K + P, E]
        return mixed[:, self.prefix_length_clip :]

    @staticmethod
    def recognise(weights, embedding_dim):
        """See that of MLP; the predecessors trained this one with the language model frozen."""
        if not {"linear.weight", "prefix_const"} <= weights.keys():
            return None
        projected, prefix_dim = weights["linear.weight"].shape
        return {
            "prefix_dim": prefix_dim,
            "prefix_length": len(weights["prefix_const"]),
            "prefix_length_clip": projected // embedding_dim,
            "num_layers": len({name.split(".")[2] for name in weights if name.startswith("transformer.layers.")}),
            "only_prefix": True,
        }


# --mapping_type -> its class, whose `options` are the fields of CaptionConfig that it alone reads, with their defaults
MAPPING_NETWORKS = {"mlp": MLP, "transformer": TransformerMapper}


def build_mapping_network(config, embedding_dim):
    """Return a new mapping network.

    Args:
        config: CaptionConfig.
        embedding_dim: E.
    Raises: ValueError where the network does not fit this width.
    """
    network = MAPPING_NETWORKS[config.mapping_type]
    options = {name: getattr(config, name) for name in network.options}
    return network(config.prefix_dim, embedding_dim, config.prefix_length, **options)


def recognise_mapping_network(weights, embedding_dim):
    """Return what a mapping network's weights tell of its CaptionConfig, or None where no network has such.

    Args:
        weights: name -> tensor, of the network alone.
        embedding_dim: E.
    """
    for name, network in MAPPING_NETWORKS.items():
        told = network.recognise(weights, embedding_dim)
        if told:
            return {"mapping_type": name} | told
    return None
