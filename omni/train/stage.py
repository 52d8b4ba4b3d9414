"""A stage: its row in the table of stages (``omni.stages.STAGES``), and how its trained model is opened."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from omni.data.tokenizer import Tokenizer, check_size
from omni.models.ctc import CtcTokenizer
from omni.train import checkpoint
from omni.train.config import ConfigType, StageConfig, with_new_names
from omni.train.evaluation import EvalResult


@dataclass(frozen=True)
class ExportedPart:
    """What an export takes of a stage's model, under a name of its own."""

    name: str  # of its weights and in config.json: "thinker"
    purpose: str  # in model_info.json and messages, beginning with a verb: "writes answers"
    option: str  # of export.py, that adds it: "--thinker_ckpt or --omni_ckpt"
    figures: tuple[str, ...] = ()  # metrics that the model card names; one ending in * stands for all with that prefix
    command: str = ""  # that uses it, for the model card
    alone: bool = False  # it fits any other part: export.py only has to copy it
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
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model  # the trained model, made ready to run
    tokenizer: type[Tokenizer] | type[CtcTokenizer] | None = None  # class of the tokenizer.json beside the model
    vocab_size: Callable[[BaseModel], int] | None = None  # entries of that tokenizer, by the model's architecture
    parts: tuple[str, ...] = ()  # prefixes of the models that the same script trains before, in the same folder
    options: tuple[str, ...] = ("show", "num_workers")  # those of evaluate.py's OPTIONS that ``evaluate`` heeds
    evaluate: str = ""  # "module:function" by which scripts/evaluate.py evaluates it; imported when it is called

    def evaluation(self) -> Callable[..., EvalResult]:
        """The function that ``evaluate`` names: (options of scripts/evaluate.py, ``Loaded``, device) -> result."""
        module, _, function = self.evaluate.partition(":")
        return getattr(import_module(module), function)

    def is_in(self, folder: str | Path) -> bool:
        """Whether ``folder`` has the final file or a step file, damaged or not; or is a file, to be opened as such."""
        return (
            Path(folder).is_file()
            or (Path(folder) / self.final).exists()
            or bool(checkpoint.step_files(Path(folder), self.prefix))
        )


TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Loaded:
    """A trained model, opened."""

    model: nn.Module  # float32, frozen, in evaluation mode
    architecture: BaseModel
    config: dict  # keys of its training
    step: int
    metrics: dict[str, float]
    path: Path  # the file of its weights
    tokenizer: Any = None  # that of the stage's row

    def config_as(self, cls: type[ConfigType], **changes) -> ConfigType:
        """The config of its training, some of its keys changed.

        Raises:
            UserError: it is of another version.
        """
        return saved_config(cls, vars(self), **changes)


def saved_config(cls: type[ConfigType], saved: dict, **changes) -> ConfigType:
    """The config in what ``load_stage`` returned, some of its keys changed.

    Raises:
        UserError: it is of another version; the message names file and key.
    """
    with checkpoint.understood(saved["path"]):
        return cls.model_validate(with_new_names(cls, saved["config"]) | changes)


def load(stage: Stage, source: str | Path, device: torch.device | str = "cpu") -> Loaded:
    """Open the model that ``stage`` has trained.

    Args:
        source: its final file or a step file; or its folder, which stands for the final file or, while the stage still
            trains, for the newest step file.

    Raises:
        UserError: nothing there, damaged, of another stage or of another version.
    """
    saved = checkpoint.load_stage(source, stage.name, stage.prefix, stage.final)
    with checkpoint.understood(saved["path"]):
        architecture = stage.architecture.model_validate(saved["architecture"])
        switches = {name: saved["config"][name] for name in stage.switches}
    tokenizer = None
    if stage.tokenizer is not None:
        path = saved["path"].with_name(TOKENIZER)
        tokenizer = stage.tokenizer.load(path)
        check_size(tokenizer, path, stage.vocab_size(architecture))
    model = checkpoint.build(lambda: stage.model(architecture, **switches), saved["model"], saved["path"])
    model = stage.prepare(model).to(device).eval().requires_grad_(False)
    return Loaded(
        model, architecture, saved["config"], saved["step"], saved["metrics"], saved["path"], tokenizer=tokenizer
    )
