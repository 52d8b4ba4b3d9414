"""Stage A: its config."""

from typing import ClassVar

from pydantic import Field

from omni.models.architectures import ThinkerArchitecture
from omni.train.config import TEXT_HINT, StageConfig, input_file
from omni.train.stage import Stage


class TextConfig(ThinkerArchitecture, StageConfig):
    """Stage A, ``train_text.py``."""

    OBSOLETE: ClassVar[dict[str, str]] = StageConfig.OBSOLETE | {
        "use_swiglu": "the MLP is always SwiGLU, as in Qwen3",
    }

    train_text: str = input_file(hint=TEXT_HINT, description="UTF-8 corpus, one sample a line")
    val_text: str | None = input_file(
        None, hint=TEXT_HINT, description="held-out corpus; default: val_split of train_text's lines"
    )
    tokenizer_path: str | None = input_file(None, description="tokenizer.json to use; default: trained into save_dir")
    context_weight: float = Field(
        1.0, gt=0, le=1, description="weight, in training, of what is not an assistant's answer, beside 1 for answers"
    )


STAGE = Stage(
    name="text",
    prefix="thinker",
    final="thinker.pt",
    unit="tokens",
    best_metric="loss",
    letter="A",
    script="train_text.py",
    config=TextConfig,
)
