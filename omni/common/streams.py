"""Standard input, output and error of a process that outlives its terminal.

If a terminal is closed, a pipe's reader exits, or ``>&-`` closes a stream, training goes on with training.log.
"""

import contextlib
import errno
import os
import sys

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ESTALE)  # there is no reader any more


def secure() -> None:
    """Replace missing streams, and make writing to stderr safe. Call this first.

    ``open`` returns the lowest free descriptor: with 0, 1 or 2 closed, a checkpoint would get the number that a library
    takes for the terminal.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # takes the closed number, if that is still free
            setattr(sys, name, open(null, mode, buffering=1, closefd=False))
    stream = sys.stderr
    stream.write, stream.flush = _lasting(stream, stream.write), _lasting(stream, stream.flush)


def silence(number: int) -> None:
    """Discard what is written to the descriptor from now on."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, number)
    os.close(null)


def _lasting(stream, function):
    def call(*args):
        try:
            return function(*args)
        except OSError:
            silence(stream.fileno())

    return call


def write_at_once(text: str) -> None:
    """Write to stderr from a signal handler: the main program may be in the middle of a ``print``."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), text.encode())
