"""HiFi-GAN: a generator of waveforms from log-mels, and the discriminators that it is trained against.

The generator's outputs equal those of ``transformers.SpeechT5HifiGan``. It reads the log-mels that the codec writes
(``omni.data.audio.log_mel``), and turns each frame into ``hop_length`` samples. With ``harmonic_source`` it shapes a
sound that has the pitch already, see ``omni.models.excitation``.
"""

# B clips, T mel frames, M mel channels, S samples (T * hop_length), C channels, P period

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from omni.common.errors import check_compatible
from omni.common.numerics import true_float32
from omni.data.audio import MelSpec, reflect
from omni.models.excitation import PitchReader, excitation, matched, pitch_from, pulses, reach
from omni.models.ops import matmul_dtype
from omni.models.speech_architectures import DiscriminatorArchitecture, VocoderArchitecture

SLOPE = 0.1  # slope of the leaky ReLUs
LAST_SLOPE = 0.01  # slope of the last leaky ReLU: an oversight of the original, which all its checkpoints have


def mel_spec(arch: VocoderArchitecture) -> MelSpec:
    """The log-mels that the vocoder reads."""
    return MelSpec(
        sample_rate=arch.sample_rate,
        n_fft=arch.n_fft,
        win_length=arch.win_length,
        hop_length=arch.hop_length,
        n_mels=arch.n_mels,
        f_max=arch.sample_rate / 2,
    )


def refuse_other_mels(vocoder: Path | str, arch: VocoderArchitecture, codec: Path | str, spec: MelSpec) -> None:
    """
    Raises:
        UserError: ``vocoder``, of ``arch``, reads other log-mels than ``codec`` writes; the message names differences.
    """
    check_compatible(vocoder, asdict(mel_spec(arch)), codec, asdict(spec), what="its log-mels do")


# ---------------------------------------------------------------------------------------------------------------
# Generator


def as_rows(x: Tensor) -> Tensor:
    """(B, S, C) -> (B, C, 1, S) for the convolutions below; for bf16 on a CPU a view, so channels are last in memory:
    its kernels then take half the time, those of float32 a quarter more."""
    channels_last = x.device.type == "cpu" and matmul_dtype(x) == torch.bfloat16
    x = x[:, None].permute(0, 3, 1, 2)
    return x if channels_last else x.contiguous()


class Conv1d(nn.Conv1d):
    """A convolution over pictures of one row (B, C, 1, S), which can have channels last in memory, see ``as_rows``."""

    def forward(self, x: Tensor) -> Tensor:
        steps, padding, dilation = (1, *self.stride), (0, *self.padding), (1, *self.dilation)
        return F.conv2d(x, self.weight.unsqueeze(2), self.bias, steps, padding, dilation, self.groups)


class ConvTranspose1d(nn.ConvTranspose1d):
    """As ``Conv1d``."""

    def forward(self, x: Tensor) -> Tensor:
        steps, padding = (1, *self.stride), (0, *self.padding)
        return F.conv_transpose2d(x, self.weight.unsqueeze(2), self.bias, steps, padding)


class ResidualBlock(nn.Module):
    """Residual pairs of a dilated and a plain convolution, (B, C, 1, S) -> (B, C, 1, S)."""

    def __init__(self, channels: int, kernel_size: int, dilations: list[int]):
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            padding = dilation * (kernel_size - 1) // 2
            return weight_norm(Conv1d(channels, channels, kernel_size, dilation=dilation, padding=padding))

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for conv1, conv2 in zip(self.convs1, self.convs2, strict=True):
            x = x + conv2(F.leaky_relu(conv1(F.leaky_relu(x, SLOPE)), SLOPE, inplace=True))
        return x


class Generator(nn.Module):
    """Log-mels (B, T, M) -> waveforms (B, T * hop_length), full scale 1.

    Kong et al. 2020, "HiFi-GAN", with residual blocks of type 1, weight norm on every convolution, and log-mels
    normalised per channel. Modules have the names of ``transformers.SpeechT5HifiGan``.
    """

    def __init__(self, architecture: VocoderArchitecture):
        super().__init__()
        self.architecture = arch = architecture
        channels = arch.upsample_initial_channel
        self.conv_pre = weight_norm(Conv1d(arch.n_mels, channels, 7, padding=3))
        self.upsampler, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel_size in zip(arch.upsample_rates, arch.kernel_sizes, strict=True):
            upsampling = ConvTranspose1d(channels, channels // 2, kernel_size, rate, (kernel_size - rate) // 2)
            self.upsampler.append(weight_norm(upsampling))
            channels //= 2
            for kernel_size, dilations in zip(arch.resblock_kernel_sizes, arch.resblock_dilation_sizes, strict=True):
                self.resblocks.append(ResidualBlock(channels, kernel_size, dilations))
        self.conv_post = weight_norm(Conv1d(channels, 1, 7, padding=3))
        self.register_buffer("mean", torch.zeros(arch.n_mels))
        self.register_buffer("scale", torch.ones(arch.n_mels))

    def forward(self, log_mel: Tensor) -> Tensor:
        return self.from_features(self.normalised(log_mel))

    def normalised(self, log_mel: Tensor) -> Tensor:
        return (log_mel - self.mean) / self.scale

    def from_features(self, features: Tensor, heard: Sequence[Tensor] = ()) -> Tensor:
        """Waveforms (B, S) of normalised log-mels (B, T, M); ``heard`` (B, C, 1, S / rates to come) is added to each
        upsampling."""
        x = self.conv_pre(as_rows(features))  # (B, C, 1, T)
        kinds = len(self.architecture.resblock_kernel_sizes)
        for stage, upsampling in enumerate(self.upsampler):
            x = upsampling(F.leaky_relu(x, SLOPE))  # half as many channels, rate times as many samples
            if heard:
                x = x + heard[stage]
            ways = [block(x) for block in self.resblocks[stage * kinds : (stage + 1) * kinds]]
            x = ways[0] if kinds == 1 else reduce(torch.add, ways) / kinds
        with torch.autocast(x.device.type, enabled=False):  # bf16's 8 bits would be audible as noise
            return torch.tanh(self.conv_post(F.leaky_relu(x.float(), LAST_SLOPE))).flatten(1)  # (B, S)

    @property
    def context_frames(self) -> int:
        """Maximum number of frames on either side of a frame on which its samples depend."""
        arch = self.architecture
        reach = 3  # samples on either side that conv_post reads
        widest = max(
            (kernel_size - 1) // 2 * (sum(dilations) + len(dilations))
            for kernel_size, dilations in zip(arch.resblock_kernel_sizes, arch.resblock_dilation_sizes, strict=True)
        )
        for rate, kernel_size in zip(reversed(arch.upsample_rates), reversed(arch.kernel_sizes), strict=True):
            padding = (kernel_size - rate) // 2
            reach = math.ceil((reach + widest + kernel_size - 1 - padding) / rate)
        return reach + 3  # conv_pre reads 3 frames on either side

    @torch.inference_mode()
    def vocode(self, log_mel: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """The waveform of frames ``start`` to ``end``, from these frames and their context alone: for streaming.

        Args:
            log_mel: (..., T, M).

        Returns:
            (..., (end - start) * hop_length), the same samples as in the waveform of all frames.
        """
        frames, hop = log_mel.shape[-2], self.architecture.hop_length
        end = frames if end is None else end
        first, last = max(0, start - self.context_frames), min(frames, end + self.context_frames)
        waveform = self.sound(log_mel.reshape(-1, *log_mel.shape[-2:]), first, last)
        waveform = waveform[:, (start - first) * hop : (end - first) * hop]
        return waveform.reshape(*log_mel.shape[:-2], -1)

    def sound(self, log_mel: Tensor, first: int, last: int) -> Tensor:
        """(B, (last - first) * hop_length): that of frames ``first`` to ``last`` of (B, T, M), wrong at its ends."""
        # forward, not the module: that may be compiled, for one length only
        return self.forward(log_mel[:, first:last])


class HarmonicGenerator(Generator):
    """``harmonic_source``: log-mels (B, T, M) and an ``excitation`` (B, S) -> waveforms (B, S), and the logits
    (B, T, P + 1) of the pitch in the log-mels.

    As in Wang et al. 2019, "Neural source-filter waveform models", every upsampling hears the excitation at its own
    rate; that it begins with the log-mels' amplitudes, and ends with ``MATCHINGS`` rounds towards them, is ours.
    """

    MATCHINGS = 2
    NOISE = 1 << 17  # samples until it repeats itself

    def __init__(self, architecture: VocoderArchitecture):
        super().__init__(architecture)
        arch, self.spec = architecture, mel_spec(architecture)
        channels, samples = arch.upsample_initial_channel, arch.hop_length
        self.sources = nn.ModuleList()
        for rate in arch.upsample_rates:
            channels, samples = channels // 2, samples // rate  # of the upsampling's output; per one of its samples
            kernel_size = 2 * samples if samples > 1 else 7
            padding = (kernel_size - samples + 1) // 2
            self.sources.append(weight_norm(Conv1d(1, channels, kernel_size, samples, padding)))
        self.pitch_reader = PitchReader(arch.n_mels)

    def forward(self, log_mel: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        features = self.normalised(log_mel)
        return self.from_features(features, self.hear(source)), self.pitch_reader(features)

    def hear(self, source: Tensor) -> list[Tensor]:
        """What each upsampling hears of an excitation (B, S): (B, C, 1, S / rates to come)."""
        rows = as_rows(source[..., None])
        return [conv(rows) for conv in self.sources]

    def read_pitch(self, features: Tensor) -> Tensor:
        """The pitch (B, T) in Hz, 0 for no voice, of normalised log-mels (B, T, M)."""
        with true_float32(features.device):  # phases add up what pitches differ by
            return pitch_from(self.pitch_reader(features.float()))

    @property
    def context_frames(self) -> int:
        # a pulse lies between two frames' pitches, and a frame without a voice takes that of the frame after it
        of_source = 2 + PitchReader.context_frames + reach(self.spec)
        # instead of the 3 frames that conv_pre reads, the source's convolutions read 1
        return super().context_frames - 2 + of_source + self.MATCHINGS * reach(self.spec)

    def sound(self, log_mel: Tensor, first: int, last: int) -> Tensor:
        """As ``Generator.sound``. The pulses are counted from frame 0 on, so pieces of sound fit together."""
        hop = self.architecture.hop_length
        features, wanted = self.normalised(log_mel[:, :last]), log_mel[:, first:last]
        pitch = self.read_pitch(features)
        pulse = pulses(pitch, self.spec)[:, first * hop :]
        noise = steady_noise(self.NOISE, log_mel.device)
        noise = noise[torch.arange(first * hop, last * hop, device=log_mel.device) % self.NOISE].expand_as(pulse)
        source = excitation(wanted, pitch[:, first:], pulse, noise, self.spec)
        waveform = self.from_features(features[:, first:], self.hear(source))
        for _ in range(self.MATCHINGS):
            waveform = matched(waveform, wanted, self.spec)
        return waveform.clamp(-1, 1)


@cache
def steady_noise(samples: int, device: torch.device) -> Tensor:
    """The same normal noise (samples,) in every process."""
    return torch.randn(samples, generator=torch.Generator().manual_seed(0)).to(device)


def build_generator(architecture: VocoderArchitecture) -> Generator:
    return (HarmonicGenerator if architecture.harmonic_source else Generator)(architecture)


def fold_weight_norm(model: nn.Module) -> nn.Module:
    """Join direction and length of each weight into one tensor, which is faster and which other tools read."""
    for module in model.modules():
        if is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight")
    return model


def to_speecht5_state_dict(model: Generator) -> dict[str, Tensor]:
    """The weights of a folded generator under the names of ``transformers.SpeechT5HifiGan``."""
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def speecht5_config(arch: VocoderArchitecture) -> dict:
    """The ``config.json`` with which ``transformers.SpeechT5HifiGan`` opens this generator."""
    return {
        "architectures": ["SpeechT5HifiGan"],
        "model_type": "speecht5_hifigan",
        "model_in_dim": arch.n_mels,
        "sampling_rate": arch.sample_rate,
        "upsample_initial_channel": arch.upsample_initial_channel,
        "upsample_rates": arch.upsample_rates,
        "upsample_kernel_sizes": arch.kernel_sizes,
        "resblock_kernel_sizes": arch.resblock_kernel_sizes,
        "resblock_dilation_sizes": arch.resblock_dilation_sizes,
        "leaky_relu_slope": SLOPE,
        "normalize_before": True,
    }


# ---------------------------------------------------------------------------------------------------------------
# Discriminators


class PeriodDiscriminator(nn.Module):
    """Scores every P-th sample: the waveform folded to (B, 1, S / P, P), convolved along the time only."""

    def __init__(self, period: int, channels: int):
        super().__init__()
        self.period = period
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels, 32 * channels]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(before, after, (5, 1), (stride, 1), padding=(2, 0)))
            for before, after, stride in zip(widths[:-1], widths[1:], (3, 3, 3, 3, 1), strict=True)
        )
        self.conv_post = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveform: Tensor) -> list[Tensor]:
        x = reflect(waveform[:, None], 0, -waveform.shape[-1] % self.period)
        return _layers(self, x.unflatten(-1, (-1, self.period)))  # (B, 1, S / P, P)


class ScaleDiscriminator(nn.Module):
    """Scores the waveform, averaged over 2 ** ``halvings`` samples, with long grouped convolutions."""

    def __init__(self, halvings: int, channels: int):
        super().__init__()
        self.halvings = halvings
        c = channels
        # before, after, kernel, stride, groups
        layers = [
            (1, 4 * c, 15, 1, 1), (4 * c, 4 * c, 41, 2, 4), (4 * c, 8 * c, 41, 2, 16), (8 * c, 16 * c, 41, 4, 16),
            (16 * c, 32 * c, 41, 4, 16), (32 * c, 32 * c, 41, 1, 16), (32 * c, 32 * c, 5, 1, 1),
        ]  # fmt: skip
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(before, after, kernel, stride, kernel // 2, groups=groups))
            for before, after, kernel, stride, groups in layers
        )
        self.conv_post = weight_norm(nn.Conv1d(32 * c, 1, 3, padding=1))

    def forward(self, waveform: Tensor) -> list[Tensor]:
        x = waveform[:, None]  # (B, 1, S)
        for _ in range(self.halvings):
            x = F.avg_pool1d(x, 4, 2, padding=2)
        return _layers(self, x)


def _layers(discriminator: nn.Module, x: Tensor) -> list[Tensor]:
    """The output of each layer; the last one is the score."""
    outputs = []
    for conv in discriminator.convs:
        x = F.leaky_relu(conv(x), SLOPE)
        outputs.append(x)
    return [*outputs, discriminator.conv_post(x)]


class Discriminators(nn.Module):
    """All discriminators, of periods and scales: waveforms (B, S) -> the outputs of each one's layers.

    Kong et al. 2020. Departures: ``disc_channels`` sets the width (32 in the paper), and the first scale has weight
    norm like the others, not spectral norm, whose power iteration would change in every forward.
    """

    def __init__(self, architecture: DiscriminatorArchitecture):
        super().__init__()
        self.architecture = arch = architecture
        self.parts = nn.ModuleList(
            [PeriodDiscriminator(period, arch.disc_channels) for period in arch.mpd_periods]
            + [ScaleDiscriminator(halvings, arch.disc_channels) for halvings in range(arch.msd_num_scales)]
        )

    def forward(self, waveform: Tensor) -> list[list[Tensor]]:
        return [part(waveform) for part in self.parts]


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Inside the block, results of ``module`` have gradients with respect to its inputs, but not to its weights."""
    module.requires_grad_(False)
    try:
        yield module
    finally:
        module.requires_grad_(True)
