"""A stage: its row in the table of stages (``omni.stages.STAGES``), and how the model that it left is opened again."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from omni.train import checkpoint
from omni.train.config import StageConfig
from omni.train.evaluation import EvalResult


@dataclass(frozen=True)
class ExportedPart:
    """What an export takes of a stage's model, under a name of its own."""

    name: str  # of its weights and in config.json: "thinker"
    purpose: str  # in model_info.json and messages, beginning with a verb: "writes answers"
    option: str  # of export.py, that adds it: "--thinker_ckpt or --omni_ckpt"
    figures: tuple[str, ...] = ()  # metrics that the model card names; one ending in * stands for all with that prefix
    command: str = ""  # that uses it, for the model card
    take: Callable[[nn.Module], nn.Module] = lambda model: model  # the part, of the stage's model
    architecture: type[BaseModel] | None = None  # default: the stage's
    model: Callable[[BaseModel], nn.Module] | None = None  # from its architecture; default: the stage's


@dataclass(frozen=True)
class Stage:
    """Names, units and types of a stage, and nothing that happens in it."""

    name: str  # in checkpoints, metrics.jsonl and results: "text"
    prefix: str  # step files are <prefix>_step_<N>.pt
    final: str  # the final file
    unit: str  # what the throughput counts beside samples: "tokens"
    best_metric: str  # the validation metric that chooses the best checkpoint; smaller is better
    config_name: str = ""  # of configs/<config_name>_demo.json and _tiny.json
    exports: tuple[ExportedPart, ...] = ()
    letter: str = ""
    script: str = ""  # "train_text.py"
    config: type[StageConfig] | None = None
    architecture: type[BaseModel] | None = None
    model: Callable[..., nn.Module] | None = None  # from its architecture, and its switches
    switches: tuple[str, ...] = ()  # keys of the config that choose how it computes, and change no weight: use_flash
    evaluate: str = ""  # "module:function" by which scripts/evaluate.py evaluates it; imported when it is called
    files: tuple[str, ...] = ()  # in the same folder: what the model is of no use without, such as a tokenizer

    def evaluation(self) -> Callable[..., EvalResult]:
        """The function that ``evaluate`` names: (options of scripts/evaluate.py, device) -> result."""
        module, _, function = self.evaluate.partition(":")
        return getattr(import_module(module), function)

    def is_in(self, folder: str | Path) -> bool:
        """Whether ``folder`` has the final file or a step file, damaged or not."""
        return (Path(folder) / self.final).exists() or bool(checkpoint.step_files(Path(folder), self.prefix))


@dataclass(frozen=True)
class Loaded:
    """A stage's model, opened."""

    model: nn.Module  # float32, in evaluation mode
    architecture: BaseModel
    config: dict  # keys of the training that made it
    step: int
    metrics: dict[str, float]
    path: Path  # the file that was read


def load(stage: Stage, folder: str | Path, device: torch.device | str = "cpu") -> Loaded:
    """The model that ``stage`` left in ``folder``: of its final file, or while it still trains of its newest step file.

    Raises:
        UserError: nothing there, damaged, of another stage or of another version.
    """
    saved = checkpoint.load_stage(folder, stage.name, stage.prefix, stage.final)
    with checkpoint.understood(saved["path"]):
        architecture = stage.architecture.model_validate(saved["architecture"])
        switches = {name: saved["config"][name] for name in stage.switches}
    model = checkpoint.build(lambda: stage.model(architecture, **switches), saved["model"], saved["path"])
    model = model.to(device).eval()
    return Loaded(model, architecture, saved["config"], saved["step"], saved["metrics"], saved["path"])
