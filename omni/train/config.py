"""Typed JSON configs: the meaning of each key, its default, and whether a resumed run may change it.

A config file is flat JSON, one per stage. An unknown key, a wrong type or an impossible size is refused in one line
that names file, key, expected and found value. Only the config classes contain defaults.
"""

import difflib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from omni.common.errors import UserError
from omni.common.media import quoted
from omni.data.open_manifest import NothingFound, expand
from omni.data.records import other_encoding
from omni.data.text_rows import text_files

ConfigType = TypeVar("ConfigType", bound="StageConfig")

TEXT_HINT = "python scripts/make_synthetic_datasets.py writes data/text/tiny_corpus.txt; any UTF-8 text will do"
ASR_HINT = "python scripts/make_synthetic_datasets.py writes data/audio/asr.csv"
PICTURES_HINT = "python scripts/make_synthetic_datasets.py writes data/images/annotations.json"
TTS_HINT = "python scripts/make_synthetic_datasets.py writes data/audio/tts.csv"
OCR_HINT = "python scripts/make_synthetic_datasets.py writes data/ocr/ocr.csv"
HOUR = "python scripts/make_synthetic_datasets.py --size hour --only audio --out data/hour"
PREPARED_BY = {  # name of a file of public data up to its first dot -> what writes it
    "production_corpus": "python scripts/prepare_data.py tinystories",
    "production_asr": "python scripts/prepare_data.py librispeech",
    "production_tts": "python scripts/prepare_data.py ljspeech",
    "production_annotations": "python scripts/prepare_data.py coco",
    "production_vqa": "python scripts/prepare_data.py vqa",
    "production_conversations": "python scripts/prepare_data.py llava",
    "production_ocr": "python scripts/prepare_data.py mjsynth",
    "production_questions": (
        "python scripts/make_synthetic_datasets.py --read_questions data/images/production_vqa.json"
    ),
}


def resumable(default=..., **constraints):
    """A key that a resumed run may change."""
    return Field(default, json_schema_extra={"resumable": True}, **constraints)


def input_file(default=..., *, hint: str = "", **constraints):
    """A path that must exist when the config is loaded. A resumed run may change it: the data's digest is compared."""
    return Field(default, json_schema_extra={"resumable": True, "file": True, "hint": hint}, **constraints)


def input_files(default=..., *, hint: str = "", split: bool = False, **constraints):
    """As ``input_file``: what ``omni.data.open_manifest.expand`` finds, and at least one file.

    Args:
        split: of a held-out file: it may be the training's, too, since ``val_split`` holds out rows of both.
    """
    extra = {"resumable": True, "files": expand, "hint": hint, "split": split}
    return Field(default, json_schema_extra=extra, **constraints)


def input_texts(default=..., *, hint: str = "", **constraints):
    """As ``input_files``, of text: a file, a pattern such as "books/*.txt", or a list of these; no folder."""
    extra = {"resumable": True, "files": text_files, "hint": hint}
    return Field(default, json_schema_extra=extra, **constraints)


Files = str | list[str]  # a file, the folder of a data set, a pattern such as "shards/*.tar", or a list of these


class StageConfig(BaseModel):
    """The keys that every stage has."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    # Keys of older config files that have no effect any more: accepted, with a notice that explains why.
    OBSOLETE: ClassVar[dict[str, str]] = {
        "shuffle_buffer_size": "every epoch is a full permutation of the rows, no buffer is needed",
    }

    # Former names of keys: accepted, with a notice that gives the present name.
    RENAMED: ClassVar[dict[str, str]] = {}

    about: str | list[str] = resumable("", description="free text: what this config is for, what it costs")
    save_dir: str = resumable(min_length=1, description="folder for checkpoints, logs and the final file")
    cache_dir: str | None = resumable(None, description="folder for prepared data; default: beside the data file")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of initial weights, sample order and dropout")

    # Optimisation
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="optimizer; muon: Muon for kernels of linear layers and convolutions, AdamW for the rest"
    )
    lr: float = resumable(3e-4, gt=0, description="peak learning rate, after warm-up")
    min_lr_ratio: float = resumable(0.1, ge=0, le=1, description="learning rate at max_steps, as a share of lr")
    wd: float = resumable(0.1, ge=0, description="weight decay, of kernels and embeddings only")
    warmup_steps: int = resumable(100, ge=0, description="steps of linear warm-up")
    max_steps: int | None = resumable(None, ge=1, description="optimizer updates; takes precedence over max_epochs")
    max_epochs: int | None = resumable(None, ge=1, description="passes over the data; used when max_steps is absent")
    batch_size: int = Field(8, ge=1, le=1_048_576, description="samples per forward pass and process")
    gradient_accumulation_steps: int = Field(1, ge=1, le=1_048_576, description="forward passes per update")
    samples_per_step: int | None = resumable(
        None,
        ge=1,
        le=1 << 40,
        description="samples per update, over all processes; takes precedence over gradient_accumulation_steps",
    )
    max_grad_norm: float = resumable(1.0, gt=0, description="norm to which gradients are clipped")
    max_nonfinite_steps: int = resumable(10, ge=1, description="number of NaN or Inf losses in a row that ends a run")
    max_bad_rows: int = resumable(
        100, ge=0, description="number of unreadable rows that the run tolerates; each is replaced by another row"
    )

    # Speed
    use_amp: bool = resumable(True, description="mixed precision: bf16 where the hardware has it, fp16 on older GPUs")
    use_compile: bool = resumable(False, description="compilation by torch.compile")
    use_flash: bool = resumable(True, description="fused attention; false: plain matrix products")
    deterministic: bool = resumable(True, description="bit-identical runs on a GPU, about a tenth slower")
    num_workers: int = resumable(2, ge=0, le=1_024, description="data loader processes")
    loader_timeout_s: int = resumable(
        600, ge=1, le=1_000_000, description="longest wait for a batch, in seconds; a longer one stops the run"
    )
    drop_last: bool = Field(True, description="omission of the last, incomplete step of an epoch")

    # Reporting
    print_freq: int = resumable(50, ge=1, description="steps between two log lines")
    val_split: float = Field(0.05, ge=0, lt=1, description="share of the rows held out for validation")
    val_freq: int = resumable(500, ge=1, description="steps between two validations")
    checkpoint_freq: int = resumable(1000, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = resumable(2, ge=2, description="step files kept, beside the best one")

    @model_validator(mode="after")
    def _has_a_duration(self) -> Self:
        if self.max_steps is None and self.max_epochs is None:
            raise ValueError('expected "max_steps" or "max_epochs", found neither')
        return self

    @classmethod
    def resumable_keys(cls) -> set[str]:
        """Keys that a resumed run may change."""
        return {name for name, field in cls.model_fields.items() if (field.json_schema_extra or {}).get("resumable")}

    def check_files(self) -> None:
        """
        Raises:
            UserError: a file that the config names does not exist.
        """
        for name, field in type(self).model_fields.items():
            extra, path = field.json_schema_extra or {}, getattr(self, name)
            if path is None or not (extra.get("files") or extra.get("file")):
                continue
            hints = [hint_of(path, extra.get("hint", "")), "null is for no file" if field.default is None else ""]
            hint = f" ({'; '.join(filter(None, hints))})" if any(hints) else ""
            if extra.get("files"):
                check_given(name, path, hint, extra["files"])
            elif not os.path.isfile(path):
                found = f"none at {path}" if path else "an empty name"
                raise UserError(f'key "{name}": expected a file, found {found}{hint}')


def hint_of(files: Files, otherwise: str) -> str:
    """What writes the file, of several the first that is missing, if it is one of the public data or of those for the
    configs of an hour."""
    if isinstance(files, list):
        files = next((file for file in files if not os.path.exists(file)), "")
    if files.startswith("data/hour/"):
        return f"{HOUR} writes it"
    if (name := Path(files).name.partition(".")[0]) in PREPARED_BY:
        return f"{PREPARED_BY[name]} writes it"
    return otherwise if files and Path(files).name in otherwise else ""  # not for a file of one's own


def check_given(name: str, files: Files, hint: str = "", expand_all: Callable = expand) -> None:
    """
    Raises:
        UserError: a file, folder or pattern of the key ``name`` does not exist, or ``expand_all`` refuses it.
    """
    for given in files if isinstance(files, list) else [files]:
        try:
            if given:
                expand(given)
                continue
            found = "an empty name"
        except NothingFound:
            found = f"none at {given}"
        except UserError as error:
            raise UserError(f'key "{name}": {error}') from error
        raise UserError(f'key "{name}": expected a file, found {found}{hint}')
    if not files:
        raise UserError(f'key "{name}": expected a file, found an empty list{hint}')
    try:
        expand_all(files)
    except UserError as error:
        raise UserError(f'key "{name}": {error}') from error


def on_both_sides(config: StageConfig) -> list[str]:
    """A line for each held-out key that names a file of the training, too. ``val_NAME`` belongs to the key NAME, or to
    the stage's only training key."""
    fields = {
        name: field.json_schema_extra
        for name, field in type(config).model_fields.items()
        if (field.json_schema_extra or {}).get("files") and getattr(config, name)
    }
    training = [name for name in fields if not name.startswith("val_")]
    lines = []
    for held_out, extra in fields.items():
        of = held_out.removeprefix("val_")
        if held_out == of or extra.get("split"):
            continue
        for name in set(training) & {of} if of in type(config).model_fields else training:
            trained, judged = (
                [path.resolve() for path in fields[key]["files"](getattr(config, key))] for key in (name, held_out)
            )
            if both := next((path for path in judged if any(_contains(other, path) for other in trained)), None):
                lines.append(f'{both}: is in "{name}" and in "{held_out}": the model learns what it is judged by')
    return lines


def _contains(trained: Path, path: Path) -> bool:
    """Whether a training file is the other, or is a folder whose subfolders are read, too, and the other lies in it."""
    return trained == path or trained in path.parents and not (trained / "wav.scp").is_file()


def read_keys(path: str) -> dict:
    """The keys of a config file, unchecked.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8").lstrip("\ufeff"), object_pairs_hook=_once)
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


def _once(pairs: list[tuple[str, Any]]) -> dict:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f'key "{quoted(twice)}" stands twice')
    return keys


def load_config(cls: type[ConfigType], path: str, overrides: list[str] = ()) -> tuple[ConfigType, list[str]]:
    """Read ``path`` as ``cls``.

    Args:
        path: a JSON file.
        overrides: ``key=value`` strings from the shell; a value that is no JSON is a string.

    Returns:
        The config, and the notices to log: obsolete and renamed keys, files that are trained on and held out.

    Raises:
        UserError: one line with file, key, expected and found.
    """
    raw, given = read_keys(path), set()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: expected key=value")
        given.add(key)
        field = cls.model_fields.get(key)
        try:  # a text key takes the value unparsed: save_dir=5 is a folder
            raw[key] = value if field and field.annotation is str else json.loads(value)
        except (ValueError, RecursionError):
            raw[key] = value
    notices = [f'{path}: key "{key}" has no effect: {cls.OBSOLETE[key]}' for key in raw if key in cls.OBSOLETE]
    for old, new in cls.RENAMED.items():
        if old in raw:
            both = f', which stands there too: "{old}" has no effect' if new in raw else ""
            notices.append(f'{path}: key "{old}" is called "{new}" now{both}')
    raw = with_new_names(cls, raw)
    try:
        config = cls.model_validate({k: v for k, v in raw.items() if k not in cls.OBSOLETE})
        config.check_files()
    except ValidationError as error:
        details = error.errors()
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        where = "--set" if details[0]["loc"][:1] and details[0]["loc"][0] in given else path
        raise UserError(f"{where}: {_describe(cls, details[0])}{more}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config, notices + on_both_sides(config)


def with_new_names(cls: type[StageConfig], keys: dict) -> dict:
    """Keys of an older config or checkpoint under their present names; if both are given, the present one wins."""
    renamed = {cls.RENAMED[key]: value for key, value in keys.items() if key in cls.RENAMED}
    return renamed | {key: value for key, value in keys.items() if key not in cls.RENAMED}


def _describe(cls: type[StageConfig], detail: dict) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, [*cls.model_fields, *cls.OBSOLETE], n=1, cutoff=0.5)
        return f'unknown key "{quoted(key)}". ' + (f'Did you mean "{near[0]}"?' if near else "--help lists all keys")
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


def config_diff(cls: type[StageConfig], saved: dict, current: dict) -> tuple[list[str], list[str]]:
    """Compare a checkpoint's config with the present one.

    Returns:
        Two lists of ``key: old -> new`` lines: changes that make it another training, and harmless ones.
    """
    saved = with_new_names(cls, saved)
    keys = [key for key in current if key in saved and saved[key] != current[key]]
    lines = {key: f"{key}: {json.dumps(saved[key])} -> {json.dumps(current[key])}" for key in keys}
    resumable_keys = cls.resumable_keys()
    return [lines[k] for k in keys if k not in resumable_keys], [lines[k] for k in keys if k in resumable_keys]
