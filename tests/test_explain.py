"""Explanations: words and their tokens, scores, heat where the word's object is, prefix read back."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_stopping import sentencepiece
from transformers import AutoConfig, AutoModelForCausalLM

from demo.world.draw import draw_scene
from demo.world.splits import split_scenes
from encoders.base import ImageEncoder
from models.captioner import Captioner
from models.clip_caption import build_captioner
from models.decoding import Caption, generate_captions
from models.explain import masked_images, nearest_words, split_words, token_logprobs, word_heat
from models.settings import BEAM, SAMPLE, CaptionConfig, DecodingConfig
from models.stopping import begin_tokens, continuing_tokens, opening_tokens, spoken
from pages import service as pages_service
from pages.fragments import words_html


@pytest.fixture(scope="module")
def captioner():
    return Captioner("demo", device="cpu")


@pytest.fixture(scope="module")
def pixels(captioner):
    """A red circle above and left of the middle, a purple heart below and right of it: second of the test split."""
    _, scene, seed = split_scenes("test", 2)[1]
    return captioner.encoder.preprocess(draw_scene(scene, (*seed, 1)))


@pytest.fixture(scope="module")
def caption(captioner, pixels):
    embedding = captioner.encoder.encode_images(pixels[None])
    return captioner.caption_embeddings(embedding, DecodingConfig())[0][0]


def test_words_hold_all_their_tokens(captioner):
    text = "It's a bluish-grey triangle, isn't it? 🙂."
    tokens = captioner.tokenizer.encode(text)
    words = split_words(captioner.tokenizer, tokens)
    assert [word for word, _ in words] == ["It's", "a", "bluish-grey", "triangle", ",", "isn't", "it", "?", "🙂."]
    assert sorted({i for _, positions in words for i in positions}) == list(range(len(tokens)))
    assert all("".join(captioner.tokenizer.decode(tokens[p[0] : p[-1] + 1])).strip() == word for word, p in words)


def test_scores_are_those_of_decoding(captioner, pixels, caption):
    embedding = captioner.encoder.encode_images(pixels[None].repeat(2, 1, 1, 1))
    scores = token_logprobs(captioner.model, caption.tokens, embedding)
    assert scores.shape == (2, len(caption.tokens))
    assert scores.sum(1).tolist() == pytest.approx([caption.logprob] * 2, abs=1e-3)


@pytest.fixture(scope="module")
def llama():
    """A captioner whose tokenizer begins every text with <s>, and its tokenizer."""
    tokenizer = sentencepiece(["▁a", "▁photo", "▁of", "▁red", "▁star", ".", "▁.", "star", "▁"])
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=40, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    gpt = AutoModelForCausalLM.from_config(config)
    return build_captioner(CaptionConfig(prefix_dim=8, prefix_length=4), gpt).eval(), tokenizer


@pytest.mark.parametrize("prompt", ["", "a photo of"])
@pytest.mark.parametrize(
    "decoding",
    [
        DecodingConfig(),
        DecodingConfig(method=BEAM, num_captions=3),
        DecodingConfig(method=SAMPLE, num_captions=3, top_p=1.0),
        DecodingConfig(method=BEAM, num_captions=3, decoder="transformers", length_penalty=2.0),
    ],
)
def test_scores_are_those_of_decoding_after_begin_token_and_prompt(llama, prompt, decoding):
    model, tokenizer = llama
    embeddings = torch.randn(2, 8)
    decoding = replace(decoding, prompt=prompt)
    before = opening_tokens(tokenizer, prompt)
    assert before[0] == begin_tokens(tokenizer)[0] == 1 and len(before) == (4 if prompt else 1)
    for embedding, group in zip(embeddings, generate_captions(model, tokenizer, embeddings, decoding), strict=True):
        for caption in group:
            [logprobs] = token_logprobs(model, caption.tokens, embedding[None], before)
            assert logprobs.sum().item() == pytest.approx(caption.logprob, abs=1e-3)


class Stub(ImageEncoder):
    """An encoder to which all images are alike."""

    has_texts = True
    shape = (8,)
    model = torch.nn.Linear(1, 1)  # whose type of number pixels get

    def preprocess(self, image):
        return torch.zeros(3, 8, 8)

    def _embed(self, pixels):
        return torch.ones(len(pixels), 8) + pixels.mean((1, 2, 3))[:, None]

    def encode_texts(self, texts):
        return torch.ones(len(texts), 8)


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_captions_are_explained_as_they_were_decoded(llama, prompt, monkeypatch):
    """The page reads the same tokens as the search has, after the same; a visitor's own text follows the prompt."""
    model, tokenizer = llama
    found, asked = [], []

    def caption_embeddings(embeddings, decoding, keys):
        found[:] = generate_captions(model, tokenizer, embeddings, decoding, keys=keys)
        return found

    def word_heat(*args, before):
        asked.append((args[4], before))
        return ["a"], 0, 0

    own = DecodingConfig(prompt=prompt, length_penalty=3.0, entry_length=9)
    stub = SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        encoder=Stub("stub", "cpu", None, None),
        decoding=own,
        explains=True,
        caption_embeddings=caption_embeddings,
    )
    service = pages_service.Service({"demo": "demo"}, "cpu")
    service.predictor = SimpleNamespace(captioner=lambda model: stub, is_loaded=lambda model: True)
    monkeypatch.setattr(pages_service, "word_heat", word_heat)
    image = str(ROOT / "demo" / "images" / "200001.jpg")
    for method in ("beam", "sample"):
        answer = service.caption(image, "demo", service.decoding(method, 3, 1.0, 1.0, 0))
        means = sorted((caption.logprob / len(caption.tokens) for caption in found[0]), reverse=True)
        assert [caption["logprob"] for caption in answer] == pytest.approx(means, abs=1e-4)
        for caption in found[0]:
            if caption.text:
                service.explain(image, "demo", caption.text)
                tokens, before = asked.pop()
                alike = [other.tokens for other in found[0] if other.text == caption.text]
                assert tokens in [spoken(tokenizer, other) for other in alike]
                assert before == opening_tokens(tokenizer, prompt)
    service.explain(image, "demo", "a red star.")
    assert tokenizer.convert_ids_to_tokens(asked[-1][0]) == ["▁a", "▁red", "▁star", "."]
    assert asked[-1][1] == opening_tokens(tokenizer, prompt)


def test_own_text_goes_on_from_the_prompt(captioner):
    tokenizer = captioner.tokenizer
    assert continuing_tokens(tokenizer, "", "red star") == tokenizer.encode("red star")
    assert continuing_tokens(tokenizer, "On the", "grass.") == tokenizer.encode(" grass.")


def test_mean_logprob():
    assert Caption([5, 6], -3.0).mean_logprob == -1.5


def test_every_cell_is_hidden_equally_often():
    pixels = torch.rand(3, 32, 32)
    cells, images = masked_images(pixels, grid=4, window=2)
    assert images.shape == (25, 3, 32, 32)
    changed = (images != pixels).any(1).float()  # [25, 32, 32]
    assert changed.sum(0).unique().tolist() == [4]
    for (rows, columns), hidden in zip(cells, changed, strict=True):
        assert hidden[rows.start * 8 : rows.stop * 8, columns.start * 8 : columns.stop * 8].all()


def test_heat_lies_on_the_words_object(captioner, pixels):
    text = "On the grass there is a large purple heart to the right of a small red circle."
    words, heat, unseen = word_heat(
        captioner.model, captioner.tokenizer, captioner.encoder.encode_images, pixels, captioner.tokenizer.encode(text),
        batch_size=30,
    )  # fmt: skip
    assert " ".join(words).replace(" ,", ",").replace(" .", ".") == text
    for word, above, left in (("heart", False, False), ("circle", True, True)):
        row, column = divmod(int(heat[words.index(word)].argmax()), heat.shape[-1])
        assert 0.5 < heat[words.index(word)].max() <= 1
        assert ((row < 4), (column < 4)) == (above, left)
    assert heat.min() >= 0 and heat[words.index("the")].max() < 0.1
    # "grass" rests on no region but on all of them; "of" follows from the words before it
    assert heat[words.index("grass")].max() < 0.05 < 0.9 < unseen[words.index("grass")]
    assert heat[words.index("of")].max() < 0.05 and unseen[words.index("of")] < 0.05


def test_what_is_lost_without_the_picture(captioner, monkeypatch):
    """A model that knows how bright the image is: one word needs any light, one all of it, one none."""
    tokens = captioner.tokenizer.encode(" big red star")
    needed = torch.tensor([0, 0.9, 0.01])  # of the brightness of the whole

    def logprobs(model, tokens, brightness, before):
        return torch.where(brightness[:, None] < needed, -2.0, -1.0)

    monkeypatch.setattr("models.explain.token_logprobs", logprobs)
    pixels = torch.zeros(3, 32, 32)
    pixels[:, :8, :8] = 1  # hidden behind their own mean, its dark windows stay dark
    encode = lambda images: images.amax((1, 2, 3))  # noqa: E731
    words, heat, unseen = word_heat(captioner.model, captioner.tokenizer, encode, pixels, tokens, 7, grid=4, window=1)
    assert words == ["big", "red", "star"]
    lost = pytest.approx(1 - 2.718281828**-1)
    assert unseen.tolist() == [0, lost, lost]
    assert heat.max((1, 2)).tolist() == [0, lost, 0] and heat[1, 0, 0] == lost


@pytest.mark.parametrize(
    ("region", "picture", "told"),
    [
        (0.4, 0.9, "With the brightest region hidden, “red” loses 40\u00a0% of its probability."),
        (0.01, 0.9, "No single region decides “red”; with the whole picture hidden it loses 90\u00a0%."),
        (0.01, 0.02, "The language model says “red” even without the picture: it keeps 98\u00a0% then."),
    ],
)
def test_what_is_told_of_a_word_was_tested(region, picture, told):
    heat = np.full((1, 8, 8), region)
    page = words_html(Image.new("RGB", (8, 8)), ["red"], heat, np.array([picture]))
    assert f'<span class="cc-told cc-0" id="cc-told-0">{told}</span>' in page


def test_prefix_that_is_a_word_is_read_as_it(captioner, monkeypatch):
    tokens = captioner.tokenizer.encode(" purple star .<|endoftext|>")
    embeddings = captioner.model.gpt.get_input_embeddings().weight[tokens]
    monkeypatch.setattr(captioner.model, "prefix", lambda clip_embedding: 3 * embeddings[None])
    read = nearest_words(captioner.model, captioner.tokenizer, torch.zeros(1, 256), count=2)
    assert [group[0] for group in read[:2]] == [("purple", pytest.approx(1)), ("star", pytest.approx(1))]
    assert "." not in [word for word, _ in read[2]] and len(read[2]) == 2
    assert not any("<" in word for word, _ in read[3])
    assert all(group[0][1] >= group[1][1] for group in read)
