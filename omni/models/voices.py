"""The voice encoder: a recording, as codes, becomes the vector of the voice in which the talker speaks."""

# B recordings, N codes in time, D model width

import torch
from torch import Tensor, nn

from omni.models.layers import ConvNeXtBlock, RMSNorm

VOICE_CODES = 100  # length of a named voice's recording, in codes
_KERNEL = 7  # codes that a block covers


class VoiceEncoder(nn.Module):
    """Embedded codes of a recording -> one vector, the mean over the recording, so that it tells more about the voice
    than about the text.

    Pooled embeddings as in Wan et al. 2018, "Generalized End-to-End Loss for Speaker Verification", added to text and
    frames as the style vector of Min et al. 2021, "Meta-StyleSpeech". Departures: it is trained by the talker's loss
    alone, and reads codes instead of log-mels, so that training opens no recording.
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(ConvNeXtBlock(width, 2 * width, _KERNEL) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.proj = nn.Linear(width, width)
        nn.init.zeros_(self.proj.weight)  # training begins with one voice
        nn.init.zeros_(self.proj.bias)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, N, D) frames, valid up to ``lengths`` (B,), at least 1 -> (B, D)."""
        mask = (torch.arange(frames.shape[1], device=frames.device) < lengths[:, None])[..., None].to(frames.dtype)
        for layer in self.layers:
            frames = layer(frames, mask)
        return self.proj((self.norm(frames) * mask).sum(dim=1) / lengths[:, None])
