"""The mixture of tasks, the held-out items that validation answers, and their scores."""

# B samples, T positions

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omni.common.media import quoted
from omni.data.manifest import spread
from omni.data.order import permute
from omni.data.tokenizer import IGNORE_INDEX
from omni.models.answering import answer_nats, greedy_answers
from omni.models.omni_model import OmniModel
from omni.stages.talker import talker_metrics, talker_sums
from omni.stages.tasks.base import SftTask
from omni.stages.tasks.cider import DocumentFrequencies
from omni.stages.tasks.measures import CANDIDATES, MEASURES, Points
from omni.stages.tasks.processor import Processor

_ASKED = 1_000  # rows whose questions are counted


class TaskMixture:
    """Tasks in fixed shares of every epoch: a ``BatchSource`` for ``ResumableDataset``.

    An epoch has as many slots, one a sample, as the tasks have rows; each task gets a share of them by its weight.
    A task passes over all of its rows, across epochs, each time in another order. So the row in a slot is a pure
    function of (seed, epoch, slot), and the weights hold exactly.

    Args:
        tasks: name -> task.
        weights: name -> relative weight; default: 1.
    """

    def __init__(self, tasks: dict[str, SftTask], weights: dict[str, float], processor: Processor, seed: int) -> None:
        self.names, self.tasks, self.processor, self.seed = list(tasks), list(tasks.values()), processor, seed
        shares = np.array([weights.get(name, 1.0) for name in self.names])
        size = sum(len(task) for task in self.tasks)
        # cumulated before rounding, so that the rounding errors do not add up; each task gets at least one slot
        counts = np.maximum(1, np.diff(np.round(np.cumsum(shares) / shares.sum() * size), prepend=0)).astype(np.int64)
        self.ends = np.cumsum(counts)
        self.counts = counts.tolist()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, slot: int, epoch: int) -> tuple[int, int, int]:
        """The index of the task in a slot, its row, and the number of its completed passes over all rows."""
        task = int(np.searchsorted(self.ends, slot, side="right"))
        count, rows = self.counts[task], len(self.tasks[task])
        passed, position = divmod(epoch * count + slot - int(self.ends[task]) + count, rows)
        key = (self.seed << 32) | (zlib.crc32(self.names[task].encode()) ^ passed)
        return task, int(permute(np.array([position]), rows, key)[0]), passed

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        """The samples of some slots. If no row of a task can fill a slot, the batch has no targets, which stops the run
        with the reason."""
        bad: dict[str, str] = {}
        samples = []
        for slot in rows if len(rows) else [0]:
            task, row, passed = self.place(int(slot), epoch)
            sample = self.tasks[task].sample(row, passed, bad)
            if sample is None:
                return {"n_targets": 0, "bad_rows": bad}
            samples.append(sample[0])
        batch = self.processor.collate(samples) | {"bad_rows": bad}
        return batch if len(rows) else batch | {"n_targets": 0}


class EvalItems:
    """Some rows of each task, one task after the other: a ``BatchSource`` for validation.

    Args:
        limit: number of rows of each task, if there are as many.
        first: take the first rows; else rows that are evenly spread.
    """

    def __init__(self, tasks: dict[str, SftTask], processor: Processor, limit: int, *, first: bool = False) -> None:
        self.tasks, self.processor = tasks, processor
        self.items = []
        for name, task in tasks.items():
            count = min(limit, len(task))
            rows = np.arange(count) if first else np.unique(np.linspace(0, len(task) - 1, count).astype(int))
            self.items += [(name, int(row)) for row in rows]

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        """A batch of ``Collator``, with each sample's ``task``, ``references`` and ``candidates``: the true answer and
        then others, for measures that rank answers; else ()."""
        bad: dict[str, str] = {}
        found = []
        for name, row in (self.items[int(i)] for i in rows):
            task = self.tasks[name]
            sample = task.sample(row, 0, bad)
            if sample is not None:
                encoded, references = sample
                ranked = references.accepted and MEASURES[references.measures[0]].needs == "candidates"
                found.append((name, encoded, references, task.candidates(row, references) if ranked else ()))
        if not found:
            return {"n_targets": 0, "bad_rows": bad}
        names, encoded, references, candidates = zip(*found, strict=True)
        scored = {"task": names, "references": references, "candidates": candidates}
        return self.processor.collate(list(encoded)) | scored | {"bad_rows": bad}


@dataclass(frozen=True)
class ScoredAnswer:
    """The model's greedy answer to an item, and its points by measure; the first measure gives the score."""

    sample: int  # in the batch
    text: str
    points: dict[str, Points]


class AnswerScore:
    """Scores of answers to held-out questions: the ``sums`` and ``metrics`` of a ``Validation``.

    ``loss``: nats per token of the true answers. ``accuracy_<task>``: the task's score from 0 to 1, by its measure in
    ``omni.stages.tasks.measures``; in a conversation, of the last answer, given the true ones before it. ``accuracy``:
    the mean of the tasks' scores, so each task counts the same. ``<measure>_<task>``: measures that are only reported.
    ``chance_<task>``: the score of a guess, where a measure ranks among fewer than 64 candidates.
    ``code_perplexity``: of the talker on spoken answers, with the Thinker's states; ``code_perplexity_of_text``: with
    the text alone.

    Args:
        tasks: those of the items, for what their measures need to know of all held-out rows.
    """

    def __init__(self, processor: Processor, max_answer_tokens: int, tasks: dict[str, SftTask]) -> None:
        self.processor, self.max_answer_tokens, self.tasks = processor, max_answer_tokens, tasks
        self.frequencies: dict[str, DocumentFrequencies] = {}  # by task, once they are needed

    def sums(self, model: OmniModel, batch: dict) -> dict[str, Tensor]:
        embeds, targets, dropped, *_ = model.embed(batch)
        nats, _ = model.thinker.loss(None, targets, "sum", inputs_embeds=embeds)
        totals = {"nats": nats, "targets": (targets != IGNORE_INDEX).sum()}
        if "speech_rows" in batch:
            speech = model.speech(batch, embeds)
            for name, given in (("states", speech), ("text", speech | {"thinker_states": None})):
                totals |= {f"{name}/{key}": value for key, value in talker_sums(model.talker, given).items()}
        for answer in self._scored(model, batch, embeds, dropped):
            if candidates := len(batch["candidates"][answer.sample]):
                for name, value in (("earned", 1 / candidates), ("possible", 1)):  # by a guess
                    key = f"chance/{batch['task'][answer.sample]}/{name}"
                    totals[key] = totals.get(key, 0) + torch.tensor(float(value), dtype=torch.float64)
            for index, (measure, points) in enumerate(answer.points.items()):
                kind = "reported" if index else "score"
                for name, value in (("earned", points.earned), ("possible", points.possible), ("items", 1)):
                    key = f"{kind}/{batch['task'][answer.sample]}/{measure}/{name}"
                    totals[key] = totals.get(key, 0) + torch.tensor(float(value), dtype=torch.float64)
        return totals

    def scored(self, model: OmniModel, batch: dict) -> list[ScoredAnswer]:
        """The answers to those samples of a batch that have a score."""
        embeds, _, dropped, *_ = model.embed(batch)
        return self._scored(model, batch, embeds, dropped)

    def _scored(self, model: OmniModel, batch: dict, embeds: Tensor, dropped: Tensor) -> list[ScoredAnswer]:
        prompts = batch["prompts"] - dropped
        rows = [row for row, references in enumerate(batch["references"]) if references.accepted]
        texts = self.answers(model, embeds[rows], prompts[rows]) if rows else []
        found = []
        for row, text in zip(rows, texts, strict=True):
            references, points = batch["references"][row], {}
            for measure in (MEASURES[name] for name in references.measures):
                if measure.needs == "candidates":
                    if len(batch["candidates"][row]) > 1:  # else there is nothing to compare with
                        prompt = embeds[row, : int(prompts[row])]
                        points[measure.name] = measure.points(self.nats(model, prompt, batch["candidates"][row]))
                elif measure.needs == "frequencies":
                    frequencies = self._frequencies(batch["task"][row])
                    points[measure.name] = measure.points(text, references.accepted, frequencies)
                else:
                    points[measure.name] = measure.points(text, references.accepted)
            if references.measures[0] in points:
                found.append(ScoredAnswer(row, text, points))
        return found

    def _frequencies(self, task: str) -> DocumentFrequencies:
        if task not in self.frequencies:
            self.frequencies[task] = self.tasks[task].document_frequencies()
        return self.frequencies[task]

    def answers(self, model: OmniModel, embeds: Tensor, prompts: Tensor) -> list[str]:
        """The greedy answer to each prompt, see ``omni.models.answering.greedy_answers``."""
        tokenizer, limit = self.processor.tokenizer, min(self.max_answer_tokens, self.processor.ctx_len - 1)
        found = greedy_answers(model.thinker, embeds, prompts, limit, (tokenizer.end_id, tokenizer.eos_id))
        return [tokenizer.decode(ids, skip_special=True) for ids in found]

    def nats(self, model: OmniModel, prompt: Tensor, answers: Sequence[str]) -> list[float]:
        """Nats per token of each of several answers to a prompt (T, D)."""
        tokenizer = self.processor.tokenizer
        ids = [[*tokenizer.encode(answer, allow_special=False), tokenizer.end_id] for answer in answers]
        return answer_nats(model.thinker, prompt, ids)

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        metrics = {"loss": totals["nats"] / totals["targets"]}
        scores = {task: _mean_of_measures(totals, task, names) for task, names in measures_by_task(totals).items()}
        if scores:
            metrics["accuracy"] = sum(scores.values()) / len(scores)
            metrics |= {f"accuracy_{task}": score for task, score in scores.items()}
        for key in totals:
            kind, _, rest = key.partition("/")
            if kind == "reported" and rest.endswith("/items"):
                task, measure, _ = rest.split("/")
                metrics[f"{measure}_{task}"] = _points(totals, f"reported/{task}/{measure}").score
            if kind == "chance" and rest.endswith("/earned"):
                task = rest.removesuffix("/earned")
                if (chance := _points(totals, f"chance/{task}").score) > 1.001 / CANDIDATES:
                    metrics[f"chance_{task}"] = chance
        for name, ending in (("states/", ""), ("text/", "_of_text")):
            sums = {key.removeprefix(name): value for key, value in totals.items() if key.startswith(name)}
            if sums:
                metrics[f"code_perplexity{ending}"] = talker_metrics(sums)["code_perplexity"]
        return metrics


def tell_held_out(tasks: dict[str, SftTask], log: Callable[[str], None]) -> None:
    """Log why a score may say little: a task with a single row has no answers to rank the true one among; and few
    different questions may be asked about many rows."""
    for name, task in tasks.items():
        if len(task) == 1 and MEASURES[task.measure].needs == "candidates":
            log(f"task {name}: 1 held-out row, too few to rank its answer among others ({task.measure}): no accuracy")
        if asked := Counter(task.questions(spread(task.row_numbers, _ASKED))):
            question, count = asked.most_common(1)[0]
            log(
                f"task {name}: held out are {len(asked):,} different questions for {asked.total():,} rows; "
                f"{count / asked.total():.0%} are {quoted(question)}"
            )


def measures_by_task(totals: dict[str, float]) -> dict[str, list[str]]:
    """The names of the measures that score the items of each task; usually one."""
    found: dict[str, list[str]] = {}
    for key in totals:
        if key.startswith("score/") and key.endswith("/items"):
            _, task, measure, _ = key.split("/")
            found.setdefault(task, []).append(measure)
    return found


def _mean_of_measures(totals: dict[str, float], task: str, measures: list[str]) -> float:
    """The score of a task; if its rows have several measures, the mean of these scores by their numbers of items."""
    items = [totals[f"score/{task}/{name}/items"] for name in measures]
    scores = [_points(totals, f"score/{task}/{name}").score for name in measures]
    return sum(count * score for count, score in zip(items, scores, strict=True)) / sum(items)


def _points(totals: dict[str, float], key: str) -> Points:
    return Points(totals[f"{key}/earned"], totals[f"{key}/possible"])
