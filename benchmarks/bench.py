"""Speed, as ratios: each figure is measured beside its reference in the same process, medians of alternating runs.

    python benchmarks/bench.py                  all of it, about ten minutes on 2 cores
    python benchmarks/bench.py train resume     some parts

Prints a line for each figure and writes the figures to --json, where those of other parts stay if they are of the same
machine and versions. All sizes are those of the demo configs; the parts loop and speak also need the demo's data and
checkpoints, and report where these are missing.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import omni.train.loop
from benchmarks import bench_pairs
from benchmarks.bench_apart import Apart
from benchmarks.bench_pairs import PAIRS, STAGES, as_qwen3, omni_of_text, opened, read_config
from omni.common import allocator
from omni.common.errors import UserError
from omni.common.files import write_json
from omni.export.bundle import open_model
from omni.models.answering import greedy_answers
from omni.models.codec import Codec
from omni.models.speaker import Speaker
from omni.models.talker import Talker
from omni.models.vocoder import build_generator, fold_weight_norm
from omni.train import checkpoint
from omni.train.cli import OneLineErrors, launch, output_file
from omni.train.config import StageConfig
from omni.train.device import keep_kernels, pick_amp_dtype
from omni.train.optim import build_adamw
from omni.train.training import Training

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TEXT = "Anna is reading at the market, and her brother is waiting for her at the old bridge."
NEVER = 10**9  # steps
PREFETCHED = 2  # batches that each worker of a data loader has ready, at most


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements that no config contains."""

    repeats: int = 9
    warm_up: int = 2
    matmul: int = 2048  # rows and columns
    prompt: int = 16
    new_tokens: int = 96
    blocks: int = 5  # of ``block_steps`` each, in the part loop
    block_steps: int = 4
    checkpoint_floats: int = 30_000_000
    corpus_lines: int = 1_000_000


SMOKE = Sizes(
    repeats=1, warm_up=0, matmul=256, prompt=4, new_tokens=4, blocks=2, block_steps=2, checkpoint_floats=10_000,
    corpus_lines=2_000,
)  # fmt: skip


@dataclass
class Bench:
    """Inputs of the parts, and their figures."""

    sizes: Sizes
    configs: Path
    talker_ckpt: Path | None
    vocoder_ckpt: Path | None
    figures: dict[str, dict] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str, note: str) -> None:
        """Record a figure; ``unit`` "x" is a ratio, which ``note`` explains."""
        date = time.strftime("%Y-%m-%d %H:%M")
        self.figures[name] = {"value": round(value, 4), "unit": unit, "note": note, "date": date}
        print(f"{name:<36}{value:>8.2f} {unit:<3}{note}", flush=True)

    def leave_out(self, name: str, why: str) -> None:
        date = time.strftime("%Y-%m-%d %H:%M")
        self.figures[name] = {"value": None, "unit": "", "note": f"not measured: {why}", "date": date}
        print(f"{name:<36}       -    not measured: {why}", flush=True)

    def medians(self, parts: dict[str, Callable[[], object]], repeats: int | None = None) -> dict[str, float]:
        """Median seconds of each part, the parts taking turns so that a noisy moment falls on all of them."""
        times: dict[str, list[float]] = {name: [] for name in parts}
        repeats = min(self.sizes.repeats, repeats or self.sizes.repeats)
        for repeat in range(self.sizes.warm_up + repeats):
            for name, part in parts.items():
                started = time.perf_counter()
                part()
                if repeat >= self.sizes.warm_up:
                    times[name].append(time.perf_counter() - started)
        return {name: statistics.median(values) for name, values in times.items()}


# --- Training steps, beside a library's and beside the machine's matrix products -------------------------------------


def bench_train(bench: Bench) -> None:
    """A step of each of ``PAIRS`` (see bench_pairs.py): forward, backward, clipping and AdamW on both sides. Throughput
    over that of the library with the faster of its attentions; and over that of the library as its users run it, with
    the attention that it chooses and without our settings of the allocator, in a process of its own.

    Also the share of the machine's rate of large matrix products in the same dtype: operations of products,
    convolutions and full attention in forward and backward, over the time of the whole step.
    """
    with Apart(their_step) as apart:
        for make in PAIRS:
            torch.manual_seed(0)
            pair = make(bench.configs)
            dtype = pick_amp_dtype(pair.config.use_amp, CPU)
            matrix = torch.randn(bench.sizes.matmul, bench.sizes.matmul, dtype=dtype or torch.float32)
            parts = {"ours": step_of(pair.ours, pair.our_loss, dtype), "matmul": lambda matrix=matrix: matrix @ matrix}
            parts |= {name: step_of(model, pair.their_loss, dtype) for name, model in pair.theirs.items()}
            if pair.theirs:
                parts["as users run it"] = apart.step(make.__name__, bench.configs)
            times = bench.medians(parts)
            ms, name = 1000 * times["ours"], f"train/{pair.stage}/{pair.what}"
            if pair.theirs:
                fastest = min(pair.theirs, key=times.get)
                note = f"throughput over {pair.library} {fastest}; {ms:.0f} ms a step"
                bench.add(name, times[fastest] / times["ours"], "x", note)
                note = f"over {pair.library} {next(iter(pair.theirs))} with the allocator as it is"
                bench.add(f"{name}/as_users_run_it", times["as users run it"] / times["ours"], "x", note)
            rate = count_flops(pair.ours, pair.our_loss) / times["ours"]
            peak = 2 * bench.sizes.matmul**3 / times["matmul"]
            note = f"{rate / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s in {matrix.dtype}; {ms:.0f} ms a step"
            bench.add(f"{name}/matmul_share", 100 * rate / peak, "%", note)


def their_step(make: str, configs: Path) -> Callable[[], None]:
    """A step of the library's model of the pair ``make``, with the attention that it chooses."""
    torch.manual_seed(0)
    pair = getattr(bench_pairs, make)(configs)
    model = next(iter(pair.theirs.values()))
    return step_of(model, pair.their_loss, pick_amp_dtype(pair.config.use_amp, CPU))


def step_of(model: nn.Module, loss: Callable[[nn.Module], Tensor], dtype: torch.dtype | None) -> Callable[[], None]:
    """A function that makes one training step of ``model``."""
    optimizer = build_adamw(model.train(), lr=1e-4, wd=0.1)

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            value = loss(model)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def count_flops(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Operations of forward and backward. The counter does not know the CPU's fused attention, so it counts plain
    attention: up to twice the products of a causal one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(model).backward()
    return counter.get_total_flops()


# --- The scripts' loop, beside the bare computation ------------------------------------------------------------------


class Enough(Exception):
    """Ends a run whose steps have been timed."""


STEPS = omni.train.loop.Loop.steps  # before ``Watch`` replaces it


@dataclass
class Watch:
    """Times blocks of steps in the loop of a real run, alternating with blocks of bare steps.

    Both blocks have new batches, since oneDNN makes kernels for each new shape; bare steps on both, repeated, give the
    ratio of their work. While bare steps run, the loader's workers prepare batches for which the loop might have had
    to wait; therefore the loop first uses up as many batches before each block.

    At the end the loop runs the same batches without workers, which leaves its own overhead.
    """

    sizes: Sizes
    stage: str = ""
    # of each block
    seconds: list[float] = field(default_factory=list)  # of the loop
    overheads: list[float] = field(default_factory=list)  # that time over the time of bare steps
    own_overheads: list[float] = field(default_factory=list)  # the same without workers
    waits: list[float] = field(default_factory=list)  # share of the loop's time spent waiting for batches

    def steps(self, loop: omni.train.loop.Loop) -> Iterator[list[dict]]:
        """Replaces ``Loop.steps``."""
        training = loop.training
        self.stage, steps, kept = training.run.stage.name, STEPS(loop), []
        for block in range(1 + self.sizes.blocks):
            for _ in range(PREFETCHED * training.config.num_workers):
                yield next(steps)
            looped, wait, started = [], 0.0, time.perf_counter()
            for _ in range(self.sizes.block_steps):
                asked = time.perf_counter()
                looped.append(next(steps))
                wait += time.perf_counter() - asked
                yield looped[-1]  # resumes when the loop asks for the next
            seconds = time.perf_counter() - started
            others = [next(steps) for _ in looped]
            bare = bare_seconds(training, others)
            bare = bare * bare_seconds(training, looped) / bare_seconds(training, others)
            if block > 0:  # the first one warms up
                self.seconds.append(seconds)
                self.overheads.append(seconds / bare)
                self.waits.append(wait / seconds)
                kept.append(looped)
        steps.close()  # ends the loader's workers
        for looped in kept:
            bare_seconds(training, looped)  # makes the kernels for these shapes
            started = time.perf_counter()
            yield from looped
            seconds = time.perf_counter() - started
            self.own_overheads.append(seconds / bare_seconds(training, looped))
        raise Enough


def bare_seconds(training: Training, steps: list[list[dict]]) -> float:
    started = time.perf_counter()
    for micro_batches in steps:
        bare_step(training, micro_batches)
    return time.perf_counter() - started


def bare_step(training: Training, micro_batches: list[dict]) -> None:
    """Forward, backward and optimizer of each phase, and nothing else."""
    micro_batches = [batch | {"step": training.progress.step} for batch in micro_batches]
    for phase in training.begun_phases(training.progress.step):
        phase.optimizer.zero_grad(set_to_none=True)
        for batch in micro_batches:
            with training.run.autocast():
                loss, _ = phase.loss(phase.module, batch)
            (loss / len(micro_batches)).backward()
        phase.optimizer.step()
        if phase.after_update is not None:
            phase.after_update(torch.ones(()))


def bench_loop(bench: Bench) -> None:
    """The real scripts on the demo's data: time of a step in the loop, with loading, clipping, checks and logs but
    without validation and checkpoints, over that of the bare step; the same without loading, for the loop alone; and
    the share of the time that the loop waits for batches.

    Stage D trains its codec, stage F makes steps before ``adv_start_step``, and stage E trains on the held-out files,
    whose features take seconds.
    """
    for letter in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            config = loop_config(letter, bench.configs, folder)
            try:
                config.check_files()
            except UserError as error:
                for figure in ("overhead", "own_overhead", "loader_share"):
                    bench.leave_out(f"loop/{letter}/{figure}", str(error))
                continue
            path = Path(folder) / "config.json"
            path.write_text(config.model_dump_json())
            watch = watched_run(letter, path, bench.sizes)
        ms = 1000 * statistics.median(watch.seconds) / bench.sizes.block_steps
        note = f"step of {watch.stage} in the loop over forward, backward and optimizer alone; {ms:.0f} ms"
        bench.add(f"loop/{letter}/overhead", statistics.median(watch.overheads), "x", note)
        note = "the same on batches that are ready, without loader workers, which share the cores"
        bench.add(f"loop/{letter}/own_overhead", statistics.median(watch.own_overheads), "x", note)
        share = statistics.median(watch.waits)
        note = f"of the loop's time is waiting for batches, num_workers {config.num_workers}"
        bench.add(f"loop/{letter}/loader_share", 100 * share, "%", note)


def loop_config(letter: str, configs: Path, folder: str) -> StageConfig:
    """The demo config in an empty folder, with unlimited steps, no validation and no checkpoints."""
    keys = {"save_dir": f"{folder}/run", "max_steps": NEVER, "val_freq": NEVER, "checkpoint_freq": NEVER}
    if letter == "D":
        keys |= {"codec_steps": NEVER, "audio_ckpt": None}
    config = read_config(letter, configs, **keys)
    if letter == "E":
        sources = ("text_path", "image_manifest", "asr_csv", "question_csv", "speech_csv")
        held_out = {key: path for key in sources if (path := getattr(config, f"val_{key}")) is not None}
        if "question_csv" in held_out:  # they are many
            held_out["question_csv"] = held_out["asr_csv"]
        config = config.model_copy(update=held_out | {f"val_{key}": None for key in held_out})
    return config


def watched_run(letter: str, config: Path, sizes: Sizes) -> Watch:
    """Run the stage's script in this process, until its steps have been timed."""
    watch, said = Watch(sizes), io.StringIO()
    script = importlib.import_module(STAGES[letter].script.removesuffix(".py"))
    with (
        mock.patch.object(omni.train.loop.Loop, "steps", lambda loop: watch.steps(loop)),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        contextlib.suppress(Enough),
    ):
        script.main(["--config", str(config), "--device", "cpu"])
        raise RuntimeError(f"{STAGES[letter].script} ended before its steps were timed:\n{said.getvalue()}")
    return watch


# --- Answers and speech ----------------------------------------------------------------------------------------------


def bench_generate(bench: Bench) -> None:
    """Greedy tokens of the demo Thinker over those of ``transformers.generate``, with the same weights and prompts.
    ``greedy_answers``, which validation uses, answers eight prompts at once."""
    model = omni_of_text(bench.configs).eval()
    thinker, new = model.thinker, bench.sizes.new_tokens
    theirs = opened(transformers.Qwen3ForCausalLM, *as_qwen3(thinker))["sdpa"].eval()
    theirs.generation_config.eos_token_id = None  # no answer ends early, on either side
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    prompts = torch.randint(thinker.architecture.vocab_size, (8, bench.sizes.prompt))
    lengths = torch.full((8,), bench.sizes.prompt)
    ours = {
        1: lambda: list(thinker.generate(prompts[0].tolist(), max_new_tokens=new)),
        8: lambda: greedy_answers(thinker, thinker.embed_tokens(prompts), lengths, new, stop_ids=(-1,)),
    }
    for batch, answer in ours.items():
        mask = torch.ones_like(prompts[:batch])
        generate = partial(theirs.generate, prompts[:batch], attention_mask=mask, **settings)
        times = bench.medians({"ours": answer, "theirs": generate}, repeats=7)
        note = f"over transformers.generate; {batch * new / times['ours']:,.0f} tokens/s"
        bench.add(f"generate/batch_{batch}", times["theirs"] / times["ours"], "x", note)


def bench_speak(bench: Bench) -> None:
    """Speech of a sentence: computing time over its duration, and time to its first piece. Griffin-Lim makes a single
    piece."""
    torch.manual_seed(0)
    talker, codec, origin = speaking_parts(bench)
    if bench.vocoder_ckpt is None:
        vocoder = fold_weight_norm(build_generator(read_config("F", bench.configs).architecture)).eval()
    else:
        vocoder = open_model("vocoder", bench.vocoder_ckpt).model
    kinds = {"hifigan": vocoder, "griffin_lim": None}
    speakers = {name: Speaker(talker, codec, vocoder) for name, vocoder in kinds.items()}
    parts: dict[str, Callable[[], object]] = {}
    for name, speaker in speakers.items():
        parts[f"{name}/first"] = lambda speaker=speaker: next(speaker.stream(TEXT))
        parts[f"{name}/all"] = lambda speaker=speaker: list(speaker.stream(TEXT))
    times = bench.medians(parts, repeats=5)
    for name, speaker in speakers.items():
        seconds = sum(len(piece) for piece in speaker.stream(TEXT)) / speaker.spec.sample_rate
        note = origin if name == "griffin_lim" else f"{origin}, vocoder of {bench.vocoder_ckpt or 'random weights'}"
        heard = f"computing over {seconds:.1f} s of speech; {note}"
        bench.add(f"speak/{name}/real_time_factor", times[f"{name}/all"] / seconds, "x", heard)
        bench.add(f"speak/{name}/first_sound", times[f"{name}/first"], "s", note)


def speaking_parts(bench: Bench) -> tuple[Talker, Codec, str]:
    """Talker and codec, and the origin of their weights."""
    if bench.talker_ckpt is not None:
        talker, codec = (open_model(part, bench.talker_ckpt).model for part in ("talker", "rvq"))
        return talker, codec, f"talker of {bench.talker_ckpt}"
    config = read_config("D", bench.configs)
    if config.voice_layers:
        config = config.model_copy(update={"speakers": ["any"]})  # the script takes the names from the data
    talker, codec = Talker(config.architecture).eval(), Codec(config.codec.architecture).eval()
    with torch.no_grad():
        talker.depth.heads[0, :, -1] = 0.0  # random weights might end the sentence at its first frame
    return talker, codec, "talker of random weights"


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def bench_checkpoint(bench: Bench) -> None:
    """Time for sealed, synced and verified files, over ``torch.save`` and ``torch.load``."""
    payload = {"format": checkpoint.FORMAT_VERSION, "weights": torch.randn(bench.sizes.checkpoint_floats)}
    with tempfile.TemporaryDirectory() as folder:
        path, plain = Path(folder) / "sealed_step_1.pt", Path(folder) / "plain.pt"
        parts = {
            "save": lambda: checkpoint.save(path, payload),
            "torch.save": lambda: torch.save(payload, plain),
            "load": lambda: checkpoint.load(path),
            "torch.load": lambda: torch.load(plain, weights_only=True),
        }
        times = bench.medians(parts, repeats=5)
    megabytes = bench.sizes.checkpoint_floats * 4 / 1e6
    for name in ("save", "load"):
        note = f"over torch.{name}, time for {megabytes:.0f} MB; {times[name]:.2f} s"
        bench.add(f"checkpoint/{name}", times[name] / times[f"torch.{name}"], "x", note)


# --- Starting --------------------------------------------------------------------------------------------------------


class SmallTraining:
    """A small Thinker on a made-up corpus, started repeatedly, and killed after its first step."""

    def __init__(self, folder: str, lines: int) -> None:
        self.folder, corpus, self.started = Path(folder), Path(folder) / "corpus.txt", 0
        with open(corpus, "w") as file:
            file.writelines(f"line {i} says {i * 7919 % 1000} and then {i % 977}\n" for i in range(lines))
        keys = {
            "save_dir": f"{folder}/run", "train_text": str(corpus), "vocab_size": 512, "ctx_len": 64, "n_layers": 1,
            "d_model": 32, "n_heads": 2, "d_ff": 64, "max_epochs": 1, "batch_size": 8, "num_workers": 2,
            "use_amp": False, "print_freq": 1, "val_split": 0.001, "val_freq": NEVER, "checkpoint_freq": NEVER,
        }  # fmt: skip
        config = self.folder / "config.json"
        config.write_text(json.dumps(keys))
        self.command = [sys.executable, str(ROOT / "train_text.py"), "--config", str(config), "--device", "cpu"]
        # prepares tokenizer and token cache; stopped, not killed, it leaves a checkpoint
        _, self.total_steps = self.first_step("run", end=subprocess.Popen.terminate)

    def first_step(
        self, save_dir: str, end: Callable[[subprocess.Popen], None] = subprocess.Popen.kill
    ) -> tuple[int, int]:
        """Start, wait for the first step, ``end`` it.

        Returns:
            That step, and the total number of steps.
        """
        line = [*self.command, "--set", f"save_dir={self.folder / save_dir}"]
        # no stderr, where orphaned workers report the kill
        environment = {
            name: value for name, value in os.environ.items() if name != allocator.VARIABLE
        }  # as users start it
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
        for line in process.stdout:
            if line.startswith("step "):
                end(process)
                process.wait()
                step, total_steps = line.split()[1].split("/")
                return int(step), int(total_steps)
        raise RuntimeError("the run ended before its first step")

    def fresh(self) -> int:
        """First step of a new run with the tokenizer and the token cache of the first."""
        self.started += 1
        save_dir = self.folder / f"fresh_{self.started}"
        save_dir.mkdir()
        (save_dir / "tokenizer.json").write_bytes((self.folder / "run" / "tokenizer.json").read_bytes())
        return self.first_step(save_dir.name)[0]


def bench_resume(bench: Bench) -> None:
    """Time to the first step on a million-line corpus: resumed at 99 % over fresh, both with a token cache."""
    with tempfile.TemporaryDirectory() as folder:
        training = SmallTraining(folder, bench.sizes.corpus_lines)
        ((_, path),) = checkpoint.step_files(Path(folder) / "run", "thinker")
        late = int(0.99 * training.total_steps)
        payload = checkpoint.load(path) | {"step": late, "validated_step": late}
        path.unlink()
        checkpoint.save(path.with_name(f"thinker_step_{late}.pt"), payload)
        steps = set()
        parts = {
            "fresh": lambda: steps.add(training.fresh()),
            "resumed": lambda: steps.add(training.first_step("run")[0]),
        }
        times = bench.medians(parts, repeats=5)
        assert steps == {1, late + 1}, steps
    note = f"at step {late} of {training.total_steps} over a fresh start; {times['resumed']:.2f} s"
    bench.add("resume/first_step", times["resumed"] / times["fresh"], "x", note)


def bench_startup(bench: Bench) -> None:
    """Time of ``--help``, and of the first step of a small training with tokenizer and token cache, over the time of
    ``import torch``."""

    def python(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    with tempfile.TemporaryDirectory() as folder:
        training = SmallTraining(folder, SMOKE.corpus_lines)
        parts = {
            "torch": lambda: python("-c", "import torch"),
            "help": lambda: python(str(ROOT / "train_text.py"), "--help"),
            "first_step": training.fresh,
        }
        times = bench.medians(parts, repeats=5)
    for name, what in (("help", "train_text.py --help"), ("first_step", "first step of train_text.py")):
        note = f'{what}, over python -c "import torch"; {times[name]:.2f} s over {times["torch"]:.2f} s'
        bench.add(f"startup/{name}", times[name] / times["torch"], "x", note)


# --- Command line ----------------------------------------------------------------------------------------------------

PARTS = {
    "train": bench_train, "loop": bench_loop, "generate": bench_generate, "speak": bench_speak,
    "checkpoint": bench_checkpoint, "resume": bench_resume, "startup": bench_startup,
}  # fmt: skip


def machine() -> dict:
    """Machine, versions and settings of the figures."""
    names = [line.partition(":")[2].strip() for line in cpu_facts() if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": os.environ.get(allocator.VARIABLE, "as it is"),
    }


def cpu_facts() -> list[str]:
    path = Path("/proc/cpuinfo")  # on Linux
    return path.read_text().splitlines() if path.exists() else []


def earlier_figures(path: Path) -> dict[str, dict]:
    """The figures in ``path`` if they are of this machine and these versions; {} if there is no such file.

    Raises:
        UserError: it is another file, which would be lost.
    """
    if not path.exists():
        return {}
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return written["figures"] if written["machine"] == machine() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--json {path}: expected a new file, or one of this script") from error


def write_figures(path: Path, figures: dict[str, dict]) -> None:
    """Add to the figures in ``path``, if they are of this machine and these versions; else replace them."""
    facts, kept = machine(), earlier_figures(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y-%m-%d %H:%M")
    write_json(path, {"machine": facts, "date": date, "figures": kept | figures})


def target_of(name: str) -> tuple[str, Callable[[float], bool]] | None:
    """The target of a figure, in words and as a condition; None if it has none."""
    if name.endswith("/as_users_run_it"):
        return "at least 1.6", lambda value: value >= 1.6
    if name.startswith("train/") and not name.endswith("matmul_share"):
        return "at least 1.3", lambda value: value >= 1.3
    if name == "generate/batch_1":
        return "at least 3.5", lambda value: value >= 3.5
    if name.startswith("loop/") and name.endswith("/overhead"):
        return "at most 1.10", lambda value: value <= 1.10
    if name.startswith("loop/") and name.endswith("/own_overhead"):
        return "at most 1.03", lambda value: value <= 1.03
    if name == "speak/hifigan/first_sound":
        return "at most 0.15 s", lambda value: value <= 0.15
    if name.endswith("/real_time_factor"):
        return "below 0.5", lambda value: value < 0.5
    return None


def page(written: dict, command: str) -> str:
    """The page of the figures ``written``."""
    facts = ", ".join(f"{name} {value}" for name, value in written["machine"].items())
    lines = ["# Speed", "", f"`{command}`, {written['date']}: {facts}.", "", " ".join(__doc__.split("\n\n")[0].split())]
    lines += ["", "| figure | value | target | what |", "| --- | ---: | --- | --- |"]
    for name, figure in written["figures"].items():
        value, target = figure["value"], target_of(name)
        shown = "-" if value is None else f"{value:.2f} {figure['unit']}".replace(" x", "")
        wanted = "" if target is None or value is None else target[0] + ("" if target[1](value) else ": **missed**")
        lines.append(f"| {name} | {shown} | {wanted} | {figure['note']} |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of: {', '.join(PARTS)}; default: all")
    parser.add_argument("--json", type=Path, default=ROOT / "checkpoints/bench.json", metavar="FILE", help="figures")
    parser.add_argument("--page", type=output_file, metavar="FILE.md", help="file for a table of figures and targets")
    parser.add_argument(
        "--configs", type=Path, default=ROOT / "configs", metavar="DIR", help="folder of the *_demo.json"
    )
    parser.add_argument("--talker_ckpt", type=Path, metavar="DIR", help="folder of stage D; default: random weights")
    parser.add_argument("--vocoder_ckpt", type=Path, metavar="DIR", help="folder of stage F; default: random weights")
    parser.add_argument("--smoke", action="store_true", help="small sizes and one repeat, as a test")
    args = parser.parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            raise UserError(f"{name}: expected one of {', '.join(PARTS)}")
    earlier_figures(args.json)  # raises for another file, before minutes of measuring
    if not list(args.configs.glob("*_demo.json")):
        raise UserError(f"--configs {args.configs}: expected a folder of the *_demo.json, found none")
    transformers.utils.logging.disable_progress_bar()
    keep_kernels()
    bench = Bench(SMOKE if args.smoke else Sizes(), args.configs, args.talker_ckpt, args.vocoder_ckpt)
    for name in args.parts or PARTS:
        PARTS[name](bench)
        write_figures(args.json, bench.figures)
    if args.page is not None:
        command = " ".join(["python benchmarks/bench.py", *sys.argv[1:]])
        _, heading, rest = (args.page.read_text(encoding="utf-8") if args.page.exists() else "").partition("\n## ")
        text = page(json.loads(args.json.read_text()), command) + heading + rest  # further sections stay
        args.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    allocator.restart_with_settings()  # both sides of a ratio have the same allocator
    launch(main)
