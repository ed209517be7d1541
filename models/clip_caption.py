"""The captioner: mapping network + language model.

Axes: B batch, D CLIP width, P prefix, E language-model width, T caption tokens, V vocabulary.
"""

from dataclasses import asdict, dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F

from models.mapping import MAPPING_NETWORKS, build_mapping_network


@dataclass
class CaptionConfig:
    """What must be known to rebuild a captioner and to feed it; stored beside its weights.

    Args:
        prefix_dim: D, width of the CLIP embedding.
        prefix_length: P, prefix positions given to the language model.
        prefix_length_clip: K, tokens the transformer mapping network makes of the CLIP embedding.
        mapping_type: key of MAPPING_NETWORKS.
        num_layers: layers of the transformer mapping network.
        only_prefix: the language model was frozen.
        normalize_prefix: CLIP embeddings are divided by their L2 norm first.
        language_model: name or folder the language model and its tokenizer came from.
        clip_model_type: name or file of the encoder whose embeddings it was trained on.
        clip_sha256: of that file, or of the one that the name stands for.
        lora_rank: rank of the LoRA that the language model learns; 0: none.
        load_in: precision that the language model's weights were kept in, untrained; None: float32.
    """

    prefix_dim: int
    prefix_length: int = 10
    prefix_length_clip: int = 10
    mapping_type: str = "mlp"
    num_layers: int = 8
    only_prefix: bool = False
    normalize_prefix: bool = False
    language_model: str = "gpt2"
    clip_model_type: str | None = None
    clip_sha256: str | None = None
    lora_rank: int = 0
    load_in: str | None = None

    def __post_init__(self):
        if self.mapping_type not in MAPPING_NETWORKS:
            raise ValueError(f"mapping_type is {self.mapping_type!r}; it can be {' or '.join(MAPPING_NETWORKS)}")

    def to_dict(self):
        """Return the fields as a plain dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """Build from a dictionary.

        Raises: ValueError naming a key of a later version, which would change what the captioner is.
        """
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown key {min(unknown)!r}: it was written by a newer version; update this one")
        return cls(**values)


class ClipCaptionModel(nn.Module):
    """Mapping network and language model, trained together (ClipCap, section 3.2)."""

    def __init__(self, config, gpt):
        """Put a new mapping network before a language model.

        Args:
            config: CaptionConfig.
            gpt: any causal language model of transformers that takes `inputs_embeds`.
        """
        super().__init__()
        self.config = config
        self.gpt = gpt
        embedding_dim = gpt.get_input_embeddings().embedding_dim
        self.clip_project = build_mapping_network(config, embedding_dim)

    def prefix(self, clip_embedding):
        """Map CLIP features to language-model embeddings, normalising them first where the config says so.

        Args:
            clip_embedding: [B, D].
        Returns: [B, P, E] in the mapping network's dtype.
        Raises: ValueError where D is not `prefix_dim`.
        """
        if clip_embedding.shape[-1] != self.config.prefix_dim:
            raise ValueError(
                f"the CLIP embedding is {clip_embedding.shape[-1]} wide and this captioner was made for "
                f"{self.config.prefix_dim} (encoder {self.config.clip_model_type or 'unknown'}): use that encoder"
            )
        if self.config.normalize_prefix:
            clip_embedding = F.normalize(clip_embedding.float(), dim=-1)
        return self.clip_project(clip_embedding.to(next(self.clip_project.parameters()).dtype))

    def embed(self, tokens, clip_embedding):
        """Return [B, P + T, E]: the prefix, then the tokens' embeddings."""
        token_embeddings = self.gpt.get_input_embeddings()(tokens)  # [B, T, E]
        prefix = self.prefix(clip_embedding).to(token_embeddings)
        return torch.cat((prefix, token_embeddings), dim=1)

    def forward(self, tokens, clip_embedding, mask=None):
        """Score caption tokens given image features.

        Args:
            tokens: [B, T] token ids.
            clip_embedding: [B, D] CLIP features.
            mask: [B, P + T], 1 where there is a prefix vector or a real token; None where all are.
        Returns: [B, P + T, V] logits; position P - 1 predicts the first token.
        Raises: ValueError where D is not `prefix_dim`.
        Source: ClipCap paper, section 3; rmokady train.py `ClipCaptionModel.forward`.
        """
        embeddings = self.embed(tokens, clip_embedding)
        return self.gpt(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits

    def token_logprobs(self, tokens, clip_embedding, lengths):
        """Return the log-probability of every caption token, given the image and the tokens before it.

        Losses, rewards' gradients and explanations are made of these. Padding is told by position, not by token id:
        the predecessor ignores id 0 and so never learns `!`. Logits are computed for the positions only that a caption
        token follows.

        Args:
            tokens: [B, T] token ids, padded on the right with any id.
            clip_embedding: [B, D] CLIP features.
            lengths: [B] number of real tokens of each caption.
        Returns: [sum(lengths)] float32, caption after caption; their mean, negated, is the paper's loss.
        Source: ClipCap paper, equation 2.
        """
        embeddings = self.embed(tokens[:, :-1], clip_embedding)  # nothing follows the last
        columns = tokens.shape[1]
        real = torch.arange(columns, device=lengths.device) < lengths[:, None]  # [B, T]
        # as numbers, told where the lengths are: a mask would make the GPU wait for its count
        rows, places = real.nonzero(as_tuple=True)  # [sum(lengths)] each
        wanted = (rows * columns + places).to(tokens.device, non_blocking=True)  # of [B, T]

        def keep_telling(_, inputs):
            hidden = inputs[0][:, -columns:].flatten(0, 1)  # [B T, E], each before the token of its place
            return (hidden.index_select(0, wanted.to(hidden.device)),)  # [sum(lengths), E]

        # the output layer, a third of GPT-2's work, is spared what no loss is taken of
        hook = self.gpt.get_output_embeddings().register_forward_pre_hook(keep_telling)
        try:
            # padding stands on the right, where no real token sees it
            out = self.gpt(inputs_embeds=embeddings, use_cache=False, logits_to_keep=columns)
        finally:
            hook.remove()
        # of [sum(lengths), V]
        targets = tokens.flatten().index_select(0, wanted).to(out.logits.device)
        return -F.cross_entropy(out.logits.float(), targets, reduction="none")

    def caption(self, search, *arguments):
        """Return `search(self, *arguments)`: a method of its own, for which sharded weights are gathered.

        Args:
            search: function of a captioner, such as `generate_captions`.
        """
        return search(self, *arguments)


class ClipCaptionPrefix(ClipCaptionModel):
    """Only the mapping network learns: the language model takes no gradients and has no dropout."""

    def __init__(self, config, gpt):
        super().__init__(config, gpt)
        self.gpt.requires_grad_(False)
        self.gpt.eval()

    def train(self, mode=True):
        """Set the mapping network's mode; the language model stays in evaluation mode."""
        super().train(mode)
        self.gpt.eval()
        return self


def build_captioner(config, gpt):
    """Return the captioner that `config` describes, around the language model `gpt`."""
    return (ClipCaptionPrefix if config.only_prefix else ClipCaptionModel)(config, gpt)
