"""The page of counts that `make torture` writes, and the list of `make mutations`."""

import re

from mutations import MUTATIONS
from reliability import ROOT, page, write


class Report:
    def __init__(self, nodeid: str, duration: float) -> None:
        self.nodeid, self.duration = nodeid, duration


def test_each_outcome_is_counted_under_its_promise():
    reports = [
        ("test_resume.py", "", 0.5), ("test_resume.py", "passed", 2.0), ("test_resume.py", "failed", 1.0),
        ("test_resume.py", "error", 1.0), ("test_ocr.py", "skipped", 0.0), ("test_signals.py", "passed", 3.0),
    ]  # fmt: skip
    lines = page(reports, "today").splitlines()
    assert lines[2].startswith("today. ")
    assert [line.split(" | ")[1:] for line in lines[6:]] == [
        ["test_resume.py", "1", "2", "0", "4 |"],
        ["test_signals.py", "1", "0", "0", "3 |"],
        ["test_ocr.py", "0", "0", "1", "0 |"],
        ["", "2", "2", "1", "8 |"],
    ]


def test_the_page_says_when_of_what_and_where(tmp_path):
    path = tmp_path / "page.md"
    write(path, {"passed": [Report("tests/test_resume.py::test_it[text]", 1.0)], "warnings": [object()]})
    text = path.read_text()
    assert "| test_resume.py | 1 | 0 | 0 | 1 |" in text
    assert ", commit " in text and " cores, " in text and "torch " in text


def test_what_is_switched_off_stands_once_and_so_do_the_tests_that_are_named():
    for mutation in MUTATIONS:
        assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation
        for path, name in re.findall(r"(tests/\w+\.py)(?:::(\w+))?", mutation.tests):
            tests = (ROOT / path).read_text(encoding="utf-8")
            assert not name or re.search(rf"^def {name}\(", tests, re.MULTILINE), mutation
