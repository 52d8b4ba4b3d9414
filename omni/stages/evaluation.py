"""Evaluation of each stage with the rows, sums and metrics of its validation.

``evaluate_*(args, opened, device)`` takes the options of scripts/evaluate.py and the stage's trained model.
"""

import argparse
import contextlib
import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from omni.common.errors import BadRow, UserError, reading_row
from omni.common.files import replace_file
from omni.data.audio import griffin_lim, log_mel
from omni.data.images import normalise
from omni.data.lines import count_lines, read_chunks, split_samples
from omni.data.manifest import Manifest
from omni.data.open_manifest import load_manifest
from omni.data.text_rows import text_files
from omni.data.tokenizer import IGNORE_INDEX, Tokenizer
from omni.models.aligner import text_symbols
from omni.models.codec import mel_spec
from omni.models.ocr import read_text
from omni.models.omni_model import OmniModel
from omni.models.speaker import Speaker
from omni.models.thinker import Thinker
from omni.stages import STAGES
from omni.stages.audio_encoder import COLUMNS, AudioEncoderConfig, Utterances, error_counts, transcribe
from omni.stages.captions import GROUP, CaptionRanking, CaptionRows, Classes, check_candidates, in_distinct_groups
from omni.stages.codec import CodecConfig, SpeechClips, codec_metrics, codec_sums
from omni.stages.ocr import OcrConfig, OcrRows, ocr_metrics, ocr_sums
from omni.stages.omni import SftConfig
from omni.stages.omni_parts import processor_of
from omni.stages.recognizer import Recognizer, read_recordings, word_error_rates, word_errors
from omni.stages.talker import Utterance, collate_utterances, speakers_in, talker_metrics, talker_sums
from omni.stages.tasks import TASKS
from omni.stages.tasks.mixture import AnswerScore, EvalItems, measures_by_task
from omni.stages.text import text_metrics, text_sums
from omni.stages.vision import VisionConfig, attach_thinker
from omni.stages.vocoder import Clips, VocoderConfig, VocoderScore, load_codec_of, load_vocoder_for
from omni.stages.voices import speaker_of, voice_of
from omni.train.device import to_device
from omni.train.evaluation import EvalResult, add, evaluate_rows, first_rows, to_stderr
from omni.train.samples import write_sound
from omni.train.stage import Loaded, load

# tasks that need neither a second file nor the folder of another stage
OMNI_TASKS = tuple(name for name, task in TASKS.items() if task.standalone)
SHORTEST_S = 0.1  # of a saved sound
SOMETIMES_SAVED = {"griffin_lim", "sampled"}  # kinds of speech
SHOWN_CHARACTERS = 300  # of the accepted answers of an item


def evaluate_text(args: argparse.Namespace, opened: Loaded, device: torch.device) -> EvalResult:
    thinker, tokenizer = opened.model, opened.tokenizer
    result, totals, text_bytes = EvalResult(), {}, 0
    for batch in text_batches(args, thinker, tokenizer):
        result.rows += batch["lines"]
        text_bytes += batch["bytes"]
        add(totals, text_sums(thinker, to_device(batch, device)))
    if not result.rows:
        raise UserError(f"{args.data}: expected lines of text, found none")
    result.metrics = text_metrics(totals, text_bytes)
    return result


def text_batches(args: argparse.Namespace, thinker: Thinker, tokenizer: Tokenizer) -> Iterator[dict]:
    """The file as packed sequences, as in training: ``<end> line <end> line <end> ...`` cut every ``ctx_len``."""
    size = args.batch_size * thinker.architecture.ctx_len
    tokens, counts = [tokenizer.eos_id], {"lines": 0, "bytes": 0}

    def batch(pieces: list[int]) -> dict:
        window = np.full(size + 1, IGNORE_INDEX)
        window[: len(pieces)] = pieces
        shape = (args.batch_size, thinker.architecture.ctx_len)
        inputs = torch.from_numpy(window[:-1]).clamp(min=0).view(shape)
        whole = {"tokens": inputs, "targets": torch.from_numpy(window[1:]).view(shape), **counts}
        counts.update(lines=0, bytes=0)
        return whole

    lines = itertools.chain.from_iterable(map(text_lines, text_files(args.data)))
    for sample in itertools.islice(lines, args.limit):
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


def evaluate_audio_enc(args: argparse.Namespace, opened: Loaded, device: torch.device) -> EvalResult:
    model, tokenizer = opened.model, opened.tokenizer
    config = opened.config_as(AudioEncoderConfig, use_compile=False)  # static shapes are for compiled training
    manifest = load_manifest(args.data, COLUMNS, "text", cache_dir=args.cache_dir, log=to_stderr)
    rows = Utterances(manifest, first_rows(len(manifest), args), config, tokenizer, training=False)
    texts: list[str] = []
    said: list[str] = []

    def sums(batch: dict) -> dict[str, Tensor]:
        texts.extend(batch["texts"])
        said.extend(transcribe(model, tokenizer, batch["features"], batch["lengths"])[: len(batch["texts"])])
        return {}

    result, _ = evaluate_rows(rows, args, device, sums, args.batch_size)
    (word_errors, words), (character_errors, characters) = error_counts(texts, said)
    result.metrics = {"wer": word_errors / words, "cer": character_errors / characters}
    result.shown = list(zip(texts, said, strict=True))[: args.show]
    return result


def evaluate_vision(args: argparse.Namespace, opened: Loaded, device: torch.device) -> EvalResult:
    attach_thinker(opened, args.thinker_ckpt)
    model, tokenizer = opened.model, opened.tokenizer
    config = opened.config_as(VisionConfig, image_root=args.image_root)
    manifest = load_manifest(args.data, ("image", "caption"), "image", cache_dir=args.cache_dir, log=to_stderr)
    order, largest = in_distinct_groups(manifest, first_rows(len(manifest), args))
    check_candidates(manifest.path, largest, to_stderr)
    classes = Classes.beside(manifest.path)
    rows = CaptionRows(manifest, order, tokenizer, config, training=False, classes=classes)
    ranking = CaptionRanking(tokenizer, config.ctx_len, classes)
    result, totals = evaluate_rows(rows, args, device, partial(ranking.sums, model), GROUP)
    result.metrics = ranking.metrics(totals)
    batch = to_device(rows.batch(np.arange(min(GROUP, len(rows)) if args.show else 0), epoch=0), device)
    if batch["n_targets"]:
        pictures, captions, _ = model(normalise(batch["images"]), batch["tokens"], batch["ends"])
        texts = [tokenizer.decode(ids[:end].tolist()) for ids, end in zip(batch["tokens"], batch["ends"], strict=True)]
        nearest = (pictures @ captions.T).argmax(dim=1).tolist()
        result.shown = [(texts[row], texts[found]) for row, found in enumerate(nearest)][: args.show]
    return result


def evaluate_codec(args: argparse.Namespace, opened: Loaded, device: torch.device) -> EvalResult:
    codec, config = opened.model, opened.config_as(CodecConfig)
    manifest = load_manifest(args.data, ("text", "wav"), "text", cache_dir=args.cache_dir, log=to_stderr)
    rows = SpeechClips(manifest, first_rows(len(manifest), args), codec.architecture, config.max_codes, training=False)
    result, totals = evaluate_rows(rows, args, device, partial(codec_sums, codec), args.batch_size)
    result.metrics = codec_metrics(totals)
    return result


def evaluate_ocr(args: argparse.Namespace, opened: Loaded, device: torch.device) -> EvalResult:
    model, config = opened.model, opened.config_as(OcrConfig, image_root=args.image_root)
    manifest = load_manifest(args.data, ("image", "text"), "text", cache_dir=args.cache_dir, log=to_stderr)
    rows = OcrRows(manifest, first_rows(len(manifest), args), config, training=False)
    result, totals = evaluate_rows(rows, args, device, partial(ocr_sums, model), args.batch_size)
    result.metrics = ocr_metrics(totals)
    batch = to_device(rows.batch(np.arange(min(args.show, len(rows))), epoch=0), device)
    if batch["n_targets"]:
        result.shown = list(zip(batch["texts"], read_text(model, batch["images"]), strict=True))
    return result


def evaluate_vocoder(args: argparse.Namespace, opened: Loaded, device: torch.device) -> EvalResult:
    model, config = opened.model, opened.config_as(VocoderConfig)
    manifest = load_manifest(args.data, ("wav",), "text", cache_dir=args.cache_dir, log=to_stderr)
    codec = load_codec_of(config)
    rows = Clips(manifest, first_rows(len(manifest), args), config, training=False, codec=codec)
    score = VocoderScore(model.architecture)
    result, totals = evaluate_rows(rows, args, device, partial(score.sums, model), args.batch_size)
    result.metrics = score.metrics(totals)
    for row in range(min(args.show, len(rows))):
        batch = rows.batch(np.array([row]), epoch=0)
        if batch["n_targets"]:
            found = score.metrics(score.sums(model, to_device(batch, device)))
            said = f"mel L1 {found['mel_l1']:.3f}, Griffin-Lim {found['mel_l1_griffin_lim']:.3f}"
            result.shown.append((manifest[row]["wav"], said))
    return result


def evaluate_omni(args: argparse.Namespace, opened: Loaded, device: torch.device) -> EvalResult:
    if args.task is None:
        raise UserError(f"--task: expected one of {', '.join(OMNI_TASKS)}, found none")
    # one padded length is for compiled training, and cached features are those of the training's files
    config = opened.config_as(SftConfig, use_compile=False, cache_features=False, image_root=args.image_root)
    model, task = opened.model, TASKS[args.task]
    processor = processor_of(opened.tokenizer, model.architecture, config)
    manifest = task.open(args.data, cache_dir=args.cache_dir, log=to_stderr)
    tasks = {args.task: task(manifest, np.arange(len(manifest)), processor, config, seed=0, training=False)}
    items = EvalItems(tasks, processor, args.limit or len(manifest), first=True)
    score = AnswerScore(processor, config.max_answer_tokens, tasks)
    result, totals = evaluate_rows(items, args, device, partial(score.sums, model), args.batch_size)
    result.metrics = score.metrics(totals)
    result.measures = {f"accuracy_{name}": " or ".join(found) for name, found in measures_by_task(totals).items()}
    for row in range(min(args.show, len(items))):
        batch = to_device(items.batch(np.array([row]), epoch=0), device)
        if batch["n_targets"]:
            result.shown.append(scored_item(score, model, batch))
    return result


def scored_item(score: AnswerScore, model: OmniModel, batch: dict) -> tuple[str, ...]:
    """Of a batch of one item: its accepted answers, the model's answer, and the scores, as texts."""
    for answer in score.scored(model, batch):
        accepted = " | ".join(dict.fromkeys(batch["references"][0].accepted))
        scores = ", ".join(f"{points.score:.2f} {name}" for name, points in answer.points.items())
        return accepted[:SHOWN_CHARACTERS], answer.text, scores
    embeds, _, dropped, *_ = model.embed(batch)
    (text,) = score.answers(model, embeds, batch["prompts"] - dropped)
    return "(not scored)", text


def evaluate_talker(args: argparse.Namespace, opened: Loaded, device: torch.device) -> EvalResult:
    """The talker's perplexity on the recordings' codes; with a recognizer also the word error rates of the recordings,
    of their resynthesis by vocoder and codec, and of the talker's speech, and of sampled speech with
    ``--temperature``. With several voices each row is spoken as its speaker, or all as ``--voice`` or
    ``--voice_from``."""
    codec, aligner = (load(STAGES[name], args.ckpt_dir, device).model for name in ("codec", "aligner"))
    vocoder = load_vocoder_for(args.ckpt_dir, mel_spec(codec.architecture), args.vocoder_ckpt, device)
    speaker = Speaker(opened.model, codec, vocoder)
    voice = speaker.voice(args.voice, args.voice_from)
    several = opened.model.voice_encoder is not None
    recognizer = Recognizer(args.audio_ckpt, device) if args.audio_ckpt else None
    manifest = load_manifest(args.data, ("text", "wav"), "text", cache_dir=args.cache_dir, log=to_stderr)
    result, totals, counts = EvalResult(), {}, {}
    rows = first_rows(len(manifest), args)
    if args.save_speech:
        refuse_to_replace(args.save_speech, manifest, rows)
    for start in tqdm(range(0, len(rows), args.batch_size), disable=None):
        read = read_recordings(speaker, manifest, rows[start : start + args.batch_size], result.left_out)
        utterances, recordings, names = [], [], []
        for row, text, recording in read:
            try:
                with reading_row():
                    symbols = text_symbols(text, speaker.text_language)
                    log_mels = log_mel(recording, speaker.spec)
                    durations, codes = aligner.align_one(symbols, log_mels), speaker.encode(recording)
                    name = speaker_of(manifest[row]) if several else name_or_none(manifest[row])
            except BadRow as error:
                result.left_out[manifest.where(row)] = str(error)
                continue
            reference = voice_of(speaker.talker, name, codes) if voice is None else voice
            scored_as = name if several and voice is None else ""
            utterances.append(Utterance(text, symbols, codes, durations, reference=reference, speaker=scored_as))
            recordings.append(recording)
            names.append(name)
        if not utterances:
            continue
        texts, references = zip(*((utterance.text, utterance.reference) for utterance in utterances), strict=True)
        result.rows += len(texts)
        add(
            totals,
            talker_sums(speaker.talker, to_device(collate_utterances(utterances, speaker.talker.architecture), device)),
        )
        if recognizer is None and args.save_speech is None:
            for text, reference in list(zip(texts, references, strict=True))[: args.show - len(result.shown)]:
                (codes,) = speaker.codes([text], [reference])
                result.shown.append((text, f"{len(codes) * speaker.code_s:.2f} s of speech"))
            continue
        versions = [speaker.versions(recording) for recording in recordings]
        sounds = {kind: [version[kind] for version in versions] for kind in versions[0]}
        ways = ({"sampled": args.temperature} if args.temperature else {}) | {"talker": 0.0}
        for way, temperature in ways.items():
            spoken = speaker.codes(texts, references, temperature=temperature)
            sounds[way] = [speaker.waveform(codes) for codes in spoken]
        if args.save_speech:
            saved = dict(sounds)
            if vocoder is not None:  # what it is compared with
                saved["griffin_lim"] = [griffin_lim(log_mel(one, speaker.spec), speaker.spec) for one in recordings]
            where = (texts, result.rows - len(texts), speaker.spec.sample_rate)
            if result.rows == len(texts):
                forget_speech(args.save_speech, SOMETIMES_SAVED - saved.keys())
            spoken = {way: saved.pop(way) for way in ways}
            save_speech(args.save_speech, saved, *where, speakers=names)
            voices = names if voice is None else [args.voice or ""] * len(names)
            save_speech(args.save_speech, spoken, *where, speakers=voices)
        if recognizer is None:
            continue
        for kind, waveforms in sounds.items():
            heard = recognizer.transcribe(waveforms, speaker.spec.sample_rate)
            counts[kind] = np.add(counts.get(kind, (0, 0)), word_errors(texts, heard, recognizer.text_language))
        for name, own in speakers_in(speaker.talker, {"speakers": [one.speaker for one in utterances]}).items():
            errors = word_errors(
                [texts[index] for index in own], [heard[index] for index in own], recognizer.text_language
            )
            counts[f"talker_{name}"] = np.add(counts.get(f"talker_{name}", (0, 0)), errors)
        result.shown += list(zip(texts, heard, strict=True))
    result.check_rows(args)
    result.metrics = talker_metrics(totals) | word_error_rates(counts)
    result.shown = result.shown[: args.show]
    return result


def name_or_none(row: dict) -> str:
    """The speaker of a row, who has no effect on a talker of one voice; "" if the name is none."""
    try:
        return speaker_of(row)
    except BadRow:
        return ""


def save_speech(
    folder: Path,
    sounds: dict[str, list[Tensor]],
    texts: Sequence[str],
    first: int,
    sample_rate: int,
    speakers: Sequence[str] | None = None,
) -> None:
    """Add sounds to ``folder``: WAV files, and for each kind a manifest ``<kind>.csv``. Files are written whole, and
    a manifest after its sounds. With the first sounds of a kind, those that an earlier manifest lists go.

    Args:
        sounds: kind -> waveforms (S,); one of less than SHORTEST_S ends with silence, as a file without samples is
            taken for a damaged one.
        first: number of sounds of each kind before these.
        speakers: of the texts; default: no names.
    """
    shortest = round(SHORTEST_S * sample_rate)
    for kind, waveforms in sounds.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        table = io.StringIO(newline="")
        rows = csv.writer(table)
        earlier = [] if first else sounds_of(folder, kind)
        if not first:
            rows.writerow([*COLUMNS, "speaker"])
        rows_of_kind = zip(texts, speakers or [""] * len(texts), waveforms, strict=True)
        for number, (text, speaker, waveform) in enumerate(rows_of_kind, start=first):
            name = f"{kind}/{number:06d}.wav"
            silence = waveform.new_zeros(max(0, shortest - len(waveform)))
            write_sound(folder / name, torch.cat((waveform.clamp(-1, 1), silence)), sample_rate)
            rows.writerow([name, text, speaker])
        path = folder / f"{kind}.csv"
        content = (path.read_bytes() if first else b"") + table.getvalue().encode()
        replace_file(path, lambda file, content=content: file.write(content))
        for number in earlier:
            if number >= len(texts):
                (folder / kind / f"{number:06d}.wav").unlink(missing_ok=True)


def forget_speech(folder: Path, kinds: Iterable[str]) -> None:
    """Remove what ``save_speech`` wrote of ``kinds`` earlier: perhaps of other sentences."""
    for kind in kinds:
        if numbers := sounds_of(folder, kind):
            (folder / f"{kind}.csv").unlink()
        for number in numbers:
            (folder / kind / f"{number:06d}.wav").unlink(missing_ok=True)


def sounds_of(folder: Path, kind: str) -> list[int]:
    """The numbers of the WAV files that ``save_speech`` has listed in a manifest."""
    path = folder / f"{kind}.csv"
    written = re.findall(
        rf"^{re.escape(kind)}/([0-9]{{6}})\.wav,", path.read_text("utf-8") if path.exists() else "", re.M
    )
    return [int(number) for number in written]


def refuse_to_replace(folder: Path, manifest: Manifest, rows: Sequence[int]) -> None:
    """
    Raises:
        UserError: a row's recording lies in the folder, where speech is to be saved.
    """
    resolved = folder.resolve()
    for row in rows:
        with contextlib.suppress(BadRow):
            path = manifest.file(manifest[row], "wav")
            if isinstance(path, Path) and resolved in path.resolve().parents:
                raise UserError(f"--save_speech {folder}: expected another folder than that of {manifest.where(row)}")
