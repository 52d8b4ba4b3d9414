"""The base class of the tasks of stage E: a manifest's row becomes messages, a question and the true answer."""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from omni.common.errors import BadRow, TooLong, reading_row
from omni.common.text import visible
from omni.data.audio import audio_length, resampled_length
from omni.data.manifest import Manifest, ManifestDataset
from omni.data.open_manifest import load_manifest
from omni.data.order import permute
from omni.stages.tasks.measures import CANDIDATES, References, normalise_answer
from omni.stages.tasks.processor import Encoded, Processor
from omni.train.precompute import ManifestWithColumns
from omni.train.run import Run

ALL, FIRST_TURNS, NOTHING = range(3)  # how much of a row fits into the context
TASKS: dict[str, type["SftTask"]] = {}  # by name, see ``sft_task``


def sft_task(cls: type["SftTask"]) -> type["SftTask"]:
    """Register a task: a decorator."""
    TASKS[cls.name] = cls
    return cls


@dataclass
class Side:
    """The training or the validation side of a mixture, while its tasks are prepared."""

    run: Run
    config: Any  # SftConfig
    processor: Processor
    training: bool
    rows: dict[str, tuple[Manifest, np.ndarray]] = field(default_factory=dict)  # of each file, by its config key
    shared: dict[str, Any] = field(default_factory=dict)  # objects that several tasks use


class SftTask(ManifestDataset):
    """Rows of one task. A sample is (sequence, references of its answer).

    A new task is a subclass with ``@sft_task`` in a new file of this folder; it sets these class variables.

    Args:
        processor: makes sequences of conversations.
        config: of stage E.
        others: see ``ManifestDataset``.
    """

    name: ClassVar[str] = ""  # in task_weights and metrics
    file_key: ClassVar[str]  # config key of its file; if the config has no such key, the one below task_files
    columns: ClassVar[tuple[str, ...]] = ()  # required columns
    split_by: ClassVar[str] = "text"  # column: rows with equal values are never on both sides
    splits_both_files: ClassVar[bool] = False  # val_split holds out values of split_by, even with a validation file
    reads: ClassVar[tuple[str, ...]] = ()  # "image", "audio": files that encoders read
    needs: ClassVar[tuple[str, ...]] = ()  # config keys of the stages that it requires
    wordings: ClassVar[tuple[str, ...]] = ()  # of questions; validation uses the first
    measure: ClassVar[str] = "exact"  # of its answers, in ``omni.stages.tasks.measures``
    length_column: ClassVar[str | None] = None  # files whose lengths decide how many positions a row takes
    cacheable: ClassVar[bool] = True  # whether its images and recordings may be read as cached features
    standalone: ClassVar[bool] = True  # needs one file only, so that scripts/evaluate.py can score it

    def __init__(self, manifest: Manifest, rows: np.ndarray, processor: Processor, config: Any, **others) -> None:
        super().__init__(manifest, rows, **others)
        self.processor, self.config = processor, config

    # Defined by a task --------------------------------------------------------------------------------------------

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        """The row as a conversation that ends with an answer, see ``Processor.encode``. ``image`` and ``recording``
        give its files as parts that are not opened yet.

        Args:
            rng: for random wordings and questions; None outside training.
        """
        raise NotImplementedError

    def accepted_answers(self, row: dict, messages: list[dict]) -> list[str]:
        """What is accepted as the last answer, first the true one; by default also the texts in the column
        ``accepted_answers``. Empty: the row is not scored."""
        return [messages[-1]["content"], *listed_texts(row, "accepted_answers")]

    def measures_of(self, row: dict) -> tuple[str, ...]:
        """Names of the row's measures. The first gives its score, which by default is ``measure``; others are only
        reported."""
        return (self.measure,)

    @classmethod
    def open(cls, path: str | Path, **how) -> Manifest:
        """A file of this task; ``how``: as ``load_manifest`` takes it."""
        return load_manifest(path, cls.columns, cls.split_by, **how)

    @classmethod
    def select(cls, side: Side, manifest: Manifest, rows: np.ndarray) -> tuple[Manifest, np.ndarray, dict[str, Any]]:
        """The manifest, with columns computed for the task; the usable ``rows``; further arguments of the class."""
        return manifest, rows, {}

    def readers(self, kind: str) -> list[Any]:
        """Objects that open the files of one kind of ``reads``, with ``manifest``, ``row_numbers`` and, for images,
        ``image_root``. Their manifest gets a column of cached features."""
        return [self] if kind in self.reads else []

    def questions(self, rows: np.ndarray) -> list[str]:
        """What these rows ask in validation, if few questions may be asked about many rows, else []."""
        return []

    def depends_on(self) -> list:
        """Digests of other inputs of the rows' lengths than data and processor."""
        return [zlib.crc32(json.dumps(self.wordings).encode())]

    # Shared by all tasks --------------------------------------------------------------------------------------------

    def read(self, row: dict, rng: np.random.Generator | None) -> tuple[Encoded, References]:
        try:
            return self._read(row, self.messages(row, rng))
        except TooLong:
            if rng is None:
                raise
            return self._read(row, self.messages(row, None))  # one that fits, if the row was measured

    def _read(self, row: dict, messages: list[dict]) -> tuple[Encoded, References]:
        messages = [message | {"content": self._opened(message["content"])} for message in messages]
        while True:
            try:
                return self.encode(row, messages), self._references(row, messages)
            except TooLong:
                ends = answer_ends(messages)
                if len(ends) < 2:
                    raise
                messages = messages[: ends[-2]]  # without the last question and its answer

    def _references(self, row: dict, messages: list[dict]) -> References:
        accepted = (text for text in self.accepted_answers(row, messages) if visible(text).strip())
        return References(tuple(accepted), self.measures_of(row))

    def candidates(self, row: int, references: References) -> tuple[str, ...]:
        """The true answer of the row at an index, and up to 63 answers of other rows, for ``rank_among_64``.

        The others are drawn by a hash of the row's number, so they are the same in each run. They differ from each
        other and from all accepted answers.
        """
        own, found = int(self.row_numbers[row]), [references.accepted[0]]
        known = {normalise_answer(text) for text in references.accepted}
        for start in range(0, len(self), CANDIDATES):
            positions = np.arange(start, min(start + CANDIDATES, len(self)))
            for number in self.row_numbers[permute(positions, len(self), own)]:
                if len(found) == CANDIDATES:
                    return tuple(found)
                try:
                    with reading_row():
                        answer = self.messages(self.manifest[int(number)], None)[-1]["content"]
                except BadRow:  # reported where it is an item
                    continue
                if normalise_answer(answer) not in known:
                    found.append(answer)
                    known.add(normalise_answer(answer))
        return tuple(found)

    def room(self, row: dict) -> int:
        """How much of a row fits into ``ctx_len``: ``ALL``, ``FIRST_TURNS`` or ``NOTHING``.

        Raises:
            BadRow: the row cannot be used.
        """
        messages = self.messages(row, None)
        if self.fits(messages):
            return ALL
        ends = answer_ends(messages)
        return FIRST_TURNS if len(ends) > 1 and self.fits(messages[: ends[0]]) else NOTHING

    def fits(self, messages: list[dict]) -> bool:
        return self.processor.fits(messages, self._mel_frames)

    def encode(self, row: dict, messages: list[dict]) -> Encoded:
        return self.processor.encode(messages)

    def collate(self, samples: list[tuple[Encoded, References]]) -> dict:
        return self.processor.collate([encoded for encoded, _ in samples])

    def sample(self, row: int, epoch: int, bad: dict[str, str]) -> tuple[Encoded, References] | None:
        """The sample of ``row``; in training, of the next good row if it is bad. Adds errors by row to ``bad``."""
        return self._sample(row, epoch, bad)

    image_root = property(lambda self: self.config.image_root)

    def image(self, row: dict) -> dict:
        """The row's image as a part of a message, not opened yet."""
        return {"type": "image", "row": row}

    def recording(self, row: dict, manifest: Manifest | ManifestWithColumns | None = None) -> dict:
        """The recording of a row, by default of the own manifest, as a part of a message, not opened yet."""
        return {"type": "audio", "row": row, "manifest": manifest or self.manifest}

    def _opened(self, content: str | list[dict]) -> str | list[dict]:
        """A message's content with its images and recordings as tensors: from their files, or the cached features."""
        if isinstance(content, str):
            return content
        opened = {"text": lambda part: part, "image": self._open_image, "audio": self._open_recording}
        return [opened[part["type"]](part) for part in content]

    def _open_image(self, part: dict) -> dict:
        row = part["row"]
        path = self.manifest.file(row, "image", self.image_root)
        return self.processor.image(path, row.get("patches"))

    def _open_recording(self, part: dict) -> dict:
        row = part["row"]
        path, text = part["manifest"].file(row, "wav"), visible(row.get("text", "")).strip()
        return self.processor.recording(path, text, row.get("frames"))

    def _mel_frames(self, part: dict) -> int:
        """The mel frames of a recording, by its header; the largest number if the recording is not known."""
        most, mel = self.processor.max_mel_length, self.processor.mel
        if part["row"] is None:
            return most
        length = audio_length(part["manifest"].file(part["row"], "wav"))
        return min(most, int(mel.frames(resampled_length(*length, mel.sample_rate))))


def answer_ends(messages: list[dict]) -> list[int]:
    """Numbers of messages up to and with each answer."""
    return [count for count, message in enumerate(messages, start=1) if message["role"] == "assistant"]


def turn(answer: str, *content: dict | str) -> list[dict]:
    """The messages of a question, given as texts and other parts, and of its answer."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def one_of(choices, rng: np.random.Generator | None):
    """A random choice in training, else the first."""
    return choices[0 if rng is None else int(rng.integers(len(choices)))]


def listed_texts(row: dict, column: str) -> list[str]:
    """The texts of a column that may have several: a list, in a CSV as JSON, or one text; [] if it is empty.

    Raises:
        BadRow: the column has neither.
    """
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f'expected a text or a JSON list of texts in "{column}", found {value[:60]}') from error
    if value is None or isinstance(value, str):
        return [value.strip()] if value and value.strip() else []
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise BadRow(f'expected a text or a list of texts in "{column}", found {json.dumps(value)[:60]}')
    return value
