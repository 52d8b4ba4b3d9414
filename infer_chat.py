"""Talk to a trained model: ``python infer_chat.py --ckpt_dir checkpoints/thinker_demo --text "Hello"``.

With ``--text`` it answers once, and stdout holds the answer and nothing else. Without it, it holds a conversation:
``/reset`` forgets it, ``/quit`` or Ctrl-D leaves, Ctrl-C stops an answer.

With ``--say`` it speaks a text as it is given, into a WAV file; ``--ckpt_dir`` is then a folder of stage D:

    python infer_chat.py --ckpt_dir checkpoints/talker_demo --vocoder_ckpt checkpoints/vocoder_demo \\
        --say "Anna is reading at the market." --audio_out anna.wav
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import soundfile

from omni.aligner import MAX_TEXT_BYTES
from omni.checkpoint import load_stage, replace_file
from omni.errors import UserError
from omni.runtime import OneLineErrors, launch, pick_device
from omni.speech import Speaker
from omni.thinker import Thinker, load_thinker
from omni.tokenizer import StreamDecoder, Tokenizer


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", required=True, type=Path, help="folder of stage A; for --say of stage D")
    parser.add_argument("--say", metavar="TEXT", help="speak this text into --audio_out and exit")
    parser.add_argument("--audio_out", metavar="FILE.wav", type=Path, help="where --say puts the sound")
    parser.add_argument("--vocoder_ckpt", metavar="DIR", type=Path, help="folder of stage F (default: Griffin-Lim)")
    parser.add_argument("--text", help="answer this and exit; without it: a conversation")
    parser.add_argument("--system", help="a system message to begin the conversation with")
    parser.add_argument("--complete", action="store_true", help="continue the text as it stands, without chat tokens")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer, in tokens (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest tokens that together have this share")
    parser.add_argument("--seed", type=int, help="the same seed draws the same answer")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    for name, holds, expected in (
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", args.temperature == 0 or 0.01 <= args.temperature <= 100, "0, or 0.01 to 100"),
        ("top_k", args.top_k is None or args.top_k >= 1, "at least 1"),
        ("top_p", args.top_p is None or 0 < args.top_p <= 1, "more than 0, at most 1"),
        ("seed", args.seed is None or 0 <= args.seed < 2**63, "0 to 2^63 - 1"),
    ):
        if not holds:
            raise UserError(f"--{name}: expected {expected}, found {getattr(args, name)}")
    for name in ("top_k", "top_p"):
        if getattr(args, name) is not None and args.temperature == 0:
            raise UserError(f"--{name}: expected a --temperature above 0 with it, to draw from what it leaves")
    if (args.say is None) != (args.audio_out is None):
        raise UserError("--say TEXT and --audio_out FILE.wav: expected both or neither")
    if args.say is not None and args.text is not None:
        raise UserError("--say: expected no --text beside it: the one is spoken as it stands, the other is answered")
    if args.say is not None:
        if not args.say.strip() or len(args.say.encode(errors="replace")) >= MAX_TEXT_BYTES:
            raise UserError(f"--say: expected a text of 1 to {MAX_TEXT_BYTES - 1} bytes")
        if args.audio_out.is_dir() or not args.audio_out.parent.is_dir():
            raise UserError(f"--audio_out {args.audio_out}: expected a file in a folder that exists")
        for name in ("system", "complete", "top_p"):
            if getattr(args, name):
                raise UserError(f"--{name}: has no effect on --say")
    elif args.vocoder_ckpt is not None:
        raise UserError("--vocoder_ckpt: expected --say beside it")
    if args.complete and args.system is not None:
        raise UserError("--system: expected a chat, but --complete continues the text as it stands")
    return args


def fit_chat(tokenizer: Tokenizer, messages: list[dict], ctx_len: int, max_new_tokens: int) -> list[int]:
    """Prompt ids of ``messages``. Oldest turns are deleted from the list, in place, until there is room to answer."""
    room = ctx_len - min(max_new_tokens, ctx_len // 2)
    first = 1 if messages[0]["role"] == "system" else 0
    for oldest in range(first, len(messages), 2):  # a turn is a question and its answer; the last has none yet
        ids = tokenizer.chat_prompt(messages[:first] + messages[oldest:])
        if len(ids) <= room:
            break
    if len(ids) < ctx_len:  # else nothing helps: keep the turns for a shorter question
        del messages[first:oldest]
    return ids


def answer(thinker: Thinker, tokenizer: Tokenizer, ids: list[int], args: argparse.Namespace) -> Iterator[str]:
    """Yield the pieces of text that follow ``ids``."""
    if len(ids) >= thinker.arch.ctx_len:
        raise UserError(
            f"the text has {len(ids)} tokens, and the model's context holds {thinker.arch.ctx_len}, answer included"
        )
    decoder = StreamDecoder(tokenizer, skip_special=True)
    for token_id in thinker.generate(
        ids,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_ids=(tokenizer.end_id, tokenizer.eos_id),
    ):
        yield decoder.push(token_id)
    yield decoder.flush()


def respond(thinker: Thinker, tokenizer: Tokenizer, ids: list[int], args: argparse.Namespace) -> str:
    """Print the answer on stdout, piece by piece on a terminal, and return it. In a conversation, Ctrl-C ends it."""
    streaming = sys.stdout.isatty()
    pieces = []
    try:
        for piece in answer(thinker, tokenizer, ids, args):
            pieces.append(piece)
            if streaming:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if args.text is not None:
            raise
    print("" if streaming else "".join(pieces), flush=True)
    return "".join(pieces)


def say(args: argparse.Namespace) -> None:
    """Speak ``--say`` into ``--audio_out``, piece by piece; how fast that went is told on stderr."""
    speaker = Speaker.load(args.ckpt_dir, args.vocoder_ckpt, pick_device(args.device))
    trained = load_stage(args.ckpt_dir, "talker", "talker", "talker.pt")
    metrics = trained["metrics"]
    judged = f"code perplexity {metrics['code_perplexity']:.3g}" if "code_perplexity" in metrics else "not validated"
    print(f"{args.ckpt_dir}: talker of step {trained['step']}, {judged}", file=sys.stderr)
    if speaker.vocoder is None:
        print("no --vocoder_ckpt: the sound is made by Griffin-Lim, at once in the end", file=sys.stderr)
    sampling = {"temperature": args.temperature, "top_k": args.top_k}
    if args.seed is not None:
        sampling["seed"] = args.seed
    started, samples = time.perf_counter(), 0
    pieces = speaker.stream(clean(args.say), **sampling)
    first = next(pieces, None)
    if first is None:
        raise UserError(f"{args.ckpt_dir}: the talker had nothing to say to this text")
    first_s = time.perf_counter() - started

    def write(file) -> None:
        nonlocal samples
        rate = speaker.spec.sample_rate
        with soundfile.SoundFile(file, "w", samplerate=rate, channels=1, format="WAV", subtype="PCM_16") as sound:
            for piece in itertools.chain([first], pieces):
                samples += len(piece)
                sound.write(piece)

    try:
        replace_file(args.audio_out, write)
    except OSError as error:
        raise UserError(f"--audio_out {args.audio_out}: cannot write it: {error.strerror}") from error
    took, lasts = time.perf_counter() - started, samples / speaker.spec.sample_rate
    print(
        f"{args.audio_out}: {lasts:.2f} s of speech in {took:.2f} s, real-time factor {took / lasts:.3f}, "
        f"first sound after {1000 * first_s:.0f} ms",
        file=sys.stderr,
    )


def read_line() -> str | None:
    """The user's next line; None at the end of the input. Ctrl-C clears the line."""
    while True:
        try:
            if sys.stdout.isatty():
                return clean(input("you> "))
            print("you> ", end="", file=sys.stderr, flush=True)
            return clean(input())
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return None


def clean(text: str) -> str:
    """Bytes that are not UTF-8 reach Python as lone surrogates, which no tokenizer can take."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.say is not None:
        say(args)
        return
    thinker, tokenizer, metrics = load_thinker(args.ckpt_dir, pick_device(args.device))
    if metrics.get("dialogue_share") == 0 and not args.complete:
        print(f"{args.ckpt_dir}: trained on text without dialogues; try --complete", file=sys.stderr)
    system = [{"role": "system", "content": clean(args.system)}] if args.system else []
    messages = list(system)

    def prompt(text: str) -> list[int]:
        if args.complete:  # in training, a text follows the end of the one before it
            return [tokenizer.eos_id, *tokenizer.encode(text)]
        messages.append({"role": "user", "content": text})
        return fit_chat(tokenizer, messages, thinker.arch.ctx_len, args.max_new_tokens)

    if args.text is not None:
        respond(thinker, tokenizer, prompt(clean(args.text)), args)
        return

    print(f"{args.ckpt_dir}: /reset forgets the conversation, /quit or Ctrl-D leaves.", file=sys.stderr)
    while (line := read_line()) is not None and line.strip() != "/quit":
        if line.strip() == "/reset":
            messages[:] = system
        elif line.strip():
            try:
                text = respond(thinker, tokenizer, prompt(line), args)
            except UserError as error:  # this line is too long; the conversation goes on without it
                print(f"error: {error}", file=sys.stderr)
                del messages[-1:]
                continue
            if not args.complete:
                messages.append({"role": "assistant", "content": text})


if __name__ == "__main__":
    launch(main)
