"""Stage E: teach the Thinker to answer about texts, recordings and images.

    python sft_omni.py --config configs/omni_sft_tiny.json

The Thinker of stage A, the audio encoder of stage B and the vision encoder of stage C are joined by two small
projections: recordings and images become vectors among the Thinker's token embeddings. Then it learns a mixture of
tasks (``omni/stages/tasks/``), each a conversation that ends with an answer: dialogues, questions about pictures,
captions, transcripts, spoken questions, signs, and spoken answers, where the talker of stage D learns to use the
Thinker's hidden states. Only answers have a loss. The encoders are frozen (``freeze_encoders``). The final file has all
parts but the speech codec.
"""

from pathlib import Path

from torch import Tensor, nn

from omni.common.errors import UserError
from omni.data.order import held_out_set, training_set
from omni.data.tokenizer import Tokenizer
from omni.stages.omni import STAGE, SftConfig
from omni.stages.omni_parts import assemble, processor_of
from omni.stages.tasks.features import cache_features
from omni.stages.tasks.mixture import AnswerScore, EvalItems, TaskMixture, tell_held_out
from omni.stages.tasks.prepare import prepare_tasks
from omni.train.cli import launch, parse_stage_args
from omni.train.loop import Phase, Validation, train
from omni.train.optim import build_optimizer
from omni.train.precompute import computed_digests
from omni.train.resume import refuse_another_training
from omni.train.run import Run

AUXILIARY = ("ctc_alignment_loss", "talker_loss")  # see omni_model.Losses


def main(argv: list[str] | None = None) -> dict[str, float]:
    config, notices, device = parse_stage_args(SftConfig, __doc__, argv)
    with Run(config, STAGE, notices, device) as run:
        # --- Model: those of the stages before, joined -------------------------------------------------------------
        # on a GPU, fused attention sums the gradient of the audio encoder's relative positions in a random order
        in_any_order = config.deterministic and not config.freeze_encoders and run.device.type == "cuda"
        asked, config = config, config.without_talker() if config.features_only else config
        config, model, tokenizer = assemble(config, use_flash=config.use_flash, audio_flash=not in_any_order)
        parts = {"tokenizer": tokenizer.fingerprint} | config.origins
        refuse_another_training(run, asked, parts)  # before codes and features are made of other parts
        run.config = config  # checkpoints contain the origins of the parts
        model.to(run.device)
        if config.use_compile:  # the number of pictures differs between batches
            model.thinker.compile(dynamic=False)

        balance_weight = model.architecture.thinker.router_aux_loss_coef  # of a loss that is 0 without experts

        def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
            found = model(batch)
            total = found.nats + found.balance * balance_weight
            total = total + config.ctc_alignment_weight * found.ctc_alignment_loss + found.talker_loss
            return total, {"cross_entropy": found.nats} | {name: getattr(found, name) for name in AUXILIARY}

        # --- Data: rows of several tasks -> conversations -> sequences ---------------------------------------------
        processor = processor_of(tokenizer, model.architecture, config)
        tasks, val_tasks, data = prepare_tasks(run, config, processor)
        saved_tokenizer = save_tokenizer(run, tokenizer)  # here, so that unusable data leave no file behind
        if config.cache_features:
            cache_features(run, model, processor, [*tasks.values(), *val_tasks.values()])
        if config.features_only:
            run.log("features_only: the features are cached. Without it the same line goes on")
            return {}
        mix = TaskMixture(tasks, config.task_weights, processor, config.seed)
        for name, task, count in zip(mix.names, mix.tasks, mix.counts, strict=True):
            run.log(f"task {name}: {len(task):,} rows, {count / len(mix):.1%} of the samples")
        train_set = training_set(run, mix)

        # --- Validation: the score of each task by its measure, and their mean ---------------------------------------
        validation = None
        if val_tasks:
            tell_held_out(val_tasks, run.log)
            items = EvalItems(val_tasks, processor, config.val_items)
            score = AnswerScore(processor, config.max_answer_tokens, val_tasks)
            validation = Validation(held_out_set(run, items), score.sums, score.metrics)
        else:
            run.log("no held-out rows (val_split is 0, or there are very few): nothing will be validated")

        # --- Train ---------------------------------------------------------------------------------------------------
        return train(
            run,
            [Phase("omni", model, build_optimizer(model, config), loss, peak_lr=config.lr)],
            train_set,
            fingerprint=data | computed_digests(tasks, val_tasks) | parts,
            files={"tokenizer.json": saved_tokenizer.sha256},
            validation=validation,
        )


def save_tokenizer(run: Run, tokenizer: Tokenizer) -> Tokenizer:
    """Copy the Thinker's tokenizer to ``save_dir``, and read it from there.

    Raises:
        UserError: ``save_dir`` has another tokenizer.
    """
    path = Path(run.config.save_dir) / "tokenizer.json"
    with run.main_process_first():
        if run.is_main and not path.exists():
            tokenizer.save(path)
    kept = Tokenizer.load(path)
    if kept.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{path}: is another tokenizer than that of {run.config.thinker_ckpt}. Use a new save_dir")
    return kept


if __name__ == "__main__":
    launch(main)
