"""Captions without images: what a store of texts is made of, and the text tower behind the images' methods."""

import re
from pathlib import Path
from typing import NamedTuple

from features.annotations import read_places
from features.listing import IMAGE_SUFFIXES
from features.tables import TRIED, NoHeaderError, read_text, undecoded

NUMBERED_ROW = re.compile(r"\d+\s*[,|;]")  # 215268662,A dog


class Sentence(NamedTuple):
    """A caption that gets a row of its own, in place of an image file; it is its own fingerprint.

    Args:
        number: of its row, before any is left out.
        text: the caption.
    """

    number: int
    text: str


class TextEncoder:
    """An encoder's text tower, which embeds Sentences."""

    def __init__(self, encoder):
        """Take an encoder's text tower.

        Raises: ValueError where it has none.
        """
        encoder.check_texts("--text_only")
        self.encoder, self.name, self.sha256 = encoder, encoder.name, encoder.sha256
        self.describe, self.shape = encoder.describe, encoder.shape

    def identity(self):
        """Return what distinguishes these embeddings from other encoders', and from this encoder's of images."""
        return self.encoder.identity() | {"modality": "text"}

    def encode_sentences(self, batches):
        """Embed lists of Sentences, as `features.loader.encode_files` does pictures."""
        for batch in batches:
            yield batch, self.encoder.encode_texts([sentence.text for sentence in batch]), {}

    def count_cut(self, sentences):
        """Return how many of the Sentences are longer than the text tower reads."""
        return self.encoder.count_cut(sentence.text for sentence in sentences)


def find_sentences(annotations, split, strict):
    """Read captions of any annotations, or of a text file of one sentence per line.

    Args:
        annotations, split: see `read_places`.
        strict: stop at the first bad record.
    Returns: ({Sentence: [its record]}, {place: why it is left out}); empty captions are passed over.
    Raises: FileNotFoundError; ValueError as `read_places`, where `strict` and a record is bad, or where none is good.
    """
    places = _read_sentences(annotations, split)
    bad = {place: error for place, _, error in places if error}
    texts = (record for _, record, error in places if not error)
    found = {
        Sentence(number, record["caption"].strip()): [record]
        for number, record in enumerate(texts)
        if record["caption"].strip()
    }
    if bad and (strict or not found):
        place, error = next(iter(bad.items()))
        raise ValueError(f"{annotations}, {place} {error}{'; mend it, or leave out --strict' * bool(found)}")
    if not found:
        raise ValueError(f"{annotations} holds no captions: all are empty")
    return found, bad


def _read_sentences(path, split):
    """Return what `read_places` does; records of a text file of sentences have no `image_id`."""
    try:
        return read_places(path, split)
    except NoHeaderError:
        if Path(str(path).removesuffix(".gz")).suffix.lower() != ".txt":
            raise
        lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        if _is_table([line for _, line in lines[:TRIED]]):
            raise
    return [(f"line {number}", {"caption": line}, undecoded(line)) for number, line in lines]


def _is_table(lines):
    """Tell whether lines hold more than a sentence each: an image's name or number before it, or columns."""
    first = (re.split(r"[\s,|;]", line, maxsplit=1)[0].strip("\"'") for line in lines)
    named = any(Path(word).suffix.lower() in IMAGE_SUFFIXES for word in first)
    return named or any("\t" in line for line in lines) or all(map(NUMBERED_ROW.match, lines))
