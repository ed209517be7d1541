"""Captions of several lengths behind one another, so that no layer computes padding; only attention needs it.

Axes: B captions, S positions of the longest, N positions of all captions together, H heads, D width of a head.
"""

import torch
import transformers
from packaging.version import Version
from torch.autograd.function import once_differentiable

from models.attention import NAME

# model types whose layers know of positions and of other rows by `position_ids` and attention alone -> transformers'
# first version in which the model passes on to its attention what it does not know itself
PASSES_ON = {"gpt2": Version("5.3"), "opt": Version("4.56")}
TRANSFORMERS = Version(transformers.__version__)


def takes_packed(gpt):
    """Tell whether a language model computes the same of captions behind one another."""
    config = gpt.config
    return (
        config.model_type in PASSES_ON
        and PASSES_ON[config.model_type] <= TRANSFORMERS
        and config._attn_implementation == NAME
        and not getattr(config, "add_cross_attention", False)
        and not getattr(config, "layerdrop", 0)  # of OPT, which leaves out layers
    )


def real_positions(lengths, width):
    """Return (rows, columns) of what is no padding in [B, width], [N] each, caption after caption.

    Indices, computed on the lengths' device: a mask on the GPU would synchronise to count its entries.
    """
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).nonzero(as_tuple=True)


class Take(torch.autograd.Function):
    """Rows of a tensor, each at most once: then the gradient is a copy too, not a sum."""

    @staticmethod
    def forward(ctx, x, places):
        """Map [R, ...] to [N, ...]; `places` is [N] of indices."""
        ctx.save_for_backward(places)
        ctx.rows = len(x)
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient [R, ...], 0 where no row was taken."""
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, places, grad), None


class Put(torch.autograd.Function):
    """The reverse of Take: rows [N, ...] at their places among R, 0 elsewhere."""

    @staticmethod
    def forward(ctx, x, places, rows):
        """Map [N, ...] to [R, ...]."""
        ctx.save_for_backward(places)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient [N, ...]."""
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


class Packing:
    """Where captions lie behind one another, and in a padded batch.

    Attributes:
        positions: [1, N], of each in its caption.
        attended: calls of `attend`, one per layer.
    """

    def __init__(self, lengths, width, device):
        """Lay captions out.

        Args:
            lengths: [B], of each caption.
            width: S of the padded batch.
            device: of the tensors to come.
        """
        rows, columns = real_positions(lengths, width)
        self.shape, self.attended = torch.Size((len(lengths), width)), 0
        self.positions = columns[None].to(device, non_blocking=True)
        self.places = (rows * width + columns).to(device, non_blocking=True)

    def arguments(self, embeddings):
        """Return what a language model is called with.

        Args:
            embeddings: [B, S, E].
        """
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeddings.device)  # else transformers makes [N, N]
        return {
            "inputs_embeds": self.take(embeddings), "position_ids": self.positions, "attention_mask": mask,
            "packing": self,
        }  # fmt: skip

    def take(self, x):
        """Map a padded [B, S, ...] to [1, N, ...]."""
        return Take.apply(x.flatten(0, 1), self.places.to(x.device))[None]

    def put(self, x):
        """Map [1, N, ...] to a padded [B, S, ...], with 0 for padding."""
        return Put.apply(x[0], self.places.to(x.device), self.shape.numel()).unflatten(0, self.shape)

    def attend(self, attend, module, query, key, value, **options):
        """Let each caption attend to itself; padding is on the right, where no position of a caption sees it.

        Args:
            attend: transformers' attention, which is given padded tensors and no mask.
            module: the attention layer.
            query, key, value: [1, H, N, D].
            options: whatever else the layer asks for.
        Returns: [1, N, H, D], None.
        """
        self.attended += 1
        padded = (self.put(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))  # [B, H, S, D]
        # a layer may think from the mask it was given that nothing is to be hidden
        return self.take(attend(module, *padded, None, **(options | {"is_causal": True}))[0]), None
