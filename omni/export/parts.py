"""The parts of an export, from the folders of their stages: each function adds some, and checks that all fit."""

import argparse
import sys
from pathlib import Path

import torch
from pydantic import BaseModel

from omni.common.errors import UserError, check_compatible
from omni.data.tokenizer import Tokenizer
from omni.export.bundle import BUILD, weights_sha256
from omni.export.folder import TOKENIZER
from omni.export.model_card import Part, figures
from omni.models.architectures import (
    AudioEncoderArchitecture,
    OcrArchitecture,
    ThinkerArchitecture,
    VisionArchitecture,
)
from omni.models.codec import fingerprint
from omni.models.codec import mel_spec as codec_mel_spec
from omni.models.ctc import CtcTokenizer
from omni.models.omni_architecture import OmniArchitecture
from omni.models.speech_architectures import CodecArchitecture
from omni.models.vocoder import Generator, fold_weight_norm, refuse_other_mels
from omni.stages.audio_encoder import AudioEncoderConfig
from omni.stages.ocr import OcrConfig
from omni.stages.omni import SftConfig
from omni.stages.omni_parts import load_omni
from omni.stages.talker import CodecConfig, TalkerConfig
from omni.stages.text import TextConfig
from omni.stages.vision import VisionConfig
from omni.stages.vocoder import VocoderConfig
from omni.train.checkpoint import build, load_stage, saved_config
from omni.train.config import StageConfig, sizes_of

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
MAY_DIFFER = ("dropout", "max_mel_length", "ctc_vocab_size")  # of encoders; the last is an upper bound in stage B
# no weight depends on these sizes: stage E's may differ from stage A's
UNWEIGHTED = ("ctx_len", "dropout", "router_aux_loss_coef")


def load_part(name: str, folder: Path) -> Part:
    """The part that its own stage has trained, in evaluation mode.

    Raises:
        UserError: nothing there, damaged, or of another stage.
    """
    stage, prefix, final, cls, sizes_cls = STAGES[name]
    saved, file = load_saved(folder, stage, prefix, final)
    config, weights = saved_config(cls, saved), saved["model"]
    sizes = {} if sizes_cls is None else sizes_of(sizes_cls, config)
    if name == "vision_encoder":  # of stage C's two towers the one that sees
        sizes = {key: getattr(config, key) for key in VisionArchitecture.model_fields}
        weights = {key.removeprefix("vit."): value for key, value in weights.items() if key.startswith("vit.")}
    if name == "audio_encoder":
        n_tokens = CtcTokenizer.load(folder / TOKENIZER).vocab_size
        sizes |= {"max_mel_length": config.max_mel_length, "n_tokens": n_tokens}
    module = build(
        lambda: Generator(config.architecture) if name == "vocoder" else BUILD[name](sizes), weights, saved["path"]
    )
    if name == "vocoder":  # in training, direction and length of a weight are two tensors
        fold_weight_norm(module)
    return Part(module.eval(), sizes, stage, file, saved["step"], saved["metrics"])


def load_saved(folder: Path, stage: str, prefix: str, final: str) -> tuple[dict, str]:
    """What ``load_stage`` finds, and the name of the file; that the stage is still in training goes to stderr."""
    finished = (folder / final).exists()
    saved = load_stage(folder, stage, prefix, final)
    file = final if finished else f"{prefix}_step_{saved['step']}.pt"
    if not finished:
        notice(f"{folder}: no {final} yet, exporting {file}")
    if saved["files"] is None and (folder / TOKENIZER).exists():
        notice(f"{folder / file}: of an earlier version, without the checksum of {TOKENIZER}, which is taken as it is")
    return saved, file


def answering_parts(
    args: argparse.Namespace,
) -> tuple[dict[str, Part], Tokenizer, SftConfig | None, OmniArchitecture | None]:
    """The Thinker and its tokenizer; with stage E also the encoders and projectors, and that stage's config and
    architecture."""
    if args.thinker_ckpt is not None:
        thinker, tokenizer = load_part("thinker", args.thinker_ckpt), Tokenizer.load(args.thinker_ckpt / TOKENIZER)
        if tokenizer.vocab_size != thinker.sizes["vocab_size"]:
            raise UserError(
                f"{args.thinker_ckpt / TOKENIZER}: expected {thinker.sizes['vocab_size']} entries as in the model, "
                f"found {tokenizer.vocab_size}. The two files are not of one run"
            )
    if args.omni_ckpt is None:
        notice("no --omni_ckpt: this export answers text alone, without pictures or recordings")
        return {"thinker": thinker}, tokenizer, None, None
    omni, omni_tokenizer, config = load_omni(args.omni_ckpt, torch.device("cpu"))
    saved, file = load_saved(args.omni_ckpt, "omni", "omni", "omni_final.pt")
    if args.thinker_ckpt is not None:
        if tokenizer.fingerprint != omni_tokenizer.fingerprint:
            raise UserError(
                f"{args.omni_ckpt}: another Thinker than that of {args.thinker_ckpt}: their tokenizers differ"
            )
        check_compatible(
            args.omni_ckpt, omni.architecture.parts["thinker"], args.thinker_ckpt, thinker.sizes, UNWEIGHTED
        )
        if config.origins and config.origins["thinker"] != fingerprint(thinker.module):
            raise UserError(
                f"{args.omni_ckpt}: another Thinker than that of {args.thinker_ckpt}: their weights differ. "
                "Give the folder that stage E used, or leave --thinker_ckpt out"
            )
    sizes = omni.architecture.parts
    if "audio_encoder" in sizes:
        n_tokens, longest = sizes["audio_encoder"]["ctc_vocab_size"], omni.architecture.max_mel_length
        sizes["audio_encoder"] |= {"n_tokens": n_tokens, "max_mel_length": longest}
    parts = {
        name: Part(module, sizes.get(name, {}), "omni", file, saved["step"], saved["metrics"])
        for name, module in omni.named_children()
    }
    return parts, omni_tokenizer, config, omni.architecture


def add_audio_encoder(
    args: argparse.Namespace, parts: dict[str, Part], sft: SftConfig | None
) -> tuple[Part, CtcTokenizer] | None:
    """Add the audio encoder. Returns stage B's, which transcribes speech, with its CTC tokenizer."""
    if args.audio_ckpt is None:
        if "audio_encoder" in parts:
            notice("no --audio_ckpt: the audio encoder has no CTC tokenizer, so not for ParakeetForCTC")
        return None
    recogniser, tokenizer = load_part("audio_encoder", args.audio_ckpt), CtcTokenizer.load(args.audio_ckpt / TOKENIZER)
    if add_encoder("audio_encoder", recogniser, args.audio_ckpt, args, parts, sft):
        measured = figures("audio_encoder", recogniser.metrics) or "not measured"
        origin = f"{recogniser.file}, step {recogniser.step}: {measured}"
        parts["audio_encoder"].notes.append(f"audio_encoder/ has stage B's, which transcribes speech ({origin})")
    return recogniser, tokenizer


def add_vision_encoder(args: argparse.Namespace, parts: dict[str, Part], sft: SftConfig | None) -> None:
    if args.vision_ckpt is not None:
        vit = load_part("vision_encoder", args.vision_ckpt)
        add_encoder("vision_encoder", vit, args.vision_ckpt, args, parts, sft)


def add_encoder(
    name: str, encoder: Part, folder: Path, args: argparse.Namespace, parts: dict[str, Part], sft: SftConfig | None
) -> bool:
    """Add the encoder of stage B or C to ``parts``. If stage E has brought one, that must come from this one.

    Returns:
        whether stage E has trained it further, so that stage E's stays in ``parts``.

    Raises:
        UserError: stage E has used another encoder.
    """
    if name not in parts:
        if sft is not None:
            encoder.notes.append("stage E did not use it, so it is not connected to the Thinker")
        parts[name] = encoder
        return False
    check_compatible(args.omni_ckpt, parts[name].sizes, folder, encoder.sizes, MAY_DIFFER)
    changed = weights_sha256(parts[name].module.state_dict()) != weights_sha256(encoder.module.state_dict())
    if changed and sft.freeze_encoders:
        raise UserError(
            f"{args.omni_ckpt}: its {name}, which stage E did not train (freeze_encoders), is not the one of {folder}. "
            "Give the folder that stage E used"
        )
    if changed:
        parts[name].notes.append("trained further by stage E")
    else:
        parts[name] = encoder
    return changed


def add_speech(args: argparse.Namespace, parts: dict[str, Part], sft: SftConfig | None) -> None:
    """Add talker, codec and vocoder."""
    if args.talker_ckpt is None:
        notice("no --talker_ckpt: this export has no speech")
        return
    talker, codec = load_part("talker", args.talker_ckpt), load_part("rvq", args.talker_ckpt)
    check_compatible(args.talker_ckpt / talker.file, talker.sizes, args.talker_ckpt / codec.file, codec.sizes)
    if "talker" in parts:  # stage E's, which is conditioned on the Thinker's states
        if sft.origins["codec"] != fingerprint(codec.module):
            raise UserError(
                f"{args.omni_ckpt}: its talker predicts the codes of another codec than that of {args.talker_ckpt}. "
                "Give the folder that stage E used"
            )
        parts["talker"].notes.append(f"from {talker.file}, step {talker.step}: {figures('talker', talker.metrics)}")
        parts["talker"].notes.append("conditioned in stage E on the Thinker's states of the answer")
        talker = parts["talker"]
    parts |= {"talker": talker, "rvq": codec}
    if args.vocoder_ckpt is None:
        notice("no --vocoder_ckpt: speech will be made by Griffin-Lim")
        return
    parts["vocoder"] = load_part("vocoder", args.vocoder_ckpt)
    reads, writes = parts["vocoder"].module.architecture, codec_mel_spec(codec.module.architecture)
    refuse_other_mels(args.vocoder_ckpt, reads, args.talker_ckpt, writes)


def notice(text: str) -> None:
    print(text, file=sys.stderr)
