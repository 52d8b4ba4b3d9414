"""Dialogues in the chat format, one a line; or all lines of a file without dialogues."""

import re
from pathlib import Path

import numpy as np

from omni.common.errors import BadRow, TooLong
from omni.data.manifest import Manifest
from omni.data.text_rows import load_text
from omni.data.tokenizer import END
from omni.stages.tasks.base import ALL, NOTHING, SftTask, sft_task
from omni.stages.tasks.measures import References
from omni.stages.tasks.processor import Encoded


@sft_task
class Dialogues(SftTask):
    """Lines of a text file. In a line that is no dialogue, all tokens are targets; it is not scored."""

    name, file_key = "text", "text_path"

    @classmethod
    def open(cls, path: str | Path, **how) -> Manifest:
        return load_text(path, **how)

    def read(self, row: dict, rng: np.random.Generator | None) -> tuple[Encoded, References]:
        if self.manifest.format.dialogues:
            return super().read(row, rng)
        return self.processor.encode_text(row["text"]), References()

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        return parse_dialogue(row["text"])

    def room(self, row: dict) -> int:
        if self.manifest.format.dialogues:
            return super().room(row)
        try:
            self.processor.encode_text(row["text"])
        except TooLong:
            return NOTHING
        return ALL


def parse_dialogue(line: str) -> list[dict]:
    """``<|user|>Hello<|assistant|>Hello!<|end|>`` as messages.

    Raises:
        BadRow: the line does not begin with a role or end with an answer, or an answer has no ``<|end|>``.
    """
    before, *found = re.split(r"<\|(system|user|assistant)\|>", line)
    messages = []
    for role, content in zip(found[::2], found[1::2], strict=True):
        text, end, after = content.partition(END)
        if role == "assistant" and (not end or not text.strip()):
            raise BadRow(f'expected an answer and {END} after <|assistant|>, found "{content[:40]}"')
        if after.strip() or (end and role != "assistant"):
            raise BadRow(f'expected a role after {END}, found "{(after or content)[:40]}"')
        messages.append({"role": role, "content": text})
    if before.strip() or not messages or messages[-1]["role"] != "assistant":
        raise BadRow(f'expected <|user|>...<|assistant|>...{END}, found "{line[:40]}"')
    return messages
