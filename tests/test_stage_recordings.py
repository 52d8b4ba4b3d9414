"""The stages that learn from recordings take the same ones, of the same lengths, and tell what they mended."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from harness import run_script
from stages import AUDIO_ENC, SMALL_CODEC, TEXT

from omni.common.errors import BadRow, note
from omni.data.audio import MelSpec
from omni.data.order import ResumableDataset
from omni.data.recordings import LENGTH, row_length, samples_at
from omni.models.ctc import CtcTokenizer
from omni.models.speech_architectures import CodecArchitecture
from omni.stages.audio_encoder import AudioEncoderConfig, Utterances
from omni.stages.codec import SpeechClips
from omni.stages.tasks.processor import Processor
from omni.stages.vocoder import Clips, VocoderConfig
from omni.train import checkpoint

SPEC = MelSpec()
NOISE = (0.1 * np.random.default_rng(0).standard_normal(100_000)).astype(np.float32)
MOST = 40  # mel frames


class Folder:
    """A manifest whose only row is the file that is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, row: dict, column: str, root: str | None = None) -> Path:
        return self.path / row[column]

    def where(self, row: int) -> str:
        return f"row {row + 1}"

    def __getitem__(self, row: int) -> dict:
        return {"wav": "a.wav", "text": "a"}


def readers(folder: Path) -> dict:
    """What each stage makes of a recording: (T, M)."""
    manifest, rows, others = Folder(folder), np.arange(1), {"save_dir": "-", "max_steps": 1}
    row, rng = manifest[0], np.random.default_rng
    audio = AudioEncoderConfig(**others, train_csv="-", max_mel_length=MOST)
    utterances = Utterances(manifest, rows, audio, CtcTokenizer.train(iter(["a b c"] * 9), 48), training=False)
    clips = SpeechClips(manifest, rows, CodecArchitecture(**SMALL_CODEC), MOST // 8, training=False)
    vocoder = VocoderConfig(**others, train_csv="-", n_mels=20, segment_samples=800, max_clip_s=MOST / 100)
    whole, segments = (Clips(manifest, rows, vocoder, training=training) for training in (False, True))
    inputs = SimpleNamespace(audio={}, mel=SPEC, max_mel_length=MOST)
    return {
        "B": lambda: utterances.read(row, None).features,
        "D": lambda: clips.read(row, None),
        "F": lambda: whole.read(row, None)["log_mel"],
        "F, a segment": lambda: segments.read(row, rng(0))["log_mel"],
        "E": lambda: Processor.log_mels(inputs, folder / "a.wav"),
    }


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000])
def test_every_stage_reads_as_many_frames_as_the_index_counts(tmp_path, rate):
    """From one sample to beyond the bound: a bad row with its reason, or exactly the frames that were counted."""
    stages, rng = readers(tmp_path), np.random.default_rng(rate)
    bound, window = MOST * 160 * rate // 16_000, 640 * rate // 16_000
    lengths = {1, 2, 3, 5, *rng.integers(1, 2000, 12).tolist(), *rng.integers(2000, bound, 6).tolist()}
    lengths |= {n + more for n in (window, bound, bound // 2) for more in range(-2, 3)}
    for samples in sorted(lengths):
        soundfile.write(tmp_path / "a.wav", NOISE[:samples], rate)
        measured = np.array([row_length(Folder(tmp_path), 0)], LENGTH)
        at_16k = int(samples_at(measured, 16_000)[0])
        for name, read in stages.items():
            if at_16k < SPEC.win_length:
                with pytest.raises(BadRow, match="a.wav: lasts .* ms, expected at least 40 ms, one analysis window"):
                    read()
            elif at_16k > MOST * 160:
                with pytest.raises(BadRow, match="a.wav: lasts .* s, expected at most 0.4 s"):
                    read()
            else:
                frames = {"F": at_16k // 160, "F, a segment": 5}.get(name, SPEC.frames(at_16k))
                assert len(found := read()) == frames and found.isfinite().all(), (name, samples)


@pytest.mark.parametrize("value", [3e38, -1e12, 1e5, 50.0, float("nan"), float("inf")])
def test_a_sample_beyond_all_bounds_is_a_bad_row_in_every_stage(tmp_path, value):
    samples = NOISE[:4000].copy()
    samples[100] = value
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    for read in readers(tmp_path).values():
        with pytest.raises(
            BadRow, match="a.wav: (samples up to .*, expected at most 1|has samples that are not finite)"
        ):
            read()


def test_a_bad_length_is_counted_as_none():
    assert samples_at(np.zeros(3, LENGTH), 16_000).tolist() == [0, 0, 0]


def test_what_was_mended_reaches_the_log_once_for_each_file(tmp_path):
    training = AUDIO_ENC.training(tmp_path, num_workers=2, max_steps=3, batch_size=8, drop_last=False, val_split=0.0)
    for name in ("2.wav", "5.wav", "9.wav"):
        samples, rate = soundfile.read(tmp_path / name)
        soundfile.write(tmp_path / name, np.stack([samples, -samples], axis=1), rate)
    training.finish()
    log = (training.save_dir / "training.log").read_text()
    for number, name in enumerate(("2.wav", "5.wav", "9.wav")):
        assert log.count(f"{tmp_path / name}: its channels cancel out: channel ") == 1, log
        assert f"(note {number + 1})" in log
    assert "Not used" not in log


def test_a_batch_brings_its_notes(tmp_path):
    class ManifestDataset:
        def __len__(self):
            return 2

        def batch(self, rows, epoch):
            note(f"row {int(rows[0]) + 1} was odd")
            return {"n_targets": 1}

    notes = [batch["notes"] for batch in ResumableDataset(ManifestDataset(), seed=0, batch_size=1, shuffle=False)]
    assert notes == [["row 1 was odd"], ["row 2 was odd"]]


def test_a_figure_that_is_not_finite_is_one_line(tmp_path):
    training = TEXT.training(tmp_path, max_steps=1)
    training.finish()
    final = training.save_dir / TEXT.final
    payload = checkpoint.load(final)
    for weight in payload["model"].values():
        weight.fill_(float("nan"))
    checkpoint.save(final, payload)
    process = run_script(training, "scripts/evaluate.py", "text", "--data", training.config["train_text"], "--json")
    assert process.returncode == 1 and not process.stdout
    assert "is nan, expected a finite number" in process.stderr and "Traceback" not in process.stderr
