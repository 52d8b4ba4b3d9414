"""Bad configs are refused in one line before anything is written; a changed config never mixes two trainings."""

import json
import re
from pathlib import Path
from typing import Annotated

import pytest
from harness import ROOT, kill_at_step
from pydantic import TypeAdapter, ValidationError
from stages import OMNI, STAGES, TALKER

from omni.common.errors import UserError
from omni.stages import STAGES as TABLE
from omni.stages.audio_encoder import AudioEncoderConfig
from omni.stages.ocr import OcrConfig
from omni.stages.omni import SftConfig
from omni.stages.talker import TalkerConfig
from omni.stages.text import TextConfig
from omni.stages.vision import VisionConfig
from omni.stages.vocoder import VocoderConfig
from omni.train.config import load_config

CONFIGS = {
    "thinker": TextConfig,
    "audio_enc": AudioEncoderConfig,
    "vision": VisionConfig,
    "ocr": OcrConfig,
    "vocoder": VocoderConfig,
    "talker": TalkerConfig,
    "omni_sft": SftConfig,
}

BAD = {
    "unknown key": ({"chekpoint_freq": 5}, ['unknown key "chekpoint_freq"', 'Did you mean "checkpoint_freq"?']),
    "wrong type": ({"batch_size": "eight"}, ['"batch_size"', "integer", '"eight"']),
    "float for int": ({"batch_size": 2.5}, ['"batch_size"', "integer", "2.5"]),
    "out of range": ({"val_split": 1.5}, ['"val_split"', "less than 1", "1.5"]),
    "bool for number": ({"wd": True}, ['"wd"', "number", "true"]),
    "too few checkpoints": ({"keep_checkpoints": 1}, ['"keep_checkpoints"', "greater than or equal to 2", "found 1"]),
    "no duration": ({"max_epochs": None}, ["max_steps", "max_epochs"]),
    "batch larger than the data": ({"batch_size": 100_000}, ["samples", "100000", "batch_size"]),
}


def only_error(process, *fragments: str) -> None:
    """The process ended with code 2 and one line that holds every fragment."""
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
    assert "Traceback" not in process.stderr
    for fragment in fragments:
        assert fragment in process.stderr, process.stderr


@pytest.mark.loop(phases=1)
@pytest.mark.parametrize(("keys", "fragments"), BAD.values(), ids=BAD.keys())
def test_bad_keys(stage, tmp_path, keys, fragments):
    training = stage.training(tmp_path, **keys)
    process = training.run()
    only_error(process, *fragments)
    assert not training.save_dir.exists() or list(training.save_dir.glob("*.pt")) == []
    if "batch" not in fragments[-1]:  # the others are seen before the data are
        assert process.stderr.startswith(f"error: {tmp_path / 'run_1.json'}: ")
        assert not training.save_dir.exists()


def test_a_missing_data_file(stage, tmp_path):
    training = stage.training(tmp_path, **{stage.data_key: str(tmp_path / "absent.txt")})
    only_error(training.run(), f'"{stage.data_key}"', "absent.txt", ".json: ")
    assert not training.save_dir.exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_a_missing_file_of_a_config_is_named_with_the_command_that_makes_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as failure:
        load_config(CONFIGS[path.stem.rsplit("_", 1)[0]], str(path))
    script = "make_synthetic_datasets" if "none at data/text/tiny_corpus" in str(failure.value) else "prepare_data"
    script = "make_synthetic_datasets" if path.stem.endswith(("_demo", "_hour")) else script
    assert f"(python scripts/{script}.py " in str(failure.value)
    assert ("--size hour" in str(failure.value)) == path.stem.endswith("_hour")


def test_of_several_files_the_missing_one_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").touch()
    files = json.dumps(["mine.csv", "data/hour/audio/asr_open.csv"])
    with pytest.raises(UserError, match=r"none at data/hour/audio/asr_open.csv \(python .* --size hour "):
        load_config(CONFIGS["audio_enc"], str(ROOT / "configs/audio_enc_demo.json"), [f"train_csv={files}"])


def test_impossible_sizes(tmp_path):
    text = next(case for case in STAGES if case.name == "text")
    for keys, fragments in (
        ({"d_model": 18, "n_heads": 4}, ['"d_model"', "multiple of n_heads 4", "18"]),
        ({"use_gqa": True, "kv_groups": 3, "n_heads": 4}, ['"kv_groups"', "divisor", "3"]),
        ({"use_moe": True, "num_experts": 2, "num_experts_per_tok": 3}, ['"num_experts_per_tok"', "at most", "3"]),
        ({"ctx_len": 100_000}, ["ctx_len", "100001 tokens"]),
    ):
        only_error(text.training(tmp_path, **keys).run(), *fragments)
    sizes = {"d_model": 18, "n_heads": 4}
    only_error(TALKER.training(tmp_path, **sizes).run(), '"d_model"', "even multiple of n_heads 4", "found 18")


def test_impossible_sizes_of_stage_e(tmp_path):
    training = OMNI.training(tmp_path, image_stack=3)  # 2 x 2 patches; all other sizes are those of earlier stages
    only_error(training.run(), str(tmp_path / "vision"), '"image_stack"', "divisor of 2", "found 3")
    assert not list(training.save_dir.glob("*.pt"))


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "config.json"
    for content, fragment in ((b"{", "line 1"), (b"[]", "JSON object"), (b"\xff{}", "UTF-8"), (None, "cannot read")):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=fragment) as caught:
            load_config(TextConfig, str(path))
        assert str(path) in str(caught.value)


def test_overrides_and_obsolete_keys(tmp_path):
    corpus, path = tmp_path / "corpus.txt", tmp_path / "config.json"
    corpus.touch()
    keys = {"save_dir": "x", "train_text": str(corpus), "max_steps": 3, "shuffle_buffer_size": 9, "use_swiglu": True}
    path.write_text(json.dumps(keys))
    config, notices = load_config(TextConfig, str(path), ["lr=0.5", "save_dir=other", "use_gqa=true"])
    assert (config.lr, config.save_dir, config.use_gqa) == (0.5, "other", True)
    assert len(notices) == 2 and "no effect" in notices[0]
    with pytest.raises(UserError, match="key=value"):
        load_config(TextConfig, str(path), ["lr"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_every_config_in_the_repository_is_valid(path, tmp_path, monkeypatch):
    stage_config = CONFIGS[path.stem.rsplit("_", 1)[0]]
    monkeypatch.setattr(stage_config, "check_files", lambda self: None)
    monkeypatch.setattr("omni.train.config.on_both_sides", lambda config: [])
    config, notices = load_config(stage_config, str(path))
    assert notices == [] and config.about


def test_a_held_out_folder_inside_of_the_training_s_is_told(tmp_path):
    for folder in (tmp_path / "clips", tmp_path / "clips" / "val"):
        folder.mkdir()
        (folder / "a.wav").touch()
        (folder / "a.txt").write_text("one")
    keys = {"save_dir": "x", "max_steps": 1, "train_csv": str(tmp_path / "clips")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(keys | {"val_csv": str(tmp_path / "clips" / "val")}))
    assert ["clips/val: is in" in line for line in load_config(AudioEncoderConfig, str(path))[1]] == [True]


def test_a_folder_of_another_stage_is_refused(stage, tmp_path):
    training = stage.training(tmp_path)
    training.save_dir.mkdir()
    others = [other for other in TABLE.values() if other.script != TABLE[stage.name].script]
    other = training.save_dir / f"{others[list(TABLE).index(stage.name) % len(others)].prefix}_step_3.pt"
    other.write_bytes(b"")
    only_error(training.run(), other.name, "another stage", "save_dir")
    assert list(training.save_dir.iterdir()) == [other]


def test_a_file_that_is_trained_on_and_held_out_is_told(stage, tmp_path):
    training = stage.training(tmp_path)
    cls = TABLE[stage.name].config
    path, told = tmp_path / "config.json", set()
    for key, field in cls.model_fields.items():
        if not key.startswith("val_") or not (field.json_schema_extra or {}).get("files"):
            continue
        trained = key.removeprefix("val_")
        trained = trained if trained in cls.model_fields else stage.data_key
        if trained not in training.config:
            continue
        given = training.config[trained]
        given = given if isinstance(given, str) else given[0]
        pattern = str(Path(given).with_suffix(".*"))
        for named in (given, [given], pattern):
            path.write_text(json.dumps(training.config | {key: named}))
            _, notices = load_config(cls, str(path))
            told.update([key] if any(f'"{trained}" and in "{key}"' in line for line in notices) else [])
            assert len(notices) == (key in told), notices
        other = tmp_path / f"other{Path(given).suffix}"
        other.write_bytes(Path(given).read_bytes())
        path.write_text(json.dumps(training.config | {key: str(other)}))
        assert load_config(cls, str(path))[1] == []
    assert told


# Drift -------------------------------------------------------------------------------------------------------------


@pytest.mark.loop
def test_another_training_is_refused_with_the_differences(stage, tmp_path):
    training = stage.training(tmp_path)
    assert training.run(prelude=kill_at_step(9)).returncode == -9
    steps = training.steps()
    for key, value in {
        "batch_size": 3,
        "seed": 7,
        "gradient_accumulation_steps": 2,
        "val_split": 0.4,
        stage.size_key: 48,
    }.items():
        other = training.changed(**{key: value})
        only_error(other.run(), f"{key}: ", f" -> {value}", "new save_dir")
        assert training.steps() == steps
    training.finish()


def test_changed_data_are_refused(stage, tmp_path):
    training = stage.training(tmp_path)
    assert training.run(prelude=kill_at_step(9)).returncode == -9
    path = tmp_path / training.config[stage.data_key]
    content = path.read_bytes()
    path.write_bytes(content.replace(b"cat", b"dog"))
    only_error(training.run(), "data (train)", "new save_dir")
    path.write_bytes(content)
    training.finish()


@pytest.mark.loop
def test_harmless_keys_may_change_and_max_steps_extends(stage, tmp_path):
    training = stage.training(tmp_path, max_steps=10)
    training.finish()
    longer = training.changed(max_steps=14, print_freq=1, checkpoint_freq=3, lr=5e-3, about="longer")
    process = longer.finish()
    assert "resumed at step 10" in process.stdout and "max_steps: 10 -> 14" in process.stdout
    assert longer.newest()["step"] == 14 and longer.final_file()["metrics"]["trained_steps"] == 14


@pytest.mark.loop
def test_a_final_file_without_step_files_is_not_overwritten(stage, tmp_path):
    training = stage.training(tmp_path, max_steps=10)
    training.finish()
    for step in training.steps():
        training.step_path(step).unlink()
    assert "already finished" in training.finish().stdout
    only_error(training.changed(max_steps=14).run(), training.final, "step files are gone")


@pytest.mark.loop
def test_another_stage_s_checkpoint_is_refused(stage, tmp_path):
    training = stage.training(tmp_path, max_steps=6)
    training.finish()
    rename = "import dataclasses, omni.stages\nfor module in list(vars(omni.stages).values()):\n"
    rename += "    for row in ('STAGE', 'CODEC', 'ALIGNER'):\n        if hasattr(module, row):\n"
    rename += "            setattr(module, row, dataclasses.replace(getattr(module, row), name='other'))\n"
    only_error(training.run(prelude=rename), "expected a checkpoint of stage other, found")


COUNTS = ("steps", "step", "freq", "epochs", "checkpoints", "rows", "masks", "width", "items", "clips", "sentences")
COUNTS += ("samples", "tokens", "picture")  # of these there may be any number: nothing is allocated for them


@pytest.mark.parametrize("cls", CONFIGS.values(), ids=CONFIGS.keys())
def test_no_size_is_without_an_upper_bound(cls):
    for name, field in cls.model_fields.items():
        if field.annotation in (int, int | None) and name.split("_")[-1] not in COUNTS and name != "downsample_time":
            with pytest.raises(ValidationError, match="less than"):
                TypeAdapter(Annotated[field.annotation, *field.metadata]).validate_python(10**12)


ODD_FILES = {
    "nested 100,000 deep": (b'{"about": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "5,000 digits": (b'{"lr": ' + b"9" * 5000 + b"}", "4300 digits"),
    "4,000 digits": (b'{"vocab_size": ' + b"9" * 4000 + b"}", "vocab_size"),
    "10^12 tokens": (b'{"vocab_size": 1000000000000}', '"vocab_size": expected less than or equal to 1048576'),
    "UTF-16": ('{"lr": 1}'.encode("utf-16"), "found UTF-16"),
    "a key twice": (b'{"lr": 1, "lr": 2}', 'key "lr" stands twice'),
    "a key twice, deeper": (b'{"about": {"x": 1, "y": 2, "x": 1}}', 'key "x" stands twice'),
    "a key of 30,000 letters": (b'{"' + b"k" * 30_000 + b'": 1}', "unknown key"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_config_file_is_refused_in_one_short_line(tmp_path, name):
    content, message = ODD_FILES[name]
    path = tmp_path / "odd.json"
    required = b'{"save_dir": "x", "train_text": "%s", "max_steps": 1, ' % str(path).encode()
    path.write_bytes(content.replace(b"{", required, 1))
    with pytest.raises(UserError) as error:
        load_config(TextConfig, str(path))
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("bom", ["\ufeff", "\ufeff\ufeff"])
def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path, bom):
    path = tmp_path / "bom.json"
    path.write_text(
        f'{bom}{{"save_dir": "x", "train_text": {json.dumps(str(path))}, "max_steps": 1}}', encoding="utf-8"
    )
    assert load_config(TextConfig, str(path))[0].max_steps == 1


def test_a_key_of_the_command_line_is_not_blamed_on_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"save_dir": "x", "train_text": str(path), "max_steps": 1, "wd": "a"}))
    for overrides, message in (
        (["wd=0", "foo=1"], '--set: unknown key "foo"'),
        (["wd=0", "lr=b"], '--set: key "lr": expected number'),
        (["lr=1"], f'{path}: key "wd": expected number'),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load_config(TextConfig, str(path), overrides)
