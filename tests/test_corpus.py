"""A text file becomes packed sequences: once, bounded, resumable, without losing a byte."""

import json
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
from harness import kill_at
from stages import TEXT, WORDS

from omni.common.errors import Interrupted, UserError
from omni.data import corpus
from omni.data.corpus import JoinedArray, PackedTokens, TokenFile, prepare_corpus, sample_lines
from omni.data.lines import read_chunks, split_samples
from omni.data.tokenizer import IGNORE_INDEX, Tokenizer


class FakeRun:
    """The part of a run that preparation uses."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.config = SimpleNamespace(cache_dir=None)
        self.is_main, self.lines, self.chunks_left = True, [], stop_after

    def log(self, line: str) -> None:
        if " to train on + " not in line:
            self.lines.append(line)

    def check_stop(self) -> None:
        self.chunks_left -= 1
        if self.chunks_left < 0:
            raise Interrupted("stopped")

    def main_process_first(self):
        import contextlib

        return contextlib.nullcontext()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(["the cat sat on the mat"] * 20), 300)


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr("omni.data.lines._CHUNK_BYTES", 500)
    rng = random.Random(0)
    lines = [" ".join(rng.choices(["cat", "sät", "on", "猫"], k=rng.randint(1, 12))) for _ in range(400)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8", newline="")
    return path, lines


def decoded(file: TokenFile, tokenizer: Tokenizer) -> list[str]:
    return tokenizer.decode(file.open().tolist()).split("<|endoftext|>")[1:-1]


def test_every_line_is_in_exactly_one_split_and_duplicates_stay_together(text, tokenizer):
    path, lines = text
    cache = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3)
    train, val = decoded(cache.train, tokenizer), decoded(cache.val, tokenizer)
    assert sorted(train + val) == sorted(lines)
    assert not set(train) & set(val)
    assert (len(train), len(val)) == (cache.train.samples, cache.val.samples)
    assert 0.15 < len(val) / len(lines) < 0.45
    assert cache.train.text_bytes + cache.val.text_bytes == sum(len(line.encode()) + 1 for line in lines)


def test_an_interrupted_preparation_goes_on_and_ends_the_same(text, tokenizer, tmp_path):
    path, _ = text
    whole = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3)
    expected = {name: (whole.train.path.parent / f"{name}.bin").read_bytes() for name in ("train", "val")}
    meta = json.loads((whole.train.path.parent / "meta.json").read_text())
    (whole.train.path.parent / "meta.json").unlink()
    for _ in range(5):
        with pytest.raises(Interrupted):
            prepare_corpus(FakeRun(stop_after=3), str(path), tokenizer, val_split=0.3)
        with open(whole.train.path, "ab") as file:
            file.write(b"the half of a chunk that a kill left behind")
    again = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3)
    assert {name: (again.train.path.parent / f"{name}.bin").read_bytes() for name in ("train", "val")} == expected
    again_meta = json.loads((again.train.path.parent / "meta.json").read_text())
    for name in ("train", "val"):
        assert again_meta[name].pop("stat") and meta[name].pop("stat")  # when it was written
    assert {key: again_meta[key] for key in again_meta if key != "seal"} == {
        key: meta[key] for key in meta if key != "seal"
    }


def test_the_cache_follows_the_text_and_not_its_time(text, tokenizer):
    path, _ = text
    first, run = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3), FakeRun()
    assert prepare_corpus(run, str(path), tokenizer, val_split=0.3) == first and run.lines == []
    os.utime(path, (1e9, 1e9))
    assert prepare_corpus(run, str(path), tokenizer, val_split=0.3) == first and run.lines == []
    path.write_bytes(path.read_bytes().replace(b"cat", b"dog", 1))
    other = prepare_corpus(run, str(path), tokenizer, val_split=0.3)
    assert other.sha256 != first.sha256
    assert "has changed" in run.lines[0] and "tokenising" in run.lines[1]


def test_a_cut_or_missing_cache_file_is_made_again(text, tokenizer):
    path, _ = text
    cache = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3)
    expected = cache.train.path.read_bytes()
    cache.train.path.write_bytes(expected[:-2])
    assert prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3) == cache
    assert cache.train.path.read_bytes() == expected
    cache.val.path.unlink()
    assert prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3) == cache


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_a_cache_file_with_other_content_is_noticed_and_made_again(text, tokenizer, name):
    path, _ = text
    cache = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3)
    file, run = cache.train.path.with_name(name), FakeRun()
    expected = {path: path.read_bytes() for path in file.parent.glob("*.bin")}
    file.write_bytes(b"\x05" * file.stat().st_size)
    again = prepare_corpus(run, str(path), tokenizer, val_split=0.3)
    assert again.sha256 == cache.sha256 and {p: p.read_bytes() for p in expected} == expected
    assert "making" in run.lines[0]


def test_a_cut_file_of_an_interrupted_preparation_is_not_filled_with_zeros(text, tokenizer):
    path, _ = text
    whole = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3)
    expected = whole.train.path.read_bytes()
    whole.train.path.with_name("meta.json").unlink()
    for damage in (lambda: whole.train.path.write_bytes(expected[:10]), whole.val.path.unlink):
        with pytest.raises(Interrupted):
            prepare_corpus(FakeRun(stop_after=3), str(path), tokenizer, val_split=0.3)
        damage()
        assert prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3) == whole
        assert whole.train.path.read_bytes() == expected
        whole.train.path.with_name("meta.json").unlink()


@pytest.mark.parametrize("letter", ["a", "ä", "€", "𝄞"])
def test_a_line_longer_than_a_chunk_is_never_cut_inside_a_character(tmp_path, tokenizer, monkeypatch, letter):
    monkeypatch.setattr("omni.data.lines._CHUNK_BYTES", 501)
    monkeypatch.setattr("omni.data.lines.PIECE_BYTES", 50)
    path = tmp_path / "giant.txt"
    path.write_text(letter * 1000 + "\nend", encoding="utf-8")
    cache = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.0)
    assert "".join(decoded(cache.train, tokenizer)) == letter * 1000 + "end"


def test_tokens_that_a_run_has_open_are_never_written_over(text, tokenizer, monkeypatch):
    path, _ = text
    cache = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3)
    opened, before = cache.train.open(), cache.train.path.read_bytes()
    why_stale, answers = corpus._why_stale, iter([("not yet", None)])
    monkeypatch.setattr(corpus, "_why_stale", lambda *keys: next(answers, None) or why_stale(*keys))
    run = FakeRun()
    assert prepare_corpus(run, str(path), tokenizer, val_split=0.3) == cache
    assert run.lines == [], "finished by another process while this one waited for the lock"
    path.write_bytes(path.read_bytes()[:2000])
    assert prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3) != cache
    assert opened.tobytes() == before


def test_a_killed_script_prepares_the_same(tmp_path):
    training = TEXT.training(tmp_path, max_steps=2)
    small_chunks = "import omni.data.lines; omni.data.lines._CHUNK_BYTES = 100\n"
    for count in (2, 3, 4):
        kill = kill_at("omni.data.corpus:write_sealed_json", count, after=count == 3)
        assert training.run(prelude=small_chunks + kill).returncode == -9
    training.finish(prelude=small_chunks)
    (cache,) = tmp_path.glob("*.tokens-*")
    files = {name: (cache / f"{name}.bin").read_bytes() for name in ("train", "val")}
    for path in cache.iterdir():
        path.unlink()
    training.changed(save_dir="again").finish(prelude=small_chunks)
    assert {name: (cache / f"{name}.bin").read_bytes() for name in ("train", "val")} == files


def test_a_line_that_is_not_utf8_is_named_by_its_row(tmp_path, tokenizer):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"good\n" * 6 + "schön\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: row 7: expected UTF-8 text, found byte 0xf6"):
        prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.0)


def test_an_empty_corpus_is_refused(tmp_path, tokenizer):
    path = tmp_path / "empty.txt"
    for content in ("", "\n \n\r\n"):
        path.write_text(content)
        with pytest.raises(UserError, match="expected lines of text"):
            prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.0)


def test_a_giant_line_becomes_samples_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("omni.data.lines.PIECE_BYTES", 50)
    for line in ("wörd " * 100, "ä" * 333, "a" * 50, "x " * 25):
        pieces = list(split_samples(line.encode(), tmp_path, 1))
        assert b"".join(pieces).decode() == line.rstrip() + line[len(line.rstrip()) :]
        assert max(map(len, pieces)) <= 50


def test_memory_stays_bounded_however_long_the_file(text, tokenizer, monkeypatch):
    """Little is encoded at a time, fewer lines than are read at once, and the tokens are the same."""
    path, lines = text
    whole = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3)
    expected = {file.path: file.path.read_bytes() for file in (whole.train, whole.val)}
    whole.train.path.with_name("meta.json").unlink()
    monkeypatch.setattr(corpus, "_ENCODED_BYTES", 100)
    encode, sizes = Tokenizer.encode_batch, []

    def measured(self, texts, **keys):
        sizes.append([len(text.encode()) for text in texts])
        return encode(self, texts, **keys)

    monkeypatch.setattr(Tokenizer, "encode_batch", measured)
    assert prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3) == whole
    assert {path: path.read_bytes() for path in expected} == expected
    assert sum(map(len, sizes)) == len(lines) and all(sum(batch[:-1]) < 100 for batch in sizes)
    assert len(sizes) > 2 * path.stat().st_size / 500


def test_a_tokenizer_is_trained_on_the_whole_of_a_small_text_and_on_parts_from_all_over_a_large_one(text, monkeypatch):
    path, lines = text
    assert list(sample_lines(FakeRun(), [path])) == lines
    numbered = [f"line {i:04}" for i in range(1000)]
    path.write_text("\n".join(numbered))
    monkeypatch.setattr(corpus, "_TOKENIZER_SAMPLE_BYTES", path.stat().st_size // 10)
    sample = [numbered.index(line) for line in sample_lines(FakeRun(), [path])]
    chunks, size = path.stat().st_size / 500, sum(len(numbered[i]) for i in sample)
    assert size <= path.stat().st_size // 10 + chunks * len(numbered[0])
    assert sample == sorted(sample) and sample[0] == 0 and sample[-1] > 940
    assert max(b - a for a, b in zip(sample, sample[1:], strict=False)) <= 500 / len(numbered[0]), (
        "no chunk is left out"
    )


def write_100_mb(path, separator: bytes, nul: bytes) -> int:
    """Words, a separator after every tenth and at the end, and ``nul`` once a megabyte. Returns the number of bytes."""
    words = random.Random(0).choices(WORDS, k=200_000)
    block = separator.join(" ".join(words[i : i + 10]).encode() for i in range(0, len(words), 10))[: 1 << 20]
    with path.open("wb") as file:
        return sum(file.write(block + nul + separator) for _ in range(100))


@pytest.mark.parametrize("nul", [b"", b"\0"], ids=["without NUL", "with NUL"])
def test_a_line_of_100_mb_comes_in_small_pieces_and_loses_nothing(tmp_path, nul):
    path = tmp_path / "line.txt"
    size, seen = write_100_mb(path, b" ", nul), 0
    for chunk in read_chunks(path):
        assert len(chunk) <= (16 << 20) + (64 << 10)
        pieces = list(split_samples(chunk, path, 1))
        assert max(map(len, pieces)) <= 64 << 10
        assert b"".join(pieces) == chunk
        seen += len(chunk)
    assert seen == size


@pytest.mark.torture
@pytest.mark.parametrize("nul", [b"", b"\0"], ids=["without NUL", "with NUL"])
def test_a_line_of_100_mb_takes_no_more_memory_than_many_lines(tmp_path, nul):
    peaks_gb = {}
    for name, separator in (("lines", b"\n"), ("line", b" ")):
        (tmp_path / name).mkdir()
        size = write_100_mb(tmp_path / name / "corpus.txt", separator, nul)
        training = TEXT.training(tmp_path / name, max_steps=2, val_split=0.001)
        training.finish()
        rows = (training.save_dir / "metrics.jsonl").read_text().splitlines()
        peaks_gb[name] = max(json.loads(row).get("peak_memory_gb", 0.0) for row in rows)
        (meta,) = (tmp_path / name).glob("*.tokens-*/meta.json")
        counts = json.loads(meta.read_text())
        kept = sum(counts[split]["text_bytes"] - counts[split]["samples"] for split in ("train", "val"))
        assert kept + (counts["train"]["samples"] + counts["val"]["samples"] if name == "lines" else 0) == size
    assert peaks_gb["line"] < 1.2 * peaks_gb["lines"] + 0.1, peaks_gb


@pytest.mark.parametrize("sizes", [(5, 9), (1, 5, 1, 1, 9, 1), (1, 1, 2), (40,)])
def test_slices_of_several_files_are_those_of_one(sizes):
    """Wherever they begin and end, files without samples among them."""
    end, rng = 0, np.random.default_rng(0)
    parts = [np.array([end, *rng.integers(1, 99, max(0, size - 2)), end][-size:], dtype="uint16") for size in sizes]
    whole = np.concatenate([parts[0], *(part[1:] for part in parts[1:])])
    joined = JoinedArray(parts)
    for start in range(len(whole) - 1):
        for stop in range(start + 1, len(whole) + 3):
            assert joined[start:stop].tolist() == whole[start:stop].tolist(), (start, stop)


def test_of_several_files_only_the_changed_one_is_tokenised_again(text, tokenizer, tmp_path):
    """Also where a cache_dir holds the tokens of files of equal names."""
    path, lines = text
    for folder, part in (("a", lines[:150]), ("b", lines[150:])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.txt").write_text("\n".join(part), encoding="utf-8")
    pattern, run = str(tmp_path / "*" / "part.txt"), FakeRun()
    run.config.cache_dir = str(tmp_path / "cache")
    joined = prepare_corpus(run, pattern, tokenizer, val_split=0.3)
    whole = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3)
    for one, other in ((joined.train, whole.train), (joined.val, whole.val)):
        assert one.open()[0 : one.tokens].tolist() == other.open().tolist()
        assert (one.tokens, one.samples, one.text_bytes) == (other.tokens, other.samples, other.text_bytes)
    run.lines.clear()
    assert prepare_corpus(run, pattern, tokenizer, val_split=0.3) == joined and run.lines == []
    second = tmp_path / "b" / "part.txt"
    second.write_text(second.read_text(encoding="utf-8").replace("cat", "dog"), encoding="utf-8")
    assert prepare_corpus(run, pattern, tokenizer, val_split=0.3).sha256 != joined.sha256
    assert [line.split()[1] for line in run.lines if line.startswith("tokenising")] == [str(second)]


@pytest.mark.parametrize("tokens", [9, 16, 17, 18, 40])
def test_packing_predicts_every_token_once(tmp_path, tokens):
    path = tmp_path / "tokens.bin"
    np.arange(100, 100 + tokens, dtype="uint16").tofile(path)
    file = TokenFile(path, "uint16", tokens=tokens, samples=1, text_bytes=1)
    whole = PackedTokens(file, ctx_len=8, keep_tail=True)
    batch = whole.batch(np.arange(len(whole)), epoch=0)
    kept = batch["targets"] != IGNORE_INDEX
    assert batch["targets"][kept].tolist() == list(range(101, 100 + tokens))
    assert batch["tokens"][kept].tolist() == list(range(100, 99 + tokens))
    assert batch["n_targets"] == tokens - 1
    train = PackedTokens(file, ctx_len=8)
    batch = train.batch(np.arange(len(train)), epoch=0)
    assert (batch["targets"] != IGNORE_INDEX).all(), "nothing is padded in training"
    assert len(train) == (tokens - 1) // 8
    assert train.batch(np.array([], dtype=np.int64), epoch=0)["n_targets"] == 0


def test_perplexity_and_bits_per_byte_are_those_of_the_whole_held_out_text(tmp_path):
    import math

    import torch

    from omni.models.architectures import ThinkerArchitecture
    from omni.models.thinker import Thinker

    training = TEXT.training(tmp_path, max_steps=6, batch_size=3)
    training.finish()
    final = training.final_file()
    model = Thinker(ThinkerArchitecture.model_validate(final["architecture"])).eval()
    model.load_state_dict(final["model"])
    (meta,) = tmp_path.glob("*.tokens-*/meta.json")
    count = json.loads(meta.read_text())["val"]
    tokens = torch.from_numpy(np.fromfile(meta.parent / "val.bin", dtype=count["dtype"]).astype(np.int64))
    nats = 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17][None]
        log_probabilities = model(window[:, :-1]).log_softmax(-1)
        nats -= log_probabilities.gather(-1, window[:, 1:, None]).sum().item()
    assert final["metrics"]["perplexity"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-4)
    assert final["metrics"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / count["text_bytes"], rel=1e-4)


def test_what_stands_in_no_answer_counts_less(tmp_path):
    begin, end = 90, 91
    ids = [1, 2, begin, 3, 4, end, 5, 6, begin, 7, 8, 9, end]
    path = tmp_path / "tokens.bin"
    np.array(ids, dtype="uint16").tofile(path)
    file = TokenFile(path, "uint16", tokens=len(ids), samples=1, text_bytes=1)
    packed = PackedTokens(file, ctx_len=12, context_weight=0.25, answer_ids=(begin, end))
    batch = packed.batch(np.array([0]), epoch=0)
    answers = {3, 4, end, 7, 8, 9}  # an answer's end is part of it: whoever answers must stop
    assert batch["weights"].tolist() == [[1.0 if target in answers else 0.25 for target in ids[1:]]]
    assert (batch["n_targets"], batch["n_tokens"]) == (float(batch["weights"].sum()), 12)
    assert packed.batch(np.array([], dtype=np.int64), epoch=0)["n_targets"] == 0
    assert "weights" not in PackedTokens(file, ctx_len=12).batch(np.array([0]), epoch=0)


@pytest.mark.parametrize("chunk_bytes", [7, 64, 500, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_lines_end_as_on_any_system_and_begin_after_a_bom(tmp_path, tokenizer, monkeypatch, bom, end, chunk_bytes):
    monkeypatch.setattr("omni.data.lines._CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("omni.data.lines.PIECE_BYTES", 100)  # longer than a line
    lines = [f"the cät {i} sat" * (1 + i % 3) for i in range(50)]
    path, run = tmp_path / "text.txt", FakeRun()
    path.write_bytes((bom + end.join(lines[:20]) + end * 3 + end.join(lines[20:])).encode())
    said = []
    run.log = said.append
    cache = prepare_corpus(run, str(path), tokenizer, val_split=0.3)
    train, val = decoded(cache.train, tokenizer), decoded(cache.val, tokenizer)
    assert sorted(train + val) == sorted(lines) and list(sample_lines(FakeRun(), [path])) == lines
    counts = f"52 lines = {len(train)} to train on + {len(val)} held out + 2 blank"
    assert said[-1] == f"{path}: {counts}"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_refused_by_its_name(tmp_path, tokenizer, encoding):
    path = tmp_path / "text.txt"
    path.write_bytes("the cat sat\non the mat\n".encode(encoding))
    with pytest.raises(UserError, match=r"text\.txt: expected UTF-8 text, found .*UTF-16"):
        prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.0)


@pytest.mark.parametrize("text_of_progress", ["[]", "3", "{}", '{"bytes": 5}'])
def test_a_progress_that_is_not_what_was_written_begins_anew(text, tokenizer, text_of_progress):
    path, _ = text
    whole = prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3)
    folder = whole.train.path.parent
    expected = whole.train.path.read_bytes()
    (folder / "meta.json").unlink()
    (folder / "progress.json").write_text(text_of_progress)
    assert prepare_corpus(FakeRun(), str(path), tokenizer, val_split=0.3).train.path.read_bytes() == expected
