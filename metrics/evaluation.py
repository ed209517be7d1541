"""What evaluate.py does once its files are read: scores, intervals, the page and the json."""

import numpy as np

from encoders import load_encoder
from features.loader import encode_files
from features.references import named
from metrics import ptb
from metrics.bootstrap import compare, intervals
from metrics.clipscore import add_clip_scores
from metrics.coco import caption_statistics, coco_scores, too_few_distinct
from metrics.report import image_uri, ranking_metric, render, text_tables
from metrics.scripts import uncut_warning
from utils.cli import progress_bar
from utils.devices import pick_device
from utils.files import write_json, write_text

INTERVALS = "bootstrap over images, percentiles, {samples} samples, seed {seed}"
COMPARISON = "interval: paired bootstrap; p: two-sided paired randomisation test; {samples} samples each, seed {seed}"
BATCH = 64  # images per call of the encoder


def evaluate(args, inputs):
    """Score the systems and write what the command line asks for.

    Args:
        args: the command line of evaluate.py.
        inputs: its Inputs.
    Returns: result as `--out` writes it, without scores per image; the tables as text.
    Raises: ValueError.
    """
    scores = score_systems(args, inputs)
    systems, references = inputs.systems, inputs.references.captions
    training = None if inputs.training is None else set(ptb.tokenize(inputs.training))
    result = describe(args, scores, training)
    result["warnings"] = warnings_of(scores, systems, {i: references[i] for i in systems[0]})
    domains = score_domains(systems[0], inputs.references, args)
    if domains:
        result["domains"] = domains
    if args.html:
        best, worst = pick_examples(scores[0], systems, inputs.references, args.examples, inputs.finder)
        write_text(args.html, render(result, best, worst))
    if args.out:
        write_json(args.out, {**result, "per_image": per_image(scores[0], systems[0])})
    return result, text_tables(result)


def score_systems(args, inputs):
    """Return [Scores, one per system]; arguments as of `evaluate`."""
    if args.clip_model_type:  # first: an unreadable image ends the command
        encoder = load_encoder(args.clip_model_type, pick_device(args.device))
        encoder.check_texts("CLIPScore")
        embeddings = embed_images(encoder, inputs.images, args.num_workers)
    references = inputs.references.captions
    scores = [coco_scores(system, references, args.metrics, args.tokenizer) for system in inputs.systems]
    if args.clip_model_type:
        for system, captions in zip(scores, inputs.systems, strict=True):
            add_clip_scores(system, captions, references, embeddings, encoder.encode_texts)
    return scores


def warnings_of(scores, systems, references):
    """Return what the reader of the scores must know, as lines; see `evaluate`."""
    empty = [image_id for system in systems for image_id, caption in system.items() if not caption.strip()]
    warnings = [
        *scores[0].warnings,
        empty and f"{len(empty):,} of {sum(map(len, systems)):,} captions are empty ({named(empty)})",
        too_few_distinct(caption_statistics(scores[0].tokens), len(scores[0].ids)),
        uncut_warning({
            "captions": [caption for system in systems for caption in system.values()],
            "references": [text for texts in references.values() for text in texts],
        }),
    ]  # fmt: skip
    return [warning for warning in warnings if warning]


def embed_images(encoder, images, num_workers):
    """Return the CLIP embeddings, [N, D], of {image id: file}, read by `num_workers` processes.

    Raises: ValueError where an image is unreadable.
    """
    parts, paths = [], list(images.values())
    with progress_bar(len(paths), "images", "img") as bar:
        for _, embeddings, errors in encode_files(encoder, paths, BATCH, num_workers):
            if errors:
                index, reason = next(iter(errors.items()))
                raise ValueError(f"{paths[index]}: {reason}; CLIPScore needs every image")
            parts.append(embeddings.numpy())
            bar.update(len(embeddings))
    return np.concatenate(parts)


def describe(args, scores, training):
    """Return scores, intervals and comparison as `--out` writes them; `training`: set of captions, or None."""
    result = {
        "metrics": scores[0].metrics,
        "unavailable": scores[0].unavailable,
        "captions": args.captions,
        "references": args.references,
        "images": len(scores[0].ids),
        "tokenizer": scores[0].tokenizer,
        "statistics": caption_statistics(scores[0].tokens, training),
    }
    if args.clip_model_type:
        result["clip_model_type"] = args.clip_model_type
    settings = {"samples": args.bootstrap, "seed": args.seed}
    if args.bootstrap and len(scores[0].ids) > 1:
        result["bootstrap"] = {**settings, "method": INTERVALS.format(**settings)}
        result["intervals"] = intervals(scores[0], **settings)
    if args.compare:
        result["comparison"] = {
            "captions": args.compare,
            "metrics": scores[1].metrics,
            "statistics": caption_statistics(scores[1].tokens, training),
            "differences": compare(*scores, **settings),
            "method": COMPARISON.format(**settings),
        }
    return result


def score_domains(captions, references, args):
    """Score nocaps' domains, each as a set of its own: {domain: {"images", "metrics"}}; {} for other references."""
    parts = {}
    for image_id in captions:
        if image_id in references.domains:
            parts.setdefault(references.domains[image_id], {})[image_id] = captions[image_id]
    return {
        domain: {
            "images": len(part),
            "metrics": coco_scores(part, references.captions, args.metrics, args.tokenizer).metrics,
        }
        for domain, part in sorted(parts.items())
    }


def pick_examples(scores, systems, references, number, finder=None):
    """Return the best and the worst images by `ranking_metric` as two lists of examples for the page."""
    values = scores.per_image.get(ranking_metric(scores.metrics), np.zeros(0))
    order = np.argsort(-values, kind="stable")
    number = min(number, (len(order) + 1) // 2)

    def example(row):
        image_id = scores.ids[row]
        path = references.find_image(finder, image_id) if finder else None
        return {
            "image_id": image_id,
            "score": float(values[row]),
            "captions": [system[image_id] for system in systems],
            "references": references.captions[image_id],
            "image": image_uri(path) if path else None,
        }

    return [example(row) for row in order[:number]], [example(row) for row in order[number:][::-1][:number]]


def per_image(scores, captions):
    """Return a list with caption and scores of every image; a score that is not a number becomes None."""
    return [
        {"image_id": image_id, "caption": captions[image_id]}
        | {name: float(values[row]) if np.isfinite(values[row]) else None for name, values in scores.per_image.items()}
        for row, image_id in enumerate(scores.ids)
    ]
