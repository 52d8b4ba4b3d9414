"""Pictures: captions, and written or spoken questions."""

import hashlib
import json
import zlib
from typing import Any

import numpy as np

from omni.common.errors import BadRow
from omni.common.text import visible
from omni.data.manifest import Manifest
from omni.data.measure import measure_rows
from omni.stages.tasks.base import SftTask, Side, listed_texts, one_of, sft_task, turn
from omni.stages.tasks.recordings import QuestionRecordings, question_recordings
from omni.train.run import Run


class _Pictures(SftTask):
    file_key, columns, split_by = "image_manifest", ("image", "caption"), "image"
    reads, needs = ("image",), ("vision_ckpt",)


@sft_task
class Captions(_Pictures):
    """Pictures to describe. Scored if the column ``accepted_answers`` lists all right captions, since a free caption
    has other right wordings."""

    name = "caption"
    wordings = ("Describe the picture.", "What does the picture show?", "What do you see?")

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        return turn(visible(row["caption"]).strip(), self.image(row), one_of(self.wordings, rng))

    def accepted_answers(self, row: dict, messages: list[dict]) -> set[str]:
        accepted = set() if self.training else set(listed_texts(row, "accepted_answers"))
        return accepted | super().accepted_answers(row, messages) if accepted else set()


@sft_task
class PictureQuestions(_Pictures):
    """Pictures with ``questions``, a list of [question, answer]: several in training, one in validation."""

    name = "image_question"

    @classmethod
    def select(cls, side: Side, manifest: Manifest, rows: np.ndarray) -> tuple[Manifest, np.ndarray, dict[str, Any]]:
        return manifest, rows[measure_rows(side.run, manifest, "questions", count_questions, np.uint16)[rows] > 0], {}

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        pairs = question_pairs(row)
        # without questions that leave no room for the picture
        pairs = [pair for pair in pairs if self.fits(turn(pair[1], self.image(row), pair[0]))] or pairs[:1]
        if rng is None:
            question, answer = self.scored(row, pairs)
            return turn(answer, self.image(row), question)
        first, *others = self.written(pairs, self.config.questions_per_picture, rng)
        first["content"].insert(0, self.image(row))
        return [first, *others]

    @staticmethod
    def scored(row: dict, pairs: list[tuple[str, str]]) -> tuple[str, str]:
        """The pair to score, chosen by a hash of the picture's name, so that the questions vary."""
        return pairs[zlib.crc32(row["image"].encode()) % len(pairs)]

    @staticmethod
    def written(pairs: list[tuple[str, str]], limit: int, rng: np.random.Generator) -> list[dict]:
        """Up to ``limit`` of these questions with their answers, in random order."""
        return [message for i in rng.permutation(len(pairs))[:limit] for message in turn(pairs[i][1], pairs[i][0])]


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

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        pairs = question_pairs(row)
        recorded = [pair for pair in pairs if pair[0] in self.recordings]
        if not recorded:
            raise BadRow("none of its questions has been recorded")
        recorded = [pair for pair in recorded if self.has_room(row, *pair)] or recorded[:1]
        question, answer = self.scored(row, recorded) if rng is None else one_of(recorded, rng)
        messages, others = self.asked(row, question, answer, rng), [pair for pair in pairs if pair[0] != question]
        if rng is not None:
            messages += self.written(others, self.config.questions_per_picture - 1, rng)
        return messages

    def asked(self, row: dict, question: str, answer: str, rng: np.random.Generator | None) -> list[dict]:
        recording = self.recording(self.recordings.find(question, rng), self.recordings.manifest)
        return turn(answer, self.image(row), recording)

    def has_room(self, row: dict, question: str, answer: str) -> bool:
        """Whether the question fits beside picture and answer: in any recording, else in its first one."""
        longest = {"type": "audio", "row": None}
        return self.fits(turn(answer, self.image(row), longest)) or self.fits(self.asked(row, question, answer, None))


def question_pairs(row: dict) -> list[tuple[str, str]]:
    """
    Raises:
        BadRow: ``questions`` is not a list of questions with answers, or empty.
    """
    pairs = row.get("questions")
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        for pair in pairs
    )
    if not good or not pairs:
        raise BadRow(f'expected [question, answer] pairs in "questions", found {json.dumps(pairs)[:60]}')
    return [(question, answer) for question, answer in pairs]


def count_questions(manifest: Manifest, row: int) -> int:
    return len(question_pairs(manifest[row])) if "questions" in manifest[row] else 0


def count_recorded(run: Run, manifest: Manifest, recordings: QuestionRecordings) -> np.ndarray:
    """(rows,) number of recorded questions of each picture, cached beside the index of the pictures."""

    def count(manifest: Manifest, row: int) -> int:
        return sum(question in recordings for question, _ in question_pairs(manifest[row]))

    digest = hashlib.sha256(recordings.keys.tobytes()).hexdigest()[:12]
    return measure_rows(run, manifest, f"recorded-{digest}", count, np.uint16)
