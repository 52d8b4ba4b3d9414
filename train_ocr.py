"""Stage G: train OCR, a ViT encoder and a character decoder, on pictures of lines of text.

    python train_ocr.py --config configs/ocr_tiny.json

The data are CSV rows of a picture's file name and its text. The first run indexes the CSV and collects its characters;
every run after that starts at once.
"""

import numpy as np
from torch import Tensor, nn

from omni.data.manifest import account_for_split, split_rows
from omni.data.open_manifest import prepare_manifest
from omni.data.order import held_out_set, training_set
from omni.models.ocr import OcrModel
from omni.stages.ocr import (
    STAGE,
    OcrConfig,
    OcrRows,
    leave_out_long_texts,
    ocr_loss,
    ocr_metrics,
    ocr_sums,
    prepare_characters,
)
from omni.train.cli import launch, parse_stage_args
from omni.train.loop import Phase, Validation, train
from omni.train.optim import build_optimizer
from omni.train.run import Run


def main(argv: list[str] | None = None) -> dict[str, float]:
    config, notices, device = parse_stage_args(OcrConfig, __doc__, argv)
    with Run(config, STAGE, notices, device) as run:
        # --- Data: rows whose text the decoder can hold, and the characters in them ------------------------------
        manifest = val_manifest = prepare_manifest(run, config.train_csv, ("image", "text"), key="text")
        if config.val_csv:
            val_manifest = prepare_manifest(run, config.val_csv, ("image", "text"), key="text")
            train_rows, val_rows = np.arange(len(manifest)), np.arange(len(val_manifest))
        else:
            train_rows, val_rows = split_rows(manifest, config.val_split)
        train_rows, lengths = leave_out_long_texts(run, manifest, train_rows)
        val_rows, _ = leave_out_long_texts(run, val_manifest, val_rows)
        account_for_split(run, manifest, train_rows, val_manifest, val_rows)
        # the characters are part of the model's architecture
        characters = prepare_characters(run, (manifest, train_rows), (val_manifest, val_rows))
        config = run.config = config.model_copy(update={"characters": characters})
        lines = OcrRows(manifest, train_rows, config, seed=config.seed, training=True, lengths=lengths)
        train_set = training_set(run, lines)

        # --- Model -----------------------------------------------------------------------------------------------
        model = run.prepare(OcrModel(config.architecture, use_flash=config.use_flash))

        def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
            return ocr_loss(model, batch, config.ctc_weight)

        # --- Validation: the loss given the true text so far, and what the model reads by itself -----------------
        validation = None
        if len(val_rows):
            split = held_out_set(run, OcrRows(val_manifest, val_rows, config, training=False))
            validation = Validation(split, ocr_sums, ocr_metrics)
        else:
            run.log("no held-out rows (val_split is 0, or there are very few rows): nothing will be validated")

        # --- Train -----------------------------------------------------------------------------------------------
        return train(
            run,
            [Phase("ocr", model, build_optimizer(model, config), loss, peak_lr=config.lr)],
            train_set,
            fingerprint={"train": manifest.sha256, "validation": val_manifest.sha256},
            validation=validation,
        )


if __name__ == "__main__":
    launch(main)
