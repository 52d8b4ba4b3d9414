"""Sentences beyond the small world: made of words that can be read, and held-out words that training never says."""

import re
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import pytest
from harness import Process
from lemminflect import getAllLemmas
from test_synthetic_data import ONE_FAMILY
from test_synthetic_data import run_script as run_quickly

from omni.common.errors import UserError
from omni.common.spoken import spoken_form
from omni.synthetic import open_vocabulary, speech
from omni.synthetic.open_vocabulary import held_out_lemmas, held_out_words, sentences_of
from omni.synthetic.vocabulary import vocabulary
from scripts import make_synthetic_datasets

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_synthetic_datasets.py"
TRAINED, OPEN = ("asr", "asr_open", "tts"), ("asr.val_open", "tts.val_open")
OWN = [f"The {'very ' * (n % 4)}quiet river passes house number {one}." for n, one in enumerate("abcdefghij")]


def held_out_in(text: str) -> set[str]:
    """Held-out lemmas of a text's words, found without `held_out_words`."""
    forms = [{word, *sum(getAllLemmas(word).values(), ())} for word in re.findall("[a-z]+", text.lower())]
    return {lemma for found in forms for lemma in found & held_out_lemmas()}


def is_open(text: str) -> bool:
    """Whether a sentence has a word that the small world has not."""
    return bool({*re.findall("[A-Za-z]+", text)} - open_vocabulary.kept_words())


@pytest.mark.parametrize("seed", [0, 7])
def test_no_held_out_word_is_ever_said_in_training_and_each_open_held_out_sentence_has_two(seed):
    own = OWN + [f"We saw the {word} today." for word in held_out_lemmas()]
    for name in TRAINED:
        for text in speech.sentences(name, seed, 3_000, own):
            assert not held_out_in(text), text
    said = set()
    for name in OPEN:
        for text in speech.sentences(name, seed, 300):
            assert len(held_out_in(text)) >= 2, text
            said |= held_out_in(text)
    assert len(said) > 200


def test_a_tenth_of_the_words_is_held_out_whatever_the_seed_and_no_word_that_the_small_world_needs():
    words = vocabulary()
    assert len(words.nouns) > 5_000 and len(words.actions) + len(words.moves) > 850 and len(words.adjectives) > 700
    for some in (words.nouns, [forms[0] for forms in words.actions], words.adjectives):
        assert 0.05 < np.mean([word in held_out_lemmas() for word in some]) < 0.13
    assert not held_out_lemmas() & {"red", "library", "buy", "buys", "sign", "triangle", "dollar", "week"}
    for text in speech.sentences("asr.val", 0, 300):
        assert not held_out_words(text), "sentences of the small world are never left out"


def test_forms_of_a_held_out_word_are_held_out_too():
    forms = next(forms for forms in vocabulary().actions if forms[0] in held_out_lemmas())
    thing, things = next(pair for pair in vocabulary().things if pair[0] in held_out_lemmas())
    for word in (*forms, thing, things, things.upper()):
        assert held_out_words(f"We saw the {word}.") == [word]


def test_as_many_sentences_as_asked_are_beyond_the_small_world():
    for name in TRAINED:
        share = speech.COLLECTIONS[name].open_vocabulary
        assert share - 0.08 < np.mean([is_open(text) for text in speech.sentences(name, 0, 1_000)]) < share + 0.05
    for name in ("asr.val", "asr.val_voices", "tts.val", "tts.val_voices"):
        assert not any(is_open(text) for text in speech.sentences(name, 0, 100))


def test_sentences_are_of_letters_and_few_signs_varied_in_length_and_hardly_repeated():
    texts = speech.sentences("tts.val_open", 0, 300) + [t for t in speech.sentences("asr", 0, 3_000) if is_open(t)]
    for text in texts:
        assert re.fullmatch(r"[A-Z][A-Za-z ,'-]*[.?!]", text) and "  " not in text, text
        assert spoken_form(text) == text
        assert not re.search(r"\ba [aeio]|\ban [^aeiouh]", text.replace("a one", "")), text
        assert 3 <= len(text.split()) <= 14 and len(text) <= 72
    assert {len(text.split()) for text in texts} >= set(range(3, 13))
    assert len(set(texts)) == len(texts)
    assert len({word for text in texts for word in text.lower().split()}) > 3_000


def test_no_offensive_word_is_in_the_vocabulary():
    text = (resources.files("wonderwords") / "assets" / "profanitylist.txt").read_text(encoding="utf-8")
    listed = set(text.split("\n")) - {""}
    assert len(listed) > 900 and not listed & vocabulary().lemmas


# --- the user's own text --------------------------------------------------------------------------------------------


def test_own_sentences_are_spoken_forms_that_fit_and_have_no_held_out_word():
    word = sorted(held_out_lemmas())[0]
    text = (
        f"It cost $3. “He’s here,” she said.\nToo short.\nWir hören zu.\n{'very ' * 20}long line here\nWe saw a {word}."
    )
    usable, total = sentences_of(text + "\nIt cost $3.")
    assert usable == ["It cost three dollars.", "He's here, she said."] and total == 6


def test_few_own_sentences_leave_the_place_to_the_open_vocabulary():
    for name in TRAINED:
        own = [f"The cat sleeps {word}." for word in ("here", "there", "now", "then")]
        shares = [np.mean([is_open(text) for text in speech.sentences(name, 0, 400, given)]) for given in ([], own)]
        assert abs(shares[0] - shares[1]) < 0.05


def test_own_text_is_not_cut_after_titles():
    found, total = sentences_of("He met Mr. Paul at the market. The cat sleeps in the barn.")
    assert total == 2 and found[0] == "He met Mister Paul at the market."


def test_own_sentences_come_once_each_and_only_in_training():
    for name in speech.COLLECTIONS:
        texts = speech.sentences(name, 0, 400, OWN)
        found = [text for text in texts if text in OWN]
        assert len(found) == len(set(found)) and bool(found) == (name in TRAINED)
        assert speech.sentences(name, 0, 150, OWN) == texts[:150]


def run_script(out: Path, *args) -> Process:
    return run_quickly(out, "--size", "smoke", "--only", "audio", *args, prelude=ONE_FAMILY)


def test_a_text_of_the_user_is_read_aloud_and_made_again_when_it_has_changed(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("\n".join(OWN))
    first = run_script(tmp_path / "out", "--speech_text", own)
    assert first.returncode == 0 and "10 of 10 sentences" in first.stdout, first.stderr
    manifest = tmp_path / "out" / "audio" / "tts.csv"
    assert any(text in manifest.read_text() for text in OWN)
    assert "up to date" in run_script(tmp_path / "out", "--speech_text", own).stdout
    own.write_text("Nothing else is said here today.\n12345678901234567890\n")
    assert "1 of 2 sentences" in run_script(tmp_path / "out", "--speech_text", own).stdout
    assert not any(text in manifest.read_text() for text in OWN)
    for content, reason in (("1", "none among its 1"), (None, "cannot read the text")):
        own.write_text(content) if content else own.unlink()
        refused = run_script(tmp_path / "out", "--speech_text", own)
        assert refused.returncode == 2 and reason in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_held_out_sentences_in_the_users_text_are_never_trained_on(tmp_path):
    clips = dict.fromkeys(speech.COLLECTIONS, 200)
    held_out = [text for name in ("asr.val", "tts.val") for text in speech.sentences(name, 0, 200)]
    own = tmp_path / "own.txt"
    own.write_text("\n".join([*OWN, *held_out]))
    settings = {"seed": 0, "clips": clips, "speech_text": {"file": str(own), "sha256": "-"}}
    for made in make_synthetic_datasets.audio_collections(settings):
        texts = made.make.args[2]
        assert len(texts) == 200
        if made.manifest in ("asr.csv", "tts.csv"):
            assert not set(texts) & set(held_out) and set(texts) & set(OWN)


@pytest.mark.parametrize("error", [UserError("a voice file is damaged"), OSError(28, "No space left on device")])
def test_an_error_in_a_group_reaches_the_main_process(error):
    def fail():
        raise error

    with pytest.raises(type(error), match=str(error.args[-1])):
        list(make_synthetic_datasets.in_processes(fail, [()], 1))


def test_the_word_lists_are_of_the_versions_that_are_pinned():
    pins = dict(
        line.split("==") for line in (SCRIPT.parent.parent / "requirements.txt").read_text().split() if "==" in line
    )
    for package in ("wonderwords", "lemminflect", "Faker", "num2words"):
        assert metadata.version(package) == pins[package.lower()]
