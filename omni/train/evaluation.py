"""Evaluation of a finished stage on any data, row by row; unusable rows are left out and named."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from omni.common.errors import RunError, UserError
from omni.common.media import visible
from omni.data.manifest import ManifestDataset
from omni.data.order import NO_BATCH, ResumableDataset, arriving, build_loader
from omni.train.config import StageConfig
from omni.train.device import to_device

_NAMED = 100  # omitted rows to print; all are counted
_TIMEOUT_S = StageConfig.model_fields["loader_timeout_s"].default


@dataclass
class EvalResult:
    """A stage's metrics on some data."""

    metrics: dict[str, float] = field(default_factory=dict)
    rows: int = 0  # evaluated
    left_out: dict[str, str] = field(default_factory=dict)  # where -> why
    shown: list[tuple[str, ...]] = field(default_factory=list)  # target, output of the model, perhaps its score
    measures: dict[str, str] = field(default_factory=dict)  # metric -> what it measures, where that depends on the rows

    def check_rows(self, args: argparse.Namespace) -> None:
        """
        Raises:
            UserError: no row can be used.
        """
        if not self.rows:
            where, why = next(iter(self.left_out.items()))
            raise UserError(f"{args.data}: not one of its {len(self.left_out)} rows can be used. {where}: {why}")

    def name_left_out(self) -> None:
        """Name the rows that could not be used on stderr."""
        for where, why in list(self.left_out.items())[:_NAMED]:
            to_stderr(visible(f"{where}: {why}. Left out"))
        if (more := len(self.left_out) - _NAMED) > 0:
            to_stderr(f"and {more:,} more rows left out")


def evaluate_rows(
    rows: ManifestDataset,
    args: argparse.Namespace,
    device: torch.device,
    sums: Callable[[dict], dict[str, Tensor]],
    batch_size: int,
) -> tuple[EvalResult, dict[str, float]]:
    """Evaluate all rows in order, in batches; also returns the totals of ``sums``.

    Raises:
        UserError: not one row could be used.
    """
    result, totals = EvalResult(), {}
    dataset = ResumableDataset(rows, seed=0, batch_size=batch_size, shuffle=False)
    batches = arriving(build_loader(dataset, args.num_workers, device), lambda waited_s: waited_s >= _TIMEOUT_S)
    for batch in tqdm(batches, total=dataset.steps_per_epoch, disable=None):
        if batch is None:
            raise RunError(f"{args.data}: {NO_BATCH.format(_TIMEOUT_S)}")
        result.left_out |= batch["bad_rows"]
        for text in batch["notes"]:
            to_stderr(text)
        result.rows += len(batch["rows"]) - len(batch["bad_rows"])
        if batch["n_targets"]:
            add(totals, sums(to_device(batch, device)))
    result.check_rows(args)
    return result, totals


def add(totals: dict[str, float | Tensor], sums: dict[str, Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + (value.double().cpu() if value.dim() else float(value))


def first_rows(count: int, args: argparse.Namespace) -> np.ndarray:
    return np.arange(min(count, args.limit or count))


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
