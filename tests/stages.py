"""The table of stages. A new stage is one more row, and every promise is tested on it."""

import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from harness import Training
from PIL import Image
from torch import nn

from omni.data.tokenizer import Tokenizer
from omni.models.aligner import Aligner
from omni.models.audio_encoder import AudioEncoder
from omni.models.codec import Codec
from omni.models.ctc import CtcTokenizer
from omni.models.picture_text import PictureTextModel
from omni.models.talker import Talker
from omni.models.thinker import Thinker
from omni.stages.audio_encoder import AudioEncoderConfig
from omni.stages.talker import AlignerConfig, CodecConfig, TalkerConfig
from omni.stages.text import TextConfig
from omni.stages.vision import VisionConfig
from omni.train import checkpoint
from omni.train.config import StageConfig

WORDS = ["one", "two", "red", "green", "blue", "round", "square", "big", "small", "cat", "dog", "runs", "near"]


@dataclass(frozen=True)
class StageCase:
    name: str
    script: str
    prefix: str
    final: str
    config: dict  # sizes for a training of seconds, with several epochs
    make_data: Callable[[Path], dict]  # writes data into a folder, returns the config keys that point to it
    size_key: str  # a key that sets the model's size
    data_key: str  # the key that names the data file
    contrastive: bool = False  # the loss of a micro-batch is not the mean over its samples
    whole: dict = field(default_factory=dict)  # parts that take as long as all else, for tests that may depend on them
    draws: bool = True  # training draws random numbers, beside those that are keyed by the row

    def training(self, folder: Path, *, save_dir: str = "run", **keys) -> Training:
        """This stage in ``folder``; the data are made there when first asked for."""
        keys = {key: value for key, value in keys.items() if key != "dropout" or key in self.config}  # not all have it
        config = self.config | self.make_data(folder) | {"save_dir": str(folder / save_dir)} | keys
        return Training(self.script, self.prefix, self.final, folder, config)


def make_text(folder: Path, lines: int = 24) -> dict:
    path = folder / "corpus.txt"
    if not path.exists():
        rng = random.Random(5)
        path.write_text("".join(" ".join(rng.choices(WORDS, k=rng.randint(6, 14))) + "\n" for _ in range(lines)))
    return {"train_text": str(path)}


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make_speech(folder: Path, clips: int = 24) -> dict:
    """A noisy tone per word, which CTC can learn."""
    path = folder / "asr.csv"
    if not path.exists():
        rng, rows = np.random.default_rng(5), []
        for i in range(clips):
            words = list(rng.choice(WORDS, rng.integers(2, 4)))
            tones = [np.sin(np.arange(6000) * (0.1 + 0.05 * WORDS.index(word))) for word in words]
            waveform = 0.3 * np.concatenate(tones)[: rng.integers(9000, 12001)]
            soundfile.write(folder / f"{i}.wav", waveform + 0.01 * rng.standard_normal(len(waveform)), 16_000)
            rows.append({"wav": f"{i}.wav", "text": " ".join(words)})
        write_csv(path, rows)
    return {"train_csv": str(path)}


def make_images(folder: Path, images: int = 24) -> dict:
    path = folder / "annotations.json"
    if not path.exists():
        rng, rows = np.random.default_rng(5), []
        for i in range(images):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            rows.append({"image": f"{i}.png", "caption": " ".join(rng.choice(WORDS, rng.integers(2, 6)))})
        path.write_text(json.dumps(rows))
    return {"train_manifest": str(path), "image_root": str(folder)}


def make_signs(folder: Path, signs: int = 24) -> dict:
    path = folder / "ocr.csv"
    if not path.exists():
        rng, rows = np.random.default_rng(5), []
        for i in range(signs):
            Image.fromarray(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            rows.append({"image": f"{i}.png", "text": str(rng.choice(WORDS))})
        write_csv(path, rows)
    return {"train_csv": str(path), "image_root": str(folder)}


def make_clips(folder: Path, clips: int = 24) -> dict:
    """Short tones with overtones, and texts; two clips have the same text."""
    path = folder / "clips.csv"
    if not path.exists():
        rng, rows = np.random.default_rng(5), []
        for i in range(clips):
            phase = 2 * np.pi * rng.uniform(100, 300) / 16_000 * np.arange(rng.integers(1700, 2600))
            tone = sum(np.sin(overtone * phase) / overtone for overtone in range(1, 6))
            soundfile.write(folder / f"clip{i}.wav", 0.2 * tone + 0.01 * rng.standard_normal(len(tone)), 16_000)
            rows.append({"wav": f"clip{i}.wav", "text": f"{WORDS[i // 2]} tone"})
        write_csv(path, rows)
    return {"train_csv": str(path)}


def make_sentences(folder: Path, clips: int = 24) -> dict:
    """A tone per letter, as clips with their texts; and a randomly initialised codec and aligner."""
    path = folder / "tts.csv"
    if not path.exists():
        rng, rows = np.random.default_rng(5), []
        for i in range(clips):
            text = f"{WORDS[i % len(WORDS)]} {WORDS[int(rng.integers(len(WORDS)))]}"
            tones = [np.sin(np.arange(800) * (0.1 + 0.03 * (ord(letter) - 97))) for letter in text]
            waveform = 0.3 * np.concatenate(tones)
            soundfile.write(folder / f"{i}.wav", waveform + 0.01 * rng.standard_normal(len(waveform)), 16_000)
            rows.append({"text": text, "wav": f"{i}.wav"})
        write_csv(path, rows)
        torch.manual_seed(5)
        (folder / "codec").mkdir()
        for stage, file, make, cls, sizes in (
            ("codec", "rvq_codec.pt", Codec, CodecConfig, SMALL_CODEC),
            ("aligner", "aligner.pt", Aligner, AlignerConfig, SMALL_ALIGNER),
        ):
            config = cls(save_dir="-", tts_csv="-", max_steps=1, **sizes)
            save_model(folder / "codec" / file, stage, config, make(config.architecture))
    return {"tts_csv": str(path), "codec_ckpt": str(folder / "codec")}


SPEAKERS = ("joe", "ann", "")


def make_voices(folder: Path, clips: int = 24) -> dict:
    """``make_sentences`` with the column ``speaker``, which is blank in every third row."""
    keys, path = make_sentences(folder, clips), folder / "tts.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    write_csv(path, [row | {"speaker": SPEAKERS[i % 3]} for i, row in enumerate(rows)])
    return keys


def save_model(path: Path, stage: str, config: StageConfig, model: nn.Module) -> None:
    """A final file of a randomly initialised model."""
    payload = {
        "format": checkpoint.FORMAT_VERSION,
        "stage": stage,
        "config": config.model_dump(),
        "step": 1,
        "metrics": {},
    }
    if hasattr(model, "architecture"):
        payload["architecture"] = model.architecture.model_dump()
    checkpoint.save(path, payload | {"model": model.state_dict()})


SMALL_CODEC = {
    "codebooks": 2, "codebook_size": 8, "codec_d_model": 16, "codec_d_ff": 32, "codec_layers": 1, "codec_latent": 8,
    "codec_smoother_layers": 1,
}  # fmt: skip
SMALL_ALIGNER = {"aligner_d_model": 16, "aligner_layers": 1}
SMALL_TALKER = (
    SMALL_CODEC
    | SMALL_ALIGNER
    | {
        "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32, "text_layers": 1, "depth_d_model": 16,
        "depth_layers": 1, "depth_d_ff": 32,
    }
)  # fmt: skip

# shared by all stages: a training of seconds, with several epochs, validations and checkpoints
SHORT = {
    "batch_size": 2, "max_epochs": 3, "lr": 1e-2, "warmup_steps": 3, "use_amp": False, "num_workers": 0,
    "print_freq": 3, "val_freq": 7, "val_split": 0.2, "checkpoint_freq": 5, "dropout": 0.2,
}  # fmt: skip

TEXT = StageCase(
    name="text",
    script="train_text.py",
    prefix="thinker",
    final="thinker.pt",
    config=SHORT | {"vocab_size": 300, "ctx_len": 16, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32},
    make_data=make_text,
    size_key="d_ff",
    data_key="train_text",
)

AUDIO_ENC = StageCase(
    name="audio_enc",
    script="train_audio_enc.py",
    prefix="audio_enc",
    final="audio_enc.pt",
    config=SHORT
    | {
        "ctc_vocab_size": 48, "subsampling_channels": 8, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32,
        "lr": 1e-3,
    },
    make_data=make_speech,
    size_key="d_ff",
    data_key="train_csv",
)  # fmt: skip

VISION = StageCase(
    name="vision",
    script="train_vision.py",
    prefix="vision",
    final="vision.pt",
    config=SHORT
    | {
        "img_size": 16, "patch": 8, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32, "embed_dim": 16,
        "vocab_size": 300, "ctx_len": 16, "optimizer": "muon", "lr": 1e-3, "ema_decay": 0.8,
        "text_d_model": 16, "text_layers": 1, "text_heads": 2, "text_d_ff": 32,
    },
    make_data=make_images,
    size_key="d_ff",
    data_key="train_manifest",
    contrastive=True,
)  # fmt: skip

OCR = StageCase(
    name="ocr",
    script="train_ocr.py",
    prefix="ocr",
    final="ocr.pt",
    config=SHORT
    | {
        "img_height": 16, "img_width": 32, "patch": 8, "vision_d_model": 16, "vision_layers": 1, "vision_heads": 2,
        "vision_d_ff": 32, "decoder_d_model": 16, "decoder_layers": 1, "decoder_heads": 2, "decoder_d_ff": 32,
    },
    make_data=make_signs,
    size_key="decoder_d_ff",
    data_key="train_csv",
)  # fmt: skip

VOCODER = StageCase(
    name="vocoder",
    script="train_vocoder.py",
    prefix="hifigan",
    final="hifigan.pt",
    config={key: value for key, value in SHORT.items() if key not in ("lr", "dropout")}
    | {
        "n_mels": 20, "upsample_rates": [16, 10], "upsample_initial_channel": 16, "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]], "mpd_periods": [2], "msd_num_scales": 0, "disc_channels": 4,
        "segment_samples": 800, "val_samples": 0, "lr_g": 1e-3, "lr_d": 1e-3, "adv_start_step": 4,
    },
    make_data=make_clips,
    size_key="upsample_initial_channel",
    data_key="train_csv",
    whole={"msd_num_scales": 1},
    draws=False,
)  # fmt: skip

TALKER = StageCase(
    name="talker",
    script="train_talker.py",
    prefix="talker",
    final="talker.pt",
    config=SHORT
    | SMALL_TALKER
    | {"frame_dropout": 0.0, "val_sentences": 1, "val_samples": 0, "optimizer": "muon", "lr": 3e-3},
    make_data=make_sentences,
    size_key="d_ff",
    data_key="tts_csv",
)

VOICES = replace(TALKER, name="voices", config=TALKER.config | {"voice_layers": 1}, make_data=make_voices)


def make_mix(folder: Path) -> dict:
    """Dialogues, pictures and recordings; and a randomly initialised Thinker and encoders."""
    chat = folder / "chat.txt"
    pictures, speech = make_images(folder, 18), make_speech(folder, 4)
    if not chat.exists():
        rng = random.Random(5)
        turns = [[" ".join(rng.choices(WORDS, k=3)) for _ in range(2)] for _ in range(6)]
        chat.write_text("".join(f"<|user|>{asked}<|assistant|>{said}<|end|>\n" for asked, said in turns))
        tokenizer, ctc_tokenizer = Tokenizer.train(iter(WORDS), 300), CtcTokenizer.train(iter(WORDS), 48)
        sizes = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32, "save_dir": "-", "max_steps": 1}
        text = TextConfig(train_text="-", vocab_size=tokenizer.vocab_size, ctx_len=64, **sizes)
        audio = AudioEncoderConfig(
            train_csv="-", subsampling_channels=8, ctc_vocab_size=ctc_tokenizer.vocab_size, **sizes
        )
        captions = {"vocab_size": tokenizer.vocab_size, "text_layers": 1, "text_d_model": 16, "text_heads": 2}
        vision = VisionConfig(train_manifest="-", img_size=16, patch=8, **captions, **sizes)
        torch.manual_seed(5)
        for stage, name, config, model in (
            ("text", "thinker", text, Thinker(text.architecture)),
            ("audio_enc", "audio_enc", audio, AudioEncoder(audio.architecture)),
            ("vision", "vision", vision, PictureTextModel(vision.architecture)),
        ):
            (folder / name).mkdir()
            save_model(folder / name / f"{name}.pt", stage, config, model)
        (folder / "said").mkdir()
        make_sentences(folder / "said", 6)
        talker = TalkerConfig(tts_csv="-", save_dir="-", max_steps=1, **SMALL_TALKER)
        save_model(folder / "said/codec/talker.pt", "talker", talker, Talker(talker.architecture))
        for name in ("thinker", "vision"):
            tokenizer.save(folder / name / "tokenizer.json")
        ctc_tokenizer.save(folder / "audio_enc" / "tokenizer.json")
    return {
        "thinker_ckpt": str(folder / "thinker"),
        "audio_ckpt": str(folder / "audio_enc"),
        "vision_ckpt": str(folder / "vision"),
        "text_path": str(chat),
        "image_manifest": pictures["train_manifest"],
        "image_root": pictures["image_root"],
        "asr_csv": speech["train_csv"],
        "talker_ckpt": str(folder / "said/codec"),
        "speech_csv": str(folder / "said/tts.csv"),
    }


OMNI = StageCase(
    name="omni",
    script="sft_omni.py",
    prefix="omni",
    final="omni_final.pt",
    config=SHORT
    | {"optimizer": "muon", "lr": 3e-3, "proj_d_ff": 16, "max_answer_tokens": 4, "task_weights": {"caption": 2.0}},
    make_data=make_mix,
    size_key="proj_d_ff",
    data_key="image_manifest",
)

STAGES = [TEXT, AUDIO_ENC, VISION, OCR, VOCODER, TALKER, OMNI]
