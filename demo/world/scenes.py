"""The synthetic world's scenes: what one may hold, which combinations are kept for testing, how one is drawn by lot."""

from dataclasses import dataclass, replace

KINDS = ("circle", "square", "triangle", "star", "heart", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
SIZES = ("small", "large")
BACKGROUNDS = ("grass", "sand", "snow", "night sky", "brick wall")
RELATIONS = ("left", "above")  # "right" and "below" are these, read from the other end
ATTRIBUTES = ("count", "kind", "colour", "size", "relation", "background")

# Kept for the test split: no picture or caption of the others holds any of these.
UNSEEN_COLOUR_KINDS = frozenset({("purple", "star"), ("yellow", "heart"), ("red", "triangle"), ("blue", "ring")})
UNSEEN_RELATIONS = frozenset(
    {
        ("circle", "left", "square"),
        ("square", "above", "star"),
        ("heart", "left", "triangle"),
        ("ring", "above", "circle"),
    }
)


@dataclass(frozen=True)
class Group:
    """Equal objects that are mentioned together: "two small red stars"."""

    count: int
    size: str
    colour: str
    kind: str


@dataclass(frozen=True)
class Scene:
    """One group, or two groups where the first is `relation` ("left", "above") the second."""

    groups: tuple
    relation: str | None
    background: str

    def to_json(self):
        """Return the scene as plain json values."""
        groups = [vars(g) for g in self.groups]
        return {"groups": groups, "relation": self.relation, "background": self.background}

    @staticmethod
    def from_json(record):
        """Read what `to_json` wrote; other keys are ignored."""
        groups = tuple(Group(**g) for g in record["groups"])
        return Scene(groups, record["relation"], record["background"])


def is_unseen(scene):
    """Say whether a scene holds a combination that is kept for testing."""
    if any((g.colour, g.kind) in UNSEEN_COLOUR_KINDS for g in scene.groups):
        return True
    if scene.relation is None:
        return False
    a, b = scene.groups
    return (a.kind, scene.relation, b.kind) in UNSEEN_RELATIONS


def is_valid(scene):
    """Say whether two groups can be told apart by a caption."""
    if len(scene.groups) == 1:
        return True
    a, b = scene.groups
    return (a.size, a.colour, a.kind) != (b.size, b.colour, b.kind)


def _choice(rng, options):
    return options[int(rng.integers(len(options)))]


def _sample_any(rng):
    """Draw a scene without regard to the kept combinations."""
    if rng.random() < 0.3:
        counts, relation = (int(rng.choice([1, 2, 3], p=[0.26, 0.37, 0.37])),), None
    else:
        counts = _choice(rng, ((1, 1), (1, 1), (1, 2), (2, 1)))
        relation = _choice(rng, RELATIONS)
    groups = tuple(Group(c, _choice(rng, SIZES), _choice(rng, COLOURS), _choice(rng, KINDS)) for c in counts)
    return Scene(groups, relation, _choice(rng, BACKGROUNDS))


def sample_scene(rng, unseen=False):
    """Draw a valid scene that holds (`unseen`) or does not hold a kept combination."""
    while True:
        scene = _sample_any(rng)
        if is_valid(scene) and is_unseen(scene) == unseen:
            return scene


def edit_scene(scene, rng):
    """Return a scene that differs in one respect: a hard negative, never a kept combination.

    The respects: one attribute of one group, the relation, the background, or an attribute
    exchanged between the two groups.
    """
    two = len(scene.groups) == 2
    while True:
        what = _choice(rng, ("count", "size", "colour", "kind", "background") + ("relation", "swap", "swap") * two)
        edited = _edit(scene, what, rng)
        if edited != scene and is_valid(edited) and not is_unseen(edited):
            return edited


def _edit(scene, what, rng):
    """Return `scene` with one respect drawn anew; the result may be equal or not allowed."""
    if what == "background":
        return replace(scene, background=_choice(rng, BACKGROUNDS))
    groups = list(scene.groups)
    if what == "relation":
        turned = tuple(groups[::-1]) if rng.random() < 0.5 else scene.groups
        return replace(scene, groups=turned, relation=_choice(rng, RELATIONS))
    if what == "swap":
        field = _choice(rng, ("size", "colour", "colour", "kind", "count"))
        a, b = groups
        groups = [replace(a, **{field: getattr(b, field)}), replace(b, **{field: getattr(a, field)})]
        return replace(scene, groups=tuple(groups))
    i = int(rng.integers(len(groups)))
    options = {"size": SIZES, "colour": COLOURS, "kind": KINDS}
    if what == "count":
        others = sum(g.count for g in groups) - groups[i].count
        value = int(rng.integers(1, 4 - others))
    else:
        value = _choice(rng, options[what])
    groups[i] = replace(groups[i], **{what: value})
    return replace(scene, groups=tuple(groups))
