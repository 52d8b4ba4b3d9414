"""The talker: says a text, by writing the speech codec's codes frame after frame.

It is a decoder over ``text, then frames``. The text comes as UTF-8 bytes, to each of which the Thinker's state of the
token it belongs to may be added: that is how the talker speaks a reply while the Thinker still writes it.
"""

# B utterances, L text bytes, T frames, S = L + 1 + T positions, D model width, K head width
# Q codebooks, V codes in each, W width of the depth decoder

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.audio import audio_duration
from omni.checkpoint import load_stage, load_weights
from omni.codec import ConvNeXtBlock
from omni.config import TalkerArchitecture, TalkerConfig
from omni.layers import KVCache, RMSNorm, SwiGLU
from omni.manifest import BadRow, Rows
from omni.thinker import INIT_STD, Block

IGNORED = -100  # a target that has no loss
TEXT_END = 256  # the symbol after the last byte of a text
TEXT_SYMBOLS = 257
MAX_TEXT_BYTES = 4096


def text_symbols(text: str) -> list[int]:
    """What the talker reads: the bytes of the text, blanks between words made single, and an end."""
    return [*" ".join(text.split()).encode(), TEXT_END]


class DepthDecoder(nn.Module):
    """Within one frame: the code of each codebook, given the frame's state and the codes before it.

    A residual quantiser adds its vectors up, so what the codes so far have said of a frame is a sum. A sum of
    embeddings therefore stands for them, and no attention is needed; in training all codebooks of all frames are one
    batch. In the place of the "depth transformer" of Yang et al. 2023, "UniAudio", and Défossez et al. 2024, "Moshi".
    """

    def __init__(self, arch: TalkerArchitecture, codebooks: int, codebook_size: int):
        super().__init__()
        width = arch.depth_d_model
        self.codebooks, self.codebook_size = codebooks, codebook_size
        self.state_proj = nn.Linear(arch.d_model, width, bias=False)
        self.embed_codes = nn.Embedding(codebooks * codebook_size, width)
        self.embed_levels = nn.Embedding(codebooks, width)
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
        """Where each codebook begins in a table of all of them, (Q,)."""
        return torch.arange(self.codebooks, device=device) * self.codebook_size

    def step(self, state: Tensor, before: Tensor, level: int) -> Tensor:
        """Logits (B, V + 1) of one codebook, from ``state`` (B, W), which is already projected, and the sum of the
        embeddings of the codes before it (B, W)."""
        x = self._mix(state + before + self.embed_levels.weight[level])
        logits = x @ self.heads[level].to(x.dtype)
        return logits if level == 0 else logits[..., :-1]

    def _mix(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return self.norm(x)

    def _without_end(self, logits: Tensor) -> Tensor:
        no_end = torch.zeros(logits.shape[-2:], dtype=torch.bool, device=logits.device)
        no_end[1:, -1] = True
        return logits.masked_fill(no_end, -torch.inf)


class Talker(nn.Module):
    """Text -> codes of speech, one frame of all codebooks a step.

    Blocks are the Thinker's. Departures from a plain decoder: convolutions over the text's bytes, since a letter's
    sound hangs on its neighbours; and text and frames share one time axis, byte i standing where it is about to be
    spoken at the average pace, so that rotary attention finds its place in the text by distance to begin with.

    Args:
        arch: the sizes; ``frames_per_byte`` filled in.
        codebooks, codebook_size: the codec's.
    """

    def __init__(self, arch: TalkerArchitecture, codebooks: int, codebook_size: int, *, use_flash: bool = True):
        super().__init__()
        self.arch, self.codebooks, self.codebook_size = arch, codebooks, codebook_size
        blocks = self.blocks_arch = arch.blocks
        D = arch.d_model
        self.embed_text = nn.Embedding(TEXT_SYMBOLS, D)
        self.text_layers = nn.ModuleList(ConvNeXtBlock(D, 2 * D, 7) for _ in range(arch.text_layers))
        # what the Thinker thought when it wrote a token; absent where a text is given
        self.thinker_proj = nn.Linear(arch.thinker_d_model, D, bias=False) if arch.thinker_d_model else None
        self.embed_codes = nn.Embedding(codebooks * codebook_size, D)
        self.start = nn.Parameter(torch.empty(D))
        self.layers = nn.ModuleList(Block(blocks, layer, use_flash) for layer in range(arch.n_layers))
        self.norm = RMSNorm(D)
        self.depth = DepthDecoder(arch, codebooks, codebook_size)
        frequencies = 1.0 / arch.rope_theta ** (torch.arange(0, blocks.d_head, 2).float() / blocks.d_head)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)  # (K / 2,)
        self._initialise()

    def _initialise(self) -> None:
        """As in the Thinker."""
        residual_std = INIT_STD / (2 * self.arch.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.startswith("text_layers."):
                continue  # has initialised itself
            if parameter.dim() > 1 or name == "start":
                writes_residual = "o_proj" in name or "down_proj" in name
                nn.init.normal_(parameter, std=residual_std if writes_residual else INIT_STD)

    # Parts of a sequence -----------------------------------------------------------------------------------------

    def encode_text(self, symbols: Tensor, lengths: Tensor, thinker_states: Tensor | None = None) -> Tensor:
        """(B, L) symbols, of which ``lengths`` (B,) count -> (B, L, D).

        Args:
            thinker_states: (B, L, thinker_d_model), for each symbol the Thinker's hidden state of its token; zeros
                where there is none.
        """
        mask = (torch.arange(symbols.shape[1], device=symbols.device) < lengths[:, None])[..., None]
        x = self.embed_text(symbols)
        if thinker_states is not None:
            x = x + self.thinker_proj(thinker_states)
        for layer in self.text_layers:
            x = layer(x, mask.to(x.dtype))
        return x

    def embed_frames(self, codes: Tensor) -> Tensor:
        """Codes (B, T, Q) -> (B, T, D)."""
        return self.embed_codes(codes + self.depth.offsets(codes.device)).sum(dim=-2)

    def rope(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Times (B, S) in frames -> cosines and sines (B, 1, S, K), as ``omni.layers.rotate`` takes them."""
        angles = times[:, None, :, None] * self.rope_frequencies  # (B, 1, S, K / 2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def text_times(self, length: int, device: torch.device) -> Tensor:
        """(length,) when each byte is spoken, in frames, at the average pace."""
        return torch.arange(length, device=device) * self.arch.frames_per_byte

    # Training ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        symbols: Tensor,
        text_lengths: Tensor,
        codes: Tensor,
        thinker_states: Tensor | None = None,
        frame_dropout: Tensor | None = None,
    ) -> Tensor:
        """Logits of each frame's codes, given the text and the frames before it.

        Args:
            symbols: (B, L), see ``text_symbols``; text_lengths: (B,).
            codes: (B, T, Q); what follows an utterance's end has no effect on what comes before it.
            thinker_states: see ``encode_text``.
            frame_dropout: (B, T), true where the input must not show the frame.

        Returns:
            (B, T + 1, Q, V + 1): entry t predicts frame t; for the first codebook also the end, index V.
        """
        B, T, _ = codes.shape
        L, device = symbols.shape[1], symbols.device
        text = self.encode_text(symbols, text_lengths, thinker_states)
        frames = self.embed_frames(codes)
        if frame_dropout is not None:
            frames = frames.masked_fill(frame_dropout[..., None], 0.0)
        start = self.start.to(frames.dtype).expand(B, 1, -1)
        parts = torch.cat((text, start + torch.zeros_like(frames[:, :1]), frames), dim=1)  # (B, L + 1 + T, D)
        # Frames follow their own text without padding between, so that attention is simply causal.
        place = torch.arange(L + 1 + T, device=device).expand(B, -1)
        lengths = text_lengths[:, None]
        source = torch.where(place < lengths, place, (place - lengths + L).clamp(max=L + T))  # (B, S)
        x = parts.gather(1, source[..., None].expand(-1, -1, parts.shape[-1]))
        times = torch.where(place < lengths, self.arch.frames_per_byte * place, (place - lengths).float())
        cos, sin = self.rope(times)
        for layer in self.layers:
            x, _ = layer(x, cos, sin, None, None)
        first = (lengths + torch.arange(T + 1, device=device))[..., None].expand(-1, -1, x.shape[-1])
        states = self.norm(x.gather(1, first))  # (B, T + 1, D)
        return self.depth(states, F.pad(codes, (0, 0, 0, 1)))

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
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield frame after frame, for several texts side by side.

        Args:
            symbols: of each text, see ``text_symbols``.
            max_frames: an utterance that has not ended by then is cut.
            temperature: 0 takes the likeliest code; above, logits are divided by it and a code is drawn.
            top_k: draw from the k likeliest only.
            thinker_states: of each text, (its length, thinker_d_model).

        Yields:
            codes (B, Q), and (B,) true for the utterances that are still going on; the others' codes mean nothing.
            Nothing is yielded once all have ended.
        """
        device = self.start.device
        generator = torch.Generator(device=device).manual_seed(seed)
        lengths = torch.tensor([len(line) for line in symbols], device=device)
        B, L = len(symbols), int(lengths.max())
        padded = nn.utils.rnn.pad_sequence([torch.tensor(line) for line in symbols], batch_first=True).to(device)
        if thinker_states is not None:
            thinker_states = nn.utils.rnn.pad_sequence(list(thinker_states), batch_first=True).to(device)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.start.dtype
        cache = KVCache(self.blocks_arch, B, L + 1 + max_frames, device, dtype)
        self._advance(
            self.encode_text(padded, lengths, thinker_states), self.text_times(L, device).expand(B, -1), cache
        )
        visible = torch.ones(B, 1, 1, L + 1 + max_frames, dtype=torch.bool, device=device)
        visible[..., :L] = (torch.arange(L, device=device) < lengths[:, None])[:, None, None]
        x, going_on = self.start.expand(B, 1, -1), torch.ones(B, dtype=torch.bool, device=device)
        for t in range(max_frames):
            time = torch.full((B, 1), float(t), device=device)
            mask = None if B == 1 else visible[..., : cache.position + 1]
            state = self._advance(x, time, cache, mask)[:, -1]  # (B, D)
            codes, ended = self._draw_frame(state, temperature, top_k, generator)
            going_on = going_on & ~ended
            if not going_on.any():
                return
            yield codes, going_on
            x = self.embed_frames(codes[:, None])

    def _advance(self, x: Tensor, times: Tensor, cache: KVCache, mask: Tensor | None = None) -> Tensor:
        cos, sin = self.rope(times)
        for layer in self.layers:
            x, _ = layer(x, cos, sin, cache, mask)
        cache.advance(x.shape[1])
        return self.norm(x)

    def _draw_frame(
        self, state: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """State (B, D) -> codes (B, Q), and (B,) whether the utterance ends before this frame."""
        depth = self.depth
        projected = depth.state_proj(state)
        before, codes = torch.zeros_like(projected), []
        for level in range(self.codebooks):
            code = draw(depth.step(projected, before, level).float(), temperature, top_k, generator)  # (B,)
            if level == 0:
                ended = code == self.codebook_size
                code = code.masked_fill(ended, 0)
            before = before + depth.embed_codes(code + level * self.codebook_size)
            codes.append(code)
        return torch.stack(codes, dim=-1), ended


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Logits (B, V) -> (B,) the likeliest index, or one drawn in proportion."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        values, kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, values)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------
# Learning and judging


def frame_targets(codes: Tensor, lengths: Tensor, codebook_size: int) -> Tensor:
    """Codes (B, T, Q) of ``lengths`` (B,) frames -> targets (B, T + 1, Q): the end stands after the last frame."""
    T = codes.shape[1]
    place = torch.arange(T + 1, device=codes.device)
    targets = F.pad(codes, (0, 0, 0, 1))
    targets = targets.masked_fill((place >= lengths[:, None])[..., None], IGNORED)
    targets[..., 0] = torch.where(place == lengths[:, None], codebook_size, targets[..., 0])
    return targets


def talker_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target, float32, 0 where there is none: (B, T + 1, Q)."""
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)


def talker_loss(model: nn.Module, batch: dict, frame_dropout: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the codes and ends, given the text and the true frames before, some of them hidden.

    Speech is easily continued from what was just heard, without looking at the text at all. So each utterance hides
    another share of its frames, from none to twice ``frame_dropout``: what is hidden must come from the text. After
    Bowman et al. 2016, who dropped words for the same reason.
    """
    codes, lengths = batch["codes"], batch["lengths"]
    hidden = None
    if model.training and frame_dropout:
        share = 2 * frame_dropout * torch.rand(len(codes), 1, device=codes.device)
        hidden = torch.rand(codes.shape[:2], device=codes.device) < share
    logits = model(batch["symbols"], batch["text_lengths"], codes, batch.get("thinker_states"), hidden)
    targets = frame_targets(codes, lengths, logits.shape[-1] - 1)
    nats = talker_nats(logits, targets)
    first = nats[..., 0].sum() / (targets[..., 0] != IGNORED).sum()
    return nats.sum() / (targets != IGNORED).sum(), {"first_codebook": first}


def talker_sums(model: Talker, batch: dict) -> dict[str, Tensor]:
    """Under the true codes so far: nats of each codebook, (Q,), and of the ends."""
    codes, lengths = batch["codes"], batch["lengths"]
    logits = model(batch["symbols"], batch["text_lengths"], codes, batch.get("thinker_states"))
    targets = frame_targets(codes, lengths, model.codebook_size)
    nats, ends = talker_nats(logits, targets), targets == model.codebook_size
    return {
        "nats": nats.masked_fill(ends, 0.0).sum(dim=(0, 1)),
        "end_nats": nats[ends].sum(),
        "frames": lengths.sum(),
        "utterances": ends.sum(),
    }


def talker_metrics(totals: dict) -> dict[str, float]:
    """``code_perplexity``: among how many equally likely codes the talker hesitates, over all codebooks; also of each
    codebook. ``loss`` as in training, in nats per target."""
    nats, frames = totals["nats"], totals["frames"]
    each = (nats / frames).exp().tolist()
    loss = (nats.sum().item() + totals["end_nats"]) / (frames * len(nats) + totals["utterances"])
    metrics = {"loss": loss, "code_perplexity": math.exp(nats.sum().item() / (frames * len(nats)))}
    return metrics | {f"code_perplexity_{level}": value for level, value in enumerate(each, start=1)}


def load_talker(folder: str | Path, device: torch.device | str) -> Talker:
    """The talker that stage D left in ``folder``, in evaluation mode.

    Raises:
        UserError: nothing there, or damaged.
    """
    saved = load_stage(folder, "talker", "talker", "talker.pt")
    config = TalkerConfig.model_validate(saved["config"])
    talker = Talker(config, config.codebooks, config.codebook_size, use_flash=config.use_flash)
    load_weights(talker, saved["model"], Path(folder) / "talker.pt")
    return talker.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Utterance:
    """One sample: what is said, and the codes (T, Q) of the recording."""

    text: str
    symbols: list[int]
    codes: Tensor
    wav: str = ""  # the recording's name in the manifest


class CodedSpeech(Rows):
    """Texts with the codes of their recordings, from a ``CodedManifest``."""

    def read(self, row: dict, rng: np.random.Generator | None) -> Utterance:
        symbols = text_symbols(row["text"])
        if len(symbols) > MAX_TEXT_BYTES:
            raise BadRow(f"expected a text of at most {MAX_TEXT_BYTES} bytes, found {len(symbols) - 1}")
        if not len(row["codes"]):
            audio_duration(self.manifest.file(row["wav"]))  # says what is wrong with it
            raise BadRow(
                f"{row['wav']}: could not be read when the recordings were coded; delete codes/ to code them again"
            )
        return Utterance(row["text"], symbols, torch.from_numpy(row["codes"].astype(np.int64)), row["wav"])

    def collate(self, samples: list[Utterance]) -> dict:
        return collate_utterances(samples)


def collate_utterances(samples: Sequence[Utterance]) -> dict:
    """``symbols`` (B, L), ``codes`` (B, T, Q), zero beyond ``text_lengths``, ``lengths`` (B,); ``texts``, ``wavs``."""
    pad = nn.utils.rnn.pad_sequence
    return {
        "symbols": pad([torch.tensor(sample.symbols) for sample in samples], batch_first=True),
        "text_lengths": torch.tensor([len(sample.symbols) for sample in samples]),
        "codes": pad([sample.codes for sample in samples], batch_first=True),
        "lengths": torch.tensor([len(sample.codes) for sample in samples]),
        "texts": [sample.text for sample in samples],
        "wavs": [sample.wav for sample in samples],
        "weight": sum(sample.codes.numel() + 1 for sample in samples),
    }
