"""The order of rows, and that a resumed run reads no row that it skips."""

import math

import numpy as np
import pytest
import torch
from harness import TRACE, losses, trained_weights

from omni.common.errors import UserError
from omni.data.order import ResumableDataset, build_loader, from_the_start, permute


class ManifestDataset:
    """A source that notes, in a file, how many rows were read: workers are other processes."""

    def __init__(self, count: int, log=None) -> None:
        self.count, self.log = count, log

    def __len__(self) -> int:
        return self.count

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{len(rows)}\n")
        return {"n_targets": len(rows)}


def read(dataset: ResumableDataset, num_workers: int = 0) -> list[list[int]]:
    return [batch["rows"] for batch in build_loader(dataset, num_workers, torch.device("cpu"))]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_bijection(size):
    for key in (0, 1, 2**32, 2**63):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_needs_no_more_than_its_positions_and_mixes_well():
    size = 10**12  # an array of this many would not fit anywhere
    out = permute(np.arange(2000), size, key=3)
    assert len(set(out.tolist())) == 2000 and out.max() < size
    correlation = np.corrcoef(np.arange(2000), out)[0, 1]
    assert abs(correlation) < 0.1 and abs(out.mean() / size - 0.5) < 0.05
    first = [permute(np.arange(10), 10, key)[0] for key in range(2000)]
    counts = np.bincount(first, minlength=10)
    assert (np.abs(counts - 200) < 5 * math.sqrt(200)).all()


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_has_every_row_once_in_the_same_order_for_any_workers(workers, drop_last):
    def dataset() -> ResumableDataset:
        return ResumableDataset(ManifestDataset(53), seed=1, batch_size=4, accumulation=3, drop_last=drop_last)

    batches = read(dataset(), workers)
    rows = sum(batches, [])
    assert batches == read(dataset())
    assert len(set(rows)) == len(rows) == (48 if drop_last else 53)
    assert len(batches) % 3 == 0, "whole steps only"


def test_skip_samples_is_absolute_over_epochs():
    dataset = ResumableDataset(ManifestDataset(53), seed=1, batch_size=4, accumulation=3, drop_last=False)
    epochs = []
    for epoch in range(3):
        dataset.skip_samples = epoch * dataset.steps_per_epoch * dataset.samples_per_step
        epochs.append(read(dataset))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for step in range(3 * dataset.steps_per_epoch):
        dataset.skip_samples = step * dataset.samples_per_step
        epoch, start = divmod(step, dataset.steps_per_epoch)
        assert read(dataset) == epochs[epoch][start * 3 :]


def test_processes_share_each_step():
    one = ResumableDataset(ManifestDataset(50), seed=1, batch_size=6, accumulation=2)
    parts = [
        ResumableDataset(ManifestDataset(50), seed=1, batch_size=3, accumulation=2, rank=r, world=2) for r in (0, 1)
    ]
    whole, halves = read(one), [read(part) for part in parts]
    for index, batch in enumerate(whole):
        assert halves[0][index] + halves[1][index] == batch


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("part", [0.01, 0.99])
def test_a_resumed_run_reads_no_skipped_row(tmp_path, workers, part):
    log = tmp_path / "reads"
    dataset = ResumableDataset(ManifestDataset(1_000_000, log), seed=1, batch_size=8)
    dataset.skip_samples = int(part * dataset.steps_per_epoch) * dataset.samples_per_step
    loader = build_loader(dataset, workers, torch.device("cpu"))
    batches = iter(loader)
    next(batches)
    rows_read = sum(map(int, log.read_text().split()))
    del batches
    assert rows_read <= 8 * (loader.prefetch_factor + 1) * workers


def test_validation_sees_everything_and_restores_the_position_even_when_it_raises():
    dataset = ResumableDataset(ManifestDataset(10), seed=1, batch_size=4, shuffle=False)
    dataset.skip_samples = 8
    with pytest.raises(ZeroDivisionError), from_the_start(dataset) as whole:
        assert read(whole) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        _ = 1 / 0
    assert dataset.skip_samples == 8


def test_fewer_rows_than_a_step_is_refused():
    with pytest.raises(UserError, match="5 samples.*at least one step of 8"):
        ResumableDataset(ManifestDataset(5), seed=0, batch_size=8, drop_last=True)
    assert ResumableDataset(ManifestDataset(5), seed=0, batch_size=8, drop_last=False).steps_per_epoch == 1


def test_micro_batches_equal_one_batch(stage, tmp_path):
    """(batch 2n, accumulation 1) is (n, 2), up to rounding, also in the unfilled last step of an epoch."""
    if stage.contrastive:
        pytest.skip("a contrastive loss compares the samples of a micro-batch with each other")
    keys = {"dropout": 0.0, "drop_last": False, "max_steps": 7, "print_freq": 1}
    keys["optimizer"] = "adamw"  # Muon makes every direction of a gradient as large as the others, also the rounding
    look = stage.training(tmp_path, save_dir="look", max_steps=1)
    look.finish()
    samples = int(look.newest()["data"]["samples"])
    n = next(n for n in range(7, 0, -1) if n < samples % (2 * n) < 2 * n)  # the last step: one full, one not
    one = stage.training(tmp_path, save_dir="one", batch_size=2 * n, **keys)
    many = stage.training(tmp_path, save_dir="many", batch_size=n, gradient_accumulation_steps=2, **keys)
    for training in (one, many):
        training.prelude = TRACE
        training.finish()
    flat = [{step: sum(eval(rows), []) for (step, _), rows in training.trace().items()} for training in (one, many)]
    assert flat[0] == flat[1]
    sizes = {len(rows) for rows in flat[0].values()}
    assert len(sizes) == 2 and n < min(sizes) < 2 * n, "the last step of an epoch has micro-batches of unequal size"
    for name, weight in trained_weights(one).items():
        torch.testing.assert_close(weight, many.final_file()["model"][name], rtol=2e-3, atol=2e-4)
    for a, b in zip(one.metrics(), many.metrics(), strict=True):
        assert losses(a) and losses(a) == pytest.approx(losses(b), rel=1e-4)


class Clips(ManifestDataset):
    """Rows of different lengths."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.lengths = np.random.default_rng(0).integers(1, 1000, count)


@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_of_similar_lengths_still_have_every_row_once(drop_last):
    clips = Clips(1003)
    dataset = ResumableDataset(clips, seed=1, batch_size=4, accumulation=2, drop_last=drop_last)
    epochs = []
    for epoch in range(2):
        dataset.skip_samples = epoch * dataset.steps_per_epoch * dataset.samples_per_step
        epochs.append(read(dataset))
        rows = sum(epochs[-1], [])
        assert len(set(rows)) == len(rows) == (1000 if drop_last else 1003)
    assert epochs[0] != epochs[1]
    padded = sum(len(rows) * clips.lengths[rows].max() for rows in epochs[0] if rows)
    plain = ResumableDataset(ManifestDataset(1003), seed=1, batch_size=4, accumulation=2, drop_last=drop_last)
    padded_plain = sum(len(rows) * clips.lengths[rows].max() for rows in read(plain) if rows)
    assert padded < 1.1 * clips.lengths.sum() < 0.8 * padded_plain
    longest = [clips.lengths[rows].max() for rows in epochs[0] if rows]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.2, "the lengths come in random order"


def test_batches_of_similar_lengths_resume_anywhere():
    dataset = ResumableDataset(Clips(1003), seed=1, batch_size=4, accumulation=2)
    whole = read(dataset, num_workers=2)
    for step in (1, 63, 64, 100, dataset.steps_per_epoch - 1):
        dataset.skip_samples = step * dataset.samples_per_step
        assert read(dataset) == whole[step * 2 :]


def test_a_step_of_similar_lengths_has_the_same_rows_however_it_is_dealt_out():
    def steps(**deal) -> list[set[int]]:
        shares = [ResumableDataset(Clips(500), seed=1, rank=r, **deal) for r in range(deal.get("world", 1))]
        parts = deal.get("accumulation", 1)
        return [
            {row for share in shares for part in range(parts) for row in share.rows(0, step * parts + part).tolist()}
            for step in range(shares[0].steps_per_epoch)
        ]

    assert steps(batch_size=8) == steps(batch_size=4, accumulation=2) == steps(batch_size=4, world=2)
