"""Results cached on disk, with digests of their inputs and of their own content.

A cache is JSON, or arrays in ``.npy`` files beside a JSON file with their digests; the JSON contains its own digest. A
cache whose digests do not match is made again, and the log says why. A folder or link at its path is renamed, not
deleted.

A cache stores a hash of size, mtime and ctime of each recording or picture that it depends on; ctime changes even if
mtime is set back. An expensive cache compares changed files by content, so that a copied folder is only read again.
"""

import functools
import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from omni.common.errors import BadRow, UserError
from omni.common.files import file_sha256, json_sha256, read_sealed_json, replace_file, write_sealed_json
from omni.common.media import Clip, Inline, Media, Section, open_media, quoted

ABSENT = "absent"
_BLOCK_BYTES = 1 << 20
_IN_MANIFEST = 1  # the facts of a data URI, which only changes with its manifest


# ---------------------------------------------------------------------------------------------------------------
# Files that a cache depends on


def facts_of_row(manifest, row: int, column: str, root: str | None) -> int:
    """64-bit hash of size and times of a row's file; 0 if there is no file."""
    try:
        file = _on_disk(manifest.file(manifest[row], column, root))
        return _IN_MANIFEST if isinstance(file, Inline) else _facts(os.stat(file))
    except (BadRow, OSError):
        return 0


def _on_disk(source: Media) -> Path | Inline:
    """The file on disk that contains what a row names; a data URI as it is."""
    while isinstance(source, (Clip, Section)):
        source = source.source if isinstance(source, Clip) else source.path
    return source


def _facts(stat: os.stat_result) -> int:
    return _hash64(struct.pack("<qqq", stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


def content_of_row(manifest, row: int, column: str, root: str | None, facts: int) -> int:
    """64-bit hash of the content of a row's file; 0 if its ``facts`` have changed or it is unreadable."""
    try:
        source = manifest.file(manifest[row], column, root)
        if isinstance(source, Clip):  # the whole recording, which many rows may share
            return _content_of_file(source.source, facts) if isinstance(source.source, Path) else 0
        return _content(source, facts)
    except (BadRow, OSError):
        return 0


def _content(source: Media, facts: int) -> int:
    with open_media(source) as file:
        on_disk = _on_disk(source)
        if isinstance(on_disk, Inline):
            found = _IN_MANIFEST
        else:
            found = _facts(os.fstat(file.fileno()) if on_disk is source else os.stat(on_disk))
        digest = hashlib.blake2b(digest_size=8)
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return int.from_bytes(digest.digest(), "little") if found == facts else 0


_content_of_file = functools.lru_cache(maxsize=256)(_content)


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------------------------------
# Arrays


def write_arrays(path: Path, belongs_to: dict, *, there: Sequence[str] = (), **arrays: np.ndarray) -> None:
    """Write each array as ``<path>.<name>.npy`` (``values`` as ``<path>.npy``), then ``<path>.json`` with their digests
    and those of the existing arrays ``there``."""
    for name, array in arrays.items():
        file = array_file(path, name)
        set_aside(file)
        replace_file(file, lambda file, array=array: np.save(file, array))
    set_aside(_sealed(path))
    digests = {name: file_sha256(array_file(path, name)) for name in (*there, *arrays)}
    write_sealed_json(_sealed(path), {"belongs_to": belongs_to, "sha256": digests})


def arrays_problem(path: Path, belongs_to: dict) -> str:
    """Why the arrays of ``write_arrays`` cannot be used; "" if they can. Reads all of them."""
    sealed = read_sealed_json(_sealed(path))
    if sealed is None:
        return f"{_sealed(path)}: damaged, or of an earlier version" if os.path.lexists(_sealed(path)) else ABSENT
    if json_sha256(sealed["belongs_to"]) != json_sha256(belongs_to):
        return f"{_sealed(path)}: of other data or another model"
    for name, digest in sealed["sha256"].items():
        try:
            if file_sha256(array_file(path, name)) != digest:
                return f"{array_file(path, name)}: damaged"
        except OSError as error:
            return f"{array_file(path, name)}: {error.strerror}"
    return ""


def open_arrays(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The arrays by name, mapped from disk, and a digest of ``values`` and ``spans``. Call ``arrays_problem`` first."""
    digests = read_sealed_json(_sealed(path))["sha256"]
    arrays = {name: np.load(array_file(path, name), mmap_mode="r") for name in digests}
    return arrays, json_sha256({name: digests[name] for name in digests if name in ("values", "spans")})


def unseal(path: Path) -> None:
    """Mark the arrays as incomplete."""
    set_aside(_sealed(path))
    _sealed(path).unlink(missing_ok=True)


def array_file(path: Path, name: str) -> Path:
    return path.with_name(f"{path.name}.npy" if name == "values" else f"{path.name}.{name}.npy")


def _sealed(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def set_aside(path: Path, *, even_a_file: bool = False) -> None:
    """Rename whatever is at ``path``, unless it is a file: a folder or a link there is not ours."""
    if os.path.lexists(path) and (even_a_file or path.is_symlink() or not path.is_file()):
        count = 1
        while os.path.lexists(aside := path.with_name(f"{path.name}.aside{count}")):
            count += 1
        path.rename(aside)


# ---------------------------------------------------------------------------------------------------------------
# JSON


def cached_json(path: Path, belongs_to: dict, make: Callable[[], dict], log: Callable[[str], None]) -> dict:
    """The result stored at ``path``, or ``make()`` if that is missing, damaged or of another ``belongs_to``."""
    kept = read_sealed_json(path)
    if kept is None and os.path.lexists(path):
        log(f"{path}: damaged, or of an earlier version: made again")
    if kept is None or json_sha256(kept["belongs_to"]) != json_sha256(belongs_to):
        kept = {"belongs_to": belongs_to, "result": make()}
        set_aside(path)
        write_sealed_json(path, kept)
    return kept["result"]


def require_finite(values: Tensor, file: object) -> Tensor:
    """``values``, computed from ``file``.

    Raises:
        UserError: a value is not finite, so a cache that depends on it would be useless.
    """
    if not values.isfinite().all():
        raise UserError(
            f"{quoted(file)}: expected sound whose log-mels are finite. Repair the file or take its row out"
        )
    return values
