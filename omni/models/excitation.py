"""What a vocoder with ``harmonic_source`` begins with: pulses at the pitch of a voice, and noise, with given log-mels.

Where the pitch is steady the log-mels do not change, and convolutions make of them a sound that repeats itself with
every frame, a buzz: only after very long training do they find the phase of a voice in the ripple of its log-mels. So
the pitch is read from the log-mels, and pulses are counted out at its rate. The model of a source and a filter is that
of Wang et al. 2019, "Neural source-filter waveform models"; here the log-mels are the filter's first estimate.
"""

# B clips, T mel frames, M mel channels, S samples (T * hop_length), P pitches that are told apart

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from omni.common.numerics import true_float32
from omni.data.audio import MelSpec, frames_of, mel_transform

LOWEST, HIGHEST, PITCHES = 60.0, 500.0, 72  # Hz; pitches evenly spaced on a logarithmic scale, half a semitone apart
PERIODS = 3  # of the lowest pitch, in the window in which a pitch is measured
HALF_VOICED = 4500.0  # Hz at which a voice is half pulses and half noise; from pulses to noise within 2 kHz
BRIGHTEST = 1500.0  # Hz; above it, nothing tells of the pitch
_VOICED = 0.5  # share of the energy that repeats itself after a period
_SILENT = 1e-3  # amplitude
_FINEST = 1 / 16  # Hz, at most 2 cents
_OCTAVE_COST = 0.02  # a period repeats itself after two periods as well: the shorter is preferred
_STEPS = (PITCHES - 1) / math.log(HIGHEST / LOWEST)  # pitches for each e-fold of the frequency
_CYCLE = 1 << 40  # steps of the phase in a cycle: sums of integers are exact, so pieces of sound fit together

# --- the pitch of a recording -----------------------------------------------------------------------------------------


def pitch_window(spec: MelSpec) -> int:
    """Samples around the middle of a frame in which its pitch is measured."""
    return max(spec.win_length, math.ceil(PERIODS * spec.sample_rate / LOWEST))


def pitch_of(waveform: Tensor, spec: MelSpec) -> Tensor:
    """The pitch of each frame of ``log_mel``, by autocorrelation.

    Args:
        waveform: (B, S), full scale 1.

    Returns:
        (B, T) Hz, LOWEST to HIGHEST, 0 where there is no voice.

    Boersma 1993, "Accurate short-term analysis of the fundamental frequency": the autocorrelation of a windowed frame
    over that of the window. The best period of each frame is taken, without his search for a path through all frames.
    Only frequencies up to about BRIGHTEST count: of a brighter sound the autocorrelation's peaks are so narrow that
    they fall between two lags, and twice the period may seem to fit better.
    """
    width = pitch_window(spec)
    window = torch.hann_window(width, device=waveform.device)
    frames = frames_of(waveform.float(), width, spec)  # (B, T, width)
    frames = (frames - frames.mean(dim=-1, keepdim=True)) * window
    energy = frames.square().mean(dim=-1)  # (B, T)
    shortest, longest = int(spec.sample_rate / HIGHEST), math.ceil(spec.sample_rate / LOWEST)
    hertz = torch.fft.rfftfreq(2 * width, 1 / spec.sample_rate, device=waveform.device)
    repeats = _autocorrelation(frames, torch.sigmoid((BRIGHTEST - hertz) / 200))  # (B, T, width), 1 at lag 0
    repeats = repeats / _autocorrelation(window).clamp(min=1e-3)
    before, here, after = (repeats[..., shortest + by : longest + 1 + by] for by in (-1, 0, 1))
    lags = torch.arange(shortest, longest + 1, device=waveform.device)
    peaks = torch.where((here >= before) & (here >= after), here - _OCTAVE_COST * torch.log2(lags / shortest), -1.0)
    best = peaks.argmax(dim=-1, keepdim=True)
    before, here, after = (values.gather(-1, best)[..., 0] for values in (before, here, after))
    bend = before - 2 * here + after  # of the parabola through the three
    aside = torch.where(bend < -1e-9, 0.5 * (before - after) / bend, 0.0).clamp(-1, 1)
    pitch = (spec.sample_rate / (lags[best[..., 0]] + aside)).clamp(LOWEST, HIGHEST)
    is_peak = peaks.amax(dim=-1) > -1  # a lower hum has none in this range
    return torch.where(is_peak & (here > _VOICED) & (energy.sqrt() > _SILENT), pitch, 0.0)


def _autocorrelation(frames: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """(..., N) -> (..., N): by lag, over that at lag 0; ``weights`` (N + 1,) of the frequencies' power."""
    length = frames.shape[-1]
    power = torch.fft.rfft(frames, 2 * length).abs().square() * weights
    products = torch.fft.irfft(power, 2 * length)[..., :length]
    return products / (products[..., :1] + 1e-9)


# --- the pitch in log-mels --------------------------------------------------------------------------------------------


class PitchReader(nn.Module):
    """Normalised log-mels (B, T, M) -> logits (B, T, P + 1) of each pitch and, last, of no voice."""

    WIDTH, KERNEL, LAYERS = 96, 5, 3
    context_frames = LAYERS * (KERNEL // 2)

    def __init__(self, n_mels: int):
        super().__init__()
        widths = [n_mels, *[self.WIDTH] * (self.LAYERS - 1), PITCHES + 1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(before, after, self.KERNEL, padding=self.KERNEL // 2))
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, features: Tensor) -> Tensor:
        x = features.transpose(1, 2)
        for number, conv in enumerate(self.convs):
            x = conv(F.leaky_relu(x, 0.1) if number else x)
        return x.transpose(1, 2)


def pitch_loss(logits: Tensor, pitch: Tensor) -> Tensor:
    """Mean divergence, in nats, of ``PitchReader``'s logits (B, T, P + 1) from ``pitch_of``'s pitches (B, T).

    As in Kim et al. 2018, "CREPE", the target is a pitch and, less, its neighbours; here 0 is reached by equal shares.
    """
    place = _STEPS * torch.log(pitch.clamp(min=LOWEST) / LOWEST)
    near = torch.exp(-(torch.arange(PITCHES, device=pitch.device) - place[..., None]).square() / 2)
    voiced = (pitch > 0)[..., None].float()
    target = torch.cat((voiced * near / near.sum(dim=-1, keepdim=True), 1 - voiced), dim=-1)
    return (torch.xlogy(target, target) - target * logits.float().log_softmax(dim=-1)).sum(dim=-1).mean()


def pitch_from(logits: Tensor) -> Tensor:
    """The pitch (B, T) in Hz that ``PitchReader`` reads: the mean around the likeliest, 0 where no voice is likely.

    It is rounded, as the last bits of logits depend on the number of frames, and phases add up what pitches differ by.
    """
    shares = logits.float().softmax(dim=-1)
    voiced, shares = shares[..., PITCHES] < 0.5, shares[..., :PITCHES]
    places = torch.arange(PITCHES, device=logits.device)
    shares = torch.where((places - shares.argmax(dim=-1, keepdim=True)).abs() <= 3, shares, 0.0)
    place = (shares * places).sum(dim=-1) / shares.sum(dim=-1)
    pitch = (LOWEST * torch.exp(place / _STEPS) / _FINEST).round() * _FINEST
    return torch.where(voiced, pitch, 0.0)


# --- sound with that pitch and with these log-mels --------------------------------------------------------------------


def pulses(pitch: Tensor, spec: MelSpec) -> Tensor:
    """Pulses (B, S) of mean square 1 at the ``pitch`` (B, T) in Hz: all harmonics below half the sample rate.

    Between frames the pitch moves evenly. A frame without a voice has the pitch of the one beside it, if that has one.
    """
    voiced, rate = pitch > 0, spec.sample_rate
    following, preceding = F.pad(pitch[:, 1:], (0, 1)), F.pad(pitch[:, :-1], (1, 0))
    beside = torch.where(following > 0, following, torch.where(preceding > 0, preceding, 2 * LOWEST))
    known = torch.where(voiced, pitch, beside)[:, None]
    hertz = F.interpolate(known, scale_factor=spec.hop_length, mode="linear", align_corners=False)[:, 0].double()
    steps = (hertz / rate * _CYCLE).round().long().cumsum(dim=1) % _CYCLE
    half = steps.double() * (math.pi / _CYCLE)  # half of the phase, 0 to pi
    harmonics = torch.floor(rate / 2 / hertz)
    sine = torch.sin(half)
    at_peak = sine < 1e-7  # 0 / 0
    # the sum of cos(k * phase) for k from 1 to the number of harmonics
    total = torch.sin((2 * harmonics + 1) * half) / (2 * torch.where(at_peak, 1.0, sine)) - 0.5
    return (torch.where(at_peak, harmonics, total) / torch.sqrt(harmonics / 2)).float()


@torch.no_grad()
def excitation(log_mel: Tensor, pitch: Tensor, pulse: Tensor, noise: Tensor, spec: MelSpec) -> Tensor:
    """Sound (B, S) with about the log-mels (B, T, M), of pulses and noise.

    Args:
        pitch: (B, T) Hz, 0 where all is noise; a voice is noise, too, far above HALF_VOICED.
        pulse: (B, S), from ``pulses``.
        noise: (B, S), normal.
    """
    bins = torch.linspace(0, spec.sample_rate / 2, spec.n_fft // 2 + 1, device=log_mel.device)
    share = (pitch > 0)[..., None] * torch.sigmoid((HALF_VOICED - bins) / 500)  # (B, T, n_fft / 2 + 1)
    with torch.autocast(log_mel.device.type, enabled=False):
        spectrum = share.sqrt() * _spectrum(pulse, spec) + (1 - share).sqrt() * _spectrum(noise, spec)
        return _with_log_mels(spectrum, log_mel.float(), spec)


@torch.no_grad()
def matched(waveform: Tensor, log_mel: Tensor, spec: MelSpec) -> Tensor:
    """The waveform (B, S) with its amplitudes moved towards the log-mels (B, T, M), its phases kept.

    One round of Griffin & Lim 1984, "Signal estimation from modified short-time Fourier transform", on mel channels.
    """
    with torch.autocast(log_mel.device.type, enabled=False):
        return _with_log_mels(_spectrum(waveform.float(), spec), log_mel.float(), spec)


def reach(spec: MelSpec) -> int:
    """Frames on either side that a frame of ``matched`` depends on, and one of ``excitation`` beside its pulses."""
    return 2 * math.ceil(spec.win_length / 2 / spec.hop_length)


def _spectrum(waveform: Tensor, spec: MelSpec) -> Tensor:
    """(B, S) -> (B, T, n_fft / 2 + 1) complex, in the frames of ``log_mel``, with silence around."""
    window, _ = mel_transform(spec, waveform.device)
    left, length = _around(waveform.shape[-1] // spec.hop_length, spec)
    waveform = F.pad(waveform, (left, length - left - waveform.shape[-1]))
    return torch.fft.rfft(waveform.unfold(-1, spec.win_length, spec.hop_length) * window, spec.n_fft)


def _with_log_mels(spectrum: Tensor, log_mel: Tensor, spec: MelSpec) -> Tensor:
    """(B, S) of a spectrum (B, T, n_fft / 2 + 1) whose amplitudes are scaled, each mel channel as a whole."""
    window, filters = mel_transform(spec, log_mel.device)  # (n_fft / 2 + 1, M)
    with true_float32(log_mel.device):
        scales = log_mel.exp() / (spectrum.abs() @ filters + 1e-5)  # (B, T, M)
        spectrum = spectrum * (scales @ (filters.T / filters.sum(dim=1).clamp(min=1e-9)))
    frames = torch.fft.irfft(spectrum, spec.n_fft)[..., : spec.win_length] * window
    left, length = _around(log_mel.shape[1], spec)
    weight = window.square().expand(1, log_mel.shape[1], -1)
    waveform = _overlapped(frames, length, spec) / _overlapped(weight, length, spec).clamp(min=1e-3)
    return waveform[:, left : left + log_mel.shape[1] * spec.hop_length]


def _overlapped(frames: Tensor, length: int, spec: MelSpec) -> Tensor:
    """(B, T, win_length) -> (B, length): the sum of the frames, each a hop after the one before."""
    columns = frames.transpose(1, 2)
    return F.fold(columns, (1, length), (1, spec.win_length), stride=(1, spec.hop_length))[:, 0, 0]


def _around(frames: int, spec: MelSpec) -> tuple[int, int]:
    """Samples before the first one in the first frame's window, and from the first to the last window's end."""
    return (spec.win_length - spec.hop_length) // 2, (frames - 1) * spec.hop_length + spec.win_length
