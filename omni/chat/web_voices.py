"""The choice of a voice on the web page: one of the talker's by its name, or that of a recording. Needs Gradio."""

import gradio as gr
from torch import Tensor

from omni.chat.server import Turns
from omni.models.speaker import MAX_SECONDS, MIN_VOICE_S, Speaker


def voice_inputs(speaker: Speaker | None) -> list[gr.components.Component]:
    """The arguments ``name`` and ``path`` of ``chosen_voice`` as components of the page; none for one voice."""
    if speaker is None or speaker.talker.voice_encoder is None:
        return []
    names = [name for name in speaker.talker.architecture.speakers if name]
    with gr.Accordion("Voice", open=False):
        voice = gr.Dropdown(names, value=names[0] if names else None, label="Voice", visible=len(names) > 1)
        recording = gr.Audio(
            type="filepath", label=f"Or the voice of a recording of {MIN_VOICE_S:g} to {MAX_SECONDS:g} s",
            sources=["upload", "microphone"], elem_id="voice",
        )  # fmt: skip
    recording.preprocess = lambda given: given and given.path  # omni.data.audio judges the file, not Gradio
    return [voice, recording]


async def chosen_voice(turns: Turns, speaker: Speaker | None, name: str | None, path: str | None) -> Tensor | None:
    """The codes (N, Q) of the voice in the file at ``path``, else of the talker's voice ``name``; None: its first.

    Raises:
        UserError: the file cannot be used, or there is no such voice.
    """
    if path is None:
        return speaker.voice(name) if name else None
    return await turns.compute(speaker.voice, None, path)
