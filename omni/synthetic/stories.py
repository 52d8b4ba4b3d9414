"""Stories: a few sentences about people, places and animals, with questions and answers."""

import random
from dataclasses import dataclass

from omni.synthetic.facts import SIGN_WORDS
from omni.synthetic.holdout import HELD_OUT
from omni.synthetic.lexicon import (
    ACTIVITIES,
    AT,
    BEDS,
    COLOURS,
    DAYS,
    GROCERIES,
    NUMBERS,
    PEOPLE,
    PET_NAMES,
    PETS,
    PLACES,
    SHE,
    SHOPS,
    THINGS,
    TREATS,
    a,
    plural,
    sentence,
    several,
)


@dataclass(frozen=True)
class Story:
    """A few sentences, (question, answer) pairs about them, and their combinations of the kinds in `HELD_OUT`."""

    sentences: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    combinations: frozenset[tuple[str, str]]


def _pronoun(person: str) -> str:
    return "she" if person in SHE else "he"


def _where(place: str) -> str:
    return f"{AT[place]} the {place}"


def _another_place(person: str, places: list[str], rng: random.Random) -> str:
    """A place for a question whose answer is no: not one of `places`, and not held out for `person`."""
    return rng.choice([p for p in PLACES if p not in places and (person, p) not in HELD_OUT])


def _errand(rng: random.Random) -> Story:
    person, place, day = rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(DAYS)
    get, got = ("buy", "bought") if place in SHOPS else ("find", "found")
    thing, other, absent = rng.sample(GROCERIES + THINGS if place in SHOPS else THINGS, 3)
    count, one = rng.randint(2, 10), _pronoun(person)
    elsewhere = _another_place(person, [place], rng)
    when = rng.choice((f"On {day} {person} went to the {place}.", f"{person} went to the {place} on {day}."))
    goods = f"{several(count, thing)} and {a(other)}"
    return Story(
        (when, sentence(f"{one} {got} {goods}")),
        (
            (f"Where did {person} go?", sentence(f"{one} went to the {place}")),
            (f"Who went to the {place}?", f"{person} did."),
            (f"When did {person} go to the {place}?", f"On {day}."),
            (f"What did {person} {get}?", sentence(f"{one} {got} {goods}")),
            (f"How many {plural(thing)} did {person} {get}?", sentence(f"{one} {got} {NUMBERS[count]}")),
            (f"Did {person} {get} {a(other)}?", f"Yes, {one} did."),
            (f"Did {person} {get} {a(absent)}?", f"No, {one} did not."),
            (f"Did {person} go to the {elsewhere}?", f"No, {one} went to the {place}."),
        ),
        frozenset({(person, place)}),
    )


def _pet(rng: random.Random) -> Story:
    person, animal, treat = rng.choice(PEOPLE), rng.choice(PETS), rng.choice(TREATS)
    colour, name, bed = rng.choice(("black", "white", "brown", "grey")), rng.choice(PET_NAMES), rng.choice(BEDS)
    wrong = rng.choice([t for t in TREATS if t != treat and (animal, t) not in HELD_OUT])
    one = _pronoun(person)
    more = [f"Its name is {name}.", f"It sleeps {bed}."]
    rng.shuffle(more)
    return Story(
        (f"{person} has a {colour} {animal} that likes {treat}.", *more),
        (
            (f"What animal does {person} have?", sentence(f"{one} has {a(animal)}")),
            (f"Who has {a(animal)}?", f"{person} does."),
            (f"What does the {animal} like?", f"It likes {treat}."),
            (f"Does the {animal} like {wrong}?", f"No, it likes {treat}."),
            (f"What is the name of the {animal}?", f"Its name is {name}."),
            (f"What colour is the {animal}?", f"It is {colour}."),
            (f"Where does the {animal} sleep?", f"It sleeps {bed}."),
        ),
        frozenset({(animal, treat)}),
    )


def _whereabouts(rng: random.Random) -> Story:
    people, places = rng.sample(PEOPLE, 2), rng.sample(PLACES, 3)
    doing = rng.sample(ACTIVITIES, 2)
    told = [f"{p} is {d} {_where(place)}." for p, d, place in zip(people, doing, places, strict=False)]
    now = dict(zip(people, places, strict=False))
    asked = [(f"What is {p} doing?", sentence(f"{_pronoun(p)} is {d}")) for p, d in zip(people, doing, strict=False)]
    combinations = set(now.items())
    if rng.random() < 0.4:  # one of them moves, so the answer is not the first place beside the name
        mover = rng.choice(people)
        told.append(f"Then {mover} goes to the {places[2]}.")
        asked = [(f"Where was {mover} before?", sentence(f"{_pronoun(mover)} was {_where(now[mover])}"))]
        now[mover] = places[2]
        combinations.add((mover, places[2]))
    for person, place in now.items():
        asked.append((f"Where is {person} now?", sentence(f"{_pronoun(person)} is {_where(place)}")))
        asked.append((f"Who is {_where(place)} now?", f"{person} is."))
        asked.append((f"Is {person} {_where(place)} now?", f"Yes, {_pronoun(person)} is."))
        elsewhere = _another_place(person, [place], rng)
        asked.append((f"Is {person} {_where(elsewhere)} now?", sentence(f"no, {_pronoun(person)} is {_where(place)}")))
    return Story(tuple(told), tuple(asked), frozenset(combinations))


def _sum(rng: random.Random) -> Story:
    person, friend = rng.sample(PEOPLE, 2)
    place = rng.choice(SHOPS)
    thing, had = rng.choice(GROCERIES + THINGS), rng.randint(2, 6)
    one, her = _pronoun(person), "her" if person in SHE else "him"
    if rng.random() < 0.5:
        change = rng.randint(1, 4)
        then, now = f"Then {friend} gave {her} {NUMBERS[change]} more.", had + change
        who = (f"Who gave {person} more {plural(thing)}?", f"{friend} did.")
    else:
        change = rng.randint(1, min(had, 4))
        then, now = sentence(f"{one} gave {NUMBERS[change]} of them to {friend}"), had - change
        who = (f"Who got {plural(thing)} from {person}?", f"{friend} did.")
    has = sentence(f"{one} has {NUMBERS[now] if now else 'none'}")
    left = (f"How many {plural(thing)} does {person} have now?", has)
    return Story(
        (f"{person} bought {NUMBERS[had]} {plural(thing)} {_where(place)}.", then),
        (left, left, (f"How many {plural(thing)} did {person} buy?", sentence(f"{one} bought {NUMBERS[had]}")), who),
        frozenset({(person, place)}),
    )


def _gift(rng: random.Random) -> Story:
    giver, receiver = rng.sample(PEOPLE, 2)
    thing, colour, place = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(PLACES)
    told = f"{giver} gave {a(f'{colour} {thing}')} to {receiver} {_where(place)}."
    asked = (
        (f"Who has the {thing} now?", f"{receiver} does."),
        (f"Who gave the {thing} to {receiver}?", f"{giver} did."),
        (f"What did {giver} give to {receiver}?", sentence(a(f"{colour} {thing}"))),
        (f"What colour is the {thing}?", f"It is {colour}."),
        (f"Where did {giver} meet {receiver}?", sentence(_where(place))),
    )
    return Story((told, f"{receiver} was very happy."), asked, frozenset({(giver, place), (receiver, place)}))


def _notice(rng: random.Random) -> Story:
    person, place = rng.choice(PEOPLE), rng.choice(PLACES)
    word, colour = rng.choice(SIGN_WORDS), rng.choice(COLOURS)
    one = _pronoun(person)
    told = (f"{person} sees {a(f'{colour} sign')} {_where(place)}.", f"The sign says {word}.")
    asked = (
        ("What does the sign say?", f"It says {word}."),
        (f"What does {person} see?", sentence(f"{one} sees {a(f'{colour} sign')}")),
        (f"Where is {person}?", sentence(f"{one} is {_where(place)}")),
        ("What colour is the sign?", f"It is {colour}."),
    )
    return Story(told, asked, frozenset({(person, place)}))


def sample_story(rng: random.Random) -> Story:
    return rng.choice((_errand, _pet, _whereabouts, _sum, _gift, _notice))(rng)
