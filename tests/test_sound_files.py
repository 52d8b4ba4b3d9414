"""Whatever holds sound is read to its end and measured; what was cut off, and what is no sound, is refused by name."""

import base64
import io
import os
import struct
import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile
from harness import ROOT

from omni.common.errors import BadRow
from omni.common.media import Inline
from omni.data.audio import MelSpec, audio_length, load_audio, resample, resampled_length

RATE = 16_000
NOISE = (0.1 * np.random.default_rng(0).standard_normal(24_000)).astype(np.float32)


class Pipe(io.RawIOBase):
    """Where nobody can go back to write a length."""

    def __init__(self, file: io.BytesIO) -> None:
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        return self.file.write(bytes(data))


def encoded(kind: str, codec: str, rate: int = RATE, *, pipe: bool = False, path=None, **options) -> bytes:
    """NOISE as FFmpeg writes it; into ``path`` if that is given."""
    file = io.BytesIO()
    with av.open(path or (Pipe(file) if pipe else file), "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray((NOISE * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        context = stream.codec_context
        resampler = av.AudioResampler(context.format, "mono", rate, frame_size=context.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))
    return path.read_bytes() if path else file.getvalue()


def wav(riff: int | None = None, data: int | None = None, subtype: str = "PCM_16", samples: int = 1600) -> bytes:
    """A WAV file, with other sizes in its header."""
    file = io.BytesIO()
    soundfile.write(file, NOISE[:samples], RATE, format="WAV", subtype=subtype)
    content = bytearray(file.getvalue())
    at = content.index(b"data") + 4
    for place, size in ((4, riff), (at, data)):
        if size is not None:
            content[place : place + 4] = struct.pack("<I", size)
    return bytes(content)


def read(tmp_path, content: bytes, name: str = "a.bin", **keys) -> np.ndarray:
    """The same from a file and from a data URI, and as long as it was measured."""
    path = tmp_path / name
    path.write_bytes(content)
    waveform = load_audio(path, RATE, **keys)
    samples, rate = audio_length(path)
    assert len(waveform) == resampled_length(samples, rate, RATE)
    if name == "a.bin":
        assert np.array_equal(load_audio(Inline(content, "audio/any"), RATE, **keys), waveform)
    return waveform


def likeness(waveform: np.ndarray, truth: np.ndarray = NOISE) -> float:
    """Correlation at the best of some delays, below 3 kHz, which every codec keeps."""
    size = 1 << 16
    spectra = [
        np.fft.rfft(signal, size) * (np.arange(size // 2 + 1) < 3000 * size / RATE) for signal in (waveform, truth)
    ]
    matched = np.fft.irfft(spectra[0] * spectra[1].conj())
    return float(np.abs(matched).max() / np.sqrt(np.prod([np.square(np.fft.irfft(one)).sum() for one in spectra])))


# --- formats ---------------------------------------------------------------------------------------------------------

ENCODED = [
    ("wav", "pcm_s16le", RATE), ("flac", "flac", RATE), ("aiff", "pcm_s16be", RATE), ("au", "pcm_s16be", RATE),
    ("caf", "pcm_s16le", RATE), ("w64", "pcm_s16le", RATE), ("wv", "wavpack", RATE), ("ogg", "libopus", 48_000),
    ("webm", "libopus", 48_000), ("mp3", "libmp3lame", 44_100), ("mp3", "libmp3lame", 22_050), ("adts", "aac", 44_100),
    ("ipod", "aac", 44_100), ("mp4", "aac", 48_000), ("matroska", "aac", 44_100), ("avi", "libmp3lame", 44_100),
    ("mpegts", "aac", 44_100),
]  # fmt: skip
INTO_A_PIPE = {"mp3": {"write_xing": "0"}} | dict.fromkeys(("ipod", "mp4"), {"movflags": "frag_keyframe+empty_moov"})


@pytest.mark.parametrize("pipe", [False, True], ids=["file", "pipe"])
@pytest.mark.parametrize(("kind", "codec", "rate"), ENCODED)
def test_what_people_have_is_read_whole(tmp_path, kind, codec, rate, pipe):
    if pipe and kind == "w64":
        pytest.skip("libsndfile reads it from a file only")
    options = INTO_A_PIPE.get(kind, {}) if pipe else {}
    waveform = read(tmp_path, encoded(kind, codec, rate, pipe=pipe, **options))
    assert -0.01 * RATE < len(waveform) - len(NOISE) < 0.16 * RATE, "the codec's own delay aside"
    assert likeness(waveform) > 0.9


@pytest.mark.parametrize(("name", "kind", "codec", "rate"), [
    ("a.g722", "g722", "g722", RATE), ("A.G722", "g722", "g722", RATE), ("a.ulaw", "mulaw", "pcm_mulaw", 8000),
    ("a.sln16", "s16le", "pcm_s16le", RATE), ("a.sln", "s16le", "pcm_s16le", 8000),
])  # fmt: skip
def test_formats_without_a_header_are_known_by_their_ending(tmp_path, name, kind, codec, rate):
    waveform = read(tmp_path, encoded(kind, codec, rate), name)
    assert abs(len(waveform) - len(NOISE)) < 100 and likeness(waveform) > 0.9


def test_a_raw_file_is_refused_with_its_reason(tmp_path):
    (tmp_path / "a.raw").write_bytes(NOISE.tobytes())
    for use in (audio_length, lambda path: load_audio(path, RATE)):
        with pytest.raises(BadRow, match=r"a.raw: not an audio file .*without a header"):
            use(tmp_path / "a.raw")


@pytest.mark.parametrize("kind", ["mp3", "adts"])
def test_tags_and_zeros_around_the_frames_are_passed_over(tmp_path, kind):
    content = encoded(kind, {"mp3": "libmp3lame", "adts": "aac"}[kind])
    content = content[content.index(b"\xff") :] if kind == "adts" else content
    expected = read(tmp_path, content)
    tag = b"ID3\x03\0\0" + bytes([0, 0, 9000 >> 7, 9000 & 127]) + bytes(range(250)) * 36
    ape = b"APETAGEX\xd0\x07\0\0" + bytes(20) + b"picture " * 99
    for before, after in (
        (tag, b""),
        (tag + tag, b""),
        (bytes(2000), b""),
        (b"", b"TAG" + bytes(125)),
        (b"", ape),
        (b"", b"\xff\xfb" + b"x" * 300),
    ):
        found = read(tmp_path, before + content + after)
        assert abs(len(found) - len(expected)) <= 2 * 1152 and likeness(found, expected) > 0.99, (before[:3], after[:3])


def test_a_film_is_read_for_its_sound(tmp_path):
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("mpeg4", rate=10), container.add_stream("aac", rate=RATE, layout="mono")
        pictures.width = pictures.height = 32
        for _ in range(40):  # longer than its sound
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(NOISE[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        for part in [*av.AudioResampler("fltp", "mono", RATE, frame_size=1024).resample(frame), None]:
            container.mux(sound.encode(part))
        container.mux(pictures.encode(None))
    assert likeness(load_audio(path, RATE)) > 0.9


@pytest.mark.parametrize("content", [
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=audio 5004 RTP/AVP 0\r\n", b"not sound" * 99, b"",
    b"\xff\xfb" + b"x" * 2000, b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(99), b"\xff\xf1" * 500,
    b"\0\0\0\x1cftypM4A " + bytes(99),
], ids=range(9))  # fmt: skip
@pytest.mark.parametrize("name", ["a.bin", "a.mp3", "a.m4a", "a.wav", "a.m3u8"])
def test_what_is_no_sound_is_refused_and_playlists_open_nothing(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRow, match=name):
        load_audio(tmp_path / name, RATE)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(BadRow, match="found a folder, pipe or device"):
        load_audio(tmp_path / "a.wav", RATE)


def test_a_data_uri_is_a_file(tmp_path):
    from omni.common.media import parse_data_uri

    content = wav()
    inline = parse_data_uri("data:audio/wav;base64," + base64.b64encode(content).decode())
    assert audio_length(inline) == (1600, RATE) and len(load_audio(inline, RATE)) == 1600
    with pytest.raises(BadRow, match=r"data:audio/wav .*truncated"):
        load_audio(Inline(content[:-7], "audio/wav"), RATE)


# --- lengths ---------------------------------------------------------------------------------------------------------

SIZES = (0, 0x7FFF0000, 0x7FFFF000, 0x7FFFFF00, 0x7FFFFFFF, 0x80000000, 0xFFFFF000, 0xFFFFFFDB, 0xFFFFFFFF)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "PCM_24"])
def test_a_wav_whose_header_does_not_know_its_length_is_read_to_its_end(tmp_path, subtype):
    """All sizes that stand for "unknown", with each size of the whole that stands beside them."""
    expected = read(tmp_path, wav(subtype=subtype))
    assert len(expected) == 1600
    for data in SIZES:
        for riff in {0, 36, 0x7FFFFFFF, 0xFFFFFFFF, data, min(data + 36, 0xFFFFFFFF)}:
            content = wav(riff, data, subtype)
            assert np.array_equal(read(tmp_path, content), expected), (hex(riff), hex(data))
            short = read(tmp_path, content[:-401])
            assert np.array_equal(short, expected[: len(short)]) and len(short) in range(1390, 1600)


def test_every_truncation_of_a_wav_is_refused(tmp_path):
    content = wav(samples=400)
    for length in (*range(60), *range(60, len(content), 7), len(content) - 1):
        with pytest.raises(BadRow, match=r"a.wav: .*(truncated|not an audio file)"):
            read(tmp_path, content[:length], "a.wav")
    assert len(read(tmp_path, content + b"LIST\x04\0\0\0abcd", "a.wav")) == 400


def test_an_empty_wav_is_empty(tmp_path):
    for content in (wav(samples=0), wav(samples=0) + b"LIST\x04\0\0\0abcd"):
        content = content[:4] + struct.pack("<I", len(content) - 8) + content[8:]
        with pytest.raises(BadRow, match="empty"):
            read(tmp_path, content)


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp3", "libmp3lame"), ("flac", "flac"), ("ipod", "aac"), ("webm", "libopus")]
)
def test_what_was_cut_off_is_refused_wherever_a_header_says_how_long_it_was(tmp_path, kind, codec):
    options = {"movflags": "faststart"} if kind == "ipod" else {}
    content = encoded(kind, codec, 48_000, path=tmp_path / "whole", **options)
    for share in (0.2, 0.3) if kind == "webm" else (0.2, 0.5, 0.9, 0.98):
        with pytest.raises(BadRow, match="truncated"):
            read(tmp_path, content[: int(share * len(content))])


def test_nothing_is_decoded_beyond_the_bound(tmp_path):
    """An MP3 that does not say how long it is, of hours: refused once the bound is passed; in little memory."""
    one = encoded("mp3", "libmp3lame", write_xing="0", id3v2_version="0")
    (tmp_path / "long.mp3").write_bytes(one * 1000)
    code = f"""
import resource, omni.data.sound_files
from omni.data.audio import load_audio
from omni.common.errors import BadRow
blocks, used = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
values = omni.data.sound_files._values
omni.data.sound_files._values = lambda frame: blocks.append(frame.samples) or values(frame)
try:
    load_audio({str(tmp_path / "long.mp3")!r}, 16_000, max_s=20)
except BadRow as error:
    print(error)
print(sum(blocks), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    refused, counts = done.stdout.splitlines()
    decoded, kibibytes = map(int, counts.split())
    assert "lasts more than 20.0 s, expected at most 20 s" in refused
    assert decoded < 21 * RATE and kibibytes < 100_000


def test_the_length_after_resampling_is_counted_exactly():
    """For thousands of lengths and rates, what the index counts is what is read; frames are whole hops of it."""
    rng, spec = np.random.default_rng(0), MelSpec()
    for rate in (8000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 12_345):
        lengths = np.concatenate(
            [np.arange(1, 400), rng.integers(400, 3 * rate, 30), 160 * rate // 16_000 * np.arange(1, 60)]
        )
        for to in (16_000, 22_050):
            counted = resampled_length(lengths, rate, to)
            for samples, expected in zip(lengths.tolist(), counted.tolist(), strict=True):
                assert len(resample(np.zeros(samples, np.float32), rate, to)) == expected
    exact = np.arange(1, 4001) * 160
    assert (spec.frames(resampled_length(exact, 16_000, 16_000)) == np.arange(1, 4001)).all()
    assert (spec.frames(resampled_length(3 * exact, 48_000, 16_000)) == np.arange(1, 4001)).all()
