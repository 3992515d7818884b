import dataclasses
import json
import re

import pytest
from transformers import HfArgumentParser

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ConfigError


def parse(*arguments):
    (config,) = HfArgumentParser((GeLoRAConfig,)).parse_args_into_dataclasses(list(arguments))
    return config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *[
            (name, value, f"{name} is {value!r}; expected a whole number of at least 1.")
            for name in ("probe_samples", "probe_max_length", "probe_batch_size")
            for value in (0, -5, 2.0, True, "16", None)
        ],
        *[
            ("probe_seed", value, f"probe_seed is {value!r}; expected a whole number of at least 0.")
            for value in (-1, 0.5, False, None)
        ],
        *[
            ("rounding", value, f"rounding is {value!r}; expected one of: nearest, ceil, floor, dimensions.")
            for value in ("round", "", None, ["ceil"])
        ],
        *[
            ("on_failure", value, f"on_failure is {value!r}; expected one of: raise, keep.")
            for value in ("warn", None, True)
        ],
        *[
            ("feature_storage", value, f"feature_storage is {value!r}; expected one of: memory, half, disk.")
            for value in ("ram", None, True)
        ],
        *[("standardise", value, f"standardise is {value!r}; expected true or false.") for value in (None, 1, "true")],
        *[
            ("target_std_error", value, f"target_std_error is {value!r}; expected a positive number, or nothing.")
            for value in (0, -0.1, float("nan"), True, "0.1")
        ],
        *[
            (name, value, f"{name} is {value!r}; expected the name of one, as a string.")
            for name in ("policy", "estimator", "pooling")
            for value in (None, 3, ["mean"])
        ],
        *[("plan", value, f"plan is {value!r}; expected the path of a saved plan, as a string.") for value in (3, {})],
    ],
)
def test_a_value_out_of_range_is_refused_with_what_was_expected(name, value, message):
    with pytest.raises(ConfigError) as caught:
        GeLoRAConfig(**{name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("probe_samples", 1),
        ("probe_max_length", 1),
        ("probe_batch_size", 1),
        ("probe_seed", 0),
        *[("rounding", value) for value in ("nearest", "ceil", "floor", "dimensions")],
        *[("on_failure", value) for value in ("raise", "keep")],
        *[("feature_storage", value) for value in ("memory", "half", "disk")],
        ("standardise", True),
        *[("target_std_error", value) for value in (None, 0.25, 1)],
        ("plan", "plan.json"),
        ("policy", "of-a-plugin"),
    ],
)
def test_a_value_at_the_edge_is_kept(name, value):
    assert getattr(GeLoRAConfig(**{name: value}), name) == value


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GeLoRAConfig().policy = "budget"


def test_from_dict_is_the_inverse_of_to_dict():
    config = GeLoRAConfig(policy="budget", probe_samples=77, plan="plan.json")
    assert GeLoRAConfig.from_dict(config.to_dict()) == config
    assert GeLoRAConfig.from_dict({}) == GeLoRAConfig()


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("polcy", "policy"),
        ("probe_sample", "probe_samples"),
        ("max_length", "probe_max_length"),
        ("roundng", "rounding"),
    ],
)
def test_from_dict_suggests_the_option_that_was_meant(typo, meant):
    with pytest.raises(ConfigError) as caught:
        GeLoRAConfig.from_dict({"policy": "budget", typo: 1}, where="axolotl.gelora")
    assert str(caught.value).startswith(
        f"axolotl.gelora.{typo} is not an option. Did you mean axolotl.gelora.{meant}? The options are: policy, "
    )


@pytest.mark.parametrize("name", ["zzz", 3, None])
def test_from_dict_lists_the_options_when_nothing_is_near(name):
    names = ", ".join(field.name for field in dataclasses.fields(GeLoRAConfig))
    with pytest.raises(
        ConfigError, match=f"^{re.escape(f'gelora.{name} is not an option. The options are: {names}.')}$"
    ):
        GeLoRAConfig.from_dict({name: 1})


@pytest.mark.parametrize("options", [None, [], "budget", True])
def test_from_dict_refuses_what_is_no_mapping(options):
    with pytest.raises(ConfigError, match=re.escape(f"gelora is {options!r}; expected a mapping of options.")):
        GeLoRAConfig.from_dict(options)


def test_from_dict_checks_the_values():
    with pytest.raises(ConfigError, match="probe_samples is 0"):
        GeLoRAConfig.from_dict({"probe_samples": 0})


def test_the_argument_parser_of_transformers_reads_it():
    assert parse() == GeLoRAConfig()
    assert parse("--policy", "budget") == GeLoRAConfig(policy="budget")
    assert parse("--probe_samples", "64", "--plan", "p.json", "--probe-seed", "3") == GeLoRAConfig(
        probe_samples=64, plan="p.json", probe_seed=3
    )
    assert parse("--standardise", "--target_std_error", "0.3", "--feature_storage", "disk") == GeLoRAConfig(
        standardise=True, target_std_error=0.3, feature_storage="disk"
    )


def test_the_argument_parser_checks_the_values():
    with pytest.raises(ConfigError, match="rounding is 'up'"):
        parse("--rounding", "up")


def test_every_option_says_what_it_does():
    help_text = HfArgumentParser((GeLoRAConfig,)).format_help()
    for field in dataclasses.fields(GeLoRAConfig):
        assert f"--{field.name}" in help_text
        assert len(field.metadata["help"]) > 20


def test_the_json_schema_says_of_every_option_what_it_is():
    schema = GeLoRAConfig.json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert list(schema["properties"]) == [field.name for field in dataclasses.fields(GeLoRAConfig)]
    kinds = {"string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)}
    for name, option in schema["properties"].items():
        named = [option["type"]] if isinstance(option["type"], str) else option["type"]
        assert type(option["default"]) in [kinds[kind] for kind in named if kind in kinds]
        assert option["default"] == getattr(GeLoRAConfig(), name)
        for value in option.get("enum", []):
            GeLoRAConfig.from_dict({name: value})
    assert schema["properties"]["on_failure"]["enum"] == ["raise", "keep"]
    assert schema["properties"]["target_std_error"]["type"] == ["number", "null"]
    assert "enum" not in schema["properties"]["policy"]  # plugins add to them
