"""From files and conversations to sequences: the processor opens images and recordings, and encodes messages.

A conversation may have any number of recordings and images in any place. Each takes as many ``<|audio|>`` or
``<|image|>`` placeholders as the model has vectors for it, between a start and an end token. No text of a user can
spell these tokens (``Tokenizer.encode``).
"""

# F mel frames, M mel channels, N patches, U encoder frames, K an encoder's width

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from omni.common.errors import BadRow, TooLong
from omni.common.media import Media, quoted
from omni.common.spoken import Language, spoken_pieces
from omni.common.text import BLANK, audible
from omni.data.audio import load_speech, log_mel, normalise_features
from omni.data.images import load_image
from omni.data.tokenizer import IGNORE_INDEX, ROLES, Tokenizer
from omni.models.audio_encoder import mel_spec, output_frames
from omni.models.ctc import frames_needed
from omni.models.omni_architecture import OmniArchitecture
from omni.stages.talker import Utterance
from omni.stages.tasks.collator import Collator, Encoded


class Processor:
    """Opens files, encodes conversations, and pads sequences to batches (``collate``).

    Args:
        prompt: the system message of every conversation that has none; "": none.
        cached: images and recordings come as cached features.
        one_length: pad every batch to ``ctx_len``, for a compiled model.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        architecture: OmniArchitecture,
        *,
        prompt: str = "",
        cached: bool = False,
        one_length: bool = False,
    ):
        self.tokenizer, self.prompt, self.cached = tokenizer, prompt, cached
        self.architecture, self.ctx_len = architecture, architecture.thinker.ctx_len
        self.audio, self.vision = architecture.audio_encoder, architecture.vision_encoder
        self.max_mel_length = architecture.max_mel_length
        self.mel = mel_spec(self.audio) if self.audio else None
        self.image_positions = architecture.image_side**2 if self.vision else 0
        self.talker = architecture.talker
        self.collate = Collator(tokenizer.eos_id, architecture, cached=cached, one_length=one_length)

    # Files as parts of a message's content

    def image(self, path: Media, patches: np.ndarray | None = None) -> dict:
        """An image file as a part of a message: (3, H, W) uint8, or its cached ``patches`` (N, K).

        Raises:
            BadRow: not a picture, damaged, too large; or the model has no vision encoder.
        """
        return {"type": "image", "image": self._opened(path, patches, self.pixels)}

    def recording(self, path: Media, text: str = "", frames: np.ndarray | None = None) -> dict:
        """A recording as a part of a message: (F, M) normalised log-mels, or its cached ``frames`` (U, K); in training
        with its ``text``, if that is known.

        Raises:
            BadRow: not audio, damaged, longer than the audio encoder was trained on; or the model has none.
        """
        return {"type": "audio", "audio": self._opened(path, frames, self.log_mels), "text": text}

    @staticmethod
    def _opened(path: Media, cached: np.ndarray | None, read: Callable[[Media], Tensor]) -> Tensor:
        """Cached features, or the file as a tensor. Empty features belong to a file that could not be read."""
        if cached is None:
            return read(path)
        if not len(cached):
            read(path)  # raises with the reason
            raise BadRow(f"{path}: could not be read when the run began, now it can. Use a new save_dir")
        return torch.from_numpy(np.array(cached))

    def pixels(self, path: Media) -> Tensor:
        """An image file as (3, H, W) uint8. Raises as ``image`` does."""
        if self.vision is None:
            raise BadRow(f"{quoted(path)}: this model has no vision encoder (no vision_ckpt)")
        return load_image(path, self.vision.img_size, self.vision.img_size)

    def log_mels(self, path: Media) -> Tensor:
        """A recording as (F, M) normalised log-mels. Raises as ``recording`` does."""
        if self.audio is None:
            raise BadRow(f"{quoted(path)}: this model has no audio encoder (no audio_ckpt)")
        waveform = load_speech(path, self.mel, self.max_mel_length)
        return normalise_features(log_mel(torch.from_numpy(waveform), self.mel))

    def recording_positions(self, recording: Tensor) -> int:
        """Number of a recording's placeholders: one for each encoder frame; the model may leave some out."""
        return len(recording) if self.cached else output_frames(len(recording), self.audio.downsample_time)

    # Conversations

    def encode(self, messages: list[dict]) -> Encoded:
        """A conversation as a sequence. One that ends with a user's message gets the ``<|assistant|>`` that asks for
        an answer; one that ends with an answer is for training.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": ...}``, oldest first. A content is a text
                or a list of parts: ``{"type": "text", "text": ...}``, and what ``image`` and ``recording`` return. The
                config's ``prompt`` becomes a system message, unless there is one.

        Raises:
            TooLong: longer than ``ctx_len``.
        """
        tokenizer, end_id = self.tokenizer, self.tokenizer.end_id
        if self.prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.prompt}, *messages]
        asks = messages[-1]["role"] == "user"
        ids, answers, encoded = [], [], Encoded([], [])
        for message in messages + [{"role": "assistant", "content": []}] * asks:
            if message["role"] not in ROLES:
                raise ValueError(f"expected a role of {ROLES}, found {message['role']!r}")
            is_answer = message["role"] == "assistant"
            ids.append(tokenizer.token_id(f"<|{message['role']}|>"))
            if is_answer:
                encoded.prompt = len(ids)
            first = len(ids)
            for part in _parts(message):
                if part["type"] == "text":
                    ids += tokenizer.encode(part["text"], allow_special=False)
                elif part["type"] == "image":
                    encoded.images.append((len(ids) + 1, part["image"]))
                    ids += self._placeholders("image", self.image_positions)
                else:
                    positions = self.recording_positions(part["audio"])
                    encoded.recordings.append((len(ids) + 1, part["audio"]))
                    transcript = tokenizer.encode(part["text"], allow_special=False)
                    encoded.transcript_ids.append(transcript if frames_needed(transcript) <= positions else [])
                    ids += self._placeholders("audio", positions)
            if is_answer and not (asks and len(ids) == encoded.prompt):
                ids.append(end_id)
                answers += range(first, len(ids))
        return self._finished(encoded, ids, set(answers), asks)

    def encode_spoken(self, messages: list[dict], utterance: Utterance) -> Encoded:
        """A conversation whose last answer is spoken: as ``encode``, with the position of the token of each byte that
        the talker reads.

        Raises:
            TooLong: longer than ``ctx_len``.
        """
        encoded, answer = self.encode(messages), messages[-1]["content"]
        counts = self.tokenizer.byte_counts(self.tokenizer.encode(answer, allow_special=False))
        token = [index for index, count in enumerate(counts) for _ in range(count)]
        encoded.utterance = utterance
        encoded.speech_token_index = [
            *(encoded.prompt + token[byte] for byte in speech_bytes(answer, self.talker.text_language)),
            -1,
        ]
        return encoded

    def encode_text(self, text: str) -> Encoded:
        """A text that is no conversation, with all tokens as targets, as in stage A.

        Raises:
            TooLong: longer than ``ctx_len``.
        """
        eos_id = self.tokenizer.eos_id
        ids = [eos_id, *self.tokenizer.encode(text, allow_special=False), eos_id]
        return self._finished(Encoded([], []), ids, set(range(1, len(ids))), asks=False)

    # Lengths, before anything is read

    def fits(self, messages: list[dict], mel_frames: Callable[[dict], int]) -> bool:
        """Whether a conversation fits ``ctx_len``, without reading its pictures and recordings.

        Args:
            mel_frames: gives the mel frames of a part of type audio.
        """
        parts = [part for message in messages for part in _parts(message)]
        kinds = {part["type"] for part in parts}
        if ("image" in kinds and self.vision is None) or ("audio" in kinds and self.audio is None):
            return True  # reading it raises, as there is no encoder
        if self._most_positions(messages, parts) <= self.ctx_len:
            return True

        def stand_in(part: dict) -> dict:
            if part["type"] == "text":
                return part
            if part["type"] == "image":
                return {"type": "image", "image": None}  # all take the same room
            frames = mel_frames(part)
            positions = output_frames(frames, self.audio.downsample_time) if self.cached else frames
            return {"type": "audio", "audio": range(positions), "text": ""}

        try:
            self.encode([message | {"content": list(map(stand_in, _parts(message)))} for message in messages])
        except TooLong:
            return False
        return True

    def _most_positions(self, messages: list[dict], parts: list[dict]) -> int:
        """An upper bound, as a token has at least a byte: needs neither tokenizer nor the recordings' lengths."""
        sizes = {"text": lambda part: len(part["text"].encode())}
        if self.vision is not None:
            sizes["image"] = lambda part: self.image_positions + 2
        if self.audio is not None:
            longest = output_frames(self.max_mel_length, self.audio.downsample_time)
            sizes["audio"] = lambda part: longest + 2
        return sum(sizes[part["type"]](part) for part in parts) + 2 * len(messages) + 1 + len(self.prompt.encode())

    def _placeholders(self, kind: str, count: int) -> list[int]:
        start, placeholder, end = (self.tokenizer.token_id(f"<|{kind}{part}|>") for part in ("_start", "", "_end"))
        return [start, *[placeholder] * count, end]

    def _finished(self, encoded: Encoded, ids: list[int], learnt: set[int], asks: bool) -> Encoded:
        encoded.targets = [ids[i] if i in learnt else IGNORE_INDEX for i in range(1, len(ids))] + [IGNORE_INDEX] * asks
        encoded.ids = ids if asks else ids[:-1]  # nothing follows the last token of a training row
        if len(encoded.ids) > self.ctx_len:
            raise TooLong(f"takes {len(encoded.ids)} positions, expected at most ctx_len {self.ctx_len}")
        return encoded


def _parts(message: dict) -> list[dict]:
    """A message's content as parts; a text is one."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def speech_bytes(text: str, language: Language | None = None) -> list[int]:
    """Indices of the bytes that the talker reads (``text_symbols`` without the end); the last blank of several.

    Words that are spoken for a number share its bytes: the first ones have its first digits. So do a word's phonemes.

    Args:
        language: the talker's ``text_language``.
    """
    written, end = [], 0  # each audible character, with its byte range in the text
    for character in text:
        start, end = end, end + len(character.encode())
        again = BLANK.fullmatch(character) and written and BLANK.fullmatch(written[-1][0])  # see single_blanks
        if audible(character) and not again:
            written.append((character, range(start, end)))
    characters = []
    for piece, first, last in spoken_pieces("".join(character for character, _ in written), language):
        for index, character in enumerate(piece):
            own = written[first + index * (last - first) // len(piece)][1]
            n_bytes = len(character.encode())
            alone = len(piece) == last - first and len(own) == n_bytes  # no other character has its bytes
            characters.append((character, own if alone else [own[0]] * n_bytes))
    found: list[int] = []
    for word in re.finditer(r"\S+", "".join(character for character, _ in characters)):
        if found:
            found.append(characters[word.start() - 1][1][-1])
        found += (byte for _, own in characters[word.start() : word.end()] for byte in own)
    return found
