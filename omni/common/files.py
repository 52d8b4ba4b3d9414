"""Files on disk: opened only if they are files, written whole or not at all, and sealed where a result depends on them.

Nothing here knows what a checkpoint is; everything that writes beside other people's files goes through here.
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from omni.common.errors import UserError

TEMPORARY_SUFFIX = ".omni-partial"  # like nobody else's, since leftovers are deleted
SEAL = "seal"  # the key of a sealed JSON file that has the digest of the others

# ---------------------------------------------------------------------------------------------------------------
# Reading


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading. A folder, pipe or device is an ``OSError`` at once: nothing is waited for."""
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
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged {what}: byte {error.start} is not UTF-8") from error


def parse_json(text: str) -> Any:
    """``json.loads`` whose every failure is a ``ValueError``, nesting too deep for the parser among them."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: str | Path, what: str = "file") -> dict:
    """A JSON object.

    Raises:
        UserError: the file cannot be read, or holds something else; one line.
    """
    try:
        value = parse_json(read_text(path, what))
    except ValueError as error:
        raise UserError(f"{path}: damaged {what}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged {what}: expected a JSON object, found {type(value).__name__}")
    return value


def file_stat(path: Path) -> dict:
    """Size and time of last change: a file that has kept both is taken to be the same file."""
    facts = path.stat()
    return {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def file_sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Writing


# The temporary file being written, so that a second Ctrl-C can remove it before the process ends at once.
temporary_in_progress: Path | None = None


def replace_file(path: Path, write: Callable) -> None:
    """Call ``write(file)`` on a temporary file beside ``path`` and move it into place, all or nothing.

    The temporary name is new, so no link that somebody put there is followed; its permissions are the umask's.
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
            error.filename = error.filename or str(path)  # a full disk does not say where it is
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
    """Clear what a kill in mid-write left behind. The caller holds the folder's lock."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        if stat.S_ISREG(path.lstat().st_mode):  # a folder or a link is nobody's temporary file
            path.unlink()


def write_json(path: Path, value: dict, indent: int | None = None) -> None:
    """Write ``value`` whole or not at all; with ``indent`` as people read it."""
    text = json.dumps(value) if indent is None else json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


# ---------------------------------------------------------------------------------------------------------------
# Folders that hold our files, and perhaps somebody else's


@dataclass(frozen=True)
class OwnFiles:
    """Which files in a folder are ours; everything else in it is somebody's, and stays."""

    is_own: Callable[[str], bool]  # of a name such as thinker/config.json; only a regular file can be one, not a link
    folders: frozenset[str]  # that lead to them: thinker

    def strangers(self, folder: Path, above: str = "") -> list[str]:
        """Names of what lies in ``folder``, at any depth, and is not ours."""
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
            last: the file that tells which are ours, deleted after all others.

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
    with contextlib.suppress(OSError, ValueError):
        return open_sealed_json(path)
    return None


def open_sealed_json(path: Path) -> dict:
    """
    Raises:
        OSError, ValueError: there is no such file, or it is not what ``write_sealed_json`` wrote.
    """
    with open_regular(path) as file:
        value = parse_json(file.read().decode("utf-8"))
    if not isinstance(value, dict) or value.pop(SEAL, None) != json_sha256(value):
        raise ValueError(f"{path.name} is not what was written")
    return value
