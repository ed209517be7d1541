"""dtypes for inference, and linear layers laid out for the processor that reads them.

torch's own float32 matmul goes to MKL, which on many processors reads a weight matrix at a third of the memory's
bandwidth when the input has one row. oneDNN, which torch ships too, reaches nearly all of it once the matrix has been
reordered into blocks, and is faster for many rows as well; benchmarks/results.md has the figures.
"""

import copy
import functools
import inspect
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from utils.cli import note
from utils.files import reason
from utils.lean import undrawn
from utils.logits import refine_output

ROWS_EXPECTED = 64  # rows that the blocks are laid out for; measured to serve 1 to 3,200 rows
PROBED = 4  # positions that show whether a language model computes the same with other layers
# largest difference from a plain layer's output, as a share of its largest number; measured: 4e-7 in float32, 0.03 in
# int8, whose bound only rules out nonsense, for some models lose more by it
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.int8: 0.5}


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
    """Tell whether a device multiplies bf16 natively."""
    if device.type != "cuda":
        return _cpu_has_bf16()
    with torch.cuda.device(device):  # torch asks the current one, and counts emulation unless told not to
        return torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _say_emulated():
    """Say once that bf16 will be slow."""
    note("warning: this processor has no bf16 arithmetic: --dtype bf16 is emulated, slower than fp32 or int8")


def _cpu_has_bf16():
    """Tell whether the processor multiplies bf16 natively, instead of emulating it more slowly."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@functools.cache
def _int8_sums_overflow():
    """Tell whether the processor adds two 8-bit products in 16 bits, where 7-bit inputs are needed to fit."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.backends.quantized.engine != "qnnpack" and not capabilities.get("avx512_vnni")


def prepare_for_inference(model, dtype, device, probe=None, repack=True):
    """Change a model in place to compute in `dtype`, as fast as the device can; it can no longer be trained.

    Args:
        model: any module; on the CPU its linear layers and torch's attention are replaced, a language model's only
            where its outputs stay the same.
        dtype: `fp32`, `bf16`, `int8` (the linear layers only), or None for the weights' own.
        device: where the model is.
        probe: function without arguments to a tensor that the model computes; if given, layers are replaced only where
            this tensor stays the same. Without it, all but a language model's are known to be replaceable.
        repack: lay the weights of bf16 and fp32 out for the processor, which takes as long as decoding some twenty
            tokens; several rows at once soon repay it, a single one after a hundred tokens or so.
    Returns: the model.
    Raises: ValueError where the model cannot compute in `dtype`.
    """
    if dtype in ("bf16", "fp32"):
        _convert(model, torch.bfloat16 if dtype == "bf16" else torch.float32)
    gpt = next((module for module in model.modules() if hasattr(module, "generate")), None) if probe is None else None
    if gpt is not None and dtype in ("bf16", "int8"):
        refine_output(gpt)
    _put_quick_gelu(model)
    checked, what, compute = (model, "encoder", probe) if probe else (gpt, "language model", lambda: _logits(gpt))
    if dtype == "bf16" and checked is not None:
        try:
            compute()
        except RuntimeError as error:
            raise ValueError(f"--dtype bf16 does not suit this {what} ({reason(error)}); use fp32") from None
    if device.type == "cpu" and (dtype == "int8" or (repack and _packs(model))):
        layer = QuantizedLinear if dtype == "int8" else PackedLinear
        if checked is not None:
            _pack_checked(checked, layer, compute, what)
        for parent, name in _places(model, but=checked):  # known to be replaceable: OpenAI's CLIP, mapping networks
            setattr(parent, name, _replacement(getattr(parent, name), layer))
    return model


class QuickGELU(nn.Module):
    """CLIP's x sigmoid(1.702 x), with one new tensor instead of three: a tenth of the time of ViT-B/32 on a CPU."""

    def forward(self, x):
        """Map a tensor of any shape, without gradients."""
        return (1.702 * x).sigmoid_().mul_(x)


def _put_quick_gelu(model):
    """Put ours in the place of a library's QuickGELU that computes the same, to the last bit."""
    for parent, name, child in _children(model):
        if type(child).__name__ in ("QuickGELU", "QuickGELUActivation"):
            sample = torch.linspace(-9, 9, 64)
            if torch.equal(child(sample), QuickGELU()(sample)):
                setattr(parent, name, QuickGELU())


def _children(model):
    """Return (parent, name, child) of all modules in a model, as they are now."""
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]


def _places(model, but=None):
    """Return (parent, name) of the layers to replace, not the layers, so that their weights are freed one by one.

    Args:
        but: a part of the model to leave alone.
    """
    left = set() if but is None else set(but.modules())
    return [
        (parent, name)
        for parent in model.modules()
        if parent not in left and type(parent).__name__ != "AttentionPool2d"  # CLIP's: it reads its layers' weights
        for name, child in parent.named_children()
        if isinstance(child, Conv1D)
        or (isinstance(child, nn.MultiheadAttention) and child.in_proj_weight is not None and child.bias_k is None)
        or type(child) is nn.Linear
        or type(child).__name__ == "FalconLinear"  # which computes the same
    ]


def _replacement(child, layer):
    """Return what replaces a layer.

    Args:
        layer: PackedLinear, QuantizedLinear or PlainLinear.
    """
    if isinstance(child, nn.MultiheadAttention):
        return PackedAttention(child, layer)
    return layer(child.weight.T if isinstance(child, Conv1D) else child.weight, child.bias)


def _pack_checked(model, layer, compute, what):
    """Repack the layers of a model, if its outputs stay the same.

    PlainLinear comes first, with the interface of a repacked layer and the old weights: nothing is held twice, or lost
    if the outputs change. Then each layer is repacked and compared on the input of its first call.

    Args:
        compute: function without arguments to a tensor that the model computes.
        what: what the model is, for messages.
    """
    if not _put_plain(model, compute):
        note(f"warning: this {what} needs its own layers: none is laid out for the processor, which is slower")
        return
    places = [(parent, name) for parent, name, child in _children(model) if isinstance(child, PlainLinear)]
    for parent, name in places:
        setattr(parent, name, _packed(getattr(parent, name), layer))
    left = sum(isinstance(getattr(parent, name), PlainLinear) for parent, name in places)
    if left:
        note(f"warning: {left} of the {what}'s {len(places)} layers stay as they are: repacked ones differ")


def _put_plain(model, compute):
    """Put PlainLinear layers into a model if its outputs stay the same; returns whether they do.

    Layers that are not called stay: those for other inputs, and those whose weights the model reads itself.
    """
    originals = [(parent, name, getattr(parent, name)) for parent, name in _places(model)]
    try:
        expected = compute()
        for parent, name, original in originals:
            setattr(parent, name, _replacement(original, PlainLinear))
        same = _close(compute(), expected, TOLERANCE.get(expected.dtype, 0))
    except Exception:  # a module that looks for more in its layers can raise anything
        same = False
    for parent, name, original in originals:
        if not same or not _was_called(getattr(parent, name)):
            setattr(parent, name, original)
    return same


def _was_called(replacement):
    """Tell whether a layer of PlainLinear, or one in it, was called."""
    return any(isinstance(part, PlainLinear) and part.call for part in replacement.modules())


@torch.no_grad()
def _logits(gpt):
    """Return a language model's logits of a few positions, the last computed from its cache, where it has one."""
    embeddings = gpt.eval().get_input_embeddings()
    last = embeddings.num_embeddings - 1
    tokens = torch.linspace(0, last, PROBED, device=embeddings.weight.device).long()[None]
    out = gpt(inputs_embeds=embeddings(tokens[:, :-1]), use_cache=True)
    cache = {name: out[name] for name in inspect.signature(gpt.forward).parameters if name in out}
    return torch.cat((out.logits, gpt(input_ids=tokens[:, -1:], **cache, use_cache=True).logits), dim=1)


@torch.no_grad()
def _packed(plain, layer):
    """Return a PlainLinear repacked, or unchanged where the repacked layer's output differs."""
    try:
        packed = layer(plain.packed, plain.bias)
        dtype = torch.int8 if layer is QuantizedLinear else plain.packed.dtype
        given, expected = plain.call
        same = _close(packed(given), expected, TOLERANCE[dtype])
    except RuntimeError:  # the kernel does not take these numbers
        same = False
    return packed if same else plain


def _close(found, expected, tolerance):
    """Tell whether two tensors differ by no more than a share of the largest number; masked ones may be infinite."""
    largest = expected.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(found, expected, rtol=0, atol=tolerance * largest, equal_nan=True)


def _packs(model):
    """Tell whether oneDNN can lay out this model's weights on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return not half or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _convert(model, dtype):
    """Convert all weights except those of norms that always compute in float32, as CLIP's do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) or _is_float32_norm(module):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    gpt = next((module for module in model.modules() if hasattr(type(module), "_from_config")), None)
    if gpt is not None:
        _convert_buffers(gpt, dtype)


def _is_float32_norm(module):
    """Tell whether a module is a norm that casts its input to float32, and so needs float32 weights."""
    if not isinstance(module, nn.LayerNorm) or type(module) is nn.LayerNorm:
        return False
    half = copy.deepcopy(module).bfloat16()
    try:
        half(torch.zeros(1, *module.normalized_shape, dtype=torch.bfloat16, device=module.weight.device))
    except RuntimeError:
        return True
    return False


def _convert_buffers(gpt, dtype):
    """Convert the buffers that transformers makes in the model's dtype, such as XGLM's positions; not rotary ones.

    Args:
        gpt: language model of transformers.
    """
    config = copy.deepcopy(gpt.config)  # _from_config changes it
    with undrawn(), torch.device("meta"):
        types = {name: buffer.dtype for name, buffer in gpt._from_config(config, dtype=dtype).named_buffers()}
    for name, buffer in gpt.named_buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(types.get(name, buffer.dtype))


class PlainLinear(nn.Module):
    """A linear layer with the interface of a repacked one; remembers its first call."""

    def __init__(self, weight, bias):
        """Keep a weight; arguments as those of PackedLinear."""
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.bias, self.packed, self.call = bias, weight.detach(), None

    @property
    def weight(self):
        """The weight [out, in]."""
        return self.packed

    def forward(self, x):
        """Map [..., in] to [..., out]."""
        out = F.linear(x, self.packed, self.bias)
        self.call = self.call or (x.clone(), out.clone())  # for a model may change them in place
        return out


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
        """The weight [out, in], for modules such as Mamba's that read it at every step; cached for that."""
        return self.packed.to_dense()

    def forward(self, x, activation=("none", "")):
        """Map [..., in] to [..., out].

        Args:
            activation: oneDNN's name of a function that the same kernel computes, and the kind of it.
        """
        name, kind = activation
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], kind)


def activated(layer, activation, x):
    """Return activation(layer(x)): by one kernel where both have one, which saves a pass over its output."""
    if type(layer) is PackedLinear:
        if isinstance(activation, nn.GELU):
            return layer(x, ("gelu", activation.approximate))
        if isinstance(activation, nn.ReLU):
            return layer(x, ("relu", ""))
    return activation(layer(x))


class QuantizedLinear(nn.Module):
    """A linear layer of 8-bit integers: weights scaled per output, inputs per call."""

    def __init__(self, weight, bias):
        """Quantise a weight; arguments as those of PackedLinear."""
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.bias = bias  # packed below too; kept so that the layer shows its dtype
        weight = weight.detach().float().contiguous()
        scales = weight.abs().amax(1).clamp_min(1e-8) / 127  # [out]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that quantised tensors will move to torchao
            quantized = torch.quantize_per_channel(
                weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8
            )
            own = None if bias is None else bias.detach().to(torch.float32, copy=True)  # it is kept, not packed
            self.packed = torch.ops.quantized.linear_prepack(quantized, own)

    @functools.cached_property
    def weight(self):
        """The weight [out, in], as PackedLinear's."""
        return torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()

    def forward(self, x):
        """Map [..., in] to [..., out]."""
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=_int8_sums_overflow())


class PackedAttention(nn.Module):
    """torch's MultiheadAttention on other linear layers; it returns no attention weights."""

    def __init__(self, attention, layer):
        """Take over the weights.

        Args:
            attention: nn.MultiheadAttention whose queries, keys and values are equally wide.
            layer: PackedLinear or QuantizedLinear.
        """
        super().__init__()
        self.heads, self.batch_first = attention.num_heads, attention.batch_first
        self.inputs = layer(attention.in_proj_weight, attention.in_proj_bias)
        self.out = layer(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, query, key, value, need_weights=False, attn_mask=None):
        """Attend.

        Args:
            query, key, value: [T, B, E], or [B, T, E] as the attention had them.
            attn_mask: [T, T], added to the scores, or None.
        Returns: (as the query, None).
        Raises: ValueError for a mask of another kind.
        """
        if attn_mask is not None and not attn_mask.is_floating_point():
            raise ValueError("a mask of bool has the opposite meaning here")
        different = {id(x): x for x in (query, key, value)}  # one, where a sequence attends to itself
        mapped = {number: self.inputs(x) for number, x in different.items()}
        q, k, v = (self._part(mapped[id(x)], i) for i, x in enumerate((query, key, value)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask)  # [B, H, T, E / H]
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        return self.out(out.permute(order).reshape(query.shape)), None

    def _part(self, mapped, number):
        """Return the queries (0), keys (1) or values (2) of mapped inputs [T, B, 3 E] as [B, H, T, E / H]."""
        part = mapped.unflatten(-1, (3, self.heads, -1))[..., number, :, :]  # [T, B, H, E / H]
        return part.permute((0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3))


def own_weights(model):
    """Copy what is left of weights that lie in a mapped file on the CPU, in place: they would change with it."""
    copies = {}  # tied ones stay one tensor

    def own(tensor):
        if tensor.device.type != "cpu":
            return tensor
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if place not in copies:
            copies[place] = tensor.clone()
        return copies[place]

    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = own(tensor.data)
    for module in model.modules():
        if isinstance(module, PlainLinear):
            module.packed = own(module.packed)


def unpack(model):
    """Put torch's own linear layers in the place of repacked ones, in place, so that others can read the model."""
    for parent, name, child in _children(model):
        if isinstance(child, PackedLinear | PlainLinear):
            plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            plain.weight = nn.Parameter(child.weight.detach(), requires_grad=False)
            if child.bias is not None:
                plain.bias = nn.Parameter(child.bias.detach().clone(), requires_grad=False)
            setattr(parent, name, plain)
    return model
