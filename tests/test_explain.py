"""Explanations: words and their tokens, scores, heat where the word's object is, prefix read back."""

import pytest
import torch
from conftest import ROOT

from features.images import read_image
from models.captioner import Captioner
from models.decoding import DecodingConfig
from models.explain import masked_images, nearest_words, split_words, token_logprobs, word_heat


@pytest.fixture(scope="module")
def captioner():
    return Captioner("demo", device="cpu")


@pytest.fixture(scope="module")
def pixels(captioner):
    """A red circle above and left of the middle, a purple heart below and right of it."""
    return captioner.encoder.preprocess(read_image(ROOT / "demo" / "images" / "200002.jpg"))


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
    words, heat = word_heat(
        captioner.model, captioner.tokenizer, captioner.encoder.encode_images, pixels, captioner.tokenizer.encode(text),
        batch_size=30,
    )  # fmt: skip
    assert " ".join(words).replace(" ,", ",").replace(" .", ".") == text
    for word, above, left in (("heart", False, False), ("circle", True, True)):
        row, column = divmod(int(heat[words.index(word)].argmax()), heat.shape[-1])
        assert 0.5 < heat[words.index(word)].max() <= 1
        assert ((row < 4), (column < 4)) == (above, left)
    assert heat.min() >= 0 and heat[words.index("the")].max() < 0.1


def test_prefix_that_is_a_word_is_read_as_it(captioner, monkeypatch):
    tokens = captioner.tokenizer.encode(" purple star .<|endoftext|>")
    embeddings = captioner.model.gpt.get_input_embeddings().weight[tokens]
    monkeypatch.setattr(captioner.model, "prefix", lambda clip_embedding: 3 * embeddings[None])
    read = nearest_words(captioner.model, captioner.tokenizer, torch.zeros(1, 256), count=2)
    assert [group[0] for group in read[:2]] == [("purple", pytest.approx(1)), ("star", pytest.approx(1))]
    assert "." not in [word for word, _ in read[2]] and len(read[2]) == 2
    assert not any("<" in word for word, _ in read[3])
    assert all(group[0][1] >= group[1][1] for group in read)
