"""README and docs say what is true: figures are those of docs/results.json, and every file that they name is there."""

import json
import pkgutil
import re
import subprocess

import pytest
from harness import ROOT

from scripts.demo import STAGES, TASKS

PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "data/README.md", "checkpoints/README.md", "tests/README.md")
]
PAGES = sorted([*PAGES, *ROOT.glob("docs/*.md")])
RESULTS = json.loads((ROOT / "docs/results.json").read_text())

# README's figure -> where docs/results.json has it, how it is written, and the stage whose minutes stand beside it
FIGURES = {
    "perplexity": ("thinker/perplexity", "{:.2f}", "thinker"),
    "WER, new sentences": ("audio_enc/wer", "{:.2%}", "audio_enc"),
    "WER, new sentences and new voices": ("audio_enc/wer_unseen_voices", "{:.2%}", None),
    "WER, new words and new voices": ("audio_enc/wer_unseen_words", "{:.1%}", None),
    "WER, recorded people (Asterisk's prompts)": ("audio_enc/wer_people", "{:.1%}", None),
    "top-1 among 64 captions": ("vision/top1_of_64", "{:.1%}", "vision"),
    "zero-shot colour, shape and count": ("vision/zero_shot", "{:.1%}", None),
    "reconstruction error": ("codec/reconstruction_mse", "{:.3f}", "codec"),
    "code perplexity": ("talker/code_perplexity", "{:.1f}", "talker"),
    "WER of its speech": ("talker/wer_talker", "{:.1%}", None),
    "mean of the tasks": ("sft/accuracy", "{:.1%}", "sft"),
    "dialogues": ("sft/by_task/text", "{:.0%}", None),
    "questions about pictures": ("sft/by_task/image_question", "{:.0%}", None),
    "captions": ("sft/by_task/caption", "{:.0%}", None),
    "transcripts": ("sft/by_task/transcription", "{:.0%}", None),
    "spoken questions": ("sft/by_task/spoken_question", "{:.0%}", None),
    "spoken questions about pictures": ("sft/by_task/spoken_image_question", "{:.0%}", None),
    "spoken answers": ("sft/by_task/spoken_answer", "{:.0%}", None),
    "mel L1": ("vocoder/mel_l1", "{:.3f}", "vocoder"),
    "CER, new words and fonts; target: Tesseract's": ("ocr/cer", "{:.2%}", "ocr"),
}


def figure(path: str) -> float:
    value = RESULTS
    for key in path.split("/"):
        value = value[key]
    return value


def number(text: str) -> float:
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def tables_of_the_results() -> list[list[list[str]]]:
    section = (ROOT / "README.md").read_text().split("## Results")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\|\n)+", section, re.M)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "---" not in line]
        for table in tables
    ]


def rows_of_the_results() -> dict[str, list[str]]:
    return {cells[1]: cells[2:] for cells in tables_of_the_results()[0][1:]}


def test_the_figures_are_those_of_the_run():
    rows = rows_of_the_results()
    assert rows.keys() == FIGURES.keys()
    for name, (path, form, stage) in FIGURES.items():
        value, target, minutes = rows[name]
        assert value == form.format(figure(path)).replace("%", " %"), name
        assert minutes == (f"{RESULTS['minutes'][stage]:.1f}" if stage else ""), name
        sign, bound = target.removesuffix(", missed").split(maxsplit=1)
        reached = {"<": float.__lt__, ">": float.__gt__}[sign](figure(path), number(bound.replace(" ", "")))
        assert reached != target.endswith(", missed"), name


def test_the_targets_are_those_of_the_demo():
    rows, of_task = rows_of_the_results(), {f"sft/by_task/{task}": f"accuracy_{task}" for task in TASKS}
    metrics = {f"{stage.name}/{name}": target for stage in STAGES for name, target in stage.metrics.items()}
    for name, (path, *_) in FIGURES.items():
        if path == "audio_enc/wer_people":
            continue  # the demo does not have these recordings
        target = metrics[f"sft/{of_task[path]}" if path in of_task else path]
        if re.fullmatch(r"[<>] [\d.]+", target) and path != "ocr/cer":  # others depend on another figure
            sign, bound = rows[name][1].removesuffix(", missed").split(maxsplit=1)
            assert (sign, number(bound.replace(" ", ""))) == (target[0], float(target[2:])), name


def test_what_the_run_was_measured_against():
    text = (ROOT / "README.md").read_text()
    assert f"{RESULTS['minutes']['all']:.1f} minutes" in text
    assert rows_of_the_results()["mel L1"][1] == f"< {RESULTS['vocoder']['mel_l1_griffin_lim']:.3f}"
    bound = rows_of_the_results()["CER, new words and fonts; target: Tesseract's"][1]
    assert bound == f"< {RESULTS['ocr']['cer_tesseract']:.2%}".replace("%", " %")
    recordings = RESULTS["talker"]["wer_recordings"]  # the talker may be ten points worse
    assert rows_of_the_results()["WER of its speech"][1] == f"< {recordings + 0.1:.1%}".replace("%", " %")


def test_the_judges_figures_are_those_of_the_run():
    heading, *rows = tables_of_the_results()[1]
    sources = [name.lower().replace("-", "_").replace(" ", "_") for name in heading[1:]]
    forms = {"wer": lambda value: f"{value:.1%}".replace("%", " %"), "dnsmos": "{:.2f}".format}
    assert len(rows) == len(forms)
    for (prefix, form), (label, *cells) in zip(forms.items(), rows, strict=True):
        assert prefix in label.lower()
        assert cells == [form(RESULTS["judged"][f"{prefix}_{source}"]) for source in sources]


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# What a page may name though it is not in git: made by the demo, or the reader's own
_MADE = re.compile(
    r"^(data|checkpoints|merged_model|speech|samples)/|\*\.|(^|/)(my_|cat\.|film\.|question\.|sign\.)|^\.venv"
)
_KNOWN = r"omni|scripts|configs|tests|docs|dev|benchmarks|data|checkpoints"


# mutations.md has the files of the commit that it names
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "mutations.md"], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_file_that_a_page_names_is_there(page):
    text = page.read_text()
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in links if target and not (page.parent / target).exists()]
    # files below a known folder, and scripts, wherever they are named; test_extending makes those of its page
    named = set(re.findall(rf"(?<![\w/.])(?:{_KNOWN})/[\w./*-]*[\w/]", text))
    named |= set(re.findall(r"(?<![\w/.])(?:train_\w+|sft_omni|export|infer_chat)\.py\b", text))
    made = set(re.findall(r"^`([^`\n]+)`\n\n```", text, re.MULTILINE)) if page.name == "extending.md" else set()
    missing += [
        name for name in sorted(named - made) if not _MADE.search(name) and not list(ROOT.glob(name.rstrip("/")))
    ]
    assert not missing


def test_every_module_that_a_page_names_is_there():
    for page in PAGES:
        for name in re.findall(r"`(omni(?:\.\w+)+)`", page.read_text()):
            pkgutil.resolve_name(name)


def test_every_page_can_be_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    unlinked = [page.name for page in ROOT.glob("docs/*.md") if f"docs/{page.name}" not in readme]
    assert not unlinked and "CONTRIBUTING.md" in readme


def test_every_config_is_described():
    text = (ROOT / "docs/configs.md").read_text()
    assert [path.name for path in sorted(ROOT.glob("configs/*.json")) if f"configs/{path.name}" not in text] == []


def test_the_make_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.MULTILINE)}
    assert named <= targets


def test_pages_are_in_git():
    """A page that is left out of a commit would be a broken link for everybody else."""
    listed = subprocess.run(["git", "ls-files", "docs", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    missing = [page for page in PAGES if page.relative_to(ROOT).as_posix() not in listed.stdout.split()]
    assert not missing
