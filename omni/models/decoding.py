"""The Thinker's computation for one new token, in half as many operations.

For one token, an operation's arithmetic takes far less than the microseconds of its launch. So the projections of
attention are one matrix here, and those into the MLP another; a norm's weight is multiplied into the matrix that reads
it, and those of queries and keys, with the attention's scale, into the rotation's cosines and sines.
"""

# B sequences, S tokens attended to, D model width, H query heads, G key/value heads, K head width

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.models.layers import KVCache
from omni.models.ops import RMS_EPS


class _Layer:
    """The matrices of one block, and its part of the cache."""

    def __init__(self, block, thinker, cache: KVCache, layer: int):
        attention, mlp, arch = block.self_attn, block.mlp, thinker.architecture
        dtype, heads = cache.keys.dtype, arch.n_heads + arch.n_kv_heads
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        width = arch.d_model**0.5  # see _over_length
        # transposed in memory: a vector times such a matrix takes half as long
        self.qkv = _transposed(qkv.float() * block.input_layernorm.weight.float() * width, dtype)
        self.gate_up = _transposed(gate_up.float() * block.post_attention_layernorm.weight.float() * width, dtype)
        self.out, self.down = _transposed(attention.o_proj.weight, dtype), _transposed(mlp.down_proj.weight, dtype)
        scale = torch.empty(heads, arch.d_head, device=qkv.device)
        scale[: arch.n_heads] = attention.q_norm.weight  # times sqrt(K) of the norm, over sqrt(K) of the attention
        scale[arch.n_heads :] = attention.k_norm.weight * arch.d_head**0.5
        cos = thinker.rope_cos[: cache.max_len, None].float() * scale  # (max_len, H + G, K)
        sin = thinker.rope_sin[: cache.max_len, None].float() * scale.roll(arch.d_head // 2, dims=-1)
        self.keys, self.values = cache.keys[layer].flatten(0, 1), cache.values[layer].flatten(0, 1)  # (B * G, max, K)
        self.places = list(zip(cos, sin, self.keys.unbind(dim=1), self.values.unbind(dim=1), strict=True))


@torch.no_grad()
def decode_step(thinker, cache: KVCache) -> Callable[..., Tensor]:
    """A function that reads one more token of each sequence, equal to ``Thinker.hidden_states`` up to rounding.

    The weights are copied, so it is valid until they change.

    Returns:
        ``read(ids, seen=None)``: ids (B,), the token after those in ``cache``, and seen (B, S) bool, true where a
        sequence may attend, default everywhere -> the last, normalised hidden states (B, D).
    """
    arch = thinker.architecture
    if arch.use_moe:

        def read_with_experts(ids: Tensor, seen: Tensor | None = None) -> Tensor:
            mask = None if seen is None else seen[:, None, None]
            return thinker.hidden_states(ids[:, None], cache=cache, mask=mask)[:, 0]

        return read_with_experts

    H, G, K, dtype = arch.n_heads, arch.n_kv_heads, arch.d_head, cache.keys.dtype
    layers = [_Layer(block, thinker, cache, index) for index, block in enumerate(thinker.layers)]
    last_norm = thinker.norm.weight.float() * arch.d_model**0.5
    # lengths whose squares are the norms' epsilon times the width
    short, short_head = (torch.tensor((width * RMS_EPS) ** 0.5, device=last_norm.device) for width in (arch.d_model, K))

    def read(ids: Tensor, seen: Tensor | None = None) -> Tensor:
        x, position = thinker.embed_tokens(ids), cache.position  # (B, D)
        B, end = len(x), position + 1
        if end > cache.max_len:
            raise ValueError(f"KV cache of {cache.max_len} tokens: {end} do not fit")
        for layer in layers:
            cos, sin, key, value = layer.places[position]
            heads = torch.mm(_over_length(x, short).to(dtype), layer.qkv).view(B, H + 2 * G, K)
            qk = _over_length(heads[:, : H + G], short_head)
            qk = torch.addcmul(qk * cos, qk.roll(K // 2, dims=-1), sin).to(dtype)
            key.copy_(qk[:, H:].reshape(B * G, K))
            value.copy_(heads[:, H + G :].reshape(B * G, K))
            q = qk[:, :H].reshape(B * G, H // G, K)
            scores = torch.bmm(q, layer.keys[:, :end].transpose(1, 2))  # (B * G, H / G, S)
            if seen is not None:
                scores = scores.view(B, H, end).masked_fill(~seen[:, None], -torch.inf).view(B * G, H // G, end)
            y = torch.bmm(scores.softmax(dim=-1, dtype=torch.float32).to(dtype), layer.values[:, :end])
            x = x + torch.mm(y.view(B, H * K), layer.out)
            gate, up = torch.mm(_over_length(x, short).to(dtype), layer.gate_up).chunk(2, dim=-1)
            x = x + torch.mm(F.silu(gate) * up, layer.down)
        cache.advance(1)
        return (_over_length(x, short) * last_norm).to(x.dtype)

    return read


def _transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.t().to(dtype).contiguous()


def _over_length(x: Tensor, short: Tensor) -> Tensor:
    """RMSNorm over sqrt(its width), float32: x / sqrt(sum(x^2) + short^2), three operations instead of six."""
    x = x.float()
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), short)
