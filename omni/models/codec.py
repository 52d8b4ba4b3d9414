"""The speech codec: log-mels to a few small integers every 80 ms, and back.

An encoder turns every ``frame_ms`` of log-mel into a latent, a residual vector quantiser (``omni.models.quantizer``)
replaces each latent by one code from each codebook, and a decoder turns the codes into log-mels. The talker learns to
predict the codes.
"""

# B clips, T mel frames, M mel channels, N = T / frames_per_code latents, C latent width, D model width, Q codebooks

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.data.audio import MelSpec
from omni.models.layers import ConvNeXtBlock, RMSNorm
from omni.models.quantizer import ResidualQuantizer
from omni.models.speech_architectures import CodecArchitecture, SpeechFrames

SILENCE = -11.5  # log-mel of digital silence, see omni.data.audio


def mel_spec(arch: SpeechFrames) -> MelSpec:
    """The log-mels of stage D."""
    return MelSpec(
        sample_rate=arch.sample_rate,
        n_fft=arch.n_fft,
        win_length=arch.frame_win,
        hop_length=arch.frame_hop,
        n_mels=arch.n_mels,
        f_max=arch.sample_rate / 2,
    )


class Codec(nn.Module):
    """Log-mels -> codes -> log-mels.

    The network joins ``frames_per_code`` frames and runs at the slow rate, 12.5 frames/s; a few layers at the mels' own
    rate smooth the seams at the end.
    """

    def __init__(self, architecture: CodecArchitecture):
        super().__init__()
        self.architecture = arch = architecture
        width, inner, kernel = arch.codec_d_model, arch.codec_d_ff, arch.codec_kernel_size
        patch = arch.frames_per_code * arch.n_mels

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(ConvNeXtBlock(width, inner, kernel) for _ in range(count))

        # log-mels are normalised by these, so that errors are in units of their standard deviation
        self.register_buffer("mel_mean", torch.zeros(arch.n_mels))
        self.register_buffer("mel_std", torch.ones(arch.n_mels))
        self.patch_in = nn.Linear(patch, width)
        self.encoder = blocks(arch.codec_layers)
        self.encoder_norm = RMSNorm(width)
        self.to_latent = nn.Linear(width, arch.codec_latent)
        self.quantizer = ResidualQuantizer(
            arch.codebooks, arch.codebook_size, arch.codec_latent, arch.quantizer_dropout, arch.ema_decay
        )
        self.from_latent = nn.Linear(arch.codec_latent, width)
        self.decoder = blocks(arch.codec_layers)
        self.decoder_norm = RMSNorm(width)
        self.patch_out = nn.Linear(width, patch)
        self.smoother = nn.ModuleList(
            ConvNeXtBlock(arch.n_mels, 2 * arch.n_mels, kernel) for _ in range(arch.codec_smoother_layers)
        )

    @property
    def context(self) -> int:
        """Codes on either side that a decoded mel frame depends on."""
        half = self.architecture.codec_kernel_size // 2
        smoothed = -(-half * self.architecture.codec_smoother_layers // self.architecture.frames_per_code)
        return half * self.architecture.codec_layers + smoothed

    def forward(self, log_mels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            log_mels: (B, T, M), T a multiple of ``frames_per_code``.
            lengths: (B,) frames of each clip; frames beyond them are ignored.

        Returns:
            Input and output, normalised, (B, T, M); codes (B, N, Q); and the commitment loss, ().
        """
        normalised = self.normalise(log_mels)
        latents, mask = self.latents(normalised, lengths)
        with torch.autocast(latents.device.type, enabled=False):
            quantised, codes, commitment = self.quantizer(latents.float(), mask)
        return normalised, self.reconstruct(quantised, mask), codes, commitment

    def normalise(self, log_mels: Tensor) -> Tensor:
        return (log_mels - self.mel_mean) / self.mel_std

    def latents(self, normalised: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M) -> latents (B, N, C), and (B, N), true where a latent is not padding."""
        per_code = self.architecture.frames_per_code
        frame = torch.arange(normalised.shape[1], device=lengths.device) < lengths[:, None]  # (B, T)
        # silence fills a clip up to the next whole code
        silence = self.normalise(torch.full_like(self.mel_mean, SILENCE))
        normalised = torch.where(frame[..., None], normalised, silence.to(normalised.dtype))
        mask = frame.unflatten(1, (-1, per_code)).any(dim=-1)  # (B, N)
        x = self.patch_in(normalised.unflatten(1, (-1, per_code)).flatten(2))  # (B, N, D)
        for block in self.encoder:
            x = block(x, mask[..., None].to(x.dtype))
        return self.to_latent(self.encoder_norm(x)), mask

    def reconstruct(self, quantised: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C), valid where ``mask`` (B, N) -> normalised log-mels (B, T, M)."""
        x = self.from_latent(quantised)
        mask = None if mask is None else mask[..., None].to(x.dtype)
        for block in self.decoder:
            x = block(x, mask)
        per_code = self.architecture.frames_per_code
        x = self.patch_out(self.decoder_norm(x)).unflatten(2, (per_code, -1)).flatten(1, 2)  # (B, T, M)
        mask = None if mask is None else mask.repeat_interleave(per_code, dim=1)
        for block in self.smoother:
            x = block(x, mask)
        return x

    @torch.no_grad()
    def encode(self, log_mels: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, M) log-mels of ``lengths`` (B,) frames -> codes (B, N, Q)."""
        latents, mask = self.latents(self.normalise(log_mels), lengths)
        return self.quantizer(latents.float(), mask)[1]

    @torch.no_grad()
    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, N, k) of the first k codebooks -> log-mels (B, T, M).

        Args:
            lengths: (B,) codes of each clip; None: N.
        """
        mask = None if lengths is None else torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]
        return self.reconstruct(self.quantizer.decode(codes), mask).float() * self.mel_std + self.mel_mean

    def encode_one(self, log_mels: Tensor) -> Tensor:
        """The codes (N, Q) of one clip (T, M)."""
        T, device = len(log_mels), log_mels.device
        padded = F.pad(log_mels, (0, 0, 0, -T % self.architecture.frames_per_code))
        return self.encode(padded[None], torch.tensor([T], device=device))[0]

    def resynthesise(self, log_mels: Tensor) -> Tensor:
        """Log-mels (..., T, M), without padding, coded and decoded again."""
        T = log_mels.shape[-2]
        clips = log_mels.reshape(-1, *log_mels.shape[-2:])
        coded = [self.decode(self.encode_one(clip)[None])[0, :T] for clip in clips]
        return torch.stack(coded).view(log_mels.shape)
