"""The sizes of each model, validated. Configs have the same keys; checkpoints and exports store them."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Architecture(BaseModel):
    """The arguments of a model: its sizes, without paths or training settings."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @classmethod
    def of(cls, config: BaseModel, **known) -> Self:
        """The keys of ``config`` that belong to this architecture; ``known`` values, such as the size of a trained
        vocabulary, replace the config's."""
        return cls(**{name: getattr(config, name) for name in cls.model_fields if name not in known} | known)


class ThinkerArchitecture(Architecture):
    """The sizes of the Thinker: Qwen3 (``use_moe`` false) or Qwen3-MoE (true)."""

    vocab_size: int = Field(8192, ge=272, le=1_048_576, description="upper bound; a small corpus may fill less")
    ctx_len: int = Field(512, ge=8, le=1_048_576, description="tokens of training sequences and of the longest context")
    n_layers: int = Field(8, ge=1, le=1000)
    d_model: int = Field(512, ge=8, le=1_000_000)
    n_heads: int = Field(8, ge=1, le=1_024)
    head_dim: int | None = Field(None, ge=2, le=16_384, description="width of a head; default: d_model / n_heads")
    d_ff: int = Field(1536, ge=8, le=1_000_000, description="inner width of the SwiGLU MLP")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the residual branches, in training only")
    rope_theta: float = Field(10000.0, gt=0)
    tie_embeddings: bool = Field(True, description="input embedding serves as the output head too")
    use_gqa: bool = Field(False, description="grouped-query attention with kv_groups key/value heads")
    kv_groups: int = Field(2, ge=1, le=1_024, description="key/value heads under use_gqa")
    use_moe: bool = False
    num_experts: int = Field(8, ge=2, le=4_096)
    num_experts_per_tok: int = Field(2, ge=1, le=4_096)
    moe_d_ff: int | None = Field(None, ge=8, le=1_000_000, description="inner width of one expert; default: d_ff")
    router_aux_loss_coef: float = Field(0.01, ge=0, description="weight of the load-balancing loss")

    @property
    def n_kv_heads(self) -> int:
        return self.kv_groups if self.use_gqa else self.n_heads

    @property
    def d_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def d_expert(self) -> int:
        return self.moe_d_ff or self.d_ff

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f'key "d_model": expected a multiple of n_heads {self.n_heads}, found {self.d_model}')
        if self.d_head % 2:
            raise ValueError(f'key "head_dim": expected an even number (rotary pairs), found {self.d_head}')
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f'key "kv_groups": expected a divisor of n_heads {self.n_heads}, found {self.kv_groups}')
        if self.use_moe and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f'key "num_experts_per_tok": expected at most num_experts {self.num_experts}, '
                f"found {self.num_experts_per_tok}"
            )
        return self


class AudioEncoderArchitecture(Architecture):
    """The sizes of the audio encoder, a FastConformer, and of the log-mels that it reads."""

    sample_rate: int = Field(16000, ge=8000, le=192_000, description="Hz; recordings of other rates are resampled")
    mel_bins: int = Field(80, ge=8, le=1_024, description="mel channels")
    frame_hop: int = Field(160, ge=16, le=65_536, description="samples from one mel frame to the next")
    frame_win: int = Field(640, ge=16, le=65_536, description="samples of a mel frame's window")
    downsample_time: int = Field(8, description="mel frames per output frame: 8 or 4")
    subsampling_channels: int = Field(
        128, ge=1, le=1_000_000, description="channels of the convolutions that reduce the frame rate"
    )
    n_layers: int = Field(8, ge=1, le=1000)
    d_model: int = Field(256, ge=8, le=1_000_000)
    n_heads: int = Field(4, ge=1, le=1_024)
    d_ff: int = Field(1024, ge=8, le=1_000_000, description="inner width of the feed-forward modules")
    conv_kernel_size: int = Field(9, ge=1, le=1_024, description="width of the depthwise convolution, in output frames")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the residual branches, in training only")
    ctc_vocab_size: int = Field(
        512, ge=2, le=1_048_576, description="upper bound of the BPE vocabulary; few texts may fill less"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.downsample_time not in (4, 8):
            raise ValueError(f'key "downsample_time": expected 4 or 8, found {self.downsample_time}')
        if self.mel_bins % self.downsample_time:
            raise ValueError(
                f'key "mel_bins": expected a multiple of downsample_time {self.downsample_time}, found {self.mel_bins}'
            )
        if self.frame_win < self.frame_hop:
            raise ValueError(f'key "frame_win": expected at least frame_hop {self.frame_hop}, found {self.frame_win}')
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f'key "d_model": expected an even multiple of n_heads {self.n_heads}, found {self.d_model}'
            )
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f'key "conv_kernel_size": expected an odd number, found {self.conv_kernel_size}')
        return self


class VisionArchitecture(Architecture):
    """The sizes of the vision encoder, a ViT."""

    img_size: int = Field(224, ge=8, le=16_384, description="side in pixels of the square that pictures are resized to")
    patch: int = Field(16, ge=1, le=4_096, description="side of a patch in pixels")
    d_model: int = Field(384, ge=8, le=1_000_000)
    n_layers: int = Field(8, ge=1, le=1000)
    n_heads: int = Field(6, ge=1, le=1_024)
    d_ff: int = Field(1536, ge=8, le=1_000_000)
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on both towers' residual branches, in training only")

    @property
    def height(self) -> int:
        return self.img_size

    @property
    def width(self) -> int:
        return self.img_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.patch, self.patch

    @model_validator(mode="after")
    def _vit_sizes_fit(self) -> Self:
        if self.img_size % self.patch:
            raise ValueError(f'key "img_size": expected a multiple of patch {self.patch}, found {self.img_size}')
        if self.d_model % self.n_heads:
            raise ValueError(f'key "d_model": expected a multiple of n_heads {self.n_heads}, found {self.d_model}')
        return self


class RectangularVisionArchitecture(VisionArchitecture):
    """The sizes of a ViT whose pictures and patches need not be square."""

    img_height: int
    img_width: int
    patch_height: int
    patch_width: int

    @property
    def height(self) -> int:
        return self.img_height

    @property
    def width(self) -> int:
        return self.img_width

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.patch_height, self.patch_width

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if self.height % self.patch_height or self.width % self.patch_width:
            patch = f"{self.patch_height} x {self.patch_width}"
            raise ValueError(f"{self.height} x {self.width} pixels do not divide into patches of {patch}")
        return self


class PictureTextArchitecture(Architecture):
    """The sizes of stage C's model: a ViT, a text tower, and the space of their embeddings."""

    vision: VisionArchitecture
    text: ThinkerArchitecture  # sizes of the text tower, or of the Thinker that replaces it
    uses_thinker: bool = Field(False, description="a frozen Thinker outside the model embeds the captions")
    embed_dim: int = Field(256, ge=2, le=1_000_000, description="width of the embeddings of pictures and captions")
    temperature: float = Field(0.07, ge=0.01, le=1, description="initial value of the learned temperature")
    word_head: bool = Field(True, description="head that predicts a caption's words from the patches")


class OcrArchitecture(Architecture):
    """The sizes of the OCR model: ViT encoder, character decoder."""

    img_size: int = Field(
        224, ge=8, le=16_384, description="side of the picture in pixels, unless height or width is given"
    )
    img_height: int | None = Field(None, ge=8, le=16_384, description="pixels; default: img_size")
    img_width: int | None = Field(None, ge=8, le=16_384, description="pixels; default: img_size")
    patch: int = Field(16, ge=1, le=4_096, description="side of a patch in pixels, unless height or width is given")
    patch_height: int | None = Field(None, ge=1, le=4_096, description="pixels; default: patch")
    patch_width: int | None = Field(None, ge=1, le=4_096, description="pixels; default: patch")
    vision_d_model: int = Field(256, ge=8, le=1_000_000)
    vision_layers: int = Field(6, ge=1, le=1000)
    vision_heads: int = Field(4, ge=1, le=1_024)
    vision_d_ff: int = Field(1024, ge=8, le=1_000_000)
    conv_stem: bool = Field(False, description="three small convolutions instead of a linear map of each patch")
    even_ink: bool = Field(
        False, description="the encoder sees ink on an empty ground, whatever their colours and contrast, not colours"
    )
    decoder_d_model: int = Field(256, ge=8, le=1_000_000)
    decoder_layers: int = Field(4, ge=1, le=1000)
    decoder_heads: int = Field(4, ge=1, le=1_024)
    decoder_d_ff: int = Field(1024, ge=8, le=1_000_000, description="inner width of the SwiGLU MLP")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the residual branches, in training only")
    max_text_length: int = Field(
        256, ge=1, le=65_536, description="characters of the longest text; rows with longer texts are left out"
    )
    ctc_weight: float = Field(0.0, ge=0, description="weight of a CTC loss on the columns of patches; 0: none")
    characters: str = Field(min_length=1, description="characters that the model can write")

    @property
    def height(self) -> int:
        return self.img_height or self.img_size

    @property
    def width(self) -> int:
        return self.img_width or self.img_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.patch_height or self.patch, self.patch_width or self.patch

    @property
    def encoder(self) -> VisionArchitecture:
        height, width = self.patch_size
        return RectangularVisionArchitecture(
            img_height=self.height,
            img_width=self.width,
            patch_height=height,
            patch_width=width,
            d_model=self.vision_d_model,
            n_layers=self.vision_layers,
            n_heads=self.vision_heads,
            d_ff=self.vision_d_ff,
            dropout=self.dropout,
        )

    @property
    def decoder(self) -> ThinkerArchitecture:
        """The sizes of the decoder for ``omni.models.layers``."""
        return ThinkerArchitecture(
            ctx_len=max(8, self.max_text_length + 1),
            n_layers=self.decoder_layers,
            d_model=self.decoder_d_model,
            n_heads=self.decoder_heads,
            d_ff=self.decoder_d_ff,
            dropout=self.dropout,
        )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        for side, pixels, patch in zip(("height", "width"), (self.height, self.width), self.patch_size, strict=True):
            if pixels % patch:
                raise ValueError(f'key "img_{side}": expected a multiple of {patch} (a patch), found {pixels}')
        for part in ("vision", "decoder"):
            d_model, heads = getattr(self, f"{part}_d_model"), getattr(self, f"{part}_heads")
            if d_model % heads:
                raise ValueError(f'key "{part}_d_model": expected a multiple of {part}_heads {heads}, found {d_model}')
        if self.conv_stem and self.vision_d_model % 16:
            raise ValueError(
                f'key "vision_d_model": expected a multiple of 16 (conv_stem), found {self.vision_d_model}'
            )
        if self.decoder_d_model // self.decoder_heads % 2:
            width = self.decoder_d_model // self.decoder_heads
            raise ValueError(f'key "decoder_d_model": expected an even width per head (rotary pairs), found {width}')
        return self
