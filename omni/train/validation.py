"""Validation: it covers the whole held-out set, and changes nothing in training."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NoReturn

import torch
from torch import Tensor

from omni.common.errors import UserError
from omni.data.order import arriving, build_loader, from_the_start
from omni.train import checkpoint
from omni.train.device import to_device, untouched_rng
from omni.train.progress import write_validated
from omni.train.report import Report
from omni.train.training import Training


def validate(
    training: Training, report: Report, give_up: Callable[[float], bool], stop: Callable[[], NoReturn]
) -> None:
    """Evaluate the model on the whole validation set, and keep the metrics beside the step file.

    Args:
        give_up: see ``omni.data.order.arriving``.
        stop: called if the run has to stop before the validation is complete; the next run validates again.
    """
    totals = _totals_of_this_process(training, report, give_up, stop)
    report.share_rows()
    metrics = _metrics(training, totals)
    run, progress, name = training.run, training.progress, training.run.stage.best_metric
    progress.metrics, progress.validated_step = metrics, progress.step
    best = progress.best_metrics.get(name, math.inf)
    improved = math.isfinite(metrics[name]) and not metrics[name] >= best  # an older version's best may be nan
    if improved:
        progress.best_step, progress.best_metrics = progress.step, metrics
    run.logs.record("val", progress.step, training.last_epoch, metrics)
    shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
    run.log(f"step {progress.step}  validation: {shown}" + ("  (best)" if improved else ""))
    if wrong := [key for key, value in metrics.items() if not math.isfinite(value)]:
        no_best = f"; without {name} it cannot be the best" if name in wrong else ""
        run.log(f"step {progress.step}: validation: not finite: {', '.join(wrong)}{no_best}")
    if run.is_main:
        path = checkpoint.step_path(run.save_dir, run.stage.prefix, progress.step)
        write_validated(run.save_dir, run.stage.prefix, progress, checkpoint.stated_digest(path))


def _totals_of_this_process(
    training: Training, report: Report, give_up: Callable[[float], bool], stop: Callable[[], NoReturn]
) -> dict[str, Tensor]:
    run, validation, phase = training.run, training.validation, training.phases[-1]
    module = phase.module
    totals: dict[str, Tensor] = {}
    stopping = False
    module.eval()
    with (
        from_the_start(validation.dataset) as dataset,
        nullcontext() if phase.average is None else phase.average.in_place(),
        untouched_rng(run.device),
        torch.no_grad(),
        # compiling the shapes of validation would make signals wait
        torch.compiler.set_stance("force_eager"),
    ):
        batches = arriving(build_loader(dataset, training.config.num_workers, run.device), give_up)
        for batch in batches:
            if stopping := run.stop_agreed(batch is None):
                break
            report.note_rows(batch)
            if not batch["n_targets"]:
                continue
            batch = to_device(batch, run.device) | {"step": training.progress.step}
            with run.autocast():
                sums = validation.sums(module, batch)
            for key, value in sums.items():
                totals[key] = totals.get(key, 0.0) + value.double().cpu()
    if stopping:
        stop()  # outside the block, which restores the random states; ``batches`` keeps a loader that may hang
    return totals


def _metrics(training: Training, totals: dict[str, Tensor]) -> dict[str, float]:
    """Metrics over all processes.

    Raises:
        UserError: no held-out row can be used, or none that the stage's ``best_metric`` is measured on.
    """
    run, name = training.run, training.run.stage.best_metric
    shapes: dict[str, tuple] = {}  # a process may have had no batch of its own
    for found in run.gather({key: tuple(value.shape) for key, value in totals.items()}):
        shapes |= found
    if not shapes:
        raise UserError("validation: not one row of the held-out data can be used")
    sums: dict[str, float | Tensor] = {}
    for key, shape in sorted(shapes.items()):
        total = run.sum_over_ranks(totals.get(key, torch.zeros(shape, dtype=torch.float64)))
        sums[key] = total if shape else total.item()
    try:
        metrics = training.validation.metrics(sums)
    except ZeroDivisionError:  # a mean over nothing
        metrics = {}
    if name not in metrics:
        raise UserError(f"validation: not one of the held-out rows that {name} is measured on can be used")
    return metrics
