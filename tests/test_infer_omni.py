"""infer_chat.py with all that the model sees, hears, reads and says: everything attached has its effect, and what is
missing is one line."""

import io
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_config import only_error
from test_export import CPU, altered, options, picture, run, train_all
from test_video import clip, film, reds

import export
import infer_chat
from omni.chat.assistant import CHARACTERS_PER_TOKEN, AnswerStates, Assistant, check_text_length
from omni.chat.speech import UTTERANCE_BYTES, sentences
from omni.chat.terminal import read_line
from omni.chat.text import clean, media_named
from omni.common.errors import UserError
from omni.models.aligner import text_symbols
from omni.models.speaker import Speaker

# ---------------------------------------------------------------------------------------------------------------
# The program


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders = train_all(tmp_path_factory.mktemp("stages"))

    def listens(payload):  # so short a training hardly looks at anything but the text
        for name, weight in payload["model"].items():
            if name.startswith(("proj_a.", "proj_v.fc2")):
                weight *= 20

    return folders | {"omni": altered(folders["omni"], folders["omni"].parent / "listens", "omni_final.pt", listens)}


@pytest.fixture(scope="module")
def merged(folders, tmp_path_factory) -> Path:
    """An export, and nothing else beside it."""
    output = tmp_path_factory.mktemp("alone") / "merged_model"
    export.main(options(folders, output))
    return output


@pytest.fixture
def media(folders, tmp_path) -> dict[str, str]:
    """Files to attach: two pictures, a recording, a video."""
    found = {"picture": picture(tmp_path), "film": film(tmp_path / "film.gif")}
    clip()[3].save(tmp_path / "plain.png")
    shutil.copy(folders["thinker"].parent / "0.wav", tmp_path / "question.wav")
    found |= {"plain": tmp_path / "plain.png", "question": tmp_path / "question.wav"}
    return {name: str(path) for name, path in found.items()}


class Chat:
    """Runs the program's ``main``; remembers what the Thinker was asked to read."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys, self.prompts = monkeypatch, capsys, []
        real = Assistant.answer

        def spy(assistant, prompt, answer_states, *more, **sampling):
            self.prompts.append(prompt)
            yield from real(assistant, prompt, answer_states, *more, **sampling)

        monkeypatch.setattr(Assistant, "answer", spy)

    def __call__(self, folder: Path, *arguments: str, lines: list[str] = ()) -> tuple[str, str]:
        typed = "".join(f"{line}\n" for line in lines).encode()
        self.monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
        self.prompts.clear()
        infer_chat.main(["--ckpt_dir", str(folder), "--device", "cpu", "--max_new_tokens", "8", *arguments])
        return self.capsys.readouterr()

    def refuses(self, folder: Path, *arguments: str) -> str:
        """The one line with which it ends; nothing else was printed."""
        with pytest.raises(UserError) as error:
            self(folder, *arguments)
        assert "\n" not in str(error.value)
        assert self.capsys.readouterr().out == ""
        return str(error.value)


@pytest.fixture
def chat(monkeypatch, capsys) -> Chat:
    return Chat(monkeypatch, capsys)


def questions(media: dict[str, str]) -> list[list[str]]:
    return [
        ["--text", "red cat"],
        ["--image", media["picture"], "--text", "red cat"],
        ["--image", media["picture"], "--image", media["plain"], "--text", "red cat"],
        ["--audio_in", media["question"]],
        ["--image", media["plain"], "--audio_in", media["question"]],
        ["--video", media["film"], "--text", "red", "--temperature", "1", "--seed", "4"],
        ["--text", "red", "--system", "cat"],
        ["--text", "red", "--complete"],
    ]


def test_the_exported_folder_alone_answers_as_stage_e_does(folders, merged, media, chat):
    answers = []
    for question in questions(media):
        assert chat(merged, *question) == chat(folders["omni"], *question)
        answers.append(chat(merged, *question).out)
    assert all(answer.endswith("\n") and answer.count("\n") == 1 for answer in answers)
    assert len(set(answers)) > 2, "else equality would say little"


def test_the_script_itself_answers_on_stdout_and_only_there(merged, media, tmp_path):
    line = ("--ckpt_dir", str(merged), "--device", "cpu", "--max_new_tokens", "8")
    process = run(tmp_path, "infer_chat.py", *line, "--image", media["picture"], "--text", "red")
    assert process.returncode == 0 and process.stdout.count("\n") == 1
    assert process.stderr == "the answer was cut by max_new_tokens 8\n"
    process = run(tmp_path, "infer_chat.py", *line, "--image", str(tmp_path / "absent.png"), "--text", "red")
    only_error(process, "absent.png")


@torch.no_grad()
def test_everything_that_is_attached_reaches_the_thinker(merged, media, chat):
    assistant = Assistant.load(merged, CPU)

    def read(*arguments: str) -> torch.Tensor:
        chat(merged, *arguments)
        (prompt,) = chat.prompts
        return assistant.omni.embed_prompt(assistant.processor.collate([prompt]))[0]  # (T, D)

    placeholder = assistant.tokenizer.token_id("<|image|>")
    both = ["--image", media["picture"], "--image", media["plain"], "--text", "red"]
    turned = [both[0], both[3], both[2], both[1], *both[4:]]
    one, other = read(*both), read(*turned)
    differs = (one - other).abs().amax(dim=-1) > 1e-4
    at = torch.tensor(chat.prompts[0].ids) == placeholder
    assert torch.equal(differs, at), "the two pictures change places, and nothing else"

    chat(merged, "--video", media["film"], "--video_frames", "4", "--text", "red")
    assert reds(torch.stack([image for _, image in chat.prompts[0].images])) == [0, 3, 6, 9]
    out, err = chat(merged, "--video", media["film"], "--text", "red")
    seen = len(chat.prompts[0].images)
    assert 2 <= seen <= 10 and f"{media['film']}: {seen} of 10 frames" in err
    chat(merged, "--audio_in", media["question"], "--audio_in", media["question"])
    assert len(chat.prompts[0].recordings) == 2


def test_a_conversation_with_pictures_and_recordings(merged, media, chat, tmp_path):
    lines = [
        f"/image {media['picture']}", "red cat", "dog", f"/audio {media['question']}", "", f"/video {media['film']}",
        "/image absent.png", "/audio", "blue", "blue", "/reset", "big", "",
    ]  # fmt: skip
    out, err = chat(merged, "--max_new_tokens", "3", "--audio_out", str(tmp_path / "said.wav"), lines=lines)
    assert len(chat.prompts) == 5, "an empty line asks only what was recorded"
    counts = [(len(prompt.images), len(prompt.recordings)) for prompt in chat.prompts]
    assert counts[:3] == [(1, 0), (1, 0), (1, 1)], "what was shown stays in the conversation"
    assert counts[3][0] >= 2 and counts[4] == (0, 0)
    assert chat.prompts[1].ids[: len(chat.prompts[0].ids)] == chat.prompts[0].ids
    assert "error: absent.png" in err and "error: /audio: expected a file after it" in err
    assert out.count("\n") == 5
    spoken = sorted(path.name for path in tmp_path.glob("said*.wav"))
    assert set(spoken) <= {f"said_{number}.wav" for number in range(1, 6)}
    assert len(spoken) + err.count("made no sound") == 5


def test_a_question_about_what_was_not_attached_waits(merged, media, chat):
    """Until it is attached, dropped, or the user asks the same once more."""
    good, bad = f"/image {media['picture']}", "/image absent.png"
    for lines, asked, waited in (
        ([bad, "red"], [], 1),
        ([bad, "red", "cat"], [], 2),
        ([bad, "red", "red"], [0], 1),
        ([bad, "red", "red", "cat"], [0, 0], 1),
        ([good, bad, "red", "red"], [1], 1),
        ([bad, "red", good, "red"], [1], 1),
        ([bad, good, "red"], [1], 0),  # the name is corrected
        ([bad, "/image lost.png", good, "red"], [], 1),
        (["/audio absent.wav", good, "red"], [], 1),
        ([bad, "red", "/drop", "red"], [0], 1),
        ([good, bad, "/drop", "red"], [0], 0),
        ([good, "/drop", "red"], [0], 0),
        ([bad, "/reset", "red"], [0], 0),
        (["/image", "red", "/audio absent.wav", "red", "/video absent.gif", "red"], [], 3),
    ):
        err = chat(merged, "--max_new_tokens", "1", lines=lines).err
        assert [len(prompt.images) for prompt in chat.prompts] == asked, lines
        assert err.count("not attached, so the question waits. Attach it, or go on without: /drop") == waited, lines


NAMES = ["my cat.png", "it's.png", '"5".png', "a\\b.png", "50%25.png", "näh.png", "plain.png", " .png"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_understood_as_programs_write_it(tmp_path, monkeypatch, name):
    """As it stands, as a shell or a terminal quotes it, as a file manager or a browser makes a URL of it."""
    path = tmp_path / name
    path.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    escaped = re.sub(r"([^\w./~-])", r"\\\1", str(path))
    url = path.as_uri()
    forms = [
        str(path),
        escaped,
        shlex.quote(str(path)),
        url,
        url.replace("file://", "file://localhost"),
        f"'{url}'",
        f"~/{name}",
    ]
    forms += [f'"{path}"'] if not set(name) & set('"\\') else []
    for form in forms:
        assert os.path.samefile(media_named(form), path), form
    assert media_named(f"{path} absent") == f"{path} absent"
    assert media_named("data:image/png;base64,QUI=").data == b"AB"
    with pytest.raises(UserError, match="base64"):
        media_named("data:image/png;base64,!")


def test_a_line_of_any_length_is_refused_before_it_is_tokenised(merged, chat, monkeypatch):
    """Nor is more of it held than shows that it is too long; what follows it is answered."""
    most, taken = 64 * CHARACTERS_PER_TOKEN, []
    for length in (most, most + 1, 10 * most, 5_000_000):
        for letter in ("a", "ü", "你", "😀"):
            monkeypatch.setattr(
                "omni.data.tokenizer.Tokenizer.encode", lambda _, text, **__: taken.append(text) or [1] * 70
            )
            err = chat(merged, lines=[letter * length, "red"]).err
            assert (f"expected at most {most:,} characters" in err) == (length > most)
            assert [text[:1] for text in taken if text] == [letter] * (length == most) + ["r"], "only what may fit"
            taken.clear()
    with pytest.raises(UserError, match=r"at most 131,072 characters"):
        check_text_length("a" * 131_073)
    for more in ([], ["--complete"]):
        assert "too long" in chat.refuses(merged, "--text", "a" * (most + 1), *more)


def test_nothing_that_a_model_or_a_name_says_moves_the_cursor(merged, chat, monkeypatch, tmp_path):
    controls = "".join(chr(i) for i in (*range(32), *range(127, 160), 0xD800, 0xDFFF))
    monkeypatch.setattr(Assistant, "answer", lambda *_, **__: iter(["A", controls, "Z"]))
    out, _ = chat(merged, "--text", "red")
    assert out == "A\t\nZ\n"
    for option in ("--image", "--video"):
        name = controls[1:].replace("/", "")
        assert chat.refuses(merged, option, name, "--text", "red").isprintable()
    out, err = chat(merged, lines=["/image \x1b[31mred.png", "/audio \x1b[2J"])
    assert "\\x1b[31mred.png" in err and "\x1b" not in err


def test_what_is_typed_may_be_anything(merged, chat, monkeypatch):
    """Bytes that are not UTF-8, half a surrogate pair in --text, no input at all."""

    class Typed(io.BytesIO):
        def readline(self, size: int = -1) -> bytes:
            assert 0 < size <= 1 << 20, "a line of any length would be held"
            return super().readline(size)

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(Typed(b"\xff\xfe red\r\nlast")))
    assert [read_line(99) for _ in range(3)] == ["\ufffd\ufffd red", "last", None]
    assert clean("a\udcc3\udca4 \ud800 \udfff \udcff") == "aä \ufffd \ufffd \ufffd"
    chat(merged, "--text", "red \ud800 \udcff")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="--text"):
        read_line(99)


def test_a_message_too_long_for_the_context_costs_nothing(merged, media, chat):
    lines = ["red", f"/image {media['picture']}", "cat " * 60, "dog", "cat " * 60, "blue"]
    out, err = chat(merged, "--max_new_tokens", "3", lines=lines)
    assert err.count("error: the message takes") == 2 and "ctx_len 64" in err
    assert len(chat.prompts) == 3 and chat.prompts[1].ids[: len(chat.prompts[0].ids)] == chat.prompts[0].ids
    assert [len(prompt.images) for prompt in chat.prompts] == [0, 1, 1], "the picture stays for a shorter question"
    too_many = chat.refuses(merged, *["--video", media["film"]] * 2, "--video_frames", "10", "--text", "red")
    assert "positions" in too_many and "64" in too_many


def test_an_unknown_command_is_no_question(merged, chat):
    _, err = chat(
        merged, "--max_new_tokens", "3", lines=["/help", "/Images cat.png", "/reset now", "red /cat", "/etc is red"]
    )
    assert err.count(": expected one of /image FILE, ") == 3 and len(chat.prompts) == 2


def test_an_answer_that_is_cut_says_so(merged, chat):
    for count in ("3", "5"):
        _, err = chat(merged, "--max_new_tokens", count, "--text", "red")
        assert f"the answer was cut by max_new_tokens {count}\n" in err
    _, err = chat(merged, "--max_new_tokens", "3", "--text", "red", "--complete")
    assert "cut" not in err, "a text has no end to be reached"


def test_old_turns_make_room_for_new_ones(merged, media, chat):
    lines = [line for i in range(8) for line in (f"/image {media['plain']}", f"cat {i}")]
    _, err = chat(merged, "--max_new_tokens", "3", "--system", "big", lines=lines)
    assert "of the oldest questions are forgotten" in err
    tokenizer, ctx_len = Assistant.load(merged, CPU).tokenizer, 64
    assert len(chat.prompts) == 8 and all(len(prompt.ids) <= ctx_len - 3 for prompt in chat.prompts)
    last = tokenizer.decode(chat.prompts[-1].ids)
    assert last.startswith("<|system|>big<|user|>") and "cat 7" in last and "cat 0" not in last
    assert len(chat.prompts[-1].images) == last.count("<|image_start|>") > 1


# Speaking and reading -----------------------------------------------------------------------------------------------


def test_an_answer_is_spoken(folders, merged, chat, tmp_path):
    path = tmp_path / "said.wav"
    voices = {
        "merged": (merged, []),
        "stages": (folders["omni"], ["talker", "vocoder"]),
        "stage A": (folders["thinker"], ["talker", "vocoder"]),
        "Griffin-Lim": (folders["omni"], ["talker"]),
    }
    sounds = {}
    for name, (folder, parts) in voices.items():
        more = [word for part in parts for word in (f"--{part}_ckpt", str(folders[part]))]
        arguments = ["--text", "red", "--audio_out", str(path), *more]
        try:
            out, err = chat(folder, *arguments)
        except UserError as error:  # so short a training may fall silent, but then always
            assert "made no sound" in str(error)
            sounds[name] = b""
            continue
        assert "\n" not in out.strip() and "first sound" in err and ("Griffin-Lim" in err) == (name == "Griffin-Lim")
        samples, rate = soundfile.read(path)
        assert rate == 16_000 and len(samples) and np.isfinite(samples).all()
        sounds[name] = path.read_bytes()
    assert sounds["merged"] == sounds["stages"]


@torch.no_grad()
def test_the_talker_hears_what_was_thought_at_each_token_of_an_answer(merged):
    """Whatever the tokens: those of a real answer, then a text whose characters are spread over several."""
    assistant = Assistant.load(merged, torch.device("cpu"))
    prompt, answer_states = assistant.prompt([{"role": "user", "content": "red cat"}], 8), AnswerStates()
    text = "".join(assistant.answer(prompt, answer_states, max_new_tokens=8))
    assert len(answer_states.ids) - 1 <= len(answer_states.states) <= len(answer_states.ids) > 1
    embeds = assistant.omni.embed_prompt(assistant.processor.collate([prompt]))
    embeds = torch.cat((embeds, assistant.thinker.embed_tokens(torch.tensor([answer_states.ids]))), dim=1)
    expected = assistant.thinker.hidden_states(inputs_embeds=embeds)[0, len(prompt.ids) :]
    torch.testing.assert_close(
        torch.stack(answer_states.states), expected[: len(answer_states.states)], rtol=1e-4, atol=1e-5
    )

    def written(ids: list[int], n_states: int) -> AnswerStates:
        """Each token's state is its number."""
        found = AnswerStates()
        found.tokenizer, found.ids = assistant.tokenizer, ids
        found.states = list(torch.arange(1.0, n_states + 1)[:, None])
        return found

    text = " Ja, grün.\n  Ist 你 da?"
    ids = assistant.tokenizer.encode(text)
    answer_states, texts = written(ids, len(ids) - 1), sentences(text)  # the last token's state is not known
    heard = [answer_states.of(part)[:, 0].tolist() for part in texts]
    assert [len(states) for states in heard] == [len(text_symbols(part)) for part in texts]
    assert [states[-1] for states in heard] == [0, 0]
    tokens = [token for states in heard for token in states[:-1]]
    assert tokens[:-1] == sorted(tokens[:-1]) and tokens[-1] == 0, "in the order of the answer"
    for part, states in zip(texts, heard, strict=True):
        for symbol, token in zip(text_symbols(part), states[:-1], strict=False):
            before = assistant.tokenizer.decode(ids[: int(token)]).encode()
            assert token == 0 or symbol in before or before.endswith("�".encode()) or symbol == 32
    seven = assistant.tokenizer.encode("a 7 b")
    states = written(seven, len(seven)).of("a 7 b", "en")
    assert len(states) == len(text_symbols("a seven b")) and len(set(states[2:7, 0].tolist())) == 1
    while "�" not in assistant.tokenizer.decode(ids):  # up to the middle of a character
        ids.pop()
    cut = assistant.tokenizer.decode(ids)
    answer_states = written(ids, len(ids))
    assert [answer_states.of(part) is None for part in sentences(cut)] == [False, True], "what is before it has states"


@pytest.fixture(scope="module")
def talkative(folders) -> Path:
    """A stage E whose talker says something else for each text and each state."""

    def shaken(payload):
        torch.manual_seed(5)
        for name, weight in payload["model"].items():
            if name.startswith("talker.") and weight.is_floating_point():
                weight += 0.3 * torch.randn_like(weight)

    return altered(folders["omni"], folders["omni"].parent / "talkative", "omni_final.pt", shaken)


def dictate(monkeypatch, ids: list[int]) -> None:
    """The Thinker writes these ids."""
    left = iter(ids)
    monkeypatch.setattr("omni.models.thinker.Thinker._choose", lambda *_: next(left))


@pytest.mark.parametrize("longest", [UTTERANCE_BYTES, 7])
@pytest.mark.parametrize("ending", ["as it likes", "cut", "no UTF-8"])
def test_speech_is_that_of_the_whole_answer_whenever_it_begins(
    folders, talkative, chat, monkeypatch, tmp_path, longest, ending
):
    """Bit for bit, wherever sentences end, and also in the middle of a token."""
    tokenizer = Assistant.load(talkative, CPU).tokenizer
    ids = tokenizer.encode("Red cat. Mr. Low saw reddogdog! 好。Ja, grün? Big\ncat")
    if ending == "no UTF-8":
        ids = [*ids[:12], tokenizer.encode("好")[0], *ids[12:]]
    parts = [word for part in ("talker", "vocoder") for word in (f"--{part}_ckpt", str(folders[part]))]
    path, real, log, heard = tmp_path / "said.wav", Assistant._decoded, [], []
    stream, of = Speaker.stream, AnswerStates.of

    def noted_stream(speaker, text, thinker_states, **sampling):
        log.append(None)
        heard.append(thinker_states and thinker_states[0].tolist())
        return stream(speaker, text, thinker_states=thinker_states, **sampling)

    def speech() -> tuple[bytes, list]:
        dictate(monkeypatch, [*ids, *[tokenizer.end_id] * (ending != "cut")])
        log.clear(), heard.clear()
        n_tokens = len(ids) - 3 if ending == "cut" else len(ids) + 1
        line = ("--text", "red", "--max_new_tokens", str(n_tokens), "--audio_out", str(path), *parts)
        assert "conditioned on the Thinker's states" in chat(talkative, *line).err
        return path.read_bytes(), heard.copy()

    def noted(assistant, ids, seen):
        for piece in real(assistant, ids, seen):
            log.append(piece)
            yield piece

    monkeypatch.setattr("omni.chat.speech.UTTERANCE_BYTES", longest)
    monkeypatch.setattr(Speaker, "stream", noted_stream)
    monkeypatch.setattr(Assistant, "_decoded", noted)
    early = speech()
    assert None in log[: len(log) // 2] and "".join(filter(None, log[log.index(None) :])).strip(), "it goes on writing"
    monkeypatch.setattr(Assistant, "_decoded", lambda *given: iter(list(noted(*given))))
    whole = speech()
    assert None not in log[: -log.count(None)], "all is written first"
    assert early == whole
    monkeypatch.setattr(AnswerStates, "of", lambda *given: of(*given) * 0)
    assert ending == "no UTF-8" or speech()[0] != whole[0], "what was thought is heard"


def test_sentences_are_spoken_one_after_the_other(merged, chat, monkeypatch, tmp_path):
    assert sentences(" One. Two?  Three 1.5 four!\nfive ") == ["One.", "Two?", "Three 1.5 four!", "five"]
    assert sentences("Mr. Low saw Dr. Jay. He left.") == ["Mr. Low saw Dr. Jay.", "He left."]
    asked = []

    def stream(self, text, **sampling):
        asked.append(text)
        yield np.full(1600, 0.1 * len(asked), np.float32)

    monkeypatch.setattr("omni.models.speaker.Speaker.stream", stream)
    monkeypatch.setattr(Assistant, "answer", lambda *_, **__: iter(["A ca", "t. Two do", "gs."]))
    out, _ = chat(merged, "--text", "red", "--audio_out", str(tmp_path / "said.wav"))
    assert out == "A cat. Two dogs.\n" and asked == ["A cat.", "Two dogs."]
    samples, _ = soundfile.read(tmp_path / "said.wav")
    assert len(samples) == 3200 + 0.2 * 16_000 and 0 < samples[0] < samples[-1] and not samples[1600:-1600].any()


def test_the_first_sound_is_timed_from_the_question(merged, chat, monkeypatch, tmp_path):
    def slow(assistant, ids, seen):
        for piece in ("A cat.", " Two", " dogs", "."):
            time.sleep(0.2)
            yield piece

    monkeypatch.setattr(Speaker, "stream", lambda *_, **__: iter([np.full(1600, 0.1, np.float32)]))
    monkeypatch.setattr(Assistant, "_decoded", slow)
    _, err = chat(merged, "--text", "red", "--audio_out", str(tmp_path / "said.wav"))
    took, first = re.search(r"of speech in ([\d.]+) s, .* first sound (\d+) ms after the question", err).groups()
    assert 600 <= int(first) <= 1000 * float(took) - 150, (
        "a sentence is known at the next one, and spoken a token later"
    )
    _, err = chat(merged, "--say", "A cat.", "--audio_out", str(tmp_path / "said.wav"))
    assert re.search(r"first sound \d+ ms after the text", err)


@pytest.mark.parametrize("while_it", ["writes", "speaks"])
def test_ctrl_c_stops_an_answer_and_its_speech_and_not_the_conversation(merged, chat, monkeypatch, tmp_path, while_it):
    def interrupted(items: list, at: str) -> Iterator:
        yield from items
        if at == while_it and len(chat.prompts) == 1:
            raise KeyboardInterrupt

    sound = np.full(1600, 0.1, np.float32)
    monkeypatch.setattr(Speaker, "stream", lambda *_, **__: interrupted([sound], "speaks"))
    monkeypatch.setattr(Assistant, "_decoded", lambda *_: interrupted(["A cat. ", "Two", " dogs"], "writes"))
    try:
        out, _ = chat(merged, "--audio_out", str(tmp_path / "said.wav"), lines=["red", "big"])
    except KeyboardInterrupt:  # which would end pytest
        pytest.fail("the conversation ended")
    assert out == "A cat. Two dogs\n" * 2, "what was written stays"
    again = chat.prompts[1].ids
    assert "dogs" in Assistant.load(merged, CPU).tokenizer.decode(again), "and is a part of the conversation"
    assert [path.name for path in tmp_path.glob("*.wav")] == ["said_2.wav"]
    chat.prompts.clear()
    with pytest.raises(KeyboardInterrupt):
        chat(merged, "--text", "red", "--audio_out", str(tmp_path / "once.wav"))
    assert not (tmp_path / "once.wav").exists()


def test_say_of_the_export_is_that_of_the_stages(folders, merged, chat, tmp_path):
    say = ["--say", "one two", "--temperature", "1", "--seed", "3", "--audio_out"]
    chat(merged, *say, str(tmp_path / "merged.wav"))
    chat(folders["talker"], *say, str(tmp_path / "stage.wav"), "--vocoder_ckpt", str(folders["vocoder"]))
    chat(
        folders["thinker"], *say, str(tmp_path / "given.wav"), "--talker_ckpt", str(folders["talker"]),
        "--vocoder_ckpt", str(folders["vocoder"]),
    )  # fmt: skip
    sound = (tmp_path / "merged.wav").read_bytes()
    assert len(sound) > 1000
    assert sound == (tmp_path / "stage.wav").read_bytes() == (tmp_path / "given.wav").read_bytes()


def test_sound_goes_where_a_link_leads_and_replaces_nothing_but_a_file(merged, chat, monkeypatch, tmp_path):
    monkeypatch.setattr("omni.models.speaker.Speaker.stream", lambda *_, **__: iter([np.full(1600, 0.1, np.float32)]))
    monkeypatch.setattr(Assistant, "answer", lambda *_, **__: iter(["A cat."]))
    link, target = tmp_path / "link.wav", tmp_path / "elsewhere" / "said.wav"
    target.parent.mkdir()
    link.symlink_to(target)
    for _ in range(2):  # a dangling link, then one to a file
        chat(merged, "--say", "one", "--audio_out", str(link))
        assert link.is_symlink() and target.is_file()

    pipe, to_pipe = tmp_path / "pipe.wav", tmp_path / "to_pipe.wav"
    os.mkfifo(pipe)
    to_pipe.symlink_to(pipe)
    monkeypatch.setattr(Assistant, "load", None)  # refused before any work
    monkeypatch.setattr(infer_chat, "load_speaker", None)
    for path in (pipe, to_pipe, target.parent):
        for mode in (["--say", "one"], ["--text", "red"], []):
            assert f"--audio_out {path}: expected a file" in chat.refuses(merged, *mode, "--audio_out", str(path))
    assert pipe.is_fifo() and to_pipe.is_symlink()


def test_a_conversation_replaces_nothing_but_files_either(merged, chat, monkeypatch, tmp_path):
    monkeypatch.setattr("omni.models.speaker.Speaker.stream", lambda *_, **__: iter([np.full(1600, 0.1, np.float32)]))
    monkeypatch.setattr(Assistant, "answer", lambda *_, **__: iter(["A cat."]))
    os.mkfifo(tmp_path / "said_1.wav")
    out, err = chat(merged, "--audio_out", str(tmp_path / "said.wav"), lines=["red", "cat"])
    assert out == "A cat.\n" * 2 and "said_1.wav: expected a file" in err
    assert (tmp_path / "said_1.wav").is_fifo() and (tmp_path / "said_2.wav").is_file()


def test_sound_for_a_full_disk_is_one_line(folders, tmp_path):
    line = ("--ckpt_dir", str(folders["talker"]), "--device", "cpu", "--say", "one two", "--audio_out", "said.wav")
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
    process = run(tmp_path, "infer_chat.py", *line, "--temperature", "1", "--seed", "3", prelude=full)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "error: --audio_out said.wav: cannot write it: File too large" in process.stderr.splitlines()
    assert not list(tmp_path.glob("said*"))


def test_ocr_reads_what_the_stage_reads(folders, merged, media, chat):
    signs = sorted(folders["ocr"].parent.glob("*.png"))[:3]
    images = [word for sign in signs for word in ("--image", str(sign))]
    out, err = chat(merged, "--ocr", *images)
    assert out.count("\n") == 3 and err == ""
    assert chat(folders["ocr"], "--ocr", *images).out == out
    assert chat(folders["thinker"], "--ocr", *images, "--ocr_ckpt", str(folders["ocr"])).out == out


# What is missing ----------------------------------------------------------------------------------------------------


def test_what_the_folder_cannot_do_is_one_line(folders, merged, media, chat, tmp_path, capsys):
    alone = tmp_path / "alone"
    export.main(options({"thinker": folders["thinker"]}, alone))
    capsys.readouterr()
    wav = ("--audio_out", str(tmp_path / "said.wav"))
    for folder in (folders["thinker"], alone):
        assert "takes no pictures" in chat.refuses(folder, "--image", media["picture"], "--text", "red")
        assert "takes no pictures" in chat.refuses(folder, "--video", media["film"], "--text", "red")
        assert "takes no recordings" in chat.refuses(folder, "--audio_in", media["question"])
        for arguments in (("--text", "red", *wav), ("--say", "red", *wav)):
            assert "--talker_ckpt" in chat.refuses(folder, *arguments)
        assert "--ocr_ckpt" in chat.refuses(folder, "--ocr", "--image", media["picture"])
    assert "thinker.pt" in chat.refuses(tmp_path / "absent", "--text", "red")
    assert "takes no pictures" in chat(folders["thinker"], lines=[f"/image {media['picture']}", "red"]).err
    absent = str(tmp_path / "absent")
    for option, file in (("--vocoder_ckpt", "hifigan.pt"), ("--talker_ckpt", "talker.pt")):
        assert file in chat.refuses(merged, "--text", "red", option, absent, *wav)
    assert "ocr.pt" in chat.refuses(merged, "--ocr", "--image", media["picture"], "--ocr_ckpt", absent)
    assert "its log-mels do not fit to" in chat.refuses(
        merged, "--text", "red", *wav, "--vocoder_ckpt", str(other_vocoder(folders, tmp_path))
    )
    assert not (tmp_path / "said.wav").exists()


def other_vocoder(folders: dict[str, Path], tmp_path: Path) -> Path:
    def narrow(payload):
        payload["architecture"]["win_length"] = 320

    return altered(folders["vocoder"], tmp_path / "narrow", "hifigan.pt", narrow)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--image", "a.png"], ["--image", "--text or --audio_in"]),
        (["--video", "a.gif"], ["--video", "--text or --audio_in"]),
        (["--video_frames", "2", "--text", "x"], ["--video_frames", "--video"]),
        (["--video_frames", "0", "--video", "a.gif", "--text", "x"], ["--video_frames", "at least 1"]),
        (["--say", "x"], ["--say", "--audio_out"]),
        (["--say", "x", "--audio_out", "x.wav", "--image", "a.png"], ["--image", "no effect on --say"]),
        (["--say", "x", "--ocr"], ["--say", "--ocr"]),
        (["--ocr"], ["--ocr", "--image"]),
        (["--ocr", "--image", "a.png", "--text", "x"], ["--text", "no effect on --ocr"]),
        (["--ocr_ckpt", "x", "--text", "x"], ["--ocr_ckpt", "--ocr"]),
        (["--talker_ckpt", "x", "--text", "x"], ["--talker_ckpt", "--audio_out"]),
        (["--complete", "--image", "a.png", "--text", "x"], ["--image", "no effect on --complete"]),
        (["--say", "x", "--audio_out", "x.mp3"], ["--audio_out", "ends in .wav"]),
        (["--say", "x", "--audio_out", ".wav"], ["--audio_out", "ends in .wav"]),
        (["--text", "x", "--audio_out", "absent/x.wav"], ["--audio_out", "folder that exists"]),
        (["--image", "absent.png", "--text", "x"], ["absent.png", "No such file"]),
        (["--audio_in", "absent.wav"], ["absent.wav", "No such file"]),
        (["--image", "", "--text", "x"], ["--image", "empty name"]),
        (["--video", "", "--text", "x"], ["--video", "empty name"]),
        (["--audio_in", ""], ["--audio_in", "empty name"]),
        (["--video", "absent.gif", "--text", "x"], ["absent.gif"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_arguments_are_one_line(merged, chat, arguments, fragments):
    found = chat.refuses(merged, *arguments)
    for fragment in fragments:
        assert fragment in found


def test_a_path_that_can_be_none_is_one_line(merged, media, chat, tmp_path):
    long = "x" * 300
    out = ("--audio_out", long)
    only_error(run(tmp_path, "infer_chat.py", "--ckpt_dir", long, "--text", "red"), long, "File name too long")
    for mode in (("--say", "red"), ("--text", "red"), ()):
        only_error(run(tmp_path, "infer_chat.py", "--ckpt_dir", str(merged), *mode, *out), long, "File name too long")
    (tmp_path / "thinker.pt").mkdir()
    process = run(tmp_path, "infer_chat.py", "--ckpt_dir", str(tmp_path), "--text", "red")
    only_error(process, "thinker.pt: expected a checkpoint, found a folder")
    for option, words in (("image", ["--text", "red"]), ("video", ["--text", "red"]), ("audio_in", [])):
        assert long[:80] in chat.refuses(merged, f"--{option}", long, *words)
    out, err = chat(merged, lines=[f"/video {long}", "red"])
    assert "File name too long" in err and not chat.prompts


def test_broken_media_are_one_line(merged, media, chat, tmp_path):
    (tmp_path / "broken.png").write_bytes(Path(media["picture"]).read_bytes()[:200])
    assert "broken.png" in chat.refuses(merged, "--image", str(tmp_path / "broken.png"), "--text", "red")
    (tmp_path / "broken.wav").write_bytes(Path(media["question"]).read_bytes()[:2000])
    assert "truncated" in chat.refuses(merged, "--audio_in", str(tmp_path / "broken.wav"))
    soundfile.write(tmp_path / "long.wav", np.zeros(16_000 * 30), 16_000)
    assert "lasts 30.0 s" in chat.refuses(merged, "--audio_in", str(tmp_path / "long.wav"))
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(500))
    assert "film.mp4" in chat.refuses(merged, "--video", str(tmp_path / "film.mp4"), "--text", "red")


def test_a_stage_e_that_still_trains_can_be_talked_to(folders, chat, tmp_path):
    half = shutil.copytree(folders["omni"], tmp_path / "omni")
    (half / "omni_final.pt").unlink()
    assert list(half.glob("omni_step_*.pt"))
    assert chat(half, "--text", "red").out.count("\n") == 1


def test_an_untrained_model_never_answers(folders, chat, tmp_path):
    """A weight that is missing is an error, not a number by chance."""

    def forget(payload):
        del payload["model"]["proj_v.fc1.weight"]

    other = altered(folders["omni"], tmp_path / "omni", "omni_final.pt", forget)
    assert "proj_v.fc1.weight" in chat.refuses(other, "--text", "red")
    with pytest.raises(UserError, match=r"proj_v\.fc1\.weight"):
        export.main(options({"omni": other}, tmp_path / "merged"))


def test_an_empty_question_and_a_folder_that_is_not_there_are_named(folders, chat):
    for text in ("", " \n"):
        assert "--text: expected a question" in chat.refuses(folders["omni"], "--text", text)
    assert "expected a folder" in chat.refuses(folders["omni"] / "nothing", "--text", "hello")
