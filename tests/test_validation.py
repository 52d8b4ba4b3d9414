"""A step is saved before it is judged: a validation that fails, or a kill in it, costs no step and changes no bit."""

import json
import os
import re

import pytest
from harness import TRACE, differences, kill_at_step

from omni.train import checkpoint
from omni.train.progress import Progress, read_validated, write_validated

# In the ``FAILS``-th validation of the process, at its first batch.
FAILING = """
import os, signal, torch, omni.train.loop, omni.train.validation
_validate, _to_device, _validations = omni.train.loop.validate, omni.train.validation.to_device, [0]
def validate(*args):
    _validations[0] += 1
    _validate(*args)
def to_device(batch, device):
    if _validations[0] == int(os.environ["FAILS"]):
        if os.environ["HOW"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise torch.OutOfMemoryError("no memory for validation")
    return _to_device(batch, device)
omni.train.loop.validate, omni.train.validation.to_device = validate, to_device
"""

# One line per file that is moved into place.
REPLACED = """
import os
_replace = os.replace
def replace(old, new):
    with open(os.environ["TRACE"] + ".files", "a") as file:
        file.write(os.path.basename(new) + "\\n")
    _replace(old, new)
os.replace = replace
"""


def step_files_written(training) -> list[str]:
    names = training.trace_path.with_name(training.trace_path.name + ".files").read_text().split()
    return [name for name in names if name.startswith(f"{training.prefix}_step_")]


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_every_validation_fails_once_and_no_step_is_made_twice(stage, tmp_path, how):
    keys = {"max_steps": 12, "val_freq": 4, "checkpoint_freq": 100}
    reference = stage.training(tmp_path, save_dir="reference", **keys)
    reference.prelude = TRACE + REPLACED
    reference.finish()
    failing = reference.changed(save_dir="failing")
    validations = len(reference.metrics("val"))
    for number in range(validations):
        # the first validation of a run but the first one is that which failed before
        process = failing.run(prelude=FAILING, env={"FAILS": str(min(number, 1) + 1), "HOW": how})
        assert process.returncode == (-9 if how == "kill" else 1)
        assert failing.steps()[-1] == failing.last_traced() + 1, "the step before the validation was saved"
    failing.finish()
    assert failing.traced() == reference.traced(), "no step was made twice"
    assert failing.trace() == reference.trace()
    assert differences(failing.state(), reference.state()) == []
    for training in (reference, failing):
        written = step_files_written(training)
        assert len(written) == len(set(written)), "no step is written twice"
        judged = {f"{training.prefix}_step_{row['step']}.pt" for row in training.metrics("val")}
        assert judged <= set(written)


def as_an_older_version_left_it(training) -> None:
    """What a validation found stood in the step file, which was written after it."""
    path = training.step_path(training.steps()[-1])
    payload, found = checkpoint.load(path), json.loads(validated_path(training).read_text())
    checkpoint.save(path, payload | {key: found[key] for key in payload.keys() & found.keys()})
    validated_path(training).unlink()


def validated_path(training):
    return training.save_dir / f"{training.prefix}_validated.json"


def damage(training) -> None:
    path = validated_path(training)
    text = path.read_text()
    path.write_text(text.replace('"metrics": {', '"metrics": {"other": 1.0, '))
    assert path.read_text() != text


CHANGES = {
    "older": as_an_older_version_left_it,
    "damaged": damage,
    "lost": lambda training: validated_path(training).unlink(),
    "the newest step file is damaged": lambda training: os.truncate(training.step_path(training.steps()[-1]), 1000),
    "nothing": lambda training: None,
}


@pytest.mark.loop(phases=1)
def test_what_a_validation_found_is_of_its_step_or_is_found_again(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference", max_steps=10, val_freq=3, checkpoint_freq=1)
    reference.finish()
    for name, change in CHANGES.items():
        killed = reference.changed(save_dir=f"killed {name}")
        assert killed.run(prelude=kill_at_step(7)).returncode == -9
        assert killed.steps()[-1] == 6, "which was validated"
        change(killed)
        process = killed.finish()
        again = "step 6  validation" in process.stdout
        assert again == (name not in ("older", "nothing")), "only what is not known is judged again"
        assert differences(killed.state(), reference.state()) == []


# The metric that chooses the best step; the others have "loss"
JUDGED_BY = {"audio_enc": "wer", "talker": "code_perplexity", "vocoder": "mel_l1", "ocr": "cer"}

METRICS = """
import omni.train.loop
_validate, _validations = omni.train.loop.validate, [0]
def validate(training, *args):
    _validations[0] += 1
    metrics, name = training.validation.metrics, training.run.stage.best_metric
    if _validations[0] == 1 or {always}:
        training.validation.metrics = lambda totals: {change}
    _validate(training, *args)
    training.validation.metrics = metrics
omni.train.loop.validate = validate
"""


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_said_and_never_best(stage, tmp_path, value):
    change = f"metrics(totals) | {{name: float('{value}')}}"
    once = stage.training(tmp_path, save_dir="once", max_steps=6, val_freq=3)
    process = once.finish(prelude=METRICS.format(change=change, always=False))
    name = JUDGED_BY.get(stage.name, "loss")
    assert re.search(rf"step 3: validation: not finite: .*{name}", process.stdout)
    assert process.stdout.count("(best)") == 1
    assert once.final_file()["step"] == 6
    always = once.changed(save_dir="always")
    process = always.finish(prelude=METRICS.format(change=change, always=True))
    assert "(best)" not in process.stdout and "holds the weights of step 6" in process.stdout


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("change", ["{'other': 1.0}", "{name: 1.0 / 0}"], ids=["no such rows", "a mean over nothing"])
def test_rows_that_the_best_metric_needs_and_that_cannot_be_used_are_one_line(stage, tmp_path, change):
    training = stage.training(tmp_path, max_steps=6, val_freq=3)
    process = training.run(prelude=METRICS.format(change=change, always=True))
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    name = JUDGED_BY.get(stage.name, "loss")
    assert f"not one of the held-out rows that {name} is measured on can be used" in process.stderr
    assert training.steps() == [3]


def test_what_was_found_of_another_file_of_the_same_step_does_not_count(tmp_path):
    progress = Progress(step=200, validated_step=200, metrics={"loss": 1.0})
    write_validated(tmp_path, "thinker", progress, b"sha256:a")
    assert read_validated(tmp_path, "thinker", b"sha256:a") == vars(progress)
    assert read_validated(tmp_path, "thinker", b"sha256:b") == {}
