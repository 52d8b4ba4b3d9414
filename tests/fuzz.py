"""Damages and reads thousands of files: each must give an answer, a bad row or a one-line error.

    python tests/fuzz.py --count 20000 --page docs/reliability.md     all kinds, in turn: some minutes on 2 cores
    python tests/fuzz.py --only films --seed 7 --keep findings        one kind; the files of findings are kept
    python tests/fuzz.py --only films --seed 7 --case 1234            one case again, with its traceback

A case is a pure function of (seed, kind, number). A forked process runs some of them, under a limit of memory and time,
so a library's crash is a finding like any other, and the remaining cases still run.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import av
import numpy as np
import soundfile
import torch
from PIL import Image
from reliability import ROOT, commit, machine, write_part
from stages import make_mix, write_csv

import export
from omni.common.errors import BadRow, RunError, UserError
from omni.data.archives import Archive, unpack
from omni.data.audio import audio_length, load_audio
from omni.data.images import load_image
from omni.data.lines import read_chunks, split_samples
from omni.data.open_manifest import load_manifest
from omni.data.tokenizer import Tokenizer
from omni.data.video import load_frames
from omni.export.bundle import Export
from omni.export.folder import INFO, info_sha256
from omni.models.ctc import CtcTokenizer
from omni.stages import STAGES
from omni.stages.audio_encoder import AudioEncoderConfig
from omni.stages.ocr import OcrConfig
from omni.stages.text import TextConfig
from omni.stages.vision import VisionConfig
from omni.stages.vocoder import VocoderConfig
from omni.train import checkpoint
from omni.train.config import load_config
from omni.train.stage import load

SECONDS = 20  # for one case
ADDRESS_SPACE = 4 << 30  # beyond what the process has at its beginning
RESIDENT = 2 << 30  # growth of memory in one case
CHUNK = 100  # cases of a process
OUTCOMES = ("good", "bad row", "one line", "finding")


@dataclass(frozen=True)
class Kind:
    """Files of one kind and their reader."""

    make: Callable[[Path], None]  # writes small good files into a folder
    read: Callable[[Path], None]  # reads one of them; an assertion that fails is a finding
    only: Callable[[Path], bool] = lambda path: True  # the files that are damaged
    reseal: Callable[[Path], None] | None = None  # makes checksums valid again, for damage that the writer made


# ---------------------------------------------------------------------------------------------------------------
# The kinds


def make_manifests(folder: Path) -> None:
    rows = [{"wav": f"{i}.wav", "text": f'Größe {i}, "quoted"\nand more', "n": str(i)} for i in range(12)]
    write_csv(folder / "a.csv", rows)
    (folder / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_manifest(path: Path) -> None:
    bad = None
    with tempfile.TemporaryDirectory() as cache:
        manifest = load_manifest(path, ("wav", "text"), "text", cache_dir=cache, log=lambda line: None)
        for row in range(len(manifest)):
            try:
                fields = manifest[row]
                assert all(isinstance(fields[name], str) and fields[name].strip() for name in ("wav", "text"))
            except BadRow as error:
                bad = error
    if bad is not None:
        raise bad


def make_texts(folder: Path) -> None:
    lines = "".join(f"Line {i} says café № {i} — 漢字 and more words.\r\n" for i in range(40))
    (folder / "a.txt").write_text(lines, encoding="utf-8")
    (folder / "long.txt").write_text("word " * 30_000 + "\n" + lines, encoding="utf-8")


def read_texts(path: Path) -> None:
    row = 1
    for chunk in read_chunks(path):
        for sample in split_samples(chunk, path, row):
            assert sample.decode("utf-8").strip()
        row += chunk.count(b"\n")


CONFIGS = {
    "thinker": TextConfig, "audio_enc": AudioEncoderConfig, "vision": VisionConfig, "vocoder": VocoderConfig,
    "ocr": OcrConfig,
}  # fmt: skip


def make_configs(folder: Path) -> None:
    for name in CONFIGS:
        config = json.loads((ROOT / "configs" / f"{name}_tiny.json").read_text(encoding="utf-8"))
        config = {key: value for key, value in config.items() if not key.endswith("_ckpt") and "thinker" not in key}
        for key, value in config.items():  # its files are not there
            if isinstance(value, str) and "/" in value:
                config[key] = "configs" if key.endswith(("_dir", "_root")) else "README.md"
        (folder / f"{name}_tiny.json").write_text(json.dumps(config, indent=2))


def read_config(path: Path) -> None:
    load_config(CONFIGS[path.stem.removesuffix("_tiny")], str(path))


def make_recordings(folder: Path) -> None:
    rng = np.random.default_rng(3)
    samples = (0.3 * np.sin(np.arange(4000) * 0.1) + 0.02 * rng.standard_normal(4000)).astype(np.float32)
    for name in ("a.wav", "a.flac", "a.mp3", "a.ogg"):
        soundfile.write(folder / name, samples, 16_000)
    soundfile.write(folder / "float.wav", np.stack((samples, -samples), axis=1), 8_000, subtype="FLOAT")
    for name, codec, rate in (("a.m4a", "aac", 16_000), ("a.webm", "libopus", 48_000)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            frame = av.AudioFrame.from_ndarray(np.tile(samples, 3)[None], format="flt", layout="mono")
            frame.sample_rate = rate
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)


def read_recording(path: Path) -> None:
    samples = load_audio(path, 16_000, 60.0)
    assert samples.ndim == 1 and samples.dtype == np.float32 and len(samples) and np.isfinite(samples).all()
    assert 0 < audio_length(path)[0] < 1e12


def make_pictures(folder: Path) -> None:
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    pixels[5:15] = 200
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.bmp"):
        Image.fromarray(pixels).save(folder / name)
    Image.fromarray(pixels).convert("RGBA").save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.fromarray(pixels).save(folder / "turned.jpg", exif=exif)


def read_picture(path: Path) -> None:
    image = load_image(path, 16, 16)
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8


def make_films(folder: Path) -> None:
    frames = [Image.new("RGB", (32, 24), (20 * i, 0, 200)) for i in range(8)]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    for name, codec in (
        ("a.mp4", "libx264"), ("a.mkv", "libvpx"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.ts", "libx264"),
    ):  # fmt: skip
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=Fraction(10))
            stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())


def read_film(path: Path) -> None:
    frames, total = load_frames(path, 4, 16, 16)
    assert 1 <= len(frames) <= 4 and total >= 1 and frames.shape[1:] == (3, 16, 16)


def make_tokenizers(folder: Path) -> None:
    words = ["one two three", "red green blue", "größer und kleiner", "a cat runs near"]
    Tokenizer.train(iter(words), 300).save(folder / "tokenizer.json")
    CtcTokenizer.train(iter(words), 40).save(folder / "ctc.json")


def read_tokenizer(path: Path) -> None:
    tokenizer = (CtcTokenizer if path.stem == "ctc" else Tokenizer).load(path)
    ids = tokenizer.encode("one red cat 42 größer")
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    tokenizer.decode(ids)


def make_stages(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        make_mix(Path(made))
        shutil.copytree(Path(made) / "thinker", folder, dirs_exist_ok=True)


def read_stage(path: Path) -> None:
    load(STAGES["text"], path.parent)


def reseal_checkpoint(path: Path) -> None:
    data = path.read_bytes()[: -checkpoint._COMMENT_BYTES]
    path.write_bytes(data + b"sha256:" + hashlib.sha256(data).hexdigest().encode())


def make_exports(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        data = make_mix(Path(made))
        names = {"thinker_ckpt": "--thinker_ckpt", "audio_ckpt": "--audio_ckpt", "vision_ckpt": "--vision_ckpt"}
        pairs = [(option, data[key]) for key, option in (names | {"talker_ckpt": "--talker_ckpt"}).items()]
        output = str(Path(made) / "export")
        export.main([word for pair in pairs for word in pair] + ["--output_dir", output])
        shutil.copytree(output, folder, dirs_exist_ok=True)


def read_export(path: Path) -> None:
    folder = next(parent for parent in path.parents if (parent / INFO).exists())
    merged = Export(folder)
    for name in merged.components:
        merged.open(name)
    for name in merged.checksums:
        merged.file(name)


def reseal_export(path: Path) -> None:
    folder = next(parent for parent in path.parents if (parent / INFO).exists())
    info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    if path.name != INFO:
        info["files"][path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    info["sha256"] = info_sha256(info)
    (folder / INFO).write_text(json.dumps(info), encoding="utf-8")


ARCHIVES = Archive(
    "",
    "",
    None,
    "",
    r"(some/\w+\.wav)",
    extras=r"(some/texts)",
    extras_of=lambda name: ("some/texts",),
    count=20,
    growth=1.5,
)


def make_archives(folder: Path) -> None:
    rng = np.random.default_rng(3)
    files = {f"some/{i}.wav": rng.bytes(80) + bytes(100) for i in range(4)} | {"some/texts": b"words\n" * 9}
    for name, method in (("a.zip", zipfile.ZIP_STORED), ("deflated.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(folder / name, "w", method) as archive:
            for member, content in files.items():
                archive.writestr(member, content)
    for ending in ("tar", "tar.gz", "tar.bz2", "tar.xz"):
        with tarfile.open(folder / f"a.{ending}", f"w:{ending.partition('.')[2]}") as archive:
            for member, content in files.items():
                header = tarfile.TarInfo(member)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))


def read_archive(path: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "outer" / "into"
        folder.mkdir(parents=True)
        try:
            unpack(dataclasses.replace(ARCHIVES, name=path.name), path, folder, None)
        finally:
            assert os.listdir(made) == ["outer"] and os.listdir(folder.parent) == ["into"], "something left the folder"


# pieces that mean something in such files
NUMBERS = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0", b"\0", b"\xff", b"\1\0\0\0")
JSON = (
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"9" * 25, b"0.5",
    b"\\ud800", b"\\u0000", b"{}", b"[]", b'""', b"[" * 3000, b"\xef\xbb\xbf", b"\xff", b"\r", b"\n", b"100000000",
)  # fmt: skip
TOKENS = {
    "manifests": (*JSON, b'"\n', b"\r\n", b"\0", b"../", b"data:,x", b",,,", b"\xc3"),
    "texts": (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\x1b[2J", b"\xc3", b"\xf0\x9f"),
    "configs": JSON,
    "recordings": (*NUMBERS, b"RIFF", b"data", b"fmt ", b"fLaC", b"OggS", b"moov", b"mdat", b"ID3"),
    "pictures": (*NUMBERS, b"IHDR", b"IDAT", b"\xff\xd8", b"\xff\xda", b"GIF89a", b"RIFF"),
    "films": (*NUMBERS, b"moov", b"mdat", b"stts", b"\x1aE\xdf\xa3", b"fcTL", b"fdAT", b"ANMF", b"\x21\xf9"),
    "tokenizers": (*JSON, b'"type":"Replace"', b'"normalizer":', b'"BPE"'),
    "checkpoints": (*NUMBERS, b"cos\nsystem\n", b"PK\3\4", b"(S'x'\ntR.", b"\x80\2", b"\x8c\4", b"M\xff\xff"),
    "exports": (*JSON, *NUMBERS, b"F64", b"I8"),
    "archives": (*NUMBERS, b"../", b"PK\3\4", b"PK\1\2", b"ustar", b"/etc/x", b"\x1f\x8b"),
}
KINDS = {
    "manifests": Kind(make_manifests, read_manifest),
    "texts": Kind(make_texts, read_texts),
    "configs": Kind(make_configs, read_config),
    "recordings": Kind(make_recordings, read_recording),
    "pictures": Kind(make_pictures, read_picture),
    "films": Kind(make_films, read_film),
    "tokenizers": Kind(make_tokenizers, read_tokenizer),
    "checkpoints": Kind(make_stages, read_stage, lambda path: path.suffix == ".pt", reseal_checkpoint),
    "exports": Kind(make_exports, read_export, reseal=reseal_export),
    "archives": Kind(make_archives, read_archive),
}


# ---------------------------------------------------------------------------------------------------------------
# One case


def damaged(data: bytes, other: bytes, tokens: tuple[bytes, ...], rng: random.Random) -> bytes:
    """``data`` after one to four damages; ``other`` is a file of the same kind, for splices."""

    def place(text: bytearray) -> int:
        return rng.randrange(len(text) + 1) if rng.random() < 0.6 else rng.randrange(min(len(text), 200) + 1)

    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, length = place(data), int(2 ** rng.uniform(0, 8))
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 1] = rng.randbytes(1)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = rng.randbytes(length)
            case 5:
                data[at:at] = data[at : at + length] * rng.choice((1, 1, 50))
            case 6:
                data[at:] = other[rng.randrange(len(other)) :]
            case 7 if tokens:
                token = rng.choice(tokens)
                data[at : at + rng.choice((0, len(token)))] = token
    return bytes(data)


def prepare(name: str, folder: Path) -> Path:
    """Make the good files of a kind once."""
    good = folder / name
    if not good.exists():
        good.mkdir()
        KINDS[name].make(good)
    return good


def files_of(kind: Kind, folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and kind.only(path)]


def write_case(name: str, number: int, seed: int, folder: Path) -> tuple[Path, dict[Path, bytes]]:
    """Damage a file of ``folder``; returns its path and the contents to restore afterwards."""
    kind, rng = KINDS[name], random.Random(f"{seed}/{name}/{number}")
    files = files_of(kind, folder)
    path, other = rng.choice(files), rng.choice(files)
    before = {path: path.read_bytes()}
    path.write_bytes(
        damaged(before[path], other.read_bytes() if other != path else before[path], TOKENS.get(name, ()), rng)
    )
    if kind.reseal and rng.random() < 0.7:
        before |= {file: file.read_bytes() for file in folder.rglob("*") if file.name == INFO and file != path}
        # the list of checksums may be damaged
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            kind.reseal(path)
    return path, before


def outcome_of(read: Callable[[Path], None], path: Path) -> tuple[str, str]:
    """One of OUTCOMES, and the description of a finding."""
    try:
        read(path)
        return "good", ""
    except (BadRow, UserError, RunError) as error:
        if len(str(error).splitlines()) > 1 or len(str(error)) > 2000:
            return "finding", f"a message of {len(str(error).splitlines())} lines, {len(str(error)):,} characters"
        return ("bad row" if isinstance(error, BadRow) else "one line"), ""
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and ".venv" not in f.filename]
        where = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "?"
        return "finding", f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:120]}"


def _status(key: str) -> int:
    """Bytes, from Linux's status of this process; 0 on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def work(name: str, numbers: range, seed: int, good: Path, pipe: int) -> None:
    """Run cases in a forked process, and report the beginning and the outcome of each."""
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(1, 2)
    warnings.simplefilter("ignore")
    faulthandler.disable()  # the parent reports a crash
    os.chdir(ROOT)  # configs name files relative to it
    torch.set_num_threads(1)
    if size := _status("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever a library is doing
    with tempfile.TemporaryDirectory() as made:
        folder = Path(shutil.copytree(good, Path(made) / "files"))
        for number in numbers:
            os.write(pipe, json.dumps({"begin": number}).encode() + b"\n")
            path, before = write_case(name, number, seed, folder)
            _forget_peak()
            resident, start = _status("VmRSS"), time.monotonic()
            signal.alarm(SECONDS)
            outcome, what = outcome_of(KINDS[name].read, path)
            signal.alarm(0)
            grown = _status("VmHWM") - resident
            if grown > RESIDENT:
                outcome, what = "finding", f"memory grew by {grown / 1e9:.1f} GB"
            row = {"number": number, "outcome": outcome, "what": what, "file": path.name, "grown": grown}
            os.write(pipe, json.dumps(row | {"seconds": time.monotonic() - start}).encode() + b"\n")
            for file, data in before.items():
                file.write_bytes(data)


_forking = threading.Lock()


def run_chunk(name: str, numbers: range, seed: int, good: Path) -> list[dict]:
    """Results of some cases; a process that dies in one of them is followed by another."""
    rows = []
    while len(numbers):
        with _forking:  # so that no child holds the writing end of another's pipe
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(reading)
                    work(name, numbers, seed, good, writing)
                    os._exit(0)
                except BaseException:
                    os._exit(70)
            os.close(writing)
        begun = numbers.start
        with open(reading, "rb") as file:
            for line in file:
                row = json.loads(line)
                begun = row.get("begin", begun)
                if "outcome" in row:
                    rows.append(row)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if rows and rows[-1]["number"] == numbers[-1]:
            break
        what = f"over {SECONDS} s" if code == -signal.SIGALRM else f"the process ended with {code}"
        rows.append({"number": begun, "outcome": "finding", "what": what, "file": "?", "grown": 0, "seconds": 0.0})
        numbers = range(begun + 1, numbers.stop)
    return rows


def run(names: list[str], count: int, seed: int, folder: Path, workers: int = 2) -> dict[str, list[dict]]:
    """``count`` cases, an equal share of each kind."""
    share = -(-count // len(names))
    good = {name: prepare(name, folder) for name in names}
    chunks = [(name, range(at, min(at + CHUNK, share))) for at in range(0, share, CHUNK) for name in names]
    results: dict[str, list[dict]] = {name: [] for name in names}
    with ThreadPoolExecutor(workers) as pool:
        for (name, _), rows in zip(
            chunks, pool.map(lambda c: run_chunk(c[0], c[1], seed, good[c[0]]), chunks), strict=True
        ):
            results[name] += rows
    return results


# ---------------------------------------------------------------------------------------------------------------
# Report


def table(results: dict[str, list[dict]], made: str) -> str:
    lines = [
        "## What `make fuzz` found",
        "",
        f"{made}. Good: read to a finite answer of the right shape. Finding: anything but that, a bad row or one line.",
        "",
        "| kind | damages | good | bad row | one line | findings | slowest, s | peak memory, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rows in results.items():
        counts = Counter(row["outcome"] for row in rows)
        cells = [len(rows), *(counts[outcome] for outcome in OUTCOMES)]
        slowest, peak = max(row["seconds"] for row in rows), max(row["grown"] for row in rows)
        lines.append(f"| {name} | {' | '.join(map(str, cells))} | {slowest:.1f} | {peak / 1e6:.0f} |")
    return "\n".join(lines)


def keep_findings(results: dict[str, list[dict]], seed: int, good: Path, target: Path) -> None:
    for name, rows in results.items():
        for row in rows:
            if row["outcome"] == "finding":
                with tempfile.TemporaryDirectory() as made:
                    path, _ = write_case(
                        name, row["number"], seed, Path(shutil.copytree(good / name, Path(made) / "f"))
                    )
                    target.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target / f"{name}-{seed}-{row['number']}-{path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="damages, over all kinds (default: 20000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="one kind")
    parser.add_argument("--case", type=int, help="one case of the kind again, in this process")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--keep", metavar="FOLDER", type=Path, default=ROOT / "checkpoints" / "fuzz", help="for findings"
    )
    parser.add_argument("--page", metavar="FILE.md", type=Path, help="write the table to it")
    args = parser.parse_args()
    names = [args.only] if args.only else list(KINDS)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if args.case is not None:
            path, _ = write_case(names[0], args.case, args.seed, prepare(names[0], folder))
            KINDS[names[0]].read(path)
            return
        start = time.monotonic()
        results = run(names, args.count, args.seed, folder, args.workers)
        minutes = (time.monotonic() - start) / 60
        keep_findings(results, args.seed, folder, args.keep)
    found = {name: [row for row in rows if row["outcome"] == "finding"] for name, rows in results.items()}
    for name, rows in found.items():
        kinds = Counter(row["what"].partition(": ")[0] for row in rows)
        for what, count in kinds.most_common():
            row = next(row for row in rows if row["what"].startswith(what))
            print(f"{name}: {count} x {row['what']} (--only {name} --seed {args.seed} --case {row['number']})")
    made = f"{time.strftime('%Y-%m-%d')}, commit {commit()}, {machine()}, seed {args.seed}, {minutes:.1f} minutes"
    text = table(results, made)
    print(text)
    if args.page:
        write_part(args.page, "fuzz", text)
    sys.exit(1 if any(found.values()) else 0)


if __name__ == "__main__":
    main()
