"""Steps of fixed shapes, so that a GPU can replay one as a CUDA graph instead of waiting for Python at every kernel.

A step of few rows is some two hundred small kernels, which take less time than their launches. A captured step is used
again for later batches of the same model. It was written without a GPU: on a CPU, tests run the same step uncaptured.

Axes: R rows at work, L layers, H heads, D width of a head, S slots, V vocabulary, T positions so far.
"""

import math
import threading
import weakref

import torch
from torch.nn import functional as F

from utils.cli import note

MOST = 1 << 28  # bytes of slots of a step, and of all that are kept: beyond, kernels take longer than their launches
ROOM = 96  # slots beyond those in use, at least: longer captions are captured anew
TOLERANCE = 1e-2  # largest difference of a replay from the step itself, as a share of the largest logit

_free = weakref.WeakKeyDictionary()  # language model -> its FixedSteps that no decoding uses, the newest last
_lock = threading.RLock()  # a garbage collection may give one back while another is taken


def suits(slots, length):
    """Tell whether a step is faster with fixed shapes; arguments as of `take`."""
    return slots[0][0].device.type == "cuda" and _bytes(_shape(slots, length), slots[0][0].dtype) <= MOST


def _shape(slots, length):
    """Return a FixedStep's slots, [L, 2, R, H, S, D]: of few sizes, so that most batches find a captured step."""
    rows, heads, _, width = slots[0][0].shape
    return len(slots), 2, 1 << (rows - 1).bit_length(), heads, (length + ROOM) // 32 * 32 + 32, width


def _bytes(shape, dtype):
    """Return the size of a tensor."""
    return math.prod(shape) * dtype.itemsize


def take(gpt, step, slots, length):
    """Return a FixedStep with ROOM for more slots, a used one where there is one.

    Args:
        gpt: language model.
        step: its function of models.slots.STEPS.
        slots: L pairs of [R, H, S, D], which tell sizes and dtype.
        length: T, slots in use.
    """
    like = slots[0][0]
    # a graph reads the parameters where they were when it was captured
    parameters = tuple(parameter.data_ptr() for parameter in gpt.parameters())
    key = (_shape(slots, length), like.dtype, like.device, parameters)
    with _lock:
        free = _free.setdefault(gpt, [])
        found = next((fixed for fixed in reversed(free) if fixed.key == key), None)
        if found is not None:
            free.remove(found)
    return found or FixedStep(key, step)


def give_back(gpt, fixed):
    """Keep a FixedStep for later batches, and let the oldest go that do not fit beside it."""
    with _lock:
        free = _free.setdefault(gpt, [])
        free.append(fixed)
        while sum(_bytes(*one.key[:2]) for one in free) > MOST:
            del free[0]


class FixedStep:
    """A step whose tensors stay where they are: tokens and state are written into them."""

    def __init__(self, key, step):
        """Allocate; `key` and `step` as of `take`."""
        self.key, self.step = key, step
        shape, dtype, device, _ = key
        rows, slots = shape[2], shape[4]
        self.slots = torch.zeros(shape, dtype=dtype, device=device)  # [L, 2, R, H, S, D]
        self.seen = torch.zeros(rows, 1, 1, slots, dtype=torch.bool, device=device)  # True where a row has something
        self.tokens, self.positions = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # slot of the newest token
        self.graph, self.logits, self.tried = None, None, device.type != "cuda"

    @property
    def rows(self):
        """How many rows there is room for."""
        return len(self.tokens)

    @property
    def room(self):
        """How many positions there is room for."""
        return self.slots.shape[4]

    def fill(self, slots, mask, length):
        """Start from a state.

        Args:
            slots: L pairs of [R', H, S', D], of at most as many rows.
            mask: [R', T], 1 where a row has something; None: everywhere.
            length: T.
        """
        rows = len(slots[0][0])
        self.slots.zero_()  # what a mask hides must be finite all the same
        for own, pair in zip(self.slots, slots, strict=True):
            for kind, given in enumerate(pair):
                own[kind, :rows, :, :length] = given[:, :, :length]
        self.seen.zero_()
        self.seen[..., :length] = True
        self.positions.zero_()  # rows without a use stay within the context, and are never read
        self.positions[:rows] = length
        if mask is not None:
            self.seen[:rows, 0, 0, :length] = mask.bool()
            self.positions[:rows] = mask.sum(1)
        self.place.fill_(length)

    def select(self, rows, length):
        """Let row i become what row `rows[i]` was; `length`: T."""
        number = len(rows)
        self.slots[:, :, :number, :, :length] = self.slots[:, :, :, :, :length].index_select(2, rows)
        self.seen[:number] = self.seen[rows]
        self.positions[:number] = self.positions[rows]
        self.positions[number:] = 0

    def __call__(self, gpt, tokens):
        """Append `tokens` [R']; return the logits of the next, [R', V], which the next call overwrites."""
        self.tokens[: len(tokens)] = tokens
        if not self.tried:
            self.tried = True
            self._capture(gpt)
        if self.graph is None:
            self.logits = self._compute(gpt)
        else:
            self.graph.replay()
        return self.logits[: len(tokens)]

    def _compute(self, gpt):
        self.seen.index_fill_(3, self.place, True)
        logits = self.step(gpt, self.tokens, self.positions, self._attend)
        self.place += 1
        self.positions += 1
        return logits

    def _attend(self, layer, query, key, value, scaling):
        """Write keys and values [R, E] into their slots; return what the queries take from all seen, [R, E]."""
        keys, values = self.slots[layer]
        query, key, value = (x.unflatten(-1, (keys.shape[1], 1, -1)) for x in (query, key, value))  # [R, H, 1, D]
        keys.index_copy_(2, self.place, key)
        values.index_copy_(2, self.place, value)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self.seen, scale=scaling).flatten(1)

    def _capture(self, gpt):
        """Capture the step, and keep the graph if its replay gives what the step gives."""
        device = self.tokens.device
        state = [tensor.clone() for tensor in (self.place, self.positions)]

        def rewind():
            for tensor, before in zip((self.place, self.positions), state, strict=True):
                tensor.copy_(before)

        try:
            stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):  # a first run, in which libraries allocate what they need
                expected = self._compute(gpt).clone()
            torch.cuda.current_stream(device).wait_stream(stream)
            rewind()
            # other threads, which may be reading pictures, can go on meanwhile
            with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._compute(gpt)
            rewind()
            graph.replay()
            bound = TOLERANCE * expected.abs().max()
            if not bool((self.logits - expected).abs().max() <= bound):
                raise RuntimeError("its replay computes something else")
            self.graph = graph
        except RuntimeError as error:
            note(f"warning: this GPU does not replay the language model's step ({error}): each kernel is launched")
        rewind()
