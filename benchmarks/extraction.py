"""Images per second: ours beside the plain method and open_clip's encoder, from JPEG files."""

import tempfile
from pathlib import Path

import torch

from benchmarks.measure import interleave, peak_memory, precisions
from benchmarks.plain import encode_captions
from benchmarks.workload import write_clip, write_photos
from encoders import load_encoder
from encoders.openai_clip import import_clip
from features.loader import encode_files

CAPTIONS_PER_IMAGE = 5
GFLOP_PER_IMAGE = 8.8  # ViT-B/32, 50 positions
BATCH = 64


def open_clip_encoder(clip_file, device):
    """Return open_clip's model and preprocessing for OpenAI's weights."""
    import open_clip

    model = open_clip.load_openai_model(str(clip_file), precision="fp32", device=device)
    return model.eval(), open_clip.image_transform(224, is_train=False)


def encode_by_open_clip(model, preprocess, paths, device):
    """Encode in batches as open_clip's examples do, decoded by a DataLoader's workers."""
    from PIL import Image

    class Photos(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            return preprocess(Image.open(paths[index]).convert("RGB"))

    with torch.inference_mode():
        loader = torch.utils.data.DataLoader(Photos(), batch_size=BATCH, num_workers=2)
        return torch.cat([model.encode_image(pixels.to(device)).cpu() for pixels in loader])


def encode_by_ours(encoder, paths):
    """Encode as parse_coco.py does."""
    return torch.cat([embeddings for _, embeddings, _ in encode_files(encoder, paths, BATCH, 2)])


def run(device, repeats, quick):
    """Measure extraction, and its cost as the images grow; returns {title: rows}."""
    with tempfile.TemporaryDirectory() as folder:
        clip_file = Path(folder) / "clip.pt"
        write_clip(clip_file)
        return measure(Path(folder), clip_file, device, repeats, quick)


def measure(folder, clip_file, device, repeats, quick):
    """Measure, given a folder to write to and the CLIP file in it."""
    few, many = (8, 128) if quick else (16, 256)  # the plain method takes the few
    paths = write_photos(folder, many)
    model, preprocess = import_clip().load(str(clip_file), device=device, jit=False)
    model.float().eval()
    dtypes = precisions(device)
    encoders = {f"ours {dtype}": load_encoder(clip_file, device, dtype) for dtype in dtypes}
    theirs = open_clip_encoder(clip_file, device)
    repeated = [path for path in paths[:few] for _ in range(CAPTIONS_PER_IMAGE)]
    work = {
        "plain": lambda: encode_captions(model, lambda image: preprocess(image).to(device), repeated),
        "open_clip fp32": lambda: encode_by_open_clip(*theirs, paths, device),
    } | {name: lambda encoder=encoder: encode_by_ours(encoder, paths) for name, encoder in encoders.items()}
    timed = interleave(work, repeats, device)
    seconds, found = timed.seconds, timed.results
    reference = torch.cat(found["plain"][::CAPTIONS_PER_IMAGE]).float().cpu()
    captions = {name: CAPTIONS_PER_IMAGE * (few if name == "plain" else many) for name in work}
    plain = seconds["plain"] / captions["plain"]
    rows = []
    for name, took in seconds.items():
        each, images = took / captions[name], captions[name] / (1 if name == "plain" else CAPTIONS_PER_IMAGE) / took
        first = reference if name == "plain" else found[name][:few]
        rows.append({
            "system": name, "images encoded/s": images, "ms/caption": each * 1e3, "x plain": plain / each,
            "x open_clip": None if name == "plain" else seconds["open_clip fp32"] / took,
            "GFLOP/s": images * GFLOP_PER_IMAGE,
            "largest difference": (first - reference).abs().max().item() / reference.abs().max().item(),
        } | timed.quality(name))  # fmt: skip
    growth = []
    for count in (32, 64) if quick else (100, 300, 1000):
        grown = (paths * (count // many + 1))[:count]
        whole, alone, took = peak_memory(prepare_memory, clip_file, grown, dtypes[-1])
        growth.append({
            "images": count, "precision": dtypes[-1], "s": took, "images/s": count / took,
            "MiB with the model": whole, "MiB of extraction": alone,
        })  # fmt: skip
    return {"five captions per image": rows, "growth": growth}


def prepare_memory(clip_file, paths, dtype):
    """Return a function that extracts, for its memory to be measured."""
    encoder = load_encoder(clip_file, "cpu", dtype)

    def work():
        for _ in encode_files(encoder, paths, BATCH, 2):
            pass

    return work
