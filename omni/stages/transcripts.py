"""What stage B hears: transcripts by greedy decoding, and their word and character errors."""

# B batch, T mel frames, M mel channels, U output frames, V tokens and blank

import math

import jiwer
import torch
from torch import Tensor, nn

from omni.models.audio_encoder import AudioEncoder
from omni.models.ctc import CtcTokenizer, collapse, ctc_nll


def score_sums(model: nn.Module, batch: dict, tokenizer: CtcTokenizer) -> dict[str, Tensor]:
    """Sums over a batch of ``EvalSets``, for each source: nats and tokens, word and character errors.

    Greedy decoding. A text without an alignment has no likelihood, so only its errors count.
    """
    totals: dict[str, Tensor] = {}
    for name in sorted({key.rpartition("/")[0] for key in batch if "/" in key}):
        texts, lengths = batch[f"{name}/texts"], batch[f"{name}/target_lengths"]
        logits, frames = model(batch[f"{name}/features"], batch[f"{name}/lengths"])
        nll = ctc_nll(logits, frames, batch[f"{name}/targets"], lengths)
        known = torch.isfinite(nll) & (lengths > 0)
        words, characters = error_counts(texts, greedy_texts(logits, frames, tokenizer)[: len(texts)])
        counts = {
            "nats": torch.where(known, nll, 0.0).sum(),
            "tokens": torch.where(known, lengths, 0).sum(),
            "word_errors": torch.tensor(words[0]),
            "words": torch.tensor(words[1]),
            "character_errors": torch.tensor(characters[0]),
            "characters": torch.tensor(characters[1]),
        }
        totals |= {f"{name}/{key}": value for key, value in counts.items()}
    return totals


@torch.no_grad()
def transcribe(model: AudioEncoder, tokenizer: CtcTokenizer, features: Tensor, lengths: Tensor) -> list[str]:
    """Transcripts of (B, T, M) features with ``lengths`` (B,) frames, by greedy decoding."""
    return greedy_texts(*model(features, lengths), tokenizer)


def greedy_texts(logits: Tensor, frames: Tensor, tokenizer: CtcTokenizer) -> list[str]:
    """The best token of each frame of (B, U, V), repeats and blanks removed, as text."""
    best = logits.argmax(dim=-1).tolist()
    blank = logits.shape[-1] - 1
    rows = zip(best, frames.tolist(), strict=True)
    return [tokenizer.decode(collapse(row[:count], blank)) for row, count in rows]


def error_counts(references: list[str], hypotheses: list[str]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(errors, length) in words and in characters: substitutions, deletions and insertions of the best alignment."""
    words = jiwer.process_words(references, hypotheses)
    characters = jiwer.process_characters(references, hypotheses)
    counts = []
    for result in (words, characters):
        misses = result.substitutions + result.deletions
        counts.append((misses + result.insertions, result.hits + misses))
    return counts[0], counts[1]


def score_metrics(totals: dict[str, float]) -> dict[str, float]:
    """From the totals of ``score_sums``: loss (nats per token), wer and cer of the first source, ``val``; and, if
    they are there, wer_unseen_voices and wer_unseen_words of the sources of these names."""
    metrics = {}
    if "val/words" in totals:
        metrics["loss"] = totals["val/nats"] / totals["val/tokens"] if totals["val/tokens"] else math.nan
        metrics["wer"] = totals["val/word_errors"] / totals["val/words"]
        metrics["cer"] = totals["val/character_errors"] / totals["val/characters"]
    for name in ("unseen_voices", "unseen_words"):
        if f"{name}/words" in totals:
            metrics[f"wer_{name}"] = totals[f"{name}/word_errors"] / totals[f"{name}/words"]
    return metrics
