"""The pages share one look, and mark what they should."""

from pathlib import Path

import pytest

from metrics.report import mark_unsaid
from utils.look import COLOURS


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
