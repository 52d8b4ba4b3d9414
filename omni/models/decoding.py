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
    """The matrices of one block."""

    def __init__(self, block, dtype: torch.dtype):
        attention, mlp = block.self_attn, block.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        width = qkv.shape[1] ** 0.5  # see _over_length
        # transposed in memory: a vector times such a matrix takes half as long
        self.qkv = _transposed(qkv.float() * block.input_layernorm.weight.float() * width, dtype)
        self.gate_up = _transposed(gate_up.float() * block.post_attention_layernorm.weight.float() * width, dtype)
        self.out, self.down = _transposed(attention.o_proj.weight, dtype), _transposed(mlp.down_proj.weight, dtype)


class DecodeWeights:
    """A Thinker's weights in the form in which ``decode_step`` multiplies by them, for a cache of ``dtype``."""

    def __init__(self, thinker, dtype: torch.dtype):
        arch, self.dtype = thinker.architecture, dtype
        self.layers = [_Layer(block, dtype) for block in thinker.layers]
        norms = [(block.self_attn.q_norm.weight, block.self_attn.k_norm.weight) for block in thinker.layers]
        shape = (arch.n_layers, arch.n_heads + arch.n_kv_heads, arch.d_head)
        self.cos_scale = torch.empty(shape, device=thinker.norm.weight.device)  # (layers, H + G, K)
        for scale, (q_norm, k_norm) in zip(self.cos_scale, norms, strict=True):
            scale[: arch.n_heads] = q_norm  # times sqrt(K) of the norm, over sqrt(K) of the attention
            scale[arch.n_heads :] = k_norm * arch.d_head**0.5
        self.sin_scale = self.cos_scale.roll(arch.d_head // 2, dims=-1)
        self.last_norm = thinker.norm.weight.float() * arch.d_model**0.5
        self.state = _state(thinker)
        # alive, so that no other weights get their addresses
        self.copied = [parameter.detach() for parameter in thinker.parameters()]

    @classmethod
    def of(cls, thinker, dtype: torch.dtype) -> "DecodeWeights":
        """Those that ``thinker`` keeps, made anew if a weight has changed since, which takes as long as fifteen tokens
        at ``_tiny`` sizes. A write through ``.data`` goes unnoticed, as it counts as no change of the weight."""
        kept = thinker.decode_weights
        if kept is None or kept.dtype != dtype or kept.state is None or kept.state != _state(thinker):
            kept = thinker.decode_weights = cls(thinker, dtype)
        return kept


def _state(thinker) -> list[tuple] | None:
    """Another value after each change of a weight; None for weights made in inference mode, which count no changes."""
    parameters = list(thinker.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        return None
    return [(parameter.device, parameter.data_ptr(), parameter._version) for parameter in parameters]


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
    weights = DecodeWeights.of(thinker, dtype)
    keys, values = cache.keys.flatten(1, 2), cache.values.flatten(1, 2)  # (layers, B * G, max_len, K)
    # lengths whose squares are the norms' epsilon times the width
    short, short_head = (torch.tensor((width * RMS_EPS) ** 0.5, device=keys.device) for width in (arch.d_model, K))

    def read(ids: Tensor, seen: Tensor | None = None) -> Tensor:
        x, position = thinker.embed_tokens(ids), cache.position  # (B, D)
        B, end = len(x), position + 1
        if end > cache.max_len:
            raise ValueError(f"KV cache of {cache.max_len} tokens: {end} do not fit")
        # views for all layers at once, as each takes a microsecond or two
        cos = (thinker.rope_cos[position].float() * weights.cos_scale).unbind()
        sin = (thinker.rope_sin[position].float() * weights.sin_scale).unbind()
        key, value = keys[:, :, position].unbind(), values[:, :, position].unbind()
        all_keys, all_values = keys[:, :, :end].transpose(2, 3).unbind(), values[:, :, :end].unbind()
        for n, layer in enumerate(weights.layers):
            heads = torch.mm(_over_length(x, short).to(dtype), layer.qkv).view(B, H + 2 * G, K)
            qk = _over_length(heads[:, : H + G], short_head)
            qk = torch.addcmul(qk * cos[n], qk.roll(K // 2, dims=-1), sin[n]).to(dtype)
            key[n].copy_(qk[:, H:].reshape(B * G, K))
            value[n].copy_(heads[:, H + G :].reshape(B * G, K))
            q = qk[:, :H].reshape(B * G, H // G, K)
            scores = torch.bmm(q, all_keys[n])  # (B * G, H / G, S)
            if seen is not None:
                scores = scores.view(B, H, end).masked_fill(~seen[:, None], -torch.inf).view(B * G, H // G, end)
            y = torch.bmm(scores.softmax(dim=-1, dtype=torch.float32).to(dtype), all_values[n])
            x = x + torch.mm(y.view(B, H * K), layer.out)
            gate, up = torch.mm(_over_length(x, short).to(dtype), layer.gate_up).chunk(2, dim=-1)
            x = x + torch.mm(F.silu(gate) * up, layer.down)
        cache.advance(1)
        return (_over_length(x, short) * weights.last_norm).to(x.dtype)

    return read


def _transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.t().to(dtype).contiguous()


def _over_length(x: Tensor, short: Tensor) -> Tensor:
    """RMSNorm over sqrt(its width), float32: x / sqrt(sum(x^2) + short^2), three operations instead of six."""
    x = x.float()
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), short)
