"""Files as other programs write them: each trains its stage to the same bits as this project's own CSV or JSON, also
when it is killed."""

import csv
import io
import json
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from harness import differences, kill_at_step, trained_weights
from stages import AUDIO_ENC, OMNI, VISION, Training, make_images, make_mix, make_speech, write_csv
from test_config import only_error

from omni.common.errors import BadRow, UserError
from omni.data.audio import audio_length, load_audio
from omni.data.conversations import read_conversation
from omni.data.open_manifest import expand, load_manifest
from omni.data.records import MAX_ROW_BYTES
from omni.stages.audio_encoder import AudioEncoderConfig
from omni.train.config import load_config

Rows = list[dict]  # "file", a path, and "text"
SOUND = ("wav", "text")


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> tuple[Path, Rows]:
    """Recordings whose names are in the order of their rows, and the rows."""
    folder = tmp_path_factory.mktemp("speech")
    with open(make_speech(folder)["train_csv"], newline="") as file:
        found = list(csv.DictReader(file))
    for number, row in enumerate(found):
        (folder / row["wav"]).rename(folder / f"clip{number:02}.wav")
    rows = [{"file": folder / f"clip{i:02}.wav", "text": row["text"]} for i, row in enumerate(found)]
    write_csv(folder / "asr.csv", [{"wav": row["file"].name, "text": row["text"]} for row in rows])
    return folder, rows


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, Rows]:
    folder = tmp_path_factory.mktemp("pictures")
    found = json.loads(Path(make_images(folder)["train_manifest"]).read_text())
    for number, row in enumerate(found):
        (folder / row["image"]).rename(folder / f"{number:02}.png")
    rows = [{"file": folder / f"{i:02}.png", "text": row["caption"]} for i, row in enumerate(found)]
    own = [{"image": row["file"].name, "caption": row["text"]} for row in rows]
    (folder / "annotations.json").write_text(json.dumps(own))
    return folder, rows


# Writers: each makes a data set of the rows in an empty folder and returns what a config says of it -------------------


def lines(path: Path, rows) -> str:
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return str(path)


def copied(rows: Rows, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for row in rows:
        shutil.copy(row["file"], folder)


def nemo(folder: Path, rows: Rows) -> str:
    return lines(
        folder / "manifest.json",
        (json.dumps({"audio_filepath": str(row["file"]), "text": row["text"], "duration": 0.7}) for row in rows),
    )


def common_voice(folder: Path, rows: Rows) -> str:
    copied(rows, folder / "clips")
    table = (f"c0ffee\t{row['file'].name}\t{row['text']}\t2\t0\t\t" for row in rows)
    return lines(folder / "validated.tsv", ["client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender", *table])


def ljspeech(folder: Path, rows: Rows) -> str:
    copied(rows, folder / "wavs")
    lines(folder / "metadata.csv", (f"{row['file'].stem}|{row['text'].upper()}|{row['text']}" for row in rows))
    return str(folder)


def vits(folder: Path, rows: Rows) -> str:
    return lines(folder / "train.txt", (f"{row['file']}|3|{row['text']}" for row in rows))


def kaldi(folder: Path, rows: Rows) -> str:
    lines(folder / "wav.scp", (f"utt{i:02} {row['file']}" for i, row in enumerate(rows)))
    lines(folder / "text", (f"utt{i:02} {row['text']}" for i, row in enumerate(rows)))
    return str(folder)


def kaldi_segments(folder: Path, rows: Rows) -> str:
    """All recordings in one file, a segment each."""
    waveforms = [load_audio(row["file"], 16_000) for row in rows]
    soundfile.write(folder / "all.wav", np.concatenate(waveforms), 16_000, subtype="FLOAT")
    ends = np.cumsum([len(waveform) for waveform in waveforms]) / 16_000
    lines(folder / "wav.scp", [f"all {folder / 'all.wav'}"])
    lines(folder / "text", (f"utt{i:02} {row['text']}" for i, row in enumerate(rows)))
    times = zip([0.0, *ends[:-1]], ends, strict=True)
    lines(folder / "segments", (f"utt{i:02} all {start:.7f} {end:.7f}" for i, (start, end) in enumerate(times)))
    return str(folder)


def texts_beside(folder: Path, rows: Rows) -> str:
    copied(rows, folder)
    for row in rows:
        lines(folder / f"{row['file'].stem}.txt", [row["text"]])
    return str(folder)


def hf_folder(folder: Path, rows: Rows) -> str:
    copied(rows, folder)
    lines(folder / "metadata.jsonl", (json.dumps({"file_name": row["file"].name, "text": row["text"]}) for row in rows))
    return str(folder)


def webdataset(folder: Path, rows: Rows) -> str:
    for shard in range(3):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as archive:
            for row in rows[shard * 8 : shard * 8 + 8]:
                archive.add(row["file"], f"train/{row['file'].name}")
                text = tarfile.TarInfo(f"train/{row['file'].stem}.txt")
                text.size = len(row["text"])
                archive.addfile(text, io.BytesIO(row["text"].encode()))
    return str(folder / "shard-*.tar")


def parquet(column: str) -> Callable[[Path, Rows], list[str]]:
    def write(folder: Path, rows: Rows) -> list[str]:
        paths = [folder / f"train-0000{part}-of-00002.parquet" for part in range(2)]
        for path, some in zip(paths, (rows[:10], rows[10:]), strict=True):
            media = [{"bytes": row["file"].read_bytes(), "path": row["file"].name} for row in some]
            table = {column: media, "text": [row["text"] for row in some], "id": [b"\xff"] * len(some)}
            pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=4)
        return list(map(str, paths))

    return write


def semicolons(folder: Path, rows: Rows) -> str:
    return lines(folder / "a.csv", ["file;transcript", *(f'{row["file"]};"{row["text"]}"' for row in rows)])


def coco(folder: Path, rows: Rows) -> str:
    (folder / "annotations").mkdir()
    copied(rows, folder / "train2017")
    found = {
        "info": {"year": 2017},
        "images": [{"id": 7 * i, "file_name": row["file"].name, "height": 16} for i, row in enumerate(rows)],
        "annotations": [{"id": i, "image_id": 7 * i, "caption": row["text"]} for i, row in enumerate(rows)],
    }
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(found))
    return str(folder / "annotations/captions_train2017.json")


SPEECH = {
    "NeMo": nemo, "Common Voice": common_voice, "LJSpeech": ljspeech, "VITS": vits, "Kaldi": kaldi,
    "Kaldi segments": kaldi_segments, "wav beside txt": texts_beside, "audiofolder": hf_folder,
    "WebDataset": webdataset, "Parquet": parquet("audio"), "semicolons": semicolons,
}  # fmt: skip
PICTURES = {
    "COCO": coco, "png beside txt": texts_beside, "imagefolder": hf_folder, "WebDataset": webdataset,
    "Parquet": parquet("image"),
}  # fmt: skip


def check_same_bits(reference: Training, folder: Path, files) -> None:
    key = "train_csv" if "train_csv" in reference.config else "train_manifest"
    keys = {key: files}
    if "image_root" in reference.config and not re.search(r"\.(tar|parquet)\b", str(files)):  # these have their own
        keys["image_root"] = None
    trained = reference.changed(save_dir=str(folder / "run"), **keys)
    for step in (3, 4):  # after the third step, and four steps later
        assert trained.run(prelude=kill_at_step(step)).returncode == -9
    trained.finish()
    assert differences(trained_weights(trained), trained_weights(reference)) == []


@pytest.fixture(scope="module")
def speech_reference(speech, tmp_path_factory) -> Training:
    folder, _ = speech
    training = AUDIO_ENC.training(tmp_path_factory.mktemp("reference"), train_csv=str(folder / "asr.csv"))
    training.finish()
    return training


@pytest.mark.parametrize("write", SPEECH.values(), ids=SPEECH)
def test_a_foreign_format_of_speech_trains_to_the_same_bits(speech, speech_reference, tmp_path, write):
    check_same_bits(speech_reference, tmp_path, write(tmp_path, speech[1]))


@pytest.fixture(scope="module")
def picture_reference(pictures, tmp_path_factory) -> Training:
    folder, _ = pictures
    keys = {"train_manifest": str(folder / "annotations.json"), "image_root": str(folder)}
    # pictures are split by their names, which an archive changes
    training = VISION.training(tmp_path_factory.mktemp("reference"), val_split=0.0, **keys)
    training.finish()
    return training


@pytest.mark.parametrize("write", PICTURES.values(), ids=PICTURES)
def test_a_foreign_format_of_pictures_trains_to_the_same_bits(pictures, picture_reference, tmp_path, write):
    check_same_bits(picture_reference, tmp_path, write(tmp_path, pictures[1]))


def test_files_of_several_formats_are_one_data_set(speech, tmp_path):
    folder, rows = speech
    parts = [nemo(tmp_path, rows[:5]), str(folder / "asr.csv"), webdataset(tmp_path, rows)]
    manifest = load_manifest(parts, SOUND, "text", cache_dir=str(tmp_path))
    expected = rows[:5] + rows + rows
    assert [manifest[i]["text"] for i in range(len(manifest))] == [row["text"] for row in expected]
    for number, row in enumerate(expected):
        found = load_audio(manifest.file(manifest[number], "wav"), 16_000)
        assert np.array_equal(found, load_audio(row["file"], 16_000)), manifest.where(number)
    assert manifest.where(5).endswith("asr.csv: row 1")


def test_quotation_marks_between_tabs_are_characters(tmp_path):
    """As in Common Voice's files: they quote nothing, and one alone does not join rows."""
    path = lines(tmp_path / "a.tsv", ["path\tsentence", 'a.wav\t"Go," he said', 'b.wav\t"Go', "c.wav\tno"])
    manifest = load_manifest(path, SOUND, "text")
    assert [manifest[row]["text"] for row in range(3)] == ['"Go," he said', '"Go', "no"]


# Parts of recordings --------------------------------------------------------------------------------------------------


def test_nemo_offsets_and_media_fragments_are_parts_of_a_recording(tmp_path):
    rng = np.random.default_rng(5)
    waveform = (rng.standard_normal(48_000) / 8).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", waveform, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "odd#t=1.wav", waveform[:500], 16_000, subtype="FLOAT")
    rows = [
        {"audio_filepath": "long.wav", "offset": 0.5, "duration": 1.25, "text": "a"},
        {"audio_filepath": "long.wav#t=2", "text": "b"},
        {"audio_filepath": "long.wav", "offset": 0, "duration": 0.25, "text": "c"},
        {"audio_filepath": "odd#t=1.wav", "text": "d"},
        {"audio_filepath": "long.wav", "offset": 2.5, "duration": 1.0, "text": "past the end"},
        {"audio_filepath": "long.wav#t=2,1", "text": "backwards"},
    ]
    manifest = load_manifest(lines(tmp_path / "m.jsonl", map(json.dumps, rows)), SOUND, "text")
    for row, expected in enumerate((waveform[8_000:28_000], waveform[32_000:], waveform[:4_000], waveform[:500])):
        file = manifest.file(manifest[row], "wav")
        assert np.array_equal(load_audio(file, 16_000), expected) and audio_length(file) == (len(expected), 16_000)
    for row, message in ((4, "lasts 3.00 s"), (5, "an end after the start")):
        with pytest.raises(BadRow, match=message):
            load_audio(manifest.file(manifest[row], "wav"), 16_000)


def test_a_part_of_a_compressed_recording(tmp_path):
    """MP3 has no length in its header, and cannot be entered anywhere."""
    waveform = 0.3 * np.sin(np.arange(48_000) * 0.05)
    soundfile.write(tmp_path / "a.mp3", waveform, 16_000)
    whole = load_audio(tmp_path / "a.mp3", 16_000)
    path = lines(tmp_path / "a.csv", ["wav,text", '"a.mp3#t=1,2.5",a', '"a.mp3#t=9,10",b'])
    manifest = load_manifest(path, SOUND, "text")
    assert np.array_equal(load_audio(manifest.file(manifest[0], "wav"), 16_000), whole[16_000:40_000])
    with pytest.raises(BadRow, match="lasts 3"):
        load_audio(manifest.file(manifest[1], "wav"), 16_000)


# Conversations --------------------------------------------------------------------------------------------------------


def test_alpaca_is_a_conversation():
    found = read_conversation(
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["Hi", "Hello"]], "system": "Be brief."}
    )
    assert [(message["role"], message["content"]) for message in found] == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n1 and 2"), ("assistant", "3"),
    ]  # fmt: skip
    with pytest.raises(BadRow, match="an answer"):
        read_conversation({"instruction": "Add.", "output": ""})


def test_conversations_with_pictures_in_parquet_and_several_files_train(tmp_path):
    keys = make_mix(tmp_path)
    pictures = json.loads(Path(keys["image_manifest"]).read_text())
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "one round cat"}]
    media = [{"bytes": (tmp_path / row["image"]).read_bytes(), "path": None} for row in pictures[:6]]
    table = {"images": [[one] for one in media], "conversations": [turns] * 6}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "chat.parquet")
    llava = [{"image": row["image"], "conversations": turns} for row in pictures[6:12]]
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    files = [str(tmp_path / "chat.parquet"), str(tmp_path / "llava.json")]
    training = OMNI.training(tmp_path, jsonl_path=files, image_root=None, max_steps=3, max_epochs=None)
    stdout = training.finish().stdout
    assert "chat.parquet and 1 more: 12 rows" in stdout and "0 left out" in stdout


# What is refused, and how ---------------------------------------------------------------------------------------------


def empty_folder(folder: Path) -> Path:
    return folder


def texts_missing(folder: Path) -> Path:
    (folder / "a.wav").write_bytes(b"")
    return folder


def compressed_tar(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w:gz"):
        pass
    return folder / "a.tar"


def truncated_tar(folder: Path) -> Path:
    (folder / "big.txt").write_bytes(bytes(50_000))
    with tarfile.open(folder / "whole.tar", "w") as archive:
        archive.add(folder / "big.txt", "a.wav")
        archive.add(folder / "big.txt", "b.wav")
    (folder / "a.tar").write_bytes((folder / "whole.tar").read_bytes()[:60_000])
    return folder / "a.tar"


def second_member(folder: Path) -> int:
    """The byte at which it begins in ``whole.tar``, which is made."""
    truncated_tar(folder)
    with tarfile.open(folder / "whole.tar") as archive:
        return archive.getmembers()[1].offset


def tar_with_a_damaged_header(folder: Path) -> Path:
    """tarfile takes what follows a damaged header for the end."""
    at = second_member(folder)
    data = bytearray((folder / "whole.tar").read_bytes())
    data[at : at + 512] = b"\xff" * 512
    (folder / "a.tar").write_bytes(data)
    return folder / "a.tar"


def tar_without_an_end(folder: Path) -> Path:
    at = second_member(folder)
    (folder / "a.tar").write_bytes((folder / "whole.tar").read_bytes()[:at])
    return folder / "a.tar"


def named_twice(folder: Path) -> list[str]:
    return [lines(folder / "a.csv", ["wav,text", "a.wav,a"])] * 2


def empty(folder: Path) -> Path:
    (folder / "a.parquet").touch()
    return folder / "a.parquet"


def twice_the_same_column(folder: Path) -> Path:
    return Path(lines(folder / "a.csv", ["wav,text,text", "a.wav,a,b"]))


def damaged_parquet(folder: Path) -> Path:
    (folder / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    return folder / "a.parquet"


def command(folder: Path) -> Path:
    lines(folder / "wav.scp", ["utt1 sph2pipe -f wav a.sph |"])
    lines(folder / "text", ["utt1 one"])
    return folder


def vqa_questions(folder: Path) -> Path:
    (folder / "q.json").write_text(json.dumps({"info": {}, "questions": [{"question_id": 1}]}, indent=1))
    return folder / "q.json"


def instances(folder: Path) -> Path:
    found = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]}
    (folder / "instances_val.json").write_text(json.dumps(found))
    return folder / "instances_val.json"


def one_cell(folder: Path) -> Path:
    return Path(lines(folder / "a.txt", ["a.wav|one two"]))


REFUSED = {
    empty_folder: "a folder with wav.scp",
    texts_missing: "expected a.txt for a.wav",
    compressed_tar: "unpacked first",
    truncated_tar: "not a tar archive that can be read",
    tar_with_a_damaged_header: "files that follow cannot be found",
    tar_without_an_end: "without the mark of an archive's end",
    named_twice: "named twice",
    empty: "empty, expected rows",
    twice_the_same_column: "found text twice",
    damaged_parquet: "not a Parquet file",
    command: "a command, which is not run",
    vqa_questions: "jq -c '.questions[]' q.json > rows.jsonl",
    instances: "expected captions",
    one_cell: "read as wav|text, which lacks image",
}


@pytest.mark.parametrize("make, message", REFUSED.items(), ids=[make.__name__ for make in REFUSED])
def test_what_cannot_be_read_is_refused_with_what_to_do(tmp_path, make, message):
    columns = ("image", "text") if make is one_cell else SOUND
    with pytest.raises(UserError) as error:
        load_manifest(make(tmp_path), columns, "text", log=lambda line: None)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("clips", [True, False], ids=["with clips", "without"])
def test_a_folder_of_common_voice_is_refused_with_its_tables(speech, tmp_path, clips):
    """Which table is meant is for the user to say: validated.tsv has the rows of train.tsv and of the held-out ones."""
    folder = tmp_path / "cv-corpus" / "en"
    folder.mkdir(parents=True)
    table = Path(common_voice(folder, speech[1]))
    for name in ("train", "dev", "test"):
        shutil.copy(table, table.with_stem(name))
    (folder / "clip00.json").write_text("{}")  # belongs to a recording, if there is one
    shutil.copy(speech[1][0]["file"], folder / "clip00.wav")
    if not clips:
        shutil.rmtree(folder / "clips")
        (folder / "clip00.json").unlink()
        (folder / "clip00.wav").unlink()
    training = AUDIO_ENC.training(tmp_path, max_steps=2)
    for given, parent in ((folder, ""), (folder.parent, "en/")):
        names = ", ".join(f"{parent}{name}.tsv" for name in ("dev", "test", "train", "validated"))
        training.config["train_csv"] = str(given)
        only_error(training.run(), f"{given}: ", f"found the tables {names}. Name one of them: {folder}/train.tsv\n")
    if clips:
        training.changed(train_csv=f"{folder}/train.tsv").finish()


def test_a_pattern_without_files_and_an_empty_list_are_refused(tmp_path):
    for files, message in ((str(tmp_path / "*.tar"), "none at"), ([], "an empty list")):
        only_error(AUDIO_ENC.training(tmp_path, train_csv=files).run(), 'key "train_csv"', message)


def test_rows_that_are_gathered_anew_when_a_file_changes(speech, tmp_path):
    path = kaldi(tmp_path, speech[1])
    before = load_manifest(path, SOUND, "text", log=lambda line: None)
    log = []
    assert load_manifest(path, SOUND, "text", log=log.append).sha256 == before.sha256 and not log
    lines(tmp_path / "text", (f"utt{i:02} changed" for i in range(24)))
    after = load_manifest(path, SOUND, "text", log=log.append)
    assert after[0]["text"] == "changed" and after.sha256 != before.sha256 and any("indexed" in line for line in log)
    (after.gathered / "rows.jsonl").write_bytes(b"{}\n" * 24)
    log.clear()
    assert load_manifest(path, SOUND, "text", log=log.append)[0]["text"] == "changed"
    assert any("not what was written" in line for line in log)


def test_a_training_that_runs_reads_what_it_began_with(speech, tmp_path, monkeypatch):
    """Another stage finds the file changed, and gathers it anew: not where the running one reads."""
    path = Path(parquet("audio")(tmp_path, speech[1])[0])
    running = load_manifest(path, SOUND, "text", log=lambda line: None)
    before = [(row["text"], running.file(row, "wav").read().data) for row in map(running.__getitem__, range(10))]
    monkeypatch.chdir(tmp_path)
    same = load_manifest(path.name, SOUND, "text", log=lambda line: None)
    assert same.gathered.resolve() == running.gathered, "by another name"
    table = pyarrow.parquet.read_table(path).slice(0, 10)
    pyarrow.parquet.write_table(table.take(list(range(9, -1, -1))), path)
    log = []
    after = load_manifest(path, ("wav",), "wav", log=log.append)
    again = pickle.loads(pickle.dumps(running))  # as a loader's worker gets it
    assert after[0]["wav"] and load_manifest(path, SOUND, "text", log=log.append)[0]["text"] == before[9][0]
    for manifest in (running, again):
        found = [(row["text"], manifest.file(row, "wav").read().data) for row in map(manifest.__getitem__, range(10))]
        assert found == before
    assert any(str(running.gathered) in line and "Delete it" in line for line in log)


def test_a_full_disk_while_rows_are_gathered_is_said_as_such(speech, tmp_path):
    """And not as a file that cannot be read."""
    (path, *_) = parquet("audio")(tmp_path, speech[1])
    training = AUDIO_ENC.training(tmp_path, train_csv=path)
    size = sum(row["file"].stat().st_size for row in speech[1][:10])
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n"
    process = training.run(prelude=f"import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{limit}")
    assert process.returncode == 1 and "Make room" in process.stderr and process.stderr.count("\n") == 1
    training.finish()


def test_a_media_bin_of_the_user_s_hides_no_copy(speech, tmp_path):
    path = Path(parquet("audio")(tmp_path, speech[1])[0])
    manifest = load_manifest(path, SOUND, "text", log=lambda line: None)
    found = manifest.file(manifest[0], "wav").read()
    (tmp_path / "media.bin").write_bytes(b"x" * 100_000)
    assert manifest.file(manifest[0], "wav").read() == found


def test_two_pictures_in_a_sample_of_a_shard_are_a_bad_row(pictures, tmp_path):
    webdataset(tmp_path, pictures[1])
    with tarfile.open(tmp_path / "shard-1.tar", "a") as archive:
        for name in ("odd.png", "odd.jpg", "good.png", "good.txt"):
            archive.add(pictures[1][0]["file"], f"train/{name}") if name != "good.txt" else archive.addfile(
                tarfile.TarInfo(f"train/{name}")
            )
    manifest = load_manifest(tmp_path / "shard-1.tar", ("image",), "image", log=lambda line: None)
    assert len(manifest) == 10 and manifest[9]["image"]
    with pytest.raises(BadRow, match="odd.jpg"):
        manifest[8]
    assert manifest.where(8).endswith("(train/odd)")


def test_copies_in_the_index_are_those_that_were_written(speech, tmp_path):
    path = parquet("audio")(tmp_path, speech[1])[0]
    media = load_manifest(path, SOUND, "text", log=lambda line: None).gathered / "media.bin"
    log, content = [], media.read_bytes()
    media.write_bytes(bytes([content[0] ^ 255]) + content[1:])
    load_manifest(path, SOUND, "text", log=log.append)
    assert any("media.bin is not what was written" in line for line in log) and media.read_bytes() == content


def test_stages_and_evaluations_share_the_copies(speech, tmp_path):
    path = Path(parquet("audio")(tmp_path, speech[1])[0])
    manifests = [load_manifest(path, columns, "text", log=lambda line: None) for columns in (SOUND, ("wav",))]
    manifests.append(load_manifest(path, SOUND, "text", cache_dir=str(tmp_path / "cache"), log=lambda line: None))
    assert len(list(path.parent.glob("*/media.bin"))) == 1 and not list((tmp_path / "cache").glob("*/media.bin"))
    assert len({manifest.gathered for manifest in manifests}) == 1 < len({manifest.folder for manifest in manifests})
    assert len({manifest.file(manifest[3], "wav").read() for manifest in manifests}) == 1
    elsewhere = shutil.copy(path, tmp_path / "cache")
    alone = load_manifest(elsewhere, SOUND, "text", cache_dir=str(tmp_path / "other"), log=lambda line: None)
    assert alone.gathered.parent == tmp_path / "other", "none lies beside that file"


def test_shards_by_their_numbers(speech, tmp_path):
    webdataset(tmp_path, speech[1])
    files = str(tmp_path / "shard-{0..1}.tar")
    assert len(load_manifest(files, SOUND, "text", log=lambda line: None)) == 16


def test_what_stands_alone_in_a_folder_is_said_at_each_start(speech, tmp_path):
    folder = Path(texts_beside(tmp_path, speech[1]))
    (folder / "clip03.txt").rename(folder / "other.txt")
    (folder / "list.csv").write_text("wav,text\nclip03.wav,one\n")
    for _ in range(2):
        log = []
        load_manifest(folder, SOUND, "text", log=log.append)
        assert "1 sounds or pictures have no text beside them (clip03.wav)" in log[-1]
        assert "1 texts have no sound or picture and are not used (other.txt)" in log[-1]
        assert "tables are not read (list.csv)" in log[-1]


def test_a_text_that_is_missing_or_in_another_encoding_is_a_bad_row(speech, tmp_path):
    folder = Path(texts_beside(tmp_path, speech[1]))
    (folder / "clip03.txt").unlink()
    (folder / "clip05.txt").write_bytes("café über dem Haus".encode("latin-1"))
    (folder / "clip06.txt").write_bytes("café".encode("utf-16"))
    manifest = load_manifest(folder, SOUND, "text", log=lambda line: None)
    reasons = {3: "no text beside it", 5: "clip05.txt: expected UTF-8 text, found byte 0xe9", 6: "found UTF-16"}
    for row, reason in reasons.items():
        with pytest.raises(BadRow, match=reason):
            manifest[row]
    assert manifest[4]["text"] and len(manifest) == 24
    assert load_manifest(folder, ("wav",), "wav", log=lambda line: None)[3]["wav"], "a vocoder needs no text"


def test_a_folder_with_several_tables_or_splits_is_refused(speech, tmp_path):
    written = Path(parquet("audio")(tmp_path, speech[1])[0])
    folder = tmp_path / "hub"
    folder.mkdir()
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        (folder / name).write_bytes(written.read_bytes())
    count = len(load_manifest(written, SOUND, "text", log=lambda line: None))
    assert len(load_manifest(folder, SOUND, "text", log=lambda line: None)) == 2 * count
    for name in ("mine.csv", "more.tsv", "metadata.jsonl", "shard.tar"):
        (folder / name).write_text("wav,text\n")
        with pytest.raises(UserError, match=re.escape(name)) as refused:
            load_manifest(folder, SOUND, "text", log=lambda line: None)
        assert "several tables" in str(refused.value) and "train-00000-of-00002.parquet" in str(refused.value)
        keys = {"save_dir": "x", "max_steps": 1, "train_csv": str(folder)}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        with pytest.raises(UserError, match='key "train_csv": .*several tables'):
            load_config(AudioEncoderConfig, str(tmp_path / "config.json"))
        (tmp_path / "config.json").write_text(json.dumps(keys | {"train_csv": f"{tmp_path}/hu*"}))
        with pytest.raises(UserError, match='key "train_csv": .*several tables'):
            load_config(AudioEncoderConfig, str(tmp_path / "config.json"))
        (folder / name).unlink()
    for name in ("._metadata.csv", "~$mine.csv"):
        (folder / name).write_text("wav,text\n")
    assert len(load_manifest(folder, SOUND, "text", log=lambda line: None)) == 2 * count
    (folder / "test-00000-of-00001.parquet").write_bytes(written.read_bytes())
    with pytest.raises(UserError, match="splits test, train") as refused:
        load_manifest(folder, SOUND, "text", log=lambda line: None)
    assert str(refused.value).endswith(f"{folder / '*train*'}.parquet")
    assert len(load_manifest(f"{folder / 'train'}*.parquet", SOUND, "text", log=lambda line: None)) == 2 * count


def test_shards_of_a_split_are_known_by_their_names(tmp_path):
    for number, names in enumerate(
        (("cc3m-train-0.tar", "cc3m-validation-0.tar"), ("data_TEST.tar", "training-0.tar"), ("dev.tar", "x-train.tar"))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        with pytest.raises(UserError, match="has the splits"):
            expand(folder)
    folder = tmp_path / "one"
    folder.mkdir()
    names = ["00000.tar", "00001.tar", "contest-1.tar", "trainer.tar"]
    for name in (*names, "00000.parquet", "00001.parquet", "00000_stats.json"):  # as img2dataset writes them
        (folder / name).touch()
    assert [path.name for path in expand(folder)] == names


def test_rows_below_a_key_of_one_object_are_not_one_row(tmp_path):
    path = tmp_path / "data.json"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    rows = [{"id": number, "conversations": turns} for number in range(3)]
    path.write_text(json.dumps({"version": 1, "data": rows}))
    with pytest.raises(UserError, match=r"jq -c '\.data\[\]' data\.json"):
        load_manifest(path, (), "id", log=lambda line: None)
    pictures = [{"path": "a.png", "file": "a.png"}] * 2
    for one in (
        {"id": 1, "conversations": turns},
        {"messages": [{"role": "user", "content": "What?"}] * 2, "images": pictures},
        {"audio": "a.wav", "text": "one two", "segments": [{"text": "one"}, {"text": "two"}]},
        {"dialog": [{"speaker": "A", "text": "What?"}, {"speaker": "B", "text": "That."}]},
    ):
        path.write_text(json.dumps(one))
        assert len(load_manifest(path, (), "id", log=lambda line: None)) == 1


def test_rows_without_a_text_and_long_ones_are_bad_rows(speech, tmp_path):
    folder = Path(texts_beside(tmp_path, speech[1]))
    (folder / "clip03.txt").unlink()
    lines(folder / "clip04.txt", ["x" * (MAX_ROW_BYTES + 1)])
    manifest = load_manifest(folder, SOUND, "text", log=lambda line: None)
    assert len(manifest) == 24
    for row, message in ((3, "no text beside it"), (4, "longer than 1 MiB")):
        with pytest.raises(BadRow, match=message):
            manifest[row]
    assert manifest.where(3).endswith("row 4 (clip03.wav)")


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.JSONL", "rows.ndjson", "rows.json", "rows.Json", "manifest", "rows.dat"]
)
@pytest.mark.parametrize("array", [False, True])
def test_json_is_known_whatever_its_name(tmp_path, name, array):
    rows = [{"wav": f"{i}.wav", "text": f"row {i}"} for i in range(3)]
    if array and name.lower().endswith(("jsonl", "ndjson")):
        pytest.skip("the name says that each line is an object")
    written = json.dumps(rows) if array else "\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / name).write_text(written)
    manifest = load_manifest(tmp_path / name, SOUND, "text")
    assert [manifest[row]["text"] for row in range(len(manifest))] == ["row 0", "row 1", "row 2"]


def test_a_table_may_begin_as_json_does(tmp_path):
    (tmp_path / "rows.csv").write_text("[id],wav,text\n1,a.wav,one\n")
    for name in ("list.txt", "wav.lst", "list"):
        (tmp_path / name).write_text("[1]/a.wav|one\n{1}/b.wav|two\n")
    for name, count in (("rows.csv", 1), ("list.txt", 2), ("wav.lst", 2), ("list", 2)):
        manifest = load_manifest(tmp_path / name, SOUND, "text")
        assert len(manifest) == count and manifest[0]["text"] == "one"


@pytest.mark.parametrize("name", ["captions.json", "captions.JSON", "captions"])
def test_captions_of_coco_whatever_their_name(tmp_path, name):
    captions = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "A cat."}]}
    (tmp_path / name).write_text(json.dumps(captions))
    manifest = load_manifest(tmp_path / name, ("image", "caption"), "image")
    assert len(manifest) == 1 and manifest[0]["caption"] == "A cat."
