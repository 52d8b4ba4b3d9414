"""AdamW with decay on matrices only, and a learning rate that is a pure function of the step."""

import math

import torch
from torch import nn


def build_adamw(module: nn.Module, *, lr: float, wd: float, betas: tuple[float, float] = (0.9, 0.95)):
    """AdamW (Loshchilov & Hutter 2019), one fused kernel per group.

    Weight decay applies to matrices and higher; gains, biases and other vectors are left alone, since pulling a
    normalisation gain towards zero is no regulariser.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": wd},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # fused also understands `found_inf`: it skips an update on the device, without telling the host
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


def warmup_cosine(step: int, *, peak: float, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """Learning rate for update number ``step`` (from 0): linear warm-up, then half a cosine to ``min_ratio * peak``.

    A function of the step alone has no state to restore: a resumed run is at the right rate by construction.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
