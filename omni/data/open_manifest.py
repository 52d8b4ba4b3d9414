"""Opens the files that a config names as manifests, and makes their indexes."""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from omni.common.errors import UserError
from omni.common.files import file_stat, files_stat, replace_file, write_sealed_json
from omni.common.host import Host
from omni.common.media import quoted
from omni.data.formats import Format, Parquet, TarShard, format_of
from omni.data.formats.folders import which_table
from omni.data.formats.gathered import MEDIA, TABLES, Gathered, MediaCopies
from omni.data.index import ROWS, copy_facts, prepare_index, save_array, why_stale
from omni.data.manifest import JoinedManifest, Manifest
from omni.data.records import other_encoding

_VERSION = 5
_CHANGED = "{}: changed while it was read. Run the same command again when it is complete"
_MOST_SHARDS = 100_000
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of Hugging Face, LJSpeech
# of a shard, by its name
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?:ing)?(?![a-z])", re.IGNORECASE)
_CACHE = re.compile(r"\.(index|tokens)-")  # in the name of a folder that lies beside the data; no pattern means it


def prepare_manifest(
    run: Host, files: str | list[str], columns: tuple[str, ...], key: str, *, kind: type[Format] | None = None
) -> Manifest:
    """``load_manifest`` inside a run: rank 0 makes the index while the others wait."""
    where = {"cache_dir": run.config.cache_dir, "log": run.log, "check_stop": run.check_stop}
    with run.main_process_first():
        return load_manifest(files, columns, key, kind=kind, **where)


def load_manifest(
    files: str | Path | list[str] | list[Path],
    columns: tuple[str, ...],
    key: str,
    *,
    kind: type[Format] | None = None,
    cache_dir: str | None = None,
    log: Callable[[str], None] = print,
    check_stop: Callable[[], None] = lambda: None,
) -> Manifest:
    """Open a manifest; its index is made once, and again when a file changes.

    Args:
        files: a file, the folder of a data set, a pattern such as ``shards/*.tar``, or a list of these.
        columns: columns that every row must fill.
        key: column by which rows are split: equal values are in one split.
        kind: the format; default: the one that recognises the file.
        cache_dir: folder for the index; default: the manifest's own.

    Raises:
        UserError: a file is missing, is not of its format, or has no row that can be used.
    """
    parts = []
    for path in expand(files):
        form = kind() if kind else _format_of(path)
        gathered = _gathered(path, form, cache_dir, log, check_stop) if isinstance(form, Gathered) else None
        rows = gathered / ROWS if gathered else path
        version = [form.version] * bool(form.version) + ([gathered.name] if gathered else [])
        folder = _cache_folder(path, cache_dir, [columns, key, kind and kind.name, *version])
        make = functools.partial(_make_index, path, rows, folder, form, columns, key, log, check_stop)
        prepare_index(rows, folder, make, log, check_stop)
        parts.append(Manifest(path, folder, gathered))
        if parts[-1].remark:
            log(parts[-1].remark)
    return _joined(parts, cache_dir)


def _cache_folder(path: Path, cache_dir: str | Path | None, facts: list) -> Path:
    """The folder of what is made of a file, beside it or in ``cache_dir``; other ``facts`` have another one."""
    digest = hashlib.sha256(json.dumps([_VERSION, str(path.resolve()), *facts]).encode()).hexdigest()[:12]
    return Path(cache_dir or path.parent) / f"{path.name}.index-{digest}"


def _joined(parts: list[Manifest], cache_dir: str | None) -> Manifest:
    if len(parts) == 1:
        return parts[0]
    first = parts[0].path
    digest = hashlib.sha256(" ".join(str(part.folder.resolve()) for part in parts).encode()).hexdigest()[:12]
    return JoinedManifest(parts, Path(cache_dir or first.parent) / f"{first.name}.index-{digest}")


class NothingFound(UserError):
    """A name or a pattern has no file."""


def expand(files: str | Path | list[str] | list[Path]) -> list[Path]:
    """The files and folders that a config key or an argument names.

    Raises:
        NothingFound: there is none for one of the names.
        UserError: a file is named twice, or a folder has several tables or splits.
    """
    found: list[Path] = []
    names = files if isinstance(files, list) else [files]
    for name in names:
        path = Path(name).expanduser()
        patterns = _without_braces(str(path))
        matching = (
            [path] if path.exists() else sorted({Path(n) for p in patterns for n in glob.glob(p, recursive=True)})
        )
        matching = [match for match in matching if not _CACHE.search(match.name)]
        if not matching:
            kind = "files like it" if glob.has_magic(str(name)) or len(patterns) > 1 else "a file"
            raise NothingFound(f"{name}: expected {kind}, found none")
        found += (table for match in matching for table in _tables_of(match))
    if twice := next((path for path, count in Counter(found).items() if count > 1), None):
        raise UserError(f"{twice}: named twice, expected each file once")
    return found


def _without_braces(pattern: str) -> list[str]:
    """WebDataset's ``shard-{000..012}.tar`` as a name for each number; another name as it is."""
    if not (found := re.fullmatch(r"(.*?)\{(\d+)\.\.(\d+)\}(.*)", pattern)):
        return [pattern]
    before, first, last, after = found.groups()
    numbers = range(int(first), min(int(last), int(first) + _MOST_SHARDS) + 1)
    return [f"{before}{number:0{len(first)}}{after}" for number in numbers]


def _tables_of(path: Path) -> list[Path]:
    """A file as it is; for the folder of a data set, the files with its rows: its table, or its shards.

    Raises:
        UserError: the folder has several tables, or shards of several splits.
    """
    if not path.is_dir() or (path / "wav.scp").is_file():
        return [path]
    names = sorted(name for name in os.listdir(path) if not name.startswith((".", "~$")))
    metadata = [[name] for wanted in _METADATA for name in names if name.lower() == wanted]  # Hugging Face, LJSpeech
    tars = [name for name in names if name.lower().endswith(".tar")]
    beside = {f"{name[:-4].lower()}.parquet" for name in tars} | set(_METADATA)  # what img2dataset notes
    parquet = [name for name in names if name.lower().endswith(".parquet") and name.lower() not in beside]
    kinds = [*metadata, *filter(None, (tars, parquet))]
    if not kinds:
        return [path]
    if others := kinds[1:] + [
        [name] for name in names if name.lower().endswith(TABLES) and name.lower() not in _METADATA
    ]:
        found = ", ".join(quoted(files[0]) for files in kinds[:1] + others)
        first = path / (kinds[0][0] if len(kinds[0]) == 1 else f"*{Path(kinds[0][0]).suffix}")
        raise UserError(f"{path}: has several tables ({found}). Name those to read, such as {first}")
    if len(splits := sorted({found[1].lower() for name in kinds[0] if (found := _SPLIT.search(name))})) > 1:
        own = path / f"*{'train' if 'train' in splits else splits[0]}*{Path(kinds[0][0]).suffix}"
        raise UserError(f"{path}: has the splits {', '.join(splits)}. Name the files of one, such as {own}")
    return [path / name for name in kinds[0]]


def _format_of(path: Path) -> Format:
    """
    Raises:
        UserError: the file is not UTF-8, or the folder is not that of a data set.
    """
    if path.is_dir():
        if (form := format_of(path, b"")) is None:
            found = which_table(path)
            raise UserError(
                f"{path}: expected a file, or a folder with wav.scp, metadata.csv, metadata.jsonl, *.tar or *.parquet, "
                f"or with sounds or pictures that have texts of the same names beside them{found and f'; {found}'}"
            )
        return form
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise UserError(f"{path}: empty, expected rows")
    form = format_of(path, head)
    if not isinstance(form, (TarShard, Parquet)) and (encoding := other_encoding(head)):
        raise UserError(f"{path}: expected UTF-8 text, found {encoding}. Convert it with iconv")
    return form


def _make_index(
    path: Path, source: Path, folder: Path, form: Format, columns: tuple[str, ...], key: str, log, check_stop
) -> None:
    for old in (*folder.glob("*.np[yz]"), *folder.glob("*.json")):  # the index and measurements of earlier content
        old.unlink()
    stat = file_stat(source)
    digest, size = hashlib.sha256(), stat["size"]
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"index {path.name}", disable=None)

    def chunks() -> Iterator[bytes]:
        for chunk in form.chunks(source):
            check_stop()
            digest.update(chunk)
            bar.update(len(chunk))
            yield chunk

    with bar:
        rows = form.index(path, chunks(), columns, key)
    if file_stat(source) != stat:
        raise UserError(_CHANGED.format(path))
    assert rows.end in (size, None), "bytes after the last row"
    arrays = {"spans": rows.spans, "keys": rows.keys} | ({} if rows.numbers is None else {"numbers": rows.numbers})
    for name, values in arrays.items():
        save_array(folder / f"{name}.npy", values)
    meta = {"stat": stat, "sha256": digest.hexdigest(), "arrays": list(arrays), "columns": columns, "copies": {}}
    meta["remark"] = form.remark(path)
    write_sealed_json(folder / "meta.json", meta | {"format": form.name, "reading": dataclasses.asdict(form)})
    log(f"indexed {path}: {rows.summary}")


def _gathered(path: Path, form: Gathered, cache_dir: str | None, log, check_stop) -> Path:
    """The folder with the rows of several files, or of an archive, as JSON lines. All stages use the same one, and one
    that lies beside the data serves wherever ``cache_dir`` is. Files that have changed get another folder: a training
    that is running reads what it began with."""
    own = path.resolve()  # one folder, however the file is named
    try:
        stat = files_stat(form.files(own))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    facts = ["rows", form.name, form.version, stat]
    beside, folder = (_cache_folder(path, where, facts) for where in (None, cache_dir))
    how = {"stat": lambda _: stat, "sha256": None}
    if beside != folder and why_stale(path, beside, **how) is None:
        folder = beside
    else:
        make = functools.partial(_gather, path, folder, form, stat, check_stop)
        prepare_index(path, folder, make, log, check_stop, **how)
    for old in sorted(folder.parent.glob(f"{glob.escape(path.name)}.index-*/{ROWS}")):
        if old.parent != folder:
            log(f"{old.parent}: rows of {path.name} as it was. Delete it when no training reads it any more")
    return folder


def _gather(path: Path, folder: Path, form: Gathered, stat: dict, check_stop) -> None:
    (folder / "meta.json").unlink(missing_ok=True)
    with open(folder / MEDIA, "wb") as file:  # not atomically: it counts only once meta.json has its digest
        media = MediaCopies(file)

        def write(file) -> None:
            for row in tqdm(form.rows(path, media), unit="row", desc=f"gather {path.name}", disable=None):
                check_stop()
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

        replace_file(folder / ROWS, write)
    if not (folder / MEDIA).stat().st_size:
        (folder / MEDIA).unlink()
    if files_stat(form.files(path.resolve())) != stat:
        raise UserError(_CHANGED.format(path))
    copies = {file.name: copy_facts(file) for file in (folder / ROWS, folder / MEDIA) if file.exists()}
    write_sealed_json(folder / "meta.json", {"stat": stat, "sha256": None, "arrays": [], "copies": copies})
