"""The Thinker: a decoder-only language model, exactly Qwen3 or, with experts, Qwen3-MoE."""

# B batch, T new tokens, D model width, V vocabulary, E experts

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni.data.tokenizer import IGNORE_INDEX
from omni.models.architectures import ThinkerArchitecture
from omni.models.decoding import ReadsOneByOne, decode_step
from omni.models.layers import Attention, KVCache, MoE, RMSNorm, SwiGLU, load_balancing_loss, rope_tables
from omni.models.ops import RMS_EPS, round_up
from omni.models.packing import Packing

INIT_STD = 0.02
LOSS_CHUNK = 8192  # tokens whose logits are in memory at a time


class Block(nn.Module):
    """One pre-norm layer: attention, then MLP or experts, each added to the residual stream (B, T, D)."""

    def __init__(self, arch: ThinkerArchitecture, layer: int, use_flash: bool):
        super().__init__()
        self.dropout = arch.dropout
        self.input_layernorm = RMSNorm(arch.d_model)
        self.self_attn = Attention(arch, layer, use_flash)
        self.post_attention_layernorm = RMSNorm(arch.d_model)
        self.mlp = MoE(arch) if arch.use_moe else SwiGLU(arch.d_model, arch.d_ff)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        mask: Tensor | None,
        packing: Packing | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the new residual stream, with ``at`` (N,) at these of its B * T positions only, (1, N, D); and the
        router's statistics (2, E), None without experts."""
        y = self.self_attn(self.input_layernorm(x), cos, sin, cache, mask, packing)
        if at is not None:
            x, y = _only(x, at), _only(y, at)
        x = x + F.dropout(y, self.dropout, self.training)
        y, router_stats = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MoE):
            y, router_stats = self.mlp(y)
        else:
            y = self.mlp(y)
        return x + F.dropout(y, self.dropout, self.training), router_stats


class Thinker(ReadsOneByOne):
    """Qwen3 (technical report, 2025): pre-norm blocks, then a norm and the output head. No biases.

    Departures: none in evaluation. In training, dropout on the two residual branches of a block, off by default.

    Args:
        architecture: its ``vocab_size`` is the tokenizer's real one.
        use_flash: fused attention; False: the plain maths, for comparison or hardware without it.
    """

    def __init__(self, architecture: ThinkerArchitecture, *, use_flash: bool = True):
        super().__init__()
        self.architecture = arch = architecture
        self.embed_tokens = nn.Embedding(arch.vocab_size, arch.d_model)
        self.layers = nn.ModuleList(Block(arch, layer, use_flash) for layer in range(arch.n_layers))
        self.norm = RMSNorm(arch.d_model)
        self.lm_head = None if arch.tie_embeddings else nn.Linear(arch.d_model, arch.vocab_size, bias=False)
        # not part of a checkpoint, since it depends on the sizes alone: ctx_len can change for the same weights
        cos, sin = rope_tables(arch.ctx_len, arch.d_head, arch.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)  # (ctx_len, K)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal with std 0.02, divided by sqrt(2 n_layers) for weights that write into the residual stream, so that
        its variance does not grow with depth (Radford et al. 2019, GPT-2)."""
        residual_std = INIT_STD / (2 * self.architecture.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                writes_residual = "o_proj" in name or "down_proj" in name
                nn.init.normal_(parameter, std=residual_std if writes_residual else INIT_STD)

    def forward(
        self,
        token_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        target_at: Tensor | None = None,
        reduction: str = "mean",
        cache: KVCache | None = None,
        packing: Packing | None = None,
        return_hidden: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the token after each position; with ``targets`` the training losses instead.

        Training calls the module, ``model(token_ids, targets=targets)``, since ``torch.compile`` and DDP wrap it.

        Args:
            token_ids: (B, T); or else
            inputs_embeds: (B, T, D), embeddings of any modality.
            targets: (B, T), and ``reduction``: see ``loss``, whose pair of results is then returned.
            weights: (B, T), weight of each target; default: 1.
            target_at: (N,) indices among the B * T positions of all that have a target, filled up with -1: only there
                are logits and the last block's MLP computed. Default: found on a CPU; all positions on a GPU, which
                would have to wait for them.
            cache: cache of the tokens before; the new tokens are added.
            packing: with ``targets``: rows of several lengths, of which the embeddings (1, N, D) and targets consist.
            return_hidden: also return the head's input.

        Returns:
            logits (B, T, V), in autocast's dtype under autocast; with ``return_hidden`` a pair with hidden (B, T, D).
        """
        if targets is None:
            hidden, _ = self._hidden(token_ids, inputs_embeds, cache)
            logits = self.head(hidden)
            return (logits, hidden) if return_hidden else logits
        weights = (targets != IGNORE_INDEX).float() * (1.0 if weights is None else weights)
        targets, weights, at = targets.flatten(), weights.flatten(), None
        if target_at is None and targets.device.type == "cpu" and not torch.compiler.is_compiling():
            target_at = _target_at(targets)
        if target_at is not None:
            at = target_at.clamp(min=0)
            targets, weights = targets.index_select(0, at), weights.index_select(0, at) * (target_at >= 0)
        hidden, router_stats = self._hidden(token_ids, inputs_embeds, cache, packing=packing, at=at)
        aux = load_balancing_loss(router_stats) if router_stats else hidden.new_zeros((), dtype=torch.float32)
        return self._cross_entropy(hidden.flatten(0, 1), targets, weights, reduction), aux

    def hidden_states(
        self,
        token_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As ``forward``, without the output head: the last, normalised hidden states (B, T, D).

        Args:
            mask: (B, 1, T, S) bool, true where a query may attend; default: to itself and all before it.
        """
        return self._hidden(token_ids, inputs_embeds, cache, mask)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        return F.linear(hidden, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def _hidden(
        self,
        token_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: KVCache | None,
        mask: Tensor | None = None,
        packing: Packing | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The last, normalised hidden states (B, T, D), with ``at`` (N,) only these of them, (1, N, D); and each
        block's router statistics."""
        if (token_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either token_ids or inputs_embeds")
        x = self.embed_tokens(token_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        T = x.shape[1] if packing is None else packing.longest
        start = 0 if cache is None else cache.position
        if start + T > self.architecture.ctx_len:
            raise ValueError(f"{start + T} tokens do not fit into ctx_len {self.architecture.ctx_len}")
        cos, sin = self.rope_cos[start : start + T], self.rope_sin[start : start + T]
        if mask is None and start > 0 and T > 1:
            positions = torch.arange(start + T, device=x.device)
            mask = positions <= positions[start:, None]  # (T, start + T)
        router_stats, early = [], at is not None and not self.architecture.use_moe
        for block in self.layers:
            x, stats = block(x, cos, sin, cache, mask, packing, at if early and block is self.layers[-1] else None)
            if stats is not None:
                router_stats.append(stats)
        if cache is not None:
            cache.advance(T)
        if at is not None and not early:  # experts are balanced over all positions
            x = _only(x, at)
        return self.norm(x), router_stats

    def loss(
        self,
        token_ids: Tensor | None,
        targets: Tensor,
        reduction: str = "mean",
        *,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the targets, and the experts' load-balancing loss.

        Args:
            token_ids: (B, T), or None when ``inputs_embeds`` (B, T, D) is given.
            targets: (B, T), the token that follows each position; -100 is ignored.
            reduction: "mean" over the targets that are not ignored (0 if there are none), or "sum", in nats.

        Returns:
            two () float32 tensors. The second is not weighted yet (``router_aux_loss_coef``); 0 without experts.
        """
        # through __call__, so that a model compiled in place also compiles the loss
        return self(token_ids, inputs_embeds=inputs_embeds, targets=targets, reduction=reduction)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, weights: Tensor, reduction: str) -> Tensor:
        """Of ``targets`` (N,) with ``weights`` (N,), given ``hidden`` (N, D)."""
        if reduction not in ("mean", "sum"):
            raise ValueError(f'expected reduction "mean" or "sum", found {reduction!r}')
        nats = 0.0
        for part in zip(*(tensor.split(LOSS_CHUNK) for tensor in (hidden, targets, weights)), strict=True):
            if len(part[0]) < len(hidden) and torch.is_grad_enabled():
                # recomputed in the backward: float32 logits of a large batch are a step's largest tensor
                nats = nats + checkpoint(self._nats, *part, use_reentrant=False, preserve_rng_state=False)
            else:
                nats = nats + self._nats(*part)
        return nats / weights.sum().clamp(min=1e-6) if reduction == "mean" else nats

    def _nats(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        nats = F.cross_entropy(self.head(hidden).float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
        return (nats * weights).sum()

    def generate(
        self,
        prompt_ids: Sequence[int] = (),
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
        inputs_embeds: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Iterator[int]:
        """Yield the ids that follow ``prompt_ids``, each as soon as it is known.

        Ends before a stop id, after ``max_new_tokens``, or when prompt and answer fill ``ctx_len``. The model is in
        evaluation mode until the generator ends or is closed. The global random state is not used.

        Args:
            prompt_ids: at least one id, at most ``ctx_len``.
            temperature: 0 takes the likeliest token; above 0, the logits are divided by it and a token is drawn.
            top_k: draw from the k likeliest only.
            top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2019).
            seed: the same seed gives the same answer; None: a new one each time.
            inputs_embeds: (1, T, D), a prompt of any modality, instead of ``prompt_ids``.
            states: list to which the hidden state (D,) of each yielded id is appended, once the next id is computed.
        """
        prompt_length = len(prompt_ids) if inputs_embeds is None else inputs_embeds.shape[1]
        if not 0 < prompt_length <= self.architecture.ctx_len:
            raise ValueError(f"expected a prompt of 1 to {self.architecture.ctx_len} tokens, found {prompt_length}")
        device = self.embed_tokens.weight.device
        generator = torch.Generator(device=device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        max_new_tokens = min(max_new_tokens, self.architecture.ctx_len - prompt_length)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.embed_tokens.weight.dtype
        cache = KVCache(self.architecture, 1, prompt_length + max_new_tokens, device, dtype)
        was_training = self.training
        self.eval()
        try:
            prompt = None if inputs_embeds is not None else torch.tensor([list(prompt_ids)], device=device)
            read, next_id = decode_step(self, cache), None
            for _ in range(max_new_tokens):
                with torch.inference_mode():  # not around the yield: the caller's code would run in it
                    if next_id is None:
                        hidden = self.hidden_states(prompt, inputs_embeds=inputs_embeds, cache=cache)[0, -1]  # (D,)
                    else:
                        hidden = read(torch.tensor([next_id], device=device))[0]
                        if states is not None:
                            states.append(hidden)
                    next_id = self._choose(hidden, temperature, top_k, top_p, generator)
                if next_id in stop_ids:
                    return
                yield next_id
        finally:
            self.train(was_training)

    def _choose(
        self, hidden: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
    ) -> int:
        logits = self.head(hidden).float()  # (V,)
        if temperature == 0:
            return int(logits.argmax())
        probabilities = _probabilities(logits / temperature, top_k, top_p)
        return int(torch.multinomial(probabilities, 1, generator=generator))


def _only(x: Tensor, at: Tensor) -> Tensor:
    """x (B, T, D) at ``at`` (N,) of its B * T positions: (1, N, D)."""
    return x.flatten(0, 1).index_select(0, at)[None]


def _target_at(targets: Tensor) -> Tensor:
    """The indices of all ``targets`` (N,) that are not ignored, filled up with -1."""
    counted = (targets != IGNORE_INDEX).nonzero().flatten()
    return F.pad(counted, (0, round_up(len(counted), 64) - len(counted)), value=-1)


def _probabilities(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """(V,) logits -> (V,) probabilities, 0 for tokens that ``top_k`` and then ``top_p`` exclude."""
    if top_k is not None and top_k < logits.shape[0]:
        values, kept = logits.topk(top_k)  # by index, not by threshold: ties must not widen the choice
        logits = torch.full_like(logits, -torch.inf).scatter(0, kept, values)
    probabilities = logits.softmax(dim=0)
    if top_p is not None and top_p < 1:
        likeliest, order = probabilities.sort(descending=True, stable=True)
        before = likeliest.cumsum(dim=0) - likeliest  # the likeliest has 0 before it, so it always stays
        probabilities = torch.zeros_like(probabilities).scatter(0, order, likeliest.where(before < top_p, 0))
    return probabilities  # multinomial scales them to sum to 1


def to_qwen3_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Thinker's weights under the names of ``Qwen3ForCausalLM`` or ``Qwen3MoeForCausalLM``.

    Experts are unstacked, one entry per matrix, as in Qwen3-MoE's published files, which every reader expects.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        target = name if name.startswith("lm_head.") else f"model.{name}"
        if target.endswith("experts.gate_up_proj"):
            stem = target.removesuffix("gate_up_proj")
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                renamed[f"{stem}{expert}.gate_proj.weight"] = gate.contiguous()
                renamed[f"{stem}{expert}.up_proj.weight"] = up.contiguous()
        elif target.endswith("experts.down_proj"):
            stem = target.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                renamed[f"{stem}{expert}.down_proj.weight"] = down.contiguous()
        else:
            renamed[target] = tensor
    return renamed


def qwen3_config(arch: ThinkerArchitecture, vocab_size: int, eos_id: int) -> dict:
    """The ``config.json`` with which ``transformers`` opens the exported Thinker."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if arch.use_moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if arch.use_moe else "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": arch.d_model,
        "intermediate_size": arch.d_ff,
        "num_hidden_layers": arch.n_layers,
        "num_attention_heads": arch.n_heads,
        "num_key_value_heads": arch.n_kv_heads,
        "head_dim": arch.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": arch.ctx_len,
        "initializer_range": INIT_STD,
        "rms_norm_eps": RMS_EPS,
        "rope_theta": arch.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": arch.tie_embeddings,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "dtype": "float32",
    }
    if arch.use_moe:
        config |= {
            "num_experts": arch.num_experts,
            "num_experts_per_tok": arch.num_experts_per_tok,
            "moe_intermediate_size": arch.d_expert,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": arch.router_aux_loss_coef,
            "output_router_logits": False,
        }
    return config
