"""Pictures to vectors: the vision transformer, exactly ``transformers.ViTModel`` without its pooler, and the model
in which it is trained: beside a text tower, against captions."""

# B pictures and as many captions, H and W height and width in pixels, P patches, N = 1 + P tokens, D model width
# A attention heads, K head width, T tokens of a caption, E width of the common space

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni.common.errors import UserError
from omni.common.numerics import true_float32
from omni.data.tokenizer import Tokenizer
from omni.models.ops import attention, linear
from omni.models.thinker import Thinker
from omni.stages.text import load_thinker
from omni.stages.vision import VisionConfig
from omni.train.checkpoint import build, load_stage, saved_config, understood

LAYER_NORM_EPS = 1e-12
INIT_STD = 0.02  # of the CLS token and the positions
GAIN = 0.7  # of a matrix: its standard deviation times the root of what it adds up
POSITION_SCALE = 0.1


class SelfAttention(nn.Module):
    """Every token looks at every token, (B, N, D) -> (B, N, D). Vaswani et al. 2017."""

    def __init__(self, d_model: int, n_heads: int, use_flash: bool):
        super().__init__()
        self.n_heads, self.use_flash = n_heads, use_flash
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.o_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        heads = linear(x, self.q_proj, self.k_proj, self.v_proj).view(B, N, 3, self.n_heads, D // self.n_heads)
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(dim=2))  # (B, A, N, K) each
        y = attention(q, k, v, use_flash=self.use_flash)
        return self.o_proj(y.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """(..., D) -> (..., D), with the exact GELU (Hendrycks & Gimpel 2016)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    """One pre-norm layer: attention, then MLP, each added to the residual stream (B, N, D)."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float, use_flash: bool):
        super().__init__()
        self.dropout = dropout
        self.layernorm_before = nn.LayerNorm(d_model, eps=LAYER_NORM_EPS)
        self.attention = SelfAttention(d_model, n_heads, use_flash)
        self.layernorm_after = nn.LayerNorm(d_model, eps=LAYER_NORM_EPS)
        self.mlp = MLP(d_model, d_ff)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attention(self.layernorm_before(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.layernorm_after(x)), self.dropout, self.training)


class PatchEmbedding(nn.Conv2d):
    """(B, 3, H, W) -> (B, D, rows, columns): a linear map of each patch, a convolution in weights and result.

    Cut into patches first, it is one matrix product.
    """

    def forward(self, images: Tensor) -> Tensor:
        height, width = self.kernel_size
        patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, 3, rows, height, columns, width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, rows, columns, 3 * height * width)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of each patch's row and column, (rows * columns, width), small against the patches' content.

    A quarter of the width each for sine and cosine of row and of column; what a multiple of four leaves stays 0.
    """
    quarter = width // 4
    frequencies = 1e4 ** -(torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (row, column)]
    table = torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1)
    return POSITION_SCALE * F.pad(table, (0, width - 4 * quarter))


class ViT(nn.Module):
    """Vision transformer: patches to tokens, a CLS token before them, learned positions, pre-norm layers, a norm.

    Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words". Departures: none in the computation, two in where the
    weights start. What writes into the residual stream is scaled down by its depth, as in the Thinker; the positions
    are sines and cosines of row and column (Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k"), so that
    which patches are neighbours need not be learned first.

    Args:
        img_height, img_width: pixels; multiples of the patch's sides.
        patch: side of a patch in pixels, or (height, width) of one.
        d_model: a multiple of ``n_heads``.
        dropout: on the embeddings and on the two residual branches of a layer, in training only.
        use_flash: fused attention; False: the plain maths.

    Raises:
        ValueError: the sides are not multiples of the patch's, or the width not one of the heads.
    """

    no_decay = ("cls_token", "position_embeddings")

    def __init__(
        self,
        img_height: int,
        img_width: int,
        patch: int | tuple[int, int],
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_ff: int,
        dropout: float = 0.0,
        *,
        use_flash: bool = True,
    ):
        super().__init__()
        patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
        if img_height % patch_height or img_width % patch_width:
            raise ValueError(f"{img_height} x {img_width} pixels do not divide into {patch_height} x {patch_width}")
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}")
        self.img_size, self.patch_size = (img_height, img_width), (patch_height, patch_width)
        self.n_heads, self.d_ff, self.dropout = n_heads, d_ff, dropout
        self.n_patches = (img_height // patch_height) * (img_width // patch_width)
        self.patch_embedding = PatchEmbedding(3, d_model, kernel_size=self.patch_size, stride=self.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, d_model))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + self.n_patches, d_model))
        self.layers = nn.ModuleList(ViTBlock(d_model, n_heads, d_ff, dropout, use_flash) for _ in range(n_layers))
        self.layernorm = nn.LayerNorm(d_model, eps=LAYER_NORM_EPS)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.dim() > 1:
                std = GAIN / parameter[0].numel() ** 0.5
                writes_residual = "o_proj" in name or "fc2" in name
                nn.init.trunc_normal_(parameter, std=std / (2 * len(self.layers)) ** 0.5 if writes_residual else std)
            elif parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        rows, columns = (side // patch for side, patch in zip(self.img_size, self.patch_size, strict=True))
        with torch.no_grad():
            self.position_embeddings[0, 1:] += grid_positions(rows, columns, self.cls_token.shape[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Every token's final state; the first is CLS, then the patches row by row.

        Args:
            images: (B, 3, H, W) in [-1, 1], see ``omni.data.images.normalise``.

        Returns:
            (B, N, D).
        """
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, P, D)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, N, D)
        x = F.dropout(x + self.position_embeddings, self.dropout, self.training)
        for block in self.layers:
            x = block(x)
        return self.layernorm(x)


# ---------------------------------------------------------------------------------------------------------------
# Pictures and captions in one space

MAX_SCALE = 100.0
WORD_LOGITS = 1 << 26  # at a time
FEW_PATCHES = -6.0  # log-odds, before training, that a patch shows a word


class PictureTextModel(nn.Module):
    """Two towers that put a picture and its caption close to each other.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (CLIP). Departures:
    the picture's state is the mean and the maximum over its patches' states, not that of CLS, since the patches are
    what the omni model reads, and since a maximum lets one patch speak for a small thing that a mean drowns; the text
    tower is a small Thinker. Causal, so a caption's state is the one at its last token. Beside the contrast, the
    patches are to name the words of the caption (``word_loss``): among the few
    captions of a small batch, colours and places alone find the right one, and little would ask for shapes.

    With a frozen Thinker in the text tower's place, a caption's state is the mean over its tokens: the last state of
    a language model knows more about the next word than about the sentence. That Thinker is no submodule: it is
    neither trained nor saved, only its digest is, so that another one is refused.

    Args:
        config: the sizes; ``vocab_size`` is the tokenizer's real one.
        thinker: frozen, on its device already; required under ``use_thinker_for_text``.
    """

    def __init__(self, config: VisionConfig, thinker: Thinker | None = None):
        super().__init__()
        if config.use_thinker_for_text != (thinker is not None):
            raise ValueError("expected a Thinker exactly under use_thinker_for_text")
        self.vit = ViT(
            config.img_size,
            config.img_size,
            config.patch,
            config.d_model,
            config.n_layers,
            config.n_heads,
            config.d_ff,
            config.dropout,
            use_flash=config.use_flash,
        )
        if thinker is None:
            arch = config.text_tower
            self.text = Thinker(arch, use_flash=config.use_flash)
        else:
            arch = thinker.architecture
            self._frozen = [thinker.requires_grad_(False).eval()]  # in a list, so that it is no submodule
            self.register_buffer("thinker_sha256", thinker_digest(thinker))
        self.picture_proj = nn.Linear(2 * config.d_model, config.embed_dim, bias=False)
        self.text_proj = nn.Linear(arch.d_model, config.embed_dim, bias=False)
        self.word_head = None
        if config.word_loss > 0:
            self.word_head = nn.Linear(config.d_model, arch.vocab_size)
            nn.init.constant_(self.word_head.bias, FEW_PATCHES)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def forward(
        self, images: Tensor, tokens: Tensor, ends: Tensor, same: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where pictures and captions lie; with ``same`` the training losses instead.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            tokens, ends: (B, T) and (B,), see ``embed_captions``.
            same: (B, B) bool, see ``contrastive_loss``.

        Returns:
            the pictures and the captions in the common space, each (B, E) float32 of length 1, and the () factor
            that makes logits of their products; with ``same`` three () float32: the contrastive loss, the word loss
            (0 without ``word_loss``) and the factor.
        """
        # CLIP clamps the parameter itself; this clamp lets gradients through, so that the scale can come down again
        log_scale = self.log_scale - (self.log_scale - math.log(MAX_SCALE)).clamp(min=0).detach()
        scale, patches, captions = log_scale.exp(), self.vit(images)[:, 1:], self.embed_captions(tokens, ends)
        pictures = self._pooled(patches)
        if same is None:
            return pictures, captions, scale
        words = scale.new_zeros(())
        if self.word_head is not None:
            words = word_loss(self._named_nowhere(patches), tokens, ends)
        return contrastive_loss(pictures, captions, scale, same), words, scale

    def embed_pictures(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, E) float32, of length 1."""
        return self._pooled(self.vit(images)[:, 1:])

    def _named_nowhere(self, patches: Tensor) -> Tensor:
        """(B, P, D) -> (B, V), see ``noisy_or_log_absent``. Logits of many patches and a large vocabulary are a step's
        largest tensor: some pictures at a time, and made again in the backward."""
        together = max(1, WORD_LOGITS // (patches.shape[1] * self.word_head.out_features))

        def of(some: Tensor) -> Tensor:
            return noisy_or_log_absent(self.word_head(some), dim=1)

        if len(patches) <= together:
            return of(patches)
        parts = patches.split(together)
        return torch.cat([checkpoint(of, part, use_reentrant=False, preserve_rng_state=False) for part in parts])

    def _pooled(self, patches: Tensor) -> Tensor:
        """(B, P, D) -> (B, E) float32, of length 1: from mean and maximum over the patches."""
        states = torch.cat((patches.mean(dim=1), patches.amax(dim=1)), dim=-1)
        return F.normalize(self.picture_proj(states).float(), dim=-1)

    def embed_captions(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Captions in the common space.

        Args:
            tokens: (B, T) int64; what stands after a caption's end is not looked at.
            ends: (B,) int64, the index of each caption's last token.

        Returns:
            (B, E) float32, of length 1.
        """
        if "text" in self._modules:
            state = self.text.hidden_states(tokens)[torch.arange(len(ends), device=ends.device), ends]
        else:
            with torch.no_grad():
                hidden = self._frozen[0].hidden_states(tokens)
            inside = torch.arange(tokens.shape[1], device=ends.device) <= ends[:, None]  # (B, T)
            state = (hidden * inside[:, :, None]).sum(dim=1) / (ends + 1)[:, None]
        return F.normalize(self.text_proj(state).float(), dim=-1)


def similarities(pictures: Tensor, captions: Tensor) -> Tensor:
    """Cosines (B, C) of (B, E) and (C, E)."""
    with true_float32(pictures.device):  # in less, near ones would be equal
        return pictures @ captions.T


def contrastive_loss(pictures: Tensor, captions: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy: each picture is to find its caption among all, each caption its picture.

    A pair whose picture or caption equals this one's is no negative: it is left out of the softmax. The negatives are
    those of the micro-batch of one process, so neither accumulation nor processes add any.

    Args:
        pictures, captions: (B, E) float32, of length 1.
        scale: () the inverse temperature.
        same: (B, B) bool, true where picture or caption of two pairs are equal; so on the diagonal, too.

    Returns:
        () float32, in nats: log(B) for a model that knows nothing.
    """
    logits = scale * similarities(pictures, captions)
    twins = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(twins, -torch.inf)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def word_loss(log_absent: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """Cross-entropy of which tokens each caption has, its end left out: a token is there if any patch shows it.

    Fang et al. 2015, "From Captions to Visual Concepts and Back": independent probabilities of every patch, joined by a
    noisy or. Once one patch is sure of a word, no other gains by naming it, so that words stay where they are seen.
    Each token counts by its rarity, so that "a" and "the" count for little.

    Args:
        log_absent: (B, V) float32, see ``noisy_or_log_absent``.
        tokens, ends: (B, T) and (B,), see ``PictureTextModel.embed_captions``.

    Returns:
        () float32, in nats per token of a caption.
    """
    inside = torch.arange(tokens.shape[1], device=ends.device) < ends[:, None]  # (B, T)
    present = torch.zeros_like(log_absent).scatter(1, tokens * inside, 1.0)  # (B, V)
    present[:, 0] = 0  # the end of text, which now stands for all that is not inside
    nats = torch.where(present > 0, -torch.log(-torch.expm1(log_absent.clamp(max=-1e-6))), -log_absent)
    counts = rarity_of(present.sum(dim=0), len(present))
    return (nats * counts).sum() / present.sum().clamp(min=1)


def noisy_or_log_absent(logits: Tensor, dim: int) -> Tensor:
    """Log-probability, float32, that none of the patches along ``dim`` shows a token, of each patch's log-odds."""
    return -F.softplus(logits.float()).sum(dim=dim)


def rarity_of(counts: Tensor, captions: int) -> Tensor:
    """What tokens (V,) count that stand in ``counts`` of some captions: the log of the inverse share, 0 if in all."""
    return torch.log((1 + captions) / (1 + counts))


def thinker_digest(thinker: Thinker) -> Tensor:
    """SHA-256 of a Thinker's weights, (32,) uint8."""
    digest = hashlib.sha256()
    for name, tensor in sorted(thinker.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def load_vision_encoder(
    folder: str | Path, device: torch.device, thinker_ckpt: str | Path | None = None
) -> tuple[PictureTextModel, Tokenizer, VisionConfig]:
    """A trained stage C in evaluation mode: ``model.vit`` for pictures alone, ``model`` to compare them with captions.

    Args:
        thinker_ckpt: where the Thinker of ``use_thinker_for_text`` is now; default: where it was in training.

    Raises:
        UserError: a file is missing or damaged, or the Thinker is not the one of the training.
    """
    saved = load_stage(folder, "vision", prefix="vision", final="vision.pt")
    config = saved_config(VisionConfig, saved)
    tokenizer, thinker = Tokenizer.load(Path(folder) / "tokenizer.json"), None
    if config.use_thinker_for_text:
        thinker, _, _ = load_thinker(thinker_ckpt or config.thinker_ckpt, device)
        with understood(saved["path"]):
            same = torch.equal(thinker_digest(thinker), saved["model"]["thinker_sha256"])
        if not same:
            raise UserError(
                f"{thinker_ckpt or config.thinker_ckpt}: not the Thinker that {folder} was trained with. Give that one "
                "as thinker_ckpt"
            )
    model = build(lambda: PictureTextModel(config, thinker), saved["model"], saved["path"])
    return model.to(device).eval(), tokenizer, config


# ---------------------------------------------------------------------------------------------------------------
# The foreign format

# Ours -> the names of the published ViT files. Every version of transformers reads them; 5 renames them on loading.
_VIT_NAMES = (
    ("patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("cls_token", "embeddings.cls_token"),
    ("position_embeddings", "embeddings.position_embeddings"),
    ("layers.", "encoder.layer."),
    ("attention.q_proj.", "attention.attention.query."),
    ("attention.k_proj.", "attention.attention.key."),
    ("attention.v_proj.", "attention.attention.value."),
    ("attention.o_proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)


def to_vit_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ViT's weights under the names of a published ``ViTModel`` file: what ``from_pretrained`` opens."""
    renamed = {}
    for name, tensor in state_dict.items():
        for ours, theirs in _VIT_NAMES:
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def vit_config(vit: ViT) -> dict:
    """The ``config.json`` with which ``transformers`` opens the exported ViT as ``ViTModel``, without a pooler."""
    sides = [size[0] if size[0] == size[1] else list(size) for size in (vit.img_size, vit.patch_size)]
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": vit.cls_token.shape[-1],
        "num_hidden_layers": len(vit.layers),
        "num_attention_heads": vit.n_heads,
        "intermediate_size": vit.d_ff,
        "hidden_act": "gelu",
        "hidden_dropout_prob": vit.dropout,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": INIT_STD,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": sides[0],
        "patch_size": sides[1],
        "num_channels": 3,
        "qkv_bias": True,
        "dtype": "float32",
    }
