"""A library's training steps in a process of their own, with the allocator that the library's users have."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import torch

from omni.common import allocator


class Apart:
    """A process that makes steps when it is asked to, and else sleeps. glibc reads its settings when a process starts,
    so that one process cannot have both allocators."""

    def __init__(self, make_step: Callable[..., Callable[[], None]]) -> None:
        """
        Args:
            make_step: a function of a module, which the process calls with the arguments of ``step``.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self._process = context.Process(target=_serve, args=(theirs, make_step, threads), daemon=True)
        with mock.patch.dict(os.environ):
            os.environ.pop(allocator.VARIABLE, None)
            self._process.start()
        theirs.close()

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_) -> None:
        self._connection.close()  # ends the process
        self._process.join()

    def step(self, *arguments: str | int | Path) -> Callable[[], None]:
        """A function that waits for one step there.

        Raises:
            EOFError: the process has failed; its traceback is on stderr.
        """

        def step() -> None:
            self._connection.send(None)
            self._connection.recv()

        self._connection.send(arguments)
        self._connection.recv()
        return step


def _serve(asked: Connection, make_step: Callable[..., Callable[[], None]], threads: int) -> None:
    torch.set_num_threads(threads)
    step = None
    while True:
        try:
            arguments = asked.recv()
        except EOFError:  # the end of the measurements
            return
        if arguments is None:
            step()
        else:
            step = None  # frees the model of before
            step = make_step(*arguments)
        asked.send(None)
