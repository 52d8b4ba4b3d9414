"""Signs: pictures of a line of text to read."""

import numpy as np

from omni.common.text import clean_text
from omni.stages.tasks.base import SftTask, one_of, sft_task, turn


@sft_task
class Signs(SftTask):
    """Pictures of a line of text to read."""

    name, file_key, columns = "sign", "ocr_csv", ("image", "text")
    reads, needs = ("image",), ("vision_ckpt",)
    wordings = ("Read the text in the picture.", "What is written in the picture?")
    measure, image_root = "one_minus_cer", None

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        return turn(clean_text(row["text"]), self.image(row), one_of(self.wordings, rng))
