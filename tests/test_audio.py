"""Audio files of every kind become the same waveform, broken and hostile ones are refused by name, and a log-mel is
what librosa says it is."""

import subprocess
import sys

import librosa
import numpy as np
import pytest
import soundfile
import torch
from harness import ROOT

from omni.common.errors import BadRow, collected_notes
from omni.data.audio import (
    MelSpec,
    audio_length,
    griffin_lim,
    load_audio,
    load_speech,
    log_mel,
    mel_filters,
    normalise_features,
    perturb_speed,
    reflect,
    resampled_length,
    spec_augment,
)

MEL = MelSpec()


def tone(hz: float, seconds: float = 0.5, rate: int = 16_000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def amplitude(waveform: np.ndarray, hz: float, rate: int = 16_000) -> float:
    turns = np.exp(-2j * np.pi * hz * np.arange(len(waveform)) / rate)
    return 2 * abs(np.mean(waveform * turns))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize(("suffix", "rate"), [("wav", 16_000), ("flac", 44_100), ("ogg", 22_050), ("mp3", 48_000)])
def test_every_format_rate_and_channel_count_is_the_same_waveform(tmp_path, suffix, rate, channels):
    if suffix == "mp3" and channels > 2:
        pytest.skip("MP3 has at most two channels")
    path = tmp_path / f"a.{suffix}"
    # only their mean is the tone
    parts = np.stack([tone(440, rate=rate) * 2 * (i + 1) / (channels + 1) for i in range(channels)], axis=1)
    soundfile.write(path, parts * 0.5, rate)
    waveform = load_audio(path, 16_000)
    assert waveform.dtype == np.float32 and abs(len(waveform) - 8000) <= 1
    assert amplitude(waveform, 440) == pytest.approx(0.25, rel=0.1 if suffix == "mp3" else 0.02)
    assert audio_length(path) == (pytest.approx(rate / 2, abs=1), rate)


def test_resampling_is_band_limited(tmp_path):
    soundfile.write(tmp_path / "high.wav", tone(11_000, rate=44_100), 44_100)
    assert np.abs(load_audio(tmp_path / "high.wav", 16_000)[500:-500]).max() < 1e-3  # no alias at 5000 Hz


def damaged(folder, kind: str):
    path = folder / f"bad.{kind.split()[0]}"
    if kind.endswith("junk"):
        path.write_bytes(b"not sound" * 99)
    elif kind.endswith("cut"):
        soundfile.write(path, noise(32_000).numpy(), 16_000)
        path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    elif kind.endswith("empty"):
        soundfile.write(path, noise(0).numpy(), 16_000)
    elif kind.endswith("nan"):
        soundfile.write(path, np.array([0, np.nan, 0]), 16_000, subtype="FLOAT")
    elif kind.endswith("rate"):
        soundfile.write(path, noise(1000).numpy(), 3)
    elif kind.endswith("long"):
        soundfile.write(path, noise(33_000).numpy(), 16_000)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("wav junk", "not an audio file"), ("wav cut", "truncated"), ("flac cut", "truncated"),
        ("mp3 cut", "truncated"), ("wav empty", "empty"), ("wav nan", "not finite"), ("wav rate", "Hz, found 3"),
        ("wav long", "lasts 2.1 s"), ("wav absent", "No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path, kind, reason):
    with pytest.raises(BadRow, match=reason):
        load_audio(damaged(tmp_path, kind), 16_000, max_s=2.0)


def test_ten_hours_and_a_thousand_channels_cost_no_memory(tmp_path):
    long, wide = tmp_path / "long.wav", tmp_path / "wide.wav"
    soundfile.write(long, noise(100).numpy(), 16_000)
    header = bytearray(long.read_bytes()[:44])
    size = 10 * 3600 * 16_000 * 2
    header[4:8], header[40:44] = (size + 36).to_bytes(4, "little"), size.to_bytes(4, "little")
    long.write_bytes(header)
    with open(long, "r+b") as file:
        file.truncate(44 + size)  # sparse: no disk either
    with soundfile.SoundFile(wide, "w", 16_000, 1000) as file:
        for _ in range(40):
            file.write(np.zeros((1600, 1000), np.int16))
    code = f"""
import resource
from omni.data.audio import audio_length, load_audio
from omni.common.errors import BadRow
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_audio({str(long)!r}, 16_000, max_s=20)
except BadRow as error:
    print(error)
assert audio_length({str(long)!r}) == (576_000_000, 16_000)
assert len(load_audio({str(wide)!r}, 16_000, max_s=20)) == 64_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    refused, kibibytes = done.stdout.splitlines()
    assert "lasts 36000.0 s, expected at most 20 s" in refused
    assert int(kibibytes) < 100_000  # the wide one alone has 256 MB of float32


# --- levels and channels ---------------------------------------------------------------------------------------------


def write_float(path, samples: np.ndarray):
    soundfile.write(path, samples, 16_000, subtype="FLOAT", format="WAV")
    return path


@pytest.mark.parametrize("sample", [0.0, 1e-30, 1e-8, 0.003, 0.4, -0.97, 1.0])
def test_a_flipped_bit_of_a_sample_is_a_bad_row_or_does_no_harm(tmp_path, sample):
    """Each bit of a float32: never a log-mel that is not finite, or beyond what eight times full scale gives."""
    clean, outcomes = 0.2 * noise(4000).numpy(), set()
    for bit in range(32):
        samples = clean.copy()
        samples[2000] = sample
        samples.view(np.uint32)[2000] ^= np.uint32(1 << bit)
        with collected_notes() as notes:
            try:
                found = log_mel(torch.from_numpy(load_audio(write_float(tmp_path / "a.wav", samples), 16_000)), MEL)
            except BadRow as error:
                assert "expected at most 1" in str(error) or "not finite" in str(error)
                outcomes.add("refused")
                continue
        assert found.isfinite().all() and found.max() < np.log(8 * MEL.win_length) and not notes
        outcomes.add("used")
    assert outcomes == ({"refused", "used"} if abs(sample) > 1e-9 else outcomes)


def test_floats_in_the_range_of_16_bit_integers_are_scaled_and_told(tmp_path):
    speech = np.concatenate([np.zeros(4000), tone(300, 0.4), 0.001 * tone(300, 0.1)]).astype(np.float32)
    for peak, scaled in ((1, 1), (4, 4), (100, 100 / 32768), (3000, 3000 / 32768), (32767, 32767 / 32768)):
        with collected_notes() as notes:
            found = load_audio(write_float(tmp_path / "a.wav", speech * 2 * peak), 16_000)
        np.testing.assert_allclose(found, speech * 2 * scaled, rtol=1e-5)
        assert len(notes) == (peak >= 100) and all("range of 16-bit integers" in note for note in notes)
    for factor in (40_000, 1e9, 1e38):
        with pytest.raises(BadRow, match="samples up to .*, expected at most 1"):
            load_audio(write_float(tmp_path / "a.wav", speech * 2 * factor), 16_000)
    with pytest.raises(BadRow, match="samples up to 2e"):  # a single one is damage, and no scale
        load_audio(write_float(tmp_path / "a.wav", np.append(speech, 20_000)), 16_000)


def channels_of(kind: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """Channels (S, C), the expected mono, and whether it is told that they cancel out."""
    x, y = 0.1 * noise(8000).numpy(), 0.1 * noise(8000, seed=1).numpy()
    later = np.concatenate([np.zeros(40, np.float32), x[:-40]])
    left, right = {
        "equal": (x, x), "left only": (x, 0 * x), "right only": (0 * x, x), "unrelated": (x, y), "delayed": (x, later),
        "delayed and turned": (x, -later), "quieter and turned": (x, -0.3 * x), "silent": (0 * x, 0 * x),
        "turned": (x, -x), "turned, nearly as loud": (-0.8 * x, x), "turned, with noise": (x, -x + 0.1 * y),
    }[kind]  # fmt: skip
    cancel = kind.startswith("turned")
    louder = left if np.square(left).sum() >= np.square(right).sum() else right
    return np.stack([left, right], axis=1), louder if cancel else (left + right) / 2, cancel


@pytest.mark.parametrize("kind", [
    "equal", "left only", "right only", "unrelated", "delayed", "delayed and turned", "quieter and turned", "silent",
    "turned", "turned, nearly as loud", "turned, with noise",
])  # fmt: skip
def test_channels_that_cancel_out_are_not_averaged(tmp_path, kind):
    channels, expected, cancel = channels_of(kind)
    with collected_notes() as notes:
        found = load_audio(write_float(tmp_path / "a.wav", channels), 16_000)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(notes) == cancel and all("a.wav: its channels cancel out: channel " in note for note in notes)


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000])
def test_a_clip_shorter_than_a_window_is_refused(tmp_path, rate):
    """Lengths from one sample on: refused with how long it lasts, or as many frames as the index counts."""
    path = tmp_path / "a.wav"
    for samples in (*range(1, 40), *range(40, 2000, 61)):
        soundfile.write(path, noise(samples).numpy(), rate)
        at_16k = int(resampled_length(samples, rate, 16_000))
        for load, least in ((lambda: load_audio(path, 16_000), 1), (lambda: load_speech(path, MEL, 99), 640)):
            if at_16k < least:
                with pytest.raises(BadRow, match=r"a.wav: lasts [\d.e-]+ ms, expected at least"):
                    load()
            else:
                found = log_mel(torch.from_numpy(load()), MEL)
                assert len(found) == MEL.frames(at_16k) and found.isfinite().all()


# --- log-mels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mel", [MEL, MelSpec(22_050, 1024, 1024, 256, 80, 0.0, 8000.0), MelSpec(n_mels=128)])
def test_log_mel_is_librosa_s(mel):
    waveform = noise(mel.hop_length * 99)
    pad = (mel.win_length - mel.hop_length) // 2
    padded = np.pad(waveform.numpy().astype(np.float64), pad, mode="reflect")
    around = (mel.n_fft - mel.win_length) // 2  # librosa's frames are n_fft wide, zero around the window
    spectrum = librosa.stft(
        np.pad(padded, around), n_fft=mel.n_fft, hop_length=mel.hop_length, win_length=mel.win_length, center=False
    )
    filters = librosa.filters.mel(
        sr=mel.sample_rate, n_fft=mel.n_fft, n_mels=mel.n_mels, fmin=mel.f_min, fmax=mel.f_max
    )
    assert np.abs(mel_filters(mel) - filters).max() < 1e-7
    expected = np.log(np.maximum(filters @ np.abs(spectrum), 1e-5)).T
    assert np.abs(log_mel(waveform, mel).numpy() - expected).max() <= 1e-4


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 300, 639, 641, 16_000, 16_001])
def test_a_frame_for_every_hop_that_has_begun(samples):
    frames = log_mel(noise(2 * samples).view(2, samples), MEL)
    assert frames.shape == (2, -(-samples // 160), 80) and frames.isfinite().all()
    assert MEL.frames(samples) == frames.shape[1]


def test_batched_and_autocast_log_mels_are_the_single_ones():
    waveforms = noise(6 * 4000).view(2, 3, 4000)
    batched = log_mel(waveforms, MEL)
    torch.testing.assert_close(batched[1, 2], log_mel(waveforms[1, 2], MEL), atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel(waveforms, MEL), batched)


def test_reflected_as_f_pad_does_and_so_is_the_gradient():
    for shape, left, right in (((5000,), 300, 41), ((3, 1, 700), 0, 6), ((2, 64), 63, 63), ((9,), 0, 0)):
        ours, theirs = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in "ab")
        padded = torch.nn.functional.pad(theirs.reshape(1, -1, shape[-1]), (left, right), mode="reflect")
        ours_padded, padded = reflect(ours, left, right), padded.reshape(*shape[:-1], -1)
        assert torch.equal(ours_padded, padded)
        for waveform in (ours_padded, padded):
            waveform.sin().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)


def test_the_gradient_is_right_and_finite_in_silence():
    waveform = noise(3200)
    waveform[:1600] = 0
    direction = 1e-3 * noise(3200, seed=1)
    waveform.requires_grad_()
    log_mel(waveform, MEL).sum().backward()
    assert waveform.grad.isfinite().all()
    with torch.no_grad():
        slope = (log_mel(waveform + direction, MEL) - log_mel(waveform - direction, MEL))[12:].sum() / 2
    waveform.grad = None
    log_mel(waveform, MEL)[12:].sum().backward()
    assert (waveform.grad * direction).sum().item() == pytest.approx(slope.item(), rel=0.05)


@pytest.mark.parametrize("mel", [MEL, MelSpec(n_mels=128), MelSpec(24_000, 1024, 1024, 256, 80, 0.0, 12_000.0)])
def test_griffin_lim_sounds_like_its_log_mels(mel):
    loud = 0.02 + torch.arange(61 * mel.hop_length) // (5 * mel.hop_length) % 2
    bursts = loud * noise(61 * mel.hop_length)
    target = log_mel(bursts, mel)
    waveform = griffin_lim(target, mel)
    assert waveform.shape == bursts.shape and waveform.dtype == torch.float32
    # the frames stand where they stood: half a hop earlier or later is much worse
    apart = [
        (log_mel(waveform.roll(shift), mel) - target)[3:-3].abs().mean()
        for shift in (-mel.hop_length // 2, 0, mel.hop_length // 2)
    ]
    assert apart[1] < 0.25 and min(apart[0], apart[2]) > 2 * apart[1]


@pytest.mark.parametrize("frames", [1, 2, 3, 50])
def test_griffin_lim_has_a_hop_for_every_frame_in_any_shape(frames):
    log_mels = log_mel(noise(6 * frames * 160).view(2, 3, frames * 160), MEL)
    waveforms = griffin_lim(log_mels, MEL, n_iter=4)
    assert waveforms.shape == (2, 3, frames * 160) and waveforms.isfinite().all()
    assert waveforms[1, 2].shape == griffin_lim(log_mels[1, 2], MEL, n_iter=4).shape
    apart = (log_mel(waveforms, MEL) - log_mels).abs().mean(dim=(2, 3))
    assert apart.max() < 1, "each from its own log-mels"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(griffin_lim(log_mels, MEL, n_iter=4), waveforms)


def test_griffin_lim_draws_no_random_numbers_and_keeps_silence_silent():
    state = torch.get_rng_state()
    target = log_mel(noise(8000), MEL)
    first = griffin_lim(target, MEL)
    torch.manual_seed(1)
    assert torch.equal(griffin_lim(target, MEL), first)
    torch.set_rng_state(state)
    griffin_lim(target, MEL)
    assert torch.equal(torch.get_rng_state(), state)
    assert griffin_lim(torch.full((20, 80), -11.5), MEL).abs().max() < 1e-4


def test_normalised_features_do_not_know_how_loud_it_was():
    features = [normalise_features(log_mel(noise(16_000) * gain, MEL)) for gain in (1.0, 0.1)]
    torch.testing.assert_close(*features, atol=1e-3, rtol=0)
    assert features[0].mean(dim=0).abs().max() < 1e-5
    torch.testing.assert_close(features[0].std(dim=0, correction=0), torch.ones(80), atol=1e-3, rtol=0)
    assert normalise_features(torch.ones(1, 80)).abs().max() == 0


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_spec_augment_blanks_bands_drawn_from_its_generator_alone():
    features = torch.ones(100, 80)
    sizes = dict(time_masks=2, time_width=30, freq_masks=2, freq_width=10)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn = [spec_augment(features, np.random.default_rng(key), **sizes) for key in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert features.min() == 1, "the argument is left as it was"
    for key in range(20):
        blank = spec_augment(features, np.random.default_rng(key), **sizes) == 0
        frames, channels = blank.all(dim=1), blank.all(dim=0)
        assert torch.equal(blank, frames[:, None] | channels[None, :])  # whole frames and whole channels
        assert frames.sum() <= 2 * 20 and channels.sum() <= 2 * 10  # in time at most a fifth each
    assert torch.equal(
        spec_augment(features, np.random.default_rng(0), **(sizes | {"time_masks": 0, "freq_masks": 0})), features
    )


def test_speed_changes_length_and_pitch_together():
    found = {}
    for key in range(12):
        waveform = perturb_speed(tone(1000), 0.1, np.random.default_rng(key))
        peak = np.argmax(np.abs(np.fft.rfft(waveform))) * 16_000 / len(waveform)
        found[round(8000 / len(waveform), 2)] = round(peak / 1000, 1)
    assert found == {0.9: 0.9, 1.0: 1.0, 1.1: 1.1}
