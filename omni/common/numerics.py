"""How exactly a device computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 matrices are made in float32, whatever autocast says and however coarse training is.

    On a GPU training's "float32" is TF32, whose 10 bits of mantissa make near distances and cosines equal: another
    row of a codebook would be the nearest one than on a CPU. For what is compared, and for what is kept.
    """
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        settings.fp32_precision = before
