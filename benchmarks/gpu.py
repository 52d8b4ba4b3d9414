"""Everything about speed on a GPU, in ten minutes: the training step of each stage at the size of its _tiny config.

    python benchmarks/gpu.py                    all steps; the figures also go to checkpoints/gpu.json
    python benchmarks/gpu.py A "D talker"       some of them
    python benchmarks/gpu.py --compile          with torch.compile where the configs have it; takes longer
    python benchmarks/gpu.py --device cpu --steps 2     a trial of this script: demo configs, two samples a batch

Each step is the training loop's own, with optimizer, clipping and checks, on a made-up batch of the true shape that
lies in pinned memory: no data loader, no validation, no checkpoint. A figure is of the second half of at most 300
steps. Without a GPU it says so and ends with exit code 2.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.gpu_counts import count
from benchmarks.tiny_steps import STEPS, Place, Step
from omni.common.errors import UserError
from omni.common.files import write_json
from omni.data.order import training_set
from omni.train.cli import OneLineErrors, launch
from omni.train.device import peak_memory_gb, pick_device
from omni.train.loop import Loop
from omni.train.optim import build_optimizer
from omni.train.run import Run
from omni.train.training import Phase, Training

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3  # steps before the clock starts: kernels are loaded, plans are made
MATRIX = {"cuda": 8192, "cpu": 256}  # rows and columns of the product that gives the card's peak
COLUMNS = ("steps/s", "busy", "of peak", "memory", "speed-up if not deterministic")


@dataclass
class Figures:
    """Of one step. None: not measured."""

    steps: int
    steps_per_s: float  # of the second half
    busy_percent: float | None  # of nvidia-smi in that half: share of the time in which a kernel ran
    peak_memory_gb: float


# ---------------------------------------------------------------------------------------------------------------
# One process measures all steps, with deterministic kernels or without: some of these settings last for a process


class MadeUp:
    """A source of one batch, whose rows no loader reads."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.batch_size


def measure(step: Step, device: str, n_steps: int, seconds: float) -> Figures:
    """Time at most ``n_steps`` of the loop's steps, in about ``seconds`` from the first one on."""
    with Run(step.config, step.stage, device=device) as run:
        for module in step.modules.values():
            prepare(run, step, module)
        phases = [
            Phase(
                phase.name, step.modules[phase.module], build_optimizer(step.modules[phase.module], step.config),
                phase.loss, peak_lr=step.config.lr,
                after_update=phase.after_update and phase.after_update(run),
            )
            for phase in step.phases
        ]  # fmt: skip
        source = MadeUp(step.config.batch_size)
        loop = Loop(Training(run, phases, training_set(run, source), {}, {}, None, {}, ()))
        batch = pinned(step.batch, run.device) | {"rows": list(range(len(source))), "notes": [], "bad_rows": {}}
        for _ in range(WARM_UP):
            one_step(loop, batch)
        wait(run.device)
        began, times = time.perf_counter(), []
        with Busy(run.device) as busy:
            for done in range(1, n_steps + 1):
                one_step(loop, batch)
                if done % 10 == 0 or done == n_steps:  # the host may run ahead of the device
                    wait(run.device)
                    times.append((done, time.perf_counter() - began))
                    if times[-1][1] > seconds:
                        break
            # about the second half
            first = next(((done, at) for done, at in times if at >= times[-1][1] / 2), times[0])
            (start, started), (end, ended) = (first if first != times[-1] else (0, 0.0)), times[-1]
            return Figures(
                end, (end - start) / (ended - started), busy.since(started + began), peak_memory_gb(run.device)
            )


def prepare(run: Run, step: Step, module: torch.nn.Module) -> None:
    """As the stage's script does: stage E compiles its Thinker alone."""
    if step.stage.name == "omni":
        module.to(run.device)
        if step.config.use_compile:
            module.thinker.compile(dynamic=False)
    else:
        run.prepare(module)


def one_step(loop: Loop, batch: dict) -> None:
    loop.train_step([dict(batch)])
    loop.progress.step += 1


def pinned(batch: dict, device: torch.device) -> dict:
    """As a loader hands it over."""
    if device.type != "cuda":
        return batch
    return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Busy:
    """Asks nvidia-smi five times a second how busy the GPU is."""

    def __init__(self, device: torch.device) -> None:
        self.process, self.file = None, None
        if device.type == "cuda":
            index = device.index or 0
            self.file = tempfile.TemporaryFile("w+")
            query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200", f"--id={index}"]
            try:
                self.process = subprocess.Popen(["nvidia-smi", *query], stdout=self.file, stderr=subprocess.DEVNULL)
            except FileNotFoundError:  # a container without it
                self.process = None
            self.began = time.perf_counter()

    def __enter__(self) -> "Busy":
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        if self.file is not None:
            self.file.close()

    def since(self, moment: float) -> float | None:
        """Mean percentage since ``moment`` of ``time.perf_counter``."""
        if self.process is None:
            return None
        self.file.seek(0)
        values = [float(line) for line in self.file if line.strip().isdigit()]
        last = values[-max(1, round(5 * (time.perf_counter() - moment))) :]
        return statistics.mean(last) if last else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the card's rate in practice."""
    size = MATRIX[device.type]
    matrix, best = torch.randn(size, size, device=device, dtype=dtype), float("inf")
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        for _ in range(5):
            matrix @ matrix
        wait(device)
        best = min(best, (time.perf_counter() - began) / 5)
    return 2 * size**3 / best


def settings(args: argparse.Namespace, deterministic: bool, folder: str) -> tuple[str, dict]:
    """Size of the configs, and keys that they get."""
    keys = {"deterministic": deterministic, "save_dir": folder, "num_workers": 0, "max_steps": 10**9}
    if not args.compile:
        keys["use_compile"] = False
    if args.device == "cpu":
        return "demo", keys | {"batch_size": 2}
    return "tiny", keys


def child(args: argparse.Namespace) -> None:
    """Measure ``args.names`` in ``args.seconds``, and write the figures to ``args.json``."""
    deterministic, ends, found = args.child == "deterministic", time.monotonic() + args.seconds, {}
    device = torch.device(args.device)
    for index, name in enumerate(args.names):
        left = (ends - time.monotonic()) / (len(args.names) - index)
        if left <= 0:
            found[name] = {"note": "no time was left"}
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            size, keys = settings(args, deterministic, folder)
            began = time.monotonic()
            step = STEPS[name](Place(args.device), size, **keys_of(name, keys))
            try:
                # a third of the time may go into making the model
                figures = measure(step, args.device, args.steps, max(1.0, left - (time.monotonic() - began)) * 2 / 3)
                found[name] = asdict(figures)
            except torch.OutOfMemoryError:
                found[name] = {"note": "out of memory"}
        print(f"{name:<10} {args.child:<18} {found[name]}", file=sys.stderr, flush=True)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    write_json(args.json, {"steps": found, "peak_flops": peak_flops(device, dtype)})


def keys_of(name: str, keys: dict) -> dict:
    """``keys`` for one of ``STEPS``: codec and aligner have a batch size under another name."""
    part = name.removeprefix("D ")
    if "batch_size" in keys and part in ("codec", "aligner"):
        return {key: value for key, value in keys.items() if key not in ("batch_size", "max_steps")} | {
            "max_steps": keys["max_steps"],
            f"{part}_batch_size": keys["batch_size"],
        }
    return keys


# ---------------------------------------------------------------------------------------------------------------
# The whole measurement


def measured(args: argparse.Namespace) -> dict:
    """Figures of all steps, with and without deterministic kernels, and the operations of each."""
    ends, found = time.monotonic() + args.seconds, {}
    flops = in_child(args, "counts", 1.0, {"CUDA_VISIBLE_DEVICES": ""})  # a card in sight would lend it memory
    for index, mode in enumerate(("deterministic", "not deterministic")):
        seconds = (ends - time.monotonic()) / (2 - index) - 10  # to start the process
        found[mode] = in_child(args, mode, max(1.0, seconds))
    return {
        "machine": {"device": device_name(args.device), "torch": torch.__version__, "cuda": torch.version.cuda},
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "compiled": args.compile,
        "peak_flops": max(mode["peak_flops"] for mode in found.values()),
        "flops": flops,
        "figures": {mode: found[mode]["steps"] for mode in found},
    }


def in_child(args: argparse.Namespace, what: str, seconds: float, environment: dict[str, str] | None = None) -> dict:
    """What this script writes as ``--child`` of the kind ``what``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, __file__, *args.names, "--child", what, "--json", str(path)]
        command += ["--device", args.device, "--steps", str(args.steps), "--seconds", str(seconds)]
        subprocess.run(command + ["--compile"] * args.compile, check=True, env=os.environ | (environment or {}))
        return json.loads(path.read_text())


def operations(args: argparse.Namespace) -> dict[str, int]:
    """Floating-point operations of each step."""
    size, keys = settings(args, True, "nowhere")
    return {
        name: sum(counts.flops for counts in count(name, size, **keys_of(name, keys)).values()) for name in args.names
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def table(written: dict) -> list[str]:
    """Markdown: a row for each step; steps/s, busy, share of the peak and memory with deterministic kernels."""
    lines = [f"| step | {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * len(COLUMNS)}"]
    modes = written["figures"]
    for name, ours in modes["deterministic"].items():
        free = modes["not deterministic"][name]
        if "note" in ours:
            lines.append(f"| {name} | {ours['note']} |{' |' * (len(COLUMNS) - 1)}")
            continue
        rate, busy = ours["steps_per_s"], ours["busy_percent"]
        share = written["flops"][name] * rate / written["peak_flops"]
        ratio = "-" if "note" in free else f"{free['steps_per_s'] / rate:.2f}"
        memory = f"{ours['peak_memory_gb']:.1f} GB"
        cells = [name, f"{rate:.2f}", "-" if busy is None else f"{busy:.0f} %", f"{share:.1%}", memory, ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="STEP", help=f"some of: {', '.join(STEPS)}; default: all")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ..., or cpu for a trial (default: cuda)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="most steps of each (default: 300)")
    parser.add_argument("--seconds", type=float, default=570.0, help="of the whole measurement (default: 570)")
    parser.add_argument("--compile", action="store_true", help="torch.compile where the configs have it")
    parser.add_argument("--json", type=Path, default=ROOT / "checkpoints/gpu.json", metavar="FILE", help="figures")
    parser.add_argument("--child", choices=("counts", "deterministic", "not deterministic"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.names = args.names or list(STEPS)
    for name in args.names:
        if name not in STEPS:
            raise UserError(f"{name}: expected one of {', '.join(STEPS)}")
    if args.steps < 2 or not args.seconds > 0:
        raise UserError(
            f"expected --steps of at least 2 and --seconds above 0, found {args.steps} and {args.seconds:g}"
        )
    if args.json.is_dir():
        raise UserError(f"--json {args.json}: expected the name of a file, found a folder")
    if args.child == "counts":
        write_json(args.json, operations(args))
        return
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("expected a CUDA device, found none: nothing to measure. A trial: --device cpu --steps 2")
    pick_device(args.device)  # raises for one that is not there
    if args.child:
        child(args)
        return
    written = measured(args)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, written)
    print(f"{written['machine']['device']}, {written['peak_flops'] / 1e12:,.1f} TFLOP/s in a large product\n")
    print("\n".join(table(written)))


if __name__ == "__main__":
    launch(main)
