"""A vocoder with harmonic_source: the pitch is found, pulses keep it, and pieces of sound fit together."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness import TRACE, differences, kill_at_step
from stages import VOCODER, make_clips
from torch import Tensor

from omni.data.audio import MelSpec, log_mel, mel_transform
from omni.data.open_manifest import load_manifest
from omni.models.excitation import (
    HIGHEST,
    LOWEST,
    PITCHES,
    excitation,
    matched,
    pitch_from,
    pitch_loss,
    pitch_of,
    pulses,
)
from omni.models.vocoder import HarmonicGenerator, build_generator, mel_spec
from omni.stages.vocoder import Clips, VocoderConfig, segment_pitch
from omni.train.config import load_config

SPEC = MelSpec(16_000, 1024, 1024, 256, 40)
SPECS = [SPEC, MelSpec(16_000, 1024, 640, 160, 80), MelSpec(48_000, 2048, 2048, 512, 80, f_max=24_000.0)]
SIZES = {
    "n_mels": 20, "upsample_rates": [8, 5, 4], "upsample_initial_channel": 32, "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3], [1, 2, 5]], "harmonic_source": True,
}  # fmt: skip
HARMONIC = replace(VOCODER, name="harmonic", config=VOCODER.config | {"harmonic_source": True}, draws=True)


def voice(hertz: float, spec: MelSpec, frames: int = 60) -> Tensor:
    """(1, S): ten harmonics, each less than the one before."""
    times = torch.arange(frames * spec.hop_length, dtype=torch.float64) / spec.sample_rate
    waves = [
        torch.sin(2 * math.pi * k * hertz * times + k) / k for k in range(1, 11) if k * hertz < 0.45 * spec.sample_rate
    ]
    return 0.1 * sum(waves).float()[None]


def noise(samples: int) -> Tensor:
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(1))


def build(**keys) -> HarmonicGenerator:
    torch.manual_seed(0)
    model = build_generator(VocoderConfig(**{"save_dir": "x", "max_steps": 1} | SIZES | keys).architecture).eval()
    assert isinstance(model, HarmonicGenerator)
    with torch.no_grad():
        model.pitch_reader.convs[-1].bias[:PITCHES].fill_(3.0)  # it hears a voice
    return model


# --- The pitch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=["wide", "narrow", "48 kHz"])
@pytest.mark.parametrize("hertz", [65.0, 98.5, 142.0, 211.3, 333.0, 480.0])
def test_the_pitch_of_a_voice_is_found(spec, hertz):
    found = pitch_of(voice(hertz, spec), spec)[0, 5:-5]
    assert (found / hertz - 1).abs().max() < 0.01


@pytest.mark.parametrize("spec", SPECS, ids=["wide", "narrow", "48 kHz"])
def test_noise_and_silence_have_none(spec):
    samples = 60 * spec.hop_length
    assert not pitch_of(torch.zeros(1, samples), spec).any()
    assert not pitch_of(1e-4 * voice(150.0, spec), spec).any(), "far too quiet"
    assert (pitch_of(0.1 * noise(samples), spec) > 0).float().mean() < 0.1
    assert pitch_of(0.1 * noise(7), spec).shape == (1, 1)


@pytest.mark.parametrize("spec", SPECS, ids=["wide", "narrow", "48 kHz"])
def test_a_bright_sound_has_its_own_pitch_and_not_half_of_it(spec):
    for hertz in torch.linspace(62, 498, 23).tolist():
        found = pitch_of(0.1 * pulses(torch.full((1, 40), hertz), spec), spec)[0, 5:-5]
        assert (found / hertz - 1).abs().max() < 0.02, hertz


@pytest.mark.parametrize("spec", SPECS, ids=["wide", "narrow", "48 kHz"])
def test_a_hum_below_the_lowest_pitch_has_none(spec):
    times = torch.arange(60 * spec.hop_length) / spec.sample_rate
    for hertz in (20.0, 35.0, 50.0):
        assert not pitch_of(0.3 * torch.sin(2 * math.pi * hertz * times)[None], spec).any(), hertz


@pytest.mark.parametrize("spec", SPECS, ids=["wide", "narrow", "48 kHz"])
def test_a_segment_has_the_pitch_of_the_whole_clip(spec):
    hertz = torch.linspace(90, 220, 80)
    clip = 0.1 * pulses(hertz[None], spec)[0]
    whole = pitch_of(clip[None], spec)[0]
    for start, frames in ((0, 13), (1, 5), (30, 13), (67, 13), (0, 80)):
        assert torch.allclose(segment_pitch(clip, start, frames, spec), whole[start : start + frames], atol=1e-2)


def test_a_segment_is_learnt_with_its_own_pitch(tmp_path):
    path = make_clips(tmp_path)["train_csv"]
    keys = SIZES | {"save_dir": "x", "max_steps": 1, "train_csv": path, "segment_samples": 1600}
    manifest, rows = load_manifest(path, ("wav",), "text"), np.arange(24)
    training, whole = (Clips(manifest, rows, VocoderConfig(**keys), training=training) for training in (True, False))
    for number in range(24):
        segment, clip = (
            training.read(manifest[number], np.random.default_rng(number)),
            whole.read(manifest[number], None),
        )
        waveform, count = clip["waveform"], len(segment["pitch"])
        frames = waveform.unfold(0, 1600, 160) if len(waveform) >= 1600 else waveform[None]
        starts = [start for start, frame in enumerate(frames) if torch.equal(frame, segment["waveform"][: len(frame)])]
        padded = torch.nn.functional.pad(waveform, (0, max(0, 1600 - len(waveform))))
        expected = pitch_of(padded[None], training.spec)[0, starts[0] : starts[0] + count]
        torch.testing.assert_close(segment["pitch"], expected, atol=1e-2, rtol=0)
        assert "pitch" not in clip


def test_what_is_learnt_is_what_is_read():
    pitch = torch.tensor([[LOWEST, 97.0, 0.0, 211.0, HIGHEST]])
    logits = torch.zeros(1, 5, PITCHES + 1, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        pitch_loss(logits, pitch).backward()
        optimizer.step()
    assert pitch_loss(logits, pitch) < 0.01, "none is left once all is learnt"
    read = pitch_from(logits.detach())
    assert read[0, 2] == 0
    assert (1200 * torch.log2(read / pitch)[pitch > 0]).abs().max() < 30, (
        "cents; the outermost have neighbours on one side"
    )
    assert (1200 * torch.log2(read / pitch)[0, [1, 3]]).abs().max() < 5


# --- Sound ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=["wide", "narrow", "48 kHz"])
def test_pulses_have_all_harmonics_of_the_pitch_and_nothing_else(spec):
    """Over many frames, whatever their rhythm: each bin between two harmonics is far below them."""
    frames = spec.sample_rate // spec.hop_length  # about a second
    hertz = 125.0
    sound = pulses(torch.full((1, frames), hertz), spec)[0]
    assert sound.square().mean().item() == pytest.approx(1, rel=0.05)
    window = torch.hann_window(len(sound))
    amplitude = torch.fft.rfft(sound * window).abs()
    bins = torch.arange(len(amplitude)) * spec.sample_rate / len(sound)
    off = (bins / hertz - (bins / hertz).round()).abs() * hertz
    inside = (bins > hertz / 2) & (bins < spec.sample_rate / 2 - hertz)
    assert amplitude[inside & (off < 1.1)].min() > 100 * amplitude[inside & (off > 10)].max()


def test_the_pitch_moves_evenly_and_a_frame_without_a_voice_takes_its_neighbours():
    pitch = torch.tensor([[0.0, 100.0, 200.0, 200.0, 0.0, 0.0]])
    filled = torch.tensor([[100.0, 100.0, 200.0, 200.0, 200.0, 2 * LOWEST]])
    assert torch.equal(pulses(pitch, SPEC), pulses(filled, SPEC))
    rising = pulses(torch.linspace(100, 120, 40)[None], SPEC)
    found = pitch_of(0.1 * rising, SPEC)[0]
    assert (found[4:-4] / torch.linspace(100, 120, 40)[4:-4] - 1).abs().max() < 0.02


@pytest.mark.parametrize("spec", SPECS, ids=["wide", "narrow", "48 kHz"])
def test_it_has_the_log_mels_and_each_round_brings_it_nearer(spec):
    real = voice(130.0, spec) + 0.003 * noise(60 * spec.hop_length)
    target = log_mel(real, spec)
    pitch = pitch_of(real, spec)
    sound = excitation(target, pitch, pulses(pitch, spec), noise(real.shape[1]), spec)
    inner = slice(5, -5)
    distances = []
    for _ in range(3):
        distances.append((log_mel(sound, spec) - target)[:, inner].abs().mean().item())
        sound = matched(sound, target, spec)
    assert distances[0] < 0.6 and distances[2] < distances[1] < distances[0]
    assert (pitch_of(sound, spec)[0, inner] / 130.0 - 1).abs().max() < 0.02, "and it keeps the pitch"


def test_without_a_voice_it_is_noise_and_with_one_it_is_noise_at_the_top_only():
    flat = torch.full((1, 60, 40), -3.0)
    top = torch.fft.rfftfreq(60 * 256, 1 / 16_000) > 6500
    rng = noise(60 * 256)
    silent = torch.zeros(1, 60 * 256)
    voiced, unvoiced = torch.full((1, 60), 120.0), torch.zeros(1, 60)
    pulse = pulses(voiced, SPEC)
    of_noise = torch.fft.rfft(excitation(flat, unvoiced, pulse, rng, SPEC)).abs()
    assert torch.equal(of_noise, torch.fft.rfft(excitation(flat, unvoiced, silent, rng, SPEC)).abs())
    both = torch.fft.rfft(excitation(flat, voiced, pulse, rng, SPEC))[0]
    alone = torch.fft.rfft(excitation(flat, voiced, pulse, silent, SPEC))[0]
    low = torch.fft.rfftfreq(60 * 256, 1 / 16_000) < 2500
    assert (both - alone)[low].abs().mean() < 0.2 * both[low].abs().mean()
    assert (both - alone)[top].abs().mean() > 0.7 * both[top].abs().mean()


# --- The generator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"upsample_rates": [160]}, {"upsample_rates": [5, 32]}])
def test_pieces_are_slices_of_the_whole(keys):
    model = build(**keys)
    T = 3 * model.context_frames
    mel = torch.randn(T, 20) - 4
    whole = model.vocode(mel)
    assert whole.shape == (T * 160,) and whole.abs().max() <= 1 and whole.std() > 1e-3
    for start, end in ((0, 7), (7, 8), (model.context_frames + 3, 2 * model.context_frames), (T - 5, T)):
        piece = model.vocode(mel, start, end)
        assert (piece - whole[start * 160 : end * 160]).abs().max() < 1e-4
        beyond = mel.clone()
        beyond[end + model.context_frames :] = 0.0
        assert torch.equal(model.vocode(beyond, start, end), piece), "nor does it read further"


def test_a_frame_is_heard_no_earlier_than_the_context():
    model, T = build(), 100
    mel = torch.randn(T, 20) - 4
    changed = mel.clone()
    changed[60:] = torch.randn(T - 60, 20) - 1  # another pitch, too
    first = (model.vocode(mel) != model.vocode(changed)).nonzero().min().item() / 160
    assert 0 <= first - (60 - model.context_frames) < 11


def test_pulses_look_two_frames_ahead_where_there_is_no_voice_and_one_elsewhere():
    for beside, ahead in ((0.0, 2), (100.0, 1)):
        pitch = torch.full((1, 20), 100.0)
        pitch[0, 9] = beside
        changed = pitch.clone()
        changed[0, 10:] = 200.0
        first = (pulses(pitch, SPEC) != pulses(changed, SPEC)).nonzero()[:, 1].min().item() // SPEC.hop_length
        assert first == 10 - ahead


def test_equal_log_mels_are_equal_sound_and_draw_no_random_numbers():
    model, mels = build(), torch.randn(2, 3, 9, 20) - 4
    state = torch.get_rng_state()
    waveforms = model.vocode(mels)
    assert torch.equal(torch.get_rng_state(), state)
    assert waveforms.shape == (2, 3, 9 * 160)
    torch.testing.assert_close(waveforms[1, 2], model.vocode(mels[1, 2]), atol=5e-4, rtol=0)


def test_a_spectrum_made_for_listening_serves_training():
    mel_transform.cache_clear()
    build().vocode(torch.randn(9, 20) - 4)
    waveform = voice(100.0, SPECS[1]).requires_grad_()
    log_mel(waveform, mel_spec(build().architecture)).sum().backward()
    assert waveform.grad.any()


def test_at_a_steady_pitch_its_sound_does_not_repeat_itself_with_the_frames():
    """What the other generator cannot do: of equal frames it makes equal samples."""
    mel = torch.full((80, 20), -3.0)
    for harmonic in (True, False):
        model = build_generator(
            VocoderConfig(save_dir="x", max_steps=1, **SIZES | {"harmonic_source": harmonic}).architecture
        )
        frames = model.eval().vocode(mel).reshape(80, 160)[30:50]
        repeats = (frames[1:] - frames[:-1]).abs().mean() < 1e-3 * frames.abs().mean()
        assert bool(repeats) != harmonic


# --- The stage --------------------------------------------------------------------------------------------------------


def test_a_killed_training_goes_on_to_the_bit(tmp_path):
    reference = HARMONIC.training(tmp_path, save_dir="reference")
    reference.prelude = TRACE
    reference.finish()
    killed = reference.changed(save_dir="killed")
    for step in (3, 6):
        assert killed.run(prelude=kill_at_step(step)).returncode == -9
    killed.finish()
    assert killed.trace() == reference.trace()
    assert differences(killed.state(), reference.state()) == []
    assert "generator_pitch" in reference.metrics()[0]
    model = reference.final_file()["model"]
    assert any(name.startswith("pitch_reader.") for name in model) and any(
        name.startswith("sources.") for name in model
    )


def test_its_windows_must_overlap(tmp_path):
    path = tmp_path / "config.json"
    keys = HARMONIC.config | make_clips(tmp_path) | {"save_dir": str(tmp_path / "x"), "win_length": 200, "n_fft": 256}
    path.write_text(json.dumps(keys))
    with pytest.raises(Exception, match="twice hop_length"):
        load_config(VocoderConfig, path, [])
