"""Numbers, dates, times, money and abbreviations become words, the same in whatever stage a text is read."""

import importlib.metadata
import random
import re
import shutil
import subprocess
import sys

import espeakng_loader
import numpy as np
import pytest
from harness import ROOT
from stages import AUDIO_ENC
from test_config import only_error

from omni.common.errors import BadRow
from omni.common.spoken import spoken_form, spoken_pieces, spoken_version
from omni.models.aligner import TEXT_END, text_symbols
from omni.stages.audio_encoder import read_text
from omni.stages.tasks.processor import speech_bytes

SPOKEN = {
    "There are 3 cats and 1,234 dogs.": "There are three cats and one thousand two hundred and thirty-four dogs.",
    "1984, 2021 and 1905": "nineteen eighty-four, twenty twenty-one and nineteen oh-five",
    "the 1980s and the 90s": "the nineteen eighties and the nineties",
    "3.14, 1.2.3 and -5": "three point one four, one point two point three and minus five",
    "the 1st, the 22nd and the 13th": "the first, the twenty-second and the thirteenth",
    "On May 3, 2021.": "On May third, twenty twenty-one.",
    "3 May 2021 and Jan. 5": "the third of May twenty twenty-one and January fifth",
    "the 4th of July": "the fourth of July",
    "2021-05-03": "May third twenty twenty-one",
    "5:30 and 17:05, 5:00 or 12:05 p.m.": "five thirty and seventeen oh five, five o'clock or twelve oh five p m.",
    "at 5pm or 9 a.m. sharp": "at five p m or nine a m sharp",
    "$4.50, $1 and $0.50": "four dollars and fifty cents, one dollar and fifty cents",
    "£1.01, 5€ and ¥300": "one pound and one penny, five euros and three hundred yen",
    "$3.5 million": "three point five million dollars",
    "20%, 5 kg and -3°C": "twenty percent, five kilograms and minus three degrees Celsius",
    "5-10%, 3–4 kg and $5-10": "five to ten percent, three to four kilograms and five to ten dollars",
    "$5-10 million": "five to ten million dollars",
    "She saw the Dr. of Main St.": "She saw the Doctor of Main Street.",
    "at 60 mph": "at sixty miles per hour",
    "2½ cups, 3/4 and 22/7": "two and one half cups, three quarters and twenty-two over seven",
    "1914-1918 and pages 3-5": "nineteen fourteen to nineteen eighteen and pages three to five",
    "555-1234": "five five five, one two three four",
    "007": "zero zero seven",
    "1212121212121212": " ".join(["one two"] * 8),
    "B2B, mp3 and 3D": "B two B, mp three and three D",
    "Dr. Lee, Mr Fox and Mrs. Orr": "Doctor Lee, Mister Fox and Missus Orr",
    "St. Paul in Main St. with pens, etc.": "Saint Paul in Main Street with pens, et cetera.",
    "R&B & No. 5, 3 + 4": "R and B and Number five, three plus four",
}  # fmt: skip
ALPHABET = list("0123456789" * 2 + "   abMrDSt.,.:/-–%$€&#+=°½²αé章٣'\u200b_") + [
    "Mr", "Dr", "May ", "Jan. ", "etc.", " pm", "p.m.", "th", "st ", "St.", "km", "s ", "No. ", " million", "5:30",
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 14))) for _ in range(count)]


@pytest.mark.parametrize(("text", "spoken"), SPOKEN.items())
def test_what_is_written_is_read_as_a_person_reads_it(text, spoken):
    assert spoken_form(text) == spoken


def test_a_spoken_form_is_its_own_spoken_form_and_has_no_digit_left():
    for text in [*SPOKEN, *random_texts(20_000)]:
        spoken = spoken_form(text)
        assert spoken_form(spoken) == spoken, text
        if not re.search("[α章٣]", text):
            assert not re.search("[0-9½]", spoken), text


def test_no_letter_is_lost():
    for text in random_texts(20_000):
        letters = [letter for letter in re.sub("Mrs|[Nn]o\\.", "", text).lower() if letter.isalpha()]
        spoken = iter(spoken_form(text).lower())
        assert all(letter in spoken for letter in letters), text


def test_texts_without_numbers_stay_as_they_are():
    for text in ("It was his; she said no.", "  two  words ", "Straße, naïve, “quoted” – or not…", "", "e.g. this"):
        assert spoken_form(text) == text


@pytest.mark.parametrize("text", ["第3章", "на 5-й день", "اليوم ٣", "५ दिन", "μ2", "٣"])
def test_other_scripts_and_their_digits_stay_as_they_are(text):
    assert spoken_form(re.sub(r"\s+5-й", " 5й", text)) == re.sub(r"\s+5-й", " 5й", text)
    assert spoken_form(f"3 {text.split()[0]}").startswith("three ")


def test_without_a_language_no_digit_becomes_an_english_word():
    for text in [*SPOKEN, "Es kostet 3 Euro."]:
        assert spoken_form(text, None) == text
    assert spoken_version(None) == {}


PHONEMES = {
    "The cat sat on 3 mats.": "ðə kˈæt sˈæt ˈɔn θɹˈiː mˈæts.",
    "Hello, Dr. Lee!": "həlˈoʊ, dˈɑːktɚ lˈiː!",
    "It's Anna’s well-known dog?": "ɪts ˈænəz wˈɛl-nˈoʊn dˈɑːɡ?",
    "FBI": "ˌɛfbˌiːˈaɪ",
    "東京 tea": "東京 tˈiː",
    "cafe\u0301, caf\u00e9": "kæfˈeɪ, kæfˈeɪ",
    "don\u02bct Nguyễn": "dˈoʊnt nˈuːjɛn",
    "hə, tea": "hə, tˈiː",
}  # fmt: skip


def test_a_line_break_is_no_blank():
    assert spoken_form("Meet in May\n3 dogs came.") == "Meet in May\nthree dogs came."
    for text in ("Chapter 3\n1/2 cup", "May \n 3 dogs", "a\n\n 5 kg"):
        assert len(speech_bytes(text, "en")) == len(text_symbols(text, "en")) - 1
    assert spoken_form("a\tb\u00a0c\nd", None) == "a\tb\u00a0c\nd"


@pytest.mark.parametrize("blank", ["\u00a0", "\u202f", "\u2009", "\t"])
@pytest.mark.parametrize("language", ["en", "en-ipa"])
def test_any_white_space_is_a_blank(blank, language):
    for text in ("5 kg", "May 3", "at 5 p.m. or so", "3 1/2 cups"):
        assert spoken_form(text.replace(" ", blank), language) == spoken_form(text, language)
        assert speech_bytes(text.replace(" ", "\t"), language) == speech_bytes(text, language)
        several = text.replace(" ", f" {blank} ")
        assert text_symbols(several, language) == text_symbols(text, language)
        assert len(speech_bytes(several, language)) == len(text_symbols(text, language)) - 1
        assert read_text({"text": several}, "en") == read_text({"text": text}, "en")


def test_words_are_read_as_phonemes_and_all_else_stays():
    for text, phonemes in PHONEMES.items():
        assert spoken_form(text, "en-ipa") == phonemes
    assert spoken_form("a" * 51, "en-ipa") == "a" * 51
    assert spoken_version("en-ipa") != spoken_version("en")
    assert importlib.metadata.version("espeakng-loader") in spoken_version("en-ipa")["spoken forms"]


@pytest.mark.parametrize(
    ("folder", "removed", "words"),
    [("data", "phontab", "does not start"), ("data", "en_dict", "dictionary"), ("x" * 160, None, "at most 159 bytes")],
)
def test_espeak_without_its_data_is_one_error(tmp_path, folder, removed, words):
    data = tmp_path / folder
    shutil.copytree(espeakng_loader.get_data_path(), data)
    if removed:
        (data / removed).unlink()
    script = f"""
import espeakng_loader
espeakng_loader.get_data_path = lambda: {str(data)!r}
from omni.common.errors import UserError
from omni.common.spoken import spoken_form
try:
    print(spoken_form("hello", "en-ipa"))
except UserError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0 and words in found.stdout, found


def test_the_phonemes_of_a_word_have_the_bytes_of_that_word():
    text = "red cats, 20"
    symbols, at = text_symbols(text, "en-ipa")[:-1], speech_bytes(text, "en-ipa")
    assert bytes(symbols).decode() == "ɹˈɛd kˈæts, twˈɛnti"
    own = [text.encode()[byte] for byte in at]
    spaces = [index for index, symbol in enumerate(symbols) if symbol == ord(" ")]
    assert set(own[: spaces[0]]) <= set(b"red") and set(own[spaces[0] + 1 : spaces[1]]) <= set(b"cats,")
    assert set(own[spaces[1] + 1 :]) <= set(b"20")


def test_a_recogniser_writes_letters(tmp_path):
    only_error(AUDIO_ENC.training(tmp_path, text_language="en-ipa").run(), 'key "text_language"', "'en'")


@pytest.mark.parametrize("language", ["en", "en-ipa"])
def test_pieces_cover_the_text_and_make_its_spoken_form(language):
    for text in [*SPOKEN, *random_texts(5_000)]:
        pieces = spoken_pieces(text, language)
        assert "".join(piece for piece, *_ in pieces) == spoken_form(text, language)
        assert [start for _, start, _ in pieces] == [0, *(end for *_, end in pieces[:-1])][: len(pieces)]
        assert not pieces or pieces[-1][2] == len(text)


def test_long_texts_take_no_longer_than_their_length():
    for text in ("1" * 10**5, "1-" * 10**4, "1," * 10**4, "& " * 10**4, "a" * 10**6, "etc. " * 10**4):
        assert spoken_form(spoken_form(text)) == spoken_form(text)


# --- the stages -----------------------------------------------------------------------------------------------------


def test_a_digit_and_its_word_are_one_target_in_stage_b_and_the_same_symbols_in_stage_d():
    for written, spoken in SPOKEN.items():
        assert read_text({"text": written}, "en") == read_text({"text": spoken}, "en")
        assert text_symbols(written, "en") == text_symbols(spoken, "en") == text_symbols(spoken)
    assert read_text({"text": "3"}, None) == "3" and text_symbols("3") == [ord("3"), TEXT_END]
    with pytest.raises(BadRow):
        read_text({"text": "..."}, "en")


@pytest.mark.parametrize("language", ["en", "en-ipa"])
def test_each_byte_that_is_spoken_has_a_byte_of_what_is_written(language):
    for text in [*SPOKEN, *random_texts(3_000)]:
        at = speech_bytes(text, language)
        symbols = text_symbols(text, language)[:-1]
        assert len(at) == len(symbols), text
        assert all(np.diff(at) >= 0)
        own = [text.encode()[byte] for byte in speech_bytes(text)]
        assert own == text_symbols(text)[:-1], text
    text = "a 25 b"
    assert bytes(text.encode()[byte] for byte in speech_bytes(text, "en")) == b"a 22222255555 b"


def test_another_language_or_another_version_in_the_same_folder_is_refused(tmp_path):
    training = AUDIO_ENC.training(tmp_path, max_steps=2, text_language="en")
    training.finish()
    only_error(training.changed(max_steps=4, text_language=None).run(), 'text_language: "en" -> null')
    newer = "import omni.common.spoken\nomni.common.spoken._VERSION = 99\n"
    only_error(training.changed(max_steps=4).run(prelude=newer), "data (spoken forms): en-", "-> en-99")
    longer = "import importlib.metadata as packages\nversion = packages.version\n"
    longer += "packages.version = lambda name: version(name) + '.1' * (name == 'num2words')\n"
    only_error(training.changed(max_steps=4).run(prelude=longer), ".1. Use")  # whole: its end tells the two apart
    training.changed(max_steps=4).finish()
