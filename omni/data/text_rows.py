"""Lines of a text file as the rows of a manifest."""

from pathlib import Path

from omni.data.formats import TextLines
from omni.data.manifest import Manifest, load_manifest


def load_text(path: str | Path, **how) -> Manifest:
    """Rows ``{"text": line}``; ``manifest.format.dialogues``: whether only lines with dialogues are rows.

    Args:
        how: arguments of ``load_manifest``.
    """
    return load_manifest(path, ("text",), "text", kind=TextLines, **how)
