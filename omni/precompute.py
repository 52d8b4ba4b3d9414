"""What a trained model makes of every row of a manifest, computed once and kept beside the checkpoints."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from omni.data import ResumableDataset, build_loader
from omni.files import write_json
from omni.index import save_array
from omni.manifest import Manifest, Rows
from omni.media import Inline
from omni.runtime import Run

_AT_A_TIME = 32  # rows


@dataclass(frozen=True)
class Ragged:
    """One array per row, of different lengths, mapped from disk.

    ``values`` (N, ...): all of them, one after the other. ``spans`` (rows, 2): where each row's begin and end; the same
    for a row that could not be used.
    """

    values: np.ndarray
    spans: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        start, end = self.spans[row]
        return self.values[start:end]


def precompute(
    run: Run, name: str, rows: Rows, belongs_to: dict, make: Callable[[dict], list[np.ndarray]], *, note: str
) -> Ragged:
    """``make(batch)`` gives one array for each row of a batch; those of all ``rows``, as ``save_dir/codes/name``.

    Args:
        rows: what to compute it of, rows of similar length one after the other; ``training`` is false.
        belongs_to: what the result depends on beside the data, as plain data; it is made again when that changes.
        note: what is being done, for the log.
    """
    folder = run.save_dir / "codes"
    belongs_to = belongs_to | {"data": rows.manifest.sha256, "rows": len(rows)}
    values, spans, meta = (folder / f"{name}.{ending}" for ending in ("npy", "spans.npy", "json"))
    with run.main_process_first():
        if run.is_main and not (meta.exists() and json.loads(meta.read_text()) == belongs_to):
            folder.mkdir(exist_ok=True)
            meta.unlink(missing_ok=True)
            run.log(f"{note}: {len(rows):,} rows of {rows.manifest.path}")
            made, where = _compute(run, rows, make, note)
            save_array(values, made)
            save_array(spans, where)
            write_json(meta, belongs_to)
    return Ragged(np.load(values, mmap_mode="r"), np.load(spans, mmap_mode="r"))


def _compute(run: Run, rows: Rows, make: Callable, note: str) -> tuple[np.ndarray, np.ndarray]:
    dataset = ResumableDataset(rows, seed=0, batch_size=_AT_A_TIME, shuffle=False)
    parts, spans, done = [], np.zeros((len(rows.manifest), 2), np.int64), 0
    batches = build_loader(dataset, run.config, run.device)
    for batch in tqdm(batches, total=dataset.steps_per_epoch, desc=note, unit="batch", disable=None, delay=0.5):
        run.check_stop()
        numbers = [int(rows.row_numbers[row]) for row in batch["rows"]]
        numbers = [number for number in numbers if rows.manifest.where(number) not in batch["bad_rows"]]
        for number, one in zip(numbers, make(batch) if numbers else [], strict=True):
            spans[number] = done, done + len(one)
            parts.append(one)
            done += len(one)
    return (np.concatenate(parts) if parts else np.zeros(0, np.uint16)), spans


class RowsWith:
    """A manifest whose rows bring along what was computed of them.

    Args:
        computed: the name of a further column -> its values.
    """

    def __init__(self, manifest: Manifest, computed: dict[str, Ragged]) -> None:
        self.manifest, self.computed = manifest, computed

    def where(self, row: int) -> str:
        return self.manifest.where(row)

    def file(self, name: str, root: str | None = None) -> Path | Inline:
        return self.manifest.file(name, root)

    def __getitem__(self, row: int) -> dict:
        return self.manifest[row] | {name: values[row] for name, values in self.computed.items()}
