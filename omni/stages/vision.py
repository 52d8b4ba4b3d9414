"""Stage C: its config."""

import os
from typing import Self

from pydantic import Field, model_validator

from omni.common.errors import UserError
from omni.models.architectures import ThinkerArchitecture, VisionArchitecture
from omni.train.config import PICTURES_HINT, StageConfig, input_file, resumable
from omni.train.stage import ExportedPart, Stage


class VisionConfig(VisionArchitecture, StageConfig):
    """Stage C, ``train_vision.py``: a ViT, and what reads the captions that it is trained against."""

    train_manifest: str = input_file(
        hint=PICTURES_HINT, description="JSON, JSONL or CSV with image and caption; several rows may share an image"
    )
    val_manifest: str | None = input_file(
        None, hint=PICTURES_HINT, description="held-out manifest; default: val_split of train_manifest's images"
    )
    image_root: str | None = resumable(None, description="folder of the images; default: that of the manifest")

    # What it is compared with
    embed_dim: int = Field(
        256, ge=2, le=1_000_000, description="width of the space in which pictures and captions meet"
    )
    temperature: float = Field(0.07, ge=0.01, le=1, description="of the contrastive loss, to begin with; it is learned")
    ctx_len: int = Field(
        64, ge=8, le=1_048_576, description="tokens of a caption, its end included; longer ones are cut"
    )
    use_thinker_for_text: bool = Field(False, description="the trained Thinker reads the captions, and stays as it is")
    thinker_ckpt: str | None = resumable(None, description="folder of stage A, for use_thinker_for_text")
    vocab_size: int = Field(8192, ge=272, le=1_048_576, description="upper bound for the captions' own tokenizer")
    text_d_model: int = Field(
        256, ge=8, le=1_000_000, description="width of the text tower; no effect under use_thinker_for_text"
    )
    text_layers: int = Field(4, ge=1, le=1000)
    text_heads: int = Field(4, ge=1, le=1_024)
    text_d_ff: int = Field(768, ge=8, le=1_000_000, description="inner width of the SwiGLU MLP")

    word_loss: float = Field(1.0, ge=0, description="weight of naming the caption's words, beside the contrast")
    augment: bool = Field(False, description="shift the pictures a little and vary their brightness")

    @model_validator(mode="after")
    def _text_tower_fits(self) -> Self:
        if self.use_thinker_for_text and self.thinker_ckpt is None:
            raise ValueError('key "thinker_ckpt": expected the folder of stage A for use_thinker_for_text, found none')
        if not self.use_thinker_for_text:
            if self.text_d_model % self.text_heads:
                heads, width = self.text_heads, self.text_d_model
                raise ValueError(f'key "text_d_model": expected a multiple of text_heads {heads}, found {width}')
            if self.text_d_model // self.text_heads % 2:
                width = self.text_d_model // self.text_heads
                raise ValueError(f'key "text_d_model": expected an even width per head (rotary pairs), found {width}')
        return self

    def check_files(self) -> None:
        super().check_files()
        if self.batch_size < 2:  # only now: a model that was trained so can be loaded
            raise UserError('key "batch_size": expected at least 2 captions to contrast a picture with, found 1')
        if self.image_root is not None and not os.path.isdir(self.image_root):
            raise UserError(f'key "image_root": expected a folder, found none at {self.image_root}')
        if self.use_thinker_for_text and not os.path.isfile(os.path.join(self.thinker_ckpt, "thinker.pt")):
            raise UserError(
                f'key "thinker_ckpt": expected a folder with thinker.pt, found none at {self.thinker_ckpt}. '
                "Train stage A first (train_text.py)"
            )

    @property
    def text_tower(self) -> ThinkerArchitecture:
        """The sizes of the text tower that is trained here."""
        return ThinkerArchitecture(
            vocab_size=self.vocab_size,
            ctx_len=self.ctx_len,
            n_layers=self.text_layers,
            d_model=self.text_d_model,
            n_heads=self.text_heads,
            d_ff=self.text_d_ff,
            dropout=self.dropout,
        )


STAGE = Stage(
    name="vision",
    prefix="vision",
    final="vision.pt",
    unit="pictures",
    best_metric="loss",
    config_name="vision",
    exports=(
        ExportedPart(
            "vision_encoder",
            "encodes pictures",
            "--vision_ckpt or --omni_ckpt",
            figures=("top1_of_64", "zero_shot"),
        ),
    ),
    letter="C",
    script="train_vision.py",
    config=VisionConfig,
)
