"""Recordings: transcripts, and questions to answer."""

import zlib
from typing import Any

import numpy as np

from omni.common.errors import BadRow
from omni.common.text import visible
from omni.data.manifest import Manifest
from omni.data.measure import measure_rows
from omni.data.recordings import measure_samples
from omni.models.audio_encoder import output_frames
from omni.models.ctc import frames_needed
from omni.stages.tasks.base import SftTask, Side, one_of, sft_task, turn


class _Recordings(SftTask):
    columns, split_by = ("wav", "text"), "text"
    reads, needs, length_column = ("audio",), ("audio_ckpt",), "wav"


@sft_task
class Transcripts(_Recordings):
    """Recordings to transcribe."""

    name, file_key, measure = "transcription", "asr_csv", "one_minus_wer"
    wordings = ("Write down what is said.", "What does the recording say?", "What do you hear?")

    @classmethod
    def select(cls, side: Side, manifest: Manifest, rows: np.ndarray) -> tuple[Manifest, np.ndarray, dict[str, Any]]:
        rows = short_enough(side, manifest, rows)
        if side.training:
            count_unaligned(side, manifest, rows)
        return manifest, rows, {}

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        return turn(visible(row["text"]).strip(), self.recording(row), one_of(self.wordings, rng))


@sft_task
class SpokenQuestions(_Recordings):
    """Recordings of questions, with the column ``answer``."""

    name, file_key = "spoken_question", "question_csv"
    splits_both_files = True  # texts are held out for all speakers

    @classmethod
    def select(cls, side: Side, manifest: Manifest, rows: np.ndarray) -> tuple[Manifest, np.ndarray, dict[str, Any]]:
        return manifest, with_answer(side, manifest, question_recordings(side).row_numbers_in_order), {}

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        answer = row.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise BadRow(f'expected an answer to "{row["text"][:40]}", found none')
        return turn(answer.strip(), self.recording(row))


class QuestionRecordings:
    """Recordings of questions, to be found by their text.

    Args:
        rows: (N,) row numbers of a manifest with the columns wav and text.
    """

    def __init__(self, manifest: Manifest, rows: np.ndarray) -> None:
        self.manifest, self.row_numbers_in_order = manifest, rows
        keys = np.asarray(manifest.keys)[rows]
        order = np.argsort(keys, kind="stable")
        self.keys, self.row_numbers = keys[order], rows[order]

    def _span(self, question: str) -> tuple[int, int]:
        key = np.uint32(zlib.crc32(question.encode()))
        return int(np.searchsorted(self.keys, key)), int(np.searchsorted(self.keys, key, side="right"))

    def __contains__(self, question: str) -> bool:
        first, end = self._span(question)
        return end > first

    def find(self, question: str, rng: np.random.Generator | None) -> dict:
        """The row of a recording of ``question``: a random one in training, else the first.

        Raises:
            BadRow: there is no such recording, or its text only has the same checksum.
        """
        first, end = self._span(question)
        number = int(self.row_numbers[one_of(range(first, end), rng)])
        row = self.manifest[number]
        if row["text"] != question:
            raise BadRow(f'{self.manifest.where(number)}: expected "{question}", found "{row["text"]}"')
        return row


def question_recordings(side: Side) -> QuestionRecordings | None:
    """The recordings of ``question_csv`` that are short enough; None if the config has no such file."""
    key = SpokenQuestions.file_key
    if key in side.rows and key not in side.shared:
        manifest, rows = side.rows[key]
        side.shared[key] = QuestionRecordings(manifest, short_enough(side, manifest, rows))
    return side.shared.get(key)


def short_enough(side: Side, manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """``rows`` without recordings longer than the audio encoder's ``max_mel_length``; logs how many. Unreadable rows
    stay: reading them raises."""
    mel, most = side.processor.mel, side.processor.max_mel_length
    frames = mel.frames(measure_samples(side.run, manifest, mel.sample_rate))
    return manifest.leave_out(rows, frames[rows] > most, f"longer than {most} mel frames", side.run.log)


def count_unaligned(side: Side, manifest: Manifest, rows: np.ndarray) -> None:
    """Log how many recordings have fewer positions than the CTC alignment loss needs for the tokens of their text. They
    are learnt without that loss."""
    processor, tokenizer = side.processor, side.processor.tokenizer

    def tokens(manifest: Manifest, row: int) -> int:
        return frames_needed(tokenizer.encode(visible(manifest[row]["text"]).strip(), allow_special=False))

    needed = measure_rows(side.run, manifest, f"ctc-frames-{tokenizer.fingerprint[:12]}", tokens, np.uint32)[rows]
    frames = processor.mel.frames(measure_samples(side.run, manifest, processor.mel.sample_rate))[rows]
    unaligned = int((needed > output_frames(frames, processor.audio.downsample_time)).sum())
    if unaligned:
        side.run.log(
            f"{manifest.path}: {unaligned:,} of {len(rows):,} texts have more tokens than their recording has "
            "positions: learnt without the alignment loss. Upper case takes many tokens"
        )


def with_answer(side: Side, manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """``rows`` without blank answers, whose questions are only asked about pictures. Unreadable rows, and answers that
    are no text, stay: reading them raises."""

    def has_answer(manifest: Manifest, row: int) -> bool:
        try:
            answer = manifest[row].get("answer")
        except BadRow:
            return True
        return answer is not None and bool(str(answer).strip())

    kept = rows[measure_rows(side.run, manifest, "has-answer", has_answer, np.bool_)[rows]]
    if len(kept) < len(rows):
        side.run.log(
            f"{manifest.path}: {len(rows) - len(kept)} of {len(rows)} rows have no answer: not asked by themselves"
        )
    return kept
