"""The omni model, made of the models of stages A to D."""

# D the Thinker's width, V vocabulary

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omni.common.errors import UserError
from omni.common.numerics import weights_sha256
from omni.data.tokenizer import Tokenizer
from omni.models.architectures import VisionArchitecture
from omni.models.omni_architecture import OmniArchitecture
from omni.models.omni_model import OmniModel
from omni.models.talker import Talker
from omni.models.vision_encoder import ViT
from omni.stages import STAGES
from omni.stages.audio_encoder import AudioEncoderConfig
from omni.stages.omni import SftConfig
from omni.stages.talker import TalkerConfig
from omni.stages.tasks.processor import Processor
from omni.stages.vision import VisionConfig
from omni.train.checkpoint import build, load_stage, load_weights
from omni.train.stage import load, saved_config

POSITION_WORDS = (" left", " right", " top", " above", " bottom", " below")  # the Thinker's words for places


def assemble(config: SftConfig, **flash: bool) -> tuple[SftConfig, OmniModel, Tokenizer]:
    """The models of stages A to D, joined by new projections, on the CPU.

    Args:
        flash: see ``OmniModel``.

    Returns:
        The config with ``origins`` filled in; the model; the Thinker's tokenizer.

    Raises:
        UserError: a stage's file is missing, damaged or of another stage, or its sizes do not fit.
    """
    opened = load(STAGES["text"], config.thinker_ckpt)
    thinker, tokenizer = opened.model, opened.tokenizer
    ctx_len = config.ctx_len or thinker.architecture.ctx_len
    sizes = thinker.architecture.model_copy(update={"dropout": config.dropout, "ctx_len": ctx_len})
    keys: dict[str, Any] = {"thinker": sizes}
    modules: dict[str, nn.Module] = {"thinker": thinker}
    if config.audio_ckpt is not None:
        recognizer = load(STAGES["audio_enc"], config.audio_ckpt)
        modules["audio_encoder"], keys["audio_encoder"] = recognizer.model, recognizer.architecture
        keys["max_mel_length"] = recognizer.config_as(AudioEncoderConfig).max_mel_length
    words: dict[str, Tensor] = {}
    if config.vision_ckpt is not None:
        modules["vision_encoder"], keys["vision_encoder"], words, captions = vision_encoder(config.vision_ckpt)
        keys["n_words"] = captions.vocab_size if captions else 0
        side = keys["vision_encoder"].img_size // keys["vision_encoder"].patch
        if side % config.image_stack:
            raise UserError(
                f'{config.vision_ckpt}: has {side} x {side} patches, key "image_stack": expected a divisor of {side}, '
                f"found {config.image_stack}"
            )
    origins = {name: weights_sha256(module) for name, module in modules.items()}
    if config.speech_csv is not None:
        trained, modules["talker"] = talker_with_states(config.talker_ckpt, thinker.architecture.d_model)
        keys |= {"talker": trained.architecture, "max_codes": trained.max_codes}
        keys["duration_weight"] = trained.duration_weight
        codec = load(STAGES["codec"], config.talker_ckpt).model
        origins |= {"talker": weights_sha256(modules["talker"]), "codec": weights_sha256(codec)}
    joined = {name: getattr(config, name) for name in ("proj_d_ff", "image_stack", "drop_blanks")}
    model = empty_model(OmniArchitecture(**keys, **joined), config, **flash)
    for name, module in modules.items():
        getattr(model, name).load_state_dict(module.state_dict())
    embeddings = model.thinker.embed_tokens.weight
    if model.proj_v is not None:
        if words:
            load_weights(model.proj_v.word_head, words, config.vision_ckpt)
            model.proj_v.start_from_units(embeddings_of(captions.units, tokenizer, embeddings))
        else:
            model.proj_v.start_at_scale_of(embeddings)
        left, right, *more = embeddings_of(POSITION_WORDS, tokenizer, embeddings)
        top, bottom = torch.stack(more[:2]).mean(dim=0), torch.stack(more[2:]).mean(dim=0)
        model.proj_v.start_from_positions(left, right, top, bottom)
    if model.proj_a is not None:
        units = embeddings_of(recognizer.tokenizer.units, tokenizer, embeddings)
        model.proj_a.start_from_units(torch.cat((units, embeddings[model.audio_id, None])))  # last, the blank
    return config.model_copy(update={"origins": origins}), model, tokenizer


def empty_model(architecture: OmniArchitecture, config: SftConfig, **flash: bool) -> OmniModel:
    """A model with the run-time switches of a config."""
    return OmniModel(architecture, freeze_encoders=config.freeze_encoders, one_length=config.use_compile, **flash)


def processor_of(tokenizer: Tokenizer, architecture: OmniArchitecture, config: SftConfig) -> Processor:
    """The processor for a model of stage E."""
    keys = {"prompt": config.prompt, "cached": config.cache_features, "one_length": config.use_compile}
    return Processor(tokenizer, architecture, **keys)


def vision_encoder(folder: str) -> tuple[ViT, VisionArchitecture, dict[str, Tensor], Tokenizer | None]:
    """Stage C's vision encoder and its sizes; the weights of its word head and that head's vocabulary, if it has one.

    Raises:
        UserError: nothing there, or damaged.
    """
    saved = load_stage(folder, "vision", prefix="vision", final="vision.pt")
    sizes = VisionArchitecture.of(saved_config(VisionConfig, saved))
    words = below("word_head.", saved["model"])
    captions = Tokenizer.load(Path(folder) / "tokenizer.json") if words else None
    vit = build(lambda: ViT(sizes), below("vit.", saved["model"]), saved["path"])
    return vit, sizes, words, captions


def talker_with_states(folder: str, d_model: int) -> tuple[TalkerConfig, Talker]:
    """The config of stage D, and its talker with a projection of a Thinker's states, of width ``d_model``: zeros, so
    that it speaks as before.

    Raises:
        UserError: nothing there, or damaged.
    """
    saved = load_stage(folder, "talker", prefix="talker", final="talker.pt")
    trained = saved_config(TalkerConfig, saved, use_compile=False).model_copy(update={"thinker_d_model": d_model})
    nothing = {"thinker_proj.weight": torch.zeros(trained.d_model, d_model)}
    talker = build(lambda: Talker(trained.architecture), saved["model"] | nothing, saved["path"])
    return trained, talker


def began_with(origins: dict[str, str], folder: Path | str, talker: Talker) -> bool:
    """Whether stage E's ``talker`` began as stage D's talker of ``folder``."""
    _, trained = talker_with_states(str(folder), talker.architecture.thinker_d_model)
    return origins["talker"] == weights_sha256(trained)


def below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


@torch.no_grad()
def embeddings_of(units: Sequence[str], tokenizer: Tokenizer, embeddings: Tensor) -> Tensor:
    """The Thinker's embedding of each text unit that an encoder names: (units, D).

    The mean of its tokens' embeddings (V, D), in the spelling with the fewest tokens: transcripts are in small letters,
    names and first words of sentences have a capital in the Thinker's text.
    """
    rows = []
    for unit in units:
        spellings = (unit, unit.title(), unit.strip().title())
        ids = min((tokenizer.encode(spelling, allow_special=False) for spelling in spellings if spelling), key=len)
        rows.append(embeddings[ids].mean(dim=0))
    return torch.stack(rows)
