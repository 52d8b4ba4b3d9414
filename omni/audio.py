"""Audio files to waveforms, waveforms to log-mels and back: one definition for every stage, augmentation drawn by key.

What a file claims about itself is checked before its samples are read, so a hostile or broken file costs a header.
"""

# S samples, T frames, M mel channels

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from omni.errors import BadRow
from omni.ops import true_float32

# A waveform's amplitude is 1 at full scale. 1e-5 lies below the steps of 16 bit (3e-5), so the logarithm of digital
# silence is finite and quieter than anything recorded.
_SMALLEST_AMPLITUDE = 1e-5
_MEL_UPDATES = 8  # from mel to linear amplitudes; 30 are 0.005 closer in mel L1 and take longer than Griffin-Lim
_BLOCK_VALUES = 1 << 18  # samples x channels read at a time: a thousand channels need no more memory than one
_RATES_HZ = range(1_000, 768_001)  # a rate outside is a damaged header, and resampling from it would cost any memory
_UNKNOWN_LENGTH = 1 << 62  # libsndfile: the header does not say
_STREAMED = 0xFFFFFFFF  # a WAV header written before its length was known: libsndfile goes by the file's size

# ---------------------------------------------------------------------------------------------------------------
# Files


def load_audio(path: str | Path, sample_rate: int, max_s: float | None = None) -> np.ndarray:
    """A recording as mono at ``sample_rate``: WAV, FLAC, MP3, OGG and whatever else libsndfile reads.

    Channels are averaged. Other rates are resampled by soxr: band-limited like ``torchaudio``'s resampling, and from
    22050 to 16000 Hz ten times as fast.

    Args:
        max_s: longest duration in seconds; a longer file is refused by its header.

    Returns:
        (S,) float32, at least one sample.

    Raises:
        BadRow: not audio, shorter than its header says, empty, longer than ``max_s``, or with samples that are not
            finite.
    """
    with _open(path) as file:
        seconds = file.frames / file.samplerate
        if max_s is not None and seconds > max_s:
            raise BadRow(f"{path}: lasts {seconds:.1f} s, expected at most {max_s:g} s")
        rate, frames, parts, read = file.samplerate, file.frames, [], 0
        block = max(1, _BLOCK_VALUES // file.channels)
        try:
            while len(part := file.read(min(block, frames - read), dtype="float32", always_2d=True)):
                parts.append(part[:, 0] if part.shape[1] == 1 else part.mean(axis=1))
                read += len(part)
        except soundfile.LibsndfileError as error:
            raise BadRow(f"{path}: truncated or damaged after {read / rate:.2f} of {seconds:.2f} s") from error
    if read < frames:
        raise BadRow(f"{path}: truncated: {read / rate:.2f} of {seconds:.2f} s are there")
    waveform = np.concatenate(parts)
    if not np.isfinite(waveform).all():
        raise BadRow(f"{path}: has samples that are not finite")
    return resample(waveform, rate, sample_rate)


def audio_duration(path: str | Path) -> float:
    """Seconds of audio in a file, by its header alone.

    Raises:
        BadRow: not audio, empty, or a WAV file shorter than its header says.
    """
    with _open(path) as file:
        return file.frames / file.samplerate


def _open(path: str | Path) -> soundfile.SoundFile:
    try:
        file = soundfile.SoundFile(str(path))
    except soundfile.LibsndfileError as error:
        if not os.path.exists(path):  # libsndfile says "System error." only
            raise BadRow(f"{path}: not an audio file: No such file or directory") from error
        raise BadRow(f"{path}: not an audio file that can be read: {error.error_string}") from error
    problem = _header_problem(file)
    if problem:
        file.close()
        raise BadRow(f"{path}: {problem}")
    return file


def _header_problem(file: soundfile.SoundFile) -> str | None:
    # libsndfile quietly reads a truncated WAV as a shorter one; only its report tells both lengths
    cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if cut and int(cut[1]) > int(cut[2]) and int(cut[1]) != _STREAMED:
        return f"truncated: {int(cut[2])} of {int(cut[1])} bytes of audio are there"
    if file.samplerate not in _RATES_HZ:
        return f"expected a rate of {_RATES_HZ[0]} to {_RATES_HZ[-1]} Hz, found {file.samplerate}"
    if file.frames >= _UNKNOWN_LENGTH:
        return "its header does not say how long it is"
    if file.frames == 0:
        return "empty, or truncated before its first sample"
    return None


def resample(waveform: np.ndarray, from_rate: float, to_rate: float) -> np.ndarray:
    """(S,) float32 at ``from_rate`` to (about S * to_rate / from_rate,) float32 at ``to_rate``, band-limited."""
    if from_rate == to_rate:
        return waveform
    return soxr.resample(waveform, from_rate, to_rate)


# ---------------------------------------------------------------------------------------------------------------
# Log-mels


@dataclass(frozen=True)
class MelSpec:
    """What a log-mel is. Recogniser, codec and vocoder share one, so that each reads what the other writes.

    Sizes in samples, frequencies in Hz.
    """

    sample_rate: int = 16000
    n_fft: int = 1024
    win_length: int = 640
    hop_length: int = 160
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float = 8000.0

    def frames(self, samples: int) -> int:
        """Frames of so many samples: one for every hop that has begun."""
        return -(-samples // self.hop_length)


def reflect(signal: Tensor, left: int, right: int) -> Tensor:
    """(..., S) -> (..., left + S + right): beyond its ends the signal comes back, the end itself but once.

    As F.pad's "reflect", whose gradient on a GPU adds up in any order.
    """
    before, after = signal[..., 1 : left + 1], signal[..., signal.shape[-1] - 1 - right : -1]
    return torch.cat([before.flip(-1), signal, after.flip(-1)], dim=-1)


def log_mel(waveform: Tensor, spec: MelSpec) -> Tensor:
    """Natural logarithm of the mel-scaled amplitude spectrum.

    Frame ``t`` is centred on the middle of the hop that begins at sample ``t * hop_length``; what lies beyond the
    ends is the signal reflected. ``frames * hop_length == samples`` where that divides. Differentiable; float32
    whatever autocast says, since the logarithm of a bf16 sum is off by a few percent.

    Args:
        waveform: (..., S), full scale 1.

    Returns:
        (..., T, M) float32, T = ceil(S / hop_length), at least log(1e-5) = -11.5.

    Amplitude, Slaney's mel scale and area norm, and the floor are those of HiFi-GAN (Kong et al. 2020).
    """
    window, filters = _transform(spec, waveform.device)
    frames = spec.frames(waveform.shape[-1])
    signal = waveform.float()
    if signal.shape[-1] < spec.win_length:  # too short to be reflected: silence follows
        signal = F.pad(signal, (0, spec.win_length - signal.shape[-1]))
    left = (spec.win_length - spec.hop_length) // 2
    needed = (spec.frames(signal.shape[-1]) - 1) * spec.hop_length + spec.win_length
    signal = reflect(signal, left, needed - left - signal.shape[-1])
    with true_float32(waveform.device):
        # not torch.stft: it transforms the zeros around the window too, in a layout that costs five times as much
        windows = signal.unfold(-1, spec.win_length, spec.hop_length)[..., :frames, :] * window  # (..., T, win_length)
        real, imaginary = torch.view_as_real(torch.fft.rfft(windows, spec.n_fft)).unbind(-1)  # (..., T, n_fft / 2 + 1)
        # the small number keeps the gradient of silence finite, and lies far below the floor; abs() takes three
        # times as long, and each new tensor of this size almost as long as its arithmetic
        amplitude = real.square().addcmul_(imaginary, imaginary).add_(1e-16).sqrt_()
        mel = amplitude @ filters  # (..., T, M)
    return mel.clamp(min=_SMALLEST_AMPLITUDE).log_()


@cache
def _transform(spec: MelSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    window = torch.hann_window(spec.win_length, device=device)
    return window, torch.from_numpy(mel_filters(spec).T.copy()).to(device, torch.float32)


def mel_filters(spec: MelSpec) -> np.ndarray:
    """(M, n_fft / 2 + 1) float64: triangles that each sum to the same area, evenly spaced on Slaney's mel scale.

    That scale (Slaney 1998, "Auditory Toolbox") is linear below 1000 Hz, 200/3 Hz a mel, and logarithmic above.
    """
    edges = _mel_to_hz(np.linspace(_hz_to_mel(spec.f_min), _hz_to_mel(spec.f_max), spec.n_mels + 2))  # (M + 2,)
    bins = np.linspace(0, spec.sample_rate / 2, spec.n_fft // 2 + 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(min=0)
    return triangles * 2 / (high - low)


_LINEAR_HZ = 200 / 3  # a mel, below the knee
_KNEE_HZ = 1000.0
_KNEE_MEL = _KNEE_HZ / _LINEAR_HZ
_LOG_STEP = math.log(6.4) / 27  # a mel, above it


def _hz_to_mel(hz: float) -> float:
    return hz / _LINEAR_HZ if hz < _KNEE_HZ else _KNEE_MEL + math.log(hz / _KNEE_HZ) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < _KNEE_MEL, mel * _LINEAR_HZ, _KNEE_HZ * np.exp(_LOG_STEP * (mel - _KNEE_MEL)))


def griffin_lim(log_mel: Tensor, spec: MelSpec, n_iter: int = 32) -> Tensor:
    """A waveform with about these log-mels: what speaks where there is no vocoder.

    Draws no random numbers: the phases begin at zero, which measured no worse than at random.

    Args:
        log_mel: (..., T, M), from ``log_mel``.

    Returns:
        (..., T * hop_length) float32.

    Perraudin et al. 2013, "A Fast Griffin-Lim Algorithm", with torchaudio's momentum of 0.99.
    """
    window, filters = _transform(spec, log_mel.device)
    frames = log_mel.shape[-2]
    # Their frame t is centred on sample t * hop_length. So the first of ours has to be one of theirs further on, and
    # what lies beyond the ends needs frames too: log_mel reflects there, so that they resemble the outermost one.
    around = 1 + spec.n_fft // (2 * spec.hop_length)
    centre = spec.win_length // 2 - (spec.win_length - spec.hop_length) // 2  # of our first frame
    start = around * spec.hop_length - centre
    with torch.autocast(log_mel.device.type, enabled=False):
        amplitude = _mel_to_linear(log_mel.float().exp(), filters, _pseudo_inverse(spec, log_mel.device))
        amplitude = amplitude.reshape(-1, *amplitude.shape[-2:]).transpose(1, 2)  # (B, n_fft / 2 + 1, T)
        waveform = torchaudio.functional.griffinlim(
            F.pad(amplitude, (around, around), mode="replicate"),
            window, spec.n_fft, spec.hop_length, spec.win_length,
            power=1.0, n_iter=n_iter, momentum=0.99, length=None, rand_init=False,
        )  # fmt: skip
    return waveform[:, start : start + frames * spec.hop_length].reshape(*log_mel.shape[:-2], -1)


def _mel_to_linear(mel: Tensor, filters: Tensor, inverse: Tensor) -> Tensor:
    """Non-negative amplitudes (..., T, n_fft / 2 + 1) whose mels are ``mel`` (..., T, M).

    The pseudo-inverse with its negative values cut off is a little too loud everywhere. The multiplicative updates of
    Lee & Seung 2000, "Algorithms for Non-negative Matrix Factorization", bring that back.
    """
    amplitude = (mel @ inverse).clamp(min=1e-7)
    target = mel @ filters.T
    for _ in range(_MEL_UPDATES):
        amplitude = amplitude * target / (amplitude @ filters @ filters.T + 1e-9)
    return amplitude


@cache
def _pseudo_inverse(spec: MelSpec, device: torch.device) -> Tensor:
    return torch.from_numpy(np.linalg.pinv(mel_filters(spec).T)).to(device, torch.float32)  # (M, n_fft / 2 + 1)


def normalise_features(features: Tensor) -> Tensor:
    """(T, M) of one utterance to mean 0 and variance 1 per channel: loudness and microphone no longer matter.

    Only valid frames may be given: padding would shift the mean. As NVIDIA NeMo's "per_feature" normalisation, with
    the variance over T instead of T - 1, which a single frame has too.
    """
    centred = features - features.mean(dim=0)
    return centred / (centred.square().mean(dim=0).sqrt() + 1e-5)


def mel_statistics(log_mels: Iterable[Tensor]) -> dict[str, list[float]]:
    """``mean`` and ``std`` of each mel channel over some clips (T, M), at least one."""
    frames = torch.cat(list(log_mels))
    std = frames.std(dim=0, correction=0).clamp(min=0.1)  # a channel that never changes tells nothing
    return {"mean": frames.mean(dim=0).tolist(), "std": std.tolist()}


# ---------------------------------------------------------------------------------------------------------------
# Augmentation: every draw comes from the generator given, which is keyed by the row


def perturb_speed(waveform: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """(S,) played at 1 - amount, 1 or 1 + amount times its speed, pitch included.

    Ko et al. 2015, "Audio Augmentation for Speech Recognition", where the amount is 0.1.
    """
    factor = 1 + amount * rng.integers(-1, 2)
    return resample(waveform, factor, 1)


def spec_augment(
    features: Tensor, rng: np.random.Generator, *, time_masks: int, time_width: int, freq_masks: int, freq_width: int
) -> Tensor:
    """Blank out some bands of time and of frequency in normalised features (T, M), whose mean is 0.

    Args:
        time_masks, freq_masks: how many bands.
        time_width, freq_width: a band's width is drawn evenly from 0 to this; in time also at most a fifth of T.

    Park et al. 2019, "SpecAugment", without time warping.
    """
    features = features.clone()
    T, M = features.shape
    for _ in range(time_masks):
        width = rng.integers(0, min(time_width, T // 5) + 1)
        start = rng.integers(0, T - width + 1)
        features[start : start + width] = 0
    for _ in range(freq_masks):
        width = rng.integers(0, min(freq_width, M) + 1)
        start = rng.integers(0, M - width + 1)
        features[:, start : start + width] = 0
    return features
