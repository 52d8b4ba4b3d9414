"""The architectures of the speech models: codec, aligner, talker, vocoder. See ``omni.models.architectures``."""

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from omni.common.spoken import TEXT_LANGUAGE, Language
from omni.models.architectures import Architecture, ThinkerArchitecture

ListedSize = Annotated[int, Field(le=65_536)]
MAX_SPEAKERS = 10_000


class SpeechFrames(Architecture):
    """The log-mels of stage D, and its three units of time: mel frames, alignment frames, codes."""

    sample_rate: int = Field(16000, ge=8000, le=192_000, description="Hz; recordings of other rates are resampled")
    n_fft: int = Field(1024, ge=16, le=65_536, description="samples of a mel frame's transform")
    frame_hop: int = Field(160, ge=16, le=65_536, description="samples from one mel frame to the next")
    frame_win: int = Field(640, ge=16, le=65_536, description="samples of a mel frame's window")
    n_mels: int = Field(80, ge=8, le=1_024, description="mel channels")
    frame_ms: int = Field(80, ge=10, le=1_000, description="milliseconds of speech in one code of each codebook")

    @property
    def frames_per_code(self) -> int:
        return self.frame_ms * self.sample_rate // (1000 * self.frame_hop)

    @property
    def alignment_frames_per_code(self) -> int:
        """Number of alignment frames, the unit of durations, in the time of a code: 4 (each 20 of 80 ms), or the next
        larger number that divides the code's mel frames; with fewer than 4 mel frames, one each."""
        frames = self.frames_per_code
        return next(count for count in range(min(4, frames), frames + 1) if frames % count == 0)

    @model_validator(mode="after")
    def _frames_fit(self) -> Self:
        if self.frame_ms * self.sample_rate % (1000 * self.frame_hop):
            hop_ms = 1000 * self.frame_hop / self.sample_rate
            raise ValueError(f'key "frame_ms": expected a multiple of {hop_ms:g} (frame_hop), found {self.frame_ms}')
        if not self.frame_hop <= self.frame_win <= self.n_fft:
            sizes = f"{self.frame_hop}, {self.frame_win} and {self.n_fft}"
            raise ValueError(f'key "frame_win": expected frame_hop <= frame_win <= n_fft, found {sizes}')
        return self


class SpeechCodes(SpeechFrames):
    """The codes that the codec produces and the talker predicts."""

    codebooks: int = Field(8, ge=1, le=64, description="codebooks, each finer than the one before; codes per frame")
    codebook_size: int = Field(256, ge=2, le=65_536, description="codes in each codebook")


class CodecArchitecture(SpeechCodes):
    """The sizes of the speech codec."""

    codec_d_model: int = Field(512, ge=8, le=1_000_000, description="width of the codec")
    codec_d_ff: int = Field(1536, ge=8, le=1_000_000, description="inner width of the codec's blocks")
    codec_layers: int = Field(6, ge=1, le=1000, description="blocks of the encoder, and of the decoder")
    codec_kernel_size: int = Field(5, ge=1, le=1_024, description="convolutions' width, in frames of frame_ms")
    codec_smoother_layers: int = Field(2, ge=0, le=1000, description="blocks after the decoder, at the mel frame rate")
    codec_latent: int = Field(64, ge=1, le=1_000_000, description="width of the quantised latents")
    quantizer_dropout: float = Field(0.25, ge=0, le=1, description="share of clips coded with fewer codebooks")
    ema_decay: float = Field(0.98, gt=0, lt=1, description="decay, per step, of the codebooks' moving averages")

    @model_validator(mode="after")
    def _codec_sizes_fit(self) -> Self:
        if self.codec_kernel_size % 2 == 0:
            raise ValueError(f'key "codec_kernel_size": expected an odd number, found {self.codec_kernel_size}')
        return self


class ReadTexts(Architecture):
    """How the aligner and the talker read texts."""

    text_language: Language | None = Field(None, description=TEXT_LANGUAGE)


class AlignerArchitecture(ReadTexts, SpeechFrames):
    """The sizes of the aligner."""

    aligner_d_model: int = Field(128, ge=8, le=1_000_000, description="width of the aligner")
    aligner_layers: int = Field(
        2,
        ge=0,
        le=1000,
        description="convolutions over the text and over the speech, each 5 bytes or alignment frames wide",
    )


class TalkerArchitecture(ReadTexts, SpeechCodes):
    """The sizes of the talker, and the codes that it predicts."""

    d_model: int = Field(512, ge=8, le=1_000_000)
    n_layers: int = Field(8, ge=1, le=1000)
    n_heads: int = Field(8, ge=1, le=1_024)
    d_ff: int = Field(1536, ge=8, le=1_000_000, description="inner width of the SwiGLU MLP")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the residual branches, in training only")
    rope_theta: float = Field(10000.0, gt=0)
    use_gqa: bool = Field(False, description="grouped-query attention with kv_groups key/value heads")
    kv_groups: int = Field(2, ge=1, le=1_024, description="key/value heads under use_gqa")
    text_layers: int = Field(3, ge=0, le=1000, description="convolutions over the bytes of the text")
    depth_d_model: int = Field(
        256, ge=8, le=1_000_000, description="width of the depth decoder, which predicts a frame's codes in turn"
    )
    depth_layers: int = Field(2, ge=1, le=1000)
    depth_d_ff: int = Field(768, ge=8, le=1_000_000)
    thinker_d_model: int | None = Field(
        None, ge=8, le=1_000_000, description="width of the Thinker whose states are added to the text; default: none"
    )
    voice_layers: int = Field(
        0, ge=0, le=1000, description="blocks of the voice encoder, for data with the column speaker; 0: one voice"
    )
    speakers: list[str] = Field([], max_length=MAX_SPEAKERS, description="names of the voices, set by the script")

    @property
    def blocks(self) -> ThinkerArchitecture:
        """The sizes of the blocks for ``omni.models.layers``."""
        return ThinkerArchitecture(
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_ff=self.d_ff,
            dropout=self.dropout,
            rope_theta=self.rope_theta,
            use_gqa=self.use_gqa,
            kv_groups=self.kv_groups,
        )

    @model_validator(mode="after")
    def _talker_sizes_fit(self) -> Self:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f'key "d_model": expected an even multiple of n_heads {self.n_heads}, found {self.d_model}'
            )
        if self.use_gqa and self.n_heads % self.kv_groups:
            raise ValueError(f'key "kv_groups": expected a divisor of n_heads {self.n_heads}, found {self.kv_groups}')
        return self


class VocoderArchitecture(Architecture):
    """The sizes of the vocoder, HiFi-GAN's generator with or without pulses to begin with, and of the log-mels that it
    reads."""

    # Log-mels: those of the codec
    sample_rate: int = Field(16000, ge=8000, le=192_000, description="Hz; recordings of other rates are resampled")
    n_mels: int = Field(80, ge=8, le=1_024, description="mel channels")
    n_fft: int = Field(1024, ge=16, le=65_536)
    win_length: int = Field(640, ge=16, le=65_536, description="samples of a mel frame's window")
    hop_length: int = Field(160, ge=4, le=65_536, description="samples from one mel frame to the next")

    # Generator
    upsample_rates: list[ListedSize] = Field([5, 4, 4, 2], description="factors whose product is hop_length")
    upsample_kernel_sizes: list[ListedSize] | None = Field(
        None, description="kernel sizes; default: twice each rate, plus 1 if the rate is odd"
    )
    upsample_initial_channel: int = Field(512, ge=2, le=65_536, description="channels, halved by every upsampling")
    resblock_kernel_sizes: list[ListedSize] = [3, 7, 11]
    resblock_dilation_sizes: list[list[ListedSize]] = [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    harmonic_source: bool = Field(
        False,
        description="start from pulses at the pitch read in the log-mels, for voices: clear after minutes of training; "
        "transformers knows no such vocoder",
    )

    @property
    def kernel_sizes(self) -> list[int]:
        """Kernel sizes of the upsampling: as given, or by default about two inputs wide."""
        return self.upsample_kernel_sizes or [2 * rate + rate % 2 for rate in self.upsample_rates]

    @model_validator(mode="after")
    def _generator_sizes_fit(self) -> Self:
        rates, hop, stages = self.upsample_rates, self.hop_length, len(self.upsample_rates)
        if not rates or min(rates) < 1 or math.prod(rates) != hop:
            raise ValueError(f'key "upsample_rates": expected numbers whose product is hop_length {hop}, found {rates}')
        fits = [
            kernel >= rate and (kernel - rate) % 2 == 0 for kernel, rate in zip(self.kernel_sizes, rates, strict=False)
        ]
        if len(self.kernel_sizes) != stages or not all(fits):
            raise ValueError(
                f'key "upsample_kernel_sizes": expected {stages} numbers, each larger than its rate in {rates} by an '
                f"even number, found {self.upsample_kernel_sizes}"
            )
        if self.upsample_initial_channel % 2**stages:
            raise ValueError(
                f'key "upsample_initial_channel": expected a multiple of {2**stages} (halved {stages} times), '
                f"found {self.upsample_initial_channel}"
            )
        kernels, dilations = self.resblock_kernel_sizes, self.resblock_dilation_sizes
        if not kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f'key "resblock_kernel_sizes": expected odd numbers, found {kernels}')
        if len(dilations) != len(kernels) or any(not row or min(row) < 1 for row in dilations):
            raise ValueError(
                f'key "resblock_dilation_sizes": expected {len(kernels)} lists (one for each of '
                f"resblock_kernel_sizes) of positive numbers, found {dilations}"
            )
        if not hop <= self.win_length <= self.n_fft:
            raise ValueError(
                f'key "win_length": expected hop_length {hop} to n_fft {self.n_fft}, found {self.win_length}'
            )
        if self.harmonic_source and self.win_length < 2 * hop:  # its frames are added up
            raise ValueError(
                f'key "win_length": expected at least {2 * hop}, twice hop_length, for harmonic_source, '
                f"found {self.win_length}"
            )
        return self


class DiscriminatorArchitecture(Architecture):
    """The sizes of the discriminators that the vocoder is trained against."""

    mpd_periods: list[ListedSize] = Field([2, 3, 5, 7, 11], description="periods in samples, one discriminator each")
    msd_num_scales: int = Field(
        3, ge=0, le=16, description="number of discriminators of the waveform at full, half, quarter ... rate"
    )
    disc_channels: int = Field(
        32, le=65_536, description="channels of a period discriminator's first layer; the other layers scale with it"
    )

    @model_validator(mode="after")
    def _discriminator_sizes_fit(self) -> Self:
        if any(period < 1 for period in self.mpd_periods):
            raise ValueError(f'key "mpd_periods": expected positive numbers, found {self.mpd_periods}')
        if not self.mpd_periods and not self.msd_num_scales:
            raise ValueError('key "mpd_periods": expected a period, or msd_num_scales above 0, found neither')
        if self.disc_channels < 4 or self.disc_channels % 4:
            raise ValueError(f'key "disc_channels": expected a multiple of 4, found {self.disc_channels}')
        return self
