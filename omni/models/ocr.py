"""OCR: a ViT encodes a picture of a line of text, and an autoregressive decoder writes its characters.

The character set is part of the architecture.
"""

# B pictures, T symbols, P image tokens (class token and patches), U columns of patches
# D model width (the decoder's unless noted), H heads, K head width, C characters

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.data.images import normalise
from omni.models.architectures import OcrArchitecture, ThinkerArchitecture
from omni.models.ctc import ctc_nll
from omni.models.layers import Attention, KVCache, RMSNorm, SwiGLU, rope_tables
from omni.models.ops import attention, linear
from omni.models.vision_encoder import ViT

INIT_STD = 0.02
END = 0  # the symbol after the last character; the characters are 1 to C


class CrossAttention(nn.Module):
    """Cross-attention from every symbol to all image tokens, (B, T, D) -> (B, T, D).

    Keys and values depend on the picture alone, so they are computed once per picture (``keys_values``). Queries and
    keys pass an RMSNorm per head, as in ``omni.models.layers.Attention``.
    """

    def __init__(self, arch: ThinkerArchitecture, use_flash: bool):
        super().__init__()
        self.use_flash = use_flash
        self.n_heads, self.d_head = arch.n_heads, arch.d_head
        width = arch.n_heads * arch.d_head
        self.q_proj = nn.Linear(arch.d_model, width, bias=False)
        self.k_proj = nn.Linear(arch.d_model, width, bias=False)
        self.v_proj = nn.Linear(arch.d_model, width, bias=False)
        self.o_proj = nn.Linear(width, arch.d_model, bias=False)
        self.q_norm = RMSNorm(arch.d_head)
        self.k_norm = RMSNorm(arch.d_head)

    def keys_values(self, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, D) -> keys and values (B, H, P, K)."""
        B, P, _ = image_tokens.shape
        k, v = linear(image_tokens, self.k_proj, self.v_proj).view(B, P, 2, self.n_heads, self.d_head).unbind(dim=2)
        return self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.n_heads, self.d_head)).transpose(1, 2)  # (B, H, T, K)
        y = attention(q, k, v, use_flash=self.use_flash)  # (B, H, T, K)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class DecoderBlock(nn.Module):
    """One pre-norm layer: self-attention, cross-attention and MLP, each added to the residual stream (B, T, D)."""

    def __init__(self, arch: ThinkerArchitecture, layer: int, use_flash: bool):
        super().__init__()
        self.dropout = arch.dropout
        self.self_attn_norm = RMSNorm(arch.d_model)
        self.self_attn = Attention(arch, layer, use_flash)
        self.cross_attn_norm = RMSNorm(arch.d_model)
        self.cross_attn = CrossAttention(arch, use_flash)
        self.mlp_norm = RMSNorm(arch.d_model)
        self.mlp = SwiGLU(arch.d_model, arch.d_ff)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, image: tuple[Tensor, Tensor], cache: KVCache | None
    ) -> Tensor:
        x = x + self._drop(self.self_attn(self.self_attn_norm(x), cos, sin, cache, mask=None))
        x = x + self._drop(self.cross_attn(self.cross_attn_norm(x), *image))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training)


def conv_stem(patch: tuple[int, int], d_model: int) -> nn.Sequential:
    """Three 3 x 3 convolutions instead of the ViT's linear map of a patch, (B, 3, H, W) -> (B, D, rows, U).

    Each halves a side of the patch if it is even; a last, linear one covers the rest of the patch. Strokes are then
    learned once and not for every position within a patch. Xiao et al. 2021, "Early Convolutions Help Transformers See
    Better", with GroupNorm instead of BatchNorm, which would make the result depend on the micro-batch.
    """
    height, width = patch
    layers, channels = [], 3
    for out in (d_model // 4, d_model // 2, d_model):
        stride = 2 - height % 2, 2 - width % 2
        height, width = height // stride[0], width // stride[1]
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1), nn.GroupNorm(4, out), nn.GELU()]
        channels = out
    return nn.Sequential(*layers, nn.Conv2d(channels, d_model, (height, width), (height, width)))


def sinusoids(length: int, width: int) -> Tensor:
    """(length, width) with a mean square of 1: sines and cosines of the position at wavelengths from 6 to 1257.

    Vaswani et al. 2017, section 3.5, with short wavelengths for short lines.
    """
    frequencies = 200.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return 2**0.5 * torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]


def ink_of(images: Tensor) -> Tensor:
    """How far each pixel's brightness is from the ground's towards the letters', uint8 (B, 3, H, W) -> float32 (B, 3,
    H, W): -1 on the ground, 1 where the ink is strongest, in three equal channels.

    Dark on light and light on dark become the same, and all contrasts equal. The ground is the median, as letters cover
    less than half of a line; they are on the side of it to which the brightness is skewed.
    """
    red, green, blue = images.float().unbind(dim=1)
    brightness = (0.299 * red + 0.587 * green + 0.114 * blue).flatten(1)  # (B, H * W)
    away = brightness - brightness.median(dim=1, keepdim=True).values
    away = torch.where(away.pow(3).sum(dim=1, keepdim=True) < 0, -away, away)
    ink = away / away.amax(dim=1, keepdim=True).clamp(min=1.0)
    ink = ink.clamp(min=-1.0).mul(2).sub(1)
    return ink.view(-1, 1, *images.shape[2:]).expand(-1, 3, -1, -1)


class OcrModel(nn.Module):
    """A picture of a line of text -> its characters, one after the other.

    Li et al. 2021, "TrOCR": a transformer decoder attends to all tokens of a ViT. Departures: characters instead of
    subwords; a pre-norm decoder with RMSNorm, SwiGLU, and rotary as well as learned positions; nothing is pretrained.
    Optional: ``conv_stem``, ``even_ink``, and a CTC loss on the encoder's columns.

    Args:
        use_flash: fused attention; False: the plain maths.
    """

    def __init__(self, architecture: OcrArchitecture, *, use_flash: bool = True):
        super().__init__()
        self.architecture = arch = architecture
        # the symbols that can be written come first, so the tied head is the first rows of the embedding
        self.n_written = 1 + len(arch.characters)
        self.encoder = ViT(arch.encoder, use_flash=use_flash)
        if arch.conv_stem:
            self.encoder.patch_embedding = conv_stem(arch.patch_size, arch.vision_d_model)
        self.n_columns = self.encoder.grid[1]
        self.ctc_head = nn.Linear(arch.vision_d_model, len(arch.characters) + 1) if arch.ctc_weight else None
        decoder = self.decoder_arch = arch.decoder
        same = arch.vision_d_model == decoder.d_model
        self.bridge = nn.Identity() if same else nn.Linear(arch.vision_d_model, decoder.d_model, bias=False)
        self.embed_tokens = nn.Embedding(self.n_written + 2, decoder.d_model)
        self.embed_positions = nn.Embedding(decoder.ctx_len, decoder.d_model)
        self.embed_positions.no_decay = ("weight",)
        self.layers = nn.ModuleList(DecoderBlock(decoder, layer, use_flash) for layer in range(decoder.n_layers))
        self.norm = RMSNorm(decoder.d_model)
        cos, sin = rope_tables(decoder.ctx_len, decoder.d_head, decoder.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)  # (ctx_len, K)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """As in the Thinker; the ViT initialises itself."""
        residual_std = INIT_STD / (3 * self.decoder_arch.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.startswith(("encoder.", "ctc_head.")):
                writes_residual = "o_proj" in name or "down_proj" in name
                nn.init.normal_(parameter, std=residual_std if writes_residual else INIT_STD)
        # Position embeddings of neighbours start similar, and large beside the content: attention learns to move along
        # the line sooner than with random ones.
        with torch.no_grad():
            rows, columns = self.encoder.grid
            width = self.architecture.vision_d_model
            grid = sinusoids(rows, width)[:, None] + sinusoids(columns, width)  # (rows, columns, width)
            self.encoder.position_embeddings[0, 1:] = 0.1 * grid.flatten(0, 1)
            length, width = self.embed_positions.weight.shape
            self.embed_positions.weight.copy_(2 * INIT_STD * sinusoids(length, width))

    def forward(self, images: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the symbol after each position and, from the encoder alone, of each column.

        Args:
            images: (B, 3, height, width) uint8.
            symbols: (B, T) the start symbol and the characters; T at most max_text_length + 1.

        Returns:
            (B, T, 1 + C) in autocast's dtype under autocast; and the logits of the auxiliary loss (B, U, C + 1), the
            blank last, or None if ``ctc_weight`` is 0.
        """
        tokens = self.encode(images)  # (B, P, vision width)
        logits = self.head(self.decode(symbols, self.keys_values(tokens)))
        return logits, None if self.ctc_head is None else self.columns(tokens)

    def columns(self, tokens: Tensor) -> Tensor:
        """The encoder's tokens -> logits (B, U, C + 1) of each column's character, the blank last."""
        return self.ctc_head(tokens[:, 1:].unflatten(1, (-1, self.n_columns)).mean(dim=1))

    def encode(self, images: Tensor) -> Tensor:
        """The encoder's tokens (B, P, vision width) of ``images`` (B, 3, height, width), uint8."""
        return self.encoder(ink_of(images) if self.architecture.even_ink else normalise(images))

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, H, P, K) of the encoder's tokens for each decoder layer."""
        tokens = self.bridge(tokens)
        return [block.cross_attn.keys_values(tokens) for block in self.layers]

    def decode(self, symbols: Tensor, image: list[tuple[Tensor, Tensor]], cache: KVCache | None = None) -> Tensor:
        """Final hidden states (B, T, D) of ``symbols`` (B, T), which follow those in the cache.

        A filled cache takes one symbol at a time.
        """
        start, T = 0 if cache is None else cache.position, symbols.shape[1]
        x = self.embed_tokens(symbols) + self.embed_positions.weight[start : start + T]  # (B, T, D)
        cos, sin = self.rope_cos[start : start + T], self.rope_sin[start : start + T]
        for block, keys_values in zip(self.layers, image, strict=True):
            x = block(x, cos, sin, keys_values, cache)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., 1 + C) of ``END`` and of each character."""
        return F.linear(hidden, self.embed_tokens.weight[: self.n_written])

    @torch.inference_mode()
    def generate(self, images: Tensor) -> Tensor:
        """The likeliest symbol at every step, until every line has ended or has ``max_text_length`` characters.

        Args:
            images: (B, 3, height, width) uint8.

        Returns:
            (B, T) symbols; after a line's end, only ``END``.
        """
        return self._written(self.keys_values(self.encode(images)))

    @torch.inference_mode()
    def read(self, images: Tensor) -> Tensor:
        """What the decoder writes, or what the columns spell: the one that has the lower training loss.

        The decoder now and then loses its place in a line, which the columns cannot; it knows better what each
        character is. Watanabe et al. 2017 (see ``ocr_loss``), with these two texts in place of a beam.

        Args, returns:
            as ``generate``.
        """
        tokens = self.encode(images)
        image = self.keys_values(tokens)
        written = self._written(image)
        if self.ctc_head is None:
            return written
        columns = self.columns(tokens)
        spelled = spelled_by(columns, self.architecture.max_text_length)
        T = max(written.shape[1], spelled.shape[1])
        written, spelled = (F.pad(symbols, (0, T - symbols.shape[1]), value=END) for symbols in (written, spelled))
        better = self.nats(spelled, image, columns) < self.nats(written, image, columns)  # (B,)
        return torch.where(better[:, None], spelled, written)

    def nats(self, symbols: Tensor, image: list[tuple[Tensor, Tensor]], columns: Tensor) -> Tensor:
        """The training loss of each line, summed over its targets, (B,); infinite if the columns are too few for it.

        Args:
            symbols: (B, T), after a line's end only ``END``; T at most max_text_length.
        """
        lengths = (symbols != END).sum(dim=1)
        start = torch.full_like(symbols[:, :1], start_symbol(self.architecture))
        log_probs = self.head(self.decode(torch.cat((start, symbols), dim=1), image)).float().log_softmax(dim=-1)
        targets = F.pad(symbols, (0, 1), value=END)  # (B, T + 1)
        counts = torch.arange(targets.shape[1], device=symbols.device) <= lengths[:, None]
        decoder = -(log_probs.gather(2, targets[:, :, None])[:, :, 0] * counts).sum(dim=1)
        frames = torch.full_like(lengths, columns.shape[1])
        return decoder + self.architecture.ctc_weight * ctc_nll(columns, frames, (symbols - 1).clamp(min=0), lengths)

    def _written(self, image: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The likeliest symbol at every step, (B, T), given ``keys_values``."""
        keys = image[0][0]
        B, limit = len(keys), self.architecture.max_text_length
        cache = KVCache(self.decoder_arch, B, limit, keys.device, keys.dtype)
        symbols = torch.full((B, 1), start_symbol(self.architecture), device=keys.device)
        ended = torch.zeros(B, 1, dtype=torch.bool, device=keys.device)
        written = []
        for _ in range(limit):
            hidden = self.decode(symbols, image, cache)  # (B, 1, D)
            symbols = self.head(hidden).argmax(dim=-1).masked_fill(ended, END)  # (B, 1)
            written.append(symbols)
            ended = symbols == END
            if ended.all():
                break
        return torch.cat(written, dim=1)


def spelled_by(columns: Tensor, limit: int) -> Tensor:
    """The likeliest class of each column without repeats and blanks, as symbols (B, T), T at most ``limit``; after a
    line's end, only ``END``. columns: (B, U, C + 1)."""
    best = columns.argmax(dim=-1)  # (B, U)
    kept = best != columns.shape[-1] - 1
    kept[:, 1:] &= best[:, 1:] != best[:, :-1]
    place = kept.cumsum(dim=1) - 1
    kept &= place < limit
    symbols = torch.full((len(best), limit + 1), END, device=best.device)  # the last column: dropped symbols
    symbols.scatter_(1, torch.where(kept, place, limit), best + 1)
    return symbols[:, : max(1, int(kept.sum(dim=1).max()))]


def read_text(model: OcrModel, images: Tensor) -> list[str]:
    """The text of each picture, see ``OcrModel.read``.

    Args:
        model: in evaluation mode.
        images: (B, 3, height, width) uint8, from ``load_image(..., fit="pad")``.
    """
    lines = model.read(images).tolist()
    return ["".join(model.architecture.characters[symbol - 1] for symbol in line if symbol != END) for line in lines]


def start_symbol(arch: OcrArchitecture) -> int:
    """The symbol before the first character; the next symbol represents characters outside the set."""
    return 1 + len(arch.characters)
