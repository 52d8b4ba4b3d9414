"""The one training loop, for all seven stages.

A step is one optimizer update per phase that has begun. Most stages have one phase; a GAN has two (discriminator,
then generator) on the same micro-batches. Everything that must be the same in every stage is here: position,
accumulation, mixed precision, clipping, the policy for losses that are not finite, and when to report, validate, save
and stop.

The host waits for the device only where it prints, validates or saves: values to log stay on the device, and an update
whose loss or gradient is not finite is skipped there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from omni.common.errors import Interrupted, RunError, UserError
from omni.data.order import NO_BATCH, ResumableDataset, arriving, build_loader
from omni.train.device import rng_state, seed_everything, set_rng_state, to_device
from omni.train.optim import set_lr
from omni.train.report import Report
from omni.train.resume import Checkpoints
from omni.train.run import Run
from omni.train.stage import Stage
from omni.train.training import Phase, Training, Validation
from omni.train.validation import validate

# Called with a training before its first step, when its data and models are there: for scripts/check_data.py.
START_HOOKS: list[Callable[[Training], None]] = []
# Called before each step with (run, number of the step, rows of each micro-batch): for tests and for monitoring.
STEP_HOOKS: list[Callable[[Run, int, list[list[int]]], None]] = []


def train(
    run: Run,
    phases: list[Phase],
    dataset: ResumableDataset,
    *,
    fingerprint: dict[str, str],
    files: dict[str, str] | None = None,
    validation: Validation | None = None,
    summary: dict[str, float] | None = None,
    downstream: tuple[Stage, ...] = (),
) -> dict[str, float]:
    """Train to ``max_steps`` (or ``max_epochs``), from the newest checkpoint in ``save_dir``, if any.

    Args:
        phases: in the order in which each step runs them. The last one's module goes into the final file.
        fingerprint: digests of the data; a resumed run must have the same.
        files: digests of the files in ``save_dir`` that the model needs, such as its tokenizer; loading compares them.
        summary: facts to keep beside the metrics in the final file.
        downstream: stages that train on this model (see ``Run.sub_stage``); once one of them has a file, a finished
            training takes no more steps.

    Returns:
        The metrics of the final file: those of the best validated step.

    Raises:
        UserError: the folder holds another training (other data, sizes, seed ...).
        RunError: too many losses that are not finite, a full disk, or all checkpoints are damaged.
        Interrupted: asked to stop; everything is saved.
    """
    training = Training(run, phases, dataset, fingerprint, files or {}, validation, summary or {}, downstream)
    return Loop(training).run_to_the_end()


class Loop:
    def __init__(self, training: Training) -> None:
        self.training, self.run, self.progress = training, training.run, training.progress
        self.checkpoints, self.report = Checkpoints(training), Report(training)
        self.models = {phase.name: self.run.distribute(phase.module) for phase in training.phases}
        self.overdue = False  # a batch did not come in time

    # All steps ---------------------------------------------------------------------------------------------------

    def run_to_the_end(self) -> dict[str, float]:
        training, run, progress, config = self.training, self.run, self.progress, self.training.config
        if run.rank > 0:
            seed_everything(config.seed + run.rank)  # all processes have the same weights, but other dropout
        harmless = self.checkpoints.resume()
        if progress.step >= training.total_steps and (metrics := run.from_main(self.checkpoints.finished_metrics)):
            fewer = f"; max_steps is {training.total_steps}" if training.total_steps < progress.step else ""
            run.log(f"already finished at step {progress.step}: {self.checkpoints.final_path}{fewer}")
            return metrics
        self.checkpoints.refuse_to_extend()
        run.open_logs(progress.step, validated=progress.validated_step == progress.step)
        self.report.announce(harmless)
        for hook in START_HOOKS:
            hook(training)
        run.logs.start_bar(training.total_steps, progress.step)
        self.report.restart_clock()
        self.save_and_validate()  # repeats a validation that was interrupted
        steps = self.steps()  # a name keeps the loader while an error propagates: its destructor may take long
        for micro_batches in steps:
            # before any process has begun the step, so that all can stop if one of them has no batch
            if run.stop_agreed(None in micro_batches):
                self.stop()
            for hook in STEP_HOOKS:
                hook(run, progress.step, [batch["rows"] for batch in micro_batches])
            self.train_step(micro_batches)
            progress.step += 1
            if run.logs.bar is not None:
                run.logs.bar.update()
            if progress.step % config.print_freq == 0 or progress.step == training.total_steps:
                self.report.averages()
            elif run.device.type == "cpu":
                self.report.check_finite()  # costs nothing without a device to wait for
            self.save_and_validate()
        return self.checkpoints.write_final()

    def steps(self) -> Iterator[list[dict | None]]:
        """Yield the micro-batches of each step, from a new loader every epoch; None for one that does not come."""
        dataset, progress, total_steps = self.training.dataset, self.progress, self.training.total_steps
        while progress.step < total_steps:
            dataset.skip_samples = progress.step * dataset.samples_per_step
            loader = build_loader(dataset, self.training.config.num_workers, self.run.device)
            batches = arriving(loader, self._give_up)
            start_batch_idx = progress.step % dataset.steps_per_epoch
            for _ in range(start_batch_idx, dataset.steps_per_epoch):
                yield [next(batches) for _ in range(dataset.accumulation)]
                if progress.step >= total_steps:
                    return

    def _give_up(self, waited_s: float) -> bool:
        self.overdue = waited_s >= self.training.config.loader_timeout_s
        return self.overdue or self.run.stop_requested

    # One step ----------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: list[dict]) -> None:
        training, run, step = self.training, self.run, self.progress.step
        for batch in micro_batches:
            self.report.note_rows(batch)
            if batch["rows"] and not batch["n_targets"]:
                where, why = list(batch["bad_rows"].items())[-1]
                # only this process has met it, and only the first process prints its UserErrors
                error = UserError if run.is_main else RunError
                raise error(f"{where}: {why}. The {len(batch['bad_rows']) - 1} rows before it cannot be used either")
        rng_before = rng_state(run.device) if len(micro_batches) > 1 else None
        # The loss of a step is the mean over its targets, however they fall into micro-batches and processes.
        sums = [(batch["n_targets"], batch.get("n_tokens", batch["n_targets"])) for batch in micro_batches]
        total, units = run.sum_over_ranks(torch.tensor(sums, dtype=torch.float64).sum(dim=0)).tolist()
        shares = [batch["n_targets"] / total for batch in micro_batches]
        micro_batches = [to_device(batch, run.device) | {"step": step} for batch in micro_batches]
        finite = torch.ones((), device=run.device)
        phases = training.begun_phases(step)
        for phase in phases:
            phase.module.train()
            phase.optimizer.zero_grad(set_to_none=True)
            set_lr(phase.optimizer, training.learning_rate(phase, step))
            # before the first phase is updated, the step can still be given up
            loss_sum, logged = self._backward(phase, micro_batches, shares, rng_before if phase is phases[0] else None)
            loss_sum = run.sum_over_ranks(loss_sum)
            norm, made = self._update(phase, loss_sum)
            if phase.after_update is not None:
                phase.after_update(made)
            if phase.average is not None:
                phase.average.update(step + 1 - phase.first_step)
            finite = finite * made
            # a skipped update does not count in the averages either
            logged.append(({"loss": loss_sum / run.world, "grad_norm": norm / run.world}, 1.0))
            label = f"{phase.name}_" if len(training.phases) > 1 else ""
            for scalars, share in logged:
                training.meter.add({f"{label}{name}": value for name, value in scalars.items()}, share * made)
        training.scaler.update()
        training.meter.count(finite, units, sum(len(batch["rows"]) for batch in micro_batches) * run.world)

    def _backward(
        self, phase: Phase, micro_batches: list[dict], shares: list[float], rng_before: dict | None
    ) -> tuple[Tensor, list[tuple[dict[str, Tensor], float]]]:
        """Accumulate the phase's gradients over all micro-batches.

        Args:
            rng_before: random states at the beginning of the step, to which a single process returns if it is asked to
                stop between two micro-batches; None if it may not stop here.

        Returns:
            This process's part of the loss; and each micro-batch's scalars, with its share of the step's targets.
        """
        training, run, world, model = self.training, self.run, self.run.world, self.models[phase.name]
        loss_sum = torch.zeros((), device=run.device)
        logged = []
        for index, (batch, share) in enumerate(zip(micro_batches, shares, strict=True)):
            if share == 0 and world == 1:
                continue  # the unfilled end of an epoch's last step
            if run.stop_requested and index > 0 and rng_before is not None and world == 1:
                phase.optimizer.zero_grad(set_to_none=True)
                set_rng_state(rng_before, run.device)
                self.stop()
            if world > 1:
                model.require_backward_grad_sync = index == len(micro_batches) - 1
            with compilation(run), run.deterministic_kernels():
                with run.autocast():
                    loss, scalars = phase.loss(model, batch)
                # DDP averages over processes; the shares are of the sum over all of them
                training.scaler.scale(loss * (share * world)).backward()
            loss_sum += loss.detach() * share
            logged.append((scalars, share))
        return loss_sum, logged

    def _update(self, phase: Phase, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and apply the gradients on the device, unless loss or gradient is not finite.

        Returns:
            The gradient's norm before clipping, and 1.0 if the update was made, else 0.0.
        """
        scaler, optimizer = self.training.scaler, phase.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if scaler.is_enabled():
            # an infinite loss can have finite gradients: spoil them, so that the scaler skips the update as well
            torch._foreach_mul_(gradients, torch.where(torch.isfinite(loss), 1.0, float("nan")))
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.training.config.max_grad_norm, norm, foreach=True)
        made = (torch.isfinite(norm) & torch.isfinite(loss)).float()
        if scaler.is_enabled():
            scaler.step(optimizer)
        else:
            optimizer.found_inf = 1.0 - made  # a fused optimizer reads this: 1.0 leaves everything as it is
            optimizer.step()
        return norm, made

    # After a step ------------------------------------------------------------------------------------------------

    def save_and_validate(self) -> None:
        """Checkpoint and validation, if due at this step and not yet done: safe to call twice.

        The step is saved first: a validation that fails, or is killed, costs no step.
        """
        training, config, progress, step = self.training, self.training.config, self.progress, self.progress.step
        if step == 0:
            return
        at_end = step == training.total_steps
        validates = training.validation is not None and (step % config.val_freq == 0 or at_end)
        validates = validates and progress.validated_step != step
        epoch_ends = step % training.dataset.steps_per_epoch == 0
        due = validates or epoch_ends or at_end or step % config.checkpoint_freq == 0
        if due and self.checkpoints.saved_step != step:
            self.save()
            self.report.restart_clock()
        if validates:
            validate(training, self.report, self._give_up, self.stop)
            self.report.restart_clock()

    def save(self) -> None:
        self.report.share_rows()
        self.checkpoints.save()

    def stop(self) -> NoReturn:
        """
        Raises:
            RunError: no batch came in time.
            Interrupted: the run was asked to stop.
        """
        step = self.progress.step
        if step > 0 and self.checkpoints.saved_step != step:
            self.save()
        saved = f"saved in {self.run.save_dir}" if step > 0 else "before the first step was made"
        if self.overdue:
            raise RunError(
                f"{NO_BATCH.format(self.training.config.loader_timeout_s)}. Stopped at step {step}, {saved}. Run the "
                "same command to go on"
            )
        raise Interrupted(f"stopped at step {step}, {saved}. Run the same command to go on")


@contextmanager
def compilation(run: Run) -> Iterator[None]:
    """Around calls of what ``run.prepare`` has compiled, which is compiled when it is called.

    Raises:
        UserError: it cannot be compiled, as where there is no C++ compiler.
        Interrupted: the run was asked to stop. Ctrl-C in a terminal ends the compiler, too.
    """
    if not run.config.use_compile:
        yield
        return
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        if run.stop_requested:
            raise Interrupted("stopped while compiling; the last saved checkpoint stands") from error
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())  # the backend, and what it says
        raise UserError(f'key "use_compile": expected false, as torch.compile fails: {reason}') from error
