"""Stage F: its config."""

import os
from typing import ClassVar, Self

from pydantic import Field, model_validator

from omni.common.errors import UserError
from omni.models.architectures import ListedSize, VocoderArchitecture
from omni.train.config import TTS_HINT, StageConfig, input_file, resumable
from omni.train.stage import ExportedPart, Stage


class VocoderConfig(VocoderArchitecture, StageConfig):
    """Stage F, ``train_vocoder.py``: the generator of HiFi-GAN, and the discriminators that it is trained against."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "lr": "lr_g and lr_d are the peak learning rates",
    }

    train_csv: str = input_file("data/audio/tts.csv", hint=TTS_HINT, description="manifest with the column wav")
    val_csv: str | None = input_file(
        None, hint=TTS_HINT, description="held-out manifest; default: val_split of train_csv's rows"
    )
    val_samples: int = resumable(2, ge=0, description="clips that are written to save_dir/samples, sound and picture")
    val_clips: int = resumable(
        32, ge=1, description="held-out clips that are validated on, evenly spaced in their file"
    )
    max_clip_s: float = resumable(60.0, gt=0, description="seconds; a longer recording is a bad row")
    codec_ckpt: str | None = resumable(
        None, description="folder of stage D: learn to vocode what its codec makes of the log-mels"
    )

    # Discriminators
    mpd_periods: list[ListedSize] = Field([2, 3, 5, 7, 11], description="samples; one discriminator for each")
    msd_num_scales: int = Field(
        3, ge=0, le=16, description="discriminators of the waveform at full, half, quarter ... rate"
    )
    disc_channels: int = Field(
        32, le=65_536, description="of the first layer of a period's discriminator; the others follow it"
    )

    # Optimisation
    segment_samples: int = Field(
        8000, le=16_777_216, description="length of the random segments trained on, a multiple of hop_length"
    )
    lr_g: float = resumable(2e-4, gt=0, description="peak learning rate of the generator")
    lr_d: float = resumable(2e-4, gt=0, description="peak learning rate of the discriminators")
    wd: float = resumable(0.01, ge=0, description="weight decay")
    max_grad_norm: float = resumable(1000.0, gt=0)
    lambda_mel: float = resumable(45.0, ge=0, description="weight of the mean difference of the log-mels")
    lambda_fm: float = resumable(2.0, ge=0, description="weight of the difference in the discriminators' features")
    lambda_adv: float = resumable(1.0, ge=0, description="weight of deceiving the discriminators")
    adv_start_step: int = resumable(
        0, ge=0, description="until this step the log-mels alone teach, and no discriminator runs"
    )

    @model_validator(mode="after")
    def _discriminator_sizes_fit(self) -> Self:
        hop = self.hop_length
        if self.segment_samples % hop or self.segment_samples < self.win_length:
            raise ValueError(
                f'key "segment_samples": expected a multiple of hop_length {hop}, at least win_length '
                f"{self.win_length}, found {self.segment_samples}"
            )
        if any(period < 1 for period in self.mpd_periods):
            raise ValueError(f'key "mpd_periods": expected positive numbers, found {self.mpd_periods}')
        if not self.mpd_periods and not self.msd_num_scales:
            raise ValueError('key "mpd_periods": expected a period, or msd_num_scales above 0, found neither')
        if self.disc_channels < 4 or self.disc_channels % 4:
            raise ValueError(f'key "disc_channels": expected a multiple of 4, found {self.disc_channels}')
        return self

    def check_files(self) -> None:
        super().check_files()
        if self.codec_ckpt is not None and not os.path.isfile(os.path.join(self.codec_ckpt, "rvq_codec.pt")):
            raise UserError(
                f'key "codec_ckpt": expected a folder with rvq_codec.pt, found none at {self.codec_ckpt}. '
                "Train stage D first (train_talker.py)"
            )


STAGE = Stage(
    name="vocoder",
    prefix="hifigan",
    final="hifigan.pt",
    unit="samples",
    best_metric="mel_l1",
    config_name="vocoder",
    exports=(
        ExportedPart(
            "vocoder",
            "synthesises sound from log-mels",
            "--vocoder_ckpt",
            figures=("mel_l1", "mel_l1_griffin_lim"),
        ),
    ),
    letter="F",
    script="train_vocoder.py",
    config=VocoderConfig,
)
