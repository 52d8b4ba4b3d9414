"""Save a training, resume it, refuse an incompatible one, and write the final file."""

import re
from pathlib import Path

from torch import nn

from omni.common.errors import RunError, UserError
from omni.train import checkpoint
from omni.train.config import StageConfig, config_diff
from omni.train.device import rng_state, set_rng_state
from omni.train.optim import load_optimizer
from omni.train.progress import read_validated
from omni.train.run import Run
from omni.train.training import Training

_DEALT = ("batch_size:", "gradient_accumulation_steps:")  # may change where a step keeps its samples


class Checkpoints:
    """The files of a training in ``save_dir``: step files, and the final file with the best step's weights."""

    def __init__(self, training: Training) -> None:
        self.training, self.run = training, training.run
        self.final_path = self.run.save_dir / self.run.stage.final
        self.saved_step = -1

    # Step files --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        training, run, progress = self.training, self.run, self.training.progress
        progress.skipped_updates, progress.skipped_in_a_row = training.meter.skipped_counts()
        rng = run.gather(rng_state(run.device))
        meter = run.gather(training.meter.state_dict())
        if run.is_main:
            path = checkpoint.step_path(run.save_dir, run.stage.prefix, progress.step)
            payload = self._facts() | {
                "data": training.fingerprint,
                "world": run.world,
                "samples_per_step": training.dataset.samples_per_step,
                **vars(progress),
                "phases": {
                    phase.name: {
                        "module": phase.module.state_dict(),
                        "optimizer": phase.optimizer.state_dict(),
                        "schedule": {
                            "peak_lr": phase.peak_lr,
                            "lr": training.learning_rate(phase, progress.step),
                        },
                    }
                    | ({} if phase.average is None else {"average": phase.average.state_dict()})
                    for phase in training.phases
                },
                "scaler": training.scaler.state_dict(),
                "rng": rng,
                "meter": meter,
            }
            checkpoint.save(path, payload)
            checkpoint.prune(run.save_dir, run.stage.prefix, training.config.keep_checkpoints, progress.best_step)
        self.saved_step = progress.step
        run.barrier()

    def resume(self) -> list[str]:
        """Resume from the newest checkpoint, if any.

        Returns:
            The harmless changes of the config, to be logged.

        Raises:
            UserError: the folder belongs to another training, or to one that cannot be extended.
        """
        training, run, progress = self.training, self.run, self.training.progress
        payload = self._newest()
        if payload is None:
            return self._resume_from_final() if run.from_main(self.final_path.exists) else []
        path = checkpoint.step_path(run.save_dir, run.stage.prefix, payload["step"])
        harmless = self._check_resumable(path, payload)
        for phase in training.phases:
            saved = payload["phases"][phase.name]
            checkpoint.load_weights(phase.module, saved["module"], path)
            load_optimizer(phase.optimizer, saved["optimizer"], path)
            if phase.average is not None:
                with checkpoint.understood(path):
                    phase.average.load(saved.get("average"), path)
        training.scaler.load_state_dict(payload["scaler"])
        for name in vars(progress):
            setattr(progress, name, payload[name])
        if added := sorted(training.fingerprint.keys() - payload["data"].keys()):
            # such as a codec, whose log-mels the vocoder now hears: figures of before measured something else
            progress.best_step, progress.best_metrics = None, {}
            run.log(f"data added since the checkpoint: {', '.join(added)}: the best step is chosen anew")
        self.saved_step = progress.step
        if run.world == payload["world"]:
            set_rng_state(payload["rng"][run.rank], run.device)
            training.meter.load_state_dict(payload["meter"][run.rank])
        else:  # another number of processes: random states and averages belong to none of them
            training.meter.skipped += progress.skipped_updates
        return harmless

    def _newest(self) -> dict | None:
        """The newest step file and the results of its validation. Only the first process chooses it and sets damaged
        ones aside; the others read that file or none.

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

        if (received := run.from_main(chosen)) is None:
            return None
        step, digest, validated = received
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
        stage, total_steps = self.run.stage, self.training.total_steps

        def read() -> dict:
            final = checkpoint.load_stage(self.run.save_dir, stage.name, stage.prefix, stage.final)
            return {key: value for key, value in final.items() if key != "model"}

        final = self.run.from_main(read)
        done = int(final["metrics"]["trained_steps"])
        if done < total_steps:
            raise UserError(
                f"{self.final_path}: finished at step {done}, and its step files are gone, so it cannot be extended "
                f"to {total_steps}. Use a new save_dir"
            )
        self.training.progress.step = done
        return self._check_resumable(self.final_path, final)

    # Refusals ----------------------------------------------------------------------------------------------------

    def _check_resumable(self, path: Path, payload: dict) -> list[str]:
        """The harmless changes of the config.

        Raises:
            UserError: the checkpoint belongs to another training; the message lists each key, old and new.
        """
        training, run, config = self.training, self.run, self.training.config
        if payload["stage"] != run.stage.name:
            raise UserError(f"{path}: expected a checkpoint of stage {run.stage.name}, found {payload['stage']}")
        for name, digest in payload.get("files", {}).items():
            if training.files.get(name) != digest:
                raise UserError(f"{run.save_dir / name}: {checkpoint.not_sealed(path)}")
        refused, harmless = config_diff(type(config), payload["config"], config.model_dump())
        refused += _changed_data(payload.get("data", {}), training.fingerprint)
        per_step, now = payload.get("samples_per_step"), training.dataset.samples_per_step
        if per_step not in (None, now):  # None: a final file
            refused.append(f"samples per step: {per_step} -> {now}")
        elif per_step and (payload["world"] != run.world or payload["config"]["batch_size"] == config.batch_size):
            # the same samples per step, dealt out to other processes, or given by another key
            harmless += [line for line in refused if line.startswith(_DEALT)]
            refused = [line for line in refused if not line.startswith(_DEALT)]
        _refuse(path, refused)
        return harmless

    def refuse_to_extend(self) -> None:
        """
        Raises:
            UserError: the training is finished and a later one used its model, so that it cannot be extended.
        """
        training, run, step = self.training, self.run, self.training.progress.step

        def made() -> str:
            prefixes = [stage.prefix for stage in training.downstream]
            files = sorted(file.name for prefix in prefixes for file in run.save_dir.glob(f"{prefix}*.pt"))
            return files[0] if files and self.finished_metrics() else ""

        if step < training.total_steps and (found := run.from_main(made)):
            key = f"{run.stage.name}_steps"
            raise UserError(
                f"{self.final_path}: finished at step {step}, and {found} depends on it, so "
                f"{key} cannot be {training.total_steps}. Use a new save_dir, or put {key} back to {step}"
            )

    # The final file ----------------------------------------------------------------------------------------------

    def finished_metrics(self) -> dict[str, float] | None:
        """Metrics of the present step's final file; None if it is missing, damaged or older, and must be written."""
        try:
            metrics = checkpoint.load(self.final_path)["metrics"]
            return metrics if metrics["trained_steps"] == self.training.progress.step else None
        except FileNotFoundError:
            return None
        except checkpoint.DamagedCheckpoint as error:
            self.run.log(f"{self.final_path}: {error}. Writing it again from the last checkpoint")
            return None

    def write_final(self) -> dict[str, float]:
        """Write the final file, with the weights of the best validated step. Returns its metrics."""
        training, run, average = self.training, self.run, self.training.phases[-1].average
        step, metrics = run.from_main(self._take_best)
        if average is not None:
            average.install()
        metrics = metrics | training.summary | {"trained_steps": training.progress.step}
        if run.is_main:
            model = {"step": step, "metrics": metrics, "model": training.phases[-1].module.state_dict()}
            checkpoint.save(self.final_path, self._facts() | model)
        run.barrier()
        bad = f"; {count:,} rows could not be used" if (count := len(training.progress.bad_rows)) else ""
        mean = "" if average is None else ", their running mean"
        run.log(f"finished: {self.final_path} holds the weights of step {step}{mean}{bad}")
        return metrics

    def _take_best(self) -> tuple[int, dict[str, float]]:
        """Load the weights of the best validated step, if that is another one. Returns the step and its metrics."""
        run, progress, phase = self.run, self.training.progress, self.training.phases[-1]
        if progress.best_step in (None, progress.step):
            return progress.step, progress.metrics
        path = checkpoint.step_path(run.save_dir, run.stage.prefix, progress.best_step)
        try:
            best = checkpoint.load(path)
        except (FileNotFoundError, checkpoint.DamagedCheckpoint) as error:
            run.log(f"{path}: the best checkpoint cannot be read ({error}); keeping the last step's weights")
            return progress.step, progress.metrics
        with checkpoint.understood(path):
            saved = best["phases"][phase.name]
            phase.module.load_state_dict(saved["module"])
            if phase.average is not None:
                phase.average.load(saved.get("average"), path)
        return progress.best_step, progress.best_metrics

    def _facts(self) -> dict:
        """Entries of step files and the final file."""
        return {
            "format": checkpoint.FORMAT_VERSION,
            "stage": self.run.stage.name,
            "config": self.training.config.model_dump(),
            "architecture": _architecture(self.training.phases[-1].module),
            "files": self.training.files,
        }


def refuse_another_training(run: Run, config: StageConfig, known: dict[str, str]) -> None:
    """Refuse a folder of another training before what is kept there is made anew, and not only when it resumes.

    Args:
        known: the fingerprint of the data, as far as it is known by now.

    Raises:
        UserError: as ``Checkpoints.resume``.
    """

    def look() -> None:
        payload = checkpoint.newest(run.save_dir, run.stage.prefix, run.log)
        if payload is not None and payload["stage"] == run.stage.name:
            refused, _ = config_diff(type(config), payload["config"], config.model_dump())
            refused = [line for line in refused if not line.startswith(_DEALT)]
            refused += _changed_data({key: payload["data"][key] for key in known if key in payload["data"]}, known)
            _refuse(checkpoint.step_path(run.save_dir, run.stage.prefix, payload["step"]), refused)

    run.from_main(look)


def _changed_data(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    changed = {key: (value, now.get(key, "absent")) for key, value in saved.items() if now.get(key) != value}
    return [f"data ({key}): {_shown(before)} -> {_shown(after)}" for key, (before, after) in changed.items()]


def _refuse(path: Path, changes: list[str]) -> None:
    """Raises UserError if there are ``changes``."""
    if changes:
        raise UserError(f"{path} is of another training: {'; '.join(changes)}. Use a new save_dir, or put these back")


def _architecture(module: nn.Module) -> dict:
    """The module's architecture as plain data."""
    return module.architecture.model_dump()


def _shown(version: str) -> str:
    """A SHA-256 by its first digits, and a version whole, as its end may be what has changed."""
    return version[:12] if re.fullmatch("[0-9a-f]{64}", version) else version
