"""Protection of the web page, without Gradio: turns at the model, bounds on requests, and a folder for files."""

import asyncio
import contextlib
import contextvars
import fcntl
import ipaddress
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omni.common.errors import UserError
from omni.common.media import quoted

# ---------------------------------------------------------------------------------------------------------------
# Turns

SLICE_S = 0.05  # computing time of a job before the next has its turn


class Turns:
    """One thread computes for all visitors, round robin in slices of time, so that a short request does not wait for a
    long one. A second thread reads files one by one: a large file delays no answer, and only one is in memory.

    Args:
        most: largest number of jobs at a time, waiting ones included.
    """

    def __init__(self, most: int) -> None:
        self.most, self.jobs = most, 0
        self._model, self._files = ThreadPoolExecutor(1, "model"), ThreadPoolExecutor(1, "files")

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """A job that takes turns.

        Raises:
            UserError: there are too many jobs.
        """
        if self.jobs >= self.most:
            raise UserError(f"{self.jobs} requests are being answered, which is as many as this page takes. Try later")
        self.jobs += 1
        try:
            yield
        finally:
            self.jobs -= 1

    async def compute(self, function: Callable, *arguments):
        """The result of ``function``, computed when its turn comes, unless its job is cancelled before."""
        return await _run(self._model, function, arguments)

    async def read(self, function: Callable, *arguments):
        """``compute`` in the thread that reads files."""
        return await _run(self._files, function, arguments)

    async def slices(self, pieces: Iterator) -> AsyncIterator[list]:
        """Yield the items of ``pieces`` in lists, each computed in one slice of time, with at least one item."""
        while slice_ := await self.compute(_slice, pieces):
            yield slice_


async def _run(thread: ThreadPoolExecutor, function: Callable, arguments: tuple):
    context = contextvars.copy_context()  # assigns warnings to Gradio's visitors
    return await asyncio.get_running_loop().run_in_executor(thread, context.run, function, *arguments)


def _slice(pieces: Iterator) -> list:
    end, taken = time.monotonic() + SLICE_S, []
    for piece in pieces:
        taken.append(piece)
        if time.monotonic() >= end:
            break
    return taken


# ---------------------------------------------------------------------------------------------------------------
# The folder

_PREFIX, _OWNER = "omni_web_", ".owner"
_MARK = b"folder of a page of scripts/web_demo.py\n"
_BLOCK = 1 << 16  # bytes that each file counts at least, to bound the number of files


class Folder:
    """The page's uploads and speech on disk, of bounded total size.

    Args:
        max_bytes: of all files.
        kept_s: seconds from the last writing of a file to its deletion.
    """

    def __init__(self, path: Path, max_bytes: int, kept_s: float) -> None:
        self.path, self.max_bytes, self.kept_s, self.used, self._lock = path, max_bytes, kept_s, 0, threading.Lock()
        self.own = frozenset()

    def keep_what_is_there(self) -> None:
        """Never delete the files that exist now."""
        self.own = frozenset(path for path, _ in self._files())

    def clean(self) -> None:
        """Delete old files, unfinished uploads included, and count the others."""
        used, oldest = 0, time.time() - self.kept_s
        for path, found in self._files():
            if path in self.own:
                continue
            if found.st_mtime < oldest:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            else:
                used += max(_BLOCK, found.st_size)
        with self._lock:
            self.used = used

    def take(self, size: int) -> bool:
        """Reserve ``size`` bytes; False if there is no room for them."""
        with self._lock:
            fits = self.used + size <= self.max_bytes
            self.used += size if fits else 0
            return fits

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        for folder, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    yield os.path.join(folder, name), os.lstat(os.path.join(folder, name))


@contextlib.contextmanager
def own_folder(parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder, deleted at the end. Folders of killed pages are deleted now.

    Each contains a file that its page keeps locked while it runs.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for path in parent.glob(f"{_PREFIX}*"):
        _delete_if_dead(path)
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        unnamed = path / f"{_OWNER}.new"  # locked before another page takes it for a dead page's
        with unnamed.open("xb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            owner.write(_MARK + b"%d\n" % os.getpid())
            owner.flush()
            unnamed.rename(path / _OWNER)
            yield path
    finally:
        shutil.rmtree(path)


def _delete_if_dead(path: Path) -> None:
    """Delete ``path`` if it is the folder of a page that no longer runs."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # a file, a link, or another user's folder
        return
    try:
        owner = os.open(_OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return
    finally:
        os.close(folder)
    try:
        found = os.fstat(owner)
        if found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode) and os.read(owner, len(_MARK)) == _MARK:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:  # its page lives
        pass
    finally:
        os.close(owner)


# ---------------------------------------------------------------------------------------------------------------
# Requests

# The browser refuses to load from other machines, whatever Gradio puts into the page.
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
UPLOAD = "/gradio_api/upload"
# Other routes that the page uses. Gradio has more; some of them write files or start programs.
SENDS = ("/gradio_api/queue/join", "/gradio_api/run/", "/gradio_api/api/", "/gradio_api/cancel", "/gradio_api/reset")
# Routes of GET that write a file or load from elsewhere.
CLOSED = re.compile("/gradio_api/(deep_link|proxy=|file[=/]https?:)", re.IGNORECASE)
MAX_JSON_BYTES = 1_000_000  # a text of the greatest length, each character escaped
IDLE_S = 30  # longest wait for the next bytes of a request


class Refused(Exception):
    """An answer in place of the page's.

    Args:
        status: HTTP's.
        reason: one line.
    """

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason


class Guard:
    """ASGI: passes the page's own requests, of bounded size, to ``app``; adds POLICY to every response.

    Args:
        names: lower-case host names by which the page may be called; another site may point its own name here.
            Addresses are always allowed, as no site can redirect them.
        origins: other origins (``https://example.org``) whose pages may use this one.
        folder: where uploads go.
        max_upload: bytes of all files in one request.
    """

    def __init__(self, app, names: set[str], origins: set[str], folder: Folder, max_upload: int) -> None:
        self.app, self.names, self.origins, self.folder, self.max_upload = app, names, origins, folder, max_upload

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":  # the start and the end of the server
            await self.app(scope, receive, send)
            return
        exchange = Exchange(receive, send)
        try:
            is_upload = self._check(scope)
            if is_upload:
                await self._make_room(exchange)
            elif scope["method"] == "POST":
                await exchange.read_all(MAX_JSON_BYTES)
            await self.app(scope, exchange.receive, exchange.send)
        except Refused as refusal:
            exchange.refusal = refusal
        except Exception:
            if exchange.refusal is None:  # else it is the app's, whose request was ended
                raise
        await exchange.end()

    def _check(self, scope) -> bool:
        """Whether the request is an upload; raises ``Refused`` for requests that are not the page's."""
        headers, path = dict(scope["headers"]), scope["path"]
        host, origin = headers.get(b"host", b"").decode("latin-1").lower(), headers.get(b"origin")
        if not self._is_ours(host):
            raise Refused(403, f"this page is not called {quoted(host)}. Allow it with --allow_origin http://NAME")
        if origin is not None:
            origin = origin.decode("latin-1").lower()
            if origin not in (f"http://{host}", f"https://{host}") and origin not in self.origins:
                raise Refused(403, f"pages of {quoted(origin)} must not use this one")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise Refused(405, f"expected GET, HEAD or POST, found {quoted(scope['method'])}")
        if CLOSED.match(path) or (scope["method"] == "POST" and path != UPLOAD and not path.startswith(SENDS)):
            raise Refused(404, "this page has no such part")
        is_upload = scope["method"] == "POST" and path == UPLOAD
        if int(headers.get(b"content-length", 0)) > (limit := self.max_upload if is_upload else MAX_JSON_BYTES):
            raise _too_large(limit)
        return is_upload

    def _is_ours(self, host: str) -> bool:
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    async def _make_room(self, exchange: "Exchange") -> None:
        """Bound the disk space of the upload while it arrives."""
        await asyncio.to_thread(self.folder.clean)
        arrived = 0

        def count(size: int) -> None:
            nonlocal arrived
            arrived += size
            if arrived > self.max_upload:
                raise _too_large(self.max_upload)
            if not self.folder.take(size):
                raise Refused(507, "the page's disk space is used up. Files are deleted after an hour; try later")

        exchange.on_bytes = count
        count(0)


def _too_large(limit: int) -> Refused:
    return Refused(413, f"expected at most {limit / 1e6:g} MB")


class Exchange:
    """A request and its response; both end once ``refusal`` is set."""

    def __init__(self, receive, send) -> None:
        self._receive, self._send = receive, send
        self.refusal: Refused | None = None
        self.on_bytes: Callable[[int], None] = lambda size: None  # may raise Refused
        self._body: bytes | None = None
        self._ended = self._answered = False

    async def receive(self) -> dict:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._ended:  # the only event left is the end of the connection
            return await self._receive()
        try:
            return await self._next()
        except Refused as refusal:
            self.refusal = refusal
            return {"type": "http.disconnect"}

    async def _next(self) -> dict:
        try:
            event = await asyncio.wait_for(self._receive(), IDLE_S)
        except TimeoutError:
            raise Refused(408, f"nothing came for {IDLE_S} s") from None
        self._ended = not event.get("more_body", False)
        self.on_bytes(len(event.get("body", b"")))
        return event

    async def read_all(self, most: int) -> None:
        """Read the whole body, so that no work begins before its size is known."""
        body = bytearray()
        while not self._ended:
            body += (await self._next()).get("body", b"")
            if len(body) > most:
                raise _too_large(most)
        self._body = bytes(body)

    async def send(self, event: dict) -> None:
        if self.refusal is not None and not self._answered:
            return
        if event["type"] == "http.response.start":
            self._answered = True
            event["headers"] = [*event["headers"], (b"content-security-policy", POLICY)]
        await self._send(event)

    async def end(self) -> None:
        """Send the refusal in the form that the page shows, unless a response has begun."""
        if self.refusal is not None and not self._answered:
            body = json.dumps({"detail": self.refusal.reason}).encode() + b"\n"
            head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await self._send({"type": "http.response.start", "status": self.refusal.status, "headers": head})
            await self._send({"type": "http.response.body", "body": body})


def names_of(host: str, address: str, origins: set[str]) -> set[str]:
    """Lower-case host names of a page that listens at ``address`` (``host`` of the command line)."""
    names = {"localhost", host.lower()} | {urllib.parse.urlsplit(origin).hostname or "" for origin in origins}
    if not ipaddress.ip_address(address).is_loopback:
        name = socket.gethostname().lower()
        names |= {name, f"{name}.local", name.split(".")[0]}
    return names
