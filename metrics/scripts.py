"""Captions of languages that write no blanks between words: uncut, a whole sentence counts as one word."""

import re
from collections import Counter

# Per language: its letters, the mean number of letters between blanks from which words count as uncut (one less in a
# sentence without blanks), and a package that cuts words. Korean writes blanks.
HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
LANGUAGES = {
    "Japanese": ("\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f", 4, "fugashi"),  # kana, among which Han letters may stand
    "Chinese": (HAN, 4, "jieba"),
    "Thai": ("\u0e00-\u0e7f", 8, "pythainlp"),
    "Lao": ("\u0e80-\u0eff", 8, "laonlp"),
    "Khmer": ("\u1780-\u17ff", 8, "khmer-nltk"),
    "Burmese": ("\u1000-\u109f", 8, "pyidaungsu"),
}
_LETTERS = {language: re.compile(f"[{letters}]") for language, (letters, _, _) in LANGUAGES.items()}
_ANY = re.compile(f"[{''.join(letters for letters, _, _ in LANGUAGES.values())}]")


def uncut_language(caption):
    """Return the language of a caption whose words were not cut, or None."""
    if caption.isascii() or not _ANY.search(caption):
        return None
    pieces = [len(_ANY.findall(piece)) for piece in caption.split()]
    letters = sum(pieces)
    if letters <= sum(c.isalpha() for c in _ANY.sub("", caption)):
        return None  # a few such letters in another language's caption: "a sign that says ..."
    language = next(language for language, pattern in _LETTERS.items() if pattern.search(caption))
    pieces = [length for length in pieces if length]
    longest_cut = LANGUAGES[language][1]
    return language if letters / len(pieces) >= longest_cut - (len(pieces) == 1) else None


def uncut_warning(texts):
    """Warn of texts whose words were not cut.

    Args:
        texts: {what they are: list of texts}.
    Returns: the warning, or None where all can be scored by words.
    """
    found = {name: [language for text in group if (language := uncut_language(text))] for name, group in texts.items()}
    languages = Counter(language for group in found.values() for language in group)
    if not languages:
        return None
    counts = " and ".join(f"{len(group):,} of {len(texts[name]):,} {name}" for name, group in found.items() if group)
    likely = languages.most_common(1)[0][0]
    return (
        f"{counts} hold no blanks between words ({likely}?), so each counts as one word or is cut wrongly: "
        f"scores by words mean nothing; cut captions and references into words first, e.g. with {LANGUAGES[likely][2]}"
    )
