"""Pictures of lines of text, like photographs of signs, labels and pages, for the OCR stage.

Every function is pure: a sign depends on (seed, index, unseen) only.

The held-out split is by words and by fonts: a hash of a token's letters and digits decides the token's split
(`held_out_word`), and `HELD_OUT_FONTS` are never used in training. A held-out sign has held-out tokens only.
"""

import math
import random
import re
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from omni.synthetic import facts, fonts, lexicon, vocabulary

# px is a pixel of the finished image; the text is drawn at twice the resolution.
HEIGHT = (32, 48)  # px
MAX_CHARACTERS = 16  # longer lines could not be read at 32 x 160
SAVE = {"format": "PNG", "compress_level": 2}  # for Image.save: 6 saves a tenth of the bytes for twice the time

FONTS = tuple(name for families in fonts.TRAINING.values() for names in families for name in names)
HELD_OUT_FONTS = fonts.HELD_OUT
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 .,:;!?'-+&%$/#@()"

# --- words ----------------------------------------------------------------------------------------------------------

# Words on signs, labels, doors and packets, beside those of the world's tables.
_MORE_WORDS = """
    access address adult airport alarm alley alone arrivals avenue award baggage balcony bank bar barber basement
    basket bath battery bay bicycle bill black board boarding boat bottle box break brick broken building bus business
    button cabin call camera camping candy card care cargo cash castle caution centre chapel charge check child church
    cinema city class classic clinic coach coast coffee college common concert contact control cool corner cotton
    council counter country court cream credit crossing customer cycle daily danger dance data deep delivery dental
    departures desk diet dinner direct doctor door double drink drive dust earth east edge electric elevator email
    emergency energy engine enter escape estate event exact express extra factory family fashion ferry field film final
    fire first fitness flash flight floor forward fountain fragile free fresh friend front fuel gallery game gate
    general gift glass gold grand grill ground group guard guest guide gym half hall hand harvest health heavy height
    helmet hill history holiday home hospital hour house hybrid image inch info inside island item jacket jazz job
    journey juice jump junction keep kids king kiosk lane large laundry lawn leather legal level library lift limit
    linen liquid local locker lounge low luggage lunch machine magic mail main major manager maple marine maximum
    medium member menu metal metro midnight mini minimum mixed mobile model modern money motor mountain movie natural
    network news noise notice nurse ocean offer olive onward option orange order organic original oven over oxygen pack
    page paint palace panel paper parade parcel parking part party pass path patient pay pedestrian pepper permit pet
    petrol pharmacy photo piano picnic pier pilot pizza plan plastic platform plaza please plus pocket point police
    pool port post power premium press price print private product project public pump purse quality quarter queen
    queue quick radio rail rain ramp ready recipe record recycle reduce refund region rental repair report reserved
    rest return ring road rock roof room route royal rules safe safety sale salon salt sample sand school score sea
    seat second secret security self senior series service seven sewing shelf shelter ship shore show shower side sign
    silk silver sister site size skin sky slope smoke snack snow soap social sound south space special speed sport
    square staff stage stairs stamp star steam steel step stock stone storage street strike studio style sugar suit
    super supply surface sweet swim switch system tax taxi tea team tennis test ticket timber toilet token toll tomato
    tool total touch tour tower town track trade traffic trail train travel tree trial truck tunnel turn twelve unit
    upper urban urgent user valley value van vault vegan vehicle velvet video view village vintage visit voice volume
    waiting walk wall ward warm warning wash waste watch way weekend weight west wheel white wide wild window wine
    winner wireless wood wool work world yard year yellow yoga young zebra zone
"""


def _world_words() -> set[str]:
    """Every word of the world's tables, in lower case."""
    lists = (
        lexicon.NUMBERS, lexicon.SHAPES, lexicon.COLOURS, lexicon.SIZES, lexicon.PEOPLE, lexicon.PLACES,
        lexicon.GROCERIES, lexicon.THINGS, lexicon.ACTIVITIES, lexicon.PETS, lexicon.PET_NAMES, lexicon.TREATS,
        lexicon.DAYS, lexicon.MONTHS, lexicon.SEASONS, facts.SIGN_WORDS,
    )  # fmt: skip
    tables = (
        facts.OPPOSITES, facts.EATS, facts.SAYS, facts.LIVES, facts.YOUNG, facts.COLOUR_OF, facts.KINDS, facts.USES,
        facts.JOBS, facts.CAPITALS,
    )  # fmt: skip
    texts = [text for words in lists for text in words]
    texts += [text for table in tables for pair in table.items() for text in pair]
    return {word.lower() for text in texts for word in re.findall("[A-Za-z]{2,}", text)}


def letters_of(token: str) -> str:
    """A token's letters and digits, in lower case: 'OPEN!', 'Open' and '(open)' are one word."""
    return re.sub("[^a-z0-9]", "", token.lower())


def held_out_word(token: str) -> bool:
    """Whether a token belongs to the held-out split: one in eight does, by a fixed hash."""
    return zlib.crc32(letters_of(token).encode()) % 8 == 0


WORDS = tuple(sorted(_world_words() | set(_MORE_WORDS.split())))  # both splits, lower case
_WORDS_OF = {split: tuple(w for w in WORDS if held_out_word(w) == split) for split in (False, True)}
# Training shows thousands more, so that the decoder learns to read words and not to guess them.
RARE_WORDS = tuple(w for w in vocabulary.listed_words() if len(w) <= MAX_CHARACTERS and not held_out_word(w))

# --- text -----------------------------------------------------------------------------------------------------------

# Syllables and letters that hardly ever form offensive words.
_ONSETS, _VOWELS, _CODAS = (
    sounds.split()
    for sounds in (
        "b bl br ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sk sl sp st t th tr v w y z",
        "a a e e i i o o ai ea ee oo ou",
        "b d ft k l ll m n nd ng p r rd rk rn s st t",
    )
)
_CLEAR = "BCDFGHJKLMNPQRTVWXYZ"  # capitals and, below, digits that look like no other character
_CLEAR_DIGITS = "23456789"
# A word of these letters alone looks the same in capitals: no other letter gives the height.
_SAME_IN_CAPITALS = frozenset("cosuvwxz0")


def _word(rng: random.Random, unseen: bool) -> str:
    if not unseen and rng.random() < 0.7:
        return rng.choice(RARE_WORDS)
    return rng.choice(_WORDS_OF[unseen])


def _syllable(rng: random.Random) -> str:
    coda = rng.choice(_CODAS) if rng.random() < 0.8 else ""
    return rng.choice(_ONSETS) + rng.choice(_VOWELS) + coda


def _made_up(rng: random.Random, unseen: bool) -> str:
    """An invented, pronounceable word: it can be read, but not guessed."""
    syllables = [_syllable(rng) for _ in range(rng.randint(2, 3))]
    return "".join(syllables)[:9]


def _code(rng: random.Random, unseen: bool) -> str:
    """'KX47', 'B-209': no letter predicts the next one."""
    letters = "".join(rng.choices(_CLEAR, k=rng.randint(1, 4)))
    digits = "".join(rng.choices(_CLEAR_DIGITS, k=rng.randint(1, 4)))
    return rng.choice((letters + digits, f"{letters}-{digits}", digits + letters))


def _figure(rng: random.Random, unseen: bool) -> str:
    """A number, a price, a time, a percentage, a date."""
    n = rng.choice((rng.randint(0, 99), rng.randint(100, 9999)))
    return rng.choice(
        (
            f"{n}",
            f"${n % 100}.{rng.randint(0, 99):02}",
            f"{n % 100}.{rng.randint(0, 99):02}",
            f"{n % 24}:{rng.randint(0, 59):02}",
            f"{n % 100}%",
            f"{n % 31 + 1}/{rng.randint(1, 12)}",
            f"#{n}",
            f"+{n}",
            f"{n}-{n + rng.randint(1, 20)}",
        )
    )


_TOKENS = (_word, _made_up, _figure, _code)
# The characters of figures and codes are the hardest to tell apart, as no word helps: training shows more of them.
_WEIGHTS = {False: (50, 16, 20, 14), True: (62, 16, 14, 8)}


def _token(rng: random.Random, unseen: bool) -> str:
    kind = rng.choices(_TOKENS, weights=_WEIGHTS[unseen])[0]
    while held_out_word(token := kind(rng, unseen)) != unseen:
        pass
    return token


def _write(tokens: list[str], rng: random.Random) -> str:
    """The tokens as one line: in capitals, small letters, or with initial capitals; sometimes with punctuation."""
    style = rng.choice(("upper", "upper", "lower", "title", "first"))
    words = []
    for i, token in enumerate(tokens):
        if style == "upper":
            token = token.upper()
        elif token.islower() and (style == "title" or (style == "first" and i == 0)):
            token = token.capitalize()
        words.append(token)
    if rng.random() < 0.8:
        return " ".join(words)
    if len(words) == 1:
        return rng.choice(("{}!", "{}.", "{}?", "({})", "{}:", "'{}'")).format(words[0])
    ending = rng.choice(("{}, {}", "{} & {}", "{}: {}", "{} - {}", "{} / {}", "{}; {}", "{} @ {}", "{} {}!", "{} {}?"))
    return " ".join([*words[:-2], ending.format(*words[-2:])])


def line(rng: random.Random, unseen: bool) -> str:
    """One to four tokens in at most `MAX_CHARACTERS` characters: mostly words, some figures and codes."""
    while True:
        n_tokens = rng.choices((1, 2, 3, 4), weights=(45, 35, 14, 6))[0]
        text = _write([_token(rng, unseen) for _ in range(n_tokens)], rng)
        if len(text) <= MAX_CHARACTERS and not _SAME_IN_CAPITALS.issuperset(letters_of(text)):
            return text


# --- drawing --------------------------------------------------------------------------------------------------------

_FONT_PX = 64  # all fonts are drawn at this size, which the transform to the image then changes
_MAX_ASPECT = 5.0  # width / height; wider lines are condensed


@dataclass(frozen=True)
class _Face:
    """A font at `_FONT_PX`; top of its tallest letters and bottom of its lowest, px from the top of the line."""

    font: ImageFont.FreeTypeFont
    top: int
    bottom: int


@cache
def _face(name: str) -> _Face:
    if name == "Aileron":
        font = ImageFont.load_default(_FONT_PX)
    else:
        # the basic layout: other layouts depend on the machine
        font = ImageFont.truetype(fonts.font_file(name), _FONT_PX, layout_engine=ImageFont.Layout.BASIC)
    _, top, _, bottom = font.getbbox("Hdg(%/")
    return _Face(font, int(top), int(bottom))


def _flat(text: str, face: _Face, rng: random.Random | None) -> tuple[Image.Image, float]:
    """The text in white on black from column 4 on, and its length, px; with ``rng``, in a variation of the font."""
    spacing = rng.uniform(-0.03, 0.15) * _FONT_PX if rng is not None and rng.random() < 0.4 else 0
    left, _, right, _ = face.font.getbbox(text)
    length = right - left + spacing * (len(text) - 1)
    flat = Image.new("L", (round(length) + 8, face.bottom + 16))
    draw = ImageDraw.Draw(flat)
    if spacing:
        for i, character in enumerate(text):
            x = face.font.getlength(text[: i + 1]) - face.font.getlength(character)
            draw.text((4 - left + x + i * spacing, 0), character, fill=255, font=face.font)
    else:
        draw.text((4 - left, 0), text, fill=255, font=face.font)
    if rng is not None and rng.random() < 0.5:
        flat = _reshaped(flat, rng)
    return flat, length


def _reshaped(flat: Image.Image, rng: random.Random) -> Image.Image:
    """Strokes of one direction thicker or, by a pixel, thinner: fonts differ in the contrast between their strokes."""
    ink, axis, thicker = np.array(flat), rng.randrange(2), rng.random() < 0.7
    for _ in range(rng.randint(1, 4) if thicker else 1):
        ink = ink if axis == 0 else ink.T
        ink[1:] = np.maximum(ink[1:], ink[:-1]) if thicker else np.minimum(ink[1:], ink[:-1])
        ink = ink if axis == 0 else ink.T
    return Image.fromarray(ink)


def _ink(text: str, face: _Face, rng: random.Random, *, varied: bool = False) -> np.ndarray:
    """(height, width) int32, 255 where the image has ink: the text turned, slanted, in perspective, blurred; and, if
    ``varied``, in a variation of the font."""
    height = 2 * rng.randint(*HEIGHT)
    flat, length = _flat(text, face, rng if varied else None)
    span = face.bottom - face.top

    steepest = min(4.0, 24 / len(text))  # degrees; a rotated long line takes much height
    angle = math.radians(rng.uniform(-steepest, steepest))
    stretch = rng.uniform(0.85, 1.2)
    margin = height * rng.uniform(0.2, 0.5)
    # the scale at which the rotated line fills this share of the height
    scale = height * rng.uniform(0.64, 0.82) / (span + stretch * length * math.sin(abs(angle)))
    stretch = min(stretch, (_MAX_ASPECT * height - 2 * margin) / (length * scale))
    width = 2 * round((stretch * length * scale + 2 * margin) / 2)

    # From a pixel of the image, relative to its centre, to a pixel of the flat text, relative to the line's centre:
    # x' = (a x + b y) / (1 + g x + h y), and y' likewise.
    cos, sin, slant = math.cos(angle), math.sin(angle), rng.uniform(-0.12, 0.12)
    a, b = (cos - slant * sin) / (scale * stretch), (sin + slant * cos) / (scale * stretch)
    d, e = -sin / scale, cos / scale
    g, h = rng.uniform(-0.1, 0.1) / width, rng.uniform(-0.1, 0.1) / height
    centre_x, centre_y = 4 + length / 2, (face.top + face.bottom) / 2
    x, y = width / 2, height / 2 + height * rng.uniform(-0.03, 0.03)
    a, b, d, e = a + g * centre_x, b + h * centre_x, d + g * centre_y, e + h * centre_y
    origin = 1 - g * x - h * y  # the denominator at the image's corner, which Pillow requires to be 1
    c, f = centre_x - (a * x + b * y), centre_y - (d * x + e * y)
    coefficients = [value / origin for value in (a, b, c, d, e, f, g, h)]
    ink = flat.transform((width, height), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
    ink = np.asarray(ink.reduce(2).filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 0.7)))).astype(np.int32)

    weight, contrast = rng.randint(-16, 60), rng.randint(64, 96)  # lighter or bolder strokes, softer or harder edges
    return np.clip((ink - 128) * contrast // 64 + 128 + weight * np.minimum(ink, 64) // 64, 0, 255)


def _brightness(rgb: tuple[int, ...]) -> int:
    return (299 * rgb[0] + 587 * rgb[1] + 114 * rgb[2]) // 1000


def _colours(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ink, background), far enough apart in brightness to be read."""
    while True:
        ink, background = (tuple(rng.randint(0, 255) for _ in range(3)) for _ in range(2))
        if abs(_brightness(ink) - _brightness(background)) >= 90:
            return ink, background


def _coarse(width: int, height: int, cell: int, rng: random.Random) -> np.ndarray:
    """(height, width) int16 noise in -128 to 127 that changes smoothly over `cell` px."""
    columns, rows = -(-width // cell) + 1, -(-height // cell) + 1
    noise = Image.frombytes("L", (columns, rows), rng.randbytes(columns * rows))
    return np.asarray(noise.resize((width, height), Image.Resampling.BILINEAR)).astype(np.int16) - 128


def render(text: str, font: str, rng: random.Random, *, varied: bool = False) -> Image.Image:
    """A line of text on a plain, shaded or grainy background: RGB, `HEIGHT` high and as wide as the text needs.

    Args:
        varied: letters may stand apart, and their strokes be thicker or thinner than the font's.
    """
    mask = _ink(text, _face(font), rng, varied=varied)[:, :, None]
    height, width, _ = mask.shape
    ink, background = (np.array(rgb, dtype=np.int32) for rgb in _colours(rng))
    image = background + (ink - background) * mask // 255
    if rng.random() < 0.5:  # uneven light
        image += (_coarse(width, height, 32, rng) * rng.randint(4, 28) // 128)[:, :, None]
    if rng.random() < 0.5:  # a rough surface
        image += (_coarse(width, height, 2, rng) * rng.randint(2, 20) // 128)[:, :, None]
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def sign(seed: int, index: int, unseen: bool = False) -> tuple[Image.Image, str]:
    """One line of text and its picture.

    Args:
        unseen: held-out words in a held-out font; otherwise neither.

    Returns:
        the image, RGB, 32 to 48 px high and at most `_MAX_ASPECT` times as wide, saved with `SAVE`; and the text, 1 to
        `MAX_CHARACTERS` characters of `ALPHABET`.
    """
    rng = random.Random(f"sign {'held-out' if unseen else 'train'} {seed} {index}")
    text = line(rng, unseen)
    font = rng.choice(HELD_OUT_FONTS) if unseen else _training_font(rng)
    return render(text, font, rng, varied=not unseen), text


def _training_font(rng: random.Random) -> str:
    kind = rng.choices(tuple(fonts.KINDS), weights=tuple(fonts.KINDS.values()))[0]
    return rng.choice(rng.choice(fonts.TRAINING[kind]))
