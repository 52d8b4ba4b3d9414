"""The golden check: a change that should change no result changes no bit.

    make golden            run, print the digests, and compare them with dev/golden.json
    make golden ARGS=--write   run, and make them the new reference

Each demo config takes 40 steps on the built-in data; then come an export, answers to a text, a picture and a recording,
and a spoken sentence. It prints the digests of every loss, of all weights, of the answers and of the samples. They do
not depend on names: a renamed weight or metric keeps its digest. They depend on the processor: compare on one machine.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omni.train.device import pick_amp_dtype

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "dev" / "golden.json"
STEPS = 40
# script, demo config, overrides; a folder in braces is that of another of these stages
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "thinker": ("train_text.py", "thinker", ()),
    "audio_enc": ("train_audio_enc.py", "audio_enc", ()),
    "vision": ("train_vision.py", "vision", ()),
    "ocr": ("train_ocr.py", "ocr", ()),
    "talker": (
        "train_talker.py",
        "talker",
        (f"codec_steps={STEPS}", f"aligner_steps={STEPS}", "val_sentences=4", "audio_ckpt={audio_enc}"),
    ),
    "vocoder": ("train_vocoder.py", "vocoder", ("adv_start_step=20", "val_clips=4", "codec_ckpt={talker}")),
    "omni": (
        "sft_omni.py",
        "omni_sft",
        (
            "val_items=4",
            "thinker_ckpt={thinker}",
            "audio_ckpt={audio_enc}",
            "vision_ckpt={vision}",
            "talker_ckpt={talker}",
        ),
    ),
}
# Stages that can run side by side
ROWS = (("thinker", "audio_enc"), ("vision", "ocr", "talker"), ("omni", "vocoder"))
NOT_COMPARED = ("_per_s", "memory", "step", "epoch")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"make the digests the reference, {REFERENCE.name}")
    parser.add_argument(
        "--only", nargs="*", choices=RUNS, metavar="STAGE", help="of thinker, audio_enc, ... these alone"
    )
    parser.add_argument("--keep", metavar="DIR", help="work there, and leave it: default: a temporary folder")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="omni_golden_"))
        found = {"processor": processor()} | digests(Path(folder).resolve(), args.only)
    for name, value in found.items():
        print(f"{name:24} {value}")
    if args.write:
        REFERENCE.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    expected = json.loads(REFERENCE.read_text())
    if expected["processor"] != found["processor"]:
        print(f"the reference is of another processor ({expected['processor']}): nothing to compare with")
        return 0
    if args.only:
        expected = {name: value for name, value in expected.items() if name in found}
    changed = [name for name in expected | found if expected.get(name) != found.get(name)]
    print(
        f"changed: {', '.join(changed)}" if changed else f"all {len(found) - 1} digests are those of {REFERENCE.name}"
    )
    return 1 if changed else 0


def digests(folder: Path, only: list[str] | None = None) -> dict[str, str]:
    """Run everything, or ``only`` some stages and those that they need, below ``folder``; returns digests by name."""
    if not (ROOT / "data" / "text" / "tiny_corpus.txt").exists():
        run("scripts/make_synthetic_datasets.py")
    found = {}
    wanted = needed(only) if only else set(RUNS)
    for row in ROWS:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda name: train(name, folder), [name for name in row if name in wanted]))
    for name in RUNS:
        if name not in wanted:
            continue
        found[f"{name} losses"] = of_metrics(folder / name / "metrics.jsonl")
        for path in sorted((folder / name).glob("*.pt")):
            if "_step_" not in path.name:
                found[f"{name}/{path.name}"] = of_weights(torch.load(path, weights_only=True)["model"])
    if only:
        return found
    export = folder / "export"
    options = {"thinker": "thinker", "audio": "audio_enc", "vision": "vision", "talker": "talker"}
    options |= {"vocoder": "vocoder", "ocr": "ocr", "omni": "omni"}
    run("export.py", "--output_dir", export, *(w for k, v in options.items() for w in (f"--{k}_ckpt", folder / v)))
    found["export"] = of_weights(load_file(next(export.glob("*.safetensors"))))
    data = ROOT / "data"
    picture = sorted((data / "images" / "pictures_val").iterdir())[0]
    recording = sorted((data / "audio" / "asr_val").iterdir())[0]
    sign = sorted((data / "ocr" / "signs_val").iterdir())[0]
    for name, options in (
        ("answer", ("--text", "What is the opposite of hot?")),
        ("answer, drawn", ("--text", "Hello!", "--temperature", "0.9", "--top_k", "40", "--seed", "7")),
        ("answer about a picture", ("--image", picture, "--text", "What does the picture show?")),
        ("answer to a recording", ("--audio_in", recording)),
        ("sign", ("--ocr", "--image", sign)),
    ):
        found[name] = sha(run("infer_chat.py", "--ckpt_dir", export, "--max_new_tokens", "24", *options).encode())
    said = folder / "said.wav"
    run("infer_chat.py", "--ckpt_dir", export, "--say", "Anna is reading.", "--audio_out", said)
    found["spoken sentence"] = sha(np.ascontiguousarray(soundfile.read(said, dtype="int16")[0]).tobytes())
    return found


def needed(names: Iterable[str]) -> set[str]:
    """These stages, and those whose folders they name."""
    found = set(names)
    for name in tuple(found):
        found |= needed(other for other in RUNS if any(f"{{{other}}}" in override for override in RUNS[name][2]))
    return found


def train(name: str, folder: Path) -> None:
    script, config, overrides = RUNS[name]
    folders = {other: folder / other for other in RUNS}
    keys = [f"save_dir={folder / name}", f"cache_dir={folder}", f"max_steps={STEPS}", "warmup_steps=10"]
    keys += [f"val_freq={STEPS}", f"checkpoint_freq={STEPS}", "print_freq=1"]
    keys += [override.format(**folders) for override in overrides]
    run(script, "--config", f"configs/{config}_demo.json", "--device", "cpu", *(w for k in keys for w in ("--set", k)))


def run(*command: str | Path) -> str:
    """Run a script of this repository and return its stdout; exit if it fails."""
    words = [sys.executable, *map(str, command)]
    process = subprocess.run(words, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(words)}: exit code {process.returncode}\n{process.stderr}")
    return process.stdout


def sha(*chunks: bytes) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:16]


def of_weights(weights: dict[str, torch.Tensor]) -> str:
    """Digest of the tensors, whatever their names."""

    def of_one(tensor: torch.Tensor) -> bytes:
        flat = tensor.detach().contiguous().flatten()
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return sha(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), data).encode()

    return sha(*sorted(map(of_one, weights.values())))


def of_metrics(path: Path) -> str:
    """Digest of the figures of each step, whatever their names, without speed and memory."""
    return sha(*(" ".join(figures(json.loads(line))).encode() for line in path.read_text().splitlines()))


def figures(row: dict) -> Iterable[str]:
    values = (v for k, v in row.items() if isinstance(v, float) and not any(part in k for part in NOT_COMPARED))
    return [f"{row['step']}", *sorted(float(value).hex() for value in values)]


def processor() -> str:
    """Processor, its arithmetic and torch version, on which the bits depend."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    bf16 = ", bf16" if pick_amp_dtype(True, torch.device("cpu")) else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{bf16}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
