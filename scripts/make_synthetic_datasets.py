"""Make μOmni's built-in data: no download, the same files for the same settings.

    python scripts/make_synthetic_datasets.py                  # the data of the demo configs, eight to twelve minutes
    python scripts/make_synthetic_datasets.py --size smoke     # 20 MB, to try things out
    python scripts/make_synthetic_datasets.py --only audio     # one part
    python scripts/make_synthetic_datasets.py --size hour --only audio --out data/hour   # for configs/*_hour.json
    python scripts/make_synthetic_datasets.py --read_questions data/images/production_vqa.json \\
        --read_questions data/images/production_vqa.val.json   # written questions about pictures, read aloud

text:   data/text/tiny_corpus.txt, one sample a line; dialogues carry the chat tokens literally
audio:  data/audio/asr.csv (wav,text,voice,answer), many voices, some noise; tts.csv (text,wav,speaker,answer,
        question), four voices with a name and 24 others; answer: to what the recording asks, question: what the
        recording answers, a JSON list; "" for none
images: data/images/annotations.json ([{"image", "caption", "accepted_answers", "questions", "groups", "colour",
        "shape", "count"}, ...]), accepted_answers: every caption that is right; annotations.val.classes.json, captions
        with their classes, for zero-shot classification
ocr:    data/ocr/ocr.csv (image,text)

Beside each stands a held-out file (tiny_corpus.val.txt, asr.val.csv, ...) whose every sentence or picture shows a
combination that training never shows (omni/synthetic/holdout.py lists them). asr.val_voices.csv has voices that asr.csv
has not, tts.val_voices.csv some that tts.csv has not, ocr.val.csv words and fonts that ocr.csv has not. Some of the
sentences of asr.csv and tts.csv are beyond the small world, and all of asr_open.csv, which --size hour has beside
asr.csv, in the same voices; asr.val_open.csv (the voices of asr.val_voices.csv) and tts.val_open.csv have sentences
with words that none of them has. File names are relative to the folder they stand in.

--read_questions makes nothing but data/audio/production_questions.csv (wav,text,voice), question_csv of stage E: the
most frequent questions of these manifests, in the voices of asr.csv; production_questions.val.csv has other questions,
in the voices of asr.val_voices.csv.

Interrupt it when you like: the same line goes on where it was.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image
from tqdm import tqdm

from omni.common.errors import BadRow, Interrupted, OneLineErrors, RunError, UserError, reading_row
from omni.common.files import read_text
from omni.common.spoken import spoken_version
from omni.synthetic import facts, open_vocabulary, pictures, signs, speech, writing

TEXT_LINES = {"smoke": 2_000, "demo": 70_000, "hour": 70_000, "large": 1_000_000}
HELD_OUT_LINES = 2_000  # at most, and never more than a tenth of the training lines
HELD_OUT_SPEECH = ("asr.val", "asr.val_voices", "asr.val_open", "tts.val", "tts.val_voices", "tts.val_open")
CLIPS = {  # collection -> clips; a clip lasts about 2.5 s
    "smoke": {"asr": 48, "asr_open": 16, "tts": 48} | dict.fromkeys(HELD_OUT_SPEECH, 16),
    "demo": {"asr": 16_000, "tts": 12_000} | dict.fromkeys(HELD_OUT_SPEECH, 300),
    "hour": {"asr": 16_000, "asr_open": 24_000, "tts": 24_000} | dict.fromkeys(HELD_OUT_SPEECH, 300),
    "large": {"asr": 80_000, "tts": 36_000} | dict.fromkeys(HELD_OUT_SPEECH, 300),
}
# training, held out
PICTURES = {"smoke": (96, 32), "demo": (18_000, 1_000), "hour": (18_000, 1_000), "large": (100_000, 1_000)}
SIGNS = {"smoke": (96, 32), "demo": (64_000, 1_000), "hour": (64_000, 1_000), "large": (150_000, 1_000)}
HELD_OUT_QUESTIONS = 0.01  # share of the written questions that are read, val_split of configs/omni_sft_tiny.json
IMAGE_GROUP = 256  # images that one process draws: starting it costs about as much as drawing ten

# --- parts: what can be made ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lines:
    """A text file."""

    name: str
    lines: Iterator[str]


@dataclass(frozen=True)
class Collection:
    """A folder of wavs or images, and the manifest that lists them."""

    manifest: str  # a CSV or JSON file
    columns: tuple[str, ...]  # of the manifest; "wav" or "image" is the file, relative to the manifest's folder
    folder: str
    suffix: str  # of the files
    count: int  # files
    group: int  # files that one process makes
    # (index of the first, of the last + 1) of a group -> for each file its contents, and the manifest's other columns.
    # Called in a new process; the result depends on the arguments only.
    make: Callable[[int, int], Iterator[tuple[bytes, dict]]]
    beside: Lines | None = None  # one more file


@dataclass(frozen=True)
class Part:
    """One row of PARTS: files that are made, and made again, together."""

    version: int  # raise it with every change of what is written
    stamp: str  # file under --out that records how the others were made
    settings: Callable[[argparse.Namespace], dict]  # with the version, all that decides the bytes
    outputs: Callable[[dict], list[Lines] | list[Collection]]  # settings -> what is made, beside the stamp


def text_settings(args: argparse.Namespace) -> dict:
    lines = args.text_samples or TEXT_LINES[args.size]
    return {"seed": args.seed, "lines": lines, "held_out_lines": max(1, min(HELD_OUT_LINES, lines // 10))}


def text_lines(seed: int, n_lines: int, unseen: bool) -> Iterator[str]:
    """Line i depends on the seed and on i only: a smaller corpus is the beginning of a larger one."""
    split = "held-out" if unseen else "train"
    for i in tqdm(range(n_lines), desc=f"text, {split}", unit="line", disable=not sys.stderr.isatty()):
        yield writing.text_line(random.Random(f"text {split} {seed} {i}"), unseen)


def text_files(settings: dict) -> list[Lines]:
    return [
        Lines("tiny_corpus.txt", text_lines(settings["seed"], settings["lines"], unseen=False)),
        Lines("tiny_corpus.val.txt", text_lines(settings["seed"], settings["held_out_lines"], unseen=True)),
    ]


def audio_settings(args: argparse.Namespace) -> dict:
    settings = {"seed": args.seed, "clips": CLIPS[args.size]}
    if args.speech_text:
        digest = hashlib.sha256(read_text(args.speech_text, "text").encode()).hexdigest()
        read_as = spoken_version("en")
        settings["speech_text"] = {"file": str(Path(args.speech_text).resolve()), "sha256": digest} | read_as
    return settings


def question_settings(args: argparse.Namespace) -> dict:
    for path in args.read_questions:
        if not Path(path).is_file():
            raise UserError(f"--read_questions {path}: expected a file, found none")
    files = [
        {"file": str(Path(path).resolve()), "sha256": describe_file(Path(path))["sha256"]}
        for path in args.read_questions
    ]
    return {"seed": args.seed, "files": files, "questions": args.questions}


def question_collections(settings: dict) -> list[Collection]:
    """Recordings of written questions. The second file has those that stage E holds out, by the same hash of the text,
    if its ``val_split`` is ``HELD_OUT_QUESTIONS``; with another one it leaves rows of one of the files out."""
    texts = frequent_questions([one["file"] for one in settings["files"]], settings["questions"])
    sides: tuple[list[str], list[str]] = [], []
    for text in texts:
        sides[zlib.crc32(text.encode()) < HELD_OUT_QUESTIONS * 2**32].append(text)

    def collection(name: str, like: str, texts: list[str]) -> Collection:
        make = partial(speech.make_clips, like, settings["seed"], texts)
        folder = name.replace(".", "_")
        return Collection(f"{name}.csv", ("wav", "text", "voice"), folder, ".wav", len(texts), speech.GROUP, make)

    train, held_out = sides
    made = [collection("production_questions", "asr", train)]
    return made + [collection("production_questions.val", "asr.val_voices", held_out)] * bool(held_out)


def frequent_questions(paths: list[str], limit: int) -> list[str]:
    """The most frequent questions of manifests with the column ``questions`` that can be read aloud as they stand.

    Logs how many different ones are left out, and why.

    Raises:
        UserError: a row cannot be read, or there is no such question.
    """
    counts = Counter(text for path in paths for text in questions_of(path))
    ordered = sorted(counts, key=lambda text: (-counts[text], text))
    readable = [text for text in ordered if open_vocabulary.is_readable(text)]
    words = f"{open_vocabulary.WORDS[0]} to {open_vocabulary.WORDS[-1]} words, letters and , . ? ! ' - only"
    if not readable:
        raise UserError(f"{', '.join(paths)}: expected questions of {words}, found none among {len(ordered):,}")
    frequent = readable[:limit]
    groups = [(frequent[start : start + speech.GROUP],) for start in range(0, len(frequent), speech.GROUP)]
    unspeakable = {text for _, texts in in_processes(speech.unspeakable, groups, os.cpu_count()) for text in texts}
    chosen = [text for text in frequent if text not in unspeakable]
    if not chosen:
        raise UserError(f"{', '.join(paths)}: no voice has all sounds of any of {len(frequent):,} questions")
    share = sum(counts[text] for text in chosen) / counts.total()
    n_odd, n_rare = len(ordered) - len(readable), len(readable[limit:])
    print(
        f"{len(ordered):,} different questions = {len(chosen):,} to read + {n_odd:,} left out (not of {words}) + "
        f"{len(unspeakable):,} left out (with a sound that a voice lacks) + {n_rare:,} left out (rarer: --questions "
        f"{limit}); what is read is asked in {share:.0%} of all cases"
    )
    return chosen


def questions_of(path: str) -> Iterator[str]:
    """The questions of all rows of a manifest, as they stand in it."""
    from omni.data.open_manifest import load_manifest  # here: it imports torch

    with tempfile.TemporaryDirectory() as cache:
        manifest = load_manifest(path, ("image",), "image", cache_dir=cache, log=lambda line: None)
        for row in range(len(manifest)):
            try:
                with reading_row():
                    texts = [question for question, *_ in manifest[row].get("questions", ())]
                    "".join(texts)  # raises for what is no text
            except BadRow as error:
                raise UserError(f"{manifest.where(row)}: {error}") from error
            yield from texts


def audio_collections(settings: dict) -> list[Collection]:
    own = []
    if "speech_text" in settings:
        unseen = [name for name, one in speech.COLLECTIONS.items() if one.unseen]
        held_out = {
            text for name in unseen for text in speech.sentences(name, settings["seed"], settings["clips"][name])
        }
        own = own_sentences(settings["speech_text"]["file"], held_out)

    def collection(name: str, count: int) -> Collection:
        columns = (
            ("text", "wav", "speaker", "answer", "question")
            if name.startswith("tts")
            else ("wav", "text", "voice", "answer")
        )
        texts = speech.sentences(name, settings["seed"], count, own)
        make = partial(speech.make_clips, name, settings["seed"], texts)
        return Collection(f"{name}.csv", columns, name.replace(".", "_"), ".wav", count, speech.GROUP, make)

    return [collection(name, count) for name, count in settings["clips"].items()]


def own_sentences(path: str, held_out: set[str]) -> list[str]:
    """The sentences of the user's text that can be read aloud, without those that are ``held_out``.

    Raises:
        UserError: there are none.
    """
    usable, total = open_vocabulary.sentences_of(read_text(path, "text"))
    words = f"{open_vocabulary.WORDS[0]} to {open_vocabulary.WORDS[-1]} words"
    most = open_vocabulary.MAX_CHARACTERS
    expected = f"English sentences of {words} and up to {most} characters, of letters a to z and , . ? ! ' - only"
    usable = [text for text in usable if text not in held_out]
    if not usable:
        raise UserError(f"{path}: expected {expected}, found none among its {total:,} sentences")
    print(f"{path}: {len(usable):,} of {total:,} sentences can be used ({expected}, not held out)")
    return usable


def image_settings(sizes: dict[str, tuple[int, int]], args: argparse.Namespace) -> dict:
    train, held_out = sizes[args.size]
    return {"seed": args.seed, "train": train, "held_out": held_out}


def picture_collections(settings: dict) -> list[Collection]:
    columns = ("image", "caption", "accepted_answers", "questions", "groups", *pictures.ATTRIBUTES)
    classes = Lines("annotations.val.classes.json", pictures.class_captions())
    seen, unseen = (partial(make_pictures, settings["seed"], unseen) for unseen in (False, True))
    return [
        Collection("annotations.json", columns, "pictures", ".png", settings["train"], IMAGE_GROUP, seen),
        Collection(
            "annotations.val.json", columns, "pictures_val", ".png", settings["held_out"], IMAGE_GROUP, unseen, classes
        ),
    ]


def make_pictures(seed: int, unseen: bool, start: int, stop: int) -> Iterator[tuple[bytes, dict]]:
    for index in range(start, stop):
        image, annotation = pictures.picture(seed, index, unseen)
        yield image_bytes(image, pictures.SAVE), annotation


def sign_collections(settings: dict) -> list[Collection]:
    columns = ("image", "text")
    seen, unseen = (partial(make_signs, settings["seed"], unseen) for unseen in (False, True))
    return [
        Collection("ocr.csv", columns, "signs", ".png", settings["train"], IMAGE_GROUP, seen),
        Collection("ocr.val.csv", columns, "signs_val", ".png", settings["held_out"], IMAGE_GROUP, unseen),
    ]


def make_signs(seed: int, unseen: bool, start: int, stop: int) -> Iterator[tuple[bytes, dict]]:
    for index in range(start, stop):
        image, text = signs.sign(seed, index, unseen)
        yield image_bytes(image, signs.SAVE), {"text": text}


def image_bytes(image: Image.Image, save: dict) -> bytes:
    file = io.BytesIO()
    image.save(file, **save)
    return file.getvalue()


def example_settings(args: argparse.Namespace) -> dict:
    return {"seed": args.seed, "size": args.size}


def examples(settings: dict) -> list[Lines]:
    """Questions about the first held-out files of the other parts, for the web page (``--examples``)."""
    _, about = pictures.picture(settings["seed"], 0, unseen=True)
    spoken = speech.sentences("asr.val", settings["seed"], CLIPS[settings["size"]]["asr.val"])
    recording = next((i for i, text in enumerate(spoken) if text in facts.ANSWERS), 0)
    ask = [
        {"text": "What is your name?"},
        {"text": "What is the opposite of big?"},
        {"text": about["questions"][0][0], "files": ["../images/pictures_val/000000.png"]},
        {"text": "", "files": [f"../audio/asr_val/{recording:06d}.wav"]},
    ]
    shown = {"ask": ask, "read": ["../ocr/signs_val/000000.png"]}
    return [Lines("examples.json", iter(json.dumps(shown, indent=2).splitlines()))]


PARTS = {
    "text": Part(1, "text/tiny_corpus.json", text_settings, text_files),
    "audio": Part(8, "audio/speech.json", audio_settings, audio_collections),
    "images": Part(3, "images/pictures.json", partial(image_settings, PICTURES), picture_collections),
    "ocr": Part(2, "ocr/signs.json", partial(image_settings, SIGNS), sign_collections),
    "examples": Part(1, "examples/made.json", example_settings, examples),
}
QUESTIONS = Part(1, "audio/production_questions.json", question_settings, question_collections)  # made on request

# --- what is there already ------------------------------------------------------------------------------------------


def describe_file(path: Path) -> dict:
    """What the stamp says about a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def describe_folder(path: Path) -> dict:
    """What the stamp says about a folder: names and sizes, since reading gigabytes would take minutes."""
    sizes = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(path))
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()
    return {"files": len(sizes), "bytes": sum(size for _, size in sizes), "sha256_of_sizes": digest}


def is_current(stamp: dict, part: Part, settings: dict, folder: Path) -> bool:
    """Whether the files are there, were made with these settings, and are still what was written."""
    if stamp.get("generator_version") != part.version or stamp.get("settings") != settings:
        return False
    return all(
        (folder / name).is_file() and describe_file(folder / name) == {key: made[key] for key in ("bytes", "sha256")}
        for name, made in stamp["files"].items()
    ) and all(
        (folder / name).is_dir() and describe_folder(folder / name) == made
        for name, made in stamp.get("folders", {}).items()
    )


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


def names_in(stamp: dict | None) -> set[str]:
    """The names of the files and folders that a stamp lists; none that leads out of its folder."""
    listed = [] if stamp is None else [*stamp["files"], *stamp.get("folders", ())]
    return {name for name in listed if Path(name).name == name}


def make(part: Part, args: argparse.Namespace) -> None:
    """Make one part, or find it made already.

    Everything is complete under temporary names before the first file or folder gets its own. The stamp gets its name
    first: a kill among the renames leaves files that do not match the stamp, and the next run makes them again.
    """
    stamp_path = Path(args.out) / part.stamp
    folder = stamp_path.parent
    settings = part.settings(args)
    header = {"generator_version": part.version, "settings": settings}
    work = folder / f".{stamp_path.stem}.part"
    stamp = None if args.force else read_stamp(stamp_path)
    if stamp is not None and is_current(stamp, part, settings, folder):
        if work.exists():  # left by a kill after the last rename, or by --force
            with Journal(work, header):
                shutil.rmtree(work)
        print(f"{folder}: up to date ({', '.join(stamp['files'])})")
        return
    outputs = part.outputs(settings)
    if stamp is None and not args.force:
        lines = [o if isinstance(o, Lines) else o.beside for o in outputs]
        names = [one.name for one in lines if one is not None]
        names += [name for o in outputs if isinstance(o, Collection) for name in (o.manifest, o.folder)]
        foreign = [folder / name for name in names if (folder / name).exists()]
        if foreign:
            raise UserError(f"{foreign[0]}: exists, and was not made by this script. --force overwrites it")

    started = time.monotonic()
    try:
        if isinstance(outputs[0], Lines):
            stamp = make_lines(outputs, stamp_path, header)
        else:
            stamp = make_collections(outputs, stamp_path, work, header, args.processes, names_in(stamp))
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror}. The files that were there before are as they were") from error
    for name, made in stamp["files"].items():
        print(f"{folder / name}: {made['lines']:,} lines, {made['bytes'] / 1e6:.1f} MB")
    for name, made in stamp.get("folders", {}).items():
        print(f"{folder / name}/: {made['files']:,} files, {made['bytes'] / 1e6:.1f} MB")
    print(f"{folder}: made in {time.monotonic() - started:.0f} s")


def make_folder(folder: Path) -> None:
    """Raises UserError if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}. Choose another --out") from error


# --- text files -----------------------------------------------------------------------------------------------------


def make_lines(outputs: list[Lines], stamp_path: Path, header: dict) -> dict:
    """Write text files and their stamp; the temporary files go whatever happens."""
    folder = stamp_path.parent
    make_folder(folder)
    temporary = {name: folder / f".{name}.tmp" for name in (stamp_path.name, *(output.name for output in outputs))}
    try:
        stamp = header | {"files": {o.name: write_lines(temporary[o.name], o.lines) for o in outputs}}
        write_lines(temporary[stamp_path.name], iter([json.dumps(stamp, indent=2)]))
        for name, path in temporary.items():  # the stamp is the first of them
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return stamp


def write_lines(path: Path, lines: Iterable[str]) -> dict:
    """Write a UTF-8 file to disk and return what the stamp says about it."""
    n_lines = 0
    with path.open("wb") as file:
        for line in lines:
            file.write(line.encode() + b"\n")
            n_lines += 1
        file.flush()
        os.fsync(file.fileno())
    return {"lines": n_lines} | describe_file(path)


# --- wavs and images ------------------------------------------------------------------------------------------------


def make_collections(
    outputs: list[Collection], stamp_path: Path, work: Path, header: dict, n_processes: int, former: set[str]
) -> dict:
    """Write collections and their stamp in the place of the ``former`` files and folders, going on where an interrupted
    run with the same settings stopped."""
    folder = stamp_path.parent
    make_folder(work)
    with Journal(work, header) as journal:
        for output in outputs:
            (work / output.folder).mkdir(exist_ok=True)
        groups = [
            (output, start, min(start + output.group, output.count))
            for output in outputs
            for start in range(0, output.count, output.group)
        ]
        left = [group for group in groups if not journal.has(work, *group)]
        total = sum(stop - start for _, start, stop in groups)
        done = total - sum(stop - start for _, start, stop in left)
        quiet = not sys.stderr.isatty()
        bar = tqdm(total=total, initial=done, desc=folder.name, unit="file", disable=quiet, smoothing=0.02)
        results = in_processes(partial(make_group, work), left, n_processes)
        with bar, contextlib.closing(results):
            for (output, start, stop), rows in results:
                journal.add(output, start, rows)
                bar.update(stop - start)

        stamp = header | {"files": {}, "folders": {}}
        for output in outputs:
            rows = [row for start in range(0, output.count, output.group) for row in journal.rows(output, start)]
            stamp["files"][output.manifest] = write_lines(work / output.manifest, manifest_lines(output, rows))
            stamp["folders"][output.folder] = describe_folder(work / output.folder)
            if output.beside:
                stamp["files"][output.beside.name] = write_lines(work / output.beside.name, output.beside.lines)
        write_lines(work / stamp_path.name, [json.dumps(stamp, indent=2)])
        for name in former - names_in(stamp):  # of another --size: they would look like a part of these data
            with contextlib.suppress(FileNotFoundError):
                os.replace(folder / name, work / f"{name}.old")
        for name in (stamp_path.name, *stamp["folders"], *stamp["files"]):
            if (folder / name).is_dir():
                os.replace(folder / name, work / f"{name}.old")
            os.replace(work / name, folder / name)
        shutil.rmtree(work)
    return stamp


def make_group(work: Path, output: Collection, start: int, stop: int) -> list[dict]:
    """Write the files of one group; its rows, each with the file's name and its size in bytes."""
    rows = []
    for index, (contents, row) in zip(range(start, stop), output.make(start, stop), strict=True):
        name = f"{output.folder}/{index:06d}{output.suffix}"
        (work / name).write_bytes(contents)
        rows.append({"file": name, "bytes": len(contents), "row": row})
    return rows


def manifest_lines(output: Collection, rows: list[dict]) -> Iterator[str]:
    """A manifest, line by line: CSV with a header, or a JSON array."""
    records = [[row["row"].get(column, row["file"]) for column in output.columns] for row in rows]
    if output.manifest.endswith(".json"):
        yield "["
        for number, record in enumerate(records, 1):
            comma = "," if number < len(records) else ""
            yield json.dumps(dict(zip(output.columns, record, strict=True))) + comma
        yield "]"
        return
    for record in (output.columns, *records):
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(record)
        yield line.getvalue()


class Journal:
    """Which groups are finished: one line each in a file in the folder of the unfinished part.

    A file counts once its group stands here, with the size that it has here; so one that a kill or a power cut left
    half-written never does. The file's lock keeps a second process out.
    """

    def __init__(self, work: Path, header: dict) -> None:
        self.file = open(work / "journal.jsonl", "a+b")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{work}: another process is making these files. Wait for it, or stop it") from None
        self.file.seek(0)
        entries, end = [], 0
        for line in self.file.read().splitlines(keepends=True):
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # cut short by a kill
            end += len(line)
        self.file.truncate(end)
        if entries[:1] != [header]:
            for path in work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
            self.file.truncate(0)
            entries = [header]
            self._write(header)
        self.groups = {(entry["folder"], entry["start"]): entry["rows"] for entry in entries[1:]}

    def _write(self, entry: dict) -> None:
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def add(self, output: Collection, start: int, rows: list[dict]) -> None:
        self.groups[output.folder, start] = rows
        self._write({"folder": output.folder, "start": start, "rows": rows})

    def rows(self, output: Collection, start: int) -> list[dict]:
        return self.groups[output.folder, start]

    def has(self, work: Path, output: Collection, start: int, stop: int) -> bool:
        """Whether the group is finished and its files are still there."""
        rows = self.groups.get((output.folder, start), [])
        sizes = [(work / row["file"], row["bytes"]) for row in rows]
        whole = len(sizes) == stop - start  # another version may have made smaller groups
        return whole and all(path.is_file() and path.stat().st_size == size for path, size in sizes)


class Interrupt:
    """Handler of SIGINT and SIGTERM: raises Interrupted, but not in the midst of a fork, nor of a process's end.

    Python calls the hooks of `os.register_at_fork` and finalizers there, and an exception inside one is printed and
    lost.
    """

    def __init__(self) -> None:
        self.holding = self.wanted = False

    def __call__(self, signum: int, frame) -> None:
        self.wanted = True
        if not self.holding:
            self._stop()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self.holding = True
        yield
        self.holding = False
        if self.wanted:
            self._stop()

    def _stop(self) -> None:
        raise Interrupted("interrupted: what is finished is kept. Run the same line again")


interrupt = Interrupt()


def in_processes(function: Callable, tasks: list[tuple], n_processes: int) -> Iterator[tuple[tuple, object]]:
    """Yield (task, function(*task)) as they finish, each from a process that was forked for this task alone.

    Closing the generator kills the processes.

    Raises:
        OSError, UserError: a task's.
        RunError: a process ended without a result.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = iter(tasks), {}
    try:
        while True:
            while len(running) < n_processes and (task := next(waiting, None)) is not None:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_task_process, args=(function, task, sender))
                with interrupt.held():
                    process.start()
                    running[receiver] = task, process
                sender.close()
            if not running:
                return
            for receiver in connection.wait(list(running)):
                task, process = running[receiver]
                try:
                    result = receiver.recv()
                except EOFError:
                    process.join()
                    raise RunError(f"the process for {task[1:]} ended with code {process.exitcode}") from None
                with interrupt.held():
                    process.join()
                    receiver.close()
                    process.close()
                    del running[receiver]
                if isinstance(result, (OSError, UserError)):
                    raise result
                yield task, result
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _task_process(function: Callable, task: tuple, sender: connection.Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the main one ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        result = function(*task)
    except (OSError, UserError) as error:
        result = error
    with contextlib.suppress(BrokenPipeError):  # the main process was killed
        sender.send(result)


# --- command line ---------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text}")
    return value


def parse_args() -> argparse.Namespace:
    parser = OneLineErrors(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Files that are there already, made with the same settings, are left alone.\n"
        "Exit codes: 0 made or up to date, 1 failed, 2 bad arguments, 75 interrupted.",
    )
    parser.add_argument("--out", default="data", metavar="DIR", help="folder to write to (default: data)")
    parser.add_argument("--size", choices=TEXT_LINES, default="demo", help="how much of everything (default: demo)")
    parser.add_argument("--text_samples", type=positive, metavar="N", help="lines of training text, instead of --size")
    parser.add_argument(
        "--speech_text", metavar="FILE", help="text of yours, whose sentences are read aloud beside the built-in ones"
    )
    parser.add_argument(
        "--read_questions",
        action="append",
        metavar="FILE",
        help="manifest of pictures with written questions, to be read aloud; repeatable; makes nothing else",
    )
    parser.add_argument(
        "--questions",
        type=positive,
        default=20_000,
        metavar="N",
        help="with --read_questions, the N most frequent ones (default: 20000; about 1.3 GB and 5 minutes on 2 cores)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another sample (default: 0)")
    parser.add_argument("--only", choices=PARTS, help="make one part (default: all of them)")
    parser.add_argument("--force", action="store_true", help="make the files again, also over other files")
    parser.add_argument(
        "--processes", type=positive, default=os.cpu_count(), metavar="N", help="(default: all cores; changes no file)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.speech_text == "":
        raise UserError("--speech_text: expected the name of a file, found none")
    if args.speech_text and args.only not in (None, "audio"):
        raise UserError(f"--speech_text: has no effect with --only {args.only}")
    if args.read_questions and (args.only or args.speech_text):
        raise UserError("--read_questions: expected neither --only nor --speech_text beside it, it makes nothing else")
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    if args.read_questions:
        make(QUESTIONS, args)
        return
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
