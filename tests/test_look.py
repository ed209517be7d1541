"""The pages share one look, and mark what they should."""

from pathlib import Path

import pytest
from contrast import FAINT_TEXTS

from metrics.report import mark_unsaid, render
from utils.look import COLOURS, DARK, LIGHT


def test_the_browsers_page_has_the_same_colours():
    style = Path(__file__).parents[1] / "docs" / "browser" / "style.css"
    assert style.read_text().startswith(COLOURS)


@pytest.mark.parametrize(
    "caption, marked",
    (
        (
            "Two red cats on a mat.",
            "Two red <mark>cats</mark> on a mat.",
        ),  # no short words
        ("Dogs & <b>birds</b>", "Dogs &amp; &lt;b&gt;<mark>birds</mark>&lt;/b&gt;"),
        ("", ""),
    ),
)
def test_words_that_no_reference_has_are_marked(caption, marked):
    assert mark_unsaid(caption, ["two DOGS", "a dog on the mat"]) == marked


def luminance(colour):
    """Return WCAG's relative luminance of #rrggbb."""
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colours", (LIGHT, DARK), ids=("light", "dark"))
def test_colours_have_the_contrast_that_is_promised(colours):
    pairs = [(name, ground, 4.5) for name in ("text", "quiet", "accent", "error") for ground in ("page", "card")]
    pairs += [("on-accent", "accent", 4.5), ("line", "page", 3), ("line", "card", 3)]
    for name, ground, least in pairs:
        low, high = sorted(luminance(colours[key]) for key in (name, ground))
        assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
SCORES = {
    "captions": "captions-of-a-longer-name.json", "references": "references.json", "images": 2, "tokenizer": "python",
    "metrics": dict.fromkeys(NAMES, 0.5) | {"CIDEr": None}, "intervals": dict.fromkeys(NAMES, [0.4, 0.6]),
    "unavailable": {"CLIPScore": "there are no images"},
    "bootstrap": {"method": "bootstrap"}, "statistics": {"vocabulary_size": 9}, "warnings": ["two images"],
    "domains": {name: {"images": 1, "metrics": dict.fromkeys(NAMES, 0.5)} for name in ("in-domain", "out-domain")},
    "comparison": {
        "captions": "other.json", "metrics": dict.fromkeys(NAMES, 0.25), "method": "paired",
        "differences": dict.fromkeys(NAMES, {"difference": 0.25, "interval": [-0.125, 0.375], "p_value": 0.5}),
    },
}  # fmt: skip
WORST = {"image_id": 7, "score": 0.1, "captions": ["A cat flies."], "references": ["A dog runs."], "image": None}


@pytest.mark.parametrize("width", (320, 390, 820, 1600))
@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_the_scores_page_shows_all_it_has(width, scheme, browser, tmp_path):
    """No cell is out of sight, and every text is seen, marked words too."""
    (tmp_path / "page.html").write_text(render(SCORES, [], [WORST]), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto((tmp_path / "page.html").as_uri())
    cut = """() => [...document.querySelectorAll("td, mark")].filter((cell) =>
        cell.getBoundingClientRect().right > document.documentElement.clientWidth + 1
        || cell.scrollWidth > cell.clientWidth + 1 && cell.tagName === "TD").map((cell) => cell.innerText)"""
    assert page.locator("td").count() > 90 and page.evaluate(cut) == []
    read, faint = page.evaluate(FAINT_TEXTS)
    assert read > 90 and not faint
    assert page.locator("mark").all_inner_texts() == ["flies"]
    page.close()
