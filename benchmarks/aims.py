"""What was aimed at, beside what the stored results reached."""


def rows(results):
    """Return {aim, at least or at most, reached, where} for every aim whose section was measured.

    Args:
        results: as benchmarks/run.py stores them. Of several cells, the worst counts.
    """
    found = [*_captioning(results), *_extraction(results), *_training(results), *_startup(results)]
    return [row for row in found if row["reached"] is not None]


def _row(what, bound, cells, highest=False):
    """Return one aim's row.

    Args:
        bound: the aim, as text.
        cells: (value, where it was measured), the worst of which is taken.
        highest: whether the highest is the worst.
    """
    value, where = (max if highest else min)(cells, default=(None, None))
    return {"aim": what, "aimed at": bound, "reached": value, "where": where}


def _tables(results, section):
    """Return {title: rows} of a section, empty where it was not measured."""
    return results.get(section, {}).get("tables", {})


def _captioning(results):
    cells = [row for rows in _tables(results, "captioning").values() for row in rows if "x generate" in row]
    product = results.get("captioning", {}).get("limits", {}).get("bf16 product")
    for dtype in ("fp32", "bf16"):
        own = [(row["x generate"], f"{row['beams']} beams, batch {row['batch']}, {row['tokens']} tokens")
               for row in cells if row["system"] == f"ours {dtype}"]  # fmt: skip
        yield _row(f"decoding, {dtype}, x generate", ">= 2", own)
    many = [(row["GFLOP/s"] / product, "greedy, batch 64") for row in cells
            if row["system"] == "ours bf16" and row["batch"] == 64]  # fmt: skip
    yield _row("decoding, bf16, share of the processor's product", ">= 0.7", many)
    beam = {row["system"]: row["ms/caption"] for row in cells if (row["batch"], row["beams"]) == (16, 5)}
    both = [(beam["ours int8"] / beam["ours bf16"], "5 beams, batch 16")] if "ours bf16" in beam else []
    yield _row("decoding, int8, ms a caption over bf16's", "<= 1", both, highest=True)


def _extraction(results):
    cells = _tables(results, "extraction").get("five captions per image", [])
    product = results.get("extraction", {}).get("limits", {}).get("bf16 product")
    for dtype, bound in (("fp32", 2), ("bf16", 4)):
        own = [(row["x open_clip"], "ViT-B/32") for row in cells if row["system"] == f"ours {dtype}"]
        yield _row(f"extraction, {dtype}, x open_clip in fp32", f">= {bound}", own)
    own = [(row["GFLOP/s"] / product, "ViT-B/32") for row in cells if row["system"] == "ours bf16"]
    yield _row("extraction, bf16, share of the processor's product", ">= 0.7", own)


def _training(results):
    for variant, bound in (("MLP, GPT-2 fine-tuned", 5), ("transformer 40/40, GPT-2 frozen", 4)):
        own = [(row["x plain fp32"], row["system"]) for row in _tables(results, "training").get(variant, [])
               if row["system"] in ("ours fp32", "ours fp32, grouped by length")]  # fmt: skip
        yield _row(f"training, {variant}, x plain fp32", f">= {bound}", own)


def _startup(results):
    own = [(row["x load"], "predict.py") for row in
           _tables(results, "startup").get("one picture, GPT-2 124M and ViT-B/32", [])
           if row["process"].startswith("predict")]  # fmt: skip
    yield _row("first caption, x importing and mapping the weights", "<= 1.5", own, highest=True)
