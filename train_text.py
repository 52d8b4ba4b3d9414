"""Stage A: train the Thinker, a Qwen3 language model, on a text corpus.

    python train_text.py --config configs/thinker_tiny.json

The corpus is UTF-8 text, one sample a line. The first run trains a tokenizer and tokenises the corpus into a
memory-mapped cache beside it; every run after that starts at once.
"""

from functools import partial

from torch import Tensor, nn

from omni.data.corpus import PackedTokens, prepare_corpus
from omni.data.order import held_out_set, training_set
from omni.models.thinker import Thinker
from omni.stages.text import STAGE, TextConfig, prepare_tokenizer, text_metrics, text_sums
from omni.train.cli import launch, parse_stage_args
from omni.train.loop import Phase, Validation, train
from omni.train.optim import build_optimizer
from omni.train.run import Run


def main(argv: list[str] | None = None) -> dict[str, float]:
    config, notices, device = parse_stage_args(TextConfig, __doc__, argv)
    with Run(config, STAGE, notices, device) as run:
        # --- Data: lines -> tokens -> sequences of ctx_len -------------------------------------------------------
        tokenizer = prepare_tokenizer(run, config)
        # the model has the size of the actual vocabulary
        requested_vocab_size = config.vocab_size
        config = run.config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
        if config.val_text:
            corpus = prepare_corpus(run, config.train_text, tokenizer, val_split=0.0)
            held_out_corpus = prepare_corpus(run, config.val_text, tokenizer, val_split=1.0)
            held_out, held_out_sha256 = held_out_corpus.val, held_out_corpus.sha256
        else:
            corpus = prepare_corpus(run, config.train_text, tokenizer, val_split=config.val_split)
            held_out, held_out_sha256 = corpus.val, corpus.sha256
        windows = PackedTokens(
            corpus.train, config.ctx_len, context_weight=config.context_weight, answer_ids=tokenizer.answer_ids
        )
        train_set = training_set(run, windows)

        # --- Model -----------------------------------------------------------------------------------------------
        model = run.prepare(Thinker(config.architecture, use_flash=config.use_flash))

        def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
            nats, balance = model(batch["tokens"], targets=batch["targets"], weights=batch.get("weights"))
            if not config.use_moe:
                return nats, {}
            return nats + config.router_aux_loss_coef * balance, {"cross_entropy": nats, "balance": balance}

        # --- Validation: perplexity per token, and bits per byte, which no choice of tokenizer can flatter ---------
        validation = None
        if held_out.samples:
            tail = PackedTokens(held_out, config.ctx_len, keep_tail=True)
            metrics = partial(text_metrics, text_bytes=held_out.text_bytes)
            validation = Validation(held_out_set(run, tail), text_sums, metrics)
        else:
            run.log("no held-out text (val_split is 0, or the corpus is very small): nothing will be validated")

        # --- Train -----------------------------------------------------------------------------------------------
        return train(
            run,
            [Phase("thinker", model, build_optimizer(model, config), loss, peak_lr=config.lr)],
            train_set,
            fingerprint={
                "train": corpus.sha256,
                "validation": held_out_sha256,
                "tokenizer": tokenizer.fingerprint,
                "requested vocab_size": str(requested_vocab_size),
            },
            files={"tokenizer.json": tokenizer.sha256},
            validation=validation,
            # whether the model can chat, or only continue a text
            summary={"dialogue_share": corpus.dialogues / (corpus.train.samples + corpus.val.samples)},
        )


if __name__ == "__main__":
    launch(main)
