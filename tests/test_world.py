"""The small world: its English is true and grammatical, and held-out combinations never occur in training text.

`combinations_in` reads combinations back from the finished lines with patterns of its own. It shares nothing with
the generator but the word lists, so a leak through any template, question or answer shows.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, Process, start, wait_until

from omni.synthetic import facts, holdout, lexicon, scenes, stories, writing

SCRIPT = ROOT / "scripts" / "make_synthetic_datasets.py"

COLOUR = "(?:" + "|".join(lexicon.COLOURS) + ")"
RELATION = "(left of|right of|above|below)"
PHRASE = rf"(?:(?:a|an|the|one|two|three|four|five) )?(?:(?:small|big) )?(?:{COLOUR} )?"
SAYS = r"(?: that says \w+)?"


def lines_of(seed: str, n_lines: int, unseen: bool = False) -> list[str]:
    return [writing.text_line(random.Random(f"{seed} {i}"), unseen) for i in range(n_lines)]


@pytest.fixture(scope="module")
def train() -> list[str]:
    return lines_of("train", 9_000)


@pytest.fixture(scope="module")
def unseen() -> list[str]:
    return lines_of("unseen", 1_000, unseen=True)


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", re.sub(r"<\|\w+\|>", " ", text))


def units_of(text: str) -> list[str]:
    """Sentences, and each question together with the first sentence of its answer."""
    turns = [turn for turn in re.split(r"<\|(?:system|user|end)\|>", text) if turn]
    units = []
    for turn in turns:
        said, _, answer = turn.partition("<|assistant|>")
        sentences = re.split(r"(?<=[.?!]) ", said)
        answers = re.split(r"(?<=[.?!]) ", answer)
        units += sentences + answers + [f"{sentences[-1]} {answers[0]}"]
    return units


def singular(word: str, nouns) -> str | None:
    """The noun of `nouns` that `word` is, in the singular or in the plural."""
    return next((noun for noun in (word, word.removesuffix("s"), word.removesuffix("es")) if noun in nouns), None)


def combinations_in(line: str) -> set[tuple[str, ...]]:
    """Every combination, of the kinds that are held out, that a line shows, asks for or denies."""
    found = set()
    text = line.lower()

    def pair(colour, noun):
        shape = singular(noun, lexicon.SHAPES)
        if shape:
            found.add((colour, shape))

    def relate(one, relation, other):
        one, other = singular(one, lexicon.SHAPES), singular(other, lexicon.SHAPES)
        if one and other:
            if relation in ("right of", "below"):
                one, other = other, one
            found.add((one, {"right of": "left of", "below": "above"}.get(relation, relation), other))

    # "purple circles"; "is the circle purple"; "what is purple? the circles"; "what colour are the circles? ..."
    for colour, noun in re.findall(rf"\b({COLOUR}) (\w+)", text):
        pair(colour, noun)
    for noun, colour in re.findall(rf"\b(\w+)(?: is| are)? ({COLOUR})\b", text):
        pair(colour, noun)
    for colour, noun in re.findall(rf"what is ({COLOUR})\??<\|assistant\|>the (\w+)", text):
        pair(colour, noun)
    for noun, colour in re.findall(r"what colour (?:is|are) the (\w+)\??<\|assistant\|>(?:it is|they are) (\w+)", text):
        pair(colour, noun)

    thing = rf"{PHRASE}(\w+){SAYS}"
    for match in re.findall(rf"(\w+){SAYS}(?: is| are)? {RELATION} {PHRASE}(\w+)", text):
        relate(*match)
    for noun, relation, other in re.findall(
        rf"where (?:is|are) {thing}\??<\|assistant\|>(?:it is|they are) {RELATION} {PHRASE}(\w+)", text
    ):
        relate(noun, relation, other)
    for relation, other, noun in re.findall(rf"what is {RELATION} {PHRASE}(\w+)\??<\|assistant\|>{thing}", text):
        relate(noun, relation, other)
    # Four groups: rows tell the columns too, and columns the rows.
    for first, across, second in (("at the top", "left of", "at the bottom"), ("on the left", "above", "on the right")):
        along = "above" if across == "left of" else "left of"
        for a, b, c, d in re.findall(
            rf"{first}, {thing} (?:is|are) {across} {thing}\. {second}, {thing} (?:is|are) {across} {thing}", text
        ):
            relate(a, along, c)
            relate(b, along, d)

    for unit in units_of(text):
        words = set(words_of(unit))
        found |= {
            (p, place) for p in lexicon.PEOPLE if p.lower() in words for place in lexicon.PLACES if place in words
        }
        found |= {
            (pet, treat)
            for pet in lexicon.PETS
            if {pet, lexicon.plural(pet)} & words
            for treat in lexicon.TREATS
            if treat in words
        }
    return found


@pytest.mark.parametrize(
    "line, combination",
    [
        ("Two small purple circles are above a big red star.", ("purple", "circle")),
        ("<|user|>A ring. is the circle purple<|assistant|>No, it is red.<|end|>", ("purple", "circle")),
        ("<|user|>What is purple?<|assistant|>The circles.<|end|>", ("purple", "circle")),
        ("<|user|>What colour are the hearts?<|assistant|>They are green.<|end|>", ("green", "heart")),
        ("There are two big red triangles right of a small circle.", ("circle", "left of", "triangle")),
        ("<|user|>Is the pink star left of the square?<|assistant|>Yes, it is.<|end|>", ("star", "left of", "square")),
        ("<|user|>What is below the hearts?<|assistant|>Two big pink rings.<|end|>", ("heart", "above", "ring")),
        ("<|user|>Where is the cross?<|assistant|>It is below the diamonds.<|end|>", ("diamond", "above", "cross")),
        (
            "At the top, a big red heart is left of a small sign that says EGG. "
            "At the bottom, two small rings are left of a big moon.",
            ("heart", "above", "ring"),
        ),
        ("<|user|>is anna in the library now<|assistant|>No, she is in the park.<|end|>", ("Anna", "library")),
        ("Ben has a white mouse that likes soup.", ("mouse", "soup")),
    ],
)
def test_the_reader_of_combinations_can_see_a_leak(line, combination):
    assert combination in combinations_in(line)
    assert combination in holdout.HELD_OUT


def test_training_lines_show_no_held_out_combination(train):
    for line in train:
        assert not combinations_in(line) & holdout.HELD_OUT, line


def test_held_out_lines_all_show_one(unseen):
    for line in unseen:
        assert combinations_in(line) & holdout.HELD_OUT, line


def test_each_held_out_combination_is_tested(unseen):
    shown = set().union(*(combinations_in(line) for line in unseen))
    assert shown >= holdout.HELD_OUT


def test_about_a_tenth_of_scenes_and_stories_is_held_out():
    rng = random.Random(0)
    for sample in (scenes.sample_scene, stories.sample_story):
        share = sum(holdout.held_out(sample(rng)) for _ in range(5_000)) / 5_000
        assert 0.05 < share < 0.12


def test_held_out_words_all_occur_in_training(train, unseen):
    vocabulary = {word.lower() for line in train for word in words_of(line)}
    assert {word.lower() for line in unseen for word in words_of(line)} <= vocabulary
    assert 400 <= len(vocabulary) <= 1200
    assert {word.lower() for word in facts.SIGN_WORDS} <= vocabulary


def test_spoken_sentences(train):
    vocabulary = {word.lower() for line in train for word in words_of(line)}
    for unseen in (False, True):
        for i in range(1_000):
            text = writing.spoken(random.Random(f"{unseen} {i}"), unseen)
            assert re.fullmatch(r"[A-Z][A-Za-z ,.?!]*[.?!]", text), text
            assert 5 <= len(text.split()) <= 10, text
            assert {word.lower() for word in words_of(text)} <= vocabulary, text
            assert bool(combinations_in(text) & holdout.HELD_OUT) == unseen, text


def test_equal_seeds_give_equal_text_and_global_state_is_untouched():
    random.seed(1)
    first = lines_of("same", 200)
    state = random.getstate()
    random.seed(2)
    assert lines_of("same", 200) == first
    assert lines_of("other", 200) != first
    random.seed(1)
    assert random.getstate() == state


# --- answers --------------------------------------------------------------------------------------------------------


def true_answer(scene: scenes.Scene, question: str) -> str | None:
    """What a reader who looks at the scene answers; None for a kind of question that is not checked here."""
    number = ("none", *lexicon.NUMBERS[1:])

    def groups(noun, colour=None):
        shape = singular(noun, [*lexicon.SHAPES, "sign"])
        return [g for g in scene.groups if g.shape == shape and colour in (None, g.colour)]

    def there(found):
        total = sum(g.count for g in found)
        return f"There {'is' if total == 1 else 'are'} {number[total]}."

    if match := re.fullmatch(r"What colour (?:is|are) the (\w+)\?", question):
        (group,) = groups(match[1])
        return f"It is {group.colour}." if group.count == 1 else f"They are {group.colour}."
    if question == "How many shapes are there?":
        return there(scene.groups)
    if match := re.fullmatch(rf"How many (?:({COLOUR}) )?(\w+) are there\?", question):
        return there(groups(match[2], match[1]))
    if match := re.fullmatch(rf"Is there an? (?:({COLOUR}) )?(\w+)\?", question):
        found = groups(match[2], match[1])
        return f"Yes, {there(found).lower()}" if found else "No, there is not."
    if match := re.fullmatch(rf"(?:Is|Are) the (?:({COLOUR}) )?(\w+) big or small\?", question):
        (group,) = groups(match[2], match[1])
        return f"It is {group.size}." if group.count == 1 else f"They are {group.size}."
    if match := re.fullmatch(rf"(?:Is|Are) the (\w+) ({COLOUR})\?", question):
        (group,) = groups(match[1])
        it = "it is" if group.count == 1 else "they are"
        return f"Yes, {it}." if group.colour == match[2] else f"No, {it} {group.colour}."
    if match := re.fullmatch(rf"(?:Is|Are) the (?:({COLOUR}) )?(\w+) {RELATION} the (?:({COLOUR}) )?(\w+)\?", question):
        (one,), (other,) = groups(match[2], match[1]), groups(match[5], match[4])
        (y, x), (v, u) = one.cell, other.cell
        actual = "left of" if x < u else "right of" if x > u else "above" if y < v else "below"
        assert (x == u) != (y == v), "a relation on a diagonal"
        it = "it is" if one.count == 1 else "they are"
        the_other = question.rstrip("?").split(f"{match[3]} ")[1]
        return f"Yes, {it}." if actual == match[3] else f"No, {it} {actual} {the_other}."
    if question == "What does the sign say?":
        (word,) = [g.word for g in scene.groups if g.word]
        return f"It says {word}."
    if match := re.fullmatch(r"Does the sign say (\w+)\?", question):
        (word,) = [g.word for g in scene.groups if g.word]
        return "Yes, it does." if match[1] == word else f"No, it says {word}."
    if match := re.fullmatch(r"Which (?:is|are) (bigger|smaller), (.*) or (.*)\?", question):
        size = {"bigger": "big", "smaller": "small"}[match[1]]
        named = [
            (name, groups(name.split()[-1], name.split()[1] if name.count(" ") == 2 else None))
            for name in match.groups()[1:]
        ]
        (answer,) = [name for name, (group,) in named if group.size == size]
        return answer[0].upper() + answer[1:] + "."
    return None


def test_answers_are_true_of_their_scenes():
    checked = total = 0
    for i in range(2_000):
        rng = random.Random(f"answers {i}")
        scene = scenes.sample_scene(rng)
        asked = scenes.questions(scene, rng)
        assert len(dict(asked)) == len(set(asked)), "a question with two answers"
        for question, answer in asked:
            expected = true_answer(scene, question)
            assert expected in (None, answer), (scene, question, answer)
            checked, total = checked + (expected is not None), total + 1
    assert checked > 0.7 * total


def test_captions_and_descriptions_tell_the_whole_scene():
    for i in range(1_000):
        rng = random.Random(f"caption {i}")
        scene = scenes.sample_scene(rng)
        for text in (scenes.caption(scene, rng), scenes.describe(scene, rng)):
            for group in scene.groups:
                assert group.phrase in text or group.phrase[0].upper() + group.phrase[1:] in text, (text, group)


def test_groups_do_not_overlap_and_differ():
    for i in range(1_000):
        groups = scenes.sample_scene(random.Random(f"overlap {i}")).groups
        assert len({(g.colour, g.shape) for g in groups}) == len(groups)
        assert sum(g.shape == "sign" for g in groups) <= 1
        for one in groups:
            assert (one.shape == "sign") == bool(one.word) and (not one.word or one.count == 1)
            for other in groups:  # a box is two cells wide and high
                apart = max(abs(one.cell[0] - other.cell[0]), abs(one.cell[1] - other.cell[1]))
                assert one is other or apart >= 2


def test_a_fact_has_one_answer():
    pairs = [pair for kind in facts.FACTS.values() for pair in kind]
    said = [(phrase, answer) for phrases, answer in facts.SMALL_TALK for phrase in phrases.split("|")]
    assert len(dict(pairs + said)) == len(set(pairs + said))
    assert ("What is seven plus two?", "Seven plus two is nine.") in pairs
    assert ("What is seven minus five?", "Seven minus five is two.") in pairs


# --- grammar and format ---------------------------------------------------------------------------------------------


def test_grammar(train, unseen):
    plurals = {lexicon.plural(noun) for noun in (*lexicon.SHAPES, *lexicon.GROCERIES, *lexicon.THINGS)}
    for line in train + unseen:
        text = re.sub(r"<\|\w+\|>", " ", line)
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", text), line
        for is_are, number in re.findall(r"\bThere (is|are) (\w+)", text):
            assert (is_are == "is") == (number in ("a", "an", "one")), line
        for number, noun in re.findall(rf"\b(an?|one|two|three|four|five) (?:small |big )(?:{COLOUR} )(\w+)", text):
            assert (number not in ("a", "an", "one")) == (noun in plurals), line
        for noun, be in re.findall(r"\b[Tt]he (\w+) (is|are)\b", text):
            assert noun not in plurals or be == "are", line
        assert not re.search(r"\d|  |\bone (?!is|plus|minus|comes)\w+s\b| [.,?]", line), line


def test_chat_format(train):
    turns = r"(<\|user\|>[^<>]+<\|assistant\|>[^<>]+<\|end\|>)+"
    dialogues = [line for line in train if "<|" in line]
    assert all(re.fullmatch(rf"(<\|system\|>[^<>]+)?{turns}", line) for line in dialogues)
    assert 0.65 < len(dialogues) / len(train) < 0.85
    assert all(line and line == line.strip() and len(line.splitlines()) == 1 for line in train)


# --- the script -----------------------------------------------------------------------------------------------------


def run_script(out: Path, *args) -> Process:
    return start(SCRIPT, "--out", out, *args, cwd=out.parent).wait()


def run_with_hash_seed(seed: str, out: Path, *args) -> subprocess.CompletedProcess:
    """In a Python of its own, in which sets have another order."""
    command, env = [sys.executable, SCRIPT, "--out", out, *map(str, args)], os.environ | {"PYTHONHASHSEED": seed}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)


def snapshot(folder: Path) -> dict:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*.*"))}


def test_script_twice_changes_nothing_and_force_gives_the_same_bytes(tmp_path):
    args = (tmp_path, "--text_samples", 300, "--only", "text")
    assert run_with_hash_seed("1", *args).returncode == 0
    first = snapshot(tmp_path)
    assert set(first) == {"tiny_corpus.txt", "tiny_corpus.val.txt", "tiny_corpus.json"}
    assert first["tiny_corpus.txt"][1].count(b"\n") == 300
    again = run_script(*args)
    assert again.returncode == 0 and "up to date" in again.stdout
    assert snapshot(tmp_path) == first
    assert run_with_hash_seed("2", *args, "--force").returncode == 0
    forced = snapshot(tmp_path)
    assert {name: data for name, (_, data) in forced.items()} == {name: data for name, (_, data) in first.items()}
    assert forced["tiny_corpus.txt"][0] != first["tiny_corpus.txt"][0]


def test_script_repairs_its_own_files_and_spares_those_of_others(tmp_path):
    args = (tmp_path, "--text_samples", 50, "--only", "text")
    corpus = tmp_path / "text" / "tiny_corpus.txt"
    corpus.parent.mkdir()
    corpus.write_text("my own text\n")
    refused = run_script(*args)
    assert refused.returncode == 2 and "--force" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert corpus.read_text() == "my own text\n"
    assert run_script(*args, "--force").returncode == 0
    made = corpus.read_bytes()
    corpus.write_bytes(made[:1000])
    assert run_script(*args).returncode == 0
    assert corpus.read_bytes() == made
    assert run_script(tmp_path, "--text_samples", 20, "--only", "text").returncode == 0
    assert json.loads((tmp_path / "text" / "tiny_corpus.json").read_text())["settings"]["lines"] == 20
    assert made.startswith(corpus.read_bytes())  # a smaller corpus is the beginning of a larger one


def test_interrupted_script_leaves_no_partial_file(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--size", "large"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        growing = tmp_path / "text" / ".tiny_corpus.txt.tmp"
        wait_until(lambda: growing.stat().st_size > 0, "the corpus did not grow", process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 75 and len(errors.splitlines()) == 1
    assert list((tmp_path / "text").iterdir()) == []


def test_bad_arguments_are_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    refused = run_script(tmp_path / "file")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert run_script(tmp_path, "--text_samples", 0).returncode == 2
