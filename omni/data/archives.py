"""Published archives, unpacked file by file.

A file that has its final name is complete, so after a kill at any instant the next run writes the missing ones.
Imports only the standard library and tqdm, so that a script that downloads does not wait for torch.
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
USUAL_BYTES_PER_S = 10e6  # of a connection, for estimates
_SMALL_BYTES = 16 << 20  # unpacked bytes that the smallest archive may have
_MOST_ITEMS = 100  # unpacked at most from an archive without a ``count``


@dataclass(frozen=True)
class Archive:
    """One published archive, and the files to unpack from it.

    ``items`` and ``extras`` are regular expressions for names in the archive; their first group is the name to unpack
    to. ``limit`` counts the items; extras are files that the items need, such as transcripts.
    """

    name: str  # file name at the publisher, on a mirror and on disk
    url: str
    size: int | None  # bytes; None: not published
    checksum: str  # md5 or sha256, in hexadecimal; "": not published
    items: str
    extras: str = r"(?!)"  # matches nothing
    extras_of: Callable[[str], tuple[str, ...]] = lambda name: ()  # name of an item -> those of the extras it needs
    root: str = ""  # folder of the unpacked archive
    count: int = 0  # approximate number of items; 0: items are not counted, and no limit applies
    growth: float = 1.0  # bytes on disk, unpacked, per byte of archive
    at_most: int = 0  # bytes that a download without a published size must not exceed
    rename: Mapping[str, str] = field(default_factory=dict)
    # binary file, limit -> what to write in its place
    convert: Callable[[BinaryIO, int | None], Iterator[bytes]] | None = None
    suffix: str = ""  # added to the names of the items, for what ``convert`` writes
    subset: str = ""  # "": always needed
    outputs: tuple[str, ...] = ()  # training files made from this archive
    about_bytes: int = 0  # its size if none is published, for estimates
    mirrors: tuple[str, ...] = ()  # addresses, for --mirror, of other servers that have it
    torrent: str = ""  # its name, for those who have a client
    bytes_per_s: float = USUAL_BYTES_PER_S  # of the publisher's server, as its users report

    @property
    def is_slow(self) -> bool:
        """Whether no more of it is downloaded than a limit needs, and what there is is kept."""
        return self.bytes_per_s < USUAL_BYTES_PER_S / 10

    @property
    def elsewhere(self) -> str:
        """What to try if the publisher's server fails, for a message."""
        mirrors = " or ".join(f"--mirror {mirror}" for mirror in self.mirrors)
        torrent = f", or fetch the torrent {self.torrent}" if self.torrent else ""
        return f"try {mirrors or 'another server with --mirror'}{torrent}, or give the folder of a copy with --from"

    def unpacked_bytes(self, archive_bytes: int, limit: int | None) -> int:
        """About how many bytes of disk the first ``limit`` items take."""
        share = min(1.0, limit / self.count) if limit and self.count else 1.0
        return int(archive_bytes * self.growth * share)

    def most_bytes(self) -> int:
        """Limit of a download whose size is not known beforehand."""
        return self.at_most or 2 * (self.size or 0) or sys.maxsize

    def most_unpacked(self, archive_bytes: int) -> int:
        """Unpacked size beyond which an archive must be a zip bomb."""
        return int(2 * max(self.growth, 1.0) * archive_bytes) + _SMALL_BYTES


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A temporary file that is renamed to ``path`` if the block succeeds, and deleted if it fails.

    An equal file at ``path`` is left as it is.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # follows no link
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
    """One regular file of an archive, or of an unpacked folder."""

    name: str
    size: int
    open: Callable[[], BinaryIO]
    path: Path | None = None  # set if the file is on disk already


def unpack(archive: Archive, source: Path, folder: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """Write the wanted files of ``source`` below ``folder``; files that exist already stay as they are.

    Args:
        source: the archive, or a folder with its content.
        limit: number of items after which to stop reading; also passed to ``archive.convert``.

    Returns:
        Names of the items, in the order of the archive, and of the extras, both relative to ``folder``.

    Raises:
        RunError: the archive is damaged, contains a link or a name that leaves the folder, lacks wanted files, or
            unpacks to far more than expected.
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
                if _is_tar(source):  # unwanted files are decompressed, too
                    left.take(member.size)
                item, extra = re.fullmatch(archive.items, member.name), re.fullmatch(archive.extras, member.name)
                if extra:
                    _write(archive, member, folder / extra[1], None, left)
                    extras.add(extra[1])
                elif item and (stop_at is None or len(items) < stop_at):
                    name = archive.rename.get(item[1], item[1]) + archive.suffix
                    _write(archive, member, folder / name, limit, left)
                    items.append(name)
                    if is_packed and len(items) > most_items:
                        raise _Damaged(f"more than {most_items:,} files named like {archive.items}")
                    bar.update()
                    needed.update(archive.extras_of(name))
                if len(items) == stop_at and needed <= extras:
                    break
    except _DAMAGES as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            # an error of the disk; those of decompressors and of damaged offsets have one of these two numbers
            raise
        raise RunError(f"{source}: damaged, or not the file that is expected: {quoted(error)}") from error
    if not items:
        raise RunError(f"{source}: expected files named like {archive.items}, found none")
    if missing := sorted(needed - extras):
        raise RunError(f"{source}: expected {missing[0]} in it, found none")
    return items, sorted(extras)


class _Damaged(Exception):
    """The archive cannot be the published one."""


# raised by the readers of tar, zip and compressed streams for damaged bytes
_DAMAGES = (
    _Damaged, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, RuntimeError, ValueError, TypeError, LookupError, OverflowError, OSError,
)  # fmt: skip


@dataclass
class _Allowance:
    """Number of bytes that an archive may still unpack to."""

    n_bytes: int

    def take(self, n_bytes: int) -> None:
        self.n_bytes -= n_bytes
        if self.n_bytes < 0:
            raise _Damaged("it unpacks to far more than what is published")


class _Counted(io.RawIOBase):
    """A reader of ``content`` that subtracts the bytes it reads from an allowance."""

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
    # not synced one by one: ``Store.settle`` syncs once before it records them
    with replacing(target, sync=False) as file, member.open() as packed:
        content = io.BufferedReader(_Counted(packed, left), BLOCK_BYTES)
        if archive.convert is None:
            shutil.copyfileobj(content, file, BLOCK_BYTES)
        else:
            file.writelines(archive.convert(content, limit))


def _link(path: Path, target: Path) -> bool:
    """Make ``target`` a hard link to ``path``; False if the file systems do not allow that."""
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
    elif _is_tar(source):
        with (
            open(source, "rb") as file,
            # a stream: never seeks back, so stopping early saves the rest
            tarfile.open(fileobj=_deb_content(file) if source.suffix == ".deb" else file, mode="r|*") as tar,
        ):
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


def _is_tar(source: Path) -> bool:
    return ".tar" in source.suffixes or source.suffix == ".deb"


def _deb_content(file: BinaryIO) -> BinaryIO:
    """The compressed tar with the files of a Debian package, which is an ar archive of three members (deb(5)).

    Raises:
        _Damaged: no ar archive, a member that is longer than the file, or none with the files.
    """
    size = os.fstat(file.fileno()).st_size
    if file.read(8) != b"!<arch>\n":
        raise _Damaged("expected a Debian package, found none")
    while header := file.read(60):  # name, time, owner, group, mode, size, end
        fields = re.fullmatch(rb"(.{16}).{32}(\d{1,10}) *`\n", header, re.DOTALL)
        if not fields:
            raise _Damaged("expected the header of a member of the package, found none")
        if int(fields[2]) > size - file.tell():
            raise _Damaged("a member of the package is truncated")
        if fields[1].startswith(b"data.tar"):
            return io.BytesIO(file.read(int(fields[2])))
        file.seek(int(fields[2]) + int(fields[2]) % 2, os.SEEK_CUR)  # members begin at even bytes
    raise _Damaged("expected data.tar in the package, found none")
