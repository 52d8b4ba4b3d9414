"""Rendered pictures and signs: what is said about a picture can be measured in its pixels, and the splits are apart.

The readers below share only the table of colours with the renderers: they find the shapes of a picture as connected
patches of colour, and read a sign's word by comparing it with all words it could be.
"""

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from test_world import true_answer

from omni.synthetic import facts, holdout, lexicon, pictures, scenes, signs

ROOT = Path(__file__).resolve().parent.parent
N_PICTURES = 200
N_SIGNS = 200
BOX = 64  # px, the side of a group's box


@pytest.fixture(scope="module", params=[False, True], ids=["train", "unseen"])
def split(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def made(split) -> list[tuple[Image.Image, dict]]:
    return [pictures.picture(0, i, split) for i in range(N_PICTURES)]


@pytest.fixture(scope="module")
def lines(split) -> list[str]:
    return [signs.line(random.Random(f"{split} {i}"), split) for i in range(2_000)]


# --- pictures: what their pixels say --------------------------------------------------------------------------------


def foreground(image: Image.Image) -> np.ndarray:
    """(128, 128) bool: what differs from the background, the most frequent colour."""
    pixels = np.asarray(image).astype(int)
    coarse = (pixels // 16) @ (256, 16, 1)
    background = np.median(pixels[coarse == np.bincount(coarse.ravel()).argmax()], axis=0)
    return np.abs(pixels - background).max(axis=2) > 40


def box_of(group: dict) -> tuple[slice, slice]:
    row, column = group["cell"]
    return slice(row * 32, row * 32 + BOX), slice(column * 32, column * 32 + BOX)


def patches(mask: np.ndarray) -> list[tuple[int, int]]:
    """(height, width) in px of each connected patch; pixels that touch at a corner are connected."""
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    return [tuple(side.stop - side.start for side in box) for box in ndimage.find_objects(labels)]


def colour_of(pixels: np.ndarray) -> str:
    """The name of the colour nearest to the median of (n, 3) pixels."""
    median = np.median(pixels, axis=0)
    return min(pictures.RGB, key=lambda name: np.abs(median - pictures.RGB[name]).sum())


def test_count_size_colour_and_place_of_every_group_can_be_measured(made):
    measured = defaultdict(list)  # sides, px, by shape and size
    for image, info in made:
        mask, pixels = foreground(image), np.asarray(image).astype(int)
        outside = mask.copy()
        for group in info["groups"]:
            box = box_of(group)
            outside[box] = False
            is_sign = group["shape"] == "sign"
            sizes = patches(ndimage.binary_fill_holes(mask[box]) if is_sign else mask[box])  # white letters are holes
            assert len(sizes) == group["count"], info["caption"]
            side = 0 if is_sign else slice(None)  # boards are all wide: big ones are high
            measured[group["shape"], group["size"]] += [np.max(size[side]) for size in sizes]
            core = ndimage.binary_erosion(mask[box])  # without the edges, which are mixed with the background
            assert colour_of(pixels[box][core]) == group["colour"], info["caption"]
            for axis in (0, 1):
                filled = np.flatnonzero(mask[box].any(axis=axis))
                assert abs(filled[0] + filled[-1] - (BOX - 1)) / 2 < 14, "nearer to the next of the nine places"
        assert not outside.any(), info["caption"]
    for shape in {shape for shape, _ in measured}:
        assert max(measured[shape, "small"], default=0) + 2 <= min(measured[shape, "big"], default=99), shape


def test_each_shape_looks_unlike_the_others():
    """The most similar of some known shapes, in outline, is of the same kind."""

    def look(shape: str, key: str) -> np.ndarray:
        scene = scenes.Scene((scenes.Group(shape, "black", "big", 1, (1, 1)),))
        mask = foreground(pictures.render(scene, random.Random(key)))
        left, top, right, bottom = Image.fromarray(mask).getbbox()
        x, y, half = (left + right) // 2, (top + bottom) // 2, (max(right - left, bottom - top) + 1) // 2
        crop = Image.fromarray(mask).convert("L").crop((x - half, y - half, x + half, y + half))
        return np.asarray(crop.resize((24, 24), Image.Resampling.BILINEAR)).astype(int)

    known = [(shape, look(shape, f"known {i}")) for shape in lexicon.SHAPES for i in range(20)]
    for shape in lexicon.SHAPES:
        for i in range(5):
            seen = look(shape, f"new {i}")
            assert min(known, key=lambda pair: np.abs(pair[1] - seen).sum())[0] == shape


def test_the_word_on_a_sign_can_be_read():
    """Compared with every word that a sign may show: the right one is the most similar."""

    def normal(ink: np.ndarray) -> np.ndarray:
        rows, columns = (np.flatnonzero((ink > ink.max() // 2).any(axis=axis)) for axis in (1, 0))
        crop = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8))
        return np.asarray(crop.resize((96, 16), Image.Resampling.BILINEAR)).astype(int)

    font = ImageFont.truetype(pictures.FONT_FOLDER / "DejaVuSans-Bold.ttf", 40)
    words = {}
    for word in facts.SIGN_WORDS:
        page = Image.new("L", (400, 60))
        ImageDraw.Draw(page).text((5, 5), word, fill=255, font=font)
        words[word] = normal(np.asarray(page))
    shown = facts.SIGN_WORDS[::3]
    n_right = 0
    for i, word in enumerate(shown):
        group = scenes.Group("sign", lexicon.COLOURS[i % 10], lexicon.SIZES[i // 10 % 2], 1, (1, 1), word)
        image = pictures.render(scenes.Scene((group,)), random.Random(i))
        rows, columns = (np.flatnonzero(foreground(image).any(axis=axis)) for axis in (1, 0))
        board = np.asarray(image.convert("L")).astype(int)[rows[0] + 2 : rows[-1] - 1, columns[0] + 2 : columns[-1] - 1]
        seen = normal(np.abs(board - np.median(board[:, 0])))
        n_right += min(words, key=lambda name: np.abs(words[name] - seen).sum()) == word
    assert n_right >= 0.95 * len(shown), f"{n_right} of {len(shown)}"


def test_outlines_stay_within_their_reach():
    for shape, points in pictures.OUTLINES.items():
        assert 0.9 < max(math.hypot(x, y) for x, y in points) < pictures._REACH + 0.005, shape


def test_colours_are_further_apart_than_they_vary():
    for name, rgb in pictures.RGB.items():
        for other, other_rgb in pictures.RGB.items():
            distance = max(abs(a - b) for a, b in zip(rgb, other_rgb, strict=True))
            assert name == other or distance > 3 * pictures.COLOUR_SPREAD, (name, other)


# --- pictures: what is said about them ------------------------------------------------------------------------------


def test_caption_and_questions_are_those_of_the_scene_that_is_drawn(made):
    for image, info in made:
        assert image.mode == "RGB" and image.size == (pictures.SIZE, pictures.SIZE)
        groups = [scenes.Group(**(group | {"cell": tuple(group["cell"])})) for group in info["groups"]]
        for group in groups:
            assert group.phrase.lower() in info["caption"].lower()
        assert 3 <= len(info["questions"]) <= pictures.QUESTIONS
        assert len({question for question, _ in info["questions"]}) == len(info["questions"])
        for question, answer in info["questions"]:
            assert true_answer(scenes.Scene(tuple(groups)), question) in (None, answer)


def test_captions_tell_pictures_as_one_reads_and_in_one_of_the_ways_of_the_world(made):
    for _, info in made:
        groups = [scenes.Group(**(group | {"cell": tuple(group["cell"])})) for group in info["groups"]]
        ways = {scenes.caption(scenes.Scene(tuple(groups)), random.Random(i)) for i in range(64)}
        assert info["caption"] in ways
        if len(groups) in (2, 4):  # of three, the one in the corner between the others is named second
            places = [info["caption"].lower().index(group.phrase.lower()) for group in groups]
            assert places == sorted(places), info["caption"]


def test_only_held_out_pictures_show_a_held_out_combination(made, split):
    shown = set()
    for _, info in made:
        found = {(g["colour"], g["shape"]) for g in info["groups"]}
        for one in info["groups"]:
            for other in info["groups"]:
                (row, column), (other_row, other_column) = one["cell"], other["cell"]
                if row == other_row and column < other_column:
                    found.add((one["shape"], "left of", other["shape"]))
                if column == other_column and row < other_row:
                    found.add((one["shape"], "above", other["shape"]))
        assert bool(found & holdout.HELD_OUT) == split
        shown |= found & holdout.HELD_OUT
    if split:
        assert shown == {*holdout.HELD_OUT_PAIRS, *holdout.HELD_OUT_RELATIONS}


# --- signs ----------------------------------------------------------------------------------------------------------


def test_words_of_the_two_splits_are_apart(lines, split):
    tokens = [signs.letters_of(token) for text in lines for token in text.split()]
    assert all(signs.held_out_word(token) == split for token in tokens if token)
    known, rare = ({token for token in tokens if token in set(words)} for words in (signs.WORDS, signs.RARE_WORDS))
    assert len(known) > (90 if split else 250)
    assert len(rare - set(signs.WORDS)) > 500 if not split else rare <= set(signs.WORDS)
    assert 0.1 < sum(map(signs.held_out_word, signs.WORDS)) / len(signs.WORDS) < 0.15


def test_fonts_of_the_two_splits_are_apart_and_each_sign_uses_its_own(split, monkeypatch):
    families = [
        {signs._face(name).font.getname()[0] for name in names} for names in (signs.FONTS, signs.HELD_OUT_FONTS)
    ]
    assert families[0].isdisjoint(families[1]) and not any("cm" in family for family in families[0])
    used = set()
    monkeypatch.setattr(signs, "render", lambda text, font, rng, varied: used.add((font, varied)))
    for i in range(200 if split else 5_000):
        signs.sign(0, i, split)
    assert used == {(font, not split) for font in (signs.HELD_OUT_FONTS if split else signs.FONTS)}


def test_the_held_out_signs_stay_those_that_earlier_figures_are_of(monkeypatch):
    """Their texts, fonts, and all that is drawn at random; the pixels also depend on Pillow."""
    found = hashlib.sha256()
    monkeypatch.setattr(signs, "render", lambda *given, **_: found.update(f"{given[:2]} {given[2].random()}".encode()))
    for i in range(1_000):
        signs.sign(0, i, unseen=True)
    assert found.hexdigest()[:16] == "5eadbf9d6af03cb8"


@pytest.mark.parametrize("name", signs.FONTS + signs.HELD_OUT_FONTS)
def test_every_font_has_every_character(name):
    font = signs._face(name).font
    missing = bytes(font.getmask("\uffff"))  # the box which stands for a glyph that is not there
    characters = signs.ALPHABET.replace(" ", "")
    glyphs = [(font.getbbox(character), bytes(font.getmask(character))) for character in characters]
    assert len(set(glyphs)) == len(characters), "two characters look the same"
    assert all(any(ink) and ink != missing for _, ink in glyphs)


def test_lines_are_short_and_of_the_alphabet(lines, split):
    for text in lines:
        assert 1 <= len(text) <= signs.MAX_CHARACTERS and text == text.strip() and "  " not in text
        assert len(text.split()) <= 5
    assert set("".join(lines)) == set(signs.ALPHABET), "each character is learned and tested"
    for pattern in ("[A-Z]{3,}", "[a-z]{3,}", r"\$\d+\.\d\d", r"\d+:\d\d", r"\d+%", r"[A-Z][a-z]+ [A-Z][a-z]+"):
        assert any(re.fullmatch(pattern, text) for text in lines), pattern


def test_signs_have_room_around_the_text_and_contrast(split):
    for i in range(N_SIGNS):
        image, text = signs.sign(0, i, split)
        width, height = image.size
        assert image.mode == "RGB" and 32 <= height <= 48 and 0.9 * height < width <= 5 * height
        rng = random.Random(i)
        font = rng.choice(signs.HELD_OUT_FONTS if split else signs.FONTS)
        ink = signs._ink(text, signs._face(font), rng, varied=not split)
        assert max(ink[0].max(), ink[-1].max(), ink[:, 0].max(), ink[:, -1].max()) < 128, "cut off"
        assert ink.max() > 160, "too faint"
        brightness = np.asarray(image.convert("L")).astype(int)
        assert np.ptp(brightness) > 60


def test_training_varies_each_font_and_a_held_out_sign_is_as_its_font_says(monkeypatch):
    for i, font in enumerate(("Roboto-Regular.ttf", "STIXGeneral.ttf")):
        face = signs._face(font)
        plain, _ = signs._flat("Room 1748", face, None)
        varied = [signs._flat("Room 1748", face, random.Random(f"{i} {n}")) for n in range(60)]
        wide = [flat.width for flat, _ in varied]
        assert min(wide) < plain.width < max(wide), "letters closer together, and further apart"
        same = [np.asarray(flat).astype(int).sum() for flat, _ in varied if flat.width == plain.width]
        ink = np.asarray(plain).astype(int).sum()
        assert min(same) < ink < max(same) and ink in same, "thinner, thicker, and as they are"
        assert all(abs(flat.width - 8 - length) <= 1 for flat, length in varied)
    given, draw = [], signs._flat
    monkeypatch.setattr(signs, "_flat", lambda text, face, rng: given.append(rng) or draw(text, face, rng))
    for unseen in (True, False):
        signs.sign(0, 0, unseen)
    assert given[0] is None and given[1] is not None


# --- both -----------------------------------------------------------------------------------------------------------


def digest(n_items: int = 15) -> str:
    found = hashlib.sha256()
    for unseen in (False, True):
        for i in range(n_items):
            image, info = pictures.picture(3, i, unseen)
            sign, text = signs.sign(3, i, unseen)
            for part in (image.tobytes(), repr(info), sign.tobytes(), text):
                found.update(part if isinstance(part, bytes) else part.encode())
    return found.hexdigest()


def test_a_picture_depends_on_its_arguments_only():
    random.seed(1)
    state = random.getstate()
    first = digest()
    assert random.getstate() == state
    code = "from test_pictures import digest; print(digest())"
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == first

    def both(seed, index, unseen=False):
        return pictures.picture(seed, index, unseen)[0].tobytes(), signs.sign(seed, index, unseen)[1]

    assert len({both(seed, index, unseen) for seed in (0, 1) for index in (0, 1) for unseen in (False, True)}) == 8


def test_saved_and_read_again_they_are_the_same_pixels(tmp_path):
    for image, saving in ((pictures.picture(0, 0)[0], pictures.SAVE), (signs.sign(0, 0)[0], signs.SAVE)):
        image.save(tmp_path / "image.png", **saving)
        with Image.open(tmp_path / "image.png") as read:
            assert read.mode == "RGB" and read.tobytes() == image.tobytes()


def test_each_class_has_as_many_captions_as_every_other():
    entries = json.loads("".join(pictures.class_captions()))
    captions = [entry["caption"] for entry in entries]
    sizes = len(lexicon.COLOURS) * len(lexicon.SHAPES) * lexicon.MAX_COUNT * len(scenes.PLACE_OF) * len(lexicon.SIZES)
    assert len(set(captions)) == len(captions) == sizes
    for name in pictures.ATTRIBUTES:
        counts = Counter(entry[name] for entry in entries)
        assert len(set(counts.values())) == 1, counts
    assert all(entry["colour"] in entry["caption"] for entry in entries)


def test_a_picture_of_one_group_of_shapes_has_its_classes():
    for index in range(60):
        _, info = pictures.picture(0, index)
        group = info["groups"][0]
        labelled = len(info["groups"]) == 1 and group["shape"] != "sign"
        assert all(info[name] == (group[name] if labelled else None) for name in pictures.ATTRIBUTES)
