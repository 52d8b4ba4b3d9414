"""What is particular to stage A: experts, held-out files, tokenizers, and chatting with the result."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from harness import ROOT, Process, differences, kill_at_step, start
from stages import TEXT
from test_config import only_error


def test_mixture_of_experts_trains_and_resumes_exactly(tmp_path):
    keys = {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_d_ff": 16, "max_steps": 14}
    reference = TEXT.training(tmp_path, save_dir="reference", **keys)
    reference.finish()
    assert {"loss", "cross_entropy", "balance"} <= reference.metrics()[0].keys()
    killed = reference.changed(save_dir="killed")
    assert killed.run(prelude=kill_at_step(9)).returncode == -9
    killed.finish()
    assert differences(killed.state(), reference.state()) == []


def test_a_held_out_file_takes_the_place_of_a_split(tmp_path):
    (tmp_path / "held_out.txt").write_text("one red cat near two blue squares\n" * 20)
    training = TEXT.training(tmp_path, max_steps=4, val_text=str(tmp_path / "held_out.txt"))
    output = training.finish().stdout
    assert "held_out.txt: 20 lines = 0 to train on + 20 held out + 0 blank" in output
    counts = {}
    for meta in tmp_path.glob("*.tokens-*/meta.json"):
        counts[meta.parent.name.split(".tokens")[0]] = json.loads(meta.read_text())
    assert counts["corpus.txt"]["val"]["samples"] == 0, "nothing is taken from the training text"
    assert counts["held_out.txt"]["val"]["samples"] == 20
    assert training.metrics("val")[-1]["step"] == 4


def in_parts(corpus: Path) -> Path:
    """A folder with the lines of a text file as three files, the second of one line."""
    folder, lines = corpus.parent / "parts", corpus.read_text().splitlines(keepends=True)
    folder.mkdir()
    for name, part in (("a.txt", lines[:9]), ("b.txt", lines[9:10]), ("c.txt", lines[10:])):
        (folder / name).write_text("".join(part))
    return folder


def test_several_files_train_as_their_concatenation_also_after_a_kill(tmp_path):
    held_out = tmp_path / "val.txt"
    held_out.write_text("one red cat near two blue squares\nthree dogs\n" * 10)
    reference = TEXT.training(tmp_path, save_dir="reference", max_steps=14, val_text=str(held_out))
    reference.finish()
    folder = in_parts(Path(reference.config["train_text"]))
    (tmp_path / "val a.txt").write_text("one red cat near two blue squares\nthree dogs\n" * 3)
    (tmp_path / "val b.txt").write_text("one red cat near two blue squares\nthree dogs\n" * 7)
    for save_dir, named in (("pattern", str(folder / "*")), ("list", [str(folder / f"{one}.txt") for one in "abc"])):
        keys = {"train_text": named, "val_text": str(tmp_path / "val ?.txt"), "save_dir": save_dir}
        training = reference.changed(**keys)
        assert training.run(prelude=kill_at_step(9)).returncode == -9
        output = training.changed(num_workers=2).finish().stdout
        assert "a.txt and 2 more: 24 lines = 24 to train on" in output
        for name in ("metrics", "validations"):
            assert training.state()[name] == reference.state()[name]
        assert differences(training.state()["newest"]["phases"], reference.state()["newest"]["phases"]) == []
    stdout = replace(training, script="scripts/check_data.py").finish(arguments=("--steps", "1")).stdout
    assert "a.txt and 2 more: 24 lines = 24 to train on" in stdout
    other_order = training.changed(train_text=[str(folder / f"{one}.txt") for one in "bac"], max_steps=20)
    only_error(other_order.run(), "another training: data (train)")


@pytest.mark.parametrize(
    ("name", "fragments"),
    {
        "absent.txt": ("absent.txt", "expected a file, found none"),
        "*.csv": ("*.csv", "expected a file, found none"),
        "": ("expected a file, found an empty name",),
        ".": ("expected a text file, found a folder", '/*.txt"'),
        "b.txt": ("b.txt: named twice",),
    }.items(),
)
@pytest.mark.parametrize("key", ["train_text", "val_text"])
def test_names_of_texts_that_cannot_be_used_are_one_line(tmp_path, key, name, fragments):
    training = TEXT.training(tmp_path)
    folder = in_parts(Path(training.config["train_text"]))
    training.config[key] = [str(folder / "b.txt"), name and str(folder / name)]
    only_error(training.run(), f'key "{key}"', *fragments)
    assert not training.save_dir.exists()


def test_one_of_several_texts_that_cannot_be_used_is_named(tmp_path):
    training = TEXT.training(tmp_path)
    folder = in_parts(Path(training.config["train_text"]))
    training.config["train_text"] = str(folder / "*.txt")
    (folder / "d.txt").write_text("\n \n")
    only_error(training.run(), "d.txt: expected lines of text, found none")
    (folder / "d.txt").write_bytes("sch\xf6n\n".encode("latin-1"))
    only_error(training.run(), "d.txt: row 1: expected UTF-8 text, found byte 0xf6")


def test_nothing_held_out_is_said_and_trains(tmp_path):
    training = TEXT.training(tmp_path, max_steps=4, val_split=0.0)
    assert "nothing will be validated" in training.finish().stdout
    assert training.final_file()["step"] == 4


def test_a_given_tokenizer_is_used_and_must_fit(tmp_path):
    first = TEXT.training(tmp_path, save_dir="first", max_steps=4)
    first.finish()
    path = first.save_dir / "tokenizer.json"
    second = TEXT.training(tmp_path, save_dir="second", max_steps=4, tokenizer_path=str(path))
    second.finish()
    assert (second.save_dir / "tokenizer.json").read_bytes() == path.read_bytes()
    only_error(second.changed(vocab_size=280).run(), "tokenizer.json", "vocab_size", "280")
    path.write_text("{")
    only_error(TEXT.training(tmp_path, save_dir="third", tokenizer_path=str(path)).run(), "damaged tokenizer")


def chat(folder, *arguments: str) -> Process:
    return start(ROOT / "infer_chat.py", *arguments, cwd=folder).wait()


def test_chat_with_a_finished_and_with_a_half_trained_stage(tmp_path):
    training = TEXT.training(tmp_path, max_steps=8)
    training.finish()
    line = ("--ckpt_dir", str(training.save_dir), "--text", "one red cat", "--complete", "--max_new_tokens", "5")
    answer = chat(tmp_path, *line)
    assert answer.returncode == 0 and answer.stderr == "" and answer.stdout.count("\n") == 1
    assert "without dialogues" in chat(tmp_path, *line[:4], "--max_new_tokens", "5").stderr
    (training.save_dir / training.final).unlink()
    assert chat(tmp_path, *line).stdout == answer.stdout  # from the newest step file
    for step in training.steps():
        training.step_path(step).unlink()
    nothing = chat(tmp_path, *line)
    only_error(nothing, "thinker.pt", "Train this stage first")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top_p", "2"], "--top_p"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--ckpt_dir", "absent"], "absent"),
        (["--pitch", "2"], "unrecognized arguments"),
        (["--device", "cuda:99"], "--device"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, fragment):
    only_error(chat(tmp_path, "--ckpt_dir", str(tmp_path), "--text", "x", *arguments), fragment)


def test_a_corpus_that_is_not_utf8_is_one_line_through_the_tokenizer_s_training_too(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"good line\n" * 6 + "sch\xf6n\n".encode("latin-1"))
    process = TEXT.training(tmp_path, train_text=str(path)).run()
    only_error(process, "latin.txt: row 7: expected UTF-8 text, found byte 0xf6")


def test_disk_full_in_preparation_is_one_line_and_goes_on(tmp_path):
    reference = TEXT.training(tmp_path, save_dir="reference", max_steps=4)
    reference.finish()
    training = TEXT.training(tmp_path, max_steps=4, cache_dir=str(tmp_path / "cache"))
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (13_000, 13_000))\n"
    limit += "from omni.data.tokenizer import Tokenizer\n"
    limit += "Tokenizer.save = lambda *_: open('unused', 'wb').write(bytes(20_000))\n"
    process = training.run(prelude=limit)
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    assert "File too large" in process.stderr
    training.finish()
    assert differences(training.state()["newest"]["phases"], reference.state()["newest"]["phases"]) == []


def test_another_vocabulary_in_the_same_folder_is_refused(tmp_path):
    training = TEXT.training(tmp_path, max_steps=4)
    training.finish()
    only_error(training.changed(vocab_size=310, max_steps=6).run(), "requested vocab_size", "300 -> 310")
    other = TEXT.training(tmp_path, save_dir="other", max_steps=4, vocab_size=280)
    other.finish()
    path = str(other.save_dir / "tokenizer.json")
    only_error(training.changed(tokenizer_path=path, max_steps=6).run(), "another tokenizer", "new save_dir")


def test_a_signal_is_heard_while_the_tokenizer_is_trained(tmp_path):
    training = TEXT.training(tmp_path)
    slow = """
import time, omni.data.tokenizer
def train(lines, vocab_size):
    print("training it", flush=True)
    time.sleep(1000)
omni.data.tokenizer.Tokenizer.train = train
"""
    process = training.start(prelude=slow)
    process.wait_for("training it")
    process.send(signal.SIGTERM)
    assert process.wait().returncode == 75
    training.finish()


def test_answers_count_more_where_the_context_has_less_weight(tmp_path):
    """The same batch and weights, another loss."""
    corpus = tmp_path / "chat.txt"
    corpus.write_text("<|user|>one two red green blue<|assistant|>cat dog<|end|>\n" * 30)
    keys = {"train_text": str(corpus), "max_steps": 1, "print_freq": 1, "max_epochs": None}
    first = {}
    for weight in (1.0, 0.1):
        training = TEXT.training(tmp_path, save_dir=f"weight {weight}", **keys, context_weight=weight)
        training.finish()
        first[weight] = next(row["loss"] for row in training.metrics() if "loss" in row)
    assert abs(first[1.0] - first[0.1]) > 1e-3
