"""What a row may name as its picture or recording, and how it is opened: a file, or a data URI that holds the bytes."""

import base64
import binascii
import io
import os
import stat
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from omni.errors import BadRow

_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Inline:
    """The bytes of a picture or recording that stand in the manifest itself, as a data URI (RFC 2397)."""

    data: bytes
    media_type: str  # as the URI says it; readers go by the content

    def __str__(self) -> str:
        return f"data:{quoted(self.media_type)} ({len(self.data):,} bytes)"


Media = str | Path | Inline


def is_data_uri(name: str) -> bool:
    return name[:5].lower() == "data:"


def parse_data_uri(uri: str) -> Inline:
    """``data:image/png;base64,...`` or ``data:text/plain,percent%20encoded``.

    Raises:
        BadRow: no comma, or not valid base64.
    """
    head, comma, body = uri[5:].partition(",")
    if not comma:
        raise BadRow(f"expected a data URI (data:TYPE;base64,BYTES), found {quoted(uri)}")
    media_type, *options = head.split(";")
    body = urllib.parse.unquote_to_bytes(body)
    if "base64" in (option.strip().lower() for option in options):
        body = b"".join(body.split())  # blanks and line ends mean nothing
        try:
            body = base64.b64decode(body + b"=" * (-len(body) % 4), validate=True)
        except binascii.Error as error:
            raise BadRow(f"{quoted(uri)}: not valid base64: {error}") from error
    return Inline(body, media_type or "text/plain")


def open_media(source: Media) -> BinaryIO:
    """Open a regular file, or the bytes of a data URI, for reading; nothing else is waited for.

    Raises:
        BadRow: there is no such file, it must not be read, or it is no file: a folder, a pipe, a device.
    """
    if isinstance(source, Inline):
        return io.BytesIO(source.data)
    try:
        # O_NONBLOCK: opening a named pipe would wait for somebody who writes
        number = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte or half a surrogate pair in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadRow(f"{quoted(source)}: {reason}") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise BadRow(f"{quoted(source)}: expected a file, found a folder, pipe or device")
    return open(number, "rb")


def quoted(name: object) -> str:
    """A name as a message shows it: shortened, and nothing in it reaches the terminal as a control character."""
    text = str(name)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[: _SHOWN_CHARACTERS - 20]}... ({len(text):,} characters)"
    return visible(text)


def visible(text: str) -> str:
    """``text`` with its control characters, line ends and lone surrogates written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
