"""Talk to a trained model: ``python infer_chat.py --ckpt_dir checkpoints/thinker_demo --text "Hello"``.

``--ckpt_dir`` is a folder of stage A or stage E, or an export, which needs no other folder. With ``--text`` or a
recorded question it answers once, and stdout holds the answer and nothing else. Otherwise it holds a conversation:
``/image FILE``, ``/audio FILE`` and ``/video FILE`` attach a file to the next message, ``/drop`` removes the
attachments, ``/reset`` forgets the conversation, ``/quit`` or Ctrl-D leaves, Ctrl-C stops an answer. Each FILE may also
be a data URI.

    python infer_chat.py --ckpt_dir merged_model --image cat.png --text "What is in the picture?" --audio_out answer.wav
    python infer_chat.py --ckpt_dir merged_model --audio_in question.wav
    python infer_chat.py --ckpt_dir merged_model --ocr --image sign.png
    python infer_chat.py --ckpt_dir merged_model --say "Anna is reading at the market." --audio_out anna.wav

``--say`` speaks a text verbatim, ``--ocr`` reads a picture of a line of text. Parts that ``--ckpt_dir`` lacks come from
the folders of their stages: ``--talker_ckpt``, ``--vocoder_ckpt``, ``--ocr_ckpt``; ``--say`` and ``--ocr`` also take
stage D's and stage G's folder as ``--ckpt_dir``.
"""

import argparse
import contextlib
import itertools
import sys
import time
from pathlib import Path

from omni.chat.assistant import Assistant
from omni.chat.ocr import load_reader, read_picture
from omni.chat.speech import load_speaker, refuse_unspeakable, wav_target, write_speech
from omni.chat.terminal import Conversation, converse
from omni.chat.text import clean, media_named, without_controls
from omni.common.errors import UserError
from omni.common.media import quoted
from omni.models.speaker import Speaker
from omni.train.cli import OneLineErrors, launch
from omni.train.device import pick_device


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", required=True, type=Path, help="folder of stage A or E, or an exported one")
    parser.add_argument("--text", help="single question to answer; default: a conversation")
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture; repeatable")
    parser.add_argument("--audio_in", metavar="FILE", action="append", default=[], help="a recording; repeatable")
    parser.add_argument(
        "--video", metavar="FILE", action="append", default=[],
        help="a film (MP4, WebM ...), an animated GIF, WebP or PNG, or a folder of pictures; repeatable",
    )  # fmt: skip
    parser.add_argument("--video_frames", metavar="N", type=int, help="frames of a video (default: as many as fit)")
    parser.add_argument("--audio_out", metavar="FILE.wav", type=Path, help="spoken answer (conversation: FILE_1.wav)")
    parser.add_argument("--say", metavar="TEXT", help="speak this text into --audio_out and exit")
    parser.add_argument("--ocr", action="store_true", help="print the text of each --image and exit")
    parser.add_argument("--talker_ckpt", metavar="DIR", type=Path, help="folder of stage D, to speak")
    parser.add_argument("--vocoder_ckpt", metavar="DIR", type=Path, help="folder of stage F (default: Griffin-Lim)")
    parser.add_argument("--voice", metavar="NAME", help="voice of a talker of several voices (default: its first)")
    parser.add_argument("--voice_from", metavar="FILE", help="recording of 1 to 60 s, in whose voice to speak")
    parser.add_argument("--ocr_ckpt", metavar="DIR", type=Path, help="folder of stage G, for --ocr")
    parser.add_argument("--system", help="system message at the beginning of the conversation")
    parser.add_argument("--complete", action="store_true", help="continue the text as it stands, without chat tokens")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer, in tokens (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 (default): greedy")
    parser.add_argument("--top_k", type=int, help="sample from the k most likely tokens only")
    parser.add_argument("--top_p", type=float, help="nucleus sampling: tokens of this total probability")
    parser.add_argument("--seed", type=int, help="seed of the sampling")
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
            raise UserError(f"--{name}: expected a --temperature above 0 beside it")
    if args.say is not None and args.ocr:
        raise UserError("--say: expected no --ocr beside it")
    if args.say is not None:
        if args.text is not None:
            raise UserError("--say: expected no --text beside it: --say speaks a text verbatim, --text is answered")
        if args.audio_out is None:
            raise UserError("--say: expected --audio_out FILE.wav beside it")
        refuse_unspeakable(args.say, "--say")
        without_effect(args, "--say", "image", "audio_in", "video", "system", "complete", "top_p", "ocr_ckpt")
    elif args.ocr:
        if not args.image:
            raise UserError("--ocr: expected an --image FILE beside it, the picture to read")
        others = ("text", "audio_in", "video", "system", "complete", "audio_out", "talker_ckpt", "vocoder_ckpt")
        without_effect(args, "--ocr", *others, "voice", "voice_from", "temperature")
    elif args.ocr_ckpt is not None:
        raise UserError("--ocr_ckpt: expected --ocr beside it")
    if args.audio_out is not None:
        wav_target(args.audio_out)
    for name in ("talker_ckpt", "vocoder_ckpt", "voice", "voice_from"):
        if getattr(args, name) is not None and args.audio_out is None:
            raise UserError(f"--{name}: expected --audio_out beside it, the file for the speech")
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


# --- Answers, speech, pictures of text -------------------------------------------------------------------------------


def chat(args: argparse.Namespace) -> None:
    """Answer ``--text`` or a recorded question, else hold a conversation; with ``--audio_out``, speak the answers."""
    assistant = Assistant.load(args.ckpt_dir, pick_device(args.device))
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    conversation = Conversation(assistant, sampling, complete=args.complete, system=args.system)
    once = args.text is not None or bool(args.audio_in)
    for command, names in (("/image", args.image), ("/video", args.video), ("/audio", args.audio_in)):
        for name in names:
            conversation.attach(command, name, args.video_frames)
    speaker = None if args.audio_out is None else find_speaker(args, assistant)
    if assistant.metrics.get("dialogue_share") == 0 and not args.complete:
        print(f"{quoted(args.ckpt_dir)}: trained on text without dialogues; try --complete", file=sys.stderr)
    numbers = itertools.count(1)

    def answer(question: str) -> None:
        start_s = time.perf_counter()
        pieces, answer_states = conversation.ask(question)
        with contextlib.closing(pieces):
            if speaker is None:
                list(pieces)
            else:
                out = args.audio_out if once else args.audio_out.with_stem(f"{args.audio_out.stem}_{next(numbers)}")
                known = {"since": "the question", "start_s": start_s, "answer_states": answer_states}
                write_speech(speaker, pieces, out, "the answer", **known)

    if once:
        answer(clean(args.text or ""))
    else:
        print(f"{quoted(args.ckpt_dir)}: /reset forgets the conversation, /quit or Ctrl-D leaves.", file=sys.stderr)
        converse(conversation, answer)


def find_speaker(args: argparse.Namespace, assistant: Assistant | None = None) -> Speaker:
    device = pick_device(args.device)
    speaker, origin = load_speaker(args.ckpt_dir, args.talker_ckpt, args.vocoder_ckpt, device, assistant)
    speaker.reference = speaker.voice(args.voice, args.voice_from and media_named(args.voice_from))
    states = ", conditioned on the Thinker's states" if speaker.uses_thinker_states and assistant else ""
    print(f"{origin}{states}", file=sys.stderr)
    if speaker.vocoder is None:
        print("no vocoder (--vocoder_ckpt): Griffin-Lim makes the sound of a whole sentence at a time", file=sys.stderr)
    return speaker


def say(args: argparse.Namespace) -> None:
    """Speak ``--say`` as it stands, sentence by sentence."""
    sampling = {"temperature": args.temperature, "top_k": args.top_k}
    sampling |= {} if args.seed is None else {"seed": args.seed}
    speaker, start_s = find_speaker(args), time.perf_counter()
    write_speech(speaker, [clean(args.say)], args.audio_out, "--say", since="the text", start_s=start_s, **sampling)


def read(args: argparse.Namespace) -> None:
    """Print the text of each ``--image``, a line each."""
    reader = load_reader(args.ckpt_dir, args.ocr_ckpt, pick_device(args.device))
    for path in args.image:
        print(without_controls(read_picture(reader, media_named(path))), flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run = say if args.say is not None else read if args.ocr else chat
    run(args)


if __name__ == "__main__":
    launch(main)
