"""The audio encoder is Parakeet to the last digit, padding and batching change nothing, CTC is what its definition
says, and stage B learns, leaves out what it cannot learn, and says so."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from stages import AUDIO_ENC, write_csv
from test_config import only_error
from torch import Tensor

from omni.common.errors import BadRow, UserError
from omni.data.open_manifest import load_manifest
from omni.data.recordings import static_lengths
from omni.models import audio_encoder, ctc
from omni.models.architectures import AudioEncoderArchitecture
from omni.models.audio_encoder import AudioEncoder, parakeet_config, to_parakeet_state_dict
from omni.models.ctc import CtcTokenizer, collapse, ctc_nll, frames_needed, normalise_text
from omni.stages import STAGES
from omni.stages.audio_encoder import (
    AudioEncoderConfig,
    EvalSets,
    Utterances,
    ctc_loss,
    error_counts,
    score_metrics,
    score_sums,
    transcribe,
)
from omni.train.optim import build_adamw
from omni.train.stage import load

V = 30  # tokens, without the blank


def build(seed: int = 0, *, use_flash: bool = True, **changes) -> AudioEncoder:
    """A tiny model whose every weight matters."""
    sizes = dict(n_layers=2, d_model=48, n_heads=3, d_ff=64, subsampling_channels=8, dropout=0.0) | changes
    torch.manual_seed(seed)
    model = AudioEncoder(AudioEncoderArchitecture(ctc_vocab_size=V, **sizes), use_flash=use_flash).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("use_flash", [True, False])
def test_an_utterance_without_a_frame_spoils_no_gradient(use_flash):
    model = build(use_flash=use_flash)
    logits, _ = model(torch.randn(2, 40, 80), torch.tensor([40, 0]))
    logits.sum().backward()
    assert logits.isfinite().all() and all(parameter.grad.isfinite().all() for parameter in model.parameters())


def utterances(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    frames = torch.tensor(lengths)
    features = torch.randn(len(lengths), max(lengths), 80, generator=torch.Generator().manual_seed(seed))
    return features * (torch.arange(max(lengths)) < frames[:, None])[:, :, None], frames


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("downsample_time", [8, 4])
def test_the_export_gives_parakeet_s_logits(tmp_path, downsample_time):
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    arch = dict(downsample_time=downsample_time, conv_kernel_size=5)
    model = build(**arch)
    weights = {name: weight.contiguous() for name, weight in to_parakeet_state_dict(model).items()}
    safetensors.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(parakeet_config(model.architecture)))
    other, report = transformers.ParakeetForCTC.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    features, lengths = utterances(203, 150, 9, 1)
    mask = torch.arange(203) < lengths[:, None]
    with torch.no_grad():
        logits, frames = model(features, lengths)
        expected = other.eval()(input_features=features, attention_mask=mask).logits
    assert expected.shape == logits.shape and other.config.pad_token_id == V
    for row, count in enumerate(frames):
        assert (logits[row, :count] - expected[row, :count]).abs().max() <= 1e-5


@torch.no_grad()
def test_padding_and_neighbours_change_no_valid_frame():
    model = build().train()  # in training too: nothing in it looks across the batch
    features, lengths = utterances(100, 61, 8)
    logits, frames = model(features, lengths)
    assert frames.tolist() == [13, 8, 1]
    for row, length in enumerate(lengths):
        alone, _ = model(features[row : row + 1, :length], lengths[row : row + 1])
        padded, _ = model(F.pad(features[row : row + 1], (0, 0, 0, 44)), lengths[row : row + 1])
        for other in (alone, padded):
            torch.testing.assert_close(other[0, : frames[row]], logits[row, : frames[row]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_plain_and_fused_attention_agree():
    features, lengths = utterances(100, 61)
    for one, other in zip(build()(features, lengths), build(use_flash=False)(features, lengths), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_scores_by_distance_become_scores_by_key(frames):
    scores = torch.randn(2, frames, 2 * frames)
    by_key = audio_encoder.by_distance_to_by_key(scores)
    for i, j in itertools.product(range(frames), repeat=2):
        assert torch.equal(by_key[:, i, j], scores[:, i, frames - 1 - (i - j)])


@torch.no_grad()
def test_the_signal_keeps_its_scale_through_an_untrained_model():
    torch.manual_seed(0)
    sizes = {"n_layers": 4, "d_model": 96, "n_heads": 4, "d_ff": 384, "subsampling_channels": 32}
    model, scales = AudioEncoder(AudioEncoderArchitecture(ctc_vocab_size=V, **sizes)).eval(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: scales.__setitem__(name, out))
    model(*utterances(200, 200))
    for name in (
        "subsampling",
        *(f"layers.{i}.{part}" for i in range(4) for part in ("conv.norm", "conv", "self_attn")),
    ):
        assert 0.4 < scales[name].std() < 2, name


# --- CTC -------------------------------------------------------------------------------------------------------------


def spelled(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    """The definition: repeats away, then blanks."""
    kept = [unit for i, unit in enumerate(path) if i == 0 or unit != path[i - 1]]
    return tuple(unit for unit in kept if unit != blank)


def likelihoods(log_probs: np.ndarray) -> dict[tuple[int, ...], float]:
    """Probability of every text, by adding up every path."""
    frames, units = log_probs.shape
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(units), repeat=frames):
        text = spelled(path, units - 1)
        found[text] = found.get(text, 0.0) + math.exp(sum(log_probs[t, unit] for t, unit in enumerate(path)))
    return found


def random_log_probs(frames: int, units: int, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, units, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1).numpy()


def test_collapse_is_the_definition():
    for path in itertools.product(range(3), repeat=6):
        assert tuple(collapse(path, 2)) == spelled(path, 2)


def test_frames_needed_is_the_shortest_path_that_spells_it():
    shortest: dict[tuple[int, ...], int] = {}
    for frames in range(6):
        for path in itertools.product(range(3), repeat=frames):
            shortest.setdefault(spelled(path, 2), frames)
    assert all(frames_needed(text) == frames for text, frames in shortest.items())


def own_nll(logits: Tensor, *others: Tensor) -> Tensor:
    return ctc._ForwardBackward.apply(logits.log_softmax(dim=-1), *others)


@pytest.mark.parametrize("loss", [ctc_nll, own_nll])
def test_the_loss_is_the_sum_over_all_paths(loss):
    log_probs = torch.from_numpy(np.stack([random_log_probs(5, 4, seed) for seed in range(4)]))
    texts, frames = [(0, 1), (2, 2), (1,), ()], torch.tensor([5, 4, 3, 5])
    targets = torch.tensor([[*text, *[7] * (2 - len(text))] for text in texts]).clamp(max=2)
    nll = loss(log_probs, frames, targets, torch.tensor([len(text) for text in texts]))
    for row, text in enumerate(texts):
        expected = likelihoods(log_probs[row, : frames[row]].numpy())[text]
        assert nll[row].item() == pytest.approx(-math.log(expected), abs=1e-5)


def test_the_gpu_s_loss_has_torch_s_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 30, 11, generator=generator).requires_grad_()
    targets = torch.randint(0, 10, (5, 7), generator=generator)
    targets[0, :3] = 4  # repeats
    rest = torch.tensor([30, 25, 14, 8, 30]), targets, torch.tensor([7, 5, 3, 1, 0])
    weights = torch.rand(5, generator=generator)
    results = []
    for loss in (ctc_nll, own_nll):
        logits.grad = None
        nll = loss(logits, *rest)
        (nll * weights).sum().backward()
        results.append((nll.detach(), logits.grad))
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)


def test_a_text_that_does_not_fit_has_an_infinite_loss():
    arguments = torch.tensor([3]), torch.tensor([[1, 1, 2]]), torch.tensor([3])  # needs four frames
    for loss in (ctc_nll, own_nll):
        assert loss(torch.zeros(1, 5, 4), *arguments).item() == math.inf


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "heard"),
    [
        ("“It’s  5pm,” he said.", "it's 5pm he said"), ("ＦＵＬＬ width²", "full width2"),
        ("'quoted' rock'n'roll", "quoted rock'n'roll"),
        ("Schöne—Grüße", "schöne grüße"), ("नमस्ते!", "नमस्ते"), ("...", ""), ("a_b-c", "a b c"),
    ],
)  # fmt: skip
def test_normalised_text(text, heard):
    assert normalise_text(text) == heard == normalise_text(heard)


TEXTS = ["The red cat runs near the small round dog.", "Two big green squares, one blue cat!"] * 3


def test_tokens_spell_the_normalised_text_and_no_more_than_asked_for(tmp_path):
    for size in (26, 40, 500):
        tokenizer = CtcTokenizer.train(iter(TEXTS), size)
        assert tokenizer.vocab_size <= size
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert max(ids) < tokenizer.vocab_size and tokenizer.decode(ids) == normalise_text(text)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = CtcTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert tokenizer.unknown("the CAT") == set() and tokenizer.unknown("jazz?") == {"j", "z"}
    with pytest.raises(UserError, match='"ctc_vocab_size": expected at least'):
        CtcTokenizer.train(iter(TEXTS), 10)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="damaged tokenizer"):
        CtcTokenizer.load(tmp_path / "tokenizer.json")


def test_error_counts_add_up():
    references, hypotheses = ["a b c", "d e"], ["a x c c", ""]
    whole = error_counts(references, hypotheses)
    parts = [error_counts([r], [h]) for r, h in zip(references, hypotheses, strict=True)]
    assert whole == tuple(tuple(map(sum, zip(*kind, strict=True))) for kind in zip(*parts, strict=True))
    assert whole[0] == (4, 5)


# --- data ------------------------------------------------------------------------------------------------------------


def make_manifest(folder: Path, rows: list[tuple[float, str]]):
    """Noise of so many seconds with a text each."""
    rng = np.random.default_rng(0)
    for i, (seconds, _) in enumerate(rows):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(round(seconds * 16_000)), 16_000)
    write_csv(folder / "a.csv", [{"wav": f"{i}.wav", "text": text} for i, (_, text) in enumerate(rows)])
    return load_manifest(folder / "a.csv", ("wav", "text"), "text", log=lambda _: None)


def config(**keys) -> AudioEncoderConfig:
    sizes = dict(n_layers=1, d_model=32, n_heads=2, d_ff=64, subsampling_channels=8, batch_size=4)
    return AudioEncoderConfig(**({"save_dir": "-", "train_csv": "-", "max_steps": 1} | sizes | keys))


def source(folder: Path, rows: list[tuple[float, str]], training: bool = False, **keys) -> Utterances:
    manifest = make_manifest(folder, rows)
    return Utterances(
        manifest, np.arange(len(rows)), config(**keys), CtcTokenizer.train(iter(TEXTS), 60), training=training
    )


def test_static_shapes_under_compile_and_only_under_compile(tmp_path):
    rows = [(0.5, "one cat"), (0.9, "red dog"), (0.3, "big")]
    batch = source(tmp_path, rows).batch(np.arange(3), 0)
    assert batch["features"].shape == (3, 96, 80) and batch["lengths"].tolist() == [50, 90, 30]
    compiled = source(tmp_path, rows, use_compile=True, max_mel_length=250)
    assert static_lengths(250) == [64, 128, 192, 256]
    for chosen, frames in (([0, 1, 2], 128), ([2], 64)):
        other = compiled.batch(np.array(chosen), 0)
        assert other["features"].shape == (4, frames, 80) and len(other["texts"]) == len(chosen)
    model = AudioEncoder(config(ctc_vocab_size=60).architecture)
    other = compiled.batch(np.arange(3), 0)
    assert other["n_targets"] == batch["n_targets"]
    model.eval()
    torch.testing.assert_close(ctc_loss(model, other), ctc_loss(model, batch), atol=1e-5, rtol=1e-5)


def test_augmentation_is_keyed_by_epoch_and_row_and_stays_out_of_validation(tmp_path):
    rows = [(0.9, "one cat"), (0.9, "red dog")]
    training = source(tmp_path, rows, training=True, speed_perturb=0.1)
    one, same, later = (training.batch(np.arange(2), epoch)["features"] for epoch in (0, 0, 1))
    assert torch.equal(one, same) and (one.shape != later.shape or not torch.equal(one, later))
    plain = source(tmp_path, rows)
    assert torch.equal(plain.batch(np.arange(2), 0)["features"], plain.batch(np.arange(2), 1)["features"])


def test_speed_never_makes_a_text_too_long_for_its_recording(tmp_path):
    tokenizer = CtcTokenizer.train(iter(TEXTS), 60)
    tokens = tokenizer.encode(TEXTS[0])
    seconds = frames_needed(tokens) * 0.08
    training = source(tmp_path, [(seconds, TEXTS[0])], training=True, speed_perturb=0.3)
    for epoch in range(8):
        batch = training.batch(np.arange(1), epoch)
        assert batch["lengths"][0] >= 8 * frames_needed(tokens) - 7 and not batch["bad_rows"]
    short = source(tmp_path, [(seconds - 0.1, TEXTS[0])], training=True)
    with pytest.raises(BadRow, match="output frames"):
        short.read(short.manifest[0], np.random.default_rng(0))


def test_held_out_sources_are_scored_apart_however_they_fall_into_batches(tmp_path):
    (tmp_path / "b").mkdir()
    first, second = (
        source(tmp_path, [(0.5, "one cat"), (0.6, "dog")]),
        source(tmp_path / "b", [(0.4, "the big red cat")]),
    )
    held_out, model = EvalSets({"val": first, "unseen_voices": second}), build().eval()
    model = AudioEncoder(config(ctc_vocab_size=first.tokenizer.vocab_size).architecture).eval()
    totals = []
    for cuts in ([[0, 1, 2]], [[0], [1], [2]], [[0], [1, 2]]):
        total: dict[str, float] = {}
        for rows in cuts:
            with torch.no_grad():
                sums = score_sums(model, held_out.batch(np.array(rows), 0), first.tokenizer)
            for key, value in sums.items():
                total[key] = total.get(key, 0.0) + float(value)
        totals.append(total)
    assert len(held_out) == 3 and totals[0]["val/words"] == 3 and totals[0]["unseen_voices/words"] == 4
    for other in totals[1:]:
        assert other == pytest.approx(totals[0], rel=1e-5)
    assert set(score_metrics(totals[0])) == {"loss", "wer", "cer", "wer_unseen_voices"}


# --- the stage -------------------------------------------------------------------------------------------------------


def test_it_overfits_one_batch_and_writes_it_down(tmp_path):
    keys = AUDIO_ENC.make_data(tmp_path)
    manifest = load_manifest(keys["train_csv"], ("wav", "text"), "text", log=lambda _: None)
    tokenizer = CtcTokenizer.train((manifest[row]["text"] for row in range(6)), 48)
    batch = Utterances(manifest, np.arange(6), config(), tokenizer, training=False).batch(np.arange(6), 0)
    torch.manual_seed(0)
    model = AudioEncoder(config(d_model=48, dropout=0.0, ctc_vocab_size=tokenizer.vocab_size).architecture)
    optimizer = build_adamw(model, lr=3e-3, wd=0.0)
    for _ in range(80):
        optimizer.zero_grad()
        loss = ctc_loss(model, batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert transcribe(model.eval(), tokenizer, batch["features"], batch["lengths"]) == batch["texts"]


def test_rows_that_cannot_be_learnt_are_left_out_counted_and_named(tmp_path):
    training = AUDIO_ENC.training(tmp_path, max_epochs=None, max_steps=2, max_mel_length=100, val_split=0.0)
    path = Path(training.config["train_csv"])
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "0.wav", rng.standard_normal(1600), 16_000)  # two output frames
    soundfile.write(tmp_path / "3.wav", rng.standard_normal(17_000), 16_000)
    output = training.finish().stdout
    assert f"{path}: 1 of 24 rows left out, more than max_mel_length 100 mel frames: rows 4\n" in output
    found = re.search(
        r"(\d+) of 23 rows left out, too short for their text \(8 mel frames an output frame\): (.*)", output
    )
    assert found[2].startswith("rows 1")
    assert f"{24 - 1 - int(found[1])} samples" in output
    only_error(training.changed("none", max_mel_length=8).run(), "not one of its 24 training rows can be used")


def test_two_held_out_files_have_their_own_metrics_which_the_final_file_reproduces(tmp_path):
    training = AUDIO_ENC.training(tmp_path, max_epochs=None, max_steps=2)
    path = training.config["train_csv"]
    training = training.changed("both", val_csv=path, val_voices_csv=path)
    training.finish()
    metrics = training.final_file()["metrics"]
    assert metrics["wer"] == metrics["wer_unseen_voices"] and {"loss", "cer"} <= set(metrics)
    opened = load(STAGES["audio_enc"], training.save_dir)
    model, tokenizer, trained_with = opened.model, opened.tokenizer, opened.config_as(AudioEncoderConfig)
    rows = Utterances(
        load_manifest(path, ("wav", "text"), "text"), np.arange(24), trained_with, tokenizer, training=False
    )
    batch = rows.batch(np.arange(24), 0)
    said = transcribe(model, tokenizer, batch["features"], batch["lengths"])
    (errors, words), _ = error_counts(batch["texts"], said)
    assert metrics["wer"] == pytest.approx(errors / words)
    frames, lengths = model.encode(batch["features"], batch["lengths"])
    assert frames.shape == (24, batch["features"].shape[1] // 8, 16) and lengths.shape == (24,)
    only_error(
        training.changed("neither", val_csv=None, val_split=0.0).run(),
        "val_voices_csv",
        "val_csv or val_split beside it",
    )


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        ({"downsample_time": 6}, ("downsample_time", "4 or 8", "6")),
        ({"mel_bins": 84}, ("mel_bins", "multiple of downsample_time 8", "84")),
        ({"d_model": 18, "n_heads": 4}, ("d_model", "even multiple of n_heads 4", "18")),
        ({"conv_kernel_size": 4}, ("conv_kernel_size", "odd", "4")),
        ({"frame_win": 100}, ("frame_win", "frame_hop 160", "100")),
        ({"ctc_vocab_size": 5}, ("ctc_vocab_size", "characters of the training texts", "found 5")),
        ({"val_csv": "absent.csv"}, ("val_csv", "absent.csv")),
    ],
)
def test_impossible_sizes_are_one_line(tmp_path, keys, fragments):
    only_error(AUDIO_ENC.training(tmp_path, **keys).run(), *fragments)


def test_keys_of_older_configs_are_accepted_and_said_to_do_nothing(tmp_path):
    training = AUDIO_ENC.training(tmp_path, max_epochs=None, max_steps=1, target_hz=12.5, max_text_len=64)
    output = training.finish().stdout
    assert 'key "target_hz" has no effect' in output and 'key "max_text_len" has no effect' in output
