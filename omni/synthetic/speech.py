"""Speech of the small world: sentences of `omni.synthetic.writing`, read aloud by the espeak-ng synthesiser.

espeak-ng has state: the phase of its pitch flutter, its automatic gain and its noise generators continue from one
utterance to the next, and no call resets them, so it reads the same text differently each time. Clips therefore come in
groups of `GROUP`, and a new process reads each group. So clip i is a function of the seed and i only: see `make_clips`.

The audio is 16 kHz, 16 bit, mono. Equal versions of espeak-ng, soxr and NumPy on the same kind of processor give equal
bytes.
"""

import ctypes
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import espeakng_loader
import numpy as np
import soundfile
import soxr

from omni.synthetic import facts, writing

SAMPLE_RATE = 16_000  # Hz
GROUP = 32  # clips per process, whose start takes as long as one or two clips

# --- who speaks ------------------------------------------------------------------------------------------------------

# espeak-ng's names: accent, then variant. Selected with PocketSphinx and a bigram model of the world's sentences, an
# independent recogniser of American English: its word error rate is 1 % on the reader and below 20 % on each of VOICES
# (160 words a minute), 3 to 36 % on the unseen ones (as they are in asr.val_voices). Many others reach 100 %.
READER = "en-us+f2"  # the voice of tts.csv
VOICES = (
    "en-us", "en-us+f1", READER, "en-us+f4", "en-us+steph", "en-us+m1", "en-us+m3", "en-us+m6", "en-us+Hugo",
    "en-us+Denis", "en-us+adam", "en", "en+f2", "en-gb-x-rp", "en-gb-x-rp+m3", "en-us-nyc+f2",
)  # fmt: skip
# never trained on: variants, and one accent, Lancaster, that are not in VOICES
UNSEEN_VOICES = (
    "en-us+f3", "en-us+m5", "en-us+edward", "en-gb-x-rp+m2", "en-gb-x-gbclan+f5", "en-gb-x-gbclan+m4",
)  # fmt: skip


@dataclass(frozen=True)
class Speaking:
    """The parameters with which a sentence is spoken."""

    voice: str
    words_per_minute: int
    pitch: int  # 0 to 99; 50 is the voice's own
    gain_db: float = 0.0  # espeak-ng itself stays just below full scale
    lead_s: float = 0.08  # silence before the first sound, and after the last
    snr_db: float | None = None  # None: no noise
    noise_smoothing: int = 1  # samples; more is darker noise


@dataclass(frozen=True)
class Collection:
    """One row of COLLECTIONS: the clips of one manifest, and how they differ."""

    unseen: bool  # whether the sentences have held-out combinations
    different: bool  # whether all sentences differ
    voices: tuple[str, ...]
    varied: bool  # whether rate, pitch and loudness differ between clips
    noisy: float  # share of clips with noise


COLLECTIONS = {
    "asr": Collection(unseen=False, different=False, voices=VOICES, varied=True, noisy=0.4),
    "asr.val": Collection(unseen=True, different=True, voices=VOICES, varied=True, noisy=0.0),
    "asr.val_voices": Collection(unseen=True, different=True, voices=UNSEEN_VOICES, varied=True, noisy=0.0),
    "tts": Collection(unseen=False, different=True, voices=(READER,), varied=False, noisy=0.0),
    "tts.val": Collection(unseen=True, different=True, voices=(READER,), varied=False, noisy=0.0),
}


def sentences(name: str, seed: int, count: int) -> list[str]:
    """The sentences of a collection; a smaller `count` gives the first of them."""
    collection = COLLECTIONS[name]
    chosen: list[str] = []
    known: set[str] = set()
    draw = 0
    while len(chosen) < count:
        text = writing.spoken(random.Random(f"speech {name} {seed} {draw}"), collection.unseen)
        draw += 1
        if collection.different and text in known:
            continue
        known.add(text)
        chosen.append(text)
    return chosen


def speaking(name: str, seed: int, index: int) -> Speaking:
    """The parameters with which clip `index` of a collection is spoken."""
    collection = COLLECTIONS[name]
    rng = random.Random(f"speaking {name} {seed} {index}")
    voice = collection.voices[index % len(collection.voices)]
    if not collection.varied:
        return Speaking(voice, words_per_minute=160, pitch=50)
    return Speaking(
        voice,
        words_per_minute=rng.randint(130, 185),
        pitch=rng.randint(35, 65),
        gain_db=rng.uniform(-12.0, 0.0),
        lead_s=rng.uniform(0.05, 0.1),
        snr_db=rng.uniform(15.0, 35.0) if rng.random() < collection.noisy else None,
        noise_smoothing=rng.choice((1, 4, 16)),
    )


# --- the synthesiser -------------------------------------------------------------------------------------------------

# Constants of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2  # the call passes the samples to a callback, and returns at the end of the speech
_RATE, _PITCH = 1, 3  # parameters
_BUFFER_MS = 1000  # per call of the callback: the library's default, 60 ms, takes a quarter more time
_CHARS_UTF8 = 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Synthesiser:
    """espeak-ng, through its C interface. One per process, since the library has global state.

    Raises:
        RuntimeError: the library does not start, or a voice is unknown.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        library.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        self.library = library
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # kept: the library holds only its address
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MS, data, 0)  # Hz: 22050
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with the data in {data.decode()}")
        library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, n_samples: int, events) -> int:
        if samples and n_samples:
            self._chunks.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())
        return 0

    def speak(self, text: str, voice: str, words_per_minute: int, pitch: int, seed: int) -> np.ndarray:
        """Samples (n,), int16, at `sample_rate`; `seed` of the breath in some voices."""
        self._chunks.clear()
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f'espeak-ng has no voice "{voice}"')
        # after the voice, which sets its own rate and pitch
        self.library.espeak_SetParameter(_RATE, words_per_minute, 0)
        self.library.espeak_SetParameter(_PITCH, pitch, 0)
        self.library.espeak_ng_SetRandSeed(seed)
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _CHARS_UTF8, None, None)
        return np.concatenate(self._chunks)


def finish(samples: np.ndarray, sample_rate: int, how: Speaking, seed: int) -> np.ndarray:
    """espeak-ng's samples as a clip: silence trimmed to `lead_s`, resampled, with the gain and noise of `how`.

    Args:
        samples: (n,) int16.

    Returns:
        (m,) int16 at SAMPLE_RATE.
    """
    audio = samples.astype(np.float32) / 32768
    audible = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())  # -40 dB
    lead = round(how.lead_s * sample_rate)
    audio = np.pad(audio, lead)[audible[0] : audible[-1] + 2 * lead]  # index i of audio is i + lead when padded
    audio = soxr.resample(audio, sample_rate, SAMPLE_RATE)
    audio *= 10 ** (how.gain_db / 20)
    if how.snr_db is not None:
        # RandomState: its numbers are the same in every version of NumPy
        noise = np.random.RandomState(seed).standard_normal(len(audio) + how.noise_smoothing - 1)
        noise = np.convolve(noise, np.ones(how.noise_smoothing), mode="valid")
        audio = audio + noise * np.sqrt(np.mean(audio**2) / np.mean(noise**2)) * 10 ** (-how.snr_db / 20)
    return np.rint(np.clip(audio, -1.0, 1.0) * 32767).astype(np.int16)


def make_clips(name: str, seed: int, texts: list[str], start: int, stop: int) -> Iterator[tuple[bytes, dict]]:
    """Clips `start` to `stop` - 1 of a collection, each as (contents of a wav file, {"text", "voice", "answer",
    "question"}): ``answer`` answers the text, and ``question`` is a JSON list of questions that the text answers; each
    is "" if there is none.

    Must run in a process that has not loaded espeak-ng before, from the beginning of a group: `start` is a multiple of
    GROUP, and `stop` at most one group later.

    Args:
        texts: the sentences of the whole collection.
    """
    synthesiser = Synthesiser()
    for index in range(start, stop):
        how = speaking(name, seed, index)
        noise_seed = random.Random(f"noise {name} {seed} {index}").getrandbits(31)
        samples = synthesiser.speak(texts[index], how.voice, how.words_per_minute, how.pitch, noise_seed)
        file = io.BytesIO()
        clip = finish(samples, synthesiser.sample_rate, how, noise_seed)
        soundfile.write(file, clip, SAMPLE_RATE, subtype="PCM_16", format="WAV")
        questions = facts.QUESTIONS.get(texts[index])
        row = {"text": texts[index], "voice": how.voice, "answer": facts.ANSWERS.get(texts[index], "")}
        yield file.getvalue(), row | {"question": json.dumps(questions) if questions else ""}
