"""Pictures of one line of text, read by the OCR model that a folder holds."""

from pathlib import Path

import torch

from omni.common.errors import BadRow, UserError
from omni.common.media import Media
from omni.data.images import load_image
from omni.export.bundle import Merged, has_part, is_merged
from omni.models.ocr import Ocr, load_ocr, read_text


def load_reader(folder: Path, ocr_ckpt: Path | None, device: torch.device) -> Ocr:
    """The OCR model of ``ocr_ckpt`` (stage G), else of ``folder``, which is stage G's or an export.

    Raises:
        UserError: there is none, or it is damaged.
    """
    source = ocr_ckpt or folder
    if ocr_ckpt is None and not is_merged(folder) and not has_part(folder, "ocr"):
        raise UserError(f"{folder}: expected ocr.pt, found none. Give the folder of stage G as --ocr_ckpt")
    return Merged(source).part("ocr", device) if is_merged(source) else load_ocr(source, device)


def read_picture(reader: Ocr, path: Media) -> str:
    """The text of a picture file of one line of text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        picture = load_image(path, reader.architecture.height, reader.architecture.width, fit="pad")
    except BadRow as error:
        raise UserError(str(error)) from error
    return read_text(reader, picture[None].to(next(reader.parameters()).device))[0]
