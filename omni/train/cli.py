"""The command line of all scripts, errors as one line, and exit codes."""

import argparse
import errno
import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from omni.common import allocator, streams
from omni.common.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    BadRow,
    Interrupted,
    OneLineErrors,
    RunError,
    UserError,
)
from omni.common.media import quoted, visible
from omni.train.config import StageConfig, load_config

_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# Errors of a path that the user gave. Not ENOENT: a missing file may be a fault of this program.
_WRONG_PATH = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EROFS)
_OUT_OF_FILES = (os.strerror(errno.EMFILE), "items of ancdata")  # the second: a tensor that a worker could not send
_WORKERS_FILES = 256  # open files that are enough for loader workers


def launch(main: Callable[[], None]) -> None:
    """Run ``main`` and exit: 0 finished, 1 failed, 2 bad input, 75 interrupted (saved; run the same line again)."""
    streams.secure()
    faulthandler.enable()  # a crash inside a library prints where
    threading.excepthook = _thread_failed
    # Keeps the error's frames, and so the data loader: its destructor would wait for workers, which may hang.
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
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # from now on a worker may end
    workers = multiprocessing.active_children()
    for worker in workers:  # left by an error; they ignore SIGTERM, and Python would wait for them for ever
        worker.kill()
    if workers or dist.is_initialized():
        # Not sys.exit, which would wait for the queues of killed workers, and destroy the process group: gloo's
        # destructor holds the interpreter while it waits for a thread that may be waiting for the interpreter.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _thread_failed(args) -> None:
    # TensorBoard writes in a thread; on a full disk the main thread gets the same error at its next row, and reports
    # it. The same holds where no file can be opened.
    if not isinstance(args.exc_value, OSError) or args.exc_value.errno not in (*_DISK_FULL, errno.EMFILE):
        threading.__excepthook__(args)


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
        return 0
    except (UserError, RunError, Interrupted) as error:
        label = "" if isinstance(error, Interrupted) else "error: "
        # the other processes of this machine have the same input and report the same UserError
        if isinstance(error, RunError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{label}{visible(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    except BadRow as error:  # not in a loader, which counts and replaces such rows, but where one row is needed
        when = "it could be read before. Run the same command again when it can"
        print(f"error: {visible(str(error))}; {when}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        reason = " ".join(str(error).split())
        if "does not have a deterministic implementation" in reason:
            what = reason.split(" does not have")[0]
            print(f'error: key "deterministic": expected false, as {what} has no deterministic kernel', file=sys.stderr)
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
        passed_on = "in DataLoader worker process" in reason  # an error in our code, with its traceback
        if not isinstance(error, RuntimeError) and multiprocessing.active_children():
            reason = f"a DataLoader worker died while it sent a batch: {reason}"
        if passed_on or "DataLoader worker" not in reason:
            raise
        print(f"error: {reason} (often out of memory). Run the same command to go on", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except KeyboardInterrupt:  # before the signal handlers were installed: there is nothing to save
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: stay silent, as other tools do
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


def raise_open_file_limit() -> None:
    """Raise the limit of open files as far as this process may: each tensor that a loader worker sends is one.

    Raises:
        UserError: the highest limit is too low. A worker without open files prints its own traceback, or hangs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _WORKERS_FILES and soft != resource.RLIM_INFINITY:
        soft = _WORKERS_FILES if hard == resource.RLIM_INFINITY else min(hard, _WORKERS_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < _WORKERS_FILES:
            raise UserError(
                f"num_workers: expected 0 where a process may have {soft} open files, or a limit of at least "
                f"{_WORKERS_FILES} (ulimit -n)"
            )


def run_script(command: list, **options) -> None:
    """Run another script; if it fails, exit with its code, since it has said why."""
    if code := subprocess.run(command, **options).returncode:
        sys.exit(code if code > 0 else EXIT_FAILED)


def output_file(text: str) -> Path:
    """The ``type`` of an option that names a file to write, so that a wrong name is found before any work."""
    path = Path(text)
    try:
        usable = bool(text) and not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK)
    except (OSError, ValueError):  # too long, or with a NUL
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)}: expected the name of a file in a folder that is there, and that can be written"
        )
    return path


def parse_stage_args(cls: type[StageConfig], description: str, argv: list[str] | None = None):
    """Parse the command line that all stage scripts share.

    Returns:
        The config, and the notices to log once the log is open.
    """
    parser = OneLineErrors(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Interrupt it at any time (Ctrl-C, SIGTERM, even SIGKILL): the same command resumes where it stopped.\n"
        "Several GPUs: torchrun --nproc_per_node=N SCRIPT --config FILE.\n"
        "Several machines: save_dir, cache_dir and the data must be in shared folders with the same paths.\n"
        "With samples_per_step, a run can resume with another number of processes: each step keeps its samples.\n"
        "Exit codes: 0 finished, 1 failed, 2 bad config or data, 75 interrupted and saved.\n\n"
        "Config keys (default):\n" + _describe_keys(cls),
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON config, see configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config; repeatable"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    if argv is None:  # run as a script, not by a test
        allocator.restart_with_settings()
    config, notices = load_config(cls, args.config, args.set)
    return config, notices, args.device


def _describe_keys(cls: type[StageConfig]) -> str:
    lines = []
    for name, field in cls.model_fields.items():
        if name in cls.OBSOLETE:
            continue
        default = "required" if field.is_required() else json.dumps(field.default)
        lines.append(f"  {name} ({default})" + (f": {field.description}" if field.description else ""))
    return "\n".join(lines)
