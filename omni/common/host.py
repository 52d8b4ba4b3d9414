"""The interface of a run (``omni.train.run.Run``) that data preparation and models use."""

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a run saves and stops


class Host(Protocol):
    config: Any  # the stage's keys
    save_dir: Path
    device: torch.device
    rank: int  # index of this process among ``world`` processes
    world: int
    is_main: bool  # rank 0

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per step and process."""

    def log(self, message: str) -> None:
        """One line to stdout and training.log."""

    def check_stop(self) -> None:
        """
        Raises:
            Interrupted: the run was asked to stop.
        """

    def wait_for(self, function: Callable[[], Any]) -> Any:
        """``function()``, computed in a thread, so that signals are handled during long library calls."""

    def main_process_first(self) -> AbstractContextManager[None]:
        """The block runs on rank 0 while the others wait, then on the others, which find its result on disk."""

    def cached_json(self, name: str, belongs_to: dict, make: Callable[[], dict]) -> dict:
        """``make()``, computed once and kept in ``save_dir`` as ``name``."""
