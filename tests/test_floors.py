"""Imports run downward only: every module has a floor, and imports from lower floors, or from its own package."""

import ast
import importlib
import pkgutil
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lorafold

SOURCE = Path(__file__).parent.parent / "src" / "lorafold"

FLOORS = [
    {"arithmetic", "declared", "errors", "version"},
    {"files", "kernel", "options", "text"},
    {"adapters", "checkpoints"},
    {"nn", "planning"},
    {"engine"},
    {"api"},
    {"__init__", "__main__", "cli"},
]
FACADES = {"__init__", "__main__", "nn"}
"""Modules that have the public names, from whatever room: no other module imports from them."""
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path, root: Path = SOURCE) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") or "__init__"


def imports_of(path: Path, root: Path = SOURCE, *, typing: bool = True) -> set[str]:
    """The modules of the package that the file imports, anywhere in it, as dotted names; `typing`: those for annotations too."""
    found = set()
    package = list(path.relative_to(root).parts[:-1])
    tree = ast.parse(path.read_text())
    if not typing:
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                if node.module:
                    found.add(".".join([*base, *node.module.split(".")]))
                else:
                    found |= {".".join([*base, alias.name]) for alias in node.names}
            elif (node.module or "").split(".")[0] == "lorafold":
                found.add((node.module or "").removeprefix("lorafold").lstrip(".") or "__init__")
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("lorafold").lstrip(".") or "__init__" for a in node.names if a.name.split(".")[0] == "lorafold"
            }
    return found


def upward(root: Path = SOURCE, floor: dict[str, int] = FLOOR) -> list[str]:
    """Imports that do not go down, in words."""
    wrong = []
    for path in sorted(root.rglob("*.py")):
        name = module_name(path, root)
        room = name.split(".")[0]
        for imported in imports_of(path, root):
            other = imported.split(".")[0]
            if name not in FACADES and other != room and floor[other] >= floor[room]:
                wrong.append(f"{name} (floor {floor[room]}) imports {imported} (floor {floor[other]})")
    return wrong


def test_every_room_has_a_floor():
    rooms = {
        path.stem if path.is_file() else path.name
        for path in SOURCE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms == set(FLOOR)


def test_imports_run_downward():
    assert upward() == []


def test_no_circles_within_a_room():
    graph = {}
    for path in SOURCE.rglob("*.py"):
        name = module_name(path)
        room = name.split(".")[0]
        graph[name] = {i for i in imports_of(path, typing=False) if i.split(".")[0] == room and i != name} - {room}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_test_can_fail(tmp_path):
    (tmp_path / "low.py").write_text("def f():\n    from .high import g\n")
    (tmp_path / "high.py").write_text("import torch\n")
    assert upward(tmp_path, {"low": 0, "high": 1}) == ["low (floor 0) imports high (floor 1)"]


def test_the_house_stays_small(record_property):
    """Rooms, floors, arrows, files, options and parameters, counted and printed."""
    files = sorted(SOURCE.rglob("*.py"))
    lengths = sorted(len(path.read_text().splitlines()) for path in files)
    rooms = [path for path in files if module_name(path) != "nn"]  # the list of public names, from wherever they are
    arrows = {(module_name(p).split(".")[0], i.split(".")[0]) for p in rooms for i in imports_of(p)}
    figures = {
        "top-level folders": (sum(path.is_dir() and path.name != "__pycache__" for path in SOURCE.iterdir()), 9),
        "floors": (len(FLOORS), 7),
        "arrows between rooms": (sum(room != other for room, other in arrows), 70),
        "files": (len(files), 300),
        "lines of half of the files": (lengths[len(lengths) // 2], 140),
        "lines of the largest": (lengths[-1], 400),
        "files that name the option rounding": (sum("rounding" in names_in(path) for path in files), 8),
        "functions with more than six parameters": (len([name for path in files for name in many_parameters(path)]), 15),
    }
    for words, (found, most) in figures.items():
        record_property(words, found)
        print(f"{words}: {found} (at most {most})")
    assert {words: found for words, (found, most) in figures.items() if found > most} == {}


IN_EACH_FORMAT = {"__init__", "reader", "writer", "names", "config", "header"}
"""Files that each folder of `adapters/formats` may have, since what they are is said by the folder."""


def test_names_of_files_and_classes_are_unique():
    files = sorted(SOURCE.rglob("*.py"))
    stems = [path.stem for path in files if path.parent.parent.name != "formats" or path.stem not in IN_EACH_FORMAT]
    stems = [stem for stem in stems if stem != "__init__"]
    classes = [node.name for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    assert [name for name, count in Counter([*stems, *classes]).items() if count > 1] == []


def test_every_module_is_found_and_imported():
    """Documentation generators walk the packages; nothing compiled is taken for a module there."""

    def fail(name: str) -> None:
        raise AssertionError(name)

    found = [module.name for module in pkgutil.walk_packages(lorafold.__path__, "lorafold.", onerror=fail)]
    assert {"lorafold.kernel.merge", "lorafold.api.merging"} <= {*found}
    assert not [name for name in found if "libmerge" in name]
    for name in found:
        if not name.endswith("__main__"):
            importlib.import_module(name)


def names_in(path: Path) -> set[str | None]:
    """What the code of a file names: arguments, keywords, attributes, variables, and strings that are one name; no prose."""
    found: set[str | None] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.arg | ast.keyword):
            found.add(node.arg)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def many_parameters(path: Path) -> list[str]:
    """Its functions with more than six parameters; self and cls do not count, *args and **kwargs are one each."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            own = [name for i, name in enumerate(names) if i or name not in ("self", "cls")]
            if len(own) + bool(arguments.vararg) + bool(arguments.kwarg) > 6:
                found.append(f"{path.name}: {node.name}")
    return found


@pytest.mark.parametrize("package", ["typer", "rich", "safetensors", "transformers", "peft", "numpy"])
def test_the_core_does_not_import(package):
    """Only the command line imports typer, only what prints imports rich; nothing imports numpy or transformers.

    `planning/linear_layers.py` looks for transformers by name, where an option asks what only transformers can say.
    """
    allowed = {"typer": "cli", "rich": ("cli", "files.progress"), "safetensors": "nn.saving"}.get(package, ())
    for path in SOURCE.rglob("*.py"):
        if not module_name(path).startswith(allowed or "\0"):
            imported = {n.names[0].name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import)}
            imported |= {
                n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and not n.level
            }
            assert package not in {name.split(".")[0] for name in imported}, path
