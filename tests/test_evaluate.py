"""scripts/evaluate.py: the figures of validation, on any file, from the checkpoint alone."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import Process, Training, run_script
from stages import STAGES, StageCase
from test_bad_rows import read_rows, spoil
from test_config import only_error

import omni.train.evaluation
import scripts.evaluate as evaluate_script
from omni.common.errors import RunError, UserError
from omni.stages import STAGES as TABLE
from omni.train.evaluation import EvalResult, evaluate_rows
from omni.train.stage import Stage

HELD_OUT_KEY = {"text": "val_text", "vision": "val_manifest"}  # of the others: val_csv


# stage E, whose held-out data are several files, has a test of its own
@pytest.fixture(params=[stage for stage in STAGES if stage.name != "omni"], ids=lambda stage: stage.name)
def stage(request) -> StageCase:
    return request.param


def evaluate(training: Training, stage: str, *arguments: str) -> Process:
    return run_script(training, "scripts/evaluate.py", stage, *arguments)


def judged(training: Training, stage: str, *arguments: str) -> dict:
    process = evaluate(training, stage, "--json", *arguments)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture
def trained(stage, tmp_path) -> Training:
    """A training whose held-out data are its training data: a file that evaluate can be given."""
    data = stage.make_data(tmp_path)[stage.data_key]
    training = stage.training(tmp_path, **{HELD_OUT_KEY.get(stage.name, "val_csv"): data}, max_steps=20, val_split=0.0)
    training.finish()
    return training


def test_the_figures_are_those_of_validation(stage, trained):
    found = judged(trained, stage.name, "--data", trained.config[stage.data_key])
    expected = trained.final_file()["metrics"]
    shared = found.keys() & expected.keys()
    assert len(shared) >= {"text": 3, "audio_enc": 2, "vision": 1, "ocr": 3, "vocoder": 2, "talker": 4}[stage.name]
    assert {name: found[name] for name in shared} == pytest.approx({name: expected[name] for name in shared}, rel=1e-4)
    assert found["step"] == trained.final_file()["step"] and found["rows"] == 24


def test_a_pattern_means_all_of_its_files(stage, trained):
    first = Path(trained.config[stage.data_key])
    (first.parent / f"again{first.suffix}").write_bytes(first.read_bytes())
    pattern = first.parent / f"[{first.name[0]}a]*{first.suffix}"
    assert len(list(first.parent.glob(pattern.name))) == 2
    found = judged(trained, stage.name, "--data", str(pattern))
    assert found["rows"] == 48 and found["data"] == str(pattern)


def test_nothing_is_written_beside_the_data(stage, trained):
    before = sorted(trained.folder.rglob("*"))
    judged(trained, stage.name, "--data", trained.config[stage.data_key])
    assert [path.suffix for path in sorted(trained.folder.rglob("*")) if path not in before] == [".err", ".out"]


def test_a_few_rows_and_a_look_at_them(stage, trained):
    if stage.name == "text":
        found = judged(trained, stage.name, "--data", trained.config[stage.data_key], "--limit", "5")
        assert found["rows"] == 5
        return
    process = evaluate(trained, stage.name, "--data", trained.config[stage.data_key], "--limit", "5", "--show", "2")
    assert process.returncode == 0, process.stderr
    assert ": 5 rows" in process.stdout
    assert process.stdout.count("true   ") == process.stdout.count("model  ") == 2


def test_rows_that_cannot_be_used_are_left_out_named_and_counted(stage, trained):
    if stage.name == "text":
        pytest.skip("a corpus has lines, not rows that name files")
    path = spoil(stage, trained)
    process = evaluate(trained, stage.name, "--data", str(path), "--json")
    found = json.loads(process.stdout)
    assert (found["rows"], found["rows_left_out"]) == (20, 4)
    for row in (4, 8, 12, 16):
        assert f"{path}: row {row}: " in process.stderr


@pytest.mark.loop(phases=1)
def test_bad_arguments(stage, trained, tmp_path):
    data = trained.config[stage.data_key]
    only_error(evaluate(trained, stage.name, "--data", str(tmp_path / "absent")), "absent", "found none")
    only_error(evaluate(trained, stage.name, "--data", data, "--limit", "0"), "--limit", "at least 1")
    only_error(evaluate(trained, "talker", "--data", data, "--save_speech", data), "--save_speech", "a folder")
    only_error(evaluate(trained, "talker", "--data", data, "--save_speech", ""), "--save_speech", "a folder")
    only_error(evaluate(trained, "nothing", "--data", data), "invalid choice")
    empty = trained.changed(save_dir="empty")
    empty.save_dir.mkdir()
    only_error(evaluate(empty, stage.name, "--data", data), str(empty.save_dir), "found neither")
    if stage.name != "text":
        for row in read_rows(Path(data)):
            (tmp_path / row.get("wav", row.get("image"))).unlink()
        process = evaluate(trained, stage.name, "--data", data)
        assert process.returncode == 2 and "not one of its 24 rows" in process.stderr


@pytest.mark.parametrize("stage", evaluate_script.EVALUATED)
@pytest.mark.parametrize("option", evaluate_script.OPTIONS)
def test_an_option_without_effect_is_refused(tmp_path, stage, option):
    (tmp_path / "a.csv").touch()
    values = {"task": "text", "show": "2", "temperature": "0.5", "num_workers": "1"}
    arguments = [stage, "--ckpt_dir", "x", "--data", str(tmp_path / "a.csv"), f"--{option}", values.get(option, "y")]
    arguments += ["--audio_ckpt", "z"] if stage == "talker" else []
    if option in TABLE[stage].options:
        assert str(getattr(evaluate_script.parse_args(arguments), option)) not in ("None", "0")
    else:
        with pytest.raises(UserError, match=f"--{option}: has no effect on {stage}"):
            evaluate_script.parse_args(arguments)


@pytest.mark.parametrize("option", ["temperature", "vocoder_ckpt"])
def test_speech_that_nobody_hears_is_refused(tmp_path, option):
    (tmp_path / "a.csv").touch()
    arguments = ["talker", "--ckpt_dir", "x", "--data", str(tmp_path / "a.csv"), f"--{option}", "0.5"]
    with pytest.raises(UserError, match=f"--{option}: has no effect without --audio_ckpt or --save_speech"):
        evaluate_script.parse_args(arguments)
    evaluate_script.parse_args([*arguments, "--save_speech", str(tmp_path / "said")])


@pytest.mark.parametrize("task", ["text", "caption", "transcription"])
def test_the_joint_model_task_by_task(task, tmp_path):
    stage = next(stage for stage in STAGES if stage.name == "omni")
    data = stage.make_data(tmp_path)
    key = {"text": "text_path", "caption": "image_manifest", "transcription": "asr_csv"}[task]
    weights = {name: float(name == task) for name in ("text", "caption", "transcription")}
    held_out = {f"val_{key}": data[key]}
    training = stage.training(tmp_path, max_steps=8, val_split=0.0, task_weights=weights, val_items=100, **held_out)
    training.finish()
    expected = training.final_file()["metrics"]
    found = judged(training, "omni", "--data", data[key], "--task", task)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found.get(f"accuracy_{task}") == expected.get(f"accuracy_{task}")
    process = evaluate(training, "omni", "--data", data[key], "--task", task, "--limit", "3", "--show", "2")
    assert ": 3 rows" in process.stdout and process.stdout.count("model  ") == 2
    only_error(evaluate(training, "omni", "--data", data[key]), "--task", "expected one of text, transcription")


def test_items_are_not_shown_beside_one_json_object():
    with pytest.raises(UserError, match="--show: has no effect beside --json"):
        evaluate_script.parse_args(["ocr", "--ckpt_dir", "x", "--data", "a.csv", "--show", "2", "--json"])


def test_texts_of_others_move_no_cursor(tmp_path, monkeypatch, capsys):
    text, controls = "a\x1b[2Jb\x9bc\rd\te", "".join(map(chr, (*range(32), *range(127, 160))))
    judgement = EvalResult({}, 1, {f"a.csv: row 1: {controls}": controls}, [(text, controls)])
    monkeypatch.setattr(Stage, "evaluation", lambda _: lambda *_: judgement)
    monkeypatch.setattr(evaluate_script, "load", lambda *_: SimpleNamespace(step=1))
    (tmp_path / "a.txt").touch()
    evaluate_script.main(["ocr", "--ckpt_dir", "x", "--data", str(tmp_path / "a.txt"), "--show", "1"])
    out, err = capsys.readouterr()
    assert out.startswith("true   a[2Jbcd\te\nmodel  \t\n\n")
    assert err.endswith("\n") and err[:-1].isprintable()


def test_a_worker_that_hangs_ends_the_evaluation(tmp_path, monkeypatch):
    """A batch that does not come is waited for as long as in training, and no longer."""

    def late(*_):
        time.sleep(5)
        yield {"bad_rows": {}, "notes": [], "rows": [0, 1], "n_targets": 0}

    monkeypatch.setattr(omni.train.evaluation, "_TIMEOUT_S", 1)
    monkeypatch.setattr(omni.train.evaluation, "build_loader", late)
    monkeypatch.setattr(omni.train.evaluation, "ResumableDataset", lambda *_, **__: SimpleNamespace(steps_per_epoch=1))
    with pytest.raises(RunError, match="a.csv: no batch came in 1 s"):
        evaluate_rows(None, SimpleNamespace(data="a.csv", num_workers=1), torch.device("cpu"), dict, 2)


def test_every_stage_that_the_script_offers_has_its_evaluation():
    assert set(evaluate_script.EVALUATED) == set(TABLE) - {"aligner"}
    assert all(callable(TABLE[name].evaluation()) for name in evaluate_script.EVALUATED)
