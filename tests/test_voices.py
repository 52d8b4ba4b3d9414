"""Several voices from one talker: which recording a sample refers to, and what the voice changes."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from harness import Training, differences, kill_at_step, run_script
from stages import AUDIO_ENC, OMNI, TALKER, VOICES, make_voices, write_csv
from test_bad_rows import read_rows
from test_config import only_error
from test_export import altered
from test_export import run as run_anywhere
from test_talker import SIZES, TEXTS, forward, small, utterances
from test_web_demo import Site, needs_gradio, start

import omni.stages.voices
from omni.chat.speech import load_speaker
from omni.common.errors import BadRow
from omni.export.bundle import open_model
from omni.models.aligner import text_symbols
from omni.models.codec import Codec
from omni.models.speaker import Speaker
from omni.models.speech_architectures import CodecArchitecture, TalkerArchitecture
from omni.models.talker import Talker, pad_references, references_in, talker_loss
from omni.models.voices import VOICE_CODES
from omni.stages.talker import CodedSpeech, Utterance, collate_utterances
from omni.stages.voices import REFERENCE_CODES, Voices, in_turns, speaker_key, speaker_of, with_references
from omni.train.precompute import ManifestWithColumns, RaggedArray

NAMES = ["ann", "joe", "ann", "ann", "lee", "joe", "ann", ""]  # the only lee has no other clip
ARCHITECTURE = TalkerArchitecture(**SIZES, voice_layers=1, speakers=["ann", "joe", "lee"])


class Table(list):
    """Rows of a manifest."""

    path, sha256 = "table.csv", "0" * 64

    def where(self, row: int) -> str:
        return f"row {row}"


@pytest.fixture
def coded(monkeypatch) -> ManifestWithColumns:
    """The rows of ``NAMES``; each code of row r's recording is r, and the lengths differ."""
    table = Table({"text": "one", "wav": f"{row}.wav", "speaker": name} for row, name in enumerate(NAMES))
    monkeypatch.setattr(
        omni.stages.voices, "speaker_keys", lambda *_: np.array([speaker_key(name) for name in NAMES], np.uint64)
    )
    lengths = np.array([10 + 30 * row for row in range(len(NAMES))])
    ends = lengths.cumsum()
    codes = np.repeat(np.arange(len(NAMES), dtype=np.uint16), lengths)[:, None].repeat(3, axis=1)
    durations = np.full((len(NAMES), 4), 5, np.uint16)
    spans = np.arange(len(NAMES))[:, None] * 4 + [0, 4]
    return ManifestWithColumns(
        table,
        {
            "codes": RaggedArray(codes, np.stack((ends - lengths, ends), axis=1)),
            "durations": RaggedArray(durations.flatten(), spans),
        },
    )


def quiet() -> SimpleNamespace:
    return SimpleNamespace(log=lambda line: None)


def speech(coded: ManifestWithColumns, rows: np.ndarray, *, training: bool, seed: int = 3) -> CodedSpeech:
    voices = Voices.find(quiet(), coded, np.arange(5))
    column, _ = with_references(quiet(), coded, rows, voices)
    return CodedSpeech(column, rows, ARCHITECTURE, 1000, seed=seed, training=training)


# Which recording ----------------------------------------------------------------------------------------------------


def test_a_reference_is_another_clip_of_the_speaker_and_the_own_one_only_without_another(coded):
    rows = np.arange(len(NAMES))
    source, found = speech(coded, rows, training=True), {row: set() for row in range(len(NAMES))}
    for epoch in range(30):
        batch = source.batch(rows, epoch)
        for row, (codes, length) in enumerate(zip(batch["references"], batch["reference_lengths"], strict=True)):
            found[row] |= set(codes[:length].flatten().tolist())
            assert 1 <= length <= REFERENCE_CODES
    assert found == {0: {2, 3, 6}, 1: {5}, 2: {0, 3, 6}, 3: {0, 2, 6}, 4: {4}, 5: {1}, 6: {0, 2, 3}, 7: {7}}


def test_a_reference_is_of_the_training_rows(coded):
    rows = np.array([0, 2, 4])
    batch = speech(coded, rows, training=True).batch(np.arange(3), 0)
    assert batch["references"][:, 0, 0].tolist() == [2, 0, 4]


def test_a_reference_depends_on_seed_epoch_and_row_alone(coded):
    rows, source = np.arange(len(NAMES)), speech(coded, np.arange(len(NAMES)), training=True)
    whole = references(source, rows, 5)
    for part in ([3], [6, 3, 0]):
        for row, codes in zip(part, references(source, np.array(part), 5), strict=True):
            assert torch.equal(codes, whole[row])
    assert differences(whole, references(source, rows, 6))
    assert differences(whole, references(speech(coded, rows, training=True, seed=4), rows, 5))


def references(source: CodedSpeech, rows: np.ndarray, epoch: int) -> list[torch.Tensor]:
    batch = source.batch(rows, epoch)
    return [codes[:length] for codes, length in zip(*references_in(batch), strict=True)]


def test_a_named_voice_is_the_speakers_first_clips_and_speaks_in_validation(coded):
    voices = Voices.find(quiet(), coded, np.arange(5))  # joe has one clip of 40 codes, ann three of 10, 70 and 100
    assert voices.names == ["ann", "joe", "lee"] and voices.codes.shape == (3, VOICE_CODES, 3)
    assert voices.codes[0, :, 0].tolist() == [0] * 10 + [2] * 70 + [3] * 20
    assert voices.codes[1].unique().tolist() == [1]
    found = references(speech(coded, np.arange(len(NAMES)), training=False), np.array([6, 5, 7]), 0)
    assert torch.equal(found[0], voices.codes[0]) and torch.equal(found[1], voices.codes[1])
    assert found[2].shape == (REFERENCE_CODES, 3) and (found[2] == 7).all(), "a name that the talker does not have"


def test_the_blank_name_is_no_default(coded):
    assert Voices.find(quiet(), coded, np.arange(len(NAMES))).names == ["ann", "joe", "lee", ""]


def test_speakers_take_turns():
    keys = np.array([7, 7, 7, 7, 9, 7, 9, 5], np.uint64)
    assert in_turns(np.array([0, 1, 2, 4, 6, 7]), keys).tolist() == [7, 0, 4, 1, 6, 2]


# What it changes ----------------------------------------------------------------------------------------------------


def voiced(**keys) -> Talker:
    talker = small(voice_layers=2, speakers=["ann", "joe"], **keys)
    talker.voice_codes.copy_(torch.randint(16, talker.voice_codes.shape, generator=torch.Generator().manual_seed(2)))
    return talker


def with_voices() -> list[Utterance]:
    generator = torch.Generator().manual_seed(8)
    found = [torch.randint(16, (length, 3), generator=generator) for length in (30, 7, 12)]
    return [
        Utterance(one.text, one.symbols, one.codes, one.durations, "", codes, "ann")
        for one, codes in zip(utterances(), found, strict=True)
    ]


def test_padding_of_references_changes_nothing():
    talker = voiced()
    samples = with_voices()
    batch = collate_utterances(samples, talker.architecture)
    assert batch["references"].shape == (3, REFERENCE_CODES, 3) and batch["reference_lengths"].tolist() == [30, 7, 12]
    together = talker.encode_voices(*references_in(batch))
    for row, sample in enumerate(samples):
        alone = talker.encode_voices(*pad_references([sample.reference]))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_durations_and_codes_depend_on_the_voice():
    talker = voiced()
    batch = collate_utterances(with_voices(), talker.architecture)
    one = forward(talker, batch, references=references_in(batch))
    two = forward(talker, batch, references=(batch["references"].flip(0), batch["reference_lengths"].flip(0)))
    for before, after in zip(one, two, strict=True):
        assert (before - after).nan_to_num().abs()[0].max() > 1e-4


def test_a_new_voice_encoder_changes_nothing():
    torch.manual_seed(1)
    talker = Talker(TalkerArchitecture(**SIZES, voice_layers=2, speakers=["ann"]))
    batch = collate_utterances(with_voices(), talker.architecture)
    for found, plain in zip(
        forward(talker, batch, references=references_in(batch)), forward(talker, batch), strict=True
    ):
        assert torch.equal(found.nan_to_num(neginf=0.0), plain.nan_to_num(neginf=0.0))


def test_generating_in_a_voice_equals_the_whole_forward():
    talker = voiced()
    symbols, codes = [text_symbols(text) for text in TEXTS], talker.voice_codes[1]
    frames = [codes for codes, _ in talker.generate(symbols, max_frames=7, references=[codes] * 3)]
    written = torch.stack(frames, dim=1)  # (B, T, Q)
    for row, line in enumerate(symbols):
        line, length, given = torch.tensor([line]), torch.tensor([len(line)]), pad_references([codes])
        text = talker.encode_text(line, length, voices=talker.encode_voices(*given))
        durations = talker.choose_durations(text, length)
        logits, _ = talker(line, length, written[row, None], durations, references=given)
        likeliest = logits[0, :-1].argmax(dim=-1)
        going_on = (likeliest[:, 0] != 16).cumprod(dim=0).bool()
        assert torch.equal(likeliest[going_on], written[row][going_on])


def test_a_voice_by_name_is_that_of_its_codes_and_the_first_is_the_default():
    speaker = speaker_of_small(voiced())
    ann, joe = speaker.talker.voice_codes
    said = {name: speaker.codes(TEXTS, [codes] * 3, max_frames=9) for name, codes in (("ann", ann), ("joe", joe))}
    assert differences(said["ann"], said["joe"]) and not differences(speaker.codes(TEXTS, max_frames=9), said["ann"])
    speaker.reference = speaker.voice("joe")
    assert not differences(speaker.codes(TEXTS, max_frames=9), said["joe"])
    streamed, whole = speaker.stream(TEXTS[0], max_frames=9), speaker.waveform(said["joe"][0])
    np.testing.assert_array_equal(np.concatenate(list(streamed)), whole.numpy())


def test_a_voice_from_a_file_is_that_of_its_codes(tmp_path):
    speaker, sound = speaker_of_small(voiced()), 0.1 * torch.randn(24_000)
    soundfile.write(tmp_path / "voice.wav", sound.numpy(), 16_000, "FLOAT")
    assert torch.equal(speaker.voice(recording=tmp_path / "voice.wav"), speaker.encode(sound))


def speaker_of_small(talker: Talker) -> Speaker:
    torch.manual_seed(4)
    sizes = {"codec_d_model": 16, "codec_d_ff": 32, "codec_layers": 1, "codec_kernel_size": 3, "codec_latent": 8}
    return Speaker(talker, Codec(CodecArchitecture(codebooks=3, codebook_size=16, n_mels=20, **sizes)).eval())


def test_two_speakers_are_learned_from_their_references():
    """The same texts; the codes of one speaker are even, those of the other odd."""
    torch.manual_seed(1)
    talker = Talker(TalkerArchitecture(**SIZES, voice_layers=1, speakers=["even", "odd"]))
    generator = torch.Generator().manual_seed(3)

    def some(odd: int, length: int) -> torch.Tensor:
        return 2 * torch.randint(8, (length, 3), generator=generator) + odd

    talker.voice_codes.copy_(torch.stack([some(odd, VOICE_CODES) for odd in (0, 1)]))
    samples = [(one, 2 * (one.codes // 2) + odd, odd) for one in utterances() for odd in (0, 1)]
    optimizer = torch.optim.AdamW(talker.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(150):
        # falling in the second half: at a constant rate a step may forget a code, on some processors the last one does
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - step / 150))
        spoken = [
            Utterance(one.text, one.symbols, codes, one.durations, "", some(odd, 20)) for one, codes, odd in samples
        ]
        batch = collate_utterances(spoken, talker.architecture)
        loss, _ = talker_loss(talker, batch, frame_dropout=0.1, duration_weight=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    speaker = speaker_of_small(talker.eval())
    for odd, name in enumerate(("even", "odd")):
        for sample, codes in zip(utterances(), speaker.codes(TEXTS, [speaker.voice(name)] * 3), strict=True):
            assert codes.tolist() == (2 * (sample.codes // 2) + odd).tolist()


# The scripts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Training:
    folder = tmp_path_factory.mktemp("voices")
    (folder / "b").mkdir()
    recognizer = AUDIO_ENC.training(folder / "b", max_steps=3, max_epochs=None)
    recognizer.finish()
    keys = {"audio_ckpt": str(recognizer.save_dir), "val_sentences": 6, "max_steps": 12, "max_epochs": None}
    training = VOICES.training(folder, **keys)
    training.finish()
    return training


def test_training_knows_the_speakers_and_scores_each(trained):
    final = trained.final_file()
    assert final["architecture"]["speakers"] == ["ann", "joe", ""] == final["config"]["speakers"]
    named = {f"{metric}_{name}" for metric in ("wer_talker", "code_perplexity_of") for name in ("ann", "joe")}
    assert named <= final["metrics"].keys() and "wer_talker_" not in final["metrics"]
    assert final["model"]["voice_codes"].shape == (3, VOICE_CODES, 2) and final["model"]["voice_codes"].any()
    process = run_script(
        trained, "scripts/evaluate.py", "talker", "--data", trained.config["tts_csv"], "--json",
        "--audio_ckpt", trained.config["audio_ckpt"],
    )  # fmt: skip
    found = json.loads(process.stdout)
    assert named <= found.keys() and found["rows"] == 24


def test_a_killed_training_ends_with_the_same_bits(tmp_path):
    training = VOICES.training(tmp_path)
    training.finish()
    killed = training.changed(save_dir="killed", num_workers=2)
    assert killed.run(kill_at_step(13)).returncode == -9
    assert "resumed at step 10" in killed.finish().stdout
    assert not differences(killed.state(), training.state())


def test_without_voice_layers_the_column_changes_nothing(tmp_path):
    folders = [tmp_path / name for name in ("plain", "named")]
    for folder in folders:
        folder.mkdir()
    make_voices(folders[1])
    plain, named = (TALKER.training(folder, max_steps=9, max_epochs=None) for folder in folders)
    for training in (plain, named):
        training.finish()
    assert not differences(plain.final_file()["model"], named.final_file()["model"])
    assert plain.metrics() == named.metrics() and plain.final_file()["metrics"] == named.final_file()["metrics"]
    hints = ['column "speaker" has no effect' in (one.save_dir / "training.log").read_text() for one in (plain, named)]
    assert hints == [False, True]


def test_voices_without_speakers_are_refused_before_anything_is_trained(tmp_path):
    few = {"codec_ckpt": None, "codec_steps": 4, "aligner_steps": 4, "max_steps": 4, "max_epochs": None}
    training = TALKER.training(tmp_path, voice_layers=1, **few)
    only_error(training.run(), "tts.csv", 'expected names in a column "speaker"', "voice_layers")
    assert not list(training.save_dir.glob("*.pt"))


def test_a_name_that_is_none_is_a_bad_row(tmp_path):
    training = VOICES.training(tmp_path, max_steps=9, max_epochs=None)
    path = tmp_path / "tts.csv"
    path.write_text(path.read_text().replace(",ann", "," + "x" * 129, 1))
    training.finish()
    assert "expected a name of at most 128 characters" in (training.save_dir / "training.log").read_text()
    assert training.final_file()["architecture"]["speakers"] == ["ann", "joe", ""]


def test_names_as_other_data_sets_have_them():
    common_voice = "0123456789abcdef" * 8
    for value, name in ((common_voice, common_voice), (19, "19"), (0, "0"), (None, ""), ("", ""), (" ann ", "ann")):
        assert speaker_of({"speaker": value}) == name
    for value in (True, 1.5, ["ann"], "x" * 129, "a\nb"):
        with pytest.raises(BadRow, match="expected a name"):
            speaker_of({"speaker": value})


def test_too_many_speakers_are_refused_before_anything_is_trained(tmp_path):
    few = {"codec_ckpt": None, "codec_steps": 4, "aligner_steps": 4, "max_steps": 4, "max_epochs": None}
    training = VOICES.training(tmp_path, **few)
    process = training.run(prelude="import omni.stages.voices\nomni.stages.voices.MAX_SPEAKERS = 2\n")
    only_error(process, "tts.csv", 'at most 2 names in the column "speaker", found 3')
    assert not list(training.save_dir.glob("*.pt"))


def test_one_line_for_a_voice_that_there_is_not(trained, tmp_path):
    say = ("--say", "one two", "--audio_out", str(tmp_path / "said.wav"), "--temperature", "1")
    for name, sound in (("short", np.ones(8000)), ("silent", np.zeros(32_000)), ("good", np.ones(32_000))):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * sound, 16_000)

    def infer(*arguments: str):
        return run_script(trained, "infer_chat.py", *say, *arguments)

    def from_file(name: str):
        return infer("--voice_from", str(tmp_path / name))

    only_error(infer("--voice", "bob"), "voice bob", "expected one of ann, joe")
    only_error(infer("--voice", "ann", "--voice_from", str(tmp_path / "good.wav")), "--voice_from", "no --voice")
    only_error(from_file("short.wav"), "short.wav", "lasts 0.5 s, expected at least 1 s")
    only_error(from_file("silent.wav"), "silent.wav", "found silence")
    only_error(from_file("absent.wav"), "absent.wav", "No such file")
    only_error(run_script(trained, "infer_chat.py", "--text", "one", "--voice", "ann"), "--voice", "--audio_out")
    assert not (tmp_path / "said.wav").exists()
    for arguments in (("--voice", "joe"), ("--voice_from", str(tmp_path / "good.wav"))):
        process = infer(*arguments)
        assert process.returncode == 0 and (tmp_path / "said.wav").exists(), process.stderr

    data = ("--data", trained.config["tts_csv"], "--limit", "3", "--json")
    only_error(run_script(trained, "scripts/evaluate.py", "talker", *data, "--voice", "bob"), "ann, joe")
    only_error(run_script(trained, "scripts/evaluate.py", "codec", *data, "--voice", "ann"), "no effect on codec")
    saved = tmp_path / "saved"
    process = run_script(trained, "scripts/evaluate.py", "talker", *data, "--voice", "ann", "--save_speech", str(saved))
    assert process.returncode == 0 and len(list((saved / "talker").glob("*.wav"))) == 3, process.stderr
    assert "code_perplexity_of_ann" not in process.stdout, "all rows are spoken as ann"
    speakers = {kind: [row["speaker"] for row in read_rows(saved / f"{kind}.csv")] for kind in ("recordings", "talker")}
    assert speakers["talker"] == ["ann"] * 3 and len(set(speakers["recordings"])) > 1
    inside = ("--data", str(saved / "recordings.csv"), "--save_speech", str(saved))
    only_error(run_script(trained, "scripts/evaluate.py", "talker", *inside), "--save_speech", "another folder")


def test_a_talker_of_one_voice_takes_no_voice(tmp_path):
    training = TALKER.training(tmp_path, max_steps=3, max_epochs=None)
    training.finish()
    rows = [row | {"speaker": "x" * 999} for row in read_rows(Path(training.config["tts_csv"]))]
    write_csv(tmp_path / "named.csv", rows)
    data = ("--data", str(tmp_path / "named.csv"), "--limit", "2")
    process = run_script(training, "scripts/evaluate.py", "talker", *data)
    assert process.returncode == 0 and "2 rows\n" in process.stdout, "names have no effect on it"
    say = ("--say", "one", "--audio_out", "said.wav")
    only_error(run_script(training, "infer_chat.py", *say, "--voice", "ann"), "one voice", "voice_layers")
    only_error(run_script(training, "infer_chat.py", *say, "--voice_from", "a.wav"), "one voice", "voice_layers")


@pytest.fixture(scope="module")
def shaken(trained) -> Path:
    """The folder of ``trained`` with a talker in which voices differ more than after so short a training, by codes that
    differ more than those of a random codec."""

    def shake(payload: dict) -> None:
        torch.manual_seed(5)
        payload["model"]["voice_encoder.proj.weight"].normal_(std=10)
        payload["model"]["voice_codes"].random_(8)

    return altered(trained.save_dir, trained.folder / "shaken", "talker.pt", shake)


@pytest.fixture(scope="module")
def exported(trained, shaken, tmp_path_factory) -> Path:
    """An export of stage E on top of ``shaken``."""
    folder = tmp_path_factory.mktemp("exported")
    omni = OMNI.training(folder, max_steps=6, max_epochs=None)
    omni.config |= {"talker_ckpt": str(shaken), "speech_csv": trained.config["tts_csv"]}
    omni.finish()
    process = run_anywhere(
        folder, "export.py", "--omni_ckpt", str(omni.save_dir), "--talker_ckpt", str(shaken),
        "--output_dir", str(folder / "merged"),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder / "merged"


def test_stage_e_and_the_export_keep_the_voices(shaken, exported):
    before, after = open_model("talker", shaken).model, open_model("talker", exported).model
    voices, kept = (
        {key: tensor for key, tensor in talker.state_dict().items() if key.startswith("voice")}
        for talker in (before, after)
    )
    assert after.architecture.speakers == ["ann", "joe", ""]
    assert len(voices) > 5 and not differences(voices, kept)


@needs_gradio
def test_the_page_offers_the_names_and_takes_a_recording(exported, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    for name, sound in (("good", torch.randn(24_000)), ("silent", torch.zeros(24_000))):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * sound.numpy(), 16_000)
    process = start(tmp_path, exported)
    try:
        client = Site(process, tmp_path).visitor().client
        choices = [part["props"].get("choices") for part in client.config["components"] if part["type"] == "dropdown"]
        assert choices == [[["ann", "ann"], ["joe", "joe"]]]

        def said(voice: str | None, file: str | None) -> np.ndarray:
            given = file and handle_file(str(tmp_path / file))
            return soundfile.read(client.predict("one two", 1.0, 3, voice, given, api_name="/say")[1], dtype="int16")[0]

        (speaker, _), found = load_speaker(exported, None, None, torch.device("cpu")), []
        for name, file in (("ann", None), ("joe", None), ("ann", "good.wav")):
            reference = speaker.voice(recording=tmp_path / file) if file else speaker.voice(name)
            pieces = speaker.stream("one two", reference, temperature=1.0, seed=3)
            expected = np.concatenate(list(pieces)).clip(-1, 1)
            found.append(said(name, file))
            assert len(found[-1]) == len(expected) > 1000
            np.testing.assert_allclose(found[-1] / 32767, expected, atol=2e-4)
        assert len({sound.tobytes() for sound in found}) == 3, "else equality would say little"
        with pytest.raises(AppError, match=r"silent\.wav: expected a voice, found silence"):
            said("ann", "silent.wav")
        with pytest.raises(AppError):
            said("bob", None)
    finally:
        process.send(signal.SIGTERM)
        process.wait()
