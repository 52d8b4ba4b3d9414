"""Stage G: config, rows, loss, character error rate, character set, and loading of the model."""

# B pictures, T symbols, U columns of patches, C characters

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from omni.common.caches import set_aside
from omni.common.errors import BadRow, UserError, reading_row
from omni.common.files import read_sealed_json, write_sealed_json
from omni.common.text import clean_text
from omni.data.images import load_image
from omni.data.manifest import Manifest, ManifestDataset
from omni.data.measure import measure_rows
from omni.data.tokenizer import IGNORE_INDEX
from omni.models.architectures import OcrArchitecture
from omni.models.ctc import ctc_nll
from omni.models.ocr import END, OcrModel, read_text, start_symbol
from omni.train.config import OCR_HINT, Files, StageConfig, input_files, resumable
from omni.train.run import Run
from omni.train.stage import ExportedPart, Stage


class OcrConfig(OcrArchitecture, StageConfig):
    """Stage G, ``train_ocr.py``."""

    train_csv: Files = input_files(
        hint=OCR_HINT, description="pictures with texts (columns image, text), as in docs/data.md"
    )
    val_csv: Files | None = input_files(
        None, hint=OCR_HINT, description="held-out CSV; default: val_split of train_csv's rows"
    )
    image_root: str | None = resumable(None, description="folder of the images; default: that of the CSV")
    characters: str | None = Field(
        None, min_length=1, description="characters that the model can write; default: those of the training texts"
    )

    @property
    def architecture(self) -> OcrArchitecture:
        """Valid once ``characters`` is set."""
        return OcrArchitecture.of(self)


STAGE = Stage(
    name="ocr",
    prefix="ocr",
    final="ocr.pt",
    unit="characters",
    best_metric="cer",
    config_name="ocr",
    exports=(
        ExportedPart(
            "ocr",
            "reads pictures of text",
            "--ocr_ckpt",
            alone=True,
            figures=("cer", "exact"),
            command="python infer_chat.py --ckpt_dir merged_model --ocr --image sign.png",
        ),
    ),
    letter="G",
    script="train_ocr.py",
    config=OcrConfig,
    architecture=OcrArchitecture,
    model=OcrModel,
    options=("show", "num_workers", "image_root"),
    evaluate="omni.stages.evaluation:evaluate_ocr",
)


# ---------------------------------------------------------------------------------------------------------------
# Rows


def text_length(manifest: Manifest, row: int) -> int:
    """Characters of a row's text, for ``measure_rows``."""
    return len(clean_text(manifest[row]["text"]))


def encode_texts(texts: Sequence[str], arch: OcrArchitecture, pad_to: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts as the decoder's inputs and targets.

    A character outside the set is the input symbol ``unknown`` and no target: the model cannot write it. Validation
    compares texts, so it counts such a character as an error.

    Args:
        pad_to: length of the result; default: 1 more than the longest text.

    Returns:
        symbols (B, T): start, characters, padding; targets (B, T): characters, end, -100 as padding.
    """
    characters = {character: symbol for symbol, character in enumerate(arch.characters, start=1)}
    start, unknown = start_symbol(arch), start_symbol(arch) + 1
    length = pad_to or max(map(len, texts)) + 1
    symbols, targets = torch.full((len(texts), length), END), torch.full((len(texts), length), IGNORE_INDEX)
    for line, text in enumerate(texts):
        written = [characters.get(character, unknown) for character in text]
        symbols[line, : len(text) + 1] = torch.tensor([start, *written])
        targets[line, : len(text) + 1] = torch.tensor([IGNORE_INDEX if s == unknown else s for s in written] + [END])
    return symbols, targets


class OcrRows(ManifestDataset):
    """Pictures of lines with their texts. A sample is a uint8 picture (3, height, width) and its text."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, config: OcrConfig, **keys) -> None:
        super().__init__(manifest, rows, **keys)
        self.config = config
        # one length for compilation
        self.pad_to = config.max_text_length + 1 if config.use_compile else None

    def read(self, row: dict, rng: np.random.Generator | None) -> tuple[Tensor, str]:
        text, config = clean_text(row["text"]), self.config
        if len(text) > config.max_text_length:
            raise BadRow(f"expected a text of at most {config.max_text_length} characters, found {len(text)}")
        path = self.manifest.file(row, "image", config.image_root)
        return load_image(path, config.height, config.width, fit="pad"), text

    def collate(self, samples: list[tuple[Tensor, str]]) -> dict:
        """``images`` (B, 3, height, width) uint8, ``symbols`` and ``targets`` (B, T), ``texts``."""
        images, texts = zip(*samples, strict=True)
        symbols, targets = encode_texts(texts, self.config, self.pad_to)
        batch = {"images": torch.stack(images), "symbols": symbols, "targets": targets, "texts": texts}
        return batch | {"n_targets": int((targets != IGNORE_INDEX).sum())}


# ---------------------------------------------------------------------------------------------------------------
# Loss and metrics


def ocr_loss(model: nn.Module, batch: dict, ctc_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss, (), float32, in nats per target; and its parts, to log.

    The cross-entropy of the characters and the end, plus ``ctc_weight`` times the CTC loss of the encoder alone, which
    teaches each column its character long before the decoder has learnt where to attend. Watanabe et al. 2017, "Hybrid
    CTC/Attention Architecture".
    """
    logits, columns = model(batch["images"], batch["symbols"])
    nats = cross_entropy(logits, batch["targets"])
    if columns is None:
        return nats, {}
    ctc = column_loss(columns, batch["targets"])
    return nats + ctc_weight * ctc, {"cross_entropy": nats, "ctc": ctc}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that count, in float32. logits (B, T, 1 + C), targets (B, T) -> ()."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)


def column_loss(columns: Tensor, targets: Tensor) -> Tensor:
    """CTC's negative log-likelihood of the texts, as a mean over the same targets as ``cross_entropy``, ().

    A text that is too long for the columns, or has a character outside the set, does not count.
    """
    characters = targets > END  # (B, T)
    lengths = characters.sum(dim=1)
    repeats = ((targets[:, 1:] == targets[:, :-1]) & characters[:, 1:]).sum(dim=1)  # each repeat needs a blank
    known = targets.gather(1, lengths[:, None])[:, 0] == END  # else an unknown character precedes the end
    fits = known & (lengths + repeats <= columns.shape[1])
    lengths = torch.where(fits, lengths, 0)
    frames = torch.full_like(lengths, columns.shape[1])
    nll = ctc_nll(columns, frames, (targets - 1).clamp(min=0), lengths)  # (B,)
    return (nll * fits).sum() / (targets != IGNORE_INDEX).sum()


def ocr_sums(model: OcrModel, batch: dict) -> dict[str, Tensor]:
    """Sums over a batch: the loss under teacher forcing, and the errors of greedy decoding."""
    read = read_text(model, batch["images"])
    counted = jiwer.process_characters(list(batch["texts"]), read)
    targets = (batch["targets"] != IGNORE_INDEX).sum()
    logits, _ = model(batch["images"], batch["symbols"])
    return {
        "nats": cross_entropy(logits, batch["targets"]) * targets,
        "targets": targets,
        "edits": torch.tensor(counted.substitutions + counted.deletions + counted.insertions),
        "characters": torch.tensor(counted.hits + counted.substitutions + counted.deletions),
        "exact": torch.tensor(sum(ours == text for ours, text in zip(read, batch["texts"], strict=True))),
        "lines": torch.tensor(len(read)),
    }


def ocr_metrics(totals: dict[str, float]) -> dict[str, float]:
    """``cer``: edits per character of the true texts; ``exact``: share of lines without an error."""
    return {
        "loss": totals["nats"] / totals["targets"],
        "cer": totals["edits"] / totals["characters"],
        "exact": totals["exact"] / totals["lines"],
    }


# ---------------------------------------------------------------------------------------------------------------
# Characters


def leave_out_long_texts(run: Run, manifest: Manifest, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``rows`` without those whose text is longer than ``max_text_length``, and the lengths of the texts that stay."""
    limit = run.config.max_text_length
    lengths = measure_rows(run, manifest, "text_length", text_length, np.int32)[rows]
    long = lengths > limit
    reason = f"texts longer than max_text_length {limit}"
    return manifest.leave_out(rows, long, reason, run.log), lengths[~long]


def prepare_characters(run: Run, train: tuple[Manifest, np.ndarray], held_out: tuple[Manifest, np.ndarray]) -> str:
    """The characters that the model can write, cached in ``save_dir``: the key ``characters``, or those of the
    training texts. Logs all other characters of the texts when it collects them."""
    path, given = run.save_dir / "characters.json", run.config.characters
    with run.main_process_first():
        if run.is_main and read_sealed_json(path) is None:
            if os.path.lexists(path):
                run.log(f"{path}: damaged, or of an earlier version: made again")
                set_aside(path)
            counts = count_characters(run, *train)
            known = set(given or counts)
            for texts, found in (("training", counts), ("held-out", count_characters(run, *held_out))):
                if unknown := {c: n for c, n in sorted(found.items()) if c not in known}:
                    run.log(
                        f"{sum(unknown.values())} characters of the {texts} texts are none of the {len(known)} that "
                        f"the model can write, each counts as an error: {json.dumps(unknown, ensure_ascii=False)}"
                    )
            write_sealed_json(path, {"characters": "".join(sorted(known))})
        characters = read_sealed_json(path)["characters"]
    if given and set(given) != set(characters):
        raise UserError(f'{path}: holds other characters than key "characters". Use a new save_dir')
    return characters


def count_characters(run: Run, manifest: Manifest, rows: np.ndarray) -> Counter:
    """Count each character in the texts of ``rows``. Training reports bad rows."""
    counts = Counter()
    for row in rows:
        run.check_stop()
        with contextlib.suppress(BadRow), reading_row():
            counts.update(clean_text(manifest[row]["text"]))
    return counts
