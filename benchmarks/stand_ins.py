"""Stand-ins for the public data, in the layout in which these are published, of the built-in data.

``scripts/prepare_data.py --from`` makes of them what ``configs/*_tiny.json`` name. The pictures, signs and recordings
are those of the built-in data, in the sizes, rates and formats of the public ones. For ``first_steps.py``.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from scipy.signal import resample_poly

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 20  # one row in so many, where a held-out file is published


def spoken_texts(data: Path) -> list[str]:
    """Sentences of the built-in recordings, each once: they have more words than the built-in corpus."""
    rows = csv_rows(data / "audio/asr.csv") + csv_rows(data / "audio/tts.csv")
    return sorted({row["text"] for row in rows})


def tinystories(data: Path, published: Path, n_rows: int) -> None:
    """Lines of the corpus without dialogues between sentences of the recordings: about 200 tokens, without a plot."""
    spoken = spoken_texts(data)
    for split, name, count in (("train", "tiny_corpus.txt", n_rows), ("valid", "tiny_corpus.val.txt", n_rows)):
        rng = random.Random(split)
        plain = [line.strip() for line in open(data / "text" / name, encoding="utf-8") if "<|" not in line]
        count = count if split == "train" else max(2, count // 100)
        with open(published / f"TinyStoriesV2-GPT4-{split}.txt", "w", encoding="utf-8") as file:
            for _ in range(count):
                sentences = rng.choices(plain, k=5) + rng.choices(spoken, k=12)
                rng.shuffle(sentences)
                file.write(f"{' '.join(sentences)}\n<|endoftext|>\n")


def joined(rows: list[dict], data: Path, seconds: tuple[float, float], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Texts and waveforms at 16 kHz of sentences one after another, with pauses, ``seconds`` long or a little more."""
    rng = random.Random(seed)
    while True:
        texts, pieces, wanted = [], [], rng.uniform(*seconds)
        while sum(map(len, pieces)) < wanted * 16_000:
            row = rng.choice(rows)
            texts.append(row["text"])
            pieces.append(soundfile.read(data / "audio" / row["wav"], dtype="float32")[0])
            pieces.append(np.zeros(rng.randint(2_000, 6_000), np.float32))
        yield " ".join(texts), np.concatenate(pieces[:-1])


def by(column: str, rows: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def librispeech(data: Path, published: Path, n_rows: int) -> None:
    """Recordings of 5 to 16 s, each by one voice; the transcripts in capitals, without marks."""
    voices = by("voice", csv_rows(data / "audio/asr.csv"))
    for split, count in (("train-clean-100", n_rows), ("dev-clean", max(2, n_rows // HELD_OUT))):
        for speaker, voice in enumerate(sorted(voices), 19):
            folder = published / f"LibriSpeech/{split}/{speaker}/{len(split)}"
            folder.mkdir(parents=True, exist_ok=True)
            lines, seed = [], 2 * speaker + (split == "dev-clean")
            clips = itertools.islice(joined(voices[voice], data, (5, 13), seed), math.ceil(count / len(voices)))
            for number, (text, waveform) in enumerate(clips):
                stem = f"{speaker}-{len(split)}-{number:04}"
                soundfile.write(folder / f"{stem}.flac", waveform, 16_000)
                lines.append(f"{stem} {re.sub(r'[^A-Z ' + chr(39) + ']', '', text.upper())}\n")
            (folder / f"{speaker}-{len(split)}.trans.txt").write_text("".join(lines), encoding="utf-8")


def ljspeech(data: Path, published: Path, n_rows: int) -> None:
    """Recordings of 1 to 11 s at 22,050 Hz by the voice with the most clips."""
    speakers = by("speaker", csv_rows(data / "audio/tts.csv"))
    folder = published / "LJSpeech-1.1/wavs"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    clips = joined(max(speakers.values(), key=len), data, (1, 8), seed=0)
    for number, (text, waveform) in enumerate(itertools.islice(clips, n_rows)):
        soundfile.write(folder / f"LJ001-{number:04}.wav", resample_poly(waveform, 441, 320), 22_050)
        lines.append(f"LJ001-{number:04}|{text}|{text}\n")
    (folder.parent / "metadata.csv").write_text("".join(lines), encoding="utf-8")


def pictures_of(data: Path, n_rows: int) -> Iterator[tuple[str, int, dict]]:
    """(split, number, row) of the built-in pictures that stand for COCO's."""
    rows = json.loads((data / "images/annotations.json").read_text(encoding="utf-8"))[:n_rows]
    for number, row in enumerate(rows, 9):
        yield ("val2017" if number % HELD_OUT == 0 else "train2017"), number, row


def coco(data: Path, published: Path, n_rows: int) -> None:
    """Pictures of 256 x 256 pixels, each with five captions. Each caption ends in two words that are not in the
    picture, the same ones for all of a picture: so captions are as long as COCO's and have thousands of words."""
    rng = random.Random(0)
    words = sorted(set(re.findall(r"\b[a-z]{3,}\b", " ".join(spoken_texts(data)))))
    for split in ("train2017", "val2017"):
        (published / split).mkdir(exist_ok=True)
    found: dict[str, dict[str, list]] = {}
    for split, number, row in pictures_of(data, n_rows):
        with Image.open(data / "images" / row["image"]) as picture:
            large = picture.convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
        large.save(published / split / f"{number:012}.jpg", quality=90)
        captions = found.setdefault(split, {"images": [], "annotations": []})
        captions["images"].append({"id": number, "file_name": f"{number:012}.jpg"})
        end = " ".join(rng.choices(words, k=2))
        captions["annotations"] += [
            {"image_id": number, "id": 5 * number + k, "caption": f"{text.rstrip('.')} beside {end}."}
            for k, text in enumerate(itertools.islice(itertools.cycle(row["accepted_answers"]), 5))
        ]
    (published / "annotations").mkdir(exist_ok=True)
    for split, captions in found.items():
        write(published / f"annotations/captions_{split}.json", captions)


def vqa(data: Path, published: Path, n_rows: int) -> None:
    """The pictures' own questions; nine people of ten give the answer."""
    found: dict[str, tuple[list, list]] = {"Train": ([], []), "Val": ([], [])}
    for split, number, row in pictures_of(data, n_rows):
        questions, annotations = found["Train" if split == "train2017" else "Val"]
        for k, (question, answer) in enumerate(row["questions"][:5]):
            short = answer.split(",")[0].rstrip(".").lower()
            people = [{"answer": short if n else "not sure", "answer_confidence": "yes"} for n in range(10)]
            questions.append({"image_id": number, "question": question, "question_id": 10 * number + k})
            annotations.append({"question_id": 10 * number + k, "multiple_choice_answer": short, "answers": people})
    for split, (questions, annotations) in found.items():
        name = f"v2_OpenEnded_mscoco_{split.lower()}2014_questions.json"
        write_zip(published / f"v2_Questions_{split}_mscoco.zip", name, {"questions": questions})
        name = f"v2_mscoco_{split.lower()}2014_annotations.json"
        write_zip(published / f"v2_Annotations_{split}_mscoco.zip", name, {"annotations": annotations})


def llava(data: Path, published: Path, n_rows: int) -> None:
    """Two questions about each picture of the training split, answered in sentences."""
    rows = []
    for split, number, row in pictures_of(data, n_rows):
        turns = []
        for question, answer in row["questions"][:2]:
            picture = "" if turns else "<image>\n"
            turns += [{"from": "human", "value": picture + question}, {"from": "gpt", "value": answer}]
        if split == "train2017":
            rows.append({"image": f"{number:012}.jpg", "conversations": turns})
    write(published / "llava_instruct_150k.json", rows)


def mjsynth(data: Path, published: Path, n_rows: int) -> None:
    """The built-in signs of one word of letters and digits, 31 pixels high."""
    rows = (row for row in csv_rows(data / "ocr/ocr.csv") if row["text"].isascii() and row["text"].isalnum())
    for number, row in enumerate(itertools.islice(rows, n_rows)):
        path = published / f"90kDICT32px/{1 + number // 1000}/1/{number}_{row['text']}_{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(data / "ocr" / row["image"]) as sign:
            sign.convert("RGB").resize((max(1, round(sign.width * 31 / sign.height)), 31)).save(path, quality=90)


def spoken_questions(data: Path, prepared: Path) -> None:
    """What ``make_synthetic_datasets.py --read_questions`` leaves, of recordings that are there already."""
    recordings = {row["text"]: row for row in csv_rows(data / "audio/asr.csv")}
    for suffix in ("", ".val"):
        rows = json.loads((prepared / f"images/production_vqa{suffix}.json").read_text(encoding="utf-8"))
        asked = dict.fromkeys(question for row in rows for question, *_ in row["questions"] if question in recordings)
        text = io.StringIO()
        writer = csv.DictWriter(text, ("wav", "text", "voice"), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for question in asked:
            wav = (data / "audio" / recordings[question]["wav"]).resolve()
            writer.writerow(recordings[question] | {"wav": str(wav)})
        (prepared / f"audio/production_questions{suffix}.csv").write_text(text.getvalue(), encoding="utf-8")


MAKERS: dict[str, Callable[[Path, Path, int], None]] = {  # (built-in data, folder to write to, rows)
    "tinystories": tinystories, "librispeech": librispeech, "ljspeech": ljspeech, "coco": coco, "vqa": vqa,
    "llava": llava, "mjsynth": mjsynth,
}  # fmt: skip
ROWS = {"tinystories": 8_000, "librispeech": 400, "ljspeech": 400, "mjsynth": 8_000}
ROWS |= dict.fromkeys(("coco", "vqa", "llava"), 4_000)  # about the same pictures


def csv_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, value: dict | list) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_zip(path: Path, name: str, value: dict) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, json.dumps(value))


def prepare(name: str, data: Path, out: Path, n_rows: int | None = None) -> None:
    """Make a data set in out/published, and let scripts/prepare_data.py prepare it in out/data; a finished one stays.

    Args:
        n_rows: at most; default: ``ROWS``.
    """
    published, done = out / "published", out / f"published/{name}.done"
    if done.exists():
        return
    published.mkdir(parents=True, exist_ok=True)
    MAKERS[name](data, published, min(n_rows or sys.maxsize, ROWS[name]))
    archives = [path for path in published.iterdir() if path.suffix in (".txt", ".zip", ".json")]
    sums = "".join(f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in archives)
    (published / "md5sums").write_text(sums, encoding="utf-8")
    options = ("--from", str(published), "--checksums", str(published / "md5sums"), "--out", str(out / "data"))
    subprocess.run([sys.executable, str(ROOT / "scripts/prepare_data.py"), name, *options], check=True)
    done.touch()
