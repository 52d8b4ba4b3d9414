"""The synthesisers of the built-in speech: every family speaks as asked, and no sound of a word is dropped."""

import functools
import multiprocessing

import numpy as np
import pytest
import soxr

from omni.common.errors import UserError
from omni.synthetic import speech, synthesisers
from omni.synthetic.synthesisers import FAMILIES, Delivery, Piper

TEXT = "On Friday, Clara went to the market."
VOICES = [*dict.fromkeys(speech.VOICES), *speech.UNSEEN_VOICES]


def voiced_pitch(audio: np.ndarray, sample_rate: int) -> float:
    """Hz: the median of the loudest frames' autocorrelation peaks."""
    audio = soxr.resample(audio, sample_rate, 16_000)
    frames = np.lib.stride_tricks.sliding_window_view(audio, 960)[::160] * np.hanning(960)
    energy = np.mean(frames**2, axis=1)
    pitches = []
    for frame in frames[energy > np.quantile(energy, 0.6)]:
        correlation = np.correlate(frame, frame, "full")[959:]
        pitches.append(16_000 / (40 + np.argmax(correlation[40:250])))
    return float(np.median(pitches))


@functools.cache
def loaded(family: str):
    return FAMILIES[family]()


def said(voice: str, text: str = TEXT, how: Delivery | None = None) -> np.ndarray:
    family, _, name = voice.partition("/")
    return loaded(family).speak(text, name, how or Delivery(), 0)


@pytest.mark.parametrize("voice", VOICES)
def test_every_voice_speaks(voice):
    audio = said(voice)
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert 0.1 < np.abs(audio).max() <= 1.2
    sample_rate = loaded(voice.partition("/")[0]).sample_rate
    assert 1.2 < len(audio) / sample_rate < 4.5
    assert len(said(voice, TEXT + " " + TEXT)) > 1.6 * len(audio), "the second sentence is read too"


@pytest.mark.parametrize("voice", ["espeak/en-us", "hibari/heart", "piper/joe", "pico/en-GB"])
def test_speed_and_pitch_are_as_asked(voice):
    sample_rate = loaded(voice.partition("/")[0]).sample_rate
    slow, fast = (said(voice, how=Delivery(speed=speed)) for speed in (0.8, 1.25))
    assert 1.15 < len(slow) / len(fast) < 1.8
    low, high = loaded(voice.partition("/")[0]).pitches
    lower, higher = (voiced_pitch(said(voice, how=Delivery(pitch=pitch)), sample_rate) for pitch in (low, high))
    assert 0.8 * high / low < higher / lower < 1.25 * high / low


def test_a_voice_that_a_family_has_not_is_named():
    for family in FAMILIES:
        with pytest.raises(RuntimeError, match='no voice "nobody"'):
            loaded(family).speak(TEXT, "nobody", Delivery(), 0)


def test_piper_reads_the_phonemes_and_punctuation_of_whole_sentences():
    sentences = loaded("piper").sentences("Hello, Tom. Is the cat red?")
    assert sentences == ["həlˈoʊ, tˈɑːm.", "ɪz ðə kˈæt ɹˈɛd?"]
    known = loaded("piper").known
    begin, pad, end = (known[mark][0] for mark in "^_$")
    assert loaded("piper").ids("tˈɑ") == [begin, pad, *(x for p in "tˈɑ" for x in (known[p][0], pad)), end]


def test_all_sentences_of_the_world_have_only_phonemes_that_the_voices_know():
    for text in {*speech.sentences("tts", 0, 300), *speech.sentences("asr.val", 0, 300)}:
        for phonemes in loaded("piper").sentences(text):
            loaded("piper").ids(phonemes)
        synthesisers.phoneme_ids(loaded("hibari").g2p(text), loaded("hibari").known)


def test_an_unknown_phoneme_is_an_error_and_never_dropped():
    with pytest.raises(ValueError, match=r"no phoneme 'ж' \(U\+0436\)"):
        loaded("piper").ids("tˈжm")
    with pytest.raises(ValueError, match=r"no phoneme '½'"):
        synthesisers.phoneme_ids("a½", {"a": [1]})


def test_a_voice_file_that_is_another_one_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "voice.onnx"
    path.write_bytes(b"another voice")
    with pytest.raises(UserError, match=r"voice.onnx: its SHA-256 is [0-9a-f]{64}, expected 58afce"):
        synthesisers.load_network(path, Piper.SHA256)


def piper_twice(text: str) -> list[np.ndarray]:
    piper = Piper()
    return [piper.speak(text, "joe", Delivery(), 0) for _ in range(2)]


def test_piper_reads_differently_each_time_but_the_same_in_each_process():
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        (first, second), others = pool.map(piper_twice, [TEXT] * 2, chunksize=1)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, others[0]) and np.array_equal(second, others[1])


@pytest.mark.parametrize("voice", ["hibari/heart", "pico/en-US", "pico/en-GB"])
def test_the_others_read_the_same_whatever_was_read_before(voice):
    texts = speech.sentences("asr.val_voices", 0, 12)
    first = [said(voice, text) for text in texts]
    assert all(np.array_equal(said(voice, text), audio) for text, audio in zip(texts[::-1], first[::-1], strict=True))
