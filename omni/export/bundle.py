"""The exported folder: every trained part in one place. What is in it, how it is written, how μOmni runs from it.

All weights stand in one ``model.safetensors``, each part's under its prefix; ``config.json`` has the parts' sizes, and
``model_info.json`` where they come from and the SHA-256 of every other file, which is compared before a file is
believed. Nothing in the folder can run code when it is opened.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from omni.common.errors import RunError, UserError
from omni.common.files import OwnFiles, file_sha256, fsync, open_regular, parse_json, read_json
from omni.common.lock import FolderLock
from omni.common.media import quoted
from omni.data.tokenizer import Tokenizer
from omni.models.architectures import AudioEncoderArchitecture, CodecArchitecture, OcrArchitecture, ThinkerArchitecture
from omni.models.audio_encoder import AudioEncoder
from omni.models.codec import Codec
from omni.models.ocr import Ocr
from omni.models.omni_model import VIT_SIZES, OmniModel
from omni.models.talker import Talker
from omni.models.thinker import Thinker
from omni.models.vision_encoder import ViT
from omni.models.vocoder import Generator, fold_weight_norm
from omni.stages.omni import SftConfig
from omni.stages.talker import TalkerConfig
from omni.stages.vocoder import VocoderConfig
from omni.train.checkpoint import build, step_files, understood
from omni.train.config import read_sizes

FORMAT = 1
WEIGHTS, CONFIG, INFO, TOKENIZER = "model.safetensors", "config.json", "model_info.json", "tokenizer.json"
PARTIAL = ".{name}.omni-partial"  # the folder in which an export grows, beside the one that it becomes
REPLACED = ".{name}.omni-replaced"  # and the earlier export, until the new one stands in its place
LOCK = ".lock"  # of ``FolderLock``, in the first of these
SUBFOLDERS = ("thinker", "vision_encoder", "audio_encoder", "vocoder")  # parts as other tools open them
FILES = (  # all that an export writes, in its folder and in those
    WEIGHTS, CONFIG, INFO, TOKENIZER, "README.md",
    "tokenizer_config.json", "generation_config.json", "preprocessor_config.json",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# The parts


def audio_architecture(sizes: dict) -> AudioEncoderArchitecture:
    """Of an audio encoder's sizes those that the model itself has."""
    return AudioEncoderArchitecture.model_validate(
        {name: sizes[name] for name in AudioEncoderArchitecture.model_fields}
    )


def _build_vit(sizes: dict) -> ViT:
    side = sizes["img_size"]
    return ViT(side, side, *(sizes[name] for name in VIT_SIZES[1:]))


# prefix in model.safetensors -> a module of the sizes in config.json, its weights yet to be loaded
BUILD: dict[str, Callable[[dict], nn.Module]] = {
    "thinker": lambda sizes: Thinker(ThinkerArchitecture.model_validate(sizes)),
    "audio_encoder": lambda sizes: AudioEncoder(audio_architecture(sizes), sizes["n_tokens"]),
    "vision_encoder": _build_vit,
    "talker": lambda sizes: Talker(read_sizes(TalkerConfig, sizes)),
    "rvq": lambda sizes: Codec(CodecArchitecture.model_validate(sizes)),
    "vocoder": lambda sizes: fold_weight_norm(Generator(read_sizes(VocoderConfig, sizes))),
    "ocr": lambda sizes: Ocr(OcrArchitecture.model_validate(sizes)),
}

# prefix -> what it is for, and the option of export.py that brings it
PURPOSE = {
    "thinker": ("answers", "--thinker_ckpt or --omni_ckpt"),
    "audio_encoder": ("hears", "--audio_ckpt or --omni_ckpt"),
    "vision_encoder": ("sees", "--vision_ckpt or --omni_ckpt"),
    "proj_a": ("hands what is heard to the Thinker", "--omni_ckpt"),
    "proj_v": ("hands what is seen to the Thinker", "--omni_ckpt"),
    "talker": ("speaks", "--talker_ckpt"),
    "rvq": ("turns the talker's codes into log-mels", "--talker_ckpt"),
    "vocoder": ("turns log-mels into sound", "--vocoder_ckpt"),
    "ocr": ("reads pictures of text", "--ocr_ckpt"),
}


# ---------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def new_folder(target: Path, replace: bool) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block ends well: whole, or not at all.

    Args:
        target: must not exist, or be empty; or, with ``replace``, hold an earlier export and nothing else, which then
            makes room.

    Raises:
        UserError: it holds something else, its place cannot be written to, or another process is exporting to it.
        RunError: the disk is full.
    """
    target = Path(os.path.realpath(target))  # a link stays one, and what it leads to is filled
    partial, replaced = (target.with_name(name.format(name=target.name)) for name in (PARTIAL, REPLACED))
    check_target(target, replace)
    _refuse_strangers(partial, UNFINISHED)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(partial)
    except OSError as error:
        raise UserError(f"--output_dir {target}: cannot write there: {error.strerror}") from error
    try:
        with _one_line(target):
            _restore(replaced, target)
            check_target(target, replace)
            _remove_replaced(replaced)
            for leftover in partial.iterdir():  # of an export that was killed
                if leftover.is_dir():
                    UNFINISHED.remove(leftover, f"{leftover.name}/")
                elif leftover != lock.path:
                    leftover.unlink()
            yield partial
            for path in (*sorted(partial.rglob("*")), partial):
                _fsync(path)
            check_target(target, replace)  # once more: making the export took a while
            lock.release()
            if target.exists() and any(target.iterdir()):
                target.rename(replaced)
            os.replace(partial, target)  # takes the place of an empty folder, too
            _fsync(target.parent)
    except BaseException:
        _restore(replaced, target)
        if partial.is_dir():
            UNFINISHED.remove(partial)
        raise
    finally:
        lock.file.close()
    _remove_replaced(replaced)


def _restore(replaced: Path, target: Path) -> None:
    """Put the earlier export back, if the new one did not come into its place."""
    if not target.exists() and replaced.is_dir() and is_merged(replaced):
        replaced.rename(target)


def _remove_replaced(replaced: Path) -> None:
    """Delete the earlier export, which has made room, or what a kill has left of it.

    Raises:
        UserError: something else lies there.
    """
    if not os.path.lexists(replaced):
        return
    if replaced.is_dir() and not any(replaced.iterdir()):
        replaced.rmdir()
        return
    own = _own_files(listed_files(replaced))
    _refuse_strangers(replaced, own)
    own.remove(replaced, last=INFO)


@contextlib.contextmanager
def _one_line(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RunError(f"{target}: could not write the export: {reason}. Nothing was left behind") from error


def check_target(target: Path, replace: bool) -> None:
    """
    Raises:
        UserError: ``new_folder`` may not put anything there.
    """
    target = Path(os.path.realpath(target))
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"--output_dir {target}: expected a folder, found a file")
    if not any(target.iterdir()):
        return
    if not (target / INFO).is_file():
        raise UserError(f"--output_dir {target}: expected a new or empty folder, found one that holds other things")
    if not replace:
        raise UserError(f"--output_dir {target}: holds an earlier export already. Give --force to replace it")
    listed = listed_files(target)
    _refuse_strangers(target, _own_files(listed))
    for name, digest in listed.items():
        path = target / name
        if digest is not None and path.exists() and file_sha256(path) != digest:
            raise UserError(f"{path}: changed since it was exported. Move or delete it, then export again")


def _own_files(names: Iterable[str]) -> OwnFiles:
    names = frozenset(names)
    return OwnFiles(names.__contains__, frozenset(name.rpartition("/")[0] for name in names))


def _refuse_strangers(folder: Path, own: OwnFiles) -> None:
    """
    Raises:
        UserError: ``folder`` is a link or a file, or holds more than our own files.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of export.py, found a link or a file. Move it away")
    if found := own.strangers(folder):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(
            f"{folder}: holds {quoted(found[0])}{more}, no file of an export. Move it away, then export again"
        )


def is_own_file(name: str) -> bool:
    """Whether an export writes a file of this name."""
    folder, _, file = name.rpartition("/")
    return folder in ("", *SUBFOLDERS) and file in FILES


def _is_unfinished(name: str) -> bool:
    file = name.rpartition("/")[2]  # the temporary ones are those of safetensors and of replace_file
    return is_own_file(name) or name == LOCK or re.fullmatch(r"\.tmp\w{6}|.+\.omni-partial", file) is not None


UNFINISHED = OwnFiles(_is_unfinished, frozenset(SUBFOLDERS))  # before the export has its list


def _fsync(path: Path) -> None:
    fsync(path)


def rounded(weights: dict[str, Tensor], dtype: torch.dtype, exact: Container[str]) -> dict[str, Tensor]:
    """``weights`` in ``dtype``, but for those named in ``exact``: statistics, codebooks and counts."""
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() and name not in exact else tensor).contiguous()
        for name, tensor in weights.items()
    }


def buffers_of(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_buffers()}


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Safetensors, the same bytes for the same weights: with a second entry, the metadata's order would be chance."""
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # it comes readable for its owner only; as the umask made the folder


def write_json(path: Path, value: dict) -> None:
    """As people read it. A figure that is no number becomes null: JSON has no nan."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def info_sha256(info: dict) -> str:
    """Of all that model_info.json says but this digest itself, however it is laid out."""
    text = json.dumps({key: value for key, value in _finite(info).items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Names, types, shapes and values; whatever file they come from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Reading


def is_merged(folder: str | Path) -> bool:
    """Whether ``export.py`` wrote it; ``Merged`` then tells what has been lost since."""
    return (Path(folder) / INFO).is_file() or (Path(folder) / WEIGHTS).is_file()


def read_info(folder: Path) -> dict:
    """model_info.json, which has its own digest and that of every other file.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    path = folder / INFO
    try:
        with open_regular(path) as file:
            info = parse_json(file.read().decode("utf-8"))
        if info_sha256(info) != info["sha256"]:
            raise ValueError("the checksum does not match")
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged, or not written by export.py") from error
    if info.get("format") != FORMAT:
        found = f"written in format {quoted(info.get('format'))}"
        raise UserError(f"{path}: {found}, this version reads format {FORMAT}")
    for key in ("files", "components"):
        if not isinstance(info.get(key), dict):
            raise UserError(f'{path}: key "{key}": expected an object. It is of another version, or not of export.py')
    return info


def listed_files(folder: Path) -> dict[str, str | None]:
    """Every file of the export in ``folder``, and its digest: that of ``model_info.json`` itself stands inside it.

    Raises:
        UserError: no export, or its list cannot be believed, so that nothing in the folder may be deleted.
    """
    try:
        return read_info(folder)["files"] | {INFO: None}
    except UserError as error:
        raise UserError(f"{error}. So it cannot be told what in {folder} may be replaced: give a new folder") from error


class Merged:
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
            purpose, option = PURPOSE[name]
            raise UserError(f"{self.folder}: has no {name}, which {purpose}. Export it with {option}")
        weights = {key.removeprefix(f"{name}."): tensor for key, tensor in self.weights(name).items()}
        sizes = self.folder / CONFIG
        module = build(lambda: BUILD[name](self.config["parts"][name]), weights, self.folder / WEIGHTS, sizes)
        return module.to(device).eval()

    def omni(self, device: torch.device | str) -> tuple[OmniModel, SftConfig]:
        """The Thinker with all that it sees and hears through, as ``load_omni`` returns it, without the tokenizer.

        Raises:
            UserError: the folder was exported without stage E.
        """
        if self.config.get("omni") is None:
            raise UserError(f"{self.folder}: its Thinker neither sees nor hears. Export it with --omni_ckpt")
        sizes = self.folder / CONFIG
        with understood(sizes):
            config = read_sizes(SftConfig, self.config["omni"])
            weights = self.weights(*config.parts, "proj_a", "proj_v")
        model = build(lambda: OmniModel(config), weights, self.folder / WEIGHTS, sizes)
        return model.to(device).eval(), config


def has_part(folder: Path, part: str) -> bool:
    """Whether a stage's folder or an export holds a ``talker`` or an ``ocr``, damaged or not."""
    if is_merged(folder):
        return Merged(folder).has(part)
    return (folder / f"{part}.pt").exists() or bool(step_files(folder, part))
