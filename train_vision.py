"""Stage C: train the vision encoder, a ViT, on pictures with captions.

    python train_vision.py --config configs/vision_tiny.json

The ViT learns to embed each picture close to its own caption and away from the others of the batch (CLIP), and to
predict the caption's words. The captions are embedded by a small text tower that is trained beside it, or by the
Thinker of stage A (``use_thinker_for_text``).
"""

import numpy as np
from torch import Tensor, nn

from omni.common.errors import UserError
from omni.data.images import normalise
from omni.data.manifest import account_for_split, split_rows
from omni.data.open_manifest import prepare_manifest
from omni.data.order import held_out_set, training_set
from omni.models.picture_text import PictureTextModel
from omni.stages.captions import (
    GROUP,
    CaptionRanking,
    CaptionRows,
    Classes,
    check_candidates,
    in_distinct_groups,
    report_cut_captions,
)
from omni.stages.text import STAGE as THINKER
from omni.stages.vision import STAGE, VisionConfig, prepare_tokenizer, train_tokenizer
from omni.train.average import average_of
from omni.train.cli import launch, parse_stage_args
from omni.train.loop import Phase, Validation, train
from omni.train.optim import build_optimizer
from omni.train.run import Run
from omni.train.stage import load

COLUMNS = ("image", "caption")


def main(argv: list[str] | None = None) -> dict[str, float]:
    config, notices, device = parse_stage_args(VisionConfig, __doc__, argv)
    with Run(config, STAGE, notices, device) as run:
        # --- Data: rows with a picture's file name and a caption -------------------------------------------------
        manifest = held_out = prepare_manifest(run, config.train_manifest, COLUMNS, key="image")
        if config.val_manifest:
            held_out = prepare_manifest(run, config.val_manifest, COLUMNS, key="image")
            train_rows, held_out_rows = np.arange(len(manifest)), np.arange(len(held_out))
        else:  # by the picture's name: all captions of a picture are on one side
            train_rows, held_out_rows = split_rows(manifest, config.val_split)
        account_for_split(run, manifest, train_rows, held_out, held_out_rows)
        groups, largest = in_distinct_groups(held_out, held_out_rows)
        if largest > 1 or config.val_manifest:
            check_candidates(held_out.path, largest, run.log)
        else:
            run.log(
                "fewer than 2 held-out pictures with different captions (val_split is 0, or there are few): nothing "
                "will be validated"
            )

        # --- Text tower and tokenizer ----------------------------------------------------------------------------
        requested_vocab_size, thinker = config.vocab_size, None
        if config.use_thinker_for_text:
            opened = load(THINKER, config.thinker_ckpt, run.device)
            thinker, thinker_tokenizer = opened.model, opened.tokenizer
            tokenizer = prepare_tokenizer(run, lambda: thinker_tokenizer)
            if tokenizer.fingerprint != thinker_tokenizer.fingerprint:
                raise UserError(f"{run.save_dir}: its tokenizer.json is not the Thinker's. Use a new save_dir")
            sizes = {"ctx_len": min(config.ctx_len, thinker.architecture.ctx_len)}
        else:
            tokenizer = prepare_tokenizer(run, lambda: train_tokenizer(run, manifest, train_rows))
            # the text tower has the size of the actual vocabulary
            sizes = {"vocab_size": tokenizer.vocab_size}
        config = run.config = config.model_copy(update=sizes)

        # --- Model -----------------------------------------------------------------------------------------------
        text = config.text_tower if thinker is None else thinker.architecture
        model = PictureTextModel(config.architecture_with(text), use_flash=config.use_flash)
        if thinker is not None:
            model.attach_thinker(thinker)
        model = run.prepare(model)

        def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
            images = normalise(batch["images"])
            contrast, words, scale = model(images, batch["tokens"], batch["ends"], same=batch["same"])
            return contrast + config.word_loss * words, {"contrast": contrast, "words": words, "scale": scale}

        for captions, rows in ((manifest, train_rows), (held_out, held_out_rows)):
            report_cut_captions(run, captions, rows, tokenizer, config.ctx_len)
        pictures = len(np.unique(np.asarray(manifest.keys)[train_rows]))  # hashes of their names
        if pictures < 2:
            raise UserError(f"{manifest.path}: expected at least 2 pictures to train on, found {pictures}")
        train_set = training_set(run, CaptionRows(manifest, train_rows, tokenizer, config, training=True))
        if len(train_rows) % config.batch_size == 1 and not config.drop_last:
            run.log(
                "the last batch of an epoch has 1 picture, which no other caption is contrasted with: it teaches words "
                "only. Set drop_last, or another batch_size"
            )

        # --- Validation: does a picture find its caption among 64? -----------------------------------------------
        validation, classes = None, Classes.beside(held_out.path)
        if largest > 1:
            rows = CaptionRows(held_out, groups, tokenizer, config, training=False, classes=classes)
            split, ranking = held_out_set(run, rows, GROUP), CaptionRanking(tokenizer, config.ctx_len, classes)
            validation = Validation(split, ranking.sums, ranking.metrics)

        # --- Train -----------------------------------------------------------------------------------------------
        average = average_of(model, config.ema_decay)
        phase = Phase("vision", model, build_optimizer(model, config), loss, peak_lr=config.lr, average=average)
        fingerprint = {
            "train": manifest.sha256,
            "validation": held_out.sha256,
            "tokenizer": tokenizer.fingerprint,
            "requested vocab_size": str(requested_vocab_size),
        }
        if classes is not None:
            fingerprint["classes"] = classes.sha256
        if thinker is not None:
            fingerprint["Thinker"] = bytes(model.thinker_sha256.tolist()).hex()
        return train(
            run,
            [phase],
            train_set,
            fingerprint=fingerprint,
            files={"tokenizer.json": tokenizer.sha256},
            validation=validation,
        )


if __name__ == "__main__":
    launch(main)
