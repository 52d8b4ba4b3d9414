"""Make μOmni's built-in data: no download, the same bytes for the same settings on every machine.

    python scripts/make_synthetic_datasets.py                  # what the demo configs train on, under a minute
    python scripts/make_synthetic_datasets.py --size smoke     # a few hundred kB, to try things out

Text: data/text/tiny_corpus.txt to train on, and data/text/tiny_corpus.val.txt, whose every line shows a combination
that training never shows (omni/world.py lists them). One sample a line; dialogues carry the chat tokens literally.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from omni import world
from omni.errors import Interrupted, RunError, UserError

GENERATOR_VERSION = 1  # raise it with every change of omni/world.py or of this file that changes what is written
TEXT_LINES = {"smoke": 2_000, "demo": 100_000, "large": 1_000_000}
HELD_OUT_LINES = 2_000  # at most, and never more than a tenth of the training lines

# --- parts: what can be made ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One row of PARTS: a set of files that are made, and made again, together."""

    stamp: str  # file under --out that records how the others were made
    settings: Callable[[argparse.Namespace], dict]  # all that decides the bytes
    files: Callable[[dict], dict[str, Iterator[str]]]  # settings -> {file name beside the stamp: its lines}


def text_settings(args: argparse.Namespace) -> dict:
    lines = args.text_samples or TEXT_LINES[args.size]
    return {"seed": args.seed, "lines": lines, "held_out_lines": max(1, min(HELD_OUT_LINES, lines // 10))}


def text_lines(seed: int, n_lines: int, unseen: bool) -> Iterator[str]:
    """Line i depends on the seed and on i only: a smaller corpus is the beginning of a larger one."""
    split = "held-out" if unseen else "train"
    for i in tqdm(range(n_lines), desc=f"text, {split}", unit="line", disable=not sys.stderr.isatty()):
        yield world.text_line(random.Random(f"text {split} {seed} {i}"), unseen)


def text_files(settings: dict) -> dict[str, Iterator[str]]:
    return {
        "tiny_corpus.txt": text_lines(settings["seed"], settings["lines"], unseen=False),
        "tiny_corpus.val.txt": text_lines(settings["seed"], settings["held_out_lines"], unseen=True),
    }


PARTS = {
    "text": Part("text/tiny_corpus.json", text_settings, text_files),
}

# --- writing --------------------------------------------------------------------------------------------------------


def write_lines(path: Path, lines: Iterator[str]) -> dict:
    """Write a UTF-8 file to disk and return what the stamp says about it."""
    digest, n_lines = hashlib.sha256(), 0
    with path.open("wb") as file:
        for line in lines:
            data = line.encode() + b"\n"
            digest.update(data)
            file.write(data)
            n_lines += 1
        file.flush()
        os.fsync(file.fileno())
    return {"lines": n_lines, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def is_current(stamp: dict, settings: dict, folder: Path) -> bool:
    """Whether the files are there, were made with these settings, and are still the bytes that were written."""
    if stamp.get("generator_version") != GENERATOR_VERSION or stamp.get("settings") != settings:
        return False
    for name, made in stamp["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != made["bytes"]:
            return False
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != made["sha256"]:
                return False
    return True


def read_stamp(path: Path) -> dict | None:
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read it: {error}. --force makes everything again") from error
    if not isinstance(stamp, dict) or "files" not in stamp:
        raise UserError(f"{path}: expected what this script writes there. --force makes everything again")
    return stamp


def make(part: Part, args: argparse.Namespace) -> None:
    """Make one part, or find it made already.

    All files are complete in temporary files before the first one gets its name. The stamp gets its name first: a
    kill among the renames leaves files that do not match the stamp, and the next run makes them again.
    """
    stamp_path = Path(args.out) / part.stamp
    folder = stamp_path.parent
    settings = part.settings(args)
    files = part.files(settings)
    if not args.force:
        stamp = read_stamp(stamp_path)
        if stamp is not None and is_current(stamp, settings, folder):
            print(f"{folder}: up to date ({', '.join(files)})")
            return
        foreign = [folder / name for name in files if stamp is None and (folder / name).exists()]
        if foreign:
            raise UserError(f"{foreign[0]}: exists, and was not made by this script. --force overwrites it")

    temporary = {name: folder / f".{name}.tmp" for name in (stamp_path.name, *files)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in temporary.values():
            path.write_bytes(b"")
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}. Choose another --out") from error
    try:
        made = {name: write_lines(temporary[name], lines) for name, lines in files.items()}
        stamp = {"generator_version": GENERATOR_VERSION, "settings": settings, "files": made}
        write_lines(temporary[stamp_path.name], iter([json.dumps(stamp, indent=2)]))
        for name, path in temporary.items():  # the stamp is the first of them
            os.replace(path, folder / name)
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror}. The files that were there before are as they were") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for name, info in made.items():
        print(f"{folder / name}: {info['lines']:,} lines, {info['bytes'] / 1e6:.1f} MB")


# --- command line ---------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text}")
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Files that are there already, made with the same settings, are left alone.\n"
        "Exit codes: 0 made or up to date, 1 failed, 2 bad arguments, 75 interrupted.",
    )
    sizes = ", ".join(f"{size} {lines:,} lines" for size, lines in TEXT_LINES.items())
    parser.add_argument("--out", default="data", metavar="DIR", help="folder to write to (default: data)")
    parser.add_argument("--size", choices=TEXT_LINES, default="demo", help=f"how much: {sizes} of text (default: demo)")
    parser.add_argument("--text_samples", type=positive, metavar="N", help="lines of training text, instead of --size")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another sample (default: 0)")
    parser.add_argument("--only", choices=PARTS, help="make one part (default: all of them)")
    parser.add_argument("--force", action="store_true", help="make the files again, also over other files")
    return parser.parse_args()


def interrupt(signum: int, frame) -> None:
    raise Interrupted("interrupted: no file has changed. Run the same line again")


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    for name, part in PARTS.items():
        if args.only in (None, name):
            make(part, args)


if __name__ == "__main__":
    try:
        main()
    except (UserError, RunError, Interrupted) as error:
        label = "" if isinstance(error, Interrupted) else "error: "
        print(f"{label}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
