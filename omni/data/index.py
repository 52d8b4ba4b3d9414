"""The index of a file, stored beside it: made once, and again when the file or the index has changed.

An index is a folder with arrays and ``meta.json``, each sealed with its own digest. ``meta.json`` has the file's
digest, size and mtime. Only the holder of the folder's lock writes there.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from omni.common.errors import UserError
from omni.common.files import file_sha256, file_stat, open_sealed_json, replace_file, write_sealed_json
from omni.common.lock import FolderLock

_DIGEST_BYTES = 32
ROWS = "rows.jsonl"  # in the index of a folder or an archive: its rows


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an ``.npy`` file followed by its SHA-256, which readers of ``.npy`` do not read."""

    def write(file) -> None:
        np.save(file, array)
        file.flush()
        file.write(bytes.fromhex(file_sha256(Path(file.name))))

    replace_file(path, write)


def open_array(path: Path) -> np.ndarray:
    """The array that ``save_array`` wrote, mapped from disk.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    data = np.memmap(path, np.uint8, "r")
    if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:].tobytes():
        raise ValueError(f"{path.name} is not what was written")
    return np.load(path, mmap_mode="r")


@contextlib.contextmanager
def hold_cache(folder: Path, log: Callable[[str], None], check_stop: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a cache folder, which is created if it is missing.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock.wait_for(folder, log, check_stop)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}. Set cache_dir to a folder that can be written") from error
    with lock:
        yield


def make_once(
    folder: Path,
    problem: Callable[[], str | None],
    make: Callable[[], None],
    log: Callable[[str], None],
    check_stop: Callable[[], None],
) -> bool:
    """Call ``make()``, with the folder's lock, if ``problem()`` says why the folder cannot be used ("" if the log need
    not say it); None means that it can.

    Returns:
        whether there was a problem before the lock was taken.

    Raises:
        UserError: the folder cannot be written.
    """
    if problem() is None:
        return False
    with hold_cache(folder, log, check_stop):
        if (found := problem()) is not None:  # else another process has made it before this one got the lock
            if found:
                log(found)
            make()
    return True


def prepare_index(
    path: Path,
    folder: Path,
    make: Callable[[], None],
    log: Callable[[str], None],
    check_stop: Callable[[], None],
    stat: Callable[[Path], dict] = file_stat,
    sha256: Callable[[Path], str] | None = file_sha256,
) -> None:
    """Call ``make()``, which fills ``folder`` and writes ``meta.json`` last, unless the index of ``path`` is valid.

    Args:
        stat: facts of the file, or the files, by which a change is noticed.
        sha256: digest of the content, compared where the facts but not the size differ; None: it counts as changed.

    Raises:
        UserError: the file cannot be read, or the folder cannot be written.
    """

    def problem() -> str | None:
        try:
            stale = why_stale(path, folder, stat, sha256)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
        return f"{folder}: {stale}; making the index again" if stale else stale

    if make_once(folder, problem, make, log, check_stop):
        return
    if sha256 is not None and open_sealed_json(folder / "meta.json")["stat"] != stat(path):
        # the same bytes with another mtime; if that cannot be written, every run hashes them
        with contextlib.suppress(UserError), hold_cache(folder, log, check_stop):
            meta = open_sealed_json(folder / "meta.json")
            if why_stale(path, folder, stat, sha256) is None and meta["stat"] != stat(path):
                write_sealed_json(folder / "meta.json", meta | {"stat": stat(path)})


def copy_facts(path: Path) -> dict:
    """Size, mtime and digest of a file of the index."""
    return file_stat(path) | {"sha256": file_sha256(path)}


def is_as_written(path: Path, facts: dict, *, always: bool) -> bool:
    """Whether a file has its digest; without ``always``, one of the same size and mtime is not read."""
    stat = file_stat(path)
    unchanged = stat == {name: facts[name] for name in stat}
    return stat["size"] == facts["size"] and (unchanged and not always or file_sha256(path) == facts["sha256"])


def why_stale(
    path: Path,
    folder: Path,
    stat: Callable[[Path], dict] = file_stat,
    sha256: Callable[[Path], str] | None = file_sha256,
) -> str | None:
    """Why an index must be made ("" if the log need not say it), or None if it is whole and of the present file.

    Raises:
        OSError: the file cannot be read.
    """
    facts = stat(path)
    try:
        meta = open_sealed_json(folder / "meta.json")
        saved, digest = meta["stat"], meta["sha256"]
        for name in meta["arrays"]:
            open_array(folder / f"{name}.npy")
        for name, expected in meta["copies"].items():
            if not is_as_written(folder / name, expected, always=name == ROWS):
                raise ValueError(f"{name} is not what was written")
    except FileNotFoundError as error:
        return "" if Path(error.filename).name == "meta.json" else f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"damaged ({error})"
    if saved != facts and (sha256 is None or saved["size"] != facts["size"] or digest != sha256(path)):
        return ""
    return None
