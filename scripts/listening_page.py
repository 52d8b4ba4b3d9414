"""Versions of the same sentences side by side, as a page to listen to and as a picture: what scripts/second_opinion.py
writes with --page and --picture."""

import base64
import html
import io
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from omni.common.files import replace_file
from omni.data.audio import MelSpec, load_audio, log_mel

MOST_SENTENCES = 10  # on the page
MOST_DRAWN = 3  # in the picture
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Second opinion</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<style>
body {{ font-family: sans-serif; margin: 1em 2em }}
td {{ padding-right: 1em }}
div {{ display: flex; flex-wrap: wrap; gap: 1em }}
figure {{ margin: 0; width: 18em }}
audio, img {{ width: 100% }}
img {{ height: 7em }}
p {{ margin: 0.2em 0 }}
</style></head><body><h1>Second opinion</h1><table>{table}</table>{sentences}</body></html>
"""


@dataclass(frozen=True)
class Version:
    """A sentence as one source speaks it."""

    source: str
    path: Path
    heard: dict[str, str] = field(default_factory=dict)  # recogniser -> transcript
    speaker: str = ""

    @property
    def title(self) -> str:
        return f"{self.source}, {self.speaker}" if self.speaker else self.source


def write_page(path: Path, sentences: list[tuple[str, list[Version]]], table: list[list[str]]) -> None:
    """One HTML file that loads nothing: sounds and pictures stand in it.

    Args:
        sentences: texts with their versions; the first MOST_SENTENCES are shown.
        table: rows of cells that stand above them.
    """
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table)
    shown = "".join(
        f"<h2>{html.escape(text)}</h2><div>{''.join(map(figure, versions))}</div>"
        for text, versions in sentences[:MOST_SENTENCES]
    )
    page = PAGE.format(table=rows, sentences=shown)
    replace_file(path, lambda file: file.write(page.encode()))


def figure(version: Version) -> str:
    heard = "".join(f"<p><b>{name}</b> {html.escape(text)}</p>" for name, text in version.heard.items())
    picture = draw_log_mel(load_audio(version.path, MelSpec.sample_rate))
    return (
        f"<figure><figcaption>{html.escape(version.title)}</figcaption>"
        f'<img alt="spectrogram" src="{data_uri(picture, "image/png")}">'
        f'<audio controls src="{data_uri(version.path.read_bytes(), "audio/wav")}"></audio>{heard}</figure>'
    )


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def write_picture(path: Path, sentences: list[tuple[str, list[Version]]]) -> None:
    """A PNG with the spectrograms of the first MOST_DRAWN sentences: a row for each sentence, a column for each source.

    Args:
        sentences: texts with their versions.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, and nothing that is left open

    shown = sentences[:MOST_DRAWN]
    sources = list(dict.fromkeys(version.source for _, versions in shown for version in versions))
    drawing = Figure(figsize=(3 * len(sources), 1.9 * len(shown)), layout="constrained", dpi=80)
    for axes, (text, versions) in zip(drawing.subplots(len(shown), len(sources), squeeze=False), shown, strict=True):
        for axis in axes:
            axis.set_axis_off()
        for version in versions:
            axis = axes[sources.index(version.source)]
            axis.set_axis_on()
            mel = log_mel(torch.from_numpy(load_audio(version.path, MelSpec.sample_rate)), MelSpec()).numpy()
            seconds = len(mel) * MelSpec.hop_length / MelSpec.sample_rate
            axis.imshow(mel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, mel.shape[1]))
            axis.set_title(version.title, fontsize=8, parse_math=False)
            axis.set_yticks([])
            axis.tick_params(labelsize=6)
        first = axes[sources.index(versions[0].source)]
        first.set_ylabel("\n".join(textwrap.wrap(text, 24)), fontsize=7, parse_math=False)
    drawing.supxlabel("seconds; 80 mel channels, louder is brighter", fontsize=7)
    replace_file(path, lambda file: drawing.savefig(file, format="png"))


def draw_log_mel(waveform: np.ndarray) -> bytes:
    """A waveform (S,) as a PNG: a pixel a frame of 10 ms and a mel channel, high ones above, loud ones bright."""
    mel = log_mel(torch.from_numpy(waveform), MelSpec()).numpy()  # (T, M)
    low, high = np.log(1e-5), mel.max()
    picture = (255 * (mel.T[::-1] - low) / max(high - low, 1.0)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
