"""Where a training stands, beyond its modules; and what a validation found after its step had been saved.

A step is saved before it is judged, so that a validation that fails costs nothing. What it found is a few numbers, in
a sealed file of its own: ``<prefix>_validated.json``, which belongs to the step file whose digest it has.
"""

from dataclasses import dataclass, field
from pathlib import Path

from omni.common.files import read_sealed_json, write_sealed_json

_STEP_FILE = "step_file"


@dataclass
class Progress:
    """All of it is in the checkpoint."""

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
    """Keep what the validation of the present step found.

    Args:
        step_file: digest of that step's file, which is on disk already: another one of the same step may follow it.
    """
    write_sealed_json(_path(folder, prefix), vars(progress) | {_STEP_FILE: step_file.decode()})


def read_validated(folder: Path, prefix: str, step_file: bytes) -> dict:
    """What a validation changed after the step file with this digest was written: fields of ``Progress``, or none."""
    found = read_sealed_json(_path(folder, prefix)) or {}
    return found if found.pop(_STEP_FILE, "").encode() == step_file else {}
