"""Scenes, the contents of pictures, with captions, and questions whose answers follow from the scene."""

import random
import re
from dataclasses import dataclass

from omni.synthetic.facts import SIGN_WORDS
from omni.synthetic.holdout import HELD_OUT, INVERSE, relation_key
from omni.synthetic.lexicon import COLOURS, MAX_COUNT, NUMBERS, SHAPES, SIZES, a, listing, plural, sentence


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _it(count: int) -> str:
    return "it" if count == 1 else "they"


def _there(count: int) -> str:
    return f"There {_be(count)} {NUMBERS[count] if count else 'none'}."


@dataclass(frozen=True)
class Group:
    """`count` equal shapes drawn close together, or one sign.

    `cell` is (row, column), each 0 to 2: the group fills a box of half the picture's width and height whose upper left
    corner is at (column / 4, row / 4) of the picture. `sample_scene` uses only cells whose boxes do not overlap.
    """

    shape: str  # one of SHAPES, or "sign"
    colour: str
    size: str
    count: int
    cell: tuple[int, int]
    word: str = ""  # word on a sign, in upper case; empty for shapes

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
    """The groups of one picture, in reading order; no two of them share both colour and shape."""

    groups: tuple[Group, ...]

    @property
    def relations(self) -> list[tuple[Group, str, Group]]:
        """(group, relation, other) for every two groups in one row or in one column, in both directions.

        Groups on a diagonal have no relation, since "left of" would be ambiguous.
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
        """The group's shortest unambiguous name: 'the circles', or 'the red circles' beside other circles."""
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
        while (shape, colour) in taken:  # two groups of red stars would look like one
            colour = rng.choice(COLOURS)
        taken.add((shape, colour))
        count = 1 if i == sign else rng.choices(range(1, MAX_COUNT + 1), weights=(4, 3, 2, 1))[0]
        word = rng.choice(SIGN_WORDS) if i == sign else ""
        groups.append(Group(shape, colour, rng.choice(SIZES), count, cell, word))
    return Scene(tuple(groups))


def _statements(scene: Scene, rng: random.Random, name, in_order: bool = False) -> list[str]:
    """The positions of all groups, one statement for each two; `name(group)` is a group's name at first mention.

    The subject of a statement is random or, with `in_order`, the first in reading order: left to right, then down.
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

    It tells every attribute of every group, and the position of several groups by their relations, not by their cells.

    Args:
        in_order: in reading order, see `_statements`; if False, one of all possible captions at random.
    """
    statements = _statements(scene, rng, lambda group: group.phrase, in_order)
    if len(scene.groups) == 4:
        return " ".join(sentence(statement) for statement in statements)
    # "Two stars are above a ring." or "There are two stars above a ring.", but not "... a sign that says EGG above ..."
    if len(scene.groups) <= 2 and " says " not in statements[0].split(" is ")[0] and rng.random() < 0.5:
        statements = [re.sub(r"^(.*?) (is|are) ", r"there \2 \1 ", statements[0])]
    return sentence(", and ".join(statements))


def describe(scene: Scene, rng: random.Random) -> str:
    """The whole scene in two or three sentences: first its groups, then their positions."""
    opening = rng.choice(("the picture shows", "I see", "here {be}", "there {be}"))
    opening = opening.format(be=_be(scene.groups[0].count))
    parts = [f"{opening} {listing([group.phrase for group in scene.groups])}"]
    if len(scene.groups) == 1:
        group = scene.groups[0]
        return " ".join(map(sentence, [*parts, f"{_it(group.count)} {_be(group.count)} {PLACE_OF[group.cell]}"]))
    return " ".join(map(sentence, parts + _statements(scene, rng, scene.name)))


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Questions about a scene with their true answers, which follow from any full caption.

    A question may be about something absent, but not about an absent held-out combination.
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
        elif len(neighbours) == 1:  # with two true answers, the question has no single one
            relation, other = neighbours[0]  # four times, since no other question asks for the relation
            asked += [(f"where {be} {name}?", f"{it} {be} {relation} {scene.name(other)}.")] * 4

    for one, relation, other in scene.relations:
        name, that, be, it = scene.name(one), scene.name(other), _be(one.count), _it(one.count)
        asked.append((f"what is {relation} {that}?", f"{one.phrase}."))
        wrong = rng.choice([r for r in INVERSE if r != relation])
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
    # right colour, right shape, but not together: single words do not give the answer
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
