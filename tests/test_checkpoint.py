"""A checkpoint on disk is either complete or recognised as damaged; a run never goes on from a bad one."""

import os
import random
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from harness import ROOT, differences, kill_at

from omni import checkpoint
from omni.errors import RunError


@pytest.fixture
def sealed(tmp_path) -> Path:
    path = tmp_path / "stage_step_7.pt"
    checkpoint.save(path, {"format": 1, "weights": torch.arange(24.0).view(4, 6), "step": 7, "name": "x", "none": None})
    return path


class Marker:
    """Pickles to code that creates a file when the pickle is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# The file ----------------------------------------------------------------------------------------------------------


def test_a_sealed_file_opens_with_plain_torch_and_zip(sealed):
    assert torch.load(sealed, weights_only=True)["step"] == 7
    assert zipfile.ZipFile(sealed).testzip() is None


def test_every_flipped_bit_is_detected(sealed):
    data = sealed.read_bytes()
    for bit in random.Random(0).sample(range(len(data) * 8), 400):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        sealed.write_bytes(flipped)
        with pytest.raises(checkpoint.DamagedCheckpoint):
            checkpoint.load(sealed)


def test_every_truncation_is_detected(sealed):
    data = sealed.read_bytes()
    for length in range(len(data)):
        sealed.write_bytes(data[:length])
        with pytest.raises(checkpoint.DamagedCheckpoint):
            checkpoint.load(sealed)


def test_a_pickle_with_code_is_refused_even_with_a_valid_checksum(tmp_path):
    path, marker = tmp_path / "evil_step_1.pt", tmp_path / "marker"
    checkpoint.save(path, {"format": 1, "weights": Marker(marker)})
    with pytest.raises(checkpoint.DamagedCheckpoint):
        checkpoint.load(path)
    assert not marker.exists()


def test_nothing_in_the_tree_loads_unsafely():
    unsafe = "weights_only=" + "False"
    files = [path for pattern in ("*.py", "omni/*.py", "scripts/*.py", "tests/*.py") for path in ROOT.glob(pattern)]
    assert len(files) > 15
    assert [path for path in files if unsafe in path.read_text(encoding="utf-8").replace(" ", "")] == []


def test_a_failed_write_leaves_the_old_file_and_no_temporary(sealed):
    before = sealed.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(RunError, match="Earlier files are intact"):
            checkpoint.save(sealed, {"format": 1, "weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sealed.read_bytes() == before
    assert list(sealed.parent.iterdir()) == [sealed]


def test_order_and_retention_are_numeric(tmp_path):
    for step in (9, 10, 100, 20):
        checkpoint.save(tmp_path / f"stage_step_{step}.pt", {"format": 1, "step": step})
    for name in ("stage_step_x.pt", "stage_step_3.pt.bak", "other_step_500.pt"):
        (tmp_path / name).touch()
    assert [step for step, _ in checkpoint.step_files(tmp_path, "stage")] == [100, 20, 10, 9]
    checkpoint.prune(tmp_path, "stage", keep=2, best_step=9)
    assert [step for step, _ in checkpoint.step_files(tmp_path, "stage")] == [100, 20, 9]
    assert (tmp_path / "other_step_500.pt").exists()


# The run -----------------------------------------------------------------------------------------------------------


@pytest.mark.loop
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_falls_back(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference")
    reference.finish()
    damaged = reference.changed(save_dir="damaged")
    assert damaged.run(prelude=kill_at("omni.loop:_Training._train_step", 14)).returncode == -9
    path = damaged.step_path(damaged.steps()[-1])
    path.write_bytes(path.read_bytes()[:-9])
    process = damaged.finish()
    assert "Set aside" in process.stdout and path.name in process.stdout
    assert path.with_name(path.name + ".damaged").exists()
    assert differences(damaged.state(), reference.state()) == []


@pytest.mark.loop
def test_all_checkpoints_damaged_stops_the_run_every_time(stage, tmp_path):
    training = stage.training(tmp_path)
    assert training.run(prelude=kill_at("omni.loop:_Training._train_step", 14)).returncode == -9
    for step in training.steps():
        path = training.step_path(step)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    for _ in range(2):
        process = training.run()
        assert process.returncode == 1
        assert "every checkpoint is damaged" in process.stderr and process.stderr.count("\n") == 1
        assert training.steps() == []


@pytest.mark.loop
def test_a_malicious_checkpoint_is_refused_by_the_run(stage, tmp_path):
    training, marker = stage.training(tmp_path), tmp_path / "marker"
    training.save_dir.mkdir()
    checkpoint.save(training.step_path(5), {"format": 1, "phases": Marker(marker)})
    assert training.run().returncode == 1
    assert not marker.exists()


@pytest.mark.loop
def test_disk_full_during_a_save(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference")
    reference.finish()
    full = reference.changed(save_dir="full")
    prelude = """
import resource, omni.checkpoint
_save, _calls = omni.checkpoint.save, [0]
def save(path, payload):
    _calls[0] += 1
    if _calls[0] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    _save(path, payload)
omni.checkpoint.save = save
"""
    process = full.run(prelude=prelude)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert len(full.steps()) == 2 and not list(full.save_dir.glob("*.omni-partial"))
    full.finish()
    assert differences(full.state(), reference.state()) == []


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("call", ["os:fsync", "os:replace", "omni.checkpoint:_SealingFile.write"])
def test_killed_at_each_write_fsync_and_rename_of_a_save(stage, tmp_path, call):
    prepared = stage.training(tmp_path, save_dir="prepared")
    prepared.finish()  # so that the only writes left are those of checkpoints
    for count in (1, 2, 3, 5, 8, 13):
        training = prepared.changed(save_dir=f"killed {count}", checkpoint_freq=1, max_steps=3)
        training.run(prelude=kill_at(call, count))
        for step in training.steps():
            checkpoint.load(training.step_path(step))
        training.finish()
        assert training.newest()["step"] == 3


@pytest.mark.loop
def test_the_best_checkpoint_is_kept_and_becomes_the_final_file(stage, tmp_path):
    worse_later = """
import omni.loop
_validate = omni.loop._Training._validate
def validate(self):
    metrics = self.validation.metrics
    name, step = self.run.stage.best_metric, self.progress.step
    self.validation.metrics = lambda totals: metrics(totals) | {name: float(abs(step - 7))}
    try:
        return _validate(self)
    finally:
        self.validation.metrics = metrics
omni.loop._Training._validate = validate
"""
    training = stage.training(tmp_path)
    process = training.finish(prelude=worse_later)
    steps = training.steps()
    assert steps[0] == 7 and len(steps) == 3
    assert "holds the weights of step 7" in process.stdout
    best, final = torch.load(training.step_path(7), weights_only=True), training.final_file()
    assert final["step"] == 7 and final.keys() == {"format", "stage", "config", "step", "metrics", "model"}
    assert differences(list(best["phases"].values())[-1]["module"], final["model"]) == []
    assert differences(training.newest()["phases"], best["phases"]) != []
