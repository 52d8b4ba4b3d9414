"""scripts/prepare_data.py against a server on this machine, with archives of the published layouts in miniature."""

import csv
import dataclasses
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from harness import ROOT, Process, kill_at, start, wait_until
from PIL import Image

from omni.common.errors import RunError
from omni.data.archives import Archive, unpack
from omni.data.transfer import Transfer

SCRIPT = ROOT / "scripts" / "prepare_data.py"

# --- archives ---------------------------------------------------------------------------------------------------------


def tar_bytes(files: dict[str, bytes], mode: str = "w:gz", links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return buffer.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def deb_bytes(files: dict[str, bytes], *, data: bytes | None = None) -> bytes:
    """A Debian package: an ar archive whose last member is a tar; ``data`` stands in the place of the tar."""
    data = tar_bytes({f"./{name}": content for name, content in files.items()}, "w:xz") if data is None else data
    package = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data)):
        package += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        package += b"\n" * (len(content) % 2)
    return package


def g722_bytes(frequency_hz: float, seconds: float) -> bytes:
    """A tone of amplitude 0.5, at 64 kbit/s."""
    tone = np.sin(2 * np.pi * frequency_hz * np.arange(int(16_000 * seconds)) / 16_000)
    frame = av.AudioFrame.from_ndarray((16_384 * tone).astype(np.int16)[None], format="s16", layout="mono")
    frame.sample_rate = 16_000
    encoder = av.CodecContext.create("g722", "w")
    encoder.sample_rate, encoder.layout, encoder.format = 16_000, "mono", "s16"
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def audio_bytes(seed: int, sample_rate: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(seed).normal(0, 0.1, sample_rate // 20), sample_rate, format=kind)
    return buffer.getvalue()


def librispeech(subset: str, chapters: list[str], utterances: int) -> dict[str, bytes]:
    """As published: the transcript stands behind the recordings of its chapter; the chapters are in no order."""
    files = {"LibriSpeech/README.TXT": b"not wanted"}
    for speaker, chapter in (chapter.split("-") for chapter in chapters):
        stem = f"LibriSpeech/{subset}/{speaker}/{chapter}/{speaker}-{chapter}"
        for i in reversed(range(utterances)):
            files[f"{stem}-{i:04}.flac"] = audio_bytes(i, 16000, "FLAC")
        lines = [f"{speaker}-{chapter}-{i:04} SENTENCE {i} OF, {chapter}\n" for i in range(utterances)]
        files[f"{stem}.trans.txt"] = "".join(lines).encode()
    return files


def captions_json(images: list[int]) -> bytes:
    return json.dumps(
        {
            "images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in images],
            "annotations": [
                {"image_id": i, "id": 10 * i + k, "caption": f" A “{i}”,\n again {k}. "} for k in (1, 0) for i in images
            ],
        }
    ).encode()


def questions_json(images: list[int]) -> bytes:
    """Two questions about each picture, the later one first."""
    return json.dumps(
        {
            "questions": [
                {"image_id": i, "question": f" Is it {i},\nor {k}? ", "question_id": 1000 * i + k}
                for k in (1, 0)
                for i in images
            ]
        }
    ).encode()


def answers_json(images: list[int]) -> bytes:
    """Eight people say yes and two no; about picture 77 nobody says anything."""
    people = [
        {"answer": "no" if n < 2 else " yes", "answer_confidence": "maybe", "answer_id": n + 1} for n in range(10)
    ]
    return json.dumps(
        {
            "annotations": [
                {
                    "image_id": i,
                    "question_id": 1000 * i + k,
                    "question_type": "is it",
                    "multiple_choice_answer": "" if i == 77 else "yes",
                    "answers": people,
                }
                for i in images
                for k in (0, 1)
            ]
        }
    ).encode()


def asked(image: int) -> list[list]:
    return [[f"Is it {image}, or {k}?", "yes", ["no", "no", *["yes"] * 8]] for k in (0, 1)]


def conversation(image: int) -> dict:
    turns = [{"from": "human", "value": f"<image>\nWhat is {image}?"}, {"from": "gpt", "value": f"It is {image}."}]
    return {"id": f"{image:012}", "image": f"{image:012}.jpg", "conversations": turns}


def photo_bytes(width: int, height: int) -> bytes:
    """White, with a black square of 10 pixels at (20, 10)."""
    photo = Image.new("RGB", (width, height), "white")
    photo.paste((0, 0, 0), (20, 10, 30, 20))
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def boxes_xml(photos: dict[str, list[tuple]]) -> bytes:
    """As published: x, y, width, height and word of each box."""
    images = "".join(
        f"<image>\n<imageName>img/{name}.jpg</imageName><address>1 Street</address><lex>A,B</lex>"
        '<Resolution x="60" y="40"/><taggedRectangles>'
        + "".join(
            f'<taggedRectangle height="{h}" width="{w}" x="{x}" y="{y}">\n<tag>{word}</tag></taggedRectangle>'
            for x, y, w, h, word in boxes
        )
        + "</taggedRectangles></image>"
        for name, boxes in photos.items()
    )
    return f'<?xml version="1.0" encoding="utf-8"?><tagset>{images}</tagset>'.encode()


ALLISON = "usr/share/asterisk/sounds/en_US_f_Allison"
PROMPTS = b"""; Core Asterisk Sounds in English

vm-intro: Leave your message  after the tone. (simple tone sound plays)
digits/1: one
letters/at: at [@]
beep: [this is a simple beep tone]
confbridge-join: <beep ascending>
silence/1: (1 second of silence)
spy-iax2: IAX (note: does not say "2")
dir-multi3: ... extension ...
priv-callpending: who introduces themselves as:
dictate/filename: followed by # or just # to exit, or *
gone: No recording.
"""
RECORDED = [
    "vm-intro", "digits/1", "letters/at", "beep", "confbridge-join", "silence/1", "spy-iax2", "dir-multi3",
    "priv-callpending", "dictate/filename",
]  # fmt: skip
TEXTS_DEB, SOUNDS_DEB = "asterisk-core-sounds-en_1.6.1-1_all.deb", "asterisk-core-sounds-en-g722_1.6.1-1_all.deb"
CONTENT = {
    "train-clean-100.tar.gz": librispeech("train-clean-100", ["26-495", "19-198", "19-227"], 3),
    "dev-clean.tar.gz": librispeech("dev-clean", ["84-121"], 2),
    "train-clean-5.tar.gz": librispeech("train-clean-5", ["19-198", "40-222"], 2),
    "dev-clean-2.tar.gz": librispeech("dev-clean-2", ["84-121"], 1),
    "LJSpeech-1.1.tar.bz2": {"LJSpeech-1.1/README": b"not wanted"}
    | {f"LJSpeech-1.1/wavs/LJ00{i}-0001.wav": audio_bytes(i, 22050, "WAV") for i in (3, 1, 2)}
    | {
        "LJSpeech-1.1/metadata.csv": "".join(
            f'LJ00{i}-0001|In 14{i}, "he" said|In fourteen {i}, "he" said\n' for i in (1, 2, 3)
        ).encode()
    },
    TEXTS_DEB: {
        "usr/share/doc/asterisk-core-sounds-en/changelog.gz": b"not wanted",
        "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz": gzip.compress(PROMPTS, mtime=0),
    },
    SOUNDS_DEB: {f"{ALLISON}/{name}.g722": g722_bytes(400 + 200 * i, 0.25) for i, name in enumerate(RECORDED)}
    | {"usr/share/doc/asterisk-core-sounds-en-g722/copyright": b"not wanted"},
    "annotations_trainval2017.zip": {
        "annotations/instances_train2017.json": b"not wanted",
        "annotations/captions_train2017.json": captions_json([9, 25, 30, 77]),
        "annotations/captions_val2017.json": captions_json([139]),
    },
    "train2017.zip": {f"train2017/{i:012}.jpg": b"picture %d" % i for i in (30, 9, 25)},
    "val2017.zip": {f"val2017/{139:012}.jpg": b"picture 139"},
    "mjsynth.tar.gz": {
        f"./mnt/ramdisk/max/90kDICT32px/{1 + i}/{i % 2}/{i}_Word{i}_{70 + i}.jpg": b"word %d" % i
        for i in (3, 0, 4, 1, 2)
    }
    | {"./mnt/ramdisk/max/90kDICT32px/annotation_train.txt": b"not wanted"},
    "v2_Questions_Train_mscoco.zip": {"v2_OpenEnded_mscoco_train2014_questions.json": questions_json([30, 500])},
    "v2_Questions_Val_mscoco.zip": {"v2_OpenEnded_mscoco_val2014_questions.json": questions_json([139, 9, 77])},
    "v2_Annotations_Train_mscoco.zip": {"v2_mscoco_train2014_annotations.json": answers_json([30, 500])},
    "v2_Annotations_Val_mscoco.zip": {"v2_mscoco_val2014_annotations.json": answers_json([9, 77, 139])},
    "llava_instruct_150k.json": json.dumps([conversation(i) for i in (30, 9, 30, 500)], indent=2).encode(),
    "svt.zip": {
        "svt1/train.xml": boxes_xml({"00_01": [(0, 0, 5, 5, "ONE")]}),
        "svt1/test.xml": boxes_xml(
            {
                "19_00": [(20, 10, 10, 10, "SQUARE"), (-5, 35, 20, 20, "EDGE"), (60, 0, 9, 9, "OUTSIDE")],
                "20_00": [(1, 1, 9, 9, "GONE")],
            }
        ),
        "svt1/img/00_01.jpg": photo_bytes(40, 30),
        "svt1/img/19_00.jpg": photo_bytes(60, 40),
        "svt1/readme.txt": b"not wanted",
    },
    "TinyStoriesV2-GPT4-train.txt": b"\nOnce.\n\nThe end.\n<|endoftext|>\nTwo\nlines<|endoftext|>\n\nThree.\n",
    "TinyStoriesV2-GPT4-valid.txt": b"Four.\n<|endoftext|>\n",
    "wikitext-103-raw-v1.zip": {
        "wikitext-103-raw/wiki.train.raw": b" \n = Title = \n \n A paragraph @-@ one . \n Two .\n",
        "wikitext-103-raw/wiki.valid.raw": b" \n Held out . \n",
        "wikitext-103-raw/wiki.test.raw": b"not wanted",
    },
    "Flickr8k_text.zip": {
        "Flickr8k.token.txt": b"1_a.jpg#0\tA dog .\n1_a.jpg#1\tOne dog .\n2_b.jpg#0\tA cat .\n3_c.jpg#0\tA cow .\n"
        b"4_gone.jpg#0\tNo picture .\n",
        "Flickr_8k.trainImages.txt": b"1_a.jpg\n4_gone.jpg\n",
        "Flickr_8k.devImages.txt": b"2_b.jpg\n",
        "__MACOSX/._Flickr8k.token.txt": b"not wanted",
    },
    "Flickr8k_Dataset.zip": {f"Flicker8k_Dataset/{name}.jpg": name.encode() for name in ("1_a", "2_b", "3_c")},
}


def pack(name: str, files: bytes | dict[str, bytes]) -> bytes:
    if isinstance(files, bytes):
        return files
    if name.endswith(".deb"):
        return deb_bytes(files)
    return zip_bytes(files) if name.endswith(".zip") else tar_bytes(files, f"w:{name.rpartition('.')[2]}")


ARCHIVES = {name: pack(name, files) for name, files in CONTENT.items()}

# --- the server -------------------------------------------------------------------------------------------------------


class Server:
    """Serves ``files`` with ranges and ETags; ``faults`` says what goes wrong, one entry a request.

    A fault is ``"cut"`` (half of the rest, then the connection closes), ``"stall"`` (half of the rest, then nothing
    until ``release``), ``"endless"`` (no length, zeros until the other side closes), ``"length ..."`` (that
    Content-Length), ``"moved ..."`` (to that address), an HTTP status, or None.
    """

    def __init__(self) -> None:
        self.files, self.etags = dict(ARCHIVES), {}
        self.faults, self.ranges, self.requests, self.sent = [], True, [], 0
        self.release = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request) -> None:
        if request.path.startswith("/moved/"):
            request.send_response(302)
            request.send_header("Location", request.path.removeprefix("/moved"))
            return request.end_headers()
        name, wanted = request.path.strip("/"), request.headers.get("Range")
        self.requests.append((name, wanted))
        fault = self.faults.pop(0) if self.faults else None
        if name not in self.files or isinstance(fault, int):
            return request.send_error(fault or 404)
        content = self.files[name]
        if str(fault).startswith("moved "):
            request.send_response(302)
            request.send_header("Location", fault.removeprefix("moved "))
            return request.end_headers()
        etag = self.etags.get(name) or f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if wanted and self.ranges and request.headers.get("If-Range") == etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(content)}")
                return request.end_headers()
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("ETag", etag)
        if str(fault).startswith("length "):
            request.send_header("Content-Length", fault.removeprefix("length "))
        elif fault != "endless":
            request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        if fault == "endless":
            return self._zeros(request)
        rest = content[start:] if fault is None else content[start : (start + len(content)) // 2]
        request.wfile.write(rest)
        request.wfile.flush()
        self.sent += len(rest)
        if fault == "stall":
            self.release.wait(20)

    def _zeros(self, request) -> None:
        try:
            while self.sent < 1 << 28:
                request.wfile.write(bytes(1 << 16))
                self.sent += 1 << 16
        except OSError:
            self.release.set()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.release.set()
    server.http.shutdown()
    server.http.server_close()


# --- running it -------------------------------------------------------------------------------------------------------


class Preparation:
    """The script in a folder of its own, with the server as mirror."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server, self.out = folder, server, folder / "data"
        # as in a private mirror: the archives in miniature have other digests than the published ones
        checksums = {name: hashlib.sha256(content).hexdigest() for name, content in ARCHIVES.items()}
        self.checksums = folder / "checksums.txt"
        self.checksums.write_text(
            "".join(f"{digest}  {name}\n" for name, digest in checksums.items() if "Flickr8k" not in name)
        )

    def start(self, *args: str, prelude: str = "") -> Process:
        argv = [str(SCRIPT), "--out", str(self.out), "--retry_wait", "0.01", "--checksums", str(self.checksums), *args]
        if "--from" not in args and "--mirror" not in args:
            argv += ["--mirror", self.server.url]
        return start(*argv, cwd=self.folder, env={"no_proxy": "127.0.0.1"}, prelude=prelude)

    def run(self, *args: str, prelude: str = "") -> Process:
        return self.start(*args, prelude=prelude).wait()

    def finish(self, *args: str) -> Process:
        result = self.run(*args)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    def fail(self, code: int, *args: str) -> str:
        """The one line with which it ends."""
        result = self.run(*args)
        assert result.returncode == code, result.stdout + result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    def files(self) -> dict[str, bytes]:
        """Everything below --out, apart from the records."""
        paths = [path for path in self.out.rglob("*") if path.is_file() and path.name not in (".lock", "made.json")]
        return {str(p.relative_to(self.out)): p.read_bytes() for p in paths if p.suffix not in (".files", ".sha256")}

    def publish(self, name: str, files: bytes | dict[str, bytes]) -> bytes:
        """Let the server have another archive, and its digest be known."""
        content = self.server.files[name] = pack(name, files)
        self.checksums.write_text(self.checksums.read_text() + f"{hashlib.sha256(content).hexdigest()}  {name}\n")
        return content

    def rows(self, name: str) -> list[dict[str, str]]:
        path = self.out / name
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def preparation(tmp_path, server):
    return Preparation(tmp_path, server)


def expected_librispeech() -> dict[str, bytes]:
    """What is on disk when train-clean-100 and dev-clean are prepared."""
    files = {}
    for archive, output in (("train-clean-100", "production_asr.csv"), ("dev-clean", "production_asr.val.csv")):
        content = {n: c for n, c in CONTENT[f"{archive}.tar.gz"].items() if "README" not in n}
        files |= {f"audio/{name}": data for name, data in content.items()}
        rows = ["wav,text"]
        for name in sorted(name for name in content if name.endswith(".flac")):
            _, chapter, i = Path(name).stem.split("-")
            rows.append(f'{name},"sentence {int(i)} of, {chapter}"')
        files[f"audio/{output}"] = "".join(f"{row}\n" for row in rows).encode()
    return files


def expected_asterisk() -> list[dict[str, str]]:
    texts = {
        "dictate/filename": "followed by pound or just pound to exit, or star",
        "digits/1": "one",
        "dir-multi3": "extension",
        "letters/at": "at",
        "priv-callpending": "who introduces themselves as:",
        "spy-iax2": "IAX",
        "vm-intro": "Leave your message after the tone.",
    }
    return [{"wav": f"en_US_f_Allison/{name}.wav", "text": text} for name, text in texts.items()]


# --- what is written --------------------------------------------------------------------------------------------------


def test_every_dataset_in_one_line_and_nothing_twice(preparation):
    line = ("tinystories", "librispeech", "ljspeech", "coco", "mjsynth")
    slow = "downloads/mjsynth.tar.gz"  # kept, as it takes a day to download
    preparation.finish(*line)
    files = preparation.files()
    assert {name: files[name] for name in files if "audio/" in name and "LJ" not in name and "tts" not in name} == (
        expected_librispeech()
    )
    assert files["text/production_corpus.txt"] == b"Once. The end.\nTwo lines\nThree.\n"
    assert files["text/production_corpus.val.txt"] == b"Four.\n"
    assert preparation.rows("audio/production_tts.csv") == [
        {"text": f'In fourteen {i}, "he" said', "wav": f"LJSpeech-1.1/wavs/LJ00{i}-0001.wav"} for i in (1, 2, 3)
    ]
    assert preparation.rows("images/production_annotations.json") == [
        {"image": f"train2017/{i:012}.jpg", "caption": f"A “{i}”, again {k}."} for i in (9, 25, 30) for k in (0, 1)
    ]
    assert len(preparation.rows("images/production_annotations.val.json")) == 2
    rows = [preparation.rows(f"ocr/production_ocr{side}.csv") for side in ("", ".val")]
    assert sorted((row for side in rows for row in side), key=lambda row: row["image"]) == [
        {"image": f"90kDICT32px/{1 + i}/{i % 2}/{i}_Word{i}_{70 + i}.jpg", "text": f"Word{i}"} for i in range(5)
    ]
    assert len(rows[0]) == 4
    for folder, manifest, column in (
        ("audio", "production_asr.csv", "wav"),
        ("audio", "production_tts.csv", "wav"),
        ("images", "production_annotations.json", "image"),
        ("ocr", "production_ocr.csv", "image"),
    ):
        for row in preparation.rows(f"{folder}/{manifest}"):
            assert f"{folder}/{row[column]}" in files
    assert not [name for name in files if "README" in name or b"not wanted" in files[name]]
    assert [name for name in files if name.startswith("downloads/")] == [slow], "archives stay on disk"

    requests = len(preparation.server.requests)
    before = {path: path.stat().st_mtime_ns for path in preparation.out.rglob("*") if path.name != "made.json"}
    preparation.finish(*line)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert len(preparation.server.requests) == requests
    assert {p for p in before if p.is_file() and before[p] != after[p]} == set()


def test_manifests_and_layouts_are_what_others_read(preparation):
    """omni.data.manifest opens the manifests, soundfile the recordings; torchaudio's readers find the same rows."""
    from torchaudio.datasets import LIBRISPEECH, LJSPEECH

    from omni.data.open_manifest import load_manifest

    preparation.finish("librispeech", "ljspeech", "coco")
    audio = preparation.out / "audio"
    for path, columns in (
        (audio / "production_asr.csv", ("wav", "text")),
        (audio / "production_tts.csv", ("text", "wav")),
        (preparation.out / "images/production_annotations.json", ("image", "caption")),
    ):
        manifest = load_manifest(path, columns, columns[-1], log=lambda line: None)
        assert [manifest[i] for i in range(len(manifest))] == preparation.rows(str(path.relative_to(preparation.out)))
        for i in range(len(manifest)):
            file = manifest.file(manifest[i], next(c for c in columns if c in ("wav", "image")), str(path.parent))
            assert path.suffix == ".json" or soundfile.info(file).frames > 0
    theirs = LIBRISPEECH(audio, "train-clean-100")
    metadata = [theirs.get_metadata(i) for i in range(len(theirs))]
    ours = preparation.rows("audio/production_asr.csv")
    assert sorted((row["wav"], row["text"]) for row in ours) == sorted(
        (f"LibriSpeech/train-clean-100/{Path(m[0]).relative_to('train-clean-100')}", m[2].lower()) for m in metadata
    )
    ours = {Path(row["wav"]).stem: row["text"] for row in preparation.rows("audio/production_tts.csv")}
    assert ours == {name: normalized for name, _, normalized in LJSPEECH(audio)._flist}


def test_small_datasets(preparation):
    preparation.finish("wikitext", "flickr8k")
    files = preparation.files()
    assert files["text/production_corpus.txt"] == b"= Title =\nA paragraph @-@ one .\nTwo .\n"
    assert files["text/production_corpus.val.txt"] == b"Held out .\n"
    assert preparation.rows("images/production_annotations.json") == [
        {"image": "Flicker8k_Dataset/1_a.jpg", "caption": "A dog ."},
        {"image": "Flicker8k_Dataset/1_a.jpg", "caption": "One dog ."},
    ]
    assert preparation.rows("images/production_annotations.val.json") == [
        {"image": "Flicker8k_Dataset/2_b.jpg", "caption": "A cat ."}
    ]


def test_asterisk(preparation):
    """Texts have no remarks, recordings have 16 kHz, and rows that are left out are counted."""
    printed = preparation.finish("asterisk").stdout
    assert "11 texts = 7 rows + 3 left out (no words) + 1 left out (recording not unpacked)" in printed
    assert preparation.rows("audio/asterisk.csv") == expected_asterisk()
    files = preparation.files()
    assert not [name for name in files if b"not wanted" in files[name] or name.startswith("downloads/")]
    for i, name in enumerate(RECORDED):
        samples, rate = soundfile.read(io.BytesIO(files[f"audio/en_US_f_Allison/{name}.wav"]))
        spectrum = np.abs(np.fft.rfft(samples))
        assert rate == 16_000 and samples.shape == (4_000,)
        assert np.argmax(spectrum) * rate / 4_000 == 400 + 200 * i
        assert 0.34 < np.std(samples[400:]) < 0.36  # that of a sine with amplitude 0.5

    requests = len(preparation.server.requests)
    preparation.finish("asterisk")
    assert len(preparation.server.requests) == requests and preparation.files() == files
    printed = preparation.finish("asterisk", "--limit", "4").stdout
    assert "11 texts = 3 rows + 1 left out (no words) + 7 left out (recording not unpacked)" in printed
    assert len(preparation.server.requests) == requests, "fewer recordings than are there were downloaded again"


def test_questions_about_pictures(preparation):
    """Questions of both splits of 2014 go where the split of 2017 has their picture; the others are counted."""
    printed = preparation.finish("coco", "vqa").stdout
    assert (
        "VQA v2: 10 questions = 4 about 2 pictures of train2017 + 2 about 1 pictures of val2017 "
        "+ 4 left out (picture not unpacked) + 0 left out (blank)"
    ) in printed

    def row(image: int, folder: str) -> dict:
        captions = [f"A “{image}”, again {k}." for k in (0, 1)]
        row = {"image": f"{folder}/{image:012}.jpg", "caption": captions[0], "captions": captions}
        return row | {"questions": asked(image)}

    train, held_out = [row(image, "train2017") for image in (9, 30)], [row(139, "val2017")]
    assert preparation.rows("images/production_vqa.json") == train
    assert preparation.rows("images/production_vqa.val.json") == held_out
    assert [name for name, _ in preparation.server.requests].count("train2017.zip") == 1, "pictures were fetched twice"

    from omni.data.open_manifest import load_manifest

    path = preparation.out / "images/production_vqa.json"
    manifest = load_manifest(path, ("image", "caption"), "image", log=lambda line: None)
    assert [manifest[i] for i in range(len(manifest))] == train
    preparation.publish("train2017.zip", CONTENT["train2017.zip"] | {"train2017/000000000077.jpg": b"picture 77"})
    (preparation.out / "images/train2017/000000000030.jpg").unlink()
    printed = preparation.finish("vqa").stdout
    assert "+ 2 left out (picture not unpacked) + 2 left out (blank)" in printed
    assert preparation.rows("images/production_vqa.json") == train


def test_conversations_about_pictures(preparation):
    from omni.data.conversations import read_conversation

    printed = preparation.finish("llava").stdout
    assert "4 conversations = 3 to train on + 0 held out + 1 left out (picture not unpacked)" in printed
    rows = preparation.rows("images/production_conversations.json")
    assert [row["image"] for row in rows] == [f"train2017/{i:012}.jpg" for i in (30, 9, 30)]
    assert all((preparation.out / "images" / row["image"]).exists() for row in rows)
    picture, question = {"type": "image", "image": rows[1]["image"]}, {"type": "text", "text": "What is 9?"}
    assert read_conversation(rows[1]) == [
        {"role": "user", "content": [picture, question]}, {"role": "assistant", "content": "It is 9."}
    ]  # fmt: skip
    assert preparation.rows("images/production_conversations.val.json") == []


def test_all_conversations_about_a_picture_are_on_one_side(tmp_path):
    script = load_script()
    numbers = [*range(3_000), *range(3_000)]
    (tmp_path / "llava_instruct_150k.json").write_text(json.dumps([conversation(i) for i in numbers]))
    names = [f"train2017/{i:012}.jpg" for i in range(3_000)]
    rows = script.llava_rows(tmp_path, {"train2017.zip": names})
    train, held_out = ([row["image"] for row in rows[f"production_conversations{x}.json"]] for x in ("", ".val"))
    assert len(train) + len(held_out) == 6_000 and 10 < len(held_out) < 60
    assert not set(train) & set(held_out)


def test_pictures_of_held_out_conversations_are_trained_on_nowhere(tmp_path, monkeypatch):
    """LLaVA's conversations are made of the captions."""
    script, numbers = load_script(), range(40)
    monkeypatch.setattr(script, "HELD_OUT", 0.5)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "vqa").mkdir()
    files = {
        "llava_instruct_150k.json": [conversation(i) for i in numbers],
        "annotations/captions_train2017.json": {
            "images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in numbers],
            "annotations": [{"image_id": i, "id": i, "caption": f"Picture {i}."} for i in numbers],
        },
    }
    for split, asked_about in (("train2014", numbers), ("val2014", ())):
        answers = [{"answer": "yes", "answer_confidence": "yes"}] * 10
        files |= {
            f"vqa/v2_mscoco_{split}_annotations.json": {
                "annotations": [
                    {"question_id": i, "multiple_choice_answer": "yes", "answers": answers} for i in asked_about
                ]
            },
            f"vqa/v2_OpenEnded_mscoco_{split}_questions.json": {
                "questions": [{"question_id": i, "image_id": i, "question": "Is it?"} for i in asked_about]
            },
        }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    items = {"train2017.zip": [f"train2017/{i:012}.jpg" for i in numbers]}
    rows = script.coco_rows(tmp_path, items) | script.vqa_rows(tmp_path, items) | script.llava_rows(tmp_path, items)
    seen = {name: {row["image"] for row in found} for name, found in rows.items()}
    held_out = seen["production_conversations.val.json"]
    assert 5 < len(held_out) < 35
    for name in ("production_annotations.json", "production_vqa.json", "production_conversations.json"):
        assert seen[name] == set(items["train2017.zip"]) - held_out


def test_words_of_photos(preparation):
    """Each box is cut out; one that reaches beyond its photo ends there, one outside of it is counted."""
    printed = preparation.finish("svt").stdout
    assert "4 words = 2 rows + 1 left out (outside of the photo) + 1 left out (photo not unpacked)" in printed
    assert preparation.rows("ocr/svt.csv") == [
        {"image": "svt_words/19_00_0.png", "text": "SQUARE"}, {"image": "svt_words/19_00_1.png", "text": "EDGE"}
    ]  # fmt: skip
    assert preparation.rows("ocr/svt.train.csv") == [{"image": "svt_words/00_01_0.png", "text": "ONE"}]
    square, edge = (Image.open(preparation.out / f"ocr/svt_words/19_00_{i}.png") for i in (0, 1))
    assert square.size == (10, 10) and np.asarray(square).mean() < 60
    assert edge.size == (15, 5) and np.asarray(edge).min() > 200
    before = {path: path.stat().st_mtime_ns for path in preparation.out.rglob("*.png")}
    preparation.finish("svt")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(preparation.server.requests) == 1


def test_a_limit_that_leaves_a_file_without_rows(preparation):
    assert "svt.csv: expected rows, found none. Raise --limit" in preparation.fail(1, "svt", "--limit", "1")
    assert not (preparation.out / "ocr/svt.csv").exists()
    preparation.finish("svt")


def test_words_are_held_out_whatever_their_case(tmp_path):
    script = load_script()
    words = [f"{word}{number}" for number in range(2_000) for word in ("Slinking", "slinking", "SLINKING")]
    names = [f"90kDICT32px/1/1/{i}_{word}_{i}.jpg" for i, word in enumerate(words)]
    for count in (6, len(names)):
        rows = script.mjsynth_rows(tmp_path, {"mjsynth.tar.gz": names[:count]})
        train, held_out = ([row["text"] for row in rows[f"production_ocr{x}.csv"]] for x in ("", ".val"))
        assert sorted(train + held_out) == sorted(words[:count]) and train and held_out
        assert not {word.lower() for word in train} & {word.lower() for word in held_out}
    assert 12 < len(held_out) < 60
    with pytest.raises(RunError, match="Raise --limit"):
        script.mjsynth_rows(tmp_path, {"mjsynth.tar.gz": names[:3]})


def test_another_subset_adds_its_rows(preparation):
    """Rows of what is there stay, whatever is chosen later; an utterance of two subsets has one row."""

    def speakers(side: str = "") -> list[str]:
        return [Path(row["wav"]).stem for row in preparation.rows(f"audio/production_asr{side}.csv")]

    preparation.finish("librispeech", "--subset", "train-clean-5", "--subset", "dev-clean-2")
    small = [f"{chapter}-000{i}" for chapter in ("19-198", "40-222") for i in (0, 1)]
    assert speakers() == small and speakers(".val") == ["84-121-0000"]
    printed = preparation.finish("librispeech", "--subset", "train-clean-100").stdout
    assert "train-clean-5.tar.gz: 4 files of an earlier run keep their rows" in printed
    both = [f"{chapter}-000{i}" for chapter in ("19-198", "19-227", "26-495") for i in range(3)] + small[2:]
    assert sorted(speakers()) == sorted(both), "a row is missing, or an utterance has two"
    assert speakers(".val") == ["84-121-0000"]
    before = (preparation.out / "audio/production_asr.csv").read_bytes()
    preparation.finish("librispeech", "--subset", "dev-clean")
    assert (preparation.out / "audio/production_asr.csv").read_bytes() == before
    assert speakers(".val") == ["84-121-0000", "84-121-0001"]
    (preparation.out / "audio/LibriSpeech/train-clean-5/40/222/40-222-0000.flac").unlink()
    printed = preparation.finish("librispeech").stdout
    assert "train-clean-5.tar.gz: files that an earlier run has unpacked are gone" in printed
    assert sorted(speakers()) == sorted(both[:9])


def test_a_subset_of_pictures_keeps_the_other(preparation):
    preparation.finish("coco", "--subset", "train2017", "--limit", "2")
    train = preparation.rows("images/production_annotations.json")
    preparation.finish("coco", "--subset", "val2017")
    assert preparation.rows("images/production_annotations.json") == train and len(train) == 4
    assert len(preparation.rows("images/production_annotations.val.json")) == 2


def test_limit(preparation):
    """The first N of the archive; fewer later cost nothing, more are fetched; leftovers of more are not in the rows."""
    line = ("librispeech", "--subset", "train-clean-100", "--limit")
    preparation.finish(*line, "2")
    in_order = [name for name in CONTENT["train-clean-100.tar.gz"] if name.endswith(".flac")]
    assert {row["wav"] for row in preparation.rows("audio/production_asr.csv")} == set(in_order[:2])
    assert not [name for name in preparation.files() if "/19/" in name], "read on after the limit"
    preparation.finish(*line, "5")
    assert {row["wav"] for row in preparation.rows("audio/production_asr.csv")} == set(in_order[:5])
    requests = len(preparation.server.requests)
    preparation.finish(*line, "3")
    assert {row["wav"] for row in preparation.rows("audio/production_asr.csv")} == set(in_order[:3])
    assert len(preparation.server.requests) == requests
    preparation.finish("tinystories", "--limit", "2")
    assert preparation.files()["text/production_corpus.txt"] == b"Once. The end.\nTwo lines\n"
    preparation.finish("coco", "--limit", "1")
    assert {row["image"] for row in preparation.rows("images/production_annotations.json")} == {
        "train2017/000000000030.jpg"
    }


# --- downloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults", [["cut"], ["cut", "cut", "cut"], [500, 503, None], [500, "cut", 500, "cut"]], ids=lambda f: str(f)
)
def test_a_bad_connection_costs_only_time(preparation, faults):
    preparation.server.faults = list(faults)
    preparation.finish("librispeech")
    assert preparation.files() == expected_librispeech()
    size = sum(len(ARCHIVES[name]) for name in ("train-clean-100.tar.gz", "dev-clean.tar.gz"))
    assert preparation.server.sent == size, "bytes were sent twice"


@pytest.mark.parametrize("reason", ["no ranges", "weak ETag"])
def test_a_server_that_cannot_go_on_in_mid_file(preparation, reason):
    preparation.server.ranges, preparation.server.faults = reason != "no ranges", ["cut", None]
    if reason == "weak ETag":  # promises no equal bytes
        preparation.server.etags["train-clean-100.tar.gz"] = 'W/"x"'
    preparation.finish("librispeech")
    assert preparation.files() == expected_librispeech()


def test_a_redirection_keeps_the_range(preparation):
    preparation.server.faults = ["cut"]
    preparation.finish("ljspeech", "--mirror", f"{preparation.server.url}/moved")
    assert preparation.server.sent == len(ARCHIVES["LJSpeech-1.1.tar.bz2"])
    assert len(preparation.rows("audio/production_tts.csv")) == 3


def test_a_file_that_changes_in_between_starts_anew(preparation):
    """Half of the old file and half of the new one would be neither."""
    name = "Flickr8k_text.zip"  # without a known checksum, so that nothing else would notice
    new = pack(name, CONTENT[name] | {"Flickr_8k.devImages.txt": b"3_c.jpg\n", "padding": bytes(500)})
    preparation.server.faults = ["stall"]
    process = preparation.start("flickr8k")
    wait_until(lambda: (preparation.out / f"downloads/{name}.part").stat().st_size > 0)
    process.kill()
    preparation.server.files[name] = new
    assert "starting over" in preparation.finish("flickr8k").stdout
    assert preparation.rows("images/production_annotations.val.json")[0]["image"] == "Flicker8k_Dataset/3_c.jpg"


def test_killed_between_the_last_byte_and_the_renaming(preparation):
    assert preparation.run("ljspeech", prelude=kill_at("os:replace", 1)).returncode == -9
    assert (preparation.out / "downloads/LJSpeech-1.1.tar.bz2.part").exists()
    preparation.finish("ljspeech")
    assert preparation.server.sent == len(ARCHIVES["LJSpeech-1.1.tar.bz2"])


def test_it_gives_up_with_one_line(preparation):
    preparation.server.faults = ["cut"] + [503] * 20
    line = preparation.fail(1, "ljspeech")
    assert "503" in line and "--mirror" in line
    sent, preparation.server.faults = preparation.server.sent, []
    preparation.finish("ljspeech")
    assert sent > 0 and preparation.server.sent == len(ARCHIVES["LJSpeech-1.1.tar.bz2"]), "what had arrived was lost"
    del preparation.server.files["wikitext-103-raw-v1.zip"]
    assert "404" in preparation.fail(1, "wikitext")


def test_a_wrong_checksum(preparation):
    good = ARCHIVES["dev-clean.tar.gz"]
    preparation.server.files["dev-clean.tar.gz"] = good[:50] + bytes([good[50] ^ 1]) + good[51:]
    line = preparation.fail(1, "librispeech")
    assert "dev-clean.tar.gz" in line and "expected sha256 " in line
    assert not (preparation.out / "audio/production_asr.csv").exists()
    assert (preparation.out / "downloads/dev-clean.tar.gz.damaged").exists()
    preparation.server.files["dev-clean.tar.gz"] = good
    preparation.finish("librispeech")
    assert expected_librispeech().items() <= preparation.files().items()


def test_without_a_published_checksum_the_first_download_sets_it(preparation):
    preparation.finish("flickr8k")
    name = "Flickr8k_text.zip"
    preparation.server.files[name] = pack(name, CONTENT[name] | {"new": b""})
    (preparation.out / "images/Flickr8k_text/Flickr8k.token.txt").unlink()  # so that it is needed again
    assert hashlib.sha256(ARCHIVES[name]).hexdigest() in preparation.fail(1, "flickr8k")


def test_another_size_than_published_is_refused_before_the_download(preparation):
    preparation.checksums.write_text("")  # the published sizes count again
    line = preparation.fail(1, "librispeech")
    assert "6,387,309,499" in line and preparation.server.requests == [("train-clean-100.tar.gz", None)]


# --- a slow server ----------------------------------------------------------------------------------------------------

WORDS = {  # pictures that do not compress
    f"./mnt/ramdisk/max/90kDICT32px/{1 + i}/1/{i}_Word{i}_7.jpg": random.Random(i).randbytes(5_000) for i in range(40)
}
FEW_BYTES = "import omni.data.download as download\ndownload._STEP_BYTES = 9_000\n"  # for each attempt


def part_of(preparation: Preparation) -> Path:
    return preparation.out / "downloads/mjsynth.tar.gz.part"


def words_of(preparation: Preparation) -> set[str]:
    return {row["text"] for side in ("", ".val") for row in preparation.rows(f"ocr/production_ocr{side}.csv")}


def test_of_a_slow_archive_only_the_wanted_part_is_downloaded(preparation):
    """It ends soon after the last wanted picture, is kept, and a larger limit goes on from there."""
    size = len(preparation.publish("mjsynth.tar.gz", WORDS))
    result = preparation.run("mjsynth", "--limit", "5", prelude=FEW_BYTES)
    assert result.returncode == 0, result.stderr
    assert "only the whole archive has a checksum" in result.stdout and "kept, so that" in result.stdout
    assert words_of(preparation) == {f"Word{i}" for i in range(5)}
    first = part_of(preparation).stat().st_size
    assert 25_000 < first < 40_000 and size > 200_000
    requests = len(preparation.server.requests)
    assert preparation.run("mjsynth", "--limit", "4", prelude=FEW_BYTES).returncode == 0
    assert len(preparation.server.requests) == requests and len(words_of(preparation)) == 4
    assert preparation.run("mjsynth", "--limit", "9", prelude=FEW_BYTES).returncode == 0
    assert words_of(preparation) == {f"Word{i}" for i in range(9)}
    assert preparation.server.requests[requests][1] == f"bytes={first}-"
    assert part_of(preparation).stat().st_size < 70_000


def test_of_a_slow_archive_that_is_cut_between_files_more_is_downloaded(preparation):
    """Then nothing looks wrong: a tar may end there."""
    preparation.publish("mjsynth.tar.gz", tar_bytes(WORDS, "w"))
    two_files = 2 * (512 + 5_120)
    result = preparation.run("mjsynth", "--limit", "5", prelude=FEW_BYTES.replace("9_000", str(two_files)))
    assert result.returncode == 0, result.stderr
    assert words_of(preparation) == {f"Word{i}" for i in range(5)}
    assert part_of(preparation).stat().st_size == 3 * two_files


def test_a_slow_download_is_killed_at_every_step(preparation):
    preparation.publish("mjsynth.tar.gz", WORDS)
    for count in itertools.count(1):
        result = preparation.run("mjsynth", "--limit", "5", prelude=FEW_BYTES + kill_at("os:replace", 2))
        if result.returncode == 0:
            break
        assert result.returncode == -9, result.stderr
        assert count < 40
    assert count > 3 and words_of(preparation) == {f"Word{i}" for i in range(5)}
    assert not list(preparation.out.rglob(".*.tmp"))


def test_a_slow_archive_with_other_content_is_compared_as_a_whole(preparation):
    """A beginning that cannot be unpacked is no reason to believe the rest."""
    preparation.server.files["mjsynth.tar.gz"] = pack("mjsynth.tar.gz", WORDS)[:50_000] + bytes(100_000)
    result = preparation.run("mjsynth", "--limit", "20", prelude=FEW_BYTES)
    assert result.returncode == 1 and "expected sha256" in result.stderr, result.stdout + result.stderr
    assert (preparation.out / "downloads/mjsynth.tar.gz.damaged").exists()
    assert not list(preparation.out.rglob("production_*"))


def test_a_slow_archive_from_a_folder(preparation, tmp_path):
    (tmp_path / "mjsynth.tar.gz").write_bytes(ARCHIVES["mjsynth.tar.gz"])
    preparation.finish("mjsynth", "--from", str(tmp_path), "--limit", "2")
    assert len(words_of(preparation)) == 2 and not preparation.server.requests
    assert (tmp_path / "mjsynth.tar.gz").exists()


def test_an_error_names_where_else_it_may_be_had(preparation):
    preparation.server.files.clear()
    for dataset, words in (
        ("mjsynth", "the torrent 3d0b4f09080703d2a9c6be50715b46389fdb3af1"),
        ("wikitext", "--mirror https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main"),
        ("librispeech", "--mirror https://us.openslr.org/resources/12"),
        ("coco", "--mirror https://s3.amazonaws.com/images.cocodataset.org/annotations"),
        ("ljspeech", "another server with --mirror, or give the folder of a copy with --from"),
    ):
        line = preparation.fail(1, dataset)
        assert "404" in line and words in line


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_a_plan_changes_nothing(preparation):
    line = ("tinystories", "librispeech", "ljspeech", "coco", "vqa", "llava", "mjsynth")
    printed = preparation.finish(*line, "--plan").stdout
    assert not preparation.out.exists() and not preparation.server.requests
    found = dict(re.findall(r"^(\w+): .*\n    (.*)$", printed, re.MULTILINE))
    assert found["librispeech"].startswith("6.73 GB to download, 11 minutes; 13.09 GB of disk while unpacking, 7.06 GB")
    assert found["vqa"].startswith("0.04 GB to download, less than a minute;"), "COCO's photos count twice"
    assert found["mjsynth"].startswith("1.15 GB to download, 3.2 hours at 0.1 MB/s")
    assert "for configs/audio_enc_tiny.json" in printed and "the torrent 3d0b4f0" in printed
    total = re.search(r"together: (\S+) GB to download; (\S+) GB of disk while unpacking, (\S+) GB in the end", printed)
    download, peak, kept = map(float, total.groups())
    assert 33 < download < 34 and 50 < peak < 54 and 38 < kept < 42


def test_a_plan_knows_what_is_there(preparation):
    preparation.finish("librispeech", "--subset", "dev-clean")
    printed = preparation.finish("librispeech", "--plan").stdout
    assert "librispeech: read English speech" in printed and "    6.39 GB to download" in printed
    printed = preparation.finish("librispeech", "--subset", "dev-clean", "--plan").stdout
    assert "    0.00 GB to download" in printed


def test_disk_is_said_before_anything_is_downloaded(preparation):
    preparation.server.files.clear()
    result = preparation.run("ljspeech")
    assert result.returncode == 1
    assert result.stdout.startswith("2.75 GB to download; 6.60 GB of disk while unpacking, 3.85 GB in the end; ")


def test_every_file_of_a_config_has_a_hint_that_names_its_data_set():
    from omni.train.config import PREPARED_BY

    script = load_script()
    written = {output for data in script.DATASETS.values() for archive in data.archives for output in archive.outputs}
    for output in written:
        if output.startswith("production_"):
            command, _, name = PREPARED_BY[output.partition(".")[0]].rpartition(" ")
            assert command == "python scripts/prepare_data.py"
            assert output in [one for archive in script.DATASETS[name].archives for one in archive.outputs]


def test_the_files_of_a_small_try_are_those_that_the_next_line_needs(preparation):
    lines = (ROOT / "README.md").read_text().splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("python scripts/prepare_data.py librispeech")]
    preparation.finish(*lines[first].partition("#")[0].split()[2:])
    config = json.loads((ROOT / re.search(r"configs/\w+\.json", lines[first + 1])[0]).read_text())
    for key in ("train_csv", "val_voices_csv"):
        assert preparation.rows(config[key].removeprefix("data/"))


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 75), (signal.SIGTERM, 75)])
def test_interrupted_in_mid_download(preparation, number, code):
    preparation.server.faults = ["stall"]
    process = preparation.start("librispeech")
    half = len(ARCHIVES["train-clean-100.tar.gz"]) // 2
    part = preparation.out / "downloads/train-clean-100.tar.gz.part"
    wait_until(lambda: part.stat().st_size == half)
    process.send(number)
    assert process.wait().returncode == code
    assert code != 75 or process.stderr == "interrupted. Run the same line again to go on\n"
    preparation.finish("librispeech")
    assert preparation.files() == expected_librispeech()
    assert preparation.server.requests[1] == ("train-clean-100.tar.gz", f"bytes={half}-")


def test_killed_at_every_renaming(preparation):
    """Every run gets one file further than the one before, and the end is the same."""
    for count in itertools.count(1):
        result = preparation.run("librispeech", "--subset", "dev-clean", prelude=kill_at("os:replace", 2))
        if result.returncode == 0:
            break
        assert result.returncode == -9, result.stderr
        assert count < 40
    assert count > 5
    expected = {name: content for name, content in expected_librispeech().items() if "train" not in name}
    assert preparation.files() == {name: content for name, content in expected.items() if not name.endswith("asr.csv")}
    assert preparation.server.sent == len(ARCHIVES["dev-clean.tar.gz"])


def test_killed_at_every_renaming_of_converted_files(preparation):
    """What is made of a file of an archive is as complete under its final name as what is copied."""
    for count in itertools.count(1):
        result = preparation.run("asterisk", prelude=kill_at("os:replace", 2))
        if result.returncode == 0:
            break
        assert result.returncode == -9, result.stderr
        assert count < 40
    assert count > 5
    assert preparation.rows("audio/asterisk.csv") == expected_asterisk()
    assert not list(preparation.out.rglob(".*.tmp"))
    assert preparation.server.sent == len(ARCHIVES[TEXTS_DEB]) + len(ARCHIVES[SOUNDS_DEB])


def test_killed_before_the_archive_is_deleted(preparation):
    kill = kill_at("pathlib:Path.unlink", 1)
    preparation.finish("ljspeech", "--keep_archives")
    before = preparation.files()
    assert preparation.run("ljspeech", prelude=kill).returncode == -9
    preparation.finish("ljspeech")
    assert before.keys() - preparation.files().keys() == {"downloads/LJSpeech-1.1.tar.bz2"}
    assert len(preparation.server.requests) == 1


def test_killed_before_the_files_are_safe_on_disk(preparation):
    assert preparation.run("coco", prelude=kill_at("os:sync", 2)).returncode == -9
    assert "train2017.zip.files" not in os.listdir(preparation.out / "downloads")
    assert len(os.listdir(preparation.out / "images/train2017")) == 3
    preparation.finish("coco")
    assert len(preparation.rows("images/production_annotations.json")) == 6


def test_one_process_at_a_time(preparation):
    preparation.server.faults = ["stall"]
    process = preparation.start("librispeech")
    wait_until(lambda: (preparation.out / "downloads/train-clean-100.tar.gz.part").exists())
    assert "another process" in preparation.fail(2, "librispeech")
    process.kill()


# --- archives that cannot be trusted, disks that are too small --------------------------------------------------------

SPEECH, IMAGES, RECORDINGS = CONTENT["dev-clean.tar.gz"], CONTENT["val2017.zip"], CONTENT[SOUNDS_DEB]
HOSTILE = {  # the first five hold all that is wanted, too
    "tar that leaves the folder": ("dev-clean.tar.gz", tar_bytes({"../../evil": b"x"} | SPEECH)),
    "tar with a link": ("dev-clean.tar.gz", tar_bytes(SPEECH, links={"LibriSpeech/tmp": "/tmp"})),
    "tar with a link inside": ("dev-clean.tar.gz", tar_bytes(SPEECH, links={"LibriSpeech/a": "dev-clean"})),
    "zip that leaves the folder": ("val2017.zip", zip_bytes({"val2017/../../../evil": b"x"} | IMAGES)),
    "zip with an absolute name": ("val2017.zip", zip_bytes({"/evil": b"x"} | IMAGES)),
    "truncated tar": ("dev-clean.tar.gz", ARCHIVES["dev-clean.tar.gz"][:-200]),
    "no zip at all": ("val2017.zip", b"<html>login</html>"),
    "nothing wanted in it": ("val2017.zip", zip_bytes({"readme": b"x"})),
    "deb with a link": (SOUNDS_DEB, deb_bytes({}, data=tar_bytes(CONTENT[SOUNDS_DEB], "w:xz", {f"{ALLISON}/a": "b"}))),
    "deb that leaves the folder": (SOUNDS_DEB, deb_bytes({f"{ALLISON}/../../../../../../evil": b"x"} | RECORDINGS)),
    "deb without recordings": (SOUNDS_DEB, deb_bytes({f"{ALLISON}/readme": b"x"})),
    "deb with an empty recording": (SOUNDS_DEB, deb_bytes(RECORDINGS | {f"{ALLISON}/beep.g722": b""})),
    "truncated deb": (SOUNDS_DEB, ARCHIVES[SOUNDS_DEB][:-200]),
    "recording without its text": (SOUNDS_DEB, deb_bytes(RECORDINGS | {f"{ALLISON}/new.g722": b"x"})),
    "transcript missing": ("dev-clean.tar.gz", tar_bytes({"LibriSpeech/dev-clean/1/2/1-2-0000.flac": b"x"})),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_broken_archives(preparation, case):
    name, content = HOSTILE[case]
    preparation.server.files[name] = content
    preparation.checksums.write_text(
        preparation.checksums.read_text() + f"{hashlib.sha256(content).hexdigest()}  {name}\n"
    )
    dataset = "asterisk" if name == SOUNDS_DEB else "librispeech" if "dev" in name else "coco"
    line = preparation.fail(1, dataset, *(() if dataset == "asterisk" else ("--subset", name.partition(".")[0])))
    assert (name if case != "recording without its text" else "en_US_f_Allison/new.wav: expected") in line
    assert not list(preparation.folder.rglob("evil")) and not list(preparation.folder.parent.glob("evil"))
    assert not list(preparation.out.rglob("production_*")) and not list(preparation.out.rglob("asterisk.csv"))


def zip_with(change) -> bytes:
    """An archive with the wanted picture, whose members' headers are changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in IMAGES.items():
            archive.writestr(name, content)
    data = bytearray(buffer.getvalue())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        change(data, data.index(signature) + at)  # where flags and method stand
    return bytes(data)


def encrypted(data: bytearray, at: int) -> None:
    data[at] |= 1


def of_unknown_method(data: bytearray, at: int) -> None:
    data[at + 2] = 77


PICTURES = Archive("val2017.zip", "", None, "", r"(val2017/\d+\.jpg)", count=5)
TALKS = Archive(
    "dev.tar.gz", "", None, "", r"(LibriSpeech/\S+\.flac)", extras=r"(LibriSpeech/\S+\.txt)", count=9, growth=1.05
)


def unpacked_or_refused(archive: Archive, data: bytes, folder: Path) -> str | None:
    """One line, or None; either way nothing lies outside of the folder."""
    source, target = folder / archive.name, folder / "into"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    source.write_bytes(data)
    try:
        unpack(archive, source, target, None)
        line = None
    except RunError as error:
        line = str(error)
        assert archive.name in line and "\n" not in line
    assert set(os.listdir(folder)) == {archive.name, "into"}
    return line


@pytest.mark.parametrize("change", [encrypted, of_unknown_method])
def test_a_zip_that_cannot_be_read(tmp_path, change):
    assert "damaged, or not the file" in unpacked_or_refused(PICTURES, zip_with(change), tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"!<arch>", b"<html>!", "expected a Debian package"),
        (b"data.tar", b"more.tar", "expected data.tar"),
        (b"4         `", b"-60       `", "expected the header"),
        (b"4         `", b"9999999999`", "truncated"),
    ],
    ids=["no package", "no data", "a size below zero", "a size beyond the file"],
)
def test_a_package_that_cannot_be_read(tmp_path, old, new, words):
    archive, good = dataclasses.replace(TALKS, name="dev.deb"), deb_bytes(SPEECH)
    assert unpacked_or_refused(archive, good, tmp_path) is None
    assert words in unpacked_or_refused(archive, good.replace(old, new), tmp_path)


def test_a_bomb_is_stopped(tmp_path):
    """However it is packed, in one member or in many, wanted or not: nothing grows beyond what the catalogue says."""
    zeros = bytes(60 << 20)
    one = io.BytesIO()
    with zipfile.ZipFile(one, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("val2017/1.jpg", zeros)
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(12):
            archive.writestr(f"val2017/{number}.jpg", zeros[: 5 << 20])
    for data in (one.getvalue(), many.getvalue()):
        assert len(data) < 100_000
        assert "far more" in unpacked_or_refused(PICTURES, data, tmp_path)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 20 << 20
    for name in ("LibriSpeech/a.flac", "LibriSpeech/unwanted"):
        (tmp_path / PICTURES.name).unlink(missing_ok=True)
        bomb = tar_bytes(SPEECH | {name: zeros})
        assert "far more" in unpacked_or_refused(TALKS, bomb, tmp_path)
    (tmp_path / TALKS.name).unlink()
    assert "more than 10 files" in unpacked_or_refused(
        PICTURES, zip_bytes({f"val2017/{number}.jpg": b"" for number in range(50)}), tmp_path
    )


@pytest.mark.parametrize("kind", ["zip", "deflated zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "deb"])
def test_damaged_archives_are_refused_in_one_line(tmp_path, kind):
    rng = random.Random(kind)
    if "zip" in kind:
        archive, good = PICTURES, zip_with(lambda *_: None) if kind != "zip" else zip_bytes(IMAGES)
    else:
        small = {name: content[:700] for name, content in SPEECH.items()}
        good = deb_bytes(small) if kind == "deb" else tar_bytes(small, f"w:{kind.partition('.')[2]}")
        archive = dataclasses.replace(TALKS, name=f"dev.{kind}")
    assert unpacked_or_refused(archive, good, tmp_path) is None
    refused = 0
    for _ in range(80):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        refused += unpacked_or_refused(archive, bytes(data), tmp_path) is not None
    assert refused


def load_script():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    prepare_data = importlib.util.module_from_spec(spec)
    sys.modules["prepare_data"] = prepare_data
    spec.loader.exec_module(prepare_data)
    return prepare_data


TEXTS = {
    "librispeech": ("dev-clean.tar.gz", "LibriSpeech/dev-clean/84/121/84-121.trans.txt"),
    "ljspeech": ("LJSpeech-1.1.tar.bz2", "LJSpeech-1.1/metadata.csv"),
    "asterisk": (SOUNDS_DEB, "en_US_f_Allison/core-sounds-en.txt.gz"),
    "coco": ("val2017.zip", "annotations/captions_val2017.json"),
    "flickr8k": ("Flickr8k_Dataset.zip", "Flickr8k_text/Flickr8k.token.txt"),
    "vqa": ("train2017.zip", "vqa/v2_mscoco_train2014_annotations.json"),
    "llava": ("train2017.zip", "llava_instruct_150k.json"),
    "svt": ("svt.zip", "svt1/test.xml"),
}


@pytest.mark.parametrize("dataset", TEXTS)
def test_texts_that_are_not_as_published(tmp_path, dataset):
    """Whatever a damaged text holds: rows, or one line that names it."""
    script, rng = load_script(), random.Random(dataset)
    archive, text = TEXTS[dataset]
    contents = CONTENT[archive] | CONTENT["annotations_trainval2017.zip"]
    contents |= {f"Flickr8k_text/{name}": content for name, content in CONTENT["Flickr8k_text.zip"].items()}
    contents |= {f"en_US_f_Allison/{Path(name).name}": content for name, content in CONTENT[TEXTS_DEB].items()}
    for name in (name for name in CONTENT if name.startswith("v2_")):
        contents |= {f"vqa/{file}": content for file, content in CONTENT[name].items()}
    contents["llava_instruct_150k.json"] = CONTENT["llava_instruct_150k.json"]
    names = [name for name in CONTENT[archive] if Path(name).suffix in (".flac", ".wav", ".jpg")]
    names += [f"en_US_f_Allison/{name}.wav" for name in RECORDED if archive == SOUNDS_DEB]
    for name, content in contents.items():
        if Path(name).suffix in (".txt", ".csv", ".json", ".gz", ".xml") or dataset == "svt":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)

    def prepare() -> str | None:
        try:
            for output, rows in script.DATASETS[dataset].rows(tmp_path, {archive: names}).items():
                (script.write_csv if output.endswith(".csv") else script.write_json)(io.BytesIO(), rows)
        except RunError as error:
            assert "\n" not in str(error)
            return str(error)

    good = (tmp_path / text).read_bytes()
    assert prepare() is None
    refused = 0
    cuts = [good[:end] for end in range(0, len(good), 7)]
    for damaged in [*cuts, b"\xff" + good, b"{}", b"[[]]", b'{"images": 3}', b"a"]:
        (tmp_path / text).write_bytes(damaged)
        refused += prepare() is not None
    for _ in range(100):
        damaged = bytearray(good)
        for _ in range(3):
            damaged[rng.randrange(len(good))] = rng.randrange(256)
        (tmp_path / text).write_bytes(damaged)
        refused += prepare() is not None
    assert refused > 20
    (tmp_path / text).write_bytes(b"\xff" + good)
    assert dataset == "ljspeech" or text in prepare()


def transfer(server: Server, path: Path, size: int | None, most_bytes: int) -> str:
    with pytest.raises(RunError) as failure:
        Transfer(f"{server.url}/{path.name}", path, size, most_bytes, lambda size: 0, 0.01).run()
    assert "\n" not in str(failure.value) and not path.exists()
    return str(failure.value)


@pytest.mark.parametrize("size", [100_000, None])
def test_a_download_stops_at_the_published_size(server, tmp_path, size, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.faults = ["endless"]
    path = tmp_path / "val2017.zip"
    assert "expected 100,000 bytes at most" in transfer(server, path, size, 100_000)
    assert server.release.wait(20), "the server goes on sending"
    assert server.sent < 1 << 26 and path.with_name("val2017.zip.part").stat().st_size == 0


def test_answers_that_make_no_sense(server, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = tmp_path / "val2017.zip"
    for length in ("many", "-5", "9" * 30, "1e3", "0x10"):
        server.faults = [f"length {length}"]
        assert "Content-Length" in transfer(server, path, None, 1000)
    server.faults = [f"length {10**15}"]
    assert "at most 1,000 bytes" in transfer(server, path, None, 1000)
    for address in ("http://[", "nowhere:x", "http://" + "a." * 300, "file:///etc/passwd"):
        server.faults = [f"moved {address}"] * 20
        transfer(server, path, None, 1000)


RECORDS = ["made.json", "dev-clean.tar.gz.files"]


@pytest.mark.parametrize("name", RECORDS)
def test_damaged_records_are_no_tracebacks(preparation, name):
    line = ("librispeech", "--subset", "dev-clean")
    preparation.finish(*line)
    record = preparation.out / "downloads" / name
    good = record.read_bytes()
    for damaged in (b"{}", b"[" * 100_000 + b"\xff", good[: len(good) // 2]):
        record.write_bytes(damaged)
        if name == "made.json":
            assert "was not made by this script" in preparation.fail(2, *line)
        preparation.finish(*line, "--force")
        assert preparation.files().keys() == {name for name in expected_librispeech() if "dev-clean" in name} | {
            "audio/production_asr.val.csv"
        }
    preparation.finish(*line)


def test_records_of_an_earlier_version_are_read(preparation):
    line = ("librispeech", "--subset", "dev-clean")
    preparation.finish(*line)
    for name in RECORDS:
        record = preparation.out / "downloads" / name
        value = {key: value for key, value in json.loads(record.read_bytes()).items() if key != "seal"}
        record.write_text(json.dumps(value.get("files", value)))
    requests = len(preparation.server.requests)
    preparation.finish(*line)
    assert len(preparation.server.requests) == requests


def test_too_little_disk_is_known_before_the_download(preparation, monkeypatch):
    prepare_data = load_script()
    argv = ["--out", str(preparation.out), "--mirror", preparation.server.url, "librispeech", "--subset", "dev-clean"]
    argv += ["--checksums", str(preparation.checksums)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *argv])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    size = len(ARCHIVES["dev-clean.tar.gz"])
    usage = shutil.disk_usage(preparation.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size))
    with pytest.raises(RunError, match="of free disk, found"):
        prepare_data.main()
    assert preparation.files().keys() == {
        "downloads/dev-clean.tar.gz.part", "downloads/dev-clean.tar.gz.part.validator"
    }  # fmt: skip
    assert preparation.files()["downloads/dev-clean.tar.gz.part"] == b""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * size))
    prepare_data.main()


# --- arguments --------------------------------------------------------------------------------------------------------


def unpacked(folder: Path, *names: str) -> Path:
    for name in names:
        for member, content in CONTENT[name].items():
            path = folder / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


def test_from_archives(preparation, tmp_path):
    for name in ("train-clean-100.tar.gz", "dev-clean.tar.gz"):
        (tmp_path / name).write_bytes(ARCHIVES[name])
    preparation.finish("librispeech", "--from", str(tmp_path))
    assert preparation.files() == expected_librispeech() and not preparation.server.requests
    assert (tmp_path / "dev-clean.tar.gz").exists(), "the user's file was deleted"
    downloads = preparation.out / "downloads"  # those that somebody put there by hand are as much theirs
    (downloads / "LJSpeech-1.1.tar.bz2").write_bytes(ARCHIVES["LJSpeech-1.1.tar.bz2"])
    preparation.finish("ljspeech", "--from", str(downloads))
    assert (downloads / "LJSpeech-1.1.tar.bz2").exists()


def test_from_text_in_either_form(preparation, tmp_path):
    unpacked(tmp_path, "wikitext-103-raw-v1.zip")
    preparation.finish("wikitext", "--from", str(tmp_path))
    assert preparation.files()["text/production_corpus.txt"] == b"= Title =\nA paragraph @-@ one .\nTwo .\n"
    for split in ("train", "valid"):
        name = f"TinyStoriesV2-GPT4-{split}.txt"
        (tmp_path / name).write_bytes(ARCHIVES[name])
    preparation.finish("tinystories", "--from", str(tmp_path))
    assert preparation.files()["text/production_corpus.txt"] == b"Once. The end.\nTwo lines\nThree.\n"
    assert not preparation.server.requests


def test_from_a_damaged_archive(preparation, tmp_path):
    (tmp_path / "LJSpeech-1.1.tar.bz2").write_bytes(ARCHIVES["LJSpeech-1.1.tar.bz2"][:-1])
    assert "expected sha256" in preparation.fail(2, "ljspeech", "--from", str(tmp_path))
    assert (tmp_path / "LJSpeech-1.1.tar.bz2").exists()


def test_from_unpacked_folders(preparation, tmp_path):
    place = unpacked(tmp_path / "mine", "train-clean-100.tar.gz", "dev-clean.tar.gz")
    preparation.finish("librispeech", "--from", str(place))
    assert preparation.files() == expected_librispeech() and not preparation.server.requests
    name = "LibriSpeech/dev-clean/84/121/84-121-0000.flac"
    assert (place / name).samefile(preparation.out / "audio" / name), "copied, though one disk holds both"


def test_from_unpacked_packages(preparation, tmp_path):
    """As ``dpkg-deb -x`` and an installation place their files."""
    place = unpacked(tmp_path / "mine", TEXTS_DEB, SOUNDS_DEB)
    preparation.finish("asterisk", "--from", str(place))
    assert preparation.rows("audio/asterisk.csv") == expected_asterisk() and not preparation.server.requests


def test_from_the_very_folder_it_writes_to(preparation):
    place = unpacked(preparation.out / "audio", "train-clean-100.tar.gz", "dev-clean.tar.gz")
    preparation.finish("librispeech", "--from", str(place))
    assert preparation.files() == expected_librispeech() | {"audio/LibriSpeech/README.TXT": b"not wanted"}


def test_from_names_what_is_missing(preparation, tmp_path):
    (tmp_path / "dev-clean.tar.gz").write_bytes(ARCHIVES["dev-clean.tar.gz"])
    line = preparation.fail(2, "librispeech", "tinystories", "--from", str(tmp_path))
    assert "train-clean-100.tar.gz" in line and "LibriSpeech/train-clean-100/" in line
    assert "TinyStoriesV2-GPT4-train.txt" in line and "dev-clean" not in line


def test_a_file_of_the_user_is_not_overwritten(preparation):
    mine = preparation.out / "audio/production_tts.csv"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert "--force" in preparation.fail(2, "ljspeech")
    assert mine.read_text() == "mine" and not preparation.server.requests
    preparation.finish("ljspeech", "--force")
    assert len(preparation.rows("audio/production_tts.csv")) == 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("coco", "flickr8k"), "both write"),
        (("librispeech", "--subset", "train-clean"), "train-clean-100"),
        (("ljspeech", "--subset", "dev-clean"), "expected none"),
        (("ljspeech", "--from", "nowhere"), "expected a folder"),
        (("ljspeech", "--checksums", "nowhere"), "nowhere"),
        (("ljspeech", "--mirror", "mirror.example.org"), "http://"),
        (("ljspeech", "--plan", "--out", __file__), "expected a folder, found a file"),
        (("nothing",), "invalid choice"),
    ],
)
def test_bad_arguments(preparation, args, words):
    assert words in preparation.fail(2, *args)
    assert not preparation.out.exists()


def test_archives_are_kept_on_request(preparation):
    preparation.finish("ljspeech", "--keep_archives")
    assert preparation.files()["downloads/LJSpeech-1.1.tar.bz2"] == ARCHIVES["LJSpeech-1.1.tar.bz2"]
