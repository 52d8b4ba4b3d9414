"""What a run needs around its loop: command line, device, seeds, lock, signals, logs, progress bar, processes.

``launch(main)`` turns the project's errors into one line and an exit code; ``Run`` owns one ``save_dir`` for as long
as the process lives. Nothing here knows which stage it serves.
"""

import argparse
import contextlib
import datetime
import errno
import faulthandler
import fcntl
import json
import multiprocessing
import os
import random
import resource
import secrets
import signal
import socket
import stat
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import nn
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from omni import allocator, checkpoint, files, streams
from omni.caches import cached_json
from omni.config import StageConfig, load_config
from omni.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, Interrupted, RunError, UserError
from omni.files import file_sha256, read_sealed_json, remove_temporary, replace_file
from omni.media import visible


@dataclass(frozen=True)
class Stage:
    """What distinguishes a stage to its surroundings: names and units, no behaviour."""

    name: str  # "text": stands in the checkpoint, so that another stage's file is refused
    prefix: str  # step files are <prefix>_step_<N>.pt
    final: str  # the final file
    unit: str  # what the throughput counts beside samples: "tokens"
    best_metric: str  # the validation metric that chooses the best checkpoint; smaller is better


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# ---------------------------------------------------------------------------------------------------------------
# Command line


_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# What only a path that somebody gave can be. Not ENOENT: a file that is gone may as well be our own fault.
_OUT_OF_FILES = (os.strerror(errno.EMFILE), "items of ancdata")  # the second: what could not be passed to us
_WRONG_PATH = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EROFS)


_WORKERS_FILES = 256  # open files with which loader workers have enough


def launch(main: Callable[[], None]) -> None:
    """Run ``main`` and exit: 0 finished, 1 failed, 2 bad input, 75 interrupted (saved; run the same line again)."""
    streams.secure()
    faulthandler.enable()  # a crash inside a library says where
    threading.excepthook = _thread_failed
    # What the frames of an error hold, a data loader among it, is not taken apart: that would wait for its workers,
    # and one of them may hang.
    held: list[BaseException] = []

    def hold() -> None:
        try:
            main()
            sys.stdout.flush()
        except BaseException as error:
            held.append(error)
            raise

    try:
        code = _exit_code(hold)
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # that a worker ends is no error any more
    workers = multiprocessing.active_children()
    for worker in workers:  # an error left them; they ignore SIGTERM, after which Python would wait for them for ever
        worker.kill()
    if workers or dist.is_initialized():
        # Not sys.exit, which would wait for what the loader of killed workers left, and take the process group apart:
        # gloo's destructor holds the interpreter while it waits for a thread that may be waiting for the interpreter.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _thread_failed(args) -> None:
    # TensorBoard writes in a thread; on a full disk the main one gets the same error at its next row, and tells it.
    # Where no file can be opened, the main one meets that itself.
    if not isinstance(args.exc_value, OSError) or args.exc_value.errno not in (*_DISK_FULL, errno.EMFILE):
        threading.__excepthook__(args)


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
        return 0
    except (UserError, RunError, Interrupted) as error:
        label = "" if isinstance(error, Interrupted) else "error: "
        # of what the user gave wrong, the others on the same machine say the same
        if isinstance(error, RunError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{label}{visible(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        reason = " ".join(str(error).split())
        if "does not have a deterministic implementation" in reason:
            what = reason.split(" does not have")[0]
            print(f'error: key "deterministic": expected false, as {what} adds up in any order', file=sys.stderr)
            return EXIT_BAD_INPUT
        if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in reason):
            what = "hangs" if "imed out" in reason else "has ended"
            print(
                f"error: process {dist.get_rank()}: another process of this run {what}. Run the same command to go on",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            return EXIT_FAILED
        if any(text in reason for text in _OUT_OF_FILES):
            return _out_of_files()
        passed_on = "in DataLoader worker process" in reason  # a fault of ours, with its traceback
        if not isinstance(error, RuntimeError) and multiprocessing.active_children():
            reason = f"a DataLoader worker died while it sent a batch: {reason}"
        if passed_on or "DataLoader worker" not in reason:
            raise
        print(f"error: {reason} (often out of memory). Run the same command to go on", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except KeyboardInterrupt:  # before the signal handlers stood, so there is nothing to save
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has left: be as quiet about it as any other tool
        streams.silence(sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        if error.errno == errno.EMFILE or _OUT_OF_FILES[0] in str(error):  # also as a data worker passes it on
            return _out_of_files()
        if error.errno not in (*_DISK_FULL, *_WRONG_PATH):
            raise
        full = error.errno in _DISK_FULL
        remedy = ". Make room, and run the same command again" if full else ""
        print(f"error: {error.filename or 'writing'}: {error.strerror}{remedy}", file=sys.stderr, flush=True)
        return EXIT_FAILED if full else EXIT_BAD_INPUT


def _out_of_files() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    remedy = "Raise the limit (ulimit -n), or lower num_workers, and run the same command again"
    print(f"error: more than {limit} open files, which is the limit of this process. {remedy}", file=sys.stderr)
    return EXIT_FAILED


def _open_files_for_workers() -> None:
    """Raise the limit of open files as far as this process may: each tensor that a loader's worker sends is one.

    Raises:
        UserError: that is not far enough. A worker that runs out of them prints a traceback of its own, or hangs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _WORKERS_FILES and soft != resource.RLIM_INFINITY:
        soft = _WORKERS_FILES if hard == resource.RLIM_INFINITY else min(hard, _WORKERS_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < _WORKERS_FILES:
            raise UserError(
                f'key "num_workers": expected 0 where a process may have {soft} open files, or a limit of at least '
                f"{_WORKERS_FILES} (ulimit -n)"
            )


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are those of the rest: one line, exit code 2."""

    def error(self, message: str) -> None:
        raise UserError(message)


def parse_stage_args(cls: type[StageConfig], description: str, argv: list[str] | None = None):
    """The command line that all stage scripts share.

    Returns:
        The config, and the notices to log once the log is open.
    """
    parser = OneLineErrors(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Interrupt it when you like (Ctrl-C, SIGTERM, even SIGKILL): the same line goes on where it stopped.\n"
        "Several GPUs: torchrun --nproc_per_node=N SCRIPT --config FILE.\n"
        "Several machines: save_dir, cache_dir and the data in folders that all of them see, under the same names.\n"
        "With samples_per_step, another number of processes goes on with the same samples in each step.\n"
        "Exit codes: 0 finished, 1 failed, 2 bad config or data, 75 interrupted and saved.\n\n"
        "Config keys (default):\n" + _describe_keys(cls),
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON config, see configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config; repeatable"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    if argv is None:  # this program is the process's own
        allocator.restart_with_settings()
    config, notices = load_config(cls, args.config, args.set)
    return config, notices, args.device


def _describe_keys(cls: type[StageConfig]) -> str:
    lines = []
    for name, field in cls.model_fields.items():
        default = "required" if field.is_required() else json.dumps(field.default)
        lines.append(f"  {name} ({default})" + (f": {field.description}" if field.description else ""))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Device and numerics


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the first GPU (under torchrun, this process's own), else the CPU."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise UserError(f"--device {name}: expected cpu, cuda or mps")
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        raise UserError(f"--device {name}: expected a device of this machine: {str(error).splitlines()[0]}") from error
    return device


def pick_amp_dtype(use_amp: bool, device: torch.device) -> torch.dtype | None:
    """bf16 where the hardware computes in it, fp16 on older GPUs, None (float32) elsewhere."""
    if not use_amp:
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else None
    return None


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict:
    """State of every generator that training may draw from, as tensors and plain data."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)  # seed and offset live on the host: no wait
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def untouched_rng(device: torch.device):
    """Whatever the block draws, the generators stand afterwards where they stood before."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the GPU's allocator, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts bytes, Linux kibibytes


# ---------------------------------------------------------------------------------------------------------------
# Lock


class FolderInUse(UserError):
    """Another process holds the folder's lock."""


def _open_lock(path: Path) -> TextIO:
    """Open or create a lock file: the number of the process that holds it, and nothing else."""
    try:
        # not through a link, and not waiting for the other end of a pipe
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise UserError(f"{path}: expected a lock file, found something else. Move it away") from error
    facts = os.fstat(number)
    # two names: the other one is somebody's file
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1 or os.pread(number, 32, 0).strip(b"0123456789"):
        os.close(number)
        raise UserError(f"{path}: expected the lock file of a run, found another program's. Move it away")
    return open(number, "r+", encoding="utf-8")


class FolderLock:
    """At most one process works in a folder.

    A POSIX record lock (``fcntl.lockf``) belongs to this process alone: data loader workers do not inherit it, so
    after a SIGKILL the folder is free at once, even while orphaned workers are still on their way out. Whoever takes
    it clears the partial files of those who were killed. A context manager that lets go of it at the end.

    Raises:
        FolderInUse: another process has it.
        UserError: ``.lock`` is something else than such a file, which is left as it is.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        while True:
            self.file = _open_lock(self.path)
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self.file.read().strip() or "unknown"
                self.file.close()
                raise FolderInUse(f"{folder}: already in use by process {holder}. Wait for it, or stop it") from None
            # the previous holder may have removed the file between our open and our lock
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(self.file.fileno()).st_ino == self.path.stat().st_ino:
                    break
            self.file.close()
        self.file.truncate(0)
        self.file.write(str(os.getpid()))
        self.file.flush()
        remove_temporary(folder)

    @classmethod
    def wait_for(cls, folder: Path, log: Callable[[str], None], check_stop: Callable[[], None]) -> "FolderLock":
        """The lock of ``folder``, as soon as whoever prepares data there has finished."""
        told = False
        while True:
            try:
                return cls(folder)
            except FolderInUse as error:
                if not told:
                    log(f"{error}: waiting")
                told = True
            check_stop()
            time.sleep(0.2)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()


# ---------------------------------------------------------------------------------------------------------------
# The run


_EXCHANGE_S = 600  # after which a process that does not join the others is taken to hang


class Run:
    """One process's part in one training: its folder, device, rank, logs and stop signal. A context manager.

    Entering creates ``save_dir`` and takes its lock (rank 0), starts ``torch.distributed`` under torchrun, and
    catches SIGINT, SIGTERM and SIGHUP. Log files are opened by ``open_logs`` only, so that a finished run changes no
    file.

    Raises:
        UserError: ``save_dir`` cannot be written, or another process works in it.
    """

    def __init__(self, config: StageConfig, stage: Stage, notices: list[str] = (), device: str = "auto") -> None:
        self.config, self.stage, self.save_dir = config, stage, Path(config.save_dir)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = pick_device(device)
        self.amp_dtype = pick_amp_dtype(config.use_amp, self.device)
        self.stop_requested = self._asked_to_stop = False
        self.bar: tqdm | None = None
        self.lock: FolderLock | None = None
        self._exchange: tuple | None = None
        self._patient: dist.ProcessGroup | None = None
        self._log_file = self._metrics_file = self._tensorboard = None
        self._is_part = False
        self._pending = list(notices)  # lines that wait for training.log to be opened
        if config.use_amp and self.amp_dtype is None:
            self._pending.append(f"use_amp: {self.device} has no fast half-precision arithmetic, using float32")
        _ = self.accumulation_steps  # refused now, before anything is written
        if config.num_workers:
            _open_files_for_workers()

    def __enter__(self) -> "Run":
        if self.is_main:
            try:
                self.save_dir.mkdir(parents=True, exist_ok=True)
                self.lock = FolderLock(self.save_dir)
            except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
                reason = getattr(error, "strerror", None) or error
                if isinstance(error, FileExistsError):
                    reason = "expected a folder, found a file"
                raise UserError(f"{self.save_dir}: cannot write to save_dir: {reason}") from error
        caught = [s for s in STOP_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup
        self._old_handlers = {s: signal.signal(s, self._on_signal) for s in caught}
        if self.world > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            seconds = max(_EXCHANGE_S, self.config.loader_timeout_s + _EXCHANGE_S // 5)
            self._meet(backend, datetime.timedelta(seconds=seconds))
            # the first process may prepare data for hours while the others wait
            self._patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=2))
            self._refuse_separate_folders()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            if self.config.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True, warn_only=True)
                torch.utils.deterministic.fill_uninitialized_memory = False
        seed_everything(self.config.seed)
        notices, self._pending = self._pending, []
        for line in notices:
            self.log(line)
        return self

    def _meet(self, backend: str, timeout: datetime.timedelta) -> None:
        """Find the other processes through what torchrun has put into the environment."""
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # torchrun's own store outlives a restart, and with it the addresses of processes that are dead. Several
            # machines count their restarts each for itself; they have a new store for each (--rdzv-backend=c10d).
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)

    def _refuse_separate_folders(self) -> None:
        """
        Raises:
            UserError: a process does not see what the first one writes: they are on machines with folders of their own.
        """
        for folder in map(Path, filter(None, (self.config.save_dir, self.config.cache_dir))):

            def write(folder: Path = folder) -> str:
                folder.mkdir(parents=True, exist_ok=True)
                name = f"shared.{secrets.token_hex(8)}{files.TEMPORARY_SUFFIX}"
                try:
                    (folder / name).open("x").close()
                except OSError:
                    if self.config.cache_dir is None or folder != Path(self.config.cache_dir):
                        raise
                    return "."  # a cache that is complete may be read-only: then the folder itself has to be there
                return name

            token = folder / self.from_main(write)
            blind = [host for host in self.gather("" if token.exists() else socket.gethostname()) if host]
            if self.is_main and token != folder:
                token.unlink()
            if blind:
                if self.lock is not None:
                    self.lock.release()
                raise UserError(
                    f"{folder}: a process on {blind[0]} does not see what the first one wrote there. "
                    "Several machines need a folder that all of them see"
                )

    def __exit__(self, kind: type | None, error: BaseException | None, *_) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        try:
            if isinstance(error, (UserError, RunError, Interrupted)) and self._log_file is not None:
                self._write_log(str(error))  # stderr may lead nowhere
            self._close_logs()
        except OSError:
            if kind is None:  # else the error on its way says more
                raise
        finally:
            if self.lock is not None:
                self.lock.release()

    @contextlib.contextmanager
    def part(self, config: StageConfig, stage: Stage):
        """Inside the block, the run is another training in the same folder, with step files, a final file and rows of
        metrics.jsonl of its own: for a stage that trains one model after the other."""
        whole = self.config, self.stage, self._is_part
        self.config, self.stage, self._is_part = config, stage, True
        try:
            yield self
            self._close_logs()
        finally:
            self.config, self.stage, self._is_part = whole

    def adopt(self, folder: str, stage: Stage, sizes: type[BaseModel]) -> dict[str, float]:
        """Put the final file of ``stage`` from another folder into ``save_dir``, in the place of training it.

        Returns:
            Its metrics.

        Raises:
            UserError: it has other ``sizes`` than the config says, or ``save_dir`` has another one already.
        """
        source, target = Path(folder) / stage.final, self.save_dir / stage.final
        saved = checkpoint.load_stage(folder, stage.name, stage.prefix, stage.final)
        if saved["path"] != source:
            raise UserError(f"{source}: expected the final file of a finished training, found step files only")
        for key in sizes.model_fields:
            if saved["config"].get(key) != getattr(self.config, key):
                found, wanted = saved["config"].get(key, "missing"), getattr(self.config, key)
                raise UserError(f"{source}: {key} is {found}, this config has {wanted}")
        with self.main_process_first():
            if target.exists() and file_sha256(target) != file_sha256(source):
                raise UserError(f"{target}: another {stage.name} than {source}. Use a new save_dir")
            if self.is_main and not target.exists():
                replace_file(target, lambda file: file.write(source.read_bytes()))
        return saved["metrics"]

    def _close_logs(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for stream in (self._tensorboard, self._metrics_file, self._log_file):
            if stream is not None:
                stream.close()
        self.bar = self._tensorboard = self._metrics_file = self._log_file = None

    # Signals -----------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, _frame) -> None:
        # torchrun passes on a Ctrl-C that the terminal has sent already, so there a second signal means nothing. Nor
        # does SIGHUP, which a terminal and its shell both send.
        if self._asked_to_stop and self.world == 1 and number != signal.SIGHUP:
            if files.temporary_in_progress is not None:
                files.temporary_in_progress.unlink(missing_ok=True)
            streams.write_at_once("stopped at once; the last saved checkpoint stands\n")
            os._exit(EXIT_INTERRUPTED)
        self._asked_to_stop |= number != signal.SIGHUP
        self.stop_requested = True
        streams.write_at_once(f"\n{signal.Signals(number).name}: saving at the next safe point, then stopping\n")

    def check_stop(self) -> None:
        """For work outside the loop that can be taken up again: leave now if asked to."""
        if self.stop_requested:
            raise Interrupted("stopped while preparing. Run the same command to go on")

    def wait_for(self, function: Callable):
        """``function()``, computed in a thread: while a library works for minutes, a signal is heard all the same."""
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
        """Whether any process was asked to stop, or cannot go on; all get the same answer. A host-side exchange, no
        device wait."""
        stop = self.stop_requested or cannot_go_on
        if self.world == 1:
            return stop
        flag = torch.tensor(int(stop))
        return bool(self._all_reduce(flag, dist.ReduceOp.MAX))

    # Processes ---------------------------------------------------------------------------------------------------

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per step and process.

        Raises:
            UserError: ``samples_per_step`` cannot be dealt out to so many processes.
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

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        if self.world > 1:
            self._all_reduce(torch.zeros(1), group=group)  # on the host; dist.barrier would occupy the GPU

    def gather(self, value) -> list:
        """Every process's ``value``, in rank order."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], Any]) -> Any:
        """``make()`` of the first process, told to all: what one of them decides, none decides otherwise."""
        return self.gather(make() if self.is_main else None)[0]

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._all_reduce(tensor) if self.world > 1 else tensor

    def _all_reduce(self, tensor: torch.Tensor, op=dist.ReduceOp.SUM, group=None) -> torch.Tensor:
        """In place.

        The exchange is kept until the next one. Whoever lets go of it last frees it, and gloo's thread asks for the
        interpreter to do so: a loader's worker that is forked in that moment finds a lock taken, for ever (seen once
        in CPython 3.11, in ``_PyThreadState_DeleteExcept``).
        """
        work = dist.all_reduce(tensor, op=op, group=group, async_op=True)
        work.wait()
        self._exchange = work, tensor
        return tensor

    @contextlib.contextmanager
    def main_process_first(self):
        """The block runs on rank 0 while the others wait, then on the others, which find its result on disk."""
        if not self.is_main:
            self.barrier(self._patient)
        yield
        if self.is_main:
            self.barrier(self._patient)

    def remember(self, name: str, belongs_to: dict, make: Callable[[], dict]) -> dict:
        """``make()``, computed once and kept in ``save_dir`` as ``name``; computed anew when it belongs to other data
        or is damaged.

        Args:
            belongs_to: what the result depends on, as plain data.
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
        """Inside, on a GPU, a kernel that adds up in any order is an error, unless the config allows it.

        Everywhere else it brings a warning, and what it makes is told to no weight. That is not enough for training:
        fused attention takes its deterministic kernels only where the others are an error.
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

    def distribute(self, module: nn.Module) -> nn.Module:
        """The callable to train with: the module itself, or its DDP wrapper under torchrun."""
        if self.world == 1:
            return module
        # of weights with dimensions of size 1, whose strides mean nothing
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    # Logs --------------------------------------------------------------------------------------------------------

    def open_logs(self, step: int, validated: bool) -> None:
        """Open training.log, metrics.jsonl and TensorBoard; this training's rows after ``step`` are of a lost future
        and go. So does that of a validation at ``step`` if it is not ``validated``: it will be made again."""
        if not self.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and a finished run does not need it

        self._log_file = open(self.save_dir / "training.log", "a", encoding="utf-8", buffering=1)
        path = self.save_dir / "metrics.jsonl"
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _is_row_until(line, self.stage.name, step, validated)]
            replace_file(path, lambda file: file.writelines(kept))
        self._metrics_file = open(path, "a", encoding="utf-8", buffering=1)
        folder = self.save_dir / "tensorboard"
        self._tensorboard = SummaryWriter(folder / self.stage.name if self._is_part else folder, purge_step=step + 1)
        for line in self._pending:
            self._write_log(line)
        self._pending = []

    def log(self, message: str) -> None:
        """One line to stdout, and to training.log once that is open. Rank 0 only."""
        if not self.is_main:
            return
        try:
            with tqdm.external_write_mode(file=sys.stdout):
                print(message, flush=True)
        except OSError as error:
            if error.errno not in streams.GONE:
                raise
            streams.silence(sys.stdout.fileno())  # training.log still tells everything
        if self._log_file is None:
            self._pending.append(message)
        else:
            self._write_log(message)

    def _write_log(self, message: str) -> None:
        self._log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def record(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """One row of metrics.jsonl, and the same values to TensorBoard under ``kind/``. Rank 0 only."""
        if not self.is_main:
            return
        row = {"stage": self.stage.name, "kind": kind, "step": step, "epoch": epoch} | values
        self._metrics_file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def record_media(
        self, step: int, name: str, sounds: dict[str, torch.Tensor], sample_rate: int, picture: np.ndarray
    ) -> None:
        """Waveforms (S,) by name and a picture (height, width, 3) uint8 of them, to TensorBoard. Rank 0 only."""
        if not self.is_main:
            return
        self._tensorboard.add_image(f"{name}/log_mel", picture, step, dataformats="HWC")
        for sound, waveform in sounds.items():
            self._tensorboard.add_audio(f"{name}/{sound}", waveform, step, sample_rate=sample_rate)

    def start_bar(self, total_steps: int, step: int) -> None:
        """A progress bar that stands where the run stands; none where nobody watches."""
        if self.is_main and sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)


def _is_row_until(line: bytes, stage: str, step: int, validated: bool) -> bool:
    try:
        row = json.loads(line)
        return row["stage"] != stage or row["step"] < step + (validated or row["kind"] != "val")
    except (ValueError, KeyError, TypeError):  # the row that a kill cut short, or no row of ours
        return False
