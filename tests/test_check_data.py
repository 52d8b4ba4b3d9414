"""scripts/check_data.py says what training would see, and leaves nothing behind but caches."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Training
from stages import AUDIO_ENC, TEXT, VISION, write_csv
from test_config import only_error


def check(training: Training, *arguments: str) -> str:
    """What the script prints for a training's config."""
    return replace(training, script="scripts/check_data.py").finish(arguments=arguments).stdout


def test_every_stage_is_checked_and_its_folder_stays_untouched(stage, tmp_path):
    training = stage.training(tmp_path)
    stdout = check(training, "--steps", "1", "--page", str(tmp_path / "page.html"))
    for text in ("steps an epoch", "weights to train", "s a step", "peak memory"):
        assert text in stdout, text
    assert not training.save_dir.exists()
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article>") >= 3 and "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page), "the page loads nothing"
    if stage.name == "omni":
        ends = re.findall(r"<span[^>]*>([^<]*)</span></p>", page)
        assert ends and all("end" in text for text in ends), "the end of an answer is learnt, too"
    if stage.name in ("vision", "ocr", "omni"):
        assert "data:image/png" in page
    if stage.name in ("audio_enc", "vocoder", "talker"):
        assert "data:audio/wav" in page and "<audio" in page


def test_rows_are_counted_as_a_plain_reader_counts_them(tmp_path):
    training = AUDIO_ENC.training(tmp_path, val_split=0.3)
    path = Path(training.config["train_csv"])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows += [{"wav": "absent.wav", "text": "one two"}, {"wav": "0.wav", "text": ""}, {"wav": "1.wav", "text": "ça 3"}]
    write_csv(path, rows)
    stdout = check(training, "--read", "all", "--steps", "0")
    total, used, held_out, left_out = (
        int(number.replace(",", ""))
        for number in re.search(
            r"([\d,]+) rows = ([\d,]+) to train on \+ ([\d,]+) held out \+ ([\d,]+) left out", stdout
        ).groups()
    )
    assert total == len(rows) == used + held_out + left_out
    found = re.findall(r"read all (\d+) rows: (\d+) can be used, (\d+) cannot", stdout)
    assert sum(int(count) for count, *_ in found) == used + held_out
    assert all(int(count) == int(good) + int(bad) for count, good, bad in found)
    assert sum(int(bad) for *_, bad in found) == 2 and "absent.wav" in stdout and '"text" is empty' in stdout
    assert "'ç'" in stdout or "ç" in re.search(r"characters: .*", stdout)[0]


def test_what_stands_on_both_sides_is_found(tmp_path):
    training = VISION.training(tmp_path)
    rows = json.loads(Path(training.config["train_manifest"]).read_text())
    held_out = [{"image": "0.png", "caption": "zebras"}, {"image": "new.png", "caption": rows[1]["caption"].upper()}]
    (tmp_path / "1.png").rename(tmp_path / "new.png")
    (tmp_path / "val.json").write_text(json.dumps(held_out))
    training = VISION.training(tmp_path, val_manifest=str(tmp_path / "val.json"))
    stdout = check(training, "--steps", "0")
    assert re.search(r"texts that are in training too: 1, such as", stdout)
    assert re.search(r"files that are in training too: 1, such as '.*/0.png'", stdout)
    assert re.search(r"words that no training text has: 1 zebras", stdout)


@pytest.mark.parametrize("own_file", [True, False])
def test_lines_of_stage_a_are_compared(tmp_path, own_file):
    lines = [f"the {word} dog number {number}" for number in range(20) for word in ("small", "round")]
    lines.append("zebras run") if not own_file else None
    (tmp_path / "train.txt").write_text("\n".join([*lines, *lines[:3]]) + "\n")
    (tmp_path / "val.txt").write_text(f"{lines[0]}\nzebras run\nThe round DOG  number 3\n")
    keys = {"val_text": str(tmp_path / "val.txt")} if own_file else {"val_split": 0.2}
    training = TEXT.training(tmp_path, train_text=str(tmp_path / "train.txt"), **keys)
    stdout = check(training, "--steps", "0", "--page", str(tmp_path / "page.html"))
    assert re.search(r"training, tokens of a line, of [\d,]+: 0% \d", stdout)
    assert re.search(r"held out, tokens of a line, of [\d,]+: 0% \d", stdout)
    found = int(re.search(r"texts that are in training too: (\d+)", stdout)[1])
    assert found == (2 if own_file else 0), "val_split puts equal lines on one side"
    if own_file:
        assert re.search(r"words that no training text has: 2 zebras, run", stdout)
    assert "<img" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--read", "some"), "expected a number of rows or all"),
        (("--steps", "-1"), "at least 0"),
        (("--set", "train_csv=absent.csv"), 'key "train_csv"'),
        (("--set", "d_mode=1"), "d_mode"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(tmp_path, arguments, message):
    training = AUDIO_ENC.training(tmp_path)
    only_error(replace(training, script="scripts/check_data.py").run(arguments=arguments), message)
