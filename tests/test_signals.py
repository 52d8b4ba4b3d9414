"""SIGTERM and Ctrl-C save and stop; two processes never share a folder."""

import os
import signal
import time
from pathlib import Path

import pytest
from harness import SLOW, TAKEN_APART, differences, hung_worker, kill_at, wait_until
from stages import TALKER

# What a test has to interrupt waits for the signal, however slow the machine is.
WAITING = """
import time, omni.train.run
_on_signal, _heard = omni.train.run.Run._on_signal, []
def on_signal(self, number, frame):
    _heard.append(number)
    _on_signal(self, number, frame)
omni.train.run.Run._on_signal = on_signal
def wait_for_signal():
    while not _heard:
        time.sleep(0.01)
"""

WAITING_STEP = (
    WAITING
    + """
import omni.train.loop
omni.train.loop.STEP_HOOKS.append(lambda run, step, rows: step < 3 or wait_for_signal())
"""
)

WAITING_VALIDATION = (
    WAITING
    + """
import omni.train.validation
_build_loader = omni.train.validation.build_loader
def build_loader(*args):
    loader = _build_loader(*args)
    print("validating", flush=True)
    def slowly():
        for batch in loader:
            wait_for_signal()
            yield batch
    return slowly()
omni.train.validation.build_loader = build_loader
"""
)

# Between two micro-batches of one step: the safe point is the step before, and dropout has already drawn numbers.
WAITING_MICRO_STEP = (
    WAITING
    + """
_autocast, _calls = omni.train.run.Run.autocast, [0]
def autocast(self):
    _calls[0] += 1
    if _calls[0] == 8:
        print("second micro-step", flush=True)
        wait_for_signal()
    return _autocast(self)
omni.train.run.Run.autocast = autocast
"""
)

# The second save takes as long as a test may.
ENDLESS_SAVE = """
import time, torch
_save, _calls = torch.save, [0]
def save(payload, file):
    _save(payload, file)
    _calls[0] += 1
    if _calls[0] == 2:
        file.file.flush()
        print("saving", flush=True)
        time.sleep(1000)
torch.save = save
"""

MOMENTS = {
    "in training": (WAITING_STEP, "step 3/", {}),
    "in validation": (WAITING_VALIDATION, "validating", {}),
    "between micro-steps": (WAITING_MICRO_STEP, "second micro-step", {"gradient_accumulation_steps": 3}),
}


@pytest.mark.loop
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_a_signal_saves_and_stops(stage, tmp_path, moment, number):
    prelude, text, keys = moment
    if keys and "adv_start_step" in stage.config:
        keys = keys | {"adv_start_step": 0}  # two phases have begun
    reference = stage.training(tmp_path, save_dir="reference", num_workers=2, **keys)
    reference.finish()
    stopped = reference.changed(save_dir="stopped")
    process = stopped.start(prelude=prelude + TAKEN_APART)
    process.wait_for(text)
    process.send(number)
    process.wait()
    assert process.returncode == 75
    assert "saved in" in process.stderr and "Traceback" not in process.stderr
    assert "waits for workers" not in process.stdout.partition("1 process(es)")[2], "a user would, too"
    step = stopped.steps()[-1]
    assert f"stopped at step {step}" in process.stderr
    if text == "step 3/":
        assert step in (3, 4), "the step that had begun, if any"
    if text == "validating":
        assert f"step {step}  validation" not in process.stdout, "it was given up, not finished first"
    again = stopped.finish()
    assert f"resumed at step {step}" in again.stdout
    assert differences(stopped.state(), reference.state()) == []


@pytest.mark.loop(phases=1)
def test_a_second_signal_leaves_no_partial_file(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference")
    reference.finish()
    stopped = reference.changed(save_dir="stopped")
    process = stopped.start(prelude=ENDLESS_SAVE)
    process.wait_for("saving")
    assert list(stopped.save_dir.glob("*.omni-partial"))
    process.send(signal.SIGINT)
    process.wait_for("saving at the next safe point", stream=".err")
    process.send(signal.SIGINT)
    assert process.wait().returncode == 75
    assert not list(stopped.save_dir.glob("*.omni-partial"))
    stopped.finish()
    assert differences(stopped.state(), reference.state()) == []


@pytest.mark.loop(phases=1)
def test_a_partial_file_of_a_killed_save_is_cleared(stage, tmp_path):
    training = stage.training(tmp_path)
    process = training.start(prelude=ENDLESS_SAVE)
    process.wait_for("saving")
    process.kill()
    (partial,) = training.save_dir.glob("*.omni-partial")
    partial.rename(f"{training.step_path(999)}.omni-partial")  # one that nobody will overwrite
    training.finish()
    assert not list(training.save_dir.glob("*.omni-partial"))


@pytest.mark.loop(phases=1)
def test_a_second_process_on_the_same_folder_stops_and_names_the_first(stage, tmp_path):
    training = stage.training(tmp_path, num_workers=2)
    first = training.start(prelude=SLOW)
    first.wait_for("step 3/")
    second = training.run()
    assert second.returncode == 2 and second.stdout == "", "nothing was prepared before it was refused"
    assert f"already in use by process {first.pid}" in second.stderr and second.stderr.count("\n") == 1
    # the first one's workers outlive it for a moment; they must not hold the folder
    first.kill()
    assert os.path.exists(training.save_dir / ".lock")
    training.finish()
    assert not os.path.exists(training.save_dir / ".lock")


# Its first worker begins only when the trainer has been killed.
KILLED_AT_A_FORK = """
import os, signal, time, omni.data.order
_begin_worker = omni.data.order._begin_worker
def begin_worker(trainer, worker):
    if worker == 0:
        os.kill(trainer, signal.SIGKILL)
        time.sleep(0.2)
    with open("workers", "a") as file:
        file.write(f"{os.getpid()}\\n")
    _begin_worker(trainer, worker)
omni.data.order._begin_worker = begin_worker
"""


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("when", ["at a fork", "later"])
def test_no_worker_outlives_a_killed_run(stage, tmp_path, when):
    training = stage.training(tmp_path, num_workers=2)
    prelude = KILLED_AT_A_FORK if when == "at a fork" else KILLED_AT_A_FORK.replace("worker == 0", "False") + SLOW
    process = training.start(prelude=prelude)
    if when == "later":
        process.wait_for("step 3/")
        process.send(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    workers = tmp_path / "workers"
    wait_until(lambda: bool(pids := workers.read_text().split()) and not any(map(alive, pids)), "not all workers ended")


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("shuffle", [True, False], ids=["in training", "in validation"])
@pytest.mark.parametrize("how", ["signal", "time-out"])
def test_a_worker_that_hangs_is_noticed_and_the_step_is_saved(stage, tmp_path, shuffle, how):
    if stage.name in ("talker", "omni") and not shuffle:
        pytest.skip("what is computed beforehand is read in order too; the next test is of that")
    reference = stage.training(tmp_path, save_dir="reference", num_workers=2, val_freq=4)
    reference.finish()
    hung = reference.changed(save_dir="hung")
    hangs = hung_worker(shuffle=shuffle, speed=300 if how == "time-out" else 1)
    process = hung.start(prelude=hangs + TAKEN_APART)
    if how == "signal":
        process.wait_for("1 process(es)")
        while not any(state == "T" for state in states_of_children(process.pid)):
            time.sleep(0.05)
        process.send(signal.SIGTERM)
    assert process.wait().returncode == (1 if how == "time-out" else 75)
    assert "Traceback" not in process.stderr and "Run the same command to go on" in process.stderr
    assert how == "signal" or process.stderr.startswith("error: no batch came in 600 s (loader_timeout_s)")
    steps = hung.steps()  # none, if the worker hung before the first one was made
    assert (f"stopped at step {steps[-1]}" if steps else "before the first step") in process.stderr.lower()
    assert "waits for workers" not in process.stdout.partition("1 process(es)")[2]
    hung.finish()
    assert differences(hung.state(), reference.state()) == []


@pytest.mark.parametrize("how", ["signal", "time-out"])
def test_a_worker_that_hangs_before_training_begins_is_noticed(tmp_path, how):
    reference = TALKER.training(tmp_path, save_dir="reference", num_workers=2)
    reference.finish()
    hung = reference.changed(save_dir="hung")
    process = hung.start(prelude=hung_worker(shuffle=False, speed=300 if how == "time-out" else 1) + TAKEN_APART)
    if how == "signal":
        while not any(state == "T" for state in states_of_children(process.pid)):
            time.sleep(0.05)
        process.send(signal.SIGTERM)
    assert process.wait().returncode == (1 if how == "time-out" else 75)
    assert how == "signal" or process.stderr.startswith("error: no batch came in 600 s (loader_timeout_s)")
    assert "Traceback" not in process.stderr and "waits for workers" not in process.stdout
    hung.finish()
    assert differences(hung.state(), reference.state()) == []


def alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, and not yet asked for its exit code


def states_of_children(pid: int) -> list[str]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2][0] for child in children]


WAITING_FOR_A_LOGOUT = (
    WAITING
    + """
import omni.train.loop
def wait_for_its_end(run, step, rows):
    while step >= 3 and 15 not in _heard:
        time.sleep(0.01)
omni.train.loop.STEP_HOOKS.append(wait_for_its_end)
"""
)


@pytest.mark.loop(phases=1)
def test_a_hangup_saves_however_often_it_comes_and_nohup_ignores_it(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference", num_workers=1)
    reference.finish()
    stopped = reference.changed(save_dir="stopped")
    process = stopped.start(prelude=WAITING_FOR_A_LOGOUT)
    process.wait_for("step 3/")
    group = os.getpgid(process.pid)
    os.killpg(group, signal.SIGHUP)  # the kernel's, to the workers too, and the shell's
    process.send(signal.SIGHUP)
    time.sleep(0.05)
    process.send(signal.SIGTERM)  # a logout's
    assert process.wait().returncode == 75
    assert f"stopped at step {stopped.steps()[-1]}" in process.stderr
    process = stopped.start(prelude="import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SLOW)
    process.wait_for("resumed at step")
    process.send(signal.SIGHUP)
    assert process.wait().returncode == 0, process.stderr
    assert differences(stopped.state(), reference.state()) == []


SIGNALS_AT_ITS_END = """
import os, signal, omni.train.run
_close = omni.train.run.Logs.close
def close(self):
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    _close(self)
omni.train.run.Logs.close = close
"""


@pytest.mark.loop(phases=1)
def test_signals_while_a_stopped_run_ends_change_nothing(stage, tmp_path):
    training = stage.training(tmp_path, num_workers=1)
    process = training.start(prelude=WAITING_STEP + SIGNALS_AT_ITS_END)
    process.wait_for("step 3/")
    process.send(signal.SIGTERM)
    assert process.wait().returncode == 75
    assert process.stderr.rstrip().endswith("Run the same command to go on")
    training.finish()


STREAMS = {
    "stdin closed": "import os, sys\nos.close(0)\nsys.stdin = None\n",
    "stdout closed": "import os, sys\nos.close(1)\nsys.stdout = None\n",
    "stderr closed": "import os, sys\nos.close(2)\nsys.stderr = None\n",
    "all closed": "import os, sys\nos.closerange(0, 3)\nsys.stdin = sys.stdout = sys.stderr = None\n",
    "stdout without a reader": "import os\nr, w = os.pipe()\nos.close(r)\nos.dup2(w, 1)\nos.close(w)\n",
    "stderr without a reader": "import os\nr, w = os.pipe()\nos.close(r)\nos.dup2(w, 2)\nos.close(w)\n",
}


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("prelude", STREAMS.values(), ids=STREAMS.keys())
def test_a_run_needs_no_streams(stage, tmp_path, prelude):
    training = stage.training(tmp_path, max_steps=8, num_workers=1)
    stops = kill_at("omni.train.loop:Loop.train_step", 5, after=True).replace("SIGKILL", "SIGTERM")
    assert training.run(prelude=prelude + stops).returncode == 75
    log = (training.save_dir / "training.log").read_text()
    assert "stopped at step 5, saved in" in log
    training.finish(prelude=prelude)
    log = (training.save_dir / "training.log").read_text()
    assert "resumed at step 5" in log and "finished:" in log
    assert training.newest()["step"] == 8, "and no file of ours took the place of a stream"


FEW_FILES = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("limit", [8, 14, 20, 32, 64])
def test_few_open_files_are_enough_or_one_line(stage, tmp_path, limit):
    training = stage.training(tmp_path, max_steps=8, num_workers=0)
    process = training.run(prelude=FEW_FILES.format(soft=limit, hard=limit))
    assert process.returncode == 0 or ("open files" in process.stderr and process.returncode in (1, 2))
    assert process.stderr.count("\n") <= 1
    assert limit < 64 or process.returncode == 0
    training.finish()


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("hard", [20, 64, 255])
def test_too_few_open_files_for_workers_are_one_line(stage, tmp_path, hard):
    """What a worker sends is an open file each; one that has none left prints a traceback, or hangs."""
    training = stage.training(tmp_path, max_steps=8, num_workers=2)
    process = training.run(prelude=FEW_FILES.format(soft=hard, hard=hard))
    assert process.returncode in (1, 2) and "open files" in process.stderr and process.stderr.count("\n") == 1
    training.finish(prelude=FEW_FILES.format(soft=20, hard=256))
