"""One dial for size: what a deeper Thinker costs, and what it learns.

    python benchmarks/depth.py --depth 2 4 6                 # stage A
    python benchmarks/depth.py --depth 2 4 6 --omni          # and stage E on each, with the demo's other stages

A Thinker of depth L has L layers, L heads of 32, width 32 L and MLPs of 96 L; L = 4 is `configs/thinker_demo.json`. All
see the same tokens in the same order; the learning rate falls with the width, as 0.004 x sqrt(4 / L). Interrupt it when
you like: the same line goes on where it was. Writes the table to --page and the curve beside it, a PNG.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omni.common.errors import UserError
from omni.stages import STAGES
from omni.train.checkpoint import load
from omni.train.cli import OneLineErrors, launch, output_file, run_script
from omni.train.stage import Stage

ROOT = Path(__file__).resolve().parent.parent
WIDTH_OF_HEAD, LR, LR_DEPTH = 32, 0.004, 4


def keys_of(depth: int) -> dict[str, float]:
    """The keys of `configs/thinker_demo.json` that the dial turns."""
    return {
        "n_layers": depth,
        "n_heads": depth,
        "kv_groups": depth // 2 if depth % 2 == 0 else depth,
        "d_model": WIDTH_OF_HEAD * depth,
        "d_ff": 3 * WIDTH_OF_HEAD * depth,
        "lr": round(LR * math.sqrt(LR_DEPTH / depth), 6),
    }


def train(stage: Stage, folder: Path, keys: dict, overrides: list[str]) -> tuple[float, dict]:
    """Run a stage's script with the demo's config and other ``keys``. Returns minutes of training, at the median of the
    rates that it noted, and the metrics."""
    config = f"configs/{stage.config_name}_demo.json"
    given = [f"{key}={value}" for key, value in (keys | {"save_dir": folder.resolve()}).items()] + overrides
    options = [word for key in given for word in ("--set", key)]
    run_script([sys.executable, stage.script, "--config", config, *options], cwd=ROOT)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row["samples_per_s"] for row in rows if "samples_per_s" in row}
    final = load(folder / stage.final)
    # the median: what else ran on the machine for some of these hours is no cost of the model
    seconds = max(steps) * samples_per_step(final["config"]) / statistics.median(steps.values())
    return seconds / 60, final["metrics"]


def samples_per_step(config: dict) -> int:
    return config["samples_per_step"] or config["batch_size"] * config["gradient_accumulation_steps"]


def draw(path: Path, figures: list[dict]) -> None:
    """Minutes of stage A against bits per byte, and against stage E's accuracy where it was trained."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["minutes"] for row in figures], [row["bits_per_byte"] for row in figures], "o-", color="#1f5fa8")
    for row in figures:
        place = row["minutes"], row["bits_per_byte"]
        axes.annotate(f"depth {row['depth']}", place, xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel="minutes of stage A", ylabel="bits per byte, held out", xscale="log")
    axes.set_xticks([], minor=True)
    axes.set_xticks([row["minutes"] for row in figures], [f"{row['minutes']:.2g}" for row in figures])
    axes.margins(0.2)
    if "accuracy" in figures[0]:
        right = axes.twinx()
        right.plot([row["minutes"] for row in figures], [row["accuracy"] for row in figures], "s--", color="#c0522d")
        right.set_ylabel("stage E, mean of the tasks")
    figure.savefig(path, dpi=110)


def table(figures: list[dict]) -> str:
    titles = {
        "depth": "depth", "parameters": "parameters", "minutes": "A, minutes", "bits_per_byte": "A, bits per byte",
        "perplexity": "A, perplexity", "omni_minutes": "E, minutes", "accuracy": "E, mean of the tasks",
    }  # fmt: skip
    shown = {key: title for key, title in titles.items() if key in figures[0]}
    lines = ["| " + " | ".join(shown.values()) + " |", "| " + " | ".join("---" for _ in shown) + " |"]
    for row in figures:
        cells = [f"{row[key]:,}" if isinstance(row[key], int) else f"{row[key]:.3f}" for key in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[2, 4, 6], metavar="L", help="default: 2 4 6")
    parser.add_argument("--omni", action="store_true", help="train stage E on each")
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints/depth", metavar="DIR", help="for the runs")
    parser.add_argument(
        "--page", type=output_file, metavar="FILE.md", help="file for the table; the curve lies beside it"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of stage A; repeatable"
    )
    args = parser.parse_args(argv)
    if min(args.depth) < 1:
        raise UserError(f"--depth: expected at least 1, found {min(args.depth)}")
    figures = []
    for depth in sorted(set(args.depth)):
        folder = args.out / f"thinker_{depth}"
        minutes, metrics = train(STAGES["text"], folder, keys_of(depth), args.set)
        weights = load(folder / STAGES["text"].final)["model"]
        row = {"depth": depth, "parameters": sum(weight.numel() for weight in weights.values()), "minutes": minutes}
        row |= {name: metrics[name] for name in ("bits_per_byte", "perplexity")}
        if args.omni:
            keys = {"thinker_ckpt": folder.resolve()}
            row["omni_minutes"], metrics = train(STAGES["omni"], args.out / f"omni_{depth}", keys, [])
            row["accuracy"] = metrics["accuracy"]
        figures.append(row)
        print(table(figures), flush=True)
    if args.page:
        args.page.write_text(table(figures) + "\n", encoding="utf-8")
        draw(args.page.with_suffix(".png"), figures)


if __name__ == "__main__":
    launch(main)
