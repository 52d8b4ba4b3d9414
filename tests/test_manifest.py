"""Manifests: every row found where it is, bad rows named and replaced, hostile files refused."""

import csv
import json
import os
import pickle
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT

from omni.common.errors import BadRow, UserError
from omni.data.manifest import Manifest, ManifestDataset, read_some, split_rows
from omni.data.measure import measure
from omni.data.open_manifest import load_manifest

COLUMNS = ("wav", "text")


def load(path: Path, **kwargs) -> Manifest:
    return load_manifest(path, COLUMNS, "text", log=lambda line: None, **kwargs)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Cuts fall everywhere: inside rows, inside quoted line breaks, inside characters."""
    monkeypatch.setattr("omni.data.formats.base._CHUNK_BYTES", 7)


def random_rows(count: int) -> list[dict]:
    rng = random.Random(0)
    letters = "ab,\"'é漢\r\n x"
    rows = [{"wav": f"{i}.wav", "text": "t" + "".join(rng.choices(letters, k=rng.randint(0, 9)))} for i in range(count)]
    return [row | {"text": row["text"].replace("\r", "")} for row in rows]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_row_of_a_csv(tmp_path, bom, end):
    rows, path = random_rows(200), tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(bom)
        writer = csv.DictWriter(file, ["wav", "text"], lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    manifest = load(path)
    assert [manifest[i] for i in range(len(manifest))] == rows


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 2])
def test_every_row_of_a_json_array(tmp_path, bom, indent):
    rows, path = random_rows(100), tmp_path / "a.json"
    path.write_text(bom + json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    manifest = load(path)
    assert [manifest[i] for i in range(len(manifest))] == rows


def test_every_row_of_a_jsonl(tmp_path):
    rows, path = random_rows(100), tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    manifest = load(path)
    assert [manifest[i] for i in range(len(manifest))] == rows


def test_blank_lines_and_a_missing_last_newline(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,wav\n\none,1.wav\n  \n\ntwo,2.wav")
    manifest = load(path)
    assert [manifest[i]["text"] for i in range(len(manifest))] == ["one", "two"]


def test_an_index_is_made_once_and_again_when_the_file_changes(tmp_path):
    path, lines = tmp_path / "a.csv", []
    path.write_text("wav,text\n1.wav,one\n")

    def rows() -> list[str]:
        manifest = load_manifest(path, COLUMNS, "text", log=lines.append)
        return [manifest[i]["text"] for i in range(len(manifest))]

    assert rows() == rows() == ["one"] and len(lines) == 1
    os.utime(path, (1, 1))
    assert rows() == ["one"] and len(lines) == 1, "the same bytes at another time"
    path.write_text("wav,text\n1.wav,eno\n")
    assert rows() == ["eno"] and len(lines) == 2


def test_a_manifest_travels_to_another_process(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("wav,text\n1.wav,one\n2.wav,two\n")
    copy = pickle.loads(pickle.dumps(load(path)))
    assert copy[1] == {"wav": "2.wav", "text": "two"}


BAD_FILES = {
    "no such file": (None, "expected a file, found none"),
    "missing column": (b"wav,remark\n1.wav,x\n", "text is missing"),
    "capitals": (b"WAV,TEXT\n1.wav,x\n", 'wav is missing; "WAV" has capitals'),
    "no header": (b"1.wav,hello\n", 'found "1.wav,hello"'),
    "empty": (b"", "empty, expected rows"),
    "no rows": (b"wav,text\n", "expected rows"),
    "NUL byte": (b"wav,text\n1.wav,x\n2.wav,a\0b\n", "line 3: found a NUL byte"),
    "another encoding": ("wav,text\n1.wav,x\n".encode("utf-16"), "found"),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_csv_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{}", "[1, ", "nothing", '[{"a": 1} x', "[" * 50_000, ""])
def test_a_bad_json_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match="a.json") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_rows_that_all_lack_a_column_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"sound of": "1.wav", "text": "one"}\n' * 3)
    expected = """row 1: expected a file's name in "wav", found none beside "sound of", "text". Nor .* first 3 rows"""
    with pytest.raises(UserError, match=expected):
        load(path)


@pytest.mark.parametrize(
    "name", ["a.csv", *(pytest.param(name, marks=pytest.mark.torture) for name in ("a.jsonl", "a.json"))]
)
def test_a_line_of_100_mb_is_refused_in_bounded_memory(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as file:
        file.write({"a.csv": b"wav,text\n1.wav,", "a.jsonl": b'{"text": "', "a.json": b'[{"text": "'}[name])
        for _ in range(100):
            file.write(b"x" * (1 << 20))
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from omni.common.errors import UserError
from omni.data.open_manifest import load_manifest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_manifest({str(path)!r}, ("wav", "text"), "text")
except UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    message, grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert str(path) in message
    assert int(grown) < 64, f"{grown} MiB"


BAD_ROWS = {
    "too few columns": ("only\n", "expected 2 columns (wav, text), found 1"),
    "too many columns": ("a.wav,b,c\n", "found 3"),
    "empty text": ("a.wav,\n", '"text" is empty'),
    "only spaces": ("a.wav,  \n", '"text" is empty'),
}


@pytest.mark.parametrize("line, message", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_says_why_and_leaves_the_others(tmp_path, line, message):
    path = tmp_path / "a.csv"
    path.write_text("wav,text\n1.wav,one\n" + line + "2.wav,two\n")
    manifest = load(path)
    with pytest.raises(BadRow) as error:
        manifest[1]
    assert message in str(error.value)
    assert manifest.where(1) == f"{path}: row 2"
    assert manifest[0]["text"] == "one" and manifest[2]["text"] == "two"


def test_a_row_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"wav,text\n1.wav,one\n2.wav,caf\xe9\n")
    with pytest.raises(BadRow, match="expected UTF-8 text, found byte 0xe9"):
        load(path)[1]


def test_files_inside_and_outside_of_the_root(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (root / "in.png").touch(), (tmp_path / "out.png").touch()
    os.symlink(tmp_path / "out.png", root / "link.png")
    path = tmp_path / "a.csv"
    path.write_text("wav,text\nx,y\n")
    manifest = load(path)
    assert manifest.file({"wav": "in.png"}, "wav", str(root)) == root / "in.png"
    for outside in ("../out.png", str(tmp_path / "out.png"), "link.png", "in.png/../../out.png"):
        with pytest.raises(BadRow, match="leaves the folder"):
            manifest.file({"wav": outside}, "wav", str(root))
    with pytest.raises(BadRow, match="found none at"):
        manifest.file({"wav": "absent.png"}, "wav", str(root))
    for odd in ("a\0b", 7, None):
        with pytest.raises(BadRow, match="expected a file name"):
            manifest.file({"wav": odd}, "wav")


def test_without_a_root_files_are_beside_the_manifest_or_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.csv"
    path.write_text("wav,text\nx,y\n")
    manifest = load(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.wav").touch()
    assert manifest.file({"wav": "here.wav"}, "wav") == Path("here.wav")
    (tmp_path / "data" / "here.wav").touch()
    assert manifest.file({"wav": "here.wav"}, "wav") == tmp_path / "data" / "here.wav"


def test_equal_keys_are_on_one_side_of_the_split(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("wav,text\n" + "".join(f"{i}.wav,sentence {i % 100}\n" for i in range(1000)))
    manifest = load(path)
    train, held_out = split_rows(manifest, 0.2)
    texts = [{manifest[row]["text"] for row in rows} for rows in (train, held_out)]
    assert not texts[0] & texts[1] and 10 <= len(texts[1]) <= 30
    assert sorted([*train, *held_out]) == list(range(1000))


class Numbers(ManifestDataset):
    """Each sample is its text as a number; augmentation adds a random one."""

    def read(self, row: dict, rng) -> float:
        if row["text"] == "bad":
            raise BadRow("it is bad")
        return float(row["text"]) + (rng.random() if rng else 0.0)

    def collate(self, samples: list) -> dict:
        return {"values": samples, "n_targets": len(samples)}


def numbers(tmp_path: Path, texts: list, **kwargs) -> Numbers:
    path = tmp_path / "n.csv"
    path.write_text("wav,text\n" + "".join(f"x,{text}\n" for text in texts))
    manifest = load(path)
    return Numbers(manifest, np.arange(len(manifest)), **kwargs)


def test_a_bad_row_is_replaced_by_the_next_good_one_in_training(tmp_path):
    rows = numbers(tmp_path, [0, "bad", "bad", 3, "bad"], training=True)
    batch = rows.batch(np.array([0, 1, 3, 4]), epoch=0)
    assert [int(value) for value in batch["values"]] == [0, 3, 3, 0]
    assert list(batch["bad_rows"]) == [rows.manifest.where(row) for row in (1, 2, 4)]
    assert set(batch["bad_rows"].values()) == {"it is bad"}


def test_a_bad_row_is_left_out_and_named_in_validation(tmp_path):
    rows = numbers(tmp_path, [0, "bad", 2], training=False)
    batch = rows.batch(np.arange(3), epoch=0)
    assert batch["values"] == [0.0, 2.0] and len(batch["bad_rows"]) == 1
    assert rows.batch(np.array([1]), epoch=0)["n_targets"] == 0


def test_nothing_but_bad_rows(tmp_path):
    batch = numbers(tmp_path, ["bad"] * 5, training=True).batch(np.arange(2), epoch=0)
    assert batch["n_targets"] == 0 and len(batch["bad_rows"]) == 5


def test_a_batch_of_no_rows_weighs_nothing(tmp_path):
    batch = numbers(tmp_path, [1, 2], training=True).batch(np.arange(0), epoch=0)
    assert batch["n_targets"] == 0 and len(batch["values"]) == 1


def test_augmentation_is_keyed_by_seed_epoch_and_row(tmp_path):
    def values(seed: int, epoch: int, order: list[int]) -> list[float]:
        rows = numbers(tmp_path, [0, 0, 0], training=True, seed=seed)
        return rows.batch(np.array(order), epoch)["values"]

    assert values(1, 0, [0, 1, 2]) == values(1, 0, [2, 1, 0])[::-1]
    assert len({*values(1, 0, [0, 1, 2]), *values(1, 1, [0, 1, 2]), *values(2, 0, [0, 1, 2])}) == 9


def test_measuring_every_row(tmp_path):
    rows = numbers(tmp_path, [5, "bad", 7], training=False)

    def value(manifest: Manifest, row: int) -> int:
        if manifest[row]["text"] == "bad":
            raise BadRow("no")
        return int(manifest[row]["text"])

    assert measure(rows.manifest, value, np.int32, desc="x").tolist() == [5, 0, 7]


def test_a_manifest_of_300_000_rows_takes_little_memory(tmp_path, monkeypatch):
    monkeypatch.undo()  # real chunks
    path = tmp_path / "big.csv"
    with path.open("w") as file:
        file.write("wav,text\n")
        file.writelines(f"folder/{i:07d}.wav,the sentence number {i}\n" for i in range(300_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = load(path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert manifest[299_999]["text"] == "the sentence number 299999"
    assert grown < 100, f"{grown} MiB"


def test_half_of_a_surrogate_pair_is_a_bad_row(tmp_path):
    rows, path = [{"wav": "a.wav", "text": "\U0001f600"}, {"wav": "b.wav", "text": "\ud83d"}], tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = load(path)
    assert manifest[0] == rows[0]
    with pytest.raises(BadRow, match="not valid JSON"):
        manifest[1]


def test_some_rows_are_read_evenly_and_bad_ones_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(10)))
    manifest = load_manifest(path, ("text",), "text", log=lambda line: None)

    def read(row: dict) -> int:
        if row["text"] == "9":
            raise BadRow("nine")
        return int(row["text"])

    assert read_some(manifest, np.arange(10), 4, read, lambda: None) == [0, 3, 6]
    with pytest.raises(UserError, match="row 10: nine"):
        read_some(manifest, np.array([9]), 4, read, lambda: None)


def test_a_folder_in_the_place_of_a_file_is_told_as_one(tmp_path):
    (tmp_path / "a.wav").mkdir()
    (tmp_path / "rows.csv").write_text("wav,text\na.wav,red\n")
    manifest = load_manifest(tmp_path / "rows.csv", ("wav", "text"), "text", log=lambda line: None)
    with pytest.raises(BadRow, match="found a folder"):
        manifest.file(manifest[0], "wav")
