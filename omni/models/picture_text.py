"""Stage C's model: a ViT beside a text tower, trained to match pictures with their captions."""

# B pictures and as many captions, H and W height and width in pixels, P patches, D model width, V vocabulary
# T tokens of a caption, E width of the common space

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni.common.numerics import true_float32, weights_sha256
from omni.models.architectures import PictureTextArchitecture
from omni.models.thinker import Thinker
from omni.models.vision_encoder import ViT

MAX_SCALE = 100.0
WORD_LOGITS = 1 << 26  # at a time
FEW_PATCHES = -6.0  # log-odds, before training, that a patch shows a word


class PictureTextModel(nn.Module):
    """Two towers that put a picture and its caption close to each other.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (CLIP). Departures:
    the picture's state is the mean and the maximum over its patches' states, not that of CLS, since the patches are
    what the omni model reads, and since a maximum lets one patch speak for a small thing that a mean drowns; the text
    tower is a small Thinker. Causal, so a caption's state is the one at its last token. Beside the contrast, the
    patches predict the words of the caption (``word_loss``): among the few captions of a small batch, a few words
    are enough to find the right one, and the contrast alone would teach few others.

    Under ``uses_thinker``, a frozen Thinker (``attach_thinker``) embeds the captions: a caption's state is the mean
    over its tokens, since the last state of a language model tells more about the next word than about the sentence.
    The Thinker is no submodule: it is neither trained nor saved, only its digest is, so that another one is refused.

    Args:
        architecture: the ``vocab_size`` of its ``text`` is the tokenizer's real one.
        use_flash: fused attention; False: the plain maths.
    """

    def __init__(self, architecture: PictureTextArchitecture, *, use_flash: bool = True):
        super().__init__()
        self.architecture = arch = architecture
        self.vit = ViT(arch.vision, use_flash=use_flash)
        if arch.uses_thinker:
            self._frozen: list[Thinker] = []  # a list, so that the Thinker is no submodule
            self.register_buffer("thinker_sha256", torch.zeros(32, dtype=torch.uint8))
        else:
            self.text = Thinker(arch.text, use_flash=use_flash)
        self.picture_proj = nn.Linear(2 * arch.vision.d_model, arch.embed_dim, bias=False)
        self.text_proj = nn.Linear(arch.text.d_model, arch.embed_dim, bias=False)
        self.word_head = None
        if arch.word_head:
            self.word_head = nn.Linear(arch.vision.d_model, arch.text.vocab_size)
            nn.init.constant_(self.word_head.bias, FEW_PATCHES)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(arch.temperature)))

    def attach_thinker(self, thinker: Thinker) -> None:
        """Embed captions with ``thinker``, on its device already and frozen from here on."""
        self._frozen = [thinker.requires_grad_(False).eval()]
        self.thinker_sha256.copy_(torch.tensor(list(bytes.fromhex(weights_sha256(thinker)))))

    def forward(
        self, images: Tensor, tokens: Tensor, ends: Tensor, same: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of pictures and captions; with ``same`` the training losses instead.

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
            words = word_loss(self._log_absent(patches), tokens, ends)
        return contrastive_loss(pictures, captions, scale, same), words, scale

    def _log_absent(self, patches: Tensor) -> Tensor:
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
    """CLIP's symmetric cross-entropy: of each picture over all captions, and of each caption over all pictures.

    A pair whose picture or caption equals this one's is no negative: it is left out of the softmax. The negatives are
    those of the micro-batch of one process, so neither accumulation nor processes add any.

    Args:
        pictures, captions: (B, E) float32, of length 1.
        scale: () the inverse temperature.
        same: (B, B) bool, true where picture or caption of two pairs are equal; so on the diagonal, too.

    Returns:
        () float32, in nats: log(B) for an untrained model.
    """
    logits = scale * similarities(pictures, captions)
    twins = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(twins, -torch.inf)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def word_loss(log_absent: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """Cross-entropy of which tokens each caption has, its end left out: a token is present if any patch shows it.

    Fang et al. 2015, "From Captions to Visual Concepts and Back": independent probabilities of every patch, joined by a
    noisy or. Once one patch predicts a word, no other patch gains by predicting it, so that words stay local.
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
