"""Text files that a config key names, and their lines as the rows of a manifest."""

from pathlib import Path

from omni.common.errors import UserError
from omni.data.formats import TextLines
from omni.data.manifest import JoinedManifest, Manifest
from omni.data.open_manifest import expand, load_manifest


def text_files(files: str | Path | list[str]) -> list[Path]:
    """What ``expand`` finds, and no folder among it.

    Raises:
        UserError: there is no file for one of the names, or it is a folder.
    """
    paths = expand(files)
    if folder := next((path for path in paths if path.is_dir()), None):
        raise UserError(f'{folder}: expected a text file, found a folder. Name its files, such as "{folder}/*.txt"')
    return paths


def load_text(files: str | Path | list[str], **how) -> Manifest:
    """Rows ``{"text": line}``; ``manifest.format.dialogues``: whether only lines with dialogues are rows.

    Args:
        how: arguments of ``load_manifest``.

    Raises:
        UserError: some of the files have dialogues, others have none.
    """
    manifest = load_manifest(text_files(files), ("text",), "text", kind=TextLines, **how)
    parts = manifest.parts if isinstance(manifest, JoinedManifest) else [manifest]
    if other := next((part for part in parts if part.format.dialogues != manifest.format.dialogues), None):
        raise UserError(
            f"{other.path}: expected {'dialogues' if manifest.format.dialogues else 'lines without dialogues'}, as in "
            f"{parts[0].path}; of several files, all or none have dialogues"
        )
    return manifest
