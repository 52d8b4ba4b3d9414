"""Tables: CSV with a header, as Python's ``csv`` module reads it, and its relatives with other delimiters."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from omni.common.errors import BadRow, UserError, reading_row
from omni.common.media import quoted
from omni.data.formats.base import Format, Found
from omni.data.formats.columns import NAMES, sources
from omni.data.records import MAX_ROW_BYTES, Record, decode, line_records

_DELIMITERS = (",", "\t", ";", "|")
_UNQUOTED = ("\t", "|")  # tables with these delimiters keep their quotation marks: Common Voice, LJSpeech


@dataclass
class Csv(Format):
    """With a header. A file whose header has a known name between tabs, semicolons or bars has that delimiter; between
    tabs and bars, a quotation mark is a character like others."""

    name = "csv"
    rows_over_lines = True

    header: list[str] = field(default_factory=list)
    strip: bool = False  # whether blanks around cells are removed
    cr_ends: bool = True  # whether a single CR ends a line
    delimiter: str = ","

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        return True  # any file that no other format recognises

    @classmethod
    def of(cls, path: Path, head: bytes) -> Self:
        line = first_line(head)
        known = (mark for mark in _DELIMITERS if NAMES & {name.strip(' "') for name in line.split(mark)})
        fallback = "\t" if path.suffix.lower() == ".tsv" else ","
        return cls(delimiter=next((mark for mark in known if mark in line), fallback))

    def records(self, path: Path, chunks: Iterator[bytes], found: Found) -> Iterator[Record]:
        quotes = None if self.delimiter in _UNQUOTED else self.delimiter
        return found.all_bytes(line_records(path, chunks, quotes=quotes))

    def read_header(self, path: Path, records: Iterator[Record], columns: tuple[str, ...]) -> None:
        """Read the names of the columns, and whether blanks surround them, as in ``wav, text``."""
        record = next(records, None)
        data = record.data if record else b""
        try:
            if data is None:
                raise UserError(f"{path}: expected a header, found a first line of more than {MAX_ROW_BYTES >> 20} MiB")
            with reading_row():
                cells = next(self._reader(data.decode("utf-8")), [])
        except BadRow as error:
            raise UserError(
                f"{path}: expected a UTF-8 CSV file with a header, found in its first line: {error}"
            ) from error
        self.header = [name.strip() for name in cells]
        self.strip, self.cr_ends = self.header != cells, data.endswith(b"\r")
        named = list(self.header)
        for ours, theirs in sources(self.header, columns).items():
            self.header[self.header.index(theirs)] = ours
        if twice := [name for name in set(columns) if self.header.count(name) > 1]:
            raise UserError(f"{path}: expected each column once, found {twice[0]} twice")
        if missing := [name for name in columns if name not in self.header]:
            near = next((f'; "{quoted(name)}" has capitals' for name in named if name.lower() == missing[0]), "")
            raise UserError(
                f"{path}: expected a header with the columns {','.join(columns)}, "
                f'found "{quoted(self.delimiter.join(named))}" ({missing[0]} is missing{near})'
            )

    def fields(self, text: str) -> dict:
        over_lines = "\n" in text.rstrip("\r\n") or "\r" in text.rstrip("\r\n")
        try:
            (cells,) = self._reader(text, strict=over_lines)
        except csv.Error as error:
            if over_lines and "expected after" in str(error):
                raise BadRow("a quotation mark stands inside an unquoted field, so that rows run together") from error
            raise BadRow(str(error)) from error
        if len(cells) != len(self.header):
            expected = f"{len(self.header)} columns ({quoted(', '.join(self.header))})"
            raise BadRow(f"expected {expected}, found {len(cells)}")
        return dict(zip(self.header, cells, strict=True))

    def _reader(self, line: str, strict: bool = False) -> Iterator[list[str]]:
        quoting = csv.QUOTE_NONE if self.delimiter in _UNQUOTED else csv.QUOTE_MINIMAL
        return csv.reader([line], delimiter=self.delimiter, quoting=quoting, strict=strict)

    def clean(self, row: dict) -> dict:
        return {name: cell.strip() for name, cell in row.items()} if self.strip else row

    def check(self, data: bytes, following: Callable[[], Record | None]) -> None:
        """A single CR, in a file whose header ends otherwise, ends a row only if a whole row follows."""
        if not self.cr_ends and data.endswith(b"\r") and (record := following()):
            try:
                self.fields(decode(record.data))
            except BadRow:
                raise BadRow("a single carriage return stands inside it") from None


@dataclass
class Lists(Csv):
    """``name|text`` without a header: LJSpeech's ``metadata.csv`` (name, text, text with numbers as words), and the
    lists of VITS and its successors (name, speaker, text)."""

    name = "list"

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        cells = first_line(head).split("|")
        return 2 <= len(cells) <= 4 and "," not in cells[0] and not NAMES & {cell.strip() for cell in cells}

    @classmethod
    def of(cls, path: Path, head: bytes) -> Self:
        rows = [line.split("|") for line in head.decode("utf-8", "replace").splitlines()[:-1]] or [
            first_line(head).split("|")
        ]
        columns = max(len(row) for row in rows)
        if columns == 2:
            header = ["wav", "text"]
        elif all(len(row) > 2 and row[1].strip() and " " not in row[1].strip() for row in rows):
            header = ["wav", "speaker", "text", "language"][:columns]
        else:
            header = ["wav", "written", "text", "remark"][:columns]
        return cls(header=header, delimiter="|", strip=True)

    def read_header(self, path: Path, records: Iterator[Record], columns: tuple[str, ...]) -> None:
        if missing := [name for name in columns if name not in self.header]:
            raise UserError(
                f"{path}: lines of {len(self.header)} cells between bars, without a header: read as "
                f"{'|'.join(self.header)}, which lacks {missing[0]}. Write a header, such as {'|'.join(columns)}"
            )


def first_line(head: bytes) -> str:
    """The first line of a file that begins with ``head``, without its byte-order mark."""
    return next(iter(head.decode("utf-8-sig", "replace").splitlines()), "")
