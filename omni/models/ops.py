"""The operations of a transformer beside its matrix products: norm, rotation, gate and attention.

On a GPU and in a compiled model, which fuses kernels, autograd differentiates their elementary operations. On a CPU
each elementary operation reads and writes all of its memory, which takes most of a small model's step. So the gradients
are written out for the CPU: fewer passes forward and backward, and fewer tensors stored for the backward.
"""

# B batch, T queries, S keys, K head width, H query heads, G key/value heads, D width, F inner width

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

RMS_EPS = 1e-6
_QUERIES = 128  # queries of causal attention computed together: they need no key after the last query


def use_cpu_kernels(x: Tensor) -> bool:
    """Whether the written-out gradients apply to ``x``: in training on a CPU, without torch.compile."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would compute, given ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def round_up(length: int, step: int = 16) -> int:
    """``length`` rounded up to a multiple of ``step``. On a CPU, oneDNN builds a kernel for each new shape of product,
    which takes as long as several products, and keeps a few thousand. So there should be few lengths."""
    return -(-length // step) * step


def linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """(..., D) -> (..., sum of the layers' widths): several layers with the same input, as one product.

    Either all layers have a bias or none. Without gradients, perhaps for a single token, joining the weights would take
    longer than the products.
    """
    if not torch.is_grad_enabled():
        return torch.cat([layer(x) for layer in layers], dim=-1)
    biases = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(x, torch.cat([layer.weight for layer in layers]), biases)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x (B, T, D) at positions ``index`` (B, N) of each row: (B, N, D).

    Not ``gather``: in a fixed order, its gradient on a GPU sorts an index for each of B x N x D values, this one B x N.
    """
    B, T, D = x.shape
    first = torch.arange(B, device=x.device)[:, None] * T
    return x.reshape(B * T, D).index_select(0, (first + index).flatten()).view(B, -1, D)


def first_derivative_only(backward: Callable) -> Callable:
    """A backward that refuses ``create_graph``, since autograd's derivative of a written-out gradient is wrong."""

    @wraps(backward)
    def checked(ctx, *grads: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("omni.models.ops: no second derivatives are written out")
        return backward(ctx, *grads)

    return checked


# ---------------------------------------------------------------------------------------------------------------
# RMSNorm and rotation


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) * weight, with x (..., D) and weight (D,), in float32, returned in the dtype of x.

    Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    if use_cpu_kernels(x):
        return _RMSNorm.apply(x, weight.float())
    x32, weight = x.float(), weight.float()
    if x.is_cuda:  # one kernel there; on the CPU it is slower than its parts
        return F.rms_norm(x32, weight.shape, weight, RMS_EPS).to(x.dtype)
    return (x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + RMS_EPS) * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        normed, scale = _over_rms(x.float())
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        normed, scale, weight = ctx.saved_tensors
        x_grad, weight_grad = _norm_backward(grad.to(torch.float32, copy=True), normed, scale, weight)
        return x_grad.to(grad.dtype), weight_grad.reshape(-1, weight_grad.shape[-1]).sum(dim=0)


def _over_rms(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) float32 over its rms, and the factor 1 / rms (..., 1)."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = square.div_(x.shape[-1]).add_(RMS_EPS).rsqrt_()
    return x * scale, scale


def _norm_backward(grad: Tensor, normed: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the weight at each position, from that of ``normed * weight``, which is overwritten.

    The component of the gradient along x is removed, since the norm does not depend on the length of x.
    """
    weight_grad = grad * normed
    grad.mul_(weight)
    along = torch.linalg.vecdot(grad, normed).div_(normed.shape[-1]).unsqueeze_(-1)  # (..., 1)
    return grad.addcmul_(normed, along, value=-1).mul_(scale), weight_grad


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of ``x`` (..., K) by the angles of ``cos`` and ``sin``, see ``layers.rope_tables``."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def norm_and_rotate(
    heads: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, n_heads: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each head normalised (``rms_norm``) and then rotated (``rotate``).

    Args:
        heads: (B, T, H + G, K), the ``n_heads`` queries first.
        q_weight, k_weight: (K,), the norms' weights.
        cos, sin: (T, K).

    Returns:
        (B, H, T, K) and (B, G, T, K).
    """
    if use_cpu_kernels(heads):
        n_keys = heads.shape[2] - n_heads
        weight = torch.cat((q_weight.float().expand(n_heads, -1), k_weight.float().expand(n_keys, -1)))
        return _NormAndRotate.apply(heads, weight, cos[:, None], sin[:, None], n_heads)
    q, k = heads.split((n_heads, heads.shape[2] - n_heads), dim=2)
    q, k = rms_norm(q, q_weight).transpose(1, 2), rms_norm(k, k_weight).transpose(1, 2)
    return rotate(q, cos, sin), rotate(k, cos, sin)


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
        """``weight`` (H + G, K), the norm's weight of each head; ``cos`` and ``sin`` (T, 1, K)."""
        normed, scale = _over_rms(heads.float())
        ctx.save_for_backward(normed, scale, weight, cos, sin)
        half = heads.shape[-1] // 2
        turned = normed.roll(half, dims=-1).mul_(weight.roll(half, dims=-1) * sin).addcmul_(normed, weight * cos)
        parts = turned.transpose(1, 2).split((n_heads, heads.shape[2] - n_heads), dim=1)
        return tuple(part.to(heads.dtype, memory_format=torch.contiguous_format) for part in parts)

    @staticmethod
    @first_derivative_only
    def backward(ctx, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight, cos, sin = ctx.saved_tensors
        grad = torch.empty_like(normed)  # (B, T, H + G, K) float32
        grad[:, :, : q_grad.shape[1]] = q_grad.transpose(1, 2)
        grad[:, :, q_grad.shape[1] :] = k_grad.transpose(1, 2)
        grad = (grad * sin).roll(sin.shape[-1] // 2, dims=-1).addcmul_(grad, cos)  # turned back
        x_grad, weight_grad = _norm_backward(grad, normed, scale, weight)
        return x_grad.to(q_grad.dtype), weight_grad.sum(dim=(0, 1)), None, None, None


# ---------------------------------------------------------------------------------------------------------------
# Gate


def silu_gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with gate and up concatenated: (..., 2F) -> (..., F). Shazeer 2020, "GLU Variants"."""
    if use_cpu_kernels(gate_up):
        return _SiluGate.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        opened = F.silu(gate)  # kept: computed again, its exponential would take as long as six passes
        ctx.save_for_backward(gate_up, opened)
        return opened * up

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad: Tensor) -> Tensor:
        gate_up, opened = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        gate_grad, up_grad = both.chunk(2, dim=-1)
        torch.mul(grad, opened, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return both


# ---------------------------------------------------------------------------------------------------------------
# Attention


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, use_flash: bool = True
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, (B, H, T, K) -> (B, H, T, K), in autocast's dtype under autocast.

    Args:
        k, v: (B, G, S, K); H / G query heads share one key/value head.
        causal: a query attends to the keys up to its own position; T = S.
        mask: broadcast to (B, H, T, S): bool, true where a query may attend, or numbers added before the softmax, which
            get a gradient. A query that may attend to nothing gets a finite vector.
        use_flash: the fused kernel; False: the plain maths, with T * S numbers in memory for each head.

    Raises:
        ValueError: ``causal`` with T != S or with a mask.
    """
    if causal and (mask is not None or q.shape[2] != k.shape[2]):
        raise ValueError("causal attention is of the same tokens to each other, without a mask")
    if use_flash or q.device.type != "cpu" or torch.compiler.is_compiling():
        grouped = q.shape[1] != k.shape[1]
        with nullcontext() if use_flash else sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    dtype = matmul_dtype(q)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return _PlainAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), mask, causal)


class _PlainAttention(torch.autograd.Function):
    """The plain maths in the dtype of its inputs; for causal attention, block by block, only the unmasked half.

    ``F.scaled_dot_product_attention`` computes both halves, in float32 throughout.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
        q = q.reshape(B * H, T, K)
        k, v = (t[:, :, None].expand(B, G, H // G, S, K).reshape(B * H, S, K) for t in (k, v))
        y, shares = torch.empty_like(q), []  # attention probabilities of each block of queries
        size = _QUERIES if causal else max(1, T)
        for start in range(0, T, size):
            end = min(T, start + size)
            seen = end if causal else S
            scores = _product(q[:, start:end], k[:, :seen].transpose(1, 2), K**-0.5)  # (B * H, size, seen)
            if causal:
                hidden = torch.full((end - start, end - start), -torch.inf, dtype=q.dtype).triu_(1)
                scores[:, :, start:] += hidden
            if mask is not None:
                scores = (scores.view(B, H, T, S) + mask).to(q.dtype).view(B * H, T, S)
            shares.append(scores.softmax(dim=-1))  # float32 within
            torch.bmm(shares[-1], v[:, :seen], out=y[:, start:end])
        ctx.save_for_backward(q, k, v, *shares)
        ctx.n_keys, ctx.mask_shape = G, None if mask is None else mask.shape
        return y.view(B, H, T, K)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *shares = ctx.saved_tensors
        (B, H, T, K), S = grad.shape, k.shape[1]
        grad, q_grad, mask_grad, start = grad.reshape(B * H, T, K), torch.empty_like(q), None, 0
        if len(shares) > 1:
            k_sum, v_sum = (torch.zeros(k.shape) for _ in range(2))  # in float32
        for share in shares:
            end, seen = start + share.shape[1], share.shape[2]
            queries = slice(start, end)
            share_grad = torch.bmm(grad[:, queries], v[:, :seen].transpose(1, 2))
            scores_grad = torch._softmax_backward_data(share_grad, share, -1, share.dtype)
            _product(scores_grad, k[:, :seen], K**-0.5, out=q_grad[:, queries])
            k_grad = _product(scores_grad.transpose(1, 2), q[:, queries], K**-0.5)
            v_grad = torch.bmm(share.transpose(1, 2), grad[:, queries])
            if len(shares) > 1:
                k_sum[:, :seen] += k_grad
                v_sum[:, :seen] += v_grad
                k_grad, v_grad = k_sum, v_sum
            start = end
        if ctx.needs_input_grad[3]:
            mask_grad = scores_grad.view(B, H, T, S).sum_to_size(ctx.mask_shape)
        if ctx.n_keys < H:
            k_grad, v_grad = (t.view(B, ctx.n_keys, -1, S, K).sum(dim=2) for t in (k_grad, v_grad))
        k_grad, v_grad = (t.view(B, ctx.n_keys, S, K).to(q.dtype) for t in (k_grad, v_grad))
        return q_grad.view(B, H, T, K), k_grad, v_grad, mask_grad, None


def _product(a: Tensor, b: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """(N, I, J) times (N, J, L) times the factor, rounded once."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor, out=out)
