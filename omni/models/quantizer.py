"""The residual vector quantiser of the speech codec, and the updates of its codebooks.

``forward`` chooses codes and, in training, collects the latents that chose each code. ``update`` then moves the
codebooks, once per optimizer update; the training loop calls it for stage D's script.
"""

# B clips, N latents of a clip, C latent width, Q codebooks of K codes, R latents of a batch that are not padding

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.common.numerics import true_float32

DEAD = 0.05  # a code used less than this share of the average is moved onto a latent


class ResidualQuantizer(nn.Module):
    """Each latent as a sum of one vector from each codebook, chosen one codebook after the other: codes (..., Q).

    Zeghidour et al. 2021, "SoundStream": each codebook quantises the residual of the ones before it. The codebooks are
    not parameters: they are exponential moving averages of the latents that choose them (van den Oord et al. 2017,
    appendix A.1). A code that hardly any latent chooses is moved onto one of the batch's latents (Dhariwal et al.
    2020, "Jukebox"). In training, some clips use only the first few codebooks ("quantizer dropout" of SoundStream),
    so that the first k of Q codebooks give a coarser approximation of the latents.

    Args:
        dropout: share of the clips that use fewer codebooks in training.
        decay: decay of the moving averages per optimizer update.
    """

    def __init__(self, codebooks: int, codebook_size: int, width: int, dropout: float, decay: float):
        super().__init__()
        self.dropout, self.decay = dropout, decay
        self.register_buffer("codebooks", torch.randn(codebooks, codebook_size, width))  # (Q, K, C)
        self.register_buffer("counts", torch.zeros(codebooks, codebook_size))  # (Q, K) moving average of choices
        self._step: dict[str, Tensor] = {}  # sums over this step's micro-batches; lost with a step given up

    def forward(self, latents: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            latents: (B, N, C) float32.
            mask: (B, N), true where there is a latent.

        Returns:
            The quantised latents (B, N, C), whose gradient goes to the latents unchanged (straight-through); codes
            (B, N, Q) int64; and the commitment loss, (), which pulls the latents to their quantised values.
        """
        Q, K, _ = self.codebooks.shape
        B = latents.shape[0]
        used = torch.full((B,), Q, device=latents.device)
        if self.training and self.dropout:
            fewer = torch.rand(B, device=latents.device) < self.dropout
            used = torch.where(fewer, torch.randint(1, Q + 1, (B,), device=latents.device), used)
        residual, quantised = latents, torch.zeros_like(latents)
        codes, commitment = [], latents.new_zeros(())
        found = []
        for level, codebook in enumerate(self.codebooks):
            chosen = nearest(residual.detach(), codebook)  # (B, N)
            vectors = F.embedding(chosen, codebook)  # (B, N, C)
            active = mask & (level < used)[:, None]  # (B, N)
            codes.append(chosen)
            commitment = commitment + masked_mean((residual - vectors).square(), active)
            if self.training:
                with torch.no_grad():
                    found.append(collect(residual, chosen, active, K))
            vectors = vectors * active[..., None]
            residual, quantised = residual - vectors, quantised + vectors
        if self.training:
            self._collect(*map(torch.stack, zip(*found, strict=True)))
        return latents + (quantised - latents).detach(), torch.stack(codes, dim=-1), commitment

    def _collect(self, counts: Tensor, sums: Tensor, samples: Tensor, drawn: Tensor) -> None:
        if not self._step:
            self._step = {"counts": counts, "sums": sums, "samples": samples, "drawn": drawn}
        else:
            self._step["counts"] = self._step["counts"] + counts
            self._step["sums"] = self._step["sums"] + sums

    @torch.no_grad()
    def update(self, ok: Tensor, sum_over_ranks: Callable[[Tensor], Tensor], is_main: bool) -> None:
        """Move the codebooks by the choices of the step's micro-batches, equally in every process.

        Args:
            ok: () 1.0, or 0.0 if the step's update was skipped, so that nothing moves.
        """
        step, self._step = self._step, {}
        batch_counts, sums = sum_over_ranks(step["counts"]), sum_over_ranks(step["sums"])
        samples = sum_over_ranks(step["samples"] * float(is_main))  # the first process's samples
        drawn = sum_over_ranks(step["drawn"] * float(is_main))  # (Q,) 0 where there were no latents to draw from
        counts = self.decay * self.counts + (1 - self.decay) * batch_counts
        weighted = self.decay * self.counts[..., None] * self.codebooks + (1 - self.decay) * sums
        average = counts.mean(dim=-1, keepdim=True)  # (Q, 1)
        dead = (counts < DEAD * average) & (drawn > 0)[:, None]
        codebooks = torch.where(dead[..., None], samples, weighted / counts.clamp(min=1e-12)[..., None])
        counts = torch.where(dead, average, counts)  # a moved code starts with the average count
        self.codebooks.copy_(torch.where(ok > 0, codebooks, self.codebooks))
        self.counts.copy_(torch.where(ok > 0, counts, self.counts))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., k) of the first k codebooks -> quantised latents (..., C)."""
        return sum(F.embedding(codes[..., level], self.codebooks[level]) for level in range(codes.shape[-1]))


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(..., C) and (K, C) -> (...) index of the closest row, in float32."""
    with true_float32(vectors.device):
        return (codebook.square().sum(dim=-1) - 2 * vectors @ codebook.T).argmin(dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, N, C) over all channels of the frames where ``mask`` (B, N) is true; 0 if there are none."""
    return (values * mask[..., None]).sum() / (mask.sum() * values.shape[-1]).clamp(min=1)


def collect(residual: Tensor, chosen: Tensor, active: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the choices of one codebook say about its K codes.

    Sums by a product with one-hot rows, not by index_add: the same bits in every run on a GPU.

    Args:
        residual: (B, N, C) latents; chosen: (B, N) their codes; active: (B, N), false for latents that do not count.

    Returns:
        counts (K,) and sums (K, C) of the latents that chose each code; K of the latents (K, C), at random with
        repetition, zeros if there are none; and () 1.0, or 0.0 if there are none.
    """
    if residual.device.type == "cpu":
        return _collect_rows(residual[active], chosen[active], K)
    return _collect_masked(residual.flatten(0, 1), chosen.flatten(), active.flatten(), K)


def _collect_rows(rows: Tensor, chosen: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``collect`` of latents (R, C) that all count: a GPU would have to wait for their number."""
    one_hot, R = F.one_hot(chosen, K).to(rows.dtype), len(rows)  # (R, K)
    samples = rows[torch.randint(R, (K,), device=rows.device)] if R else rows.new_zeros(K, rows.shape[1])
    return one_hot.sum(dim=0), one_hot.T @ rows, samples, rows.new_full((), float(R > 0))


def _collect_masked(rows: Tensor, chosen: Tensor, active: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``collect`` of latents (N, C), of which those count that ``active`` (N,) names; shapes depend on no value."""
    one_hot = F.one_hot(chosen, K).to(rows.dtype) * active[:, None]  # (N, K)
    rank = active.cumsum(dim=0)  # (N,) number of active latents up to each one
    total = rank[-1]
    wanted = (torch.rand(K, device=rows.device) * total).long().clamp(max=total - 1) + 1  # 1 to total
    samples = rows.index_select(0, torch.searchsorted(rank, wanted).clamp(max=len(rows) - 1))
    some = (total > 0).to(rows.dtype)
    return one_hot.sum(dim=0), one_hot.T @ rows, samples * some, some
