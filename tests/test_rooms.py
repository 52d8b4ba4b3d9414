"""The structure: packages import downwards only, files can be read at once, and the picture of it is true."""

import ast

import pytest
import rooms

SCRIPTS = sorted(path for path in rooms.ROOT.glob("*.py"))
MOVES_BYTES = ("common", "data/formats", "data/records.py", "data/index.py", "data/lines.py", "data/metadata.py")
MOVES_BYTES += (
    "data/download.py",
    "data/transfer.py",
    "data/archives.py",
    "data/conversations.py",
    "data/named_files.py",
)
WITH_TORCH = ("common/numerics.py", "common/host.py", "common/caches.py")  # these hold or check arrays


def test_every_package_has_its_place():
    assert {rooms.room(path) for path in rooms.files()} - {""} == {*rooms.ORDER, rooms.ASIDE}


def test_packages_import_downwards_only():
    height = {name: index for index, name in enumerate(rooms.ORDER)}
    wrong = [
        f"{path.relative_to(rooms.ROOT)} imports {name}"
        for path in rooms.files()
        for name in rooms.imports(path)
        if (mine := rooms.room(path)) and mine != rooms.ASIDE and mine != (other := name.split(".")[1])
        if height.get(other, len(height)) > height[mine]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_built_in_world_is_known_to_its_generator_alone():
    scripts = [path for folder in ("scripts", "benchmarks") for path in (rooms.ROOT / folder).glob("*.py")]
    for path in [*rooms.files(), *SCRIPTS, *scripts]:
        if rooms.ROOT / "omni" / rooms.ASIDE not in path.parents and path.name != "make_synthetic_datasets.py":
            assert not any(name.startswith(f"omni.{rooms.ASIDE}") for name in rooms.imports(path)), path
    others = {
        name.split(".")[1] for path in rooms.files() if rooms.room(path) == rooms.ASIDE for name in rooms.imports(path)
    }
    assert others <= {"common", "data", rooms.ASIDE}


def test_torch_is_imported_by_nothing_that_only_moves_bytes():
    for path in rooms.files():
        name = path.relative_to(rooms.ROOT / "omni").as_posix()
        if name.startswith(MOVES_BYTES) and name not in WITH_TORCH:
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not any(found.split(".")[0] == "torch" for found in names), name


@pytest.mark.parametrize("path", rooms.files(), ids=lambda path: path.relative_to(rooms.ROOT).as_posix())
def test_a_file_can_be_read_at_once(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 250, node.name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_tells_one_story(path):
    assert path.read_text(encoding="utf-8").count("\n") <= 200


def test_the_picture_of_the_rooms_is_what_the_imports_say():
    assert rooms.PICTURE.read_text(encoding="utf-8") == rooms.draw(), "run: make rooms"
