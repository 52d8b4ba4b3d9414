"""What can be wrong: a row of the data, or the three ways in which a run ends early, each with its exit code.

A message is one line: what is wrong, where, what was expected, what to do next.
"""

import contextlib
from collections.abc import Iterator

EXIT_FAILED = 1  # the run could not go on: disk full, loss not finite, every checkpoint damaged
EXIT_BAD_INPUT = 2  # config, data or arguments are wrong; nothing was written
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: state is saved, run the same line again


class UserError(Exception):
    """Something that the user gave is wrong: a config key, a file, a row, an argument."""

    exit_code = EXIT_BAD_INPUT


class RunError(Exception):
    """The run cannot continue; the last good checkpoint stands."""

    exit_code = EXIT_FAILED


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived, and the state is saved."""

    exit_code = EXIT_INTERRUPTED


class BadRow(Exception):
    """This row of the data cannot be used. The message says why, without file and row number."""


@contextlib.contextmanager
def reading_row() -> Iterator[None]:
    """Whatever goes wrong in here is a row's: damaged files make decoders raise anything, even MemoryError for a size
    that a header claims, and what Rust code raises is no ``Exception``. Only a wish to stop is passed on.

    Raises:
        BadRow: with the exception's kind and the first line of its message.
    """
    try:
        yield
    except (BadRow, Interrupted, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        message = str(error).strip().partition("\n")[0]
        text = f"{type(error).__name__}: {message}" if message else type(error).__name__
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        raise BadRow(shown if len(shown) <= 300 else shown[:300] + "...") from error
