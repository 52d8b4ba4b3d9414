"""Audio samples and pictures of their log-mels, beside the checkpoints and in TensorBoard."""

import io
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from omni.common.files import replace_file
from omni.data.audio import MelSpec, log_mel
from omni.train.run import Run


def save_samples(run: Run, step: int, index: int, clips: dict[str, Tensor], spec: MelSpec) -> None:
    """Write versions of one utterance to ``save_dir/samples``: a WAV file each, and their log-mels as one picture.

    Args:
        index: number of the utterance.
        clips: name -> waveform (S,); empty ones are left out.
    """
    clips = {name: clip for name, clip in clips.items() if len(clip)}
    if not run.is_main or not clips:
        return
    folder = run.save_dir / "samples"
    folder.mkdir(exist_ok=True)
    stem = f"step_{step}_{index}"
    sounds = {name: clip.detach().float().cpu().clamp(-1, 1) for name, clip in clips.items()}
    for name, sound in sounds.items():
        write_sound(folder / f"{stem}_{name}.wav", sound, spec.sample_rate)
    picture = draw_log_mels({name: log_mel(sound, spec) for name, sound in sounds.items()}, spec)
    replace_file(folder / f"{stem}.png", lambda file: _write_png(file, picture))
    run.logs.record_media(step, f"clip_{index}", sounds, spec.sample_rate, picture)


def write_sound(path: Path, sound: Tensor, sample_rate: int) -> None:
    """Write ``sound`` (S,) in [-1, 1] as a WAV file, whole or not at all."""
    whole = io.BytesIO()  # soundfile prints a traceback of its own where a disk is full
    soundfile.write(whole, sound.numpy(), sample_rate, "PCM_16", format="WAV")
    replace_file(path, lambda file: file.write(whole.getbuffer()))


def _write_png(file, picture: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(picture).save(file, "PNG")


def draw_log_mels(log_mels: dict[str, Tensor], spec: MelSpec) -> np.ndarray:
    """Log-mels (T, M) by name, one above the other on the same colours, as a picture (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and most runs draw nothing
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * len(log_mels)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    low, high = (bound(torch.stack([bound(mel) for mel in log_mels.values()])) for bound in (torch.min, torch.max))
    for axes, (name, mel) in zip(
        figure.subplots(len(log_mels), sharex=True, squeeze=False)[:, 0], log_mels.items(), strict=True
    ):
        seconds = len(mel) * spec.hop_length / spec.sample_rate
        image = axes.imshow(
            mel.T.numpy(), origin="lower", aspect="auto", interpolation="nearest", vmin=low, vmax=high,
            extent=(0, seconds, 0, mel.shape[1]),
        )  # fmt: skip
        axes.set(title=name, ylabel="mel channel")
    axes.set_xlabel("seconds")
    figure.colorbar(image, ax=figure.axes, label="log amplitude")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
