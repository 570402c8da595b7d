"""The command line as its users meet it: exit codes, JSON that says what the text says, and errors that help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorafold.cli.app import app
from lorafold.cli.main import main
from models import edit_json, edit_tensors, plain_adapter, plain_base, tensors

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base and adapter, which is the working directory."""
    plain_base(tmp_path / "base")
    plain_adapter(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A command's exit code, output and error output; no control character but the newline is in either."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capfd.readouterr()
        assert not CONTROL.search(out + err)
        code = caught.value.code
        assert type(code) is int
        return code, out, err

    return run


def test_merge_then_verify(here: Path, run: Any) -> None:
    code, out, err = run("merge", "base", "adapter", "-o", "out")
    assert (code, err) == (0, "")
    assert re.match(r"base \+ adapter → out\n  merged    tensors: 4 merged, 2 copied\n  kept      (99.\d|100.0)% of the", out)
    assert "  verified  6 of 6 tensors proven (100%): 4 recomputed and equal bit for bit, 2 equal byte for byte\n" in out
    assert "in 2 files" in out
    code, out, err = run("verify", "out", "--base", "base", "--adapter", "adapter")
    assert (code, err) == (0, "")
    assert out.startswith("out is what base and adapters say it must be\n  verified  6 of 6")


def test_verify_says_what_is_wrong_with_exit_code_3(here: Path, run: Any) -> None:
    run("merge", "base", "adapter@0.5", "-o", "out")
    file = here / "out" / "model-00001-of-00002.safetensors"
    held = load_file(file)
    held["model.layers.0.q_proj.weight"][2, 3] += 1
    save_file(held, file, metadata={"format": "pt"})
    code, out, err = run("verify", "out", "--base", "base", "--adapter", "adapter@0.5")
    assert (code, out) == (3, "")
    assert "VerificationError: out is not what base and adapters say it must be, in 2 places:\n" in err
    assert "  model.layers.0.q_proj.weight differs in 1 of 64 elements of a block, the first at [2, 3]\n" in err
    assert "\n\nhint: do not use it: merge again" in err
    code, out, _ = run("verify", "out", "--base", "base", "--adapter", "adapter@0.5", "--json")
    proof = json.loads(out)
    assert code == 3
    assert proof["proven"] is False
    assert proof["tensors"]["model.layers.0.q_proj.weight"]["proven"] is False
    file.write_bytes(file.read_bytes()[:-1])
    for arguments in ((), ("--json",)):
        code, out, err = run("verify", "out", "--base", "base", "--adapter", "adapter@0.5", *arguments)
        assert code == 3
        assert file.name in out + err


def test_json_says_what_the_text_says(here: Path, run: Any) -> None:
    code, out, err = run("merge", "base", "adapter@0.5", "-o", "out", "--dtype", "float16", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["tensors"] == {"merge": 4, "replace": 0, "rows": 0, "cast": 2, "copy": 0}
    assert report["adapters"][0]["adapter_weight"] == 0.5
    assert report["verification"]["share"] == 1
    assert report["dtype"] == "F16"
    assert report["kept"] == json.loads((here / "out" / "lorafold.json").read_text())["kept"]
    assert json.loads(run("verify", "out", "--base", "base", "--adapter", "adapter@0.5", "--json")[1])["proven"] is True

    plan = json.loads(run("plan", "base", "adapter", "--json")[1])
    assert json.loads(run("merge", "base", "adapter", "-o", "dry", "--dry-run", "--json")[1]) == plan
    assert not (here / "dry").exists()
    text = run("plan", "base", "adapter", "--all")[1]
    for shard in plan["shards"]:
        for step in shard["steps"]:
            assert re.search(rf"{re.escape(step['tensor'])} +{step['action']} +{re.escape(str(step['shape']))} +BF16", text)

    adapter = json.loads(run("inspect", "adapter", "--json")[1])
    text = run("inspect", "adapter", "--all")[1]
    assert adapter["modules"].keys() == {f"model.layers.{i}.{m}" for i in (0, 1) for m in ("q_proj", "v_proj")}
    for name, module in adapter["modules"].items():
        assert re.search(rf"{re.escape(name)} +\[8, 8\] +F32 +2 +2 +lora_alpha 4 / r 2 +{module['norm']:.4g}", text)
    checkpoint = json.loads(run("inspect", "out", "--json")[1])
    text = run("inspect", "out", "--all")[1]
    assert checkpoint["parameters"] == sum(tensor.numel() for tensor in tensors(here / "out").values())
    assert all(name in text for name in (*checkpoint["tensors"], *checkpoint["files"]))
    assert "merged    adapter at weight 0.5" in text
    code, out, _ = run("doctor", "--json")
    assert json.loads(out)["versions"]["lorafold"]
    assert code == (1 if json.loads(out)["problems"] else 0)


def test_norms_are_those_of_the_dense_update(here: Path, run: Any) -> None:
    held = load_file(here / "adapter" / "adapter_model.safetensors")
    module = "model.layers.1.v_proj"
    A, B = (held[f"base_model.model.{module}.lora_{each}.weight"].double() for each in "AB")
    found = json.loads(run("inspect", "adapter", "--json")[1])["modules"][module]["norm"]
    assert found == pytest.approx(float((2.0 * B @ A).norm()), rel=1e-12)


def test_errors_are_one_line_a_reason_and_a_hint(here: Path, run: Any) -> None:
    edit_json(here / "adapter" / "adapter_config.json", lora_alpha=None)
    code, out, err = run("merge", "base", "adapter", "-o", "out")
    assert (code, out) == (1, "")
    assert err == "AdapterConfigError: adapter/adapter_config.json: lora_alpha must be a finite number, not null\n"
    code, out, err = run("merge", "base", "adapter", "-o", "out", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["error"]["type"] == "AdapterConfigError"
    assert sorted(os.listdir(here)) == ["adapter", "base"]


GOOD = {
    "merge": ["merge", "base", "adapter", "-o", "out"],
    "plan": ["plan", "base", "adapter"],
    "verify": ["verify", "base", "--base", "base", "--adapter", "adapter"],
    "inspect": ["inspect", "adapter"],
}

TYPOS: list[tuple[list[str], int, list[str]]] = [
    (["mrege", "base", "adapter", "-o", "out"], 2, ["No such command 'mrege'", "merge"]),
    (["merge", "bsae", "adapter", "-o", "out"], 1, ["bsae: no such folder", "did you mean base?"]),
    (["merge", "base", "adpater", "-o", "out"], 1, ["adpater does not exist", "did you mean adapter?"]),
    (["merge", "adapter", "base", "-o", "out"], 1, ["adapter is an adapter, not a base checkpoint", "base model first"]),
    (["merge", "base", "base", "-o", "out"], 1, ["base holds no adapter_config.json; it looks like a base model"]),
    (["merge", "base", "adapter", "-o", "no/out"], 1, ["there is no folder", "mkdir -p"]),
    (["merge", "base", "adapter", "-o", "base"], 1, ["cannot be the output: it is the input base"]),
    (["merge", "base", "adapter"], 2, ["Missing option", "--out"]),
    (["merge", "base", "-o", "out"], 2, ["Missing argument", "ADAPTER"]),
    (["merge", "base", "adapter@", "-o", "out"], 2, ["after @ comes the adapter's weight"]),
    (["merge", "base", "adapter@0,7", "-o", "out"], 2, ["'adapter@0,7': after @ comes the adapter's weight", "such as 0.7"]),
    (["merge", "base", "adapter@nan", "-o", "out"], 2, ["a finite number"]),
    (["merge", "base", "adapter@1e999", "-o", "out"], 2, ["a finite number"]),
    (["merge", "base", "@0.5", "-o", "out"], 2, ["after @ comes"]),
    (["merge", "base", "adapter", "-o", "out", "--dtype", "bf16"], 2, ["'bf16' is not one of", "bfloat16"]),
    (["merge", "base", "adapter", "-o", "out", "--dtyp", "float32"], 2, ["No such option", "--dtype"]),
    (["merge", "base", "adapter", "-o", "out", "--precision", "exakt"], 2, ["'exakt' is not one of", "exact"]),
    (["merge", "base", "adapter", "-o", "out", "--rounding", "neerest"], 2, ["'neerest' is not one of", "nearest"]),
    (["merge", "base", "adapter", "-o", "out", "--seed", "x"], 2, ["Invalid value for '--seed'", "valid integer"]),
    (
        ["merge", "base", "adapter", "-o", "out", "--max-shard-size", "5 apples"],
        2,
        ["--max-shard-size", "'5 apples'", "a size such as 500MB"],
    ),
    (["merge", "base", "adapter", "-o", "out", "--max-shard-size", "0GB"], 2, ["must be a size"]),
    (["merge", "base", "adapter", "-o", "out", "--overwrit"], 2, ["No such option", "--overwrite"]),
    (["merge", "base", "adapter", "-o", "out", "--allow", "merge-agian"], 2, ["'merge-agian' is not one of", "merge-again"]),
    (["plan", "base", "adapter", "--al"], 2, ["No such option", "--all"]),
    (["verify", "otu", "--base", "base", "--adapter", "adapter"], 1, ["otu: no such folder"]),
    (["verify", "base", "--base", "base", "--adapter", "adapter"], 3, ["base has no lorafold.json"]),
    (["verify", "out", "--bse", "base", "--adapter", "adapter"], 2, ["No such option", "--base"]),
    (["verify", "out", "--base", "base"], 2, ["Missing option", "--adapter"]),
    (["verify", "--base", "base", "--adapter", "adapter"], 2, ["Missing argument", "OUT"]),
    (["inspect", "adaptr"], 1, ["adaptr: no such folder", "did you mean adapter?"]),
    (["inspect", "base/config.json"], 1, ["is neither a folder nor a .safetensors file"]),
    (["inspect"], 2, ["Missing argument", "PATH"]),
    ([], 2, ["Usage: lorafold", "merge"]),
]


@pytest.mark.parametrize(("arguments", "code", "parts"), TYPOS, ids=[" ".join(each[0]) or "nothing" for each in TYPOS])
def test_a_typo_in_each_argument(here: Path, run: Any, arguments: list[str], code: int, parts: list[str]) -> None:
    found, out, err = run(*arguments)
    assert found == code
    said = " ".join((out + err).split())
    for part in parts:
        assert part in said, said
    assert "Traceback" not in said
    assert sorted(os.listdir(here)) == ["adapter", "base"]


def test_names_from_files_cannot_drive_the_terminal(here: Path, run: Any) -> None:
    def evil(name: str) -> str:
        return name.replace("q_proj", "q\x1b[31m\rproj")

    edit_tensors(here / "adapter", lambda held: {evil(name): tensor for name, tensor in held.items()})
    edit_json(here / "adapter" / "adapter_config.json", target_modules=None, base_model_name_or_path="\x1b[2J")
    for command in (["plan", "base", "adapter"], ["inspect", "adapter", "--all"], ["inspect", "adapter"]):
        run(*command)  # which looks for control characters
    file = here / "one.safetensors"
    save_file({evil(name): tensor for name, tensor in tensors(here / "base").items()}, file)
    edit_json(here / "adapter" / "adapter_config.json", fan_in_fan_out=False)
    for command in (
        ["plan", "one.safetensors", "adapter", "--all"], ["plan", "one.safetensors", "adapter"],
        ["merge", "one.safetensors", "adapter", "-o", "out"], ["inspect", "out", "--all"], ["inspect", "one.safetensors", "--all"],
    ):  # fmt: skip
        code, out, _ = run(*command)
        assert code == 0
        assert "q\\x1b[31m\\rproj" in out or "merge" in command or "out" in command


def test_a_pipe_gets_whole_names_and_no_control_sequences(here: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "40", "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-m", "lorafold", "plan", "base", "adapter", "--all"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0
    assert not CONTROL.search(done.stdout + done.stderr)
    assert "model.layers.1.v_proj.weight" in done.stdout


def test_no_colour_where_it_is_not_wanted(here: Path) -> None:
    """On a terminal there is colour, and none with NO_COLOR."""
    import pty

    def shown(**variables: str) -> str:
        pid, terminal = pty.fork()
        if pid == 0:
            os.execve(
                sys.executable, [sys.executable, "-m", "lorafold", "merge", "base", "adapter", "-o", "out", "--overwrite"],
                {**os.environ, "TERM": "xterm-256color", **variables},
            )  # fmt: skip
        said = b""
        try:
            while chunk := os.read(terminal, 4096):
                said += chunk
        except OSError:
            pass  # the terminal is gone with the process
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
        return said.decode()

    colour = re.compile(r"\x1b\[(3\d|4\d|9\d|38;)[\d;]*m")
    text = shown(NO_COLOR="1")
    assert "4 merged, 2 copied" in text
    assert not colour.search(text)


@pytest.mark.parametrize(
    "program",
    [
        "import lorafold",
        "from lorafold.cli import main; main(['--help'])",
        "from lorafold.cli import main; main(['merge', '--help'])",
        "from lorafold.cli import main; main(['--version'])",
    ],
)
def test_what_needs_no_torch_does_not_import_it(program: str) -> None:
    check = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules, 'safetensors' in sys.modules)); "
    done = subprocess.run([sys.executable, "-c", check + program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False False\n")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(["--version"], 0, "lorafold"), (["verify", "/nothing"], 1, "no such folder"), (["nonsense"], 2, "No such command")],
)
def test_the_program_ends_at_once_but_says_all(arguments: list[str], code: int, said: str) -> None:
    program = [
        sys.executable,
        "-c",
        "import atexit; atexit.register(print, 'taken down'); import lorafold.__main__ as m; m.command()",
    ]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert "taken down" not in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_what_cannot_be_said_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "lorafold", "--version"], stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 1


def test_everything_that_is_printed_can_be_had_as_json(here: Path, run: Any) -> None:
    """Every command has the flag and prints one JSON value; so do errors of ours and of usage."""
    commands = {
        "merge": ["base", "adapter", "-o", "out"],
        "merge-each": ["base", "adapter", "-o", "each"],
        "plan": ["base", "adapter"],
        "verify": ["out"],
        "unmerge": ["out", "-o", "restored", "--base", "base"],
        "inspect": ["adapter"],
        "convert": ["adapter", "-o", "adapter.pt", "--to", "loralib"],
        "doctor": [],
    }
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == commands.keys()  # type: ignore[union-attr]
    (here / "each").mkdir()
    for name, arguments in commands.items():
        _, out, err = run(name, *arguments, "--json")
        assert isinstance(json.loads(out), list if name == "merge-each" else dict)
        assert err == ""
    report = json.loads(run("unmerge", "out", "-o", "again", "--base", "base", "--json")[1])
    assert report.keys() == {"out", "merged", "base", "undo", "bytes", "seconds"}
    for arguments, code, kind in ((["plan", "bsae", "adapter"], 1, "CheckpointError"), (["plan", "base"], 2, "UsageError")):
        found, out, err = run(*arguments, "--json")
        assert (found, err, json.loads(out)["error"]["type"]) == (code, "", kind)
