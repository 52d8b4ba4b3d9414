"""The blocks of a decoder: RMSNorm, rotary positions, grouped-query attention with a KV cache, SwiGLU, MoE.

Parameter names are those of Qwen3 in ``transformers``, so that an export only adds a prefix.
"""

# B batch, T new tokens, S tokens attended to (cached and new), D model width, F inner width
# H query heads, G key/value heads, K head width, E experts, N = B * T tokens, R = N * top_k routed rows

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.models.architectures import ThinkerArchitecture
from omni.models.ops import attention, linear, matmul_dtype, norm_and_rotate, rms_norm, silu_gate
from omni.models.packing import Packing


class RMSNorm(nn.Module):
    """(..., D) -> (..., D), see ``omni.models.ops.rms_norm``."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


def rope_tables(length: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (length, K) in float32.

    Channel i is paired with channel i + K/2. The first half of the sines is negated already, so that a rotation is
    ``x * cos + roll(x) * sin``.

    Su et al. 2021, "RoFormer"; the half-split pairing of GPT-NeoX, which Qwen3 uses.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)  # (K/2,)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)  # (length, K/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class KVCache:
    """Keys and values of the tokens seen so far, in memory that is allocated once.

    Args:
        max_len: number of tokens that fit.
        dtype: dtype of the attention: the weights' or autocast's.
    """

    def __init__(
        self, arch: ThinkerArchitecture, batch: int, max_len: int, device: torch.device | str, dtype: torch.dtype
    ):
        shape = (arch.n_layers, batch, arch.n_kv_heads, max_len, arch.d_head)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.max_len = max_len
        self.position = 0  # tokens held, so the position of the next one

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, G, T, K) of the new tokens; return those of all tokens so far (B, G, S, K).

        ``advance`` moves the position once per forward, since every layer writes at the same position.
        """
        end = self.position + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"KV cache of {self.max_len} tokens: {end} do not fit")
        self.keys[layer, :, :, self.position : end] = k
        self.values[layer, :, :, self.position : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_tokens: int) -> None:
        self.position += n_tokens

    def repeated(self, arch: ThinkerArchitecture, batch: int, max_len: int) -> "KVCache":
        """A cache of ``batch`` sequences that all begin with the tokens of this one."""
        cache = KVCache(arch, batch, max_len, self.keys.device, self.keys.dtype)
        for own, new in ((self.keys, cache.keys), (self.values, cache.values)):
            new[:, :, :, : self.position] = own[:, :, :, : self.position]
        cache.position = self.position
        return cache


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) -> (B, T, D).

    Grouped queries (Ainslie et al. 2023, "GQA"): H / G query heads share one key/value head. Queries and keys pass an
    RMSNorm per head before the rotation (Qwen3 technical report, 2025), which keeps the attention logits bounded.
    """

    def __init__(self, arch: ThinkerArchitecture, layer: int, use_flash: bool):
        super().__init__()
        self.layer = layer
        self.use_flash = use_flash
        self.n_heads, self.n_kv_heads, self.d_head = arch.n_heads, arch.n_kv_heads, arch.d_head
        self.q_proj = nn.Linear(arch.d_model, arch.n_heads * arch.d_head, bias=False)
        self.k_proj = nn.Linear(arch.d_model, arch.n_kv_heads * arch.d_head, bias=False)
        self.v_proj = nn.Linear(arch.d_model, arch.n_kv_heads * arch.d_head, bias=False)
        self.o_proj = nn.Linear(arch.n_heads * arch.d_head, arch.d_model, bias=False)
        self.q_norm = RMSNorm(arch.d_head)
        self.k_norm = RMSNorm(arch.d_head)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        mask: Tensor | None,
        packing: Packing | None = None,
    ) -> Tensor:
        """``mask`` (T, S), true where a query may attend: only for several new tokens after a filled cache. With
        ``packing`` x is (1, N, D), and each row attends to itself."""
        heads = linear(x, self.q_proj, self.k_proj, self.v_proj)
        if packing is None:
            y = self._mix(heads, cos, sin, cache, mask)
        else:
            groups = packing.split(heads)
            y = packing.join([self._mix(h, cos[: h.shape[1]], sin[: h.shape[1]], None, None) for h in groups])
        return self.o_proj(y)

    def _mix(self, heads: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        """Queries, keys and values (B, T, (H + 2G) K) -> the heads' outputs (B, T, H K)."""
        B, T, _ = heads.shape
        n_heads, n_keys = self.n_heads, self.n_kv_heads
        heads = heads.view(B, T, n_heads + 2 * n_keys, self.d_head)
        qk, v = heads.split((n_heads + n_keys, n_keys), dim=2)
        q, k = norm_and_rotate(qk, self.q_norm.weight, self.k_norm.weight, cos, sin, n_heads)
        v = v.transpose(1, 2)  # (B, G, T, K)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # is_causal aligns its triangle with the first key: right if keys and queries are the same tokens, wrong after
        # a filled cache, where one new token attends to all keys, and several need the mask.
        is_causal = mask is None and T > 1
        y = attention(q, k, v, causal=is_causal, mask=mask, use_flash=self.use_flash)  # (B, H, T, K)
        return y.transpose(1, 2).reshape(B, T, -1)


class SwiGLU(nn.Module):
    """Gated MLP, (..., D) -> (..., D). Shazeer 2020, "GLU Variants Improve Transformer"."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_gate(linear(x, self.gate_proj, self.up_proj)))


@torch.library.custom_op("omni::grouped_linear", mutates_args=())
def _grouped_linear_loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``grouped_linear`` as one matmul per expert. A custom op, so that torch.compile does not trace it: the sizes of
    the groups are known only at run time."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):  # one wait for the device per call
        if end > start:
            torch.mm(rows[start:end], weight[expert].t(), out=out[start:end])
        start = end
    return out


@_grouped_linear_loop.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("omni::grouped_linear_weight_grad", mutates_args=())
def _grouped_linear_weight_grad(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """Gradient (E, out, in) from grad (R, out) and rows (R, in). Experts without a row get zeros."""
    weight_grad = rows.new_zeros(ends.shape[0], grad.shape[1], rows.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(grad[start:end].t(), rows[start:end], out=weight_grad[expert])
        start = end
    return weight_grad


@_grouped_linear_weight_grad.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])


def _keep_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_backward(ctx, grad: Tensor):
    rows, weight, ends = ctx.saved_tensors
    rows_grad = _grouped_linear_loop(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    weight_grad = _grouped_linear_weight_grad(grad, rows, ends) if ctx.needs_input_grad[1] else None
    return rows_grad, weight_grad, None


_grouped_linear_loop.register_autograd(_grouped_linear_backward, setup_context=_keep_for_backward)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows sorted by expert, each times the weight of its expert: one matmul per expert, not per token.

    Args:
        rows: (R, in), the rows of expert 0 first.
        weight: (E, out, in).
        ends: (E,) int32, the row after the last one of each expert.

    Returns:
        (R, out), in autocast's dtype under autocast.
    """
    device, dtype = rows.device.type, matmul_dtype(rows)
    rows, weight = rows.to(dtype), weight.to(dtype)  # autocast applies to neither kernel below
    # torch's fused kernel never waits for the device. In torch 2.11 it can be compiled for bf16 only, and requires rows
    # of a multiple of 16 bytes and, on CUDA, compute capability 8.
    fused = rows.dtype == torch.bfloat16 and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
    if fused and (device == "cpu" or (device == "cuda" and torch.cuda.get_device_capability(rows.device) >= (8, 0))):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return _grouped_linear_loop(rows, weight, ends)


class Experts(nn.Module):
    """E SwiGLU MLPs with stacked weights: gate and up in one matrix, as in ``transformers`` 5."""

    def __init__(self, n_experts: int, d_model: int, d_expert: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * d_expert, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_model, d_expert))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows (R, D) sorted by expert, and ends (E,), the row after each expert's last -> (R, D)."""
        gate_up = grouped_linear(rows, self.gate_up_proj, ends)  # (R, 2F)
        return grouped_linear(silu_gate(gate_up), self.down_proj, ends)


class MoE(nn.Module):
    """Mixture of experts, (B, T, D) -> (B, T, D), exactly as in Qwen3-MoE.

    A softmax over all experts in float32 routes a token to its ``top_k`` best; their probabilities are scaled to
    sum to 1. No token is ever dropped. Fedus et al. 2021, "Switch Transformers"; Qwen3 technical report, 2025.
    """

    def __init__(self, arch: ThinkerArchitecture):
        super().__init__()
        self.n_experts, self.top_k = arch.num_experts, arch.num_experts_per_tok
        self.gate = nn.Linear(arch.d_model, arch.num_experts, bias=False)
        self.experts = Experts(arch.num_experts, arch.d_model, arch.d_expert)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output, and (2, E): each expert's share of the tokens, and its mean routing probability.

        The shares sum to ``top_k``. Only the probabilities carry a gradient.
        """
        B, T, D = x.shape
        x = x.reshape(B * T, D)
        probabilities = self.gate(x).float().softmax(dim=-1)  # (N, E)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)  # (N, top_k)
        weights = weights / weights.sum(dim=-1, keepdim=True)

        by_expert, order = chosen.flatten().sort(stable=True)  # (R,)
        experts = torch.arange(self.n_experts, device=x.device)
        ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)  # (E,)
        y = self.experts(x[order // self.top_k], ends)  # (R, D)
        # back to token order by a gather, not by index_add: the same bits in every run
        y = y[order.argsort()].view(B * T, self.top_k, D)
        y = (y * weights.unsqueeze(-1).to(y.dtype)).sum(dim=1)

        counts = ends.diff(prepend=ends.new_zeros(1))  # (E,)
        return y.view(B, T, D), torch.stack((counts / (B * T), probabilities.mean(dim=0)))


def load_balancing_loss(router_stats: list[Tensor]) -> Tensor:
    """The load-balancing loss, () float32: ``top_k`` for an even load, up to E if one expert takes all.

    Args:
        router_stats: (2, E) of ``MoE`` for each layer; averaged over the layers first, as in Qwen3-MoE.

    Equations 4 to 6 of Fedus et al. 2021.
    """
    shares, probabilities = torch.stack(router_stats).mean(dim=0)  # (E,) each
    return (shares * probabilities).sum() * shares.shape[0]


class ConvNeXtBlock(nn.Module):
    """(B, N, D) -> (B, N, D): a depthwise convolution in time, then an MLP per frame, on a residual branch.

    Liu et al. 2022, "A ConvNet for the 2020s", in one dimension as in Siuzdak 2023, "Vocos". Departures: RMSNorm
    instead of LayerNorm; the branch starts at zero instead of with a layer scale.
    """

    def __init__(self, width: int, inner: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm = RMSNorm(width)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)
        nn.init.zeros_(self.down_proj.weight)
        nn.init.zeros_(self.down_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` (B, N, 1): 1 for frames, 0 for padding, which is set to zero; None: no padding."""
        y = x if mask is None else x * mask
        y = self.conv(y.transpose(1, 2)).transpose(1, 2)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm(y))))
