"""The order of the rows, a pure function of (seed, epoch, position).

Positions are absolute. One step consumes ``samples_per_step`` positions, step ``s`` those from
``s * samples_per_step`` on, so a resumed run computes its position and reads no row that it skips.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from omni.common.errors import GivenUp, UserError, collected_notes
from omni.common.host import STOP_SIGNALS, Host

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)
_FEISTEL_ROUNDS = 6
_PR_SET_PDEATHSIG = 1  # prctl(2): a signal for this process when its parent dies
_LOOK_UP_S = 1  # interval at which a wait for a batch may be given up
_POOL_STEPS = 64  # steps among whose samples those of similar length are grouped


# ---------------------------------------------------------------------------------------------------------------
# The order


def splitmix64(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): a bijection of 64-bit words with good avalanche."""
    value = np.asarray(value, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """The images of ``positions`` under a keyed permutation of ``range(size)``, in O(1) memory.

    A Feistel network (Luby & Rackoff 1988) permutes the next power of four; results outside the range are permuted
    again until they fall inside ("cycle walking", Black & Rogaway 2002), which keeps it a bijection.

    Args:
        positions: integers in [0, size), any shape.

    Returns:
        int64 array of the same shape.
    """
    half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    round_keys = splitmix64(np.arange(_FEISTEL_ROUNDS, dtype=np.uint64) ^ splitmix64(np.uint64(key)))
    values = np.array(positions, dtype=np.uint64)
    pending = np.ones(values.shape, dtype=bool)
    while pending.any():
        left, right = values[pending] >> half_bits, values[pending] & half_mask
        for round_key in round_keys:
            left, right = right, left ^ (splitmix64(right ^ round_key) & half_mask)
        values[pending] = (left << half_bits) | right
        pending = values >= size
    return values.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------
# The dataset


class BatchSource(Protocol):
    """Rows that can be read in any order; each stage implements it."""

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        """The rows as one micro-batch: tensors, and ``n_targets``, the number of targets the loss is a mean over.

        If ``rows`` is empty: any well-formed batch with ``n_targets`` 0. Random augmentation is keyed by (seed, epoch,
        row). An optional ``bad_rows`` names rows that cannot be used: where -> why.
        """

    # Optional: ``lengths``, (rows,) numbers. Training batches then consist of samples of similar length.


class ResumableDataset(IterableDataset):
    """Yields micro-batches from ``skip_samples`` on, to the end of that epoch.

    ``skip_samples`` counts samples since the beginning of training, over all epochs and processes. The last step of
    an epoch may be incomplete (``drop_last`` false); it still takes up ``samples_per_step`` positions.

    Args:
        source: the rows.
        batch_size: rows per micro-batch and process.
        accumulation: micro-batches per step and process.
        rank, world: index of this process, and number of processes.
        shuffle: False reads in order, for validation.

    Raises:
        UserError: there is no row or, with ``drop_last``, no full step.
    """

    def __init__(
        self,
        source: BatchSource,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        shuffle: bool = True,
    ) -> None:
        self.source, self.seed, self.shuffle = source, seed, shuffle
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.samples_per_step = batch_size * accumulation * world
        full, rest = divmod(len(source), self.samples_per_step)
        self.steps_per_epoch = full if drop_last else full + bool(rest)
        if self.steps_per_epoch == 0:
            if not shuffle:
                raise UserError("the held-out data have no row that can be used")
            raise UserError(
                f"the training set has {len(source)} samples, expected at least one step of "
                f"{self.samples_per_step} (batch_size x gradient_accumulation_steps x processes). "
                "Lower batch_size, or give more data"
            )
        self.skip_samples = 0
        self.lengths = getattr(source, "lengths", None) if shuffle else None
        self._pool: tuple[tuple[int, int], list[np.ndarray]] | None = None

    def rows(self, epoch: int, micro_batch: int) -> np.ndarray:
        """Row numbers of this process's ``micro_batch``-th micro-batch of ``epoch``."""
        step, part = divmod(micro_batch, self.accumulation)
        first = (part * self.world + self.rank) * self.batch_size
        return self._rows_of_step(epoch, step)[first : first + self.batch_size]

    def _rows_of_step(self, epoch: int, step: int) -> np.ndarray:
        """Row numbers of a whole step, over all processes, however many there are.

        With lengths, the samples of ``_POOL_STEPS`` consecutive steps are sorted by length and cut into steps in random
        order. This remains a pure function of (seed, epoch, position), with each sample once an epoch.
        """
        pool, index = divmod(step, 1 if self.lengths is None else _POOL_STEPS)
        if self._pool is None or self._pool[0] != (epoch, pool):
            self._pool = (epoch, pool), self._steps_of_pool(epoch, pool)
        return self._pool[1][index]

    def _steps_of_pool(self, epoch: int, pool: int) -> list[np.ndarray]:
        key, size = self.seed * 0x1_0000_0000 + epoch, self.samples_per_step
        span = size * (1 if self.lengths is None else _POOL_STEPS)
        positions = np.arange(pool * span, min((pool + 1) * span, len(self.source), self.steps_per_epoch * size))
        if not self.shuffle:
            return [positions]
        rows = permute(positions, len(self.source), key)
        if self.lengths is None:
            return [rows]
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        full = len(rows) // size
        steps = [rows[step * size : (step + 1) * size] for step in permute(np.arange(full), full, key ^ (pool + 1))]
        return steps + ([rows[full * size :]] if len(rows) > full * size else [])  # an epoch's last, incomplete step

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, first_step = divmod(self.skip_samples // self.samples_per_step, self.steps_per_epoch)
        start, stop = first_step * self.accumulation, self.steps_per_epoch * self.accumulation
        # the loader reads from its workers in turn, so they take micro-batches in turn
        for micro_batch in range(start + index, stop, count):
            rows = self.rows(epoch, micro_batch)
            with collected_notes() as notes:
                batch = self.source.batch(rows, epoch)
            yield batch | {"rows": rows.tolist(), "notes": notes}


def training_set(run: Host, source: BatchSource) -> ResumableDataset:
    """``source`` in random order, in steps of the run's config, distributed over its processes."""
    config = run.config
    return ResumableDataset(
        source,
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation=run.accumulation_steps,
        rank=run.rank,
        world=run.world,
        drop_last=config.drop_last,
    )


def held_out_set(run: Host, source: BatchSource, batch_size: int | None = None) -> ResumableDataset:
    """``source`` in its own order, distributed over the run's processes; ``batch_size``: the config's if None."""
    size = batch_size or run.config.batch_size
    return ResumableDataset(source, seed=0, batch_size=size, rank=run.rank, world=run.world, shuffle=False)


def build_loader(dataset: ResumableDataset, num_workers: int, device: torch.device) -> DataLoader:
    """A fresh loader: its workers copy the dataset, so they see the present ``skip_samples``."""
    return DataLoader(
        dataset,
        batch_size=None,  # the dataset yields whole micro-batches
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(_begin_worker, os.getpid()),
        generator=torch.Generator(),  # a loader draws a seed when it starts: not from the generator of the training
    )


NO_BATCH = "no batch came in {} s (loader_timeout_s): a data worker, or the disk that it reads from, hangs"


def arriving(loader: DataLoader, give_up: Callable[[float], bool]) -> Iterator[dict | None]:
    """The loader's batches; None for a batch on which ``give_up`` ends the wait, and for all later ones.

    Args:
        give_up: seconds waited so far -> whether to end the wait; called about once a second.
    """
    batches, given_up = iter(loader), False

    def look(*_) -> None:
        if not given_up and give_up(time.monotonic() - began):
            raise GivenUp

    try:
        while True:
            began = time.monotonic()
            with _every_second(look):
                batch = next(batches)
            yield batch
    except StopIteration:
        return
    except GivenUp:
        given_up = True
    while True:  # the loader is neither used nor shut down: either would wait
        yield None


@contextmanager
def _every_second(look: Callable) -> Iterator[None]:
    """Call ``look`` every second while the block waits. torch's own time-out has no effect while a worker is stopped in
    the middle of a message."""
    handler = signal.signal(signal.SIGALRM, look)
    timer = signal.setitimer(signal.ITIMER_REAL, _LOOK_UP_S, _LOOK_UP_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _begin_worker(trainer: int, _worker: int) -> None:
    # a Ctrl-C reaches the whole process group; the main process decides when its workers end
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # torch's workers check for their parent too, but one forked just before the parent's death never notices
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:
        os._exit(1)


@contextmanager
def from_the_start(dataset: ResumableDataset):
    """``skip_samples`` is 0 inside the block, and what it was before afterwards, also when the block raises."""
    skipped = dataset.skip_samples
    dataset.skip_samples = 0
    try:
        yield dataset
    finally:
        dataset.skip_samples = skipped
