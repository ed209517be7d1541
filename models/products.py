"""Linear layers that learn on a processor, multiplied by oneDNN.

torch gives float32 products to MKL, which reaches 70 to 95 % of oneDNN's speed at the sizes of training; bfloat16 ones
go to oneDNN already. Layers that learn no more are laid out anew instead: utils.precision.
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
    @once_differentiable  # else gradients of gradients would be wrong without a word
    def backward(ctx, grad):
        """Return the gradients of what is asked for; `grad` is [..., out]."""
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
    """Let the linear layers of a captioner on the CPU multiply by oneDNN, where torch has it.

    The output layer stays: of fifty thousand outputs MKL is the faster. So do layers that others have put a `forward`
    on, such as accelerate, which fetches the weights there.

    Args:
        model: ClipCaptionModel; its weights and their names stay as they are.
    """
    if not torch.backends.mkldnn.is_available():
        return
    output = model.gpt.get_output_embeddings()
    for layer in model.modules():
        if type(layer) in (nn.Linear, Conv1D) and layer is not output and "forward" not in vars(layer):
            layer.forward = functools.partial(_forward, layer)


def _forward(layer, x):
    """Run a linear layer; by its class where the product is none of float32."""
    plain = torch.is_autocast_enabled("cpu") or x.dtype != torch.float32 or layer.weight.dtype != torch.float32
    if plain or not x.numel() or x.device.type != "cpu":
        return type(layer).forward(layer, x)
    return Product.apply(x, layer.weight.t() if isinstance(layer, Conv1D) else layer.weight, layer.bias)
