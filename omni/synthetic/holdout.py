"""The held-out split of the small world, by unseen combinations.

`HELD_OUT` lists pairs and triples (a purple circle; a star left of a square; Anna in the library) that never occur in
training text, although each of their words does. So a good score on held-out text cannot come from memory. Questions
mention a held-out combination only if it is true.
"""

import random
from typing import TYPE_CHECKING

from omni.synthetic.lexicon import table

if TYPE_CHECKING:
    from omni.synthetic.scenes import Scene
    from omni.synthetic.stories import Story

# Relations are written with "left of" or "above"; "a triangle right of a circle" is the same fact as "a circle left of
# a triangle" and is held out with it.
HELD_OUT_PAIRS = (("purple", "circle"), ("green", "heart"), ("orange", "star"))
HELD_OUT_RELATIONS = (
    ("circle", "left of", "triangle"),
    ("star", "left of", "square"),
    ("ring", "left of", "moon"),
    ("heart", "above", "ring"),
    ("diamond", "above", "cross"),
    ("square", "above", "arrow"),
)
HELD_OUT_PLACES = table(  # this person is never met at this place
    "Anna: library; Ben: station; Clara: market; David: kitchen; Emma: beach; Felix: museum; Grace: bakery; "
    "Henry: zoo; Julia: park; Leo: garden; Mia: harbour; Noah: shop; Nora: theatre; Olga: farm; Oscar: school; "
    "Paul: lake; Rosa: forest; Sara: cafe; Simon: hotel; Tom: office"
)
HELD_OUT_TREATS = table(  # this pet never likes this food
    "dog: cheese; cat: rice; rabbit: bread; horse: carrots; parrot: apples; mouse: soup; hamster: bananas; "
    "turtle: cake; goat: honey; duck: nuts"
)
HELD_OUT = frozenset((*HELD_OUT_PAIRS, *HELD_OUT_RELATIONS, *HELD_OUT_PLACES.items(), *HELD_OUT_TREATS.items()))

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def relation_key(shape: str, relation: str, other: str) -> tuple[str, str, str]:
    """A relation in its unique form, with "left of" or "above"."""
    return (shape, relation, other) if relation in ("left of", "above") else (other, INVERSE[relation], shape)


def held_out(value: "Scene | Story") -> bool:
    """Whether a scene or story belongs to the held-out split: it contains a combination of `HELD_OUT`."""
    return not HELD_OUT.isdisjoint(value.combinations)


def draw(sample, rng: random.Random, unseen: bool) -> "Scene | Story":
    """A value of `sample(rng)` from the held-out split (`unseen`) or from the training split."""
    while held_out(value := sample(rng)) != unseen:
        pass
    return value
