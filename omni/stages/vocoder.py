"""Stage F, the vocoder: config, recordings, losses and metrics."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from omni.common.errors import UserError
from omni.data.audio import MelSpec, griffin_lim, load_audio, log_mel
from omni.data.manifest import Manifest, ManifestDataset
from omni.models.codec import Codec
from omni.models.codec import mel_spec as codec_mel_spec
from omni.models.excitation import excitation, pitch_loss, pitch_of, pitch_window, pulses
from omni.models.speech_architectures import DiscriminatorArchitecture, VocoderArchitecture
from omni.models.vocoder import Generator, build_generator, fold_weight_norm, mel_spec, refuse_other_mels
from omni.stages.codec import STAGE as CODEC
from omni.train.config import TTS_HINT, Files, StageConfig, input_files, resumable
from omni.train.stage import ExportedPart, Stage, load


class VocoderConfig(VocoderArchitecture, DiscriminatorArchitecture, StageConfig):
    """Stage F, ``train_vocoder.py``: HiFi-GAN's generator and discriminators, and a reader of the pitch under
    ``harmonic_source``."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "lr": "lr_g and lr_d are the peak learning rates",
    }

    train_csv: Files = input_files("data/audio/tts.csv", hint=TTS_HINT, description="manifest with the column wav")
    val_csv: Files | None = input_files(
        None, hint=TTS_HINT, description="held-out manifest; default: val_split of train_csv's rows"
    )
    val_samples: int = resumable(2, ge=0, description="held-out clips written to save_dir/samples, sound and picture")
    val_clips: int = resumable(32, ge=1, description="number of held-out clips in validation, evenly spaced")
    max_clip_s: float = resumable(60.0, gt=0, description="longest recording in seconds; a longer one is a bad row")
    codec_ckpt: str | None = resumable(
        None,
        description="folder of stage D, whose codec resynthesises the log-mels; default: the recordings' own log-mels",
    )

    # Optimisation
    segment_samples: int = Field(
        8000, le=16_777_216, description="length of the random segments trained on, a multiple of hop_length"
    )
    lr_g: float = resumable(2e-4, gt=0, description="peak learning rate of the generator")
    lr_d: float = resumable(2e-4, gt=0, description="peak learning rate of the discriminators")
    wd: float = resumable(0.01, ge=0, description="weight decay")
    max_grad_norm: float = resumable(1000.0, gt=0, description="norm to which gradients are clipped")
    mel_loss_windows: list[Annotated[int, Field(ge=16, multiple_of=8)]] = resumable(
        [],
        max_length=16,
        description="further window lengths of the mel loss in samples; short ones make a buzz costly",
    )
    lambda_mel: float = resumable(45.0, ge=0, description="weight of the mel loss, the mean difference of the log-mels")
    lambda_fm: float = resumable(
        2.0, ge=0, description="weight of the feature loss, the difference in the discriminators' layers"
    )
    lambda_adv: float = resumable(1.0, ge=0, description="weight of the adversarial loss")
    lambda_pitch: float = resumable(
        1.0,
        ge=0,
        description="weight of the pitch loss, by which the pitch is learnt from the log-mels, under harmonic_source",
    )
    adv_start_step: int = resumable(
        0, ge=0, description="first step of the discriminators; before it mel and pitch loss train alone"
    )

    @model_validator(mode="after")
    def _segments_fit(self) -> Self:
        hop = self.hop_length
        if self.mel_loss_windows and max(self.mel_loss_windows) > self.segment_samples:
            raise ValueError(
                f'key "mel_loss_windows": expected at most segment_samples {self.segment_samples}, '
                f"found {max(self.mel_loss_windows)}"
            )
        if self.segment_samples % hop or self.segment_samples < self.win_length:
            raise ValueError(
                f'key "segment_samples": expected a multiple of hop_length {hop}, at least win_length '
                f"{self.win_length}, found {self.segment_samples}"
            )
        return self

    @property
    def architecture(self) -> VocoderArchitecture:
        return VocoderArchitecture.of(self)

    @property
    def discriminators(self) -> DiscriminatorArchitecture:
        return DiscriminatorArchitecture.of(self)

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
    letter="F",
    script="train_vocoder.py",
    config=VocoderConfig,
    config_name="vocoder",
    architecture=VocoderArchitecture,
    model=build_generator,
    prepare=fold_weight_norm,
    exports=(
        ExportedPart(
            "vocoder",
            "synthesises sound from log-mels",
            "--vocoder_ckpt",
            figures=("mel_l1", "mel_l1_griffin_lim"),
            model=lambda architecture: fold_weight_norm(build_generator(architecture)),
        ),
    ),
    evaluate="omni.stages.evaluation:evaluate_vocoder",
)


def load_vocoder_for(
    codec: Path | str, spec: MelSpec, folder: str | Path | None, device: torch.device | str
) -> Generator | None:
    """The vocoder in ``folder``, for the log-mels ``spec`` of ``codec``, a name for messages; None without a folder.

    Raises:
        UserError: the checkpoint is missing or damaged, or has other log-mels.
    """
    if folder is None:
        return None
    vocoder = load(STAGE, folder, device).model
    refuse_other_mels(folder, vocoder.architecture, codec, spec)
    return vocoder


def load_codec_of(config: VocoderConfig) -> Codec | None:
    """The codec of ``codec_ckpt``, on the CPU, where rows are read; None without one."""
    if config.codec_ckpt is None:
        return None
    codec = load(CODEC, config.codec_ckpt).model
    refuse_other_mels("this config", config.architecture, config.codec_ckpt, codec_mel_spec(codec.architecture))
    return codec


# ---------------------------------------------------------------------------------------------------------------
# Recordings


def read_clip(manifest: Manifest, row: dict, config: VocoderConfig) -> Tensor:
    """A row's recording (S,), cut to whole hops, at least one.

    Raises:
        BadRow: it cannot be used.
    """
    path = manifest.file(row, "wav")
    waveform = torch.from_numpy(load_audio(path, config.sample_rate, config.max_clip_s, mel_spec(config).win_length))
    hop = config.hop_length
    samples = max(hop, len(waveform) // hop * hop)
    return F.pad(waveform, (0, samples - len(waveform)))  # a negative number cuts off


def segment_log_mel(waveform: Tensor, start: int, frames: int, spec: MelSpec) -> Tensor:
    """Frames ``start`` to ``start + frames`` of the log-mel of a whole clip (S,), without computing the others.

    Returns:
        (frames, M)
    """
    piece, first = _with_context(waveform, start, frames, spec.win_length, spec)
    return log_mel(piece, spec)[start - first : start - first + frames]


def segment_pitch(waveform: Tensor, start: int, frames: int, spec: MelSpec) -> Tensor:
    """As ``segment_log_mel``, of the pitch: (frames,) in Hz, see ``pitch_of``."""
    piece, first = _with_context(waveform, start, frames, pitch_window(spec), spec)
    return pitch_of(piece[None], spec)[0, start - first : start - first + frames]


def _with_context(waveform: Tensor, start: int, frames: int, width: int, spec: MelSpec) -> tuple[Tensor, int]:
    """The samples that windows of ``width`` around these frames of a clip (S,) reach, and their first frame."""
    context = -(-width // spec.hop_length)  # frames: beyond every window, and never too short to be reflected
    first = max(0, start - context)
    return waveform[first * spec.hop_length : (start + frames + context) * spec.hop_length], first


class Clips(ManifestDataset):
    """Recordings with their log-mels, see ``ManifestDataset``: random segments in training, with their pitch if the
    vocoder has a ``harmonic_source``, else whole clips.

    Args:
        codec: resynthesises the log-mels; None: the recordings' own log-mels.
    """

    def __init__(
        self, manifest: Manifest, rows: np.ndarray, config: VocoderConfig, *, codec: nn.Module | None = None, **keys
    ) -> None:
        super().__init__(manifest, rows, **keys)
        self.config, self.spec, self.codec = config, mel_spec(config), codec

    def read(self, row: dict, rng: np.random.Generator | None) -> dict[str, Tensor]:
        waveform, hop = read_clip(self.manifest, row, self.config), self.config.hop_length
        start, frames = 0, len(waveform) // hop
        if rng is not None:
            wanted = self.config.segment_samples // hop
            waveform = F.pad(waveform, (0, max(0, wanted - frames) * hop))  # silence after a short clip
            start, frames = int(rng.integers(max(0, frames - wanted) + 1)), wanted
        if self.codec is None:
            mel = segment_log_mel(waveform, start, frames, self.spec)
        else:  # the codec codes whole clips, as it does when the talker speaks
            with torch.no_grad():
                mel = self.codec.resynthesise(log_mel(waveform, self.spec)[None])[0, start : start + frames].clone()
        sample = {"log_mel": mel, "waveform": waveform[start * hop : (start + frames) * hop].clone()}
        if rng is not None and self.config.harmonic_source:
            sample["pitch"] = segment_pitch(waveform, start, frames, self.spec)
        return sample

    def collate(self, samples: list[dict[str, Tensor]]) -> dict:
        """``log_mel`` (B, T, M), ``waveform`` (B, T * hop_length) and, in training with a ``harmonic_source``,
        ``pitch`` (B, T) in Hz, padded with 0; ``frames`` (B,) of each."""
        frames = torch.tensor([len(sample["log_mel"]) for sample in samples])
        batch = {
            name: nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True)
            for name in samples[0]
        }
        return batch | {"frames": frames, "n_targets": int(frames.sum()) * self.config.hop_length}


# ---------------------------------------------------------------------------------------------------------------
# Losses: of a batch of equally long segments, each a mean over the batch


def generate(model: nn.Module, batch: dict, spec: MelSpec) -> tuple[Tensor, Tensor | None]:
    """Waveforms (B, S) from a batch of ``Clips``, and the loss of the pitch that a generator with a ``harmonic_source``
    reads; it hears pulses at the recordings' own pitch until it is trained."""
    if "pitch" not in batch:
        return model(batch["log_mel"]), None
    pitch, noise = batch["pitch"], torch.randn_like(batch["waveform"])
    source = excitation(batch["log_mel"], pitch, pulses(pitch, spec), noise, spec)
    waveforms, logits = model(batch["log_mel"], source)
    return waveforms, pitch_loss(logits, pitch)


def discriminator_loss(real: list[list[Tensor]], generated: list[list[Tensor]]) -> Tensor:
    """Least squares (Mao et al. 2017): 1 for real, 0 for generated waveforms. Summed over the discriminators."""
    return sum(
        (1 - ours[-1].float()).square().mean() + theirs[-1].float().square().mean()
        for ours, theirs in zip(real, generated, strict=True)
    )


def adversarial_loss(generated: list[list[Tensor]]) -> Tensor:
    """Least squares: 1 for generated waveforms. Summed over the discriminators."""
    return sum((1 - theirs[-1].float()).square().mean() for theirs in generated)


def feature_loss(real: list[list[Tensor]], generated: list[list[Tensor]]) -> Tensor:
    """Mean difference of a layer's outputs, summed over the layers of all discriminators. Larsen et al. 2016."""
    return sum(
        (a.float() - b.float()).abs().mean()
        for ours, theirs in zip(real, generated, strict=True)
        for a, b in zip(ours[:-1], theirs[:-1], strict=True)
    )


def loss_specs(config: VocoderConfig) -> list[MelSpec]:
    """The log-mels that the mel loss compares: the vocoder's own, and one for each of ``mel_loss_windows``."""
    own = mel_spec(config)
    return [own] + [
        replace(own, n_fft=window, win_length=window, hop_length=window // 4, n_mels=window // 8)
        for window in config.mel_loss_windows
    ]


def mel_loss(real: Tensor, generated: Tensor, specs: Sequence[MelSpec]) -> Tensor:
    """Mean difference of the log-mels of two batches of waveforms (B, S): half of it that of the first of ``specs``,
    half the mean of the others.

    One window length, as in HiFi-GAN, tells nothing of how sound changes within it. Several as in Kumar et al. 2023,
    "High-Fidelity Audio Compression with Improved RVQGAN".
    """
    differences = []
    for spec in specs:
        with torch.no_grad():
            target = log_mel(real, spec)
        differences.append((log_mel(generated, spec) - target).abs().mean())
    own, *others = differences
    return (own + torch.stack(others).mean()) / 2 if others else own


# ---------------------------------------------------------------------------------------------------------------
# Metrics


class VocoderScore:
    """The distance between log-mels of generated and real waveforms, and Griffin-Lim's distance on the same clips.

    Griffin-Lim's does not change, so only the first validation computes it.

    Args:
        show: called with the step, the number of the clip and its waveforms by name, for the first ``shown`` clips.
    """

    def __init__(
        self,
        architecture: VocoderArchitecture,
        show: Callable[[int, int, dict[str, Tensor]], None] | None = None,
        shown: int = 2,
    ) -> None:
        self.spec, self.show, self.shown = mel_spec(architecture), show, shown
        self.griffin_lim: dict[tuple[int, ...], Tensor] = {}  # rows of a batch's clips -> sum of its differences

    def sums(self, model: Generator, batch: dict) -> dict[str, Tensor]:
        """Sums over the clips of a batch from ``Clips.collate``, in float32 even under autocast."""
        rows, hop = tuple(batch["sample_rows"]), self.spec.hop_length
        known = rows in self.griffin_lim
        totals = dict.fromkeys(("difference", "griffin_lim", "values"), torch.zeros(()))
        # one at a time: padding would change the end
        for number, mel, real, frames in zip(
            rows, batch["log_mel"], batch["waveform"], batch["frames"].tolist(), strict=True
        ):
            mel, real = mel[:frames], real[: frames * hop]
            with torch.autocast(mel.device.type, enabled=False):
                clips = {"real": real, "hifigan": model.vocode(mel)}
            shown = self.show is not None and number < self.shown
            if shown or not known:
                clips["griffin_lim"] = griffin_lim(mel, self.spec)
            if shown:
                self.show(batch["step"], number, clips)
            target = log_mel(real, self.spec)
            totals["values"] = totals["values"] + target.numel()
            totals["difference"] = totals["difference"] + self._difference(clips["hifigan"], target)
            if not known:
                totals["griffin_lim"] = totals["griffin_lim"] + self._difference(clips["griffin_lim"], target)
        totals["griffin_lim"] = self.griffin_lim.setdefault(rows, totals["griffin_lim"])
        return totals

    def _difference(self, waveform: Tensor, target: Tensor) -> Tensor:
        return (log_mel(waveform, self.spec) - target).abs().sum().cpu()

    @staticmethod
    def metrics(totals: dict[str, float]) -> dict[str, float]:
        """``mel_l1``: mean difference of natural logarithms, over all frames and channels."""
        return {
            "mel_l1": totals["difference"] / totals["values"],
            "mel_l1_griffin_lim": totals["griffin_lim"] / totals["values"],
        }
