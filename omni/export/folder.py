"""The folder of an export: its files, their digests, and its replacement as a whole."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from omni.common.errors import RunError, UserError
from omni.common.files import OwnFiles, file_sha256, fsync, open_regular, parse_json
from omni.common.lock import FolderLock
from omni.common.media import quoted

FORMAT = 2
WEIGHTS, CONFIG, INFO, TOKENIZER = "model.safetensors", "config.json", "model_info.json", "tokenizer.json"
PROGRAM = "model.pt2"
PARTIAL = ".{name}.omni-partial"  # the folder of an unfinished export, beside its target
REPLACED = ".{name}.omni-replaced"  # the earlier export, until the new one is in its place
LOCK = ".lock"  # of ``FolderLock``, in the first of these
SUBFOLDERS = ("thinker", "vision_encoder", "audio_encoder", "vocoder")  # parts in the formats of other tools
FILES = (  # all files of an export, in its folder and its sub-folders
    WEIGHTS, CONFIG, INFO, TOKENIZER, PROGRAM, "README.md",
    "tokenizer_config.json", "generation_config.json", "preprocessor_config.json",
)  # fmt: skip


def finite(value):
    """``value`` with None for each float that is not finite: JSON has no nan."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def info_sha256(info: dict) -> str:
    """Digest of model_info.json without its own digest, independent of its layout."""
    text = json.dumps({key: value for key, value in finite(info).items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def new_folder(target: Path, replace: bool) -> Iterator[Path]:
    """Yield a folder to fill, which becomes ``target`` as a whole when the block ends without an error.

    Args:
        target: does not exist or is empty; or, with ``replace``, holds an earlier export and nothing else, which is
            replaced.

    Raises:
        UserError: ``target`` holds something else, cannot be written, or another process is exporting to it.
        RunError: the disk is full.
    """
    target = Path(os.path.realpath(target))  # fills the folder behind a link
    partial, replaced = (target.with_name(name.format(name=target.name)) for name in (PARTIAL, REPLACED))
    check_target(target, replace)
    _refuse_strangers(partial, UNFINISHED)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(partial)
    except OSError as error:
        raise UserError(f"--output_dir {target}: cannot write there: {error.strerror}") from error
    try:
        with _one_line(target):
            _restore(replaced, target)
            check_target(target, replace)
            _remove_replaced(replaced)
            for leftover in partial.iterdir():  # of an export that was killed
                if leftover.is_dir():
                    UNFINISHED.remove(leftover, f"{leftover.name}/")
                elif leftover != lock.path:
                    leftover.unlink()
            yield partial
            for path in (*sorted(partial.rglob("*")), partial):
                fsync(path)
            check_target(target, replace)  # again, as the export took a while
            lock.release()
            if target.exists() and any(target.iterdir()):
                target.rename(replaced)
            os.replace(partial, target)  # takes the place of an empty folder, too
            fsync(target.parent)
    except BaseException:
        _restore(replaced, target)
        if partial.is_dir():
            UNFINISHED.remove(partial)
        raise
    finally:
        lock.file.close()
    _remove_replaced(replaced)


def _restore(replaced: Path, target: Path) -> None:
    """Put the earlier export back if the new one has not taken its place."""
    if not target.exists() and replaced.is_dir() and is_export(replaced):
        replaced.rename(target)


def _remove_replaced(replaced: Path) -> None:
    """Delete the earlier export, or its remains after a kill.

    Raises:
        UserError: ``replaced`` holds something else.
    """
    if not os.path.lexists(replaced):
        return
    if replaced.is_dir() and not any(replaced.iterdir()):
        replaced.rmdir()
        return
    own = _own_files(listed_files(replaced))
    _refuse_strangers(replaced, own)
    own.remove(replaced, last=INFO)


@contextlib.contextmanager
def _one_line(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RunError(f"{target}: could not write the export: {reason}. Nothing was left behind") from error


def check_target(target: Path, replace: bool) -> None:
    """
    Raises:
        UserError: ``new_folder`` must not write to ``target``.
    """
    target = Path(os.path.realpath(target))
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"--output_dir {target}: expected a folder, found a file")
    if not any(target.iterdir()):
        return
    if not (target / INFO).is_file():
        raise UserError(f"--output_dir {target}: expected a new or empty folder, found one that holds other things")
    if not replace:
        raise UserError(f"--output_dir {target}: holds an earlier export already. Give --force to replace it")
    listed = listed_files(target)
    _refuse_strangers(target, _own_files(listed))
    for name, digest in listed.items():
        path = target / name
        if digest is not None and path.exists() and file_sha256(path) != digest:
            raise UserError(f"{path}: changed since it was exported. Move or delete it, then export again")


def _own_files(names: Iterable[str]) -> OwnFiles:
    names = frozenset(names)
    return OwnFiles(names.__contains__, frozenset(name.rpartition("/")[0] for name in names))


def _refuse_strangers(folder: Path, own: OwnFiles) -> None:
    """
    Raises:
        UserError: ``folder`` is a link or a file, or holds files other than ``own``.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of export.py, found a link or a file. Move it away")
    if found := own.strangers(folder):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(
            f"{folder}: holds {quoted(found[0])}{more}, no file of an export. Move it away, then export again"
        )


def is_own_file(name: str) -> bool:
    """Whether exports have a file of this name."""
    folder, _, file = name.rpartition("/")
    return folder in ("", *SUBFOLDERS) and file in FILES


def _is_unfinished(name: str) -> bool:
    file = name.rpartition("/")[2]  # temporary files of safetensors and of replace_file
    return is_own_file(name) or name == LOCK or re.fullmatch(r"\.tmp\w{6}|.+\.omni-partial", file) is not None


UNFINISHED = OwnFiles(_is_unfinished, frozenset(SUBFOLDERS))  # before the export has its list


# ---------------------------------------------------------------------------------------------------------------
# Reading


def is_export(folder: str | Path) -> bool:
    """Whether ``export.py`` wrote the folder; ``Export`` checks it for damaged or missing files."""
    return (Path(folder) / INFO).is_file() or (Path(folder) / WEIGHTS).is_file()


def refuse_export(source: Path, option: str) -> None:
    """
    Raises:
        UserError: ``source``, given as ``option``, is an export where a stage's folder is expected.
    """
    if is_export(source):
        raise UserError(
            f"{option} {source}: expected a stage's folder, found an export. Give the folder of its training"
        )


def read_info(folder: Path) -> dict:
    """Read model_info.json, which has its own digest and that of every other file.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    path = folder / INFO
    try:
        with open_regular(path) as file:
            info = parse_json(file.read().decode("utf-8"))
        if info_sha256(info) != info["sha256"]:
            raise ValueError("the checksum does not match")
    except OSError as error:
        whole = f". Give {folder.parent}, the export itself" if (folder.parent / INFO).is_file() else ""
        raise UserError(f"{path}: cannot read it: {error.strerror}{whole}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged, or not written by export.py") from error
    if info.get("format") != FORMAT:
        found = f"written in format {quoted(info.get('format'))}"
        raise UserError(f"{path}: {found}, this version reads format {FORMAT}")
    for key in ("files", "components"):
        if not isinstance(info.get(key), dict):
            raise UserError(f'{path}: key "{key}": expected an object. It is of another version, or not of export.py')
    return info


def listed_files(folder: Path) -> dict[str, str | None]:
    """The files of the export in ``folder`` with their digests; model_info.json has its own inside.

    Raises:
        UserError: no export, or its list is damaged, so that nothing in the folder may be deleted.
    """
    try:
        return read_info(folder)["files"] | {INFO: None}
    except UserError as error:
        raise UserError(f"{error}. Without its list nothing in {folder} may be replaced: give a new folder") from error
