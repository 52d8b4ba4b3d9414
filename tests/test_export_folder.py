"""The folder of an export: it replaces the files of an earlier export, as that one listed them, and nothing else."""

import os
import stat
from pathlib import Path

import pytest

from omni.common.errors import UserError
from omni.common.files import file_sha256, write_json
from omni.export.folder import FORMAT, INFO, LOCK, info_sha256, is_own_file, new_folder

LISTED = ("model.safetensors", "config.json", "README.md", "thinker/config.json", "thinker/model.safetensors")


def export(target: Path, version: str, replace: bool = True, arrives=None) -> None:
    """What export.py does to a folder, without a model; ``arrives`` is called while it works."""
    with new_folder(target, replace) as folder:
        for name in LISTED:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(version)
        if arrives is not None:
            arrives()
        info = {"format": FORMAT, "components": {}, "files": {name: file_sha256(folder / name) for name in LISTED}}
        write_json(folder / INFO, info | {"sha256": info_sha256(info)})


def inventory(folder: Path) -> dict[str, object]:
    """Everything below ``folder``: what it is, and what is in it; no link is followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in folders + files):
            content = None
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = path.read_bytes()
            found[path.relative_to(folder).as_posix()] = stat.S_IFMT(path.lstat().st_mode), content
    return found


def file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


def link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(path.parent.anchor + "nowhere")


ARRIVALS = {
    f"{kind.__name__} {name}": (kind, name)
    for kind, names in {
        file: ("notes.txt", ".git/HEAD", "thinker/notes.txt", "thinker/deep/er/notes.txt", ".lock",
               "vocoder/config.json",
               "line\nend", "model.safetensors.bak", "generation_config.json", "x/" * 300 + "y"),
        link: ("link", "thinker/link", "config.json", "README.md", "vision_encoder"),
        Path.mkdir: ("empty", "thinker/empty", "vocoder"),
        os.mkfifo: ("pipe", "thinker/pipe"),
    }.items()
    for name in names
}  # fmt: skip


@pytest.mark.parametrize("moment", ["before", "while"])
@pytest.mark.parametrize("arrival", ARRIVALS)
def test_whatever_else_lies_in_an_export_survives_the_next_one(tmp_path, arrival, moment):
    target, (make, name) = tmp_path / "merged", ARRIVALS[arrival]
    export(target, "first")
    if moment == "before":
        make(target / name)
    kept = inventory(target)
    with pytest.raises(UserError, match="no file of an export") as error:
        export(target, "second", arrives=lambda: make(target / name) if moment == "while" else None)
    assert "\n" not in str(error.value) and (name.split("/")[-2:] + [name])[0].split("\n")[0] in str(error.value)
    if moment == "while":
        assert kept.items() - inventory(target).items() <= {(name, kept.get(name))}
        assert name in inventory(target)
    else:
        assert inventory(target) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["merged"], "nothing is left beside it"


@pytest.mark.parametrize("name", LISTED)
def test_a_file_that_was_changed_since_it_was_exported_is_not_replaced(tmp_path, name):
    target = tmp_path / "merged"
    export(target, "first")
    (target / name).write_text("my own words")
    kept = inventory(target)
    with pytest.raises(UserError, match=f"{name}: changed since it was exported"):
        export(target, "second")
    assert inventory(target) == kept
    (target / name).unlink()
    export(target, "second")
    assert (target / name).read_text() == "second"


def test_a_folder_whose_list_cannot_be_believed_is_not_replaced(tmp_path):
    target = tmp_path / "merged"
    export(target, "first")
    text = (target / INFO).read_text()
    lists = [text.replace('"format"', '"formal"'), text[:-9], "{}", "[]", "[" * 100_000, "\udcff", '{"sha256": 1}']
    for change in lists:
        (target / INFO).write_bytes(change.encode(errors="surrogateescape"))
        kept = inventory(target)
        with pytest.raises(UserError, match=INFO) as error:
            export(target, "second")
        assert "\n" not in str(error.value) and inventory(target) == kept


@pytest.mark.parametrize("beside", [".merged.omni-partial", ".merged.omni-replaced"])
@pytest.mark.parametrize("kind", ["folder", "link", "file", "leftover with a file of mine"])
def test_what_stands_at_its_temporary_names_is_left_alone(tmp_path, beside, kind):
    target, path = tmp_path / "merged", tmp_path / beside
    export(target, "first")
    (tmp_path / "mine").mkdir()
    file(tmp_path / "mine" / "notes.txt")
    if kind == "folder":
        file(path / "notes.txt")
    elif kind == "link":
        path.symlink_to(tmp_path / "mine")
    elif kind == "file":
        file(path)
    else:
        export(path, "leftover")
        file(path / "thinker" / "notes.txt")
    kept = inventory(tmp_path)
    with pytest.raises(UserError, match=beside) as error:
        export(target, "second")
    assert "\n" not in str(error.value) and inventory(tmp_path) == kept


def test_what_a_killed_export_left_is_cleared_by_the_next(tmp_path):
    target, partial = tmp_path / "merged", tmp_path / ".merged.omni-partial"
    for name in (LOCK, "thinker/.tmpAb3xYz", "tokenizer.json.0123456789abcdef.omni-partial", *LISTED):
        file(partial / name)
    (partial / LOCK).write_text("4242")
    (partial / "vocoder").mkdir()
    export(target, "first", replace=False)
    assert sorted(inventory(target)) == sorted((*LISTED, INFO, "thinker"))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002, 0o027])
def test_permissions_are_the_umask_s(tmp_path, mask):
    torch = pytest.importorskip("torch")
    from omni.export.bundle import write_weights

    before = os.umask(mask)
    try:
        with new_folder(tmp_path / "merged", False) as folder:
            write_weights(folder / "model.safetensors", {"a": torch.zeros(2)})
            write_json(folder / INFO, {})
    finally:
        os.umask(before)
    found = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "merged").iterdir()}
    assert found == {0o666 & ~mask} and stat.S_IMODE((tmp_path / "merged").stat().st_mode) == 0o777 & ~mask


def test_the_list_is_of_names_that_an_export_writes():
    assert all(is_own_file(name) for name in (*LISTED, INFO))
    others = "notes.txt", "../config.json", "x/config.json", "thinker/x/config.json"
    assert not any(is_own_file(name) for name in others)
