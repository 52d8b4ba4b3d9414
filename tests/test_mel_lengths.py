"""scripts/check_mel_lengths.py: exact figures from headers alone, for either stage, whatever is wrong with the rows."""

import json
import os
import struct

import numpy as np
import pytest
import soundfile
from harness import ROOT, Process, start
from stages import AUDIO_ENC, write_csv
from test_config import only_error

from omni.models.ctc import CtcTokenizer

TALKER_KEYS = {"save_dir": "-", "max_steps": 1, "frame_ms": 80}  # by frame_ms it is seen that it is a talker's config


@pytest.fixture
def folder(tmp_path):
    """Recordings of 0.5, 1.0, ... 10.0 s; the text of row 1 is a character too long, that of row 2 just fits. Then a
    missing file and one that is no audio."""
    rows, texts = [], {0: "abcdefgh", 1: "abcdefghijklm"}  # 0.5 s are 7 output frames, 1.0 s are 13
    for i in range(20):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(8000 * (i + 1), np.int16), 16_000)
        rows.append({"wav": f"{i}.wav", "text": texts.get(i, "even")})
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    rows += [{"wav": "absent.wav", "text": "seven"}, {"wav": "bad.wav", "text": "seven"}]
    write_csv(tmp_path / "a.csv", rows)
    return tmp_path


def check(folder, *arguments: str) -> Process:
    return start(ROOT / "scripts/check_mel_lengths.py", *arguments, cwd=folder).wait()


def figures(process: Process) -> dict[str, list[str]]:
    assert process.returncode == 0, process.stderr
    lines = [line.split() for line in process.stdout.splitlines()]
    return {" ".join(words[:-2]): words[-2:] for words in lines if len(words) > 2}


def test_the_audio_encoder_s_frames(folder):
    process = check(folder, "--csv", "a.csv", "--max_mel_length", "900")
    table = figures(process)
    assert table["shortest"] == ["50", "0.50"] and table["longest"] == ["1,000", "10.00"]
    assert table["median"] == ["550", "5.50"] and table["95 %"] == ["1,000", "10.00"]
    assert "a.csv: 22 rows, 0.03 h of audio\n100 mel frames a second" in process.stdout
    assert "max_mel_length 900 (9.00 s) leaves out 2 of 20 recordings (10.00 %)" in process.stdout
    assert 'Set "max_mel_length": 1000 to keep all of them' in process.stdout
    assert "in characters, since there is no tokenizer.json yet: 1 recordings: rows 1\n" in process.stdout
    assert "Cannot be read: 2 rows" in process.stdout
    for fragment in ("a.csv: row 21: expected a file, found none", "a.csv: row 22", "not an audio file"):
        assert fragment in process.stdout


def test_the_tokenizer_of_save_dir_decides_what_fits(folder):
    config = AUDIO_ENC.config | {"save_dir": "run", "train_csv": "a.csv", "max_mel_length": 400}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run").mkdir()
    CtcTokenizer.train(iter(["abcdefgh abcdefghijklm even"] * 9), 200).save(folder / "run" / "tokenizer.json")
    process = check(folder, "--config", "config.json")
    assert "in tokens of run/tokenizer.json: 0 recordings\n" in process.stdout, process.stderr
    assert "max_mel_length 400 (4.00 s) leaves out 12 of 20" in process.stdout


def test_the_talker_s_frames(folder):
    (folder / "config.json").write_text(json.dumps(TALKER_KEYS | {"tts_csv": "a.csv", "max_mel_length": 100}))
    process = check(folder, "--config", "config.json", "--plot", "a.png")
    table = figures(process)
    assert table["shortest"] == ["7", "0.56"] and table["longest"] == ["125", "10.00"]
    assert "12.5 mel frames a second" in process.stdout and "leaves out 4 of 20" in process.stdout
    assert "Text too long" not in process.stdout
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_files_of_the_config_need_not_be_there(folder):
    for number, keys in enumerate((
        AUDIO_ENC.config | {"save_dir": "run", "train_csv": "absent", "val_csv": "none", "val_voices_csv": "none",
                            "val_words_csv": "none"},
        TALKER_KEYS | {"tts_csv": "absent", "val_csv": "none"},
    )):  # fmt: skip
        (folder / f"{number}.json").write_text(json.dumps(keys))
        assert "longest" in figures(check(folder, "--csv", "a.csv", "--config", f"{number}.json"))


def test_no_sample_is_read(folder):
    path = folder / "19.wav"
    header = path.read_bytes()[:44]
    path.write_bytes(header)
    os.truncate(path, 44 + 160_000 * 2)  # sparse
    hours = folder / "18.wav"
    size = 10 * 3600 * 32_000
    hours.write_bytes(header[:4] + struct.pack("<I", size + 36) + header[8:40] + struct.pack("<I", size))
    os.truncate(hours, 44 + size)
    process = check(folder, "--csv", "a.csv")
    assert figures(process)["longest"] == ["3,600,000", "36000.00"]
    assert "leaves out 1 of 20" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ([], ("--csv FILE or --config FILE",)),
        (["--csv", "absent.csv"], ("absent.csv",)),
        (["--config", "absent.json"], ("absent.json", "cannot read the config")),
        (["--csv", "a.csv", "--max_mel_length", "0"], ("--max_mel_length 0", "at least 1")),
        (["--csv", "a.csv", "--plot", "no/such.png"], ("--plot", "no/such.png", "folder that is there")),
        (["--config", "talker.json"], ("talker.json", '"tts_csv"', "is missing")),
        (["--config", "wrong.json"], ("wrong.json", "frame_ms")),
    ],
)
def test_bad_arguments_are_one_line(folder, arguments, fragments):
    (folder / "talker.json").write_text(json.dumps(TALKER_KEYS))
    (folder / "wrong.json").write_text(json.dumps(TALKER_KEYS | {"tts_csv": "a.csv", "frame_ms": 0}))
    only_error(check(folder, *arguments), *fragments)
