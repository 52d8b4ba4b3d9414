"""Rows of files of any size, read in any order; bad rows are counted, named, and replaced or left out.

One pass over a file writes the first and last byte of each row to an index beside it, 20 bytes a row, which later runs
map into memory. Row ``i`` is then one short read, so a resumed run reads no row that it skips. The formats
(``omni.data.formats``) define the rows; those of folders and archives are gathered in the index first.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from omni.common.errors import BadRow, UserError, reading_row
from omni.common.host import Host
from omni.common.media import Media, quoted
from omni.data.formats import FORMATS
from omni.data.formats.gathered import FOLDER, KEY, MEDIA
from omni.data.index import ROWS
from omni.data.named_files import find_file
from omni.data.records import MAX_ROW_BYTES, Record

T = TypeVar("T")
_SUBSTITUTES_TRIED = 100
_NAMED = 5  # rows that the log names for each reason; all are counted
PART = "_part"  # column: the part of a joined manifest that a row is from


# ---------------------------------------------------------------------------------------------------------------
# The rows


class Manifest:
    """Rows of a file through an index of byte spans.

    Args:
        path: the file, or the folder of a data set.
        folder: its index, made by ``load_manifest``.
        gathered: the folder with the rows, where ``path`` is a folder or an archive.
    """

    def __init__(self, path: Path, folder: Path, gathered: Path | None = None) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.path, self.folder, self.gathered = path, folder, gathered
        self.sha256: str = meta["sha256"]
        self.columns: list[str] = meta["columns"]  # columns that every row must fill
        self.format = FORMATS[meta["format"]](**meta["reading"])
        self.arrays: list[str] = meta["arrays"]
        self.remark: str = meta.get("remark", "")  # a log line about what was read; older indexes have none
        self.base = path if path.is_dir() else path.parent  # folder of the files that rows name
        self.facts: dict[tuple[str, str | None], np.ndarray] = {}  # see ``file_facts``
        self.left_out: dict[str, np.ndarray] = {}  # reason -> rows, see ``leave_out``
        self._open()

    def _open(self) -> None:
        arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in self.arrays}
        self.spans = arrays["spans"]  # (rows, 2) first byte, byte after the last
        self.keys = arrays["keys"]  # (rows,) CRC-32 of the key column
        self._numbers = arrays.get("numbers")  # (rows,) the row's number in messages, if not its position
        self._file = os.open(self.gathered / ROWS if self.gathered else self.path, os.O_RDONLY)

    def __getstate__(self) -> dict:
        opened = ("spans", "keys", "_numbers", "_file", "facts")
        return {name: value for name, value in self.__dict__.items() if name not in opened} | {"facts": {}}

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
            BadRow: not a row of the file's format, or a required column is absent or empty.
        """
        record = self._record(row)
        with reading_row():
            fields = self.format.read(record.data, self.columns)
            self.format.check(record.data, functools.partial(self._following, row))
        return fields

    def _record(self, row: int) -> Record:
        start, end = (int(byte) for byte in self.spans[row])  # IndexError if there is no such row
        return Record(start, end, os.pread(self._file, end - start, start) if end - start <= MAX_ROW_BYTES else None)

    def _following(self, row: int) -> Record | None:
        """The next row; None after the last one, and where a blank line follows."""
        if row + 1 == len(self) or self.spans[row + 1][0] != self.spans[row][1]:
            return None
        return self._record(row + 1)

    def where(self, row: int) -> str:
        """``data/audio/asr.csv: row 17``; row 1 is the first one after the header. A row that has been gathered has a
        name, too."""
        number = row + 1 if self._numbers is None else self._numbers[row]
        name = json.loads(self._record(row).data or b"{}").get(KEY) if self.gathered else None
        return f"{self.path}: row {number}" + (f" ({quoted(name)})" if name else "")

    def file(self, row: dict, column: str, root: str | None = None) -> Media:
        """The file that a row names in a column, see ``find_file``: inside ``root``; without one, beside the manifest
        or in the working directory. What an archive contains is there, whatever the ``root``. Or the bytes of a data
        URI."""
        if self.gathered:
            for name, folder in ((MEDIA, self.gathered), (self.path.name, self.base)):
                if str(row[column]).startswith(f"{name}#"):
                    return find_file(row[column], [folder])
        if root is not None:
            return find_file(row[column], [Path(root)], root)
        own = [self.base / row[FOLDER]] if row.get(FOLDER) else []
        return find_file(row[column], [*own, self.base, Path()])

    def leave_out(self, rows: np.ndarray, unusable: np.ndarray, reason: str, log: Callable[[str], None]) -> np.ndarray:
        """``rows`` without those where the mask ``unusable`` is true; logs their number and the first of them."""
        out = rows[unusable]
        if len(out):
            self.left_out[reason] = np.union1d(self.left_out.get(reason, out[:0]), out)
            first = ", ".join(self.where(int(row)).rpartition(": row ")[2] for row in out[:_NAMED]) + ", ..." * (
                len(out) > _NAMED
            )
            log(f"{self.path}: {len(out)} of {len(rows)} rows left out, {reason}: rows {first}")
        return rows[~unusable]


def place_of(row: dict) -> dict:
    """The columns of a row without which the files that it names are not found."""
    return {name: row[name] for name in (PART, FOLDER) if name in row}


def joined_name(paths: list[Path]) -> Path:
    """What messages call several files that are read one after the other."""
    first, *others = paths
    return first.with_name(f"{first.name} and {len(others)} more") if others else first


class JoinedManifest(Manifest):
    """The rows of several manifests, one after the other.

    Args:
        parts: at least two.
        folder: for what is measured of the rows.
    """

    def __init__(self, parts: list[Manifest], folder: Path) -> None:
        first = parts[0]
        self.parts, self.folder, self.format, self.columns = parts, folder, first.format, first.columns
        self.path = joined_name([part.path for part in parts])
        self.sha256 = hashlib.sha256(" ".join(part.sha256 for part in parts).encode()).hexdigest()
        self.keys = np.concatenate([part.keys for part in parts])
        self.facts, self.left_out = {}, {}
        self._ends = np.cumsum([len(part) for part in parts])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"facts": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, row: int) -> tuple[int, int]:
        """The part of a row, and its number there."""
        part = int(np.searchsorted(self._ends, row, side="right"))
        return part, int(row) - int(self._ends[part]) + len(self.parts[part])

    def __getitem__(self, row: int) -> dict:
        part, number = self._place(row)
        return self.parts[part][number] | {PART: part}

    def where(self, row: int) -> str:
        part, number = self._place(row)
        return self.parts[part].where(number)

    def file(self, row: dict, column: str, root: str | None = None) -> Media:
        return self.parts[row[PART]].file(row, column, root)


# ---------------------------------------------------------------------------------------------------------------
# What a stage does with the rows


def split_rows(manifest: Manifest, val_split: float) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for validation, by a hash of the key column alone: all seeds hold out the same rows,
    and equal keys are in one split."""
    held_out = np.asarray(manifest.keys) < val_split * 2**32
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Up to ``count`` of the ``rows``, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def account_for_rows(run: Host, manifest: Manifest, **uses: np.ndarray) -> None:
    """Log a line that accounts for every row of a manifest: by use, or left out, with the reasons.

    Args:
        uses: name of the use, with ``_`` for blanks -> the rows.
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
    run: Host, manifest: Manifest, train_rows: np.ndarray, held_out: Manifest, held_out_rows: np.ndarray
) -> None:
    """``account_for_rows`` for the training manifest and the held-out manifest, which may be the same."""
    if manifest is held_out:
        account_for_rows(run, manifest, to_train_on=train_rows, held_out=held_out_rows)
    else:
        account_for_rows(run, manifest, to_train_on=train_rows)
        account_for_rows(run, held_out, held_out=held_out_rows)


def read_some(manifest: Manifest, rows: np.ndarray, count: int, read: Callable[[dict], T], check_stop) -> list[T]:
    """``read(row)`` for up to ``count`` rows, evenly spread; bad rows are skipped, since training reports them.

    Raises:
        UserError: none of the rows can be used.
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


class ManifestDataset:
    """Some rows of a manifest as samples and micro-batches: a ``BatchSource`` that stages subclass.

    Args:
        rows: (N,) row numbers in the manifest.
        seed: seed of the augmentation.
        training: whether rows are augmented, and a bad row is replaced by the next good one in the same slot. If not,
            rows are not augmented, and a bad row is left out.
        lengths: (N,) length of each sample, for batches of similar lengths; None: batches ignore lengths.
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
        """At least one sample as a batch: tensors, and ``n_targets``, the number of targets of the loss."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.row_numbers)

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        """The samples of ``rows``; under ``bad_rows``, where -> why rows cannot be used; under ``sample_rows``, the row
        whose slot each sample takes.

        If ``rows`` is empty, a batch of one row with ``n_targets`` 0. If no sample can be read, ``n_targets`` is 0 and
        there are no tensors.
        """
        bad: dict[str, str] = {}
        found = [(int(row), self._sample(int(row), epoch, bad)) for row in rows]
        found = [(row, sample) for row, sample in found if sample is not None]
        if found:
            sample_rows, samples = map(list, zip(*found, strict=True))
            return self.collate(samples) | {"bad_rows": bad, "sample_rows": sample_rows}
        if self.training and not bad and (filler := self._sample(0, epoch, bad)) is not None:
            return self.collate([filler]) | {"n_targets": 0, "bad_rows": bad}
        return {"n_targets": 0, "bad_rows": bad}

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
