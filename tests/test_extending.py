"""docs/extending.md is carried out: its files are written into a copy of the tree, and its commands are run."""

import json
import re
import shlex
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from harness import ROOT, Process, start, wait_until

PAGE = ROOT / "docs" / "extending.md"
# a fenced block, with the name of its file in the line before it if it has one
BLOCK = re.compile(r"^(?:`(?P<file>[^`\n]+)`\n\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Example:
    files: dict[str, str] = field(default_factory=dict)  # name -> text
    diffs: dict[str, str] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)


def read_page() -> dict[str, Example]:
    """Heading -> what stands below it."""
    sections = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    examples = {}
    for heading, text in zip(sections[1::2], sections[2::2], strict=True):
        example = examples[heading] = Example()
        for block in BLOCK.finditer(text):
            if block["kind"] == "bash":
                example.commands += [shlex.split(line) for line in block["text"].splitlines()]
            else:
                assert block["file"], f"no file name before the block {block['text'][:60]!r}"
                (example.diffs if block["kind"] == "diff" else example.files)[block["file"]] = block["text"]
    return examples


def patched(text: str, diff: str) -> str:
    """``text`` after ``diff``: lines with ``-`` and a blank go, ``+`` and a blank stay; ``@@`` stands between hunks."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"not once in the file:\n{old}"
        text = text.replace(old, new)
    return text


@dataclass
class Tree:
    """A copy of the repository with an example's files in it."""

    folder: Path

    def add(self, example: Example) -> None:
        for name, text in example.files.items():
            path = self.folder / name
            assert not path.exists(), name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for name, diff in example.diffs.items():
            path = self.folder / name
            path.write_text(patched(path.read_text(), diff))

    def start(self, command: list[str], *more: str) -> Process:
        python, *rest = command
        assert python == "python", command
        return start(*rest, *more, cwd=self.folder, root=self.folder)

    def run(self, command: list[str], *more: str) -> str:
        process = self.start(command, *more).wait()
        assert process.returncode == 0, process.stderr
        return process.stdout + process.stderr


@pytest.fixture
def tree(tmp_path) -> Tree:
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in ("omni", "configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    return Tree(folder)


def test_a_new_stage(tree):
    """It trains, is killed and resumed to the same bits, is evaluated and exported, and opens wherever it is."""
    example = read_page()["A new stage"]
    tree.add(example)
    train, evaluate, export = example.commands
    config = json.loads(example.files["configs/language_demo.json"])
    longer = ("--set", "max_steps=300")  # time enough to kill it
    whole, killed = tree.folder / config["save_dir"], tree.folder / "killed"

    tree.run(train, *longer)
    other = (*longer, "--set", f"save_dir={killed}", "--set", "checkpoint_freq=20")
    process = tree.start(train, *other)
    wait_until(lambda: any(killed.glob("language_step_*.pt")), "no checkpoint was saved", process)
    assert process.kill().returncode == -signal.SIGKILL
    assert "resumed at step" in tree.run(train, *other)
    weights = [torch.load(folder / "language.pt", weights_only=True)["model"] for folder in (whole, killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    evaluated = tree.run(evaluate)
    accuracy = float(re.search(r"^  accuracy +([\d.]+)$", evaluated, re.MULTILINE)[1])
    assert accuracy > 0.9, evaluated

    train_thinker(tree)
    assert "language.pt, step 300" in tree.run(export)
    step_file = max(killed.glob("language_step_*.pt"), key=lambda path: int(path.stem.split("_")[-1]))
    opened = "from omni.export.bundle import open_model; from omni.common.numerics import weights_sha256"
    sources = [str(path) for path in ("my_export", killed, step_file)]
    digests = tree.run(
        ["python", "-c", f"{opened}\nfor s in {sources}: print(weights_sha256(open_model('language', s).model))"]
    )
    assert len(set(digests.split())) == 1, digests


def train_thinker(tree: Tree) -> None:
    """A Thinker of two steps, in the folder of the demo's."""
    words = ["cat", "dog", "red", "green", "blue", "two", "four", "six", "hot", "cold"]
    dialogues = [f"<|user|>{a} {b}?<|assistant|>{b} {a}.<|end|>\n" for a in words for b in words]
    (tree.folder / "corpus.txt").write_text("".join(dialogues))
    thinker = {
        "train_text": "corpus.txt", "val_text": "null", "val_split": 0, "max_steps": 2, "warmup_steps": 1,
        "d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "ctx_len": 128, "vocab_size": 300, "batch_size": 2,
    }  # fmt: skip
    overrides = [word for key, value in thinker.items() for word in ("--set", f"{key}={value}")]
    tree.run(["python", "train_text.py", "--config", "configs/thinker_demo.json"], *overrides)


def test_a_new_task(tree):
    """It trains by itself, its metric is reported, and evaluate.py knows it."""
    example = read_page()["A new task of stage E"]
    tree.add(example)
    train, evaluate = example.commands
    train_thinker(tree)
    log = tree.run(train)
    assert "accuracy_multiple_choice" in log, log
    judged = tree.run(evaluate)
    assert "accuracy_multiple_choice" in judged and judged.count("true  ") == 3, judged


def test_a_new_data_format(tree):
    """Rows are found, a broken one is named, and a stage trains on them."""
    example = read_page()["A new data format"]
    tree.add(example)
    lengths, train = example.commands
    soundfile.write(tree.folder / "my_voice" / "talk.wav", np.sin(np.arange(16_000 * 5) * 0.1), 16_000)
    told = tree.run(lengths)
    assert "4 rows, 0.00 h of audio" in told and "(0.00 %)" in told, told
    assert "my_voice/talk.srt: row 4 (4): " in told and "which lasts 5.00 s" in told
    vocoder = {
        "val_csv": "null", "val_split": 0, "max_steps": 2, "warmup_steps": 1, "upsample_initial_channel": 16,
        "batch_size": 4, "num_workers": 0, "adv_start_step": 1, "drop_last": "false",
    }  # fmt: skip
    log = tree.run(train, *[word for key, value in vocoder.items() for word in ("--set", f"{key}={value}")])
    assert "finished" in log and "talk.srt: row 4" in log, log


def test_every_block_of_the_page_is_used():
    """A section without a test here would be no more than a promise."""
    tested = {"A new stage", "A new task of stage E", "A new data format"}
    assert set(read_page()) == tested
