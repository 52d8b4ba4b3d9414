"""Rows that cannot be used: named, replaced, counted, and too many of them stop the run. Never a silent skip."""

import csv
import json
import os
import re
import struct
import zlib
from pathlib import Path

import pytest
import soundfile
from harness import TRACE, Training, differences, kill_at_step
from stages import STAGES, StageCase, write_csv
from test_config import only_error

WITH_MANIFEST = [stage for stage in STAGES if stage.name != "text"]  # a corpus has lines, not rows that name files


@pytest.fixture(params=WITH_MANIFEST, ids=lambda stage: stage.name)
def stage(request) -> StageCase:
    return request.param


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows)) if path.suffix == ".json" else write_csv(path, rows)


def names(row: dict) -> tuple[str, str]:
    """Its columns for the file and for the text."""
    return ("wav" if "wav" in row else "image"), ("text" if "text" in row else "caption")


def spoil(stage: StageCase, training: Training) -> Path:
    """Row 4's file is gone, row 8's is cut in half, row 16's is no picture or sound at all. Row 12 has no text, or, for
    the vocoder, which needs none, names no file."""
    path = Path(training.config[stage.data_key])
    rows = read_rows(path)
    media, text = names(rows[0])
    file = lambda row: path.parent / rows[row - 1][media]  # noqa: E731
    file(4).unlink()
    os.truncate(file(8), file(8).stat().st_size // 2)
    rows[11][media if stage.name == "vocoder" else text] = ""
    file(16).write_bytes(b"nothing that anybody could read")
    write_rows(path, rows)
    return path


def test_bad_rows_are_named_replaced_and_counted(stage, tmp_path):
    training = stage.training(tmp_path, print_freq=1)
    training.prelude = TRACE
    path = spoil(stage, training)
    training.finish()
    log = (training.save_dir / "training.log").read_text()
    for row in (4, 8, 12, 16):
        assert log.count(f"{path}: row {row}: ") == 1, log
    assert training.metrics()[-1]["bad_rows"] == training.newest()["bad_rows"].__len__() == 4
    batch_size = training.config["batch_size"]
    assert all(len(rows) == batch_size for rows in eval(next(iter(training.trace().values())))), "no slot is empty"


@pytest.mark.loop
def test_resume_is_exact_with_bad_rows(stage, tmp_path):
    reference = stage.training(tmp_path, save_dir="reference", num_workers=2)
    spoil(stage, reference)
    reference.finish()
    killed = reference.changed(save_dir="killed")
    for at_step in (6, 9):
        assert killed.run(prelude=kill_at_step(at_step)).returncode == -9
    killed.finish()
    assert differences(killed.state(), reference.state()) == []


def test_too_many_bad_rows_stop_the_run(stage, tmp_path):
    training = stage.training(tmp_path, max_bad_rows=3, num_workers=2)
    path = spoil(stage, training)
    only_error(training.run(), "4 rows of the data cannot be used", "max_bad_rows 3", f"{path}: row ")


def test_nothing_but_bad_rows_stops_the_run(stage, tmp_path):
    training = stage.training(tmp_path)
    path = Path(training.config[stage.data_key])
    for row in read_rows(path):
        (path.parent / row[names(row)[0]]).unlink()
    process = training.run()
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert str(path) in process.stderr


def test_a_missing_column_is_refused(stage, tmp_path):
    training = stage.training(tmp_path)
    path = Path(training.config[stage.data_key])
    rows = read_rows(path)
    media, _ = names(rows[0])
    write_rows(path, [{"elsewhere" if key == media else key: value for key, value in row.items()} for row in rows])
    process = training.run()
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert str(path) in process.stderr and media in process.stderr


# Hostile input ------------------------------------------------------------------------------------------------------


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_image_bomb(path: Path) -> None:
    """A few hundred kB that would be 10 GB of pixels."""
    pixels = zlib.compressobj()
    lines = b"".join(pixels.compress(bytes(60_000 * 3 + 1)) for _ in range(100)) + pixels.flush()
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", lines) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def write_10_hours(path: Path) -> None:
    """A whole wav file of silence, without the disk space."""
    samples = 10 * 3600 * 16_000
    soundfile.write(path, [0.0], 16_000, subtype="PCM_16")
    header = bytearray(path.read_bytes()[:44])
    struct.pack_into("<I", header, 4, 36 + 2 * samples)
    struct.pack_into("<I", header, 40, 2 * samples)
    path.write_bytes(header)
    os.truncate(path, 44 + 2 * samples)


def test_a_giant_file_is_refused_in_bounded_memory(stage, tmp_path):
    clean = stage.training(tmp_path, save_dir="clean")
    clean.finish()
    training = clean.changed(save_dir="hostile")
    path = Path(training.config[stage.data_key])
    rows = read_rows(path)
    giant = path.parent / rows[6][names(rows[0])[0]]
    giant.unlink()
    write_10_hours(giant) if giant.suffix == ".wav" else write_image_bomb(giant)
    os.utime(path)
    training.finish()
    log = (training.save_dir / "training.log").read_text()
    assert f"{path}: row 7: " in log or re.search(f"{re.escape(str(path))}: 1 of .* left out, .*: rows? 7\n", log)

    def peak_gb(of: Training) -> float:
        lines = (of.save_dir / "metrics.jsonl").read_text().splitlines()
        return max(json.loads(line).get("peak_memory_gb", 0.0) for line in lines)

    assert peak_gb(training) < peak_gb(clean) + 0.2


def test_a_path_that_leaves_image_root_is_refused(stage, tmp_path):
    training = stage.training(tmp_path)
    if "image_root" not in training.config:
        pytest.skip("this stage has no image_root")
    path = Path(training.config[stage.data_key])
    rows = read_rows(path)
    outside = tmp_path.parent / "outside.png"
    (tmp_path / rows[0]["image"]).rename(outside)
    rows[0]["image"] = "../outside.png"
    write_rows(path, rows)
    training.finish()
    outside.unlink()
    assert "row 1: ../outside.png leaves the folder" in (training.save_dir / "training.log").read_text()
