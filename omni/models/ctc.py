"""Connectionist temporal classification (Graves et al. 2006): text units, loss, greedy decoding.

A CTC model predicts one unit or the blank in every frame. Removing repeats, then blanks, gives the text; its
probability is the sum over all alignments of its units with the frames.
"""

# B batch, U frames, V tokens and blank (the last), L tokens of a target, S = 2L + 1 states: blanks around the tokens

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Self

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from omni.common.errors import UserError
from omni.common.files import read_text, replace_file
from omni.common.text import audible
from omni.data.tokenizer import check_ids, difference

# ---------------------------------------------------------------------------------------------------------------
# Text units


def normalise_text(text: str) -> str:
    """The pronounced part of a text, on which transcripts are trained and compared.

    NFKC, lower case; letters, digits and apostrophes inside words stay, invisible characters go (``audible``),
    everything else separates words. Numbers stay in digits: ``spoken_form`` makes words of them.
    "“It’s  5pm,” he said" becomes "it's 5pm he said".
    """
    text = unicodedata.normalize("NFKC", audible(text)).lower().replace("’", "'")
    parts = text.translate(_HEARD).split()
    return " ".join(word for part in parts if (word := part.strip("'")))


class _Heard(dict):
    """Code point -> itself, or a space; cached, since every utterance passes through here."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = character.isalnum() or character == "'" or unicodedata.category(character)[0] == "M"
        self[code] = character if kept else " "
        return self[code]


_HEARD = _Heard()


def _without_merges() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # words begin with "▁", so spaces come back
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


class CtcTokenizer:
    """BPE over the characters of normalised text, kept in a ``tokenizer.json``. Build one with ``train`` or ``load``.

    Not byte-level: a unit should be a sound. The alphabet is that of the training texts; other characters have no unit
    and are left out of a target (``unknown`` names them).

    Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
    """

    def __init__(self, serialized: str):
        """``serialized``: the text of a ``tokenizer.json``."""
        self.serialized = serialized
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        self._alphabet = {character for token in self._tokenizer.get_vocab() for character in token} | {" "}

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> Self:
        """Learn merges from ``texts``, read once as a stream.

        Args:
            vocab_size: upper bound; few texts give fewer merges.

        Raises:
            UserError: the alphabet alone is larger.
        """
        tokenizer = _without_merges()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
        tokenizer.train_from_iterator((normalise_text(text) for text in texts), trainer)
        trained = cls(tokenizer.to_str())
        if trained.vocab_size > vocab_size:
            raise UserError(
                f'key "ctc_vocab_size": expected at least {trained.vocab_size}, the characters of the training texts, '
                f"found {vocab_size}"
            )
        return trained

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """
        Raises:
            UserError: the file is missing, damaged, or not a tokenizer of this kind.
        """
        serialized = read_text(path, "tokenizer")
        try:
            check_ids(serialized)
            tokenizer = cls(serialized)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: damaged tokenizer: {' '.join(str(error).split())}") from error
        if (reason := difference(tokenizer._tokenizer, _without_merges())) is not None:
            raise UserError(f"{path}: expected a tokenizer as train_audio_enc.py writes it: {reason}")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write ``path`` whole or not at all."""
        serialized = self._tokenizer.to_str(pretty=True).encode()
        replace_file(Path(path), lambda file: file.write(serialized))

    @property
    def units(self) -> list[str]:
        """The text of each token, in order of the ids; a token that begins a word begins with a space."""
        return [self._tokenizer.id_to_token(i).replace("▁", " ") for i in range(self.vocab_size)]

    @property
    def vocab_size(self) -> int:
        """Actual number of tokens, without the blank."""
        return self._tokenizer.get_vocab_size()

    @property
    def sha256(self) -> str:
        """SHA-256 of the loaded file."""
        return hashlib.sha256(self.serialized.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's canonical JSON."""
        canonical = json.dumps(json.loads(self._tokenizer.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ``normalise_text(text)``."""
        return self._tokenizer.encode(normalise_text(text)).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def unknown(self, text: str) -> set[str]:
        """Characters of ``normalise_text(text)`` that no token has."""
        return set(normalise_text(text)) - self._alphabet


def frames_needed(ids: Sequence[int]) -> int:
    """Smallest number of frames for ``ids``: one per id, and a blank between two equal ones."""
    return len(ids) + sum(one == next_one for one, next_one in pairwise(ids))


# ---------------------------------------------------------------------------------------------------------------
# Loss


def ctc_nll(logits: Tensor, frames: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Negative log-likelihood of each target, in float32, infinite where a target does not fit its frames.

    On a GPU this is our own forward-backward algorithm: torch's sums the gradients of a token's occurrences in an order
    that differs from run to run, and waits for the device to read the lengths; cuDNN's requires equal lengths.

    Args:
        logits: (B, U, V).
        frames: (B,) valid frames of each utterance.
        targets: (B, L) token ids; ids beyond ``target_lengths`` (B,) are ignored.

    Returns:
        (B,) in nats.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    blank = logits.shape[-1] - 1
    if logits.is_cuda:
        return _ForwardBackward.apply(log_probs, frames, targets, target_lengths)
    return F.ctc_loss(log_probs.transpose(0, 1), targets, frames, target_lengths, blank, reduction="none")


class _ForwardBackward(torch.autograd.Function):
    """Graves et al. 2006, section 4.1. No operation waits for the device or sums in an undefined order.

    The backward variables are the forward variables of the same problem in reverse, so one pass over the frames
    computes both. The gradient with respect to a log-probability is then the expected number of its uses.
    """

    @staticmethod
    def forward(ctx, log_probs: Tensor, frames: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
        B, U, V = log_probs.shape
        states = log_probs.new_full((B, 2 * targets.shape[1] + 1), V - 1, dtype=torch.int64)  # (B, S)
        states[:, 1::2] = targets.clamp(min=0)
        S, counts = states.shape[1], 2 * target_lengths + 1
        emissions = log_probs.gather(2, states[:, None, :].expand(B, U, S))  # (B, U, S)

        # positions counted from the end; those beyond it are clamped, and masked below
        time_back = (frames[:, None] - 1 - torch.arange(U, device=states.device)).clamp(min=0)  # (B, U)
        state_back = (counts[:, None] - 1 - torch.arange(S, device=states.device)).clamp(min=0)  # (B, S)
        states_reversed = states.gather(1, state_back)
        reversed_emissions = _reindex(emissions, time_back, state_back)

        both = _forward_variables(torch.cat((emissions, reversed_emissions)), torch.cat((states, states_reversed)))
        alpha, beta = both[:B], _reindex(both[B:], time_back, state_back)  # (B, U, S), each with the frame's emission
        inside = torch.arange(S, device=states.device) < counts[:, None]
        inside = inside[:, None, :] & (torch.arange(U, device=states.device) < frames[:, None])[:, :, None]
        through = (alpha + beta - emissions).masked_fill(~inside, -math.inf)  # log-likelihood of all paths through it
        log_likelihood = through[:, 0].logsumexp(dim=1)  # the same at every frame
        uses = (through - log_likelihood[:, None, None]).exp()
        uses = uses.masked_fill(~torch.isfinite(log_likelihood)[:, None, None], math.nan)
        # a matrix product, not a scatter, which would sum in no fixed order
        ctx.save_for_backward(uses @ F.one_hot(states, V).to(uses.dtype))
        return -log_likelihood

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (uses,) = ctx.saved_tensors
        return -uses * gradient[:, None, None], None, None, None


def _reindex(x: Tensor, time: Tensor, state: Tensor) -> Tensor:
    """x (B, U, S) at frames ``time`` (B, U) and states ``state`` (B, S)."""
    B, U, S = x.shape
    return x.gather(1, time[:, :, None].expand(B, U, S)).gather(2, state[:, None, :].expand(B, U, S))


def _forward_variables(emissions: Tensor, states: Tensor) -> Tensor:
    """Log-likelihood (B, U, S) of all paths to a state at a frame, that frame's emission included.

    A path starts in one of the first two states; it stays, moves on by one, or by two if that skips a blank between
    different tokens. A frame takes four kernels: before the states stand two that no path reaches, so that the states
    one and two before are views.
    """
    B, U, S = emissions.shape
    skip = torch.full_like(emissions[:, 0], -math.inf)  # (B, S) 0 where a path may move on by two
    skip[:, 3::2].masked_fill_(states[:, 3::2] != states[:, 1:-2:2], 0.0)
    alphas = emissions.new_full((U, B, 2 + S), -math.inf)
    alphas[0, :, 2:4] = emissions[:, 0, :2]
    emissions = emissions.transpose(0, 1)  # (U, B, S)
    for frame in range(1, U):
        before = alphas[frame - 1]
        near = torch.logaddexp(before[:, 2:], before[:, 1:-1])
        near = torch.logaddexp(near, before[:, :-2] + skip)
        torch.add(near, emissions[frame], out=alphas[frame, :, 2:])
    return alphas[:, :, 2:].transpose(0, 1)


# ---------------------------------------------------------------------------------------------------------------
# Decoding


def collapse(path: Sequence[int], blank: int) -> list[int]:
    """The token ids of a ``path`` of one unit per frame: without repeats, then without blanks."""
    return [token for token, _ in groupby(path) if token != blank]
