"""Rows of a CSV, JSON or JSONL file of any size, read in any order, and what happens to the bad ones among them.

The file is read once, in chunks: where each row begins and ends goes into an index beside it, 20 bytes a row, that
later runs map into memory. Row ``i`` is then one short read, so a run that resumes reads no row that it skips.
"""

import codecs
import csv
import hashlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from omni.caches import ABSENT, arrays_problem, facts_of_row, open_arrays, write_arrays
from omni.errors import BadRow, UserError
from omni.files import file_stat, index_is_current, replace_file, write_json
from omni.runtime import FolderLock, Run

T = TypeVar("T")
_VERSION = 1
_CHUNK_BYTES = 4 << 20
_MAX_ROW_BYTES = 1 << 20
_SUBSTITUTES_TRIED = 100
_ROWS_A_THREAD = 512  # less would be work for the threads themselves
_THREADS = 8  # headers are read from many small files: waiting, not computing


# ---------------------------------------------------------------------------------------------------------------
# The rows


class Manifest:
    """Rows of a CSV with a header, of a JSON array of objects, or of JSONL, through an index of byte spans.

    Args:
        path: the file.
        folder: its index, made by ``load_manifest``.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.path, self.folder = path, folder
        self.sha256: str = meta["sha256"]
        self.header: list[str] | None = meta["header"]  # None: JSON
        self.columns: list[str] = meta["columns"]
        self.facts: dict[tuple[str, str | None], np.ndarray] = {}  # see ``file_facts``
        self._open()

    def _open(self) -> None:
        self.spans = np.load(self.folder / "spans.npy", mmap_mode="r")  # (rows, 2) first byte, byte after the last
        self.keys = np.load(self.folder / "keys.npy", mmap_mode="r")  # (rows,) CRC-32 of the key column
        self._file = os.open(self.path, os.O_RDONLY)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("spans", "keys", "_file", "facts")} | {"facts": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            os.close(self._file)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, row: int) -> dict:
        """
        Raises:
            BadRow: not text, not as many columns as the header, or a required column that is absent or empty.
        """
        start, end = (int(byte) for byte in self.spans[row])
        return _parse(os.pread(self._file, end - start, start), self.header, self.columns)

    def where(self, row: int) -> str:
        """``data/audio/asr.csv: row 17``; row 1 is the first one after the header."""
        return f"{self.path}: row {row + 1}"

    def file(self, name: str, root: str | None = None) -> Path:
        """The file that a row names: inside ``root``; without one, beside the manifest or in the working directory.

        Raises:
            BadRow: there is no such file, or it lies outside ``root``.
        """
        if not isinstance(name, str) or "\0" in name:
            raise BadRow(f"expected a file name, found {name!r}")
        if root is None:
            folders = [self.path.parent, Path()]
        else:
            folders = [Path(root)]
            if not (folders[0] / name).resolve().is_relative_to(folders[0].resolve()):
                raise BadRow(f"{name} leaves the folder {root}")
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
        raise BadRow(f"expected a file, found none at {folders[0] / name}")


def _parse(record: bytes, header: list[str] | None, required: list[str]) -> dict:
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"expected UTF-8 text, found byte {record[error.start]:#x}") from error
    if header is None:
        try:
            row = json.loads(text)
            if "\\ud" in text.lower():  # half of a surrogate pair is valid JSON, and no text
                json.dumps(row, ensure_ascii=False).encode()
        except ValueError as error:
            raise BadRow(f"not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadRow(f"expected a JSON object, found {text[:40]}")
    else:
        lines = list(csv.reader([text]) if "\n" not in text.rstrip("\r\n") else csv.reader(text.splitlines(True)))
        if len(lines) != 1:
            raise BadRow("a quotation mark stands inside an unquoted field, so that rows run together")
        if len(lines[0]) != len(header):
            raise BadRow(f"expected {len(header)} columns ({', '.join(header)}), found {len(lines[0])}")
        row = dict(zip(header, lines[0], strict=True))
    for column in required:
        value = row.get(column)
        if not isinstance(value, str):
            raise BadRow(f'expected text in "{column}", found {json.dumps(value)}')
        if not value.strip():
            raise BadRow(f'"{column}" is empty')
    return row


# ---------------------------------------------------------------------------------------------------------------
# The index


def prepare_manifest(run: Run, path: str, columns: tuple[str, ...], key: str) -> Manifest:
    """``load_manifest`` inside a run: rank 0 makes the index while the others wait."""
    with run.main_process_first():
        return load_manifest(path, columns, key, cache_dir=run.config.cache_dir, log=run.log, check_stop=run.check_stop)


def load_manifest(
    path: str | Path,
    columns: tuple[str, ...],
    key: str,
    *,
    cache_dir: str | None = None,
    log: Callable[[str], None] = print,
    check_stop: Callable[[], None] = lambda: None,
) -> Manifest:
    """Open a manifest; its index is made once, and again when the file changes.

    Args:
        path: ``.json``: an array of objects; ``.jsonl``: one object a line; anything else: CSV with a header.
        columns: those that every row must fill.
        key: the column by which rows are split: equal values never stand in both splits.
        cache_dir: folder for the index; default: the manifest's own.

    Raises:
        UserError: no such file, a column is missing, not UTF-8, a NUL byte, a row over 1 MiB, no rows.
    """
    path = Path(path)
    digest = hashlib.sha256(json.dumps([_VERSION, columns, key, str(path.resolve())]).encode()).hexdigest()[:12]
    folder = Path(cache_dir or path.parent) / f"{path.name}.index-{digest}"
    if not path.is_file():
        raise UserError(f"{path}: expected a file, found none")
    try:
        fresh = index_is_current(path, folder)
        if not fresh:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}. Set cache_dir to a folder that can be written") from error
    if not fresh:
        with FolderLock.wait_for(folder, log, check_stop):
            if not index_is_current(path, folder):  # another process may have made it before this one got the lock
                _make_index(path, folder, columns, key, check_stop)
                log(f"indexed {path}: {len(np.load(folder / 'keys.npy', mmap_mode='r')):,} rows")
    return Manifest(path, folder)


def _make_index(path: Path, folder: Path, columns: tuple[str, ...], key: str, check_stop) -> None:
    for old in folder.glob("*.np[yz]"):  # row measurements of another content
        old.unlink()
    (folder / "meta.json").unlink(missing_ok=True)
    stat, digest = file_stat(path), hashlib.sha256()
    bar = tqdm(total=stat["size"], unit="B", unit_scale=True, desc=f"index {path.name}", disable=None)

    def chunks() -> Iterator[bytes]:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                check_stop()
                digest.update(chunk)
                bar.update(len(chunk))
                yield chunk

    spans, keys = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.uint32)]
    with bar:
        if path.suffix == ".json":
            header, records = None, _json_records(path, chunks())
        else:
            records = _line_records(path, chunks(), quotes=path.suffix != ".jsonl")
            header = None if path.suffix == ".jsonl" else _read_header(path, records, columns)
        while batch := list(itertools.islice(records, 10_000)):
            if len(keys) == 1:
                _check_first_rows(path, [record for _, record in batch[:100]], header, columns)
            spans.append(np.array([(start, start + len(record)) for start, record in batch], np.uint64))
            keys.append(np.array([_key(record, header, key) for _, record in batch], np.uint32))
    if file_stat(path) != stat:
        raise UserError(f"{path}: changed while it was read. Run the same command again when it is complete")
    if len(keys) == 1:
        raise UserError(f"{path}: expected rows with {' and '.join(columns)}, found none")
    for name, parts in (("spans", spans), ("keys", keys)):
        save_array(folder / f"{name}.npy", np.concatenate(parts))
    meta = {"stat": stat, "sha256": digest.hexdigest(), "header": header, "columns": columns}
    write_json(folder / "meta.json", meta)


def _check_first_rows(path: Path, records: list[bytes], header: list[str] | None, columns: tuple[str, ...]) -> None:
    reasons = []
    for record in records:
        try:
            _parse(record, header, columns)
            return
        except BadRow as error:
            reasons.append(error)
    raise UserError(f"{path}: row 1: {reasons[0]}. Nor can one of the first {len(records)} rows be used")


def save_array(path: Path, array: np.ndarray) -> None:
    replace_file(path, lambda file: np.save(file, array))


def _key(record: bytes, header: list[str] | None, key: str) -> int:
    try:
        value = _parse(record, header, []).get(key)
        return zlib.crc32(str(value).encode() if value else record)  # a row without a key stands for itself
    except BadRow:
        return 0  # whoever reads the row will hear why


def _read_header(path: Path, records: Iterator[tuple[int, bytes]], columns: tuple[str, ...]) -> list[str]:
    expected = ",".join(columns)
    try:
        header = next(csv.reader([next(records, (0, b""))[1].decode("utf-8-sig")]), [])
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a UTF-8 CSV file, found byte {error.object[error.start]:#x}") from error
    header = [name.strip() for name in header]
    if missing := [name for name in columns if name not in header]:
        found = ",".join(header)[:80]
        raise UserError(
            f'{path}: expected a header with the columns {expected}, found "{found}" ({missing[0]} is missing)'
        )
    return header


def _line_records(path: Path, chunks: Iterator[bytes], *, quotes: bool) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of each non-empty line; under ``quotes``, a line break between quotation marks belongs to
    its row (RFC 4180)."""
    rest, rest_start, row = b"", 0, 1
    for chunk in chunks:
        text = rest + chunk
        if (nul := chunk.find(b"\0")) >= 0:
            row += chunk.count(b"\n", 0, nul)
            raise UserError(f"{path}: line {row}: found a NUL byte, expected text")
        array = np.frombuffer(text, np.uint8)
        ends = np.flatnonzero(array == ord("\n"))
        if quotes:  # a line break ends the row if an even number of quotation marks stands before it
            before = np.searchsorted(np.flatnonzero(array == ord('"')), ends)
            ends = ends[before % 2 == 0]
        start = 0
        for end in (ends + 1).tolist():
            yield from _checked(path, rest_start + start, text[start:end], row)
            start, row = end, row + 1
        rest, rest_start = text[start:], rest_start + start
        _check_size(path, rest, row)
    yield from _checked(path, rest_start, rest, row)


def _checked(path: Path, start: int, record: bytes, row: int) -> Iterator[tuple[int, bytes]]:
    _check_size(path, record, row)
    if record.strip():
        yield start, record


def _check_size(path: Path, record: bytes, row: int) -> None:
    if len(record) > _MAX_ROW_BYTES:
        raise UserError(f"{path}: line {row}: longer than {_MAX_ROW_BYTES >> 20} MiB. Is a quotation mark not closed?")


def _json_records(path: Path, chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """(first byte, text) of each element of a JSON array, with one element in memory at a time."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    chunks = itertools.chain(chunks, [b""])
    text, at, byte, row, opened = "", 0, 0, 0, False

    def more() -> bool:
        """Append the next chunk to what is left of ``text``; False at the end of the file."""
        nonlocal text, at
        chunk = next(chunks, None)
        try:
            text, at = text[at:] + utf8.decode(chunk or b"", final=not chunk), 0
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#x}") from error
        return bool(chunk)

    def skip(characters: str) -> str:
        """Move over ``characters``; returns what stands there then, "" at the end."""
        nonlocal at, byte
        while True:
            while at < len(text) and text[at] in characters:
                at, byte = at + 1, byte + 1  # these are ASCII
            if at < len(text):
                return text[at]
            if not more():
                return text[at : at + 1]

    with open(path, "rb") as file:
        byte = 3 if file.read(3) == codecs.BOM_UTF8 else 0
    while True:
        found = skip(" \t\r\n" if not opened else " \t\r\n,")
        if not opened:
            if found != "[":
                raise UserError(f"{path}: expected a JSON array of objects, found {found!r} at the beginning")
            opened, at, byte = True, at + 1, byte + 1
            continue
        if found == "]":
            return
        while True:
            try:
                _, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                if len(text) - at > _MAX_ROW_BYTES or not more():
                    raise UserError(f"{path}: not valid JSON after row {row}: {error.msg}") from error
                continue
            except RecursionError as error:
                raise UserError(f"{path}: row {row + 1}: nested too deeply") from error
            break
        record = text[at:end].encode()
        if len(record) > _MAX_ROW_BYTES:
            raise UserError(f"{path}: row {row + 1}: longer than {_MAX_ROW_BYTES >> 20} MiB")
        yield byte, record
        at, byte, row = end, byte + len(record), row + 1


# ---------------------------------------------------------------------------------------------------------------
# What a stage does with the rows


def measure_rows(
    run: Run,
    manifest: Manifest,
    name: str,
    function: Callable[[Manifest, int], float],
    dtype,
    column: str | None = None,
) -> np.ndarray:
    """``function(manifest, row)`` for every row, computed once and kept beside the index under ``name``.

    Made for headers: how long a recording is. A row for which it raises ``BadRow`` gets 0.

    Args:
        column: the one whose files are measured; a file that has changed is measured again.

    Returns:
        (rows,) of ``dtype``, mapped from disk.
    """
    path, belongs_to = manifest.folder / name, {"data": manifest.sha256}
    with run.main_process_first():
        if run.is_main:
            facts = {} if column is None else {"files": file_facts(run, manifest, column)}
            if _measure_problem(path, belongs_to, facts):
                try:
                    with FolderLock.wait_for(manifest.folder, run.log, run.check_stop):
                        _measure_again(run, manifest, path, belongs_to, facts, function, dtype)
                except OSError as error:
                    raise UserError(
                        f"{error.filename}: {error.strerror}. Set cache_dir to a folder that can be written"
                    ) from error
        return open_arrays(path)[0]["values"]


def _measure_problem(path: Path, belongs_to: dict, facts: dict[str, np.ndarray]) -> str:
    if problem := arrays_problem(path, belongs_to):
        return problem
    if facts and (changed := int((open_arrays(path)[0]["files"] != facts["files"]).sum())):
        return f"{path}.npy: {changed:,} of {len(facts['files']):,} files changed"
    return ""


def _measure_again(run: Run, manifest: Manifest, path: Path, belongs_to: dict, facts: dict, function, dtype) -> None:
    """Measure what has changed, or all if what was measured cannot be used. The caller holds the folder's lock."""
    problem = _measure_problem(path, belongs_to, facts)
    if not problem:  # another process has measured before this one got the lock
        return
    if problem != ABSENT:
        run.log(f"{problem}: measured again")
    changed, before = np.ones(len(manifest), bool), np.zeros(len(manifest), dtype)
    if not arrays_problem(path, belongs_to):
        kept, _ = open_arrays(path)
        changed, before = kept["files"] != facts["files"], kept["values"]

    def value(manifest: Manifest, row: int) -> float:
        return function(manifest, row) if changed[row] else before[row]

    values = measure(manifest, value, dtype, desc=f"measure {manifest.path.name}", check_stop=run.check_stop)
    write_arrays(path, belongs_to, values=values, **facts)


def file_facts(run: Run, manifest: Manifest, column: str, root: str | None = None) -> np.ndarray:
    """(rows,) uint64 of size and times of the files that a column names, as they are when first asked for in a run."""
    if (column, root) not in manifest.facts:
        starts = range(0, len(manifest), _ROWS_A_THREAD)

        def some(start: int) -> list[int]:
            run.check_stop()
            rows = range(start, min(start + _ROWS_A_THREAD, len(manifest)))
            return [facts_of_row(manifest, row, column, root) for row in rows]

        with ThreadPoolExecutor(_THREADS) as pool:  # for file systems that answer over a network
            found = itertools.chain.from_iterable(pool.map(some, starts))
            manifest.facts[column, root] = np.fromiter(found, np.uint64, len(manifest))
    return manifest.facts[column, root]


def files_digest(manifest: Manifest, rows: Sequence[int], column: str) -> str:
    """Of size and times of the files that some rows name."""

    facts = [facts_of_row(manifest, int(row), column, None) for row in rows]
    return hashlib.sha256(np.array(facts, np.uint64).tobytes()).hexdigest()


def measure(manifest: Manifest, function, dtype, *, desc: str, check_stop=lambda: None) -> np.ndarray:
    """``function(manifest, row)`` for every row, in threads; 0 where it raises ``BadRow``."""

    def one(row: int):
        try:
            return function(manifest, row)
        except BadRow:
            return 0

    values = np.zeros(len(manifest), dtype)
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(values), desc=desc, unit="row", disable=None, delay=0.5, file=sys.stderr) as bar,
    ):
        for start in range(0, len(values), 4096):
            check_stop()
            rows = range(start, min(start + 4096, len(values)))
            values[start : rows.stop] = list(pool.map(one, rows))
            bar.update(len(rows))
    return values


def split_rows(manifest: Manifest, val_split: float) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for validation, by a hash of the key column alone: whatever the seed, the same
    rows are held out, and equal keys are on one side."""
    held_out = np.asarray(manifest.keys) < val_split * 2**32
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Up to ``count`` of the ``rows``, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def read_some(manifest: Manifest, rows: np.ndarray, count: int, read: Callable[[dict], T], check_stop) -> list[T]:
    """``read(row)`` for up to ``count`` rows, evenly spread; those that cannot be used are named by whoever trains on
    them.

    Raises:
        UserError: not one of them can be used.
    """
    found, problem = [], ""
    for row in spread(rows, count):
        check_stop()
        try:
            found.append(read(manifest[int(row)]))
        except BadRow as error:
            problem = f"{manifest.where(int(row))}: {error}"
    if not found:
        raise UserError(f"{problem}. Nor can {min(count, len(rows)) - 1} other rows be used")
    return found


class Rows:
    """Some rows of a manifest as samples and micro-batches: a ``Source`` (see omni/data.py). Stages subclass it.

    Args:
        rows: (N,) row numbers in the manifest.
        seed: of the augmentation.
        training: rows are augmented, and a bad one is replaced by the next good one in the same slot. Otherwise the
            rows are as they are, and a bad one is left out.
        lengths: (N,) how long each sample is, for batches of similar lengths; None: batches are as they come.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        *,
        seed: int = 0,
        training: bool,
        lengths: np.ndarray | None = None,
    ) -> None:
        self.manifest, self.row_numbers, self.seed, self.training = manifest, rows, seed, training
        self.lengths = lengths

    def read(self, row: dict, rng: np.random.Generator | None):
        """One sample. ``rng`` is keyed by (seed, epoch, row), None outside training.

        Raises:
            BadRow: the row cannot be used.
        """
        raise NotImplementedError

    def collate(self, samples: list) -> dict:
        """At least one sample as a batch: tensors, and ``weight``, the number of targets of the loss."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.row_numbers)

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        """The samples of ``rows``, and under ``bad_rows`` what was wrong with those that cannot be used.

        For no rows, a batch of one row with ``weight`` 0. Without a single sample there is nothing to collate: the
        batch then has ``weight`` 0 and no tensors.
        """
        bad: dict[str, str] = {}
        samples = [self._sample(int(row), epoch, bad) for row in rows]
        samples = [sample for sample in samples if sample is not None]
        if samples:
            return self.collate(samples) | {"bad_rows": bad}
        if self.training and not bad and (filler := self._sample(0, epoch, bad)) is not None:
            return self.collate([filler]) | {"weight": 0, "bad_rows": bad}
        return {"weight": 0, "bad_rows": bad}

    def _sample(self, row: int, epoch: int, bad: dict[str, str]):
        """The sample of ``row``, or of the next row that has one; None outside training, or after many bad ones."""
        for candidate in range(row, row + (_SUBSTITUTES_TRIED if self.training else 1)):
            candidate %= len(self)
            number = int(self.row_numbers[candidate])
            rng = np.random.default_rng((self.seed, epoch, number)) if self.training else None
            try:
                return self.read(self.manifest[number], rng)
            except BadRow as error:
                bad[self.manifest.where(number)] = str(error)
        return None
