"""Which adapters of image and video models merge into which bases: families × layouts of adapters × layouts of bases.

    python benchmarks/image_matrix.py                       # all of it, some minutes
    python benchmarks/image_matrix.py --family FLUX.1 Wan   # some families

Each family is a tiny model of diffusers with random weights. Its base is diffusers' folder, one file in diffusers' names, and files
in its makers' names under each prefix that they are met with. An adapter is written in each layout and merged into each base.

- merged: every weight has the bits of the oracle. For an adapter in diffusers' names that is W + ΔW in float64, rounded once; for
  one in the makers' names it is that of the makers' weights, which diffusers' own converter of checkpoints then brings to its
  names. A base in the makers' names is compared after that conversion too, so that lorafold's table does not judge itself.
- refused: an error, and nothing written; wrong: any other bits
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from diffusion import quietly
from lorafold import ReadOptions
from lorafold.errors import LorafoldError
from makers import CASES, converted, makers_of

Named = dict[str, Tensor]
Updates = Mapping[str, tuple[Tensor, Tensor]]
"""lora_A and lora_B by module: whole numbers, so that all products are exact."""


@dataclass(frozen=True)
class Layout:
    """How an adapter is written: in whose names, and what makes its tensors of the updates and ΔW of one pair."""

    name: str
    makers: bool
    write: Callable[[Updates], Named]
    delta: Callable[[Tensor, Tensor], Tensor]
    format: str | None = None


def _product(A: Tensor, B: Tensor) -> Tensor:
    return (B.double().flatten(1) @ A.double().flatten(1)).view(B.shape[0], *A.shape[1:])


def _kohya(prefix: str) -> Callable[[Updates], Named]:
    def write(updates: Updates) -> Named:
        tensors: Named = {}
        for name, (A, B) in updates.items():
            module = f"{prefix}_{name.replace('.', '_')}"
            tensors |= {f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B, f"{module}.alpha": torch.tensor(4.0)}
        return tensors

    return write


def _dotted(prefix: str) -> Callable[[Updates], Named]:
    def write(updates: Updates) -> Named:
        return {
            f"{prefix}{name}.lora_{side}.weight": t for name, pair in updates.items() for side, t in zip("AB", pair, strict=True)
        }

    return write


def _whole(updates: Updates) -> Named:
    return {f"diffusion_model.{name}.diff": _product(A, B).float() for name, (A, B) in updates.items()}


def _loha(updates: Updates) -> Named:
    tensors: Named = {}
    for name, (A, B) in updates.items():
        module = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{module}.hada_w1_a": B.flatten(1), f"{module}.hada_w1_b": A.flatten(1), f"{module}.alpha": torch.tensor(4.0)}
        tensors |= {f"{module}.hada_w2_a": B.flatten(1).abs(), f"{module}.hada_w2_b": A.flatten(1).abs()}
    return tensors


def _squared(A: Tensor, B: Tensor) -> Tensor:
    return 2 * _product(A, B) * _product(A.abs(), B.abs())


def _twice(A: Tensor, B: Tensor) -> Tensor:
    return 2 * _product(A, B)


ADAPTERS = (
    Layout("kohya, diffusers' names", False, _kohya("lora_unet"), _twice),
    Layout("kohya, makers' names", True, _kohya("lora_unet"), _twice),
    Layout("OneTrainer, lora_transformer_", False, _kohya("lora_transformer"), _twice),
    Layout("diffusers, transformer.", False, _dotted("transformer."), _product),
    Layout("ComfyUI, diffusion_model.", True, _dotted("diffusion_model."), _product),
    Layout("no prefix, diffusers' names", False, _dotted(""), _product, "diffusers"),
    Layout("no prefix, makers' names", True, _dotted(""), _product, "diffusers"),
    Layout("PEFT's in one file, makers' names", True, _dotted("base_model.model."), _product, "diffusers"),
    Layout("LyCORIS LoHa, makers' names", True, _loha, _squared),
    Layout("whole differences, makers' names", True, _whole, _product),
)
BASES = ("folder", "file, diffusers' names", "file, makers' names", "model.diffusion_model.", "net.")


@dataclass(frozen=True)
class Cell:
    """One merge, and how it went: ``"merged"``, ``"refused"`` or ``"wrong"``; `words`: the error, or what is wrong."""

    family: str
    adapter: str
    base: str
    outcome: str
    words: str = ""


def cells(family: str, place: Path, bases: Collection[str] = BASES) -> Iterator[Cell]:
    """All merges of one family into `bases`, in the empty folder `place`."""
    case = CASES[family]
    model = case.make()
    held: Named = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    makers = {name: tensor.contiguous() for name, tensor in makers_of(family, held).items()}

    def back(tensors: Named) -> Named:
        return dict(converted(case, tensors, dict(model.config)))

    quietly(lambda: model.save_pretrained(place / "folder"))
    files = {"folder": (place / "folder", "", False)}
    for i, (base, prefix) in enumerate(zip(BASES[1:], ("", "", "model.diffusion_model.", "net."), strict=True)):
        tensors = held if i == 0 else makers
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, place / f"{i}.safetensors")
        files[base] = (place / f"{i}.safetensors", prefix, i > 0)
    for number, layout in enumerate(ADAPTERS):
        names = makers if layout.makers else held
        updates = _updates(names)
        adapter = place / f"adapter{number}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in layout.write(updates).items()}, adapter)
        wanted = _added(names, updates, layout)
        for base in bases:
            path, prefix, theirs = files[base]
            try:
                lorafold.merge(path, [adapter], place / "out", overwrite=True, read_options=ReadOptions(format=layout.format))
            except LorafoldError as error:
                yield Cell(family, layout.name, base, "refused", str(error).splitlines()[0])
                continue
            found: Named = {}
            for file in (place / "out").glob("*.safetensors"):
                found |= {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
            one, other = (back(found) if theirs else found), (back(wanted) if layout.makers else wanted)
            bad = [name for name in other if name not in one or not torch.equal(one[name], other[name])]
            yield Cell(family, layout.name, base, "wrong" if bad or len(one) != len(other) else "merged", ", ".join(bad[:3]))


def _updates(tensors: Named) -> Updates:
    """For every linear layer and convolution of rank 2 numbers from -2 to 2."""
    torch.manual_seed(1)
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dim() > 1:
            A = torch.randint(-2, 3, (2, *tensor.shape[1:])).float()
            found[name.removesuffix(".weight")] = (A, torch.randint(-2, 3, (tensor.shape[0], 2, *(1 for _ in A.shape[2:]))).float())
    return found


def _added(tensors: Named, updates: Updates, layout: Layout) -> Named:
    merged = dict(tensors)
    for name, (A, B) in updates.items():
        merged[f"{name}.weight"] = (tensors[f"{name}.weight"].double() + layout.delta(A, B)).float()
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", type=Path, help="write every cell there")
    options = parser.parse_args()
    found: list[Cell] = []
    for family in options.family:
        with tempfile.TemporaryDirectory() as place:
            found += cells(family, Path(place))
        print(f"{family}: {dict(Counter(cell.outcome for cell in found if cell.family == family))}", file=sys.stderr)
    _print(found)
    if options.json:
        options.json.write_text(json.dumps([vars(cell) for cell in found], indent=1))
    sys.exit(any(cell.outcome == "wrong" for cell in found))


def _print(found: list[Cell]) -> None:
    """A table of how many families merged, by layouts; then what was refused or wrong, each kind once."""
    families = len({cell.family for cell in found})
    print(f"| families that merge, of {families} | " + " | ".join(BASES) + " |")
    print("|---" * (len(BASES) + 1) + "|")
    for layout in ADAPTERS:
        counts: list[Any] = []
        for base in BASES:
            outcomes = Counter(cell.outcome for cell in found if (cell.adapter, cell.base) == (layout.name, base))
            rest = ", ".join(f"{outcomes[each]} {each}" for each in ("refused", "wrong") if outcomes[each])
            counts.append(f"{outcomes['merged']}{f' ({rest})' if rest else ''}")
        print(f"| {layout.name} | " + " | ".join(counts) + " |")
    totals = Counter(cell.outcome for cell in found)
    print(f"\n{len(found)} pairs: {totals['merged']} merged, {totals['refused']} refused, {totals['wrong']} wrong")
    for cell in found:
        if cell.outcome != "merged":
            print(f"- {cell.family}, {cell.adapter}, {cell.base}: {cell.outcome}: {cell.words}")


if __name__ == "__main__":
    main()
