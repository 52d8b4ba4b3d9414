"""Formats of files with rows, one class each. Add a new one to ``FORMATS`` before ``Csv``, which accepts any file."""

from pathlib import Path

from omni.data.formats.base import Format
from omni.data.formats.csv_rows import Csv, Lists
from omni.data.formats.folders import FilesBesideTexts, Kaldi
from omni.data.formats.gathered import JsonObject, Parquet, TarShard
from omni.data.formats.json_rows import JsonArray, JsonLines
from omni.data.formats.text_lines import TextLines

OF_FILES = (TextLines, Parquet, TarShard, JsonObject, JsonLines, JsonArray, Lists, Csv)
OF_FOLDERS = (Kaldi, FilesBesideTexts)
FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (*OF_FILES, *OF_FOLDERS)}


def format_of(path: Path, head: bytes) -> Format | None:
    """The first format that recognises a file or a folder, by its name and its first bytes."""
    kinds = OF_FOLDERS if path.is_dir() else OF_FILES
    return next((kind.of(path, head) for kind in kinds if kind.recognises(path, head)), None)
