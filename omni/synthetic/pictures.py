"""Pictures of the small world: drawings of `omni.synthetic.scenes`, with captions and questions.

Every function is pure: a picture depends on (seed, index, unseen) only. All randomness comes from Python's own
generator, and the drawing snaps to whole pixels of a canvas four times as fine, so that the pinned Pillow gives the
same bytes everywhere.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omni.synthetic import holdout, lexicon, scenes

# (x, y) points: x to the right, y down. "px" is a pixel of the finished picture, "fine" a pixel of the canvas.
SIZE = 128  # px, both sides
FINE = 4  # canvas pixels per picture pixel and axis
SAVE = {"format": "PNG", "compress_level": 2}  # for Image.save: 6 saves a sixth of the bytes for three times the time

RGB = {
    "red": (220, 30, 38), "orange": (246, 128, 16), "yellow": (248, 212, 20), "green": (32, 160, 64),
    "blue": (32, 84, 222), "purple": (128, 44, 172), "pink": (250, 132, 190), "brown": (124, 72, 30),
    "black": (22, 22, 24), "grey": (132, 134, 138),
}  # fmt: skip
COLOUR_SPREAD = 10  # each channel of a group's colour varies by this much
# Radii in px, by the number of shapes: the largest that fit a group's box, so four big ones are smaller than one.
# The gap between 10 and 13 is what makes "big or small?" a fair question.
RADIUS = {
    "small": dict.fromkeys(range(1, lexicon.MAX_COUNT + 1), (9.4, 10.0)),
    "big": {1: (16.0, 20.0), 2: (13.2, 14.2), 3: (13.0, 13.6), 4: (13.0, 13.6)},
}
BOARD = {"small": ((48, 52), (17, 19)), "big": ((58, 60), (34, 44))}  # a sign's width and height, px
MARGIN = 2  # px that a group keeps from the edge of its box
GAP = 2.0  # px at least between two shapes of a group
# px by which a group may move in its box, and a shape in its group: together less than half of the 32 px between two
# boxes, or "at the top" could become "in the top left corner"
WANDER, STRAY = 7.0, 5.0
FONT_FOLDER = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"  # found, not imported: slow
QUESTIONS = 6  # maximum per picture
ATTRIBUTES = ("colour", "shape", "count")  # classes of a picture of one group
CAPTIONS_TRIED = 64  # random captions of a scene, to find all of them: there are at most a dozen

# --- outlines -------------------------------------------------------------------------------------------------------

Points = list[tuple[float, float]]


def _arc(radius: float, start: float, stop: float, n_points: int = 40, centre: float = 0.0) -> Points:
    """Points on a circle around (centre, 0), angles in degrees, clockwise on the screen."""
    angles = [math.radians(start + (stop - start) * i / n_points) for i in range(n_points + 1)]
    return [(centre + radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _polar(radii: tuple[float, ...], n_points: int) -> Points:
    """A polygon with a corner at the top and `radii` in turn, such as a triangle or a star."""
    angles = [math.tau * i / n_points - math.pi / 2 for i in range(n_points)]
    return [(radii[i % len(radii)] * math.cos(t), radii[i % len(radii)] * math.sin(t)) for i, t in enumerate(angles)]


def _heart() -> Points:
    turns = [math.tau * i / 48 for i in range(48)]
    x = [16 * math.sin(t) ** 3 for t in turns]
    y = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(0.059 * a, -0.059 * b - 0.12) for a, b in zip(x, y, strict=True)]


def _cross(arm: float, half_width: float) -> Points:
    a, b = arm, half_width
    return [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]


OUTLINES: dict[str, Points] = {  # within a circle of radius 1.06 around the origin, and of about equal weight
    "circle": _arc(0.92, 0, 360),
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": _polar((1.06,), 3),
    "star": _polar((1.06, 0.44), 10),
    "heart": _heart(),
    "cross": _cross(0.98, 0.32),
    # the outer circle, then the inner one backwards: one polygon with a hole
    "ring": _arc(0.98, 0, 360) + _arc(0.52, 360, 0),
    "diamond": [(0.0, -1.06), (0.66, 0.0), (0.0, 1.06), (-0.66, 0.0)],
    # the inner edge is a circle around (0.637, 0) through the same two tips; then moved to the middle
    "moon": [(x + 0.244, y) for x, y in _arc(0.92, 62, 298) + _arc(0.837, 255.8, 104.2, centre=0.637)],
    "arrow": [(-1.0, -0.24), (0.1, -0.24), (0.1, -0.72), (1.05, 0.0), (0.1, 0.72), (0.1, 0.24), (-1.0, 0.24)],
}
_REACH = 1.06
_QUARTER_TURNS = {"arrow": (0, 1, 2, 3), "moon": (0, 2)}  # shapes with more than one direction

# --- arrangement ----------------------------------------------------------------------------------------------------

# Positions of a group's shapes, in units of the smallest distance between two of them. Mirrored at random.
_ARRANGEMENTS: dict[int, tuple[Points, ...]] = {
    1: ([(0, 0)],),
    2: ([(-0.5, 0), (0.5, 0)], [(0, -0.5), (0, 0.5)], [(-0.4, -0.4), (0.4, 0.4)]),
    3: (
        [(-0.5, 0.43), (0.5, 0.43), (0, -0.43)],
        [(0.43, -0.5), (0.43, 0.5), (-0.43, 0)],
        [(-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)],
        [(-1, 0), (0, 0), (1, 0)],
        [(0, -1), (0, 0), (0, 1)],
        [(-0.75, -0.75), (0, 0), (0.75, 0.75)],
    ),
    4: (
        [(-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)],
        [(0, -0.75), (0, 0.75), (-0.75, 0), (0.75, 0)],
        [(-1, -0.43), (0, -0.43), (-0.5, 0.43), (0.5, 0.43)],
        [(-1, 0.5), (0, 0.5), (1, 0.5), (0, -0.5)],
    ),
}


def _arrange(count: int, radius: float, rng: random.Random) -> Points:
    """Centres of `count` shapes in px from the centre of their box: the shapes are `GAP` apart and inside the box.

    Each shape moves at random within its share of the free distance, so no position has to be rejected.
    """
    reach = _REACH * radius
    room = SIZE / 4 - MARGIN - reach  # largest distance of a centre from the box's centre, along each axis
    closest = 2 * reach + GAP
    options = []  # (arrangement, the widest spacing that fits)
    for points in _ARRANGEMENTS[count]:
        extent = max(max(abs(x), abs(y)) for x, y in points)
        if extent * closest <= room:
            options.append((points, room / extent if extent else closest))
    points, widest = rng.choice(options)
    spacing = rng.uniform(closest, min(widest, 2 * closest))
    nearest = min((math.dist(p, q) for p in points for q in points if p != q), default=1.0) * spacing
    free = min(STRAY, (nearest - closest) / 2)
    mirror_x, mirror_y = rng.choice((-1, 1)), rng.choice((-1, 1))
    centres = []
    for x, y in points:
        angle, distance = rng.uniform(0, math.tau), free * rng.random()
        x, y = mirror_x * x * spacing + distance * math.cos(angle), mirror_y * y * spacing + distance * math.sin(angle)
        centres.append((min(room, max(-room, x)), min(room, max(-room, y))))
    return centres


def _shift(values: list[float], reach: float, rng: random.Random) -> float:
    """A shift of a whole group along one axis, which brings its mean to within `WANDER` of the box's centre.

    Args:
        values: coordinates of its shapes, px from the box's centre.
        reach: half the extent of a shape, px. All shapes stay inside the box.
    """
    room = SIZE / 4 - MARGIN - reach
    wanted = rng.uniform(-WANDER, WANDER) - sum(values) / len(values)
    return min(room - max(values), max(-room - min(values), wanted))


# --- drawing --------------------------------------------------------------------------------------------------------


def _vary(rgb: tuple[int, int, int], spread: int, rng: random.Random) -> tuple[int, int, int]:
    return tuple(min(255, max(0, channel + rng.randint(-spread, spread))) for channel in rgb)


def _draw_shapes(canvas: ImageDraw.ImageDraw, group: scenes.Group, rgb, centre, rng: random.Random) -> None:
    radius = rng.uniform(*RADIUS[group.size][group.count])
    centres = _arrange(group.count, radius, rng)
    reach = _REACH * radius
    dx = _shift([x for x, _ in centres], reach, rng)
    dy = _shift([y for _, y in centres], reach, rng)
    turn = rng.choice(_QUARTER_TURNS.get(group.shape, (0,))) * 90
    for x, y in centres:
        angle = math.radians(turn + rng.uniform(-8, 8))
        cos, sin = radius * math.cos(angle), radius * math.sin(angle)
        x, y = centre[0] + x + dx, centre[1] + y + dy
        points = [
            (round(FINE * (x + u * cos - v * sin)), round(FINE * (y + u * sin + v * cos)))
            for u, v in OUTLINES[group.shape]
        ]
        canvas.polygon(points, fill=rgb)
        canvas.line([points[-1], points[0]], fill=rgb, width=3)  # hides the ring's seam


@cache
def _word_mask(word: str) -> Image.Image:
    """Mask (mode L) of the word in bold capitals, cropped to its ink, letters 48 fine pixels high."""
    font = ImageFont.truetype(FONT_FOLDER / "DejaVuSans-Bold.ttf", 66, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(word)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), word, fill=255, font=font)
    return mask


def _draw_sign(picture: Image.Image, group: scenes.Group, rgb, centre, rng: random.Random) -> None:
    """Draw a board with the word as large as fits; a long word is condensed before it is made smaller."""
    width, height = (rng.randint(*sides) for sides in BOARD[group.size])
    x = centre[0] + _shift([0.0], width / 2, rng)
    y = centre[1] + _shift([0.0], height / 2, rng)
    left, top = round(FINE * (x - width / 2)), round(FINE * (y - height / 2))
    box = (left, top, left + FINE * width - 1, top + FINE * height - 1)
    edge = tuple(channel * 2 // 3 for channel in rgb)
    ImageDraw.Draw(picture).rounded_rectangle(box, radius=3 * FINE, fill=rgb, outline=edge, width=FINE)

    mask = _word_mask(group.word)
    room_x, room_y = FINE * (width - 6), FINE * (height - 8)
    scale = min(room_y / mask.height, room_x / (0.7 * mask.width))
    size = (min(room_x, round(mask.width * scale)), round(mask.height * scale))
    corner = (left + (FINE * width - size[0]) // 2, top + (FINE * height - size[1]) // 2)
    brightness = (299 * rgb[0] + 587 * rgb[1] + 114 * rgb[2]) // 1000
    ink = (250, 250, 250) if brightness < 120 else (12, 12, 12)
    picture.paste(ink, corner, mask.resize(size, Image.Resampling.BILINEAR))


def _grain(image: Image.Image, strength: int, rng: random.Random) -> Image.Image:
    """Add noise of up to +-`strength` in squares of 2 x 2 px: like paper, and half as large in PNG as single pixels."""
    noise = np.frombuffer(rng.randbytes(SIZE // 2 * (SIZE // 2)), np.uint8).astype(np.int16)
    noise = (noise * (2 * strength + 1) // 256 - strength).reshape(SIZE // 2, SIZE // 2)
    noise = noise.repeat(2, axis=0).repeat(2, axis=1)[:, :, None]
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def render(scene: scenes.Scene, rng: random.Random) -> Image.Image:
    """Draw a scene: RGB, `SIZE` x `SIZE`.

    A group is inside its box, which is half as wide and high as the picture, with its upper left corner at
    (column / 4, row / 4) of the picture.
    """
    tint = rng.randint(226, 250)
    background = _vary((tint, tint, tint), 12, rng)
    picture = Image.new("RGB", (FINE * SIZE, FINE * SIZE), background)
    canvas = ImageDraw.Draw(picture)
    for group in scene.groups:
        row, column = group.cell
        centre = (SIZE * (column + 1) / 4, SIZE * (row + 1) / 4)
        rgb = _vary(RGB[group.colour], COLOUR_SPREAD, rng)
        if group.word:
            _draw_sign(picture, group, rgb, centre, rng)
        else:
            _draw_shapes(canvas, group, rgb, centre, rng)
    return _grain(picture.reduce(FINE), rng.randint(0, 4), rng)


def picture(seed: int, index: int, unseen: bool = False) -> tuple[Image.Image, dict]:
    """One picture, with its captions, questions and classes.

    Args:
        unseen: show a combination that no training picture shows (`holdout.held_out`).

    Returns:
        the image, RGB, 128 x 128, saved with `SAVE`;
        {"caption": str, "accepted_answers": [every caption of the scene, ...], "questions": [[question, answer], ...],
        "groups": [{"shape", "colour", "size", "count", "cell" (row, column), "word"}, ...], "colour", "shape", "count":
        class of a picture of one group of shapes, else None}. Every answer follows from the picture.
    """
    rng = random.Random(f"picture {'held-out' if unseen else 'train'} {seed} {index}")
    scene = holdout.draw(scenes.sample_scene, rng, unseen)
    caption = scenes.caption(scene, rng, in_order=True)
    asked = scenes.questions(scene, rng)
    rng.shuffle(asked)  # before duplicates are dropped: a question listed twice is likelier to be among the first
    questions = [list(pair) for pair in dict.fromkeys(asked)][:QUESTIONS]
    groups = [
        {"shape": g.shape, "colour": g.colour, "size": g.size, "count": g.count, "cell": list(g.cell), "word": g.word}
        for g in scene.groups
    ]
    accepted = sorted({scenes.caption(scene, random.Random(i)) for i in range(CAPTIONS_TRIED)} | {caption})
    one = scene.groups[0] if len(scene.groups) == 1 and not scene.groups[0].word else None
    classes = {name: getattr(one, name, None) for name in ATTRIBUTES}
    about = {"caption": caption, "accepted_answers": accepted, "questions": questions, "groups": groups}
    return render(scene, rng), about | classes


def class_captions() -> Iterator[str]:
    """Lines of a JSON list of captions with their classes: one group of each colour, shape, count, place and size."""
    rng, values = random.Random(0), (lexicon.COLOURS, lexicon.SHAPES, range(1, lexicon.MAX_COUNT + 1))
    start = "["
    for colour, shape, count, cell, size in itertools.product(*values, scenes.PLACE_OF, lexicon.SIZES):
        caption = scenes.caption(scenes.Scene((scenes.Group(shape, colour, size, count, cell),)), rng)
        yield start + json.dumps({"caption": caption, "colour": colour, "shape": shape, "count": count})
        start = ","
    yield "]"
