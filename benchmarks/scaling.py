"""The cost of preparing data and of resuming on large data: 10 million lines of text, a million rows of a manifest.

    python benchmarks/scaling.py --out docs/scaling.md            about a quarter of an hour on 2 cores, 2 GB in TMPDIR
    python benchmarks/scaling.py --lines 20000 --rows 2000        half a minute, as a test

The stages' own scripts run on made-up data up to the beginning of training. The page is printed, and with --out also
written. Linux only, as it reads the memory of processes from /proc.
"""

import argparse
import copy
import importlib
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import timeit
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.scaling_data import CASES, SETTINGS, Case
from benchmarks.scaling_page import Cost, Figures, Order, Start, page
from omni.common.errors import UserError
from omni.data.corpus import PackedTokens
from omni.data.manifest import Manifest
from omni.data.order import ResumableDataset, build_loader, permute
from omni.train.cli import OneLineErrors, launch, output_file
from omni.train.run import Run

ROOT = Path(__file__).resolve().parent.parent
PARTS = (0.0, 0.01, 0.5, 0.99)  # of an epoch, where a run is resumed
WORKERS = (0, 2)
STEP_SAMPLES = 32


def in_own_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def memory_mb(key: str) -> float:
    """Memory of this process: ``VmRSS`` now, ``VmHWM`` at its peak. (``getrusage`` may give the parent's peak.)"""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024 / 1e6


# --- One start of a stage --------------------------------------------------------------------------------------------


def start(case: Case, folder: Path, base_mb: float, later: bool, repeats: int) -> Start:
    """Run the script of ``case`` in ``folder``, in this process.

    Args:
        base_mb: memory of a process that has imported the script; its fork has not mapped all libraries yet.
        later: a first start has made all caches. Counts the rows that are still read.
        repeats: number of timings of the first batch.
    """
    result, reads, script = Start(), multiprocessing.Value("q"), importlib.import_module(case.script)
    not_mapped_mb = base_mb - memory_mb("VmRSS")

    def measured(name: str) -> Callable:
        function, cost = getattr(script, name), result.costs.setdefault(name, Cost())

        def call(*args, **kwargs):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            held, seen, started = memory_mb("VmRSS"), reads.value, time.perf_counter()
            value = function(*args, **kwargs)
            cost.seconds += time.perf_counter() - started
            cost.reads += reads.value - seen
            peak = memory_mb("VmHWM")
            cost.peak_mb, cost.added_mb = max(cost.peak_mb, peak + not_mapped_mb), max(cost.added_mb, peak - held)
            return value

        return call

    def train(run: Run, phases: list, dataset: ResumableDataset, **_) -> None:
        if later and case.resumed and repeats:
            resume(result, run, dataset, reads, repeats)

    settings = (f"{case.key}={folder / case.file}", f"save_dir={folder / 'run'}", *SETTINGS, *case.settings)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        for name in case.functions:
            stack.enter_context(mock.patch.object(script, name, measured(name)))
        if later:
            one_row = counted(Manifest.__getitem__, reads, rows=lambda row: 1)
            stack.enter_context(mock.patch.object(Manifest, "__getitem__", one_row))
            stack.enter_context(mock.patch.object(PackedTokens, "batch", counted(PackedTokens.batch, reads, rows=len)))
        stack.enter_context(mock.patch.object(script, "build_optimizer"))  # its first call takes a second of imports
        stack.enter_context(mock.patch.object(script, "train", train))
        arguments = ["--config", str(ROOT / f"configs/{case.config}.json"), "--device", "cpu"]
        script.main(arguments + [word for setting in settings for word in ("--set", setting)])
    return result


def counted(read: Callable, reads, rows: Callable) -> Callable:
    """The method ``read``, which also adds the number of its rows to ``reads``, in loader workers too."""

    def call(source, which, *others):
        with reads:
            reads.value += rows(which)
        return read(source, which, *others)

    return call


def resume(result: Start, run: Run, dataset: ResumableDataset, reads, repeats: int) -> None:
    """Seconds and rows read from setting ``skip_samples`` to the first batch, at each of ``PARTS``."""
    times, counts, points = {}, {}, list(itertools.product(WORKERS, PARTS))
    turns = [random.Random(repeat).sample(points, len(points)) for repeat in range(repeats + 1)]
    for repeat, (workers, part) in ((repeat, point) for repeat, turn in enumerate(turns) for point in turn):
        resumed = copy.copy(dataset)  # without cached values
        resumed.skip_samples = int(part * dataset.steps_per_epoch) * dataset.samples_per_step
        seen, started = reads.value, time.perf_counter()
        loader = build_loader(resumed, workers, run.device)
        batches = iter(loader)
        next(batches)
        if repeat:  # the first one imports and opens for all others
            times.setdefault((workers, part), []).append(time.perf_counter() - started)
        counts[workers, part] = max(counts.get((workers, part), 0), reads.value - seen)
        result.most_reads[workers] = dataset.batch_size * ((loader.prefetch_factor or 0) + 1) * max(1, workers)
        del batches  # ends the workers
    result.first_batches = {point: (statistics.median(times[point]), counts[point]) for point in points}


# --- All of it -------------------------------------------------------------------------------------------------------


def measure(case: Case, count: int, base_mb: float, repeats: int) -> Figures:
    """A first and a later start, on ``count`` rows and on a tenth of them, each in its own process."""
    starts, fewer = [], count // 10
    with tempfile.TemporaryDirectory() as name:
        for rows, times in ((fewer, 0), (count, repeats)):
            print(f"{case.what}: {rows:,} rows", file=sys.stderr, flush=True)
            path = Path(name) / str(rows) / case.file
            path.parent.mkdir()
            in_own_process(case.write, path, rows)
            starts += [in_own_process(start, case, path.parent, base_mb, later, times) for later in (False, True)]
        made_mb = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}.*/*")) / 1e6
        return Figures(case.what, case.bounded, count, fewer, path.stat().st_size / 1e6, made_mb, *starts)


def order(rows: int) -> Order:
    """Cost of computing the rows of an epoch's last step."""
    positions = np.arange(rows - STEP_SAMPLES, rows)
    seconds = min(timeit.repeat(lambda: permute(positions, rows, key=1), number=100, repeat=5)) / 100
    tracemalloc.start()
    permute(positions, rows, key=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Order(rows, 1e6 * seconds / STEP_SAMPLES, peak)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000_000, metavar="N", help="lines of text; default: 10 million")
    parser.add_argument(
        "--rows", type=int, default=1_000_000, metavar="N", help="rows of a manifest; default: a million"
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="timings of the first batch; default: 9")
    parser.add_argument(
        "--out", type=output_file, metavar="FILE.md", help="write the page there; default: print it only"
    )
    args = parser.parse_args(argv)
    if args.lines < 10_000 or args.rows < 1000 or args.repeats < 1:  # a tenth of the rows must fill a step
        raise UserError("expected at least --lines 10000, --rows 1000 and --repeats 1")
    for case in CASES:
        importlib.import_module(case.script)
    base_mb = memory_mb("VmRSS")
    counts = {case: args.lines if case.file == "corpus.txt" else args.rows for case in CASES}
    load = os.getloadavg()[0]
    figures = [measure(case, count, base_mb, args.repeats) for case, count in counts.items()]
    from bench import machine  # last, since its imports would be in the memory of every fork

    facts = machine()
    made = f"`python benchmarks/scaling.py --lines {args.lines} --rows {args.rows}`, {time.strftime('%Y-%m-%d')}, "
    made += f"{facts['cpu']}, {facts['cpus']} CPUs (load {load:.1f} before), torch {facts['torch']}."
    text = page(made, base_mb, figures, [order(10**n) for n in (3, 6, 9, 12)])
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    launch(main)
