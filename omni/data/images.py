"""Picture files of several formats to tensors of one size."""

# C = 3 channels (RGB), H and W height and width in pixels, B pictures

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageChops, ImageStat, WebPImagePlugin  # noqa: F401  (WebP is opened only once it is imported)
from torch import Tensor

from omni.common.errors import BadRow
from omni.common.media import Media, open_media, quoted
from omni.data.metadata import without_metadata

# The header of a small file can declare any size. 64 megapixels (more than most cameras make) take 0.6 GB to decode
# and turn upright, as WebP 1 GB (measured); as a column one pixel wide they would take 3 GB.
MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # the maximum of JPEG and GIF
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many, and a WebP before it allocates a canvas
# Pillow's other parsers are not used: some start programs, and each may have bugs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_ORIENTATION = 0x0112  # the EXIF tag: how the camera was held
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: Media, height: int, width: int, *, fit: str = "squash") -> Tensor:
    """A picture as RGB, upright (EXIF), over a background where it is transparent, resized with antialiasing.

    Args:
        source: a file or data URI in one of ``FORMATS``, recognised by its content; the first of several frames.
            Broken metadata are ignored.
        height, width: pixels of the result.
        fit: "squash" stretches the whole picture to the size, as ``ViTImageProcessor`` does: nothing is cut off, so a
            caption stays true. "pad" keeps the proportions and fills the rest, on the right or above and below, with
            the background: for lines of text, which must not be stretched.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadRow: not a picture, damaged, cut short, or of more than ``MAX_PIXELS`` or ``MAX_SIDE`` (found in its header,
            before decoding).
    """
    if fit not in ("squash", "pad"):
        raise ValueError(f'expected fit "squash" or "pad", found {fit!r}')
    with open_media(source) as file, decoding(source, "picture"):
        image, turn = _decode(source, file, 2 * max(height, width))
    if turn is not None:
        image = image.transpose(turn)
    pixels = squash(image, height, width) if fit == "squash" else _pad(image, height, width)  # (H, W, 3)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _decode(source: Media, file: BinaryIO, enough: int) -> tuple[Image.Image, Image.Transpose | None]:
    """The picture in RGB, and the transpose that turns it upright."""
    # Pillow warns on stderr, a line for each picture, of damage that it can read past
    with (
        warnings.catch_warnings(action="ignore"),
        Image.open(without_metadata(source, file), formats=FORMATS) as picture,
    ):
        check_size(source, picture.width, picture.height, MAX_PIXELS)
        # JPEG can be decoded at an eighth, a quarter or half of its size, at a fraction of the cost; twice the size
        # that is asked for leaves the antialiasing to the resize
        picture.draft(None, (enough, enough))
        return to_rgb(picture), _turn(picture)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """The transpose that turns the picture upright, from its EXIF; None if that is absent or damaged."""
    exif = Image.Exif()
    try:
        exif.load(picture.info.get("exif", b""))
        return _UPRIGHT.get(exif.get(_ORIENTATION))
    except Exception:  # Pillow raises anything for damaged EXIF, which is then ignored
        return None


@contextmanager
def decoding(source: Media, kind: str) -> Iterator[None]:
    """Context in which any exception becomes a BadRow with its reason, since decoders of damaged files raise any."""
    try:
        yield
    except BadRow:
        raise
    except Exception as error:
        raise BadRow(f"{quoted(source)}: cannot read the {kind}: {reason_of(error)}") from error


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]: mean 0.5 and standard deviation 0.5, as in ``ViTImageProcessor``.

    Called on the device, after the transfer, which so moves one byte per value, not four.
    """
    return images.float() / 127.5 - 1.0


def check_size(source: Media, width: int, height: int, most: int) -> None:
    """Raise BadRow if there are more than ``most`` pixels, or a side has more than ``MAX_SIDE``."""
    if width * height > most or max(width, height) > MAX_SIDE:
        expected = f"at most {most:,} in all and {MAX_SIDE:,} a side"
        raise BadRow(f"{quoted(source)}: {width} x {height} pixels, expected {expected}")


def reason_of(error: Exception) -> str:
    """Why a file could not be read, in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a picture in any of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def to_rgb(picture: Image.Image) -> Image.Image:
    """Decode to 8-bit RGB: a transparent picture over white, or over black if it would be invisible over white."""
    if picture.mode.startswith("I;16"):  # Pillow's own conversion would cut off at 255
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    if picture.mode != "RGBA":
        picture = picture.convert("RGBA")
    alpha = picture.getchannel("A")
    flat = Image.new("RGB", picture.size, _background(picture, alpha))
    flat.paste(picture, mask=alpha)
    return flat


def _background(picture: Image.Image, alpha: Image.Image) -> tuple[int, int, int]:
    """White, unless the picture over it would have less than a third of the contrast (the standard deviation of the
    luminance) that it has over black: letters lighter than three quarters of white, with nothing darker beside them.
    """
    over_black = ImageChops.multiply(picture.convert("L"), alpha)
    over_white = ImageChops.add(over_black, ImageChops.invert(alpha))
    (on_white,), (on_black,) = ImageStat.Stat(over_white).stddev, ImageStat.Stat(over_black).stddev
    return _BLACK if 3 * on_white < on_black else _WHITE


def squash(image: Image.Image, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3), resized with antialiasing; proportions change."""
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
