"""Files: opened only if they are regular, written whole or not at all, and sealed where a result depends on them."""

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from omni.common.errors import UserError

TEMPORARY_SUFFIX = ".omni-partial"  # no other program's, since leftovers are deleted
SEAL = "seal"  # the key of a sealed JSON file whose value is the digest of the other keys

# ---------------------------------------------------------------------------------------------------------------
# Reading


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. A folder, pipe or device raises ``OSError`` without blocking."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(None, "expected a file, found a pipe or device", str(path))
    return file


def read_text(path: str | Path, what: str = "file") -> str:
    """
    Args:
        what: name of the file's kind in the message, for example "tokenizer".

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged {what}: byte {error.start} is not UTF-8") from error


def parse_json(text: str) -> Any:
    """``json.loads`` that raises ``ValueError`` for every failure, also for nesting too deep for the parser."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: str | Path, what: str = "file") -> dict:
    """A JSON object.

    Raises:
        UserError: the file cannot be read, or contains something else.
    """
    try:
        value = parse_json(read_text(path, what))
    except ValueError as error:
        raise UserError(f"{path}: damaged {what}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged {what}: expected a JSON object, found {type(value).__name__}")
    return value


def file_stat(path: Path) -> dict:
    """Size and mtime: a file with the same values counts as unchanged."""
    facts = path.stat()
    return {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def files_stat(paths: Iterable[Path]) -> dict:
    """One digest of names, sizes and times: files with the same values count as unchanged."""
    facts = [(str(path), *file_stat(path).values()) for path in paths]
    return {"files": len(facts), "sha256": json_sha256(facts)}


def file_sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Writing


# The temporary file being written, so that a second Ctrl-C can remove it before the process ends at once.
temporary_in_progress: Path | None = None


def replace_file(path: Path, write: Callable) -> None:
    """Call ``write(file)`` on a temporary file beside ``path`` and move it into place, all or nothing.

    The temporary file is always created, so no link is followed; its permissions are the umask's.
    """
    global temporary_in_progress
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    with open(temporary, "xb") as file:
        temporary_in_progress = temporary
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            error.filename = error.filename or str(path)  # the error of a full disk has no filename
            raise
        finally:
            temporary.unlink(missing_ok=True)
            temporary_in_progress = None
    fsync(path.parent)  # the rename itself must survive a power cut


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary(folder: Path) -> None:
    """Delete the temporary files of a killed writer. The caller holds the folder's lock."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        if stat.S_ISREG(path.lstat().st_mode):  # a folder or a link is no temporary file of ours
            path.unlink()


def write_json(path: Path, value: dict, indent: int | None = None) -> None:
    """Write ``value`` whole or not at all; ``indent`` makes it readable."""
    text = json.dumps(value) if indent is None else json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


# ---------------------------------------------------------------------------------------------------------------
# Folders with our files, and perhaps the user's


@dataclass(frozen=True)
class OwnFiles:
    """Which files in a folder are ours; all others are the user's and stay."""

    is_own: Callable[[str], bool]  # a name such as thinker/config.json -> whether a regular file of this name is ours
    folders: frozenset[str]  # subfolders with our files, such as thinker

    def strangers(self, folder: Path, above: str = "") -> list[str]:
        """Names of everything in ``folder``, at any depth, that is not ours."""
        found = []
        for path in sorted(folder.iterdir()):
            name, mode = above + path.name, path.lstat().st_mode
            if stat.S_ISDIR(mode) and name in self.folders:
                found += self.strangers(path, f"{name}/")
            elif not stat.S_ISREG(mode) or not self.is_own(name):
                found.append(name)
        return found

    def remove(self, folder: Path, above: str = "", last: str = "") -> bool:
        """Delete our files in ``folder``, and every folder that is then empty.

        Args:
            last: the file that tells which files are ours, deleted after all others.

        Returns:
            whether ``folder`` is gone.
        """
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name)):
            name, mode = above + path.name, path.lstat().st_mode
            if stat.S_ISDIR(mode) and name in self.folders:
                self.remove(path, f"{name}/")
            elif stat.S_ISREG(mode) and self.is_own(name):
                path.unlink()
        try:
            folder.rmdir()
        except OSError:  # something is left in it
            return False
        return True


# ---------------------------------------------------------------------------------------------------------------
# Sealed JSON: files that contain their own digest


def json_sha256(value: dict) -> str:
    """SHA-256 of ``value``, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed_json(path: Path, value: dict) -> None:
    """Write ``value`` whole or not at all, with its own digest under the key "seal"."""
    value = json.loads(json.dumps(value))  # as it will be read: keys are strings, tuples are lists
    write_json(path, value | {SEAL: json_sha256(value)})


def read_sealed_json(path: Path) -> dict | None:
    """The value that ``write_sealed_json`` wrote; None if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return open_sealed_json(path)
    return None


def open_sealed_json(path: Path) -> dict:
    """
    Raises:
        OSError, ValueError: the file is missing, or is not what ``write_sealed_json`` wrote.
    """
    with open_regular(path) as file:
        value = parse_json(file.read().decode("utf-8"))
    if not isinstance(value, dict) or value.pop(SEAL, None) != json_sha256(value):
        raise ValueError(f"{path.name} is not what was written")
    return value
