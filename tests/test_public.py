"""The public names are exactly those listed, each has an example that runs, and importing waits for nothing heavy."""

import ast
import doctest
import importlib
import inspect
import logging
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorafold
import lorafold.errors
import lorafold.nn

TOP = {
    "Adapter", "Checkpoint", "Conversion", "Inspection", "Kept", "LiveMerge", "LorafoldError", "LorafoldWarning", "LowRankUpdate",
    "MergePlan", "MergeReport", "Proof", "ReadOptions", "Stochastic", "SumOptions", "UnmergeReport", "__version__",
    "convert", "errors", "inspect", "load_adapter", "merge", "merge_each", "merge_into", "merge_weight", "nn", "open_checkpoint",
    "plan", "run", "scaling_factor", "unmerge", "verify",
}  # fmt: skip

LIVE = {
    "Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "LoRALayer", "MergedLinear", "add_adapter", "attach", "detach",
    "iter_merged", "load_adapter_into", "lora_state_dict", "mark_only_lora_as_trainable", "merge", "merged", "merged_state_dict",
    "model_lock", "remove_adapter", "save_adapter", "set_active", "swap", "tag_state_dict", "unmerge", "untie",
}  # fmt: skip


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_names_are_these():
    assert set(lorafold.__all__) == TOP
    assert set(lorafold.nn.__all__) == LIVE
    for module in (lorafold, lorafold.nn):
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(getattr(module, name) is not None for name in module.__all__)
    assert dir(lorafold) == sorted(lorafold.__all__)
    assert set(lorafold.__all__) <= set(run("import lorafold; print(*dir(lorafold))").split())


def test_the_list_for_people_is_the_list_for_type_checkers():
    tree = ast.parse(Path(lorafold.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING")
    checked = {(alias.asname, node.module or "") for node in block.body for alias in node.names}
    assert checked == {(name, room) for room, names in lorafold._HOME.items() for name in names}


def test_names_hide_no_module():
    """A module of the package with the name of a public function would take its place once it is imported."""
    here = Path(lorafold.__file__).parent
    rooms = {path.stem for path in here.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms & set(lorafold.__all__) == set(lorafold._HOME[""])


def test_an_unknown_name_is_an_attribute_error():
    assert (
        run("import lorafold\ntry: lorafold.fold\nexcept AttributeError as e: print(e)")
        == "module 'lorafold' has no attribute 'fold'"
    )


def test_importing_imports_no_torch():
    assert run("import sys, lorafold, lorafold.cli; print('torch' in sys.modules, 'rich' in sys.modules)") == "False False"
    assert run("import sys, lorafold; lorafold.errors; lorafold.LorafoldError; print('torch' in sys.modules)") == "False"


def test_the_rooms_are_reached_without_a_further_import():
    assert run("import lorafold; print(lorafold.nn.Linear.__name__, lorafold.errors.PlanError.__name__)") == "Linear PlanError"


@pytest.mark.parametrize("name", sorted(TOP - {"__version__", "errors", "nn"}))
def test_each_name_has_an_example(name):
    """The examples are run with the other doctests."""
    value = getattr(lorafold, name)
    assert inspect.getdoc(value)
    assert doctest.DocTestParser().get_examples(value.__doc__), f"lorafold.{name} has no example"


@pytest.mark.parametrize("name", sorted(TOP - {"__version__"}))
def test_help_can_be_printed(name):
    text = pydoc.plain(pydoc.render_doc(getattr(lorafold, name)))
    assert name.split(".")[-1] in text


def test_help_of_the_package_names_what_there_is():
    text = pydoc.plain(pydoc.render_doc(lorafold))
    assert "lorafold.merge(" in text
    assert "lorafold.nn" in text


def test_every_module_can_be_found_and_imported():
    """As documentation generators do it; what is compiled is not taken for a module."""
    found = [each.name for each in pkgutil.walk_packages(lorafold.__path__, "lorafold.")]
    assert {"lorafold.kernel.merge", "lorafold.nn.layers.linear"} <= set(found)
    for name in found:
        if name != "lorafold.__main__":  # which is the program
            importlib.import_module(name)


def subclasses(kind):
    return {each for child in kind.__subclasses__() for each in ({child} | subclasses(child))}


def test_the_tree_of_errors_is_drawn_as_it_is():
    """Each class of the package stands in it once, below its parent, and there is none elsewhere."""
    for each in pkgutil.walk_packages(lorafold.__path__, "lorafold."):
        if each.name != "lorafold.__main__":
            importlib.import_module(each.name)
    drawn, above = {}, {}
    for line in (lorafold.errors.__doc__ or "").splitlines():
        found = re.match(r"    ([ │├└─]*)(Lorafold\w+|\w+Error)\b", line)
        if found:
            depth = len(found[1]) // 4
            above[depth] = found[2]
            assert found[2] not in drawn
            drawn[found[2]] = above.get(depth - 1)
    root = lorafold.errors.LorafoldError
    kinds = {root, lorafold.errors.LorafoldWarning} | {k for k in subclasses(root) if k.__module__.split(".")[0] == "lorafold"}
    assert {kind.__module__ for kind in kinds} == {"lorafold.errors"}
    defined = {k for _, k in inspect.getmembers(lorafold.errors, inspect.isclass) if issubclass(k, (Exception, Warning))}
    assert kinds == defined
    parents = {k.__name__: next((b.__name__ for b in k.__bases__ if b in kinds), None) for k in kinds}
    assert drawn == parents


def test_the_log_is_silent_unless_asked():
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("lorafold").handlers)
