"""Stage B: train the audio encoder, a FastConformer, to transcribe speech by CTC.

    python train_audio_enc.py --config configs/audio_enc_tiny.json

The data are a manifest with the columns wav and text: recordings of any rate, in a format of docs/data.md, named
relative to the manifest. The first run trains a small tokenizer on the texts and measures the recordings by their
headers. scripts/check_mel_lengths.py counts the rows that max_mel_length will leave out.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from omni.common.errors import UserError
from omni.common.spoken import spoken_version
from omni.data.manifest import account_for_rows, split_rows
from omni.data.open_manifest import prepare_manifest
from omni.data.order import held_out_set, training_set
from omni.data.recordings import static_lengths
from omni.models.audio_encoder import AudioEncoder
from omni.stages.audio_encoder import (
    COLUMNS,
    STAGE,
    AudioEncoderConfig,
    EvalSets,
    Utterances,
    ctc_loss,
    prepare_tokenizer,
    report_unknown_characters,
    score_metrics,
    score_sums,
    usable_rows,
)
from omni.train.cli import launch, parse_stage_args
from omni.train.loop import Phase, Validation, train
from omni.train.optim import build_optimizer
from omni.train.run import Run

USES = {
    "train": "to_train_on",
    "val": "held_out",
    "unseen_voices": "of_unseen_voices",
    "unseen_words": "of_unseen_words",
}


def main(argv: list[str] | None = None) -> dict[str, float]:
    config, notices, device = parse_stage_args(AudioEncoderConfig, __doc__, argv)
    with Run(config, STAGE, notices, device) as run:
        # --- Data: recordings -> log-mels, texts -> tokens -------------------------------------------------------
        manifest = prepare_manifest(run, config.train_csv, COLUMNS, key="text")
        train_rows, val_rows = split_rows(manifest, 0.0 if config.val_csv else config.val_split)
        tokenizer = prepare_tokenizer(run, manifest, train_rows, config)
        rows, frames = usable_rows(run, manifest, train_rows, config, tokenizer, training=True)
        if not len(rows):
            raise UserError(f"{manifest.path}: not one of its {len(train_rows)} training rows can be used")
        utterances = Utterances(manifest, rows, config, tokenizer, seed=config.seed, training=True, lengths=frames)
        train_set = training_set(run, utterances)

        # --- Model -----------------------------------------------------------------------------------------------
        if config.use_compile:  # each padded length is compiled
            torch._dynamo.config.recompile_limit = 4 * len(static_lengths(config.max_mel_length))
        # on a GPU, fused attention sums the gradient of the relative positions in a random order
        use_flash = config.use_flash and not (config.deterministic and run.device.type == "cuda")
        # the CTC head has the size of the actual vocabulary
        architecture = config.architecture.model_copy(update={"ctc_vocab_size": tokenizer.vocab_size})
        model = run.prepare(AudioEncoder(architecture, use_flash=use_flash))

        def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
            return ctc_loss(model, batch), {}

        # --- Validation: word error rate, on sentences, voices and words not trained on ----------------
        held_out = {"val": (manifest, val_rows)} if len(val_rows) else {}
        for name, path in config.held_out_files.items():
            other = prepare_manifest(run, path, COLUMNS, key="text")
            held_out[name] = other, np.arange(len(other))
        used = {"train": (manifest, rows)}
        validation = None
        if "val" in held_out:
            sources = {}
            for name, (source, source_rows) in held_out.items():
                report_unknown_characters(run, source, source_rows, config, tokenizer)
                source_rows, _ = usable_rows(run, source, source_rows, config, tokenizer, training=False)
                used[name] = source, source_rows
                sources[name] = Utterances(source, source_rows, config, tokenizer, training=False)
            split = held_out_set(run, EvalSets(sources))
            validation = Validation(split, partial(score_sums, tokenizer=tokenizer), score_metrics)
        else:
            run.log("no held-out recordings (val_split is 0, or there are very few): nothing will be validated")

        for source in {id(source): source for source, _ in used.values()}.values():
            account_for_rows(run, source, **{USES[name]: used[name][1] for name in used if used[name][0] is source})

        # --- Train -----------------------------------------------------------------------------------------------
        return train(
            run,
            [Phase("audio_enc", model, build_optimizer(model, config), loss, peak_lr=config.lr)],
            train_set,
            fingerprint={
                "train": manifest.sha256,
                **{name: source.sha256 for name, (source, _) in held_out.items()},
                "tokenizer": tokenizer.fingerprint,
                **spoken_version(config.text_language),
            },
            files={"tokenizer.json": tokenizer.sha256},
            validation=validation,
        )


if __name__ == "__main__":
    launch(main)
