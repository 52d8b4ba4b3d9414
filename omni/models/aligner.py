"""The aligner learns from texts and recordings alone which byte of a text is spoken when: the talker's durations.

Two small encoders turn the text's bytes and the speech into vectors, whose product scores a byte at an alignment frame.
Training maximises the likelihood of the text over all monotonic alignments with the recording ("forward-sum", Badlani
et al. 2021, "One TTS Alignment To Rule Them All"); the likeliest alignment gives the durations.
"""

# B utterances, T mel frames, M mel channels, S alignment frames of speech, L text bytes, W model width

import numpy as np
import torch
from torch import Tensor, nn

from omni.common.errors import BadRow
from omni.common.spoken import Language, spoken_form
from omni.common.text import audible, single_blanks
from omni.models.ctc import ctc_nll
from omni.models.layers import ConvNeXtBlock
from omni.models.speech_architectures import AlignerArchitecture

TEXT_END = 256  # the symbol after the last byte of a text
TEXT_SYMBOLS = 257
_KERNEL = 5
_BLANK = -1.0  # score of the blank between two bytes, in training; as in Badlani et al.
_PRIOR_STD = 0.1  # standard deviation of a byte's distance from the diagonal, as a share of the whole
_EXCLUDED = -1e4  # score of a byte beyond the text's end


def text_symbols(text: str, language: Language | None = None) -> list[int]:
    """The symbols of a text: the UTF-8 bytes of the ``spoken_form`` of its ``audible`` characters, with single blanks,
    and ``TEXT_END``.

    Args:
        language: the architecture's ``text_language``.
    """
    return [*" ".join(spoken_form(single_blanks(audible(text)), language).split()).encode(), TEXT_END]


def check_fits(symbols: list[int], alignment_frames: int, seconds: float) -> None:
    """
    Raises:
        BadRow: there are more bytes than alignment frames.
    """
    if alignment_frames < len(symbols):
        raise BadRow(
            f"expected a text of at most {alignment_frames - 1} bytes for {seconds:.2f} s, found {len(symbols) - 1}"
        )


class Aligner(nn.Module):
    """Text and speech -> scores of each byte in each alignment frame, see ``SpeechFrames``."""

    def __init__(self, architecture: AlignerArchitecture):
        super().__init__()
        self.architecture = arch = architecture
        width, layers = arch.aligner_d_model, arch.aligner_layers
        self.hop = arch.frames_per_code // arch.alignment_frames_per_code  # mel frames in an alignment frame
        self.register_buffer("mel_mean", torch.zeros(arch.n_mels))
        self.register_buffer("mel_std", torch.ones(arch.n_mels))
        self.embed_text = nn.Embedding(TEXT_SYMBOLS, width)
        self.text_layers = nn.ModuleList(ConvNeXtBlock(width, 2 * width, _KERNEL) for _ in range(layers))
        self.patch_in = nn.Linear(self.hop * arch.n_mels, width)
        self.speech_layers = nn.ModuleList(ConvNeXtBlock(width, 2 * width, _KERNEL) for _ in range(layers))
        self.key_proj, self.query_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, symbols: Tensor, text_lengths: Tensor, log_mels: Tensor, lengths: Tensor) -> Tensor:
        """
        Args:
            symbols: (B, L) of ``text_symbols``, valid up to ``text_lengths`` (B,).
            log_mels: (B, T, M), T whole codes, valid up to ``lengths`` (B,) frames.

        Returns:
            Scores (B, S, L) in float32; their softmax over the bytes gives probabilities.
        """
        device = symbols.device
        read = torch.arange(symbols.shape[1], device=device) < text_lengths[:, None]  # (B, L)
        keys = self.embed_text(symbols)
        for layer in self.text_layers:
            keys = layer(keys, read[..., None].to(keys.dtype))
        spoken = torch.arange(log_mels.shape[1], device=device) < lengths[:, None]  # (B, T)
        normalised = ((log_mels - self.mel_mean) / self.mel_std) * spoken[..., None]
        alignment_frames = self.alignment_frames(lengths)
        queries = self.patch_in(normalised.unflatten(1, (-1, self.hop)).flatten(2))  # (B, S, W)
        speaking = torch.arange(queries.shape[1], device=device) < alignment_frames[:, None]  # (B, S)
        for layer in self.speech_layers:
            queries = layer(queries, speaking[..., None].to(queries.dtype))
        scores = self.query_proj(queries) @ self.key_proj(keys).transpose(1, 2) / keys.shape[-1] ** 0.5
        scores = scores.float() + diagonal_prior(alignment_frames, text_lengths, *scores.shape[1:])
        return scores.masked_fill(~read[:, None], _EXCLUDED)

    @torch.no_grad()
    def align_one(self, symbols: list[int], log_mels: Tensor) -> Tensor:
        """The durations (L,) in alignment frames of one text's ``text_symbols``, spoken in log-mels (T, M).

        Raises:
            BadRow: there are more bytes than alignment frames.
        """
        device, T = self.mel_mean.device, len(log_mels)
        lengths, text_lengths = torch.tensor([T], device=device), torch.tensor([len(symbols)], device=device)
        alignment_frames = self.alignment_frames(lengths)
        check_fits(symbols, int(alignment_frames), T * self.architecture.frame_hop / self.architecture.sample_rate)
        log_mels = nn.functional.pad(log_mels.to(device), (0, 0, 0, -T % self.architecture.frames_per_code))
        scores = self(torch.tensor([symbols], device=device), text_lengths, log_mels[None], lengths)
        return torch.from_numpy(likeliest_durations(scores, alignment_frames, text_lengths)[0].astype(np.int64))

    def alignment_frames(self, lengths: Tensor) -> Tensor:
        """Number of alignment frames of recordings of ``lengths`` (B,) frames, rounded up to whole codes."""
        per_code = self.architecture.frames_per_code
        return (lengths + per_code - 1) // per_code * self.architecture.alignment_frames_per_code


def diagonal_prior(alignment_frames: Tensor, text_lengths: Tensor, S: int, L: int) -> Tensor:
    """Log-prior (B, S, L) for a steady pace of reading, with which the aligner learns sooner.

    A Gaussian about the diagonal, instead of the beta-binomial of Badlani et al.
    """
    times = (torch.arange(S, device=alignment_frames.device) + 0.5) / alignment_frames[:, None]  # (B, S)
    places = (torch.arange(L, device=alignment_frames.device) + 0.5) / text_lengths[:, None]  # (B, L)
    return -((times[:, :, None] - places[:, None]) ** 2) / (2 * _PRIOR_STD**2)


def aligner_nats(model: nn.Module, alignment_frames: Tensor, batch: dict) -> Tensor:
    """(B,) negative log-likelihood of each text over all monotonic alignments with its recording."""
    scores = model(batch["symbols"], batch["text_lengths"], batch["log_mels"], batch["lengths"])
    B, S, L = scores.shape
    scores = torch.cat((scores, scores.new_full((B, S, 1), _BLANK)), dim=-1)
    # each byte of a text is a class of its own, so this sums over the alignments of this text only
    targets = torch.arange(L, device=scores.device).expand(B, -1)
    return ctc_nll(scores, alignment_frames, targets, batch["text_lengths"])


def likeliest_durations(scores: Tensor, alignment_frames: Tensor, text_lengths: Tensor) -> list[np.ndarray]:
    """Number of alignment frames of each byte, at least one, in the likeliest alignment.

    The search is that of Kim et al. 2020, "Glow-TTS" (monotonic alignment search).

    Args:
        scores: (B, S, L) of ``Aligner``; every text has no more bytes than its recording has alignment frames.

    Returns:
        For each utterance (number of bytes,) uint16, whose sum is its number of alignment frames.
    """
    log_probs = scores.log_softmax(dim=-1).cpu().numpy()
    alignment_frames, text_lengths = alignment_frames.cpu().numpy(), text_lengths.cpu().numpy()
    B, S, L = log_probs.shape
    best = np.full((B, L), -np.inf, np.float32)  # log-probability of the best alignment up to this byte
    best[:, 0] = log_probs[:, 0, 0]
    moved = np.zeros((B, S, L), bool)  # whether the best alignment comes from the byte before
    nowhere = np.full((B, 1), -np.inf, np.float32)
    for frame in range(1, S):
        from_before = np.concatenate((nowhere, best[:, :-1]), axis=1)
        moved[:, frame] = from_before > best
        best = np.maximum(best, from_before) + log_probs[:, frame]
    durations, rows, place = np.zeros((B, L), np.uint16), np.arange(B), text_lengths - 1
    for frame in range(S - 1, -1, -1):
        inside = frame < alignment_frames
        durations[rows, place] += inside
        place = place - (inside & moved[rows, frame, place])
    return [one[:length] for one, length in zip(durations, text_lengths, strict=True)]
