"""Talk to a trained model in the browser: ``python scripts/web_demo.py --ckpt_dir merged_model``.

The page holds conversations about text, pictures and recordings and streams spoken answers; it also speaks texts and
reads pictures of text. It disables abilities that the model lacks, with the reason. It needs Gradio (``make web``).
Nothing leaves the machine: no telemetry, no share link, and the page loads nothing from elsewhere. Uploads are deleted
after an hour and when the program ends (Ctrl-C), at the latest at its next start. Visitors take turns at the model; the
size of requests and the total disk space are bounded.

    python scripts/web_demo.py --ckpt_dir checkpoints/thinker_demo --talker_ckpt checkpoints/talker_demo --port 8000
"""

import argparse
import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import sys
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}

from omni.chat.assistant import Assistant
from omni.chat.ocr import load_reader
from omni.chat.server import Folder, Guard, names_of, own_folder
from omni.chat.speech import load_speaker
from omni.common.errors import UserError
from omni.common.files import read_json
from omni.common.media import kind_of, quoted
from omni.export.bundle import has_part
from omni.train.cli import OneLineErrors, launch
from omni.train.device import pick_device

CONNECTIONS = 512  # a visitor has about three
EXAMPLES = Path("data/examples/examples.json")  # part of the built-in data

INSTALL = "make web"
try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from omni.chat.web import CLEANED_S, KEPT_S, MAX_FILES, Page, build
except ImportError as error:  # main reports it in one line
    gr, missing = None, error


def read_examples(source: Path, assistant: Assistant, folder: Path) -> tuple[list[dict], list[Path]]:
    """Example questions that suit the model, and pictures of a line of text; copies of their files go into ``folder``.

    Args:
        source: ``{"ask": [{"text": ..., "files": [...]}, ...], "read": [...]}``, names relative to its folder.

    Raises:
        UserError: the file has another form, or a file in it is missing.
    """
    shown = read_json(source)

    def copied(name: str) -> Path:
        path = source.parent / name
        if not path.is_file():
            raise UserError(f"{source}: {quoted(name)}: expected a file, found none")
        return Path(shutil.copyfile(path, folder / f"example_{len(os.listdir(folder))}{path.suffix}"))

    def suits(path: Path) -> bool:
        return not assistant.lacks("audio_encoder" if kind_of(path) == "sound" else "vision_encoder")

    try:
        ask = [{"text": one["text"], "files": [copied(name) for name in one.get("files", [])]} for one in shown["ask"]]
        read = [copied(name) for name in shown["read"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{source}: expected {{"ask": [{{"text": ..., "files": [...]}}], "read": [...]}}') from error
    return [one | {"files": list(map(str, one["files"]))} for one in ask if all(map(suits, one["files"]))], read


def optional(load: Callable, folder: Path, given: bool, part: str) -> tuple:
    """``load()`` and "", or None and the reason if the part is absent; a damaged part raises."""
    try:
        return load(), ""
    except UserError as error:
        if given or has_part(folder, part):
            raise
        return None, str(error)


# Gradio's share buttons hand files to a public site
STYLE = '[aria-label="Share"] { display: none !important; }'


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", required=True, type=Path, help="folder of stage A or E, or an exported one")
    parser.add_argument("--talker_ckpt", metavar="DIR", type=Path, help="folder of stage D, to speak")
    parser.add_argument("--vocoder_ckpt", metavar="DIR", type=Path, help="folder of stage F (default: Griffin-Lim)")
    parser.add_argument("--ocr_ckpt", metavar="DIR", type=Path, help="folder of stage G, for OCR")
    parser.add_argument(
        "--examples", metavar="FILE", type=Path, default=EXAMPLES if EXAMPLES.is_file() else None,
        help="JSON file of questions to offer, see docs/usage.md (default: those of the built-in data, if it is there)",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; the default: this machine only")
    parser.add_argument("--port", type=int, default=7860, help="port (7860); 0: any free one")
    parser.add_argument("--max_upload_mb", type=float, default=10, help="largest file that can be uploaded, in MB (10)")
    parser.add_argument("--max_disk_mb", type=float, default=1000, help="disk space of all files, in MB (1000)")
    parser.add_argument("--max_requests", type=int, default=100, help="requests at a time; more are refused (100)")
    parser.add_argument(
        "--allow_origin", action="append", default=[], metavar="http://NAME",
        help="address by which the page may be called, or from whose pages it may be used; may be given several times",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port: expected 0 to 65535, found {args.port}")
    for name in ("max_upload_mb", "max_disk_mb", "max_requests"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name}: expected more than 0, found {getattr(args, name):g}")
    args.allow_origin = {origin.lower().rstrip("/") for origin in args.allow_origin}
    for origin in args.allow_origin:
        found = urllib.parse.urlsplit(origin)
        if found.scheme not in ("http", "https") or not found.hostname or found.path or found.query:
            raise UserError(f"--allow_origin: expected http://NAME or https://NAME, found {quoted(origin)}")
    return args


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A listening socket and the page's address; warns on stderr if others can reach it.

    Raises:
        UserError: this machine has no such address, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from error
    address, port = listening.getsockname()[:2]
    if not ipaddress.ip_address(address).is_loopback:
        print(
            f"--host {host}: everyone who can reach this machine can use the model, with neither password nor "
            f"encryption; and browsers lend a page from elsewhere no microphone",
            file=sys.stderr,
        )
    return listening, f"http://{f'[{address}]' if ':' in address else address}:{port}"


def clean_up(kept: Folder, ended: threading.Event) -> None:
    """Delete old files, also those unknown to Gradio, until ``ended``."""
    while not ended.wait(CLEANED_S):
        kept.clean()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if gr is None:
        raise UserError(f"scripts/web_demo.py needs Gradio ({missing}). To have it: {INSTALL}")
    device, folder = pick_device(args.device), args.ckpt_dir
    assistant = Assistant.load(folder, device)
    given = (folder, args.talker_ckpt, args.vocoder_ckpt, device, assistant)
    speaker = optional(lambda: load_speaker(*given)[0], folder, bool(args.talker_ckpt or args.vocoder_ckpt), "talker")
    reader = optional(lambda: load_reader(folder, args.ocr_ckpt, device), folder, bool(args.ocr_ckpt), "ocr")
    with own_folder() as temporary:
        os.environ["GRADIO_TEMP_DIR"] = str(temporary)
        examples = read_examples(args.examples, assistant, temporary) if args.examples else ([], [])
        kept = Folder(temporary, int(args.max_disk_mb * 1e6), KEPT_S + 2 * CLEANED_S)
        page = Page(assistant, speaker, reader, args.max_requests, kept.take)
        blocks = build(page, folder.resolve().name, *examples)
        listening, url = listen(args.host, args.port)
        app = FastAPI(openapi_url=None)
        fonts = {"font": ("system-ui", "sans-serif"), "font_mono": "monospace"}  # the visitor's own
        theme = gr.themes.Default(primary_hue="indigo", **fonts)
        gr.mount_gradio_app(
            app, blocks, path="/", footer_links=[], run_history=False, ssr_mode=False, show_error=False,
            max_file_size=int(args.max_upload_mb * 1e6), theme=theme, css=STYLE,
        )  # fmt: skip
        # Mounting leaves them False; Gradio would then read any file that a visitor names, and serve uploaded SVGs as
        # pages.
        blocks.has_launched = blocks.is_running = True
        kept.keep_what_is_there()
        names = names_of(args.host, listening.getsockname()[0], args.allow_origin)
        guard = Guard(app, names, args.allow_origin, kept, int(MAX_FILES * args.max_upload_mb * 1e6) + (1 << 16))
        settings = {"log_level": "warning", "timeout_graceful_shutdown": 1, "limit_concurrency": CONNECTIONS}
        server = uvicorn.Server(uvicorn.Config(guard, **settings))
        ended = threading.Event()
        threading.Thread(target=clean_up, args=(kept, ended), daemon=True).start()
        print(url, flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended
            server.run(sockets=[listening])
        ended.set()


if __name__ == "__main__":
    launch(main)
