"""Formats of files with rows, one class each. Add a new one to ``FORMATS`` before ``Csv``, which accepts any file."""

from pathlib import Path

from omni.data.formats.base import Format
from omni.data.formats.csv_rows import Csv
from omni.data.formats.json_rows import JsonArray, JsonLines
from omni.data.formats.text_lines import TextLines

FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (TextLines, JsonLines, JsonArray, Csv)}


def format_of(path: Path, head: bytes) -> type[Format]:
    """The first format that recognises a file by its name and its first bytes."""
    return next(kind for kind in FORMATS.values() if kind.recognises(path, head))
