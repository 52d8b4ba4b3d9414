"""Downloads that resume, and a record of the files unpacked from each.

A file that has its final name is complete, so after a kill at any instant the next run begins with the first missing
file. Imports only the standard library and tqdm, so that a script that downloads does not wait for torch.
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from omni.common.errors import RunError, UserError
from omni.common.files import SEAL, read_sealed_json, remove_temporary, write_sealed_json
from omni.common.media import quoted
from omni.data.archives import BLOCK_BYTES, Archive, progress, replacing, unpack

_TIMEOUT_S = 60  # without a single byte
_RETRIES = 6  # in a row, without a single byte
_TRANSIENT = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_DIGEST_LENGTHS = {32: "md5", 40: "sha1", 64: "sha256"}  # in hexadecimal digits


def not_following(path: str, flags: int) -> int:
    """Opener for ``open`` that raises ``OSError`` if ``path`` is a link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def read_record(path: Path) -> dict | list | None:
    """Sealed JSON, or unsealed JSON of an earlier version; None if it is missing or, with a log line, damaged."""
    if not os.path.lexists(path):
        return None
    if (value := read_sealed_json(path)) is not None:
        return value
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(value, dict) and SEAL in value):
            return value
    log(f"{path}: damaged, so it is ignored")
    return None


def check_space(folder: Path, needed: int) -> None:
    """
    Raises:
        RunError: fewer than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: expected {gigabytes(needed)} of free disk, found {gigabytes(free)}. "
            "Make room, set --limit, or choose another --out"
        )


def gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def log(message: str) -> None:
    """One line to stdout, above the progress bars."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(message, flush=True)


@dataclass
class Transfer:
    """One download from ``url`` to ``path``, which resumes from an earlier run's ``<path>.part``.

    Resuming is safe only if the file has not changed: the request sends back the server's ETag or Last-Modified
    (RFC 9110, 13.1.5) from ``<path>.part.validator``. A server that gives neither, or ignores ranges, sends the file
    from the start.
    """

    url: str
    path: Path
    size: int | None  # bytes expected, if known
    most_bytes: int  # limit of the download, whatever the server declares
    space_for: Callable[[int], int]  # bytes of the file -> free bytes of disk needed for its unpacked content
    retry_wait_s: float  # wait before the first of several retries; each wait is twice the one before

    def run(self) -> None:
        """
        Raises:
            RunError: the server refuses, the size differs, disk is short, or the connection fails again and again.
        """
        part = self.path.with_name(f"{self.path.name}.part")
        self.validator = self.path.with_name(f"{part.name}.validator")
        failures = 0
        with (
            open(part, "ab", opener=not_following) as self.file,
            progress(self.size or 0, "B", self.path.name) as self.bar,
        ):
            while True:
                before = self.file.tell()
                try:
                    self._receive()
                    break
                except _TRANSIENT as error:
                    failures = 1 if self.file.tell() > before else failures + 1
                    is_answer = isinstance(error, urllib.error.HTTPError)
                    reason = error if is_answer else getattr(error, "reason", None) or error
                    if failures > _RETRIES:
                        raise RunError(
                            f"{self.url}: {reason}; {_RETRIES} retries did not help. Run the same line again to go on "
                            f"with {part}, or try another server with --mirror"
                        ) from error
                    wait_s = self.retry_wait_s * 2 ** (failures - 1)
                    arrived = gigabytes(self.file.tell())
                    log(f"{self.path.name}: {reason}, after {arrived}. Trying again in {wait_s:g} s")
                    time.sleep(wait_s)
            os.fsync(self.file.fileno())
        os.replace(part, self.path)
        self.validator.unlink(missing_ok=True)

    def _receive(self) -> None:
        """One request, for all missing bytes."""
        offset = self.file.tell()
        if offset and offset == self.size:
            return
        # some servers refuse Python's own agent name
        headers = {"User-Agent": "Mozilla/5.0 (compatible; micro-omni)", "Accept-Encoding": "identity"}
        if offset and (known := self._known_validator()):
            headers |= {"Range": f"bytes={offset}-", "If-Range": known}
        try:
            response = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{offset}":
                return  # the last run was killed between the last byte and the renaming
            if error.code == 416:
                _start_over(self.file)
                raise ConnectionError(f"HTTP 416 for byte {offset:,} and up, starting over") from error
            if error.code in _TRANSIENT_STATUS:
                raise
            raise RunError(f"{self.url}: {error}. Try --mirror, or --from with a copy") from error
        except ValueError as error:  # redirected to an invalid address
            raise RunError(f"{self.url}: {error}. Try --mirror, or --from with a copy") from error
        with response:
            length = response.headers.get("Content-Length", "")
            if length and not re.fullmatch("[0-9]{1,18}", length):
                raise RunError(f"{self.url}: expected a number as Content-Length, found {quoted(length)}")
            if response.status == 206:
                if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
                    _start_over(self.file)
                    raise ConnectionError("the server sent another range than asked for, starting over")
            else:
                if offset:
                    log(f"{self.path.name}: changed since, or the server cannot go on in mid-file: starting over")
                offset = 0
                _start_over(self.file)
                self.validator.unlink(missing_ok=True)
                self.validator.write_text(_validator_of(response.headers), encoding="utf-8", errors="replace")
            total = offset + int(length) if length else self.size
            if self.size not in (None, total):
                raise RunError(
                    f"{self.url}: expected {self.size:,} bytes, the server has {total:,}. "
                    "If this is a newer file that you trust, give its digest with --checksums"
                )
            if (total or 0) > self.most_bytes:
                raise RunError(f"{self.url}: expected at most {self.most_bytes:,} bytes, the server has {total:,}")
            if total is not None:
                check_space(self.path.parent, total - offset + self.space_for(total))
                going_on = f", going on at {gigabytes(offset)}" if offset else ""
                log(f"{self.path.name}: {gigabytes(total)} from {self.url}{going_on}")
            self.bar.total, self.bar.n = total, offset
            most = self.most_bytes if total is None else total
            while block := response.read1(BLOCK_BYTES):
                if self.file.tell() + len(block) > most:
                    _start_over(self.file)
                    raise RunError(f"{self.url}: expected {most:,} bytes at most, the server sends more")
                self.file.write(block)
                self.file.flush()  # received bytes survive a kill
                self.bar.update(len(block))
            if total is not None and self.file.tell() < total:
                raise ConnectionError("connection cut")

    def _known_validator(self) -> str:
        """The validator that an earlier run stored; "" if there is none that can be sent."""
        try:
            known = self.validator.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return ""
        return known if known.isprintable() and len(known) < 1000 else ""


def _start_over(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _validator_of(headers: http.client.HTTPMessage) -> str:
    etag = headers.get("ETag", "")
    # a weak ETag promises equal meaning, not equal bytes
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def file_digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file, progress(path.stat().st_size, "B", f"{path.name}: checksum") as bar:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def digest_algorithm(digest: str) -> str | None:
    """``md5``, ``sha1`` or ``sha256`` by the number of hexadecimal digits; None: no digest."""
    return _DIGEST_LENGTHS.get(len(digest)) if re.fullmatch("[0-9a-f]+", digest) else None


@dataclass
class Store:
    """The folder of the downloaded archives, with a record of the files unpacked from each."""

    folder: Path
    from_dir: Path | None = None  # folder with archives or their content: nothing is downloaded
    mirror: str | None = None  # address of the archives: <mirror>/<name>
    checksums: Mapping[str, str] = field(default_factory=dict)  # archive -> digest that replaces the published one
    keep_archives: bool = False
    retry_wait_s: float = 1.0

    def lock(self) -> None:
        """
        Raises:
            UserError: the folder cannot be written, or another process works in it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock_file = open(self.folder / ".lock", "a", opener=not_following)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write there: {error.strerror}. Choose another --out") from error
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process is preparing data there. Wait for it") from None
        remove_temporary(self.folder)

    def settle(self, archive: Archive, folder: Path, limit: int | None) -> list[str]:
        """Make sure that an archive's items are below ``folder``: download and unpack them if they are not.

        Returns:
            Names of the items relative to ``folder``, the first ``limit`` of the archive.
        """
        record = self.folder / f"{archive.name}.files"
        limit = limit if archive.count or archive.convert else None
        items = self._settled(record, archive, folder, limit)
        if items is None:
            there = _bytes_below(folder / archive.root) if archive.root else 0  # from an interrupted run

            def space_for(size: int) -> int:
                return max(0, archive.unpacked_bytes(size, limit) - there)

            source = self._locate(archive) if self.from_dir else self._download(archive, space_for)
            if not source.is_dir():
                check_space(folder, space_for(source.stat().st_size))
            elif source.stat().st_dev != folder.stat().st_dev:  # else hard links, which take no space
                check_space(folder, _bytes_below(source / archive.root) - there)
            log(f"{source}: unpacking into {folder}")
            items, extras = unpack(archive, source, folder, limit)
            os.sync()  # no power cut may leave the record without the files
            sizes = {name: (folder / name).stat().st_size for name in [*items, *extras]}
            write_sealed_json(record, {"limit": limit, "items": items, "sizes": sizes})
        if not self.keep_archives and not self.from_dir:
            (self.folder / archive.name).unlink(missing_ok=True)
        return items

    def _settled(self, record: Path, archive: Archive, folder: Path, limit: int | None) -> list[str] | None:
        """Names of items that are unpacked completely; None if they must be unpacked (again)."""
        made = read_record(record)
        if not _is_record(made):
            return None
        if archive.convert and not archive.count:  # the limit is one of lines
            enough = made["limit"] == limit
        else:
            enough = made["limit"] is None or (limit is not None and limit <= made["limit"])
        for name, size in made["sizes"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                return None
        return made["items"][: limit if archive.count else None] if enough else None

    def missing(self, archive: Archive) -> str | None:
        """What ``from_dir`` lacks for this archive, for a message; None if nothing."""
        if (self.from_dir / archive.name).is_file() or (archive.root and (self.from_dir / archive.root).is_dir()):
            return None
        return archive.name + (f" (or, unpacked, {archive.root}/)" if archive.root else "")

    def _locate(self, archive: Archive) -> Path:
        file = self.from_dir / archive.name
        if not file.is_file():
            return self.from_dir
        if problem := self._mismatch(archive, file):
            raise UserError(f"{file}: {problem}. Download it again")
        return file

    def _download(self, archive: Archive, space_for: Callable[[int], int]) -> Path:
        path = self.folder / archive.name
        if not path.exists():
            url = f"{self.mirror.rstrip('/')}/{archive.name}" if self.mirror else archive.url
            size = None if archive.name in self.checksums else archive.size
            Transfer(url, path, size, archive.most_bytes(), space_for, self.retry_wait_s).run()
        if problem := self._mismatch(archive, path):
            aside = path.with_name(f"{path.name}.damaged")
            path.rename(aside)
            raise RunError(
                f"{path}: {problem}. Set aside as {aside.name}; the same line downloads it again. "
                "If the publisher has changed it and you trust that, give its digest with --checksums"
            )
        return path

    def _mismatch(self, archive: Archive, path: Path) -> str | None:
        """How the file differs from its checksum, for a message; None if it does not. The checksum is the user's, else
        the published one, else that of the first download, which is recorded."""
        record = self.folder / f"{archive.name}.sha256"
        expected = self.checksums.get(archive.name) or archive.checksum
        if not expected and record.exists():
            expected = record.read_text(encoding="utf-8", errors="replace").partition(" ")[0]
            if digest_algorithm(expected) is None:
                raise RunError(f"{record}: damaged. Delete it to take {archive.name} as it is now")
        algorithm = digest_algorithm(expected) or "sha256"
        found = file_digest(path, algorithm)
        if not expected:
            log(f"{archive.name}: no checksum is published. Recorded, to compare later downloads with: sha256 {found}")
            with replacing(record) as file:
                file.write(f"{found}  {archive.name}\n".encode())
            return None
        return None if found == expected else f"expected {algorithm} {expected}, found {found}"


def _is_record(value: dict | list | None) -> bool:
    """Whether ``value`` is a record of unpacked files; an unsealed file of an earlier version can be anything."""
    if not isinstance(value, dict) or value.keys() != {"limit", "items", "sizes"}:
        return False
    limit, items, sizes = value["limit"], value["items"], value["sizes"]
    known = isinstance(items, list) and isinstance(sizes, dict) and (limit is None or isinstance(limit, int))
    return known and all(isinstance(name, str) and name in sizes for name in items)


def read_checksums(path: Path) -> dict[str, str]:
    """Lines as ``sha256sum`` and ``md5sum`` write them: file name -> digest.

    Raises:
        UserError: the file is not readable, or a line has another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--checksums {path}: cannot read it: {error}") from error
    checksums = {}
    for number, line in enumerate(lines, 1):
        digest, _, name = line.strip().partition(" ")
        if not name or digest_algorithm(digest) is None:
            raise UserError(f'{path}: line {number}: expected "<md5 or sha256>  <file name>", found "{line[:60]}"')
        checksums[name.strip().lstrip("*")] = digest
    return checksums


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
