"""Made-up data of any size for benchmarks/scaling.py, and the stages' scripts that read them."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

SYLLABLES = [c + v for c in "bcdfghjklmnprstvwxyz" for v in "aeiou"]
RECORDINGS = 64  # shared by all rows of a CSV, of equal length, so that all batches cost the same


def sentences(count: int, fewest: int, most: int) -> Iterator[str]:
    """``count`` sentences of ``fewest`` to ``most`` of a million words, the first ones more frequent, as in texts."""
    rng = np.random.default_rng(0)
    words = ["".join(word) for n in (1, 2, 3) for word in itertools.product(SYLLABLES, repeat=n)]
    for first in range(0, count, 100_000):
        lengths = rng.integers(fewest, most, min(100_000, count - first), endpoint=True)
        ranks = len(words) ** rng.random(lengths.sum()) ** 2
        stream = map(words.__getitem__, (ranks.astype(int) - 1).tolist())
        for length in lengths.tolist():
            yield " ".join(itertools.islice(stream, length))


def write_text(path: Path, lines: int) -> None:
    with open(path, "w") as file:
        file.writelines(f"{sentence}\n" for sentence in sentences(lines, 5, 17))


def write_csv(path: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(RECORDINGS):
        soundfile.write(path.with_name(f"{i}.wav"), 0.1 * rng.standard_normal(48_000), 16_000)
    with open(path, "w") as file:
        file.write("wav,text\n")
        file.writelines(f"{i % RECORDINGS}.wav,{text}\n" for i, text in enumerate(sentences(rows, 2, 5)))


def write_json(path: Path, rows: int) -> None:
    with open(path, "w") as file:
        for i, text in enumerate(sentences(rows, 4, 12)):
            file.write(("," if i else "[") + "\n" + json.dumps({"image": f"{i:09}.jpg", "caption": text}))
        file.write("\n]\n")


@dataclass(frozen=True)
class Case:
    """A stage's script and its data."""

    what: str
    write: Callable[[Path, int], None]
    file: str
    script: str
    config: str
    key: str  # config key of the file
    functions: tuple[str, ...]  # of the script, on data, before training
    bounded: tuple[str, ...] = ()  # those that read a bounded part of the data
    settings: tuple[str, ...] = ()
    resumed: bool = True


CASES = (
    Case(
        "text, A", write_text, "corpus.txt", "train_text", "thinker_tiny", "train_text",
        functions=("prepare_tokenizer", "prepare_corpus"), bounded=("prepare_tokenizer",),
        settings=("kv_groups=1", "val_text=null"),
    ),
    Case(
        "CSV, B", write_csv, "speech.csv", "train_audio_enc", "audio_enc_tiny", "train_csv",
        ("prepare_manifest", "split_rows", "prepare_tokenizer", "usable_rows", "report_unknown_characters"),
        settings=("val_voices_csv=null",),
    ),
    Case(
        "JSON, C", write_json, "pictures.json", "train_vision", "vision_tiny", "train_manifest",
        functions=("prepare_manifest", "split_rows", "prepare_tokenizer", "in_distinct_groups"),
        bounded=("prepare_tokenizer",),
        settings=(
            "val_manifest=null", "val_split=0.02", "image_root=null",
        ),
        resumed=False,  # needs the pictures themselves
    ),
)  # fmt: skip
# small, as the model is not trained
SETTINGS = ("batch_size=8", "n_layers=1", "d_model=64", "n_heads=2", "d_ff=64", "use_compile=false")
