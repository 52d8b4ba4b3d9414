"""Stage D: train the speech codec, then an aligner, then the talker, which turns a text into the codec's codes.

    python train_talker.py --config configs/talker_tiny.json

The data are texts and recordings, with voice_layers of the voices in the column speaker. First the codec learns to
encode log-mels as codes and to decode them (rvq_codec.pt), then the aligner when each byte is spoken (aligner.pt); all
recordings are coded and aligned once, and the talker learns durations and codes (talker.pt).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from omni.common.errors import UserError
from omni.common.numerics import weights_sha256
from omni.common.spoken import spoken_version
from omni.data.manifest import account_for_split, split_rows
from omni.data.open_manifest import prepare_manifest
from omni.data.order import held_out_set, training_set
from omni.data.recordings import static_lengths
from omni.models.aligner import Aligner
from omni.models.codec import Codec, mel_spec
from omni.models.speaker import Speaker
from omni.models.speech_architectures import AlignerArchitecture, CodecArchitecture
from omni.models.talker import Talker, talker_loss
from omni.stages.aligner import STAGE as ALIGNER
from omni.stages.aligner import SpokenTexts, aligner_loss, aligner_metrics, aligner_sums, prepare_speech
from omni.stages.codec import STAGE as CODEC
from omni.stages.codec import (
    SpeechClips,
    codec_loss,
    codec_metrics,
    codec_sums,
    count_codes,
    leave_out_long,
    prepare_mel_statistics,
    refuse_unreadable,
)
from omni.stages.recognizer import Recognizer, TalkerScore, prepare_references, sample_writer
from omni.stages.talker import STAGE, CodedSpeech, TalkerConfig
from omni.stages.vocoder import load_vocoder_for
from omni.stages.voices import Voices, check_speakers, with_references
from omni.train.cli import launch, parse_stage_args
from omni.train.loop import Phase, Validation, train
from omni.train.optim import build_optimizer
from omni.train.run import Run
from omni.train.stage import load

COLUMNS = ("text", "wav")
DOWNSTREAM = {"codec": (ALIGNER, STAGE), "aligner": (STAGE,)}  # stage -> the stages whose models depend on its model


def main(argv: list[str] | None = None) -> dict[str, float]:
    config, notices, device = parse_stage_args(TalkerConfig, __doc__, argv)
    vocoder = load_vocoder_for("this config", mel_spec(config), config.vocoder_ckpt, "cpu")
    with Run(config, STAGE, notices, device) as run:
        if config.use_compile:  # each padded length is compiled
            torch._dynamo.config.recompile_limit = 4 * len(static_lengths(config.max_codes))

        # --- Data: recordings of no more than max_codes codes ------------------------------------------------------
        manifest = val_manifest = prepare_manifest(run, config.tts_csv, COLUMNS, key="text")
        lengths = count_codes(run, manifest, config)
        check_speakers(run, manifest, config.voice_layers)
        if config.val_csv:
            val_manifest = prepare_manifest(run, config.val_csv, COLUMNS, key="text")
            train_rows, val_rows = np.arange(len(manifest)), np.arange(len(val_manifest))
        else:
            train_rows, val_rows = split_rows(manifest, config.val_split)
        train_rows = leave_out_long(run, manifest, train_rows, lengths, config.max_codes)
        val_rows = leave_out_long(run, val_manifest, val_rows, count_codes(run, val_manifest, config), config.max_codes)
        account_for_split(run, manifest, train_rows, val_manifest, val_rows)
        if not len(train_rows):
            raise UserError(f"{manifest.path}: not one of its {len(manifest)} rows is left to train on")
        if not lengths[train_rows].any():
            refuse_unreadable(run, manifest, train_rows, config.sample_rate)
        if not len(val_rows):
            run.log("no held-out rows (val_split is 0, or there are very few rows): nothing will be validated")
        val_keys = {"training": False, "max_codes": config.max_codes, "static": config.use_compile}
        train_keys = val_keys | {"training": True, "lengths": lengths[train_rows]}
        clips = SpeechClips(manifest, train_rows, config.codec.architecture, **train_keys)
        val_clips = SpeechClips(val_manifest, val_rows, config.codec.architecture, **val_keys)
        training_set(run, clips)  # raises for an impossible batch_size before hours of training the codec

        # --- First part: the codec ---------------------------------------------------------------------------------
        data = {"train": manifest.sha256, "validation": val_manifest.sha256}
        text_data = data | spoken_version(config.text_language)
        if config.codec_ckpt:
            figures = run.import_stage(config.codec_ckpt, CODEC, CodecArchitecture)
        else:
            with run.sub_stage(config.codec, CODEC):
                figures = train_codec(run, clips, val_clips, data)
        codec = load(CODEC, run.save_dir, run.device).model

        # --- Second part: the aligner ------------------------------------------------------------------------------
        if config.codec_ckpt and (Path(config.codec_ckpt) / ALIGNER.final).exists():
            figures = figures | run.import_stage(config.codec_ckpt, ALIGNER, AlignerArchitecture)
        else:
            texts = SpokenTexts(manifest, train_rows, config.aligner.architecture, **train_keys)
            val_texts = SpokenTexts(val_manifest, val_rows, config.aligner.architecture, **val_keys)
            with run.sub_stage(config.aligner, ALIGNER):
                figures = figures | train_aligner(run, codec, texts, val_texts, text_data)
        if config.parts_only:
            run.log("parts_only: codec and aligner are finished. Without it the same line trains the talker")
            return figures
        aligner = load(ALIGNER, run.save_dir, run.device).model

        # --- Codes and durations of all recordings, computed once --------------------------------------------------
        coded, _ = val_coded, _ = prepare_speech(run, manifest, codec, aligner, config.max_codes, "train")
        if config.val_csv:
            val_coded, _ = prepare_speech(run, val_manifest, codec, aligner, config.max_codes, "validation")

        # --- Several voices: with each sample goes another recording by its speaker --------------------------------
        if config.voice_layers:
            voices = Voices.find(run, coded, train_rows)
            run.config = config = config.model_copy(update={"speakers": voices.names})  # checkpoints have the names
            val_coded, val_rows = with_references(run, val_coded, val_rows, voices)
            coded, _ = with_references(run, coded, train_rows, voices)

        # --- Third part: the talker --------------------------------------------------------------------------------
        recordings = CodedSpeech(coded, train_rows, config.architecture, seed=config.seed, **train_keys)
        talker = Talker(config.architecture, use_flash=config.use_flash)
        if config.voice_layers:
            talker.voice_codes.copy_(voices.codes)
        run.prepare(talker)
        loss = partial(talker_loss, frame_dropout=config.frame_dropout, duration_weight=config.duration_weight)

        # --- Validation: perplexity of the true codes, and word error rate of the talker's speech ------------------
        speaker = Speaker(talker, codec, vocoder and vocoder.to(run.device))
        recognizer, references, validation = None, {}, None
        if config.audio_ckpt:
            recognizer = Recognizer(config.audio_ckpt, run.device)
            references = prepare_references(run, speaker, recognizer, val_manifest, val_rows[: config.val_sentences])
        else:
            run.log('no "audio_ckpt": the talker\'s speech is written to files, without word error rates')
        if len(val_rows):
            split = held_out_set(run, CodedSpeech(val_coded, val_rows, config.architecture, **val_keys))
            show = sample_writer(run, speaker, val_manifest) if run.is_main else None
            score = TalkerScore(speaker, recognizer, config, -(-config.val_sentences // run.world), show)
            validation = Validation(split, score.sums, score.metrics)

        # --- Train -------------------------------------------------------------------------------------------------
        models = {"codec": weights_sha256(codec), "aligner": weights_sha256(aligner)}
        return train(
            run,
            [Phase("talker", talker, build_optimizer(talker, config), loss, peak_lr=config.lr)],
            training_set(run, recordings),
            fingerprint=text_data | models | {"codes": coded.sha256, "validation codes": val_coded.sha256},
            validation=validation,
            summary=figures | references,
        )


def train_codec(run: Run, clips: SpeechClips, val_clips: SpeechClips, data: dict[str, str]) -> dict[str, float]:
    """Train the first part of the stage; returns the metrics of ``rvq_codec.pt``."""
    codec = Codec(run.config.architecture)
    statistics = prepare_mel_statistics(run, clips)
    codec.mel_mean.copy_(torch.tensor(statistics["mean"]))
    codec.mel_std.copy_(torch.tensor(statistics["std"]))
    loss = partial(codec_loss, commitment_weight=run.config.commitment_weight)
    move_codebooks = partial(codec.quantizer.update, sum_over_ranks=run.sum_over_ranks, is_main=run.is_main)
    return train_part(run, codec, loss, (codec_sums, codec_metrics), (clips, val_clips), data, move_codebooks)


def train_aligner(
    run: Run, codec: Codec, texts: SpokenTexts, val_texts: SpokenTexts, data: dict[str, str]
) -> dict[str, float]:
    """Train the second part of the stage; returns the metrics of ``aligner.pt``."""
    aligner = Aligner(run.config.architecture)
    aligner.mel_mean.copy_(codec.mel_mean)
    aligner.mel_std.copy_(codec.mel_std)
    loss = partial(aligner_loss, alignment_frames=aligner.alignment_frames)
    data = data | {"mel": weights_sha256(codec)}
    return train_part(run, aligner, loss, (aligner_sums, aligner_metrics), (texts, val_texts), data)


def train_part(
    run: Run,
    model: nn.Module,
    loss: Callable,
    judge: tuple[Callable, Callable],
    sources: tuple[SpeechClips, SpeechClips],
    data: dict[str, str],
    after_update: Callable[[Tensor], None] | None = None,
) -> dict[str, float]:
    """Train the codec or the aligner by ``run.config``; returns the metrics of its final file. ``judge``: sums and
    metrics of the validation; ``sources``: rows for training and for validation."""
    source, val_source = sources
    validation = Validation(held_out_set(run, val_source), *judge) if len(val_source) else None
    optimizer = build_optimizer(run.prepare(model), run.config)
    phase = Phase(run.stage.name, model, optimizer, loss, peak_lr=run.config.lr, after_update=after_update)
    train_set, downstream = training_set(run, source), DOWNSTREAM[run.stage.name]
    return train(run, [phase], train_set, fingerprint=data, validation=validation, downstream=downstream)


if __name__ == "__main__":
    launch(main)
