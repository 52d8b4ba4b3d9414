"""Stage G: its config."""

from omni.models.architectures import OcrArchitecture
from omni.train.config import OCR_HINT, StageConfig, input_file, resumable
from omni.train.stage import ExportedPart, Stage


class OcrConfig(OcrArchitecture, StageConfig):
    """Stage G, ``train_ocr.py``."""

    train_csv: str = input_file(hint=OCR_HINT, description="CSV with the columns image and text")
    val_csv: str | None = input_file(
        None, hint=OCR_HINT, description="held-out CSV; default: val_split of train_csv's rows"
    )
    image_root: str | None = resumable(None, description="folder of the images; default: that of the CSV")


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
            figures=("cer", "exact"),
            command="python infer_chat.py --ckpt_dir merged_model --ocr --image sign.png",
        ),
    ),
    letter="G",
    script="train_ocr.py",
    config=OcrConfig,
)
