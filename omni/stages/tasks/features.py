"""Features of images and recordings, which frozen encoders compute once for each file."""

# I images of N patches, A recordings of F mel frames and U encoder frames, K an encoder's width

from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.data.manifest import Manifest, ManifestDataset
from omni.data.recordings import measure_samples
from omni.models.omni_model import OmniModel
from omni.stages.tasks.base import SftTask
from omni.stages.tasks.processor import Processor
from omni.train.precompute import ManifestWithColumns, RaggedArray, precompute
from omni.train.run import Run


class ImageFiles(ManifestDataset):
    """The images of a manifest with the column image, as the vision encoder reads them."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, processor: Processor, root: str | None) -> None:
        super().__init__(manifest, rows, training=False)
        self.processor, self.root = processor, root

    def read(self, row: dict, rng: None) -> Tensor:
        return self.processor.pixels(self.manifest.file(row, "image", self.root))

    def collate(self, samples: list[Tensor]) -> dict:
        return {"images": torch.stack(samples), "n_targets": len(samples)}


class RecordingFiles(ManifestDataset):
    """The recordings of a manifest with the column wav, as the audio encoder reads them."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, processor: Processor) -> None:
        super().__init__(manifest, rows, training=False)
        self.processor = processor

    def read(self, row: dict, rng: None) -> Tensor:
        return self.processor.log_mels(self.manifest.file(row, "wav"))

    def collate(self, samples: list[Tensor]) -> dict:
        return self.processor.collate.features(samples) | {"n_targets": len(samples)}


def cache_features(run: Run, model: OmniModel, processor: Processor, tasks: list[SftTask]) -> None:
    """Add cached features of images and recordings as columns to the manifests of all tasks."""
    for encoder in model.encoders:
        encoder.eval()  # as in training, where they are frozen
    for kind, column, compute in (("image", "patches", image_features), ("audio", "frames", audio_features)):
        by_file: dict[tuple, list[Any]] = {}
        for reader in (reader for task in tasks for reader in task.readers(kind)):
            root = reader.image_root if kind == "image" else None
            readers = by_file.setdefault((reader.manifest.path, root), [])
            if reader not in readers:
                readers.append(reader)
        for (_, root), readers in by_file.items():
            rows = np.unique(np.concatenate([reader.row_numbers for reader in readers]))
            features = compute(run, model, processor, readers[0].manifest, rows, root)
            for reader in readers:
                reader.manifest = ManifestWithColumns(reader.manifest, {column: features})


def image_features(
    run: Run, model: OmniModel, processor: Processor, manifest: Manifest, rows: np.ndarray, root: str | None
) -> RaggedArray:
    """(N, K) float16 of each image in ``rows`` of a manifest, cached in ``save_dir``; empty for a broken one."""

    def make(batch: dict) -> list[np.ndarray]:
        with torch.no_grad(), run.autocast():
            return list(model.encode_images(batch["images"].to(run.device)).half().cpu().numpy())

    files = ImageFiles(manifest, rows, processor, root)
    return _cached(run, "vision_encoder", files, make, "image", root, note="encoding images")


def audio_features(
    run: Run, model: OmniModel, processor: Processor, manifest: Manifest, rows: np.ndarray, root: None = None
) -> RaggedArray:
    """(U, K) float16 of each recording in ``rows`` of a manifest, cached in ``save_dir``; empty for a broken one."""

    def make(batch: dict) -> list[np.ndarray]:
        with torch.no_grad(), run.autocast():
            frames, lengths = model.encode_audio(batch["features"].to(run.device), batch["lengths"].to(run.device))
        found = frames.half().cpu().numpy()
        return [one[:length] for one, length in zip(found, lengths.tolist(), strict=True)]

    samples = measure_samples(run, manifest, processor.mel.sample_rate)
    rows = rows[np.argsort(samples[rows], kind="stable")]  # the shortest first
    files = RecordingFiles(manifest, rows, processor)
    return _cached(run, "audio_encoder", files, make, "wav", root, note="encoding recordings")


def _cached(run: Run, part: str, rows: ManifestDataset, make, column: str, root: str | None, note: str) -> RaggedArray:
    sizes = getattr(rows.processor.architecture, part).model_dump()
    belongs_to = {"encoder": run.config.origins[part], "sizes": sizes}
    name = f"{part}-{rows.manifest.sha256[:12]}"
    return precompute(run, name, rows, column, belongs_to, make, root=root, note=note)
