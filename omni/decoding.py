"""One new token at a time: what a Thinker computes, in half as many operations, which at this size are what takes time.

At one token an operation's arithmetic is nothing beside the microseconds it takes to begin it. So the projections of
attention are one matrix here, and those into the MLP another; a norm's weight is multiplied into the matrix that reads
it, and those of queries and keys, with the attention's scale, into the rotation's cosines and sines.
"""

# B sequences, S tokens attended to, D model width, H query heads, G key/value heads, K head width

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.layers import RMS_EPS, KVCache


class _Layer:
    """The matrices of one block, and its part of the cache."""

    def __init__(self, block, thinker, cache: KVCache, layer: int):
        attention, mlp, arch = block.self_attn, block.mlp, thinker.arch
        dtype, heads = cache.keys.dtype, arch.n_heads + arch.n_kv_heads
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.qkv = (qkv.float() * block.input_layernorm.weight.float()).to(dtype)
        self.gate_up = (gate_up.float() * block.post_attention_layernorm.weight.float()).to(dtype)
        self.out, self.down = attention.o_proj.weight.to(dtype), mlp.down_proj.weight.to(dtype)
        scale = torch.empty(heads, arch.d_head, device=qkv.device)
        scale[: arch.n_heads] = attention.q_norm.weight * arch.d_head**-0.5
        scale[arch.n_heads :] = attention.k_norm.weight
        self.cos = thinker.rope_cos[: cache.max_len, None].float() * scale  # (max_len, H + G, K)
        self.sin = thinker.rope_sin[: cache.max_len, None].float() * scale.roll(arch.d_head // 2, dims=-1)
        self.keys, self.values = cache.keys[layer].flatten(0, 1), cache.values[layer].flatten(0, 1)  # (B * G, max, K)


@torch.no_grad()
def one_token_reader(thinker, cache: KVCache) -> Callable[..., Tensor]:
    """A function that reads one more token of each sequence: ``hidden_states`` of the ids, up to rounding.

    The weights are copied: it is right until they change.

    Returns:
        ``read(ids, seen=None)``: ids (B,), the token after those that ``cache`` holds, and seen (B, S) bool, true where
        a sequence may look, default everywhere -> the last, normalised hidden states (B, D).
    """
    arch = thinker.arch
    if arch.use_moe:

        def read_with_experts(ids: Tensor, seen: Tensor | None = None) -> Tensor:
            mask = None if seen is None else seen[:, None, None]
            return thinker.hidden_states(ids[:, None], cache=cache, mask=mask)[:, 0]

        return read_with_experts

    H, G, K, dtype = arch.n_heads, arch.n_kv_heads, arch.d_head, cache.keys.dtype
    layers = [_Layer(block, thinker, cache, index) for index, block in enumerate(thinker.layers)]
    last_norm = thinker.norm.weight.float()

    def read(ids: Tensor, seen: Tensor | None = None) -> Tensor:
        x, position = thinker.embed_tokens(ids), cache.position  # (B, D)
        B, end = len(x), position + 1
        if end > cache.max_len:
            raise ValueError(f"KV cache of {cache.max_len} tokens: {end} do not fit")
        for layer in layers:
            heads = F.linear(_rms(x).to(dtype), layer.qkv).view(B, H + 2 * G, K)
            qk = _rms(heads[:, : H + G])
            qk = torch.addcmul(qk * layer.cos[position], qk.roll(K // 2, dims=-1), layer.sin[position]).to(dtype)
            layer.keys[:, position] = qk[:, H:].reshape(B * G, K)
            layer.values[:, position] = heads[:, H + G :].reshape(B * G, K)
            q = qk[:, :H].reshape(B * G, H // G, K)
            scores = torch.bmm(q, layer.keys[:, :end].transpose(1, 2))  # (B * G, H / G, S)
            if seen is not None:
                scores = scores.view(B, H, end).masked_fill(~seen[:, None], -torch.inf).view(B * G, H // G, end)
            y = torch.bmm(scores.softmax(dim=-1, dtype=torch.float32).to(dtype), layer.values[:, :end])
            x = x + F.linear(y.view(B, H * K), layer.out)
            gate, up = F.linear(_rms(x).to(dtype), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        cache.advance(1)
        return (_rms(x) * last_norm).to(x.dtype)

    return read


def _rms(x: Tensor) -> Tensor:
    """RMSNorm without its weight, float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=RMS_EPS)
