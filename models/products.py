"""Matrix products by oneDNN for linear layers that are trained on the CPU.

torch gives float32 products to MKL, which reaches 70 to 95 % of oneDNN's speed at the sizes of training; bfloat16
products go to oneDNN already. For inference, utils.precision reorders the weights instead.
"""

import functools

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


class Product(torch.autograd.Function):
    """x W^T + b, as `torch.nn.functional.linear`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """Map [..., in] to [..., out].

        Args:
            weight: [out, in]. bias: [out], or None.
        """
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable  # else second derivatives would be silently wrong
    def backward(ctx, grad):
        """Return the gradients of the inputs that need one; `grad` is [..., out]."""
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "")
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            of_weight = rows.t() @ x.flatten(0, -2)  # here MKL is as fast
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


def multiply_by_onednn(model):
    """Make the linear layers of a captioner on the CPU multiply by oneDNN, where torch has it.

    The output layer is left alone, because MKL is faster for fifty thousand outputs. So are layers whose `forward` is
    replaced already, for example by accelerate, which fetches the weights in it.

    Args:
        model: ClipCaptionModel; its weights and their names do not change.
    """
    if not torch.backends.mkldnn.is_available():
        return
    output = model.gpt.get_output_embeddings()
    for layer in model.modules():
        if type(layer) in (nn.Linear, Conv1D) and layer is not output and "forward" not in vars(layer):
            layer.forward = functools.partial(_forward, layer)


def _forward(layer, x):
    """Run a linear layer by oneDNN; by its class where the product is not float32 on the CPU."""
    plain = torch.is_autocast_enabled("cpu") or x.dtype != torch.float32 or layer.weight.dtype != torch.float32
    if plain or not x.numel() or x.device.type != "cpu":
        return type(layer).forward(layer, x)
    return Product.apply(x, layer.weight.t() if isinstance(layer, Conv1D) else layer.weight, layer.bias)
