"""At scale: tars -> embeddings beside the encoder alone, stored embeddings -> captions beside decoding alone."""

import io
import os
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import interleave, peak_memory
from benchmarks.workload import captioner, language_model, write_clip, write_photos, write_tar
from encoders import load_encoder
from features.extraction import Reading, encode_parts
from features.sources import Tars
from features.store import FeatureStore
from models.bulk import CaptionFolder, caption_store
from models.decoding import generate_captions
from models.language import load_tokenizer
from models.settings import DecodingConfig
from utils.cli import progress_bar
from utils.precision import pick_dtype, prepare_for_inference

ROOT = Path(__file__).resolve().parent.parent
PER_TAR, WIDTH = 32, 512  # pictures per tar and batch; D
DECODING = DecodingConfig(method="greedy", entry_length=20, stop_token="")


def write_tars(folder, count):
    """Write tars of synthetic photographs with texts, all hard links to one file; returns their paths."""
    photos = write_photos(folder, PER_TAR)
    members = [(f"{n:09d}{ending}", data) for n, photo in enumerate(photos)
               for ending, data in ((".jpg", photo.read_bytes()), (".txt", b"A photograph."))]  # fmt: skip
    first = write_tar(folder / "00000.tar", members)
    for number in range(1, count):
        os.link(first, folder / f"{number:05d}.tar")
    return [str(folder / f"{number:05d}.tar") for number in range(count)]


def encode_tars(encoder, paths, workers):
    """Encode the pictures of tars as parse_coco.py does.

    Returns: images per second after the first batch, by which the decoding processes have started.
    """
    parts, count, began = Tars(paths).parts(), 0, None
    with progress_bar(None, "images", "img") as bar:
        for _, pictures, _ in encode_parts(encoder, parts, [()] * len(parts), Reading(PER_TAR, workers), bar):
            count += len(pictures or ()) if began else 0
            began = began or time.perf_counter()
    return count / (time.perf_counter() - began)


def run(device, repeats, quick):
    """Measure both pipelines, and memory over the number of tars; returns {title: rows}."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_clip(folder / "clip.pt")
        tars = write_tars(folder, 2 if quick else 6)
        return {
            "pictures in tars": extraction(folder / "clip.pt", tars, device, repeats),
            "stored embeddings": captioning(folder, device, repeats, 64 if quick else 256),
            "memory": memory_by_tars(folder, tars[0], (1, 4) if quick else (1, 30, 300)),
        }


def extraction(clip_file, tars, device, repeats):
    """Compare the encoder on ready pixels with the whole pipeline from tars."""
    threads, rows = torch.get_num_threads(), []
    dtype = pick_dtype("auto", device)
    pixels, batches = torch.randn(PER_TAR, 3, 224, 224), len(tars)
    try:
        for own, workers in ((1, 1), (2, 2)) if device.type == "cpu" else ((threads, 8),):
            torch.set_num_threads(own)
            encoder = load_encoder(clip_file, device, dtype)
            work = {
                "alone": lambda encoder=encoder: [encoder.encode_images(pixels) for _ in range(batches)],
                "tars": lambda encoder=encoder, workers=workers: encode_tars(encoder, tars, workers),
            }
            timed = interleave(work, repeats, device)
            seconds, found = timed.seconds, timed.results
            alone, whole = batches * PER_TAR / seconds["alone"], batches * PER_TAR / seconds["tars"]
            rows.append({
                "threads of the encoder": own, "processes that decode": workers, "precision": dtype,
                "encode_images, images/s": alone, "from tars, images/s": whole,
                "from tars after the start, images/s": found["tars"], "share after the start": found["tars"] / alone,
            })  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return rows


def captioning(folder, device, repeats, count):
    """Compare `generate_captions` on whole batches with the whole pipeline from a store to parquet."""
    model = captioner("mlp", prepare_for_inference(language_model().to(device), "fp32", device), True).to(device).eval()
    tokenizer = load_tokenizer(str(ROOT / "demo" / "weights" / "gpt2"))
    embeddings = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))
    captions = [{"image_id": row, "caption": "A photograph.", "clip_embedding": row} for row in range(count)]
    (folder / "store.pkl").touch()
    store, number = FeatureStore(embeddings, captions, {}, folder / "store.pkl"), iter(range(1000))
    size = min(256, count)

    def caption(batch, decoding, keys=None):
        return generate_captions(model, tokenizer, batch.to(device), decoding, keys=keys)

    whole = types.SimpleNamespace(model=model, device=device, caption_embeddings=caption)
    work = {
        "alone": lambda: [caption(embeddings[start : start + size], DECODING) for start in range(0, count, size)],
        "bulk": lambda: caption_store(
            whole, store, CaptionFolder(f"{folder}/captions{next(number)}/", {"files": [], "names": []}), DECODING, size
        ),
    }
    seconds = interleave(work, repeats, device).seconds
    return [{
        "batch": size, "generate_captions, captions/s": count / seconds["alone"],
        "predict.py --data, captions/s": count / seconds["bulk"], "share": seconds["alone"] / seconds["bulk"],
    }]  # fmt: skip


def memory_by_tars(folder, tar, counts):
    """Return rows of the peak memory of going through tars, each of two pictures of 32 pixels, with their captions."""
    write_tar(folder / "small.tar", small_members())
    rows = []
    for count in counts:
        paths = [str(folder / f"small{number:05d}.tar") for number in range(count)]
        for path in paths:
            if not os.path.exists(path):
                os.link(folder / "small.tar", path)
        whole, alone, seconds = peak_memory(prepare_memory, folder / "clip.pt", paths)
        rows.append({"tars": count, "s": seconds, "MiB with the model": whole, "MiB of going through them": alone})
    return rows


def small_members():
    """Return the members of a tar with two small pictures."""
    members = []
    for number in range(2):
        data = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data, "JPEG")
        members += [(f"{number:09d}.jpg", data.getvalue()), (f"{number:09d}.txt", b"A photograph.")]
    return members


def prepare_memory(clip_file, paths):
    """Return extraction from tars as a function, for its memory."""
    encoder = load_encoder(clip_file, "cpu")
    torch.set_num_threads(1)
    return lambda: encode_tars(encoder, paths, 0)
