"""Stage A beside nanoGPT's training: bits per byte after equal time, on the same text, tokens and cores.

    python benchmarks/nanogpt.py                 # three times ten minutes
    python benchmarks/nanogpt.py --minutes 2

First `train_text.py` trains the demo's Thinker for about that time, every token with the same weight; then a GPT-2 of
the same depth, width, vocabulary and context, with nanoGPT's recipe, has exactly as long. Time is that of training:
without tokenising, starting and validation. nanoGPT has it twice: in float32, which it uses itself on CPUs, and in
bfloat16, as the Thinker, if the processor computes in it.

The model and recipe are written anew after https://github.com/karpathy/nanoGPT: `model.py`, `train.py`, and the
settings of its README for a CPU (12 sequences a step, no dropout) and of `config/train_shakespeare_char.py` (AdamW,
0.001 falling to 0.0001 along a cosine, beta2 0.99).
"""

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.depth import samples_per_step
from omni.common import allocator
from omni.common.errors import UserError
from omni.common.files import write_json
from omni.data.corpus import PackedTokens, TokenFile, prepare_corpus
from omni.data.tokenizer import IGNORE_INDEX, Tokenizer
from omni.stages import STAGES
from omni.stages.text import TextConfig
from omni.train.checkpoint import load
from omni.train.cli import OneLineErrors, launch, output_file, run_script
from omni.train.config import load_config
from omni.train.device import computes_in_bf16

ROOT = Path(__file__).resolve().parent.parent
BATCH, WARMUP, LR, MIN_LR, BETAS, WD = 12, 100, 1e-3, 1e-4, (0.9, 0.99), 0.1
PILOT_STEPS = 100  # of ours, to learn how long a step takes


class Block(nn.Module):
    """Pre-norm attention and MLP of GPT-2, without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt2(nn.Module):
    """Learnt positions, tied embeddings; normal weights of 0.02, divided by the root of the residual branches."""

    def __init__(self, vocab_size: int, ctx_len: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(ctx_len, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction
        )


def train_ours(config: TextConfig, path: Path, folder: Path, steps: int) -> tuple[float, float]:
    """Run `train_text.py`. Returns the seconds that the steps took, and held-out bits per byte."""
    run = folder / f"ours_{steps}"
    keys = {"save_dir": run, "max_steps": steps, "context_weight": 1.0, "val_freq": steps, "checkpoint_freq": steps}
    options = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, ROOT / "train_text.py", "--config", path, "--device", "cpu", *options]
    run_script(command, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [row["samples_per_s"] for row in rows if "samples_per_s" in row]
    seconds = steps * samples_per_step(config.model_dump()) / statistics.harmonic_mean(rates)
    return seconds, load(run / STAGES["text"].final)["metrics"]["bits_per_byte"]


def open_tokens(config: TextConfig, run: Path) -> tuple[TokenFile, TokenFile]:
    """The tokens of the training text and of the held-out text, from the caches that the run made."""
    host = SimpleNamespace(
        config=config, is_main=True, log=print, check_stop=lambda: None, main_process_first=contextlib.nullcontext
    )
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    train = prepare_corpus(host, config.train_text, tokenizer, val_split=0.0).train
    return train, prepare_corpus(host, config.val_text, tokenizer, val_split=1.0).val


def train_theirs(config: TextConfig, train: TokenFile, seconds: float, dtype: torch.dtype) -> tuple[Gpt2, int]:
    """Train for that time. The learning rate follows the share of it that has passed. Returns the number of steps."""
    torch.manual_seed(0)
    model = Gpt2(config.vocab_size, config.ctx_len, config.n_layers, config.d_model, config.n_heads)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WD}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    array, step, started = train.open(), 0, time.perf_counter()
    while (passed := (time.perf_counter() - started) / seconds) < 1:
        lr = MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * passed)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / WARMUP)
        starts = torch.randint(train.tokens - config.ctx_len - 1, (BATCH,)).tolist()
        window = torch.from_numpy(np.stack([array[i : i + config.ctx_len + 1] for i in starts]).astype(np.int64))
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(window[:, :-1], window[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
    return model, step


@torch.no_grad()
def bits_per_byte(model: Gpt2, held_out: TokenFile, ctx_len: int) -> float:
    """In float32, over every token of the held-out text, as `train_text.py` counts them."""
    windows = PackedTokens(held_out, ctx_len, keep_tail=True)
    nats = 0.0
    for start in range(0, len(windows), 32):
        batch = windows.batch(np.arange(start, min(start + 32, len(windows))), epoch=0)
        nats += float(model.eval()(batch["tokens"], batch["targets"], reduction="sum"))
    return nats / math.log(2) / held_out.text_bytes


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="of each training (default: 10)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/thinker_demo.json", metavar="FILE", help="ours")
    parser.add_argument(
        "--json", type=output_file, default=ROOT / "checkpoints/nanogpt.json", metavar="FILE", help="figures"
    )
    args = parser.parse_args(argv)
    config, _ = load_config(TextConfig, str(args.config))
    if config.val_text is None:
        raise UserError(f'{args.config}: expected "val_text", on which both are judged, found none')
    with tempfile.TemporaryDirectory() as folder:
        seconds, _ = train_ours(config, args.config.resolve(), Path(folder), PILOT_STEPS)
        steps = max(1, round(60 * args.minutes * PILOT_STEPS / seconds))
        print(f"Stage A: {steps:,} steps of {config.batch_size} x {config.ctx_len} tokens", flush=True)
        seconds, ours = train_ours(config, args.config.resolve(), Path(folder), steps)
        train, held_out = open_tokens(config, Path(folder) / f"ours_{steps}")
    figures = {"minutes": seconds / 60, "steps": steps, "bits_per_byte": ours}
    for dtype in (torch.bfloat16, torch.float32) if computes_in_bf16(torch.device("cpu")) else (torch.float32,):
        model, their_steps = train_theirs(config, train, seconds, dtype)
        name = str(dtype).removeprefix("torch.")
        their_bits = bits_per_byte(model, held_out, config.ctx_len)
        figures[f"nanogpt_{name}"] = {"steps": their_steps, "bits_per_byte": their_bits}
    figures["parameters"] = {"nanogpt": sum(weight.numel() for weight in model.parameters())}
    figures["threads"] = torch.get_num_threads()
    write_json(args.json, figures, indent=2)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    allocator.restart_with_settings()  # both have the same allocator
    launch(main)
