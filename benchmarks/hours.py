"""The arithmetic behind docs/configs.md: what the _tiny configs compute, and how long cards take for it.

    python benchmarks/hours.py

Counts the floating-point operations of one sample's forward pass with torch's counter; a training step costs three
times as much for trained models (forward, and twice that backward) and once for frozen ones. Hours are these by the
card's matrix rate in bf16 and the share of it that such small models reach, so they are no measurements.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tiny_steps import CAPTION, CONFIGS, SIGN_CHARACTERS, SPEECH_S, TALKER_S, config_of
from omni.models.audio_encoder import AudioEncoder
from omni.models.codec import Codec
from omni.models.ocr import OcrModel
from omni.models.picture_text import PictureTextModel
from omni.models.talker import Talker
from omni.models.thinker import Thinker
from omni.models.vocoder import Discriminators, Generator
from omni.train.cli import OneLineErrors, launch

TFLOPS = {"RTX 4070": 58.3, "RTX 3060": 25.6}  # NVIDIA's data sheets: dense bf16, sums in float32
SHARE = 0.25  # of the matrix rate; bench.py measures 7 to 16 % on CPUs
CONVERSATION = 120  # positions of stage E's sample, placeholders of a picture included


def flops(call) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())


def samples() -> dict[str, tuple[float, int]]:
    """Part -> (operations of a training sample, samples of the whole training)."""
    text, audio = config_of("text"), config_of("audio_enc")
    vision, talker, vocoder = (
        config_of("vision"),
        config_of("talker"),
        config_of("vocoder"),
    )
    ocr, omni = config_of("ocr"), json.loads((CONFIGS / "omni_sft_tiny.json").read_text())

    thinker = Thinker(text.architecture)
    one_text = flops(lambda: thinker(torch.zeros(1, text.ctx_len, dtype=torch.int64)))
    frames = int(SPEECH_S * audio.sample_rate / audio.frame_hop)
    encoder = AudioEncoder(audio.architecture)
    one_speech = flops(lambda: encoder(torch.zeros(1, frames, audio.mel_bins), torch.tensor([frames])))
    pictures = PictureTextModel(vision.architecture)
    image = torch.zeros(1, 3, vision.img_size, vision.img_size)
    caption = torch.zeros(1, CAPTION, dtype=torch.int64)
    one_picture = flops(lambda: pictures(image, caption, torch.tensor([CAPTION - 1])))
    vit = flops(lambda: pictures.vit(image))
    per_code = talker.frame_ms * talker.sample_rate // 1000 // talker.frame_hop
    codes = int(TALKER_S * 1000 / talker.frame_ms)
    codec, speaker = Codec(talker.codec.architecture), Talker(talker.architecture)
    mels = torch.zeros(1, codes * per_code, talker.n_mels)
    one_codec = flops(lambda: codec(mels, torch.tensor([codes * per_code])))
    letters = 100
    one_talker = flops(
        lambda: speaker(
            torch.zeros(1, letters, dtype=torch.int64), torch.tensor([letters]),
            torch.zeros(1, codes, talker.codebooks, dtype=torch.int64),
            torch.full((1, letters), codes // letters + 1),
        )
    )  # fmt: skip
    segment = vocoder.segment_samples // vocoder.hop_length
    generator, judges = Generator(vocoder.architecture), Discriminators(vocoder.discriminators)
    one_segment = flops(lambda: generator(torch.zeros(1, segment, vocoder.n_mels)))
    judged = flops(lambda: judges(torch.zeros(1, vocoder.segment_samples)))
    ocr = ocr.model_copy(update={"characters": "abcdefghijklmnopqrstuvwxyz0123456789"})
    reader = OcrModel(ocr.architecture)
    sign = torch.zeros(1, 3, ocr.img_height, ocr.img_width, dtype=torch.uint8)
    one_sign = flops(lambda: reader(sign, torch.zeros(1, SIGN_CHARACTERS, dtype=torch.int64)))
    conversation = 3 * one_text * CONVERSATION / text.ctx_len
    return {
        "A": (3 * one_text, text.max_steps * text.batch_size),
        "B": (3 * one_speech, audio.max_steps * audio.batch_size),
        "C": (3 * one_picture, vision.max_steps * vision.batch_size),
        "D codec": (3 * one_codec, talker.codec_steps * talker.codec_batch_size),
        "D talker": (3 * one_talker, talker.max_steps * talker.batch_size),
        # half of the samples have a picture, a quarter a recording
        "E": (conversation + vit / 2 + one_speech / 4, omni["max_steps"] * omni["batch_size"]),
        # the discriminators see both waveforms, forward and back, and those of the generator once more
        "F": (3 * one_segment + 3 * 2 * judged + 4 * judged, vocoder.max_steps * vocoder.batch_size),
        "G": (3 * one_sign, ocr.max_steps * ocr.batch_size),
    }


def main(argv: list[str] | None = None) -> None:
    OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    torch.manual_seed(0)
    print(f"| part | GFLOP a sample | samples | EFLOP | {' | '.join(f'{card}, h' for card in TFLOPS)} |")
    print(f"| --- | --- | --- | --- | {' | '.join('---' for _ in TFLOPS)} |")
    for part, (operations, count) in samples().items():
        hours = (operations * count / (rate * 1e12 * SHARE) / 3600 for rate in TFLOPS.values())
        cells = " | ".join(f"{one:.1f}" for one in hours)
        print(f"| {part} | {operations / 1e9:,.1f} | {count / 1e6:.2f} M | {operations * count / 1e18:.2f} | {cells} |")


if __name__ == "__main__":
    launch(main)
