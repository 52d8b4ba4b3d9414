"""Speech for answers and texts: the speaker that a folder holds, texts cut into sentences, sound piece by piece."""

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch

from omni.chat.assistant import AnswerStates, Assistant
from omni.common.errors import UserError
from omni.common.files import replace_file
from omni.common.media import quoted
from omni.common.numerics import weights_sha256
from omni.common.spoken import NO_TITLE
from omni.export.bundle import Export, open_model, source_of
from omni.export.folder import is_export
from omni.models.speaker import MAX_SECONDS, Speaker
from omni.models.vocoder import refuse_other_mels
from omni.stages.omni_parts import began_with

MAX_SPOKEN_BYTES = 1 << 15  # of a text: about half an hour of speech
UTTERANCE_BYTES = 240  # what a talker learns from is hardly longer
PAUSE_S = 0.2  # between utterances
_ENDS = re.compile(rf"(?<=[.!?…]){NO_TITLE}\s+|(?<=[.!?…][\"'”’)])\s+|(?<=[。！？])|\n+")


def load_speaker(
    folder: Path,
    talker_ckpt: Path | None,
    vocoder_ckpt: Path | None,
    device: torch.device,
    assistant: Assistant | None = None,
) -> tuple[Speaker, str]:
    """The speaker of ``talker_ckpt`` (stage D), else of ``folder``, which is stage D's or an export.

    Args:
        vocoder_ckpt: stage F; None: the export's own, else Griffin-Lim.
        assistant: gives the answers to speak; if it comes from stage E with a talker, that talker is used, with the
            codec found here. Not if ``talker_ckpt`` has another codec or another talker than stage E began with.

    Returns:
        The speaker, and a line with its origin and its measured quality.

    Raises:
        UserError: there is none, it is damaged, or the vocoder reads other log-mels than the codec writes.
    """
    source = source_of("talker", talker_ckpt, folder)
    if is_export(source):
        source = Export(source)
    opened, codec = (open_model(part, source, device) for part in ("talker", "rvq"))
    speaker = Speaker(opened.model, codec.model)
    own = assistant.omni.talker if assistant is not None and assistant.omni is not None else None
    known = () if own is None else (assistant.origins.get("codec"), assistant.origins.get("exported_codec"))
    same = weights_sha256(codec.model) in known
    if same and talker_ckpt is not None and talker_ckpt.resolve() != assistant.folder.resolve():
        if isinstance(source, Export):
            same = weights_sha256(opened.model) == weights_sha256(own)
        else:
            same = began_with(assistant.origins, talker_ckpt, own)
    if same:
        speaker = Speaker(own, codec.model, uses_thinker_states=True)
    if vocoder_ckpt is not None:
        speaker.vocoder = open_model("vocoder", vocoder_ckpt, device).model
        refuse_other_mels(vocoder_ckpt, speaker.vocoder.architecture, codec.path.parent, speaker.spec)
    elif isinstance(source, Export) and source.has("vocoder"):
        speaker.vocoder = source.open("vocoder", device).model
    perplexity = opened.metrics.get("code_perplexity")
    judged = "not validated" if perplexity is None else f"code perplexity {perplexity:.3g}"
    apart = "" if same or own is None else "; not the one of stage E, so without the Thinker's states"
    return speaker, f"{opened.path.parent}: talker of step {opened.step}, {judged}{apart}"


def refuse_unspeakable(text: str, what: str) -> None:
    """
    Raises:
        UserError: the text is empty, longer than ``MAX_SPOKEN_BYTES``, or without a letter or digit; ``what`` names it.
    """
    if not text.strip() or len(text.encode(errors="replace")) > MAX_SPOKEN_BYTES:
        raise UserError(f"{what}: expected a text of 1 to {MAX_SPOKEN_BYTES:,} bytes")
    if not any(character.isalnum() for character in text):
        raise UserError(f'{what}: expected words, found "{quoted(text)}"')


def sentences(text: str) -> list[str]:
    """Split a text into what the talker speaks at a time: sentences, or pieces of one longer than ``UTTERANCE_BYTES``.

    Each is a substring of the text, in its order; what lies between them is white space.
    """
    return [piece for sentence in _ENDS.split(text) for piece in _pieces(sentence.strip()) if piece]


def _pieces(sentence: str) -> Iterator[str]:
    """Cut a sentence after commas and the like; where there is none, at blanks; else anywhere."""
    while len(sentence.encode()) > UTTERANCE_BYTES:
        head = sentence.encode()[:UTTERANCE_BYTES].decode(errors="ignore")
        comma = re.match(r".*([,;:–—](?=\s)|[，、；：])", head, re.DOTALL)
        cut = comma.end() if comma else head.rfind(" ") if " " in head else len(head)
        yield head[:cut].strip()
        sentence = sentence[cut:].strip()
    yield sentence


def finished_sentences(pieces: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Each piece of a text, with those of the text's ``sentences`` that were known before it; at the end "" with the
    last ones. No later piece changes a sentence that another follows."""
    text, found = "", 0
    for piece in pieces:
        new = sentences(text)[found:-1]
        found += len(new)
        yield piece, new
        text += piece
    yield "", sentences(text)[found:]


def speak(
    speaker: Speaker,
    pieces: Iterable[str],
    what: str,
    on_cut: Callable[[str], None],
    answer_states: AnswerStates | None = None,
    **sampling,
) -> Iterator[str | np.ndarray]:
    """Yield the pieces of a text as they come and, after each of its ``sentences``, the sentence's sound, in (S,)
    float32 pieces as they come, with ``PAUSE_S`` of silence before all but the first.

    An answer is written on between two sentences only, so what is heard of it is always written. A sentence is spoken
    one token after it is known: then there are states of all of its tokens.

    Args:
        what: name of the text in messages.
        on_cut: called with each sentence whose speech was cut after ``MAX_SECONDS``.
        answer_states: those of the answer, if the text is one.
        sampling: as in ``Speaker.stream``.

    Raises:
        UserError: after the last piece of the text: it exceeds ``MAX_SPOKEN_BYTES``, or the talker made no sound.
    """
    pause = np.zeros(round(PAUSE_S * speaker.spec.sample_rate), np.float32)
    longest = int(speaker.max_frames * speaker.code_s * speaker.spec.sample_rate)
    silent, size = True, 0
    for piece, texts in finished_sentences(pieces):
        size += len(piece.encode())
        yield piece
        for text in texts if size <= MAX_SPOKEN_BYTES else ():
            samples, states = 0, None
            if answer_states is not None and speaker.uses_thinker_states:
                states = answer_states.of(text, speaker.text_language)
            for sound in speaker.stream(text, thinker_states=None if states is None else [states], **sampling):
                if not samples and not silent:
                    yield pause
                samples, silent = samples + len(sound), False
                yield sound
            if samples >= longest:
                on_cut(text)
            yield np.zeros(0, np.float32)  # lets callers that take turns yield after each sentence
    if size > MAX_SPOKEN_BYTES:
        raise UserError(f"{what}: {size:,} bytes are too long to be spoken, expected at most {MAX_SPOKEN_BYTES:,}")
    if silent:
        raise UserError(f"{what}: the talker made no sound for it")


def wav_target(path: Path) -> Path:
    """The file that ``--audio_out`` names; of a link the file it leads to, so that the link stays one.

    Raises:
        UserError: a folder, pipe or device has this name; its folder does not exist; its suffix is not .wav.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UserError(f"--audio_out {path}: expected a file, or a name for a new one; found a folder, pipe or device")
    if not target.parent.is_dir():
        raise UserError(f"--audio_out {path}: expected a file in a folder that exists")
    if any(name.suffix.lower() not in ("", ".wav") or name.name in ("", ".wav") for name in (path, target)):
        raise UserError(f"--audio_out {path}: expected a name that ends in .wav, the format that is written")
    return target


def write_speech(
    speaker: Speaker, pieces: Iterable[str], path: Path, what: str, *, since: str, start_s: float, **sampling
) -> None:
    """Write the speech of a text to a WAV file, and its speed to stderr.

    Args:
        pieces, what, sampling: see ``speak``.
        since: what was given at ``start_s`` (of ``time.perf_counter``), for the message about the speed.

    Raises:
        UserError: all pieces were taken, but the talker made no sound, or the file cannot be written.
    """
    first_s, samples, rate = None, 0, speaker.spec.sample_rate

    def cut(text: str) -> None:
        print(f"{quoted(path)}: cut after {MAX_SECONDS:g} s: {text[:40]!r} goes on", file=sys.stderr)

    whole = io.BytesIO()  # soundfile prints a traceback of its own where a disk is full
    with soundfile.SoundFile(whole, "w", samplerate=rate, channels=1, format="WAV", subtype="PCM_16") as wav:
        for piece in speak(speaker, pieces, what, cut, **sampling):
            if isinstance(piece, str):
                continue
            if len(piece) and first_s is None:
                first_s = time.perf_counter() - start_s
            samples += len(piece)
            wav.write(piece)
    target = wav_target(path)
    try:
        replace_file(target, lambda file: file.write(whole.getbuffer()))
    except OSError as error:
        raise UserError(f"--audio_out {path}: cannot write it: {error.strerror}") from error
    took, lasts = time.perf_counter() - start_s, samples / rate
    print(
        f"{quoted(path)}: {lasts:.2f} s of speech in {took:.2f} s, real-time factor {took / lasts:.3f}, "
        f"first sound {1000 * first_s:.0f} ms after {since}",
        file=sys.stderr,
    )
