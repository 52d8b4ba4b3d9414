"""Checkpoints, exports and tokenizers that somebody altered, or that another version wrote: each is refused in one
line, in bounded memory, or is the same model as before."""

import json
import random
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from stages import AUDIO_ENC, OCR, OMNI, TEXT, VISION, VOCODER, make_mix, save_model
from test_config import only_error

import export
from omni.chat.assistant import Assistant
from omni.chat.speech import load_speaker
from omni.common.errors import UserError
from omni.common.files import file_sha256, read_json, read_sealed_json, write_json, write_sealed_json
from omni.data.tokenizer import Tokenizer
from omni.export.bundle import Export
from omni.export.folder import INFO, info_sha256
from omni.models.ctc import CtcTokenizer
from omni.models.ocr import OcrModel
from omni.models.vocoder import Generator
from omni.stages import STAGES as TABLE
from omni.stages.ocr import OcrConfig
from omni.stages.omni import SftConfig
from omni.stages.omni_parts import assemble
from omni.stages.vocoder import VocoderConfig
from omni.train import checkpoint
from omni.train.stage import load

CPU = torch.device("cpu")
WRONG = (
    None, "", "x", "../../etc/passwd", True, -1, 0, 1.5, 10**8, 10**12, 10**30, float("nan"), [], {}, [1, "x"],
    {"x": None}, "x" * 10_000, "a\nb",
)  # fmt: skip
FOLDERS = {  # stage -> its folder
    "text": "thinker", "audio_enc": "audio_enc", "vision": "vision", "ocr": "ocr", "vocoder": "vocoder",
    "talker": "said/codec", "codec": "said/codec", "aligner": "said/codec", "omni": "omni",
}  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    keys = make_mix(folder)
    for name, stage, cls, make in (
        ("ocr", OCR, OcrConfig, lambda config: OcrModel(config.architecture)),
        ("vocoder", VOCODER, VocoderConfig, lambda config: Generator(config.architecture)),
    ):
        characters = {"characters": "abcdefgh"} if name == "ocr" else {}
        config = cls(**stage.config | {"train_csv": "-", "save_dir": "-"} | characters)
        (folder / name).mkdir()
        save_model(folder / name / stage.final, name, config, make(config))
    config, model, tokenizer = assemble(SftConfig(**OMNI.config | keys | {"save_dir": "-"}))
    (folder / "omni").mkdir()
    save_model(folder / "omni" / "omni_final.pt", "omni", config, model)
    tokenizer.save(folder / "omni" / "tokenizer.json")
    return folder


@contextmanager
def little_memory(more: int = 1 << 30):
    """Whatever the block asks for beyond ``more`` bytes is refused by the system."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def one_line(error: Exception, *names: str) -> None:
    assert "\n" not in str(error) and len(str(error)) < 600, str(error)
    for name in names:
        assert name in str(error)


def places(value: dict, above: tuple = ()) -> list[tuple]:
    """The path of every key; of a table of weights the first alone, as all are alike."""
    found = []
    for key, entry in value.items():
        if key != "format":  # compared before anything else is read
            found.append((*above, key))
        if isinstance(entry, dict):
            inside = places(entry, (*above, key))
            found += inside[:1] if key == "model" and not above else inside
    return found


def changed(value: dict, path: tuple, new) -> dict:
    """A copy in which the entry at ``path`` is ``new``, or is gone if that is ``...``."""
    copy, (key, *rest) = dict(value), path
    if rest:
        copy[key] = changed(value[key], rest, new)
    elif new is ...:
        del copy[key]
    else:
        copy[key] = new
    return copy


def damages(content: bytes, flips: int, seed: int) -> list[bytes]:
    """Random single-bit flips, and what is left of a file that was cut."""
    rng, found = random.Random(seed), [content[: len(content) * part // 8] for part in range(8)]
    for _ in range(flips):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        found.append(bytes(flipped))
    return [*found, content[:-1]]


# ---------------------------------------------------------------------------------------------------------------
# Keys and sizes


@pytest.mark.parametrize("name", FOLDERS)
def test_an_altered_checkpoint_is_one_line_or_the_same_model(stages, monkeypatch, name):
    folder, stage = stages / FOLDERS[name], TABLE[name]
    whole, rng = checkpoint.load(folder / stage.final), random.Random(stage.final)
    loaded = 0
    with little_memory():
        for path in rng.sample(places(whole), 24):
            for new in (rng.choice(WRONG), rng.choice([..., 10**8, 10**12])):
                payload = changed(whole, path, new)
                monkeypatch.setattr(checkpoint, "load", lambda _, payload=payload: payload)
                try:
                    load(stage, folder)
                    loaded += 1
                except UserError as error:
                    one_line(error, str(folder))
    assert loaded, "keys that do not matter to the model, such as batch_size, may be other ones"


def test_another_format_is_one_line(stages, tmp_path):
    whole = checkpoint.load(stages / "ocr" / "ocr.pt")
    for wrong in (*WRONG, torch.zeros(2)):
        checkpoint.save(tmp_path / "ocr.pt", whole | {"format": wrong})
        with pytest.raises(UserError, match="this version reads format 2") as error:
            load(TABLE["ocr"], tmp_path)
        one_line(error.value)


def test_weights_that_the_file_does_not_hold_in_full_are_refused(stages, tmp_path):
    whole = checkpoint.load(stages / "thinker" / "thinker.pt")
    shutil.copy(stages / "thinker" / "tokenizer.json", tmp_path)
    name, rows = "embed_tokens.weight", 1 << 40
    weights = whole["model"] | {name: torch.zeros(1).expand(rows, 16)}
    checkpoint.save(tmp_path / "thinker.pt", whole | {"model": weights})
    with little_memory(), pytest.raises(UserError, match="does not hold in full") as error:
        load(TABLE["text"], tmp_path)
    one_line(error.value, "thinker.pt")


@pytest.fixture(scope="module")
def merged(stages, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("export") / "merged"
    folders = {"omni": "omni", "ocr": "ocr", "vocoder": "vocoder", "audio": "audio_enc", "talker": "said/codec"}
    without = {"vocoder"}  # its log-mels are others
    pairs = [(f"--{name}_ckpt", str(stages / path)) for name, path in folders.items() if name not in without]
    export.main([*(word for pair in pairs for word in pair), "--output_dir", str(output)])
    return output


def sealed_again(folder: Path, info: dict) -> None:
    info = {key: value for key, value in info.items() if key != "sha256"}
    write_json(folder / INFO, info | {"sha256": info_sha256(info)})


@pytest.mark.parametrize("file", ["config.json", INFO])
def test_an_altered_export_is_one_line_or_the_same_model(merged, tmp_path, file):
    folder, rng = shutil.copytree(merged, tmp_path / "merged"), random.Random(file)
    whole, info = read_json(folder / file), read_json(folder / INFO)
    with little_memory():
        for path in rng.sample(places(whole), 10):
            for new in (rng.choice(WRONG), rng.choice([..., 10**8, 10**12])):
                if file == INFO:
                    sealed_again(folder, changed(whole, path, new))
                else:
                    write_json(folder / file, changed(whole, path, new))
                    sealed_again(folder, changed(info, ("files", file), file_sha256(folder / file)))
                try:
                    opened = Export(folder)
                    for part in ("thinker", "audio_encoder", "vision_encoder", "talker", "rvq", "ocr"):
                        opened.open(part)
                    opened.open("omni")
                    load_speaker(folder, None, None, CPU, Assistant.load(folder, CPU))
                except UserError as error:
                    one_line(error, str(folder))


@pytest.mark.parametrize("key", ["prompt", "origins"])
def test_keys_of_a_conversation_are_checked_before_it_begins(merged, tmp_path, key):
    folder = shutil.copytree(merged, tmp_path / "merged")
    whole, info = read_json(folder / "config.json"), read_json(folder / INFO)
    for new in (..., *WRONG, {"codec": 5}):
        write_json(folder / "config.json", changed(whole, ("omni", key), new))
        sealed_again(folder, changed(info, ("files", "config.json"), file_sha256(folder / "config.json")))
        try:
            load_speaker(folder, None, None, CPU, Assistant.load(folder, CPU))
        except UserError as error:
            one_line(error, str(folder))
        else:
            assert isinstance(new, str if key == "prompt" else dict)


def test_json_that_is_none_is_one_line(tmp_path):
    path = tmp_path / "x.json"
    for content in (
        b"",
        b"[]",
        b"1",
        b"null",
        b'"x"',
        b"\xff{}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"{",
        b"9" * 5000,
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json: damaged") as error:
            read_json(path)
        one_line(error.value)
        assert read_sealed_json(path) is None


def test_a_sealed_json_file_is_what_was_written_or_nothing(tmp_path):
    path, value = tmp_path / "x.json", {"a": 1.5, "b": [1, None, "é"], "c": {"d": float("inf")}, 7: (1, 2)}
    assert read_sealed_json(path) is None
    write_sealed_json(path, value)
    expected = json.loads(json.dumps(value))
    content = path.read_bytes()
    assert read_sealed_json(path) == expected
    for damaged in damages(content, 200, seed=3):
        path.write_bytes(damaged)
        assert read_sealed_json(path) in (None, expected)
    for other in ({}, {"a": 1}, expected | {"seal": "0" * 64}):
        path.write_text(json.dumps(other))
        assert read_sealed_json(path) is None


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("stage", [TEXT, AUDIO_ENC, VISION, OMNI], ids=lambda stage: stage.name)
def test_a_model_s_tokenizer_is_sealed_with_it(stage, tmp_path):
    training = stage.training(tmp_path, max_steps=2, max_epochs=None)
    training.finish()
    path = training.save_dir / "tokenizer.json"
    content, final = path.read_bytes(), training.save_dir / stage.final
    for file in (final, training.step_path(2)):
        assert checkpoint.load(file)["files"] == {"tokenizer.json": file_sha256(path)}

    def refused() -> None:
        with pytest.raises(UserError, match=r"tokenizer\.json") as error:
            load(TABLE[stage.name], training.save_dir)
        one_line(error.value)

    for damaged in damages(content, 50, seed=4):
        path.write_bytes(damaged)
        refused()
    other = json.loads(content)
    path.write_text(json.dumps(other))  # another file, though it would encode the same way
    refused()
    only_error(training.changed(max_steps=3).run(), "tokenizer.json")
    final.unlink()  # now the step file is what is loaded
    refused()
    path.write_bytes(content)
    load(TABLE[stage.name], training.save_dir)


def test_a_tokenizer_that_does_more_than_ours_is_refused(tmp_path):
    ours, path = Tokenizer.train(iter(["red cat", "blue dog"] * 5), 300), tmp_path / "tokenizer.json"
    ctc = CtcTokenizer.train(iter(["red cat", "blue dog"] * 5), 48)
    bomb = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1_000_000}
    for cls, tokenizer in ((Tokenizer, ours), (CtcTokenizer, ctc)):
        whole = json.loads(tokenizer.serialized)
        cases = {
            "normalizer": whole | {"normalizer": bomb},
            "pre_tokenizer": whole | {"pre_tokenizer": None},
            "decoder": whole | {"decoder": bomb},
            "truncation": whole
            | {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
            "model.dropout": changed(whole, ("model", "dropout"), 0.5),
            "ids from 0": changed(whole, ("model", "vocab", "d"), 10**9),
        }
        for name, case in cases.items():
            path.write_text(json.dumps(case))
            with pytest.raises(UserError, match=re.escape(name)) as error:
                cls.load(path)
            one_line(error.value, str(path))
        path.write_text(json.dumps(whole))
        assert cls.load(path).encode("red dog") == tokenizer.encode("red dog")
