"""What choosing among candidates brings in the synthetic world, and what it costs: quality over time.

    python -m demo.rerank
    python -m demo.rerank --tune

Input: nothing; scenes are drawn into --out. The first judges 1,000 test scenes, greedy and by the best of 1, 2, 4 ...
candidates, and writes docs/rerank.png and <out>/rerank.json; the second prints the quality by weight of the
log-probability on 500 other scenes, from which the weight in models/rerank.py was chosen.
"""

import argparse
import time
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch

from demo.world.captions import judge
from demo.world.scenes import Scene
from demo.world.splits import write_split
from features.loader import encode_files
from models.captioner import Captioner, image_key
from models.rerank import LOGPROB_WEIGHT, distinct, rank_by_consensus, scores_by_clip
from models.settings import SAMPLE, DecodingConfig
from utils.files import atomic_path, read_json, write_json

TEST, TUNE = 1000, 500  # scenes; those to tune on follow the test's in the split
BATCH = 25  # images at a time
TIMED = 4 * BATCH  # scenes that are timed
WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
PICKS = ("a perfect judge", "clip", "clip alone", "mbr", "log-probability")


class Scenes:
    """Scenes of the test split with their embeddings."""

    def __init__(self, captioner, out, part):
        """Draw and embed them; `part`: slice of the split."""
        paths = write_split("test", TEST + TUNE, out)
        self.records = read_json(paths["scenes"])[part]
        self.files = [str(paths["images"] / f"{record['image_id']:06d}.jpg") for record in self.records]
        batches = encode_files(captioner.encoder, self.files, BATCH)
        self.embeddings = torch.cat([embeddings for _, embeddings, _ in batches])
        self.keys = [image_key(file) for file in self.files]
        self.unseen = np.array([record["unseen"] for record in self.records])
        self.scenes, self.judged = [Scene.from_json(record) for record in self.records], {}

    def right(self, number, caption):
        """Tell whether a Caption says everything right of a scene."""
        asked = number, caption.text.strip()
        if asked not in self.judged:
            self.judged[asked] = bool(judge(asked[1], self.scenes[number])["all"])
        return self.judged[asked]

    def shares(self, captions):
        """Return the percentages (seen, unseen) of scenes whose Caption says everything right."""
        right = np.array([self.right(number, caption) for number, caption in enumerate(captions)])
        return 100 * right[~self.unseen].mean(), 100 * right[self.unseen].mean()

    def groups(self, captioner, decoding, number=None):
        """Return the Captions of all scenes, or of the first `number`."""
        spans = (slice(start, start + BATCH) for start in range(0, number or len(self.files), BATCH))
        parts = (captioner.caption_embeddings(self.embeddings[s], decoding, self.keys[s]) for s in spans)
        return [group for part in parts for group in part]


def sampling(candidates, temperature, seed):
    """Return the DecodingConfig that samples candidates."""
    return DecodingConfig(SAMPLE, top_p=1.0, temperature=temperature, num_captions=candidates, seed=seed)


def best(captions, values):
    """Return the Caption of the highest value."""
    return captions[int(np.argmax(values))]


def pick(scenes, captioner, groups, counts, picks):
    """Return {(pick, candidates): (seen, unseen)} of choosing among the first candidates of every scene."""
    scores, found = scores_by_clip(scenes.embeddings, groups, captioner.encoder.encode_texts), {}
    for count in counts:
        cut = [group[:count] for group in groups]
        means = [np.array([caption.mean_logprob for caption in group]) for group in cut]
        values = {
            "clip": [own[:count] + LOGPROB_WEIGHT * mean for own, mean in zip(scores, means, strict=True)],
            "clip alone": [own[:count] for own in scores],
            "log-probability": means,
            # lazy: it takes longer than the captions
            "a perfect judge": ([scenes.right(i, caption) for caption in group] for i, group in enumerate(cut)),
        }
        chosen = {name: map(best, cut, rows) for name, rows in values.items()}
        batches = (cut[start : start + BATCH] for start in range(0, len(cut), BATCH))
        chosen["mbr"] = (group[0] for batch in batches for group in rank_by_consensus(batch, False))
        found |= {(name, count): scenes.shares(list(chosen[name])) for name in picks}
    return found


def milliseconds(scenes, captioner, decoding):
    """Return the CPU time per image, in ms: of captioning, and of reading and encoding."""
    times = []
    for _ in range(3):
        began = time.process_time()
        scenes.groups(captioner, decoding, TIMED)
        times.append(time.process_time() - began)
    began = time.process_time()
    for _ in encode_files(captioner.encoder, scenes.files[:TIMED], BATCH):
        pass
    return 1e3 * min(times) / TIMED, 1e3 * (time.process_time() - began) / TIMED


def tune(scenes, captioner, args):
    """Print the quality by weight of the log-probability, for several numbers of candidates and temperatures."""
    for temperature in (1.0, 1.25, 1.5):
        groups = scenes.groups(captioner, sampling(max(args.candidates), temperature, 0))
        scores = scores_by_clip(scenes.embeddings, groups, captioner.encoder.encode_texts)
        for count in (n for n in args.candidates if n > 4):
            row = []
            for weight in WEIGHTS:
                values = [own[:count] + weight * np.array([c.mean_logprob for c in group[:count]])
                          for own, group in zip(scores, groups, strict=True)]  # fmt: skip
                seen, unseen = scenes.shares(list(map(best, groups, values)))
                row.append(f"{weight}: {seen:.1f} / {unseen:.1f}")
            print(f"temperature {temperature}, {count} candidates, by weight: {'   '.join(row)}", flush=True)


def measure(scenes, captioner, args):
    """Return {"greedy", "different", "frontier"}: shares, different captions and times by number of candidates."""
    results = {"greedy": [*scenes.shares([g[0] for g in scenes.groups(captioner, DecodingConfig())])]}
    results["greedy"] += milliseconds(scenes, captioner, DecodingConfig())
    print("greedy: seen {:.1f} %, unseen {:.1f} %, {:.1f} ms and {:.1f} ms of encoding".format(*results["greedy"]))
    found, different, counts = [], [], args.candidates
    for seed in range(args.seeds):
        groups = scenes.groups(captioner, sampling(max(counts), args.temperature, seed))
        found.append(pick(scenes, captioner, groups, counts, args.picks))
        different += [{n: len(distinct(group[:n])) for n in counts} for group in groups]
        print(f"seed {seed} is done", flush=True)
    results["different"] = {n: float(np.mean([row[n] for row in different])) for n in counts}
    frontier = results["frontier"] = []
    for count in counts:
        reranking = DecodingConfig(rerank="clip", num_candidates=count, temperature=args.temperature)
        spent, _ = milliseconds(scenes, captioner, reranking)
        shares = {name: np.array([one[name, count] for one in found]) for name in args.picks}
        frontier.append({"candidates": count, "ms": spent} | {name: rows.tolist() for name, rows in shares.items()})
        said = "; ".join(f"{name} {rows.mean(0)[0]:.1f} ± {rows.std(0)[0]:.1f} / {rows.mean(0)[1]:.1f} ± "
                         f"{rows.std(0)[1]:.1f}" for name, rows in shares.items())  # fmt: skip
        print(f"{count} candidates, {spent:.1f} ms: {said}", flush=True)
    return results


def draw(results, path):
    """Draw the shares of scenes all right over the time per image."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
    seen, unseen, spent, encoding = results["greedy"]
    for axes, side, title in zip(
        figure.subplots(1, 2), (0, 1), ("seen combinations", "unseen combinations"), strict=True
    ):
        axes.plot(spent + encoding, (seen, unseen)[side], "k*", markersize=11, label="greedy")
        styles = {"a perfect judge": ":", "clip": "o-", "mbr": "s--"}
        for name, style in ((n, s) for n, s in styles.items() if n in results["frontier"][0]):
            rows = [(r["ms"] + encoding, np.array(r[name])[:, side]) for r in results["frontier"]]
            axes.errorbar([x for x, _ in rows], [y.mean() for _, y in rows], [y.std() for _, y in rows], fmt=style,
                          markersize=4, capsize=2, label=name)  # fmt: skip
        for row in (r for r in results["frontier"] if "clip" in r):
            place = row["ms"] + encoding, np.mean(row["clip"], 0)[side]
            axes.annotate(row["candidates"], place, (0, -12), textcoords="offset points", fontsize=7, ha="center")
        axes.set(xscale="log", xlabel="ms of one core per image, encoding included", ylabel="all right, %", title=title)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter("{x:.0f}")
        axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def get_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo", help="captioner of the synthetic world")
    parser.add_argument("--out", type=Path, default=Path("demo/out/rerank"), help="folder for scenes and figures")
    parser.add_argument("--picture", type=Path, default=Path("docs/rerank.png"), help="picture to write")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="how many")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling")
    parser.add_argument("--seeds", type=int, default=3, help="how often candidates are drawn")
    parser.add_argument("--picks", nargs="+", choices=PICKS, default=list(PICKS), help="ways of choosing")
    parser.add_argument("--tune", action="store_true", help="try weights of the log-probability on other scenes")
    return parser


def main(argv=None):
    """Measure what the command line asks for."""
    args = get_parser().parse_args(argv)
    captioner = Captioner(args.checkpoint, device="cpu")
    scenes = Scenes(captioner, args.out, slice(TEST, None) if args.tune else slice(TEST))
    if args.tune:
        tune(scenes, captioner, args)
        return
    results = measure(scenes, captioner, args)
    write_json(args.out / "rerank.json", results)
    draw(results, args.picture)
    print(args.picture)


if __name__ == "__main__":
    main()
