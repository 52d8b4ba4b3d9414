"""JSON configs, typed: what each key means, its default, and whether a resumed run may change it.

A config file is flat JSON, one per stage. Unknown keys, wrong types and impossible sizes are refused in one
line that names the file, the key, what was expected and what was found. Defaults stand here and nowhere else:
code reads ``config.lr``.
"""

import difflib
import json
import os
from pathlib import Path
from typing import ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from omni.errors import UserError

ConfigType = TypeVar("ConfigType", bound="StageConfig")

_TEXT_HINT = "python scripts/make_synthetic_datasets.py writes data/text/tiny_corpus.txt; any UTF-8 text will do"
_ASR_HINT = "python scripts/make_synthetic_datasets.py writes data/audio/asr.csv"
_PICTURES_HINT = "python scripts/make_synthetic_datasets.py writes data/images/annotations.json"
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
    lr: float = free(3e-4, gt=0, description="peak learning rate, after warm-up")
    min_lr_ratio: float = free(0.1, ge=0, le=1, description="learning rate at max_steps, as a share of lr")
    wd: float = free(0.1, ge=0, description="AdamW weight decay, on matrices only")
    warmup_steps: int = free(100, ge=0)
    max_steps: int | None = free(None, ge=1, description="optimizer updates; wins over max_epochs")
    max_epochs: int | None = free(None, ge=1, description="used when max_steps is absent")
    batch_size: int = Field(8, ge=1, description="samples per forward pass and process")
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_grad_norm: float = free(1.0, gt=0)
    max_nonfinite_steps: int = free(10, ge=1, description="NaN or Inf losses in a row that stop the run")
    max_bad_rows: int = free(100, ge=0, description="unreadable rows of the data, each replaced, that stop the run")

    # Speed
    use_amp: bool = free(True, description="bf16 where the hardware has it, fp16 with a scaler on older GPUs")
    use_compile: bool = free(False, description="torch.compile, in place")
    use_flash: bool = free(True, description="fused attention; false: the plain maths")
    deterministic: bool = free(True, description="same bits in every run on a GPU, for about a tenth of its speed")
    num_workers: int = free(2, ge=0, description="data loader processes")
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
                raise UserError(f'key "{name}": expected a file, found none at {path}{hint}')


class ThinkerArchitecture(BaseModel):
    """The sizes of the Thinker: Qwen3 (``use_moe`` false) or Qwen3-MoE (true)."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    vocab_size: int = Field(8192, ge=272, description="upper bound; a small corpus may fill less")
    ctx_len: int = Field(512, ge=8, description="tokens per training sequence, and the longest context")
    n_layers: int = Field(8, ge=1)
    d_model: int = Field(512, ge=8)
    n_heads: int = Field(8, ge=1)
    head_dim: int | None = Field(None, ge=2, description="default: d_model / n_heads")
    d_ff: int = Field(1536, ge=8, description="inner width of the SwiGLU MLP")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the residual branches, in training only")
    rope_theta: float = Field(10000.0, gt=0)
    tie_embeddings: bool = Field(True, description="the output head is the input embedding")
    use_gqa: bool = Field(False, description="grouped-query attention with kv_groups key/value heads")
    kv_groups: int = Field(2, ge=1, description="key/value heads under use_gqa")
    use_moe: bool = False
    num_experts: int = Field(8, ge=2)
    num_experts_per_tok: int = Field(2, ge=1)
    moe_d_ff: int | None = Field(None, ge=8, description="inner width of one expert; default: d_ff")
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


class AudioEncoderArchitecture(BaseModel):
    """The sizes of the audio encoder, a FastConformer, and of the log-mels that it reads."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    sample_rate: int = Field(16000, ge=8000, le=192_000, description="Hz; recordings of other rates are resampled")
    mel_bins: int = Field(80, ge=8, description="mel channels")
    frame_hop: int = Field(160, ge=16, description="samples from one mel frame to the next")
    frame_win: int = Field(640, ge=16, description="samples of a mel frame's window")
    downsample_time: int = Field(8, description="mel frames per output frame: 8 or 4")
    subsampling_channels: int = Field(128, ge=1, description="channels of the convolutions that shorten the time")
    n_layers: int = Field(8, ge=1)
    d_model: int = Field(256, ge=8)
    n_heads: int = Field(4, ge=1)
    d_ff: int = Field(1024, ge=8, description="inner width of the feed-forward modules")
    conv_kernel_size: int = Field(9, ge=1, description="width of the depthwise convolution, in output frames")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the residual branches, in training only")
    ctc_vocab_size: int = Field(512, ge=2, description="upper bound of the BPE vocabulary; few texts may fill less")

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
        2048, ge=8, description="mel frames (2048: 20 s); longer rows are left out, use_compile pads up to it"
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
    img_size: int = Field(224, ge=8, description="pixels; pictures are stretched to a square of this side")
    patch: int = Field(16, ge=1, description="side of a patch in pixels")
    d_model: int = Field(384, ge=8)
    n_layers: int = Field(8, ge=1)
    n_heads: int = Field(6, ge=1)
    d_ff: int = Field(1536, ge=8)
    dropout: float = Field(0.0, ge=0, lt=1, description="on the residual branches of both towers, in training only")

    # What it is compared with
    embed_dim: int = Field(256, ge=2, description="width of the space in which pictures and captions meet")
    temperature: float = Field(0.07, ge=0.01, le=1, description="of the contrastive loss, to begin with; it is learned")
    ctx_len: int = Field(64, ge=8, description="tokens of a caption, its end included; longer ones are cut")
    use_thinker_for_text: bool = Field(False, description="the trained Thinker reads the captions, and stays as it is")
    thinker_ckpt: str | None = free(None, description="folder of stage A, for use_thinker_for_text")
    vocab_size: int = Field(8192, ge=272, description="upper bound for the captions' own tokenizer")
    text_d_model: int = Field(256, ge=8, description="width of the text tower; no effect under use_thinker_for_text")
    text_layers: int = Field(4, ge=1)
    text_heads: int = Field(4, ge=1)
    text_d_ff: int = Field(768, ge=8, description="inner width of the SwiGLU MLP")

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

    img_size: int = Field(224, ge=8, description="side of the picture in pixels, where height or width is not given")
    img_height: int | None = Field(None, ge=8, description="default: img_size")
    img_width: int | None = Field(None, ge=8, description="default: img_size")
    patch: int = Field(16, ge=1, description="side of a patch in pixels, where height or width is not given")
    patch_height: int | None = Field(None, ge=1, description="default: patch")
    patch_width: int | None = Field(None, ge=1, description="default: patch")
    vision_d_model: int = Field(256, ge=8)
    vision_layers: int = Field(6, ge=1)
    vision_heads: int = Field(4, ge=1)
    vision_d_ff: int = Field(1024, ge=8)
    conv_stem: bool = Field(False, description="three small convolutions make the patches' tokens, not a linear map")
    decoder_d_model: int = Field(256, ge=8)
    decoder_layers: int = Field(4, ge=1)
    decoder_heads: int = Field(4, ge=1)
    decoder_d_ff: int = Field(1024, ge=8, description="inner width of the SwiGLU MLP")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the residual branches, in training only")
    max_text_length: int = Field(256, ge=1, description="characters; a row with a longer text is left out and named")
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
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#x}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg}, line {error.lineno} column {error.colno}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object of keys, found {type(raw).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: expected key=value")
        field = cls.model_fields.get(key)
        try:  # a text key takes the words as they are: save_dir=5 is a folder
            raw[key] = value if field and field.annotation is str else json.loads(value)
        except (json.JSONDecodeError, RecursionError):
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
        return f'unknown key "{key}".' + (f' Did you mean "{near[0]}"?' if near else "")
    if detail["type"] == "missing":
        return f'key "{key}" is missing: {cls.model_fields[key].description or "required"}'
    if detail["type"] == "value_error":  # our own checks: the message is complete
        return str(detail["ctx"]["error"])
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    expected = expected.replace("String should have", "text of")
    found = json.dumps(detail["input"], ensure_ascii=False, default=str)
    return f'key "{key.split(".")[0]}": expected {expected}, found {found}'


def drift(cls: type[StageConfig], saved: dict, current: dict) -> tuple[list[str], list[str]]:
    """Compare a checkpoint's config with the present one.

    Returns:
        Two lists of ``key: old -> new`` lines: changes that make it another training, and harmless ones.
    """
    keys = [key for key in current if key in saved and saved[key] != current[key]]
    lines = {key: f"{key}: {json.dumps(saved[key])} -> {json.dumps(current[key])}" for key in keys}
    free_keys = cls.free_keys()
    return [lines[k] for k in keys if k not in free_keys], [lines[k] for k in keys if k in free_keys]
