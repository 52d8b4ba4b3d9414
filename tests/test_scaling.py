"""benchmarks/scaling.py: it runs to the end on little data, and a resumed run reads no more rows than it may."""

import subprocess
import sys

import pytest
from harness import ROOT, start

pytest.importorskip("transformers")  # of benchmarks/bench.py


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("scaling") / "page.md"
    arguments = ["--lines", "10000", "--rows", "1000", "--repeats", "1", "--out", str(path)]
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == path.read_text() + "\n"
    return path.read_text()


def rows_of(page: str, *beginning: str) -> list[list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return [row for row in cells if row[: len(beginning)] == list(beginning)]


def test_no_more_rows_are_read_before_the_first_batch_than_the_workers_have_ready(page):
    for data in ("text, A", "CSV, B"):
        for workers, most in (("0", 8), ("2", 8 * 3 * 2)):  # batch x (prefetch + 1) x workers
            rows = rows_of(page, data, workers)
            assert [row[2] for row in rows] == ["0%", "1%", "50%", "99%"]
            for *_, reads, at_most in rows:
                assert 8 <= int(reads) <= most == int(at_most)
    assert "never more rows were read" in page


def test_the_page_has_a_figure_in_every_place(page):
    files = {row[0]: row[1:] for row in rows_of(page) if len(row) == 5 and row[-1].isdecimal()}
    assert {name: row[0] for name, row in files.items()} == {"text, A": "10,000", "CSV, B": "1,000", "JSON, C": "1,000"}
    assert files["JSON, C"][-1] == "25", "bytes a row: 20 of an index, 4 of the captions' lengths, and headers"
    functions = {"text, A": 2, "CSV, B": 5, "JSON, C": 4}
    for data, count in functions.items():
        *each, whole = (row for row in rows_of(page, data) if len(row) == 9)
        assert len(each) == count and whole[1] == "all"
        for row in each:
            assert 100 < float(row[4].removesuffix(" MB").replace(",", "")) < 1000
    assert [row[0] for row in rows_of(page) if len(row) == 4][2:] == [
        "1,000",
        "1,000,000",
        "1,000,000,000",
        f"{10**12:,}",
    ]
    assert len([row for row in rows_of(page) if len(row) == 8]) == 2 + len(functions)
    assert "{" not in page and "nan" not in page


def test_too_little_data_is_refused(tmp_path):
    result = start(ROOT / "benchmarks/scaling.py", "--lines", 10, cwd=tmp_path).wait()
    assert result.returncode == 2 and "at least --lines 10000" in result.stderr and result.stderr.count("\n") == 1
