"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is an ordinary ``torch.save`` file, so ``torch.load(path, weights_only=True)`` opens it anywhere. It
carries its own SHA-256 in the zip archive's comment field (APPNOTE.TXT 4.3.16), the one place where a digest can
travel inside the file without changing what other readers see. Every load checks the digest first: torch itself
returns wrong tensors for a flipped bit without a word.

Saving never touches an existing file before its successor is complete on disk:
temporary file, fsync, rename, fsync of the folder, verification, and only then the deletion of older files.
"""

import hashlib
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn

from omni.errors import RunError, UserError
from omni.files import file_sha256, replace_file

FORMAT_VERSION = 1
DAMAGED_SUFFIX = ".damaged"

_TAG = b"sha256:"
_COMMENT_BYTES = len(_TAG) + 64
_BLOCK_BYTES = 8 << 20


class DamagedCheckpoint(Exception):
    """The file is not what was saved: truncated, altered, or holding more than plain data."""


# ---------------------------------------------------------------------------------------------------------------
# Writing


class _SealingFile:
    """Passes bytes through to ``file`` while hashing them, and ends the archive with its digest as the comment.

    The last two bytes of a zip archive without comment are the comment's length, 0; they are held back until
    ``seal`` writes the true length. An ``OSError`` (disk full) is kept for ``seal`` to raise: thrown through torch's
    C++ writer it would come out as another error, or end the process.
    """

    def __init__(self, file) -> None:
        self.file, self.digest, self.tail, self.error = file, hashlib.sha256(), b"", None

    def write(self, data) -> int:
        if self.error is None:
            view = memoryview(self.tail + data if len(data) < 2 else data)
            try:
                if len(data) >= 2:
                    self._put(self.tail)
                self._put(view[:-2])
                self.tail = bytes(view[-2:])
            except OSError as error:
                self.error = error
        return len(data)

    def _put(self, data) -> None:
        self.digest.update(data)
        self.file.write(data)

    def flush(self) -> None:
        """Part of the file protocol that ``torch.save`` asks for; the bytes are flushed by ``seal``."""

    def seal(self) -> None:
        if self.error is not None:
            raise self.error
        self._put(struct.pack("<H", _COMMENT_BYTES))
        self.file.write(_TAG + self.digest.hexdigest().encode())
        self.file.flush()
        os.fsync(self.file.fileno())


def save(path: Path, payload: dict) -> None:
    """Write ``payload`` (tensors, numbers, strings, lists, dicts) to ``path`` atomically, sealed and verified.

    Raises:
        RunError: the disk is full or the write failed; the previous file stands.
    """

    def write(file) -> None:
        sealing = _SealingFile(file)
        torch.save(payload, sealing)
        sealing.seal()

    try:
        replace_file(path, write)
        verify(path)
    except OSError as error:
        remedy = "Earlier files are intact; with room on the disk, the same command goes on"
        raise RunError(f"{path}: could not save the checkpoint: {error.strerror}. {remedy}") from error
    except DamagedCheckpoint as error:
        raise RunError(f"{path}: read back otherwise than written ({error}): check the disk") from error


# ---------------------------------------------------------------------------------------------------------------
# Reading


def verify(path: Path) -> None:
    """Compare the file with its own digest.

    Raises:
        DamagedCheckpoint: any byte differs from what was saved, or is missing.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        remaining = os.fstat(file.fileno()).st_size - _COMMENT_BYTES
        while remaining > 0:
            block = file.read(min(_BLOCK_BYTES, remaining))
            digest.update(block)
            remaining -= len(block)
        comment = file.read()
    if comment != _TAG + digest.hexdigest().encode():
        raise DamagedCheckpoint("the checksum does not match")


def load(path: Path) -> dict:
    """Read a verified checkpoint to CPU; plain data only, so no code in the file can run.

    Raises:
        DamagedCheckpoint: see ``verify``; or the file holds pickled objects other than tensors and plain data.
    """
    verify(path)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedCheckpoint(f"refused by torch.load: {str(error).splitlines()[0]}") from error
    if not isinstance(payload, dict) or "format" not in payload:
        raise DamagedCheckpoint("not a checkpoint of this project")
    if payload["format"] != FORMAT_VERSION:
        raise UserError(f"{path}: written in format {payload['format']}, this version reads format {FORMAT_VERSION}")
    return payload


def step_files(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """The ``<prefix>_step_<N>.pt`` files of ``folder``, newest first by number: file times play no part."""
    pattern = re.compile(re.escape(prefix) + r"_step_(\d+)\.pt")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.glob(f"{prefix}_step_*.pt")]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def step_path(folder: Path, prefix: str, step: int) -> Path:
    return folder / f"{prefix}_step_{step}.pt"


def newest(folder: Path, prefix: str, warn: Callable[[str], None]) -> dict | None:
    """The newest step file that loads; damaged ones are renamed to ``*.damaged`` with a warning.

    Returns:
        The payload, or None in a folder that never held a step file.

    Raises:
        RunError: there were checkpoints, and none of them loads. Training never starts over by itself.
    """
    for _, path in step_files(folder, prefix):
        try:
            return load(path)
        except DamagedCheckpoint as error:
            path.rename(path.with_name(path.name + DAMAGED_SUFFIX))
            warn(f"{path}: {error}. Set aside as {path.name}{DAMAGED_SUFFIX}; trying the one before")
    damaged = sorted(folder.glob(f"{prefix}_step_*.pt{DAMAGED_SUFFIX}"))
    if damaged:
        raise RunError(
            f"{folder}: every checkpoint is damaged ({', '.join(path.name for path in damaged)}). "
            "Restore one from a backup, or move these files away to start over"
        )
    return None


def load_stage(folder: str | Path, stage: str, prefix: str, final: str) -> dict:
    """A stage's weights: its final file, or, while it still trains, its newest step file.

    Returns:
        A dict with ``stage, config, step, metrics, model``, the last being a state dict on CPU.

    Raises:
        UserError: nothing there, damaged, or of another stage; the message names the file.
    """
    folder = Path(folder)
    steps = step_files(folder, prefix)
    path = folder / final
    if not path.exists():
        if not steps:
            raise UserError(
                f"{folder}: expected {final} or {prefix}_step_<N>.pt, found neither. Train this stage first"
            )
        path = steps[0][1]
    try:
        payload = load(path)
    except DamagedCheckpoint as error:
        raise UserError(f"{path}: {error}") from error
    if payload["stage"] != stage:
        raise UserError(f"{path}: expected a checkpoint of stage {stage}, found {payload['stage']}")
    _compare_files(folder, path, payload)
    if "phases" in payload:  # a step file: the last phase holds the model that the final file would hold
        payload["model"] = list(payload["phases"].values())[-1]["module"]
    return {key: payload[key] for key in ("stage", "config", "step", "metrics", "model")}


def not_sealed(path: Path) -> str:
    return f"damaged or exchanged: it is not the file that {path} was trained with. Put that one back"


def _compare_files(folder: Path, path: Path, payload: dict) -> None:
    """
    Raises:
        UserError: a file that the model needs, such as its tokenizer, is not the one that it was trained with. One that
            is missing is told by the reader that needs it.
    """
    if "files" not in payload and (folder / "tokenizer.json").exists():
        _tell_once(f"{path}: of an earlier version, without the checksum of tokenizer.json, which is not compared")
    for name, digest in payload.get("files", {}).items():
        try:
            same = file_sha256(folder / Path(name).name) == digest
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{folder / name}: cannot read it: {error.strerror}") from error
        if not same:
            raise UserError(f"{folder / name}: {not_sealed(path)}")


@cache
def _tell_once(line: str) -> None:
    print(line, file=sys.stderr)


def load_weights(module: nn.Module, state_dict: dict, path: Path) -> None:
    """``module.load_state_dict``, strict.

    Raises:
        UserError: a weight is missing, extra or of another shape; the message names the file and the first one.
    """
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise UserError(f"{path}: does not fit the model: {reasons[0]}{more}") from error


# ---------------------------------------------------------------------------------------------------------------
# Keeping order


def prune(folder: Path, prefix: str, keep: int, best_step: int | None) -> None:
    """Delete step files but the ``keep`` newest and the best. Called only after a newer file was verified."""
    for step, path in step_files(folder, prefix)[keep:]:
        if step != best_step:
            path.unlink()
