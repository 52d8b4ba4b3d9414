"""Text of labels without invisible characters.

Soft hyphens, zero-width spaces, byte-order marks, marks of direction and variation selectors come along when text is
copied from web pages and PDF files. A model would have to learn each of them, though no picture or recording shows it.
"""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # zero-width non-joiner and joiner
# Visible characters of the category Cf (format): signs that enclose a number, the Syriac abbreviation mark, the
# Mongolian vowel separator, which changes the form of letters, and controls that arrange Egyptian hieroglyphs
VISIBLE_FORMATS = frozenset(
    map(
        chr,
        (*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x180E, 0x110BD, 0x110CD, *range(0x13430, 0x13440)),
    )
)
# Invisible characters of other categories: combining grapheme joiner, Hangul fillers, variation selectors
_FILLERS = frozenset(map(chr, (0x34F, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
_VIRAMA = 9  # combining class of the marks that join consonants in Indic scripts


class _Invisible(dict):
    """Code point -> None (removed) or itself; cached, since every label passes through here."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        control = unicodedata.category(character) == "Cc" and not character.isspace()
        hidden = unicodedata.category(character) == "Cf" and character not in VISIBLE_FORMATS
        self[code] = None if control or hidden or character in _FILLERS else code
        return self[code]


_NO_JOINERS = _Invisible()
_WITH_JOINERS = _Invisible({ord(joiner): ord(joiner) for joiner in JOINERS})


def visible(text: str) -> str:
    """A text in composed characters (NFC), without invisible ones.

    A zero-width joiner or non-joiner stays where it changes the appearance: beside a virama, between letters of Arabic
    script, and between symbols that form one emoji. (RFC 5892, appendix A, has nearly this rule.)
    """
    if text.isascii() and text.isprintable():  # nearly all labels
        return text
    text = text.translate(_WITH_JOINERS)
    return unicodedata.normalize("NFC", re.sub(f"[{JOINERS}]+", _joiner, text))


def _joiner(found: re.Match) -> str:
    """The joiner, or nothing where it changes nothing."""
    before, after = found.string[found.start() - 1 : found.start()], found.string[found.end() : found.end() + 1]
    beside_virama = any(unicodedata.combining(character) == _VIRAMA for character in before + after)
    inside = {_script(before), _script(after)} in ({"arabic"}, {"symbol"})
    return found[0][0] if beside_virama or inside else ""


def _script(character: str) -> str:
    """ "arabic" for letters and marks of Arabic script and its sisters, "symbol" for emoji, else "other"."""
    if not character:
        return "other"
    if unicodedata.bidirectional(character) == "AL" or unicodedata.name(character, "").startswith(("ARABIC", "SYRIAC")):
        return "arabic"
    return "symbol" if unicodedata.category(character) in ("So", "Sk") else "other"


def audible(text: str) -> str:
    """A text without invisible characters and joiners, which change letters' shapes but not their sounds."""
    return text.translate(_NO_JOINERS)


BLANK = re.compile(r"[^\S\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # white space that ends no line


def single_blanks(text: str) -> str:
    """A text with one blank for each stretch of white space within a line."""
    return re.sub(f"{BLANK.pattern}+", " ", text)


def clean_text(text: str) -> str:
    """The ``visible`` text with single blanks as white space, and none at the ends."""
    return " ".join(visible(text).split())
