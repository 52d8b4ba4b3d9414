"""Load test of the real web page: many visitors, hostile requests, their answers and times, and the page's memory.

    python tests/page_load.py --ckpt_dir merged_model --visitors 64

Exit code 1 if a visitor had neither an answer nor a refusal within a minute, if the page took 2 GB or more, or if
something hostile was let through.
"""

import argparse
import asyncio
import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import av
import httpx
import numpy as np
import soundfile
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WITHIN_S, BELOW_GB = 60, 2


@dataclass
class Outcome:
    who: str
    seconds: float
    found: str


class Visitor:
    """Sends the requests of the page's JavaScript, without a browser."""

    def __init__(self, url: str, config: dict) -> None:
        self.api, self.session = f"{url}/gradio_api", secrets.token_hex(8)
        self.events = {fn["api_name"]: fn for fn in config["dependencies"]}
        sliders = {part["props"].get("label"): part["props"] for part in config["components"]}
        self.most = min(64, sliders["Max new tokens"]["maximum"])
        self.http = httpx.AsyncClient(trust_env=False, timeout=httpx.Timeout(4 * WITHIN_S), follow_redirects=False)

    async def upload(self, name: str, data: bytes, **headers: str) -> dict:
        """An uploaded file as an event takes it."""
        answer = await self.http.post(f"{self.api}/upload", files={"files": (name, data)}, headers=headers)
        if answer.status_code != 200:
            raise Answered(answer)
        (path,) = answer.json()
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    async def call(self, name: str, *data) -> str:
        """The result of an event: "answered", or the message that the page shows."""
        event = self.events[name]
        body = {"fn_index": event["id"], "session_hash": self.session, "data": list(data)}
        body["data"][:0] = [None] * (len(event["inputs"]) - len(data))  # the page's own state
        joined = await self.http.post(
            f"{self.api}/queue/join", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        if joined.status_code != 200:
            raise Answered(joined)
        url = f"{self.api}/queue/data?session_hash={self.session}"
        async with self.http.stream("GET", url) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                    return "answered" if message["success"] else f"refused: {message['output']['error']}"
        return "the answer ended early"

    async def chat(self, text: str, *files: dict, aloud: bool = True) -> str:
        return await self.call("chat", {"text": text, "files": list(files)}, aloud, 0.8, 1, self.most, -1)


class Answered(Exception):
    """An HTTP status other than 200."""

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(f"{answer.status_code} {answer.text.strip()[:150]}")


async def timed(who: str, what) -> Outcome:
    start = time.monotonic()
    try:
        found = await asyncio.wait_for(what, 4 * WITHIN_S)
    except Answered as error:
        found = f"refused: {error}"
    except (httpx.HTTPError, TimeoutError) as error:
        found = f"no answer: {type(error).__name__}"
    return Outcome(who, time.monotonic() - start, found)


# ---------------------------------------------------------------------------------------------------------------
# Visitors


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (160, 32), tuple(secrets.token_bytes(3))).save(file, "PNG")
    return file.getvalue()


def wav() -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng().normal(0, 0.1, 16000).astype(np.float32)
    soundfile.write(file, samples, 16000, format="WAV")
    return file.getvalue()


async def guest(visitor: Visitor, number: int) -> str:
    kind = number % 4
    if kind == 0:
        return await visitor.chat("What is the opposite of big?")
    if kind == 1:
        return await visitor.chat("What colour is the circle?", await visitor.upload("blob", png()))
    if kind == 2:
        return await visitor.call("say", "Anna is reading at the market. The red cat sleeps.", 0, -1)
    return await visitor.call("read", await visitor.upload("a.png", png()))


def bomb() -> bytes:
    """An animated GIF: a small frame, then one of 13000 x 13000."""
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, "GIF")
    frame = b"\x2c" + bytes(4) + (13000).to_bytes(2, "little") * 2 + b"\x00\x02\x16" + b"\x8c" * 22 + b"\x00"
    return file.getvalue()[:-1] + frame + b"\x3b"


def large() -> bytes:
    """A picture of the largest allowed size."""
    file = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def film() -> bytes:
    """A film of a minute in 1280 x 720."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", 25)
        stream.width, stream.height = 1280, 720
        frame = av.VideoFrame.from_ndarray(np.zeros((720, 1280, 3), np.uint8)).reformat(format="yuv420p")
        for number in range(1500):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def hostile(url: str, config: dict) -> dict[str, tuple]:
    """Name -> request, and a regular expression of the expected result."""

    def visitor() -> Visitor:
        return Visitor(url, config)

    async def flood() -> str:
        """200 MB of files, eight at a time, none of them the same."""
        found = []
        for _ in range(10):
            sent = [visitor().upload("a.wav", secrets.token_bytes(2_500_000)) for _ in range(8)]
            found += await asyncio.gather(*sent, return_exceptions=True)
        refused = [error for error in found if isinstance(error, Exception)]
        return f"{len(found) - len(refused)} stored, {len(refused)} refused {refused[0] if refused else ''}"

    async def trickle() -> str:
        """An upload that is slow, and nonsense."""

        async def drops():
            for _ in range(20):
                yield b"x" * 100
                await asyncio.sleep(1)

        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = await visitor().http.post(f"{url}/gradio_api/upload", content=drops(), headers=headers)
        return f"{answer.status_code} {answer.text[:80]}"

    async def unread() -> str:
        """Long speech that is never fetched."""
        found = []
        for _ in range(8):
            guest = visitor()
            task = asyncio.create_task(guest.call("say", "The cat sleeps. " * 600, 0, -1))
            await asyncio.sleep(1)
            task.cancel()
            found.append(task)
        await asyncio.gather(*found, return_exceptions=True)
        return "left"

    async def show(name: str, data: bytes) -> str:
        guest = visitor()
        return await guest.chat("What is this?", await guest.upload(name, data))

    async def get(path: str, **headers: str) -> str:
        answer = await visitor().http.get(f"{url}{path}", headers=headers)
        return f"refused: {answer.status_code}" if answer.status_code in (403, 404) else f"{answer.status_code}"

    huge, still, moving, long = bomb(), large(), film(), "a" * 30_000_000
    address = {"path": f"{url}/theme.css", "meta": {"_type": "gradio.FileData"}}
    return {
        "30 MB of text": (visitor().chat(long), "refused: 413"),
        "200 kB of text": (visitor().chat("a" * 200_000), "refused: the text is too long"),
        "100,000 characters of one word": (visitor().chat("a" * 100_000), "refused"),
        "100,000 characters of many": (visitor().chat("a b " * 25_000), "refused"),
        "a lone surrogate": (visitor().chat("red \ud800 cat"), "answered"),
        "JSON that is nested deep": (visitor().call("say", "[" * 100, json.loads("[" * 900 + "]" * 900), 0), "refused"),
        "600 sentences": (visitor().call("say", "The cat sleeps. " * 600, 0, -1), "answered|refused"),
        "speech that is not fetched": (unread(), "left"),
        "200 MB of files": (flood(), "stored"),
        "a file of 50 MB": (visitor().upload("a.wav", bytes(50_000_000)), "refused: 413"),
        "a slow upload of nonsense": (trickle(), "^4"),
        "an animation with a huge frame": (show("a.gif", huge), "answered|refused"),
        "a picture of 64 megapixels": (show("a", still), "answered|refused"),
        "a film of a minute": (show("a.jpg", moving), "answered|refused"),
        "an upload by another site": (visitor().upload("a.png", png(), origin="http://evil.example"), "refused: 403"),
        "another site's name": (get("/config", host="evil.example"), "refused: 403"),
        "a file from elsewhere": (get("/gradio_api/file=http://example.org/"), "refused: 404"),
        "an address for a file": (visitor().chat("What is this?", address), "refused"),
    }


# ---------------------------------------------------------------------------------------------------------------


def memory_gb(pid: int) -> float:
    """Peak memory of the page."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1e6


async def visit(url: str, visitors: int) -> tuple[list[Outcome], list[Outcome], list[str]]:
    async with httpx.AsyncClient(trust_env=False) as http:
        config = (await http.get(f"{url}/config")).json()
    attacks = await asyncio.to_thread(hostile, url, config)
    bad = [asyncio.create_task(timed(name, what)) for name, (what, _) in attacks.items()]
    await asyncio.sleep(0.5)
    good = [timed(f"visitor {number}", guest(Visitor(url, config), number)) for number in range(visitors)]
    guests = await asyncio.gather(*good)
    attackers = await asyncio.gather(*bad)
    through = [one.who for one in attackers if not re.search(attacks[one.who][1], one.found)]
    return guests, attackers, through


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", required=True, type=Path)
    parser.add_argument("--visitors", type=int, default=64)
    args, more = parser.parse_known_args()  # the rest is for the page
    line = [sys.executable, str(ROOT / "scripts" / "web_demo.py"), "--ckpt_dir", str(args.ckpt_dir), "--port", "0"]
    page = subprocess.Popen([*line, "--device", "cpu", *more], stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        url = page.stdout.readline().strip()
        if not url:
            return page.wait()
        idle = memory_gb(page.pid)
        guests, attackers, through = asyncio.run(visit(url, args.visitors))
        lives, most = page.poll() is None, memory_gb(page.pid) if page.poll() is None else float("nan")
    finally:
        page.send_signal(signal.SIGTERM)
        page.wait()
    for one in attackers:
        print(f"{one.seconds:6.1f} s  {one.who}: {one.found}")
    kinds = {}
    for one in guests:
        kinds.setdefault(one.found, []).append(one.seconds)
    for found, seconds in kinds.items():
        print(f"{len(seconds)} of {len(guests)} visitors: {found}; slowest {max(seconds):.1f} s")
    late = [one for one in guests if one.seconds > WITHIN_S or not re.match("answered|refused", one.found)]
    print(f"{len(guests) - len(late)} of {len(guests)} answered or refused within {WITHIN_S} s; "
          f"memory {most:.2f} GB at most, {idle:.2f} GB when idle")  # fmt: skip
    if through:
        print(f"not as expected: {', '.join(through)}")
    return int(bool(late or through or not lives or most >= BELOW_GB))


if __name__ == "__main__":
    sys.exit(main())
