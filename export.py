"""Export the trained models into one folder that runs on its own; other tools open its parts.

    python export.py --omni_ckpt checkpoints/omni_sft_tiny --thinker_ckpt checkpoints/thinker_tiny \\
        --audio_ckpt checkpoints/audio_enc_tiny --vision_ckpt checkpoints/vision_tiny \\
        --talker_ckpt checkpoints/talker_tiny --output_dir merged_model

    python infer_chat.py --ckpt_dir merged_model

With --omni_ckpt, Thinker, encoders and projectors come from stage E; the folders of stages A to C must match it, and
add the metrics of their training. An export lacks the abilities of omitted stages. Transformers opens its sub-folders:
thinker/ with AutoModelForCausalLM, vision_encoder/ with ViTModel, audio_encoder/ with ParakeetForCTC and vocoder/ with
SpeechT5HifiGan; a vocoder with harmonic_source, which transformers does not know, is a program of torch.export there.
Two exports of the same checkpoints are the same bytes; a killed export leaves no partial one.
"""

import argparse
from pathlib import Path

import torch

from omni.common.errors import UserError
from omni.common.files import file_sha256, write_json
from omni.common.numerics import weights_sha256
from omni.data.tokenizer import chat_template
from omni.export.bundle import PARTS, STAGE_OF, buffers_of, rounded, write_weights
from omni.export.folder import (
    CONFIG,
    FORMAT,
    INFO,
    WEIGHTS,
    check_target,
    finite,
    info_sha256,
    is_own_file,
    new_folder,
    refuse_export,
)
from omni.export.hf import image_processor, preprocessing, write_language, write_model, write_recogniser
from omni.export.model_card import describe, loss_of_quality, model_card
from omni.export.parts import add_audio_encoder, add_speech, add_vision_encoder, answering_parts, load_part
from omni.export.program import write_program
from omni.models.thinker import qwen3_config, to_qwen3_state_dict
from omni.models.vision_encoder import to_vit_state_dict, vit_config
from omni.models.vocoder import speecht5_config, to_speecht5_state_dict
from omni.train.cli import OneLineErrors, launch

ALONE = [part for part in PARTS.values() if part.alone]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omni_ckpt", type=Path, metavar="DIR", help="stage E: the Thinker, encoders, projectors")
    parser.add_argument("--thinker_ckpt", type=Path, metavar="DIR", help="stage A; must match --omni_ckpt")
    parser.add_argument("--audio_ckpt", type=Path, metavar="DIR", help="stage B")
    parser.add_argument("--vision_ckpt", type=Path, metavar="DIR", help="stage C")
    parser.add_argument("--talker_ckpt", type=Path, metavar="DIR", help="stage D: talker and codec")
    parser.add_argument("--vocoder_ckpt", type=Path, metavar="DIR", help="stage F (without it: Griffin-Lim)")
    for part in ALONE:
        letter = STAGE_OF[part.name].letter
        parser.add_argument(part.option, type=Path, metavar="DIR", help=f"stage {letter}: {part.name}, {part.purpose}")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", required=True, help="a new or empty folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16: half the size, slightly worse")
    parser.add_argument("--force", action="store_true", help="replace an earlier export in --output_dir")
    args = parser.parse_args(argv)
    if args.omni_ckpt is None and args.thinker_ckpt is None:
        raise UserError("--omni_ckpt, --thinker_ckpt: expected one or both, found neither")
    for option, value in vars(args).items():
        if option.endswith("_ckpt") and value is not None:
            refuse_export(value, f"--{option}")
    if args.vocoder_ckpt is not None and args.talker_ckpt is None:
        raise UserError("--vocoder_ckpt: expected --talker_ckpt beside it, whose log-mels the vocoder reads")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_target(args.output_dir, args.force)

    # --- The trained parts, which must fit together --------------------------------------------------------------
    parts, sft, architecture = answering_parts(args)
    recogniser = add_audio_encoder(args, parts, sft)
    add_vision_encoder(args, parts, sft)
    add_speech(args, parts, sft)
    for part in ALONE:
        if (source := getattr(args, part.option.strip("-"))) is not None:
            parts[part.name] = load_part(part.name, source)
    thinker, tokenizer = parts["thinker"].module, parts["thinker"].tokenizer
    dtype, template = DTYPES[args.dtype], chat_template(sft.prompt if sft else "")

    info = {"components": {name: describe(name, part) for name, part in parts.items()}}  # before they are rounded

    # --- One folder, whole or not at all -----------------------------------------------------------------------------
    with new_folder(args.output_dir, args.force) as folder:
        weights = {}
        for name, part in parts.items():
            own = rounded(part.module.state_dict(), dtype, exact=buffers_of(part.module))
            weights |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        write_weights(folder / WEIGHTS, weights)
        about = {"model_type": "micro_omni", "format": FORMAT, "dtype": args.dtype}
        sizes = {name: part.sizes for name, part in parts.items()}
        omni = None
        if sft is not None:
            origins = dict(sft.origins)
            if "codec" in origins and "rvq" in parts:  # as it is written here: speech compares it
                codec = parts["rvq"].module
                codec.load_state_dict(rounded(codec.state_dict(), dtype, exact=buffers_of(codec)))
                origins["exported_codec"] = weights_sha256(codec)
            omni = {"architecture": architecture.model_dump(), "prompt": sft.prompt, "origins": origins}
        write_json(folder / CONFIG, about | {"parts": sizes, "omni": omni}, indent=2)
        write_json(folder / "preprocessor_config.json", preprocessing(parts), indent=2)
        write_language(folder, thinker.architecture, tokenizer, template)

        # --- The parts once more, under the names of other tools -----------------------------------------------------
        qwen3 = qwen3_config(thinker.architecture, tokenizer.vocab_size, tokenizer.end_id)
        write_model(folder / "thinker", qwen3, to_qwen3_state_dict(thinker.state_dict()), dtype)
        write_language(folder / "thinker", thinker.architecture, tokenizer, template)
        if "vision_encoder" in parts:
            vit = parts["vision_encoder"].module
            write_model(folder / "vision_encoder", vit_config(vit), to_vit_state_dict(vit.state_dict()), dtype)
            write_json(folder / "vision_encoder" / "preprocessor_config.json", image_processor(*vit.img_size), indent=2)
        if recogniser is not None:
            write_recogniser(folder / "audio_encoder", recogniser, dtype)
        if "vocoder" in parts:
            vocoder = parts["vocoder"].module
            statistics = buffers_of(vocoder)
            if vocoder.architecture.harmonic_source:
                vocoder.load_state_dict(rounded(vocoder.state_dict(), dtype, statistics))
                write_program(folder / "vocoder", vocoder)
            else:
                config = speecht5_config(vocoder.architecture)
                write_model(folder / "vocoder", config, to_speecht5_state_dict(vocoder), dtype, statistics)

        # --- Model card, and the digest of every file ----------------------------------------------------------------
        info = about | info
        if dtype != torch.float32:
            info["loss_of_quality"] = loss_of_quality(thinker, tokenizer, dtype)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        (folder / "README.md").write_text(model_card(info, names), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if is_own_file(path.relative_to(folder).as_posix()))
        info["files"] = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        info["sha256"] = info_sha256(info)
        write_json(folder / INFO, finite(info), indent=2)
        megabytes = sum(path.stat().st_size for path in files) / 1e6
    for name, facts in info["components"].items():
        print(f"{name:<16}{facts['parameters']:>13,} parameters  {facts['source']}, step {facts['step']}")
    print(f"{args.output_dir}: {megabytes:.1f} MB. Try: python infer_chat.py --ckpt_dir {args.output_dir}")


if __name__ == "__main__":
    launch(main)
