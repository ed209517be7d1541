"""A language model's step with preallocated keys and values: what decoding runs for GPT-2 and OPT.

transformers' own forward pass makes new caches, masks and Python calls for every token, which takes a quarter to a half
of a step of few rows. Here the layers are called one after the other, and keys and values are written in place.

Axes: R rows at work, L layers, H heads, D width of a head, E width of the model, S slots, T positions so far.
"""

import weakref

import torch
from torch.nn import functional as F

from models import cuda_graphs
from models.attention import NAME, attend_one
from models.steps import CachedStep, UncachedStep, cache_argument
from utils.precision import activated

SLOTS = 16  # are added at a time


def step_for(gpt, embeddings, lengths=None):
    """Return the fastest step that computes what a language model does; arguments as of CachedStep.

    A cache would be wrong for models that take none, and for rows of several lengths in models that carry a state
    through padding: they get an UncachedStep.
    """
    if has_slots(gpt):
        return SlotStep(gpt, embeddings, lengths)
    padded_state = lengths is not None and getattr(gpt, "_is_stateful", False)
    return (CachedStep if cache_argument(gpt) and not padded_state else UncachedStep)(gpt, embeddings, lengths)


def gpt2_step(gpt, tokens, positions, attend):
    """Return GPT-2's logits after one more token per row, [R, V].

    Args:
        gpt: GPT2LMHeadModel.
        tokens: [R]. positions: [R], or [1] where all rows share it.
        attend: function of a layer's number, queries, keys and values [R, E], and the scaling of their products, to
            [R, E].
    """
    model, config = gpt.transformer, gpt.config
    scaling = (config.hidden_size // config.num_attention_heads) ** -0.5 if config.scale_attn_weights else 1.0
    x = model.wte(tokens) + model.wpe(positions)
    for number, block in enumerate(model.h):
        query, key, value = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
        own = scaling / (number + 1) if config.scale_attn_by_inverse_layer_idx else scaling
        x = x + block.attn.c_proj(attend(number, query, key, value, own))
        x = x + block.mlp.c_proj(activated(block.mlp.c_fc, block.mlp.act, block.ln_2(x)))
    return gpt.lm_head(model.ln_f(x))


def opt_step(gpt, tokens, positions, attend):
    """Return OPT's logits after one more token per row; arguments as of gpt2_step."""
    model = gpt.model.decoder
    x = model.embed_tokens(tokens)
    if model.project_in is not None:
        x = model.project_in(x)
    x = x + F.embedding(positions + model.embed_positions.offset, model.embed_positions.weight)
    for number, layer in enumerate(model.layers):
        attention, first = layer.self_attn, layer.do_layer_norm_before
        given = layer.self_attn_layer_norm(x) if first else x
        query = attention.q_proj(given) * attention.scaling  # before the product, as OPT does: it rounds otherwise
        mixed = attend(number, query, attention.k_proj(given), attention.v_proj(given), 1.0)
        x = x + attention.out_proj(mixed)
        x = x if first else layer.self_attn_layer_norm(x)
        given = layer.final_layer_norm(x) if first else x
        x = x + layer.fc2(activated(layer.fc1, layer.activation_fn, given))
        x = x if first else layer.final_layer_norm(x)
    for last in (model.final_layer_norm, model.project_out):
        x = x if last is None else last(x)
    return gpt.lm_head(x)


MODELING = "transformers.models.{0}.modeling_{0}"
STEPS = {  # module and class of a language model -> its step
    (MODELING.format("gpt2"), "GPT2LMHeadModel"): gpt2_step,
    (MODELING.format("opt"), "OPTForCausalLM"): opt_step,
}


def find_step(gpt):
    """Return the function of STEPS for a language model's class, or None."""
    return STEPS.get((type(gpt).__module__, type(gpt).__name__))


def has_slots(gpt):
    """Tell whether SlotStep computes what a language model does.

    Whatever watches or moves the parts of a model, as accelerate and FSDP do, expects them to be called as usual.
    """
    if find_step(gpt) is None or gpt.training or gpt.config._attn_implementation not in (NAME, "sdpa"):
        return False
    if getattr(gpt.config, "add_cross_attention", False) or torch.is_autocast_enabled(gpt.device.type):
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in gpt.modules()
    )


class SlotStep:
    """What CachedStep is, for models of which `has_slots` is true."""

    def __init__(self, gpt, embeddings, lengths=None):
        """Run the prefix; arguments as of CachedStep."""
        begun = CachedStep(gpt, embeddings, lengths)
        self.gpt, self.step = gpt, find_step(gpt)
        self.first, self.mask = begun.first, begun.mask  # [R, T]
        self.length = self.prefix = embeddings.shape[1]  # T, P
        self.images = torch.arange(len(embeddings), device=embeddings.device)  # [R]: each has its prefix
        self.fixed = None  # models.cuda_graphs.FixedStep, which holds slots and mask then
        self.slots = [[layer.keys, layer.values] for layer in begun.cache.layers]  # L pairs of [R, H, S, D]
        self._replace(lambda slots: slots)

    def _replace(self, rows_of):
        """Move all into new slots, one position more than are used and some; a tensor at a time, to save memory.

        Args:
            rows_of: function of a tensor's used part [R, H, T, D] to its new rows.
        """
        number = (self.length // SLOTS + 1) * SLOTS
        for pair in self.slots:
            for kind, old in enumerate(pair):
                used = rows_of(old[:, :, : self.length])
                pair[kind] = old.new_zeros(*used.shape[:2], number, used.shape[3])  # finite: attention reads them all
                pair[kind][:, :, : self.length] = used

    def __call__(self, tokens):
        """Append `tokens` [R]; return the logits of the next, [R, V]."""
        if self.fixed is not None and self.length == self.fixed.room:
            self._leave_fixed()
        if self.fixed is not None or cuda_graphs.suits(self.slots, self.length):
            return self._call_fixed(tokens)
        if self.length == self.slots[0][0].shape[2]:
            self._replace(lambda slots: slots)
        positions = torch.full((1,), self.length, device=tokens.device)
        if self.mask is not None:
            positions = self.mask.sum(1)
            self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), dim=1)
        self.length += 1
        return self.step(self.gpt, tokens, positions, self._attend)

    def _call_fixed(self, tokens):
        """The same by a step of fixed shapes."""
        if self.fixed is None:
            self.fixed = cuda_graphs.take(self.gpt, self.step, self.slots, self.length)
            self.fixed.fill(self.slots, self.mask, self.length)
            self.slots = self.mask = None
            self.returns = weakref.finalize(self, cuda_graphs.give_back, self.gpt, self.fixed)
            self.returns.atexit = False
        self.length += 1
        return self.fixed(self.gpt, tokens)

    def _leave_fixed(self):
        """Take slots and mask back from the step of fixed shapes."""
        fixed, self.fixed, rows = self.fixed, None, len(self.images)
        self.slots = [[slots[:rows].clone() for slots in pair] for pair in fixed.slots]
        self.mask = fixed.seen[:rows, 0, 0, : self.length].long()
        self.returns()

    def _attend(self, layer, query, key, value, scaling):
        """Write keys and values [R, E] into their slots; return what the queries take from all so far, [R, E]."""
        keys, values = self.slots[layer]
        query, key, value = (x.unflatten(-1, (keys.shape[1], -1)) for x in (query, key, value))  # [R, H, D]
        keys[:, :, self.length - 1], values[:, :, self.length - 1] = key, value
        mask = None if self.mask is None else self.mask.bool()[:, None, None]
        return attend_one(query[:, :, None], keys, values, self.length, scaling, mask).flatten(1)

    def select(self, rows):
        """Let row i become what row `rows[i]` was; `rows` is [R'] of indices."""
        if self.fixed is not None:
            if len(rows) <= self.fixed.rows:
                self.fixed.select(rows, self.length)
                self.images = self.images[rows]
                return
            self._leave_fixed()
        images, number = self.images[rows], len(rows)
        if number > len(self.images) or rows.device.type != "cpu":
            self._replace(lambda slots: slots[rows])
        else:
            changed = (rows != torch.arange(number)).nonzero()[:, 0]
            # rows of an image differ only in what came after the prefix
            begin = self.prefix if images.equal(self.images[:number]) else 0
            for pair in self.slots:
                for kind, slots in enumerate(pair):
                    part = slots[:, :, begin : self.length]
                    part.index_copy_(0, changed, part.index_select(0, rows[changed]))
                    pair[kind] = slots[:number]
        self.images = images
        if self.mask is not None:
            self.mask = self.mask[rows]
