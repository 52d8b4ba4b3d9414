"""The accuracy of VQA: short answers to questions about pictures, compared with those of ten people.

Antol et al. 2015, "VQA: Visual Question Answering"; https://visualqa.org/evaluation.html describes how answers are
normalised before they are compared. Departures from its published code, which differs from that description: both sides
are normalised alike, and hyphens and all other punctuation are blanks.
"""

import re
from collections.abc import Sequence

ENOUGH = 3  # so many people who gave an answer make it right

_ARTICLES = {"a", "an", "the"}
_DIGITS = {word: str(number) for number, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
)} | {"none": "0"}  # fmt: skip
_NEGATED = "ai are ca could did does do had has have is might must need sha should was were wo would"  # before n't
_SHORTENED = {  # not those that are words without an apostrophe: "well", "were", "its"
    "m": "i", "s": "he she that there what where when who how why", "d": "he it they there you who how where",
    "ll": "they you who what how why it", "ve": "i you we they who what where could should would might must",
    "re": "they there you what why",
}  # fmt: skip
_CONTRACTIONS = {stem + ending: f"{stem}'{ending}" for ending, stems in _SHORTENED.items() for stem in stems.split()}
_CONTRACTIONS |= {f"{stem}nt": f"{stem}n't" for stem in _NEGATED.split()}
_CONTRACTIONS |= {"oclock": "o'clock", "maam": "ma'am", "yall": "y'all"}


def normalise(answer: str) -> str:
    """An answer in lower case; without articles, periods outside numbers, and commas inside them; number words up to
    ten as digits; contractions with their apostrophe; all other punctuation but apostrophes and colons as a blank.

    "The 1,000 cats." becomes "1000 cats", "dont" becomes "don't".
    """
    text = answer.lower().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    words = (_DIGITS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def agreement(answer: str, given: Sequence[str]) -> float:
    """Each person in turn is left out, and ``answer`` earns a third for each of the others who gave it, at most 1; the
    mean of these. With ten people: 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4 or more who gave it.

    With two or three people, all others have to have given it; with one, this person: 1 or 0, as an exact measure.

    Args:
        given: one answer of each person.
    """
    equal = [normalise(answer) == normalise(text) for text in given]
    if len(equal) == 1:
        return float(equal[0])
    enough, matches = min(ENOUGH, len(equal) - 1), sum(equal)
    return sum(min(1.0, (matches - own) / enough) for own in equal) / len(equal)
