"""Fields of an adapter's configuration: each that can change the merged weights is honoured or refused, by name and value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import lorafold
from lorafold.errors import AdapterConfigError, AdapterError, LorafoldError, UnsupportedAdapterError
from models import edit_json, plain_adapter, plain_base, refused

CONFIG = "adapter_config.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return plain_adapter(tmp_path / "adapter")


def raw(field: str, text: str) -> Callable[[Path], None]:
    """Puts `text` in the place of a field's value, whatever JSON says of it."""

    def put(file: Path) -> None:
        fields = json.loads(file.read_text()) | {field: "PLACE"}
        file.write_text(json.dumps(fields).replace('"PLACE"', text))

    return put


def each(field: str, values: list[str], kind: type[LorafoldError], part: str) -> dict[str, tuple[str, type[LorafoldError], str]]:
    return {f"{field} {value[:40]}": (value, kind, part) for value in values}


BAD, UNSUPPORTED = AdapterConfigError, UnsupportedAdapterError
FIELDS: dict[str, tuple[str, type[LorafoldError], str]] = {
    **each("lora_alpha", ["NaN", "Infinity", "-Infinity", "1e400"], BAD, "'lora_alpha' is"),
    **each("lora_alpha", ["true", '"8"', "null", "[8]", "1" + "0" * 399], BAD, "lora_alpha must be a finite number, not"),
    **each("r", ["0", "-2", "2.0", "true", '"2"', "null"], BAD, "r must be a positive integer, not"),
    **each("r", ["4"], BAD, "r says rank 4 for model.layers.0.q_proj, but its lora_A and lora_B have rank 2"),
    **each("rank_pattern", ['{"q_proj": 0}', '{"q_proj": 2.5}'], BAD, "rank_pattern 'q_proj' must be a positive integer"),
    **each("rank_pattern", ['{"(": 2}', "[1]"], BAD, "rank_pattern must be an object"),
    **each("rank_pattern", ['{"q_proj": 3}'], BAD, "rank_pattern 'q_proj' says rank 3 for model.layers.0.q_proj"),
    **each("alpha_pattern", ['{"q_proj": null}', '{"q_proj": true}'], BAD, "alpha_pattern 'q_proj' must be a finite number"),
    **each("alpha_pattern", ['{"*": 2}', '"x"'], BAD, "alpha_pattern must be an object"),
    **each("use_rslora", ["1", '"true"'], BAD, "use_rslora must be true or false, not"),
    **each("lora_bias", ['"yes"'], BAD, "lora_bias must be true or false, not 'yes'"),
    **each("lora_bias", ["true"], AdapterError, "lora_bias is true, but lora_B.bias is missing"),
    **each("bias", ['"some"'], BAD, "bias must be one of none, all, lora_only, not 'some'"),
    **each("modules_to_save", ["3"], BAD, "modules_to_save must be a list of names, not 3"),
    **each("modules_to_save", ['["norm"]'], AdapterError, "holds nothing for 'norm' of modules_to_save"),
    **each("base_model_name_or_path", ["3"], BAD, "base_model_name_or_path must be text, not 3"),
    **each("init_lora_weights", ['"pissa_niter_4"', '"corda"', '"lora_ga"'], UNSUPPORTED,
           "can only be told with the adapter as it was before training"),
    **each("init_lora_weights", ['"loftq"'], UNSUPPORTED, "LoftQ quantised the base weight"),
    **each("init_lora_weights", ['"other"', "3"], UNSUPPORTED, "it may change the base weight before training"),
    **each("peft_type", ['"LOHA"', '"VERA"', '"IA3"', "null", '"PROMPT_TUNING"'], UNSUPPORTED, "peft_type is"),
    **each("use_dora", ["true"], AdapterError, "use_dora is true, but lora_magnitude_vector is missing"),
    **each("use_dora", ["1", '"yes"'], BAD, "use_dora must be true or false"),
    **each("peft_type", ['"LOHA"', '"LOKR"'], UNSUPPORTED, "a file in LyCORIS's names can be merged"),
    **each("peft_type", ['"VERA"'], UNSUPPORTED, "VERA multiplies trained vectors with random projections"),
    **each("peft_type", ['"XLORA"'], UNSUPPORTED, "XLORA routes or scales by what goes in"),
    **each("peft_type", ['"NEW"'], UNSUPPORTED, "NEW is no product of two trained factors"),
    **each("target_parameters", ['["norm.weight"]'], AdapterError, "holds nothing for 1 of the 1 target_parameters"),
    **each("target_parameters", ["3", "[3]"], BAD, "target_parameters must be a list of names"),
    **each("trainable_token_indices", ["[3]"], AdapterError, "holds no rows for trainable_token_indices"),
    **each("trainable_token_indices", ["[-1]", "[1, 1]", '{"a": 3}', "[true]"], BAD, "trainable_token_indices"),
    **each("layer_replication", ["[[2, 1]]", "[[0]]", '[[0, "1"]]', "[0, 2]", "3"], BAD, "layer_replication must be a list of"),
    **each("alora_invocation_tokens", ["[1]"], UNSUPPORTED, "alora_invocation_tokens is not supported"),
    **each("arrow_config", ['{"a": 1}'], UNSUPPORTED, "arrow_config is not supported"),
    **each("use_qalora", ['"yes"'], BAD, "use_qalora must be true or false"),
    **each("use_bdlora", ["3", "true"], BAD, "use_bdlora must be an object"),
    **each("use_bdlora", ['{"nblocks": 0}'], BAD, "use_bdlora: nblocks must be a positive integer"),
    **each("use_bdlora", ['{"nblocks": 3, "target_modules_bd_a": ["proj"]}'], AdapterError, "must hold 3 blocks, found [2, 8]"),
    **each("use_bdlora", ['{"target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_"]}'], BAD,
           "model.layers.0.q_proj is named by target_modules_bd_a and by target_modules_bd_b"),
    **each("kasa_config", ['{"beta": 1}'], AdapterError, "kasa_config is set, but lora_diag is missing"),
    **each("kasa_config", ["3", "true"], BAD, "kasa_config must be an object"),
    **each("megatron_config", ['{"a": 1}'], UNSUPPORTED, "megatron_config is not supported"),
    **each("lora_gamma", ["0.5"], UNSUPPORTED, "the field 'lora_gamma' is not known, and is 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FIELDS)
def test_fields_of_a_configuration(base: Path, adapter: Path, fault: str) -> None:
    text, kind, part = FIELDS[fault]
    raw(fault.split()[0], text)(adapter / CONFIG)
    error = refused(base, [adapter], kind, part)
    assert str(adapter) in str(error)


def test_every_field_of_pefts_configuration_is_known(base: Path, adapter: Path) -> None:
    import peft

    default = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=4).to_dict()
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in default.items()}
    (adapter / CONFIG).write_text(json.dumps(fields | {"peft_type": "LORA"}, default=str))
    assert lorafold.plan(base, [adapter]).notes == ()


def test_an_unknown_field_that_says_nothing_is_a_note(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, lora_gamma=None, lora_delta=0)
    notes = lorafold.plan(base, [adapter]).notes
    assert notes == (
        "the field 'lora_gamma' of adapter_config.json is not known; it is null",
        "the field 'lora_delta' of adapter_config.json is not known; it is 0",
    )


@pytest.mark.parametrize("field", ["target_modules", "target_parameters"])
def test_names_that_the_base_has_nothing_of_are_a_note(base: Path, adapter: Path, field: str) -> None:
    """PEFT asks that one of them matches: of what the base has none, nothing was lost."""
    more = {"target_modules": ["q_proj", "v_proj", "o_proj"], "target_parameters": ["experts.down_proj"]}[field]
    edit_json(adapter / CONFIG, **{field: more})
    (note,) = lorafold.plan(base, [adapter]).notes
    assert note.startswith(f"{field} names {more[-1]}, which the base has no")


@pytest.mark.parametrize(("alpha", "word"), [(0, "does nothing"), (-4, "negated")])
def test_an_alpha_that_does_something_odd_is_a_note(base: Path, adapter: Path, alpha: int, word: str) -> None:
    edit_json(adapter / CONFIG, lora_alpha=alpha)
    assert word in "".join(lorafold.plan(base, [adapter]).notes)


def test_patterns_that_overlap_are_a_note(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, alpha_pattern={"q_proj": 3, "layers.0.q_proj": 5, "v_proj": 4, ".*v_proj": 4})
    plan = lorafold.plan(base, [adapter])
    assert plan.notes == (
        "alpha_pattern: 'q_proj', first in the file, counts for model.layers.0.q_proj and others; 'layers.0.q_proj' fit it too",
    )
    scalings = {addend.module: addend.scaling for step in plan.steps for addend in step.addends}
    assert scalings["model.layers.0.q_proj"] == 1.5


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"peft_type": "LORA", "r": 2, "r": 2}', "\udcff"])
def test_a_configuration_that_is_no_object(base: Path, adapter: Path, text: str) -> None:
    (adapter / CONFIG).write_text(text, errors="surrogateescape")
    refused(base, [adapter], AdapterConfigError, CONFIG)
