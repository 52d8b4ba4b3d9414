"""Stage B: config, rows, loss, tokenizer, loading, and the word error rates of validation and evaluation."""

# B batch, T mel frames, M mel channels, U output frames, V tokens and blank, L tokens of a target

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import jiwer
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from omni.common.errors import BadRow, UserError
from omni.common.spoken import SPELLED, Language, Spelled, spoken_form, spoken_version
from omni.common.text import audible, single_blanks
from omni.data.audio import load_speech, log_mel, normalise_features, perturb_speed, spec_augment
from omni.data.manifest import Manifest, ManifestDataset
from omni.data.measure import measure_rows
from omni.data.recordings import measure_samples, static_lengths
from omni.models.architectures import AudioEncoderArchitecture
from omni.models.audio_encoder import AudioEncoder, mel_spec, output_frames
from omni.models.ctc import CtcTokenizer, collapse, ctc_nll, frames_needed, normalise_text
from omni.models.ops import round_up
from omni.train.config import ASR_HINT, Files, StageConfig, input_files
from omni.train.run import Run
from omni.train.stage import ExportedPart, Stage

COLUMNS = ("wav", "text")


class AudioEncoderConfig(AudioEncoderArchitecture, StageConfig):
    """Stage B, ``train_audio_enc.py``."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "target_hz": "output frames per second follow from sample_rate, frame_hop and downsample_time",
        "max_text_len": "a text is as long as its recording allows",
    }

    train_csv: Files = input_files(
        hint=ASR_HINT, description="recordings with texts (columns wav, text), in any format of docs/data.md"
    )
    val_csv: Files | None = input_files(
        None, hint=ASR_HINT, description="held-out manifest; default: val_split of train_csv's texts"
    )
    val_voices_csv: Files | None = input_files(
        None, hint=ASR_HINT, description="second held-out manifest, with voices that are not in training"
    )
    val_words_csv: Files | None = input_files(
        None, hint=ASR_HINT, description="another held-out manifest, with words that are not in training"
    )
    text_language: Spelled | None = Field(None, description=SPELLED)
    max_mel_length: int = Field(
        2048,
        ge=8,
        le=16_777_216,
        description="longest recording in mel frames (2048: 20 s); longer ones are left out, use_compile pads up to it",
    )
    spec_time_masks: int = Field(2, ge=0, description="number of time bands that SpecAugment masks in an utterance")
    spec_time_width: int = Field(40, ge=0, description="largest width of a time band, in mel frames")
    spec_freq_masks: int = Field(2, ge=0, description="number of frequency bands that SpecAugment masks")
    spec_freq_width: int = Field(15, ge=0, description="largest width of a frequency band, in mel channels")
    speed_perturb: float = Field(0.0, ge=0, le=0.5, description="change of speed; 0.1: 0.9, 1 or 1.1 times the speed")

    @property
    def architecture(self) -> AudioEncoderArchitecture:
        return AudioEncoderArchitecture.of(self)

    @property
    def held_out_files(self) -> dict[str, str]:
        """Held-out manifests by the name of their rows in the metrics."""
        files = {"val": self.val_csv, "unseen_voices": self.val_voices_csv, "unseen_words": self.val_words_csv}
        return {name: path for name, path in files.items() if path}

    @model_validator(mode="after")
    def _others_need_a_comparison(self) -> Self:
        for key in ("val_voices_csv", "val_words_csv"):
            if getattr(self, key) and not self.val_csv and not self.val_split:
                raise ValueError(f'key "{key}": expected val_csv or val_split beside it, found neither')
        return self


STAGE = Stage(
    name="audio_enc",
    prefix="audio_enc",
    final="audio_enc.pt",
    unit="tokens",
    best_metric="wer",
    config_name="audio_enc",
    exports=(
        ExportedPart(
            "audio_encoder",
            "encodes recordings",
            "--audio_ckpt or --omni_ckpt",
            figures=("wer", "wer_unseen_voices", "wer_unseen_words", "cer"),
        ),
    ),
    letter="B",
    script="train_audio_enc.py",
    config=AudioEncoderConfig,
    architecture=AudioEncoderArchitecture,
    model=AudioEncoder,
    switches=("use_flash",),
    tokenizer=CtcTokenizer,
    vocab_size=lambda architecture: architecture.ctc_vocab_size,
    evaluate="omni.stages.evaluation:evaluate_audio_enc",
)


# ---------------------------------------------------------------------------------------------------------------
# Usable rows


def written_words(text: str, language: Language | None) -> str:
    """A text as the recogniser writes it: the ``normalise_text`` of its ``spoken_form``."""
    return normalise_text(spoken_form(single_blanks(audible(text)), language))


def read_text(row: dict, language: Language | None) -> str:
    """The ``written_words`` of a row, for training and scores.

    Raises:
        BadRow: it has no pronounced character.
    """
    text = written_words(row["text"], language)
    if not text:
        raise BadRow(f'expected words in "text", found "{row["text"][:40]}"')
    return text


def usable_rows(
    run: Run, manifest: Manifest, rows: np.ndarray, config: AudioEncoderConfig, tokenizer: CtcTokenizer, training: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Leave out recordings that are too long and, in training, those too short for their text; log these rows.

    A text that needs more frames than its recording has no alignment, so its loss is infinite. Validation keeps it,
    since it still counts as recognised or not. Rows that cannot be read stay: reading them reports the reason.

    Returns:
        Row numbers in the manifest, and the mel frames of each.
    """
    frames = mel_spec(config).frames(measure_samples(run, manifest, config.sample_rate)[rows])
    limit = f"more than max_mel_length {config.max_mel_length} mel frames"
    too_long = frames > config.max_mel_length
    rows, frames = manifest.leave_out(rows, too_long, limit, run.log), frames[~too_long]
    if training:

        def needed(manifest: Manifest, row: int) -> int:
            return frames_needed(tokenizer.encode(read_text(manifest[row], config.text_language)))

        name = "-".join(("ctc", tokenizer.fingerprint[:12], *spoken_version(config.text_language).values()))
        needs = measure_rows(run, manifest, name, needed, np.uint32)[rows]
        too_short = (frames > 0) & (needs > output_frames(frames, config.downsample_time))
        reason = f"too short for their text ({config.downsample_time} mel frames an output frame)"
        rows, frames = manifest.leave_out(rows, too_short, reason, run.log), frames[~too_short]
    return rows, frames


# ---------------------------------------------------------------------------------------------------------------
# Samples and batches


@dataclass(frozen=True)
class Utterance:
    features: Tensor  # (T, M) normalised log-mels
    tokens: list[int]
    text: str  # normalised


class Utterances(ManifestDataset):
    """Recordings with their texts, from a manifest with the columns wav and text.

    Args:
        config: feature sizes, augmentation; ``use_compile`` pads to a few static shapes, else in steps of 32 frames.
        others: see ``ManifestDataset``.
    """

    def __init__(
        self, manifest: Manifest, rows: np.ndarray, config: AudioEncoderConfig, tokenizer: CtcTokenizer, **others
    ) -> None:
        super().__init__(manifest, rows, **others)
        self.config, self.tokenizer, self.mel = config, tokenizer, mel_spec(config)

    def read(self, row: dict, rng: np.random.Generator | None) -> Utterance:
        config = self.config
        text = read_text(row, config.text_language)
        tokens = self.tokenizer.encode(text)
        waveform = load_speech(self.manifest.file(row, "wav"), self.mel, config.max_mel_length)
        if rng is None:
            return Utterance(self._features(waveform), tokens, text)
        if unknown := self.tokenizer.unknown(text):
            raise BadRow(f"its characters {' '.join(sorted(unknown))} have no token: the tokenizer has other texts")
        if not self._fits(tokens, waveform):
            raise BadRow(f"needs {frames_needed(tokens)} output frames for its text, has {self._frames(waveform)}")
        if config.speed_perturb:
            perturbed = perturb_speed(waveform, config.speed_perturb, rng)
            if self._fits(tokens, perturbed):
                waveform = perturbed
        features = spec_augment(
            self._features(waveform),
            rng,
            time_masks=config.spec_time_masks,
            time_width=config.spec_time_width,
            freq_masks=config.spec_freq_masks,
            freq_width=config.spec_freq_width,
        )
        return Utterance(features, tokens, text)

    def _features(self, waveform: np.ndarray) -> Tensor:
        return normalise_features(log_mel(torch.from_numpy(waveform), self.mel))

    def _frames(self, waveform: np.ndarray) -> int:
        return output_frames(self.mel.frames(len(waveform)), self.config.downsample_time)

    def _fits(self, tokens: list[int], waveform: np.ndarray) -> bool:
        short_enough = self.mel.frames(len(waveform)) <= self.config.max_mel_length
        return short_enough and frames_needed(tokens) <= self._frames(waveform)

    def collate(self, samples: list[Utterance]) -> dict:
        """``features`` (B, T, M) and ``targets`` (B, L), zero beyond ``lengths`` (B,) and ``target_lengths`` (B,);
        ``texts``, a list. Under ``use_compile`` B is always the batch size: utterances of silence fill it."""
        lengths = [len(sample.features) for sample in samples]
        target_lengths = [len(sample.tokens) for sample in samples]
        missing, frames = 0, round_up(max(lengths), 32)
        if self.config.use_compile:
            missing = self.config.batch_size - len(samples)
            frames = next(length for length in static_lengths(self.config.max_mel_length) if length >= max(lengths))
        size = len(samples) + missing
        features = torch.zeros(size, frames, self.mel.n_mels)
        targets = torch.zeros(size, max(target_lengths), dtype=torch.int64)
        for index, sample in enumerate(samples):
            features[index, : lengths[index]] = sample.features
            targets[index, : target_lengths[index]] = torch.tensor(sample.tokens)
        return {
            "features": features,
            "lengths": torch.tensor(lengths + [frames] * missing),
            "targets": targets,
            "target_lengths": torch.tensor(target_lengths + [0] * missing),
            "texts": [sample.text for sample in samples],
            "n_targets": sum(target_lengths),
        }


class EvalSets:
    """Several sources in a row with separate metrics. A batch has the keys of each source as ``name/key``."""

    def __init__(self, sources: dict[str, ManifestDataset]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources.values())

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        merged, first = {"n_targets": 0, "bad_rows": {}}, 0
        for name, source in self.sources.items():
            own = rows[(rows >= first) & (rows < first + len(source))] - first
            first += len(source)
            part = source.batch(own, epoch)
            merged["n_targets"] += part.pop("n_targets")
            merged["bad_rows"] |= part.pop("bad_rows")
            merged |= {f"{name}/{key}": value for key, value in part.items()}
        return merged


# ---------------------------------------------------------------------------------------------------------------
# Loss and score


def ctc_loss(model: nn.Module, batch: dict) -> Tensor:
    """Nats per target token of a batch of ``Utterances.collate``."""
    logits, frames = model(batch["features"], batch["lengths"])
    nll = ctc_nll(logits, frames, batch["targets"], batch["target_lengths"])
    real = batch["target_lengths"] > 0
    return torch.where(real, nll, 0.0).sum() / batch["target_lengths"].sum()


def score_sums(model: nn.Module, batch: dict, tokenizer: CtcTokenizer) -> dict[str, Tensor]:
    """Sums over a batch of ``EvalSets``, for each source: nats and tokens, word and character errors.

    Greedy decoding. A text without an alignment has no likelihood, so only its errors count.
    """
    totals: dict[str, Tensor] = {}
    for name in sorted({key.rpartition("/")[0] for key in batch if "/" in key}):
        texts, lengths = batch[f"{name}/texts"], batch[f"{name}/target_lengths"]
        logits, frames = model(batch[f"{name}/features"], batch[f"{name}/lengths"])
        nll = ctc_nll(logits, frames, batch[f"{name}/targets"], lengths)
        known = torch.isfinite(nll) & (lengths > 0)
        words, characters = error_counts(texts, greedy_texts(logits, frames, tokenizer)[: len(texts)])
        counts = {
            "nats": torch.where(known, nll, 0.0).sum(),
            "tokens": torch.where(known, lengths, 0).sum(),
            "word_errors": torch.tensor(words[0]),
            "words": torch.tensor(words[1]),
            "character_errors": torch.tensor(characters[0]),
            "characters": torch.tensor(characters[1]),
        }
        totals |= {f"{name}/{key}": value for key, value in counts.items()}
    return totals


@torch.no_grad()
def transcribe(model: AudioEncoder, tokenizer: CtcTokenizer, features: Tensor, lengths: Tensor) -> list[str]:
    """Transcripts of (B, T, M) features with ``lengths`` (B,) frames, by greedy decoding."""
    return greedy_texts(*model(features, lengths), tokenizer)


def greedy_texts(logits: Tensor, frames: Tensor, tokenizer: CtcTokenizer) -> list[str]:
    """The best token of each frame of (B, U, V), repeats and blanks removed, as text."""
    best = logits.argmax(dim=-1).tolist()
    blank = logits.shape[-1] - 1
    rows = zip(best, frames.tolist(), strict=True)
    return [tokenizer.decode(collapse(row[:count], blank)) for row, count in rows]


def error_counts(references: list[str], hypotheses: list[str]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(errors, length) in words and in characters: substitutions, deletions and insertions of the best alignment."""
    words = jiwer.process_words(references, hypotheses)
    characters = jiwer.process_characters(references, hypotheses)
    counts = []
    for result in (words, characters):
        misses = result.substitutions + result.deletions
        counts.append((misses + result.insertions, result.hits + misses))
    return counts[0], counts[1]


def score_metrics(totals: dict[str, float]) -> dict[str, float]:
    """From the totals of ``score_sums``: loss (nats per token), wer and cer of the first source, ``val``; and, if
    they are there, wer_unseen_voices and wer_unseen_words of the sources of these names."""
    metrics = {}
    if "val/words" in totals:
        metrics["loss"] = totals["val/nats"] / totals["val/tokens"] if totals["val/tokens"] else math.nan
        metrics["wer"] = totals["val/word_errors"] / totals["val/words"]
        metrics["cer"] = totals["val/character_errors"] / totals["val/characters"]
    for name in ("unseen_voices", "unseen_words"):
        if f"{name}/words" in totals:
            metrics[f"wer_{name}"] = totals[f"{name}/word_errors"] / totals[f"{name}/words"]
    return metrics


# ---------------------------------------------------------------------------------------------------------------
# The tokenizer of a run


def prepare_tokenizer(run: Run, manifest: Manifest, rows: np.ndarray, config: AudioEncoderConfig) -> CtcTokenizer:
    """The tokenizer in ``save_dir``; if there is none, one trained on the texts of ``rows``."""
    path = Path(config.save_dir) / "tokenizer.json"

    def texts():
        for row in rows:
            run.check_stop()
            try:
                yield read_text(manifest[int(row)], config.text_language)
            except BadRow:  # training reports it
                continue

    with run.main_process_first():
        if run.is_main and not path.exists():
            run.log(f"training a tokenizer of up to {config.ctc_vocab_size} tokens on {manifest.path}")
            CtcTokenizer.train(texts(), config.ctc_vocab_size).save(path)
        tokenizer = CtcTokenizer.load(path)
    if tokenizer.vocab_size > config.ctc_vocab_size:
        raise UserError(
            f'{path}: has {tokenizer.vocab_size} tokens, key "ctc_vocab_size" allows {config.ctc_vocab_size}. '
            "Use a new save_dir, or raise ctc_vocab_size"
        )
    return tokenizer


def report_unknown_characters(
    run: Run, manifest: Manifest, rows: np.ndarray, config: AudioEncoderConfig, tokenizer: CtcTokenizer
) -> None:
    """Log characters of held-out texts that no training text has: the model cannot write them."""
    unknown: set[str] = set()
    for row in rows:
        try:
            unknown |= tokenizer.unknown(read_text(manifest[int(row)], config.text_language))
        except BadRow:  # validation reports it
            continue
    if unknown:
        run.log(f"{manifest.path}: characters that no training text has: {' '.join(sorted(unknown))}")
