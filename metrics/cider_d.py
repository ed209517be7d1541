"""CIDEr-D of many captions at once, with document frequencies that are counted once: a reward for training.

The values equal those of pycocoevalcap's `CiderScorer` on the same documents, which it counts again in every call.
Here n-grams are compared without dictionaries: two of order n are equal where their first n - 1 words and their last
words are, so the diagonals of a table of equal words hold all equal n-grams of two texts.

Axes: H captions, P pairs of two texts, T words of a text, U words of the other, M equal n-grams of all pairs.
Source: Vedantam et al., CIDEr (arXiv 1411.5726), section 7; pycocoevalcap/cider/cider_scorer.py.
"""

import itertools
import zipfile
from pathlib import Path

import numpy as np

from utils.files import atomic_path

ORDERS = 4
SIGMA = 6.0  # of the penalty on a difference in length, in words
SCALE = 10.0
END = "<end>"  # a word that no tokeniser makes
BLOCK = 1 << 20  # pairs of words compared at a time: the table stays in the CPU's cache


class CiderD:
    """Scores captions against references, for a set of images that is known beforehand."""

    def __init__(self, references, end_word=False, weigh=True):
        """Count the n-grams of all references.

        Args:
            references: per image, a list of texts whose words are separated by blanks, as metrics.ptb makes them.
            end_word: let END follow every caption and reference. Training needs it: without it a caption gains by
                stopping in "with a", which many references hold, and loses nothing (ruotianluo/cider).
            weigh: weigh n-grams by the images that have them; else all weigh 1, and no image affects another.
        Raises: ValueError for fewer than two images, where CIDEr is undefined, or an image without references.
        """
        if len(references) < 2:
            raise ValueError(f"CIDEr weighs n-grams by the images that have them; {len(references)} image is too few")
        lacking = [number for number, texts in enumerate(references) if not texts]
        if lacking:
            raise ValueError(f"{len(lacking)} images have no reference, number {lacking[0]} the first; leave them out")
        self.end_word, self.words, self.images = end_word, {}, len(references)
        self.counts = np.array([len(texts) for texts in references])
        self.first = np.cumsum(self.counts) - self.counts  # an image's first reference
        self.texts = self._numbers([text for texts in references for text in texts], self.words)
        self.base = len(self.words) + 1  # words that no reference has are numbered from here
        self._count_documents(np.repeat(np.arange(self.images), self.counts))
        if not weigh:
            self.weights = [np.ones_like(weights) for weights in self.weights]
        _, _, self.norms = self._weigh(self.texts)

    def write(self, path):
        """Write the counts to an `.npz`, atomically."""
        state = {"end_word": self.end_word, "words": np.frombuffer("\n".join(self.words).encode(), np.uint8)}
        state |= {"counts": self.counts, "norms": self.norms}
        state |= {"numbers": self.texts.words, "lengths": self.texts.lengths}
        state |= {f"keys{order}": keys for order, keys in enumerate(self.keys)}
        state |= {f"weights{order}": weights for order, weights in enumerate(self.weights)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **state)

    @classmethod
    def read(cls, path):
        """Return the scorer that `write` wrote, or None where the file is missing or damaged."""
        try:
            with np.load(path) as file:  # without pickle: the file cannot run code
                state = {name: file[name] for name in file.files}
            scorer = cls.__new__(cls)
            words = state["words"].tobytes().decode().split("\n")
            scorer.end_word, scorer.words = bool(state["end_word"]), {word: i for i, word in enumerate(words, 1)}
            scorer.counts, scorer.images = state["counts"], len(state["counts"])
            scorer.first = np.cumsum(scorer.counts) - scorer.counts
            scorer.texts, scorer.base = Texts(state["numbers"], state["lengths"]), len(words) + 1
            scorer.norms = state["norms"]
            scorer.keys = [state[f"keys{order}"] for order in range(ORDERS)]
            scorer.weights = [state[f"weights{order}"] for order in range(ORDERS)]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return scorer

    def scores(self, captions, images, ended=None):
        """Score captions.

        Args:
            captions: H texts, words separated by blanks.
            images: [H] number of each caption's image among the references.
            ended: H bools, which captions END follows; None: all.
        Returns: [H] float64, 0 to 10.
        Raises: ValueError for an image that is not among the references.
        """
        images = np.asarray(images, np.int64)
        if len(images) != len(captions) or (len(images) and not 0 <= images.min() <= images.max() < self.images):
            raise ValueError(f"{len(captions)} captions need as many numbers of images, 0 to {self.images - 1}")
        texts = self._numbers(captions, dict(self.words), ended)
        squares, repeats, norms = self._weigh(texts)
        counts = self.counts[images]
        pairs = np.repeat(np.arange(len(captions)), counts)  # [P] caption
        against = np.arange(len(pairs)) + np.repeat(self.first[images] - np.cumsum(counts) + counts, counts)  # [P]
        products = np.zeros((ORDERS, len(pairs)))
        for part in _blocks(np.maximum(texts.lengths[pairs], self.texts.lengths[against])):
            matches = _matches(texts, pairs[part], self.texts, against[part])
            for order, (offset, pair) in enumerate(matches):
                place = texts.starts[pairs[part[pair]]] + offset
                shares = _clip(squares[order][place], repeats[order][place], offset, pair)  # [M]
                products[order, part] = np.bincount(pair, shares, len(part))
        norms = norms[:, pairs] * self.norms[:, against]
        similarity = np.divide(products, norms, out=products, where=norms > 0).mean(0)  # [P]
        # pycocoevalcap takes the number of bigrams for a text's length
        apart = np.maximum(texts.lengths[pairs] - 1, 0) - np.maximum(self.texts.lengths[against] - 1, 0)
        similarity *= np.exp(-(apart**2) / (2 * SIGMA**2))
        return SCALE * np.bincount(pairs, similarity, len(captions)) / counts

    def _numbers(self, texts, words, ended=None):
        """Return texts as word numbers; adds unknown words to `words`, {word: number from 1 on}."""
        split = [text.split() for text in texts]
        if self.end_word:
            ended = itertools.repeat(True) if ended is None else ended
            split = [[*text, END] if end else text for text, end in zip(split, ended)]  # noqa: B905  repeats for ever
        flat = list(itertools.chain.from_iterable(split))
        numbers = np.fromiter(map(words.get, flat, itertools.repeat(0)), np.int64, len(flat))
        for place in np.flatnonzero(numbers == 0).tolist():
            numbers[place] = words.setdefault(flat[place], len(words) + 1)
        return Texts(numbers, np.fromiter(map(len, split), np.int64, len(split)))

    def _count_documents(self, images):
        """Weigh n-grams by how many images have them; `images`: the image of each reference.

        `keys[n]` holds the n-grams of order n + 1, sorted, as numbers: the first n words' number times `base`, plus
        the last word's. `weights[n]` is ln(images / images with the n-gram); its last entry is for unknown n-grams.
        """
        self.keys, self.weights = [], []
        image = np.repeat(images, self.texts.lengths)
        numbers, places = self.texts.words, np.arange(len(self.texts.words))
        for order in range(ORDERS):
            if order:
                places = places[self.texts.left[places] > order]
                numbers = numbers[places] * self.base + self.texts.words[places + order]
            found, number = np.unique(numbers, return_inverse=True)
            documents = np.bincount(np.unique(number * self.images + image[places]) // self.images)
            self.keys.append(found)
            self.weights.append(np.log(self.images) - np.log(np.append(documents, 1)))
            numbers = np.zeros_like(self.texts.words)
            numbers[places] = number

    def _weigh(self, texts):
        """Weigh the n-gram that begins at every word; the weight is 0 where none does.

        Returns: [ORDERS, words] squared weights; [ORDERS, words] how often the text has the n-gram;
            [ORDERS, texts] norm of the text's vector of weighted counts.
        """
        squares = np.zeros((ORDERS, len(texts.words)))
        repeats = np.zeros(squares.shape, np.int64)
        norms = np.zeros((ORDERS, len(texts.lengths)))
        before, places = texts.words, np.flatnonzero(texts.words < self.base)
        for order, (keys, weights) in enumerate(zip(self.keys, self.weights, strict=True)):
            squares[order, texts.left > order] = weights[-1] ** 2
            if order:
                places = places[texts.left[places] > order]
                places = places[texts.words[places + order] < self.base]
                wanted = before[places] * self.base + texts.words[places + order]
            else:
                wanted = before[places]
            near = np.argsort(wanted)  # sorted numbers are found several times faster
            places, wanted = places[near], wanted[near]
            number = np.searchsorted(keys, wanted)
            known = keys[np.minimum(number, len(keys) - 1)] == wanted
            places, number = places[known], number[known]
            squares[order, places] = weights[number] ** 2
            before = np.zeros_like(texts.words)
            before[places] = number
        for part in _blocks(texts.lengths):
            for order, (offset, pair) in enumerate(_matches(texts, part, texts, part)):
                place = texts.starts[part[pair]] + offset
                norms[order, part] = np.sqrt(np.bincount(pair, squares[order][place], len(part)))
                repeats[order][place] = _times(offset, pair)
        return squares, repeats, norms


class Texts:
    """Texts as the numbers of their words, one text after another."""

    def __init__(self, words, lengths):
        """Take over the numbers.

        Args:
            words: [words] int64, from 1 on.
            lengths: [texts].
        """
        self.words, self.lengths = words, lengths
        self.starts = np.cumsum(lengths) - lengths
        # words from each one to the end of its text
        self.left = np.repeat(self.starts + lengths, lengths) - np.arange(len(words))

    def table(self, texts, blank):
        """Return some texts as columns, [T + 1, P], `blank` below the end of each."""
        rows = np.arange(self.lengths[texts].max() + 1)[:, None]
        inside = rows < self.lengths[texts]
        return np.where(inside, self.words.take(self.starts[texts] + rows, mode="clip"), blank).astype(np.int32)


def _blocks(lengths):
    """Yield the indices of texts of these lengths, longest first, in blocks of at most BLOCK comparisons."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order) and lengths[order[start]]:
        size = max(1, BLOCK // int(lengths[order[start]] + 1) ** 2)
        yield order[start : start + size]
        start += size


def _matches(first, own, second, theirs):
    """Find the n-grams that pairs of texts share.

    Args:
        first, second: Texts.
        own, theirs: [P] the texts of a pair.
    Yields: per order, ([M] place in the first text where the n-gram begins, [M] pair), for every place in the second.
    """
    ours, others = first.table(own, 0), second.table(theirs, -1)
    equal = (ours[:, None] == others).ravel()  # of [T + 1, U + 1, P], whose last row and column are blank
    row, step = others.size, others.size + len(own)  # to the next word of the first text, of both
    found = np.flatnonzero(equal)
    for order in range(ORDERS):
        if order:
            found = found[equal[found + order * step]]
        yield found // row, found - found // len(own) * len(own)


def _times(offset, pair):
    """Return how many matches share each match's place and pair, [M]; arguments as `_matches` gives them."""
    place = offset * (pair.max(initial=0) + 1) + pair
    return np.bincount(place)[place] if len(place) else place


def _clip(squares, own, offset, pair):
    """Return each match's part of the product.

    An n-gram that a caption has m times and a reference r times matches m * r times, of which min(m, r) * r count.

    Args:
        squares: [M] of the weights. own: [M] m. offset, pair: [M], as `_matches` gives them.
    """
    often = np.flatnonzero(own > 1)
    squares[often] *= np.minimum(1, _times(offset[often], pair[often]) / own[often])
    return squares
