"""A captioner as ONNX graphs: encoder, prefill and step, checked against what torch computes.

Axes: B images, K tokens of an image, D width of an embedding, T prompt tokens, R rows, V vocabulary, L layers, H heads.
"""

import logging
import re
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.export import Dim
from transformers import DynamicCache

from exporting.weights import Graph, lay_out, quantize, tie
from models.steps import cache_argument

TOLERANCE = 1e-3  # largest difference from torch, as a share of the largest number; measured: 1e-6
ROUNDING = (
    0.5  # root mean square error of rounded weights, as a share of the deviation; measured: 0.03 of 8, 0.17 of 4 bits
)
LONGEST = 6  # steps that are compared


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] -> embedding [B, D] or [B, K, D]."""

    def __init__(self, encoder):
        super().__init__()
        self.model, self.encoder = encoder.model, encoder  # whose weights must be found below this module

    def forward(self, pixels):
        return self.encoder._embed(pixels)


class Prefill(nn.Module):
    """Embedding and prompt tokens [B, T] -> logits of the first token [B, V], keys and values of every layer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embedding, tokens):
        return _run(self.model.gpt, DynamicCache(), inputs_embeds=self.model.embed(tokens, embedding))


class Step(nn.Module):
    """Tokens [R], the row each goes on from, [R], and the keys and values so far -> the same of the next token."""

    def __init__(self, model):
        super().__init__()
        self.gpt = model.gpt

    def forward(self, tokens, rows, past):
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer].index_select(0, rows), past[2 * layer + 1].index_select(0, rows), layer)
        return _run(self.gpt, cache, input_ids=tokens[:, None])


def _run(gpt, cache, **inputs):
    """Return logits [R, V] of the newest position, and [key, value, key, ...] of the layers."""
    out = gpt(**inputs, **{cache_argument(gpt): cache}, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def make_graphs(captioner, folder, dtype):
    """Write the graphs of a captioner as torch's exporter makes them, check them, and lay out their weights.

    Args:
        captioner: models.captioner.Captioner, on the CPU, its layers torch's own.
        folder: where the exporter's files go.
        dtype: `fp32`, `int8` or `int4`.
    Yields: (name, onnx.ModelProto).
    Raises: ValueError naming the operator and the layer that cannot be exported, or the graph that computes otherwise.
    """
    model, gpt = captioner.model, captioner.model.gpt
    if not cache_argument(gpt) or getattr(gpt, "_is_stateful", False):
        raise ValueError(
            f"a {gpt.config.model_type} cannot be exported: {type(gpt).__name__} has no keys and values to hand on"
        )
    rows = gpt.get_input_embeddings().num_embeddings
    torch.manual_seed(0)
    embedding, prompt = torch.randn(3, *model.config.shape), torch.randint(rows, (3, 2))
    pixels = torch.stack([captioner.encoder.preprocess(_picture(seed)) for seed in range(2)])
    _, past = Prefill(model)(embedding, prompt)
    each, several = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    names = [f"{what}.{layer}" for layer in range(len(past) // 2) for what in ("key", "value")]
    past_names = [f"past_{name}" for name in names]
    plans = {
        "encoder": (Encoder(captioner.encoder), (pixels,), (each,), ["pixels"], ["embedding"]),
        "prefill": (Prefill(model), (embedding, prompt), (each, several), ["embedding", "tokens"], ["logits", *names]),
        "step": (
            Step(model), (torch.tensor([1, 2]), torch.tensor([2, 0]), past),
            (each, each, [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC}] * len(past)),
            ["tokens", "rows", *past_names], ["logits", *names],
        ),
    }  # fmt: skip
    for name, plan in plans.items():
        _export(name, folder / f"{name}.onnx", *plan)
    sessions = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in plans}
    _compare("encoder", sessions["encoder"], [pixels], [plans["encoder"][0](pixels)])
    _compare_steps(sessions, model, rows)
    del sessions
    for name in plans:
        graph = Graph(onnx.load(folder / f"{name}.onnx"))
        lay_out(graph)
        if dtype == "fp32":
            tie(graph, rows)
        else:
            quantize(
                graph, 8 if name == "encoder" else int(dtype.removeprefix("int")), rows if name != "encoder" else 0
            )
        yield name, graph.finish()


def _picture(seed):
    """Return a made RGB picture."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8))


def _export(name, path, module, arguments, shapes, inputs, outputs):
    """Write one graph; raises ValueError naming what cannot be exported."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for library in ("onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(), arguments, dynamo=True, dynamic_shapes=shapes, input_names=inputs, output_names=outputs,
                verbose=False,
            )  # fmt: skip
        program.save(path, external_data=True)
    except Exception as error:  # tracing runs the model's own code, which raises whatever it likes
        operator, layer = blame(error, module)
        raise ValueError(f"the {name} cannot be exported to ONNX: {operator}, in {layer}") from error


def blame(error, module):
    """Return which operator could not be exported, or what was said of it, and the layer that it is in."""
    operator, layer, said = None, None, ""
    names = {id(part): name for name, part in module.named_modules()}
    while error is not None:
        said = str(error).strip() or said
        found = re.search(r"torch\.ops\.([\w.]+)", said) or re.search(r"\b((?:aten|prims)[.:]+[\w.]+)", said)
        operator = operator or (found and f"operator {found[1]}")
        stack = re.findall(r"\(([\w.]+)\): +\w", said)
        trace = error.__traceback__
        while trace is not None:
            part = trace.tb_frame.f_locals.get("self")
            if isinstance(part, nn.Module) and id(part) in names:
                layer = f"{names[id(part)] or 'its own code'} ({type(part).__name__})"
            trace = trace.tb_next
        layer = layer or (stack and stack[-1]) or None
        error = error.__cause__ or error.__context__
    return operator or said.splitlines()[0][:160], layer or type(module).__name__


def _compare_steps(sessions, model, rows):
    """Compare prefill and steps on one image and on several, with prompts and without, rows dropped and repeated."""
    for images, length in ((1, 0), (2, 1), (3, 4)):
        embedding, prompt = torch.randn(images, *model.config.shape), torch.randint(rows, (images, length))
        logits, past = Prefill(model)(embedding, prompt)
        given = [embedding, prompt]
        found = _compare("prefill", sessions["prefill"], given, [logits, *past])
        for number in range(LONGEST):
            sources = torch.randint(len(past[0]), (number % 4 + 1,))
            tokens = torch.randint(rows, (len(sources),))
            logits, past = Step(model)(tokens, sources, past)
            found = _compare("step", sessions["step"], [tokens, sources, *found[1:]], [logits, *past])


def _compare(name, session, given, expected):
    """Return a graph's outputs, after comparing them with torch's; raises ValueError."""
    feeds = {put.name: np.asarray(value) for put, value in zip(session.get_inputs(), given, strict=True)}
    found = session.run(None, feeds)
    for output, array, tensor in zip(session.get_outputs(), found, expected, strict=True):
        largest = tensor.nan_to_num(0, 0, 0).abs().max().item()
        if array.shape != tuple(tensor.shape) or not np.allclose(
            array, tensor.numpy(), rtol=0, atol=TOLERANCE * largest, equal_nan=True
        ):
            raise ValueError(f"the {name} cannot be exported to ONNX: the graph's {output.name} differs from torch's")
    return found


@torch.no_grad()
def check_rounding(captioner, folder):
    """Refuse written graphs whose weights, rounded as they are, compute something else; raises ValueError."""
    torch.manual_seed(0)
    pixels = torch.stack([captioner.encoder.preprocess(_picture(seed)) for seed in range(2)])
    embedding = Encoder(captioner.encoder)(pixels)
    tokens = torch.randint(captioner.model.gpt.get_input_embeddings().num_embeddings, (2, 2))
    logits, _ = Prefill(captioner.model)(embedding, tokens)
    for name, given, expected in (("encoder", [pixels], embedding), ("prefill", [embedding, tokens], logits)):
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        feeds = {put.name: value.numpy() for put, value in zip(session.get_inputs(), given, strict=True)}
        error = np.square(session.run(None, feeds)[0] - expected.numpy()).mean() ** 0.5
        if not error <= ROUNDING * expected.std().item():
            raise ValueError(f"the {name} does not bear fewer bits: its output is off by {error:.2g}; use --dtype fp32")
