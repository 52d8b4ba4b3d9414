"""JSON objects: one a line (JSONL), or the elements of an array."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omni.common.errors import BadRow, UserError
from omni.common.media import quoted
from omni.data.formats.base import Format, Found
from omni.data.records import Record, json_records, line_of, line_records

LINES = (".jsonl", ".ndjson")
OBJECT = r"\{\s*[\"}]"  # the beginning of one


def begins_with(head: bytes, pattern: str) -> bool:
    """Whether a file's first bytes, without white space, match: so that "[id],wav" is no array."""
    return bool(re.match(pattern.encode(), head.removeprefix(codecs.BOM_UTF8).lstrip()))


@dataclass
class JsonLines(Format):
    """``.jsonl`` and ``.ndjson`` files, and files of other names that begin with an object."""

    name = "jsonl"

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        return path.suffix.lower() in LINES or begins_with(head, r"\{" if path.suffix.lower() == ".json" else OBJECT)

    def remark(self, path: Path) -> str:
        if path.suffix.lower() != ".json":
            return ""
        return f"{path}: begins with an object, not with an array of them: read as JSONL, an object a line"

    def records(self, path: Path, chunks: Iterator[bytes], found: Found) -> Iterator[Record]:
        return found.all_bytes(line_records(path, chunks, quotes=None))

    def fields(self, text: str) -> dict:
        try:
            row = json.loads(text)
            if "\\ud" in text.lower():  # half of a surrogate pair is valid JSON, but not text
                json.dumps(row, ensure_ascii=False).encode()
        except RecursionError as error:
            raise BadRow("nested too deeply") from error
        except ValueError as error:
            raise BadRow(f"not valid JSON: {quoted(str(error).partition(';')[0])}") from error
        if not isinstance(row, dict):
            raise BadRow(f"expected a JSON object, found {quoted(text.strip())}")
        return row


@dataclass
class JsonArray(JsonLines):
    name = "json"

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        return path.suffix.lower() == ".json" or begins_with(head, r"\[\s*(\{|\]\s*$)")  # JSONL is asked first

    def remark(self, path: Path) -> str:
        return ""

    def records(self, path: Path, chunks: Iterator[bytes], found: Found) -> Iterator[Record]:
        return json_records(path, chunks)

    def unreadable(self, path: Path, record: Record, error: BadRow) -> None:
        if isinstance(error.__cause__, json.JSONDecodeError):  # the file is no array
            line = line_of(path, record.start)
            raise UserError(f"{path}: the element of the array at line {line}: {error}") from error
