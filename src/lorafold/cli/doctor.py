"""``lorafold doctor``: what this installation is, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import typer

from ..version import __version__


def doctor(*, as_json: bool) -> None:
    """Print what was found; exit code 1 where something is wrong."""
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found["versions"].items():
            print(f"{name:<12} {value if value is not None else 'not installed'}")
        print(f"{'devices':<12} {', '.join(found['devices'])}")
        compiled = f"compiled, {found['kernel']}" if found["kernel"] else "torch; a compiled one makes exact some ten times as fast"
        print(f"{'kernel':<12} {compiled}")
        for problem in found["problems"]:
            print(f"\nproblem: {problem['what']}\n\nhint: {problem['remedy']}")
        if not found["problems"]:
            print("\nno problems")
    if found["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Versions, devices, the compiled kernel in use, and problems, each with its remedy."""
    import torch

    from ..kernel.cpu.loader import build as kernel_build

    versions: dict[str, str | None] = {"lorafold": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in ("torch", "safetensors", "typer", "rich", "transformers", "peft")}
    devices = [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    build = kernel_build()
    return {"versions": versions, "devices": devices, "kernel": build.name if build else None, "problems": _problems()}


def _problems() -> list[dict[str, str]]:
    problems = []
    if (other := _version("loralib")) is not None:
        problems.append(
            {
                "what": f"the distribution loralib {other} is installed too, and owns the same import name",
                "remedy": "pip uninstall loralib, then pip install --force-reinstall --no-deps lorafold",
            }
        )
    else:
        problems += _foreign_loralib()
    return problems


def _foreign_loralib() -> list[dict[str, str]]:
    import loralib

    from ..nn import layers

    if getattr(loralib, "Linear", None) is layers.Linear:
        return []
    return [
        {
            "what": f"import loralib finds {loralib.__file__}, which is not lorafold's",
            "remedy": "remove that file or folder, or its place in the module search path",
        }
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
