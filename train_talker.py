"""Stage D: train the speech codec, then an aligner, then the talker, which says a text by writing the codec's codes.

    python train_talker.py --config configs/talker_tiny.json

The data are CSV rows of a text and the recording of it, best of one voice. First the codec learns to write log-mels as
codes and to read them back (rvq_codec.pt), then the aligner which byte of a text sounds when (aligner.pt). Both are
frozen, all recordings are coded and aligned once, and the talker learns to write durations and codes from texts
(talker.pt). A recogniser of stage B, if there is one, listens to what it says.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from omni.chat.speaker import Recognizer, Speaker, TalkerScore, prepare_references
from omni.common.errors import UserError
from omni.data.audio import load_audio
from omni.data.manifest import account_for_split, prepare_manifest, read_some, split_rows
from omni.data.order import held_out_set, training_set
from omni.data.recordings import static_lengths
from omni.models.aligner import (
    Aligner,
    SpokenTexts,
    aligner_metrics,
    aligner_nats,
    aligner_sums,
    load_aligner,
    prepare_speech,
)
from omni.models.architectures import AlignerArchitecture, CodecArchitecture
from omni.models.codec import (
    Codec,
    SpeechClips,
    codec_loss,
    codec_metrics,
    codec_sums,
    count_codes,
    fingerprint,
    leave_out_long,
    load_codec,
    mel_spec,
    prepare_mel_statistics,
)
from omni.models.talker import CodedSpeech, Talker, talker_loss
from omni.models.vocoder import load_vocoder_for
from omni.stages.talker import ALIGNER, CODEC, STAGE, TalkerConfig
from omni.train.cli import launch, parse_stage_args
from omni.train.loop import Phase, Validation, train
from omni.train.optim import build_optimizer
from omni.train.run import Run
from omni.train.samples import save_samples

COLUMNS = ("text", "wav")
MADE_OF = {"codec": (ALIGNER, STAGE), "aligner": (STAGE,)}  # part -> those that another one would not fit to
PARTS = (SpeechClips, SpokenTexts)  # what the codec learns from, and the aligner


def main(argv: list[str] | None = None) -> dict[str, float]:
    config, notices, device = parse_stage_args(TalkerConfig, __doc__, argv)
    vocoder = load_vocoder_for("this config", mel_spec(config), config.vocoder_ckpt, "cpu")
    with Run(config, STAGE, notices, device) as run:
        if config.use_compile:  # each padded length is compiled
            torch._dynamo.config.recompile_limit = 4 * len(static_lengths(config.max_mel_length))

        # --- Data: recordings of no more than max_mel_length frames ------------------------------------------------
        manifest = val_manifest = prepare_manifest(run, config.tts_csv, COLUMNS, key="text")
        lengths = count_codes(run, manifest, config)
        if config.val_csv:
            val_manifest = prepare_manifest(run, config.val_csv, COLUMNS, key="text")
            train_rows, val_rows = np.arange(len(manifest)), np.arange(len(val_manifest))
        else:
            train_rows, val_rows = split_rows(manifest, config.val_split)
        train_rows = leave_out_long(run, manifest, train_rows, lengths, config.max_mel_length)
        val_lengths = count_codes(run, val_manifest, config)
        val_rows = leave_out_long(run, val_manifest, val_rows, val_lengths, config.max_mel_length)
        account_for_split(run, manifest, train_rows, val_manifest, val_rows)
        if not len(train_rows):
            raise UserError(f"{manifest.path}: not one of its {len(manifest)} rows is left to train on")
        if not lengths[train_rows].any():  # says why
            rows, rate = train_rows[-100:], config.sample_rate
            read_some(manifest, rows, 100, lambda row: load_audio(manifest.file(row["wav"]), rate), run.check_stop)
        if not len(val_rows):
            run.log("no held-out rows (val_split is 0, or there are very few rows): nothing will be validated")
        clips, spoken = (of(manifest, train_rows, config, training=True, lengths=lengths[train_rows]) for of in PARTS)
        val_clips, val_spoken = (of(val_manifest, val_rows, config, training=False) for of in PARTS)
        training_set(run, clips)  # refuses an impossible batch_size now, and not after hours of training the codec

        # --- First part: the codec ---------------------------------------------------------------------------------
        data = {"train": manifest.sha256, "validation": val_manifest.sha256}
        if config.codec_ckpt:
            figures = run.import_stage(config.codec_ckpt, CODEC, CodecArchitecture)
        else:
            with run.sub_stage(config.codec, CODEC):
                figures = train_codec(run, clips, val_clips, data)
        codec = load_codec(run.save_dir, run.device)

        # --- Second part: the aligner ------------------------------------------------------------------------------
        if config.codec_ckpt and (Path(config.codec_ckpt) / ALIGNER.final).exists():
            figures = figures | run.import_stage(config.codec_ckpt, ALIGNER, AlignerArchitecture)
        else:
            with run.sub_stage(config.aligner, ALIGNER):
                figures = figures | train_aligner(run, codec, spoken, val_spoken, data)
        aligner = load_aligner(run.save_dir, run.device)

        # --- Codes and durations of all recordings, computed once --------------------------------------------------
        coded, _ = val_coded, _ = prepare_speech(run, manifest, config, codec, aligner, "train")
        if config.val_csv:
            val_coded, _ = prepare_speech(run, val_manifest, config, codec, aligner, "validation")
        speech = CodedSpeech(coded, train_rows, config, seed=config.seed, training=True, lengths=lengths[train_rows])

        # --- Third part: the talker --------------------------------------------------------------------------------
        talker = run.prepare(Talker(config))
        loss = partial(talker_loss, frame_dropout=config.frame_dropout, duration_weight=config.duration_weight)

        # --- Validation: perplexity of the true codes, and what a recogniser hears when the talker speaks ----------
        if vocoder is not None:
            vocoder.to(run.device)
        speaker, recognizer, references = Speaker(talker, codec, vocoder), None, {}
        if config.audio_ckpt:
            recognizer = Recognizer(config.audio_ckpt, run.device)
            references = prepare_references(run, speaker, recognizer, val_manifest, val_rows[: config.val_sentences])
        else:
            run.log('no "audio_ckpt": what the talker says is written to files, and nobody counts its words')

        def show(step: int, number: int, wav: str, said: Tensor) -> None:
            if not run.is_main:  # who writes the files
                return
            recording = load_audio(val_manifest.file(wav), speaker.spec.sample_rate)
            versions = speaker.versions(torch.from_numpy(recording))
            clips = {"recording": versions["recordings"], "codec": versions["codec"], "talker": said}
            save_samples(run, step, number, clips, speaker.spec)

        validation = None
        if len(val_rows):
            held_out = CodedSpeech(val_coded, val_rows, config, training=False)
            split = held_out_set(run, held_out)
            score = TalkerScore(speaker, recognizer, -(-config.val_sentences // run.world), show, config.val_samples)
            validation = Validation(split, score.sums, score.metrics)

        # --- Train -------------------------------------------------------------------------------------------------
        made = {"codec": fingerprint(codec), "aligner": fingerprint(aligner)}
        made |= {"codes": coded.sha256, "validation codes": val_coded.sha256}
        return train(
            run,
            [Phase("talker", talker, build_optimizer(talker, config), loss, peak_lr=config.lr)],
            training_set(run, speech),
            fingerprint=data | made,
            validation=validation,
            summary=figures | references,
        )


def train_codec(run: Run, clips: SpeechClips, val_clips: SpeechClips, data: dict[str, str]) -> dict[str, float]:
    """The first part of the stage: the metrics of ``rvq_codec.pt``."""
    codec = Codec(run.config)
    statistics = prepare_mel_statistics(run, clips)
    codec.mel_mean.copy_(torch.tensor(statistics["mean"]))
    codec.mel_std.copy_(torch.tensor(statistics["std"]))
    loss = partial(codec_loss, commitment_weight=run.config.commitment_weight)

    def move_codebooks(ok: Tensor) -> None:
        codec.quantizer.update(ok, run.sum_over_ranks, run.is_main)

    return train_part(run, codec, loss, (codec_sums, codec_metrics), (clips, val_clips), data, move_codebooks)


def train_aligner(
    run: Run, codec: Codec, spoken: SpokenTexts, val_spoken: SpokenTexts, data: dict[str, str]
) -> dict[str, float]:
    """The second part of the stage: the metrics of ``aligner.pt``."""
    aligner = Aligner(run.config)
    aligner.mel_mean.copy_(codec.mel_mean)
    aligner.mel_std.copy_(codec.mel_std)

    def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        nats = aligner_nats(model, aligner.alignment_frames(batch["lengths"]), batch)
        return nats.sum() / batch["text_lengths"].sum(), {}

    data = data | {"mel": fingerprint(codec)}
    return train_part(run, aligner, loss, (aligner_sums, aligner_metrics), (spoken, val_spoken), data)


def train_part(
    run: Run,
    model: nn.Module,
    loss: Callable,
    judge: tuple[Callable, Callable],
    sources: tuple[SpeechClips, SpeechClips],
    data: dict[str, str],
    after_update: Callable[[Tensor], None] | None = None,
) -> dict[str, float]:
    """Train what the talker needs, as ``run.config`` says: the metrics of its final file.

    Args:
        judge: sums and metrics of the validation; sources: to train and to validate on.
    """
    source, val_source = sources
    validation = Validation(held_out_set(run, val_source), *judge) if len(val_source) else None
    optimizer = build_optimizer(run.prepare(model), run.config)
    phase = Phase(run.stage.name, model, optimizer, loss, peak_lr=run.config.lr, after_update=after_update)
    train_set, downstream = training_set(run, source), MADE_OF[run.stage.name]
    return train(run, [phase], train_set, fingerprint=data, validation=validation, downstream=downstream)


if __name__ == "__main__":
    launch(main)
