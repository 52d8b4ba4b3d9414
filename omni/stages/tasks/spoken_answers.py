"""Spoken answers: the talker learns to use the Thinker's states."""

from typing import Any

import numpy as np

from omni.common.text import audible
from omni.data.manifest import Manifest
from omni.stages.aligner import STAGE as ALIGNER
from omni.stages.aligner import prepare_speech
from omni.stages.codec import STAGE as CODEC
from omni.stages.codec import leave_out_long
from omni.stages.talker import STAGE as TALKER
from omni.stages.talker import CodedSpeech
from omni.stages.tasks.base import SftTask, Side, listed_texts, one_of, sft_task, turn
from omni.stages.tasks.processor import Encoded, Processor
from omni.stages.voices import Voices, with_references
from omni.train.precompute import ManifestWithColumns
from omni.train.stage import load


@sft_task
class SpokenAnswers(SftTask):
    """Texts with their recordings: answers to one of the questions in the column ``question``, or to a request for
    the text itself. A talker of several voices speaks each as the speaker in the column ``speaker``.

    Args:
        manifest: with the columns that ``omni.stages.aligner.prepare_speech`` and, for several voices,
            ``omni.stages.voices.with_references`` add.
    """

    name, file_key, columns, needs = "spoken_answer", "speech_csv", ("text", "wav"), ("talker_ckpt",)
    wordings = ("Say: {}", "Read aloud: {}", "Repeat after me: {}")
    standalone = False

    def __init__(
        self, manifest: ManifestWithColumns, rows: np.ndarray, processor: Processor, config: Any, **others
    ) -> None:
        super().__init__(manifest, rows, processor, config, **others)
        self.speech = CodedSpeech(manifest, rows, processor.talker, processor.architecture.max_codes, training=False)

    @classmethod
    def select(cls, side: Side, manifest: Manifest, rows: np.ndarray) -> tuple[Any, np.ndarray, dict[str, Any]]:
        """The manifest with the codes and durations of stage D's codec and aligner, which it may have; ``rows`` without
        recordings that are too long."""
        run, max_codes = side.run, side.processor.architecture.max_codes
        codec, aligner = (load(stage, side.config.talker_ckpt, run.device).model for stage in (CODEC, ALIGNER))
        name = "train" if side.training or not side.config.val_speech_csv else "validation"
        coded, lengths = prepare_speech(run, manifest, codec, aligner, max_codes, name, side.config.talker_ckpt)
        rows = leave_out_long(run, manifest, rows, lengths, max_codes)
        if side.processor.talker.voice_layers:
            voices = Voices.of(load(TALKER, side.config.talker_ckpt).model)
            coded, _ = with_references(run, coded, rows, voices)
        return coded, rows, {}

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        text = audible(row["text"]).strip()  # as the talker reads it
        questions = listed_texts(row, "question") or [wording.format(text) for wording in self.wordings]
        return turn(text, one_of(questions, rng))

    def measures_of(self, row: dict) -> tuple[str, ...]:
        """Without the column ``question``, all rows ask for their text, which may be long."""
        return ("exact",) if "question" in row else ("one_minus_wer",)

    def encode(self, row: dict, messages: list[dict]) -> Encoded:
        return self.processor.encode_spoken(messages, self.speech.read(row, None))
