"""Picture files to tensors of one size, whatever the file holds and whoever wrote it."""

# C = 3 channels (RGB), H and W height and width in pixels, B pictures

import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, WebPImagePlugin  # noqa: F401  (Pillow opens WebP only once its parser is imported)
from torch import Tensor

from omni.errors import BadRow

# A picture is a few hundred bytes for a header that promises any size. 64 megapixels (more than most cameras make)
# are at most 0.9 GB while they are decoded and turned upright (measured).
MAX_PIXELS = 64_000_000
# No other parsers: some of them start programs, and all of them have bugs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# What Pillow raises for damaged files; it has no common base class for it.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_ORIENTATION = 0x0112  # the EXIF tag: how the camera was held
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | Path, height: int, width: int, *, fit: str = "squash") -> Tensor:
    """A picture as RGB, upright (EXIF), over white where it is transparent, resized with antialiasing.

    Args:
        path: a file in one of ``FORMATS``, recognised by its content; of several frames the first.
        height, width: pixels of the result.
        fit: "squash" stretches the whole picture to the size, as ``ViTImageProcessor`` does: nothing is cut off, so a
            caption stays true. "pad" keeps the proportions and fills with the background what is left over on the
            right, or above and below: for lines of text, which must not be stretched.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadRow: not a picture, damaged, cut short, or more than ``MAX_PIXELS`` (found in its header, before decoding).
    """
    if fit not in ("squash", "pad"):
        raise ValueError(f'expected fit "squash" or "pad", found {fit!r}')
    try:
        # of damage that it can read past, Pillow warns on stderr, a line for each of a million pictures
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
            check_size(path, file.width, file.height)
            # JPEG can be decoded at an eighth, a quarter or half of its size, at a fraction of the cost; twice the
            # size that is asked for leaves the antialiasing to the resize
            file.draft(None, (2 * max(height, width), 2 * max(height, width)))
            image = to_rgb(file)
            orientation = file.getexif().get(_ORIENTATION)
    except DAMAGED as error:
        raise BadRow(f"{path}: cannot read the picture: {reason_of(error)}") from error
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    pixels = squash(image, height, width) if fit == "squash" else _pad(image, height, width)  # (H, W, 3)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]: mean 0.5 and standard deviation 0.5, as ``ViTImageProcessor`` has it.

    On the device, after the transfer: a byte a value travels, not four.
    """
    return images.float() / 127.5 - 1.0


def check_size(path: str | Path, width: int, height: int) -> None:
    """Refuse (BadRow) what promises more than ``MAX_PIXELS``."""
    if width * height > MAX_PIXELS:
        raise BadRow(f"{path}: {width} x {height} pixels, expected at most {MAX_PIXELS:,} in all")


def reason_of(error: Exception) -> str:
    """Why Pillow could not read a file, in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a picture in any of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def to_rgb(file: Image.Image) -> Image.Image:
    """Decode, as 8-bit RGB."""
    if file.mode.startswith("I;16"):  # Pillow's own conversion would cut off at 255
        return Image.fromarray((np.asarray(file) // 257).astype(np.uint8)).convert("RGB")
    if not file.has_transparency_data:
        return file.convert("RGB")
    image = file.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def squash(image: Image.Image, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3), resized with antialiasing, proportions lost."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _pad(image: Image.Image, height: int, width: int) -> np.ndarray:
    scale = min(height / image.height, width / image.width)
    pixels = squash(image, max(1, round(image.height * scale)), max(1, round(image.width * scale)))
    edges = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))  # mostly background
    padded = np.empty((height, width, 3), np.uint8)
    padded[:] = np.median(edges, axis=0)
    top = (height - pixels.shape[0]) // 2
    padded[top : top + pixels.shape[0], : pixels.shape[1]] = pixels
    return padded
