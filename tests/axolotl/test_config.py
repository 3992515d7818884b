"""The configuration, through Axolotl's own loader, in this process."""

import os
import subprocess
import sys

import pytest
import yaml
from harness import DOTTED, HAS_ENTRY_POINTS, PLUGIN

from tests.support.plans import make_plan

NAMES = [DOTTED, "gelora_plugins.integrations.axolotl.GeLoRAPlugin"] + (["gelora"] if HAS_ENTRY_POINTS else [])


@pytest.fixture
def manager(monkeypatch):
    """Axolotl's plugin manager, empty as at the start of a process."""
    from axolotl.integrations.base import PluginManager

    monkeypatch.setattr(PluginManager, "_instance", None)
    return PluginManager


@pytest.fixture
def load(workplace, manager, tmp_path, monkeypatch):
    """Load a configuration with changes."""
    from axolotl.cli.config import load_cfg

    monkeypatch.chdir(tmp_path)

    def load(**changes):
        return load_cfg(str(workplace.write("loaded", output_dir=str(tmp_path / "out"), **changes)))

    return load


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gelora": {"polcy": "budget"}}, "gelora.polcy is not an option. Did you mean gelora.policy?"),
        ({"gelora": {"probe_samples": 0}}, "gelora.probe_samples is 0; expected"),
        ({"gelora": {"probe_samples": "many"}}, "gelora.probe_samples is 'many'; expected"),
        ({"gelora": {"policy": "bugdet"}}, "gelora.policy 'bugdet' does not exist; there are: budget, gelora"),
        ({"gelora": {"pooling": "median"}}, "gelora.pooling 'median' does not exist"),
        ({"gelora": {"on_failure": "ignore"}}, "gelora.on_failure is 'ignore'; expected one of: raise, keep"),
        ({"gelora": {"method": "colla"}}, "gelora.method 'colla' does not exist; there are: adalora, beamlora, cola"),
        ({"gelora": {"method": {"name": "flat_lora", "sigm": 1}}}, "method flat_lora was given 'sigm=1'. Did you mean"),
        ({"gelora": "budget"}, "gelora is 'budget'; expected a mapping"),
        ({"gelora": ["budget"]}, "gelora is ['budget']; expected a mapping"),
        ({"adapter": None}, "adapter is None, and `plugins` lists gelora, which chooses LoRA ranks; expected one of"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_errors_name_the_key(load, name, changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (pydantic's ValidationError)
        load(plugins=[name], **changes)
    assert message in str(error.value)


GRPO = {  # as little as Axolotl asks for
    "datasets": [{"path": "prose.jsonl", "ds_type": "json", "type": "rewards.transform"}],
    "trl": {"num_generations": 2, "max_completion_length": 8, "reward_funcs": ["rewards.length"]},
    "micro_batch_size": 2,
}


@pytest.mark.parametrize("rl", ["grpo", "gdpo"])
def test_a_training_that_writes_its_documents_is_refused_before_the_model_is_loaded(load, rl):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (pydantic's ValidationError)
        load(rl=rl, **GRPO)
    assert f"rl is {rl}: it writes what it trains on while it trains" in str(error.value)
    assert "gelora: {plan: plan.json}" in str(error.value)


@pytest.mark.parametrize("section", [{"plan": "plan.json"}, {"on_failure": "keep"}])
def test_a_plan_or_the_users_own_ranks_serve_a_training_that_writes_its_documents(load, section):
    assert load(rl="grpo", gelora=section, **GRPO).rl == "grpo"


@pytest.mark.parametrize("rl", ["ebft", "gdpo", "grpo"])
def test_every_kind_of_it_is_known_by_name(rl):
    """Whatever else Axolotl checks of such a configuration."""
    from axolotl.utils.schemas.enums import RLType
    from gelora_plugins.integrations.axolotl import GeLoRAArgs

    from gelora_plugins.errors import ConfigError

    for value in (rl, RLType(rl)):
        with pytest.raises(ConfigError, match=f"rl is {rl}: "):
            GeLoRAArgs.check_gelora({"adapter": "lora", "rl": value})


@pytest.mark.parametrize("rl", [None, "dpo", "ipo", "kto", "orpo", "simpo", "ebft"])
def test_trainings_on_rows_that_are_there_are_not_refused(rl):
    from gelora_plugins.integrations.axolotl import GeLoRAArgs

    GeLoRAArgs.check_gelora({"adapter": "lora", "rl": rl, "ebft": {"mode": "strided"}})


def test_the_command_says_in_one_sentence_why_there_is_no_plan(workplace, manager, tmp_path, monkeypatch):
    from click.testing import CliRunner
    from gelora_plugins.integrations.axolotl_cli import gelora

    monkeypatch.chdir(tmp_path)
    broken, other = tmp_path / "broken.yml", tmp_path / "other.yml"
    broken.write_text("a: [")
    other.write_text("[a]")
    for path, said in (
        (workplace.write("grpo", rl="grpo", **GRPO), "rl is grpo: it writes what it trains on while it trains"),
        (workplace.write("misspelt", gelora={"polcy": "budget"}), "gelora.polcy is not an option. Did you mean"),
        (broken, "broken.yml"),
        (other, "other.yml holds a list; expected a configuration of Axolotl"),
    ):
        ended = CliRunner().invoke(gelora, [str(path)])
        assert ended.exit_code == 2, ended.output
        (line,) = (line for line in ended.output.splitlines() if line.startswith("Error: "))
        assert said in line


def test_json_is_all_that_the_command_prints_on_standard_output(monkeypatch, capfd):
    """Also of what a handler logs that holds standard output since before, as Axolotl's do."""
    import json

    from click.testing import CliRunner
    from gelora_plugins.integrations import axolotl_cli
    from peft import LoraConfig

    plan = make_plan()

    def choose(config):
        os.write(1, b"a line of a log\n")
        print("of Axolotl")
        return plan, LoraConfig(r=8, lora_alpha=16)

    monkeypatch.setattr(axolotl_cli, "choose", choose)
    ended = CliRunner().invoke(axolotl_cli.gelora, [__file__, "--json"])
    assert json.loads(ended.stdout)["plan"] == json.loads(json.dumps(plan.to_dict()))
    assert "lora_rank_pattern" in ended.stderr
    assert "of Axolotl" in ended.stderr
    written = capfd.readouterr()
    assert "a line of a log" not in written.out
    assert "a line of a log" in written.err


def test_the_schema_of_what_is_mixed_into_axolotls_configuration_has_our_section():
    from gelora_plugins.integrations.axolotl import GeLoRAArgs

    from gelora_plugins import GeLoRAConfig

    section = GeLoRAArgs.model_json_schema()["properties"]["gelora"]
    assert section["properties"] == GeLoRAConfig.json_schema()["properties"]
    assert section["additionalProperties"] is False


def test_a_section_that_is_right_is_kept(load):
    cfg = load(gelora={"policy": "budget", "probe_samples": 96})
    assert cfg.gelora == {"policy": "budget", "probe_samples": 96}


@pytest.mark.parametrize("section", [None, {}])
def test_no_section_means_the_defaults(load, section):
    from gelora_plugins.integrations.axolotl import read_section

    from gelora_plugins import GeLoRAConfig

    assert read_section(load(gelora=section)) == GeLoRAConfig()


@pytest.mark.parametrize("plugins", [[name] for name in NAMES] + [NAMES])
def test_one_instance_serves_under_any_name(load, manager, plugins):
    from gelora_plugins.integrations.axolotl import GeLoRAPlugin

    cfg = load(plugins=plugins)
    ours = [plugin for plugin in manager().plugins.values() if isinstance(plugin, GeLoRAPlugin)]
    assert [plugin._serves(cfg) for plugin in ours].count(True) == 1
    assert len([plugin for plugin in ours if plugin.get_input_args() is not None]) == 1


def test_the_alias_does_nothing(load, manager):
    from axolotl.integrations.base import BasePlugin

    load(plugins=[DOTTED])
    assert type(manager().plugins["gelora"]) is BasePlugin


def test_not_named_means_nothing_is_done(load, manager, caplog):
    from gelora_plugins import GeLoRAPlugin

    cfg = load(plugins=None, gelora=None, adapter=None)
    assert "gelora" not in cfg
    loaded = [plugin for plugin in manager.get_instance().plugins.values() if isinstance(plugin, GeLoRAPlugin)]
    assert len(loaded) == HAS_ENTRY_POINTS
    for plugin in loaded or [GeLoRAPlugin()]:
        plugin.register(cfg)
        assert plugin.get_input_args() is None
        assert plugin.get_lora_config_kwargs(cfg) == {}
        plugin.pre_model_load(cfg)
        plugin.post_trainer_create(cfg, trainer=None)
        assert plugin.selection is None
    assert not [record for record in caplog.records if record.name.startswith("gelora_plugins")]


def test_a_section_without_the_plugin_is_pointed_out(manager, caplog):
    from gelora_plugins import GeLoRAPlugin

    GeLoRAPlugin().register({"gelora": {"policy": "budget"}})
    assert "`plugins` does not list gelora: all LoRA ranks stay lora_r" in caplog.text


def test_a_missing_plan_stops_before_the_model_is_loaded(load, manager):
    from gelora_plugins.errors import PlanError

    cfg = load(gelora={"plan": "missing.json"})
    with pytest.raises(PlanError, match=r"missing\.json cannot be read"):
        manager.get_instance().pre_model_load(cfg)
    manager.get_instance().pre_model_load(load(gelora={"plan": "missing.json", "on_failure": "keep"}))


def test_an_object_that_is_kept_forgets_the_configuration_before(load, manager, tmp_path):
    """Axolotl 0.21 keeps plugin objects in a sweep, or where a notebook trains twice; 0.19 makes them anew."""
    from gelora_plugins import GeLoRAPlugin

    make_plan().save(tmp_path / "plan.json")
    cfg = load(gelora={"plan": "plan.json"})
    plugin = next(p for p in manager().plugins.values() if isinstance(p, GeLoRAPlugin))
    assert plugin.get_lora_config_kwargs(cfg)
    assert plugin.plan is not None
    plugin.selection = "of the trainer before"
    plugin.register(load(gelora={"policy": "budget"}))
    assert (plugin.plan, plugin.selection) == (None, None)


def test_a_plan_is_forgotten_also_where_nobody_registers_the_next_configuration(load, manager, tmp_path):
    from gelora_plugins import GeLoRAPlugin

    make_plan().save(tmp_path / "plan.json")
    planned, chosen = load(gelora={"plan": "plan.json"}), load(gelora={"policy": "budget"})
    plugin = next(p for p in manager().plugins.values() if isinstance(p, GeLoRAPlugin))
    assert plugin.get_lora_config_kwargs(planned)
    assert plugin.get_lora_config_kwargs(chosen) == {}
    assert plugin.plan is None


def test_the_users_own_patterns_stay_in_force(load, manager, tmp_path):
    """The first pattern that matches a module wins in PEFT, and a saved adapter has them in another order."""
    from gelora_plugins.integrations.axolotl import lora_config
    from gelora_plugins.integrations.axolotl_cli import patterns_yaml
    from peft.utils.other import get_pattern_key

    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    cfg = load(gelora={"plan": "plan.json"}, lora_rank_pattern={"q": 3}, lora_alpha_pattern={"q": 6})
    kwargs = manager.get_instance().get_lora_config_kwargs(cfg)
    for name, rank in ((linear.name, rank) for linear, rank in linears_and_ranks(plan)):
        for pattern, theirs, planned in (("rank", 3, rank), ("alpha", 6, plan.alpha(rank))):
            patterns = dict(sorted(kwargs[f"{pattern}_pattern"].items()))
            assert patterns[get_pattern_key(patterns, name)] == (theirs if name.endswith(".q") else planned)
    printed = yaml.safe_load(patterns_yaml(plan, lora_config(cfg)).split("\n\n", 1)[1])
    assert printed["lora_rank_pattern"] == kwargs["rank_pattern"]
    assert load(plugins=None, gelora=None, **printed).lora_alpha_pattern == kwargs["alpha_pattern"]


def linears_and_ranks(plan):
    for block, rank in zip(plan.profile.layout.blocks, plan.ranks, strict=True):
        assert any(linear.name.endswith(".q") for linear in block.linears)
        for linear in block.linears:
            yield linear, rank


def test_a_plan_with_another_scaling_stops_before_the_model_is_loaded(load, manager, tmp_path):
    from gelora_plugins.errors import PlanError

    make_plan().save(tmp_path / "plan.json")
    cfg = load(gelora={"plan": "plan.json"}, lora_alpha=32)
    with pytest.raises(PlanError, match="keeps the scaling 2"):
        manager.get_instance().pre_model_load(cfg)


def test_scalings_that_axolotl_cannot_write_are_said_to_be_so():
    from gelora_plugins.integrations.axolotl_cli import patterns_yaml
    from peft import LoraConfig

    message = patterns_yaml(make_plan(lora_alpha=3), LoraConfig(r=8, lora_alpha=3))
    assert "Axolotl takes whole numbers there" in message
    assert "gelora: {plan: plan.json}" in message


def test_importing_the_plugin_imports_nothing_heavy_of_ours():
    code = (
        "import axolotl.integrations.base, sys\n"
        "before = set(sys.modules)\n"
        "import gelora_plugins; gelora_plugins.GeLoRAPlugin(); import gelora_plugins.integrations.axolotl_cli\n"
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('gelora_plugins')))\n"
        "print(*sorted(m for m in sys.modules if m.startswith('gelora_plugins')))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    theirs, ours = (set(line.split()) for line in out[-2:])
    assert ours <= {
        "gelora_plugins",
        "gelora_plugins.config",
        "gelora_plugins.errors",
        "gelora_plugins.integrations",
        "gelora_plugins.integrations.axolotl",
        "gelora_plugins.integrations.axolotl_cli",
        "gelora_plugins.mistakes",
        "gelora_plugins.text",
    }
    assert not {name.partition(".")[0] for name in theirs} & {"torch", "transformers", "peft", "pluggy", "scipy"}


def test_the_entry_points_are_the_documented_names():
    from importlib.metadata import distribution

    points = {(point.group, point.name): point for point in distribution("gelora").entry_points}
    assert points["axolotl.plugins", "gelora"].value.replace(":", ".") == DOTTED
    assert points["axolotl.cli_commands", "gelora"].load().name == "gelora"
    assert PLUGIN in NAMES
