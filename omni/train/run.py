"""Folder, device, signals, logs and processes of a training, the same in all stages."""

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from omni.common import files, streams
from omni.common.caches import cached_json
from omni.common.errors import EXIT_INTERRUPTED, BadRow, Interrupted, RunError, UserError
from omni.common.files import file_sha256, read_sealed_json, replace_file
from omni.common.host import STOP_SIGNALS
from omni.common.lock import FolderLock
from omni.train import checkpoint, processes
from omni.train.cli import raise_open_file_limit
from omni.train.config import StageConfig
from omni.train.device import keep_kernels, pick_amp_dtype, pick_device, seed_everything
from omni.train.logs import Logs
from omni.train.stage import Stage


class Run(processes.Processes):
    """One process's part in one training. A context manager.

    Entering creates ``save_dir`` and takes its lock (rank 0), starts ``torch.distributed`` under torchrun, and
    catches SIGINT, SIGTERM and SIGHUP. Log files are opened by ``open_logs`` only.

    Raises:
        UserError: ``save_dir`` cannot be written, or another process works in it.
    """

    def __init__(self, config: StageConfig, stage: Stage, notices: list[str] = (), device: str = "auto") -> None:
        super().__init__()
        self.config, self.stage, self.save_dir = config, stage, Path(config.save_dir)
        self.device = pick_device(device)
        if self.device.type == "cpu":
            keep_kernels()
        self.amp_dtype = pick_amp_dtype(config.use_amp, self.device)
        self.stop_requested = self._asked_to_stop = False
        self.lock: FolderLock | None = None
        self.logs = Logs(self.save_dir, self.is_main)
        self._is_part = False
        self._notices = list(notices)
        if config.use_amp and self.amp_dtype is None:
            self._notices.append(f"use_amp: {self.device} has no fast half-precision arithmetic, using float32")
        _ = self.accumulation_steps  # raises before anything is written
        if config.num_workers:
            raise_open_file_limit()

    def __enter__(self) -> "Run":
        if self.is_main:
            try:
                self.save_dir.mkdir(parents=True, exist_ok=True)
                self._refuse_other_stage()
                self.lock = FolderLock(self.save_dir)
            except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
                reason = getattr(error, "strerror", None) or error
                if isinstance(error, FileExistsError):
                    reason = "expected a folder, found a file"
                raise UserError(f"{self.save_dir}: cannot write to save_dir: {reason}") from error
        caught = [s for s in STOP_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup
        self._old_handlers = {s: signal.signal(s, self._on_signal) for s in caught}
        if self.world > 1:
            self.meet(self.device, max(processes.EXCHANGE_S, self.config.loader_timeout_s + processes.EXCHANGE_S // 5))
            self._check_shared_folders()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            if self.config.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True, warn_only=True)
                torch.utils.deterministic.fill_uninitialized_memory = False
        seed_everything(self.config.seed)
        for line in self._notices:
            self.log(line)
        return self

    def _refuse_other_stage(self) -> None:
        """
        Raises:
            UserError: ``save_dir`` has step files of another stage, whose tokenizer and logs have the same names.
        """
        own = {self.stage.prefix, *self.stage.parts}
        for path in sorted(self.save_dir.glob("*_step_*.pt")):
            if (found := re.fullmatch(r"(.+)_step_\d+\.pt", path.name)) and found[1] not in own:
                raise UserError(f"{path}: is of another stage than {self.stage.name}. Give each stage its own save_dir")

    def _check_shared_folders(self) -> None:
        cache_dir = self.config.cache_dir
        try:
            self.check_shared(self.save_dir, may_be_read_only=False)
            if cache_dir is not None:  # a complete cache may be read-only
                self.check_shared(Path(cache_dir), may_be_read_only=True)
        except UserError:
            if self.lock is not None:
                self.lock.release()
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, *_) -> None:
        # A run that was stopped is saved, and ends with its own exit code, whatever is sent to it meanwhile.
        stopped = isinstance(error, Interrupted)
        for number, handler in self._old_handlers.items():
            signal.signal(number, signal.SIG_IGN if stopped else handler)
        try:
            if isinstance(error, (UserError, RunError, Interrupted, BadRow)):
                self.logs.write(str(error))  # stderr may be closed
            self.logs.close()
        except OSError:
            if kind is None:  # else the error that ended the run is more useful
                raise
        finally:
            if self.lock is not None:
                self.lock.release()

    @contextlib.contextmanager
    def sub_stage(self, config: StageConfig, stage: Stage):
        """Inside the block, the run is another training in the same folder, with its own step files, final file and
        rows of metrics.jsonl: for a stage that trains several models in turn."""
        whole = self.config, self.stage, self._is_part
        self.config, self.stage, self._is_part = config, stage, True
        try:
            yield self
            self.logs.close()
        finally:
            self.config, self.stage, self._is_part = whole

    def import_stage(self, folder: str, stage: Stage, sizes: type[BaseModel]) -> dict[str, float]:
        """Copy the final file of ``stage`` from another folder to ``save_dir``, instead of training it.

        Returns:
            Its metrics.

        Raises:
            UserError: its ``sizes`` differ from the config's, or ``save_dir`` already contains another one.
        """
        source, target = Path(folder) / stage.final, self.save_dir / stage.final
        saved = checkpoint.load_stage(folder, stage.name, stage.prefix, stage.final)
        if saved["path"] != source:
            raise UserError(f"{source}: expected the final file of a finished training, found step files only")
        for key in sizes.model_fields:
            if saved["config"].get(key) != getattr(self.config, key):
                found, wanted = (json.dumps(value) for value in (saved["config"].get(key), getattr(self.config, key)))
                raise UserError(f"{source}: {key} is {found}, this config has {wanted}")
        with self.main_process_first():
            if target.exists() and file_sha256(target) != file_sha256(source):
                raise UserError(f"{target}: another {stage.name} than {source}. Use a new save_dir")
            if self.is_main and not target.exists():
                replace_file(target, lambda file: file.write(source.read_bytes()))
        return saved["metrics"]

    def open_logs(self, step: int, validated: bool) -> None:
        """See ``Logs.open``."""
        self.logs.open(self.stage.name, step, validated=validated, own_folder=self._is_part)

    def log(self, message: str) -> None:
        """See ``Logs.log``."""
        self.logs.log(message)

    # Signals -----------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, _frame) -> None:
        # torchrun repeats a Ctrl-C of the terminal, and a terminal and its shell both send SIGHUP, so a second such
        # signal means nothing
        if self._asked_to_stop and self.world == 1 and number != signal.SIGHUP:
            if files.temporary_in_progress is not None:
                files.temporary_in_progress.unlink(missing_ok=True)
            streams.write_at_once("stopped at once; the last saved checkpoint stands\n")
            os._exit(EXIT_INTERRUPTED)
        self._asked_to_stop |= number != signal.SIGHUP
        self.stop_requested = True
        streams.write_at_once(f"\n{signal.Signals(number).name}: saving at the next safe point, then stopping\n")

    def check_stop(self) -> None:
        """Stop resumable work outside the loop.

        Raises:
            Interrupted: the run was asked to stop.
        """
        if self.stop_requested:
            raise Interrupted("stopped while preparing. Run the same command to go on")

    def wait_for(self, function: Callable):
        """``function()``, computed in a thread, so that a signal is handled while a library works for minutes."""
        results: list = []
        failures: list[BaseException] = []

        def work() -> None:
            try:
                results.append(function())
            except BaseException as error:  # handed to the caller, below
                failures.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            self.check_stop()
        if failures:
            raise failures[0]
        return results[0]

    def stop_agreed(self, cannot_go_on: bool = False) -> bool:
        """Whether any process was asked to stop or cannot go on, the same answer in all."""
        return self.any_over_ranks(self.stop_requested or cannot_go_on)

    # Data -------------------------------------------------------------------------------------------------------------

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per step and process.

        Raises:
            UserError: ``samples_per_step`` does not divide evenly between the processes.
        """
        samples, batch_size = self.config.samples_per_step, self.config.batch_size
        if samples is None:
            return self.config.gradient_accumulation_steps
        steps, rest = divmod(samples, batch_size * self.world)
        if rest or not steps:
            shares = samples // batch_size if samples % batch_size == 0 else 0
            fitting = [str(n) for n in range(1, min(shares, 4096) + 1) if shares % n == 0]
            remedy = (
                f"can be dealt out to {', '.join(fitting)} processes" if fitting else "is no multiple of batch_size"
            )
            raise UserError(
                f'key "samples_per_step": expected a multiple of batch_size {batch_size} x {self.world} processes, '
                f"found {samples}, which {remedy}"
            )
        return steps

    def cached_json(self, name: str, belongs_to: dict, make: Callable[[], dict]) -> dict:
        """``make()``, cached in ``save_dir`` as ``name``; computed again if damaged or if ``belongs_to`` changes.

        Args:
            belongs_to: inputs of the result, as plain data.
            make: called in the first process; its result is plain data.
        """
        with self.main_process_first():
            if self.is_main:
                return cached_json(self.save_dir / name, belongs_to, make, self.log)
            return read_sealed_json(self.save_dir / name)["result"]

    # Numerics ----------------------------------------------------------------------------------------------------

    def autocast(self):
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    @contextlib.contextmanager
    def deterministic_kernels(self):
        """Inside the block, a nondeterministic GPU kernel is an error, unless the config allows it.

        Outside it only causes a warning, as no weight depends on it. In training a warning is not enough: fused
        attention takes its deterministic kernels only where the others are an error.
        """
        if self.device.type != "cuda" or not self.config.deterministic:
            yield
            return
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move to the device and compile in place, so that the state dict's keys stay plain."""
        module.to(self.device)
        if self.config.use_compile:
            module.compile(dynamic=False)
        return module
