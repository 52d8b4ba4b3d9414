"""The third part of stage D, the talker: config, utterances, metrics. Codec and aligner have files of their own."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from omni.common.errors import BadRow, UserError
from omni.data.manifest import ManifestDataset, place_of
from omni.models.ops import round_up
from omni.models.speech_architectures import AlignerArchitecture, CodecArchitecture, TalkerArchitecture
from omni.models.talker import Talker, code_nats, duration_nats, frame_targets, pad_references, references_in
from omni.stages.aligner import AlignerConfig, pad_bytes, read_symbols
from omni.stages.codec import CodecConfig, SpeechConfig, padded_codes, read_log_mels
from omni.stages.voices import REFERENCE_CODES, speaker_of
from omni.train.config import ConfigType, StageConfig, resumable
from omni.train.precompute import ManifestWithColumns
from omni.train.stage import ExportedPart, Stage

NAMED_SPEAKERS = 64  # most speakers that have metrics of their own


class TalkerConfig(TalkerArchitecture, CodecArchitecture, AlignerArchitecture, SpeechConfig):
    """Stage D, ``train_talker.py``: the codec first, then the aligner, then the talker."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "use_swiglu": "the MLP is always SwiGLU, as in Qwen3",
    }

    codec_ckpt: str | None = resumable(
        None, description="folder with a trained rvq_codec.pt, optionally also aligner.pt; default: both are trained"
    )
    codec_steps: int = resumable(5000, ge=1, description="optimizer updates of the codec, which is trained first")
    codec_lr: float = resumable(1e-3, gt=0, description="peak learning rate of the codec")
    codec_warmup_steps: int = resumable(100, ge=0, description="warm-up steps of the codec")
    codec_batch_size: int = Field(16, ge=1, le=1_048_576)
    commitment_weight: float = Field(
        0.25, ge=0, description="weight of the commitment loss, which pulls latents to their codes"
    )
    aligner_steps: int = resumable(2000, ge=1, description="optimizer updates of the aligner")
    aligner_lr: float = resumable(2e-3, gt=0, description="peak learning rate of the aligner")
    aligner_warmup_steps: int = resumable(50, ge=0, description="warm-up steps of the aligner")
    aligner_batch_size: int = Field(16, ge=1, le=1_048_576)
    parts_only: bool = resumable(
        False, description="end after codec and aligner, for which audio_ckpt need not be there yet"
    )
    frame_dropout: float = Field(0.25, ge=0, lt=1, description="share of the frames hidden from the talker in training")
    duration_weight: float = Field(0.3, ge=0, description="weight of the duration loss")
    audio_ckpt: str | None = resumable(
        None, description="folder of stage B, whose model transcribes the speech for word error rates"
    )
    vocoder_ckpt: str | None = resumable(None, description="folder of stage F; default: Griffin-Lim")
    val_samples: int = resumable(
        2, ge=0, description="held-out sentences written to save_dir/samples, sound and picture"
    )
    val_sentences: int = resumable(100, ge=1, description="held-out sentences spoken in each validation")
    val_temperature: float | None = resumable(
        None, ge=0.01, le=100, description="temperature at which they are spoken a second time (wer_sampled)"
    )

    @property
    def architecture(self) -> TalkerArchitecture:
        return TalkerArchitecture.of(self)

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
            folder = None if key == "audio_ckpt" and self.parts_only else getattr(self, key)
            if folder is not None and not os.path.isfile(os.path.join(folder, file)):
                raise UserError(f'key "{key}": expected a folder with {file}, found none at {folder}. {remedy}')


STAGE = Stage(
    name="talker",
    prefix="talker",
    final="talker.pt",
    unit="codes",
    best_metric="code_perplexity",
    letter="D",
    script="train_talker.py",
    config=TalkerConfig,
    config_name="talker",
    parts=("rvq_codec", "aligner"),
    architecture=TalkerArchitecture,
    model=Talker,
    switches=("use_flash",),
    exports=(
        ExportedPart(
            "talker",
            "predicts speech codes",
            "--talker_ckpt",
            figures=("code_perplexity", "wer_talker", "wer_recordings"),
            command='python infer_chat.py --ckpt_dir merged_model --text "What is your name?" --audio_out answer.wav',
        ),
    ),
    options=("show", "audio_ckpt", "vocoder_ckpt", "save_speech", "voice", "voice_from", "temperature"),
    evaluate="omni.stages.evaluation:evaluate_talker",
)


# ---------------------------------------------------------------------------------------------------------------
# Utterances


@dataclass(frozen=True)
class Utterance:
    """One sample: a text, the codes (T, Q) of its recording, and the durations (L,) of the text's bytes."""

    text: str
    symbols: list[int]
    codes: Tensor
    durations: Tensor
    recording: dict = field(default_factory=dict)  # the columns of its row that name the recording
    reference: Tensor | None = None  # codes (N, Q) of a recording in the same voice, for a talker of several voices
    speaker: str = ""


class CodedSpeech(ManifestDataset):
    """Texts with the codes and durations of their recordings, two columns of ``ManifestWithColumns``; for a talker of
    several voices also with references, a third.

    Args:
        max_codes, static: see ``SpeechClips``.
    """

    def __init__(
        self,
        manifest: ManifestWithColumns,
        rows: np.ndarray,
        architecture: TalkerArchitecture,
        max_codes: int,
        *,
        static: bool = False,
        **others,
    ) -> None:
        super().__init__(manifest, rows, **others)
        self.architecture, self.max_codes = architecture, max_codes
        self.static_up_to = max_codes if static else None

    def read(self, row: dict, rng: np.random.Generator | None) -> Utterance:
        symbols = read_symbols(row, self.architecture.text_language)
        if not len(row["codes"]):
            read_log_mels(self.manifest, row, self.architecture, self.max_codes)  # raises if the recording is bad
            raise BadRow(
                f"{row['wav']}: could not be read when the recordings were coded; delete codes/ to code them again"
            )
        if not len(row["durations"]):
            raise BadRow(f"expected a text of fewer bytes for its {len(row['codes'])} codes, found {len(symbols) - 1}")
        codes, durations = (torch.from_numpy(row[name].astype(np.int64)) for name in ("codes", "durations"))
        recording = {"wav": row["wav"]} | place_of(row)
        if not self.architecture.voice_layers:
            return Utterance(row["text"], symbols, codes, durations, recording)
        speaker, reference = speaker_of(row), torch.from_numpy(row["reference"](rng).astype(np.int64))
        return Utterance(row["text"], symbols, codes, durations, recording, reference, speaker)

    def collate(self, samples: list[Utterance]) -> dict:
        return collate_utterances(samples, self.architecture, static_up_to=self.static_up_to)


def collate_utterances(
    samples: Sequence[Utterance], architecture: TalkerArchitecture, *, step: int = 1, static_up_to: int | None = None
) -> dict:
    """``symbols`` and ``durations`` (B, L), ``codes`` (B, T, Q), zero beyond ``text_lengths``, ``lengths`` (B,);
    ``texts``, ``wavs``. L and T are multiples of ``step``, or a few static lengths up to a number of codes. With
    several voices also ``references`` (B, N, Q), zero beyond ``reference_lengths`` (B,), and ``speakers``."""
    lengths = [len(sample.codes) for sample in samples]
    n_codes = padded_codes(round_up(max(lengths), step), static_up_to)
    static_length = None if static_up_to is None else n_codes * architecture.alignment_frames_per_code
    voices = {}
    if architecture.voice_layers:
        references, reference_lengths = pad_references([sample.reference for sample in samples])
        excess = -references.shape[1] % REFERENCE_CODES  # few lengths, for torch.compile
        voices = {"references": F.pad(references, (0, 0, 0, excess)), "reference_lengths": reference_lengths}
        voices["speakers"] = [sample.speaker for sample in samples]
    return voices | {
        "symbols": pad_bytes([torch.tensor(sample.symbols) for sample in samples], step, static_length),
        "durations": pad_bytes([sample.durations for sample in samples], step, static_length),
        "text_lengths": torch.tensor([len(sample.symbols) for sample in samples]),
        "codes": torch.stack([F.pad(sample.codes, (0, 0, 0, n_codes - len(sample.codes))) for sample in samples]),
        "lengths": torch.tensor(lengths),
        "texts": [sample.text for sample in samples],
        "recordings": [sample.recording for sample in samples],
        "n_targets": sum(sample.codes.numel() + 1 for sample in samples),
    }


# ---------------------------------------------------------------------------------------------------------------
# Metrics


def talker_sums(model: Talker, batch: dict) -> dict[str, Tensor]:
    """Sums over a batch, given the true durations and codes so far: nats of each codebook (Q,), ends and durations; and
    for each speaker of ``speakers_in`` the nats of all codebooks."""
    codes, lengths = batch["codes"], batch["lengths"]
    text = batch["symbols"], batch["text_lengths"]
    states, references = batch.get("thinker_states"), references_in(batch)
    logits, log_durations = model(*text, codes, batch["durations"], states, references=references)
    targets = frame_targets(codes, lengths, model.codebook_size)
    nats, ends = code_nats(logits, targets), targets == model.codebook_size
    by_speaker = {}
    for name, rows in speakers_in(model, batch).items():
        by_speaker[f"nats/{name}"] = nats[rows].masked_fill(ends[rows], 0.0).sum()
        by_speaker[f"codes/{name}"] = lengths[rows].sum() * model.codebooks
    return by_speaker | {
        "nats": nats.masked_fill(ends, 0.0).sum(dim=(0, 1)),
        "end_nats": nats[ends].sum(),
        "frames": lengths.sum(),
        "utterances": ends.sum(),
        "duration_nats": duration_nats(log_durations, batch).sum(),
        "symbols": batch["text_lengths"].sum(),
    }


def speakers_in(model: Talker, batch: dict) -> dict[str, list[int]]:
    """The samples of each speaker with a name; {} for a talker of one voice, or of more than ``NAMED_SPEAKERS``."""
    rows: dict[str, list[int]] = {}
    if 1 < len(model.architecture.speakers) <= NAMED_SPEAKERS:
        for row, name in enumerate(batch.get("speakers", ())):
            if name and name in model.architecture.speakers:
                rows.setdefault(name, []).append(row)
    return rows


def talker_metrics(totals: dict) -> dict[str, float]:
    """``code_perplexity``: exp of the nats per code, over all codebooks, of each, and ``_of_`` each speaker. ``loss``:
    nats per target. ``duration_loss``: see ``duration_nats``."""
    nats, frames = totals["nats"], totals["frames"]
    each = (nats / frames).exp().tolist()
    loss = (nats.sum().item() + totals["end_nats"]) / (frames * len(nats) + totals["utterances"])
    metrics = {"loss": loss, "code_perplexity": math.exp(nats.sum().item() / (frames * len(nats)))}
    metrics |= {f"code_perplexity_{level}": value for level, value in enumerate(each, start=1)}
    for key in [key for key in totals if key.startswith("nats/")]:
        name = key.removeprefix("nats/")
        metrics[f"code_perplexity_of_{name}"] = math.exp(totals[key] / totals[f"codes/{name}"])
    return metrics | {"duration_loss": totals["duration_nats"] / totals["symbols"]}
