"""The one training loop, for all seven stages.

A step is one optimizer update per phase that has begun. Most stages have one phase; a GAN has two (discriminator,
then generator) that see the same micro-batches. Everything that must be the same in every stage is here: position,
accumulation, mixed precision, clipping, the policy for losses that are not finite, validation, checkpoints, resume,
progress.

The host never waits for the device except where it prints, validates or saves: what is only logged stays on the
device, and an update that must not happen is skipped there.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from omni.common.errors import Interrupted, RunError, UserError
from omni.data.order import NO_BATCH, ResumableDataset, arriving, build_loader, from_the_start
from omni.train import checkpoint
from omni.train.config import StageConfig, config_diff
from omni.train.device import peak_memory_gb, rng_state, seed_everything, set_rng_state, untouched_rng
from omni.train.optim import Muon, load_optimizer, set_lr, warmup_cosine
from omni.train.progress import Progress, read_validated, write_validated
from omni.train.run import Run
from omni.train.stage import Stage

_NOTES_SHOWN = 20  # on rows that are used but odd; all are counted

# (model, batch on the device) -> mean loss over the batch's targets, and scalars to log
LossFunction = Callable[[nn.Module, dict], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Phase:
    """One module with its optimizer: what one optimizer update belongs to.

    ``loss`` is called with the module to run (under torchrun its DDP wrapper) and a micro-batch. It may read other
    phases' modules; only this phase's parameters are updated. ``after_update`` moves what no gradient moves, such as
    averages; it gets 1.0 on the device, or 0.0 if the step's update was not made. Before ``first_step`` nothing of it
    runs, so that not even weight decay touches the module; there its learning rate begins, with its own warm-up.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer | Muon
    loss: LossFunction
    peak_lr: float
    after_update: Callable[[Tensor], None] | None = None
    first_step: int = 0


@dataclass
class Validation:
    """How a stage is judged.

    ``sums`` maps (module, batch on the device) to tensors that add up over batches and processes; ``metrics`` turns
    their totals, numbers where they are scalars, into what is reported, among it the stage's ``best_metric``.
    """

    dataset: ResumableDataset
    sums: Callable[[nn.Module, dict], dict[str, Tensor]]
    metrics: Callable[[dict[str, float | Tensor]], dict[str, float]]


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
    """Train to ``max_steps`` (or ``max_epochs``), from wherever ``save_dir`` says the run stands.

    Args:
        phases: in the order in which each step runs them. The last one's module goes into the final file.
        fingerprint: digests of the data; a resumed run must have the same.
        files: digests of the files in ``save_dir`` that the model is of no use without, such as its tokenizer; whoever
            loads the model compares them.
        summary: facts to keep beside the metrics in the final file.
        downstream: of a ``Run.part``, those whose models are made of this one's: once one of them has a file, a
            finished training takes no more steps.

    Returns:
        The metrics of the final file: those of the best validated step.

    Raises:
        UserError: the folder holds another training (other data, sizes, seed ...).
        RunError: losses that are not finite, a full disk, checkpoints all damaged.
        Interrupted: asked to stop; everything is saved.
    """
    parts = run, phases, dataset, fingerprint, files or {}, validation, summary or {}, downstream
    return _Training(*parts).run_to_the_end()


class _Training:
    def __init__(self, run, phases, dataset, fingerprint, files, validation, summary, downstream) -> None:
        self.run: Run = run
        self.config: StageConfig = run.config
        self.phases: list[Phase] = phases
        self.dataset: ResumableDataset = dataset
        self.fingerprint = fingerprint | {"samples": str(len(dataset.source))}
        if dataset.lengths is not None:  # the order of the samples depends on them
            self.fingerprint["lengths"] = hashlib.sha256(np.asarray(dataset.lengths).tobytes()).hexdigest()
        self.files: dict[str, str] = files
        self.validation: Validation | None = validation
        self.summary = summary
        self.downstream: tuple[Stage, ...] = downstream
        self.progress = Progress()
        self.total_steps = self.config.max_steps or self.config.max_epochs * dataset.steps_per_epoch
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
        self.meter = _Meter(run.device)
        self.models = {phase.name: run.distribute(phase.module) for phase in phases}
        self.final_path = run.save_dir / run.stage.final
        self.saved_step = -1
        self.new_bad_rows: dict[str, str] = {}  # of this process, not yet told to the others
        self.new_notes: list[str] = []  # on rows that are used, likewise
        self.notes: set[str] = set()  # of all processes
        self.overdue = False  # a batch did not come in time

    # The story ---------------------------------------------------------------------------------------------------

    def run_to_the_end(self) -> dict[str, float]:
        run, config, progress = self.run, self.config, self.progress
        if run.rank > 0:
            seed_everything(config.seed + run.rank)  # the same weights everywhere, but other dropout
        harmless = self._resume()
        if progress.step >= self.total_steps and (metrics := run.from_main(self._metrics_of_final)):
            run.log(f"already finished at step {progress.step}: {self.final_path}")
            return metrics
        self._refuse_to_extend()
        run.open_logs(progress.step, validated=progress.validated_step == progress.step)
        self._announce(harmless)
        run.logs.start_bar(self.total_steps, progress.step)
        self._tick()
        self._validate_and_save()  # a run that was stopped in its validation takes it up again
        steps = self._steps()  # a name keeps the loader while an error is on its way: to take it apart may take long
        for micro_batches in steps:
            # asked here, where no process has begun the step: if one has no batch for it, all of them can stop
            if run.stop_agreed(None in micro_batches):
                self._stop()
            self._train_step(micro_batches)
            progress.step += 1
            if run.logs.bar is not None:
                run.logs.bar.update()
            if progress.step % config.print_freq == 0 or progress.step == self.total_steps:
                self._report()
            elif run.device.type == "cpu":
                self._check_finite()  # costs nothing where there is no device to wait for
            self._validate_and_save()
        return self._finish()

    def _steps(self) -> Iterator[list[dict | None]]:
        """The micro-batches of each step from the present one on, with a new loader for every epoch; None for one that
        does not come."""
        dataset, progress, accumulation = self.dataset, self.progress, self.dataset.accumulation
        while progress.step < self.total_steps:
            dataset.skip_samples = progress.step * dataset.samples_per_step
            batches = arriving(build_loader(dataset, self.config, self.run.device), self._give_up)
            start_batch_idx = progress.step % dataset.steps_per_epoch
            for _ in range(start_batch_idx, dataset.steps_per_epoch):
                yield [next(batches) for _ in range(accumulation)]
                if progress.step >= self.total_steps:
                    return

    def _give_up(self, waited_s: float) -> bool:
        self.overdue = waited_s >= self.config.loader_timeout_s
        return self.overdue or self.run.stop_requested

    # One step ----------------------------------------------------------------------------------------------------

    def _train_step(self, micro_batches: list[dict]) -> None:
        run, world = self.run, self.run.world
        for batch in micro_batches:
            self._note_bad_rows(batch)
            if batch["rows"] and not batch["n_targets"]:
                where, why = list(batch["bad_rows"].items())[-1]
                # only this process knows of it, and what a user gave wrong is printed by the first one alone
                error = UserError if run.is_main else RunError
                raise error(f"{where}: {why}. Nor can the {len(batch['bad_rows']) - 1} rows before it be used")
        rng_before = rng_state(run.device) if len(micro_batches) > 1 else None
        # The loss of a step is the mean over its targets, however they fall into micro-batches and processes.
        sums = [(batch["n_targets"], batch.get("n_tokens", batch["n_targets"])) for batch in micro_batches]
        total, units = run.sum_over_ranks(torch.tensor(sums, dtype=torch.float64).sum(dim=0)).tolist()
        shares = [batch["n_targets"] / total for batch in micro_batches]
        micro_batches = [to_device(batch, run.device) | {"step": self.progress.step} for batch in micro_batches]
        finite = torch.ones((), device=run.device)
        phases = self.begun_phases()
        for phase in phases:
            model = self.models[phase.name]
            phase.module.train()
            phase.optimizer.zero_grad(set_to_none=True)
            set_lr(phase.optimizer, self._learning_rate(phase))
            label = f"{phase.name}_" if len(self.phases) > 1 else ""
            loss_sum = torch.zeros((), device=run.device)
            logged = []
            for index, (batch, share) in enumerate(zip(micro_batches, shares, strict=True)):
                if share == 0 and world == 1:
                    continue  # the unfilled end of an epoch's last step
                if run.stop_requested and index > 0 and phase is phases[0] and world == 1:
                    # nothing was updated yet: give up this step, as if it had not begun
                    phase.optimizer.zero_grad(set_to_none=True)
                    set_rng_state(rng_before, run.device)
                    self._stop()
                last = index == len(micro_batches) - 1
                if world > 1:
                    model.require_backward_grad_sync = last
                with run.deterministic_kernels():
                    with run.autocast():
                        loss, scalars = phase.loss(model, batch)
                    # DDP averages over processes; the shares are of the sum over all of them
                    self.scaler.scale(loss * (share * world)).backward()
                loss_sum += loss.detach() * share
                logged.append(({f"{label}{name}": value for name, value in scalars.items()}, share))
            loss_sum = run.sum_over_ranks(loss_sum)
            norm, ok = self._update(phase, loss_sum)
            if phase.after_update is not None:
                phase.after_update(ok)
            finite = finite * ok
            # an update that was not made leaves no mark in the averages either
            logged.append(({f"{label}loss": loss_sum / world, f"{label}grad_norm": norm / world}, 1.0))
            for scalars, share in logged:
                self.meter.add(scalars, share * ok)
        self.scaler.update()
        self.meter.count(finite, units, sum(len(batch["rows"]) for batch in micro_batches) * world)

    def _update(self, phase: Phase, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and apply the gradients, unless loss or gradient is not finite; all of it on the device.

        Returns:
            The gradient's norm before clipping, and 1.0 if the update was made, else 0.0.
        """
        parameters = [p for group in phase.optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if self.scaler.is_enabled():
            # an infinite loss can have finite gradients: spoil them, so that the scaler skips the update as well
            torch._foreach_mul_(gradients, torch.where(torch.isfinite(loss), 1.0, float("nan")))
            self.scaler.unscale_(phase.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm, foreach=True)
        ok = (torch.isfinite(norm) & torch.isfinite(loss)).float()
        if self.scaler.is_enabled():
            self.scaler.step(phase.optimizer)
        else:
            phase.optimizer.found_inf = 1.0 - ok  # a fused optimizer reads this: 1.0 leaves everything as it is
            phase.optimizer.step()
        return norm, ok

    def begun_phases(self) -> list[Phase]:
        return [phase for phase in self.phases if self.progress.step >= phase.first_step]

    def _learning_rate(self, phase: Phase) -> float:
        config = self.config
        return warmup_cosine(
            self.progress.step - phase.first_step,
            peak=phase.peak_lr,
            warmup_steps=config.warmup_steps,
            total_steps=self.total_steps - phase.first_step,
            min_ratio=config.min_lr_ratio,
        )

    # What is due after a step ------------------------------------------------------------------------------------

    def _validate_and_save(self) -> None:
        """Checkpoint and validation, if due at this step and not yet done: safe to call twice.

        The step is saved first: a validation that fails, or is killed, costs no step.
        """
        config, progress, step = self.config, self.progress, self.progress.step
        if step == 0:
            return
        at_end = step == self.total_steps
        judged = self.validation is not None and (step % config.val_freq == 0 or at_end)
        judged = judged and progress.validated_step != step
        epoch_ends = step % self.dataset.steps_per_epoch == 0
        due = judged or epoch_ends or at_end or step % config.checkpoint_freq == 0
        if due and self.saved_step != step:
            self._save()
            self._tick()
        if judged:
            self._validate()

    def _validate(self) -> bool:
        """Judge the model on the whole validation set, leaving no trace in training. Returns whether it is best."""
        run, progress, name = self.run, self.progress, self.run.stage.best_metric
        module = self.phases[-1].module
        totals: dict[str, Tensor] = {}
        module.eval()
        with (
            from_the_start(self.validation.dataset) as dataset,
            untouched_rng(run.device),
            torch.no_grad(),
            # its shapes would be compiled as well, in modes of their own, and no signal is looked at meanwhile
            torch.compiler.set_stance("force_eager"),
        ):
            batches = arriving(build_loader(dataset, self.config, run.device), self._give_up)
            for batch in batches:
                if stopping := run.stop_agreed(batch is None):
                    break
                self._note_bad_rows(batch)
                if not batch["n_targets"]:
                    continue
                batch = to_device(batch, run.device) | {"step": progress.step}
                with run.autocast():
                    sums = self.validation.sums(module, batch)
                for key, value in sums.items():
                    totals[key] = totals.get(key, 0.0) + value.double().cpu()
        if stopping:
            self._stop()  # out here, where the random states are those of training; the next run validates again
        self._share_bad_rows()
        shapes: dict[str, tuple] = {}  # a process may have had no batch of its own
        for found in run.gather({key: tuple(value.shape) for key, value in totals.items()}):
            shapes |= found
        if not shapes:
            raise UserError("validation: not one row of the held-out data can be used")
        for key, shape in sorted(shapes.items()):
            total = run.sum_over_ranks(totals.get(key, torch.zeros(shape, dtype=torch.float64)))
            totals[key] = total if shape else total.item()
        try:
            metrics = self.validation.metrics(totals)
        except ZeroDivisionError:  # a mean over nothing
            metrics = {}
        if name not in metrics:
            raise UserError(f"validation: not one of the held-out rows that {name} is measured on can be used")
        progress.metrics, progress.validated_step = metrics, progress.step
        best = progress.best_metrics.get(name, math.inf)
        improved = math.isfinite(metrics[name]) and not metrics[name] >= best  # an older version's best may be nan
        if improved:
            progress.best_step, progress.best_metrics = progress.step, metrics
        epoch = (progress.step - 1) // self.dataset.steps_per_epoch
        run.logs.record("val", progress.step, epoch, metrics)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        run.log(f"step {progress.step}  validation: {shown}" + ("  (best)" if improved else ""))
        if wrong := [key for key, value in metrics.items() if not math.isfinite(value)]:
            no_best = f"; without {name} it cannot be the best" if name in wrong else ""
            run.log(f"step {progress.step}: validation: not finite: {', '.join(wrong)}{no_best}")
        if run.is_main:
            path = checkpoint.step_path(run.save_dir, run.stage.prefix, progress.step)
            write_validated(run.save_dir, run.stage.prefix, progress, checkpoint.stated_digest(path))
        self._tick()
        return improved

    # Reports -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Start the throughput clock anew, so that validation and saving do not count as training time."""
        self.clock = (time.perf_counter(), self.progress.step, self.meter.samples, self.meter.targets)

    def _report(self) -> None:
        """The one place where the host waits for the device: averages since the last report, speed, time left."""
        run, progress = self.run, self.progress
        averages = self.meter.averages(run)
        self._check_finite()
        self._share_bad_rows()
        started, step, samples, targets = self.clock
        elapsed, steps = time.perf_counter() - started, max(1, progress.step - step)
        rates = {
            "samples_per_s": (self.meter.samples - samples) / elapsed,
            f"{run.stage.unit}_per_s": (self.meter.targets - targets) / elapsed,
        }
        self._tick()
        epoch = (progress.step - 1) // self.dataset.steps_per_epoch
        progress.step -= 1  # the rate that the last step was made with
        lr = {f"{p.name}_lr" if len(self.phases) > 1 else "lr": self._learning_rate(p) for p in self.begun_phases()}
        progress.step += 1
        values = averages | lr | rates | {"peak_memory_gb": peak_memory_gb(run.device)}
        counts = {"skipped_updates": progress.skipped_updates, "bad_rows": len(progress.bad_rows)}
        run.logs.record("train", progress.step, epoch, values | counts)
        left = tqdm.format_interval(elapsed / steps * (self.total_steps - progress.step))
        shown = "  ".join(f"{key} {value:.4g}" for key, value in (averages | lr).items())
        speed = f"{rates[f'{run.stage.unit}_per_s']:,.0f} {run.stage.unit}/s  {values['peak_memory_gb']:.2f} GB"
        run.log(f"step {progress.step}/{self.total_steps}  epoch {epoch}  {shown}  {speed}  left {left}")
        if run.logs.bar is not None:
            run.logs.bar.set_postfix({key: f"{value:.3g}" for key, value in averages.items() if "loss" in key})

    def _check_finite(self) -> None:
        progress, limit = self.progress, self.config.max_nonfinite_steps
        skipped, in_a_row = self.meter.skipped_counts()
        if skipped > progress.skipped_updates:
            self.run.log(f"step {progress.step}: loss or gradient not finite, no update ({skipped} so far)")
        progress.skipped_updates, progress.skipped_in_a_row = skipped, in_a_row
        if in_a_row >= limit:
            files = checkpoint.step_files(self.run.save_dir, self.run.stage.prefix)
            good = files[0][1] if files else "none"
            raise RunError(
                f"step {progress.step}: loss not finite in {in_a_row} steps in a row (max_nonfinite_steps {limit}). "
                f"Last good checkpoint: {good}. Try a lower lr, more warmup_steps, or use_amp false"
            )

    def _note_bad_rows(self, batch: dict) -> None:
        self.new_bad_rows |= batch.get("bad_rows", {})
        self.new_notes += batch["notes"]
        if (self.new_bad_rows or self.new_notes) and self.run.world == 1:
            self._share_bad_rows()

    def _share_bad_rows(self) -> None:
        """Name each bad row once, whichever process met it, and tell each note once.

        Raises:
            UserError: more of them than ``max_bad_rows``.
        """
        run, known, limit = self.run, self.progress.bad_rows, self.config.max_bad_rows
        for bad_rows, notes in run.gather((self.new_bad_rows, self.new_notes)):
            for where, why in bad_rows.items():
                if where not in known:
                    known[where] = why
                    run.log(f"{where}: {why}. Not used ({len(known)} so far)")
            for text in notes:
                if text not in self.notes:
                    self.notes.add(text)
                    if len(self.notes) <= _NOTES_SHOWN or len(self.notes) % 1000 == 0:
                        run.log(f"{text} (note {len(self.notes)})")
        self.new_bad_rows, self.new_notes = {}, []
        if len(known) > limit:
            raise UserError(
                f"{len(known)} rows of the data cannot be used, more than max_bad_rows {limit}; the first is "
                f"{next(iter(known))}: {next(iter(known.values()))}. Mend the data, or raise max_bad_rows"
            )

    def _announce(self, harmless: list[str]) -> None:
        run, dataset, progress = self.run, self.dataset, self.progress
        sizes = ", ".join(f"{p.name} {sum(w.numel() for w in p.module.parameters()) / 1e6:.2f} M" for p in self.phases)
        run.log(
            f"{run.stage.name}: parameters {sizes}; {len(dataset.source)} samples, {dataset.steps_per_epoch} steps per "
            f"epoch of {dataset.samples_per_step} samples; {self.total_steps} steps on {run.device} in "
            f"{str(run.amp_dtype or torch.float32).removeprefix('torch.')}, {run.world} process(es)"
        )
        if progress.step:
            start_epoch, start_batch_idx = divmod(progress.step, dataset.steps_per_epoch)
            run.log(f"resumed at step {progress.step}: epoch {start_epoch}, batch {start_batch_idx}")
        for line in harmless:
            run.log(f"config changed since the checkpoint: {line}")

    # Checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        run, progress = self.run, self.progress
        self._share_bad_rows()
        progress.skipped_updates, progress.skipped_in_a_row = self.meter.skipped_counts()
        rng = run.gather(rng_state(run.device))
        meter = run.gather(self.meter.state_dict())
        if run.is_main:
            path = checkpoint.step_path(run.save_dir, run.stage.prefix, progress.step)
            payload = {
                "format": checkpoint.FORMAT_VERSION,
                "stage": run.stage.name,
                "config": self.config.model_dump(),
                "architecture": _architecture(self.phases[-1].module),
                "data": self.fingerprint,
                "files": self.files,
                "world": run.world,
                "samples_per_step": self.dataset.samples_per_step,
                **vars(progress),
                "phases": {
                    phase.name: {
                        "module": phase.module.state_dict(),
                        "optimizer": phase.optimizer.state_dict(),
                        "schedule": {"peak_lr": phase.peak_lr, "lr": self._learning_rate(phase)},
                    }
                    for phase in self.phases
                },
                "scaler": self.scaler.state_dict(),
                "rng": rng,
                "meter": meter,
            }
            checkpoint.save(path, payload)
            checkpoint.prune(run.save_dir, run.stage.prefix, self.config.keep_checkpoints, progress.best_step)
        self.saved_step = progress.step
        run.barrier()

    def _resume(self) -> list[str]:
        """Take up the newest checkpoint, if any. Returns the harmless config changes, to be logged."""
        run, progress = self.run, self.progress
        payload = self._newest()
        if payload is None:
            if run.from_main(self.final_path.exists):
                return self._resume_from_final()
            return []
        path = checkpoint.step_path(run.save_dir, run.stage.prefix, payload["step"])
        harmless = self._check_resumable(path, payload)
        for phase in self.phases:
            saved = payload["phases"][phase.name]
            checkpoint.load_weights(phase.module, saved["module"], path)
            load_optimizer(phase.optimizer, saved["optimizer"], path)
        self.scaler.load_state_dict(payload["scaler"])
        for name in vars(progress):
            setattr(progress, name, payload[name])
        self.saved_step = progress.step
        if run.world == payload["world"]:
            set_rng_state(payload["rng"][run.rank], run.device)
            self.meter.load_state_dict(payload["meter"][run.rank])
        else:  # other processes: random states and averages have no owner, the count goes on
            self.meter.skipped += progress.skipped_updates
        return harmless

    def _newest(self) -> dict | None:
        """The newest step file, with what its validation found. The first process chooses it, and is the only one that
        sets damaged ones aside; the others read that file or none.

        Raises:
            RunError: this process reads other bytes than the first one.
        """
        run, folder, prefix = self.run, self.run.save_dir, self.run.stage.prefix
        payload = checkpoint.newest(folder, prefix, run.log) if run.is_main else None

        def chosen() -> tuple[int, bytes, dict] | None:
            if payload is None:
                return None
            step = payload["step"]
            digest = checkpoint.stated_digest(checkpoint.step_path(folder, prefix, step))
            return step, digest, read_validated(folder, prefix, digest)

        if (told := run.from_main(chosen)) is None:
            return None
        step, digest, validated = told
        if not run.is_main:
            path = checkpoint.step_path(folder, prefix, step)
            try:
                payload = checkpoint.load(path)
                if checkpoint.stated_digest(path) != digest:
                    raise checkpoint.DamagedCheckpoint("another file")
            except (OSError, checkpoint.DamagedCheckpoint) as error:
                raise RunError(f"{path}: process {run.rank} does not read what the first one reads: {error}") from error
        return payload | validated

    def _resume_from_final(self) -> list[str]:
        """Only the final file is left: the run is finished, or can no longer be extended."""
        stage = self.run.stage

        def read() -> dict:
            final = checkpoint.load_stage(self.run.save_dir, stage.name, stage.prefix, stage.final)
            return {key: value for key, value in final.items() if key != "model"}

        final = self.run.from_main(read)
        done = int(final["metrics"]["trained_steps"])
        if done < self.total_steps:
            raise UserError(
                f"{self.final_path}: finished at step {done}, and its step files are gone, so it cannot be extended "
                f"to {self.total_steps}. Use a new save_dir"
            )
        self.progress.step = done
        return self._check_resumable(self.final_path, final)

    def _refuse_to_extend(self) -> None:
        """
        Raises:
            UserError: this training is finished, and what was made of its model would not fit to a longer one's.
        """
        run, key = self.run, f"{self.run.stage.name}_steps"

        def made() -> str:
            files = sorted(file.name for stage in self.downstream for file in run.save_dir.glob(f"{stage.prefix}*.pt"))
            return files[0] if files and self._metrics_of_final() else ""

        if self.progress.step < self.total_steps and (found := run.from_main(made)):
            raise UserError(
                f"{self.final_path}: finished at step {self.progress.step}, and {found} was made of it, so "
                f"{key} cannot be {self.total_steps}. Use a new save_dir, or put {key} back to {self.progress.step}"
            )

    def _check_resumable(self, path, payload: dict) -> list[str]:
        """
        Raises:
            UserError: the checkpoint belongs to another training; the message lists each key, old and new.
        """
        run = self.run
        if payload["stage"] != run.stage.name:
            raise UserError(f"{path}: expected a checkpoint of stage {run.stage.name}, found {payload['stage']}")
        for name, digest in payload.get("files", {}).items():
            if self.files.get(name) != digest:
                raise UserError(f"{run.save_dir / name}: {checkpoint.not_sealed(path)}")
        refused, harmless = config_diff(type(self.config), payload["config"], self.config.model_dump())
        per_step, batch_size = payload.get("samples_per_step"), payload["config"]["batch_size"]
        if per_step not in (None, self.dataset.samples_per_step):  # None: a final file
            refused.append(f"samples per step: {per_step} -> {self.dataset.samples_per_step}")
        elif per_step and (payload["world"] != run.world or batch_size == self.config.batch_size):
            # the same samples per step, dealt out to other processes, or said with another key
            dealt = ("batch_size:", "gradient_accumulation_steps:")
            harmless += [line for line in refused if line.startswith(dealt)]
            refused = [line for line in refused if not line.startswith(dealt)]
        for key, value in payload.get("data", self.fingerprint).items():
            if self.fingerprint.get(key) != value:
                refused.append(f"data ({key}): {value[:12]} -> {self.fingerprint.get(key, 'absent')[:12]}")
        if refused:
            raise UserError(
                f"{path} is of another training: {'; '.join(refused)}. Use a new save_dir, or put these back"
            )
        return harmless

    # Ends --------------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        step = self.progress.step
        if step > 0 and self.saved_step != step:
            self._save()
        saved = f"saved in {self.run.save_dir}" if step > 0 else "before the first step was made"
        if self.overdue:
            raise RunError(
                f"{NO_BATCH.format(self.config.loader_timeout_s)}. Stopped at step {step}, {saved}. Run the same "
                "command to go on"
            )
        raise Interrupted(f"stopped at step {step}, {saved}. Run the same command to go on")

    def _metrics_of_final(self) -> dict[str, float] | None:
        """Of the final file of the present step, unless it is missing, damaged or older and must be written again."""
        try:
            metrics = checkpoint.load(self.final_path)["metrics"]
            return metrics if metrics["trained_steps"] == self.progress.step else None
        except FileNotFoundError:
            return None
        except checkpoint.DamagedCheckpoint as error:
            self.run.log(f"{self.final_path}: {error}. Writing it again from the last checkpoint")
            return None

    def _finish(self) -> dict[str, float]:
        """Write the final file, with the weights of the best validated step."""
        run, progress, phase = self.run, self.progress, self.phases[-1]
        step, metrics = run.from_main(self._take_best)
        metrics = metrics | self.summary | {"trained_steps": progress.step}
        if run.is_main:
            payload = {
                "format": checkpoint.FORMAT_VERSION,
                "stage": run.stage.name,
                "config": self.config.model_dump(),
                "architecture": _architecture(phase.module),
                "files": self.files,
                "step": step,
                "metrics": metrics,
                "model": phase.module.state_dict(),
            }
            checkpoint.save(self.final_path, payload)
        run.barrier()
        run.log(f"finished: {self.final_path} holds the weights of step {step}")
        return metrics

    def _take_best(self) -> tuple[int, dict[str, float]]:
        """Load the weights of the best validated step, if that is another one. Returns the step and its metrics."""
        run, progress, phase = self.run, self.progress, self.phases[-1]
        if progress.best_step in (None, progress.step):
            return progress.step, progress.metrics
        path = checkpoint.step_path(run.save_dir, run.stage.prefix, progress.best_step)
        try:
            best = checkpoint.load(path)
        except (FileNotFoundError, checkpoint.DamagedCheckpoint) as error:
            run.log(f"{path}: the best checkpoint cannot be read ({error}); keeping the last step's weights")
            return progress.step, progress.metrics
        phase.module.load_state_dict(best["phases"][phase.name]["module"])
        return progress.best_step, progress.best_metrics


def _architecture(module: nn.Module) -> dict:
    """What the module was built from, as plain data."""
    return module.architecture.model_dump() if hasattr(module, "architecture") else {}


class _Meter:
    """Running averages on the device; read only where the host has to wait anyway."""

    def __init__(self, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}
        self.updates = torch.zeros((), device=device)  # made since the last report
        self.samples = self.targets = 0  # since this process started
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)

    def add(self, scalars: dict[str, Tensor], share: Tensor) -> None:
        for name, value in scalars.items():
            value = torch.where(share > 0, value.detach() * share, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def count(self, finite: Tensor, targets: float, samples: int) -> None:
        self.targets += targets
        self.samples += samples
        self.updates = self.updates + finite
        self.skipped = self.skipped + (1 - finite)
        self.in_a_row = (self.in_a_row + 1) * (1 - finite)

    def skipped_counts(self) -> tuple[int, int]:
        return int(self.skipped), int(self.in_a_row)

    def averages(self, run: Run) -> dict[str, float]:
        """Means over the updates made since the last call, over all processes; starts anew. Those of a phase that has
        begun since are spread over all these updates."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        values = run.sum_over_ranks(torch.stack([self.sums[name] for name in names]).float()).tolist()
        updates = max(1.0, float(self.updates))
        self.sums, self.updates = {}, torch.zeros_like(self.updates)
        return {name: value / updates for name, value in zip(names, values, strict=True)}

    def state_dict(self) -> dict:
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"sums": sums} | {name: float(getattr(self, name)) for name in ("updates", "skipped", "in_a_row")}

    def load_state_dict(self, state: dict) -> None:
        device = self.skipped.device
        self.sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        for name in ("updates", "skipped", "in_a_row"):
            setattr(self, name, torch.tensor(state[name], device=device))


def to_device(batch: dict, device: torch.device) -> dict:
    """Tensors to the device without waiting for them; everything else as it is."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
