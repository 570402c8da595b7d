"""Flags are made from the option classes: each has one, in its section, and what it says reaches the option."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import lorafold
from lorafold.adapters.read_options import ReadOptions
from lorafold.cli.app import app
from lorafold.cli.flags import allowed, flag_name, in_flags
from lorafold.cli.values import SPOKEN, parse_adapter_options
from lorafold.declared import declared, every
from lorafold.options import ConvertOptions, MatchOptions, RunOptions, SumOptions
from models import llama, save_adapter, save_base

MERGE = (SumOptions, MatchOptions, RunOptions)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def flags_of(command: str) -> list[str]:
    return [flag for parameter in COMMANDS[command].params for flag in parameter.opts if flag.startswith("--")]


@pytest.mark.parametrize(
    ("command", "classes"),
    [("merge", MERGE), ("merge-each", MERGE), ("plan", (SumOptions, MatchOptions)), ("convert", (ConvertOptions,))],
)
def test_every_option_has_a_flag_in_the_section_of_its_class(command: str, classes: tuple[type, ...]) -> None:
    text = run(command, "--help").stdout
    sections = {part.splitlines()[0]: part for part in re.split(r"\n(?=[A-Z][^\n]*:\n)", text)}
    for entry in every(classes).values():
        if entry.said.shown and not entry.said.allow:
            assert flag_name(entry) in sections[f"{entry.section}:"]
        assert not entry.said.allow or f"--allow {entry.said.allow}" in sections["What is allowed:"]
    for name in SPOKEN:
        assert f"{name}=" in sections[f"{ReadOptions.section}:"]
    assert flags_of(command).count("--allow") == flags_of(command).count("--adapter-option") == 1


def test_merge_has_few_flags_and_help_stays_within_80_columns() -> None:
    """Counted without --out, --json and --help."""
    flags = set(flags_of("merge")) - {"--out", "--json", "--help"}
    print(f"flags of merge: {len(flags)}")
    assert len(flags) <= 29
    for command in COMMANDS:
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).stdout
        assert max(map(len, text.splitlines())) <= 80, command


def test_adapter_options_are_those_of_all_then_of_each() -> None:
    found = parse_adapter_options(
        [
            "dense-groups",
            "a:lora_alpha=8",
            "lora-alpha=16",
            "map=x=y",
            "map=p=q",
            "a:b:enable_lora=true,false",
            "out_proj_factor=2",
        ],
        ["a", "a:b"],
    )
    shared = {"dense_groups": True, "renames": (("x", "y"), ("p", "q")), "out_proj_factor": 2}
    assert found == [shared | {"lora_alpha": 8.0}, shared | {"lora_alpha": 16.0, "enable_lora": (True, False)}]
    for fields_ in found:
        ReadOptions(**fields_)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_alpah=16", "did you mean lora_alpha?"),
        ("lora_alpha=x", "write lora_alpha=ALPHA"),
        ("lora_alpha", "write lora_alpha=ALPHA"),
        ("expert_layout=rank", "write expert_layout=peft|expert-major"),
        ("out_proj_factor=3", "write out_proj_factor=1|2"),
        ("enable_lora=false", "write enable_lora=true,false,true"),
        ("map=a", "write map=OLD=NEW"),
        ("dense_groups=maybe", "write dense_groups=true"),
        ("other:lora_alpha=1", "other is none of the adapters: adapter"),
        ("zzz=1", "the names are format, lora_alpha"),
        ("allow_pickle=true", "no option of an adapter"),
    ],
)
def test_a_wrong_adapter_option_is_told(text: str, words: str) -> None:
    done = run("plan", "base", "adapter", "--adapter-option", text)
    said = " ".join(done.stderr.split())
    assert (done.exit_code, words in said, "--adapter-option" in said) == (2, True, True), said


@pytest.mark.parametrize("entry", every((*MERGE, ConvertOptions, ReadOptions)).values(), ids=lambda entry: entry.name)
def test_every_option_is_said_in_flags_that_exist(entry: Any) -> None:
    if not entry.said.shown:
        return
    value = "False" if entry.said.off else "True" if entry.kind is bool else repr(entry.choices[0]) if entry.choices else "…"
    of_adapter = entry.name in declared(ReadOptions)
    said = in_flags(f"`ReadOptions({entry.name}={value})`" if of_adapter else f"`{entry.name}={value}`")
    flag, *rest = said.split(" ", 1)
    assert "`" not in said
    command = "convert" if entry.name in declared(ConvertOptions) else "merge"
    assert flag in flags_of(command)
    if flag == "--allow":
        assert rest[0] in allowed((*MERGE, ConvertOptions, ReadOptions))
    elif flag == "--adapter-option":
        assert rest[0].partition("=")[0] in SPOKEN


def test_what_is_chosen_reaches_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lorafold.api.merging as room

    given: dict[str, Any] = {}
    monkeypatch.setattr(room, "merge", lambda base, adapters, out, **options: given.update(options, adapters=adapters) or 1 / 0)
    words = (
        "merge base one@0.5 two -o out --precision fast --rounding stochastic --seed 3 --dtype float16 --max-shard-size 5MB"
        " --on-overflow clamp --only-changed --tied-head none --output-format same"
        " --quantised-as nf4-single --compute-dtype fp16 --requantise-from o --prefer single --repair-index --strict-base"
        f" --overwrite --restart --no-verify --hash-tensors --hash blake3 --link --undo u --expect-sha256 a={'0' * 64}"
        " --verify-input --max-memory 1GiB --threads 2"
        " --allow nonfinite-base --allow partial --allow merge-again --allow pickle --adapter-option two:lora_alpha=4"
    )
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(app, shlex.split(words), catch_exceptions=False)
    adapters = given.pop("adapters")
    assert adapters == [
        ("one", 0.5, ReadOptions(allow_pickle=True)), ("two", 1.0, ReadOptions(lora_alpha=4.0, allow_pickle=True)),
    ]  # fmt: skip
    options = {name: value for name, value in given.items() if name not in ("progress", "command")}
    assert options == {
        "precision": "fast", "rounding": "stochastic", "seed": 3, "dtype": "F16", "max_shard_size": 5_000_000,
        "on_overflow": "clamp", "only_changed": True, "tied_head": "none", "output_format": "same",
            "quantised_as": "nf4-single", "compute_dtype": "fp16", "requantise_from": "o", "prefer": "single",
        "repair_index": True, "strict_base": True, "overwrite": True, "restart": True, "verify": False, "hash_tensors": True,
        "hash": "blake3", "link": True, "undo": "u", "expect_sha256": {"a": "0" * 64}, "verify_input": True, "max_memory": 2**30,
        "threads": 2,
        "allow_nonfinite_base": True, "allow_partial": True, "merge_again": True,
    }  # fmt: skip
    shown = {each.name for cls in MERGE for each in fields(cls) if declared(cls)[each.name].said.shown}
    assert options.keys() == shown


def test_flags_in_documents_exist() -> None:
    root = Path(lorafold.__file__).parent.parent.parent
    known = {flag for command in COMMANDS for flag in flags_of(command)} | {"--version", "--help"}
    words = set(allowed((*MERGE, ConvertOptions, ReadOptions)))
    for name in ("README.md", "CHANGELOG.md"):
        text = (root / name).read_text()
        for span in re.findall(r"`[^`\n]+`|^lorafold .*$", text, re.MULTILINE):
            if "python" in span or "pip" in span or "torchrun" in span:
                continue
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", span)) <= known, (name, span)
            assert set(re.findall(r"--allow ([a-z-]+)", span)) <= words, (name, span)
            assert set(re.findall(r"--adapter-option (?:[a-z.]+:)?([a-z_]+)=", span)) <= set(SPOKEN), (name, span)


def test_two_adapters_differ_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(llama(), tmp_path / "base")
    for i, name in enumerate(("one", "two")):
        save_adapter(llama(), tmp_path / name, seed=i, target_modules=["q_proj"])
    done = run("plan", "base", "one", "two", "--adapter-option", "two:map=q_proj=o_proj")
    assert done.exit_code == 0
    assert all(f"model.layers.*.self_attn.{name}.weight" in done.stdout for name in ("q_proj", "o_proj"))
