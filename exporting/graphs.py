"""A captioner as ONNX graphs: encoder, prefill and step, checked against what torch computes.

Axes: B images, K tokens of an image, D width of an embedding, T prompt tokens, R rows, V vocabulary, L layers, H heads.
"""

import contextlib
import inspect
import logging
import re
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image
from torch import nn
from torch.export import Dim
from transformers import DynamicCache

from exporting.weights import Graph, lay_out, quantize, tie
from models.steps import CachedStep, cache_argument

TOLERANCE = 1e-3  # largest difference from torch, as a share of the largest number; measured: 1e-6
ROUNDING = (
    0.5  # RMS error of the output with rounded weights, as a share of its deviation; measured: 8 bits 0.03, 4 bits 0.17
)
LONGEST = 6  # steps that are compared
OPSET = 23  # the first with an attention operator: measured 0.9 of the time per token of separate operators


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] -> embedding [B, D] or [B, K, D]."""

    def __init__(self, encoder):
        super().__init__()
        self.model, self.encoder = encoder.model, encoder  # so that the exporter finds its weights in this module

    def forward(self, pixels):
        return self.encoder._embed(pixels)


class Prefill(nn.Module):
    """Embedding [B, D] or [B, K, D] -> prefix [B, P, E]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embedding):
        return self.model.prefix(embedding)


class Step(nn.Module):
    """The next positions of R rows -> logits of the newest [R, V], and keys and values of every layer.

    One graph takes both the prefix, which comes first, and every token after it: two sessions would hold the language
    model twice. Inputs: a prefix [R, P, E] and tokens [R, T], either possibly empty; the earlier row that each row goes
    on from [R]; keys and values so far, [key, value, key, ...], empty at first.
    """

    def __init__(self, model):
        super().__init__()
        self.gpt = model.gpt

    def forward(self, prefix, tokens, rows, past):
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer].index_select(0, rows), past[2 * layer + 1].index_select(0, rows), layer)
        embedded = torch.cat((prefix, self.gpt.get_input_embeddings()(tokens)), dim=1)
        options = {cache_argument(self.gpt): cache, "use_cache": True, "logits_to_keep": 1}
        if "position_ids" in inspect.signature(self.gpt.forward).parameters:
            # one row each: ONNX Runtime's rotary embedding takes no positions shared by rows
            places = torch.arange(embedded.shape[1]) + past[0].shape[2]
            options["position_ids"] = places.expand(len(embedded), -1)
        out = self.gpt(inputs_embeds=embedded, **options)
        return out.logits[:, -1], _layers(cache)


@torch.no_grad()
def make_graphs(captioner, folder, dtype):
    """Write the graphs of a captioner as torch's exporter makes them, check them, and lay out their weights.

    Args:
        captioner: models.captioner.Captioner, on the CPU, with torch's own layers.
        folder: where the exporter's files go.
        dtype: `fp32`, `int8` or `int4`.
    Yields: (name, onnx.ModelProto).
    Raises: ValueError naming the operator and the layer that cannot be exported, or the graph whose output differs.
    """
    model, gpt = captioner.model, captioner.model.gpt
    if not cache_argument(gpt) or getattr(gpt, "_is_stateful", False):
        raise ValueError(
            f"a {gpt.config.model_type} cannot be exported: {type(gpt).__name__} has no keys and values to hand on"
        )
    vocabulary = gpt.get_input_embeddings().num_embeddings
    torch.manual_seed(0)
    embedding, pixels = torch.randn(3, *model.config.shape), _pixels(captioner.encoder)
    prefix = model.prefix(embedding)
    past = _layers(CachedStep(gpt, prefix).cache)
    each, several = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    names = [f"{what}.{layer}" for layer in range(len(past) // 2) for what in ("key", "value")]
    plans = {
        "encoder": (Encoder(captioner.encoder), (pixels,), (each,), ["pixels"], ["clip_embedding"]),
        "prefill": (Prefill(model), (embedding,), (each,), ["embedding"], ["prefix"]),
        "step": (
            Step(model), (prefix[:2], torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([2, 0]), past),
            (several, several, each, [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC}] * len(past)),
            ["prefix", "tokens", "rows", *(f"past_{name}" for name in names)], ["logits", *names],
        ),
    }  # fmt: skip
    for name, plan in plans.items():
        _export(name, folder / f"{name}.onnx", *plan)
    _compare("encoder", _session(folder, "encoder"), [pixels], plans["encoder"][0](pixels))
    _compare("prefill", _session(folder, "prefill"), [embedding], prefix)
    _compare_steps(_session(folder, "step"), model, vocabulary)
    for name in plans:
        graph = Graph(onnx.load(folder / f"{name}.onnx"))
        lay_out(graph)
        rows, bits = (0, 8) if name == "encoder" else (vocabulary, int(dtype.removeprefix("fp").removeprefix("int")))
        if dtype == "fp32":
            tie(graph, rows)
        else:
            quantize(graph, bits, rows)
        yield name, graph.finish()


def _pixels(encoder):
    """Return the pixels [2, 3, H, W] of random pictures."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 80, 3), dtype=np.uint8)
    return torch.stack([encoder.preprocess(Image.fromarray(picture)) for picture in pictures])


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
                opset_version=OPSET, verbose=False,
            )  # fmt: skip
        program.save(path, external_data=True)
    except Exception as error:  # tracing runs the model's own code, which raises whatever it likes
        operator, layer = blame(error, module)
        raise ValueError(f"the {name} cannot be exported to ONNX: {operator}, in {layer}") from error


def blame(error, module):
    """Return the operator that could not be exported, or else the error's text, and its layer."""
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


def _compare_steps(session, model, vocabulary):
    """Compare steps on one image and on several, with prompts and without, rows dropped and repeated."""
    for images, length in ((1, 0), (2, 1), (3, 4)):
        embedding, prompt = torch.randn(images, *model.config.shape), torch.randint(vocabulary, (images, length))
        step = CachedStep(model.gpt, model.embed(prompt, embedding))
        given = [model.prefix(embedding), prompt, torch.arange(images)]
        found = _compare("step", session, [*given, *(layer[:, :, :0] for layer in _layers(step.cache))], step.first)
        for number in range(LONGEST):
            sources = torch.randint(len(found[0]), (number % 4 + 1,))
            tokens = torch.randint(vocabulary, (len(sources), 1))
            step.select(sources)
            given = [torch.empty(len(sources), 0, given[0].shape[-1]), tokens, sources]
            found = _compare("step", session, [*given, *found[1:]], step(tokens[:, 0]))


def _compare(name, session, given, expected):
    """Return a graph's outputs, after comparing the first with torch's; raises ValueError."""
    with _refusing(name):
        found = session.run(None, _feeds(session, given))
    largest = expected.nan_to_num(0, 0, 0).abs().max().item()
    if found[0].shape != tuple(expected.shape) or not np.allclose(
        found[0], expected.numpy(), rtol=0, atol=TOLERANCE * largest, equal_nan=True
    ):
        raise ValueError(
            f"the {name} cannot be exported to ONNX: the graph's {session.get_outputs()[0].name} differs from torch's"
        )
    return found


def _feeds(session, given):
    """Return a graph's inputs by their names."""
    return {put.name: np.asarray(value) for put, value in zip(session.get_inputs(), given, strict=True)}


def _session(folder, name):
    with _refusing(name):
        return onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _refusing(name):
    """Turn what ONNX Runtime raises, which names the node, into a ValueError."""
    try:
        yield
    except Exception as error:  # its classes share no base class
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"the {name} cannot be exported to ONNX, for ONNX Runtime says: {said}") from error


def _layers(cache):
    """Return [key, value, key, ...] of the layers of transformers' cache, each [R, H, S, E / H]."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def check_rounding(captioner, folder):
    """Refuse written graphs whose rounded weights change the output too much; raises ValueError."""
    torch.manual_seed(0)
    model, pixels = captioner.model, _pixels(captioner.encoder)
    embedding = Encoder(captioner.encoder)(pixels)
    prefix, tokens = model.prefix(embedding), torch.randint(model.gpt.get_input_embeddings().num_embeddings, (2, 2))
    step = CachedStep(model.gpt, model.embed(tokens, embedding))
    empty = [layer[:, :, :0] for layer in _layers(step.cache)]
    for name, given, expected in (
        ("encoder", [pixels], embedding),
        ("prefill", [embedding], prefix),
        ("step", [prefix, tokens, torch.arange(2), *empty], step.first),
    ):
        session = _session(folder, name)
        error = np.square(session.run(None, _feeds(session, given))[0] - expected.numpy()).mean() ** 0.5
        if not error <= ROUNDING * expected.std().item():
            raise ValueError(f"the {name}'s output is off by {error:.2g} in fewer bits; use --dtype fp32")
