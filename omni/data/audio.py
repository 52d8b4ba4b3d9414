"""Audio files to waveforms, waveforms to log-mels and back, and augmentation: one definition for every stage.

omni/data/sound_files.py opens and decodes the files.
"""

# S samples, T frames, M mel channels

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import soxr
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from omni.common.errors import BadRow, note
from omni.common.media import Media, quoted
from omni.common.numerics import true_float32
from omni.data.sound_files import open_sound

# A waveform's amplitude is 1 at full scale. 1e-5 lies below the steps of 16 bit (3e-5), so the logarithm of digital
# silence is finite and quieter than anything recorded.
_SMALLEST_AMPLITUDE = 1e-5
_MEL_UPDATES = 8  # from mel to linear amplitudes; 30 are 0.005 closer in mel L1 and take longer than Griffin-Lim
_MOST_AMPLITUDE = 8.0
_INT16, _INT16_SHARE = 32768, 0.05
_CANCELLED = 0.1

# ---------------------------------------------------------------------------------------------------------------
# Files


def load_audio(source: Media, sample_rate: int, max_s: float | None = None, min_samples: int = 1) -> np.ndarray:
    """A recording as mono at ``sample_rate``: WAV, FLAC, MP3, OGG, M4A, WebM, the sound of a film, and more.

    Channels are averaged. If they cancel out, so that their mean has less than a tenth of the energy that unrelated
    channels would leave, only the loudest is used, with a note.

    Full scale is 1. Amplitudes up to ``_MOST_AMPLITUDE`` are kept, since decoders and floating-point mixes exceed 1.
    Floating-point samples in the range of 16-bit integers (at most 32768, and a twentieth of them beyond 1) are divided
    by 32768, with a note. Larger amplitudes mean a damaged file.

    Other rates are resampled by soxr: band-limited like ``torchaudio``'s resampling, and from 22050 to 16000 Hz ten
    times as fast.

    Args:
        max_s: longest duration in seconds; a longer file is refused by its header, or read no further than this.
        min_samples: smallest number of samples at ``sample_rate``, such as one analysis window.

    Returns:
        (S,) float32, finite, at least one sample.

    Raises:
        BadRow: not audio, shorter than its header says, empty, longer than ``max_s``, shorter than ``min_samples``, or
            with samples that are not finite or too large.
    """
    most = None if max_s is None else round(max_s * sample_rate)
    waveform, rate, cancelled = _read_mono(source, sample_rate, most)
    if cancelled is not None:
        note(f"{quoted(source)}: its channels cancel out: channel {cancelled + 1} alone is used")
        waveform, *_ = _read_mono(source, sample_rate, most, channel=cancelled)
    if resampled_length(len(waveform), rate, sample_rate) < max(1, min_samples):
        least = f"{1000 * min_samples / sample_rate:g} ms, one analysis window" if min_samples > 1 else "one sample"
        raise BadRow(f"{quoted(source)}: lasts {1000 * len(waveform) / rate:.3g} ms, expected at least {least}")
    return resample(_in_scale(waveform, source), rate, sample_rate)


def _read_mono(
    source: Media, sample_rate: int, most: int | None, channel: int | None = None
) -> tuple[np.ndarray, int, int | None]:
    """(S,) float32, the mean of a file's channels or the given ``channel``; the file's rate; and the loudest channel if
    the channels cancel out, else None."""
    parts, read, mean_energy, energies = [], 0, 0.0, 0.0
    with open_sound(source) as sound:
        _refuse_long(source, sound.frames or 0, sound.rate, sample_rate, most, "lasts")
        for block in sound.blocks:
            read += len(block)
            _refuse_long(source, read, sound.rate, sample_rate, most, "lasts more than")
            if block.shape[1] == 1 or channel is not None:
                parts.append(block[:, channel or 0])
                continue
            parts.append(block.mean(axis=1))
            mean_energy += np.square(parts[-1], dtype=np.float64).sum()
            energies += np.square(block, dtype=np.float64).sum(axis=0)  # (C,)
        cancel_out = mean_energy < _CANCELLED * np.mean(energies) / np.size(energies)
        return np.concatenate(parts), sound.rate, int(np.argmax(energies)) if cancel_out else None


def _refuse_long(source: Media, samples: int, rate: int, to_rate: int, most: int | None, lasts: str) -> None:
    if most is not None and resampled_length(samples, rate, to_rate) > most:
        raise BadRow(f"{quoted(source)}: {lasts} {samples / rate:.1f} s, expected at most {most / to_rate:g} s")


def _in_scale(waveform: np.ndarray, source: Media) -> np.ndarray:
    peak = np.abs(waveform).max()
    if not np.isfinite(peak):
        raise BadRow(f"{quoted(source)}: has samples that are not finite")
    if peak <= _MOST_AMPLITUDE:
        return waveform
    if peak <= _INT16 and np.mean(np.abs(waveform) > 1) >= _INT16_SHARE:
        note(f"{quoted(source)}: samples up to {peak:.0f}, in the range of 16-bit integers: divided by {_INT16}")
        return waveform / np.float32(_INT16)
    raise BadRow(f"{quoted(source)}: samples up to {peak:.2g}, expected at most 1")


def load_speech(source: Media, spec: "MelSpec", max_frames: int) -> np.ndarray:
    """As ``load_audio``: (S,) at ``spec.sample_rate``, from one analysis window to ``max_frames`` frames long."""
    return load_audio(source, spec.sample_rate, max_frames * spec.hop_length / spec.sample_rate, spec.win_length)


def audio_length(source: Media) -> tuple[int, int]:
    """Samples of each channel, and their rate: from the header where that is checked when the file is read, else by
    decoding and counting.

    Raises:
        BadRow: not audio, empty, damaged, or a WAV file shorter than its header says.
    """
    with open_sound(source) as sound:
        return sound.frames or sum(len(block) for block in sound.blocks), sound.rate


def resample(waveform: np.ndarray, from_rate: float, to_rate: float) -> np.ndarray:
    """(S,) float32 at ``from_rate`` to float32 at ``to_rate``, band-limited; ``resampled_length`` of integer rates."""
    if from_rate == to_rate:
        return waveform
    return soxr.resample(waveform, from_rate, to_rate)


def resampled_length(samples, from_rate, to_rate: int):
    """(...) int64: the length of ``resample``'s output for ``samples``, an integer or an array.

    The arithmetic is soxr's own: the last bit of the ratio decides whether half a sample is rounded up or down.
    """
    return np.where(from_rate == to_rate, samples, samples / (from_rate / to_rate) + 0.5).astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------
# Log-mels


@dataclass(frozen=True)
class MelSpec:
    """The parameters of a log-mel, which codec and vocoder must share. Sizes are in samples, frequencies in Hz."""

    sample_rate: int = 16000
    n_fft: int = 1024
    win_length: int = 640
    hop_length: int = 160
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float = 8000.0

    def frames(self, samples):
        """Number of frames of ``samples``, an integer or an array: one for every hop that has begun."""
        return -(-samples // self.hop_length)


def reflect(signal: Tensor, left: int, right: int) -> Tensor:
    """(..., S) -> (..., left + S + right): the signal, reflected at its ends without repeating the end samples.

    Equals F.pad's "reflect", whose gradient on a GPU is summed in no fixed order.
    """
    before, after = signal[..., 1 : left + 1], signal[..., signal.shape[-1] - 1 - right : -1]
    return torch.cat([before.flip(-1), signal, after.flip(-1)], dim=-1)


def frames_of(waveform: Tensor, width: int, spec: MelSpec) -> Tensor:
    """(..., S) -> (..., T, width): the samples around the middle of each hop, reflected beyond the ends; of a signal
    shorter than ``width``, silence after it first."""
    frames = spec.frames(waveform.shape[-1])
    if waveform.shape[-1] < width:  # too short to be reflected: padded with silence
        waveform = F.pad(waveform, (0, width - waveform.shape[-1]))
    left = (width - spec.hop_length) // 2
    needed = (spec.frames(waveform.shape[-1]) - 1) * spec.hop_length + width
    waveform = reflect(waveform, left, needed - left - waveform.shape[-1])
    return waveform.unfold(-1, width, spec.hop_length)[..., :frames, :]


def log_mel(waveform: Tensor, spec: MelSpec) -> Tensor:
    """Natural logarithm of the mel-scaled amplitude spectrum.

    Frame ``t`` is centred on the middle of the hop that begins at sample ``t * hop_length``; beyond its ends the signal
    is reflected. ``frames * hop_length == samples`` if ``hop_length`` divides ``samples``. Differentiable; float32 even
    under autocast, since the logarithm of a bf16 sum is off by a few percent.

    Args:
        waveform: (..., S), full scale 1.

    Returns:
        (..., T, M) float32, T = ceil(S / hop_length), at least log(1e-5) = -11.5.

    Amplitude, Slaney's mel scale and area norm, and the floor are those of HiFi-GAN (Kong et al. 2020).
    """
    window, filters = mel_transform(spec, waveform.device)
    with true_float32(waveform.device):
        # not torch.stft: it transforms the zeros around the window too, in a layout that costs five times as much
        windows = frames_of(waveform.float(), spec.win_length, spec) * window  # (..., T, win_length)
        real, imaginary = torch.view_as_real(torch.fft.rfft(windows, spec.n_fft)).unbind(-1)  # (..., T, n_fft / 2 + 1)
        # 1e-16 keeps the gradient of silence finite, and is far below the floor; abs() takes three times as long, and
        # allocating a tensor of this size almost as long as its arithmetic
        amplitude = real.square().addcmul_(imaginary, imaginary).add_(1e-16).sqrt_()
        mel = amplitude @ filters  # (..., T, M)
    return mel.clamp(min=_SMALLEST_AMPLITUDE).log_()


@cache
def mel_transform(spec: MelSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """The window (win_length,) of ``log_mel``, and its filters (n_fft / 2 + 1, M)."""
    with torch.inference_mode(False):  # they are kept, for training too
        window = torch.hann_window(spec.win_length, device=device).clone()  # it is part of a longer one
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


_LINEAR_HZ = 200 / 3  # Hz per mel below the knee
_KNEE_HZ = 1000.0
_KNEE_MEL = _KNEE_HZ / _LINEAR_HZ
_LOG_STEP = math.log(6.4) / 27  # per mel above the knee


def _hz_to_mel(hz: float) -> float:
    return hz / _LINEAR_HZ if hz < _KNEE_HZ else _KNEE_MEL + math.log(hz / _KNEE_HZ) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < _KNEE_MEL, mel * _LINEAR_HZ, _KNEE_HZ * np.exp(_LOG_STEP * (mel - _KNEE_MEL)))


def griffin_lim(log_mel: Tensor, spec: MelSpec, n_iter: int = 32) -> Tensor:
    """A waveform with about these log-mels, for use without a vocoder.

    Draws no random numbers: the phases begin at zero, which measured no worse than random ones.

    Args:
        log_mel: (..., T, M), from ``log_mel``.

    Returns:
        (..., T * hop_length) float32.

    Perraudin et al. 2013, "A Fast Griffin-Lim Algorithm", with torchaudio's momentum of 0.99.
    """
    window, filters = mel_transform(spec, log_mel.device)
    frames = log_mel.shape[-2]
    # torchaudio centres frame t on sample t * hop_length, log_mel on a later one. So frames are added at both ends, as
    # copies of the outermost one, since log_mel reflects the signal there; ``start`` is then our first sample.
    around = 1 + spec.n_fft // (2 * spec.hop_length)
    centre = spec.win_length // 2 - (spec.win_length - spec.hop_length) // 2  # sample at the centre of our first frame
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
    """Non-negative amplitudes (..., T, n_fft / 2 + 1) whose mels are about ``mel`` (..., T, M).

    The pseudo-inverse with its negative values cut off is a little too loud everywhere. The multiplicative updates of
    Lee & Seung 2000, "Algorithms for Non-negative Matrix Factorization", correct that.
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
    """Normalise (T, M) of one utterance to mean 0 and variance 1 per channel, whatever the loudness and microphone.

    Only valid frames may be given: padding would shift the mean. As NVIDIA NeMo's "per_feature" normalisation, but
    with the variance over T instead of T - 1, which is defined for a single frame too.
    """
    centred = features - features.mean(dim=0)
    return centred / (centred.square().mean(dim=0).sqrt() + 1e-5)


def mel_statistics(log_mels: Iterable[Tensor]) -> dict[str, list[float]]:
    """``mean`` and ``std`` of each mel channel over some clips (T, M), at least one."""
    frames = torch.cat(list(log_mels))
    std = frames.std(dim=0, correction=0).clamp(min=0.1)  # a channel that never changes has std 0
    return {"mean": frames.mean(dim=0).tolist(), "std": std.tolist()}


# ---------------------------------------------------------------------------------------------------------------
# Augmentation: all draws come from the given generator, which is keyed by the row


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
        time_masks, freq_masks: number of bands.
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
