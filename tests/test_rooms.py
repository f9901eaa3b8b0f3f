"""The table of rooms: what each may import. A room that is not in it fails, and so does an arrow upwards."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "fastmrcnn"
COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "propose",
    "convert",
    "export",
    "demo",
    "serve",
    "experiments",
    "benchmark",
)
GROUND = ("errors", "structures", "device", "files", "graphs", "group", "pixels")

# What a room may import, the ground first. A room's own modules import each other freely.
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "structures": (),
    "device": ("errors",),
    "files": ("errors",),
    "graphs": (),
    "group": ("errors",),
    "kernels": (),
    "pixels": ("kernels", "structures"),
    "config": ("errors",),
    "data": ("structures", "files", "errors"),
    "model": ("kernels", "structures", "errors"),
    "weights/peers": GROUND,
    "weights": ("weights/peers", "model", "data", "config", *GROUND),
    "training": ("weights", "model", "data", "config", *GROUND),
    "detection": ("weights", "data", "kernels", *GROUND),
    "deployment": ("detection", "weights", "model", "data", "config", "kernels", *GROUND),
    "service": ("detection", "data", *GROUND),
    "evaluation": ("detection", "weights", "model", "data", "config", *GROUND),
    "page": ("detection", "weights", "data", *GROUND),
    "speed": (
        "evaluation",
        "training",
        "detection",
        "weights",
        "weights/peers",
        "model",
        "data",
        "config",
        "kernels",
        *GROUND,
    ),
    "study": (
        "speed",
        "evaluation",
        "training",
        "detection",
        "weights",
        "weights/peers",
        "model",
        "data",
        "config",
        *GROUND,
    ),
}
# The one module of a room that reads the configuration and gives the others values.
BUILD = {"data": "config", "model": "config"}
# Names that rooms share by rule, since they do the same in each: what becomes of the configuration, of COCO
# files and of proposals, what a room runs, what it refuses.
SHARED = {"__init__", "build", "run", "checks", "coco", "proposals"}


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] != "kernels":  # a folder of its own, with its own rules
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def room_of(parts: tuple[str, ...]) -> str:
    """The room, command or "" for the package itself, of a module's path within the package."""
    if parts[:2] == ("weights", "peers"):
        return "weights/peers"
    return parts[0] if parts else ""


def imports(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Our own modules that a module imports, as dotted names without the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            if node.module == "fastmrcnn":
                yield from ((name.name, node) for name in node.names)
            elif node.module is not None and node.module.startswith("fastmrcnn."):
                yield node.module.removeprefix("fastmrcnn."), node
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "fastmrcnn":
                    yield name.name.removeprefix("fastmrcnn").removeprefix("."), node


def arrows() -> Iterator[tuple[Path, str, str, ast.stmt]]:
    """Module, its room, the room that it imports, and the statement."""
    for path, tree in modules():
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        room = room_of(parts[:-1] if parts[-1] == "__init__" else parts)
        for name, node in imports(tree):
            other = room_of(tuple(name.split(".")))
            if other != room:
                yield path, room, other, node


def test_every_module_is_in_a_room() -> None:
    places = {room_of(p.relative_to(PACKAGE).with_suffix("").parts) for p, _ in modules()} - {"__init__"}
    assert places == {*ROOMS, *COMMANDS} - {"kernels"}


def test_the_table_points_one_way() -> None:
    known: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed) <= known, f"{room} may import a room that stands below it in the table"
        known.add(room)


def test_rooms_import_what_the_table_says() -> None:
    wrong = []
    for path, room, other, node in arrows():
        allowed = set(ROOMS.get(room, ROOMS))  # commands, and the package itself, import any room
        if path.name == "build.py" and room in BUILD:
            allowed.add(BUILD[room])
        if other not in allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {room or 'fastmrcnn'} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_a_command() -> None:
    wrong = [f"{p.relative_to(ROOT)}:{n.lineno}" for p, _, other, n in arrows() if other in COMMANDS]
    assert not wrong


def test_our_own_modules_are_imported_at_the_top() -> None:
    wrong = []
    for path, tree in modules():
        if (
            path == PACKAGE / "__init__.py"
        ):  # on first use: who takes the kernels alone needs none of the rest
            continue
        top = {id(node) for node in tree.body}
        wrong += [f"{path.relative_to(ROOT)}:{n.lineno}" for _, n in imports(tree) if id(n) not in top]
    assert not wrong


def test_modules_of_a_room_import_each_other_without_a_circle() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    names = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p, _ in modules()}
    for path, tree in modules():
        own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[own] |= {name for name, _ in imports(tree) if name in names}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " imports ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_name_in_two_rooms() -> None:
    where = defaultdict(list)
    for path, _ in modules():
        where[path.stem].append(str(path.relative_to(ROOT)))
    for folder in ("bench", "kernels"):
        for path in (ROOT / folder).glob("*.py"):
            where[path.stem].append(str(path.relative_to(ROOT)))
    twice = {name: paths for name, paths in where.items() if len(paths) > 1 and name not in SHARED}
    assert not twice


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in (*GROUND, "kernels")])
def test_a_room_says_what_lives_in_it(room: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert text
    assert text.endswith(".")
    assert "\n\n" not in text
