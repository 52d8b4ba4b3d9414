"""omni/chat/server.py: turns at the model, what requests are let through, and the page's own folder."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, pairwise

import pytest
from harness import ROOT

from omni.chat import server as web_limits
from omni.chat.server import Folder, Guard, Turns, names_of, own_folder
from omni.common.errors import UserError

# ---------------------------------------------------------------------------------------------------------------
# Turns


@pytest.mark.parametrize("sentences", [3, 60, 600])
@pytest.mark.parametrize("long_jobs", [1, 4])
def test_a_short_request_waits_for_one_slice_of_each_other_job(monkeypatch, sentences, long_jobs):
    monkeypatch.setattr(web_limits, "SLICE_S", 0)  # each piece is a slice
    turns, events, asked = Turns(99), [], threading.Event()

    def speech(who: int, begun: Callable[[], None]):
        for number in range(sentences):
            if (who, number) == (0, 1):
                begun()
                assert asked.wait(30)
            events.append((who, number))
            yield number

    async def long(*arguments) -> list:
        return [piece async for some in turns.slices(speech(*arguments)) for piece in some]

    async def main() -> list:
        loop, begun = asyncio.get_running_loop(), asyncio.Event()
        begin = partial(loop.call_soon_threadsafe, begun.set)
        tasks = [asyncio.create_task(long(who, begin)) for who in range(long_jobs)]
        await begun.wait()
        answering = asyncio.create_task(turns.compute(events.append, "answered"))
        await asyncio.sleep(0)  # it stands in the line
        events.append("asked")
        asked.set()
        await answering
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [list(range(sentences))] * long_jobs, "nothing is lost on the way"
    between = events[events.index("asked") + 1 : events.index("answered")]
    assert all([who for who, _ in between].count(one) <= 2 for one in range(long_jobs)), between


def test_jobs_that_compute_together_take_turns_and_not_by_count(monkeypatch):
    turns, order = Turns(9), []
    clock = iter(range(10**6))
    monkeypatch.setattr(web_limits.time, "monotonic", lambda: next(clock) / 100)  # a look at it takes 10 ms

    def pieces(who: str):
        for _ in range(40):
            order.append(who)
            yield who

    async def job(who: str) -> None:
        async for some in turns.slices(pieces(who)):
            assert 1 < len(some) <= 6

    async def main() -> None:
        await asyncio.gather(job("a"), job("b"))

    asyncio.run(main())
    changes = sum(one != other for one, other in pairwise(order))
    assert 10 <= changes < 40 and order.count("a") == order.count("b") == 40


@pytest.mark.parametrize("end", ["well", "error", "cancelled", "closed"])
def test_a_job_that_ends_however_makes_room_for_another(end):
    turns = Turns(1)

    async def job():
        with turns.job():
            yield await turns.compute(int, "1")
            if end == "error":
                raise UserError("no")
            if end == "cancelled":
                raise asyncio.CancelledError

    async def main() -> None:
        running = job()
        assert await anext(running) == 1
        with pytest.raises(UserError, match=r"1 requests .* as many"), turns.job():
            pass
        if end == "closed":
            await running.aclose()
        else:
            with pytest.raises((StopAsyncIteration, UserError, asyncio.CancelledError)):
                await anext(running)
        with turns.job():
            pass

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------------
# Requests


class App:
    """Reads what is sent, as Gradio does: all of it."""

    def __init__(self) -> None:
        self.read = None

    async def __call__(self, scope, receive, send) -> None:
        self.read, more = 0, True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise ConnectionError("the visitor has gone")
            self.read += len(event.get("body", b""))
            more = event.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def ask(guard: Guard, method="POST", path="/gradio_api/queue/join", body=(), declared=None, **headers) -> tuple:
    """Status, and the line of a refusal."""
    given = {"host": "localhost:7860"} | headers | ({} if declared is None else {"content-length": str(declared)})
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    parts, answer = ({"body": one, "more_body": bool(one)} for one in chain(body, [b""])), []

    async def receive() -> dict:
        return {"type": "http.request"} | next(parts)

    async def send(event: dict) -> None:
        answer.append(event)

    asyncio.run(guard(scope, receive, send))
    starts = [event for event in answer if event["type"] == "http.response.start"]
    assert len(starts) == 1
    text = b"".join(event.get("body", b"") for event in answer).decode()
    assert starts[0]["status"] == 200 or re.fullmatch(r"[^\n]+\n", text)
    return starts[0]["status"], text


@pytest.fixture
def guard(tmp_path):
    names = names_of("127.0.0.1", "127.0.0.1", {"https://demo.example"})
    return Guard(App(), names, {"https://demo.example"}, Folder(tmp_path, 5_000_000, 60), 2_000_000)


@pytest.mark.parametrize("method, path", [
    ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/queue/join"), ("POST", "/gradio_api/run/stop"),
    ("POST", "/gradio_api/cancel"), ("GET", "/gradio_api/queue/data"), ("GET", "/config"),
])  # fmt: skip
def test_pages_of_other_origins_and_other_names_are_refused_on_every_route(guard, method, path):
    for host, origin, status in (
        ("localhost:7860", None, 200), ("localhost:7860", "http://localhost:7860", 200), ("127.0.0.1:7860", None, 200),
        ("[::1]:7860", "http://[::1]:7860", 200), ("192.168.1.5:7860", "http://192.168.1.5:7860", 200),
        ("demo.example", "https://demo.example", 200), ("LOCALHOST:7860", "http://localhost:7860", 200),
        ("localhost:7860", "https://demo.example", 200),
        ("localhost:7860", "http://evil.example", 403), ("localhost:7860", "null", 403),
        ("localhost:7860", "http://localhost:8000", 403), ("localhost:7860", "http://localhost:7860.evil.example", 403),
        ("localhost:7860", "file://", 403), ("localhost:7860", "", 403),
        ("evil.example:7860", None, 403), ("evil.example:7860", "http://evil.example:7860", 403),
        ("localhost.evil.example", None, 403), ("", None, 403), ("[", None, 403), ("127.0.0.1.evil.example", None, 403),
    ):  # fmt: skip
        headers = {} if origin is None else {"origin": origin}
        guard.app.read = None
        assert ask(guard, method, path, host=host, **headers)[0] == status, (host, origin)
        assert (guard.app.read is None) is (status == 403), "the page gets to know of no other"


def test_a_page_for_other_machines_goes_by_this_machines_names(monkeypatch):
    monkeypatch.setattr(web_limits.socket, "gethostname", lambda: "Box.lan")
    names = names_of("0.0.0.0", "0.0.0.0", set())
    assert {"box.lan", "box.lan.local", "box", "localhost"} <= names and "evil.example" not in names
    assert "box.lan" not in names_of("127.0.0.1", "127.0.0.1", set())


@pytest.mark.parametrize("path", [
    "/gradio_api/process_recording", "/gradio_api/component_server", "/gradio_api/vibe-edit", "/gradio_api/stream/x",
    "/gradio_api/upload/", "/gradio_api/call/chat", "/login", "//gradio_api/upload", "/gradio_api/queue",
])  # fmt: skip
def test_only_what_the_page_itself_sends_is_let_through(guard, path):
    assert ask(guard, path=path)[0] == 404 and guard.app.read is None


@pytest.mark.parametrize("path", ["deep_link", "proxy=http://a", "file=http://a/", "file/https://a/", "file=HTTPS://a"])
def test_nothing_is_loaded_from_elsewhere(guard, path):
    assert ask(guard, "GET", f"/gradio_api/{path}")[0] == 404
    assert ask(guard, "DELETE", "/config")[0] == 405


@pytest.mark.parametrize("declares", [True, False])
@pytest.mark.parametrize("path, limit", [("/gradio_api/queue/join", 1_000_000), ("/gradio_api/upload", 2_000_000)])
def test_a_body_is_refused_before_more_than_its_bound_is_read(guard, path, limit, declares):
    for size, status in ((limit, 200), (limit + 1, 413), (30 * limit, 413)):
        parts = iter([bytes(100_000)] * (size // 100_000) + [bytes(size % 100_000)] * bool(size % 100_000))
        guard.app.read = 0
        found, text = ask(guard, path=path, body=parts, declared=size if declares else None)
        assert (found, guard.app.read == size) == (status, status == 200)
        assert guard.app.read <= limit and (status == 200 or f"at most {limit / 1e6:g} MB" in text)
        taken = size - sum(map(len, parts))
        assert taken <= (0 if declares and status == 413 else limit + 100_000)


def test_all_uploads_together_are_bounded(guard, tmp_path):
    statuses = []
    for number in range(8):
        statuses.append(ask(guard, path="/gradio_api/upload", body=[bytes(500_000)] * 2))
        if statuses[-1][0] == 200:
            (tmp_path / f"{number}.wav").write_bytes(bytes(1_000_000))
    assert [status for status, _ in statuses] == [200] * 5 + [507] * 3 and "disk space" in statuses[-1][1]
    os.utime(tmp_path / "0.wav", (0, 0))
    assert ask(guard, path="/gradio_api/upload", body=[bytes(500_000)])[0] == 200, "what is old makes room"
    assert not (tmp_path / "0.wav").exists()


def test_a_request_that_stops_in_its_middle_is_ended(guard, monkeypatch):
    monkeypatch.setattr(web_limits, "IDLE_S", 0.01)
    answer = []

    async def receive() -> dict:
        await asyncio.sleep(60)

    async def send(event: dict) -> None:
        answer.append(event)

    scope = {"type": "http", "method": "POST", "headers": [(b"host", b"localhost")]}
    for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
        asyncio.run(guard(scope | {"path": path}, receive, send))
        assert answer[-2]["status"] == 408


def test_any_number_of_small_files_is_bounded(tmp_path):
    folder = Folder(tmp_path, 10**6, 60)
    for number in range(20):
        (tmp_path / f"{number}").touch()
    folder.clean()
    assert not folder.take(1)
    folder.keep_what_is_there()
    folder.clean()
    assert folder.take(10**6) and not folder.take(1), "the page's own files do not count"


# ---------------------------------------------------------------------------------------------------------------
# The folder

KEEPS = """
import sys, time
from pathlib import Path
from omni.chat.server import own_folder
with own_folder(Path(sys.argv[1])) as folder:
    (folder / "upload").mkdir()
    (folder / "upload" / "voice.wav").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(60)
"""


def a_page(parent) -> tuple[subprocess.Popen, str]:
    line = [sys.executable, "-c", KEEPS, str(parent)]
    page = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return page, page.stdout.readline().strip()


def test_what_a_killed_page_left_is_removed_and_nothing_else(tmp_path):
    parent, elsewhere = tmp_path / "tmp", tmp_path / "elsewhere"
    parent.mkdir()
    killed, left = a_page(parent)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    shutil.copytree(left, elsewhere)  # as a dead page's, but not where pages are
    (parent / "omni_web_link").symlink_to(elsewhere)
    (parent / "omni_web_file").write_text("a file")
    (parent / "omni_web_unmarked").mkdir()
    (parent / "omni_web_marked_by_a_link").mkdir()
    (parent / "omni_web_marked_by_a_link" / ".owner").symlink_to(elsewhere / ".owner")
    (parent / "omni_web_other_mark").mkdir()
    (parent / "omni_web_other_mark" / ".owner").write_text("mine")
    os.mkfifo(parent / "omni_web_pipe")
    shutil.copytree(elsewhere, parent / "other_name")
    alive, kept = a_page(parent)
    assert not os.path.exists(left) and os.path.exists(kept)
    stay = {path.name for path in parent.iterdir()} - {os.path.basename(kept)}
    assert stay == {"omni_web_link", "omni_web_file", "omni_web_unmarked", "omni_web_marked_by_a_link", "other_name",
                    "omni_web_other_mark", "omni_web_pipe"}  # fmt: skip
    with own_folder(parent) as own, own_folder(parent) as another:
        assert os.path.exists(kept) and own.exists() and another.exists(), "those of living pages stay"
        assert own.stat().st_mode & 0o777 == 0o700
    assert not own.exists() and (elsewhere / "upload" / "voice.wav").exists()
    alive.kill()
    alive.wait()


def test_only_files_that_are_too_old_are_deleted(tmp_path):
    folder = Folder(tmp_path, 10**9, kept_s=3600)
    (tmp_path / "example.png").touch()
    os.utime(tmp_path / "example.png", (0, 0))
    folder.keep_what_is_there()
    (tmp_path / "hash").mkdir()
    for name, age in (("new", 0), ("younger", 3500), ("older", 3700), ("tmp_half_an_upload", 9999)):
        (tmp_path / "hash" / name).touch()
        os.utime(tmp_path / "hash" / name, (time.time() - age,) * 2)
    folder.clean()
    assert {path.name for path in (tmp_path / "hash").iterdir()} == {"new", "younger"}
    assert (tmp_path / "example.png").exists()
