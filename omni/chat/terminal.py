"""A conversation in the terminal: answers on stdout, everything else on stderr."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import BinaryIO

from omni.chat.assistant import CHARACTERS_PER_TOKEN, AnswerStates, Assistant, check_text_length, message
from omni.chat.text import clean, media_named, without_controls
from omni.common.errors import UserError
from omni.common.media import quoted, visible

COMMANDS = ("/image FILE", "/audio FILE", "/video FILE", "/drop", "/reset", "/quit")


class Conversation:
    """The messages so far, and the attachments of the next one.

    Args:
        sampling: as in ``Assistant.answer``.
        complete: continue each text as it stands, without chat tokens.
        system: a system message to begin with.
    """

    def __init__(
        self, assistant: Assistant, sampling: dict, *, complete: bool = False, system: str | None = None
    ) -> None:
        self.assistant, self.sampling, self.complete, self.system = assistant, sampling, complete, system
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": clean(self.system)}] if self.system else []
        self.drop()

    def drop(self) -> None:
        self.attached = []
        self.has_recording = False  # it may be the question, without a text
        self.missing, self.waiting = [], None  # failed attachments, and the question that waits for them

    def attach(self, command: str, name: str, video_frames: int | None = None) -> None:
        """Carry out ``/image``, ``/audio`` or ``/video``.

        Raises:
            UserError: the file cannot be read. The next question then waits for the missing attachment.
        """
        try:
            if not name:
                raise UserError(f"{command}: expected a file after it")
            path = media_named(name)
            if command == "/video":
                frames, total = self.assistant.video(path, video_frames)
                print(f"{quoted(path)}: {len(frames)} of {total} frames", file=sys.stderr)
                self.attached += frames
            else:
                self.attached.append(self.assistant.image(path) if command == "/image" else self.assistant.sound(path))
        except UserError:
            self.missing, self.waiting = [*self.missing, f"{command} {name}".strip()], None
            raise
        self.has_recording = self.has_recording or command == "/audio"
        corrected = next((failed for failed in self.missing if failed.split()[0] == command), None)
        self.missing, self.waiting = [failed for failed in self.missing if failed != corrected], None

    def ask(self, text: str) -> tuple[Iterator[str], AnswerStates]:
        """Returns the pieces of the answer to ``text`` and the attachments, each printed and added to the conversation
        when it is taken; and the Thinker's states, of the answer so far.

        Raises:
            UserError: the text is too long, or an attachment is missing; the conversation does not change.
        """
        if self.missing and text != self.waiting:
            self.waiting = text
            missing = ", ".join(quoted(name) for name in self.missing)
            raise UserError(
                f"{missing}: not attached, so the question waits. Attach it, or go on without: /drop, or the same "
                f"question again"
            )
        self.missing, self.waiting = [], None
        answer, answer_states = {"role": "assistant", "content": ""}, AnswerStates()
        if self.complete:
            check_text_length(text, self.assistant.ctx_len)
            tokenizer = self.assistant.tokenizer
            # in training, each text follows the end of another
            prompt = [tokenizer.eos_id, *tokenizer.encode(text)]
            self.assistant.check_room(prompt)
            return printed(self.assistant.answer(prompt, answer_states, **self.sampling), answer), answer_states
        messages = [*self.messages, message(self.attached, text)]
        prompt = self.assistant.prompt(messages, self.sampling["max_new_tokens"], tell)
        notes: list[str] = []  # for below the answer
        pieces = self.assistant.answer(prompt, answer_states, notes.append, **self.sampling)
        self.messages = [*messages, answer]
        self.drop()
        return printed(pieces, answer, notes), answer_states


def tell(line: str) -> None:
    print(line, file=sys.stderr)


def printed(pieces: Iterator[str], answer: dict, notes: Sequence[str] = ()) -> Iterator[str]:
    """The pieces of an answer, added to its content, and printed: on a terminal each as it comes, else all at the
    end. Then the notes, on stderr."""
    streaming = sys.stdout.isatty()
    try:
        for piece in pieces:
            answer["content"] += piece
            if streaming:
                print(without_controls(piece), end="", flush=True)
            yield piece
    finally:  # also of an answer that is stopped
        print("" if streaming else without_controls(answer["content"]), flush=True)
        for note in notes:
            tell(note)


def looks_like_a_command(word: str) -> bool:
    """Whether a line's first word is a command misspelt, or a wish for help; "/etc" is not."""
    names = [*(command.split()[0] for command in COMMANDS), "/help", "/exit", "/clear"]
    return bool(re.fullmatch("/[A-Za-z]+", word)) and bool(get_close_matches(word.lower(), names, cutoff=0.75))


def converse(conversation: Conversation, answer: Callable[[str], None]) -> None:
    """Call ``answer`` with each question of the input, a line each. An error ends its line only, Ctrl-C its answer."""
    longest = conversation.assistant.ctx_len * CHARACTERS_PER_TOKEN
    while (line := read_line(longest)) is not None and line.strip() != "/quit":
        command, *name = line.split(maxsplit=1) or [""]
        try:
            if command in ("/reset", "/drop") and not name:
                conversation.reset() if command == "/reset" else conversation.drop()
            elif command in ("/image", "/audio", "/video") and not conversation.complete:
                conversation.attach(command, "".join(name).strip())
            elif looks_like_a_command(command) and not conversation.complete:
                raise UserError(f"{command}: expected one of {', '.join(COMMANDS)}, or a question")
            elif line.strip() or conversation.has_recording:
                with contextlib.suppress(KeyboardInterrupt):
                    answer(line)
        except UserError as error:
            print(f"error: {visible(str(error))}", file=sys.stderr)


def read_line(longest: int) -> str | None:
    """The user's next line; None at the end of the input. Ctrl-C clears the line.

    Args:
        longest: in characters; a longer line is cut.
    """
    if sys.stdin is None:
        raise UserError("expected --text, or a conversation on stdin; found it closed")
    while True:
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                return clean(input("you> "))
            print("you> ", end="", file=sys.stderr, flush=True)
            return _read_bounded(sys.stdin.buffer, longest)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return None


def _read_bounded(file: BinaryIO, longest: int) -> str:
    """
    Raises:
        EOFError: the input has ended.
    """
    line = file.readline(4 * longest + 8)  # a character has up to four bytes
    if not line:
        raise EOFError
    end = line
    while end and not end.endswith(b"\n"):
        end = file.readline(1 << 20)
    return line.decode("utf-8", "replace").rstrip("\r\n")
