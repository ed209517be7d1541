"""Whether tokens are read as fast as training takes them."""

import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import interleave, precisions
from benchmarks.storing import MODEL
from benchmarks.storing import write_store as write_shards
from benchmarks.training import BATCH
from benchmarks.workload import PREFIX, language_model
from features.dataset import CaptionDataset
from features.store import read_store, write_store
from models.clip_caption import build_captioner
from models.language import load_tokenizer
from models.settings import CaptionConfig
from training.objectives import CrossEntropy
from training.settings import TrainingConfig
from training.trainer import Trainer


def run(device, repeats, quick):
    """Measure tokens of two encoders' sizes in both kinds of store; returns {title: rows}."""
    rows = []
    for shape in ((49, 768), (256, 1024)):
        count = max(10 * BATCH, (1 << (20 if quick else 29)) // math.prod(shape))
        with tempfile.TemporaryDirectory() as folder:
            shards = Path(folder) / "store"
            write_shards(shards, count, shape)
            taken = trained(read_store(shards), shape, device, repeats)
            rows.append(read_rates("shards", shards, shape, taken))
            mapped = read_store(shards)
            whole = mapped.clip_embedding[np.arange(count // 2)].float()
            captions = [mapped.captions[number] for number in range(len(whole))]
            write_store(Path(folder) / "store.pkl", whole, captions, mapped.info)
            del mapped, whole
            rows.append(read_rates("pickle", Path(folder) / "store.pkl", shape, taken))
    return {"random batches of 40": rows}


def read_rates(form, path, shape, taken):
    """Return a row on a store: how fast its rows are gathered; for shards, also with a cold page cache."""
    store = read_store(path)
    size = store.clip_embedding.shape[0] * math.prod(shape) * (2 if form == "shards" else 4) / 1e9
    embeddings, rates = store.clip_embedding, []
    count = min(len(embeddings) // BATCH, 50)
    order = np.random.default_rng(0).permutation(len(embeddings))[: count * BATCH].reshape(-1, BATCH)
    for cold in (True, False) if form == "shards" and hasattr(os, "posix_fadvise") else (False,):
        if cold:
            for file in embeddings.files:
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        for indices in order:
            embeddings[torch.from_numpy(indices)]
        rates.append(count * BATCH / (time.perf_counter() - began))
    return {
        "store": form, "GB": size, "tokens": f"{shape[0]} x {shape[1]}", "rows read/s": rates[-1],
        "rows read/s, from the disk": rates[0] if len(rates) > 1 else None, "rows trained on/s": taken,
        "x": min(rates) / taken,
    }  # fmt: skip


def trained(store, shape, device, repeats):
    """Return the rows per second on which a resampler with a frozen GPT-2 124M trains, gathering them included."""
    config = CaptionConfig(
        prefix_dim=shape[1], num_tokens=shape[0], mapping_type="resampler", only_prefix=True, prefix_length=PREFIX
    )
    torch.manual_seed(0)
    model = build_captioner(config, language_model()).to(device)
    dataset = CaptionDataset(store, load_tokenizer(str(MODEL)))
    precision = "bf16" if "bf16" in precisions(device) else "no"
    training = TrainingConfig(data="", bs=BATCH, warmup_steps=0, mixed_precision=precision)
    trainer = Trainer(model, CrossEntropy(dataset), training, device)
    groups = trainer.epoch_batches()
    timed = interleave({"": lambda: trainer.train_step(next(groups))}, repeats, device)
    return BATCH / timed.seconds[""]
