"""Two processes train what one process trains, and resume exactly; compiled and plain checkpoints interchange."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from harness import ROOT, SLOW, TRACE, Training, differences, kill_at_step, losses, trained_weights
from stages import STAGES, TEXT


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_pair(training: Training, prelude: str = "") -> list:
    """What torchrun --nproc_per_node=2 starts: two processes that find each other through the environment."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [training.start(prelude, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]


def finish_pair(training: Training) -> None:
    for process in start_pair(training):
        assert process.wait().returncode == 0, process.stderr


@pytest.mark.loop
def test_two_processes_agree_with_one(stage, tmp_path):
    keys = {"dropout": 0.0, "drop_last": False, "print_freq": 1}
    # the pairs of a contrastive loss are those of one process's micro-batch
    halves = {"batch_size": 2, "gradient_accumulation_steps": 2} if stage.contrastive else {"batch_size": 4}
    one = stage.training(tmp_path, save_dir="one", **keys, **halves)
    two = stage.training(tmp_path, save_dir="two", batch_size=2, **keys)
    one.prelude = two.prelude = TRACE
    one.finish()
    finish_pair(two)
    # each sample once per epoch, and in each step the same ones
    steps = one.newest()["step"]
    trace = two.trace()
    for step in range(steps):
        rows = sum(eval(trace[step, 0]) + eval(trace[step, 1]), [])
        assert sorted(rows) == sorted(sum(eval(one.trace()[step, 0]), []))
    for a, b in zip(one.metrics() + one.metrics("val"), two.metrics() + two.metrics("val"), strict=True):
        assert losses(a) == pytest.approx(losses(b), rel=2e-3)
    half_a_step = one.config.get("lr", 1e-3) / 2
    for name, weight in trained_weights(one).items():
        torch.testing.assert_close(weight, two.final_file()["model"][name], rtol=5e-3, atol=half_a_step)


@pytest.mark.loop
def test_two_processes_resume_exactly(stage, tmp_path):
    halves = {"batch_size": 2, "gradient_accumulation_steps": 1} if stage.contrastive else {"batch_size": 1}
    keys = {"gradient_accumulation_steps": 2, "num_workers": 2} | halves | stage.whole
    reference = stage.training(tmp_path, save_dir="reference", **keys)
    reference.prelude = TRACE
    finish_pair(reference)
    killed = reference.changed(save_dir="killed")
    for at_step in (6, 5):
        pair = start_pair(killed, kill_at_step(at_step))
        assert [process.wait().returncode for process in pair] == [-9, -9]
    finish_pair(killed)
    assert killed.trace() == reference.trace()
    assert differences(killed.state(), reference.state()) == []


@pytest.mark.loop
def test_a_signal_to_one_of_two_stops_both(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference")
    finish_pair(reference)
    stopped = reference.changed(save_dir="stopped")
    pair = start_pair(stopped, SLOW)
    pair[0].wait_for("step 6/")
    pair[1].send(signal.SIGTERM)
    assert [process.wait().returncode for process in pair] == [75, 75]
    finish_pair(stopped)
    assert differences(stopped.state(), reference.state()) == []


@pytest.mark.loop
def test_from_two_processes_to_one_in_mid_run(stage, tmp_path):
    two = stage.training(tmp_path, batch_size=2, gradient_accumulation_steps=1, print_freq=1)
    two.prelude = TRACE
    pair = start_pair(two, kill_at_step(8))
    assert [process.wait().returncode for process in pair] == [-9, -9]
    refused = two.run()
    assert refused.returncode == 2 and "samples per step: 4 -> 2" in refused.stderr
    one = two.changed(gradient_accumulation_steps=2)
    assert "resumed at step 7" in one.finish().stdout


@pytest.mark.loop
@pytest.mark.parametrize("halved", ["batch_size", "gradient_accumulation_steps"])
def test_from_one_process_to_two_in_mid_run(stage, tmp_path, halved):
    if stage.contrastive and halved == "batch_size":
        pytest.skip("a contrastive loss compares the samples of a micro-batch with each other")
    keys = {"dropout": 0.0, "drop_last": False, "print_freq": 1, "batch_size": 2, "gradient_accumulation_steps": 2}
    one = stage.training(tmp_path, save_dir="one", **keys)
    killed = one.changed(save_dir="killed")
    one.prelude = killed.prelude = TRACE
    one.finish()
    assert killed.run(prelude=kill_at_step(8)).returncode == -9
    resumed_at, trace = killed.steps()[-1], killed.trace()
    killed.trace_path.unlink()
    two = killed.changed(**{halved: 1})
    pair = start_pair(two)
    assert [process.wait().returncode for process in pair] == [0, 0], pair[0].stderr
    assert f"resumed at step {resumed_at}:" in pair[0].stdout and f"{halved}: 2 -> 1" in pair[0].stdout
    trace = {key: rows for key, rows in trace.items() if key[0] < resumed_at} | two.trace()
    # in each step the samples that one process has, before and after
    for (step, _), rows in one.trace().items():
        dealt = [trace[step, rank] for rank in ((0,) if step < resumed_at else (0, 1))]
        assert sorted(sum((sum(eval(part), []) for part in dealt), [])) == sorted(sum(eval(rows), []))
    assert one.last_traced() > resumed_at
    for a, b in zip(one.metrics() + one.metrics("val"), two.metrics() + two.metrics("val"), strict=True):
        assert losses(a) == pytest.approx(losses(b), rel=2e-3)


def test_torchrun_itself(tmp_path):
    stage = STAGES[0]  # the others are started as torchrun starts them, which takes a tenth of the time
    training = stage.training(tmp_path, max_steps=4)
    config = tmp_path / "config.json"
    import json

    config.write_text(json.dumps(training.config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, str(ROOT / training.script), "--config", str(config)],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stdout and result.stdout.count("finished:") == 1


# traced and differentiated as for inductor, but not translated to C++, which would take a minute
AOT_EAGER = """
import functools, torch
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
"""

VALIDATION_COMPILES_NOTHING = """
import omni.train.loop
from torch._dynamo.utils import counters
validate = omni.train.loop.validate
def watched(*args):
    graphs = counters["stats"]["unique_graphs"]
    validate(*args)
    assert graphs and counters["stats"]["unique_graphs"] == graphs
omni.train.loop.validate = watched
"""


@pytest.mark.loop
def test_compiled_and_plain_checkpoints_interchange(stage, tmp_path):
    plain = stage.training(tmp_path, max_steps=12, **stage.whole)
    assert plain.run(prelude=kill_at_step(9)).returncode == -9
    keys = plain.newest()["phases"]
    compiled = plain.changed(use_compile=True)
    process = compiled.finish(prelude=AOT_EAGER + VALIDATION_COMPILES_NOTHING)
    assert "resumed at step 7" in process.stdout
    after = compiled.newest()["phases"]
    assert {n: list(p["module"]) for n, p in after.items()} == {n: list(p["module"]) for n, p in keys.items()}
    assert "resumed at step 12" in plain.changed(max_steps=14).finish().stdout


@pytest.mark.parametrize("asked", [False, True], ids=["by itself", "by a Ctrl-C that ends the compiler, too"])
def test_a_compilation_that_fails_is_one_line(tmp_path, asked):
    """As without a C++ compiler."""
    prelude = f"""
import functools, os, signal, torch
def fails(graph, inputs):
    if {asked}:
        os.kill(os.getpid(), signal.SIGINT)
    raise RuntimeError("no compiler here")
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend=fails)
"""
    process = TEXT.training(tmp_path, use_compile=True).run(prelude=prelude)
    expected = (75, "stopped while compiling") if asked else (2, 'error: key "use_compile": expected false')
    assert (process.returncode, process.stderr.splitlines()[-1][: len(expected[1])]) == expected
    assert "Traceback" not in process.stderr and ("no compiler here" in process.stderr) != asked


@pytest.mark.loop
def test_a_missing_or_extra_weight_is_an_error(stage, tmp_path):
    from omni.train import checkpoint

    for change in ("missing", "extra"):
        training = stage.training(tmp_path, save_dir=change, **stage.whole)
        assert training.run(prelude=kill_at_step(9)).returncode == -9
        for step in training.steps():
            payload = checkpoint.load(training.step_path(step))
            module = list(payload["phases"].values())[-1]["module"]
            name = next(iter(module))
            if change == "missing":
                del module[name]
            else:
                module["surplus"] = module[name]
            checkpoint.save(training.step_path(step), payload)
        process = training.run()
        assert process.returncode == 2 and ("surplus" if change == "extra" else name) in process.stderr
        assert process.stderr.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("use_compile", [False, True])
def test_resume_is_exact_on_a_gpu(stage, tmp_path, use_compile):
    states = []
    for name in ("reference", "killed"):
        training = stage.training(tmp_path, save_dir=name, use_amp=True, use_compile=use_compile, num_workers=2)
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps(training.config))
        command = [sys.executable, str(ROOT / training.script), "--config", str(config), "--device", "cuda"]
        if name == "killed":
            process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("step 9/"):
                    process.kill()
            assert process.wait() == -signal.SIGKILL
        finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert " in bfloat16," in finished.stdout
        assert ("resumed at step" in finished.stdout) == (name == "killed")
        assert "deterministic" not in finished.stderr, "a kernel of training adds up in any order"
        states.append(training.state())
    assert differences(*states) == []
