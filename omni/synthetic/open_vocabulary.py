"""Sentences beyond the small world, to be read aloud: frames whose places are filled from `omni.synthetic.vocabulary`.

They are grammatical and rarely make sense, as phoneticians' sentences do, so that no word can be guessed from its
neighbours. One lemma in `HELD_OUT_ONE_IN` is held out: training never says it, in whatever form. Words of the small
world, of the frames and of numbers are never held out, as training could not do without them.
"""

import functools
import hashlib
import random
import re

from omni.common.spoken import NO_TITLE, spoken_form
from omni.synthetic import facts, lexicon, scenes, stories
from omni.synthetic.lexicon import sentence
from omni.synthetic.vocabulary import Vocabulary, lemmas, vocabulary, words_of

HELD_OUT_ONE_IN = 10
HELD_OUT_WORDS = 2  # in each held-out sentence, at least
WORDS = range(3, 15)  # of a sentence
MAX_CHARACTERS = 72  # of a sentence: about six seconds, slowly read
READABLE = re.compile(r"[A-Za-z][A-Za-z ,'-]*[A-Za-z][.?!]?")

# A place in braces is filled by one of the phrases of this name, or by a word, see `_word`.
PHRASES = {
    "sentence": (
        "{subject} {act_past} {object}.",
        "{subject} {act_past} {object} {where}.",
        "{subject} {act_past} {object} {when}.",
        "{When} {subject} {act_past} {object}.",
        "{subject} {move_past} {where}.",
        "{subject} {move_past} {how}.",
        "{subject} {move_past} {how} {where}.",
        "{one} was {adjective} and {adjective}.",
        "{one} is {adjective}, but {one} is not.",
        "{one} {act_s} {object} {often}.",
        "{many} {act} {object}.",
        "{many} are {adjective}.",
        "{one} that {act_past} {object} was {adjective}.",
        "{subject} wanted to {act} {object}.",
        "{subject} could not {act} {object}.",
        "{subject} didn't {act} {object} {when}.",
        "{subject} stopped {act_ing} {object}.",
        "{subject} {act_past} {object} and {move_past} {where}.",
        "{subject} {act_past} {object} because {one} {move_past}.",
        "While {one} {move_past}, {subject} {act_past} {object}.",
        "If {one} {act_s} {object}, {subject} will {move}.",
        "{person} said that {one} {move_s} {how}.",
        "{person} will {act} {object} {soon}.",
        "{subject} has never seen {object}.",
        "{one} looks like {object}.",
        "{one} is made of {noun}.",
        "We need {number} {things} and a {thing}.",
        "Did {subject} {act} {object}?",
        "Does {one} {move} {where}?",
        "Why did {subject} {act} {object}?",
        "Who {act_past} {object} {where}?",
        "Where is {one}?",
        "Please {act} {object} {soon}.",
        "Don't {act} {object}!",
        "Never {act} {object} without {object}.",
        "What a {adjective} {thing}!",
        "There is {object} {where}.",
        "There were {number} {things} {where}.",
        "{number} {things} {move_past} {where}.",
        "{person} has {number} {things} and a {thing}.",
        "{subject} paid {price} for {object}.",
        "The {thing} costs {price}.",
        "The {thing} weighs {number} kg.",
        "About {number}% of the {things} are {adjective}.",
        "It takes {number} hours to {act} {object}.",
        "At {time} {subject} {move_past} {where}.",
        "{person} {last_name} lives near the {thing}.",
        "{person} was born on {date}.",
        "In {year} {subject} {act_past} {object}.",
        "{one} is on page {number}.",
        "This is the {ordinal} {thing}.",
    ),
    "subject": ("{one}", "{one}", "{one}", "{many}", "{person}", "{person} and {person}", "they", "we"),
    "one": (
        "the {noun}", "the {thing}", "the {adjective} {thing}", "a {thing}", "a {adjective} {thing}", "my {thing}",
        "our {thing}", "her {noun}", "his {adjective} {noun}", "every {thing}", "this {noun}", "{person}",
    ),
    "many": (
        "the {things}", "{adjective} {things}", "some {things}", "many {things}", "the {things} and the {things}",
        "these {adjective} {things}", "all {things}",
    ),
    "object": (
        "the {noun}", "the {thing}", "the {adjective} {noun}", "a {thing}", "a {adjective} {thing}", "their {things}",
        "{number} {things}", "some {things}", "the {thing} and the {thing}", "your {noun}", "that {adjective} {thing}",
    ),
    "where": (
        "near the {thing}", "behind the {thing}", "under a {adjective} {thing}", "with the {things}",
        "beside the {noun}", "between the {things}", "around the {adjective} {thing}", "in front of a {thing}",
    ),
    "when": ("yesterday", "last week", "before noon", "on {day}", "in {month}", "after dinner", "two years ago"),
    "When": ("Yesterday", "Last night", "On {day}", "In {month}", "This morning", "Every summer", "Once"),
    "soon": ("soon", "tomorrow", "next week", "on {day}", "before midnight", "again", "now"),
    "often": ("every day", "twice a year", "most of the time", "in the evening", "at once"),
    "how": ("slowly", "quickly", "quietly", "for {number} minutes", "all night", "again and again", "carefully"),
}  # fmt: skip
_NUMBER_WORDS = "hundred thousand million percent dollar dollars cent cents kilogram kilograms clock half minus point"
# "a" before a vowel; not before one that is spoken as "you" or "one", but before an h that is silent
_AN = re.compile(
    r"\b([Aa]) (?=(?!uni(?!n|m)|use|usu|uto|eu|ewe|one\b|once|ura|ute|ubi|uku)[aeiou]|hour|heir|honest|honou?r|herb)"
)


def _word(name: str, words: Vocabulary, rng: random.Random) -> str:
    """A word or a number for a place in a frame."""
    kind, _, form = name.partition("_")
    if kind in ("act", "move"):
        return rng.choice(words.actions if kind == "act" else words.moves)[("", "past", "s", "ing").index(form)]
    if kind in ("thing", "things"):
        return rng.choice(words.things)[kind == "things"]
    choices = {
        "noun": words.nouns,
        "adjective": words.adjectives,
        "person": words.first_names,
        "last_name": words.last_names,
        "day": lexicon.DAYS,
        "month": lexicon.MONTHS,
    }
    if name in choices:
        return rng.choice(choices[name])
    if name == "number":
        return str(rng.randint(2, rng.choice((12, 99, 999))))
    if name == "year":
        return str(rng.randint(1700, 2040))
    if name == "ordinal":
        return _ordinal(rng.randint(1, 30))
    if name == "price":
        return f"${rng.randint(1, 200)}" + (f".{rng.randint(1, 99):02d}" if rng.random() < 0.3 else "")
    if name == "time":
        return f"{rng.randint(1, 12)}:{rng.choice((0, 5, 15, 20, 30, 40, 45, 55)):02d}"
    return f"{rng.choice(lexicon.MONTHS)} {rng.randint(1, 28)}, {rng.randint(1900, 2020)}"  # a date


def _ordinal(number: int) -> str:
    ending = "th" if 10 < number < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _filled(text: str, words: Vocabulary, rng: random.Random) -> str:
    def fill(match: re.Match) -> str:
        phrases = PHRASES.get(match[1])
        return _filled(rng.choice(phrases), words, rng) if phrases else _word(match[1], words, rng)

    return re.sub(r"\{(\w+)\}", fill, text)


def composed(rng: random.Random) -> str:
    """A sentence of a frame, numbers as words; any length."""
    text = _AN.sub(r"\1n ", _filled("{sentence}", vocabulary(), rng))
    return sentence(spoken_form(text), end="")


def is_readable(text: str) -> bool:
    """Whether the synthesisers can read a sentence in a few seconds: letters and , . ? ! ' - only, not too long."""
    return len(text) <= MAX_CHARACTERS and len(text.split()) in WORDS and READABLE.fullmatch(text) is not None


def open_sentence(rng: random.Random, unseen: bool = False) -> str:
    """A sentence beyond the small world. A held-out one (`unseen`) has `HELD_OUT_WORDS` held-out words or more, one of
    training has none."""
    while True:
        text = composed(rng)
        count = len(set(held_out_words(text)))
        if is_readable(text) and (count >= HELD_OUT_WORDS if unseen else not count):
            return text


_SENTENCE_ENDS = re.compile(rf"(?<=[.!?]){NO_TITLE}[\"'”’)]*\s+|[\r\n]+")
_TYPOGRAPHY = str.maketrans({"’": "'", "‘": "'", "“": "", "”": "", '"': "", "–": ",", "—": ","})


def sentences_of(text: str) -> tuple[list[str], int]:
    """The sentences of the user's text that training can read aloud, each once; how many different ones it has."""
    texts = (
        " ".join(spoken_form(part.translate(_TYPOGRAPHY)).split())
        for part in _SENTENCE_ENDS.split(text.lstrip("\ufeff"))
    )
    found = list(dict.fromkeys(filter(None, texts)))
    return [one for one in found if is_readable(one) and not held_out_words(one)], len(found)


# --- held-out words ---------------------------------------------------------------------------------------------------


@functools.cache
def kept_words() -> frozenset[str]:
    """Words that cannot be held out: those of frames, numbers and names of days, and of the small world, drawn
    often enough to meet each of its words."""
    rng = random.Random(0)
    texts = [_NUMBER_WORDS, *(re.sub(r"\{\w+\}", " ", text) for phrases in PHRASES.values() for text in phrases)]
    texts += [text for pair in facts.ANSWERS.items() for text in pair]
    texts += [text for table in vars(lexicon).values() if isinstance(table, tuple) for text in table]
    for _ in range(1_000):
        story, scene = stories.sample_story(rng), scenes.sample_scene(rng)
        texts += [*story.sentences, *(text for pair in story.questions for text in pair)]
        texts += [scenes.caption(scene, rng), *(text for pair in scenes.questions(scene, rng) for text in pair)]
    return frozenset(word for text in texts for word in words_of(text))


@functools.cache
def held_out_lemmas() -> frozenset[str]:
    """Lemmas that no sentence of training has, the same for every seed."""
    kept = {lemma for word in kept_words() for lemma in lemmas(word)}
    return frozenset(
        lemma
        for lemma in vocabulary().lemmas - kept
        if int.from_bytes(hashlib.sha256(lemma.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0
    )


def held_out_words(text: str) -> list[str]:
    """The words of a text that are forms of held-out lemmas."""
    return [word for word in words_of(text) if not lemmas(word).isdisjoint(held_out_lemmas())]
