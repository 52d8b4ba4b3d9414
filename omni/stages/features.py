"""What frozen encoders make of pictures and recordings: computed once of every file, not anew in every epoch."""

# I pictures of N patches, A recordings of F mel frames and U encoder frames, K an encoder's width

import numpy as np
import torch
from torch import Tensor

from omni.common.errors import BadRow
from omni.data.manifest import Manifest, ManifestDataset
from omni.data.recordings import measure_samples
from omni.models.omni_model import Inputs, OmniModel
from omni.train.precompute import RaggedArray, precompute
from omni.train.run import Run


class PictureFiles(ManifestDataset):
    """The pictures of a manifest with the column image, as the vision encoder reads them."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, inputs: Inputs, root: str | None) -> None:
        super().__init__(manifest, rows, training=False)
        self.inputs, self.root = inputs, root

    def read(self, row: dict, rng: None) -> Tensor:
        return self.inputs.pixels(self.manifest.file(row["image"], self.root))

    def collate(self, samples: list[Tensor]) -> dict:
        return {"images": torch.stack(samples), "n_targets": len(samples)}


class SoundFiles(ManifestDataset):
    """The recordings of a manifest with the column wav, as the audio encoder reads them."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, inputs: Inputs) -> None:
        super().__init__(manifest, rows, training=False)
        self.inputs = inputs

    def read(self, row: dict, rng: None) -> Tensor:
        return self.inputs.mels(self.manifest.file(row["wav"]))

    def collate(self, samples: list[Tensor]) -> dict:
        return self.inputs.pad_sounds(samples) | {"n_targets": len(samples)}


def features_of_pictures(
    run: Run, model: OmniModel, inputs: Inputs, manifest: Manifest, rows: np.ndarray, root: str | None
) -> RaggedArray:
    """(N, K) float16 of each picture in ``rows`` of a manifest, kept in ``save_dir``; nothing of a broken one."""

    def make(batch: dict) -> list[np.ndarray]:
        with torch.no_grad(), run.autocast():
            return list(model.encode_images(batch["images"].to(run.device)).half().cpu().numpy())

    files = PictureFiles(manifest, rows, inputs, root)
    return _keep(run, "vision_encoder", files, make, "image", root, note="looking at pictures")


def features_of_sounds(run: Run, model: OmniModel, inputs: Inputs, manifest: Manifest, rows: np.ndarray) -> RaggedArray:
    """(U, K) float16 of each recording in ``rows`` of a manifest, kept in ``save_dir``; nothing of a broken one."""

    def make(batch: dict) -> list[np.ndarray]:
        with torch.no_grad(), run.autocast():
            frames, lengths = model.encode_audio(batch["features"].to(run.device), batch["lengths"].to(run.device))
        found = frames.half().cpu().numpy()
        return [one[:length] for one, length in zip(found, lengths.tolist(), strict=True)]

    samples = measure_samples(run, manifest, inputs.mel.sample_rate)
    rows = rows[np.argsort(samples[rows], kind="stable")]  # the shortest first
    files = SoundFiles(manifest, rows, inputs)
    return _keep(run, "audio_encoder", files, make, "wav", None, note="listening to recordings")


def _keep(run: Run, part: str, rows: ManifestDataset, make, column: str, root: str | None, note: str) -> RaggedArray:
    depends_on = {"encoder": run.config.origins[part], "sizes": run.config.parts[part]}
    name = f"{part}-{rows.manifest.sha256[:12]}"
    return precompute(run, name, rows, column, depends_on, make, root=root, note=note)


def cached_or_read(found: np.ndarray, path, read) -> Tensor:
    """What was kept of a file.

    Raises:
        BadRow: nothing, since the file could not be read; ``read`` it to say why.
    """
    if not len(found):
        read(path)
        raise BadRow(f"{path}: could not be read when the run began, now it can. Use a new save_dir")
    return torch.from_numpy(np.array(found))
