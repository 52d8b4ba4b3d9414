"""Run all of μOmni on a laptop: make the built-in data, train and evaluate every stage, and ask the models.

    python scripts/demo.py            the demo configs, to their targets
    python scripts/demo.py --smoke    a few steps of each stage in a temporary folder, as a test

Without a GPU, two stages train side by side on half of the cores each, as models of this size cannot use more. After an
interruption the same command continues. All results are on held-out data and go to checkpoints/demo_results.json.
"""

import argparse
import csv
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from omni.common import allocator
from omni.common.errors import EXIT_FAILED, EXIT_INTERRUPTED
from omni.common.files import write_json
from omni.stages import STAGES as TABLE
from omni.train.checkpoint import load
from omni.train.stage import Stage
from scripts import tesseract
from scripts.judges import JUDGES, installed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "checkpoints" / "demo_results.json"
DIGITS = 6  # of a figure that is kept; fewer are shown, and rounded once


@dataclass(frozen=True)
class DemoStage:
    """A stage's demo: its data, and the targets of its final metrics."""

    name: str  # in demo_results.json
    stage: Stage
    metrics: dict[str, str | None]  # name -> target ("< 10", "< another + 0.1"), None: reported only
    data: dict[str, str]  # config key -> file below the data folder, for a smoke run with data of its own
    smoke: tuple[str, ...] = ()  # overrides for a training of seconds
    held_out: str | None = None  # data; a few of its items are printed beside the model's output
    needs: dict[str, str] = field(default_factory=dict)  # option of evaluate.py -> stage whose folder it takes
    bases: dict[str, str] = field(default_factory=dict)  # config key -> stage whose folder it names
    part: tuple[str, ...] = ()  # overrides with which the script trains some of a stage's models
    last: str | None = None  # then: the file that it writes last
    after: str | None = None  # stage that trains such models in the same folder

    @property
    def config(self) -> str:
        return f"configs/{self.stage.config_name}_demo.json"

    @property
    def folder(self) -> Path:
        return ROOT / json.loads((ROOT / self.config).read_text())["save_dir"]

    @property
    def waits_for(self) -> set[str]:
        """The stages whose models it needs."""
        config = json.loads((ROOT / self.config).read_text())
        named = {base for key, base in self.bases.items() if config.get(key)}
        return named | set(self.needs.values()) | ({self.after} if self.after else set())


TASKS = (  # of stage E
    "text", "image_question", "caption", "transcription", "spoken_question", "spoken_image_question", "spoken_answer",
)  # fmt: skip

VOICES = ("heart", "high", "joe", "low")  # of the talker
NEW_VOICES = ("new-espeak", "new-hibari", "new-pico")  # that the talker speaks in after hearing a recording

TALKER_DATA = {"tts_csv": "audio/tts.csv", "val_csv": "audio/tts.val.csv"}
TALKER_SMOKE = (
    "codec_steps=4", "aligner_steps=4", "max_steps=4", "codec_batch_size=4", "batch_size=4", "codec_layers=1",
    "n_layers=1", "val_sentences=4", "audio_ckpt=null",
)  # fmt: skip

MIX = {
    "text_path": "text/tiny_corpus.txt",
    "val_text_path": "text/tiny_corpus.val.txt",
    "image_manifest": "images/annotations.json",
    "val_image_manifest": "images/annotations.val.json",
    "asr_csv": "audio/asr.csv",
    "val_asr_csv": "audio/asr.val.csv",
    "question_csv": "audio/asr.csv",
    "val_question_csv": "audio/tts.csv",
    "speech_csv": "audio/tts.csv",
    "val_speech_csv": "audio/tts.val.csv",
}
ENCODERS = {"thinker_ckpt": "thinker", "audio_ckpt": "audio_enc", "vision_ckpt": "vision"}

STAGES = [  # by priority: first the stages that others need, then the longest
    DemoStage(
        name="audio_enc",
        stage=TABLE["audio_enc"],
        metrics={"wer": "< 0.2", "wer_unseen_voices": "< 0.2", "wer_unseen_words": "< 0.3", "cer": None},
        data={
            "train_csv": "audio/asr.csv",
            "val_csv": "audio/asr.val.csv",
            "val_voices_csv": "audio/asr.val_voices.csv",
            "val_words_csv": "audio/asr.val_open.csv",
        },
        smoke=("max_steps=6", "d_model=32", "n_layers=1", "n_heads=2", "d_ff=64", "batch_size=4"),
        held_out="audio/asr.val_voices.csv",
    ),
    DemoStage(
        name="codec",
        stage=TABLE["codec"],
        metrics={"reconstruction_mse": "< 0.05"},
        data=TALKER_DATA,
        smoke=TALKER_SMOKE,
        part=("parts_only=true",),
        last=TABLE["aligner"].final,
    ),
    DemoStage(
        name="talker",
        stage=TABLE["talker"],
        metrics={
            "code_perplexity": "< 15",
            "wer_recordings": None,
            "wer_vocoded": None,
            "wer_codec": None,
            "wer_talker": "< wer_recordings + 0.1",
        },
        data=TALKER_DATA,
        smoke=TALKER_SMOKE,
        held_out="audio/tts.val.csv",
        needs={"--audio_ckpt": "audio_enc"},
        after="codec",
    ),
    DemoStage(
        name="thinker",
        stage=TABLE["text"],
        metrics={"perplexity": "< 10", "bits_per_byte": None},
        data={"train_text": "text/tiny_corpus.txt", "val_text": "text/tiny_corpus.val.txt"},
        smoke=("max_steps=20", "d_model=48", "n_layers=2", "n_heads=2", "d_ff=96", "ctx_len=64", "vocab_size=512"),
    ),
    DemoStage(
        name="vision",
        stage=TABLE["vision"],
        metrics={"top1_of_64": "> 0.7", "zero_shot": "> 0.7"},
        data={"train_manifest": "images/annotations.json", "val_manifest": "images/annotations.val.json"},
        smoke=("max_steps=6", "d_model=32", "n_layers=1", "n_heads=2", "d_ff=64", "batch_size=8"),
        held_out="images/annotations.val.json",
    ),
    DemoStage(
        name="features",
        stage=TABLE["omni"],
        metrics={},
        data=MIX,
        part=("features_only=true",),
        bases=ENCODERS,
    ),
    DemoStage(
        name="sft",
        stage=TABLE["omni"],
        metrics={"accuracy": "> 0.6"}  # the mean of the tasks
        | {f"accuracy_{task}": "> 0.5" for task in TASKS}
        | {"accuracy_transcription": "> 0.8"}  # 1 - WER, as stage B; the others are exact answers
        | {"code_perplexity": None, "code_perplexity_of_text": None},
        data=MIX,
        smoke=("max_steps=4", "batch_size=4", "val_items=2"),
        bases=ENCODERS | {"talker_ckpt": "talker"},
        after="features",
    ),
    DemoStage(
        name="ocr",
        stage=TABLE["ocr"],
        metrics={"cer": "< 0.1", "exact": None},
        data={"train_csv": "ocr/ocr.csv", "val_csv": "ocr/ocr.val.csv"},
        smoke=("max_steps=6", "vision_layers=1", "decoder_layers=1", "batch_size=4"),
        held_out="ocr/ocr.val.csv",
    ),
    DemoStage(
        name="vocoder",
        stage=TABLE["vocoder"],
        metrics={"mel_l1": "< mel_l1_griffin_lim", "mel_l1_griffin_lim": None},
        data={"train_csv": "audio/tts.csv", "val_csv": "audio/tts.val.csv"},
        smoke=("max_steps=4", "batch_size=2", "val_clips=2"),
    ),
]

# Held-out file of stage D (tts.NAME.csv) -> its judges, which were trained elsewhere, if they are installed
JUDGES_OF = {
    "val": ("whisper-base", "dnsmos", "resemblyzer"),
    "val_open": ("whisper-base",),
    "val_voices": ("resemblyzer",),
}
JUDGED: dict[str, str | None] = {
    "wer_recordings": "< 0.09",
    "wer_griffin_lim": None,
    "wer_vocoded": "< wer_recordings + 0.02",
    "wer_codec": "< wer_recordings + 0.04",
    "wer_talker": "< wer_recordings + 0.06",
    **{f"wer_talker_{voice}": f"< wer_recordings_{voice} + 0.08" for voice in VOICES},
    "wer_unseen_words_recordings": None,
    "wer_unseen_words_talker": "< 0.2",
    "dnsmos_recordings": None,
    "dnsmos_griffin_lim": None,
    "dnsmos_vocoded": None,
    "dnsmos_codec": None,
    "dnsmos_talker": "> dnsmos_recordings + -0.3",
    "own_voice_talker": "> 0.95",
    **{f"own_voice_talker_{voice}": None for voice in NEW_VOICES},
}

# Stage G's figures where Tesseract is installed, which reads the same signs
BESIDE_TESSERACT: dict[str, str | None] = {"cer": "< cer_tesseract", "cer_tesseract": None}

SPOKEN = "Anna is reading at the market."
ABOUT_PICTURE = "What does the picture show?"
ABOUT_RECORDING = "What does the recording say?"
QUESTIONS = [
    "Hello!",
    "What is your name?",
    "What is the opposite of hot?",
    "Three small red circles are left of a big blue star. How many circles are there?",
    "Paul has a white cat that likes fish. What does the cat like?",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage, in a temporary folder")
    args = parser.parse_args()
    heed_signals()
    os.environ |= allocator.settings()  # of every process that is started here
    try:
        if not args.smoke:
            return demo()
        with tempfile.TemporaryDirectory(prefix="omni_smoke_") as folder:
            return smoke(Path(folder))
    finally:
        for process in _children:  # after an error here; harmless for a process that has ended
            process.terminate()


def demo() -> int:
    started = time.monotonic()
    run("scripts/make_synthetic_datasets.py")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    minutes = results.setdefault("minutes", {})
    finished = {stage.name for stage in STAGES if (stage.folder / (stage.last or stage.stage.final)).exists()}

    def note_time() -> None:  # of a demo in several parts it is their sum; of one that is finished it stays, if known
        nonlocal started
        if len(finished) < len(STAGES) or "all" not in minutes:
            minutes["all"] = round(minutes.get("all", 0.0) + (time.monotonic() - started) / 60, 2)
        started = time.monotonic()

    def ended(stage: DemoStage, seconds: float, code: int) -> None:
        if stage.name not in finished:  # the time of a run in several parts is their sum
            minutes[stage.name] = round(minutes.get(stage.name, 0.0) + seconds / 60, 2)
        if not code and stage.metrics:
            metrics = load(stage.folder / stage.stage.final)["metrics"]
            results[stage.name] = by_task({name: round(metrics[name], DIGITS) for name in stage.metrics})
        note_time()
        write_json(RESULTS, results, indent=2)

    train({stage.name: command(stage, stage.part) for stage in STAGES}, ended)
    ask("checkpoints/thinker_demo", QUESTIONS)
    folders = {stage.name: stage.folder for stage in STAGES}
    for stage in STAGES:
        if stage.held_out:
            show(stage, folders, ROOT / "data" / stage.held_out, items=5)
    export(folders, ROOT / "merged_model")
    ask_exported(ROOT / "merged_model", ROOT / "data", ROOT / "checkpoints")
    results["ocr"].pop("cer_tesseract", None)  # perhaps of other data
    if tesseract.installed():
        results["ocr"]["cer_tesseract"] = read_by_tesseract(ROOT / "data" / "ocr" / "ocr.val.csv")
    else:
        print("\nTesseract, to compare stage G with, is not installed. To have it: apt-get install tesseract-ocr")
    results.pop("judged", None)  # of other models
    note_time()
    write_json(RESULTS, results, indent=2)
    missing = sorted({name for names in JUDGES_OF.values() for name in names if not installed(JUDGES[name])})
    if missing:
        print(f"\nJudges of speech that are not installed: {', '.join(missing)}. To have them: make judges")
    else:
        started = time.monotonic()
        results["judged"] = judge(folders, ROOT / "data" / "audio", ROOT / "checkpoints" / "speech_demo")
        minutes["judged"] = round((time.monotonic() - started) / 60, 2)
        write_json(RESULTS, results, indent=2)
    print_table(results)
    print(
        "\nTalk to it:\n  .venv/bin/python infer_chat.py --ckpt_dir merged_model\n"
        "or in the browser (once: make web):\n  .venv/bin/python scripts/web_demo.py --ckpt_dir merged_model"
    )
    return 0


def command(stage: DemoStage, overrides: Iterable[str]) -> list[str]:
    """Its script and arguments."""
    options = (word for override in overrides for word in ("--set", override))
    return [stage.stage.script, "--config", stage.config, *options]


def by_task(figures: dict[str, float]) -> dict:
    """Move stage E's accuracies of single tasks into an object of their own."""
    tasks = {name.removeprefix("accuracy_"): value for name, value in figures.items() if name.startswith("accuracy_")}
    others = {name: value for name, value in figures.items() if not name.startswith("accuracy_")}
    return others | ({"by_task": tasks} if tasks else {})


def smoke(folder: Path) -> int:
    started = time.monotonic()
    run("scripts/make_synthetic_datasets.py", "--out", str(folder / "data"), "--size", "smoke")
    commands = {}
    folders = {stage.name: folder / stage.folder.name for stage in STAGES}
    for stage in STAGES:
        data = {key: str(folder / "data" / name) for key, name in stage.data.items()}
        overrides = [f"save_dir={folders[stage.name]}", *stage.smoke, *stage.part]
        overrides += [f"{key}={folders[base]}" for key, base in stage.bases.items() if base in stage.waits_for]
        if stage.data is MIX:  # the one stage that names its data in one key
            overrides.append(f"sft_mix={json.dumps(data)}")
        else:
            overrides += [f"{key}={name}" for key, name in data.items()]
        commands[stage.name] = command(stage, overrides)
    train(commands, lambda *_: None)
    ask(str(folders["thinker"]), QUESTIONS[:1])
    for stage in STAGES:
        if stage.held_out:
            show(stage, folders, folder / "data" / stage.held_out, items=1)
    export(folders, folder / "merged_model")
    ask_exported(folder / "merged_model", folder / "data", folder)
    print(f"\nsmoke: every stage ran in {time.monotonic() - started:.0f} s; so short a training answers at random")
    return 0


# --- Running scripts of this repository ------------------------------------------------------------------------------


_asked = threading.Event()  # set by a request to stop
_children: list[subprocess.Popen] = []


def heed_signals() -> None:
    """Pass Ctrl-C, SIGTERM, SIGQUIT and hang-up on to each child as one SIGTERM, and wait until it has saved and ended;
    subprocess.run would kill it after a quarter of a second."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop())


def stop() -> None:
    _asked.set()
    for process in list(_children):
        process.terminate()


def start(*command: str, **options) -> subprocess.Popen:
    """Start in a new process group, so that a Ctrl-C in the terminal reaches the child only once, through ``stop``."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, process_group=0, **options)
    _children.append(process)
    if _asked.is_set():  # while it was being started
        process.terminate()
    return process


def tell(line: str) -> None:
    """Print ``line``. If stdout is closed (a closed terminal, ``| head``), the children are asked to save and end."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not _asked.is_set():
            stop()


def run(*command: str) -> None:
    """Run a script; if it fails, exit with its code."""
    if _asked.is_set():
        give_up(EXIT_INTERRUPTED)
    if (code := start(*command).wait()) or _asked.is_set():
        give_up(code)


def give_up(code: int) -> None:
    """Exit with a child's code; one that a signal ended, unasked, as if it had run out of memory, has failed."""
    if code < 0 and not _asked.is_set():
        print(
            f"error: a script was ended by {signal.Signals(-code).name}. Run the same command to go on", file=sys.stderr
        )
        code = EXIT_FAILED
    sys.exit(code if code > 0 else EXIT_INTERRUPTED)


def train(commands: dict[str, list[str]], ended: Callable[[DemoStage, float, int], None]) -> None:
    """Train every stage as soon as the stages that it needs are finished; without a GPU two at a time.

    Args:
        commands: stage -> script and arguments.
        ended: called with each stage that has ended, its seconds, and its exit code.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    together = 1 if torch.cuda.is_available() or cores < 2 else 2
    waiting, running, finished, failed = list(STAGES), {}, set(), 0
    ends: queue.SimpleQueue[tuple[DemoStage, float, int]] = queue.SimpleQueue()

    def follow(stage: DemoStage, process: subprocess.Popen, since: float) -> None:
        for line in process.stdout or ():
            tell(f"{stage.name:<9} | {line.rstrip()}")
        ends.put((stage, time.monotonic() - since, process.wait()))

    while running or (waiting and not _asked.is_set()):
        ready = [stage for stage in waiting if stage.waits_for <= finished and not _asked.is_set()]
        for stage in ready[: together - len(running)]:
            environment = {"OMP_NUM_THREADS": str(cores // together), "PYTHONUNBUFFERED": "1"} | os.environ
            waiting.remove(stage)
            tell(f"\n=== {stage.name}: python {' '.join(commands[stage.name])}")
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if together > 1 else {}
            running[stage.name] = start(*commands[stage.name], env=environment, **output)
            threading.Thread(target=follow, args=(stage, running[stage.name], time.monotonic())).start()
        if not running:
            break
        stage, seconds, code = ends.get()
        del running[stage.name]
        tell(f"=== {stage.name}: {'finished' if code == 0 else 'ended'} after {seconds / 60:.1f} min")
        ended(stage, seconds, code)
        finished.add(stage.name)
        if code and not failed and not _asked.is_set():  # the others save and end; asked twice, they would not save
            for process in running.values():
                process.terminate()
        if code:  # the next run continues all of them
            failed = failed or code
            waiting.clear()
    if failed or _asked.is_set():
        give_up(failed or EXIT_INTERRUPTED)


# --- Questions to the trained models ----------------------------------------------------------------------------------


def ask(folder: str, questions: list[str]) -> None:
    print(f"\n=== Questions to {folder}", flush=True)
    for question in questions:
        print(f"you>  {question}\nomni> ", end="", flush=True)
        run("infer_chat.py", "--ckpt_dir", folder, "--text", question)


def show(stage: DemoStage, folders: dict[str, Path], data: Path, items: int) -> None:
    """Print a few held-out items beside the model's output."""
    print(f"\n=== {stage.name} on {data.name}", flush=True)
    evaluate = ["scripts/evaluate.py", stage.name, "--ckpt_dir", str(folders[stage.name]), "--data", str(data)]
    for option, other in stage.needs.items():
        evaluate += [option, str(folders[other])]
    run(*evaluate, "--limit", "64", "--show", str(items))


def judge(folders: dict[str, Path], data: Path, output: Path) -> dict[str, float]:
    """The figures of ``JUDGED``, of 100 sentences from each of the held-out files of stage D."""
    print("\n=== Judges trained elsewhere, on the speech of the models", flush=True)
    figures = {}
    for name, judges in JUDGES_OF.items():
        versions = ("griffin_lim", "vocoded", "codec", "talker") if name == "val" else ("talker",)
        folder = output / name
        options = ["--ckpt_dir", str(folders["talker"]), "--vocoder_ckpt", str(folders["vocoder"])]
        options += ["--data", str(data / f"tts.{name}.csv"), "--limit", "100", "--save_speech", str(folder)]
        run("scripts/evaluate.py", "talker", *options)
        options = [f"{version}={folder / version}" for version in ("recordings", *versions)]
        options += [word for one in judges for word in ("--judge", one)]
        options += ["--json", str(folder / "judges.json"), "--page", str(folder / "speech.html")]
        options += ["--picture", str(folder / "speech.png")]
        run("scripts/second_opinion.py", *options)
        said = json.loads((folder / "judges.json").read_text())["judges"]
        figures[name] = {
            (judge, version, key): value
            for judge, versions in said.items()
            for version, verdict in versions.items()
            for key, value in verdict["figures"].items()
        }
    return judged(figures)


def judged(figures: dict[str, dict[tuple[str, str, str], float | None]]) -> dict[str, float]:
    """The figures under the names of ``JUDGED``, shares in place of percent.

    Args:
        figures: file -> (judge, version, figure) -> value, as second_opinion.py writes them.
    """
    known, unseen_words, new = (figures[name] for name in ("val", "val_open", "val_voices"))
    found = {}
    for (judge, version, key), value in known.items():
        label = version.replace(", ", "_")
        if key == "WER %":
            found[f"wer_{label}"] = value / 100
        elif judge == "dnsmos" and key == "OVRL" and label == version:
            found[f"dnsmos_{label}"] = value
        elif key == "own voice %" and version == "talker":
            found["own_voice_talker"] = value / 100
    for version in ("recordings", "talker"):
        found[f"wer_unseen_words_{version}"] = unseen_words["whisper-base", version, "WER %"] / 100
    for voice in NEW_VOICES:
        found[f"own_voice_talker_{voice}"] = new["resemblyzer", f"talker, {voice}", "own voice %"] / 100
    return {name: round(value, DIGITS) for name, value in found.items()}


def read_by_tesseract(data: Path) -> float:
    """Tesseract's character error rate on the pictures of ``data``."""
    print("\n=== Tesseract, on the signs of stage G", flush=True)
    with tempfile.TemporaryDirectory(prefix="omni_demo_") as folder:
        figures = Path(folder, "figures.json")
        run("scripts/tesseract.py", "--data", str(data), "--json", str(figures))
        return round(json.loads(figures.read_text())["cer"], DIGITS)


def export(folders: dict[str, Path], output: Path) -> None:
    """Export all stages into one folder."""
    print(f"\n=== Export to {output}", flush=True)
    stages = ("thinker", "audio_enc", "vision", "talker", "vocoder", "ocr")
    options = {"omni": "sft", "audio": "audio_enc"} | {name: name for name in stages if name != "audio_enc"}
    flags = [word for option, stage in options.items() for word in (f"--{option}_ckpt", str(folders[stage]))]
    run("export.py", *flags, "--output_dir", str(output), "--force")


def ask_exported(model: Path, data: Path, sounds: Path) -> None:
    """Ask one question for each kind of input and output, about held-out items."""
    picture = json.loads((data / "images/annotations.val.json").read_text())[0]
    recording = first_row(data / "audio/asr.val.csv")
    sign = first_row(data / "ocr/ocr.val.csv")
    for shown, *arguments in (
        (QUESTIONS[2], "--text", QUESTIONS[2]),
        (f"{picture['image']}: {ABOUT_PICTURE}", "--image", f"{data}/images/{picture['image']}",
         "--text", ABOUT_PICTURE),
        (f"{recording['wav']} ({recording['text']})", "--audio_in", f"{data}/audio/{recording['wav']}",
         "--text", ABOUT_RECORDING),
        (f"{sign['image']} ({sign['text']})", "--ocr", "--image", f"{data}/ocr/{sign['image']}"),
    ):  # fmt: skip
        print(f"\nyou>  {shown}\nomni> ", end="", flush=True)
        run("infer_chat.py", "--ckpt_dir", str(model), *arguments)
    print(f"\nsay>  {SPOKEN} -> {sounds / 'speech.wav'}", flush=True)
    run("infer_chat.py", "--ckpt_dir", str(model), "--say", SPOKEN, "--audio_out", str(sounds / "speech.wav"))


def first_row(path: Path) -> dict:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.DictReader(file))


def print_table(results: dict) -> None:
    print(f"\n{'stage':<12}{'held-out figure':<32}{'value':>10}  {'target':<24}{'':<18}{'minutes':>8}")
    tables = {stage.name: stage.metrics for stage in STAGES} | ({"judged": JUDGED} if "judged" in results else {})
    if "cer_tesseract" in results["ocr"]:
        tables["ocr"] = tables["ocr"] | BESIDE_TESSERACT
    for part, metrics in tables.items():
        minutes = f"{results['minutes'].get(part, 0.0):.1f}"
        if not metrics:
            print(f"{part:<98}{minutes:>8}")
            continue
        figures = {f"accuracy_{task}": value for task, value in results[part].get("by_task", {}).items()}
        figures |= results[part]
        for row, (name, target) in enumerate(metrics.items()):
            value = figures[name]
            label, shown = (part, minutes) if row == 0 else ("", "")
            cells = f"{label:<12}{name:<32}{value:>10.3f}  {target or '':<24}"
            print(f"{cells}{verdict(value, target, figures):<18}{shown:>8}")
    print(f"in all {results['minutes']['all']:.0f} minutes; written to {RESULTS.relative_to(ROOT)}")


def verdict(value: float, target: str | None, figures: dict[str, float]) -> str:
    """Whether ``value`` meets ``target``, which may name other metrics of the stage."""
    if target is None:
        return ""
    sign, _, bound = target.partition(" ")
    limit = sum(figures[term] if term in figures else float(term) for term in bound.split(" + "))
    missed_by = value - limit if sign == "<" else limit - value
    return "reached" if missed_by < 0 else f"missed by {missed_by:.3g}"


if __name__ == "__main__":
    sys.exit(main())
