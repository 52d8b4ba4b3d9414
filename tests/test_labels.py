"""Invisible characters are neither written nor spoken, and part no words, in whatever stage a label is read."""

import sys
import unicodedata

import pytest

from omni.common.text import JOINERS, VISIBLE_FORMATS, audible, clean_text, visible
from omni.data.tokenizer import Tokenizer
from omni.models.aligner import text_symbols
from omni.models.ctc import normalise_text
from omni.stages.captions import encode_caption
from omni.stages.tasks.base import normalise_answer
from omni.stages.tasks.processor import speech_bytes

FORMATS = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) == "Cf"]
SELECTORS = [*map(chr, range(0xFE00, 0xFE10)), "\U000e0100", "\u034f", "\u3164"]
INVISIBLE = [c for c in FORMATS if c not in VISIBLE_FORMATS] + SELECTORS + ["\x00", "\x7f", "\x9f"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["one red cat"]), 300)


def test_every_invisible_character_leaves_no_trace(tokenizer):
    assert len(INVISIBLE) > 150 and {"\u00ad", "\u200b", "\u200e", "\u2060", "\ufeff", *JOINERS} <= set(INVISIBLE)
    for c in INVISIBLE:
        for text in (f"r{c}ed cat", f"{c}red cat", f"red cat{c}", f"red{c} {c}cat", f"{c}{c}red c{c}at"):
            assert visible(text) == clean_text(text) == audible(text) == "red cat", ascii(text)
            assert normalise_text(text) == normalise_answer(text) == "red cat", ascii(text)
            assert text_symbols(text) == text_symbols("red cat"), ascii(text)
            assert [text.encode()[byte] for byte in speech_bytes(text)] == text_symbols("red cat")[:-1], ascii(text)
            assert encode_caption(tokenizer, text, 64) == encode_caption(tokenizer, "red cat", 64), ascii(text)
        assert clean_text(f"e{c}\u0301") == "\u00e9", "composed where nothing stands between any more"


def test_formats_that_are_seen_stay():
    assert len(VISIBLE_FORMATS) == 30
    for c in VISIBLE_FORMATS:
        assert clean_text(f"a{c}b") == visible(f"a{c}b") == f"a{c}b"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None),  # Persian: the letters would join
        ("\u0915\u094d\u200d\u0937", None),  # Devanagari: a half form
        ("\u0dc1\u0dca\u200d\u0dbb\u0dd3", None),  # Sinhala: a ligature
        ("\U0001f469\u200d\U0001f680", None),  # one emoji of two
        ("\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f3f3\u200d\U0001f308"),
        ("\u0645\u200c", "\u0645"),  # nothing follows
        ("a\u200d\U0001f680", "a\U0001f680"),
        ("\u0915\u094d\u200d\u200d\u0937", "\u0915\u094d\u200d\u0937"),
    ],
)
def test_joiners_stay_where_they_change_what_is_seen_and_are_never_heard(text, seen):
    assert visible(text) == (seen or text) == visible(visible(text))
    assert not set(JOINERS) & set(audible(text) + normalise_text(text))


def test_a_text_of_joiners_takes_no_longer_than_another():
    assert visible("a" + "\u200d" * 10**6 + "b" + "\u200c\u00ad" * 10**5) == "ab"
