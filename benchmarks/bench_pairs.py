"""What ``bench.py`` compares: each stage's model beside one of ``transformers``, on the same random batch.

Sizes are those of the demo configs, weights random. Dropout is 0, since the libraries have it in other places; without
it most pairs have equal losses, which tests/test_bench.py checks.
"""

# B batch, T positions or frames, D model width, M mel channels, S samples, L text bytes, Q codebooks

import json
import string
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from omni.data.images import normalise
from omni.data.tokenizer import IGNORE_INDEX
from omni.models.aligner import TEXT_SYMBOLS
from omni.models.audio_encoder import AudioEncoder, parakeet_config, to_parakeet_state_dict
from omni.models.ocr import OcrModel
from omni.models.omni_architecture import OmniArchitecture
from omni.models.omni_model import OmniModel
from omni.models.picture_text import PictureTextModel
from omni.models.talker import Talker, talker_loss
from omni.models.thinker import Thinker, qwen3_config, to_qwen3_state_dict
from omni.models.vision_encoder import ViT, to_vit_state_dict, vit_config
from omni.models.vocoder import Generator, mel_spec, speecht5_config
from omni.stages import STAGES as TABLE
from omni.stages.audio_encoder import ctc_loss
from omni.stages.ocr import OcrConfig, encode_texts, ocr_loss
from omni.stages.vocoder import mel_loss
from omni.stages.voices import REFERENCE_CODES
from omni.train.config import StageConfig

# The reference is the faster one, which on a CPU depends on dtype and sizes.
ATTENTIONS = ("sdpa", "eager")
CHARACTERS = string.ascii_letters + string.digits + " -"  # about as many as a training set of signs has


STAGES = {stage.letter: stage for stage in TABLE.values()}  # D: the talker, the last of its three


def read_config(letter: str, configs: Path, **keys) -> StageConfig:
    """A stage's config in a folder of demo configs, with other ``keys``, without a check of its files."""
    stage = STAGES[letter]
    return stage.config.model_validate(json.loads((configs / f"{stage.config_name}_demo.json").read_text()) | keys)


@dataclass
class Pair:
    """One training loss, computed by our model and by a library's.

    ``theirs``: the library's models by name of their attention; none if the library has no such model. ``equal``:
    the two losses are equal, up to rounding.
    """

    stage: str
    what: str
    config: StageConfig
    ours: nn.Module
    our_loss: Callable[[nn.Module], Tensor]
    theirs: dict[str, nn.Module] = field(default_factory=dict)
    their_loss: Callable[[nn.Module], Tensor] | None = None
    equal: bool = False

    @property
    def library(self) -> str:
        return type(next(iter(self.theirs.values()))).__name__


def opened(cls: type, config: dict, weights: dict[str, Tensor], **keys) -> dict[str, nn.Module]:
    """The library's model from an export, with each of its attentions."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        exported = {name: weight.detach().clone().contiguous() for name, weight in weights.items()}
        save_file(exported, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        keys |= {"dtype": torch.float32}
        return {name: cls.from_pretrained(folder, attn_implementation=name, **keys).train() for name in ATTENTIONS}


def random_images(count: int, height: int, width: int) -> Tensor:
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------------------------
# The stages


def thinker_pair(configs: Path) -> Pair:
    """The Thinker and Qwen3ForCausalLM: the same weights, tokens and targets, and the same loss.

    Unlike in training, each target counts the same (no ``context_weight``).
    """
    config = read_config("A", configs, dropout=0.0)
    ours = Thinker(config.architecture, use_flash=config.use_flash)
    window = torch.randint(config.vocab_size, (config.batch_size, config.ctx_len + 1))
    tokens, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    return Pair(
        "A",
        "thinker",
        config,
        ours,
        lambda model: model(tokens, targets=targets)[0],
        opened(transformers.Qwen3ForCausalLM, *as_qwen3(ours)),
        lambda model: model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss,
        equal=True,
    )


def as_qwen3(thinker: Thinker) -> tuple[dict, dict[str, Tensor]]:
    """Config and weights of an equal Qwen3ForCausalLM."""
    architecture = thinker.architecture
    return qwen3_config(architecture, architecture.vocab_size, eos_id=0), to_qwen3_state_dict(thinker.state_dict())


def audio_encoder_pair(configs: Path) -> Pair:
    """The audio encoder with its CTC loss and ParakeetForCTC: the same weights, the same loss.

    Our channel scales are its batch norms in evaluation; in its training, batch statistics would cost more. Each has
    its own CTC loss.
    """
    config = read_config("B", configs, dropout=0.0)
    ours = AudioEncoder(config.architecture, use_flash=config.use_flash)
    # recordings of a batch are of similar length, about half of the longest
    frames = max(8, config.max_mel_length // 2)
    lengths = torch.linspace(0.9 * frames, frames, config.batch_size).long()
    mask = torch.arange(frames) < lengths[:, None]  # (B, T)
    features = torch.randn(config.batch_size, frames, config.mel_bins) * mask[..., None]
    units = max(1, frames // config.downsample_time // 3)
    targets = torch.randint(config.ctc_vocab_size, (config.batch_size, units))
    batch = {"features": features, "lengths": lengths, "targets": targets}
    batch["target_lengths"] = torch.full_like(lengths, units)
    sizes = parakeet_config(config.architecture) | {"ctc_loss_reduction": "sum"}
    none = dict.fromkeys(("dropout", "layerdrop", "activation_dropout", "attention_dropout"), 0.0)
    sizes["encoder_config"] |= none
    theirs = opened(transformers.ParakeetForCTC, sizes, to_parakeet_state_dict(ours))
    for model in theirs.values():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()

    def their_loss(model: nn.Module) -> Tensor:
        return model(input_features=features, attention_mask=mask, labels=targets).loss / targets.numel()

    return Pair("B", "audio_encoder", config, ours, lambda m: ctc_loss(m, batch), theirs, their_loss, equal=True)


def vit_pair(configs: Path) -> Pair:
    """The ViT and ViTModel without its pooler: the same weights. The loss is a fixed sum over the states."""
    config = read_config("C", configs)
    vision = config.architecture.vision.model_copy(update={"dropout": 0.0})
    ours = ViT(vision, use_flash=config.use_flash)
    images = normalise(random_images(config.batch_size, config.img_size, config.img_size))
    probe = torch.randn(1 + ours.n_patches, config.d_model)
    theirs = opened(
        transformers.ViTModel, vit_config(ours), to_vit_state_dict(ours.state_dict()), add_pooling_layer=False
    )
    return Pair(
        "C",
        "vit",
        config,
        ours,
        lambda model: (model(images).float() * probe).mean(),
        theirs,
        lambda model: (model(pixel_values=images).last_hidden_state.float() * probe).mean(),
        equal=True,
    )


def pictures_alone(configs: Path) -> Pair:
    """The whole step of stage C: both towers, contrast and word loss. No library has this model."""
    config = read_config("C", configs, use_thinker_for_text=False)
    images = normalise(random_images(config.batch_size, config.img_size, config.img_size))
    tokens = torch.randint(1, config.vocab_size, (config.batch_size, config.ctx_len))
    ends = torch.full((config.batch_size,), config.ctx_len // 2)
    same = torch.eye(config.batch_size, dtype=torch.bool)

    def loss(model: nn.Module) -> Tensor:
        contrast, words, _ = model(images, tokens, ends, same=same)
        return contrast + config.word_loss * words

    return Pair("C", "whole_step", config, PictureTextModel(config.architecture), loss)


def talker_pair(configs: Path) -> Pair:
    """The talker's decoder over frames and Qwen3Model: the same weights, the same input vectors. The loss is a fixed
    sum over the states. Text, durations and the codes of a frame have no counterpart."""
    config = read_config("D", configs, dropout=0.0)
    talker, frames = Talker(config.architecture, use_flash=config.use_flash), 1 + config.max_codes // 2
    ours = nn.ModuleDict({"layers": talker.layers, "norm": talker.norm})
    x = torch.randn(config.batch_size, frames, config.d_model)
    probe = torch.randn(frames, config.d_model)
    cos, sin = talker.rope(frames)
    sizes = qwen3_config(config.blocks, config.blocks.vocab_size, eos_id=0)
    theirs = {}
    for name in ATTENTIONS:
        qwen3 = transformers.Qwen3Config(**sizes, attn_implementation=name)
        theirs[name] = transformers.Qwen3Model(qwen3).train()
        theirs[name].load_state_dict(ours.state_dict(), strict=False)  # without its unused embedding

    def our_loss(model: nn.Module) -> Tensor:
        y = x.clone().requires_grad_()  # as training needs the gradient of the inputs
        for layer in model["layers"]:
            y, _ = layer(y, cos, sin, None, None)
        return (model["norm"](y).float() * probe).mean()

    def their_loss(model: nn.Module) -> Tensor:
        states = model(inputs_embeds=x.clone().requires_grad_(), use_cache=False).last_hidden_state
        return (states.float() * probe).mean()

    return Pair("D", "talker_decoder", config, ours, our_loss, theirs, their_loss, equal=True)


def talker_alone(configs: Path) -> Pair:
    """The whole step of the talker, with text and durations. No library has this model."""
    config = read_config("D", configs)
    B, T = config.batch_size, max(2, config.max_codes // 2)
    batch = {
        "symbols": torch.randint(TEXT_SYMBOLS, (B, T)),  # about a byte for each code
        "text_lengths": torch.full((B,), T),
        "durations": torch.full((B, T), config.alignment_frames_per_code),
        "codes": torch.randint(config.codebook_size, (B, T, config.codebooks)),
        "lengths": torch.full((B,), T),
    }
    if config.voice_layers:
        batch["references"] = torch.randint(config.codebook_size, (B, REFERENCE_CODES, config.codebooks))
        batch["reference_lengths"] = torch.full((B,), REFERENCE_CODES)
    weights = {"frame_dropout": config.frame_dropout, "duration_weight": config.duration_weight}
    talker = Talker(config.architecture, use_flash=config.use_flash)
    return Pair("D", "whole_step", config, talker, lambda model: talker_loss(model, batch, **weights)[0])


def mixed_pair(configs: Path) -> Pair:
    """Stage E's Thinker on embeddings with a loss on answers only, and Qwen3ForCausalLM: the same weights and loss.

    Three quarters of the rows fill an eighth to a half of the context, the others up to all of it. Their rows are
    padded to the longest, with an attention mask and logits at every position, as in a plain implementation; ours are
    grouped by length, with logits at targets. So the ratio includes this gain. Neither side has projections, encoders
    (their features are cached) or talker.
    """
    config, omni = read_config("E", configs), omni_of_text(configs)
    architecture = omni.thinker.architecture
    B, T, vocab_size = config.batch_size, architecture.ctx_len, architecture.vocab_size
    sizes = torch.linspace(T / 8, T, B).long().clamp(max=T)
    sizes[: 3 * B // 4] = torch.linspace(T / 8, T / 2, 3 * B // 4).long()
    tokens, place = torch.randint(vocab_size, (B, T)), torch.arange(T)
    mask = place < sizes[:, None]  # (B, T)
    answers = mask & (place >= (sizes - T // 8)[:, None])  # targets are at the end
    targets = torch.where(answers, torch.randint(vocab_size, (B, T)), IGNORE_INDEX)
    batch = {"tokens": tokens, "targets": targets, "sizes": sizes}

    def their_loss(model: nn.Module) -> Tensor:
        inputs = {"inputs_embeds": model.get_input_embeddings()(tokens), "attention_mask": mask.long()}
        return model(**inputs, labels=targets, shift_labels=targets, use_cache=False).loss

    theirs = opened(transformers.Qwen3ForCausalLM, *as_qwen3(omni.thinker))
    return Pair("E", "thinker", config, omni, lambda model: model(batch).nats, theirs, their_loss, equal=True)


def omni_of_text(configs: Path) -> OmniModel:
    """An omni model of stage A's sizes, for text only."""
    thinker = read_config("A", configs)
    sizes = thinker.architecture.model_copy(update={"dropout": 0.0})
    config = read_config("E", configs)
    return OmniModel(OmniArchitecture(thinker=sizes), use_flash=config.use_flash, one_length=config.use_compile)


def vocoder_pair(configs: Path) -> Pair:
    """The generator with its mel loss and SpeechT5HifiGan with ours: the same weights, weight norm on both sides.

    Under autocast, our last convolution is in float32, since a bf16 waveform is noisy; theirs is not. The
    discriminators have no counterpart.
    """
    config = read_config("F", configs)
    ours, spec = Generator(config.architecture), mel_spec(config)
    theirs = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**speecht5_config(config)))
    theirs.apply_weight_norm()
    theirs.load_state_dict(ours.state_dict())
    log_mel = torch.randn(config.batch_size, config.segment_samples // config.hop_length, config.n_mels)
    waveform = 0.1 * torch.randn(config.batch_size, config.segment_samples)

    def loss(model: nn.Module) -> Tensor:
        return mel_loss(waveform, model(log_mel).float(), [spec])

    return Pair("F", "generator", config, ours, loss, {"": theirs.train()}, loss, equal=True)


def ocr_pair(configs: Path) -> Pair:
    """OCR without its convolutional stem and its CTC loss, and VisionEncoderDecoderModel of ViT and TrOCR.

    The encoders are equal. Their decoder normalises after each sum and has LayerNorm, GELU and no rotary positions; its
    feed-forward is 1.5 times as wide, so that its two matrices have as many weights as our three.
    """
    config = read_config("G", configs, conv_stem=False, ctc_weight=0.0, dropout=0.0, characters=CHARACTERS)
    ours = OcrModel(config.architecture, use_flash=config.use_flash)
    images, symbols, targets = lines_of_text(config)
    decoder = {
        "vocab_size": ours.n_written + 2, "d_model": config.decoder_d_model, "decoder_layers": config.decoder_layers,
        "decoder_attention_heads": config.decoder_heads, "decoder_ffn_dim": config.decoder_d_ff * 3 // 2,
        "max_position_embeddings": config.max_text_length + 1, "dropout": 0.0, "is_decoder": True,
        "add_cross_attention": True, "cross_attention_hidden_size": config.vision_d_model,
    }  # fmt: skip
    vits = opened(
        transformers.ViTModel, vit_config(ours.encoder), to_vit_state_dict(ours.encoder.state_dict()),
        add_pooling_layer=False,
    )  # fmt: skip
    theirs = {
        name: transformers.VisionEncoderDecoderModel(
            encoder=vit, decoder=transformers.TrOCRForCausalLM(transformers.TrOCRConfig(**decoder))
        ).train()
        for name, vit in vits.items()
    }
    for name, model in theirs.items():
        model.encoder.set_attn_implementation(name)  # TrOCR has only one attention

    def their_loss(model: nn.Module) -> Tensor:
        return model(pixel_values=normalise(images), decoder_input_ids=symbols, labels=targets, use_cache=False).loss

    batch = {"images": images, "symbols": symbols, "targets": targets}
    return Pair("G", "vit_and_decoder", config, ours, lambda m: ocr_loss(m, batch, 0.0)[0], theirs, their_loss)


def ocr_alone(configs: Path) -> Pair:
    """The whole step of stage G, with stem and CTC. No library has this model."""
    config = read_config("G", configs, characters=CHARACTERS)
    batch = dict(zip(("images", "symbols", "targets"), lines_of_text(config), strict=True))
    ours = OcrModel(config.architecture, use_flash=config.use_flash)
    return Pair("G", "whole_step", config, ours, lambda model: ocr_loss(model, batch, config.ctc_weight)[0])


def lines_of_text(config: OcrConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, symbols and targets of random lines, each half as long as the longest."""
    drawn = torch.randint(len(CHARACTERS), (config.batch_size, max(1, config.max_text_length // 2))).tolist()
    texts = ["".join(CHARACTERS[index] for index in line) for line in drawn]
    return random_images(config.batch_size, config.height, config.width), *encode_texts(texts, config)


# A stage's second pair has no library's model; it only gives the share of the machine's matrix products.
PAIRS = (
    thinker_pair, audio_encoder_pair, vit_pair, pictures_alone, talker_pair, talker_alone, mixed_pair, vocoder_pair,
    ocr_pair, ocr_alone,
)  # fmt: skip
