"""Stage C: train the vision encoder, a ViT, on pictures with captions.

    python train_vision.py --config configs/vision_tiny.json

The ViT learns to put each picture close to its own caption and away from the others of the batch (CLIP), and to name
the caption's words. The captions are read by a small text tower that is trained beside it, or by the Thinker of
stage A (``use_thinker_for_text``).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from omni.common.errors import BadRow, UserError
from omni.common.text import visible
from omni.data.images import normalise
from omni.data.manifest import Manifest, account_for_split, prepare_manifest, split_rows
from omni.data.order import held_out_set, training_set
from omni.data.tokenizer import Tokenizer
from omni.models.vision_encoder import PictureTextModel
from omni.stages.captions import GROUP, CaptionRanking, CaptionRows, in_distinct_groups, report_cut_captions
from omni.stages.text import load_thinker
from omni.stages.vision import STAGE, VisionConfig
from omni.train.cli import launch, parse_stage_args
from omni.train.loop import Phase, Validation, train
from omni.train.optim import build_optimizer
from omni.train.run import Run

COLUMNS = ("image", "caption")
TOKENIZER_CAPTIONS = 500_000  # at most, evenly spread: more would change no merge that matters


def main(argv: list[str] | None = None) -> dict[str, float]:
    config, notices, device = parse_stage_args(VisionConfig, __doc__, argv)
    with Run(config, STAGE, notices, device) as run:
        # --- Data: rows with a picture's file name and a caption -------------------------------------------------
        manifest = held_out = prepare_manifest(run, config.train_manifest, COLUMNS, key="image")
        if config.val_manifest:
            held_out = prepare_manifest(run, config.val_manifest, COLUMNS, key="image")
            train_rows, held_out_rows = np.arange(len(manifest)), np.arange(len(held_out))
        else:  # by the picture's name: all captions of a picture stand on one side
            train_rows, held_out_rows = split_rows(manifest, config.val_split)
        account_for_split(run, manifest, train_rows, held_out, held_out_rows)

        # --- Who reads the captions ------------------------------------------------------------------------------
        requested_vocab_size, thinker = config.vocab_size, None
        if config.use_thinker_for_text:
            thinker, thinker_tokenizer, _ = load_thinker(config.thinker_ckpt, run.device)
            tokenizer = prepare_tokenizer(run, lambda: thinker_tokenizer)
            if tokenizer.fingerprint != thinker_tokenizer.fingerprint:
                raise UserError(f"{run.save_dir}: its tokenizer.json is not the Thinker's. Use a new save_dir")
            sizes = {"ctx_len": min(config.ctx_len, thinker.architecture.ctx_len)}
        else:
            tokenizer = prepare_tokenizer(run, lambda: train_tokenizer(run, manifest, train_rows))
            # the text tower is as large as the vocabulary really is, and the checkpoint says so
            sizes = {"vocab_size": tokenizer.vocab_size}
        config = run.config = config.model_copy(update=sizes)

        # --- Model -----------------------------------------------------------------------------------------------
        model = run.prepare(PictureTextModel(config, thinker))

        def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
            images = normalise(batch["images"])
            contrast, words, scale = model(images, batch["tokens"], batch["ends"], same=batch["same"])
            return contrast + config.word_loss * words, {"contrast": contrast, "words": words, "scale": scale}

        for captions, rows in ((manifest, train_rows), (held_out, held_out_rows)):
            report_cut_captions(run, captions, rows, tokenizer, config.ctx_len)
        if len(train_rows) < 2:
            raise UserError(f"{manifest.path}: expected at least 2 pictures to train on, found {len(train_rows)}")
        train_set = training_set(run, CaptionRows(manifest, train_rows, tokenizer, config, training=True))
        if len(train_rows) % config.batch_size == 1 and not config.drop_last:
            run.log(
                "the last batch of an epoch has 1 picture, which no other caption is contrasted with: it teaches words "
                "only. Set drop_last, or another batch_size"
            )

        # --- Validation: does a picture find its caption among 64? -----------------------------------------------
        validation = None
        if len(held_out_rows) > 1:
            groups = in_distinct_groups(held_out, held_out_rows)
            split = held_out_set(run, CaptionRows(held_out, groups, tokenizer, config, training=False), GROUP)
            ranking = CaptionRanking(tokenizer, config.ctx_len)
            validation = Validation(split, ranking.sums, ranking.metrics)
        else:
            run.log("fewer than 2 held-out pictures (val_split is 0, or there are few): nothing will be validated")

        # --- Train -----------------------------------------------------------------------------------------------
        fingerprint = {
            "train": manifest.sha256,
            "validation": held_out.sha256,
            "tokenizer": tokenizer.fingerprint,
            "requested vocab_size": str(requested_vocab_size),
        }
        if thinker is not None:
            fingerprint["Thinker"] = bytes(model.thinker_sha256.tolist()).hex()
        return train(
            run,
            [Phase("vision", model, build_optimizer(model, config), loss, peak_lr=config.lr)],
            train_set,
            fingerprint=fingerprint,
            files={"tokenizer.json": tokenizer.sha256},
            validation=validation,
        )


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
    """A tokenizer of the training captions; rows that cannot be read say why when their turn comes in training."""

    def captions():
        for row in rows[:: -(-len(rows) // TOKENIZER_CAPTIONS)].tolist():
            try:
                yield visible(manifest[row]["caption"])
            except BadRow:
                continue

    run.log(f"training a tokenizer of up to {run.config.vocab_size} tokens on the captions of {manifest.path}")
    return run.wait_for(lambda: Tokenizer.train(captions(), run.config.vocab_size))


if __name__ == "__main__":
    launch(main)
