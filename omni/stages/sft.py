"""Stage E's data: each task's rows as conversations, tasks mixed by weight, and what held-out questions are judged by.

A task turns a row of its manifest into messages, an attachment and a question and the true answer; what follows is the
same for all of them.
"""

import hashlib
import json
import random
import re
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omni.common.errors import BadRow, TooLong, UserError
from omni.common.text import audible, clean_text, visible
from omni.data.audio import audio_length, resampled_length
from omni.data.conversations import read_conversation
from omni.data.manifest import Manifest, ManifestDataset, account_for_rows, prepare_manifest, split_rows
from omni.data.measure import measure_rows
from omni.data.order import permute
from omni.data.recordings import measure_samples
from omni.data.text_rows import prepare_text
from omni.data.tokenizer import IGNORE_INDEX
from omni.models.aligner import load_aligner, prepare_speech
from omni.models.codec import leave_out_long, load_codec
from omni.models.ctc import normalise_text
from omni.models.omni_model import Encoded, Inputs, OmniModel
from omni.models.talker import CodedSpeech, talker_metrics, talker_sums
from omni.stages.features import cached_or_read, features_of_pictures, features_of_sounds
from omni.stages.omni import SftConfig
from omni.synthetic import world
from omni.train.precompute import ManifestWithColumns
from omni.train.run import Run

CAPTION_PROMPTS = ("Describe the picture.", "What does the picture show?", "What do you see?")
TRANSCRIPTION_PROMPTS = ("Write down what is said.", "What does the recording say?", "What do you hear?")
SPEAKING_PROMPTS = ("Say: {}", "Read aloud: {}", "Repeat after me: {}")
SIGN_PROMPTS = ("Read the text in the picture.", "What is written in the picture?")
CAPTIONS_TRIED = 64  # draws of a scene's caption: it has a dozen wordings at most
ALL, FIRST_TURNS, NOTHING = range(3)  # of a row, that has room in the context
# What can be asked without a picture or a story, and its one answer
KNOWN_ANSWERS = {said: answer for sayings, answer in world.SMALL_TALK for said in sayings.split("|")} | {
    question: answer for pairs in world.FACTS.values() for question, answer in pairs
}

QUESTIONS_TO: dict[str, list[str]] = {}  # the other way round
for _question, _answer in KNOWN_ANSWERS.items():
    QUESTIONS_TO.setdefault(_answer, []).append(_question)

# What answers and lengths of rows depend on beside the data
_WORDINGS = zlib.crc32(
    json.dumps([CAPTION_PROMPTS, TRANSCRIPTION_PROMPTS, SPEAKING_PROMPTS, SIGN_PROMPTS, KNOWN_ANSWERS]).encode()
)

# ---------------------------------------------------------------------------------------------------------------
# Tasks: rows as conversations


class TaskDataset(ManifestDataset):
    """Rows of one task. A sample is (sequence, right answers); these are normalised, none for what is not judged.

    Args:
        inputs: how conversations become sequences.
        others: see ``ManifestDataset``.
    """

    def __init__(self, manifest: Manifest, rows: np.ndarray, inputs: Inputs, config: SftConfig, **others) -> None:
        super().__init__(manifest, rows, **others)
        self.inputs, self.config = inputs, config

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        """The row as a conversation that ends with an answer, see ``Inputs.encode``; its pictures and recordings are
        not read yet, see ``picture`` and ``sound``."""
        raise NotImplementedError

    def right_answers(self, row: dict, messages: list[dict]) -> set[str]:
        """What the last answer may be."""
        return {messages[-1]["content"]}

    def read(self, row: dict, rng: np.random.Generator | None) -> tuple[Encoded, set[str]]:
        try:
            return self._read(row, self.messages(row, rng))
        except TooLong:
            if rng is None:
                raise
            return self._read(row, self.messages(row, None))  # one that fits, if the row was measured

    def _read(self, row: dict, messages: list[dict]) -> tuple[Encoded, set[str]]:
        messages = [message | {"content": self._content(message["content"])} for message in messages]
        while True:
            try:
                encoded = self.encode(row, messages)
                return encoded, {normalise_answer(answer) for answer in self.right_answers(row, messages)}
            except TooLong:
                ends = answer_ends(messages)
                if len(ends) < 2:
                    raise
                messages = messages[: ends[-2]]  # without the last question and its answer

    def room(self, row: dict) -> int:
        """How much of a row has room in ``ctx_len``: ``ALL``, ``FIRST_TURNS`` or ``NOTHING`` of it.

        Raises:
            BadRow: the row cannot be used.
        """
        messages = self.messages(row, None)
        if self.fits(messages):
            return ALL
        ends = answer_ends(messages)
        return FIRST_TURNS if len(ends) > 1 and self.fits(messages[: ends[0]]) else NOTHING

    def fits(self, messages: list[dict]) -> bool:
        return self.inputs.fits(messages, self._mel_frames)

    def encode(self, row: dict, messages: list[dict]) -> Encoded:
        return self.inputs.encode(messages)

    def collate(self, samples: list[tuple[Encoded, set[str]]]) -> dict:
        return self.inputs.collate([encoded for encoded, _ in samples])

    def sample(self, row: int, epoch: int, bad: dict[str, str]) -> tuple[Encoded, set[str]] | None:
        """The sample of ``row``, in training perhaps of one after it, and in ``bad`` what was wrong."""
        return self._sample(row, epoch, bad)

    image_root = property(lambda self: self.config.image_root)

    def picture(self, row: dict) -> dict:
        """The row's picture as a part of a message, to be read."""
        return {"type": "image", "row": row}

    def sound(self, row: dict, manifest: Manifest | ManifestWithColumns | None = None) -> dict:
        """The row's recording, or that of a row of another manifest, as a part of a message, to be read."""
        return {"type": "audio", "row": row, "manifest": manifest or self.manifest}

    def _content(self, content: str | list[dict]) -> str | list[dict]:
        """Reads the pictures and recordings of a message's content."""
        if isinstance(content, str):
            return content
        read = {"text": lambda part: part, "image": self._read_picture, "audio": self._read_sound}
        return [read[part["type"]](part) for part in content]

    def _read_picture(self, part: dict) -> dict:
        row = part["row"]
        path = self.manifest.file(row["image"], self.image_root)
        if "patches" in row:
            return {"type": "image", "image": cached_or_read(row["patches"], path, self.inputs.pixels)}
        return self.inputs.image(path)

    def _read_sound(self, part: dict) -> dict:
        row = part["row"]
        path, text = part["manifest"].file(row["wav"]), visible(row.get("text", "")).strip()
        if "frames" in row:
            return {"type": "audio", "audio": cached_or_read(row["frames"], path, self.inputs.mels), "text": text}
        return self.inputs.sound(path, text)

    def _mel_frames(self, part: dict) -> int:
        """Of a recording, by its header; as many as the model can hear, if it is not known which one it will be."""
        most = self.inputs.audio["max_mel_length"]
        if part["row"] is None:
            return most
        length = audio_length(part["manifest"].file(part["row"]["wav"]))
        return min(most, int(self.inputs.mel.frames(resampled_length(*length, self.inputs.mel.sample_rate))))


def normalise_answer(text: str) -> str:
    """How answers are compared: words only; an answer without any, as it stands."""
    return normalise_text(text) or visible(text).strip()


def answer_ends(messages: list[dict]) -> list[int]:
    """After how many messages an answer has been given."""
    return [count for count, message in enumerate(messages, start=1) if message["role"] == "assistant"]


def turn(answer: str, *content: dict | str) -> list[dict]:
    """A question of parts, texts as they are, and its answer."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def one_of(choices, rng: np.random.Generator | None):
    """A random one in training, always the first otherwise."""
    return choices[0 if rng is None else int(rng.integers(len(choices)))]


class Dialogues(TaskDataset):
    """Lines of a text file. What is no dialogue is learnt as a whole, and not judged."""

    def read(self, row: dict, rng: np.random.Generator | None) -> tuple[Encoded, set[str]]:
        if self.manifest.format.dialogues:
            return super().read(row, rng)
        return self.inputs.encode_text(row["text"]), set()

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        return parse_dialogue(row["text"])

    def room(self, row: dict) -> int:
        if self.manifest.format.dialogues:
            return super().room(row)
        try:
            self.inputs.encode_text(row["text"])
        except TooLong:
            return NOTHING
        return ALL


def parse_dialogue(line: str) -> list[dict]:
    """``<|user|>Hello<|assistant|>Hello!<|end|>`` as messages.

    Raises:
        BadRow: it does not begin with a role, does not end with an answer, or an answer has no ``<|end|>``.
    """
    before, *found = re.split(r"<\|(system|user|assistant)\|>", line)
    messages = []
    for role, content in zip(found[::2], found[1::2], strict=True):
        text, end, after = content.partition(world.END)
        if role == "assistant" and (not end or not text.strip()):
            raise BadRow(f'expected an answer and {world.END} after <|assistant|>, found "{content[:40]}"')
        if after.strip() or (end and role != "assistant"):
            raise BadRow(f'expected a role after {world.END}, found "{(after or content)[:40]}"')
        messages.append({"role": role, "content": text})
    if before.strip() or not messages or messages[-1]["role"] != "assistant":
        raise BadRow(f'expected <|user|>...<|assistant|>...{world.END}, found "{line[:40]}"')
    return messages


class PictureQuestions(TaskDataset):
    """Pictures with ``questions``, a list of [question, answer]: several in training, one in validation."""

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        pairs = question_pairs(row)
        # those that leave no room for the picture are not asked
        pairs = [pair for pair in pairs if self.fits(turn(pair[1], self.picture(row), pair[0]))] or pairs[:1]
        if rng is None:
            question, answer = self.judged(row, pairs)
            return turn(answer, self.picture(row), question)
        first, *others = self.written(pairs, self.config.questions_per_picture, rng)
        first["content"].insert(0, self.picture(row))
        return [first, *others]

    @staticmethod
    def judged(row: dict, pairs: list[tuple[str, str]]) -> tuple[str, str]:
        """The one that is judged: by the picture's name, so that no question stands for many of them."""
        return pairs[zlib.crc32(row["image"].encode()) % len(pairs)]

    @staticmethod
    def written(pairs: list[tuple[str, str]], limit: int, rng: np.random.Generator) -> list[dict]:
        """Up to ``limit`` of these questions with their answers, in random order."""
        return [message for i in rng.permutation(len(pairs))[:limit] for message in turn(pairs[i][1], pairs[i][0])]


def question_pairs(row: dict) -> list[tuple[str, str]]:
    """
    Raises:
        BadRow: ``questions`` is not a list of questions with answers, or empty.
    """
    pairs = row.get("questions")
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        for pair in pairs
    )
    if not good or not pairs:
        raise BadRow(f'expected [question, answer] pairs in "questions", found {json.dumps(pairs)[:60]}')
    return [(question, answer) for question, answer in pairs]


class SpokenPictureQuestions(PictureQuestions):
    """Pictures of which a question is asked by a recording (see ``Recordings``); in training others follow in writing,
    which cost little, as the picture stands there already."""

    def __init__(self, *args, recordings: "Recordings", **others) -> None:
        super().__init__(*args, **others)
        self.recordings = recordings

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        pairs = question_pairs(row)
        recorded = [pair for pair in pairs if pair[0] in self.recordings]
        if not recorded:
            raise BadRow("none of its questions has been recorded")
        recorded = [pair for pair in recorded if self.has_room(row, *pair)] or recorded[:1]
        question, answer = self.judged(row, recorded) if rng is None else one_of(recorded, rng)
        sound = self.sound(self.recordings.find(question, rng), self.recordings.manifest)
        messages, others = turn(answer, self.picture(row), sound), [pair for pair in pairs if pair[0] != question]
        if rng is not None:
            messages += self.written(others, self.config.questions_per_picture - 1, rng)
        return messages

    def has_room(self, row: dict, question: str, answer: str) -> bool:
        """Whether the question fits beside picture and answer: in any recording, else in its first one."""
        longest = {"type": "audio", "row": None}
        return self.fits(turn(answer, self.picture(row), longest)) or self.fits(
            turn(answer, self.picture(row), self.sound(self.recordings.find(question, None), self.recordings.manifest))
        )


class Captions(TaskDataset):
    """Pictures to describe. If ``groups`` say what one shows, all of the world's captions of it are right; else there
    is no end of right wordings, and it is not judged."""

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        return turn(visible(row["caption"]).strip(), self.picture(row), one_of(CAPTION_PROMPTS, rng))

    def right_answers(self, row: dict, messages: list[dict]) -> set[str]:
        of_the_scene = set() if self.training else scene_captions(row.get("groups"))
        return of_the_scene | super().right_answers(row, messages) if of_the_scene else set()


def scene_captions(groups) -> set[str]:
    """All that ``omni.synthetic.world`` would say of the picture; nothing for pictures that are not of that world."""
    try:
        scene = world.Scene(tuple(world.Group(**group | {"cell": tuple(group["cell"])}) for group in groups))
        return {world.caption(scene, random.Random(i)) for i in range(CAPTIONS_TRIED)}
    except (TypeError, KeyError, IndexError, StopIteration, ValueError):
        return set()


class Transcripts(TaskDataset):
    """Recordings to write down."""

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        return turn(visible(row["text"]).strip(), self.sound(row), one_of(TRANSCRIPTION_PROMPTS, rng))


class SpokenQuestions(TaskDataset):
    """Recordings of questions: answered by the column ``answer``, or by what is known of the world."""

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        answer = row.get("answer") or KNOWN_ANSWERS.get(row["text"])
        if not isinstance(answer, str) or not answer.strip():
            raise BadRow(f'expected an answer to "{row["text"][:40]}", found none')
        return turn(answer.strip(), self.sound(row))


class Signs(TaskDataset):
    """Pictures of a line of text to read."""

    image_root = None

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        return turn(clean_text(row["text"]), self.picture(row), one_of(SIGN_PROMPTS, rng))


class SpokenAnswers(TaskDataset):
    """Answers that are spoken: what is known of the world, else a text to be said as it is.

    Args:
        manifest: with the columns that ``omni.models.aligner.prepare_speech`` adds.
    """

    def __init__(
        self, manifest: ManifestWithColumns, rows: np.ndarray, inputs: Inputs, config: SftConfig, **others
    ) -> None:
        super().__init__(manifest, rows, inputs, config, **others)
        self.speech = CodedSpeech(manifest, rows, inputs.talker, training=False)

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        text = audible(row["text"]).strip()  # as the talker reads it
        questions = QUESTIONS_TO.get(text) or [prompt.format(text) for prompt in SPEAKING_PROMPTS]
        return turn(text, one_of(questions, rng))

    def encode(self, row: dict, messages: list[dict]) -> Encoded:
        return self.inputs.encode_spoken(messages, self.speech.read(row, None))


class Conversations(TaskDataset):
    """JSON or JSONL rows of conversations, as ``omni.data.conversations`` reads them."""

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        return [message | {"content": self._parts(message["content"])} for message in read_conversation(row)]

    def _parts(self, content: str | list[dict]) -> str | list[dict]:
        if isinstance(content, str):
            return content
        read = {
            "text": lambda part: part,
            "image": self.picture,
            "audio": lambda part: self.sound({"wav": part["audio"], "text": part["text"]}),
        }
        return [read[part["type"]](part) for part in content]


# How the rows of a task are read, the columns they need, and the one they are split by
TASKS = {
    "text": (Dialogues, (), "text"),
    "image_question": (PictureQuestions, ("image", "caption"), "image"),
    "caption": (Captions, ("image", "caption"), "image"),
    "transcription": (Transcripts, ("wav", "text"), "text"),
    "spoken_question": (SpokenQuestions, ("wav", "text"), "text"),
    "spoken_image_question": (SpokenPictureQuestions, ("image", "caption"), "image"),  # and recordings
    "sign": (Signs, ("image", "text"), "text"),
    "spoken_answer": (SpokenAnswers, ("text", "wav"), "text"),
    "conversation": (Conversations, (), "messages"),
}

# ---------------------------------------------------------------------------------------------------------------
# Where the rows come from


class Recordings:
    """Recordings of questions, to be found by what is asked.

    Args:
        rows: (N,) row numbers of a manifest with the columns wav and text.
    """

    def __init__(self, manifest: Manifest, rows: np.ndarray) -> None:
        self.manifest = manifest
        keys = np.asarray(manifest.keys)[rows]
        order = np.argsort(keys, kind="stable")
        self.keys, self.row_numbers = keys[order], rows[order]

    def _span(self, question: str) -> tuple[int, int]:
        key = np.uint32(zlib.crc32(question.encode()))
        return int(np.searchsorted(self.keys, key)), int(np.searchsorted(self.keys, key, side="right"))

    def __contains__(self, question: str) -> bool:
        first, end = self._span(question)
        return end > first

    def find(self, question: str, rng: np.random.Generator | None) -> dict:
        """The row of a recording of ``question``: a random one in training, else the first.

        Raises:
            BadRow: the recording is not there, or says something else with the same checksum.
        """
        first, end = self._span(question)
        number = int(self.row_numbers[one_of(range(first, end), rng)])
        row = self.manifest[number]
        if row["text"] != question:
            raise BadRow(f'{self.manifest.where(number)}: expected "{question}", found "{row["text"]}"')
        return row


def prepare_tasks(
    run: Run, config: SftConfig, inputs: Inputs
) -> tuple[dict[str, TaskDataset], dict[str, TaskDataset], dict[str, str]]:
    """The tasks that the config's files have rows for.

    Returns:
        Tasks to train on and tasks to validate on, by name; digests of the files of both.

    Raises:
        UserError: a file cannot be read, or no task has a row to train on.
    """
    sides: tuple[dict[str, TaskDataset], dict[str, TaskDataset]] = {}, {}
    digests: dict[str, list[str]] = {"train": [], "validation": []}
    recordings: list[Recordings | None] = [None, None]
    too_long: list[str] = []  # files without a row that fits

    def add(side: int, name: str, manifest: Manifest | ManifestWithColumns, rows: np.ndarray, **others) -> None:
        if len(rows) and config.task_weights.get(name, 1.0) > 0:
            keys = {"seed": config.seed, "training": side == 0}
            task = TASKS[name][0](manifest, rows, inputs, config, **keys, **others)
            task.row_numbers = with_room(run, name, task)
            if len(task):
                sides[side][name] = task
            elif side == 0:
                too_long.append(f"{manifest.path} ({name})")

    def both(key: str, task: str) -> list[tuple[Manifest, np.ndarray]]:
        """The manifest and rows of both sides; [] if the config has no such file."""
        paths = getattr(config, key), getattr(config, f"val_{key}")
        if paths[0] is None:
            return []
        if key == "text_path":
            manifests = [prepare_text(run, path) for path in paths if path]
        else:
            _, columns, split_by = TASKS[task]
            manifests = [prepare_manifest(run, path, columns, key=split_by) for path in paths if path]
        digests["train"].append(manifests[0].sha256)
        digests["validation"].append(manifests[-1].sha256)
        if key == "question_csv":  # texts are held out, whoever says them
            return [(manifests[side], split_rows(manifests[side], config.val_split)[abs(side)]) for side in (0, -1)]
        if len(manifests) == 2:
            return [(manifest, np.arange(len(manifest))) for manifest in manifests]
        return [(manifests[0], rows) for rows in split_rows(manifests[0], config.val_split)]

    for side, (lines, rows) in enumerate(both("text_path", "text")):
        add(side, "text", lines, rows)
    for side, (manifest, rows) in enumerate(both("asr_csv", "transcription")):
        add(side, "transcription", manifest, short_enough(run, manifest, rows, inputs))
    for side, (manifest, rows) in enumerate(both("question_csv", "spoken_question")):
        rows = short_enough(run, manifest, rows, inputs)
        recordings[side] = Recordings(manifest, rows)
        add(side, "spoken_question", manifest, with_answer(run, manifest, rows))
    for side, (manifest, rows) in enumerate(both("image_manifest", "caption")):
        add(side, "caption", manifest, rows)
        rows = rows[measure_rows(run, manifest, "questions", count_questions, np.uint16)[rows] > 0]
        add(side, "image_question", manifest, rows)
        if len(rows) and (found := recordings[side]) is not None:
            asked = rows[count_recorded(run, manifest, found)[rows] > 0]
            add(side, "spoken_image_question", manifest, asked, recordings=found)
    for side, (manifest, rows) in enumerate(both("ocr_csv", "sign")):
        add(side, "sign", manifest, rows)
    for side, (manifest, rows) in enumerate(both("speech_csv", "spoken_answer")):
        if config.task_weights.get("spoken_answer", 1.0) > 0:
            add(side, "spoken_answer", *prepare_answers(run, config, inputs, manifest, rows))
    for side, (manifest, rows) in enumerate(both("jsonl_path", "conversation")):
        add(side, "conversation", manifest, rows)
    if not sides[0] and too_long:
        raise UserError(f"{', '.join(too_long)}: not one row fits ctx_len {inputs.ctx_len}. Raise it, or shorten them")
    if not sides[0]:
        raise UserError("the mix has no row to train on: expected files with rows, and a task_weights above 0")
    for name, weight in config.task_weights.items():
        if weight > 0 and name not in sides[0]:
            run.log(f'key "task_weights": no file of the mix has rows for the task {name}, so it has no share')
    account_for_tasks(run, sides)
    # one digest each: what the loop compares is two strings, however many files there are
    joined = {side: hashlib.sha256(" ".join(found).encode()).hexdigest() for side, found in digests.items()}
    return *sides, joined


def account_for_tasks(run: Run, sides: tuple[dict[str, TaskDataset], dict[str, TaskDataset]]) -> None:
    """Log where the rows of each file went, one of which may serve several tasks."""
    used: dict[Path, tuple[Manifest, tuple[list[np.ndarray], list[np.ndarray]]]] = {}
    for side, tasks in enumerate(sides):
        for task in tasks.values():
            manifest = task.manifest.manifest if isinstance(task.manifest, ManifestWithColumns) else task.manifest
            used.setdefault(manifest.path, (manifest, ([], [])))[1][side].append(task.row_numbers)
    for manifest, found in used.values():
        train, held_out = (np.unique(np.concatenate([np.zeros(0, np.int64), *rows])) for rows in found)
        held_out = np.setdiff1d(held_out, train)
        for reason, rows in manifest.left_out.items():  # by one task
            manifest.left_out[reason] = np.setdiff1d(rows, np.concatenate([train, held_out]))
        counted = np.concatenate([train, held_out, *manifest.left_out.values()])
        if len(others := np.setdiff1d(np.arange(len(manifest)), counted)):
            manifest.left_out["of no use to a task"] = others
        account_for_rows(run, manifest, to_train_on=train, held_out=held_out)


def cache_features(run: Run, config: SftConfig, model: OmniModel, inputs: Inputs, tasks: list[TaskDataset]) -> None:
    """Put beside the rows of all tasks what the frozen encoders make of their pictures and recordings."""
    for encoder in model.encoders:
        encoder.eval()  # as in training, where they are frozen
    seen, heard = defaultdict(list), defaultdict(list)  # manifest's file, root -> who reads it
    for task in tasks:
        if isinstance(task, (PictureQuestions, SpokenPictureQuestions, Captions, Signs)):
            seen[task.manifest.path, task.image_root].append(task)
        if isinstance(task, (Transcripts, SpokenQuestions)):
            heard[task.manifest.path].append(task)
        if isinstance(task, SpokenPictureQuestions) and task.recordings not in heard[task.recordings.manifest.path]:
            heard[task.recordings.manifest.path].append(task.recordings)
    for (_, root), readers in seen.items():
        rows = np.unique(np.concatenate([reader.row_numbers for reader in readers]))
        patches = features_of_pictures(run, model, inputs, readers[0].manifest, rows, root)
        for reader in readers:
            reader.manifest = ManifestWithColumns(reader.manifest, {"patches": patches})
    for readers in heard.values():
        rows = np.unique(np.concatenate([reader.row_numbers for reader in readers]))
        frames = features_of_sounds(run, model, inputs, readers[0].manifest, rows)
        for reader in readers:
            reader.manifest = ManifestWithColumns(reader.manifest, {"frames": frames})


def prepare_answers(
    run: Run, config: SftConfig, inputs: Inputs, manifest: Manifest, rows: np.ndarray
) -> tuple[ManifestWithColumns, np.ndarray]:
    """The manifest with what stage D's codec and aligner make of its recordings; ``rows`` without too long ones."""
    codec, aligner = (load(config.talker_ckpt, run.device) for load in (load_codec, load_aligner))
    name = "train" if manifest.path == Path(config.speech_csv) else "validation"
    coded, lengths = prepare_speech(run, manifest, inputs.talker, codec, aligner, name)
    return coded, leave_out_long(run, manifest, rows, lengths, inputs.talker.max_mel_length)


def short_enough(run: Run, manifest: Manifest, rows: np.ndarray, inputs: Inputs) -> np.ndarray:
    """``rows`` without recordings that last longer than those that the audio encoder was trained on; says how many.
    Those that cannot be read stay: reading them says why."""
    frames = inputs.mel.frames(measure_samples(run, manifest, inputs.mel.sample_rate))
    too_long = frames[rows] > inputs.max_frames
    return manifest.leave_out(rows, too_long, f"longer than {inputs.max_frames} mel frames", run.log)


def with_answer(run: Run, manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """``rows`` without questions that have no ``answer`` and none that is known of the world: these are only asked
    about pictures. Rows that cannot be read, or whose column ``answer`` is blank, stay: reading them says why."""

    def has_answer(manifest: Manifest, row: int) -> bool:
        try:
            fields = manifest[row]
        except BadRow:
            return True
        return fields.get("answer") is not None or fields["text"] in KNOWN_ANSWERS

    kept = rows[measure_rows(run, manifest, f"answered-{_WORDINGS}", has_answer, np.bool_)[rows]]
    if len(kept) < len(rows):
        run.log(f"{manifest.path}: {len(rows) - len(kept)} of {len(rows)} rows have no answer: not asked by themselves")
    return kept


def with_room(run: Run, name: str, task: TaskDataset) -> np.ndarray:
    """The row numbers of a task without rows that are too long for ``ctx_len`` even without all turns after the first;
    says how many these are, and how many lose turns. Kept beside the index. Rows that cannot be read stay: reading
    them says why."""
    manifest = task.manifest.manifest if isinstance(task.manifest, ManifestWithColumns) else task.manifest
    inputs, rows = task.inputs, task.row_numbers
    depends_on = [
        name,
        inputs.tokenizer.fingerprint,
        inputs.ctx_len,
        inputs.prompt,
        inputs.cached,
        _WORDINGS,
    ]
    depends_on += [inputs.audio, inputs.img_size and inputs.image_positions]
    if isinstance(task, SpokenPictureQuestions):
        depends_on.append(hashlib.sha256(task.recordings.keys.tobytes()).hexdigest())
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]
    column = "wav" if isinstance(task, (Transcripts, SpokenQuestions)) else None
    room = measure_rows(
        run, manifest, f"room-{digest}", lambda manifest, row: task.room(manifest[row]), np.uint8, column
    )[rows]
    if (room == FIRST_TURNS).any():
        run.log(
            f"task {name}: {manifest.path}: {(room == FIRST_TURNS).sum()} of {len(rows)} rows lose their last turns, "
            f"longer than ctx_len {inputs.ctx_len}"
        )
    reason = f"longer than ctx_len {inputs.ctx_len}"  # the same for all tasks: a row is in one count
    return manifest.leave_out(rows, room == NOTHING, reason, lambda line: run.log(f"task {name}: {line}"))


def count_questions(manifest: Manifest, row: int) -> int:
    return len(question_pairs(manifest[row])) if "questions" in manifest[row] else 0


def count_recorded(run: Run, manifest: Manifest, recordings: Recordings) -> np.ndarray:
    """(rows,) how many questions of each picture have been recorded. Kept beside the index of the pictures."""

    def count(manifest: Manifest, row: int) -> int:
        return sum(question in recordings for question, _ in question_pairs(manifest[row]))

    digest = hashlib.sha256(recordings.keys.tobytes()).hexdigest()[:12]
    return measure_rows(run, manifest, f"recorded-{digest}", count, np.uint16)


# ---------------------------------------------------------------------------------------------------------------
# The mix


class TaskMixture:
    """Tasks in fixed shares of every epoch: a ``BatchSource`` for ``ResumableDataset``.

    An epoch has as many samples as the tasks have rows. Each sample has a slot; the slots are shared out by weight, and
    a task goes through all of its rows, each time in another order, as its slots come up, over the epochs' ends. So
    which row stands in a slot is a pure function of (seed, epoch, slot), and weights hold exactly.

    Args:
        tasks: by name; weights: relative, 1 for a task that is not in it.
    """

    def __init__(self, tasks: dict[str, TaskDataset], weights: dict[str, float], inputs: Inputs, seed: int) -> None:
        self.names, self.tasks, self.inputs, self.seed = list(tasks), list(tasks.values()), inputs, seed
        shares = np.array([weights.get(name, 1.0) for name in self.names])
        size = sum(len(task) for task in self.tasks)
        # cumulated before rounding, so that the rounding errors do not add up; a slot at least for each
        counts = np.maximum(1, np.diff(np.round(np.cumsum(shares) / shares.sum() * size), prepend=0)).astype(np.int64)
        self.ends = np.cumsum(counts)
        self.counts = counts.tolist()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, slot: int, epoch: int) -> tuple[int, int, int]:
        """Which task stands in a slot, which of its rows, and how often the task has been through all of them."""
        task = int(np.searchsorted(self.ends, slot, side="right"))
        count, rows = self.counts[task], len(self.tasks[task])
        passed, position = divmod(epoch * count + slot - int(self.ends[task]) + count, rows)
        key = (self.seed << 32) | (zlib.crc32(self.names[task].encode()) ^ passed)
        return task, int(permute(np.array([position]), rows, key)[0]), passed

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        """The samples of some slots. If a task has none to put into a slot, the batch has no weight, so that the run
        stops and says why."""
        bad: dict[str, str] = {}
        samples = []
        for slot in rows if len(rows) else [0]:
            task, row, passed = self.place(int(slot), epoch)
            sample = self.tasks[task].sample(row, passed, bad)
            if sample is None:
                return {"n_targets": 0, "bad_rows": bad}
            samples.append(sample[0])
        batch = self.inputs.collate(samples) | {"bad_rows": bad}
        return batch if len(rows) else batch | {"n_targets": 0}


class EvalItems:
    """Up to ``limit`` rows of each task, evenly spread, one task after the other: a ``BatchSource`` for validation."""

    def __init__(self, tasks: dict[str, TaskDataset], inputs: Inputs, limit: int) -> None:
        self.tasks, self.inputs = tasks, inputs
        self.items = [
            (name, int(row))
            for name, task in tasks.items()
            for row in np.unique(np.linspace(0, len(task) - 1, min(limit, len(task))).astype(int))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        """As ``Inputs.collate``; with ``task`` and ``right``, the name and the right answers of each sample."""
        bad: dict[str, str] = {}
        found = [(name, self.tasks[name].sample(row, 0, bad)) for name, row in (self.items[int(i)] for i in rows)]
        found = [(name, *sample) for name, sample in found if sample is not None]
        if not found:
            return {"n_targets": 0, "bad_rows": bad}
        names, encoded, right = zip(*found, strict=True)
        return self.inputs.collate(list(encoded)) | {"task": names, "right": right, "bad_rows": bad}


# ---------------------------------------------------------------------------------------------------------------
# Judging


class AnswerScore:
    """How well held-out questions are answered: the ``sums`` and ``metrics`` of a ``Validation``.

    ``loss``: nats per token of the true answers. ``accuracy_<task>``: share of items whose likeliest answer, written
    token by token, has exactly the words of a right one; of a conversation, the last answer is judged, after the true
    ones before it. ``accuracy``: the same over the items of all tasks. ``code_perplexity``: of the talker on spoken
    answers, as it hears the Thinker; ``code_perplexity_of_text``: as it reads the text alone.
    """

    def __init__(self, inputs: Inputs, max_answer_tokens: int) -> None:
        self.inputs, self.max_answer_tokens = inputs, max_answer_tokens

    def sums(self, model: OmniModel, batch: dict) -> dict[str, Tensor]:
        embeds, targets, dropped, *_ = model.embed(batch)
        nats, _ = model.thinker.loss(None, targets, "sum", inputs_embeds=embeds)
        totals = {"nats": nats, "targets": (targets != IGNORE_INDEX).sum()}
        if "speech_rows" in batch:
            speech = model.speech(batch, embeds)
            for name, heard in (("heard", speech), ("read", speech | {"thinker_states": None})):
                totals |= {f"{name}/{key}": value for key, value in talker_sums(model.talker, heard).items()}
        judged = [index for index, right in enumerate(batch["right"]) if right]
        if judged:
            texts = self.answers(model, embeds[judged], (batch["prompts"] - dropped)[judged])
            for index, text in zip(judged, texts, strict=True):
                task, exact = batch["task"][index], normalise_answer(text) in batch["right"][index]
                for name, value in ((f"exact/{task}", int(exact)), (f"items/{task}", 1)):
                    totals[name] = totals.get(name, 0) + torch.tensor(value)
        return totals

    def answers(self, model: OmniModel, embeds: Tensor, prompts: Tensor) -> list[str]:
        tokenizer, limit = self.inputs.tokenizer, min(self.max_answer_tokens, self.inputs.ctx_len - 1)
        found = model.answers(embeds, prompts, limit, (tokenizer.end_id, tokenizer.eos_id))
        return [tokenizer.decode(ids, skip_special=True) for ids in found]

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        metrics = {"loss": totals["nats"] / totals["targets"]}
        counts = {name.removeprefix("items/"): count for name, count in totals.items() if name.startswith("items/")}
        if counts:
            exact = {task: totals[f"exact/{task}"] for task in counts}
            metrics["accuracy"] = sum(exact.values()) / sum(counts.values())
            metrics |= {f"accuracy_{task}": exact[task] / counts[task] for task in counts}
        for name, ending in (("heard/", ""), ("read/", "_of_text")):
            sums = {key.removeprefix(name): value for key, value in totals.items() if key.startswith(name)}
            if sums:
                metrics[f"code_perplexity{ending}"] = talker_metrics(sums)["code_perplexity"]
        return metrics
