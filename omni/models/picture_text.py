"""Stage C's model: a ViT beside a text tower, trained to match pictures with their captions."""

# B pictures and as many captions, H and W height and width in pixels, P patches, D model width, V vocabulary
# T tokens of a caption, E width of the embeddings

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
WORD_LOGITS = 1 << 26  # logits of the word head in memory at a time
RARE = -6.0  # largest log-odds, before training, that a patch shows a token
SHOWN = 100  # largest number of tokens that all patches together show before training


class PictureTextModel(nn.Module):
    """Two towers that embed a picture and its caption close to each other.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (CLIP). Departures:
    mean and maximum over the patches' states replace the state of CLS, since the omni model reads the patches, and
    since a maximum keeps a small object that a mean averages away; the text tower is a small Thinker, causal, so a
    caption's state is that of its last token. The patches also predict the words of the caption (``word_loss``): among
    the few captions of a small batch a few words identify the right one, so the contrastive loss alone teaches few.

    Under ``uses_thinker``, a frozen Thinker (``attach_thinker``) embeds the captions: a caption's state is the mean
    over its tokens, since the last state of a language model tells more about the next word than about the sentence.
    The Thinker is no submodule, so it is neither trained nor saved; its digest is saved, so that another is refused.

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
            # At first nearly all of the word loss is of tokens that a picture does not show. Among many patches and
            # tokens it would be hundreds of times the contrastive loss, and a clipped gradient would be its alone.
            chances = self.vit.n_patches * arch.text.vocab_size
            nn.init.constant_(self.word_head.bias, min(RARE, math.log(SHOWN / chances)))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(arch.temperature)))

    def attach_thinker(self, thinker: Thinker) -> None:
        """Embed captions with ``thinker``, which is on its device already and is frozen from now on."""
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
            embeddings of the pictures and the captions, each (B, E) float32 of length 1, and the () factor from their
            cosines to logits; with ``same`` three () float32: the contrastive loss, the word loss (0 without a
            ``word_head``) and the factor.
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
        """(B, P, D) -> (B, V), see ``noisy_or_log_absent``. The logits are a step's largest tensor, so they are
        computed for some pictures at a time, and again in the backward."""
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
        """Embeddings of captions.

        Args:
            tokens: (B, T) int64; tokens after a caption's end are ignored.
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
    with true_float32(pictures.device):  # in lower precision, close ones would be equal
        return pictures @ captions.T


def contrastive_loss(pictures: Tensor, captions: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy: of each picture over all captions, and of each caption over all pictures.

    A pair with an equal picture or caption is not a negative: the softmax leaves it out. Negatives come from one
    process's micro-batch, so neither accumulation nor more processes add any.

    Args:
        pictures, captions: (B, E) float32, of length 1.
        scale: () the inverse temperature.
        same: (B, B) bool, true where two pairs have equal pictures or captions, so also on the diagonal.

    Returns:
        () float32, in nats: log(B) for an untrained model.
    """
    logits = scale * similarities(pictures, captions)
    twins = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(twins, -torch.inf)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def word_loss(log_absent: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """Cross-entropy of the set of a caption's tokens, without its end: a token is present if any patch shows it.

    Fang et al. 2015, "From Captions to Visual Concepts and Back": independent probabilities of every patch, joined by a
    noisy or. Once one patch predicts a word, no other patch gains by predicting it, so words stay local. A token's
    weight is its rarity, so "a" and "the" count for little.

    Args:
        log_absent: (B, V) float32, see ``noisy_or_log_absent``.
        tokens, ends: (B, T) and (B,), see ``PictureTextModel.embed_captions``.

    Returns:
        () float32, in nats per token of a caption.
    """
    inside = torch.arange(tokens.shape[1], device=ends.device) < ends[:, None]  # (B, T)
    present = torch.zeros_like(log_absent).scatter(1, tokens * inside, 1.0)  # (B, V)
    present[:, 0] = 0  # the end of text, to which the scatter mapped all tokens outside
    nats = torch.where(present > 0, -torch.log(-torch.expm1(log_absent.clamp(max=-1e-6))), -log_absent)
    counts = rarity_of(present.sum(dim=0), len(present))
    return (nats * counts).sum() / present.sum().clamp(min=1)


def noisy_or_log_absent(logits: Tensor, dim: int) -> Tensor:
    """Log-probability, float32, that no patch along ``dim`` shows a token, from the patches' log-odds."""
    return -F.softplus(logits.float()).sum(dim=dim)


def rarity_of(counts: Tensor, captions: int) -> Tensor:
    """Weight of tokens that occur in ``counts`` (V,) of ``captions``: log of the inverse share, 0 if in all of them."""
    return torch.log((1 + captions) / (1 + counts))
