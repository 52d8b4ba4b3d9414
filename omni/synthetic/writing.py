"""Lines of the text corpus, and sentences to be read aloud."""

import random
import re

from omni.synthetic.facts import SMALL_TALK, fact, small_talk
from omni.synthetic.holdout import HELD_OUT, draw
from omni.synthetic.scenes import caption, describe, questions, sample_scene
from omni.synthetic.stories import Story, sample_story

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SYSTEM_PROMPT = "You are μOmni, a small and friendly assistant."


def chat(turns: list[tuple[str, str]], system: str = "") -> str:
    """(user, assistant) turns as one line in the chat format."""
    return (SYSTEM + system if system else "") + "".join(f"{USER}{u}{ASSISTANT}{s}{END}" for u, s in turns)


def _casual(question: str, rng: random.Random) -> str:
    """The question, sometimes without capitals and final mark, as in haste or from a speech recogniser."""
    return question.rstrip(".?!").lower() if rng.random() < 0.15 else question


def _dialogue(context: str, pairs: list[tuple[str, str]], rng: random.Random) -> str:
    """`context`, then two to eight different questions about it, whose answers follow from it."""
    chosen = list(dict.fromkeys(rng.sample(pairs, min(len(pairs), rng.randint(2, 8)))))
    turns = [(_casual(question, rng), answer) for question, answer in chosen]
    turns[0] = (f"{context} {turns[0][0]}", turns[0][1])
    return chat(turns, SYSTEM_PROMPT if rng.random() < 0.05 else "")


def _everyday(rng: random.Random) -> str:
    """A short conversation without context."""
    turns = []
    if rng.random() < 0.3:
        said, answer = rng.choice(SMALL_TALK[:4])  # the greetings
        turns.append((rng.choice(said.split("|")), answer))
    for _ in range(rng.randint(1, 3)):
        turns.append(fact(rng) if rng.random() < 0.6 else small_talk(rng))
    if rng.random() < 0.1:
        turns.append(("Tell me a story.", " ".join(draw(sample_story, rng, unseen=False).sentences)))
    turns = list(dict.fromkeys(turns))
    return chat([(_casual(u, rng), s) for u, s in turns], SYSTEM_PROMPT if rng.random() < 0.1 else "")


def text_line(rng: random.Random, unseen: bool = False) -> str:
    """One line of the text corpus: running text or, three times in four, a dialogue.

    A held-out line (`unseen`) always contains a held-out combination, a training line never does.
    """
    kinds = ("caption", "describe", "story", "scene chat", "story chat", "facts", "everyday")
    weights = (5, 5, 5, 25, 20, 0 if unseen else 12, 0 if unseen else 28)  # facts have no combinations to hold out
    kind = rng.choices(kinds, weights)[0]
    if kind == "facts":
        return " ".join(dict.fromkeys(fact(rng)[1] for _ in range(rng.randint(2, 5))))
    if kind == "everyday":
        return _everyday(rng)
    if kind in ("story", "story chat"):
        story = draw(sample_story, rng, unseen)
        told = " ".join(story.sentences)
        return told if kind == "story" else _dialogue(told, list(story.questions), rng)
    scene = draw(sample_scene, rng, unseen)
    told = describe(scene, rng) if kind == "describe" or rng.random() < 0.4 else caption(scene, rng)
    return _dialogue(told, questions(scene, rng), rng) if kind == "scene chat" else told


def spoken(rng: random.Random, unseen: bool = False, min_words: int = 5, max_words: int = 10) -> str:
    """A sentence to be read aloud: only letters, spaces and , . ? !, numbers as words.

    Training sentences are captions, first sentences of stories, facts, and questions and answers about all of these.
    A held-out one (`unseen`) contains a held-out combination, so it is a caption or the first sentence of a story.
    """
    while True:
        # facts are drawn more often, since most words occur only there
        kinds = ("scene", "story") if unseen else ("scene", "story", "ask scene", "ask story", *["fact"] * 3)
        kind = rng.choice(kinds)
        if kind == "fact":
            text = rng.choice(fact(rng) if rng.random() < 0.8 else small_talk(rng))
        elif kind.endswith("scene"):
            scene = draw(sample_scene, rng, unseen)
            text = caption(scene, rng) if kind == "scene" else rng.choice(rng.choice(questions(scene, rng)))
        else:
            story = draw(sample_story, rng, unseen)
            text = story.sentences[0] if kind == "story" else rng.choice(rng.choice(story.questions))
            if unseen and not _shows(text, story):
                continue
        if min_words <= len(text.split()) <= max_words and re.fullmatch(r"[A-Za-z ,.?!]+", text):
            return text


def picture_question(rng: random.Random, words: range = range(3, 13)) -> str:
    """A question about a picture of the training split, to be read aloud, of that many words."""
    while True:
        text = rng.choice(questions(draw(sample_scene, rng, unseen=False), rng))[0]
        if len(text.split()) in words:
            return text


def _shows(text: str, story: Story) -> bool:
    words = set(re.findall(r"\w+", text))
    return any(words.issuperset(combination) for combination in story.combinations & HELD_OUT)
