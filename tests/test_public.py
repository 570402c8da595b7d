"""The public names are exactly those of the list, each is there, and asking for help imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import lorafold


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_name_is_there():
    for name in lorafold.__all__:
        assert getattr(lorafold, name) is not None
    assert sorted(set(lorafold.__all__)) == sorted(lorafold.__all__)
    assert dir(lorafold) == sorted(lorafold.__all__)


def test_the_list_for_people_is_the_list_for_type_checkers():
    tree = ast.parse(Path(lorafold.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING")
    checked = {(alias.asname, node.module or "") for node in block.body for alias in node.names}
    assert checked == {(name, room) for room, names in lorafold._HOME.items() for name in names}


def test_names_hide_no_module():
    """A module of the package with the name of a public function would take its place once it is imported."""
    here = Path(lorafold.__file__).parent
    rooms = {path.stem for path in here.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not rooms & set(lorafold.__all__)


def test_an_unknown_name_is_an_attribute_error():
    assert (
        run("import lorafold\ntry: lorafold.fold\nexcept AttributeError as e: print(e)")
        == "module 'lorafold' has no attribute 'fold'"
    )


def test_importing_imports_no_torch():
    assert run("import sys, lorafold, lorafold.cli; print('torch' in sys.modules, 'rich' in sys.modules)") == "False False"
