"""What frozen encoders make of files, kept: the same losses as from the files, and no file read twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import differences, trained_weights
from PIL import Image
from stages import OMNI, write_csv
from test_config import only_error
from test_sft import small_config

import sft_omni
from omni.common.errors import BadRow
from omni.models.omni_model import OmniModel
from omni.stages.omni import SftConfig
from omni.stages.omni_parts import assemble, processor_of
from omni.stages.tasks.features import cache_features
from omni.stages.tasks.prepare import prepare_tasks
from omni.train import checkpoint
from omni.train.run import Run
from omni.train.stage import Stage


def prepared(config: SftConfig) -> tuple[OmniModel, dict, dict]:
    """The model, the tasks of both sides; features kept if the config says so."""
    with Run(config, Stage("omni", "omni", "omni_final.pt", "tokens", "loss"), [], "cpu") as run:
        torch.manual_seed(0)
        run.config, model, tokenizer = assemble(config)
        processor = processor_of(tokenizer, model.architecture, run.config)
        tasks, val_tasks, _ = prepare_tasks(run, run.config, processor)
        if config.cache_features:
            cache_features(run, model, processor, [*tasks.values(), *val_tasks.values()])
    return model.eval(), tasks, val_tasks


@pytest.fixture
def mix(tmp_path) -> dict:
    """Files of all tasks but conversations, some questions about pictures asked aloud."""
    data = OMNI.make_data(tmp_path)
    data.pop("jsonl_path", None)
    question = "What colour is it?"
    manifest = Path(data["image_manifest"])
    rows = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([row | {"questions": [[question, "red"]]} for row in rows]))
    questions = {"Hello!": "Good day!", "Goodbye!": "See you."}
    asked = [
        {"wav": f"{i}.wav", "text": words, "answer": questions.get(words, "")}
        for i, words in enumerate([question, question, *questions])
    ]
    write_csv(tmp_path / "asked.csv", asked)
    return data | {"question_csv": str(tmp_path / "asked.csv"), "val_question_csv": str(tmp_path / "asked.csv")}


def batches(tasks: dict) -> list[dict]:
    """A batch of each task, and one of all of them."""
    samples = {name: [task.sample(row, 0, bad := {})[0] for row in range(len(task))] for name, task in tasks.items()}
    assert not bad
    processor = next(iter(tasks.values())).processor
    return [
        processor.collate(found) for found in [*samples.values(), [one for some in samples.values() for one in some]]
    ]


def test_kept_features_give_the_losses_of_the_files(mix, tmp_path, monkeypatch):
    keys = mix | {"val_split": 0.0, "use_amp": False}
    model, tasks, _ = prepared(small_config(tmp_path, **keys, save_dir=str(tmp_path / "a")))
    expected = [model(batch) for batch in batches(tasks)]
    _, kept, _ = prepared(small_config(tmp_path, **keys, save_dir=str(tmp_path / "b"), cache_features=True))
    assert set(kept) == set(tasks) >= {"caption", "transcription", "spoken_image_question", "spoken_answer"}
    for name in ("encode_images", "encode_audio"):  # never again
        monkeypatch.setattr(model, name, None)
    monkeypatch.setattr("omni.stages.tasks.processor.load_image", None)
    monkeypatch.setattr("omni.stages.tasks.processor.load_speech", None)
    found = [model(batch) for batch in batches(kept)]
    for losses, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(tuple(ours), tuple(losses), rtol=2e-3, atol=1e-4)
    assert any(losses.ctc_alignment_loss > 0 for losses in found)


def test_a_file_is_looked_at_once_in_all_runs(mix, tmp_path, monkeypatch, capsys):
    config = small_config(tmp_path, **mix, cache_features=True)
    prepared(config)
    assert "encoding images" in capsys.readouterr().out
    monkeypatch.setattr(OmniModel, "encode_images", None)
    monkeypatch.setattr(OmniModel, "encode_audio", None)
    _, tasks, val_tasks = prepared(config)
    assert "encoding images" not in capsys.readouterr().out
    assert batches(tasks) and batches(val_tasks)


def test_a_broken_file_is_named_and_replaced(mix, tmp_path):
    name = json.loads(Path(mix["image_manifest"]).read_text())[1]["image"]
    (tmp_path / name).write_bytes(b"no picture")
    _, tasks, _ = prepared(small_config(tmp_path, **mix, val_split=0.0, cache_features=True))
    _, right = tasks["caption"].sample(1, 0, bad := {})
    (where,) = bad
    assert name in bad[where] and "not a picture" in bad[where] and where.endswith("row 2")
    assert right.accepted == (), "a caption that is no scene's"
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(BadRow, match="now it can"):
        tasks["caption"]._open_image(tasks["caption"].image(tasks["caption"].manifest[1]))


def test_a_training_with_kept_features_ends_alike(mix, tmp_path, capsys):
    """The script, with and without: the same losses, up to what half precision rounds."""
    keys = {"max_steps": 4, "batch_size": 4, "print_freq": 1, "use_amp": False, "val_items": 2, "max_answer_tokens": 4}
    losses = []
    for keep in (False, True):
        config = small_config(tmp_path, **mix, **keys, save_dir=str(tmp_path / str(keep)), cache_features=keep)
        path = tmp_path / f"{keep}.json"
        path.write_text(config.model_dump_json(exclude_none=True))
        sft_omni.main(["--config", str(path), "--device", "cpu"])
        lines = (tmp_path / str(keep) / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    assert len(losses[0]) >= 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-3)


def test_what_cannot_be_kept_is_refused(mix, tmp_path, capsys):
    (tmp_path / "talks.jsonl").write_text("{}\n")
    for wrong in ({"freeze_encoders": False}, {"jsonl_path": str(tmp_path / "talks.jsonl")}):
        with pytest.raises(ValueError, match="cache_features"):
            small_config(tmp_path, **mix, cache_features=True, **wrong)
    with pytest.raises(ValueError, match="features_only"):
        small_config(tmp_path, **mix, features_only=True)
    with pytest.raises(ValueError, match="features_only.*no pictures"):
        keys = {"thinker_ckpt": "-", "text_path": "-", "cache_features": True, "features_only": True}
        SftConfig(save_dir="-", max_steps=1, **keys)


def test_features_need_no_talker_and_the_same_line_goes_on_to_the_same_model(tmp_path):
    few = {"max_epochs": None, "max_steps": 4, "cache_features": True}
    whole = OMNI.training(tmp_path, save_dir="whole", **few)
    assert "encoding recordings" in whole.finish().stdout
    first = OMNI.training(tmp_path, save_dir="first", **few | {"features_only": True, "talker_ckpt": str(tmp_path)})
    said = first.finish().stdout
    assert "Without it the same line goes on" in said and "left out" not in said
    assert first.changed(talker_ckpt=None).run().returncode == 0
    assert sorted(path.name for path in first.save_dir.glob("*.pt")) == []
    only_error(first.changed(features_only=False).run(), '"talker_ckpt"', str(tmp_path), "found none")
    training = first.changed(features_only=False, talker_ckpt=whole.config["talker_ckpt"])
    assert "encoding" not in training.finish().stdout
    assert not differences(trained_weights(training), trained_weights(whole))
    assert "encoding" not in training.changed(features_only=True).finish().stdout, "afterwards, too, it does no harm"


def test_features_of_another_training_stay_as_they_are(tmp_path):
    training = OMNI.training(tmp_path, max_epochs=None, max_steps=4, cache_features=True)
    training.finish()
    path = tmp_path / "vision" / "vision.pt"
    before = contents(training.save_dir / "codes")

    def refused(what: str, **keys) -> None:
        for only in (False, True):
            process = training.changed(features_only=only, **keys).run()
            only_error(process, "is of another training", what)
            assert "encoding" not in process.stdout and contents(training.save_dir / "codes") == before

    refused("seed: 42 -> 5", seed=5)
    saved = checkpoint.load(path)
    weight = next(name for name in saved["model"] if name.startswith("vit."))
    checkpoint.save(path, saved | {"model": saved["model"] | {weight: saved["model"][weight] + 1}})
    refused("data (vision_encoder)")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
