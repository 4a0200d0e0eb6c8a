"""Imports between the rooms run one way, in the order that the package states."""

import ast
import re
from pathlib import Path

import qmf_examples

ROOT = Path(qmf_examples.__file__).parent


def order():
    """The rooms, from the docstring."""
    return re.findall(r"\w+", re.search(r":\n(data, [\w, ]+);", qmf_examples.__doc__).group(1))


def imported(path):
    """The modules of the package that a file imports, wherever in it, as parts below the package."""
    inside = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(inside[: len(inside) - node.level]) if node.level else (node.module or "").split(".")[1:]
            if node.level or (node.module or "").partition(".")[0] == "qmf_examples":
                target = base + ((node.module or "").split(".") if node.level and node.module else [])
                for alias in node.names:
                    yield (*target, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("qmf_examples"), f"{path} imports absolutely"


def test_the_rooms_are_those_that_the_package_names():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(order()) == folders
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "cli", "errors", "files", "processes"}


def files(path):
    """The package's files that a file imports, as parts below the package."""
    for target in imported(path):
        below = [target[:length] for length in (2, 1) if (ROOT / "/".join(target[:length])).with_suffix(".py").exists()]
        if below:
            yield below[0]


def test_each_room_uses_those_before_it_alone():
    rooms = order()
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0]
        for target in files(path):
            if room == "cli.py" or target[0] not in rooms:
                continue
            assert room in rooms, f"{path} stands below all rooms and imports {target}"
            assert rooms.index(target[0]) <= rooms.index(room), f"{path} imports {'.'.join(target)}"


def test_no_file_imports_itself_in_the_end():
    graph = {path.relative_to(ROOT).with_suffix("").parts: set(files(path)) for path in ROOT.rglob("*.py")}
    assert graph["commands", "app"], "nothing was found"
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            one = todo.pop()
            if one not in seen:
                seen.add(one)
                todo += graph[one]
        assert start not in seen, ".".join(start)
