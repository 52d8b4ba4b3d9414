"""Measurements of every row of a manifest, such as lengths of recordings, made once and stored beside the index."""

import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from omni.common.caches import ABSENT, arrays_problem, facts_of_row, open_arrays, write_arrays
from omni.common.errors import BadRow, reading_row
from omni.common.host import Host
from omni.data.index import make_once
from omni.data.manifest import Manifest

_ROWS_A_THREAD = 512  # with fewer, starting the work would cost more than the work
_THREADS = 8  # headers are read from many small files: waiting, not computing


def measure_rows(
    run: Host,
    manifest: Manifest,
    name: str,
    function: Callable[[Manifest, int], float],
    dtype,
    column: str | None = None,
) -> np.ndarray:
    """``function(manifest, row)`` for every row, computed once and kept beside the index under ``name``.

    Made for headers, such as the length of a recording. A row for which it raises ``BadRow`` gets 0.

    Args:
        column: the column whose files are measured; a file that has changed is measured again.

    Returns:
        (rows,) of ``dtype``, mapped from disk.
    """
    path, belongs_to = manifest.folder / name, {"data": manifest.sha256}
    with run.main_process_first():
        if run.is_main:
            facts = {} if column is None else {"files": file_facts(run, manifest, column)}
            problem = functools.partial(_problem, path, belongs_to, facts)
            make = functools.partial(_measure_changed, run, manifest, path, belongs_to, facts, function, dtype)
            make_once(manifest.folder, problem, make, run.log, run.check_stop)
        return open_arrays(path)[0]["values"]


def _problem(path: Path, belongs_to: dict, facts: dict[str, np.ndarray]) -> str | None:
    problem = arrays_problem(path, belongs_to)
    if not problem and facts and (changed := int((open_arrays(path)[0]["files"] != facts["files"]).sum())):
        problem = f"{path}.npy: {changed:,} of {len(facts['files']):,} files changed"
    if not problem:
        return None
    return "" if problem == ABSENT else f"{problem}: measured again"


def _measure_changed(run: Host, manifest: Manifest, path: Path, belongs_to: dict, facts: dict, function, dtype) -> None:
    """Measure the rows whose files have changed, or all rows if the stored measurements cannot be used."""
    changed, before = np.ones(len(manifest), bool), np.zeros(len(manifest), dtype)
    if not arrays_problem(path, belongs_to):
        kept, _ = open_arrays(path)
        changed, before = kept["files"] != facts["files"], kept["values"]

    def value(manifest: Manifest, row: int) -> float:
        return function(manifest, row) if changed[row] else before[row]

    note = f"{path.name} of {manifest.path.name}"
    values = measure(manifest, value, dtype, desc=note, check_stop=run.check_stop)
    write_arrays(path, belongs_to, values=values, **facts)


def file_facts(run: Host, manifest: Manifest, column: str, root: str | None = None) -> np.ndarray:
    """(rows,) uint64 hashes of size and times of a column's files, as of the first call in a run."""
    if (column, root) not in manifest.facts:
        starts = range(0, len(manifest), _ROWS_A_THREAD)

        def some(start: int) -> list[int]:
            run.check_stop()
            rows = range(start, min(start + _ROWS_A_THREAD, len(manifest)))
            return [facts_of_row(manifest, row, column, root) for row in rows]

        with ThreadPoolExecutor(_THREADS) as pool:  # faster on network file systems
            found = itertools.chain.from_iterable(pool.map(some, starts))
            manifest.facts[column, root] = np.fromiter(found, np.uint64, len(manifest))
    return manifest.facts[column, root]


def files_digest(manifest: Manifest, rows: Sequence[int], column: str) -> str:
    """SHA-256 of size and times of the files that some rows name."""
    facts = [facts_of_row(manifest, int(row), column, None) for row in rows]
    return hashlib.sha256(np.array(facts, np.uint64).tobytes()).hexdigest()


def measure(manifest: Manifest, function, dtype, *, desc: str, check_stop=lambda: None) -> np.ndarray:
    """``function(manifest, row)`` for every row, in threads; 0 where it raises ``BadRow``."""

    def one(row: int):
        try:
            with reading_row():
                return function(manifest, row)
        except BadRow:
            return 0

    values = np.zeros(len(manifest), dtype)
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(values), desc=desc, unit="row", disable=None, delay=0.5, file=sys.stderr) as bar,
    ):
        for start in range(0, len(values), 4096):
            check_stop()
            rows = range(start, min(start + 4096, len(values)))
            values[start : rows.stop] = list(pool.map(one, rows))
            bar.update(len(rows))
    return values
