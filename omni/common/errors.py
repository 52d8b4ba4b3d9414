"""Exceptions: for rows that cannot be used, and for the three ways in which a run ends early, with their exit codes.

A message is one line: what is wrong, where, what was expected, what to do next.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

EXIT_FAILED = 1  # the run could not go on: disk full, loss not finite, every checkpoint damaged
EXIT_BAD_INPUT = 2  # config, data or arguments are wrong; nothing was written
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: state is saved, run the same line again
_SHOWN_CHARACTERS = 300


class UserError(Exception):
    """Something that the user gave is wrong: a config key, a file, a row, an argument."""

    exit_code = EXIT_BAD_INPUT


def check_compatible(
    one: Path | str,
    sizes: dict,
    other: Path | str,
    other_sizes: dict,
    may_differ: Container[str] = (),
    what: str = "it does",
) -> None:
    """
    Raises:
        UserError: the models differ in a key that ``may_differ`` lacks; the message names both and each difference.
    """
    found = [
        f"{key} {sizes.get(key)} here, {value} there"
        for key, value in other_sizes.items()
        if sizes.get(key) != value and key not in may_differ
    ]
    if found:
        raise UserError(f"{one}: {what} not fit to {other}: {', '.join(found)}")


class OneLineErrors(ArgumentParser):
    """A parser that raises ``UserError`` for a wrong command line."""

    def error(self, message: str) -> None:
        raise UserError(message)


class RunError(Exception):
    """The run cannot continue; the last good checkpoint is kept."""

    exit_code = EXIT_FAILED


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived, and the state is saved."""

    exit_code = EXIT_INTERRUPTED


class BadRow(Exception):
    """This row of the data cannot be used. The message says why, without file and row number."""


class TooLong(BadRow):
    """This row takes more positions than the model has."""


class GivenUp(BaseException):
    """The wait for a batch has ended; the row that is being read is not at fault."""


_PASSED_ON = (BadRow, Interrupted, GivenUp, KeyboardInterrupt, SystemExit, GeneratorExit)


class reading_row:
    """Context in which every exception but a request to stop becomes a ``BadRow``: for damaged files, decoders raise
    anything, even MemoryError for the size in a header, and Rust code raises a ``BaseException``.

    Raises:
        BadRow: with the exception's kind and the first line of its message.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if error is None or isinstance(error, _PASSED_ON):
            return
        message = str(error).strip().partition("\n")[0]
        text = f"{kind.__name__}: {message}" if message else kind.__name__
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        raise BadRow(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...") from error


# ---------------------------------------------------------------------------------------------------------------
# Notes on rows that were repaired while they were read

_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def note(text: str) -> None:
    """Report a repair: in the run's log, or on stderr where no run collects notes."""
    notes = _notes.get()
    if notes is None:
        print(text, file=sys.stderr)
    else:
        notes.append(text)


@contextmanager
def collected_notes() -> Iterator[list[str]]:
    """The notes made inside the block."""
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)
