"""Processes of one run die, hang, read other bytes or become more: it goes on with the same samples, or says why."""

import json
import os
import subprocess
import sys

import pytest
from harness import ROOT, TRACE, differences, hung_worker, kill_at_step
from stages import STAGES
from test_distributed import finish_pair, free_port, start_pair

from omni.common.errors import UserError
from omni.stages.text import TextConfig
from omni.train.run import Run
from omni.train.stage import Stage


def only_in(rank: int, prelude: str) -> str:
    return f"import os\nif os.environ['RANK'] == '{rank}':\n" + "".join(
        f"    {line}\n" for line in prelude.splitlines()
    )


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_is_killed_and_the_other_ends_by_itself(stage, tmp_path, rank):
    keys = {"num_workers": 2}
    reference = stage.training(tmp_path, save_dir="reference", **keys)
    reference.prelude = TRACE
    finish_pair(reference)
    killed = reference.changed(save_dir="killed")
    pair = start_pair(killed, only_in(rank, kill_at_step(6)))
    codes = [process.wait().returncode for process in pair]
    assert codes[rank] == -9 and codes[1 - rank] == 1
    assert f"process {1 - rank}: another process of this run has ended" in pair[1 - rank].stderr
    assert pair[1 - rank].stderr.count("\n") == 1
    finish_pair(killed)
    assert killed.trace() == reference.trace()
    assert differences(killed.state(), reference.state()) == []


@pytest.mark.loop(phases=1)
def test_one_of_two_hangs_and_the_other_says_so(stage, tmp_path):
    training = stage.training(tmp_path, loader_timeout_s=1)
    hangs = kill_at_step(6).replace("SIGKILL", "SIGSTOP")
    pair = start_pair(
        training, "import omni.train.processes\nomni.train.processes.EXCHANGE_S = 3\n" + only_in(1, hangs)
    )
    assert pair[0].wait().returncode == 1
    assert "process 0: another process of this run hangs" in pair[0].stderr and pair[0].stderr.count("\n") == 1
    pair[1].kill()
    finish_pair(training)


@pytest.mark.loop(phases=1)
def test_one_of_two_has_no_batch_and_both_save_and_stop(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference", num_workers=1)
    finish_pair(reference)
    hung = reference.changed(save_dir="hung")
    pair = start_pair(hung, only_in(1, hung_worker(speed=300)))
    assert [process.wait().returncode for process in pair] == [75, 1]
    assert hung.steps()[-1] <= 2 and "no batch came in 600 s" in pair[1].stderr
    finish_pair(hung)
    assert differences(hung.state(), reference.state()) == []


@pytest.mark.loop(phases=1)
def test_the_first_process_alone_decides_what_is_resumed(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference", checkpoint_freq=1)
    reference.prelude = TRACE
    finish_pair(reference)
    killed = reference.changed(save_dir="killed")
    pair = start_pair(killed, kill_at_step(7))
    assert [process.wait().returncode for process in pair] == [-9, -9]
    newest = killed.step_path(killed.steps()[-1])
    before = set(os.listdir(killed.save_dir))
    # a read that one process alone gets wrong: nobody goes on from another step, and nothing is set aside
    torn = f"""
import omni.train.checkpoint
def load(path, _load=omni.train.checkpoint.load):
    if path.name == {newest.name!r}:
        raise omni.train.checkpoint.DamagedCheckpoint("torn")
    return _load(path)
omni.train.checkpoint.load = load
"""
    pair = start_pair(killed, only_in(1, torn))
    assert [process.wait().returncode for process in pair] == [1, 1]
    assert f"{newest}: process 1 does not read what the first one reads: torn" in pair[1].stderr
    assert set(os.listdir(killed.save_dir)) - {".lock"} == before - {".lock"} | {"training.log"} & before
    os.truncate(newest, 1000)
    pair = start_pair(killed)
    assert [process.wait().returncode for process in pair] == [0, 0], pair[1].stderr
    assert pair[0].stdout.count("Set aside as") == 1
    assert killed.trace() == reference.trace()
    assert differences(killed.state(), reference.state()) == []


def test_a_folder_that_not_all_processes_see_is_refused(tmp_path):
    training = STAGES[0].training(tmp_path, cache_dir=str(tmp_path / "cache"))
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for key in ("save_dir", "cache_dir"):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        other = training.changed(**{key: str(tmp_path / "elsewhere")})
        other.config["save_dir"] = other.config["save_dir"] if key == "save_dir" else training.config["save_dir"]
        # each is the first process on its machine
        both = [
            own.start(env=env | {"RANK": str(rank), "LOCAL_RANK": "0"}) for rank, own in enumerate((training, other))
        ]
        for process, own in zip(both, (training, other), strict=True):
            assert process.wait().returncode == 2
            assert process.stderr.startswith(f"error: {own.config[key]}: a process on {os.uname().nodename} does not")
            assert process.stderr.count("\n") == 1
        assert not list(tmp_path.rglob("*.omni-partial"))


@pytest.mark.loop(phases=1)
def test_one_process_two_and_one_again_have_the_same_samples_in_each_step(stage, tmp_path):
    size = 1 if not stage.contrastive else 2
    reference = stage.training(tmp_path, save_dir="reference", batch_size=size, samples_per_step=2 * size)
    reference.prelude = TRACE
    reference.finish()
    assert "samples per step" not in reference.newest()["config"]
    changing = reference.changed(save_dir="changing")
    assert changing.run(prelude=kill_at_step(5)).returncode == -9
    pair = start_pair(changing, kill_at_step(8))
    assert [process.wait().returncode for process in pair] == [-9, -9], pair[0].stderr
    changing.finish()
    steps = {}
    for line in changing.trace_path.read_text().splitlines():
        step, rank, rows = line.split(" ", 2)
        steps.setdefault(int(step), []).append((int(rank), sum(eval(rows), [])))
    dealt_to_two = 0
    for (step, _), rows in reference.trace().items():
        shares = dict(steps[step])
        dealt_to_two += len(shares) == 2
        found = shares[0] if len(shares) == 1 else shares[0] + shares[1]
        assert sorted(found) == sorted(sum(eval(rows), [])) or sorted(shares[0]) == sorted(sum(eval(rows), []))
    assert dealt_to_two > 3 and set(steps) == {step for step, _ in reference.trace()}


@pytest.mark.parametrize(
    "samples, world, said",
    [
        (12, 5, "expected a multiple of batch_size 2 x 5 processes, found 12, which can be dealt out to 1, 2, 3, 6 "),
        (2, 2, "found 2, which can be dealt out to 1 process"),
        (7, 1, "found 7, which is no multiple of batch_size"),
    ],
)
def test_samples_per_step_that_cannot_be_dealt_out_are_refused(tmp_path, monkeypatch, samples, world, said):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    keys = {"train_text": "x", "max_steps": 1, "batch_size": 2, "samples_per_step": samples}
    config = TextConfig.model_validate(keys | {"save_dir": str(tmp_path / "none")})
    with pytest.raises(UserError, match=said):
        Run(config, Stage("text", "thinker", "thinker.pt", "tokens", "loss"), device="cpu")
    assert not (tmp_path / "none").exists()


WRAPPER = """
import os, runpy, sys
os.environ["TRACE"] = {trace!r}
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
exec({trace_prelude!r})
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == {rank!r}:
    exec({kill!r})
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.torture
@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_restarts_after_a_kill(tmp_path, rank):
    reference = STAGES[0].training(tmp_path, save_dir="reference", num_workers=2)
    reference.prelude = TRACE
    finish_pair(reference)
    killed = reference.changed(save_dir="killed")
    wrapper, config = tmp_path / "wrapper.py", tmp_path / "config.json"
    config.write_text(json.dumps(killed.config))
    wrapper.write_text(
        WRAPPER.format(
            trace=str(killed.trace_path), root=str(ROOT), trace_prelude=TRACE, rank=rank,
            kill=kill_at_step(6), script=str(ROOT / killed.script),
        )
    )  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    result = subprocess.run(
        [*command, f"--master_port={free_port()}", str(wrapper), "--config", str(config), "--device", "cpu"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "resumed at step" in result.stdout and "Traceback" not in result.stderr
    assert killed.trace() == reference.trace()
    assert differences(killed.state(), reference.state()) == []
