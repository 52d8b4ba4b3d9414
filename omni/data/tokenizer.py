"""Text to token ids and back: byte-level BPE with chat tokens, kept in one ``tokenizer.json``.

Every byte is in the vocabulary, and nothing is normalised or stripped, so ``decode(encode(text)) == text`` for any
text that UTF-8 can encode. ``tokenizers`` and ``transformers`` open the file as it is.

Source: byte-level BPE as in GPT-2 (Radford et al. 2019), on BPE for words (Sennrich et al. 2016).
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from omni.common.errors import UserError
from omni.common.files import parse_json, read_text, replace_file
from omni.common.media import quoted

IGNORE_INDEX = -100  # target of a position that has no loss
END_OF_TEXT = "<|endoftext|>"
ASSISTANT, END = "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (  # the position is the id, in every vocabulary that is trained here
    END_OF_TEXT, "<|system|>", "<|user|>", ASSISTANT, END,
    "<|image_start|>", "<|image|>", "<|image_end|>",
    "<|audio_start|>", "<|audio|>", "<|audio_end|>", "<|speech|>",
    "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>",
)  # fmt: skip
ROLES = ("system", "user", "assistant")
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def chat_template(prompt: str = "") -> str:
    """``CHAT_TEMPLATE`` for a model that was trained with ``prompt`` as the system message of every conversation that
    has none of its own."""
    if not prompt:
        return CHAT_TEMPLATE
    system = json.dumps(f"<|system|>{prompt}", ensure_ascii=False)  # a string in JSON is one in Jinja
    return "{% if messages[0]['role'] != 'system' %}{{ " + system + " }}{% endif %}" + CHAT_TEMPLATE


def _byte_of_symbol() -> dict[str, int]:
    """Visible character -> byte, as byte-level BPE writes it: the byte itself if it prints, else the next from 256."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _without_merges() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def difference(tokenizer: tokenizers.Tokenizer, empty: tokenizers.Tokenizer) -> str | None:
    """How ``tokenizer`` differs from ``empty`` in anything but vocabulary and merges; None if it does not.

    A normaliser, for example, could turn one letter into a gigabyte.
    """
    found, expected = (json.loads(one.to_str()) for one in (tokenizer, empty))
    added = found["added_tokens"]
    if any(token[key] != value for token in added for key, value in _ADDED.items()):
        return 'key "added_tokens": expected special tokens that change nothing beside them'
    for whole in (found, expected):
        whole["added_tokens"], whole["model"]["vocab"], whole["model"]["merges"] = [], {}, []
        whole |= {f"model.{key}": value for key, value in whole.pop("model").items()}
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            return f'key "{key}": expected {json.dumps(expected.get(key))}, found {quoted(json.dumps(found.get(key)))}'
    return None


def check_ids(serialized: str) -> None:
    """Check a ``tokenizer.json`` before the library reads it, which allocates memory up to the highest id.

    Raises:
        ValueError: the ids have gaps, or do not begin at 0.
    """
    whole = parse_json(serialized)
    ids = {*whole["model"]["vocab"].values(), *(token["id"] for token in whole["added_tokens"])}
    if ids != set(range(len(ids))):
        raise ValueError(f"expected ids from 0 to {len(ids) - 1}, found others")


def check_size(tokenizer: "Tokenizer", path: Path, vocab_size: int) -> None:
    """
    Args:
        tokenizer: tokenizer read from ``path``; may be a ``CtcTokenizer``.
        vocab_size: vocabulary size of the model beside it.

    Raises:
        UserError: the two differ.
    """
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{path}: expected {vocab_size} entries as in the model, found {tokenizer.vocab_size}. "
            "The two files are not of one run"
        )


class Tokenizer:
    """Byte-level BPE. Build one with ``train`` or ``load``."""

    def __init__(self, serialized: str):
        """``serialized``: the text of a ``tokenizer.json``."""
        self.serialized = serialized
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        # A second one, since ``encode_special_tokens`` is state, and switching it would be a race.
        self._plain = tokenizers.Tokenizer.from_str(serialized)
        self._plain.encode_special_tokens = True
        self.eos_id = self.token_id(END_OF_TEXT)
        self.end_id = self.token_id(END)
        self.answer_ids = self.token_id("<|assistant|>"), self.end_id  # tokens around an assistant's answer

    def __reduce__(self):
        # as text: the library's own pickle loses ``encode_special_tokens``
        return type(self), (self.serialized,)

    @classmethod
    def train(cls, lines: Iterator[str], vocab_size: int) -> Self:
        """Learn merges from ``lines``, read once as a stream.

        Args:
            vocab_size: upper bound; a small corpus has fewer merges to give.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f'key "vocab_size": expected at least {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special '
                f"tokens), found {vocab_size}"
            )
        tokenizer = _without_merges()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer.to_str())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a ``tokenizer.json``.

        Raises:
            UserError: the file is missing, damaged, or not a tokenizer of this kind.
        """
        serialized = read_text(path, "tokenizer")
        try:
            check_ids(serialized)
            tokenizer = cls(serialized)
            for name in SPECIAL_TOKENS:
                tokenizer.token_id(name)
        except KeyError as error:
            raise UserError(f"{path}: not a tokenizer of μOmni: it has no token {error.args[0]}") from error
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: damaged tokenizer: {' '.join(str(error).split())}") from error
        expected, symbols = "expected a byte-level tokenizer, as train_text.py writes it", set(_byte_of_symbol())
        if (reason := difference(tokenizer._tokenizer, _without_merges())) is not None:
            raise UserError(f"{path}: {expected}: {reason}")
        added = {token.content for token in tokenizer._tokenizer.get_added_tokens_decoder().values()}
        learnt = [token for token in tokenizer._tokenizer.get_vocab() if token not in added]
        if not symbols <= set(learnt) or not symbols.issuperset("".join(learnt)):
            raise UserError(f"{path}: {expected}: its tokens are not those of bytes")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write ``path`` whole or not at all: a reader, or a killed run, never sees half a file."""
        serialized = self._tokenizer.to_str(pretty=True).encode()
        replace_file(Path(path), lambda file: file.write(serialized))

    @property
    def sha256(self) -> str:
        """SHA-256 of the loaded file."""
        return hashlib.sha256(self.serialized.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Actual number of entries, special tokens included."""
        return self._tokenizer.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's canonical JSON: the same for every file that encodes the same way."""
        canonical = json.dumps(json.loads(self._tokenizer.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def token_id(self, name: str) -> int:
        """The id of a token given as text, for example ``<|audio|>``. KeyError if there is none."""
        token_id = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise KeyError(name)
        return token_id

    @property
    def units(self) -> list[str]:
        """The text of each token, in order of the ids; a part of a character becomes U+FFFD."""
        return [self.decode([i]) for i in range(self.vocab_size)]

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Token ids of ``text``.

        Args:
            allow_special: whether ``<|user|>`` and the like in the text become their token. False spells them out as
                ordinary text: what a user types can then never pass for a role.
        """
        return (self._tokenizer if allow_special else self._plain).encode(text).ids

    def encode_batch(self, texts: list[str], allow_special: bool = True) -> list[list[int]]:
        """``encode`` of many texts, on all cores."""
        tokenizer = self._tokenizer if allow_special else self._plain
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]

    def byte_counts(self, ids: list[int]) -> list[int]:
        """Number of bytes of text of each token; 0 for a special one."""
        special = self._tokenizer.get_added_tokens_decoder()
        return [0 if i in special else len(self._tokenizer.id_to_token(i)) for i in ids]  # one character per byte

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Text of ``ids``. Bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def chat_prompt(self, messages: list[dict[str, str]], generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, as ``CHAT_TEMPLATE`` writes it.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": text}``, oldest first. Contents are text
                only: special tokens in them are spelled out.
            generation_prompt: end with ``<|assistant|>``, which asks for an answer. False for training rows.
        """
        ids = []
        for message in messages:
            if message["role"] not in ROLES:
                raise ValueError(f"expected a role of {ROLES}, found {message['role']!r}")
            ids.append(self.token_id(f"<|{message['role']}|>"))
            ids += self.encode(message["content"], allow_special=False)
            if message["role"] == "assistant":
                ids.append(self.end_id)
        return ids + [self.token_id("<|assistant|>")] if generation_prompt else ids


class StreamDecoder:
    """Decodes ids one by one. A character of several tokens is returned once it is complete.

    The results of ``push`` and ``flush``, joined, are ``tokenizer.decode(ids, skip_special)``.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer = tokenizer._tokenizer
        self._skipped = set(self._tokenizer.get_added_tokens_decoder()) if skip_special else set()
        self._byte_of_symbol = _byte_of_symbol()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; often a word, sometimes nothing yet."""
        if token_id in self._skipped:
            return ""
        symbols = self._tokenizer.id_to_token(token_id)
        return self._utf8.decode(bytes(self._byte_of_symbol[symbol] for symbol in symbols))

    def flush(self) -> str:
        """The rest: U+FFFD for an incomplete character, else nothing."""
        return self._utf8.decode(b"", final=True)
