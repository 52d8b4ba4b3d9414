"""The logs of a run: training.log, metrics.jsonl, TensorBoard, and the progress bar."""

import json
import sys
import time
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from omni.common import streams
from omni.common.files import replace_file


class Logs:
    """The logs of ``folder``. Only the first process writes.

    No file is opened before ``open``, so that a finished run changes none; lines logged until then are kept.
    """

    def __init__(self, folder: Path, is_main: bool) -> None:
        self.folder, self.is_main = folder, is_main
        self.bar: tqdm | None = None
        self._stage = ""
        self._log_file = self._metrics_file = self._tensorboard = None
        self._pending: list[str] = []  # lines that wait for training.log to be opened

    def open(self, stage: str, step: int, *, validated: bool, own_folder: bool = False) -> None:
        """Open the files, and drop the rows of metrics.jsonl that ``stage`` logged after ``step``.

        Args:
            validated: keep the row of the validation at ``step``; else that validation runs again.
            own_folder: put this stage's TensorBoard files into a sub-folder.
        """
        if not self.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and a finished run does not need it

        self._stage = stage
        self._log_file = open(self.folder / "training.log", "a", encoding="utf-8", buffering=1)
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _is_row_until(line, stage, step, validated)]
            replace_file(path, lambda file: file.writelines(kept))
        self._metrics_file = open(path, "a", encoding="utf-8", buffering=1)
        folder = self.folder / "tensorboard"
        self._tensorboard = SummaryWriter(folder / stage if own_folder else folder, purge_step=step + 1)
        pending, self._pending = self._pending, []
        for line in pending:
            self.write(line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for stream in (self._tensorboard, self._metrics_file, self._log_file):
            if stream is not None:
                stream.close()
        self.bar = self._tensorboard = self._metrics_file = self._log_file = None

    def log(self, message: str) -> None:
        """Write a line to stdout, and to training.log once it is open."""
        if not self.is_main:
            return
        try:
            with tqdm.external_write_mode(file=sys.stdout):
                print(message, flush=True)
        except OSError as error:
            if error.errno not in streams.GONE:
                raise
            streams.silence(sys.stdout.fileno())  # training.log still has every line
        self.write(message)

    def write(self, message: str) -> None:
        """Write a line to training.log only."""
        if self._log_file is None:
            self._pending.append(message)
        else:
            self._log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def record(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write a row of metrics.jsonl, and the same values to TensorBoard under ``kind/``."""
        if not self.is_main:
            return
        row = {"stage": self._stage, "kind": kind, "step": step, "epoch": epoch} | values
        self._metrics_file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def record_media(
        self, step: int, name: str, sounds: dict[str, Tensor], sample_rate: int, picture: np.ndarray
    ) -> None:
        """Write waveforms (S,) by name and a picture (height, width, 3) uint8 to TensorBoard."""
        if not self.is_main:
            return
        self._tensorboard.add_image(f"{name}/log_mel", picture, step, dataformats="HWC")
        for sound, waveform in sounds.items():
            self._tensorboard.add_audio(f"{name}/{sound}", waveform, step, sample_rate=sample_rate)

    def start_bar(self, total_steps: int, step: int) -> None:
        """Show a progress bar that begins at ``step``, if stderr is a terminal."""
        if self.is_main and sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)


def _is_row_until(line: bytes, stage: str, step: int, validated: bool) -> bool:
    try:
        row = json.loads(line)
        return row["stage"] != stage or row["step"] < step + (validated or row["kind"] != "val")
    except (ValueError, KeyError, TypeError):  # a row that a kill cut short, or no row of metrics
        return False
