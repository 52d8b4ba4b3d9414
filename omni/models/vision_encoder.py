"""The vision encoder: a vision transformer, exactly ``transformers.ViTModel`` without its pooler."""

# B pictures, H and W height and width in pixels, P patches, N = 1 + P tokens, D model width
# A attention heads, K head width

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.models.architectures import VisionArchitecture
from omni.models.ops import attention, linear

LAYER_NORM_EPS = 1e-12
INIT_STD = 0.02  # standard deviation of the CLS token and the positions
GAIN = 0.7  # standard deviation of a matrix times the square root of its number of inputs
POSITION_SCALE = 0.1


class SelfAttention(nn.Module):
    """Self-attention over all tokens, (B, N, D) -> (B, N, D). Vaswani et al. 2017."""

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

    def __init__(self, arch: VisionArchitecture, use_flash: bool):
        super().__init__()
        self.dropout = arch.dropout
        self.layernorm_before = nn.LayerNorm(arch.d_model, eps=LAYER_NORM_EPS)
        self.attention = SelfAttention(arch.d_model, arch.n_heads, use_flash)
        self.layernorm_after = nn.LayerNorm(arch.d_model, eps=LAYER_NORM_EPS)
        self.mlp = MLP(arch.d_model, arch.d_ff)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attention(self.layernorm_before(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.layernorm_after(x)), self.dropout, self.training)


class PatchEmbedding(nn.Conv2d):
    """(B, 3, H, W) -> (B, D, rows, columns): a convolution, computed as one matrix product over the patches."""

    def forward(self, images: Tensor) -> Tensor:
        height, width = self.kernel_size
        patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, 3, rows, height, columns, width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, rows, columns, 3 * height * width)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of each patch's row and column, (rows * columns, width), small against the patches' content.

    Sine and cosine of row and of column take a quarter of the width each; channels beyond a multiple of four are 0.
    """
    quarter = width // 4
    frequencies = 1e4 ** -(torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (row, column)]
    table = torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1)
    return POSITION_SCALE * F.pad(table, (0, width - 4 * quarter))


class ViT(nn.Module):
    """Vision transformer: patches to tokens, a CLS token before them, learned positions, pre-norm layers, a norm.

    Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words". Departures: none in the computation, two in the
    initialisation. Weights that write into the residual stream are scaled down by its depth, as in the Thinker; the
    positions start with sines and cosines of row and column (Beyer et al. 2022, "Better plain ViT baselines for
    ImageNet-1k"), so that neighbourhood need not be learned.

    Args:
        use_flash: fused attention; False: the plain maths.
    """

    no_decay = ("cls_token", "position_embeddings")

    def __init__(self, architecture: VisionArchitecture, *, use_flash: bool = True):
        super().__init__()
        self.architecture = arch = architecture
        self.img_size, self.patch_size = (arch.height, arch.width), arch.patch_size
        self.grid = tuple(side // patch for side, patch in zip(self.img_size, self.patch_size, strict=True))
        self.n_patches = self.grid[0] * self.grid[1]
        self.patch_embedding = PatchEmbedding(3, arch.d_model, kernel_size=arch.patch_size, stride=arch.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, arch.d_model))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + self.n_patches, arch.d_model))
        self.layers = nn.ModuleList(ViTBlock(arch, use_flash) for _ in range(arch.n_layers))
        self.layernorm = nn.LayerNorm(arch.d_model, eps=LAYER_NORM_EPS)
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
        with torch.no_grad():
            self.position_embeddings[0, 1:] += grid_positions(*self.grid, self.architecture.d_model)

    def forward(self, images: Tensor) -> Tensor:
        """Every token's final state: first CLS, then the patches row by row.

        Args:
            images: (B, 3, H, W) in [-1, 1], see ``omni.data.images.normalise``.

        Returns:
            (B, N, D).
        """
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, P, D)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, N, D)
        x = F.dropout(x + self.position_embeddings, self.architecture.dropout, self.training)
        for block in self.layers:
            x = block(x)
        return self.layernorm(x)


# ---------------------------------------------------------------------------------------------------------------
# Export

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
    arch = vit.architecture
    sides = [size[0] if size[0] == size[1] else list(size) for size in (vit.img_size, vit.patch_size)]
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": arch.d_model,
        "num_hidden_layers": arch.n_layers,
        "num_attention_heads": arch.n_heads,
        "intermediate_size": arch.d_ff,
        "hidden_act": "gelu",
        "hidden_dropout_prob": arch.dropout,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": INIT_STD,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": sides[0],
        "patch_size": sides[1],
        "num_channels": 3,
        "qkv_bias": True,
        "dtype": "float32",
    }
