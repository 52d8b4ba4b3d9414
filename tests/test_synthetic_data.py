"""The built-in data: speech, and the script that makes all parts. tests/test_pictures.py has the pictures and signs."""

import csv
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from harness import Process, start, wait_until

from omni.data.manifest import split_rows
from omni.data.open_manifest import load_manifest
from omni.synthetic import facts, scenes, speech
from scripts import make_synthetic_datasets

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "make_synthetic_datasets.py"
AUDIO = ("--size", "smoke", "--only", "audio")
TRAINED = {"asr", "asr_open", "tts"}
MANIFESTS = {f"{name}.csv" for name in speech.COLLECTIONS}


# Prelude: espeak-ng, which needs no network, reads everything. For tests of how files are made, not of what they hold.
ONE_FAMILY = """
from dataclasses import replace
from omni.synthetic import speech
for name, one in speech.COLLECTIONS.items():
    voices = one.voices if name.startswith("tts") else speech.ESPEAK_VOICES
    speech.COLLECTIONS[name] = replace(one, voices=voices)
for name, one in speech.READERS.items():
    speech.READERS[name] = replace(one, voice="espeak/en-us")
"""
# Nor the many words beyond the small world, whose forms take seconds to find.
SMALL_WORLD = """
for name, one in speech.COLLECTIONS.items():
    speech.COLLECTIONS[name] = replace(one, open_vocabulary=0.0)
speech.open_vocabulary.held_out_words = lambda text: []
"""
QUICKLY = ONE_FAMILY + SMALL_WORLD


def start_script(out: Path, *args, prelude: str = "") -> Process:
    return start(SCRIPT, "--out", out, *args, cwd=out.parent, prelude=prelude)


def run_script(out: Path, *args, prelude: str = "") -> Process:
    return start_script(out, *args, prelude=prelude).wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def in_new_process(function, *args):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def clips(name: str, seed: int, count: int, start: int, stop: int) -> list[tuple[bytes, dict]]:
    return list(speech.make_clips(name, seed, speech.sentences(name, seed, count), start, stop))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The smoke size of everything, made by one process."""
    out = tmp_path_factory.mktemp("made")
    process = run_script(out, "--size", "smoke", "--processes", 1)
    assert process.returncode == 0, process.stderr
    return out


@pytest.fixture(scope="module")
def made_quickly(tmp_path_factory) -> Path:
    """The smoke size of speech, read by one family, made by one process."""
    out = tmp_path_factory.mktemp("made_quickly")
    process = run_script(out, *AUDIO, "--processes", 1, prelude=QUICKLY)
    assert process.returncode == 0, process.stderr
    return out


# --- sentences and voices -------------------------------------------------------------------------------------------


def test_no_held_out_sentence_is_ever_trained_on():
    trained = {text for name in TRAINED for text in speech.sentences(name, 0, 3_000)}
    for name in speech.COLLECTIONS.keys() - TRAINED:
        texts = speech.sentences(name, 0, 300)
        assert len(set(texts)) == 300
        assert not trained & set(texts)


def test_recognition_hears_many_different_questions_about_pictures():
    rng = random.Random(0)
    scenes_asked = (scenes.questions(scenes.sample_scene(rng), rng) for _ in range(2_000))
    askable = {question for asked in scenes_asked for question, _ in asked}
    heard = [text for text in speech.sentences("asr", 0, 3_000) if text in askable]
    assert len(heard) > 0.15 * 3_000 and len(set(heard)) > 300


def test_fewer_sentences_are_the_beginning_of_more_and_seeds_differ():
    for name in speech.COLLECTIONS:
        longer = speech.sentences(name, 0, 100)
        assert speech.sentences(name, 0, 40) == longer[:40]
        assert speech.sentences(name, 1, 100) != longer


def test_no_family_of_the_held_out_voices_is_ever_trained_on():
    def families(voices):
        return {voice.partition("/")[0] for voice in voices}

    spoken = {name: {speech.speaking(name, 0, index).voice for index in range(1_000)} for name in speech.COLLECTIONS}
    assert spoken["asr"] == spoken["asr.val"] == set(speech.VOICES)
    assert families(spoken["asr"]) == {"espeak", "hibari", "piper"}
    for name in ("asr.val_voices", "asr.val_open"):
        assert spoken[name] == set(speech.UNSEEN_VOICES)
        assert not families(spoken[name]) & families(spoken["asr"])


def test_readers_are_named_and_new_ones_are_never_trained_on():
    def readers(name):
        return Counter(speech.speaker(name, index) for index in range(3_600))

    trained, held_out = readers("tts"), readers("tts.val_voices")
    assert trained.keys() == speech.READERS.keys() - speech.NEW.keys()
    assert set(speech.NAMED) < trained.keys() and min(trained.values()) > 10
    others = [trained[name] for name in trained.keys() - set(speech.NAMED)]
    assert len(others) == speech.N_OTHERS and max(others) - min(others) <= 1
    assert held_out.keys() == {*speech.NAMED, *speech.NEW}
    for name in ("tts.val", "tts.val_open"):
        assert readers(name).keys() == set(speech.NAMED)
    assert len(set(speech.READERS.values())) == len(speech.READERS)


# --- clips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["asr", "tts"])
def test_a_clip_depends_on_its_seed_and_index_only(name):
    start = 5 * speech.GROUP  # in which Piper is the first to read
    whole = in_new_process(clips, name, 3, 6 * speech.GROUP, start, start + 8)
    alone = in_new_process(clips, name, 3, start + 5, start, start + 5)  # fewer are wanted, nothing was said before
    assert alone == whole[:5]
    families = {row["voice"].partition("/")[0] for _, row in alone}
    assert families == {"espeak", "hibari", "piper"}
    assert in_new_process(clips, name, 4, start + 5, start, start + 5) != alone


def test_what_is_said_does_not_depend_on_the_order_of_sets():
    program = """
from omni.synthetic import speech
for name in speech.COLLECTIONS:
    print([(text, speech.speaking(name, 3, index)) for index, text in enumerate(speech.sentences(name, 3, 40))])
"""
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True
        )
        for seed in ("1", "2")
    )
    assert first.stdout and first.stdout == second.stdout, first.stderr.decode()


def test_clips_are_trimmed_speech_in_the_format_that_is_promised(made):
    for name in speech.COLLECTIONS:
        for index, row in enumerate(rows_of(made / "audio" / f"{name}.csv")):
            path = made / "audio" / row["wav"]
            info = soundfile.info(path)
            assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
            audio, _ = soundfile.read(path)
            assert 0.03 < np.abs(audio).max() <= 1.0
            assert np.mean(np.abs(audio) > 0.999) < 1e-3, "clipped"
            assert 0.035 < info.duration / len(row["text"]) < 0.13 and info.duration < 8, row
            how = speech.speaking(name, 0, index)
            assert row["voice" if name.startswith("asr") else "speaker"] == speech.speaker(name, index)
            if how.snr_db is None and how.reverberation_s is None and how.band is None:
                lead, tail = silence_s(audio, 0.008)  # a little more sensitive than what trims
                assert lead < 0.11 and tail < 0.11, row
                lead, tail = silence_s(audio, 0.02)
                assert lead > 0.045 and tail > 0.045, row


def silence_s(audio: np.ndarray, threshold: float) -> tuple[float, float]:
    """Seconds before and after all that is louder than `threshold` times the peak."""
    audible = np.flatnonzero(np.abs(audio) > threshold * np.abs(audio).max())
    return audible[0] / speech.SAMPLE_RATE, (len(audio) - 1 - audible[-1]) / speech.SAMPLE_RATE


def finished(audio: np.ndarray, **how) -> np.ndarray:
    return speech.finish(audio, speech.SAMPLE_RATE, speech.Speaking("-", **how), seed=1) / 32767


def test_noise_is_as_strong_as_asked():
    tone = np.sin(np.arange(44_100) * 0.1, dtype=np.float32)
    for smoothing in (1, 16):
        one, other = finished(tone), finished(tone, snr_db=20.0, noise_smoothing=smoothing)
        snr_db = 10 * np.log10(np.mean(one**2) / np.mean((other - one) ** 2))
        assert snr_db == pytest.approx(20.0, abs=0.1)


def test_loudness_is_as_asked_whatever_the_synthesiser_gives():
    tone = np.sin(np.arange(16_000) * 0.1, dtype=np.float32)
    for level in (0.05, 1.0):
        assert np.abs(finished(level * tone, gain_db=-6.0)).max() == pytest.approx(0.45, abs=0.005)


def test_a_room_adds_an_echo_that_fades_as_asked():
    response = speech.echo(0.3, 6.0, np.random.RandomState(0))
    assert response[0] == 1 and len(response) == 4_800
    assert 10 * np.log10(1 / np.sum(response[1:] ** 2)) == pytest.approx(6.0)
    first, last = np.mean(response[1:480] ** 2), np.mean(response[-480:] ** 2)
    assert 10 * np.log10(first / last) == pytest.approx(54, abs=2)  # nine tenths of the way to 60 dB
    click = np.zeros(8_000, np.float32)
    click[[0, -1]] = 1, 0.5  # the second keeps the silence between from being trimmed
    assert len(finished(click)) == len(finished(click, reverberation_s=0.3))
    assert (
        np.abs(finished(click, reverberation_s=0.3)[2_000:6_000]).max()
        > 0.005
        > np.abs(finished(click)[2_000:6_000]).max()
    )


def test_a_limited_band_keeps_what_is_inside_and_weakens_what_is_outside():
    times = np.arange(16_000) / speech.SAMPLE_RATE
    for frequency, expected in ((1_000, 1.0), (50, 0.01), (7_000, 0.05)):
        tone = speech.limit_band(np.sin(2 * np.pi * frequency * times), 200, 3_000)[4_000:12_000]
        rms = np.sqrt(2 * np.mean(tone**2))
        assert rms > 0.95 if expected == 1.0 else rms < expected


def test_recognition_hears_variety_and_disturbances_only_in_training_and_the_reader_reads_evenly():
    shares = {"snr_db": 0.4, "reverberation_s": 0.3, "band": 0.15}
    for name in speech.COLLECTIONS:
        ways = [speech.speaking(name, 0, index) for index in range(1_000)]
        for disturbance, share in shares.items():
            measured = np.mean([getattr(how, disturbance) is not None for how in ways])
            assert measured == pytest.approx(share, abs=0.05) if name in ("asr", "asr_open") else measured == 0
        if name.startswith("tts"):
            assert set(ways) <= set(speech.READERS.values())
        else:
            assert len({(how.delivery, how.size) for how in ways}) > 500
            assert min(sum(how.voice == voice for how in ways) for voice in {how.voice for how in ways}) >= 25


# --- manifests ------------------------------------------------------------------------------------------------------


def test_manifests_open_as_the_stages_open_them(made, tmp_path):
    for path, columns in {
        **{made / "audio" / name: ("wav", "text") for name in MANIFESTS},
        made / "images" / "annotations.json": ("image", "caption"),
        made / "images" / "annotations.val.json": ("image", "caption"),
        made / "ocr" / "ocr.csv": ("image", "text"),
        made / "ocr" / "ocr.val.csv": ("image", "text"),
    }.items():
        manifest = load_manifest(path, columns, columns[1], cache_dir=tmp_path, log=lambda line: None)
        names = [manifest[row][columns[0]] for row in range(len(manifest))]
        assert len(set(names)) == len(names) > 10
        for name in names:
            assert manifest.file({"wav": name}, "wav", root=str(path.parent)).is_file()


def test_images_carry_their_questions(made):
    for row in json.loads((made / "images" / "annotations.json").read_text()):
        columns = {"image", "caption", "accepted_answers", "questions", "groups", "colour", "shape", "count"}
        assert set(row) == columns
        assert row["caption"] in row["accepted_answers"]
        assert row["questions"] and all(question and answer for question, answer in row["questions"])


def test_recordings_carry_what_they_answer_and_what_answers_them(made):
    rows = [row for name in ("asr.csv", "tts.csv") for row in csv.DictReader((made / "audio" / name).open())]
    answered = [row for row in rows if row["answer"]]
    assert answered and all(facts.ANSWERS[row["text"]] == row["answer"] for row in answered)
    asked = [row for row in rows if row.get("question")]
    assert asked and all(
        facts.ANSWERS[question] == row["text"] for row in asked for question in json.loads(row["question"])
    )


# --- written questions, read aloud ----------------------------------------------------------------------------------

ASKED = [f"Is the {animal} {colour}?" for animal in ("cat", "dog", "horse", "sheep") for colour in ("black", "white")]


def written_questions(folder: Path) -> Path:
    """A manifest as prepare_data.py writes it. Cats are asked about most often, and once with a digit."""
    rows = [
        {"image": f"{i}.jpg", "caption": "A farm.", "questions": [[text, "yes", ["yes"] * 10] for text in texts]}
        for i, texts in enumerate([ASKED, ASKED[:2], [ASKED[0], "Are there 3 cats?"]])
    ]
    path = folder / "production_vqa.json"
    path.write_text(json.dumps([*rows, {"image": "9.jpg", "caption": "Nothing is asked."}]))
    return path


def test_written_questions_are_read_aloud_and_found_by_their_text(tmp_path):
    from omni.stages.tasks.recordings import QuestionRecordings

    path = written_questions(tmp_path)
    line = ("--read_questions", path, "--questions", 6, "--processes", 1)
    first = run_script(tmp_path, *line)
    assert first.returncode == 0, first.stderr
    assert "9 different questions = 6 to read + 1 left out (not of 3 to 14 words" in first.stdout
    assert "+ 0 left out (with a sound that a voice lacks) + 2 left out (rarer: --questions 6)" in first.stdout
    assert "what is read is asked in 75% of all cases" in first.stdout
    rows = rows_of(tmp_path / "audio/production_questions.csv")
    assert {row["text"] for row in rows} == set(ASKED[:6])
    assert list(rows[0]) == ["wav", "text", "voice"] and not (tmp_path / "text").exists()
    manifest = load_manifest(
        tmp_path / "audio/production_questions.csv", ("wav", "text"), "text", cache_dir=tmp_path, log=lambda line: None
    )
    recordings = QuestionRecordings(manifest, np.arange(len(manifest)))
    for text in ASKED[:6]:
        assert text in recordings
        name = recordings.find(text, None)["wav"]
        assert 0.5 < soundfile.info(manifest.file({"wav": name}, "wav", str(tmp_path / "audio"))).duration < 4
    before = contents(tmp_path / "audio")
    assert "up to date" in run_script(tmp_path, *line).stdout
    path.write_text(json.dumps([{"image": "1.jpg", "questions": [["Is it a tall tree?", "yes"]]}]))
    assert run_script(tmp_path, *line).returncode == 0
    assert contents(tmp_path / "audio") != before
    assert [row["text"] for row in rows_of(tmp_path / "audio/production_questions.csv")] == ["Is it a tall tree?"]


def test_a_question_that_no_voice_can_say_is_left_out(tmp_path):
    """It would end the run, which would end there again and again."""
    path = tmp_path / "production_vqa.json"
    texts = ["icpYwt QR frisbee AEv?", "Is it a frisbee?"]
    path.write_text(json.dumps([{"image": "1.jpg", "questions": [[text, "yes"] for text in texts]}]))
    result = run_script(tmp_path, "--read_questions", path)
    assert result.returncode == 0, result.stderr
    assert "1 to read" in result.stdout and "+ 1 left out (with a sound that a voice lacks)" in result.stdout
    assert [row["text"] for row in rows_of(tmp_path / "audio/production_questions.csv")] == texts[1:]


def test_questions_that_are_held_out_are_those_that_stage_e_holds_out(tmp_path):
    texts = [f"Is the {noun} {word}?" for noun in open_nouns(300) for word in ("old", "new", "big", "small", "red")]
    path = tmp_path / "production_vqa.json"
    path.write_text(json.dumps([{"image": "1.jpg", "questions": [[text, "yes"] for text in texts]}]))
    settings = {"seed": 0, "files": [{"file": str(path)}], "questions": 2_000}
    train, held_out = ([*made.make.args[2]] for made in make_synthetic_datasets.question_collections(settings))
    assert sorted(train + held_out) == sorted(texts) and 3 <= len(held_out) <= 40
    path = tmp_path / "all.csv"
    path.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    manifest = load_manifest(path, ("text",), "text", log=lambda line: None)
    _, rows = split_rows(manifest, make_synthetic_datasets.HELD_OUT_QUESTIONS)
    assert {manifest[int(row)]["text"] for row in rows} == set(held_out)
    assert json.loads((ROOT / "configs/omni_sft_tiny.json").read_text())["val_split"] == (
        make_synthetic_datasets.HELD_OUT_QUESTIONS
    )


def open_nouns(count: int) -> list[str]:
    return [f"{a}{b}{c}" for a in "bdfgklmn" for b in ("oo", "ee", "a", "ai") for c in "bdfgklmnprst"][:count]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected a file, found none"),
        ("[]", "expected rows with image"),
        ('[{"image": "1.jpg", "questions": [["12?", "1"]]}]', "found none among 1"),
        ('[{"image": "1.jpg"}]', "found none among 0"),
        ('[{"image": "1.jpg", "questions": [[3, "1"]]}]', "row 1"),
        ('[{"image": "1.jpg", "questions": 3}]', "row 1"),
    ],
)
def test_questions_that_cannot_be_read_are_one_line(tmp_path, content, words):
    path = tmp_path / "production_vqa.json"
    if content is not None:
        path.write_text(content)
    refused = run_script(tmp_path, "--read_questions", path)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert words in refused.stderr and "production_vqa.json" in refused.stderr
    assert not (tmp_path / "audio").exists()


def test_reading_questions_is_a_command_of_its_own(tmp_path):
    refused = run_script(tmp_path, "--read_questions", written_questions(tmp_path), "--only", "text")
    assert refused.returncode == 2 and "--only" in refused.stderr


# --- the script -----------------------------------------------------------------------------------------------------


def test_the_number_of_processes_changes_nothing_and_a_second_run_neither(made_quickly, tmp_path):
    assert run_script(tmp_path, *AUDIO, "--processes", 3, prelude=QUICKLY).returncode == 0
    first = contents(tmp_path / "audio")
    assert first == contents(made_quickly / "audio")
    (tmp_path / "audio" / ".speech.part" / "asr.old").mkdir(parents=True)  # left by a kill after the last rename
    again = run_script(tmp_path, *AUDIO)
    assert again.returncode == 0 and "up to date" in again.stdout
    assert contents(tmp_path / "audio") == first
    assert not (tmp_path / "audio" / ".speech.part").exists()


def interrupted(out: Path, number: int) -> tuple[Path, int, str]:
    """Start making audio, and send a signal when some groups are finished: the unfinished folder, code, messages."""
    work = out / "audio" / ".speech.part"
    journal = work / "journal.jsonl"
    process = start_script(out, *AUDIO, "--processes", 1, prelude=QUICKLY)
    try:
        wait_until(lambda: journal.read_bytes().count(b"\n") >= 3, "three groups were not finished", process)
        process.send(number)
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
    assert not list((out / "audio").glob("*.csv")), process.stderr
    return work, process.returncode, process.stderr


def test_a_killed_run_goes_on_and_ends_with_the_same_files(made_quickly, tmp_path):
    work, _, _ = interrupted(tmp_path, signal.SIGKILL)
    journal = work / "journal.jsonl"
    groups = [[row["file"] for row in json.loads(line)["rows"]] for line in journal.read_text().splitlines()[1:]]
    with journal.open("ab") as file:
        file.write(b'{"folder": "asr", "sta')  # a line that was being written
    damaged = work / groups[-1][0]
    damaged.write_bytes(damaged.read_bytes()[:1000])
    times = {name: (work / name).stat().st_mtime_ns for group in groups[:-1] for name in group}
    assert times

    assert run_script(tmp_path, *AUDIO, prelude=QUICKLY).returncode == 0
    assert contents(tmp_path / "audio") == contents(made_quickly / "audio")
    assert {name: (tmp_path / "audio" / name).stat().st_mtime_ns for name in times} == times


def test_a_group_counts_as_made_only_if_all_its_files_are_there(tmp_path):
    """Another version may have made smaller groups."""
    (output,) = make_synthetic_datasets.sign_collections({"seed": 0, "train": 3, "held_out": 1})[:1]
    with make_synthetic_datasets.Journal(tmp_path, {}) as journal:  # a new one empties its folder
        (tmp_path / output.folder).mkdir()
        journal.add(output, 0, make_synthetic_datasets.make_group(tmp_path, output, 0, 2))
        assert journal.has(tmp_path, output, 0, 2)
        assert not journal.has(tmp_path, output, 0, 3)


def test_sigterm_ends_with_code_75_and_other_settings_start_anew(made_quickly, tmp_path):
    _, code, errors = interrupted(tmp_path, signal.SIGTERM)
    assert code == 75 and len(errors.splitlines()) == 1, errors
    assert run_script(tmp_path, *AUDIO, "--seed", 1, prelude=QUICKLY).returncode == 0
    other = contents(tmp_path / "audio")
    assert set(other) == set(contents(made_quickly / "audio"))
    assert other["asr/000000.wav"] != (made_quickly / "audio" / "asr" / "000000.wav").read_bytes()


def test_what_is_missing_or_changed_is_made_again_and_what_is_foreign_spared(made_quickly, tmp_path):
    shutil.copytree(made_quickly / "audio", tmp_path / "audio")
    (tmp_path / "audio" / "my_own.csv").write_text("wav,text\n")
    (tmp_path / "audio" / "tts" / "000005.wav").unlink()
    assert run_script(tmp_path, *AUDIO, prelude=QUICKLY).returncode == 0
    assert contents(tmp_path / "audio") == contents(made_quickly / "audio") | {"my_own.csv": b"wav,text\n"}

    (tmp_path / "audio" / "speech.json").unlink()
    before = contents(tmp_path)
    refused = run_script(tmp_path, *AUDIO)
    assert refused.returncode == 2 and "--force" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert contents(tmp_path) == before


def test_what_another_size_alone_has_is_gone_after_it_and_what_is_foreign_spared(made_quickly, tmp_path):
    audio = tmp_path / "audio"
    shutil.copytree(made_quickly / "audio", audio)
    shutil.copytree(audio / "asr", audio / "larger")
    shutil.copy(audio / "asr.csv", audio / "larger.csv")
    for spared in (tmp_path / "outside.csv", audio / "my_own.csv"):
        spared.write_text("wav,text\n")
    stamp = json.loads((audio / "speech.json").read_text())
    stamp["settings"]["clips"]["larger"] = 48
    stamp["files"] |= {"larger.csv": stamp["files"]["asr.csv"], "../outside.csv": stamp["files"]["asr.csv"]}
    stamp["folders"]["larger"] = stamp["folders"]["asr"]
    (audio / "speech.json").write_text(json.dumps(stamp))
    assert run_script(tmp_path, *AUDIO, prelude=QUICKLY).returncode == 0
    assert contents(audio) == contents(made_quickly / "audio") | {"my_own.csv": b"wav,text\n"}
    assert (tmp_path / "outside.csv").exists()


def test_a_second_process_is_kept_out(tmp_path):
    work = tmp_path / "audio" / ".speech.part"
    work.mkdir(parents=True)
    with (work / "journal.jsonl").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        refused = run_script(tmp_path, *AUDIO)
    assert refused.returncode == 2 and str(work) in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_full_disk_is_one_line_and_spares_the_files_that_are_there(made_quickly, tmp_path):
    shutil.copytree(made_quickly / "audio", tmp_path / "audio")
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"  # some clips are larger
    failed = run_script(tmp_path, *AUDIO, "--force", prelude=QUICKLY + limit)
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1, failed.stderr
    assert contents(made_quickly / "audio").items() <= contents(tmp_path / "audio").items()
