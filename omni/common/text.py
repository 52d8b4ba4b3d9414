"""Text of labels: what cannot be seen or heard is not written, and does not part words.

Soft hyphens, zero-width spaces, byte-order marks, marks of direction and variation selectors come along when text is
copied from web pages and PDF files. Left in a label, each would be a character to learn, one that no picture or
recording shows.
"""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # zero-width non-joiner and joiner
# Of the category Cf (format), and to be seen all the same: signs that enclose a number, the Syriac abbreviation mark,
# the Mongolian vowel separator, which gives letters another form, and what places Egyptian hieroglyphs in a block
VISIBLE_FORMATS = frozenset(
    map(
        chr,
        (*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x180E, 0x110BD, 0x110CD, *range(0x13430, 0x13440)),
    )
)
# Invisible, and of other categories: combining grapheme joiner, Hangul fillers, variation selectors
_FILLERS = frozenset(map(chr, (0x34F, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
_VIRAMA = 9  # the combining class of the marks that join consonants in scripts of India and its neighbours


class _Invisible(dict):
    """Code point -> None (left out) or itself; decided when first met, since every label passes through here."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        control = unicodedata.category(character) == "Cc" and not character.isspace()
        hidden = unicodedata.category(character) == "Cf" and character not in VISIBLE_FORMATS
        self[code] = None if control or hidden or character in _FILLERS else code
        return self[code]


_NO_JOINERS = _Invisible()
_WITH_JOINERS = _Invisible({ord(joiner): ord(joiner) for joiner in JOINERS})


def visible(text: str) -> str:
    """What of a text can be seen: composed characters (NFC), without invisible ones.

    A zero-width joiner or non-joiner stays where it changes what is seen: beside a virama, between letters of Arabic
    script, and between symbols, which are one emoji together. (RFC 5892, appendix A, has nearly this rule.)
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
    """A text without invisible characters, joiners too: they change letters' shapes, never their sounds."""
    return text.translate(_NO_JOINERS)


def clean_text(text: str) -> str:
    """What a picture of a text can tell: ``visible``, white space as single blanks, none at the ends."""
    return " ".join(visible(text).split())
