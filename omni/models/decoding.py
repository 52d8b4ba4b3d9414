"""The Thinker's computation for one new token and the talker's for one new frame, in half as many operations.

For one token, an operation's arithmetic takes far less than the microseconds of its launch. So the projections of
attention are one matrix here, and those into the MLP another; a norm's weight is multiplied into the matrix that reads
it, and those of queries and keys, with the attention's scale, into the rotation's cosines and sines.
"""

# B sequences, S tokens attended to, D model width, H query heads, G key/value heads, K head width
# Q codebooks, V codes in each, W width of the depth decoder

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.models.architectures import ThinkerArchitecture
from omni.models.layers import KVCache
from omni.models.ops import RMS_EPS


class ReadsOneByOne(nn.Module):
    """A model with ``layers`` of ``Block`` and a last ``norm`` that keeps its ``DecodeWeights`` from one answer to the
    next: outside its state and its copies, and not in training, where every step would make them stale."""

    decode_weights: "DecodeWeights | None" = None

    def train(self, mode: bool = True) -> "ReadsOneByOne":
        if mode:
            self.decode_weights = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"decode_weights": None}


class _Layer:
    """The matrices of one block."""

    def __init__(self, block, dtype: torch.dtype):
        attention, mlp = block.self_attn, block.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        self.qkv = _after_norm(qkv, block.input_layernorm.weight, dtype)
        self.gate_up, self.down = _mlp(mlp, block.post_attention_layernorm.weight, dtype)
        self.out = _transposed(attention.o_proj.weight, dtype)


class DecodeWeights:
    """A model's weights in the form in which ``blocks_step`` multiplies by them, for a cache of ``dtype``."""

    def __init__(self, model: ReadsOneByOne, arch: ThinkerArchitecture, dtype: torch.dtype):
        self.dtype = dtype
        self.layers = [_Layer(block, dtype) for block in model.layers]
        norms = [(block.self_attn.q_norm.weight, block.self_attn.k_norm.weight) for block in model.layers]
        shape = (arch.n_layers, arch.n_heads + arch.n_kv_heads, arch.d_head)
        self.cos_scale = torch.empty(shape, device=model.norm.weight.device)  # (layers, H + G, K)
        for scale, (q_norm, k_norm) in zip(self.cos_scale, norms, strict=True):
            scale[: arch.n_heads] = q_norm  # times sqrt(K) of the norm, over sqrt(K) of the attention
            scale[arch.n_heads :] = k_norm * arch.d_head**0.5
        self.sin_scale = self.cos_scale.roll(arch.d_head // 2, dims=-1)
        self.last_norm = model.norm.weight.float() * arch.d_model**0.5
        self.state = _state(model)
        # alive, so that no other weights get their addresses
        self.copied = [parameter.detach() for parameter in model.parameters()]

    @classmethod
    @torch.no_grad()
    def of(cls, model: ReadsOneByOne, arch: ThinkerArchitecture, dtype: torch.dtype) -> "DecodeWeights":
        """Those that ``model`` keeps, made anew if a weight has changed since, which takes as long as fifteen tokens
        at ``_tiny`` sizes. A write through ``.data`` goes unnoticed, as it counts as no change of the weight."""
        kept = model.decode_weights
        if kept is None or kept.dtype != dtype or kept.state is None or kept.state != _state(model):
            kept = model.decode_weights = cls(model, arch, dtype)
        return kept


class FrameWeights(DecodeWeights):
    """Those of a talker, with its depth decoder's."""

    def __init__(self, talker: ReadsOneByOne, arch: ThinkerArchitecture, dtype: torch.dtype):
        super().__init__(talker, arch, dtype)
        depth = talker.depth
        self.state_proj = _transposed(depth.state_proj.weight, dtype)
        self.levels = depth.embed_levels.weight.float()  # (Q, W)
        self.mlps = [_mlp(mlp, norm.weight, dtype) for norm, mlp in zip(depth.norms, depth.mlps, strict=True)]
        last_norm = depth.norm.weight.float() * depth.norm.weight.shape[0] ** 0.5
        self.heads = (depth.heads.float() * last_norm[:, None]).to(dtype).unbind()  # (W, V + 1) of each codebook
        self.embedded = depth.embed_codes.weight.float().unflatten(0, (depth.codebooks, -1)).unbind()  # (V, W) of each
        self.short = _short(self.levels.shape[1], self.levels.device)


def _state(model: nn.Module) -> list[tuple] | None:
    """Another value after each change of a weight; None for weights made in inference mode, which count no changes."""
    parameters = list(model.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        return None
    return [(parameter.device, parameter.data_ptr(), parameter._version) for parameter in parameters]


def decode_step(thinker: ReadsOneByOne, cache: KVCache) -> Callable[..., Tensor]:
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

    weights = DecodeWeights.of(thinker, arch, cache.keys.dtype)
    read = blocks_step(weights, arch, cache, thinker.rope_cos, thinker.rope_sin)
    return lambda ids, seen=None: read(thinker.embed_tokens(ids), seen)


def blocks_step(
    weights: DecodeWeights, arch: ThinkerArchitecture, cache: KVCache, rope_cos: Tensor, rope_sin: Tensor
) -> Callable[..., Tensor]:
    """As ``decode_step``, of the layers alone: ``read(x, seen=None)``, x (B, D).

    Args:
        rope_cos, rope_sin: (max_len, K).
    """
    H, G, K, dtype = arch.n_heads, arch.n_kv_heads, arch.d_head, cache.keys.dtype
    keys, values = cache.keys.flatten(1, 2), cache.values.flatten(1, 2)  # (layers, B * G, max_len, K)
    short, short_head = (_short(width, keys.device) for width in (arch.d_model, K))

    def read(x: Tensor, seen: Tensor | None = None) -> Tensor:
        position = cache.position
        B, end = len(x), position + 1
        if end > cache.max_len:
            raise ValueError(f"KV cache of {cache.max_len} tokens: {end} do not fit")
        # views for all layers at once, as each takes a microsecond or two
        cos = (rope_cos[position].float() * weights.cos_scale).unbind()
        sin = (rope_sin[position].float() * weights.sin_scale).unbind()
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
            x = x + _gated(x, layer.gate_up, layer.down, short)
        cache.advance(1)
        return (_over_length(x, short) * weights.last_norm).to(x.dtype)

    return read


def write_frame(weights: FrameWeights, state: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The codes (B, Q) of one frame, equal to the choices by ``DepthDecoder`` up to rounding.

    Args:
        state: (B, D), the last, normalised hidden state.
        choose: (logits (B, V + 1), level) -> codes (B,) in 0 ... V - 1. The last logit is of the utterance's end at
            level 0, and means nothing at the others.
    """
    # (B, W) of each codebook: the frame's state, to which the codes before it are added
    projected = torch.mm(state.to(weights.dtype), weights.state_proj).float()
    starts = (projected[:, None] + weights.levels).unbind(dim=1)
    before, codes = None, []
    for level, (start, head, embedded) in enumerate(zip(starts, weights.heads, weights.embedded, strict=True)):
        x = start if before is None else start + before
        for gate_up, down in weights.mlps:
            x = x + _gated(x, gate_up, down, weights.short)
        code = choose(torch.mm(_over_length(x, weights.short).to(weights.dtype), head), level)
        codes.append(code)
        found = F.embedding(code, embedded)
        before = found if before is None else before + found
    return torch.stack(codes, dim=-1)


def _gated(x: Tensor, gate_up: Tensor, down: Tensor, short: Tensor) -> Tensor:
    gate, up = torch.mm(_over_length(x, short).to(gate_up.dtype), gate_up).chunk(2, dim=-1)
    return torch.mm(F.silu(gate) * up, down)


def _mlp(mlp, norm: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two matrices of ``_gated``, from a SwiGLU and the weight of the norm before it."""
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    return _after_norm(gate_up, norm, dtype), _transposed(mlp.down_proj.weight, dtype)


def _after_norm(weight: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix for what ``_over_length`` leaves of a norm."""
    return _transposed(weight.float() * norm.float() * weight.shape[1] ** 0.5, dtype)


def _short(width: int, device: torch.device) -> Tensor:
    """The length whose square is the norm's epsilon times the width."""
    return torch.tensor((width * RMS_EPS) ** 0.5, device=device)


def _transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Transposed in memory: a vector times such a matrix takes half as long."""
    return weight.t().to(dtype).contiguous()


def _over_length(x: Tensor, short: Tensor) -> Tensor:
    """RMSNorm over sqrt(its width), float32: x / sqrt(sum(x^2) + short^2), three operations instead of six."""
    x = x.float()
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), short)
