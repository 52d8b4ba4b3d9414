"""Word error rates by the recogniser of stage B: of recordings, of their resynthesis, and of the talker's speech."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omni.common.errors import BadRow, reading_row
from omni.common.host import Host
from omni.common.numerics import weights_sha256
from omni.common.spoken import Language, spoken_version
from omni.data.audio import load_audio, log_mel, normalise_features, resample
from omni.data.manifest import Manifest
from omni.data.measure import files_digest
from omni.models.audio_encoder import mel_spec
from omni.models.speaker import MAX_SECONDS, Speaker
from omni.models.talker import Talker
from omni.stages.audio_encoder import STAGE, AudioEncoderConfig, error_counts, transcribe, written_words
from omni.stages.talker import TalkerConfig, speakers_in, talker_metrics, talker_sums
from omni.train.run import Run
from omni.train.samples import save_samples
from omni.train.stage import load

_BATCH = 16  # recordings that are transcribed at a time
_COUNTS = ("errors", "words")


class Recognizer:
    """The recogniser of stage B.

    Args:
        folder: the ``save_dir`` of its training.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        opened = load(STAGE, folder, device)
        self.model, self.tokenizer, config = opened.model, opened.tokenizer, opened.config_as(AudioEncoderConfig)
        self.spec, self.max_frames, self.device = mel_spec(config), config.max_mel_length, device
        self.text_language = config.text_language

    @torch.no_grad()
    def transcribe(self, waveforms: Sequence[Tensor], sample_rate: int) -> list[str]:
        """The transcript of each waveform (S,) float32 at ``sample_rate`` Hz."""
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
        if len(samples) < self.spec.hop_length:  # the talker ended at once
            samples = np.zeros(self.spec.hop_length, np.float32)
        return normalise_features(log_mel(torch.from_numpy(samples), self.spec))


def word_error_rates(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    """(Word errors, words) of each kind of speech -> ``wer_recordings``, ``wer_talker`` ..., errors per word. A kind
    without words has no rate."""
    return {f"wer_{kind}": float(errors / words) for kind, (errors, words) in counts.items() if words}


def word_errors(texts: Sequence[str], transcripts: Sequence[str], language: Language | None = None) -> tuple[int, int]:
    """Numbers of word errors of ``transcripts`` and of words in ``texts``. A text without words is left out.

    Args:
        language: the recogniser's ``text_language``.
    """
    pairs = [(written_words(text, language), found) for text, found in zip(texts, transcripts, strict=True)]
    pairs = [(text, found) for text, found in pairs if text]
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
                waveform = load_audio(manifest.file(fields, "wav"), spec.sample_rate, MAX_SECONDS, spec.win_length)
                read.append((row, fields["text"], torch.from_numpy(waveform)))
        except BadRow as error:
            left_out[manifest.where(row)] = str(error)
    return read


def prepare_references(
    run: Host, speaker: Speaker, recognizer: Recognizer, manifest: Manifest, rows: Sequence[int]
) -> dict[str, float]:
    """Word error rates of the recordings and of their resynthesis by vocoder and codec, kept in ``save_dir``."""

    def make() -> dict[str, float]:
        run.log(f"transcribing {len(rows)} held-out recordings: as they are, vocoded, and coded")
        read = read_recordings(speaker, manifest, rows, left_out={})
        versions = [speaker.versions(recording) for *_, recording in read]
        counts = {}
        for kind in ("recordings", "vocoded", "codec"):
            transcripts = recognizer.transcribe([version[kind] for version in versions], speaker.spec.sample_rate)
            counts[kind] = word_errors([text for _, text, _ in read], transcripts, recognizer.text_language)
        rates = word_error_rates(counts)
        run.log("  ".join(f"{name} {rate:.4g}" for name, rate in rates.items()))
        return rates

    models = {"codec": speaker.codec, "vocoder": speaker.vocoder, "recognizer": recognizer.model}
    belongs_to = {name: weights_sha256(model) for name, model in models.items() if model is not None}
    belongs_to |= {"data": manifest.sha256, "rows": len(rows), "files": files_digest(manifest, rows, "wav")}
    belongs_to |= spoken_version(recognizer.text_language)
    return run.cached_json("references.json", belongs_to, make)


def sample_writer(
    run: Run, speaker: Speaker, manifest: Manifest
) -> Callable[[int, int, dict, dict[str, Tensor]], None]:
    """The function ``show`` of a ``TalkerScore``: writes a recording, its resynthesis and the talker's speech."""

    def show(step: int, number: int, recording: dict, speech: dict[str, Tensor]) -> None:
        waveform = load_audio(manifest.file(recording, "wav"), speaker.spec.sample_rate)
        versions = speaker.versions(torch.from_numpy(waveform))
        clips = {"recording": versions["recordings"], "codec": versions["codec"]} | speech
        save_samples(run, step, number, clips, speaker.spec)

    return show


class TalkerScore:
    """Metrics of a talker: its perplexity on the true codes, and the word error rate of its speech (``wer_talker``);
    both also by speaker, if there are several.

    Args:
        recognizer: None: no word error rate.
        config: with a ``val_temperature`` each sentence is spoken a second time, its codes drawn at this temperature
            (``wer_sampled``); the first ``val_samples`` are shown.
        sentences: number of sentences to speak in each process.
        show: called with the step, the number of the sentence, the columns that name its recording, and the waveforms
            of its speech: ``talker`` and ``sampled``.
    """

    def __init__(
        self,
        speaker: Speaker,
        recognizer: Recognizer | None,
        config: TalkerConfig,
        sentences: int,
        show: Callable[[int, int, dict, dict[str, Tensor]], None] | None = None,
    ) -> None:
        self.speaker, self.recognizer, self.sentences = speaker, recognizer, sentences
        self.show, self.shown = show, config.val_samples if show is not None else 0
        self.ways = {"talker": 0.0} | ({"sampled": config.val_temperature} if config.val_temperature else {})
        self.spoken = 0  # sentences of this validation so far

    def sums(self, model: Talker, batch: dict) -> dict[str, Tensor]:
        totals = talker_sums(model, batch)
        most = self.sentences if self.recognizer is not None else self.shown
        texts = batch["texts"][: max(0, most - self.spoken)]
        if texts:
            references = references_of(batch, len(texts))
            speech = {
                way: [self.speaker.waveform(codes) for codes in self.speaker.codes(texts, references, temperature=at)]
                for way, at in self.ways.items()
            }
            for number, recording in enumerate(batch["recordings"][: len(texts)], start=self.spoken):
                if number < self.shown:
                    own = {way: waveforms[number - self.spoken] for way, waveforms in speech.items()}
                    self.show(batch["step"], number, recording, own)
            if self.recognizer is not None:
                for way, waveforms in speech.items():
                    totals |= self.word_errors(model, batch, way, texts, waveforms)
            self.spoken += len(texts)
        return totals

    def word_errors(
        self, model: Talker, batch: dict, way: str, texts: Sequence[str], waveforms: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Word errors and words of one way of speaking, in all and by speaker: ``talker_errors``, ``talker_words``,
        ``talker_errors_NAME`` ..."""
        transcripts = self.recognizer.transcribe(waveforms, self.speaker.spec.sample_rate)
        groups = {"": range(len(texts))}
        groups |= {f"_{name}": rows for name, rows in speakers_in(model, batch).items()}
        totals = {}
        for name, rows in groups.items():
            rows = [row for row in rows if row < len(texts)]
            own, found = [texts[row] for row in rows], [transcripts[row] for row in rows]
            counts = word_errors(own, found, self.recognizer.text_language)
            totals |= {f"{way}_{key}{name}": torch.tensor(count) for key, count in zip(_COUNTS, counts, strict=True)}
        return totals

    def metrics(self, totals: dict) -> dict[str, float]:
        self.spoken = 0
        metrics = talker_metrics(totals)
        if self.recognizer is not None:
            for way in self.ways:
                errors, words = (f"{way}_{count}" for count in _COUNTS)
                names = [key.removeprefix(words) for key in totals if key.startswith(words)]
                metrics |= word_error_rates(
                    {f"{way}{name}": (totals[errors + name], totals[words + name]) for name in names}
                )
        return metrics


def references_of(batch: dict, count: int) -> list[Tensor] | None:
    """The references of a batch's first ``count`` samples, for ``Speaker.codes``; None: one voice."""
    if "references" not in batch:
        return None
    pairs = zip(batch["references"], batch["reference_lengths"].tolist(), strict=True)
    return [codes[:length] for codes, length in pairs][:count]
