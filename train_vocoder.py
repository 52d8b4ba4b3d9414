"""Stage F: train the vocoder, HiFi-GAN, which turns log-mels into a waveform.

    python train_vocoder.py --config configs/vocoder_tiny.json

The data are a manifest with the column wav: recordings of any rate, in a format of docs/data.md. Every step
trains the discriminators (from adv_start_step on), then the generator, on random segments. With harmonic_source the
generator shapes pulses at the pitch of a voice, and a part of it learns to read that pitch from the log-mels.
Validation writes generated held-out clips to save_dir/samples, beside those of Griffin-Lim. The stage needs no other
one. codec_ckpt trains on the log-mels of stage D's codec; with a larger max_steps it fine-tunes a finished training.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from omni.common.numerics import weights_sha256
from omni.data.audio import log_mel
from omni.data.manifest import Manifest, account_for_split, split_rows
from omni.data.open_manifest import prepare_manifest
from omni.data.order import held_out_set, training_set
from omni.models.vocoder import Discriminators, build_generator, frozen, mel_spec
from omni.stages.codec import mel_statistics_of
from omni.stages.vocoder import (
    STAGE,
    Clips,
    VocoderConfig,
    VocoderScore,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    generate,
    load_codec_of,
    loss_specs,
    mel_loss,
    read_clip,
)
from omni.train.cli import launch, parse_stage_args
from omni.train.loop import Phase, Validation, train
from omni.train.optim import build_optimizer
from omni.train.run import Run
from omni.train.samples import save_samples

BETAS = (0.8, 0.99)  # of HiFi-GAN: a short memory, as each network trains against the other
STATISTICS_CLIPS = 64
COLUMNS = ("wav",)
KEY = "text"  # equal texts are on one side of the split; a row without a text is split by its content


def main(argv: list[str] | None = None) -> dict[str, float]:
    config, notices, device = parse_stage_args(VocoderConfig, __doc__, argv)
    with Run(config, STAGE, notices, device) as run:
        # --- Data: random segments of recordings, and their log-mels ---------------------------------------------
        manifest = val_manifest = prepare_manifest(run, config.train_csv, COLUMNS, key=KEY)
        if config.val_csv:
            val_manifest = prepare_manifest(run, config.val_csv, COLUMNS, key=KEY)
            train_rows, val_rows = np.arange(len(manifest)), np.arange(len(val_manifest))
        else:
            train_rows, val_rows = split_rows(manifest, config.val_split)
        account_for_split(run, manifest, train_rows, val_manifest, val_rows)
        codec = load_codec_of(config)
        clips = Clips(manifest, train_rows, config, seed=config.seed, training=True, codec=codec)
        train_set = training_set(run, clips)

        # --- Models ----------------------------------------------------------------------------------------------
        generator, discriminators = build_generator(config.architecture), Discriminators(config.discriminators)
        statistics = prepare_statistics(run, manifest, train_rows)
        generator.mean.copy_(torch.tensor(statistics["mean"]))
        generator.scale.copy_(torch.tensor(statistics["std"]))
        generator, discriminators = run.prepare(generator), run.prepare(discriminators)
        spec, specs = mel_spec(config), loss_specs(config)
        # under torchrun the wrapped generator must run in its own phase, and several micro-batches would keep
        # several graphs in memory
        generate_once = run.world == 1 and train_set.accumulation == 1
        handed_over: list[tuple[Tensor, Tensor | None]] = []  # from the discriminators' phase to the generator's

        def loss_of_discriminators(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.set_grad_enabled(generate_once):
                generated, pitch = generate(generator, batch, spec)
            if generate_once:
                handed_over.append((generated, pitch))
            both = torch.cat((batch["waveform"], generated.detach()))  # one pass is faster than two
            return discriminator_loss(*halves(model(both))), {}

        def loss_of_generator(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
            generated, pitch = handed_over.pop() if handed_over else generate(model, batch, spec)
            real, mel = batch["waveform"], mel_loss(batch["waveform"], generated, specs)
            loss, scalars = config.lambda_mel * mel, {"mel": mel}
            if pitch is not None:
                loss, scalars = loss + config.lambda_pitch * pitch, scalars | {"pitch": pitch}
            if batch["step"] < config.adv_start_step:
                return loss, scalars
            with frozen(discriminators):
                with torch.no_grad():
                    features_of_real = discriminators(real)
                features = discriminators(generated)
            adversarial, feature = adversarial_loss(features), feature_loss(features_of_real, features)
            loss = config.lambda_adv * adversarial + config.lambda_fm * feature + loss
            return loss, scalars | {"adversarial": adversarial, "feature": feature}

        optimizer = partial(build_optimizer, config=config, betas=BETAS)
        phases = [
            Phase(
                "discriminator", discriminators, optimizer(discriminators, lr=config.lr_d), loss_of_discriminators,
                peak_lr=config.lr_d, first_step=config.adv_start_step,
            ),
            Phase("generator", generator, optimizer(generator, lr=config.lr_g), loss_of_generator, peak_lr=config.lr_g),
        ]  # fmt: skip

        # --- Validation: log-mels of whole generated clips, and samples to listen to ------------------------------
        validation = None
        if len(val_rows):
            spaced = np.linspace(0, len(val_rows) - 1, min(config.val_clips, len(val_rows))).astype(int)
            split = held_out_set(run, Clips(val_manifest, val_rows[spaced], config, training=False, codec=codec))
            score = VocoderScore(
                config.architecture, show=partial(save_samples, run, spec=spec), shown=config.val_samples
            )
            validation = Validation(split, score.sums, score.metrics)
        else:
            run.log("no held-out clips (val_split is 0, or there are very few rows): nothing will be validated")

        # --- Train -----------------------------------------------------------------------------------------------
        data = {"train": manifest.sha256, "validation": val_manifest.sha256}
        if codec is not None:  # a training may add a codec, but not change or remove it
            data["codec"] = weights_sha256(codec)
        return train(
            run,
            phases,
            train_set,
            fingerprint=data,
            validation=validation,
        )


def halves(outputs: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The discriminators' outputs for the first and for the second half of a batch."""
    pairs = [[output.chunk(2) for output in layers] for layers in outputs]
    return [[first for first, _ in layers] for layers in pairs], [[second for _, second in layers] for layers in pairs]


def prepare_statistics(run: Run, manifest: Manifest, rows: np.ndarray) -> dict[str, list[float]]:
    """Mean and standard deviation of each mel channel over some training clips, kept in ``save_dir``."""
    config, spec = run.config, mel_spec(run.config)

    def read(row: dict) -> Tensor:
        return log_mel(read_clip(manifest, row, config), spec)

    return mel_statistics_of(run, manifest, rows, spec, read, STATISTICS_CLIPS)


if __name__ == "__main__":
    launch(main)
