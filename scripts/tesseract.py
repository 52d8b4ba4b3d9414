"""How well does Tesseract read pictures of lines of text? Stage G's figure is compared with this one.

    apt-get install tesseract-ocr
    python scripts/tesseract.py --data data/ocr/ocr.val.csv

Tesseract (Smith 2007, "An Overview of the Tesseract OCR Engine"; version 4 and later: an LSTM) gets each picture as it
reads it best: twice as large, dark on light, with its full contrast, as a single line (--psm 7). Its curly quotation
marks count as straight ones.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jiwer
import numpy as np
from PIL import Image, ImageOps

from omni.common.errors import BadRow, RunError, UserError, reading_row
from omni.common.files import write_json
from omni.common.text import clean_text
from omni.data.images import decoding, to_rgb
from omni.data.open_manifest import load_manifest
from omni.train.cli import OneLineErrors, launch, output_file
from omni.train.evaluation import EvalResult, to_stderr

LANGUAGE = "eng"
QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})


def installed() -> bool:
    """Whether there is a Tesseract that reads English."""
    if not shutil.which("tesseract"):
        return False
    languages = subprocess.run(["tesseract", "--list-langs"], capture_output=True, text=True).stdout
    return LANGUAGE in languages.split()


def prepared(picture: Image.Image) -> Image.Image:
    """A picture as Tesseract reads it best: grey, twice as large, dark letters on a light ground, full contrast."""
    grey = picture.convert("L").resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC)
    pixels = np.asarray(grey)
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    if np.median(border) < pixels.mean():  # the ground is darker than the letters
        grey = ImageOps.invert(grey)
    return ImageOps.autocontrast(grey)


def read(pictures: Iterable[Image.Image]) -> list[str]:
    """The line of text in each picture.

    Raises:
        RunError: Tesseract failed.
    """
    with tempfile.TemporaryDirectory(prefix="omni_tesseract_") as folder:
        files = []
        for i, picture in enumerate(pictures):
            files.append(f"{folder}/{i:06}.png")
            prepared(picture).save(files[-1], compress_level=1)
        if not files:
            return []
        Path(folder, "list.txt").write_text("\n".join(files))
        # one process for all pictures; a form feed stands between their texts
        command = ["tesseract", f"{folder}/list.txt", "stdout", "--psm", "7", "-l", LANGUAGE]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
    texts = [" ".join(text.split()).translate(QUOTES) for text in done.stdout.removesuffix("\f").split("\f")]
    if done.returncode or len(texts) != len(files):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        found = f"code {done.returncode}, {len(texts)} texts of {len(files)} pictures"
        raise RunError(f"tesseract: expected one text for each picture, found {found}; it said: {said}")
    return texts


def character_error_rate(texts: list[str], found: list[str]) -> float:
    """Edits per character of the true texts, as in stage G's validation."""
    return jiwer.process_characters(texts, found).cer


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="CSV with the columns image and text")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the figures there")
    args = parser.parse_args(argv)
    if not installed():
        raise UserError("tesseract: expected to be installed, with English. To have it: apt-get install tesseract-ocr")
    with tempfile.TemporaryDirectory(prefix="omni_tesseract_") as cache:
        manifest = load_manifest(args.data, ("image", "text"), "text", cache_dir=cache, log=to_stderr)
        result, texts = EvalResult(), []

        def pictures() -> Iterator[Image.Image]:
            for row in range(len(manifest)):
                try:
                    with reading_row():
                        sign = manifest[row]
                        text, picture = clean_text(sign["text"]), open_picture(manifest.file(sign, "image"))
                        if not text:
                            raise BadRow("no text")
                except BadRow as error:
                    result.left_out[manifest.where(row)] = str(error)
                    continue
                texts.append(text)
                yield picture

        found = read(pictures())
    result.rows = len(texts)
    result.check_rows(args)
    result.name_left_out()
    exact = sum(ours == text for ours, text in zip(found, texts, strict=True)) / len(texts)
    figures = {"cer": character_error_rate(texts, found), "exact": exact}
    if args.json:
        write_json(args.json, figures)
    left_out = f", {len(result.left_out)} left out" if result.left_out else ""
    print(f"tesseract on {args.data}: {len(texts):,} rows{left_out}")
    for name, value in figures.items():
        print(f"  {name:<23} {value:.4f}")


def open_picture(path: Path) -> Image.Image:
    with decoding(path, "picture"), Image.open(path) as picture:
        return to_rgb(picture)


if __name__ == "__main__":
    launch(main)
