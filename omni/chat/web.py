"""Functions and layout of the web page, which ``scripts/web_demo.py`` serves. Needs Gradio."""

import asyncio
import base64
import contextlib
import html
import mimetypes
import random
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

import gradio as gr
import gradio.processing_utils
import gradio.route_utils
import gradio.utils
import numpy as np

from omni.chat.assistant import AnswerStates, Assistant, check_text_length, message
from omni.chat.ocr import read_picture
from omni.chat.server import Turns
from omni.chat.speech import speak
from omni.chat.text import clean
from omni.chat.web_speech import bounded, warn, warn_of_cut, warned
from omni.chat.web_voices import chosen_voice, voice_inputs
from omni.common.errors import BadRow, UserError
from omni.common.media import kind_of
from omni.models.ocr import OcrModel
from omni.models.speaker import Speaker

KEPT_S, CLEANED_S = 3600, 600  # age at which uploads and speech are deleted; seconds between two deletions
MAX_FILES = 8  # attachments of one message
MAX_SHOWN = 100  # messages of a conversation
MAX_SPEECH_S = 120.0  # per request
SESSIONS = 256  # visitors whose conversation is kept
MAX_UNREAD, PATIENCE_S = 32, 30  # unfetched messages of a visitor, and how long the page waits at this bound

# Plays speech as it comes. The value is "RUN RATE_HZ PIECE PIECE ...", each piece base64 of 16-bit samples; it grows,
# as the browser may see several changes as one. Another run silences the one before.
PLAYER = """
let run = "", context = null, played = 0, at = 0;
watch("value", () => {
  const [id, rate, ...pieces] = (props.value || "").split(" ");
  if (id !== run) { context?.close(); run = id; context = null; played = at = 0; }
  for (const piece of pieces.slice(played)) {
    context ??= new AudioContext();
    const samples = new Int16Array(Uint8Array.from(atob(piece), (c) => c.charCodeAt(0)).buffer);
    const buffer = context.createBuffer(1, samples.length, Number(rate)), source = context.createBufferSource();
    buffer.copyToChannel(Float32Array.from(samples, (sample) => sample / 32768), 0);
    source.buffer = buffer;
    source.connect(context.destination);
    at = Math.max(at, context.currentTime + 0.05);
    source.start(at);
    at += buffer.duration;
    element.dataset.played = ++played;
  }
});
"""


class Session:
    """One visitor."""

    def __init__(self) -> None:
        self.run, self.talk = 0, Talk()
        self.turn = asyncio.Lock()  # one request at a time

    def stop(self) -> str:
        """Stop the answer or speech in progress; returns the value that silences the player."""
        self.run += 1
        return ""

    def clear(self) -> tuple:
        """Begin a new conversation; returns the values of the page's components."""
        self.talk = Talk()
        return [], None, self.stop(), None


class Talk:
    """A conversation, as the model reads it and as the page displays it."""

    def __init__(self) -> None:
        self.messages, self.shown = [], []


def given(seed: int | None) -> int | None:
    """A visitor's seed; None if the field is empty or negative."""
    return None if seed is None or seed < 0 else seed


class Page:
    """The functions of the page's buttons. Their computations take turns.

    Args:
        speaker, reader: (model, ""), or (None, the reason).
        max_requests: largest number of requests at a time, waiting ones included.
        take: reserves disk space for a number of bytes; False if there is none.
    """

    def __init__(
        self,
        assistant: Assistant,
        speaker: tuple[Speaker | None, str],
        reader: tuple[OcrModel | None, str],
        max_requests: int = 64,
        take: Callable[[int], bool] = lambda size: True,
    ) -> None:
        self.assistant, (self.speaker, self.no_speaker), (self.reader, self.no_reader) = assistant, speaker, reader
        self.turns, self.take = Turns(max_requests), take
        self.unread: Callable[[str], int] = lambda session_hash: 0  # messages that a visitor has not fetched yet

    async def chat(
        self, session: Session, asked: dict, aloud: bool, temperature, top_p, max_new_tokens, seed, request: gr.Request,
        voice: str | None = None, voice_file: str | None = None,
    ) -> AsyncIterator[tuple]:  # fmt: skip
        """Yield the conversation, the emptied input, the speech so far, and at the end the whole speech."""
        run, files = session.run, asked["files"]
        with in_the_page(*files, voice_file), self.turns.job():
            check_text_length(asked["text"] or "", self.assistant.ctx_len)
            if len(files) > MAX_FILES:
                raise UserError(f"expected at most {MAX_FILES} files, found {len(files)}")
            async with session.turn:
                if session.run != run:
                    return
                talk, text = session.talk, clean(asked["text"] or "")
                attached = [part for path in files for part in await self.turns.read(self.parts, path)]
                if not text.strip() and not any(part["type"] == "audio" for part in attached):
                    raise UserError("expected a question: a text or a recording")
                messages, max_new_tokens = [*talk.messages, message(attached, text)], int(max_new_tokens)
                answer_states = AnswerStates()
                sampling = {
                    "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": given(seed),
                    "top_p": top_p if temperature and top_p < 1 else None,
                }  # fmt: skip
                pieces = await self.turns.compute(self.answer, messages, answer_states, sampling)
                contents = [{"path": path} for path in files] + [text] * bool(text.strip())
                shown = talk.shown + [{"role": "user", "content": content} for content in contents]
                shown, answer = shown[-MAX_SHOWN:], {"role": "assistant", "content": ""}
                yield shown, None, "", None
                talk.messages, talk.shown = [*messages, answer], [*shown, answer]  # also an answer that is stopped
                spoken = pieces
                if aloud and self.speaker is not None:
                    try:
                        voice = await chosen_voice(self.turns, self.speaker, voice, voice_file)
                        how = {"reference": voice, "answer_states": answer_states}
                        spoken = warned(speak(self.speaker, pieces, "the answer", warn_of_cut, **how))
                    except UserError as error:  # the answer stands
                        warn(str(error))
                async for new, player, whole in self.stream(session, run, request, spoken, pieces):
                    answer["content"] += new or ""
                    yield gr.skip() if new is None else [*shown, answer], gr.skip(), player, whole

    def parts(self, path: str) -> list[dict]:
        """A file as parts of a message; its content tells its kind, or else its name."""
        try:
            kind = kind_of(path)
        except BadRow as error:
            raise UserError(str(error)) from error
        if kind == "film":
            return self.assistant.video(path)[0]
        is_picture = (mimetypes.guess_type(path)[0] or "").startswith("image/")
        if kind == "picture" or (kind == "unknown" and is_picture):
            return [self.assistant.image(path)]
        return [self.assistant.sound(path)]

    def answer(self, messages: list[dict], answer_states: AnswerStates, sampling: dict) -> Iterator[str]:
        """Pieces of the answer; ``messages`` loses the turns that no longer fit."""
        prompt = self.assistant.prompt(messages, sampling["max_new_tokens"], warn)
        return self.assistant.answer(prompt, answer_states, warn, **sampling)

    async def say(
        self, session: Session, text: str, temperature: float, seed: int, request: gr.Request,
        voice: str | None = None, voice_file: str | None = None,
    ) -> AsyncIterator[tuple]:  # fmt: skip
        """Yield the speech so far, and at the end the whole speech."""
        run = session.run
        with in_the_page(voice_file), self.turns.job():
            if self.speaker is None:
                raise UserError(self.no_speaker)
            check_text_length(text or "")
            text = clean(text or "")
            if not text.strip():
                raise UserError("expected a text to say")
            seed = random.getrandbits(53) if given(seed) is None else seed
            sampling = {"temperature": temperature, "seed": seed}
            async with session.turn:
                sampling["reference"] = await chosen_voice(self.turns, self.speaker, voice, voice_file)
                spoken = speak(self.speaker, [text], "the text", warn_of_cut, **sampling)
                sound = (piece for piece in spoken if not isinstance(piece, str))
                async for _, player, whole in self.stream(session, run, request, sound):
                    yield player, whole

    async def stream(
        self, session: Session, run: int, request: gr.Request, spoken: Iterator[str | np.ndarray],
        pieces: Iterable[str] = (),
    ) -> AsyncIterator[tuple]:  # fmt: skip
        """Yield new text or None, the value for PLAYER, and at the end the whole speech as (rate in Hz, (S,) int16),
        unless stopped.

        Args:
            spoken: see ``speak``.
            pieces: the text that is spoken; it goes on after ``MAX_SPEECH_S`` of speech.
        """
        rate, sounds = self.speaker.spec.sample_rate if self.speaker else 0, []
        player = f"{time.monotonic_ns()} {rate}"
        async for some in self.turns.slices(bounded(spoken, pieces, MAX_SPEECH_S, rate)):
            if session.run != run:
                return
            heard = [piece for piece in some if not isinstance(piece, str)]
            heard = [np.rint(np.clip(piece, -1, 1) * 32767).astype("<i2") for piece in heard]
            player += "".join(f" {base64.b64encode(piece.tobytes()).decode()}" for piece in heard if len(piece))
            sounds += heard
            new = [piece for piece in some if isinstance(piece, str)]
            yield "".join(new) if new else None, player if heard else gr.skip(), gr.skip()
            await self.fetched(request)
        if sounds and self.take(2 * sum(map(len, sounds))):
            yield None, player, (rate, np.concatenate(sounds))
        elif sounds:
            warn("the page's disk space is used up: this speech cannot be played again")

    async def read(self, path: str | None) -> str:
        """The text in a picture file."""
        with in_the_page(path), self.turns.job():
            if self.reader is None:
                raise UserError(self.no_reader)
            if path is None:
                raise UserError("expected a picture of a line of text")
            return await self.turns.read(read_picture, self.reader, path)

    async def fetched(self, request: gr.Request) -> None:
        """Wait until the visitor has fetched most messages, which occupy memory until then.

        Raises:
            UserError: the visitor takes too long.
        """
        end = time.monotonic() + PATIENCE_S
        while self.unread(request.session_hash) >= MAX_UNREAD:
            if time.monotonic() > end:
                raise UserError(f"stopped, as too little was fetched for {PATIENCE_S} s")
            await asyncio.sleep(0.1)


@contextlib.contextmanager
def in_the_page(*files: str | None) -> Iterator[None]:
    """Show errors to this visitor, with the visitor's file names. A fault of the program goes to stderr; the page shows
    only its kind."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for file in filter(None, files):
            text = text.replace(file, Path(file).name)
        raise gr.Error(html.escape(" ".join(text.split())), print_exception=False) from error
    except gr.Error as error:  # Gradio's own: a value out of its range
        error.print_exception = False
        raise
    except Exception as error:
        lines = traceback.format_exc().splitlines()
        print("\n".join(line[:200] for line in lines), file=sys.stderr)  # lines may contain a visitor's text
        text = f"the page's program failed ({type(error).__name__}); its terminal says where"
        raise gr.Error(html.escape(text), print_exception=False) from error


class Uploads(gradio.route_utils.GradioMultiPartParser):
    """Gradio's parser of uploads, which accepts only files and deletes those of an interrupted upload."""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None:  # Gradio would collect it in memory
            raise gradio.route_utils.MultiPartException("expected nothing but files")
        super().on_part_data(data, start, end)

    async def parse(self):
        try:
            return await super().parse()
        except BaseException:
            for file in self._files_to_close_on_error:
                file.close()
                Path(file.name).unlink(missing_ok=True)
            raise


async def _load_nothing(url: str, cache_dir: str) -> str:
    raise gr.Error("expected an uploaded file, found an address", print_exception=False)


def bound_gradio(blocks: gr.Blocks, page: Page) -> None:
    """Bound the memory that Gradio uses for visitors, and switch off its other features."""
    gradio.route_utils.GradioMultiPartParser = Uploads
    gradio.processing_utils.async_ssrf_protected_download = _load_nothing  # a file's name may be any address
    blocks.state_session_capacity = SESSIONS  # the least recently used one goes first
    blocks.queue(max_size=page.turns.most, api_open=False)
    queue = blocks._queue
    queue.max_thread_count = page.turns.most + 8  # these get the page's own refusal
    process = blocks.process_api

    async def process_api(*arguments, **settings) -> dict:  # also covers Gradio's code before and after our functions
        with in_the_page():
            return await process(*arguments, **settings)

    blocks.process_api = process_api
    queue.pending_messages_per_session = unread = gradio.utils.LRUCache(SESSIONS)
    page.unread = lambda session_hash: unread[session_hash].qsize() if session_hash in unread else 0


def build(page: Page, name: str, examples: list[dict], signs: list[Path]) -> gr.Blocks:
    """The layout of the page, and the functions of its buttons.

    Args:
        name: name of the model.
        examples: questions as ``gr.MultimodalTextbox`` takes them.
        signs: pictures of a line of text.
    """
    assistant, able, absent = page.assistant, ["text"], []
    no_images, no_audio = assistant.lacks("vision_encoder"), assistant.lacks("audio_encoder")
    no_speech, no_ocr = page.no_speaker, page.no_reader
    reasons = {"pictures": no_images, "recordings": no_audio, "speech": no_speech, "OCR": no_ocr}
    for what, reason in reasons.items():
        able.append(f"<s>{what}</s>" if reason else what)
        absent += [f"<br><small><s>{what}</s>: {html.escape(reason)}</small>"] if reason else []
    if assistant.metrics.get("dialogue_share") == 0:
        absent.append("<br><small>trained on text without dialogues</small>")
    attach = " or ".join(["a picture", "a film"] * (not no_images) + ["a recording"] * (not no_audio))
    griffin_lim = "" if no_speech or page.speaker.vocoder else "no vocoder: sentence by sentence"

    def seed(**more) -> gr.Number:
        return gr.Number(-1, precision=0, minimum=-1, maximum=2**53, label="Seed", info="-1: another each time", **more)

    wav = {"interactive": False, "buttons": ["download"]}
    with gr.Blocks(title=f"μOmni: {name}", analytics_enabled=False, delete_cache=(CLEANED_S, KEPT_S)) as blocks:
        session = gr.State(Session)
        gr.HTML(f"<h2>μOmni</h2><b>{html.escape(name)}</b>: {' · '.join(able)}{''.join(absent)}", elem_id="able")
        player = gr.HTML("", html_template="<i></i>", js_on_load=PLAYER, elem_id="player", visible="hidden")
        voice = voice_inputs(page.speaker)  # of both tabs that speak
        with gr.Tab("Chat"), gr.Row():
            with gr.Column(scale=3):
                chat = gr.Chatbot(
                    show_label=False, height=420, render_markdown=False, buttons=["copy_all"], elem_id="chat"
                )
                box = gr.MultimodalTextbox(
                    show_label=False, autofocus=True, file_count="multiple",
                    placeholder="Ask something" + (f", or attach {attach}" if attach else ""), elem_id="ask",
                    sources=["upload"] * bool(attach) + ["microphone"] * (not no_audio), max_plain_text_length=10**6,
                )  # fmt: skip
                with gr.Row():
                    stop, new = gr.Button("Stop", size="sm"), gr.Button("New chat", size="sm")
                if examples:
                    gr.Examples([[example] for example in examples], box, label="Examples")
            with gr.Column(scale=1, min_width=260):
                aloud = gr.Checkbox(
                    not no_speech, label="Speak the answer", interactive=not no_speech, info=no_speech or griffin_lim
                )
                answer_wav = gr.Audio(label="The answer", visible=not no_speech, elem_id="answer_wav", **wav)
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: always the most likely token")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="with a temperature; 1: off")
                most = assistant.ctx_len - 1
                max_new_tokens = gr.Slider(1, most, min(128, most), step=1, label="Max new tokens")
                asked = [session, box, aloud, temperature, top_p, max_new_tokens, seed(), *voice]
        with gr.Tab("Say a text"):
            gr.HTML(html.escape(no_speech), visible=bool(no_speech))
            text = gr.Textbox("Anna is reading at the market.", lines=3, label="Text", interactive=not no_speech)
            with gr.Row():
                say_temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", interactive=not no_speech)
                say_seed = seed(interactive=not no_speech)
            with gr.Row():
                say = gr.Button("Say it", variant="primary", interactive=not no_speech)
                hush = gr.Button("Stop", interactive=not no_speech)
            say_wav = gr.Audio(label="Speech", visible=not no_speech, elem_id="say_wav", **wav)
        with gr.Tab("Read a sign"):
            gr.HTML(html.escape(no_ocr), visible=bool(no_ocr))
            picture = gr.Image(
                type="filepath", label="A picture of a line of text", height=240, interactive=not no_ocr,
                sources=["upload", "clipboard"], buttons=["fullscreen"],
            )  # fmt: skip
            picture.preprocess = lambda given: given and given.path  # omni.data.images judges the file, not Gradio
            read = gr.Button("Read it", variant="primary", interactive=not no_ocr)
            found = gr.Textbox(label="Text", interactive=False, buttons=["copy"])
            if signs and not no_ocr:
                gr.Examples([[str(sign)] for sign in signs], picture, label="Examples")

        in_turns = {"concurrency_limit": None}  # page.turns bounds them
        talk = [chat, box, player, answer_wav]
        answering = box.submit(page.chat, asked, talk, api_name="chat", **in_turns)
        saying = say.click(
            page.say, [session, text, say_temperature, say_seed, *voice], [player, say_wav], api_name="say", **in_turns
        )
        read.click(page.read, picture, found, api_name="read", **in_turns)
        at_once = {"cancels": [answering, saying], "queue": False}
        gr.on([stop.click, hush.click], Session.stop, session, player, api_name="stop", **at_once)
        gr.on([new.click, chat.clear], Session.clear, session, talk, api_name="new_chat", **at_once)
    bound_gradio(blocks, page)
    return blocks
