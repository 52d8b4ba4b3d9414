"""Put what was trained into one folder that runs by itself, and whose parts other tools open as they are.

    python export.py --omni_ckpt checkpoints/omni_sft_tiny --thinker_ckpt checkpoints/thinker_tiny \\
        --audio_ckpt checkpoints/audio_enc_tiny --vision_ckpt checkpoints/vision_tiny \\
        --talker_ckpt checkpoints/talker_tiny --output_dir merged_model

    python infer_chat.py --ckpt_dir merged_model

With --omni_ckpt, the Thinker is the one that stage E has made of stage A's, with what it sees and hears through; the
folders of stages A to C are then compared with it, and the figures of their own training are taken over. What is left
out, the export cannot do. Inside it, thinker/ opens with transformers' AutoModelForCausalLM, vision_encoder/ with
ViTModel, audio_encoder/ with ParakeetForCTC and vocoder/ with SpeechT5HifiGan. Two exports of the same checkpoints are
the same bytes; a killed one leaves nothing that could be taken for an export.
"""

import argparse
import sys
from collections.abc import Container
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from omni.audio import MelSpec
from omni.audio_encoder import mel_spec as audio_mel_spec
from omni.audio_encoder import parakeet_config, to_parakeet_state_dict
from omni.checkpoint import load_stage, load_weights
from omni.codec import fingerprint
from omni.codec import mel_spec as codec_mel_spec
from omni.config import (
    AudioEncoderArchitecture,
    AudioEncoderConfig,
    CodecArchitecture,
    CodecConfig,
    OcrArchitecture,
    OcrConfig,
    SftConfig,
    StageConfig,
    TalkerConfig,
    TextConfig,
    ThinkerArchitecture,
    VisionConfig,
    VocoderConfig,
    refuse_others,
    sizes_of,
)
from omni.ctc import CtcTokenizer
from omni.errors import UserError
from omni.files import file_sha256
from omni.merged import (
    BUILD,
    CONFIG,
    FORMAT,
    INFO,
    LOCK,
    TOKENIZER,
    WEIGHTS,
    audio_architecture,
    buffers_of,
    check_target,
    info_sha256,
    new_folder,
    rounded,
    weights_sha256,
    write_json,
    write_weights,
)
from omni.model_card import Part, describe, figures, loss_of_quality, model_card
from omni.omni_model import VIT_SIZES, load_omni
from omni.runtime import OneLineErrors, launch
from omni.thinker import qwen3_config, to_qwen3_state_dict
from omni.tokenizer import END, END_OF_TEXT, SPECIAL_TOKENS, Tokenizer, chat_template
from omni.vision_encoder import to_vit_state_dict, vit_config
from omni.vocoder import Generator, fold_weight_norm, refuse_other_mels, speecht5_config, to_speecht5_state_dict

# part -> stage in the checkpoint, prefix of its step files, final file, its config, what of that are sizes
STAGES: dict[str, tuple[str, str, str, type[StageConfig], type[BaseModel] | None]] = {
    "thinker": ("text", "thinker", "thinker.pt", TextConfig, ThinkerArchitecture),
    "audio_encoder": ("audio_enc", "audio_enc", "audio_enc.pt", AudioEncoderConfig, AudioEncoderArchitecture),
    "vision_encoder": ("vision", "vision", "vision.pt", VisionConfig, None),
    "talker": ("talker", "talker", "talker.pt", TalkerConfig, TalkerConfig),
    "rvq": ("codec", "rvq_codec", "rvq_codec.pt", CodecConfig, CodecArchitecture),
    "vocoder": ("vocoder", "hifigan", "hifigan.pt", VocoderConfig, VocoderConfig),
    "ocr": ("ocr", "ocr", "ocr.pt", OcrConfig, OcrArchitecture),
}
# sizes that the weights do not depend on: stage E may have others than stage A
UNWEIGHTED = ("ctx_len", "dropout", "router_aux_loss_coef")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omni_ckpt", type=Path, metavar="DIR", help="stage E: the Thinker that sees and hears")
    parser.add_argument("--thinker_ckpt", type=Path, metavar="DIR", help="stage A; beside --omni_ckpt compared with it")
    parser.add_argument("--audio_ckpt", type=Path, metavar="DIR", help="stage B")
    parser.add_argument("--vision_ckpt", type=Path, metavar="DIR", help="stage C")
    parser.add_argument("--talker_ckpt", type=Path, metavar="DIR", help="stage D: talker and codec")
    parser.add_argument("--vocoder_ckpt", type=Path, metavar="DIR", help="stage F (without it: Griffin-Lim)")
    parser.add_argument("--ocr_ckpt", type=Path, metavar="DIR", help="stage G")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", required=True, help="a new or empty folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16: half the size, a little worse")
    parser.add_argument("--force", action="store_true", help="replace an earlier export in --output_dir")
    args = parser.parse_args(argv)
    if args.omni_ckpt is None and args.thinker_ckpt is None:
        raise UserError("--omni_ckpt, --thinker_ckpt: expected one or both, found neither: who else should answer?")
    if args.vocoder_ckpt is not None and args.talker_ckpt is None:
        raise UserError("--vocoder_ckpt: expected --talker_ckpt beside it, whose log-mels it turns into sound")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_target(args.output_dir, args.force)

    # --- What was trained, and whether it fits together --------------------------------------------------------------
    parts, tokenizer, sft = gather_answering(args)
    recogniser = gather_hearing(args, parts, sft)
    gather_seeing(args, parts, sft)
    gather_speaking(args, parts, sft)
    if args.ocr_ckpt is not None:
        parts["ocr"] = load_part("ocr", args.ocr_ckpt)
    thinker, dtype, template = parts["thinker"].module, DTYPES[args.dtype], chat_template(sft.prompt if sft else "")

    # --- One folder, whole or not at all -----------------------------------------------------------------------------
    with new_folder(args.output_dir, args.force) as folder:
        weights = {}
        for name, part in parts.items():
            own = rounded(part.module.state_dict(), dtype, exact=buffers_of(part.module))
            weights |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        write_weights(folder / WEIGHTS, weights)
        about = {"model_type": "micro_omni", "format": FORMAT, "dtype": args.dtype}
        sizes = {name: part.sizes for name, part in parts.items()}
        write_json(folder / CONFIG, about | {"parts": sizes, "omni": sizes_of(SftConfig, sft) if sft else None})
        write_json(folder / "preprocessor_config.json", preprocessing(parts))
        write_language(folder, thinker.arch, tokenizer, template)

        # --- Its parts once more, under the names of other tools -----------------------------------------------------
        qwen3 = qwen3_config(thinker.arch, tokenizer.vocab_size, tokenizer.end_id)
        write_model(folder / "thinker", qwen3, to_qwen3_state_dict(thinker.state_dict()), dtype)
        write_language(folder / "thinker", thinker.arch, tokenizer, template)
        if "vision_encoder" in parts:
            vit = parts["vision_encoder"].module
            write_model(folder / "vision_encoder", vit_config(vit), to_vit_state_dict(vit.state_dict()), dtype)
            write_json(folder / "vision_encoder" / "preprocessor_config.json", image_processor(*vit.img_size))
        if recogniser is not None:
            write_recogniser(folder / "audio_encoder", *recogniser, dtype)
        if "vocoder" in parts:
            vocoder = parts["vocoder"].module
            config, statistics = speecht5_config(vocoder.config), buffers_of(vocoder)
            write_model(folder / "vocoder", config, to_speecht5_state_dict(vocoder), dtype, statistics)

        # --- What it is, and what every file must be -----------------------------------------------------------------
        info = about | {"components": {name: describe(name, part) for name, part in parts.items()}}
        if dtype != torch.float32:
            info["loss_of_quality"] = loss_of_quality(thinker, tokenizer, dtype)
        subfolders = {path.name for path in folder.iterdir() if path.is_dir()}
        (folder / "README.md").write_text(model_card(info, subfolders), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
        info["files"] = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        info["sha256"] = info_sha256(info)
        write_json(folder / INFO, info)
        megabytes = sum(path.stat().st_size for path in files) / 1e6
    for name, facts in info["components"].items():
        print(f"{name:<16}{facts['parameters']:>13,} parameters  {facts['source']}, step {facts['step']}")
    print(f"{args.output_dir}: {megabytes:.1f} MB. Try: python infer_chat.py --ckpt_dir {args.output_dir}")


# --- Gathering: each function adds its parts, and refuses what does not fit to those before ---------------------------


def load_part(name: str, folder: Path) -> Part:
    """A part as its own stage left it, in evaluation mode.

    Raises:
        UserError: nothing there, damaged, or of another stage.
    """
    stage, prefix, final, cls, sizes_cls = STAGES[name]
    saved, file = load_saved(folder, stage, prefix, final)
    config, weights = cls.model_validate(saved["config"]), saved["model"]
    sizes = {} if sizes_cls is None else sizes_of(sizes_cls, config)
    if name == "vision_encoder":  # of stage C's two towers the one that sees
        sizes = {key: getattr(config, key) for key in VIT_SIZES}
        weights = {key.removeprefix("vit."): value for key, value in weights.items() if key.startswith("vit.")}
    if name == "audio_encoder":
        n_tokens = CtcTokenizer.load(folder / TOKENIZER).vocab_size
        sizes |= {"max_mel_length": config.max_mel_length, "n_tokens": n_tokens}
    module = Generator(config) if name == "vocoder" else BUILD[name](sizes)
    load_weights(module, weights, folder / file)
    if name == "vocoder":  # in training, direction and length of a weight are two tensors
        fold_weight_norm(module)
    return Part(module.eval(), sizes, stage, file, saved["step"], saved["metrics"])


def load_saved(folder: Path, stage: str, prefix: str, final: str) -> tuple[dict, str]:
    """What ``load_stage`` finds, and in which file; a stage that is still in training is told of on stderr."""
    finished = (folder / final).exists()
    saved = load_stage(folder, stage, prefix, final)
    file = final if finished else f"{prefix}_step_{saved['step']}.pt"
    if not finished:
        print(f"{folder}: no {final} yet, exporting {file}", file=sys.stderr)
    return saved, file


def gather_answering(args: argparse.Namespace) -> tuple[dict[str, Part], Tokenizer, SftConfig | None]:
    """The Thinker and its tokenizer; with stage E also what it sees and hears through, and that stage's config."""
    if args.thinker_ckpt is not None:
        thinker, tokenizer = load_part("thinker", args.thinker_ckpt), Tokenizer.load(args.thinker_ckpt / TOKENIZER)
        if tokenizer.vocab_size != thinker.sizes["vocab_size"]:
            raise UserError(
                f"{args.thinker_ckpt / TOKENIZER}: expected {thinker.sizes['vocab_size']} entries as in the model, "
                f"found {tokenizer.vocab_size}. The two files are not of one run"
            )
    if args.omni_ckpt is None:
        say("no --omni_ckpt: this export answers to text alone, and neither sees nor hears")
        return {"thinker": thinker}, tokenizer, None
    omni, omni_tokenizer, config = load_omni(args.omni_ckpt, torch.device("cpu"))
    saved, file = load_saved(args.omni_ckpt, "omni", "omni", "omni_final.pt")
    if args.thinker_ckpt is not None:
        if tokenizer.fingerprint != omni_tokenizer.fingerprint:
            raise UserError(
                f"{args.omni_ckpt}: made of another Thinker than that of {args.thinker_ckpt}: their tokenizers differ"
            )
        refuse_others(args.omni_ckpt, config.parts["thinker"], args.thinker_ckpt, thinker.sizes, UNWEIGHTED)
        if config.origins and config.origins["thinker"] != fingerprint(thinker.module):
            raise UserError(
                f"{args.omni_ckpt}: made of another Thinker than that of {args.thinker_ckpt}: their weights differ. "
                "Give the folder that it was made of, or leave --thinker_ckpt out"
            )
    parts = {
        name: Part(module, config.parts.get(name, {}), "omni", file, saved["step"], saved["metrics"])
        for name, module in omni.named_children()
    }
    return parts, omni_tokenizer, config


def gather_hearing(
    args: argparse.Namespace, parts: dict[str, Part], sft: SftConfig | None
) -> tuple[Part, CtcTokenizer] | None:
    """The audio encoder. Returned is the one of stage B, which writes down speech, with its text units."""
    if args.audio_ckpt is None:
        if "audio_encoder" in parts:
            say("no --audio_ckpt: the audio encoder is exported without its text units, so not for ParakeetForCTC")
        return None
    recogniser, tokenizer = load_part("audio_encoder", args.audio_ckpt), CtcTokenizer.load(args.audio_ckpt / TOKENIZER)
    if adopt("audio_encoder", recogniser, args.audio_ckpt, args, parts, sft):
        measured = figures("audio_encoder", recogniser.metrics) or "not measured"
        origin = f"{recogniser.file}, step {recogniser.step}: {measured}"
        parts["audio_encoder"].notes.append(f"audio_encoder/ has stage B's, which writes down speech ({origin})")
    return recogniser, tokenizer


def gather_seeing(args: argparse.Namespace, parts: dict[str, Part], sft: SftConfig | None) -> None:
    if args.vision_ckpt is not None:
        vit = load_part("vision_encoder", args.vision_ckpt)
        adopt("vision_encoder", vit, args.vision_ckpt, args, parts, sft)


def adopt(
    name: str, encoder: Part, folder: Path, args: argparse.Namespace, parts: dict[str, Part], sft: SftConfig | None
) -> bool:
    """Add the encoder of stage B or C to ``parts``; one that stage E has brought must have been made of it.

    Returns:
        whether stage E has trained it further, so that its own stays.

    Raises:
        UserError: stage E was made with another one.
    """
    if name not in parts:
        if sft is not None:
            encoder.notes.append("stage E had no use for it, so it is not connected to the Thinker")
        parts[name] = encoder
        return False
    refuse_others(args.omni_ckpt, parts[name].sizes, folder, encoder.sizes, ("dropout", "max_mel_length"))
    changed = weights_sha256(parts[name].module.state_dict()) != weights_sha256(encoder.module.state_dict())
    if changed and sft.freeze_encoders:
        raise UserError(
            f"{args.omni_ckpt}: its {name}, which stage E did not train (freeze_encoders), is not the one of {folder}. "
            "Give the folder that it was made of"
        )
    if changed:
        parts[name].notes.append("trained further by stage E")
    else:
        parts[name] = encoder
    return changed


def gather_speaking(args: argparse.Namespace, parts: dict[str, Part], sft: SftConfig | None) -> None:
    """Talker and codec, and what turns their log-mels into sound."""
    if args.talker_ckpt is None:
        say("no --talker_ckpt: this export does not speak")
        return
    talker, codec = load_part("talker", args.talker_ckpt), load_part("rvq", args.talker_ckpt)
    refuse_others(args.talker_ckpt / talker.file, talker.sizes, args.talker_ckpt / codec.file, codec.sizes)
    if "talker" in parts:  # stage E's, which hears the Thinker
        if sft.origins["codec"] != fingerprint(codec.module):
            raise UserError(
                f"{args.omni_ckpt}: its talker speaks in the codes of another codec than that of {args.talker_ckpt}. "
                "Give the folder that it was made of"
            )
        parts["talker"].notes.append(f"made of {talker.file}, step {talker.step}: {figures('talker', talker.metrics)}")
        parts["talker"].notes.append("has learnt in stage E to hear what the Thinker thinks while it answers")
        talker = parts["talker"]
    parts |= {"talker": talker, "rvq": codec}
    if args.vocoder_ckpt is None:
        say("no --vocoder_ckpt: speech will be made by Griffin-Lim")
        return
    parts["vocoder"] = load_part("vocoder", args.vocoder_ckpt)
    reads, writes = parts["vocoder"].module.config, codec_mel_spec(codec.module.arch)
    refuse_other_mels(args.vocoder_ckpt, reads, args.talker_ckpt, writes)


def say(notice: str) -> None:
    print(notice, file=sys.stderr)


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_model(
    folder: Path, config: dict, weights: dict[str, Tensor], dtype: torch.dtype, exact: Container[str] = ()
) -> None:
    """A folder that ``transformers`` opens: sizes and weights under its names."""
    folder.mkdir()
    write_json(folder / CONFIG, config | {"dtype": str(dtype).removeprefix("torch.")})
    write_weights(folder / WEIGHTS, rounded(weights, dtype, exact))


def write_language(folder: Path, arch: ThinkerArchitecture, tokenizer: Tokenizer, template: str) -> None:
    """The tokenizer, the chat format that the Thinker was trained with, and how an answer ends."""
    tokenizer.save(folder / TOKENIZER)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [name for name in SPECIAL_TOKENS if name not in (END, END_OF_TEXT)],
        "model_max_length": arch.ctx_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", settings)
    ends = {"eos_token_id": [tokenizer.end_id, tokenizer.eos_id], "pad_token_id": tokenizer.eos_id}
    longest = min(128, arch.ctx_len // 2)
    write_json(folder / "generation_config.json", ends | {"do_sample": False, "max_new_tokens": longest})


def write_recogniser(folder: Path, part: Part, tokenizer: CtcTokenizer, dtype: torch.dtype) -> None:
    """The audio encoder as it was trained to write down speech, with its text units."""
    arch, weights = audio_architecture(part.sizes), to_parakeet_state_dict(part.module)
    statistics = {name for name in weights if ".running_" in name}
    write_model(folder, parakeet_config(arch, tokenizer.vocab_size), weights, dtype, statistics)
    tokenizer.save(folder / TOKENIZER)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "preprocessor_config.json", log_mels(audio_mel_spec(arch), per_utterance=True))


def preprocessing(parts: dict[str, Part]) -> dict:
    """What becomes of a file before a part gets to see it, part by part."""
    settings = {}
    if "audio_encoder" in parts:
        spec = audio_mel_spec(audio_architecture(parts["audio_encoder"].sizes))
        settings["audio_encoder"] = log_mels(spec, per_utterance=True)
    if "vision_encoder" in parts:
        settings["vision_encoder"] = image_processor(*parts["vision_encoder"].module.img_size)
    if "rvq" in parts:
        settings["rvq"] = log_mels(codec_mel_spec(parts["rvq"].module.arch), per_utterance=False)
    if "ocr" in parts:
        arch = parts["ocr"].module.arch
        fit = "keeping the proportions; what is left over, on the right or above and below, is the background's colour"
        settings["ocr"] = image_processor(arch.height, arch.width) | {"do_pad": True, "fit": fit}
    return settings


def log_mels(spec: MelSpec, *, per_utterance: bool) -> dict:
    """How log-mels are made: see ``omni.audio.log_mel`` and, if ``per_utterance``, ``normalise_features``."""
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
    """What ``omni.images`` does to a picture, in the words of ``ViTImageProcessor``."""
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


if __name__ == "__main__":
    launch(main)
