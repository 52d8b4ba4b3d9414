"""Folders whose rows lie in several files: Kaldi's tables, and sounds or pictures beside their texts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omni.common.errors import BadRow, UserError
from omni.common.media import quoted
from omni.data.formats.columns import NO_TEXT
from omni.data.formats.gathered import KEY, PICTURES, SOUNDS, TABLES, TEXTS, Gathered, MediaCopies
from omni.data.records import other_encoding

_NAMED, _SHOWN = 12, 5  # tables that a message lists, files
_LISTED = (*TABLES, ".json", ".parquet", ".tar")
_NO_ROWS = ("dataset_infos", "dataset_info", "dataset_dict", "state")  # facts of Hugging Face's data sets


@dataclass
class Kaldi(Gathered):
    """A data directory of Kaldi, ESPnet or WeNet: ``wav.scp`` and ``text``, perhaps ``segments`` and ``utt2spk``."""

    name = "kaldi"

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        return (path / "wav.scp").is_file()

    def files(self, path: Path) -> list[Path]:
        return [path / name for name in ("wav.scp", "text", "segments", "utt2spk") if (path / name).is_file()]

    def rows(self, path: Path, media: MediaCopies) -> Iterator[dict]:
        recordings, texts = _pairs(path / "wav.scp"), _pairs(path / "text")
        for name, file in recordings.items():
            if file.endswith("|"):
                raise UserError(
                    f"{path / 'wav.scp'}: {quoted(name)} is a command, which is not run: {quoted(file)}. "
                    "Write its sound to a file first (Kaldi: wav-copy)"
                )
        speakers = _pairs(path / "utt2spk") if (path / "utt2spk").is_file() else {}
        clips = {name: file for name, file in recordings.items()}
        if (segments := path / "segments").is_file():
            clips = {}
            for name, place in _pairs(segments).items():
                try:
                    recording, start, end = place.split()
                    float(start), float(end)
                except ValueError:
                    raise UserError(
                        f"{segments}: {quoted(name)}: expected a recording and two times, found {quoted(place)}"
                    ) from None
                until = "" if float(end) < 0 else f"{float(end):.6f}"  # -1: to the end
                clips[name] = f"{recordings.get(recording, recording)}#t={float(start):.6f},{until}"
        for name, clip in clips.items():
            speaker = {"speaker": speakers[name]} if name in speakers else {}
            yield {KEY: name, "wav": clip, "text": texts.get(name, "")} | speaker


def _pairs(path: Path) -> dict[str, str]:
    """Kaldi's tables: a key and, after a blank, its value on each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "expected UTF-8 text"
        raise UserError(f"{path}: {why}") from error
    pairs = (line.strip().partition(" ") for line in (line.replace("\t", " ") for line in lines) if line.strip())
    return {key: value.strip() for key, _, value in pairs}


@dataclass
class FilesBesideTexts(Gathered):
    """A folder, with its subfolders, of sounds or pictures that each have a text of the same name beside them."""

    name, version = "files", 1

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        return path.is_dir() and any(True for _ in _media_files(path))

    def remark(self, path: Path) -> str:
        media = list(_media_files(path))
        texts = {text for file in media if (text := _text_of(file))}
        without = [file for file in media if _text_of(file) is None]
        stems = {file.with_suffix("") for file in media}  # a.lab may lie beside a.txt
        others = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in TEXTS and file not in texts)
        alone = [file for file in others if file.with_suffix("") not in stems]
        tables = sorted(file for file in path.iterdir() if file.suffix.lower() in TABLES)
        counts = [f"{len(without):,} sounds or pictures have no text beside them{_first_of(without)}"] * bool(without)
        counts += [f"{len(alone):,} texts have no sound or picture and are not used{_first_of(alone)}"] * bool(alone)
        counts += [f"tables are not read{_first_of(tables)}; to read one, name it"] * bool(tables)
        return f"{path}: {'; '.join(counts)}" if counts else ""

    def files(self, path: Path) -> list[Path]:
        media = list(_media_files(path))
        return media + [text for file in media if (text := _text_of(file))]

    def rows(self, path: Path, media: MediaCopies) -> Iterator[dict]:
        found = list(_media_files(path))
        if not any(map(_text_of, found)):
            expected = f"{found[0].with_suffix('.txt').name} for {found[0].name}, or a table (wav.scp, metadata.csv)"
            raise UserError(
                f"{path}: {len(found):,} sounds and pictures, but not one text beside them: "
                f"{which_table(path) or f'expected {expected}'}"
            )
        for file in found:
            name, text = str(file.relative_to(path)), _text_of(file)
            column = "wav" if file.suffix.lower() in SOUNDS else "image"
            yield {KEY: name, column: name} | (_read_text(text) if text else {"text": ""})

    def read(self, data: bytes | None, columns: list[str] | tuple[str, ...]) -> dict:
        try:
            return super().read(data, columns)
        except BadRow as error:
            if not str(error).endswith(" is empty"):
                raise
            raise BadRow("no text beside it, or an empty one") from error


def _read_text(path: Path) -> dict[str, str]:
    """The text of a row; or why it cannot be read."""
    try:
        return {"text": path.read_text("utf-8-sig").strip()}
    except UnicodeDecodeError as error:
        found = other_encoding(error.object) or f"byte {error.object[error.start]:#x}"
        return {"text": "", NO_TEXT: f"{path.name}: expected UTF-8 text, found {found}. Convert it with iconv"}
    except OSError as error:
        return {"text": "", NO_TEXT: f"{path.name}: cannot be read: {error.strerror}"}


def _first_of(files: list[Path]) -> str:
    more = ", ..." if len(files) > _SHOWN else ""
    return f" ({', '.join(quoted(file.name) for file in files[:_SHOWN])}{more})"


def which_table(path: Path) -> str:
    """The tables in a folder or in its subfolders, and how to name one: of Common Voice, train.tsv and others beside
    the folder clips. "" if there is none."""
    media = {file.with_suffix("") for file in _media_files(path)}  # a.json may be about a.png
    for pattern in ("*", "*/*"):
        tables = sorted(file for file in path.glob(pattern) if file.suffix.lower() in _LISTED and file.is_file())
        tables = [file for file in tables if file.with_suffix("") not in media and file.stem not in _NO_ROWS]
        if tables:
            names = [str(table.relative_to(path)) for table in tables]
            words = ((word, table) for word in ("train", "validated") for table in tables)
            likely = next((table for word, table in words if word in (table.stem, table.parent.name)), tables[0])
            more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            return f"found the tables {', '.join(map(quoted, names[:_NAMED]))}{more}. Name one of them: {likely}"
    return ""


def _media_files(path: Path) -> Iterator[Path]:
    return (file for file in sorted(path.rglob("*")) if file.suffix.lower() in SOUNDS + PICTURES and file.is_file())


def _text_of(file: Path) -> Path | None:
    return next((text for ending in TEXTS if (text := file.with_suffix(ending)).is_file()), None)
