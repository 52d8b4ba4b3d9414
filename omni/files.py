"""What every cache on disk needs: is a file still the one that was read, and JSON written whole or not at all."""

import hashlib
import json
from pathlib import Path

from omni.checkpoint import replace_file


def file_stat(path: Path) -> dict:
    """Size and time of last change: a file that has kept both is taken to be the same file."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: dict) -> None:
    replace_file(path, lambda file: file.write(json.dumps(value).encode()))


def index_is_current(path: Path, folder: Path) -> bool:
    """Whether the index in ``folder`` (its ``meta.json`` has ``stat`` and ``sha256``) is of ``path`` as it is."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (FileNotFoundError, ValueError):
        return False
    if meta["stat"] == file_stat(path):
        return True
    if meta["stat"]["size"] == path.stat().st_size and meta["sha256"] == file_sha256(path):
        write_json(folder / "meta.json", meta | {"stat": file_stat(path)})  # copied: the same bytes at another time
        return True
    return False
