"""Lines of a text file as rows, through an index as a manifest has one."""

from pathlib import Path

from omni.data.formats import TextLines
from omni.data.manifest import Manifest, load_manifest


def load_text(path: str | Path, **how) -> Manifest:
    """Rows ``{"text": line}``; ``manifest.format.dialogues``: whether they are those of dialogues alone.

    Args:
        how: as of ``load_manifest``.
    """
    return load_manifest(path, ("text",), "text", kind=TextLines, **how)
