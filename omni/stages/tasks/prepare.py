"""From the files of a config to the tasks of a mixture: which rows of which file each task trains and validates on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from omni.common.errors import UserError
from omni.data.manifest import Manifest, account_for_rows, split_rows
from omni.data.measure import measure_rows
from omni.stages.tasks.base import FIRST_TURNS, NOTHING, TASKS, SftTask, Side
from omni.stages.tasks.processor import Processor
from omni.train.precompute import ManifestWithColumns
from omni.train.run import Run


def prepare_tasks(
    run: Run, config: Any, processor: Processor
) -> tuple[dict[str, SftTask], dict[str, SftTask], dict[str, str]]:
    """The tasks that the config's files have rows for.

    Returns:
        Tasks to train on and tasks to validate on, by name; digests of the files of both.

    Raises:
        UserError: a file cannot be read, or no task has a row to train on.
    """
    sides = [Side(run, config, processor, training) for training in (True, False)]
    tasks: tuple[dict[str, SftTask], dict[str, SftTask]] = {}, {}
    digests: tuple[list[str], list[str]] = [], []
    too_long: list[str] = []  # files without a row that fits
    for name, cls in TASKS.items():
        if config.file_of(cls.file_key) is None:
            continue
        if cls.file_key not in sides[0].rows:
            for side, found, manifest_rows in zip(sides, digests, open_both(run, config, cls), strict=True):
                side.rows[cls.file_key] = manifest_rows
                found.append(manifest_rows[0].sha256)
        if config.task_weights.get(name, 1.0) <= 0:
            continue
        for side, found in zip(sides, tasks, strict=True):
            manifest, rows, others = cls.select(side, *side.rows[cls.file_key])
            if not len(rows):
                continue
            others |= {"seed": config.seed, "training": side.training}
            task = cls(manifest, rows, processor, config, **others)
            task.row_numbers = with_room(run, task)
            if len(task):
                found[name] = task
            elif side.training:
                too_long.append(f"{manifest.path} ({name})")
    if not tasks[0] and too_long:
        raise UserError(
            f"{', '.join(too_long)}: not one row fits ctx_len {processor.ctx_len}. Raise it, or shorten them"
        )
    if not tasks[0]:
        raise UserError("the mix has no row to train on: expected files with rows, and a task_weights above 0")
    for name, weight in config.task_weights.items():
        if weight > 0 and name not in tasks[0]:
            run.log(f'key "task_weights": no file of the mix has rows for the task {name}, so it has no share')
    files = {cls.file_key for name, cls in TASKS.items() if config.task_weights.get(name, 1.0) > 0}
    opened = [side.rows[key][0] for side in sides for key in side.rows if key in files]
    if not config.features_only:  # else the training does, which has all tasks
        account_for_tasks(run, opened, tasks)
    # one digest each, however many files there are
    joined = [hashlib.sha256(" ".join(found).encode()).hexdigest() for found in digests]
    return *tasks, dict(zip(("train", "validation"), joined, strict=True))


def open_both(run: Run, config: Any, cls: type[SftTask]) -> list[tuple[Manifest, np.ndarray]]:
    """The training and the validation file of a task, with their rows; by default ``val_split`` of the first file."""
    paths = [path for path in (config.file_of(cls.file_key), config.file_of(f"val_{cls.file_key}")) if path]
    with run.main_process_first():
        how = {"cache_dir": config.cache_dir, "log": run.log, "check_stop": run.check_stop}
        manifests = [cls.open(path, **how) for path in paths]
    if cls.splits_both_files:
        return [(manifests[side], split_rows(manifests[side], config.val_split)[abs(side)]) for side in (0, -1)]
    if len(manifests) == 2:
        return [(manifest, np.arange(len(manifest))) for manifest in manifests]
    return [(manifests[0], rows) for rows in split_rows(manifests[0], config.val_split)]


def account_for_tasks(run: Run, opened: list[Manifest], sides: tuple[dict[str, SftTask], dict[str, SftTask]]) -> None:
    """Log where the rows of each opened file went; a file may serve several tasks, or none."""
    used: dict[Path, tuple[Manifest, tuple[list[np.ndarray], list[np.ndarray]]]] = {}
    for manifest in opened:
        used.setdefault(manifest.path, (manifest, ([], [])))
    for side, tasks in enumerate(sides):
        for task in tasks.values():
            manifest = file_of(task)
            used.setdefault(manifest.path, (manifest, ([], [])))[1][side].append(task.row_numbers)
    for manifest, found in used.values():
        train, held_out = (np.unique(np.concatenate([np.zeros(0, np.int64), *rows])) for rows in found)
        held_out = np.setdiff1d(held_out, train)
        for reason, rows in manifest.left_out.items():  # by one task
            manifest.left_out[reason] = np.setdiff1d(rows, np.concatenate([train, held_out]))
        counted = np.concatenate([train, held_out, *manifest.left_out.values()])
        if len(others := np.setdiff1d(np.arange(len(manifest)), counted)):
            manifest.left_out["of no use to a task"] = others
        account_for_rows(run, manifest, to_train_on=train, held_out=held_out)


def file_of(task: SftTask) -> Manifest:
    return task.manifest.manifest if isinstance(task.manifest, ManifestWithColumns) else task.manifest


def with_room(run: Run, task: SftTask) -> np.ndarray:
    """The row numbers of a task, without rows whose first turn exceeds ``ctx_len``; logs how many these are, and how
    many lose later turns. Cached beside the index. Unreadable rows stay: reading them raises."""
    manifest, processor, rows, name = file_of(task), task.processor, task.row_numbers, task.name
    depends_on = [name, processor.tokenizer.fingerprint, processor.ctx_len, processor.prompt, processor.cached]
    depends_on += [processor.audio and processor.audio.model_dump(), processor.max_mel_length]
    depends_on += [processor.image_positions, *task.depends_on()]
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]
    room = measure_rows(
        run, manifest, f"room-{digest}", lambda manifest, row: task.room(manifest[row]), np.uint8, task.length_column
    )[rows]
    if (room == FIRST_TURNS).any():
        run.log(
            f"task {name}: {manifest.path}: {(room == FIRST_TURNS).sum()} of {len(rows)} rows lose their last turns, "
            f"longer than ctx_len {processor.ctx_len}"
        )
    reason = f"longer than ctx_len {processor.ctx_len}"  # the same for all tasks: a row is in one count
    return manifest.leave_out(rows, room == NOTHING, reason, lambda line: run.log(f"task {name}: {line}"))
