"""The state of one training, which the parts of the loop share: phases, data, progress."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from omni.data.order import ResumableDataset
from omni.train.average import WeightAverage
from omni.train.config import StageConfig
from omni.train.meter import Meter
from omni.train.optim import Muon, warmup_cosine
from omni.train.progress import Progress
from omni.train.run import Run
from omni.train.stage import Stage

# (model, batch on the device) -> mean loss over the batch's targets, and scalars to log
LossFunction = Callable[[nn.Module, dict], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Phase:
    """One module with its optimizer and loss.

    ``loss`` is called with the module to run (under torchrun its DDP wrapper) and a micro-batch. It may read other
    phases' modules; only this phase's parameters are updated. ``after_update`` moves what no gradient moves, such as
    averages; it gets 1.0 on the device, or 0.0 if the step's update was not made. Before ``first_step`` the phase does
    not run, so that not even weight decay touches the module; its learning rate begins there, with its own warm-up.
    The last phase's module is what is validated and goes into the final file; with an ``average``, in its place.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer | Muon
    loss: LossFunction
    peak_lr: float
    after_update: Callable[[Tensor], None] | None = None
    first_step: int = 0
    average: WeightAverage | None = None


@dataclass
class Validation:
    """How a stage is evaluated.

    ``sums`` maps (module, batch on the device) to tensors that add up over batches and processes; ``metrics`` turns
    their totals, numbers where they are scalars, into the reported metrics, the stage's ``best_metric`` among them.
    """

    dataset: ResumableDataset
    sums: Callable[[nn.Module, dict], dict[str, Tensor]]
    metrics: Callable[[dict[str, float | Tensor]], dict[str, float]]


@dataclass
class Training:
    """See ``omni.train.loop.train`` for the arguments."""

    run: Run
    phases: list[Phase]
    dataset: ResumableDataset
    fingerprint: dict[str, str]
    files: dict[str, str]
    validation: Validation | None
    summary: dict[str, float]
    downstream: tuple[Stage, ...]
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        run, dataset = self.run, self.dataset
        self.config: StageConfig = run.config  # of this training: a run may have several, one after the other
        self.fingerprint = self.fingerprint | {"samples": str(len(dataset.source))}
        if dataset.lengths is not None:  # the order of the samples depends on them
            self.fingerprint["lengths"] = hashlib.sha256(np.asarray(dataset.lengths).tobytes()).hexdigest()
        self.total_steps = self.config.max_steps or self.config.max_epochs * dataset.steps_per_epoch
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp_dtype == torch.float16)
        self.meter = Meter(run.device)

    @property
    def last_epoch(self) -> int:
        """The epoch of the last step."""
        return (self.progress.step - 1) // self.dataset.steps_per_epoch

    def begun_phases(self, step: int) -> list[Phase]:
        return [phase for phase in self.phases if step >= phase.first_step]

    def learning_rate(self, phase: Phase, step: int) -> float:
        """The phase's learning rate at ``step``."""
        return warmup_cosine(
            step - phase.first_step,
            peak=phase.peak_lr,
            warmup_steps=self.config.warmup_steps,
            total_steps=self.total_steps - phase.first_step,
            min_ratio=self.config.min_lr_ratio,
        )
