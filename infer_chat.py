"""Talk to a trained model: ``python infer_chat.py --ckpt_dir checkpoints/thinker_demo --text "Hello"``.

``--ckpt_dir`` is a folder of stage A, of stage E or an exported one, which is all that is needed then. With ``--text``
or a recorded question it answers once, and stdout holds the answer and nothing else. Without, it holds a conversation:
``/image FILE``, ``/audio FILE`` and ``/video FILE`` attach something to the next message, ``/drop`` takes it away
again, ``/reset`` forgets the conversation, ``/quit`` or Ctrl-D leaves, Ctrl-C stops an answer. A FILE may be dragged
into the window; here as in the options it may also be a data URI.

    python infer_chat.py --ckpt_dir merged_model --image cat.png --text "What is in the picture?" --audio_out answer.wav
    python infer_chat.py --ckpt_dir merged_model --audio_in question.wav
    python infer_chat.py --ckpt_dir merged_model --ocr --image sign.png
    python infer_chat.py --ckpt_dir merged_model --say "Anna is reading at the market." --audio_out anna.wav

``--say`` speaks a text as it is given, ``--ocr`` reads a picture of a line of text. Parts that ``--ckpt_dir`` does not
have come from the folders of their stages: ``--talker_ckpt``, ``--vocoder_ckpt``, ``--ocr_ckpt``; ``--say`` and
``--ocr`` also take stage D's and stage G's folder as ``--ckpt_dir``.
"""

import argparse
import io
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import soundfile

from omni.assistant import (
    CHARACTERS_PER_TOKEN,
    MAX_SPOKEN_BYTES,
    Assistant,
    Thoughts,
    check_text_length,
    clean,
    load_reader,
    load_speaker,
    media_named,
    message,
    read_picture,
    sentences,
    spoken,
    without_controls,
)
from omni.errors import UserError
from omni.files import replace_file
from omni.media import Media, quoted, visible
from omni.runtime import OneLineErrors, launch, pick_device
from omni.speech import MAX_SECONDS, Speaker


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", required=True, type=Path, help="folder of stage A or E, or an exported one")
    parser.add_argument("--text", help="answer this and exit; without it: a conversation")
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture; repeatable")
    parser.add_argument("--audio_in", metavar="FILE", action="append", default=[], help="a recording; repeatable")
    parser.add_argument(
        "--video", metavar="FILE", action="append", default=[],
        help="a film (MP4, WebM ...), an animated GIF, WebP or PNG, or a folder of pictures; repeatable",
    )  # fmt: skip
    parser.add_argument("--video_frames", metavar="N", type=int, help="look at N frames of a video (as many as fit)")
    parser.add_argument(
        "--audio_out", metavar="FILE.wav", type=Path, help="speak the answer into it (a conversation: FILE_1.wav ...)"
    )
    parser.add_argument("--say", metavar="TEXT", help="speak this text into --audio_out and exit")
    parser.add_argument("--ocr", action="store_true", help="print the text of each --image and exit")
    parser.add_argument("--talker_ckpt", metavar="DIR", type=Path, help="folder of stage D, to speak")
    parser.add_argument("--vocoder_ckpt", metavar="DIR", type=Path, help="folder of stage F (default: Griffin-Lim)")
    parser.add_argument("--ocr_ckpt", metavar="DIR", type=Path, help="folder of stage G, for --ocr")
    parser.add_argument("--system", help="a system message to begin the conversation with")
    parser.add_argument("--complete", action="store_true", help="continue the text as it stands, without chat tokens")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer, in tokens (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest tokens that together have this share")
    parser.add_argument("--seed", type=int, help="the same seed draws the same answer")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: a value is out of range, or options do not go together.
    """
    for name, holds, expected in (
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", args.temperature == 0 or 0.01 <= args.temperature <= 100, "0, or 0.01 to 100"),
        ("top_k", args.top_k is None or args.top_k >= 1, "at least 1"),
        ("top_p", args.top_p is None or 0 < args.top_p <= 1, "more than 0, at most 1"),
        ("seed", args.seed is None or 0 <= args.seed < 2**63, "0 to 2^63 - 1"),
        ("video_frames", args.video_frames is None or args.video_frames >= 1, "at least 1"),
    ):
        if not holds:
            raise UserError(f"--{name}: expected {expected}, found {getattr(args, name)}")
    for name in ("top_k", "top_p"):
        if getattr(args, name) is not None and args.temperature == 0:
            raise UserError(f"--{name}: expected a --temperature above 0 with it, to draw from what it leaves")
    if args.say is not None and args.ocr:
        raise UserError("--say: expected no --ocr beside it")
    if args.say is not None:
        if args.text is not None:
            raise UserError("--say: expected no --text beside it: the one is spoken as it stands, the other answered")
        if args.audio_out is None:
            raise UserError("--say: expected --audio_out FILE.wav beside it")
        if not args.say.strip() or len(args.say.encode(errors="replace")) > MAX_SPOKEN_BYTES:
            raise UserError(f"--say: expected a text of 1 to {MAX_SPOKEN_BYTES:,} bytes")
        without_effect(args, "--say", "image", "audio_in", "video", "system", "complete", "top_p", "ocr_ckpt")
    elif args.ocr:
        if not args.image:
            raise UserError("--ocr: expected an --image FILE beside it, the picture to read")
        others = ("text", "audio_in", "video", "system", "complete", "audio_out", "talker_ckpt", "vocoder_ckpt")
        without_effect(args, "--ocr", *others, "temperature")
    elif args.ocr_ckpt is not None:
        raise UserError("--ocr_ckpt: expected --ocr beside it")
    if args.audio_out is not None:
        written_to(args.audio_out)
    for name in ("talker_ckpt", "vocoder_ckpt"):
        if getattr(args, name) is not None and args.audio_out is None:
            raise UserError(f"--{name}: expected --audio_out beside it, for what --say or an answer speaks")
    if args.text is not None and not args.text.strip() and not (args.complete or args.audio_in):
        raise UserError("--text: expected a question, found an empty text")
    for name in ("image", "audio_in", "video"):
        if "" in getattr(args, name):
            raise UserError(f"--{name}: expected a file, found an empty name")
    if args.complete:
        if args.system is not None:
            raise UserError("--system: expected a chat, but --complete continues the text as it stands")
        without_effect(args, "--complete", "image", "audio_in", "video")
    looks = [name for name in ("image", "video") if getattr(args, name)]
    if looks and not args.ocr and args.text is None and not args.audio_in:
        raise UserError(f"--{looks[0]}: expected a question beside it, --text or --audio_in")
    if args.video_frames is not None and not args.video:
        raise UserError("--video_frames: expected --video beside it")


def without_effect(args: argparse.Namespace, mode: str, *names: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, False, 0.0, []):
            raise UserError(f"--{name}: has no effect on {mode}")


def written_to(path: Path) -> Path:
    """Where the sound for ``--audio_out`` is written: what a link leads to, so that the link stays one.

    Raises:
        UserError: a folder, a pipe or a device stands there, which the file would replace; it has no folder; it
            is to be of another format.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UserError(f"--audio_out {path}: expected a file, or a name for a new one; found a folder, pipe or device")
    if not target.parent.is_dir():
        raise UserError(f"--audio_out {path}: expected a file in a folder that exists")
    if any(name.suffix.lower() not in ("", ".wav") or name.name in ("", ".wav") for name in (path, target)):
        raise UserError(f"--audio_out {path}: expected a name that ends in .wav, the format that is written")
    return target


# --- Answering -------------------------------------------------------------------------------------------------------


def answer(assistant: Assistant, thoughts: Thoughts, prompt, args: argparse.Namespace) -> Iterator[str]:
    """Yield the pieces of text that follow ``prompt``, token ids or what ``Assistant.prompt`` returns."""
    yield from assistant.answer(
        prompt,
        thoughts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )


def respond(assistant: Assistant, prompt, args: argparse.Namespace, *, may_stop: bool) -> tuple[str, Thoughts]:
    """Print the answer on stdout, piece by piece on a terminal, and return it. ``may_stop``: Ctrl-C ends it."""
    streaming = sys.stdout.isatty()
    pieces, thoughts = [], Thoughts()
    try:
        for piece in answer(assistant, thoughts, prompt, args):
            pieces.append(piece)
            if streaming:
                print(without_controls(piece), end="", flush=True)
    except KeyboardInterrupt:
        if not may_stop:
            raise
    print("" if streaming else without_controls("".join(pieces)), flush=True)
    return "".join(pieces), thoughts


def frames_of(assistant: Assistant, path: Media, count: int | None) -> list[dict]:
    """A video as parts of a message; how much of it is seen is told on stderr."""
    frames, total = assistant.video(path, count)
    print(f"{quoted(path)}: {len(frames)} of {total} frames", file=sys.stderr)
    return frames


def answer_once(assistant: Assistant, args: argparse.Namespace) -> None:
    text = clean(args.text or "")
    if args.complete:
        prompt = continued(assistant, text)
    else:
        attached = [assistant.image(media_named(name)) for name in args.image]
        for name in args.video:
            attached += frames_of(assistant, media_named(name), args.video_frames)
        attached += [assistant.sound(media_named(name)) for name in args.audio_in]
        prompt = assistant.prompt([*system_message(args), message(attached, text)], args.max_new_tokens)
    speaker = prepare(assistant, args)
    text, thoughts = respond(assistant, prompt, args, may_stop=False)
    if speaker is not None:
        speak(speaker, sentences(text), args.audio_out, "the answer", thoughts=thoughts)


def prepare(assistant: Assistant, args: argparse.Namespace) -> Speaker | None:
    """Who speaks the answers, if anyone is to; what should be known of the model is told on stderr."""
    speaker = None if args.audio_out is None else find_speaker(args, assistant)
    if assistant.metrics.get("dialogue_share") == 0 and not args.complete:
        print(f"{quoted(args.ckpt_dir)}: trained on text without dialogues; try --complete", file=sys.stderr)
    return speaker


class Conversation:
    """What was said so far, and what is attached to the next message."""

    def __init__(self, assistant: Assistant, args: argparse.Namespace) -> None:
        self.assistant, self.args = assistant, args
        self.reset()

    def reset(self) -> None:
        self.messages = system_message(self.args)
        self.drop()

    def drop(self) -> None:
        self.attached = []
        self.heard = False  # a recording is attached, which may ask without a text
        self.missing, self.waiting = [], None  # what could not be attached, and the question that waits for it

    def attach(self, command: str, name: str) -> None:
        """Carry out ``/image``, ``/audio`` or ``/video``.

        Raises:
            UserError: it cannot be read. The next question waits, as it is about what is missing.
        """
        try:
            if not name:
                raise UserError(f"{command}: expected a file after it")
            path = media_named(name)
            if command == "/video":
                self.attached += frames_of(self.assistant, path, None)
            else:
                self.attached.append(self.assistant.image(path) if command == "/image" else self.assistant.sound(path))
        except UserError:
            self.missing, self.waiting = [*self.missing, f"{command} {name}".strip()], None
            raise
        self.heard = self.heard or command == "/audio"
        self.missing, self.waiting = [], None  # it was attached after all

    def ask(self, text: str) -> tuple[str, Thoughts]:
        """Print and return the answer to ``text`` and what is attached.

        Raises:
            UserError: it is too long, or something could not be attached to it; the conversation and what is attached
                stay as they were.
        """
        if self.missing and text != self.waiting:
            self.waiting = text
            missing = ", ".join(quoted(name) for name in self.missing)
            raise UserError(
                f"{missing}: not attached, so the question waits. Attach it, or go on without: /drop, or the same "
                f"question again"
            )
        self.missing, self.waiting = [], None
        if self.args.complete:
            return respond(self.assistant, continued(self.assistant, text), self.args, may_stop=True)
        self.messages.append(message(self.attached, text))
        try:
            prompt = self.assistant.prompt(self.messages, self.args.max_new_tokens)
            said, thoughts = respond(self.assistant, prompt, self.args, may_stop=True)
        except UserError:
            del self.messages[-1:]
            raise
        self.messages.append({"role": "assistant", "content": said})
        self.drop()
        return said, thoughts


def converse(assistant: Assistant, args: argparse.Namespace) -> None:
    """Answer line after line of the input. What is wrong with one of them is told, and the conversation goes on."""
    speaker = prepare(assistant, args)
    print(f"{quoted(args.ckpt_dir)}: /reset forgets the conversation, /quit or Ctrl-D leaves.", file=sys.stderr)
    conversation, spoken = Conversation(assistant, args), itertools.count(1)
    longest = assistant.ctx_len * CHARACTERS_PER_TOKEN
    while (line := read_line(longest)) is not None and line.strip() != "/quit":
        command, *name = line.split(maxsplit=1) or [""]
        try:
            if command in ("/reset", "/drop") and not name:
                conversation.reset() if command == "/reset" else conversation.drop()
            elif command in ("/image", "/audio", "/video") and not args.complete:
                conversation.attach(command, "".join(name).strip())
            elif line.strip() or conversation.heard:
                text, thoughts = conversation.ask(line)
                if speaker is not None:
                    file = args.audio_out.with_stem(f"{args.audio_out.stem}_{next(spoken)}")
                    speak(speaker, sentences(text), file, "the answer", thoughts=thoughts)
        except UserError as error:
            print(f"error: {visible(str(error))}", file=sys.stderr)


def system_message(args: argparse.Namespace) -> list[dict]:
    return [{"role": "system", "content": clean(args.system)}] if args.system else []


def continued(assistant: Assistant, text: str) -> list[int]:
    """The prompt of --complete: in training, a text follows the end of the one before it."""
    check_text_length(text, assistant.ctx_len)
    return [assistant.tokenizer.eos_id, *assistant.tokenizer.encode(text)]


def read_line(longest: int) -> str | None:
    """The user's next line; None at the end of the input. Ctrl-C clears the line.

    Args:
        longest: in characters; of a longer line only as much as shows that it is one.
    """
    if sys.stdin is None:
        raise UserError("expected --text, or a conversation on stdin; found it closed")
    while True:
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                return clean(input("you> "))
            print("you> ", end="", file=sys.stderr, flush=True)
            return read_line_of(sys.stdin.buffer, longest)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return None


def read_line_of(file: BinaryIO, longest: int) -> str:
    """
    Raises:
        EOFError: there is no more line.
    """
    line = file.readline(4 * longest + 8)  # a character has up to four bytes
    if not line:
        raise EOFError
    end = line
    while end and not end.endswith(b"\n"):
        end = file.readline(1 << 20)
    return line.decode("utf-8", "replace").rstrip("\r\n")


# --- Speaking and reading --------------------------------------------------------------------------------------------


def find_speaker(args: argparse.Namespace, assistant: Assistant | None = None) -> Speaker:
    device = pick_device(args.device)
    speaker, who = load_speaker(args.ckpt_dir, args.talker_ckpt, args.vocoder_ckpt, device, assistant)
    print(f"{who}{', which hears the Thinker' if speaker.hears and assistant else ''}", file=sys.stderr)
    if speaker.vocoder is None:
        print("no vocoder (--vocoder_ckpt): the sound is made by Griffin-Lim, at once in the end", file=sys.stderr)
    return speaker


def speak(speaker: Speaker, texts: list[str], path: Path, what: str, **sampling) -> None:
    """Speak one text after the other into a WAV file, piece by piece; how fast that went is told on stderr.

    Raises:
        UserError: there is nothing to say, or the file cannot be written.
    """
    target = written_to(path)
    started, samples, rate = time.perf_counter(), 0, speaker.spec.sample_rate

    def cut(text: str) -> None:
        print(f"{quoted(path)}: cut after {MAX_SECONDS:g} s: {text[:40]!r} goes on", file=sys.stderr)

    sound = spoken(speaker, texts, what, cut, **sampling)
    first = next(sound)
    first_s = time.perf_counter() - started

    whole = io.BytesIO()  # soundfile prints a traceback of its own where a disk is full
    with soundfile.SoundFile(whole, "w", samplerate=rate, channels=1, format="WAV", subtype="PCM_16") as wav:
        for piece in itertools.chain([first], sound):
            samples += len(piece)
            wav.write(piece)
    try:
        replace_file(target, lambda file: file.write(whole.getbuffer()))
    except OSError as error:
        raise UserError(f"--audio_out {path}: cannot write it: {error.strerror}") from error
    took, lasts = time.perf_counter() - started, samples / rate
    print(
        f"{quoted(path)}: {lasts:.2f} s of speech in {took:.2f} s, real-time factor {took / lasts:.3f}, "
        f"first sound after {1000 * first_s:.0f} ms",
        file=sys.stderr,
    )


def say(args: argparse.Namespace) -> None:
    """Speak ``--say`` as it stands, sentence by sentence."""
    sampling = {"temperature": args.temperature, "top_k": args.top_k}
    if args.seed is not None:
        sampling["seed"] = args.seed
    speak(find_speaker(args), sentences(clean(args.say)), args.audio_out, "--say", **sampling)


def read(args: argparse.Namespace) -> None:
    """Print the text of each ``--image``, a line each."""
    reader = load_reader(args.ckpt_dir, args.ocr_ckpt, pick_device(args.device))
    for path in args.image:
        print(without_controls(read_picture(reader, media_named(path))), flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.say is not None:
        say(args)
    elif args.ocr:
        read(args)
    else:
        once = args.text is not None or args.audio_in
        (answer_once if once else converse)(Assistant.load(args.ckpt_dir, pick_device(args.device)), args)


if __name__ == "__main__":
    launch(main)
