"""Words beyond the small world: nouns, verbs, adjectives and names.

The words come from wonderwords, their forms from lemminflect, the names from Faker. Offensive words are left out by
wonderwords' own list.
"""

import functools
import importlib.resources
import re
from collections.abc import Iterator
from dataclasses import dataclass

from faker.providers.person.en_US import Provider as Names
from lemminflect import getAllLemmas, getInflection


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


# Verbs without an object, of those in wonderwords' list.
INTRANSITIVE = frozenset(
    words_of(
        "appear apologize argue arrive battle behave bleed blink blush boast bow breathe camp cheer compete "
        "complain concentrate cough crash crawl creep cry cycle dance decay disagree disappear dive dream exist "
        "fade fail flee float flow gaze glow graduate grin groan grow hesitate hop hover hum hurry itch jog joke "
        "kneel laugh leap listen march meddle moan mourn nod participate pause peep pray preside race rain recover "
        "rejoice relax remain respond retire rhyme rise roll rot rush sail scream shine shiver shrink shrug sigh "
        "sing sink sit sketch ski skip sleep slide slip smile sneak sneeze sniff snore snow sparkle speak spin "
        "sprout squeak squeal stand stare stay struggle succeed suffer sweat swell swim talk think thrive tremble "
        "trot tumble vanish wail wait wake walk wander weep whine whirl whisper whistle wink wobble work worry "
        "wrestle wriggle yawn yell zoom"
    )
)
# Verbs that fit no frame, and unpleasant ones to read about people.
UNUSED = frozenset(
    words_of(
        "abide agree alight arise arrange ascertain back be bear become beget begin behold belong bend beset bet "
        "bid bind bust consist cost decide depend do dwell end execute fare feel fit fling forego forsake get go "
        "happen harass hang have hope intend interfere jail let lie lighten live look make man mate matter mean "
        "murder must need object occur originate pine plead proceed process profess queue quit rate refer reflect "
        "regret reign rely reply rid rob sack seem set sew shed shoot sin slay slit smell smite smoke sound spare "
        "spit stick sting stink stride strip strive sublet suppose surround swear taste tend thaw tip tire tread "
        "undergo undress vex wait wed weigh wend wet wish wonder zip"
    )
)


@dataclass(frozen=True)
class Vocabulary:
    """Words by their slot in a frame, each with its lemma as the first of its forms."""

    nouns: tuple[str, ...]
    things: tuple[tuple[str, str], ...]  # nouns that can be counted, with their plurals
    actions: tuple[tuple[str, str, str, str], ...]  # verbs with an object: walk, walked, walks, walking
    moves: tuple[tuple[str, str, str, str], ...]  # verbs without
    adjectives: tuple[str, ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]

    @property
    def lemmas(self) -> set[str]:
        return {*self.nouns, *self.adjectives, *(forms[0] for forms in (*self.things, *self.actions, *self.moves))}


def _words(name: str) -> Iterator[str]:
    """The words of one of wonderwords' lists: small letters only, none of them offensive."""
    lists = importlib.resources.files("wonderwords") / "assets"
    offensive = set((lists / "profanitylist.txt").read_text(encoding="utf-8").split("\n"))
    for word in dict.fromkeys((lists / f"{name}list.txt").read_text(encoding="utf-8").split("\n")):
        if re.fullmatch("[a-z]{2,14}", word) and word not in offensive:
            yield word


def listed_words() -> tuple[str, ...]:
    """Every noun, verb and adjective, in alphabetical order."""
    return tuple(sorted({word for name in ("noun", "verb", "adjective") for word in _words(name)}))


def _form(word: str, tag: str) -> tuple[str, ...]:
    """Forms of a word that lemminflect's dictionary knows; () for others."""
    return getInflection(word, tag, inflect_oov=False)


@functools.cache
def vocabulary() -> Vocabulary:
    """All words, in the order of the lists. Made once, when it is first asked for: it takes half a second."""
    nouns = [word for word in _words("noun") if getAllLemmas(word, upos="NOUN").get("NOUN", ())[:1] == (word,)]
    # a noun without a plural, or with one like itself, is rarely counted
    things = [(word, plural[0]) for word in nouns if len(plural := _form(word, "NNS")) == 1 and plural[0] != word]
    verbs = [word for word in _words("verb") if word not in UNUSED and word in getAllLemmas(word).get("VERB", ())]
    forms = [(word, *(_form(word, tag)[0] for tag in ("VBD", "VBZ", "VBG"))) for word in verbs if _form(word, "VBD")]
    return Vocabulary(
        nouns=tuple(nouns),
        things=tuple(things),
        actions=tuple(one for one in forms if one[0] not in INTRANSITIVE),
        moves=tuple(one for one in forms if one[0] in INTRANSITIVE),
        adjectives=tuple(word for word in _words("adjective") if word in getAllLemmas(word).get("ADJ", ())),
        first_names=tuple(dict.fromkeys((*Names.first_names_female, *Names.first_names_male))),
        last_names=tuple(Names.last_names),
    )


@functools.cache
def lemmas(word: str) -> frozenset[str]:
    """What a word may be a form of: "saw" of "saw" and of "see"."""
    word = word.lower()
    return frozenset((word, *(lemma for found in getAllLemmas(word).values() for lemma in found)))
