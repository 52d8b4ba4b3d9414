"""The omni model: a Thinker that reads text, recordings and pictures in one sequence, and how such a sequence is made.

Recordings and pictures stand in a conversation where the user put them, any number, in any order. The encoders of
stages B and C turn each into vectors, a projection brings these to the Thinker's width, and they take the places of
``<|audio|>`` and ``<|image|>`` tokens, between a start and an end token. These six tokens are in every tokenizer of
stage A; no text of a user can spell them (``Tokenizer.encode``).
"""

# B samples, T positions, D the Thinker's width, V vocabulary; I pictures, P positions of one; A recordings,
# F mel frames, M mel channels, U encoder frames, R positions of all recordings of a batch

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.common.errors import BadRow, TooLong, UserError
from omni.common.media import Media, quoted
from omni.common.numerics import true_float32
from omni.common.text import audible
from omni.data.audio import load_speech, log_mel, normalise_features
from omni.data.images import load_image, normalise
from omni.data.tokenizer import IGNORE_INDEX, ROLES, SPECIAL_TOKENS, Tokenizer
from omni.models.architectures import AudioEncoderArchitecture, ThinkerArchitecture, VisionArchitecture
from omni.models.audio_encoder import AudioEncoder, frame_mask, mel_spec, output_frames
from omni.models.codec import fingerprint, load_codec
from omni.models.ctc import ctc_nll, frames_needed
from omni.models.decoding import decode_step
from omni.models.layers import KVCache
from omni.models.ops import round_up
from omni.models.picture_text import noisy_or_log_absent
from omni.models.talker import Talker, Utterance, collate_utterances, talker_loss
from omni.models.thinker import Thinker
from omni.models.vision_encoder import ViT
from omni.stages.audio_encoder import load_audio_encoder
from omni.stages.omni import SftConfig
from omni.stages.talker import TalkerConfig
from omni.stages.text import load_thinker
from omni.stages.vision import VisionConfig
from omni.train.checkpoint import build, load_stage, load_weights, saved_config, understood
from omni.train.config import read_sizes, sizes_of

ROWS_TOGETHER = 8  # sequences that are padded to one length on a CPU
COSINE_SCALE = 20.0  # of cosines as logits: among thousands of tokens, the right one can still have all the weight
PLACES = (" left", " right", " top", " above", " bottom", " below")  # what a Thinker calls places in a picture
VIT_SIZES = ("img_size", "patch", "d_model", "n_layers", "n_heads", "d_ff", "dropout")

# ---------------------------------------------------------------------------------------------------------------
# Sequences


@dataclass
class Encoded:
    """One conversation as the Thinker reads it. ``images`` and ``sounds`` are its attachments with the position at
    which the placeholders of each begin; ``transcript_ids`` are the tokens of each recording's text, [] if unknown."""

    ids: list[int]  # with one placeholder for each position of an attachment
    targets: list[int]  # what follows each position; -100 outside the assistant's answers
    images: list[tuple[int, Tensor]] = field(default_factory=list)  # (3, H, W) uint8; if kept, (N, K) patches
    sounds: list[tuple[int, Tensor]] = field(default_factory=list)  # (F, M) features; if kept, (U, K) frames
    transcript_ids: list[list[int]] = field(default_factory=list)
    prompt: int = 0  # positions up to the last <|assistant|>, with it: what its answer follows
    utterance: Utterance | None = None  # how its last answer sounds
    speech_token_index: list[int] = field(default_factory=list)  # the position of each of its bytes; -1: of the end


class Inputs:
    """Files to what the encoders read, conversations to sequences, sequences to batches.

    Args:
        config: with ``parts`` filled in.
    """

    def __init__(self, tokenizer: Tokenizer, config: SftConfig):
        self.tokenizer, self.prompt, self.cached = tokenizer, config.prompt, config.cache_features
        self.ctx_len = config.parts["thinker"]["ctx_len"]
        audio, vision = config.parts.get("audio_encoder"), config.parts.get("vision_encoder")
        self.audio = self.mel = self.img_size = None
        if audio:
            self.audio, self.mel = audio, mel_spec(_audio_architecture(audio))
            self.max_frames = audio["max_mel_length"]
        if vision:
            self.img_size = vision["img_size"]
            self.image_positions = (vision["img_size"] // vision["patch"] // config.image_stack) ** 2
        self.pad_to = self.ctx_len if config.use_compile else None  # a compiled model wants one length only
        talker = config.parts.get("talker")
        self.talker = read_sizes(TalkerConfig, talker) if talker else None

    # Attachments: parts of a message's content

    def image(self, path: Media) -> dict:
        """A picture file as a part of a message.

        Raises:
            BadRow: see ``pixels``.
        """
        return {"type": "image", "image": self.pixels(path)}

    def pixels(self, path: Media) -> Tensor:
        """A picture file as (3, H, W) uint8.

        Raises:
            BadRow: not a picture, damaged, too large; or the model has no vision encoder.
        """
        if self.img_size is None:
            raise BadRow(f"{quoted(path)}: this model has no vision encoder (no vision_ckpt)")
        return load_image(path, self.img_size, self.img_size)

    def sound(self, path: Media, text: str = "") -> dict:
        """A recording as a part of a message; in training with its ``text``, if that is known.

        Raises:
            BadRow: see ``mels``.
        """
        return {"type": "audio", "audio": self.mels(path), "text": text}

    def mels(self, path: Media) -> Tensor:
        """A recording as (F, M) normalised log-mels.

        Raises:
            BadRow: not audio, damaged, longer than the audio encoder was trained on; or the model has none.
        """
        if self.audio is None:
            raise BadRow(f"{quoted(path)}: this model has no audio encoder (no audio_ckpt)")
        waveform = load_speech(path, self.mel, self.max_frames)
        return normalise_features(log_mel(torch.from_numpy(waveform), self.mel))

    def sound_positions(self, sound: Tensor) -> int:
        """Positions of a recording, its start and end token aside: one for each frame of the encoder, of which the
        model may leave some out."""
        return len(sound) if self.cached else output_frames(len(sound), self.audio["downsample_time"])

    # Conversations

    def encode(self, messages: list[dict]) -> Encoded:
        """A conversation as a sequence. One that ends with a user's message gets the ``<|assistant|>`` that asks for
        an answer; one that ends with an answer is for training.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": ...}``, oldest first. A content is a text
                or a list of parts: ``{"type": "text", "text": ...}``, and what ``image`` and ``sound`` return. The
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
                    positions = self.sound_positions(part["audio"])
                    encoded.sounds.append((len(ids) + 1, part["audio"]))
                    spoken = tokenizer.encode(part["text"], allow_special=False)
                    encoded.transcript_ids.append(spoken if frames_needed(spoken) <= positions else [])
                    ids += self._placeholders("audio", positions)
            if is_answer and not (asks and len(ids) == encoded.prompt):
                ids.append(end_id)
                answers += range(first, len(ids))
        return self._finished(encoded, ids, set(answers), asks)

    def encode_spoken(self, messages: list[dict], utterance: Utterance) -> Encoded:
        """A conversation whose last answer is spoken: as ``encode``, with the position of the token to which each of
        the bytes belongs that the talker reads.

        Raises:
            TooLong: longer than ``ctx_len``.
        """
        encoded, answer = self.encode(messages), messages[-1]["content"]
        counts = self.tokenizer.byte_counts(self.tokenizer.encode(answer, allow_special=False))
        token = [index for index, count in enumerate(counts) for _ in range(count)]
        encoded.utterance = utterance
        encoded.speech_token_index = [encoded.prompt + token[byte] for byte in spoken_bytes(answer)] + [-1]
        return encoded

    def encode_text(self, text: str) -> Encoded:
        """A text that is no conversation, all of it to be learnt, as in stage A.

        Raises:
            TooLong: longer than ``ctx_len``.
        """
        eos_id = self.tokenizer.eos_id
        ids = [eos_id, *self.tokenizer.encode(text, allow_special=False), eos_id]
        return self._finished(Encoded([], []), ids, set(range(1, len(ids))), asks=False)

    # Lengths, before anything is read

    def fits(self, messages: list[dict], mel_frames: Callable[[dict], int]) -> bool:
        """Whether ``encode`` would find room for a conversation whose pictures and recordings are not read yet.

        Args:
            mel_frames: how many a part of type audio has.
        """
        parts = [part for message in messages for part in _parts(message)]
        kinds = {part["type"] for part in parts}
        if ("image" in kinds and self.img_size is None) or ("audio" in kinds and self.audio is None):
            return True  # reading it says that there is no encoder
        if self._most_positions(messages, parts) <= self.ctx_len:
            return True

        def stand_in(part: dict) -> dict:
            if part["type"] == "text":
                return part
            if part["type"] == "image":
                return {"type": "image", "image": None}  # all take the same room
            frames = mel_frames(part)
            positions = output_frames(frames, self.audio["downsample_time"]) if self.cached else frames
            return {"type": "audio", "audio": range(positions), "text": ""}

        try:
            self.encode([message | {"content": list(map(stand_in, _parts(message)))} for message in messages])
        except TooLong:
            return False
        return True

    def _most_positions(self, messages: list[dict], parts: list[dict]) -> int:
        """No conversation of these parts takes more, as a token has at least a byte: found without a tokenizer, and
        without the recordings' lengths."""
        sizes = {"text": lambda part: len(part["text"].encode())}
        if self.img_size is not None:
            sizes["image"] = lambda part: self.image_positions + 2
        if self.audio is not None:
            longest = output_frames(self.audio["max_mel_length"], self.audio["downsample_time"])
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

    # Batches

    def collate(self, samples: list[Encoded]) -> dict:
        """At least one sequence as a batch.

        Returns:
            ``tokens`` and ``targets`` (B, T), padded after their ends; ``weight``, the number of targets; ``prompts``
            (B,); ``sizes`` (B,), the positions that are no padding.

            If there are pictures: ``images`` (I, 3, H, W) uint8, or what was kept of them, ``patches`` (I, N, K);
            ``image_at`` (I * P,), the places of their positions, counted over the flattened batch.

            If answers are spoken: what ``collate_utterances`` makes of them, as ``speech_symbols`` and so on;
            ``speech_rows`` (S,), which samples they are, and ``speech_at`` (S, L), see ``Encoded.speech_token_index``.

            If there are recordings: ``features`` (A, F, M), zero beyond ``lengths`` (A,), or what was kept of them,
            ``frames`` (A, U, K), zero likewise; ``n_frames`` (A,), how many each has; ``sound_at`` (R,), and
            ``sound_from`` (R,): which of all A * U padded frames stands there; ``transcript_ids`` (A, L) and
            ``transcript_lengths`` (A,), what they say.
        """
        T = self.pad_to or min(round_up(max(len(sample.ids) for sample in samples)), self.ctx_len)
        tokens = torch.full((len(samples), T), self.tokenizer.eos_id)
        targets = torch.full((len(samples), T), IGNORE_INDEX)
        for row, sample in enumerate(samples):
            tokens[row, : len(sample.ids)] = torch.tensor(sample.ids)
            targets[row, : len(sample.ids)] = torch.tensor(sample.targets)
        batch = {
            "tokens": tokens,
            "targets": targets,
            "prompts": torch.tensor([sample.prompt for sample in samples]),
            "sizes": torch.tensor([len(sample.ids) for sample in samples]),
            "n_targets": int((targets != IGNORE_INDEX).sum()),
        }
        images = [(row * T + at, image) for row, sample in enumerate(samples) for at, image in sample.images]
        if images:
            starts = torch.tensor([at for at, _ in images])
            batch["patches" if self.cached else "images"] = torch.stack([image for _, image in images])
            batch["image_at"] = (starts[:, None] + torch.arange(self.image_positions)).flatten()
        said = [row for row, sample in enumerate(samples) if sample.utterance is not None]
        if said:
            utterances = collate_utterances([samples[row].utterance for row in said], self.talker, step=8)
            batch |= {f"speech_{key}": value for key, value in utterances.items() if isinstance(value, Tensor)}
            batch["speech_rows"], at = (
                torch.tensor(said),
                [torch.tensor(samples[row].speech_token_index) for row in said],
            )
            padded = nn.utils.rnn.pad_sequence(at, batch_first=True, padding_value=-1)
            batch["speech_at"] = F.pad(padded, (0, batch["speech_symbols"].shape[1] - padded.shape[1]), value=-1)
        sounds = [(row * T + at, sound) for row, sample in enumerate(samples) for at, sound in sample.sounds]
        if sounds:
            starts, found = [at for at, _ in sounds], [sound for _, sound in sounds]
            if self.cached:
                width = round_up(max(map(len, found)))
                batch["frames"] = torch.stack([F.pad(frames, (0, 0, 0, width - len(frames))) for frames in found])
            else:
                batch |= self.pad_sounds(found)
                width = batch["features"].shape[1] // self.audio["downsample_time"]
            counts = [self.sound_positions(sound) for sound in found]
            batch["n_frames"] = torch.tensor(counts)
            batch["sound_at"] = torch.cat([at + torch.arange(n) for at, n in zip(starts, counts, strict=True)])
            batch["sound_from"] = torch.cat([index * width + torch.arange(n) for index, n in enumerate(counts)])
            texts = [ids for sample in samples for ids in sample.transcript_ids]
            batch["transcript_ids"], batch["transcript_lengths"] = self._padded(texts)
        return batch

    def pad_sounds(self, sounds: list[Tensor]) -> dict:
        """Log-mels (F, M) as ``features`` (A, F, M), zero beyond ``lengths`` (A,); F is a multiple of what the encoder
        makes one frame of."""
        step, longest = self.audio["downsample_time"], max(len(sound) for sound in sounds)
        features = torch.zeros(len(sounds), step * -(-longest // step), self.mel.n_mels)
        for index, sound in enumerate(sounds):
            features[index, : len(sound)] = sound
        return {"features": features, "lengths": torch.tensor([len(sound) for sound in sounds])}

    @staticmethod
    def _padded(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids as (N, L) int64 and their numbers (N,)."""
        ids = [torch.tensor(text, dtype=torch.int64) for text in texts]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([len(text) for text in texts])


def _parts(message: dict) -> list[dict]:
    """A message's content as parts; a text is one."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def spoken_bytes(text: str) -> list[int]:
    """The bytes of a text that the talker reads (``text_symbols`` without the end): of blanks the last."""
    characters, end = [], 0  # each that is heard, with its bytes in the text
    for character in text:
        start, end = end, end + len(character.encode())
        if audible(character):
            characters.append((character, range(start, end)))
    found: list[int] = []
    for word in re.finditer(r"\S+", "".join(character for character, _ in characters)):
        if found:
            found.append(characters[word.start() - 1][1][-1])
        found += (byte for _, own in characters[word.start() : word.end()] for byte in own)
    return found


# ---------------------------------------------------------------------------------------------------------------
# The model


class Projection(nn.Module):
    """What an encoder says in the Thinker's terms, (..., K) -> (..., D): norm, linear, GELU, linear.

    Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning" (LLaVA-1.5), with a norm before it. Of an
    encoder that already names ``units`` of text, the likely units' embeddings are added (Ma et al. 2025, "LegoSLM:
    Connecting LLM with Speech Encoder using CTC Posteriors").

    Args:
        named: width of what the units are named from, if the head that does it is no part of the encoder; 0: it is.
        side: of the square of positions that every picture takes; where each of them is, is learnt too
            (``position_embeddings``).
    """

    no_decay = ("position_embeddings",)

    def __init__(self, width: int, d_ff: int, d_model: int, units: int = 0, named: int = 0, side: int = 0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)
        self.units = nn.Parameter(torch.zeros(units, d_model)) if units else None
        self.word_head = nn.Linear(named, units).requires_grad_(False) if units and named else None
        self.position_embeddings = nn.Parameter(torch.zeros(side * side, d_model)) if side else None

    def forward(self, x: Tensor, named: Tensor | None = None) -> Tensor:
        """(..., K), and of an encoder that names units their probabilities (..., units), -> (..., D)."""
        y = self.fc2(F.gelu(self.fc1(self.norm(x))))
        if self.units is not None:
            y = y + named.to(y.dtype) @ self.units.to(y.dtype)
        return y if self.position_embeddings is None else y + self.position_embeddings.to(y.dtype)

    @torch.no_grad()
    def start_from_units(self, embeddings: Tensor) -> None:
        """Begin with nothing but the units, (units, D): what they name reads like text from the first step on."""
        self.units.copy_(embeddings)
        self.fc2.weight.zero_()
        self.fc2.bias.zero_()

    @torch.no_grad()
    def start_from_places(self, left: Tensor, right: Tensor, top: Tensor, bottom: Tensor) -> None:
        """Begin with the words (D,) for where a position is, half as loud as what is named there: whose neighbour is on
        its left, then reads like text, too."""
        side = math.isqrt(len(self.position_embeddings))
        at = torch.linspace(0, 1, side, device=left.device)[:, None]  # from one edge to the other
        rows, columns = torch.lerp(top, bottom, at), torch.lerp(left, right, at)  # (side, D)
        self.position_embeddings.copy_((rows[:, None] + columns).flatten(0, 1) / 2)

    @torch.no_grad()
    def start_as_loud_as(self, embeddings: Tensor) -> None:
        """Scale the output of a new projection to the mean square of the token embeddings (V, D), which is what the
        Thinker's layers are used to adding to."""
        x = torch.randn(256, 1, self.norm.weight.shape[0], device=embeddings.device)
        factor = embeddings.square().mean().sqrt() / self(x).square().mean().sqrt()
        self.fc2.weight.mul_(factor)
        self.fc2.bias.mul_(factor)


class Sequences(NamedTuple):
    """What the Thinker reads of a batch: B rows, each without the positions that have nothing to say."""

    embeds: Tensor  # (B, T, D)
    targets: Tensor  # (B, T)
    dropped: Tensor  # (B,) how many positions shorter each row has become
    sounds: Tensor | None  # (A, U, D), the recordings before any of their positions were dropped


class Losses(NamedTuple):
    """Each () float32; the last two are sums, over the number of targets of the first."""

    nats: Tensor  # mean cross-entropy of the answers' tokens
    balance: Tensor  # the experts' load balancing
    ctc_alignment_loss: Tensor  # how badly recordings spell their texts
    talker_loss: Tensor  # how badly the talker says answers


class OmniModel(nn.Module):
    """Thinker, encoders, projections, talker. A part that no task of the mix needs is None, and not in the state dict.

    Args:
        config: with ``parts``, the sizes of the parts.
        use_flash: fused attention; ``audio_flash`` of the audio encoder alone.

    Liu et al. 2023, "Visual Instruction Tuning" (LLaVA), for pictures and recordings alike. Departures: neighbouring
    patches (``image_stack`` x ``image_stack``) may share a position, side by side; and of a recording, those frames may
    be left out in which the encoder's CTC head hears nothing new (``drop_blanks``, as Gaido et al. 2021, "CTC-based
    Compression for Direct Speech Translation"): what is left is as long as a text.
    """

    def __init__(self, config: SftConfig, *, use_flash: bool = True, audio_flash: bool = True):
        super().__init__()
        parts, self.frozen, self.audio_id = config.parts, config.freeze_encoders, SPECIAL_TOKENS.index("<|audio|>")
        self.drop_blanks, self.image_stack = config.drop_blanks, config.image_stack
        self.static = config.use_compile
        arch = ThinkerArchitecture.model_validate(parts["thinker"])
        self.thinker = Thinker(arch, use_flash=use_flash)
        self.audio_encoder = self.proj_a = self.vision_encoder = self.proj_v = None
        if audio := parts.get("audio_encoder"):
            audio_arch = _audio_architecture(audio)
            self.audio_encoder = AudioEncoder(audio_arch, use_flash=use_flash and audio_flash)
            self.proj_a = Projection(audio["d_model"], config.proj_d_ff, arch.d_model, units=audio["n_tokens"] + 1)
            self.audio_encoder.ctc_head.requires_grad_(False)  # it says which frames are left out, and stays as it is
        if vision := parts.get("vision_encoder"):
            sizes = {name: vision[name] for name in VIT_SIZES}
            self.vision_encoder = ViT(VisionArchitecture(**sizes), use_flash=use_flash)
            width, words = vision["d_model"], vision.get("n_words", 0)
            stacked, side = width * self.image_stack**2, vision["img_size"] // vision["patch"] // self.image_stack
            self.proj_v = Projection(stacked, config.proj_d_ff, arch.d_model, words, named=width, side=side)
        if self.frozen:
            for encoder in self.encoders:
                encoder.requires_grad_(False)
        self.talker = None
        if talker := parts.get("talker"):
            self.talker = Talker(read_sizes(TalkerConfig, talker | {"use_flash": use_flash})).requires_grad_(False)
            self.talker.thinker_proj.requires_grad_(True)

    @property
    def encoders(self) -> list[nn.Module]:
        return [encoder for encoder in (self.audio_encoder, self.vision_encoder) if encoder is not None]

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            for encoder in self.encoders:
                encoder.eval()  # no dropout in what is not trained
        if self.talker is not None:
            self.talker.eval()
        return self

    def forward(self, batch: dict) -> Losses:
        """Losses of a batch of ``Inputs.collate``."""
        embeds, targets, dropped, sounds = self.embed(batch)
        nats, balance = self._answer_losses(embeds, targets, batch["sizes"] - dropped)
        ctc_alignment_loss, count = nats.new_zeros(()), (batch["targets"] != IGNORE_INDEX).sum()
        if (
            sounds is not None and batch["transcript_ids"].shape[1]
        ):  # there are recordings, and of some the text is known
            ctc_alignment_loss = self._ctc_alignment_loss(sounds, batch) / count
        speech_loss = nats.new_zeros(())
        if "speech_rows" in batch:
            speech = self.speech(batch, embeds)
            weight = self.talker.config.duration_weight
            loss, _ = talker_loss(self.talker, speech, frame_dropout=0.0, duration_weight=weight)
            speech_loss = loss * speech["n_targets"] / count
        elif self.talker is not None and self.training:
            speech_loss = 0.0 * self.talker.thinker_proj.weight.sum()  # as in ``embed``: a gradient in every step
        return Losses(nats, balance, ctc_alignment_loss, speech_loss)

    def speech(self, batch: dict, embeds: Tensor) -> dict:
        """What the talker learns from and is judged by, as ``collate_utterances`` gives it, with ``thinker_states``:
        what the Thinker, reading ``embeds`` (B, T, D), thinks at the token of each byte of a spoken answer. It has
        no part in the talker's loss. Spoken answers follow texts alone, so that nothing has moved their positions."""
        rows, at = batch["speech_rows"], batch["speech_at"]
        with torch.no_grad():
            hidden = self.thinker.hidden_states(inputs_embeds=embeds[rows])  # (S, T, D)
        states = hidden.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
        speech = {key.removeprefix("speech_"): value for key, value in batch.items() if key.startswith("speech_")}
        codes = speech["lengths"].sum() * self.talker.codebooks + len(rows)
        return speech | {"thinker_states": states.masked_fill((at < 0)[..., None], 0.0), "n_targets": codes}

    def _answer_losses(self, embeds: Tensor, targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The first two of ``forward``. A dialogue is several times as long as a recording, so rows of similar length
        go through the Thinker together, each group padded to its own longest only."""
        if not self.ragged:
            return self.thinker(inputs_embeds=embeds, targets=targets)
        nats, balance = [], []
        for rows in lengths.argsort(stable=True).split(ROWS_TOGETHER):
            T = min(round_up(int(lengths[rows].max())), embeds.shape[1])
            sums = self.thinker(inputs_embeds=embeds[rows, :T], targets=targets[rows, :T], reduction="sum")
            nats.append(sums[0])
            balance.append(sums[1] * len(rows) / len(lengths))
        return sum(nats) / (targets != IGNORE_INDEX).sum().clamp(min=1), sum(balance)

    @property
    def ragged(self) -> bool:
        """Whether a batch may be cut as its lengths suggest: on a GPU they would have to be waited for, and a compiled
        Thinker wants one length only."""
        return self.device.type == "cpu" and not self.static

    def embed(self, batch: dict) -> Sequences:
        """What the Thinker reads of a batch of ``Inputs.collate``."""
        x = self.thinker.embed_tokens(batch["tokens"])  # (B, T, D)
        rows, sounds, new = x.flatten(0, 1), None, None  # (B * T, D)
        if "images" in batch or "patches" in batch:
            rows = rows.index_copy(0, batch["image_at"], self._pictures(batch).flatten(0, 1).to(rows.dtype))
        elif self.vision_encoder is not None and self.training:
            # Each parameter has a gradient in every step, if only zero: DDP waits for all of them, and the
            # optimizer's averages must not depend on how a step falls into micro-batches.
            rows = rows + 0.0 * self._pictures(self._blank(x)).sum().to(rows.dtype)
        if "features" in batch or "frames" in batch:
            sounds, new = self._sounds(batch)
            found = sounds.flatten(0, 1).index_select(0, batch["sound_from"])
            rows = rows.index_copy(0, batch["sound_at"], found.to(rows.dtype))
        elif self.audio_encoder is not None and self.training:
            rows = rows + 0.0 * self._sounds(self._blank(x))[0].sum().to(rows.dtype)
        x, targets = rows.view_as(x), batch["targets"]
        if new is None or not self.drop_blanks:
            return Sequences(x, targets, torch.zeros_like(batch["sizes"]), sounds)
        kept = torch.ones(targets.numel(), dtype=torch.bool, device=x.device)
        kept[batch["sound_at"]] = new.flatten()[batch["sound_from"]]
        kept = kept.view_as(targets)
        # what is left out goes to the end, where it is padding
        order, dropped = torch.argsort(~kept, dim=1, stable=True), (~kept).sum(dim=1)
        if self.ragged:
            order = order[:, : round_up(int((batch["sizes"] - dropped).max()))]
        targets = targets.gather(1, order)  # nothing is to be learnt where a recording stands
        x = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
        return Sequences(x, targets, dropped, sounds)

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (I, 3, H, W) uint8 as their patches (I, N, K), row by row, CLS left out."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.vision_encoder(normalise(images))[:, 1:]

    def encode_audio(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Recordings (A, F, M) of ``lengths`` (A,) as frames (A, U, K), zero beyond their number, and that (A,)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            frames, counts = self.audio_encoder.encode(features, lengths)
        return frames * frame_mask(counts, frames.shape[1])[:, :, None], counts

    def _pictures(self, batch: dict) -> Tensor:
        """A batch's pictures as (I, P, D)."""
        patches = batch["patches"].float() if "patches" in batch else self.encode_images(batch["images"])  # (I, N, K)
        s = self.image_stack
        side = self.vision_encoder.img_size[0] // self.vision_encoder.patch_size[0] // s
        # (I, rows, columns, s, s, K), then (I, P, s * s, K)
        grid = patches.unflatten(1, (side, s, side, s)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.proj_v.word_head is None:
            return self.proj_v(grid.flatten(2))
        named = -torch.expm1(
            noisy_or_log_absent(self.proj_v.word_head(grid.detach()), dim=2)
        )  # (I, P, words): by one of s * s
        return self.proj_v(grid.flatten(2), named)

    def _sounds(self, batch: dict) -> tuple[Tensor, Tensor]:
        """A batch's recordings as (A, U, D), padded; and (A, U), true where the CTC head hears a token, and not the
        same as in the frame before."""
        kept = "frames" in batch
        frames = (
            batch["frames"].float() if kept else self.encode_audio(batch["features"], batch["lengths"])[0]
        )  # (A, U, K)
        logits, blank = self.audio_encoder.ctc_head(frames.detach()), self.audio_encoder.architecture.ctc_vocab_size
        heard = logits.argmax(dim=-1)
        units = logits.float().softmax(dim=-1)
        return self.proj_a(frames, units), (heard != blank) & (heard != F.pad(heard, (1, -1), value=blank))

    def _ctc_alignment_loss(self, sounds: Tensor, batch: dict) -> Tensor:
        """How far the positions of recordings are from the token embeddings of what they say: () float32, a sum.

        CTC (Graves et al. 2006) whose units are the Thinker's tokens, whose scores are cosines with their embeddings,
        and whose blank is ``<|audio|>``. So a recording soon looks like its text, which the Thinker can read already.
        The embeddings themselves get no gradient from it.
        """
        table, blank = F.normalize(self.thinker.embed_tokens.weight.detach().float(), dim=-1), self.audio_id  # (V, D)
        with true_float32(sounds.device):  # in less, near cosines would be equal
            logits = COSINE_SCALE * F.normalize(sounds.float(), dim=-1) @ table.T  # (A, U, V)
        logits = torch.cat((logits[..., :blank], logits[..., blank + 1 :], logits[..., blank, None]), dim=-1)
        units = batch["transcript_ids"] - (batch["transcript_ids"] > blank).long()
        nll = ctc_nll(logits, batch["n_frames"], units, batch["transcript_lengths"])
        return torch.where(batch["transcript_lengths"] > 0, nll, 0.0).sum()

    def _blank(self, like: Tensor) -> dict:
        """A black picture and a moment of silence, which take no place."""
        blank = {}
        if self.vision_encoder is not None:
            height, width = self.vision_encoder.img_size
            blank["images"] = torch.zeros(1, 3, height, width, dtype=torch.uint8, device=like.device)
        if self.audio_encoder is not None:
            frames = self.audio_encoder.architecture.downsample_time
            mels = self.audio_encoder.subsampling.linear.in_features // self.audio_encoder.subsampling.conv.out_channels
            blank["features"] = like.new_zeros(1, frames, mels * frames)
            blank["lengths"] = torch.full((1,), frames, device=like.device)
        return blank

    # Answering ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.thinker.embed_tokens.weight.device

    @torch.no_grad()
    def embed_prompt(self, inputs: Inputs, encoded: Encoded) -> Tensor:
        """One sequence as the Thinker reads it, (1, T, D)."""
        batch = {k: v.to(self.device) for k, v in inputs.collate([encoded]).items() if isinstance(v, Tensor)}
        sequences = self.embed(batch)
        return sequences.embeds[:, : len(encoded.ids) - int(sequences.dropped)]

    def generate(self, inputs: Inputs, messages: list[dict], **sampling) -> Iterator[int]:
        """Yield the ids of the answer to a conversation, each as soon as it is known.

        Args:
            messages: see ``Inputs.encode``; the last one is a user's.
            sampling: as ``Thinker.generate`` takes it: ``max_new_tokens``, ``temperature``, ``seed`` ...

        Raises:
            BadRow: the conversation is longer than ``ctx_len``.
        """
        encoded = inputs.encode(messages)
        stop_ids = (inputs.tokenizer.end_id, inputs.tokenizer.eos_id)
        embeds = self.embed_prompt(inputs, encoded)
        return self.thinker.generate(inputs_embeds=embeds, stop_ids=stop_ids, **sampling)

    @torch.no_grad()
    def answers(self, embeds: Tensor, prompts: Tensor, max_new_tokens: int, stop_ids: tuple[int, ...]) -> list[list]:
        """The likeliest answer to each of several prompts at once: what ``generate`` yields one by one.

        Args:
            embeds: (B, T, D), the first ``prompts`` (B,) positions of each row, at least 1; the rest is ignored.

        Returns:
            B lists of ids, the stop ids left out.
        """
        room = self.thinker.architecture.ctx_len - max_new_tokens
        together = (prompts <= room).nonzero().flatten().tolist()
        # one whose prompt leaves less room ends where ctx_len does, whatever stands beside it
        groups = [([row], self.thinker.architecture.ctx_len - int(prompts[row])) for row in range(len(prompts))]
        groups = [group for group in groups if group[0][0] not in together]
        groups += [(together, max_new_tokens)] if together else []
        found: list[list] = [[] for _ in range(len(prompts))]
        for rows, limit in groups:
            for row, ids in zip(rows, self._answers(embeds[rows], prompts[rows], limit, stop_ids), strict=True):
                found[row] = ids
        return found

    def _answers(self, embeds: Tensor, prompts: Tensor, limit: int, stop_ids: tuple[int, ...]) -> list[list]:
        """Prompts of unequal length are pushed to the right, so that they end together. That shifts the positions of a
        whole row, and rotary attention knows distances only."""
        B, longest, device = len(prompts), int(prompts.max()), embeds.device
        index = torch.arange(longest, device=device) - (longest - prompts)[:, None]  # (B, longest); negative: padding
        there = index >= 0
        x = embeds.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, embeds.shape[2]))
        # padding sees itself, since a softmax over nothing is no number
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        mask = (causal & there[:, None, :]) | torch.eye(longest, dtype=torch.bool, device=device)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
        cache = KVCache(self.thinker.architecture, B, longest + limit, device, dtype)
        hidden = self.thinker.hidden_states(inputs_embeds=x, cache=cache, mask=mask[:, None])[:, -1]  # (B, D)
        read = decode_step(self.thinker, cache)
        stops = torch.tensor(stop_ids, device=device)
        ended, written = torch.zeros(B, dtype=torch.bool, device=device), []
        for _ in range(limit):
            ids = self.thinker.head(hidden).float().argmax(dim=-1)  # (B,)
            ended = ended | torch.isin(ids, stops)
            if ended.all():
                break
            written.append(ids.masked_fill(ended, stop_ids[0]))
            there = F.pad(there, (0, 1), value=True)
            hidden = read(ids, there)
        rows = torch.stack(written, dim=1).tolist() if written else [[]] * B
        return [row[: next((i for i, token in enumerate(row) if token in stop_ids), len(row))] for row in rows]


def _audio_architecture(part: dict) -> AudioEncoderArchitecture:
    sizes = {name: part[name] for name in AudioEncoderArchitecture.model_fields}
    return AudioEncoderArchitecture(**sizes | {"ctc_vocab_size": part["n_tokens"]})


# ---------------------------------------------------------------------------------------------------------------
# Made of the stages before, and loaded again


def assemble(config: SftConfig, **flash) -> tuple[SftConfig, OmniModel, Tokenizer]:
    """What stage E begins with: the models of stages A to C, joined by new projections, on the CPU.

    Args:
        flash: see ``OmniModel``.

    Returns:
        The config with ``parts`` and ``origins`` filled in; the model; the Thinker's tokenizer.

    Raises:
        UserError: a stage's file is missing, damaged or of another stage, or its sizes do not fit.
    """
    cpu = torch.device("cpu")
    thinker, tokenizer, _ = load_thinker(config.thinker_ckpt, cpu)
    sizes = {name: getattr(thinker.architecture, name) for name in ThinkerArchitecture.model_fields}
    sizes |= {"dropout": config.dropout, "ctx_len": config.ctx_len or thinker.architecture.ctx_len}
    parts, modules = {"thinker": sizes}, {"thinker": thinker}
    if config.audio_ckpt is not None:
        modules["audio_encoder"], audio_tokenizer, trained = load_audio_encoder(config.audio_ckpt, cpu)
        sizes = {name: getattr(trained, name) for name in (*AudioEncoderArchitecture.model_fields, "max_mel_length")}
        parts["audio_encoder"] = sizes | {"n_tokens": modules["audio_encoder"].architecture.ctc_vocab_size}
    if config.vision_ckpt is not None:
        saved = load_stage(config.vision_ckpt, "vision", prefix="vision", final="vision.pt")
        trained = saved_config(VisionConfig, saved)
        sizes = {name: getattr(trained, name) for name in VIT_SIZES}
        words = {
            name.removeprefix("word_head."): weight for name, weight in saved["model"].items() if "word_head." in name
        }
        captions = Tokenizer.load(Path(config.vision_ckpt) / "tokenizer.json") if words else None
        parts["vision_encoder"] = sizes | {"n_words": captions.vocab_size if captions else 0}
        vit = build(lambda: ViT(VisionArchitecture.of(trained)), _below("vit.", saved["model"]), saved["path"])
        modules["vision_encoder"] = vit
        side = trained.img_size // trained.patch
        if side % config.image_stack:
            raise UserError(
                f'{config.vision_ckpt}: has {side} x {side} patches, key "image_stack": expected a divisor of {side}, '
                f"found {config.image_stack}"
            )
    origins = {name: fingerprint(module) for name, module in modules.items()}
    if config.speech_csv is not None:
        parts["talker"], modules["talker"] = _listening_talker(config.talker_ckpt, thinker.architecture.d_model)
        origins |= {"talker": fingerprint(modules["talker"]), "codec": fingerprint(load_codec(config.talker_ckpt, cpu))}
    config = config.model_copy(update={"parts": parts, "origins": origins})
    model = OmniModel(config, **flash)
    for name, module in modules.items():
        getattr(model, name).load_state_dict(module.state_dict())
    embeddings = model.thinker.embed_tokens.weight
    if model.proj_v is not None and model.proj_v.word_head is None:
        model.proj_v.start_as_loud_as(embeddings)
    elif model.proj_v is not None:
        load_weights(model.proj_v.word_head, words, config.vision_ckpt)
        model.proj_v.start_from_units(embeddings_of(captions.units, tokenizer, embeddings))
    if model.proj_v is not None:
        left, right, *more = embeddings_of(PLACES, tokenizer, embeddings)
        model.proj_v.start_from_places(
            left, right, torch.stack(more[:2]).mean(dim=0), torch.stack(more[2:]).mean(dim=0)
        )
    if model.proj_a is not None:
        units = embeddings_of(audio_tokenizer.units, tokenizer, embeddings)
        model.proj_a.start_from_units(torch.cat((units, embeddings[model.audio_id, None])))  # last, the blank
    return config, model, tokenizer


def _listening_talker(folder: str, d_model: int) -> tuple[dict, Talker]:
    """Stage D's talker and its sizes, with what brings it the states of a Thinker of width ``d_model``: zeros, so that
    it speaks as before.

    Raises:
        UserError: nothing there, or damaged.
    """
    saved = load_stage(folder, "talker", prefix="talker", final="talker.pt")
    trained = saved_config(TalkerConfig, saved, use_compile=False).model_copy(update={"thinker_d_model": d_model})
    nothing = {"thinker_proj.weight": torch.zeros(trained.d_model, d_model)}
    talker = build(lambda: Talker(trained), saved["model"] | nothing, saved["path"])
    return sizes_of(TalkerConfig, talker.config), talker


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


@torch.no_grad()
def embeddings_of(units: Sequence[str], tokenizer: Tokenizer, embeddings: Tensor) -> Tensor:
    """What the Thinker reads for each text unit that an encoder names: (units, D).

    The mean of its tokens' embeddings (V, D), spelled as it takes the fewest: recordings are written down in small
    letters, names and first words of sentences stand in the Thinker's text with a capital.
    """
    rows = []
    for unit in units:
        spellings = (unit, unit.title(), unit.strip().title())
        ids = min((tokenizer.encode(spelling, allow_special=False) for spelling in spellings if spelling), key=len)
        rows.append(embeddings[ids].mean(dim=0))
    return torch.stack(rows)


def load_omni(folder: str | Path, device: torch.device) -> tuple[OmniModel, Tokenizer, SftConfig]:
    """What stage E left in ``folder``, which is all that is needed: the model in evaluation mode, float32.

    ``Inputs(tokenizer, config)`` then makes its sequences.

    Raises:
        UserError: a file is missing or damaged, or the two are not of one run.
    """
    saved, path = load_stage(folder, "omni", prefix="omni", final="omni_final.pt"), Path(folder) / "tokenizer.json"
    # one padded length is for compiled training; and what was kept of training's files is not at hand
    config = saved_config(SftConfig, saved, use_compile=False, cache_features=False)
    tokenizer = Tokenizer.load(path)
    with understood(saved["path"]):
        vocab_size = config.parts["thinker"]["vocab_size"]
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{path}: expected {vocab_size} entries as in the model, found {tokenizer.vocab_size}. The two files are "
            "not of one run"
        )
    model = build(lambda: OmniModel(config, use_flash=config.use_flash), saved["model"], saved["path"])
    return model.to(device).eval(), tokenizer, config
