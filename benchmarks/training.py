"""Seconds per training step: ours beside the plain method, on captions as long as COCO's."""

import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from benchmarks import workload
from benchmarks.measure import interleave, peak_memory, precisions
from benchmarks.plain import padded_length, training_step
from benchmarks.workload import caption_lengths, captioner, language_model
from training.objectives import CrossEntropy
from training.settings import TrainingConfig
from training.trainer import Trainer

BATCH = 40
VARIANTS = {"MLP, GPT-2 fine-tuned": ("mlp", False), "transformer 40/40, GPT-2 frozen": ("transformer", True)}


class MadeCaptions:
    """Captions of random tokens, as long as COCO's; the trainer's CaptionDataset here."""

    def __init__(self, count=4000):
        self.text_lengths = caption_lengths(count)
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.text_lengths)

    def batch(self, indices):
        """Return tokens [B, T], clip_embedding [B, D], lengths [B]."""
        lengths = torch.from_numpy(self.text_lengths[indices])
        tokens = torch.randint(1, 50000, (len(indices), int(lengths.max())), generator=self.generator)
        return tokens, torch.randn(len(indices), 512, generator=self.generator), lengths


def make_plain(variant, dtype, device):
    """Return a function that takes one plain step on the next batch."""
    mapping_type, frozen = VARIANTS[variant]
    model = captioner(mapping_type, language_model(ours=False), False).to(device)
    model.train()
    if frozen:
        model.gpt.eval()
    learning = model.clip_project.parameters() if frozen else model.parameters()
    optimizer, data = torch.optim.AdamW(learning, lr=2e-5), MadeCaptions()
    width, prefix = padded_length(data.text_lengths), model.config.prefix_length
    batches = iter(np.random.default_rng(0).permutation(len(data)).reshape(-1, BATCH))

    def step():
        tokens, embeddings, lengths = data.batch(next(batches))
        padded = torch.zeros(BATCH, width, dtype=torch.long)
        padded[:, : tokens.shape[1]] = tokens[:, :width]
        mask = (torch.arange(prefix + width) < prefix + lengths[:, None]).long()
        autocast = torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()
        return training_step(model, optimizer, padded.to(device), embeddings.to(device), mask.to(device), autocast)

    return step


def make_ours(variant, dtype, device, grouped=False, load_in=None):
    """Return a function that takes one of our steps on the next batch; `load_in` is the flag of train.py, or None."""
    mapping_type, frozen = VARIANTS[variant]
    gpt = language_model().to(torch.bfloat16 if load_in == "16bit" else torch.float32)
    model = captioner(mapping_type, gpt, frozen).to(device)
    precision = "bf16" if dtype == "bf16" else "no"
    config = TrainingConfig(data="", bs=BATCH, mixed_precision=precision, group_by_length=grouped, warmup_steps=0)
    dataset = MadeCaptions()
    dataset.batches = lambda order, pin_memory, epoch: map(dataset.batch, order)
    trainer = Trainer(model, CrossEntropy(dataset), config, device)
    groups = trainer.epoch_batches()
    return lambda: trainer.train_step(next(groups))[0]


def run(device, repeats, quick):
    """Measure both variants, each in a process of its own, whose memory comes back; returns {title: rows}."""
    context, tables = multiprocessing.get_context("spawn"), {}
    for variant in list(VARIANTS)[: 1 if quick else None]:
        with ProcessPoolExecutor(1, context) as pool:
            done = pool.submit(measure, variant, device, repeats, quick, torch.get_num_threads())
            tables[variant] = done.result()
    return tables


def measure(variant, device, repeats, quick, threads):
    """Return a variant's rows: both precisions, all in turn."""
    torch.set_num_threads(threads)
    if quick:
        workload.shrink()
    systems, frozen = {}, VARIANTS[variant][1]
    for dtype in precisions(device):
        systems[f"plain {dtype}"] = make_plain(variant, dtype, device)
        systems[f"ours {dtype}"] = make_ours(variant, dtype, device)
        if not frozen:  # where fewer positions are the prefix's, and so more are padding
            systems[f"ours {dtype}, grouped by length"] = make_ours(variant, dtype, device, grouped=True)
    if frozen and "ours bf16" in systems:
        systems["ours bf16, --load_in 16bit"] = make_ours(variant, "bf16", device, load_in="16bit")
    timed = interleave(systems, max(1, repeats - 1), device)  # steps are long
    plain = timed.seconds["plain fp32"]
    return [
        {"system": name, "s/step": each, "captions/s": BATCH / each, "x plain fp32": plain / each} | timed.quality(name)
        for name, each in timed.seconds.items()
    ]


def memory():
    """Return rows of the peak memory of two steps, the second with AdamW's moments allocated."""
    rows = []
    for variant in VARIANTS:
        for name in ("plain fp32", *(f"ours {dtype}" for dtype in precisions(torch.device("cpu")))):
            if VARIANTS[variant][1] and name == "ours bf16":
                name = "ours bf16, --load_in 16bit"
            whole, alone, _ = peak_memory(_prepare_memory, variant, name)
            rows.append({"variant": variant, "system": name, "MiB with the model": whole, "MiB of training": alone})
    return rows


def _prepare_memory(variant, name):
    """Return two steps as a function."""
    kind, dtype = name.split(",")[0].split()
    load_in = {"load_in": "16bit"} if "16bit" in name else {}
    step = (make_plain if kind == "plain" else make_ours)(variant, dtype, torch.device("cpu"), **load_in)
    return lambda: [step() for _ in range(2)]
