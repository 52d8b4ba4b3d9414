"""Lines of a text file as the rows of a manifest."""

from pathlib import Path

from omni.common.errors import UserError
from omni.data.formats import TextLines
from omni.data.manifest import JoinedManifest, Manifest
from omni.data.open_manifest import load_manifest


def load_text(files: str | Path | list[str], **how) -> Manifest:
    """Rows ``{"text": line}``; ``manifest.format.dialogues``: whether only lines with dialogues are rows.

    Args:
        how: arguments of ``load_manifest``.

    Raises:
        UserError: some of the files have dialogues, others have none.
    """
    manifest = load_manifest(files, ("text",), "text", kind=TextLines, **how)
    parts = manifest.parts if isinstance(manifest, JoinedManifest) else [manifest]
    if other := next((part for part in parts if part.format.dialogues != manifest.format.dialogues), None):
        raise UserError(
            f"{other.path}: expected {'dialogues' if manifest.format.dialogues else 'lines without dialogues'}, as in "
            f"{parts[0].path}; of several files, all or none have dialogues"
        )
    return manifest
