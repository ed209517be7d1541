"""What fewer bits change: captions of test scenes by the demo's captioner in fp32, bf16 and int8.

    python -m demo.precision

Input: nothing; scenes are drawn into --out. Prints, per precision, the share of greedy captions that are fp32's, word
for word, and the share of scenes whose caption is right in every respect; writes <out>/precision.json.
"""

import argparse
from pathlib import Path

from demo.experiment import table
from demo.rerank import TEST, Scenes
from models.captioner import Captioner
from models.settings import DecodingConfig
from utils.files import write_json

DTYPES = ("fp32", "bf16", "int8")


def measure(out, device):
    """Return {dtype: {"same": % of captions as in fp32, "right": % of scenes all right}}."""
    results, reference = {}, None
    for dtype in DTYPES:
        captioner = Captioner("demo", device=device, dtype=dtype)
        scenes = Scenes(captioner, out, slice(0, TEST))
        captions = [group[0] for group in scenes.groups(captioner, DecodingConfig())]
        texts = [caption.text for caption in captions]
        reference = reference or texts
        results[dtype] = {
            "same": 100 * sum(a == b for a, b in zip(texts, reference, strict=True)) / len(texts),
            "right": 100 * sum(scenes.right(number, caption) for number, caption in enumerate(captions)) / len(texts),
        }
    return results


def main(argv=None):
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/out/precision"), help="folder to write")
    parser.add_argument("--device", default="cpu", help="torch device")
    args = parser.parse_args(argv)
    results = measure(args.out, args.device)
    rows = {dtype: [f"{value:.1f} %" for value in found.values()] for dtype, found in results.items()}
    print("\n".join(table(["as in fp32", "all right"], rows)))
    write_json(args.out / "precision.json", results)


if __name__ == "__main__":
    main()
