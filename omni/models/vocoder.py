"""HiFi-GAN: a generator that turns log-mels into a waveform, and the discriminators that it learns to deceive.

The generator is that of ``transformers.SpeechT5HifiGan`` to the number. It reads the very log-mels that the codec
writes (``omni.data.audio.log_mel``), and makes ``hop_length`` samples of each frame.
"""

# B clips, T mel frames, M mel channels, S samples (T * hop_length), C channels, P period

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from omni.data.audio import MelSpec, griffin_lim, load_audio, log_mel, reflect
from omni.data.manifest import Manifest, ManifestDataset
from omni.stages.vocoder import VocoderConfig
from omni.train import checkpoint
from omni.train.config import check_compatible

SLOPE = 0.1  # of the leaky ReLUs
LAST_SLOPE = 0.01  # of the one before the waveform: an oversight of the original that all its checkpoints have


def mel_spec(config: VocoderConfig) -> MelSpec:
    """The log-mels that a vocoder of this config reads."""
    return MelSpec(
        sample_rate=config.sample_rate,
        n_fft=config.n_fft,
        win_length=config.win_length,
        hop_length=config.hop_length,
        n_mels=config.n_mels,
        f_max=config.sample_rate / 2,
    )


def refuse_other_mels(vocoder: Path | str, config: VocoderConfig, codec: Path | str, spec: MelSpec) -> None:
    """
    Raises:
        UserError: ``vocoder``, of ``config``, reads other log-mels than ``codec`` writes: each difference.
    """
    check_compatible(vocoder, asdict(mel_spec(config)), codec, asdict(spec), what="its log-mels do")


# ---------------------------------------------------------------------------------------------------------------
# Generator


def as_rows(x: Tensor) -> Tensor:
    """(B, S, C) -> (B, C, 1, S), as the convolutions below read it: on a CPU channels last in memory, as it came."""
    x = x[:, None].permute(0, 3, 1, 2)
    return x if x.device.type == "cpu" else x.contiguous()


class Conv1d(nn.Conv1d):
    """Over the one row of a picture (B, C, 1, S): for pictures there are kernels that read channels last, and these
    take half of the time."""

    def forward(self, x: Tensor) -> Tensor:
        steps, padding, dilation = (1, *self.stride), (0, *self.padding), (1, *self.dilation)
        return F.conv2d(x, self.weight.unsqueeze(2), self.bias, steps, padding, dilation, self.groups)


class ConvTranspose1d(nn.ConvTranspose1d):
    """As ``Conv1d``."""

    def forward(self, x: Tensor) -> Tensor:
        steps, padding = (1, *self.stride), (0, *self.padding)
        return F.conv_transpose2d(x, self.weight.unsqueeze(2), self.bias, steps, padding)


class ResidualBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, each pair added to what goes in, (B, C, 1, S) -> (B, C, 1, S)."""

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
    normalised per channel, as in ``transformers.SpeechT5HifiGan``, whose names the modules have.
    """

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        channels = config.upsample_initial_channel
        self.conv_pre = weight_norm(Conv1d(config.n_mels, channels, 7, padding=3))
        self.upsampler, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel_size in zip(config.upsample_rates, config.kernel_sizes, strict=True):
            upsampling = ConvTranspose1d(channels, channels // 2, kernel_size, rate, (kernel_size - rate) // 2)
            self.upsampler.append(weight_norm(upsampling))
            channels //= 2
            for kernel_size, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(ResidualBlock(channels, kernel_size, dilations))
        self.conv_post = weight_norm(Conv1d(channels, 1, 7, padding=3))
        self.register_buffer("mean", torch.zeros(config.n_mels))
        self.register_buffer("scale", torch.ones(config.n_mels))

    def forward(self, log_mel: Tensor) -> Tensor:
        x = as_rows((log_mel - self.mean) / self.scale)  # (B, M, 1, T)
        x = self.conv_pre(x)  # (B, C, 1, T)
        kinds = len(self.config.resblock_kernel_sizes)
        for stage, upsampling in enumerate(self.upsampler):
            x = upsampling(F.leaky_relu(x, SLOPE))  # half as many channels, rate times as many samples
            ways = [block(x) for block in self.resblocks[stage * kinds : (stage + 1) * kinds]]
            x = ways[0] if kinds == 1 else reduce(torch.add, ways) / kinds
        with torch.autocast(x.device.type, enabled=False):  # 8 bits of a bf16 waveform would be heard as noise
            return torch.tanh(self.conv_post(F.leaky_relu(x.float(), LAST_SLOPE))).flatten(1)  # (B, S)

    @property
    def context_frames(self) -> int:
        """How many frames before and after a frame have a part in its samples, at most."""
        config = self.config
        reach = 3  # of conv_post, in samples on either side
        widest = max(
            (kernel_size - 1) // 2 * (sum(dilations) + len(dilations))
            for kernel_size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        )
        for rate, kernel_size in zip(reversed(config.upsample_rates), reversed(config.kernel_sizes), strict=True):
            padding = (kernel_size - rate) // 2
            reach = math.ceil((reach + widest + kernel_size - 1 - padding) / rate)
        return reach + 3  # of conv_pre

    @torch.inference_mode()
    def vocode(self, log_mel: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """The waveform of frames ``start`` to ``end``, from these frames and their context alone: for streaming.

        Args:
            log_mel: (..., T, M).

        Returns:
            (..., (end - start) * hop_length), the same samples as in the waveform of all frames.
        """
        frames, hop = log_mel.shape[-2], self.config.hop_length
        end = frames if end is None else end
        first, last = max(0, start - self.context_frames), min(frames, end + self.context_frames)
        waveform = self.forward(
            log_mel.reshape(-1, *log_mel.shape[-2:])[:, first:last]
        )  # compiled: for one length only
        waveform = waveform[:, (start - first) * hop : (end - first) * hop]
        return waveform.reshape(*log_mel.shape[:-2], -1)


def fold_weight_norm(model: nn.Module) -> nn.Module:
    """Direction and length of each weight become one tensor again: faster, and what other tools read."""
    for module in model.modules():
        if is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight")
    return model


def load_vocoder(folder: str | Path, device: torch.device | str) -> Generator:
    """The generator of a stage folder with its ``config``, ready to speak: in evaluation mode, weight norm folded.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    saved = checkpoint.load_stage(folder, "vocoder", "hifigan", "hifigan.pt")
    config = checkpoint.saved_config(VocoderConfig, saved)
    model = checkpoint.build(lambda: Generator(config), saved["model"], saved["path"])
    return fold_weight_norm(model).to(device).eval()


def load_vocoder_for(
    codec: Path | str, spec: MelSpec, folder: str | Path | None, device: torch.device | str
) -> Generator | None:
    """``load_vocoder`` for the log-mels of ``codec``, which messages name so; None without a folder.

    Raises:
        UserError: no checkpoint there, a damaged one, or one of other log-mels.
    """
    if folder is None:
        return None
    vocoder = load_vocoder(folder, device)
    refuse_other_mels(folder, vocoder.config, codec, spec)
    return vocoder


def to_speecht5_state_dict(model: Generator) -> dict[str, Tensor]:
    """The weights of a folded generator as ``transformers.SpeechT5HifiGan`` names them."""
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def speecht5_config(config: VocoderConfig) -> dict:
    """The config.json with which ``transformers.SpeechT5HifiGan`` is this generator."""
    return {
        "architectures": ["SpeechT5HifiGan"],
        "model_type": "speecht5_hifigan",
        "model_in_dim": config.n_mels,
        "sampling_rate": config.sample_rate,
        "upsample_initial_channel": config.upsample_initial_channel,
        "upsample_rates": config.upsample_rates,
        "upsample_kernel_sizes": config.kernel_sizes,
        "resblock_kernel_sizes": config.resblock_kernel_sizes,
        "resblock_dilation_sizes": config.resblock_dilation_sizes,
        "leaky_relu_slope": SLOPE,
        "normalize_before": True,
    }


# ---------------------------------------------------------------------------------------------------------------
# Discriminators


class PeriodDiscriminator(nn.Module):
    """Looks at every P-th sample: the waveform folded to (B, 1, S / P, P), convolved along the time only."""

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
    """Looks at the waveform, averaged over 2 ** ``halvings`` samples, with long grouped convolutions."""

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
    """What each layer makes of ``x``; the last one's is the verdict."""
    outputs = []
    for conv in discriminator.convs:
        x = F.leaky_relu(conv(x), SLOPE)
        outputs.append(x)
    return [*outputs, discriminator.conv_post(x)]


class Discriminators(nn.Module):
    """Every period's and every scale's: waveforms (B, S) -> for each discriminator the outputs of its layers.

    Kong et al. 2020. Departures: ``disc_channels`` sets the width (32 in the paper), and the first scale has weight
    norm like the others, not spectral norm, whose power iteration would change with every look.
    """

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.parts = nn.ModuleList(
            [PeriodDiscriminator(period, config.disc_channels) for period in config.mpd_periods]
            + [ScaleDiscriminator(halvings, config.disc_channels) for halvings in range(config.msd_num_scales)]
        )

    def forward(self, waveform: Tensor) -> list[list[Tensor]]:
        return [part(waveform) for part in self.parts]


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """What the block computes with ``module`` has gradients with respect to its inputs, not to its weights."""
    module.requires_grad_(False)
    try:
        yield module
    finally:
        module.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------
# Losses: of a batch of equally long segments, each a mean over the batch


def discriminator_loss(real: list[list[Tensor]], generated: list[list[Tensor]]) -> Tensor:
    """Least squares (Mao et al. 2017): 1 for what is real, 0 for what is not. Summed over the discriminators."""
    return sum(
        (1 - ours[-1].float()).square().mean() + theirs[-1].float().square().mean()
        for ours, theirs in zip(real, generated, strict=True)
    )


def adversarial_loss(generated: list[list[Tensor]]) -> Tensor:
    """How far the discriminators are from taking the generated for real. Summed over them."""
    return sum((1 - theirs[-1].float()).square().mean() for theirs in generated)


def feature_loss(real: list[list[Tensor]], generated: list[list[Tensor]]) -> Tensor:
    """Mean difference of a layer's outputs, summed over the layers of all discriminators. Larsen et al. 2016."""
    return sum(
        (a.float() - b.float()).abs().mean()
        for ours, theirs in zip(real, generated, strict=True)
        for a, b in zip(ours[:-1], theirs[:-1], strict=True)
    )


def mel_loss(real: Tensor, generated: Tensor, spec: MelSpec) -> Tensor:
    """Mean difference of the log-mels of two batches of waveforms (B, S)."""
    with torch.no_grad():
        target = log_mel(real, spec)
    return (log_mel(generated, spec) - target).abs().mean()


# ---------------------------------------------------------------------------------------------------------------
# ManifestDataset


def split_column(path: str) -> str:
    """The column that splits a manifest of clips: the text if there is one, so that no sentence is on both sides."""
    with open(path, encoding="utf-8", errors="replace") as file:  # whose lines end with LF, CRLF or CR
        head = file.read(1 << 16)
    if Path(path).suffix not in (".json", ".jsonl"):
        head = head.lstrip().partition("\n")[0]
    return "text" if re.search(r"\btext\b", head) else "wav"


def read_clip(manifest: Manifest, row: dict, config: VocoderConfig) -> Tensor:
    """(S,) a row's recording, as many whole hops as it has, at least one.

    Raises:
        BadRow: it cannot be used.
    """
    path = manifest.file(row["wav"])
    waveform = torch.from_numpy(load_audio(path, config.sample_rate, config.max_clip_s, mel_spec(config).win_length))
    hop = config.hop_length
    samples = max(hop, len(waveform) // hop * hop)
    return F.pad(waveform, (0, samples - len(waveform)))  # a negative number cuts off


def segment_log_mel(waveform: Tensor, start: int, frames: int, spec: MelSpec) -> Tensor:
    """Frames ``start`` to ``start + frames`` of the log-mel of a whole clip (S,), without computing the others.

    Returns:
        (frames, M)
    """
    context = -(-spec.win_length // spec.hop_length)  # frames: beyond every window, and never too short to be reflected
    first = max(0, start - context)
    piece = waveform[first * spec.hop_length : (start + frames + context) * spec.hop_length]
    return log_mel(piece, spec)[start - first : start - first + frames]


class Clips(ManifestDataset):
    """Recordings with their log-mels, see ``ManifestDataset``: random segments in training, else whole clips.

    Args:
        codec: turns log-mels (B, T, M) into what the codec makes of them; None: they stay as they are.
    """

    def __init__(
        self, manifest: Manifest, rows: np.ndarray, config: VocoderConfig, *, codec: nn.Module | None = None, **keys
    ) -> None:
        super().__init__(manifest, rows, **keys)
        self.config, self.spec, self.codec = config, mel_spec(config), codec

    def read(self, row: dict, rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        waveform, hop = read_clip(self.manifest, row, self.config), self.config.hop_length
        start, frames = 0, len(waveform) // hop
        if rng is not None:
            wanted = self.config.segment_samples // hop
            waveform = F.pad(waveform, (0, max(0, wanted - frames) * hop))  # silence after a short clip
            start, frames = int(rng.integers(max(0, frames - wanted) + 1)), wanted
        if self.codec is None:
            mel = segment_log_mel(waveform, start, frames, self.spec)
        else:  # the codec sees the whole clip, as it will when it speaks
            with torch.no_grad():
                mel = self.codec.resynthesise(log_mel(waveform, self.spec)[None])[0, start : start + frames].clone()
        return mel, waveform[start * hop : (start + frames) * hop].clone()

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> dict:
        """``log_mel`` (B, T, M), ``waveform`` (B, T * hop_length), padded with 0; ``frames`` (B,) of each."""
        mels, waveforms = zip(*samples, strict=True)
        frames = torch.tensor([len(mel) for mel in mels])
        batch = {
            "log_mel": nn.utils.rnn.pad_sequence(mels, batch_first=True),
            "waveform": nn.utils.rnn.pad_sequence(waveforms, batch_first=True),
            "frames": frames,
        }
        return batch | {"n_targets": int(frames.sum()) * self.config.hop_length}


def load_codec_of(config: VocoderConfig) -> nn.Module | None:
    """The codec of ``codec_ckpt``, on the CPU, where rows are read; None without one."""
    if config.codec_ckpt is None:
        return None
    from omni.models.codec import load_codec
    from omni.models.codec import mel_spec as codec_mel_spec

    codec = load_codec(config.codec_ckpt, "cpu")
    refuse_other_mels("this config", config, config.codec_ckpt, codec_mel_spec(codec.arch))
    return codec


# ---------------------------------------------------------------------------------------------------------------
# Judging


class VocoderScore:
    """How far the log-mels of what is generated are from the real ones, beside Griffin-Lim's on the same clips.

    Griffin-Lim's do not change, so they are computed at the first validation only.

    Args:
        show: called with the step, the number of the clip and its waveforms by name, for the first ``shown`` clips.
    """

    def __init__(
        self,
        config: VocoderConfig,
        show: Callable[[int, int, dict[str, Tensor]], None] | None = None,
        shown: int = 2,
    ) -> None:
        self.spec, self.show, self.shown = mel_spec(config), show, shown
        self.griffin_lim: dict[tuple[int, ...], Tensor] = {}  # rows of a batch's clips -> sum of its differences

    def sums(self, model: Generator, batch: dict) -> dict[str, Tensor]:
        """Sums over the clips of a batch from ``Clips.collate``; float32 whatever autocast says."""
        rows, hop = tuple(batch["sample_rows"]), self.spec.hop_length
        known = rows in self.griffin_lim
        totals = dict.fromkeys(("difference", "griffin_lim", "values"), torch.zeros(()))
        # one at a time: padding would be heard at the end
        for number, mel, real, frames in zip(
            rows, batch["log_mel"], batch["waveform"], batch["frames"].tolist(), strict=True
        ):
            mel, real = mel[:frames], real[: frames * hop]
            with torch.autocast(mel.device.type, enabled=False):
                # not model(mel): compiled, it would be compiled again for every length
                clips = {"real": real, "hifigan": model.forward(mel[None])[0]}
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
