"""AdamW, Muon, and a learning rate that is a pure function of the step."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from omni.common.errors import UserError
from omni.train.config import StageConfig
from omni.train.device import computes_in_bf16


def build_optimizer(
    module: nn.Module, config: StageConfig, *, lr: float | None = None, betas: tuple[float, float] = (0.9, 0.95)
) -> "torch.optim.AdamW | Muon":
    """The config's ``optimizer`` for all trainable parameters; ``lr`` overrides the config's."""
    build = {"adamw": build_adamw, "muon": Muon}[config.optimizer]
    return build(module, lr=config.lr if lr is None else lr, wd=config.wd, betas=betas)


def build_adamw(module: nn.Module, *, lr: float, wd: float, betas: tuple[float, float] = (0.9, 0.95)):
    """AdamW (Loshchilov & Hutter 2019), one fused kernel per group."""
    return _adamw(module, [parameter for parameter in module.parameters() if parameter.requires_grad], lr, wd, betas)


def _adamw(
    module: nn.Module, parameters: list[nn.Parameter], lr: float, wd: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    decayed = {id(parameter) for parameter in decayed_parameters(module)}
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": wd},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    # fused also reads `found_inf` and skips an update on the device, so that the host need not wait
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


def decayed_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters under weight decay: kernels and embedding tables.

    Gains, biases and position embeddings are excluded, whatever their shape: pulling them towards zero is no
    regulariser. A layer lists those that are not vectors in ``no_decay``; gains of weight norm are known by their name.
    """
    return [
        parameter
        for layer in module.modules()
        for name, parameter in layer._parameters.items()
        if parameter is not None and parameter.ndim >= 2 and name not in ("original0", *getattr(layer, "no_decay", ()))
    ]


class Muon:
    """Muon for the kernels of linear layers and convolutions, AdamW for the rest, as one optimizer.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". AdamW updates embeddings, vectors,
    grouped convolutions and experts. Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, "Muon is
    Scalable for LLM Training"), so that one learning rate serves both.
    """

    def __init__(self, module: nn.Module, *, lr: float, wd: float, betas: tuple[float, float] = (0.9, 0.95)):
        kernels = hidden_kernels(module)
        ids = {id(kernel) for kernel in kernels}
        others = [p for p in module.parameters() if p.requires_grad and id(p) not in ids]
        self.parts = [OrthogonalUpdates(kernels, lr, wd)] if kernels else []
        self.parts += [_adamw(module, others, lr, wd, betas)] if others else []
        self.found_inf: Tensor | None = None  # 1.0 on the device: the step changes nothing

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.found_inf = self.found_inf
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def hidden_kernels(module: nn.Module) -> list[nn.Parameter]:
    """The trainable kernels of linear layers and of convolutions without groups; with weight norm, its directions.
    Kernels that are shared with an embedding are excluded."""
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    kernels = {}
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.modules.conv._ConvNd) and getattr(part, "groups", 1) == 1:
            normed = "parametrizations" in part._modules
            kernel = part.parametrizations.weight.original1 if normed else part.weight
            if kernel.requires_grad and id(kernel) not in embeddings:
                kernels[id(kernel)] = kernel
    return list(kernels.values())


class OrthogonalUpdates(torch.optim.Optimizer):
    """Momentum SGD whose update of a kernel is the nearest matrix with singular values of about 1, so that directions
    which rarely get a gradient move as far as the others. A convolution's kernel counts as a matrix, (out, rest).

    Equal to ``torch.optim.Muon`` with ``match_rms_adamw``, which takes matrices only and updates them one by one; here
    kernels of one shape are updated together.
    """

    MOMENTUM = 0.95
    STEPS = 5  # Newton-Schulz iterations, whose coefficients (Jordan et al. 2024) bring singular values near 1 soonest
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, kernels: list[nn.Parameter], lr: float, wd: float):
        super().__init__(kernels, {"lr": lr, "weight_decay": wd})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for kernel in group["params"]:
                if kernel.grad is not None:
                    by_shape.setdefault(kernel.flatten(1).shape, []).append(kernel)
            for (rows, columns), kernels in by_shape.items():
                scale = 0.2 * max(rows, columns) ** 0.5  # the root mean square of AdamW's updates is about 0.2 lr
                self._update(kernels, group["lr"] * scale, group["lr"] * group["weight_decay"])

    def _update(self, kernels: list[nn.Parameter], lr: float, decay: float) -> None:
        for p in kernels:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum_buffer"] for p in kernels]
        gradients, keep = [p.grad for p in kernels], torch.ones((), device=kernels[0].device)
        if self.found_inf is not None:
            keep = 1.0 - self.found_inf
            if keep.is_cpu:  # there is no device to wait for
                if not keep:
                    return
            else:  # an average that is drawn towards itself stays as it is
                gradients = [torch.where(keep > 0, new, old) for new, old in zip(gradients, averages, strict=True)]
        torch._foreach_lerp_(averages, gradients, 1 - self.MOMENTUM)
        ahead = torch._foreach_lerp(gradients, averages, self.MOMENTUM)
        directions = torch.stack([one.flatten(1) for one in ahead])
        updates = orthogonalise(directions, self.STEPS, self.COEFFICIENTS).mul_(lr * keep)
        torch._foreach_mul_(kernels, 1 - decay * keep)
        torch._foreach_sub_(kernels, [update.view_as(p) for p, update in zip(kernels, updates, strict=True)])


def orthogonalise(matrices: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """(N, R, C) -> (N, R, C): bring each matrix's singular values near 1 and keep its singular vectors, by ``steps``
    Newton-Schulz iterations, in bfloat16 if the hardware has it."""
    a, b, c = coefficients
    x = matrices.bfloat16() if computes_in_bf16(matrices.device) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def warmup_cosine(step: int, *, peak: float, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """Learning rate for update number ``step`` (from 0): linear warm-up, then half a cosine to ``min_ratio * peak``.

    A function of the step alone has no state to restore: a resumed run is at the right rate by construction.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(optimizer: "torch.optim.Optimizer | Muon", lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def load_optimizer(optimizer: "torch.optim.Optimizer | Muon", state: dict, path: Path) -> None:
    """``optimizer.load_state_dict``.

    Raises:
        UserError: the state has other groups of parameters, as another version chose which of them decay.
    """
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        reason = f"its optimizer has other groups of parameters ({error}); another version wrote it"
        raise UserError(f"{path}: {reason}. Go on with that version, or use a new save_dir") from error
