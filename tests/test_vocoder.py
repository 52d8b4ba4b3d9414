"""The generator is SpeechT5HifiGan's, streams without seams, and each network learns from its own loss alone."""

import csv
import json

import numpy as np
import pytest
import soundfile
import torch
from harness import Training, differences
from stages import VOCODER, make_clips
from test_config import only_error
from torch import nn

import train_vocoder
from omni.common.errors import UserError
from omni.data.audio import griffin_lim, log_mel, mel_statistics
from omni.data.manifest import split_rows
from omni.data.open_manifest import load_manifest
from omni.models.speech_architectures import DiscriminatorArchitecture
from omni.models.vocoder import (
    Discriminators,
    Generator,
    as_rows,
    fold_weight_norm,
    frozen,
    mel_spec,
    speecht5_config,
    to_speecht5_state_dict,
)
from omni.stages import STAGES
from omni.stages.vocoder import (
    Clips,
    VocoderConfig,
    VocoderScore,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    loss_specs,
    mel_loss,
    segment_log_mel,
)
from omni.train.config import load_config
from omni.train.stage import load

SIZES = {
    "n_mels": 20, "upsample_rates": [8, 5, 4], "upsample_initial_channel": 32, "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3], [1, 2, 5]], "mpd_periods": [2, 3], "msd_num_scales": 2, "disc_channels": 4,
    "segment_samples": 1600,
}  # fmt: skip


def config(**keys) -> VocoderConfig:
    return VocoderConfig(**{"save_dir": "x", "max_steps": 1} | SIZES | keys)


def build(**keys) -> Generator:
    """Loud, and with statistics that matter."""
    torch.manual_seed(0)
    model = Generator(config(**keys).architecture).eval()
    with torch.no_grad():
        model.conv_post.parametrizations.weight.original0.mul_(3)
    model.mean.normal_()
    model.scale.uniform_(0.5, 2)
    return model


def tones(count: int, samples: int) -> torch.Tensor:
    times = torch.arange(samples) / 16_000
    return torch.stack([0.3 * torch.sin(2 * torch.pi * (200 + 70 * i) * times) for i in range(count)])


# --- Generator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"upsample_rates": [4, 40], "upsample_kernel_sizes": [6, 42]}])
def test_it_is_speecht5_hifigan(tmp_path, keys):
    transformers = pytest.importorskip("transformers")
    model = build(**keys)
    mel = 3 * torch.randn(2, 17, 20) - 4
    with torch.no_grad():
        expected = model(mel)
    model = fold_weight_norm(model)
    (tmp_path / "config.json").write_text(json.dumps(speecht5_config(model.architecture)))
    foreign = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig.from_pretrained(tmp_path)).eval()
    foreign.load_state_dict(to_speecht5_state_dict(model), strict=True)
    with torch.no_grad():
        assert expected.abs().max() > 0.1, "silence would be equal to silence"
        for ours in (expected, model(mel), model.vocode(mel)):
            assert (foreign(mel) - ours).abs().max() < 1e-5


@pytest.mark.parametrize(
    "keys",
    [{}, {"upsample_rates": [160]}, {"upsample_rates": [4, 40], "upsample_kernel_sizes": [6, 42]}],
)
def test_pieces_are_slices_of_the_whole_and_need_no_less(keys):
    model = build(**keys)
    context, T = model.context_frames, 4 * model.context_frames
    mel = torch.randn(T, 20)
    whole = model.vocode(mel)
    assert whole.shape == (T * 160,)
    for start, end in ((0, 7), (7, 8), (context + 3, 2 * context), (T - 5, T)):
        piece = model.vocode(mel, start, end)
        assert piece.shape == ((end - start) * 160,)
        assert (piece - whole[start * 160 : end * 160]).abs().max() < 1e-5
    # the context is no larger than what has a part in a frame's samples, up to a rounding at either end
    middle, mel = T // 2, mel.requires_grad_()
    model(mel[None])[0, middle * 160 : (middle + 1) * 160].square().sum().backward()
    heard = (mel.grad != 0).any(dim=1).nonzero()[:, 0] - middle
    assert -context <= heard.min() <= 1 - context and context - 1 <= heard.max() <= context


def test_samples_are_frames_times_hop_in_any_shape():
    model = build()
    assert model(torch.randn(3, 1, 20)).shape == (3, 160)
    mels = torch.randn(2, 3, 9, 20)
    waveforms = model.vocode(mels)
    assert waveforms.shape == (2, 3, 9 * 160)
    torch.testing.assert_close(waveforms[1, 2], model.vocode(mels[1, 2]), atol=1e-6, rtol=0)


def test_the_waveform_is_float32_under_autocast():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        waveform = model(torch.randn(1, 30, 20))
    assert waveform.dtype == torch.float32 and len(waveform.unique()) > 0.9 * waveform.numel()


# --- Discriminators and losses ---------------------------------------------------------------------------------------


def test_channels_are_last_where_that_is_faster():
    """In bf16 on a CPU; the kernels of float32 are faster with channels first."""
    x = torch.randn(2, 7, 5)
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            rows = as_rows(x)
        assert torch.equal(rows[:, :, 0], x.transpose(1, 2))
        assert rows.is_contiguous() != bf16 and rows.is_contiguous(memory_format=torch.channels_last) == bf16


def test_losses_by_hand():
    real = [[torch.tensor([[1.0, 3.0]]), torch.tensor([0.5])], [torch.tensor([[2.0]]), torch.tensor([1.0, 2.0])]]
    generated = [[torch.tensor([[0.0, 1.0]]), torch.tensor([-1.0])], [torch.tensor([[2.5]]), torch.tensor([0.0, 3.0])]]
    assert discriminator_loss(real, generated).item() == pytest.approx((0.25 + 1) + (0.5 + 4.5))
    assert adversarial_loss(generated).item() == pytest.approx(4 + (1 + 4) / 2)
    assert feature_loss(real, generated).item() == pytest.approx(1.5 + 0.5)
    specs, waveforms = loss_specs(config(mel_loss_windows=[512, 128])), 0.1 * torch.randn(2, 1600)
    assert [spec.win_length for spec in specs] == [mel_spec(config()).win_length, 512, 128]
    assert mel_loss(waveforms, waveforms, specs) == 0
    assert mel_loss(waveforms, 2 * waveforms, specs).item() == pytest.approx(np.log(2), rel=1e-4)


@pytest.mark.parametrize("window", [0, -8, 4, 20, 2**40])
def test_a_window_that_cannot_be_is_refused_by_the_config(window):
    with pytest.raises(ValueError, match="mel_loss_windows"):
        config(mel_loss_windows=[256, window])


def test_short_windows_tell_a_buzz_from_noise():
    """Pulses in the rhythm of the frames: what a vocoder makes of noise if the loss has long windows only."""
    noise, pulses = torch.randn(1, 16_000), torch.zeros(1, 16_000)
    pulses[:, :: mel_spec(config()).hop_length] = noise.std() * mel_spec(config()).hop_length ** 0.5
    own, short = loss_specs(config(mel_loss_windows=[64]))
    assert mel_loss(noise, pulses, [short]) > 2 * mel_loss(noise, pulses, [own])


def test_every_discriminator_hears_every_sample():
    torch.manual_seed(0)
    discriminators = Discriminators(DiscriminatorArchitecture(mpd_periods=[2, 7], msd_num_scales=3, disc_channels=4))
    waveform = tones(2, 1601).requires_grad_()  # divides by no period
    for layers in discriminators(waveform):
        waveform.grad = None
        layers[-1].sum().backward()
        assert (waveform.grad != 0).float().mean() > 0.99
    assert len(discriminators.parts) == 5


def test_frozen_weights_get_no_gradient_but_their_input_does():
    discriminators, waveform = Discriminators(config().discriminators), tones(1, 1600).requires_grad_()
    with frozen(discriminators):
        loss = adversarial_loss(discriminators(waveform))
    loss.backward()
    assert waveform.grad.abs().max() > 0 and all(p.grad is None for p in discriminators.parameters())
    assert all(p.requires_grad for p in discriminators.parameters())


def test_it_overfits_one_batch():
    torch.manual_seed(0)
    model, specs, waveforms = Generator(config().architecture), loss_specs(config()), tones(2, 3200)
    mels = log_mel(waveforms, specs[0])
    model.mean.copy_(mels.mean(dim=(0, 1)))
    model.scale.copy_(mels.std(dim=(0, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = mel_loss(waveforms, model(mels), specs)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.25 * losses[0]


# --- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"win_length": 480, "hop_length": 80, "upsample_rates": [8, 10]}])
def test_the_log_mel_of_a_segment_is_a_slice_of_the_whole(keys):
    cfg = config(**keys)
    spec = mel_spec(cfg)
    waveform = torch.randn(40 * spec.hop_length, generator=torch.Generator().manual_seed(0))
    whole = log_mel(waveform, spec)
    for frames in (1, 7, 40):
        for start in range(0, 41 - frames):
            torch.testing.assert_close(
                segment_log_mel(waveform, start, frames, spec), whole[start : start + frames], atol=1e-4, rtol=0
            )


def clips(folder, training: bool, **keys) -> Clips:
    path = make_clips(folder)["train_csv"]
    manifest = load_manifest(path, ("wav",), "text")
    return Clips(manifest, np.arange(len(manifest)), config(train_csv=path, **keys), seed=3, training=training)


def test_segments_are_drawn_by_seed_epoch_and_row(tmp_path):
    rows = clips(tmp_path, training=True, segment_samples=800)
    one, again, later = (rows.batch(np.array([3, 4]), epoch) for epoch in (0, 0, 1))
    assert torch.equal(one["waveform"], again["waveform"]) and not torch.equal(one["waveform"], later["waveform"])
    assert torch.equal(rows.batch(np.array([4]), 0)["waveform"][0], one["waveform"][1])
    assert one["log_mel"].shape == (2, 5, 20) and one["waveform"].shape == (2, 800) and one["n_targets"] == 1600
    whole = clips(tmp_path, training=False).batch(np.array([3]), 0)["waveform"][0]
    starts = {tuple(rows.batch(np.array([3]), epoch)["waveform"][0, :4].tolist()) for epoch in range(200)}
    assert starts == {tuple(whole[i : i + 4].tolist()) for i in range(0, len(whole) - 799, 160)}


def test_silence_follows_a_clip_that_is_shorter_than_a_segment(tmp_path):
    rows = clips(tmp_path, training=True, segment_samples=4800)
    batch = rows.batch(np.array([0]), 0)
    silent = (batch["waveform"][0] == 0).nonzero().min()
    assert 1600 <= silent < 2700 and not batch["waveform"][0, silent:].any()
    torch.testing.assert_close(batch["log_mel"][0], log_mel(batch["waveform"][0], rows.spec), atol=1e-4, rtol=0)


def test_the_codec_sees_whole_clips(tmp_path):
    class Codec(nn.Module):
        def resynthesise(self, mel):
            self.frames = mel.shape[1]
            return mel + mel.mean(dim=1, keepdim=True)

    rows = clips(tmp_path, training=True, segment_samples=800)
    rows.codec = Codec()
    plain = clips(tmp_path, training=False)
    mel, waveform = rows.read(rows.manifest[5], np.random.default_rng(0)).values()
    whole, sound = plain.read(rows.manifest[5], None).values()
    start = next(i for i in range(len(whole)) if torch.equal(sound[i * 160 :][:800], waveform))
    expected = whole + whole.mean(dim=0)
    assert rows.codec.frames == len(whole) and len(mel) == 5
    torch.testing.assert_close(mel, expected[start : start + 5], atol=1e-3, rtol=0)


def test_statistics_are_those_of_the_usable_clips(tmp_path):
    rows = clips(tmp_path, training=False)
    mels = torch.cat([rows.read(rows.manifest[row], None)["log_mel"] for row in (0, 2)])
    (tmp_path / "clip1.wav").unlink()
    statistics = mel_statistics(mels.split([10, len(mels) - 10]))
    torch.testing.assert_close(torch.tensor(statistics["mean"]), mels.mean(dim=0))
    torch.testing.assert_close(torch.tensor(statistics["std"]), mels.std(dim=0, correction=0).clamp(min=0.1))


def test_clips_without_a_text_are_used_and_split_like_others(tmp_path):
    path = make_clips(tmp_path)["train_csv"]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["wav", "text"], *([f"clip{number}.wav", ""] for number in range(24))])
    manifest = load_manifest(path, ("wav",), "text")
    train_rows, val_rows = split_rows(manifest, 0.3)
    assert len(train_rows) > 10 and len(val_rows) > 2
    stdout = VOCODER.training(tmp_path, max_steps=2, max_epochs=None).finish().stdout
    assert "Not used" not in stdout and "24 samples" not in stdout


# --- Judging ---------------------------------------------------------------------------------------------------------


def test_padding_and_company_change_no_figure(tmp_path):
    model, rows = build(), clips(tmp_path, training=False)
    together, alone = VocoderScore(model.architecture), VocoderScore(model.architecture)
    numbers = np.arange(4)
    with torch.no_grad():
        whole = together.sums(model, rows.batch(numbers, 0))
        parts = [alone.sums(model, rows.batch(numbers[i : i + 1], 0)) for i in range(4)]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts))
    found = VocoderScore.metrics({name: value.item() for name, value in whole.items()})
    differences = []
    for row in range(4):
        mel, real = rows.read(rows.manifest[row], None).values()
        target = log_mel(real, rows.spec)
        differences += [(log_mel(griffin_lim(mel, rows.spec), rows.spec) - target).abs().flatten()]
    assert found["mel_l1_griffin_lim"] == pytest.approx(torch.cat(differences).mean().item(), rel=1e-5)


def test_griffin_lim_is_judged_once(tmp_path, monkeypatch):
    model, rows = build(), clips(tmp_path, training=False)
    calls = []
    monkeypatch.setattr("omni.stages.vocoder.griffin_lim", lambda mel, spec: calls.append(1) or griffin_lim(mel, spec))
    score = VocoderScore(model.architecture)
    batch = rows.batch(np.arange(3), 0)
    with torch.no_grad():
        first, second = score.sums(model, batch), score.sums(model, batch)
    assert len(calls) == 3 and torch.equal(first["griffin_lim"], second["griffin_lim"])


@pytest.mark.parametrize("left_out", [{0}, {1}, {0, 2}, {3}])
def test_clips_keep_their_numbers_when_rows_are_left_out(tmp_path, left_out):
    model, rows = build(), clips(tmp_path, training=False)
    expected = {row: rows.read(rows.manifest[row], None)["waveform"] for row in range(4) if row not in left_out}
    for row in left_out:
        (tmp_path / rows.manifest[row]["wav"]).unlink()
    shown = {}
    score = VocoderScore(model.architecture, lambda step, number, found: shown.update({number: found["real"]}), shown=4)
    with torch.no_grad():
        score.sums(model, rows.batch(np.arange(4), 0) | {"step": 0})
    assert shown.keys() == expected.keys() and all(torch.equal(shown[row], expected[row]) for row in shown)


# --- The stage -------------------------------------------------------------------------------------------------------


def test_each_phase_changes_only_its_own_module(tmp_path, monkeypatch):
    training = VOCODER.training(tmp_path, max_steps=2, val_split=0.0, wd=0.0, adv_start_step=0)
    config_path = tmp_path / "config.json"
    config_path.write_text(json.dumps(training.config))
    seen = {}

    def look(run, phases, dataset, **_):
        batch = dataset.source.batch(np.arange(3), epoch=0) | {"step": 7}
        modules = {phase.name: phase.module for phase in phases}
        for phase in phases:
            before = {name: [p.clone() for p in module.parameters()] for name, module in modules.items()}
            phase.optimizer.zero_grad()
            loss, _ = phase.loss(phase.module, batch)
            for module in modules.values():
                module.zero_grad()
            loss.backward()
            with_gradient = {n for n, m in modules.items() if any(p.grad is not None for p in m.parameters())}
            phase.optimizer.step()
            changed = {
                name
                for name, module in modules.items()
                if any(not torch.equal(p, q) for p, q in zip(module.parameters(), before[name], strict=True))
            }
            seen[phase.name] = with_gradient, changed
        return {}

    monkeypatch.setattr(train_vocoder, "train", look)
    train_vocoder.main(["--config", str(config_path), "--device", "cpu"])
    assert list(seen) == ["discriminator", "generator"], "and in this order"
    for name, (with_gradient, changed) in seen.items():
        assert with_gradient == changed == {name}


def test_before_adv_start_step_the_discriminators_stay_as_they_are(tmp_path):
    keys = {"max_steps": 4, "warmup_steps": 2, "checkpoint_freq": 1, "keep_checkpoints": 9}
    training = VOCODER.training(tmp_path, wd=0.1, adv_start_step=3, **keys)
    training.finish()
    early, late, begun = (
        torch.load(training.step_path(step), weights_only=True)["phases"]["discriminator"]["module"]
        for step in (1, 3, 4)
    )
    assert differences(early, late) == [], "not even weight decay"
    assert differences(late, begun)
    keys = {row["step"]: {key.split("_")[0] for key in row} for row in training.metrics()}
    assert "discriminator" not in keys[3] and "discriminator" in keys[4]
    first, second = training.metrics()
    assert {"generator_mel", "generator_loss"} <= first.keys() and "generator_adversarial" not in first
    assert first["generator_loss"] == pytest.approx(45 * first["generator_mel"])
    assert "generator_adversarial" in second
    assert second["discriminator_lr"] == pytest.approx(training.config["lr_d"] / 2), "the first of its own warm-up"


def test_one_forward_or_two_are_the_same_training(tmp_path):
    """Without accumulation the generator's graph is kept from one phase to the next; with it, it is made again."""
    once = VOCODER.training(tmp_path, save_dir="once", batch_size=4, drop_last=True, max_epochs=1)
    again = VOCODER.training(
        tmp_path, save_dir="again", batch_size=2, gradient_accumulation_steps=2, drop_last=True, max_epochs=1
    )
    once.finish()
    again.finish()
    for name, weight in once.final_file()["model"].items():
        torch.testing.assert_close(weight, again.final_file()["model"][name], rtol=2e-3, atol=2e-4)


def test_what_a_run_leaves_behind(tmp_path):
    training = VOCODER.training(
        tmp_path, val_csv=make_clips(tmp_path)["train_csv"], val_clips=3, val_freq=100, val_samples=2
    )
    training.finish()
    final = training.final_file()
    assert 0 < final["metrics"]["mel_l1_griffin_lim"] < final["metrics"]["mel_l1"]
    model = load(STAGES["vocoder"], training.save_dir).model
    assert not model.training and not any("parametrizations" in name for name in model.state_dict())
    assert model.mean.abs().max() > 0 and model.architecture.n_mels == 20
    step = final["step"]
    names = {path.name for path in (training.save_dir / "samples").iterdir()}
    kinds = ("_real.wav", "_griffin_lim.wav", "_hifigan.wav", ".png")
    assert names == {f"step_{step}_{clip}{kind}" for clip in (0, 1) for kind in kinds}
    real, rate = soundfile.read(training.save_dir / "samples" / f"step_{step}_0_real.wav")
    generated, _ = soundfile.read(training.save_dir / "samples" / f"step_{step}_0_hifigan.wav")
    assert rate == 16_000 and len(real) == len(generated) and len(real) % 160 == 0
    train_row = training.metrics()[-1]
    assert {"discriminator_loss", "generator_loss", "generator_mel", "generator_feature", "generator_lr"} <= set(
        train_row
    )


def test_held_out_clips_are_evenly_spaced(tmp_path):
    rows = make_clips(tmp_path)["train_csv"]
    noting = f"""
import omni.stages.vocoder
_read = omni.stages.vocoder.Clips.read
def read(self, row, rng):
    with open({str(tmp_path / "read.txt")!r}, "a") as file:
        print(rng is None, row["wav"], file=file)
    return _read(self, row, rng)
omni.stages.vocoder.Clips.read = read
"""
    VOCODER.training(tmp_path, val_csv=rows, val_clips=4, max_epochs=1).finish(prelude=noting)
    read = {line.split()[1] for line in (tmp_path / "read.txt").read_text().splitlines() if line.startswith("True")}
    assert read == {"clip0.wav", "clip7.wav", "clip15.wav", "clip23.wav"}


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        ({"upsample_rates": [8, 8]}, ['"upsample_rates"', "hop_length 160", "[8, 8]"]),
        ({"upsample_kernel_sizes": [16]}, ['"upsample_kernel_sizes"', "2 numbers", "[16]"]),
        ({"upsample_kernel_sizes": [33, 20]}, ['"upsample_kernel_sizes"', "even", "[33, 20]"]),
        ({"upsample_initial_channel": 18}, ['"upsample_initial_channel"', "multiple of 4", "18"]),
        ({"resblock_kernel_sizes": [4]}, ['"resblock_kernel_sizes"', "odd", "[4]"]),
        ({"resblock_dilation_sizes": [[1], [3]]}, ['"resblock_dilation_sizes"', "1 lists", "[[1], [3]]"]),
        ({"segment_samples": 850}, ['"segment_samples"', "multiple of hop_length 160", "850"]),
        ({"segment_samples": 320}, ['"segment_samples"', "win_length 640", "320"]),
        ({"win_length": 2000}, ['"win_length"', "n_fft 1024", "2000"]),
        ({"mpd_periods": [2, 0]}, ['"mpd_periods"', "positive", "[2, 0]"]),
        ({"mpd_periods": [], "msd_num_scales": 0}, ['"mpd_periods"', "msd_num_scales", "neither"]),
        ({"disc_channels": 6}, ['"disc_channels"', "multiple of 4", "6"]),
        ({"codec_ckpt": "absent"}, ['"codec_ckpt"', "rvq_codec.pt", "absent"]),
    ],
)
def test_impossible_sizes(tmp_path, keys, fragments):
    training = VOCODER.training(tmp_path, **keys)
    with pytest.raises(UserError) as error:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(training.config))
        load_config(VocoderConfig, str(path))
    assert all(fragment in str(error.value) for fragment in fragments) and "\n" not in str(error.value)


def test_keys_of_older_files(tmp_path):
    keys = {
        "save_dir": "x", "train_csv": make_clips(tmp_path)["train_csv"], "sample_rate": 16000, "n_mels": 80,
        "n_fft": 1024, "hop_length": 256, "win_length": 1024, "upsample_rates": [8, 8, 2, 2], "lr": 2e-4, "lr_g": 2e-4,
        "lr_d": 2e-4, "lambda_mel": 45.0, "lambda_fm": 2.0, "lambda_adv": 1.0, "upsample_initial_channel": 512,
        "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "mpd_periods": [2, 3, 5, 7, 11], "msd_num_scales": 3, "segment_samples": 8192, "max_epochs": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(keys))
    found, notices = load_config(VocoderConfig, str(tmp_path / "config.json"))
    assert found.kernel_sizes == [16, 16, 4, 4] and len(notices) == 1 and "lr_g and lr_d" in notices[0]


def test_too_long_a_clip_is_a_bad_row(tmp_path):
    path = make_clips(tmp_path)["train_csv"]
    soundfile.write(tmp_path / "clip2.wav", np.zeros(8000), 16_000)
    training: Training = VOCODER.training(tmp_path, max_clip_s=0.3, max_epochs=1, val_split=0.0)
    output = training.finish().stdout
    assert f"{path}: row 3" in output and "lasts 0.5 s, expected at most 0.3 s" in output
    assert "nothing will be validated" in output
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["wav"], ["absent.wav"]])
    only_error(training.changed(save_dir="other", batch_size=1).run(), "absent.wav")
