"""Caption scenes of the synthetic world, read captions back, and judge them.

The grammar has several sentence forms, either order of mention and two wordings of most
phrases; every caption mentions every attribute, so that "all right" can be decided.
"""

import re
from itertools import permutations

from demo.world.scenes import ATTRIBUTES, COLOURS, KINDS, Group, Scene

COUNT_WORDS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PLACES = {
    "grass": ("on grass", "on the grass"),
    "sand": ("on sand", "on the sand"),
    "snow": ("on snow", "in the snow"),
    "night sky": ("in the night sky", "in a night sky"),
    "brick wall": ("on a brick wall", "in front of a brick wall"),
}
# (relation, True where the first mentioned group is the scene's second) -> wordings
RELATION_WORDS = {
    ("left", False): ("left of", "to the left of"),
    ("left", True): ("right of", "to the right of"),
    ("above", False): ("above", "over"),
    ("above", True): ("below", "under"),
}
SINGLE_FORMS = (
    "{a} {place}",
    "there {is_a} {a} {place}",
    "{place} there {is_a} {a}",
    "{place}, {a}",
)
PAIR_FORMS = (
    "{a} {rel} {b} {place}",
    "{a} {is_a} {rel} {b} {place}",
    "there {is_a} {a} {rel} {b} {place}",
    "{place}, {a} {rel} {b}",
    "{place} there {is_a} {a} {rel} {b}",
)


# ---------------------------------------------------------------- writing
def _choice(rng, options):
    return options[int(rng.integers(len(options)))]


def _name_group(group, rng):
    """Return a noun phrase for a group: "two small red stars" or "two small stars in red"."""
    count = _choice(rng, COUNT_WORDS[group.count]) if rng.random() < 0.3 else COUNT_WORDS[group.count][0]
    size = _choice(rng, SIZE_WORDS[group.size])
    noun = group.kind + "s" * (group.count > 1)
    if rng.random() < 0.2:
        return f"{count} {size} {noun} in {group.colour}"
    return f"{count} {size} {group.colour} {noun}"


def write_caption(scene, rng):
    """Return one caption of a scene, wording drawn from `rng`."""
    groups, turned = list(scene.groups), False
    if scene.relation and rng.random() < 0.5:
        groups, turned = groups[::-1], True
    parts = {
        "a": _name_group(groups[0], rng),
        "is_a": "is" if groups[0].count == 1 else "are",
        "place": _choice(rng, PLACES[scene.background]),
    }
    form = _choice(rng, SINGLE_FORMS)
    if scene.relation:
        parts["b"] = _name_group(groups[1], rng)
        parts["rel"] = _choice(rng, RELATION_WORDS[scene.relation, turned])
        form = _choice(rng, PAIR_FORMS)
    text = form.format(**parts) + "."
    return text[0].upper() + text[1:]


def write_captions(scene, rng, number):
    """Return `number` differently worded captions of a scene."""
    found = []
    while len(found) < number:
        caption = write_caption(scene, rng)
        if caption not in found:
            found.append(caption)
    return found


# ---------------------------------------------------------------- reading
def _lookup(table):
    """Turn {meaning: wordings} into {wording: meaning}."""
    return {word: meaning for meaning, words in table.items() for word in words}


_COUNT_OF, _SIZE_OF, _PLACE_OF = _lookup(COUNT_WORDS), _lookup(SIZE_WORDS), _lookup(PLACES)
_RELATION_OF = _lookup(RELATION_WORDS)


def _any_of(words):
    return "|".join(sorted(words, key=len, reverse=True))


def _group_pattern(name):
    """Return the regular expression of a noun phrase; named groups begin with `name`."""
    size, colour, kind = _any_of(_SIZE_OF), _any_of(COLOURS), _any_of(KINDS)
    return (
        rf"(?P<{name}count>{_any_of(_COUNT_OF)}) (?P<{name}size>{size}) "
        rf"(?:(?P<{name}colour>{colour}) (?P<{name}kind>{kind})(?P<{name}plural>s?)"
        rf"|(?P<{name}kind2>{kind})(?P<{name}plural2>s?) in (?P<{name}colour2>{colour}))"
    )


def _sentence_pattern(form):
    """Return the compiled regular expression of a sentence form."""
    parts = {
        "a": _group_pattern("a_"),
        "b": _group_pattern("b_"),
        "rel": f"(?P<rel>{_any_of(_RELATION_OF)})",
        "place": f"(?P<place>{_any_of(_PLACE_OF)})",
        "is_a": "(?:is|are)",
    }
    return re.compile(form.format(**parts))


_PATTERNS = [_sentence_pattern(form) for form in SINGLE_FORMS + PAIR_FORMS]


def _read_group(found, name):
    """Return the Group of a matched noun phrase, or None where number and noun disagree."""
    count = _COUNT_OF[found[f"{name}count"]]
    plural = found[f"{name}plural"] or found[f"{name}plural2"] or ""
    if (count > 1) != bool(plural):
        return None
    colour = found[f"{name}colour"] or found[f"{name}colour2"]
    kind = found[f"{name}kind"] or found[f"{name}kind2"]
    return Group(count, _SIZE_OF[found[f"{name}size"]], colour, kind)


def parse_caption(caption):
    """Read a caption's meaning.

    Returns: Scene with the relation in its canonical direction, or None where the caption is
    not a sentence of the grammar.
    """
    text = " ".join(caption.lower().split()).removesuffix(".").rstrip()
    for pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if not match:
            continue
        found = match.groupdict()
        background = _PLACE_OF[found["place"]]
        first = _read_group(found, "a_")
        if "rel" not in found:
            return Scene((first,), None, background) if first else None
        second = _read_group(found, "b_")
        if not (first and second):
            return None
        relation, turned = _RELATION_OF[found["rel"]]
        return Scene((second, first) if turned else (first, second), relation, background)
    return None


# ---------------------------------------------------------------- judging
def _compare(said, true, order):
    """Compare attribute by attribute when true group i is said group order[i] (None: unsaid)."""
    pairs = [(None if j is None else said.groups[j], g) for j, g in zip(order, true.groups, strict=True)]
    right = {
        name: all(s is not None and getattr(s, name) == getattr(g, name) for s, g in pairs)
        for name in ("count", "kind", "colour", "size")
    }
    agree = sum(s is not None and getattr(s, n) == getattr(g, n) for s, g in pairs for n in vars(g))
    right["count"] = right["count"] and len(said.groups) == len(true.groups)
    right["relation"] = None
    if true.relation:
        right["relation"] = said.relation == true.relation and order == (0, 1)
        agree += bool(right["relation"])
    right["background"] = said.background == true.background
    return agree, right


def judge(caption, scene):
    """Compare what a caption says with what is in the scene.

    Groups are matched so that most attributes agree; "A left of B" equals "B right of A".

    Args:
        caption: str.
        scene: the true `Scene`.
    Returns: {attribute: bool} for world.ATTRIBUTES and "all". "relation" is None for a scene
        of one group. An unreadable caption is wrong in everything; a group left unsaid is
        wrong in all its attributes and the relation; one too many is a wrong count.
    """
    said = parse_caption(caption)
    if said is None:
        wrong = dict.fromkeys(ATTRIBUTES, False)
        return wrong | {"relation": False if scene.relation else None, "all": False}
    names = list(range(len(said.groups)))
    names += [None] * (len(scene.groups) - len(names))
    results = [_compare(said, scene, order) for order in permutations(names, len(scene.groups))]
    best = max(results, key=lambda r: r[0])[1]
    best["all"] = all(value is not False for value in best.values())
    return best
