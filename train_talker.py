"""Stage D: train the speech codec, then the talker, which says a text by writing the codec's codes.

    python train_talker.py --config configs/talker_tiny.json

The data are CSV rows of a text and the recording of it, best of one voice. First the codec learns to write log-mels as
codes and to read them back (rvq_codec.pt). It is then frozen, all recordings are coded once, and the talker learns to
write their codes from their texts (talker.pt). A recogniser of stage B, if there is one, listens to what it says.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from omni.audio import load_audio
from omni.checkpoint import load_stage, replace_file
from omni.codec import (
    Codec,
    SpeechClips,
    codec_loss,
    codec_metrics,
    codec_sums,
    count_codes,
    every_clip,
    fingerprint,
    leave_out_long,
    load_codec,
    prepare_codes,
    prepare_mel_statistics,
)
from omni.config import CodecArchitecture, TalkerConfig
from omni.data import ResumableDataset
from omni.errors import UserError
from omni.files import file_sha256
from omni.loop import Phase, Validation, train
from omni.manifest import Manifest, measure_rows, prepare_manifest, split_rows
from omni.optim import build_adamw
from omni.runtime import Run, Stage, launch, parse_stage_args
from omni.samples import save_samples
from omni.speech import Listener, Speaker, TalkerScore, read_recordings, word_error_rates, word_errors
from omni.talker import CodedSpeech, Talker, talker_loss, text_symbols
from omni.vocoder import load_vocoder

CODEC = Stage("codec", prefix="rvq_codec", final="rvq_codec.pt", unit="frames", best_metric="reconstruction_mse")
STAGE = Stage("talker", prefix="talker", final="talker.pt", unit="codes", best_metric="code_perplexity")
COLUMNS = ("text", "wav")


def main(argv: list[str] | None = None) -> dict[str, float]:
    config, notices, device = parse_stage_args(TalkerConfig, __doc__, argv)
    with Run(config, STAGE, notices, device) as run:
        # --- Data: recordings of no more than max_mel_length frames ------------------------------------------------
        manifest = val_manifest = prepare_manifest(run, config.tts_csv, COLUMNS, key="text")
        lengths = count_codes(run, manifest)
        if config.val_csv:
            val_manifest = prepare_manifest(run, config.val_csv, COLUMNS, key="text")
            train_rows, val_rows = np.arange(len(manifest)), np.arange(len(val_manifest))
        else:
            train_rows, val_rows = split_rows(manifest, config.val_split)
        train_rows = leave_out_long(run, manifest, train_rows, lengths)
        val_rows = leave_out_long(run, val_manifest, val_rows, count_codes(run, val_manifest))
        if not lengths[train_rows].any():
            raise UserError(f"{manifest.path}: not one of its {len(train_rows)} training rows can be read")
        if not len(val_rows):
            run.log("no held-out rows (val_split is 0, or there are very few rows): nothing will be validated")
        own = {"seed": config.seed, "rank": run.rank, "world": run.world}
        how = {"accumulation": config.gradient_accumulation_steps, "drop_last": config.drop_last}
        clips = SpeechClips(manifest, train_rows, config, training=True, lengths=lengths[train_rows])
        # refuses an impossible batch_size now, and not after hours of training the codec
        ResumableDataset(clips, batch_size=config.batch_size, **own, **how)

        # --- First part: the codec ---------------------------------------------------------------------------------
        data = {"train": manifest.sha256, "validation": val_manifest.sha256}
        if config.codec_ckpt:
            codec_figures = use_codec(run)
        else:
            with run.part(config.codec, CODEC):
                codec_figures = train_codec(
                    run, clips, SpeechClips(val_manifest, val_rows, config, training=False), data
                )

        # --- Its codes, computed once ------------------------------------------------------------------------------
        codec = load_codec(run.save_dir, run.device)
        coded = val_coded = prepare_codes(run, codec, every_clip(run, manifest), "train")
        if config.val_csv:
            val_coded = prepare_codes(run, codec, every_clip(run, val_manifest), "validation")
        speech = CodedSpeech(coded, train_rows, seed=config.seed, training=True, lengths=lengths[train_rows])
        train_set = ResumableDataset(speech, batch_size=config.batch_size, **own, **how)

        # --- Second part: the talker -------------------------------------------------------------------------------
        pace = config.frames_per_byte or measure_pace(run, manifest, train_rows, lengths[train_rows])
        config = run.config = config.model_copy(update={"frames_per_byte": pace})
        talker = run.prepare(Talker(config, config.codebooks, config.codebook_size, use_flash=config.use_flash))

        def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
            return talker_loss(model, batch, config.frame_dropout)

        # --- Validation: perplexity of the true codes, and what a recogniser hears when the talker speaks ----------
        vocoder = None if config.vocoder_ckpt is None else load_vocoder(config.vocoder_ckpt, run.device)
        speaker, listener, references = Speaker(talker, codec, vocoder), None, {}
        if config.audio_ckpt:
            listener = Listener(config.audio_ckpt, run.device)
            references = prepare_references(run, speaker, listener, val_manifest, val_rows[: config.val_sentences])
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
            spoken = CodedSpeech(val_coded, val_rows, training=False)
            split = ResumableDataset(spoken, batch_size=config.batch_size, **own, shuffle=False)
            score = TalkerScore(speaker, listener, -(-config.val_sentences // run.world), show, config.val_samples)
            validation = Validation(split, score.sums, score.metrics)

        # --- Train -------------------------------------------------------------------------------------------------
        return train(
            run,
            [Phase("talker", talker, build_adamw(talker, lr=config.lr, wd=config.wd), loss, peak_lr=config.lr)],
            train_set,
            fingerprint=data | {"codec": fingerprint(codec)},
            validation=validation,
            summary=codec_figures | references,
        )


def use_codec(run: Run) -> dict[str, float]:
    """Put the codec of ``codec_ckpt`` into ``save_dir``, which then has all that speaking needs; its metrics.

    Raises:
        UserError: it has other sizes than the config says, or ``save_dir`` has another one already.
    """
    source, target = Path(run.config.codec_ckpt) / CODEC.final, run.save_dir / CODEC.final
    saved = load_stage(source.parent, CODEC.name, CODEC.prefix, CODEC.final)
    for key in CodecArchitecture.model_fields:
        if saved["config"][key] != getattr(run.config, key):
            raise UserError(f"{source}: {key} is {saved['config'][key]}, this config has {getattr(run.config, key)}")
    with run.main_process_first():
        if target.exists() and file_sha256(target) != file_sha256(source):
            raise UserError(f"{target}: another codec than {source}. Use a new save_dir")
        if run.is_main and not target.exists():
            replace_file(target, lambda file: file.write(source.read_bytes()))
    return saved["metrics"]


def train_codec(run: Run, clips: SpeechClips, val_clips: SpeechClips, data: dict[str, str]) -> dict[str, float]:
    """The first part of the stage: the metrics of ``rvq_codec.pt``."""
    config = run.config
    codec = Codec(config)
    statistics = prepare_mel_statistics(run, clips)
    codec.mel_mean.copy_(torch.tensor(statistics["mean"]))
    codec.mel_std.copy_(torch.tensor(statistics["std"]))
    run.prepare(codec)

    def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        return codec_loss(model, batch, config.commitment_weight)

    def move_codebooks(ok: Tensor) -> None:
        codec.quantizer.update(ok, run.sum_over_ranks, run.is_main)

    own = {"seed": config.seed, "batch_size": config.batch_size, "rank": run.rank, "world": run.world}
    how = {"accumulation": config.gradient_accumulation_steps, "drop_last": config.drop_last}
    validation = None
    if len(val_clips):
        validation = Validation(ResumableDataset(val_clips, **own, shuffle=False), codec_sums, codec_metrics)
    optimizer = build_adamw(codec, lr=config.lr, wd=config.wd)
    phase = Phase("codec", codec, optimizer, loss, peak_lr=config.lr, after_update=move_codebooks)
    return train(run, [phase], ResumableDataset(clips, **own, **how), fingerprint=data, validation=validation)


def measure_pace(run: Run, manifest: Manifest, rows: np.ndarray, lengths: np.ndarray) -> float:
    """Codes in time per byte of text, over all readable rows."""
    n_bytes = measure_rows(run, manifest, "text_bytes", text_bytes, np.int32)[rows]
    both = (n_bytes > 0) & (lengths > 0)
    return float(lengths[both].sum() / n_bytes[both].sum())


def text_bytes(manifest: Manifest, row: int) -> int:
    return len(text_symbols(manifest[row]["text"]))


def prepare_references(run: Run, speaker: Speaker, listener: Listener, manifest: Manifest, rows) -> dict[str, float]:
    """Word error rates of the recordings and of what codec and vocoder make of them, kept in ``save_dir``."""

    def make() -> dict[str, float]:
        run.log(f"listening to {len(rows)} held-out recordings, as they are, vocoded, and coded")
        read = read_recordings(speaker, manifest, rows, left_out={})
        versions = [speaker.versions(recording) for _, recording in read]
        counts = {}
        for kind in ("recordings", "vocoded", "codec"):
            heard = listener.transcribe([version[kind] for version in versions], speaker.spec.sample_rate)
            counts[kind] = word_errors([text for text, _ in read], heard)
        rates = word_error_rates(counts)
        run.log("  ".join(f"{name} {rate:.4g}" for name, rate in rates.items()))
        return rates

    models = {"codec": speaker.codec, "vocoder": speaker.vocoder, "listener": listener.model}
    belongs_to = {name: fingerprint(model) for name, model in models.items() if model is not None}
    return run.remember("references.json", belongs_to | {"data": manifest.sha256, "rows": len(rows)}, make)


if __name__ == "__main__":
    launch(main)
