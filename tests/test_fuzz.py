"""tests/fuzz.py: it finds what it should, and a small part of `make fuzz`."""

import ctypes
import os
import time
from pathlib import Path

import fuzz
import pytest
from reliability import write_part

from omni.common.errors import BadRow, UserError


def reader(behaviour):
    """A kind whose files of one byte are good, and read by ``behaviour`` where a damage made them longer."""

    def read(path: Path) -> None:
        if len(path.read_bytes()) != 1:
            behaviour()

    return fuzz.Kind(lambda folder: (folder / "a").write_bytes(b"x"), read)


def fail(error: Exception):
    def behaviour() -> None:
        raise error

    return behaviour


def waste() -> None:
    bytearray(b"\1") * (300 << 20)


def ask_for_too_much() -> None:
    bytearray(9 << 30)


BEHAVIOURS = {
    "bad row": (fail(BadRow("no good")), "bad row", ""),
    "user error": (fail(UserError("no good")), "one line", ""),
    "two lines": (fail(UserError("no\ngood")), "finding", "a message of 2 lines"),
    "key error": (fail(KeyError("x")), "finding", "KeyError at tests/test_fuzz.py"),
    "assertion": (fail(AssertionError()), "finding", "AssertionError"),
    "memory": (waste, "finding", "memory grew by"),
    "too much memory": (ask_for_too_much, "finding", "MemoryError"),
    "time": (lambda: time.sleep(9), "finding", "over 1 s"),
    "crash": (lambda: ctypes.string_at(0), "finding", "ended with -11"),
    "exit": (lambda: os._exit(0), "finding", "ended with 0"),
}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_what_is_a_finding(behaviour, tmp_path, monkeypatch):
    act, outcome, what = BEHAVIOURS[behaviour]
    monkeypatch.setitem(fuzz.KINDS, "fake", reader(act))
    monkeypatch.setattr(fuzz, "SECONDS", 1 if behaviour == "time" else 60)
    monkeypatch.setattr(fuzz, "RESIDENT", 200 << 20)
    rows = fuzz.run(["fake"], 4 if behaviour in ("memory", "time") else 12, 0, tmp_path)["fake"]
    assert [row["number"] for row in rows] == list(range(len(rows)))
    others = [row for row in rows if row["outcome"] != "good"]
    assert others and all(row["outcome"] == outcome and what in row["what"] for row in others), others


def test_a_case_is_the_same_again(tmp_path):
    contents = []
    for copy in ("a", "b"):
        good = tmp_path / copy
        good.mkdir()
        folder = fuzz.prepare("texts", good)
        found = [fuzz.write_case("texts", number, 3, folder)[0].read_bytes() for number in range(30)]
        contents.append(found)
    assert contents[0] == contents[1] and len(set(contents[0])) > 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("good")


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_good_files_are_good(kind, folder, monkeypatch):
    monkeypatch.chdir(fuzz.ROOT)
    files = fuzz.files_of(fuzz.KINDS[kind], fuzz.prepare(kind, folder))
    assert files
    for path in files:
        assert fuzz.outcome_of(fuzz.KINDS[kind].read, path) == ("good", ""), path


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damages_of_each_kind(kind, folder):
    results = fuzz.run([kind], 40, 1, folder, workers=1)
    assert [row for row in results[kind] if row["outcome"] == "finding"] == []
    assert f"| {kind} | 40 |" in fuzz.table(results, "today")


def test_the_page_keeps_the_parts_of_others(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Of an earlier version\n\ncounts\n")
    for text in ("## Fuzz 1\n\nx", "## Fuzz 2\n\ny"):
        write_part(page, "fuzz", text)
        written = page.read_text()
        assert "# Of an earlier version" in written and text in written and written.count("Fuzz") == 1
    write_part(page, "tests", "# Counts\n")
    assert "earlier" not in page.read_text() and page.read_text().index("# Counts") < page.read_text().index(
        "## Fuzz 2"
    )
