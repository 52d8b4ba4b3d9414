"""The counts of a test run as a part of docs/reliability.md, which `make torture` writes."""

import os
import platform
import re
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# promise -> the files with its tests
PROMISES = {
    "exact resume, wherever a run is killed": ("test_resume.py", "test_codec.py"),
    "checkpoints: atomic, checked, kept in order": ("test_checkpoint.py",),
    "signals; one process a folder": ("test_signals.py",),
    "each row once, read once": ("test_data.py", "test_corpus.py", "test_manifest.py"),
    "bad rows and hostile files": ("test_bad_rows.py",),
    "configs: wrong ones, changed ones": ("test_config.py",),
    "awkward folders, finished runs, losses not finite": ("test_environment.py",),
    "several processes": ("test_distributed.py",),
    "the tools that measure": ("test_bench.py", "test_first_steps.py"),
}
PARTS = ("tests", "fuzz")  # of the page: by `make torture`, by `make fuzz`
OUTCOMES = ("passed", "failed", "skipped")


def machine() -> str:
    """Processor, cores and versions, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{processor}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/reliability.md")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def page(reports: list[tuple[str, str, float]], made: str) -> str:
    """
    Args:
        reports: file of a test, its outcome ("" for what passed around it: set-up, tear-down), seconds.
        made: date, commit and machine, in one line.
    """
    counts, seconds = defaultdict(int), defaultdict(float)
    for file, outcome, duration in reports:
        counts[file, "failed" if outcome == "error" else outcome] += 1
        seconds[file] += duration
    promise_of = {file: promise for promise, files in PROMISES.items() for file in files}
    known = [file for file in promise_of if file in seconds]
    lines = [
        "# What `make torture` counted",
        "",
        f"{made}. Seconds of the tests themselves; several run at once.",
        "",
        "| promise | tests | passed | failed | skipped | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]

    def row(promise: str, name: str, files: list[str]) -> str:
        cells = [str(sum(counts[file, outcome] for file in files)) for outcome in OUTCOMES]
        return f"| {promise} | {name} | {' | '.join(cells)} | {sum(seconds[file] for file in files):.0f} |"

    for file in known + sorted(seconds.keys() - promise_of.keys()):
        lines.append(row(promise_of.get(file, "the parts of a stage"), file, [file]))
    return "\n".join([*lines, row("all", "", list(seconds)), ""])


def write(path: Path, stats: dict) -> None:
    """``stats``: pytest's reports by outcome."""
    reports = [
        (Path(report.nodeid.split("::")[0]).name, outcome, report.duration)
        for outcome in ("", "error", *OUTCOMES)
        for report in stats.get(outcome, [])
        if hasattr(report, "duration")
    ]
    made = f"{time.strftime('%Y-%m-%d')}, commit {commit()}, {machine()}"
    write_part(path, "tests", page(reports, made))


def write_part(path: Path, name: str, text: str) -> None:
    """Put ``text`` in the place of the part ``name`` of a page, and leave the other parts as they are."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = dict(re.findall(r"<!-- part (\w+) -->\n(.*?)<!-- end -->\n", old, re.DOTALL)) or {"tests": old}
    parts |= {name: text.rstrip("\n") + "\n"}
    written = [f"<!-- part {known} -->\n{parts[known]}<!-- end -->\n" for known in PARTS if parts.get(known)]
    path.write_text("\n".join(written), encoding="utf-8")
