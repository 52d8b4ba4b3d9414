"""The web page: what its buttons do, and how it is laid out. ``scripts/web_demo.py`` serves it; it needs Gradio."""

import base64
import contextlib
import html
import mimetypes
import random
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np

from omni.assistant import Assistant, Thoughts, clean, message, read_picture, sentences, spoken
from omni.errors import UserError
from omni.ocr import Ocr
from omni.speech import MAX_SECONDS, Speaker

KEPT_S = 3600  # how long files that were uploaded or spoken are kept

# Plays speech as it comes. The value is "RUN RATE_HZ PIECE PIECE ...", each piece base64 of 16-bit samples; it grows,
# as the browser may see several changes as one. Another run silences what is left of the one before.
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

    def stop(self) -> str:
        """End what is being written or said; returns the player's silence."""
        self.run += 1
        return ""

    def clear(self) -> tuple:
        """A new conversation: what the page shows of it."""
        self.talk = Talk()
        return [], None, self.stop(), None


class Talk:
    """A conversation, as the model reads it and as the page shows it."""

    def __init__(self) -> None:
        self.messages, self.shown = [], []


class Page:
    """What the page's buttons do.

    Args:
        speaker, reader: each with "", or None with the reason.
    """

    def __init__(
        self, assistant: Assistant, speaker: tuple[Speaker | None, str], reader: tuple[Ocr | None, str]
    ) -> None:
        self.assistant, (self.speaker, self.no_speaker), (self.reader, self.no_reader) = assistant, speaker, reader

    def chat(self, session: Session, asked: dict, aloud: bool, temperature, top_p, max_new_tokens, seed) -> Iterator:
        """Yield the conversation, the emptied input, the speech so far, and in the end all of it."""
        talk, run, files, text = session.talk, session.run, asked["files"], clean(asked["text"] or "")
        with in_the_page(*files):
            attached = [self.part(path) for path in files]
            if not text.strip() and not any(part["type"] == "audio" for part in attached):
                raise UserError("expected a question: a text or a recording")
            messages, max_new_tokens = [*talk.messages, message(attached, text)], int(max_new_tokens)
            thoughts = Thoughts()
            pieces = self.assistant.answer(
                self.assistant.prompt(messages, max_new_tokens), thoughts,
                max_new_tokens=max_new_tokens, temperature=temperature, seed=None if seed < 0 else seed,
                top_p=top_p if temperature and top_p < 1 else None,
            )  # fmt: skip
        contents = [{"path": path} for path in files] + [text] * bool(text.strip())
        shown = talk.shown + [{"role": "user", "content": content} for content in contents]
        answer = {"role": "assistant", "content": ""}
        yield shown, None, "", None
        try:
            for piece in pieces:
                if session.run != run:
                    return
                answer["content"] += piece
                yield [*shown, answer], gr.skip(), gr.skip(), gr.skip()
        finally:  # of an answer that was stopped, what there is
            talk.messages, talk.shown = [*messages, answer], [*shown, answer]
        if aloud and self.speaker is not None:
            try:
                for heard in self.speech(session, sentences(answer["content"]), "the answer", thoughts=thoughts):
                    yield gr.skip(), gr.skip(), *heard
            except UserError as error:  # the answer stands
                gr.Warning(html.escape(str(error)))

    def part(self, path: str) -> dict:
        """A file as a part of a message: a picture by its name, else a recording."""
        is_picture = (mimetypes.guess_type(path)[0] or "").startswith("image/")
        return self.assistant.image(path) if is_picture else self.assistant.sound(path)

    def say(self, session: Session, text: str, temperature: float, seed: int) -> Iterator[tuple]:
        """Yield the speech so far, and in the end all of it."""
        text = clean(text or "")
        with in_the_page():
            if self.speaker is None:
                raise UserError(self.no_speaker)
            if not text.strip():
                raise UserError("expected a text to say")
            sampling = {"temperature": temperature, "seed": random.getrandbits(53) if seed < 0 else seed}
            yield from self.speech(session, sentences(text), "the text", **sampling)

    def speech(self, session: Session, texts: list[str], what: str, **sampling) -> Iterator[tuple]:
        """Yield what PLAYER plays, and last the whole as (rate in Hz, (S,) int16); nothing more once stopped."""
        run, rate, pieces = session.run, self.speaker.spec.sample_rate, []
        stream = f"{time.monotonic_ns()} {rate}"

        def cut(text: str) -> None:
            gr.Warning(html.escape(f"cut after {MAX_SECONDS:g} s: {text[:40]!r} goes on"))

        for piece in spoken(self.speaker, texts, what, cut, **sampling):
            if session.run != run:
                return
            pieces.append(np.rint(np.clip(piece, -1, 1) * 32767).astype("<i2"))
            stream += " " + base64.b64encode(pieces[-1].tobytes()).decode()
            yield stream, gr.skip()
        yield stream, (rate, np.concatenate(pieces))

    def read(self, path: str | None) -> str:
        """The text in a picture file."""
        with in_the_page(path):
            if self.reader is None:
                raise UserError(self.no_reader)
            if path is None:
                raise UserError("expected a picture of a line of text")
            return read_picture(self.reader, path)


@contextlib.contextmanager
def in_the_page(*files: str | None) -> Iterator[None]:
    """Show a UserError in the page; uploaded files go by their own names there, without this machine's folders."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for file in filter(None, files):
            text = text.replace(file, Path(file).name)
        raise gr.Error(html.escape(text), print_exception=False) from error


def build(page: Page, name: str, examples: list[dict], sign: Path) -> gr.Blocks:
    """What stands where, and which button does what.

    Args:
        name: of the model.
        examples: questions as ``gr.MultimodalTextbox`` takes them.
        sign: a picture of a line of text.
    """
    assistant, able, absent = page.assistant, ["answers"], []
    no_eyes, no_ears = assistant.lacks("vision_encoder"), assistant.lacks("audio_encoder")
    no_mouth, no_reader = page.no_speaker, page.no_reader
    for what, reason in (("sees", no_eyes), ("hears", no_ears), ("speaks", no_mouth), ("reads signs", no_reader)):
        able.append(f"<s>{what}</s>" if reason else what)
        absent += [f"<br><small><s>{what}</s>: {html.escape(reason)}</small>"] if reason else []
    if assistant.metrics.get("dialogue_share") == 0:
        absent.append("<br><small>trained on text without dialogues</small>")
    attach = " or ".join(["a picture"] * (not no_eyes) + ["a recording"] * (not no_ears))
    griffin_lim = "" if no_mouth or page.speaker.vocoder else "no vocoder: sentence by sentence"

    def seed(**more) -> gr.Number:
        return gr.Number(-1, precision=0, minimum=-1, maximum=2**53, label="Seed", info="-1: another each time", **more)

    wav = {"interactive": False, "buttons": ["download"]}
    with gr.Blocks(title=f"μOmni: {name}", analytics_enabled=False, delete_cache=(600, KEPT_S)) as blocks:
        session = gr.State(Session())
        gr.HTML(f"<h2>μOmni</h2><b>{html.escape(name)}</b>: {' · '.join(able)}{''.join(absent)}", elem_id="able")
        player = gr.HTML("", html_template="<i></i>", js_on_load=PLAYER, elem_id="player", visible="hidden")
        with gr.Tab("Chat"), gr.Row():
            with gr.Column(scale=3):
                chat = gr.Chatbot(
                    show_label=False, height=420, render_markdown=False, buttons=["copy_all"], elem_id="chat"
                )
                box = gr.MultimodalTextbox(
                    show_label=False, autofocus=True, file_types=["image", "audio"], file_count="multiple",
                    placeholder="Ask something" + (f", or attach {attach}" if attach else ""), elem_id="ask",
                    sources=["upload"] * bool(attach) + ["microphone"] * (not no_ears), max_plain_text_length=10**6,
                )  # fmt: skip
                with gr.Row():
                    stop, new = gr.Button("Stop", size="sm"), gr.Button("New chat", size="sm")
                gr.Examples([[example] for example in examples], box, label="Examples")
            with gr.Column(scale=1, min_width=260):
                aloud = gr.Checkbox(
                    not no_mouth, label="Speak the answer", interactive=not no_mouth, info=no_mouth or griffin_lim
                )
                answer_wav = gr.Audio(label="The answer", visible=not no_mouth, elem_id="answer_wav", **wav)
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest token, always")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="with a temperature; 1: off")
                most = assistant.ctx_len - 1
                max_new_tokens = gr.Slider(1, most, min(128, most), step=1, label="Max new tokens")
                asked = [session, box, aloud, temperature, top_p, max_new_tokens, seed()]
        with gr.Tab("Say a text"):
            gr.HTML(html.escape(no_mouth), visible=bool(no_mouth))
            text = gr.Textbox("Anna is reading at the market.", lines=3, label="Text", interactive=not no_mouth)
            with gr.Row():
                say_temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", interactive=not no_mouth)
                say_seed = seed(interactive=not no_mouth)
            with gr.Row():
                say = gr.Button("Say it", variant="primary", interactive=not no_mouth)
                hush = gr.Button("Stop", interactive=not no_mouth)
            say_wav = gr.Audio(label="Speech", visible=not no_mouth, elem_id="say_wav", **wav)
        with gr.Tab("Read a sign"):
            gr.HTML(html.escape(no_reader), visible=bool(no_reader))
            picture = gr.Image(
                type="filepath", label="A picture of a line of text", height=240, interactive=not no_reader,
                sources=["upload", "clipboard"], buttons=["fullscreen"],
            )  # fmt: skip
            picture.preprocess = lambda given: given and given.path  # omni.images judges the file, not Gradio
            read = gr.Button("Read it", variant="primary", interactive=not no_reader)
            found = gr.Textbox(label="Text", interactive=False, buttons=["copy"])
            if not no_reader:
                gr.Examples([[str(sign)]], picture, label="Examples")

        one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1}  # other visitors wait
        talk = [chat, box, player, answer_wav]
        answering = box.submit(page.chat, asked, talk, api_name="chat", **one_at_a_time)
        saying = say.click(
            page.say, [session, text, say_temperature, say_seed], [player, say_wav], api_name="say", **one_at_a_time
        )
        read.click(page.read, picture, found, api_name="read", **one_at_a_time)
        at_once = {"cancels": [answering, saying], "queue": False}
        gr.on([stop.click, hush.click], Session.stop, session, player, api_name="stop", **at_once)
        gr.on([new.click, chat.clear], Session.clear, session, talk, api_name="new_chat", **at_once)
    return blocks
