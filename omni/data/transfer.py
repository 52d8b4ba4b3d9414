"""A download that resumes where an earlier one stopped, and its log lines.

Imports only the standard library and tqdm, so that a script that downloads does not wait for torch.
"""

import http.client
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from omni.common.errors import RunError
from omni.common.media import quoted
from omni.data.archives import BLOCK_BYTES, progress

_TIMEOUT_S = 60  # without a single byte
_RETRIES = 6  # in a row, without a single byte
_TRANSIENT = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}


def not_following(path: str, flags: int) -> int:
    """Opener for ``open`` that raises ``OSError`` if ``path`` is a link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


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
    elsewhere: str = "try another server with --mirror"  # where else the file may be had, for a message
    # bytes of the file -> how many of them, from its beginning, are wanted; default: all
    wanted: Callable[[int], int] = lambda total: total

    def run(self) -> bool:
        """
        Returns:
            Whether the file is complete, and has its name; if not, the wanted bytes or more are in ``<path>.part``.

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
                    is_complete = self._receive()
                    break
                except _TRANSIENT as error:
                    failures = 1 if self.file.tell() > before else failures + 1
                    is_answer = isinstance(error, urllib.error.HTTPError)
                    reason = error if is_answer else getattr(error, "reason", None) or error
                    if failures > _RETRIES:
                        raise RunError(
                            f"{self.url}: {reason}; {_RETRIES} retries did not help. Run the same line again to go on "
                            f"with {part}, or {self.elsewhere}"
                        ) from error
                    wait_s = self.retry_wait_s * 2 ** (failures - 1)
                    arrived = gigabytes(self.file.tell())
                    log(f"{self.path.name}: {reason}, after {arrived}. Trying again in {wait_s:g} s")
                    time.sleep(wait_s)
            os.fsync(self.file.fileno())
        if is_complete:
            os.replace(part, self.path)
            self.validator.unlink(missing_ok=True)
        return is_complete

    def _receive(self) -> bool:
        """One request, for all bytes that are missing and wanted; whether the file is complete."""
        offset = self.file.tell()
        if offset and offset == self.size:
            return True
        # some servers refuse Python's own agent name
        headers = {"User-Agent": "Mozilla/5.0 (compatible; micro-omni)", "Accept-Encoding": "identity"}
        if offset and (known := self._known_validator()):
            headers |= {"Range": f"bytes={offset}-", "If-Range": known}
        try:
            response = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{offset}":
                return True  # the last run was killed between the last byte and the renaming
            if error.code == 416:
                _start_over(self.file)
                raise ConnectionError(f"HTTP 416 for byte {offset:,} and up, starting over") from error
            if error.code in _TRANSIENT_STATUS:
                raise
            raise RunError(f"{self.url}: {error}. You can {self.elsewhere}") from error
        except ValueError as error:  # redirected to an invalid address
            raise RunError(f"{self.url}: {error}. You can {self.elsewhere}") from error
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
            until = None if total is None else max(offset, min(self.wanted(total), total))
            if until is not None:
                check_space(self.path.parent, until - offset + self.space_for(total))
                part = f"the first {gigabytes(until)} of " if until < total else ""
                going_on = f", going on at {gigabytes(offset)}" if offset else ""
                log(f"{self.path.name}: {part}{gigabytes(total)} from {self.url}{going_on}")
            self.bar.total, self.bar.n = until, offset
            return self._store(response, total, until)

    def _store(self, response: http.client.HTTPResponse, total: int | None, until: int | None) -> bool:
        """Append the answer to the file, up to byte ``until``; whether the file is complete."""
        most = self.most_bytes if total is None else total
        until_end = until == total  # of the answer, which may come too late
        while block := response.read1(BLOCK_BYTES if until_end else min(BLOCK_BYTES, until - self.file.tell())):
            if self.file.tell() + len(block) > most:
                _start_over(self.file)
                raise RunError(f"{self.url}: expected {most:,} bytes at most, the server sends more")
            self.file.write(block)
            self.file.flush()  # received bytes survive a kill
            self.bar.update(len(block))
        if until is not None and self.file.tell() < until:
            raise ConnectionError("connection cut")
        return total is None or self.file.tell() == total

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
