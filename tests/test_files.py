"""Files that are written beside other people's: no name that somebody took is followed, nothing is left in half."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT

from omni.common.errors import RunError, UserError
from omni.common.files import remove_temporary, replace_file
from omni.common.lock import FolderInUse, FolderLock
from omni.stages.evaluation import forget_speech, save_speech
from omni.train import checkpoint

KINDS = ("link to a file", "link into nowhere", "link to a folder", "second name", "folder", "pipe", "words")


def put(path: Path, kind: str, mine: Path) -> None:
    """Something of somebody else's at ``path``; what it leads to lies in ``mine``."""
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    if kind == "link to a file":
        path.symlink_to(mine / "notes.txt")
    elif kind == "link into nowhere":
        path.symlink_to(mine / "absent")
    elif kind == "link to a folder":
        path.symlink_to(mine)
    elif kind == "second name":
        os.link(mine / "notes.txt", path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("lock of another program")


def untouched(path: Path, mine: Path, before: os.stat_result) -> None:
    assert os.path.samestat(path.lstat(), before)
    assert [entry.name for entry in mine.iterdir()] == ["notes.txt"] and (mine / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_is_no_one_else_s_file(tmp_path, kind):
    path, mine = tmp_path / ".lock", tmp_path / "mine"
    put(path, kind, mine)
    before = path.lstat()
    with pytest.raises(UserError, match=r"\.lock: expected") as error:
        FolderLock(tmp_path)
    assert "\n" not in str(error.value)
    untouched(path, mine, before)


HOLDER = """
import os, signal, sys
from pathlib import Path
from omni.common.lock import FolderInUse, FolderLock
lock = FolderLock(Path(sys.argv[1]))
child = os.fork()  # as a data loader's worker is
if child == 0:
    signal.pause()
print(child, flush=True)
signal.pause()
"""


def test_a_folder_is_free_once_its_holder_is_killed_though_a_worker_lives_on(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        worker = int(holder.stdout.readline())
        with pytest.raises(FolderInUse, match=f"process {holder.pid}"):
            FolderLock(tmp_path)
        holder.kill()
        holder.wait()
        try:
            os.kill(worker, 0)  # it is there
            FolderLock(tmp_path).release()
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_temporary_name_is_a_new_one(tmp_path, kind, monkeypatch):
    path, mine = tmp_path / "x.json.omni-partial", tmp_path / "mine"
    put(path, kind, mine)
    before = path.lstat()
    replace_file(tmp_path / "x.json", lambda file: file.write(b"{}"))
    untouched(path, mine, before)
    monkeypatch.setattr("secrets.token_hex", lambda _: "00")  # guessed
    path.rename(tmp_path / "x.json.00.omni-partial")
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "x.json", lambda file: file.write(b"[]"))
    assert (tmp_path / "x.json").read_bytes() == b"{}" and (mine / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link to a file", "link into nowhere", "link to a folder", "folder", "pipe"])
def test_what_is_no_file_is_no_leftover_and_no_checkpoint(tmp_path, kind):
    save_dir, lines = tmp_path / "run", []
    save_dir.mkdir()
    put(save_dir / ".merged.omni-partial", kind, tmp_path / "one")
    remove_temporary(save_dir)
    assert os.path.lexists(save_dir / ".merged.omni-partial")
    payload = {
        "format": checkpoint.FORMAT_VERSION,
        "stage": "ocr",
        "config": {},
        "architecture": {},
        "step": 4,
        "metrics": {},
        "model": {},
    }
    if kind == "link to a file":  # to a checkpoint, it would be one
        return
    put(save_dir / "ocr_step_9.pt", kind, tmp_path / "two")
    with pytest.raises(RunError, match=r"ocr_step_9\.pt: expected a checkpoint"):
        checkpoint.newest(save_dir, "ocr", lines.append)
    checkpoint.save(save_dir / "ocr_step_4.pt", payload)
    lines.clear()
    assert checkpoint.newest(save_dir, "ocr", lines.append)["step"] == 4
    assert len(lines) == 1 and "ocr_step_9.pt" in lines[0]
    assert checkpoint.load_stage(save_dir, "ocr", "ocr", "ocr.pt")["step"] == 4
    put(save_dir / "ocr.pt", kind, tmp_path / "three")
    with pytest.raises(UserError, match=r"ocr\.pt: expected a checkpoint"):
        checkpoint.load_stage(save_dir, "ocr", "ocr", "ocr.pt")


@pytest.mark.parametrize("full_at", range(6))
def test_speech_on_a_full_disk_leaves_whole_files_only(tmp_path, monkeypatch, full_at):
    calls, real = [], os.fsync

    def fsync(number: int) -> None:
        if stat.S_ISREG(os.fstat(number).st_mode):
            calls.append(number)
            if len(calls) == full_at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    sounds = {kind: [torch.zeros(800), torch.ones(400)] for kind in ("recordings", "talker")}
    save_speech(tmp_path / "whole", sounds, ["a", "b"], 0, 16_000)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space") as error:
        save_speech(tmp_path / "full", sounds, ["a", "b"], 0, 16_000)
    assert str(tmp_path / "full") in str(error.value.filename)
    found = [path for path in (tmp_path / "full").rglob("*") if path.is_file()]
    assert len(found) == full_at
    for path in found:
        assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(tmp_path / "full")).read_bytes()


def test_speech_of_an_earlier_run_is_forgotten_and_what_is_of_somebody_else_spared(tmp_path):
    sounds = {kind: [torch.zeros(800), torch.ones(400)] for kind in ("talker", "griffin_lim")}
    save_speech(tmp_path, sounds, ["a", "b"], 0, 16_000)
    (tmp_path / "griffin_lim/mine.wav").write_bytes(b"mine")
    (tmp_path / "sampled.csv").write_text("wav,text\nmine.wav,a\n")
    forget_speech(tmp_path, ["griffin_lim", "sampled", "absent"])
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"talker.csv", "talker/000000.wav", "talker/000001.wav", "griffin_lim/mine.wav", "sampled.csv"}
