"""The talker: text to speech, as codes of the speech codec, frame after frame.

It predicts a duration for each UTF-8 byte of the text. A length regulator then repeats the bytes' vectors over the
frames in which they are spoken. A causal decoder predicts the codes of each frame from the frame's text and from the
frames before. In stage E, the Thinker's hidden state of a byte's token may be added to the byte's vector. A talker of
several voices also reads a reference, the codes of a recording, and speaks in its voice.
"""

# B utterances, L text bytes, T frames (one code of each codebook), D model width, K head width
# Q codebooks, V codes in each, W width of the depth decoder, P alignment frames in a frame (see omni.models.aligner)
# N codes in time of a reference, S named voices

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.data.tokenizer import IGNORE_INDEX
from omni.models.aligner import TEXT_SYMBOLS
from omni.models.decoding import FrameWeights, ReadsOneByOne, blocks_step, write_frame
from omni.models.layers import ConvNeXtBlock, KVCache, RMSNorm, SwiGLU, rope_tables
from omni.models.ops import rows_at
from omni.models.speech_architectures import TalkerArchitecture
from omni.models.thinker import INIT_STD, Block
from omni.models.voices import VOICE_CODES, VoiceEncoder

_KERNEL = 7  # bytes that a text layer covers
_MAX_LOG_DURATION = 6.0  # no byte lasts longer than 400 alignment frames
_ROPE_FRAMES = 2048  # whose rotary tables are kept: 2.7 minutes at 80 ms
_OVERTIME_S = 1.0  # maximum duration of an utterance after the end of its text


class DepthDecoder(nn.Module):
    """Within one frame: the code of each codebook, given the frame's state and the codes before it.

    A residual quantiser adds its vectors up, so a sum of embeddings represents the codes chosen so far, without
    attention; in training all codebooks of all frames are one batch. It replaces the "depth transformer" of Yang et al.
    2023, "UniAudio", and Défossez et al. 2024, "Moshi".
    """

    def __init__(self, arch: TalkerArchitecture):
        super().__init__()
        width, codebooks, codebook_size = arch.depth_d_model, arch.codebooks, arch.codebook_size
        self.codebooks, self.codebook_size = codebooks, codebook_size
        self.state_proj = nn.Linear(arch.d_model, width, bias=False)
        self.embed_codes = nn.Embedding(codebooks * codebook_size, width)
        self.embed_levels = nn.Embedding(codebooks, width)
        self.embed_levels.no_decay = ("weight",)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(arch.depth_layers))
        self.mlps = nn.ModuleList(SwiGLU(width, arch.depth_d_ff) for _ in range(arch.depth_layers))
        self.norm = RMSNorm(width)
        # one more than there are codes: the first codebook's last symbol ends the utterance
        self.heads = nn.Parameter(torch.empty(codebooks, width, codebook_size + 1))  # (Q, W, V + 1)

    def forward(self, states: Tensor, codes: Tensor) -> Tensor:
        """Logits (..., Q, V + 1) of every codebook, from states (..., D) and the true codes (..., Q)."""
        embedded = self.embed_codes(codes + self.offsets(codes.device))  # (..., Q, W)
        before = embedded.cumsum(dim=-2) - embedded
        x = self.state_proj(states)[..., None, :] + before + self.embed_levels.weight
        logits = torch.einsum("...qw,qwv->...qv", self._mix(x), self.heads.to(x.dtype))
        return self._without_end(logits)

    def offsets(self, device: torch.device) -> Tensor:
        """Index of each codebook's first code in a table of all codes, (Q,)."""
        return torch.arange(self.codebooks, device=device) * self.codebook_size

    def _mix(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return self.norm(x)

    def _without_end(self, logits: Tensor) -> Tensor:
        no_end = torch.zeros(logits.shape[-2:], dtype=torch.bool, device=logits.device)
        no_end[1:, -1] = True
        return logits.masked_fill(no_end, -torch.inf)


class Talker(ReadsOneByOne):
    """Text -> durations of its bytes, and codes of speech, one frame of all codebooks a step.

    A decoder that attends to the whole text has to learn its position in the text. It learns much sooner to continue
    the frames before, which gives speech of another text. So each frame is given the bytes spoken in it. Durations as
    in Ren et al. 2021, "FastSpeech 2", from our own aligner; blocks are the Thinker's.

    Args:
        use_flash: fused attention; False: the plain maths.
    """

    def __init__(self, architecture: TalkerArchitecture, *, use_flash: bool = True):
        super().__init__()
        self.architecture = arch = architecture
        self.codebooks, self.codebook_size = arch.codebooks, arch.codebook_size
        self.alignment_frames_per_code = arch.alignment_frames_per_code
        self.blocks_arch = arch.blocks
        D = arch.d_model
        self.embed_text = nn.Embedding(TEXT_SYMBOLS, D)
        self.text_layers = nn.ModuleList(ConvNeXtBlock(D, 2 * D, _KERNEL) for _ in range(arch.text_layers))
        # projects the Thinker's states; None before stage E
        self.thinker_proj = nn.Linear(arch.thinker_d_model, D, bias=False) if arch.thinker_d_model else None
        self.duration_head = nn.Linear(D, 1)
        self.text_proj = nn.Linear(self.alignment_frames_per_code * D, D, bias=False)
        self.embed_codes = nn.Embedding(self.codebooks * self.codebook_size, D)
        self.start = nn.Parameter(torch.empty(D))
        self.layers = nn.ModuleList(Block(self.blocks_arch, n, use_flash) for n in range(arch.n_layers))
        self.norm = RMSNorm(D)
        self.depth = DepthDecoder(arch)
        # on the device, as the host would wait for a copy in every step; not part of a checkpoint
        cos, sin = rope_tables(_ROPE_FRAMES, self.blocks_arch.d_head, arch.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)  # (_ROPE_FRAMES, K)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.voice_encoder = None
        if arch.voice_layers:
            self.voice_encoder = VoiceEncoder(D, arch.voice_layers)
            # references of the named voices, in the order of ``speakers``
            shape = (len(arch.speakers), VOICE_CODES, self.codebooks)
            self.register_buffer("voice_codes", torch.zeros(shape, dtype=torch.int64))  # (S, N, Q)
        self._initialise()

    def _initialise(self) -> None:
        """As in the Thinker, but text and frames, which are added, start at about the same scale."""
        residual_std = INIT_STD / (2 * self.architecture.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.startswith(("text_layers.", "duration_head.", "voice_encoder.")):
                continue  # these initialise themselves
            if parameter.dim() > 1 or name == "start":
                writes_residual = "o_proj" in name or "down_proj" in name
                nn.init.normal_(parameter, std=residual_std if writes_residual else INIT_STD)
        nn.init.normal_(self.embed_text.weight, std=1.0)
        nn.init.normal_(self.embed_codes.weight, std=0.5 / self.codebooks**0.5)
        nn.init.normal_(self.start, std=0.5)

    # The voice ---------------------------------------------------------------------------------------------------

    def encode_voices(self, references: Tensor, lengths: Tensor) -> Tensor:
        """Codes (B, N, Q) of recordings, valid up to ``lengths`` (B,) -> (B, D), what sets their voices apart."""
        return self.voice_encoder(self.embed_frames(references), lengths)

    # The text ----------------------------------------------------------------------------------------------------

    def encode_text(
        self, symbols: Tensor, lengths: Tensor, thinker_states: Tensor | None = None, voices: Tensor | None = None
    ) -> Tensor:
        """(B, L) symbols, valid up to ``lengths`` (B,) -> (B, L, D).

        Args:
            thinker_states: (B, L, thinker_d_model), the Thinker's hidden state of each symbol's token, or zeros.
            voices: (B, D) of ``encode_voices``; durations depend on them too.
        """
        mask = (torch.arange(symbols.shape[1], device=symbols.device) < lengths[:, None])[..., None]
        x = self.embed_text(symbols)
        if thinker_states is not None:
            x = x + self.thinker_proj(thinker_states)
        if voices is not None:
            x = x + voices[:, None]
        for layer in self.text_layers:
            x = layer(x, mask.to(x.dtype))
        return x

    def log_durations(self, text: Tensor) -> Tensor:
        """(B, L, D) of ``encode_text`` -> (B, L) float32, the logarithms of the bytes' durations."""
        return self.duration_head(text).squeeze(-1).float()

    def length_regulator(self, text: Tensor, lengths: Tensor, durations: Tensor, n_frames: int) -> Tensor:
        """The text of each of the first ``n_frames`` frames, (B, n_frames, D).

        Args:
            text: (B, L, D) of ``encode_text``; lengths: (B,).
            durations: (B, L) whole alignment frames, zero beyond ``lengths``. The last symbol continues after its end.
        """
        ends = durations.cumsum(dim=1)
        alignment_frames = torch.arange(n_frames * self.alignment_frames_per_code, device=text.device)
        alignment_frames = alignment_frames.expand(len(text), -1).contiguous()
        byte = torch.minimum(torch.searchsorted(ends, alignment_frames, right=True), lengths[:, None] - 1)
        return self.text_proj(rows_at(text, byte).unflatten(1, (n_frames, -1)).flatten(2))

    # The frames --------------------------------------------------------------------------------------------------

    def embed_frames(self, codes: Tensor) -> Tensor:
        """Codes (B, T, Q) -> (B, T, D)."""
        return self.embed_codes(codes + self.depth.offsets(codes.device)).sum(dim=-2)

    def forward(
        self,
        symbols: Tensor,
        text_lengths: Tensor,
        codes: Tensor,
        durations: Tensor,
        thinker_states: Tensor | None = None,
        frame_dropout: Tensor | None = None,
        references: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of each frame's codes, given the text and the frames before it; and the predicted log-durations.

        Args:
            symbols: (B, L), see ``omni.models.aligner.text_symbols``; text_lengths: (B,).
            codes: (B, T, Q); codes after an utterance's end have no effect on the outputs before it.
            durations: see ``length_regulator``.
            thinker_states: see ``encode_text``.
            frame_dropout: (B, T), true where the frame is hidden from the input.
            references: arguments of ``encode_voices``, of a talker of several voices.

        Returns:
            (B, T + 1, Q, V + 1): entry t predicts frame t; for the first codebook also the end, index V.
            (B, L): see ``log_durations``.
        """
        T = codes.shape[1]
        voices = None if references is None else self.encode_voices(*references)
        text = self.encode_text(symbols, text_lengths, thinker_states, voices)
        frames = self.embed_frames(codes)
        if frame_dropout is not None:
            frames = frames.masked_fill(frame_dropout[..., None], 0.0)
        before = torch.cat((self.start.to(frames.dtype).expand(len(codes), 1, -1), frames), dim=1)  # (B, T + 1, D)
        x = before + self.length_regulator(text, text_lengths, durations, T + 1)
        if voices is not None:
            x = x + voices[:, None]
        cos, sin = self.rope(T + 1)
        for layer in self.layers:
            x, _ = layer(x, cos, sin, None, None)
        return self.depth(self.norm(x), F.pad(codes, (0, 0, 0, 1))), self.log_durations(text)

    def rope(self, n_frames: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (n_frames, K) for ``omni.models.ops.rotate``."""
        tables = self.rope_cos, self.rope_sin
        if n_frames > _ROPE_FRAMES:
            tables = rope_tables(n_frames, self.blocks_arch.d_head, self.architecture.rope_theta)
        cos, sin = (table[:n_frames].to(self.start.device) for table in tables)
        return cos, sin

    # Speaking ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        symbols: Sequence[Sequence[int]],
        *,
        max_frames: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        thinker_states: Sequence[Tensor] | None = None,
        references: Sequence[Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield frame after frame, for several texts at once.

        Args:
            symbols: symbols of each text, see ``omni.models.aligner.text_symbols``.
            max_frames: maximum frames of an utterance; it is also cut a second after the end of its text.
            temperature: 0 takes the likeliest code; above 0, logits are divided by it and a code is drawn.
            top_k: draw from the k likeliest only.
            thinker_states: for each text (its length, thinker_d_model).
            references: for each text the codes (N, Q) of a recording in its voice; None: the first named voice. A
                talker of one voice has none.

        Yields:
            codes (B, Q), and (B,) true for the utterances that have not ended; the others' codes are meaningless. The
            generator stops once all have ended.
        """
        device = self.start.device
        generator = torch.Generator(device=device).manual_seed(seed)
        lengths = torch.tensor([len(line) for line in symbols], device=device)
        padded = nn.utils.rnn.pad_sequence([torch.tensor(line) for line in symbols], batch_first=True).to(device)
        if thinker_states is not None:
            thinker_states = nn.utils.rnn.pad_sequence(list(thinker_states), batch_first=True).to(device)
        voices = None
        if self.voice_encoder is not None:
            voices = self.encode_voices(*pad_references(references or [self.voice_codes[0]] * len(symbols), device))
        text = self.encode_text(padded, lengths, thinker_states, voices)
        durations = self.choose_durations(text, lengths)
        overtime = int(_OVERTIME_S * 1000 / self.architecture.frame_ms)
        limits = (durations.sum(dim=1) // self.alignment_frames_per_code + 1 + overtime).clamp(max=max_frames)  # (B,)
        n_frames = int(limits.max())
        spoken = self.length_regulator(text, lengths, durations, n_frames)
        if voices is not None:
            spoken = spoken + voices[:, None]
        cos, sin = self.rope(n_frames)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.start.dtype
        cache = KVCache(self.blocks_arch, len(symbols), n_frames, device, dtype)
        weights = FrameWeights.of(self, self.blocks_arch, dtype)
        read = blocks_step(weights, self.blocks_arch, cache, cos, sin)
        before, going_on = self.start, torch.ones(len(symbols), dtype=bool, device=device)
        for t in range(n_frames):
            codes, ended = self._draw_frame(weights, read(before + spoken[:, t]), temperature, top_k, generator)
            going_on = going_on & ~ended & (t < limits)
            if not going_on.any():
                return
            yield codes, going_on
            before = self.embed_frames(codes[:, None])[:, 0]

    def choose_durations(self, text: Tensor, lengths: Tensor) -> Tensor:
        """(B, L) whole alignment frames, at least one per byte; rounding errors carry over to the next byte."""
        read = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
        durations = self.log_durations(text).clamp(max=_MAX_LOG_DURATION).exp().clamp(min=1.0) * read
        return durations.cumsum(dim=1).round().long().diff(dim=1, prepend=lengths.new_zeros(len(text), 1))

    def _draw_frame(
        self, weights: FrameWeights, state: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """State (B, D) -> codes (B, Q), and (B,) whether the utterance ends before this frame."""
        ended = None

        def choose(logits: Tensor, level: int) -> Tensor:
            nonlocal ended
            if level:  # only the first codebook has an end
                return draw(logits[:, :-1].float(), temperature, top_k, generator)
            code = draw(logits.float(), temperature, top_k, generator)
            ended = code == self.codebook_size
            return code.masked_fill(ended, 0)

        return write_frame(weights, state, choose), ended


def pad_references(references: Sequence[Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Codes (N, Q) of several recordings -> (B, N, Q), zero beyond their lengths; (B,) these lengths."""
    lengths = torch.tensor([len(codes) for codes in references], device=device)
    return nn.utils.rnn.pad_sequence([codes.to(device) for codes in references], batch_first=True), lengths


def references_in(batch: dict) -> tuple[Tensor, Tensor] | None:
    """The ``references`` of a batch for ``Talker.forward``; None without several voices."""
    return (batch["references"], batch["reference_lengths"]) if "references" in batch else None


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Logits (B, V) -> (B,) the likeliest index, or one drawn by its probability."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        values, kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, values)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------
# Losses


def frame_targets(codes: Tensor, lengths: Tensor, codebook_size: int) -> Tensor:
    """Codes (B, T, Q) of ``lengths`` (B,) frames -> targets (B, T + 1, Q), with the end after the last frame."""
    T = codes.shape[1]
    position = torch.arange(T + 1, device=codes.device)
    targets = F.pad(codes, (0, 0, 0, 1))
    targets = targets.masked_fill((position >= lengths[:, None])[..., None], IGNORE_INDEX)
    targets[..., 0] = torch.where(position == lengths[:, None], codebook_size, targets[..., 0])
    return targets


def code_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target, (B, T + 1, Q) float32, 0 where it is ignored."""
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(targets.shape)


def talker_loss(
    model: nn.Module, batch: dict, *, frame_dropout: float, duration_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the codes and ends, given the text and the true frames before, some of them hidden; plus
    the weighted loss of the durations.

    A decoder easily continues speech from the frames before, without the text. So a random share of each utterance's
    frames, from none to twice ``frame_dropout``, is hidden, as Bowman et al. 2016 drop words for the same reason.
    """
    codes, lengths = batch["codes"], batch["lengths"]
    hidden = None
    if model.training and frame_dropout:
        share = 2 * frame_dropout * torch.rand(len(codes), 1, device=codes.device)
        hidden = torch.rand(codes.shape[:2], device=codes.device) < share
    text = batch["symbols"], batch["text_lengths"]
    states, references = batch.get("thinker_states"), references_in(batch)
    logits, log_durations = model(*text, codes, batch["durations"], states, hidden, references)
    targets = frame_targets(codes, lengths, logits.shape[-1] - 1)
    nats = code_nats(logits, targets)
    first = nats[..., 0].sum() / (targets[..., 0] != IGNORE_INDEX).sum()
    durations = duration_nats(log_durations, batch).sum()
    # both over the number of codes, by which the loop weights micro-batches
    loss = (nats.sum() + duration_weight * durations) / (targets != IGNORE_INDEX).sum()
    return loss, {"first_codebook": first, "duration": durations / batch["text_lengths"].sum()}


def duration_nats(log_durations: Tensor, batch: dict) -> Tensor:
    """Half the Poisson deviance of the durations, (B, L): 0 for an exact prediction, and beyond the texts' ends.

    Its minimum is at the mean of a byte's possible durations, so errors cancel over a sentence. FastSpeech 2's squared
    error of the logarithms has its minimum at their mean, which makes a sentence 2 % too short.
    """
    read = torch.arange(log_durations.shape[1], device=log_durations.device) < batch["text_lengths"][:, None]
    true = batch["durations"].float()
    nats = log_durations.exp() - true + true * (true.clamp(min=1).log() - log_durations)
    return nats.masked_fill(~read, 0.0)
