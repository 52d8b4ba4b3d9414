"""A lock on a folder: at most one process works in it."""

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from omni.common.errors import UserError
from omni.common.files import remove_temporary


class FolderInUse(UserError):
    """Another process holds the folder's lock."""


def _open_lock(path: Path) -> TextIO:
    """Open or create a lock file, which contains the PID of the process that holds it."""
    try:
        # follows no link, and does not wait for the other end of a pipe
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise UserError(f"{path}: expected a lock file, found something else. Move it away") from error
    facts = os.fstat(number)
    # a second name (hard link) means that it is another program's file
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1 or os.pread(number, 32, 0).strip(b"0123456789"):
        os.close(number)
        raise UserError(f"{path}: expected the lock file of a run, found another program's. Move it away")
    return open(number, "r+", encoding="utf-8")


class FolderLock:
    """At most one process works in a folder.

    A POSIX record lock (``fcntl.lockf``) belongs to this process alone: data loader workers do not inherit it, so
    after a SIGKILL the folder is free at once, even while orphaned workers are still running. The next holder deletes
    the partial files of a killed one. A context manager that releases the lock at the end.

    Raises:
        FolderInUse: another process has the lock.
        UserError: ``.lock`` is not a lock file; it is left as it is.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        while True:
            self.file = _open_lock(self.path)
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self.file.read().strip() or "unknown"
                self.file.close()
                raise FolderInUse(f"{folder}: already in use by process {holder}. Wait for it, or stop it") from None
            # the previous holder may have removed the file between our open and our lock
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(self.file.fileno()).st_ino == self.path.stat().st_ino:
                    break
            self.file.close()
        self.file.truncate(0)
        self.file.write(str(os.getpid()))
        self.file.flush()
        remove_temporary(folder)

    @classmethod
    def wait_for(cls, folder: Path, log: Callable[[str], None], check_stop: Callable[[], None]) -> "FolderLock":
        """The lock of ``folder``, once the process that prepares data there has finished."""
        logged = False
        while True:
            try:
                return cls(folder)
            except FolderInUse as error:
                if not logged:
                    log(f"{error}: waiting")
                logged = True
            check_stop()
            time.sleep(0.2)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()
