"""Videos: which frames are seen, the right way up, and what is said of files that are none."""

import io
import os
import random
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import omni.data.video
from omni.common.errors import BadRow
from omni.common.media import Inline
from omni.data.video import MAX_FRAME_PIXELS, evenly, load_frames


def clip(count: int = 10, side: int = 16) -> list[Image.Image]:
    """Frames that can be told apart: the red of frame i is 20 i."""
    return [Image.new("RGB", (side, side), (20 * i, 0, 200)) for i in range(count)]


def film(path: Path, count: int = 10, **more) -> Path:
    frames = clip(count)
    frames[0].save(path, save_all=True, append_images=frames[1:], **more)
    return path


def reds(frames: torch.Tensor) -> list[int]:
    assert frames.dtype == torch.uint8 and frames.is_contiguous()
    return [round(float(frame[0].float().mean()) / 20) for frame in frames]


@pytest.mark.parametrize(("name", "more"), [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})])
@pytest.mark.parametrize("count", [1, 2, 4, 10, 99])
def test_frames_are_evenly_spaced(tmp_path, name, more, count):
    frames, total = load_frames(film(tmp_path / name, **more), count, 8, 12)
    assert total == 10 and frames.shape == (min(count, 10), 3, 8, 12)
    assert reds(frames) == {1: [5], 2: [0, 9], 4: [0, 3, 6, 9]}.get(count, list(range(10)))


def test_a_folder_of_frames_is_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(clip(12)):
        frame.save(folder / f"frame {i}.png")
    (folder / "notes.txt").write_text("no frame")
    frames, total = load_frames(folder, 12, 16, 16)
    assert total == 12 and reds(frames) == list(range(12)), "frame 2 comes before frame 10"
    (folder / "frame 3.png").write_bytes(b"nothing")
    with pytest.raises(BadRow, match=r"frame 3\.png"):
        load_frames(folder, 12, 16, 16)


def test_a_still_picture_is_a_video_of_one_frame(tmp_path):
    clip()[7].save(tmp_path / "a.png")
    frames, total = load_frames(tmp_path / "a.png", 5, 16, 16)
    assert (reds(frames), total) == ([7], 1)


def movie(path: Path | io.BytesIO, codec: str, count: int = 10, size=(64, 48), options=None, **more) -> Path:
    """The same frames as a film, (48, 64): losses of the codec leave the red recognisable."""
    with av.open(path, "w", **more) as container:
        stream = container.add_stream(codec, rate=Fraction(10), options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for frame in clip(count):
            container.mux(stream.encode(av.VideoFrame.from_image(frame.resize(size))))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mov", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libvpx"), ("a.avi", "mpeg4"),
     ("a.ts", "libx264"), ("a.gif", "libx264")],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 4, 99])
def test_frames_of_films_are_evenly_spaced(tmp_path, name, codec, count):
    """Recognised by its content (the last is an MP4 by another name), whether or not the file says how many it has."""
    path = movie(tmp_path / name, codec, format="mp4" if name == "a.gif" else None)
    frames, total = load_frames(path, count, 8, 12)
    assert total == 10 and frames.shape == (min(count, 10), 3, 8, 12)
    assert reds(frames) == {1: [5], 4: [0, 3, 6, 9]}.get(count, list(range(10)))


def test_a_film_of_a_telephone_held_upright_is_shown_upright(tmp_path):
    """A quarter turn to the right, as the header of an MP4 says it (ISO 14496-12, the matrix of a track)."""
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        left_white = np.zeros((48, 64, 3), np.uint8)
        left_white[:, :32] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(left_white, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = slice(data.index(b"tkhd") + 4 + 40, data.index(b"tkhd") + 4 + 40 + 36)
    one = 1 << 16
    data[matrix] = np.array([0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30], ">i4").tobytes()
    (tmp_path / "a.mp4").write_bytes(data)
    (frame,), _ = load_frames(tmp_path / "a.mp4", 1, 64, 48)
    assert frame[:, :24].min() > 200 and frame[:, 40:].max() < 50, "what was left is above"


def test_what_is_no_video_says_what_would_be(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(500))
    with pytest.raises(BadRow, match=r"a\.mp4: .*MP4, .*GIF, WEBP, PNG.*folder of pictures"):
        load_frames(tmp_path / "a.mp4", 4, 16, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadRow, match="empty: expected a picture for each frame"):
        load_frames(tmp_path / "empty", 4, 16, 16)
    with pytest.raises(BadRow, match="No such file"):
        load_frames(tmp_path / "absent.gif", 4, 16, 16)
    for whole in (film(tmp_path / "half.gif"), movie(tmp_path / "half.mp4", "libx264")):
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(BadRow, match=whole.name):
            load_frames(whole, 10, 16, 16)
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16_000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(BadRow, match=r"sound\.mp4: .*no pictures"):
        load_frames(tmp_path / "sound.mp4", 4, 16, 16)


def test_a_playlist_opens_no_other_file(tmp_path):
    other = movie(tmp_path / "other.ts", "libx264")
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list2.mp4").write_text(f"ffconcat version 1.0\nfile {other.name}\n")
    for name in ("list.mp4", "list2.mp4"):
        with pytest.raises(BadRow, match=name):
            load_frames(tmp_path / name, 4, 16, 16)


def test_a_video_bomb_is_refused_by_its_header(tmp_path):
    buffer = io.BytesIO()
    frames = clip(2)
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    bomb = bytearray(buffer.getvalue())
    bomb[6:10] = b"\xff\xff\xff\xff"  # 65535 x 65535 pixels
    (tmp_path / "bomb.gif").write_bytes(bomb)
    with pytest.raises(BadRow, match="65535 x 65535|exceeds limit") as error:
        load_frames(tmp_path / "bomb.gif", 2, 16, 16)
    assert "bomb.gif" in str(error.value) and MAX_FRAME_PIXELS < 65535**2


# --- what hostile files cost ------------------------------------------------------------------------------------------


def gif(screen: int, *frames: int) -> bytes:
    """An animation on a screen of so many pixels a side, each frame a square of so many."""
    data = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    for side in frames:
        buffer = io.BytesIO()
        Image.new("P", (side, side)).save(buffer, "GIF")
        at = buffer.getvalue().index(b",\0\0\0\0")
        data += b"\x21\xf9\x04\x08\x05\0\0\0" + buffer.getvalue()[at:-1]
    return data + b";"


def test_every_frame_of_an_animation_is_measured_before_it_is_decoded():
    for second in (4500, 13_000):
        data = bytearray(gif(8, 8, 8))
        at = data.rindex(b",\0\0\0\0") + 5
        data[at : at + 4] = struct.pack("<HH", second, second)
        with pytest.raises(BadRow, match=f"{second} x {second} pixels, expected at most 20,000,000|exceeds limit"):
            load_frames(Inline(bytes(data), ""), 2, 16, 16)


@pytest.mark.parametrize("count", [1, 16])
def test_small_frames_on_a_large_screen_cost_what_the_screen_does(monkeypatch, count):
    """300 of them would take minutes: refused before the first is decoded."""
    bomb = Inline(gif(4400, *[8] * 300), "")
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.load_prepare", None)
    with pytest.raises(BadRow, match="more than 1,000,000,000 pixels would have to be decoded"):
        load_frames(bomb, count, 16, 16)


def test_a_million_frames_are_not_counted(monkeypatch):
    monkeypatch.setattr("omni.data.metadata.MAX_READS", 5_000)
    with pytest.raises(BadRow, match="more than 5,000 pieces"):
        load_frames(Inline(gif(8, *[8] * 3000), ""), 16, 16, 16)
    film = io.BytesIO()
    movie(film, "mpeg4", 12, format="avi")
    monkeypatch.setattr(omni.data.video, "MAX_PACKETS", 11)
    with pytest.raises(BadRow, match="expected at most 11 frames, found more"):
        load_frames(Inline(film.getvalue(), ""), 1, 8, 8)


CODECS = [
    ("mp4", "libx264", {"x264-params": "bframes=3"}),
    ("mp4", "libx264", {"x264-params": "open-gop=1:bframes=3"}),
    ("mpegts", "mpeg2video", {"bf": "2"}),
    ("matroska", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "10"}),
    ("webm", "libvpx-vp9", {"lag-in-frames": "10"}),
    ("avi", "mpeg4", {"bf": "2"}),
]


@pytest.mark.parametrize(("container", "codec", "options"), CODECS, ids=lambda value: str(value))
def test_no_more_is_decoded_than_leads_to_the_wanted_frames(monkeypatch, container, codec, options):
    """From the key frame before each; and they are the frames that decoding everything gives."""
    data = io.BytesIO()
    movie(data, codec, 36, format=container, options={"g": "6"} | options)
    film, spent = Inline(data.getvalue(), ""), []
    spend = omni.data.video._Budget.spend
    monkeypatch.setattr(
        omni.data.video._Budget, "spend", lambda self, *more: spent.append(more[2]) if more[2:] else spend(self, *more)
    )
    everything, total = load_frames(film, 36, 8, 8)
    assert total >= 36 and spent == [total]
    for count in (1, 2, 3, 4):
        spent.clear()
        frames, _ = load_frames(film, count, 8, 8)
        assert torch.equal(frames, everything[evenly(total, count)])
        assert spent[0] <= 13 * count < total or count > 2
    monkeypatch.undo()
    monkeypatch.setattr(omni.data.video, "MAX_FILM_PIXELS", total * 4096 - 1)
    load_frames(film, 2, 8, 8)
    with pytest.raises(BadRow, match="would have to be decoded. Expected a shorter or smaller video, or fewer frames"):
        load_frames(film, 36, 8, 8)


@pytest.mark.parametrize("first", [True, False])
def test_a_film_may_change_its_size_but_not_beyond_the_bound(monkeypatch, first):
    """Two transports one behind the other are one; whether the larger is met in the beginning or in mid-stream."""
    parts = []
    for size in ((64, 48), (192, 96)):
        parts.append(io.BytesIO())
        movie(parts[-1], "mpeg2video", size=size, format="mpegts")
    data = b"".join(part.getvalue() for part in (parts[::-1] if first else parts))
    frames, total = load_frames(Inline(data, ""), 99, 8, 8)
    assert total == len(frames) == 20 and set(reds(frames)) == set(range(10)) and reds(frames)[-1] == 9
    monkeypatch.setattr(omni.data.video, "MAX_FRAME_PIXELS", 64 * 48)
    with pytest.raises(BadRow):
        load_frames(Inline(data, ""), 99, 8, 8)


def test_any_exception_of_a_decoder_is_a_bad_row(tmp_path, monkeypatch):
    whole = movie(tmp_path / "a.mp4", "libx264")
    for kind in (IndexError, UnicodeDecodeError, AttributeError, ZeroDivisionError, MemoryError, AssertionError):
        error = kind("utf-8", b"", 0, 1, "why") if kind is UnicodeDecodeError else kind("why")
        for place in ("PIL.Image.open", "av.open", "omni.data.video._upright"):
            with monkeypatch.context() as patched:
                patched.setattr(place, lambda *_, error=error, **__: (_ for _ in ()).throw(error))
                with pytest.raises(BadRow, match=rf"a\.mp4: cannot read the video: {kind.__name__}: .*why"):
                    load_frames(whole, 3, 8, 8)


def test_tags_that_are_not_utf8_do_not_cost_the_film(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(path, "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(clip()[3].resize((64, 48)))))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"TITLE", b"\xff\xfe\xa8\xc3\xff"))
    assert reds(load_frames(path, 4, 8, 8)[0]) == [3]


def test_damage_anywhere_is_a_bad_row_or_a_film_and_never_anything_else():
    rng, files, refused = random.Random(0), [], 0
    for container, codec in (("mp4", "libx264"), ("matroska", "libvpx"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")):
        buffer = io.BytesIO()
        movie(buffer, codec, 6, options={"g": "3"}, format=container)
        files.append(buffer.getvalue())
    for format, more in (("GIF", {}), ("GIF", {"disposal": 2}), ("WEBP", {"lossless": True}), ("PNG", {"blend": 1})):
        buffer = io.BytesIO()
        clip(4)[0].save(buffer, format, save_all=True, append_images=clip(4)[1:], **more)
        files.append(buffer.getvalue())
    for whole in files:
        for _ in range(50):
            data = bytearray(whole)
            at, kind = rng.randrange(min(len(data), rng.choice((64, 400, 100_000)))), rng.randrange(5)
            if kind == 0:
                del data[at:]
            elif kind == 1:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 30)))
            elif kind == 2:
                del data[at : at + rng.choice((1, 2, 50))]
            else:
                for near in range(at, min(at + rng.choice((1, 8)), len(data))):
                    data[near] = rng.choice((rng.randrange(256), data[near] ^ 1 << rng.randrange(8)))
            try:
                frames, total = load_frames(Inline(bytes(data), "video"), 16, 8, 8)
                assert frames.shape == (min(total, 16), 3, 8, 8)
            except BadRow as error:
                refused += 1
                assert str(error).isprintable()
    assert refused > 100


def test_films_and_animations_that_are_transparent_are_flattened_as_pictures_are(tmp_path):
    letters = Image.new("RGBA", (64, 48), (255, 255, 255, 0))
    letters.paste((255, 255, 255, 255), (10, 10, 20, 30))
    dark = letters.copy()
    dark.paste((0, 0, 0, 255), (10, 10, 20, 30))
    for frame, ground in ((letters, 0), (dark, 255)):
        for name, more in (("a.png", {}), ("a.webp", {"lossless": True}), ("a.gif", {})):
            turned = frame.transpose(Image.Transpose.ROTATE_180)
            frame.save(tmp_path / name, save_all=True, append_images=[turned], **more)
            found = load_frames(tmp_path / name, 2, 48, 64)[0]
            assert (found[:, :, 0, 0] == ground).all() and (found[0, :, 20, 15].int() - ground).abs().min() > 200, name
        with av.open(tmp_path / "a.mov", "w") as container:
            stream = container.add_stream("qtrle", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "argb"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.array(frame), format="rgba")))
            container.mux(stream.encode())
        found = load_frames(tmp_path / "a.mov", 2, 48, 64)[0]
        assert (found[0, :, 0, 0] == ground).all() and (found[0, :, 20, 15].int() - ground).abs().min() > 200


def test_a_folder_of_frames_is_bounded_and_each_of_its_files_named(tmp_path, monkeypatch):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(clip(6)):
        frame.save(folder / f"{i}.png")
    os.mkfifo(folder / "6.png")
    (folder / "7.png").symlink_to(folder / "absent")
    (folder / "8.png").symlink_to("8.png")
    assert reds(load_frames(folder, 1, 8, 8)[0]) == [4], "what is not asked for is not opened"
    for name, reason in (("6.png", "expected a file"), ("7.png", "No such file"), ("8.png", "symbolic links")):
        with pytest.raises(BadRow, match=rf"{name}: .*{reason}"):
            load_frames(folder, 99, 8, 8)
        (folder / name).unlink()
        (folder / f"{name[0]}.txt").touch()
    monkeypatch.setattr(omni.data.video, "MAX_FILES", 9)
    load_frames(folder, 2, 8, 8)
    (folder / "9.txt").touch()
    with pytest.raises(BadRow, match="at most 9 files"):
        load_frames(folder, 2, 8, 8)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(BadRow, match=r"pipe\.mp4: expected a file"):
        load_frames(tmp_path / "pipe.mp4", 2, 8, 8)


@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_evenly_is_even_from_end_to_end(total):
    for count in range(2, 30):
        found = evenly(total, count)
        assert len(found) == len(set(found)) == min(count, total) and found[-1] == total - 1 and found[0] == 0
        steps = {after - before for before, after in zip(found[:-1], found[1:], strict=True)}
        assert not steps or max(steps) - min(steps) <= 1
