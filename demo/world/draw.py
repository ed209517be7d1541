"""Draw one scene of the synthetic world: textured background, objects, clutter, light.

Everything is a function of the scene's meaning and one seed, so an image can be
drawn again anywhere.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 144  # side of a saved image, in pixels
OVERSAMPLE = 4  # shapes are drawn this much larger, then averaged down
RADIUS = {"small": (10.0, 13.0), "large": (19.0, 24.0)}  # pixels
JPEG_QUALITY = 92
CANDIDATES = 64  # layouts tried at once
COLOUR_RGB = {
    "red": (212, 38, 42),
    "orange": (244, 128, 28),
    "yellow": (250, 212, 48),
    "green": (48, 160, 78),
    "blue": (42, 100, 214),
    "purple": (138, 64, 178),
    "white": (244, 244, 242),
}


# ---------------------------------------------------------------- layout
def _layout_fits(xy, radius, first, relation):
    """Say which candidate layouts keep the objects apart and in their relation.

    Args:
        xy: [C, N, 2] centres in pixels.
        radius: [N] radii in pixels.
        first: [N] bool, True for objects of the first group.
        relation: "left", "above" or None.
    Returns: [C] bool.
    """
    distance = np.linalg.norm(xy[:, :, None] - xy[:, None], axis=-1)  # [C, N, N]
    apart = radius[:, None] + radius[None] + 4.0
    np.fill_diagonal(apart, 0.0)
    fits = (distance >= apart).all(axis=(1, 2))
    if relation is None:
        return fits
    axis = 0 if relation == "left" else 1
    a, b = xy[:, first], xy[:, ~first]  # [C, N_a, 2], [C, N_b, 2]
    gap = b[:, :, axis].min(1) - a[:, :, axis].max(1)
    step = np.abs(b.mean(1) - a.mean(1))  # [C, 2]
    return fits & (gap > 14.0) & (step[:, axis] > 1.35 * step[:, 1 - axis])


def place(scene, rng):
    """Choose centres and radii for a scene's objects.

    Returns: ([N, 2] centres, [N] radii, [N] group number), pixels.
    Raises: ValueError where no layout is found (never seen for valid scenes).
    """
    group = np.repeat(np.arange(len(scene.groups)), [g.count for g in scene.groups])
    base = np.array([rng.uniform(*RADIUS[g.size]) for g in scene.groups])
    radius = base[group] * rng.uniform(0.95, 1.05, len(group))
    for _ in range(200):
        low, high = radius[:, None] + 5.0, SIZE - radius[:, None] - 5.0
        xy = low + (high - low) * rng.random((CANDIDATES, len(group), 2))
        good = np.flatnonzero(_layout_fits(xy, radius, group == 0, scene.relation))
        if len(good):
            return xy[good[0]], radius, group
        radius = radius * 0.99
    raise ValueError(f"no layout found for {scene}")


# ---------------------------------------------------------------- backgrounds
def _smooth_noise(rng, cells):
    """Return [SIZE, SIZE] smooth noise in about [-1, 1] with `cells` bumps a side."""
    small = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((SIZE, SIZE), Image.BICUBIC)) * 0.6


def _tinted(base, light, amount):
    """Return a [SIZE, SIZE, 3] picture of `base` brightened by `light` [SIZE, SIZE]."""
    return np.asarray(base, np.float32) * (1.0 + amount * light[..., None])


def _strokes(picture, rng, number, length, angle, shades, width=1):
    """Draw many short lines on a [SIZE, SIZE, 3] picture, at twice its size."""
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).resize((2 * SIZE, 2 * SIZE))
    pen = ImageDraw.Draw(image)
    start = rng.uniform(0, 2 * SIZE, (number, 2))
    turn = rng.normal(angle, 0.35, number)
    reach = rng.uniform(0.5, 1.0, number)[:, None] * length * 2
    end = start + reach * np.stack([np.cos(turn), np.sin(turn)], 1)
    tone = rng.integers(0, len(shades), number)
    for (x0, y0), (x1, y1), k in zip(start, end, tone, strict=True):
        pen.line((x0, y0, x1, y1), fill=shades[k], width=width)
    return np.asarray(image.resize((SIZE, SIZE), Image.BOX), np.float32)


def _grass(rng):
    light = _smooth_noise(rng, 5) + 0.5 * _smooth_noise(rng, 14)
    picture = _tinted((112, 158, 76), light, 0.16)
    shades = [(84, 134, 56), (98, 148, 62), (138, 182, 92), (156, 196, 108)]
    return _strokes(picture, rng, 260, 9, -math.pi / 2, shades)


def _sand(rng):
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    bend = 5.0 * _smooth_noise(rng, 4)
    tilt = rng.uniform(-0.35, 0.35)
    ripple = np.sin((y + tilt * x + bend * 2.0) * rng.uniform(0.42, 0.62))
    grain = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
    light = 0.5 * _smooth_noise(rng, 5) + 0.42 * ripple + 0.3 * grain
    return _tinted((226, 198, 148), light, 0.09)


def _snow(rng):
    light = _smooth_noise(rng, 3) + 0.35 * _smooth_noise(rng, 9)
    shade = np.clip(light, -1.2, 1.2)[..., None] * np.array([13.0, 9.0, 4.0], np.float32)
    picture = np.array([216, 227, 240], np.float32) + shade
    glint = rng.random((SIZE, SIZE)) > 0.994
    picture[glint] = 255.0
    return picture


def _night_sky(rng):
    y = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    top, bottom = np.array([12, 16, 44], np.float32), np.array([44, 44, 96], np.float32)
    picture = top + (bottom - top) * y
    haze = np.clip(_smooth_noise(rng, 4), 0, 2)[..., None]
    picture = picture + haze * np.array([20, 14, 36], np.float32)
    stars = rng.integers(0, SIZE, (int(rng.integers(60, 110)), 2))
    glow = rng.uniform(0.3, 1.0, (len(stars), 1)) * np.array([190, 196, 224], np.float32)
    picture[stars[:, 0], stars[:, 1]] += glow
    return picture


def _brick_wall(rng):
    high, wide = 13, 27
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:] = (188, 172, 160)
    shift_x, shift_y = rng.integers(0, wide), rng.integers(0, high)
    for row, y in enumerate(range(-shift_y, SIZE, high)):
        for x in range(-shift_x - (wide // 2) * (row % 2), SIZE, wide):
            tone = np.array([150, 92, 74]) * rng.uniform(0.86, 1.12) + rng.normal(0, 4, 3)
            picture[max(y + 1, 0) : max(y + high - 1, 0), max(x + 1, 0) : max(x + wide - 1, 0)] = tone
    grain = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
    return _tinted(picture, 0.5 * grain + _smooth_noise(rng, 6), 0.07)


PAINTERS = {
    "grass": _grass,
    "sand": _sand,
    "snow": _snow,
    "night sky": _night_sky,
    "brick wall": _brick_wall,
}


# ---------------------------------------------------------------- objects
def _turn(points, angle):
    """Rotate [N, 2] points by an angle in radians."""
    c, s = math.cos(angle), math.sin(angle)
    return np.asarray(points) @ np.array([[c, s], [-s, c]])


def _outline(kind):
    """Return the corners of a shape that fits the unit circle, [N, 2]."""
    if kind == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.82
    if kind == "triangle":
        return np.array([(0, -1), (0.95, 0.72), (-0.95, 0.72)])
    if kind == "star":
        angles = np.arange(10) * math.pi / 5 - math.pi / 2
        reach = np.where(np.arange(10) % 2 == 0, 1.08, 0.46)
        return np.stack([np.cos(angles), np.sin(angles)], 1) * reach[:, None]
    if kind == "heart":
        t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x, y + 2.5], 1) / 16.0
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)  # circle and ring
    return np.stack([np.cos(t), np.sin(t)], 1)


def _mask(kind, radius, angle):
    """Draw a shape's coverage, [2h, 2h] float in [0, 1], centred on the patch."""
    half = int(math.ceil(radius * 1.15)) + 4
    side = 2 * half * OVERSAMPLE
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    corners = _turn(_outline(kind), angle) * radius * OVERSAMPLE + side / 2
    pen.polygon([tuple(p) for p in corners], fill=255)
    if kind == "ring":
        hole = 0.54 * radius * OVERSAMPLE
        pen.ellipse([side / 2 - hole, side / 2 - hole, side / 2 + hole, side / 2 + hole], fill=0)
    return image.resize((2 * half, 2 * half), Image.BOX), half


def _jittered(colour, rng):
    """Return one object's colour: the named one, a little off, [3] in 0..255."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in COLOUR_RGB[colour]))
    h = (h + rng.uniform(-0.018, 0.018)) % 1.0
    s = min(1.0, s * rng.uniform(0.82, 1.1))
    v = min(1.0, v * rng.uniform(0.84, 1.1))
    return np.array(colorsys.hsv_to_rgb(h, s, v), np.float32) * 255


def _blend(picture, x, y, half, alpha, colour):
    """Lay `colour` ([3] or [2h, 2h, 3]) over a picture where `alpha` [2h, 2h] says so."""
    left, top = int(round(x)) - half, int(round(y)) - half
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + 2 * half, SIZE), min(top + 2 * half, SIZE)
    part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    a = alpha[part][..., None]
    paint = colour[part] if np.ndim(colour) == 3 else colour
    picture[y0:y1, x0:x1] = picture[y0:y1, x0:x1] * (1 - a) + paint * a


def draw_object(picture, kind, colour, centre, radius, rng):
    """Draw one object with its shadow, edge and sheen onto a [SIZE, SIZE, 3] picture."""
    coverage, half = _mask(kind, radius, rng.uniform(-0.3, 0.3))
    shadow = np.asarray(coverage.filter(ImageFilter.GaussianBlur(2.0)), np.float32) / 255
    inner = np.asarray(coverage.filter(ImageFilter.GaussianBlur(1.2)), np.float32) / 255
    alpha = np.asarray(coverage, np.float32) / 255
    _blend(picture, centre[0] + 2, centre[1] + 3, half, 0.38 * shadow, np.zeros(3, np.float32))
    ramp = np.linspace(1, -1, 2 * half, dtype=np.float32)
    sheen = 1.0 + 0.09 * (ramp[:, None] + 0.5 * ramp[None])
    edge = 1.0 - 0.45 * np.clip(1.0 - inner, 0, 1) ** 1.0 * (inner < 0.98)
    body = _jittered(colour, rng) * (sheen * edge)[..., None]
    _blend(picture, centre[0], centre[1], half, alpha, body)


# ---------------------------------------------------------------- the scene
def _clutter(picture, rng, amount):
    """Draw what no caption mentions: pebbles, twigs, and thin lines that may cross objects."""
    side = 2 * SIZE
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).resize((side, side), Image.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.poisson(3.0 * amount)):
        x, y = rng.uniform(0, side, 2)
        r = rng.uniform(2.0, 5.0)
        grey = int(rng.uniform(60, 190))
        tint = tuple(int(np.clip(grey + rng.normal(0, 16), 0, 255)) for _ in range(3))
        pen.ellipse([x - r, y - 0.8 * r, x + r, y + 0.8 * r], fill=tint)
    for _ in range(rng.poisson(0.8 * amount)):
        x, y, angle = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, math.pi)
        reach = rng.uniform(20, 70)
        dx, dy = reach * math.cos(angle), reach * math.sin(angle)
        tone = int(rng.uniform(50, 120))
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=(tone, int(tone * 0.85), int(tone * 0.7)), width=3)
    return np.asarray(image.resize((SIZE, SIZE), Image.BOX), np.float32)


def draw_scene(scene, seed, clutter=1.0, layout=place):
    """Draw a scene.

    Args:
        scene: `demo.world.scenes.Scene`, or another that has groups and a background.
        seed: int or sequence of ints; equal seeds give equal pictures.
        clutter: about how much undescribed detail, 0 for none.
        layout: function of the scene and a generator that returns what `place` does.
    Returns: RGB PIL image, SIZE x SIZE.
    """
    rng = np.random.default_rng(seed)
    centres, radii, group = layout(scene, rng)
    picture = PAINTERS[scene.background](rng).astype(np.float32)
    if clutter:
        picture = _clutter(picture, rng, clutter)
    for i in rng.permutation(len(radii)):
        g = scene.groups[group[i]]
        draw_object(picture, g.kind, g.colour, centres[i], radii[i], rng)
    if clutter:
        picture = _clutter(picture, rng, 0.35 * clutter)
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    fall = rng.uniform(-0.12, 0.12) * ramp[:, None] + rng.uniform(-0.12, 0.12) * ramp[None]
    light = rng.uniform(0.86, 1.08) * (1.0 + fall)
    warm = 1.0 + rng.uniform(-0.04, 0.04) * np.array([1.0, 0.1, -1.0], np.float32)
    picture = picture * light[..., None] * warm
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))
