"""The projections of an encoder's features to the Thinker's width."""

# K features of an encoder, D the Thinker's width, V vocabulary

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """Features of an encoder to the Thinker's width, (..., K) -> (..., D): norm, linear, GELU, linear.

    Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning" (LLaVA-1.5), with a norm before it. If the
    encoder gives probabilities of ``units`` of text, the units' embeddings, weighted by these, are added (Ma et al.
    2025, "LegoSLM: Connecting LLM with Speech Encoder using CTC Posteriors").

    Args:
        word_head: input width of a frozen head for the units' probabilities; 0: the encoder has its own.
        side: side of an image's square of positions, which have learnt ``position_embeddings``; 0: no image.
    """

    no_decay = ("position_embeddings",)

    def __init__(self, width: int, d_ff: int, d_model: int, units: int = 0, word_head: int = 0, side: int = 0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)
        self.units = nn.Parameter(torch.zeros(units, d_model)) if units else None
        self.word_head = nn.Linear(word_head, units).requires_grad_(False) if units and word_head else None
        self.position_embeddings = nn.Parameter(torch.zeros(side * side, d_model)) if side else None

    def forward(self, x: Tensor, unit_probs: Tensor | None = None) -> Tensor:
        """(..., K) and, if there are units, their probabilities (..., units) -> (..., D)."""
        y = self.fc2(F.gelu(self.fc1(self.norm(x))))
        if self.units is not None:
            y = y + unit_probs.to(y.dtype) @ self.units.to(y.dtype)
        return y if self.position_embeddings is None else y + self.position_embeddings.to(y.dtype)

    @torch.no_grad()
    def start_from_units(self, embeddings: Tensor) -> None:
        """Initialise with the units' embeddings (units, D) alone: the output resembles text from the first step on."""
        self.units.copy_(embeddings)
        self.fc2.weight.zero_()
        self.fc2.bias.zero_()

    @torch.no_grad()
    def start_from_positions(self, left: Tensor, right: Tensor, top: Tensor, bottom: Tensor) -> None:
        """Initialise positions with the embeddings (D,) of the words for their place, halved, since those of the units
        are added."""
        side = math.isqrt(len(self.position_embeddings))
        at = torch.linspace(0, 1, side, device=left.device)[:, None]  # from one edge to the other
        rows, columns = torch.lerp(top, bottom, at), torch.lerp(left, right, at)  # (side, D)
        self.position_embeddings.copy_((rows[:, None] + columns).flatten(0, 1) / 2)

    @torch.no_grad()
    def start_at_scale_of(self, embeddings: Tensor) -> None:
        """Scale the output of a new projection to the mean square of the token embeddings (V, D), on which the
        Thinker's layers were trained."""
        x = torch.randn(256, 1, self.norm.weight.shape[0], device=embeddings.device)
        factor = embeddings.square().mean().sqrt() / self(x).square().mean().sqrt()
        self.fc2.weight.mul_(factor)
        self.fc2.bias.mul_(factor)
