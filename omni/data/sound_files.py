"""Decodes sound files block by block: with libsndfile if the header has the length, else with FFmpeg, to the end.

A declared length is used only if the bytes confirm it; else the samples are counted. MP3, AAC and the sound tracks of
films declare no reliable length, and a program that writes into a pipe does not know the length yet.
"""

# S samples, C channels

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile

from omni.common.errors import BadRow
from omni.common.media import Clip, Inline, Media, Section, open_media, quoted

_BLOCK_VALUES = 1 << 18  # samples x channels read at a time: a thousand channels need no more memory than one
_RATES_HZ = range(1_000, 768_001)  # others mean a damaged header, and resampling could take any amount of memory
_UNKNOWN_LENGTH = 1 << 62  # libsndfile: the header does not say
# A WAV written into a pipe declares a data size of 0, or one near the maximum of 2 or 4 GiB.
_LARGEST_SIZE = 0x7FFF0000

# FFmpeg's demuxers by the first bytes of a file. No others, and no probing: a playlist, for example, would make FFmpeg
# open any file or address that it names.
_BEGINNINGS = (
    (rb"RIFF....AVI ", "avi"), (rb"RIFF|RF64", "wav"), (rb"fLaC", "flac"), (rb"OggS", "ogg"), (rb"FORM....AIF", "aiff"),
    (rb"caff", "caf"), (rb"wvpk", "wv"), (rb"#!AMR", "amr"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"), (rb"\x1a\x45\xdf\xa3", "matroska"), (rb"\x47.{187}\x47", "mpegts"),
    (rb"....(ftyp|moov|mdat|wide|free|skip)", "mov"), (rb"\xff[\xf0\xf1\xf8\xf9]", "aac"), (rb"\xff[\xe0-\xff]", "mp3"),
)  # fmt: skip
# Telephone formats have no header: the ending of the name gives the format, and FFmpeg's option the rate.
_HEADERLESS = {
    ".g722": ("g722", {}), ".gsm": ("gsm", {}), ".ulaw": ("mulaw", {"sample_rate": "8000"}),
    ".alaw": ("alaw", {"sample_rate": "8000"}), ".sln": ("s16le", {"sample_rate": "8000"}),
    ".sln16": ("s16le", {"sample_rate": "16000"}),
}  # fmt: skip
_WITHOUT_CONTAINER = ("mp3", "aac")  # tags of any kind may stand before and after the frames
_LIBSNDFILE = ("wav", "flac", "ogg", "aiff", "caf", None)  # None: formats that only libsndfile knows
_TAGS_BYTES = 1 << 24  # ID3v2 tags contain pictures; sound after larger tags is not found
_CLIP_ERROR_S = 0.1
_DURATION_ERROR_S = 1.0  # a Matroska file's duration is that of its longest track, in milliseconds


@dataclass(frozen=True)
class Sound:
    """An open sound file.

    ``frames``: samples of each channel; None: they have to be counted. ``blocks``: consecutive (S, C) float32, full
    scale 1; raises BadRow where the file is damaged, or ends before its header says.
    """

    rate: int
    frames: int | None
    blocks: Iterator[np.ndarray]
    seek: Callable[[int], None] | None = None  # begin ``blocks`` at another frame; None: they begin at the first


@contextmanager
def open_sound(source: Media) -> Iterator[Sound]:
    """
    A WAV file with fewer bytes of sound than its header says is truncated, unless the header was written before the
    length was known: then the data size is ``_LARGEST_SIZE`` or more, or 0 in a file whose length differs from that in
    its header. Such a file is read to its end, as players do.

    Raises:
        BadRow: not audio, empty, of an impossible rate, or a truncated WAV.
    """
    if isinstance(source, Clip):
        with open_sound(source.source) as sound:
            yield _clip(sound, source)
        return
    name = quoted(source)
    if isinstance(source, Section):
        source = source.read()
    with ExitStack() as stack:
        file = stack.enter_context(open_media(source))
        ending, handle, size = "", file, len(source.data) if isinstance(source, Inline) else 0
        if not isinstance(source, Inline):
            # given a descriptor, libsndfile does not read through Python
            ending, handle = Path(source).suffix.lower(), file.fileno()
            size = os.fstat(handle).st_size

        def peek(start: int, count: int) -> bytes:
            return source.data[start : start + count] if handle is file else os.pread(handle, count, start)

        begins = _content(peek)
        demuxer, options = _HEADERLESS.get(ending) or (_demuxer(peek(begins, 4096)), {})
        if demuxer in _LIBSNDFILE:
            try:
                opened = stack.enter_context(soundfile.SoundFile(handle, closefd=False))
            except soundfile.LibsndfileError as error:
                if demuxer is None:
                    raise BadRow(f"{name}: not an audio file that can be read: {_reason(error, ending)}") from error
            else:
                if not _is_unfinished(opened, size):
                    yield _by_libsndfile(opened, name)
                    return
            # back to the start: libsndfile has moved the descriptor's position
            file.seek(0) if handle is file else os.lseek(handle, 0, os.SEEK_SET)
        declared = _declared_frames(peek(begins, 256)) if demuxer == "mp3" else 0
        yield stack.enter_context(_by_ffmpeg(file, name, demuxer, options, declared))


def _clip(sound: Sound, clip: Clip) -> Sound:
    """A part of an open recording.

    Raises:
        BadRow: the recording ends before the part does. Up to ``_CLIP_ERROR_S`` may be missing, as rounded times ask.
    """
    first = round(clip.start_s * sound.rate)
    stop = sound.frames if clip.end_s is None else round(clip.end_s * sound.rate)
    allowed = round(_CLIP_ERROR_S * sound.rate)
    problem = f"{quoted(clip)}: expected a part of the recording, which lasts {{:.2f}} s"
    if sound.frames is not None:
        if first >= sound.frames or stop > sound.frames + allowed:
            raise BadRow(problem.format(sound.frames / sound.rate))
        stop = min(stop, sound.frames)
    if sound.seek is not None:
        sound.seek(first)

    def blocks() -> Iterator[np.ndarray]:
        at = 0 if sound.seek is None else first
        for block in sound.blocks:
            begin, end = at, at + len(block)
            at = end
            if end > first and len(part := block[max(0, first - begin) : None if stop is None else stop - begin]):
                yield part
            if stop is not None and end >= stop:
                return
        if at <= first or stop is not None and at < stop - allowed:
            raise BadRow(problem.format(at / sound.rate))

    return Sound(sound.rate, None if sound.frames is None else stop - first, blocks())


def _content(peek: Callable[[int, int], bytes]) -> int:
    """The first byte of the content, after ID3v2 tags and zeros."""
    begins = 0
    while begins < _TAGS_BYTES and len(head := peek(begins, 4096)) > 10 and _demuxer(head) is None:
        if head[:3] == b"ID3":
            begins += 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        elif head[0] == 0:
            begins += len(head) - len(head.lstrip(b"\0"))
        else:
            break
    return begins


def _demuxer(head: bytes) -> str | None:
    return next((name for beginning, name in _BEGINNINGS if re.match(beginning, head, re.DOTALL)), None)


def _reason(error: soundfile.LibsndfileError, ending: str) -> str:
    if ending in (".raw", ".pcm"):
        return "samples without a header, of unknown rate and format; expected WAV, FLAC, MP3 or the like"
    return error.error_string.rstrip(".")


def _check_rate(name: str, rate: int) -> None:
    if rate not in _RATES_HZ:
        raise BadRow(f"{name}: expected a rate of {_RATES_HZ[0]} to {_RATES_HZ[-1]} Hz, found {rate}")


# ---------------------------------------------------------------------------------------------------------------
# libsndfile


def _wav_size(file: soundfile.SoundFile, chunk: str) -> tuple[int, int] | None:
    """The size that a WAV's header gives for ``RIFF`` or ``data``, and what it should be; None for other formats.

    libsndfile quietly reads a truncated WAV as a shorter one; only its report tells both lengths.
    """
    found = re.search(rf"^{chunk} : (\d+)(?: \(should be (\d+)\))?", file.extra_info, re.MULTILINE)
    return found and (int(found[1]), int(found[2] or found[1]))


def _is_unfinished(file: soundfile.SoundFile, size: int) -> bool:
    """Whether the header was written before the length was known, so that libsndfile does not know it either."""
    riff, data = _wav_size(file, "RIFF"), _wav_size(file, "data")
    zero = riff and data and data[0] == 0 and size - 8 - riff[0] not in (0, -1, 1)
    return bool(zero) or file.frames >= _UNKNOWN_LENGTH


def _by_libsndfile(file: soundfile.SoundFile, name: str) -> Sound:
    if (data := _wav_size(file, "data")) and data[1] < data[0] < _LARGEST_SIZE:
        raise BadRow(f"{name}: truncated: {data[1]} of {data[0]} bytes of audio are there")
    _check_rate(name, file.samplerate)
    if file.frames == 0:
        raise BadRow(f"{name}: empty, or truncated before its first sample")
    return Sound(file.samplerate, file.frames, _blocks(file, name), file.seek)


def _blocks(file: soundfile.SoundFile, name: str) -> Iterator[np.ndarray]:
    rate, frames, read = file.samplerate, file.frames, file.tell()
    block = max(1, _BLOCK_VALUES // file.channels)
    try:
        while len(part := file.read(min(block, frames - read), dtype="float32", always_2d=True)):
            yield part
            read += len(part)
    except soundfile.LibsndfileError as error:
        raise BadRow(f"{name}: truncated or damaged after {read / rate:.2f} of {frames / rate:.2f} s") from error
    if read < frames:
        raise BadRow(f"{name}: truncated: {read / rate:.2f} of {frames / rate:.2f} s are there")


# ---------------------------------------------------------------------------------------------------------------
# FFmpeg


@contextmanager
def _by_ffmpeg(file, name: str, demuxer: str, options: dict[str, str], declared: int) -> Iterator[Sound]:
    """
    Args:
        declared: number of packets that an MP3 declares; 0: none declared.
    """
    try:
        container = av.open(file, format=demuxer, options=options, metadata_errors="ignore")
    except (av.FFmpegError, ValueError) as error:
        raise BadRow(f"{name}: not an audio file that can be read: {_why(error)}") from error
    with container:
        streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
        if not streams:
            raise BadRow(f"{name}: expected sound, found none that can be decoded")
        _check_rate(name, streams[0].codec_context.sample_rate)
        yield Sound(streams[0].codec_context.sample_rate, None, _decoded(container, streams[0], name, declared))


def _decoded(container: av.container.InputContainer, stream, name: str, declared: int) -> Iterator[np.ndarray]:
    rate, format_name = stream.codec_context.sample_rate, container.format.name
    read, packets, damage = 0, 0, None
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                if format_name not in _WITHOUT_CONTAINER:
                    raise
                damage = error if read else None  # before the first sample and after the last there may be anything
                continue
            packets += packet.size > 0
            for frame in frames:
                if damage is not None:
                    raise damage
                if frame.sample_rate != rate:
                    raise BadRow(f"{name}: changes from {rate} to {frame.sample_rate} Hz after {read / rate:.2f} s")
                yield _values(frame)
                read += frame.samples
    except (av.FFmpegError, ValueError) as error:
        raise BadRow(f"{name}: truncated or damaged after {read / rate:.2f} s: {_why(error)}") from error
    if read == 0:
        raise BadRow(f"{name}: empty, or truncated before its first sample")
    if format_name.startswith("mov"):
        declared = stream.frames
    if packets < declared:
        raise BadRow(f"{name}: truncated: {packets} of {declared} packets are there")
    if format_name.startswith("matroska") and len(container.streams) == 1 and container.duration:
        lasts = container.duration / av.time_base
        if read / rate < lasts - _DURATION_ERROR_S:
            raise BadRow(f"{name}: truncated: {read / rate:.2f} of {lasts:.2f} s are there")


def _values(frame: av.AudioFrame) -> np.ndarray:
    """(S, C) float32, full scale 1."""
    values = frame.to_ndarray()  # (C, S) if planar, else (1, S * C)
    values = values.T if frame.format.is_planar else values.reshape(frame.samples, -1)
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, which is refused
            return values.astype(np.float32)
    middle = 128 if values.dtype.kind == "u" else 0
    return (values.astype(np.float32) - middle) / np.float32(1 << (8 * values.dtype.itemsize - 1))


def _declared_frames(head: bytes) -> int:
    """Number of further frames that the first frame of an MP3 declares; 0: none declared."""
    found = re.search(rb"(?:Xing|Info)...[\x01\x03\x05\x07\x09\x0b\x0d\x0f](....)", head, re.DOTALL)
    return int.from_bytes(found[1]) if found else 0


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
