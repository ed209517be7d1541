"""docs/browser/: pixels, searches and tokens as the runtime's, and captions in a headless browser as predict.py's."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT, run_script
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.append(str(ROOT / "runtime"))
pytest.importorskip("onnxruntime")

from clipcap_runtime import images, searches  # noqa: E402

from models.captioner import Captioner  # noqa: E402
from models.settings import BEAM  # noqa: E402
from utils.files import write_json  # noqa: E402

PAGE = ROOT / "docs" / "browser"
SCENES = sorted((ROOT / "demo" / "images").glob("*.jpg"))


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A function of a module's text and what it reads as `given`, to what it gives to `tell`; by Node.js, or a skip."""
    program = shutil.which("node")
    if not program:
        pytest.skip("there is no Node.js to run the page's modules with")
    folder = tmp_path_factory.mktemp("modules")
    for file in PAGE.glob("*.js"):
        shutil.copy(file, folder)
    write_json(folder / "package.json", {"type": "module"})

    def run(code, given):
        write_json(folder / "given.json", given)
        head = 'import { readFileSync } from "node:fs"; const given = JSON.parse(readFileSync("given.json"));'
        (folder / "main.js").write_text(f"{head}\nconst tell = (x) => console.log(JSON.stringify(x));\n{code}")
        done = subprocess.run([program, "main.js"], cwd=folder, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("interpolation", ("bicubic", "bilinear", "lanczos", "box", "hamming"))
def test_pixels_are_equal(node, interpolation):
    """Larger, smaller, cut, framed, stretched: every number is the runtime's."""
    rng, plans = np.random.default_rng(0), []
    for width, height, size, crop in (
        (61, 47, 32, [32, 32]), (20, 33, 32, [32, 32]), (32, 50, 32, [32, 32]), (50, 41, [30, 44], None),
        (40, 40, None, [55, 30]), (203, 19, 12, [24, 31]), (45, 32, 32, [31, 30]),
    ):  # fmt: skip
        said = {"size": size, "interpolation": interpolation, "crop": crop, "mean": [0.48, 0.45, 0.4], "std": [0.3] * 3}
        plans.append((said, rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
    code = """
        import { Preprocess } from "./images.js";
        tell(given.map(({ said, data, width, height }) => {
          const picture = { data: Uint8ClampedArray.from(data), width, height };
          const { data: pixels, dims } = new Preprocess(said).apply(picture);
          return [dims, [...pixels]];
        }));"""
    found = node(code, [
        {"said": said, "width": array.shape[1], "height": array.shape[0],
         "data": np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]).ravel().tolist()}
        for said, array in plans
    ])  # fmt: skip
    for (said, array), (dims, pixels) in zip(plans, found, strict=True):
        expected = images.Preprocess(**said)(Image.fromarray(array))
        assert dims == [1, *expected.shape], said
        assert np.array_equal(np.float32(pixels).reshape(expected.shape), expected), said


def logits_of(tokens, vocabulary):
    """Return the logits of a made language model, which JavaScript computes too."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 65521
    return [((state + 17) * (word + 3) * 7919 % 65521) / 9000 for word in range(vocabulary)]


@pytest.mark.parametrize("length", (1, 12))
def test_searches_are_equal(node, length):
    ends, vocabulary = [0, 3], 30
    code = """
        import { beam, greedy } from "./searches.js";
        const { ends, length, vocabulary } = given;
        const logits = (tokens) => {
          const state = tokens.reduce((state, token) => (state * 31 + token + 1) % 65521, 7);
          const word = (_, word) => (((state + 17) * (word + 3) * 7919) % 65521) / 9000;
          return Float32Array.from({ length: vocabulary }, word);
        };
        const begin = () => {
          let rows = [[]];
          return async (tokens, sources) => {
            rows = sources.map((source, row) => [...rows[source], tokens[row]]);
            return rows.map(logits);
          };
        };
        const ended = (tokens) => ends.includes(tokens.at(-1));
        tell([
          await greedy(begin(), logits([]), ended, length),
          await beam(begin(), logits([]), ended, length, 4, 1, 3),
          await beam(begin(), logits([]), ended, length, 4, 0.5, 4),
        ]);"""
    found = node(code, {"ends": ends, "length": length, "vocabulary": vocabulary})

    def begin():
        rows = [()]

        def step(tokens, sources):
            rows[:] = [(*rows[source], int(token)) for token, source in zip(tokens, sources, strict=True)]
            return np.array([logits_of(row, vocabulary) for row in rows], np.float32)

        return step

    first = np.array([logits_of((), vocabulary)], np.float32)
    ended = lambda tokens: tokens[-1] in ends  # noqa: E731
    expected = [
        searches.greedy(begin(), first, ended, length)[0],
        searches.beam(begin(), first, ended, length, 4, 1.0, 3)[0],
        searches.beam(begin(), first, ended, length, 4, 0.5, 4)[0],
    ]
    for group, others in zip(found, expected, strict=True):
        assert [caption["tokens"] for caption in group] == [caption.tokens for caption in others]
        assert np.allclose([one["logprob"] for one in group], [one.logprob for one in others], atol=1e-4)


@pytest.mark.parametrize("spaced", (False, True))
def test_tokens_are_equal(node, spaced):
    """Texts of every kind become the same tokens, and tokens, cut anywhere, the same text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(spaced), decoders.ByteLevel()
    texts = ["a photo of", "It's a café, isn't it?  Two  spaces\n and 12345 birds!", "日本語 🐦‍⬛ and naïve “quotes”",
             " begins with a space", "", "</s>", "one</s> two", "tab\tand trailing  "]  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.add_tokens(["é+"])
    code = """
        import { Stop, Tokenizer } from "./tokenizer.js";
        const tokenizer = new Tokenizer(given.tokenizer);
        const stop = new Stop(tokenizer, "s", [5]), end = new Stop(tokenizer, "</s>", []);
        tell({
          ids: given.texts.map((text) => tokenizer.encode(text)),
          texts: given.ids.map((ids) => tokenizer.decode(ids)),
          until: given.ids.map((ids) => [stop.ended(ids), stop.textUntil(ids), end.ended(ids), end.textUntil(ids)]),
        });"""
    rng, size = np.random.default_rng(0), tokenizer.get_vocab_size()
    ids = [rng.integers(0, size, length).tolist() for length in range(1, 30)] + [[5], [0, size - 1], [0]]
    found = node(code, {"tokenizer": json.loads(tokenizer.to_str()), "texts": texts, "ids": ids})
    assert found["ids"] == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert found["texts"] == [tokenizer.decode(row) for row in ids]
    stop, end = (searches.Stop(tokenizer, text, ends) for text, ends in (("s", [5]), ("</s>", [])))
    expected = [[stop(row), stop.text_until(row), end(row), end.text_until(row)] for row in ids]
    for row, ours, theirs in zip(ids, found["until"], expected, strict=True):
        if "s" in stop.decode(row[:-1]):  # a search would have ended before, and the runtime asks of new tokens alone
            ours[0] = theirs[0]
        assert ours == theirs


def test_text_is_readable_in_both_schemes():
    """Every pair of colours that text has: a contrast of at least 4.5."""
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", block))
                   for block in (PAGE / "style.css").read_text().split("@media")[:2])  # fmt: skip
    pairs = [(front, back) for front in ("text", "quiet", "error", "accent") for back in ("page", "card")]
    for scheme in (light, dark):
        for front, back in (*pairs, ("on-accent", "accent")):
            bright, dim = sorted((luminance(scheme[front]), luminance(scheme[back])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (front, back)


def luminance(colour):
    """Return the relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# ---- in the browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(folder, address) of the page, built and served by its command in a checkout of its own, or a skip."""
    for program in ("npm", "chromium"):
        if not shutil.which(program):
            pytest.skip(f"there is no {program}")
    root = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name != "docs":
            (root / path.name).symlink_to(path)
    folder = root / "docs" / "browser"
    shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("captioner", "vendor"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, folder / "serve.py", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or not lines[-1].startswith("serving"):
            lines.append(process.stderr.readline())
            if "npm cannot fetch" in lines[-1]:
                pytest.skip(lines[-1])
            assert lines[-1], "".join(lines)
        yield folder, f"http://127.0.0.1:{port}/"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0  # Ctrl-C is how it ends


@pytest.fixture
def page(site, browser):
    """The page with its captioner loaded; nothing it does may ask another host or complain."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    asked, troubles = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(site[1])
    page.wait_for_selector("text=Ready")
    yield page
    assert all(address.startswith((site[1], f"blob:{site[1]}")) for address in asked) and not troubles
    page.close()


@pytest.fixture(scope="module")
def captioner():
    return Captioner("demo", device="cpu")


def write_pictures(folder):
    """Write a scene as pictures of many kinds and sizes; returns their paths."""
    scene = Image.open(SCENES[0])
    for mode in ("L", "P", "RGBA", "LA"):
        scene.convert(mode).save(folder / f"{mode}.png")
    scene.convert("CMYK").save(folder / "cmyk.jpg")
    scene.resize((2300, 1700)).save(folder / "large.jpg")
    scene.resize((70, 50)).save(folder / "small.webp", lossless=True)
    faded = scene.convert("RGBA")
    faded.putalpha(Image.radial_gradient("L").resize(scene.size))
    faded.save(folder / "faded.png")
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        scene.save(folder / f"turned{orientation}.jpg", exif=exif)
    return sorted(folder.iterdir())


def shown(page, path):
    """Give the page a picture; returns its captions."""
    page.evaluate("document.querySelector('#captions').replaceChildren()")
    page.set_input_files("#file", path)
    page.wait_for_selector("#captions li")
    return [line.split("\n")[0] for line in page.locator("#captions li").all_inner_texts()]


@pytest.mark.slow
def test_captions_are_as_predict(page, captioner, tmp_path):
    """Word for word, of the demo's pictures and of every kind of file, by both searches."""
    paths = [*SCENES, *write_pictures(tmp_path)]
    for word, decoding in (("greedy", captioner.decoding), ("beam", replace(captioner.decoding, method=BEAM))):
        page.get_by_label(word).check()
        [(expected, errors)] = captioner.caption_files(paths, decoding, batch_size=len(paths))
        assert not errors
        for path in paths:
            assert shown(page, path) == [" ".join(expected[path][0].text.split())], (word, path.name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("int8", "int4"))
def test_fewer_bits(site, browser, captioner, dtype):
    """WebAssembly has the operators. It rounds otherwise than other processors: one caption or two may differ."""
    run_script("export.py", "--checkpoint", "demo", "--dtype", dtype, "--out", site[0] / dtype)
    page = browser.new_page()
    page.goto(f"{site[1]}?captioner={dtype}")
    page.wait_for_selector("text=Ready")
    assert f", {dtype}" in page.inner_text("#captioner")
    expected = next(captioner.caption_files(SCENES, captioner.decoding))[0]
    alike = [shown(page, path) == [expected[path][0].text] for path in SCENES]
    page.close()
    assert sum(alike) >= len(SCENES) // 2


@pytest.mark.slow
def test_ways_to_give_a_picture(page, captioner):
    """The keyboard, a sample, a drop and a paste; the newest picture's caption is the one that stays."""
    said = {
        path: caption[0].text for path, caption in next(captioner.caption_files(SCENES, captioner.decoding))[0].items()
    }
    # Switched on here, and not by what waits for it: Chromium takes a moment, and Enter would come before it.
    page.on("filechooser", lambda chooser: None)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    assert page.evaluate("getComputedStyle(document.querySelector('label.button')).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(SCENES[7])
    page.wait_for_selector(f"#captions li:has-text({json.dumps(said[SCENES[7]])})")
    page.locator("#samples button").nth(1).click()
    page.wait_for_selector(f"#captions li:has-text({json.dumps(said[SCENES[1]])})")
    give = """([name, kind, bytes]) => {
        const given = new DataTransfer();
        given.items.add(new File([Uint8Array.from(bytes)], name));
        const event = kind === "paste" ? new ClipboardEvent(kind, { clipboardData: given, bubbles: true })
                                       : new DragEvent(kind, { dataTransfer: given, bubbles: true, cancelable: true });
        document.querySelector("#drop").dispatchEvent(event);
    }"""
    for number, kind in ((2, "drop"), (3, "paste")):
        page.evaluate(give, [SCENES[number].name, kind, list(SCENES[number].read_bytes())])
        page.wait_for_selector(f"#captions li:has-text({json.dumps(said[SCENES[number]])})")
    page.evaluate("""() => {
        window.seen = [];
        const watch = new MutationObserver(() => window.seen.push(document.querySelector("#captions").innerText));
        watch.observe(document.querySelector("#captions"), { childList: true });
    }""")
    pictures = [[SCENES[number].name, "drop", list(SCENES[number].read_bytes())] for number in (4, 5, 6)]
    page.evaluate(f"pictures => pictures.forEach({give})", pictures)
    page.wait_for_selector(f"#captions li:has-text({json.dumps(said[SCENES[6]])})")
    page.wait_for_timeout(1000)
    assert {text.split("\n")[0] for text in page.evaluate("window.seen")} == {"", said[SCENES[6]]}


@pytest.mark.slow
def test_a_phone_is_scrolled_to_the_caption(page):
    """Whether the picture was chosen above it or below it; and its number says which way is better."""
    page.set_viewport_size({"width": 390, "height": 640})
    seen = """() => { const place = document.querySelector("#captions li")?.getBoundingClientRect();
        return place && place.top >= 0 && place.bottom <= innerHeight }"""
    page.set_input_files("#file", SCENES[0])
    page.wait_for_function(seen, timeout=5000)
    page.locator("#samples button").last.click()
    page.wait_for_function(seen, timeout=5000)
    assert "nearer to 0" in page.inner_text("#captions small")


@pytest.mark.slow
@pytest.mark.parametrize("width", (390, 1600))
def test_what_is_no_picture_is_told_in_a_line(page, width, tmp_path):
    page.set_viewport_size({"width": width, "height": 900})
    (tmp_path / "notes.jpg").write_text("no picture")
    Image.new("RGB", (1010, 10)).save(tmp_path / "long.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, said in (
        ("notes.jpg", "notes.jpg is no picture"),
        ("long.png", "100 times"),
        ("cut.png", "cut.png is no"),
    ):
        page.set_input_files("#file", tmp_path / name)
        page.wait_for_selector(f"#error:has-text('{said}')")
        assert page.locator("#captions li").count() == 0
    assert shown(page, SCENES[0]) and page.locator("#error").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def damage(folder, name):
    """Make an exported captioner a bad one of the kind that is named."""
    config = json.loads((folder / "captioner.json").read_text())
    if name == "version":
        config["format"] = 99
    elif name == "sampling":
        config["decoding"]["method"] = "sample"
    elif name == "nearest":
        config["preprocessing"]["interpolation"] = "nearest"
    elif name == "graph":
        (folder / "step.onnx").unlink()
    elif name == "cut":
        file = folder / "weights.bin"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif name == "words":
        write_json(folder / "tokenizer.json", {"model": {"type": "WordPiece"}})
    write_json(folder / "captioner.json", config)
    if name == "damaged":
        (folder / "captioner.json").write_text('{"format": 1')


@pytest.mark.slow
@pytest.mark.parametrize("name, told", {
    "version": "has format 99 and this page reads 2", "sampling": "decoding by sample", "nearest": "by nearest",
    "graph": "step.onnx is missing; export", "cut": "cannot be loaded", "words": "byte-level BPE tokenizers only",
    "damaged": "captioner.json is damaged; export", "absent": "captioner.json is missing",
}.items())  # fmt: skip
def test_captioner_that_cannot_be_loaded(site, browser, name, told):
    """One line says why."""
    folder, address = site
    if name != "absent":
        shutil.copytree(folder / "captioner", folder / name)
        damage(folder / name, name)
    page = browser.new_page()
    page.goto(f"{address}?captioner={name}")
    page.wait_for_selector(f"#error:has-text('{told}')")
    assert "\n" not in page.inner_text("#error") and page.locator("#progress").is_hidden()
    page.close()


@pytest.mark.slow
def test_no_other_server_is_asked(site, browser):
    """Neither by the page nor by its worker, although that one would allow it."""
    asked = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"{site[1]}?captioner=http://127.0.0.1:{other.server_port}/captioner")
        page.wait_for_selector("#error:has-text('this page may not ask it')")
        page.close()
        other.shutdown()
    assert not asked
