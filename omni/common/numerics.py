"""Weights and their precision."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Compute products and convolutions of float32 tensors in full float32, regardless of autocast and TF32.

    On a GPU "float32" products in training are TF32, whose 10 bits of mantissa make close distances or cosines equal: a
    GPU would choose another nearest codebook row than a CPU. Use it where values are compared or stored.
    """
    # of cuDNN both, as its setting for the two together can be read only while they agree
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def weights_sha256(module: nn.Module) -> str:
    """Hex digest of the names, types, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
