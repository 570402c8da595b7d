"""Every option stands in one place: what verbs take, what their signatures and docstrings say is what the classes say."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafold
from lorafold.adapters.read_options import ReadOptions
from lorafold.declared import declared, every
from lorafold.errors import PlanError
from lorafold.options import (
    ConvertArguments,
    ConvertOptions,
    LiveArguments,
    MatchArguments,
    MatchOptions,
    MergeArguments,
    PlanArguments,
    RunOptions,
    SumArguments,
    SumOptions,
)  # fmt: skip
from models import llama, save_adapter, save_base

CLASSES = (SumOptions, MatchOptions, RunOptions, ConvertOptions, ReadOptions)
MERGE = (SumOptions, MatchOptions, RunOptions)
VERBS: dict[str, tuple[tuple[type, ...], bool]] = {
    "merge": (MERGE, False), "merge_each": (MERGE, False), "plan": ((SumOptions, MatchOptions), False),
    "merge_into": ((SumOptions, MatchOptions), True), "convert": ((ConvertOptions,), False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "classes", "live"),
    [
        (SumArguments, (SumOptions,), False), (MatchArguments, (MatchOptions,), False),
        (PlanArguments, (SumOptions, MatchOptions), False), (MergeArguments, MERGE, False),
        (LiveArguments, (SumOptions, MatchOptions), True), (ConvertArguments, (ConvertOptions,), False),
    ],
)  # fmt: skip
def test_keyword_arguments_are_the_fields_of_the_classes(arguments: Any, classes: tuple[type, ...], live: bool) -> None:
    stated = {name: hint.__forward_arg__ for name, hint in arguments.__annotations__.items()}
    assert stated == {name: entry.annotation for name, entry in every(classes, live=live).items()}
    assert not arguments.__required_keys__


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_show_their_real_parameters(verb: str) -> None:
    classes, live = VERBS[verb]
    function = getattr(lorafold, verb)
    parameters = inspect.signature(function).parameters
    assert "options" not in parameters
    for name, entry in every(classes, live=live).items():
        assert parameters[name].default == entry.default
        assert parameters[name].annotation == entry.annotation
        assert f"- `{name}`: {entry.said.doc}" in function.__doc__
    assert "as listed below" not in function.__doc__
    documented = set(re.findall(r"^ *- `(\w+)`:", function.__doc__, re.MULTILINE))
    assert documented <= parameters.keys()


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_is_a_sentence(cls: type) -> None:
    for name, entry in declared(cls).items():
        assert entry.said.doc.endswith("."), name
        assert f"- `{name}`: {entry.said.doc}" in (cls.__doc__ or "")
        assert entry.section


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_a_type_error_that_says_which_was_meant(verb: str) -> None:
    name = next(iter(every(VERBS[verb][0], live=VERBS[verb][1])))
    with pytest.raises(TypeError, match=rf"{verb}\(\) has no option '{name}x'; did you mean '{name}'\?"):
        getattr(lorafold, verb)("base", [], "out", **{f"{name}x": 1})


def test_an_option_of_another_verb_is_refused() -> None:
    with pytest.raises(TypeError, match=r"plan\(\) has no option 'threads'"):
        lorafold.plan("base", [], threads=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("cls", "name", "value", "words"),
    [
        (SumOptions, "rounding", "neerest", "rounding must be 'nearest' or 'stochastic', not 'neerest'"),
        (SumOptions, "seed", True, "seed must be an integer, not True"),
        (SumOptions, "dtype", torch.int8, "dtype must be one of BF16, F16, F32, F64"),
        (SumOptions, "max_shard_size", "5 apples", "max_shard_size must be a size such as 500MB"),
        (SumOptions, "only_changed", 1, "only_changed must be True or False, not 1"),
        (MatchOptions, "prefer", "both", "prefer must be 'index' or 'single', not 'both'"),
        (RunOptions, "threads", 0, "threads must be positive, not 0"),
        (RunOptions, "undo", 3, "undo must be text, not 3"),
        (RunOptions, "expect_sha256", {"a": "0"}, "expect_sha256 must be 64 hexadecimal digits by the name of a file"),
        (ReadOptions, "lora_alpha", float("inf"), "lora_alpha must be a finite number, not inf"),
        (ReadOptions, "enable_lora", (False,), "enable_lora must be True or False for each block, one of them True"),
        (ReadOptions, "renames", "ab", "renames must be pairs"),
        (ReadOptions, "out_proj_factor", True, "out_proj_factor must be 1 or 2, not True"),
    ],
)
def test_options_that_cannot_be_do_not_exist(cls: type, name: str, value: Any, words: str) -> None:
    with pytest.raises(PlanError, match=re.escape(words)):
        cls(**{name: value})


def test_values_are_read_in_each_of_their_forms() -> None:
    for given in (torch.bfloat16, "bfloat16", "torch.bfloat16", "BF16"):
        assert SumOptions(dtype=given).dtype == "BF16"  # type: ignore[arg-type]
    assert SumOptions(max_shard_size="1.5kB") == SumOptions(max_shard_size=1500)  # type: ignore[arg-type]
    assert RunOptions(expect_sha256={"a": "A" * 64}).expect_sha256 == {"a": "a" * 64}
    assert ReadOptions(renames=[["a", "b"]]).renames == (("a", "b"),)  # type: ignore[arg-type,list-item]


@pytest.mark.parametrize("cls", CLASSES)
def test_options_are_json_and_read_back(cls: type) -> None:
    assert cls(**json.loads(json.dumps(asdict(cls())))) == cls()


def test_two_adapters_of_one_merge_are_read_each_in_its_way(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    one, two = (save_adapter(llama(), tmp_path / name, seed=i, target_modules=["q_proj"]) for i, name in enumerate(("one", "two")))
    rule = ReadOptions(renames=(("q_proj", "o_proj"),))
    plan = lorafold.plan(base, [one, (two, 0.5, rule)])
    merged = {step.tensor: {addend.adapter for addend in step.addends} for step in plan.steps if step.addends}
    assert {name.split(".")[-2]: adapters for name, adapters in merged.items()} == {"q_proj": {0}, "o_proj": {1}}
    both = lorafold.plan(base, [one, (two, 0.5)], read_options=rule)
    assert {step.tensor.split(".")[-2] for step in both.steps if step.addends} == {"o_proj"}


def test_asking_for_options_imports_no_torch() -> None:
    code = "import sys, lorafold.options, lorafold.adapters.read_options, lorafold.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_no_class_repeats_a_field_of_another() -> None:
    names = [each.name for cls in (SumOptions, MatchOptions, RunOptions, ReadOptions) for each in fields(cls)]
    assert len(set(names)) == len(names)


def strings() -> list[tuple[Path, str]]:
    """Every text in the package that is no docstring, f-strings with their expressions left open."""
    found = []
    for path in Path(lorafold.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if id(node) in alone or id(node) in inside:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((path, node.value))
            elif isinstance(node, ast.JoinedStr):
                found.append((path, "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)))
    return found


OWN = {"base", "undo", "adapters"}
"""Arguments of verbs that are named like options in hints."""


def test_every_option_that_a_text_names_exists() -> None:
    named = [(path, name) for path, text in strings() for name in re.findall(r"`(?:ReadOptions\()?([a-z_0-9]+)=", text)]
    assert len(named) > 40
    for path, name in named:
        assert name in every(CLASSES) or name in OWN, (path, name)
    of_adapters = [name for _, text in strings() for name in re.findall(r"`ReadOptions\(([a-z_0-9]+)=", text)]
    assert set(of_adapters) <= declared(ReadOptions).keys()


def test_below_the_command_line_no_text_names_a_flag() -> None:
    """The command line says options in flags itself, so a text that names a flag would tell Python's users the wrong thing."""
    root = Path(lorafold.__file__).parent
    below = [(path, text) for path, text in strings() if path.relative_to(root).parts[0] not in ("cli", "kernel")]
    assert [each for each in below if re.search(r"(^|[\s(,;])--[a-z]", each[1])] == []
