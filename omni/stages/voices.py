"""Several voices: the speaker of each row, the named voices of a talker, and a reference recording for each sample."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from omni.common.errors import BadRow, UserError, reading_row
from omni.common.host import Host
from omni.data.manifest import Manifest, spread
from omni.data.measure import measure_rows
from omni.models.speech_architectures import MAX_SPEAKERS
from omni.models.talker import Talker
from omni.models.voices import VOICE_CODES
from omni.train.precompute import ManifestWithColumns

REFERENCE_CODES = 50  # length of the longest reference in training: 4 s, if a code lasts 80 ms
MAX_NAME = 128  # characters of a speaker's name; Common Voice has hashes of 128
_LOOKED_AT = 100  # rows, for a hint


# ---------------------------------------------------------------------------------------------------------------
# Speakers


def speaker_of(row: dict) -> str:
    """The name in a row's column ``speaker``, which may be an integer; "" if it is blank or absent.

    Raises:
        BadRow: too long, or no name.
    """
    name = row.get("speaker")
    if name is None or isinstance(name, int) and not isinstance(name, bool):
        name = "" if name is None else str(name)
    if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
        raise BadRow(f'expected a name of at most {MAX_NAME} characters in "speaker", found {ascii(name)[:60]}')
    return name.strip()


def speaker_key(name: str) -> int:
    """A hash of a name, never 0."""
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def speaker_keys(run: Host, manifest: Manifest) -> np.ndarray:
    """(rows,) uint64 ``speaker_key`` of each row, kept beside the index; 0 for a row that cannot be read."""
    return measure_rows(
        run, manifest, "speaker_keys", lambda manifest, row: speaker_key(speaker_of(manifest[row])), np.uint64
    )


def check_speakers(run: Host, manifest: Manifest, voice_layers: int) -> None:
    """Log that a column ``speaker`` has no effect on a talker of one voice.

    Raises:
        UserError: the talker has several voices, and no row names a speaker, or the rows name too many.
    """
    if voice_layers:
        found = np.unique(speaker_keys(run, manifest))
        if np.isin(found, (0, speaker_key(""))).all():
            raise UserError(
                f'{manifest.path}: expected names in a column "speaker", for key "voice_layers"; found none'
            )
        if (count := np.count_nonzero(found)) > MAX_SPEAKERS:
            raise UserError(
                f'{manifest.path}: expected at most {MAX_SPEAKERS:,} names in the column "speaker", found {count:,}: '
                f"leave some out, or the names of those with few recordings"
            )
    elif any(named(manifest, int(row)) for row in spread(np.arange(len(manifest)), _LOOKED_AT)):
        run.log(f'{manifest.path}: its column "speaker" has no effect, as voice_layers is 0: all rows train one voice')


def named(manifest: Manifest, row: int) -> bool:
    """Whether a row can be read and names a speaker."""
    try:
        with reading_row():
            return bool(speaker_of(manifest[row]))
    except BadRow:
        return False


def in_turns(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """``rows`` in an order in which speakers take turns, so that the first few rows have as many of each.

    Args:
        keys: ``speaker_keys`` of all rows.
    """
    _, speaker, counts = np.unique(keys[rows], return_inverse=True, return_counts=True)
    turn = np.empty(len(rows), np.int64)
    turn[np.argsort(speaker, kind="stable")] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows[np.lexsort((speaker, turn))]


# ---------------------------------------------------------------------------------------------------------------
# Named voices


@dataclass(frozen=True)
class Voices:
    """The named voices of a talker: ``codes`` (S, VOICE_CODES, Q) int64, a recording of each of the S ``names``."""

    names: list[str]
    codes: Tensor

    @classmethod
    def of(cls, talker: Talker) -> "Voices":
        return cls(talker.architecture.speakers, talker.voice_codes.cpu())

    @classmethod
    def find(cls, run: Host, coded: ManifestWithColumns, rows: np.ndarray) -> "Voices":
        """The speakers of ``rows``, by name, each with the codes of its first recordings, one after the other; repeated
        if they are too short."""
        manifest, codes, keys = coded.manifest, coded.computed["codes"], speaker_keys(run, coded.manifest)
        found = {}
        for clips in clips_by_speaker(coded, rows, keys):
            parts, length = [], 0
            for row in clips:
                parts.append(codes[row])
                if (length := length + len(codes[row])) >= VOICE_CODES:
                    break
            joined = np.concatenate(parts)
            found[speaker_of(manifest[int(clips[0])])] = np.resize(joined, (VOICE_CODES, joined.shape[1]))
        names = sorted(found, key=lambda name: (not name, name))  # the first is the default, so not the blank one
        run.log(f"{manifest.path}: {len(found):,} speakers: {', '.join(map(repr, names[:20]))}")
        return cls(names, torch.from_numpy(np.stack([found[name] for name in names]).astype(np.int64)))


def voice_of(talker: Talker, name: str, own: Tensor) -> Tensor | None:
    """The codes (N, Q) of a speaker's voice: the talker's of this name, else the beginning of an ``own`` recording.
    None for a talker of one voice."""
    if talker.voice_encoder is None:
        return None
    speakers = talker.architecture.speakers
    return talker.voice_codes[speakers.index(name)] if name in speakers else own[:REFERENCE_CODES]


def clips_by_speaker(coded: ManifestWithColumns, rows: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Those of ``rows`` that have codes, as one array for each speaker, in the order of the rows."""
    spans = coded.computed["codes"].spans[rows]
    rows = rows[(spans[:, 1] > spans[:, 0]) & (keys[rows] > 0)]
    rows = rows[np.argsort(keys[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(keys[rows])) + 1) if len(rows) else []


# ---------------------------------------------------------------------------------------------------------------
# References


class References:
    """The column ``reference`` of a ``ManifestWithColumns``: ``row["reference"](rng)`` gives the codes (N, Q) of a
    recording by the row's speaker.

    With a generator, as in training, another clip of the speaker, the row's own only if there is no other, cut at a
    random place to ``REFERENCE_CODES``. Without one, the voice of the speaker's name, or for a name that the talker
    does not have the beginning of the row's own recording.

    Args:
        keys: ``speaker_keys`` of all rows.
        rows: the clips to draw from.
    """

    def __init__(self, coded: ManifestWithColumns, keys: np.ndarray, rows: np.ndarray, voices: Voices) -> None:
        self.codes, self.keys = coded.computed["codes"], keys
        self.clips = {int(keys[clips[0]]): np.sort(clips) for clips in clips_by_speaker(coded, rows, keys)}
        self.named = {speaker_key(name): codes.numpy() for name, codes in zip(voices.names, voices.codes, strict=True)}
        arrays = (keys, rows.astype(np.int64), voices.codes.numpy())
        digests = [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays]
        self.sha256 = hashlib.sha256(" ".join([*digests, *voices.names]).encode()).hexdigest()

    def __getitem__(self, row: int) -> Callable[[np.random.Generator | None], np.ndarray]:
        return partial(self.codes_for, row)

    def codes_for(self, row: int, rng: np.random.Generator | None) -> np.ndarray:
        """The codes (N, Q) of a reference for ``row``."""
        key = int(self.keys[row])
        if rng is None:
            return self.named.get(key, self.codes[row][:REFERENCE_CODES])
        clips, chosen = self.clips[key], row
        if len(clips) > 1:
            index = int(rng.integers(len(clips) - 1))  # of the clips without the row
            chosen = clips[index + (index >= np.searchsorted(clips, row))]
        codes = self.codes[chosen]
        start = int(rng.integers(max(1, len(codes) - REFERENCE_CODES + 1)))
        return codes[start : start + REFERENCE_CODES]


def with_references(
    run: Host, coded: ManifestWithColumns, rows: np.ndarray, voices: Voices
) -> tuple[ManifestWithColumns, np.ndarray]:
    """``coded`` with the column ``reference``, drawn from ``rows``; and ``rows`` with the speakers taking turns."""
    keys = speaker_keys(run, coded.manifest)
    references = References(coded, keys, rows, voices)
    return ManifestWithColumns(coded.manifest, coded.computed | {"reference": references}), in_turns(rows, keys)
