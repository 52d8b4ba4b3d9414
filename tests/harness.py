"""Run the real stage scripts as processes: start, signal, kill, wait, and compare what they leave behind."""

import atexit
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

PATIENCE_S = 200  # for what takes a second on a quiet machine

# One line per step and process: which rows it trained on. Rank and step make a line unique.
TRACE = """
import os, omni.train.loop
def trace(run, step, rows):
    with open(os.environ["TRACE"], "a") as file:
        file.write(f"{step} {run.rank} {rows}\\n")
omni.train.loop.STEP_HOOKS.append(trace)
"""

# Slow enough for kills at random instants to fall into training; a sleep changes no bit.
SLOW = """
import time, omni.train.loop
omni.train.loop.STEP_HOOKS.append(lambda run, step, rows: time.sleep(0.02))
"""

# A worker of the first epoch stops for ever at one batch, and the clock of the wait runs faster.
HUNG_WORKER = """
import os, signal, time, types, omni.data.order
_iter = omni.data.order.ResumableDataset.__iter__
def hanging(self):
    for index, batch in enumerate(_iter(self)):
        if self.shuffle == {shuffle} and self.skip_samples == 0 and index == {index}:
            os.kill(os.getpid(), signal.SIGSTOP)
        yield batch
omni.data.order.ResumableDataset.__iter__ = hanging
omni.data.order.time = types.SimpleNamespace(monotonic=lambda: {speed} * time.monotonic())
"""


# To take a loader apart, torch waits five seconds for each worker.
TAKEN_APART = """
from torch.utils.data import dataloader
dataloader._MultiProcessingDataLoaderIter._shutdown_workers = lambda self: print("waits for workers", flush=True)
"""


def hung_worker(*, shuffle: bool = True, speed: int = 1) -> str:
    return HUNG_WORKER.format(shuffle=shuffle, speed=speed, index=2 if shuffle else 0)


def kill_at_step(count: int) -> str:
    """Prelude: the process SIGKILLs itself when its ``count``-th step begins, before that step is traced."""
    return f"""
import os, signal, omni.train.loop
_begun = []
def kill(run, step, rows):
    _begun.append(step)
    if len(_begun) == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
omni.train.loop.STEP_HOOKS.insert(0, kill)
"""


def kill_at(call: str, count: int, *, after: bool = False) -> str:
    """Prelude: the process SIGKILLs itself at the ``count``-th call of ``module:qualified.name``."""
    module, name = call.split(":")
    return f"""
import importlib, os, signal
_owner = importlib.import_module("{module}")
*_path, _name = "{name}".split(".")
for _part in _path:
    _owner = getattr(_owner, _part)
_original, _calls = getattr(_owner, _name), [0]
def _killing(*args, **kwargs):
    _calls[0] += 1
    if _calls[0] == {count} and not {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = _original(*args, **kwargs)
    if _calls[0] == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(_owner, _name, _killing)
"""


def count_calls(call: str) -> str:
    """Prelude: the process prints ``<n> calls`` of ``module:qualified.name`` at its end."""
    return kill_at(call, 0) + 'import atexit\natexit.register(lambda: print(_calls[0], "calls"))\n'


def wait_until(
    condition: Callable[[], bool], otherwise: str = "", process: "subprocess.Popen | Process | None" = None
) -> None:
    """Wait until ``condition()``, in which a file may be missing. How long is the machine's affair, not a test's: only
    what would not come at all fails, or an end of ``process``."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with suppress(FileNotFoundError):
            if condition():
                return
        assert process is None or process.poll() is None, f"ended with {process.returncode}. {otherwise}"
        assert time.monotonic() < deadline, f"{otherwise} in {PATIENCE_S} s"
        time.sleep(0.005)


class ForkServer:
    """See fork_server.py. One per test process, started when first needed."""

    _instance = None

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "fork_server.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True, bufsize=1,
        )  # fmt: skip
        atexit.register(self.process.kill)
        assert self._answer() == "ready"

    @classmethod
    def get(cls) -> "ForkServer":
        cls._instance = cls._instance or cls()
        return cls._instance

    def ask(self, request: dict):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            return self._answer()
        except BaseException:  # the test took too long: its answer would be taken for the next one's
            self.process.kill()
            ForkServer._instance = None
            raise

    def _answer(self):
        return json.loads(self.process.stdout.readline())


@dataclass
class Process:
    """A started script. ``wait`` fills in the exit code and the output."""

    pid: int
    output: Path
    returncode: int | None = None
    stdout: str = ""
    stderr: str = ""
    started: float = field(default_factory=time.monotonic)

    def wait(self) -> "Process":
        self._ask(0)
        return self

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        self._ask(os.WNOHANG)
        return self.returncode

    def _ask(self, options: int) -> None:
        if self.returncode is not None:
            return
        try:
            self.returncode = ForkServer.get().ask({"wait": self.pid, "options": options})
        except BaseException:  # the test took too long
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            raise
        if self.returncode is not None:
            self.stdout = self.output.with_suffix(".out").read_text()
            self.stderr = self.output.with_suffix(".err").read_text()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> "Process":
        """SIGKILL, to the main process only: its workers are left behind, as after a crash."""
        self.send(signal.SIGKILL)
        return self.wait()

    def wait_for(self, text: str, stream: str = ".out") -> None:
        """Wait until the process has printed ``text``."""
        printed = self.output.with_suffix(stream)
        wait_until(lambda: text in printed.read_text(), f"{text!r} was not printed", self)


_NUMBERS = itertools.count(1)


def start(
    *line: object,
    cwd: Path,
    env: dict[str, str] | None = None,
    prelude: str = "",
    output: Path | None = None,
    root: Path = ROOT,
) -> Process:
    """Start ``python *line``, a script or ``-c`` and a program, as from a shell in ``cwd``.

    Args:
        env: variables beside those of the test process, as they were when it first started something.
        prelude: code that the process executes first.
        output: what the process prints goes to files of this name, .out and .err; default: a new one.
        root: the copy of the repository whose modules it imports.
    """
    output = output or cwd / f"process_{next(_NUMBERS)}"
    for suffix in (".out", ".err"):  # a kill may come before the child has opened them
        output.with_suffix(suffix).write_text("")
    request = {
        "argv": [str(word) for word in line], "cwd": str(cwd), "env": env or {}, "prelude": prelude, "root": str(root),
        "stdout": str(output.with_suffix(".out")), "stderr": str(output.with_suffix(".err")),
    }  # fmt: skip
    return Process(ForkServer.get().ask(request), output)


@dataclass
class Training:
    """A stage with its config, in a folder of its own. Each ``start`` is the shell line of a user."""

    script: str
    prefix: str
    final: str
    folder: Path
    config: dict
    prelude: str = ""
    _count: int = field(default=0)
    seconds: float = 0.0  # of the last ``finish``

    @property
    def save_dir(self) -> Path:
        return Path(self.config["save_dir"])

    def changed(self, save_dir: str | None = None, prelude: str | None = None, **keys) -> "Training":
        """The same training with other keys, and in another folder if ``save_dir`` (a name) is given."""
        config = self.config | keys
        if save_dir:
            config["save_dir"] = str(self.folder / save_dir)
        prelude = self.prelude if prelude is None else prelude
        return Training(self.script, self.prefix, self.final, self.folder, config, prelude, self._count + 100)

    def start(self, prelude: str = "", env: dict | None = None, arguments: tuple[str, ...] = ()) -> Process:
        self._count += 1
        stem = f"{self.save_dir.name}_{self._count}"
        config_path = self.folder / f"{stem}.json"
        config_path.write_text(json.dumps(self.config))
        line = (ROOT / self.script, "--config", config_path, "--device", "cpu", *arguments)
        env = {"TRACE": str(self.trace_path)} | (env or {})
        return start(*line, cwd=self.folder, env=env, prelude=self.prelude + prelude, output=self.folder / stem)

    def run(self, prelude: str = "", env: dict | None = None, arguments: tuple[str, ...] = ()) -> Process:
        return self.start(prelude, env, arguments).wait()

    def finish(self, **kwargs) -> Process:
        """Run to the end, which must succeed."""
        process = self.run(**kwargs)
        assert process.returncode == 0, f"exit code {process.returncode}\n{process.stderr}{process.stdout}"
        self.seconds = time.monotonic() - process.started
        return process

    # What a run leaves behind ------------------------------------------------------------------------------------

    @property
    def trace_path(self) -> Path:
        return self.folder / f"{self.save_dir.name}.trace"

    def trace(self) -> dict[tuple[int, int], str]:
        """(step, rank) -> rows. A step that is repeated after a kill must have the same rows."""
        rows = {}
        for line in self.trace_path.read_text().splitlines():
            step, rank, value = line.split(" ", 2)
            key = int(step), int(rank)
            assert rows.setdefault(key, value) == value, f"step {step} was trained on other rows the second time"
        return rows

    def traced(self) -> int:
        """Number of steps begun, repeated ones included."""
        return self.trace_path.read_text().count("\n") if self.trace_path.exists() else 0

    def last_traced(self) -> int:
        """The last step begun; -1 before the first."""
        return int(self.trace_path.read_text().splitlines()[-1].split()[0]) if self.traced() else -1

    def steps(self) -> list[int]:
        """Numbers of the step files, ascending."""
        names = self.save_dir.glob(f"{self.prefix}_step_*.pt")
        return sorted(int(path.stem.rsplit("_", 1)[1]) for path in names)

    def step_path(self, step: int) -> Path:
        return self.save_dir / f"{self.prefix}_step_{step}.pt"

    def newest(self) -> dict:
        return torch.load(self.step_path(self.steps()[-1]), weights_only=True)

    def final_file(self) -> dict:
        return torch.load(self.save_dir / self.final, weights_only=True)

    def metrics(self, kind: str = "train") -> list[dict]:
        """Rows of metrics.jsonl without what depends on the machine's speed."""
        rows = [json.loads(line) for line in (self.save_dir / "metrics.jsonl").read_text().splitlines()]
        speed = ("per_s", "memory_gb")
        return [{k: v for k, v in row.items() if not k.endswith(speed)} for row in rows if row["kind"] == kind]

    def state(self) -> dict:
        """Everything that must be bit-identical, however often the run was killed."""
        newest, final = self.newest(), self.final_file()
        for payload in (newest, final):
            payload["config"] = {k: v for k, v in payload["config"].items() if k not in ("save_dir", "num_workers")}
        validated = json.loads((self.save_dir / f"{self.prefix}_validated.json").read_text())
        for key in ("step_file", "seal"):  # digests: the step file has save_dir's name in it
            del validated[key]
        rows = {"metrics": self.metrics(), "validations": self.metrics("val")}
        return {"newest": newest, "final": final, "validated": validated} | rows


def kill_at_random_instants(reference: Training, kills: int) -> list[Training]:
    """SIGKILL at instants drawn from the duration of ``reference``, which has finished and traces its steps.

    A run that ends before its kill is followed by one in a new folder. If even a late kill comes before the first step,
    as the machine has become slower, later instants are drawn. It goes on until at least ``kills / 2`` kills came in
    training and runs were resumed at several different steps: else it would prove nothing.

    Returns:
        The trainings that were killed, all finished.
    """
    rng, trainings, starts, landed, in_training, resumed_at = random.Random(1), [], 0, 0, 0, set()
    running, seconds = False, reference.seconds
    while landed < kills or in_training < kills / 2 or len(resumed_at) < max(2, kills // 5):
        assert starts < 4 * kills, f"{in_training} of {landed} kills came in training, resumed at {resumed_at}"
        starts += 1
        if not running:
            trainings.append(reference.changed(save_dir=f"killed {len(trainings)}"))
        killed = trainings[-1]
        traced = killed.traced()
        process = killed.start()
        time.sleep(delay := rng.uniform(0, seconds))
        running = process.kill().returncode == -9
        assert running or process.returncode == 0, process.stderr
        landed += running
        began = killed.traced() > traced
        in_training += running and began
        if running and not began and delay > seconds / 2:
            seconds = min(1.5 * seconds, 4 * reference.seconds)
        stands = ", ".join(re.findall(r"(?:resumed|already finished) at step \d+", process.stdout))
        resumed_at |= {stands} if "resumed" in stands else set()
    for killed in trainings:
        killed.finish()
    return trainings


@contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes, mounted for one process of this block; the block can read it from outside. Skips
    the test if mounting is not allowed."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    mount = f"mount -t tmpfs -o size={size} tmpfs /mnt && echo mounted && exec sleep 600"
    holder = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"no mount namespace here: {holder.stderr.read().strip()}")
        yield Path(f"/proc/{holder.pid}/root/mnt")
    finally:
        holder.kill()
        holder.wait()


def run_script(training: Training, script: str, *arguments: str) -> Process:
    """Run another script of the repository on the files of a training."""
    line = (ROOT / script, *arguments, "--ckpt_dir", training.save_dir, "--device", "cpu")
    return start(*line, cwd=training.folder).wait()


def trained_weights(training: Training) -> dict:
    """The final weights that can be compared after sums in another order.

    The bias of an attention's keys shifts all scores of a query alike, so its gradient is nothing but rounding, which
    AdamW scales up to a full step.
    """
    return {k: v for k, v in training.final_file()["model"].items() if not k.endswith("k_proj.bias")}


def model_of(step_file: dict) -> dict:
    """The model that a step file has for the final file: the last phase's, with the running mean if there is one."""
    phase = list(step_file["phases"].values())[-1]
    return phase["module"] | phase.get("average", {})


def losses(row: dict) -> dict:
    """The loss in a row of metrics, or the losses of the phases."""
    return {name: value for name, value in row.items() if name == "loss" or name.endswith("_loss")}


def differences(one, other, where: str = "") -> list[str]:
    """Paths at which two nested structures differ, tensors by ``torch.equal``."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{where}/{key} is in one only" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            found += differences(one[key], other[key], f"{where}/{key}")
        return found
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [
            line for i, (a, b) in enumerate(zip(one, other, strict=True)) for line in differences(a, b, f"{where}/{i}")
        ]
    same = (
        torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other
    )
    return [] if same else [where or "/"]
