"""The assistant: a Thinker in conversation, opened from a folder of stage A, of stage E or of export.py."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from omni.common.errors import BadRow, UserError
from omni.common.media import Media, quoted
from omni.common.spoken import Language
from omni.data.tokenizer import StreamDecoder, Tokenizer
from omni.data.video import load_frames
from omni.export.bundle import Export, open_model
from omni.export.folder import is_export
from omni.models.omni_model import OmniModel
from omni.stages import STAGES
from omni.stages.omni import ConversationKeys
from omni.stages.tasks.processor import Encoded, Processor, speech_bytes
from omni.train.checkpoint import understood
from omni.train.stage import Loaded

MAX_FRAMES = 16  # of a video, where nothing else is said and the context holds so many
# A text is measured before it is tokenised, which takes 200 times its size. Texts have 1 to 6 characters a token; only
# long runs of one character have more.
CHARACTERS_PER_TOKEN = 32
LONGEST_CTX_LEN = 4096  # bound where the text is not for a Thinker


class Assistant:
    """A Thinker in conversation, with the encoders that stage E has connected to it.

    Args:
        folder: its origin, for messages.
        opened: a Thinker, or the model of stage E.
    """

    def __init__(self, folder: Path, opened: Loaded) -> None:
        self.folder, self.tokenizer, self.metrics = folder, opened.tokenizer, opened.metrics
        self.omni = self.processor = None
        self.thinker, self.origins = opened.model, {}
        if isinstance(opened.model, OmniModel):
            self.omni, self.thinker = opened.model, opened.model.thinker
            with understood(opened.path):
                keys = ConversationKeys.model_validate(opened.config)
            self.origins = keys.origins
            self.processor = Processor(self.tokenizer, self.omni.architecture, prompt=keys.prompt)
        self.ctx_len = self.thinker.architecture.ctx_len

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Assistant":
        """The assistant of a folder of stage A, stage E or ``export.py``.

        Raises:
            UserError: the folder has none, is damaged, or holds files of several runs.
        """
        if not folder.exists():
            raise UserError(f"{folder}: expected a folder with thinker.pt, or an export, found nothing")
        source = Export(folder) if is_export(folder) else folder
        answers_all = source.config["omni"] is not None if isinstance(source, Export) else STAGES["omni"].is_in(folder)
        return cls(folder, open_model("omni" if answers_all else "thinker", source, device))

    # Attachments: parts of a message

    def image(self, path: Media) -> dict:
        """A picture file as a part of a message.

        Raises:
            UserError: it cannot be read, or the model takes no pictures.
        """
        return self._attach("vision_encoder", path, lambda processor: processor.image(path))

    def sound(self, path: Media) -> dict:
        """A recording as a part of a message.

        Raises:
            UserError: it cannot be read or is too long, or the model takes no recordings.
        """
        return self._attach("audio_encoder", path, lambda processor: processor.recording(path))

    def video(self, path: Media, count: int | None = None) -> tuple[list[dict], int]:
        """Frames of a video, evenly spaced, as parts of a message; and how many frames the video has.

        Args:
            count: the most frames; None: as many as half of the context holds, at most ``MAX_FRAMES``.

        Raises:
            UserError: it cannot be read, or the model takes no pictures.
        """

        def frames(processor: Processor) -> tuple[list[dict], int]:
            fit = self.ctx_len // 2 // (processor.image_positions + 2)  # with their start and end
            side = processor.vision.img_size
            pictures, total = load_frames(path, count or max(1, min(MAX_FRAMES, fit)), side, side)
            return [{"type": "image", "image": picture} for picture in pictures], total

        return self._attach("vision_encoder", path, frames)

    def lacks(self, encoder: str) -> str | None:
        """Why it takes no pictures (``vision_encoder``) or recordings (``audio_encoder``); None: it does."""
        if self.omni is not None and getattr(self.omni, encoder) is not None:
            return None
        kind = "pictures" if encoder == "vision_encoder" else "recordings"
        return (
            f"the model in {self.folder} takes no {kind}. Expected a folder of stage E that was trained on {kind}, or "
            f"an export with it (export.py --omni_ckpt)"
        )

    def _attach(self, encoder: str, path: Media, read):
        if reason := self.lacks(encoder):
            raise UserError(f"{quoted(path)}: {reason}")
        try:
            return read(self.processor)
        except BadRow as error:
            raise UserError(str(error)) from error

    # Conversations

    def prompt(
        self, messages: list[dict], max_new_tokens: int, tell: Callable[[str], None] = lambda line: None
    ) -> list[int] | Encoded:
        """Encode a conversation that ends with a question.

        The oldest turns are deleted from the list, in place, until there is room for an answer.

        Args:
            tell: gets a line for the user if turns are deleted.

        Raises:
            UserError: the question with its attachments is too long; the list stays as it was.
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
        self.check_room(prompt)
        if oldest > first:
            tell(f"the context is full: {(oldest - first) // 2} of the oldest questions are forgotten")
        del messages[first:oldest]
        return prompt

    def check_room(self, prompt: list[int] | Encoded) -> None:
        """
        Raises:
            UserError: no answer fits after the prompt.
        """
        if length(prompt) >= self.ctx_len:
            raise UserError(
                f"the text has {length(prompt)} tokens, and the model's context holds {self.ctx_len}, answer included"
            )

    def _encode(self, messages: list[dict]) -> list[int] | Encoded:
        return self.tokenizer.chat_prompt(messages) if self.processor is None else self.processor.encode(messages)

    def generate(self, prompt: list[int] | Encoded, **sampling) -> Iterator[int]:
        """Yield the ids of the answer, each as soon as it is known; ``sampling`` as in ``Thinker.generate``."""
        self.check_room(prompt)
        sampling["stop_ids"] = (self.tokenizer.end_id, self.tokenizer.eos_id)
        if isinstance(prompt, Encoded):
            embeds = self.omni.embed_prompt(self.processor.collate([prompt]))
            return self.thinker.generate(inputs_embeds=embeds, **sampling)
        return self.thinker.generate(prompt, **sampling)

    def answer(
        self,
        prompt: list[int] | Encoded,
        answer_states: "AnswerStates",
        tell: Callable[[str], None] = lambda line: None,
        **sampling,
    ) -> Iterator[str]:
        """The text that follows ``prompt``, in pieces, each as soon as it is known; as ``generate``.

        Args:
            answer_states: collects the ids and the Thinker's states.
            tell: gets a line for the user if the text ends for lack of room.
        """
        answer_states.tokenizer = self.tokenizer
        ids = self.generate(prompt, states=answer_states.states, **sampling)

        def pieces() -> Iterator[str]:
            yield from self._decoded(ids, answer_states.ids)
            heard = isinstance(prompt, Encoded) and prompt.recordings  # their blank frames take no room
            if len(answer_states.ids) >= sampling["max_new_tokens"]:
                tell(f"the answer was cut by max_new_tokens {sampling['max_new_tokens']}")
            elif not heard and length(prompt) + len(answer_states.ids) >= self.ctx_len:
                tell(f"the answer was cut by the context of {self.ctx_len} tokens")

        return pieces()

    def _decoded(self, ids: Iterator[int], seen: list[int]) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer, skip_special=True)
        for token_id in ids:
            seen.append(token_id)
            yield decoder.push(token_id)
        yield decoder.flush()


class AnswerStates:
    """The Thinker's last hidden states of an answer, for a talker that is conditioned on them. They grow with the
    answer."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer | None = None
        self.ids: list[int] = []
        self.states: list[torch.Tensor] = []  # (D,) each; the last token's comes with the next token, if there is one
        self._end = 0  # of the sentence before, in characters

    def of(self, sentence: str, language: Language | None = None) -> torch.Tensor | None:
        """For the answer's next sentence, the state for each byte that the talker reads, (L, D); None if the bytes up
        to its end are not UTF-8, since they then differ from those of the text.

        Args:
            sentence: the next of the answer's ``sentences``; there are states of all of its tokens, unless the answer
                has ended.
            language: the talker's ``text_language``.
        """
        if not self.states:
            return None
        answer = self.tokenizer.decode(self.ids, skip_special=True)
        start = answer.index(sentence, self._end)
        self._end = start + len(sentence)
        if "\ufffd" in answer[: self._end]:
            return None
        nothing = torch.zeros_like(self.states[0])
        counts = self.tokenizer.byte_counts(self.ids)
        each = [*self.states, nothing][: len(self.ids)]
        per_byte = [state for state, count in zip(each, counts, strict=True) for _ in range(count)]
        first = len(answer[:start].encode())
        return torch.stack([*(per_byte[first + byte] for byte in speech_bytes(sentence, language)), nothing])


def check_text_length(text: str, ctx_len: int = LONGEST_CTX_LEN) -> None:
    """
    Raises:
        UserError: ``text`` cannot fit into a context of ``ctx_len`` tokens; it was not tokenised to know.
    """
    if len(text) > (most := ctx_len * CHARACTERS_PER_TOKEN):
        raise UserError(f"the text is too long: expected at most {most:,} characters (for ctx_len {ctx_len})")


def message(attached: list[dict], text: str) -> dict:
    """A message of the user: attachments first, as in training, then the text."""
    if not attached:
        return {"role": "user", "content": text}
    return {"role": "user", "content": attached + ([{"type": "text", "text": text}] if text.strip() else [])}


def _texts(messages: list[dict]) -> Iterator[str]:
    for content in (each["content"] for each in messages):
        yield from [content] if isinstance(content, str) else (part["text"] for part in content if "text" in part)


def length(prompt: list[int] | Encoded) -> int:
    """Positions of the context that a prompt takes."""
    return len(prompt.ids if isinstance(prompt, Encoded) else prompt)
