"""The second part of stage D, the aligner: config, texts with their recordings, metrics, and durations of all texts."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from omni.common.errors import BadRow
from omni.common.host import Host
from omni.common.numerics import weights_sha256
from omni.common.spoken import Language, spoken_version
from omni.data.manifest import Manifest
from omni.models.aligner import Aligner, aligner_nats, check_fits, likeliest_durations, text_symbols
from omni.models.codec import Codec
from omni.models.ops import round_up
from omni.models.speech_architectures import AlignerArchitecture
from omni.stages.codec import SpeechClips, SpeechConfig, count_codes, prepare_codes
from omni.train.precompute import ManifestWithColumns, RaggedArray, precompute
from omni.train.stage import Stage

MAX_TEXT_BYTES = 4096


class AlignerConfig(AlignerArchitecture, SpeechConfig):
    """The config that ``aligner.pt`` was trained with. See ``TalkerConfig.aligner``."""

    @property
    def architecture(self) -> AlignerArchitecture:
        return AlignerArchitecture.of(self)


STAGE = Stage(
    name="aligner",
    prefix="aligner",
    final="aligner.pt",
    unit="bytes",
    best_metric="nats_per_byte",
    letter="D",
    script="train_talker.py",
    config=AlignerConfig,
    config_name="talker",
    architecture=AlignerArchitecture,
    model=Aligner,
)


# ---------------------------------------------------------------------------------------------------------------
# Texts and recordings


def read_symbols(row: dict, language: Language | None) -> list[int]:
    """The ``text_symbols`` of a row's text.

    Raises:
        BadRow: the text is too long.
    """
    symbols = text_symbols(row["text"], language)
    if len(symbols) > MAX_TEXT_BYTES:
        raise BadRow(f"expected a text of at most {MAX_TEXT_BYTES} bytes, found {len(symbols) - 1}")
    return symbols


def pad_bytes(values: list[Tensor], step: int = 1, length: int | None = None) -> Tensor:
    """Pad one value per byte of each text, (bytes,) each -> (B, L), with zeros.

    L is ``length``, or the length of the longest text, rounded up to a multiple of ``step``.
    """
    padded = nn.utils.rnn.pad_sequence(values, batch_first=True)
    L = round_up(padded.shape[1], step) if length is None else length
    return nn.functional.pad(padded, (0, L - padded.shape[1]))


class SpokenTexts(SpeechClips):
    """Texts and the log-mels of their recordings. A sample is (symbols, (T, M))."""

    def read(self, row: dict, rng: np.random.Generator | None) -> tuple[list[int], Tensor]:
        symbols, log_mels = read_symbols(row, self.architecture.text_language), super().read(row, rng)
        alignment_frames = -(-len(log_mels) // self.per_code) * self.architecture.alignment_frames_per_code
        check_fits(symbols, alignment_frames, len(log_mels) * self.mel.hop_length / self.mel.sample_rate)
        return symbols, log_mels

    def collate(self, samples: list[tuple[list[int], Tensor]]) -> dict:
        """``log_mels`` and ``lengths`` as ``SpeechClips``; ``symbols`` (B, L), zero beyond ``text_lengths`` (B,)."""
        texts, clips = zip(*samples, strict=True)
        batch = super().collate(list(clips))
        text_lengths, static_length = torch.tensor([len(text) for text in texts]), None
        if self.static_up_to is not None:  # no text has more bytes than its recording has alignment frames
            n_codes = batch["log_mels"].shape[1] // self.per_code
            static_length = n_codes * self.architecture.alignment_frames_per_code
        return batch | {
            "symbols": pad_bytes([torch.tensor(text) for text in texts], length=static_length),
            "text_lengths": text_lengths,
            "n_targets": int(text_lengths.sum()),
        }


def prepare_durations(run: Host, aligner: Aligner, texts: SpokenTexts, name: str, known: str | None) -> RaggedArray:
    """The ``likeliest_durations`` of all texts, computed once and kept in ``save_dir`` under ``name``.

    Args:
        texts: texts to align, ordered by length; ``training`` is false.
        known: another ``save_dir`` that may have them.
    """

    @torch.no_grad()
    def make(batch: dict) -> list[np.ndarray]:
        symbols, text_lengths, log_mels, lengths = (
            batch[key].to(run.device) for key in ("symbols", "text_lengths", "log_mels", "lengths")
        )
        scores = aligner(symbols, text_lengths, log_mels, lengths)
        return likeliest_durations(scores, aligner.alignment_frames(lengths), text_lengths)

    belongs_to = {"aligner": weights_sha256(aligner)} | spoken_version(aligner.architecture.text_language)
    return precompute(run, f"{name}.durations", texts, "wav", belongs_to, make, note="aligning", known=known)


def prepare_speech(
    run: Host, manifest: Manifest, codec: Codec, aligner: Aligner, max_codes: int, name: str, known: str | None = None
) -> tuple[ManifestWithColumns, np.ndarray]:
    """Code and align all recordings of at most ``max_codes`` codes.

    Args:
        name: of the files in ``save_dir``.
        known: another ``save_dir``, which may have coded and aligned the same ones by the same models.

    Returns:
        The manifest with the columns ``codes`` and ``durations``; (rows,) the lengths in codes, by the headers.
    """
    lengths = count_codes(run, manifest, codec.architecture)
    order = np.argsort(lengths, kind="stable")  # the shortest first
    rows = order[lengths[order] <= max_codes]
    clips = SpeechClips(manifest, rows, codec.architecture, max_codes, training=False)
    texts = SpokenTexts(manifest, rows, aligner.architecture, max_codes, training=False)
    codes = prepare_codes(run, codec, clips, name, known)
    durations = prepare_durations(run, aligner, texts, name, known)
    return ManifestWithColumns(manifest, {"codes": codes, "durations": durations}), lengths


# ---------------------------------------------------------------------------------------------------------------
# Loss and metrics


def aligner_loss(
    model: nn.Module, batch: dict, alignment_frames: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean ``aligner_nats`` per byte; ``alignment_frames`` is the aligner's method."""
    return aligner_nats(model, alignment_frames(batch["lengths"]), batch).sum() / batch["text_lengths"].sum(), {}


def aligner_sums(model: Aligner, batch: dict) -> dict[str, Tensor]:
    return {
        "nats": aligner_nats(model, model.alignment_frames(batch["lengths"]), batch).sum(),
        "symbols": batch["text_lengths"].sum(),
    }


def aligner_metrics(totals: dict[str, float]) -> dict[str, float]:
    return {"nats_per_byte": totals["nats"] / totals["symbols"]}
