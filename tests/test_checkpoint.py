"""A checkpoint on disk is either complete or recognised as damaged; a run never goes on from a bad one."""

import os
import random
import re
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from harness import ROOT, TRACE, count_calls, differences, kill_at, kill_at_step, model_of, small_disk
from stages import TEXT

from omni.common.errors import RunError
from omni.train import checkpoint


@pytest.fixture
def sealed(tmp_path) -> Path:
    path = tmp_path / "stage_step_7.pt"
    checkpoint.save(
        path,
        {
            "format": checkpoint.FORMAT_VERSION,
            "weights": torch.arange(24.0).view(4, 6),
            "step": 7,
            "name": "x",
            "none": None,
        },
    )
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
    checkpoint.save(path, {"format": checkpoint.FORMAT_VERSION, "weights": Marker(marker)})
    with pytest.raises(checkpoint.DamagedCheckpoint):
        checkpoint.load(path)
    assert not marker.exists()


# Loads that may run what a file holds; a copy by the pickle of one's own object does not. Spaces are left out.
UNSAFE = re.compile(
    r"weights_only[=](?!True)|allow_pickle[=](?!False)|pickle[.]loads?\((?!pickle[.]dumps)|Unpickler\(|frompickle[i]mport"
)


def test_nothing_in_the_tree_loads_unsafely():
    files = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]
    assert {"train_text.py", "loop.py", "demo.py", "pictures.py", "test_checkpoint.py"} <= {path.name for path in files}
    unsafe = {path.name: UNSAFE.findall(path.read_text(encoding="utf-8").replace(" ", "")) for path in files}
    assert {name: found for name, found in unsafe.items() if found} == {}
    for key in (
        "weights_" + "only=not safe",
        "allow_" + "pickle=True",
        "pickle" + ".load(file)",
        "pickle" + ".loads(x)",
    ):
        assert UNSAFE.search(key.replace(" ", ""))


def test_a_failed_write_leaves_the_old_file_and_no_temporary(sealed):
    before = sealed.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(RunError, match="Earlier files are intact"):
            checkpoint.save(sealed, {"format": checkpoint.FORMAT_VERSION, "weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sealed.read_bytes() == before
    assert list(sealed.parent.iterdir()) == [sealed]


def test_order_and_retention_are_numeric(tmp_path):
    for step in (9, 10, 100, 20):
        checkpoint.save(tmp_path / f"stage_step_{step}.pt", {"format": checkpoint.FORMAT_VERSION, "step": step})
    for name in ("stage_step_x.pt", "stage_step_3.pt.bak", "other_step_500.pt"):
        (tmp_path / name).touch()
    assert [step for step, _ in checkpoint.step_files(tmp_path, "stage")] == [100, 20, 10, 9]
    checkpoint.prune(tmp_path, "stage", keep=2, best_step=9)
    assert [step for step, _ in checkpoint.step_files(tmp_path, "stage")] == [100, 20, 9]
    assert (tmp_path / "other_step_500.pt").exists()


# The run -----------------------------------------------------------------------------------------------------------


@pytest.mark.loop(phases=1)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_falls_back(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference")
    reference.finish()
    damaged = reference.changed(save_dir="damaged")
    assert damaged.run(prelude=kill_at_step(14)).returncode == -9
    path = damaged.step_path(damaged.steps()[-1])
    path.write_bytes(path.read_bytes()[:-9])
    process = damaged.finish()
    assert "Set aside" in process.stdout and path.name in process.stdout
    assert path.with_name(path.name + ".damaged").exists()
    assert differences(damaged.state(), reference.state()) == []


@pytest.mark.loop(phases=1)
def test_every_damage_to_a_step_file_is_detected(stage, tmp_path):
    training, rng = stage.training(tmp_path, max_steps=3), random.Random(0)
    training.finish()
    path = training.step_path(3)
    data = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for bit in rng.sample(range(len(data) * 8), 300):
            byte = data[bit // 8 : bit // 8 + 1]
            for written in (bytes([byte[0] ^ 1 << bit % 8]), byte):
                file.seek(bit // 8)
                file.write(written)
                if written != byte:
                    with pytest.raises(checkpoint.DamagedCheckpoint):
                        checkpoint.load(path)
    assert checkpoint.load(path)["step"] == 3
    for length in sorted(rng.sample(range(len(data)), 300), reverse=True):
        os.truncate(path, length)
        with pytest.raises(checkpoint.DamagedCheckpoint):
            checkpoint.load(path)


# The validation of step 7 is the best.
BEST_AT_7 = """
import omni.train.loop
_validate = omni.train.loop.validate
def validate(training, *args):
    metrics = training.validation.metrics
    name, step = training.run.stage.best_metric, training.progress.step
    training.validation.metrics = lambda totals: metrics(totals) | {name: float(abs(step - 7))}
    try:
        _validate(training, *args)
    finally:
        training.validation.metrics = metrics
omni.train.loop.validate = validate
"""


def damage(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.loop
def test_a_damaged_final_file_is_written_again(stage, tmp_path):
    training = stage.training(tmp_path)
    training.finish()
    before, path = training.state(), training.save_dir / training.final
    damage(path)
    process = training.finish()
    assert f"{path}: the checksum does not match. Writing it again" in process.stdout
    assert differences(training.state(), before) == []


@pytest.mark.loop
def test_a_damaged_best_checkpoint_is_named_and_the_last_weights_are_final(stage, tmp_path):
    training = stage.training(tmp_path)
    assert training.run(prelude=BEST_AT_7 + kill_at("omni.train.resume:Checkpoints.write_final", 1)).returncode == -9
    damage(training.step_path(7))
    process = training.finish(prelude=BEST_AT_7)
    assert f"{training.step_path(7)}: the best checkpoint cannot be read" in process.stdout
    newest, final = training.newest(), training.final_file()
    assert final["step"] == newest["step"] > 7
    assert differences(model_of(newest), final["model"]) == []


@pytest.mark.loop(phases=1)
def test_all_checkpoints_damaged_stops_the_run_every_time(stage, tmp_path):
    training = stage.training(tmp_path)
    assert training.run(prelude=kill_at_step(14)).returncode == -9
    for step in training.steps():
        damage(training.step_path(step))
    for _ in range(2):
        process = training.run()
        assert process.returncode == 1
        assert "every checkpoint is damaged" in process.stderr and process.stderr.count("\n") == 1
        assert training.steps() == []


@pytest.mark.loop(phases=1)
def test_a_malicious_checkpoint_is_refused_by_the_run(stage, tmp_path):
    training, marker = stage.training(tmp_path), tmp_path / "marker"
    training.save_dir.mkdir()
    checkpoint.save(training.step_path(5), {"format": checkpoint.FORMAT_VERSION, "phases": Marker(marker)})
    assert training.run().returncode == 1
    assert not marker.exists()


@pytest.mark.loop(phases=1)
def test_disk_full_during_a_save(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference")
    reference.finish()
    full = reference.changed(save_dir="full")
    prelude = """
import resource, omni.train.checkpoint
_save, _calls = omni.train.checkpoint.save, [0]
def save(path, payload):
    _calls[0] += 1
    if _calls[0] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    _save(path, payload)
omni.train.checkpoint.save = save
"""
    process = full.run(prelude=prelude)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert len(full.steps()) == 2 and not list(full.save_dir.glob("*.omni-partial"))
    full.finish()
    assert differences(full.state(), reference.state()) == []


# Somebody else takes the last page of the disk when step 6 begins. What is left are the ends of the pages that files
# have begun; with ``crowded`` its file of events has none, so that TensorBoard's thread is the first to fail.
TAKEN_BY_OTHERS = """
import omni.train.loop
def fill_disk(run, step, rows):
    if step == 6:
        for path in run.save_dir.rglob("events.*") if crowded else ():
            path.open("ab").write(bytes(-path.stat().st_size % 4096))
        with open(run.save_dir / "others", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
omni.train.loop.STEP_HOOKS.append(fill_disk)
"""
FULL = {
    "by checkpoints": "",
    "by others": "crowded = False" + TAKEN_BY_OTHERS,
    "TensorBoard first": "crowded = True" + TAKEN_BY_OTHERS,
}


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("prelude", FULL.values(), ids=FULL.keys())
def test_a_disk_that_fills_up(stage, tmp_path, prelude):
    reference = stage.training(tmp_path, save_dir="reference", print_freq=1)
    reference.finish()
    files = [path for path in reference.save_dir.rglob("*") if path.is_file()]
    pages = {path: -(-path.stat().st_size // 4096) for path in files}
    rest = sum(count for path, count in pages.items() if path.suffix != ".pt") + 4
    step_file = pages[reference.step_path(reference.steps()[-1])]
    with small_disk(int(2.5 * step_file + rest) * 4096) as disk:
        full = reference.changed(save_dir=str(disk / "full"))
        process = full.run(prelude=prelude)
        assert process.returncode == 1, process.stdout + process.stderr
        assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
        assert "No space left on device" in process.stderr
        assert not list(full.save_dir.glob("*.omni-partial"))
        assert full.steps()
        for step in full.steps():
            checkpoint.load(full.step_path(step))
        moved = reference.changed(save_dir="moved")
        shutil.copytree(full.save_dir, moved.save_dir)  # to a larger disk
    assert "resumed at step" in moved.finish().stdout
    assert differences(moved.state(), reference.state()) == []


# What happens to files, in its order: one line each. Of deletions, those of step files.
EVENTS = """
import os, stat, omni.train.checkpoint
def note(line):
    with open(os.environ["EVENTS"], "a") as file:
        file.write(line + "\\n")
def noted(function, describe):
    def noting(*args, **keys):
        result = function(*args, **keys)
        if line := describe(*args):
            note(line)
        return result
    return noting
os.fsync = noted(os.fsync, lambda fd: "fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
os.replace = noted(os.replace, lambda old, new: f"replace {os.path.basename(new)}")
os.unlink = noted(os.unlink, lambda path: f"unlink {path}" if str(path).endswith(".pt") else "")
omni.train.checkpoint.verify = noted(omni.train.checkpoint.verify, lambda path: f"verify {path.name}")
"""


@pytest.mark.loop(phases=1)
def test_an_older_checkpoint_goes_only_when_the_new_one_is_safely_on_disk(stage, tmp_path):
    training = stage.training(tmp_path, checkpoint_freq=2)
    training.finish(prelude=EVENTS, env={"EVENTS": str(tmp_path / "events")})
    events = (tmp_path / "events").read_text()
    in_order = r"fsync file\nreplace (\S+_step_\d+\.pt)\nfsync folder\nverify \1\n((?:unlink .+\n)*)"
    saves = re.findall(in_order, events)
    assert len(saves) == len(re.findall(r"replace \S+_step_\d+\.pt", events)) > 3
    assert sum(deleted.count("unlink") for _, deleted in saves) == events.count("unlink") > 0
    verified = []
    for event, step in re.findall(r"(verify|unlink) \S+_step_(\d+)\.pt", events):
        verified += [int(step)] * (event == "verify")
        newer = [other for other in verified if other > int(step)]
        assert event == "verify" or len(newer) >= 2, f"step {step} went when {newer} were on disk"


@pytest.mark.loop(phases=1)
def test_a_new_file_that_does_not_verify_costs_no_older_one(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference", checkpoint_freq=1)
    reference.finish()
    stopped = reference.changed(save_dir="stopped")
    fourth = f"""
import omni.train.checkpoint
_verify = omni.train.checkpoint.verify
def verify(path):
    if path.name == "{stopped.step_path(4).name}":
        raise omni.train.checkpoint.DamagedCheckpoint("a bit fell over")
    _verify(path)
omni.train.checkpoint.verify = verify
"""
    process = stopped.run(prelude=fourth)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert f"{stopped.step_path(4)}: read back otherwise than written (a bit fell over)" in process.stderr
    assert stopped.steps() == [2, 3, 4]
    stopped.finish()
    assert differences(stopped.state(), reference.state()) == []


WRITE = "omni.train.checkpoint:_SealingFile.write"


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", ["os:fsync", "os:replace", WRITE])
def test_killed_at_some_writes_fsyncs_and_renames_of_a_save(stage, tmp_path, call, after):
    check_killed_saves(
        stage, tmp_path, call, after, lambda calls: range(1, calls + 1)[:: -(calls // 4) if after else calls // 4]
    )


@pytest.mark.torture
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("call", "part", "parts"), [("os:fsync", 0, 1), ("os:replace", 0, 1), *((WRITE, part, 25) for part in range(25))]
)
def test_killed_at_each_write_fsync_and_rename_of_a_save(tmp_path, call, part, parts, after):
    check_killed_saves(TEXT, tmp_path, call, after, lambda calls: range(1, calls + 1)[part::parts])


def check_killed_saves(stage, tmp_path, call, after, choose) -> None:
    """Kill before or after the calls that ``choose`` picks; look at what stands there, and finish the run."""
    reference = stage.training(tmp_path, save_dir="reference", checkpoint_freq=1, max_steps=3)
    reference.prelude = TRACE
    reference.finish()  # and the data are prepared, so that the only writes left are those of save_dir
    counted = reference.changed(save_dir="counted").finish(prelude=count_calls(call))
    counts = choose(int(counted.stdout.split()[-2]))
    assert len(counts) >= 4
    for count in counts:
        killed = reference.changed(save_dir=f"killed {count}")
        assert killed.run(prelude=kill_at(call, count, after=after)).returncode == -9
        begun, steps = killed.traced(), killed.steps()
        assert steps[-1:] >= [begun - 1] * (begun > 1), "no more is lost than the step at hand"
        for step in steps:  # the newest one loads, and is whole
            assert checkpoint.load(killed.step_path(step)).keys() == reference.newest().keys()
        killed.finish()
        assert killed.trace() == reference.trace()
        assert differences(killed.state(), reference.state()) == []


@pytest.mark.loop
def test_the_best_checkpoint_is_kept_and_becomes_the_final_file(stage, tmp_path):
    training = stage.training(tmp_path)
    process = training.finish(prelude=BEST_AT_7)
    steps = training.steps()
    assert steps[0] == 7 and len(steps) == 3
    assert "holds the weights of step 7" in process.stdout
    best, final = torch.load(training.step_path(7), weights_only=True), training.final_file()
    keys = {"format", "stage", "config", "architecture", "files", "step", "metrics", "model"}
    assert final["step"] == 7 and final.keys() == keys
    assert differences(model_of(best), final["model"]) == []
    assert differences(training.newest()["phases"], best["phases"]) != []
