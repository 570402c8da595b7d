"""README.md of a merged checkpoint: a model card that says what it was made of, and how to make it again.

A field of its front matter is a hash of the card and the receipt: people may change a card, and `verify` notes that they did.
"""

from __future__ import annotations

import hashlib
import json
import re
from html import escape
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.receipt import RECEIPT_NAME
from ..errors import CheckpointError, printable
from ..files.atomic.durable import write_text
from ..files.regular import read_regular
from ..planning.output_format import AGAIN
from ..planning.plan import MergePlan
from ..version import __version__


def model_card(plan: MergePlan, checkpoint: Checkpoint, command: str | None = None) -> str:
    """The text of the card, with the front matter that model hubs read."""
    base = _model_name(plan, checkpoint)
    head = [f"base_model: {json.dumps(base)}", "base_model_relation: merge"]
    if checkpoint.config is not None and "model_type" in checkpoint.config:
        head.append("library_name: transformers")
    head += base_license(checkpoint.root)
    head += ["tags:", "- lora", "- merged", "- lorafold"]
    lines = [
        "---", *head, "---", "",
        f"# {_title(plan)}", "",
        f"`{_plain(base)}` with {_listed(plan)} folded into its weights by lorafold {__version__}.",
        "Every tensor, its scaling and how it was rounded are in `lorafold.json`.",
    ]  # fmt: skip
    if plan.options.float_format:
        lines += ["", f"The base is quantised, and was decoded. {AGAIN[0].upper()}{AGAIN[1:]}."]
    elif plan.options.quantised_as is not None:
        trained = (
            f"Its linear layers begin from the numbers that training saw, which quantised the base as {plan.options.quantised_as}"
        )
        lines += ["", f"{trained} when it loaded it. {AGAIN[0].upper()}{AGAIN[1:]}."]
    elif any(step.action == "encode" for step in plan.steps):
        how = "at random, without bias" if plan.options.code_rounding == "stochastic" else "to nearest"
        of = "" if plan.original is None else " from the sums with the model in floats"
        lines += ["", f"The base is quantised, and so is this: scales are the base's, and codes were rounded {how}{of}."]
    if command is not None:
        lines += ["", "```sh", _plain(command), "```"]
    return "\n".join(lines) + "\n"


def write_card(folder: Path, text: str, receipt: str = RECEIPT_NAME) -> None:
    """Write the model card `text` of the checkpoint in `folder`, whose `receipt` is there already.

    Raises `OutputError` where it cannot be written.
    """
    rest = text.removeprefix(_START)
    write_text(folder / CARD_NAME, f"{_START}{_seal(rest.encode('utf-8', 'replace'), folder / receipt)}\n{rest}")


def card_note(folder: Path, receipt: str = RECEIPT_NAME) -> str | None:
    """What has become of the model card of the checkpoint in `folder`, in words; None where it is as it was written."""
    try:
        start, seal, rest = [*read_regular(folder / CARD_NAME, 1 << 26, error=CheckpointError).split(b"\n", 2), b"", b""][:3]
        same = (start + b"\n", seal) == (_START.encode(), _seal(rest, folder / receipt).encode())
    except CheckpointError:
        return f"{CARD_NAME} is missing, or cannot be read"
    return None if same else f"{CARD_NAME} is not the model card that was written with it"


CARD_NAME = "README.md"
_START = "---\n"


def _seal(rest: bytes, receipt: Path) -> str:
    """The first field of the front matter: of what follows it, and of the receipt."""
    digest = hashlib.sha256(rest + read_regular(receipt, 1 << 28, error=CheckpointError)).hexdigest()
    return f"lorafold_seal: {digest}"


def base_license(folder: Path) -> list[str]:
    """The lines on the licence in the front matter of the model card in `folder`; none where it says nothing."""
    try:
        text = read_regular(folder / "README.md", 1 << 20, error=CheckpointError).decode("utf-8", "replace")
    except CheckpointError:
        return []
    if not text.startswith("---"):
        return []
    head = (line.partition(":") for line in text[3:].partition("\n---")[0].splitlines())
    return [f"{field}: {printable(value.strip())}" for field, _, value in head if field in _LICENCE and value.strip()]


_LICENCE = ("license", "license_name", "license_link")


def _model_name(plan: MergePlan, checkpoint: Checkpoint) -> str:
    """What the base is called: on a hub, as its place, its configuration or an adapter says; else by its folder."""
    stated = (checkpoint.config or {}).get("_name_or_path")
    names = [checkpoint.name, stated, *(adapter.base_model for adapter in plan.adapters)]
    return next((name for name in names if isinstance(name, str) and _HUB_NAME.fullmatch(name)), checkpoint.name)


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""An owner and a repository: what a model hub can link to, and not the path of a folder such as ``./model`` or ``../model``."""


def _title(plan: MergePlan) -> str:
    return escape(" + ".join(_plain(adapter.name) for adapter in plan.adapters), quote=False) + ", merged"


def _listed(plan: MergePlan) -> str:
    return " and ".join(
        f"the adapter `{_plain(adapter.name)}`" + (f" at weight {adapter.adapter_weight:g}" if adapter.adapter_weight != 1 else "")
        for adapter in plan.adapters
    )


def _plain(text: str) -> str:
    return printable(text).replace("`", "'")
