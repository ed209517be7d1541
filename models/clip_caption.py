"""The captioner: mapping network + language model.

Axes: B batch, D CLIP width, K CLIP tokens, P prefix, E language-model width, T caption tokens, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.language import decoder_layers
from models.mapping import build_mapping_network
from models.packing import Packing, Take, real_positions, takes_packed
from utils.cli import in_words

# share of positions that are not padding, below which leaving padding out is worth the copies
PACKING_PAYS = 0.9


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
            clip_embedding: [B, D], or [B, K, D].
        Returns: [B, P, E] in the mapping network's dtype.
        Raises: ValueError where the embeddings are not as `config.shape` says.
        """
        if tuple(clip_embedding.shape[1:]) != self.config.shape:
            raise ValueError(
                f"an image's CLIP embedding is {in_words(clip_embedding.shape[1:])}, and this captioner was made for "
                f"{in_words(self.config.shape)} (encoder {self.config.clip_model_type or 'unknown'}): use that encoder"
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
            clip_embedding: [B, D] CLIP features, or [B, K, D].
            mask: [B, P + T], 1 where there is a prefix vector or a real token; None where all are.
        Returns: [B, P + T, V] logits; position P - 1 predicts the first token.
        Raises: ValueError where the features are not as `config.shape` says.
        Source: ClipCap paper, section 3; rmokady train.py `ClipCaptionModel.forward`.
        """
        embeddings = self.embed(tokens, clip_embedding)
        return self.gpt(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits

    def token_logprobs(self, tokens, clip_embedding, lengths):
        """Return the log-probability of every caption token, given the image and the tokens before it.

        Losses, rewards' gradients and explanations are computed from these. Padding is found by position, not by token
        id: the predecessor ignores id 0 and so never learns `!`. Logits are computed only at positions that a caption
        token follows.

        Args:
            tokens: [B, T] token ids, padded on the right with any id.
            clip_embedding: [B, D] CLIP features, or [B, K, D].
            lengths: [B] number of real tokens of each caption.
        Returns: [sum(lengths)] float32, caption after caption; their mean, negated, is the paper's loss.
        Source: ClipCap paper, equation 2.
        """
        embeddings = self.embed(tokens[:, :-1], clip_embedding)  # [B, S, E]; the last token predicts nothing
        (captions, columns), width = tokens.shape, embeddings.shape[1]
        before = width - columns  # positions before the one that predicts the first token
        rows, places = real_positions(lengths, columns)  # [sum(lengths)] each
        used = lengths.clamp(max=columns) + before  # [B]
        if takes_packed(self.gpt) and 0 < used.sum() < PACKING_PAYS * captions * width:
            packing = Packing(used, width, tokens.device)
            begins = used.cumsum(0) - used
            given = packing.arguments(embeddings)
        else:
            packing, begins = None, torch.arange(captions, device=lengths.device) * width
            given = {"inputs_embeds": embeddings}  # no mask: padding is on the right, where no real token sees it
        predicting = (begins[rows] + before + places).to(tokens.device, non_blocking=True)  # among all positions

        def keep_predicting(_, inputs):
            hidden = inputs[0].flatten(0, 1)  # [B S, E] or [N, E]
            return (Take.apply(hidden, predicting.to(hidden.device)),)  # [sum(lengths), E]

        # the output layer, a third of GPT-2's work, runs only at the positions in the result
        hook = self.gpt.get_output_embeddings().register_forward_pre_hook(keep_predicting)
        try:
            logits = self.gpt(**given, use_cache=False).logits  # [sum(lengths), V]
        finally:
            hook.remove()
        if packing is not None and packing.attended != len(decoder_layers(self.gpt)[1]):
            raise RuntimeError(
                "the language model's layers did not all attend as models.packing asks: captions have seen each other"
            )
        wanted = (rows * columns + places).to(tokens.device, non_blocking=True)  # of [B, T]
        targets = tokens.flatten().index_select(0, wanted).to(logits.device)
        return -F.cross_entropy(logits.float(), targets, reduction="none")

    def caption(self, search, *arguments):
        """Return `search(self, *arguments)`: as a method, for which FSDP gathers sharded weights.

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
