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

The metrics are those of the validation in training. A row that cannot be used is left out, named on stderr and
counted; nothing is written. --show prints some items beside the model's output.
"""

import argparse
import csv
import io
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from omni.chat.text import without_controls
from omni.common.errors import BadRow, RunError, UserError, reading_row
from omni.common.files import replace_file
from omni.common.media import visible
from omni.data.audio import log_mel
from omni.data.manifest import load_manifest
from omni.models.aligner import text_symbols
from omni.stages import STAGES
from omni.stages.aligner import load_aligner
from omni.stages.audio_encoder import COLUMNS
from omni.stages.evaluation import EVALUATE, OMNI_TASKS
from omni.stages.recognizer import Recognizer, read_recordings, word_error_rates, word_errors
from omni.stages.talker import Utterance, collate_utterances, load_speaker, talker_metrics, talker_sums
from omni.train.checkpoint import load_stage
from omni.train.cli import OneLineErrors, launch
from omni.train.device import pick_device, to_device
from omni.train.evaluation import EvalResult, add, first_rows, to_stderr
from omni.train.samples import write_sound

NAMED = 100  # rows left out that are told one by one


def evaluate_talker(args: argparse.Namespace, device: torch.device) -> EvalResult:
    """The talker's perplexity on the recordings' codes; with a recognizer also the word error rates of the recordings,
    of their resynthesis by vocoder and codec, and of the talker's speech."""
    speaker = load_speaker(args.ckpt_dir, args.vocoder_ckpt, device)
    aligner = load_aligner(args.ckpt_dir, device)
    recognizer = Recognizer(args.audio_ckpt, device) if args.audio_ckpt else None
    manifest = load_manifest(args.data, ("text", "wav"), "text", cache_dir=args.cache_dir, log=to_stderr)
    result, totals, counts = EvalResult(), {}, {}
    rows = first_rows(len(manifest), args)
    for start in tqdm(range(0, len(rows), args.batch_size), disable=None):
        read = read_recordings(speaker, manifest, rows[start : start + args.batch_size], result.left_out)
        utterances, recordings = [], []
        for row, text, recording in read:
            try:
                with reading_row():
                    symbols, log_mels = text_symbols(text), log_mel(recording, speaker.spec)
                    durations = aligner.align_one(symbols, log_mels)
            except BadRow as error:
                result.left_out[manifest.where(row)] = str(error)
                continue
            utterances.append(Utterance(text, symbols, speaker.encode(recording), durations))
            recordings.append(recording)
        if not utterances:
            continue
        texts = [utterance.text for utterance in utterances]
        result.rows += len(texts)
        add(
            totals,
            talker_sums(speaker.talker, to_device(collate_utterances(utterances, speaker.talker.architecture), device)),
        )
        if recognizer is None and args.save_speech is None:
            for text in texts[: args.show - len(result.shown)]:
                (codes,) = speaker.codes([text])
                result.shown.append((text, f"{len(codes) * speaker.code_s:.2f} s of speech"))
            continue
        versions = [speaker.versions(recording) for recording in recordings]
        sounds = {kind: [version[kind] for version in versions] for kind in versions[0]}
        sounds["talker"] = [speaker.waveform(codes) for codes in speaker.codes(texts)]
        if args.save_speech:
            save_speech(args.save_speech, sounds, texts, result.rows - len(texts), speaker.spec.sample_rate)
        if recognizer is None:
            continue
        for kind, waveforms in sounds.items():
            heard = recognizer.transcribe(waveforms, speaker.spec.sample_rate)
            counts[kind] = np.add(counts.get(kind, (0, 0)), word_errors(texts, heard))
        result.shown += list(zip(texts, heard, strict=True))
    result.check_rows(args)
    result.metrics = talker_metrics(totals) | word_error_rates(counts)
    result.shown = result.shown[: args.show]
    return result


def save_speech(
    folder: Path, sounds: dict[str, list[Tensor]], texts: Sequence[str], first: int, sample_rate: int
) -> None:
    """Add sounds to ``folder``: WAV files, and for each kind a manifest ``<kind>.csv`` of them. Each file is whole or
    not there, and a manifest names only sounds that are."""
    for kind, waveforms in sounds.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        table = io.StringIO(newline="")
        rows = csv.writer(table)
        if not first:
            rows.writerow(COLUMNS)
        for number, (text, waveform) in enumerate(zip(texts, waveforms, strict=True), start=first):
            name = f"{kind}/{number:06d}.wav"
            write_sound(folder / name, waveform.clamp(-1, 1), sample_rate)
            rows.writerow([name, text])
        path = folder / f"{kind}.csv"
        content = (path.read_bytes() if first else b"") + table.getvalue().encode()
        replace_file(path, lambda file, content=content: file.write(content))


EVALUATORS = EVALUATE | {"talker": evaluate_talker}

# --- command line ---------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=EVALUATORS)
    parser.add_argument("--ckpt_dir", required=True, type=Path, help="the stage's save_dir")
    parser.add_argument("--data", required=True, type=Path, help="text lines, CSV, JSON or JSONL, as in training")
    parser.add_argument("--task", choices=OMNI_TASKS, help="omni: task of the rows of --data")
    parser.add_argument("--image_root", help="folder of the pictures (default: that of --data)")
    parser.add_argument("--thinker_ckpt", help="vision: folder of the Thinker that encodes captions, if moved")
    parser.add_argument("--audio_ckpt", help="talker: folder of stage B, for word error rates")
    parser.add_argument("--vocoder_ckpt", help="talker: folder of stage F (default: Griffin-Lim)")
    parser.add_argument("--save_speech", metavar="DIR", help="talker: write its speech here, with manifests")
    parser.add_argument("--limit", type=int, help="evaluate the first N rows only")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N items beside the model's answers")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    for name, least in (("limit", 1), ("show", 0), ("batch_size", 1), ("num_workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name}: expected at least {least}, found {getattr(args, name)}")
    if not args.data.is_file():
        raise UserError(f"--data {args.data}: expected a file, found none")
    if args.save_speech is not None:
        if args.stage != "talker":
            raise UserError(f"--save_speech: has no effect on {args.stage}")
        if not args.save_speech or Path(args.save_speech).exists() and not Path(args.save_speech).is_dir():
            raise UserError(f"--save_speech {args.save_speech!r}: expected a folder, or a name for a new one")
        args.save_speech = Path(args.save_speech)
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    stage, evaluate = STAGES[args.stage], EVALUATORS[args.stage]
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory(prefix="omni_evaluate_") as folder:
        args.cache_dir = folder  # the index of somebody else's file does not stay beside it
        result = evaluate(args, device)
    for name, value in result.metrics.items():
        if not math.isfinite(value):
            raise RunError(f"{args.ckpt_dir} on {args.data}: {name} is {value}, expected a finite number")
    step = load_stage(args.ckpt_dir, stage.name, stage.prefix, stage.final)["step"]
    for where, why in list(result.left_out.items())[:NAMED]:
        to_stderr(visible(f"{where}: {why}. Left out"))
    if (more := len(result.left_out) - NAMED) > 0:
        to_stderr(f"and {more:,} more rows left out")
    if args.json:
        facts = {"stage": args.stage, "ckpt_dir": str(args.ckpt_dir), "step": step, "data": str(args.data)}
        counts = {"rows": result.rows, "rows_left_out": len(result.left_out)}
        print(json.dumps(facts | counts | result.metrics))
        return
    for truth, said in result.shown:
        print(f"true   {without_controls(truth)}\nmodel  {without_controls(said)}\n")
    left_out = f", {len(result.left_out)} left out" if result.left_out else ""
    print(f"{args.ckpt_dir} (step {step}) on {args.data}: {result.rows} rows{left_out}")
    for name, value in result.metrics.items():
        print(f"  {name:<24}{value:.4f}")


if __name__ == "__main__":
    launch(main)
