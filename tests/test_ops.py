"""The operations with written-out gradients are the formulas, and so are their gradients."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from omni.data.audio import MelSpec, log_mel
from omni.models import ops
from omni.models.layers import rope_tables
from omni.models.picture_text import similarities
from omni.models.quantizer import nearest
from omni.models.speech_architectures import VocoderArchitecture
from omni.models.vocoder import HarmonicGenerator

T, K = 300, 16  # T: more than the queries that are computed together
COS, SIN = rope_tables(7, K, 1e4)


def rotated(heads, q_weight, k_weight):
    return ops.norm_and_rotate(heads, q_weight, k_weight, COS, SIN, n_heads=4)


def attended(**keys):
    return lambda q, k, v, *mask: ops.attention(q, k, v, mask=mask[0] if mask else None, use_flash=False, **keys)


QKV = (2, 4, T, K), (2, 2, T, K), (2, 2, T, K)
CASES = {
    "rms_norm": (ops.rms_norm, (3, 7, K), (K,)),
    "norm_and_rotate": (rotated, (2, 7, 6, K), (K,), (K,)),
    "silu_gate": (ops.silu_gate, (3, 7, 2 * K)),
    "attention": (attended(), *QKV),
    "attention, more keys than queries": (attended(), (2, 4, 5, K), *QKV[1:]),
    "attention, causal": (attended(causal=True), *QKV),
    "attention, one head each": (attended(causal=True), *[(2, 4, 9, K)] * 3),
    "attention, mask": (attended(), *QKV, (2, 4, T, T)),
    "attention, mask of all heads": (attended(), *QKV, (2, 1, 1, T)),
}


def results_and_gradients(function, inputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(1)
    arriving = [torch.randn(result.shape).bfloat16().to(result.dtype) for result in results]
    gradients = torch.autograd.grad(results, inputs, arriving)
    return [result.detach() for result in (*results, *gradients)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_gradients_are_those_that_autograd_finds_for_the_formula(case, dtype, atol, monkeypatch):
    function, *shapes = CASES[case]
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    inputs = [x.to(dtype) if x.dim() > 1 else x for x in inputs]  # norms' weights are always float32
    found = results_and_gradients(function, inputs)
    monkeypatch.setattr(ops, "use_cpu_kernels", lambda x: False)
    expected = results_and_gradients(function, [x.float() for x in inputs])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=atol * max(1.0, float(theirs.abs().max())), rtol=0)


@pytest.mark.parametrize("use_flash", [True, False])
def test_a_query_looks_only_where_it_may(use_flash):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, K) for _ in range(3))
    mask = torch.rand(2, 1, 9, 9) < 0.5
    mask[..., 0] = True  # every query sees something
    mask[..., 5] = False
    expected = ops.attention(q, k, v, mask=mask, use_flash=use_flash)
    k[:, :, 5], v[:, :, 5] = 1e4, 1e4
    assert torch.equal(ops.attention(q, k, v, mask=mask, use_flash=use_flash), expected)


def test_a_query_that_may_look_nowhere_gets_a_number():
    q, k, v = (torch.randn(1, 1, 3, K, requires_grad=True) for _ in range(3))
    y = ops.attention(q, k, v, mask=torch.zeros(1, 1, 3, 3, dtype=torch.bool), use_flash=False)
    y.sum().backward()
    assert y.isfinite().all() and q.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_read_the_same_are_one_product(rows, bias):
    layers, x = [nn.Linear(8, width, bias=bias) for width in (8, 4, 4)], torch.randn(rows, 8)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(ops.linear(x, *layers), expected, atol=1e-6, rtol=0)


def test_nothing_is_computed_in_bf16_without_autocast():
    q, k, v = (torch.randn(1, 1, 3, K) for _ in range(3))
    assert ops.attention(q, k, v, use_flash=False).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(q, k, v, use_flash=False).dtype == torch.bfloat16


@pytest.mark.parametrize("case", CASES)
def test_what_is_computed_again_in_the_backward_has_the_same_gradients(case):
    function, *shapes = CASES[case]
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    expected = results_and_gradients(function, inputs)
    found = results_and_gradients(lambda *given: checkpoint(function, *given, use_reentrant=False), inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_refused(case):
    function, *shapes = CASES[case]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = function(*inputs)
    results = sum(result.sum() for result in (results if isinstance(results, tuple) else (results,)))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(results, inputs[:1], create_graph=True)


@pytest.mark.parametrize("use_flash", [True, False])
def test_causal_attention_is_of_the_same_tokens_and_without_a_mask(use_flash):
    q, k, v = (torch.randn(1, 1, 3, K) for _ in range(3))
    with pytest.raises(ValueError, match="causal"):
        ops.attention(q, k, v, causal=True, mask=torch.ones(3, 3, dtype=torch.bool), use_flash=use_flash)
    with pytest.raises(ValueError, match="causal"):
        ops.attention(q[:, :, :2], k, v, causal=True, use_flash=use_flash)


class Products(TorchDispatchMode):
    """Notes of each product of matrices and each convolution what the GPU's would be made in."""

    def __init__(self) -> None:
        super().__init__()
        self.made_in = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.made_in.append((args[-1].dtype, torch.backends.cuda.matmul.fp32_precision))
        if function.overloadpacket is torch.ops.aten.convolution:
            self.made_in.append((args[0].dtype, torch.backends.cudnn.conv.fp32_precision))
        return function(*args, **(kwargs or {}))


VOCODER = HarmonicGenerator(VocoderArchitecture(harmonic_source=True))
COMPARED = {
    "the nearest row of a codebook": lambda x: nearest(x, torch.randn(9, 8)),
    "cosines of pictures and captions": lambda x: similarities(x, torch.randn(7, 8)),
    "log-mels": lambda x: log_mel(x.flatten().repeat(200), MelSpec()),
    "the pitch that is read": lambda x: VOCODER.read_pitch(x.flatten().repeat(20).view(1, -1, 80)),
}


@pytest.mark.parametrize("compute", COMPARED.values(), ids=COMPARED)
def test_what_is_compared_is_made_in_float32_however_coarse_training_is(compute):
    before, of_convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    assert of_convolutions != "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
            compute(torch.randn(5, 8))
        assert set(products.made_in) == {(torch.float32, "ieee")}
        assert torch.backends.cuda.matmul.fp32_precision == "tf32", "and afterwards as before"
        assert torch.backends.cudnn.conv.fp32_precision == of_convolutions
    finally:
        torch.set_float32_matmul_precision(before)
