"""The rooms of omni/, drawn from the imports: ``make rooms`` writes docs/rooms.svg, and a test keeps it true."""

import ast
import sys
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "rooms.svg"
# Lowest first: a package imports only those before it. Only the data generator imports ``synthetic``.
ORDER = ("common", "data", "models", "train", "stages", "export", "chat")
ASIDE = "synthetic"
WHAT = {
    "common": "files, errors, locks: no torch, no model",
    "data": "formats, manifests, sound, pictures, films, tokenizer",
    "models": "one file a model, each built from its architecture",
    "train": "loop, resume, report, checkpoints, command line",
    "stages": "what is one stage's own, with the tasks of stage E; the table",
    "export": "one folder that other tools open",
    "chat": "conversation, speech, web page",
    "synthetic": "the built-in world and its text, speech, pictures",
}
ROW, LEFT, WIDTH, HEIGHT = 58, 20, 420, 40


def imports(path: Path) -> set[str]:
    """The modules of omni/ that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "omni":
            found |= {f"omni.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("omni."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("omni.")}
    return found


def files() -> list[Path]:
    return sorted((ROOT / "omni").rglob("*.py"))


def room(path: Path) -> str:
    """The package of omni/ in which a file stands; "" for omni/__init__.py."""
    parts = path.relative_to(ROOT / "omni").parts
    return parts[0] if len(parts) > 1 else ""


def edges() -> Counter:
    """(package, imported package) -> number of files with such an import."""
    return Counter(
        (room(path), other)
        for path in files()
        for other in {name.split(".")[1] for name in imports(path)}
        if room(path) and other != room(path)
    )


def draw() -> str:
    """The rooms from the highest to the lowest, and an arrow for each import from one to another."""
    rows = [*reversed(ORDER), ASIDE]
    y = {name: 20 + ROW * index for index, name in enumerate(rows)}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {ROW * len(rows) + 20}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        '<path d="M0 0 L8 4 L0 8 z" fill="#557"/></marker>',
    ]
    for name in rows:
        fill = "#f4efe2" if name == ASIDE else "#e8eef7"
        lines.append(f'<rect x="{LEFT}" y="{y[name]}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}"/>')
        lines.append(f'<text x="{LEFT + 12}" y="{y[name] + 25}" font-size="15" font-weight="bold">{name}/</text>')
        lines.append(f'<text x="{LEFT + 110}" y="{y[name] + 25}" font-size="12">{escape(WHAT[name])}</text>')
    for (user, used), _ in sorted(edges().items()):
        span = abs(y[used] - y[user]) // ROW
        start, end = y[user] + HEIGHT // 2 + 6, y[used] + HEIGHT // 2 - 6
        right, bend = LEFT + WIDTH, LEFT + WIDTH + 34 * span
        lines.append(
            f'<path d="M{right} {start} C{bend} {start} {bend} {end} {right} {end}" fill="none" stroke="#557" '
            'stroke-opacity="0.55" marker-end="url(#arrow)"/>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}", file=sys.stderr)
