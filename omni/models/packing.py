"""Rows of different lengths, laid end to end: what is done position by position needs no padding then."""

# R rows, N positions of all rows, P positions with padding, W width; a group of rows has its own length T

import torch
from torch import Tensor

from omni.models.ops import first_derivative_only, round_up

ROWS_TOGETHER = 8  # rows that attention pads to one length
STEP = 64  # N is rounded up to its multiples


class Packing:
    """Where the positions of ``lengths`` (R,), each at least 1, lie in a packed sequence (1, N, W).

    The rows follow each other from the shortest to the longest, so that those of similar length attend together, padded
    to the longest of their group. Positions after the last row are padding, too: N is rounded up, see ``round_up``.
    Experts, which are balanced over all positions, see that padding as well.

    On a GPU the host would have to wait for the lengths.
    """

    def __init__(self, lengths: Tensor, width: int):
        """``width``: positions of each padded row, at least the longest's."""
        order = lengths.argsort(stable=True)
        self.lengths = lengths[order]
        ends = self.lengths.cumsum(dim=0)
        self.n_used = int(ends[-1])
        self.n = round_up(self.n_used, STEP)
        rows = torch.repeat_interleave(self.lengths)  # (n_used,) of each position
        steps = torch.arange(self.n_used) - (ends - self.lengths)[rows]
        self.source = order[rows] * width + steps  # (n_used,) in the padded rows (R, width) before packing
        self.groups, padded, start = [], [], 0  # [(rows, T)]
        for group in self.lengths.split(ROWS_TOGETHER):
            T = min(round_up(int(group[-1])), width)
            self.groups.append((len(group), T))
            padded.append(start + torch.arange(len(group)).repeat_interleave(group) * T)
            start += len(group) * T
        self.places = torch.cat(padded) + steps  # (n_used,) in the groups, one after the other (P,)
        self.n_padded, self.longest = start, self.groups[-1][1]

    def pack(self, rows: Tensor, padding: float = 0) -> Tensor:
        """(R, width, ...) -> (1, N, ...)."""
        packed = rows.flatten(0, 1).index_select(0, self.source)
        rest = packed.new_full((self.n - self.n_used, *packed.shape[1:]), padding)
        return torch.cat((packed, rest))[None]

    def split(self, packed: Tensor) -> list[Tensor]:
        """(1, N, W) -> (rows, T, W) of each group, with zeros where a row has ended."""
        padded = packed.new_zeros(self.n_padded, packed.shape[2])
        padded = padded.index_copy(0, self.places, packed[0, : self.n_used])
        parts = padded.split([rows * T for rows, T in self.groups])
        return [part.view(rows, T, -1) for part, (rows, T) in zip(parts, self.groups, strict=True)]

    def join(self, groups: list[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        packed = _Collect.apply(torch.cat([group.flatten(0, 1) for group in groups]), self.places)
        return torch.cat((packed, packed.new_zeros(self.n - self.n_used, packed.shape[1])))[None]


class _Collect(torch.autograd.Function):
    """The rows (n, W) that stand in the ``places`` (n,), all different: their gradients are copied, not added up."""

    @staticmethod
    def forward(ctx, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        places = ctx.saved_tensors[0]
        return grad.new_zeros(ctx.size, grad.shape[1]).index_copy_(0, places, grad), None
