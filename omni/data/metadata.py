"""Removes metadata from picture files, so that a broken profile, comment or thumbnail does not cost the picture."""

import io
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from omni.common.errors import BadRow
from omni.common.media import Media, quoted

MAX_FILE_BYTES = 256_000_000  # decoders load the whole file; four bytes for each of 64 megapixels
MAX_READS = 4_000_000  # some seconds for a file in small pieces; 200 MB of a GIF in full-size ones
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
# Chunks that determine the pixels, of animations too; and eXIf, which has the camera's orientation.
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"eXIf")


def without_metadata(source: Media, file: BinaryIO) -> BinaryIO:
    """``file`` (or, of a PNG or JPEG, a copy) for Pillow, which refuses a picture for its text, profile or resolution.

    If the structure itself is broken, the rest is left as it is, and the decoder decides.

    Raises:
        BadRow: the file has more than ``MAX_FILE_BYTES`` or, here or later, more than ``MAX_READS`` pieces.
    """
    size = file.seek(0, os.SEEK_END)
    if size > MAX_FILE_BYTES:
        raise BadRow(f"{quoted(source)}: {size:,} bytes, expected at most {MAX_FILE_BYTES:,} of a picture")
    file.seek(0)
    start = file.read(len(_PNG))
    file.seek(0)
    pieces = _Pieces(source, file)
    if start == _PNG:
        parts = _png_chunks(pieces)
    elif start.startswith(_JPEG):
        parts = _jpeg_segments(pieces)
    else:
        return pieces
    kept = io.BytesIO()
    kept.writelines(parts)
    kept.seek(0)
    return _Pieces(source, kept)


class _Pieces:
    """A file that allows ``MAX_READS`` reads: a GIF or PNG can have millions of pieces of a few bytes."""

    def __init__(self, source: Media, file: BinaryIO) -> None:
        self.source, self.file, self.left = source, file, MAX_READS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise BadRow(f"{quoted(self.source)}: more than {MAX_READS:,} pieces, expected a picture of fewer")
        return self.file.read(size)


def _png_chunks(file: BinaryIO) -> Iterator[bytes]:
    yield file.read(len(_PNG))
    while True:
        head = file.read(8)
        length, name = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or name == b"IEND" or not name.isalpha():
            yield head + file.read()
            return
        if name not in _PNG_CHUNKS and name[0] & 0x20:  # the bit that marks chunks which a reader may skip
            file.seek(length + 4, os.SEEK_CUR)
            continue
        body = file.read(length + 4)  # with its checksum
        if name != b"eXIf" or zlib.crc32(name + body[:-4]).to_bytes(4, "big") == body[-4:]:
            yield head + body


def _jpeg_segments(file: BinaryIO) -> Iterator[bytes]:
    yield file.read(2)
    while True:
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0x00, 0x01, 0xFF) or 0xD0 <= head[1] <= 0xDA:
            yield head + file.read()  # the scan begins, or something is wrong
            return
        body = file.read(max(0, int.from_bytes(head[2:], "big") - 2))
        if _makes_pixels(head[1], body):
            yield head + body


def _makes_pixels(marker: int, body: bytes) -> bool:
    """Whether a JPEG's pixels or orientation depend on this segment; libjpeg's rules for JFIF and Adobe, which define
    the colours, apply."""
    if marker == 0xE0:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    if marker == 0xEE:
        return body.startswith(b"Adobe") and len(body) >= 12
    if marker == 0xE1:
        return body.startswith(b"Exif\0\0")
    return not (0xE0 < marker <= 0xEF or marker == 0xFE)
