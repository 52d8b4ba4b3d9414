"""One token at a time, in fewer operations, is what the model computes for the whole text."""

import copy
import io
import pickle

import pytest
import torch
from test_thinker import SHAPES, build, tokens
from torch import nn

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


# ---------------------------------------------------------------------------------------------------------------
# The weights that are kept from one answer to the next


def step_of_adamw(model) -> None:
    model.loss(tokens(2, 9), tokens(2, 9))[0].backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


def new_parameter(model) -> None:
    model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.randn_like(model.layers[1].mlp.down_proj.weight))


def other_storage(model) -> None:
    """At the address of the freed one, if the allocator gives it."""
    weight = model.layers[0].mlp.gate_proj.weight
    shape, address = weight.shape, weight.data_ptr()
    weight.data = torch.zeros(1)
    found = [torch.randn(shape) for _ in range(50)]
    weight.data = next((one for one in found if one.data_ptr() == address), found[0])


CHANGES = {
    "a matrix": lambda model: model.layers[2].self_attn.v_proj.weight.mul_(1.5),
    "a norm": lambda model: model.layers[0].post_attention_layernorm.weight.add_(0.3),
    "the norm of queries": lambda model: model.layers[1].self_attn.q_norm.weight.mul_(2.0),
    "the last norm": lambda model: model.norm.weight.add_(0.3),
    "a part of a matrix": lambda model: model.layers[0].mlp.up_proj.weight[3].zero_(),
    "load_state_dict": lambda model: model.load_state_dict(build("gqa-untied", seed=1).state_dict()),
    "load_state_dict, assign": lambda model: model.load_state_dict(build("gqa-untied", 1).state_dict(), assign=True),
    "a new parameter": new_parameter,
    "other storage": other_storage,
    "to half precision and back": lambda model: model.bfloat16().float(),
    "a step of AdamW": torch.enable_grad()(step_of_adamw),
}


def read_one_by_one(model, x) -> torch.Tensor:
    read = decode_step(model, half_read(model, x))
    return torch.stack([read(ids) for ids in x[:, 10:].unbind(dim=1)], dim=1)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_kept_weights_are_never_those_of_before_a_change(change):
    model, x = build("gqa-untied"), tokens(3, 24)
    before = read_one_by_one(model, x)
    for _ in range(2):
        CHANGES[change](model)
        torch.testing.assert_close(read_one_by_one(model, x), model.hidden_states(x)[:, 10:], atol=1e-5, rtol=1e-5)
    assert (read_one_by_one(model, x) - before).abs().amax() > 1e-3, "else equality would say little"


@torch.no_grad()
def test_no_other_weights_get_the_addresses_of_those_that_were_copied():
    model = build("gqa-untied")
    read_one_by_one(model, tokens(1, 24))
    copied = {parameter.data_ptr() for parameter in model.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.clone()))
    others = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(20)]
    assert copied.isdisjoint(weight.data_ptr() for weight in [*model.parameters(), *others])


@torch.no_grad()
def test_weights_that_have_not_changed_are_copied_once():
    model, x = build("gqa-untied"), tokens(1, 24)
    first = list(model.generate(x[0].tolist(), max_new_tokens=9))
    kept = model.decode_weights
    for length in (5, 20):
        list(model.generate(x[0, :length].tolist(), max_new_tokens=9))
    assert model.decode_weights is kept is not None
    assert list(model.generate(x[0].tolist(), max_new_tokens=9)) == first
    with torch.autocast("cpu", torch.bfloat16):
        read = decode_step(model, half_read(model, x, torch.bfloat16))
        assert model.decode_weights is not kept and read(x[:, 10]).dtype == torch.float32
    torch.testing.assert_close(read_one_by_one(model, x), model.hidden_states(x)[:, 10:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_kept_weights_are_no_part_of_the_model():
    """Not of its state, its copies or its files; and a model in training has none."""
    model, x = build("gqa-untied"), tokens(3, 24)
    names, size = set(model.state_dict()), sum(parameter.numel() for parameter in model.parameters())
    before, file = read_one_by_one(model, x), io.BytesIO()
    assert set(model.state_dict()) == names and sum(parameter.numel() for parameter in model.parameters()) == size
    torch.save(model, file)
    assert file.tell() < 4 * size + 50_000
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert other.decode_weights is None and torch.equal(read_one_by_one(other, x), before)
    twin = copy.deepcopy(model)
    for one in (model, twin):  # as many changes of each, but other ones
        one.layers[0].mlp.up_proj.weight.mul_(2.0 if one is model else -1.0)
    for one in (twin, model):
        torch.testing.assert_close(read_one_by_one(one, x), one.hidden_states(x)[:, 10:], atol=1e-5, rtol=1e-5)
    assert model.train().decode_weights is None
    list(model.generate([1, 2], max_new_tokens=3))
    assert model.decode_weights is None, "as every step would make them stale"


def test_a_model_made_in_inference_mode_is_read_as_any_other():
    with torch.inference_mode():
        model, x = build("gqa-untied"), tokens(3, 24)
        for factor in (1, 2):
            model.layers[0].mlp.up_proj.weight.mul_(factor)
            torch.testing.assert_close(read_one_by_one(model, x), model.hidden_states(x)[:, 10:], atol=1e-5, rtol=1e-5)
