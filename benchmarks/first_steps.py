"""The first steps of each ``configs/*_tiny.json``, on stand-ins for the public data: how its losses begin and fall.

    python benchmarks/first_steps.py --out ../first_steps                # all stages, about 90 minutes of a busy core
    python benchmarks/first_steps.py --out ../first_steps --stages A C   # D needs B before, E needs A to D

The stand-ins are made of the built-in data (``make demo`` leaves them in data/), in the layout in which the public data
are published; ``scripts/prepare_data.py --from`` makes of them what the configs name. Each stage's own script trains
with its config as it stands but for CHANGES and the small batches of TRAININGS, is killed with SIGKILL on the way, goes
on with the same line, and is stopped with SIGTERM. ``max_steps``, learning rate and warm-up are those of the config
until then. Stages A to D get the number of steps made as ``max_steps`` afterwards, so that their final files are
written: stage E needs them. In stage D the codec and the aligner end so, too, and the next part begins.

A table of each training is printed, and kept in OUT/first_steps.md. An interrupted run goes on with the same line.
"""

import argparse
import contextlib
import itertools
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stand_ins import ROOT, prepare, spoken_questions
from omni.common.errors import EXIT_INTERRUPTED, Interrupted, RunError, UserError
from omni.train.cli import OneLineErrors, launch

CHANGES = {"use_compile": False, "num_workers": 0, "print_freq": 1}  # what a CPU forces, and a row for each step
STEPS = (1, 2, 5, 10, 20, 30, 40, 50, 75, 100, 150, 200, 250, 300)  # of the tables, and the last one


@dataclass(frozen=True)
class Part:
    """One training of a script."""

    stage: str  # in metrics.jsonl
    steps: int
    duration: str = "max_steps"  # key of the config that ends it


@dataclass(frozen=True)
class StageRun:
    """One script with its config, and what is different from the config."""

    script: str
    config: str
    changes: dict[str, int]
    parts: tuple[Part, ...]
    finish: bool = False  # whether stage E needs its final file


TRAININGS = {
    "A": StageRun("train_text.py", "thinker", {"batch_size": 2}, (Part("text", 100),), True),
    "B": StageRun("train_audio_enc.py", "audio_enc", {"batch_size": 4}, (Part("audio_enc", 75),), True),
    "C": StageRun("train_vision.py", "vision", {"batch_size": 8}, (Part("vision", 60),), True),
    "D": StageRun(
        "train_talker.py", "talker",
        {"codec_batch_size": 4, "aligner_batch_size": 8, "batch_size": 4, "val_sentences": 4, "val_samples": 1},
        (Part("codec", 200, "codec_steps"), Part("aligner", 150, "aligner_steps"), Part("talker", 60)), True,
    ),
    "E": StageRun("sft_omni.py", "omni_sft", {"batch_size": 2}, (Part("omni", 60),)),
    "F": StageRun("train_vocoder.py", "vocoder", {"batch_size": 2}, (Part("vocoder", 40),)),
    "G": StageRun("train_ocr.py", "ocr", {"batch_size": 16}, (Part("ocr", 250),)),
}  # fmt: skip
PREPARED = {  # stage -> data sets of scripts/prepare_data.py
    "A": ("tinystories",), "B": ("librispeech",), "C": ("coco",), "D": ("ljspeech",), "F": ("ljspeech",),
    "E": ("coco", "librispeech", "ljspeech", "mjsynth", "vqa", "llava"), "G": ("mjsynth",),
}  # fmt: skip

# --- trainings --------------------------------------------------------------------------------------------------------


def rows_of(folder: Path, stage: str) -> dict[int, dict]:
    """Step -> the row of metrics.jsonl."""
    rows = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # of a row that is being written
                row = json.loads(line)
                if row["stage"] == stage and row["kind"] == "train":
                    rows[row["step"]] = row
    return rows


def run(command: list[str], folder: Path, stage: str, until: int, sent: signal.Signals | None) -> bool:
    """Run a training until it has logged a step of ``stage``, then send it a signal; None: to its end.

    Returns:
        Whether the signal was sent: not if an earlier run of this script came as far.

    Raises:
        RunError: it ended by itself before, or otherwise than asked.
    """
    log = folder.with_suffix(".log")
    if sent and max(rows_of(folder, stage), default=0) >= until:
        return False
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=folder.parent.parent, stdout=file, stderr=subprocess.STDOUT)
        try:
            while sent and process.poll() is None and max(rows_of(folder, stage), default=0) < until:
                time.sleep(0.25)
            if sent and process.poll() is None:
                process.send_signal(sent)
            code = process.wait()
        finally:
            process.kill()
    if code != {signal.SIGKILL: -9, signal.SIGTERM: EXIT_INTERRUPTED, None: 0}[sent]:
        raise RunError(f"{' '.join(command)}\nended with {code}, see {log}")
    return True


def train(letter: str, out: Path, configs: Path, steps: int | None, report: Callable[[str], None]) -> None:
    """Train one stage part by part, each with a kill on the way, and report its losses."""
    stage = TRAININGS[letter]
    path = configs / f"{stage.config}_tiny.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    folder = out / config["save_dir"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    ended: dict[str, int] = {}
    for part in stage.parts:
        n_steps = steps or part.steps
        changes = CHANGES | stage.changes | {"checkpoint_freq": max(1, n_steps // 4)} | ended
        command = command_of(stage, path, changes)
        killed = run(command, folder, part.stage, n_steps // 2 + 1, signal.SIGKILL)
        before = rows_of(folder, part.stage) if killed else {}
        run(command, folder, part.stage, n_steps, signal.SIGTERM)
        rows = rows_of(folder, part.stage)
        shown = ", ".join(f"`{key}` {config.get(key, 'default')} -> {value}" for key, value in changes.items()
                          if config.get(key) != value)  # fmt: skip
        report(f"\n**{letter}, `{path.name}`: {part.stage}.** Changed: {shown}. {again(before, rows)}\n")
        report(tables(rows, n_steps))
        ended[part.duration] = max(rows)
    if stage.finish:
        run(command_of(stage, path, changes | ended), folder, part.stage, 0, None)


def command_of(stage: StageRun, path: Path, changes: dict) -> list[str]:
    pairs = (f"{key}={json.dumps(value)}" for key, value in changes.items())
    options = itertools.chain(*(("--set", pair) for pair in pairs))
    return [sys.executable, str(ROOT / stage.script), "--config", str(path), "--device", "cpu", *options]


def again(before: dict[int, dict], after: dict[int, dict]) -> str:
    """What the steps after the last checkpoint gave in the killed process and in the one that went on."""
    if not before:
        return "The first half is of an earlier run of this script."
    losses = losses_of(after)
    differ = [step for step in before if any(before[step][name] != after[step][name] for name in losses)]
    result = f"other losses at the steps {differ}" if differ else "the same losses up to there"
    return f"Killed after step {max(before)}, resumed: {result}."


def losses_of(rows: dict[int, dict]) -> list[str]:
    """The columns to show: numbers that are neither a speed nor a learning rate nor a count."""
    no_loss = ("_per_s", "lr", "grad_norm", "_gb")
    return [name for name, value in rows[min(rows)].items() if isinstance(value, float) and not name.endswith(no_loss)]


def tables(rows: dict[int, dict], n_steps: int) -> str:
    """Markdown: losses at some of the first ``n_steps``, and means over the spans between them."""
    n_steps = min(n_steps, max(rows))  # someone else may have stopped it
    steps = [step for step in STEPS if step < n_steps] + [n_steps]
    spans = [(a + 1, b) for a, b in itertools.pairwise([0, *(step for step in steps if step >= 10)])]
    losses = losses_of(rows)
    lines = [f"| step | {' | '.join(map(str, steps))} |", "| --- " * (len(steps) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{rows[step][name]:.4g}' for step in steps)} |" for name in losses]
    lines += ["", f"| steps | {' | '.join(f'{a} to {b}' for a, b in spans)} |", "| --- " * (len(spans) + 1) + "|"]
    whole = [(f"mean {name}", name, statistics.mean) for name in losses]
    whole += [(f"median {name}", name, statistics.median) for name in rows[min(rows)] if "grad_norm" in name]
    for label, name, of in whole:
        values = ([rows[step][name] for step in range(a, b + 1)] for a, b in spans)
        lines.append(f"| {label} | {' | '.join(f'{of(span):.4g}' for span in values)} |")
    return "\n".join(lines)


def link_corpus(data: Path, out: Path) -> None:
    """The dialogues of stage E, which are the built-in data's in the config, too."""
    corpus = out / "data/text/tiny_corpus.txt"
    if not corpus.exists():
        corpus.symlink_to(data / "text/tiny_corpus.txt")


def interrupt(signum: int, frame) -> None:  # the training ends, too
    raise Interrupted("interrupted. Run the same line again to go on")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for stand-ins, checkpoints and the tables")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the built-in data (default: data)")
    parser.add_argument("--stages", nargs="+", choices=TRAININGS, default=[*TRAININGS], help="(default: all)")
    parser.add_argument("--configs", type=Path, default=ROOT / "configs", help="folder of the configs")
    parser.add_argument("--steps", type=int, help="steps of each training (default: 40 to 250)")
    parser.add_argument("--rows", type=int, help="rows of each data set, at most (default: 400 to 8,000)")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, interrupt)
    out, data = args.out.resolve(), args.data.resolve()
    if not (data / "audio/asr.csv").exists():
        raise UserError(f"--data {data}: expected the built-in data (scripts/make_synthetic_datasets.py), found none")

    def report(text: str) -> None:
        print(text, flush=True)
        with open(out / "first_steps.md", "a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    for letter in args.stages:
        for name in PREPARED[letter]:
            prepare(name, data, out, args.rows)
        if letter == "E":
            spoken_questions(data, out / "data")
            link_corpus(data, out)
        train(letter, out, args.configs.resolve(), args.steps, report)


if __name__ == "__main__":
    launch(main)
