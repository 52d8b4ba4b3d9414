"""The talker: what it says hangs on the text, streams as it is written, and is judged by whoever listens."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from harness import Process, Training, differences, kill_at_step, run_script, trained_weights
from stages import AUDIO_ENC, TALKER, VOCODER
from test_config import only_error

from omni.models.aligner import TEXT_END, text_symbols
from omni.models.codec import Codec
from omni.models.layers import RMSNorm
from omni.models.speaker import Speaker
from omni.models.speech_architectures import CodecArchitecture, TalkerArchitecture, VocoderArchitecture
from omni.models.talker import IGNORE_INDEX, Talker, draw, duration_nats, frame_targets, talker_loss
from omni.models.vocoder import build_generator
from omni.stages.recognizer import word_error_rates, word_errors
from omni.stages.talker import Utterance, collate_utterances, talker_metrics, talker_sums

SIZES = {
    "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "text_layers": 2, "depth_d_model": 32, "depth_layers": 2,
    "depth_d_ff": 64, "dropout": 0.0, "codebooks": 3, "codebook_size": 16,
}  # fmt: skip
TEXTS = ["the red cat", "a dog", "no"]


def small(**keys) -> Talker:
    torch.manual_seed(1)
    talker = Talker(TalkerArchitecture(**(SIZES | keys)))
    for parameter in talker.parameters():  # far enough from zero to tell one text from another
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return talker.eval()


def utterances(seed: int = 0) -> list[Utterance]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (9, 5, 2)
    codes = [torch.randint(16, (length, 3), generator=generator) for length in lengths]
    symbols = [text_symbols(text) for text in TEXTS]
    durations = [spread(4 * length, len(line)) for length, line in zip(lengths, symbols, strict=True)]
    return [Utterance(*one) for one in zip(TEXTS, symbols, codes, durations, strict=True)]


def spread(alignment_frames: int, count: int) -> torch.Tensor:
    """``alignment_frames`` over ``count`` bytes as evenly as whole numbers allow."""
    return torch.arange(count + 1).mul(alignment_frames).div(count, rounding_mode="floor").diff()


def logits_of(talker: Talker, batch: dict) -> torch.Tensor:
    return forward(talker, batch)[0].nan_to_num(neginf=0.0)


def forward(talker: Talker, batch: dict, **others) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = (batch[name] for name in ("symbols", "text_lengths", "codes", "durations"))
    return talker(*inputs, batch.get("thinker_states"), **others)


# The model ----------------------------------------------------------------------------------------------------------


def test_text_symbols_are_bytes_and_an_end():
    assert text_symbols("  a \n é") == [97, 32, 0xC3, 0xA9, TEXT_END]


def test_padding_changes_nothing():
    talker, samples = small(), utterances()
    together = forward(talker, collate_utterances(samples, talker.architecture))
    for row, sample in enumerate(samples):
        single = forward(talker, collate_utterances([sample], talker.architecture))
        for whole, part in zip(together, single, strict=True):  # logits, durations
            torch.testing.assert_close(whole[row, : part.shape[1]], part[0], rtol=1e-4, atol=1e-4)


def test_static_shapes_under_compile_change_nothing():
    talker, samples = small(), utterances()
    plain = collate_utterances(samples, talker.architecture)
    padded = collate_utterances(samples, talker.architecture, static_up_to=40)
    assert plain["codes"].shape == (3, 9, 3) and plain["symbols"].shape == (3, 12)
    assert padded["codes"].shape == (3, 16, 3) and padded["symbols"].shape == padded["durations"].shape == (3, 64)
    weights = {"frame_dropout": 0.0, "duration_weight": 1.0}
    torch.testing.assert_close(talker_loss(talker, padded, **weights)[0], talker_loss(talker, plain, **weights)[0])


def test_lengths_in_few_sizes_change_nothing():
    talker, samples = small(), utterances()
    plain, padded = (collate_utterances(samples, talker.architecture, step=step) for step in (1, 8))
    assert padded["codes"].shape == (3, 16, 3) and padded["symbols"].shape == padded["durations"].shape == (3, 16)
    weights = {"frame_dropout": 0.0, "duration_weight": 1.0}
    torch.testing.assert_close(talker_loss(talker, padded, **weights)[0], talker_loss(talker, plain, **weights)[0])


def test_a_frame_is_predicted_from_those_before_and_a_code_from_those_above():
    talker = small()
    batch = collate_utterances(utterances()[:1], talker.architecture)
    before = logits_of(talker, batch)
    batch["codes"] = batch["codes"].clone()
    batch["codes"][0, 4, 1] = (batch["codes"][0, 4, 1] + 1) % 16
    differs = (logits_of(talker, batch) - before).abs().amax(dim=-1)[0] > 1e-5  # (T + 1, Q)
    assert not differs[:4].any(), "frames before it"
    assert differs[4].tolist() == [False, False, True], "in its own frame, only what follows it"
    assert differs[5:].all()


def test_a_byte_matters_from_the_frame_on_in_which_it_begins():
    talker = small(text_layers=0)
    batch = collate_utterances(utterances()[:1], talker.architecture)
    before, starts = logits_of(talker, batch), batch["durations"][0].cumsum(0) - batch["durations"][0]
    for place in range(len(TEXTS[0])):
        changed = batch | {"symbols": batch["symbols"].clone()}
        changed["symbols"][0, place] = ord("z")
        differs = (logits_of(talker, changed) - before).abs().amax(dim=(0, 2, 3)) > 1e-6  # (T + 1,)
        first = starts[place] // 4
        assert differs.tolist() == [False] * first + [True] * (10 - first)


def test_a_byte_is_read_with_its_neighbours():
    talker = small()
    batch = collate_utterances(utterances()[:1], talker.architecture)
    before = logits_of(talker, batch)
    changed = batch | {"symbols": batch["symbols"].clone()}
    changed["symbols"][0, 6] = ord("z")
    differs = (logits_of(talker, changed) - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert differs[0], "two layers of seven bytes see six to either side"


def test_the_text_is_laid_out_by_hand():
    talker = small(text_layers=0)
    text = torch.randn(2, 3, 32)
    spoken = talker.length_regulator(text, torch.tensor([3, 2]), torch.tensor([[1, 4, 3], [2, 1, 0]]), 3)
    bytes_of_slots = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    for row, places in enumerate(bytes_of_slots):
        expected = talker.text_proj(text[row, places].reshape(3, -1))
        torch.testing.assert_close(spoken[row], expected)


def test_the_loss_of_durations_is_least_at_their_mean():
    batch = {"durations": torch.tensor([[1, 9]]), "text_lengths": torch.tensor([2])}
    losses = {mean: duration_nats(torch.full((1, 2), float(mean)).log(), batch).sum().item() for mean in range(1, 10)}
    assert min(losses, key=losses.get) == 5
    assert duration_nats(batch["durations"].log(), batch).abs().max() < 1e-6
    batch["text_lengths"] = torch.tensor([1])
    assert duration_nats(torch.zeros(1, 2), batch).tolist() == [[0.0, 0.0]]


def test_chosen_durations_are_whole_at_least_one_and_keep_the_sum():
    talker = small()
    with torch.no_grad():
        lengths = torch.tensor([40, 20])
        text = torch.randn(2, 40, 32)
        durations = talker.choose_durations(text, lengths)
        exact = talker.log_durations(text).exp().clamp(min=1)
    assert durations.dtype == torch.int64 and (durations[0] >= 1).all() and (durations[1, :20] >= 1).all()
    assert (durations[1, 20:] == 0).all()
    for row, length in enumerate(lengths):
        assert abs(durations[row].sum() - exact[row, :length].sum()) <= 0.5


def test_an_utterance_that_never_ends_is_cut():
    talker, symbols = small(), [text_symbols(TEXTS[0])]
    without_end(talker)
    text = talker.encode_text(torch.tensor(symbols), torch.tensor([len(symbols[0])]))
    alignment_frames = int(talker.choose_durations(text, torch.tensor([len(symbols[0])])).sum())
    assert (
        len(list(talker.generate(symbols, max_frames=10_000))) == alignment_frames // 4 + 1 + 12
    )  # 12 frames are a second
    assert len(list(talker.generate(symbols, max_frames=3))) == 3


def test_each_utterance_is_cut_at_its_own_limit():
    talker, symbols = small(), [text_symbols(text) for text in TEXTS]
    without_end(talker)
    alone = [len(list(talker.generate([line], max_frames=10_000))) for line in symbols]
    going_on = torch.stack([going_on for _, going_on in talker.generate(symbols, max_frames=10_000)])
    assert going_on.sum(dim=0).tolist() == alone and len(set(alone)) > 1


def test_only_the_first_codebook_can_end_an_utterance():
    talker = small()
    logits, _ = forward(talker, collate_utterances(utterances(), talker.architecture))
    assert logits[:, :, 0, -1].isfinite().all() and (logits[:, :, 1:, -1] == -torch.inf).all()


def test_the_thinkers_states_are_heard_and_may_be_absent():
    talker = small(thinker_d_model=24)
    batch = collate_utterances(utterances(), talker.architecture)
    without = logits_of(talker, batch)
    shape = (*batch["symbols"].shape, 24)
    assert torch.equal(logits_of(talker, batch | {"thinker_states": torch.zeros(shape)}), without)
    assert not torch.allclose(logits_of(talker, batch | {"thinker_states": torch.randn(shape)}), without)


def test_hidden_frames_are_not_seen():
    talker = small()
    batch = collate_utterances(utterances()[:1], talker.architecture)
    hidden = torch.zeros(1, 9, dtype=torch.bool)
    hidden[0, 3] = True
    one, _ = forward(talker, batch, frame_dropout=hidden)
    other = batch["codes"].clone()
    other[0, 3] = (other[0, 3] + 5) % 16
    two, _ = forward(talker, batch | {"codes": other}, frame_dropout=hidden)
    torch.testing.assert_close(one[:, [0, 1, 2, 4, 5, 6]], two[:, [0, 1, 2, 4, 5, 6]])


@pytest.mark.parametrize("states", [False, True])
def test_generating_step_by_step_equals_the_whole_forward(states):
    talker = small(thinker_d_model=24)
    symbols = [text_symbols(text) for text in TEXTS]
    thinker_states = [torch.randn(len(line), 24) for line in symbols] if states else None
    frames = [codes for codes, _ in talker.generate(symbols, max_frames=7, thinker_states=thinker_states)]
    assert frames
    written = torch.stack(frames, dim=1)  # (B, T, Q)
    for row, line in enumerate(symbols):
        line, length = torch.tensor([line]), torch.tensor([len(line)])
        states_of = thinker_states[row][None] if states else None
        durations = talker.choose_durations(talker.encode_text(line, length, states_of), length)
        logits, _ = talker(line, length, written[row, None], durations, states_of)
        likeliest = logits[0, :-1].argmax(dim=-1)
        going_on = (likeliest[:, 0] != 16).cumprod(dim=0).bool()
        assert torch.equal(likeliest[going_on], written[row][going_on])


CHANGES = {
    "nothing": lambda talker: None,
    "the norms": lambda talker: [norm.weight.normal_(1.0) for norm in norms_of(talker)],
    "the depth decoder's MLPs": lambda talker: [mlp.up_proj.weight.mul_(-1) for mlp in talker.depth.mlps],
    "its heads": lambda talker: talker.depth.heads.copy_(talker.depth.heads.flip(2)),
    "its embedding of levels": lambda talker: talker.depth.embed_levels.weight.add_(1.0),
    "its embedding of codes": lambda talker: talker.depth.embed_codes.weight.mul_(-3),
}


def norms_of(talker: Talker) -> list[RMSNorm]:
    return [module for module in talker.modules() if isinstance(module, RMSNorm)]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_frames_are_written_with_the_weights_of_now(change):
    """The talker keeps its weights in another form from one utterance to the next."""
    talker, line = small(), text_symbols(TEXTS[0])
    before = torch.stack([codes for codes, _ in talker.generate([line], max_frames=7)], dim=1)
    CHANGES[change](talker)
    written = torch.stack([codes for codes, _ in talker.generate([line], max_frames=7)], dim=1)[0]
    assert (change == "nothing") == (written.shape == before[0].shape and torch.equal(written, before[0]))
    line, length = torch.tensor([line]), torch.tensor([len(line)])
    durations = talker.choose_durations(talker.encode_text(line, length), length)
    likeliest = talker(line, length, written[None], durations)[0][0, :-1].argmax(dim=-1)
    going_on = (likeliest[:, 0] != 16).cumprod(dim=0).bool()
    assert going_on.any() and torch.equal(likeliest[going_on], written[going_on])


def test_one_seed_one_utterance():
    talker, symbols = small(), [text_symbols(TEXTS[0])]

    def said(seed: int) -> list:
        frames = talker.generate(symbols, max_frames=6, temperature=1.0, top_k=8, seed=seed)
        return [codes.tolist() for codes, _ in frames]

    before = torch.get_rng_state()
    assert said(1) == said(1) != said(2)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


def test_draws_follow_the_probabilities_and_top_k():
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).expand(4000, -1)
    drawn = draw(logits, 1.0, 2, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1}
    assert (drawn == 0).float().mean() == pytest.approx(torch.tensor([2.0, 1.0]).softmax(0)[0].item(), abs=0.03)
    assert set(draw(logits, 0.0, None, None).tolist()) == {0}


def test_targets_end_once():
    codes = torch.arange(12).view(2, 3, 2)
    targets = frame_targets(codes, torch.tensor([3, 1]), codebook_size=99)
    assert targets[0].tolist() == [[0, 1], [2, 3], [4, 5], [99, IGNORE_INDEX]]
    assert targets[1].tolist() == [
        [6, 7],
        [99, IGNORE_INDEX],
        [IGNORE_INDEX, IGNORE_INDEX],
        [IGNORE_INDEX, IGNORE_INDEX],
    ]


def test_metrics_by_hand():
    nats = torch.tensor([10 * np.log(4.0), 10 * np.log(16.0)])
    durations = {"duration_nats": 6.0, "symbols": 2}
    metrics = talker_metrics({"nats": nats, "end_nats": 1.0, "frames": 10, "utterances": 2} | durations)
    assert metrics["code_perplexity"] == pytest.approx(8) and metrics["code_perplexity_2"] == pytest.approx(16)
    assert metrics["loss"] == pytest.approx((nats.sum().item() + 1.0) / 22) and metrics["duration_loss"] == 3.0


def test_loss_and_validation_agree():
    talker = small()
    batch = collate_utterances(utterances(), talker.architecture)
    totals = {k: v.double() if v.dim() else v.item() for k, v in talker_sums(talker, batch).items()}
    metrics = talker_metrics(totals)
    loss, logged = talker_loss(talker, batch, frame_dropout=0.0, duration_weight=0.5)
    assert logged["duration"].item() == pytest.approx(metrics["duration_loss"], rel=1e-5)
    durations = 0.5 * totals["duration_nats"] / batch["n_targets"]
    assert loss.item() == pytest.approx(metrics["loss"] + durations, rel=1e-5)


def test_it_overfits_a_batch_and_then_says_it_by_itself():
    torch.manual_seed(1)
    talker, samples = Talker(TalkerArchitecture(**SIZES)), utterances()
    batch = collate_utterances(samples, talker.architecture)
    optimizer = torch.optim.AdamW(talker.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - step / 120))  # see test_two_speakers_are_learned
        loss, _ = talker_loss(talker, batch, frame_dropout=0.1, duration_weight=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    frames = list(talker.eval().generate([sample.symbols for sample in samples], max_frames=20))
    for row, sample in enumerate(samples):
        said = [codes[row].tolist() for codes, going_on in frames if going_on[row]]
        assert said == sample.codes.tolist(), "the same codes, and an end at the right place"


# Sound --------------------------------------------------------------------------------------------------------------


def speaker(with_vocoder: bool, harmonic_source: bool = False) -> Speaker:
    torch.manual_seed(4)
    sizes = {"codec_d_model": 16, "codec_d_ff": 32, "codec_layers": 1, "codec_kernel_size": 3, "codec_latent": 8}
    codec = Codec(CodecArchitecture(codebooks=3, codebook_size=16, n_mels=20, **sizes)).eval()
    for parameter in codec.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    keys = {key: value for key, value in VOCODER.config.items() if key in VocoderArchitecture.model_fields}
    vocoder = build_generator(VocoderArchitecture(**keys, harmonic_source=harmonic_source)).eval()
    return Speaker(small(), codec, vocoder if with_vocoder else None)


def without_end(talker: Talker, slots_per_byte: float | None = None) -> None:
    """Make it talk for ever, or as long as the text, at so many alignment_frames a byte, allows."""
    with torch.no_grad():
        if slots_per_byte:
            talker.duration_head.weight.zero_()
            talker.duration_head.bias.fill_(np.log(slots_per_byte))
        talker.depth.heads[0, :, -1] = -10 * talker.depth.heads[0, :, :-1].abs().amax(dim=1)
    talker.depth._mix = lambda x, mix=talker.depth._mix: mix(x).abs()  # so that the end is never the likeliest


@pytest.mark.parametrize("harmonic_source", [False, True])
def test_streamed_sound_is_the_sound_of_the_whole(harmonic_source):
    says = speaker(with_vocoder=True, harmonic_source=harmonic_source)
    without_end(says.talker, slots_per_byte=20)
    pieces = list(says.stream(TEXTS[0], max_frames=60))
    whole = says.waveform(says.codes([TEXTS[0]], max_frames=60)[0])
    assert len(pieces) > 2 and len(whole) == 60 * 8 * 160
    assert len(pieces[0]) < len(whole) / 10, "the first piece comes soon"
    np.testing.assert_allclose(np.concatenate(pieces), whole.numpy(), atol=1e-4 if harmonic_source else 1e-5)


def test_without_a_vocoder_there_is_one_piece():
    says = speaker(with_vocoder=False)
    without_end(says.talker)
    (piece,) = says.stream(TEXTS[0], max_frames=12)
    assert len(piece) == 12 * 8 * 160 and np.isfinite(piece).all()


def test_texts_side_by_side_are_said_as_each_alone():
    says = speaker(with_vocoder=False)
    together = says.codes(TEXTS, max_frames=10)
    for text, codes in zip(TEXTS, together, strict=True):
        (alone,) = says.codes([text], max_frames=10)
        assert torch.equal(alone, codes)


# The scripts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path) -> Training:
    training = TALKER.training(tmp_path, max_steps=6, max_epochs=None)
    training.finish()
    return training


def test_say_writes_sound(trained, tmp_path):
    process = run_script(trained, "infer_chat.py", "--say", "one two", "--audio_out", "said.wav", "--temperature", "1")
    assert process.returncode == 0 and process.stdout == "", process.stderr
    assert "Griffin-Lim" in process.stderr and "real-time factor" in process.stderr and "first sound" in process.stderr
    samples, rate = soundfile.read(tmp_path / "said.wav")
    assert rate == 16_000 and len(samples) % (8 * 160) == 0 and len(samples) > 0


def test_say_uses_a_vocoder_of_the_same_log_mels_only(tmp_path):
    folder = tmp_path / "stage f"
    folder.mkdir()
    narrow = VOCODER.training(folder, max_steps=3, max_epochs=None)
    wide = narrow.changed(save_dir="wide", n_mels=80)
    for vocoder in (narrow, wide):
        vocoder.finish()
    talker = TALKER.training(tmp_path, max_steps=6, max_epochs=None, vocoder_ckpt=str(wide.save_dir))
    talker.finish()
    say = ("--say", "one two", "--audio_out", "said.wav", "--temperature", "1")
    process = run_script(talker, "infer_chat.py", *say, "--vocoder_ckpt", str(wide.save_dir))
    assert process.returncode == 0 and "Griffin-Lim" not in process.stderr, process.stderr
    process = run_script(talker, "infer_chat.py", *say, "--vocoder_ckpt", str(narrow.save_dir))
    differ = f"its log-mels do not fit to {talker.save_dir}: n_mels 20 here, 80 there"
    only_error_last(process, f"{narrow.save_dir}: {differ}")
    process = VOCODER.training(folder, save_dir="fine", codec_ckpt=str(talker.save_dir)).run()
    only_error(process, f"this config: {differ}")


def test_a_vocoder_of_other_log_mels_is_refused_before_anything_is_trained(tmp_path):
    folder = tmp_path / "stage f"
    folder.mkdir()
    narrow = VOCODER.training(folder, max_steps=3, max_epochs=None)
    narrow.finish()
    talker = TALKER.training(tmp_path, codec_ckpt=None, codec_steps=4, vocoder_ckpt=str(narrow.save_dir))
    differ = "its log-mels do not fit to this config: n_mels 20 here, 80 there"
    only_error(talker.run(), f"{narrow.save_dir}: {differ}")
    assert not talker.save_dir.exists()


def test_a_vocoder_may_take_up_a_codec_but_not_change_it(trained, tmp_path):
    from omni.train import checkpoint

    folder, other = tmp_path / "stage f", tmp_path / "other codec"
    for path in (folder, other):
        path.mkdir()
    codec = checkpoint.load(trained.save_dir / "rvq_codec.pt")
    codec["model"]["patch_in.bias"] += 1
    checkpoint.save(other / "rvq_codec.pt", codec)
    plain = VOCODER.training(folder, max_steps=3, max_epochs=None, n_mels=80)
    plain.finish()
    fine = plain.changed(codec_ckpt=str(trained.save_dir), max_steps=5)
    resumed = fine.finish().stdout
    # the error on the codec's log-mels is larger than that on the recordings' own: they are not compared
    assert "resumed at step 3" in resumed and "data added since the checkpoint: codec" in resumed
    assert checkpoint.load(plain.save_dir / "hifigan.pt")["step"] > 3
    only_error(fine.changed(codec_ckpt=str(other), max_steps=7).run(), "data (codec)", "new save_dir")
    only_error(fine.changed(codec_ckpt=None, max_steps=7).run(), "data (codec)", "-> absent")


def only_error_last(process: Process, fragment: str) -> None:
    assert process.returncode == 2 and fragment in process.stderr.splitlines()[-1], process.stderr


def test_say_refuses_what_it_cannot_do(trained, tmp_path):
    say = ("--say", "one", "--audio_out", "said.wav")
    only_error(run_script(trained, "infer_chat.py", "--say", "one"), "--say", "--audio_out")
    only_error(run_script(trained, "infer_chat.py", *say, "--text", "two"), "--say", "--text")
    only_error(run_script(trained, "infer_chat.py", "--say", "  ", "--audio_out", "said.wav"), "--say", "bytes")
    only_error(run_script(trained, "infer_chat.py", *say[:3], "run"), "--audio_out run", "expected a file")
    only_error(run_script(trained, "infer_chat.py", *say, "--complete"), "--complete", "no effect")
    only_error(
        run_script(trained, "infer_chat.py", "--text", "one", "--vocoder_ckpt", "run"), "--vocoder_ckpt", "--audio_out"
    )
    only_error(run_script(trained, "infer_chat.py", *say[:3], "absent/said.wav"), "absent", "folder that exists")
    only_error(run_script(trained, "infer_chat.py", *say, "--vocoder_ckpt", "absent"), "absent", "hifigan.pt")
    empty = trained.changed(save_dir="empty")
    empty.save_dir.mkdir()
    only_error(run_script(empty, "infer_chat.py", *say), str(empty.save_dir), "talker.pt")
    assert not (tmp_path / "said.wav").exists()


def test_a_listener_counts_the_words_in_training_and_afterwards(trained, tmp_path):
    folder = tmp_path / "stage b"
    folder.mkdir()
    ears = AUDIO_ENC.training(folder, max_steps=3, max_epochs=None)
    ears.finish()
    data = trained.config["tts_csv"]
    heard = trained.changed(
        save_dir="heard", audio_ckpt=str(ears.save_dir), val_csv=data, val_sentences=24, val_samples=8,
        val_temperature=0.8,
    )  # fmt: skip
    heard.finish()
    metrics = heard.final_file()["metrics"]
    options = ("--data", data, "--json", "--audio_ckpt", str(ears.save_dir), "--temperature", "0.8")
    process = run_script(heard, "scripts/evaluate.py", "talker", *options)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    shared = {"code_perplexity", "wer_recordings", "wer_vocoded", "wer_codec", "wer_talker"}
    assert shared | {"wer_sampled"} <= found.keys() & metrics.keys()
    assert {name: found[name] for name in shared} == pytest.approx({name: metrics[name] for name in shared}, rel=1e-4)
    samples = heard.save_dir / "samples"
    assert len(list(samples.glob("*.png"))) >= 2
    greedy, sampled = (
        sorted(path.read_bytes() for path in samples.glob(f"*{way}.wav")) for way in ("talker", "sampled")
    )
    assert sampled and greedy != sampled  # a talker that ends at once leaves no file


def test_references_are_counted_again_for_another_listener_or_other_rows(trained, tmp_path):
    folder = tmp_path / "stage b"
    folder.mkdir()
    ears = AUDIO_ENC.training(folder, max_steps=3, max_epochs=None)
    ears.finish()
    heard = trained.changed(save_dir="heard", audio_ckpt=str(ears.save_dir), val_sentences=2)
    assert "transcribing 2" in heard.finish().stdout
    assert "listening" not in heard.changed(max_steps=7).finish().stdout
    assert "transcribing 4" in heard.changed(max_steps=8, val_sentences=4).finish().stdout


def test_texts_without_words_are_no_words():
    assert word_errors(["One, two!", "!!!"], ["one", "something"]) == (1, 2)
    assert word_errors(["3 cats"], ["three cats"], "en") == (0, 2) != word_errors(["3 cats"], ["three cats"])
    assert word_error_rates({"a": (1, 2), "b": (0, 0)}) == {"wer_a": 0.5}


def test_saved_speech_is_that_of_this_run_alone(trained, tmp_path):
    evaluate = (
        "scripts/evaluate.py",
        "talker",
        "--data",
        trained.config["tts_csv"],
        "--save_speech",
        str(tmp_path / "said"),
    )
    for options, kinds in (
        (("--limit", "2", "--temperature", "0.5"), {"codec", "recordings", "sampled", "talker", "vocoded"}),
        (("--limit", "1"), {"codec", "recordings", "talker", "vocoded"}),
    ):
        process = run_script(trained, *evaluate, *options)
        assert process.returncode == 0, process.stderr
        assert {path.stem for path in (tmp_path / "said").glob("*.csv")} == kinds
    assert {path.name for path in (tmp_path / "said").rglob("*.wav")} == {"000000.wav"}


def test_another_stages_file_is_refused(trained, tmp_path):
    (trained.save_dir / "talker.pt").write_bytes((trained.save_dir / "rvq_codec.pt").read_bytes())
    process = run_script(trained, "infer_chat.py", "--say", "one", "--audio_out", "said.wav")
    only_error(process, "talker.pt", "stage talker, found codec")


def test_a_given_codec_must_have_the_config_s_sizes(tmp_path):
    training = TALKER.training(tmp_path, codebook_size=4)
    only_error(training.run(), "rvq_codec.pt", "codebook_size is 8, this config has 4")
    spoken = training.changed(codebook_size=8, text_language="en-ipa", save_dir=str(tmp_path / "spoken"))
    only_error(spoken.run(), "aligner.pt", 'text_language is null, this config has "en-ipa"')  # as JSON has it


def test_another_codec_is_another_training(trained, tmp_path):
    from omni.train import checkpoint

    path = tmp_path / "codec" / "rvq_codec.pt"
    payload = torch.load(path, weights_only=True)
    payload["model"]["patch_in.bias"] += 1
    checkpoint.save(path, payload)
    only_error(trained.changed(max_steps=9).run(), "another codec than", "new save_dir")
    (trained.save_dir / "rvq_codec.pt").unlink()
    only_error(trained.changed(max_steps=9).run(), "data (codec)", "new save_dir")


def test_a_part_that_others_were_made_of_takes_no_more_steps(tmp_path):
    few = {"codec_ckpt": None, "codec_steps": 4, "aligner_steps": 4, "max_steps": 4, "max_epochs": None}
    training = TALKER.training(tmp_path, **few)
    training.finish()
    before = {path: path.read_bytes() for path in training.save_dir.rglob("*") if path.is_file()}
    for key, file, later in (
        ("codec_steps", "rvq_codec.pt", "aligner.pt"),
        ("aligner_steps", "aligner.pt", "talker.pt"),
    ):
        only_error(training.changed(**{key: 6}).run(), file, later, f"{key} cannot be 6", "new save_dir", "back to 4")
    assert {path: path.read_bytes() for path in training.save_dir.rglob("*") if path.is_file()} == before
    (training.save_dir / "rvq_codec.pt").unlink()
    training.changed(max_steps=6).finish()  # written again, and only the talker trained on
    assert torch.load(training.save_dir / "rvq_codec.pt", weights_only=True)["metrics"]["trained_steps"] == 4
    alone = TALKER.training(tmp_path, save_dir="alone", **few)
    alone.changed(prelude=kill_at_step(5)).run()  # the first of the aligner
    for path in alone.save_dir.glob("*.pt"):
        assert path.name.startswith("rvq_codec")
    alone.changed(codec_steps=6).finish()
    assert torch.load(alone.save_dir / "rvq_codec.pt", weights_only=True)["metrics"]["trained_steps"] == 6


def test_codec_and_aligner_need_no_stage_b_and_the_same_line_goes_on_to_the_same_talker(tmp_path):
    few = {"codec_ckpt": None, "codec_steps": 4, "aligner_steps": 4, "max_steps": 4, "max_epochs": None}
    whole = TALKER.training(tmp_path, save_dir="whole", **few)
    whole.finish()
    parts = TALKER.training(tmp_path, save_dir="parts", audio_ckpt=str(tmp_path), parts_only=True, **few)
    process = parts.run()
    assert process.returncode == 0 and "Without it the same line trains the talker" in process.stdout, process.stderr
    assert (parts.save_dir / "aligner.pt").exists() and not list(parts.save_dir.glob("talker*"))
    only_error(parts.changed(parts_only=False).run(), '"audio_ckpt"', str(tmp_path), "found none")
    talker = parts.changed(parts_only=False, audio_ckpt=None)
    talker.finish()
    assert not differences(trained_weights(talker), trained_weights(whole))


@pytest.mark.parametrize("key", ["codec_ckpt", "audio_ckpt", "vocoder_ckpt"])
def test_a_folder_without_the_checkpoint_it_is_named_for(tmp_path, key):
    only_error(TALKER.training(tmp_path, **{key: str(tmp_path)}).run(), f'"{key}"', str(tmp_path), "found none")


def test_recordings_of_which_none_can_be_read(tmp_path):
    training = TALKER.training(tmp_path, val_split=0.0)
    data = tmp_path / "tts.csv"
    rows = [line.split(",") for line in data.read_text().splitlines()]
    data.write_text("\n".join([",".join(rows[0]), *(f"{text},absent.wav" for text, _ in rows[1:])]) + "\n")
    only_error(training.run(), "row 24", "absent.wav", "Nor can 23 other rows")


def test_recordings_that_vanish_in_mid_run(trained, tmp_path):
    """Training needs their codes only, but validation shows some of them."""
    keys = {"val_csv": trained.config["tts_csv"], "val_samples": 2, "val_freq": 4, "codec_ckpt": str(trained.save_dir)}
    training = trained.changed(save_dir="vanished", **keys)
    folder = Path(trained.config["tts_csv"]).parent
    vanish = f"""
import glob, os, omni.train.loop
def vanish(run, step, rows):
    if step == 1 and run.stage.name == "talker":
        for file in glob.glob({str(folder)!r} + "/*.wav"):
            os.rename(file, file + ".gone")
omni.train.loop.STEP_HOOKS.append(vanish)
"""
    process = training.run(prelude=vanish)
    try:
        assert process.returncode == 1 and "expected a file, found none at" in process.stderr
        assert process.stderr.count("\n") == 1 and "Run the same command again" in process.stderr
        assert "expected a file, found none at" in (training.save_dir / "training.log").read_text()
    finally:
        for path in folder.glob("*.gone"):
            path.rename(path.with_suffix(""))
    assert "resumed at step" in training.finish().stdout


def test_a_text_too_long_for_its_recording_is_a_bad_row_everywhere(trained, tmp_path):
    data = tmp_path / "tts.csv"
    rows = data.read_text().splitlines()
    rows[5] = f"{'a' * 300}," + rows[5].split(",")[1]
    data.write_text("\n".join(rows) + "\n")
    training = trained.changed(save_dir="long", max_epochs=2, max_steps=None, aligner_steps=12)
    (tmp_path / "codec" / "aligner.pt").unlink()  # so that one is trained, on this row too
    training.finish()
    log = (training.save_dir / "training.log").read_text()
    assert "row 5: expected a text of at most" in log and "row 5: expected a text of fewer bytes" in log
    process = run_script(training, "scripts/evaluate.py", "talker", "--data", str(data), "--json")
    assert process.returncode == 0 and "expected a text of at most" in process.stderr, process.stderr
    assert json.loads(process.stdout)["rows"] == 23


def test_another_aligner_is_another_training(trained, tmp_path):
    from omni.train import checkpoint

    path = tmp_path / "codec" / "aligner.pt"
    payload = torch.load(path, weights_only=True)
    payload["model"]["patch_in.bias"] += 1
    checkpoint.save(path, payload)
    only_error(trained.changed(max_steps=9).run(), "another aligner than", "new save_dir")
    (trained.save_dir / "aligner.pt").unlink()
    process = trained.changed(max_steps=9).run()
    only_error(process, "data (aligner)", "new save_dir")
    assert "aligning: 24" in process.stdout and "coding: 24" not in process.stdout, "only what has changed"
