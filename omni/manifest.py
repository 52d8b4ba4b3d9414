"""Rows of a CSV, JSON or JSONL file of any size, read in any order, and what happens to the bad ones among them.

The file is read once, in chunks: where each row begins and ends goes into an index beside it, 20 bytes a row, that
later runs map into memory. Row ``i`` is then one short read, so a run that resumes reads no row that it skips.
"""

import codecs
import csv
import functools
import hashlib
import itertools
import json
import os
import stat
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from omni.caches import ABSENT, arrays_problem, facts_of_row, open_arrays, write_arrays
from omni.errors import BadRow, UserError, reading_row
from omni.files import file_stat, write_sealed_json
from omni.index import hold_cache, prepare_index, save_array
from omni.media import Inline, is_data_uri, parse_data_uri, quoted
from omni.records import MAX_ROW_BYTES, Record, json_records, line_of, line_records, other_encoding, parse
from omni.runtime import Run

T = TypeVar("T")
_VERSION = 2
_CHUNK_BYTES = 4 << 20
_SUBSTITUTES_TRIED = 100
_ROWS_A_THREAD = 512  # less would be work for the threads themselves
_THREADS = 8  # headers are read from many small files: waiting, not computing
_NAMED = 5  # rows left out that are named, for each reason; all are counted
_LISTED = 50_000  # names of a folder among which one is looked for that is spelt otherwise


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
        self.strip: bool = meta["strip"]  # blanks around cells are not part of them
        self.cr_ends: bool = meta["cr_ends"]  # a single CR ends a line
        self.left_out: dict[str, np.ndarray] = {}  # reason -> rows, see ``leave_out``
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
        start, end = (int(byte) for byte in self.spans[row])  # of no such row an IndexError, as of a list
        with reading_row():
            data = self._bytes(start, end)
            fields = parse(data, self.header, self.columns, strip=self.strip)
            if self._is_cut(row, data):
                raise BadRow("a single carriage return stands inside it")
        return fields

    def _bytes(self, start: int, end: int) -> bytes | None:
        return os.pread(self._file, end - start, start) if end - start <= MAX_ROW_BYTES else None

    def _is_cut(self, row: int, data: bytes) -> bool:
        """Whether a single CR ends the row, in a file whose header ends otherwise, and no whole row follows."""
        if self.cr_ends or not data.endswith(b"\r") or row + 1 == len(self):
            return False
        if self.spans[row + 1][0] != self.spans[row][1]:  # a blank line follows
            return False
        try:
            parse(self._bytes(*map(int, self.spans[row + 1])), self.header)
        except BadRow:
            return True
        return False

    def where(self, row: int) -> str:
        """``data/audio/asr.csv: row 17``; row 1 is the first one after the header."""
        return f"{self.path}: row {row + 1}"

    def file(self, name: str, root: str | None = None) -> Path | Inline:
        """The file that a row names: inside ``root``; without one, beside the manifest or in the working directory. Or
        the bytes of a data URI.

        A name that is not found as it is written is looked for without blanks around it, with ``/`` for ``\\``, and in
        the other Unicode forms.

        Raises:
            BadRow: there is no such file, or it lies outside ``root``.
        """
        if not isinstance(name, str) or "\0" in name:
            raise BadRow(f"expected a file name, found {quoted(repr(name))}")
        if is_data_uri(name):
            return parse_data_uri(name)
        with reading_row():
            folders = [self.path.parent, Path()] if root is None else [Path(root)]
            problem = ""
            for folder, spelling in itertools.product(folders, _spellings(name)):
                path = folder / spelling
                try:
                    found = stat.S_ISREG(os.stat(path).st_mode)
                except OSError as error:  # no such file; or a name too long, a loop of links, a locked folder
                    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                        problem = problem or f'"{quoted(name)}": {error.strerror}'
                    continue
                if root is not None and not path.resolve().is_relative_to(folder.resolve()):
                    raise BadRow(f"{quoted(name)} leaves the folder {root}")
                if found:
                    return path
            if root is not None and not (folders[0] / name).resolve().is_relative_to(folders[0].resolve()):
                raise BadRow(f"{quoted(name)} leaves the folder {root}")
            raise BadRow(problem or _none_found(folders[0], name))

    def leave_out(self, rows: np.ndarray, unusable: np.ndarray, reason: str, log: Callable[[str], None]) -> np.ndarray:
        """``rows`` without those where the mask ``unusable`` is true; says how many they are, and which the first."""
        out = rows[unusable]
        if len(out):
            self.left_out[reason] = np.union1d(self.left_out.get(reason, out[:0]), out)
            first = ", ".join(self.where(int(row)).rpartition(" ")[2] for row in out[:_NAMED]) + ", ..." * (
                len(out) > _NAMED
            )
            log(f"{self.path}: {len(out)} of {len(rows)} rows left out, {reason}: rows {first}")
        return rows[~unusable]


def _spellings(name: str) -> list[str]:
    """A name as it is written, and as other systems write it."""
    plain = name.strip().replace("\\", "/")
    forms = (unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))
    return list(dict.fromkeys([name, plain, *forms]))


def _none_found(folder: Path, name: str) -> str:
    """That a file is not there, and what is there under a name that differs in little."""
    # a name with a drive stands for itself, as one that begins with / does
    shown = quoted(name) if PureWindowsPath(name).drive else folder / quoted(name)
    path = folder / _spellings(name)[-1]
    while path != path.parent and not path.parent.is_dir():
        path = path.parent
    if path.is_dir():
        return f'expected a file, found a folder at "{shown}"'
    near = _names_in(path.parent).get(_folded(path.name)) if path.parent.is_dir() else None
    return f'expected a file, found none at "{shown}"' + (f'; there is "{quoted(near)}"' if near else "")


@functools.lru_cache(maxsize=4)
def _names_in(folder: Path) -> dict[str, str]:
    with os.scandir(folder) as entries:
        return {_folded(entry.name): entry.name for entry in itertools.islice(entries, _LISTED)}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().casefold()


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
        UserError: no such file, a column is missing, not UTF-8, a NUL byte, an open quotation mark, no rows.
    """
    path = Path(path)
    digest = hashlib.sha256(json.dumps([_VERSION, columns, key, str(path.resolve())]).encode()).hexdigest()[:12]
    folder = Path(cache_dir or path.parent) / f"{path.name}.index-{digest}"
    if not path.is_file():
        raise UserError(f"{path}: expected a file, found none")
    make = functools.partial(_make_index, path, folder, columns, key, log, check_stop)
    prepare_index(path, folder, ("spans", "keys"), make, log, check_stop)
    return Manifest(path, folder)


def _make_index(path: Path, folder: Path, columns: tuple[str, ...], key: str, log, check_stop) -> None:
    for old in folder.glob("*.np[yz]"):  # row measurements of another content
        old.unlink()
    (folder / "meta.json").unlink(missing_ok=True)
    before, digest = file_stat(path), hashlib.sha256()
    bar = tqdm(total=before["size"], unit="B", unit_scale=True, desc=f"index {path.name}", disable=None)

    def chunks() -> Iterator[bytes]:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                check_stop()
                digest.update(chunk)
                bar.update(len(chunk))
                yield chunk

    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if encoding := other_encoding(head):
        raise UserError(f"{path}: expected UTF-8 text, found {encoding}. Convert it with iconv")
    kind = _kind(path, head)
    if kind == "jsonl" and path.suffix == ".json":
        log(f"{path}: begins with an object, not with an array of them: read as JSONL, an object a line")
    header, strip, cr_ends, rows = None, False, True, _Found()
    spans, keys = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.uint32)]
    with bar:
        if kind == "json":
            records = json_records(path, chunks())
        else:
            records = line_records(path, chunks(), quotes=kind == "csv")
            records = rows.all_bytes(records)
        records = rows.without_blanks(records)
        if kind == "csv":
            record = next(records, None)
            header, strip = _read_header(path, record, columns)
            cr_ends = record.data.endswith(b"\r")
        while batch := list(itertools.islice(records, 10_000)):
            if len(keys) == 1:
                _check_first_rows(path, batch[:100], header, columns)
            spans.append(np.array([(record.start, record.end) for record in batch], np.uint64))
            keys.append(np.array([_key(path, record, header, key, kind) for record in batch], np.uint32))
    if file_stat(path) != before:
        raise UserError(f"{path}: changed while it was read. Run the same command again when it is complete")
    assert rows.end in (before["size"], None), "bytes after the last row"
    if len(keys) == 1:
        raise UserError(f"{path}: expected rows with {' and '.join(columns)}, found none")
    for name, parts in (("spans", spans), ("keys", keys)):
        save_array(folder / f"{name}.npy", np.concatenate(parts))
    meta = {"stat": before, "sha256": digest.hexdigest(), "header": header, "columns": columns}
    write_sealed_json(folder / "meta.json", meta | {"strip": strip, "cr_ends": cr_ends})
    count = sum(map(len, keys))
    log(f"indexed {path}: {count:,} rows{rows.others(header is not None)}")


def _kind(path: Path, head: bytes) -> str:
    """``csv``, ``jsonl`` or ``json``, an array. What is called ``.json`` is JSONL if an object stands first."""
    if path.suffix != ".json":
        return "jsonl" if path.suffix == ".jsonl" else "csv"
    return "jsonl" if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{" else "json"


class _Found:
    """Counts what is no row, and what is an odd one."""

    def __init__(self) -> None:
        self.end: int | None = None  # of the last record
        self.records = self.blank = self.of_lines = self.longest = self.longest_lines = 0

    def all_bytes(self, records: Iterator[Record]) -> Iterator[Record]:
        """``records``; not a byte of the file may be between two of them."""
        end = None
        for record in records:
            assert record.start == end or end is None and record.start in (0, 3), "bytes between two rows"
            self.end = end = record.end
            yield record

    def without_blanks(self, records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            if record.is_blank:
                self.blank += 1
                continue
            self.records += 1
            if record.data is not None and b'"' in record.data:
                lines = 1 + record.data.rstrip(b"\r\n").count(b"\n")
                self.of_lines += lines > 1
                if lines > self.longest_lines:
                    self.longest, self.longest_lines = self.records, lines
            yield record

    def others(self, has_header: bool) -> str:
        text = f", {self.blank:,} blank lines" if self.blank else ""
        if self.of_lines and has_header:  # a JSON element may take as many as it likes
            text += f"; {self.of_lines:,} rows take several lines, row {self.longest - 1} "
            text += f"the most, {self.longest_lines:,}"
        return text


def _check_first_rows(path: Path, records: list[Record], header: list[str] | None, columns: tuple[str, ...]) -> None:
    reasons = []
    for record in records:
        try:
            with reading_row():
                parse(record.data, header, columns)
            return
        except BadRow as error:
            reasons.append(error)
    raise UserError(f"{path}: row 1: {reasons[0]}. Nor can one of the first {len(records)} rows be used")


def _key(path: Path, record: Record, header: list[str] | None, key: str, kind: str) -> int:
    try:
        with reading_row():
            value = parse(record.data, header).get(key)
            if value:
                return zlib.crc32(str(value).encode())
    except BadRow as error:  # whoever reads the row will say why; but what is not JSON is no array of rows
        if kind == "json" and isinstance(error.__cause__, json.JSONDecodeError):
            line = line_of(path, record.start)
            raise UserError(f"{path}: the element of the array at line {line}: {error}") from error
    return zlib.crc32(record.data or str(record.start).encode())  # a row without a key stands for itself


def _read_header(path: Path, record: Record | None, columns: tuple[str, ...]) -> tuple[list[str], bool]:
    """The names of the columns, and whether blanks stand around them, as in ``wav, text``."""
    data = record.data if record else b""
    try:
        if data is None:
            raise UserError(f"{path}: expected a header, found a first line of more than {MAX_ROW_BYTES >> 20} MiB")
        with reading_row():
            cells = next(csv.reader([data.decode("utf-8")]), [])
    except BadRow as error:
        raise UserError(f"{path}: expected a UTF-8 CSV file with a header, found in its first line: {error}") from error
    header = [name.strip() for name in cells]
    if missing := [name for name in columns if name not in header]:
        raise UserError(
            f"{path}: expected a header with the columns {','.join(columns)}, "
            f'found "{quoted(",".join(header))}" ({missing[0]} is missing)'
        )
    return header, header != cells


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
                with hold_cache(manifest.folder, run.log, run.check_stop):
                    _measure_again(run, manifest, path, belongs_to, facts, function, dtype)
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

    note = f"{path.name} of {manifest.path.name}"
    values = measure(manifest, value, dtype, desc=note, check_stop=run.check_stop)
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
            with reading_row():
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


def account_for_rows(run: Run, manifest: Manifest, **uses: np.ndarray) -> None:
    """Log in one line where every row of a manifest went: a use of it, or left out, for which reasons.

    Args:
        uses: what for, with ``_`` for blanks -> the rows.
    """
    left_out = {reason: len(rows) for reason, rows in manifest.left_out.items()}
    parts = [f"{len(rows):,} {name.replace('_', ' ')}" for name, rows in uses.items()]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    line = f"{manifest.path}: {len(manifest):,} rows = {' + '.join(parts)} + {sum(left_out.values()):,} left out"
    line += f" ({reasons})" if reasons else ""
    found = np.concatenate([*manifest.left_out.values(), *uses.values()])
    assert np.array_equal(np.sort(found), np.arange(len(manifest))), f"a row that is in no count, or in two: {line}"
    run.log(line)


def account_for_split(
    run: Run, manifest: Manifest, train_rows: np.ndarray, held_out: Manifest, held_out_rows: np.ndarray
) -> None:
    """``account_for_rows`` of a manifest for training and of that of the held-out rows, which may be the same."""
    if manifest is held_out:
        account_for_rows(run, manifest, to_train_on=train_rows, held_out=held_out_rows)
    else:
        account_for_rows(run, manifest, to_train_on=train_rows)
        account_for_rows(run, held_out, held_out=held_out_rows)


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
            with reading_row():
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
        """The samples of ``rows``, and under ``bad_rows`` what was wrong with those that cannot be used; under
        ``sample_rows``, the row in whose slot each sample stands.

        For no rows, a batch of one row with ``weight`` 0. Without a single sample there is nothing to collate: the
        batch then has ``weight`` 0 and no tensors.
        """
        bad: dict[str, str] = {}
        found = [(int(row), self._sample(int(row), epoch, bad)) for row in rows]
        found = [(row, sample) for row, sample in found if sample is not None]
        if found:
            sample_rows, samples = map(list, zip(*found, strict=True))
            return self.collate(samples) | {"bad_rows": bad, "sample_rows": sample_rows}
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
                with reading_row():
                    return self.read(self.manifest[number], rng)
            except BadRow as error:
                bad[self.manifest.where(number)] = str(error)
        return None
