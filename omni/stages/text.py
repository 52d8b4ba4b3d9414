"""Stage A: config, tokenizer, metrics, and loading of the model."""

import math
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from omni.common.errors import UserError
from omni.data.corpus import sample_lines
from omni.data.manifest import joined_name
from omni.data.text_rows import text_files
from omni.data.tokenizer import IGNORE_INDEX, Tokenizer
from omni.models.architectures import ThinkerArchitecture
from omni.models.thinker import Thinker
from omni.train.config import TEXT_HINT, Files, StageConfig, input_file, input_texts
from omni.train.run import Run
from omni.train.stage import ExportedPart, Stage


class TextConfig(ThinkerArchitecture, StageConfig):
    """Stage A, ``train_text.py``."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "use_swiglu": "the MLP is always SwiGLU, as in Qwen3",
    }

    train_text: Files = input_texts(hint=TEXT_HINT, description="UTF-8 corpus, one sample a line")
    val_text: Files | None = input_texts(
        None, hint=TEXT_HINT, description="held-out corpus; default: val_split of train_text's lines"
    )
    tokenizer_path: str | None = input_file(None, description="tokenizer.json to use; default: trained into save_dir")
    context_weight: float = Field(
        1.0, gt=0, le=1, description="weight of text outside of an assistant's answers in training; answers have 1"
    )

    @property
    def architecture(self) -> ThinkerArchitecture:
        return ThinkerArchitecture.of(self)


STAGE = Stage(
    name="text",
    prefix="thinker",
    final="thinker.pt",
    unit="tokens",
    best_metric="loss",
    config_name="thinker",
    exports=(
        ExportedPart(
            "thinker",
            "writes answers",
            "--thinker_ckpt or --omni_ckpt",
            figures=("accuracy*", "perplexity", "bits_per_byte"),
            command='python infer_chat.py --ckpt_dir merged_model --text "What is your name?"',
        ),
    ),
    letter="A",
    script="train_text.py",
    config=TextConfig,
    architecture=ThinkerArchitecture,
    model=Thinker,
    switches=("use_flash",),
    tokenizer=Tokenizer,
    vocab_size=lambda architecture: architecture.vocab_size,
    options=(),
    evaluate="omni.stages.evaluation:evaluate_text",
)


def text_sums(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    nats, _ = model(batch["tokens"], targets=batch["targets"])
    targets = (batch["targets"] != IGNORE_INDEX).sum()
    return {"nats": nats * targets, "targets": targets}


def text_metrics(totals: dict[str, float], text_bytes: int) -> dict[str, float]:
    loss = totals["nats"] / totals["targets"]
    bits = totals["nats"] / math.log(2)
    # a diverged model must not end the run here: exp overflows above 709
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits / text_bytes}


def prepare_tokenizer(run: Run, config: TextConfig) -> Tokenizer:
    """The tokenizer in ``save_dir``; if there is none, a copy of ``tokenizer_path``, or one trained on the corpus."""
    path = Path(config.save_dir) / "tokenizer.json"
    with run.main_process_first():
        if run.is_main and not path.exists():
            if config.tokenizer_path:
                Tokenizer.load(config.tokenizer_path).save(path)
            else:
                paths = text_files(config.train_text)
                run.log(f"training a tokenizer of up to {config.vocab_size} tokens on {joined_name(paths)}")
                lines = sample_lines(run, paths)
                run.wait_for(lambda: Tokenizer.train(lines, config.vocab_size)).save(path)
        tokenizer = Tokenizer.load(path)
    if config.tokenizer_path and Tokenizer.load(config.tokenizer_path).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{path}: is another tokenizer than tokenizer_path {config.tokenizer_path}. Use a new save_dir")
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f'{path}: has {tokenizer.vocab_size} tokens, key "vocab_size" allows {config.vocab_size}. '
            "Use a new save_dir, or raise vocab_size"
        )
    return tokenizer
