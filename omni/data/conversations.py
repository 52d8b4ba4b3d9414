"""Reads conversations in the formats of common data sets as messages of this project.

- this project, Qwen2-VL, Qwen2-Audio: ``messages``, contents of parts ``{"type": "image", "image": NAME}`` and
  ``{"type": "audio", "audio": NAME}`` or ``"audio_url": NAME``
- OpenAI's chat API: ``messages``, parts ``{"type": "image_url", "image_url": {"url": NAME}}`` and
  ``{"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}``
- transformers and TRL: ``messages``, parts ``{"type": "image", "url": NAME}`` (or ``"path"``), or ``{"type": "image"}``
  with ``images: [NAME]`` beside the messages
- ShareGPT (FastChat): ``conversations: [{"from": "human", "value": TEXT}, {"from": "gpt", ...}]``, perhaps ``system``
- LLaVA (docs/Finetune_Custom_Data.md): as ShareGPT, with ``<image>`` in a text and ``image: NAME`` beside
- LlamaFactory (data/README.md): either key, with ``<image>`` and ``<audio>`` in texts, ``images`` and ``audios`` beside
- Alpaca: ``instruction``, ``input`` (may be empty) and ``output``; LlamaFactory adds ``history: [[TEXT, TEXT], ...]``
- Qwen-VL, Qwen-Audio: ``conversations``, with ``<img>NAME</img>`` and ``<audio>NAME</audio>`` in texts

NAME is a file or a data URI. A tag is the place of its picture or recording; one line break on either side of a tag
belongs to the tag. Each tag needs its file and each file its tag, except that a single picture or recording without a
tag goes before the first question, as in LLaVA. Other rows are bad: an answer must not be learnt without its picture.
"""

import json
import re
from urllib.parse import unquote, urlsplit

from omni.common.errors import BadRow
from omni.common.media import is_data_uri, quoted

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
_PAIR = ("user", "assistant")
# a part's type -> its kind; a kind -> the keys that may name its file
_KINDS = {
    "text": "text", "input_text": "text", "output_text": "text",
    "image": "image", "image_url": "image", "input_image": "image",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
}  # fmt: skip
_KEYS = {
    "image": ("image", "image_url", "url", "path"),
    "audio": ("audio", "audio_url", "input_audio", "url", "path"),
}
_TAG = re.compile(r"\n?<(?:(img|audio)>([^<>\n]+)</\1|(image|audio|video))>\n?")
_TAG_KINDS = {"img": "image", "image": "image", "audio": "audio", "video": "video"}


def read_conversation(row: dict) -> list[dict]:
    """A row's conversation as messages ``{"role": "system" | "user" | "assistant", "content": ...}`` that end with an
    answer. A content is a text or, of a user, also a list of parts: ``{"type": "text", "text": ...}``, ``{"type":
    "image", "image": NAME}``, ``{"type": "audio", "audio": NAME, "text": transcript, "" if unknown}``.

    Raises:
        BadRow: the row has no conversation, tags and files do not match, or a part is no text, picture or recording.
    """
    name = next((name for name in ("messages", "conversations") if name in row), "messages")
    turns = _alpaca(row) if name not in row and "instruction" in row and "output" in row else row.get(name)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow(f'expected a list of objects in "messages" or "conversations", found {_shown(turns)}')
    beside = _Beside(row)
    messages = [_message(turn, beside) for turn in turns]
    if isinstance(system := row.get("system"), str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if messages[-1]["role"] != "assistant":
        raise BadRow("expected an assistant's answer as the last message")
    beside.give_out_what_is_left(messages)
    return messages


def _alpaca(row: dict) -> list[dict]:
    """Stanford Alpaca's columns as turns; the history of a row comes first."""
    history = row.get("history") or []
    good = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    parts = [row["instruction"], row.get("input") or ""]
    if not good or not all(isinstance(part, str) for part in parts):
        raise BadRow(f'expected texts in "instruction" and "input", pairs in "history", found {_shown(row)}')
    asked = "\n".join(part for part in parts if part.strip())
    pairs = [*history, [asked, row["output"]]]
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(_PAIR, pair, strict=True)]


class _Beside:
    """Files that a row names beside its conversation: tags in the text take each of them once, in order."""

    def __init__(self, row: dict) -> None:
        self.names = {kind: _names(row, kind) + _names(row, f"{kind}s") for kind in ("image", "audio", "video")}
        if self.names["video"]:
            raise BadRow("a film: expected text, pictures and recordings")
        self.parts = {"image": 0, "audio": 0}  # number of parts in the messages

    def take(self, kind: str) -> str:
        if not self.names[kind]:
            raise BadRow(f'no file name for an <{kind}> tag: expected one in "{kind}" or "{kind}s" for each')
        return self.names[kind].pop(0)

    def give_out_what_is_left(self, messages: list[dict]) -> None:
        for kind in ("image", "audio"):
            left = self.names[kind]
            if not left:
                continue
            first = next((message for message in messages if message["role"] == "user"), None)
            if self.parts[kind] or len(left) > 1 or first is None:
                raise BadRow(f'{len(left)} in "{kind}" or "{kind}s" without an <{kind}> tag in the text')
            content = first["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            first["content"] = [_media(kind, left.pop()), *parts]


def _names(row: dict, key: str) -> list:
    value = row.get(key)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def _message(turn: dict, beside: _Beside) -> dict:
    role, content = (turn.get(name, turn.get(other)) for name, other in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"expected the roles system, user and assistant, found {_shown(role)}")
    role = ROLES[role]
    if isinstance(content, str):
        parts = _text_parts(content, beside)
        if parts == [{"type": "text", "text": content}]:  # no tag
            parts = content
    elif isinstance(content, list) and content:
        parts = [part for given in content for part in _parts(given, beside)]
        if role != "user" and all(part["type"] == "text" for part in parts):
            parts = "".join(part["text"] for part in parts)
    else:
        raise BadRow(f'expected text, or of a user a list of parts in "content", found {_shown(content)}')
    if role == "assistant" and (not isinstance(parts, str) or not parts.strip()):
        raise BadRow(f"expected text in an answer, found {_shown(content)}")
    return {"role": role, "content": parts}


def _text_parts(text: str, beside: _Beside) -> list[dict]:
    """A text as parts: the text between its tags, and the tags' files."""
    parts, at = [], 0
    for tag in _TAG.finditer(text):
        parts += [{"type": "text", "text": text[at : tag.start()]}] * (tag.start() > at)
        kind, at = _TAG_KINDS[tag[1] or tag[3]], tag.end()
        if kind == "video":
            raise BadRow("a <video> tag: expected text, pictures and recordings")
        parts.append(_media(kind, tag[2] or beside.take(kind)))
        beside.parts[kind] += 1
    return parts + [{"type": "text", "text": text[at:]}] * (at < len(text) or not parts)


def _parts(given, beside: _Beside) -> list[dict]:
    """One element of a list of parts, as parts: a text may have tags."""
    if not isinstance(given, dict):
        raise BadRow(f"expected a part of type text, image or audio, found {_shown(given)}")
    kind = _KINDS.get(given.get("type") or next((key for key in ("text", "image", "audio") if key in given), None))
    if kind == "text" and isinstance(given.get("text"), str):
        return _text_parts(given["text"], beside)
    if kind not in _KEYS:
        raise BadRow(f"expected a part of type text, image or audio, found {_shown(given)}")
    beside.parts[kind] += 1
    source = next((given[key] for key in _KEYS[kind] if given.get(key) is not None), None)
    text = given.get("text", "") if kind == "audio" else ""
    return [_media(kind, beside.take(kind) if source is None else _source(source), text)]


def _source(source):
    """The name in an object such as ``{"url": NAME}``; bytes in ``{"data": BASE64, "format": "wav"}`` as a data URI."""
    if not isinstance(source, dict):
        return source
    data = source.get("data")
    if isinstance(data, str) and not is_data_uri(data):
        return f"data:audio/{source.get('format', 'wav')};base64,{data}"
    return data or source.get("url") or source.get("path")


def _media(kind: str, name, text: str = "") -> dict:
    if isinstance(name, dict):
        name = _source(name)
    if not isinstance(name, str):
        raise BadRow(f"expected a file name, found {_shown(name)}")
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    if name.startswith(("http://", "https://")):
        raise BadRow(f"{quoted(name)}: expected a file, found an address. Download it first")
    return {"type": kind, kind: name} | ({"text": str(text)} if kind == "audio" else {})


def _shown(value) -> str:
    return quoted(json.dumps(value, ensure_ascii=False)[:200])
