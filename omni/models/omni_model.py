"""The omni model: a Thinker for sequences of text, recordings and images, and a talker that speaks its answers.

The encoders of stages B and C turn each recording and image into features, a projection maps these to the Thinker's
width, and they replace the embeddings of ``<|audio|>`` and ``<|image|>`` tokens, between a start and an end token.
"""

# B samples, T positions, D the Thinker's width, V vocabulary; I images, P positions and N patches per image, K an
# encoder's width; A recordings, F mel frames, M mel channels, U encoder frames; S spoken answers

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.common.numerics import true_float32
from omni.data.images import normalise
from omni.data.tokenizer import IGNORE_INDEX, SPECIAL_TOKENS
from omni.models.audio_encoder import AudioEncoder, frame_mask
from omni.models.ctc import ctc_nll
from omni.models.omni_architecture import OmniArchitecture
from omni.models.ops import round_up, rows_at
from omni.models.packing import Packing
from omni.models.picture_text import noisy_or_log_absent
from omni.models.projector import Projection
from omni.models.talker import Talker, talker_loss
from omni.models.thinker import Thinker
from omni.models.vision_encoder import ViT

COSINE_SCALE = 20.0  # cosine -> logit: one of thousands of tokens can still have a probability near 1


class Sequences(NamedTuple):
    """The Thinker's input: B rows, each without the dropped positions."""

    embeds: Tensor  # (B, T, D)
    targets: Tensor  # (B, T)
    dropped: Tensor  # (B,) number of positions dropped from each row
    audio: Tensor | None  # (A, U, D), the recordings with all of their positions
    target_at: Tensor | None  # (N,), see ``Collator``; None on a CPU, which finds the targets by itself


class Losses(NamedTuple):
    """Each () float32; the last two are sums, divided by the number of targets of the first."""

    nats: Tensor  # mean cross-entropy of the answers' tokens
    balance: Tensor  # the experts' load-balancing loss
    ctc_alignment_loss: Tensor  # CTC loss of recordings with their transcripts
    talker_loss: Tensor  # the talker's loss of spoken answers


class OmniModel(nn.Module):
    """Thinker, encoders, projections and talker. A part that no task needs is None, and not in the state dict.

    Liu et al. 2023, "Visual Instruction Tuning" (LLaVA), for images and recordings alike. Departures: neighbouring
    patches (``image_stack`` x ``image_stack``) may share a position, concatenated; audio frames whose CTC token is the
    blank or a repeat may be dropped (``drop_blanks``, as in Gaido et al. 2021, "CTC-based Compression for Direct Speech
    Translation"), after which a recording is about as long as its text.

    Args:
        freeze_encoders: the encoders are not trained.
        one_length: all batches have the same length, as a compiled Thinker needs.
        use_flash: fused attention; ``audio_flash``: in the audio encoder, too.
    """

    def __init__(
        self,
        architecture: OmniArchitecture,
        *,
        freeze_encoders: bool = True,
        one_length: bool = False,
        use_flash: bool = True,
        audio_flash: bool = True,
    ):
        super().__init__()
        self.architecture, self.frozen, self.one_length = architecture, freeze_encoders, one_length
        self.audio_id, self.drop_blanks = SPECIAL_TOKENS.index("<|audio|>"), architecture.drop_blanks
        arch, d_ff = architecture.thinker, architecture.proj_d_ff
        self.thinker = Thinker(arch, use_flash=use_flash)
        self.audio_encoder = self.proj_a = self.vision_encoder = self.proj_v = self.talker = None
        if audio := architecture.audio_encoder:
            self.audio_encoder = AudioEncoder(audio, use_flash=use_flash and audio_flash)
            self.proj_a = Projection(audio.d_model, d_ff, arch.d_model, units=audio.ctc_vocab_size + 1)
            self.audio_encoder.ctc_head.requires_grad_(False)  # it decides which frames are dropped
        if vision := architecture.vision_encoder:
            self.vision_encoder = ViT(vision, use_flash=use_flash)
            stacked, side = vision.d_model * architecture.image_stack**2, architecture.image_side
            self.proj_v = Projection(stacked, d_ff, arch.d_model, architecture.n_words, vision.d_model, side)
        if self.frozen:
            for encoder in self.encoders:
                encoder.requires_grad_(False)
        if talker := architecture.talker:
            self.talker = Talker(talker, use_flash=use_flash).requires_grad_(False)
            self.duration_weight = architecture.duration_weight
            self.talker.thinker_proj.requires_grad_(True)

    @property
    def encoders(self) -> list[nn.Module]:
        return [encoder for encoder in (self.audio_encoder, self.vision_encoder) if encoder is not None]

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            for encoder in self.encoders:
                encoder.eval()  # no dropout in frozen modules
        if self.talker is not None:
            self.talker.eval()
        return self

    def forward(self, batch: dict) -> Losses:
        """Losses of a batch of a ``Collator``."""
        embeds, targets, dropped, audio, target_at = self.embed(batch)
        nats, balance = self._answer_losses(embeds, targets, target_at, batch["sizes"] - dropped)
        ctc_alignment_loss, count = nats.new_zeros(()), (batch["targets"] != IGNORE_INDEX).sum()
        if audio is not None and batch["transcript_ids"].shape[1]:  # recordings, some with a known text
            ctc_alignment_loss = self._ctc_alignment_loss(audio, batch) / count
        speech_loss = nats.new_zeros(())
        if "speech_rows" in batch:
            speech = self.speech(batch, embeds)
            loss, _ = talker_loss(self.talker, speech, frame_dropout=0.0, duration_weight=self.duration_weight)
            speech_loss = loss * speech["n_targets"] / count
        elif self.talker is not None and self.training:
            speech_loss = 0.0 * self.talker.thinker_proj.weight.sum()  # as in ``embed``: a gradient in every step
        return Losses(nats, balance, ctc_alignment_loss, speech_loss)

    def speech(self, batch: dict, embeds: Tensor) -> dict:
        """The talker's input and targets, as from ``collate_utterances``, with ``thinker_states``: the Thinker's hidden
        states over ``embeds`` (B, T, D) at the token of each byte of a spoken answer. No gradient of the talker's loss
        reaches the Thinker. Spoken answers follow texts alone, so no position before them is dropped."""
        rows, at = batch["speech_rows"], batch["speech_at"]
        with torch.no_grad():
            hidden = self.thinker.hidden_states(inputs_embeds=embeds[rows])  # (S, T, D)
        states = hidden.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
        speech = {key.removeprefix("speech_"): value for key, value in batch.items() if key.startswith("speech_")}
        codes = speech["lengths"].sum() * self.talker.codebooks + len(rows)
        return speech | {"thinker_states": states.masked_fill((at < 0)[..., None], 0.0), "n_targets": codes}

    def _answer_losses(
        self, embeds: Tensor, targets: Tensor, target_at: Tensor | None, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The first two losses of ``forward``. A dialogue is several times as long as a recording, so the rows go
        through the Thinker packed."""
        if not self.ragged:
            return self.thinker(inputs_embeds=embeds, targets=targets, target_at=target_at)
        packing = Packing(lengths, embeds.shape[1])
        embeds, targets = packing.pack(embeds), packing.pack(targets, padding=IGNORE_INDEX)
        return self.thinker(inputs_embeds=embeds, targets=targets, packing=packing)

    @property
    def ragged(self) -> bool:
        """Whether a batch may be cut to its lengths: a GPU would have to wait for them, and a compiled Thinker needs a
        single length."""
        return self.device.type == "cpu" and not self.one_length

    def embed(self, batch: dict) -> Sequences:
        """The Thinker's input for a batch of a ``Collator``."""
        x = self.thinker.embed_tokens(batch["tokens"])  # (B, T, D)
        rows, audio, new = x.flatten(0, 1), None, None  # (B * T, D)
        if "images" in batch or "patches" in batch:
            rows = rows.index_copy(0, batch["image_at"], self._images(batch).flatten(0, 1).to(rows.dtype))
        elif self.vision_encoder is not None and self.training:
            # Each parameter has a gradient in every step, perhaps zero: DDP waits for all of them, and the optimizer's
            # averages must not depend on how a step is split into micro-batches.
            rows = rows + 0.0 * self._images(self._blank(x)).sum().to(rows.dtype)
        if "features" in batch or "frames" in batch:
            audio, new = self._recordings(batch)
            found = audio.flatten(0, 1).index_select(0, batch["audio_from"])
            rows = rows.index_copy(0, batch["audio_at"], found.to(rows.dtype))
        elif self.audio_encoder is not None and self.training:
            rows = rows + 0.0 * self._recordings(self._blank(x))[0].sum().to(rows.dtype)
        x, targets = rows.view_as(x), batch["targets"]
        target_at = None if self.device.type == "cpu" else batch["target_at"]
        if new is None or not self.drop_blanks:
            return Sequences(x, targets, torch.zeros_like(batch["sizes"]), audio, target_at)
        kept = torch.ones(targets.numel(), dtype=torch.bool, device=x.device)
        kept[batch["audio_at"]] = new.flatten()[batch["audio_from"]]
        kept = kept.view_as(targets)
        # dropped positions move to the end as padding
        order, dropped = torch.argsort(~kept, dim=1, stable=True), (~kept).sum(dim=1)
        if self.ragged:
            order = order[:, : round_up(int((batch["sizes"] - dropped).max()))]
        targets = targets.gather(1, order)  # recordings have no targets
        if target_at is not None:
            target_at = moved(target_at, kept)
        return Sequences(rows_at(x, order), targets, dropped, audio, target_at)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (I, 3, H, W) uint8 -> states of their patches (I, N, K), row by row, without CLS."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.vision_encoder(normalise(images))[:, 1:]

    def encode_audio(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Recordings (A, F, M) of ``lengths`` (A,) -> frames (A, U, K), zero if padding, and their numbers (A,)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            frames, counts = self.audio_encoder.encode(features, lengths)
        return frames * frame_mask(counts, frames.shape[1])[:, :, None], counts

    def _images(self, batch: dict) -> Tensor:
        """A batch's images in the Thinker's width, (I, P, D)."""
        patches = batch["patches"].float() if "patches" in batch else self.encode_images(batch["images"])  # (I, N, K)
        s, side = self.architecture.image_stack, self.architecture.image_side
        # (I, rows, columns, s, s, K), then (I, P, s * s, K)
        grid = patches.unflatten(1, (side, s, side, s)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.proj_v.word_head is None:
            return self.proj_v(grid.flatten(2))
        log_absent = noisy_or_log_absent(self.proj_v.word_head(grid.detach()), dim=2)  # in all of s * s patches
        return self.proj_v(grid.flatten(2), -torch.expm1(log_absent))

    def _recordings(self, batch: dict) -> tuple[Tensor, Tensor]:
        """A batch's recordings in the Thinker's width, (A, U, D), padded; and (A, U), true where the CTC head's
        likeliest token is neither the blank nor that of the frame before."""
        if "frames" in batch:
            frames = batch["frames"].float()  # (A, U, K)
        else:
            frames, _ = self.encode_audio(batch["features"], batch["lengths"])
        logits, blank = self.audio_encoder.ctc_head(frames.detach()), self.architecture.audio_encoder.ctc_vocab_size
        # not argmax, which takes six times as long in bfloat16 on a CPU
        token, probs = logits.max(dim=-1).indices, logits.float().softmax(dim=-1)
        return self.proj_a(frames, probs), (token != blank) & (token != F.pad(token, (1, -1), value=blank))

    def _ctc_alignment_loss(self, audio: Tensor, batch: dict) -> Tensor:
        """The CTC loss that aligns audio positions (A, U, D) with the tokens of their transcripts: () float32, a sum.

        The units are the Thinker's tokens, the logits are scaled cosines with their embeddings, which get no gradient,
        and the blank is ``<|audio|>`` (CTC: Graves et al. 2006). So a recording's vectors soon resemble its text's.
        """
        table, blank = F.normalize(self.thinker.embed_tokens.weight.detach().float(), dim=-1), self.audio_id  # (V, D)
        with true_float32(audio.device):  # in lower precision, close cosines would be equal
            logits = COSINE_SCALE * F.normalize(audio.float(), dim=-1) @ table.T  # (A, U, V)
        logits = torch.cat((logits[..., :blank], logits[..., blank + 1 :], logits[..., blank, None]), dim=-1)
        units = batch["transcript_ids"] - (batch["transcript_ids"] > blank).long()
        nll = ctc_nll(logits, batch["n_frames"], units, batch["transcript_lengths"])
        return torch.where(batch["transcript_lengths"] > 0, nll, 0.0).sum()

    def _blank(self, like: Tensor) -> dict:
        """A black image and a short silence that take no position."""
        blank = {}
        if self.vision_encoder is not None:
            height, width = self.vision_encoder.img_size
            blank["images"] = torch.zeros(1, 3, height, width, dtype=torch.uint8, device=like.device)
        if self.audio_encoder is not None:
            frames = self.architecture.audio_encoder.downsample_time
            blank["features"] = like.new_zeros(1, frames, self.architecture.audio_encoder.mel_bins)
            blank["lengths"] = torch.full((1,), frames, device=like.device)
        return blank

    # Answering ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.thinker.embed_tokens.weight.device

    @torch.no_grad()
    def embed_prompt(self, batch: dict) -> Tensor:
        """The Thinker's input for a batch of one sequence, without padding: (1, T, D)."""
        batch = {key: value.to(self.device) for key, value in batch.items() if isinstance(value, Tensor)}
        sequences = self.embed(batch)
        return sequences.embeds[:, : int(batch["sizes"] - sequences.dropped)]


def moved(at: Tensor, kept: Tensor) -> Tensor:
    """Indices ``at`` (N,) among B * T positions, or -1, after all positions of each row that are not ``kept`` (B, T)
    have moved to its end. Kept ones keep their order."""
    B, T = kept.shape
    place = kept.cumsum(dim=1) - 1 + T * torch.arange(B, device=kept.device)[:, None]  # (B, T)
    return torch.where(at < 0, at, place.flatten().index_select(0, at.clamp(min=0)))
