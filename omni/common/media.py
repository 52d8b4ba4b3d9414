"""The pictures and recordings that rows name: a file, a part of one, or a data URI that contains the bytes.

A part of a file has its place after the name. ``interview.wav#t=12.5,17`` are 4.5 seconds of a recording, as in W3C's
"Media Fragments URI 1.0"; without the second number, the part lasts to the end. ``shard.tar#bytes=1536,4096`` is a file
inside another: its first byte there, and the byte after its last.
"""

import base64
import binascii
import io
import os
import re
import stat
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from omni.common.errors import BadRow

_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Inline:
    """A picture or recording inside the manifest itself: the bytes of a data URI (RFC 2397)."""

    data: bytes
    media_type: str  # as the URI declares it; readers go by the content

    def __str__(self) -> str:
        return f"data:{quoted(self.media_type)} ({len(self.data):,} bytes)"


@dataclass(frozen=True)
class Section:
    """A file inside another: ``size`` bytes from byte ``start`` on."""

    path: Path
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}#bytes={self.start},{self.start + self.size}"

    def read(self) -> Inline:
        """
        Raises:
            BadRow: the outer file cannot be read, or ends earlier.
        """
        with open_media(self.path) as file:
            if (size := os.fstat(file.fileno()).st_size) < self.start + self.size:  # before memory is taken for it
                raise BadRow(f"{quoted(self)}: the file has {size:,} bytes")
            file.seek(self.start)
            return Inline(file.read(self.size), "")


@dataclass(frozen=True)
class Clip:
    """A part of a recording."""

    source: "str | Path | Inline | Section"
    start_s: float
    end_s: float | None  # None: to the end

    def __str__(self) -> str:
        return f"{self.source}#t={self.start_s:g}," + ("" if self.end_s is None else f"{self.end_s:g}")


Media = str | Path | Inline | Section | Clip
_NUMBER = r"(\d+(?:\.\d*)?)"
_TIME = re.compile(rf"(.+)#t={_NUMBER}(?:,{_NUMBER}?)?")
_BYTES = re.compile(r"(.+)#bytes=(\d+),(\d+)")


def split_fragment(name: str) -> tuple[str, Callable[[Path], Section | Clip]] | None:
    """The name of the outer file, and what makes a part of it; None if ``name`` has no part after it.

    Raises:
        BadRow: the part ends before it begins.
    """
    if found := _TIME.fullmatch(name):
        start, end = float(found[2]), float(found[3]) if found[3] else None
        part, ends_before = (lambda path: Clip(path, start, end)), end is not None and end <= start
    elif found := _BYTES.fullmatch(name):
        first, stop = int(found[2]), int(found[3])
        part, ends_before = (lambda path: Section(path, first, stop - first)), stop < first
    else:
        return None
    if ends_before:
        raise BadRow(f"{quoted(name)}: expected an end after the start")
    return found[1], part


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
        body = b"".join(body.split())  # white space is ignored
        try:
            body = base64.b64decode(body + b"=" * (-len(body) % 4), validate=True)
        except binascii.Error as error:
            raise BadRow(f"{quoted(uri)}: not valid base64: {error}") from error
    return Inline(body, media_type or "text/plain")


def open_media(source: Media) -> BinaryIO:
    """Open a regular file, a file inside another, or the bytes of a data URI, for reading, without blocking.

    Raises:
        BadRow: the file is missing, unreadable, or not regular: a folder, a pipe, a device.
    """
    if isinstance(source, Clip):
        return open_media(source.source)
    if isinstance(source, Section):
        source = source.read()
    if isinstance(source, Inline):
        return io.BytesIO(source.data)
    try:
        # O_NONBLOCK: opening a named pipe would wait for a writer
        number = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte or half a surrogate pair in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadRow(f"{quoted(source)}: {reason}") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise BadRow(f"{quoted(source)}: expected a file, found a folder, pipe or device")
    return open(number, "rb")


Kind = Literal["picture", "film", "sound", "unknown"]
_SNIFFED_BYTES = 377  # the first bytes of three packets of an MPEG transport stream
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")
_SOUNDS = (b"fLaC", b"OggS", b"ID3", b"RF64", b"RIFX", b"FORM", b"caff", b".snd", b"riff")
_RIFF = {b"WEBP": "picture", b"WAVE": "sound"}
_EBML = b"\x1a\x45\xdf\xa3"  # Matroska and WebM
_STILL = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # still pictures in an MP4 container


def kind_of(source: Media) -> Kind:
    """The kind of a file by its content, since names may be wrong or missing. An animated picture is a picture, and a
    film container with sound alone is sound.

    Raises:
        BadRow: the file cannot be opened.
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
    """Film or sound; cover art is not a film."""
    import av  # here: it loads slowly, and rows do not need it
    from av.stream import Disposition

    file.seek(0)
    try:
        with av.open(file, options={"format_whitelist": "mov,matroska,avi,mpegts"}) as container:
            films = [track for track in container.streams.video if Disposition.attached_pic not in track.disposition]
            return "film" if films or not container.streams.audio else "sound"
    except (av.FFmpegError, ValueError, OSError):  # damaged: reading it reports how
        return "film"


def _is_mpeg_audio(head: bytes) -> bool:
    """Whether a file begins with a frame of MP3 or AAC (ADTS), without a tag."""
    if len(head) < 3 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    if head[1] & 0xF6 == 0xF0:  # ADTS
        return head[2] >> 2 & 0xF < 13
    return head[1] >> 3 & 3 != 1 and head[1] >> 1 & 3 != 0 and head[2] >> 4 != 15 and head[2] >> 2 & 3 != 3


def quoted(name: object) -> str:
    """A name for a message: shortened, its control characters escaped."""
    text = str(name)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[: _SHOWN_CHARACTERS - 20]}... ({len(text):,} characters)"
    return visible(text)


def visible(text: str) -> str:
    """``text`` with its control characters, line ends and lone surrogates written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
