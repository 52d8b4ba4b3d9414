"""What a training step asks of a GPU, counted without one: kernels, bytes, operations, and waits of the host.

    python benchmarks/gpu_counts.py              a table of all stages at the sizes of the _tiny configs, in a minute
    python benchmarks/gpu_counts.py B "D talker" --ops    some of them, with their commonest kernels

Forward and backward of one micro-batch of each stage run on fake tensors of a fake CUDA device, so the code takes the
branches of a GPU, without its values and without its time. Neither the optimizer nor torch.compile is in the figures.
"""

# A FakeTensor knows shape, dtype and device, and no value.

import argparse
import heapq
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.tiny_steps import STEPS, Place
from omni.common.errors import UserError
from omni.train.cli import OneLineErrors, launch

aten = torch.ops.aten
# Operators without a kernel: they change shapes and strides, or reserve memory.
FREE = {
    aten._unsafe_view, aten._reshape_alias, aten.alias, aten.detach, aten.lift_fresh, aten.empty, aten.empty_like,
    aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.resize_, aten.set_, torch.ops.prim.device,
}  # fmt: skip
# Operators of several kernels, as ATen's CUDA sources write them; every other one counts as one.
KERNELS = {
    # maximum, its finite part (abs, comparison, fill), difference, exponential, sum, logarithm, sum
    aten.logsumexp: 9,
    aten.constant_pad_nd: 2,  # fill, copy
    aten.convolution_backward: 2,  # of input and weight
    aten.native_layer_norm_backward: 2,
    aten._fused_rms_norm_backward: 2,
    aten._scaled_dot_product_flash_attention_backward: 3,
    aten.sort: 4,
    aten.argsort: 4,
    aten.embedding_dense_backward: 6,  # sort of the indices, sums of equal ones
}
SORTING = {  # operators that sort their indices first, so that sums have a fixed order -> argument with the indices
    aten.scatter_add: 2, aten.scatter_add_: 2, aten.index_add: 2, aten.index_add_: 2, aten.index_put: 1,
    aten.index_put_: 1, aten.embedding_dense_backward: 1,
}  # fmt: skip
SORT_KERNELS = 6


def attention_flops(q: Tensor, k: Tensor, *_others, **_keys) -> int:
    """Of queries (B, H, T, K) and keys (B, G, S, K); torch's counter wants as many heads of keys."""
    return 4 * q.numel() * k.shape[2]


ATTENTION = {
    aten._scaled_dot_product_flash_attention: attention_flops,
    # five products in the place of two
    aten._scaled_dot_product_flash_attention_backward: lambda _, q, k, *others, **keys: 5 * attention_flops(q, k) // 2,
}
# Operators whose result's shape depends on values, which the host has to read.
WAITING = {aten.nonzero, aten.masked_select, aten._unique2, aten.bincount, aten._local_scalar_dense}


@dataclass
class Counts:
    """Of forward and backward of one micro-batch."""

    kernels: int = 0
    bytes: int = 0  # read and written by the kernels, each tensor once a kernel
    product_bytes: int = 0  # of them by matrix products, convolutions and attention
    flops: int = 0  # of matrix products, convolutions and attention, whose causal half counts whole
    sorted_keys: int = 0  # indices that are sorted for a sum in a fixed order
    waits: Counter[str] = field(default_factory=Counter)  # where the host waits for the device, by operator
    operators: Counter[str] = field(default_factory=Counter)  # kernels of each

    def as_row(self, name: str) -> list[str]:
        moved = f"{self.bytes / 1e9:,.1f} ({self.product_bytes / 1e9:,.1f})"
        waits = f"{sum(self.waits.values())}"
        return [name, f"{self.kernels:,}", moved, f"{self.flops / 1e12:,.3f}", f"{self.sorted_keys:,}", waits]


class Counting(TorchDispatchMode):
    """Counts the operators that are dispatched inside it. Results whose shape depends on values get the largest one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func._overloadpacket
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if (wait := self._wait(packet, args, kwargs, inputs)) is not None:
            self.counts.waits[wait] += 1
            if (stand_in := self._stand_in(packet, args)) is not None:
                self._add(packet, inputs, [] if isinstance(stand_in, int | float | bool) else [stand_in])
                return stand_in
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if packet in FREE or func.is_view or not any(leaf.device.type == "cuda" for leaf in (*inputs, *outputs)):
            return result
        self._add(packet, inputs, outputs)
        if packet in SORTING:
            self._add_sort(packet, args)
        if (count := ATTENTION.get(packet) or flop_registry.get(packet)) is not None:
            self.counts.flops += count(*args, **kwargs, out_val=result)
            self.counts.product_bytes += sum(map(size_of, (*inputs, *outputs)))
        return result

    def _add(self, packet, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        kernels = KERNELS.get(packet, 1)
        self.counts.kernels += kernels
        self.counts.operators[str(packet).removeprefix("aten.")] += kernels
        self.counts.bytes += sum(map(size_of, (*inputs, *outputs)))

    def _add_sort(self, packet, args: tuple) -> None:
        indices = [leaf for leaf in tree_leaves(args[SORTING[packet]]) if isinstance(leaf, Tensor)]
        accumulates = packet not in (aten.index_put, aten.index_put_) or (len(args) > 3 and args[3])
        if accumulates:
            self.counts.sorted_keys += max(index.numel() for index in indices)
            if packet is not aten.embedding_dense_backward:  # whose sort KERNELS has
                self.counts.kernels += SORT_KERNELS

    @staticmethod
    def _wait(packet, args: tuple, kwargs: dict, inputs: list[Tensor]) -> str | None:
        """The reason for which the host would wait for the device here; None if it would not."""
        on_device = any(leaf.device.type == "cuda" for leaf in inputs)
        if packet in WAITING and on_device:
            return str(packet).removeprefix("aten.")
        if packet in (aten._to_copy, aten.copy_) and not kwargs.get("non_blocking"):
            target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
            target = inputs[0].device.type if packet is aten.copy_ else target
            source = inputs[-1].device.type
            if target is not None and {source, target} == {"cpu", "cuda"}:
                return f"copy from {source} to {target}"
        if packet in (aten.index, aten.index_put, aten.index_put_) and on_device:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                return f"{str(packet).removeprefix('aten.')} with a mask"
            if any(index.device.type == "cpu" for index in indices):
                return f"{str(packet).removeprefix('aten.')} with indices of the host"
        return None

    @staticmethod
    def _stand_in(packet, args: tuple):
        """A result of the largest possible shape, for operators that a fake tensor cannot compute."""
        if packet is aten._local_scalar_dense:
            return True if args[0].dtype == torch.bool else 1 if not args[0].is_floating_point() else 1.0
        if packet is aten.nonzero:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if packet is aten.index and args[1][0] is not None and args[1][0].dtype == torch.bool:
            mask = args[1][0]
            return args[0].new_empty((mask.numel(), *args[0].shape[mask.ndim :]))
        return None


def size_of(tensor: Tensor) -> int:
    """Bytes of the tensor's memory; of one that is expanded, those that are there."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.element_size() if tensor.numel() else 0


# ---------------------------------------------------------------------------------------------------------------
# A fake CUDA device


@cache
def fake_tensors() -> FakeTensorMode:
    """One for the process: models keep tables that they compute once for each device."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside it, the device "cuda" is there, with autocast to bf16 and deterministic kernels as in training."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", fused_attention))
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda: True))
        yield stack.enter_context(fake_tensors())


_plain_attention = F.scaled_dot_product_attention


def fused_attention(q: Tensor, k: Tensor, v: Tensor, **keys) -> Tensor:
    """``F.scaled_dot_product_attention`` with the kernel that a GPU would choose: torch chooses it by the properties of
    a card. Flash attention takes no mask; with one, or where a caller forbids flash, this is the plain maths."""
    if keys.get("attn_mask") is not None or not torch.backends.cuda.flash_sdp_enabled() or q.device.type != "cuda":
        return _plain_attention(q, k, v, **keys)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.bfloat16
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, keys.get("is_causal", False))[0]


def backward(loss: Tensor) -> None:
    """``loss.backward()``, node after node as autograd's engine does it. The engine itself asks the driver for the
    device's streams, and fails without a card."""
    # by this number, checkpoint knows what it has recomputed already
    with torch.no_grad(), mock.patch("torch._C._current_graph_task_id", lambda: id(loss)):
        _backward(loss)


def _backward(loss: Tensor) -> None:
    waiting_for, nodes = Counter(), {loss.grad_fn: None}
    to_visit = [loss.grad_fn]
    while to_visit:
        for node, _ in to_visit.pop().next_functions:
            if node is not None:
                waiting_for[node] += 1
                if node not in nodes:
                    nodes[node] = None
                    to_visit.append(node)
    gradients: dict = {loss.grad_fn: {0: torch.ones_like(loss)}}
    order = 0
    ready = [(0, order, loss.grad_fn)]
    while ready:
        _, _, node = heapq.heappop(ready)
        given = gradients.pop(node, {})
        if given:
            inputs = node._input_metadata if hasattr(node, "_input_metadata") else given
            outputs = call(node, [given.get(index) for index in range(max(len(inputs), *given, 1))])
        else:
            outputs = [None] * len(node.next_functions)
        for (following, index), gradient in zip(node.next_functions, outputs, strict=False):
            if following is None:
                continue
            if gradient is not None:
                sums = gradients.setdefault(following, {})
                gradient = as_expected(gradient, following, index)
                sums[index] = sums[index] + gradient if index in sums else gradient
            waiting_for[following] -= 1
            if not waiting_for[following]:
                order += 1
                heapq.heappush(ready, (-sequence(following), order, following))


def call(node, gradients: list[Tensor | None]) -> tuple:
    if type(node).__name__ == "AccumulateGrad":
        variable, (gradient,) = node.variable, gradients
        variable.grad = gradient if variable.grad is None else variable.grad + gradient
        return ()
    found = node.apply(*gradients) if hasattr(node, "apply") else node(*gradients)
    return found if isinstance(found, tuple) else (found,)


def as_expected(gradient: Tensor, node, index: int) -> Tensor:
    """In the shape and dtype of the forward's output, as the engine sums and casts it."""
    metadata = node._input_metadata[index]
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient if gradient.dtype == metadata.dtype else gradient.to(metadata.dtype)


def sequence(node) -> int:
    """Nodes of later operators come first; weights' gradients as soon as they are complete."""
    return 2**62 if type(node).__name__ == "AccumulateGrad" else node._sequence_nr()


# ---------------------------------------------------------------------------------------------------------------
# Counting


def count(name: str, size: str = "tiny", **keys) -> dict[str, Counts]:
    """Counts of each phase of the step ``name`` of ``STEPS``, with other ``keys`` of its config."""
    torch.manual_seed(0)
    step = STEPS[name](Place("cuda", fake_tensors()), size, **keys)
    dtype = torch.bfloat16 if step.config.use_amp else None
    found: dict[str, Counts] = {}
    with fake_cuda() as mode:
        batch = {key: mode.from_tensor(value).cuda() if isinstance(value, Tensor) else value
                 for key, value in step.batch.items()}  # fmt: skip
        for _ in range(2):  # the second time, tables that are computed once are there
            for phase in step.phases:
                module = step.modules[phase.module].train()
                module.zero_grad()
                with Counting() as counting:
                    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                        loss, _ = phase.loss(module, batch)
                    backward(loss)
                found[phase.name] = counting.counts
    return found


HEAD = (
    "| step | kernels | GB moved (of it products) | TFLOP | sorted keys | waits |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"some of: {', '.join(STEPS)}; default: all")
    parser.add_argument("--ops", action="store_true", help="also the commonest kernels of each, and the waits")
    args = parser.parse_args(argv)
    for name in args.steps:
        if name not in STEPS:
            raise UserError(f"{name}: expected one of {', '.join(STEPS)}")
    print(*HEAD, sep="\n")
    found: dict[str, Counts] = {}
    for name in args.steps or STEPS:
        phases = count(name)
        for phase, counts in phases.items():
            title = name if len(phases) == 1 else f"{name} {phase}"
            found[title] = counts
            print(f"| {' | '.join(counts.as_row(title))} |", flush=True)
    for title, counts in found.items() if args.ops else ():
        commonest = ", ".join(f"{number} {operator}" for operator, number in counts.operators.most_common(20))
        waits = ", ".join(f"{number} x {wait}" for wait, number in counts.waits.items()) or "none"
        print(f"\n{title}: {commonest}; waits: {waits}")


if __name__ == "__main__":
    launch(main)
