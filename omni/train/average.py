"""The running mean of a model's weights, which is validated and kept in place of the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from omni.common.errors import UserError


class WeightAverage:
    """Exponential moving average of a module's trained weights: m <- d m + (1 - d) w after each step.

    Late in training the weights wander about a point that is better than any of them (Polyak & Juditsky 1992). The
    mean begins at zero and is divided by the sum of its coefficients, as Adam's moments are (Kingma & Ba 2015), so that
    the initial weights have no part in it, but for first updates that were skipped. It changes nothing in training.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self._means = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the present weights, those after ``steps`` steps, at least 1."""
        share = (1 - self.decay) / (1 - self.decay**steps)
        torch._foreach_lerp_(list(self._means.values()), list(self._weights.values()), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module has the mean's weights, and at the end its own again."""
        own = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.install()
        try:
            yield
        finally:
            self._write(own)

    def install(self) -> None:
        """The module has the mean's weights from now on."""
        self._write(self._means)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        torch._foreach_copy_(list(self._weights.values()), list(values.values()))

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._means)

    def load(self, saved: dict[str, Tensor] | None, path: Path) -> None:
        """
        Raises:
            UserError: the checkpoint has no mean of these weights.
        """
        if saved is None:
            advice = "Leave it out, or use a new save_dir"
            raise UserError(f'{path} has no running mean, as it was trained without "ema_decay". {advice}')
        shapes, found = ({name: tuple(value.shape) for name, value in of.items()} for of in (self._means, saved))
        if shapes != found:
            name = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))[0]
            expected = f"{shapes.get(name, 'none')}, found {found.get(name, 'none')}"
            raise UserError(f"{path}: the running mean does not fit the model: {name}: expected {expected}")
        for name, mean in self._means.items():
            mean.copy_(saved[name])


def average_of(module: nn.Module, decay: float | None) -> WeightAverage | None:
    """The running mean for the config's ``ema_decay``."""
    return None if decay is None else WeightAverage(module, decay)
