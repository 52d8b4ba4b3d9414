"""The table of stages. A new stage is one more row, and every promise is tested on it."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import Training


@dataclass(frozen=True)
class StageCase:
    name: str
    script: str
    prefix: str
    final: str
    config: dict  # sizes of seconds, not minutes; several epochs
    make_data: Callable[[Path], dict]  # writes data into a folder, returns the config keys that point to it
    size_key: str  # a key that sets the model's size
    data_key: str  # the key that names the data file

    def training(self, folder: Path, *, save_dir: str = "run", **keys) -> Training:
        """This stage in ``folder``; the data are made there when first asked for."""
        config = self.config | self.make_data(folder) | {"save_dir": str(folder / save_dir)} | keys
        return Training(self.script, self.prefix, self.final, folder, config)


def make_text(folder: Path, lines: int = 24) -> dict:
    path = folder / "corpus.txt"
    if not path.exists():
        rng = random.Random(5)
        words = ["one", "two", "red", "green", "blue", "round", "square", "big", "small", "cat", "dog", "runs", "near"]
        path.write_text("".join(" ".join(rng.choices(words, k=rng.randint(6, 14))) + "\n" for _ in range(lines)))
    return {"train_text": str(path)}


TEXT = StageCase(
    name="text",
    script="train_text.py",
    prefix="thinker",
    final="thinker.pt",
    config={
        "vocab_size": 300, "ctx_len": 16, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32, "dropout": 0.2,
        "batch_size": 2, "max_epochs": 3, "lr": 1e-2, "warmup_steps": 3, "use_amp": False, "num_workers": 0,
        "print_freq": 3, "val_freq": 7, "val_split": 0.2, "checkpoint_freq": 5,
    },
    make_data=make_text,
    size_key="d_ff",
    data_key="train_text",
)  # fmt: skip

STAGES = [TEXT]
