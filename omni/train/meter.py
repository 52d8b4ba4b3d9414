"""Running averages of what a training logs."""

import torch
from torch import Tensor

from omni.train.processes import Processes


class Meter:
    """Running averages on the device; read only where the host has to wait anyway."""

    def __init__(self, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}
        self.updates = torch.zeros((), device=device)  # made since the last report
        self.samples = self.targets = 0  # since this process started
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)

    def add(self, scalars: dict[str, Tensor], share: Tensor) -> None:
        for name, value in scalars.items():
            value = torch.where(share > 0, value.detach() * share, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def count(self, finite: Tensor, targets: float, samples: int) -> None:
        self.targets += targets
        self.samples += samples
        self.updates = self.updates + finite
        self.skipped = self.skipped + (1 - finite)
        self.in_a_row = (self.in_a_row + 1) * (1 - finite)

    def skipped_counts(self) -> tuple[int, int]:
        """Numbers of skipped updates: in all, and in a row up to now. The host waits for the device."""
        return int(self.skipped), int(self.in_a_row)

    def averages(self, processes: Processes) -> dict[str, float]:
        """Means over all updates since the last call, in all processes; also of a phase that began between them."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        values = processes.sum_over_ranks(torch.stack([self.sums[name] for name in names]).float()).tolist()
        updates = max(1.0, float(self.updates))
        self.sums, self.updates = {}, torch.zeros_like(self.updates)
        return {name: value / updates for name, value in zip(names, values, strict=True)}

    def state_dict(self) -> dict:
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"sums": sums} | {name: float(getattr(self, name)) for name in ("updates", "skipped", "in_a_row")}

    def load_state_dict(self, state: dict) -> None:
        device = self.skipped.device
        self.sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        for name in ("updates", "skipped", "in_a_row"):
            setattr(self, name, torch.tensor(state[name], device=device))
