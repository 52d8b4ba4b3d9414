"""CSV with a header, as Python's ``csv`` module reads it."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omni.common.errors import BadRow, UserError, reading_row
from omni.common.media import quoted
from omni.data.formats.base import Format, Found
from omni.data.records import MAX_ROW_BYTES, Record, decode, line_records


@dataclass
class Csv(Format):
    name = "csv"
    rows_over_lines = True

    header: list[str] = field(default_factory=list)
    strip: bool = False  # whether blanks around cells are removed
    cr_ends: bool = True  # whether a single CR ends a line

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        return True  # any file that no other format recognises

    def records(self, path: Path, chunks: Iterator[bytes], found: Found) -> Iterator[Record]:
        return found.all_bytes(line_records(path, chunks, quotes=True))

    def read_header(self, path: Path, records: Iterator[Record], columns: tuple[str, ...]) -> None:
        """Read the names of the columns, and whether blanks surround them, as in ``wav, text``."""
        record = next(records, None)
        data = record.data if record else b""
        try:
            if data is None:
                raise UserError(f"{path}: expected a header, found a first line of more than {MAX_ROW_BYTES >> 20} MiB")
            with reading_row():
                cells = next(csv.reader([data.decode("utf-8")]), [])
        except BadRow as error:
            raise UserError(
                f"{path}: expected a UTF-8 CSV file with a header, found in its first line: {error}"
            ) from error
        self.header = [name.strip() for name in cells]
        if missing := [name for name in columns if name not in self.header]:
            raise UserError(
                f"{path}: expected a header with the columns {','.join(columns)}, "
                f'found "{quoted(",".join(self.header))}" ({missing[0]} is missing)'
            )
        self.strip, self.cr_ends = self.header != cells, data.endswith(b"\r")

    def fields(self, text: str) -> dict:
        over_lines = "\n" in text.rstrip("\r\n") or "\r" in text.rstrip("\r\n")
        try:
            (cells,) = csv.reader([text], strict=over_lines)
        except csv.Error as error:
            if over_lines and "expected after" in str(error):
                raise BadRow("a quotation mark stands inside an unquoted field, so that rows run together") from error
            raise BadRow(str(error)) from error
        if len(cells) != len(self.header):
            expected = f"{len(self.header)} columns ({quoted(', '.join(self.header))})"
            raise BadRow(f"expected {expected}, found {len(cells)}")
        return dict(zip(self.header, cells, strict=True))

    def clean(self, row: dict) -> dict:
        return {name: cell.strip() for name, cell in row.items()} if self.strip else row

    def check(self, data: bytes, following: Callable[[], Record | None]) -> None:
        """A single CR, in a file whose header ends otherwise, ends a row only if a whole row follows."""
        if not self.cr_ends and data.endswith(b"\r") and (record := following()):
            try:
                self.fields(decode(record.data))
            except BadRow:
                raise BadRow("a single carriage return stands inside it") from None
