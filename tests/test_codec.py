"""The speech codec: codebooks that learn, padding that changes nothing, and a first part of stage D that resumes."""

import json
import re

import numpy as np
import pytest
import torch
from harness import SLOW, TRACE, Training, differences, kill_at, kill_at_random_instants, kill_at_step
from stages import TALKER
from test_environment import snapshot

from omni.models.codec import Codec
from omni.models.quantizer import ResidualQuantizer, nearest
from omni.models.speech_architectures import CodecArchitecture
from omni.stages.codec import codec_loss, codec_metrics, codec_sums

# B clips, T mel frames, M mel channels, N latents, C latent width


def small(**keys) -> Codec:
    sizes = {"codebooks": 3, "codebook_size": 16, "codec_d_model": 32, "codec_d_ff": 64, "codec_layers": 2}
    torch.manual_seed(1)
    codec = Codec(CodecArchitecture(codec_latent=8, **(sizes | keys)))
    for parameter in codec.parameters():  # branches that start at zero would hide what they see
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return codec


def alone(tensor):
    return tensor  # the sum over one process


def quantiser(**keys) -> ResidualQuantizer:
    torch.manual_seed(2)
    return ResidualQuantizer(**({"codebooks": 3, "codebook_size": 16, "width": 4, "dropout": 0.0, "decay": 0.9} | keys))


def latents(seed: int, count: int = 256) -> torch.Tensor:
    """(1, count, 4) around 12 centres, far from where codebooks start."""
    generator = torch.Generator().manual_seed(seed)
    centres = 5 + 3 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(12, (count,), generator=generator)
    return (centres[chosen] + 0.3 * torch.randn(count, 4, generator=generator))[None]


def learn(rvq: ResidualQuantizer, updates: int) -> None:
    for seed in range(updates):
        rvq(latents(seed), torch.ones(1, 256, dtype=torch.bool))
        rvq.update(torch.ones(()), alone, is_main=True)


# The quantiser ------------------------------------------------------------------------------------------------------


def test_codebooks_learn_and_are_used():
    rvq, unseen, all_of_it = quantiser(), latents(1000), torch.ones(1, 256, dtype=torch.bool)
    before = (rvq.eval()(unseen, all_of_it)[0] - unseen).square().mean()
    learn(rvq.train(), 60)
    quantised, codes, _ = rvq.eval()(unseen, all_of_it)
    assert (quantised - unseen).square().mean() < 0.01 * before
    for level in range(3):
        assert len(codes[..., level].unique()) > 8, "more than half of the codes are used"


def test_more_codebooks_are_closer():
    rvq, unseen = quantiser(), latents(1000)
    learn(rvq, 60)
    codes = rvq.eval()(unseen, torch.ones(1, 256, dtype=torch.bool))[1]
    errors = [(rvq.decode(codes[..., :k]) - unseen).square().mean() for k in (1, 2, 3)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


def test_a_moving_average_by_hand():
    rvq = quantiser(codebooks=1, codebook_size=2, width=1)
    rvq.codebooks.copy_(torch.tensor([[[0.0], [10.0]]]))
    rvq.counts.copy_(torch.tensor([[4.0, 2.0]]))
    rvq(torch.tensor([[[1.0], [2.0], [9.0]]]), torch.ones(1, 3, dtype=torch.bool))
    rvq.update(torch.ones(()), alone, is_main=True)
    counts = [0.9 * 4 + 0.1 * 2, 0.9 * 2 + 0.1 * 1]
    torch.testing.assert_close(rvq.counts[0], torch.tensor(counts))
    expected = [0.1 * 3 / counts[0], (0.9 * 2 * 10 + 0.1 * 9) / counts[1]]
    torch.testing.assert_close(rvq.codebooks[0, :, 0], torch.tensor(expected))


def test_a_dead_code_moves_to_where_the_latents_are():
    rvq = quantiser(codebooks=1)
    learn(rvq, 20)
    rvq.codebooks[0, 3] = 1000.0
    rvq.counts[0, 3] = 0.0
    learn(rvq, 1)
    assert (rvq.codebooks[0, 3] - latents(0)[0]).abs().sum(dim=1).min() < 1e-4


def test_the_gradient_passes_as_if_nothing_were_rounded():
    rvq, z = quantiser(), latents(0).requires_grad_()
    weights = torch.randn(1, 256, 4)
    quantised, _, _ = rvq(z, torch.ones(1, 256, dtype=torch.bool))
    (quantised * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_several_micro_batches_move_the_codebooks_like_one():
    rows, mask = latents(0), torch.ones(1, 256, dtype=torch.bool)
    moved = []
    for parts in (1, 4):
        rvq = quantiser()
        learn(rvq, 20)  # no code is dead any more
        for part in rows.chunk(parts, dim=1):
            rvq(part, mask[:, : part.shape[1]])
        rvq.update(torch.ones(()), alone, is_main=True)
        moved.append(rvq.codebooks.clone())
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-4)


def test_an_update_that_is_not_made_leaves_the_codebooks():
    rvq = quantiser()
    before = rvq.codebooks.clone()
    rvq(latents(0), torch.ones(1, 256, dtype=torch.bool))
    rvq.update(torch.zeros(()), alone, is_main=True)
    assert torch.equal(rvq.codebooks, before) and rvq.counts.sum() == 0


def test_latents_that_do_not_count_teach_nothing():
    moved = []
    for rows in (latents(0), torch.cat((latents(0), torch.full((1, 64, 4), 99.0)), dim=1)):
        rvq = quantiser(codebooks=1, codebook_size=2)
        rvq.counts.fill_(100.0)  # neither is dead
        rvq(rows, torch.arange(rows.shape[1])[None] < 256)
        rvq.update(torch.ones(()), alone, is_main=True)
        moved.append(rvq.codebooks)
    torch.testing.assert_close(*moved)


def test_quantizer_dropout_uses_the_first_codebooks_only():
    rvq, mask = quantiser(dropout=1.0), torch.ones(64, 256, dtype=torch.bool)
    learn(rvq, 20)
    z = latents(7).expand(64, -1, -1)
    torch.manual_seed(0)
    quantised, codes, _ = rvq(z, mask)
    depths = {k: rvq.decode(codes[0, :, :k]) for k in (1, 2, 3)}
    for clip in quantised:
        assert any(torch.allclose(clip, coarser, atol=1e-5) for coarser in depths.values())
    found = [sum(torch.allclose(clip, depths[k], atol=1e-5) for clip in quantised) for k in (1, 2, 3)]
    assert all(count > 5 for count in found), found


def test_nearest_is_the_nearest():
    vectors, codebook = torch.randn(5, 7, 3), torch.randn(11, 3)
    expected = (vectors[..., None, :] - codebook).square().sum(dim=-1).argmin(dim=-1)
    assert torch.equal(nearest(vectors, codebook), expected)


# The codec ----------------------------------------------------------------------------------------------------------


def test_padding_changes_nothing():
    codec = small().eval()
    log_mels, lengths = torch.randn(2, 40, 80), torch.tensor([40, 21])
    codes = codec.encode(log_mels, lengths)
    torch.testing.assert_close(codec.encode_one(log_mels[1, :21]), codes[1, :3])
    decoded = codec.decode(codes, torch.tensor([5, 3]))
    torch.testing.assert_close(codec.decode(codes[1:, :3])[0], decoded[1, :24], rtol=1e-4, atol=1e-5)


def test_a_frame_depends_on_no_more_than_its_context():
    codec = small(codec_layers=1, codec_kernel_size=3).eval()
    codes = torch.randint(16, (1, 20, 3))
    changed = codes.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 16
    differs = (codec.decode(codes) - codec.decode(changed)).abs().amax(dim=(0, 2)).view(20, 8).amax(dim=1) > 0
    where = differs.nonzero().flatten().tolist()
    assert where and 10 - codec.context <= min(where) and max(where) <= 10 + codec.context


def test_it_overfits_one_batch_and_usage_is_high():
    codec = small(codec_d_model=64, codebook_size=8)
    torch.manual_seed(3)
    steps = torch.randn(4, 12, 80).repeat_interleave(8, dim=1).cumsum(dim=1) / 8
    batch = {"log_mels": steps, "lengths": torch.tensor([96, 96, 90, 70]), "n_targets": 352}
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(200):
        loss, parts = codec_loss(codec, batch, 0.25)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        codec.quantizer.update(torch.ones(()), alone, is_main=True)
    totals = {k: v.double() if v.dim() else v.item() for k, v in codec_sums(codec.eval(), batch).items()}
    metrics = codec_metrics(totals)
    frames = torch.cat([clip[:n] for clip, n in zip(steps, batch["lengths"], strict=True)])
    assert metrics["reconstruction_mse"] < 0.1 * frames.var()
    assert metrics["reconstruction_mse_1"] > metrics["reconstruction_mse_2"] > metrics["reconstruction_mse"]
    assert metrics["code_usage"] > 0.5


def test_metrics_by_hand():
    chosen = torch.tensor([[2.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    metrics = codec_metrics({"chosen": chosen, "squared_error": 6.0, "squared_error_1": 9.0, "values": 12.0})
    assert metrics["reconstruction_mse"] == 0.5 and metrics["reconstruction_mse_1"] == 0.75
    assert metrics["code_usage"] == 0.75 and metrics["code_usage_least"] == 0.5
    assert metrics["codebook_perplexity"] == pytest.approx((2 + 4) / 2)


# The first part of stage D ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Training:
    """All three parts, the codec and the aligner trained and not given. Trained once: no test changes its folder."""
    training = TALKER.training(
        tmp_path_factory.mktemp("whole"), save_dir="reference", codec_steps=24, codec_batch_size=2, codec_lr=3e-3,
        codec_warmup_steps=3, aligner_steps=8, aligner_batch_size=2, val_freq=10, max_epochs=None, max_steps=12,
    )  # fmt: skip
    del training.config["codec_ckpt"]
    training.prelude = TRACE + SLOW  # its duration is what kills at random instants are drawn from
    training.finish()
    return training


@pytest.fixture
def killed(whole, request) -> Training:
    """The same training in a folder of its own, to be killed."""
    return whole.changed(save_dir=re.sub(r"\W+", "_", request.node.name), prelude="")


def all_state(training: Training) -> dict:
    state = training.state()
    for part, prefix in (("codec", "rvq_codec"), ("aligner", "aligner")):
        its = Training("", prefix, f"{prefix}.pt", training.folder, training.config)
        state |= {f"{part} {name}": value for name, value in its.state().items()}
    return state | {
        file: torch.from_numpy(np.load(training.save_dir / "codes" / file).astype(np.int64))
        for file in ("train.codes.npy", "train.durations.npy")
    }


KILLS = {
    "first batch": [kill_at_step(1)],
    "twice in the codec": [kill_at_step(n) for n in (14, 5)],
    "in the codec's validation": [kill_at("omni.stages.codec:codec_metrics", 1)],
    "before the codec's final file": [kill_at("omni.train.resume:Checkpoints.write_final", 1)],
    "twice in the aligner": [kill_at_step(n) for n in (29, 3)],
    "in the aligner's validation": [kill_at("omni.stages.aligner:aligner_metrics", 1)],
    "before the aligner's final file": [kill_at("omni.train.resume:Checkpoints.write_final", 2)],
    "while the recordings are coded": [kill_at("omni.models.codec:Codec.encode", 1, after=True)],
    "while the codes are written": [kill_at("omni.train.precompute:_Unfinished.append", 1, after=True)],
    "between codes and durations": [kill_at("omni.train.precompute:write_arrays", 2, after=True)],
    "first batch of the talker": [kill_at_step(33)],
    "in the talker's validation": [kill_at("omni.stages.talker:talker_metrics", 1)],
    "before the talker's final file": [kill_at("omni.train.resume:Checkpoints.write_final", 3)],
}


@pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS.keys())
def test_resume_is_exact_in_all_parts(whole, killed, kills):
    for kill in kills:
        assert killed.run(prelude=kill).returncode == -9
    killed.finish()
    assert differences(all_state(killed), all_state(whole)) == []


def test_sigkill_at_random_instants_of_all_parts(whole):
    for killed in kill_at_random_instants(whole, 6):
        assert differences(all_state(killed), all_state(whole)) == []


def test_without_the_codebooks_state_the_comparison_fails(whole, killed):
    assert killed.run(prelude=kill_at_step(14)).returncode == -9
    forget = """
import omni.train.resume
_resume = omni.train.resume.Checkpoints.resume
def resume(self):
    lines = _resume(self)
    if self.run.stage.name == "codec":
        self.training.phases[0].module.quantizer.counts.mul_(0.5)
    return lines
omni.train.resume.Checkpoints.resume = resume
"""
    killed.finish(prelude=forget)
    assert differences(all_state(killed)["codec newest"], all_state(whole)["codec newest"]) != []


def test_codes_that_are_lost_are_made_again(whole, killed):
    assert killed.run(prelude=kill_at_step(38)).returncode == -9
    for path in (killed.save_dir / "codes").iterdir():
        path.unlink()
    output = killed.finish().stdout
    assert "coding: 24 rows" in output and "aligning: 24 rows" in output
    assert differences(all_state(killed), all_state(whole)) == []


def test_a_finished_run_of_all_parts_changes_no_file(whole):
    before = snapshot(whole.save_dir)
    process = whole.finish()
    assert process.stdout.count("already finished") == 3
    assert snapshot(whole.save_dir) == before


def test_each_part_has_its_rows_of_metrics(whole):
    rows = [json.loads(line) for line in (whole.save_dir / "metrics.jsonl").read_text().splitlines()]
    steps = {
        stage: [r["step"] for r in rows if (r["stage"], r["kind"]) == (stage, "train")]
        for stage in ("codec", "aligner", "talker")
    }
    assert steps["aligner"] == [3, 6, 8]
    assert steps["codec"] == list(range(3, 25, 3)) and steps["talker"] == list(range(3, 13, 3))


def test_the_codec_keeps_its_sizes(whole):
    process = whole.changed(codebook_size=4).run()
    assert process.returncode == 2 and "codebook_size: 8 -> 4" in process.stderr
