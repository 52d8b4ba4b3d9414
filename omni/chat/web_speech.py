"""What the web page does with speech while it comes: bounds and warnings. Needs Gradio."""

import html
from collections.abc import Iterable, Iterator

import gradio as gr
import numpy as np

from omni.common.errors import UserError
from omni.models.speaker import MAX_SECONDS


def bounded(
    spoken: Iterator[str | np.ndarray], pieces: Iterable[str], seconds: float, rate: int
) -> Iterator[str | np.ndarray]:
    """``spoken`` with at most so many seconds of sound, at ``rate`` Hz; then only the rest of the text."""
    samples = int(seconds * rate)
    for piece in spoken:
        if isinstance(piece, str):
            yield piece
            continue
        yield piece[:samples]
        samples -= len(piece)
        if samples <= 0:
            warn(f"cut after {seconds:g} s, which is as long as this page speaks at a time")
            break
    yield from pieces


def warned(spoken: Iterator[str | np.ndarray]) -> Iterator[str | np.ndarray]:
    """``spoken``, with a warning in place of an error."""
    try:
        yield from spoken
    except UserError as error:
        warn(str(error))


def warn_of_cut(text: str) -> None:
    warn(f"cut after {MAX_SECONDS:g} s: {text[:40]!r} goes on")


def warn(text: str) -> None:
    gr.Warning(html.escape(text))
