"""The page of scripts/check_data.py: what was found, lengths as pictures, and samples as the model gets them."""

import html
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from omni.common.files import replace_file
from omni.common.media import Media
from omni.data.audio import load_audio
from omni.data.tokenizer import IGNORE_INDEX
from scripts.listening_page import data_uri

_RATE = 16_000
_LONGEST_S = 20.0  # of a sound on the page
_MOST_TOKENS = 200
_LOG_MELS = ("features", "log_mels", "log_mel")  # keys of batches
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<style>
body {{ font-family: sans-serif; margin: 1em 2em; max-width: 70em }}
pre {{ background: #f3f3f3; padding: 0.8em; white-space: pre-wrap }}
.plots, .samples {{ display: flex; flex-wrap: wrap; gap: 1em }}
article {{ border: 1px solid #ccc; padding: 0.6em; width: 20em; overflow-wrap: anywhere }}
article img {{ max-width: 100%; min-height: 4em; image-rendering: pixelated }}
audio {{ width: 100% }}
h3 {{ font-size: 0.8em; margin: 0 0 0.4em; color: #555 }}
p {{ margin: 0.3em 0; font-size: 0.9em }}
.tokens span {{ background: #e8eefc; margin: 1px; padding: 0 2px; white-space: pre-wrap; display: inline-block }}
.tokens .learnt {{ background: #bfe5c1 }}
</style></head><body><h1>{title}</h1><pre>{lines}</pre>
<div class="plots">{plots}</div>
<h2>Samples, as the model gets them</h2><p>Green tokens are learnt; the others are read. Pictures and log-mels
are varied as in training: hidden bands of SpecAugment, other sizes, places and colours.</p>
<div class="samples">{samples}</div></body></html>
"""


@dataclass
class Sample:
    """One sample: texts by name, and what stands for pictures, sounds and tokens."""

    name: str
    texts: dict[str, str] = field(default_factory=dict)
    pictures: list[bytes] = field(default_factory=list)  # PNG
    sound: bytes | None = None  # WAV
    tokens: list[tuple[str, bool]] = field(default_factory=list)  # text, and whether it is a target


def sample_of(name: str, row: dict, batch: dict, wav: Media | None, tokenizer) -> Sample:
    """A row with its batch of one."""
    texts = {key: value[:400] for key, value in row.items() if isinstance(value, str) and not key.startswith("_")}
    pictures = [picture_of(image) for image in batch.get("images", [])]
    pictures += [picture_of_log_mel(batch[key][0]) for key in _LOG_MELS if key in batch]
    return Sample(name, texts, pictures, sound_of(wav) if wav is not None else None, tokens_of(batch, tokenizer))


def picture_of(image: Tensor) -> bytes:
    """(3, H, W) uint8, or real numbers of any range, as PNG."""
    if image.dtype != torch.uint8:
        image = 255 * (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
    return _png(image.to(torch.uint8).permute(1, 2, 0).numpy())


def picture_of_log_mel(log_mel: Tensor) -> bytes:
    """(T, M) as PNG: time from left to right, high frequencies above, loud ones bright."""
    values = log_mel.float().T.flip(0)
    return _png((255 * (values - values.min()) / (values.max() - values.min()).clamp(min=1e-6)).byte().numpy())


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


def sound_of(wav: Media) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, load_audio(wav, _RATE)[: int(_LONGEST_S * _RATE)], _RATE, format="WAV")
    return file.getvalue()


def tokens_of(batch: dict, tokenizer) -> list[tuple[str, bool]]:
    """The tokens of a batch of one, each with whether it is a target of the loss."""
    if tokenizer is None:
        return [(text, True) for text in batch.get("texts", [])]
    if "target_lengths" in batch:  # CTC: all are targets
        return [(tokenizer.decode([one]), True) for one in batch["targets"][0].tolist()[:_MOST_TOKENS]]
    if "tokens" not in batch:
        return []
    ids = batch["tokens"][0].tolist()
    ids = ids[: int(batch["sizes"][0])] if "sizes" in batch else ids
    learnt = [True] * len(ids)
    if "targets" in batch:  # the token after each position
        targets = batch["targets"][0].tolist()[: len(ids)]
        learnt = [False] + [target != IGNORE_INDEX for target in targets]
        ids += targets[-1:] if learnt[-1] else []  # the end of the answer is learnt, too
    return [(tokenizer.decode([one]), bool(is_target)) for one, is_target in zip(ids, learnt, strict=False)][
        :_MOST_TOKENS
    ]


def histogram(name: str, values: np.ndarray) -> bytes:
    from matplotlib.figure import Figure  # not pyplot: no window, and nothing that is left open

    drawing = Figure(figsize=(4, 2.4), layout="constrained", dpi=80)
    axes = drawing.subplots()
    axes.hist(values, bins=min(40, max(1, len(np.unique(values)))), color="#4a6fa5")
    axes.set_title(name, fontsize=8, parse_math=False)
    axes.tick_params(labelsize=7)
    axes.set_ylabel("rows", fontsize=7)
    file = io.BytesIO()
    drawing.savefig(file, format="png")
    return file.getvalue()


def write_page(path: Path, title: str, lines: list[str], lengths: dict[str, np.ndarray], samples: list[Sample]) -> None:
    """One HTML file that loads nothing: sounds and pictures stand in it."""
    plots = "".join(
        f'<img alt="{html.escape(name)}" src="{data_uri(histogram(name, values), "image/png")}">'
        for name, values in lengths.items()
    )
    page = PAGE.format(
        title=html.escape(f"Data of {title}"),
        lines=html.escape("\n".join(lines)),
        plots=plots,
        samples="".join(map(article, samples)),
    )
    replace_file(path, lambda file: file.write(page.encode("utf-8", "replace")))


def article(sample: Sample) -> str:
    parts = [f"<h3>{html.escape(sample.name)}</h3>"]
    parts += [f'<img alt="" src="{data_uri(picture, "image/png")}">' for picture in sample.pictures]
    if sample.sound is not None:
        parts.append(f'<audio controls src="{data_uri(sample.sound, "audio/wav")}"></audio>')
    parts += [f"<p><b>{html.escape(name)}</b> {html.escape(text)}</p>" for name, text in sample.texts.items()]
    if sample.tokens:
        spans = "".join(
            f'<span class="learnt">{html.escape(text)}</span>' if learnt else f"<span>{html.escape(text)}</span>"
            for text, learnt in sample.tokens
        )
        parts.append(f'<p class="tokens">{spans}</p>')
    return f"<article>{''.join(parts)}</article>"
