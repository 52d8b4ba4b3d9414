"""Pictures: captions, and written or spoken questions."""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from omni.common.errors import BadRow, reading_row
from omni.common.text import visible
from omni.data.manifest import Manifest, spread
from omni.data.measure import measure_rows
from omni.stages.tasks.base import SftTask, Side, listed_texts, one_of, sft_task, turn
from omni.stages.tasks.cider import DocumentFrequencies
from omni.stages.tasks.measures import normalise_answer
from omni.stages.tasks.recordings import QuestionRecordings, question_recordings
from omni.train.run import Run

_DOCUMENTS = 5000  # pictures whose captions tell how frequent n-grams are


class Question(NamedTuple):
    """A question about a picture; ``given``: the answers of several people, () if unknown."""

    question: str
    answer: str
    given: tuple[str, ...] = ()


class _Pictures(SftTask):
    file_key, columns, split_by = "image_manifest", ("image",), "image"
    reads, needs = ("image",), ("vision_ckpt",)


@sft_task
class Captions(_Pictures):
    """Pictures to describe, each with a ``caption`` or several ``captions``. If ``accepted_answers`` lists all right
    captions, they are judged exactly. A free caption has other right wordings, so its likelihood is judged."""

    name, measure = "caption", "rank_among_64"
    wordings = ("Describe the picture.", "What does the picture show?", "What do you see?")

    @classmethod
    def select(cls, side: Side, manifest: Manifest, rows: np.ndarray) -> tuple[Manifest, np.ndarray, dict[str, Any]]:
        return manifest, rows[measure_rows(side.run, manifest, "to-describe", to_describe, np.bool_)[rows]], {}

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        captions = captions_of(row)
        if not captions:
            if row.get("questions"):
                question_pairs(row)  # if they are at fault, says so
            raise BadRow('expected a text in "caption", texts in "captions", or "questions", found none')
        caption = captions[0] if len(captions) == 1 else one_of(captions, rng)
        return turn(caption, self.image(row), one_of(self.wordings, rng))

    def accepted_answers(self, row: dict, messages: list[dict]) -> list[str]:
        if self.training:
            return []
        listed = listed_texts(row, "accepted_answers")
        return [messages[-1]["content"], *(listed or self._captions_of_picture(row))]

    def measures_of(self, row: dict) -> tuple[str, ...]:
        return ("exact",) if listed_texts(row, "accepted_answers") else (self.measure, "cider")

    def _captions_of_picture(self, row: dict) -> list[str]:
        """The captions of all rows with this picture: a manifest may have one row for each caption."""
        key = np.uint32(zlib.crc32(row["image"].encode()))
        return self._captions(np.flatnonzero(np.asarray(self.manifest.keys) == key), row["image"])

    def _captions(self, rows: Iterable[int], image: str | None = None) -> list[str]:
        found = []
        for number in rows:
            try:
                with reading_row():
                    row = self.manifest[int(number)]
                    found += captions_of(row) if image in (None, row["image"]) else []
            except BadRow:  # reported where it is an item
                continue
        return found

    def document_frequencies(self) -> DocumentFrequencies:
        keys = np.asarray(self.manifest.keys)[self.row_numbers]
        order = np.argsort(keys, kind="stable")
        pictures = np.split(self.row_numbers[order], np.flatnonzero(np.diff(keys[order])) + 1)
        chosen = (pictures[index] for index in spread(np.arange(len(pictures)), _DOCUMENTS))
        return DocumentFrequencies([normalise_answer(text).split() for text in self._captions(rows)] for rows in chosen)


@sft_task
class PictureQuestions(_Pictures):
    """Pictures with ``questions``, a list of [question, answer] or [question, answer, answers of several people]:
    several in training, one in validation."""

    name, measure = "image_question", "vqa_accuracy"

    @classmethod
    def select(cls, side: Side, manifest: Manifest, rows: np.ndarray) -> tuple[Manifest, np.ndarray, dict[str, Any]]:
        return manifest, rows[measure_rows(side.run, manifest, "questions", count_questions, np.uint16)[rows] > 0], {}

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        pairs = question_pairs(row)
        # without questions that leave no room for the picture
        pairs = [pair for pair in pairs if self.fits(turn(pair.answer, self.image(row), pair.question))] or pairs[:1]
        if rng is None:
            pair = self.scored(row, pairs)
            return given_by(pair, turn(pair.answer, self.image(row), pair.question))
        first, *others = self.written(pairs, self.config.questions_per_picture, rng)
        first["content"].insert(0, self.image(row))
        return [first, *others]

    def accepted_answers(self, row: dict, messages: list[dict]) -> list[str]:
        return messages[-1].get("given") or [messages[-1]["content"]]

    def measures_of(self, row: dict) -> tuple[str, ...]:
        return (self.measure,) if any(pair.given for pair in question_pairs(row)) else ("exact",)

    @staticmethod
    def scored(row: dict, pairs: list[Question]) -> Question:
        """The pair to score, chosen by a hash of the picture's name, so that the questions vary."""
        return pairs[zlib.crc32(row["image"].encode()) % len(pairs)]

    @staticmethod
    def written(pairs: list[Question], limit: int, rng: np.random.Generator) -> list[dict]:
        """Up to ``limit`` of these questions with their answers, in random order."""
        chosen = (pairs[i] for i in rng.permutation(len(pairs))[:limit])
        return [message for pair in chosen for message in turn(pair.answer, pair.question)]


@sft_task
class SpokenPictureQuestions(PictureQuestions):
    """Pictures with a question that a recording of ``question_csv`` asks. In training, written questions about the same
    picture follow, which cost little more."""

    name = "spoken_image_question"
    reads, standalone = ("image", "audio"), False

    def __init__(self, *args, recordings: QuestionRecordings, **others) -> None:
        super().__init__(*args, **others)
        self.recordings = recordings

    @classmethod
    def select(cls, side: Side, manifest: Manifest, rows: np.ndarray) -> tuple[Manifest, np.ndarray, dict[str, Any]]:
        found = question_recordings(side)
        if found is None:
            return manifest, rows[:0], {}
        manifest, rows, _ = super().select(side, manifest, rows)
        return manifest, rows[count_recorded(side.run, manifest, found)[rows] > 0], {"recordings": found}

    def readers(self, kind: str) -> list[Any]:
        return [self] if kind == "image" else [self.recordings]

    def depends_on(self) -> list:
        return [*super().depends_on(), hashlib.sha256(self.recordings.keys.tobytes()).hexdigest()]

    def questions(self, rows: np.ndarray) -> list[str]:
        found = []
        for number in rows:
            with contextlib.suppress(BadRow):  # reported where it is an item
                row = self.manifest[int(number)]
                found.append(self.scored(row, self.recorded(row, question_pairs(row))).question)
        return found

    def recorded(self, row: dict, pairs: list[Question]) -> list[Question]:
        """
        Raises:
            BadRow: none of the questions has a recording.
        """
        recorded = [pair for pair in pairs if pair.question in self.recordings]
        if not recorded:
            raise BadRow("none of its questions has been recorded")
        return [pair for pair in recorded if self.has_room(row, pair)] or recorded[:1]

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        pairs = question_pairs(row)
        recorded = self.recorded(row, pairs)
        if rng is None:
            return given_by(pair := self.scored(row, recorded), self.asked(row, pair, None))
        pair = one_of(recorded, rng)
        messages, others = self.asked(row, pair, rng), [other for other in pairs if other.question != pair.question]
        return messages + self.written(others, self.config.questions_per_picture - 1, rng)

    def asked(self, row: dict, pair: Question, rng: np.random.Generator | None) -> list[dict]:
        recording = self.recording(self.recordings.find(pair.question, rng), self.recordings.manifest)
        return turn(pair.answer, self.image(row), recording)

    def has_room(self, row: dict, pair: Question) -> bool:
        """Whether the question fits beside picture and answer: in any recording, else in its first one."""
        longest = {"type": "audio", "row": None}
        return self.fits(turn(pair.answer, self.image(row), longest)) or self.fits(self.asked(row, pair, None))


def captions_of(row: dict) -> list[str]:
    """The captions of a row: a text in ``caption``, or several in ``captions``; [] if it has none.

    Raises:
        BadRow: one of the columns has something else.
    """
    caption = row.get("caption") or ""
    if not isinstance(caption, str):
        raise BadRow(f'expected a text in "caption", found {json.dumps(caption)[:60]}')
    found = listed_texts(row, "captions") or [caption]
    return [text for caption in found if (text := visible(caption).strip())]


def to_describe(manifest: Manifest, row: int) -> bool:
    """Whether a row has a caption. Rows of no use to any task stay, too: reading them raises."""
    try:
        fields = manifest[row]
        return bool(captions_of(fields)) or not (fields.get("questions") and question_pairs(fields))
    except BadRow:
        return True


def question_pairs(row: dict) -> list[Question]:
    """
    Raises:
        BadRow: ``questions`` is not a list of questions with answers, or empty.
    """
    pairs = row.get("questions")
    if not isinstance(pairs, list) or not pairs or not all(map(_is_question, pairs)):
        raise BadRow(
            f'expected [question, answer] or [question, answer, [answers]] in "questions", found '
            f"{json.dumps(pairs)[:60]}"
        )
    return [Question(question, answer, tuple(*given)) for question, answer, *given in pairs]


def _is_question(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) not in (2, 3):
        return False
    texts, given = pair[:2], pair[2] if len(pair) == 3 else []
    return isinstance(given, list) and all(isinstance(text, str) and text.strip() for text in (*texts, *given))


def given_by(pair: Question, messages: list[dict]) -> list[dict]:
    """``messages``, whose answer also says what several people answered."""
    return [*messages[:-1], messages[-1] | {"given": list(pair.given)}]


def count_questions(manifest: Manifest, row: int) -> int:
    return len(question_pairs(manifest[row])) if "questions" in manifest[row] else 0


def count_recorded(run: Run, manifest: Manifest, recordings: QuestionRecordings) -> np.ndarray:
    """(rows,) number of recorded questions of each picture, cached beside the index of the pictures."""

    def count(manifest: Manifest, row: int) -> int:
        return sum(pair.question in recordings for pair in question_pairs(manifest[row]))

    digest = hashlib.sha256(recordings.keys.tobytes()).hexdigest()[:12]
    return measure_rows(run, manifest, f"recorded-{digest}", count, np.uint16)
