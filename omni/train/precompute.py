"""Outputs of a trained model for every row of a manifest, computed once and kept beside the checkpoints."""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from omni.common.caches import (
    ABSENT,
    array_file,
    arrays_problem,
    content_of_row,
    open_arrays,
    set_aside,
    unseal,
    write_arrays,
)
from omni.common.errors import RunError
from omni.common.files import json_sha256, remove_temporary
from omni.common.media import Media
from omni.data.manifest import Manifest, ManifestDataset
from omni.data.measure import file_facts
from omni.data.order import NO_BATCH, ResumableDataset, arriving, build_loader
from omni.train.run import Run

_AT_A_TIME = 32  # rows
_THREADS = 8
_HEADER_BYTES = 128  # of an .npy file: numpy leaves room for any number of rows
_SEAL_BYTES = 16  # hexadecimal digits at the beginning of a line of a journal


@dataclass(frozen=True)
class RaggedArray:
    """One array per row, of different lengths, mapped from disk.

    ``values`` (N, ...): the concatenated arrays. ``spans`` (rows, 2): begin and end of each row's array, equal for a
    row that cannot be used. ``sha256``: digest of both.
    """

    values: np.ndarray
    spans: np.ndarray
    sha256: str = ""

    def __getitem__(self, row: int) -> np.ndarray:
        start, end = self.spans[row]
        return self.values[start:end]


def precompute(
    run: Run,
    name: str,
    rows: ManifestDataset,
    column: str,
    belongs_to: dict,
    make: Callable[[dict], list[np.ndarray]],
    *,
    root: str | None = None,
    note: str,
    known: str | None = None,
) -> RaggedArray:
    """The arrays of all ``rows``, kept as ``save_dir/codes/name``; ``make(batch)`` gives one for each row of a batch.

    They are computed again if they are damaged, if ``belongs_to`` changes, or if a file's content changes under its old
    name. A kill costs the batch in progress.

    Args:
        rows: the inputs, sorted so that neighbours have similar lengths; ``training`` is false.
        column: column with the files' names, relative to ``root``.
        belongs_to: other inputs of the result, as plain data.
        note: name of the computation, for the log.
        known: another ``save_dir``. What it has of the same inputs is copied.
    """
    path, numbers = run.save_dir / "codes" / name, rows.row_numbers
    order = hashlib.sha256(np.asarray(numbers, np.int64).tobytes()).hexdigest()  # neighbours are padded alike
    belongs_to = belongs_to | {"data": rows.manifest.sha256, "rows": len(rows), "order": order}
    with run.main_process_first():
        if run.is_main:
            if not path.parent.is_dir():
                set_aside(path.parent, even_a_file=True)
                path.parent.mkdir()
            remove_temporary(path.parent)  # this process holds the lock of save_dir
            files = Files(run, rows.manifest, column, root, numbers)
            problem = arrays_problem(path, belongs_to) or _changed(path, belongs_to, files)
            if problem and known and _copied(Path(known, "codes", name), path, belongs_to):
                instead = "" if problem == ABSENT else f" in the place of {problem}"
                run.log(f"{note}: {len(rows):,} rows of {rows.manifest.path} as in {known}{instead}")
                problem = _changed(path, belongs_to, files)
            if problem:
                if problem != ABSENT:
                    run.log(f"{problem}: made again")
                _make(run, path, rows, files, belongs_to, make, note)
    arrays, sha256 = open_arrays(path)
    return RaggedArray(arrays["values"], arrays["spans"], sha256)


@dataclass(frozen=True)
class Files:
    """The files that the rows ``numbers`` name in a column."""

    run: Run
    manifest: Manifest
    column: str
    root: str | None
    numbers: np.ndarray

    @cached_property
    def facts(self) -> np.ndarray:
        """(rows,) ``file_facts`` of the files."""
        return file_facts(self.run, self.manifest, self.column, self.root)[self.numbers]

    def contents(self, indices: np.ndarray) -> list[int]:
        """``content_of_row`` of some of the files."""
        pairs = [(int(self.numbers[index]), int(self.facts[index])) for index in indices]
        with ThreadPoolExecutor(_THREADS) as pool:  # digests are computed without the interpreter's lock
            return list(pool.map(lambda p: content_of_row(self.manifest, p[0], self.column, self.root, p[1]), pairs))


def _copied(source: Path, path: Path, belongs_to: dict) -> bool:
    """Whether ``source`` has whole arrays of ``belongs_to``, which then are at ``path``, too."""
    for theirs, ours in (
        (source, path),
        (source.with_name(f"{source.name}.facts"), path.with_name(f"{path.name}.facts")),
    ):
        if arrays_problem(theirs, belongs_to):
            return False
        arrays, sha256 = open_arrays(theirs)
        write_arrays(ours, belongs_to, **arrays)
        if open_arrays(ours)[1] != sha256:  # they were being written meanwhile
            unseal(ours)
            return False
    path.with_name(f"{path.name}.progress").unlink(missing_ok=True)
    return True


def _changed(path: Path, belongs_to: dict, files: Files) -> str:
    """A message about files that changed since the arrays were computed; "" if none did."""
    facts, before = path.with_name(f"{path.name}.facts"), np.zeros(len(files.numbers), np.uint64)
    if problem := arrays_problem(facts, belongs_to):
        if problem != ABSENT:
            files.run.log(f"{problem}: the content of {len(before):,} files is compared")
    else:
        before = open_arrays(facts)[0]["values"]
    suspects, changed, gone = np.flatnonzero(before != files.facts), 0, np.zeros(len(before), bool)
    contents = open_arrays(path)[0]["contents"]
    for start in range(0, len(suspects), _AT_A_TIME):
        files.run.check_stop()
        some = suspects[start : start + _AT_A_TIME]
        now = np.array(files.contents(some), np.uint64)
        gone[some] = (now == 0) & (contents[some] != 0)
        changed += int(((now != contents[some]) & ~gone[some]).sum())
    values, count = array_file(path, "values"), f"of {len(files.numbers):,} files"
    if changed:
        return f"{values}: {changed + int(gone.sum()):,} {count} changed"
    if gone.any():  # such as a disk that is not mounted: the result of hours is kept
        files.run.log(f"{values}: {gone.sum():,} {count} behind it cannot be read: it is used as it is")
    if problem or len(suspects):  # other times, the same content
        write_arrays(facts, belongs_to, values=np.where(gone, before, files.facts))
    return ""


def _make(
    run: Run, path: Path, rows: ManifestDataset, files: Files, belongs_to: dict, make: Callable, note: str
) -> None:
    """Compute the arrays of all rows and seal them, resuming after a kill."""
    unseal(path)
    key = json_sha256(belongs_to | {"files": hashlib.sha256(files.facts.tobytes()).hexdigest()})
    with _Unfinished(path, key) as unfinished:
        done = len(unfinished.batches)
        from_there = f", going on at batch {done + 1:,}" if done else ""
        run.log(f"{note}: {len(rows):,} rows of {rows.manifest.path}{from_there}")
        dataset = ResumableDataset(rows, seed=0, batch_size=_AT_A_TIME, shuffle=False)
        dataset.skip_samples = done * _AT_A_TIME
        limit, total = run.config.loader_timeout_s, dataset.steps_per_epoch

        def give_up(waited_s: float) -> bool:
            return run.stop_requested or waited_s >= limit

        batches = arriving(build_loader(dataset, run.config.num_workers, run.device), give_up) if done < total else []
        # a name keeps the loader while an error propagates: its destructor may take long
        shown = iter(tqdm(batches, initial=done, total=total, desc=note, unit="batch", disable=None, delay=0.5))
        for batch in shown:
            run.check_stop()
            if batch is None:
                raise RunError(NO_BATCH.format(limit) + ". Run the same command to go on")
            for text in batch["notes"]:
                run.log(text)
            positions = np.array(batch["rows"])
            numbers = [int(number) for number in rows.row_numbers[positions]]
            numbers = [number for number in numbers if rows.manifest.where(number) not in batch["bad_rows"]]
            made = make(batch) if numbers else []
            unfinished.append(numbers, made, files.contents(positions))
        unfinished.finish()
    spans, at = np.zeros((len(rows.manifest), 2), np.int64), 0
    for batch in unfinished.batches:
        for number, length in zip(batch["rows"], batch["lengths"], strict=True):
            spans[number] = at, at + length
            at += length
    contents = np.array([one for batch in unfinished.batches for one in batch["contents"]], np.uint64)
    write_arrays(path, belongs_to, there=("values",), spans=spans, contents=contents)
    write_arrays(path.with_name(f"{path.name}.facts"), belongs_to, values=files.facts)
    unfinished.journal_path.unlink()


class _Unfinished:
    """Values on disk that grow batch by batch, and a journal: for each batch a line with its rows, their lengths,
    hashes of their files' contents, and a digest of all values so far. A batch that a kill or a power cut left
    incomplete does not verify, and is computed again. A context manager.

    Args:
        key: digest of the inputs; values of another key are dropped.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.journal_path = array_file(path, "values"), path.with_name(f"{path.name}.progress")
        self.digest, self.batches = hashlib.sha256(), []
        self.dtype, self.tail, self.length = np.dtype(np.uint16), (), 0  # until the first value
        for file in (self.path, self.journal_path):
            set_aside(file)
        lines = self._lines(key)
        if lines is None:
            for file in (self.path, self.journal_path):
                file.unlink(missing_ok=True)
        self.file = _open(self.path)
        self.journal = _open(self.journal_path)
        self._take_up(lines or [])
        if lines is None:
            self._write_line({"key": key})

    def __enter__(self) -> "_Unfinished":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        self.journal.close()

    def _lines(self, key: str) -> list[bytes] | None:
        """The lines of the journal; None if there is none for ``key``."""
        lines = self.journal_path.read_bytes().splitlines(keepends=True) if self.journal_path.exists() else []
        known = lines and self.path.exists() and _parsed(lines[0]) == {"key": key}
        return lines if known else None

    def _take_up(self, lines: list[bytes]) -> None:
        """Resume after the last batch whose values verify."""
        self.file.seek(_HEADER_BYTES)
        end = len(lines[0]) if lines else 0
        for line in lines[1:]:
            batch = _parsed(line)
            if batch is None:
                break
            dtype, tail, digest = np.dtype(batch["dtype"]), tuple(batch["tail"]), self.digest.copy()
            digest.update(self.file.read(sum(batch["lengths"]) * dtype.itemsize * math.prod(tail)))
            if digest.hexdigest() != batch["sha256"]:
                break
            self.digest, self.dtype, self.tail, end = digest, dtype, tail, end + len(line)
            self.length += sum(batch["lengths"])
            self.batches.append(batch)
        self.file.seek(_HEADER_BYTES + self.length * self.dtype.itemsize * math.prod(self.tail))
        self.file.truncate()
        self.journal.seek(end)
        self.journal.truncate()

    def append(self, rows: list[int], made: list[np.ndarray], contents: list[int]) -> None:
        if made and not self.length:
            self.dtype, self.tail = made[0].dtype, made[0].shape[1:]
        for one in made:
            data = np.ascontiguousarray(one, self.dtype).tobytes()
            self.file.write(data)
            self.digest.update(data)
        self.file.flush()
        batch = {"rows": rows, "lengths": [len(one) for one in made], "contents": contents}
        batch |= {"dtype": self.dtype.str, "tail": self.tail, "sha256": self.digest.hexdigest()}
        self.length += sum(batch["lengths"])
        self.batches.append(batch)
        self._write_line(batch)

    def finish(self) -> None:
        """Complete the file, so that ``np.load`` reads it."""
        self.file.seek(0)
        self.file.write(_header(self.dtype, (self.length, *self.tail)))
        self.file.flush()
        os.fsync(self.file.fileno())

    def _write_line(self, value: dict) -> None:
        line = json.dumps(value).encode()
        self.journal.write(_line_seal(line) + line + b"\n")
        self.journal.flush()


def _open(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b")


def _line_seal(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:_SEAL_BYTES].encode()


def _parsed(line: bytes) -> dict | None:
    """The value of a line of the journal; None if the line is damaged."""
    value = line[_SEAL_BYTES:].rstrip(b"\n")
    return json.loads(value) if line.endswith(b"\n") and line[:_SEAL_BYTES] == _line_seal(value) else None


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The header of an ``.npy`` file; its length does not depend on the number of rows."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    assert len(header.getvalue()) == _HEADER_BYTES
    return header.getvalue()


class ManifestWithColumns:
    """A manifest with additional columns, computed from its rows.

    Args:
        computed: name of the column -> its values.
    """

    def __init__(self, manifest: Manifest, computed: dict[str, RaggedArray]) -> None:
        self.manifest, self.computed = manifest, computed
        digests = [manifest.sha256, *(computed[name].sha256 for name in sorted(computed))]
        self.sha256 = hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @property
    def keys(self) -> np.ndarray:
        return self.manifest.keys

    def where(self, row: int) -> str:
        return self.manifest.where(row)

    def file(self, row: dict, column: str, root: str | None = None) -> Media:
        return self.manifest.file(row, column, root)

    def __getitem__(self, row: int) -> dict:
        return self.manifest[row] | {name: values[row] for name, values in self.computed.items()}


def computed_digests(*sides: dict) -> dict[str, str]:
    """One digest of all columns computed from the rows of tasks (name -> task on each side); {} if there is none."""
    sources = [
        source for tasks in sides for task in tasks.values() for source in (task, getattr(task, "recordings", None))
    ]
    found = [
        source.manifest.sha256 for source in sources if source and isinstance(source.manifest, ManifestWithColumns)
    ]
    return {"computed": hashlib.sha256(" ".join(found).encode()).hexdigest()} if found else {}
