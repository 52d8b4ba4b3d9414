"""From text to sound: talker, codec and vocoder put together, at once for many texts or in pieces as they come.

And the judge of it: a recogniser writes down what it hears.
"""

# B utterances, N codes in time, T mel frames, M mel channels, S samples, Q codebooks

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omni.common.errors import BadRow, reading_row
from omni.data.audio import griffin_lim, load_audio, log_mel, normalise_features, resample
from omni.data.manifest import Manifest
from omni.data.measure import files_digest
from omni.models.aligner import text_symbols
from omni.models.audio_encoder import mel_spec as recogniser_mel_spec
from omni.models.codec import Codec, fingerprint, load_codec, mel_spec
from omni.models.ctc import normalise_text
from omni.models.talker import Talker, load_talker, talker_metrics, talker_sums
from omni.models.vocoder import Generator, load_vocoder_for, refuse_other_mels
from omni.stages.audio_encoder import error_counts, load_audio_encoder, transcribe
from omni.train.run import Run

MAX_SECONDS = 60.0
FIRST_CHUNK, NEXT_CHUNKS = 4, 16  # codes in time whose sound is handed out together
_BATCH = 16  # recordings that are transcribed at a time


class Speaker:
    """Says texts.

    Args:
        vocoder: None: Griffin-Lim.
        hears: whether the talker has learnt, in stage E, to hear the Thinker whose answers it speaks.
    """

    def __init__(
        self, talker: Talker, codec: Codec, vocoder: Generator | None = None, *, uses_thinker_states: bool = False
    ) -> None:
        self.talker, self.codec, self.vocoder = talker, codec, vocoder
        self.uses_thinker_states = uses_thinker_states
        self.spec = mel_spec(codec.arch)
        if vocoder is not None:
            refuse_other_mels("the vocoder", vocoder.config, "the codec", self.spec)
        self.code_s = codec.arch.frame_ms / 1000
        self.max_frames = int(MAX_SECONDS / self.code_s)

    @classmethod
    def load(cls, folder: str | Path, vocoder_folder: str | Path | None, device: torch.device) -> "Speaker":
        """What stage D, and if given stage F, left in their folders.

        Raises:
            UserError: nothing there, damaged, or a vocoder of other log-mels than the codec's.
        """
        talker, codec = load_talker(folder, device), load_codec(folder, device)
        return cls(talker, codec, load_vocoder_for(folder, mel_spec(codec.arch), vocoder_folder, device))

    # Many texts at once ------------------------------------------------------------------------------------------

    def codes(self, texts: Sequence[str], **sampling) -> list[Tensor]:
        """The codes (N, Q) of each text; ``sampling`` as in ``Talker.generate``."""
        symbols = [text_symbols(text) for text in texts]
        sampling.setdefault("max_frames", self.max_frames)
        frames, going_on = [], []
        for codes, still in self.talker.generate(symbols, **sampling):
            frames.append(codes)
            going_on.append(still)
        if not frames:
            return [torch.zeros(0, self.talker.codebooks, dtype=torch.int64) for _ in texts]
        lengths = torch.stack(going_on).sum(dim=0).tolist()
        return [codes[:length] for codes, length in zip(torch.stack(frames, dim=1), lengths, strict=True)]

    def waveform(self, codes: Tensor) -> Tensor:
        """The sound (S,) of codes (N, Q)."""
        if not len(codes):
            return torch.zeros(0)
        return self.vocode(self.codec.decode(codes[None])[0])

    @torch.no_grad()
    def vocode(self, log_mels: Tensor) -> Tensor:
        """The sound (S,) of log-mels (T, M), S = T * hop_length, on the CPU."""
        with torch.autocast(log_mels.device.type, enabled=False):
            return (griffin_lim(log_mels, self.spec) if self.vocoder is None else self.vocoder.vocode(log_mels)).cpu()

    def encode(self, recording: Tensor) -> Tensor:
        """The codes (N, Q) of a recording (S,)."""
        log_mels = log_mel(recording, self.spec).to(self.codec.mel_mean.device)
        return self.codec.encode_one(log_mels).cpu()

    @torch.no_grad()
    def versions(self, recording: Tensor) -> dict[str, Tensor]:
        """A recording (S,), and what becomes of it as log-mels (``vocoded``) and as codes (``codec``)."""
        log_mels = log_mel(recording, self.spec).to(self.codec.mel_mean.device)
        coded = self.codec.resynthesise(log_mels)
        return {"recordings": recording, "vocoded": self.vocode(log_mels), "codec": self.vocode(coded)}

    # One text, piece by piece ------------------------------------------------------------------------------------

    def stream(self, text: str, **sampling) -> Iterator[np.ndarray]:
        """The sound of ``text``, (S,) float32 pieces, each as soon as no later code can change it; ``sampling`` as in
        ``Talker.generate``.

        The pieces are, one after the other, the sound of the whole. Griffin-Lim looks at all of an utterance, so
        without a vocoder there is one piece.
        """
        symbols = text_symbols(text)
        sampling.setdefault("max_frames", self.max_frames)
        codes: list[Tensor] = []
        done, chunk = 0, FIRST_CHUNK
        for frame, _ in self.talker.generate([symbols], **sampling):
            codes.append(frame[0])
            if self.vocoder is not None and len(codes) >= done + chunk + self.context:
                yield self._piece(codes, done, done + chunk)
                done, chunk = done + chunk, NEXT_CHUNKS
        if done < len(codes):
            yield self._piece(codes, done, len(codes))

    @property
    def context(self) -> int:
        """Codes on either side that a piece of sound depends on."""
        return self.codec.context + -(-self.vocoder.context_frames // self.codec.arch.frames_per_code)

    def _piece(self, codes: list[Tensor], start: int, end: int) -> np.ndarray:
        """The sound of codes ``start`` to ``end``, computed from no more of their surroundings than it depends on."""
        if self.vocoder is None:
            return self.waveform(torch.stack(codes)).numpy()
        per_code, hop = self.codec.arch.frames_per_code, self.spec.hop_length
        first, last = max(0, start - self.context), min(len(codes), end + self.context)
        log_mels = self.codec.decode(torch.stack(codes[first:last])[None])[0]
        # what the codec's window has got wrong at its own ends lies outside what the vocoder looks at
        near = self.context - self.codec.context
        left, right = max(first, start - near), min(last, end + near)
        waveform = self.vocode(log_mels[(left - first) * per_code : (right - first) * per_code])
        return waveform[(start - left) * per_code * hop : (end - left) * per_code * hop].numpy()


# ---------------------------------------------------------------------------------------------------------------
# Listening


class Recognizer:
    """The recogniser of stage B, asked what it hears.

    Args:
        folder: its ``save_dir``.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        self.model, self.tokenizer, config = load_audio_encoder(folder, device)
        self.spec, self.max_frames, self.device = recogniser_mel_spec(config), config.max_mel_length, device

    @torch.no_grad()
    def transcribe(self, waveforms: Sequence[Tensor], sample_rate: int) -> list[str]:
        """What is said in each of (S,) float32 at ``sample_rate`` Hz."""
        texts = []
        for start in range(0, len(waveforms), _BATCH):
            features = [self._features(waveform, sample_rate) for waveform in waveforms[start : start + _BATCH]]
            lengths = [len(one) for one in features]
            batch = torch.zeros(len(features), 8 * -(-max(lengths) // 8), self.spec.n_mels)
            for index, one in enumerate(features):
                batch[index, : len(one)] = one
            batch, frames = batch.to(self.device), torch.tensor(lengths, device=self.device)
            texts += transcribe(self.model, self.tokenizer, batch, frames)
        return texts

    def _features(self, waveform: Tensor, sample_rate: int) -> Tensor:
        samples = resample(waveform.numpy(), sample_rate, self.spec.sample_rate)
        samples = samples[: self.max_frames * self.spec.hop_length]
        if len(samples) < self.spec.hop_length:  # nothing was said
            samples = np.zeros(self.spec.hop_length, np.float32)
        return normalise_features(log_mel(torch.from_numpy(samples), self.spec))


def word_error_rates(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Kind of speech -> (word errors, words), as ``wer_recordings``, ``wer_talker`` and so on: errors per word. A kind
    without a word has no rate."""
    return {f"wer_{kind}": float(errors / words) for kind, (errors, words) in counts.items() if words}


def word_errors(texts: Sequence[str], heard: Sequence[str]) -> tuple[int, int]:
    """Word errors of ``heard`` against ``texts``, and the words of these. A text without words has no part in it."""
    pairs = [(normalise_text(text), said) for text, said in zip(texts, heard, strict=True)]
    pairs = [(text, said) for text, said in pairs if text]
    return error_counts(*map(list, zip(*pairs, strict=True)))[0] if pairs else (0, 0)


def read_recordings(
    speaker: Speaker, manifest: Manifest, rows: Sequence[int], left_out: dict[str, str]
) -> list[tuple[int, str, Tensor]]:
    """Each row with its text and recording (S,) at the codec's rate; a row that cannot be used goes to ``left_out``."""
    read = []
    for row in rows:
        try:
            with reading_row():
                fields, spec = manifest[row], speaker.spec
                waveform = load_audio(manifest.file(fields["wav"]), spec.sample_rate, MAX_SECONDS, spec.win_length)
                read.append((row, fields["text"], torch.from_numpy(waveform)))
        except BadRow as error:
            left_out[manifest.where(row)] = str(error)
    return read


def prepare_references(
    run: Run, speaker: Speaker, recognizer: Recognizer, manifest: Manifest, rows: Sequence[int]
) -> dict[str, float]:
    """Word error rates of the recordings and of what codec and vocoder make of them, kept in ``save_dir``."""

    def make() -> dict[str, float]:
        run.log(f"listening to {len(rows)} held-out recordings, as they are, vocoded, and coded")
        read = read_recordings(speaker, manifest, rows, left_out={})
        versions = [speaker.versions(recording) for *_, recording in read]
        counts = {}
        for kind in ("recordings", "vocoded", "codec"):
            heard = recognizer.transcribe([version[kind] for version in versions], speaker.spec.sample_rate)
            counts[kind] = word_errors([text for _, text, _ in read], heard)
        rates = word_error_rates(counts)
        run.log("  ".join(f"{name} {rate:.4g}" for name, rate in rates.items()))
        return rates

    models = {"codec": speaker.codec, "vocoder": speaker.vocoder, "recognizer": recognizer.model}
    belongs_to = {name: fingerprint(model) for name, model in models.items() if model is not None}
    belongs_to |= {"data": manifest.sha256, "rows": len(rows), "files": files_digest(manifest, rows, "wav")}
    return run.cached_json("references.json", belongs_to, make)


class TalkerScore:
    """Judges a talker: its perplexity on the true codes, and what the recognizer gets wrong when it speaks.

    Args:
        recognizer: None: it speaks, and nobody counts its words.
        sentences: how many it says in each process.
        show: called with the step, the number of the sentence, its recording's name, and the waveform of what is said.
        shown: for how many of them.
    """

    def __init__(
        self,
        speaker: Speaker,
        recognizer: Recognizer | None,
        sentences: int,
        show: Callable[[int, int, str, Tensor], None] | None = None,
        shown: int = 2,
    ) -> None:
        self.speaker, self.recognizer, self.sentences, self.show, self.shown = (
            speaker,
            recognizer,
            sentences,
            show,
            shown,
        )
        self.said = 0

    def sums(self, model: Talker, batch: dict) -> dict[str, Tensor]:
        totals = talker_sums(model, batch)
        texts = batch["texts"][: self.sentences - self.said]
        if texts:
            waveforms = [self.speaker.waveform(codes) for codes in self.speaker.codes(texts)]
            for number, (wav, waveform) in enumerate(zip(batch["wavs"], waveforms, strict=False), start=self.said):
                if self.show is not None and number < self.shown:
                    self.show(batch["step"], number, wav, waveform)
            if self.recognizer is not None:
                errors, words = word_errors(texts, self.recognizer.transcribe(waveforms, self.speaker.spec.sample_rate))
                totals |= {"word_errors": torch.tensor(errors), "words": torch.tensor(words)}
            self.said += len(texts)
        return totals

    def metrics(self, totals: dict) -> dict[str, float]:
        self.said = 0
        metrics = talker_metrics(totals)
        if self.recognizer is not None:
            metrics |= word_error_rates({"talker": (totals["word_errors"], totals["words"])})
        return metrics
