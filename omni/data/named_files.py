"""Finds the files that rows name, under the name as written or as other systems write it, and never outside a root."""

import functools
import itertools
import os
import re
import stat
import unicodedata
from pathlib import Path, PureWindowsPath

from omni.common.errors import BadRow, reading_row
from omni.common.media import Media, is_data_uri, parse_data_uri, quoted, split_fragment

# folders beside a data set's table, and endings that its rows may leave away
_FOLDERS = ("wavs", "clips", "images", "audio", "data", "wav", "")
_ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".jpg", ".jpeg", ".png")
_ADDRESS = re.compile(r"[a-z][a-z0-9]+://", re.IGNORECASE)
_LISTED = 50_000  # names of a folder that are compared with a missing file's name


def find_file(name: str, folders: list[Path], root: str | None = None) -> Media:
    """The file ``name`` in the first of the ``folders`` that has one, or a part of it, see ``omni.common.media``; or
    the bytes of a data URI.

    If ``name`` is not found as written, it is tried without blanks around it, with ``/`` for ``\\``, and in the other
    Unicode forms. Without a root, data sets' own folders beside their table come last, see ``_FOLDERS``.

    Args:
        root: the only folder, which no name may leave; None: names may lead anywhere.

    Raises:
        BadRow: the file is missing, or lies outside ``root``.
    """
    if not isinstance(name, str) or "\0" in name:
        raise BadRow(f"expected a file name, found {quoted(repr(name))}")
    if is_data_uri(name):
        return parse_data_uri(name)
    with reading_row():
        problem = ""
        for folder, spelling in itertools.product(folders, _spellings(name)):
            path = folder / spelling
            try:
                found = stat.S_ISREG(os.stat(path).st_mode)
            except OSError as error:  # no such file; or a name too long, a loop of links, a locked folder
                if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                    problem = problem or f'"{quoted(name)}": {error.strerror}'
                continue
            if root is not None and not path.resolve().is_relative_to(folder.resolve()):
                raise BadRow(f"{quoted(name)} leaves the folder {root}")
            if found:
                return path
        if root is not None and not (folders[0] / name).resolve().is_relative_to(folders[0].resolve()):
            raise BadRow(f"{quoted(name)} leaves the folder {root}")
        if fragment := split_fragment(name):
            outer, part = fragment
            return part(find_file(outer, folders, root))
        if root is None and not problem and (path := _where_data_sets_have_it(folders[0], _plain(name))):
            return path
        raise BadRow(problem or _none_found(folders[0], name))


def _where_data_sets_have_it(folder: Path, name: str) -> Path | None:
    """LJSpeech's ``LJ001-0001`` is ``wavs/LJ001-0001.wav``, Common Voice's ``common_voice_en_1.mp3`` in ``clips``."""
    if Path(name).is_absolute():
        return None
    endings = ("",) if Path(name).suffix.lower() in _ENDINGS else _ENDINGS
    paths = (folder / inner / (name + ending) for inner, ending in itertools.product(_FOLDERS, endings))
    return next((path for path in paths if path.is_file()), None)


def _spellings(name: str) -> list[str]:
    """A name as it is written, and as other systems write it."""
    plain = _plain(name)
    forms = (unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))
    return list(dict.fromkeys([name, plain, *forms]))


def _plain(name: str) -> str:
    return name.strip().replace("\\", "/")


def _none_found(folder: Path, name: str) -> str:
    """The message that a file is missing, with the name of an existing file that differs little."""
    if _ADDRESS.match(name):
        return f'expected a file, found the address "{quoted(name)}": download it, and name the file'
    # a name with a drive is absolute, as one that begins with /
    shown = quoted(name) if PureWindowsPath(name).drive else folder / quoted(name)
    path = folder / _spellings(name)[-1]
    while path != path.parent and not path.parent.is_dir():
        path = path.parent
    if path.is_dir():
        return f'expected a file, found a folder at "{shown}"'
    if path.is_symlink():
        return f'expected a file, found a link to none at "{shown}"'
    near = _names_in(path.parent).get(_folded(path.name)) if path.parent.is_dir() else None
    return f'expected a file, found none at "{shown}"' + (f'; there is "{quoted(near)}"' if near else "")


@functools.lru_cache(maxsize=4)
def _names_in(folder: Path) -> dict[str, str]:
    with os.scandir(folder) as entries:
        return {_folded(entry.name): entry.name for entry in itertools.islice(entries, _LISTED)}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().casefold()
