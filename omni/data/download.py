"""Downloaded archives, and a record of the files unpacked from each.

A file that has its final name is complete, so after a kill at any instant the next run begins with the first missing
file. Imports only the standard library and tqdm, so that a script that downloads does not wait for torch.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omni.common.errors import RunError, UserError
from omni.common.files import SEAL, read_sealed_json, remove_temporary, write_sealed_json
from omni.data.archives import BLOCK_BYTES, Archive, progress, replacing, unpack
from omni.data.transfer import Transfer, check_space, log, not_following

_STEP_BYTES = 32 << 20  # downloaded beyond the estimate, where only the beginning of an archive is needed
_DIGEST_LENGTHS = {32: "md5", 40: "sha1", 64: "sha256"}  # in hexadecimal digits


def read_record(path: Path) -> dict | list | None:
    """Sealed JSON, or unsealed JSON of an earlier version; None if it is missing or, with a log line, damaged."""
    if not os.path.lexists(path):
        return None
    if (value := read_sealed_json(path)) is not None:
        return value
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(value, dict) and SEAL in value):
            return value
    log(f"{path}: damaged, so it is ignored")
    return None


def file_digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file, progress(path.stat().st_size, "B", f"{path.name}: checksum") as bar:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def digest_algorithm(digest: str) -> str | None:
    """``md5``, ``sha1`` or ``sha256`` by the number of hexadecimal digits; None: no digest."""
    return _DIGEST_LENGTHS.get(len(digest)) if re.fullmatch("[0-9a-f]+", digest) else None


@dataclass
class Store:
    """The folder of the downloaded archives, with a record of the files unpacked from each."""

    folder: Path
    from_dir: Path | None = None  # folder with archives or their content: nothing is downloaded
    mirror: str | None = None  # address of the archives: <mirror>/<name>
    checksums: Mapping[str, str] = field(default_factory=dict)  # archive -> digest that replaces the published one
    keep_archives: bool = False
    retry_wait_s: float = 1.0

    def lock(self) -> None:
        """
        Raises:
            UserError: the folder cannot be written, or another process works in it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock_file = open(self.folder / ".lock", "a", opener=not_following)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write there: {error.strerror}. Choose another --out") from error
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process is preparing data there. Wait for it") from None
        remove_temporary(self.folder)

    def settle(self, archive: Archive, folder: Path, limit: int | None) -> list[str]:
        """Make sure that an archive's items are below ``folder``: download and unpack them if they are not.

        Returns:
            Names of the items relative to ``folder``, the first ``limit`` of the archive.
        """
        limit = limit_of(archive, limit)
        items = self.settled(archive, folder, limit)
        if items is None:
            items, extras = self._unpacked(archive, folder, limit)
            os.sync()  # no power cut may leave the record without the files
            sizes = {name: (folder / name).stat().st_size for name in [*items, *extras]}
            record = {"limit": limit, "items": items, "sizes": sizes}
            write_sealed_json(self.folder / f"{archive.name}.files", record)
        if not self.keep_archives and not self.from_dir and not archive.is_slow:
            (self.folder / archive.name).unlink(missing_ok=True)
        return items

    def _unpacked(self, archive: Archive, folder: Path, limit: int | None) -> tuple[list[str], list[str]]:
        """Names of the items and extras, once they are there."""
        there = _bytes_below(folder / archive.root) if archive.root else 0  # from an interrupted run

        def space_for(size: int) -> int:
            return max(0, archive.unpacked_bytes(size, limit) - there)

        if self.from_dir:
            source = self._locate(archive)
        elif (
            archive.is_slow
            and limit
            and not (self.folder / archive.name).exists()
            and (found := self._beginning(archive, folder, limit, space_for))
        ):
            return found
        else:
            source = self._download(archive, space_for)
        if not source.is_dir():
            check_space(folder, space_for(source.stat().st_size))
        elif source.stat().st_dev != folder.stat().st_dev:  # else hard links, which take no space
            check_space(folder, _bytes_below(source / archive.root) - there)
        log(f"{source}: unpacking into {folder}")
        return unpack(archive, source, folder, limit)

    def _beginning(
        self, archive: Archive, folder: Path, limit: int, space_for: Callable[[int], int]
    ) -> tuple[list[str], list[str]] | None:
        """Names of the items and extras, unpacked from as much of the archive as they need; None if that is all of it.

        The checksum is that of the whole archive, so here only its structure is checked: of the compressed stream and
        of the tar. If that fails, more is downloaded, and in the end the whole is compared with its checksum.
        """
        part = self.folder / f"{archive.name}.part"
        for attempt in itertools.count(1):
            wanted = functools.partial(_bytes_wanted, archive, limit, attempt=attempt)
            if self._transfer(archive, space_for, wanted).run():
                return None
            log(f"{part}: unpacking {limit:,} files, unchecked: only the whole archive has a checksum")
            try:
                items, extras = unpack(archive, part, folder, limit)
            except RunError as error:
                log(f"{error}; more is needed")
                continue
            if len(items) == limit:
                log(f"{part}: kept, so that a larger --limit goes on from here. Delete it if you need the room")
                return items, extras

    def settled(self, archive: Archive, folder: Path, limit: int | None) -> list[str] | None:
        """Names of items that are unpacked completely; None if they must be unpacked (again)."""
        made = self.record(archive, folder)
        if made is None:
            return None
        if archive.convert and not archive.count:  # the limit is one of lines
            enough = made["limit"] == limit
        else:
            enough = made["limit"] is None or (limit is not None and limit <= made["limit"])
        return made["items"][: limit if archive.count else None] if enough else None

    def record(self, archive: Archive, folder: Path) -> dict | None:
        """``limit``, ``items`` and ``sizes`` of what is unpacked below ``folder``; None if a file of it is missing."""
        made = read_record(self.folder / f"{archive.name}.files")
        if not _is_record(made):
            return None
        for name, size in made["sizes"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                return None
        return made

    def left_to_download(self, archive: Archive, size: int, limit: int | None) -> int:
        """About how many bytes of an archive of ``size`` bytes ``settle`` will download."""
        if (self.folder / archive.name).exists():
            return 0
        part = self.folder / f"{archive.name}.part"
        there = part.stat().st_size if part.exists() else 0
        return max(0, (_bytes_wanted(archive, limit, size) if archive.is_slow and limit else size) - there)

    def missing(self, archive: Archive) -> str | None:
        """What ``from_dir`` lacks for this archive, for a message; None if nothing."""
        if (self.from_dir / archive.name).is_file() or (archive.root and (self.from_dir / archive.root).is_dir()):
            return None
        return archive.name + (f" (or, unpacked, {archive.root}/)" if archive.root else "")

    def _locate(self, archive: Archive) -> Path:
        file = self.from_dir / archive.name
        if not file.is_file():
            return self.from_dir
        if problem := self._mismatch(archive, file):
            raise UserError(f"{file}: {problem}. Download it again")
        return file

    def _download(self, archive: Archive, space_for: Callable[[int], int]) -> Path:
        path = self.folder / archive.name
        if not path.exists():
            self._transfer(archive, space_for, lambda total: total).run()
        if problem := self._mismatch(archive, path):
            aside = path.with_name(f"{path.name}.damaged")
            path.rename(aside)
            raise RunError(
                f"{path}: {problem}. Set aside as {aside.name}; the same line downloads it again. "
                "If the publisher has changed it and you trust that, give its digest with --checksums"
            )
        return path

    def _transfer(self, archive: Archive, space_for: Callable[[int], int], wanted: Callable[[int], int]) -> Transfer:
        url = f"{self.mirror.rstrip('/')}/{archive.name}" if self.mirror else archive.url
        size = None if archive.name in self.checksums else archive.size
        path, most = self.folder / archive.name, archive.most_bytes()
        return Transfer(url, path, size, most, space_for, self.retry_wait_s, archive.elsewhere, wanted)

    def _mismatch(self, archive: Archive, path: Path) -> str | None:
        """How the file differs from its checksum, for a message; None if it does not. The checksum is the user's, else
        the published one, else that of the first download, which is recorded."""
        record = self.folder / f"{archive.name}.sha256"
        expected = self.checksums.get(archive.name) or archive.checksum
        if not expected and record.exists():
            expected = record.read_text(encoding="utf-8", errors="replace").partition(" ")[0]
            if digest_algorithm(expected) is None:
                raise RunError(f"{record}: damaged. Delete it to take {archive.name} as it is now")
        algorithm = digest_algorithm(expected) or "sha256"
        found = file_digest(path, algorithm)
        if not expected:
            log(f"{archive.name}: no checksum is published. Recorded, to compare later downloads with: sha256 {found}")
            with replacing(record) as file:
                file.write(f"{found}  {archive.name}\n".encode())
            return None
        return None if found == expected else f"expected {algorithm} {expected}, found {found}"


def _bytes_wanted(archive: Archive, limit: int, total: int, attempt: int = 1) -> int:
    """Bytes of a slow archive's beginning in which the first ``limit`` items should be; more at each attempt."""
    return min(total, int(total * limit / archive.count * (0.95 + 0.05 * attempt)) + attempt * _STEP_BYTES)


def limit_of(archive: Archive, limit: int | None) -> int | None:
    """``limit`` if the archive has items or lines to count, else None."""
    return limit if archive.count or archive.convert else None


def _is_record(value: dict | list | None) -> bool:
    """Whether ``value`` is a record of unpacked files; an unsealed file of an earlier version can be anything."""
    if not isinstance(value, dict) or value.keys() != {"limit", "items", "sizes"}:
        return False
    limit, items, sizes = value["limit"], value["items"], value["sizes"]
    known = isinstance(items, list) and isinstance(sizes, dict) and (limit is None or isinstance(limit, int))
    return known and all(isinstance(name, str) and name in sizes for name in items)


def read_checksums(path: Path) -> dict[str, str]:
    """Lines as ``sha256sum`` and ``md5sum`` write them: file name -> digest.

    Raises:
        UserError: the file is not readable, or a line has another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--checksums {path}: cannot read it: {error}") from error
    checksums = {}
    for number, line in enumerate(lines, 1):
        digest, _, name = line.strip().partition(" ")
        if not name or digest_algorithm(digest) is None:
            raise UserError(f'{path}: line {number}: expected "<md5 or sha256>  <file name>", found "{line[:60]}"')
        checksums[name.strip().lstrip("*")] = digest
    return checksums


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
