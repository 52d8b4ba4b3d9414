"""Finds where each row of a CSV, JSONL or JSON file begins and ends, in one pass and in bounded memory.

CSV: the rows are those of Python's ``csv.reader`` over the file opened with ``newline=""``. A line ends with LF, CRLF
or CR. A quotation mark opens a quoted field only at the beginning of a field; inside a quoted field, two marks are one,
and line ends belong to the field. JSONL: lines with the same ends. JSON: the elements of an array.

Departures from ``csv.reader``, each with a message: a quotation mark that is never closed is refused, since the rest of
the file would be one row; a row over several lines with text after a closing quotation mark is bad (two stray marks
have joined many rows); so is a row that a single CR cuts in two, in a file whose header ends otherwise.
"""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from omni.common.errors import BadRow, UserError
from omni.common.media import quoted

MAX_ROW_BYTES = 1 << 20
# a quotation mark at the beginning of a field, by delimiter
_OPENING = {mark: re.compile(rb'(?<![^%s\r\n])"' % mark.encode()) for mark in ",;"}
# the next bracket, brace or quotation mark, past strings without escapes; between elements also a comma
_JSON_TOKEN = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+")*+(["\[\]{}])')
_JSON_TOKEN_OUTSIDE = re.compile(rb'[^"\[\]{},]*+(["\[\]{},])')
_STRING_END = re.compile(rb'["\\]')
_JSON_BLANKS = b" \t\r\n"


class Record(NamedTuple):
    """A row's bytes ``start`` to ``end`` of the file; ``data`` is None if they are more than ``MAX_ROW_BYTES``."""

    start: int
    end: int
    data: bytes | None

    @property
    def is_blank(self) -> bool:
        return self.data is not None and not self.data.strip()


class _Gatherer:
    """Cuts a stream of chunks into records; it holds the bytes of one, up to ``MAX_ROW_BYTES``."""

    def __init__(self, start: int) -> None:
        self.start = self.at = start  # first byte of the open record, and of the next chunk
        self.held: bytearray | None = bytearray()

    def add(self, data: bytes) -> None:
        self.at += len(data)
        if self.held is not None:
            self.held += data
            if len(self.held) > MAX_ROW_BYTES:
                self.held = None

    def close(self, data: bytes = b"") -> Record:
        """The open record, which ends with ``data``."""
        if not self.held and self.at == self.start and len(data) <= MAX_ROW_BYTES:  # most records lie in one chunk
            record = Record(self.start, self.start + len(data), data)
            self.start = self.at = record.end
            return record
        self.add(data)
        record = Record(self.start, self.at, None if self.held is None else bytes(self.held))
        self.start, self.held = self.at, bytearray()
        return record


def other_encoding(head: bytes) -> str | None:
    """The encoding of a file that begins with ``head``, if that is plainly not UTF-8."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16, by its byte-order mark"
    if head[:4096].count(0) * 3 > len(head[:4096]):  # in UTF-16, every other byte of ASCII letters
        return "NUL bytes, as UTF-16 has"
    return None


def without_bom(chunks: Iterator[bytes]) -> tuple[int, Iterator[bytes]]:
    """The length of the byte-order mark, and the chunks without it. Chunks may be as short as one byte."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= 3:
            break
    size = 3 if head.startswith(codecs.BOM_UTF8) else 0

    def rest() -> Iterator[bytes]:
        if head[size:]:
            yield head[size:]
        yield from chunks

    return size, rest()


def line_of(path: Path, byte: int) -> int:
    """The line number, from 1, of a byte of the file."""
    lines, left, previous = 1, byte, b""
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            left -= len(chunk)
            text = previous + chunk
            lines += text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")
            previous = b"\r" if chunk.endswith(b"\r") else b""
            lines -= len(previous)  # counted with the next chunk
    return lines + len(previous)


def _refuse_nul(path: Path, chunk: bytes, first: int) -> None:
    if (nul := chunk.find(b"\0")) >= 0:
        raise UserError(f"{path}: line {line_of(path, first + nul)}: found a NUL byte, expected UTF-8 text")


def line_records(path: Path, chunks: Iterator[bytes], *, quotes: str | None) -> Iterator[Record]:
    """The rows of a CSV or the lines of a JSONL, blank ones and the line ends included: every byte of the file but its
    byte-order mark is in one record.

    Args:
        quotes: the delimiter after which a quotation mark opens a field; None: no field is quoted.

    Raises:
        UserError: a NUL byte, or a quotation mark that is never closed.
    """
    start, chunks = without_bom(chunks)
    record = _Gatherer(start)
    previous, in_quotes, quote_seen, opened = b"\n", False, False, 0
    for chunk in chunks:
        first = record.at  # byte of the file that chunk begins with
        _refuse_nul(path, chunk, first)
        text = previous + chunk  # the byte before tells whether a quotation mark begins a field
        pending = previous == b"\r" and not in_quotes  # a line end, unless the LF of a CRLF follows
        quoted_spans = []
        if quotes and (in_quotes or b'"' in chunk):
            at, begin = 1, 1
            while True:
                if not in_quotes:
                    if (opening := _OPENING[quotes].search(text, at)) is None:
                        break
                    begin, at, in_quotes, quote_seen = opening.start(), opening.end(), True, False
                    opened = first + begin - 1
                if not quote_seen:
                    at = text.find(b'"', at) + 1  # after a mark that closes the field or is the first of two
                    if not at:
                        break
                quote_seen = True
                if at == len(text):
                    break
                if text[at] == ord('"'):
                    at, quote_seen = at + 1, False
                else:
                    quoted_spans.append((begin, at))
                    in_quotes = quote_seen = False
            if in_quotes:
                quoted_spans.append((begin, len(text)))
        ends = _line_ends(text, pending)
        if quoted_spans:
            begins, stops = np.array(quoted_spans).T
            span = np.searchsorted(begins, ends - 1, side="right") - 1  # ends are after their last byte
            ends = ends[(span < 0) | (ends > stops[span])]
        at = 1
        for end in ends.tolist():
            yield record.close(text[at:end])
            at = end
        record.add(text[at:])
        previous = text[-1:]
    if in_quotes and not quote_seen:
        raise UserError(
            f"{path}: line {line_of(path, opened)}: a quotation mark opens a field and is never closed, so that the "
            "rest of the file would be one row. Close it, or leave it away"
        )
    if record.at > record.start:
        yield record.close()


def _line_ends(text: bytes, pending: bool) -> np.ndarray:
    """Positions after each line end in ``text[1:]``; of ``text[0]`` too if it is a CR that is ``pending``. A CR at
    the end is left to the next chunk."""
    array = np.frombuffer(text, np.uint8)
    is_end = array == ord("\n")
    is_end[0] = False
    if pending or b"\r" in text:
        is_cr = array == ord("\r")
        is_cr[0] = pending
        is_end[:-1] |= is_cr[:-1] & (array[1:] != ord("\n"))
    return np.flatnonzero(is_end) + 1


def json_records(path: Path, chunks: Iterator[bytes]) -> Iterator[Record]:
    """The elements of a JSON array.

    Raises:
        UserError: the file is not an array, is not closed, or something follows the array.
    """
    start, chunks = without_bom(chunks)
    record = _Gatherer(start)
    depth, in_string, escaped, closed = 0, False, False, False
    for chunk in chunks:
        _refuse_nul(path, chunk, record.at)
        at = done = 0
        if not depth and not closed:
            at = len(chunk) - len(chunk.lstrip(_JSON_BLANKS))
            if at == len(chunk):
                record.close(chunk)
                continue
            if chunk[at : at + 1] != b"[":
                found = quoted(chunk[at : at + 1].decode("utf-8", "replace"))
                raise UserError(f'{path}: expected a JSON array of objects, found "{found}" at the beginning')
        while not closed:
            if in_string:
                if escaped:
                    at, escaped = at + 1, False
                if (found := _STRING_END.search(chunk, at)) is None:
                    break
                at = found.end()
                if found[0] == b"\\":
                    escaped = True
                    if at == len(chunk):
                        break
                else:
                    in_string = False
                continue
            if (found := (_JSON_TOKEN if depth > 1 else _JSON_TOKEN_OUTSIDE).match(chunk, at)) is None:
                break
            at, token = found.end(), found[1]
            if token == b'"':
                in_string = True
            elif token in b"[{":
                depth += 1
                if depth == 1:
                    record.close(chunk[done:at])
                    done = at
            elif token in b"]}":
                depth -= 1
                closed = depth == 0
                if closed and token != b"]":
                    raise UserError(f"{path}: line {line_of(path, record.at + at - 1 - done)}: expected ], found }}")
            if closed or token == b"," and depth == 1:
                yield record.close(chunk[done : at - 1])
                record.close(chunk[at - 1 : at])
                done = at
        if closed and chunk[done:].strip(_JSON_BLANKS):
            where = line_of(path, record.at + len(chunk[done:]) - len(chunk[done:].lstrip(_JSON_BLANKS)))
            raise UserError(f"{path}: line {where}: expected nothing after the end of the array")
        record.add(chunk[done:])
        if closed:
            record.close()
    if not closed:
        raise UserError(
            f"{path}: expected a JSON array, found no end of it" if depth else f"{path}: expected a JSON array"
        )


# ---------------------------------------------------------------------------------------------------------------
# One row


def decode(data: bytes | None) -> str:
    """
    Raises:
        BadRow: longer than ``MAX_ROW_BYTES``, or not UTF-8.
    """
    if data is None:
        raise BadRow(f"longer than {MAX_ROW_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"expected UTF-8 text, found byte {data[error.start]:#x}") from error
