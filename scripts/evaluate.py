"""Evaluate a trained stage on any file in the format that the stage trains on.

    python scripts/evaluate.py text      --ckpt_dir checkpoints/thinker_demo   --data data/text/tiny_corpus.val.txt
    python scripts/evaluate.py audio_enc --ckpt_dir checkpoints/audio_enc_demo --data data/audio/asr.val_voices.csv
    python scripts/evaluate.py vision    --ckpt_dir checkpoints/vision_demo    --data data/images/annotations.val.json
    python scripts/evaluate.py codec     --ckpt_dir checkpoints/talker_demo    --data data/audio/tts.val.csv
    python scripts/evaluate.py talker    --ckpt_dir checkpoints/talker_demo    --data data/audio/tts.val.csv \\
        --audio_ckpt checkpoints/audio_enc_demo --vocoder_ckpt checkpoints/vocoder_demo
    python scripts/evaluate.py ocr       --ckpt_dir checkpoints/ocr_demo       --data data/ocr/ocr.val.csv
    python scripts/evaluate.py vocoder   --ckpt_dir checkpoints/vocoder_demo   --data data/audio/tts.val.csv
    python scripts/evaluate.py omni      --ckpt_dir checkpoints/omni_sft_demo  --task image_question \\
        --data data/images/annotations.val.json

The metrics are those of the validation in training. Unusable rows are left out, counted, and named on stderr. --show
prints some items beside the model's output. Each task of omni has a measure, which is printed beside its accuracy:
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from omni.chat.text import without_controls
from omni.common.errors import RunError, UserError
from omni.data.open_manifest import expand
from omni.export.folder import refuse_export
from omni.stages import STAGES
from omni.stages.evaluation import OMNI_TASKS
from omni.stages.tasks.measures import MEASURES
from omni.train.cli import OneLineErrors, launch, raise_open_file_limit
from omni.train.device import pick_device
from omni.train.stage import load

EVALUATED = [name for name, stage in STAGES.items() if stage.evaluate]
OPTIONS = (  # that not all stages heed, see ``Stage.options``
    "task", "image_root", "thinker_ckpt", "audio_ckpt", "vocoder_ckpt", "save_speech", "voice", "voice_from",
    "temperature", "show", "num_workers",
)  # fmt: skip

# --- command line ---------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    measures = "\n".join(f"    {measure.name:<15} {measure.about}" for measure in MEASURES.values())
    parser = OneLineErrors(description=f"{__doc__}\n{measures}", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=EVALUATED)
    parser.add_argument("--ckpt_dir", required=True, type=Path, help="the stage's save_dir")
    parser.add_argument("--data", required=True, type=Path, help="a file, a folder or a quoted pattern, as in training")
    parser.add_argument("--task", choices=OMNI_TASKS, help="omni: task of the rows of --data")
    parser.add_argument("--image_root", help="folder of the pictures (default: that of --data)")
    parser.add_argument("--thinker_ckpt", help="vision: folder of the Thinker that encodes captions, if moved")
    parser.add_argument("--audio_ckpt", help="talker: folder of stage B, for word error rates")
    parser.add_argument("--vocoder_ckpt", help="talker: folder of stage F (default: Griffin-Lim)")
    parser.add_argument("--save_speech", metavar="DIR", help="talker: write its speech here, with manifests")
    parser.add_argument("--voice", metavar="NAME", help="talker: speak in this voice (default: each row's speaker)")
    parser.add_argument("--voice_from", metavar="FILE", help="talker: speak in the voice of this recording, 1 to 60 s")
    parser.add_argument("--temperature", type=float, metavar="T", help="talker: speak each text a second time, sampled")
    parser.add_argument("--limit", type=int, help="evaluate the first N rows only")
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N items beside the model's output; not for text and codec",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    for name, least in (("limit", 1), ("show", 0), ("batch_size", 1), ("num_workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name}: expected at least {least}, found {getattr(args, name)}")
    for name in OPTIONS:
        if getattr(args, name) not in (None, 0) and name not in STAGES[args.stage].options:
            others = [other for other in EVALUATED if name in STAGES[other].options]
            raise UserError(f"--{name}: has no effect on {args.stage}, only on {', '.join(others)}")
    if args.show and args.json:
        raise UserError("--show: has no effect beside --json, which prints one object and nothing else")
    if args.num_workers:
        raise_open_file_limit()
    expand(args.data)  # found before a model is loaded
    if args.temperature is not None and not 0.01 <= args.temperature <= 100:
        raise UserError(f"--temperature: expected 0.01 to 100, found {args.temperature}")
    for name in ("temperature", "vocoder_ckpt"):
        if getattr(args, name) is not None and not (args.audio_ckpt or args.save_speech):
            raise UserError(f"--{name}: has no effect without --audio_ckpt or --save_speech")
    if args.save_speech is not None:
        if not args.save_speech or Path(args.save_speech).exists() and not Path(args.save_speech).is_dir():
            raise UserError(f"--save_speech {args.save_speech!r}: expected a folder, or a name for a new one")
        args.save_speech = Path(args.save_speech)
        data = args.data.resolve()
        if args.save_speech.resolve() in (data, *data.parents):  # whose sounds would be replaced
            raise UserError(f"--save_speech {args.save_speech}: expected another folder than that of --data")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    stage = STAGES[args.stage]
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory(prefix="omni_evaluate_") as folder:
        args.cache_dir = folder  # an index beside a user's file would stay there
        refuse_export(args.ckpt_dir, "--ckpt_dir")
        opened = load(stage, args.ckpt_dir, device)
        result = stage.evaluation()(args, opened, device)
    for name, value in result.metrics.items():
        if not math.isfinite(value):
            raise RunError(f"{args.ckpt_dir} on {args.data}: {name} is {value}, expected a finite number")
    result.name_left_out()
    if args.json:
        facts = {"stage": args.stage, "ckpt_dir": str(args.ckpt_dir), "step": opened.step, "data": str(args.data)}
        counts = {"rows": result.rows, "rows_left_out": len(result.left_out)}
        measures = {"measures": result.measures} if result.measures else {}
        print(json.dumps(facts | counts | result.metrics | measures))
        return
    for truth, said, *score in result.shown:
        print(f"true   {without_controls(truth)}\nmodel  {without_controls(said)}")
        print("".join(f"score  {text}\n" for text in score))
    left_out = f", {len(result.left_out)} left out" if result.left_out else ""
    print(f"{args.ckpt_dir} (step {opened.step}) on {args.data}: {result.rows} rows{left_out}")
    for name, value in result.metrics.items():
        print(f"  {name:<23} {value:.4f}  {result.measures.get(name, '')}".rstrip())


if __name__ == "__main__":
    launch(main)
