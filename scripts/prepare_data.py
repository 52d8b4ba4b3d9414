"""Download public datasets and write the files that configs/*_tiny.json train on.

    python scripts/prepare_data.py tinystories librispeech ljspeech coco vqa llava mjsynth --plan   # what it costs
    python scripts/prepare_data.py tinystories librispeech ljspeech coco vqa llava mjsynth          # all stages
    python scripts/prepare_data.py librispeech --subset train-clean-5 --subset dev-clean-2          # a small try
    python scripts/prepare_data.py asterisk svt            # what people said and wrote, to evaluate stages B and G on

After an interruption the same command continues. Archives go to <out>/downloads, are compared with their published
checksums, unpacked, and deleted. Another --subset of a dataset adds to the rows of those that are there.
"""

import argparse
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import shutil
import signal
import sys
import textwrap
import wave
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import filterfalse
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omni.common.errors import Interrupted, OneLineErrors, RunError, UserError
from omni.common.files import write_sealed_json
from omni.common.media import quoted
from omni.data.archives import USUAL_BYTES_PER_S, Archive, replacing
from omni.data.download import Store, limit_of, read_checksums, read_record
from omni.data.transfer import gigabytes, log

Items = dict[str, list[str]]  # name of an archive -> names of its unpacked items, relative to the dataset's folder
TableRows = Iterable[dict[str, str]]

# --- what is written: rows from the files as they are published -------------------------------------------------------

# raised by the readers of text, CSV, JSON and gzip for damaged bytes
DAMAGES = (
    ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error,
    gzip.BadGzipFile, zlib.error, EOFError, ElementTree.ParseError,
)  # fmt: skip


@contextlib.contextmanager
def as_published(path: Path) -> Iterator[Path]:
    """
    Raises:
        RunError: the block finds other content than published: no UTF-8, other fields.
    """
    try:
        yield path
    except DAMAGES as error:
        reason = quoted(f"{type(error).__name__}: {error}")
        raise RunError(f"{path}: damaged, or not as it is published: {reason}. Delete it to get it again") from error


def librispeech_rows(folder: Path, items: Items) -> dict[str, TableRows]:
    """Transcripts in lower case: published in capitals, they take a language model three times as many tokens.

    A recording that is in several subsets, as those of the small ones are, has one row.
    """
    rows: dict[str, dict[str, dict[str, str]]] = {}  # output -> utterance -> row
    for archive, names in items.items():
        output = "production_asr.csv" if archive.startswith("train") else "production_asr.val.csv"
        texts: dict[str, str] = {}  # utterance -> transcript
        for transcript in {librispeech_transcript(name) for name in names}:
            with as_published(folder / transcript) as path:
                lines = path.read_text(encoding="utf-8").splitlines()
                texts.update(line.lower().split(" ", 1) for line in lines)
        of_archive = {Path(name).stem: {"wav": name, "text": text_of(name, Path(name).stem, texts)} for name in names}
        rows[output] = of_archive | rows.get(output, {})
    return {output: sorted(of_output.values(), key=lambda row: row["wav"]) for output, of_output in rows.items()}


def text_of(name: str, utterance: str, texts: dict[str, str]) -> str:
    """
    Raises:
        RunError: a recording without a transcript.
    """
    if utterance not in texts:
        raise RunError(f"{name}: expected its transcript in the archive, found none")
    return texts[utterance]


def librispeech_transcript(name: str) -> str:
    """``.../19/198/19-198-0000.flac`` -> ``.../19/198/19-198.trans.txt``"""
    folder, _, utterance = name.rpartition("/")
    return f"{folder}/{utterance.rpartition('-')[0]}.trans.txt"


def ljspeech_rows(folder: Path, items: Items) -> dict[str, TableRows]:
    """The normalised column, in which numbers are spelled out."""
    metadata = folder / "LJSpeech-1.1/metadata.csv"
    with as_published(metadata), open(metadata, newline="", encoding="utf-8") as file:
        texts = {line[0]: line[2] for line in csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE)}
    (names,) = items.values()
    rows = ({"text": text_of(name, Path(name).stem, texts), "wav": name} for name in sorted(names))
    return {"production_tts.csv": rows}


def asterisk_rows(folder: Path, items: Items) -> dict[str, TableRows]:
    """The published texts as ``pronounced``, of recordings with words: tones, noises and silence are left out.

    Raises:
        RunError: the texts are damaged, or a recording has none.
    """
    with as_published(folder / ALLISON_TEXTS) as path, gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [line.split(":", 1) for line in file if line.strip() and not line.startswith(";")]
        texts = {f"{ALLISON}/{name}.wav": pronounced(text) for name, text in lines}
    names = sorted(name for name in itertools.chain(*items.values()) if name != ALLISON_TEXTS)
    rows = [{"wav": name, "text": text} for name in names if (text := text_of(name, name, texts))]
    if not rows:
        raise RunError(f"{path}: expected words for some of {len(names):,} recordings, found none")
    log(
        f"{path}: {len(texts):,} texts = {len(rows):,} rows + {len(names) - len(rows):,} left out (no words) "
        f"+ {len(texts) - len(names):,} left out (recording not unpacked)"
    )
    return {"asterisk.csv": rows}


def pronounced(text: str) -> str:
    """The spoken part of a text of Asterisk's; "" if it has no words.

    Remarks in brackets ("at [@]", "IAX (note: does not say "2")", "<beep ascending>") and ellipses, where a program
    inserts another recording ("... extension ..."), are removed. ``*`` and ``#`` become star and pound, the names that
    the other texts give to these keys. Digits and misspellings are kept.
    """
    text = re.sub(r"\[.*?\]|\(.*?\)|<.*?>|\.{3}", " ", text).replace("*", "star").replace("#", "pound")
    return in_words(text)


def g722_to_wav(file: BinaryIO, limit: int | None) -> Iterator[bytes]:
    """16 kHz, 16 bit, mono. G.722 has neither header nor checksum: each byte is two samples.

    Raises:
        EOFError: the file is empty.
    """
    import av  # here: only this dataset needs it

    with av.open(io.BytesIO(file.read()), format="g722") as container:
        samples = [frame.to_ndarray().tobytes() for frame in container.decode(audio=0)]
    if not samples:
        raise EOFError("a recording is empty")
    wav = io.BytesIO()
    with wave.open(wav, "wb") as recording:
        recording.setparams((1, 2, 16_000, 0, "NONE", ""))
        recording.writeframes(b"".join(samples))
    yield wav.getvalue()


def coco_rows(folder: Path, items: Items) -> dict[str, TableRows]:
    outputs = {"train2017": "production_annotations.json", "val2017": "production_annotations.val.json"}
    held_out = sum(map(of_held_out_talk, items.get("train2017.zip", ())))
    log(f"COCO: {held_out:,} pictures of train2017 left out, as LLaVA's conversations about them are held out")
    return {
        output: caption_rows(coco_captions(folder, split), list(filterfalse(of_held_out_talk, items[f"{split}.zip"])))
        for split, output in outputs.items()
        if f"{split}.zip" in items
    }


def coco_captions(folder: Path, split: str) -> list[tuple[str, str]]:
    """(name of a picture, caption) for each caption, in the order of the names."""
    with as_published(folder / f"annotations/captions_{split}.json") as path:
        published = json.loads(path.read_text(encoding="utf-8"))
        files = {image["id"]: f"{split}/{image['file_name']}" for image in published["images"]}
        captions = sorted((files[a["image_id"]], a["id"], in_words(a["caption"])) for a in published["annotations"])
    return [(name, caption) for name, _, caption in captions]


def vqa_rows(folder: Path, items: Items) -> dict[str, TableRows]:
    """A row for each picture with a question: ``captions``, the first of them as ``caption``, and ``questions``,
    [question, most common answer, answers].

    VQA v2 asks about the pictures of COCO 2014, which COCO 2017 has under other names and in other splits. A picture's
    number is the same in both: questions of either split of 2014 go where 2017 has their picture.
    """
    splits = {"train2017": "production_vqa.json", "val2017": "production_vqa.val.json"}
    files = {int(Path(name).stem): name for split in splits for name in items.get(f"{split}.zip", ())}
    asked: dict[str, list[tuple[int, list]]] = {}  # name of a picture -> number of a question, the question
    n_questions = n_blank = n_held_out = 0
    for split in ("train2014", "val2014"):
        answers = vqa_answers(folder / f"vqa/v2_mscoco_{split}_annotations.json")
        with as_published(folder / f"vqa/v2_OpenEnded_mscoco_{split}_questions.json") as path:
            for question in json.loads(path.read_text(encoding="utf-8"))["questions"]:
                n_questions += 1
                number, (answer, of_people) = question["question_id"], answers[question["question_id"]]
                text, name = in_words(question["question"]), files.get(question["image_id"])
                if name and of_held_out_talk(name):
                    n_held_out += 1
                elif name and not (text and answer):
                    n_blank += 1
                elif name:
                    asked.setdefault(name, []).append((number, [text, answer, of_people]))
    rows, counts = {}, []
    for split, output in splits.items():
        if f"{split}.zip" in items:
            captions: dict[str, list[str]] = {}
            for name, caption in coco_captions(folder, split):
                captions.setdefault(name, []).append(caption)
            names = sorted(name for name in asked if name.startswith(split))
            with as_published(folder / f"annotations/captions_{split}.json"):
                rows[output] = [
                    # stage C reads "caption"; a row with a blank text in "captions" is a bad row of stage E
                    {"image": name, "caption": captions[name][0], "captions": list(filter(None, captions[name]))}
                    | {"questions": [one for _, one in sorted(asked[name])]}
                    for name in names
                ]
            counts.append(f"{sum(len(asked[name]) for name in names):,} about {len(names):,} pictures of {split}")
    n_without = n_questions - n_blank - n_held_out - sum(map(len, asked.values()))
    log(
        f"VQA v2: {n_questions:,} questions = {' + '.join(counts)} + {n_without:,} left out (picture not unpacked) "
        f"+ {n_blank:,} left out (blank) + {n_held_out:,} left out (conversations about the picture are held out)"
    )
    return rows


def vqa_answers(path: Path) -> dict[int, tuple[str, list[str]]]:
    """Number of a question -> the most common answer, the answers of ten people."""

    def smaller(value: dict):  # four million of these would take gigabytes
        return sys.intern(in_words(value["answer"])) if "answer_confidence" in value else value

    with as_published(path):
        published = json.loads(path.read_text(encoding="utf-8"), object_hook=smaller)["annotations"]
        answers = {one["question_id"]: (in_words(one["multiple_choice_answer"]), one["answers"]) for one in published}
        if not all(isinstance(text, str) for _, of_people in answers.values() for text in of_people):
            raise TypeError("expected texts as answers")
    return {number: (answer, list(filter(None, of_people))) for number, (answer, of_people) in answers.items()}


def llava_rows(folder: Path, items: Items) -> dict[str, TableRows]:
    """The published rows, with the names that COCO's pictures have here. All rows of a picture are on one side."""
    present = set(items["train2017.zip"])
    train, held_out = "production_conversations.json", "production_conversations.val.json"
    rows: dict[str, list] = {train: [], held_out: []}
    with as_published(folder / "llava_instruct_150k.json") as path:
        published = json.loads(path.read_text(encoding="utf-8"))
        for row in published:
            name = f"train2017/{row['image']}"
            if name in present:
                conversations = [{"from": turn["from"], "value": turn["value"]} for turn in row["conversations"]]
                side = held_out if of_held_out_talk(name) else train
                rows[side].append({"image": name, "conversations": conversations})
    n_train, n_held_out = len(rows[train]), len(rows[held_out])
    log(
        f"{path}: {len(published):,} conversations = {n_train:,} to train on + {n_held_out:,} held out "
        f"+ {len(published) - n_train - n_held_out:,} left out (picture not unpacked)"
    )
    return rows


HELD_OUT = 0.005  # share of the pictures or words of a data set that is published without a split that we can use


def is_held_out(key: str, share: float) -> bool:
    return zlib.crc32(key.encode()) < share * 2**32


def of_held_out_talk(name: str) -> bool:
    """Whether LLaVA's conversations about a picture of COCO are held out. They are made of its captions, so that no
    other file to train on has the picture, either."""
    return name.startswith("train2017/") and is_held_out(name, HELD_OUT)


def flickr8k_rows(folder: Path, items: Items) -> dict[str, TableRows]:
    """The published training and development images, without the test images."""
    text = folder / "Flickr8k_text"
    with as_published(text / "Flickr8k.token.txt") as path:
        lines = path.read_text(encoding="utf-8").splitlines()
        captions = sorted((key, in_words(caption)) for key, caption in (line.split("\t", 1) for line in lines))
    rows: dict[str, TableRows] = {}
    for split, output in (("train", "production_annotations.json"), ("dev", "production_annotations.val.json")):
        with as_published(text / f"Flickr_8k.{split}Images.txt") as path:
            images = set(path.read_text(encoding="utf-8").split())
        names = [name for name in items["Flickr8k_Dataset.zip"] if Path(name).name in images]
        pairs = ((f"Flicker8k_Dataset/{key.partition('#')[0]}", caption) for key, caption in captions)
        rows[output] = caption_rows(pairs, names)
    return rows


def caption_rows(captions: Iterable[tuple[str, str]], images: list[str]) -> TableRows:
    """One row per caption, so an image with five captions has five rows."""
    present = set(images)
    return ({"image": name, "caption": text} for name, text in captions if name in present)


def in_words(text: str) -> str:
    """``text`` with single blanks between its words."""
    text = " ".join(text.split())
    text.encode()  # raises for half of a surrogate pair, which JSON allows
    return text


def mjsynth_rows(folder: Path, items: Items) -> dict[str, TableRows]:
    """The word is in the file's name, ``1_pintle_58130.jpg``. Words are held out, whatever their case: the published
    split holds out images of words that training images show, too.

    Raises:
        RunError: there is one word only.
    """

    def word_of(name: str) -> str:
        return name.split("_")[-2]

    (names,) = items.values()
    names = sorted(names)
    words = sorted({word_of(name).lower() for name in names}, key=lambda word: (zlib.crc32(word.encode()), word))
    if len(words) < 2:
        raise RunError(f"{folder}: expected pictures of several words, found one word. Raise --limit")
    held_out = set(words[:1]) | {word for word in words if is_held_out(word, HELD_OUT)}

    def rows(is_held_out: bool) -> TableRows:  # not a list, as there may be nine million
        side = (name for name in names if (word_of(name).lower() in held_out) == is_held_out)
        return ({"image": name, "text": word_of(name)} for name in side)

    return {"production_ocr.csv": rows(False), "production_ocr.val.csv": rows(True)}


def svt_rows(folder: Path, items: Items) -> dict[str, TableRows]:
    """Words, cut out of photos of streets. The published texts are in capitals, whatever the signs have."""
    (names,) = items.values()
    return {output: svt_words(folder, split, set(names)) for split, output in SVT_OUTPUTS.items()}


def svt_words(folder: Path, split: str, names: set[str]) -> list[dict[str, str]]:
    """Write the words of a split to ``svt_words/``. A box that reaches beyond the photo is cut at its edges.

    Raises:
        RunError: the boxes or a photo are damaged.
    """
    from PIL import Image  # here: only this dataset needs it

    (folder / "svt_words").mkdir(exist_ok=True)
    with as_published(folder / f"svt1/{split}.xml") as path:
        published = [
            (f"svt1/{photo.findtext('imageName').strip()}", [svt_box(one) for one in photo.iter("taggedRectangle")])
            for photo in ElementTree.parse(path).getroot().iter("image")
        ]
    rows, n_outside = [], 0
    for name, boxes in published:
        if name not in names:
            continue
        with as_published(folder / name) as photo_path:
            try:
                with Image.open(photo_path, formats=["JPEG"]) as photo:
                    photo.load()
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(error) from error
        for number, (left, top, width, height, text) in enumerate(boxes):
            box = (max(0, left), max(0, top), min(photo.width, left + width), min(photo.height, top + height))
            if box[0] >= box[2] or box[1] >= box[3]:
                n_outside += 1
                continue
            word = f"svt_words/{Path(name).stem}_{number}.png"
            with replacing(folder / word, sync=False) as file:
                photo.crop(box).convert("RGB").save(file, "PNG")
            rows.append({"image": word, "text": text})
    total = sum(len(boxes) for _, boxes in published)
    log(
        f"{path}: {total:,} words = {len(rows):,} rows + {n_outside:,} left out (outside of the photo) "
        f"+ {total - len(rows) - n_outside:,} left out (photo not unpacked)"
    )
    return rows


def svt_box(rectangle: ElementTree.Element) -> tuple[int, int, int, int, str]:
    """Left, top, width, height in pixels, and the word."""
    left, top, width, height = (int(rectangle.attrib[key]) for key in ("x", "y", "width", "height"))
    return left, top, width, height, in_words(rectangle.findtext("tag"))


def wikitext_lines(file: BinaryIO, limit: int | None) -> Iterator[bytes]:
    """Paragraphs and headings, one a line, without the empty lines between them."""
    lines = filter(None, (line.strip() for line in file))
    return (line + b"\n" for line in itertools.islice(lines, limit))


def tinystories_lines(file: BinaryIO, limit: int | None) -> Iterator[bytes]:
    """One story a line, its paragraphs joined."""

    def stories() -> Iterator[bytes]:
        story: list[bytes] = []
        for line in file:
            before, end, after = line.partition(b"<|endoftext|>")
            story += before.split()
            if end:
                yield b" ".join(story)
                story = after.split()
        yield b" ".join(story)

    return (story + b"\n" for story in itertools.islice(filter(None, stories()), limit))


# --- what there is ----------------------------------------------------------------------------------------------------
# Sources of sizes and checksums: tensorflow-datasets (LibriSpeech, LJSpeech, COCO), torchaudio (LibriSpeech, LJSpeech),
# its pages at Hugging Face (TinyStories), several loaders that agree (WikiText), mmocr (MJSynth, SVT), Debian's index
# of packages (Asterisk), OpenSLR 31 and Kaldi (LibriSpeech's small subsets), ParlAI (VQA v2). LLaVA's, and the sizes of
# VQA v2, are from people who wrote down what they had downloaded.

ALLISON = "en_US_f_Allison"  # the published folder, named after the speaker, Allison Smith
ALLISON_TEXTS = f"{ALLISON}/core-sounds-en.txt.gz"


@dataclass(frozen=True)
class Dataset:
    """One row of DATASETS."""

    folder: str  # below --out; names in the manifests are relative to it
    about: str
    licence: str
    archives: tuple[Archive, ...]
    rows: Callable[[Path, Items], dict[str, TableRows]] | None = None  # None: unpacking writes the final files
    subsets: tuple[str, ...] = ()  # taken without --subset
    limit: int | None = None  # without --limit


def _librispeech(subset: str, size: int, count: int, checksum: str, collection: int = 12) -> Archive:
    speech = rf"LibriSpeech/{subset}/\d+/\d+/[\d-]+"
    return Archive(
        name=f"{subset}.tar.gz", url=f"https://www.openslr.org/resources/{collection}/{subset}.tar.gz",
        mirrors=(f"https://us.openslr.org/resources/{collection}", f"https://openslr.elda.org/resources/{collection}"),
        size=size, checksum=checksum, count=count, growth=1.05, subset=subset, root=f"LibriSpeech/{subset}",
        items=rf"({speech}\.flac)", extras=rf"({speech}\.trans\.txt)",
        extras_of=lambda name: (librispeech_transcript(name),),
        outputs=("production_asr.csv" if subset.startswith("train") else "production_asr.val.csv",),
    )  # fmt: skip


def _asterisk(package: str, size: int, checksum: str, **fields) -> Archive:
    name = f"{package}_1.6.1-1_all.deb"
    url = f"https://deb.debian.org/debian/pool/main/a/asterisk-core-sounds/{name}"
    return Archive(name=name, url=url, size=size, checksum=checksum, **fields)


def _coco(split: str, size: int, count: int, output: str, checksum: str) -> Archive:
    return Archive(
        name=f"{split}.zip", url=f"http://images.cocodataset.org/zips/{split}.zip",
        mirrors=(f"{COCO_MIRROR}/zips",), size=size, checksum=checksum, count=count, growth=1.02, subset=split,
        root=split, items=rf"({split}/\d+\.jpg)", outputs=(output,),
    )  # fmt: skip


def _tinystories(split: str, size: int, checksum: str, output: str) -> Archive:
    name = f"TinyStoriesV2-GPT4-{split}.txt"
    return Archive(
        name=name, url=f"https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/{name}", size=size,
        checksum=checksum, items=rf"({name})", rename={name: output}, convert=tinystories_lines, outputs=(output,),
    )  # fmt: skip


def _flickr8k(name: str, **fields) -> Archive:
    url = f"https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/{name}"
    return Archive(name=name, url=url, size=None, checksum="", at_most=4 << 30, **fields)


def _vqa(kind: str, split: str, size: int, growth: float, checksum: str) -> Archive:
    name, file = f"v2_{kind}_{split}_mscoco.zip", f"v2_{'OpenEnded_' * (kind == 'Questions')}mscoco"
    file = f"{file}_{split.lower()}2014_{kind.lower()}.json"
    return Archive(
        name=name, url=f"https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/{name}",
        mirrors=("https://cvmlp.s3.amazonaws.com/vqa/mscoco/vqa",), size=size, checksum=checksum, growth=growth,
        items=rf"({re.escape(file)})", rename={file: f"vqa/{file}"},
    )  # fmt: skip


COCO_MIRROR = "https://s3.amazonaws.com/images.cocodataset.org"  # the same bucket, by HTTPS
COCO = (
    Archive(
        name="annotations_trainval2017.zip", mirrors=(f"{COCO_MIRROR}/annotations",),
        url="http://images.cocodataset.org/annotations/annotations_trainval2017.zip", size=252_907_541,
        checksum="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268", growth=0.4,
        root="annotations", items=r"(annotations/captions_(?:train|val)2017\.json)",
    ),
    _coco("train2017", 19_336_861_798, 118_287, "production_annotations.json",
          "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    _coco("val2017", 815_585_330, 5_000, "production_annotations.val.json",
          "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
)  # fmt: skip
SVT_OUTPUTS = {"test": "svt.csv", "train": "svt.train.csv"}

DATASETS = {
    "tinystories": Dataset(
        "text", "2.7 million short stories", "CDLA-Sharing-1.0",
        (
            _tinystories("train", 2_227_753_162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
                         "production_corpus.txt"),
            _tinystories("valid", 22_502_601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
                         "production_corpus.val.txt"),
        ),
    ),
    "wikitext": Dataset(
        "text", "WikiText-103 raw, 100 million words of Wikipedia", "CC BY-SA",
        (
            Archive(
                name="wikitext-103-raw-v1.zip", url="https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
                size=191_984_949, checksum="91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
                mirrors=("https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main",),
                growth=2.9, root="wikitext-103-raw", items=r"(wikitext-103-raw/wiki\.(?:train|valid)\.raw)",
                rename={"wikitext-103-raw/wiki.train.raw": "production_corpus.txt",
                        "wikitext-103-raw/wiki.valid.raw": "production_corpus.val.txt"},
                convert=wikitext_lines, outputs=("production_corpus.txt", "production_corpus.val.txt"),
            ),
        ),
    ),
    "librispeech": Dataset(
        "audio", "read English speech, 16 kHz; train-clean-100 is 100 hours", "CC BY 4.0",
        (
            _librispeech("train-clean-100", 6_387_309_499, 28_539,
                         "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2"),
            _librispeech("train-clean-360", 23_049_477_885, 104_014,
                         "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf"),
            _librispeech("train-other-500", 30_593_501_606, 148_688,
                         "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2"),
            _librispeech("dev-clean", 337_926_286, 2_703,
                         "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3"),
            _librispeech("dev-other", 314_305_928, 2_864,
                         "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365"),
            _librispeech("test-clean", 346_663_984, 2_620,
                         "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23"),
            _librispeech("test-other", 328_757_843, 2_939,
                         "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29"),
            # recordings of train-clean-100 and dev-clean, to try things out
            _librispeech("train-clean-5", 332_954_390, 1_519, "5df7d4e78065366204ca6845bb08f490", collection=31),
            _librispeech("dev-clean-2", 126_046_265, 1_089, "6d7ab67ac6a1d2c993d050e16d61080d", collection=31),
        ),
        librispeech_rows, subsets=("train-clean-100", "dev-clean"),
    ),
    "ljspeech": Dataset(
        "audio", "24 hours of one English speaker, 22.05 kHz", "public domain",
        (
            Archive(
                name="LJSpeech-1.1.tar.bz2", url="https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2",
                size=2_748_572_632, checksum="be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5",
                count=13_100, growth=1.4, root="LJSpeech-1.1", items=r"(LJSpeech-1\.1/wavs/LJ\d+-\d+\.wav)",
                extras=r"(LJSpeech-1\.1/metadata\.csv)", extras_of=lambda name: ("LJSpeech-1.1/metadata.csv",),
                outputs=("production_tts.csv",),
            ),
        ),
        ljspeech_rows,
    ),
    "asterisk": Dataset(
        "audio", "24 minutes of telephone prompts in English by Allison Smith, 16 kHz; to evaluate, not to train on",
        "CC BY-SA 3.0",
        (
            _asterisk("asterisk-core-sounds-en", 22_844,
                      "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
                      root="usr/share/doc/asterisk-core-sounds-en",
                      items=r"usr/share/doc/asterisk-core-sounds-en/(core-sounds-en\.txt\.gz)",
                      rename={"core-sounds-en.txt.gz": ALLISON_TEXTS}),
            _asterisk("asterisk-core-sounds-en-g722", 10_565_860,
                      "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806", count=568, growth=4.7,
                      root=f"usr/share/asterisk/sounds/{ALLISON}",
                      items=rf"usr/share/asterisk/sounds/({ALLISON}/(?:\w+/)?[\w-]+)\.g722",
                      convert=g722_to_wav, suffix=".wav", outputs=("asterisk.csv",)),
        ),
        asterisk_rows,
    ),
    "coco": Dataset(
        "images", "COCO 2017, 123 thousand photos with five captions each",
        "captions CC BY 4.0; each photo has its own, from Flickr", COCO, coco_rows, subsets=("train2017", "val2017"),
    ),
    "vqa": Dataset(
        "images", "VQA v2, 658 thousand questions about COCO's photos, ten people's answers each, and these photos",
        "questions CC BY 4.0; photos as in coco",
        (
            _vqa("Questions", "Train", 7_239_401, 8,
                 "05a64b6e2582d06d7585f5429674a9a33851878be1bff9f8668cdcf792df611e"),
            _vqa("Questions", "Val", 3_494_929, 8,
                 "e71f6c5c3e97a51d050f28243e262b28cd0c48d11a6b4632d769d30d3f93222a"),
            _vqa("Annotations", "Train", 21_708_861, 20,
                 "fb101bcefe91422c543c2bb6d70af11eb3119d0ff745ae283d09acdf66250853"),
            _vqa("Annotations", "Val", 10_518_930, 20,
                 "0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e"),
            COCO[0],
            replace(COCO[1], outputs=("production_vqa.json",)),
            replace(COCO[2], outputs=("production_vqa.val.json",)),
        ),
        vqa_rows, subsets=("train2017", "val2017"),
    ),
    "llava": Dataset(
        "images", "LLaVA-Instruct-150K, 158 thousand conversations about COCO's photos, by GPT-4, and these photos",
        "CC BY 4.0, and OpenAI's terms; photos as in coco",
        (
            Archive(
                name="llava_instruct_150k.json", size=228_941_895, items=r"(llava_instruct_150k\.json)",
                url="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_instruct_150k.json",
                checksum="6b68bc5ca2bfd8a71119af0e8454929668ccda6a334955ccc95d114fc8d082fa",
            ),
            replace(COCO[1], subset="",
                    outputs=("production_conversations.json", "production_conversations.val.json")),
        ),
        llava_rows,
    ),
    "flickr8k": Dataset(
        "images", "8 thousand photos with five captions each", "research and education only",
        (
            _flickr8k("Flickr8k_text.zip", about_bytes=2_000_000, growth=2.0, root="Flickr8k_text",
                      items=r"(?:Flickr8k_text/)?(Flickr8k\.token\.txt|Flickr_8k\.(?:train|dev)Images\.txt)",
                      rename={name: f"Flickr8k_text/{name}" for name in (
                          "Flickr8k.token.txt", "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt")}),
            _flickr8k("Flickr8k_Dataset.zip", about_bytes=1_100_000_000, count=8_091, growth=1.02,
                      root="Flicker8k_Dataset", items=r"(Flicker8k_Dataset/[^/]+\.jpg)",
                      outputs=("production_annotations.json", "production_annotations.val.json")),
        ),
        flickr8k_rows,
    ),
    "mjsynth": Dataset(
        "ocr", "MJSynth, 8.9 million pictures of one word each", "research only",
        (
            Archive(
                name="mjsynth.tar.gz", url="https://thor.robots.ox.ac.uk/~vgg/data/text/mjsynth.tar.gz",
                size=None, checksum="7bf2b60ad935eaf64e5b606f782d68e5", at_most=20 << 30, about_bytes=10_000_000_000,
                bytes_per_s=100e3, torrent="3d0b4f09080703d2a9c6be50715b46389fdb3af1 of academictorrents.com",
                count=8_919_273, growth=3.7, root="90kDICT32px",
                items=r"(?:mnt/ramdisk/max/)?(90kDICT32px/\d+/\d+/\d+_[^_/]+_\d+\.jpg)",
                outputs=("production_ocr.csv", "production_ocr.val.csv"),
            ),
        ),
        mjsynth_rows, limit=1_000_000,  # all of them are more files than many file systems can hold
    ),
    "svt": Dataset(
        "ocr", "Street View Text, 904 words on photos of streets; to evaluate, few to train on", "research only",
        (
            Archive(
                name="svt.zip", url="http://www.iapr-tc11.org/dataset/SVT/svt.zip",
                size=None, checksum="42d19160010d990ae6223b14f45eff88", at_most=1 << 30, about_bytes=118_000_000,
                count=350, growth=1.1, root="svt1", items=r"(?:svt/)?(svt1/img/\w+\.jpg)",
                extras=r"(?:svt/)?(svt1/(?:train|test)\.xml)",
                extras_of=lambda name: ("svt1/test.xml", "svt1/train.xml"), outputs=tuple(SVT_OUTPUTS.values()),
            ),
        ),
        svt_rows,
    ),
}  # fmt: skip


# --- getting it -------------------------------------------------------------------------------------------------------


def prepare(store: Store, name: str, args: argparse.Namespace) -> None:
    """Download and unpack one dataset, and write the files to train on."""
    dataset = DATASETS[name]
    folder = Path(args.out) / dataset.folder
    folder.mkdir(parents=True, exist_ok=True)
    archives = chosen_archives(dataset, args)
    if dataset.rows is None:
        claim(store, [folder / output for archive in archives for output in archive.outputs])
    settled = {archive.name: store.settle(archive, folder, args.limit or dataset.limit) for archive in archives}
    items = {
        archive.name: names
        for archive in dataset.archives
        if (names := settled.get(archive.name) or earlier_items(store, archive, folder))
    }
    if dataset.rows is None:
        for output in itertools.chain(*items.values()):
            log(f"{folder / output}: {gigabytes((folder / output).stat().st_size)}")
        return
    for output, rows in dataset.rows(folder, items).items():
        path = folder / output
        claim(store, [path])
        with replacing(path) as file:
            n_rows = (write_csv if path.suffix == ".csv" else write_json)(file, rows)
            if not n_rows and path.suffix == ".csv":
                raise RunError(f"{path}: expected rows, found none. Raise --limit")
        log(f"{path}: {n_rows:,} rows")


def earlier_items(store: Store, archive: Archive, folder: Path) -> list[str] | None:
    """The items of an archive that this run has not chosen; None unless an earlier run has unpacked it."""
    if not (store.folder / f"{archive.name}.files").exists():
        return None
    record = store.record(archive, folder)
    if record is None:
        log(f"{archive.name}: files that an earlier run has unpacked are gone, so it has no rows any more")
        return None
    log(f"{archive.name}: {len(record['items']):,} files of an earlier run keep their rows")
    return record["items"]


def chosen_archives(dataset: Dataset, args: argparse.Namespace) -> list[Archive]:
    """The archives of the chosen subsets; by default of ``dataset.subsets``."""
    available = {archive.subset for archive in dataset.archives}
    chosen = available & set(args.subset or ()) or set(dataset.subsets)
    return [archive for archive in dataset.archives if not archive.subset or archive.subset in chosen]


def claim(store: Store, outputs: list[Path]) -> None:
    """Record the files that this script made, as it does not overwrite others."""
    known = read_claims(store)
    made = known | {str(path.resolve()) for path in outputs}
    if made != known:
        write_sealed_json(store.folder / "made.json", {"files": sorted(made)})


def read_claims(store: Store) -> set[str]:
    """The recorded files; none if the record is missing or damaged."""
    found = read_record(store.folder / "made.json")
    found = found.get("files") if isinstance(found, dict) else found
    return {path for path in found if isinstance(path, str)} if isinstance(found, list) else set()


def write_csv(file: BinaryIO, rows: TableRows) -> int:
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return 0
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, first, lineterminator="\n")
    writer.writeheader()
    n_rows = 0
    for n_rows, row in enumerate(itertools.chain([first], rows), 1):  # noqa: B007
        writer.writerow(row)
    text.detach()  # flushes, and leaves the file open
    return n_rows


def write_json(file: BinaryIO, rows: TableRows) -> int:
    """An array of objects, one a line."""
    n_rows = 0
    for n_rows, row in enumerate(rows, 1):
        file.write((b"[\n" if n_rows == 1 else b",\n") + json.dumps(row, ensure_ascii=False).encode())
    file.write(b"\n]\n" if n_rows else b"[]\n")
    return n_rows


# --- command line -----------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What a dataset costs beyond what is there, in bytes and seconds."""

    download: int = 0
    kept: int = 0  # on disk in the end
    peak: int = 0  # on disk at most, at the same time
    seconds: float = 0.0  # of downloading

    def add(self, download: int, unpacked: int, *, keep: bool, bytes_per_s: float) -> None:
        """An archive more, which is unpacked after all earlier ones and then deleted, unless ``keep``."""
        self.peak = max(self.peak, self.kept + download + unpacked)
        self.kept += unpacked + download * keep
        self.download += download
        self.seconds += download / bytes_per_s


def costs(store: Store, args: argparse.Namespace) -> dict[str, Cost]:
    """By dataset; what several of them need counts for the first. Each begins with what the ones before it keep."""
    found: dict[str, Cost] = {}
    seen: set[str] = set()
    kept = 0
    for name in dict.fromkeys(args.datasets):
        dataset, cost = DATASETS[name], Cost(kept=kept, peak=kept)
        for archive in chosen_archives(dataset, args):
            limit = limit_of(archive, args.limit or dataset.limit)
            is_there = store.settled(archive, Path(args.out) / dataset.folder, limit) is not None
            if archive.name not in seen and not is_there:
                size = archive.size or archive.about_bytes
                download = 0 if store.from_dir else store.left_to_download(archive, size, limit)
                keep = store.keep_archives or archive.is_slow
                cost.add(download, archive.unpacked_bytes(size, limit), keep=keep, bytes_per_s=archive.bytes_per_s)
            seen.add(archive.name)
        found[name], kept = cost, cost.kept
    return found


def total_cost(store: Store, args: argparse.Namespace) -> str:
    """One line, for before the first download."""
    found = costs(store, args).values()
    place = next(path for path in (Path(args.out).absolute() / "x").parents if path.exists())
    free, peak = shutil.disk_usage(place).free, max(cost.peak for cost in found)
    line = (
        f"{gigabytes(sum(cost.download for cost in found))} to download; {gigabytes(peak)} of disk while unpacking, "
        f"{gigabytes(max(cost.kept for cost in found))} in the end; {gigabytes(free)} are free in {place}"
    )
    return f"{line}: too little for all of it" if peak > free else line


def plan(store: Store, args: argparse.Namespace) -> str:
    lines, before = [], 0
    for name, cost in costs(store, args).items():
        dataset = DATASETS[name]
        slow = [archive for archive in chosen_archives(dataset, args) if archive.is_slow and cost.download]
        rate = f" at {min(a.bytes_per_s for a in slow) / 1e6:g} MB/s, as users report of its server" if slow else ""
        lines += [
            f"{name}: {dataset.about}",
            f"    {gigabytes(cost.download)} to download, {duration(cost.seconds)}{rate}; "
            f"{gigabytes(cost.peak - before)} of disk while unpacking, {gigabytes(cost.kept - before)} in the end",
            f"    for {', '.join(served_configs(dataset, args)) or 'no config by itself: see docs/data.md'}",
        ]
        lines += [f"    {archive.name}: or {archive.elsewhere}" for archive in slow]
        before = cost.kept
    lines.append(f"together: {total_cost(store, args)}")
    lines.append(
        f"Times at {USUAL_BYTES_PER_S / 1e6:g} MB/s. What is there already is not counted. Nothing was changed."
    )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"


def served_configs(dataset: Dataset, args: argparse.Namespace) -> list[str]:
    """The configs that name a file which the chosen archives make."""
    outputs = {output for archive in chosen_archives(dataset, args) for output in archive.outputs}
    wanted = {f'"data/{dataset.folder}/{output}"' for output in outputs}
    root = Path(__file__).resolve().parent.parent
    configs = sorted((root / "configs").glob("*.json"))
    return [str(path.relative_to(root)) for path in configs if any(one in path.read_text("utf-8") for one in wanted)]


def describe_datasets() -> str:
    lines = []
    for name, dataset in DATASETS.items():
        usual = [archive for archive in dataset.archives if not archive.subset or archive.subset in dataset.subsets]
        about = "" if all(archive.size for archive in usual) else "about "
        size = about + gigabytes(sum(archive.size or archive.about_bytes for archive in usual))
        outputs = sorted({output for archive in dataset.archives for output in archive.outputs})
        lines += [
            f"  {name}: {dataset.about}",
            f"      download {size}; licence: {dataset.licence}",
            f"      writes <out>/{dataset.folder}/ {', '.join(outputs)}",
        ]
        if dataset.subsets:
            available = ", ".join(f"{a.subset} ({a.size / 1e9:.2g} GB)" for a in dataset.archives if a.subset)
            words = f"subsets {available}; without --subset: {' and '.join(dataset.subsets)}"
            lines.append(textwrap.fill(words, 118, initial_indent=" " * 6, subsequent_indent=" " * 6))
        if dataset.limit:
            lines.append(f"      the first {dataset.limit:,}, unless --limit says otherwise")
        for archive in dataset.archives:
            if archive.is_slow:
                words = (
                    f"the server gives about {archive.bytes_per_s / 1e3:g} kB/s, so no more is downloaded than --limit "
                    f"needs, unchecked (the checksum is the whole archive's), and kept; or {archive.elsewhere}"
                )
                lines.append(textwrap.fill(words, 118, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"expected 0 to 3600 seconds, found {text}")
    return value


def parse_args() -> argparse.Namespace:
    parser = OneLineErrors(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="datasets (tinystories and wikitext write the same files, and so do coco and flickr8k: one of each):\n"
        f"{describe_datasets()}\n\n"
        "Archives are compared with their published checksum. For flickr8k none is published: the digest of the first\n"
        "download is recorded, and later ones are compared with it. Licences in brief; the publishers' pages bind.\n"
        "Exit codes: 0 done, 1 failed (network, disk, checksum), 2 bad arguments, 75 interrupted.",
    )
    parser.add_argument("datasets", nargs="+", choices=DATASETS, metavar="DATASET", help=", ".join(DATASETS))
    parser.add_argument("--out", default="data", metavar="DIR", help="folder to write to (default: data)")
    parser.add_argument(
        "--plan", action="store_true", help="print downloads, disk, time and configs of these datasets; change nothing"
    )
    parser.add_argument(
        "--subset",
        action="append",
        metavar="NAME",
        help="part of librispeech, coco or vqa; repeatable; rows of parts that are there already are kept",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="the first N recordings, images or texts of each archive",
    )
    parser.add_argument(
        "--from",
        dest="from_dir",
        metavar="DIR",
        help="folder with the archives or their contents; nothing is downloaded",
    )
    parser.add_argument("--mirror", metavar="URL", help="download URL/<archive> instead of the publisher's address")
    parser.add_argument(
        "--checksums", metavar="FILE", help="output of sha256sum or md5sum, in place of the published checksums"
    )
    parser.add_argument("--keep_archives", action="store_true", help="do not delete archives after unpacking")
    parser.add_argument("--force", action="store_true", help="overwrite files that this script did not make")
    parser.add_argument(
        "--retry_wait", type=seconds, default=1.0, metavar="S", help="seconds before the first retry (default: 1)"
    )
    return parser.parse_args()


def check(store: Store, args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: the arguments contradict each other, --from lacks something, or a file is not ours to overwrite.
    """
    if Path(args.out).is_file():
        raise UserError(f"--out {args.out}: expected a folder, found a file")
    datasets = {name: DATASETS[name] for name in args.datasets}
    subsets = {archive.subset for dataset in datasets.values() for archive in dataset.archives} - {""}
    for subset in args.subset or ():
        if subset not in subsets:
            expected = f"one of {', '.join(sorted(subsets))}" if subsets else "none for these datasets"
            raise UserError(f"--subset {subset}: expected {expected}")
    if store.mirror and not store.mirror.startswith(("http://", "https://")):
        raise UserError(f"--mirror {store.mirror}: expected an address that begins with http:// or https://")
    if store.from_dir and not store.from_dir.is_dir():
        raise UserError(f"--from {store.from_dir}: expected a folder, found none")
    claims, writers, lacking = read_claims(store), {}, []
    for name, dataset in datasets.items():
        for archive in chosen_archives(dataset, args):
            for output in archive.outputs:
                path = Path(args.out) / dataset.folder / output
                if writers.setdefault(output, name) != name:
                    raise UserError(
                        f"{writers[output]} and {name} both write {path}. Choose one, or give each its --out"
                    )
                if path.exists() and str(path.resolve()) not in claims and not args.force:
                    raise UserError(f"{path}: exists, and was not made by this script. --force overwrites it")
            if store.from_dir and (words := store.missing(archive)):
                lacking.append(words)
    if lacking:
        raise UserError(f"--from {store.from_dir}: missing {'; '.join(lacking)}")


def interrupt(signum: int, frame) -> None:
    raise Interrupted("interrupted. Run the same line again to go on")


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    store = Store(
        Path(args.out) / "downloads",
        from_dir=args.from_dir and Path(args.from_dir),
        mirror=args.mirror,
        checksums=read_checksums(Path(args.checksums)) if args.checksums else {},
        keep_archives=args.keep_archives,
        retry_wait_s=args.retry_wait,
    )
    check(store, args)
    if args.plan:
        print(plan(store, args))
        return
    log(total_cost(store, args))
    store.lock()
    for name in dict.fromkeys(args.datasets):
        log(f"{name}: {DATASETS[name].about}. Licence: {DATASETS[name].licence}")
        try:
            prepare(store, name, args)
        except OSError as error:
            where = error.filename or args.out
            raise RunError(
                f"{where}: {error.strerror or error}. What is complete stays; the same line goes on"
            ) from error


if __name__ == "__main__":
    try:
        main()
    except (UserError, RunError, Interrupted) as error:
        label = "" if isinstance(error, Interrupted) else "error: "
        print(f"{label}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
