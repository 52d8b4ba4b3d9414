"""The lengths of a manifest's recordings, from the headers of their files, measured once."""

import numpy as np

from omni.common.host import Host
from omni.data.audio import audio_length, resampled_length
from omni.data.manifest import Manifest
from omni.data.measure import measure_rows

LENGTH = np.dtype([("samples", np.int64), ("rate", np.int32)])  # length of a recording in its file
_STATIC_LENGTHS = 4  # number of shapes for torch.compile


def measure_samples(run: Host, manifest: Manifest, sample_rate: int) -> np.ndarray:
    """(rows,) int64 samples of each recording at ``sample_rate``, as many as ``load_audio`` gives; 0 for one that
    cannot be read. The lengths of the files are kept beside the index."""
    return samples_at(measure_rows(run, manifest, "lengths", row_length, LENGTH, column="wav"), sample_rate)


def row_length(manifest: Manifest, row: int) -> tuple[int, int]:
    return audio_length(manifest.file(manifest[row], "wav"))


def samples_at(lengths: np.ndarray, sample_rate: int) -> np.ndarray:
    """(rows,) ``LENGTH`` -> int64 samples at ``sample_rate``."""
    return resampled_length(lengths["samples"], np.maximum(lengths["rate"], 1).astype(np.int64), sample_rate)


def static_lengths(max_mel_length: int) -> list[int]:
    """The padded lengths under ``use_compile``: quarters of ``max_mel_length``, rounded up to multiples of 8."""
    quarters = [-(-max_mel_length * part // _STATIC_LENGTHS) for part in range(1, _STATIC_LENGTHS + 1)]
    return [8 * -(-length // 8) for length in quarters]
