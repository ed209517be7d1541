"""Judge captions of the synthetic world's test split and write report.html and report.json.

    python -m demo.report --scenes demo/out/world/scenes_test.json --images demo/out/world/test \
        --variant "MLP + GPT-2=demo/out/mlp_captions.json" --out demo/out/report.html

The page embeds its images, makes no request, and fits narrow and wide windows.
"""

import argparse
import base64
import html
import re
from pathlib import Path

from demo.world.captions import COUNT_WORDS, PLACES, RELATION_WORDS, SIZE_WORDS, judge
from demo.world.scenes import ATTRIBUTES, COLOURS, KINDS, Scene
from utils.files import read_json, write_json
from utils.look import PAGE

SAMPLES = 12  # scenes in the first gallery
EXTREMES = 6  # scenes in "all right" and in "most wrong"
PARTS = ("all scenes", "seen combinations", "unseen combinations")  # of the split; shown in this order
FLOOR = "floor: a caption of another scene"
COLUMNS = ("all", *ATTRIBUTES)
WORDS_OF = {
    "count": [w for words in COUNT_WORDS.values() for w in words],
    "size": [w for words in SIZE_WORDS.values() for w in words],
    "colour": list(COLOURS),
    "kind": [kind + s for kind in KINDS for s in ("s", "")],
    "relation": [w for words in RELATION_WORDS.values() for w in words],
    "background": [w for words in PLACES.values() for w in words],
}


# ---------------------------------------------------------------- figures
def share_right(verdicts):
    """Return {"scenes": n, attribute: {"right", "of", "share"}} of a list of verdicts.

    "relation" is counted over scenes of two groups only.
    """
    figures = {"scenes": len(verdicts)}
    for name in COLUMNS:
        known = [v[name] for v in verdicts if v[name] is not None]
        figures[name] = {"right": sum(known), "of": len(known), "share": sum(known) / len(known) if known else None}
    return figures


def judge_variant(captions, scenes):
    """Judge a variant's captions.

    Args:
        captions: {image_id: caption}; a scene without one is judged as an empty caption.
        scenes: records of scenes_<split>.json.
    Returns: ({image_id: verdict}, {part of PARTS: figures}).
    """
    verdicts = {r["image_id"]: judge(captions.get(r["image_id"], ""), Scene.from_json(r)) for r in scenes}
    seen = [verdicts[r["image_id"]] for r in scenes if not r["unseen"]]
    unseen = [verdicts[r["image_id"]] for r in scenes if r["unseen"]]
    return verdicts, dict(zip(PARTS, map(share_right, (list(verdicts.values()), seen, unseen)), strict=True))


def read_captions(path):
    """Read a captions json of predict.py: {image_id: caption}; ids as whole numbers."""
    return {int(r["image_id"]): r["caption"] for r in read_json(path)}


def read_references(scenes_json, scenes):
    """Read the captions beside a scenes file: {image_id: [caption]}."""
    path = Path(scenes_json)
    path = path.with_name(path.name.replace("scenes_", "captions_"))
    references = {r["image_id"]: [] for r in scenes}
    for r in read_json(path)["annotations"]:
        references[r["image_id"]].append(r["caption"])
    return references


# ---------------------------------------------------------------- the page
STYLE = (
    PAGE
    + """
code { background: var(--card); padding: .1em .4em; border-radius: .3em; font-size: .9em; }
table { width: 100%; font-size: .94rem; }
th, td { padding: .5rem .75rem; }
thead th { font-size: .85rem; }
td small { color: var(--quiet); display: block; font-size: .75rem; }
tr.group td { font-weight: 650; }
td.all { font-weight: 700; } tr.floor td { color: var(--quiet); font-weight: 400; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem;
  margin-top: 1rem; }
.grid .card { display: flex; gap: .9rem; padding: .9rem; }
.grid img { width: 112px; height: 112px; border-radius: .5rem; flex: none; } .grid .card div { min-width: 0; }
.grid h3 { font-size: .8rem; color: var(--quiet); margin: .6em 0 0; font-weight: 600; }
.grid div > h3:first-child { margin-top: 0; }
.grid p { margin: 0; font-size: .93rem; line-height: 1.4; }
.ok { color: var(--good); } .no { color: var(--error); }
details, details p { font-size: .85rem; color: var(--quiet); }
.tag { color: var(--accent); border: 1px solid; border-radius: 99px; padding: .05em .6em; font-size: .75rem; }
@media (max-width: 800px) {
  table.wide td { padding: .15rem .75rem; } td small { display: inline; margin-left: .4em; }
  .grid .card { flex-direction: column; } .grid img { width: 100%; height: auto; }
}
"""
)


def mark_wrong(caption, verdict):
    """Return the caption as html, its words of wrong attributes marked."""
    words = [w for name in ATTRIBUTES if verdict[name] is False for w in WORDS_OF[name]]
    text = html.escape(caption) or "(no caption)"
    if not words:
        return text
    pattern = "|".join(rf"\b{re.escape(w)}\b" for w in sorted(words, key=len, reverse=True))
    return re.sub(pattern, lambda m: f"<mark>{m.group(0)}</mark>", text, flags=re.IGNORECASE)


def _figure_row(name, figures, css=""):
    cells = []
    for column in COLUMNS:
        f = figures[column]
        share = "–" if f["share"] is None else f"{100 * f['share']:.1f}&nbsp;%"
        cells.append(
            f'<td class="{column}" data-of="{_title(column)}">{share}<small>{f["right"]}/{f["of"]}</small></td>'
        )
    return f'<tr class="{css}"><td>{html.escape(name)}</td>{"".join(cells)}</tr>'


def _title(column):
    return "all right" if column == "all" else column


def figure_table(results):
    """Return the html table of {variant: {part: figures}}."""
    head = "".join(f'<th scope="col">{_title(column)}</th>' for column in COLUMNS)
    rows = []
    for part in PARTS:
        number = next(iter(results.values()))[part]["scenes"]
        rows.append(f'<tr class="group"><td colspan="{len(COLUMNS) + 1}">{part} ({number:,} scenes)</td></tr>')
        rows += [_figure_row(n, f[part], "floor" if n == FLOOR else "") for n, f in results.items()]
    body = "".join(rows)
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    return f'<div class="card"><table class="wide">{head}<tbody>{body}</tbody></table></div>'


def scene_card(record, image, said, verdicts, references):
    """Return one scene's html card.

    Args:
        record: of scenes_<split>.json.
        image: Path of its picture.
        said, verdicts: {variant: caption}, {variant: verdict}.
        references: list of captions.
    """
    data = base64.b64encode(image.read_bytes()).decode()
    lines = ['<span class="tag">unseen combination</span>'] if record["unseen"] else []
    for name, caption in said.items():
        wrong = [a for a in ATTRIBUTES if verdicts[name][a] is False]
        note = '<span class="ok">✓ all right</span>'
        if not verdicts[name]["all"]:
            note = f'<span class="no">✗ {", ".join(wrong)}</span>'
        lines.append(f"<h3>{html.escape(name)} · {note}</h3><p>{mark_wrong(caption, verdicts[name])}</p>")
    told = "".join(f"<p>{html.escape(r)}</p>" for r in references)
    lines.append(f"<details><summary>references</summary>{told}</details>")
    picture = f'<img alt="{html.escape(references[0])}" src="data:image/jpeg;base64,{data}">'
    return f'<article class="card">{picture}<div>{"".join(lines)}</div></article>'


def pick_scenes(scenes, verdicts):
    """Choose scenes to show: (evenly spread, all right in every variant, most wrong)."""

    def wrong(record):
        return sum(v[record["image_id"]][a] is False for v in verdicts.values() for a in ATTRIBUTES)

    step = max(1, len(scenes) // SAMPLES)
    samples = [scenes[min(i * step + i % 4, len(scenes) - 1)] for i in range(min(SAMPLES, len(scenes)))]
    taken = {id(r) for r in samples}
    rest = [r for r in scenes if id(r) not in taken]
    best = sorted((r for r in rest if not wrong(r)), key=lambda r: -len(r["groups"]))[:EXTREMES]
    worst = [r for r in sorted(rest, key=wrong, reverse=True) if wrong(r)][:EXTREMES]
    return samples, best, worst


INTRO = """<h1>What the demo's captions get right</h1>
<p>Every figure here is about a <b>small synthetic world</b>: rendered scenes of one to three shapes, captioned by a
small CLIP and a small GPT-2 that know nothing else. It shows that the whole way from images to captions works and
compares variants exactly; it says nothing about photographs.</p>
<p>To caption photographs, use the published weights: <code>python predict.py photo.jpg --checkpoint coco</code>.</p>
<h2>Share of captions that are right</h2>
<p class="quiet">A caption is read back by a grammar and compared with what was drawn. “All right” asks for every
attribute at once; relation is counted where a scene has two groups; an unreadable caption is wrong in
everything. Unseen combinations (such as a purple star) occur in no training picture and no training caption of any
part, CLIP included.</p>"""


def build_page(results, galleries):
    """Return the page's html; galleries is [(title, remark, [card])]."""
    parts = [INTRO, figure_table(results)]
    for title, remark, cards in galleries:
        if cards:
            parts.append(f'<h2>{title}</h2><p class="quiet">{remark}</p><div class="grid">{"".join(cards)}</div>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>Demo report</title>'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>"
    )


def write_report(scenes_json, variants, images_dir, out_html):
    """Judge the variants and write the page, with report.json beside it.

    Args:
        scenes_json: scenes_<split>.json; captions_<split>.json must lie beside it.
        variants: {name: captions json of predict.py}.
        images_dir: folder of the split's images.
        out_html: page to write.
    Returns: {variant: {part of PARTS: figures}}.
    """
    scenes = read_json(scenes_json)
    references = read_references(scenes_json, scenes)
    ids = [r["image_id"] for r in scenes]
    said = {name: read_captions(path) for name, path in variants.items()}
    verdicts, results = {}, {}
    for name in said:
        verdicts[name], results[name] = judge_variant(said[name], scenes)
    shifted = {a: references[b][0] for a, b in zip(ids, ids[1:] + ids[:1], strict=True)}
    results[FLOOR] = judge_variant(shifted, scenes)[1]

    def cards(records):
        rows = []
        for r in records:
            i = r["image_id"]
            captions = {n: c.get(i, "") for n, c in said.items()}
            image = Path(images_dir) / f"{i:06d}.jpg"
            rows.append(scene_card(r, image, captions, {n: v[i] for n, v in verdicts.items()}, references[i]))
        return rows

    samples, best, worst = pick_scenes(scenes, verdicts)
    galleries = [
        ("Scenes", "Spread evenly over the test split, not chosen.", cards(samples)),
        ("All right", "Scenes that every variant captions without a mistake.", cards(best)),
        ("Most wrong", "Scenes with the most wrong attributes over all variants.", cards(worst)),
    ]
    out_html = Path(out_html)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    out_html.write_text(build_page(results, galleries), encoding="utf-8")
    write_json(out_html.with_suffix(".json"), results)
    return results


def summary_lines(results):
    """Return the figures as lines for a terminal."""
    scenes = next(iter(results.values()))
    titles = {part: f"{part} ({scenes[part]['scenes']:,})" for part in PARTS}
    width = max(map(len, (*results, *titles.values())))
    lines = []
    for part, title in titles.items():
        lines.append(f"{title:<{width}}  " + "  ".join(f"{c:>10}" for c in COLUMNS))
        for name, figures in results.items():
            shares = (figures[part][c]["share"] for c in COLUMNS)
            lines.append(f"{name:<{width}}  " + "  ".join("         –" if s is None else f"{s:10.1%}" for s in shares))
    return lines


def get_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Judge captions of the synthetic world and write a page.")
    parser.add_argument("--scenes", default="demo/out/world/scenes_test.json", help="scenes of the split")
    parser.add_argument("--images", default="demo/out/world/test", help="images of the split")
    parser.add_argument("--variant", action="append", required=True, metavar="NAME=CAPTIONS_JSON", help="repeatable")
    parser.add_argument("--out", default="demo/out/report.html", help="page to write")
    return parser


def main(argv=None):
    """Write the report the command line asks for."""
    args = get_parser().parse_args(argv)
    pairs = [v.partition("=") for v in args.variant]
    if any(not path for _, _, path in pairs):
        raise ValueError(f"--variant {args.variant}: write NAME=CAPTIONS_JSON")
    results = write_report(args.scenes, {n: p for n, _, p in pairs}, args.images, args.out)
    print("\n".join(summary_lines(results)))


if __name__ == "__main__":
    main()
