"""The first part of stage D, the codec: config, recordings, loss, metrics, and the codes of all recordings."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from omni.common.caches import require_finite
from omni.common.host import Host
from omni.common.numerics import weights_sha256
from omni.data.audio import MelSpec, load_audio, load_speech, log_mel, mel_statistics
from omni.data.manifest import Manifest, ManifestDataset, read_some, spread
from omni.data.measure import files_digest
from omni.data.recordings import measure_samples, static_lengths
from omni.models.codec import Codec, mel_spec
from omni.models.quantizer import masked_mean
from omni.models.speech_architectures import CodecArchitecture, SpeechFrames
from omni.train.config import TTS_HINT, Files, StageConfig, input_files
from omni.train.precompute import RaggedArray, precompute
from omni.train.stage import ExportedPart, Stage

STATISTICS_CLIPS = 256


class SpeechConfig(StageConfig):
    """The keys that all parts of stage D have."""

    tts_csv: Files = input_files(
        hint=TTS_HINT, description="recordings with texts, optionally speaker, in any format of docs/data.md"
    )
    val_csv: Files | None = input_files(
        None, hint=TTS_HINT, description="held-out manifest; default: val_split of tts_csv's texts"
    )
    max_mel_length: int = Field(
        2048,
        ge=1,
        le=16_777_216,
        description="longest recording in frames of frame_ms (2048: 164 s); longer rows are left out",
    )

    @property
    def max_codes(self) -> int:
        """``max_mel_length`` in stage D's unit of time: its frames are codes, and not mel frames as in stage B."""
        return self.max_mel_length


class CodecConfig(CodecArchitecture, SpeechConfig):
    """The config that ``rvq_codec.pt`` was trained with. See ``TalkerConfig.codec``."""

    commitment_weight: float = Field(
        0.25, ge=0, description="weight of the commitment loss, which pulls latents to their codes"
    )

    @property
    def architecture(self) -> CodecArchitecture:
        return CodecArchitecture.of(self)


STAGE = Stage(
    name="codec",
    prefix="rvq_codec",
    final="rvq_codec.pt",
    unit="frames",
    best_metric="reconstruction_mse",
    letter="D",
    script="train_talker.py",
    config=CodecConfig,
    config_name="talker",
    architecture=CodecArchitecture,
    model=Codec,
    exports=(
        ExportedPart(
            "rvq",
            "decodes speech codes into log-mels",
            "--talker_ckpt",
            figures=("reconstruction_mse",),
        ),
    ),
    options=("num_workers",),
    evaluate="omni.stages.evaluation:evaluate_codec",
)


# ---------------------------------------------------------------------------------------------------------------
# Recordings


class SpeechClips(ManifestDataset):
    """Recordings as log-mels, from a manifest with the columns text and wav. A sample is a (T, M) tensor.

    Args:
        max_codes: length of the longest recording.
        static: pad to one of a few static lengths, for ``use_compile``.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        architecture: SpeechFrames,
        max_codes: int,
        *,
        static: bool = False,
        **others,
    ) -> None:
        super().__init__(manifest, rows, **others)
        self.architecture, self.mel, self.max_codes = architecture, mel_spec(architecture), max_codes
        self.per_code, self.static_up_to = architecture.frames_per_code, max_codes if static else None

    def read(self, row: dict, rng: np.random.Generator | None) -> Tensor:
        return read_log_mels(self.manifest, row, self.architecture, self.max_codes)

    def collate(self, samples: list[Tensor]) -> dict:
        """``log_mels`` (B, T, M), zero beyond ``lengths`` (B,); T is a multiple of ``frames_per_code``."""
        lengths = [len(sample) for sample in samples]
        n_codes = padded_codes(-(-max(lengths) // self.per_code), self.static_up_to)
        log_mels = torch.zeros(len(samples), n_codes * self.per_code, self.mel.n_mels)
        for index, sample in enumerate(samples):
            log_mels[index, : lengths[index]] = sample
        return {"log_mels": log_mels, "lengths": torch.tensor(lengths), "n_targets": sum(lengths)}


def read_log_mels(manifest: Manifest, row: dict, architecture: SpeechFrames, max_codes: int) -> Tensor:
    """The log-mels (T, M) of a row's recording, of at most ``max_codes`` codes.

    Raises:
        BadRow: see ``load_speech``.
    """
    spec = mel_spec(architecture)
    waveform = load_speech(manifest.file(row, "wav"), spec, max_codes * architecture.frames_per_code)
    return log_mel(torch.from_numpy(waveform), spec)


def padded_codes(longest: int, static_up_to: int | None) -> int:
    """The padded length of a batch in codes: its longest, or the next of the static lengths up to a bound."""
    if static_up_to is None:
        return longest
    return next(length for length in static_lengths(static_up_to) if length >= longest)


def count_codes(run: Host, manifest: Manifest, architecture: SpeechFrames) -> np.ndarray:
    """(rows,) length of every recording in codes; 0 for one that cannot be read."""
    frames = mel_spec(architecture).frames(measure_samples(run, manifest, architecture.sample_rate))
    return -(-frames // architecture.frames_per_code)


def leave_out_long(run: Host, manifest: Manifest, rows: np.ndarray, lengths: np.ndarray, max_codes: int) -> np.ndarray:
    """``rows`` without recordings of more than ``max_codes`` codes. Unreadable rows stay: reading them raises."""
    return manifest.leave_out(rows, lengths[rows] > max_codes, f"longer than max_mel_length {max_codes}", run.log)


def refuse_unreadable(run: Host, manifest: Manifest, rows: np.ndarray, sample_rate: int) -> None:
    """
    Raises:
        UserError: none of the ``rows`` can be read, with the reason of the last one.
    """
    read_some(
        manifest, rows[-100:], 100, lambda row: load_audio(manifest.file(row, "wav"), sample_rate), run.check_stop
    )


def prepare_mel_statistics(run: Host, clips: SpeechClips) -> dict[str, list[float]]:
    """``mean`` and ``std`` of each mel channel over some of the training clips, kept in ``save_dir``."""
    read = partial(clips.read, rng=None)
    return mel_statistics_of(run, clips.manifest, clips.row_numbers, clips.mel, read, STATISTICS_CLIPS)


def mel_statistics_of(
    run: Host, manifest: Manifest, rows: np.ndarray, spec: MelSpec, read: Callable[[dict], Tensor], count: int
) -> dict[str, list[float]]:
    """``mean`` and ``std`` of each mel channel over ``count`` of the ``rows``, kept in ``save_dir``.

    Args:
        read: gives the log-mels (T, M) of a row.
    """

    def read_finite(row: dict) -> Tensor:
        return require_finite(read(row), row["wav"])

    def make() -> dict[str, list[float]]:
        return mel_statistics(read_some(manifest, rows, count, read_finite, run.check_stop))

    some = spread(rows, count)
    belongs_to = {"data": manifest.sha256, "mel": asdict(spec), "clips": len(rows)}
    return run.cached_json("mel_statistics.json", belongs_to | {"files": files_digest(manifest, some, "wav")}, make)


def prepare_codes(run: Host, codec: Codec, clips: SpeechClips, name: str, known: str | None) -> RaggedArray:
    """The codes (N, Q) uint16 of all recordings, computed once and kept in ``save_dir`` under ``name``.

    Args:
        clips: recordings to code, ordered by length; ``training`` is false.
        known: another ``save_dir`` that may have them.
    """

    def make(batch: dict) -> list[np.ndarray]:
        codes = codec.encode(batch["log_mels"].to(run.device), batch["lengths"].to(run.device)).cpu().numpy()
        lengths = -(-batch["lengths"].numpy() // codec.architecture.frames_per_code)
        return [one[:length].astype(np.uint16) for length, one in zip(lengths, codes, strict=True)]

    belongs_to = {"codec": weights_sha256(codec)}
    return precompute(run, f"{name}.codes", clips, "wav", belongs_to, make, note="coding", known=known)


# ---------------------------------------------------------------------------------------------------------------
# Loss and metrics


def codec_loss(model: nn.Module, batch: dict, commitment_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the normalised log-mels, plus the weighted commitment loss."""
    # a batch without targets only fills up a step
    lengths = batch["lengths"] if batch["n_targets"] else torch.zeros_like(batch["lengths"])
    truth, decoded, _, commitment = model(batch["log_mels"], lengths)
    frame = torch.arange(truth.shape[1], device=truth.device) < lengths[:, None]
    mse = masked_mean((decoded.float() - truth).square(), frame)
    return mse + commitment_weight * commitment, {"mse": mse, "commitment": commitment}


def codec_sums(model: Codec, batch: dict) -> dict[str, Tensor]:
    """Sums over a batch: squared errors by the number of codebooks used, and how often each code was chosen."""
    lengths, arch = batch["lengths"], model.architecture
    truth, decoded, codes, _ = model(batch["log_mels"], lengths)
    frame = torch.arange(truth.shape[1], device=truth.device) < lengths[:, None]
    code = frame.unflatten(1, (-1, arch.frames_per_code)).any(dim=-1)  # (B, N)

    def squared_error(decoded: Tensor) -> Tensor:
        return ((decoded.float() - truth).square() * frame[..., None]).sum()

    sums = {
        "values": frame.sum() * arch.n_mels,
        "squared_error": squared_error(decoded),
        "chosen": torch.stack(
            [codes[..., q][code].bincount(minlength=arch.codebook_size) for q in range(arch.codebooks)]
        ),
    }
    for k in range(1, arch.codebooks):
        sums[f"squared_error_{k}"] = squared_error(model.reconstruct(model.quantizer.decode(codes[..., :k]), code))
    return sums


def codec_metrics(totals: dict[str, Tensor]) -> dict[str, float]:
    """``reconstruction_mse`` in units of the log-mels' variance, also with the first k codebooks only; ``code_usage``,
    the share of codes in use; ``codebook_perplexity``, exp of the entropy of the codes' frequencies."""
    chosen = totals["chosen"]  # (Q, K)
    shares = chosen / chosen.sum(dim=1, keepdim=True)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=1)  # (Q,)
    metrics = {"reconstruction_mse": float(totals["squared_error"] / totals["values"])}
    for k in range(1, len(chosen)):
        metrics[f"reconstruction_mse_{k}"] = float(totals[f"squared_error_{k}"] / totals["values"])
    metrics["code_usage"] = float((chosen > 0).double().mean())
    metrics["code_usage_least"] = float((chosen > 0).double().mean(dim=1).min())
    metrics["codebook_perplexity"] = float(entropy.exp().mean())
    return metrics
