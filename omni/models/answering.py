"""Greedy answers to several prompts at once, and the likelihood of several answers to one prompt."""

# B prompts, T positions, D the Thinker's width; N answers, L tokens of one

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omni.data.tokenizer import IGNORE_INDEX
from omni.models.decoding import decode_step
from omni.models.layers import KVCache
from omni.models.thinker import LOSS_CHUNK, Thinker

ANSWERS_TOGETHER = 16  # whose likelihoods are computed at once


@torch.no_grad()
def greedy_answers(
    thinker: Thinker, embeds: Tensor, prompts: Tensor, max_new_tokens: int, stop_ids: tuple[int, ...]
) -> list[list]:
    """The greedy answer to each of several prompts, as ``Thinker.generate`` yields it for one prompt.

    Args:
        embeds: (B, T, D); only the first ``prompts`` (B,) positions of each row, at least 1, are read.

    Returns:
        B lists of ids, the stop ids left out.
    """
    room = thinker.architecture.ctx_len - max_new_tokens
    together = (prompts <= room).nonzero().flatten().tolist()
    # an answer whose prompt leaves less room ends at ctx_len, so its row is computed alone
    groups = [([row], thinker.architecture.ctx_len - int(prompts[row])) for row in range(len(prompts))]
    groups = [group for group in groups if group[0][0] not in together]
    groups += [(together, max_new_tokens)] if together else []
    found: list[list] = [[] for _ in range(len(prompts))]
    for rows, limit in groups:
        for row, ids in zip(rows, _answers(thinker, embeds[rows], prompts[rows], limit, stop_ids), strict=True):
            found[row] = ids
    return found


def _answers(thinker: Thinker, embeds: Tensor, prompts: Tensor, limit: int, stop_ids: tuple[int, ...]) -> list[list]:
    """Prompts of unequal length are padded on the left, so that they end together. That shifts the positions of a whole
    row, which does not change rotary attention, since it depends on distances only."""
    B, longest, device = len(prompts), int(prompts.max()), embeds.device
    index = torch.arange(longest, device=device) - (longest - prompts)[:, None]  # (B, longest); negative: padding
    there = index >= 0
    x = embeds.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, embeds.shape[2]))
    # padding attends to itself, since a softmax over nothing is nan
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    mask = (causal & there[:, None, :]) | torch.eye(longest, dtype=torch.bool, device=device)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
    cache = KVCache(thinker.architecture, B, longest + limit, device, dtype)
    hidden = thinker.hidden_states(inputs_embeds=x, cache=cache, mask=mask[:, None])[:, -1]  # (B, D)
    read = decode_step(thinker, cache)
    stops = torch.tensor(stop_ids, device=device)
    ended, written = torch.zeros(B, dtype=torch.bool, device=device), []
    for _ in range(limit):
        ids = thinker.head(hidden).float().argmax(dim=-1)  # (B,)
        ended = ended | torch.isin(ids, stops)
        if ended.all():
            break
        written.append(ids.masked_fill(ended, stop_ids[0]))
        there = F.pad(there, (0, 1), value=True)
        hidden = read(ids, there)
    rows = torch.stack(written, dim=1).tolist() if written else [[]] * B
    return [row[: next((i for i, token in enumerate(row) if token in stop_ids), len(row))] for row in rows]


@torch.no_grad()
def answer_nats(thinker: Thinker, prompt: Tensor, answers: Sequence[Sequence[int]]) -> list[float]:
    """Nats per token of each answer to one prompt. Tokens beyond ``ctx_len`` do not count.

    Args:
        prompt: (T, D) embeddings, at least one; read once for all answers.
        answers: N lists of ids, at least one id each, with their stop ids.
    """
    device, T, arch = prompt.device, len(prompt), thinker.architecture
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else prompt.dtype
    read = KVCache(arch, 1, T, device, dtype)
    last = thinker.hidden_states(inputs_embeds=prompt[None], cache=read)[:, -1:]  # (1, 1, D)
    found: list[float] = []
    for start in range(0, len(answers), ANSWERS_TOGETHER):
        some = [torch.tensor(ids[: arch.ctx_len - T + 1]) for ids in answers[start : start + ANSWERS_TOGETHER]]
        targets = pad_sequence(some, batch_first=True, padding_value=IGNORE_INDEX).to(device)  # (N, L)
        N, L = targets.shape
        hidden = last.expand(N, -1, -1)
        if L > 1:  # the state before each token; those after padding have no target
            inputs = targets[:, :-1].clamp(min=0)
            later = thinker.hidden_states(inputs, cache=read.repeated(arch, N, T + L - 1))
            hidden = torch.cat([hidden.to(later.dtype), later], dim=1)
        parts = zip(hidden.flatten(0, 1).split(LOSS_CHUNK), targets.flatten().split(LOSS_CHUNK), strict=True)
        nats = torch.cat([
            F.cross_entropy(thinker.head(states).float(), ids, ignore_index=IGNORE_INDEX, reduction="none")
            for states, ids in parts
        ])  # fmt: skip
        found += (nats.view(N, L).sum(dim=1) / (targets != IGNORE_INDEX).sum(dim=1)).tolist()
    return found
