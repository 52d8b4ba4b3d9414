"""The demo's trainings: side by side, in the order of what they build on; and when one of them ends badly."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import demo

from omni.common.errors import EXIT_FAILED, EXIT_INTERRUPTED
from omni.synthetic import speech

# notes in a file when it begins and ends; a SIGTERM ends it as it ends a stage: it saves, and a second one stops that
TRAINING = """
import os, signal, sys, time
def stop(*_):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
    time.sleep(1.0 if name == "b" else 0.1)
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
name, notes, seconds, code = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
note = lambda what: open(notes, "a").write(f"{what} {name}\\n")
note("begin"); print("step 1"); print("threads", os.environ.get("OMP_NUM_THREADS"))
time.sleep(seconds); note("end"); sys.exit(code)
"""


@dataclass
class Fake:
    """A stage that takes some seconds and ends with a code."""

    name: str
    seconds: float
    code: int = 0
    waits_for: set[str] = field(default_factory=set)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train fake stages on so many cores: the notes that they left, and what ``ended`` was told."""
    monkeypatch.setattr(demo, "_asked", threading.Event())
    monkeypatch.setattr(demo, "_children", [])
    demo.heed_signals()

    def run(*stages: Fake, cores: int = 2) -> tuple[list[str], dict[str, int], int]:
        notes, ends, code = tmp_path / "notes", {}, 0
        monkeypatch.setattr(demo, "STAGES", list(stages))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: False)
        commands = {s.name: ["-c", TRAINING, s.name, str(notes), str(s.seconds), str(s.code)] for s in stages}
        try:
            demo.train(commands, lambda stage, seconds, code: ends.update({stage.name: code}))
        except SystemExit as error:
            code = error.code
        return notes.read_text().splitlines(), ends, code

    return run


def test_a_stage_waits_for_those_it_builds_on_and_for_no_other(train, capfd):
    stages = [Fake("a", 0.5), Fake("c", 0.2, waits_for={"a", "b"}), Fake("b", 1.0), Fake("d", 0.1)]
    notes, ends, code = train(*stages)
    assert code == 0 and ends == dict.fromkeys("abcd", 0)
    assert notes.index("begin b") < notes.index("end a"), "side by side"
    assert notes.index("begin d") < notes.index("end b"), "what can begin does not wait"
    assert notes.index("begin c") > max(notes.index("end a"), notes.index("end b"))
    assert "a         | step 1\n" in capfd.readouterr().out


def test_each_of_two_has_half_of_the_cores(train, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    train(Fake("a", 0.2), Fake("b", 0.2), cores=4)
    lines = capfd.readouterr().out.splitlines()
    assert {line for line in lines if "| threads" in line} == {f"{name:<9} | threads 2" for name in "ab"}


def test_on_one_core_one_after_the_other(train):
    notes, _, _ = train(Fake("a", 0.1), Fake("b", 0.1), Fake("c", 0.1), cores=1)
    assert notes == [f"{what} {name}" for name in "abc" for what in ("begin", "end")]


def test_one_that_fails_ends_all_with_its_code(train):
    notes, ends, code = train(Fake("a", 30.0), Fake("b", 0.5, code=2), Fake("c", 0.1))
    assert code == 2 and ends == {"a": EXIT_INTERRUPTED, "b": 2}, "the other has saved"
    assert "begin c" not in notes and "end a" not in notes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_it_lets_all_save(train, tmp_path, number):
    """Each of them is asked once, also those that are still at it when the first has saved; and none starts."""

    def ask() -> None:
        notes = tmp_path / "notes"
        while not notes.exists() or notes.read_text().count("begin") < 2:  # both have their handlers
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()
    notes, ends, code = train(Fake("a", 60.0), Fake("b", 60.0), Fake("c", 0.1))
    assert code == EXIT_INTERRUPTED and "begin c" not in notes and ends == dict.fromkeys("ab", EXIT_INTERRUPTED)


@pytest.mark.usefixtures("train")
def test_asked_between_two_scripts_it_starts_no_other(tmp_path):
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        demo.run("-c", f"open({str(tmp_path / 'begun')!r}, 'w')")
    assert ended.value.code == EXIT_INTERRUPTED and not (tmp_path / "begun").exists()
    child = demo.start("-c", "import time; time.sleep(60)")  # as if the signal had come in the middle of this
    assert child.wait() == -signal.SIGTERM


def test_when_nobody_reads_any_more_all_save_and_it_ends(tmp_path):
    """As with a terminal that is closed, or ``| head -1``."""
    stages = "[Fake('a', 60.0), Fake('b', 60.0), Fake('c', 0.1)]"
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(demo.__file__).parent), str(demo.ROOT)]!r}
import os, demo
from test_demo import Fake, TRAINING
demo.STAGES = {stages}
os.sched_getaffinity = lambda _: {{0, 1}}
demo.torch.cuda.is_available = lambda: False
demo.heed_signals()
commands = {{s.name: ["-uc", TRAINING, s.name, {str(tmp_path / "notes")!r}, str(s.seconds), "0"] for s in demo.STAGES}}
demo.train(commands, lambda stage, seconds, code: print(stage.name, code, file=sys.stderr))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=200) == EXIT_INTERRUPTED
    assert {line.split()[1] for line in process.stderr.read().splitlines()} <= {str(EXIT_INTERRUPTED), "-15"}


@pytest.mark.usefixtures("train")
def test_one_that_a_signal_ends_unasked_has_failed(capfd):
    """As the kernel ends a process when memory is out."""
    with pytest.raises(SystemExit) as ended:
        demo.run("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert ended.value.code == EXIT_FAILED and "ended by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize(("known", "expected"), [({"all": 50.0}, 50.0), ({}, 0.0)])
def test_a_finished_demo_adds_no_minutes_and_needs_none(tmp_path, monkeypatch, known, expected):
    """Its results may have been deleted, while the models are there."""
    (tmp_path / "results.json").write_text(json.dumps({"ocr": {}, "minutes": known}))
    monkeypatch.setattr(demo, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(demo, "STAGES", [])
    for name in ("run", "ask", "export", "ask_exported", "print_table"):
        monkeypatch.setattr(demo, name, lambda *_: None)
    monkeypatch.setattr(demo.tesseract, "installed", lambda: False)
    monkeypatch.setattr(demo, "installed", lambda judge: False)
    demo.demo()
    assert json.loads((tmp_path / "results.json").read_text())["minutes"]["all"] == pytest.approx(expected, abs=0.1)


def test_a_ctrl_c_in_the_terminal_reaches_the_stages_through_the_demo_only():
    process = demo.start("-c", "import time; time.sleep(60)")
    assert os.getpgid(process.pid) != os.getpgid(0)
    process.kill()
    process.wait()


def test_stages_of_the_demo_wait_for_what_their_configs_name():
    waits = {stage.name: stage.waits_for for stage in demo.STAGES}
    assert waits["features"] == {"thinker", "audio_enc", "vision"} and waits["talker"] == {"audio_enc", "codec"}
    assert waits["sft"] == waits["features"] | {"features", "talker"}
    assert not any(waits[name] for name in ("thinker", "audio_enc", "codec", "vision", "vocoder", "ocr"))
    names = [stage.name for stage in demo.STAGES]
    assert sorted(waits) == sorted(names) and all(wait <= set(names) for wait in waits.values())


def test_the_judges_figures_have_the_names_of_the_table():
    assert set(demo.VOICES) == set(speech.NAMED) and set(demo.NEW_VOICES) == set(speech.NEW)
    speakers = {"val": demo.VOICES, "val_open": demo.VOICES, "val_voices": (*demo.VOICES, *demo.NEW_VOICES)}
    figures = {
        name: {
            (judge, label, key): 50.0
            for judge, keys in (
                ("whisper-base", ["WER %"]),
                ("dnsmos", ["OVRL", "SIG", "BAK"]),
                ("resemblyzer", ["similarity", "own voice %"]),
            )
            if judge in judges
            for version in ("recordings", "griffin_lim", "vocoded", "codec", "talker")
            for label in (version, *(f"{version}, {speaker}" for speaker in speakers[name]))
            for key in keys
        }
        for name, judges in demo.JUDGES_OF.items()
    }
    found = demo.judged(figures)
    assert found.keys() >= demo.JUDGED.keys()
    for name, target in demo.JUDGED.items():
        demo.verdict(found[name], target, found)  # each target names figures that there are
