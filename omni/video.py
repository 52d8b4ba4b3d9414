"""Frames of a video, evenly spaced: of a film, an animated picture, or a folder of pictures."""

# F frames, H and W height and width in pixels

import os
import re
import warnings
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omni.errors import BadRow
from omni.images import DAMAGED, check_size, load_image, reason_of, squash, to_rgb

ANIMATED = ("GIF", "WEBP", "PNG")
# No other parsers: playlists, for one, make FFmpeg open whatever they name, on this machine or elsewhere.
FILMS = {"MP4": "mov", "MKV and WebM": "matroska", "AVI": "avi", "TS": "mpegts"}
_FRAME_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def load_frames(path: str | Path, count: int, height: int, width: int) -> tuple[Tensor, int]:
    """Frames of a video, evenly spaced from its first to its last; all of them if it has no more than ``count``.

    Args:
        path: a film (MP4, MOV, MKV, WebM, AVI, TS) or an animated GIF, WebP or PNG, known by its content; or a folder
            with a picture file for each frame, in the order of the numbers in their names.
        count: at most so many.
        height, width: of each, as in ``load_image`` with "squash".

    Returns:
        uint8 (F, 3, H, W), and how many frames the video has.

    Raises:
        BadRow: not such a file or folder, damaged, of more than ``MAX_PIXELS`` a frame.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike path.is_dir(), whatever the name, however long
        files = sorted((file for file in path.iterdir() if file.suffix.lower() in _FRAME_FILES), key=_by_number)
        if not files:
            raise BadRow(f"{path}: expected a picture for each frame ({', '.join(_FRAME_FILES)}), found none")
        return torch.stack([load_image(files[i], height, width) for i in evenly(len(files), count)]), len(files)
    try:
        frames, total = _of_animation(path, count, height, width)
    except Image.UnidentifiedImageError:
        frames, total = _of_film(path, count, height, width)
    except DAMAGED as error:
        raise BadRow(f"{path}: cannot read the video: {reason_of(error)}") from error
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous(), total


def _of_animation(path: Path, count: int, height: int, width: int) -> tuple[list[np.ndarray], int]:
    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=ANIMATED) as file:
        check_size(path, file.width, file.height)
        total, frames = getattr(file, "n_frames", 1), []
        for index in evenly(total, count):
            file.seek(index)
            frames.append(squash(to_rgb(file), height, width))
    return frames, total


def _of_film(path: Path, count: int, height: int, width: int) -> tuple[list[np.ndarray], int]:
    """By FFmpeg's decoders. Frames are counted by their packets, which costs no decoding: not every format says how
    many it has."""
    try:
        with path.open("rb") as file, _open(file) as container:
            total = sum(packet.size > 0 for packet in container.demux(_pictures(path, container)))
        with path.open("rb") as file, _open(file) as container:
            stream = _pictures(path, container)
            stream.thread_type = "AUTO"
            wanted, frames, last = evenly(total, count), [], None
            for index, last in enumerate(container.decode(stream)):
                if len(frames) < len(wanted) and index == wanted[len(frames)]:
                    frames.append(_upright(last, height, width))
            if last is None:
                raise BadRow(f"{path}: expected a film with at least one frame, found none")
            while len(frames) < len(wanted):  # some codecs have packets of no frame of their own
                frames.append(_upright(last, height, width))
    except av.FFmpegError as error:
        kinds = ", ".join((*FILMS, *ANIMATED))
        reason = error.strerror or type(error).__name__
        raise BadRow(f"{path}: cannot read the video: {reason}; expected {kinds}, or a folder of pictures") from error
    return frames, total


def _open(file) -> av.container.InputContainer:
    return av.open(file, options={"format_whitelist": ",".join(FILMS.values())})


def _pictures(path: Path, container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """The first track that is not sound."""
    if not container.streams.video:
        raise BadRow(f"{path}: expected a film, found {len(container.streams.audio)} tracks of sound and no pictures")
    stream = container.streams.video[0]
    check_size(path, stream.codec_context.width, stream.codec_context.height)
    return stream


def _upright(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3); films of a telephone say how it was held."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))  # counterclockwise, both
    return squash(Image.fromarray(pixels), height, width)


def evenly(total: int, count: int) -> list[int]:
    """At most ``count`` of the indices below ``total``, evenly spaced, the first and the last among them; of one only,
    the middle."""
    if count >= total:
        return list(range(total))
    return [total // 2] if count == 1 else [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _by_number(file: Path) -> list:
    """frame_2 before frame_10: text and numbers by turns, so that like is compared with like."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]
