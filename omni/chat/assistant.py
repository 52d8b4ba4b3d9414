"""Who answers, who speaks, who reads: found in whatever kind of folder, that of a stage or an exported one."""

import contextlib
import os
import re
import shlex
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from omni.chat.speaker import Speaker
from omni.common.errors import BadRow, UserError
from omni.common.media import Media, is_data_uri, parse_data_uri, quoted
from omni.data.images import load_image
from omni.data.tokenizer import StreamDecoder, Tokenizer
from omni.data.video import load_frames
from omni.export.bundle import Merged, is_merged
from omni.models.codec import fingerprint
from omni.models.ocr import Ocr, load_ocr, read_text
from omni.models.omni_model import Encoded, Inputs, OmniModel, load_omni, spoken_bytes
from omni.models.vocoder import load_vocoder_for
from omni.stages.omni import SftConfig
from omni.thinker import Thinker, load_thinker
from omni.train.checkpoint import load_stage, step_files

MAX_SPOKEN_BYTES = 1 << 15  # of a text: about half an hour of speech
UTTERANCE_BYTES = 240  # what a talker learns from is hardly longer
PAUSE_S = 0.2  # between utterances
_ENDS = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)])\s+|(?<=[。！？])|\n+")
MAX_FRAMES = 16  # of a video, where nothing else is said and the context holds so many
# A text is measured before it is tokenised, which takes 200 times its size. Texts have 1 to 6 characters a token; only
# long runs of one character have more.
CHARACTERS_PER_TOKEN = 32
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all of C0 and C1 but tab and line feed
_FILE_URL = re.compile("file:(?://(?:localhost)?)?(/.*)", re.IGNORECASE | re.DOTALL)
LONGEST_CTX_LEN = 4096  # where no model is at hand to say its own


class Assistant:
    """A Thinker in conversation, with what it sees and hears through, if it has been taught to.

    Args:
        folder: where it comes from, for messages.
        metrics: figures of the Thinker's training.
        omni, config: of stage E; None: it answers to text alone.
    """

    def __init__(
        self,
        folder: Path,
        thinker: Thinker,
        tokenizer: Tokenizer,
        metrics: dict[str, float],
        omni: OmniModel | None = None,
        config: SftConfig | None = None,
    ) -> None:
        self.folder, self.thinker, self.tokenizer, self.metrics, self.omni = folder, thinker, tokenizer, metrics, omni
        self.inputs = None if omni is None else Inputs(tokenizer, config)
        self.config = config
        self.ctx_len = thinker.arch.ctx_len

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Assistant":
        """What stage A or stage E left in ``folder``, or what ``export.py`` has put there.

        Raises:
            UserError: nothing there, damaged, or not of one run.
        """
        if is_merged(folder):
            merged = Merged(folder)
            tokenizer, metrics = merged.tokenizer(), merged.components["thinker"]["metrics"]
            if merged.config["omni"] is None:
                return cls(folder, merged.part("thinker", device), tokenizer, metrics)
            omni, config = merged.omni(device)
            return cls(folder, omni.thinker, tokenizer, metrics, omni, config)
        if (folder / "omni_final.pt").exists() or step_files(folder, "omni"):
            omni, tokenizer, config = load_omni(folder, device)
            return cls(folder, omni.thinker, tokenizer, {}, omni, config)
        return cls(folder, *load_thinker(folder, device))

    # Attachments: parts of a message

    def image(self, path: Media) -> dict:
        """A picture file as a part of a message.

        Raises:
            UserError: it cannot be read, or the model does not see.
        """
        return self._attach("vision_encoder", path, lambda inputs: inputs.image(path))

    def sound(self, path: Media) -> dict:
        """A recording as a part of a message.

        Raises:
            UserError: it cannot be read or is too long, or the model does not hear.
        """
        return self._attach("audio_encoder", path, lambda inputs: inputs.sound(path))

    def video(self, path: Media, count: int | None = None) -> tuple[list[dict], int]:
        """Frames of a video, evenly spaced, as parts of a message; and how many frames the video has.

        Args:
            count: at most so many; None: as half of the context holds, and no more than ``MAX_FRAMES``.

        Raises:
            UserError: it cannot be read, or the model does not see.
        """

        def frames(inputs: Inputs) -> tuple[list[dict], int]:
            fit = self.ctx_len // 2 // (inputs.image_positions + 2)  # with their start and end
            pictures, total = load_frames(path, count or max(1, min(MAX_FRAMES, fit)), inputs.img_size, inputs.img_size)
            return [{"type": "image", "image": picture} for picture in pictures], total

        return self._attach("vision_encoder", path, frames)

    def lacks(self, encoder: str) -> str | None:
        """Why it does not see (``vision_encoder``) or hear (``audio_encoder``), as a sentence; None: it does."""
        if self.omni is not None and getattr(self.omni, encoder) is not None:
            return None
        does = "see" if encoder == "vision_encoder" else "hear"
        return (
            f"the model in {self.folder} does not {does}. Expected a folder of stage E that was trained to, or an "
            f"export of one (export.py --omni_ckpt)"
        )

    def _attach(self, encoder: str, path: Media, read):
        if reason := self.lacks(encoder):
            raise UserError(f"{quoted(path)}: {reason}")
        try:
            return read(self.inputs)
        except BadRow as error:
            raise UserError(str(error)) from error

    # Conversations

    def prompt(self, messages: list[dict], max_new_tokens: int) -> list[int] | Encoded:
        """What the Thinker reads of a conversation that ends with a question.

        Oldest turns are deleted from the list, in place, until there is room to answer.

        Raises:
            UserError: the question alone, with its attachments, is too long; the turns stay for a shorter one.
        """
        for text in _texts(messages):
            check_text_length(text, self.ctx_len)
        room = self.ctx_len - min(max_new_tokens, self.ctx_len // 2)
        first = 1 if messages[0]["role"] == "system" else 0
        for oldest in range(first, len(messages), 2):  # a turn is a question and its answer; the last has none yet
            try:
                prompt = self._encode(messages[:first] + messages[oldest:])
            except BadRow as error:
                if oldest == len(messages) - 1:
                    raise UserError(f"the message {error}, answer included") from error
                continue
            if length(prompt) <= room:
                break
        if length(prompt) < self.ctx_len:
            del messages[first:oldest]
        return prompt

    def _encode(self, messages: list[dict]) -> list[int] | Encoded:
        return self.tokenizer.chat_prompt(messages) if self.inputs is None else self.inputs.encode(messages)

    def generate(self, prompt: list[int] | Encoded, **sampling) -> Iterator[int]:
        """Yield the ids of the answer, each as soon as it is known; ``sampling`` as in ``Thinker.generate``."""
        if length(prompt) >= self.ctx_len:
            raise UserError(
                f"the text has {length(prompt)} tokens, and the model's context holds {self.ctx_len}, answer included"
            )
        sampling["stop_ids"] = (self.tokenizer.end_id, self.tokenizer.eos_id)
        if isinstance(prompt, Encoded):
            embeds = self.omni.embed_prompt(self.inputs, prompt)
            return self.thinker.generate(inputs_embeds=embeds, **sampling)
        return self.thinker.generate(prompt, **sampling)

    def answer(
        self, prompt: list[int] | Encoded, answer_states: "AnswerStates | None" = None, **sampling
    ) -> Iterator[str]:
        """The text that follows ``prompt``, in pieces, each as soon as it is known; as ``generate``.

        Args:
            answer_states: gets what the Thinker thinks meanwhile.
        """
        if answer_states is None:
            return self._decoded(self.generate(prompt, **sampling), [])
        answer_states.tokenizer = self.tokenizer
        return self._decoded(self.generate(prompt, states=answer_states.states, **sampling), answer_states.ids)

    def _decoded(self, ids: Iterator[int], seen: list[int]) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer, skip_special=True)
        for token_id in ids:
            seen.append(token_id)
            yield decoder.push(token_id)
        yield decoder.flush()


class AnswerStates:
    """What the Thinker thinks while it writes an answer, for a talker that has learnt to hear it."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer | None = None
        self.ids: list[int] = []
        self.states: list[torch.Tensor] = []  # (D,) each; of an answer that was cut, one less

    def of(self, texts: list[str]) -> list[torch.Tensor] | None:
        """For each of the answer's ``sentences`` what the talker hears at each byte that it reads, (L, D); None if the
        answer is not UTF-8, so that its bytes are not those of its text."""
        if not self.states:
            return None
        said = self.tokenizer.decode(self.ids, skip_special=True)
        counts = self.tokenizer.byte_counts(self.ids)
        if sum(counts) != len(said.encode()):
            return None
        nothing = torch.zeros_like(self.states[0])
        each = [*self.states, nothing][: len(self.ids)]
        heard = [state for state, count in zip(each, counts, strict=True) for _ in range(count)]
        found, at = [], 0
        for text in texts:
            at = said.index(text, at)
            first = len(said[:at].encode())
            at += len(text)
            found.append(torch.stack([*(heard[first + byte] for byte in spoken_bytes(text)), nothing]))
        return found


def check_text_length(text: str, ctx_len: int = LONGEST_CTX_LEN) -> None:
    """Refuse (UserError) what cannot fit into a context of ``ctx_len`` tokens, without tokenising it."""
    if len(text) > (most := ctx_len * CHARACTERS_PER_TOKEN):
        raise UserError(f"the text is too long: expected at most {most:,} characters (for ctx_len {ctx_len})")


def message(attached: list[dict], text: str) -> dict:
    """What the user says: attachments first, as in training, then the text."""
    if not attached:
        return {"role": "user", "content": text}
    return {"role": "user", "content": attached + ([{"type": "text", "text": text}] if text.strip() else [])}


def _texts(messages: list[dict]) -> Iterator[str]:
    for content in (each["content"] for each in messages):
        yield from [content] if isinstance(content, str) else (part["text"] for part in content if "text" in part)


def clean(text: str) -> str:
    """Bytes that are not UTF-8 reach Python as lone surrogates, which no tokenizer can take; so does half a pair."""
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)  # those that stand for no byte
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def without_controls(text: str) -> str:
    """What may be printed of a text that a model or somebody else wrote: nothing that moves the cursor or more."""
    return _CONTROLS.sub("", text)


def media_named(text: str) -> Media:
    """What a user names: a data URI or a file, as it stands or as a shell, a file manager or a browser writes it.

    Raises:
        UserError: it is a data URI that cannot be read.
    """
    if is_data_uri(text):
        try:
            return parse_data_uri(text)
        except BadRow as error:
            raise UserError(str(error)) from error
    names = [text]
    with contextlib.suppress(ValueError):  # a quotation mark of its own, as in it's.png
        if len(words := shlex.split(text)) == 1:  # 'my cat.png', my\ cat.png
            names += words
    urls = [url[1] for name in names if (url := _FILE_URL.match(name))]
    names += [urllib.parse.unquote(path, errors="surrogateescape") for path in urls]
    names += [os.path.expanduser(name) for name in names]
    return next((name for name in names if os.path.lexists(name)), text)


def length(prompt: list[int] | Encoded) -> int:
    """Positions that it takes."""
    return len(prompt.ids if isinstance(prompt, Encoded) else prompt)


def load_speaker(
    folder: Path,
    talker_ckpt: Path | None,
    vocoder_ckpt: Path | None,
    device: torch.device,
    assistant: Assistant | None = None,
) -> tuple[Speaker, str]:
    """Who speaks: that of ``talker_ckpt`` (stage D), else that of ``folder``, which is stage D's or an export.

    Args:
        vocoder_ckpt: stage F; None: the export's own, else Griffin-Lim.
        assistant: whose answers are spoken; of stage E with a talker, that one speaks, with the codec found here.

    Returns:
        The speaker, and a line on where it comes from and how it was judged.

    Raises:
        UserError: nobody there, damaged, or a vocoder of other log-mels than the codec's.
    """
    source = talker_ckpt or folder
    if talker_ckpt is None and not is_merged(folder) and not _has(folder, "talker"):
        raise UserError(f"{folder}: expected talker.pt, found none. Give the folder of stage D as --talker_ckpt")
    if is_merged(source):
        merged = Merged(source)
        speaker = merged.speaker(device)
        facts = merged.components["talker"]
        if vocoder_ckpt is not None:
            vocoder = load_vocoder_for(source, speaker.spec, vocoder_ckpt, device)
            speaker = Speaker(speaker.talker, speaker.codec, vocoder, uses_thinker_states=speaker.uses_thinker_states)
        speaker.uses_thinker_states = (
            speaker.uses_thinker_states and talker_ckpt is None
        )  # another export's hears another Thinker
    else:
        speaker = Speaker.load(source, vocoder_ckpt, device)
        facts = load_stage(source, "talker", "talker", "talker.pt")
        own = assistant.omni.talker if assistant is not None and assistant.omni is not None else None
        if own is not None and assistant.config.origins["codec"] == fingerprint(speaker.codec):
            speaker = Speaker(own, speaker.codec, speaker.vocoder, uses_thinker_states=True)
    perplexity = facts["metrics"].get("code_perplexity")
    judged = "not validated" if perplexity is None else f"code perplexity {perplexity:.3g}"
    return speaker, f"{source}: talker of step {facts['step']}, {judged}"


def sentences(text: str) -> list[str]:
    """A text as the talker has learnt to speak: one sentence at a time, one of more than ``UTTERANCE_BYTES`` in pieces.

    They stand in the text as they are, one after the other; what lies between them is not spoken.
    """
    return [piece for sentence in _ENDS.split(text) for piece in _pieces(sentence.strip()) if piece]


def _pieces(sentence: str) -> Iterator[str]:
    """A sentence cut behind commas and the like, where there is none at blanks, else anywhere."""
    while len(sentence.encode()) > UTTERANCE_BYTES:
        head = sentence.encode()[:UTTERANCE_BYTES].decode(errors="ignore")
        comma = re.match(r".*([,;:–—](?=\s)|[，、；：])", head, re.DOTALL)
        cut = comma.end() if comma else head.rfind(" ") if " " in head else len(head)
        yield head[:cut].strip()
        sentence = sentence[cut:].strip()
    yield sentence


def spoken(
    speaker: Speaker,
    texts: list[str],
    what: str,
    on_cut: Callable[[str], None],
    answer_states: AnswerStates | None = None,
    **sampling,
) -> Iterator[np.ndarray]:
    """The sound of one text after the other, with ``PAUSE_S`` of silence between, (S,) float32 pieces as they come.

    Args:
        what: whose texts they are, for messages.
        on_cut: called with a text of which more than ``MAX_SECONDS`` would have been said.
        answer_states: of the answer that the texts are the sentences of.
        sampling: as in ``Speaker.stream``.

    Raises:
        UserError: more than ``MAX_SPOKEN_BYTES`` in all, or there is nothing to say.
    """
    if (size := sum(len(text.encode()) for text in texts)) > MAX_SPOKEN_BYTES:
        raise UserError(f"{what}: {size:,} bytes are too long to be spoken, expected at most {MAX_SPOKEN_BYTES:,}")
    pause = np.zeros(round(PAUSE_S * speaker.spec.sample_rate), np.float32)
    longest = int(speaker.max_frames * speaker.code_s * speaker.spec.sample_rate)
    silent, heard = True, None
    if answer_states is not None and speaker.uses_thinker_states:
        heard = answer_states.of(texts)
    for number, text in enumerate(texts):
        said = 0
        for piece in speaker.stream(text, thinker_states=heard and [heard[number]], **sampling):
            if not said and not silent:
                yield pause
            said, silent = said + len(piece), False
            yield piece
        if said >= longest:
            on_cut(text)
        yield np.zeros(0, np.float32)  # nothing more, and whoever takes turns may take one after each text
    if silent:
        raise UserError(f"{what}: the talker had nothing to say to it")


def load_reader(folder: Path, ocr_ckpt: Path | None, device: torch.device) -> Ocr:
    """Who reads pictures of text: the model of ``ocr_ckpt`` (stage G), else that of ``folder``, stage G's or an export.

    Raises:
        UserError: none there, or damaged.
    """
    source = ocr_ckpt or folder
    if ocr_ckpt is None and not is_merged(folder) and not _has(folder, "ocr"):
        raise UserError(f"{folder}: expected ocr.pt, found none. Give the folder of stage G as --ocr_ckpt")
    return Merged(source).part("ocr", device) if is_merged(source) else load_ocr(source, device)


def read_picture(reader: Ocr, path: Media) -> str:
    """The text of a picture file of one line of text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        picture = load_image(path, reader.arch.height, reader.arch.width, fit="pad")
    except BadRow as error:
        raise UserError(str(error)) from error
    return read_text(reader, picture[None].to(next(reader.parameters()).device))[0]


def has_part(folder: Path, part: str) -> bool:
    """Whether a stage's folder or an export holds a ``talker`` or an ``ocr``, damaged or not."""
    return Merged(folder).has(part) if is_merged(folder) else _has(folder, part)


def _has(folder: Path, prefix: str) -> bool:
    return (folder / f"{prefix}.pt").exists() or bool(step_files(folder, prefix))
