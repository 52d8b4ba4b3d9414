"""Measure the recordings of a manifest in mel frames, and count the rows that max_mel_length leaves out.

    python scripts/check_mel_lengths.py --csv data/audio/production_asr.csv
    python scripts/check_mel_lengths.py --config configs/audio_enc_tiny.json
    python scripts/check_mel_lengths.py --csv data/audio/production_tts.csv --config configs/talker_tiny.json

Prints percentiles, the rows that max_mel_length leaves out, the value to set instead, the rows whose text is too long
for its recording (CTC writes at most one token an output frame), and the rows that cannot be read. Of WAV, FLAC and OGG
only the headers are read, so 100,000 files take seconds; MP3, M4A and the like are decoded to be counted.

The frame rate is that of the config's stage: 100 a second for the audio encoder (sample_rate / frame_hop), 12.5 for the
talker (frame_ms 80). Without --config, it is that of the audio encoder with its default sizes.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omni.common.errors import BadRow, UserError, reading_row
from omni.common.spoken import Language
from omni.data.manifest import Manifest
from omni.data.measure import measure
from omni.data.open_manifest import load_manifest
from omni.data.recordings import LENGTH, row_length, samples_at
from omni.models.audio_encoder import output_frames
from omni.models.ctc import CtcTokenizer, frames_needed
from omni.stages.audio_encoder import COLUMNS, AudioEncoderConfig, read_text
from omni.stages.talker import TalkerConfig
from omni.train.cli import OneLineErrors, launch, output_file
from omni.train.config import load_config, read_keys

_NAMED = 5  # rows to print; all are counted
_PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 99.9, 100)


@dataclass(frozen=True)
class Frames:
    """A stage's unit of time and its bounds."""

    csv: str
    columns: tuple[str, ...]
    sample_rate: int
    samples: int  # per frame
    why: str
    max_mel_length: int
    cache_dir: str | None
    downsample_time: int | None  # mel frames an output frame; None: no CTC, any text fits
    tokenizer: Path | None  # where stage B leaves its tokenizer
    text_language: Language | None = None

    @property
    def per_second(self) -> float:
        return self.sample_rate / self.samples


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="manifest with the columns wav and text; default: the config's")
    parser.add_argument("--config", metavar="FILE", help="config of the audio encoder or of the talker")
    parser.add_argument("--max_mel_length", type=int, metavar="N", help="try this bound instead of the config's")
    parser.add_argument("--plot", metavar="FILE.png", type=output_file, help="write a histogram of the lengths")
    args = parser.parse_args(argv)
    if not args.csv and not args.config:
        raise UserError("expected --csv FILE or --config FILE")
    frames = read_frames(args.csv, args.config)
    limit = frames.max_mel_length if args.max_mel_length is None else args.max_mel_length
    if limit < 1:
        raise UserError(f"--max_mel_length {limit}: expected at least 1")

    manifest = load_manifest(frames.csv, frames.columns, "text", cache_dir=frames.cache_dir)
    bad: dict[int, str] = {}

    def length_of(manifest: Manifest, row: int) -> tuple[int, int]:
        try:
            with reading_row():
                return row_length(manifest, row)
        except BadRow as error:
            bad[row] = str(error)
            raise

    samples = samples_at(measure(manifest, length_of, LENGTH, desc="lengths"), frames.sample_rate)
    lengths = -(-samples // frames.samples)
    good = lengths[lengths > 0]
    print(f"{frames.csv}: {len(manifest):,} rows, {samples.sum() / frames.sample_rate / 3600:.2f} h of audio")
    print(f"{frames.per_second:g} mel frames a second ({frames.why})")
    if len(good):
        report_lengths(good, frames, limit)
        if frames.downsample_time:
            report_texts(manifest, lengths, frames)
        if args.plot:
            plot(good, frames, limit, args.plot)
    if bad:
        print(f"Cannot be read: {len(bad):,} rows")
        for row in sorted(bad)[:_NAMED]:
            print(f"  {manifest.where(row)}: {bad[row]}")


def read_frames(csv: str | None, config_path: str | None) -> Frames:
    """
    Raises:
        UserError: the config is wrong, or names no manifest.
    """
    keys = read_keys(config_path) if config_path else {}
    if "tts_csv" in keys or "frame_ms" in keys:
        others = ("codec_ckpt", "audio_ckpt", "vocoder_ckpt", "val_csv")  # these need not be there yet
        overrides = [f"{key}=null" for key in others] + ([f"tts_csv={csv}"] if csv else [])
        talker, _ = load_config(TalkerConfig, config_path, overrides)
        return Frames(
            csv=talker.tts_csv,
            columns=("text", "wav"),
            sample_rate=talker.sample_rate,
            samples=talker.frame_hop * talker.frames_per_code,
            why=f"the talker's, frame_ms {talker.frame_ms}",
            max_mel_length=talker.max_codes,
            cache_dir=talker.cache_dir,
            downsample_time=None,
            tokenizer=None,
        )
    if config_path:
        overrides = [f"{key}=null" for key in ("val_csv", "val_voices_csv", "val_words_csv")]
        config, _ = load_config(AudioEncoderConfig, config_path, overrides + ([f"train_csv={csv}"] if csv else []))
    else:
        config = AudioEncoderConfig(save_dir="-", train_csv=csv, max_steps=1)
    return Frames(
        csv=config.train_csv,
        columns=COLUMNS,
        sample_rate=config.sample_rate,
        samples=config.frame_hop,
        why=f"the audio encoder's, frame_hop {config.frame_hop} at {config.sample_rate} Hz",
        max_mel_length=config.max_mel_length,
        cache_dir=config.cache_dir,
        downsample_time=config.downsample_time,
        tokenizer=Path(config.save_dir) / "tokenizer.json" if config_path else None,
        text_language=config.text_language,
    )


def report_lengths(lengths: np.ndarray, frames: Frames, limit: int) -> None:
    print(f"{'':>10} {'frames':>9} {'seconds':>9}")
    for percent in _PERCENTILES:
        value = np.percentile(lengths, percent, method="higher")
        label = {0: "shortest", 50: "median", 100: "longest"}.get(percent, f"{percent:g} %")
        print(f"{label:>10} {value:>9,} {value / frames.per_second:>9.2f}")
    cut = int((lengths > limit).sum())
    print(
        f"max_mel_length {limit} ({limit / frames.per_second:.2f} s) leaves out {cut:,} of {len(lengths):,} recordings "
        f"({100 * cut / len(lengths):.2f} %)"
    )
    all_rows, most = (8 * -(-int(np.percentile(lengths, p, method="higher")) // 8) for p in (100, 99))
    print(f'Set "max_mel_length": {all_rows} to keep all of them, {most} to keep 99 %')


def report_texts(manifest: Manifest, lengths: np.ndarray, frames: Frames) -> None:
    """Print the rows whose text needs more output frames than the recording has."""
    tokenizer = CtcTokenizer.load(frames.tokenizer) if frames.tokenizer and frames.tokenizer.exists() else None
    units = f"tokens of {frames.tokenizer}" if tokenizer else "characters, since there is no tokenizer.json yet"

    def needed(manifest: Manifest, row: int) -> int:
        text = read_text(manifest[row], frames.text_language)
        return frames_needed(tokenizer.encode(text) if tokenizer else [ord(character) for character in text])

    needs = measure(manifest, needed, np.int64, desc="texts")
    short = np.flatnonzero((lengths > 0) & (needs > output_frames(lengths, frames.downsample_time)))
    first = f": rows {', '.join(str(row + 1) for row in short[:_NAMED])}" if len(short) else ""
    more = ", ..." if len(short) > _NAMED else ""
    print(f"Text too long for its recording, in {units}: {len(short):,} recordings{first}{more}")
    if len(short) and not tokenizer:
        print("  Tokens are several characters long: check again with --config, once training has made its tokenizer")


def plot(lengths: np.ndarray, frames: Frames, limit: int, path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, and rarely asked for

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths / frames.per_second, bins=100)
    axes.axvline(limit / frames.per_second, color="black", linestyle="--", label=f"max_mel_length {limit}")
    axes.set(title=frames.csv, xlabel="seconds", ylabel="recordings")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: an unknown format
        raise UserError(f"--plot {path}: cannot write it: {error}") from error
    print(f"histogram in {path}")


if __name__ == "__main__":
    launch(main)
