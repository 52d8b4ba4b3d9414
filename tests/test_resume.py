"""A run that is killed and run again ends with the same bits as a run that was never killed."""

import re
from itertools import product

import pytest
import torch
from harness import SLOW, TRACE, differences, kill_at, kill_at_random_instants, kill_at_step

from omni.train.device import pick_amp_dtype

GRID = [
    {"num_workers": workers, "gradient_accumulation_steps": accumulation}
    for workers in (0, 2)
    for accumulation in (1, 3)
]


def grid_id(keys: dict) -> str:
    return ",".join(f"{name.split('_')[-1]}={value}" for name, value in keys.items())


@pytest.mark.loop
def test_sigkill_at_random_instants(stage, tmp_path):
    check_random_kills(stage, tmp_path, GRID[-1])


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("keys", GRID[:-1], ids=grid_id)
def test_sigkill_at_random_instants_of_the_grid(stage, tmp_path, keys):
    check_random_kills(stage, tmp_path, keys)


@pytest.mark.torture
@pytest.mark.parametrize(
    "keys",
    [
        keys | {"drop_last": drop_last, "use_amp": use_amp}
        for keys, drop_last, use_amp in product(GRID, (True, False), (False, True))
        if (drop_last, use_amp) != (True, False)  # those are the two tests above
    ],
    ids=grid_id,
)
def test_sigkill_at_random_instants_of_the_whole_grid(stage, tmp_path, keys):
    check_random_kills(stage, tmp_path, keys)


def check_random_kills(stage, tmp_path, keys) -> None:
    reference = stage.training(tmp_path, save_dir="reference", max_steps=30, **keys, **stage.whole)
    reference.prelude = TRACE + SLOW
    finish_in_the_dtype_asked_for(reference)
    assert reference.metrics()[-1]["epoch"] >= 2, "three epochs"
    for killed in kill_at_random_instants(reference, 8 if stage.name == "text" else 4):  # the loop is shared
        assert killed.trace() == reference.trace()
        assert differences(killed.state(), reference.state()) == []


def finish_in_the_dtype_asked_for(reference) -> None:
    """Under ``use_amp`` it must be bf16: a fall-back to float32 would show nothing."""
    wanted = "bfloat16" if reference.config["use_amp"] else "float32"
    if wanted == "bfloat16" and pick_amp_dtype(True, torch.device("cpu")) is None:
        pytest.skip("this CPU has no bf16 arithmetic")
    assert f"steps on cpu in {wanted}," in reference.finish().stdout


PARTIAL = [
    {"use_amp": True, "gradient_accumulation_steps": 3, "drop_last": False},
    {"drop_last": False},
    {"drop_last": False, "gradient_accumulation_steps": 3, "num_workers": 2},
    {"use_amp": True, "num_workers": 2},
]


def test_resume_is_exact_with_partial_steps_and_bf16(stage, tmp_path):
    check_partial_steps(stage, tmp_path, PARTIAL[0])


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("keys", PARTIAL[1:], ids=grid_id)
def test_resume_is_exact_with_partial_steps_or_bf16(stage, tmp_path, keys):
    check_partial_steps(stage, tmp_path, keys)


def check_partial_steps(stage, tmp_path, keys) -> None:
    reference = stage.training(tmp_path, save_dir="reference", max_epochs=4, **keys)
    reference.prelude = TRACE
    finish_in_the_dtype_asked_for(reference)
    killed = reference.changed(save_dir="killed")
    for at_step in (4, 5):
        assert killed.run(prelude=kill_at_step(at_step)).returncode == -9
    killed.finish()
    assert killed.trace() == reference.trace()
    assert differences(killed.state(), reference.state()) == []


def kill_at_last_step(*, after: bool = False) -> str:
    return f"""
import os, signal, omni.train.loop
_last_step = omni.train.loop.Loop.train_step
def train_step(self, micro_batches):
    last = self.progress.step == self.training.total_steps - 1
    if not last or {after}:
        _last_step(self, micro_batches)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
omni.train.loop.Loop.train_step = train_step
"""


BOUNDARIES = {
    "first batch": [kill_at_step(1)],
    "after the first batch": [kill_at("omni.train.loop:Loop.train_step", 1, after=True)],
    "last batch": [kill_at("omni.train.resume:Checkpoints.write_final", 1)],
    "before an epoch's loader": [kill_at("omni.train.loop:build_loader", 2)],
    "during validation": [
        kill_at("omni.train.loop:validate", 1),
        kill_at("omni.train.validation:untouched_rng", 2, after=True),
        kill_at("omni.train.validation:to_device", 2),  # its second batch
    ],
    "during a save": [kill_at("torch:save", 2), kill_at("torch:save", 2, after=True)],
    "before and after the rename": [kill_at("os:replace", 4), kill_at("os:replace", 5, after=True)],
    "the last training step": [kill_at_last_step(), kill_at_last_step(after=True)],
    "three times in one epoch": [kill_at_step(n) for n in (3, 2, 4)],
}


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("kills", BOUNDARIES.values(), ids=BOUNDARIES.keys())
def test_kills_at_boundaries(stage, tmp_path, kills):
    reference = stage.training(tmp_path, save_dir="reference", checkpoint_freq=2)
    reference.prelude = TRACE
    steps_per_epoch = int(re.search(r"(\d+) steps per epoch", reference.finish().stdout)[1])
    killed = reference.changed(save_dir="killed")
    epochs = []
    for kill in kills:
        assert killed.run(prelude=kill).returncode == -9
        epochs.append(killed.last_traced() // steps_per_epoch)
    assert len(kills) < 3 or kills == BOUNDARIES["during validation"] or epochs == [0, 0, 0], "three times in one epoch"
    killed.finish()
    assert killed.trace() == reference.trace()
    assert differences(killed.state(), reference.state()) == []


MUTATIONS = {
    "skip_samples never set": """
import omni.data.order
omni.data.order.ResumableDataset.skip_samples = property(lambda self: 0, lambda self, value: None)
""",
    "random state not restored": """
import omni.train.resume
omni.train.resume.set_rng_state = lambda state, device: None
""",
    "optimizer not restored": """
import torch
torch.optim.AdamW.load_state_dict = lambda self, state: None
""",
}


@pytest.mark.loop
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_the_comparison_sees_each_broken_mechanism(stage, tmp_path, mutation):
    if "set_rng_state" in mutation and not stage.draws:
        pytest.skip("draws no random numbers that would have to be restored")
    reference = stage.training(tmp_path, save_dir="reference")
    reference.prelude = TRACE
    reference.finish()
    killed = reference.changed(save_dir="killed")
    assert killed.run(prelude=kill_at_step(7)).returncode == -9
    killed.finish(prelude=mutation)
    assert differences(killed.state()["newest"]["phases"], reference.state()["newest"]["phases"]) != []
    if "skip_samples" in mutation:
        with pytest.raises(AssertionError):
            assert killed.trace() == reference.trace()


@pytest.mark.loop
def test_another_num_workers_between_runs_changes_nothing(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference", num_workers=0)
    reference.prelude = TRACE
    reference.finish()
    killed = reference.changed(save_dir="killed")
    for workers, at_step in ((0, 4), (3, 6), (1, 5)):
        killed.config["num_workers"] = workers
        assert killed.run(prelude=kill_at_step(at_step)).returncode == -9
    killed.config["num_workers"] = 2
    killed.finish()
    assert killed.trace() == reference.trace()
    assert differences(killed.state(), reference.state()) == []


# A validation that draws random numbers, as one that generates samples does.
DRAWING_VALIDATION = """
import random, numpy, torch, omni.train.validation
_to_device = omni.train.validation.to_device
def to_device(batch, device):
    torch.rand(1), numpy.random.rand(), random.random()
    return _to_device(batch, device)
omni.train.validation.to_device = to_device
"""


def test_validation_changes_nothing_in_training(stage, tmp_path):
    often = stage.training(tmp_path, save_dir="often", val_freq=1, **stage.whole)
    often.prelude = DRAWING_VALIDATION
    never = stage.training(tmp_path, save_dir="never", val_freq=10_000, **stage.whole)
    for training in (often, never):
        training.finish()
    assert len(often.metrics("val")) > len(never.metrics("val"))
    assert differences(often.newest()["phases"], never.newest()["phases"]) == []
    assert differences(often.newest()["rng"], never.newest()["rng"]) == []


# One line per validation: how many rows are held out, and which were seen.
VALIDATED_ROWS = """
import os, omni.train.loop, omni.train.validation
_validate, _to_device, _rows = omni.train.loop.validate, omni.train.validation.to_device, []
def to_device(batch, device):
    _rows.extend(batch["rows"])
    return _to_device(batch, device)
def validate(training, *args):
    _rows.clear()
    _validate(training, *args)
    with open(os.environ["TRACE"], "a") as file:
        file.write(f"{len(training.validation.dataset.source)} {_rows}\\n")
omni.train.loop.validate, omni.train.validation.to_device = validate, to_device
"""


def test_each_validation_sees_each_held_out_row_once(stage, tmp_path):
    training = stage.training(tmp_path)
    training.finish(prelude=VALIDATED_ROWS)
    lines = training.trace_path.read_text().splitlines()
    assert len(lines) == len(training.metrics("val")) > 2
    for line in lines:
        held_out, rows = line.split(" ", 1)
        assert eval(rows) == list(range(int(held_out)))


@pytest.mark.loop
def test_progress_of_a_resumed_run(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference", print_freq=1)
    reference.finish()
    killed = reference.changed(save_dir="killed")
    assert killed.run(prelude=kill_at_step(8)).returncode == -9
    bar = """
import omni.train.logs, sys
class Bar(omni.train.logs.tqdm):
    def __init__(self, *args, **kwargs):
        print("BAR", kwargs["initial"], kwargs["total"], flush=True)
        super().__init__(*args, **kwargs)
omni.train.logs.tqdm = Bar
sys.stderr.isatty = lambda: True
"""
    process = killed.finish(prelude=bar)
    steps = reference.newest()["step"]
    assert f"BAR 7 {steps}" in process.stdout  # killed in its 8th step; validation 7 was the best so far
    assert "resumed at step 7" in process.stdout
    assert killed.metrics() == reference.metrics()
    assert [row["step"] for row in killed.metrics()] == list(range(1, steps + 1))


def test_every_sample_once_per_epoch_in_another_order(stage, tmp_path):
    training = stage.training(tmp_path, drop_last=False, num_workers=2)
    training.prelude = TRACE
    training.finish()
    payload, trace = training.newest(), training.trace()
    samples = int(payload["data"]["samples"])
    steps_per_epoch = len(trace) // 3
    epochs = [[row for s in range(e * steps_per_epoch, (e + 1) * steps_per_epoch) for row in sum(eval(trace[s, 0]), [])]
              for e in range(3)]  # fmt: skip
    assert all(sorted(rows) == list(range(samples)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
