"""The steps on a GPU, counted without one (benchmarks/gpu_counts.py): no wait, no large sort, few kernels for CTC."""

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

import omni.models.ctc
from benchmarks import gpu, gpu_counts
from benchmarks.gpu_counts import Counting, backward, count, fake_cuda
from benchmarks.tiny_steps import STEPS
from omni.common.errors import UserError
from omni.models import quantizer
from omni.models.architectures import ThinkerArchitecture
from omni.models.omni_model import moved
from omni.models.thinker import Thinker

KERNELS_A_FRAME = 4  # of CTC
BATCH = {"D codec": "codec_batch_size", "D aligner": "aligner_batch_size"}


def small(name: str) -> dict[str, gpu_counts.Counts]:
    """Counts of a step at the demo's sizes, two samples a batch (eight in stage E, for all kinds of samples)."""
    return count(name, "demo", **{BATCH.get(name, "batch_size"): 16 if name == "E" else 2})


@pytest.mark.parametrize("name", STEPS)
def test_no_step_waits_for_the_gpu(name):
    for phase, counts in small(name).items():
        assert not counts.waits, (phase, counts.waits)
        assert counts.kernels > 100 and counts.flops > 0 and counts.bytes > counts.product_bytes > 0


@pytest.mark.parametrize("name", ["D talker", "E"])
def test_no_step_sorts_an_index_for_every_value(name):
    """At most one for each position, of which there are fewer than values by the width of the model."""
    for counts in small(name).values():
        assert counts.sorted_keys < 20_000, counts.sorted_keys


def waits_of(function) -> list[str]:
    with fake_cuda(), Counting() as counting:
        function(torch.zeros(4, 3, device="cuda"))
    return [wait for wait, times in counting.counts.waits.items() for _ in range(times)]


@pytest.mark.parametrize(
    ("function", "wait"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x[:, 0] > 0], "index with a mask"),
        (lambda x: x[[0, 2]], "copy from cpu to cuda"),
        (lambda x: x[torch.tensor([0, 2])], "index with indices of the host"),
        (lambda x: x.cpu(), "copy from cuda to cpu"),
        (lambda x: torch.zeros(3).to(x.device), "copy from cpu to cuda"),
        (lambda x: x.new_tensor(1.0), "copy from cpu to cuda"),
        (lambda x: torch.tensor([1, 2], device=x.device), "copy from cpu to cuda"),
    ],
)  # fmt: skip
def test_waits_are_noticed(function, wait):
    assert waits_of(function) == [wait]


def test_what_needs_no_wait_is_none():
    def no_wait(x: Tensor) -> None:
        x[torch.zeros(2, dtype=torch.int64, device="cuda")] = 1.0
        torch.where(x > 0, x, 0.0).index_select(0, x[:, 0].long()).cumsum(0)
        torch.zeros(3).to(x.device, non_blocking=True)

    assert waits_of(no_wait) == []


def test_products_views_and_gradients_are_counted():
    with fake_cuda(), Counting() as counting:
        a, b = (torch.zeros(64, 32, device="cuda", requires_grad=True) for _ in range(2))
        made = counting.counts.kernels
        backward((a @ b.t()).view(-1)[:100].sum())
    assert counting.counts.flops == 3 * 2 * 64 * 32 * 64  # forward, and a gradient of either side
    assert a.grad.shape == b.grad.shape == (64, 32)
    # mm, sum; ones, expand's copy or not, slice backward, two mm
    assert 5 <= counting.counts.kernels - made <= 8


def ctc_kernels(frames: int) -> int:
    with fake_cuda(), Counting() as counting:
        log_probs = torch.zeros(2, frames, 9, device="cuda")
        targets = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
        omni.models.ctc.ctc_nll(log_probs, targets[:, 0] + frames, targets, targets[:, 0] + 3)
    assert not counting.counts.waits
    return counting.counts.kernels


def test_ctc_takes_few_kernels_a_frame():
    assert ctc_kernels(60) - ctc_kernels(20) <= 40 * KERNELS_A_FRAME


# --- The same results ------------------------------------------------------------------------------------------------


def test_forward_variables_are_those_of_the_definition():
    torch.manual_seed(0)
    emissions, states = torch.randn(3, 6, 7), torch.randint(3, (3, 7))
    found = omni.models.ctc._forward_variables(emissions, states)
    for row in range(3):
        alpha = [-math.inf] * 7
        alpha[:2] = emissions[row, 0, :2].tolist()
        for frame in range(6):
            if frame:
                before = alpha
                alpha = []
                for state in range(7):
                    ways = [before[state]] + ([before[state - 1]] if state else [])
                    if state % 2 and state > 2 and states[row, state] != states[row, state - 2]:
                        ways.append(before[state - 2])
                    total = torch.tensor(ways).logsumexp(dim=0).item()
                    alpha.append(total + emissions[row, frame, state].item())
            torch.testing.assert_close(found[row, frame], torch.tensor(alpha), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_quantiser_counts_the_same_latents_without_waiting(share):
    generator = torch.Generator().manual_seed(0)
    latents, chosen = torch.randn(4, 9, 5, generator=generator), torch.randint(7, (4, 9), generator=generator)
    active = torch.rand(4, 9, generator=generator) < share
    compact = quantizer._collect_rows(latents[active], chosen[active], 7)
    masked = quantizer._collect_masked(latents.flatten(0, 1), chosen.flatten(), active.flatten(), 7)
    for name, one, other in zip(("counts", "sums", "samples", "drawn"), compact, masked, strict=True):
        if name != "samples":
            torch.testing.assert_close(one, other, msg=name)
    drawn = set()
    for _ in range(50):
        _, _, samples, _ = quantizer._collect_masked(latents.flatten(0, 1), chosen.flatten(), active.flatten(), 7)
        drawn |= {tuple(row) for row in samples.tolist()}
    possible = {tuple(row) for row in latents[active].tolist()}
    assert drawn == (possible or {(0.0,) * 5})  # each active one, and no other


THINKER = ThinkerArchitecture(vocab_size=272, ctx_len=8, n_layers=1, d_model=16, n_heads=2, d_ff=32)


def test_logits_at_targets_give_the_loss_of_all_positions():
    torch.manual_seed(0)
    thinker = Thinker(THINKER)
    tokens, targets = torch.randint(272, (2, 8)), torch.full((2, 8), -100)
    targets[0, 3], targets[1, 5:] = 7, 9
    at = torch.tensor([3, 13, 14, 15, -1, -1])
    results = []
    for target_at in (None, at):
        thinker.zero_grad()
        with mock.patch.object(torch.compiler, "is_compiling", lambda: True):  # as on a GPU
            nats, _ = thinker(tokens, targets=targets, target_at=target_at)
            nats.backward()
        results.append([nats.detach(), *(parameter.grad.clone() for parameter in thinker.parameters())])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def test_a_gpu_computes_logits_and_the_last_mlp_at_targets_only():
    with fake_cuda(), torch.device("cuda"):
        thinker, tokens = Thinker(THINKER), torch.zeros(2, 8, dtype=torch.int64)
        flops = []
        for target_at in (None, tokens[0, :6]):
            with Counting() as counting:
                thinker(tokens, targets=tokens, target_at=target_at)
            flops.append(counting.counts.flops)
    assert flops[0] - flops[1] == 2 * 10 * THINKER.d_model * (THINKER.vocab_size + 3 * THINKER.d_ff)


def test_stage_e_names_its_targets_on_a_gpu():
    with mock.patch.object(Thinker, "forward", autospec=True, side_effect=Thinker.forward) as losses:
        small("E")
    assert losses.call_count == 2 and all(call.kwargs["target_at"] is not None for call in losses.call_args_list)


def test_targets_are_found_after_positions_have_moved():
    kept = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]], dtype=torch.bool)
    values = torch.arange(15).view(3, 5)
    order = torch.argsort(~kept, dim=1, stable=True)
    at = torch.tensor([3, 4, 7, 11, 14, -1])
    found = moved(at, kept)
    assert values.gather(1, order).flatten()[found[:-1]].tolist() == at[:-1].tolist() and found[-1] == -1


# --- benchmarks/gpu.py -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="expected a CUDA device, found none"):
        gpu.main([])
    for wrong in (["--steps", "1"], ["--seconds", "0"], ["--device", "foo"]):
        with pytest.raises(UserError, match=wrong[0]):
            gpu.main(["--device", "cpu", *wrong])


def test_a_table_has_a_row_for_each_step():
    figures = {"steps": 300, "steps_per_s": 10.0, "busy_percent": 95.4, "peak_memory_gb": 6.5}
    modes = {"deterministic": {"A": figures, "B": {"note": "out of memory"}}}
    modes["not deterministic"] = {"A": figures | {"steps_per_s": 12.0}, "B": figures}
    lines = gpu.table({"figures": modes, "flops": {"A": 5e12, "B": 1e12}, "peak_flops": 1e14})
    assert lines[2] == "| A | 10.00 | 95 % | 50.0% | 6.5 GB | 1.20 |"
    assert lines[3].startswith("| B | out of memory |")
