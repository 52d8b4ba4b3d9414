"""No row vanishes: a manifest has the rows that a plain reader finds, and each is used, or named and counted."""

import csv
import importlib
import io
import json
import multiprocessing
import os
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import omni.data.manifest
from omni.common.errors import BadRow, GivenUp, Interrupted, UserError, reading_row
from omni.common.media import Inline
from omni.data.formats import Csv
from omni.data.index import open_array, save_array
from omni.data.manifest import Manifest, ManifestDataset, account_for_rows, read_some
from omni.data.measure import measure, measure_rows
from omni.data.open_manifest import load_manifest
from omni.data.records import MAX_ROW_BYTES, json_records, line_of, line_records

COLUMNS = ("wav", "text")


def load(path: Path, columns=COLUMNS, **others) -> Manifest:
    return load_manifest(path, columns, columns[-1], **({"log": lambda line: None} | others))


def write(folder: Path, content: bytes | str, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# What a plain reader finds --------------------------------------------------------------------------------------------


def plain_rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def our_rows(path: Path, content: bytes, chunk_bytes: int) -> list[list[str]]:
    chunks = (content[i : i + chunk_bytes] for i in range(0, len(content), chunk_bytes))
    records = list(line_records(path, chunks, quotes=","))
    bom = b"\xef\xbb\xbf" if content.startswith(b"\xef\xbb\xbf") else b""
    assert bom + b"".join(record.data for record in records) == content, "every byte is in one record"
    return [next(csv.reader([record.data.decode()]), []) for record in records]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 1000])
def test_the_rows_of_any_text_are_those_of_the_csv_module(tmp_path, chunk_bytes):
    rng, refused = random.Random(chunk_bytes), 0
    for _ in range(1000):
        text = "".join(rng.choices('a,"\n\r ', k=rng.randint(0, 25)))
        path = write(tmp_path, text)
        try:
            assert our_rows(path, text.encode(), chunk_bytes) == plain_rows(text), repr(text)
        except UserError as error:  # a mark that is never closed, as the strict reader says too
            refused += 1
            assert "never closed" in str(error)
            with pytest.raises(csv.Error):
                list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert 100 < refused < 600


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False], ids=["last line end", "no last line end"])
def test_every_row_with_any_line_end(tmp_path, monkeypatch, bom, end, last):
    monkeypatch.setattr("omni.data.formats.base._CHUNK_BYTES", 5)
    rows = [{"wav": f"{i}.wav", "text": f'say "{i}", é漢 {end}again'} for i in range(20)]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    text = bom + out.getvalue().replace(f"2.wav{end}", f"2.wav{end}{end}")
    manifest = load(write(tmp_path, text if last else text.removesuffix(end)))
    assert [manifest[row] for row in range(len(manifest))] == rows


def test_a_stray_quotation_mark_at_any_place_loses_no_row(tmp_path):
    lines = [f"{i}.wav,five nails {i}" for i in range(6)]
    for place in range(len(lines[2]) + 1):
        text = "\n".join(["wav,text", *lines[:2], lines[2][:place] + '"' + lines[2][place:], *lines[3:]]) + "\n"
        path = write(tmp_path, text)
        if place and lines[2][place - 1] != ",":
            manifest = load(path)
            assert [[*manifest[row].values()] for row in range(len(manifest))] == plain_rows(text)[1:]
        else:  # at the beginning of a field it opens one, which the end of the file does not close
            with pytest.raises(UserError, match=r"a\.csv: line 4: a quotation mark opens a field and is never closed"):
                load(path)


def test_two_stray_marks_make_a_row_that_is_named(tmp_path):
    lines, said = [f"{i}.wav,five nails {i}" for i in range(9)], []
    lines[2], lines[6] = '2.wav,"five nails', '6.wav,"six nails'
    path = write(tmp_path, "\n".join(["wav,text", *lines]) + "\n")
    manifest = load(path, log=said.append)
    assert len(manifest) == len(plain_rows(path.read_text())) - 1 == 5
    with pytest.raises(BadRow, match="rows run together"):
        manifest[2]
    assert said == [f"indexed {path}: 5 rows; 1 rows take several lines, row 3 the most, 5"]


def test_a_carriage_return_inside_a_row_makes_it_bad_and_one_between_rows_does_not(tmp_path):
    manifest = load(write(tmp_path, "wav,text\n0.wav,zero\n1.wav,one\rtwo\n2.wav,two\r3.wav,three\n4.wav,four\r\n"))
    assert len(manifest) == 6
    with pytest.raises(BadRow, match="carriage return"):
        manifest[1]
    with pytest.raises(BadRow, match="expected 2 columns"):
        manifest[2]
    assert [manifest[row]["text"] for row in (0, 3, 4, 5)] == ["zero", "two", "three", "four"]


BAD_CELLS = {
    "a field over the limit of the csv module": (
        "wav,text\n{}x.wav,good\n",
        "a.wav," + "red " * 35_000 + "\n",
        "field",
    ),
    "a row over 1 MiB": ("wav,text\n{}x.wav,good\n", "a.wav," + "red " * (1 << 19) + "\n", "longer than 1 MiB"),
    "a quoted row over 1 MiB": ("wav,text\n{}x.wav,good\n", 'a.wav,"' + "r\n" * (1 << 20) + '"\n', "longer than 1 MiB"),
    "jsonl: too long": ('{}{{"wav": "x", "text": "good"}}\n', '{"text": "' + "r" * (2 << 20) + '"}\n', "longer than 1"),
    "jsonl: nested": ('{}{{"wav": "x", "text": "good"}}\n', "[" * 100_000 + "]" * 100_000 + "\n", "nested too deeply"),
    "jsonl: digits": ('{}{{"wav": "x", "text": "good"}}\n', '{"a": ' + "9" * 5000 + "}\n", "4300 digits"),
    "jsonl: surrogate": ('{}{{"wav": "x", "text": "good"}}\n', '{"wav": "a", "text": "\\ud83d"}\n', "not valid JSON"),
    "jsonl: NaN": ('{}{{"wav": "x", "text": "good"}}\n', '{"wav": "a", "text": NaN}\n', "found NaN"),
    "jsonl: a list": ('{}{{"wav": "x", "text": "good"}}\n', "[1, 2]\n", "expected a JSON object"),
    "json: too long": (
        '[{} {{"wav": "x", "text": "good"}}]',
        '{"text": "' + "r" * (2 << 20) + '"},',
        "longer than 1 MiB",
    ),
    "json: nested": ('[{} {{"wav": "x", "text": "good"}}]', "[" * 100_000 + "]" * 100_000 + ",", "nested too deeply"),
    "json: digits": ('[{} {{"wav": "x", "text": "good"}}]', '{"a": ' + "9" * 5000 + "},", "4300 digits"),
    "json: surrogate": ('[{} {{"wav": "x", "text": "good"}}]', '{"text": "\\udead"},', "not valid JSON"),
    "json: a number": ('[{} {{"wav": "x", "text": "good"}}]', "7,", "expected a JSON object"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_one_row_that_cannot_be_read_leaves_the_others(tmp_path, name):
    text, bad, message = BAD_CELLS[name]
    kind, colon, _ = name.partition(":")
    manifest = load(write(tmp_path, text.format(bad), f"a.{kind if colon else 'csv'}"))
    assert len(manifest) == 2 and manifest[1]["text"] == "good"
    with pytest.raises(BadRow) as error:
        manifest[0]
    assert message in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 1000])
def test_the_elements_of_any_json_array(tmp_path, chunk_bytes):
    rng = random.Random(chunk_bytes)

    def value(depth: int):
        text = "".join(rng.choices('a"\\[]{},é\U0001f600', k=rng.randint(0, 5)))
        kinds = [lambda: text, lambda: rng.random(), lambda: None]
        if depth:
            kinds += [lambda: [value(depth - 1) for _ in range(rng.randint(0, 3))]] * 2
            kinds += [lambda: {f"{i}{text}": value(depth - 1) for i in range(rng.randint(0, 3))}] * 2
        return rng.choice(kinds)()

    for _ in range(300):
        rows = [value(3) for _ in range(rng.randint(0, 4))]
        text = json.dumps(rows, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        content = (rng.choice(["", "\ufeff", " \n"]) + text + rng.choice(["", "\n "])).encode()
        path = write(tmp_path, content, "a.json")
        chunks = (content[i : i + chunk_bytes] for i in range(0, len(content), chunk_bytes))
        records = [record for record in json_records(path, chunks) if not record.is_blank]
        assert [json.loads(record.data) for record in records] == rows
        assert all(content[record.start : record.end] == record.data for record in records)


GOOD_ELEMENT = '{"wav": "x", "text": "good"}'
NO_ARRAYS = {
    "two stray quotation marks": '[GOOD, {"wav": "5" x", "text": "a"}, GOOD, {"wav": "6" x", "text": "b"}, GOOD]',
    "two arrays": "[GOOD] [GOOD]",
    "text after it": "[GOOD] GOOD",
    "closed by another bracket": "[GOOD}",
    "no comma": "[GOOD, GOOD GOOD]",
    "never closed": "[GOOD, GOOD",
    "an opening alone": "[",
    "nothing": "",
    "a blank": " ",
}


@pytest.mark.parametrize("text", NO_ARRAYS.values(), ids=NO_ARRAYS.keys())
def test_what_is_no_json_array_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(UserError, match=r"a\.json") as error:
        load(write(tmp_path, text.replace("GOOD", GOOD_ELEMENT), "a.json"))
    assert "\n" not in str(error.value)


def test_jsonl_that_is_called_json_is_read_as_jsonl_and_told(tmp_path):
    said = []
    manifest = load(
        write(tmp_path, '\ufeff{"wav": "a", "text": "one"}\r{"wav": "b", "text": "two"}', "a.json"), log=said.append
    )
    assert [row["text"] for row in manifest] == ["one", "two"] and "read as JSONL" in said[-1]


def test_lines_are_counted_as_an_editor_does(tmp_path):
    path = write(tmp_path, "a\rb\r\nc\nd")
    assert [line_of(path, byte) for byte in (0, 1, 2, 3, 5, 6, 7)] == [1, 1, 2, 2, 3, 3, 4]


def test_utf16_is_named(tmp_path):
    for encoding in ("utf-16", "utf-16-le"):
        with pytest.raises(UserError, match="UTF-16"):
            load(write(tmp_path, "wav,text\n1.wav,one\n".encode(encoding)))


def test_blanks_after_the_commas_of_a_header_are_no_part_of_the_cells(tmp_path):
    assert load(write(tmp_path, "text, wav\n one , a.wav\n"))[0] == {"text": "one", "wav": "a.wav"}
    assert load(write(tmp_path, "text,wav\n one , a.wav\n", "b.csv"))[0] == {"text": " one ", "wav": " a.wav"}


def fake_run(**others) -> SimpleNamespace:
    lines: list[str] = []
    return SimpleNamespace(log=lines.append, lines=lines, **others)


def test_every_row_is_in_one_count(tmp_path):
    manifest = load(write(tmp_path, "wav,text\n" + "".join(f"{i}.wav,t\n" for i in range(10))))
    rows = np.arange(10)
    run = fake_run()
    kept = manifest.leave_out(rows[:8], rows[:8] < 2, "too long", run.log)
    assert run.lines == [f"{manifest.path}: 2 of 8 rows left out, too long: rows 1, 2"]
    account_for_rows(run, manifest, to_train_on=kept, held_out=rows[8:])
    assert run.lines[1] == (f"{manifest.path}: 10 rows = 6 to train on + 2 held out + 2 left out (2 too long)")
    for lost in (kept[1:], np.append(kept, 9)):
        with pytest.raises(AssertionError, match="in no count, or in two"):
            account_for_rows(run, manifest, to_train_on=lost, held_out=rows[8:])


# Whatever goes wrong while a row is read ------------------------------------------------------------------------------

KINDS = [
    ValueError, OSError, PermissionError, RecursionError, MemoryError, KeyError, IndexError, AssertionError, EOFError,
    ZeroDivisionError, OverflowError, RuntimeError, TypeError, AttributeError, NotImplementedError, StopIteration,
    csv.Error, ArithmeticError, LookupError, SystemError, UserError, type("PanicException", (BaseException,), {}),
]  # fmt: skip


class Raising(ManifestDataset):
    kind: type = ValueError

    def read(self, row: dict, rng) -> float:
        if row["text"] == "bad":
            raise self.kind("what was\x1b wrong\nand more")
        return float(row["text"])

    def collate(self, samples: list) -> dict:
        return {"values": samples, "n_targets": len(samples)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_exception_of_a_reader_is_the_rows(tmp_path, kind):
    manifest = load(write(tmp_path, "wav,text\nx,0\nx,bad\nx,2\n"))
    rows = Raising(manifest, np.arange(3), training=True)
    rows.kind = kind
    batch = rows.batch(np.arange(3), epoch=0)
    assert batch["values"] == [0, 2, 2] and list(batch["bad_rows"]) == [manifest.where(1)]
    (message,) = batch["bad_rows"].values()
    assert (
        message.startswith(f"{kind.__name__}: ")
        and "wrong" in message
        and "\n" not in message
        and "\x1b" not in message
    )
    read = lambda manifest, row: rows.read(manifest[row], None)  # noqa: E731
    assert measure(manifest, read, np.float32, desc="").tolist() == [0, 0, 2]
    assert read_some(manifest, np.arange(3), 3, lambda row: rows.read(row, None), lambda: None) == [0, 2]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Interrupted])
def test_a_wish_to_stop_is_no_rows(kind):
    with pytest.raises(kind), reading_row():
        raise kind


# Names of files -------------------------------------------------------------------------------------------------------


def test_names_are_found_as_other_systems_write_them(tmp_path):
    (tmp_path / "clips").mkdir()
    for form in ("NFC", "NFD"):
        (tmp_path / "clips" / unicodedata.normalize(form, f"café {form}.wav")).touch()
    manifest = load(write(tmp_path, "wav,text\nx,y\n"))
    for name in ("café NFC.wav", "café NFD.wav"):
        for form in ("NFC", "NFD"):
            for pattern in ("clips/{}", "clips\\{}", " clips/{} ", ".\\clips\\{}\t"):
                assert manifest.file({"wav": unicodedata.normalize(form, pattern.format(name))}, "wav").is_file()


def test_what_is_no_file_is_a_bad_row_and_says_what_is_there(tmp_path):
    (tmp_path / "Clips").mkdir()
    (tmp_path / "Clips" / "1.wav").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone.wav").symlink_to("elsewhere.wav")
    manifest = load(write(tmp_path, "wav,text\nx,y\n"))
    for name, message in {
        "Clips/1.WAV": 'there is "1.wav"',
        "clips/1.wav": 'there is "Clips"',
        "C:\\data\\1.wav": 'found none at "C:\\data\\1.wav"',
        "Clips": "found a folder",
        "loop": "symbolic links",
        "gone.wav": "found a link to none",
        "https://example.com/a.wav": 'found the address "https://example.com/a.wav": download it',
        "the transcript stands here " * 20: "File name too long",
        "a\x1b[31m.wav": "a\\x1b[31m.wav",
        "data:,": "",
    }.items():
        if name == "data:,":
            assert manifest.file({"wav": "data:audio/wav;base64,AAEC"}, "wav") == Inline(b"\0\1\2", "audio/wav")
            continue
        with pytest.raises(BadRow) as error:
            manifest.file({"wav": name}, "wav")
        assert message in str(error.value) and "\x1b" not in str(error.value) and len(str(error.value)) < 400


def test_no_spelling_of_a_name_leaves_the_root(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "out.png").touch()
    manifest = load(write(tmp_path, "wav,text\nx,y\n"))
    for name in ("../out.png", "..\\out.png", " ../out.png ", "a\\..\\..\\out.png"):
        with pytest.raises(BadRow, match="leaves the folder"):
            manifest.file({"wav": name}, "wav", str(tmp_path / "images"))


# The index ------------------------------------------------------------------------------------------------------------


def make_index(tmp_path: Path) -> tuple[Path, Path]:
    path = write(tmp_path, "wav,text\n" + "".join(f"{i}.wav,text {i}\n" for i in range(50)))
    return path, load(path).folder


DAMAGES = {
    "meta.json: {}": ("meta.json", lambda data: b"{}"),
    "meta.json: []": ("meta.json", lambda data: b"[]"),
    "meta.json: cut": ("meta.json", lambda data: data[:-9]),
    "spans.npy: cut": ("spans.npy", lambda data: data[:-40]),
    "spans.npy: empty": ("spans.npy", lambda data: b""),
    "keys.npy: gone": ("keys.npy", None),
    "keys.npy: a bit": ("keys.npy", lambda data: data[:150] + bytes([data[150] ^ 4]) + data[151:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_again_with_a_line(tmp_path, damage):
    path, folder = make_index(tmp_path)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    name, change = DAMAGES[damage]
    (folder / name).write_bytes(change(whole[name])) if change else (folder / name).unlink()
    said = []
    manifest = load(path, log=said.append)
    assert len(manifest) == 50 and manifest[49]["text"] == "text 49"
    assert len(said) == 2 and "making the index again" in said[0] and str(folder) in said[0]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_a_damaged_measurement_is_made_again_with_a_line(tmp_path):
    from contextlib import nullcontext

    path, folder = make_index(tmp_path)
    run = fake_run(is_main=True, main_process_first=nullcontext, check_stop=lambda: None)
    take = lambda: measure_rows(run, load(path), "length", lambda manifest, row: row, np.int64).tolist()  # noqa: E731
    assert take() == take() == list(range(50)) and run.lines == []
    os.truncate(folder / "length.npy", 300)
    assert take() == list(range(50)) and "measured again" in run.lines[0]


def test_an_array_is_what_was_written(tmp_path):
    for array in (np.arange(7), np.zeros((0, 2)), np.ones((3, 2), np.uint8)):
        save_array(tmp_path / "a.npy", array)
        assert np.array_equal(open_array(tmp_path / "a.npy"), array) and np.array_equal(
            np.load(tmp_path / "a.npy"), array
        )
        whole = (tmp_path / "a.npy").read_bytes()
        for at in range(len(whole)):
            (tmp_path / "b.npy").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ValueError):
                open_array(tmp_path / "b.npy")


def test_an_index_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path, folder = make_index(tmp_path)
    before = (folder / "meta.json").read_bytes()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(omni.data.index, "FolderLock", SimpleNamespace(wait_for=refuse))
    os.utime(path, (1, 1))
    assert len(load(path)) == 50, "the same bytes at another time"
    assert (folder / "meta.json").read_bytes() == before, "nothing is written there without the lock"
    path.write_text("wav,text\n1.wav,one\n")
    with pytest.raises(UserError, match=r"index-.*: Permission denied\. Set cache_dir"):
        load(path)


def _open_at_once(path: Path, start, results) -> None:
    start.wait()
    try:
        results.put(len(load(path)))
    except BaseException as error:
        results.put(repr(error))


def test_thirty_processes_open_a_touched_manifest_at_once(tmp_path):
    path, folder = make_index(tmp_path)
    os.utime(path, (1, 1))
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_open_at_once, args=(path, start, results)) for _ in range(30)]
    for process in processes:
        process.start()
    start.set()
    assert [results.get(timeout=200) for _ in processes] == [50] * 30
    for process in processes:
        process.join()
    assert json.loads((folder / "meta.json").read_text())["stat"]["mtime_ns"] == 1_000_000_000
    assert sorted(file.name for file in folder.iterdir()) == ["keys.npy", "meta.json", "spans.npy"]


def test_parse_refuses_what_is_longer_than_a_row_may_be():
    with pytest.raises(BadRow, match=f"longer than {MAX_ROW_BYTES >> 20} MiB"):
        Csv(header=["a"]).read(None, ["a"])


def test_every_kind_of_rows_is_read_in_the_one_place_that_names_what_goes_wrong():
    """Subclasses of ``ManifestDataset``, of all stages, say how one row is read; none of them says when."""
    root = Path(omni.data.manifest.__file__).parent.parent
    for path in root.rglob("*.py"):
        if not path.stem.startswith("web") and path.stem != "__init__":  # the page needs Gradio, and reads no rows
            importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
    kinds = [ManifestDataset]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert len(kinds) > 12 and all("_sample" not in vars(kind) for kind in kinds[1:])


def test_a_wish_to_wait_no_longer_is_no_fault_of_the_row():
    with pytest.raises(GivenUp), reading_row():
        raise GivenUp


def test_a_file_that_grows_while_it_is_indexed_is_one_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("wav,text\n" + "a.wav,red\n" * 50)

    def grow() -> None:
        if path.stat().st_size < 600:
            with open(path, "a") as file:
                file.write("b.wav,blue\n" * 20)

    with pytest.raises(UserError, match="changed while it was read"):
        load_manifest(path, ("wav", "text"), "text", log=lambda line: None, check_stop=grow)
