"""Awkward folders, finished runs, losses that are not finite."""

import os

import pytest
import torch
from harness import SLOW, TAKEN_APART, differences, kill_at, kill_at_step
from stages import TEXT, VOCODER
from test_config import only_error

from omni.train import device


def snapshot(folder) -> dict:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_rerun_changes_no_file(stage, tmp_path):
    training = stage.training(tmp_path)
    training.finish()
    before = snapshot(tmp_path)
    process = training.finish()
    after = snapshot(tmp_path)
    assert "already finished" in process.stdout
    new = {path.name for path in after.keys() - before.keys()}
    assert all(name.startswith("run_2.") for name in new), "only this test's own config and output"
    assert {path: after[path] for path in before} == before


def test_paths_with_spaces_and_non_ascii_letters(stage, tmp_path):
    folder = tmp_path / "mein Ordner µ 音声"
    folder.mkdir()
    training = stage.training(folder, save_dir="läuft gut", max_steps=8)
    assert training.run(prelude=kill_at_step(7)).returncode == -9
    training.finish()


@pytest.mark.loop(phases=1)
def test_an_unwritable_save_dir_is_refused_before_the_first_step(stage, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for where in ("/proc/omni", str(tmp_path / "file" / "below")):
        training = stage.training(tmp_path, save_dir=where)
        process = training.changed(save_dir=where).run()
        only_error(process, "cannot write to save_dir")
        assert "step" not in process.stdout


@pytest.mark.loop(phases=1)
def test_file_times_do_not_decide_which_checkpoint_is_newest(stage, tmp_path):
    training = stage.training(tmp_path)
    assert training.run(prelude=kill_at_step(14)).returncode == -9
    steps = training.steps()
    for age, step in enumerate(steps):
        os.utime(training.step_path(step), (1e9 - age, 1e9 - age))
    assert f"resumed at step {steps[-1]}" in training.finish().stdout


@pytest.mark.loop
def test_an_extension_that_is_killed_at_its_end_still_renews_the_final_file(stage, tmp_path):
    training = stage.training(tmp_path, max_steps=10)
    training.finish()
    longer = training.changed(max_steps=14)
    assert longer.run(prelude=kill_at("omni.train.resume:Checkpoints.write_final", 1)).returncode == -9
    assert longer.final_file()["metrics"]["trained_steps"] == 10
    assert "finished:" in longer.finish().stdout
    assert longer.final_file()["metrics"]["trained_steps"] == 14
    assert "already finished at step 14" in longer.finish().stdout
    assert "max_steps is 10" in training.finish().stdout, "it has taken more than are asked for"


WORKERS_FAIL = """
import omni.data.order
def fail(self):
    raise {error}("a fault in a worker")
    yield
omni.data.order.ResumableDataset.__iter__ = fail
"""


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("error", ["KeyError", "RuntimeError", "EOFError"])
def test_a_fault_in_a_data_worker_ends_the_run_with_its_traceback(stage, tmp_path, error):
    process = stage.training(tmp_path, num_workers=2).run(prelude=WORKERS_FAIL.format(error=error))  # it once hung
    assert process.returncode == 1
    assert "Traceback" in process.stderr and "out of memory" not in process.stderr
    assert "a fault in a worker" in process.stderr.rstrip().splitlines()[-1], process.stderr


# In the middle of an epoch, where each worker has batches to come.
A_WORKER_DIES = """
import multiprocessing, omni.train.loop
def kill(run, step, rows):
    if step == 3:
        multiprocessing.active_children()[0].kill()
omni.train.loop.STEP_HOOKS.append(kill)
"""


@pytest.mark.loop(phases=1)
def test_a_dead_data_worker_ends_the_run_in_one_line(stage, tmp_path):
    training = stage.training(tmp_path, num_workers=2)
    process = training.run(prelude=A_WORKER_DIES + SLOW + TAKEN_APART)
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    assert "DataLoader worker" in process.stderr and "Run the same command" in process.stderr
    assert "waits for workers" not in process.stdout.partition("1 process(es)")[2]
    training.finish()


@pytest.mark.loop(phases=1)
def test_a_reader_that_leaves_does_not_end_the_run(stage, tmp_path):
    training = stage.training(tmp_path)
    closed = "import os\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
    training.run(prelude=closed)
    assert "finished:" in (training.save_dir / "training.log").read_text()


SLOW_PREPARATION = """
import time, omni.data.corpus, omni.data.measure, omni.data.open_manifest
for _module, _name, _seconds in (
    (omni.data.corpus, "_tokenise", 3.0), (omni.data.open_manifest, "_make_index", 3.0),
    (omni.data.measure, "measure", 0.5),
):
    def _slow(*args, _original=getattr(_module, _name), _name=_name, _seconds=_seconds, **keys):
        time.sleep(_seconds)
        print("preparing:", _name, keys.get("desc", ""), getattr(args[1], "__qualname__", args[1]))
        return _original(*args, **keys)
    setattr(_module, _name, _slow)
"""


def test_two_runs_that_prepare_the_same_data_wait_for_each_other(stage, tmp_path):
    runs = [stage.training(tmp_path, save_dir=name, seed=seed, max_steps=3) for seed, name in enumerate("ab")]
    processes = [run.start(prelude=SLOW_PREPARATION) for run in runs]
    assert [process.wait().returncode for process in processes] == [0, 0], [p.stderr for p in processes]
    assert any("already in use by process" in process.stdout for process in processes)
    prepared = [line for process in processes for line in process.stdout.splitlines() if "preparing:" in line]
    assert prepared and len(prepared) == len(set(prepared))


# NaN ---------------------------------------------------------------------------------------------------------------


def bad_loss(first: int, last: int, kind: str = "nan", micro_batch: int | None = None) -> str:
    """Prelude: in steps first..last the loss (of one micro-batch, from 1, or of all) is "nan" or "inf", or it is finite
    and its gradient is infinite: "gradient"."""
    return f"""
import torch, omni.train.loop
class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, value):
        return value.clone()
    @staticmethod
    def backward(context, gradient):
        return gradient * float("inf")
_bad_step = omni.train.loop.Loop.train_step
def train_step(self, micro_batches):
    for phase in self.training.phases:
        if not hasattr(phase, "honest"):
            phase.honest = phase.loss
        honest, calls, bad = phase.honest, [0], {first} <= self.progress.step <= {last}
        def loss(model, batch, honest=honest, calls=calls):  # each phase its own
            value, scalars = honest(model, batch)
            calls[0] += 1
            if bad and {micro_batch} in (None, calls[0]):
                value = InfiniteGradient.apply(value) if "{kind}" == "gradient" else value * float("{kind}")
            return value, scalars
        phase.loss = loss
    _bad_step(self, micro_batches)
omni.train.loop.Loop.train_step = train_step
"""


def moments(optimizer: dict) -> list[dict]:
    """Of AdamW, or of both parts of Muon; without the learning rates, which go on."""
    return [part["state"] for part in optimizer.get("parts", [optimizer])]


@pytest.mark.loop
def test_a_loss_that_is_not_finite_makes_no_update_and_is_counted(stage, tmp_path):
    for kind, accumulation, micro_batch in (("nan", 1, None), ("inf", 1, None), ("gradient", 1, None), ("nan", 3, 2)):
        training = stage.training(
            tmp_path, save_dir=f"{kind} of {accumulation}", max_steps=10, checkpoint_freq=1, keep_checkpoints=20,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        training.prelude = bad_loss(5, 6, kind, micro_batch)
        assert training.run(prelude=kill_at_step(8)).returncode == -9
        process = training.finish()
        assert "no update (2 so far)" in process.stdout + (training.save_dir / "training.log").read_text()
        module = lambda step: torch.load(training.step_path(step), weights_only=True)["phases"]  # noqa: B023, E731
        for step in (6, 7):
            assert differences(*({n: [p["module"], moments(p["optimizer"])] for n, p in module(s).items()}
                                 for s in (5, step))) == []  # fmt: skip
        assert differences(module(5), module(8)) != []
        assert training.newest()["step"] == 10 and training.newest()["skipped_updates"] == 2
        assert all(torch.isfinite(value).all() for value in training.final_file()["model"].values())


@pytest.mark.loop
def test_many_in_a_row_stop_the_run(stage, tmp_path):
    training = stage.training(tmp_path, max_nonfinite_steps=4)
    process = training.run(prelude=bad_loss(6, 1000))
    assert process.returncode == 1
    assert "4 steps in a row" in process.stderr and process.stderr.count("\n") == 1
    assert str(training.step_path(training.steps()[-1])) in process.stderr
    assert "resumed" in training.finish().stdout  # a cause that is gone leaves nothing behind


@pytest.mark.loop
def test_fp16_with_a_scaler_resumes_exactly(stage, tmp_path):
    # what an older GPU does, on the CPU: overflow makes the scaler skip updates, and its scale is part of the state
    fp16 = "import omni.train.run, torch\nomni.train.run.pick_amp_dtype = lambda use_amp, device: torch.float16\n"
    reference = stage.training(tmp_path, save_dir="reference", use_amp=True)
    reference.prelude = fp16
    reference.finish()
    killed = reference.changed(save_dir="killed")
    assert killed.run(prelude=kill_at_step(9)).returncode == -9
    killed.finish()
    assert killed.newest()["scaler"]["scale"] > 1
    assert differences(killed.state(), reference.state()) == []


def test_a_rate_that_only_rises_is_said(tmp_path):
    rising = TEXT.training(tmp_path, save_dir="rising", max_steps=6, warmup_steps=9)
    rising.finish()
    said = "thinker: warmup_steps 9, and only 6 steps: the learning rate rises to the end, to 0.0067 of 0.01"
    assert said in (rising.save_dir / "training.log").read_text()
    enough = TEXT.training(tmp_path, save_dir="enough", max_steps=6, warmup_steps=3)
    enough.finish()
    assert "rises to the end" not in (enough.save_dir / "training.log").read_text()


def test_a_phase_that_never_begins_has_no_rate_to_tell_of(tmp_path):
    training = VOCODER.training(tmp_path, max_steps=4, adv_start_step=99)
    training.finish()
    log = (training.save_dir / "training.log").read_text()
    assert "discriminator: warmup_steps" not in log and "only -" not in log


def test_a_gpu_that_pytorch_cannot_use_is_said_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "version").touch()
    monkeypatch.setattr(device, "NVIDIA", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device.tell_of_unused_gpu.cache_clear()
    device.pick_device()
    assert capsys.readouterr().err == "", "hidden on purpose"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [device.pick_device().type for _ in range(2)] == ["cpu"] * 2
    assert capsys.readouterr().err.count("NVIDIA driver") == 1
    device.pick_device("cpu")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("wanted", [{}, {device.KERNELS_KEPT: "7"}])
def test_a_training_on_a_cpu_keeps_its_kernels_unless_the_user_says_how_many(tmp_path, wanted):
    show = f"print('kept', os.environ[{device.KERNELS_KEPT!r}])"
    code = f"import os; from omni.train import loop; os.environ.pop({device.KERNELS_KEPT!r}, None)\n"
    code += f"os.environ.update({wanted}); loop.START_HOOKS.append(lambda _: {show})"
    output = TEXT.training(tmp_path).finish(prelude=code).stdout
    assert f"kept {wanted.get(device.KERNELS_KEPT, 4096)}" in output
