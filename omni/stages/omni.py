"""Stage E: its config."""

import json
import os
from typing import ClassVar, Self

from pydantic import Field, model_validator

from omni.common.errors import UserError
from omni.train.config import ASR_HINT, OCR_HINT, PICTURES_HINT, TEXT_HINT, TTS_HINT, StageConfig, input_file, resumable
from omni.train.stage import ExportedPart, Stage


class SftConfig(StageConfig):
    """Stage E, ``sft_omni.py``: the Thinker learns to answer about what it reads, hears and sees.

    The keys of the mix may also stand in an object ``sft_mix``; one at the top wins, so that ``--set`` can change it.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "keep_features": "cache_features",
        "spelling_weight": "ctc_alignment_weight",
    }
    TASKS: ClassVar[tuple[str, ...]] = (
        "text", "image_question", "caption", "transcription", "spoken_question", "spoken_image_question", "sign",
        "spoken_answer", "conversation",
    )  # fmt: skip

    thinker_ckpt: str = resumable(min_length=1, description="folder of stage A")
    audio_ckpt: str | None = resumable(None, description="folder of stage B; required for recordings")
    vision_ckpt: str | None = resumable(None, description="folder of stage C; required for pictures")
    talker_ckpt: str | None = resumable(
        None, description="folder of stage D; required for speech_csv: its talker learns to hear the Thinker's states"
    )

    # The mix; held-out files: val_ and the same name, by default val_split of the rows
    text_path: str | None = input_file(
        None, hint=TEXT_HINT, description="task text: the dialogues of a text file, else all of its lines"
    )
    val_text_path: str | None = input_file(None, hint=TEXT_HINT)
    image_manifest: str | None = input_file(
        None, hint=PICTURES_HINT, description="tasks caption and image_question: image, caption, perhaps questions"
    )
    val_image_manifest: str | None = input_file(None, hint=PICTURES_HINT)
    image_root: str | None = resumable(None, description="folder of its images; default: that of the manifest")
    asr_csv: str | None = input_file(None, hint=ASR_HINT, description="task transcription: columns wav and text")
    val_asr_csv: str | None = input_file(None, hint=ASR_HINT)
    question_csv: str | None = input_file(
        None,
        hint=ASR_HINT,
        description="task spoken_question: columns wav, text and answer; without answer, the known ones. "
        "With image_manifest also spoken_image_question: recordings of the questions asked there",
    )
    val_question_csv: str | None = input_file(
        None, hint=ASR_HINT, description="other recordings to validate on; val_split holds out texts all the same"
    )
    ocr_csv: str | None = input_file(None, hint=OCR_HINT, description="task sign: columns image and text")
    val_ocr_csv: str | None = input_file(None, hint=OCR_HINT)
    speech_csv: str | None = input_file(
        None, hint=TTS_HINT, description="task spoken_answer: columns text and wav, in the talker's voice"
    )
    val_speech_csv: str | None = input_file(None, hint=TTS_HINT)
    jsonl_path: str | None = input_file(
        None,
        description="task conversation: JSON or JSONL rows of messages or conversations, see docs/data.md",
    )
    val_jsonl_path: str | None = input_file(None)
    task_weights: dict[str, float] = Field(
        {}, description="share of a task among the samples, relative to the others; default 1, 0: leave it out"
    )
    prompt: str = Field("", description="system message before every conversation; empty: none")
    questions_per_picture: int = Field(3, ge=1, description="asked one after the other in one sample, at most")

    # Sizes
    ctx_len: int | None = Field(
        None, ge=8, le=1_048_576, description="positions of a sample; default: the Thinker's ctx_len"
    )
    proj_d_ff: int = Field(512, ge=8, le=1_000_000, description="inner width of the projections into the Thinker")
    drop_blanks: bool = Field(True, description="leave out audio frames in which its CTC head hears nothing new")
    image_stack: int = Field(1, ge=1, le=64, description="side of the square of neighbouring patches in one position")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the Thinker's residual branches, in training only")
    freeze_encoders: bool = Field(True, description="leave audio and vision encoder as they are")
    cache_features: bool = Field(
        False,
        description="compute what frozen encoders make of each file once, at the start, and keep it in save_dir; "
        "2 bytes a value: 17 kB for a picture and 20 kB for a second of speech with the demo's encoders",
    )
    ctc_alignment_weight: float = Field(
        1.0, ge=0, description="of a CTC loss that draws the positions of a recording to the tokens of its text"
    )
    parts: dict[str, dict[str, int | float | bool | str | None]] | None = Field(
        None, description="the sizes of Thinker and encoders: filled in by the script, from their checkpoints"
    )
    origins: dict[str, str] | None = resumable(
        None, description="SHA-256 of the weights that each part began with: likewise"
    )

    # Validation
    val_items: int = resumable(100, ge=1, description="held-out items of each task that are answered, evenly spaced")
    max_answer_tokens: int = resumable(96, ge=1, description="longest answer in validation")

    @model_validator(mode="before")
    @classmethod
    def _unpack_mix(cls, raw):
        if not isinstance(raw, dict) or "sft_mix" not in raw:
            return raw
        mix = raw["sft_mix"]
        if not isinstance(mix, dict):
            raise ValueError(f'key "sft_mix": expected an object, found {json.dumps(mix, default=str)}')
        return mix | {key: value for key, value in raw.items() if key != "sft_mix"}

    @model_validator(mode="after")
    def _mix_fits(self) -> Self:
        sources = [self.text_path, self.image_manifest, self.asr_csv, self.question_csv, self.ocr_csv, self.jsonl_path]
        if not any([*sources, self.speech_csv]):
            raise ValueError('expected data: "text_path", "image_manifest", "asr_csv" or another, found none')
        for task, weight in self.task_weights.items():
            if task not in self.TASKS:
                raise ValueError(f'key "task_weights": expected tasks of {", ".join(self.TASKS)}, found "{task}"')
            if weight < 0:
                raise ValueError(f'key "task_weights": expected at least 0, found {weight} for {task}')
        for key, stage, needed in (
            ("audio_ckpt", "B", {"asr_csv": self.asr_csv, "question_csv": self.question_csv}),
            ("vision_ckpt", "C", {"image_manifest": self.image_manifest, "ocr_csv": self.ocr_csv}),
            ("talker_ckpt", "D", {"speech_csv": self.speech_csv}),
        ):
            source = next((name for name, path in needed.items() if path), None)
            if source and getattr(self, key) is None:
                raise ValueError(f'key "{key}": expected the folder of stage {stage} for {source}, found none')
        for key, wrong in (("freeze_encoders", not self.freeze_encoders), ("jsonl_path", self.jsonl_path is not None)):
            if self.cache_features and wrong:
                raise ValueError(
                    f'key "cache_features": expected false beside "{key}": {json.dumps(getattr(self, key))}'
                )
        return self

    def check_files(self) -> None:
        super().check_files()
        if self.image_root is not None and not os.path.isdir(self.image_root):
            raise UserError(f'key "image_root": expected a folder, found none at {self.image_root}')
        for key, files, remedy in (
            ("thinker_ckpt", ("thinker.pt", "tokenizer.json"), "Train stage A first (train_text.py)"),
            ("audio_ckpt", ("audio_enc.pt",), "Train stage B first (train_audio_enc.py)"),
            ("vision_ckpt", ("vision.pt",), "Train stage C first (train_vision.py)"),
            ("talker_ckpt", ("talker.pt", "rvq_codec.pt", "aligner.pt"), "Train stage D first (train_talker.py)"),
        ):
            folder = getattr(self, key)
            for file in files if folder is not None else ():
                if not os.path.isfile(os.path.join(folder, file)):
                    raise UserError(f'key "{key}": expected a folder with {file}, found none at {folder}. {remedy}')


STAGE = Stage(
    name="omni",
    prefix="omni",
    final="omni_final.pt",
    unit="tokens",
    best_metric="loss",
    config_name="omni_sft",
    exports=(
        ExportedPart(
            "proj_v",
            "projects picture features into the Thinker",
            "--omni_ckpt",
            command='python infer_chat.py --ckpt_dir merged_model --image picture.png --text "What is in the picture?"',
        ),
        ExportedPart(
            "proj_a",
            "projects audio features into the Thinker",
            "--omni_ckpt",
            command="python infer_chat.py --ckpt_dir merged_model --audio_in question.wav",
        ),
    ),
    letter="E",
    script="sft_omni.py",
    config=SftConfig,
)
