"""JSON configs, typed: what each key means, its default, and whether a resumed run may change it.

A config file is flat JSON, one per stage. Unknown keys, wrong types and impossible sizes are refused in one
line that names the file, the key, what was expected and what was found. Defaults stand here and nowhere else:
code reads ``config.lr``.
"""

import difflib
import json
import math
import os
from collections.abc import Container
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from omni.errors import UserError
from omni.media import quoted
from omni.records import other_encoding

ConfigType = TypeVar("ConfigType", bound="StageConfig")
ModelType = TypeVar("ModelType", bound=BaseModel)

ListedSize = Annotated[int, Field(le=65_536)]

_TEXT_HINT = "python scripts/make_synthetic_datasets.py writes data/text/tiny_corpus.txt; any UTF-8 text will do"
_ASR_HINT = "python scripts/make_synthetic_datasets.py writes data/audio/asr.csv"
_PICTURES_HINT = "python scripts/make_synthetic_datasets.py writes data/images/annotations.json"
_TTS_HINT = "python scripts/make_synthetic_datasets.py writes data/audio/tts.csv"
_OCR_HINT = "python scripts/make_synthetic_datasets.py writes data/ocr/ocr.csv"


def free(default=..., **constraints):
    """A key that may change between two runs of the same training without making it another training."""
    return Field(default, json_schema_extra={"free": True}, **constraints)


def input_file(default=..., *, hint: str = "", **constraints):
    """A path that must exist when the config is loaded; free to change, since the data's digest is compared anyway."""
    return Field(default, json_schema_extra={"free": True, "file": True, "hint": hint}, **constraints)


class StageConfig(BaseModel):
    """The keys that every stage has."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    # Keys of older config files that no longer do anything: accepted, with this explanation, once.
    OBSOLETE: ClassVar[dict[str, str]] = {
        "shuffle_buffer_size": "every epoch is a full permutation of the rows, no buffer is needed",
    }

    about: str | list[str] = free("", description="free text: what this config is for, what it costs")
    save_dir: str = free(min_length=1, description="folder for checkpoints, logs and the final file")
    cache_dir: str | None = free(None, description="folder for prepared data; default: beside the data file")
    seed: int = Field(42, ge=0, lt=2**32)

    # Optimisation
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: kernels of linear layers and convolutions by Muon, all else by AdamW"
    )
    lr: float = free(3e-4, gt=0, description="peak learning rate, after warm-up")
    min_lr_ratio: float = free(0.1, ge=0, le=1, description="learning rate at max_steps, as a share of lr")
    wd: float = free(0.1, ge=0, description="weight decay, of kernels and embeddings only")
    warmup_steps: int = free(100, ge=0)
    max_steps: int | None = free(None, ge=1, description="optimizer updates; wins over max_epochs")
    max_epochs: int | None = free(None, ge=1, description="used when max_steps is absent")
    batch_size: int = Field(8, ge=1, le=1_048_576, description="samples per forward pass and process")
    gradient_accumulation_steps: int = Field(1, ge=1, le=1_048_576)
    samples_per_step: int | None = free(
        None,
        ge=1,
        le=1 << 40,
        description="of all processes together; wins over gradient_accumulation_steps, which follows from it",
    )
    max_grad_norm: float = free(1.0, gt=0)
    max_nonfinite_steps: int = free(10, ge=1, description="NaN or Inf losses in a row that stop the run")
    max_bad_rows: int = free(100, ge=0, description="unreadable rows of the data, each replaced, that stop the run")

    # Speed
    use_amp: bool = free(True, description="bf16 where the hardware has it, fp16 with a scaler on older GPUs")
    use_compile: bool = free(False, description="torch.compile, in place")
    use_flash: bool = free(True, description="fused attention; false: the plain maths")
    deterministic: bool = free(True, description="same bits in every run on a GPU, for about a tenth of its speed")
    num_workers: int = free(2, ge=0, le=1_024, description="data loader processes")
    loader_timeout_s: int = free(
        600, ge=1, le=1_000_000, description="seconds without a batch from them that stop the run"
    )
    drop_last: bool = Field(True, description="leave out the last, incomplete step of an epoch")

    # Reporting
    print_freq: int = free(50, ge=1, description="steps between two log lines")
    val_split: float = Field(0.05, ge=0, lt=1, description="share of the rows held out for validation")
    val_freq: int = free(500, ge=1, description="steps between two validations")
    checkpoint_freq: int = free(1000, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = free(2, ge=2, description="step files kept, beside the best one")

    @model_validator(mode="after")
    def _has_a_duration(self) -> Self:
        if self.max_steps is None and self.max_epochs is None:
            raise ValueError('expected "max_steps" or "max_epochs", found neither')
        return self

    @classmethod
    def free_keys(cls) -> set[str]:
        """Keys that a resumed run may change."""
        return {name for name, field in cls.model_fields.items() if (field.json_schema_extra or {}).get("free")}

    def check_files(self) -> None:
        """
        Raises:
            UserError: a file that the config names is not there.
        """
        for name, field in type(self).model_fields.items():
            extra, path = field.json_schema_extra or {}, getattr(self, name)
            if extra.get("file") and path is not None and not os.path.isfile(path):
                hint = f" ({extra['hint']})" if extra["hint"] else ""
                found = f"none at {path}" if path else "an empty name; null is for no file"
                raise UserError(f'key "{name}": expected a file, found {found}{hint}')


class ThinkerArchitecture(BaseModel):
    """The sizes of the Thinker: Qwen3 (``use_moe`` false) or Qwen3-MoE (true)."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    vocab_size: int = Field(8192, ge=272, le=1_048_576, description="upper bound; a small corpus may fill less")
    ctx_len: int = Field(512, ge=8, le=1_048_576, description="tokens per training sequence, and the longest context")
    n_layers: int = Field(8, ge=1, le=1000)
    d_model: int = Field(512, ge=8, le=1_000_000)
    n_heads: int = Field(8, ge=1, le=1_024)
    head_dim: int | None = Field(None, ge=2, le=16_384, description="default: d_model / n_heads")
    d_ff: int = Field(1536, ge=8, le=1_000_000, description="inner width of the SwiGLU MLP")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the residual branches, in training only")
    rope_theta: float = Field(10000.0, gt=0)
    tie_embeddings: bool = Field(True, description="the output head is the input embedding")
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


class TextConfig(ThinkerArchitecture, StageConfig):
    """Stage A, ``train_text.py``."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "use_swiglu": "the MLP is always SwiGLU, as in Qwen3",
    }

    train_text: str = input_file(hint=_TEXT_HINT, description="UTF-8 corpus, one sample a line")
    val_text: str | None = input_file(
        None, hint=_TEXT_HINT, description="held-out corpus; default: val_split of train_text's lines"
    )
    tokenizer_path: str | None = input_file(None, description="tokenizer.json to use; default: trained into save_dir")
    context_weight: float = Field(
        1.0, gt=0, le=1, description="weight, in training, of what is not an assistant's answer, beside 1 for answers"
    )


class AudioEncoderArchitecture(BaseModel):
    """The sizes of the audio encoder, a FastConformer, and of the log-mels that it reads."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    sample_rate: int = Field(16000, ge=8000, le=192_000, description="Hz; recordings of other rates are resampled")
    mel_bins: int = Field(80, ge=8, le=1_024, description="mel channels")
    frame_hop: int = Field(160, ge=16, le=65_536, description="samples from one mel frame to the next")
    frame_win: int = Field(640, ge=16, le=65_536, description="samples of a mel frame's window")
    downsample_time: int = Field(8, description="mel frames per output frame: 8 or 4")
    subsampling_channels: int = Field(
        128, ge=1, le=1_000_000, description="channels of the convolutions that shorten the time"
    )
    n_layers: int = Field(8, ge=1, le=1000)
    d_model: int = Field(256, ge=8, le=1_000_000)
    n_heads: int = Field(4, ge=1, le=1_024)
    d_ff: int = Field(1024, ge=8, le=1_000_000, description="inner width of the feed-forward modules")
    conv_kernel_size: int = Field(9, ge=1, le=1_024, description="width of the depthwise convolution, in output frames")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the residual branches, in training only")
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


class AudioEncoderConfig(AudioEncoderArchitecture, StageConfig):
    """Stage B, ``train_audio_enc.py``."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "target_hz": "output frames per second follow from sample_rate, frame_hop and downsample_time",
        "max_text_len": "a text is as long as its recording allows",
    }

    train_csv: str = input_file(hint=_ASR_HINT, description="manifest with the columns wav and text")
    val_csv: str | None = input_file(
        None, hint=_ASR_HINT, description="held-out manifest; default: val_split of train_csv's texts"
    )
    val_voices_csv: str | None = input_file(
        None, hint=_ASR_HINT, description="a second held-out manifest, of voices that are not in training"
    )
    max_mel_length: int = Field(
        2048,
        ge=8,
        le=16_777_216,
        description="mel frames (2048: 20 s); longer rows are left out, use_compile pads up to it",
    )
    spec_time_masks: int = Field(2, ge=0, description="SpecAugment: bands of time blanked out in each utterance")
    spec_time_width: int = Field(40, ge=0, description="their greatest width, in mel frames")
    spec_freq_masks: int = Field(2, ge=0, description="SpecAugment: bands of frequency")
    spec_freq_width: int = Field(15, ge=0, description="their greatest width, in mel channels")
    speed_perturb: float = Field(0.0, ge=0, le=0.5, description="0.1: utterances at 0.9, 1 or 1.1 times their speed")

    @model_validator(mode="after")
    def _voices_need_a_comparison(self) -> Self:
        if self.val_voices_csv and not self.val_csv and not self.val_split:
            raise ValueError('key "val_voices_csv": expected val_csv or val_split beside it, found neither')
        return self


class SpeechFrames(BaseModel):
    """The log-mels of stage D, and the times that it reckons in: mel frames, slots, codes."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

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
    def slots_per_code(self) -> int:
        """Slots are what the durations of a text's bytes are counted in: whole mel frames, a quarter of a code's time
        (20 of 80 ms) or as little less as divides it evenly."""
        frames = self.frames_per_code
        return next(slots for slots in range(min(4, frames), frames + 1) if frames % slots == 0)

    @model_validator(mode="after")
    def _frames_fit(self) -> Self:
        if self.frame_ms * self.sample_rate % (1000 * self.frame_hop):
            hop_ms = 1000 * self.frame_hop / self.sample_rate
            raise ValueError(f'key "frame_ms": expected a multiple of {hop_ms:g} (frame_hop), found {self.frame_ms}')
        if not self.frame_hop <= self.frame_win <= self.n_fft:
            sizes = f"{self.frame_hop}, {self.frame_win} and {self.n_fft}"
            raise ValueError(f'key "frame_win": expected frame_hop <= frame_win <= n_fft, found {sizes}')
        return self


class CodecArchitecture(SpeechFrames):
    """The sizes of the speech codec."""

    codebooks: int = Field(8, ge=1, le=64, description="codes per frame, each finer than the one before")
    codebook_size: int = Field(256, ge=2, le=65_536)
    codec_d_model: int = Field(512, ge=8, le=1_000_000)
    codec_d_ff: int = Field(1536, ge=8, le=1_000_000, description="inner width of the codec's blocks")
    codec_layers: int = Field(6, ge=1, le=1000, description="blocks of the encoder, and of the decoder")
    codec_kernel_size: int = Field(5, ge=1, le=1_024, description="width of their convolutions, in frames of frame_ms")
    codec_smoother_layers: int = Field(2, ge=0, le=1000, description="blocks after the decoder, at the mels' own rate")
    codec_latent: int = Field(64, ge=1, le=1_000_000, description="width of what is quantised")
    quantizer_dropout: float = Field(0.25, ge=0, le=1, description="share of clips coded with fewer codebooks")
    ema_decay: float = Field(0.98, gt=0, lt=1, description="of the codebooks' moving averages, per step")

    @model_validator(mode="after")
    def _codec_sizes_fit(self) -> Self:
        if self.codec_kernel_size % 2 == 0:
            raise ValueError(f'key "codec_kernel_size": expected an odd number, found {self.codec_kernel_size}')
        return self


class SpeechManifest(BaseModel):
    """What all parts of stage D learn from."""

    tts_csv: str = input_file(hint=_TTS_HINT, description="manifest with the columns text and wav, one voice")
    val_csv: str | None = input_file(
        None, hint=_TTS_HINT, description="held-out manifest; default: val_split of tts_csv's texts"
    )
    max_mel_length: int = Field(
        2048,
        ge=1,
        le=16_777_216,
        description="longest recording in frames of frame_ms (2048: 164 s); longer rows are left out",
    )


class CodecConfig(CodecArchitecture, SpeechManifest, StageConfig):
    """The first part of stage D: what ``rvq_codec.pt`` was trained with. See ``TalkerConfig.codec``."""

    commitment_weight: float = Field(0.25, ge=0, description="of the loss that pulls latents to their codes")


class AlignerArchitecture(SpeechFrames):
    """The sizes of the aligner."""

    aligner_d_model: int = Field(128, ge=8, le=1_000_000)
    aligner_layers: int = Field(
        2, ge=0, le=1000, description="convolutions over the text, and over the speech; one hears 5 bytes or slots"
    )


class AlignerConfig(AlignerArchitecture, SpeechManifest, StageConfig):
    """The second part of stage D: what ``aligner.pt`` was trained with. See ``TalkerConfig.aligner``."""


class TalkerArchitecture(BaseModel):
    """The sizes of the talker."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    d_model: int = Field(512, ge=8, le=1_000_000)
    n_layers: int = Field(8, ge=1, le=1000)
    n_heads: int = Field(8, ge=1, le=1_024)
    d_ff: int = Field(1536, ge=8, le=1_000_000, description="inner width of the SwiGLU MLP")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the residual branches, in training only")
    rope_theta: float = Field(10000.0, gt=0)
    use_gqa: bool = Field(False, description="grouped-query attention with kv_groups key/value heads")
    kv_groups: int = Field(2, ge=1, le=1_024, description="key/value heads under use_gqa")
    text_layers: int = Field(3, ge=0, le=1000, description="convolutions over the bytes of the text")
    depth_d_model: int = Field(
        256, ge=8, le=1_000_000, description="width of what chooses a frame's codes one after the other"
    )
    depth_layers: int = Field(2, ge=1, le=1000)
    depth_d_ff: int = Field(768, ge=8, le=1_000_000)
    thinker_d_model: int | None = Field(
        None, ge=8, le=1_000_000, description="width of the Thinker whose states may be heard"
    )

    @property
    def blocks(self) -> ThinkerArchitecture:
        """The sizes of the blocks as ``omni.layers`` wants them."""
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


class TalkerConfig(TalkerArchitecture, CodecArchitecture, AlignerArchitecture, SpeechManifest, StageConfig):
    """Stage D, ``train_talker.py``: the codec first, then the aligner, then the talker."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "use_swiglu": "the MLP is always SwiGLU, as in Qwen3",
    }

    codec_ckpt: str | None = free(
        None, description="folder with an rvq_codec.pt, and perhaps an aligner.pt, to use; default: they are trained"
    )
    codec_steps: int = free(5000, ge=1, description="optimizer updates of the codec, before those of the talker")
    codec_lr: float = free(1e-3, gt=0, description="the codec's peak learning rate")
    codec_warmup_steps: int = free(100, ge=0)
    codec_batch_size: int = Field(16, ge=1, le=1_048_576)
    commitment_weight: float = Field(0.25, ge=0, description="of the loss that pulls latents to their codes")
    aligner_steps: int = free(2000, ge=1, description="optimizer updates of the aligner")
    aligner_lr: float = free(2e-3, gt=0, description="its peak learning rate")
    aligner_warmup_steps: int = free(50, ge=0)
    aligner_batch_size: int = Field(16, ge=1, le=1_048_576)
    frame_dropout: float = Field(0.25, ge=0, lt=1, description="share of the frames hidden from the talker in training")
    duration_weight: float = Field(0.3, ge=0, description="of the loss of the durations, beside that of the codes")
    audio_ckpt: str | None = free(None, description="folder of stage B, whose model listens to what is said")
    vocoder_ckpt: str | None = free(None, description="folder of stage F; default: Griffin-Lim")
    val_samples: int = free(2, ge=0, description="of those that are written to save_dir/samples, sound and picture")
    val_sentences: int = free(100, ge=1, description="held-out sentences said in each validation, and listened to")

    @property
    def codec(self) -> CodecConfig:
        return self._part(CodecConfig, "codec")

    @property
    def aligner(self) -> AlignerConfig:
        return self._part(AlignerConfig, "aligner")

    def _part(self, cls: type[ConfigType], name: str) -> ConfigType:
        """The config of one part of the stage: ``<name>_lr`` is its ``lr``, and so on."""
        keys = {key: getattr(self, key) for key in cls.model_fields}
        own = {"lr": "lr", "warmup_steps": "warmup_steps", "max_steps": "steps", "batch_size": "batch_size"}
        return cls(**(keys | {key: getattr(self, f"{name}_{short}") for key, short in own.items()}))

    def check_files(self) -> None:
        super().check_files()
        for key, file, remedy in (
            ("codec_ckpt", "rvq_codec.pt", "Leave the key out to train a codec first"),
            ("audio_ckpt", "audio_enc.pt", "Train stage B first, or leave the key out: no word error rates then"),
            ("vocoder_ckpt", "hifigan.pt", "Train stage F first, or leave the key out: Griffin-Lim then"),
        ):
            folder = getattr(self, key)
            if folder is not None and not os.path.isfile(os.path.join(folder, file)):
                raise UserError(f'key "{key}": expected a folder with {file}, found none at {folder}. {remedy}')


class VisionConfig(StageConfig):
    """Stage C, ``train_vision.py``: a ViT, and what reads the captions that it is trained against."""

    train_manifest: str = input_file(
        hint=_PICTURES_HINT, description="JSON, JSONL or CSV with image and caption; several rows may share an image"
    )
    val_manifest: str | None = input_file(
        None, hint=_PICTURES_HINT, description="held-out manifest; default: val_split of train_manifest's images"
    )
    image_root: str | None = free(None, description="folder of the images; default: that of the manifest")

    # The ViT
    img_size: int = Field(224, ge=8, le=16_384, description="pixels; pictures are stretched to a square of this side")
    patch: int = Field(16, ge=1, le=4_096, description="side of a patch in pixels")
    d_model: int = Field(384, ge=8, le=1_000_000)
    n_layers: int = Field(8, ge=1, le=1000)
    n_heads: int = Field(6, ge=1, le=1_024)
    d_ff: int = Field(1536, ge=8, le=1_000_000)
    dropout: float = Field(0.0, ge=0, lt=1, description="on the residual branches of both towers, in training only")

    # What it is compared with
    embed_dim: int = Field(
        256, ge=2, le=1_000_000, description="width of the space in which pictures and captions meet"
    )
    temperature: float = Field(0.07, ge=0.01, le=1, description="of the contrastive loss, to begin with; it is learned")
    ctx_len: int = Field(
        64, ge=8, le=1_048_576, description="tokens of a caption, its end included; longer ones are cut"
    )
    use_thinker_for_text: bool = Field(False, description="the trained Thinker reads the captions, and stays as it is")
    thinker_ckpt: str | None = free(None, description="folder of stage A, for use_thinker_for_text")
    vocab_size: int = Field(8192, ge=272, le=1_048_576, description="upper bound for the captions' own tokenizer")
    text_d_model: int = Field(
        256, ge=8, le=1_000_000, description="width of the text tower; no effect under use_thinker_for_text"
    )
    text_layers: int = Field(4, ge=1, le=1000)
    text_heads: int = Field(4, ge=1, le=1_024)
    text_d_ff: int = Field(768, ge=8, le=1_000_000, description="inner width of the SwiGLU MLP")

    word_loss: float = Field(1.0, ge=0, description="weight of naming the caption's words, beside the contrast")
    augment: bool = Field(False, description="shift the pictures a little and vary their brightness")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.img_size % self.patch:
            raise ValueError(f'key "img_size": expected a multiple of patch {self.patch}, found {self.img_size}')
        if self.d_model % self.n_heads:
            raise ValueError(f'key "d_model": expected a multiple of n_heads {self.n_heads}, found {self.d_model}')
        if self.use_thinker_for_text and self.thinker_ckpt is None:
            raise ValueError('key "thinker_ckpt": expected the folder of stage A for use_thinker_for_text, found none')
        if not self.use_thinker_for_text:
            if self.text_d_model % self.text_heads:
                heads, width = self.text_heads, self.text_d_model
                raise ValueError(f'key "text_d_model": expected a multiple of text_heads {heads}, found {width}')
            if self.text_d_model // self.text_heads % 2:
                width = self.text_d_model // self.text_heads
                raise ValueError(f'key "text_d_model": expected an even width per head (rotary pairs), found {width}')
        return self

    def check_files(self) -> None:
        super().check_files()
        if self.batch_size < 2:  # only now: a model that was trained so can be loaded
            raise UserError('key "batch_size": expected at least 2 captions to contrast a picture with, found 1')
        if self.image_root is not None and not os.path.isdir(self.image_root):
            raise UserError(f'key "image_root": expected a folder, found none at {self.image_root}')
        if self.use_thinker_for_text and not os.path.isfile(os.path.join(self.thinker_ckpt, "thinker.pt")):
            raise UserError(
                f'key "thinker_ckpt": expected a folder with thinker.pt, found none at {self.thinker_ckpt}. '
                "Train stage A first (train_text.py)"
            )

    @property
    def text_tower(self) -> ThinkerArchitecture:
        """The sizes of the text tower that is trained here."""
        return ThinkerArchitecture(
            vocab_size=self.vocab_size,
            ctx_len=self.ctx_len,
            n_layers=self.text_layers,
            d_model=self.text_d_model,
            n_heads=self.text_heads,
            d_ff=self.text_d_ff,
            dropout=self.dropout,
        )


class OcrArchitecture(BaseModel):
    """The sizes of the OCR model: ViT encoder, character decoder."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    img_size: int = Field(
        224, ge=8, le=16_384, description="side of the picture in pixels, where height or width is not given"
    )
    img_height: int | None = Field(None, ge=8, le=16_384, description="default: img_size")
    img_width: int | None = Field(None, ge=8, le=16_384, description="default: img_size")
    patch: int = Field(16, ge=1, le=4_096, description="side of a patch in pixels, where height or width is not given")
    patch_height: int | None = Field(None, ge=1, le=4_096, description="default: patch")
    patch_width: int | None = Field(None, ge=1, le=4_096, description="default: patch")
    vision_d_model: int = Field(256, ge=8, le=1_000_000)
    vision_layers: int = Field(6, ge=1, le=1000)
    vision_heads: int = Field(4, ge=1, le=1_024)
    vision_d_ff: int = Field(1024, ge=8, le=1_000_000)
    conv_stem: bool = Field(False, description="three small convolutions make the patches' tokens, not a linear map")
    decoder_d_model: int = Field(256, ge=8, le=1_000_000)
    decoder_layers: int = Field(4, ge=1, le=1000)
    decoder_heads: int = Field(4, ge=1, le=1_024)
    decoder_d_ff: int = Field(1024, ge=8, le=1_000_000, description="inner width of the SwiGLU MLP")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the residual branches, in training only")
    max_text_length: int = Field(
        256, ge=1, le=65_536, description="characters; a row with a longer text is left out and named"
    )
    ctc_weight: float = Field(0.0, ge=0, description="of an auxiliary CTC loss on the columns of patches; 0: none")
    characters: str | None = Field(
        None, min_length=1, description="what the model can write; default: the characters of the training texts"
    )

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
    def decoder(self) -> ThinkerArchitecture:
        """The decoder's sizes as ``omni.layers`` wants them."""
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


class OcrConfig(OcrArchitecture, StageConfig):
    """Stage G, ``train_ocr.py``."""

    train_csv: str = input_file(hint=_OCR_HINT, description="CSV with the columns image and text")
    val_csv: str | None = input_file(
        None, hint=_OCR_HINT, description="held-out CSV; default: val_split of train_csv's rows"
    )
    image_root: str | None = free(None, description="folder of the images; default: that of the CSV")


class VocoderConfig(StageConfig):
    """Stage F, ``train_vocoder.py``: the generator of HiFi-GAN, and the discriminators that it is trained against."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "lr": "lr_g and lr_d are the peak learning rates",
    }

    train_csv: str = input_file("data/audio/tts.csv", hint=_TTS_HINT, description="manifest with the column wav")
    val_csv: str | None = input_file(
        None, hint=_TTS_HINT, description="held-out manifest; default: val_split of train_csv's rows"
    )
    val_samples: int = free(2, ge=0, description="clips that are written to save_dir/samples, sound and picture")
    val_clips: int = free(32, ge=1, description="held-out clips that are validated on, evenly spaced in their file")
    max_clip_s: float = free(60.0, gt=0, description="seconds; a longer recording is a bad row")
    codec_ckpt: str | None = free(
        None, description="folder of stage D: learn to vocode what its codec makes of the log-mels"
    )

    # Log-mels: those of the codec
    sample_rate: int = Field(16000, ge=8000, le=192_000, description="Hz; recordings of other rates are resampled")
    n_mels: int = Field(80, ge=8, le=1_024, description="mel channels")
    n_fft: int = Field(1024, ge=16, le=65_536)
    win_length: int = Field(640, ge=16, le=65_536, description="samples of a mel frame's window")
    hop_length: int = Field(160, ge=4, le=65_536, description="samples from one mel frame to the next")

    # Generator
    upsample_rates: list[ListedSize] = Field([5, 4, 4, 2], description="their product is hop_length")
    upsample_kernel_sizes: list[ListedSize] | None = Field(
        None, description="default: twice the rates, made even with them"
    )
    upsample_initial_channel: int = Field(512, ge=2, le=65_536, description="halved by every upsampling")
    resblock_kernel_sizes: list[ListedSize] = [3, 7, 11]
    resblock_dilation_sizes: list[list[ListedSize]] = [[1, 3, 5], [1, 3, 5], [1, 3, 5]]

    # Discriminators
    mpd_periods: list[ListedSize] = Field([2, 3, 5, 7, 11], description="samples; one discriminator for each")
    msd_num_scales: int = Field(
        3, ge=0, le=16, description="discriminators of the waveform at full, half, quarter ... rate"
    )
    disc_channels: int = Field(
        32, le=65_536, description="of the first layer of a period's discriminator; the others follow it"
    )

    # Optimisation
    segment_samples: int = Field(
        8000, le=16_777_216, description="length of the random segments trained on, a multiple of hop_length"
    )
    lr_g: float = free(2e-4, gt=0, description="peak learning rate of the generator")
    lr_d: float = free(2e-4, gt=0, description="peak learning rate of the discriminators")
    wd: float = free(0.01, ge=0, description="weight decay")
    max_grad_norm: float = free(1000.0, gt=0)
    lambda_mel: float = free(45.0, ge=0, description="weight of the mean difference of the log-mels")
    lambda_fm: float = free(2.0, ge=0, description="weight of the difference in the discriminators' features")
    lambda_adv: float = free(1.0, ge=0, description="weight of deceiving the discriminators")
    adv_start_step: int = free(
        0, ge=0, description="until this step the log-mels alone teach, and no discriminator runs"
    )

    @property
    def kernel_sizes(self) -> list[int]:
        """Of the upsampling: as given, or by default about two inputs wide."""
        return self.upsample_kernel_sizes or [2 * rate + rate % 2 for rate in self.upsample_rates]

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
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
        if self.segment_samples % hop or self.segment_samples < self.win_length:
            raise ValueError(
                f'key "segment_samples": expected a multiple of hop_length {hop}, at least win_length '
                f"{self.win_length}, found {self.segment_samples}"
            )
        if any(period < 1 for period in self.mpd_periods):
            raise ValueError(f'key "mpd_periods": expected positive numbers, found {self.mpd_periods}')
        if not self.mpd_periods and not self.msd_num_scales:
            raise ValueError('key "mpd_periods": expected a period, or msd_num_scales above 0, found neither')
        if self.disc_channels < 4 or self.disc_channels % 4:
            raise ValueError(f'key "disc_channels": expected a multiple of 4, found {self.disc_channels}')
        return self

    def check_files(self) -> None:
        super().check_files()
        if self.codec_ckpt is not None and not os.path.isfile(os.path.join(self.codec_ckpt, "rvq_codec.pt")):
            raise UserError(
                f'key "codec_ckpt": expected a folder with rvq_codec.pt, found none at {self.codec_ckpt}. '
                "Train stage D first (train_talker.py)"
            )


class SftConfig(StageConfig):
    """Stage E, ``sft_omni.py``: the Thinker learns to answer about what it reads, hears and sees.

    The keys of the mix may also stand in an object ``sft_mix``; one at the top wins, so that ``--set`` can change it.
    """

    TASKS: ClassVar[tuple[str, ...]] = (
        "text", "image_question", "caption", "transcription", "spoken_question", "spoken_image_question", "sign",
        "spoken_answer", "conversation",
    )  # fmt: skip

    thinker_ckpt: str = free(min_length=1, description="folder of stage A")
    audio_ckpt: str | None = free(None, description="folder of stage B; required for recordings")
    vision_ckpt: str | None = free(None, description="folder of stage C; required for pictures")
    talker_ckpt: str | None = free(
        None, description="folder of stage D; required for speech_csv: its talker learns to hear the Thinker's states"
    )

    # The mix; held-out files: val_ and the same name, by default val_split of the rows
    text_path: str | None = input_file(
        None, hint=_TEXT_HINT, description="task text: the dialogues of a text file, else all of its lines"
    )
    val_text_path: str | None = input_file(None, hint=_TEXT_HINT)
    image_manifest: str | None = input_file(
        None, hint=_PICTURES_HINT, description="tasks caption and image_question: image, caption, perhaps questions"
    )
    val_image_manifest: str | None = input_file(None, hint=_PICTURES_HINT)
    image_root: str | None = free(None, description="folder of its images; default: that of the manifest")
    asr_csv: str | None = input_file(None, hint=_ASR_HINT, description="task transcription: columns wav and text")
    val_asr_csv: str | None = input_file(None, hint=_ASR_HINT)
    question_csv: str | None = input_file(
        None,
        hint=_ASR_HINT,
        description="task spoken_question: columns wav, text and answer; without answer, what omni/world.py knows. "
        "With image_manifest also spoken_image_question: recordings of the questions asked there",
    )
    val_question_csv: str | None = input_file(
        None, hint=_ASR_HINT, description="other recordings to validate on; val_split holds out texts all the same"
    )
    ocr_csv: str | None = input_file(None, hint=_OCR_HINT, description="task sign: columns image and text")
    val_ocr_csv: str | None = input_file(None, hint=_OCR_HINT)
    speech_csv: str | None = input_file(
        None, hint=_TTS_HINT, description="task spoken_answer: columns text and wav, in the talker's voice"
    )
    val_speech_csv: str | None = input_file(None, hint=_TTS_HINT)
    jsonl_path: str | None = input_file(
        None,
        description="task conversation: JSON or JSONL rows of messages or conversations, see omni/conversations.py",
    )
    val_jsonl_path: str | None = input_file(None)
    task_weights: dict[str, float] = Field(
        {}, description="share of a task among the samples, relative to the others; default 1, 0: leave it out"
    )
    prompt: str = Field("", description="system message before every conversation; empty: none")
    questions_per_picture: int = Field(3, ge=1, description="asked one after the other in one sample, at most")

    # Sizes
    ctx_len: int | None = Field(
        None, ge=8, le=1_048_576, description="positions of a sample; default: the Thinker's ctx_len"
    )
    proj_d_ff: int = Field(512, ge=8, le=1_000_000, description="inner width of the projections into the Thinker")
    drop_blanks: bool = Field(True, description="leave out audio frames in which its CTC head hears nothing new")
    image_stack: int = Field(1, ge=1, le=64, description="side of the square of neighbouring patches in one position")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the Thinker's residual branches, in training only")
    freeze_encoders: bool = Field(True, description="leave audio and vision encoder as they are")
    keep_features: bool = Field(
        False,
        description="compute what frozen encoders make of each file once, at the start, and keep it in save_dir; "
        "2 bytes a value: 17 kB for a picture and 20 kB for a second of speech with the demo's encoders",
    )
    spelling_weight: float = Field(
        1.0, ge=0, description="of a CTC loss that draws the positions of a recording to the tokens of its text"
    )
    parts: dict[str, dict[str, int | float | bool | str | None]] | None = Field(
        None, description="the sizes of Thinker and encoders: filled in by the script, from their checkpoints"
    )
    origins: dict[str, str] | None = free(
        None, description="SHA-256 of the weights that each part began with: likewise"
    )

    # Validation
    val_items: int = free(100, ge=1, description="held-out items of each task that are answered, evenly spaced")
    max_answer_tokens: int = free(96, ge=1, description="longest answer in validation")

    @model_validator(mode="before")
    @classmethod
    def _unpack_mix(cls, raw):
        if not isinstance(raw, dict) or "sft_mix" not in raw:
            return raw
        mix = raw["sft_mix"]
        if not isinstance(mix, dict):
            raise ValueError(f'key "sft_mix": expected an object, found {json.dumps(mix, default=str)}')
        return mix | {key: value for key, value in raw.items() if key != "sft_mix"}

    @model_validator(mode="after")
    def _mix_fits(self) -> Self:
        sources = [self.text_path, self.image_manifest, self.asr_csv, self.question_csv, self.ocr_csv, self.jsonl_path]
        if not any([*sources, self.speech_csv]):
            raise ValueError('expected data: "text_path", "image_manifest", "asr_csv" or another, found none')
        for task, weight in self.task_weights.items():
            if task not in self.TASKS:
                raise ValueError(f'key "task_weights": expected tasks of {", ".join(self.TASKS)}, found "{task}"')
            if weight < 0:
                raise ValueError(f'key "task_weights": expected at least 0, found {weight} for {task}')
        for key, stage, needed in (
            ("audio_ckpt", "B", {"asr_csv": self.asr_csv, "question_csv": self.question_csv}),
            ("vision_ckpt", "C", {"image_manifest": self.image_manifest, "ocr_csv": self.ocr_csv}),
            ("talker_ckpt", "D", {"speech_csv": self.speech_csv}),
        ):
            source = next((name for name, path in needed.items() if path), None)
            if source and getattr(self, key) is None:
                raise ValueError(f'key "{key}": expected the folder of stage {stage} for {source}, found none')
        for key, wrong in (("freeze_encoders", not self.freeze_encoders), ("jsonl_path", self.jsonl_path is not None)):
            if self.keep_features and wrong:
                raise ValueError(
                    f'key "keep_features": expected false beside "{key}": {json.dumps(getattr(self, key))}'
                )
        return self

    def check_files(self) -> None:
        super().check_files()
        if self.image_root is not None and not os.path.isdir(self.image_root):
            raise UserError(f'key "image_root": expected a folder, found none at {self.image_root}')
        for key, files, remedy in (
            ("thinker_ckpt", ("thinker.pt", "tokenizer.json"), "Train stage A first (train_text.py)"),
            ("audio_ckpt", ("audio_enc.pt",), "Train stage B first (train_audio_enc.py)"),
            ("vision_ckpt", ("vision.pt",), "Train stage C first (train_vision.py)"),
            ("talker_ckpt", ("talker.pt", "rvq_codec.pt", "aligner.pt"), "Train stage D first (train_talker.py)"),
        ):
            folder = getattr(self, key)
            for file in files if folder is not None else ():
                if not os.path.isfile(os.path.join(folder, file)):
                    raise UserError(f'key "{key}": expected a folder with {file}, found none at {folder}. {remedy}')


def sizes_of(cls: type[BaseModel], config: BaseModel) -> dict:
    """The keys of ``config`` that ``cls`` has, without those that say nothing about the weights: paths, printing."""
    free = {name for name, field in cls.model_fields.items() if (field.json_schema_extra or {}).get("free")}
    return {name: getattr(config, name) for name in cls.model_fields if name not in free}


def read_sizes(cls: type[ModelType], sizes: dict) -> ModelType:
    """The inverse of ``sizes_of``; what a stage's config must have beside the sizes, such as files, is "-".

    Raises:
        ValueError: they are not the sizes of such a part.
    """
    rest: dict = {}
    if issubclass(cls, StageConfig):
        rest = {name: "-" for name, field in cls.model_fields.items() if field.is_required()} | {"max_steps": 1}
    if cls is SftConfig:
        rest["text_path"] = "-"
    return cls.model_validate(rest | sizes)


def refuse_others(
    one: Path | str,
    sizes: dict,
    other: Path | str,
    other_sizes: dict,
    may_differ: Container[str] = (),
    what: str = "it does",
) -> None:
    """
    Raises:
        UserError: two things that must be of one make are not; the message names both and each difference.
    """
    found = [
        f"{key} {sizes[key]} here, {value} there"
        for key, value in other_sizes.items()
        if sizes.get(key) != value and key not in may_differ
    ]
    if found:
        raise UserError(f"{one}: {what} not fit to {other}: {', '.join(found)}")


def read_keys(path: str) -> dict:
    """The keys of a config file as they stand there.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8").lstrip("\ufeff"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}") from error
    except UnicodeDecodeError as error:
        found = other_encoding(error.object) or f"byte {error.object[error.start]:#x}"
        raise UserError(f"{path}: expected UTF-8 text, found {found}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg}, line {error.lineno} column {error.colno}") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: {str(error).partition(';')[0]}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object of keys, found {type(raw).__name__}")
    return raw


def load_config(cls: type[ConfigType], path: str, overrides: list[str] = ()) -> tuple[ConfigType, list[str]]:
    """Read ``path`` as ``cls``.

    Args:
        path: a JSON file.
        overrides: ``key=value`` strings from the shell; a value is JSON, or else taken as a string.

    Returns:
        The config, and the notices to log (keys without effect).

    Raises:
        UserError: one line with file, key, expected and found.
    """
    raw = read_keys(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: expected key=value")
        field = cls.model_fields.get(key)
        try:  # a text key takes the words as they are: save_dir=5 is a folder
            raw[key] = value if field and field.annotation is str else json.loads(value)
        except (ValueError, RecursionError):
            raw[key] = value
    notices = [f'{path}: key "{key}" has no effect: {cls.OBSOLETE[key]}' for key in raw if key in cls.OBSOLETE]
    try:
        config = cls.model_validate({k: v for k, v in raw.items() if k not in cls.OBSOLETE})
        config.check_files()
    except ValidationError as error:
        lines = [_describe(cls, detail) for detail in error.errors()]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UserError(f"{path}: {lines[0]}{more}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config, notices


def _describe(cls: type[StageConfig], detail: dict) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, [*cls.model_fields, *cls.OBSOLETE], n=1, cutoff=0.5)
        return f'unknown key "{quoted(key)}".' + (f' Did you mean "{near[0]}"?' if near else "")
    if detail["type"] == "missing":
        return f'key "{key}" is missing: {cls.model_fields[key].description or "required"}'
    if detail["type"] == "value_error":  # our own checks: the message is complete
        return str(detail["ctx"]["error"])
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    expected = expected.replace("String should have", "text of")
    try:
        found = json.dumps(detail["input"], ensure_ascii=False, default=str)
    except RecursionError:
        found = "a value nested too deeply"
    return f'key "{quoted(key.split(".")[0])}": expected {expected}, found {quoted(found)}'


def drift(cls: type[StageConfig], saved: dict, current: dict) -> tuple[list[str], list[str]]:
    """Compare a checkpoint's config with the present one.

    Returns:
        Two lists of ``key: old -> new`` lines: changes that make it another training, and harmless ones.
    """
    keys = [key for key in current if key in saved and saved[key] != current[key]]
    lines = {key: f"{key}: {json.dumps(saved[key])} -> {json.dumps(current[key])}" for key in keys}
    free_keys = cls.free_keys()
    return [lines[k] for k in keys if k not in free_keys], [lines[k] for k in keys if k in free_keys]
