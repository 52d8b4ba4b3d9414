"""Texts as they are spoken: numbers, dates, times, sums of money and common abbreviations become words.

One rule after the other is tried at each place of a text, once from left to right. Each digit and each abbreviation
that is found becomes words, so nothing is left for a second time: the spoken form of a spoken form is itself. Words
with a letter or a digit of another script stay as they are.
"""

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from typing import Literal

from num2words import num2words

from omni.common.espeak import ipa_version, word_in_ipa
from omni.common.text import BLANK

Spelled = Literal["en"]
Language = Literal["en", "en-ipa"]  # the second: words as phonemes
# the descriptions of the config key by which a stage chooses
SPELLED = "language in which numbers and abbreviations are read as words; default: texts stay as they are"
TEXT_LANGUAGE = f"{SPELLED}; en-ipa: words as espeak-ng's phonemes"
_VERSION = 3  # raise it with every change of what is written
_LONGEST = 15  # digits of a number that is read as one; longer ones are read digit by digit
_OTHER_SCRIPT = re.compile("[\u0370-\u1dff\u2c00-\ua71f\ua800-\uab2f\uab70-\ufaff\ufb07-\uffff\U00010000-\U0010ffff]")


def spoken_form(text: str, language: Language | None = "en") -> str:
    """A text as it is spoken. "On May 3, 2021 Dr. Lee paid $4.50 for 3 kg." becomes "On May third, twenty twenty-one
    Doctor Lee paid four dollars and fifty cents for three kilograms."

    Args:
        language: None: the text as it is.
    """
    return "".join(piece for piece, *_ in spoken_pieces(text, language))


def spoken_pieces(text: str, language: Language | None) -> list[tuple[str, int, int]]:
    """The spoken form in pieces, each with the start and the end of the characters that it stands for. A piece of
    another length is other words, or a word's phonemes."""
    if language == "en-ipa":
        return [word for piece in spoken_pieces(text, "en") for word in _in_phonemes(*piece)]
    if language is None:
        return [(text, 0, len(text))] if text else []
    text = BLANK.sub(" ", text)  # as many characters: "5 kg" may have a no-break space
    if not _MAY_CHANGE.search(text):
        return [(text, 0, len(text))] if text else []
    pieces, done = [], 0
    for start, end in _segments(text):
        for match in _RULES.finditer(text, start, end):
            words = _HANDLERS[match.lastgroup](match)
            if match.start() > done:
                pieces.append((text[done : match.start()], done, match.start()))
            before, after = pieces[-1][0][-1] if pieces else " ", text[match.end() : match.end() + 1]
            words = " " * (before.isalnum() and words[0] != " ") + words + " " * (after.isalnum() and words[-1] != " ")
            pieces.append((words, match.start(), match.end()))
            done = match.end()
    if done < len(text):
        pieces.append((text[done:], done, len(text)))
    return pieces


def spoken_version(language: Language | None) -> dict[str, str]:
    """What spoken forms depend on beside the text, for fingerprints of data; {} where texts stay as they are."""
    if language is None:
        return {}
    version = f"{language}-{_VERSION}-{importlib.metadata.version('num2words')}"
    return {"spoken forms": f"{version}-{ipa_version()}" if language == "en-ipa" else version}


_WORD = re.compile("[^\\W\\d_](?:[^\\W\\d_]|[\u0300-\u036f])*(?:['’](?:[^\\W\\d_]|[\u0300-\u036f])+)*")


def _in_phonemes(piece: str, first: int, last: int) -> Iterator[tuple[str, int, int]]:
    """A piece of spoken form, its words as phonemes; what lies between them, and words of another script, as it is."""

    def source(index: int) -> int:
        return first + index * (last - first) // len(piece)

    done = 0
    for word in _WORD.finditer(piece):
        if _OTHER_SCRIPT.search(word[0]):
            continue
        if word.start() > done:
            yield piece[done : word.start()], source(done), source(word.start())
        yield word_in_ipa(word[0]), source(word.start()), source(word.end())
        done = word.end()
    if done < len(piece):
        yield piece[done:], source(done), last


def _segments(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of what lies between words with a letter of another script."""
    start = 0
    for word in re.finditer(r"\S+", text):
        if _OTHER_SCRIPT.search(word[0]):
            yield start, word.start()
            start = word.end()
    yield start, len(text)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _cardinal(digits: str) -> str:
    """ "1,234" as one number; what begins with a zero or is very long, digit by digit."""
    digits = digits.replace(",", "")
    if (digits[0] == "0" and len(digits) > 1) or len(digits) > _LONGEST:
        return _each(digits)
    return num2words(int(digits)).replace(",", "")


_DIGITS = [num2words(digit) for digit in range(10)]


def _each(digits: str) -> str:
    return " ".join(_DIGITS[int(digit)] for digit in digits if digit.isdigit())


def _number(digits: str) -> str:
    """A cardinal, a decimal, or a version such as 1.2.3."""
    whole, *parts = digits.split(".")
    decimals = (_each(parts[0]),) if len(parts) == 1 else map(_cardinal, parts)
    return " point ".join((_cardinal(whole) if whole else "zero", *decimals))


def _year(digits: str) -> str:
    return num2words(int(digits), to="year")


def _ordinal(digits: str) -> str:
    digits = digits.replace(",", "")
    return num2words(int(digits), to="ordinal").replace(",", "") if len(digits) <= _LONGEST else _each(digits)


def _plain(match: re.Match) -> str:
    """A number with nothing around it that says what it is; four digits may be a year."""
    digits = match["number"]
    words = _year(digits) if re.fullmatch("1[1-9][0-9]{2}|20[0-9]{2}", digits) else _number(digits)
    return ("minus " if match["minus"] else "") + words


def _plural(words: str) -> str:
    return words[:-1] + "ies" if words.endswith("y") else words + ("es" if words.endswith("x") else "s")


def _joined(match: re.Match) -> str:
    """3-5 is a range; three and more numbers, and what looks like a telephone's number, are read digit by digit."""
    parts = re.split("[-–]", match["joined"])
    if len(parts) > 2 or any(part[0] == "0" for part in parts) or [len(part) for part in parts] == [3, 4]:
        return ", ".join(map(_each, parts))
    years = all(re.fullmatch("1[1-9][0-9]{2}|20[0-9]{2}", part) for part in parts)
    return " to ".join(map(_year if years else _cardinal, parts))


_HALVES = {"½": ("1", "2"), "⅓": ("1", "3"), "⅔": ("2", "3"), "¼": ("1", "4"), "¾": ("3", "4")}


def _fraction(match: re.Match) -> str:
    above, below = _HALVES.get(match["sign"]) or (match["above"], match["below"])
    whole = _cardinal(match["whole"]) + " and " if match["whole"] else ""
    if int(above[:3]) < int(below[:3]) <= 20 and len(below) <= 2 and above[0] != "0":
        name = {"2": "half", "4": "quarter"}.get(below) or _ordinal(below)
        name = name if above == "1" else {"half": "halves"}.get(name, name + "s")
        return f"{whole}{_cardinal(above)} {name}"
    return f"{whole}{_cardinal(above)} over {_cardinal(below)}"


# --- dates, times, money, measures -----------------------------------------------------------------------------------

_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_MONTH = rf"(?:{'|'.join(_MONTHS)}|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?)"


def _month(name: str) -> str:
    return next(month for month in _MONTHS if month[:3] == name[:3])


def _iso_date(match: re.Match) -> str:
    year, month, day = match["iso_date"].split("-")
    return f"{_MONTHS[int(month) - 1]} {_ordinal(str(int(day)))} {_year(year)}"


def _month_day(match: re.Match) -> str:
    year = match["comma"] + _year(match["year"]) if match["year"] else ""
    return f"{_month(match['month'])} {_ordinal(match['day'])}{year}"


def _day_month(match: re.Match) -> str:
    year = " " + _year(match["year_after"]) if match["year_after"] else ""
    return f"{match['the'] or 'the '}{_ordinal(match['day_first'])} of {_month(match['month_after'])}{year}"


def _time(match: re.Match) -> str:
    hour, minute, second = match["hour"], match["minute"], match["second"]
    words = [num2words(int(hour))]
    if minute != "00":
        words.append(("oh " if minute[0] == "0" else "") + num2words(int(minute)))
    elif not match["half"] and not second:
        words.append("o'clock" if int(hour) <= 12 else "hundred")
    if second:
        words.append(f"and {num2words(int(second))} second" + "s" * (int(second) != 1))
    if match["half"]:
        words.append(f"{match['half'].lower()} m")
    return " ".join(words)


def _hour(match: re.Match) -> str:
    return f"{_cardinal(match['hours'])} {match['half_day'].lower()} m"


_MONEY = {"$": ("dollar", "cent"), "£": ("pound", "penny"), "€": ("euro", "cent"), "¥": ("yen", "")}


def _units(words: str, unit: str) -> str:
    """A number with its unit: one dollar, two dollars, fifty pence, three yen."""
    if words == "one" or unit == "yen":
        return f"{words} {unit}"
    return f"{words} {'pence' if unit == 'penny' else 'feet' if unit == 'foot' else unit + 's'}"


def _money(match: re.Match) -> str:
    large, small = _MONEY[match["currency"] or match["currency_after"]]
    amount, many = match["amount"] or match["amount_before"], match["many"]
    whole, _, part = amount.partition(".")
    if match["amount_from"]:
        words = _number(amount.replace(",", "")) + (f" {many}" if many else "")
        return f"{_cardinal(match['amount_from'])} to {_units(words, large)}"
    if many or "." in part or (part and (len(part) != 2 or not small)):
        words = _number(amount.replace(",", "")) + (f" {many}" if many else "")
        return _units(words, large)
    change = _units(_cardinal(str(int(part))), small) if part.strip("0") else ""
    if change and not whole.strip("0"):
        return change
    return _units(_cardinal(whole), large) + (f" and {change}" if change else "")


_MEASURES = {
    "km": "kilometer", "kg": "kilogram", "cm": "centimeter", "mm": "millimeter", "ft": "foot",
    "mph": "mile", "km/h": "kilometer", "%": "percent", "°C": "degree", "°F": "degree", "°": "degree",
}  # fmt: skip
_AFTER_MEASURE = {"mph": " per hour", "km/h": " per hour", "°C": " Celsius", "°F": " Fahrenheit"}


def _measure(match: re.Match) -> str:
    words, unit = _number(match["measured"].replace(",", "")), match["unit"]
    words = f"{_cardinal(match['measured_from'])} to {words}" if match["measured_from"] else words
    words = ("minus " if match["below_zero"] else "") + words
    return (f"{words} percent" if unit == "%" else _units(words, _MEASURES[unit])) + _AFTER_MEASURE.get(unit, "")


# --- abbreviations and signs -----------------------------------------------------------------------------------------

_TITLES = {"Mr": "Mister", "Mrs": "Missus", "Dr": "Doctor"}  # with a full stop or without
# names whose full stop ends no sentence: what a regular expression has before the blank after a sentence
NO_TITLE = "".join(
    rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Ms", "Dr", "Prof", "Capt", "Gen", "Gov", "Lt", "Sgt", "Rev", "St")
)
_DOTTED = {
    "Prof": "Professor", "Capt": "Captain", "Gen": "General", "Gov": "Governor", "Lt": "Lieutenant", "Sgt": "Sergeant",
    "Rev": "Reverend", "Jr": "Junior", "Sr": "Senior", "vs": "versus", "etc": "et cetera", "approx": "approximately",
    "dept": "department", "Ave": "Avenue", "Rd": "Road",
}  # fmt: skip
_NAME_FOLLOWS, _WORD_FOLLOWS = re.compile(r"\s+[A-Z]"), re.compile(r",|\s*\w")
_SIGNS = {"+": "plus", "=": "equals", "×": "times"}


def _abbreviation(match: re.Match) -> str:
    name = match["abbreviation"]
    if name == "St" and _NAME_FOLLOWS.match(match.string, match.end()):
        return "Saint"
    goes_on = _WORD_FOLLOWS.match(match.string, match.end())
    return _DOTTED.get(name, "Street") + ("" if goes_on else ".")  # else the full stop ends the sentence too


def _title(match: re.Match) -> str:
    goes_on = match[0][-1] != "." or _WORD_FOLLOWS.match(match.string, match.end())
    return _TITLES[match[0].rstrip(".")] + ("" if goes_on else ".")


# Numbers with and without separators. The digits are those of ASCII: [0-9], never \d.
_WHOLE = "[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+"
_ANY = rf"(?:(?:{_WHOLE})(?:\.[0-9]+)*)"
_FROM = "(?P<{}>[0-9]{{1,15}})[-–]"  # the first number of a range
_DAY = "(?:3[01]|[12][0-9]|0?[1-9])"
_NO_MORE = r"(?![0-9]|[.,:/-][0-9])"  # the number ends here
_ALONE = r"(?<![0-9])(?<![0-9][.,:/-])"  # the number begins here
# the ending that belongs to the digits before it: 1st, 11th
_ENDING = "(?:(?<=1)(?<!11)st|(?<=2)(?<!12)nd|(?<=3)(?<!13)rd|(?<=[04-9])th|(?<=1[1-3])th)"
_NO_LETTER = r"(?<![^\W\d_½⅓⅔¼¾])"
_HALF_DAY = r"(?:(?P<{}>[AaPp])(?:[Mm](?![^\W\d_½⅓⅔¼¾])|\.[Mm]\b(?:\.(?=\s+[a-z]|,))?))"

# name of a rule -> (pattern, words of a match); the pattern has a group of the rule's name around all of it
_TABLE: dict[str, tuple[str, Callable[[re.Match], str]]] = {
    "iso_date": (rf"{_ALONE}[12][0-9]{{3}}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01]){_NO_MORE}", _iso_date),
    "month_day": (
        rf"{_NO_LETTER}(?P<month>{_MONTH}) (?P<day>{_DAY}){_ENDING}?(?![^\W\d_½⅓⅔¼¾]){_NO_MORE}"
        rf"(?:(?P<comma>,? )(?P<year>[12][0-9]{{3}})(?![^\W\d_½⅓⅔¼¾]){_NO_MORE})?",
        _month_day,
    ),
    "day_month": (
        rf"(?:{_NO_LETTER}(?P<the>[Tt]he ))?{_ALONE}(?P<day_first>{_DAY}){_ENDING}? (?:of )?"
        rf"(?P<month_after>{_MONTH})(?![^\W\d_½⅓⅔¼¾])(?: (?P<year_after>[12][0-9]{{3}})(?![^\W\d_½⅓⅔¼¾]){_NO_MORE})?",
        _day_month,
    ),
    "time": (
        rf"{_ALONE}(?P<hour>2[0-3]|1[0-9]|0?[0-9]):(?P<minute>[0-5][0-9])(?::(?P<second>[0-5][0-9]))?{_NO_MORE}"
        rf"(?: ?{_HALF_DAY.format('half')})?",
        _time,
    ),
    "hour_of_day": (rf"{_ALONE}(?P<hours>1[0-2]|0?[1-9]) ?{_HALF_DAY.format('half_day')}", _hour),
    "money": (
        rf"(?:(?P<currency>[$£€¥]) ?(?:{_FROM.format('amount_from')})?(?P<amount>{_ANY})|"
        rf"(?P<amount_before>{_ANY}) ?(?P<currency_after>[$£€¥])(?![0-9]))"
        r"(?: (?P<many>thousand|million|billion|trillion)(?![^\W\d_½⅓⅔¼¾]))?",
        _money,
    ),
    "fraction": (
        rf"(?:{_ALONE}(?P<whole>[0-9]+) ?)?(?:(?P<sign>[½⅓⅔¼¾])|"
        rf"{_ALONE}(?P<above>[0-9]{{1,15}})[/⁄](?P<below>[0-9]{{1,15}}){_NO_MORE})",
        _fraction,
    ),
    "measure": (
        rf"(?P<below_zero>(?<![\w)\].])[-−])?(?:{_FROM.format('measured_from')})?(?P<measured>{_ANY}) ?"
        r"(?P<unit>(?:km/h|km|kg|cm|mm|mph|ft|°C|°F)(?![^\W\d_½⅓⅔¼¾])|[%°])",
        _measure,
    ),
    "ordinal": (rf"(?P<ordinal_digits>{_WHOLE}){_ENDING}(?![^\W\d_½⅓⅔¼¾])", lambda m: _ordinal(m["ordinal_digits"])),
    "decade": (
        r"(?P<decade_digits>[0-9]{2,4})s(?![^\W\d_½⅓⅔¼¾])",
        lambda m: _plural(
            _year(m["decade_digits"]) if len(m["decade_digits"]) == 4 else _cardinal(m["decade_digits"])
        ),
    ),
    "joined": (rf"{_ALONE}[0-9]+(?:[-–][0-9]+)+(?![0-9])", _joined),
    "numbered": (
        rf"(?:#|{_NO_LETTER}[Nn]o\.) ?(?P<numbered_digits>{_WHOLE})",
        lambda m: f"{'Number' if m[0][0] == 'N' else 'number'} {_cardinal(m['numbered_digits'])}",
    ),
    "sign_between": (r"(?<=[0-9]) ?(?P<sign_of_sum>[+=×]) ?(?=[0-9])", lambda m: f" {_SIGNS[m['sign_of_sum']]} "),
    "plain": (rf"(?P<minus>(?<![\w)\].])[-−])?(?P<number>{_ANY})", _plain),
    "and_sign": (" ?& ?", lambda m: " and "),
    "title": (rf"{_NO_LETTER}(?:Mrs?|Dr)(?![^\W\d_½⅓⅔¼¾])\.?", _title),
    "dotted": (rf"{_NO_LETTER}(?P<abbreviation>{'|'.join([*_DOTTED, 'St'])})\.", _abbreviation),
}  # fmt: skip
_HANDLERS = {name: handler for name, (_, handler) in _TABLE.items()}
_RULES = re.compile("|".join(f"(?P<{name}>{pattern})" for name, (pattern, _) in _TABLE.items()))
_MAY_CHANGE = re.compile(rf"[0-9½⅓⅔¼¾&]|Mr|Dr|(?:{'|'.join([*_DOTTED, 'St'])})\.")
