"""A text to speak is spoken sentence by sentence, however long it is, and no further than the bound."""

import random

import numpy as np
import pytest
import soundfile
import torch
from stages import SMALL_CODEC, SMALL_TALKER

import infer_chat
from omni.chat.speech import MAX_SPOKEN_BYTES, PAUSE_S, UTTERANCE_BYTES, finished_sentences, sentences, speak
from omni.common.errors import UserError
from omni.models.codec import Codec
from omni.models.speaker import Speaker
from omni.models.speech_architectures import CodecArchitecture, TalkerArchitecture
from omni.models.talker import Talker


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    torch.manual_seed(5)
    sizes = {key: value for key, value in SMALL_TALKER.items() if key in TalkerArchitecture.model_fields}
    talker = Talker(TalkerArchitecture(**sizes)).eval()
    for parameter in talker.parameters():  # so that what it says depends on the text
        parameter.data += torch.randn_like(parameter)
    speaker = Speaker(talker, Codec(CodecArchitecture(**SMALL_CODEC)).eval())
    speaker.max_frames = 5
    return speaker


@pytest.fixture
def say(speaker, monkeypatch, tmp_path):
    monkeypatch.setattr(infer_chat, "load_speaker", lambda *_: (speaker, "small"))

    def run(text: str) -> np.ndarray:
        path = tmp_path / "said.wav"
        infer_chat.main(
            ["--ckpt_dir", "-", "--say", text, "--audio_out", str(path), "--temperature", "1", "--seed", "3"]
        )
        return soundfile.read(path, dtype="int16")[0]

    return run


def test_forty_sentences_are_the_sound_of_each_with_pauses_between(say):
    texts = [f"{chr(65 + n % 26)}{chr(97 + n % 24)} is{' very' * (n % 3)} red{'.!?'[n % 3]}" for n in range(40)]
    alone = {text: say(text) for text in texts}
    pause = np.zeros(round(PAUSE_S * 16_000), np.int16)
    expected = np.concatenate([part for text in texts for part in (pause, alone[text])][1:])
    assert len({sound.tobytes() for sound in alone.values()}) > 5, "they do not all sound alike"
    assert np.array_equal(say(" ".join(texts)), expected)


def test_a_text_that_is_too_long_is_one_line_before_anything_is_loaded(say, speaker):
    for text in ("word " * MAX_SPOKEN_BYTES, "x" * (MAX_SPOKEN_BYTES + 1), "One. " * MAX_SPOKEN_BYTES):
        with pytest.raises(UserError, match=r"--say: expected a text of 1 to 32,768 bytes"):
            infer_chat.parse_args(["--ckpt_dir", "-", "--say", text, "--audio_out", "a.wav"])
    with pytest.raises(UserError, match="--say: expected words, found"):
        infer_chat.parse_args(["--ckpt_dir", "-", "--say", "… 🙂!", "--audio_out", "a.wav"])
        with pytest.raises(UserError, match="the answer: .* bytes are too long to be spoken, expected at most 32,768"):
            for piece in speak(speaker, [text], "the answer", on_cut=print):
                assert piece in (text, ""), "nothing of it is spoken"


@pytest.mark.parametrize("seed", range(30))
def test_any_text_falls_into_pieces_that_are_not_too_long(seed):
    """Of words, commas, line breaks and letters of any width: all of it is spoken, in order, and no word is cut."""
    rng = random.Random(seed)
    words = ["a", "seven", "forty-two,", "grün", "да;", "end.", "Is it?", '"Yes!"', "\n", "…", "1.5", "  ", "x" * 90]
    text = " ".join(rng.choices(words, weights=[rng.random() ** 3 for _ in words], k=rng.choice((3, 60, 900))))
    pieces = sentences(text)
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.choice((0, 9, 300))))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    known, before = [], ""
    for part, finished in finished_sentences(iter(parts)):
        known += finished
        assert part == "" or len(known) == max(0, len(sentences(before)) - 1), "at once, when another follows"
        before += part
    assert known == pieces and before == text, "the same, however the text comes"
    assert " ".join(" ".join(pieces).split()) == " ".join(text.split())
    assert all(piece == piece.strip() and 0 < len(piece.encode()) <= UTTERANCE_BYTES for piece in pieces)
    at = 0
    for piece in pieces:
        at = text.index(piece, at) + len(piece)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" One. Two?  Three 1.5 four!\nfive ", ["One.", "Two?", "Three 1.5 four!", "five"]),
        ('He said "Go." Then he left.', ['He said "Go."', "Then he left."]),
        ("你好。你是谁？我，", ["你好。", "你是谁？", "我，"]),
        ("", []), (" \n ", []),
        ("да" * 100, ["да" * 60, "да" * 40]),
        ("ab " * 60 + ", cd " + "ef " * 40, [("ab " * 60 + ",").strip(), ("cd " + "ef " * 40).strip()]),
    ],
)  # fmt: skip
def test_where_a_text_is_cut(text, expected):
    assert sentences(text) == expected


def test_a_number_is_said_as_its_words_by_a_talker_that_learnt_to(say, speaker, monkeypatch):
    digit, word = say("3 books."), say("three books.")
    assert not np.array_equal(digit, word)
    monkeypatch.setattr(speaker, "text_language", "en")
    assert np.array_equal(say("3 books."), word) and np.array_equal(say("three books."), word)
