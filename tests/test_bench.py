"""benchmarks/bench.py: what it compares is the same computation, and every part runs and leaves its figures."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from harness import Process, start
from stages import AUDIO_ENC, OCR, OMNI, TEXT, VISION, VOCODER, VOICES

from omni.common.errors import UserError

pytest.importorskip("transformers")

from benchmarks import bench, bench_pairs, depth, nanogpt
from benchmarks.bench_pairs import read_config

ROOT = bench.ROOT

CASES = {
    "thinker": TEXT, "audio_enc": AUDIO_ENC, "vision": VISION, "talker": VOICES, "omni_sft": OMNI, "vocoder": VOCODER,
    "ocr": OCR,
}  # fmt: skip
BESIDE_A_LIBRARY = (
    "A/thinker", "B/audio_encoder", "C/vit", "D/talker_decoder", "E/thinker", "F/generator", "G/vit_and_decoder",
)  # fmt: skip
ALONE = ("C/whole_step", "D/whole_step", "G/whole_step")
FIGURES = {
    *(f"train/{name}{how}" for name in BESIDE_A_LIBRARY for how in ("", "/as_users_run_it")),
    *(f"train/{name}/matmul_share" for name in BESIDE_A_LIBRARY + ALONE),
    *(f"loop/{letter}/{figure}" for letter in "ABCDEFG" for figure in ("overhead", "own_overhead", "loader_share")),
    *("generate/batch_1", "generate/batch_8", "checkpoint/save", "checkpoint/load"),
    *(
        f"speak/{kind}/{figure}"
        for kind in ("hifigan", "griffin_lim")
        for figure in ("real_time_factor", "first_sound")
    ),
    *("resume/first_step", "startup/help", "startup/first_step"),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The demo's configs, at the sizes and with the data of the stages' tests."""
    folder = tmp_path_factory.mktemp("bench")
    for name, case in CASES.items():
        (folder / name).mkdir()
        keys = case.training(folder / name).config
        if name == "vocoder":  # it has to read the log-mels that the codec writes
            keys |= {"n_mels": 80}
        (folder / f"{name}_demo.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize("make", bench_pairs.PAIRS, ids=lambda make: make.__name__)
def test_both_sides_compute_the_same(configs, make):
    torch.manual_seed(0)
    pair = make(configs)
    ours = pair.our_loss(pair.ours.train())
    ours.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in pair.ours.parameters())
    if not pair.theirs:  # a whole step leaves no part out
        assert not [
            name for name, weight in pair.ours.named_parameters() if weight.requires_grad and weight.grad is None
        ]
    for model in pair.theirs.values():
        if pair.equal:
            assert pair.their_loss(model).item() == pytest.approx(ours.item(), rel=1e-4, abs=1e-7)
        else:  # at least as much of it
            flops = bench.count_flops(model, pair.their_loss)
            assert flops == pytest.approx(bench.count_flops(pair.ours, pair.our_loss), rel=0.05)


STARTS = ("resume", "startup")  # start Python anew several times, without which there is nothing to measure


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.torture] if part in STARTS else []) for part in bench.PARTS]
)
def test_every_part_leaves_its_figures(configs, tmp_path, capsys, part):
    path, expected = tmp_path / "new" / "bench.json", {name for name in FIGURES if name.startswith(f"{part}/")}
    bench.main([part, "--smoke", "--configs", str(configs), "--json", str(path)])
    written = json.loads(path.read_text())
    assert set(written["figures"]) == expected
    assert all(f["value"] > 0 for name, f in written["figures"].items() if "loader_share" not in name)
    assert written["machine"]["torch"] == torch.__version__ and written["machine"]["threads"] == 1
    assert expected == {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(part)}


def test_figures_of_other_parts_stay_and_those_of_another_machine_go(tmp_path):
    path, one, other = tmp_path / "bench.json", {"a": {"value": 1.0}}, {"b": {"value": 2.0}}
    bench.write_figures(path, one)
    bench.write_figures(path, other)
    assert json.loads(path.read_text())["figures"] == one | other
    path.write_text(json.dumps({"machine": bench.machine() | {"threads": 99}, "figures": one}))
    bench.write_figures(path, other)
    assert json.loads(path.read_text())["figures"] == other


def test_the_page_tells_what_was_missed():
    values = {
        "train/A/thinker": 1.19,
        "train/A/thinker/matmul_share": 30.0,
        "generate/batch_1": 3.6,
        "startup/help": None,
    }
    figures = {name: {"value": value, "unit": "x", "note": "of both"} for name, value in values.items()}
    lines = bench.page({"machine": {"cpus": 2}, "date": "today", "figures": figures}, "make bench").splitlines()
    assert lines[2] == "`make bench`, today: cpus 2."
    assert lines[-4:] == [
        "| train/A/thinker | 1.19 | at least 1.3: **missed** | of both |",
        "| train/A/thinker/matmul_share | 30.00 |  | of both |",
        "| generate/batch_1 | 3.60 | at least 3.5 | of both |",
        "| startup/help | - |  | of both |",
    ]


def test_a_new_page_keeps_the_sections_below_its_table(tmp_path, monkeypatch):
    page, sections = tmp_path / "speed.md", "\n## Beside another\n\nTwice as fast.\n\n## More\n"
    monkeypatch.setattr(bench, "PARTS", {"train": lambda it: it.add("train/A/thinker", next(values), "x", "")})
    values = iter((1.5, 2.5))
    arguments = ["train", "--json", str(tmp_path / "bench.json"), "--page", str(page)]
    bench.main(arguments)
    page.write_text(page.read_text() + sections)
    bench.main(arguments)
    assert page.read_text().endswith(f"| train/A/thinker | 2.50 | at least 1.3 |  |\n{sections}")


def test_a_stage_without_data_is_left_out_and_says_so(configs, tmp_path, monkeypatch, capsys):
    keys = json.loads((configs / "thinker_demo.json").read_text())
    (tmp_path / "thinker_demo.json").write_text(json.dumps(keys | {"train_text": "absent.txt"}))
    monkeypatch.setattr(bench, "STAGES", {"A": bench.STAGES["A"]})
    bench.main(["loop", "--smoke", "--configs", str(tmp_path), "--json", str(tmp_path / "bench.json")])
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert figures["loop/A/overhead"]["value"] is None and "absent.txt" in figures["loop/A/overhead"]["note"]
    assert "not measured" in capsys.readouterr().out


def test_an_unknown_part_and_files_of_another_kind_are_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PARTS", {"train": None})
    with pytest.raises(UserError, match="trian: expected one of train"):
        bench.main(["trian"])
    for content in ("# not JSON", '{"lr": 1}', "[]"):
        (tmp_path / "mine").write_text(content)
        with pytest.raises(UserError, match="mine: expected a new file, or one of this script"):
            bench.main(["train", "--json", str(tmp_path / "mine")])
        assert (tmp_path / "mine").read_text() == content
    with pytest.raises(UserError, match="expected a folder of"):
        bench.main(["train", "--configs", str(tmp_path), "--json", str(tmp_path / "new")])


def test_the_dial_of_size_is_the_demo_at_four():
    written = json.loads((ROOT / "configs/thinker_demo.json").read_text())
    assert depth.keys_of(4).items() <= written.items()
    widths = [depth.keys_of(layers)["d_model"] for layers in (1, 2, 3, 6)]
    assert widths == [32, 64, 96, 192]
    for layers in range(1, 9):
        assert read_config("A", ROOT / "configs", **depth.keys_of(layers)).architecture.n_layers == layers


@pytest.fixture
def quick_starts(tmp_path, monkeypatch):
    """What runs a command gets a process that has PyTorch imported."""

    def run(command: list, check: bool = False, cwd: Path = tmp_path, stdout: int | None = None) -> Process:
        process = start(*command[1:], cwd=cwd, output=tmp_path / "process").wait()
        assert process.returncode == 0 or not check, process.stderr
        return process

    monkeypatch.setattr(subprocess, "run", run)


def test_the_dial_trains_and_draws_a_curve(tmp_path, quick_starts):
    lines = "".join(f"{word} comes after {i}\n" for i in range(300) for word in ("one", "two"))
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text(lines)
    keys = {"train_text": tmp_path / "train.txt", "val_text": tmp_path / "val.txt", "vocab_size": 300, "ctx_len": 16}
    keys |= {"max_steps": 4, "warmup_steps": 1, "val_freq": 4, "print_freq": 2}
    options = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    depth.main(["--depth", "2", "1", "--out", str(tmp_path / "runs"), "--page", str(tmp_path / "page.md"), *options])
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    sizes = [int(row.split("|")[2].replace(",", "")) for row in rows]
    assert len(rows) == 2 and sizes == sorted(sizes) and (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="at least 1, found 0"):
        depth.main(["--depth", "0"])
    with pytest.raises(SystemExit) as ended:  # a stage's code is passed on
        depth.main(["--depth", "1", "--out", str(tmp_path / "other"), "--set", "nokey=1"])
    assert ended.value.code == 2


def test_nanogpt_has_as_long_and_is_judged_on_the_same_text(tmp_path, monkeypatch, quick_starts):
    lines = [f"{word} comes after {i}\n" for i in range(300) for word in ("one", "two")]
    (tmp_path / "train.txt").write_text("".join(lines))
    (tmp_path / "val.txt").write_text("".join(lines[:40]))
    keys = json.loads((ROOT / "configs/thinker_demo.json").read_text())
    keys |= {"train_text": str(tmp_path / "train.txt"), "val_text": str(tmp_path / "val.txt"), "vocab_size": 300}
    keys |= {"ctx_len": 32, "n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 64, "print_freq": 5}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    monkeypatch.setattr(nanogpt, "PILOT_STEPS", 20)
    monkeypatch.chdir(tmp_path)
    nanogpt.main(["--minutes", "0.02", "--config", "config.json", "--json", "figures.json"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["steps"] > 0 and "nanogpt_float32" in figures
    for name in (name for name in figures if name.startswith("nanogpt_")):
        assert figures[name]["steps"] > 0
        assert 0 < figures[name]["bits_per_byte"] < 8 and 0 < figures["bits_per_byte"] < 8
