"""From text to sound with talker, codec and vocoder: for many texts at once, or streamed for one text."""

# B utterances, N codes in time, T mel frames, M mel channels, S samples, Q codebooks

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from omni.common.errors import BadRow, UserError
from omni.common.media import Media, quoted
from omni.data.audio import griffin_lim, load_audio, log_mel
from omni.models.aligner import text_symbols
from omni.models.codec import Codec, mel_spec
from omni.models.talker import Talker
from omni.models.vocoder import Generator, refuse_other_mels

MAX_SECONDS = 60.0
MIN_VOICE_S = 1.0  # of a recording whose voice is imitated; at most MAX_SECONDS
_SILENT = 1e-3  # largest amplitude of silence
FIRST_CHUNK, NEXT_CHUNKS = 4, 16  # codes in time per streamed piece of sound


class Speaker:
    """Turns texts into speech.

    Args:
        vocoder: None: Griffin-Lim.
        uses_thinker_states: whether stage E trained the talker on the states of the Thinker whose answers it speaks.
    """

    def __init__(
        self, talker: Talker, codec: Codec, vocoder: Generator | None = None, *, uses_thinker_states: bool = False
    ) -> None:
        self.talker, self.codec, self.vocoder = talker, codec, vocoder
        self.uses_thinker_states = uses_thinker_states
        self.spec = mel_spec(codec.architecture)
        if vocoder is not None:
            refuse_other_mels("the vocoder", vocoder.architecture, "the codec", self.spec)
        self.text_language = talker.architecture.text_language
        self.code_s = codec.architecture.frame_ms / 1000
        self.max_frames = int(MAX_SECONDS / self.code_s)
        self.reference: Tensor | None = None  # codes (N, Q) of the voice; None: the talker's first

    # Voices ------------------------------------------------------------------------------------------------------

    def voice(self, name: str | None = None, recording: Media | None = None) -> Tensor | None:
        """The codes (N, Q) of a voice: of one of the talker's, by its name; or of a recording of one to 60 seconds.
        Without either, None.

        Raises:
            UserError: the talker has one voice, or none of this name; the recording cannot be used; or both are given.
        """
        if name is None and recording is None:
            return None
        if name is not None and recording is not None:
            raise UserError("--voice_from: expected no --voice beside it")
        if self.talker.voice_encoder is None:
            raise UserError(
                "the talker has one voice, so no other can be chosen. Train one with voice_layers, see docs/faq.md"
            )
        if recording is not None:
            return self._recorded_voice(recording)
        speakers = self.talker.architecture.speakers
        if name not in speakers:
            known = ", ".join(quoted(one) for one in speakers if one)
            raise UserError(f"voice {quoted(name)}: expected one of {known}")
        return self.talker.voice_codes[speakers.index(name)]

    def _recorded_voice(self, recording: Media) -> Tensor:
        rate = self.spec.sample_rate
        try:
            waveform = load_audio(recording, rate, MAX_SECONDS)
        except BadRow as error:
            raise UserError(str(error)) from error
        if len(waveform) < MIN_VOICE_S * rate:
            found = f"lasts {len(waveform) / rate:.2g} s, expected at least {MIN_VOICE_S:g} s"
            raise UserError(f"{quoted(recording)}: {found} of a voice")
        if np.abs(waveform).max() < _SILENT:
            raise UserError(f"{quoted(recording)}: expected a voice, found silence")
        return self.encode(torch.from_numpy(waveform))

    # Many texts at once ------------------------------------------------------------------------------------------

    def codes(self, texts: Sequence[str], references: Sequence[Tensor] | None = None, **sampling) -> list[Tensor]:
        """The codes (N, Q) of each text; ``references``, by default the speaker's own, and ``sampling`` as in
        ``Talker.generate``."""
        symbols = [text_symbols(text, self.text_language) for text in texts]
        sampling.setdefault("max_frames", self.max_frames)
        sampling["references"] = references or self._references(len(texts))
        frames, going_on = [], []
        for codes, still in self.talker.generate(symbols, **sampling):
            frames.append(codes)
            going_on.append(still)
        if not frames:
            return [torch.zeros(0, self.talker.codebooks, dtype=torch.int64) for _ in texts]
        lengths = torch.stack(going_on).sum(dim=0).tolist()
        return [codes[:length] for codes, length in zip(torch.stack(frames, dim=1), lengths, strict=True)]

    def _references(self, count: int) -> list[Tensor] | None:
        return None if self.reference is None else [self.reference] * count

    def waveform(self, codes: Tensor) -> Tensor:
        """The sound (S,) of codes (N, Q)."""
        if not len(codes):
            return torch.zeros(0)
        return self.vocode(self.codec.decode(codes[None])[0])

    @torch.no_grad()
    def vocode(self, log_mels: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """The sound (S,) of log-mels (T, M), S = T * hop_length, on the CPU; with a vocoder, that of frames ``start``
        to ``end``."""
        with torch.autocast(log_mels.device.type, enabled=False):
            if self.vocoder is None:
                return griffin_lim(log_mels, self.spec).cpu()
            return self.vocoder.vocode(log_mels, start, end).cpu()

    def encode(self, recording: Tensor) -> Tensor:
        """The codes (N, Q) of a recording (S,)."""
        log_mels = log_mel(recording, self.spec).to(self.codec.mel_mean.device)
        return self.codec.encode_one(log_mels).cpu()

    @torch.no_grad()
    def versions(self, recording: Tensor) -> dict[str, Tensor]:
        """A recording (S,), and its resynthesis from log-mels (``vocoded``) and from codes (``codec``)."""
        log_mels = log_mel(recording, self.spec).to(self.codec.mel_mean.device)
        coded = self.codec.resynthesise(log_mels)
        return {"recordings": recording, "vocoded": self.vocode(log_mels), "codec": self.vocode(coded)}

    # One text, piece by piece ------------------------------------------------------------------------------------

    def stream(self, text: str, reference: Tensor | None = None, **sampling) -> Iterator[np.ndarray]:
        """The sound of ``text``, (S,) float32 pieces, each as soon as no later code can change it; ``reference`` and
        ``sampling`` as in ``codes``.

        Concatenated, the pieces are the sound of the whole text. Griffin-Lim needs the whole utterance, so without a
        vocoder there is one piece.
        """
        symbols = text_symbols(text, self.text_language)
        sampling.setdefault("max_frames", self.max_frames)
        sampling["references"] = self._references(1) if reference is None else [reference]
        codes: list[Tensor] = []
        log_mels = torch.zeros(0, self.spec.n_mels, device=self.codec.mel_mean.device)  # of the first codes
        done, chunk = 0, FIRST_CHUNK
        for frame, _ in self.talker.generate([symbols], **sampling):
            codes.append(frame[0])
            if self.vocoder is not None and len(codes) >= done + chunk + self.context:
                log_mels = self._continued(log_mels, codes, len(codes) - self.codec.context)
                yield self._piece(log_mels, done, done + chunk)
                done, chunk = done + chunk, NEXT_CHUNKS
        if done < len(codes):
            yield self._piece(self._continued(log_mels, codes, len(codes)), done, len(codes))

    @property
    def context(self) -> int:
        """Codes that must follow a piece of sound before it can be computed."""
        return self.codec.context + -(-self.vocoder.context_frames // self.codec.architecture.frames_per_code)

    def _continued(self, log_mels: Tensor, codes: list[Tensor], end: int) -> Tensor:
        """The log-mels (T, M) of codes 0 to ``end``, of which ``log_mels`` has the first."""
        per_code, context = self.codec.architecture.frames_per_code, self.codec.context
        start = len(log_mels) // per_code
        first, last = max(0, start - context), min(len(codes), end + context)
        more = self.codec.decode(torch.stack(codes[first:last])[None])[0]
        return torch.cat((log_mels, more[(start - first) * per_code : (end - first) * per_code]))

    def _piece(self, log_mels: Tensor, start: int, end: int) -> np.ndarray:
        """The sound of codes ``start`` to ``end``, of the log-mels (T, M) of all codes so far."""
        if self.vocoder is None:
            return self.vocode(log_mels).numpy()
        per_code = self.codec.architecture.frames_per_code
        return self.vocode(log_mels, start * per_code, end * per_code).numpy()
