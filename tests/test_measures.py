"""Measures of stage E's answers: hand-computed examples, bounds, and scores that no batch and no process changes."""

import json
import math
import random
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stages import OMNI, WORDS, write_csv
from test_sft import prepared, small_config, small_model

from omni.common.errors import UserError
from omni.data.order import ResumableDataset
from omni.models.answering import answer_nats
from omni.stages.tasks import TASKS
from omni.stages.tasks.cider import DocumentFrequencies, cider_d
from omni.stages.tasks.measures import MEASURES, Points, References, rank_among_64
from omni.stages.tasks.mixture import AnswerScore, EvalItems, tell_held_out
from omni.stages.tasks.vqa import agreement, normalise
from omni.train.evaluation import add
from omni.train.optim import build_adamw

# ---------------------------------------------------------------------------------------------------------------
# The table


TREES = ["trees", "grass", "forest", "brush", "leafs", "trees", "plants", "grass", "trees", "brush"]


@pytest.mark.parametrize(
    ("measure", "answer", "accepted", "score"),
    [
        ("exact", "A red cat!", ["a dog", "a red  CAT"], 1),
        ("exact", "red cat", ["a red cat"], 0),
        ("one_minus_wer", "The cat sat down", ["the cat sat on a mat"], 1 - 3 / 6),  # one other word, two missing
        ("one_minus_wer", "THE CAT, sat", ["The cat sat."], 1),
        ("one_minus_wer", "a b c d e", ["x y"], 0),  # five errors of two words
        ("one_minus_wer", "", ["the cat"], 0),
        ("one_minus_wer", "one two", ["three four five", "one two three"], 2 / 3),
        ("one_minus_cer", "STOP hare", ["STOP here"], 1 - 1 / 9),
        ("one_minus_cer", "stop here", ["STOP here"], 1 - 4 / 9),
        ("one_minus_cer", "", ["EXIT"], 0),
        ("vqa_accuracy", "Trees.", TREES, 0.9),
        ("vqa_accuracy", "grass", TREES, 0.6),
        ("vqa_accuracy", "plants", TREES, 0.3),
        ("vqa_accuracy", "sky", TREES, 0),
        ("vqa_accuracy", "2", ["two"] * 4 + ["three"] * 6, 1),
        ("vqa_accuracy", "the cat", ["cat"], 1),
        ("vqa_accuracy", "a dog", ["cat"], 0),
    ],
)
def test_examples_computed_by_hand(measure, answer, accepted, score):
    """That of the trees is of VQA v2: three of ten people gave the answer, which has an accuracy of 90 %."""
    assert MEASURES[measure].points(answer, accepted).score == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The 1,000 cats.", "1000 cats"),
        ("None", "0"),
        ("ten o'clock", "10 o'clock"),
        ("dont", "don't"),
        ("3.5 miles", "3.5 miles"),
        ("U.S.", "us"),
        ("girl's", "girl's"),
        ("t-shirt/jeans", "t shirt jeans"),
        ("10:30", "10:30"),
        ("yes, no", "yes no"),
        ("its well were id", "its well were id"),
    ],
)
def test_answers_are_normalised_as_the_page_of_vqa_says(answer, normal):
    assert normalise(answer) == normal


def test_agreement_rises_with_the_people_who_agree():
    for people in range(1, 13):
        scores = [agreement("yes", ["yes"] * count + ["no"] * (people - count)) for count in range(people + 1)]
        assert scores[0] == 0 and scores[-1] == 1 and scores == sorted(scores)
    assert [round(agreement("a b", ["a b"] * n + ["c"] * (10 - n)), 9) for n in range(5)] == [0, 0.3, 0.6, 0.9, 1]


DOCUMENTS = [
    [text.split() for text in texts]
    for texts in (
        ["a man rides a wave", "a surfer on a big wave"],
        ["a dog runs on the beach"],
        ["two men play chess"],
    )
]


def test_cider_is_that_of_the_published_code():
    """The expected values are what pycocoevalcap 1.2 computes for these captions."""
    frequencies = DocumentFrequencies(DOCUMENTS)
    captions = ["a man on a wave", "a dog on the beach", "two men play chess"]
    found = [cider_d(text.split(), own, frequencies) for text, own in zip(captions, DOCUMENTS, strict=True)]
    assert found == pytest.approx([2.592174008491319, 4.523426415415522, 10.0], rel=1e-12)


def test_cider_computed_by_hand():
    """Of three documents, "dog" and "runs" are in one and "a" in two, so they weigh log 3 and log(3/2); pairs log 3."""
    frequencies = DocumentFrequencies([[["a", "dog", "runs"]], [["a", "cat"]], [["two", "birds"]]])
    a, rare = math.log(3 / 2), math.log(3)
    words = (a * a + rare * rare) / (math.hypot(a, rare) * math.hypot(a, rare, rare))
    pairs = rare * rare / (rare * math.hypot(rare, rare))
    shorter = math.exp(-1 / 72)  # by one word
    expected = 10 * shorter * (words + pairs) / 4
    assert cider_d(["a", "dog"], [["a", "dog", "runs"]], frequencies) == pytest.approx(expected)
    # repeating a right word earns nothing
    once, often = (cider_d(text.split(), [["a", "dog", "runs"]], frequencies) for text in ("dog", "dog dog dog"))
    assert often <= once


def test_the_true_answer_has_to_be_likelier_than_all_others():
    assert rank_among_64([1.0, 2.0, 1.5]).score == 1
    assert rank_among_64([1.5, 2.0, 1.4]).score == 0
    assert rank_among_64([1.5, 2.0, 1.5]).score == 0, "a model without an opinion earns nothing"


def test_every_score_is_between_0_and_1():
    rng, frequencies = random.Random(0), DocumentFrequencies(DOCUMENTS)
    words = ["the", "one", "cat", "don't", "…", "", "A.", "3,000", "\u200b", "mat"]
    for _ in range(300):
        answer, *accepted = (" ".join(rng.choices(words, k=rng.randint(1, 7))) for _ in range(rng.randint(2, 11)))
        accepted = [text for text in accepted if text.strip("\u200b ")] or ["cat"]
        for measure in MEASURES.values():
            if measure.needs == "candidates":
                points = measure.points([rng.random() for _ in range(rng.randint(2, 64))])
            else:
                points = measure.points(answer, accepted, *([frequencies] if measure.needs else []))
            assert 0 <= points.score <= 1 and points.possible > 0, (measure.name, answer, accepted)
        assert MEASURES["exact"].points(accepted[0], accepted).score == 1
        assert MEASURES["one_minus_wer"].points(accepted[-1], accepted).score == 1


def test_every_task_names_a_measure_of_the_table_and_the_page_lists_them_all():
    assert all(task.measure in MEASURES for task in TASKS.values())
    page = (Path(__file__).parent.parent / "docs" / "usage.md").read_text()
    for measure in MEASURES.values():
        assert f"| `{measure.name}` | {measure.about} |" in page
    for name, task in TASKS.items():
        assert f"| `{name}` | `{task.measure}`" in page


# ---------------------------------------------------------------------------------------------------------------
# From points to the accuracy


def totals_of(*items: tuple[str, str, Points]) -> dict[str, float]:
    totals = {"nats": 1.0, "targets": 1.0}
    for task, measure, points in items:
        for name, value in (("earned", points.earned), ("possible", points.possible), ("items", 1)):
            key = f"score/{task}/{measure}/{name}"
            totals[key] = totals.get(key, 0.0) + value
    return totals


def test_each_task_counts_once_and_words_count_alike():
    score, wer = AnswerScore(None, 4, {}), MEASURES["one_minus_wer"].points
    twenty = " ".join(map(str, range(20)))
    long, short = wer("a b " + twenty[4:], [twenty]), wer("five cats", ["a"])
    assert (long, short) == (Points(18, 20), Points(-1, 1)), "2 errors in 20 words, 2 in one"
    assert MEASURES["one_minus_cer"].points("sleep", ["slip"]) == Points(2, 4)
    exact = [("text", "exact", Points(value)) for value in (1, 0, 0, 0, 0, 0)]
    transcripts = [("transcription", "one_minus_wer", points) for points in (long, short)]
    metrics = score.metrics(totals_of(*exact, *transcripts))
    assert metrics["accuracy_text"] == pytest.approx(1 / 6)
    assert metrics["accuracy_transcription"] == pytest.approx(1 - 4 / 21), "all errors by all words"
    assert metrics["accuracy"] == pytest.approx((1 / 6 + 17 / 21) / 2)
    assert score.metrics(totals_of(("sign", "one_minus_cer", Points(-9, 3))))["accuracy"] == 0
    # rows of two measures: three exact ones with 2 right, and one of 20 words with 18 right
    mixed = [("spoken_answer", "exact", Points(value)) for value in (1, 1, 0)]
    mixed.append(("spoken_answer", "one_minus_wer", long))
    assert score.metrics(totals_of(*mixed))["accuracy"] == pytest.approx((3 * 2 / 3 + 18 / 20) / 4)


# ---------------------------------------------------------------------------------------------------------------
# Likelihoods of answers


def test_the_likelihood_of_each_answer_is_that_of_its_own_sequence(tmp_path):
    OMNI.make_data(tmp_path)
    model, processor, _ = small_model(tmp_path)
    thinker, tokenizer = model.thinker, processor.tokenizer
    rng = random.Random(1)
    prompt = tokenizer.encode("red cat near", allow_special=False)
    answers = [
        [*tokenizer.encode(" ".join(rng.choices(WORDS, k=rng.randint(1, 9))), allow_special=False), tokenizer.end_id]
        for _ in range(37)
    ]
    with torch.no_grad():
        found = answer_nats(thinker, thinker.embed_tokens(torch.tensor(prompt)), answers)
        for ids, nats in zip(answers, found, strict=True):
            logits = thinker(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]
            assert nats == pytest.approx(F.cross_entropy(logits, torch.tensor(ids)).item(), rel=1e-4)
        # an answer may end beyond the context: what fits counts
        long = [answers[0][0]] * 200
        (cut,) = answer_nats(thinker, thinker.embed_tokens(torch.tensor(prompt)), [long])
        assert math.isfinite(cut)
        full = torch.tensor([[tokenizer.end_id] * thinker.architecture.ctx_len])
        (one,) = answer_nats(thinker, thinker.embed_tokens(full[0]), [long])
        assert one == pytest.approx(F.cross_entropy(thinker(full)[0, -1:], torch.tensor(long[:1])).item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Rows


def write_pictures(folder: Path, rows: list[dict]) -> str:
    (folder / "seen.json").write_text(json.dumps(rows))
    return str(folder / "seen.json")


def captioned(folder: Path, **keys) -> tuple:
    """18 pictures, each in two rows with one caption; several pictures have the same captions."""
    OMNI.make_data(folder)
    rng = random.Random(2)
    rows = [{"image": f"{i}.png", "caption": " ".join(rng.choices(WORDS[:5], k=2))} for i in range(18) for _ in "ab"]
    path = write_pictures(folder, rows)
    keys = {"val_image_manifest": path, "image_root": None, "val_split": 0.0} | keys
    return rows, prepared(small_config(folder, image_manifest=path, **keys))


def test_other_captions_are_of_other_pictures_and_always_the_same(tmp_path):
    rows, (_, val_tasks, _, processor) = captioned(tmp_path)
    task, sets = val_tasks["caption"], []
    for row in range(len(task)):
        _, references = task.sample(row, 0, {})
        own = [other["caption"] for other in rows if other["image"] == rows[row]["image"]]
        assert references.measures == ("rank_among_64", "cider")
        assert references.accepted[0] == rows[row]["caption"] and set(references.accepted) == set(own)
        true, *others = task.candidates(row, references)
        assert true == rows[row]["caption"]
        assert len(set(others)) == len(others) > 3 and set(others).isdisjoint(own)
        assert set(others) == {row["caption"] for row in rows} - set(own), "each once, up to 63"
        sets.append(tuple(others))
    _, (_, again, _, _) = captioned(tmp_path)
    assert [again["caption"].candidates(row, again["caption"].sample(row, 0, {})[1])[1:] for row in range(5)] == [
        *sets[:5]
    ]


def test_there_are_at_most_64_candidates(tmp_path):
    OMNI.make_data(tmp_path)
    rows = [{"image": f"{i % 18}.png", "caption": f"cat {i}"} for i in range(200)]
    path = write_pictures(tmp_path, rows)
    _, val_tasks, _, _ = prepared(
        small_config(tmp_path, image_manifest=path, val_image_manifest=path, image_root=None, val_split=0.0)
    )
    task = val_tasks["caption"]
    _, references = task.sample(7, 0, {})
    candidates = task.candidates(7, references)
    assert len(candidates) == len(set(candidates)) == 64 and len(references.accepted) >= 11
    others = task.candidates(8, task.sample(8, 0, {})[1])
    assert len({*candidates[1:]} & {*others[1:]}) < 40, "of 63, drawn anew for each row"


def scores_of(model, tasks, processor, batch_size: int, rank: int = 0, world: int = 1) -> dict[str, float]:
    items, totals = EvalItems(tasks, processor, 7), {}
    score = AnswerScore(processor, 6, tasks)
    dataset = ResumableDataset(items, seed=0, batch_size=batch_size, rank=rank, world=world, shuffle=False)
    with torch.no_grad():
        for batch in dataset:
            if batch["n_targets"]:
                add(totals, score.sums(model, batch))
    return totals


def test_scores_are_the_same_in_any_batches_and_processes(tmp_path):
    data = OMNI.make_data(tmp_path)
    write_csv(tmp_path / "ocr.csv", [{"image": f"{i}.png", "text": f"stop {i}"} for i in range(4)])
    talks = [{"messages": [{"role": "user", "content": f"cat {i}"}, {"role": "assistant", "content": f"dog {i}"}]}
             for i in range(9)]  # fmt: skip
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, talks)))
    files = {key: data[key] for key in ("text_path", "asr_csv", "speech_csv")}
    files |= {"ocr_csv": str(tmp_path / "ocr.csv"), "jsonl_path": str(tmp_path / "talk.jsonl")}
    keys = files | {f"val_{key}": path for key, path in files.items()}
    _, (_, val_tasks, _, _) = captioned(tmp_path, **keys)
    model, processor, _ = small_model(tmp_path)
    whole = scores_of(model, val_tasks, processor, 64)
    metrics = AnswerScore(processor, 6, val_tasks).metrics(whole)
    names = {name.removeprefix("accuracy_") for name in metrics if name.startswith("accuracy_")}
    assert names == {"text", "caption", "transcription", "sign", "spoken_answer", "conversation"}
    assert all(0 <= metrics[f"accuracy_{name}"] <= 1 for name in names) and 0 <= metrics["cider_caption"] <= 1
    assert metrics["accuracy"] == pytest.approx(np.mean([metrics[f"accuracy_{name}"] for name in names]))
    assert metrics["chance_conversation"] == pytest.approx(1 / 9), "each answer is ranked among nine"
    assert {name for name in metrics if name.startswith("chance_")} == {"chance_conversation", "chance_caption"}
    among_64 = whole | {"chance/conversation/earned": 7 / 64, "chance/conversation/possible": 7.0}
    assert "chance_conversation" not in AnswerScore(processor, 6, val_tasks).metrics(among_64)
    scores = {key: value for key, value in whole.items() if key.startswith(("score/", "reported/", "chance/"))}
    assert scores["score/caption/rank_among_64/items"] == 7 == scores["reported/caption/cider/items"]
    for size, world in ((1, 1), (3, 1), (2, 3)):
        parts = [scores_of(model, val_tasks, processor, size, rank, world) for rank in range(world)]
        for key, value in scores.items():
            assert sum(part.get(key, 0.0) for part in parts) == pytest.approx(value), (key, size, world)


def test_a_model_that_knows_the_captions_ranks_them_first(tmp_path):
    """An output that depends on the picture: after some steps on the held-out captions the score is near 1."""
    OMNI.make_data(tmp_path)
    rows = [{"image": f"{i}.png", "caption": f"{WORDS[i]} {WORDS[i + 1]}"} for i in range(6)]
    path = write_pictures(tmp_path, rows)
    keys = {"image_manifest": path, "val_image_manifest": path, "image_root": None, "val_split": 0.0}
    _, val_tasks, _, _ = prepared(small_config(tmp_path, **keys))
    model, processor, _ = small_model(tmp_path)
    tasks = {"caption": val_tasks["caption"]}
    batch = EvalItems(tasks, processor, 6).batch(np.arange(6), 0)
    optimizer = build_adamw(model.train(), lr=1e-2, wd=0.0)
    for _ in range(150):
        loss, *_ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    totals = scores_of(model, tasks, processor, 6)
    metrics = AnswerScore(processor, 6, tasks).metrics(totals)
    assert metrics["accuracy_caption"] >= 5 / 6 and metrics["cider_caption"] > 0.4
    # without the right picture they are not
    wrong = {key: value for key, value in batch.items()}
    wrong["images"] = batch["images"].roll(1, dims=0)
    with torch.no_grad():
        sums = AnswerScore(processor, 6, tasks).sums(model, wrong)
    assert sums["score/caption/rank_among_64/earned"] <= 2


TEN = ["red", "red", "red", "dark red", "red", "maroon", "red", "red", "crimson", "red"]


def test_pictures_need_a_caption_only_to_be_described(tmp_path, capsys):
    """Rows with a caption, questions, both, or neither; with one answer or those of ten people."""
    OMNI.make_data(tmp_path)
    rows = [
        {"image": "0.png", "caption": "a cat"},
        {"image": "1.png", "questions": [["What colour?", "red", TEN]]},
        {"image": "2.png", "caption": "a dog", "questions": [["What is it?", "dog"]]},
        {"image": "3.png"},
        {"image": "4.png", "captions": ["a bird", "a big bird"]},
        {"image": "5.png", "caption": 5},
        {"image": "6.png", "questions": [["What?", "red", "red"]]},
    ]
    path = write_pictures(tmp_path, rows)
    keys = {"image_manifest": path, "val_image_manifest": path, "image_root": None, "val_split": 0.0}
    tasks, val_tasks, _, processor = prepared(small_config(tmp_path, **keys))
    printed = capsys.readouterr().out
    # rows with nothing for any task stay, and are named when they are read
    assert tasks["caption"].row_numbers.tolist() == [0, 2, 3, 4, 5, 6]
    assert tasks["image_question"].row_numbers.tolist() == [1, 2]
    assert f"{path}: 7 rows = 7 to train on + 0 held out + 0 left out\n" in printed
    ten, one = (val_tasks["image_question"].sample(row, 0, {})[1] for row in (0, 1))
    assert ten == References(tuple(TEN), ("vqa_accuracy",)) and one == References(("dog",), ("exact",))
    drawn = {tasks["caption"].messages(rows[4], np.random.default_rng(seed))[-1]["content"] for seed in range(9)}
    assert drawn == {"a bird", "a big bird"}
    assert val_tasks["caption"].sample(3, 0, {})[1].accepted[0] == "a bird"
    bad: dict[str, str] = {}
    for row in range(6):
        val_tasks["caption"].sample(row, 0, bad)
    assert [where.rpartition(" ")[2] for where in bad] == ["4", "6", "7"]
    for why, expected in zip(
        bad.values(), ('"questions", found none', 'in "caption", found 5', "[answers]]"), strict=True
    ):
        assert expected in why


def test_a_question_that_is_asked_aloud_keeps_the_answers_of_its_ten_people(tmp_path):
    """As public data are prepared: recordings of written questions, without the column ``answer``."""
    OMNI.make_data(tmp_path)
    questions = [["What colour?", "red", TEN], ["What is it?", "dog", ["dog"] * 10]]
    rows = [{"image": f"{i}.png", "caption": "a dog", "questions": questions} for i in range(3)]
    write_csv(tmp_path / "asked.csv", [{"wav": "0.wav", "text": "What colour?", "voice": "x"}])
    path, asked = write_pictures(tmp_path, rows), str(tmp_path / "asked.csv")
    keys = {"image_manifest": path, "image_root": None, "question_csv": asked, "val_split": 0.0}
    tasks, *_ = prepared(small_config(tmp_path, **keys))
    assert "spoken_question" not in tasks
    task = tasks["spoken_image_question"]
    encoded, references = task.read(task.manifest[0], None)
    assert references == References(tuple(TEN), ("vqa_accuracy",)) and len(encoded.recordings) == 1
    last = task.messages(rows[0], np.random.default_rng(0))[-1]
    assert last["content"] in ("red", "dog"), "the most common answer is learnt"
    lines = []
    tell_held_out({"spoken_image_question": task, "caption": tasks["caption"]}, lines.append)
    assert len(lines) == 1 and "1 different questions for 3 rows; 100% are " in lines[0] and "What colour?" in lines[0]


def test_a_file_that_no_task_uses_is_accounted_for(tmp_path, capsys):
    OMNI.make_data(tmp_path)
    path = write_pictures(tmp_path, [{"image": "0.png", "caption": "a cat"}])
    keys = {"image_manifest": path, "val_image_manifest": path, "image_root": None, "val_split": 0.0}
    weights = dict.fromkeys(TASKS, 0.0) | {"text": 1.0, "image_question": 1.0}
    prepared(small_config(tmp_path, **keys, task_weights=weights))
    line = f"{path}: 1 rows = 0 to train on + 0 held out + 1 left out (1 of no use to a task)\n"
    assert line in capsys.readouterr().out
    with pytest.raises(UserError, match="the mix has no row to train on"):
        prepared(small_config(tmp_path, **keys, task_weights=weights | {"text": 0.0}))


def test_right_answers_in_the_data_are_judged_exactly(tmp_path):
    OMNI.make_data(tmp_path)
    talk = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
    rows = [{"messages": talk}, {"messages": talk, "accepted_answers": ["I", "it is me"]}]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_csv(tmp_path / "asked.csv", [{"wav": "0.wav", "text": "who", "answer": "me", "accepted_answers": '["I"]'}])
    files = {"jsonl_path": str(tmp_path / "talk.jsonl"), "question_csv": str(tmp_path / "asked.csv")}
    said = [{"wav": "said/0.wav", "text": "red cat", "question": ""}]
    write_csv(tmp_path / "said.csv", said)
    files["speech_csv"] = str(tmp_path / "said.csv")
    tasks, *_ = prepared(small_config(tmp_path, **files, val_split=0.0))
    free, listed = (tasks["conversation"].sample(row, 0, {})[1] for row in (0, 1))
    assert free == References(("me",), ("rank_among_64",))
    assert listed == References(("me", "I", "it is me"), ("exact",))
    assert tasks["spoken_question"].sample(0, 0, {})[1] == References(("me", "I"), ("exact",))
    assert tasks["spoken_answer"].sample(0, 0, {})[1] == References(("red cat",), ("exact",))


def test_a_task_without_a_rank_says_so():
    def task(measure, rows):
        made = MagicMock(measure=measure, row_numbers=np.arange(rows))
        made.__len__.return_value = rows
        made.questions.return_value = []
        return made

    lines, tasks = [], {"caption": ("rank_among_64", 1), "text": ("exact", 1), "conversation": ("rank_among_64", 2)}
    tell_held_out({name: task(*facts) for name, facts in tasks.items()}, lines.append)
    assert len(lines) == 1 and "task caption: 1 held-out row" in lines[0] and "no accuracy" in lines[0]
