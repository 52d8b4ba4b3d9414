"""The weights of an export: how they are written, and how μOmni opens them.

All weights stand in one ``model.safetensors``, each part's under its prefix; ``config.json`` has the parts' sizes;
``model_info.json`` has their origins and the SHA-256 of every other file, which is compared before a file is used.
Nothing that μOmni opens in the folder can run code. ``vocoder/model.pt2``, which it does not open, is unpickled by
``torch.export.load``.
"""

from collections.abc import Callable, Container
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from omni.common.errors import UserError
from omni.common.files import file_sha256, read_json
from omni.common.media import quoted
from omni.data.tokenizer import Tokenizer, check_size
from omni.export.folder import CONFIG, INFO, TOKENIZER, WEIGHTS, is_export, read_info
from omni.stages import STAGES
from omni.stages.omni import ConversationKeys
from omni.train.checkpoint import build, understood
from omni.train.stage import Loaded, load

# ---------------------------------------------------------------------------------------------------------------
# The parts


STAGE_OF = {part.name: stage for stage in STAGES.values() for part in stage.exports}
PARTS = {part.name: part for stage in STAGES.values() for part in stage.exports}


# ---------------------------------------------------------------------------------------------------------------
# Writing


def rounded(weights: dict[str, Tensor], dtype: torch.dtype, exact: Container[str]) -> dict[str, Tensor]:
    """``weights`` in ``dtype``, except those named in ``exact``: statistics, codebooks and counts."""
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() and name not in exact else tensor).contiguous()
        for name, tensor in weights.items()
    }


def buffers_of(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_buffers()}


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Safetensors, the same bytes for the same weights: metadata of several entries have no fixed order."""
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # as the umask made the folder; safetensors lets the owner read only


# ---------------------------------------------------------------------------------------------------------------
# Reading


class Export:
    """An exported folder, opened.

    Raises:
        UserError: a file is missing, damaged, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._verified: set[str] = set()
        info = read_info(self.folder)
        self.components, self.checksums = info["components"], info["files"]
        self.config = read_json(self.file(CONFIG))

    def file(self, name: str) -> Path:
        """The path of a file of the folder, which is compared with its checksum once.

        Raises:
            UserError: it is missing or differs.
        """
        path = self.folder / name
        if name not in self._verified:
            try:
                same = file_sha256(path) == self.checksums.get(name)
            except OSError as error:
                raise UserError(f"{path}: cannot read it: {error.strerror}") from error
            if not same:
                raise UserError(
                    f"{path}: damaged: the checksum is not that of {INFO}. Delete it, and export again with --force"
                )
            self._verified.add(name)
        return path

    def has(self, part: str) -> bool:
        return part in self.components

    def weights(self, *parts: str) -> dict[str, Tensor]:
        """The weights of some parts, with their prefixes."""
        path = self.file(WEIGHTS)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.split(".")[0] in parts}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path}: damaged weights: {quoted(error)}") from error

    def open(self, name: str, device: torch.device | str = "cpu") -> Loaded:
        """Open a part, or "omni": stage E's model, with the keys ``prompt`` and ``origins`` as its ``config``.

        Raises:
            UserError: the folder does not have it; the message says which option of ``export.py`` brings it.
        """
        sizes, weights = self.folder / CONFIG, self.folder / WEIGHTS
        with understood(sizes):
            make, architecture, config = self._omni() if name == "omni" else self._part(name)
        tokenizer = None
        if name in ("omni", "thinker"):
            tokenizer, stage = Tokenizer.load(self.file(TOKENIZER)), STAGES["omni" if name == "omni" else "text"]
            check_size(tokenizer, self.folder / TOKENIZER, stage.vocab_size(architecture))
        parts = (*architecture.parts, "proj_a", "proj_v") if name == "omni" else (name,)
        prefix = "" if name == "omni" else f"{name}."
        state_dict = {key.removeprefix(prefix): tensor for key, tensor in self.weights(*parts).items()}
        model = build(lambda: make(architecture), state_dict, weights, sizes).to(device).eval().requires_grad_(False)
        with understood(self.folder / INFO):
            facts = self.components["thinker" if name == "omni" else name]
            return Loaded(model, architecture, config, facts["step"], facts["metrics"], weights, tokenizer)

    def _part(self, name: str) -> tuple[Callable[[BaseModel], nn.Module], BaseModel, dict]:
        if name not in PARTS:
            raise UserError(f"{self.folder}: an export has no {name}, but {', '.join(self.components)}")
        part, stage = PARTS[name], STAGE_OF[name]
        if not self.has(name):
            raise UserError(f"{self.folder}: has no {name}, which {part.purpose}. Export it with {part.option}")
        architecture = (part.architecture or stage.architecture).model_validate(self.config["parts"][name])
        return part.model or stage.model, architecture, {}

    def _omni(self) -> tuple[Callable[[BaseModel], nn.Module], BaseModel, dict]:
        if (keys := self.config["omni"]) is None:
            raise UserError(f"{self.folder}: its Thinker takes text alone. Export it with --omni_ckpt")
        stage, config = STAGES["omni"], ConversationKeys.model_validate({k: keys[k] for k in ("prompt", "origins")})
        return stage.model, stage.architecture.model_validate(keys["architecture"]), config.model_dump()


def open_model(name: str, source: "str | Path | Export", device: torch.device | str = "cpu") -> Loaded:
    """Open a trained model, wherever it is.

    Args:
        name: a part of an export ("thinker", "audio_encoder", "vision_encoder", "talker", "rvq", "vocoder", "ocr"); or
            a stage of ``STAGES``, for its whole model: of these an export holds "omni" only.
        source: an export; or a stage's folder, final file or step file.

    Raises:
        UserError: it is not there, damaged, or of another version; or there is no such name.
    """
    parts = [part for part in PARTS if STAGE_OF[part].name != "omni"]  # projections have no file of their own
    if name not in (*parts, *STAGES):
        raise UserError(f'model "{quoted(name)}": expected one of {", ".join(dict.fromkeys((*parts, *STAGES)))}')
    if not isinstance(source, Export) and is_export(Path(source)):
        source = Export(source)
    if isinstance(source, Export):
        return source.open(name, device)
    if name not in PARTS:
        return load(STAGES[name], source, device)
    opened, part = load(STAGE_OF[name], source, device), PARTS[name]
    model = part.take(opened.model)
    return replace(opened, model=model, architecture=model.architecture)


def has_part(folder: Path, part: str) -> bool:
    """Whether an export or a stage's folder holds a part, damaged or not."""
    if is_export(folder):
        return Export(folder).has(part)
    return STAGE_OF[part].is_in(folder)


def source_of(part: str, given: Path | None, folder: Path) -> Path:
    """The folder to take a part from: ``given``, that of its stage; else ``folder``, a stage's or an export.

    Raises:
        UserError: no ``given``, and ``folder`` does not have it.
    """
    stage = STAGE_OF[part]
    if given is None and not is_export(folder) and not stage.is_in(folder):
        found = f"{folder}: expected {stage.final}, found none"
        raise UserError(f"{found}. Give the folder of stage {stage.letter} as {PARTS[part].option}")
    return given or folder
