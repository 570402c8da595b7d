"""`adapter_config.json`, read strictly: every field that can change the merged weights is honoured or refused by name.

Facts about the fields are PEFT's (`tuners/lora/config.py`); which tensors they lead to is told in `peft`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from ....errors import AdapterConfigError, UnsupportedAdapterError, printable
from ....files import strictjson
from ....kernel.update import scaling_factor
from ...adapter import Residual, ResidualKind, Scaling
from .patterns import PatternError, PatternLookup, UnmatchablePatternError, checked
from .unsupported import FIELDS, INIT_HINT, INITS, PEFT_TYPES, UNKNOWN_TYPE

T = TypeVar("T")

CONFIG_NAME = "adapter_config.json"

_HONOURED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "lora_bias",
    "fan_in_fan_out", "modules_to_save", "ensure_weight_tying", "target_modules", "trainable_token_indices",
    "base_model_name_or_path", "init_lora_weights", "peft_version", "target_parameters", "layer_replication", "use_qalora",
    "qalora_group_size", "use_bdlora", "kasa_config", "velora_config", "monteclora_config",
}  # fmt: skip

_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "revision", "inference_mode", "exclude_modules", "lora_dropout", "layers_to_transform",
    "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
"""Fields that say how an adapter was trained; its tensors hold the outcome."""

_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "velora", "monteclora"}
"""`init_lora_weights` that leave the base weight alone."""

_RESIDUAL_INITS: Mapping[str, Literal["pissa", "olora"]] = {"pissa": "pissa", "olora": "olora"}
"""Those that take out of it what can be computed again."""


@dataclass(frozen=True)
class Blocks:
    """BD-LoRA: factors that are block-diagonal, of `count` blocks; which one, by what a module's name contains."""

    count: int
    in_A: tuple[str, ...]
    in_B: tuple[str, ...]


@dataclass(frozen=True)
class PeftConfig:
    """The fields of an `adapter_config.json` that a merge needs; `fields` holds all of them as read."""

    path: Path
    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    token_indices: Mapping[str, tuple[int, ...]]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    bias: str
    lora_bias: bool
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool
    target_modules: tuple[str, ...] | str
    target_parameters: tuple[str, ...]
    init: ResidualKind | None
    blocks: Blocks | None
    qalora_group: int | None
    layer_replication: tuple[tuple[int, int], ...]
    peft_version: str | None
    base_model: str | None
    fields: Mapping[str, Any]
    notes: tuple[str, ...]

    def scaling(self, module: str, r: int) -> Scaling:
        """The factor for `module`, whose tensors have rank `r`.

        Raises `AdapterConfigError` where the configuration says another rank.
        """
        rank_key, configured = self._match("rank_pattern", self.rank_pattern, module)
        configured = self.r if configured is None else configured
        if configured != r:
            source = f"rank_pattern '{printable(rank_key)}'" if rank_key is not None else "r"
            raise AdapterConfigError(
                f"{printable(str(self.path))}: {source} says rank {configured} for {printable(module)},"
                f" but its lora_A and lora_B have rank {r}",
                hint="the configuration and the tensors are not of one training run",
            )
        alpha_key, lora_alpha = self._match("alpha_pattern", self.alpha_pattern, module)
        lora_alpha = self.lora_alpha if lora_alpha is None else lora_alpha
        why = f"lora_alpha {lora_alpha:g}{_from(alpha_key, 'alpha_pattern')} / {'√' if self.use_rslora else ''}r {r}"
        why += _from(rank_key, "rank_pattern") + (", rsLoRA" if self.use_rslora else "")
        return Scaling(scaling_factor(r, lora_alpha, self.use_rslora), r, float(lora_alpha), why)

    def rank(self, module: str) -> int:
        """The rank that is configured for `module`."""
        configured = self._match("rank_pattern", self.rank_pattern, module)[1]
        return self.r if configured is None else configured

    def residual(self, scaling: Scaling) -> Residual | None:
        """What the base weight lost to the adapter before it was trained, for a module of this `scaling`."""
        return None if self.init is None else Residual(self.init, scaling.r, scaling.value if self.init == "olora" else 1.0)

    def _match(self, field: str, patterns: Mapping[str, T], module: str) -> tuple[str | None, T | None]:
        """The first pattern, in the file's order, that matches the end of `module`, as PEFT's `get_pattern_key` decides."""
        return next(((key, patterns[key]) for key in self._fits(field, module)), (None, None))

    @cached_property
    def _lookups(self) -> Mapping[str, PatternLookup]:
        return {"rank_pattern": PatternLookup(self.rank_pattern), "alpha_pattern": PatternLookup(self.alpha_pattern)}

    def _fits(self, field: str, module: str) -> Iterator[str]:
        try:
            yield from self._lookups[field].fits(module)
        except UnmatchablePatternError as cause:
            raise AdapterConfigError(
                f"{printable(str(self.path))}: {field}: the pattern {_shown(cause.pattern)} cannot be matched with"
                f" {printable(module)}: {printable(str(cause))}"
            ) from None

    def overlaps(self, modules: Collection[str]) -> list[str]:
        """Where several patterns fit one of `modules` and say different numbers: which one counts, in words.

        The first in the file's order does, and PEFT sorts them when it saves, so that the order in training may have been another.
        """
        notes = []
        for field, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for module in modules:
                fit = list(self._fits(field, module))
                if len({patterns[key] for key in fit}) > 1:
                    first, *others = (f"'{printable(key)}'" for key in fit)
                    notes.append(
                        f"{field}: {first}, first in the file, counts for {printable(module)} and others;"
                        f" {', '.join(others)} fit it too"
                    )
                    break
        return notes


def read_config(path: Path, *, initial_known: bool = False) -> PeftConfig:
    """The configuration in the file at `path`; `initial_known` where the adapter as it was before training is at hand.

    Raises `AdapterConfigError` where it is not JSON or a field has a value that it cannot have, `UnsupportedAdapterError` where
    it asks for something that cannot be merged.
    """
    fields = strictjson.load(path, error=AdapterConfigError)
    if not isinstance(fields, dict):
        raise AdapterConfigError(f"{printable(str(path))} must hold an object, not {_kind(fields)}")
    return config_of(fields, path, initial_known=initial_known)


def config_of(fields: dict[str, Any], path: Path, *, initial_known: bool = False) -> PeftConfig:
    """The configuration that `fields` are; `path` is that of the file which holds them.

    Raises as `read_config` does.
    """
    shown = printable(str(path))
    _refuse(fields, shown)
    field = _Fields(fields, shown)
    lora_alpha = field.number("lora_alpha", 8)
    notes = (
        [f"lora_alpha is {lora_alpha:g}: {'the adapter does nothing' if lora_alpha == 0 else 'the adapter is negated'}"]
        if lora_alpha <= 0
        else []
    )
    known = _HONOURED | _WITHOUT_EFFECT | FIELDS.keys()
    notes += [
        f"the field '{printable(name)}' of {CONFIG_NAME} is not known; it is {_shown(fields[name])}"
        for name in fields
        if name not in known
    ]
    return PeftConfig(
        path=path,
        r=field.rank("r", fields.get("r", 8)),
        lora_alpha=lora_alpha,
        use_rslora=field.boolean("use_rslora"),
        use_dora=field.boolean("use_dora"),
        token_indices=field.token_indices("trainable_token_indices"),
        rank_pattern={key: field.rank(f"rank_pattern '{printable(key)}'", value) for key, value in field.pattern("rank_pattern")},
        alpha_pattern={
            key: field.finite(f"alpha_pattern '{printable(key)}'", value) for key, value in field.pattern("alpha_pattern")
        },
        bias=field.choice("bias", ("none", "all", "lora_only")),
        lora_bias=field.boolean("lora_bias"),
        fan_in_fan_out=field.boolean("fan_in_fan_out"),
        modules_to_save=field.names("modules_to_save"),
        ensure_weight_tying=field.boolean("ensure_weight_tying"),
        target_modules=fields["target_modules"] if isinstance(fields.get("target_modules"), str) else field.names("target_modules"),
        target_parameters=field.names("target_parameters"),
        init=_init(fields, shown, initial_known),
        blocks=_blocks(field),
        qalora_group=field.rank("qalora_group_size", fields.get("qalora_group_size", 16)) if field.boolean("use_qalora") else None,
        layer_replication=field.ranges("layer_replication"),
        peft_version=field.text("peft_version"),
        base_model=field.text("base_model_name_or_path"),
        fields=fields,
        notes=tuple(notes),
    )


def _refuse(fields: dict[str, Any], shown: str) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        why = PEFT_TYPES.get(kind, UNKNOWN_TYPE) if isinstance(kind, str) else "is missing or no text"
        raise UnsupportedAdapterError(
            f"{shown}: peft_type is {_shown(kind)}, expected 'LORA': {printable(kind) if isinstance(kind, str) else 'it'} {why}",
            hint="other kinds of adapter than LoRA cannot be merged here; nothing was written",
        )
    for name, reason in FIELDS.items():
        if fields.get(name):
            raise UnsupportedAdapterError(f"{shown}: {name} is not supported: {reason}", hint="nothing was written")
    for name, value in fields.items():
        if name not in _HONOURED | _WITHOUT_EFFECT and name not in FIELDS and value:
            raise UnsupportedAdapterError(
                f"{shown}: the field '{printable(name)}' is not known, and is {_shown(value)}; it may change the merged weights",
                hint="remove it from the file if you are sure that it does not",
            )


def _init(fields: dict[str, Any], shown: str, known: bool) -> ResidualKind | None:
    """What is done to the base weight before training; None where it stays as it is."""
    init, kasa = fields.get("init_lora_weights", True), fields.get("kasa_config")
    if kasa is not None and not isinstance(kasa, dict):
        raise AdapterConfigError(f"{shown}: kasa_config must be an object, not {_shown(kasa)}")
    if isinstance(init, bool) or init is None or (isinstance(init, str) and init.lower() in _PLAIN_INITS):
        return None if kasa is None else "kasa"
    found = _RESIDUAL_INITS.get(init.lower()) if isinstance(init, str) else None
    why = next((why for name, why in INITS.items() if isinstance(init, str) and init.lower().startswith(name)), None)
    if known and kasa is None and (found is not None or (why is not None and str(init).lower() != "loftq")):
        return "given"
    if found is not None and kasa is None:
        return found
    if found is not None:
        raise UnsupportedAdapterError(
            f"{shown}: kasa_config beside init_lora_weights {_shown(init)} is not supported: both change the base weight",
            hint="nothing was written",
        )
    raise UnsupportedAdapterError(
        f"{shown}: init_lora_weights {_shown(init)} is not supported: {why or 'it may change the base weight before training'}",
        hint=INIT_HINT,
    )


def _blocks(field: _Fields) -> Blocks | None:
    value = field.fields.get("use_bdlora")
    if value is None or value is False:
        return None
    if not isinstance(value, dict):
        raise field.fail("use_bdlora", "an object", value)
    inner = _Fields(value, f"{field.shown}: use_bdlora")
    count = inner.rank("nblocks", value.get("nblocks", 1))
    return Blocks(count, inner.names("target_modules_bd_a"), inner.names("target_modules_bd_b"))


class _Fields:
    """Fields taken out with their type checked; an error names file, field, expected and found."""

    def __init__(self, fields: dict[str, Any], shown: str) -> None:
        self.fields = fields
        self.shown = shown

    def fail(self, name: str, expected: str, value: Any) -> AdapterConfigError:
        return AdapterConfigError(f"{self.shown}: {name} must be {expected}, not {_shown(value)}")

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or value <= 0:
            raise self.fail(name, "a positive integer", value)
        return value

    def finite(self, name: str, value: Any) -> float:
        try:
            number = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:  # an integer beyond float64
            number = math.inf
        if not math.isfinite(number):
            raise self.fail(name, "a finite number", value)
        return number

    def number(self, name: str, default: float) -> float:
        return self.finite(name, self.fields.get(name, default))

    def token_indices(self, name: str) -> dict[str, tuple[int, ...]]:
        """Rows by the end of a module's name; those of a bare list are for whichever embedding there is: the end is empty."""
        value = self.fields.get(name) or {}
        by_module = {"": value} if isinstance(value, list) else value
        if not isinstance(by_module, dict):
            raise self.fail(name, "a list of rows, or an object of such lists", value)
        for key, rows in by_module.items():
            good = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows) and len(set(rows)) == len(rows)
            if not good:
                raise self.fail(f"{name} '{printable(key)}'" if key else name, "a list of different rows, 0 or more", rows)
        return {key: tuple(rows) for key, rows in by_module.items()}

    def boolean(self, name: str) -> bool:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.fail(name, "true or false", value)
        return bool(value)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.fields.get(name) or choices[0]
        if value not in choices:
            raise self.fail(name, "one of " + ", ".join(choices), value)
        return str(value)

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise self.fail(name, "text", value)
        return value or None

    def names(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.fail(name, "a list of names", value)
        return tuple(value)

    def ranges(self, name: str) -> tuple[tuple[int, int], ...]:
        value = self.fields.get(name) or []
        good = isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair) and 0 <= pair[0] < pair[1]
            for pair in value
        )
        if not good:
            raise self.fail(name, "a list of ranges of layers, [first, one after the last]", value)
        return tuple((first, stop) for first, stop in value)

    def pattern(self, name: str) -> list[tuple[str, Any]]:
        value = self.fields.get(name) or {}
        if not isinstance(value, dict):
            raise self.fail(name, "an object of numbers by pattern", value)
        for key in value:
            try:
                checked(key)
            except PatternError as cause:
                raise self.fail(name, f"an object of patterns ({printable(str(cause))})", key) from None
        return list(value.items())


def _from(key: str | None, pattern: str) -> str:
    return "" if key is None else f" ({pattern} '{printable(key)}')"


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
