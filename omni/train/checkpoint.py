"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is an ordinary ``torch.save`` file, so ``torch.load(path, weights_only=True)`` opens it anywhere. It
carries its own SHA-256 in the zip archive's comment field (APPNOTE.TXT 4.3.16), the one place where a digest can
travel inside the file without changing what other readers see. Every load checks the digest first: torch itself
returns wrong tensors for a flipped bit without a word.

Saving never touches an existing file before its successor is complete on disk:
temporary file, fsync, rename, fsync of the folder, verification, and only then the deletion of older files.
"""

import contextlib
import hashlib
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from omni.common.errors import RunError, UserError
from omni.common.files import file_sha256, replace_file
from omni.common.media import quoted
from omni.train.progress import read_validated

FORMAT_VERSION = 2
DAMAGED_SUFFIX = ".damaged"

_TAG = b"sha256:"
_COMMENT_BYTES = len(_TAG) + 64
_BLOCK_BYTES = 8 << 20
_MAX_BUFFER_BYTES = 1 << 30  # of a model, beside its weights; positions of a context of a million tokens take half


ModuleType = TypeVar("ModuleType", bound=nn.Module)


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
        with open(path, "rb") as file:
            foreign = file.read(2) not in (b"PK", b"")  # as every zip archive begins
        raise DamagedCheckpoint("not a checkpoint" if foreign else "the checksum does not match")


def stated_digest(path: Path) -> bytes:
    """The digest that the file carries; ``verify`` tells whether it is true."""
    with open(path, "rb") as file:
        file.seek(-_COMMENT_BYTES, os.SEEK_END)
        return file.read()


# What torch's reader raises for a stream that somebody wrote otherwise. Not MemoryError, nor OSError: of these the file
# may be innocent.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, LookupError, TypeError, ValueError,
    AttributeError, ArithmeticError, AssertionError,
)  # fmt: skip


def load(path: Path) -> dict:
    """Read a verified checkpoint to CPU; plain data only, so no code in the file can run.

    Raises:
        DamagedCheckpoint: see ``verify``; or the file holds pickled objects other than tensors and plain data.
    """
    verify(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise DamagedCheckpoint("compressed, as torch.save never does: it may grow without bound")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpoint(f"refused by torch.load: {quoted(reason)}") from error
    if not isinstance(payload, dict) or "format" not in payload:
        raise DamagedCheckpoint("not a checkpoint of this project")
    if type(payload["format"]) is not int or payload["format"] != FORMAT_VERSION:
        found = quoted(payload["format"])
        expected = f"this version reads format {FORMAT_VERSION}"
        raise UserError(f"{path}: written in format {found}, {expected}. Use the version that wrote it, or train again")
    return payload


def step_files(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """The ``<prefix>_step_<N>.pt`` files of ``folder``, newest first by number: file times play no part."""
    pattern = re.compile(re.escape(prefix) + r"_step_(\d+)\.pt")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.glob(f"{prefix}_step_*.pt") if path.is_file()]
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
    for path in folder.glob(f"{prefix}_step_*.pt"):
        if not path.is_file():
            found = "a folder" if path.is_dir() else "a pipe or a link into nowhere"
            warn(f"{path}: expected a checkpoint, found {found}: not used")
    for _, path in step_files(folder, prefix):
        try:
            return load(path)
        except DamagedCheckpoint as error:
            path.rename(path.with_name(path.name + DAMAGED_SUFFIX))
            warn(f"{path}: {error}. Set aside as {path.name}{DAMAGED_SUFFIX}; trying the one before")
    others = [path for path in folder.glob(f"{prefix}_step_*.pt") if not path.is_file()]
    if others:  # a link into nowhere: there was a checkpoint, on a disk that is not there now
        raise RunError(f"{others[0]}: expected a checkpoint, found no file. Put it back, or move it away to start over")
    damaged = sorted(folder.glob(f"{prefix}_step_*.pt{DAMAGED_SUFFIX}"))
    if damaged:
        raise RunError(
            f"{folder}: every checkpoint is damaged ({', '.join(path.name for path in damaged)}). "
            "Restore one from a backup, or move these files away to start over"
        )
    return None


def load_stage(source: str | Path, stage: str, prefix: str, final: str) -> dict:
    """A stage's weights: of the file ``source``; or of the folder ``source`` its final file or, while it still trains,
    its newest step file.

    Returns:
        A dict with ``stage, config, step, metrics, files, path, model``, the last being a state dict on CPU.

    Raises:
        UserError: nothing there, damaged, or of another stage; the message names the file.
    """
    path = _checkpoint_in(Path(source), prefix, final)
    folder = path.parent
    try:
        payload = load(path)
    except DamagedCheckpoint as error:
        older = [other for _, other in step_files(folder, prefix) if other != path]
        raise UserError(f"{path}: {error}" + (f". Another is {older[0].name}" if older else "")) from error
    if payload.get("stage") != stage:
        found = f"{quoted(payload.get('stage'))}{'. Give a folder' if Path(source).is_file() else ''}"
        raise UserError(f"{path}: expected a checkpoint of stage {stage}, found {found}")
    with understood(path):
        if "phases" in payload:  # a step file: the last phase holds the model that the final file would hold
            phase = list(payload["phases"].values())[-1]
            mean = phase.get("average", phase["module"])  # a running mean is of the trained weights only
            if not mean or not mean.keys() <= phase["module"].keys():
                raise ValueError("the running mean does not fit the model")
            payload["model"] = phase["module"] | mean
            payload |= read_validated(folder, prefix, stated_digest(path))
        saved = _Saved.model_validate(payload)
        if any(tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in saved.model.values()):
            raise ValueError("weights that the file does not hold in full")
    _compare_files(folder, path, saved.files)
    return dict(saved) | {"path": path}


def _checkpoint_in(source: Path, prefix: str, final: str) -> Path:
    """The file that ``source`` is, or holds.

    Raises:
        UserError: there is none.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        found = "a pipe or a device" if source.exists() else "nothing"
        raise UserError(f"{source}: expected a folder with {final}, found {found}")
    path = source / final
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path}: expected a checkpoint, found a folder, a pipe or a link into nowhere")
    if path.exists():
        return path
    if not (steps := step_files(source, prefix)):
        raise UserError(f"{source}: expected {final} or {prefix}_step_<N>.pt, found neither. Train this stage first")
    return steps[0][1]


class _Saved(BaseModel):
    """What a reader needs of a checkpoint, which may have been written by another program."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    stage: str
    config: dict[str, Any]
    architecture: dict[str, Any]
    step: int
    metrics: dict[str, float]
    model: dict[str, Tensor]
    files: dict[str, str] | None = None


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """What cannot be made sense of in the block is the fault of the file ``path``, which another version has written.

    Raises:
        UserError: one line that names the file, the key and what was expected.
    """
    try:
        yield
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where, found = ".".join(str(part) for part in detail["loc"]), quoted(repr(detail["input"]))
        key = f'key "{quoted(where)}": ' if where else ""
        raise UserError(f"{path}: of another version: {key}{detail['msg']}, found {found}") from error
    except KeyError as error:
        raise UserError(f'{path}: of another version: key "{quoted(error.args[0])}" is missing') from error
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: of another version, or altered: {quoted(str(error).strip())}") from error


def not_sealed(path: Path) -> str:
    return f"damaged or exchanged: it is not the file that {path} was trained with. Put that one back"


def _compare_files(folder: Path, path: Path, files: dict[str, str] | None) -> None:
    """
    Raises:
        UserError: a file that the model needs, such as its tokenizer, is not the one that it was trained with. One that
            is missing is told by the reader that needs it.
    """
    for name, digest in (files or {}).items():
        try:
            same = file_sha256(folder / Path(name).name) == digest
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{folder / name}: cannot read it: {error.strerror}") from error
        if not same:
            raise UserError(f"{folder / name}: {not_sealed(path)}")


def load_weights(module: nn.Module, state_dict: dict, path: Path, assign: bool = False) -> None:
    """``module.load_state_dict``, strict.

    Raises:
        UserError: a weight is missing, extra or of another shape; the message names the file and the first one.
    """
    try:
        module.load_state_dict(state_dict, assign=assign)
    except RuntimeError as error:
        # torch names all that are missing in one line
        reasons = [reason for line in str(error).splitlines()[1:] for reason in line.strip().split('", "')]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise UserError(f"{path}: does not fit the model: {reasons[0]}{more}") from error


@contextlib.contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """A ``ValueError`` as soon as modules with more parameters than that were made: a number of layers may say 10^9."""
    made = 0

    def count(*_) -> None:
        nonlocal made
        made += 1
        if made > parameters:
            raise ValueError("sizes of a model with more weights than there are")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def build(
    make: Callable[[], ModuleType], weights: dict[str, Tensor], path: Path, sizes: Path | None = None
) -> ModuleType:
    """``make()`` with ``weights``, strict. What the sizes claim is compared with the weights first, on torch's "meta"
    device: a model that would not fit to them is given no memory.

    Args:
        path: the file of the weights; sizes: the file that ``make`` has its sizes from, if that is another one.

    Raises:
        UserError: a weight is missing, extra or of another shape, or the sizes are none of such a model.
    """
    with understood(sizes or path), torch.device("meta"), _at_most(4 * len(weights) + 64):
        shapes = make()
        # those that no file holds, such as the table of positions, are as large as the sizes claim
        claimed, held = (sum(tensor.nbytes for tensor in w) for w in (shapes.buffers(), weights.values()))
        if claimed > max(_MAX_BUFFER_BYTES, held):
            raise ValueError(f"sizes whose tables would take {claimed:.1e} bytes")
    load_weights(shapes, weights, path, assign=True)
    module = make()
    load_weights(module, weights, path)
    return module


# ---------------------------------------------------------------------------------------------------------------
# Keeping order


def prune(folder: Path, prefix: str, keep: int, best_step: int | None) -> None:
    """Delete step files but the ``keep`` newest and the best. Called only after a newer file was verified."""
    for step, path in step_files(folder, prefix)[keep:]:
        if step != best_step:
            path.unlink()
