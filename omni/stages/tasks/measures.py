"""The measures of stage E's answers, each from 0 to 1. Tasks name them; ``MEASURES`` is the one table.

A measure gives ``Points`` for one answer. Points add up over items, batches and processes; the score of a task is what
was earned of what was possible.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jiwer

from omni.common.text import clean_text, visible
from omni.models.ctc import normalise_text
from omni.stages.tasks.cider import DocumentFrequencies, cider_d
from omni.stages.tasks.vqa import agreement

CANDIDATES = 64  # of rank_among_64, the true answer among them


class Points(NamedTuple):
    """What an answer has earned, perhaps less than 0, of what was possible."""

    earned: float
    possible: float = 1.0

    @property
    def score(self) -> float:
        return min(1.0, max(0.0, self.earned / self.possible))


@dataclass(frozen=True)
class Measure:
    """A row of the table.

    Args:
        points: gives ``Points`` for the greedy answer and the accepted answers.
        about: in a few words.
        needs: "": nothing else; "frequencies": also the ``DocumentFrequencies`` of the task's held-out texts;
            "candidates": only the nats per token of some candidates, the true answer first.
    """

    name: str
    points: Callable[..., Points]
    about: str
    needs: str = ""


@dataclass(frozen=True)
class References:
    """What an answer is compared with.

    Args:
        accepted: accepted answers, the true one first; each annotator's answer for ``vqa_accuracy``. Empty: not scored.
        measures: names of measures; the first one is the score, the others are only reported.
    """

    accepted: tuple[str, ...] = ()
    measures: tuple[str, ...] = ("exact",)


MEASURES: dict[str, Measure] = {}  # by name, see ``answer_measure``


def answer_measure(about: str, needs: str = "") -> Callable:
    """Register a function as the measure of its name: a decorator. See ``Measure``."""

    def register(points: Callable[..., Points]) -> Callable[..., Points]:
        MEASURES[points.__name__] = Measure(points.__name__, points, about, needs)
        return points

    return register


def normalise_answer(text: str) -> str:
    """The words of an answer, for comparison; an answer without words as it is."""
    return normalise_text(text) or visible(text).strip()


@answer_measure("1 if the answer has exactly the words of an accepted answer")
def exact(answer: str, accepted: Sequence[str]) -> Points:
    """Case and punctuation do not count."""
    return Points(normalise_answer(answer) in {normalise_answer(text) for text in accepted})


@answer_measure("agreement with the answers of several people; 1 if at least four of ten gave the same")
def vqa_accuracy(answer: str, accepted: Sequence[str]) -> Points:
    """The accuracy of VQA (Antol et al. 2015), see ``omni.stages.tasks.vqa.agreement``."""
    return Points(agreement(answer, accepted))


@answer_measure("1 - word error rate, at least 0")
def one_minus_wer(answer: str, accepted: Sequence[str]) -> Points:
    """Points are words, so the score of a task is 1 - its word error rate as it is usually reported: all errors by all
    words. An answer with more errors than words earns less than 0. Case and punctuation do not count. Of several
    accepted answers the nearest counts."""

    def points(text: str) -> Points:
        found = jiwer.process_words(text, normalise_answer(answer))
        return _without_errors(found)

    return max((points(normalise_answer(text)) for text in accepted), key=lambda one: one.earned / one.possible)


@answer_measure("1 - character error rate, at least 0")
def one_minus_cer(answer: str, accepted: Sequence[str]) -> Points:
    """As ``one_minus_wer``, with characters; case and punctuation count, as in stage G."""

    def points(text: str) -> Points:
        return _without_errors(jiwer.process_characters(text, clean_text(answer)))

    return max((points(clean_text(text)) for text in accepted), key=lambda one: one.earned / one.possible)


def _without_errors(found: jiwer.WordOutput | jiwer.CharacterOutput) -> Points:
    missed = found.substitutions + found.deletions
    length = found.hits + missed
    return Points(length - missed - found.insertions, length)


@answer_measure("1 if the true answer is the likeliest of 64, the others being other rows' answers", needs="candidates")
def rank_among_64(nats: Sequence[float]) -> Points:
    """Whether the true answer, the first, has fewer nats per token than every other one. So a guess scores 1/64, and a
    model that gives all answers the same likelihood 0. The mean of 1 - (rank - 1) / 63 would be 0.5 for a guess."""
    return Points(all(nats[0] < other for other in nats[1:]))


@answer_measure("CIDEr-D / 10, at most 1; published figures are ten times as large", needs="frequencies")
def cider(answer: str, accepted: Sequence[str], frequencies: DocumentFrequencies) -> Points:
    """See ``omni.stages.tasks.cider.cider_d``, which is between 0 and 10: 1.2 is a good model's for COCO."""
    references = [normalise_answer(text).split() for text in accepted]
    return Points(min(1.0, cider_d(normalise_answer(answer).split(), references, frequencies) / 10))
