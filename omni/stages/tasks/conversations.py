"""Conversations with any number of pictures and recordings, as other programs' data sets write them."""

import numpy as np

from omni.data.conversations import read_conversation
from omni.data.manifest import place_of
from omni.stages.tasks.base import SftTask, listed_texts, sft_task


@sft_task
class Conversations(SftTask):
    """JSON or JSONL rows of conversations, as ``omni.data.conversations`` reads them. An answer in free words has other
    right wordings, so its likelihood is judged, unless the column ``accepted_answers`` lists right answers."""

    name, file_key, split_by, measure = "conversation", "jsonl_path", "messages", "rank_among_64"
    reads, cacheable = ("image", "audio"), False

    def messages(self, row: dict, rng: np.random.Generator | None) -> list[dict]:
        place = place_of(row)
        return [message | {"content": self._parts(message["content"], place)} for message in read_conversation(row)]

    def measures_of(self, row: dict) -> tuple[str, ...]:
        return ("exact",) if listed_texts(row, "accepted_answers") else (self.measure,)

    def _parts(self, content: str | list[dict], place: dict) -> str | list[dict]:
        if isinstance(content, str):
            return content
        parts = {
            "text": lambda part: part,
            "image": lambda part: self.image(part | place),
            "audio": lambda part: self.recording({"wav": part["audio"], "text": part["text"]} | place),
        }
        return [parts[part["type"]](part) for part in content]
