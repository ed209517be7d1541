"""Images per second of other libraries' towers: ours beside the library's own loop, from pixels."""

import tempfile
from pathlib import Path

import open_clip
import timm
import torch

from benchmarks.measure import interleave, precisions
from encoders import load_encoder

BATCH = 4
TOWERS = {  # title -> library, architecture
    "ViT-B/16": ("open_clip", "ViT-B-16"),
    "ViT-L/14": ("open_clip", "ViT-L-14"),
    "SigLIP B/16": ("open_clip", "ViT-B-16-SigLIP"),
    "DINOv2 S/14": ("timm", "vit_small_patch14_dinov2"),
}
QUICK = {"ViT-Ti/16": ("timm", "vit_tiny_patch16_224")}


def build(library, arch, device):
    """Return (the library's model, its function of pixels to embeddings), with random weights."""
    if library == "timm":
        model = timm.create_model(arch, num_classes=0).eval().to(device)
        return model, model
    model = open_clip.create_model(arch).eval().to(device)
    return model, model.encode_image


def run(device, repeats, quick):
    """Measure every tower; returns {title: rows}."""
    rows, batch = [], 2 if quick else BATCH
    dtypes = precisions(device)
    for title, (library, arch) in (QUICK if quick else TOWERS).items():
        model, embed = build(library, arch, device)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{arch}.pt"
            torch.save(model.state_dict(), file)
            encoders = {f"ours {dtype}": load_encoder(f"{library}:{arch}/{file}", device, dtype) for dtype in dtypes}
        side = encoders["ours fp32"].input_resolution
        pixels = torch.randn(batch, 3, side, side)

        @torch.inference_mode()
        def plain(embed=embed, pixels=pixels):
            return embed(pixels.to(device)).float().cpu()

        work = {f"{library} fp32": plain}
        work |= {name: lambda e=encoder, x=pixels: e.encode_images(x) for name, encoder in encoders.items()}
        timed = interleave(work, repeats, device)
        seconds, found = timed.seconds, timed.results
        reference = found[f"{library} fp32"]
        for name, took in seconds.items():
            difference = (found[name] - reference).abs().max() / reference.abs().max()
            rows.append({
                "tower": title, "system": name, "images/s": batch / took,
                "x library": seconds[f"{library} fp32"] / took, "largest difference": difference.item(),
            } | timed.quality(name))  # fmt: skip
    return {f"batches of {batch}": rows}
