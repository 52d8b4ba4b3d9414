"""Caches know the files they were made of, heal themselves, and never cost more memory than a batch."""

import csv
import json
import os
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from harness import differences, kill_at_step
from stages import AUDIO_ENC, OCR, OMNI, TALKER, VOCODER, StageCase

from omni.common.errors import BadRow, UserError
from omni.data.audio import MelSpec
from omni.data.manifest import ManifestDataset
from omni.data.measure import measure_rows
from omni.data.open_manifest import load_manifest
from omni.stages.codec import mel_statistics_of
from omni.stages.text import TextConfig
from omni.train.precompute import precompute
from omni.train.run import Run
from omni.train.stage import Stage

ROWS, BATCHES = 100, 4  # of 32 rows
NAME = "made"


# --- damages ----------------------------------------------------------------------------------------------------------


def flip(position: float):
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 0x10
        path.write_bytes(data)

    return damage


def cut(share: float):
    def damage(path: Path) -> None:
        os.truncate(path, int(share * (path.stat().st_size - 1)))

    return damage


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine.txt").write_text("not to be lost")


def link_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = {
    "deleted": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "first half": cut(0.5),
    "one byte short": cut(1.0),
    "a bit of the beginning": flip(0.0),
    "a bit of the middle": flip(0.5),
    "a bit of the end": flip(1.0),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "{}": lambda path: path.write_bytes(b"{}"),
    "no text": lambda path: path.write_bytes(b"\xff\x00" * 40),
    "nested deep": lambda path: path.write_bytes(b"[" * 100_000),
    "a folder": folder_instead,
    "a link to nowhere": link_instead,
}


def is_aside(folder: Path) -> bool:
    return any((path / "mine.txt").exists() for path in folder.glob("*.aside1"))


# --- what is computed of all rows -------------------------------------------------------------------------------------


class Bytes(ManifestDataset):
    """The bytes of files. A file of no byte is a bad row."""

    def read(self, row: dict, rng: None) -> torch.Tensor:
        data = self.manifest.file(row, "wav").read_bytes()
        if not data:
            raise BadRow("empty")
        return torch.tensor(list(data))

    def collate(self, samples: list[torch.Tensor]) -> dict:
        return {"samples": samples, "n_targets": len(samples)}


class Made:
    """``precompute`` on ``ROWS`` small files, in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stop_at, self.calls = folder, None, 0
        rng = np.random.default_rng(3)
        with open(folder / "rows.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("wav", "text"))
            for row in range(ROWS):
                self.file(row).write_bytes(b"" if row == 40 else rng.bytes(int(rng.integers(3, 30))))
                writer.writerow((self.file(row).name, f"text {row}"))
        self.config = TextConfig(
            train_text="-", vocab_size=300, ctx_len=8, save_dir=str(folder / "run"), max_steps=1, use_amp=False
        )

    def file(self, row: int) -> Path:
        return self.folder / f"{row}.bin"

    def make(self, batch: dict) -> list[np.ndarray]:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return [np.stack((sample.numpy(), -sample.numpy()), axis=1).astype(np.int16) for sample in batch["samples"]]

    def __call__(
        self, stop_at: int | None = None, save_dir: str = "run", known: Path | None = None
    ) -> tuple[bytes, bytes, str]:
        """The bytes of values and spans, and the digest; ``calls`` counts the batches that were made."""
        self.calls, self.stop_at = 0, stop_at
        keys = {"num_workers": 0, "save_dir": str(self.folder / save_dir)}
        with Run(self.config.model_copy(update=keys), Stage("text", "t", "t.pt", "", "loss"), [], "cpu") as run:
            manifest = load_manifest(self.folder / "rows.csv", ("wav", "text"), "text", log=lambda line: None)
            rows = Bytes(manifest, np.arange(ROWS), training=False)
            found = precompute(run, NAME, rows, "wav", {"model": 1}, self.make, note="making", known=known)
            assert not len(found[40]) and bytes(found[7][:, 0].astype(np.uint8)) == self.file(7).read_bytes()
            return np.array(found.values).tobytes(), np.array(found.spans).tobytes(), found.sha256

    def cache_files(self) -> list[Path]:
        return sorted((self.folder / "run/codes").iterdir())


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


FILES = ["made.npy", "made.spans.npy", "made.contents.npy", "made.json", "made.facts.npy", "made.facts.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_cache_is_made_again(made, capsys, name):
    expected = made()
    assert [path.name for path in made.cache_files()] == sorted(FILES)
    for damage in DAMAGES.values():
        damage(made.folder / "run/codes" / name)
        capsys.readouterr()
        assert made() == expected
        lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("making")]
        absent = damage is Path.unlink and name.endswith(".json")  # as if it had never been made
        assert len(lines) == (0 if absent else 1) and all(name in line for line in lines), (damage, lines)
        assert made.calls == (0 if "facts" in name else BATCHES)
        assert damage is not folder_instead or is_aside(made.folder / "run/codes"), "a folder of somebody else is gone"
    assert made() == expected and made.calls == 0 and capsys.readouterr().out == ""


def test_a_folder_or_file_in_the_place_of_the_caches(made):
    expected = made()
    codes = made.folder / "run/codes"
    shutil.rmtree(codes)
    codes.write_text("mine")
    assert made() == expected
    assert codes.with_name("codes.aside1").read_text() == "mine"


def test_a_kill_costs_one_batch(made):
    expected = made()
    for stop_at in range(BATCHES):
        shutil.rmtree(made.folder / "run")
        with pytest.raises(KeyboardInterrupt):
            made(stop_at=stop_at)
        assert made() == expected and made.calls == BATCHES - stop_at
        assert [path.name for path in made.cache_files()] == sorted(FILES)


def test_what_a_kill_left_half_written_is_made_again(made):
    expected, rng = made(), random.Random(2)
    for _ in range(15):
        shutil.rmtree(made.folder / "run")
        with pytest.raises(KeyboardInterrupt):
            made(stop_at=rng.randrange(1, BATCHES))
        path = made.folder / "run/codes" / rng.choice(["made.npy", "made.progress"])
        rng.choice([cut(rng.random()), flip(rng.random()), DAMAGES["{}"], DAMAGES["empty"], Path.unlink])(path)
        assert made() == expected


def test_what_another_stage_has_made_of_the_same_files_is_not_made_again(made, capsys):
    expected, theirs = made(), made.folder / "run"
    with pytest.raises(KeyboardInterrupt):
        made(save_dir="own", stop_at=2)
    assert made(save_dir="own", known=theirs) == expected and made.calls == 0
    assert str(theirs) in capsys.readouterr().out
    assert sorted(path.name for path in (made.folder / "own/codes").iterdir()) == sorted(FILES)
    assert made(save_dir="own") == expected and made.calls == 0, "it is a copy of its own"


@pytest.mark.parametrize("name", FILES)
def test_what_another_stage_has_is_not_taken_if_it_is_damaged(made, name):
    expected = made()
    flip(0.5)(made.folder / "run/codes" / name)
    assert made(save_dir="own", known=made.folder / "run") == expected
    assert made.calls == BATCHES


def test_what_another_stage_has_of_other_files_is_not_taken(made):
    made()
    made.file(7).write_bytes(b"another")
    assert made(save_dir="own") == made(save_dir="taken", known=made.folder / "run")
    assert made.calls == BATCHES


def test_a_kill_then_other_files_then_a_resume(made):
    """Nothing that was made of the old files is gone on with."""
    with pytest.raises(KeyboardInterrupt):
        made(stop_at=2)
    made.file(7).write_bytes(b"another")
    found = made()
    assert made.calls == BATCHES
    shutil.rmtree(made.folder / "run")
    assert made() == found


def rewritten(path: Path, data: bytes) -> None:
    """Other bytes under the same name, with size and time of the old ones."""
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_files_replaced_under_their_old_names_are_noticed(made, capsys):
    old = made()
    rewritten(made.file(7), bytes(len(made.file(7).read_bytes())))
    made.file(40).write_bytes(b"repaired")
    made.file(41).unlink()
    capsys.readouterr()
    with pytest.raises(AssertionError):  # row 40 can be used now
        made()
    assert f"3 of {ROWS} files changed: made again" in capsys.readouterr().out
    made.file(40).write_bytes(b"")
    found = made()
    assert found != old and made.calls == BATCHES
    shutil.rmtree(made.folder / "run")
    assert made() == found


def test_the_same_content_at_another_time_is_the_same(made, capsys):
    expected = made()
    for row in range(0, ROWS, 2):
        data = made.file(row).read_bytes()
        made.file(row).unlink()
        made.file(row).write_bytes(data)
    capsys.readouterr()
    assert made() == expected and made.calls == 0 and capsys.readouterr().out == ""


def test_a_file_that_changes_while_the_others_are_made(made, monkeypatch):
    """It is made again by the next run: what was read of it is not known."""
    original = made.make

    def make(batch: dict) -> list[np.ndarray]:
        if made.calls == 0:  # it has been read by now
            made.file(3).write_bytes(b"in between")
        return original(batch)

    monkeypatch.setattr(made, "make", make)
    old = made()
    assert made() != old and made.calls == BATCHES


def test_memory_is_that_of_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("omni.train.precompute._AT_A_TIME", 4)
    made = Made(tmp_path)
    made.make = lambda batch: [np.zeros((len(sample) * 5_000, 2), np.int16) for sample in batch["samples"]]
    run = Run(made.config.model_copy(update={"num_workers": 0}), Stage("text", "t", "t.pt", "", "loss"), [], "cpu")
    with run:
        manifest = load_manifest(tmp_path / "rows.csv", ("wav", "text"), "text", log=lambda line: None)
        rows = Bytes(manifest, np.arange(ROWS), training=False)
        tracemalloc.start()
        found = precompute(run, NAME, rows, "wav", {}, made.make, note="making")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert found.values.nbytes > 30e6 and peak < 0.3 * found.values.nbytes


# --- what is measured of all rows -------------------------------------------------------------------------------------


class Measured:
    def __init__(self, folder: Path) -> None:
        self.made, self.rows = Made(folder), []

    def __call__(self) -> list[int]:
        self.rows = []
        with Run(self.made.config, Stage("text", "t", "t.pt", "", "loss"), [], "cpu") as run:
            manifest = load_manifest(self.made.folder / "rows.csv", ("wav", "text"), "text", log=lambda line: None)

            def size(manifest, row: int) -> int:
                self.rows.append(row)
                return manifest.file(manifest[row], "wav").stat().st_size

            return measure_rows(run, manifest, "size", size, np.int64, column="wav").tolist()


@pytest.mark.parametrize("name", ["size.npy", "size.files.npy", "size.json"])
def test_a_damaged_measurement_is_made_again(tmp_path, capsys, name):
    measured = Measured(tmp_path)
    expected = measured()
    (folder,) = tmp_path.glob("rows.csv.index-*")
    for damage in DAMAGES.values():
        damage(folder / name)
        assert measured() == expected and len(measured.rows) == ROWS
        assert damage is not folder_instead or is_aside(folder)
    capsys.readouterr()
    assert measured() == expected and not measured.rows and not capsys.readouterr().out


def test_only_changed_files_are_measured_again(tmp_path, capsys):
    measured = Measured(tmp_path)
    expected = measured()
    for row, data in {3: b"longer than before" * 9, 40: b"x", 77: b""}.items():
        measured.made.file(row).write_bytes(data)
        expected[row] = len(data)
    capsys.readouterr()
    assert measured() == expected and measured.rows == [3, 40, 77]
    assert f"3 of {ROWS} files changed: measured again" in capsys.readouterr().out


def test_measuring_where_nothing_can_be_written(tmp_path, monkeypatch):
    measured = Measured(tmp_path)
    measured()
    measured.made.file(0).write_bytes(b"changed")

    def refuse(*_):
        raise OSError(30, "Read-only file system", "index")

    monkeypatch.setattr("omni.data.index.FolderLock.wait_for", refuse)
    with pytest.raises(UserError, match="Read-only file system. Set cache_dir"):
        measured()


# --- statistics and other JSON ----------------------------------------------------------------------------------------


def test_damaged_json_is_made_again(tmp_path, capsys):
    config = TextConfig(
        train_text="-", vocab_size=300, ctx_len=8, save_dir=str(tmp_path / "run"), max_steps=1, use_amp=False
    )
    path = tmp_path / "run/some.json"
    with Run(config, Stage("text", "t", "t.pt", "", "loss"), [], "cpu") as run:
        changed = lambda path: path.write_bytes(path.read_bytes().replace(b"0.5", b"0.7"))  # noqa: E731
        for damage in (None, changed, *DAMAGES.values()):
            if damage:
                damage(path)
            capsys.readouterr()
            assert run.cached_json(path.name, {"of": (1, 2)}, lambda: {"mean": [0.5]}) == {"mean": [0.5]}
            assert ("made again" in capsys.readouterr().out) == (damage not in (None, Path.unlink))
            assert run.cached_json(path.name, {"of": (1, 2)}, lambda: {}) == {"mean": [0.5]}
        assert run.cached_json(path.name, {"of": (1, 3)}, lambda: {"mean": [1.5]}) == {"mean": [1.5]}
        path.write_text(json.dumps({"belongs_to": {"of": [1, 3]}, "result": {"mean": [9.5]}}))  # of an earlier version
        assert run.cached_json(path.name, {"of": (1, 3)}, lambda: {"mean": [1.5]}) == {"mean": [1.5]}


def test_statistics_know_their_files_and_are_finite(tmp_path):
    made = Made(tmp_path)

    def statistics(read) -> dict:
        with Run(made.config, Stage("text", "t", "t.pt", "", "loss"), [], "cpu") as run:
            manifest = load_manifest(tmp_path / "rows.csv", ("wav", "text"), "text", log=lambda line: None)
            return mel_statistics_of(run, manifest, np.arange(ROWS), MelSpec(), read, 8)

    def read(row: dict) -> torch.Tensor:
        return torch.full((2, 3), float(len((tmp_path / row["wav"]).read_bytes())))

    with pytest.raises(UserError, match=r"\d\.bin: expected sound whose log-mels are finite"):
        statistics(lambda row: read(row) * float("inf"))
    assert not (tmp_path / "run/mel_statistics.json").exists()
    first = statistics(read)
    assert statistics(None) == first
    rewritten(made.file(0), bytes(made.file(0).stat().st_size))
    assert statistics(read) == first
    made.file(0).write_bytes(bytes(500))
    assert statistics(read) != first


# --- the scripts ------------------------------------------------------------------------------------------------------


def killed_after_caching(stage: StageCase, folder: Path, **keys):
    """A training that finished, and another one that was killed at its fourth step."""
    whole = stage.training(folder, save_dir="whole", **keys)
    whole.finish()
    killed = whole.changed(save_dir="killed")
    assert killed.run(prelude=kill_at_step(4)).returncode == -9
    return whole, killed


def only_line(training) -> str:
    process = training.run()
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    return process.stderr


@pytest.mark.parametrize("stage", [TALKER, OMNI, OCR, VOCODER, AUDIO_ENC], ids=lambda stage: stage.name)
def test_all_caches_of_a_stage_damaged_and_it_ends_alike(stage, tmp_path):
    keys = {"max_epochs": None, "max_steps": 6, "checkpoint_freq": 2}
    if stage is OMNI:
        keys |= {"cache_features": True}
    whole, killed = killed_after_caching(stage, tmp_path, **keys)
    caches = [path for folder in (killed.save_dir, killed.save_dir / "codes") for path in folder.glob("*.js*n")]
    caches += [*(killed.save_dir / "codes").glob("*.npy"), *tmp_path.rglob("lengths*.np*")]
    caches = [path for path in caches if path.name != "tokenizer.json"]
    assert caches
    rng = random.Random(4)
    for path in caches:
        rng.choice([cut(rng.random()), flip(rng.random()), DAMAGES["{}"], DAMAGES["empty"]])(path)
    assert "again" in killed.finish().stdout
    assert differences(killed.state(), whole.state()) == []


def test_recordings_replaced_in_mid_training_are_another_training(tmp_path):
    """Other codes are refused; the same recordings at another time are not."""
    whole, killed = killed_after_caching(TALKER, tmp_path, max_epochs=None, max_steps=6, checkpoint_freq=2)
    waves = [tmp_path / f"{row}.wav" for row in range(6)]
    kept = [path.read_bytes() for path in waves]
    for path in waves:
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples[::-1], rate)
    assert "data (codes)" in only_line(killed)
    for path, data in zip(waves, kept, strict=True):
        path.write_bytes(data)
    process = killed.finish()
    assert "6 of 24 files changed: made again" in process.stdout  # the codes are once more those of the checkpoint
    for path, data in zip(waves, kept, strict=True):
        path.write_bytes(data)
    assert "made again" not in killed.finish().stdout
    assert differences(killed.state(), whole.state()) == []


def test_pictures_replaced_in_mid_training_are_another_training(tmp_path):
    _, killed = killed_after_caching(
        OMNI, tmp_path, max_epochs=None, max_steps=6, checkpoint_freq=2, cache_features=True
    )
    data = {path: path.read_bytes() for path in sorted(tmp_path.glob("*.png"))}
    for path, other in zip(data, reversed(data.values()), strict=True):
        path.write_bytes(other)
    assert "data (computed)" in only_line(killed)


def test_lengths_that_change_in_mid_training_are_another_training(tmp_path):
    """The order of the samples depends on them: some would come twice, and others not at all."""
    _, killed = killed_after_caching(AUDIO_ENC, tmp_path, max_epochs=None, max_steps=6, checkpoint_freq=2)
    soundfile.write(tmp_path / "5.wav", np.random.default_rng(0).normal(0, 0.1, 14_000), 16_000)
    assert "data (lengths)" in only_line(killed)


def test_files_that_cannot_be_read_cost_nothing_that_was_made_of_them(made, capsys):
    """A disk that is not there: the codes stay, and the same disk again changes nothing."""
    first = made()
    (made.folder / "away").mkdir()
    for row in range(0, ROWS, 3):
        made.file(row).rename(made.folder / "away" / made.file(row).name)
    away = made.file(7).read_bytes() if made.file(7).exists() else None
    assert away is not None, "which is looked at below"
    assert made() == first and made.calls == 0
    assert "cannot be read: it is used as it is" in capsys.readouterr().out
    for file in (made.folder / "away").iterdir():
        file.rename(made.folder / file.name)
    assert made() == first and made.calls == 0
    assert "cannot be read" not in capsys.readouterr().out


def test_leftovers_of_killed_writes_go(made):
    made()
    left = made.folder / "run/codes/made.json.0123456789abcdef.omni-partial"
    left.write_text("half of it")
    assert made() and not left.exists()
