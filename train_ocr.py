"""Stage G: train OCR, a ViT that looks and a decoder that writes, on pictures of lines of text.

    python train_ocr.py --config configs/ocr_tiny.json

The data are CSV rows of a picture's file name and the text that stands on it. The first run indexes the CSV and
collects its characters; every run after that starts at once.
"""

import contextlib
import json
import os
from collections import Counter

import numpy as np
from torch import Tensor, nn

from omni.common.caches import set_aside
from omni.common.errors import BadRow, UserError, reading_row
from omni.common.files import read_sealed_json, write_sealed_json
from omni.common.text import clean_text
from omni.data.manifest import Manifest, account_for_split, measure_rows, prepare_manifest, split_rows
from omni.data.order import held_out_set, training_set
from omni.models.ocr import Ocr, OcrRows, ocr_loss, ocr_metrics, ocr_sums, text_length
from omni.stages.ocr import STAGE, OcrConfig
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
        # the characters belong to the model: they are part of the checkpoint's config
        characters = prepare_characters(run, (manifest, train_rows), (val_manifest, val_rows))
        config = run.config = config.model_copy(update={"characters": characters})
        lines = OcrRows(manifest, train_rows, config, seed=config.seed, training=True, lengths=lengths)
        train_set = training_set(run, lines)

        # --- Model -----------------------------------------------------------------------------------------------
        model = run.prepare(Ocr(config, use_flash=config.use_flash))

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


def leave_out_long_texts(run: Run, manifest: Manifest, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``rows`` without those whose text is longer than ``max_text_length``, and the lengths of the texts that stay."""
    limit = run.config.max_text_length
    lengths = measure_rows(run, manifest, "text_length", text_length, np.int32)[rows]
    long = lengths > limit
    reason = f"texts longer than max_text_length {limit}"
    return manifest.leave_out(rows, long, reason, run.log), lengths[~long]


def prepare_characters(run: Run, train: tuple[Manifest, np.ndarray], held_out: tuple[Manifest, np.ndarray]) -> str:
    """What the model can write, from ``save_dir``: the key ``characters``, or those of the training texts.

    Collected once. Says then which characters of the texts are none of them.
    """
    path, given = run.save_dir / "characters.json", run.config.characters
    with run.main_process_first():
        if run.is_main and read_sealed_json(path) is None:
            if os.path.lexists(path):
                run.log(f"{path}: damaged, or of an earlier version: made again")
                set_aside(path)
            counts = count_characters(run, *train)
            known = set(given or counts)
            for texts, found in (("training", counts), ("held-out", count_characters(run, *held_out))):
                if unknown := {c: n for c, n in sorted(found.items()) if c not in known}:
                    run.log(
                        f"{sum(unknown.values())} characters of the {texts} texts are none of the {len(known)} that "
                        f"the model can write, each counts as an error: {json.dumps(unknown, ensure_ascii=False)}"
                    )
            write_sealed_json(path, {"characters": "".join(sorted(known))})
        characters = read_sealed_json(path)["characters"]
    if given and set(given) != set(characters):
        raise UserError(f'{path}: holds other characters than key "characters". Use a new save_dir')
    return characters


def count_characters(run: Run, manifest: Manifest, rows: np.ndarray) -> Counter:
    """How often each character stands in the texts of ``rows``. Bad rows are reported by whoever trains on them."""
    counts = Counter()
    for row in rows:
        run.check_stop()
        with contextlib.suppress(BadRow), reading_row():
            counts.update(clean_text(manifest[row]["text"]))
    return counts


if __name__ == "__main__":
    launch(main)
