"""Rows laid end to end give the losses and gradients of padded rows, and each sees only itself."""

import pytest
import torch

from omni.data.tokenizer import IGNORE_INDEX
from omni.models.architectures import ThinkerArchitecture
from omni.models.packing import Packing
from omni.models.thinker import Thinker

LENGTHS = torch.tensor([5, 64, 1, 17, 16, 33, 40, 2, 9, 63, 12])
CTX_LEN = 64


def rows_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    targets = torch.randint(0, 300, (len(LENGTHS), CTX_LEN))
    targets[torch.arange(CTX_LEN)[None] >= LENGTHS[:, None]] = IGNORE_INDEX
    return torch.randn(len(LENGTHS), CTX_LEN, 32), targets


def new_thinker(experts: bool, use_flash: bool = False) -> Thinker:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "ctx_len": CTX_LEN, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 64}
    return Thinker(ThinkerArchitecture(**sizes, use_gqa=True, use_moe=experts), use_flash=use_flash)


@pytest.mark.parametrize("use_flash", [False, True])
@pytest.mark.parametrize("experts", [False, True])
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(experts, use_flash):
    thinker = new_thinker(experts, use_flash)
    rows, targets = rows_and_targets()
    found = []
    for packing in (None, Packing(LENGTHS, CTX_LEN)):
        x = rows.clone().requires_grad_()
        packed, wanted = (x, targets) if packing is None else (packing.pack(x), packing.pack(targets, IGNORE_INDEX))
        nats, _ = thinker(inputs_embeds=packed, targets=wanted, packing=packing)
        thinker.zero_grad()
        nats.backward()
        found.append([nats.detach(), x.grad, *(p.grad for p in thinker.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("experts", [False, True])
def test_without_a_target_each_parameter_has_a_gradient(experts):
    """Distributed training waits for all of them."""
    thinker, packing = new_thinker(experts), Packing(LENGTHS, CTX_LEN)
    packed = packing.pack(rows_and_targets()[0])
    targets = torch.full(packed.shape[:2], IGNORE_INDEX)
    nats, balance = thinker(inputs_embeds=packed, targets=targets, packing=packing)
    (nats + balance).backward()
    used = [p for name, p in thinker.named_parameters() if name != "embed_tokens.weight" or thinker.lm_head is None]
    assert nats.item() == 0 and all(p.grad is not None and torch.isfinite(p.grad).all() for p in used)


def test_split_and_join_are_inverse_and_no_row_is_lost():
    packing = Packing(LENGTHS, CTX_LEN)
    rows, _ = rows_and_targets()
    packed = packing.pack(rows).requires_grad_()
    groups = packing.split(packed)
    assert sum(len(group) for group in groups) == len(LENGTHS)
    assert sum(group.shape[0] * group.shape[1] for group in groups) < 0.9 * rows.shape[0] * rows.shape[1]
    joined = packing.join(groups)
    assert torch.equal(joined, packed)
    joined.backward(weight := torch.randn_like(joined))
    used = int(LENGTHS.sum())
    assert torch.equal(packed.grad[0, :used], weight[0, :used]) and not packed.grad[0, used:].any()
    ends = packing.lengths.cumsum(dim=0).tolist()
    assert all(torch.equal(packed[0, end - n : end], rows[LENGTHS.tolist().index(n), :n])
               for end, n in zip(ends, packing.lengths.tolist(), strict=True))  # fmt: skip
