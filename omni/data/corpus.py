"""Text files of any size, as packed token sequences in memory-mapped caches.

A file is UTF-8, one sample per line, with LF, CRLF or CR as line ends; a byte-order mark is skipped. It is read once,
in chunks of bounded memory: each line's tokens are appended to ``train.bin`` or ``val.bin``, followed by the
end-of-text token. A kill costs at most one chunk. Several files have a cache each, and their tokens are read one after
the other. A training sequence is a slice of these tokens, without padding.
"""

import codecs
import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from omni.common.errors import UserError
from omni.common.files import file_sha256, file_stat, open_sealed_json, read_sealed_json, write_sealed_json
from omni.common.host import Host
from omni.data.index import hold_cache, make_once
from omni.data.lines import PIECE_BYTES, count_lines, read_chunks, split_samples
from omni.data.manifest import joined_name
from omni.data.text_rows import text_files
from omni.data.tokenizer import IGNORE_INDEX, Tokenizer

_VERSION = 2
_COUNTS = ("dialogues", "lines", "blank")  # of a file, in its meta.json
_ENCODED_BYTES = 256 << 10  # text encoded at a time: a token takes over 100 bytes until it is written
_TOKENIZER_SAMPLE_BYTES = 24 << 20  # training needs half a kilobyte of memory for each distinct word of the sample


def sample_lines(run: Host, paths: list[Path]) -> Iterator[str]:
    """Lines to train a tokenizer on: all of the files, or the beginning of each chunk if they are large together."""
    share = _TOKENIZER_SAMPLE_BYTES / max(1, sum(path.stat().st_size for path in paths))
    for path in paths:
        row = 1
        for chunk in read_chunks(path):
            run.check_stop()
            left = share * len(chunk)
            for sample in split_samples(chunk, path, row):
                if left <= 0:
                    break
                left -= len(sample)
                yield sample.decode("utf-8")
            row += count_lines(chunk)


# ---------------------------------------------------------------------------------------------------------------
# The cache


@dataclass(frozen=True)
class TokenFile:
    """Tokens of one split on disk: ``<end> sample <end> sample <end> ...``."""

    path: Path
    dtype: str
    tokens: int
    samples: int
    text_bytes: int  # UTF-8 bytes of the samples, each with its newline, for bits per byte

    def open(self) -> np.ndarray:
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))


@dataclass(frozen=True)
class JoinedTokens:
    """Tokens of one split of several files, in place of a ``TokenFile``. The <end> that a file begins with is the <end>
    of the sample before it, so the two are one token."""

    parts: tuple[TokenFile, ...]

    @property
    def path(self) -> Path:
        return joined_name([part.path for part in self.parts])

    @property
    def tokens(self) -> int:
        return 1 + sum(part.tokens - 1 for part in self.parts)

    @property
    def samples(self) -> int:
        return sum(part.samples for part in self.parts)

    @property
    def text_bytes(self) -> int:
        return sum(part.text_bytes for part in self.parts)

    def open(self) -> "JoinedArray":
        return JoinedArray([part.open() for part in self.parts])


class JoinedArray:
    """Slices of the arrays of several parts as of one array, in which the last token of a part and the first of the
    next are the same."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self._parts, self._last = parts, np.cumsum([len(part) - 1 for part in parts])  # position of the last token

    def __getitem__(self, span: slice) -> np.ndarray:
        start, found = int(span.start), []
        for number in range(int(np.searchsorted(self._last, start, side="right")), len(self._parts)):
            part, first = self._parts[number], int(self._last[number]) + 1 - len(self._parts[number])
            found.append(part[start - first : int(span.stop) - first])
            start += len(found[-1])
            if start >= span.stop:
                break
        return np.concatenate(found)


@dataclass(frozen=True)
class TokenCache:
    train: TokenFile | JoinedTokens
    val: TokenFile | JoinedTokens
    sha256: str  # digest of the corpus
    dialogues: int  # samples in the chat format
    lines: int  # with text
    blank: int


def prepare_corpus(run: Host, files: str | list[str], tokenizer: Tokenizer, *, val_split: float) -> TokenCache:
    """Tokenise each of the ``files`` once; later calls open the caches.

    A cache lies beside its file (or in ``cache_dir``), keyed by tokenizer and split. It is trusted while the file keeps
    its size and mtime; otherwise the file is hashed, and tokenised again if its content has changed. A hash of its text
    alone decides a sample's split: a repeated line is never in both, and all seeds share a validation split.

    Raises:
        UserError: a file is missing, empty or not UTF-8, or its folder cannot be written.
        Interrupted: the run was asked to stop; a later call continues after the last chunk.
    """
    paths, caches = text_files(files), []
    with run.main_process_first():
        for path in paths:
            facts = [_VERSION, tokenizer.fingerprint, val_split]
            if run.config.cache_dir:  # where files of several folders may have the same name
                facts.append(str(path.resolve()))
            key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
            folder = Path(run.config.cache_dir or path.parent) / f"{path.name}.tokens-{key}"
            if run.is_main:
                _prepare(run, path, folder, tokenizer, val_split)
            caches.append(_read_cache(folder, json.loads((folder / "meta.json").read_text())))
    cache = _joined(caches)
    if run.is_main:
        run.log(_account(joined_name(paths), cache))
    return cache


def _joined(caches: list[TokenCache]) -> TokenCache:
    if len(caches) == 1:
        return caches[0]
    return TokenCache(
        train=JoinedTokens(tuple(cache.train for cache in caches)),
        val=JoinedTokens(tuple(cache.val for cache in caches)),
        sha256=hashlib.sha256(" ".join(cache.sha256 for cache in caches).encode()).hexdigest(),
        **{name: sum(getattr(cache, name) for cache in caches) for name in _COUNTS},
    )


def _prepare(run: Host, corpus: Path, folder: Path, tokenizer: Tokenizer, val_split: float) -> None:
    """Make the cache if it is stale. Only the holder of the folder's lock writes there."""
    copied = None

    def problem() -> str | None:
        nonlocal copied
        reason, copied = _why_stale(corpus, folder)
        return reason

    make = partial(_tokenise, run, corpus, folder, tokenizer, val_split)
    if not make_once(folder, problem, make, run.log, run.check_stop) and copied:
        # if this cannot be written, every run hashes the files
        with contextlib.suppress(UserError), hold_cache(folder, run.log, run.check_stop):
            if problem() is None and copied:
                write_sealed_json(folder / "meta.json", copied)


def _read_cache(folder: Path, meta: dict) -> TokenCache:
    counts = ("dtype", "tokens", "samples", "text_bytes")
    splits = {
        name: TokenFile(path=folder / f"{name}.bin", **{key: meta[name][key] for key in counts})
        for name in ("train", "val")
    }
    return TokenCache(**splits, sha256=meta["sha256"], **{name: meta[name] for name in _COUNTS})


def _account(corpus: Path, cache: TokenCache) -> str:
    """A log line that accounts for every line of the corpus."""
    train, val, lines, blank = cache.train.samples, cache.val.samples, cache.lines, cache.blank
    assert train + val >= lines, f"{corpus}: {lines} lines with text, but {train} + {val} samples"
    text = f"{corpus}: {lines + blank:,} lines = {train:,} to train on + {val:,} held out + {blank:,} blank"
    more = train + val - lines
    return text + (f"; of them {more:,} are parts of lines over {PIECE_BYTES >> 10} KiB" if more else "")


def _chain(digest: str, chunk: bytes) -> str:
    """Next link of the corpus digest. Chained per chunk, because an interrupted SHA-256 cannot be stored."""
    return hashlib.sha256(digest.encode() + chunk).hexdigest()


def _why_stale(corpus: Path, folder: Path) -> tuple[str | None, dict | None]:
    """Why the cache must be made ("" if there is none yet), or None if it is whole and of this corpus; and the new
    content of ``meta.json`` if files have the same bytes but another mtime, else None.

    Files that keep size and mtime are trusted, others are hashed.
    """
    path = folder / "meta.json"
    try:
        meta = open_sealed_json(path)
        _read_cache(folder, meta)
        touched = {name: file_stat(folder / f"{name}.bin") != meta[name]["stat"] for name in ("train", "val")}
        size = meta["corpus"]["size"]
    except FileNotFoundError as error:
        return (
            "" if error.filename == str(path) else f"{error.filename}: is missing; making the token cache again"
        ), None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder}: the token cache is damaged ({error}); making it again", None
    for name in (name for name in touched if touched[name]):
        file = folder / f"{name}.bin"
        if file_sha256(file) != meta[name]["sha256"]:
            return f"{file}: not what was written; making the token cache again", None
        meta[name]["stat"] = file_stat(file)
    copied = meta["corpus"] != file_stat(corpus)
    if copied:
        digest = ""
        if size == corpus.stat().st_size:
            for chunk in read_chunks(corpus):
                digest = _chain(digest, chunk)
        if digest != meta["sha256"]:
            return f"{corpus}: has changed since it was tokenised", None
    return None, meta | {"corpus": file_stat(corpus)} if copied or any(touched.values()) else None


def _tokenise(run: Host, corpus: Path, folder: Path, tokenizer: Tokenizer, val_split: float) -> None:
    """Fill ``folder``: train.bin, val.bin, meta.json. ``progress.json`` records the bytes that are safely done."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    stat = file_stat(corpus)
    # "done" counts are in units of the corpus (bytes, rows) and of each split (tokens, samples, text bytes)
    fresh = {"corpus": stat, "sha256": "", "bytes": 0, "rows": 0, "lines": 0, "blank": 0, "dialogues": 0}
    fresh |= {name: {"dtype": dtype, "tokens": 0, "samples": 0, "text_bytes": 0} for name in ("train", "val")}
    progress_path = folder / "progress.json"
    done = read_sealed_json(progress_path)
    if done is None or done.keys() != fresh.keys():
        done = fresh
    width = np.dtype(dtype).itemsize
    sizes = {path.stem: path.stat().st_size for path in folder.glob("*.bin")}
    kept = all(sizes.get(name, -1) >= done[name]["tokens"] * width for name in ("train", "val"))
    if done["corpus"] != stat or not kept:
        done = fresh
    (folder / "meta.json").unlink(missing_ok=True)
    if not done["bytes"]:
        for path in folder.glob("*.bin"):
            path.unlink()  # not truncated: a run that still trains on the old tokens keeps them
    run.log(f"tokenising {corpus} ({stat['size'] / 1e6:.1f} MB) into {folder}")
    files = {name: open(folder / f"{name}.bin", "r+b" if done["bytes"] else "wb") for name in ("train", "val")}
    bar = tqdm(total=stat["size"], initial=done["bytes"], unit="B", unit_scale=True, desc="tokenise", disable=None)
    with bar, files["train"], files["val"]:
        for name, file in files.items():
            file.truncate(done[name]["tokens"] * width)
            file.seek(0, os.SEEK_END)
            if done[name]["tokens"] == 0:  # the first sample's first token is predicted from this one
                file.write(np.array([tokenizer.eos_id], dtype=dtype))
                done[name]["tokens"] = 1
        for chunk in read_chunks(corpus, done["bytes"]):
            run.check_stop()
            for samples in _batches(split_samples(chunk, corpus, done["rows"] + 1)):
                # bytes, not str: the hash is of the text as it was read
                held_out = [zlib.crc32(s) < val_split * 2**32 for s in samples]
                encoded = tokenizer.encode_batch([s.decode("utf-8") for s in samples])
                for name, is_val in (("train", False), ("val", True)):
                    own = [i for i, held in enumerate(held_out) if held == is_val]
                    flat = np.fromiter((token for i in own for token in (*encoded[i], tokenizer.eos_id)), dtype=dtype)
                    files[name].write(flat)
                    count = done[name]
                    count["tokens"] += len(flat)
                    count["samples"] += len(own)
                    count["text_bytes"] += sum(len(samples[i]) + 1 for i in own)
                done["dialogues"] += sum(b"<|assistant|>" in sample for sample in samples)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            done["sha256"] = _chain(done["sha256"], chunk)
            done["bytes"] += len(chunk)
            done["rows"] += count_lines(chunk)
            filled = sum(map(bool, map(bytes.strip, chunk.removeprefix(codecs.BOM_UTF8).splitlines())))
            done["lines"] += filled
            done["blank"] += len(chunk.splitlines()) - filled
            write_sealed_json(progress_path, done)
            bar.update(len(chunk))
    if file_stat(corpus) != stat:
        raise UserError(f"{corpus}: changed while it was read. Run the same command again when it is complete")
    if not done["train"]["samples"] + done["val"]["samples"]:
        raise UserError(f"{corpus}: expected lines of text, found none")
    for name in ("train", "val"):
        path = folder / f"{name}.bin"
        done[name] |= {"sha256": file_sha256(path), "stat": file_stat(path)}
    write_sealed_json(folder / "meta.json", {k: v for k, v in done.items() if k not in ("bytes", "rows")})
    progress_path.unlink()


def _batches(samples: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lists of about ``_ENCODED_BYTES``."""
    batch, size = [], 0
    for sample in samples:
        batch.append(sample)
        size += len(sample)
        if size >= _ENCODED_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------
# Sequences


class PackedTokens:
    """The tokens of a split as sequences of ``ctx_len`` inputs and targets; sequence ``i`` is a slice of the file.

    Args:
        keep_tail: also yield the last, shorter sequence, padded with ignored targets. Validation does, so that it
            covers every token; training leaves it out.
        context_weight: weight of a target outside answers; inside, it is 1.
        answer_ids: tokens that begin and end an answer.

    Raises:
        UserError: the split does not fill one sequence.
    """

    def __init__(
        self,
        tokens: TokenFile | JoinedTokens,
        ctx_len: int,
        *,
        keep_tail: bool = False,
        context_weight: float = 1.0,
        answer_ids: tuple[int, int] | None = None,
    ) -> None:
        self.tokens, self.ctx_len = tokens, ctx_len
        self.context_weight, self.answer_ids = context_weight, answer_ids
        targets = tokens.tokens - 1
        self.sequences = -(-targets // ctx_len) if keep_tail else targets // ctx_len
        if not keep_tail and self.sequences == 0:
            raise UserError(
                f"{tokens.path}: expected at least ctx_len + 1 = {ctx_len + 1} tokens, found {tokens.tokens}. "
                "Lower ctx_len, or give a longer corpus"
            )
        self._array: np.ndarray | JoinedArray | None = None

    def __len__(self) -> int:
        return self.sequences

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_array": None}  # a worker opens its own map; pickled, it would be the whole file

    def batch(self, rows: np.ndarray, epoch: int) -> dict:
        """``tokens`` and ``targets`` (B, ctx_len) int64, the targets one token ahead; a dummy row if ``rows`` is empty.
        With a ``context_weight`` also ``weights`` (B, ctx_len) of the targets, whose sum is then ``n_targets``."""
        if self._array is None:
            self._array = self.tokens.open()
        window = np.full((max(1, len(rows)), self.ctx_len + 1), IGNORE_INDEX, dtype=np.int64)
        for line, row in zip(window, rows, strict=False):
            piece = self._array[row * self.ctx_len : (row + 1) * self.ctx_len + 1]
            line[: len(piece)] = piece
        window = torch.from_numpy(window)
        tokens, targets = window[:, :-1].clamp(min=0), window[:, 1:].contiguous()
        batch = {"tokens": tokens, "targets": targets, "n_targets": int((targets != IGNORE_INDEX).sum())}
        if self.context_weight != 1.0:
            weights = torch.where(in_answers(tokens, *self.answer_ids), 1.0, self.context_weight)
            batch |= {
                "weights": weights,
                "n_targets": float(weights[targets != IGNORE_INDEX].sum()),
                "n_tokens": batch["n_targets"],
            }
        return batch


def in_answers(tokens: Tensor, begin: int, end: int) -> Tensor:
    """(B, T) bool: whether the token after a position belongs to an answer: after ``begin``, up to ``end``. The rest of
    an answer that began in an earlier sequence counts as context, since the sequence does not show its beginning."""
    at = torch.arange(tokens.shape[1]).expand_as(tokens)
    begun, ended = (torch.where(tokens == mark, at, -1).cummax(dim=1).values for mark in (begin, end))
    return begun > ended
