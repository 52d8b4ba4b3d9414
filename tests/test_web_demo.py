"""scripts/web_demo.py: what the page answers, says and reads is what infer_chat.py does, for each visitor alone; what
is too large, broken or missing is one message; and a browser sees all that, and loads nothing from elsewhere."""

import asyncio
import base64
import html
import importlib.util
import json
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from harness import ROOT, Process
from packaging.requirements import Requirement
from test_config import only_error
from test_export import altered, options, picture, run, train_all
from test_media_kinds import MADE

import export
import infer_chat
from omni.chat.text import clean
from omni.common.errors import UserError

NEEDED = (("gradio", "pip install --no-deps -r requirements-web.txt"), ("playwright", "pip install playwright"))
MISSING = {name: f"{name} is not installed: {how}" for name, how in NEEDED if not importlib.util.find_spec(name)}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_gradio = pytest.mark.skipif("gradio" in MISSING, reason=MISSING.get("gradio", ""))
needs_browser = pytest.mark.skipif(
    bool(MISSING) or CHROMIUM is None, reason="; ".join(MISSING.values()) or "no chromium: apt-get install chromium"
)
SLOW = """
import time, omni.chat.assistant
_decoded = omni.chat.assistant.Assistant._decoded
def slow(self, ids, answer_states):
    for piece in _decoded(self, ids, answer_states):
        time.sleep(0.02)
        yield piece
omni.chat.assistant.Assistant._decoded = slow
"""  # an answer lasts long enough to be stopped
SAMPLED = {"temperature": 1.0, "seed": 4}


class Site:
    """A running page, and the gradio_client of a visitor for each call of ``visitor``."""

    def __init__(self, process: Process, folder: Path) -> None:
        self.process, self.folder = process, folder
        process.wait_for("http://127.0.0.1:")
        self.url = process.output.with_suffix(".out").read_text().strip()

    def visitor(self) -> "Visitor":
        from gradio_client import Client

        return Visitor(Client(self.url, verbose=False, download_files=str(self.folder), analytics_enabled=False))


class Visitor:
    def __init__(self, client) -> None:
        self.client = client

    def submit(self, text: str, *files: str, **settings):
        from gradio_client import handle_file

        asked = {"text": text, "files": [handle_file(file) for file in files]}
        settings = {"aloud": False, "temperature": 0, "top_p": 1, "max_new_tokens": 8, "seed": -1} | settings
        return self.client.submit(asked, *settings.values(), api_name="/chat")

    def ask(self, text: str, *files: str, **settings) -> list[str]:
        """What the page shows of the conversation then: texts, and names of files."""
        return shown(self.submit(text, *files, **settings).result(timeout=200))

    def refused(self, *arguments, api_name: str = "/chat", **settings) -> str:
        """The message that the page shows."""
        from gradio_client import handle_file
        from gradio_client.exceptions import AppError

        with pytest.raises(AppError) as error:
            if api_name == "/chat":
                self.ask(*arguments, **settings)
            else:
                self.client.predict(*map(handle_file, arguments), api_name=api_name)
        assert "\n" not in str(error.value)
        return html.unescape(str(error.value))


def shown(outputs: tuple) -> list[str]:
    contents = [content for message in outputs[0] for content in message["content"]]
    return [content["text"] if content["type"] == "text" else Path(content["file"]).name for content in contents]


def events(client, name: str, data: list, session: str | None = None) -> Iterator[dict]:
    """What the page is told, up to what an event ends with: JSON is sent as it is, so that it may be wrong."""
    import httpx

    api = f"{client.src}gradio_api" if client.src.endswith("/") else f"{client.src}/gradio_api"
    (fn_index,) = [fn["id"] for fn in client.config["dependencies"] if fn["api_name"] == name]
    session = session or secrets.token_hex(8)
    body = {"data": data, "fn_index": fn_index, "session_hash": session}
    inputs = [fn["inputs"] for fn in client.config["dependencies"] if fn["id"] == fn_index][0]
    body["data"] = [None] * (len(inputs) - len(data)) + data  # the visitor's state comes first
    httpx.post(
        f"{api}/queue/join", content=json.dumps(body), headers={"content-type": "application/json"}, trust_env=False
    ).raise_for_status()
    with httpx.stream("GET", f"{api}/queue/data?session_hash={session}", trust_env=False, timeout=200) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                yield (event := json.loads(line[5:]))
                if event["msg"] == "process_completed":
                    return
    raise AssertionError("the answer ended early")


def called(client, name: str, data: list) -> dict:
    """What an event ends with."""
    *_, last = events(client, name, data)
    return last["output"]


def start(cwd: Path, folder: Path, *more: str, prelude: str = "") -> Process:
    line = ("--ckpt_dir", str(folder), "--device", "cpu", "--port", "0", *more)
    return run(cwd, "scripts/web_demo.py", *line, prelude=prelude, wait=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders = train_all(tmp_path_factory.mktemp("stages"))

    def shaken(payload):  # so short a training gives one answer to everything
        torch.manual_seed(5)
        for name, weight in payload["model"].items():
            if weight.dim() == 2 and (name.startswith("thinker.") or payload["stage"] == "ocr"):
                weight.normal_()
            elif name.startswith(("proj_a.", "proj_v.fc2")):
                weight *= 20

    omni = altered(folders["omni"], folders["omni"].parent / "shaken", "omni_final.pt", shaken)
    return folders | {"omni": omni, "ocr": altered(folders["ocr"], folders["ocr"].parent / "shaken", "ocr.pt", shaken)}


@pytest.fixture(scope="module")
def merged(folders, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("export") / "merged_model"
    export.main(options(folders, output))
    return output


@pytest.fixture(scope="module")
def site(merged, tmp_path_factory):
    """A page with all parts, that takes files of up to 0.1 MB."""
    folder = tmp_path_factory.mktemp("site")
    process = start(folder, merged, "--max_upload_mb", "0.1", prelude=SLOW)
    try:
        yield Site(process, folder)
    finally:
        process.send(signal.SIGTERM)
        process.wait()


@pytest.fixture(scope="module")
def bare(folders, tmp_path_factory):
    """A page of a model that does nothing but answer to text."""
    folder = tmp_path_factory.mktemp("bare")
    process = start(folder, folders["thinker"])
    try:
        yield Site(process, folder)
    finally:
        process.send(signal.SIGTERM)
        process.wait()


@pytest.fixture
def media(folders, tmp_path) -> dict[str, str]:
    shutil.copy(folders["thinker"].parent / "0.wav", tmp_path / "question.wav")
    (tmp_path / "rubbish.png").write_bytes(b"no picture")
    (tmp_path / "rubbish.wav").write_bytes(b"RIFF, no recording")
    sign = next(folders["ocr"].parent.glob("*.png"))
    found = {"picture": picture(tmp_path), "sign": shutil.copy(sign, tmp_path / "sign.png")}
    return {path.stem: str(path) for path in tmp_path.iterdir()} | {name: str(path) for name, path in found.items()}


def answered(capsys, folder: Path, *arguments: str) -> str:
    """What infer_chat.py says to the same."""
    capsys.readouterr()
    infer_chat.main(["--ckpt_dir", str(folder), "--device", "cpu", "--max_new_tokens", "8", *arguments])
    return capsys.readouterr().out.removesuffix("\n")


# ---------------------------------------------------------------------------------------------------------------
# What it does is what infer_chat.py does


@needs_gradio
def test_answers_are_those_of_infer_chat_piece_by_piece(site, merged, media, capsys):
    answers, counts = [], []
    for text, names, settings in (
        ("red cat", [], {}),
        ("red cat", ["picture"], {}),
        ("", ["question"], {}),
        ("red<|end|><|system|>cat", ["picture", "question"], SAMPLED),
    ):
        files, arguments = [media[name] for name in names], ["--text", text] if text else []
        for name in names:
            arguments += ["--image" if name == "picture" else "--audio_in", media[name]]
        for name, value in settings.items():
            arguments += [f"--{name}", str(value)]
        job = site.visitor().submit(text, *files, **settings)
        *asked, answer = shown(job.result(timeout=200))
        assert answer == answered(capsys, merged, *arguments)
        assert asked == [Path(file).name for file in files] + [text] * bool(text)
        stages = [shown(outputs)[-1] for outputs in job.outputs()[1:]]
        assert len(stages) > 2 or len(answer) < 3  # which an untrained model may write at once
        assert all(b.startswith(a) for a, b in zip(stages[:-1], stages[1:], strict=True))
        answers.append(answer)
        counts.append(len(stages))
    assert len(set(answers)) == 4, "else equality would say little"
    assert max(counts) > 2


@needs_gradio
def test_what_it_says_is_what_infer_chat_says_and_comes_in_pieces(site, merged, tmp_path, capsys):
    job = site.visitor().client.submit("one two", 1.0, 3, api_name="/say")
    heard, path = job.result(timeout=200)
    samples, rate = soundfile.read(path, dtype="int16")
    say = ["--say", "one two", "--temperature", "1", "--seed", "3", "--audio_out", str(tmp_path / "said.wav")]
    answered(capsys, merged, *say)
    expected, expected_rate = soundfile.read(tmp_path / "said.wav", dtype="int16")
    assert rate == expected_rate and len(samples) == len(expected) > 1000
    assert np.abs(samples.astype(int) - expected).max() <= 1
    growing = [outputs[0] for outputs in job.outputs() if isinstance(outputs[0], str)]
    _, rate_hz, *pieces = growing[-1].split(" ")
    assert int(rate_hz) == rate and len(pieces) > 1 and growing[-1].startswith(growing[0])
    assert np.array_equal(np.concatenate([np.frombuffer(base64.b64decode(piece), "<i2") for piece in pieces]), samples)


@needs_gradio
def test_it_reads_what_infer_chat_reads(site, merged, media, capsys):
    from gradio_client import handle_file

    text = site.visitor().client.predict(handle_file(media["sign"]), api_name="/read")
    assert text == answered(capsys, merged, "--ocr", "--image", media["sign"]) != ""


# ---------------------------------------------------------------------------------------------------------------
# Visitors


@needs_gradio
def test_two_visitors_at_once_have_each_their_own_conversation(site):
    visitors, turns = [site.visitor(), site.visitor()], [["red cat", "big"], ["blue dog", "small"]]
    for turn in range(2):
        jobs = [visitor.submit(texts[turn], **SAMPLED) for visitor, texts in zip(visitors, turns, strict=True)]
        both = [shown(job.result(timeout=200)) for job in jobs]
    for texts, found in zip(turns, both, strict=True):
        alone = site.visitor()
        expected = [alone.ask(text, **SAMPLED) for text in texts][-1]
        assert found == expected and found[::2] == texts
    assert both[0][3] != site.visitor().ask("big", **SAMPLED)[1], "what was said before matters"


@needs_gradio
def test_a_stopped_answer_ends_and_stays_and_a_new_chat_forgets(site):
    visitor = site.visitor()
    job = visitor.submit("red cat", max_new_tokens=50)
    while len(job.outputs()) < 4:
        time.sleep(0.01)
    visitor.client.predict(api_name="/stop")
    half = shown([outputs for outputs in [job.result(timeout=200), *job.outputs()] if isinstance(outputs[0], list)][-1])
    whole = site.visitor().ask("red cat", max_new_tokens=50)
    assert half[0] == whole[0] and whole[1].startswith(half[1]) and len(half[1]) < len(whole[1])
    after = visitor.ask("dog")
    assert len(after) == 4 and after[:1] == half[:1] and whole[1].startswith(after[1]) and after[1].startswith(half[1])
    assert visitor.client.predict(api_name="/new_chat")[0] == []
    assert visitor.ask("dog")[:1] == ["dog"]


class Stub:
    """An assistant that answers at once, and a speaker that says a second of noise for each sentence."""

    folder, ctx_len, metrics, uses_thinker_states = Path("stub"), 1000, {}, False
    max_frames, code_s, spec = 100, 1.0, SimpleNamespace(sample_rate=1000)

    def __init__(self) -> None:
        self.events = []

    def lacks(self, encoder: str) -> None:
        return None

    def prompt(self, messages: list, max_new_tokens: int, tell=None) -> list:
        return messages

    def answer(self, prompt: list, answer_states, tell=None, **sampling):
        self.events.append("answered")
        yield "yes"

    def stream(self, text: str, thinker_states=None, **sampling):
        self.events.append(text)
        yield np.full(1000, 0.5, np.float32)

    def image(self, path: str) -> dict:
        return {"type": "image", "image": path}

    def sound(self, path: str) -> dict:
        return {"type": "audio", "audio": path}

    def video(self, path: str) -> tuple[list[dict], int]:
        return [{"type": "image", "image": path}] * 3, 3


@pytest.fixture
def stub(monkeypatch):
    """A page of a Stub whose pieces are slices of their own, and a visitor's request."""
    from omni.chat import server as web_limits
    from omni.chat import web

    monkeypatch.setattr(web_limits, "SLICE_S", 0)
    assistant = Stub()
    return web.Page(assistant, (assistant, ""), (None, "no reader"), 3), SimpleNamespace(session_hash="a")


def ask_stub(page, request, session, text: str, *files: str):
    return page.chat(session, {"text": text, "files": list(files)}, False, 0, 1, 8, -1, request)


async def to_the_end(outputs) -> list:
    return [output async for output in outputs]


@needs_gradio
@pytest.mark.parametrize("count", [3, 90])
def test_long_speech_lets_others_have_their_turn(stub, count):
    from omni.chat.web import Session

    page, request = stub

    async def main() -> list:
        saying = page.say(Session(), "One. " * count, 0, 0, request)
        await anext(saying)
        assert page.assistant.events == ["One."]
        said = asyncio.create_task(to_the_end(saying))
        await asyncio.sleep(0)
        page.assistant.events.append("asked")
        await to_the_end(ask_stub(page, request, Session(), "red cat"))
        return await said

    *_, (_, (rate, samples)) = asyncio.run(main())
    events = page.assistant.events
    assert events.index("answered") - events.index("asked") <= 3 and events.count("One.") == count
    assert len(samples) == count * rate + (count - 1) * rate // 5, "with a pause between two"
    assert page.turns.jobs == 0


@needs_gradio
def test_an_answer_is_heard_while_it_is_written(stub, monkeypatch):
    """And its text goes on where its speech is cut, or fails."""
    import gradio as gr

    from omni.chat import web

    page, request = stub
    words, told = ["Yes.", " Two", " red", " cats.", " And", " dogs."], []
    monkeypatch.setattr(web.gr, "Warning", told.append)
    monkeypatch.setattr(page.assistant, "answer", lambda *_, **__: iter(words), raising=False)

    def ask(aloud: bool = True) -> list[tuple]:
        asked = {"text": "red", "files": []}
        return asyncio.run(to_the_end(page.chat(web.Session(), asked, aloud, 0, 1, 8, -1, request)))

    def texts(outputs: list[tuple]) -> list[str]:
        return [shown[-1]["content"] for shown, *_ in outputs if isinstance(shown, list)]

    outputs = ask()
    sounds = [at for at, output in enumerate(outputs) if isinstance(output[2], str) and output[2].count(" ") > 1]
    first_text = next(at for at, output in enumerate(outputs) if isinstance(output[0], list) and len(output[0]) == 2)
    last_text = max(at for at, output in enumerate(outputs) if isinstance(output[0], list))
    assert first_text < sounds[0] < last_text < sounds[-1], "in turns"
    assert page.assistant.events == ["Yes.", "Two red cats.", "And dogs."]
    rate, samples = outputs[-1][3]
    assert len(samples) == 3 * rate + 2 * rate // 5 and texts(outputs)[-1] == "".join(words) and not told
    monkeypatch.setattr(web, "MAX_SPEECH_S", 0.5)
    assert texts(outputs := ask())[-1] == "".join(words) and "as long as this page speaks" in told[-1]
    assert len(outputs[-1][3][1]) == 0.5 * rate
    monkeypatch.setattr(page.assistant, "stream", lambda *_, **__: iter(()), raising=False)
    assert texts(ask())[-1] == "".join(words) and "made no sound" in told[-1]
    assert texts(ask(aloud=False))[-1] == "".join(words) and len(told) == 2
    with pytest.raises(gr.Error, match="made no sound"):
        asyncio.run(to_the_end(page.say(web.Session(), "One.", 0, 0, request)))


@needs_gradio
def test_one_visitors_requests_come_one_after_the_other_and_stop_ends_them_all(stub):
    from omni.chat.web import Session

    page, request = stub
    session = Session()

    async def main() -> list:
        saying = page.say(session, "One. Two. Three.", 0, 0, request)
        await anext(saying)
        waiting = asyncio.create_task(to_the_end(ask_stub(page, request, session, "red cat")))
        await asyncio.sleep(0.05)
        assert "answered" not in page.assistant.events
        session.stop()
        return [await to_the_end(saying), await waiting]

    assert asyncio.run(main()) == [[], []] and page.turns.jobs == 0
    assert "Three." not in page.assistant.events and "answered" not in page.assistant.events


@needs_gradio
def test_what_is_asked_said_and_kept_is_bounded(stub, monkeypatch):
    import gradio as gr

    from omni.chat import web

    page, request = stub
    told = []
    monkeypatch.setattr(web.gr, "Warning", told.append)

    def say(text: str) -> list:
        return asyncio.run(to_the_end(page.say(web.Session(), text, 0, 0, request)))

    monkeypatch.setattr(web, "MAX_SPEECH_S", 2.5)
    *_, (stream, (rate, samples)) = say("One. " * 600)
    assert len(samples) == web.MAX_SPEECH_S * rate and "as long as this page speaks" in told[-1]
    heard = [np.frombuffer(base64.b64decode(piece), "<i2") for piece in stream.split(" ")[2:]]
    assert np.array_equal(np.concatenate(heard), samples)
    page.take = lambda size: size < 2000
    assert len(say("One. Two.")[-1][0].split(" ")) == 2 + 3, "two sentences, and a pause between them"
    assert "cannot be played again" in told[-1]
    monkeypatch.setattr(web, "PATIENCE_S", 0)
    page.unread = lambda session_hash: 99
    with pytest.raises(gr.Error, match="too little was fetched"):
        say("One. Two.")
    page.unread = lambda session_hash: 0
    for text in ("a" * 200_000, "a " * 10**6):
        for refused in (lambda text=text: say(text), lambda text=text: asyncio.run(
            to_the_end(ask_stub(page, request, web.Session(), text)))):  # fmt: skip
            with pytest.raises(gr.Error, match="too long: expected at most"):
                refused()
    with pytest.raises(gr.Error, match="at most 8 files, found 9"):
        asyncio.run(to_the_end(ask_stub(page, request, web.Session(), "red", *["a.png"] * 9)))
    session = web.Session()
    for _ in range(70):
        asyncio.run(to_the_end(ask_stub(page, request, session, "red")))
    assert len(session.talk.shown) <= web.MAX_SHOWN + 1


@needs_gradio
def test_who_comes_when_all_turns_are_taken_is_told_at_once(stub):
    import gradio as gr

    from omni.chat.web import Session

    page, request = stub

    async def main() -> None:
        jobs = [page.say(Session(), "One. Two.", 0, 0, request) for _ in range(3)]
        for job in jobs:
            await anext(job)
        for refused in (ask_stub(page, request, Session(), "red"), page.say(Session(), "One.", 0, 0, request)):
            with pytest.raises(gr.Error, match="3 requests are being answered"):
                await anext(refused)
        with pytest.raises(gr.Error, match="3 requests are being answered"):
            await page.read("a.png")
        await jobs[0].aclose()
        assert len(await to_the_end(ask_stub(page, request, Session(), "red"))) == 2

    asyncio.run(main())


@needs_gradio
@pytest.mark.parametrize("name", ["a.webp", "a.jfif", "a", "a.wav", "a.png", "a.mp4", "a.txt"])
def test_files_are_sorted_by_what_they_contain(stub, tmp_path, name):
    page, _ = stub
    path = str(tmp_path / name)
    for what, types in (("PNG picture", ["image"]), ("WAV sound", ["audio"]), ("mp4 sound alone", ["audio"]),
                        ("webm film with sound", ["image"] * 3)):  # fmt: skip
        (tmp_path / name).write_bytes(MADE[what][1]())
        assert [part["type"] for part in page.parts(path)] == types, what
    (tmp_path / name).write_bytes(b"rubbish")
    assert [part["type"] for part in page.parts(path)] == [
        "image" if name in ("a.webp", "a.jfif", "a.png") else "audio"
    ]
    with pytest.raises(UserError, match="absent"):
        page.parts(f"{path}.absent")


@needs_gradio
@pytest.mark.parametrize("fault", [RuntimeError("<b>a</b>\nsecond"), KeyError("x"), MemoryError(), RecursionError()])
def test_any_fault_of_the_program_is_one_line_for_that_visitor(stub, capsys, fault):
    import gradio as gr

    from omni.chat.web import Session

    page, request = stub

    def fail(*arguments, **settings):
        raise fault

    for part in ("answer", "stream", "image"):
        setattr(page.assistant, part, fail)
    for ended in (
        lambda: asyncio.run(to_the_end(ask_stub(page, request, Session(), "red"))),
        lambda: asyncio.run(to_the_end(page.say(Session(), "One.", 0, 0, request))),
    ):
        with pytest.raises(gr.Error) as error:
            ended()
        assert re.fullmatch(rf"the page&#x27;s program failed \({type(fault).__name__}\); .*", error.value.message)
        assert "Traceback" in capsys.readouterr().err and page.turns.jobs == 0


@pytest.mark.parametrize("text", ["red \ud800 cat", "\udcff", "\udfff\ud800", "\U0001f600 \ud83d"])
def test_half_of_a_surrogate_pair_is_replaced(text):
    cleaned = clean(text)
    assert len(cleaned) == len(text) and cleaned.encode().decode() == cleaned
    assert all(one == other or one == "\ufffd" for one, other in zip(cleaned, text, strict=True))
    assert clean(cleaned) == cleaned


@needs_gradio
def test_messages_are_one_line_and_escaped(stub):
    import gradio as gr

    from omni.chat.web import in_the_page

    with pytest.raises(gr.Error) as error, in_the_page("/tmp/secret/<i>.png"):
        raise UserError("/tmp/secret/<i>.png: <b>\nbroken")
    assert error.value.message == "&lt;i&gt;.png: &lt;b&gt; broken"


@needs_gradio
def test_gradio_keeps_a_bounded_number_of_visitors(stub):
    import gradio as gr
    from gradio.routes import App

    from omni.chat import web

    page, _ = stub
    with gr.Blocks() as blocks:
        state = gr.State(web.Session)
        web.bound_gradio(blocks, page)
    holder = App.create_app(blocks).state_holder
    for number in range(web.SESSIONS + 20):
        assert isinstance(holder[str(number)][state._id], web.Session)
        blocks._queue.pending_messages_per_session[str(number)] = None
    assert len(holder.session_data) <= web.SESSIONS + 1 and str(number) in holder
    assert len(blocks._queue.pending_messages_per_session) <= web.SESSIONS
    assert blocks._queue.max_size == 3 and not blocks.api_open


# ---------------------------------------------------------------------------------------------------------------
# What is refused


@needs_gradio
def test_broken_files_are_one_message_and_the_page_lives_on(site, media):
    visitor = site.visitor()
    expected = visitor.ask("red cat")
    for name, fragment in (("rubbish.png", "not a picture"), ("rubbish.wav", "not an audio file")):
        file = str(Path(media["picture"]).parent / name)
        assert re.match(rf"{name}: .*{fragment}", visitor.refused("red", file)), "its own name, and no folder of ours"
        assert visitor.ask("red cat")[:2] == expected
    assert "not a picture" in visitor.refused(str(Path(media["picture"]).parent / "rubbish.png"), api_name="/read")
    assert "expected a question" in visitor.refused("", media["picture"])
    assert "takes" in visitor.refused("cat " * 99) and "ctx_len 64" in visitor.refused("cat " * 99)
    assert "maximum" in visitor.refused("red", temperature=100).lower()


@needs_gradio
def test_an_upload_over_the_limit_is_refused(site):
    import httpx

    for size, status in ((90_000, 200), (110_000, 413)):
        sent = httpx.post(f"{site.url}/gradio_api/upload", files={"files": ("a.png", bytes(size))}, trust_env=False)
        assert sent.status_code == status, sent.text


@needs_gradio
def test_a_file_that_was_not_uploaded_is_not_read(site, media):
    import httpx

    api = f"{site.url}/gradio_api"
    with open(media["sign"], "rb") as file:
        (uploaded,) = httpx.post(f"{api}/upload", files={"files": file}, trust_env=False).json()
    visitor = site.visitor().client
    for path, is_read in ((uploaded, True), (media["sign"], False), (f"{site.url}/theme.css", False)):
        given = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for name, data in (("read", [given]), ("chat", [{"text": "red", "files": [given]}, False, 0, 1, 8, -1])):
            output = called(visitor, name, data)
            assert ("error" not in output) is is_read
            assert "found an address" in output["error"] if path.startswith("http") else True
        status = httpx.get(f"{api}/file={path}", trust_env=False).status_code
        assert status == 200 if is_read else status in (403, 404)


@needs_gradio
def test_texts_that_are_no_unicode_are_answered(site):
    visitor = site.visitor()
    for text in ("red \ud800 cat", "\udcff", "\udfff\ud800"):
        output = called(visitor.client, "chat", [{"text": text, "files": []}, False, 0, 1, 8, -1])
        (asked, answer) = output["data"][0]
        assert re.sub("[\ud800-\udfff]", "\ufffd", text) == asked["content"][0]["text"]
    for asked, temperature, shows in (
        ({"text": "a", "files": []}, 9, "greater than"), ({"text": "a", "files": []}, [[]], "program failed"),
        (["a"], 0, "program failed"), ({"text": 7, "files": []}, 0, "program failed"),
        ({"text": "a", "files": [{"path": "\ud800", "meta": {"_type": "gradio.FileData"}}]}, 0, ""),
    ):  # fmt: skip
        found = called(visitor.client, "chat", [asked, False, temperature, 1, 8, -1])["error"]
        assert shows in found and "\n" not in found and str(ROOT) not in found
    assert visitor.ask("red cat")[0] == "red cat"


@needs_gradio
def test_the_page_says_what_is_cut_and_forgotten(site):
    client, session = site.visitor().client, secrets.token_hex(8)

    def told() -> list[str]:
        asked = [{"text": "red cat " * 4, "files": []}, False, 0, 1, 3, -1]
        return [event["log"] for event in events(client, "chat", asked, session) if event["msg"] == "log"]

    first, *later = [told() for _ in range(8)]
    assert first == ["the answer was cut by max_new_tokens 3"]
    assert any("of the oldest questions are forgotten" in line for lines in later for line in lines)


@needs_gradio
def test_uploads_of_other_origins_are_refused_and_broken_ones_leave_nothing(site):
    import httpx

    def upload(**headers: str) -> httpx.Response:
        url = f"{site.url}/gradio_api/upload"
        return httpx.post(url, files={"files": ("a.png", b"x")}, headers=headers, trust_env=False)

    assert upload(origin="http://evil.example").status_code == upload(host="evil.example").status_code == 403
    folder = Path(upload(origin=site.url).json()[0]).parent.parent
    assert folder.name.startswith("omni_web_") and (folder / ".owner").exists()
    form = '--x\r\nContent-Disposition: form-data; name="files"%s\r\n\r\n'
    for kind, rest in (('; filename="a.png"', None), ("", b"z" * 90_000 + b"\r\n--x--\r\n")):
        body = (form % kind).encode() + (rest or b"z" * 5000)
        with socket.create_connection(("127.0.0.1", int(site.url.rsplit(":", 1)[1])), timeout=200) as connection:
            head = (
                "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x"
            )
            connection.sendall(f"{head}\r\nContent-Length: {len(body) + (rest is None)}\r\n\r\n".encode() + body)
            if rest is None:  # the visitor leaves in the middle
                while not any(path.name.startswith("tmp") for path in folder.iterdir()):
                    time.sleep(0.01)
            else:
                assert b" 400 " in connection.recv(1000)
    while any(path.name.startswith("tmp") for path in folder.iterdir()):
        time.sleep(0.01)


@needs_gradio
def test_only_this_machine_reaches_it_and_no_site_of_another_name(site):
    import httpx

    port = int(site.url.rsplit(":", 1)[1])
    lines = (Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()).splitlines()
    sockets = [line.split() for line in lines]
    bound = [fields[1] for fields in sockets if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")]
    assert bound == [f"0100007F:{port:04X}"]
    page = httpx.get(site.url, trust_env=False)
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    assert httpx.get(site.url, headers={"Host": "evil.example"}, trust_env=False).status_code == 403


@needs_gradio
def test_what_the_model_lacks_is_switched_off_with_the_reason(bare, media):
    visitor = bare.visitor()
    components = {part["id"]: part["props"] for part in visitor.client.config["components"]}
    (able,) = [props["value"] for props in components.values() if props.get("elem_id") == "able"]
    assert all(f"<s>{what}</s>" in able for what in ("pictures", "recordings", "speech", "OCR"))
    assert "takes no pictures" in able and "--talker_ckpt" in able and "--ocr_ckpt" in able
    (ask,) = [props for props in components.values() if props.get("elem_id") == "ask"]
    assert ask["sources"] == []
    buttons = {props.get("value"): props["interactive"] for props in components.values() if "size" in props}
    assert buttons["Say it"] is buttons["Read it"] is False
    assert "takes no pictures" in visitor.refused("red", media["picture"])
    assert "takes no recordings" in visitor.refused("", media["question"])
    assert "ocr.pt" in visitor.refused(media["sign"], api_name="/read")
    with pytest.raises(Exception, match=r"talker\.pt"):
        visitor.client.predict("one", 0, 0, api_name="/say")
    assert len(visitor.ask("red", aloud=True)) == 2


@needs_gradio
def test_what_cannot_be_served_ends_with_code_2(folders, tmp_path):
    from scripts import web_demo

    only_error(start(tmp_path, tmp_path / "absent").wait(), "absent: expected a folder with thinker.pt")
    damaged = shutil.copytree(folders["talker"], tmp_path / "talker")
    (damaged / "talker.pt").write_bytes(b"rubbish")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, expected in (
            (["--talker_ckpt", str(damaged)], r"talker\.pt"),
            (["--port", port], f"--port {port}: cannot listen there: Address already in use"),
            (["--host", "192.0.2.1"], "--host 192.0.2.1 .*: cannot listen there"),
            (["--max_upload_mb", "0"], "--max_upload_mb: expected more than 0"),
            (["--max_disk_mb", "-1"], "--max_disk_mb: expected more than 0"),
            (["--max_requests", "0"], "--max_requests: expected more than 0"),
            (["--allow_origin", "demo.example"], "--allow_origin: expected http://NAME"),
        ):
            with pytest.raises(UserError, match=expected):
                web_demo.main(["--ckpt_dir", str(folders["thinker"]), "--device", "cpu", *arguments])


def test_without_gradio_one_line_says_how_to_install_it(folders, tmp_path):
    process = start(tmp_path, folders["thinker"], prelude='import sys\nsys.modules["gradio"] = None\n')
    only_error(process.wait(), "needs Gradio", "make web")


@needs_gradio
def test_another_host_is_announced(capsys):
    from scripts import web_demo

    for host, said in (("0.0.0.0", "neither password nor encryption"), ("127.0.0.1", "")):
        listening, url = web_demo.listen(host, 0)
        listening.close()
        err = capsys.readouterr().err
        assert url.startswith(f"http://{host}:") and said in err and bool(said) == bool(err)


@needs_gradio
def test_requirements_web_is_all_that_gradio_needs_and_changes_no_pin():
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    def pins(file: str) -> dict[str, str]:
        lines = (ROOT / file).read_text().splitlines()
        return {
            normal(name): version
            for name, version in (line.partition(";")[0].split("==") for line in lines if "==" in line)
        }

    def needs(package: str) -> list[Requirement]:
        needed = map(Requirement, metadata.requires(package) or [])
        return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]

    web, base = pins("requirements-web.txt"), pins("requirements.txt")
    assert not web.keys() & base.keys()
    brought, new = set(), set(base)
    while new:  # by requirements.txt
        brought |= new
        new = {normal(needed.name) for package in new for needed in needs(package)} - brought
    for package in web:
        for needed in needs(package):
            assert normal(needed.name) in web.keys() | brought, f"{package} needs {needed}"
            assert needed.specifier.contains(metadata.version(needed.name)) or needed.name == "pillow", needed
    assert all(metadata.version(package).split("+")[0] == version for package, version in (web | base).items())


# ---------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--mute-audio"])


def attach(page, file: str) -> None:
    with page.expect_response(lambda response: "/upload" in response.url and response.ok):
        page.locator("#ask input[type=file]").set_input_files(file)
    page.locator("#ask").get_by_role("button", name="Remove file").wait_for()


@needs_browser
def test_in_a_browser(browser, site, merged, media, tmp_path, capsys):
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 1280, "height": 860})
    requests, problems = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.goto(site.url)
    ask, answers = page.locator("#ask textarea"), page.get_by_test_id("bot")
    ask.fill("red cat")
    ask.press("Enter")
    expected = answered(capsys, merged, "--text", "red cat", "--max_new_tokens", "63")
    expect(answers).to_have_text(expected)
    attach(page, media["picture"])
    ask.fill("big")
    ask.press("Enter")
    page.locator("#chat img").wait_for()
    expect(answers).to_have_count(2)
    page.get_by_role("button", name="Stop").first.click()
    assert problems == []

    attach(page, str(tmp_path / "rubbish.png"))
    ask.fill("dog")
    ask.press("Enter")
    expect(page.get_by_text("rubbish.png: cannot read the picture")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(answers).to_have_count(0)

    page.get_by_role("tab", name="Say a text").click()
    numbers = page.get_by_role("tabpanel").locator("input[type=number]:visible")
    numbers.nth(0).fill("1")
    numbers.nth(1).fill("3")
    page.get_by_role("button", name="Say it").click()
    page.locator("#say_wav").get_by_label("Play", exact=True).wait_for()
    assert int(page.locator("[data-played]").get_attribute("data-played")) > 1, "piece by piece"
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5000
    away = [url for url in requests if not url.startswith((site.url, "data:", "blob:"))]
    assert away == [] and len(requests) > 20


class Deaf:
    """An assistant that takes pictures and no recordings."""

    def lacks(self, encoder: str) -> str | None:
        return "no recordings" if encoder == "audio_encoder" else None


def test_examples_are_copied_and_those_that_do_not_suit_the_model_left_out(tmp_path):
    from scripts.web_demo import read_examples

    (tmp_path / "shown").mkdir()
    (tmp_path / "page").mkdir()
    shutil.copy(picture(tmp_path), tmp_path / "shown" / "a b.png")
    soundfile.write(tmp_path / "shown" / "c.wav", np.zeros(1600), 16_000)
    ask = [{"text": "Hello!"}, {"text": "What is it?", "files": ["a b.png"]}, {"text": "", "files": ["c.wav"]}]
    source = tmp_path / "shown" / "examples.json"
    source.write_text(json.dumps({"ask": ask, "read": ["a b.png"]}))
    asked, read = read_examples(source, Deaf(), tmp_path / "page")
    assert [one["text"] for one in asked] == ["Hello!", "What is it?"] and asked[0]["files"] == []
    copies = [Path(asked[1]["files"][0]), *read]
    assert all(path.parent == tmp_path / "page" for path in copies) and len(set(copies)) == 2
    assert {path.read_bytes() for path in copies} == {(tmp_path / "shown" / "a b.png").read_bytes()}
    for wrong, message in (
        ({"ask": [{"text": "x", "files": ["none.png"]}], "read": []}, "none.png: expected a file"),
        ({"ask": ["x"], "read": []}, "expected {"),
        ({"read": []}, "expected {"),
        ([], "expected a JSON object"),
    ):
        source.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            read_examples(source, Deaf(), tmp_path / "page")
