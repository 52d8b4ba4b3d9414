"""One token at a time, in fewer operations, is what the model computes for the whole text."""

import pytest
import torch
from test_thinker import SHAPES, build, tokens

from omni.models.decoding import decode_step
from omni.models.layers import KVCache


def half_read(model, x, dtype=torch.float32, capacity=None) -> KVCache:
    """The cache after all but the last 14 tokens."""
    cache = KVCache(model.architecture, len(x), capacity or x.shape[1], "cpu", dtype)
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)  # unwritten places must not be read
    model.hidden_states(x[:, :-14], cache=cache)
    return cache


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_hidden_states_are_those_of_the_whole_text(shape):
    model, x = build(shape), tokens(3, 24)
    read = decode_step(model, cache := half_read(model, x))
    found = torch.stack([read(ids) for ids in x[:, 10:].unbind(dim=1)], dim=1)
    torch.testing.assert_close(found, model.hidden_states(x)[:, 10:], atol=1e-5, rtol=1e-5)
    assert cache.position == 24
    with pytest.raises(ValueError, match="24 tokens"):
        read(x[:, 0])


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_nobody_sees_what_is_hidden_from_it(shape):
    model, x = build(shape), tokens(2, 24)
    edited = x.clone()
    edited[1, :4] = (edited[1, :4] + 1) % model.architecture.vocab_size
    seen = torch.ones(2, 24, dtype=torch.bool)
    seen[1, :4] = False
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    mask = ((causal & seen[:, None, :10]) | torch.eye(10, dtype=torch.bool))[:, None]  # (B, 1, T, S)
    results = []
    for text in (x, edited):
        cache = KVCache(model.architecture, 2, 24, "cpu", torch.float32)
        model.hidden_states(text[:, :10], cache=cache, mask=mask)
        read = decode_step(model, cache)
        results.append(torch.stack([read(text[:, at], seen[:, : at + 1]) for at in range(10, 24)], dim=1))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_half_precision_it_is_as_near_as_the_model_itself():
    model, x = build("gqa-untied"), tokens(3, 24)
    exact = model.hidden_states(x)[:, 10:]
    with torch.autocast("cpu", torch.bfloat16):
        read = decode_step(model, half_read(model, x, torch.bfloat16))
        found = torch.stack([read(ids) for ids in x[:, 10:].unbind(dim=1)], dim=1)
        error = (model.hidden_states(x)[:, 10:] - exact).square().mean()
    assert found.dtype == exact.dtype
    assert (found - exact).square().mean() < 2 * error
