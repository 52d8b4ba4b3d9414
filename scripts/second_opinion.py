"""What does a recogniser that is none of ours hear in recordings, or in what the talker said?

    python scripts/evaluate.py talker --ckpt_dir checkpoints/talker_demo --data data/audio/tts.val.csv \\
        --save_speech speech
    python scripts/second_opinion.py --csv speech/talker.csv

PocketSphinx (pip install pocketsphinx) with its own acoustic model of American English, and a bigram model of other
texts of the same kind, by default those of the built-in recordings: it knows their words and no others. Prints its
word error rate.
"""

import argparse
import json
import math
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from omni.common.errors import BadRow, UserError, reading_row
from omni.data.audio import load_audio
from omni.data.manifest import load_manifest
from omni.models.ctc import normalise_text
from omni.stages.audio_encoder import COLUMNS, error_counts, read_text
from omni.train.cli import OneLineErrors, launch

DISCOUNT = 0.5  # taken from every bigram's count, for those that were never seen
SAMPLE_RATE = 16_000
DITHER = 1e-3  # digital silence has no logarithm


def bigrams(sentences: list[str]) -> str:
    """A bigram model of the sentences in the ARPA format. Ney et al. 1994: absolute discounting, with back-off."""
    pairs: dict[str, Counter] = defaultdict(Counter)
    for sentence in sentences:
        words = ["<s>", *sentence.split(), "</s>"]
        for before, word in zip(words, words[1:], strict=False):
            pairs[before][word] += 1
    counts = sum(pairs.values(), Counter())
    total = counts.total()
    unigrams, lines = {word: count / total for word, count in counts.items()}, []
    back_off = {}
    for before, following in pairs.items():
        n = following.total()
        lines += [f"{math.log10((count - DISCOUNT) / n):.4f} {before} {word}" for word, count in following.items()]
        unseen = max(1e-9, 1 - sum(unigrams[word] for word in following))
        back_off[before] = math.log10(DISCOUNT * len(following) / n / unseen)
    head = [f"-99 <s> {back_off['<s>']:.4f}"]
    head += [f"{math.log10(p):.4f} {word} {back_off.get(word, 0.0):.4f}" for word, p in unigrams.items()]
    sizes = f"ngram 1={len(head)}\nngram 2={len(lines)}"
    return "\n".join(["\\data\\", sizes, "", "\\1-grams:", *head, "", "\\2-grams:", *lines, "", "\\end\\", ""])


class Sphinx:
    """PocketSphinx with the words and bigrams of some texts."""

    def __init__(self, folder: Path, texts: list[str]) -> None:
        try:
            from pocketsphinx import Decoder  # not among the requirements: only this script asks it
        except ImportError as error:
            raise UserError("expected PocketSphinx: pip install pocketsphinx") from error
        path = folder / "texts.arpa"
        path.write_text(bigrams(texts))
        self.decoder = Decoder(lm=str(path), samprate=SAMPLE_RATE, loglevel="FATAL")

    def transcribe(self, waveform: np.ndarray) -> str:
        """What is said in (S,) float32 at SAMPLE_RATE."""
        noise = np.random.RandomState(0).standard_normal(len(waveform)) * DITHER
        samples = np.clip((waveform + noise) * 32767, -32768, 32767).astype(np.int16)
        self.decoder.start_utt()
        self.decoder.process_raw(samples.tobytes(), full_utt=True)
        self.decoder.end_utt()
        heard = self.decoder.hyp()
        return heard.hypstr if heard is not None else ""


def known_texts(path: Path, folder: str) -> list[str]:
    """The texts of a manifest, as words."""
    manifest, texts = load_manifest(path, ("text",), "text", cache_dir=folder, log=lambda line: None), []
    for row in range(len(manifest)):
        try:
            texts.append(normalise_text(manifest[row]["text"]))
        except BadRow as error:
            print(f"{manifest.where(row)}: {error}. Left out", file=sys.stderr)
    return [text for text in texts if text]


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True, type=Path, help="manifest with the columns wav and text")
    parser.add_argument(
        "--texts", type=Path, default=Path("data/audio/asr.csv"), metavar="CSV",
        help="manifest with the column text, of other sentences with the same words (default: data/audio/asr.csv)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="transcribe the first N rows only")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N texts beside what was heard")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    for name in ("csv", "texts"):
        if not getattr(args, name).is_file():
            raise UserError(f"--{name} {getattr(args, name)}: expected a file, found none")
    for name, least in (("limit", 1), ("show", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name}: expected at least {least}, found {getattr(args, name)}")
    with tempfile.TemporaryDirectory(prefix="omni_sphinx_") as folder:
        sphinx = Sphinx(Path(folder), known_texts(args.texts, folder))
        manifest = load_manifest(args.csv, COLUMNS, "text", cache_dir=folder, log=lambda line: None)
        texts, heard, left_out = [], [], {}
        for row in tqdm(range(min(len(manifest), args.limit or len(manifest))), disable=None):
            try:
                with reading_row():
                    fields = manifest[row]
                    text, waveform = read_text(fields), load_audio(manifest.file(fields["wav"]), SAMPLE_RATE)
            except BadRow as error:
                left_out[manifest.where(row)] = str(error)
                continue
            texts.append(text)
            heard.append(sphinx.transcribe(waveform))
    for where, why in left_out.items():
        print(f"{where}: {why}. Left out", file=sys.stderr)
    if not texts:
        raise UserError(f"{args.csv}: not one of its rows can be used")
    (errors, words), _ = error_counts(texts, heard)
    if args.json:
        print(
            json.dumps(
                {
                    "csv": str(args.csv),
                    "rows": len(texts),
                    "rows_left_out": len(left_out),
                    "words": words,
                    "wer": errors / words,
                }
            )
        )
        return
    for text, words_heard in list(zip(texts, heard, strict=True))[: args.show]:
        print(f"true   {text}\nheard  {words_heard}\n")
    print(f"{args.csv}: {len(texts)} recordings, {words} words, word error rate {errors / words:.4f}")


if __name__ == "__main__":
    launch(main)
