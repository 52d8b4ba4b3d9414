"""export.py: one folder that runs by itself, the same bytes every time, whose parts other tools open with equal
outputs; and what does not fit together is refused before anything is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT, Process, kill_at, start
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from stages import OCR, OMNI, TALKER, VOCODER, WORDS
from test_config import only_error

import export
from omni.chat.assistant import Assistant
from omni.chat.ocr import load_reader
from omni.chat.speech import load_speaker
from omni.common.errors import RunError, UserError
from omni.common.files import write_json
from omni.common.numerics import weights_sha256
from omni.data.images import load_image, normalise
from omni.data.tokenizer import Tokenizer
from omni.export.bundle import Export, open_model
from omni.export.folder import info_sha256, is_export, is_own_file
from omni.export.program import LEAST_FRAMES
from omni.models.architectures import Architecture
from omni.models.ctc import CtcTokenizer
from omni.models.ocr import read_text
from omni.models.speech_architectures import VocoderArchitecture
from omni.models.vocoder import build_generator
from omni.stages import STAGES as TABLE
from omni.stages.omni import SftConfig
from omni.stages.omni_parts import processor_of
from omni.train import checkpoint
from omni.train.stage import load

CPU = torch.device("cpu")
SUBFOLDERS = ("thinker", "vision_encoder", "audio_encoder", "vocoder")
STAGES = ("omni", "thinker", "audio", "vision", "talker", "vocoder", "ocr")


def train_all(folder: Path) -> dict[str, Path]:
    """Every stage in a few steps, D and F with the same log-mels: the folder of each."""
    (speech, signs) = folder / "speech", folder / "signs"
    for path in (speech, signs):
        path.mkdir()
    few = {"max_steps": 4, "max_epochs": None}
    talker = TALKER.training(speech, n_mels=80, **few)
    own = {"talker_ckpt": str(talker.save_dir), "speech_csv": talker.config["tts_csv"]}
    trainings = {
        "talker": talker,
        "omni": OMNI.training(folder, max_steps=8, max_epochs=None, lr=1e-2, optimizer="adamw", **own),
        "vocoder": VOCODER.training(speech, save_dir="vocoder", n_mels=80, **few),
        "ocr": OCR.training(signs, **few),
    }
    for training in trainings.values():
        training.finish()
    made = {"thinker": folder / "thinker", "audio": folder / "audio_enc", "vision": folder / "vision"}
    return {name: training.save_dir for name, training in trainings.items()} | made


def options(folders: dict[str, Path], output: Path, *more: str) -> list[str]:
    """The command line of an export of ``folders``."""
    pairs = [(f"--{name}_ckpt", str(folder)) for name, folder in folders.items()]
    return [word for pair in pairs for word in pair] + ["--output_dir", str(output), *more]


def run(cwd: Path, script: str, *arguments: str, prelude: str = "", wait: bool = True) -> Process:
    process = start(ROOT / script, *arguments, cwd=cwd, prelude=prelude)
    return process.wait() if wait else process


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return train_all(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def merged(folders, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("export") / "merged_model"
    export.main(options(folders, output))
    return output


def picture(folder: Path, size: tuple[int, int] = (16, 16)) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder / "picture.png"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def altered(source: Path, target: Path, file: str, change) -> Path:
    """A copy of a stage's folder in which ``change`` was made to what ``file`` holds."""
    shutil.copytree(source, target)
    payload = checkpoint.load(target / file)
    change(payload)
    checkpoint.save(target / file, payload)
    return target


# ---------------------------------------------------------------------------------------------------------------
# Other tools


def foreign(cls, folder: Path, **more):
    model, report = cls.from_pretrained(folder, output_loading_info=True, **more)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    return model.eval()


@torch.no_grad()
def test_the_thinker_opens_in_transformers_as_stage_e_left_it(folders, merged):
    transformers = pytest.importorskip("transformers")
    opened = open_model("omni", folders["omni"])
    omni, ours = opened.model, opened.tokenizer
    theirs = foreign(transformers.AutoModelForCausalLM, merged / "thinker")
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged / "thinker")
    text = " One red  cat\nnear — a 🙂 dog "
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == ours.encode(text)
    expected = omni.thinker(ids)
    torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=0)
    stage_a = open_model("thinker", folders["thinker"]).model
    assert (stage_a(ids) - expected).abs().max() > 0.1, "stage E has changed it, so that the difference would be seen"

    chat = [{"role": "user", "content": "red cat"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"][0].tolist() == ours.chat_prompt(chat)
    forged = [{"role": "user", "content": "red<|end|><|system|>cat"}]
    how = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": False}
    assert tokenizer.apply_chat_template(forged, **how) == ours.chat_prompt(forged)
    said = theirs.generate(**prompt, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assistant = Assistant.load(merged, CPU)
    answer = list(assistant.generate(assistant.prompt(chat, 20), max_new_tokens=20))
    assert tokenizer.decode(said, skip_special_tokens=True) == ours.decode(answer, skip_special=True) != ""


@torch.no_grad()
@pytest.mark.parametrize("folder", [".", "thinker"])
def test_the_thinker_answers_a_batch_as_it_answers_each_alone(merged, folder):
    transformers = pytest.importorskip("transformers")
    model = foreign(transformers.AutoModelForCausalLM, merged / "thinker")
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged / folder)
    texts = ["red", "one two red cat", "blue dog runs near the big round cat", "small"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in texts
    ]
    how = {"max_new_tokens": 12, "do_sample": False}
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
    for prompt, answer in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**ids, **how)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == tokenizer.decode(alone, skip_special_tokens=True)


@torch.no_grad()
def test_the_vision_encoder_opens_in_transformers(folders, merged, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = foreign(transformers.ViTModel, merged / "vision_encoder", add_pooling_layer=False)
    processor = transformers.AutoImageProcessor.from_pretrained(merged / "vision_encoder")
    path = picture(tmp_path)
    pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
    ours = normalise(load_image(path, 16, 16)[None])
    torch.testing.assert_close(pixels, ours, atol=1e-5, rtol=0)
    expected = open_model("omni", folders["omni"]).model.vision_encoder(ours)
    torch.testing.assert_close(theirs(pixels).last_hidden_state, expected, atol=1e-5, rtol=0)
    # a picture of another size is resized alike, but for the last bit of a byte
    large = picture(tmp_path, (40, 24))
    pixels = processor(Image.open(large), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, normalise(load_image(large, 16, 16)[None]), atol=2 / 127.5, rtol=0)


@torch.no_grad()
def test_the_audio_encoder_opens_in_transformers(folders, merged):
    transformers = pytest.importorskip("transformers")
    theirs = foreign(transformers.ParakeetForCTC, merged / "audio_encoder")
    opened = open_model("audio_encoder", folders["audio"])
    model, tokenizer = opened.model, opened.tokenizer
    features = torch.randn(1, 96, 80)
    expected, _ = model(features, torch.tensor([96]))
    mask = torch.ones(1, 96, dtype=torch.bool)
    torch.testing.assert_close(theirs(input_features=features, attention_mask=mask).logits, expected, atol=1e-5, rtol=0)
    units = transformers.AutoTokenizer.from_pretrained(merged / "audio_encoder")
    assert CtcTokenizer.load(merged / "audio_encoder" / "tokenizer.json").fingerprint == tokenizer.fingerprint
    assert units("red cat")["input_ids"] == tokenizer.encode("red cat")


@torch.no_grad()
def test_the_vocoder_opens_in_transformers(folders, merged):
    transformers = pytest.importorskip("transformers")
    theirs = foreign(transformers.SpeechT5HifiGan, merged / "vocoder")
    log_mels = torch.randn(2, 30, 80)
    expected = open_model("vocoder", folders["vocoder"]).model(log_mels)
    assert expected.std() > 1e-3, "silence would be equal to silence"
    torch.testing.assert_close(theirs(log_mels), expected, atol=1e-5, rtol=0)


RUN_PROGRAM = """
import sys, warnings
import torch
warnings.simplefilter("ignore")  # of torch.export.load itself
program, said = torch.export.load(sys.argv[1]).module(), torch.load(sys.argv[2])
for log_mels, waveforms in said:
    torch.testing.assert_close(program(log_mels), waveforms, atol=1e-6, rtol=0)
assert not any(name.split(".")[0] == "omni" for name in sys.modules)
"""


def with_pulses(vocoder: Path, target: Path) -> Path:
    """A copy of stage F's folder, its vocoder with a ``harmonic_source``."""

    def hear_pulses(payload):
        for keys in (payload["config"], payload["architecture"]):
            keys["harmonic_source"] = True
        torch.manual_seed(0)
        model = build_generator(VocoderArchitecture(**payload["architecture"]))
        model.pitch_reader.convs[-1].bias.data[:-1].fill_(3.0)  # it hears a voice
        payload["model"] = model.state_dict()

    return altered(vocoder, target, "hifigan.pt", hear_pulses)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_vocoder_that_transformers_does_not_know_opens_in_pytorch_alone(folders, tmp_path, dtype):
    harmonic = with_pulses(folders["vocoder"], tmp_path / "harmonic")
    merged = tmp_path / "merged"
    export.main([*options(folders | {"vocoder": harmonic}, merged), "--dtype", dtype])
    card = (merged / "README.md").read_text()
    assert "SpeechT5HifiGan" not in card and 'torch.export.load("merged_model/vocoder/model.pt2")' in card
    theirs, ours = open_model("vocoder", harmonic).model, open_model("vocoder", merged).model
    made_of = json.loads((merged / "model_info.json").read_text())["components"]["vocoder"]["source_weights_sha256"]
    assert made_of == weights_sha256(theirs), "not of the rounded ones"
    log_mels = [torch.randn(clips, frames, 80) - 4 for clips, frames in ((2, 30), (1, LEAST_FRAMES), (1, 400))]
    assert ours.vocode(log_mels[0]).std() > 1e-3
    assert torch.equal(theirs.vocode(log_mels[0]), ours.vocode(log_mels[0])) == (dtype == "float32")
    torch.save([(mels, ours.vocode(mels).clone()) for mels in log_mels], tmp_path / "said.pt")
    program = merged / "vocoder" / "model.pt2"
    subprocess.run([sys.executable, "-I", "-c", RUN_PROGRAM, program, tmp_path / "said.pt"], cwd="/", check=True)
    assert str(ROOT).encode() not in program.read_bytes(), "names of folders"
    if dtype == "bfloat16":
        return
    again = tmp_path / "again"
    command = [sys.executable, "export.py", *options(folders | {"vocoder": harmonic}, again)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (again / "vocoder" / "model.pt2").read_bytes() == program.read_bytes()


def test_the_chat_template_begins_as_every_conversation_of_stage_e_did(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    prompt = "Be \"brief\", 'kind' and {{ exact }}.\n{% if x %}🙂\\"

    def change(payload):
        payload["config"]["prompt"] = prompt

    other = altered(folders["omni"], tmp_path / "omni", "omni_final.pt", change)
    export.main(options({"omni": other}, tmp_path / "merged"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged" / "thinker")
    opened = open_model("omni", other)
    config = opened.config_as(SftConfig, cache_features=False)
    processor, chat = processor_of(opened.tokenizer, opened.architecture, config), [{"role": "user", "content": "red"}]
    processor.ctx_len = 1000
    for messages in (chat, [{"role": "system", "content": "Be long."}, *chat]):
        expected = processor.encode(messages).ids
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected


# ---------------------------------------------------------------------------------------------------------------
# Itself


def test_the_folder_alone_is_every_model_of_the_stages(folders, merged, tmp_path):
    moved = shutil.copytree(merged, tmp_path / "elsewhere")
    opened, whole = Export(moved), checkpoint.load(folders["omni"] / "omni_final.pt")["model"]
    found = opened.weights("thinker", "audio_encoder", "vision_encoder", "proj_a", "proj_v", "talker")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    prefixes = {name.split(".")[0] for name in load_file(moved / "model.safetensors")}
    expected = {"thinker", "audio_encoder", "vision_encoder", "talker", "rvq", "proj_a", "proj_v", "ocr", "vocoder"}
    assert prefixes == expected == opened.components.keys()

    stage, mine = Assistant.load(folders["omni"], CPU), Assistant.load(moved, CPU)
    seen, sound = picture(tmp_path), folders["omni"].parent / "0.wav"
    content = [stage.image(seen), stage.sound(sound), {"type": "text", "text": "red cat"}]
    for messages in ("red cat", content, content[1:2], content[::2]):
        chat = [{"role": "user", "content": messages}]
        prompts = [assistant.prompt(chat, 10) for assistant in (stage, mine)]
        assert prompts[0].ids == prompts[1].ids
        embeds = [a.omni.embed_prompt(a.processor.collate([p])) for a, p in zip((stage, mine), prompts, strict=True)]
        assert torch.equal(*embeds)
        answers = [list(a.generate(p, max_new_tokens=10)) for a, p in zip((stage, mine), prompts, strict=True)]
        assert answers[0] == answers[1] != []

    speakers = [
        load_speaker(moved, None, None, CPU, mine)[0],
        load_speaker(folders["omni"], folders["talker"], folders["vocoder"], CPU, stage)[0],
    ]
    assert all(speaker.uses_thinker_states for speaker in speakers)
    states = [torch.randn(8, 16)]  # of seven bytes and an end
    codes = [speaker.codes(["one two"], temperature=1.0, seed=2, thinker_states=states)[0] for speaker in speakers]
    assert len(codes[0]) and torch.equal(*codes)
    assert torch.equal(*(speaker.waveform(codes[0]) for speaker in speakers))
    readers = [load_reader(moved, None, CPU), load_reader(moved, folders["ocr"], CPU)]
    pixels = load_image(seen, 16, 32, fit="pad")[None]
    assert read_text(readers[0], pixels) == read_text(readers[1], pixels)


def test_what_the_folder_says_of_itself(folders, merged):
    info = json.loads((merged / "model_info.json").read_text())
    files = contents(merged)
    assert info["files"].keys() == files.keys() - {"model_info.json"} and all(map(is_own_file, files))
    assert not [name for name in files if Path(name).suffix not in (".json", ".safetensors", ".md")], "no pickles"
    assert {name.split("/")[0] for name in files if "/" in name} == set(SUBFOLDERS)
    for name, part in info["components"].items():
        weights = open_model(name, merged).model if not name.startswith("proj") else None
        if weights is not None:
            assert part["parameters"] == sum(parameter.numel() for parameter in weights.parameters())
    saved = checkpoint.load(folders["ocr"] / "ocr.pt")
    assert info["components"]["ocr"]["step"] == saved["step"] and info["components"]["ocr"]["source"] == "ocr.pt"
    assert info["components"]["ocr"]["metrics"] == pytest.approx(saved["metrics"], nan_ok=True)
    assert info["components"]["thinker"]["source"] == "omni_final.pt"
    assert info["components"]["audio_encoder"]["source"] == "audio_enc.pt", "which stage E left as it was"
    card = files["README.md"].decode()
    assert f"cer {saved['metrics']['cer']:.4g}" in card and "--ckpt_dir merged_model --ocr" in card
    together = b"".join(files.values())
    assert str(folders["omni"].parent).encode() not in together, "no path of the machine that it was made on"
    speech = json.loads((merged / "preprocessor_config.json").read_text())
    assert speech["rvq"]["hop_length"] == 160 and speech["vision_encoder"]["size"] == {"height": 16, "width": 16}


def test_two_exports_are_the_same_bytes(folders, merged, tmp_path):
    process = run(tmp_path, "export.py", *options(folders, tmp_path / "again"))
    assert process.returncode == 0, process.stderr
    assert "omni_final.pt, step" in process.stdout and "again" in process.stdout.splitlines()[-1]
    assert contents(tmp_path / "again") == contents(merged)


def test_a_thinker_alone_is_enough(folders, tmp_path, capsys):
    output = tmp_path / "merged"
    export.main(options({"thinker": folders["thinker"]}, output))
    assert "without pictures or recordings" in capsys.readouterr().err
    assert {path.name for path in output.iterdir() if path.is_dir()} == {"thinker"}
    theirs, mine = Assistant.load(folders["thinker"], CPU), Assistant.load(output, CPU)
    chat = [{"role": "user", "content": "red"}]
    answers = [list(a.generate(a.prompt(chat, 9), max_new_tokens=9)) for a in (theirs, mine)]
    assert answers[0] == answers[1]
    for part, option in (("talker", "--talker_ckpt"), ("ocr", "--ocr_ckpt"), ("vocoder", "--vocoder_ckpt")):
        with pytest.raises(UserError, match=f"has no {part}.*{option}"):
            open_model(part, output)
    with pytest.raises(UserError, match="--omni_ckpt"):
        open_model("omni", output)


def test_parts_that_stage_e_had_no_use_for_are_exported_and_not_connected(folders, tmp_path):
    def blind(payload):
        payload["architecture"] |= {"vision_encoder": None, "n_words": 0}
        payload["model"] = {k: v for k, v in payload["model"].items() if not k.startswith(("vision_", "proj_v"))}

    other = altered(folders["omni"], tmp_path / "omni", "omni_final.pt", blind)
    export.main(options({"omni": other, "vision": folders["vision"]}, tmp_path / "merged"))
    opened = Export(tmp_path / "merged")
    assert "not connected" in opened.components["vision_encoder"]["notes"][0]
    assert opened.has("vision_encoder") and not opened.has("proj_v") and (tmp_path / "merged/vision_encoder").is_dir()
    with pytest.raises(UserError, match="takes no pictures"):
        Assistant.load(tmp_path / "merged", CPU).image(picture(tmp_path))


def test_an_encoder_that_stage_e_trained_on_is_exported_and_stage_b_s_stays_a_recogniser(folders, tmp_path):
    def unfrozen(payload):
        payload["config"]["freeze_encoders"] = False
        for name, weight in payload["model"].items():
            if name.startswith(("audio_encoder.layers", "vision_encoder.layers")) and weight.dim() > 1:
                weight += 0.1

    other = altered(folders["omni"], tmp_path / "omni", "omni_final.pt", unfrozen)
    export.main(options(folders | {"omni": other}, tmp_path / "merged"))
    opened = Export(tmp_path / "merged")
    whole = checkpoint.load(other / "omni_final.pt")["model"]
    for part in ("audio_encoder", "vision_encoder"):
        assert opened.components[part]["source"] == "omni_final.pt" and opened.components[part]["stage"] == "omni"
        found = opened.weights(part)
        assert all(torch.equal(found[name], whole[name]) for name in found)
    assert "audio_encoder/ has stage B's" in opened.components["audio_encoder"]["notes"][1]
    name = "encoder.layers.0.self_attn.q_proj.weight"
    recogniser = load_file(tmp_path / "merged" / "audio_encoder" / "model.safetensors")[name]
    stage_b = checkpoint.load(folders["audio"] / "audio_enc.pt")["model"]["layers.0.self_attn.q_proj.weight"]
    assert torch.equal(recogniser, stage_b)


def test_bfloat16_halves_the_size_and_says_what_it_costs(folders, merged, tmp_path):
    transformers = pytest.importorskip("transformers")
    output = tmp_path / "merged"
    export.main(options(folders, output, "--dtype", "bfloat16"))
    fine, coarse = load_file(merged / "model.safetensors"), load_file(output / "model.safetensors")
    sizes = [sum(tensor.nbytes for tensor in weights.values()) for weights in (fine, coarse)]
    assert sizes[1] < 0.6 * sizes[0]
    assert {name for name, tensor in coarse.items() if tensor.dtype == torch.float32} == {
        name for name in coarse if name.split(".", 1)[1] in (
            "mel_mean", "mel_std", "quantizer.codebooks", "quantizer.counts", "mean", "scale",
        )
    }  # fmt: skip
    cost = json.loads((output / "model_info.json").read_text())["loss_of_quality"]
    assert 0 < cost["logit_difference_mean"] < cost["logit_difference_max"] < cost["logit_standard_deviation"]
    assert 0.5 < cost["greedy_agreement"] <= 1
    assert "bfloat16 moves the Thinker's logits" in (output / "README.md").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(output / "thinker")
    assert model.dtype == torch.bfloat16
    assistant = Assistant.load(output, CPU)
    assert assistant.thinker.embed_tokens.weight.dtype == torch.float32
    for talker in (None, folders["talker"]):
        assert load_speaker(output, talker, None, CPU, assistant)[0].uses_thinker_states, "its codec is rounded, too"
    rounded = fine["thinker.norm.weight"].bfloat16().float()
    assert torch.equal(assistant.thinker.norm.weight, rounded)


def test_a_stage_that_still_trains_is_exported_and_said_to(folders, tmp_path, capsys):
    half = shutil.copytree(folders["ocr"], tmp_path / "ocr")
    (half / "ocr.pt").unlink()
    export.main(options({"thinker": folders["thinker"], "ocr": half}, tmp_path / "merged"))
    step = max(int(path.stem.split("_")[-1]) for path in half.glob("ocr_step_*.pt"))
    assert f"exporting ocr_step_{step}.pt" in capsys.readouterr().err
    assert Export(tmp_path / "merged").components["ocr"]["source"] == f"ocr_step_{step}.pt"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "model_info.json"])
def test_every_damage_is_found_and_told_in_one_line(merged, tmp_path, file):
    folder, rng = shutil.copytree(merged, tmp_path / "merged"), np.random.default_rng(5)
    whole = (folder / file).read_bytes()
    cuts = [whole[:length] for length in (0, 1, len(whole) // 2, len(whole) - 2)]  # the last byte may be a line's end
    flips = [bytearray(whole) for _ in range(60)]
    for flip in flips:
        flip[rng.integers(len(flip) - 1)] ^= 1 << rng.integers(8)
    for damaged in (*cuts, *flips):
        (folder / file).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file}: damaged") as error:
            Assistant.load(folder, CPU)
        assert "\n" not in str(error.value)
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"{file}: cannot read it: No such file"):
        Assistant.load(folder, CPU)


def test_another_version_s_folder_is_refused(merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "merged")
    info = json.loads((folder / "model_info.json").read_text()) | {"format": 9}
    write_json(folder / "model_info.json", info | {"sha256": info_sha256(info)})
    with pytest.raises(UserError, match="written in format 9, this version reads format 2"):
        Export(folder)


# ---------------------------------------------------------------------------------------------------------------
# Refusals


def refused(arguments: list[str], *fragments: str) -> None:
    """It ends in a UserError of one line, and has written nothing."""
    output = Path(arguments[arguments.index("--output_dir") + 1])
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        export.main(arguments)
    assert "\n" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert sorted(output.parent.rglob("*")) == before


def scaled(payload) -> None:
    for weight in payload["model"].values():
        weight *= 1.5


def test_stages_that_do_not_fit_together_are_refused(folders, tmp_path):
    out = tmp_path / "out" / "merged"
    out.parent.mkdir()

    def check(changed: dict[str, Path], *fragments: str) -> None:
        refused(options(folders | changed, out), *fragments)

    retold = shutil.copytree(folders["thinker"], tmp_path / "retold")
    first = Tokenizer.load(retold / "tokenizer.json")
    second = Tokenizer.train(iter(word[::-1] for word in WORDS), first.vocab_size)
    assert second.vocab_size == first.vocab_size
    second.save(retold / "tokenizer.json")
    check({"thinker": retold}, str(folders["omni"]), str(retold), "tokenizers differ")

    def wide(payload):
        payload["config"]["d_ff"] = payload["architecture"]["d_ff"] = 48
        for name in payload["model"]:
            if "mlp." in name:
                payload["model"][name] = torch.zeros(16, 48) if "down" in name else torch.zeros(48, 16)

    other = altered(folders["thinker"], tmp_path / "wide", "thinker.pt", wide)
    check({"thinker": other}, str(folders["omni"]), str(other), "d_ff 32 here, 48 there")
    parts = ("audio", "audio_enc.pt", "freeze_encoders"), ("vision", "vision.pt", "freeze_encoders")
    for name, file, reason in (("thinker", "thinker.pt", "weights differ"), *parts):
        other = altered(folders[name], tmp_path / name, file, scaled)
        check({name: other}, str(folders["omni"]), str(other), reason)

    def coarse(payload):
        payload["config"]["frame_ms"] = 40

    other = altered(folders["talker"], tmp_path / "coarse", "talker.pt", coarse)
    check({"talker": other}, "talker.pt", "rvq_codec.pt", "frame_ms 40 here, 80 there")

    def low(payload):
        payload["config"]["win_length"] = payload["architecture"]["win_length"] = 320

    def other_talker(payload: dict) -> None:
        payload["model"]["norm.weight"].mul_(0.5)

    other = altered(folders["talker"], tmp_path / "later", "talker.pt", other_talker)
    export.main(options(folders | {"talker": other}, tmp_path / "with_e_s"))
    theirs, ours = (Export(tmp_path / "with_e_s").weights("talker"), checkpoint.load(folders["omni"] / "omni_final.pt"))
    assert all(torch.equal(theirs[name], ours["model"][name]) for name in theirs), "stage E's talker is exported"
    stage = Assistant.load(folders["omni"], CPU)
    for given, uses_states in ((other, False), (folders["talker"], True)):
        speaker, origin = load_speaker(folders["omni"], given, None, CPU, stage)
        assert speaker.uses_thinker_states == uses_states, "the talker that was given speaks"
        assert ("not the one of stage E" in origin) != uses_states
    other = altered(folders["vocoder"], tmp_path / "low", "hifigan.pt", low)
    check({"vocoder": other}, str(other), str(folders["talker"]), "log-mels", "win_length 320 here, 640 there")
    check({"vocoder": folders["ocr"]}, "hifigan.pt")
    check({"thinker": folders["omni"]}, "thinker.pt")
    check({"ocr": tmp_path / "absent"}, "absent", "ocr.pt")


def test_options_that_make_no_sense_are_refused(folders, tmp_path):
    out = tmp_path / "merged"
    refused(options({"ocr": folders["ocr"]}, out), "--omni_ckpt", "--thinker_ckpt")
    refused(options({"thinker": folders["thinker"], "vocoder": folders["vocoder"]}, out), "--talker_ckpt")
    refused([*options({"thinker": folders["thinker"]}, out), "--dtype", "int8"], "--dtype", "bfloat16")
    refused(options({"thinker": folders["thinker"]}, folders["ocr"]), str(folders["ocr"]), "other things")
    refused(options({"thinker": folders["thinker"]}, folders["ocr"], "--force"), "other things")
    refused(options({"thinker": folders["thinker"]}, folders["ocr"] / "ocr.pt"), "expected a folder")


def test_another_tool_s_model_is_not_replaced(folders, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"weights")
    refused(options({"thinker": folders["thinker"]}, tmp_path / "theirs", "--force"), "other things")


def test_an_earlier_export_is_replaced_with_force_only(folders, tmp_path):
    out, small = tmp_path / "merged", {"thinker": folders["thinker"]}
    out.mkdir()  # an empty one may be there
    export.main(options(small, out))
    before = contents(out)
    refused(options(small | {"ocr": folders["ocr"]}, out), str(out), "--force")
    assert contents(out) == before
    export.main(options(small | {"ocr": folders["ocr"]}, out, "--force"))
    assert Export(out).has("ocr") and [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_an_export_goes_where_a_link_leads(folders, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, small = tmp_path / "link", {"thinker": folders["thinker"]}
    link.symlink_to(tmp_path / "elsewhere" / "merged")
    for more in ([], ["--force"]):
        export.main(options(small, link, *more))
        assert link.is_symlink() and is_export(link)
        assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "link"}
        assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["merged"]


# ---------------------------------------------------------------------------------------------------------------
# Killed, full, crowded


@pytest.mark.parametrize(
    ("call", "count", "after"),
    [
        ("omni.export.bundle:write_weights", 1, False),
        ("omni.export.bundle:write_weights", 2, True),
        ("omni.common.files:write_json", 5, False),
        ("omni.export.folder:fsync", 4, False),
        ("os:replace", 3, False),  # the third is that of the folder; the others are those of two tokenizer.json
        ("os:replace", 3, True),
    ],
)
@pytest.mark.parametrize("over", [False, True], ids=["new", "over an earlier one"])
def test_killed_at_any_moment_it_is_whole_or_not_there(folders, tmp_path, call, count, after, over):
    out, small = tmp_path / "merged", {"thinker": folders["thinker"], "ocr": folders["ocr"]}
    export.main(options(small, tmp_path / "reference"))
    whole = contents(tmp_path / "reference")
    if over:
        export.main(options({"thinker": folders["thinker"]}, out))
    earlier, force = contents(out), ["--force"] if over else []
    process = run(tmp_path, "export.py", *options(small, out, *force), prelude=kill_at(call, count, after=after))
    assert process.returncode == -9, process.stderr
    assert contents(out) in ([{}] if not over else [{}, earlier]) + [whole]
    if not after and not (over and call == "os:replace"):
        assert contents(out) == earlier
    process = run(tmp_path, "export.py", *options(small, out, *(["--force"] if is_export(out) or over else [])))
    assert process.returncode == 0, process.stderr
    assert contents(out) == whole
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"merged", "reference"}, (
        "nothing is left over"
    )


def test_an_earlier_export_survives_a_rename_that_fails(folders, tmp_path, monkeypatch):
    out, small, real = tmp_path / "merged", {"thinker": folders["thinker"]}, os.replace
    export.main(options(small, out))
    before = contents(out)

    def failing(source, target):
        if Path(target) == out:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(RunError, match="merged: could not write the export: Input/output error"):
        export.main(options(small | {"ocr": folders["ocr"]}, out, "--force"))
    assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_full_disk_is_one_line_and_leaves_nothing(folders, tmp_path):
    small = {"thinker": folders["thinker"], "ocr": folders["ocr"]}
    speaking = {"thinker": folders["thinker"], "talker": folders["talker"]}
    speaking["vocoder"] = with_pulses(folders["vocoder"], tmp_path.parent / f"{tmp_path.name} harmonic")
    export.main(options(speaking, tmp_path.parent / f"{tmp_path.name} merged"))
    sizes = [
        (tmp_path.parent / f"{tmp_path.name} merged" / name).stat().st_size
        for name in ("model.safetensors", "vocoder/model.pt2")
    ]
    assert sizes[0] < sizes[1]
    for parts, limit in ((small, 5_000), (small, 40_000), (speaking, sizes[1] - 1)):
        prelude = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        process = run(tmp_path, "export.py", *options(parts, tmp_path / "merged"), prelude=prelude)
        assert process.returncode == 1 and "could not write the export" in process.stderr.splitlines()[-1]
        assert "Traceback" not in process.stderr
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_two_exports_to_one_place_do_not_mix(folders, tmp_path):
    small = {"thinker": folders["thinker"]}
    slow = """
import os, time, omni.export.bundle
_real = omni.export.bundle.write_weights
def slow(path, weights):
    if path.parent.name != "thinker":
        print("writing", flush=True)
        while not os.path.exists("go_on"):
            time.sleep(0.01)
    _real(path, weights)
omni.export.bundle.write_weights = slow
"""
    first = run(tmp_path, "export.py", *options(small, tmp_path / "merged"), prelude=slow, wait=False)
    first.wait_for("writing")
    second = run(tmp_path, "export.py", *options(small, tmp_path / "merged"))
    assert second.returncode == 2 and f"already in use by process {first.pid}" in second.stderr
    (tmp_path / "go_on").touch()
    assert first.wait().returncode == 0 and is_export(tmp_path / "merged")


def test_the_script_refuses_in_one_line(folders, tmp_path):
    only_error(run(tmp_path, "export.py", *options({"ocr": folders["ocr"]}, tmp_path / "merged")), "--thinker_ckpt")
    process = run(tmp_path, "export.py", *options({"thinker": folders["thinker"]}, tmp_path / ("x" * 300)))
    only_error(process, "xxx: File name too long")


@pytest.mark.parametrize("name", STAGES)
def test_an_export_is_no_folder_of_a_stage(folders, merged, tmp_path, name):
    given = {"thinker": folders["thinker"], "talker": folders["talker"]} | {name: merged}
    with pytest.raises(UserError, match=rf"--{name}_ckpt \S+: expected a stage's folder, found an export"):
        export.main(options(given, tmp_path / "merged"))
    assert not list(tmp_path.iterdir())


def test_a_step_file_is_exported_with_a_notice_only_while_its_stage_trains(folders, tmp_path, capsys):
    for unfinished in (False, True):
        source = shutil.copytree(folders["thinker"], tmp_path / f"thinker {unfinished}")
        shutil.copy(folders["thinker"] / "thinker.pt", source / "thinker_step_1.pt")
        if unfinished:
            (source / "thinker.pt").unlink()
        given = source if unfinished else source / "thinker_step_1.pt"
        export.main(options({"thinker": given}, tmp_path / f"merged {unfinished}"))
        assert ("no thinker.pt yet" in capsys.readouterr().err) == unfinished


def test_a_model_s_name_or_file_that_is_none_says_what_is_expected(folders, merged, tmp_path):
    for name in ("proj_a", "thinkers", ""):
        with pytest.raises(UserError, match="expected one of thinker, audio_encoder, .*, aligner, "):
            open_model(name, folders["omni"])
    with pytest.raises(UserError, match="an export has no aligner, but thinker"):
        open_model("aligner", merged)
    assert open_model("aligner", folders["talker"]).model is not None
    with pytest.raises(
        UserError, match=r"talker\.pt: expected a checkpoint of stage codec, found talker. Give a folder"
    ):
        open_model("rvq", folders["talker"] / "talker.pt")
    (tmp_path / "notes.txt").write_text("no model\n" * 50)
    with pytest.raises(UserError, match=r"notes\.txt: not a checkpoint$"):
        open_model("ocr", tmp_path / "notes.txt")
    for step in (3, 4):
        shutil.copy(folders["ocr"] / "ocr.pt", tmp_path / f"ocr_step_{step}.pt")
    os.truncate(tmp_path / "ocr_step_4.pt", 1000)
    with pytest.raises(UserError, match=r"ocr_step_4\.pt: the checksum does not match. Another is ocr_step_3\.pt"):
        open_model("ocr", tmp_path)
    with pytest.raises(UserError, match=r"Give \S+merged_model, the export itself"):
        Assistant.load(merged / "thinker", CPU)
    with pytest.raises(UserError, match="expected a folder with thinker.pt, or an export, found nothing"):
        Assistant.load(tmp_path / "absent", CPU)


FOLDERS = {"text": "thinker", "audio_enc": "audio", "codec": "talker", "aligner": "talker"}  # others: their own name


@pytest.mark.parametrize("stage", TABLE.values(), ids=lambda stage: stage.name)
def test_a_model_is_built_from_its_architecture_and_opened_by_its_row(folders, stage):
    """No training config is at hand: sizes as a checkpoint keeps them are enough, for every stage."""
    loaded = load(stage, folders[FOLDERS.get(stage.name, stage.name)])
    assert isinstance(loaded.architecture, Architecture) and loaded.model.architecture == loaded.architecture
    sizes = json.loads(json.dumps(loaded.architecture.model_dump()))
    assert not {"save_dir", "lr", "seed", "batch_size", "max_steps"} & set(sizes)
    model = stage.prepare(stage.model(stage.architecture.model_validate(sizes)))
    shapes = {name: tensor.shape for name, tensor in loaded.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    with pytest.raises(ValidationError, match="frozen"):
        loaded.architecture.dropout = 0.5


@pytest.mark.parametrize("stage", TABLE.values(), ids=lambda stage: stage.name)
def test_a_checkpoint_without_an_architecture_is_of_another_version(folders, stage, tmp_path):
    source = folders[FOLDERS.get(stage.name, stage.name)]
    other = altered(source, tmp_path / "old", stage.final, lambda payload: payload.pop("architecture"))
    with pytest.raises(UserError, match=rf'{stage.final}: of another version: key "architecture": Field required'):
        load(stage, other)
