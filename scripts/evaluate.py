"""Judge a trained stage on any file in the format that the stage trains on.

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

The figures are computed by the code that validates in training. A row that cannot be used is left out, named on
stderr and counted; nothing is written. --show prints some items beside what the model makes of them.
"""

import argparse
import csv
import io
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from omni.aligner import load_aligner, text_symbols
from omni.asr import COLUMNS, Utterances, error_counts
from omni.assistant import without_controls
from omni.audio import log_mel
from omni.audio_encoder import load_audio_encoder, transcribe
from omni.captions import GROUP, CaptionRanking, CaptionRows, in_distinct_groups
from omni.checkpoint import load_stage, saved_config
from omni.codec import SpeechClips, codec_metrics, codec_sums, load_codec
from omni.config import CodecConfig, StageConfig
from omni.corpus import IGNORE, count_lines, read_chunks, split_samples
from omni.data import ResumableDataset, build_loader
from omni.errors import BadRow, RunError, UserError, reading_row
from omni.files import replace_file
from omni.images import normalise
from omni.loop import to_device
from omni.manifest import Rows, load_manifest
from omni.media import visible
from omni.ocr import OcrRows, load_ocr, ocr_metrics, ocr_sums, read_text
from omni.omni_model import Inputs, load_omni
from omni.runtime import OneLineErrors, launch, pick_device
from omni.samples import write_sound
from omni.sft import TASKS, AnswerScore, HeldOutItems, load_text
from omni.speech import Listener, Speaker, read_recordings, word_error_rates, word_errors
from omni.talker import Utterance, collate_utterances, talker_metrics, talker_sums
from omni.thinker import Thinker, load_thinker
from omni.tokenizer import Tokenizer
from omni.vision_encoder import load_vision_encoder
from omni.vocoder import Clips, VocoderScore, load_codec_of, load_vocoder, split_column
from train_text import text_metrics, text_sums

# those that need no second file, and no folder of another stage
OMNI_TASKS = tuple(name for name in TASKS if name not in ("spoken_image_question", "spoken_answer"))


@dataclass
class Judgement:
    """What a stage makes of the data."""

    metrics: dict[str, float] = field(default_factory=dict)
    rows: int = 0  # judged
    left_out: dict[str, str] = field(default_factory=dict)  # where -> why
    shown: list[tuple[str, str]] = field(default_factory=list)  # what is true, what the model says


# --- one function per stage -----------------------------------------------------------------------------------------


NAMED = 100  # rows left out that are told one by one


def judge_text(args: argparse.Namespace, device: torch.device) -> Judgement:
    thinker, tokenizer, _ = load_thinker(args.ckpt_dir, device)
    judgement, totals, text_bytes = Judgement(), {}, 0
    for batch in text_batches(args, thinker, tokenizer):
        judgement.rows += batch["lines"]
        text_bytes += batch["bytes"]
        add(totals, text_sums(thinker, to_device(batch, device)))
    if not judgement.rows:
        raise UserError(f"{args.data}: expected lines of text, found none")
    judgement.metrics = text_metrics(totals, text_bytes)
    return judgement


def text_batches(args: argparse.Namespace, thinker: Thinker, tokenizer: Tokenizer) -> Iterator[dict]:
    """The file as packed sequences, as in training: ``<end> line <end> line <end> ...`` cut every ``ctx_len``."""
    size = args.batch_size * thinker.arch.ctx_len
    tokens, counts = [tokenizer.eos_id], {"lines": 0, "bytes": 0}

    def batch(pieces: list[int]) -> dict:
        window = np.full(size + 1, IGNORE)
        window[: len(pieces)] = pieces
        shape = (args.batch_size, thinker.arch.ctx_len)
        inputs = torch.from_numpy(window[:-1]).clamp(min=0).view(shape)
        whole = {"tokens": inputs, "targets": torch.from_numpy(window[1:]).view(shape), **counts}
        counts.update(lines=0, bytes=0)
        return whole

    for sample in itertools.islice(text_lines(Path(args.data)), args.limit):
        tokens += [*tokenizer.encode(sample.decode("utf-8")), tokenizer.eos_id]
        counts["lines"] += 1
        counts["bytes"] += len(sample) + 1
        while len(tokens) > size:
            yield batch(tokens[: size + 1])
            tokens = tokens[size:]
    if len(tokens) > 1:
        yield batch(tokens)


def text_lines(path: Path) -> Iterator[bytes]:
    row = 1
    for chunk in read_chunks(path):
        yield from split_samples(chunk, path, row)
        row += count_lines(chunk)


def judge_audio_enc(args: argparse.Namespace, device: torch.device) -> Judgement:
    model, tokenizer, config = load_audio_encoder(args.ckpt_dir, device)
    manifest = load_manifest(args.data, COLUMNS, "text", cache_dir=args.cache_dir, log=to_stderr)
    rows = Utterances(manifest, first_rows(len(manifest), args), config, tokenizer, training=False)
    texts: list[str] = []
    said: list[str] = []

    def sums(batch: dict) -> dict[str, Tensor]:
        texts.extend(batch["texts"])
        said.extend(transcribe(model, tokenizer, batch["features"], batch["lengths"], args.beam)[: len(batch["texts"])])
        return {}

    judgement, _ = judge_rows(rows, config, args, device, sums, args.batch_size)
    (word_errors, words), (character_errors, characters) = error_counts(texts, said)
    judgement.metrics = {"wer": word_errors / words, "cer": character_errors / characters}
    judgement.shown = list(zip(texts, said, strict=True))[: args.show]
    return judgement


def judge_vision(args: argparse.Namespace, device: torch.device) -> Judgement:
    model, tokenizer, config = load_vision_encoder(args.ckpt_dir, device, args.thinker_ckpt)
    config = config.model_copy(update={"image_root": args.image_root})
    manifest = load_manifest(args.data, ("image", "caption"), "image", cache_dir=args.cache_dir, log=to_stderr)
    order = in_distinct_groups(manifest, first_rows(len(manifest), args))
    rows = CaptionRows(manifest, order, tokenizer, config, training=False)
    ranking = CaptionRanking(tokenizer, config.ctx_len)
    judgement, totals = judge_rows(rows, config, args, device, partial(ranking.sums, model), GROUP)
    judgement.metrics = ranking.metrics(totals)
    batch = to_device(rows.batch(np.arange(min(GROUP, len(rows)) if args.show else 0), epoch=0), device)
    if batch["weight"]:
        pictures, captions, _ = model(normalise(batch["images"]), batch["tokens"], batch["ends"])
        texts = [tokenizer.decode(ids[:end].tolist()) for ids, end in zip(batch["tokens"], batch["ends"], strict=True)]
        nearest = (pictures @ captions.T).argmax(dim=1).tolist()
        judgement.shown = [(texts[row], texts[found]) for row, found in enumerate(nearest)][: args.show]
    return judgement


def judge_codec(args: argparse.Namespace, device: torch.device) -> Judgement:
    codec = load_codec(args.ckpt_dir, device)
    config = saved_config(CodecConfig, load_stage(args.ckpt_dir, "codec", "rvq_codec", "rvq_codec.pt"))
    manifest = load_manifest(args.data, ("text", "wav"), "text", cache_dir=args.cache_dir, log=to_stderr)
    rows = SpeechClips(manifest, first_rows(len(manifest), args), config, training=False)
    judgement, totals = judge_rows(rows, config, args, device, partial(codec_sums, codec), args.batch_size)
    judgement.metrics = codec_metrics(totals)
    return judgement


def judge_talker(args: argparse.Namespace, device: torch.device) -> Judgement:
    """How sure the talker is of the recordings' codes; with a listener, also the word error rates of the recordings,
    of what vocoder and codec make of them, and of what the talker says."""
    speaker = Speaker.load(args.ckpt_dir, args.vocoder_ckpt, device)
    aligner = load_aligner(args.ckpt_dir, device)
    listener = Listener(args.audio_ckpt, device) if args.audio_ckpt else None
    manifest = load_manifest(args.data, ("text", "wav"), "text", cache_dir=args.cache_dir, log=to_stderr)
    judgement, totals, counts = Judgement(), {}, {}
    rows = first_rows(len(manifest), args)
    for start in tqdm(range(0, len(rows), args.batch_size), disable=None):
        read = read_recordings(speaker, manifest, rows[start : start + args.batch_size], judgement.left_out)
        utterances, recordings = [], []
        for row, text, recording in read:
            try:
                with reading_row():
                    symbols, log_mels = text_symbols(text), log_mel(recording, speaker.spec)
                    durations = aligner.align_one(symbols, log_mels)
            except BadRow as error:
                judgement.left_out[manifest.where(row)] = str(error)
                continue
            utterances.append(Utterance(text, symbols, speaker.encode(recording), durations))
            recordings.append(recording)
        if not utterances:
            continue
        texts = [utterance.text for utterance in utterances]
        judgement.rows += len(texts)
        add(
            totals,
            talker_sums(speaker.talker, to_device(collate_utterances(utterances, speaker.talker.config), device)),
        )
        if listener is None and args.save_speech is None:
            for text in texts[: args.show - len(judgement.shown)]:
                (codes,) = speaker.codes([text])
                judgement.shown.append((text, f"{len(codes) * speaker.code_s:.2f} s of speech"))
            continue
        versions = [speaker.versions(recording) for recording in recordings]
        sounds = {kind: [version[kind] for version in versions] for kind in versions[0]}
        sounds["talker"] = [speaker.waveform(codes) for codes in speaker.codes(texts)]
        if args.save_speech:
            save_speech(args.save_speech, sounds, texts, judgement.rows - len(texts), speaker.spec.sample_rate)
        if listener is None:
            continue
        for kind, waveforms in sounds.items():
            heard = listener.transcribe(waveforms, speaker.spec.sample_rate)
            counts[kind] = np.add(counts.get(kind, (0, 0)), word_errors(texts, heard))
        judgement.shown += list(zip(texts, heard, strict=True))
    if not judgement.rows:
        where, why = next(iter(judgement.left_out.items()))
        raise UserError(f"{args.data}: not one of its {len(rows)} rows can be used. {where}: {why}")
    judgement.metrics = talker_metrics(totals) | word_error_rates(counts)
    judgement.shown = judgement.shown[: args.show]
    return judgement


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


def judge_ocr(args: argparse.Namespace, device: torch.device) -> Judgement:
    model = load_ocr(args.ckpt_dir, device)
    config = model.arch.model_copy(update={"image_root": args.image_root})
    manifest = load_manifest(args.data, ("image", "text"), "text", cache_dir=args.cache_dir, log=to_stderr)
    rows = OcrRows(manifest, first_rows(len(manifest), args), config, training=False)
    judgement, totals = judge_rows(rows, config, args, device, partial(ocr_sums, model), args.batch_size)
    judgement.metrics = ocr_metrics(totals)
    batch = to_device(rows.batch(np.arange(min(args.show, len(rows))), epoch=0), device)
    if batch["weight"]:
        judgement.shown = list(zip(batch["texts"], read_text(model, batch["images"]), strict=True))
    return judgement


def judge_vocoder(args: argparse.Namespace, device: torch.device) -> Judgement:
    model = load_vocoder(args.ckpt_dir, device)
    manifest = load_manifest(args.data, ("wav",), split_column(args.data), cache_dir=args.cache_dir, log=to_stderr)
    codec = load_codec_of(model.config)
    rows = Clips(manifest, first_rows(len(manifest), args), model.config, training=False, codec=codec)
    score = VocoderScore(model.config)
    judgement, totals = judge_rows(rows, model.config, args, device, partial(score.sums, model), args.batch_size)
    judgement.metrics = score.metrics(totals)
    for row in range(min(args.show, len(rows))):
        batch = rows.batch(np.array([row]), epoch=0)
        if batch["weight"]:
            found = score.metrics(score.sums(model, to_device(batch, device)))
            said = f"mel L1 {found['mel_l1']:.3f}, Griffin-Lim {found['mel_l1_griffin_lim']:.3f}"
            judgement.shown.append((manifest[row]["wav"], said))
    return judgement


def judge_omni(args: argparse.Namespace, device: torch.device) -> Judgement:
    if args.task is None:
        raise UserError(f"--task: expected one of {', '.join(OMNI_TASKS)}, found none")
    model, tokenizer, config = load_omni(args.ckpt_dir, device)
    config = config.model_copy(update={"image_root": args.image_root})
    kind, columns, key = TASKS[args.task]
    load = load_text if args.task == "text" else partial(load_manifest, columns=columns, key=key)
    manifest, inputs = load(args.data, cache_dir=args.cache_dir, log=to_stderr), Inputs(tokenizer, config)
    rows = kind(manifest, first_rows(len(manifest), args), inputs, config, seed=0, training=False)
    items, score = HeldOutItems({args.task: rows}, inputs, len(rows)), AnswerScore(inputs, config.max_answer_tokens)
    judgement, totals = judge_rows(items, config, args, device, partial(score.sums, model), args.batch_size)
    judgement.metrics = score.metrics(totals)
    for row in range(min(args.show, len(rows))):
        batch = to_device(items.batch(np.array([row]), epoch=0), device)
        if batch["weight"]:
            embeds, _, dropped, *_ = model.embed(batch)
            (said,) = score.answers(model, embeds, batch["prompts"] - dropped)
            judgement.shown.append((" | ".join(sorted(batch["right"][0])[:3]) or "(not judged)", said))
    return judgement


STAGES = {
    "text": (judge_text, "thinker", "thinker.pt"),
    "audio_enc": (judge_audio_enc, "audio_enc", "audio_enc.pt"),
    "vision": (judge_vision, "vision", "vision.pt"),
    "codec": (judge_codec, "rvq_codec", "rvq_codec.pt"),
    "talker": (judge_talker, "talker", "talker.pt"),
    "ocr": (judge_ocr, "ocr", "ocr.pt"),
    "vocoder": (judge_vocoder, "hifigan", "hifigan.pt"),
    "omni": (judge_omni, "omni", "omni_final.pt"),
}

# --- what they share ------------------------------------------------------------------------------------------------


def judge_rows(
    rows: Rows,
    config: StageConfig,
    args: argparse.Namespace,
    device: torch.device,
    sums: Callable[[dict], dict[str, Tensor]],
    batch_size: int,
) -> tuple[Judgement, dict[str, float]]:
    """All rows in order, in batches: the totals of ``sums``, and which rows could not be used.

    Raises:
        UserError: not one row could be used.
    """
    judgement, totals = Judgement(), {}
    config = config.model_copy(update={"num_workers": args.num_workers})
    dataset = ResumableDataset(rows, seed=0, batch_size=batch_size, shuffle=False)
    for batch in tqdm(build_loader(dataset, config, device), total=dataset.steps_per_epoch, disable=None):
        judgement.left_out |= batch["bad_rows"]
        for text in batch["notes"]:
            to_stderr(text)
        judgement.rows += len(batch["rows"]) - len(batch["bad_rows"])
        if batch["weight"]:
            add(totals, sums(to_device(batch, device)))
    if not judgement.rows:
        where, why = next(iter(judgement.left_out.items()))
        raise UserError(f"{args.data}: not one of its {len(rows)} rows can be used. {where}: {why}")
    return judgement, totals


def add(totals: dict[str, float | Tensor], sums: dict[str, Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + (value.double().cpu() if value.dim() else float(value))


def first_rows(count: int, args: argparse.Namespace) -> np.ndarray:
    return np.arange(min(count, args.limit or count))


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


# --- command line ---------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--ckpt_dir", required=True, type=Path, help="the stage's save_dir")
    parser.add_argument("--data", required=True, type=Path, help="text lines, CSV, JSON or JSONL, as in training")
    parser.add_argument("--task", choices=OMNI_TASKS, help="omni: what the rows of --data ask for")
    parser.add_argument("--image_root", help="folder of the pictures (default: that of --data)")
    parser.add_argument("--thinker_ckpt", help="vision: where the Thinker that reads the captions is now")
    parser.add_argument("--audio_ckpt", help="talker: folder of stage B, whose model listens")
    parser.add_argument("--vocoder_ckpt", help="talker: folder of stage F (default: Griffin-Lim)")
    parser.add_argument("--save_speech", metavar="DIR", help="talker: write what it says, with manifests")
    parser.add_argument("--beam", type=int, default=1, help="audio_enc: width of the beam search (1: greedy)")
    parser.add_argument("--limit", type=int, help="judge the first N rows only")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N items beside the model's answers")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    for name, least in (("beam", 1), ("limit", 1), ("show", 0), ("batch_size", 1), ("num_workers", 0)):
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
    judge, prefix, final = STAGES[args.stage]
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory(prefix="omni_evaluate_") as folder:
        args.cache_dir = folder  # the index of somebody else's file does not stay beside it
        judgement = judge(args, device)
    for name, value in judgement.metrics.items():
        if not math.isfinite(value):
            raise RunError(f"{args.ckpt_dir} on {args.data}: {name} is {value}, expected a finite number")
    step = load_stage(args.ckpt_dir, args.stage, prefix, final)["step"]
    for where, why in list(judgement.left_out.items())[:NAMED]:
        to_stderr(visible(f"{where}: {why}. Left out"))
    if (more := len(judgement.left_out) - NAMED) > 0:
        to_stderr(f"and {more:,} more rows left out")
    if args.json:
        facts = {"stage": args.stage, "ckpt_dir": str(args.ckpt_dir), "step": step, "data": str(args.data)}
        counts = {"rows": judgement.rows, "rows_left_out": len(judgement.left_out)}
        print(json.dumps(facts | counts | judgement.metrics))
        return
    for truth, said in judgement.shown:
        print(f"true   {without_controls(truth)}\nmodel  {without_controls(said)}\n")
    left_out = f", {len(judgement.left_out)} left out" if judgement.left_out else ""
    print(f"{args.ckpt_dir} (step {step}) on {args.data}: {judgement.rows} rows{left_out}")
    for name, value in judgement.metrics.items():
        print(f"  {name:<24}{value:.4f}")


if __name__ == "__main__":
    launch(main)
