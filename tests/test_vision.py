"""Stage C: the ViT is transformers' ViTModel, captions find their pictures, and a frozen Thinker stays frozen."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import Training, differences, kill_at_step, run_script
from PIL import Image
from safetensors.torch import save_file
from stages import TEXT, VISION, make_images
from test_config import only_error

from omni.common.errors import UserError
from omni.data.open_manifest import load_manifest
from omni.data.order import ResumableDataset
from omni.data.tokenizer import Tokenizer
from omni.models import picture_text
from omni.models.architectures import RectangularVisionArchitecture, VisionArchitecture
from omni.models.picture_text import (
    MAX_SCALE,
    PictureTextModel,
    contrastive_loss,
    noisy_or_log_absent,
    similarities,
    word_loss,
)
from omni.models.thinker import Thinker
from omni.models.vision_encoder import ViT, to_vit_state_dict, vit_config
from omni.stages import STAGES as TABLE
from omni.stages.captions import (
    GROUP,
    CaptionRanking,
    CaptionRows,
    Classes,
    augment,
    encode_caption,
    exchange_sides,
    in_distinct_groups,
    pad_captions,
    random_crop,
)
from omni.stages.vision import VisionConfig, attach_thinker
from omni.train.optim import build_adamw
from omni.train.stage import load

CPU = torch.device("cpu")


def small_model(**keys) -> PictureTextModel:
    sizes = {
        "img_size": 16, "patch": 8, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "embed_dim": 16,
        "vocab_size": 300, "ctx_len": 16, "text_d_model": 32, "text_layers": 1, "text_heads": 2, "text_d_ff": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    config = VisionConfig.model_construct(**{n: f.default for n, f in VisionConfig.model_fields.items()} | sizes | keys)
    model = PictureTextModel(config.architecture, use_flash=config.use_flash)
    if config.use_thinker_for_text:
        model.attach_thinker(Thinker(config.text_tower))
    return model


def some_batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(rows, 3, 16, 16, generator=generator) * 2 - 1
    lengths = torch.randint(2, 9, (rows,), generator=generator)
    ids = [torch.randint(16, 300, (int(n),), generator=generator).tolist() for n in lengths]
    return images, *pad_captions(ids)


def rectangle(height: int, width: int, patch: int | tuple[int, int], **sizes) -> VisionArchitecture:
    """The sizes of a ViT for pictures of ``height`` x ``width`` pixels."""
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    sides = {"img_height": height, "img_width": width, "patch_height": patch_height, "patch_width": patch_width}
    return RectangularVisionArchitecture(**sides, **sizes)


# --- the ViT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "patch"), [(16, 16, 8), (16, 40, 8), (32, 24, (8, 4)), (32, 24, (32, 4))], ids=str
)
def test_the_vit_is_transformers_vit_model(tmp_path, height, width, patch):
    from transformers import ViTModel

    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layers": 3, "n_heads": 4, "d_ff": 48, "dropout": 0.1}
    vit = ViT(rectangle(height, width, patch, **sizes)).eval()
    for parameter in vit.parameters():  # biases and gains, too, must not be what they start with
        torch.nn.init.normal_(parameter, std=0.3)
    (tmp_path / "config.json").write_text(json.dumps(vit_config(vit)))
    save_file(to_vit_state_dict(vit.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert not any(report.values()), report
    images = torch.rand(2, 3, height, width) * 2 - 1
    with torch.no_grad():
        ours, expected = vit(images), theirs.eval()(images).last_hidden_state
    assert ours.shape == (2, 1 + vit.n_patches, 32)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_plain_attention_is_fused_attention():
    fused = small_model().eval()
    plain = small_model(use_flash=False).eval()
    for one, other in zip(fused(*some_batch()), plain(*some_batch()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        rectangle(16, 20, 8)
    with pytest.raises(ValueError, match="multiple of patch 8, found 20"):
        VisionArchitecture(img_size=20, patch=8)
    with pytest.raises(ValueError, match="n_heads"):
        rectangle(16, 16, 8, d_model=30, n_heads=4)


def test_positions_tell_every_patch_from_every_other():
    vit = ViT(rectangle(64, 96, 8, d_model=64, n_layers=1, n_heads=2, d_ff=64))
    positions = vit.position_embeddings[0, 1:]
    distances = torch.cdist(positions, positions) + 9 * torch.eye(96)
    assert distances.min() > 0.2 * distances.median()
    below, right, far = positions[12], positions[1], positions[-1]
    first = positions[0]
    assert (first - below).norm() < (first - far).norm() and (first - right).norm() < (first - far).norm()


# --- both towers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["own tower", "frozen Thinker"])
def test_what_follows_a_caption_s_end_changes_nothing(frozen):
    model = small_model(use_thinker_for_text=frozen).eval()
    _, tokens, ends = some_batch()
    expected = model.embed_captions(tokens, ends)
    longer = F.pad(tokens, (0, 4), value=7)
    longer[torch.arange(longer.shape[1]) > ends[:, None]] = 99
    torch.testing.assert_close(model.embed_captions(longer, ends), expected, atol=1e-6, rtol=0)
    changed = tokens.clone()
    changed[0, 0] = 15
    assert not torch.allclose(model.embed_captions(changed, ends)[0], expected[0], atol=1e-3), "the first word counts"


def test_captions_are_cut_with_their_end_kept():
    tokenizer = Tokenizer.train(iter(["a cat"] * 9), 300)
    ids = encode_caption(tokenizer, "a cat <|image|> " * 10, 12)
    assert len(ids) == 12 and ids[-1] == tokenizer.eos_id
    assert tokenizer.token_id("<|image|>") not in encode_caption(tokenizer, "<|image|>", 64)


def test_it_overfits_one_batch():
    model, batch = small_model(), some_batch(16)
    optimizer = build_adamw(model, lr=3e-3, wd=0.0)
    same = torch.eye(16, dtype=torch.bool)
    for _ in range(60):
        pictures, captions, scale = model(*batch)
        loss = contrastive_loss(pictures, captions, scale, same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert torch.equal(similarities(pictures, captions).argmax(dim=1), torch.arange(16))


def test_the_loss_is_clip_s():
    generator = torch.Generator().manual_seed(0)
    pictures, captions = (F.normalize(torch.randn(6, 4, generator=generator), dim=-1) for _ in range(2))
    expected = 0.0
    for i in range(6):
        along_row = [math.exp(10 * float(pictures[i] @ captions[j])) for j in range(6)]
        along_column = [math.exp(10 * float(pictures[j] @ captions[i])) for j in range(6)]
        expected -= (math.log(along_row[i] / sum(along_row)) + math.log(along_column[i] / sum(along_column))) / 12
    same = torch.eye(6, dtype=torch.bool)
    assert float(contrastive_loss(pictures, captions, torch.tensor(10.0), same)) == pytest.approx(expected, abs=1e-5)
    alike = F.normalize(torch.ones(6, 4), dim=-1)
    assert float(contrastive_loss(alike, alike, torch.tensor(10.0), same)) == pytest.approx(math.log(6))


def test_an_equal_caption_is_no_negative():
    generator = torch.Generator().manual_seed(0)
    pictures, captions = (F.normalize(torch.randn(4, 8, generator=generator), dim=-1) for _ in range(2))
    captions[1] = captions[0]
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    pictures.requires_grad_()
    loss = contrastive_loss(pictures, captions, torch.tensor(5.0), same)
    full = contrastive_loss(pictures, captions, torch.tensor(5.0), torch.eye(4, dtype=torch.bool))
    assert loss < full and torch.isfinite(torch.autograd.grad(loss, pictures)[0]).all()
    everywhere = torch.ones(4, 4, dtype=torch.bool)
    assert contrastive_loss(pictures, captions, torch.tensor(5.0), everywhere).item() == 0.0
    # pair 0 without pair 1, and pair 1 without pair 0
    rows_0_and_1 = [
        -F.log_softmax(5 * (pictures[i] @ captions[[i, 2, 3]].T), dim=0)[0]
        - F.log_softmax(5 * (captions[i] @ pictures[[i, 2, 3]].T), dim=0)[0]
        for i in (0, 1)
    ]
    rows_2_and_3 = [
        -F.log_softmax(5 * (pictures[i] @ captions.T), dim=0)[i]
        - F.log_softmax(5 * (captions[i] @ pictures.T), dim=0)[i]
        for i in (2, 3)
    ]
    assert loss.item() == pytest.approx(sum(rows_0_and_1 + rows_2_and_3).item() / 8, abs=1e-5)


def test_the_word_loss_asks_which_words_any_patch_shows_and_for_rare_ones_most():
    tokens, ends = pad_captions([[5, 7, 5, 9, 0], [6, 7, 0], [0]])  # 5 twice; 0 is the end; the last has no words
    logits = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(0))  # of two patches each
    shown = 1 - (1 - logits.sigmoid()).prod(dim=1)
    rare, common = math.log(4 / 2), math.log(4 / 3)  # in one of three captions, in two
    counts = torch.full((12,), math.log(4))  # in none: what is named all the same, is wrong
    counts[[5, 6, 9]], counts[7] = rare, common
    there = torch.zeros(3, 12)
    there[0, [5, 7, 9]] = there[1, [6, 7]] = 1
    expected = F.binary_cross_entropy(shown, there, weight=counts, reduction="sum") / 5
    torch.testing.assert_close(word_loss(noisy_or_log_absent(logits, 1), tokens, ends), expected)
    longer = F.pad(tokens, (0, 2), value=8)  # whatever stands behind an end
    torch.testing.assert_close(word_loss(noisy_or_log_absent(logits, 1), longer, ends), expected)
    assert word_loss(noisy_or_log_absent(torch.full((1, 2, 12), 200.0), 1), *pad_captions([[5, 0]])).isfinite()
    assert word_loss(noisy_or_log_absent(torch.full((1, 2, 12), -200.0), 1), *pad_captions([[5, 0]])).isfinite()


def test_the_word_loss_does_not_drown_the_contrast_at_first():
    """However many patches and tokens there are; at the sizes of ``vision_tiny``, 196 and 8,192."""
    torch.manual_seed(0)
    captions = pad_captions([[*torch.randint(1, 8192, (10,)).tolist(), 0] for _ in range(8)])
    for patches, tokens in ((16, 300), (196, 8192)):
        bias = min(picture_text.RARE, math.log(picture_text.SHOWN / (patches * tokens)))
        logits = torch.full((8, patches, tokens), bias)
        inside = [caption % tokens for caption in captions[0]]
        words = word_loss(noisy_or_log_absent(logits, 1), torch.stack(inside), captions[1])
        assert 1 < float(words) < 100, (patches, tokens, float(words))
    model = small_model(img_size=224, patch=16, vocab_size=8192)
    assert torch.allclose(model.word_head.bias, torch.tensor(bias))


def test_once_a_patch_is_sure_of_a_word_no_other_gains_by_naming_it():
    logits, captions = torch.full((2, 3, 12), -6.0, requires_grad=True), pad_captions([[5, 0], [0]])
    logits.data[0, 1, 5] = 6.0
    word_loss(noisy_or_log_absent(logits, 1), *captions).backward()
    assert logits.grad[0, [0, 2], 5].abs().max() < 1e-4
    logits.data[0, 1, 5], logits.grad = -6.0, None
    word_loss(noisy_or_log_absent(logits, 1), *captions).backward()
    assert (logits.grad[0, :, 5] < -0.1).all()


def test_the_training_losses_are_those_of_the_embeddings(monkeypatch):
    model, (images, tokens, ends), same = small_model(), some_batch(), torch.eye(8, dtype=torch.bool)
    contrast, words, scale = model(images, tokens, ends, same=same)
    torch.testing.assert_close(contrast, contrastive_loss(*model(images, tokens, ends), same))
    logits = model.word_head(model.vit(images)[:, 1:])
    torch.testing.assert_close(words, word_loss(noisy_or_log_absent(logits, 1), tokens, ends))
    monkeypatch.setattr(picture_text, "WORD_LOGITS", 2 * logits[0].numel())
    pieces = model(images, tokens, ends, same=same)[1]
    torch.testing.assert_close(pieces, words)
    whole = torch.autograd.grad(words, model.vit.parameters(), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(pieces, model.vit.parameters()), whole)
    (contrast + words).backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "DDP waits for every gradient"
    without = small_model(word_loss=0.0)
    contrast, words, _ = without(images, tokens, ends, same=same)
    contrast.backward()
    assert float(words) == 0.0 and all(parameter.grad is not None for parameter in without.parameters())


def test_the_scale_is_bounded_and_can_come_down_again():
    model = small_model()
    with torch.no_grad():
        model.log_scale.fill_(7.0)
    _, _, scale = model(*some_batch())
    assert scale.item() == pytest.approx(MAX_SCALE)
    scale.backward()
    assert model.log_scale.grad > 0


def test_the_loss_is_float32_under_autocast():
    model = small_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pictures, captions, scale = model(*some_batch())
        assert pictures.dtype == captions.dtype == torch.float32
        loss = contrastive_loss(pictures, captions, scale, torch.eye(8, dtype=torch.bool))
        cosines = similarities(pictures, captions)
    assert loss.dtype == cosines.dtype == torch.float32
    torch.testing.assert_close(cosines, pictures @ captions.T, atol=1e-6, rtol=0)


# --- rows and figures -----------------------------------------------------------------------------------------------


def test_augmentation_is_small_and_keyed():
    image = torch.arange(3 * 64 * 64).remainder(200).to(torch.uint8).view(3, 64, 64)
    first, again, other = (augment(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == image.shape
    dot = torch.zeros(3, 64, 64, dtype=torch.uint8)
    dot[0, 40, 20] = 200
    for seed in range(20):
        moved = augment(dot, np.random.default_rng(seed))
        channel, row, column = moved.nonzero()[0].tolist()
        assert channel == 0 and abs(row - 40) <= 2 and abs(column - 20) <= 2 and abs(int(moved.max()) - 200) <= 21


def test_crops_keep_their_share_and_are_keyed():
    ramp = torch.arange(96, dtype=torch.uint8).expand(3, 96, 96)  # a column's number is its value
    drawn = [random_crop(ramp, 64, 0.4, np.random.default_rng(seed)) for seed in range(200)]
    assert all(image.shape == (3, 64, 64) and image.dtype == torch.uint8 for image in drawn)
    assert torch.equal(drawn[3], random_crop(ramp, 64, 0.4, np.random.default_rng(3)))
    widths = np.array([int(image.max()) - int(image.min()) + 1 for image in drawn]) / 96
    assert 0.4**0.5 * (3 / 4) ** 0.5 - 0.02 < widths.min() < 0.66 and widths.max() == 1
    whole = random_crop(ramp, 96, 1.0, np.random.default_rng(0))
    assert int(whole.max()) - int(whole.min()) > 80, "all of the area, but for the ratio of the sides"


def test_a_mirrored_picture_has_a_mirrored_caption(tmp_path):
    for caption, mirrored in (
        ("a cat left of a dog", "a cat right of a dog"),
        ("Right: the leftmost house, upright", "Left: the rightmost house, upright"),
        ("civil rights", "civil rights"),
    ):
        assert exchange_sides(caption) == mirrored and exchange_sides(mirrored) == caption
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)[:, :, None].repeat(3, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": "on the left"}\n')
    manifest, tokenizer = (
        load_manifest(tmp_path / "a.jsonl", ("image", "caption"), "image"),
        Tokenizer.train(iter(["on the left"] * 9), 300),
    )
    config = VISION.config | {"save_dir": "-", "train_manifest": "-", "mirror": True}
    rows = CaptionRows(manifest, np.arange(1), tokenizer, VisionConfig(**config), training=True)
    plain = CaptionRows(manifest, np.arange(1), tokenizer, VisionConfig(**config), training=False)
    original, seen = plain.read(manifest[0], None), set()
    for seed in range(10):
        sample = rows.read(manifest[0], np.random.default_rng(seed))
        is_mirrored = torch.equal(sample["image"], original["image"].flip(-1))
        assert is_mirrored or torch.equal(sample["image"], original["image"])
        text = tokenizer.decode(sample["ids"], skip_special=True)
        assert text == ("on the right" if is_mirrored else "on the left") and sample["same"] == original["same"]
        seen.add(is_mirrored)
    assert seen == {True, False}


def test_validation_groups_hold_distinct_pictures_and_captions(tmp_path):
    rng = random.Random(0)
    rows = [{"image": f"{rng.randrange(150)}.png", "caption": f"caption {rng.randrange(120)}"} for _ in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"image": "x.png"}\n')
    manifest = load_manifest(tmp_path / "rows.jsonl", ("image", "caption"), "image")
    order, largest = in_distinct_groups(manifest, np.arange(301))
    assert largest == GROUP and in_distinct_groups(manifest, np.arange(7))[1] <= 7
    assert sorted(order.tolist()) == list(range(301)) and order[-1] == 300
    full = 0
    for start in range(0, 256, GROUP):
        group = [rows[i] for i in order[start : start + GROUP]]
        full += all(len({row[name] for row in group}) == GROUP for name in ("image", "caption"))
    assert full >= 3, "of 300 rows, nearly all find a group"


ENTRIES = [
    {"caption": f"{count} {colour} {shape}", "colour": colour, "shape": shape, "count": count}
    for colour, shape, count in itertools.product(("red", "blue", "pink"), ("star", "ring"), range(1, 4))
]


@pytest.fixture
def classes(tmp_path) -> Classes:
    (tmp_path / "zoo.val.classes.json").write_text(json.dumps(ENTRIES))
    return Classes.beside(tmp_path / "zoo.val.json")


def test_classes_stand_beside_a_manifest_and_rows_name_theirs(classes, tmp_path):
    assert classes.captions == [entry["caption"] for entry in ENTRIES]
    assert classes.names == {"colour": ["red", "blue", "pink"], "shape": ["star", "ring"], "count": ["1", "2", "3"]}
    for name, names in classes.names.items():
        assert [names[label] for label in classes.labels[name]] == [str(entry[name]) for entry in ENTRIES]
    assert classes.of_row({"colour": "pink", "shape": "star", "count": 2}) == [2, 0, 1]
    assert classes.of_row({"colour": "blue", "shape": None, "count": "3"}) == [1, -1, 2]
    assert classes.of_row({"caption": "x", "colour": "mauve", "count": [1]}) == [-1, -1, -1]
    assert Classes.beside(tmp_path / "other.json") is None


def test_a_caption_may_have_the_class_of_one_attribute_alone(tmp_path):
    (tmp_path / "x.classes.json").write_text(
        '[{"caption": "a cat", "animal": "cat"}, {"caption": "red", "colour": "red"}]'
    )
    classes = Classes.beside(tmp_path / "x.csv")
    assert {name: labels.tolist() for name, labels in classes.labels.items()} == {"animal": [0, -1], "colour": [-1, 0]}


@pytest.mark.parametrize(
    "content",
    ["", "[", "{}", "[]", "[1]", '[{"caption": "x"}]', '[{"colour": "red"}]', '[{"caption": 1, "colour": "red"}]',
     '[{"caption": "x", "colour": ["red"]}]', '[{"caption": "x", "colour": null}]', "[" * 100_000],
)  # fmt: skip
def test_a_wrong_list_of_classes_is_one_line(tmp_path, content):
    (tmp_path / "x.classes.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.classes\.json: ") as error:
        Classes.beside(tmp_path / "x.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


class Oracle(torch.nn.Module):
    """Right about class captions and labelled pictures; for the rest, picture i is caption ``order[i]``."""

    def __init__(self, classes: Classes, labels: torch.Tensor, order: torch.Tensor | None = None):
        super().__init__()
        self.classes, self.labels, self.order = classes, labels, order
        self.text_proj = torch.nn.Linear(1, 1)
        self.read = 0  # class prompts so far
        self.turn = 0  # by how many classes prompts and pictures are out of step

    def code(self, labels: torch.Tensor) -> torch.Tensor:
        hot = [
            F.one_hot((labels[:, i] + self.turn) % len(c), len(c)) for i, c in enumerate(self.classes.names.values())
        ]
        return F.normalize(torch.cat(hot, dim=1).float(), dim=-1)

    def embed_captions(self, tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        labels = torch.stack(list(self.classes.labels.values()), dim=1)
        start, self.read = self.read, (self.read + len(tokens)) % len(labels)  # they come some at a time
        return self.code(labels[start : start + len(tokens)])

    def forward(self, images, tokens, ends):
        if self.order is not None:
            eye = torch.eye(len(self.order))
            return eye, eye[self.order], torch.tensor(10.0)
        turn, self.turn = self.turn, 0
        pictures, self.turn = self.code(self.labels), turn
        return pictures, pictures, torch.tensor(10.0)


def judged(model: Oracle, B: int, same: torch.Tensor | None = None) -> dict[str, float]:
    ranking = CaptionRanking(Tokenizer.train(iter(["a cat"] * 9), 300), 64, model.classes)
    batch = {"images": torch.zeros(B, 3, 8, 8, dtype=torch.uint8), "tokens": torch.zeros(B, 4).long()}
    batch |= {"ends": torch.zeros(B).long(), "labels": model.labels}
    batch["same"] = torch.eye(B, dtype=torch.bool) if same is None else same
    sums = {name: float(value) for name, value in ranking.sums(model, batch).items()}
    return ranking.metrics({name: 2 * value for name, value in sums.items()})  # two such batches


def test_top1_counts_pictures_that_find_their_caption(classes):
    nothing = torch.full((GROUP, 3), -1)
    order = torch.arange(GROUP)
    assert judged(Oracle(classes, nothing, order), GROUP)["top1_of_64"] == 1.0
    order[:16] = torch.arange(16).roll(1)  # sixteen pictures find each other's captions
    metrics = judged(Oracle(classes, nothing, order), GROUP)
    assert metrics["top1_of_64"] == metrics["top1_of_64_pictures"] == 0.75
    assert not any("zero_shot" in name for name in metrics)
    assert "top1_of_64" not in judged(Oracle(classes, nothing[:63], order[:63].clamp(max=62)), 63)
    twins = torch.eye(GROUP, dtype=torch.bool)
    twins[0, 1] = twins[1, 0] = True
    assert "top1_of_64" not in judged(Oracle(classes, nothing, order), GROUP, twins), "only 63 captions to choose from"


def test_zero_shot_asks_for_each_attribute(classes):
    labels = torch.tensor([[0, 1, 1], [2, 0, 2], [1, 0, 0], [-1, -1, -1]])
    model = Oracle(classes, labels)
    expected = {"zero_shot": 1.0, "zero_shot_colour": 1.0, "zero_shot_shape": 1.0, "zero_shot_count": 1.0}
    assert expected.items() <= judged(model, 4).items()
    model.turn = 1
    assert judged(model, 4)["zero_shot"] == 0.0


def test_class_prompts_follow_the_weights(classes):
    model = small_model().eval()
    ranking = CaptionRanking(Tokenizer.train(iter(["a cat"] * 9), 300), 16, classes)
    first = ranking._prompts(model)
    assert ranking._prompts(model) is first
    optimizer = build_adamw(model, lr=1e-2, wd=0.0)
    model(*some_batch())[2].backward()
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    second = ranking._prompts(model)
    assert not torch.allclose(second, first)
    model.load_state_dict(small_model().state_dict())
    torch.testing.assert_close(ranking._prompts(model), first)


# --- the stage ------------------------------------------------------------------------------------------------------


def test_a_held_out_manifest_is_judged_and_the_encoder_loads(tmp_path):
    held_out = tmp_path / "held out"
    held_out.mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(GROUP + 6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(held_out / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"number {i}", "shape": "star", "colour": "pink", "count": 3})
    (held_out / "val.json").write_text(json.dumps(rows))
    (held_out / "val.classes.json").write_text(json.dumps(ENTRIES))
    training = VISION.training(tmp_path, max_steps=4, val_manifest=str(held_out / "val.json"), image_root=None)
    training.finish()
    metrics = training.metrics("val")[-1]
    assert {"loss", "top1_of_64", "top1_of_64_pictures", "zero_shot", "zero_shot_count"} <= metrics.keys()
    assert training.newest()["data"]["samples"] == "24", "nothing is taken from the training manifest"
    opened = load(TABLE["vision"], training.save_dir)
    model, tokenizer, config = opened.model, opened.tokenizer, opened.config_as(VisionConfig)
    assert not model.training and model.vit(torch.zeros(2, 3, 16, 16)).shape == (2, 1 + 4, config.d_model)
    assert differences(model.state_dict(), training.final_file()["model"]) == []
    with pytest.raises(UserError, match="trained without a Thinker"):
        attach_thinker(opened, tmp_path)
    tokens, ends = pad_captions([encode_caption(tokenizer, "a red cat", config.ctx_len)])
    assert model.embed_captions(tokens, ends).shape == (1, config.embed_dim)


def train_thinker(tmp_path, name: str, seed: int = 1) -> Training:
    thinker = TEXT.training(tmp_path, save_dir=name, max_steps=2, seed=seed)
    thinker.finish()
    return thinker


def test_a_frozen_thinker_reads_the_captions_and_stays_as_it_is(tmp_path):
    thinker = train_thinker(tmp_path, "thinker")
    before = (thinker.save_dir / "thinker.pt").read_bytes()
    keys = {"use_thinker_for_text": True, "thinker_ckpt": str(thinker.save_dir)}
    reference = VISION.training(tmp_path, save_dir="reference", **keys)
    reference.finish()
    assert (thinker.save_dir / "thinker.pt").read_bytes() == before
    newest = reference.newest()["phases"]["vision"]
    assert not any(name.startswith(("text.", "_frozen")) for name in newest["module"])
    parts = newest["optimizer"]["parts"]
    trained = sum(len(group["params"]) for part in parts for group in part["param_groups"])
    assert trained == len(newest["module"]) - 1, "all but the Thinker's digest"
    killed = reference.changed(save_dir="killed")
    assert killed.run(prelude=kill_at_step(8)).returncode == -9

    other = train_thinker(tmp_path, "other", seed=2)
    (other.save_dir / "tokenizer.json").write_bytes((thinker.save_dir / "tokenizer.json").read_bytes())
    only_error(killed.changed(thinker_ckpt=str(other.save_dir)).run(), "data (Thinker)", "new save_dir")
    killed.finish()
    assert differences(killed.state(), reference.state()) == []

    opened = load(TABLE["vision"], reference.save_dir)
    attach_thinker(opened)
    model, tokenizer, config = opened.model, opened.tokenizer, opened.config_as(VisionConfig)
    tokens, ends = pad_captions([encode_caption(tokenizer, text, config.ctx_len) for text in ("one cat", "two dogs")])
    assert model.embed_captions(tokens, ends).shape == (2, config.embed_dim)
    moved = tmp_path / "moved"
    thinker.save_dir.rename(moved)
    attach_thinker(opened, moved)
    with pytest.raises(UserError, match="not the Thinker"):
        attach_thinker(opened, other.save_dir)


def test_an_absent_thinker_is_one_line(tmp_path):
    keys = {"use_thinker_for_text": True, "thinker_ckpt": str(tmp_path / "nowhere")}
    training = VISION.training(tmp_path, **keys)
    only_error(training.run(), ".json", 'key "thinker_ckpt"', "nowhere", "train_text.py")
    only_error(training.changed(thinker_ckpt=None).run(), 'key "thinker_ckpt"')
    assert not training.save_dir.exists()


@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ({"patch": 5}, '"img_size": expected a multiple of patch 5'),
        ({"n_heads": 3}, '"d_model": expected a multiple of n_heads 3'),
        ({"text_heads": 3}, '"text_d_model"'),
        ({"text_d_model": 12, "text_heads": 4}, "rotary"),
        ({"temperature": 0}, '"temperature"'),
        ({"batch_size": 1}, '"batch_size": expected at least 2 captions to contrast'),
        ({"image_root": "absent"}, '"image_root": expected a folder, found none at absent'),
    ],
)
def test_impossible_keys_are_one_line(tmp_path, keys, fragment):
    only_error(VISION.training(tmp_path, **keys).run(), fragment)


def test_captions_that_are_cut_and_a_picture_without_company_are_told(tmp_path):
    training = VISION.training(tmp_path, max_steps=1, val_split=0.0, batch_size=23, drop_last=False)
    path = tmp_path / "annotations.json"
    rows = json.loads(path.read_text())
    for row in rows[:5]:
        row["caption"] = "one two " * 40
    path.write_text(json.dumps(rows))
    log = training.finish().stdout
    tokenizer = Tokenizer.load(training.save_dir / "tokenizer.json")
    longest = 1 + max(len(tokenizer.encode(row["caption"])) for row in rows)
    assert f"{path}: 5 of 24 captions are cut to ctx_len 16 tokens, the longest has {longest}\n" in log
    assert "the last batch of an epoch has 1 picture" in log
    log = training.changed(save_dir="other", batch_size=24, ctx_len=longest).finish().stdout
    assert "are cut to" not in log and "the last batch" not in log
    path.write_text(json.dumps(rows[:1]))
    only_error(training.changed(save_dir="alone").run(), f"{path}: expected at least 2 pictures to train on, found 1")


def test_a_picture_alone_has_no_part_in_the_loss_of_validation():
    assert math.isnan(judged(Oracle(None, torch.full((1, 0), -1), torch.arange(1)), 1)["loss"])
    model = Oracle(None, torch.full((3, 0), -1), torch.tensor([1, 0, 2]))
    same = torch.eye(3, dtype=torch.bool)
    same[2] = same[:, 2] = True  # the third has the caption of one and the picture of the other
    two = Oracle(None, torch.full((2, 0), -1), torch.tensor([1, 0]))
    assert judged(model, 3, same)["loss"] == pytest.approx(judged(two, 2)["loss"]) and judged(two, 2)["loss"] > 1
    assert math.isnan(judged(model, 3, torch.ones(3, 3, dtype=torch.bool))["loss"])


def test_held_out_pictures_that_have_nothing_to_be_told_from_are_refused(tmp_path):
    """Captions of one picture, or one caption of all pictures: their loss is 0 whatever the model has learnt."""
    training = VISION.training(tmp_path, max_steps=8)
    rows = json.loads((tmp_path / "annotations.json").read_text())
    held_out = tmp_path / "val.json"
    training.config["val_manifest"] = str(held_out)
    refused = "expected at least 2 different pictures with different captions to tell apart, found 1"
    for alike in ([rows[0] | {"caption": text} for text in ("one cat", "two dogs")], [rows[0], rows[1] | rows[0]]):
        held_out.write_text(json.dumps(alike))
        only_error(training.run(), f"{held_out}: {refused}")
    held_out.write_text(json.dumps([row | {"caption": "one cat"} for row in rows[:5]]))
    only_error(training.run(), f"{held_out}: {refused}")
    held_out.write_text(json.dumps([rows[0], rows[0] | {"caption": "one cat"}, rows[1] | {"caption": "two dogs"}]))
    training.finish()
    log = (training.save_dir / "training.log").read_text()
    assert f"{held_out}: of its held-out rows, 2 have different pictures and different captions" in log
    metrics = training.metrics("val")[-1]
    assert metrics["loss"] > 0 and "top1_of_64" not in metrics
    judgement = run_script(training, "scripts/evaluate.py", "vision", "--data", str(held_out), "--limit", "2")
    assert judgement.returncode == 2 and judgement.stderr.endswith(f"error: {held_out}: {refused}\n")
    same_picture = tmp_path / "one picture.json"
    same_picture.write_text(json.dumps([rows[0] | {"caption": text} for text in ("one cat", "two dogs", "three")]))
    training.config |= {"train_manifest": str(same_picture), "save_dir": str(tmp_path / "other")}
    only_error(training.run(), f"{same_picture}: expected at least 2 pictures to train on, found 1")


def test_a_picture_outside_image_root_is_not_read(tmp_path):
    training = VISION.training(tmp_path, max_steps=2)
    path = tmp_path / "annotations.json"
    rows = json.loads(path.read_text())
    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    (tmp_path / "root").mkdir()
    for row in rows[1:]:
        (tmp_path / row["image"]).rename(tmp_path / "root" / row["image"])
    rows[0]["image"] = "../secret.png"
    path.write_text(json.dumps(rows))
    training = training.changed(image_root=str(tmp_path / "root"), max_epochs=1, max_steps=None, drop_last=False)
    assert "row 1: ../secret.png leaves the folder" in training.finish().stdout


def test_every_row_comes_once_an_epoch_with_its_own_caption(tmp_path):
    from omni.stages.captions import CaptionRows

    keys = make_images(tmp_path)
    manifest = load_manifest(keys["train_manifest"], ("image", "caption"), "image")
    tokenizer = Tokenizer.train(iter(["a cat"] * 9), 300)
    config = VisionConfig(save_dir="x", max_steps=1, img_size=16, patch=8, **keys)
    rows = CaptionRows(manifest, np.arange(24), tokenizer, config, training=True)
    seen = []
    for batch in ResumableDataset(rows, seed=1, batch_size=5):
        assert batch["images"].dtype == torch.uint8 and batch["n_targets"] == len(batch["rows"])
        for row, ids, end in zip(batch["rows"], batch["tokens"], batch["ends"], strict=True):
            assert tokenizer.decode(ids[:end].tolist()) == manifest[row]["caption"]
            assert ids[end] == tokenizer.eos_id
            seen.append(row)
    assert sorted(seen) == list(range(24))


def test_other_classes_are_other_data(tmp_path):
    training = VISION.training(tmp_path)
    path = (tmp_path / training.config["train_manifest"]).with_suffix(".classes.json")
    path.write_text(json.dumps(ENTRIES))
    assert training.run(prelude=kill_at_step(9)).returncode == -9
    path.write_text(json.dumps(ENTRIES[1:]))
    only_error(training.run(), "data (classes)", "new save_dir")
    path.write_text(json.dumps(ENTRIES))
    training.finish()
