"""Several outputs of one base in one go: the bytes that merging one by one writes, the base read once, all or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorafold
from lorafold.cli.main import main
from lorafold.engine.sources import Sources
from lorafold.errors import NonFiniteError, OutputExistsError, PlanError, UnmatchedAdapterError
from models import llama, save_adapter, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(llama(), tmp_path_factory.mktemp("each") / "base")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three that touch different modules, one of them an end of the vocabulary."""
    folder = tmp_path_factory.mktemp("adapters")
    targets = {"one": ["q_proj", "down_proj"], "two": ["q_proj", "v_proj"], "three": ["embed_tokens", "q_proj"]}
    return [save_adapter(llama(), folder / name, seed=i, target_modules=each) for i, (name, each) in enumerate(targets.items())]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "README.md"}


@pytest.mark.parametrize(
    "options", [{"threads": 1}, {"verify": False}, {"dtype": "F32", "rounding": "stochastic", "max_shard_size": 9000}]
)
def test_the_files_are_those_of_merging_one_by_one(tmp_path: Path, base: Path, adapters: list[Path], options: Any) -> None:
    reports = lorafold.merge_each(base, [adapters[0], (adapters[1], 0.5), adapters[2]], tmp_path, **options)
    assert [Path(report.out).name for report in reports] == ["one", "two", "three"]
    for report, adapter, weight in zip(reports, adapters, (1.0, 0.5, 1.0), strict=True):
        alone = lorafold.merge(base, [(adapter, weight)], tmp_path / "alone", overwrite=True, **options)
        assert files(tmp_path / adapter.name) == files(tmp_path / "alone")
        assert report.kept == alone.kept
        assert (report.proof is None) is ("verify" in options)
        assert lorafold.verify(tmp_path / adapter.name, base, [(adapter, weight)]).failures == ()


def test_a_block_of_the_base_is_read_once_for_all(
    tmp_path: Path, base: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int]] = []
    real = Sources.start

    def counting(self: Sources, block: Any, buffers: Any) -> Any:
        read.append((block.step.source, block.start))
        return real(self, block, buffers)

    monkeypatch.setattr(Sources, "start", counting)
    lorafold.merge_each(base, adapters[:2], tmp_path, verify=False)
    assert len(read) == len(set(read))
    assert any("q_proj" in name for name, _ in read)


def test_none_appears_where_one_cannot(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    deeper = save_adapter(llama(layers=3), tmp_path / "deeper", target_modules=["q_proj"])
    outs = tmp_path / "outs"
    outs.mkdir()
    with pytest.raises(UnmatchedAdapterError):
        lorafold.merge_each(base, [adapters[0], deeper], outs)
    assert list(outs.iterdir()) == []
    (outs / "two").mkdir()
    (outs / "two" / "file").touch()
    with pytest.raises(OutputExistsError):
        lorafold.merge_each(base, adapters, outs)
    assert [path.name for path in outs.iterdir()] == ["two"]


def test_none_appears_where_an_output_overflows(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    with pytest.raises(NonFiniteError):
        lorafold.merge_each(base, [adapters[0], (adapters[1], 1e9)], tmp_path, dtype="F16")
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_names_must_differ_and_the_folder_be_there(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    other = save_adapter(llama(), tmp_path / "elsewhere" / "one", seed=9, target_modules=["q_proj"])
    with pytest.raises(PlanError, match="called one"):
        lorafold.merge_each(base, [adapters[0], other], tmp_path)
    with pytest.raises(PlanError, match="not a folder"):
        lorafold.merge_each(base, adapters, tmp_path / "nowhere")
    with pytest.raises(PlanError, match="no adapter"):
        lorafold.merge_each(base, [], tmp_path)


def code(command: list[str]) -> Any:
    with pytest.raises(SystemExit) as left:
        main(command)
    return left.value.code


def test_on_the_command_line(tmp_path: Path, base: Path, adapters: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge-each", str(base), *map(str, adapters[:2]), "-o", str(tmp_path), "--json"]
    assert code(command) == 0
    assert [Path(report["out"]).name for report in json.loads(capsys.readouterr().out)] == ["one", "two"]
    assert code([*command, "--overwrite", "--undo", str(tmp_path / "undo")]) == 1
    assert "an undo file is of one output" in "".join(capsys.readouterr())
