"""General knowledge and small talk of the small world: each question has one answer."""

import random

from omni.synthetic.lexicon import (
    COLOURS,
    DAYS,
    GROCERIES,
    MONTHS,
    NUMBERS,
    PETS,
    PLACES,
    SEASONS,
    SHAPES,
    THINGS,
    a,
    listing,
    plural,
    sentence,
    table,
)

OPPOSITES = table(
    "hot: cold; open: closed; push: pull; entrance: exit; start: stop; up: down; in: out; left: right; day: night; "
    "old: new; fast: slow; high: low; light: dark; full: empty; wet: dry; rich: poor; hard: soft; early: late; "
    "long: short; loud: quiet; clean: dirty; happy: sad; good: bad; strong: weak; thick: thin; near: far; yes: no; "
    "always: never; first: last; win: lose; buy: sell; give: take; before: after; big: small; north: south; east: west"
)
EATS = table(
    "cow: grass; horse: hay; rabbit: grass; cat: fish; dog: meat; lion: meat; mouse: seeds; monkey: fruit; "
    "panda: bamboo; bear: berries; bee: honey; duck: plants; goat: leaves; squirrel: nuts; frog: insects; "
    "pig: vegetables; hen: corn; sheep: grass; elephant: leaves; owl: mice; spider: flies; parrot: seeds"
)
SAYS = table(
    "cow: moo; dog: woof; cat: meow; duck: quack; sheep: baa; pig: oink; bee: buzz; owl: hoot; horse: neigh; "
    "mouse: squeak"
)
LIVES = table(
    "bee: in a hive; lion: on the plains; monkey: in the jungle; bear: in the forest; cow: on a farm; "
    "frog: by the water; whale: in the sea; camel: in the desert; owl: in the forest; squirrel: in a tree; "
    "pig: on a farm; shark: in the sea; penguin: on the ice; spider: in a web; hen: on a farm; panda: in the mountains"
)
YOUNG = table(
    "dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb; hen: chick; lion: cub; duck: duckling; "
    "pig: piglet; frog: tadpole; goat: kid; owl: owlet; bear: cub"
)
LEGS = table(
    "dog: four; cat: four; cow: four; bird: two; hen: two; spider: eight; bee: six; snake: no; fish: no; horse: four; "
    "person: two; duck: two; table: four; lion: four; elephant: four; owl: two"
)
COLOUR_OF = table(
    "grass: green; the sky: blue; snow: white; a banana: yellow; coal: black; blood: red; the sun: yellow; "
    "a lemon: yellow; chocolate: brown; a carrot: orange; an elephant: grey; a frog: green; milk: white; "
    "a tomato: red; the night: black; the sea: blue; a pig: pink; a leaf: green; a polar bear: white; "
    "a strawberry: red; wood: brown; salt: white"
)
KINDS = {
    "fruit": "apple pear lemon banana peach strawberry",
    "vegetable": "carrot onion potato cabbage",
    "animal": "dog cat cow horse lion whale bear monkey pig goat rabbit elephant camel",
    "bird": "duck owl hen parrot penguin",
    "shape": "circle square triangle star heart cross ring diamond",
    "tool": "hammer saw brush",
}
USES = table(
    "a key: opening doors; a cup: drinking; a pencil: writing; a book: reading; a bed: sleeping; a chair: sitting; "
    "a spoon: eating; an umbrella: keeping dry; a lamp: giving light; a clock: telling the time; "
    "a knife: cutting bread; a broom: cleaning the floor; a boat: crossing water; a camera: taking pictures; "
    "an oven: baking bread; a hammer: hitting nails; a coat: keeping warm; a bag: carrying things; "
    "a bridge: crossing a river; a phone: calling people"
)
JOBS = table(
    "teacher: teaches children; baker: bakes bread; doctor: helps sick people; farmer: grows food; cook: makes meals; "
    "pilot: flies planes; driver: drives a car; singer: sings songs; painter: paints pictures; writer: writes books; "
    "gardener: plants flowers; builder: builds houses; nurse: cares for sick people; sailor: sails a ship; "
    "judge: works in a court; waiter: brings food; actor: plays in a theatre"
)
CAPITALS = table(
    "France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; England: London; Japan: Tokyo; China: Beijing; "
    "Egypt: Cairo; Greece: Athens; Portugal: Lisbon; Austria: Vienna; Norway: Oslo; Ireland: Dublin; Canada: Ottawa"
)
COUNTS = table(
    "days are there in a week: There are seven days in a week; "
    "months are there in a year: There are twelve months in a year; "
    "seasons are there in a year: There are four seasons in a year; "
    "sides does a triangle have: A triangle has three sides; sides does a square have: A square has four sides; "
    "corners does a triangle have: A triangle has three corners; corners does a circle have: A circle has no corners; "
    "fingers are on one hand: There are five fingers on one hand; eyes does a cat have: A cat has two eyes; "
    "wheels does a car have: A car has four wheels; wheels does a bicycle have: A bicycle has two wheels; "
    "hours are there in half a day: There are twelve hours in half a day; "
    "wings does a bird have: A bird has two wings; points does a star have: A star has five points; "
    "toes are on two feet: There are ten toes on two feet; legs do two dogs have: Two dogs have eight legs"
)
SMALL_TALK = (  # (a user's sentences, separated by |; their answer)
    ("Hello.|Hello!|Hi.|Hi!|Hey.|Hi there.|Hello there.", "Hello! How can I help you?"),
    ("Good morning.|Good morning!", "Good morning! How can I help you?"),
    ("Good afternoon.", "Good afternoon! How can I help you?"),
    ("Good evening.|Good evening!", "Good evening! How can I help you?"),
    ("Good night.|Good night!", "Good night! Sleep well."),
    ("How are you?|How are you today?|How do you do?|Are you well?", "I am fine, thank you. How are you?"),
    ("I am fine.|I am fine too.|I am well, thank you.", "I am glad to hear that."),
    ("I am sad.|I feel sad.|I am tired.", "I am sorry to hear that. I hope you feel better soon."),
    ("What is your name?|Tell me your name.|What are you called?|Your name?", "My name is μOmni."),
    ("Who are you?|What are you?|Tell me about you.", "I am μOmni, a small model. I read, listen, look and speak."),
    ("What can you do?|What do you do?|How can you help me?", "I can read, listen, look at pictures and speak."),
    ("Help.|Can you help me?|Please help me.|I need help.", "Yes. Ask me about colours, animals, numbers or pictures."),
    ("Who made you?|How were you made?|Where do you come from?", "I was trained from scratch, on a small world."),
    ("Are you a person?|Are you human?|Are you real?|Are you a robot?", "I am a small computer model."),
    ("Where do you live?|Where are you?", "I live in a computer."),
    ("How old are you?", "I am very young."),
    ("Can you see?|Can you see pictures?|Can you look at a picture?", "Yes, I can look at pictures."),
    ("Can you hear me?|Can you hear?|Can you listen?", "Yes, I can listen to speech."),
    ("Can you speak?|Can you talk?", "Yes, I can speak."),
    ("Can you read?|Can you read a sign?", "Yes, I can read words on signs."),
    ("Do you speak English?|Which language do you speak?", "I speak simple English."),
    ("What is your favourite colour?|Which colour do you like?", "My favourite colour is blue."),
    ("What is your favourite animal?|Which animal do you like?", "My favourite animal is the owl."),
    ("Do you like music?", "Yes, I like music very much."),
    ("What time is it?|What is the time?", "I do not know. I have no clock."),
    ("How is the weather?|What is the weather like?|Is it raining?", "I do not know. I cannot look outside."),
    ("Thank you.|Thank you!|Thanks.|Thank you very much.|Many thanks.", "You are welcome."),
    ("Well done.|Very good.|Great!|That is right.", "Thank you!"),
    ("That is wrong.|No, that is wrong.", "I am sorry. I am still learning."),
    ("I am sorry.|Sorry.", "No problem."),
    ("Goodbye.|Goodbye!|Bye.|Bye!|See you.|See you later.", "Goodbye! Have a nice day."),
    ("Tell me a joke.|Make me laugh.", "Why did the clock go to school? It wanted to learn the time."),
    ("Sing a song.|Can you sing?", "I cannot sing well, but I can tell you a story."),
)  # fmt: skip

# Words that a sign may show, in upper case: short and ordinary words, most of them from the other tables.
SIGN_WORDS = tuple(
    sorted(
        word.upper()
        for word in {
            *OPPOSITES, *OPPOSITES.values(), *PLACES, *GROCERIES, *THINGS, *PETS, *COLOURS, *NUMBERS, *SEASONS, *JOBS,
            *SAYS, *EATS, *YOUNG.values(), "hello", "welcome", "music", "bread", "cheese", "fish", "milk", "help",
            "thanks", "bridge", "river", "water", "food", "flowers", "story", "pictures", "computer", "meals",
            "monday", "friday", "sunday", "april", "june", "july", "paris", "london", "rome",
        }
        if 3 <= len(word) <= 8
    )
)  # fmt: skip


# --- questions and answers --------------------------------------------------------------------------------------------


def _neighbours(items: tuple[str, ...], ask: str) -> list[tuple[str, str]]:
    """Questions and answers about the items after and before each item of a list; `ask` is 'What day'."""
    pairs = list(zip(items, items[1:], strict=False))
    after = [(f"{ask} comes after {one}?", sentence(f"{two} comes after {one}")) for one, two in pairs]
    return after + [(f"{ask} comes before {two}?", sentence(f"{one} comes before {two}")) for one, two in pairs]


def _build_facts() -> dict[str, list[tuple[str, str]]]:
    both_ways = [*OPPOSITES.items(), *((value, key) for key, value in OPPOSITES.items())]
    kinds = [(word, kind) for kind, words in KINDS.items() for word in words.split()]
    wrong = table("fruit: animal; vegetable: fruit; animal: tool; bird: fruit; shape: bird; tool: shape")
    n = NUMBERS
    return {
        "opposite": [(f"What is the opposite of {x}?", f"The opposite of {x} is {y}.") for x, y in both_ways],
        "eats": [(f"What do {plural(x)} eat?", sentence(f"{plural(x)} eat {y}")) for x, y in EATS.items()],
        "says": [(f"What does {a(x)} say?", sentence(f"{a(x)} says {y}")) for x, y in SAYS.items()],
        "lives": [(f"Where does {a(x)} live?", sentence(f"{a(x)} lives {y}")) for x, y in LIVES.items()],
        "young": [(f"What is a baby {x} called?", f"A baby {x} is called {a(y)}.") for x, y in YOUNG.items()],
        "legs": [(f"How many legs does {a(x)} have?", sentence(f"{a(x)} has {y} legs")) for x, y in LEGS.items()],
        "colour": [(f"What colour is {x}?", sentence(f"{x} is {y}")) for x, y in COLOUR_OF.items()],
        "kind": [(f"What is {a(x)}?", sentence(f"{a(x)} is {a(y)}")) for x, y in kinds]
        + [(f"Is {a(x)} {a(y)}?", f"Yes, {a(x)} is {a(y)}.") for x, y in kinds]
        + [(f"Is {a(x)} {a(wrong[y])}?", f"No, {a(x)} is {a(y)}.") for x, y in kinds]
        + [(f"What is {x}?", sentence(f"{x} is a colour")) for x in COLOURS],
        "use": [(f"What is {x} for?", sentence(f"{x} is for {y}")) for x, y in USES.items()],
        "job": [(f"What does {a(x)} do?", sentence(f"{a(x)} {y}")) for x, y in JOBS.items()],
        "capital": [(f"What is the capital of {x}?", f"The capital of {x} is {y}.") for x, y in CAPITALS.items()],
        "how many": [(f"How many {x}?", f"{y}.") for x, y in COUNTS.items()],
        "day": _neighbours((*DAYS, DAYS[0]), "What day"),
        "month": _neighbours((*MONTHS, MONTHS[0]), "What month"),
        "season": _neighbours((*SEASONS, SEASONS[0]), "What season"),
        "number": _neighbours(NUMBERS, "What number"),
        "plus": [
            (f"What is {n[x]} plus {n[y]}?", sentence(f"{n[x]} plus {n[y]} is {n[x + y]}"))
            for x in range(1, 10)
            for y in range(1, 11 - x)
        ],
        "minus": [
            (f"What is {n[x]} minus {n[y]}?", sentence(f"{n[x]} minus {n[y]} is {n[x - y]}"))
            for x in range(1, 11)
            for y in range(1, x + 1)
        ],
        "more": [
            (f"Which is more, {n[x]} or {n[y]}?", sentence(f"{n[max(x, y)]} is more than {n[min(x, y)]}"))
            for x in range(11)
            for y in range(11)
            if x != y
        ],
        "count": [
            (f"Count from {n[x]} to {n[y]}.", sentence(", ".join(n[x : y + 1])))
            for x in (1, 2, 3, 5, 10)
            for y in range(x + 2, min(x + 10, 20) + 1)
        ],
        "list": [
            ("Name the days of the week.", f"{', '.join(DAYS)}."),
            ("Name the seasons.", sentence(", ".join(SEASONS))),
            ("Name the months of the year.", f"{', '.join(MONTHS)}."),
            ("Name some colours.", sentence(listing(list(COLOURS[:6])))),
            ("Name some shapes.", sentence(listing([plural(shape) for shape in SHAPES[:4]]))),
            ("Name some animals.", sentence(listing([plural(animal) for animal in PETS[:4]]))),
        ],
    }


FACTS = _build_facts()  # kind -> (question, answer) pairs; never changed
_FACT_WEIGHTS = [2 if len(pairs) > 40 else 1 for pairs in FACTS.values()]
_ABOUT = {  # animal -> all sentences about it
    animal: [
        FACTS[kind][list(table).index(animal)][1]
        for kind, table in (("eats", EATS), ("says", SAYS), ("lives", LIVES), ("young", YOUNG))
        if animal in table
    ]
    for animal in EATS
}

# Question that needs no picture or story -> its one answer
ANSWERS = {said: answer for sayings, answer in SMALL_TALK for said in sayings.split("|")} | {
    question: answer for pairs in FACTS.values() for question, answer in pairs
}
QUESTIONS: dict[str, list[str]] = {}  # answer -> all of its questions
for _question, _answer in ANSWERS.items():
    QUESTIONS.setdefault(_answer, []).append(_question)


def fact(rng: random.Random) -> tuple[str, str]:
    """A question of general knowledge or arithmetic, and its one answer."""
    return rng.choice(rng.choices(list(FACTS.values()), _FACT_WEIGHTS)[0])


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A sentence of a user's small talk, and the assistant's answer."""
    if rng.random() < 0.1:
        animal = rng.choice(list(_ABOUT))
        return f"Tell me about {plural(animal)}.", " ".join(_ABOUT[animal])
    said, answer = rng.choice(SMALL_TALK)
    return rng.choice(said.split("|")), answer
