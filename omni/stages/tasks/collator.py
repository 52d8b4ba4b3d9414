"""Sequences of unequal length as one batch, padded once."""

# B samples, T positions; I images, P positions of one, N patches; A recordings, F mel frames, M mel channels, U encoder
# frames, K an encoder's width, R positions of all recordings of a batch; S spoken answers, L symbols of one

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omni.data.tokenizer import IGNORE_INDEX
from omni.models.audio_encoder import output_frames
from omni.models.omni_architecture import OmniArchitecture
from omni.models.ops import round_up
from omni.stages.talker import Utterance, collate_utterances


@dataclass
class Encoded:
    """One conversation as a sequence. ``images`` and ``recordings`` have the position of their first placeholder;
    ``transcript_ids`` are the tokens of each recording's text, [] if unknown."""

    ids: list[int]
    targets: list[int]  # the next token at each position; -100 outside the assistant's answers
    images: list[tuple[int, Tensor]] = field(default_factory=list)  # (3, H, W) uint8; if cached, (N, K) patches
    recordings: list[tuple[int, Tensor]] = field(default_factory=list)  # (F, M) features; if cached, (U, K) frames
    transcript_ids: list[list[int]] = field(default_factory=list)
    prompt: int = 0  # positions up to and with the last <|assistant|>, which its answer follows
    utterance: Utterance | None = None  # the codes of its last answer, if that is spoken
    speech_token_index: list[int] = field(default_factory=list)  # the position of each byte that is spoken; -1: the end


class Collator:
    """Callable: at least one ``Encoded`` -> a batch.

    Args:
        cached: images and recordings come as cached features.
        one_length: pad every batch to ``ctx_len``.

    Returns:
        ``tokens`` and ``targets`` (B, T), padded after their ends; ``n_targets``; ``target_at`` (N,), the indices of
        the targets in the flattened batch, filled up with -1; ``prompts`` (B,); ``sizes`` (B,), the positions that are
        no padding.

        With images: ``images`` (I, 3, H, W) uint8, or cached ``patches`` (I, N, K); ``image_at`` (I * P,), the indices
        of their positions in the flattened batch.

        With recordings: ``features`` (A, F, M), zero beyond ``lengths`` (A,), or cached ``frames`` (A, U, K), zero
        beyond their number; ``n_frames`` (A,), that number; ``audio_at`` (R,), indices as above, and ``audio_from``
        (R,), the frames' indices among all A * U; ``transcript_ids`` (A, L) and ``transcript_lengths`` (A,).

        With spoken answers: the result of ``collate_utterances`` as ``speech_symbols`` and so on; ``speech_rows`` (S,),
        their samples, and ``speech_at`` (S, L), see ``Encoded.speech_token_index``.
    """

    def __init__(self, eos_id: int, architecture: OmniArchitecture, *, cached: bool, one_length: bool) -> None:
        self.eos_id, self.architecture, self.cached = eos_id, architecture, cached
        self.ctx_len, self.one_length = architecture.thinker.ctx_len, one_length

    def __call__(self, samples: list[Encoded]) -> dict:
        longest = max(len(sample.ids) for sample in samples)
        T = self.ctx_len if self.one_length else min(round_up(longest), self.ctx_len)
        tokens = torch.full((len(samples), T), self.eos_id)
        targets = torch.full((len(samples), T), IGNORE_INDEX)
        for row, sample in enumerate(samples):
            tokens[row, : len(sample.ids)] = torch.tensor(sample.ids)
            targets[row, : len(sample.ids)] = torch.tensor(sample.targets)
        batch = {
            "tokens": tokens,
            "targets": targets,
            "prompts": torch.tensor([sample.prompt for sample in samples]),
            "sizes": torch.tensor([len(sample.ids) for sample in samples]),
            "target_at": self._target_at(targets.flatten()),
            "n_targets": int((targets != IGNORE_INDEX).sum()),
        }
        if images := [(row * T + at, image) for row, sample in enumerate(samples) for at, image in sample.images]:
            batch |= self._images(images)
        if any(sample.utterance is not None for sample in samples):
            batch |= self._spoken_answers(samples)
        if found := [(row * T + at, audio) for row, sample in enumerate(samples) for at, audio in sample.recordings]:
            batch |= self._recordings(found, [ids for sample in samples for ids in sample.transcript_ids])
        return batch

    def _target_at(self, targets: Tensor) -> Tensor:
        """The indices of the targets among (B * T,), filled up to a multiple of 256; for a compiled model, which knows
        few lengths, to an eighth, a quarter, half or all of the positions."""
        at = (targets != IGNORE_INDEX).nonzero().flatten()
        length = round_up(len(at), 256)
        if self.one_length:
            length = next(size for part in (8, 4, 2, 1) if (size := -(-len(targets) // part)) >= len(at))
        return F.pad(at, (0, length - len(at)), value=-1)

    def _images(self, images: list[tuple[int, Tensor]]) -> dict:
        starts, positions = torch.tensor([at for at, _ in images]), self.architecture.image_side**2
        return {
            "patches" if self.cached else "images": torch.stack([image for _, image in images]),
            "image_at": (starts[:, None] + torch.arange(positions)).flatten(),
        }

    def _recordings(self, recordings: list[tuple[int, Tensor]], transcripts: list[list[int]]) -> dict:
        starts, found = [at for at, _ in recordings], [one for _, one in recordings]
        if self.cached:
            counts = [len(frames) for frames in found]
            width = round_up(max(counts))
            batch = {"frames": torch.stack([F.pad(frames, (0, 0, 0, width - len(frames))) for frames in found])}
        else:
            batch, step = self.features(found), self.architecture.audio_encoder.downsample_time
            counts = [output_frames(len(one), step) for one in found]
            width = batch["features"].shape[1] // step
        texts = [torch.tensor(ids, dtype=torch.int64) for ids in transcripts]
        return batch | {
            "n_frames": torch.tensor(counts),
            "audio_at": torch.cat([at + torch.arange(n) for at, n in zip(starts, counts, strict=True)]),
            "audio_from": torch.cat([index * width + torch.arange(n) for index, n in enumerate(counts)]),
            "transcript_ids": pad_sequence(texts, batch_first=True),
            "transcript_lengths": torch.tensor([len(text) for text in texts]),
        }

    def features(self, recordings: list[Tensor]) -> dict:
        """Log-mels (F, M) as ``features`` (A, F, M), zero beyond ``lengths`` (A,); F is a multiple of the mel frames
        that the encoder makes one frame of."""
        arch, longest = self.architecture.audio_encoder, max(len(one) for one in recordings)
        features = torch.zeros(
            len(recordings), output_frames(longest, arch.downsample_time) * arch.downsample_time, arch.mel_bins
        )
        for index, one in enumerate(recordings):
            features[index, : len(one)] = one
        return {"features": features, "lengths": torch.tensor([len(one) for one in recordings])}

    def _spoken_answers(self, samples: list[Encoded]) -> dict:
        rows = [row for row, sample in enumerate(samples) if sample.utterance is not None]
        utterances = collate_utterances([samples[row].utterance for row in rows], self.architecture.talker, step=8)
        at = [torch.tensor(samples[row].speech_token_index) for row in rows]
        padded = pad_sequence(at, batch_first=True, padding_value=-1)
        return {f"speech_{key}": value for key, value in utterances.items() if isinstance(value, Tensor)} | {
            "speech_rows": torch.tensor(rows),
            "speech_at": F.pad(padded, (0, utterances["symbols"].shape[1] - padded.shape[1]), value=-1),
        }
