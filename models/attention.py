"""Attention of one new token per row, as decoding asks for it.

torch's fused attention is made for many queries. On a processor it takes a step of many rows three to five times as
long as two batched products do.

Axes: R rows, H heads, G heads of keys and values, T positions so far, S slots for them, D width of a head.
"""

import torch
from torch.nn import functional as F

from utils.lean import lean

with lean():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

NAME = "clipcap"  # among transformers' implementations
FEW_ROWS = 4  # of which torch's own is the faster
# what a layer may ask for beyond plain attention, and what it says where it does not
PLAIN = {"dropout": 0.0, "position_bias": None, "softcap": None, "s_aux": None, "output_attentions": False}


def attend(module, query, key, value, attention_mask, scaling=None, packing=None, **options):
    """Attend as transformers' `sdpa` does, which is called for all but single queries of many rows on a processor.

    Args:
        module: the attention layer.
        query: [R, H, Q, D]. key, value: [R, G, T, D]; H is a multiple of G.
        attention_mask: of transformers, or None.
        scaling: of the products; None: 1 / sqrt(D).
        packing: models.packing.Packing, where captions lie behind one another; the mask does not count then.
        options: whatever else a layer asks for.
    Returns: [R, Q, H, D], None.
    """
    if packing is not None:
        return packing.attend(sdpa_attention_forward, module, query, key, value, scaling=scaling, **options)
    if (
        torch.compiler.is_compiling()  # or exporting, where rows are not counted yet
        or query.shape[2] > 1
        or len(query) <= FEW_ROWS
        or query.device.type != "cpu"
        or attention_mask is not None
        or any(options.get(name, usual) != usual for name, usual in PLAIN.items())
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, width)  # [R, G, H / G, D]
    out = _products(grouped, key, value, width**-0.5 if scaling is None else scaling)
    return out.reshape(rows, 1, heads, -1), None


def attend_one(query, key, value, length, scaling, mask=None):
    """Attend with one query per row to slots of which the first are in use, in the way that is the faster.

    Args:
        query: [R, H, 1, D]. key, value: [R, H, S, D]; what is not in use must be finite.
        length: T, slots in use.
        scaling: of the products.
        mask: bool, [R, 1, 1, T], False where a row has nothing; or None.
    Returns: [R, H, 1, D].
    """
    if len(query) <= FEW_ROWS or query.device.type != "cpu":
        used = (slots[:, :, :length] for slots in (key, value))
        return F.scaled_dot_product_attention(query, *used, attn_mask=mask, scale=scaling)
    return _products(query, key, value, scaling, length, mask)


def _products(query, key, value, scaling, length=None, mask=None):
    """Attend by two batched products; arguments as of `attend_one`, except that all slots may be in use.

    The products run over all slots: oneDNN copies what is not contiguous and makes a kernel for every new length.
    """
    scores = (query @ key.transpose(-1, -2))[..., :length].float() * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).to(value.dtype)
    unused = key.shape[2] - scores.shape[-1]
    return (F.pad(weights, (0, unused)) if unused else weights) @ value


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attend_in(gpt):
    """Let a language model of transformers attend by `attend`, where it attends by `sdpa` and can be told to."""
    if gpt.config._attn_implementation == "sdpa" and gpt._can_set_attn_implementation():
        gpt.set_attn_implementation(NAME)
    return gpt
