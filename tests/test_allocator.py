"""The allocator's settings: there before a process begins its work, unless the user has others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from omni.common import allocator

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "GLIBC_TUNABLES"
WITHOUT = {name: value for name, value in os.environ.items() if name != VARIABLE}
PROGRAM = f"""
import os, sys
from omni.train import cli
from omni.stages.text import TextConfig
def main():
    cli.load_config = lambda *_: (print(os.environ.get({VARIABLE!r}), sys.argv, flush=True), os._exit(0))
    cli.parse_stage_args(TextConfig, "")
cli.launch(main)
"""

pytestmark = pytest.mark.skipif(not allocator._is_glibc(), reason="the settings are glibc's")


def environment_of(**variables: str) -> list[str]:
    """What a program sees that is launched with these variables, and its arguments."""
    line = [sys.executable, "-c", PROGRAM, "--config", "a b"]
    process = subprocess.run(line, cwd=ROOT, env=WITHOUT | variables, capture_output=True, text=True, check=True)
    return process.stdout.strip().split(" ", 1)


def test_a_script_starts_anew_with_the_settings_and_its_arguments():
    found, arguments = environment_of()
    assert found.startswith("glibc.malloc.hugetlb=1:") and arguments == "['-c', '--config', 'a b']"


def test_what_the_user_has_set_stays():
    assert environment_of(**{VARIABLE: "glibc.malloc.check=0"})[0] == "glibc.malloc.check=0"


def test_nothing_is_added_where_there_is_no_glibc(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert list(allocator.settings()) == [VARIABLE]
    monkeypatch.setattr(allocator.os, "confstr", lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert allocator.settings() == {}
