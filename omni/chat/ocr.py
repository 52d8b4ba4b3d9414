"""Pictures of one line of text, read by the OCR model that a folder holds."""

from pathlib import Path

import torch

from omni.common.errors import BadRow, UserError
from omni.common.media import Media
from omni.data.images import load_image
from omni.export.bundle import Export, source_of
from omni.export.folder import is_export
from omni.models.ocr import OcrModel, read_text
from omni.stages.ocr import load_ocr


def load_reader(folder: Path, ocr_ckpt: Path | None, device: torch.device) -> OcrModel:
    """The OCR model of ``ocr_ckpt`` (stage G), else of ``folder``, which is stage G's or an export.

    Raises:
        UserError: there is none, or it is damaged.
    """
    source = source_of("ocr", ocr_ckpt, folder)
    return Export(source).part("ocr", device) if is_export(source) else load_ocr(source, device)


def read_picture(reader: OcrModel, path: Media) -> str:
    """The text of a picture file of one line of text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        picture = load_image(path, reader.architecture.height, reader.architecture.width, fit="pad")
    except BadRow as error:
        raise UserError(str(error)) from error
    return read_text(reader, picture[None].to(next(reader.parameters()).device))[0]
