"""What every cache on disk needs: is a file still the one that was read, and JSON written whole or not at all."""

import contextlib
import hashlib
import json
from pathlib import Path

from omni.checkpoint import replace_file

SEAL = "seal"  # the key of a sealed JSON file that has the digest of the others


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


# ---------------------------------------------------------------------------------------------------------------
# Sealed JSON: a cache that knows whether it is what was written


def json_sha256(value: dict) -> str:
    """Of what ``value`` says, however it is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed_json(path: Path, value: dict) -> None:
    """Write ``value`` whole or not at all, with its own digest under the key "seal"."""
    value = json.loads(json.dumps(value))  # as it will be read: keys are strings, tuples are lists
    write_json(path, value | {SEAL: json_sha256(value)})


def read_sealed_json(path: Path) -> dict | None:
    """What ``write_sealed_json`` wrote; None if there is no such file, or it differs: the caller makes it anew."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and value.pop(SEAL, None) == json_sha256(value):
            return value
    return None
