"""Pictures of one line of text, read by the OCR model that a folder holds."""

from pathlib import Path

import torch

from omni.common.errors import BadRow, UserError
from omni.common.media import Media
from omni.data.images import load_image
from omni.export.bundle import open_model, source_of
from omni.models.ocr import OcrModel, read_text


def load_reader(folder: Path, ocr_ckpt: Path | None, device: torch.device) -> OcrModel:
    """The OCR model of ``ocr_ckpt`` (stage G), else of ``folder``, which is stage G's or an export.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return open_model("ocr", source_of("ocr", ocr_ckpt, folder), device).model


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
