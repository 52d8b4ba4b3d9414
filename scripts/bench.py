"""Speed, as ratios: each figure is measured beside its reference in the same process, medians of alternating runs.

python scripts/bench.py            all of it, a few minutes on 2 cores
python scripts/bench.py resume     one part
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from omni import checkpoint
from omni.config import TextConfig
from omni.optim import build_adamw
from omni.runtime import pick_amp_dtype
from omni.thinker import Thinker, qwen3_config, to_qwen3_state_dict

ROOT = Path(__file__).resolve().parent.parent


def medians(parts: dict[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each part, the parts taking turns so that a noisy moment falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(warm_up + repeats):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            if repeat >= warm_up:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def demo_pair() -> tuple[TextConfig, Thinker, torch.nn.Module]:
    """The demo Thinker and the same weights in transformers."""
    keys = json.loads((ROOT / "configs/thinker_demo.json").read_text())
    config = TextConfig.model_validate(keys)
    torch.manual_seed(0)
    ours = Thinker(config)
    settings = qwen3_config(config, config.vocab_size, eos_id=0)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings))
    theirs.load_state_dict(to_qwen3_state_dict(ours.state_dict()), strict=False)
    return config, ours, theirs


def bench_train() -> None:
    config, ours, theirs = demo_pair()
    window = torch.randint(config.vocab_size, (config.batch_size, config.ctx_len + 1))
    tokens, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    dtype = pick_amp_dtype(config.use_amp, torch.device("cpu"))

    def step(model, optimizer, loss) -> None:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    optimizers = [build_adamw(model, lr=1e-4, wd=0.1) for model in (ours, theirs)]
    times = medians(
        {
            "ours": lambda: step(ours, optimizers[0], lambda: ours(tokens, targets=targets)[0]),
            # the shift happens inside: labels are the inputs, so one position less is predicted
            "theirs": lambda: step(theirs, optimizers[1], lambda: theirs(input_ids=tokens, labels=tokens).loss),
        },
        repeats=9,
        warm_up=2,
    )
    rate = tokens.numel() / times["ours"]
    print(
        f"train step, Thinker over Qwen3 of transformers, throughput: {times['theirs'] / times['ours']:.2f} x "
        f"({rate:,.0f} tokens/s)"
    )


def bench_generate() -> None:
    config, ours, theirs = demo_pair()
    ours.eval(), theirs.eval()
    prompt = torch.randint(config.vocab_size, (1, 16))
    new = 96
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    times = medians(
        {
            "ours": lambda: list(ours.generate(prompt[0].tolist(), max_new_tokens=new)),
            "theirs": lambda: theirs.generate(prompt, **settings),
        },
        repeats=7,
    )
    print(
        f"generation, over transformers.generate: {times['theirs'] / times['ours']:.2f} x "
        f"({new / times['ours']:.0f} tokens/s)"
    )


def bench_checkpoint() -> None:
    payload = {"format": checkpoint.FORMAT_VERSION, "weights": torch.randn(30_000_000)}
    with tempfile.TemporaryDirectory() as folder:
        path, plain = Path(folder) / "sealed_step_1.pt", Path(folder) / "plain.pt"
        times = medians(
            {
                "save": lambda: checkpoint.save(path, payload),
                "torch.save": lambda: torch.save(payload, plain),
                "load": lambda: checkpoint.load(path),
                "torch.load": lambda: torch.load(plain, weights_only=True),
            },
            repeats=5,
        )
    print(
        f"checkpoint of 120 MB, sealed, synced and verified: save {times['save'] / times['torch.save']:.1f} x "
        f"torch.save ({times['save']:.2f} s), load {times['load'] / times['torch.load']:.1f} x torch.load "
        f"({times['load']:.2f} s)"
    )


def bench_resume() -> None:
    """Time to the first step on a million-line corpus: resumed at 99 % over fresh, both with the token cache there."""
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        with open(corpus, "w") as file:
            file.writelines(f"line {i} says {i * 7919 % 1000} and then {i % 977}\n" for i in range(1_000_000))
        keys = {
            "save_dir": f"{folder}/run", "train_text": str(corpus), "vocab_size": 512, "ctx_len": 64, "n_layers": 1,
            "d_model": 32, "n_heads": 2, "d_ff": 64, "max_epochs": 1, "batch_size": 8, "num_workers": 2,
            "use_amp": False, "print_freq": 1, "val_split": 0.001, "val_freq": 10**9, "checkpoint_freq": 10**9,
        }  # fmt: skip
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(keys))
        command = [sys.executable, str(ROOT / "train_text.py"), "--config", str(config), "--device", "cpu"]

        def first_step(save_dir: str) -> int:
            """Start, wait for the first step, kill; returns that step."""
            line = [*command, "--set", f"save_dir={save_dir}"]
            # stderr: what the orphaned workers have to say about the kill
            process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for line in process.stdout:
                if line.startswith("step "):
                    process.kill()
                    process.wait()
                    return int(line.split()[1].split("/")[0])
            raise SystemExit("the run ended before its first step")

        def total_steps() -> int:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for line in process.stdout:
                if line.startswith("step "):
                    process.terminate()  # saves: the checkpoint to be moved to 99 %
                    process.wait()
                    return int(line.split()[1].split("/")[1])
            raise SystemExit("the run ended before its first step")

        total = total_steps()
        ((_, path),) = checkpoint.step_files(Path(folder) / "run", "thinker")
        late = int(0.99 * total)
        payload = checkpoint.load(path) | {"step": late, "validated_step": late}
        path.unlink()
        checkpoint.save(path.with_name(f"thinker_step_{late}.pt"), payload)
        fresh = iter(range(100))
        steps = set()
        times = medians(
            {
                "fresh": lambda: steps.add(prepare_fresh(folder, next(fresh), first_step)),
                "resumed": lambda: steps.add(first_step(f"{folder}/run")),
            },
            repeats=5,
        )
        assert steps == {1, late + 1}, steps
    print(
        f"first step of a million-line corpus, resumed at step {late} of {total} over fresh: "
        f"{times['resumed'] / times['fresh']:.2f} x ({times['resumed']:.2f} s over {times['fresh']:.2f} s)"
    )


def prepare_fresh(folder: str, number: int, first_step: Callable[[str], int]) -> int:
    """A fresh run with the tokenizer and the token cache of the first."""
    save_dir = Path(folder) / f"fresh_{number}"
    save_dir.mkdir()
    (save_dir / "tokenizer.json").write_bytes((Path(folder) / "run" / "tokenizer.json").read_bytes())
    return first_step(str(save_dir))


PARTS = {"train": bench_train, "generate": bench_generate, "checkpoint": bench_checkpoint, "resume": bench_resume}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of: {', '.join(PARTS)}; default: all")
    args = parser.parse_args()
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"{name}: expected one of {', '.join(PARTS)}")
    for name in args.parts or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
