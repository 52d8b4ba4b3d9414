"""Reports of a training while it runs: averages, speed, time left, skipped updates, rows that cannot be used."""

import time

import torch
from tqdm import tqdm

from omni.common.errors import RunError, UserError
from omni.train import checkpoint
from omni.train.device import peak_memory_gb
from omni.train.training import Training

_NOTES_SHOWN = 20  # logged notes on odd but usable rows; all are counted


class Report:
    def __init__(self, training: Training) -> None:
        self.training = training
        self.new_bad_rows: dict[str, str] = {}  # of this process, not yet sent to the others
        self.new_notes: list[str] = []  # on odd but usable rows, likewise
        self.notes: set[str] = set()  # of all processes
        self.restart_clock()

    def announce(self, harmless: list[str]) -> None:
        """The first lines of a run; ``harmless``: changes of the config since the checkpoint."""
        run, dataset, step = self.training.run, self.training.dataset, self.training.progress.step
        sizes = ", ".join(
            f"{phase.name} {sum(w.numel() for w in phase.module.parameters()) / 1e6:.2f} M"
            for phase in self.training.phases
        )
        run.log(
            f"{run.stage.name}: parameters {sizes}; {len(dataset.source)} samples, {dataset.steps_per_epoch} steps per "
            f"epoch of {dataset.samples_per_step} samples; {self.training.total_steps} steps on {run.device} in "
            f"{str(run.amp_dtype or torch.float32).removeprefix('torch.')}, {run.world} process(es)"
        )
        for phase in self.training.phases:
            steps = self.training.total_steps - phase.first_step
            if 0 < steps <= run.config.warmup_steps:
                run.log(
                    f"{phase.name}: warmup_steps {run.config.warmup_steps}, and only {steps} steps: the learning rate "
                    f"rises to the end, to {self.training.learning_rate(phase, self.training.total_steps - 1):.2g} of "
                    f"{phase.peak_lr:.2g}"
                )
        if step:
            start_epoch, start_batch_idx = divmod(step, dataset.steps_per_epoch)
            run.log(f"resumed at step {step}: epoch {start_epoch}, batch {start_batch_idx}")
        for line in harmless:
            run.log(f"config changed since the checkpoint: {line}")

    # Averages and rates ------------------------------------------------------------------------------------------

    def restart_clock(self) -> None:
        """Measure throughput from now on, so that validation and saving do not count as training time."""
        meter = self.training.meter
        self._clock = (time.perf_counter(), self.training.progress.step, meter.samples, meter.targets)

    def averages(self) -> None:
        """Log averages since the last report, speed and time left. The host waits for the device."""
        training, run, progress, meter = self.training, self.training.run, self.training.progress, self.training.meter
        averages = meter.averages(run)
        self.check_finite()
        self.share_rows()
        started, step, samples, targets = self._clock
        elapsed, steps = time.perf_counter() - started, max(1, progress.step - step)
        rates = {
            "samples_per_s": (meter.samples - samples) / elapsed,
            f"{run.stage.unit}_per_s": (meter.targets - targets) / elapsed,
        }
        self.restart_clock()
        made = progress.step - 1  # the step that was made last
        label = "{}_lr" if len(training.phases) > 1 else "lr"
        lr = {label.format(p.name): training.learning_rate(p, made) for p in training.begun_phases(made)}
        values = averages | lr | rates | {"peak_memory_gb": peak_memory_gb(run.device)}
        counts = {"skipped_updates": progress.skipped_updates, "bad_rows": len(progress.bad_rows)}
        run.logs.record("train", progress.step, training.last_epoch, values | counts)
        left = tqdm.format_interval(elapsed / steps * (training.total_steps - progress.step))
        shown = "  ".join(f"{key} {value:.4g}" for key, value in (averages | lr).items())
        speed = f"{rates[f'{run.stage.unit}_per_s']:,.0f} {run.stage.unit}/s  {values['peak_memory_gb']:.2f} GB"
        step = f"step {progress.step}/{training.total_steps}  epoch {training.last_epoch}"
        run.log(f"{step}  {shown}  {speed}  left {left}")
        if run.logs.bar is not None:
            run.logs.bar.set_postfix({key: f"{value:.3g}" for key, value in averages.items() if "loss" in key})

    def check_finite(self) -> None:
        """
        Raises:
            RunError: too many updates in a row were skipped.
        """
        run, progress, limit = self.training.run, self.training.progress, self.training.config.max_nonfinite_steps
        skipped, in_a_row = self.training.meter.skipped_counts()
        if skipped > progress.skipped_updates:
            run.log(f"step {progress.step}: loss or gradient not finite, no update ({skipped} so far)")
        progress.skipped_updates, progress.skipped_in_a_row = skipped, in_a_row
        if in_a_row >= limit:
            files = checkpoint.step_files(run.save_dir, run.stage.prefix)
            good = files[0][1] if files else "none"
            raise RunError(
                f"step {progress.step}: loss not finite in {in_a_row} steps in a row (max_nonfinite_steps {limit}). "
                f"Last good checkpoint: {good}. Try a lower lr, more warmup_steps, or use_amp false"
            )

    # Rows --------------------------------------------------------------------------------------------------------

    def note_rows(self, batch: dict) -> None:
        self.new_bad_rows |= batch.get("bad_rows", {})
        self.new_notes += batch["notes"]
        if (self.new_bad_rows or self.new_notes) and self.training.run.world == 1:
            self.share_rows()

    def share_rows(self) -> None:
        """Log each bad row and each note once, whichever process met it.

        Raises:
            UserError: more bad rows than ``max_bad_rows``.
        """
        run, known, limit = self.training.run, self.training.progress.bad_rows, self.training.config.max_bad_rows
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
