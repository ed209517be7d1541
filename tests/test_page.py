"""The page before a stand-in for the service, which answers when it is let: on phones, by keyboard, by ear."""

import collections
import queue
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SAMPLES
from contrast import CONTRAST, FAINT_TEXTS
from PIL import Image

from pages.fragments import STYLE, captions_html, prefix_html
from pages.service import Explanation

gradio = pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[app]"')


class GatedService:
    """Says which model and picture it was asked about, when their gate is open."""

    models, methods, at_once = ["demo", "other", "broken"], {"greedy": "greedy", "sampling": "sample"}, 4

    def __init__(self):
        self.gates = collections.defaultdict(threading.Event)
        self.asked = queue.Queue()

    def decoding(self, *values):
        return values

    def answer(self, *question):
        self.asked.put(question)
        self.gates[question].wait(30)

    def caption(self, image, model, decoding):
        self.answer("caption", model, Path(image).stem)
        if model == "broken":
            raise OSError(2, "no such file", "/home/me/broken.pt")
        texts = (f"{word} {model} {Path(image).stem}" for word in ("first", "second"))
        return [{"caption": text, "logprob": -0.5, "clip_score": 0.7} for text in texts]

    def explain(self, image, model, text):
        self.answer("explain", text)
        return Explanation(Image.new("RGB", (8, 8)), text.split(), np.ones((3, 8, 8)), np.ones(3), [[("a", 0.5)]])


@pytest.fixture
def gated(browser):
    """A page of a GatedService in the browser; yields (service, page)."""
    from pages.look import theme
    from pages.page import build_page

    service = GatedService()
    blocks = build_page(service, queue_size=9)
    _, address, _ = blocks.launch(
        prevent_thread_lock=True, quiet=True, server_port=None, ssr_mode=False, css=STYLE, theme=theme()
    )
    try:
        page = browser.new_page()
        page.goto(address)
        yield service, page
    finally:
        for gate in list(service.gates.values()):
            gate.set()
        page.close()
        blocks.close()


def pick(page, number):
    """Pick a sample picture; returns its name."""
    page.locator("#cc-samples button").nth(number).click()
    name = SAMPLES[number].name
    page.wait_for_function(f"document.querySelector('#cc-image img')?.src.endsWith('{name}')")
    return SAMPLES[number].stem


def ask(page):
    page.get_by_role("button", name="Caption", exact=True).click()


def choose(page, option):
    page.get_by_role("radio", name=option, exact=True).check()


def shown(page):
    """Return the captions and the words that the page shows."""
    return page.locator(".cc-captions b").all_inner_texts(), page.locator(".cc-words label").all_inner_texts()


def test_a_late_answer_is_not_shown(gated):
    """Old captions go with their picture or model, and what was asked about them is not shown when it comes."""
    service, page = gated
    old, new = pick(page, 0), None
    ask(page)
    assert service.asked.get(timeout=20) == ("caption", "demo", old)
    new = pick(page, 1)
    ask(page)
    assert service.asked.get(timeout=20) == ("caption", "demo", new)
    service.gates["caption", "demo", new].set()
    page.wait_for_selector(".cc-captions")
    assert service.asked.get(timeout=20) == ("explain", f"first demo {new}")
    service.gates["explain", f"first demo {new}"].set()
    page.wait_for_selector(".cc-words label")
    service.gates["caption", "demo", old].set()
    page.wait_for_timeout(1500)
    wanted = [f"first demo {new}", f"second demo {new}"], ["first", "demo", new]
    assert shown(page) == wanted
    choose(page, "other")
    page.wait_for_selector(".cc-captions", state="detached")
    assert shown(page) == ([], []) and not page.get_by_text("Caption to explain").is_visible()
    choose(page, "demo")
    ask(page)
    page.wait_for_selector(".cc-words label")
    assert shown(page) == wanted
    pick(page, 2)
    page.wait_for_selector(".cc-captions", state="detached")
    assert shown(page) == ([], [])


def test_a_late_explanation_is_not_shown(gated):
    service, page = gated
    name = pick(page, 0)
    service.gates["caption", "demo", name].set()
    ask(page)
    page.wait_for_selector(".cc-captions")
    service.gates["explain", f"second demo {name}"].set()
    assert service.asked.get(timeout=20)[0] == "caption"
    assert service.asked.get(timeout=20) == ("explain", f"first demo {name}")
    choose(page, f"second demo {name}")
    service.gates["explain", f"first demo {name}"].set()
    page.wait_for_selector(".cc-words label")
    assert shown(page)[1] == ["second", "demo", name]
    choose(page, f"first demo {name}")
    page.wait_for_selector(".cc-words label:text-is('first')")
    service.gates["explain", f"second demo {name}"].clear()
    choose(page, f"second demo {name}")
    page.wait_for_selector(".cc-words label", state="detached")
    pick(page, 1)
    service.gates["explain", f"second demo {name}"].set()
    page.wait_for_timeout(1500)
    assert shown(page) == ([], [])


def test_an_error_takes_old_captions_away(gated, capfd):
    service, page = gated
    name = pick(page, 0)
    for model in ("demo", "broken"):
        service.gates["caption", model, name].set()
    service.gates["explain", f"first demo {name}"].set()
    ask(page)
    page.wait_for_selector(".cc-words label")
    choose(page, "broken")
    ask(page)
    page.wait_for_selector("text=the server could not do this; its log says why")
    assert shown(page) == ([], []) and page.get_by_text("Captions appear here.").is_visible()
    assert not page.locator("[data-testid=status-tracker] .error:visible").count()  # it would outlast its picture
    assert "/home/me" not in page.content() and "/home/me/broken.pt" in capfd.readouterr().err


def ask_and_answer(service, page):
    """Have a picture captioned and its first caption explained."""
    name = pick(page, 0)
    service.gates["caption", "demo", name].set()
    service.gates["explain", f"first demo {name}"].set()
    ask(page)
    page.wait_for_selector(".cc-words label")
    return name


def test_a_phone_is_scrolled_to_the_captions(gated):
    """When the button is pressed, so that waiting is seen, and when they are there."""
    service, page = gated
    page.set_viewport_size({"width": 390, "height": 844})
    name = pick(page, 0)
    top = "document.querySelector('#cc-captions').getBoundingClientRect().top"
    assert page.evaluate(top) > 844
    ask(page)
    page.wait_for_function(f"{top} < innerHeight - 100")
    service.gates["caption", "demo", name].set()
    page.wait_for_selector(".cc-captions")
    page.wait_for_function(f"{top} >= 0 && {top} < innerHeight / 4")


def test_a_wide_window_is_not_scrolled(gated):
    service, page = gated
    page.set_viewport_size({"width": 1600, "height": 1000})
    ask_and_answer(service, page)
    assert page.evaluate("scrollY") == 0


FOCUSED = f"""() => {{ {CONTRAST}
  const element = document.activeElement
  if (element === document.body) return null
  const drawn = element.closest('.cc-words') ? element.nextElementSibling : element  // a word's button is its label
  const style = getComputedStyle(drawn), ground = behind(drawn.parentElement)
  return [style.outlineStyle === 'solid' ? parseFloat(style.outlineWidth) : 0,
    contrast(colour(style.outlineColor), ground), element.outerHTML] }}"""


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_texts_and_focus_are_seen(gated, scheme):
    """By the contrasts of WCAG AA; the keyboard comes to all, and leaves nothing open behind it."""
    service, page = gated
    page.emulate_media(color_scheme=scheme)
    page.reload()
    ask_and_answer(service, page)
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # colours change slowly
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")
    read, faint = page.evaluate(FAINT_TEXTS)
    assert read > 40 and not faint
    names = []
    page.locator("h1").click()  # Tab goes on from here
    while (stop := page.evaluate(FOCUSED)) or not names:
        if stop:
            assert stop[0] >= 2 and stop[1] >= 3, stop
            assert page.locator("[role=option]:visible").count() == 0
            names.append(stop[2])
        page.keyboard.press("Tab")
        assert len(names) < 60
    assert len(names) > 25


def test_pictures_and_words_have_names(gated):
    """And what is told of a word is heard with it alone."""
    from pages.page import SAMPLES as NAMED

    service, page = gated
    assert [ROOT / path for path in NAMED] == SAMPLES
    for name in NAMED.values():
        page.get_by_role("button", name=name, exact=True).wait_for()
    stem = ask_and_answer(service, page)
    assert page.locator("#cc-captions").get_attribute("aria-live") == "polite"
    group = page.get_by_role("radiogroup", name="Where each word comes from")
    for word in ("first", "demo", stem):
        button = group.get_by_role("radio", name=word, exact=True)
        button.press("Space")
        sentence = f"With the brightest region hidden, “{word}” loses 100\u00a0% of its probability."
        assert page.locator(f"#{button.get_attribute('aria-describedby')}").inner_text() == sentence
        assert page.locator(".cc-tell").aria_snapshot() == f"- paragraph: {sentence}".replace("\u00a0", " ")


def test_a_caption_of_ones_own_is_explained(gated):
    """By Enter or the button; it takes the mark from the caption that was chosen, and is gone when one is chosen."""
    service, page = gated
    name = ask_and_answer(service, page)
    own = page.get_by_label("or a caption of your own")
    explain = page.get_by_role("button", name="Explain")
    for text, send in (("one of mine", lambda: own.press("Enter")), ("another of mine", explain.click)):
        service.gates["explain", text].set()
        own.fill(text)
        send()
        page.wait_for_selector(f".cc-words label:text-is('{text.split()[0]}')")
        assert not page.locator("#cc-chosen input:checked").count()
    service.gates["explain", f"second demo {name}"].set()
    choose(page, f"second demo {name}")
    page.wait_for_selector(".cc-words label:text-is('second')")
    assert own.input_value() == ""


def test_numbers_have_their_scales():
    """Those that are shown, and no others."""
    plain = {"caption": "A star.", "logprob": -0.2, "clip_score": None}
    assert "nearer to 0" in captions_html([plain]) and "CLIP score" not in captions_html([plain])
    best = captions_html([{**plain, "clip_score": 1.5, "score": 1.48}])
    assert "CLIP score: from 0 to 2.5; the higher" in best and "plus 0.1 times the log-probability" in best
    assert "from −1 to 1; the higher" in prefix_html([[("star", 0.5)]])  # noqa: RUF001
