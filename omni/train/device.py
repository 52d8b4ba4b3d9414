"""The device and its random number generators."""

import contextlib
import functools
import os
import random
import resource
import sys
from pathlib import Path

import numpy as np
import torch

from omni.common.errors import UserError

KERNELS_KEPT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
NVIDIA = Path("/proc/driver/nvidia/version")  # there if the driver is


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the first GPU (under torchrun, this process's own), else the CPU."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and NVIDIA.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            tell_of_unused_gpu()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise UserError(f"--device {name}: expected cpu, cuda or mps")
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        raise UserError(f"--device {name}: expected a device of this machine: {str(error).splitlines()[0]}") from error
    return device


@functools.cache  # once a process
def tell_of_unused_gpu() -> None:
    why = f"PyTorch {torch.__version__} is built without CUDA"
    if torch.version.cuda:
        why = f"PyTorch needs a driver for CUDA {torch.version.cuda}, nvidia-smi tells which there is"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"this machine has an NVIDIA driver, but no GPU that PyTorch can use ({why}): on the CPU", file=sys.stderr
        )


def pick_amp_dtype(use_amp: bool, device: torch.device) -> torch.dtype | None:
    """bf16 where the hardware computes in it, fp16 on older GPUs, None (float32) elsewhere."""
    if not use_amp or device.type not in ("cpu", "cuda"):
        return None
    if computes_in_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


@functools.cache
def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in bf16. Where it does not, torch does so all the same, some hundred
    times slower than in float32: most laptops' processors, and GPUs before Ampere."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cuda" and torch.cuda.is_available():  # else a fake device, of benchmarks/gpu_counts.py
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def keep_kernels() -> None:
    """Let a training on a CPU keep its oneDNN kernels, unless the user says how many. Call before the first product.

    There is one for each shape of a product, built in about a millisecond, of some 200 kB. By default 1,024 are kept,
    fewer than the lengths of utterances and answers give.
    """
    os.environ.setdefault(KERNELS_KEPT, "4096")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict:
    """State of every generator that training may draw from, as tensors and plain data."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)  # seed and offset live on the host: no wait
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def untouched_rng(device: torch.device):
    """Restore the states of the random number generators after the block."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the GPU's allocator, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts bytes, Linux kibibytes


def to_device(batch: dict, device: torch.device) -> dict:
    """Copy tensors to the device without waiting; other values stay as they are."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
