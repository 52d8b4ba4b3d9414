"""Stage D and its three parts, codec, aligner and talker: their configs."""

import os
from typing import ClassVar

from pydantic import BaseModel, Field

from omni.common.errors import UserError
from omni.models.architectures import AlignerArchitecture, CodecArchitecture, TalkerArchitecture
from omni.train.config import TTS_HINT, ConfigType, StageConfig, input_file, resumable
from omni.train.stage import ExportedPart, Stage


class SpeechManifest(BaseModel):
    """What all parts of stage D learn from."""

    tts_csv: str = input_file(hint=TTS_HINT, description="manifest with the columns text and wav, one voice")
    val_csv: str | None = input_file(
        None, hint=TTS_HINT, description="held-out manifest; default: val_split of tts_csv's texts"
    )
    max_mel_length: int = Field(
        2048,
        ge=1,
        le=16_777_216,
        description="longest recording in frames of frame_ms (2048: 164 s); longer rows are left out",
    )


class CodecConfig(CodecArchitecture, SpeechManifest, StageConfig):
    """The first part of stage D: what ``rvq_codec.pt`` was trained with. See ``TalkerConfig.codec``."""

    commitment_weight: float = Field(0.25, ge=0, description="of the loss that pulls latents to their codes")


class AlignerConfig(AlignerArchitecture, SpeechManifest, StageConfig):
    """The second part of stage D: what ``aligner.pt`` was trained with. See ``TalkerConfig.aligner``."""


class TalkerConfig(TalkerArchitecture, CodecArchitecture, AlignerArchitecture, SpeechManifest, StageConfig):
    """Stage D, ``train_talker.py``: the codec first, then the aligner, then the talker."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "use_swiglu": "the MLP is always SwiGLU, as in Qwen3",
    }

    codec_ckpt: str | None = resumable(
        None, description="folder with an rvq_codec.pt, and perhaps an aligner.pt, to use; default: they are trained"
    )
    codec_steps: int = resumable(5000, ge=1, description="optimizer updates of the codec, before those of the talker")
    codec_lr: float = resumable(1e-3, gt=0, description="the codec's peak learning rate")
    codec_warmup_steps: int = resumable(100, ge=0)
    codec_batch_size: int = Field(16, ge=1, le=1_048_576)
    commitment_weight: float = Field(0.25, ge=0, description="of the loss that pulls latents to their codes")
    aligner_steps: int = resumable(2000, ge=1, description="optimizer updates of the aligner")
    aligner_lr: float = resumable(2e-3, gt=0, description="its peak learning rate")
    aligner_warmup_steps: int = resumable(50, ge=0)
    aligner_batch_size: int = Field(16, ge=1, le=1_048_576)
    frame_dropout: float = Field(0.25, ge=0, lt=1, description="share of the frames hidden from the talker in training")
    duration_weight: float = Field(0.3, ge=0, description="of the loss of the durations, beside that of the codes")
    audio_ckpt: str | None = resumable(None, description="folder of stage B, whose model listens to what is said")
    vocoder_ckpt: str | None = resumable(None, description="folder of stage F; default: Griffin-Lim")
    val_samples: int = resumable(
        2, ge=0, description="of those that are written to save_dir/samples, sound and picture"
    )
    val_sentences: int = resumable(100, ge=1, description="held-out sentences said in each validation, and listened to")

    @property
    def codec(self) -> CodecConfig:
        return self._part(CodecConfig, "codec")

    @property
    def aligner(self) -> AlignerConfig:
        return self._part(AlignerConfig, "aligner")

    def _part(self, cls: type[ConfigType], name: str) -> ConfigType:
        """The config of one part of the stage: ``<name>_lr`` is its ``lr``, and so on."""
        keys = {key: getattr(self, key) for key in cls.model_fields}
        own = {"lr": "lr", "warmup_steps": "warmup_steps", "max_steps": "steps", "batch_size": "batch_size"}
        return cls(**(keys | {key: getattr(self, f"{name}_{short}") for key, short in own.items()}))

    def check_files(self) -> None:
        super().check_files()
        for key, file, remedy in (
            ("codec_ckpt", "rvq_codec.pt", "Leave the key out to train a codec first"),
            ("audio_ckpt", "audio_enc.pt", "Train stage B first, or leave the key out: no word error rates then"),
            ("vocoder_ckpt", "hifigan.pt", "Train stage F first, or leave the key out: Griffin-Lim then"),
        ):
            folder = getattr(self, key)
            if folder is not None and not os.path.isfile(os.path.join(folder, file)):
                raise UserError(f'key "{key}": expected a folder with {file}, found none at {folder}. {remedy}')


CODEC = Stage(
    name="codec",
    prefix="rvq_codec",
    final="rvq_codec.pt",
    unit="frames",
    best_metric="reconstruction_mse",
    config_name="talker",
    exports=(
        ExportedPart(
            "rvq",
            "decodes speech codes into log-mels",
            "--talker_ckpt",
            figures=("reconstruction_mse",),
        ),
    ),
    letter="D",
    script="train_talker.py",
    config=CodecConfig,
)
ALIGNER = Stage(
    name="aligner",
    prefix="aligner",
    final="aligner.pt",
    unit="bytes",
    best_metric="nats_per_byte",
    config_name="talker",
    letter="D",
    script="train_talker.py",
    config=AlignerConfig,
)
STAGE = Stage(
    name="talker",
    prefix="talker",
    final="talker.pt",
    unit="codes",
    best_metric="code_perplexity",
    config_name="talker",
    exports=(
        ExportedPart(
            "talker",
            "predicts speech codes",
            "--talker_ckpt",
            figures=("code_perplexity", "wer_talker", "wer_recordings"),
            command='python infer_chat.py --ckpt_dir merged_model --text "What is your name?" --audio_out answer.wav',
        ),
    ),
    letter="D",
    script="train_talker.py",
    config=TalkerConfig,
)
