"""Lines of a text file of any size: read in chunks that end where lines do, and cut into samples."""

import codecs
import os
from collections.abc import Iterator
from pathlib import Path

from omni.common.errors import UserError
from omni.data.records import other_encoding

_CHUNK_BYTES = 16 << 20
PIECE_BYTES = 64 << 10


def read_chunks(path: Path, start: int = 0) -> Iterator[bytes]:
    """Consecutive chunks of about 16 MiB from byte ``start`` on, cut after a line's end where one is near.

    The cuts depend on the content alone, so an interrupted pass can resume at any of them.
    """
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK_BYTES):
            chunk += file.readline(PIECE_BYTES)
            cut = 0
            if not chunk.endswith(b"\n"):
                # after the last CR that is not the last byte; else, in a giant line, where a character ends
                end = chunk.rfind(b"\r", max(0, len(chunk) - 2 * PIECE_BYTES), -1) + 1
                end += chunk[end : end + 1] == b"\n"
                cut = len(chunk) - end if end and file.peek(1) else _incomplete_character(chunk)
            if 0 < cut < len(chunk):  # the rest is left to the next chunk
                file.seek(-cut, os.SEEK_CUR)
                chunk = chunk[:-cut]
            yield chunk


def line_spans(chunk: bytes, path: Path, first_row: int) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of each line of a chunk, without its line end and, in line 1 of the file,
    without the byte-order mark.

    Raises:
        UserError: the file is plainly not UTF-8.
    """
    if first_row == 1 and (encoding := other_encoding(chunk)):
        raise UserError(f"{path}: expected UTF-8 text, found {encoding}. Convert it with iconv")
    at = 0
    for line in chunk.splitlines(keepends=True):  # splits bytes at LF, CRLF and CR only
        start, end = at, at + len(line.rstrip(b"\r\n"))
        if first_row == 1 and at == 0 and line.startswith(codecs.BOM_UTF8):
            start = len(codecs.BOM_UTF8)
        yield start, max(start, end)
        at += len(line)


def count_lines(chunk: bytes) -> int:
    """Number of line ends in a chunk."""
    return chunk.count(b"\n") + chunk.count(b"\r") - chunk.count(b"\r\n")


def _incomplete_character(chunk: bytes) -> int:
    """Number of bytes, 0 to 3, of an incomplete UTF-8 character at the end."""
    for back in range(1, min(4, len(chunk) + 1)):
        byte = chunk[-back]
        if byte >= 0xC0:  # a leading byte: 110..., 1110... and 11110... announce 2, 3 and 4 bytes
            return back if back < (2 + (byte >= 0xE0) + (byte >= 0xF0)) else 0
        if byte < 0x80:
            break
    return 0


def split_samples(chunk: bytes, path: Path, first_row: int) -> Iterator[bytes]:
    """The samples of a chunk: its non-empty lines; a line over 64 KiB becomes several, cut before a space.

    Raises:
        UserError: a line is not UTF-8; the message names file and row.
    """
    for number, (start, end) in enumerate(line_spans(chunk, path, first_row), start=first_row):
        line = chunk[start:end]
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: row {number}: expected UTF-8 text, found byte {line[error.start]:#x}. "
                "If it is text in another encoding, convert it with iconv"
            ) from error
        while len(line) > PIECE_BYTES:
            cut = line.rfind(b" ", 1, PIECE_BYTES)
            if cut <= 0:
                cut = PIECE_BYTES
                while line[cut] & 0xC0 == 0x80:  # not inside a character
                    cut -= 1
            yield line[:cut]
            line = line[cut:]
        if line.strip():
            yield line
