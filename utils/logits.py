"""Logits: the largest of each row, and output layers of fewer bits whose largest logits are those of float32.

Axes: R rows, V vocabulary, N numbers wanted of a row, E width of the language model.
"""

import torch
from torch import nn

BLOCK = 64  # numbers; measured on vocabularies of 32,000 to 250,000, for 1 to 64 rows
SHORT = 4096  # numbers in a row below which torch.topk is as fast
REFINED = 8  # logits of a row that RefinedOutput computes anew


def largest(rows, number):
    """Return the largest numbers of each row and where they are, [R, N] each, the largest first.

    As torch.topk, which on a CPU goes through a row one number at a time. Here vector instructions find the largest
    number of every block, and only the best blocks are searched. Of equal numbers, the first is the largest where one
    is wanted, whatever the other rows are.

    Args:
        rows: [R, V] of any floating type.
        number: N, at most V.
    """
    if rows.device.type != "cpu" or rows.shape[-1] < max(SHORT, BLOCK * number):
        return _largest(rows, number)
    whole = rows.shape[-1] // BLOCK * BLOCK
    tops = rows[:, :whole].unflatten(-1, (-1, BLOCK)).amax(-1)  # [R, blocks]
    if whole < rows.shape[-1]:
        tops = torch.cat((tops, rows[:, whole:].amax(-1, keepdim=True)), dim=-1)
    blocks = _largest(tops, number)[1].sort(-1).values  # [R, N]
    places = (blocks[..., None] * BLOCK + torch.arange(BLOCK)).flatten(1)  # [R, N · BLOCK]
    beyond = places >= rows.shape[-1]
    places.clamp_(max=rows.shape[-1] - 1)
    found, chosen = _largest(rows.gather(1, places).masked_fill_(beyond, -torch.inf), number)
    return found, places.gather(1, chosen)


def _largest(rows, number):
    """The same by torch."""
    return rows.max(-1, keepdim=True) if number == 1 else rows.topk(number)


class RefinedOutput(nn.Module):
    """An output layer of fewer bits; the largest logits of a row are computed anew in float32.

    bfloat16 keeps eight bits of a logit: of one near 100 it drops what is below a half, which decides between words
    more often than all other rounding of a step. A kernel that multiplies bfloat16 and returns float32 is missing on
    CPUs; a few of the logits, from rows of the embedding, which is the same matrix, cost next to nothing.
    """

    def __init__(self, product, embedding):
        """Wrap an output layer.

        Args:
            product: linear layer without a bias, of any kind, from [..., E] to [..., V].
            embedding: the language model's, whose weight [V, E] the layer multiplies by.
        """
        super().__init__()
        self.product = product
        self.rows_of = (embedding,)  # in a tuple: not a part of this module too

    @property
    def weight(self):
        """The weight [V, E]."""
        return self.rows_of[0].weight

    def forward(self, x):
        """Map [..., E] to float32 [..., V]."""
        rounded = self.product(x).flatten(0, -2)  # [R, V]
        refined = largest(rounded, min(REFINED, rounded.shape[-1]))[1]  # [R, N]
        rows = x.flatten(0, -2).float()[..., None]  # [R, E, 1]
        logits = rounded.float().scatter_(1, refined, (self.weight[refined].float() @ rows)[..., 0])
        return logits.unflatten(0, x.shape[:-1])


def refine_output(gpt):
    """Wrap a language model's output layer in a RefinedOutput, in place, where it multiplies by the embedding.

    A layer whose `forward` is replaced, as accelerate does to move its inputs between devices, stays as it is.
    """
    product, embedding = gpt.get_output_embeddings(), gpt.get_input_embeddings()
    tied = type(product) is nn.Linear and product.weight is embedding.weight and product.bias is None
    if tied and "forward" not in vars(product):
        gpt.set_output_embeddings(RefinedOutput(product, embedding))
