"""The audio encoder: a FastConformer over log-mels, with a linear head trained by CTC.

Its outputs equal those of ``transformers.ParakeetForCTC``: see ``to_parakeet_state_dict``.
"""

# B batch, T mel frames, M mel channels, U output frames (T / 8, rounded up), D model width, F inner width
# H heads, K head width, C channels of the subsampling, V tokens and blank

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.data.audio import MelSpec
from omni.models.architectures import AudioEncoderArchitecture
from omni.models.ops import attention, linear

BATCH_NORM_EPS = 1e-5
# rms of a * sigmoid(b) for independent standard normals: the factor by which a gated linear unit scales its input
_GLU_RMS = 0.5415


def mel_spec(arch: AudioEncoderArchitecture) -> MelSpec:
    """The log-mels that an encoder of this architecture reads."""
    return MelSpec(
        sample_rate=arch.sample_rate,
        n_fft=max(1024, 1 << (arch.frame_win - 1).bit_length()),
        win_length=arch.frame_win,
        hop_length=arch.frame_hop,
        n_mels=arch.mel_bins,
        f_max=arch.sample_rate / 2,
    )


def output_frames(frames, downsample_time: int):
    """Number of output frames of ``frames`` mel frames; an int, array or tensor."""
    return -(-frames // downsample_time)


class Subsampling(nn.Module):
    """Mel frames to fewer, wider frames: (B, T, M) -> (B, U, D).

    Each stage halves time and frequency: the first by a full convolution, the others by a depthwise and a pointwise
    one (Rekesh et al. 2023). Frames beyond an utterance's end are set to zero after each stage, since the next
    convolution reads them.
    """

    def __init__(self, arch: AudioEncoderArchitecture):
        super().__init__()
        channels, stages = arch.subsampling_channels, int(math.log2(arch.downsample_time)) - 1
        self.conv = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels) for _ in range(stages)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(stages))
        self.linear = nn.Linear(channels * (arch.mel_bins // arch.downsample_time), arch.d_model)
        for conv in (self.conv, *self.pointwise):  # a ReLU follows
            nn.init.normal_(conv.weight, std=math.sqrt(2 / conv.weight[0].numel()))
        for conv in self.depthwise:
            nn.init.normal_(conv.weight, std=1 / 3)
        for conv in (self.conv, *self.depthwise, *self.pointwise):
            nn.init.zeros_(conv.bias)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        x = features.unsqueeze(1)  # (B, 1, T, M)
        if x.device.type == "cpu":  # channels last in memory, here and in all that follows: faster there
            x = features.unsqueeze(-1).permute(0, 3, 1, 2)
        x = F.relu(self.conv(x))  # (B, C, T / 2, M / 2)
        lengths = output_frames(lengths, 2)
        x = x * frame_mask(lengths, x.shape[2])[:, None, :, None]
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = F.relu(pointwise(_depthwise(depthwise, x)))
            lengths = output_frames(lengths, 2)
            x = x * frame_mask(lengths, x.shape[2])[:, None, :, None]
        return self.linear(x.transpose(1, 2).flatten(2))  # (B, U, D)


def _depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of each channel by itself. On a CPU it uses the weights' float32, also under autocast: bf16 would
    take four times as long."""
    with torch.autocast("cpu", enabled=False) if x.device.type == "cpu" else nullcontext():
        return conv(x.to(conv.weight.dtype) if x.device.type == "cpu" else x)


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """(B, frames) bool: true for the first ``lengths`` (B,) of each row."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def relative_positions(frames: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids (2U, D) of the distances U - 1, ..., 0, ..., -U, sines on even channels, cosines on odd ones."""
    distances = torch.arange(frames - 1, -frames - 1, -1, device=device, dtype=torch.float32)
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = distances[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def by_distance_to_by_key(scores: Tensor) -> Tensor:
    """Scores (..., U, 2U) of query i for distances U - 1 ... -U, as (..., U, U) for keys j: distance i - j. A view.

    Row i needs its columns from U - 1 - i on, one further left with each row. Reading the same memory in rows that are
    one shorter shifts each row by exactly that.
    """
    U = scores.shape[-2]
    return scores.flatten(-2)[..., U - 1 : -1].unflatten(-1, (U, 2 * U - 1))[..., :U]


class RelativeAttention(nn.Module):
    """Self-attention with relative positions, (B, U, D) -> (B, U, D).

    A key's score is the sum of one for its content and one for its projected distance, each with a learned bias of the
    query (Dai et al. 2019, "Transformer-XL", section 3.3). The fused attention takes the second as its mask.
    """

    no_decay = ("bias_u", "bias_v")

    def __init__(self, d_model: int, n_heads: int, use_flash: bool):
        super().__init__()
        self.n_heads, self.d_head, self.use_flash = n_heads, d_model // n_heads, use_flash
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.o_proj = nn.Linear(d_model, d_model)
        self.relative_k_proj = nn.Linear(d_model, d_model, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(n_heads, self.d_head))
        self.bias_v = nn.Parameter(torch.zeros(n_heads, self.d_head))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """``positions`` (2U, D); ``mask`` (B, U), true for valid frames."""
        B, U, _ = x.shape
        q, k, v = (
            linear(x, self.q_proj, self.k_proj, self.v_proj).view(B, U, 3, self.n_heads, self.d_head).unbind(dim=2)
        )
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, H, U, K)
        r = self.relative_k_proj(positions).view(2 * U, self.n_heads, self.d_head).permute(1, 2, 0)  # (H, K, 2U)
        by_content = (q + self.bias_u.to(q.dtype)).transpose(1, 2)  # (B, H, U, K)
        by_distance = (q + self.bias_v.to(q.dtype)).transpose(1, 2) @ r  # (B, H, U, 2U)
        scores = by_distance_to_by_key(by_distance) / math.sqrt(self.d_head)
        # not -inf: a softmax over -inf alone is nan
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        y = attention(by_content, k, v, mask=scores, use_flash=self.use_flash)  # (B, H, U, K)
        return self.o_proj(y.transpose(1, 2).reshape(B, U, -1))


class FeedForward(nn.Module):
    """(B, U, D) -> (B, U, D) with an inner width of F."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x)))


class ChannelScale(nn.Module):
    """(B, U, D) -> (B, U, D): a learned scale and shift per channel.

    It replaces a Conformer's batch norm, and equals it at inference. In training, batch statistics would make the
    result depend on how a batch is split over micro-batches and processes, and one batch that is not finite would spoil
    the running averages for good.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype) + self.bias.to(x.dtype)


class Convolution(nn.Module):
    """Depthwise convolution over near frames, which attention models less well. (B, U, D) -> (B, U, D)."""

    def __init__(self, d_model: int, kernel_size: int):
        super().__init__()
        self.pointwise_conv1 = nn.Linear(d_model, 2 * d_model)
        self.depthwise_conv = nn.Conv1d(d_model, d_model, kernel_size, padding=kernel_size // 2, groups=d_model)
        self.norm = ChannelScale(d_model)
        self.pointwise_conv2 = nn.Linear(d_model, d_model)
        # no norm follows, so the initial weights must keep the scale
        nn.init.normal_(self.depthwise_conv.weight, std=1 / (_GLU_RMS * math.sqrt(kernel_size)))
        nn.init.zeros_(self.depthwise_conv.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``mask`` (B, U), true for valid frames; the others are set to zero, since the convolution reads them."""
        x = F.glu(self.pointwise_conv1(x), dim=-1) * mask[:, :, None]
        x = self.depthwise_conv(x.transpose(1, 2)).transpose(1, 2)
        return self.pointwise_conv2(F.silu(self.norm(x)))


class Block(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, each on a residual branch with a norm.

    Gulati et al. 2020, "Conformer".
    """

    def __init__(self, arch: AudioEncoderArchitecture, use_flash: bool):
        super().__init__()
        self.feed_forward1 = FeedForward(arch.d_model, arch.d_ff)
        self.self_attn = RelativeAttention(arch.d_model, arch.n_heads, use_flash)
        self.conv = Convolution(arch.d_model, arch.conv_kernel_size)
        self.feed_forward2 = FeedForward(arch.d_model, arch.d_ff)
        self.norm_feed_forward1 = nn.LayerNorm(arch.d_model)
        self.norm_self_att = nn.LayerNorm(arch.d_model)
        self.norm_conv = nn.LayerNorm(arch.d_model)
        self.norm_feed_forward2 = nn.LayerNorm(arch.d_model)
        self.norm_out = nn.LayerNorm(arch.d_model)
        self.dropout = nn.Dropout(arch.dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + 0.5 * self.dropout(self.feed_forward1(self.norm_feed_forward1(x)))
        x = x + self.dropout(self.self_attn(self.norm_self_att(x), positions, mask))
        x = x + self.dropout(self.conv(self.norm_conv(x), mask))
        x = x + 0.5 * self.dropout(self.feed_forward2(self.norm_feed_forward2(x)))
        return self.norm_out(x)


class AudioEncoder(nn.Module):
    """Log-mels to text units, 12.5 frames a second at the usual sizes.

    Args:
        architecture: its ``ctc_vocab_size`` is the tokenizer's real one. The blank is one more class, the last.
        use_flash: fused attention; False: the plain maths.

    Rekesh et al. 2023, "Fast Conformer with Linearly Scalable Attention". Departures: ``ChannelScale`` instead of a
    batch norm; no factor sqrt(D) after the subsampling, whose linear layer is initialised to the right scale.
    """

    def __init__(self, architecture: AudioEncoderArchitecture, *, use_flash: bool = True):
        super().__init__()
        self.architecture = arch = architecture
        self.subsampling = Subsampling(arch)
        self.layers = nn.ModuleList(Block(arch, use_flash) for _ in range(arch.n_layers))
        self.ctc_head = nn.Linear(arch.d_model, arch.ctc_vocab_size + 1)
        self.dropout = nn.Dropout(arch.dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # the output's variance is the input's
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            features: (B, T, M) normalised log-mels, zero beyond each utterance's end.
            lengths: (B,) mel frames of each utterance, at least 1.

        Returns:
            Frames (B, U, D) and the number of valid ones (B,). Padding changes no valid frame.
        """
        x = self.dropout(self.subsampling(features, lengths))
        lengths = output_frames(lengths, self.architecture.downsample_time)
        mask = frame_mask(lengths, x.shape[1])
        positions = relative_positions(x.shape[1], self.architecture.d_model, x.device).to(x.dtype)
        for layer in self.layers:
            x = layer(x, positions, mask)
        return x, lengths

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """As ``encode``, but returns logits (B, U, V) of the tokens and, last, the blank."""
        x, lengths = self.encode(features, lengths)
        return self.ctc_head(x), lengths


# ---------------------------------------------------------------------------------------------------------------
# Export


def parakeet_config(arch: AudioEncoderArchitecture) -> dict:
    """The ``config.json`` of an equal ``transformers.ParakeetForCTC``: its keyword arguments, nested."""
    encoder = {
        "model_type": "parakeet_encoder",
        "hidden_size": arch.d_model,
        "num_hidden_layers": arch.n_layers,
        "num_attention_heads": arch.n_heads,
        "intermediate_size": arch.d_ff,
        "hidden_act": "silu",
        "attention_bias": True,
        "convolution_bias": True,
        "conv_kernel_size": arch.conv_kernel_size,
        "subsampling_factor": arch.downsample_time,
        "subsampling_conv_channels": arch.subsampling_channels,
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
        "num_mel_bins": arch.mel_bins,
        "scale_input": False,
    }
    return {
        "model_type": "parakeet_ctc",
        "architectures": ["ParakeetForCTC"],
        "vocab_size": arch.ctc_vocab_size + 1,
        "pad_token_id": arch.ctc_vocab_size,  # the blank
        "encoder_config": encoder,
    }


def to_parakeet_state_dict(model: AudioEncoder) -> dict[str, Tensor]:
    """The weights with the names and shapes of ``transformers.ParakeetForCTC``, which gives equal logits.

    ``ChannelScale`` becomes a batch norm with mean 0 and variance 1 - eps, which divides by exactly 1.
    """
    exported = {}
    for name, weight in model.state_dict().items():
        prefix = "" if name.startswith("ctc_head.") else "encoder."
        if name == "ctc_head.weight" or (".pointwise_conv" in name and name.endswith(".weight")):
            weight = weight.unsqueeze(-1)  # a linear layer is a convolution of width 1
        exported[prefix + _parakeet_name(name)] = weight
        if name.endswith(".conv.norm.weight"):
            norm = prefix + name.removesuffix("weight")
            exported[norm + "running_mean"] = torch.zeros_like(weight)
            exported[norm + "running_var"] = torch.full_like(weight, 1 - BATCH_NORM_EPS)
            exported[norm + "num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return exported


def _parakeet_name(name: str) -> str:
    """Parakeet's subsampling is one list: convolution, ReLU, then (depthwise, pointwise, ReLU) for each stage."""
    parts = name.split(".")
    if parts[:2] == ["subsampling", "conv"]:
        return f"subsampling.layers.0.{parts[2]}"
    if parts[0] == "subsampling" and parts[1] in ("depthwise", "pointwise"):
        index = 2 + 3 * int(parts[2]) + (parts[1] == "pointwise")
        return f"subsampling.layers.{index}.{parts[3]}"
    return name
