"""The training step of each stage, with a made-up batch of the shape that its public data have.

Models, collators and losses are the project's own. ``gpu_counts.py`` counts what a step computes, ``gpu.py`` times it.
"""

# B samples, T positions or frames, M mel channels, S samples of sound, L text bytes, Q codebooks

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from omni.data.images import normalise
from omni.data.tokenizer import IGNORE_INDEX, SPECIAL_TOKENS
from omni.models.aligner import TEXT_SYMBOLS, Aligner
from omni.models.audio_encoder import AudioEncoder
from omni.models.codec import Codec
from omni.models.ocr import OcrModel
from omni.models.omni_architecture import OmniArchitecture
from omni.models.omni_model import OmniModel
from omni.models.picture_text import PictureTextModel
from omni.models.talker import Talker, talker_loss
from omni.models.thinker import Thinker
from omni.models.vocoder import Discriminators, build_generator, frozen, mel_spec
from omni.stages import STAGES
from omni.stages.aligner import STAGE as ALIGNER
from omni.stages.aligner import SpokenTexts, aligner_loss
from omni.stages.audio_encoder import Utterance, Utterances, ctc_loss
from omni.stages.captions import CaptionRows
from omni.stages.codec import STAGE as CODEC
from omni.stages.codec import SpeechClips, codec_loss
from omni.stages.ocr import OcrRows, ocr_loss
from omni.stages.talker import CodedSpeech
from omni.stages.talker import Utterance as SpokenUtterance
from omni.stages.tasks.collator import Collator, Encoded
from omni.stages.vocoder import (
    Clips,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    generate,
    loss_specs,
    mel_loss,
)
from omni.stages.voices import REFERENCE_CODES
from omni.train.config import StageConfig
from omni.train.run import Run
from omni.train.stage import Stage
from omni.train.training import LossFunction
from train_vocoder import halves

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SPEECH_S, SIGN_CHARACTERS, CAPTION, TALKER_S = 12.3, 8, 14, 6.6  # LibriSpeech, MJSynth, COCO, LJSpeech: means
UNITS_PER_S, BYTES_PER_S = 5.7, 15  # of stage B's tokenizer in LibriSpeech, of the text in LJSpeech
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # those of MJSynth
# of 32 samples of stage E, by its task_weights: questions about pictures, captions, conversations and signs (20),
# transcripts (4), spoken questions about pictures (4), spoken answers (2), dialogues (2)
KINDS = ("picture",) * 20 + ("recording",) * 4 + ("both",) * 4 + ("speech",) * 2 + ("text",) * 2
TEXT_BEFORE, ANSWER = 40, 20  # tokens of a sample of stage E beside its placeholders


@dataclass(frozen=True)
class Phase:
    """One loss of a step; ``module`` is the name of the model that it trains, ``after_update`` that of
    ``omni.train.training.Phase`` for a run."""

    name: str
    module: str
    loss: LossFunction
    after_update: Callable[[Run], Callable[[Tensor], None]] | None = None


@dataclass(frozen=True)
class Step:
    """A training step: its models in training mode, and a micro-batch on the CPU."""

    stage: Stage
    config: StageConfig
    modules: dict[str, nn.Module]
    phases: tuple[Phase, ...]
    batch: dict


def config_of(stage: str, size: str = "tiny", **keys) -> StageConfig:
    """The config that the repository has for a stage, with other ``keys``, without a check of its files."""
    row = STAGES[stage]
    return row.config.model_validate(json.loads((CONFIGS / f"{row.config_name}_{size}.json").read_text()) | keys)


def one_phase(name: str, loss: LossFunction) -> tuple[Phase, ...]:
    return (Phase(name, name, loss),)


def spread(longest: float, count: int, shortest: float = 0.9) -> list[int]:
    """``count`` lengths up to ``longest``, as in a batch of samples of similar length."""
    return torch.linspace(shortest * longest, longest, count).round().long().clamp(min=1).tolist()


@dataclass(frozen=True)
class Place:
    """Where models are made: a device, perhaps a fake one (``fake``), on which no value of a tensor is known."""

    device: str
    fake: FakeTensorMode | None = None

    @contextmanager
    def here(self) -> Iterator[None]:
        with self.fake or nullcontext(), torch.device(self.device):
            yield


# ---------------------------------------------------------------------------------------------------------------
# The stages


def text_step(place: Place, size: str, **keys) -> Step:
    config = config_of("text", size, **keys)
    window = torch.randint(config.vocab_size, (config.batch_size, config.ctx_len + 1))
    batch = {"tokens": window[:, :-1].contiguous(), "targets": window[:, 1:].contiguous()}
    batch["n_targets"] = batch["targets"].numel()

    def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch["tokens"], targets=batch["targets"])[0], {}

    with place.here():
        model = Thinker(config.architecture, use_flash=config.use_flash)
    return Step(STAGES["text"], config, {"thinker": model}, one_phase("thinker", loss), batch)


def audio_enc_step(place: Place, size: str, **keys) -> Step:
    config = config_of("audio_enc", size, **keys)
    seconds = min(SPEECH_S, config.max_mel_length * config.frame_hop / config.sample_rate)
    lengths = spread(seconds * config.sample_rate / config.frame_hop, config.batch_size)
    units = max(1, int(UNITS_PER_S * seconds))
    ids = torch.randint(config.ctc_vocab_size, (config.batch_size, units)).tolist()
    features = [torch.randn(length, config.mel_bins) for length in lengths]
    samples = [Utterance(one, tokens, "") for one, tokens in zip(features, ids, strict=True)]
    batch = Utterances(None, (), config, None, training=True).collate(samples)

    def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        return ctc_loss(model, batch), {}

    with place.here():
        model = AudioEncoder(config.architecture, use_flash=config.use_flash and not unordered(config, place))
    return Step(STAGES["audio_enc"], config, {"audio_enc": model}, one_phase("audio_enc", loss), batch)


def unordered(config: StageConfig, place: Place) -> bool:
    """Whether the audio encoder may not use fused attention, see train_audio_enc.py."""
    return config.deterministic and place.device.startswith("cuda")


def vision_step(place: Place, size: str, **keys) -> Step:
    config = config_of("vision", size, use_thinker_for_text=False, **keys)
    B, words = config.batch_size, min(CAPTION, config.ctx_len) - 1
    images = torch.randint(256, (B, 3, config.img_size, config.img_size), dtype=torch.uint8)
    ids = [[*line, 0] for line in torch.randint(1, config.vocab_size, (B, words)).tolist()]
    samples = [
        {"image": image, "ids": line, "same": (index, index), "labels": []}
        for index, (image, line) in enumerate(zip(images, ids, strict=True))
    ]
    batch = CaptionRows(None, (), None, config, training=True).collate(samples)

    def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        contrast, words, _ = model(normalise(batch["images"]), batch["tokens"], batch["ends"], same=batch["same"])
        return contrast + config.word_loss * words, {}

    with place.here():
        model = PictureTextModel(config.architecture, use_flash=config.use_flash)
    return Step(STAGES["vision"], config, {"vision": model}, one_phase("vision", loss), batch)


def codec_step(place: Place, size: str, **keys) -> Step:
    config = config_of("talker", size, **keys).codec
    samples = [torch.randn(length, config.n_mels) for length in clip_lengths(config, config.batch_size)]
    clips = SpeechClips(
        None, (), config.architecture, config.max_codes, training=True, static=config.use_compile
    )  # fmt: skip
    with place.here():
        model = Codec(config.architecture)
    loss = partial(codec_loss, commitment_weight=config.commitment_weight)

    def move_codebooks(run: Run) -> Callable[[Tensor], None]:
        return lambda ok: model.quantizer.update(ok, run.sum_over_ranks, run.is_main)

    phases = (Phase("rvq_codec", "rvq_codec", loss, move_codebooks),)
    return Step(CODEC, config, {"rvq_codec": model}, phases, clips.collate(samples))


def clip_lengths(config: StageConfig, count: int) -> list[int]:
    """Mel frames of the recordings in a batch of stage D."""
    longest = min(TALKER_S * config.sample_rate / config.frame_hop, config.max_codes * config.frames_per_code)
    return spread(longest, count)


def aligner_step(place: Place, size: str, **keys) -> Step:
    config = config_of("talker", size, **keys).aligner
    samples = []
    for length in clip_lengths(config, config.batch_size):
        n_bytes = max(1, int(length * config.frame_hop / config.sample_rate * BYTES_PER_S))
        samples.append((torch.randint(TEXT_SYMBOLS, (n_bytes,)).tolist(), torch.randn(length, config.n_mels)))
    texts = SpokenTexts(
        None, (), config.architecture, config.max_codes, training=True, static=config.use_compile
    )  # fmt: skip
    batch = texts.collate(samples)
    with place.here():
        model = Aligner(config.architecture)
    loss = partial(aligner_loss, alignment_frames=model.alignment_frames)
    return Step(ALIGNER, config, {"aligner": model}, one_phase("aligner", loss), batch)


def talker_step(place: Place, size: str, **keys) -> Step:
    config = config_of("talker", size, **keys)
    samples = [utterance(config, length) for length in clip_lengths(config, config.batch_size)]
    speech = CodedSpeech(None, (), config.architecture, config.max_codes, training=True, static=config.use_compile)
    batch = speech.collate(samples)
    with place.here():
        model = Talker(config.architecture, use_flash=config.use_flash)
    loss = partial(talker_loss, frame_dropout=config.frame_dropout, duration_weight=config.duration_weight)
    return Step(STAGES["talker"], config, {"talker": model}, one_phase("talker", loss), batch)


def utterance(config: StageConfig, mel_frames: int) -> SpokenUtterance:
    """Random symbols and codes of a recording; its bytes are equally long, up to a frame."""
    n_codes = -(-mel_frames // config.frames_per_code)
    frames = n_codes * config.alignment_frames_per_code
    n_bytes = max(1, min(frames, int(mel_frames * config.frame_hop / config.sample_rate * BYTES_PER_S)))
    ends = torch.linspace(0, frames, n_bytes + 1).round().long()
    codes = torch.randint(config.codebook_size, (n_codes, config.codebooks))
    reference = codes.repeat(-(-REFERENCE_CODES // n_codes), 1)[:REFERENCE_CODES] if config.voice_layers else None
    symbols = torch.randint(TEXT_SYMBOLS, (n_bytes,)).tolist()
    return SpokenUtterance("", symbols, codes, ends.diff(), reference=reference)


def omni_step(place: Place, size: str, **keys) -> Step:
    config = config_of("omni", size, **keys)
    talker = config_of("talker", size)
    architecture = omni_architecture(config, size)
    collate = Collator(0, architecture, cached=config.cache_features, one_length=config.use_compile)
    kinds = [KINDS[index * len(KINDS) // config.batch_size] for index in range(config.batch_size)]
    batch = collate([omni_sample(kind, config, architecture, talker) for kind in kinds])

    def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        found = model(batch)
        total = found.nats + config.ctc_alignment_weight * found.ctc_alignment_loss + found.talker_loss
        return total, {"cross_entropy": found.nats}

    with place.here():
        model = OmniModel(
            architecture,
            freeze_encoders=config.freeze_encoders,
            one_length=config.use_compile,
            use_flash=config.use_flash,
            audio_flash=config.freeze_encoders or not unordered(config, place),
        )
    return Step(STAGES["omni"], config, {"omni": model}, one_phase("omni", loss), batch)


def omni_architecture(config: StageConfig, size: str) -> OmniArchitecture:
    """Stage E's model on those of stages A to D."""
    text, audio, vision, talker = (config_of(name, size) for name in ("text", "audio_enc", "vision", "talker"))
    thinker = text.architecture.model_copy(
        update={"dropout": config.dropout, "ctx_len": config.ctx_len or text.ctx_len}
    )
    return OmniArchitecture(
        thinker=thinker,
        audio_encoder=audio.architecture,
        max_mel_length=audio.max_mel_length,
        vision_encoder=vision.architecture.vision,
        n_words=vision.vocab_size if vision.word_loss > 0 else 0,
        talker=talker.architecture.model_copy(update={"thinker_d_model": thinker.d_model}),
        max_codes=talker.max_codes,
        duration_weight=talker.duration_weight,
        proj_d_ff=config.proj_d_ff,
        image_stack=config.image_stack,
        drop_blanks=config.drop_blanks,
    )


def omni_sample(kind: str, config: StageConfig, architecture: OmniArchitecture, talker: StageConfig) -> Encoded:
    """A conversation of one of ``KINDS``, with as many positions as its picture or recording takes."""
    audio, vision, cached = architecture.audio_encoder, architecture.vision_encoder, config.cache_features
    ids, sample = torch.randint(len(SPECIAL_TOKENS), architecture.thinker.vocab_size, (TEXT_BEFORE,)).tolist(), None
    sample = Encoded(ids, [])
    if kind in ("picture", "both"):
        n_patches = (vision.img_size // vision.patch) ** 2
        pixels = torch.randint(256, (3, vision.img_size, vision.img_size), dtype=torch.uint8)
        features = torch.randn(n_patches, vision.d_model, dtype=torch.float16)
        sample.images.append((len(ids), features if cached else pixels))
        ids += [SPECIAL_TOKENS.index("<|image|>")] * architecture.image_side**2
    if kind in ("recording", "both"):
        seconds = SPEECH_S if kind == "recording" else SPEECH_S / 4
        mel_frames = min(int(seconds * 100), architecture.max_mel_length)
        positions = -(-mel_frames // audio.downsample_time)
        features = torch.randn(positions, audio.d_model, dtype=torch.float16)
        sample.recordings.append((len(ids), features if cached else torch.randn(mel_frames, audio.mel_bins)))
        transcript = torch.randint(len(SPECIAL_TOKENS), architecture.thinker.vocab_size, (max(1, positions // 3),))
        sample.transcript_ids.append(transcript.tolist())
        ids += [SPECIAL_TOKENS.index("<|audio|>")] * positions
    answer = torch.randint(len(SPECIAL_TOKENS), architecture.thinker.vocab_size, (ANSWER,)).tolist()
    sample.prompt = len(ids)
    sample.targets = [IGNORE_INDEX] * (len(ids) - 1) + answer + [IGNORE_INDEX]
    sample.ids = ids + answer
    if kind == "speech":
        sample.utterance = utterance(talker, int(TALKER_S / 2 * talker.sample_rate / talker.frame_hop))
        last = torch.linspace(sample.prompt, len(sample.ids) - 1, len(sample.utterance.symbols) - 1).long()
        sample.speech_token_index = [*last.tolist(), -1]
    return sample


def vocoder_step(place: Place, size: str, **keys) -> Step:
    config = config_of("vocoder", size, **keys)
    frames = config.segment_samples // config.hop_length
    pitch = {"pitch": torch.full((frames,), 150.0)} if config.harmonic_source else {}
    samples = [
        {"log_mel": torch.randn(frames, config.n_mels), "waveform": 0.1 * torch.randn(config.segment_samples)} | pitch
        for _ in range(config.batch_size)
    ]
    batch = Clips(None, (), config, training=True).collate(samples)
    with place.here():
        generator, discriminators = build_generator(config.architecture), Discriminators(config.discriminators)
    spec, specs, handed_over = mel_spec(config), loss_specs(config), []

    def loss_of_discriminators(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        generated, pitch = generate(generator, batch, spec)
        handed_over.append((generated, pitch))
        return discriminator_loss(*halves(model(torch.cat((batch["waveform"], generated.detach()))))), {}

    def loss_of_generator(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        real, (generated, pitch) = batch["waveform"], handed_over.pop()
        mel = mel_loss(real, generated, specs)
        with frozen(discriminators):
            with torch.no_grad():
                features_of_real = discriminators(real)
            features = discriminators(generated)
        adversarial, feature = adversarial_loss(features), feature_loss(features_of_real, features)
        of_pitch = 0.0 if pitch is None else config.lambda_pitch * pitch
        return config.lambda_adv * adversarial + config.lambda_fm * feature + config.lambda_mel * mel + of_pitch, {}

    phases = (
        Phase("discriminator", "discriminators", loss_of_discriminators),
        Phase("generator", "generator", loss_of_generator),
    )
    modules = {"discriminators": discriminators, "generator": generator}
    return Step(STAGES["vocoder"], config, modules, phases, batch)


def ocr_step(place: Place, size: str, **keys) -> Step:
    config = config_of("ocr", size, characters=CHARACTERS, **keys)
    drawn = torch.randint(len(CHARACTERS), (config.batch_size, min(SIGN_CHARACTERS, config.max_text_length))).tolist()
    samples = [
        (
            torch.randint(256, (3, config.height, config.width), dtype=torch.uint8),
            "".join(CHARACTERS[index] for index in line),
        )
        for line in drawn
    ]
    batch = OcrRows(None, (), config, training=True).collate(samples)

    def loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        return ocr_loss(model, batch, config.ctc_weight)

    with place.here():
        model = OcrModel(config.architecture, use_flash=config.use_flash)
    return Step(STAGES["ocr"], config, {"ocr": model}, one_phase("ocr", loss), batch)


# (place, "tiny" or "demo", other keys of the config) -> a step
STEPS: dict[str, Callable[..., Step]] = {
    "A": text_step,
    "B": audio_enc_step,
    "C": vision_step,
    "D codec": codec_step,
    "D aligner": aligner_step,
    "D talker": talker_step,
    "E": omni_step,
    "F": vocoder_step,
    "G": ocr_step,
}
