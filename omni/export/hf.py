"""The files of an export that other tools read: configs, weights and settings under the names of those tools."""

from collections.abc import Container
from pathlib import Path

import torch
from torch import Tensor

from omni.common.files import write_json
from omni.data.audio import MelSpec
from omni.data.tokenizer import END, END_OF_TEXT, SPECIAL_TOKENS, Tokenizer
from omni.export.bundle import rounded, write_weights
from omni.export.folder import CONFIG, TOKENIZER, WEIGHTS
from omni.export.model_card import Part
from omni.models.architectures import ThinkerArchitecture
from omni.models.audio_encoder import mel_spec as audio_mel_spec
from omni.models.audio_encoder import parakeet_config, to_parakeet_state_dict
from omni.models.codec import mel_spec as codec_mel_spec


def write_model(
    folder: Path, config: dict, weights: dict[str, Tensor], dtype: torch.dtype, exact: Container[str] = ()
) -> None:
    """A folder that ``transformers`` opens: config and weights under its names."""
    folder.mkdir()
    write_json(folder / CONFIG, config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2)
    write_weights(folder / WEIGHTS, rounded(weights, dtype, exact))


def write_language(folder: Path, arch: ThinkerArchitecture, tokenizer: Tokenizer, template: str) -> None:
    """The tokenizer, the chat template of the Thinker's training, and the tokens that end an answer."""
    tokenizer.save(folder / TOKENIZER)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",  # an answer follows its prompt
        "additional_special_tokens": [name for name in SPECIAL_TOKENS if name not in (END, END_OF_TEXT)],
        "model_max_length": arch.ctx_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", settings, indent=2)
    ends = {"eos_token_id": [tokenizer.end_id, tokenizer.eos_id], "pad_token_id": tokenizer.eos_id}
    longest = min(128, arch.ctx_len // 2)
    write_json(folder / "generation_config.json", ends | {"do_sample": False, "max_new_tokens": longest}, indent=2)


def write_recogniser(folder: Path, part: Part, dtype: torch.dtype) -> None:
    """Stage B's audio encoder with its CTC head and tokenizer."""
    arch, weights = part.module.architecture, to_parakeet_state_dict(part.module)
    statistics = {name for name in weights if ".running_" in name}
    write_model(folder, parakeet_config(arch), weights, dtype, statistics)
    part.tokenizer.save(folder / TOKENIZER)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings, indent=2)
    write_json(folder / "preprocessor_config.json", log_mels(audio_mel_spec(arch), per_utterance=True), indent=2)


def preprocessing(parts: dict[str, Part]) -> dict:
    """Settings for making each part's input from a file."""
    settings = {}
    if "audio_encoder" in parts:
        spec = audio_mel_spec(parts["audio_encoder"].module.architecture)
        settings["audio_encoder"] = log_mels(spec, per_utterance=True)
    if "vision_encoder" in parts:
        settings["vision_encoder"] = image_processor(*parts["vision_encoder"].module.img_size)
    if "rvq" in parts:
        settings["rvq"] = log_mels(codec_mel_spec(parts["rvq"].module.architecture), per_utterance=False)
    if "ocr" in parts:
        arch = parts["ocr"].module.architecture
        fit = "keeping the proportions; the rest, on the right or above and below, has the background's colour"
        settings["ocr"] = image_processor(arch.height, arch.width) | {"do_pad": True, "fit": fit}
    return settings


def log_mels(spec: MelSpec, *, per_utterance: bool) -> dict:
    """Settings of the log-mels: see ``omni.data.audio.log_mel`` and, if ``per_utterance``, ``normalise_features``."""
    return {
        "sampling_rate": spec.sample_rate,
        "feature_size": spec.n_mels,
        "n_fft": spec.n_fft,
        "win_length": spec.win_length,
        "hop_length": spec.hop_length,
        "f_min": spec.f_min,
        "f_max": spec.f_max,
        "window": "hann",
        "mel_scale": "slaney, each filter of the same area",
        "spectrum": "amplitude",
        "logarithm": "natural, of at least 1e-5",
        "normalization": "each channel of an utterance to mean 0 and variance 1" if per_utterance else None,
    }


def image_processor(height: int, width: int) -> dict:
    """The processing of ``omni.data.images`` as settings of ``ViTImageProcessor``."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
