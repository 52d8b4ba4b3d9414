"""Names of columns in other programs' files."""

from collections.abc import Iterable, Sequence

# This project's name -> the names that stand for it in common data sets, the likeliest first.
ALIASES = {
    "wav": (
        "audio_filepath", "audio_file", "audio_path", "wav_path", "wav_file", "audio", "path", "file_name", "filename",
        "filepath", "file", "sound",
    ),
    "image": (
        "image_path", "image_file", "img_path", "img", "picture", "path", "file_name", "filename", "filepath", "file",
    ),
    "text": ("sentence", "transcript", "transcription", "normalized_text", "normalised_text", "txt", "words"),
    "caption": ("text", "description", "sentence", "txt", "title"),
    "speaker": ("client_id", "speaker_id", "speaker_name", "spk", "spk_id"),
}  # fmt: skip
NAMES = frozenset(ALIASES) | {name for names in ALIASES.values() for name in names}
MEDIA_COLUMNS = ("wav", "image")
NO_TEXT = "_no_text"  # column: why a row has no text, if that is known
OPTIONAL = ("speaker",)  # columns that are renamed though no stage requires them


def sources(found: Iterable[str], wanted: Sequence[str]) -> dict[str, str]:
    """Which of the ``found`` columns stand for those of ``wanted`` that are missing: our name -> the file's."""
    found = list(found)
    taken = {name for name in wanted if name in found}
    renamed = {}
    for name in (*wanted, *OPTIONAL):
        if name in found or name in renamed:
            continue
        if other := next((other for other in ALIASES.get(name, ()) if other in found and other not in taken), None):
            renamed[name] = other
            taken.add(other)
    return renamed


def with_our_names(row: dict, wanted: Sequence[str]) -> dict:
    """A row with its columns also under the names of ``wanted``. The value of Hugging Face's ``{"path": NAME}`` is the
    name; NeMo's ``offset`` and ``duration``, in seconds, make it a part of the recording."""
    renamed = sources(row, wanted)
    for name, other in renamed.items():
        value = row[other]
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            value = value["path"]
        row = row | {name: value}
    offset, duration = row.get("offset"), row.get("duration")
    if "audio_filepath" in row and isinstance(row.get("wav"), str) and _is_time(offset):
        end = f"{offset + duration:.6f}" if _is_time(duration) else ""
        row = row | {"wav": f"{row['wav']}#t={offset:.6f},{end}"}
    return row


def _is_time(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
