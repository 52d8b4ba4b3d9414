"""The running mean of the weights: what it is, that it trains nothing, and that it is what is judged and kept."""

import json
import shutil

import pytest
import torch
from harness import differences, kill_at
from stages import VISION
from test_config import only_error

from omni.common.errors import UserError
from omni.stages.vision import STAGE
from omni.train import checkpoint
from omni.train.average import WeightAverage
from omni.train.stage import load

DECAY = VISION.config["ema_decay"]
KEYS = {"max_steps": 9, "max_epochs": None, "checkpoint_freq": 1, "keep_checkpoints": 20, "val_freq": 3}


def step_file(training, step: int) -> dict:
    return torch.load(training.step_path(step), weights_only=True)["phases"]["vision"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same training with a mean and without."""
    folder = tmp_path_factory.mktemp("average")
    averaged = VISION.training(folder, save_dir="averaged", **KEYS)
    plain = averaged.changed(save_dir="plain", ema_decay=None)
    plain.finish()
    averaged.finish()
    return plain, averaged


def test_it_is_the_weighted_mean_of_all_steps(trained):
    _, averaged = trained
    weights = [step_file(averaged, step)["module"] for step in range(1, 10)]
    shares = [DECAY ** (9 - step) for step in range(1, 10)]
    for name, mean in step_file(averaged, 9)["average"].items():
        expected = sum(share * one[name] for share, one in zip(shares, weights, strict=True)) / sum(shares)
        torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-5)


def test_it_changes_nothing_in_training(trained):
    plain, averaged = trained
    for step in range(1, 10):
        without, with_mean = step_file(plain, step), step_file(averaged, step)
        assert with_mean.pop("average") and "average" not in without
        assert differences(without, with_mean) == []


def test_it_is_what_is_judged_and_kept(trained):
    plain, averaged = trained
    final = averaged.final_file()
    best = step_file(averaged, final["step"])
    assert differences(best["average"], {name: final["model"][name] for name in best["average"]}) == []
    assert differences(best["module"], final["model"])
    one, other = (training.metrics("val") for training in trained)
    assert [row["step"] for row in one] == [row["step"] for row in other] == [3, 6, 9]
    assert all(without["loss"] != with_mean["loss"] for without, with_mean in zip(one, other, strict=True))
    assert final["metrics"]["loss"] == min(row["loss"] for row in other)


# Prelude: the first validation is the best.
WORSE = """
import omni.train.validation
_found = omni.train.validation._metrics
def worse(training, totals):
    found = _found(training, totals)
    return found | {"loss": found["loss"] + training.progress.step}
omni.train.validation._metrics = worse
"""


def test_the_mean_of_the_best_step_is_kept(trained):
    _, averaged = trained
    first = averaged.changed(save_dir="first")
    assert "holds the weights of step 3, their running mean" in first.finish(prelude=WORSE).stdout
    final, best, last = first.final_file(), step_file(first, 3), step_file(first, 9)
    assert final["step"] == 3 and differences(best["average"], last["average"])
    assert differences(best["average"], {name: final["model"][name] for name in best["average"]}) == []


def test_a_training_is_opened_with_the_mean_that_was_judged(trained):
    _, averaged = trained
    opened = load(STAGE, averaged.step_path(6), "cpu").model.state_dict()
    mean = step_file(averaged, 6)["average"]
    assert differences(mean, {name: opened[name] for name in mean}) == []
    done = load(STAGE, averaged.save_dir, "cpu").model.state_dict()
    assert differences(done, averaged.final_file()["model"]) == []


@pytest.mark.parametrize("damage", [{}, 5, {"logit_scale": torch.zeros(7)}], ids=["empty", "a number", "a shape"])
def test_a_mean_of_something_else_is_one_line(trained, damage):
    _, averaged = trained
    other = averaged.changed(save_dir="other", max_steps=2)
    other.finish()
    payload = other.newest()
    payload["phases"]["vision"]["average"] = damage
    checkpoint.save(other.step_path(2), payload)
    only_error(other.changed(max_steps=3).run(), str(other.step_path(2)))
    with pytest.raises(UserError, match=str(other.step_path(2))):
        load(STAGE, other.step_path(2), "cpu")
    shutil.rmtree(other.save_dir)


def test_a_damaged_mean_of_the_best_step_is_one_line(trained):
    _, averaged = trained
    first = averaged.changed(save_dir="damaged")
    first.finish(prelude=WORSE)
    payload = torch.load(first.step_path(3), weights_only=True)
    payload["phases"]["vision"]["average"] = 5
    checkpoint.save(first.step_path(3), payload)
    (first.save_dir / first.final).unlink()
    only_error(first.run(prelude=WORSE), str(first.step_path(3)))


def test_a_killed_run_ends_with_the_same_mean(trained, tmp_path):
    _, averaged = trained
    killed = averaged.changed(save_dir="killed", checkpoint_freq=4)
    for call, count in (("omni.train.loop:Loop.train_step", 5), ("omni.train.validation:_metrics", 1)):
        assert killed.run(kill_at(call, count)).returncode == -9
    killed.finish()
    assert differences(step_file(killed, 9), step_file(averaged, 9)) == []
    assert differences(killed.final_file()["model"], averaged.final_file()["model"]) == []


def test_the_models_own_weights_return_whatever_happens():
    module = torch.nn.Linear(3, 2)
    average = WeightAverage(module, 0.5)
    with torch.no_grad():
        module.weight.add_(1)
    own = module.weight.clone()
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert not torch.equal(module.weight, own)
        raise ZeroDivisionError
    assert torch.equal(module.weight, own)


def test_a_run_that_began_without_it_is_refused(trained):
    plain, _ = trained
    only_error(plain.changed(ema_decay=DECAY, max_steps=12).run(), str(plain.step_path(9)), "ema_decay: null -> 0.8")
    payload = plain.newest()
    del payload["config"]["ema_decay"]  # as a version that did not have it
    checkpoint.save(plain.step_path(9), payload)
    only_error(plain.changed(ema_decay=DECAY, max_steps=12).run(), str(plain.step_path(9)), 'without "ema_decay"')


@pytest.mark.parametrize("decay", [0, 1, -0.5, "much"])
def test_a_decay_that_is_none_is_one_line(trained, decay):
    plain, _ = trained
    only_error(plain.changed(save_dir="refused", ema_decay=decay).run(), '"ema_decay"', json.dumps(decay))
