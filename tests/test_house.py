"""The rooms of the package and the direction of its imports: nothing imports upwards, also not inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A module belongs to the longest name that it begins with, and imports from its own floor (never in
# a circle) and from those below.
FLOORS = [
    ["inmerge_fast.kernels", "inmerge_fast.native"],
    ["inmerge_fast.draw", "inmerge_fast.reference", "inmerge_fast.stats", "inmerge_fast.effect", "inmerge_fast.dynamo"],
    ["inmerge_fast.plan"],
    ["inmerge_fast.paths", "inmerge_fast.checkpoints"],
    [
        "inmerge_fast.layer_similarity",
        "inmerge_fast.rank_cost",
        "inmerge_fast.history",
        "inmerge_fast.merge_plan",
        "inmerge_fast.thresholds",
    ],
    ["inmerge_fast.merge", "inmerge_fast.lease"],
    ["inmerge_fast.forward_only"],
    ["inmerge_fast.training"],
    ["inmerge_fast.integrations", "inmerge_fast.inspection"],
    ["inmerge_fast"],
    ["inmerge_fast.demo"],
    ["inmerge_fast.__main__"],
]
APART = ["inmerge_fast.integrations", "inmerge_fast.inspection"]  # on one floor, with a wall between them


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path, *folders: str) -> dict[str, Path]:
    found = {}
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):  # the link to the kernels is not followed
            found[name_of(path, root)] = path
    if "inmerge_fast" in folders:
        for path in sorted((root / "kernels").glob("*.py")):
            found[f"inmerge_fast.kernels.{path.stem}"] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Modules of ours that a module imports anywhere in its text, for type checkers only too, with their lines."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found = []
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append(inner if inner in known else base)
        else:
            continue
        for target in found:
            if target in known and target != name:
                yield target, node.lineno


@cache
def graph(*folders: str) -> dict[str, dict[str, int]]:
    known = modules(ROOT, *folders)
    return {name: dict(imports(name, path, known)) for name, path in known.items()}


def room_of(name: str) -> str:
    rooms = [room for floor in FLOORS for room in floor]
    return max((room for room in rooms if f"{name}.".startswith(f"{room}.")), key=len)


def floor_of(name: str) -> int:
    return next(index for index, floor in enumerate(FLOORS) if room_of(name) in floor)


def circles(found: dict[str, dict[str, int]]) -> list[list[str]]:
    """A way round each circle of imports that a depth-first walk meets."""
    done: set[str] = set()
    met = []

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            met.append([*way[way.index(name) :], name])
            return
        if name in done:
            return
        for target in found[name]:
            walk(target, [*way, name])
        done.add(name)

    for name in found:
        walk(name, [])
    return met


def test_every_module_has_a_room_of_its_own_floor():
    for name in graph("inmerge_fast"):
        only_the_package = room_of(name) == "inmerge_fast" and name != "inmerge_fast"
        assert not only_the_package, f"{name} stands in no room: give it one in FLOORS, or move it into one"


def test_nothing_imports_upwards():
    upwards = [
        f"{name}:{line} imports {target}"
        for name, targets in graph("inmerge_fast").items()
        for target, line in targets.items()
        if floor_of(target) > floor_of(name)
        or (floor_of(target) == floor_of(name) and room_of(target) != room_of(name) and room_of(name) in APART)
    ]
    assert not upwards, "\n".join(upwards)


@pytest.mark.parametrize("folder", ["inmerge_fast", "benchmarks"])
def test_no_circles(folder):
    assert not circles(graph(folder))


def test_the_plan_knows_nothing_of_how_layers_are_merged():
    below = {target for name, targets in graph("inmerge_fast").items() if room_of(name) == "inmerge_fast.plan"
             for target in targets}  # fmt: skip
    allowed = {f"inmerge_fast.{name}" for name in ("plan", "draw", "stats", "native")}
    assert {room_of(name) for name in below} <= allowed


def test_merge_asks_no_path_for_its_name():
    tree = ast.parse((ROOT / "inmerge_fast" / "merge.py").read_text())
    compared = {
        ast.unparse(side)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
    }
    assert not {"path", "path.name", "plan.path", "'triton'", "'eager'"} & compared


def test_the_walls_are_seen_to_break(tmp_path):
    """The rules above on a small package that breaks each of them."""
    package = tmp_path / "inmerge_fast"
    for name, text in {
        "__init__.py": "",
        "plan/__init__.py": "",
        "plan/plan.py": "def choose():\n    from ..paths import eager\n",
        "paths/__init__.py": "",
        "paths/eager.py": "import typing\nif typing.TYPE_CHECKING:\n    from .other import x\n",
        "paths/other.py": "import inmerge_fast.paths.eager\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    known = modules(tmp_path, "inmerge_fast")
    found = {name: dict(imports(name, path, known)) for name, path in known.items()}
    assert found["inmerge_fast.plan.plan"] == {"inmerge_fast.paths.eager": 2}
    assert floor_of("inmerge_fast.paths.eager") > floor_of("inmerge_fast.plan.plan")
    assert circles(found) == [["inmerge_fast.paths.eager", "inmerge_fast.paths.other", "inmerge_fast.paths.eager"]]


def test_files_are_short_enough_to_read():
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for folder in ("inmerge_fast", "kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*.[pch]*")
        if path.suffix in (".py", ".c", ".h") and (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long, "more than 400 lines: is there a second story inside?"
