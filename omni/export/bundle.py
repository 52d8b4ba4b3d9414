"""The weights of an export: how they are written, and how μOmni opens them.

All weights stand in one ``model.safetensors``, each part's under its prefix; ``config.json`` has the parts' sizes;
``model_info.json`` has their origins and the SHA-256 of every other file, which is compared before a file is used.
Nothing in the folder can run code when it is opened.
"""

import hashlib
from collections.abc import Container
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from omni.common.errors import UserError
from omni.common.files import file_sha256, read_json
from omni.common.media import quoted
from omni.data.tokenizer import Tokenizer
from omni.export.folder import CONFIG, INFO, TOKENIZER, WEIGHTS, is_export, read_info
from omni.models.omni_architecture import OmniArchitecture
from omni.models.omni_model import OmniModel
from omni.stages import STAGES
from omni.stages.omni import SftConfig
from omni.train.checkpoint import build, understood
from omni.train.config import read_sizes

# ---------------------------------------------------------------------------------------------------------------
# The parts


STAGE_OF = {part.name: stage for stage in STAGES.values() for part in stage.exports}
PARTS = {part.name: part for stage in STAGES.values() for part in stage.exports}


def build_part(name: str, sizes: dict) -> nn.Module:
    """A part from its architecture in config.json, its weights not loaded yet."""
    part, stage = PARTS[name], STAGE_OF[name]
    return (part.model or stage.model)((part.architecture or stage.architecture).model_validate(sizes))


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


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Digest of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.file(TOKENIZER))

    def weights(self, *parts: str) -> dict[str, Tensor]:
        """The weights of some parts, with their prefixes."""
        path = self.file(WEIGHTS)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.split(".")[0] in parts}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path}: damaged weights: {quoted(error)}") from error

    def part(self, name: str, device: torch.device | str) -> nn.Module:
        """A part ready to run: float32, in evaluation mode.

        Raises:
            UserError: the folder does not have it; the message says which option of ``export.py`` brings it.
        """
        if not self.has(name):
            part = PARTS[name]
            raise UserError(f"{self.folder}: has no {name}, which {part.purpose}. Export it with {part.option}")
        weights = {key.removeprefix(f"{name}."): tensor for key, tensor in self.weights(name).items()}
        sizes = self.folder / CONFIG
        module = build(lambda: build_part(name, self.config["parts"][name]), weights, self.folder / WEIGHTS, sizes)
        return module.to(device).eval()

    def omni(self, device: torch.device | str) -> tuple[OmniModel, SftConfig]:
        """The omni model and its config, as ``load_omni`` returns them, without the tokenizer.

        Raises:
            UserError: the folder was exported without stage E.
        """
        if self.config.get("omni") is None:
            raise UserError(f"{self.folder}: its Thinker takes text alone. Export it with --omni_ckpt")
        sizes = self.folder / CONFIG
        with understood(sizes):
            config = read_sizes(SftConfig, self.config["omni"]["config"])
            architecture = OmniArchitecture.model_validate(self.config["omni"]["architecture"])
        weights = self.weights(*architecture.parts, "proj_a", "proj_v")
        model = build(lambda: OmniModel(architecture), weights, self.folder / WEIGHTS, sizes)
        return model.to(device).eval(), config


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
