"""A small world that text, speech, pictures and signs share, and the English that describes it.

A `Scene` is what a picture shows: one to four groups of coloured shapes, perhaps a sign with a word. A `Story` is
a few sentences about people, places and animals. Both come with questions whose answers follow from them, so that
a small model can learn to answer by reading (or by looking, or by listening) and not by guessing.

Every function is pure: equal arguments and an equal `random.Random` state give equal text on every machine.

The held-out split is by *unseen combinations*: `HELD_OUT` lists pairs and triples (a purple circle; a star left of a
square; Anna in the library) which never occur in training text, although each word in them does. So a good score on
held-out text cannot come from memory. Questions mention a held-out combination only when it is true.
"""

import random
import re
from dataclasses import dataclass

# --- words ---------------------------------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
SHAPES = _words("circle square triangle star heart cross ring diamond moon arrow")
COLOURS = _words("red orange yellow green blue purple pink brown black grey")
SIZES = ("small", "big")
MAX_COUNT = 4  # shapes in one group

SHE = _words("Anna Clara Emma Grace Julia Mia Nora Olga Rosa Sara")
HE = _words("Ben David Felix Henry Leo Noah Oscar Paul Simon Tom")
PEOPLE = tuple(sorted(SHE + HE))
SHOPS = _words("market bakery shop cafe farm")
AT = {place: "at" for place in _words("market bakery station school zoo harbour theatre lake hotel")} | {
    "farm": "on", "beach": "on"
} | {place: "in" for place in _words("shop cafe library park garden kitchen museum forest office")}  # fmt: skip
PLACES = tuple(AT)
GROCERIES = _words("apple pear lemon carrot onion banana tomato potato cake cookie egg peach")
THINGS = _words("book pencil cup candle hat umbrella lamp coat clock brush key bag spoon ball box letter")
ACTIVITIES = _words("reading singing waiting sleeping working playing talking eating drawing writing dancing")
PETS = _words("dog cat rabbit horse parrot mouse hamster turtle goat duck")
PET_NAMES = _words("Max Luna Coco Teddy Lucky Bella Rocky Daisy")
TREATS = _words("cheese bread rice apples carrots bananas nuts cake soup honey")
BEDS = tuple(f"{where} the {thing}" for where in ("under", "behind") for thing in _words("table bed chair tree sofa"))

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
SEASONS = _words("spring summer autumn winter")

# --- tables of facts: each question has one answer ------------------------------------------------------------------


def _table(text: str) -> dict[str, str]:
    """'key: value; key: value' as a dict."""
    return dict(tuple(part.strip() for part in entry.split(":")) for entry in text.split(";"))


OPPOSITES = _table(
    "hot: cold; open: closed; push: pull; entrance: exit; start: stop; up: down; in: out; left: right; day: night; "
    "old: new; fast: slow; high: low; light: dark; full: empty; wet: dry; rich: poor; hard: soft; early: late; "
    "long: short; loud: quiet; clean: dirty; happy: sad; good: bad; strong: weak; thick: thin; near: far; yes: no; "
    "always: never; first: last; win: lose; buy: sell; give: take; before: after; big: small; north: south; east: west"
)
EATS = _table(
    "cow: grass; horse: hay; rabbit: grass; cat: fish; dog: meat; lion: meat; mouse: seeds; monkey: fruit; "
    "panda: bamboo; bear: berries; bee: honey; duck: plants; goat: leaves; squirrel: nuts; frog: insects; "
    "pig: vegetables; hen: corn; sheep: grass; elephant: leaves; owl: mice; spider: flies; parrot: seeds"
)
SAYS = _table(
    "cow: moo; dog: woof; cat: meow; duck: quack; sheep: baa; pig: oink; bee: buzz; owl: hoot; horse: neigh; "
    "mouse: squeak"
)
LIVES = _table(
    "bee: in a hive; lion: on the plains; monkey: in the jungle; bear: in the forest; cow: on a farm; "
    "frog: by the water; whale: in the sea; camel: in the desert; owl: in the forest; squirrel: in a tree; "
    "pig: on a farm; shark: in the sea; penguin: on the ice; spider: in a web; hen: on a farm; panda: in the mountains"
)
YOUNG = _table(
    "dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb; hen: chick; lion: cub; duck: duckling; "
    "pig: piglet; frog: tadpole; goat: kid; owl: owlet; bear: cub"
)
LEGS = _table(
    "dog: four; cat: four; cow: four; bird: two; hen: two; spider: eight; bee: six; snake: no; fish: no; horse: four; "
    "person: two; duck: two; table: four; lion: four; elephant: four; owl: two"
)
COLOUR_OF = _table(
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
USES = _table(
    "a key: opening doors; a cup: drinking; a pencil: writing; a book: reading; a bed: sleeping; a chair: sitting; "
    "a spoon: eating; an umbrella: keeping dry; a lamp: giving light; a clock: telling the time; "
    "a knife: cutting bread; a broom: cleaning the floor; a boat: crossing water; a camera: taking pictures; "
    "an oven: baking bread; a hammer: hitting nails; a coat: keeping warm; a bag: carrying things; "
    "a bridge: crossing a river; a phone: calling people"
)
JOBS = _table(
    "teacher: teaches children; baker: bakes bread; doctor: helps sick people; farmer: grows food; cook: makes meals; "
    "pilot: flies planes; driver: drives a car; singer: sings songs; painter: paints pictures; writer: writes books; "
    "gardener: plants flowers; builder: builds houses; nurse: cares for sick people; sailor: sails a ship; "
    "judge: works in a court; waiter: brings food; actor: plays in a theatre"
)
CAPITALS = _table(
    "France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; England: London; Japan: Tokyo; China: Beijing; "
    "Egypt: Cairo; Greece: Athens; Portugal: Lisbon; Austria: Vienna; Norway: Oslo; Ireland: Dublin; Canada: Ottawa"
)
COUNTS = _table(
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
SMALL_TALK = (  # (what a user may say, the one answer)
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

# Words that a sign may show: short, and all of them ordinary words of the other tables. Upper case on the sign.
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

# --- the held-out split ---------------------------------------------------------------------------------------------

# Each entry is one unseen combination. Relations are written with "left of" or "above"; "a triangle right of a circle"
# is the same fact as "a circle left of a triangle" and is held out with it.
HELD_OUT_PAIRS = (("purple", "circle"), ("green", "heart"), ("orange", "star"))
HELD_OUT_RELATIONS = (
    ("circle", "left of", "triangle"),
    ("star", "left of", "square"),
    ("ring", "left of", "moon"),
    ("heart", "above", "ring"),
    ("diamond", "above", "cross"),
    ("square", "above", "arrow"),
)
HELD_OUT_PLACES = _table(  # this person is never met at this place
    "Anna: library; Ben: station; Clara: market; David: kitchen; Emma: beach; Felix: museum; Grace: bakery; "
    "Henry: zoo; Julia: park; Leo: garden; Mia: harbour; Noah: shop; Nora: theatre; Olga: farm; Oscar: school; "
    "Paul: lake; Rosa: forest; Sara: cafe; Simon: hotel; Tom: office"
)
HELD_OUT_TREATS = _table(  # this pet never likes this food
    "dog: cheese; cat: rice; rabbit: bread; horse: carrots; parrot: apples; mouse: soup; hamster: bananas; "
    "turtle: cake; goat: honey; duck: nuts"
)
HELD_OUT = frozenset((*HELD_OUT_PAIRS, *HELD_OUT_RELATIONS, *HELD_OUT_PLACES.items(), *HELD_OUT_TREATS.items()))

_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def relation_key(shape: str, relation: str, other: str) -> tuple[str, str, str]:
    """The one spelling of a relation: with "left of" or "above"."""
    return (shape, relation, other) if relation in ("left of", "above") else (other, _INVERSE[relation], shape)


def held_out(value: "Scene | Story") -> bool:
    """Whether a scene or story belongs to the held-out split: it contains a combination of `HELD_OUT`."""
    return not HELD_OUT.isdisjoint(value.combinations)


# --- grammar --------------------------------------------------------------------------------------------------------


def plural(noun: str) -> str:
    irregular = {"mouse": "mice", "sheep": "sheep", "fish": "fish"}
    if noun in irregular:
        return irregular[noun]
    return noun + ("es" if noun.endswith(("s", "sh", "ch", "x", "to")) else "s")


def a(phrase: str) -> str:
    """`phrase` with its indefinite article; no word of this world starts with a silent h or a spoken "you"."""
    return ("an " if phrase[0].lower() in "aeiou" else "a ") + phrase


def several(count: int, noun: str) -> str:
    """'an egg', 'three eggs'."""
    return a(noun) if count == 1 else f"{NUMBERS[count]} {plural(noun)}"


def sentence(text: str, end: str = ".") -> str:
    return text[0].upper() + text[1:] + end


def listing(items: list[str]) -> str:
    """'a, b and c'."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _it(count: int) -> str:
    return "it" if count == 1 else "they"


def _there(count: int) -> str:
    return f"There {_be(count)} {NUMBERS[count] if count else 'none'}."


# --- scenes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """`count` equal shapes drawn close together, or one sign.

    `cell` is (row, column), each 0 to 2: the group fills a box of half the picture's width and height whose upper left
    corner stands at (column / 4, row / 4) of the picture. `sample_scene` uses only cells whose boxes do not overlap.
    """

    shape: str  # one of SHAPES, or "sign"
    colour: str
    size: str
    count: int
    cell: tuple[int, int]
    word: str = ""  # what a sign shows, in upper case; empty for shapes

    @property
    def noun(self) -> str:
        return self.shape if self.count == 1 else plural(self.shape)

    @property
    def phrase(self) -> str:
        """'two small red circles', 'a big blue sign that says OPEN'."""
        number = "a" if self.count == 1 else NUMBERS[self.count]
        return f"{number} {self.size} {self.colour} {self.noun}" + (f" that says {self.word}" if self.word else "")


@dataclass(frozen=True)
class Scene:
    """One picture. Groups stand in reading order, and no two of them share both colour and shape."""

    groups: tuple[Group, ...]

    @property
    def relations(self) -> list[tuple[Group, str, Group]]:
        """(group, relation, other) for every two groups in one row or in one column, both ways round.

        Groups on a diagonal have no relation: whether one is "left of" the other would be a matter of taste.
        """
        found = []
        for one in self.groups:
            for other in self.groups:
                if one.cell[0] == other.cell[0] and one.cell[1] < other.cell[1]:
                    found += [(one, "left of", other), (other, "right of", one)]
                elif one.cell[1] == other.cell[1] and one.cell[0] < other.cell[0]:
                    found += [(one, "above", other), (other, "below", one)]
        return found

    @property
    def combinations(self) -> set[tuple[str, ...]]:
        pairs = {(group.colour, group.shape) for group in self.groups}
        return pairs | {relation_key(one.shape, relation, other.shape) for one, relation, other in self.relations}

    def name(self, group: Group) -> str:
        """The shortest name that is unambiguous here: 'the circles', or 'the red circles' beside other circles."""
        alone = sum(other.shape == group.shape for other in self.groups) == 1
        return f"the {group.noun}" if alone else f"the {group.colour} {group.noun}"


PLACE_OF = {
    (0, 0): "in the top left corner", (0, 1): "at the top", (0, 2): "in the top right corner",
    (1, 0): "on the left", (1, 1): "in the centre", (1, 2): "on the right",
    (2, 0): "in the bottom left corner", (2, 1): "at the bottom", (2, 2): "in the bottom right corner",
}  # fmt: skip
_CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2))
_LAYOUTS = {  # groups -> sets of cells that do not overlap
    1: tuple((cell,) for cell in PLACE_OF),
    2: tuple(((i, 0), (i, 2)) for i in range(3)) + tuple(((0, i), (2, i)) for i in range(3)),
    3: tuple(tuple(cell for cell in _CORNERS if cell != absent) for absent in _CORNERS),
    4: (_CORNERS,),
}


def sample_scene(rng: random.Random) -> Scene:
    """A scene of one to four groups, mostly one or two; one scene in ten has a sign."""
    n_groups = rng.choices((1, 2, 3, 4), weights=(45, 40, 12, 3))[0]
    cells = rng.choice(_LAYOUTS[n_groups])
    sign = rng.randrange(n_groups) if rng.random() < 0.1 else None
    groups, taken = [], set()
    for i, cell in enumerate(cells):
        shape, colour = "sign" if i == sign else rng.choice(SHAPES), rng.choice(COLOURS)
        while (shape, colour) in taken:  # two groups of red stars would be one group to anybody who looks
            colour = rng.choice(COLOURS)
        taken.add((shape, colour))
        count = 1 if i == sign else rng.choices(range(1, MAX_COUNT + 1), weights=(4, 3, 2, 1))[0]
        word = rng.choice(SIGN_WORDS) if i == sign else ""
        groups.append(Group(shape, colour, rng.choice(SIZES), count, cell, word))
    return Scene(tuple(groups))


def _statements(scene: Scene, rng: random.Random, name, in_order: bool = False) -> list[str]:
    """Where everything is, one statement for each two groups; `name` says how a group is called the first time.

    Which of two is told to be where the other is not is drawn, or, `in_order`, as one reads: left to right, then down.
    """
    if len(scene.groups) == 1:
        group = scene.groups[0]
        return [f"{name(group)} {_be(group.count)} {PLACE_OF[group.cell]}"]
    if len(scene.groups) == 4:  # two by two: row by row, or column by column
        by_row = ((1, 2), "left of", ("at the top", "at the bottom"))
        ways = (by_row, ((2, 1), "above", ("on the left", "on the right")))
        (i, j), relation, (first, second) = ways[0] if in_order else rng.choice(ways)
        one, other, third, fourth = scene.groups[0], scene.groups[i], scene.groups[j], scene.groups[3]
        return [
            f"{first}, {name(one)} {_be(one.count)} {relation} {name(other)}",
            f"{second}, {name(third)} {_be(third.count)} {relation} {name(fourth)}",
        ]
    if len(scene.groups) == 2:
        one, relation, other = scene.relations[0] if in_order else rng.choice(scene.relations)
        return [f"{name(one)} {_be(one.count)} {relation} {name(other)}"]
    # Three corners: one group, the hub, has a neighbour in its row and one in its column.
    hub = next(group for group in scene.groups if sum(group is one for one, _, _ in scene.relations) == 2)
    neighbours = [(one, relation) for one, relation, other in scene.relations if other is hub]
    first, second = neighbours if in_order else rng.sample(neighbours, 2)
    return [
        f"{name(first[0])} {_be(first[0].count)} {first[1]} {name(hub)}",
        f"{name(second[0])} {_be(second[0].count)} {second[1]} {scene.name(hub)}",
    ]


def caption(scene: Scene, rng: random.Random, in_order: bool = False) -> str:
    """The whole scene in one sentence (two when there are four groups).

    Every attribute of every group is told. Where several groups stand is told by their relations, not by their cells.

    Args:
        in_order: as one reads, see `_statements`: what somebody would write who looks at the picture. Without it, any
            of the ways in which it can be told, the same picture in another way the next time.
    """
    statements = _statements(scene, rng, lambda group: group.phrase, in_order)
    if len(scene.groups) == 4:
        return " ".join(sentence(statement) for statement in statements)
    # "Two stars are above a ring." or "There are two stars above a ring.", but not "... a sign that says EGG above ..."
    if len(scene.groups) <= 2 and " says " not in statements[0].split(" is ")[0] and rng.random() < 0.5:
        statements = [re.sub(r"^(.*?) (is|are) ", r"there \2 \1 ", statements[0])]
    return sentence(", and ".join(statements))


def describe(scene: Scene, rng: random.Random) -> str:
    """The whole scene in two or three sentences: what there is, then where it is."""
    opening = rng.choice(("the picture shows", "I see", "here {be}", "there {be}"))
    opening = opening.format(be=_be(scene.groups[0].count))
    parts = [f"{opening} {listing([group.phrase for group in scene.groups])}"]
    if len(scene.groups) == 1:
        group = scene.groups[0]
        return " ".join(map(sentence, [*parts, f"{_it(group.count)} {_be(group.count)} {PLACE_OF[group.cell]}"]))
    return " ".join(map(sentence, parts + _statements(scene, rng, scene.name)))


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Questions about a scene with their answers, all true of it, each answered by any full caption of it.

    A question may be about something that is not there, but never about a held-out combination that is not there.
    """
    asked = []
    shapes = [group.shape for group in scene.groups]
    total = {shape: sum(group.count for group in scene.groups if group.shape == shape) for shape in shapes}

    for group in scene.groups:
        name, be, it = scene.name(group), _be(group.count), _it(group.count)
        asked.append((f"{be} {name} big or small?", f"{it} {be} {group.size}."))
        if shapes.count(group.shape) == 1:
            asked.append((f"what colour {be} {name}?", f"{it} {be} {group.colour}."))
            colour = rng.choice([c for c in COLOURS if c != group.colour and (c, group.shape) not in HELD_OUT])
            asked.append((f"{be} {name} {group.colour}?", f"yes, {it} {be}."))
            asked.append((f"{be} {name} {colour}?", f"no, {it} {be} {group.colour}."))
        else:
            asked.append((f"how many {group.colour} {plural(group.shape)} are there?", _there(group.count)))
        if sum(other.colour == group.colour for other in scene.groups) == 1:
            asked.append((f"what is {group.colour}?", f"the {group.noun}."))
        if group.word:
            asked += [("what does the sign say?", f"it says {group.word}.")] * 2
            asked.append((f"does the sign say {group.word}?", "yes, it does."))
            asked.append((f"does the sign say {rng.choice(SIGN_WORDS)}?", f"no, it says {group.word}."))
            if asked[-1][0] == asked[-2][0]:  # the wrong word was the right one
                asked.pop()
        neighbours = [(relation, other) for one, relation, other in scene.relations if one is group]
        if len(scene.groups) == 1:
            asked += [(f"where {be} {name}?", f"{it} {be} {PLACE_OF[group.cell]}.")] * 2
        elif len(neighbours) == 1:  # two true answers would make a wrong question
            relation, other = neighbours[0]  # listed often, since nothing else asks which of two it is
            asked += [(f"where {be} {name}?", f"{it} {be} {relation} {scene.name(other)}.")] * 4

    for one, relation, other in scene.relations:
        name, that, be, it = scene.name(one), scene.name(other), _be(one.count), _it(one.count)
        asked.append((f"what is {relation} {that}?", f"{one.phrase}."))
        wrong = rng.choice([r for r in _INVERSE if r != relation])
        asked.append((f"{be} {name} {relation} {that}?", f"yes, {it} {be}."))
        if relation_key(one.shape, wrong, other.shape) not in HELD_OUT:
            asked += [(f"{be} {name} {wrong} {that}?", f"no, {it} {be} {relation} {that}.")] * 2
        if one.size == "big" and other.size == "small" and (one.count == 1) == (other.count == 1):
            first, second = rng.sample([name, that], 2)
            asked.append((f"which {be} bigger, {first} or {second}?", f"{name}."))
            asked.append((f"which {be} smaller, {first} or {second}?", f"{that}."))
        if total[one.shape] > total[other.shape] and "sign" not in (one.shape, other.shape):
            first, second = rng.sample([plural(one.shape), plural(other.shape)], 2)
            asked.append((f"are there more {first} or {second}?", f"there are more {plural(one.shape)}."))

    for shape in dict.fromkeys(shapes):
        asked += [(f"how many {plural(shape)} are there?", _there(total[shape]))] * 2
        asked.append((f"is there {a(shape)}?", f"yes, {_there(total[shape]).lower()}"))
    absent = rng.choice([shape for shape in SHAPES if shape not in shapes])
    asked.append((f"is there {a(absent)}?", "no, there is not."))
    asked.append((f"how many {plural(absent)} are there?", "there are none."))
    # Right colour, right shape, but not together: this one cannot be answered by spotting words.
    taken = {(group.colour, group.shape) for group in scene.groups}
    swaps = [(group.colour, shape) for group in scene.groups for shape in (*shapes, absent)]
    for colour, shape in [rng.choice(sorted(taken))] + rng.sample(swaps, 1):
        if (colour, shape) in taken:
            count = next(group.count for group in scene.groups if (group.colour, group.shape) == (colour, shape))
            asked.append((f"is there {a(f'{colour} {shape}')}?", f"yes, {_there(count).lower()}"))
        elif (colour, shape) not in HELD_OUT:
            asked.append((f"is there {a(f'{colour} {shape}')}?", "no, there is not."))
    if sum(total.values()) <= 10 and len(scene.groups) == 2 and "sign" not in shapes:
        asked.append(("how many shapes are there?", _there(sum(total.values()))))
    return [(sentence(question, ""), sentence(answer, "")) for question, answer in asked]


# --- stories --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """A few sentences, questions that they answer, and the combinations of `HELD_OUT`'s kinds that they contain."""

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
    if rng.random() < 0.4:  # one of them moves, so the answer is not the first place that stands beside the name
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


# --- facts and small talk -------------------------------------------------------------------------------------------


def _neighbours(items: tuple[str, ...], ask: str) -> list[tuple[str, str]]:
    """What comes after and before each item of an ordered list; `ask` is 'What day'."""
    pairs = list(zip(items, items[1:], strict=False))
    after = [(f"{ask} comes after {one}?", sentence(f"{two} comes after {one}")) for one, two in pairs]
    return after + [(f"{ask} comes before {two}?", sentence(f"{one} comes before {two}")) for one, two in pairs]


def _build_facts() -> dict[str, list[tuple[str, str]]]:
    both_ways = [*OPPOSITES.items(), *((value, key) for key, value in OPPOSITES.items())]
    kinds = [(word, kind) for kind, words in KINDS.items() for word in words.split()]
    wrong = _table("fruit: animal; vegetable: fruit; animal: tool; bird: fruit; shape: bird; tool: shape")
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


FACTS = _build_facts()  # kind -> (question, answer) pairs; a table like those above, never changed
_FACT_WEIGHTS = [2 if len(pairs) > 40 else 1 for pairs in FACTS.values()]
_ABOUT = {  # animal -> all that is known about it
    animal: [
        FACTS[kind][list(table).index(animal)][1]
        for kind, table in (("eats", EATS), ("says", SAYS), ("lives", LIVES), ("young", YOUNG))
        if animal in table
    ]
    for animal in EATS
}

# What can be asked without a picture or a story -> its one answer
ANSWERS = {said: answer for sayings, answer in SMALL_TALK for said in sayings.split("|")} | {
    question: answer for pairs in FACTS.values() for question, answer in pairs
}
QUESTIONS: dict[str, list[str]] = {}  # the other way round: answer -> all that it answers
for _question, _answer in ANSWERS.items():
    QUESTIONS.setdefault(_answer, []).append(_question)


def fact(rng: random.Random) -> tuple[str, str]:
    """A question of general knowledge or arithmetic, and its one answer."""
    return rng.choice(rng.choices(list(FACTS.values()), _FACT_WEIGHTS)[0])


def small_talk(rng: random.Random) -> tuple[str, str]:
    """Something that a user of an assistant says, and what the assistant answers."""
    if rng.random() < 0.1:
        animal = rng.choice(list(_ABOUT))
        return f"Tell me about {plural(animal)}.", " ".join(_ABOUT[animal])
    said, answer = rng.choice(SMALL_TALK)
    return rng.choice(said.split("|")), answer


# --- lines of text --------------------------------------------------------------------------------------------------

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SYSTEM_PROMPT = "You are μOmni, a small and friendly assistant."


def chat(turns: list[tuple[str, str]], system: str = "") -> str:
    """(user, assistant) turns as one line in the chat format."""
    return (SYSTEM + system if system else "") + "".join(f"{USER}{u}{ASSISTANT}{s}{END}" for u, s in turns)


def draw(sample, rng: random.Random, unseen: bool) -> "Scene | Story":
    """A value of `sample(rng)` from the held-out split (`unseen`) or from the training split."""
    while held_out(value := sample(rng)) != unseen:
        pass
    return value


def _casual(question: str, rng: random.Random) -> str:
    """As typed in a hurry, or as a speech recogniser writes it: now and then without capitals and final mark."""
    return question.rstrip(".?!").lower() if rng.random() < 0.15 else question


def _dialogue(context: str, pairs: list[tuple[str, str]], rng: random.Random) -> str:
    """`context`, then two to eight different questions about it: the answers are all that can be learnt by reading."""
    chosen = list(dict.fromkeys(rng.sample(pairs, min(len(pairs), rng.randint(2, 8)))))
    turns = [(_casual(question, rng), answer) for question, answer in chosen]
    turns[0] = (f"{context} {turns[0][0]}", turns[0][1])
    return chat(turns, SYSTEM_PROMPT if rng.random() < 0.05 else "")


def _everyday(rng: random.Random) -> str:
    """A short conversation without context."""
    turns = []
    if rng.random() < 0.3:
        said, answer = rng.choice(SMALL_TALK[:4])  # the greetings
        turns.append((rng.choice(said.split("|")), answer))
    for _ in range(rng.randint(1, 3)):
        turns.append(fact(rng) if rng.random() < 0.6 else small_talk(rng))
    if rng.random() < 0.1:
        turns.append(("Tell me a story.", " ".join(draw(sample_story, rng, unseen=False).sentences)))
    turns = list(dict.fromkeys(turns))
    return chat([(_casual(u, rng), s) for u, s in turns], SYSTEM_PROMPT if rng.random() < 0.1 else "")


def text_line(rng: random.Random, unseen: bool = False) -> str:
    """One line of the text corpus: running text or, three times in four, a dialogue.

    A held-out line (`unseen`) always shows a held-out combination, a training line never does.
    """
    kinds = ("caption", "describe", "story", "scene chat", "story chat", "facts", "everyday")
    weights = (5, 5, 5, 25, 20, 0 if unseen else 12, 0 if unseen else 28)  # facts have no combinations to hold out
    kind = rng.choices(kinds, weights)[0]
    if kind == "facts":
        return " ".join(dict.fromkeys(fact(rng)[1] for _ in range(rng.randint(2, 5))))
    if kind == "everyday":
        return _everyday(rng)
    if kind in ("story", "story chat"):
        story = draw(sample_story, rng, unseen)
        told = " ".join(story.sentences)
        return told if kind == "story" else _dialogue(told, list(story.questions), rng)
    scene = draw(sample_scene, rng, unseen)
    told = describe(scene, rng) if kind == "describe" or rng.random() < 0.4 else caption(scene, rng)
    return _dialogue(told, questions(scene, rng), rng) if kind == "scene chat" else told


def spoken(rng: random.Random, unseen: bool = False, min_words: int = 5, max_words: int = 10) -> str:
    """A sentence to be read aloud: only letters, spaces and , . ? !, numbers as words.

    Training sentences are captions, first sentences of stories, facts, and questions and answers about all of these.
    A held-out one (`unseen`) shows a held-out combination, so it is a caption or the first sentence of a story.
    """
    while True:
        # most words stand in facts only, so these come oftener
        kinds = ("scene", "story") if unseen else ("scene", "story", "ask scene", "ask story", *["fact"] * 3)
        kind = rng.choice(kinds)
        if kind == "fact":
            text = rng.choice(fact(rng) if rng.random() < 0.8 else small_talk(rng))
        elif kind.endswith("scene"):
            scene = draw(sample_scene, rng, unseen)
            text = caption(scene, rng) if kind == "scene" else rng.choice(rng.choice(questions(scene, rng)))
        else:
            story = draw(sample_story, rng, unseen)
            text = story.sentences[0] if kind == "story" else rng.choice(rng.choice(story.questions))
            if unseen and not _shows(text, story):
                continue
        if min_words <= len(text.split()) <= max_words and re.fullmatch(r"[A-Za-z ,.?!]+", text):
            return text


def _shows(text: str, story: Story) -> bool:
    words = set(re.findall(r"\w+", text))
    return any(words.issuperset(combination) for combination in story.combinations & HELD_OUT)
