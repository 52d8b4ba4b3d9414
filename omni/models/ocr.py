"""OCR: a ViT looks at the picture of a line of text, and an autoregressive decoder writes its characters.

The character set comes from the training texts and stands in the config, so a checkpoint is all that reading needs.
"""

# B pictures, T symbols, P image tokens (class token and patches), U columns of patches
# D model width (the decoder's, where nothing else is said), H heads, K head width, C characters

from collections.abc import Sequence
from pathlib import Path

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.common.errors import BadRow
from omni.common.text import clean_text
from omni.data.images import load_image, normalise
from omni.data.manifest import Manifest, ManifestDataset
from omni.data.tokenizer import IGNORE_INDEX
from omni.models.architectures import OcrArchitecture, ThinkerArchitecture
from omni.models.ctc import ctc_nll
from omni.models.layers import Attention, KVCache, RMSNorm, SwiGLU, rope_tables
from omni.models.ops import attention, linear
from omni.models.vision_encoder import ViT
from omni.stages.ocr import OcrConfig
from omni.train import checkpoint

INIT_STD = 0.02
END = 0  # the symbol after the last character; the characters are 1 to C


class CrossAttention(nn.Module):
    """From every symbol to all image tokens, (B, T, D) -> (B, T, D).

    Keys and values depend on the picture alone, so they are made once per picture (``keys_values``) and not once per
    symbol. Queries and keys pass an RMSNorm per head, as in ``omni.models.layers.Attention``.
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
    """Three 3 x 3 convolutions in place of the ViT's single linear map of a patch, (B, 3, H, W) -> (B, D, rows, U).

    Each halves a side of the patch as long as it is even; the last, linear one takes in what is left of it. Strokes
    are then learned once and not at every place within a patch. Xiao et al. 2021, "Early Convolutions Help
    Transformers See Better", with GroupNorm for BatchNorm, which would make the result depend on the micro-batch.
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

    Vaswani et al. 2017, section 3.5; lines are short, so the wavelengths are.
    """
    frequencies = 200.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return 2**0.5 * torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]


class Ocr(nn.Module):
    """A picture of a line of text -> its characters, one after the other.

    Li et al. 2021, "TrOCR": a ViT encodes, a transformer decoder attends to all of its tokens. Departures: characters
    instead of subwords; the decoder's layers are pre-norm with RMSNorm and SwiGLU, rotary as well as learned
    positions; nothing is pretrained. Optional: ``conv_stem``, and a CTC loss on the encoder's columns.

    Args:
        arch: the sizes, with ``characters`` filled in.
        use_flash: fused attention; False: the plain maths.
    """

    def __init__(self, arch: OcrArchitecture, *, use_flash: bool = True):
        super().__init__()
        self.architecture = arch
        # The symbols that can be written come first, so that the tied head is the first rows of the embedding.
        self.n_written = 1 + len(arch.characters)
        self.encoder = ViT(
            arch.height, arch.width, arch.patch_size, arch.vision_d_model, arch.vision_layers, arch.vision_heads,
            arch.vision_d_ff, arch.dropout, use_flash=use_flash,
        )  # fmt: skip
        if arch.conv_stem:
            self.encoder.patch_embedding = conv_stem(arch.patch_size, arch.vision_d_model)
        self.n_columns = arch.width // arch.patch_size[1]
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
        """As in the Thinker; the ViT has initialised itself."""
        residual_std = INIT_STD / (3 * self.decoder_arch.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.startswith(("encoder.", "ctc_head.")):
                writes_residual = "o_proj" in name or "down_proj" in name
                nn.init.normal_(parameter, std=residual_std if writes_residual else INIT_STD)
        # Nearby columns and nearby characters start alike, and stand out from the content: attention finds its way
        # along the line sooner than with random positions.
        with torch.no_grad():
            rows, columns = self.encoder.n_patches // self.n_columns, self.n_columns
            width = self.architecture.vision_d_model
            grid = sinusoids(rows, width)[:, None] + sinusoids(columns, width)  # (rows, columns, width)
            self.encoder.position_embeddings[0, 1:] = 0.1 * grid.flatten(0, 1)
            length, width = self.embed_positions.weight.shape
            self.embed_positions.weight.copy_(2 * INIT_STD * sinusoids(length, width))

    def forward(self, images: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the symbol after each position, and what the encoder alone makes of each column.

        Args:
            images: (B, 3, height, width) uint8.
            symbols: (B, T) the start symbol and the characters, see ``encode_texts``; T at most max_text_length + 1.

        Returns:
            (B, T, 1 + C) in autocast's dtype under autocast; and the logits of the auxiliary loss (B, U, C + 1), the
            blank last, or None if ``ctc_weight`` is 0.
        """
        tokens = self.encoder(normalise(images))  # (B, P, vision width)
        logits = self.head(self.decode(symbols, self.keys_values(tokens)))
        if self.ctc_head is None:
            return logits, None
        columns = tokens[:, 1:].unflatten(1, (-1, self.n_columns)).mean(dim=1)  # (B, U, vision width)
        return logits, self.ctc_head(columns)

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The encoder's tokens as each decoder layer sees them: keys and values (B, H, P, K)."""
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
        """(..., D) -> logits (..., 1 + C): of the end, then of each character."""
        return F.linear(hidden, self.embed_tokens.weight[: self.n_written])

    @torch.inference_mode()
    def generate(self, images: Tensor) -> Tensor:
        """The likeliest symbol at every step, until every line has ended or has ``max_text_length`` characters.

        Args:
            images: (B, 3, height, width) uint8.

        Returns:
            (B, T) symbols; after a line's end, only ``END``.
        """
        image = self.keys_values(self.encoder(normalise(images)))
        B, limit = len(images), self.architecture.max_text_length
        cache = KVCache(self.decoder_arch, B, limit, images.device, image[0][0].dtype)
        symbols = torch.full((B, 1), start_symbol(self.architecture), device=images.device)
        ended = torch.zeros(B, 1, dtype=torch.bool, device=images.device)
        written = []
        for _ in range(limit):
            hidden = self.decode(symbols, image, cache)  # (B, 1, D)
            symbols = self.head(hidden).argmax(dim=-1).masked_fill(ended, END)  # (B, 1)
            written.append(symbols)
            ended = symbols == END
            if ended.all():
                break
        return torch.cat(written, dim=1)


# ---------------------------------------------------------------------------------------------------------------
# Reading and judging


def read_text(model: Ocr, images: Tensor) -> list[str]:
    """The text of each picture, by greedy decoding.

    Args:
        model: in evaluation mode.
        images: (B, 3, height, width) uint8, from ``load_image(..., fit="pad")``.
    """
    lines = model.generate(images).tolist()
    return ["".join(model.architecture.characters[symbol - 1] for symbol in line if symbol != END) for line in lines]


def ocr_loss(model: nn.Module, batch: dict, ctc_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """What training minimises, (), float32, in nats per target; and its parts, to log.

    The cross-entropy of the characters and the end, plus ``ctc_weight`` times the CTC loss of the encoder alone, which
    tells each column what it shows long before the decoder has found out where to look. Watanabe et al. 2017, "Hybrid
    CTC/Attention Architecture".
    """
    logits, columns = model(batch["images"], batch["symbols"])
    nats = cross_entropy(logits, batch["targets"])
    if columns is None:
        return nats, {}
    ctc = column_loss(columns, batch["targets"])
    return nats + ctc_weight * ctc, {"cross_entropy": nats, "ctc": ctc}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that count, in float32. logits (B, T, 1 + C), targets (B, T) -> ()."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)


def column_loss(columns: Tensor, targets: Tensor) -> Tensor:
    """CTC's negative log-likelihood of the texts, as a mean over the same targets as ``cross_entropy``, ().

    A text that does not fit into the columns, or holds a character outside the set, has no part in it.
    """
    characters = targets > END  # (B, T)
    lengths = characters.sum(dim=1)
    repeats = ((targets[:, 1:] == targets[:, :-1]) & characters[:, 1:]).sum(dim=1)  # each needs a blank between
    known = targets.gather(1, lengths[:, None])[:, 0] == END  # an unknown one puts off the end
    fits = known & (lengths + repeats <= columns.shape[1])
    lengths = torch.where(fits, lengths, 0)
    frames = torch.full_like(lengths, columns.shape[1])
    nll = ctc_nll(columns, frames, (targets - 1).clamp(min=0), lengths)  # (B,)
    return (nll * fits).sum() / (targets != IGNORE_INDEX).sum()


def ocr_sums(model: Ocr, batch: dict) -> dict[str, Tensor]:
    """Counts that add up over batches and processes: of the loss under teacher forcing, and of reading freely."""
    read = read_text(model, batch["images"])
    counted = jiwer.process_characters(list(batch["texts"]), read)
    targets = (batch["targets"] != IGNORE_INDEX).sum()
    logits, _ = model(batch["images"], batch["symbols"])
    return {
        "nats": cross_entropy(logits, batch["targets"]) * targets,
        "targets": targets,
        "edits": torch.tensor(counted.substitutions + counted.deletions + counted.insertions),
        "characters": torch.tensor(counted.hits + counted.substitutions + counted.deletions),
        "exact": torch.tensor(sum(ours == text for ours, text in zip(read, batch["texts"], strict=True))),
        "lines": torch.tensor(len(read)),
    }


def ocr_metrics(totals: dict[str, float]) -> dict[str, float]:
    """``cer``: edits per character of the true texts; ``exact``: share of lines read without a fault."""
    return {
        "loss": totals["nats"] / totals["targets"],
        "cer": totals["edits"] / totals["characters"],
        "exact": totals["exact"] / totals["lines"],
    }


def load_ocr(folder: str | Path, device: torch.device | str) -> Ocr:
    """The model of a stage folder, ready to read.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    saved = checkpoint.load_stage(folder, "ocr", "ocr", "ocr.pt")
    config = checkpoint.saved_config(OcrConfig, saved)
    model = checkpoint.build(lambda: Ocr(config), saved["model"], saved["path"])
    return model.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------
# ManifestDataset


def text_length(manifest: Manifest, row: int) -> int:
    """Characters of a row's text, for ``measure_rows``."""
    return len(clean_text(manifest[row]["text"]))


def start_symbol(arch: OcrArchitecture) -> int:
    """The symbol before the first character. The one after it stands for characters outside the set."""
    return 1 + len(arch.characters)


def encode_texts(texts: Sequence[str], arch: OcrArchitecture, pad_to: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts as the decoder's inputs and targets.

    A character outside the set is an input of its own kind and no target: the model cannot write it. (Validation
    counts it as an error all the same, since it compares texts.)

    Args:
        pad_to: length of the result; default: that of the longest text, and one.

    Returns:
        symbols (B, T): start, characters, padding; targets (B, T): characters, end, -100 as padding.
    """
    characters = {character: symbol for symbol, character in enumerate(arch.characters, start=1)}
    start, unknown = start_symbol(arch), start_symbol(arch) + 1
    length = pad_to or max(map(len, texts)) + 1
    symbols, targets = torch.full((len(texts), length), END), torch.full((len(texts), length), IGNORE_INDEX)
    for line, text in enumerate(texts):
        written = [characters.get(character, unknown) for character in text]
        symbols[line, : len(text) + 1] = torch.tensor([start, *written])
        targets[line, : len(text) + 1] = torch.tensor([IGNORE_INDEX if s == unknown else s for s in written] + [END])
    return symbols, targets


class OcrRows(ManifestDataset):
    """Pictures of lines with their texts. A sample is a uint8 picture (3, height, width) and its text."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, config: OcrConfig, **keys) -> None:
        super().__init__(manifest, rows, **keys)
        self.config = config
        # a compiled model wants one length only
        self.pad_to = config.max_text_length + 1 if config.use_compile else None

    def read(self, row: dict, rng: np.random.Generator | None) -> tuple[Tensor, str]:
        text, config = clean_text(row["text"]), self.config
        if len(text) > config.max_text_length:
            raise BadRow(f"expected a text of at most {config.max_text_length} characters, found {len(text)}")
        path = self.manifest.file(row["image"], config.image_root)
        return load_image(path, config.height, config.width, fit="pad"), text

    def collate(self, samples: list[tuple[Tensor, str]]) -> dict:
        """``images`` (B, 3, height, width) uint8, ``symbols`` and ``targets`` (B, T), ``texts``."""
        images, texts = zip(*samples, strict=True)
        symbols, targets = encode_texts(texts, self.config, self.pad_to)
        batch = {"images": torch.stack(images), "symbols": symbols, "targets": targets, "texts": texts}
        return batch | {"n_targets": int((targets != IGNORE_INDEX).sum())}
