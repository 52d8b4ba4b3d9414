"""Speech: sentences of the small world (`omni.synthetic.writing`) and beyond it (`omni.synthetic.open_vocabulary`),
read aloud by `omni.synthetic.synthesisers`.

Two families have state. espeak-ng's pitch flutter, automatic gain and noise generators continue from one utterance to
the next, and no call resets them, so that it reads the same text differently each time; so do the noise generators
inside Piper's network. Clips therefore come in groups of `GROUP`, and a new process reads each group. So clip i is a
function of the seed and i only: see `make_clips`.

The audio is 16 kHz, 16 bit, mono. Equal versions of the synthesisers, onnxruntime, soxr, SciPy and NumPy on the same
kind of processor give equal bytes.
"""

import io
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.signal
import soundfile
import soxr

from omni.synthetic import facts, open_vocabulary, writing
from omni.synthetic.synthesisers import FAMILIES, Delivery, Synthesiser

SAMPLE_RATE = 16_000  # Hz
GROUP = 1024  # clips that one process reads: loading the networks takes as long as a hundred of them
PEAK = 0.9  # of a clip before its gain

# --- who speaks ------------------------------------------------------------------------------------------------------

HEART = "hibari/heart"
# espeak-ng's names: accent, then variant. Chosen by an independent recogniser, PocketSphinx with a bigram model of the
# world's sentences, which knows American English only: its word error rate is below 20 % on each of them (160 words a
# minute). Many others reach 100 %.
ESPEAK_VOICES = tuple(
    f"espeak/{voice}"
    for voice in (
        "en-us", "en-us+f1", "en-us+f2", "en-us+f4", "en-us+steph", "en-us+m1", "en-us+m3", "en-us+m6", "en-us+Hugo",
        "en-us+Denis", "en-us+adam", "en", "en+f2", "en-gb-x-rp", "en-gb-x-rp+m3", "en-us-nyc+f2",
    )
)  # fmt: skip
# What the clips of a collection are read by, again and again. Piper, which takes eight times as long as Hibari, reads
# one clip in forty.
VOICES = ("piper/joe",) + 23 * (HEART,) + ESPEAK_VOICES
STRIDE = 11  # has no factor in common with any number of voices, so that all of them come, families mixed
# never trained on: another family
UNSEEN_VOICES = ("pico/en-US", "pico/en-GB")
N_OTHERS = 24  # speakers of tts.csv beside those with a name


@dataclass(frozen=True)
class Speaking:
    """The parameters with which a sentence is spoken, and its room and recording."""

    voice: str  # family/voice
    delivery: Delivery = Delivery()
    size: float = 1.0  # formants are higher by this factor, as in a smaller throat
    gain_db: float = 0.0  # a clip's peak is PEAK without it
    lead_s: float = 0.08  # silence before the first sound, and after the last
    snr_db: float | None = None  # None: no noise
    noise_smoothing: int = 1  # samples; more is darker noise
    reverberation_s: float | None = None  # until the echo has faded by 60 dB; None: no room
    direct_to_echo_db: float = 10.0
    band: tuple[int, int] | None = None  # Hz, lowest and highest, as a telephone has; None: all


# The speakers of tts*.csv by name. One synthesiser is two of them: at other pitch and formants it is another person.
READERS = {
    "heart": Speaking(HEART),
    "high": Speaking(HEART, Delivery(pitch=1.25), size=1.14),
    "joe": Speaking("piper/joe"),
    "low": Speaking(HEART, Delivery(pitch=0.6), size=0.88),
}


NEW = {  # never trained on: for `--voice_from`
    "new-espeak": Speaking("espeak/en-us+m3"),
    "new-hibari": Speaking(HEART, Delivery(pitch=0.75), size=1.05),
    "new-pico": Speaking("pico/en-GB"),
}


def other_reader(number: int) -> Speaking:
    """Speaker "other-NUMBER" of tts.csv, so that a talker sees more than a few voices, by two synthesisers in turn:
    Hibari's heart or a voice of espeak-ng, at a pitch and size of its own."""
    rng = random.Random(f"reader {number}")
    voice, (lowest, highest) = HEART, (0.55, 1.35)
    if number % 2 == 0:
        voices = [voice for voice in ESPEAK_VOICES if voice != NEW["new-espeak"].voice]
        voice, (lowest, highest) = voices[number // 2 % len(voices)], FAMILIES["espeak"].pitches
    pitch = math.exp(rng.uniform(math.log(lowest), math.log(highest)))
    return Speaking(voice, Delivery(pitch=pitch), size=rng.uniform(0.84, 1.18))


READERS |= NEW | {f"other-{number:02d}": other_reader(number) for number in range(1, N_OTHERS + 1)}


@dataclass(frozen=True)
class Collection:
    """One row of COLLECTIONS: the clips of one manifest, and how they differ."""

    unseen: bool  # sentences: held-out combinations, and held-out words in those beyond the small world
    different: bool  # whether all sentences differ
    voices: tuple[str, ...]  # or names of READERS
    varied: bool  # whether rate, pitch, formants and loudness differ between clips
    # shares of clips:
    open_vocabulary: float = 0.0  # whose sentences are beyond the small world
    picture_questions: float = 0.0  # of the others, that ask about a picture
    noisy: float = 0.0
    in_rooms: float = 0.0
    narrow: float = 0.0  # with a limited band


NAMED = ("heart", "high", "joe", "low")  # readers whose voices the talker has to have
# Who reads tts.csv: "other" is each of the others in turn. Piper takes eight times as long as Hibari.
READING = ("heart", "low", "high", "other", "joe", "heart", "high", "low", "joe", "heart", "other", "heart")
OWN = 0.5  # of these, where the user gives a text
COLLECTIONS = {
    "asr": Collection(
        unseen=False, different=False, voices=VOICES, varied=True, open_vocabulary=0.25, picture_questions=0.3,
        noisy=0.4, in_rooms=0.3, narrow=0.15,
    ),
    "asr_open": Collection(
        unseen=False, different=True, voices=VOICES, varied=True, open_vocabulary=1.0,
        noisy=0.4, in_rooms=0.3, narrow=0.15,
    ),
    "asr.val": Collection(unseen=True, different=True, voices=VOICES, varied=True),
    "asr.val_voices": Collection(unseen=True, different=True, voices=UNSEEN_VOICES, varied=True),
    "asr.val_open": Collection(unseen=True, different=True, voices=UNSEEN_VOICES, varied=True, open_vocabulary=1.0),
    "tts": Collection(unseen=False, different=True, voices=READING, varied=False, open_vocabulary=0.5),
    "tts.val": Collection(unseen=True, different=True, voices=NAMED, varied=False),
    "tts.val_voices": Collection(unseen=True, different=True, voices=(*NAMED, *NEW), varied=False),
    "tts.val_open": Collection(unseen=True, different=True, voices=NAMED, varied=False, open_vocabulary=1.0),
}  # fmt: skip


def sentences(name: str, seed: int, count: int, own: Sequence[str] = ()) -> list[str]:
    """The sentences of a collection; a smaller `count` gives the first of them. No training sentence has a held-out
    word.

    Args:
        own: sentences of the user's text; each comes once at most, and none in a held-out collection.
    """
    collection = COLLECTIONS[name]
    chosen: list[str] = []
    known: set[str] = set()
    draw = 0
    unused = [] if collection.unseen else list(own)
    while len(chosen) < count:
        rng = random.Random(f"speech {name} {seed} {draw}")
        draw += 1
        in_world = not collection.open_vocabulary or rng.random() >= collection.open_vocabulary
        if in_world and collection.picture_questions and rng.random() < collection.picture_questions:
            text = writing.picture_question(rng)
        elif in_world:
            text = writing.spoken(rng, collection.unseen)
        elif unused and rng.random() < OWN:
            place = rng.randrange(len(unused))
            unused[place], unused[-1] = unused[-1], unused[place]
            text = unused.pop()
        else:
            text = open_vocabulary.open_sentence(rng, collection.unseen)
        if text in known and (collection.different or not in_world):
            continue
        if not collection.unseen and open_vocabulary.held_out_words(text):
            continue
        known.add(text)
        chosen.append(text)
    return chosen


def speaker(name: str, index: int) -> str:
    """Who reads clip `index` of a collection: a name of READERS, or the voice where clips are varied."""
    voices = COLLECTIONS[name].voices
    voice, turn = voices[index * STRIDE % len(voices)], index // len(voices) * voices.count("other")
    if voice != "other":
        return voice
    turn += sum(voices[earlier * STRIDE % len(voices)] == "other" for earlier in range(index % len(voices)))
    return f"other-{turn % N_OTHERS + 1:02d}"


def speaking(name: str, seed: int, index: int) -> Speaking:
    """The parameters with which clip `index` of a collection is spoken."""
    collection = COLLECTIONS[name]
    rng = random.Random(f"speaking {name} {seed} {index}")
    voice = speaker(name, index)
    if not collection.varied:
        return READERS[voice]
    lowest, highest = FAMILIES[voice.partition("/")[0]].pitches
    return Speaking(
        voice,
        Delivery(
            speed=rng.uniform(0.82, 1.15),
            pitch=math.exp(rng.uniform(math.log(lowest), math.log(highest))),
            liveliness=rng.uniform(0.6, 1.2),
        ),
        size=rng.uniform(0.9, 1.12),
        gain_db=rng.uniform(-12.0, 0.0),
        lead_s=rng.uniform(0.05, 0.1),
        snr_db=rng.uniform(15.0, 35.0) if rng.random() < collection.noisy else None,
        noise_smoothing=rng.choice((1, 4, 16)),
        reverberation_s=rng.uniform(0.1, 0.4) if rng.random() < collection.in_rooms else None,
        direct_to_echo_db=rng.uniform(3.0, 15.0),
        band=(rng.randint(80, 350), rng.randint(3_000, 7_000)) if rng.random() < collection.narrow else None,
    )


def unspeakable(texts: list[str]) -> list[str]:
    """The texts with a sound that a voice of training does not know. Loads espeak-ng, so ask in a new process."""
    networks = FAMILIES["hibari"](), FAMILIES["piper"]()
    return [text for text in texts if not all(network.knows(text) for network in networks)]


# --- from a sentence to a clip ---------------------------------------------------------------------------------------


def say(synthesiser: Synthesiser, text: str, how: Speaking, seed: int) -> tuple[np.ndarray, float]:
    """What the synthesiser says, and the rate in Hz at which to play it.

    A recording that is played faster is higher, shorter, and of a smaller throat. The synthesiser therefore speaks
    lower and slower by `how.size`, and the rate makes up for it.
    """
    how_here = Delivery(how.delivery.speed / how.size, how.delivery.pitch / how.size, how.delivery.liveliness)
    voice = how.voice.partition("/")[2]
    return synthesiser.speak(text, voice, how_here, seed), synthesiser.sample_rate * how.size


def echo(seconds: float, direct_to_echo_db: float, random_state: np.random.RandomState) -> np.ndarray:
    """A small room's impulse response at SAMPLE_RATE: the sound itself, then noise that fades by 60 dB in `seconds`."""
    n_samples = round(seconds * SAMPLE_RATE)
    tail = random_state.standard_normal(n_samples) * 10 ** (-3 * np.arange(n_samples) / n_samples)
    tail[0] = 0
    tail *= 10 ** (-direct_to_echo_db / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1
    return tail


def limit_band(audio: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    """The part of (n,) samples at SAMPLE_RATE from `lowest` to `highest` Hz, at slopes of 24 dB an octave."""
    frequencies = np.fft.rfftfreq(2 * len(audio), 1 / SAMPLE_RATE)
    passed = 1 / np.sqrt(1 + (frequencies / highest) ** 8) * np.sqrt(1 - 1 / (1 + (frequencies / lowest) ** 8))
    return np.fft.irfft(np.fft.rfft(audio, 2 * len(audio)) * passed)[: len(audio)]


def finish(audio: np.ndarray, sample_rate: float, how: Speaking, seed: int) -> np.ndarray:
    """What a synthesiser said, as a clip: silence trimmed to `lead_s`, resampled, then room, band, noise and loudness
    as `how` says.

    Args:
        audio: (n,) float32.

    Returns:
        (m,) int16 at SAMPLE_RATE.
    """
    # RandomState: its numbers are the same in every version of NumPy
    random_state = np.random.RandomState(seed)
    audible = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())  # -40 dB
    lead = round(how.lead_s * sample_rate)
    audio = np.pad(audio, lead)[audible[0] : audible[-1] + 2 * lead]  # index i of audio is i + lead when padded
    audio = soxr.resample(audio, sample_rate, SAMPLE_RATE)
    if how.reverberation_s is not None:
        impulse_response = echo(how.reverberation_s, how.direct_to_echo_db, random_state)
        audio = scipy.signal.fftconvolve(audio, impulse_response)[: len(audio)]
    if how.band is not None:
        audio = limit_band(audio, *how.band)
    audio = audio * (PEAK * 10 ** (how.gain_db / 20) / np.abs(audio).max())
    if how.snr_db is not None:
        noise = random_state.standard_normal(len(audio) + how.noise_smoothing - 1)
        noise = np.convolve(noise, np.ones(how.noise_smoothing), mode="valid")
        audio = audio + noise * np.sqrt(np.mean(audio**2) / np.mean(noise**2)) * 10 ** (-how.snr_db / 20)
    return np.rint(np.clip(audio, -1.0, 1.0) * 32767).astype(np.int16)


def make_clips(name: str, seed: int, texts: list[str], start: int, stop: int) -> Iterator[tuple[bytes, dict]]:
    """Clips `start` to `stop` - 1 of a collection, each as (contents of a wav file, {"text", "voice", "speaker",
    "answer", "question"}).

    ``answer`` answers the text, and ``question`` is a JSON list of questions that the text answers; each is "" if there
    is none.

    Must run in a process that has not loaded espeak-ng before, from the beginning of a group: `start` is a multiple of
    GROUP, and `stop` at most one group later.

    Args:
        texts: the sentences of the whole collection.
    """
    loaded: dict[str, Synthesiser] = {}
    for index in range(start, stop):
        how = speaking(name, seed, index)
        family = how.voice.partition("/")[0]
        if family not in loaded:
            loaded[family] = FAMILIES[family]()
        noise_seed = random.Random(f"noise {name} {seed} {index}").getrandbits(31)
        clip = finish(*say(loaded[family], texts[index], how, noise_seed), how, noise_seed)
        file = io.BytesIO()
        soundfile.write(file, clip, SAMPLE_RATE, subtype="PCM_16", format="WAV")
        questions = facts.QUESTIONS.get(texts[index])
        row = {
            "text": texts[index],
            "voice": how.voice,
            "speaker": speaker(name, index),
            "answer": facts.ANSWERS.get(texts[index], ""),
        }
        yield file.getvalue(), row | {"question": json.dumps(questions) if questions else ""}
