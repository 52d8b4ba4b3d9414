"""Videos: which frames are seen, the right way up, and what is said of files that are none."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from omni.errors import BadRow
from omni.images import MAX_PIXELS
from omni.video import evenly, load_frames


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


def movie(path: Path, codec: str, count: int = 10, frames_per_second: int = 10, **more) -> Path:
    """The same frames as a film, (48, 64): losses of the codec leave the red recognisable."""
    with av.open(path, "w", **more) as container:
        stream = container.add_stream(codec, rate=Fraction(frames_per_second))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in clip(count):
            container.mux(stream.encode(av.VideoFrame.from_image(frame.resize((64, 48)))))
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
    assert "bomb.gif" in str(error.value) and MAX_PIXELS < 65535**2


@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_evenly_is_even_from_end_to_end(total):
    for count in range(2, 30):
        found = evenly(total, count)
        assert len(found) == len(set(found)) == min(count, total) and found[-1] == total - 1 and found[0] == 0
        steps = {after - before for before, after in zip(found[:-1], found[1:], strict=True)}
        assert not steps or max(steps) - min(steps) <= 1
