"""Number types for inference, and linear layers laid out for the processor that reads them.

torch's own float32 product goes to MKL, which on many processors reads a weight matrix at a third of the memory's
speed when it meets one row. oneDNN, which torch brings along too, reaches nearly all of it once the matrix has been
reordered into blocks, and is faster for many rows as well; benchmarks/results.md has the figures.
"""

import copy
import functools
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from utils.cli import note

DTYPES = ("auto", "fp32", "bf16", "int8")
ROWS_EXPECTED = 64  # rows that the blocks are laid out for; measured to serve 1 to 3,200 rows


def add_dtype_flag(parser):
    """Add --dtype."""
    parser.add_argument(
        "--dtype", choices=DTYPES,
        help="numbers to compute in: auto is bf16 where the device has it, int8 is for CPUs and rounds over the "
        "batch, so that an image's result depends a little on what shares its batch (default: fp32, but CLIP's own "
        "fp16 on a GPU)",
    )  # fmt: skip


def pick_dtype(name, device):
    """Return `fp32`, `bf16`, `int8` or None, the default, for a choice of --dtype.

    Raises: ValueError where the device cannot do it.
    """
    if name == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    if name == "int8" and device.type != "cpu":
        raise ValueError(f"--dtype int8 runs on the CPU only, not on {device}; use bf16 there")
    if name == "int8" and not set(torch.backends.quantized.supported_engines) - {"none"}:
        raise ValueError("--dtype int8: this build of torch has no 8-bit arithmetic for this processor; use fp32")
    if name == "bf16" and device.type == "cpu" and not _cpu_has_bf16():
        _say_emulated()
    return name


def _has_bf16(device):
    """Tell whether a device multiplies bf16 itself."""
    if device.type != "cuda":
        return _cpu_has_bf16()
    with torch.cuda.device(device):  # torch asks the current one, and counts emulation unless told not to
        return torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _say_emulated():
    """Say once that bf16 will be slow."""
    note("warning: this processor has no bf16 arithmetic: --dtype bf16 is emulated, slower than fp32 or int8")


def _cpu_has_bf16():
    """Tell whether the processor multiplies bf16 itself, instead of being slower at it."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@functools.cache
def _int8_sums_overflow():
    """Tell whether the processor adds two 8-bit products in 16 bits, where 7-bit inputs are needed to fit."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.backends.quantized.engine != "qnnpack" and not capabilities.get("avx512_vnni")


def prepare_for_inference(model, dtype, device):
    """Change a model in place so that it computes in `dtype`, as fast as the device does; it can be trained no more.

    Args:
        model: any module; its linear layers, and torch's self-attention, are replaced on the CPU.
        dtype: `fp32`, `bf16`, `int8` (the linear layers only), or None for the weights' own.
        device: where the model is.
    Returns: the model.
    """
    if dtype in ("bf16", "fp32"):
        _convert(model, torch.bfloat16 if dtype == "bf16" else torch.float32)
    if device.type == "cpu" and (dtype == "int8" or _packs(model)):
        layer = QuantizedLinear if dtype == "int8" else PackedLinear
        for parent in list(model.modules()):
            if type(parent).__name__ == "AttentionPool2d":  # of CLIP's ResNets: it reads its layers' weights itself
                continue
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.MultiheadAttention):
                    setattr(parent, name, PackedAttention(child, layer))
                elif isinstance(child, Conv1D):
                    setattr(parent, name, layer(child.weight.T, child.bias))
                elif type(child) is nn.Linear or type(child).__name__ == "FalconLinear":  # which computes the same
                    setattr(parent, name, layer(child.weight, child.bias))
    return model


def _packs(model):
    """Tell whether oneDNN can lay out this model's weights on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return not half or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _convert(model, dtype):
    """Convert all weights but those of norms that compute in float32 whatever they are given, as CLIP's do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) or (
            isinstance(module, nn.LayerNorm) and type(module) is not nn.LayerNorm
        ):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    gpt = next((module for module in model.modules() if hasattr(type(module), "_from_config")), None)
    if gpt is not None:
        _convert_buffers(gpt, dtype)


def _convert_buffers(gpt, dtype):
    """Convert the buffers that transformers itself makes in a model's type, as XGLM's positions; not the rotary ones.

    Args:
        gpt: language model of transformers.
    """
    config = copy.deepcopy(gpt.config)  # which is changed
    with torch.device("meta"):
        types = {name: buffer.dtype for name, buffer in gpt._from_config(config, dtype=dtype).named_buffers()}
    for name, buffer in gpt.named_buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(types.get(name, buffer.dtype))


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's blocks."""

    def __init__(self, weight, bias):
        """Reorder a weight.

        Args:
            weight: [out, in] float32 or bfloat16.
            bias: [out], or None.
        """
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS_EXPECTED)

    @functools.cached_property
    def weight(self):
        """The weight [out, in], for modules such as Mamba's that read it themselves; kept, as they do at every step."""
        return self.packed.to_dense()

    def forward(self, x):
        """Map [..., in] to [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class QuantizedLinear(nn.Module):
    """A linear layer of 8-bit whole numbers: weights scaled per output, inputs per call."""

    def __init__(self, weight, bias):
        """Quantise a weight; arguments as those of PackedLinear."""
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.bias = bias  # packed below too; kept so that the layer shows its numbers' type
        weight = weight.detach().float().contiguous()
        scales = weight.abs().amax(1).clamp_min(1e-8) / 127  # [out]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that quantised tensors will move to torchao
            quantized = torch.quantize_per_channel(
                weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8
            )
            self.packed = torch.ops.quantized.linear_prepack(quantized, None if bias is None else bias.detach().float())

    @functools.cached_property
    def weight(self):
        """The weight [out, in], as PackedLinear's."""
        return torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()

    def forward(self, x):
        """Map [..., in] to [..., out]."""
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=_int8_sums_overflow())


class PackedAttention(nn.Module):
    """What torch's MultiheadAttention computes when a sequence attends to itself, on other linear layers."""

    def __init__(self, attention, layer):
        """Take over the weights.

        Args:
            attention: nn.MultiheadAttention with sequence first, as CLIP's.
            layer: PackedLinear or QuantizedLinear.
        """
        super().__init__()
        self.heads = attention.num_heads
        self.inputs = layer(attention.in_proj_weight, attention.in_proj_bias)
        self.out = layer(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, query, key, value, need_weights=False, attn_mask=None):
        """Attend.

        Args:
            query: [T, B, E]; key and value must be the same.
            attn_mask: [T, T], added to the scores, or None.
        Returns: ([T, B, E], None).
        """
        length, batch, width = query.shape
        parts = self.inputs(query).view(length, batch, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 1, 3, 0, 4)  # each [B, H, T, E / H]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out(out.permute(2, 0, 1, 3).reshape(length, batch, width)), None
