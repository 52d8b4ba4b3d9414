"""Standard input, output and error of a process that outlives whoever started it.

If a terminal is closed, a pipe's reader leaves, or ``>&-`` gives no stream at all, training goes on with training.log.
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
            null = os.open(
                os.devnull, os.O_RDWR
            )  # the lowest free number, which is the closed one, if it is still free
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
    """To stderr, from a signal handler: the main program may be in the middle of a ``print``."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), text.encode())
