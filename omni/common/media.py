"""What a row may name as its picture or recording, and how it is opened: a file, or a data URI that holds the bytes."""

import base64
import binascii
import io
import os
import stat
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from omni.common.errors import BadRow

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


Kind = Literal["picture", "film", "sound", "unknown"]
_SNIFFED_BYTES = 377  # enough to see three packets of a TS begin
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")
_SOUNDS = (b"fLaC", b"OggS", b"ID3", b"RF64", b"RIFX", b"FORM", b"caff", b".snd", b"riff")
_RIFF = {b"WEBP": "picture", b"WAVE": "sound"}
_EBML = b"\x1a\x45\xdf\xa3"  # Matroska and WebM
_STILL = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # pictures in MP4's kind of file


def kind_of(source: Media) -> Kind:
    """What a file holds, by its content: names lie, and uploads have lost theirs. An animated picture is a picture,
    and a film that has no more than sound is sound.

    Raises:
        BadRow: it cannot be opened.
    """
    with open_media(source) as file:
        head = file.read(_SNIFFED_BYTES)
        if head.startswith(b"RIFF"):
            form = head[8:12]
            return _of_container(file) if form == b"AVI " else _RIFF.get(form, "unknown")
        if head.startswith(_PICTURES) or (head[4:8] == b"ftyp" and head[8:12] in _STILL):
            return "picture"
        if head.startswith(_SOUNDS) or _is_mpeg_audio(head):
            return "sound"
        is_transport_stream = len(head) == _SNIFFED_BYTES and head[0] == head[188] == head[376] == 0x47
        if head.startswith(_EBML) or head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free") or is_transport_stream:
            return _of_container(file)
    return "unknown"


def _of_container(file: BinaryIO) -> Kind:
    """Film or sound; a cover is no film."""
    import av  # here: it takes long to load, and rows have no need of it
    from av.stream import Disposition

    file.seek(0)
    try:
        with av.open(file, options={"format_whitelist": "mov,matroska,avi,mpegts"}) as container:
            films = [track for track in container.streams.video if Disposition.attached_pic not in track.disposition]
            return "film" if films or not container.streams.audio else "sound"
    except (av.FFmpegError, ValueError, OSError):  # damaged: whoever reads it says how
        return "film"


def _is_mpeg_audio(head: bytes) -> bool:
    """MP3 or AAC (ADTS) without a tag: it begins with a frame."""
    if len(head) < 3 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    if head[1] & 0xF6 == 0xF0:  # ADTS
        return head[2] >> 2 & 0xF < 13
    return head[1] >> 3 & 3 != 1 and head[1] >> 1 & 3 != 0 and head[2] >> 4 != 15 and head[2] >> 2 & 3 != 3


def quoted(name: object) -> str:
    """A name as a message shows it: shortened, and nothing in it reaches the terminal as a control character."""
    text = str(name)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[: _SHOWN_CHARACTERS - 20]}... ({len(text):,} characters)"
    return visible(text)


def visible(text: str) -> str:
    """``text`` with its control characters, line ends and lone surrogates written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
