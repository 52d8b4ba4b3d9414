"""The same conversation, whichever program's data set it was written for, is the same sequence with the same files."""

import base64
import json
from pathlib import Path

import pytest
import torch
from stages import OMNI
from test_sft import prepared, right_answers, small_config

from omni.common.errors import BadRow
from omni.common.media import parse_data_uri
from omni.data.conversations import read_conversation

ASKED, ANSWERED = "What is it?", "one red cat"


def own(*parts, answer=ANSWERED) -> list[dict]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]


def tagged(text: str, names=("human", "gpt"), keys=("from", "value")) -> list[dict]:
    return [dict(zip(keys, pair, strict=True)) for pair in ((names[0], text), (names[1], ANSWERED))]


def dialects(folder: Path) -> list[dict]:
    """One picture, one recording, a question: as each program has it."""
    text, seen, heard = {"type": "text", "text": ASKED}, str(folder / "1.png"), str(folder / "0.wav")
    chat, tags = ("user", "assistant"), "<image>\n<audio>\n" + ASKED
    beside = {"images": ["1.png"], "audios": ["0.wav"]}
    own_parts = {"type": "image", "image": "1.png"}, {"type": "audio", "audio": "0.wav"}
    return [
        {"messages": own(*own_parts, text)},
        {"messages": own(*own_parts, text, answer=[{"type": "text", "text": ANSWERED}])},
        {"messages": own({"type": "image", "image": f"file://{seen}"}, {"type": "audio", "audio_url": heard}, text)},
        {"messages": own({"image": "1.png"}, {"audio": "0.wav"}, {"text": ASKED})},
        {"messages": own({"type": "image_url", "image_url": {"url": "1.png", "detail": "low"}}, own_parts[1], text)},
        {"messages": own({"type": "image", "path": "1.png"}, {"type": "audio", "url": "0.wav"}, text)},
        {"messages": own({"type": "image"}, {"type": "audio"}, text), **beside},
        {"id": "0", "conversations": tagged(tags), "image": "1.png", "audio": "0.wav"},
        {"conversations": tagged(tags), **beside},
        {"messages": tagged(tags, chat, ("role", "content")), **beside},
        {"messages": tagged("<image><audio>" + ASKED, chat, ("role", "content")), **beside},
        {"conversations": tagged(f"<img>1.png</img>\n<audio>0.wav</audio>\n{ASKED}", chat)},
    ]


def with_bytes(folder: Path) -> list[dict]:
    """The same, with the files' bytes in the rows."""
    text, seen, heard = (
        {"type": "text", "text": ASKED},
        *(base64.b64encode((folder / name).read_bytes()).decode() for name in ("1.png", "0.wav")),
    )
    picture, sound = f"data:image/png;base64,{seen}", f"data:audio/wav;base64,{heard}"
    return [
        {
            "messages": own(
                {"type": "image_url", "image_url": {"url": picture}},
                {"type": "input_audio", "input_audio": {"data": heard, "format": "wav"}},
                text,
            )
        },
        {"messages": own({"type": "image", "image": picture}, {"type": "audio", "audio": sound}, text)},
        {"conversations": tagged("<image>\n<audio>\n" + ASKED), "image": picture, "audios": [sound]},
    ]


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_the_same_conversation_in_every_dialect_is_the_same_sequence(tmp_path, ending):
    OMNI.make_data(tmp_path)
    rows, path = dialects(tmp_path) + with_bytes(tmp_path), tmp_path / f"talk{ending}"
    path.write_text(json.dumps(rows) if ending == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    tasks, _, _, processor = prepared(small_config(tmp_path, image_root=None, jsonl_path=str(path), val_split=0.0))
    assert len(tasks["conversation"]) == len(rows)
    bad: dict[str, str] = {}
    expected, right = tasks["conversation"].sample(0, 0, bad)
    assert right_answers(right) == {ANSWERED} and processor.tokenizer.decode(expected.ids).count("<|image|>") == 4
    for row, found in enumerate(tasks["conversation"].sample(row, 0, bad)[0] for row in range(len(rows))):
        assert found.ids == expected.ids and found.targets == expected.targets, rows[row]
        for ours, theirs in ((found.images, expected.images), (found.recordings, expected.recordings)):
            assert [at for at, _ in ours] == [at for at, _ in theirs]
            assert all(torch.equal(one, other) for (_, one), (_, other) in zip(ours, theirs, strict=True))
    assert bad == {}


def test_bytes_in_a_row_stand_where_names_do(tmp_path):
    OMNI.make_data(tmp_path)
    (named, *_), rows = dialects(tmp_path), with_bytes(tmp_path)
    for row in rows:
        for given, expected in zip(read_conversation(row), read_conversation(named), strict=True):
            if isinstance(given["content"], str):
                assert given == expected
                continue
            for part, like in zip(given["content"], expected["content"], strict=True):
                name = part.pop(part["type"])
                file = like.pop(like["type"])
                assert part == like
                if like["type"] == "text":
                    assert name == file
                else:
                    assert parse_data_uri(name).data == (tmp_path / file).read_bytes()


def test_turns_keep_their_order_and_tags_their_places():
    said = read_conversation(
        {
            "system": "Be kind.",
            "conversations": [
                {"from": "human", "value": "First <image>, then\n<image>"},
                {"from": "gpt", "value": "Two."},
                {"from": "human", "value": "And?\n<image>\nWell?"},
                {"from": "gpt", "value": "Three."},
            ],
            "image": ["a.png", "b.png", "c.png"],
        }
    )
    image = [{"type": "image", "image": f"{name}.png"} for name in "abc"]
    words = [{"type": "text", "text": words} for words in ("First ", ", then", "And?", "Well?")]
    assert said == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [words[0], image[0], words[1], image[1]]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [words[2], image[2], words[3]]},
        {"role": "assistant", "content": "Three."},
    ]


def test_one_picture_without_a_tag_stands_first():
    (asked, _) = read_conversation({"conversations": tagged(ASKED), "image": "a.png"})
    assert asked["content"] == [{"type": "image", "image": "a.png"}, {"type": "text", "text": ASKED}]
    for absent in (None, "", []):
        assert read_conversation({"conversations": tagged(ASKED), "image": absent})[0]["content"] == ASKED


@pytest.mark.parametrize("tags", range(4))
@pytest.mark.parametrize("files", range(4))
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_nothing_is_learnt_without_its_file(kind, files, tags):
    """Whatever the numbers of tags and of files: as many attachments as both, or a bad row."""
    row = {"messages": tagged(f"<{kind}>\n" * tags + ASKED, ("user", "assistant"), ("role", "content"))}
    row[f"{kind}s"] = [f"{i}.file" for i in range(files)]
    if tags == files or (tags, files) == (0, 1):
        content = read_conversation(row)[0]["content"]
        names = [part[kind] for part in content if part["type"] == kind] if isinstance(content, list) else []
        assert names == [f"{i}.file" for i in range(files)]
    else:
        with pytest.raises(BadRow, match=f"<{kind}> tag"):
            read_conversation(row)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"conversation": tagged(ASKED)}, "expected a list of objects"),
        ({"conversations": tagged(ASKED), "video": "a.mp4"}, "film"),
        ({"conversations": tagged("<video>\n" + ASKED)}, "<video>"),
        ({"conversations": tagged(ASKED, ("human", "function_call"))}, "expected the roles"),
        ({"conversations": tagged(ASKED, ("gpt", "human"))}, "answer as the last"),
        (
            {"messages": own({"type": "text", "text": "a"}, answer=[{"type": "image", "image": "a.png"}])},
            "in an answer",
        ),
        ({"messages": own({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})}, "Download"),
        ({"messages": own({"type": "image_url", "image_url": {}})}, "file name"),
        ({"messages": own("text")}, "a part of type"),
        ({"messages": own({"type": "image", "image": "a.png"}), "images": ["b.png"]}, "without an <image> tag"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "expected the roles"),
    ],
)
def test_what_cannot_be_held_is_named(row, why):
    with pytest.raises(BadRow, match=why):
        read_conversation(row)
