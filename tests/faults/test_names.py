"""Row 37: whatever a file is called and whatever it says, no control character reaches a terminal, and no tag a page."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from models import edit_json, edit_tensors, rewritten

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
EVIL = "\x1b[31m\x07\x9b2J\r\u202e<script>alert(1)</script>`"
SHARD = "model-00001-of-00002.safetensors"


def quiet(road: Any, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and all that was said, without a control character in it."""
    code, out, err = road.run(*arguments)
    assert not CONTROL.search(out + err), [out, err]
    assert "Traceback" not in out + err
    if "--json" in arguments and out:
        json.loads(out)
    return code, out + err


def named(road: Any, evil: str) -> tuple[Path, Path]:
    """Base and adapter that merge, in folders, with modules, and by words that are evil."""
    base, adapter = road.folder / f"base {evil.replace('/', '∕')}", road.folder / f"adapter {evil.replace('/', '∕')}"
    shutil.copytree(road.base, base)
    (base / "model.safetensors.index.json").unlink()
    held = {**load_file(base / SHARD), **load_file(base / SHARD.replace("00001-", "00002-"))}
    for file in base.glob("*.safetensors"):
        file.unlink()
    save_file({name.replace("q_proj", f"q{evil}"): tensor for name, tensor in held.items()}, base / "model.safetensors")
    edit_json(base / "config.json", _name_or_path=evil, model_type=evil, architectures=[evil])
    (base / "README.md").write_text(f"---\nlicense: {evil}\n---\n")
    rewritten(road.adapter, adapter, rename=lambda name: name.replace("q_proj", f"q{evil}"))
    edit_json(adapter / "adapter_config.json", target_modules=[f"q{evil}", "v_proj"], base_model_name_or_path=evil)
    return base, adapter


def test_row_37_names_that_drive_a_terminal_in_every_command(road: Any) -> None:
    base, adapter = named(road, EVIL)
    for options in ((), ("--json",)):
        for command in (
            ("plan", base, adapter), ("plan", base, adapter, "--all"), ("inspect", adapter), ("inspect", adapter, "--all"),
            ("inspect", base), ("inspect", base, "--all"),
            ("merge", base, adapter, "-o", road.out, "--undo", road.folder / "undo", "--overwrite"),
            ("inspect", road.out, "--all"),
            ("verify", road.out, "--base", base, "--adapter", adapter), ("verify", road.out),
            ("unmerge", road.out, "--base", base, "-o", road.folder / "again", "--overwrite"),
            ("unmerge", road.out, "--undo", road.folder / "undo", "-o", road.folder / "again", "--overwrite"),
        ):  # fmt: skip
            if command[0] != "plan" or "--all" not in command or not options:
                code, said = quiet(road, *command, *(options if command[:1] != ("plan",) or "--all" not in command else ()))
                assert code == 0, (command, said)


def test_row_37_and_in_every_error(road: Any) -> None:
    base, adapter = named(road, EVIL)
    assert quiet(road, "merge", base, adapter, "-o", road.out)[0] == 0
    whole = (road.out / "lorafold.json").read_text()
    edit_json(road.out / "lorafold.json", files={EVIL.replace("/", ""): EVIL}, unmatched=[EVIL])
    assert quiet(road, "verify", road.out)[0] == 3
    assert quiet(road, "verify", road.out, "--base", base, "--adapter", adapter)[0] == 3
    (road.out / "lorafold.json").write_text(whole)
    for fields in (
        {"peft_type": EVIL}, {"r": EVIL}, {EVIL: EVIL}, {"rank_pattern": {EVIL: 3}}, {"target_modules": [EVIL]},
        {"lora_alpha": EVIL}, {"rank_pattern": {f"({EVIL}": 2}}, {"use_dora": EVIL}, {"base_model_name_or_path": [EVIL]},
    ):  # fmt: skip
        other = rewritten(adapter, road.folder / "other", **fields)
        for options in ((), ("--json",)):
            quiet(road, "merge", base, other, "-o", road.folder / "no", "--overwrite", *options)
        shutil.rmtree(other)
    for place in ("adapter", "base"):
        (file,) = (adapter if place == "adapter" else base).glob("*.safetensors")
        good = file.read_bytes()
        edit_tensors(file.parent, lambda held: {name.replace("v_proj", f"v{EVIL}"): tensor for name, tensor in held.items()})
        assert quiet(road, "merge", base, adapter, "-o", road.folder / "no")[0] == 1
        edit_tensors(file.parent, lambda held: {name: tensor[:1].contiguous() for name, tensor in held.items()})
        assert quiet(road, "merge", base, adapter, "-o", road.folder / "no")[0] == 1
        file.write_bytes(good[:-1])
        assert quiet(road, "merge", base, adapter, "-o", road.folder / "no")[0] == 1
        file.write_bytes(good)
    index = {"metadata": {EVIL: EVIL}, "weight_map": {EVIL: f"{EVIL.replace('/', '')}.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert quiet(road, "merge", base, adapter, "-o", road.folder / "no", "--prefer", "index")[0] == 1
    assert quiet(road, "merge", base, adapter, "-o", road.folder / f"{EVIL}")[0] == 1
    assert not (road.folder / "no").exists()


def test_row_37_no_tag_reaches_the_model_card(road: Any) -> None:
    base, adapter = named(road, EVIL)
    assert quiet(road, "merge", base, adapter, "-o", road.out)[0] == 0
    card = (road.out / "README.md").read_text()
    assert not CONTROL.search(card)
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    shown = re.sub(r"```sh\n.*?\n```", "", body, flags=re.DOTALL)
    assert "<" not in re.sub(r"`[^`\n]*`", "", shown), shown  # what stands in backticks is text to a renderer
    assert body.count("```") in (0, 2)
    assert all(re.match(r"[a-z_]+:( |$)|- [a-z]+$", line) for line in head.splitlines()), head


@pytest.mark.parametrize("name", ["\x1b[31m", "\u202e", "\u2028", "\ud800"])
def test_row_37_printable_escapes_what_is_not_text(name: str) -> None:
    from lorafold.errors import printable

    assert not CONTROL.search(printable(name))
    assert printable(name).encode()


def test_row_37_names_of_bytes_that_are_no_text(road: Any) -> None:
    """A folder whose name is not UTF-8."""
    base = os.fsencode(road.folder) + b"/base\xff\x1b"
    os.rename(road.base, base)
    assert quiet(road, "merge", os.fsdecode(base), road.adapter, "-o", road.out)[0] == 0
    assert quiet(road, "verify", road.out, "--base", os.fsdecode(base), "--adapter", road.adapter)[0] == 0
    json.loads((road.out / "lorafold.json").read_text(encoding="utf-8"))
