"""The base class of formats, which find the rows of a file and read one of them.

A new format is a subclass of ``Format`` in the table ``omni.data.formats.FORMATS``. Its fields are the values that
reading a row needs beside the row's bytes, such as a header; the index stores them as JSON.
"""

import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np

from omni.common.errors import BadRow, UserError, reading_row
from omni.common.media import quoted
from omni.data.formats.columns import MEDIA_COLUMNS, NO_TEXT, sources, with_our_names
from omni.data.records import Record, decode

_CHUNK_BYTES = 4 << 20
_ROWS_AT_ONCE = 10_000
_FIRST_ROWS = 100  # one of them must be usable, or the file is refused at once


class Rows(NamedTuple):
    """The N rows of a file."""

    spans: np.ndarray  # (N, 2) uint64, the first byte of each row and the byte after its last
    keys: np.ndarray  # (N,) uint32, CRC-32 of the key column
    summary: str  # number of rows and of other lines, for the log
    numbers: np.ndarray | None = None  # (N,) the rows' numbers in messages; None: from 1 on
    end: int | None = None  # the byte after the last row, where rows follow each other without a gap


@dataclass
class Format:
    """How the rows of a file are found and read. A subclass defines ``name``, ``recognises``, ``records`` and
    ``fields``, or ``index`` and ``read`` instead of the last two."""

    name: ClassVar[str]
    version: ClassVar[int] = 0  # raise it if the same file gives other rows
    rows_over_lines: ClassVar[bool] = False  # whether the log counts rows of several lines

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        """Whether a file of this name, which begins with ``head``, has this format; ``head`` is empty for a folder."""
        raise NotImplementedError

    @classmethod
    def of(cls, path: Path, head: bytes) -> Self:
        """The format with what the beginning of a file tells about its notation."""
        return cls()

    def remark(self, path: Path) -> str:
        """A log line if the choice of this format may surprise, else ""."""
        return ""

    @staticmethod
    def chunks(path: Path) -> Iterator[bytes]:
        """The file in pieces, from which ``index`` makes rows."""
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def records(self, path: Path, chunks: Iterator[bytes], found: "Found") -> Iterator[Record]:
        """The rows in the order of the file, blank ones among them.

        Raises:
            UserError: the file as a whole is not of this format.
        """
        raise NotImplementedError

    def fields(self, text: str) -> dict:
        """One row's text as a dictionary.

        Raises:
            BadRow: the text is not a row.
        """
        raise NotImplementedError

    def read_header(self, path: Path, records: Iterator[Record], columns: tuple[str, ...]) -> None:
        """Take the header, if there is one, out of ``records``."""

    def clean(self, row: dict) -> dict:
        """The fields of a row without additions of the notation, such as blanks around cells."""
        return row

    def unreadable(self, path: Path, record: Record, error: BadRow) -> None:
        """Called for a row that the index cannot read; an exception refuses the file."""

    def check(self, data: bytes, following: Callable[[], Record | None]) -> None:
        """Check that a row that could be read is complete.

        Args:
            following: gives the next row, None if no row begins at the row's end.

        Raises:
            BadRow: the row is a piece of one.
        """

    def read(self, data: bytes | None, columns: list[str] | tuple[str, ...]) -> dict:
        """
        Args:
            columns: columns that must contain text.

        Raises:
            BadRow: not a row of this format, or one of ``columns`` is absent or empty.
        """
        row = with_our_names(self.clean(self.fields(decode(data))), columns)
        for column in columns:
            value = row.get(column)
            if not isinstance(value, str):
                kind = "a file's name" if column in MEDIA_COLUMNS else "text"
                found = json.dumps(value)
                if column not in row:
                    found = 'none beside "{}"'.format('", "'.join(row)) if row else "an empty row"
                raise BadRow(f"expected {kind} in {self._name(row, column)}, found {quoted(found)}")
            if not value.strip():
                raise BadRow(row.get(NO_TEXT) or f"{self._name(row, column)} is empty")
        return row

    @staticmethod
    def _name(row: dict, column: str) -> str:
        """A column as messages call it: with the file's own name for it, if that is another."""
        own = sources([name for name in row if name != column], [column]).get(column)
        return f'"{column}" (the column "{own}")' if own and row[own] == row.get(column) else f'"{column}"'

    def index(self, path: Path, chunks: Iterator[bytes], columns: tuple[str, ...], key: str) -> Rows:
        """Find the rows of a file in one pass.

        Raises:
            UserError: the file as a whole is not of this format, or has no row that can be used.
        """
        found = Found()
        records = found.without_blanks(self.records(path, chunks, found))
        self.read_header(path, records, columns)
        spans, keys = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.uint32)]
        while batch := list(itertools.islice(records, _ROWS_AT_ONCE)):
            if len(keys) == 1:
                self._check_first_rows(path, batch[:_FIRST_ROWS], columns)
            spans.append(np.array([(record.start, record.end) for record in batch], np.uint64))
            keys.append(np.array([self._key(path, record, key) for record in batch], np.uint32))
        if len(keys) == 1:
            raise UserError(f"{path}: expected rows with {' and '.join(columns)}, found none")
        summary = f"{sum(map(len, keys)):,} rows{found.others(self.rows_over_lines)}"
        return Rows(np.concatenate(spans), np.concatenate(keys), summary, end=found.end)

    def _check_first_rows(self, path: Path, records: list[Record], columns: tuple[str, ...]) -> None:
        reasons = []
        for record in records:
            try:
                with reading_row():
                    self.read(record.data, columns)
                return
            except BadRow as error:
                reasons.append(error)
        others = f". Nor can one of the first {len(records)} rows be used" if len(records) > 1 else ""
        raise UserError(f"{path}: row 1: {reasons[0]}{others}")

    def _key(self, path: Path, record: Record, key: str) -> int:
        try:
            with reading_row():
                value = with_our_names(self.fields(decode(record.data)), (key,)).get(key)
                if value:
                    return zlib.crc32(str(value).encode())
        except BadRow as error:  # reading the row will report why
            self.unreadable(path, record, error)
        return zlib.crc32(record.data or str(record.start).encode())  # without a key, the content decides


class Found:
    """Counts of the records of a file: blank ones, and those of several lines."""

    def __init__(self) -> None:
        self.end: int | None = None  # end of the last record
        self.records = self.blank = self.of_lines = self.longest = self.longest_lines = 0

    def all_bytes(self, records: Iterator[Record]) -> Iterator[Record]:
        """``records``, between which there must be no byte of the file."""
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

    def others(self, over_lines: bool) -> str:
        text = f", {self.blank:,} blank lines" if self.blank else ""
        if self.of_lines and over_lines:
            text += f"; {self.of_lines:,} rows take several lines, row {self.longest - 1} "
            text += f"the most, {self.longest_lines:,}"
        return text
