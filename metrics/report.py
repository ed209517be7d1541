"""A system's scores for people: a table for the terminal; one HTML page, self-contained, with best and worst images."""

import base64
import html
import io
import re
from pathlib import Path

from PIL import Image, ImageOps

from utils.look import PAGE

IMAGE_SIDE = 480
UNDEFINED = "not defined on one image"  # the one reason why a metric has no value: see metrics.coco, CIDEr
TOKENIZERS = {"java": "Stanford PTBTokenizer", "python": "Penn Treebank, without Java"}
STYLE = (
    PAGE
    + """
th, td { padding: .35rem .9rem .35rem 0; } td { overflow-wrap: anywhere; }
td:nth-child(2) { font-weight: 600; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.card { overflow-wrap: anywhere; }
.card img { display: block; width: 100%; height: 12rem; object-fit: contain; background: var(--page); }
.card div { padding: .75rem .9rem; }
.card ul { margin: .5rem 0 0; padding-left: 1.1rem; color: var(--quiet); font-size: .9rem; }
.caption { font-weight: 600; margin: 0; }
.other { margin: .35rem 0 0; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3.5rem; align-items: flex-start; }
.tables > section { max-width: 100%; overflow-x: auto; }
.tables .quiet { max-width: 26rem; margin-top: .5rem; overflow-wrap: anywhere; }
.head { display: flex; justify-content: space-between; gap: 1rem; margin: 0 0 .4rem; color: var(--quiet);
  font-size: .85rem; }
"""
)
FITTING = 3  # columns that a phone shows side by side
SHORT = 3  # words of at most so many letters are never marked, such as "the"


def tables(result):
    """Lay out what evaluate.py writes as JSON.

    Yields: (heading, head, rows, notes); all cells are text, the second of a row is its value.
    """
    spans, metrics = result.get("intervals", {}), result["metrics"]
    rows = [
        [name, UNDEFINED if value is None else _number(value), *([span(spans.get(name))] if spans else [])]
        for name, value in metrics.items()
    ]
    notes = [f"{name} is left out: {reason}" for name, reason in result["unavailable"].items()]
    notes += [result["bootstrap"]["method"]] if spans else []
    yield "Metrics", ["metric", "value", *(["95 % interval"] if spans else [])], rows, notes
    if "domains" in result:
        parts = {**result["domains"], "overall": result}
        names = [name for name in metrics if all(name in part["metrics"] for part in parts.values())]
        rows = [
            [domain, _number(part["images"]), *(_number(part["metrics"][name]) for name in names)]
            for domain, part in parts.items()
        ]
        undefined = {
            f"–: {name} is {UNDEFINED}" for part in parts.values() for name in names if part["metrics"][name] is None
        }
        yield "Domains", ["domain", "images", *names], rows, ["each domain is scored as a set of its own", *undefined]
    other = result.get("comparison")
    if other:
        rows = [
            [name, f"{gap['difference']:+.3f}", span(gap["interval"]), f"{gap['p_value']:.3f}"]
            + [_number(other["metrics"][name])]
            for name, gap in other["differences"].items()
        ]
        head = ["metric", "difference", "95 % interval", "p", "its value"]
        rows += [[name, UNDEFINED, *3 * [_number(None)]] for name, value in other["metrics"].items() if value is None]
        yield f"Difference to {Path(other['captions']).name}", head, rows, [other["method"]]
    rows = [[name.replace("_", " "), _number(value)] for name, value in result["statistics"].items()]
    yield "Captions", ["quantity", "value"], rows, []


def text_tables(result):
    """Return the tables for a terminal."""
    lines = [f"{result['images']:,} images"]
    for heading, head, rows, notes in tables(result):
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
        lines += ["", heading, *("  ".join(row).rstrip() for row in cells), *notes]
    return "\n".join(lines)


def ranking_metric(metrics):
    """Return the metric that orders images: CIDEr, or else the first that is defined; "" where none is."""
    defined = [name for name, value in metrics.items() if value is not None]
    return "CIDEr" if "CIDEr" in defined else next(iter(defined), "")


def span(bounds):
    """Return an interval as text; None (one image) is a dash."""
    return "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def _number(value):
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def image_uri(path):
    """Return an image as a data: address, at most IMAGE_SIDE wide and high, or None where it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (IMAGE_SIDE, IMAGE_SIDE))
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def render(result, best, worst):
    """Lay out the page.

    Args:
        result: what evaluate.py writes as JSON.
        best, worst: lists of examples: {"image_id", "score", "captions": [texts, one per system],
            "references": [texts], "image": data: address or None}.
    Returns: HTML text that refers to nothing outside itself.
    """
    title = f"Scores of {Path(result['captions']).name}"
    metric = ranking_metric(result["metrics"])
    comparison = result.get("comparison")
    other = Path(comparison["captions"]).name if comparison else ""
    sections = "".join(_section(*table) for table in tables(result))
    cards = "".join(
        f"<h2>{name} images by {metric}</h2><p class='quiet'>Marked: longer words that no reference of the image "
        "has.</p><div class='cards'>" + "".join(_card(example, metric, other) for example in examples) + "</div>"
        for name, examples in (("Best", best), ("Worst", worst))
        if examples
    )
    warnings = "".join(f"<p>Warning: {_text(warning)}.</p>\n" for warning in result["warnings"])
    references, tokenizer = Path(result["references"]).name, TOKENIZERS[result["tokenizer"]]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body><main><h1>{_text(title)}</h1>"
        f"<p class='quiet'>{result['images']:,} images · references: {_text(references)} · tokens: {tokenizer}</p>\n"
        f"{warnings}"
        f"<div class='tables'>{sections}</div>\n{cards}</main></body></html>\n"
    )


def _text(value):
    return html.escape(str(value), quote=True)


def mark_unsaid(caption, references):
    """Return a caption as HTML, with words of more than SHORT letters marked where no reference has them."""
    said = {word for reference in references for word in re.findall(r"\w+", reference.lower())}
    pieces = re.split(r"(\w+)", caption)  # words at odd places
    for place in range(1, len(pieces), 2):
        word = pieces[place]
        pieces[place] = f"<mark>{word}</mark>" if len(word) > SHORT and word.lower() not in said else word
    return "".join(piece if place % 2 else _text(piece) for place, piece in enumerate(pieces))


def _section(heading, head, rows, notes):
    """A heading, a table and notes below it; in a narrow window, rows of many columns become lists."""
    kind = " class='wide'" if len(head) > FITTING else ""
    cells = "".join(f"<th scope='col'>{_text(name)}</th>" for name in head)
    lines = "".join(
        f"<tr><td>{_text(row[0])}</td>"
        + "".join(f"<td data-of='{_text(of)}'>{_text(cell)}</td>" for of, cell in zip(head[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    quiet = "".join(f"<p class='quiet'>{_text(note)}.</p>" for note in notes)
    return (
        f"<section><h2>{_text(heading)}</h2><table{kind}><thead><tr>{cells}</tr></thead>"
        f"<tbody>{lines}</tbody></table>{quiet}</section>"
    )


def _card(example, metric, other):
    """One image, its score, the systems' captions and the references."""
    image = f"<img alt='image {_text(example['image_id'])}' src='{example['image']}'>" if example["image"] else ""
    own, *others = (mark_unsaid(text, example["references"]) for text in example["captions"])
    captions = f"<p class='caption'>{own}</p>"
    captions += "".join(f"<p class='other'>{_text(other)}: {text}</p>" for text in others)
    references = "".join(f"<li>{_text(reference)}</li>" for reference in example["references"])
    return (
        f"<article class='card'>{image}<div><p class='head'><span>{_text(example['image_id'])}</span>"
        f"<span>{metric} {example['score']:.3f}</span></p>{captions}<ul>{references}</ul></div></article>"
    )
