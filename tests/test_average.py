"""The running mean of the weights: what it is, that it trains nothing, and that it is what is judged and kept."""

import json

import pytest
import torch
from harness import differences, kill_at
from stages import VISION
from test_config import only_error

from omni.train import checkpoint
from omni.train.average import WeightAverage

DECAY = 0.8
KEYS = {"max_steps": 9, "max_epochs": None, "checkpoint_freq": 1, "keep_checkpoints": 20, "val_freq": 3}


def step_file(training, step: int) -> dict:
    return torch.load(training.step_path(step), weights_only=True)["phases"]["vision"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same training with a mean and without."""
    folder = tmp_path_factory.mktemp("average")
    plain = VISION.training(folder, save_dir="plain", **KEYS)
    averaged = VISION.training(folder, save_dir="averaged", ema_decay=DECAY, **KEYS)
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


def test_a_killed_run_ends_with_the_same_mean(trained, tmp_path):
    _, averaged = trained
    killed = averaged.changed(save_dir="killed")
    for call, count in (("omni.train.loop:Loop.train_step", 5), ("omni.train.validation:_metrics", 1)):
        assert killed.run(kill_at(call, count)).returncode == -9
    killed.finish()
    assert differences(killed.state(), averaged.state()) == []


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
