"""Published archives, unpacked file by file.

Can be killed at any instant: a file that has its final name is complete, and the next run writes the missing ones.
Only the standard library and tqdm: a script that downloads need not wait for torch.
"""

import contextlib
import errno
import filecmp
import io
import lzma
import os
import re
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from omni.common.errors import RunError
from omni.common.media import quoted

BLOCK_BYTES = 1 << 20
_SMALL_BYTES = 16 << 20  # what an archive of next to nothing may hold
_MOST_ITEMS = 100  # taken from an archive that does not tell how many it has


@dataclass(frozen=True)
class Archive:
    """One published file, and which of the files in it are wanted.

    ``items`` and ``extras`` are regular expressions on names in the archive whose first group is the name to unpack
    to. Items are what ``limit`` counts; extras (transcripts) are what the items need.
    """

    name: str  # of the file, at the publisher, on a mirror and on disk
    url: str
    size: int | None  # bytes; None: not published
    checksum: str  # md5 or sha256, in hexadecimal; "": not published
    items: str
    extras: str = r"(?!)"  # matches nothing
    extra_of: Callable[[str], str] | None = None  # name of an item -> name of the extra without which it is no use
    root: str = ""  # folder of the unpacked archive
    count: int = 0  # about how many items; 0: they are not counted, and a limit does not apply to them
    growth: float = 1.0  # bytes on disk, unpacked, per byte of archive
    at_most: int = 0  # bytes that a download never exceeds, where no size is published
    rename: Mapping[str, str] = field(default_factory=dict)
    # binary file, limit -> what to write in its place
    convert: Callable[[BinaryIO, int | None], Iterator[bytes]] | None = None
    subset: str = ""  # "": always needed
    outputs: tuple[str, ...] = ()  # files for training that are made from it

    def unpacked_bytes(self, archive_bytes: int, limit: int | None) -> int:
        """About how many bytes of disk the first ``limit`` items take."""
        share = min(1.0, limit / self.count) if limit and self.count else 1.0
        return int(archive_bytes * self.growth * share)

    def most_bytes(self) -> int:
        """Of a download whose size is not known beforehand."""
        return self.at_most or 2 * (self.size or 0) or sys.maxsize

    def most_unpacked(self, archive_bytes: int) -> int:
        """What no such archive holds, however it is packed anew: a bomb."""
        return int(2 * max(self.growth, 1.0) * archive_bytes) + _SMALL_BYTES


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A temporary file that takes the name ``path`` when the block ends without an error, and goes when it does not.

    An equal file is left as it is.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # a link that somebody put there is not followed
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if not (path.exists() and filecmp.cmp(temporary, path, shallow=False)):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def progress(total: int, unit: str, name: str, initial: int = 0) -> tqdm:
    return tqdm(
        total=total, initial=initial, unit=unit, unit_scale=True, desc=name, disable=None, delay=0.5, leave=False
    )


class Member(NamedTuple):
    """One regular file of an archive, or of a folder that somebody unpacked."""

    name: str
    size: int
    open: Callable[[], BinaryIO]
    path: Path | None = None  # set where it lies on disk already


def unpack(archive: Archive, source: Path, folder: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """Write the wanted files of ``source`` below ``folder``; those that are there already stay as they are.

    Args:
        source: the archive, or a folder with its content.
        limit: number of items after which to stop reading; what ``archive.convert`` makes of it.

    Returns:
        Names of the items, in the order of the archive, and of the extras, both relative to ``folder``.

    Raises:
        RunError: damaged, holds a link or a name that leaves the folder, lacks what is wanted, or holds far more.
    """
    stop_at = limit if archive.count else None
    items, extras, needed = [], set(), set()
    is_packed = not source.is_dir()
    left = _Allowance(archive.most_unpacked(source.stat().st_size) if is_packed else sys.maxsize)
    most_items = 2 * archive.count or _MOST_ITEMS
    total = min(stop_at or archive.count, archive.count) or None
    try:
        with contextlib.closing(_members(source, archive.root)) as members, progress(total, "file", source.name) as bar:
            for member in members:
                if ".tar" in source.suffixes:  # what is not wanted is decompressed, too
                    left.take(member.size)
                item, extra = re.fullmatch(archive.items, member.name), re.fullmatch(archive.extras, member.name)
                if extra:
                    _write(archive, member, folder / extra[1], None, left)
                    extras.add(extra[1])
                elif item and (stop_at is None or len(items) < stop_at):
                    name = archive.rename.get(item[1], item[1])
                    _write(archive, member, folder / name, limit, left)
                    items.append(name)
                    if is_packed and len(items) > most_items:
                        raise _Damaged(f"more than {most_items:,} files named like {archive.items}")
                    bar.update()
                    if archive.extra_of:
                        needed.add(archive.extra_of(name))
                if len(items) == stop_at and needed <= extras:
                    break
    except _DAMAGES as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            # of the disk; not of a decompressor, nor of a header that says where to go on
            raise
        raise RunError(f"{source}: damaged, or not the file that is expected: {quoted(error)}") from error
    if not items:
        raise RunError(f"{source}: expected files named like {archive.items}, found none")
    if missing := sorted(needed - extras):
        raise RunError(f"{source}: expected {missing[0]} in it, found none")
    return items, sorted(extras)


class _Damaged(Exception):
    """The archive cannot be what is published."""


# whatever the readers of tar, zip and compressed streams raise for bytes that are not theirs
_DAMAGES = (
    _Damaged, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, RuntimeError, ValueError, TypeError, LookupError, OverflowError, OSError,
)  # fmt: skip


@dataclass
class _Allowance:
    """How many bytes an archive may still unpack to."""

    n_bytes: int

    def take(self, n_bytes: int) -> None:
        self.n_bytes -= n_bytes
        if self.n_bytes < 0:
            raise _Damaged("it unpacks to far more than what is published")


class _Counted(io.RawIOBase):
    """``content``, whose bytes are taken from an allowance as they are read."""

    def __init__(self, content: BinaryIO, left: _Allowance) -> None:
        self.content, self.left = content, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.content.read(len(buffer))
        self.left.take(len(data))
        buffer[: len(data)] = data
        return len(data)


def _write(archive: Archive, member: Member, target: Path, limit: int | None, left: _Allowance) -> None:
    if archive.convert is None and target.is_file() and target.stat().st_size == member.size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if archive.convert is None and member.path is not None and _link(member.path, target):
        return
    # not synced one by one: whoever records that all of them are there syncs once before
    with replacing(target, sync=False) as file, member.open() as packed:
        content = io.BufferedReader(_Counted(packed, left), BLOCK_BYTES)
        if archive.convert is None:
            shutil.copyfileobj(content, file, BLOCK_BYTES)
        else:
            file.writelines(archive.convert(content, limit))


def _link(path: Path, target: Path) -> bool:
    """A second name for the same bytes; False on another file system, or one without links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), temporary)
    except OSError:
        return False
    os.replace(temporary, target)
    return True


def _members(source: Path, root: str) -> Iterator[Member]:
    """The regular files of an archive in its own order, or of a folder in alphabetical order."""
    if source.is_dir():
        for parent, folders, files in os.walk(source / root):
            folders.sort()
            for name in sorted(files):
                path = Path(parent, name)
                yield Member(
                    path.relative_to(source).as_posix(), path.stat().st_size, lambda path=path: open(path, "rb"), path
                )
    elif ".tar" in source.suffixes:
        with tarfile.open(source, "r|*") as tar:  # a stream: never goes back, so that stopping early saves the rest
            while (member := tar.next()) is not None:
                tar.members.clear()  # they would fill the memory: nine million in MJSynth
                member = tarfile.data_filter(member, str(source))
                if member.isfile():
                    name = PurePosixPath(member.name).as_posix()
                    yield Member(name, member.size, lambda tar=tar, member=member: tar.extractfile(member))
                elif not member.isdir():
                    raise tarfile.TarError(f"{member.name!r} is a link")
    elif source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                path = PurePosixPath(info.filename)
                if path.is_absolute() or ".." in path.parts:
                    raise zipfile.BadZipFile(f"{info.filename!r} leaves the folder")
                if not info.is_dir():
                    yield Member(path.as_posix(), info.file_size, lambda info=info: archive.open(info))
    else:
        yield Member(source.name, source.stat().st_size, lambda: open(source, "rb"))
