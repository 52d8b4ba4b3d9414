"""A vocoder with ``harmonic_source`` as a program of ``torch.export``, which PyTorch runs without this repository."""

from pathlib import Path

import torch
from torch import Tensor, nn

from omni.export.folder import PROGRAM
from omni.models.vocoder import HarmonicGenerator

LEAST_FRAMES, MOST_FRAMES = 4, 1 << 20


class Vocode(nn.Module):
    """Log-mels (B, T, M), T at least ``LEAST_FRAMES``, -> waveforms (B, T * hop_length)."""

    def __init__(self, vocoder: HarmonicGenerator) -> None:
        super().__init__()
        self.vocoder = vocoder

    def forward(self, log_mel: Tensor) -> Tensor:
        return self.vocoder.sound(log_mel, 0, log_mel.shape[1])


def write_program(folder: Path, vocoder: HarmonicGenerator) -> None:
    """``torch.export.load(folder / PROGRAM).module()`` is then ``Vocode``, in float32, for any clips and frames.

    Args:
        vocoder: folded, on the CPU. The same weights give the same bytes.
    """
    whole, example = Vocode(vocoder.eval()), torch.zeros(2, 32, vocoder.architecture.n_mels)
    sizes = {0: torch.export.Dim("clips"), 1: torch.export.Dim("frames", min=LEAST_FRAMES, max=MOST_FRAMES)}
    with torch.no_grad():
        whole(example)  # noise and windows, made once, are constants of the program
        program = torch.export.export(whole, (example,), dynamic_shapes={"log_mel": sizes})
    for module in program.graph_module.modules():  # a part without autocast is one of its own
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names folders of this machine
    folder.mkdir()
    torch.export.save(program, folder / PROGRAM)
