"""What OCR reads symbol by symbol is what it was trained to read at once; its stage loses no text in silence."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from harness import Training
from PIL import Image, ImageDraw, ImageFont
from test_config import only_error

from omni.common.text import clean_text
from omni.data.images import load_image
from omni.data.open_manifest import load_manifest
from omni.data.tokenizer import IGNORE_INDEX
from omni.models.architectures import OcrArchitecture
from omni.models.layers import KVCache
from omni.models.ocr import END, OcrModel, ink_of, read_text, spelled_by
from omni.stages import STAGES
from omni.stages.ocr import OcrConfig, OcrRows, column_loss, encode_texts, ocr_loss, ocr_metrics, ocr_sums
from omni.train.config import load_config
from omni.train.stage import load

SIZES = {
    "img_height": 16, "img_width": 64, "patch_height": 16, "patch_width": 4, "vision_d_model": 32, "vision_layers": 1,
    "vision_heads": 2, "vision_d_ff": 64, "decoder_d_model": 32, "decoder_layers": 2, "decoder_heads": 2,
    "decoder_d_ff": 64, "dropout": 0.0, "max_text_length": 9,
}  # fmt: skip
STEM = {"conv_stem": True, "ctc_weight": 0.5}
INK = {"even_ink": True}
WORDS = ["CAT", "DOG 7", "bird", "A1", "7:30", "Exit", "no", "$9"]


def draw(text: str) -> Image.Image:
    image = Image.new("RGB", (64, 16), "white")
    ImageDraw.Draw(image).text((2, 1), text, fill="navy", font=ImageFont.load_default(12))
    return image


def as_batch(texts: list[str], arch: OcrArchitecture) -> dict:
    images = [torch.from_numpy(np.asarray(draw(text)).transpose(2, 0, 1).copy()) for text in texts]
    symbols, targets = encode_texts(texts, arch)
    return {"images": torch.stack(images), "symbols": symbols, "targets": targets, "texts": texts}


def build(**keys) -> OcrModel:
    torch.manual_seed(0)
    model = OcrModel(OcrArchitecture(**SIZES | {"characters": "".join(sorted(set("".join(WORDS))))} | keys)).eval()
    with torch.no_grad():  # far from its start, where all logits are nearly equal and the picture plays no part
        for name, parameter in model.named_parameters():
            parameter += (0.5 if "cross_attn" in name else 0.1) * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def trained() -> tuple[OcrModel, dict]:
    """A model that has overfitted one batch."""
    torch.manual_seed(0)
    model = OcrModel(OcrArchitecture(**SIZES, characters="".join(sorted(set("".join(WORDS))))))
    batch = as_batch(WORDS, model.architecture)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        ocr_loss(model, batch, 0.0)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), batch


# --- The model -------------------------------------------------------------------------------------------------------


def test_it_overfits_one_batch(trained):
    model, batch = trained
    assert read_text(model, batch["images"]) == WORDS
    sums = {name: value.item() for name, value in ocr_sums(model, batch).items()}
    assert sums["edits"] == 0 and sums["exact"] == sums["lines"] == 8
    assert sums["targets"] == sum(len(word) + 1 for word in WORDS), "the end is a target too"


@pytest.mark.parametrize(
    "keys", [{}, {"decoder_d_model": 48}, STEM, INK], ids=["equal widths", "bridge", "stem", "ink"]
)
def test_cached_decoding_equals_the_full_forward(keys):
    model = build(**keys)
    batch = as_batch(WORDS, model.architecture)
    with torch.no_grad():
        logits, _ = model(batch["images"], batch["symbols"])
        image = model.keys_values(model.encode(batch["images"]))
        cache = KVCache(model.decoder_arch, len(WORDS), 9, "cpu", torch.float32)
        steps = [model.head(model.decode(symbols, image, cache)) for symbols in batch["symbols"].split(1, dim=1)]
        assert torch.allclose(torch.cat(steps, dim=1), logits, atol=1e-5)
        others, _ = model(batch["images"].flip(0), batch["symbols"])
        assert (others - logits).abs().amax(dim=-1).min() > 1e-3, "every symbol must depend on the picture"


def test_reading_is_the_likeliest_symbol_at_every_step(trained):
    model, batch = trained
    images = batch["images"].flip(3)  # never seen
    read = model.generate(images)  # (B, T)
    start = torch.full((len(read), 1), 1 + len(model.architecture.characters))
    with torch.no_grad():
        logits, _ = model(images, torch.cat((start, read[:, :-1]), dim=1))
    alive = (read == END).cumsum(dim=1) - (read == END).int() == 0  # up to the end, and the end itself
    assert torch.equal(logits.argmax(dim=-1)[alive], read[alive])


def test_what_follows_changes_nothing_before_it():
    model = build()
    batch = as_batch(WORDS, model.architecture)
    logits, _ = model(batch["images"], batch["symbols"])
    changed = batch["symbols"].clone()
    changed[:, 3:] = 2
    assert torch.allclose(model(batch["images"], changed)[0][:, :3], logits[:, :3], atol=1e-5)
    longer = torch.nn.functional.pad(batch["symbols"], (0, 3), value=END)
    assert torch.allclose(model(batch["images"], longer)[0][:, : logits.shape[1]], logits, atol=1e-5)


@pytest.mark.parametrize("keys", [{}, STEM], ids=["patches", "stem"])
def test_every_pixel_can_be_seen(keys):
    model = build(**keys)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad_()))
    batch = as_batch(["CAT"], model.architecture)
    ocr_loss(model, batch, 0.0)[0].backward()
    assert (seen[0].grad.abs().amax(dim=1) > 0).all()


def test_ink_is_the_same_in_all_colours_and_contrasts():
    """And whatever the picture's polarity: each is the same drawing in another pair of colours."""
    drawing = torch.from_numpy(np.asarray(draw("DOG 7").convert("L")).copy()).float()
    share = ((drawing.max() - drawing) / np.ptp(drawing.numpy()))[None]  # 1 where the ink is strongest
    pictures = []
    for ink, ground in (((0, 0, 0), (255, 255, 255)), ((250, 240, 10), (20, 30, 90)), ((90, 60, 60), (130, 120, 160))):
        ink, ground = (torch.tensor(colour, dtype=torch.float)[:, None, None] for colour in (ink, ground))
        pictures.append((ground + (ink - ground) * share).round().to(torch.uint8))
    found = ink_of(torch.stack(pictures))
    assert found.shape == (3, 3, 16, 64) and found.dtype == torch.float32
    assert torch.equal(found[:, 0], found[:, 2])
    for ink in found[:, 0]:
        assert torch.allclose(ink, 2 * share[0] - 1, atol=0.06)
    light, dark = pictures[0][None], (255 - pictures[0])[None]
    with torch.no_grad():
        assert torch.allclose(build(**INK).encode(light), build(**INK).encode(dark), atol=1e-3)
        assert not torch.allclose(build().encode(light), build().encode(dark), atol=0.1)
    plain = torch.full((1, 3, 16, 64), 77, dtype=torch.uint8)
    assert torch.equal(ink_of(plain), torch.full((1, 3, 16, 64), -1.0)), "an empty picture has no ink"


def test_what_the_columns_spell():
    blank, classes = 3, [[3, 0, 0, 3, 0, 1], [3, 3, 3, 3, 3, 3], [0, 1, 2, 0, 1, 2]]
    columns = torch.nn.functional.one_hot(torch.tensor(classes), blank + 1).float()
    assert spelled_by(columns, 9).tolist() == [[1, 1, 2, 0, 0, 0], [0] * 6, [1, 2, 3, 1, 2, 3]]
    assert spelled_by(columns, 4).tolist() == [[1, 1, 2, 0], [0] * 4, [1, 2, 3, 1]]
    assert spelled_by(columns[1:2], 4).tolist() == [[0]]


def test_the_text_with_the_lower_training_loss_is_read(monkeypatch):
    model = build(**STEM)
    batch = as_batch(WORDS, model.architecture)
    true = batch["symbols"][:, 1:]  # as long as the longest
    other = torch.where(true == END, END, 1)
    with torch.no_grad():
        tokens = model.encode(batch["images"])
        image, columns = model.keys_values(tokens), model.columns(tokens)
        costs = [model.nats(symbols, image, columns) for symbols in (true, other)]
        for row, text in enumerate(WORDS):  # a batch of one line: the mean over its targets
            line = as_batch([text], model.architecture) | {"images": batch["images"][row : row + 1]}
            loss, _ = ocr_loss(model, line, model.architecture.ctc_weight)
            assert torch.allclose(costs[0][row], loss * (len(text) + 1), rtol=1e-4)
    first = model.architecture.characters[0]
    cheaper = [text if ours <= theirs else first * len(text) for text, ours, theirs in zip(WORDS, *costs, strict=True)]
    assert set(cheaper) & set(WORDS) and set(cheaper) - set(WORDS), "some of either"
    for written, spelled in ((true, other), (other, true)):
        monkeypatch.setattr(model, "_written", lambda image, symbols=written: symbols)
        monkeypatch.setattr("omni.models.ocr.spelled_by", lambda columns, limit, symbols=spelled: symbols)
        assert read_text(model, batch["images"]) == cheaper
    monkeypatch.setattr(model, "_written", lambda image: true[:, :3])  # shorter than what is spelled
    assert len(read_text(model, batch["images"])) == len(WORDS)


def test_a_line_is_read_alike_in_any_company(trained):
    model, batch = trained
    images = batch["images"]
    assert [read_text(model, image[None])[0] for image in images] == read_text(model, images)


def test_reading_ends_with_the_last_line_and_is_bounded(monkeypatch):
    model = build()
    images = as_batch(["CAT", "no"], model.architecture)["images"]

    def read(script: list[list[int]]) -> list[list[int]]:
        """What comes of it when the model wants to write ``script``, (lines, steps)."""
        steps = iter(torch.nn.functional.one_hot(torch.tensor(script), model.n_written).float().unbind(dim=1))
        monkeypatch.setattr(model, "head", lambda hidden: next(steps)[:, None])
        return model.generate(images).tolist()

    assert read([[3, END, 5, 6], [2, 4, END, 7]]) == [[3, END, END], [2, 4, END]]
    assert read([[1] * 20, [2] * 20]) == [[1] * 9, [2] * 9]


# --- Texts -----------------------------------------------------------------------------------------------------------


def test_symbols_and_targets():
    arch = OcrArchitecture(**SIZES, characters="abc")
    symbols, targets = encode_texts(["ab", "c", "aéc"], arch)
    start, unknown, pad = 4, 5, END
    assert symbols.tolist() == [[start, 1, 2, pad], [start, 3, pad, pad], [start, 1, unknown, 3]]
    assert targets.tolist() == [
        [1, 2, END, IGNORE_INDEX],
        [3, END, IGNORE_INDEX, IGNORE_INDEX],
        [1, IGNORE_INDEX, 3, END],
    ]
    assert encode_texts(["a"], arch, pad_to=10)[0].shape == (1, 10)


def test_text_as_a_picture_tells_it():
    assert clean_text("  cafe\u0301 \t a\n") == "caf\u00e9 a"


def test_unknown_characters_are_errors(trained):
    model, batch = trained
    texts = ["CAT", "DÖG 7", *WORDS[2:]]  # as drawn, but the second is meant to hold what the model cannot write
    symbols, targets = encode_texts(texts, model.architecture)
    sums = ocr_sums(model, batch | {"texts": texts, "symbols": symbols, "targets": targets})
    metrics = ocr_metrics({name: value.item() for name, value in sums.items()})
    assert (int(sums["edits"]), int(sums["exact"])) == (1, 7) and np.isfinite(metrics["loss"])
    assert metrics["cer"] == 1 / sum(map(len, WORDS)) and metrics["exact"] == 7 / 8


def test_every_kind_of_edit_counts(trained, monkeypatch):
    model, batch = trained
    read = ["CATS", "DOG 7", "bid", "A7", "", "Exit", "no", "$9"]  # one added, one lost, one wrong, four lost
    monkeypatch.setattr("omni.stages.ocr.read_text", lambda model, images: read)
    sums = ocr_sums(model, batch)
    assert [int(sums[name]) for name in ("edits", "characters", "exact", "lines")] == [7, 26, 4, 8]


def test_the_loss_of_the_columns_leaves_out_what_they_cannot_spell():
    arch = OcrArchitecture(**SIZES, characters="abc")
    columns = torch.randn(4, 5, 4)  # five columns
    _, targets = encode_texts(["abca", "aaa", "aaab", "aéc"], arch)  # "aaab" needs six, "é" is not in the set
    columns.requires_grad_()
    loss = column_loss(columns, targets)
    loss.backward()
    spelled = columns.grad.abs().amax(dim=(1, 2)) > 0
    assert spelled.tolist() == [True, True, False, False] and torch.isfinite(columns.grad).all()
    log_probs = columns.detach().log_softmax(dim=-1)[1, range(5), [0, 3, 0, 3, 0]]  # the one way to spell "aaa"
    assert torch.allclose(column_loss(columns[1:2], targets[1:2]) * 4, -log_probs.sum())


def test_the_columns_learn_as_well(tmp_path):
    training = stage(tmp_path, train_csv=write_rows(tmp_path, WORDS), val_split=0.0, **STEM, max_steps=6)
    training.finish()
    assert {"loss", "cross_entropy", "ctc"} <= training.metrics()[0].keys()
    ctc = [row["ctc"] for row in training.metrics()]
    assert ctc[-1] < ctc[0]


def test_sums_add_up_over_batches(trained):
    model, batch = trained
    whole = ocr_sums(model, as_batch(["CAT", "DOG 7", "nod", "Exit 7"], model.architecture))
    parts = [ocr_sums(model, as_batch(texts, model.architecture)) for texts in (["CAT", "DOG 7"], ["nod", "Exit 7"])]
    assert int(whole["edits"]) > 0
    for name, value in whole.items():
        assert torch.allclose(value.float(), (parts[0][name] + parts[1][name]).float()), name


# --- The stage -------------------------------------------------------------------------------------------------------


def write_rows(folder, texts: list[str], name: str = "ocr.csv") -> str:
    (folder / "lines").mkdir(exist_ok=True)
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "text"))
        for row, text in enumerate(texts):
            draw(text).save(folder / "lines" / f"{name}{row}.png")
            writer.writerow((f"lines/{name}{row}.png", text))
    return str(folder / name)


def stage(folder, **keys) -> Training:
    config = SIZES | {
        "save_dir": str(folder / "run"), "batch_size": 4, "max_steps": 4, "lr": 3e-3, "warmup_steps": 2,
        "use_amp": False, "num_workers": 0, "print_freq": 2, "val_freq": 4, "checkpoint_freq": 4,
    }  # fmt: skip
    return Training("train_ocr.py", "ocr", "ocr.pt", folder, config | keys)


def test_rows_that_cannot_be_used_are_named_and_the_final_file_reads_alone(tmp_path):
    rows = [*WORDS, "much too long", "and this as well"]
    keys = {"train_csv": write_rows(tmp_path, rows), "val_csv": write_rows(tmp_path, ["CÄT!", "ÄÄ"], "val.csv")}
    (tmp_path / "lines" / "ocr.csv2.png").write_bytes(b"no picture")
    training = stage(tmp_path, **keys, max_steps=8)
    output = training.finish().stdout
    assert "2 of 10 rows left out, texts longer than max_text_length 9: rows 9, 10\n" in output
    assert 'each counts as an error: {"!": 1, "Ä": 3}' in output
    assert f"{keys['train_csv']}: row 3" in output and "ocr.csv2.png" in output
    validation = training.metrics("val")[-1]
    assert validation["cer"] > 0 and validation["exact"] == 0

    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(training.save_dir / "ocr.pt", alone)
    model = load(STAGES["ocr"], alone).model
    assert model.architecture.characters == "".join(sorted(set("".join(WORDS)))) and not model.training
    sizes = model.architecture
    image = load_image(tmp_path / "lines" / "ocr.csv0.png", sizes.height, sizes.width, fit="pad")
    assert isinstance(read_text(model, image[None])[0], str)


def test_held_out_texts_are_never_trained_on(tmp_path):
    path = write_rows(tmp_path, [f"{word}{copy}" for word in WORDS for copy in "abc"] * 2)
    noting = f"""
import omni.stages.ocr
_read = omni.stages.ocr.OcrRows.read
def read(self, row, rng):
    with open({str(tmp_path / "read.txt")!r}, "a") as file:
        print(self.training, row["text"], sep="\\t", file=file)
    return _read(self, row, rng)
omni.stages.ocr.OcrRows.read = read
"""
    stage(tmp_path, train_csv=path, val_split=0.3, max_steps=None, max_epochs=1, drop_last=False).finish(prelude=noting)
    read = {tuple(line.split("\t")) for line in (tmp_path / "read.txt").read_text().splitlines()}
    trained, validated = ({text for training, text in read if training == which} for which in ("True", "False"))
    assert len(trained) + len(validated) == 24 and validated and not trained & validated


def test_given_characters_are_kept_and_cannot_change(tmp_path):
    training = stage(tmp_path, train_csv=write_rows(tmp_path, WORDS), val_split=0.0, characters="CATDOG")
    assert "nothing will be validated" in training.finish().stdout
    assert load(STAGES["ocr"], training.save_dir).architecture.characters == "ACDGOT"
    only_error(training.changed(characters="CATS", max_steps=6).run(), "characters.json", "new save_dir")


def test_compiled_batches_have_one_shape(tmp_path):
    keys = {"save_dir": "x", "max_steps": 1, "train_csv": write_rows(tmp_path, WORDS), "characters": "CATEix"}
    manifest = load_manifest(keys["train_csv"], ("image", "text"), "text")
    for use_compile, length in ((False, 5), (True, 10)):
        config = OcrConfig(**SIZES, **keys, use_compile=use_compile)
        batch = OcrRows(manifest, np.arange(8), config, training=False).batch(np.array([0, 5]), epoch=0)
        assert batch["symbols"].shape == batch["targets"].shape == (2, length)
        assert batch["images"].shape == (2, 3, 16, 64) and batch["n_targets"] == len("CAT#") + len("Exi#")


def test_a_text_that_does_not_fit_is_a_bad_row_wherever_it_is_read(tmp_path):
    path = write_rows(tmp_path, ["CAT", "much too long"])
    config = OcrConfig(**SIZES, save_dir="x", max_steps=1, train_csv=path, characters="CAT")
    manifest = load_manifest(path, ("image", "text"), "text")
    batch = OcrRows(manifest, np.arange(2), config, training=False).batch(np.arange(2), epoch=0)
    assert batch["texts"] == ("CAT",) and list(batch["bad_rows"].values()) == [
        "expected a text of at most 9 characters, found 13"
    ]


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        ({"img_width": 62}, ['"img_width"', "multiple of 4 (a patch)", "62"]),
        ({"vision_heads": 3}, ['"vision_d_model"', "multiple of vision_heads 3", "32"]),
        ({"decoder_d_model": 6 * 8, "decoder_heads": 16}, ['"decoder_d_model"', "even width", "3"]),
        ({"vision_d_model": 24, "conv_stem": True}, ['"vision_d_model"', "multiple of 16 (conv_stem)", "24"]),
        ({"max_text_length": 0}, ['"max_text_length"', "0"]),
        ({"val_csv": "absent.csv"}, ['"val_csv"', "absent.csv"]),
    ],
)
def test_impossible_sizes(tmp_path, keys, fragments):
    training = stage(tmp_path, train_csv=write_rows(tmp_path, WORDS), **keys)
    only_error(training.run(), *fragments)
    assert not training.save_dir.exists()


def test_keys_of_older_files(tmp_path):
    keys = {
        "save_dir": "x", "train_csv": write_rows(tmp_path, WORDS), "image_root": "data/ocr", "img_size": 224,
        "patch": 16, "vision_d_model": 128, "vision_layers": 4, "vision_heads": 2, "vision_d_ff": 512,
        "decoder_d_model": 256, "decoder_layers": 4, "decoder_heads": 4, "decoder_d_ff": 1024, "dropout": 0.1,
        "max_text_length": 256, "lr": 3e-4, "wd": 0.1, "warmup_steps": 10, "max_epochs": 2, "shuffle_buffer_size": 10,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config, _ = load_config(OcrConfig, str(tmp_path / "config.json"))
    assert (config.height, config.width, config.patch_size) == (224, 224, (16, 16))
