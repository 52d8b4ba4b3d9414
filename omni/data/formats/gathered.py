"""Formats whose rows lie in several files, or in a file that cannot be read by lines.

Their rows are gathered once, as JSON lines in the index. Sound and pictures stay where they are, unless they are
compressed there, as in Parquet: then the index has a copy.
"""

import hashlib
import json
import math
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from omni.common.errors import UserError
from omni.common.media import quoted
from omni.data.formats.columns import NAMES
from omni.data.formats.json_rows import LINES, OBJECT, JsonLines
from omni.data.records import MAX_ROW_BYTES

ROW_COLUMNS = NAMES | {"messages", "conversations", "conversation", "images", "instruction"}
FOLDER = "_folder"  # column: folder of a row's files, if that is not the folder of the table
KEY = "key"  # column: what the data set calls a row
MEDIA = "media.bin"  # file in the index with copies of sounds and pictures
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".webm")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
TEXTS = (".txt", ".lab", ".caption")
# of rows; in a folder with sounds or pictures, .json may be about one of these
TABLES = (".tsv", ".csv", ".jsonl", ".ndjson")


@dataclass
class Gathered(JsonLines):
    """A subclass defines ``name``, ``recognises`` and ``rows``, and ``files`` if there are several."""

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        return False

    def remark(self, path: Path) -> str:
        return ""

    def files(self, path: Path) -> list[Path]:
        """The files that rows are gathered from: when one changes, they are gathered again."""
        return [path]

    def rows(self, path: Path, media: "MediaCopies") -> Iterator[dict]:
        """The rows; ``media`` takes the bytes of sounds and pictures that cannot be read where they are.

        Raises:
            UserError: the files are not of this format.
        """
        raise NotImplementedError


class MediaCopies:
    """A file with copies of sounds and pictures; equal ones are written once, so that they have one name."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.names = file, {}

    def add(self, data: bytes) -> str:
        """The name of the place where ``data`` are."""
        digest = hashlib.sha256(data).digest()
        if digest not in self.names:
            first = self.file.tell()
            self.file.write(data)
            self.names[digest] = f"{MEDIA}#bytes={first},{first + len(data)}"
        return self.names[digest]


# ---------------------------------------------------------------------------------------------------------------
# Archives


@dataclass
class TarShard(Gathered):
    """A tar archive of WebDataset: the files of a row have the same name up to the first dot, and follow each other."""

    name = "tar"

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        return head[257:262] == b"ustar" or path.suffix.lower() == ".tar"

    def rows(self, path: Path, media: MediaCopies) -> Iterator[dict]:
        row: dict = {}
        end = 0  # of the last member, with its padding
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    end = archive.offset
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if row and row[KEY] != key:
                        yield row
                        row = {}
                    self._add(row.setdefault(KEY, key) and row, path, archive, member, f".{ending.lower()}")
        except tarfile.TarError as error:
            raise UserError(
                f"{path}: not a tar archive that can be read: {error}. A compressed one has to be unpacked first "
                "(gunzip): its files cannot be read one by one"
            ) from error
        _refuse_lost_members(path, end)
        if row:
            yield row

    @staticmethod
    def _add(row: dict, path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> None:
        column = "wav" if ending in SOUNDS else "image" if ending in PICTURES else None
        if column in row:  # no name: reading the row will say so
            row[column] = [*(row[column] if isinstance(row[column], list) else [row[column]]), member.name]
        elif column:
            first = member.offset_data
            row[column] = f"{path.name}#bytes={first},{first + member.size}"
        elif member.size <= MAX_ROW_BYTES and ending in (*TEXTS, ".json", ".cls"):
            try:
                text = archive.extractfile(member).read().decode("utf-8-sig")
                fields = json.loads(text) if ending == ".json" else {"class" if ending == ".cls" else "text": text}
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise UserError(f"{path}: {quoted(member.name)}: {error}") from error
            if not isinstance(fields, dict):
                raise UserError(f"{path}: {quoted(member.name)}: expected a JSON object, found {quoted(text)}")
            row.update({name: value for name, value in fields.items() if name not in row})


def _refuse_lost_members(path: Path, end: int) -> None:
    """After a damaged header, Python's ``tarfile`` takes the rest of an archive for its end.

    Raises:
        UserError: something else than zeros follows the last member that was found, or the mark of the end is missing.
    """
    with open(path, "rb") as file:
        file.seek(end)
        rest = 0
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise UserError(f"{path}: damaged at byte {end:,}: files that follow cannot be found. Fetch it again")
            rest += len(chunk)
    if not rest:
        raise UserError(f"{path}: ends after byte {end:,} without the mark of an archive's end. Fetch it again")


@dataclass
class Parquet(Gathered):
    """A Parquet file, such as those of the Hugging Face hub, with the bytes of sounds and pictures in its columns."""

    name = "parquet"

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        return head.startswith(b"PAR1")

    def rows(self, path: Path, media: MediaCopies) -> Iterator[dict]:
        import pyarrow  # here: it loads slowly, and other formats do not need it
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=64):
                    for row in batch.to_pylist():
                        yield _plain(row, media)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file that can be read: {str(error).splitlines()[0]}") from error


def _plain(value, media: MediaCopies):
    """A value as JSON can write it: bytes, and structures of bytes with a path, become names of places in ``media``."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    elif isinstance(value, dict) and "bytes" in value and isinstance(value.get("path"), str):
        return value["path"]
    if isinstance(value, bytes):
        return media.add(value)
    if isinstance(value, dict):
        return {str(name): _plain(one, media) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one, media) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


# ---------------------------------------------------------------------------------------------------------------
# One JSON object


@dataclass
class JsonObject(Gathered):
    """A JSON file with one object: COCO's captions. Others are refused, with what to do."""

    name = "object"

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        text = head.decode("utf-8-sig", "replace").lstrip()
        if path.suffix.lower() in LINES or not re.match(r"\{" if path.suffix.lower() == ".json" else OBJECT, text):
            return False
        line = text.splitlines()[0]
        try:
            found = json.loads(line)  # a first line that is an object: JSON lines
            return _is_coco(found) or not text[len(line) :].strip() and bool(_list_of_rows(found))
        except ValueError:
            return "\n" in text or len(head) > MAX_ROW_BYTES >> 5

    def rows(self, path: Path, media: MediaCopies) -> Iterator[dict]:
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{path}: expected JSON, an array of objects or an object a line: {error}") from error
        if not _is_coco(found):
            own = _list_of_rows(found)
            lists = [own] if own else [key for key, value in found.items() if isinstance(value, list)] or ["KEY"]
            raise UserError(
                f"{path}: one JSON object with the keys {quoted(', '.join(found))}, expected an array of objects or an "
                f"object a line. If its rows are below {lists[0]}: jq -c '.{lists[0]}[]' {path.name} > rows.jsonl"
            )
        yield from _coco_rows(path, found)


def _is_coco(found) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(key), list) for key in ("images", "annotations"))


def _list_of_rows(found: dict) -> str | None:
    """The key of an object under which rows lie; None if the object is a row itself."""
    if ROW_COLUMNS & found.keys():
        return None
    for key, value in found.items():
        several = isinstance(value, list) and len(value) > 1 and all(isinstance(one, dict) for one in value)
        if several and ROW_COLUMNS & value[0].keys() and not {"role", "from", "speaker"} & value[0].keys():
            return key
    return None


def _coco_rows(path: Path, found: dict) -> Iterator[dict]:
    """COCO's captions, a row each: ``images`` have an id and a ``file_name``, ``annotations`` an image's id and a text.
    The pictures of ``annotations/captions_train2017.json`` lie in the folder ``train2017`` beside ``annotations``."""
    try:
        names = {image["id"]: image["file_name"] for image in found["images"]}
        pairs = [(names[one["image_id"]], one["caption"]) for one in found["annotations"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: images and annotations, as COCO has them, but {error} is missing; expected captions, as in "
            "captions_train2017.json"
        ) from error
    inner = path.stem.rpartition("_")[2]
    folders = (
        ".",
        "images",
        f"../{inner}",
        f"../images/{inner}",
        f"../images/{inner.removesuffix('.json')}",
        "../images",
    )
    first = next(iter(names.values()), "")
    folder = next((folder for folder in folders if (path.parent / folder / first).is_file()), None)
    for name, caption in pairs:
        yield {KEY: name, "image": name, "caption": caption} | ({} if folder in (None, ".") else {FOLDER: folder})
