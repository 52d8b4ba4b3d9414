"""What a training would see of its data, before it begins: any stage, from its config.

    python scripts/check_data.py --config configs/audio_enc_tiny.json
    python scripts/check_data.py --config configs/vision_tiny.json --set train_manifest=my_pictures.parquet

Runs the stage up to its first steps, in a folder of its own that is removed at the end; save_dir is not touched. Prints
rows by fate, with the reasons; lengths; characters and words, and those of held-out texts that no training text has;
texts and files that stand on both sides; the memory taken, the steps of an epoch and the hours of the whole training,
from some measured steps. --page writes a page (HTML, which loads nothing) with the lengths as pictures and thirty
samples as the model gets them: picture, sound, text, tokens.

Indexes and other preparations are kept where training will look for them. Stage E is measured without cached features.
Of stage D the codec is measured, which is trained first. Exit code 2 if the config or the data cannot be used.
"""

import argparse
import re
import resource
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omni.common.errors import BadRow, UserError, reading_row
from omni.data.audio import audio_length
from omni.data.lines import count_lines, read_chunks, split_samples
from omni.data.manifest import ManifestDataset, spread
from omni.data.text_rows import text_files
from omni.data.tokenizer import Tokenizer
from omni.stages import STAGES
from omni.stages.text import TextConfig
from omni.train import loop
from omni.train.cli import OneLineErrors, launch, output_file
from omni.train.config import Files, read_keys
from omni.train.stage import TOKENIZER, Stage
from omni.train.training import Training
from scripts.data_page import Sample, sample_of, write_page

_NAMED = 5  # rows to print for each kind; all are counted
_MOST_TEXTS = 200_000  # rows whose texts are compared
_WARM_UP = 3  # steps before the measured ones
# Stage -> what its measured steps do not tell
BEYOND = {
    "codec": " of the codec; aligner, coding and talker come after it",
    "omni": " without cached features (cache_features saves the encoders' share)",
}
_SHOWN, _MEASURED_LINES, _READ_BYTES = 30, 5_000, 64 << 20
# of a batch of one sample: its key -> what it counts
_LENGTHS = {
    "lengths": "mel frames", "target_lengths": "tokens of the text", "ends": "tokens of the caption",
    "sizes": "positions of the conversation",
}  # fmt: skip
_TEXTS = ("text", "caption")


class Enough(Exception):
    """All steps are measured: the training ends here."""


@dataclass
class Seen:
    """What the hooks find in a training."""

    training: Training
    name: str  # of the stage, or of its part that is trained first
    began: list[float] = field(default_factory=list)  # time at which each step began


@dataclass
class Findings:
    """The lines, lengths and samples of the report."""

    lines: list[str] = field(default_factory=list)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="config of any stage")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--page", metavar="FILE.html", type=output_file, help="write a page with pictures and thirty samples"
    )
    parser.add_argument("--read", default="500", metavar="N", help="rows of each file to read as training does, or all")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="steps to measure; 0: none")
    args = parser.parse_args(argv)
    if args.read != "all" and not args.read.isdecimal():
        raise UserError(f"--read {args.read}: expected a number of rows or all")
    if args.steps < 0:
        raise UserError(f"--steps {args.steps}: expected at least 0")
    stage, found = stage_of(args.config), Findings()
    with tempfile.TemporaryDirectory(prefix="check_data_") as folder:
        options = [*args.set, f"save_dir={folder}"] + ["cache_features=false"] * (stage.name == "omni")
        command = ["--config", args.config, "--device", args.device]
        seen = run_to_first_steps(stage, [*command, *(part for key in options for part in ("--set", key))], args.steps)
        for line in (Path(folder) / "training.log").read_text(encoding="utf-8").splitlines():
            if " rows = " in line or " lines = " in line:
                found.lines.append(line[20:])  # printed already, after its date
        tokenizer = Path(folder) / TOKENIZER
        check(seen, found, None if args.read == "all" else int(args.read), args.steps, tokenizer)
        if args.page:
            found.samples = list(samples_of(seen.training, stage, tokenizer if tokenizer.exists() else None))
            write_page(args.page, args.config, found.lines, found.lengths, found.samples)
            print(f"written: {args.page}")


def stage_of(config: str) -> Stage:
    """The stage whose config has the keys of a file."""
    keys = set(read_keys(config))
    stages = [stage for stage in STAGES.values() if stage.config is not None]
    return min(stages, key=lambda stage: len(keys - set(stage.config.model_fields)))


def run_to_first_steps(stage: Stage, argv: list[str], steps: int) -> Seen:
    """Run the stage's script until ``steps`` steps are measured, or its first training is about to begin."""
    found: list[Seen] = []

    def start(training: Training) -> None:
        found.append(Seen(training, training.run.stage.name))
        if not steps:
            raise Enough

    def step(run, number: int, rows) -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        found[0].began.append(time.perf_counter())
        if len(found[0].began) > steps + _WARM_UP:
            raise Enough

    loop.START_HOOKS.append(start)
    loop.STEP_HOOKS.append(step)
    try:
        import_module(stage.script.removesuffix(".py")).main(argv)
    except Enough:
        pass
    finally:
        loop.START_HOOKS.remove(start)
        loop.STEP_HOOKS.remove(step)
    return found[0]


# ---------------------------------------------------------------------------------------------------------------
# What is found


def parts_of(source) -> dict[str, ManifestDataset]:
    """The rows of a batch source by task or by held-out set; none for packed text."""
    if isinstance(source, ManifestDataset):
        return {"": source}
    if hasattr(source, "sources"):
        return source.sources
    tasks = getattr(source, "tasks", {})
    return tasks if isinstance(tasks, dict) else dict(zip(source.names, tasks, strict=True))


def check(seen: Seen, found: Findings, limit: int | None, steps: int, tokenizer: Path) -> None:
    training = seen.training
    train = parts_of(training.dataset.source)
    held_out = parts_of(training.validation.dataset.source) if training.validation else {}
    found.say()
    for side, parts in (("training", train), ("held out", held_out)):
        usable = [read_rows(found, f"{side}{name and f', {name}'}", part, limit) for name, part in parts.items()]
        if parts and not any(usable):
            raise UserError(f"{side}: not one of the rows that were read can be used")
    characters = getattr(training.config, "characters", None)
    if train:
        sides = ({name: texts_of(part) for name, part in parts.items()} for parts in (train, held_out))
        compare_texts(found, *sides, characters)
    else:
        check_lines(found, training.config, Tokenizer.load(tokenizer))
    report_cost(seen, found, steps)


def read_rows(found: Findings, name: str, part: ManifestDataset, limit: int | None) -> int:
    """Read rows as training reads them: which cannot be used, and how long the others are. Returns their number."""
    rows = np.arange(len(part)) if limit is None else spread(np.arange(len(part)), limit)
    bad, lengths = {}, {}
    for row in tqdm(rows, desc=f"reading {name}", unit="row", leave=False, disable=None):
        batch = part.batch(np.array([row]), 0)
        if (where := part.manifest.where(int(part.row_numbers[row]))) in batch["bad_rows"]:
            bad[where] = batch["bad_rows"][where]
            continue
        for key, what in _LENGTHS.items():
            if torch.is_tensor(batch.get(key)) and len(batch[key]):
                lengths.setdefault(what, []).append(int(batch[key].flatten()[0]) + (key == "ends"))
        if (seconds := seconds_of(part, int(row))) is not None:
            lengths.setdefault("seconds", []).append(seconds)
    kind = "all" if len(rows) == len(part) else f"{len(rows):,} of"
    found.say(f"{name}: read {kind} {len(part):,} rows: {len(rows) - len(bad):,} can be used, {len(bad):,} cannot")
    for where, why in list(bad.items())[:_NAMED]:
        found.say(f"  {where}: {why}")
    if len(bad) > _NAMED:
        found.say(f"  and {len(bad) - _NAMED:,} more")
    for what, values in lengths.items():
        tell_lengths(found, name, what, np.array(values))
    return len(rows) - len(bad)


def tell_lengths(found: Findings, name: str, what: str, values: np.ndarray) -> None:
    found.lengths[f"{name}: {what}"] = values
    cuts = "  ".join(f"{share}% {np.percentile(values, share):,.4g}" for share in (0, 50, 95, 99, 100))
    found.say(f"  {name}, {what}: {cuts}")


def seconds_of(part: ManifestDataset, row: int) -> float | None:
    fields = part.manifest[int(part.row_numbers[row])]
    if "wav" not in fields:
        return None
    try:
        with reading_row():
            samples, rate = audio_length(part.manifest.file(fields, "wav"))
    except BadRow:  # a recording that is not needed to read the row
        return None
    return samples / rate


def texts_of(part: ManifestDataset) -> Iterator[tuple[str, str]]:
    """The text of each row, and the file that the row names; of many rows, evenly spread."""
    for number in spread(part.row_numbers, _MOST_TEXTS):
        try:
            row = part.manifest[int(number)]
        except BadRow:
            continue
        text = next((row[name] for name in _TEXTS if isinstance(row.get(name), str)), "")
        column = next((name for name in ("wav", "image") if isinstance(row.get(name), str)), None)
        yield text, file_of(part, row, column) if column else ""


def file_of(part: ManifestDataset, row: dict, column: str) -> str:
    """The file itself, as two folders may have files of one name; of one that is missing, the name."""
    root = getattr(part, "image_root", None) or getattr(getattr(part, "config", None), "image_root", None)
    try:
        return str(part.manifest.file(row, column, root if column == "image" else None))
    except BadRow:
        return row[column]


def check_lines(found: Findings, config: TextConfig, tokenizer: Tokenizer) -> None:
    """What ``read_rows`` and ``compare_texts`` find, of the lines of stage A's files; of long files the beginning."""
    train, held_out = first_lines(found, config.train_text, 0.0 if config.val_text else config.val_split)
    if config.val_text:
        held_out, _ = first_lines(found, config.val_text, 0.0)
    for name, lines in (("training", train), ("held out", held_out)):
        if lines:
            ids = tokenizer.encode_batch(lines[:_MEASURED_LINES])
            tell_lengths(found, name, f"tokens of a line, of {len(ids):,}", np.array(list(map(len, ids))))
    sides = ({"": [(line, "") for line in lines]} if lines else {} for lines in (train, held_out))
    compare_texts(found, *sides, None)


def first_lines(found: Findings, files: Files, val_split: float) -> tuple[list[str], list[str]]:
    """The lines to train on and those that ``val_split`` holds out, of the first bytes of the files."""
    sides, read = ([], []), 0
    for path in text_files(files):
        row = 1
        for chunk in read_chunks(path):
            for line in split_samples(chunk, path, row):
                sides[zlib.crc32(line) < val_split * 2**32].append(line.decode())
            row, read = row + count_lines(chunk), read + len(chunk)
            if read >= _READ_BYTES:
                found.say(f"of {files if isinstance(files, str) else files[0]} the first {read / 1e6:.0f} MB were read")
                return sides
    return sides


def compare_texts(
    found: Findings,
    train: dict[str, Iterable[tuple[str, str]]],
    held_out: dict[str, Iterable[tuple[str, str]]],
    characters: str | None,
) -> None:
    """Characters and words; what held-out texts have and training texts lack; what stands on both sides. Both sides
    have a text and a file for each row."""
    letters, words, texts, files = Counter(), Counter(), set(), set()
    for part in train.values():
        for text, file in part:
            letters.update(text)
            words.update(words_of(text))
            texts.add(plain(text))
            files.add(file)
    if letters:
        found.say(f"characters: {len(letters)}: {''.join(sorted(letters))}")
        found.say(f"words: {words.total():,}, {len(words):,} of them different")
        if characters and (odd := {mark: count for mark, count in letters.items() if mark not in characters}):
            found.say(f"  not in the config's characters: {shown(odd)}")
    for name, part in held_out.items():
        new, unknown, same_text, same_file, count = Counter(), Counter(), [], [], 0
        for text, file in part:
            new.update(mark for mark in text if mark not in letters)
            unknown.update(word for word in words_of(text) if word not in words)
            same_text += [text] * (bool(text) and plain(text) in texts)
            same_file += [file] * (bool(file) and file in files)
            count += 1
        found.say(f"held out{name and f', {name}'}: {count:,} texts")
        found.say(f"  characters that no training text has: {shown(new) if new else 'none'}")
        found.say(f"  words that no training text has: {len(unknown):,} {', '.join(list(unknown)[:8])}")
        for what, same in (("texts", same_text), ("files", same_file)):
            examples = f", such as {same[0][:80]!r}" if same else ""
            found.say(f"  {what} that are in training too: {len(same):,}{examples}")


def words_of(text: str) -> list[str]:
    return re.findall(r"\w(?:[\w'-]*\w)?", text.casefold())


def plain(text: str) -> int:
    """A hash of a text's words, whatever their case and the blanks between them."""
    return hash(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{mark!r} {count:,}" for mark, count in sorted(counts.items(), key=lambda item: -item[1])[:20])


def report_cost(seen: Seen, found: Findings, steps: int) -> None:
    training = seen.training
    dataset, device = training.dataset, training.run.device
    found.say(
        f"{seen.name}: {len(dataset.source):,} samples, {dataset.steps_per_epoch:,} steps an epoch of "
        f"{dataset.samples_per_step} samples; {training.total_steps:,} steps are "
        f"{training.total_steps / dataset.steps_per_epoch:,.3g} epochs"
    )
    modules = [phase.module for phase in training.phases]
    tensors = [one for module in modules for one in (*module.parameters(), *module.buffers())]
    trained = [one for module in modules for one in module.parameters() if one.requires_grad]
    # a gradient and, for AdamW, two averages for each trained weight, in float32
    state = sum(one.numel() * one.element_size() for one in tensors) + 12 * sum(one.numel() for one in trained)
    state += sum(
        mean.nbytes for phase in training.phases if phase.average for mean in phase.average.state_dict().values()
    )
    found.say(
        f"memory: {sum(one.numel() for one in trained) / 1e6:.2f} M weights to train; with gradients and AdamW's two "
        f"averages {state / 1e9:.2f} GB, before any activation"
    )
    if len(seen.began) > _WARM_UP + 1:
        seconds = median(np.diff(seen.began[_WARM_UP:]).tolist())
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        hours = seconds * training.total_steps / 3600
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else peak_of_process_gb()
        whose = "on the device" if device.type == "cuda" else "of the whole process"
        beyond = BEYOND.get(training.run.stage.name, "")
        hours_for = f"{hours:.2g} h for {training.total_steps:,} steps{beyond}"
        found.say(f"measured on {where}: {seconds:.3g} s a step, so {hours_for}")
        found.say(f"  peak memory {whose}: {peak:.2f} GB")
    elif steps:
        found.say("the training ended before a step could be measured")


def peak_of_process_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def samples_of(training: Training, stage: Stage, tokenizer_path: Path | None) -> Iterator[Sample]:
    """Thirty samples, evenly spread over the training data."""
    source = training.dataset.source
    kind = stage.tokenizer
    tokenizer = kind.load(tokenizer_path) if kind is not None and tokenizer_path else None
    parts = parts_of(source)
    if not parts:  # packed text
        for row in spread(np.arange(len(source)), _SHOWN):
            yield sample_of(f"sequence {row}", {}, source.batch(np.array([row]), 0), None, tokenizer)
        return
    for number, (name, part) in enumerate(parts.items()):
        share = _SHOWN // len(parts) + (number < _SHOWN % len(parts))
        for row in spread(np.arange(len(part)), share):
            index = int(part.row_numbers[row])
            where, batch = part.manifest.where(index), part.batch(np.array([row]), 0)
            if where in batch["bad_rows"] or len(batch) == len(("n_targets", "bad_rows")):
                yield Sample(where, {"cannot be used": batch["bad_rows"].get(where, "")})
                continue
            fields = part.manifest[index]
            wav = part.manifest.file(fields, "wav") if "wav" in fields else None
            yield sample_of(f"{name} {where}".strip(), fields, batch, wav, tokenizer)


if __name__ == "__main__":
    launch(main)
