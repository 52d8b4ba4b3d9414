"""Evenly spaced frames of a video: a film, an animated picture, or a folder of pictures."""

# F frames, H and W height and width in pixels

import bisect
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omni.common.errors import BadRow
from omni.common.media import Clip, Inline, Media, Section, open_media, quoted
from omni.data.images import check_size, decoding, load_image, squash, to_rgb
from omni.data.metadata import without_metadata

MAX_FRAME_PIXELS = 20_000_000  # 5K; a film decoder holds up to 30 frames, here 0.9 GB (measured)
# Limits of the pixels that are decoded, some seconds of work; small frames count as 64 x 64. A film is decoded from a
# key frame to each wanted frame: for 16 of them in 1080p, four seconds each. An animation is decoded from the start.
MAX_FILM_PIXELS = 4_000_000_000
MAX_ANIMATION_PIXELS = 1_000_000_000
_LEAST_PIXELS = 64 * 64
MAX_PACKETS = 1_000_000  # packets of a film: nine hours at 30 a second
MAX_FILES = 100_000  # in a folder of frames: an hour at 25 a second
ANIMATED = ("GIF", "WEBP", "PNG")
# No other demuxers: a playlist, for example, would make FFmpeg open any file or address that it names.
FILMS = {"MP4": "mov", "MKV and WebM": "matroska", "AVI": "avi", "TS": "mpegts"}
_FRAME_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def load_frames(source: Media, count: int, height: int, width: int) -> tuple[Tensor, int]:
    """Frames of a video, evenly spaced from its first to its last; all of them if it has no more than ``count``.

    Args:
        source: a film (MP4, MOV, MKV, WebM, AVI, TS) or an animated GIF, WebP or PNG, known by its content, as a file
            or data URI; or a folder with a picture file for each frame, in the order of the numbers in their names.
        count: maximum number of frames.
        height, width: size of each frame, as in ``load_image`` with "squash".

    Returns:
        uint8 (F, 3, H, W), and the number of frames of the video.

    Raises:
        BadRow: not such a file or folder, damaged, of more than ``MAX_FRAME_PIXELS`` a frame, or more than
            ``MAX_FILM_PIXELS`` or ``MAX_ANIMATION_PIXELS`` would have to be decoded.
    """
    with decoding(source, "video"):
        is_name = not isinstance(source, (Inline, Section, Clip))
        if is_name and os.path.isdir(source):  # unlike Path.is_dir, whatever the name
            files = _frame_files(Path(source))
            return torch.stack([load_image(files[i], height, width) for i in evenly(len(files), count)]), len(files)
        with open_media(source) as file:
            try:
                frames, total = _of_animation(source, file, count, height, width)
            except Image.UnidentifiedImageError:
                frames, total = _of_film(source, file, count, height, width)
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous(), total


def _frame_files(folder: Path) -> list[Path]:
    names = []
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number == MAX_FILES:
                raise BadRow(f"{quoted(folder)}: expected at most {MAX_FILES:,} files, found more")
            if entry.name.lower().endswith(_FRAME_FILES):
                names.append(entry.name)
    if not names:
        expected = f"a picture for each frame ({', '.join(_FRAME_FILES)})"
        raise BadRow(f"{quoted(folder)}: expected {expected}, found none")
    return [folder / name for name in sorted(names, key=_by_number)]


class _Budget:
    """Number of pixels of a video that may still be decoded."""

    def __init__(self, source: Media, pixels: int) -> None:
        self.source, self.pixels, self.left = source, pixels, pixels

    def spend(self, width: int, height: int, frames: int = 1) -> None:
        """Count frames of one size, before they are decoded.

        Raises:
            BadRow: the frames are too large, or exceed the budget.
        """
        check_size(self.source, width, height, MAX_FRAME_PIXELS)
        self.left -= frames * max(width * height, _LEAST_PIXELS)
        if self.left < 0:
            raise BadRow(
                f"{quoted(self.source)}: more than {self.pixels:,} pixels would have to be decoded. Expected a shorter "
                f"or smaller video, or fewer frames asked of it"
            )


def _of_animation(source: Media, file: BinaryIO, count: int, height: int, width: int) -> tuple[list[np.ndarray], int]:
    with (
        warnings.catch_warnings(action="ignore"),
        Image.open(without_metadata(source, file), formats=ANIMATED) as picture,
    ):
        budget, size = _Budget(source, MAX_ANIMATION_PIXELS), picture.size
        check_size(source, *size, MAX_FRAME_PIXELS)
        total, frames = getattr(picture, "n_frames", 1), []
        wanted = evenly(total, count)
        budget.spend(*size, wanted[-1] + 1)
        for index in range(wanted[-1] + 1):  # each is painted over the one before; a GIF may grow at any frame
            picture.seek(index)
            if picture.size != size:
                budget.spend(*picture.size)
            if index == wanted[len(frames)]:
                frames.append(squash(to_rgb(picture), height, width))
    return frames, total


def _of_film(source: Media, file: BinaryIO, count: int, height: int, width: int) -> tuple[list[np.ndarray], int]:
    """Decode with FFmpeg. Frames are counted by their packets, without decoding, since not every format declares
    their number."""
    try:
        with _open(file) as container:
            packets = [(packet.pts, packet.is_keyframe) for packet in _packets(source, container)]
        if not packets:
            raise BadRow(f"{quoted(source)}: expected a film with at least one frame, found none")
        with _open(file) as container:
            frames = _wanted_frames(source, container, packets, count, height, width)
    except av.FFmpegError as error:
        kinds = ", ".join((*FILMS, *ANIMATED))
        reason = f"{error.strerror or type(error).__name__}; expected {kinds}, or a folder of pictures"
        raise BadRow(f"{quoted(source)}: cannot read the video: {reason}") from error
    return frames, len(packets)


def _open(file: BinaryIO) -> av.container.InputContainer:
    file.seek(0)
    # max_pixels also applies while FFmpeg probes the file; tags may be anything
    options = {"format_whitelist": ",".join(FILMS.values()), "max_pixels": str(MAX_FRAME_PIXELS)}
    return av.open(file, options=options, metadata_errors="replace")


def _packets(source: Media, container: av.container.InputContainer) -> Iterator[av.Packet]:
    """Packets of the first video track: one frame each, in some codecs none."""
    if not container.streams.video:
        tracks = len(container.streams.audio)
        raise BadRow(f"{quoted(source)}: expected a film, found {tracks} tracks of sound and no pictures")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadRow(f"{quoted(source)}: expected a film, found pictures of an unknown codec")
    check_size(source, stream.codec_context.width, stream.codec_context.height, MAX_FRAME_PIXELS)
    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # checked in mid-stream, before allocation
    stream.codec_context.thread_type = "AUTO"
    stream.codec_context.thread_count = 2  # each thread holds more frames
    for number, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
        if number == MAX_PACKETS:
            raise BadRow(f"{quoted(source)}: expected at most {MAX_PACKETS:,} frames, found more")
        yield packet


def _wanted_frames(
    source: Media,
    container: av.container.InputContainer,
    packets: list[tuple[int | None, bool]],
    count: int,
    height: int,
    width: int,
) -> list[np.ndarray]:
    times = [time for time, _ in packets]
    wanted = evenly(len(packets), count)
    if timed := None not in times and len(set(times)) == len(times):
        shown = sorted(range(len(times)), key=times.__getitem__)  # in the order of time, not of the file
        needed = _needed(packets, [shown[i] for i in wanted])
        wanted = [times[shown[i]] for i in wanted]
    else:  # old AVI files do not say when a frame is shown: counted from the beginning
        needed = set(range(len(packets)))
    budget, frames, last = _Budget(source, MAX_FILM_PIXELS), [], None
    for number, frame in enumerate(_decode(source, container, needed, budget)):
        time = frame.pts if timed else number
        while len(frames) < len(wanted) and time >= wanted[len(frames)]:
            frames.append(_upright(frame if time == wanted[len(frames)] or last is None else last, height, width))
        last = frame
    if last is None:
        raise BadRow(f"{quoted(source)}: expected a film with at least one frame, found none")
    while len(frames) < len(wanted):  # some codecs have packets without a frame
        frames.append(_upright(last, height, width))
    return frames


def _needed(packets: list[tuple[int, bool]], wanted: list[int]) -> set[int]:
    """The packets to decode for the ``wanted`` ones: each from its key frame on."""
    keys = [i for i, (_, is_key) in enumerate(packets) if is_key or i == 0]
    needed = set()
    for packet in wanted:
        key = bisect.bisect_right(keys, packet) - 1
        if packets[packet][0] < packets[keys[key]][0]:  # shown before its key frame: depends on the one before, too
            key = max(0, key - 1)
        needed.update(range(keys[key], packet + 1))
    return needed


def _decode(
    source: Media, container: av.container.InputContainer, needed: set[int], budget: _Budget
) -> Iterator[av.VideoFrame]:
    size, was_decoded = None, False
    for index, packet in enumerate(_packets(source, container)):
        codec = packet.stream.codec_context
        if size is None:
            size = codec.width, codec.height
            budget.spend(*size, len(needed))
        if index in needed:
            if (codec.width, codec.height) != size:  # it may change in mid-stream
                budget.spend(codec.width, codec.height)
            yield from packet.decode()
        elif was_decoded:  # the end of a stretch: take the decoder's last frames and reset it
            yield from codec.decode(None)
            codec.flush_buffers()
        was_decoded = index in needed
    if was_decoded:
        yield from codec.decode(None)


def _upright(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3), rotated as the film's metadata say."""
    alpha = any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    pixels = np.rot90(pixels, k=round(frame.rotation / 90))  # counterclockwise, both
    return squash(to_rgb(Image.fromarray(pixels)), height, width)


def evenly(total: int, count: int) -> list[int]:
    """At most ``count`` of the indices below ``total``, evenly spaced, the first and the last among them; the middle
    one if ``count`` is 1."""
    if count >= total:
        return list(range(total))
    return [total // 2] if count == 1 else [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _by_number(name: str) -> list:
    """Sort key that puts frame_2 before frame_10: text and numbers in turn."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
