"""The parts of an export, from the folders of their stages: each function adds some, and checks that all fit."""

import argparse
import sys
from pathlib import Path

from omni.common.errors import UserError, check_compatible
from omni.common.numerics import weights_sha256
from omni.export.bundle import STAGE_OF, open_model
from omni.export.model_card import Part, figures
from omni.models.codec import mel_spec as codec_mel_spec
from omni.models.omni_architecture import OmniArchitecture
from omni.models.vocoder import refuse_other_mels
from omni.stages import STAGES
from omni.stages.omni import SftConfig
from omni.stages.omni_parts import began_with
from omni.train.stage import Loaded, Stage

MAY_DIFFER = ("dropout",)  # of encoders
# no weight depends on these sizes: stage E's may differ from stage A's
UNWEIGHTED = ("ctx_len", "dropout", "router_aux_loss_coef")


def load_part(name: str, folder: Path) -> Part:
    """The part that its own stage has trained, in evaluation mode.

    Raises:
        UserError: nothing there, damaged, or of another stage.
    """
    opened, stage = open_model(name, folder), STAGE_OF[name]
    notice_unfinished(opened, stage)
    return Part(
        opened.model, opened.architecture.model_dump(), stage.name, opened.path.name, opened.step, opened.metrics,
        config=opened.config, tokenizer=opened.tokenizer,
    )  # fmt: skip


def notice_unfinished(opened: Loaded, stage: Stage) -> None:
    if not opened.path.with_name(stage.final).exists():
        notice(f"{opened.path.parent}: no {stage.final} yet, exporting {opened.path.name}")


def answering_parts(args: argparse.Namespace) -> tuple[dict[str, Part], SftConfig | None, OmniArchitecture | None]:
    """The Thinker; with stage E also the encoders and projectors, and that stage's config and architecture."""
    if args.thinker_ckpt is not None:
        thinker = load_part("thinker", args.thinker_ckpt)
    if args.omni_ckpt is None:
        notice("no --omni_ckpt: this export answers text alone, without pictures or recordings")
        return {"thinker": thinker}, None, None
    opened, stage = open_model("omni", args.omni_ckpt), STAGES["omni"]
    notice_unfinished(opened, stage)
    omni, config = opened.model, opened.config_as(SftConfig)
    if args.thinker_ckpt is not None:
        if thinker.tokenizer.fingerprint != opened.tokenizer.fingerprint:
            raise UserError(
                f"{args.omni_ckpt}: another Thinker than that of {args.thinker_ckpt}: their tokenizers differ"
            )
        sizes = omni.thinker.architecture.model_dump()
        check_compatible(args.omni_ckpt, sizes, args.thinker_ckpt, thinker.sizes, UNWEIGHTED)
        if config.origins and config.origins["thinker"] != weights_sha256(thinker.module):
            raise UserError(
                f"{args.omni_ckpt}: another Thinker than that of {args.thinker_ckpt}: their weights differ. "
                "Give the folder that stage E used, or leave --thinker_ckpt out"
            )
    parts = {}
    for name, module in omni.named_children():
        sizes = {} if STAGE_OF[name] is stage else module.architecture.model_dump()  # of projectors: in "omni"
        parts[name] = Part(module, sizes, stage.name, opened.path.name, opened.step, opened.metrics)
    parts["thinker"].tokenizer = opened.tokenizer
    return parts, config, omni.architecture


def add_audio_encoder(args: argparse.Namespace, parts: dict[str, Part], sft: SftConfig | None) -> Part | None:
    """Add the audio encoder. Returns stage B's, which transcribes speech."""
    if args.audio_ckpt is None:
        if "audio_encoder" in parts:
            notice("no --audio_ckpt: the audio encoder has no CTC tokenizer, so not for ParakeetForCTC")
        return None
    recogniser = load_part("audio_encoder", args.audio_ckpt)
    if add_encoder("audio_encoder", recogniser, args.audio_ckpt, args, parts, sft):
        measured = figures("audio_encoder", recogniser.metrics) or "not measured"
        origin = f"{recogniser.file}, step {recogniser.step}: {measured}"
        parts["audio_encoder"].notes.append(f"audio_encoder/ has stage B's, which transcribes speech ({origin})")
    return recogniser


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
    changed = weights_sha256(parts[name].module) != weights_sha256(encoder.module)
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
    check_compatible(args.talker_ckpt / talker.file, talker.config, args.talker_ckpt / codec.file, codec.sizes)
    if "talker" in parts:  # stage E's, which is conditioned on the Thinker's states
        if sft.origins["codec"] != weights_sha256(codec.module):
            raise UserError(
                f"{args.omni_ckpt}: its talker predicts the codes of another codec than that of {args.talker_ckpt}. "
                "Give the folder that stage E used"
            )
        if not began_with(sft.origins, args.talker_ckpt, parts["talker"].module):
            notice(f"{args.talker_ckpt}: its talker is not the one that stage E has; the export has stage E's")
        else:
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
