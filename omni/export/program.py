"""A vocoder with ``harmonic_source`` as a program of ``torch.export``, which PyTorch runs without this repository."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from omni.export.folder import PROGRAM
from omni.models.vocoder import HarmonicGenerator

LEAST_FRAMES, MOST_FRAMES = 3, 1 << 20  # for torch.export a size of 0 or 1 is special, also that of frames less one


class Vocode(nn.Module):
    """Log-mels (B, T, M), T at least ``LEAST_FRAMES``, -> waveforms (B, T * hop_length)."""

    def __init__(self, vocoder: HarmonicGenerator) -> None:
        super().__init__()
        self.vocoder = vocoder

    def forward(self, log_mel: Tensor) -> Tensor:
        return self.vocoder.sound(log_mel, 0, log_mel.shape[1])


def write_program(folder: Path, vocoder: HarmonicGenerator) -> None:
    """``torch.export.load(folder / PROGRAM).module()`` is then ``Vocode``, on the CPU in float32, for any clips and
    frames; ``torch.export.passes.move_to_device_pass`` moves it.

    Args:
        vocoder: folded, on the CPU. The same weights give the same bytes.
    """
    whole, example = Vocode(vocoder.eval()), torch.zeros(2, 32, vocoder.architecture.n_mels)
    sizes = {0: torch.export.Dim("clips"), 1: torch.export.Dim("frames", min=LEAST_FRAMES, max=MOST_FRAMES)}
    with torch.no_grad():
        whole(example)  # makes noise and windows, which are constants of the program: it cannot draw noise itself
        program = torch.export.export(whole, (example,), dynamic_shapes={"log_mel": sizes})
    for module in program.graph_module.modules():  # a part without autocast is one of its own
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names folders of this machine
    file = io.BytesIO()
    torch.export.save(program, file)
    folder.mkdir()
    (folder / PROGRAM).write_bytes(file.getbuffer())  # on a full disk torch's own writer would end the process
