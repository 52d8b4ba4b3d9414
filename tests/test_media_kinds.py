"""omni.common.media.kind_of: what a file holds is known by its content, whatever its name."""

import io

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from omni.common.errors import BadRow
from omni.common.media import Inline, kind_of
from omni.data.images import FORMATS

SOUND_FILES = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64", "WAVEX")
CONTAINERS = {"mp4": ("mpeg4", "aac"), "mov": ("mpeg4", "aac"), "matroska": ("mpeg4", "aac"), "avi": ("mpeg4", "mp3"),
              "mpegts": ("mpeg2video", "mp2"), "webm": ("libvpx", "libopus")}  # fmt: skip
NAMES = ("right", "a.webp", "a.jfif", "a", "a.mp3", "a.png", "a.mp4", "a.txt")


def picture(kind: str, frames: int = 1) -> bytes:
    file, still = io.BytesIO(), [Image.new("RGB", (16, 16), (80 * number, 0, 0)) for number in range(frames)]
    still[0].save(file, kind, **({"save_all": True, "append_images": still[1:]} if frames > 1 else {}))
    return file.getvalue()


def sound(kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(8000) / 9).astype(np.float32), 16000, format=kind)
    return file.getvalue()


def container(kind: str, pictures: bool, sounds: bool, cover: bool = False) -> bytes:
    file, (see, hear) = io.BytesIO(), CONTAINERS[kind]
    with av.open(file, "w", format=kind) as written:
        tracks = []
        if pictures or cover:
            track = written.add_stream("mjpeg" if cover else see, 25)
            track.width = track.height = 32
            track.pix_fmt = "yuvj420p" if cover else "yuv420p"
            if cover:
                track.disposition = av.stream.Disposition.attached_pic
            pixels = np.zeros((32, 32, 3), np.uint8)
            tracks.append((track, av.VideoFrame.from_ndarray(pixels).reformat(format=track.pix_fmt), 1 if cover else 5))
        if sounds:
            track = written.add_stream(hear, 48000, layout="mono")
            samples = np.zeros((1, 960), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
            frame.sample_rate = 48000
            tracks.append((track, frame, 20))
        for track, frame, count in tracks:
            for number in range(count):
                frame.pts = number * (960 if track.type == "audio" else 1)
                written.mux(track.encode(frame))
            written.mux(track.encode())
    return file.getvalue()


MADE = {
    **{f"{kind} picture": ("picture", lambda kind=kind: picture(kind)) for kind in FORMATS},
    **{f"animated {kind}": ("picture", lambda kind=kind: picture(kind, 3)) for kind in ("GIF", "WEBP", "PNG")},
    **{f"{kind} sound": ("sound", lambda kind=kind: sound(kind)) for kind in SOUND_FILES},
    **{f"{kind} film": ("film", lambda kind=kind: container(kind, True, False)) for kind in CONTAINERS},
    **{f"{kind} film with sound": ("film", lambda kind=kind: container(kind, True, True)) for kind in CONTAINERS},
    **{f"{kind} sound alone": ("sound", lambda kind=kind: container(kind, False, True)) for kind in CONTAINERS},
}


@pytest.mark.parametrize("what", MADE)
def test_a_file_is_what_it_holds_whatever_its_name(tmp_path, what):
    kind, make = MADE[what]
    data = make()
    for name in NAMES:
        path = tmp_path / (f"a.{what.split()[0].lower()}" if name == "right" else name)
        path.write_bytes(data)
        assert kind_of(path) == kind, name
    assert kind_of(Inline(data, "text/plain")) == kind


def test_a_recording_with_a_cover_is_a_recording():
    assert kind_of(Inline(container("mp4", False, True, cover=True), "")) == "sound"


def test_mpeg_audio_without_a_tag_is_sound():
    data = sound("MP3")
    start = next(at for at in range(len(data)) if data[at] == 0xFF and data[at + 1] & 0xE0 == 0xE0)
    assert kind_of(Inline(data[start:], "")) == "sound"
    file = io.BytesIO()
    with av.open(file, "w", format="adts") as written:
        track = written.add_stream("aac", 16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        written.mux(track.encode(frame))
        written.mux(track.encode())
    assert kind_of(Inline(file.getvalue(), "")) == "sound"


@pytest.mark.parametrize("data", [b"", b"\xff", b"RIFF", b"RIFF1234ACON", b"<svg/>", b"%PDF-1.7", b"H" * 400,
                                  b"red cat", bytes(1000), b"PK\x03\x04"])  # fmt: skip
def test_anything_else_is_unknown(data):
    assert kind_of(Inline(data, "image/png")) == "unknown"


@pytest.mark.parametrize("what", MADE)
def test_a_damaged_file_has_a_kind_too(what):
    kind, make = MADE[what]
    data = make()
    rng = np.random.default_rng(3)
    for cut in rng.integers(0, len(data), 20):
        assert kind_of(Inline(data[:cut], "")) in ("picture", "film", "sound", "unknown")
    for _ in range(20):
        flipped = bytearray(data)
        flipped[rng.integers(0, min(400, len(data)))] ^= 1 << rng.integers(0, 8)
        assert kind_of(Inline(bytes(flipped), "")) in ("picture", "film", "sound", "unknown")


def test_what_cannot_be_opened_is_a_bad_row(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BadRow):
            kind_of(path)
