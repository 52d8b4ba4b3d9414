"""Stage E on VQA v2, LLaVA-Instruct and LibriSpeech: prepared as published, checked, trained, killed, judged."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from harness import differences, kill_at_step, run_script
from PIL import Image
from stages import OMNI, make_mix
from test_prepare_data import (  # the fixtures, too
    Preparation,
    preparation,  # noqa: F401
    server,  # noqa: F401
)
from test_sft import prepared, small_config

TASKS = {"image_question": 2.0, "conversation": 1.0, "transcription": 1.0, "caption": 1.0}


def with_real_pictures(prepared: Preparation) -> None:
    """The archives' pictures are a few bytes of text; a model needs real ones."""
    for number, path in enumerate(sorted(prepared.out.rglob("*.jpg"))):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        path.write_bytes(file.getvalue())


@pytest.mark.usefixtures("server")
def test_a_photo_with_questions_has_all_captions_of_the_published_file(preparation, tmp_path):  # noqa: F811
    """Stage E learns each of them, and compares an answer with all: CIDEr with one reference is another measure."""
    preparation.finish("coco", "vqa")
    manifest = str(preparation.out / "images/production_vqa.json")
    with_real_pictures(preparation)
    published: dict[str, set[str]] = {}
    for row in preparation.rows("images/production_annotations.json"):
        published.setdefault(row["image"], set()).add(row["caption"])
    config = small_config(tmp_path, image_manifest=manifest, val_image_manifest=manifest, image_root=None)
    tasks, val_tasks, _, _ = prepared(config)
    for number, row in enumerate(preparation.rows("images/production_vqa.json")):
        learnt = {tasks["caption"].messages(row, np.random.default_rng(seed))[-1]["content"] for seed in range(16)}
        references = val_tasks["caption"].sample(number, 0, {})[1]
        assert learnt == set(references.accepted) == published[row["image"]] and len(learnt) == 2
        assert "cider" in references.measures


@pytest.mark.usefixtures("server")
def test_stage_e_on_public_data_from_archives_to_scores(preparation, tmp_path):  # noqa: F811
    preparation.finish("librispeech", "coco", "vqa", "llava")
    with_real_pictures(preparation)
    images, audio = preparation.out / "images", preparation.out / "audio"
    folder = tmp_path / "models"
    folder.mkdir()
    models = {key: value for key, value in make_mix(folder).items() if key.endswith("_ckpt")}
    data = {
        "image_manifest": images / "production_vqa.json",
        "val_image_manifest": images / "production_vqa.val.json",
        "jsonl_path": images / "production_conversations.json",
        "val_jsonl_path": images / "production_conversations.json",
        "asr_csv": audio / "production_asr.csv",
        "val_asr_csv": audio / "production_asr.val.csv",
    }
    config = OMNI.config | models | {key: str(path) for key, path in data.items()}
    config |= {"save_dir": str(tmp_path / "run"), "task_weights": TASKS, "max_steps": 8, "max_epochs": None}
    training = replace(OMNI.training(folder), folder=tmp_path, config=config)

    checked = (
        replace(training, script="scripts/check_data.py").finish(arguments=("--read", "all", "--steps", "1")).stdout
    )
    for file in ("images/production_vqa.json", "images/production_conversations.json", "audio/production_asr.csv"):
        assert re.search(rf"{file}: {len(preparation.rows(file))} rows = ", checked), checked
    for task in TASKS:
        assert re.search(rf"training, {task}: read all \d+ rows: \d+ can be used, 0 cannot", checked), task

    training.finish()
    scores = training.metrics("val")[-1]
    by_task = {name.removeprefix("accuracy_"): score for name, score in scores.items() if name.startswith("accuracy_")}
    assert {*by_task} == {*TASKS} - {"caption"}, "one held-out caption has no others to be told from"
    assert all(0 <= score <= 1 for score in by_task.values())
    assert scores["accuracy"] == pytest.approx(np.mean(list(by_task.values())))
    killed = training.changed(save_dir="killed")
    for step in (3, 4):
        assert killed.run(prelude=kill_at_step(step)).returncode == -9
    killed.finish()
    assert differences(killed.state(), training.state()) == []

    for task, file, measure in (
        ("image_question", "val_image_manifest", "vqa_accuracy"),
        ("conversation", "jsonl_path", "rank_among_64"),
        ("transcription", "val_asr_csv", "one_minus_wer"),
    ):
        judged = run_script(training, "scripts/evaluate.py", "omni", "--task", task, "--data", config[file])
        assert judged.returncode == 0 and measure in judged.stdout, judged.stdout + judged.stderr
