"""Numerical precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Compute products of float32 matrices in full float32, regardless of autocast and TF32.

    On a GPU "float32" products in training are TF32, whose 10 bits of mantissa make close distances or cosines equal: a
    GPU would choose another nearest codebook row than a CPU. Use it where values are compared or stored.
    """
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        settings.fp32_precision = before
