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
