"""Lines of a text file: its dialogues, or all lines of a file without dialogues."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni.common.errors import UserError
from omni.data.formats.base import Format, Rows
from omni.data.lines import line_spans, read_chunks
from omni.data.records import decode
from omni.data.tokenizer import ASSISTANT


@dataclass
class TextLines(Format):
    name = "text"

    dialogues: bool = False  # whether only lines with an assistant's answer are rows

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        return False  # a text may have any name: it is opened by ``omni.data.text_rows``

    @staticmethod
    def chunks(path: Path) -> Iterator[bytes]:
        return read_chunks(path)

    def read(self, data: bytes | None, columns: list[str] | tuple[str, ...]) -> dict:
        return {"text": decode(data).strip()}

    def index(self, path: Path, chunks: Iterator[bytes], columns: tuple[str, ...], key: str) -> Rows:
        at = number = blank = others = 0
        found: dict[bool, list[tuple[int, int, int, int]]] = {True: [], False: []}  # dialogues, and other lines
        for chunk in chunks:
            for start, end in line_spans(chunk, path, number + 1):
                number, line = number + 1, chunk[start:end]
                if not line.strip():
                    blank += 1
                    continue
                dialogue = ASSISTANT.encode() in line
                others += not dialogue
                if dialogue or not found[True]:
                    found[dialogue].append((at + start, at + end, number, zlib.crc32(line)))
            at += len(chunk)
        self.dialogues = bool(found[True])
        rows = found[self.dialogues]
        if not rows:
            raise UserError(f"{path}: expected lines of text, found none")
        kind = "dialogues" if self.dialogues else "lines (no dialogues: they are learnt as text)"
        assert number == len(rows) + blank + (others if self.dialogues else 0), f"{path}: lines that are in no count"
        rest = f" + {others:,} left out, no dialogues" if self.dialogues and others else ""
        summary = f"{number:,} lines = {len(rows):,} {kind}{rest} + {blank:,} blank"
        table = np.array(rows, np.uint64)
        return Rows(table[:, :2], table[:, 3].astype(np.uint32), summary, numbers=table[:, 2])
