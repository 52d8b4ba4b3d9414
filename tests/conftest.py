import os
import signal
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests run in several processes, which would wait for each other's threads

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import reliability  # noqa: E402
from stages import STAGES  # noqa: E402

from omni.common import allocator  # noqa: E402
from omni.common.host import STOP_SIGNALS  # noqa: E402

os.environ |= allocator.settings()  # else each script that a test runs would start twice
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # most runs are so short that compiling our modules would take longer


def pytest_addoption(parser):
    parser.addoption("--reliability", metavar="FILE", type=Path, help="write what was counted to FILE, as a table")


def pytest_terminal_summary(terminalreporter, config):
    if path := config.getoption("--reliability"):
        reliability.write(path, terminalreporter.stats)


@pytest.fixture(autouse=True)
def handlers_of_signals():
    """A script whose ``main`` a test calls leaves its handlers in the test process, and all processes forked from it
    later would not end by SIGTERM."""
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGQUIT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(params=STAGES, ids=lambda stage: stage.name)
def stage(request):
    """Every stage in turn."""
    return request.param


def pytest_collection_modifyitems(items):
    """`make torture` repeats tests of the loop for every stage; `make test` runs them for one stage with one phase
    and, where phases matter, for one with two."""
    for item in items:
        if loop := item.get_closest_marker("loop"):
            shown_by = ("text",) if loop.kwargs.get("phases") == 1 else ("text", "vocoder")
            if item.callspec.params["stage"].name not in shown_by:
                item.add_marker("torture")
