"""Pictures come out the same whatever holds them, and a hostile or broken file is one line."""

import io
import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from harness import ROOT
from PIL import Image, ImageDraw, ImageFont

import omni.data.images
import omni.data.metadata
from omni.common.errors import BadRow
from omni.common.media import Inline
from omni.data.images import MAX_PIXELS, MAX_SIDE, load_image, normalise, to_rgb

SIDE = 32


def quarters() -> Image.Image:
    """Red and green above, blue and white below: every turn and flip of it looks different."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    half = SIDE // 2
    pixels[:half, :half], pixels[:half, half:] = (255, 0, 0), (0, 255, 0)
    pixels[half:, :half], pixels[half:, half:] = (0, 0, 255), (255, 255, 255)
    return Image.fromarray(pixels)


EXPECTED = torch.from_numpy(np.asarray(quarters()).copy()).permute(2, 0, 1)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: int) -> bool:
    assert found.dtype == torch.uint8 and found.is_contiguous() and found.shape == expected.shape
    return (found.int() - expected.int()).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("name", "format", "options", "tolerance"),
    [
        ("a.png", "PNG", {}, 0),
        ("a.bmp", "BMP", {}, 0),
        ("a.gif", "GIF", {}, 0),
        ("a.webp", "WEBP", {"lossless": True}, 0),
        ("a.jpg", "JPEG", {"quality": 100, "subsampling": 0}, 3),
        ("a wröng name.jpg", "PNG", {}, 0),  # the content decides
    ],
)
def test_formats(tmp_path, name, format, options, tolerance):
    quarters().save(tmp_path / name, format, **options)
    assert close(load_image(tmp_path / name, SIDE, SIDE), EXPECTED, tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_held_any_way_gives_an_upright_picture(tmp_path, orientation):
    undo = {
        1: [], 2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"], 5: ["TRANSPOSE"], 6: ["ROTATE_90"],
        7: ["TRANSVERSE"], 8: ["ROTATE_270"],
    }[orientation]  # fmt: skip
    image = quarters()
    for step in undo:
        image = image.transpose(Image.Transpose[step])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert close(load_image(tmp_path / "a.png", SIDE, SIDE), EXPECTED, 0)


def transparent_palette() -> Image.Image:
    image = quarters().quantize(4)
    image.info["transparency"] = image.getpixel((SIDE - 1, SIDE - 1))  # what is white anyway
    return image


def half_transparent() -> Image.Image:
    image = quarters().convert("RGBA")
    image.paste((0, 0, 0, 0), (SIDE // 2, SIDE // 2, SIDE, SIDE))  # black, but not to be seen
    return image


@pytest.mark.parametrize("make", [transparent_palette, half_transparent], ids=lambda make: make.__name__)
def test_what_is_transparent_is_white(tmp_path, make):
    make().save(tmp_path / "a.png")
    assert close(load_image(tmp_path / "a.png", SIDE, SIDE), EXPECTED, 0)


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert close(load_image(tmp_path / "a.png", 4, 4), torch.full((3, 4, 4), 127, dtype=torch.uint8), 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_modes(tmp_path, mode):
    name = "a.jpg" if mode == "CMYK" else "a.png"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(tmp_path / name)
    assert close(load_image(tmp_path / name, 8, 8), torch.full((3, 8, 8), 255, dtype=torch.uint8), 0)


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    values = np.array([[0, 1000, 40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 1, 4)[0].tolist() == [[0, 3, 155, 255]]


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_counts(tmp_path, format):
    path = tmp_path / f"a.{format.lower()}"
    quarters().save(path, save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))], lossless=True)
    assert close(load_image(path, SIDE, SIDE), EXPECTED, 0)


def test_squash_shows_the_whole_picture_smoothly(tmp_path):
    quarters().resize((160, 64), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 16, 16)
    assert [image[:, y, x].tolist() for y, x in ((0, 0), (0, 15), (15, 0), (15, 15))] == [
        [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255],
    ]  # fmt: skip
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = load_image(tmp_path / "stripes.png", 8, 8)
    assert close(small, torch.full((3, 8, 8), 127, dtype=torch.uint8), 8), "stripes too fine to be seen are grey"


def test_a_large_jpeg_is_the_same_picture_though_decoded_small(tmp_path):
    quarters().resize((1024, 1024), Image.Resampling.NEAREST).save(tmp_path / "a.jpg", quality=95)
    image = load_image(tmp_path / "a.jpg", SIDE, SIDE)
    inside = [2, 3, 4, -5, -4, -3]  # away from the border between the colours
    assert close(image[:, inside][:, :, inside], EXPECTED[:, inside][:, :, inside], 6)


def test_pad_keeps_the_proportions_and_the_background(tmp_path):
    line = Image.new("RGB", (60, 20), (10, 200, 30))
    line.paste((255, 0, 0), (20, 5, 40, 15))
    line.save(tmp_path / "a.png")
    wide = load_image(tmp_path / "a.png", 10, 50, fit="pad")
    assert (wide[:, :, 30:].flatten(1) == torch.tensor([10, 200, 30])[:, None]).all(), "background on the right"
    assert wide[:, 5, 15].tolist() == [255, 0, 0]
    tall = load_image(tmp_path / "a.png", 30, 30, fit="pad")
    assert (tall[:, [0, 9, 20, 29]].flatten(1) == torch.tensor([10, 200, 30])[:, None]).all(), "and above and below"
    assert torch.equal(wide[:, :, :30], tall[:, 10:20]), "both scaled to 30 x 10: no word becomes wider or narrower"


def letters(grey: int, clear: tuple, mode: str) -> Image.Image:
    """A line of smooth letters, as a program draws them on a transparent ground."""
    image = Image.new("RGBA", (64, 24), (*clear, 0))
    ImageDraw.Draw(image).text((4, 2), "MARKET", fill=(grey, grey, grey, 255), font=ImageFont.load_default(16))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("clear", [(255, 255, 255), (0, 0, 0)])
def test_letters_of_any_grey_on_a_transparent_ground_can_be_seen(clear, mode):
    """A quarter of the range between letter and ground at least, whatever stands below the transparent pixels."""
    for grey in range(0, 256, 5):
        flat = to_rgb(letters(grey, clear, mode))
        values = np.asarray(flat).astype(int)
        ground = values[0, 0, 0]
        assert ground in (0, 255) and (ground == 255 or grey > 150), "white, as ever, where that can be read"
        assert np.abs(values - ground).max() >= 63, grey


def test_only_what_would_vanish_is_put_over_black():
    """White paper with dark letters is put over white, though most of it is white. What is opaque stays."""
    paper = Image.new("RGBA", (100, 100), (255, 255, 255, 255))
    paper.paste((20, 20, 20, 255), (30, 40, 60, 50))
    opaque = to_rgb(paper)
    assert np.array_equal(np.asarray(opaque), np.asarray(paper)[..., :3])
    paper.paste((0, 0, 0, 0), (0, 0, 100, 10))
    assert to_rgb(paper).getpixel((5, 5)) == (255, 255, 255)
    white = Image.new("RGBA", (8, 8), (255, 255, 255, 255))
    assert to_rgb(white).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (8, 8), (255, 255, 255, 0))).getpixel((0, 0)) == (255, 255, 255)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


TEXT_BOMB = png_header(9, 9) + png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20)))
NO_CHUNK_AFTER_THE_FIRST = png_header(9, 9) + png_chunk(b"IDAT", b"\x78\x9c") + b"\0\0\0\1\x01\x02\x03\x04" * 4
PPM = b"P6 2 2 255 " + bytes(12)  # Pillow could read it; this project does not


@pytest.mark.parametrize(
    ("width", "height"),
    [(8_001, 8_001), (12_000, 12_000), (60_000, 60_000), (MAX_PIXELS, 1), (1, MAX_PIXELS), (MAX_SIDE + 1, 1)],
)
def test_an_image_bomb_is_refused_from_its_header(tmp_path, monkeypatch, recwarn, width, height):
    def decoded(*_):
        raise AssertionError("decoded")

    (tmp_path / "bomb.png").write_bytes(png_header(width, height) + b"\0\0\0\0IDAT\0\0\0\0")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(BadRow, match="pixels"):
        load_image(tmp_path / "bomb.png", 8, 8)
    assert not recwarn.list


def test_the_largest_picture_allowed_is_read(tmp_path, monkeypatch):
    quarters().save(tmp_path / "a.png")
    monkeypatch.setattr(omni.data.images, "MAX_PIXELS", SIDE * SIDE)
    load_image(tmp_path / "a.png", 8, 8)
    monkeypatch.setattr(omni.data.images, "MAX_PIXELS", SIDE * SIDE - 1)
    with pytest.raises(BadRow, match=f"{SIDE} x {SIDE} pixels"):
        load_image(tmp_path / "a.png", 8, 8)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", PPM, b"\xff\xd8\xff", png_header(9, 9), TEXT_BOMB, NO_CHUNK_AFTER_THE_FIRST],
    ids=["empty", "text", "ppm", "jpeg header", "png header", "text bomb", "no chunk"],
)
def test_what_is_no_picture_is_one_line(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadRow) as caught:
        load_image(tmp_path / "a.png", 8, 8)
    assert "a.png" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(BadRow, match="No such file"):
        load_image(tmp_path / "absent.png", 8, 8)


def test_damage_anywhere_is_a_bad_row_or_a_picture_and_never_anything_else(tmp_path):
    rng = random.Random(0)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    path, refused = tmp_path / "a", 0
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        buffer = io.BytesIO()
        noise.save(buffer, format, **({} if format in ("GIF", "BMP") else {"exif": exif}))
        whole = buffer.getvalue()
        for _ in range(120):
            data = bytearray(whole)
            if rng.random() < 0.3:
                del data[rng.randrange(len(data)) :]
            else:
                for _ in range(rng.choice((1, 8))):
                    data[rng.randrange(min(len(data), rng.choice((64, 10_000))))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                assert load_image(path, 8, 8).shape == (3, 8, 8)
            except BadRow as error:
                refused += 1
                assert "\n" not in str(error)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadRow):
            load_image(path, 8, 8)
    assert refused > 100


# --- what makes no pixels ---------------------------------------------------------------------------------------------

TIFF = b"II*\0\x08\0\0\0"


def orientation_of_type(kind: int, count: int, value: bytes) -> bytes:
    return TIFF + struct.pack("<HHHI", 1, 0x0112, kind, count) + value.ljust(4, b"\0") + bytes(4)


BODIES = {  # of EXIF
    "empty": b"",
    "garbage": b"garbage that is no TIFF",
    "cut": TIFF + b"\xff\xff",
    "points outside": b"II*\0\xff\xff\xff\x7f",
    "no header": TIFF[:3],
    "a letter": orientation_of_type(2, 1, b"X"),
    "nine": orientation_of_type(3, 1, b"\x09"),
    "a fraction outside": orientation_of_type(5, 1, b"\xff\xff\xff\xff"),
    "a billion": orientation_of_type(3, 10**9, b"\x06"),
    "of no type": orientation_of_type(99, 1, b"\x06"),
    "points at itself": TIFF + struct.pack("<HHHII", 1, 0x8769, 4, 1, 8) + struct.pack("<I", 8),
    **{f"noise {i}": TIFF + random.Random(i).randbytes(40) for i in range(6)},
}
XMP_NOT_UTF8 = b'<x:xmpmeta \xa8\xff tiff:Orientation="1"/>'


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def encoded(format: str, **more) -> bytes:
    buffer = io.BytesIO()
    quarters().save(buffer, format, **more)
    return buffer.getvalue()


def with_broken_metadata() -> dict[str, list[bytes]]:
    """For each format files of the same picture: the first as it should be."""
    jpeg, png = encoded("JPEG"), encoded("PNG")
    jpegs = [segment(0xE1, b"Exif\0\0" + body) for body in BODIES.values()]
    jpegs += [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP_NOT_UTF8)]
    prefixes = (b"JFIF\0", b"Adobe", b"MPF\0", b"ICC_PROFILE\0", b"Photoshop 3.0\x008BIM", b"FPXR\0", b"Exif\0\0", b"")
    for marker in (*range(0xE0, 0xF0), 0xFE):
        jpegs += [segment(marker, prefix + tail) for prefix in prefixes for tail in (b"", b"\0", b"\xff" * 5)]
    chunks = [png_chunk(b"eXIf", body) for body in BODIES.values()]
    chunks += [png_chunk(b"eXIf", orientation_of_type(3, 1, b"\x06"))[:-1] + b"?"]  # its checksum is wrong
    bomb = zlib.compress(bytes(3 << 20))
    for name in (
        b"iCCP",
        b"zTXt",
        b"iTXt",
        b"tEXt",
        b"gAMA",
        b"cHRM",
        b"sRGB",
        b"pHYs",
        b"tIME",
        b"bKGD",
        b"noNe",
        b"exIf",
    ):
        bodies = (b"", b"\0", b"x\0\0" + bomb, b"x\0\7" + bomb, b"x\0\1\0\0\0" + bomb, b"\xff" * 40)
        chunks += [png_chunk(name, body) for body in bodies]
        chunks += [png_chunk(name, b"x\0\0y")[:-1] + b"?"]
    chunks += [png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_NOT_UTF8)]
    start, end = len(png_header(9, 9)), len(png) - 12
    webp = [encoded("WEBP", lossless=True, exif=body or b"x") for body in BODIES.values()]
    webp += [encoded("WEBP", lossless=True, xmp=XMP_NOT_UTF8, icc_profile=body) for body in (b"x", b"\xff" * 200)]
    return {
        "JPEG": [jpeg] + [jpeg[:2] + part + jpeg[2:] for part in jpegs],
        "PNG": [png] + [png[:at] + part + png[at:] for part in chunks for at in (start, end)],
        "WEBP": [encoded("WEBP", lossless=True), *webp],
    }


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_metadata_do_not_cost_the_picture(format):
    files = with_broken_metadata()[format]
    expected = load_image(Inline(files[0], ""), SIDE, SIDE)
    for file in files[1:]:
        assert torch.equal(load_image(Inline(file, ""), SIDE, SIDE), expected), file[:100]


def test_what_says_how_the_camera_was_held_is_no_metadata_to_ignore():
    exif = Image.Exif()
    exif[0x0112] = 3
    for format in ("JPEG", "PNG", "WEBP"):
        straight, turned = (load_image(Inline(encoded(format, exif=e), ""), SIDE, SIDE) for e in (b"", exif))
        assert (turned.flip(1, 2).int() - straight.int()).abs().max() < 60 and not torch.equal(turned, straight)


def test_a_file_larger_than_any_picture_or_of_too_many_pieces_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    quarters().save(path)
    monkeypatch.setattr(omni.data.metadata, "MAX_FILE_BYTES", path.stat().st_size - 1)
    with pytest.raises(BadRow, match="bytes, expected at most"):
        load_image(path, 8, 8)
    monkeypatch.undo()
    monkeypatch.setattr(omni.data.metadata, "MAX_READS", 1000)
    load_image(path, 8, 8)
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + png_chunk(b"tEXt", b"") * 1000 + whole[33:])
    with pytest.raises(BadRow, match="pieces"):
        load_image(path, 8, 8)
    gif = encoded("GIF")
    path.write_bytes(gif[:-1] + b"!\xfe\0" * 1000 + gif[-1:])
    load_image(path, 8, 8)  # behind the picture
    at = gif.index(b",\0\0\0\0")
    path.write_bytes(gif[:at] + b"!\xfe\0" * 1000 + gif[at:])
    with pytest.raises(BadRow, match="pieces"):
        load_image(path, 8, 8)


def test_the_largest_picture_costs_less_than_a_gigabyte(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("P", (8000, 8000)).save(tmp_path / "square.png", transparency=0, exif=exif, compress_level=1)
    code = f"""
import resource
from omni.data.images import load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_image({str(tmp_path / "square.png")!r}, 32, 320, fit="pad")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 900, f"{done.stdout} MiB"


def test_any_exception_of_a_decoder_is_a_bad_row(monkeypatch):
    for kind in (IndexError, UnicodeDecodeError, AttributeError, ZeroDivisionError, MemoryError, AssertionError):
        error = kind("utf-8", b"", 0, 1, "why") if kind is UnicodeDecodeError else kind("why")
        monkeypatch.setattr("PIL.Image.open", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(BadRow, match=rf"cannot read the picture: {kind.__name__}: .*why"):
            load_image(Inline(b"", ""), 8, 8)


def test_a_picture_is_a_regular_file_or_a_data_uri(tmp_path):
    quarters().save(tmp_path / "a.png")
    inline = Inline((tmp_path / "a.png").read_bytes(), "text/plain")  # the content decides
    assert torch.equal(load_image(inline, SIDE, SIDE), load_image(str(tmp_path / "a.png"), SIDE, SIDE))
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(BadRow, match="expected a file"):
            load_image(tmp_path / name, 8, 8)
    with pytest.raises(BadRow) as caught:
        load_image("\x1b[2J.png", 8, 8)
    assert str(caught.value).isprintable()


def test_normalise_is_mean_and_deviation_one_half():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    expected = torch.from_numpy((np.arange(256) / 255 - 0.5) / 0.5).float().view(1, 1, 16, 16).expand(2, 3, 16, 16)
    torch.testing.assert_close(normalise(values), expected, atol=1e-6, rtol=0)
