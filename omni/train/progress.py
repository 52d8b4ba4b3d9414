"""The position of a training, and the results of a validation that runs after its step was saved.

A step is saved before it is validated, so that a failed validation costs nothing. The metrics are kept in a sealed file
of their own, ``<prefix>_validated.json``, which contains the digest of its step file.
"""

from dataclasses import dataclass, field
from pathlib import Path

from omni.common.files import read_sealed_json, write_sealed_json

_STEP_FILE = "step_file"


@dataclass
class Progress:
    """Every field is saved in the checkpoint."""

    step: int = 0
    validated_step: int = -1
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    skipped_updates: int = 0  # losses that were not finite, over the whole run
    skipped_in_a_row: int = 0
    bad_rows: dict[str, str] = field(default_factory=dict)  # rows that cannot be used: where -> why


def _path(folder: Path, prefix: str) -> Path:
    return folder / f"{prefix}_validated.json"


def write_validated(folder: Path, prefix: str, progress: Progress, step_file: bytes) -> None:
    """Keep the results of the present step's validation.

    Args:
        step_file: digest of the step's file, since a later file may have the same step number.
    """
    write_sealed_json(_path(folder, prefix), vars(progress) | {_STEP_FILE: step_file.decode()})


def read_validated(folder: Path, prefix: str, step_file: bytes) -> dict:
    """Fields of ``Progress`` that the validation of the step file with this digest changed; {} if it has none."""
    found = read_sealed_json(_path(folder, prefix)) or {}
    return found if found.pop(_STEP_FILE, "").encode() == step_file else {}
