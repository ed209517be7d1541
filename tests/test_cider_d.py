"""CIDEr-D equals pycocoevalcap's on the same documents."""

import gzip
import json

import numpy as np
import pytest
from conftest import SHARED, captions_of
from pycocoevalcap.cider.cider import Cider

from metrics import ptb
from metrics.cider_d import END, CiderD


def library_scores(captions, references):
    """Return pycocoevalcap's score of a caption of every image."""
    numbers = range(len(references))
    return Cider().compute_score({i: references[i] for i in numbers}, {i: [captions[i]] for i in numbers})[1]


# repeated words and n-grams on either side, unknown words, one word, none, much longer than any reference
ODD = [
    ("a dog and a dog and a dog", ["a dog and a dog", "a a a a", "dog"]),
    ("a a a a a a", ["a a", "a b a b a b a b"]),
    ("zebra unknown words only", ["a dog"]),
    ("zebra zebra dog zebra zebra", ["zebra zebra", "the dog"]),
    ("dog", ["dog", "a dog on a dog"]),
    ("", ["a dog", "the cat sat"]),
    (" ".join(["the cat sat on the mat"] * 12), ["the cat sat on the mat"]),
    ("the cat sat on the mat", ["the cat sat on the mat", "the cat sat on the mat"]),
    ("the cat", ["", "the cat"]),
]


@pytest.mark.parametrize("end_word", (False, True))
def test_equal_to_the_library(end_word):
    captions, references = map(list, zip(*ODD, strict=True))
    words = [caption.rstrip(".") for caption in captions_of(300)]
    captions += words[::3]
    references += [[a, b] for a, b in zip(words[1::3], words[2::3], strict=True)]
    ours = CiderD(references, end_word).scores(captions, range(len(captions)))
    if end_word:
        captions = [f"{caption} {END}" for caption in captions]
        references = [[f"{text} {END}" for text in texts] for texts in references]
    np.testing.assert_allclose(ours, library_scores(captions, references), rtol=0, atol=1e-9)
    assert ours.max() > 5


def test_any_number_of_captions_of_any_images():
    _, references = map(list, zip(*ODD, strict=True))
    scorer = CiderD(references)
    captions, images = ["the cat sat", "a dog", "the cat sat", "zebra"], [7, 0, 5, 7]
    alone = [scorer.scores([caption], [image])[0] for caption, image in zip(captions, images, strict=True)]
    np.testing.assert_array_equal(scorer.scores(captions, images), alone)
    assert scorer.scores([], []).shape == (0,)
    with pytest.raises(ValueError, match="numbers of images, 0 to 8"):
        scorer.scores(["a dog"], [9])


def test_the_end_word_makes_a_cut_caption_worse():
    references = [["a dog with a ball"], ["a cat with a hat"], ["a bird with a ball"], ["two fish"]]
    lost = []
    for end_word in (False, True):
        cut, whole = CiderD(references, end_word).scores(["a dog with a", "a dog with a ball"], [0, 0])
        assert whole == pytest.approx(10)
        lost.append(whole - cut)
    assert lost[1] > lost[0] > 0


@pytest.mark.parametrize("references, said", (([["a dog"]], "1 image is too few"), ([["a"], []], "number 1 the first")))
def test_references_that_cannot_be(references, said):
    with pytest.raises(ValueError, match=said):
        CiderD(references)


@pytest.mark.slow
def test_equal_to_the_library_on_coco():
    file = SHARED / "coco" / "captions_val2014.json.gz"
    if not file.is_file():
        pytest.skip(f"the captions of COCO are not at {file}")
    by_image = {}
    for record in json.loads(gzip.decompress(file.read_bytes()))["annotations"]:
        by_image.setdefault(record["image_id"], []).append(record["caption"])
    texts = [ptb.tokenize(texts) for texts in list(by_image.values())[:10_000]]
    captions, references = [t[0] for t in texts], [t[1:] for t in texts]
    ours = CiderD(references).scores(captions, range(len(captions)))
    np.testing.assert_allclose(ours, library_scores(captions, references), rtol=0, atol=1e-9)
