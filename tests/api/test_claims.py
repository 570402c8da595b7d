"""`verify` notices what it claims to: every field of a receipt and every file of an output, changed, removed, added, in each mode.

The oracle is the table in `lorafold.engine.claims`: what "fails" there must be a failure, what is "noted" a note. Each test prints
how many changes it made and how many of them were missed (``LORAFOLD_CLAIMS=all pytest -s``; without, a part of the fields).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import lorafold
from diffusion import CLIP, UNET, as_kohya, clip, pairs, pipeline, unet, write
from lorafold.cli.main import main
from lorafold.engine import claims
from lorafold.errors import VerificationError
from models import plain_adapter, plain_base

MADE = ("whole", "overlay", "packed", "single", "pipeline")
MODES = ("inputs", "receipt")


@dataclass(frozen=True)
class Output:
    """A merged output, what it was made of, and which files in it have fields that are changed one by one."""

    kind: str
    out: Path
    base: Path
    adapter: Path
    receipts: tuple[str, ...] = ("lorafold.json",)

    def found(self, mode: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The failures and the notes of a verification, whether it returns them or cannot read the output at all."""
        try:
            proof = lorafold.verify(self.out) if mode == "receipt" else lorafold.verify(self.out, self.base, [self.adapter])
        except VerificationError as error:
            return (error.message,), ()
        return proof.failures, proof.notes


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Output]:
    folder = tmp_path_factory.mktemp("claims")
    base, adapter = plain_base(folder / "base"), plain_adapter(folder / "adapter")
    (base / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "generation_config.json", "additional_chat_templates/tool.jinja"):
        (base / name).write_text('{"a": 1}\n')
    file = base / "model-00001-of-00002.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "config": "{}"})
    alone = folder / "alone" / "ltx.safetensors"
    alone.parent.mkdir()
    held = {name: tensor for each in sorted(base.glob("*.safetensors")) for name, tensor in load_file(each).items()}
    save_file(held, alone, metadata={"format": "pt", "config": "{}"})
    made = {
        "whole": Output("whole", folder / "whole", base, adapter),
        "overlay": Output("overlay", folder / "overlay", base, adapter),
        "packed": Output("packed", folder / "packed", base, adapter),
        "single": Output("single", folder / "single", alone, adapter),
    }
    lorafold.merge(base, [adapter], made["whole"].out, hash_tensors=True)
    lorafold.merge(base, [adapter], made["overlay"].out, only_changed=True)
    lorafold.merge(base, [adapter], made["packed"].out, max_shard_size=200, dtype="F32", rounding="stochastic", verify=True)
    lorafold.merge(alone, [adapter], made["single"].out)
    parts = as_kohya({"lora_unet": pairs(unet(), UNET, seed=1), "lora_te1": pairs(clip(), CLIP, seed=2)}, alpha=3.0)
    image, lora = pipeline(folder / "image"), write(folder / "one.safetensors", parts)
    lorafold.merge(image, [lora], folder / "pipeline")
    receipts = ("lorafold-pipeline.json", "unet/lorafold.json", "text_encoder/lorafold.json")
    made["pipeline"] = Output("pipeline", folder / "pipeline", image, lora, receipts)
    for each in made.values():
        for mode in MODES:
            assert each.found(mode) == ((), ()), (each.kind, mode)
    return made


@pytest.fixture(params=[f"{kind}-{mode}" for kind in MADE for mode in MODES])
def one(request: pytest.FixtureRequest, outputs: dict[str, Output]) -> tuple[Output, str]:
    kind, _, mode = request.param.partition("-")
    return outputs[kind], mode


def told(what: str, output: Output, mode: str, missed: list[str], count: int) -> None:
    print(f"{what} of {output.kind} by {mode}: {len(missed)} of {count} missed")
    assert missed == []
    assert count
    assert output.found(mode) == ((), ())  # all was put back


def edited(value: Any) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """Every change of one field of `value`, in words, with what makes it and what takes it back."""
    places = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, old in places:
        others: list[Any] = [None, [], {}, "x", 7] if not isinstance(old, dict | list) else [None, type(old)()]
        others += [not old] if isinstance(old, bool) else [old + 1, old + 0.25, -old] if isinstance(old, int | float) else []
        others += [old + " ", old[:-1], old.swapcase()] if isinstance(old, str) else []
        for new in others:
            if json.dumps(new) != json.dumps(old):
                yield (
                    f"{key} is {new!r}",
                    lambda k=key, n=new: value.__setitem__(k, n),
                    lambda k=key, o=old: value.__setitem__(k, o),
                )
        if isinstance(old, dict | list) and old:
            for what, change, back in edited(old):
                yield f"{key}.{what}", change, back
    if isinstance(value, dict):
        yield "more", lambda: value.update(more=1), lambda: value.pop("more")
        for key, _ in places:
            order = dict(value)

            def restore(whole: dict[Any, Any] = order) -> None:
                value.clear()
                value.update(whole)

            yield f"{key} gone", lambda k=key: value.pop(k), restore
    else:
        whole = list(value)

        def restored() -> None:
            value[:] = whole

        if value:
            yield "one more", lambda: value.append(copy.deepcopy(value[0])), restored
            yield "one less", value.pop, restored
        if len(value) > 1 and value != value[::-1]:
            yield "turned", value.reverse, restored


def changes(output: Output, mode: str, name: str, *, every: int, resealed: bool = False) -> Iterator[tuple[str, bool]]:
    """Every `every`th change of a field of the receipt `name`, and whether it was noticed."""
    file = output.out / name
    text = file.read_bytes()
    value = json.loads(text)
    for number, (what, change, back) in enumerate(edited(value)):
        if number % every:
            continue
        change()
        new = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        if resealed and isinstance(value.get("sha256"), str):
            new = json.dumps({**value, "sha256": "0" * 64}, indent=2, ensure_ascii=False) + "\n"
            new = reseal(new)
        file.write_text(new)
        try:
            yield f"{name}: {what}", bool(output.found(mode)[0])
        finally:
            back()
            file.write_bytes(text)


def reseal(text: str) -> str:
    """`text`, in which the hash is zeros, with the right one: what someone does who means to deceive."""
    before, _, after = text.rpartition("0" * 64)
    return before + hashlib.sha256(text.encode()).hexdigest() + after


def test_every_field_of_the_receipts(one: tuple[Output, str]) -> None:
    output, mode = one
    every = (
        1
        if os.environ.get("LORAFOLD_CLAIMS") == "all"
        else 59
        if output.kind == "pipeline"
        else 1
        if (output.kind, mode) == ("whole", "receipt")
        else 7
    )
    found = [each for name in output.receipts for each in changes(output, mode, name, every=every)]
    told("fields", output, mode, [what for what, noticed in found if not noticed], len(found))


SAME_BITS = ("version", "base.name", "adapters.0.name", "precision is", "seed is", "on_overflow", "allow_nonfinite_base", "kept is")
"""What `claims.REWRITTEN` speaks of: it cannot be computed anew, and nothing but the hash in the receipt tells of a change."""


@pytest.mark.parametrize("kind", ["whole", "overlay", "single"])
def test_fields_of_a_receipt_whose_hash_was_made_to_match(outputs: dict[str, Output], kind: str) -> None:
    output = outputs[kind]
    found = list(changes(output, "inputs", "lorafold.json", every=4, resealed=True))
    found = [(what.partition(": ")[2], noticed) for what, noticed in found if not what.startswith("lorafold.json: sha256")]
    assert len(claims.REWRITTEN) == 3
    rest = [what for what, noticed in found if not noticed]
    rest = [what for what in rest if not what.startswith(SAME_BITS) and ".kept is" not in what and not what.endswith(" gone")]
    told("rewritten fields", output, "inputs", rest, len(found))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def in_other_bytes(data: bytes) -> Iterator[tuple[str, bytes | None]]:
    middle = len(data) // 2
    yield "removed", None
    yield "empty", b""
    yield "a space more", data + b" "
    yield "a line end less", data[:-1]
    for place in (0, middle, len(data) - 1):
        yield f"byte {place} changed", data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    yield "a space in it", data.replace(b": ", b":  ", 1).replace(b"\n", b" \n", 1)


def test_every_file(one: tuple[Output, str]) -> None:
    output, mode = one
    missed, count = [], 0
    for name in files(output.out):
        data = (output.out / name).read_bytes()
        for what, new in in_other_bytes(data):
            if new == data:
                continue
            (output.out / name).unlink()
            if new is not None:
                (output.out / name).write_bytes(new)
            failures, notes = output.found(mode)
            noticed = any("README.md" in note for note in notes) and not failures if name == "README.md" else bool(failures)
            count += 1
            missed += [] if noticed else [f"{name}: {what}"]
            (output.out / name).write_bytes(data)
    told("files", output, mode, missed, count)


READ = (
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.model", "added_tokens.json", "chat_template.jinja", "vocab.txt",
    "chat_templates/x.jinja", "extra.safetensors", "model.safetensors", "pytorch_model.bin", "model.gguf", "modeling_x.py",
    "special_tokens_map.json", "x.safetensors.index.json", "2_Dense/model.safetensors", "LICENSE", "merges.txt", "anything",
)  # fmt: skip
OF_PEOPLE = (
    "notes.txt",
    "images/picture.png",
    "CHANGES.md",
    ".gitattributes",
    ".cache/huggingface/x.lock",
    ".git/config",
    "paper.pdf",
)


def test_added_files(one: tuple[Output, str]) -> None:
    output, mode = one
    missed = []
    places = ("", "unet/", "scheduler/") if output.kind == "pipeline" else ("",)
    added = [(place + name, count) for place in places for names, count in ((READ, True), (OF_PEOPLE, False)) for name in names]
    added = [(name, count) for name, count in added if not (output.out / name).exists()]
    for name, counts in added:
        new = [path for path in (output.out / name, *(output.out / name).parents) if not path.exists()]
        (output.out / name).parent.mkdir(parents=True, exist_ok=True)
        (output.out / name).write_bytes(b"{}")
        failures, notes = output.found(mode)
        noticed = bool(failures) if counts else any("is not part" in note for note in notes) and not failures
        missed += [] if noticed else [name]
        new[0].unlink()
        for folder in new[1:]:
            folder.rmdir()
    told("added files", output, mode, missed, len(added))


def test_a_card_of_another_output_is_noted(outputs: dict[str, Output]) -> None:
    one, other = outputs["whole"].out / "README.md", outputs["overlay"].out / "README.md"
    card = one.read_bytes()
    one.write_bytes(other.read_bytes())
    for mode in MODES:
        assert outputs["whole"].found(mode) == ((), ("README.md is not the model card that was written with it",))
    one.write_bytes(card)


def test_without_hashes_base_and_adapters_tell_all_the_same(tmp_path: Path, outputs: dict[str, Output]) -> None:
    whole = outputs["whole"]
    output = Output("unverified", tmp_path / "out", whole.base, whole.adapter)
    lorafold.merge(whole.base, [whole.adapter], output.out, verify=False)
    test_every_file((output, "inputs"))
    test_added_files((output, "inputs"))


def test_an_output_of_an_earlier_version_is_told_from_a_damaged_one(tmp_path: Path, outputs: dict[str, Output]) -> None:
    """Its receipt has no hash of itself: it is read, and verified but for that."""
    whole = outputs["whole"]
    out = Path(shutil.copytree(whole.out, tmp_path / "out"))
    receipt = json.loads((out / "lorafold.json").read_text())
    del receipt["sha256"]
    (out / "lorafold.json").write_text(json.dumps(receipt, indent=2) + "\n")
    for proof in (lorafold.verify(out), lorafold.verify(out, whole.base, [whole.adapter])):
        (failure,) = proof.failures
        assert failure == "lorafold.json: it has no hash of itself at its end: it was changed, or written by an earlier version"
    lorafold.unmerge(out, tmp_path / "restored", base=whole.base)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_covered_is_said(outputs: dict[str, Output], mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    for output in outputs.values():
        command = ["verify", str(output.out)]
        command += ["--base", str(output.base), "--adapter", str(output.adapter)] if mode == "inputs" else []
        card = (output.out / "README.md").read_bytes()
        (output.out / "README.md").write_text("mine")
        for more in ([], ["--json"]):
            with pytest.raises(SystemExit) as left:
                main([*command, *more])
            assert left.value.code == 0
            said = capsys.readouterr().out
            wanted = claims.not_covered(by_receipt=mode == "receipt", only_changed=output.kind == "overlay")
            if more:
                assert json.loads(said)["not_covered"] == list(wanted)
                assert json.loads(said)["notes"] == ["README.md is not the model card that was written with it"]
            else:
                assert all(f"  not held  {what}\n" in said for what in wanted)
                assert "  note      README.md is not the model card that was written with it\n" in said
        (output.out / "README.md").write_bytes(card)
