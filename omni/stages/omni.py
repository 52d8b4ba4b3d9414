"""Stage E: its config."""

import json
import os
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from omni.common.errors import UserError
from omni.data.tokenizer import Tokenizer
from omni.models.omni_architecture import OmniArchitecture
from omni.models.omni_model import OmniModel
from omni.train.config import (
    ASR_HINT,
    OCR_HINT,
    PICTURES_HINT,
    TEXT_HINT,
    TTS_HINT,
    Files,
    StageConfig,
    check_given,
    input_files,
    input_texts,
    resumable,
)
from omni.train.stage import ExportedPart, Stage

BASE_STAGES = {  # config key -> letter, script and files of a stage
    "thinker_ckpt": ("A", "train_text.py", "thinker.pt", "tokenizer.json"),
    "audio_ckpt": ("B", "train_audio_enc.py", "audio_enc.pt"),
    "vision_ckpt": ("C", "train_vision.py", "vision.pt"),
    "talker_ckpt": ("D", "train_talker.py", "talker.pt", "rvq_codec.pt", "aligner.pt"),
}


class SftConfig(StageConfig):
    """Stage E, ``sft_omni.py``. The keys of the mixture may also stand in an object ``sft_mix``; a top-level key wins,
    so that ``--set`` can change it."""

    RENAMED: ClassVar[dict[str, str]] = {
        "keep_features": "cache_features",
        "spelling_weight": "ctc_alignment_weight",
    }
    thinker_ckpt: str = resumable(min_length=1, description="folder of stage A")
    audio_ckpt: str | None = resumable(None, description="folder of stage B; required for recordings")
    vision_ckpt: str | None = resumable(None, description="folder of stage C; required for pictures")
    talker_ckpt: str | None = resumable(
        None, description="folder of stage D, whose talker learns to use the Thinker's states; required for speech_csv"
    )

    # Files of the mixture; held-out files have the same keys with val_, default: val_split of the rows
    text_path: Files | None = input_texts(
        None, hint=TEXT_HINT, description="text file of the task text: its dialogues, or all lines if it has none"
    )
    val_text_path: Files | None = input_texts(None, hint=TEXT_HINT)
    image_manifest: Files | None = input_files(
        None,
        hint=PICTURES_HINT,
        description="manifest of caption and image_question: image, and caption or captions, questions, or both; "
        "optionally accepted_answers",
    )
    val_image_manifest: Files | None = input_files(None, hint=PICTURES_HINT)
    image_root: str | None = resumable(None, description="folder of the images; default: that of the manifest")
    asr_csv: Files | None = input_files(None, hint=ASR_HINT, description="CSV of the task transcription: wav and text")
    val_asr_csv: Files | None = input_files(None, hint=ASR_HINT)
    question_csv: Files | None = input_files(
        None,
        hint=ASR_HINT,
        description="CSV of spoken_question: wav, text and answer; rows with a blank answer are left out. With "
        "image_manifest also of spoken_image_question: recordings of the questions in that manifest",
    )
    val_question_csv: Files | None = input_files(
        None,
        hint=ASR_HINT,
        split=True,
        description="CSV of other recordings for validation; val_split still holds out texts",
    )
    ocr_csv: Files | None = input_files(None, hint=OCR_HINT, description="CSV of the task sign: image and text")
    val_ocr_csv: Files | None = input_files(None, hint=OCR_HINT)
    speech_csv: Files | None = input_files(
        None,
        hint=TTS_HINT,
        description="CSV of the task spoken_answer: text, wav in the talker's voice, optionally question and speaker",
    )
    val_speech_csv: Files | None = input_files(None, hint=TTS_HINT)
    jsonl_path: Files | None = input_files(
        None,
        description="JSON or JSONL file of the task conversation, see docs/data.md",
    )
    val_jsonl_path: Files | None = input_files(None)
    task_files: dict[str, str] = resumable(
        {}, description="files of tasks without a key of their own; held-out files: the same names with val_"
    )
    task_weights: dict[str, float] = Field(
        {}, description="relative share of each task among the samples; default 1; 0 leaves a task out"
    )
    prompt: str = Field("", description="system message before every conversation; empty: none")
    questions_per_picture: int = Field(3, ge=1, description="largest number of questions in one sample")

    # Sizes
    ctx_len: int | None = Field(
        None, ge=8, le=1_048_576, description="longest sample in positions; default: the Thinker's ctx_len"
    )
    proj_d_ff: int = Field(512, ge=8, le=1_000_000, description="inner width of the projections into the Thinker")
    drop_blanks: bool = Field(True, description="omission of audio frames with a blank or repeated CTC token")
    image_stack: int = Field(1, ge=1, le=64, description="side of the square of neighbouring patches in one position")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the Thinker's residual branches")
    freeze_encoders: bool = Field(True, description="no training of the audio and vision encoders")
    cache_features: bool = Field(
        False,
        description="features of the frozen encoders computed once, at the start, and cached in save_dir; "
        "2 bytes a value: 16 kB for a picture and 3.6 kB for a second of speech with the demo's encoders",
    )
    features_only: bool = resumable(
        False, description="end once the features are cached, for which talker_ckpt need not be there yet"
    )
    ctc_alignment_weight: float = Field(
        1.0, ge=0, description="weight of the CTC loss that aligns audio positions with their transcript"
    )
    origins: dict[str, str] | None = resumable(
        None, description="SHA-256 of each part's initial weights, set by the script"
    )

    # Validation
    val_items: int = resumable(100, ge=1, description="number of held-out items of each task, evenly spaced")
    max_answer_tokens: int = resumable(96, ge=1, description="longest answer in validation, in tokens")

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
        tasks = registered_tasks()
        keys = {f"{side}{task.file_key}" for task in tasks.values() for side in ("", "val_")}
        for key in self.task_files:
            if key not in keys or key in type(self).model_fields:
                found = ", ".join(sorted(keys - set(type(self).model_fields))) or "none, as every task has its own key"
                raise ValueError(f'key "task_files": expected files of {found}, found "{key}"')
        used = {name: task for name, task in tasks.items() if self.file_of(task.file_key)}
        if not used:
            raise ValueError('expected data: "text_path", "image_manifest", "asr_csv" or another, found none')
        for task, weight in self.task_weights.items():
            if task not in tasks:
                raise ValueError(f'key "task_weights": expected tasks of {", ".join(tasks)}, found "{task}"')
            if weight < 0:
                raise ValueError(f'key "task_weights": expected at least 0, found {weight} for {task}')
        for task in used.values():
            for key in task.needs:
                if getattr(self, key) is None and not (key == "talker_ckpt" and self.features_only):
                    stage, *_ = BASE_STAGES[key]
                    raise ValueError(
                        f'key "{key}": expected the folder of stage {stage} for {task.file_key}, found none'
                    )
        if self.cache_features and not self.freeze_encoders:
            raise ValueError('key "cache_features": expected false beside "freeze_encoders": false')
        if self.features_only and not self.cache_features:
            raise ValueError('key "features_only": expected false beside "cache_features": false')
        if self.features_only and not any(task.reads for task in used.values()):
            raise ValueError('key "features_only": expected false where the mix has no pictures and no recordings')
        for task in used.values():
            if self.cache_features and not task.cacheable:
                raise ValueError(f'key "cache_features": expected false beside "{task.file_key}"')
        return self

    def file_of(self, key: str) -> str | None:
        """The file that a task names by ``key``, which is a key of the config or of its ``task_files``."""
        return getattr(self, key) if key in type(self).model_fields else self.task_files.get(key)

    def without_talker(self) -> Self:
        """This config without the tasks that need the talker."""
        theirs = [name for name, task in registered_tasks().items() if "talker_ckpt" in task.needs]
        weights = self.task_weights | dict.fromkeys(theirs, 0.0)
        keys = {"talker_ckpt": None, "speech_csv": None, "val_speech_csv": None, "task_weights": weights}
        return self.model_copy(update=keys)

    def check_files(self) -> None:
        super().check_files()
        for key, path in self.task_files.items():
            check_given(f"task_files: {key}", path)
        if self.image_root is not None and not os.path.isdir(self.image_root):
            raise UserError(f'key "image_root": expected a folder, found none at {self.image_root}')
        for key, (stage, script, *files) in BASE_STAGES.items():
            folder = None if key == "talker_ckpt" and self.features_only else getattr(self, key)
            for file in files if folder is not None else ():
                if not os.path.isfile(os.path.join(folder, file)):
                    raise UserError(
                        f'key "{key}": expected a folder with {file}, found none at {folder}. Train stage {stage} '
                        f"first ({script})"
                    )


def registered_tasks() -> dict[str, type]:
    from omni.stages.tasks import TASKS  # here, as it imports all models, which a config does not need

    return TASKS


class ConversationKeys(BaseModel):
    """The keys of ``SftConfig`` that a trained model needs to converse; an export has no others of its training."""

    model_config = ConfigDict(strict=True)

    prompt: str
    origins: dict[str, str]


STAGE = Stage(
    name="omni",
    prefix="omni",
    final="omni_final.pt",
    unit="tokens",
    best_metric="loss",
    config_name="omni_sft",
    architecture=OmniArchitecture,
    model=OmniModel,
    switches=("use_flash",),
    tokenizer=Tokenizer,
    vocab_size=lambda architecture: architecture.thinker.vocab_size,
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
    options=("show", "num_workers", "task", "image_root"),
    evaluate="omni.stages.evaluation:evaluate_omni",
)
