"""Pieces of the page as html: captions with their scores, the regions behind words, the prefix as words."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from metrics.clipscore import WEIGHT
from models.rerank import LOGPROB_WEIGHT

DECIDING = 0.05  # share of a word's probability: what costs less when hidden does not decide the word
DARK = 0.82  # of a region that a word does not rest on
SCORE = f"Score: the CLIP score plus {LOGPROB_WEIGHT} times the log-probability; the higher, the better."
LOGPROB = "Log-probability per token: below 0; the nearer to 0, the likelier to the language model."
CLIP_SCORE = f"CLIP score: from 0 to {WEIGHT}; the higher, the better it fits the image; compare it within one model."
COSINE = "Cosine: from −1 to 1; the higher, the nearer."  # noqa: RUF001
STYLE = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; color-scheme: light;
  --color-accent: var(--slider-color) }
.gradio-container, .cc { --accent: var(--slider-color, currentcolor);  /* notebooks show fragments without gradio */
  --quiet: var(--body-text-color-subdued, currentcolor); --line: var(--border-color-primary, currentcolor);
  --thin: color-mix(in srgb, var(--line) 45%, transparent) }
.dark .gradio-container { color-scheme: dark }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth } }
.gradio-container :focus-visible { outline: 3px solid var(--accent) !important; outline-offset: 2px !important }
.gradio-container #cc-image :focus-visible { outline-offset: -3px !important }  /* its frame would cut it off */
.gradio-container input[type="radio"] { appearance: auto !important; accent-color: var(--accent) }
.gradio-container input[type="range"]::-webkit-slider-thumb { background: var(--accent) !important }
.gradio-container input[type="range"]::-moz-range-thumb { background: var(--accent) !important }
#cc-samples > .gallery { display: grid; grid-template-columns: repeat(5, 1fr); gap: 8px; padding: 5px }
#cc-samples .gallery-item, #cc-samples .gallery-item * { width: 100%; max-width: none; height: auto; aspect-ratio: 1 }
#cc-image img { width: 100%; height: 100%; object-fit: contain }
#cc-captions { scroll-margin-top: .75rem } #cc-chosen label { width: 100% }
#cc-own .input-container { align-items: center; gap: .5rem }
#cc-own textarea, #cc-own button { border: 1px solid var(--line) !important; border-radius: var(--input-radius) }
#cc-own button { color: var(--body-text-color); margin: 0; padding: .35rem .8rem; height: auto }
[data-testid="status-tracker"]:has(.error), footer .divider { display: none !important }
.gradio-container .min_value, .gradio-container .max_value, footer button { color: var(--quiet) !important }
.cc h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); letter-spacing: -.02em; line-height: 1.15; margin: .4rem 0 .2rem }
.cc h2 { font-size: 1.05rem; margin: 0 0 .25rem } .cc p { margin: 0 0 .6rem; line-height: 1.5 }
.cc .soft { color: var(--quiet); font-size: .9rem }
.cc-empty { border: 1px dashed var(--line); border-radius: 14px; padding: 3.2rem 1rem;
  text-align: center; color: var(--quiet) }
.cc-captions { list-style: none; margin: 0 !important; padding: 0 !important }
.cc-captions li { padding: .7rem 0; border-top: 1px solid var(--thin); margin: 0 }
.cc-captions li:first-child { border: 0; padding-top: .2rem }
.cc-captions b { font-weight: 500; display: block; font-size: 1rem; line-height: 1.4 }
.cc-captions li:first-child b { font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; line-height: 1.3 }
.cc-captions span { color: var(--quiet); font-size: .85rem; font-variant-numeric: tabular-nums;
  margin-right: 1rem; display: inline-block }
.cc-map { display: grid; grid-template-columns: minmax(0, 300px) minmax(0, 1fr); gap: 1.1rem; align-items: start }
.cc-map input { position: absolute; opacity: 0; pointer-events: none }
.cc-picture { position: relative; border-radius: 12px; overflow: hidden; aspect-ratio: 1; margin: 0 !important }
.cc-picture img { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0 !important; max-width: none }
.cc-light { opacity: 0; transition: opacity .15s }
.cc-told { position: absolute; visibility: hidden } .cc-tell { position: relative; min-height: 3.2em }
.cc-words { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 .9rem }
.cc-words label { cursor: pointer; padding: .25rem .6rem; border-radius: 9px; font-size: 1rem; line-height: 1.4;
  border: 1px solid var(--line); color: var(--body-text-color) }
.cc-words label:hover { border-color: var(--body-text-color) }
.cc-words input:checked + label { outline: 2px solid var(--body-text-color); outline-offset: 1px }
.cc-words input:focus-visible + label { outline: 3px solid var(--accent); outline-offset: 2px }
.cc-prefix { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: .5rem;
  list-style: none; margin: 0 !important; padding: 0 !important }
.cc-prefix li { border: 1px solid var(--thin); border-radius: 10px; padding: .45rem .6rem; margin: 0;
  overflow-wrap: anywhere; line-height: 1.35 }
.cc-prefix small { display: block; color: var(--quiet); font-size: .78rem }
@media (max-width: 640px) { .cc-map { grid-template-columns: 1fr } .cc-picture { width: 100% } }
"""
HEAD = """<div class="cc"><h1>Caption an image</h1><p class="soft">CLIP looks at it, a small network turns what CLIP
sees into a prefix, and a language model goes on from there.</p></div>"""
EMPTY = '<div class="cc cc-empty">Captions appear here.</div>'
EXPLAINING = '<div class="cc"><h2>Where each word comes from</h2><p>Hiding its regions …</p></div>'


def captions_html(captions):
    """Return captions with their scores, the first of them large.

    Args:
        captions: list of {"caption", "logprob", "clip_score"}, best first; those chosen among candidates have "score".
    """
    rows = [
        f"<li><b>{escape(c['caption']) or '(no words)'}</b>"
        + (f"<span>score {c['score']:.2f}</span>" if "score" in c else "")
        + f"<span>log-probability per token {_signed(c['logprob'])}</span>"
        + ("" if c["clip_score"] is None else f"<span>CLIP score {c['clip_score']:.2f}</span>")
        + "</li>"
        for c in captions
    ]
    scored, compared = (any(c.get(name) is not None for c in captions) for name in ("score", "clip_score"))
    scales = " ".join((*[SCORE] * scored, LOGPROB, *[CLIP_SCORE] * compared))
    return f'<div class="cc"><ol class="cc-captions">{"".join(rows)}</ol><p class="soft">{scales}</p></div>'


def words_html(picture, words, heat, unseen):
    """Return the words of a caption as buttons; choosing one lights up the regions of the picture it rests on.

    Everything is in the page, so choosing a word makes no request.

    Args:
        picture: square PIL image.
        words: W words.
        heat: [W, G, G] share of a word's probability that is lost where a cell is hidden.
        unseen: [W] the share that is lost where the whole picture is hidden.
    """
    strengths = heat.max((1, 2))
    chips, layers, told, rules = [], [], [], []
    for i, (word, strength) in enumerate(zip(words, strengths, strict=True)):
        checked = "checked" if i == strengths.argmax() else ""
        tint = f"background: rgba(255, 110, 0, {0.5 * strength:.2f})"
        chips.append(
            f'<input type="radio" name="cc-word" id="cc-{i}" aria-describedby="cc-told-{i}" {checked}>'
            f'<label for="cc-{i}" style="{tint}">{escape(word)}</label>'
        )
        layers.append(f'<img class="cc-light cc-{i}" alt="" src="{_light_uri(heat[i])}">')
        told.append(f'<span class="cc-told cc-{i}" id="cc-told-{i}">{_tell(word, strength, unseen[i])}</span>')
        rules.append(f".cc-map:has(#cc-{i}:checked) .cc-{i} {{ opacity: 1; visibility: visible }}")
    return f"""<div class="cc"><style>{"".join(rules)}</style><h2 id="cc-why">Where each word comes from</h2>
<p class="soft">Choose a word. Regions it rests on stay bright: hidden, they make it less likely.</p>
<div class="cc-map"><figure class="cc-picture"><img alt="the part that CLIP sees" src="{_jpeg_uri(picture)}">
{"".join(layers)}</figure><div><div class="cc-words" role="radiogroup" aria-labelledby="cc-why">{"".join(chips)}</div>
<p class="soft cc-tell">{"".join(told)}</p></div></div></div>"""


def note_html(text):
    """Return a remark that stands in for an explanation."""
    return f'<div class="cc"><p class="soft">{escape(text)}</p></div>'


def prefix_html(prefix):
    """Return the words nearest to every prefix position.

    Args:
        prefix: per position a list of (word, cosine), nearest first.
    """
    cards = [
        f"<li>{escape(group[0][0])} <small>{escape(', '.join(word for word, _ in group[1:]))}</small>"
        f"<small>cosine {group[0][1]:.2f}</small></li>"
        for group in prefix
        if group
    ]
    return f"""<div class="cc"><h2>The prefix as words</h2><p class="soft">What the language model is told about the
image, each of the {len(prefix)} vectors as the words of its vocabulary that are
nearest. {COSINE}</p>
<ol class="cc-prefix">{"".join(cards)}</ol></div>"""


def _tell(word, strength, unseen):
    """Say how much a word rests on the image: what its probability loses without a region, without the picture."""
    word = f"“{escape(word)}”"
    if strength >= DECIDING:
        return f"With the brightest region hidden, {word} loses {_percent(strength)} of its probability."
    if unseen >= DECIDING:
        return f"No single region decides {word}; with the whole picture hidden it loses {_percent(unseen)}."
    return f"The language model says {word} even without the picture: it keeps {_percent(1 - unseen)} then."


def _percent(share):
    return f"{100 * share:.0f}\u00a0%"


def _signed(value):
    """Return a number with a typographic minus."""
    return f"{value:.3f}".replace("-", "−")  # noqa: RUF001


def _light_uri(heat):
    """Return shares [G, G] as a G x G image of darkness (1 is clear), which the browser enlarges smoothly."""
    pixels = np.zeros((*heat.shape, 4), np.uint8)
    pixels[..., 3] = np.round(255 * DARK * (1 - heat))
    return _uri(Image.fromarray(pixels, "RGBA"), "PNG")


def _jpeg_uri(picture):
    return _uri(picture, "JPEG", quality=88)


def _uri(image, kind, **options):
    """Return a PIL image as a data address."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
