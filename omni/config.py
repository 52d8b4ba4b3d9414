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
