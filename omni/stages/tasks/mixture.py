"""The mixture of tasks, the held-out items that validation answers, and their scores."""

# B samples, T positions

import zlib

import numpy as np
import torch
from torch import Tensor

from omni.data.order import permute
from omni.data.tokenizer import IGNORE_INDEX
from omni.models.answering import greedy_answers
from omni.models.omni_model import OmniModel
from omni.stages.talker import talker_metrics, talker_sums
from omni.stages.tasks.base import TASKS, SftTask
from omni.stages.tasks.processor import Processor


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
    """Up to ``limit`` rows of each task, evenly spread, one task after the other: a ``BatchSource`` for validation."""

    def __init__(self, tasks: dict[str, SftTask], processor: Processor, limit: int) -> None:
        self.tasks, self.processor = tasks, processor
        self.items = [
            (name, int(row))
            for name, task in tasks.items()
            for row in np.unique(np.linspace(0, len(task) - 1, min(limit, len(task))).astype(int))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        """A batch of ``Collator``, with ``task`` and ``accepted``: each sample's task and accepted answers."""
        bad: dict[str, str] = {}
        found = [(name, self.tasks[name].sample(row, 0, bad)) for name, row in (self.items[int(i)] for i in rows)]
        found = [(name, *sample) for name, sample in found if sample is not None]
        if not found:
            return {"n_targets": 0, "bad_rows": bad}
        names, encoded, accepted = zip(*found, strict=True)
        return self.processor.collate(list(encoded)) | {"task": names, "accepted": accepted, "bad_rows": bad}


class AnswerScore:
    """Scores of answers to held-out questions: the ``sums`` and ``metrics`` of a ``Validation``.

    ``loss``: nats per token of the true answers. ``accuracy_<task>``: mean score of the greedy answers by the metric of
    the task (``SftTask.score``); in a conversation, of the last answer, given the true ones before it.
    ``accuracy``: the same over the items of all tasks. ``code_perplexity``: of the talker on spoken answers, with the
    Thinker's states; ``code_perplexity_of_text``: with the text alone.
    """

    def __init__(self, processor: Processor, max_answer_tokens: int) -> None:
        self.processor, self.max_answer_tokens = processor, max_answer_tokens

    def sums(self, model: OmniModel, batch: dict) -> dict[str, Tensor]:
        embeds, targets, dropped, *_ = model.embed(batch)
        nats, _ = model.thinker.loss(None, targets, "sum", inputs_embeds=embeds)
        totals = {"nats": nats, "targets": (targets != IGNORE_INDEX).sum()}
        if "speech_rows" in batch:
            speech = model.speech(batch, embeds)
            for name, given in (("states", speech), ("text", speech | {"thinker_states": None})):
                totals |= {f"{name}/{key}": value for key, value in talker_sums(model.talker, given).items()}
        scored = [index for index, accepted in enumerate(batch["accepted"]) if accepted]
        if scored:
            texts = self.answers(model, embeds[scored], (batch["prompts"] - dropped)[scored])
            for index, text in zip(scored, texts, strict=True):
                task = batch["task"][index]
                for name, value in (
                    (f"score/{task}", TASKS[task].score(text, batch["accepted"][index])),
                    (f"items/{task}", 1),
                ):
                    totals[name] = totals.get(name, 0) + torch.tensor(value)
        return totals

    def answers(self, model: OmniModel, embeds: Tensor, prompts: Tensor) -> list[str]:
        """The greedy answer to each prompt, see ``omni.models.answering.greedy_answers``."""
        tokenizer, limit = self.processor.tokenizer, min(self.max_answer_tokens, self.processor.ctx_len - 1)
        found = greedy_answers(model.thinker, embeds, prompts, limit, (tokenizer.end_id, tokenizer.eos_id))
        return [tokenizer.decode(ids, skip_special=True) for ids in found]

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        metrics = {"loss": totals["nats"] / totals["targets"]}
        counts = {name.removeprefix("items/"): count for name, count in totals.items() if name.startswith("items/")}
        if counts:
            scores = {task: totals[f"score/{task}"] for task in counts}
            metrics["accuracy"] = sum(scores.values()) / sum(counts.values())
            metrics |= {f"accuracy_{task}": scores[task] / counts[task] for task in counts}
        for name, ending in (("states/", ""), ("text/", "_of_text")):
            sums = {key.removeprefix(name): value for key, value in totals.items() if key.startswith(name)}
            if sums:
                metrics[f"code_perplexity{ending}"] = talker_metrics(sums)["code_perplexity"]
        return metrics
