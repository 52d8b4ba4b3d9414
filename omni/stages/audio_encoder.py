"""Stage B: its config."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from omni.models.architectures import AudioEncoderArchitecture
from omni.train.config import ASR_HINT, StageConfig, input_file
from omni.train.stage import ExportedPart, Stage


class AudioEncoderConfig(AudioEncoderArchitecture, StageConfig):
    """Stage B, ``train_audio_enc.py``."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "target_hz": "output frames per second follow from sample_rate, frame_hop and downsample_time",
        "max_text_len": "a text is as long as its recording allows",
    }

    train_csv: str = input_file(hint=ASR_HINT, description="manifest with the columns wav and text")
    val_csv: str | None = input_file(
        None, hint=ASR_HINT, description="held-out manifest; default: val_split of train_csv's texts"
    )
    val_voices_csv: str | None = input_file(
        None, hint=ASR_HINT, description="a second held-out manifest, of voices that are not in training"
    )
    max_mel_length: int = Field(
        2048,
        ge=8,
        le=16_777_216,
        description="mel frames (2048: 20 s); longer rows are left out, use_compile pads up to it",
    )
    spec_time_masks: int = Field(2, ge=0, description="SpecAugment: bands of time blanked out in each utterance")
    spec_time_width: int = Field(40, ge=0, description="their greatest width, in mel frames")
    spec_freq_masks: int = Field(2, ge=0, description="SpecAugment: bands of frequency")
    spec_freq_width: int = Field(15, ge=0, description="their greatest width, in mel channels")
    speed_perturb: float = Field(0.0, ge=0, le=0.5, description="0.1: utterances at 0.9, 1 or 1.1 times their speed")

    @model_validator(mode="after")
    def _voices_need_a_comparison(self) -> Self:
        if self.val_voices_csv and not self.val_csv and not self.val_split:
            raise ValueError('key "val_voices_csv": expected val_csv or val_split beside it, found neither')
        return self


STAGE = Stage(
    name="audio_enc",
    prefix="audio_enc",
    final="audio_enc.pt",
    unit="tokens",
    best_metric="wer",
    config_name="audio_enc",
    exports=(
        ExportedPart(
            "audio_encoder",
            "encodes recordings",
            "--audio_ckpt or --omni_ckpt",
            figures=("wer", "wer_unseen_voices", "cer"),
        ),
    ),
    letter="B",
    script="train_audio_enc.py",
    config=AudioEncoderConfig,
)
