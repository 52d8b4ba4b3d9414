"""Stage C: config, tokenizer, and loading of the model. ``omni.stages.captions`` has its rows and metrics."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from omni.common.errors import BadRow, UserError
from omni.common.numerics import weights_sha256
from omni.common.text import visible
from omni.data.manifest import Manifest
from omni.data.tokenizer import Tokenizer
from omni.models.architectures import PictureTextArchitecture, ThinkerArchitecture, VisionArchitecture
from omni.models.picture_text import PictureTextModel
from omni.models.vision_encoder import ViT
from omni.stages.text import STAGE as THINKER
from omni.train.config import PICTURES_HINT, Files, StageConfig, input_files, resumable
from omni.train.run import Run
from omni.train.stage import ExportedPart, Loaded, Stage, load

TOKENIZER_CAPTIONS = 500_000  # at most, evenly spread: more would change no merge that matters


class VisionConfig(VisionArchitecture, StageConfig):
    """Stage C, ``train_vision.py``: a ViT and its text tower."""

    train_manifest: Files = input_files(
        hint=PICTURES_HINT, description="image and caption, in any format of docs/data.md; rows may share an image"
    )
    val_manifest: Files | None = input_files(
        None, hint=PICTURES_HINT, description="held-out manifest; default: val_split of train_manifest's images"
    )
    image_root: str | None = resumable(None, description="folder of the images; default: that of the manifest")

    # Text tower
    embed_dim: int = Field(256, ge=2, le=1_000_000, description="width of the space of pictures and captions")
    temperature: float = Field(
        0.07, ge=0.01, le=1, description="initial temperature of the contrastive loss; it is learned"
    )
    ctx_len: int = Field(
        64, ge=8, le=1_048_576, description="longest caption in tokens, its end included; longer ones are cut"
    )
    use_thinker_for_text: bool = Field(False, description="frozen Thinker of stage A in place of a trained text tower")
    thinker_ckpt: str | None = resumable(None, description="folder of stage A, for use_thinker_for_text")
    vocab_size: int = Field(8192, ge=272, le=1_048_576, description="largest vocabulary of the captions' own tokenizer")
    text_d_model: int = Field(
        256, ge=8, le=1_000_000, description="width of the text tower; no effect under use_thinker_for_text"
    )
    text_layers: int = Field(4, ge=1, le=1000)
    text_heads: int = Field(4, ge=1, le=1_024)
    text_d_ff: int = Field(768, ge=8, le=1_000_000, description="inner width of the text tower's MLP")

    word_loss: float = Field(1.0, ge=0, description="weight of the word loss beside the contrastive loss")
    augment: bool = Field(False, description="small random shifts of the pictures and changes of their brightness")
    crop_scale: float = Field(
        1.0, gt=0, le=1, description="smallest share of a picture that a random crop keeps; 1: no crops"
    )
    mirror: bool = Field(False, description="mirror half of the pictures; left and right change places in captions")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="decay of a running mean of the weights, which is kept in place of the last ones"
    )

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
        if self.batch_size < 2:  # no validator of the key: a model that was trained so can be loaded
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

    @property
    def architecture(self) -> PictureTextArchitecture:
        return self.architecture_with(self.text_tower)

    def architecture_with(self, text: ThinkerArchitecture) -> PictureTextArchitecture:
        """``text``: the architecture of the text tower, or of the Thinker in its place."""
        return PictureTextArchitecture(
            vision=VisionArchitecture.of(self),
            text=text,
            uses_thinker=self.use_thinker_for_text,
            embed_dim=self.embed_dim,
            temperature=self.temperature,
            word_head=self.word_loss > 0,
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
            take=lambda model: model.vit,
            architecture=VisionArchitecture,
            model=ViT,
        ),
    ),
    letter="C",
    script="train_vision.py",
    config=VisionConfig,
    architecture=PictureTextArchitecture,
    model=PictureTextModel,
    switches=("use_flash",),
    tokenizer=Tokenizer,
    vocab_size=lambda architecture: architecture.text.vocab_size,
    options=("show", "num_workers", "image_root", "thinker_ckpt"),
    evaluate="omni.stages.evaluation:evaluate_vision",
)


def attach_thinker(opened: Loaded, thinker_ckpt: str | Path | None = None) -> None:
    """Give an opened model its Thinker, if it was trained with one (``use_thinker_for_text``).

    Args:
        thinker_ckpt: folder of that Thinker, if it was moved since the training.

    Raises:
        UserError: a file is missing or damaged, or the Thinker is not the one of the training.
    """
    if thinker_ckpt is not None and not opened.architecture.uses_thinker:
        raise UserError(f"{opened.path}: trained without a Thinker, found thinker_ckpt {thinker_ckpt}. Leave it out")
    if opened.architecture.uses_thinker:
        source = thinker_ckpt or opened.config_as(VisionConfig).thinker_ckpt
        thinker = load(THINKER, source, next(opened.model.parameters()).device).model
        if weights_sha256(thinker) != bytes(opened.model.thinker_sha256.tolist()).hex():
            folder = opened.path.parent
            raise UserError(f"{source}: not the Thinker that {folder} was trained with. Give that one as thinker_ckpt")
        opened.model.attach_thinker(thinker)


def prepare_tokenizer(run: Run, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer in ``save_dir``; if there is none, the one that ``make`` returns, kept there."""
    path = Path(run.config.save_dir) / "tokenizer.json"
    with run.main_process_first():
        if run.is_main and not path.exists():
            make().save(path)
        tokenizer = Tokenizer.load(path)
    if not run.config.use_thinker_for_text and tokenizer.vocab_size > run.config.vocab_size:
        raise UserError(
            f'{path}: has {tokenizer.vocab_size} tokens, key "vocab_size" allows {run.config.vocab_size}. '
            "Use a new save_dir, or raise vocab_size"
        )
    return tokenizer


def train_tokenizer(run: Run, manifest: Manifest, rows: np.ndarray) -> Tokenizer:
    """A tokenizer of the training captions. Training reports rows that cannot be read."""

    def captions():
        for row in rows[:: -(-len(rows) // TOKENIZER_CAPTIONS)].tolist():
            try:
                yield visible(manifest[row]["caption"])
            except BadRow:
                continue

    run.log(f"training a tokenizer of up to {run.config.vocab_size} tokens on the captions of {manifest.path}")
    return run.wait_for(lambda: Tokenizer.train(captions(), run.config.vocab_size))
