"""The processes of one run: those that torchrun starts, or one."""

import contextlib
import datetime
import os
import secrets
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from omni.common.errors import UserError
from omni.common.files import TEMPORARY_SUFFIX

EXCHANGE_S = 600  # wait after which a process that does not join the others counts as hung
_PREPARATION = datetime.timedelta(days=2)  # longest wait for the first process to prepare data


class Processes:
    """This process, number ``rank`` of ``world``, and its exchanges with the others."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self._exchange: tuple | None = None
        self._patient: dist.ProcessGroup | None = None

    def meet(self, device: torch.device, timeout_s: float) -> None:
        """Find the other processes by torchrun's environment variables."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # torchrun's own store outlives a restart and keeps the addresses of dead processes. Several machines
            # count restarts separately, but get a new store at each (--rdzv-backend=c10d).
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        self._patient = dist.new_group(backend="gloo", timeout=_PREPARATION)

    def check_shared(self, folder: Path, may_be_read_only: bool) -> None:
        """
        Raises:
            UserError: a process does not see a file of the first one, as their machines do not share ``folder``.
        """

        def write() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"shared.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
            try:
                (folder / name).open("x").close()
            except OSError:
                if not may_be_read_only:
                    raise
                return "."  # the folder itself must exist
            return name

        token = folder / self.from_main(write)
        blind = [host for host in self.gather("" if token.exists() else socket.gethostname()) if host]
        if self.is_main and token != folder:
            token.unlink()
        if blind:
            raise UserError(
                f"{folder}: a process on {blind[0]} does not see what the first one wrote there. "
                "Several machines need a folder that all of them see"
            )

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        if self.world > 1:
            self._all_reduce(torch.zeros(1), group=group)  # on the host; dist.barrier would occupy the GPU

    def gather(self, value) -> list:
        """Every process's ``value``, in rank order."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], Any]) -> Any:
        """``make()`` of the first process, sent to all, so that all decide alike."""
        return self.gather(make() if self.is_main else None)[0]

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._all_reduce(tensor) if self.world > 1 else tensor

    def any_over_ranks(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process; the hosts exchange it, so no device waits."""
        return bool(self._all_reduce(torch.tensor(int(flag)), dist.ReduceOp.MAX)) if self.world > 1 else flag

    def _all_reduce(self, tensor: torch.Tensor, op=dist.ReduceOp.SUM, group=None) -> torch.Tensor:
        """Reduce in place.

        The exchange is kept until the next one. If gloo's thread freed it, it would ask for the interpreter, and a
        loader worker forked at that moment would wait for a lock for ever (seen once in CPython 3.11, in
        ``_PyThreadState_DeleteExcept``).
        """
        work = dist.all_reduce(tensor, op=op, group=group, async_op=True)
        work.wait()
        self._exchange = work, tensor
        return tensor

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0 while the others wait, then on the others, which find its result on disk."""
        if not self.is_main:
            self.barrier(self._patient)
        yield
        if self.is_main:
            self.barrier(self._patient)

    def distribute(self, module: nn.Module) -> nn.Module:
        """The callable to train with: the module itself, or its DDP wrapper under torchrun."""
        if self.world == 1:
            return module
        # warned of weights with dimensions of size 1, whose strides mean nothing
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
